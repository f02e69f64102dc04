"""Runs of a whole graph, through the same runner as the command line."""

from dataclasses import replace

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Outcome, Request, register_shards
from less_assets.steps.registry import ASSETS, open_store

EVERYTHING = Request()


def run(project_file, instance, request=EVERYTHING) -> Outcome:
    """Load the project and bring it up to date; returns what was materialized."""
    project = load_project(project_file)
    store = open_store(project)
    register_shards(project, store, instance)
    return GraphRunner(build_definitions(project), project, store, instance, print).run(request)


def replaced(monkeypatch, asset: str, **fields) -> None:
    """Let a test give an asset another computation, say; definitions made from now on have it."""
    monkeypatch.setitem(ASSETS, asset, replace(ASSETS[asset], **fields))
