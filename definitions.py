"""The code location that `dagster dev` and `dg` load: the graph of the project file that LESS_PROJECT names."""

import os
from pathlib import Path

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project

DEFAULT_PROJECT = Path(__file__).parent / "projects" / "demo.yaml"

defs = build_definitions(load_project(os.environ.get("LESS_PROJECT", DEFAULT_PROJECT)))
