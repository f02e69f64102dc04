"""The code location that `less-assets dev` has Dagster load: graph and job of the project file that LESS_PROJECT names.

Belongs here: nothing but that. Tests call `build_definitions` with their own project and resources.
"""

import os

import dagster as dg

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.report_server import URL_VARIABLE
from less_assets.running.task_job import task_job


def _with_job() -> dg.Definitions:
    project = load_project(os.environ.get("LESS_PROJECT", "project.yaml"))
    graph = build_definitions(project, reports_url=os.environ.get(URL_VARIABLE))
    return dg.Definitions.merge(graph, dg.Definitions(jobs=[task_job(graph, project)]))


defs = _with_job()
