"""What a person and a program read while a run goes on: which partition, how far, how fast, how long still."""

import json
import logging
from types import SimpleNamespace

import pytest

from less_assets.compute import progress as progress_module
from less_assets.compute.progress import Progress, figures
from less_assets.orchestration.console_log import FORMAT_VARIABLE, compact_console


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time that stands still unless it is told to go on."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: found.now)
    return found


def test_a_progress_line_names_partition_share_rates_and_time_left(clock):
    lines: list[str] = []
    progress = Progress("train_gradients epoch-1|dolly-00000", 400, "rows", lines.append)
    clock.now += 1
    progress(50, 5_000)
    assert lines == [], "not every batch"
    clock.now += 9
    progress(50, 5_000)
    assert lines == [
        "train_gradients epoch-1|dolly-00000: 100 of 400 rows (25 %), 10.0 rows/s, 1,000 tokens/s, 30 s left"
    ]


def test_what_an_earlier_run_has_done_counts_as_done_and_not_for_the_rate(clock):
    lines: list[str] = []
    progress = Progress("x", 400, "rows", lines.append, done=300)
    clock.now += 10
    progress(50)
    assert lines[0] == "x: 300 of 400 rows were done before, going on from there"
    assert lines[1] == "x: 350 of 400 rows (88 %), 5.0 rows/s, 10 s left"


@pytest.mark.parametrize(
    ("what", "tokens", "done", "expected"),
    [
        (
            "train_gradients epoch-1|dolly-00000",
            10_000,
            2_500,
            {"partition": "epoch-1|dolly-00000", "unit": "rows", "tokens_per_second": 1_000, "seconds_left": 25_980},
        ),
        ("influence_scores", 0, 2_500, {"unit": "rows for 2 tasks", "seconds_left": 25_980}),
        ("influence_scores", 0, 0, {"unit": "rows"}),
    ],
    ids=["with partition and tokens", "for several tasks", "before anything is done"],
)
def test_a_program_finds_the_figures_of_a_progress_line(clock, what, tokens, done, expected):
    lines: list[str] = []
    progress = Progress(what, 6_502_500, expected["unit"], lines.append)
    clock.now += 10
    progress(done, tokens)
    found = figures(lines[0])
    assert found.pop("asset") == what.partition(" ")[0]
    assert (found.pop("done"), found.pop("total"), found.pop("per_second")) == (done, 6_502_500, done / 10)
    assert found == expected
    assert figures("the chat template refuses 3 rows: see below") == {}


def line(capsys, message: str = "half »way«") -> str:
    """What the console logger makes of a message of Dagster's."""
    logger = compact_console.logger_fn(SimpleNamespace(logger_config={"log_level": "INFO"}))
    record = logging.LogRecord("dagster", logging.WARNING, "", 0, "long form", None, None)
    record.dagster_meta = {"run_id": "run-1", "step_key": "train_gradients", "orig_message": message}
    logger.handle(record)
    return capsys.readouterr().err


def test_lines_are_short_for_people(capsys):
    assert line(capsys).rstrip().endswith("  warning: half »way«")


def test_lines_are_json_for_programs(capsys, monkeypatch):
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    found = json.loads(line(capsys))
    assert found.pop("time")
    assert found == {"level": "warning", "run": "run-1", "asset": "train_gradients", "message": "half »way«"}
    found = json.loads(line(capsys, "train_gradients e|s: 100 of 400 rows (25 %), 10.0 rows/s, 30 s left"))
    assert (found["run"], found["partition"], found["done"], found["seconds_left"]) == ("run-1", "e|s", 100, 30)
