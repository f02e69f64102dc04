"""The benchmarks write the figures that people compare: each key into its file, beside those that are there.

What takes minutes or a quiet machine is not measured here: the sides of these comparisons are made up.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks"
COMPARED = {
    "features.json": {"busy_two_threads_over_one", "quiet_passive_over_default", "training_over_landed"},
    "scale.json": {
        *("attribution_over_extraction", "checks_over_extraction", "demo_over_landed", "first_subset_over_demo"),
        *("idle_plan_seconds", "pool_10m_peak_gib", "pool_growth_error", "prefilter_recall", "prefilter_time"),
    },
}
MODULES = [path.stem for path in SCRIPTS.glob("*.py")]


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script as Python does that runs it; nothing of it stays."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(MODULES) & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def out(tmp_path) -> Path:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"another": 1}))
    return path


def written(out: Path) -> dict:
    found = json.loads(out.read_text())
    assert found["another"] == 1, "the figures of others stay"
    return found


def test_every_compared_key_is_that_of_a_part_and_goes_into_its_file(scripts):
    parts = scripts("bench").PARTS.values()
    for file, keys in COMPARED.items():
        assert keys <= {key for part in parts if part.out.name == file for key in part.keys}
    for part in parts:
        assert (SCRIPTS / part.command[0]).exists()
    sections = {part.command[2] for part in parts if part.command[0] == "scale.py"}
    assert sections == set(scripts("scale").SECTIONS), "make bench measures every section"


def test_make_bench_goes_on_where_a_part_fails(scripts, monkeypatch):
    bench = scripts("bench")
    ran = []

    def run(command, check):
        ran.append(Path(command[1]).name)
        return subprocess.CompletedProcess(command, int(ran[-1] == "threads.py"))

    monkeypatch.setattr(bench.subprocess, "run", run)
    with pytest.raises(SystemExit, match="failed: threads;"):
        bench.main(["--only", "threads", "pool"])
    assert ran == ["threads.py", "pool_size.py"]


def test_threads_and_training(scripts, monkeypatch, out):
    threads, training = scripts("threads"), scripts("training")
    rounds = [{"one thread": 3.0, "OpenMP's": 2.0, "ours": 2.0}] * threads.LEAST_ROUNDS
    monkeypatch.setattr(threads, "take_turns", lambda *asked: rounds)
    threads.main(["--out", str(out)])
    monkeypatch.setattr(
        training, "take_turns", lambda *asked: {"training_over_landed": 1.6, "training_loss_deviation": 0.0}
    )
    training.main(["--out", str(out)])
    found = written(out)
    assert found["busy_two_threads_over_one"] == 1.5
    assert found["quiet_passive_over_default"] == 1.0
    assert found["training_over_landed"] == 1.6


def test_what_people_wait_for(scripts, monkeypatch, out):
    scale, demo = scripts("scale"), scripts("demo")
    answers = {
        "seconds_of_checks": {"extraction": 8.0, "checks": 2.0, "checks_after_adding": 0.4},
        "seconds_of_attribution": {"extraction": 0.5, "attribution": 0.6},
    }
    monkeypatch.setattr(scale, "in_a_process", lambda function, *arguments: answers[function.__name__])
    monkeypatch.setattr(scale, "demo_project", lambda folder, small: _project(folder))
    monkeypatch.setattr(scale, "_fill_cache", lambda *asked: None)
    monkeypatch.setattr(scale, "load_project", lambda path: None)
    monkeypatch.setattr(scale, "write_project", lambda folder, **settings: folder)
    monkeypatch.setattr(
        scale, "seconds_with_nothing_to_do", lambda path, rounds: {"plan": [1.0, 1.1, 1.2], "run": [1.5, 1.6, 1.7]}
    )
    scale.main(["--only", "attribution", "checks", "idle", "--small", "--out", str(out)])
    monkeypatch.setattr(
        demo, "take_turns", lambda rounds, small: [({"seconds": 400.0}, {"seconds": 200.0, "first_subset": 30.0})]
    )
    demo.main(["--small", "--out", str(out)])
    found = written(out)
    assert found["attribution_over_extraction"] == 1.2
    assert found["checks_over_extraction"] == 0.25
    assert found["idle_plan_seconds"] == 1.6
    assert found["demo_over_landed"] == 0.5
    assert found["first_subset_over_demo"] == 0.15


def _project(folder: str) -> str:
    path = Path(folder) / "project.yaml"
    path.write_text("gradients: {certificate_rows: 0, real_step_rows: 0}")
    return str(path)


def test_the_prefilter(scripts, monkeypatch, out):
    prefilter = scripts("prefilter")
    line = {"task": "gsm8k", "rows": 100, "kept": 20, "sampled": 5, "estimate": [0.8, 0.6, 0.9]}
    lines = [line | {"strategy": name, "recall": 0.75, "time": 0.25} for name in ("bm25", "rds")]
    monkeypatch.setattr(prefilter, "measure", lambda asked: lines)
    prefilter.main(["--out", str(out)])
    found = written(out)
    assert found["prefilter_recall"] == {"bm25": 0.75, "rds": 0.75}
    assert found["prefilter_time"] == {"bm25": 0.25, "rds": 0.25}


def run_script(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPTS / command[0]), *command[1:]],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def test_pools_of_two_tiny_sizes_go_through_index_draw_and_selection(out, tmp_path):
    sizes = ("--rows", "300", "900", "--shard-rows", "200")
    run_script("pool_size.py", *sizes, "--out", str(out), "--folder", str(tmp_path))
    found = written(out)
    assert found["pool_10m_peak_gib"] > 0
    assert found["pool_growth_error"] < 1
    assert set(found["pool_rows"]["900"]) == {"pool_index", "warmup_sample", "selected_subset"}


def test_the_gpu_script_measures_exactness_on_the_cpu(tmp_path):
    table = tmp_path / "gpu.md"
    printed = run_script("gpu.py", "--device", "cpu", "--tiny", "--out", str(table))
    lines = dict(line.strip("| \n").split(" | ") for line in table.read_text().splitlines()[2:])
    assert table.read_text() in printed
    assert "CPU" in lines["card"]
    for what in ("gradients", "directions (adamw)", "sketches", "norms"):
        assert float(lines[f"error of {what}, float32"]) < 1e-5
    assert 1e-5 < float(lines["error of gradients, bfloat16"]) < 0.2
    assert lines["the same call again gives the same bytes"] == "yes"
    assert float(lines["features ÷ training step"]) > 0
    assert "not run: " in lines["4-bit base"]
    assert not [what for what, found in lines.items() if "failed" in found]
