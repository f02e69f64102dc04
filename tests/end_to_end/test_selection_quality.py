"""The benchmark of selections, its small design on a tiny model: figures, leaderboard, and going on."""

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import question, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("selection_quality", ROOT / "benchmarks/selection_quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["selection_quality"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> Path:
    """Data in the layout of ../shared/data, tiny."""
    folder = tmp_path / "data"
    write_rows(folder / "pool/cot.jsonl", [question(place, "plus") for place in range(60)])
    write_rows(folder / "pool/dolly.jsonl", [question(place, "red") for place in range(60)])
    write_rows(folder / "pool/cot_gsm8k.jsonl", [question(place, "sub") for place in range(60)])
    shots = [{"question": "two plus two ?", "cot_answer": "two plus two is four", "short_answer": "4"}]
    shots.append({"question": "one plus one ?", "cot_answer": "one plus one is two", "short_answer": "2"})
    tests = [{"question": f"{word} plus one ?", "answer": "two is two\n#### 2"} for word in ("one", "six", "ten")]
    (folder / "tasks/gsm8k").mkdir(parents=True)
    (folder / "tasks/gsm8k/cot-8-shot.json").write_text(json.dumps(shots))
    (folder / "tasks/gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tests))
    return folder


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder in memory: Dagster's records of many small runs are slow on a disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="less-quality-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def test_the_small_design_runs_and_its_figures_are_complete(benchmark, data, tiny_model, work, tmp_path, capsys):
    results = tmp_path / "results.json"
    options = ["--small", "--base", str(tiny_model), "--data", str(data), "--work", str(work)]
    options += ["--rows", "40", "--dimension", "256", "--limit", "2", "--seeds", "0", "1", "--results", str(results)]
    benchmark.main([*options, "--estimate"])
    assert "together about" in capsys.readouterr().out
    assert not results.exists()

    benchmark.main(options)
    found = json.loads(results.read_text())
    assert {tuple(each) for each in found} == {
        ("task", "recipe", "budget", "seed", "validation_loss", "answer_loss", "score", "tokens")
    }
    names = [(each["recipe"], each["seed"]) for each in found]
    less = [("less-adamw-max", None), ("less-marginal-round_robin", None), ("less-sgd-round_robin", None)]
    assert names == [("base", None), *less, ("random", 0), ("random", 1), ("bm25", None), ("rds", None), ("as-long", 0)]
    assert all(each["budget"] == 0.1 and each["tokens"] > 0 for each in found[1:])
    assert found[0]["budget"] is None
    assert all(0 < each["answer_loss"] < 10 and each["score"] in (0, 0.5, 1) for each in found)
    sources = {path.stem for path in (work / "small/pool").iterdir()}
    assert sources == {"cot", "dolly"}, "GSM8K's own training source is left out"
    board = results.with_suffix(".md").read_text()
    assert "| less-marginal-round_robin.10 |" in board
    random = [each["answer_loss"] for each in found if each["recipe"] == "random"]
    for each in found[1:]:
        if each["recipe"] != "random":
            (line,) = (line for line in board.splitlines() if line.startswith(f"| {each['recipe']} |"))
            difference = float(line.split("|")[3].strip(" *†"))
            assert difference == pytest.approx(each["answer_loss"] - sum(random) / len(random), abs=1e-3)
    assert "| random, over its seeds |" in board
    assert "to make" in capsys.readouterr().out

    results.unlink()
    benchmark.main(options)
    assert json.loads(results.read_text()) == found
    assert "to make" not in capsys.readouterr().out, "everything was there already"


def test_the_full_design_has_every_variant_and_baseline(benchmark):
    design = benchmark.Design(
        base="x",
        dtype="auto",
        tasks=("gsm8k",),
        rows=1,
        row_length=9,
        max_length=9,
        fractions=(0.05, 0.1),
        seeds=(0, 1, 2),
        epochs=1,
        learning_rate=1.0,
        dimension=8,
        limit=None,
        few_shot=False,
        full=True,
        small=False,
    )
    names = {recipe["name"].rpartition(".")[0] or recipe["name"] for recipe in benchmark.recipes(design)}
    assert {f"less-{form}-{how}" for form in benchmark.FORMS for how in ("max", "mean", "round_robin")} < names
    assert {"base", "full", "random", "bm25", "dsir", "rds", "perplexity-mid", "perplexity-top", "as-long"} < names
