"""Artifacts that an earlier version made stay fresh: users do not compute again because code has moved."""

import json
import os
import tarfile
from pathlib import Path

import dagster as dg
import pytest
from support.graph import run

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import open_lineage, open_store

ARCHIVE = Path(__file__).parents[1] / "data/stored.tar.xz"
"""A project with every kind of recipe, run to its end at commit b31d571, with the fingerprint of each artifact."""
MADE_AGAIN = {"selection_report", "eval_results", "task_results", "leaderboard"}
"""Pages follow the code that draws them; answers of held-out questions are graded without Markdown now."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for file in (folder / "stored/model").iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))  # the time of a model's files is part of its stamp
    return folder / "stored"


def test_every_artifact_is_as_fresh_as_it_was(stored):
    """But the draws of a recipe with seeds, which are independent of the warm-up's now, and what counts tokens.

    Lengths in tokens follow the tokenizer's files, which such a selection did not read before.
    Rows are tried on the tokenizer first, which earlier versions did not; none of them is refused.
    """
    project = load_project(stored / "project.yaml")
    with dg.DagsterInstance.ephemeral() as instance:
        run(project.path, instance, Request(until="pool_index"))
    lineage = open_lineage(project, open_store(project))
    known = json.loads((stored / "fingerprints.json").read_text())
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, lineage.store, instance)
        needed = GraphRunner(build_definitions(project), project, lineage.store, instance, print).needed(Request())
    names = {(f"{asset}/{key}" if key else asset): (asset, key) for asset, keys in needed.items() for key in keys}
    assert {name for name, (asset, _) in names.items() if asset != "refused_rows"} == known.keys()
    changed = {
        key for key, recipe in project.recipe_keys.items() if recipe.seed is not None or project.counts_tokens(key)
    }
    kept = {
        name: (asset, key)
        for name, (asset, key) in names.items()
        if asset not in {*MADE_AGAIN, "refused_rows"} and (key or "").partition("|")[0] not in changed
    }
    assert len(kept) > 40
    assert {name for name, artifact in kept.items() if lineage.status(*artifact).state != "fresh"} == set()
    assert {name for name, artifact in kept.items() if lineage.plan(*artifact).fingerprint != known[name]} == set()
