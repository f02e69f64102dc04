"""Artifacts that an earlier version made stay fresh: users do not compute again because code has moved."""

import json
import os
import tarfile
from pathlib import Path

import dagster as dg
import pytest

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import open_lineage, open_store

ARCHIVE = Path(__file__).parents[1] / "data/stored.tar.xz"
"""A project with every kind of recipe, run to its end at commit b31d571, with the fingerprint of each artifact."""
MADE_AGAIN = {"selection_report"}
"""Pages follow the code that draws them."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for file in (folder / "stored/model").iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))  # the time of a model's files is part of its stamp
    return folder / "stored"


def test_every_artifact_has_the_fingerprint_it_had(stored):
    project = load_project(stored / "project.yaml")
    lineage = open_lineage(project, open_store(project))
    known = json.loads((stored / "fingerprints.json").read_text())
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, lineage.store, instance)
        needed = GraphRunner(build_definitions(project), project, lineage.store, instance, print).needed(Request())
    names = {(f"{asset}/{key}" if key else asset): (asset, key) for asset, keys in needed.items() for key in keys}
    assert names.keys() == known.keys()
    changed = {name for name, artifact in names.items() if lineage.plan(*artifact).fingerprint != known[name]}
    assert {name.partition("/")[0] for name in changed} <= MADE_AGAIN
    stale = {name for name, (asset, key) in names.items() if lineage.status(asset, key).state != "fresh"}
    assert {name.partition("/")[0] for name in stale} <= MADE_AGAIN
