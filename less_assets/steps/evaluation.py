"""Evaluation of fine-tuned models, tables per task, and the leaderboard.

Belongs here: wiring only. Asking and grading is `method/evaluation/evaluation.py`, comparing recipes
`method/evaluation/leaderboard.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import rate_name
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.timings import cost_of, cost_with_inputs
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.model_versions import pinned
from less_assets.lineage.plan import Versions
from less_assets.project.project import Project
from less_assets.project.task_sections import Task
from less_assets.reading.files import BOARD, BOARD_MARKDOWN, METRICS, SAMPLES
from less_assets.steps.asset import Asset
from less_assets.steps.checks import not_worse_than_base
from less_assets.steps.fairness_checks import (
    control_does_not_profit,
    losses_speak_of_the_targets,
    no_recipe_below_base,
)
from less_assets.steps.judging_examples import (
    answers_of_another_form,
    evaluation_examples,
    is_validated,
    validation_examples,
)
from less_assets.steps.shown import PREVIEW_CHARACTERS, TABLE_ROWS, Markdown, Picture, Shown, Stored, Table, one_table
from less_assets.steps.validation import pooled_validation, validate
from less_assets.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from less_assets.method.evaluation.evaluation import Evaluation, EvaluationSettings


def evaluate(work: StepInputs) -> StepResult:
    """Evaluate the recipe's model on the task, or on every member of a group."""
    recipe_key, task = split(work.partition)
    model, tokenizer = tuned_model(work, "finetuned_model")
    samples, metrics = [], []
    for member in work.project.member_tasks(task):
        judged = [] if member.evaluation is None else [_evaluate_task(work, member, model, tokenizer)]
        if _takes_validation(work.project, recipe_key, member):
            progress = work.progress(0, "validation examples")
            judged.append(validate(work, member, model, tokenizer, progress))
        for judgement in judged:
            samples.append(judgement.samples.with_columns(pl.lit(member.name).alias("task")))
            metrics.append(judgement.metrics.with_columns(pl.lit(member.name).alias("task")))
    if not metrics:
        return StepResult({"evaluated": False})
    write_parquet(work.folder, SAMPLES, pl.concat(samples))
    table = pl.concat(metrics)
    write_parquet(work.folder, METRICS, table)
    totals = table.filter(pl.col("subtask").is_null())
    return StepResult(
        {
            "evaluated": True,
            "samples": sum(part.height for part in samples),
            "metrics": {f"{row['task']}/{row['metric']}": row["value"] for row in totals.iter_rows(named=True)},
        },
        units=sum(part.height for part in samples),
    )


def _takes_validation(project: Project, recipe: str, task: Task) -> bool:
    """Whether a recipe is judged on a task's validation examples: not a tournament, whose choice has seen them."""
    return project.recipe(recipe).tournament is None and is_validated(project, task)


def tuned_model(work: StepInputs, asset: str) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model that an asset has for the partition, base and adapter, and its tokenizer."""
    from less_assets.method.training.models import load_adapter

    trained = work.lineage.summary(asset, work.partition)
    model, tokenizer = work.models.base(pinned(work.project.recipe(split(work.partition)[0]).model, trained))
    if not trained["trained"]:
        return model, tokenizer
    with work.lineage.folder(asset, work.partition).local(write=False) as folder:
        return load_adapter(model, folder), tokenizer


def _evaluate_task(
    work: StepInputs, task: Task, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Evaluation:
    from less_assets.method.evaluation.evaluation import evaluate_examples, evaluate_with_harness

    evaluated, asked = task.evaluation, evaluation_settings(work.project, task)
    assert evaluated is not None
    if evaluated.harness is not None:
        return evaluate_with_harness(
            model,
            tokenizer,
            evaluated.harness,
            replace(asked, max_length=evaluated.max_length),  # null: the model's own, for the harness's long prompts
            limit=evaluated.limit,
            num_fewshot=evaluated.num_fewshot,
            apply_chat_template=evaluated.apply_chat_template,
            on_progress=work.progress(0, "requests"),
        )
    examples = evaluation_examples(task)
    requests = sum(max(1, len(example.choices)) for example in examples)
    return evaluate_examples(
        model, tokenizer, examples, asked, name=task.name, on_progress=work.progress(requests, "requests")
    )


def evaluation_settings(project: Project, task: Task) -> EvaluationSettings:
    """How a task with an evaluation is asked and graded, in the method's words."""
    from less_assets.method.evaluation.evaluation import EvaluationSettings

    evaluated = task.evaluation
    assert evaluated is not None
    as_less = evaluated.format == "bbh" and evaluated.grading == "less"
    return EvaluationSettings(
        rule="bbh_as_less" if as_less else evaluated.format or "exact_match",
        max_new_tokens=evaluated.max_new_tokens,
        chat_format=project.model.chat_format,
        date=project.model.date,
        max_length=evaluated.max_length or project.model.max_length,
        token_budget=evaluated.token_budget,
    )


