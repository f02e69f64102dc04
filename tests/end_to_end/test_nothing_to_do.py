"""`plan` and `run` where all is up to date: they say so without loading Dagster or torch, and overlook nothing."""

import json
import os
import subprocess
import sys

import dagster as dg
import pytest
from support.tiny import question, write_rows

from less_assets.project.project import load_project
from less_assets.running.dagster_home import opened_records
from less_assets.running.home_folder import RECORDED_FILE, dagster_home
from less_assets.steps.registry import open_store

HEAVY = ("torch", "transformers", "peft", "dagster", "zarr")
COMMAND = (
    "import sys\n"
    "from less_assets.cli import app\n"
    "app(sys.argv[1:], standalone_mode=False)\n"
    f"print(*(name for name in {HEAVY} if name in sys.modules))"
)


def command(project_file, *arguments) -> tuple[list[str], list[str]]:
    """Run a command in a process of its own; the lines that it prints, and the heavy modules that it loads."""
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    asked = [sys.executable, "-W", "ignore", "-c", COMMAND, *arguments, "--project", str(project_file)]
    done = subprocess.run(asked, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    *lines, heavy = done.stdout.splitlines()
    return lines, heavy.split()


def made(project_file, *arguments) -> tuple[int, list[str]]:
    """How many artifacts a run makes, and the heavy modules that it loads."""
    lines, heavy = command(project_file, "run", "--json", *arguments)
    return json.loads(lines[-1])["made"], heavy


@pytest.fixture
def finished(tiny_project):
    """A project that was run to its end."""
    del tiny_project.settings["tasks"][1:], tiny_project.settings["recipes"][2:]
    tiny_project.settings["warmup"]["epochs"] = 1
    tiny_project.settings["gradients"] |= {"certificate_rows": 8, "real_step_rows": 3}
    count, _ = made(tiny_project.path)
    assert count > 20
    return tiny_project


def test_with_nothing_to_do_neither_dagster_nor_torch_is_loaded_and_nothing_is_overlooked(finished):
    project_file = finished.path
    lines, heavy = command(project_file, "plan")
    assert "nothing to do" in lines
    assert not heavy
    assert made(project_file) == (0, [])
    assert made(project_file, "--until", "selected_subset", "--no-extras") == (0, [])

    store = open_store(load_project(project_file))
    with opened_records(load_project(project_file).name, store) as instance:
        instance.wipe_assets([dg.AssetKey("leaderboard")])
    count, heavy = made(project_file)
    assert count == 1, "what Dagster has lost is recorded again"
    assert "dagster" in heavy
    assert made(project_file) == (0, [])

    certificate = store.root / "selection/sums/fidelity/current.json"
    certificate.unlink()
    assert "torch" in made(project_file)[1], "a certificate that is gone is made again"
    assert certificate.exists()
    assert made(project_file) == (0, [])

    (dagster_home(store) / RECORDED_FILE).write_text("[half of a file")
    count, heavy = made(project_file, "--until", "recipe_settings")
    assert count == 0
    assert "dagster" in heavy, "without a memory of the records they are looked at"

    write_rows(finished.folder / "data/plus.jsonl", [question(place, "plus") for place in range(25)])
    assert made(project_file, "--until", "instruction_pool")[0] == 1
