"""A running `dagster dev` over a tiny project, driven over GraphQL as the UI drives it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from support.dagster_dev import DagsterDev
from support.graph import run
from support.tiny import TinyProject

from less_assets.project.project import load_project
from less_assets.running.runner import Request, register_shards
from less_assets.steps.registry import open_store

ROWS = {"plus-00000": 16, "plus-00001": 8, "colors-00000": 16, "colors-00001": 4}
SHARDS = list(ROWS)
BACKFILL = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
TARGETED = """query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill {
  assetBackfillData { assetBackfillStatuses { ... on AssetPartitionsStatusCounts {
    assetKey { path } numPartitionsTargeted } } } } } }"""
CANCEL = "mutation($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"


def scan(dev: DagsterDev, project: TinyProject) -> None:
    """Register the pool's shards, as the sensor and the command do."""
    loaded = load_project(project.path)
    with dg.DagsterInstance.from_config(str(dev.home)) as instance:
        register_shards(loaded, open_store(loaded), instance)


@pytest.fixture(scope="module")
def server(tiny_model) -> Iterator[tuple[DagsterDev, TinyProject]]:
    """One server for all tests of this file: starting it costs more than they do."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="less-dev-", dir=memory if memory.is_dir() else None))
    project = TinyProject(root / "project", tiny_model)
    project.settings["recipes"] = project.settings["recipes"][:2]
    project_file = project.path
    (root / "home").mkdir()
    dev = DagsterDev(project_file, root / "home")
    try:
        dev.wait_until_loaded()
        yield dev, project
    finally:
        dev.stop()
        shutil.rmtree(root, ignore_errors=True)  # a run that was cancelled may still be writing its last words


def test_the_code_location_is_loaded(server):
    dev, _ = server
    entry = dev.wait_until_loaded()
    assert (entry["name"], entry["loadStatus"]) == ("less_assets", "LOADED")
    assert "message" not in (entry["locationOrLoadError"] or {})


def test_ranges_are_launched_and_read_back_partition_by_partition(server):
    """One story, as a person would click it: each step needs what the one before it has made."""
    dev, project = server
    scan(dev, project)
    assert dev.stale_status("instruction_pool", SHARDS[0]) == "MISSING"
    assert dev.outcome(dev.launch(["instruction_pool"], SHARDS[0], SHARDS[-1])) == "SUCCESS"
    shards = dev.materializations("instruction_pool", *SHARDS)
    assert {key: shard["dagster/partition_row_count"] for key, shard in shards.items()} == ROWS
    assert len({shard["version"] for shard in shards.values()}) == len(SHARDS), "each partition has its own version"
    assert all(len(shard["fingerprint"]) == 32 for shard in shards.values())
    assert [dev.stale_status("instruction_pool", key) for key in SHARDS] == ["FRESH"] * 4

    with dg.DagsterInstance.from_config(str(dev.home)) as instance:  # the command writes to the same records
        for until in ("warmup_checkpoints", "target_examples"):
            run(project.path, instance, Request(tasks=("sky",), until=until))
    keys = [f"epoch-1|{shard}" for shard in SHARDS]
    launched = [
        dev.launch(["train_gradients"], keys[0], keys[-1]),
        dev.launch(["target_gradients"], "epoch-1|sky", "epoch-2|sky"),
    ]
    assert [dev.outcome(run_id) for run_id in launched] == ["SUCCESS", "SUCCESS"]
    found = dev.materializations("train_gradients")
    assert {key: shown["dagster/partition_row_count"] for key, shown in found.items()} == {
        f"epoch-1|{shard}": rows for shard, rows in ROWS.items()
    }
    assert dev.stale_status("train_gradients", keys[1]) == "FRESH"
    assert dev.stale_status("train_gradients", keys[1].replace("epoch-1", "epoch-2")) == "MISSING"
    assert set(dev.materializations("target_gradients")) == {"epoch-1|sky", "epoch-2|sky"}
    assert [dev.stale_status("target_gradients", f"epoch-1|{task}") for task in ("sky", "sums")] == ["FRESH", "MISSING"]

    # The gate does not open on missing gradients; a changed shard makes its own gradients stale, and nobody else's.
    rows = (project.folder / "data/colors.jsonl").read_text().splitlines(keepends=True)
    (project.folder / "data/colors.jsonl").write_text("".join(rows[:-1]))
    gate = dev.launch(["gradient_datastore"], "epoch-2")
    scan(dev, project)
    assert dev.outcome(dev.launch(["instruction_pool"], SHARDS[-1])) == "SUCCESS"
    assert dev.materializations("instruction_pool", SHARDS[-1])[SHARDS[-1]]["dagster/partition_row_count"] == 3
    assert [dev.stale_status("train_gradients", key) for key in keys] == ["FRESH", "FRESH", "FRESH", "STALE"]
    assert dev.stale_status("pool_index") == "STALE"
    assert dev.outcome(gate) == "FAILURE"
    assert dev.materializations("gradient_datastore") == {}


def test_a_backfill_of_one_tasks_selection_targets_only_that_task(server):
    dev, _ = server
    assets = ["target_gradients", "influence_scores", "selected_subset"]
    params = {
        "assetSelection": [{"path": [asset]} for asset in assets],
        "partitionNames": ["epoch-1|sky", "epoch-2|sky"],
    }
    launched = dev.query(BACKFILL, params=params)["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched
    found = dev.query(TARGETED, id=launched["backfillId"])["partitionBackfillOrError"]["assetBackfillData"]
    dev.query(CANCEL, id=launched["backfillId"])
    targeted = {
        status["assetKey"]["path"][0]: status["numPartitionsTargeted"] for status in found["assetBackfillStatuses"]
    }
    assert targeted == {"target_gradients": 2, "influence_scores": 1, "selected_subset": 1}
