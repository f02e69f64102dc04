"""The whole graph on a tiny model, through the same runner as the command line."""

import dagster as dg
import polars as pl
import pytest

from less_assets.build import build_definitions
from less_assets.jobs import GraphRunner, Outcome, Request, register_shards
from less_assets.project import load_project
from less_assets.resources import open_store


def run(project_file, instance, request=Request()) -> Outcome:
    """Load the project and bring it up to date; returns what was materialized."""
    project = load_project(project_file)
    store = open_store(project)
    register_shards(project, store, instance)
    return GraphRunner(build_definitions(project), project, store, instance, print).run(request)


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def test_everything_is_made_once(tiny_project, instance):
    outcome = run(tiny_project.path, instance)
    assert outcome.materialized["train_gradients"] == [
        f"epoch-{epoch}|{shard}"
        for epoch in (1, 2)
        for shard in ("plus-00000", "plus-00001", "colors-00000", "colors-00001")
    ]
    assert run(tiny_project.path, instance).materialized == {}
