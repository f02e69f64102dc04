"""Runs of a whole graph, through the same runner as the command line."""

from dataclasses import replace

import dagster as dg
import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.reading.files import SUBSET
from less_assets.running.runner import GraphRunner, Outcome, Request, register_shards
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.store.tables import read_parquet
from support.tiny import TinyProject

EVERYTHING = Request()


def run(project_file, instance, request=EVERYTHING) -> Outcome:
    """Load the project and bring it up to date; returns what was materialized."""
    project = load_project(project_file)
    store = open_store(project)
    register_shards(project, store, instance)
    return GraphRunner(build_definitions(project), project, store, instance, print).run(request)


class StoredSubsets:
    """A tiny project brought up to its subsets, and what it has stored.

    Args:
        project: Its files and settings.
        instance: Dagster's records.
        request: What `run` makes.
    """

    def __init__(self, project: TinyProject, instance: dg.DagsterInstance, request: Request) -> None:
        self.tiny, self.instance, self.request = project, instance, request

    def run(self, request: Request | None = None) -> dict[str, list]:
        """Bring it up to date; what was materialized, by asset."""
        return run(self.tiny.path, self.instance, request or self.request).materialized

    @property
    def lineage(self) -> Lineage:
        """The project as its file is now, and what is stored."""
        project = load_project(self.tiny.path)
        return open_lineage(project, open_store(project))

    def subset(self, key: str) -> pl.DataFrame:
        """The rows that a recipe has selected for a task."""
        return read_parquet(self.lineage.folder("selected_subset", key), SUBSET)


def replaced(monkeypatch, asset: str, **fields) -> None:
    """Let a test give an asset another computation, say; definitions made from now on have it."""
    monkeypatch.setitem(ASSETS, asset, replace(ASSETS[asset], **fields))
