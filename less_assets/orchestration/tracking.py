"""Tracking in MLflow, where the project file asks for it: a run for each model, and one for the leaderboard.

Belongs here: what is sent, and that it can stop nothing. No artifact depends on it: curves, figures and tables are read
from what is stored.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import dagster as dg

from less_assets.lineage.lineage import split
from less_assets.method.evaluation.leaderboard import in_words
from less_assets.project.project import Project
from less_assets.reading.files import BOARD, BOARD_MARKDOWN, CURVE
from less_assets.steps.registry import open_lineage
from less_assets.steps.shown import Stored

if TYPE_CHECKING:
    from mlflow.entities import Run

ADDRESS = "mlflow_run"
"""Name of the metadata value that says where an asset's MLflow run is."""
PREFIX = "less_assets."
"""Of the tags by which a run is found again, and of those that say where artifacts lie."""
PATIENCE_SECONDS, REPETITIONS = 10, 1
"""How long a server is waited for, and how often it is asked again: a run shall not stand still for its tracking."""
POINTS, PARAMETERS, CHARACTERS = 1000, 100, 6000
"""What MLflow takes at once of metrics and parameters, and the longest value of a parameter or tag."""
NOTE = "mlflow.note.content"
"""Tag whose Markdown MLflow shows as the description of a run."""


def trouble(project: Project) -> str | None:
    """Why a project cannot be tracked, in a sentence; None if it can, or asks for no tracking."""
    if project.tracking.mlflow is None:
        return None
    try:
        Tracker(project)
    except Exception as error:  # whatever server, database or proxy may meet
        return f"MLflow at {_without_password(project.tracking.mlflow)} cannot be reached: {_first_line(error)}"
    return None


def track(stored: Stored, warn: Callable[[str], object]) -> dict[str, dg.MetadataValue]:
    """Send what was made to MLflow, if it is something that is tracked.

    Args:
        stored: What was made.
        warn: Receives a line if it could not be sent; nothing else happens then.

    Returns:
        The address of the MLflow run, under `ADDRESS`; empty if there is none.
    """
    project = stored.lineage.project
    if project.tracking.mlflow is None or stored.manifest.kind not in _SENT:
        return {}
    try:
        tracker = Tracker(project)
        now = replace(stored, lineage=open_lineage(project, stored.lineage.store))  # which knows what was just made
        run = _SENT[stored.manifest.kind](tracker, now)
    except Exception as error:  # as above: nothing of it is worth a failed run
        warn(f"not tracked in MLflow: {_first_line(error)}")
        return {}
    return {} if run is None else {ADDRESS: tracker.address(run)}