def compare(work: StepInputs) -> StepResult:
    """Put the recipes of a task side by side, paired sample by sample."""
    from less_assets.method.evaluation.leaderboard import LEADERBOARD_SCHEMA, RecipeResult, compare_recipes

    lineage, task = work.lineage, work.partition
    results = []
    for key, recipe in work.project.recipe_keys.items():
        partition = f"{key}|{task}"
        judged = [partition, *(f"{key}|{fold}" for fold in _folds(work.project, key, task))]
        if not any(lineage.summary("eval_results", name)["evaluated"] for name in judged):
            continue
        trained = lineage.summary("finetuned_model", partition)
        samples, metrics = _with_folds(lineage, key, task)
        selection = cost_with_inputs(lineage, "selected_subset", partition)
        budget = f"{recipe.budget.unit} {recipe.budget.amount}" if recipe.budget else None
        results.append(
            RecipeResult(
                recipe.name,
                recipe.strategy,
                samples,
                metrics,
                seed=recipe.seed,
                model=recipe.model or work.project.model.base,
                budget=budget,
                rows=trained["examples"],
                tokens=trained.get("tokens"),
                minutes=cost_of(lineage, "finetuned_model", partition).minutes if trained["trained"] else None,
                selection_tokens=selection.tokens,
                selection_minutes=selection.minutes,
            )
        )
    other_form = [member.name for member in work.project.member_tasks(task) if answers_of_another_form(member)]
    board = (
        compare_recipes(task, results, other_form=other_form) if results else pl.DataFrame(schema=LEADERBOARD_SCHEMA)
    )
    write_parquet(work.folder, BOARD, board)
    return StepResult({"recipes": len(results), "rows": board.height})


def _folds(project: Project, recipe: str, task: str) -> list[str]:
    """Keys of a task's folds, as far as a recipe has them."""
    return [fold for fold in project.folds_of(task) if project.combines({"recipe": recipe, "task": fold})]


