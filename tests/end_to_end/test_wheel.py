"""The wheel, installed outside the repository: a newcomer's way from an empty folder to selected rows."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.tiny import question, write_rows

ROOT = Path(__file__).parents[2]
PACKAGED = ["less_assets", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the wheel; what it depends on is borrowed from the one that runs the tests.

    The repository's own package is not importable there: only `.pth` files of the borrowed folder lead to it, and
    those are not read.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([*pip, "--python", folder / "venv/bin/python", "install", "--no-deps", wheel], check=True)
    return folder / "venv/bin"


def test_from_an_empty_folder_to_selected_rows(environment, tiny_model, tmp_path):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    write_rows(work / "pool.jsonl", [question(place, "plus") for place in range(200)])
    write_rows(work / "sums.jsonl", [question(300 + place, "plus") for place in range(4)])
    write_rows(work / "kept.jsonl", [question(400 + place, "plus") for place in range(4)])
    settings = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def less_assets(*arguments: str) -> str:
        command = [environment / "less-assets", *arguments]
        done = subprocess.run(command, cwd=work, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = "import less_assets; print(less_assets.__file__)"
    imported = subprocess.run([environment / "python", "-c", code], cwd=work, env=settings, capture_output=True)
    assert str(environment.parent) in imported.stdout.decode(), "not the wheel's package"
    assert less_assets("--version") == "less-assets 0.2.0\n"
    data = ("--pool", "pool.jsonl", "--examples", "sums.jsonl", "--held-out", "kept.jsonl")
    assert "are usable: 1 source, 1 task, " in less_assets("init", *data, "--model", str(tiny_model))
    assert "are usable" in less_assets("check")
    planned = less_assets("plan", "--no-calibrate")
    assert "artifacts to make" in planned
    assert "train_gradients" in planned
    assert {path.name for path in work.iterdir()} == {
        *("pool.jsonl", "sums.jsonl", "kept.jsonl", "project.yaml", "artifacts")
    }, "something lies beside the artifacts"
    ran = less_assets("run", "--json", "--recipe", "less", "--until", "selected_subset")
    (subset,) = [event for event in map(json.loads, ran.splitlines()) if event["event"] == "subset"]
    assert len(Path(subset["path"]).read_text().splitlines()) == 20
    assert "nothing was computed" in less_assets("run", "--recipe", "less", "--until", "selected_subset")
    assert (work / "artifacts/.dagster").is_dir()
    assert list(home.iterdir()) == []


def test_the_wheel_has_all_that_is_read_at_run_time(environment):
    (package,) = environment.parent.glob("lib/python*/site-packages/less_assets")
    kinds = ("yaml", "html", "css", "js", "typed", "json", "txt")
    data = {path.relative_to(ROOT / "less_assets") for kind in kinds for path in ROOT.glob(f"less_assets/**/*.{kind}")}
    assert {str(path) for path in data} >= {"demo.yaml", "running/dagster.yaml", "running/workspace.yaml"}
    assert not [str(path) for path in data if not (package / path).is_file()]
