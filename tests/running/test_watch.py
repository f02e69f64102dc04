"""The live block: where a run is, how long it still takes, what is ready; and what stays above it."""

import io

import pytest
from rich.console import Console

from less_assets.running import watch
from less_assets.running.watch import LiveBlock


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def text(block: LiveBlock) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(block.shown())
    return console.file.getvalue()


def test_the_block_says_stage_bar_time_left_in_total_and_what_is_ready(clock):
    output = io.StringIO()
    block = LiveBlock(Console(file=output, width=60), {"train_gradients": 100.0, "finetuned_model": 60.0})
    block.tell("asset_started", {"asset": "pool_index", "stage": 1, "stages": 9, "partitions": 1})
    block.tell("made", {"asset": "pool_index", "partitions": []})
    block.tell("asset_finished", {"asset": "pool_index", "made": 1, "failed": 0})
    block.tell("asset_started", {"asset": "train_gradients", "stage": 4, "stages": 9, "partitions": 8})
    assert "stage 4 of 9  train_gradients" in text(block)
    assert "0 of 8 made" in text(block)
    assert "about 2 min 40 s left in total" in text(block)
    assert "ready: pool_index" in text(block)
    clock[0] += 30
    progress = {"level": "info", "message": "…", "done": 250, "total": 1000, "unit": "rows", "seconds_left": 90}
    block._hear(progress | {"partition": "epoch-1|plus-00000"})
    assert "epoch-1|plus-00000" in text(block)
    assert "250 of 1,000 rows" in text(block)
    assert "1 min 30 s left of it" in text(block)
    assert "about 2 min 10 s left in total" in text(block)
    clock[0] += 500
    assert "about 1 min 0 s left in total" in text(block), "an asset that takes longer does not eat the others' time"
    block.tell("asset_finished", {"asset": "train_gradients", "made": 8, "failed": 0})
    block.tell("asset_started", {"asset": "finetuned_model", "stage": 7, "stages": 9, "partitions": 3})
    block.tell("made", {"asset": "finetuned_model", "partitions": ["less|sums", "full|sums"]})
    assert "2 of 3 made" in text(block), "figures of another asset's progress are gone"
    assert output.getvalue() == "", "nothing is left above the block by that"


def test_paths_of_subsets_and_warnings_stay_whole_above_the_block():
    output = io.StringIO()
    block = LiveBlock(Console(file=output, width=40), {})
    path = "/a/long/folder/" + "x" * 60 + "/subset.jsonl"
    block.tell("subset", {"recipe": "less", "task": "[sums]", "path": path})
    block._hear({"level": "warning", "message": "left out: [bold]colors"})
    block._hear({"level": "info", "message": "of no lasting interest"})
    assert output.getvalue() == f"rows of less for [sums]: {path}\nwarning: left out: [bold]colors\n"
    assert "of no lasting interest" in text(block)
    assert "left in total" not in text(block), "no plan, no promise"
