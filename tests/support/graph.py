"""Runs of a whole graph, through the same runner as the command line."""

from less_assets.compute.models import open_store
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Outcome, Request, register_shards

EVERYTHING = Request()


def run(project_file, instance, request=EVERYTHING) -> Outcome:
    """Load the project and bring it up to date; returns what was materialized."""
    project = load_project(project_file)
    store = open_store(project)
    register_shards(project, store, instance)
    return GraphRunner(build_definitions(project), project, store, instance, print).run(request)
