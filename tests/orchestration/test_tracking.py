"""Tracking in a real MLflow on a file of SQLite: what it is told, and that a run goes on without it."""

import json
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support.tiny import TinyProject
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.lineage.lineage import Lineage
from less_assets.orchestration import tracking
from less_assets.project.project import load_project
from less_assets.reading.files import BOARD, BOARD_MARKDOWN, CURVE
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

NOBODY = "http://127.0.0.1:9"


def command(tiny: TinyProject, *arguments: str):
    result = CliRunner().invoke(app, [*arguments, "--project", str(tiny.path)])
    assert result.exit_code == 0, result.output
    return result


def lineage(tiny: TinyProject) -> Lineage:
    project = load_project(tiny.path)
    return open_lineage(project, open_store(project))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_model) -> TinyProject:
    """A project of one task that was run with tracking up to its leaderboard."""
    tiny = TinyProject(tmp_path_factory.mktemp("tracked"), tiny_model)
    tiny.settings["tasks"] = tiny.settings["tasks"][:1]
    tiny.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.2},
        {"name": "base", "strategy": "none"},
    ]
    tiny.settings["tracking"] = {"mlflow": "sqlite:///mlflow.db"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        command(tiny, "run", "--no-extras")
        assert not list(Path.cwd().iterdir()), "tracking left something in the current folder"
    return tiny


@pytest.fixture(scope="module")
def runs(tracked) -> dict[str, Run]:
    """MLflow's runs of the project, by name."""
    client = MlflowClient(f"sqlite:///{tracked.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_each_model_has_a_run_with_settings_losses_and_links(tracked, runs):
    assert set(runs) == {"less|sums", "base|sums", "leaderboard"}
    stored, run = lineage(tracked), runs["less|sums"]
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.strategy"] == "less"
    assert (
        float(run.data.params["finetuning.training.learning_rate"])
        == load_project(tracked.path).finetuning.learning_rate
    )
    curve = read_parquet(stored.folder("finetuned_model", "less|sums"), CURVE)
    client = MlflowClient(f"sqlite:///{tracked.folder}/mlflow.db")
    history = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "training_loss"))
    assert history == list(curve.select("step", "loss").iter_rows())
    figures = stored.summary("eval_results", "less|sums")["metrics"]
    assert run.data.metrics["sums/answer_loss"] == figures["sums/loss"]
    assert run.data.metrics["sums/exact_match"] == figures["sums/exact_match"]
    assert "training_loss" not in runs["base|sums"].data.metrics
    for asset in ("selected_subset", "finetuned_model", "eval_results"):
        assert run.data.tags[f"less_assets.{asset}"] == str(stored.folder(asset, "less|sums").root)


def test_the_leaderboard_is_a_run_whose_description_is_its_table(tracked, runs):
    folder, run = lineage(tracked).folder("leaderboard"), runs["leaderboard"]
    assert run.data.tags["mlflow.note.content"] == folder.path(BOARD_MARKDOWN).read_text()
    board = read_parquet(folder, BOARD).filter(pl.col("recipe") == "less", pl.col("metric") == "exact_match")
    assert run.data.metrics["sums/less/exact_match"] == board["value"][0]


def test_the_address_of_the_run_stands_in_the_assets_metadata(tracked, runs):
    with dg.DagsterInstance.from_config(str(tracked.folder / "artifacts/.dagster")) as instance:
        for asset, partition, name in [
            ("finetuned_model", "less|sums", "less|sums"),
            ("eval_results", "less|sums", "less|sums"),
            ("leaderboard", None, "leaderboard"),
        ]:
            wanted = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition] if partition else None)
            (record,) = instance.fetch_materializations(wanted, limit=1).records
            address = record.asset_materialization.metadata["mlflow_run"].value
            assert address == f"run {runs[name].info.run_id} in sqlite:///{tracked.folder}/mlflow.db"


def test_without_tracking_everything_is_fresh_and_a_server_that_is_not_there_is_told_first(tracked, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = dict(tracked.settings)
    try:
        tracked.settings["tracking"] = {"mlflow": NOBODY}
        told = command(tracked, "run", "--no-extras", "--verify")  # else nothing is to do, and no server is asked
        assert f"warning: MLflow at {NOBODY} cannot be reached" in told.stderr.splitlines()[0]
        assert "0 artifacts made" in told.stdout
        events = [
            json.loads(line)
            for line in command(tracked, "run", "--no-extras", "--verify", "--json").stdout.splitlines()
        ]
        assert (events[0]["level"], NOBODY in events[0]["message"]) == ("warning", True)
    finally:
        tracked.settings = settings


def test_a_server_that_fails_later_costs_a_warning_each_and_no_result(tracked, runs, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)

    def full(*_):
        raise OSError("disk full, say\nand more")

    monkeypatch.setattr(tracking.Tracker, "model_run", full)
    tracked.settings["finetuning"]["seed"] = 5
    told = command(tracked, "run", "--no-extras")
    assert told.stderr.count("warning: not tracked in MLflow: disk full, say\n") == 2, "the model and its evaluation"
    assert lineage(tracked).status("eval_results", "less|sums").state == "fresh"
    monkeypatch.undo()
    client = MlflowClient(f"sqlite:///{tracked.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    assert len(client.search_runs([experiment])) == len(runs) + 1, "the new leaderboard was tracked all the same"


def test_passwords_do_not_come_into_metadata():
    assert tracking._without_password("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert tracking._without_password("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"
