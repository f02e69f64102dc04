"""The code location that `less-assets dev` has Dagster load: graph and job of the project file that LESS_PROJECT names.

Dagster can be started with it without `less-assets`, too: a DAGSTER_HOME of another project is refused here as well.

Belongs here: nothing but that. Tests call `build_definitions` with their own project and resources.
"""

import os
from pathlib import Path

import dagster as dg

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.dagster_home import claim_home
from less_assets.running.report_server import URL_VARIABLE
from less_assets.running.task_job import task_job
from less_assets.steps.registry import open_store


def _with_job() -> dg.Definitions:
    project = load_project(os.environ.get("LESS_PROJECT", "project.yaml"))
    home = Path(os.environ.get("DAGSTER_HOME", "")).expanduser()
    if os.environ.get("DAGSTER_HOME") and home.is_dir():
        claim_home(home.absolute(), project.name, open_store(project))
    graph = build_definitions(project, reports_url=os.environ.get(URL_VARIABLE))
    return dg.Definitions.merge(graph, dg.Definitions(jobs=[task_job(graph, project)]))


defs = _with_job()
