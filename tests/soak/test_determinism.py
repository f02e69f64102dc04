"""Batches, threads, and the order of sources and shards do not change scores beyond a stated tolerance."""

import shutil
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
import torch
from support.faults import FinishedRun

from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import open_lineage, open_store
from less_assets.steps.selection import score_file
from less_assets.store.tables import read_parquet

TOLERANCE = 5e-3
"""Of a score, between -1 and 1, with features stored in 8 bits: a rounding that tips over is a step of 1/127."""


def scores(lineage: Lineage) -> pl.DataFrame:
    """Scores by example."""
    folder = lineage.folder("influence_scores", "sums")
    table = pl.concat([read_parquet(folder, score_file(shard)) for shard in lineage.shards()])
    return table.unique("example_id").sort("example_id")


@pytest.fixture
def elsewhere(finished: FinishedRun, tmp_path):
    """Another store over the same data, with the same warm-up, which depends on the number of threads by design."""
    finished.restore()
    copy = finished.tiny.folder / "again"
    for kept in ("warmup_sample", "warmup"):
        shutil.copytree(finished.root / kept, copy / kept)
    threads = torch.get_num_threads()
    yield copy
    torch.set_num_threads(threads)
    finished.restore()


def test_batches_threads_and_order_do_not_change_scores(finished, elsewhere: Path):
    settings = finished.tiny.settings
    before, sources = dict(settings["gradients"]), settings["pool"]["sources"]
    try:
        settings["gradients"] = before | {"token_budget": 40}
        settings["pool"]["sources"] = sources[::-1]
        settings["storage"] = {"root": str(elsewhere)}
        project = load_project(finished.tiny.path)
    finally:
        settings["gradients"], settings["pool"]["sources"] = before, sources
        settings["storage"] = {"root": "artifacts"}
    torch.set_num_threads(2)
    store = open_store(project)
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, store, instance)
        made = GraphRunner(build_definitions(project), project, store, instance, lambda _: None).run(
            Request(until="influence_scores")
        )
    assert "train_gradients" in made.materialized
    assert finished.tiny.path == finished.file  # written again, with the first store
    one, other = scores(finished.lineage), scores(open_lineage(project, store))
    assert one["example_id"].to_list() == other["example_id"].to_list()
    columns = [name for name in one.columns if "." in name]
    assert columns
    for name in columns:
        first, second = (np.stack(list(table[name].to_numpy())) for table in (one, other))
        np.testing.assert_allclose(first, second, atol=TOLERANCE, rtol=0, err_msg=name)
    assert one.select("status", "loss_tokens").equals(other.select("status", "loss_tokens"))


def test_the_same_project_gives_the_same_bytes_again(finished):
    for asset in ("influence_scores", "exact_scores", "selected_subset", "train_gradients", "warmup_checkpoints"):
        step = next(step for (name, _), step in finished.steps.items() if name == asset)
        assert finished.read_by(step) is None  # it compares every file
