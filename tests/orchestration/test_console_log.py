"""What a person and a program read while a run goes on: which partition, how far, how fast, how long still."""

import json
import logging
from types import SimpleNamespace

import dagster as dg
import pytest

from less_assets.compute import progress as progress_module
from less_assets.compute.progress import Progress
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
    ("what", "unit", "done", "tokens", "expected"),
    [
        (
            "train_gradients epoch-1|dolly-00000",
            "rows",
            2_500,
            10_000,
            {"partition": "epoch-1|dolly-00000", "per_second": 250, "tokens_per_second": 1_000, "seconds_left": 26_000},
        ),
        ("influence_scores", "rows for 2 tasks", 1, 0, {"per_second": 0.1, "seconds_left": 65_024_990}),
        ("influence_scores", "rows", 0, 0, {"per_second": 0}),
    ],
    ids=["with partition and tokens", "for several tasks", "before anything is done"],
)
def test_a_program_gets_the_figures_of_a_progress_line_from_a_run(
    clock, capsys, monkeypatch, what, unit, done, tokens, expected
):
    @dg.asset
    def thing(context: dg.AssetExecutionContext) -> None:
        progress = Progress(what, 6_502_500, unit, context.log.info)
        clock.now += 10
        progress(done, tokens)
        context.log.info("the chat template refuses 3 rows: see below")

    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    definitions = dg.Definitions([thing], loggers={"console": compact_console})
    job = definitions.resolve_implicit_global_asset_job_def()
    capsys.readouterr()
    run = job.execute_in_process(run_config={"loggers": {"console": {"config": {}}}}).run_id
    entries = [json.loads(text) for text in capsys.readouterr().err.splitlines() if text.startswith("{")]
    of_progress, plain = (entry for entry in entries if entry["message"].startswith((what, "the chat template")))
    for entry in (of_progress, plain):
        assert (entry.pop("run"), entry.pop("asset"), entry.pop("level")) == (run, "thing", "info")
        assert entry.pop("time")
    assert of_progress.pop("message").endswith(" left")
    assert of_progress == {"done": done, "total": 6_502_500, "unit": unit, **expected}
    assert plain.keys() == {"message"}, "the figures belong to one line"


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
