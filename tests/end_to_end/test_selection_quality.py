"""The benchmark of selections, its small design on a tiny model: figures, leaderboard, and going on."""

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.tiny import question, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as where the script is run
    spec = importlib.util.spec_from_file_location("selection_quality", ROOT / "benchmarks/selection_quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["selection_quality"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


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


def test_the_small_design_runs_and_its_figures_are_complete(
    benchmark, data, tiny_model, work, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("DAGSTER_HOME", "")  # the benchmark sets it, and other tests must not meet that
    results = tmp_path / "results.json"
    options = ["--small", "--base", str(tiny_model), "--data", str(data), "--work", str(work)]
    options += ["--rows", "40", "--dimension", "256", "--limit", "2", "--draws", "0", "1", "--results", str(results)]
    benchmark.main([*options, "--estimate"])
    assert "h so far" in capsys.readouterr().out
    assert not results.exists()

    benchmark.main([*options, "--training-seeds", "0"])
    found = json.loads(results.read_text())
    assert {tuple(line) for line in found} == {
        *[("task", "recipe", "budget", "draw", "training_seed", "validation_loss", "answer_loss", "score", "tokens")]
    }
    names = [(line["recipe"], line["draw"]) for line in found]
    rules = [(name, None) for name in ("less", "less-paper", "less-match")]
    assert names == [("base", None), ("random", 0), ("random", 1), *rules]
    assert all(line["budget"] == 0.1 and line["tokens"] > 0 and line["training_seed"] == 0 for line in found[1:])
    assert found[0]["budget"] is found[0]["training_seed"] is None
    assert all(0 < line[number] < 10 for line in found for number in ("answer_loss", "validation_loss"))
    sources = {path.stem for path in (work / "small/pool").iterdir()}
    assert sources == {"cot", "dolly"}, "GSM8K's own training source is left out"
    assert "to make" in capsys.readouterr().out
    chosen = pl.read_parquet(tmp_path / "results_selected.parquet")
    assert set(chosen["task"]) == {"gsm8k", "gsm8k.fold-1", "gsm8k.fold-2"}
    assert set(chosen["recipe"]) == {f"{name}-at-10" for name in benchmark.MAIN}

    # Another training seed makes its own models only, and what is finished is not made again, not even elsewhere.
    shutil.rmtree(work / "small")
    benchmark.main([*options, "--training-seeds", "0"])
    assert json.loads(results.read_text()) == found
    assert "to make" not in capsys.readouterr().out, "everything was there already"
    benchmark.main([*options, "--training-seeds", "0", "1"])
    assert "train_gradients" not in capsys.readouterr().out, "rows that are selected need no gradient again"
    more = json.loads(results.read_text())
    assert more[: len(found)] == found
    assert [(line["recipe"], line["training_seed"]) for line in more[len(found) :]] == [
        *[(name, 1) for name, _ in names[1:]]
    ]
    losses = pl.read_parquet(tmp_path / "results_losses.parquet")
    chosen = losses.filter(number="validation_loss", recipe="less")
    assert chosen["loss"].mean() == pytest.approx(
        sum(line["validation_loss"] for line in more if line["recipe"] == "less") / 2
    )
    assert "| less-match | " in results.with_suffix(".md").read_text()


def test_a_difference_from_random_and_its_interval(benchmark):
    import selection_tables

    rng = np.random.default_rng(0)
    questions, draws = rng.normal(2, 1, 200), [0, 0, 0, 1, 1, 1, 2, 2, 2]

    def trainings(draws: list[int]) -> np.ndarray:
        luck = rng.normal(0, 0.05, 10)[draws] + rng.normal(0, 0.03, len(draws))
        return questions + luck[:, None] + rng.normal(0, 0.1, (len(draws), 200))

    random, better = trainings(draws), trainings([3, 3, 3]) - 0.4
    found = selection_tables.difference(better, random, draws)
    assert found.mean == pytest.approx(better.mean() - random.mean())
    assert found.low < found.mean < found.high < 0
    assert found.worst == better.mean(axis=1).max() < found.random_best == random.mean(axis=1).min()


def test_an_interval_covers_the_luck_of_trainings_and_draws(benchmark):
    import selection_tables

    rng = np.random.default_rng(1)
    draws, covered = [0, 0, 0, 1, 1, 1, 2, 2, 2], 0
    for _ in range(400):  # a rule that is as good as random: its own trainings and draws of random, by luck alone
        luck = rng.normal(0, 0.05, (6, 1)), rng.normal(0, 0.05, (3, 1))
        random = np.repeat(luck[1], 3, axis=0) + rng.normal(0, 0.02, (9, 1)) + rng.normal(0, 0.1, (9, 100))
        found = selection_tables.difference(luck[0][:3] + rng.normal(0, 0.1, (3, 100)), random, draws)
        covered += found.low < 0 < found.high
    assert covered / 400 > 0.92


def losses_of(**trainings: dict[int, list[float]]) -> pl.DataFrame:
    """The stored losses of recipes on two questions: by recipe and training seed, in float32 as they are stored."""
    from selection_tables import LOSSES

    lines = [
        {
            "task": "t", "recipe": recipe, "budget": 0.05, "draw": 0 if recipe == "random" else None,
            "training_seed": seed, "number": "validation_loss", "subtask": "s", "example_id": f"q{place}", "loss": loss,
        }
        for recipe, by_seed in trainings.items()
        for seed, losses in by_seed.items()
        for place, loss in enumerate(losses)
    ]  # fmt: skip
    return pl.DataFrame(lines, schema=LOSSES)


def test_recipes_are_compared_by_the_training_seeds_that_both_sides_have(benchmark):
    import selection_tables

    # Seed 1 is bad for every model; the rule has not been trained with it yet.
    random = {0: [2.0, 3.0], 1: [9.0, 9.0]}
    (found,) = selection_tables.compared(losses_of(random=random, rule={0: [1.5, 2.5], 2: [7.0, 7.0]}))
    assert found["found"].mean == pytest.approx(-0.5)
    assert found["found"].seeds == 1
    assert selection_tables.compared(losses_of(random={1: [9.0, 9.0]}, rule={0: [1.5, 2.5]})) == []


def test_what_other_machines_have_finished_is_merged_once(benchmark, tmp_path):
    def written(name: str, losses: pl.DataFrame, rows: list[str]) -> Path:
        results = benchmark.Results(tmp_path / name / "results.json")
        results.losses = losses
        for recipe, seed in losses.select("recipe", "training_seed").unique(maintain_order=True).iter_rows():
            mean = losses.filter(recipe=recipe, training_seed=seed)["loss"].mean()
            cell = benchmark.Cell("t", recipe, 0.05, 0 if recipe == "random" else None, seed)
            results.figures[cell] = {"validation_loss": mean, "answer_loss": None, "score": None, "tokens": 1}
        chosen = [{"recipe": "rule-at-5", "task": "t", "example_id": row, "rank": i} for i, row in enumerate(rows)]
        results.selected = pl.DataFrame(chosen, schema=benchmark.SELECTED)
        results.write_selected()
        results.write()
        return results.path

    here = written("here", losses_of(random={0: [2.0, 3.0]}, rule={0: [1.0, 2.0]}), ["a", "b"])
    there = written("there", losses_of(random={1: [2.2, 3.2]}, rule={0: [8.0, 8.0], 1: [1.2, 2.2]}), ["a", "b"])
    for _ in range(2):  # again, by mistake: nothing is added twice
        benchmark.main(["--merge", str(there), "--results", str(here)])
    merged = benchmark.Results(here)
    expected = losses_of(random={0: [2.0, 3.0], 1: [2.2, 3.2]}, rule={0: [1.0, 2.0], 1: [1.2, 2.2]})
    order = ["recipe", "training_seed", "example_id"]
    assert merged.losses.sort(order).equals(expected.sort(order)), "what was there stays, what is new is added"
    assert merged.losses.height == 8
    assert len(merged.figures) == 4
    assert merged.selected["example_id"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipes", "less", "lss"], "the study has none named lss"),
        (["--merge", "no/such.json"], "there is no no/such.json"),
    ],
)
def test_a_recipe_or_file_that_is_not_there_is_refused(benchmark, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit):
        benchmark.main([*options, "--results", str(tmp_path / "results.json")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_the_stages_cover_every_rule_budget_and_training_seed(benchmark):
    design = benchmark.Design(
        base="x",
        dtype="auto",
        tasks=("gsm8k",),
        rows=1,
        row_length=9,
        max_length=9,
        fractions=(0.05, 0.1),
        draws=(0, 1, 2),
        training_seeds=(0, 1),
        epochs=1,
        learning_rate=1.0,
        dimension=8,
        limit=None,
        small=False,
    )
    stages = benchmark.stages(design)
    assert [stage.name for stage in stages[:3]] == ["main-5-seed0", "main-5-seed1", "all-5-seed0"]
    assert len({stage.name for stage in stages}) == 8
    main, everything = (
        {recipe["name"] for recipe in benchmark.trained_recipes(design, stages[i], Path("selected"))} for i in (0, 2)
    )
    assert main == {"base", "random", *benchmark.MAIN}
    assert main | {"as-long", "tournament", *benchmark.VARIANTS, *benchmark.BASELINES} == everything
