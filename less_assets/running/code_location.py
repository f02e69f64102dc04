"""The code location that `less-assets dev` has Dagster load: the graph of the project file that LESS_PROJECT names.

Belongs here: nothing but that. Tests call `build_definitions` with their own project and resources.
"""

import os

from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project

defs = build_definitions(load_project(os.environ.get("LESS_PROJECT", "project.yaml")))