class Tracker:
    """MLflow's experiment of a project, which has the project's name.

    Args:
        project: Names the server.

    Raises:
        ImportError: The package is not installed.
        Exception: Whatever the server or database meets.
    """

    def __init__(self, project: Project) -> None:
        for name, value in {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": PATIENCE_SECONDS,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": REPETITIONS,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }.items():
            os.environ.setdefault(name, str(value))
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ImportError("the package is not installed (pip install 'less-assets[mlflow]')") from error
        for logger in ("mlflow", "alembic"):  # they tell of each table that they create
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._project, self._uri = project, str(project.tracking.mlflow)
        self._client: MlflowClient = MlflowClient(tracking_uri=self._uri)
        known = self._client.get_experiment_by_name(project.name)
        self._experiment = known.experiment_id if known else self._client.create_experiment(project.name)

    def model_run(self, stored: Stored) -> "Run | None":
        """The run of the model that an artifact of a recipe and a task belongs to; None while there is no such model.

        It is begun with the model's settings if the model has none yet. Another model of the same recipe and task,
        trained with other settings or on other rows, has a run of its own.
        """
        lineage, partition = stored.lineage, stored.partition
        if lineage.status("finetuned_model", partition).state != "fresh":
            return None
        recipe, task = split(partition)
        tags = {"partition": partition, "model": lineage.fresh("finetuned_model", partition).fingerprint}
        if run := self._found(tags):
            return run
        run = self._begun(partition, tags | {"recipe": recipe, "task": task})
        settings = {
            "recipe": self._project.recipe_settings(recipe),
            "finetuning": self._project.finetuning_settings(recipe),
            "warmup": self._project.warmup.model_dump(mode="json"),
            "gradients": self._project.gradients.model_dump(mode="json"),
        }
        self._set(run, params={name: str(value)[:CHARACTERS] for name, value in _flat(settings)})
        self.link(run, "selected_subset", str(lineage.folder("selected_subset", partition).root))
        return run

    def board_run(self, stored: Stored) -> "Run":
        """The run of a leaderboard."""
        tags = {"leaderboard": stored.manifest.fingerprint}
        return self._found(tags) or self._begun("leaderboard", tags)

    def link(self, run: "Run", asset: str, path: str) -> None:
        """Say where an artifact lies."""
        self._client.set_tag(run.info.run_id, f"{PREFIX}{asset}", path[:CHARACTERS])

    def note(self, run: "Run", markdown: str) -> None:
        """Describe a run."""
        self._client.set_tag(run.info.run_id, NOTE, markdown[:CHARACTERS])

    def curve(self, run: "Run", name: str, steps: list[int], values: list[float]) -> None:
        """Log a metric at several steps, unless that was done."""
        if not self._client.get_metric_history(run.info.run_id, name):
            self._set(run, metrics=[(name, value, step) for step, value in zip(steps, values, strict=True)])

    def figures(self, run: "Run", values: Mapping[str, float | None]) -> None:
        """Log metrics of one value; what is not known is left out."""
        self._set(run, metrics=[(name, value, 0) for name, value in values.items() if value is not None])

    def finish(self, run: "Run") -> None:
        """Declare a run finished; it may still be added to."""
        self._client.set_terminated(run.info.run_id)

    def address(self, run: "Run") -> dg.MetadataValue:
        """Where a run is: a link to MLflow's pages, or how to find it in a database."""
        uri = _without_password(self._uri)
        if urlsplit(uri).scheme in ("http", "https"):
            page = f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
            return dg.MetadataValue.url(page)
        return dg.MetadataValue.text(f"run {run.info.run_id} in {uri}")

    def _found(self, tags: Mapping[str, str]) -> "Run | None":
        wanted = " and ".join(f"tags.`{PREFIX}{name}` = '{value}'" for name, value in tags.items())
        return next(iter(self._client.search_runs([self._experiment], wanted, max_results=1)), None)

    def _begun(self, name: str, tags: Mapping[str, str]) -> "Run":
        named = {f"{PREFIX}{tag}": value for tag, value in tags.items()}
        return self._client.create_run(self._experiment, tags=named, run_name=name)

    def _set(
        self,
        run: "Run",
        params: Mapping[str, str] | None = None,
        metrics: list[tuple[str, float, int]] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        given = [Param(name, value) for name, value in (params or {}).items()]
        points = [Metric(name, value, now, step) for name, value, step in metrics or []]
        for start in range(0, len(given), PARAMETERS):
            self._client.log_batch(run.info.run_id, params=given[start : start + PARAMETERS])
        for start in range(0, len(points), POINTS):
            self._client.log_batch(run.info.run_id, metrics=points[start : start + POINTS])


def _send_model(tracker: Tracker, stored: Stored) -> "Run | None":
    """The training's loss at each step."""
    if run := tracker.model_run(stored):
        tracker.link(run, "finetuned_model", str(stored.folder.root))
        if CURVE in stored.manifest.files:
            curve = stored.table(CURVE, ["step", "loss"])
            tracker.curve(run, "training_loss", curve["step"].to_list(), curve["loss"].to_list())
        tracker.finish(run)
    return run


def _send_evaluation(tracker: Tracker, stored: Stored) -> "Run | None":
    """Validation loss, answer loss and scores, as `task/metric`."""
    if run := tracker.model_run(stored):
        tracker.link(run, "eval_results", str(stored.folder.root))
        metrics: Any = stored.manifest.summary.get("metrics") or {}
        tracker.figures(run, {_metric_name(name): value for name, value in metrics.items()})
    return run


def _send_report(tracker: Tracker, stored: Stored) -> "Run | None":
    """Where the report is."""
    if run := tracker.model_run(stored):
        tracker.link(run, "selection_report", str(stored.folder.root))
    return run


def _send_board(tracker: Tracker, stored: Stored) -> "Run":
    """The leaderboard as the run's description, and its values as `task/recipe/metric`."""
    run = tracker.board_run(stored)
    tracker.link(run, "leaderboard", str(stored.folder.root))
    tracker.note(run, stored.folder.read_bytes(BOARD_MARKDOWN).decode())
    rows = stored.table(BOARD, ["task", "recipe", "metric", "value"]).iter_rows()
    tracker.figures(run, {_metric_name(f"{task}/{recipe}/{metric}"): value for task, recipe, metric, value in rows})
    tracker.finish(run)
    return run


_SENT: dict[str, Callable[[Tracker, Stored], "Run | None"]] = {
    "finetuned_model": _send_model,
    "eval_results": _send_evaluation,
    "selection_report": _send_report,
    "leaderboard": _send_board,
}


def _metric_name(figure: str) -> str:
    """`task/metric` with the loss called what it is."""
    above, _, metric = figure.rpartition("/")
    return f"{above}/{in_words(metric).replace(' ', '_')}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings under names with dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