def _with_folds(lineage: Lineage, recipe: str, task: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A recipe's samples and metrics on a task; the validation losses of its folds pooled."""
    samples, metrics = [], []
    own = f"{recipe}|{task}"
    if lineage.summary("eval_results", own)["evaluated"]:
        folder = lineage.folder("eval_results", own)
        samples.append(read_parquet(folder, SAMPLES))
        metrics.append(read_parquet(folder, METRICS))
    folds = [
        read_parquet(lineage.folder("eval_results", f"{recipe}|{fold}"), SAMPLES)
        for fold in _folds(lineage.project, recipe, task)
    ]
    if folds:
        pooled = pooled_validation(folds)
        for tables, part in zip((samples, metrics), pooled, strict=True):
            tables.append(part.with_columns(pl.lit(task).alias("task")))
    return pl.concat(samples), pl.concat(metrics)


def merge_tasks(work: StepInputs) -> StepResult:
    """Put the tables of all tasks together."""
    from less_assets.method.evaluation.leaderboard import merge, to_markdown

    tables = [read_parquet(work.lineage.folder("task_results", task), BOARD) for task in work.project.task_names]
    board = merge(tables)
    write_parquet(work.folder, BOARD, board)
    work.folder.write_bytes(BOARD_MARKDOWN, (to_markdown(board) + "\n").encode())
    return StepResult({"tasks": len(tables), "rows": board.height})


def describe_evaluation(stored: Stored) -> Shown:
    """Metrics in all and per subtask, and some samples with their verdicts."""
    if not stored.manifest.summary["evaluated"]:
        return Shown({})
    metrics = stored.table(METRICS)
    samples = stored.table(SAMPLES, ["example_id", "subtask", "prompt", "output", "reference", "correct", "loss"])
    totals: Any = stored.manifest.summary["metrics"]
    values: dict[str, Any] = {
        "results": Table(metrics.filter(pl.col("subtask").is_null()).drop("subtask")),
        "results_by_subtask": Table(metrics.filter(pl.col("subtask").is_not_null()).head(100)),
        "samples": Table(samples.head(TABLE_ROWS).with_columns(pl.col("prompt").str.tail(PREVIEW_CHARACTERS))),
        **{f"metric {name}": value for name, value in totals.items() if value is not None},
    }
    return replace(one_table(METRICS)(stored), values=values)


def describe_board(stored: Stored) -> Shown:
    """The table as Markdown, and charts of both losses and of the score: values, and differences from random."""
    from less_assets.method.evaluation.leaderboard import (
        NUMBERS,
        against_random,
        of_number,
        to_markdown,
        with_named_numbers,
    )
    from less_assets.report import charts

    board = with_named_numbers(stored.table(BOARD))
    values: dict[str, Any] = {}
    if board.height:
        values["results"] = Markdown(to_markdown(board))
        for what, name in NUMBERS.items():
            side = "higher" if what == "score" else "lower"
            if (shown := of_number(board, what)).height:
                drawn = charts.leaderboard_chart(shown, value_title=f"{name} ({side} is better)")
                values[what] = Picture(drawn, f"{name} of each recipe")
            if (compared := against_random(board, what)).height:
                side = "right" if what == "score" else "left"
                drawn = charts.difference_chart(compared, value_title=f"{name} − random's ({side} is better)")
                values[f"{what}_against_random"] = Picture(drawn, f"paired difference of the {name} from random")
    return Shown(values, columns=board.schema)


def evaluation_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Samples of each task, validation examples included."""
    units: dict[str, float] = {}
    loads = 0
    for key in due:
        recipe, task = split(key)
        members = workload.project.member_tasks(task)
        samples = sum(evaluation_samples(member) for member in members)
        validated = [member for member in members if _takes_validation(workload.project, recipe, member)]
        samples += sum(len(validation_examples(workload.project, member)) for member in validated)
        name = rate_name("eval_results", key)
        units[name] = units.get(name, 0) + samples
        loads += 1
    return Amount(units=units, loads=loads)


def evaluation_samples(task: Task) -> int:
    """Samples of a task's evaluation; 1 stands for a harness task, whose data only the harness knows."""
    if task.evaluation is None or task.evaluation.harness is not None:
        return 0 if task.evaluation is None else 1
    return len(evaluation_examples(task))


def _answers(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Two recipes that have selected the same rows are evaluated once."""
    evaluation = lineage.summary("target_examples", keys["task"])["evaluation_digest"]
    model = inputs[f"finetuned_model/{keys['recipe']}|{keys['task']}"]
    return {"finetuned_model": model, "evaluation": evaluation}


def _grading(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    project = lineage.project
    settings = project.grading_settings(keys["task"])
    if project.recipe(keys["recipe"]).tournament and any(map(_has_file, project.member_tasks(keys["task"]))):
        settings["validation"] = "left out"
    return settings


def _has_file(task: Task) -> bool:
    return task.validation is not None and task.validation.path is not None


ASSETS = (
    Asset(
        name="eval_results",
        group="evaluation",
        kinds=frozenset({"pytorch", "parquet"}),
        description=(
            "Validation loss, answer loss and the task's metrics with intervals; every sample's prompt, output and "
            "verdict."
        ),
        axes=("recipe", "task"),
        inputs=(Input("finetuned_model"), Input("target_examples")),
        folder="evaluation/{recipe}/{task}",
        shared_folder="evaluation/samples/{task}",
        settings=_grading,
        determined_by=_answers,
        compute=evaluate,
        describe=describe_evaluation,
        checks=(not_worse_than_base,),
        loads_model=True,
        amount=evaluation_work,
    ),
    Asset(
        name="task_results",
        group="evaluation",
        kinds=frozenset({"polars", "parquet"}),
        description=(
            "All recipes on one task: values, spread over seeds, paired differences from base, random and full."
        ),
        axes=("task",),
        inputs=(Input("eval_results", with_folds=True),),
        folder="evaluation/tasks/{task}",
        of_folds=False,
        compute=compare,
        describe=describe_board,
        checks=(control_does_not_profit, no_recipe_below_base, losses_speak_of_the_targets),
        columns_from={"eval_results": {name: [name] for name in ("metric", "subtask", "value", "low", "high", "n")}},
    ),
    Asset(
        name="leaderboard",
        group="evaluation",
        kinds=frozenset({"polars", "parquet"}),
        description="Recipes by tasks, against base, random and full: was the selection worth it?",
        inputs=(Input("task_results"),),
        folder="evaluation/leaderboard",
        compute=merge_tasks,
        describe=describe_board,
        columns_from={"task_results": {name: [name] for name in ("task", "recipe", "metric", "value", "low", "high")}},
    ),
)
