"""Evaluation of fine-tuned models, tables per task, and the leaderboard.

Belongs here: wiring only. Asking and grading is `method/evaluation.py`, comparing recipes `method/leaderboard.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.compute.timings import cost_of, cost_with_inputs
from less_assets.lineage.lineage import split
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project, Task
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, write_parquet

SAMPLES = "samples.parquet"
METRICS = "metrics.parquet"
BOARD = "leaderboard.parquet"
BOARD_MARKDOWN = "leaderboard.md"


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The assets `eval_results`, `task_results` and `leaderboard`."""

    @dg.asset(
        group_name="evaluation",
        kinds={"pytorch", "parquet"},
        pool="gpu",
        partitions_def=axes.of("eval_results"),
        deps=["finetuned_model", axes.by_task("target_examples")],
    )
    def eval_results(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """Held-out loss and the task's metrics with intervals; every sample's prompt, output and verdict."""
        return materialize_one(context, project, store, models, evaluate, describe_evaluation)

    @dg.asset(
        group_name="evaluation",
        kinds={"polars", "parquet"},
        partitions_def=axes.of("task_results"),
        deps=[axes.all_recipes("eval_results")],
    )
    def task_results(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """All recipes on one task: values, spread over seeds, paired differences from base, random and full."""
        return materialize_one(context, project, store, models, compare, describe_board)

    @dg.asset(group_name="evaluation", kinds={"polars", "parquet"}, deps=["task_results"])
    def leaderboard(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """Recipes by tasks, against base, random and full: was the selection worth it?"""
        return materialize_one(context, project, store, models, merge_tasks, describe_board)

    return [eval_results, task_results, leaderboard]


def evaluate(work: StepInputs) -> StepResult:
    """Evaluate the recipe's model on the task, or on every member of a group."""
    recipe_key, task = split(work.partition)
    recipe = work.project.recipe(recipe_key)
    model, tokenizer = work.models.base(recipe.model)
    stored = work.lineage.folder("finetuned_model", work.partition)
    if work.lineage.fresh("finetuned_model", work.partition).summary["trained"]:
        from less_assets.method.training.models import load_adapter

        with stored.local(write=False) as folder:
            model = load_adapter(model, folder)
    samples, metrics = [], []
    for member in work.project.member_tasks(task):
        if member.evaluation is not None:
            found = _evaluate_task(work, member, model, tokenizer)
            samples.append(found.samples.with_columns(pl.lit(member.name).alias("task")))
            metrics.append(found.metrics.with_columns(pl.lit(member.name).alias("task")))
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


def _evaluate_task(work: StepInputs, task: Task, model: Any, tokenizer: Any) -> Any:
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


def evaluation_settings(project: Project, task: Task) -> Any:
    """How a task with an evaluation is asked and graded, in the method's words."""
    from less_assets.method.evaluation.evaluation import EvaluationSettings

    evaluated = task.evaluation
    assert evaluated is not None
    as_less = evaluated.format == "bbh" and evaluated.grading == "less"
    return EvaluationSettings(
        rule="bbh_as_less" if as_less else evaluated.format or "exact_match",
        max_new_tokens=evaluated.max_new_tokens,
        chat_format=project.model.chat_format,
        max_length=evaluated.max_length or project.model.max_length,
        token_budget=evaluated.token_budget,
    )


def evaluation_examples(task: Task) -> list[Any]:
    """What a task without a harness asks: its held-out file, or a benchmark's own files."""
    from less_assets.method.data.targets import read_evaluation

    evaluated = task.evaluation
    assert evaluated is not None
    assert task.examples is not None
    return read_evaluation(
        evaluated.format or "messages",
        evaluated.path or str(evaluated.held_out),
        evaluated.limit,
        shots_path=task.examples.path if task.examples.format == evaluated.format else None,
        few_shot=evaluated.few_shot,
    )


def describe_evaluation(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Metrics in all and per subtask, and some samples with their verdicts."""
    shown = dict(metadata.summary(folder, manifest))
    if not manifest.summary["evaluated"]:
        return shown
    metrics = read_parquet(folder, METRICS)
    shown["results"] = metadata.table(metrics.filter(pl.col("subtask").is_null()).drop("subtask"))
    shown["results_by_subtask"] = metadata.table(metrics.filter(pl.col("subtask").is_not_null()).head(100))
    samples = read_parquet(
        folder, SAMPLES, ["example_id", "subtask", "prompt", "output", "reference", "correct", "loss"]
    )
    shown["samples"] = metadata.table(
        samples.head(metadata.TABLE_ROWS).with_columns(pl.col("prompt").str.tail(metadata.PREVIEW_CHARACTERS))
    )
    for name, value in dict(manifest.summary["metrics"]).items():  # type: ignore[arg-type]
        if value is not None:
            shown[f"metric {name}"] = value
    return {**shown, **metadata.table_facts(folder, METRICS)}


def compare(work: StepInputs) -> StepResult:
    """Put the recipes of a task side by side, paired sample by sample."""
    from less_assets.method.evaluation.leaderboard import LEADERBOARD_SCHEMA, RecipeResult, compare_recipes

    lineage, task = work.lineage, work.partition
    results = []
    for key, recipe in work.project.recipe_keys.items():
        partition = f"{key}|{task}"
        if not lineage.summary("eval_results", partition)["evaluated"]:
            continue
        stored, trained = lineage.folder("eval_results", partition), lineage.summary("finetuned_model", partition)
        selection = cost_with_inputs(lineage, "selected_subset", partition)
        budget = f"{recipe.budget.unit} {recipe.budget.amount}" if recipe.budget else None
        results.append(
            RecipeResult(
                recipe.name,
                recipe.strategy,
                read_parquet(stored, SAMPLES),
                read_parquet(stored, METRICS),
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
    board = compare_recipes(task, results) if results else pl.DataFrame(schema=LEADERBOARD_SCHEMA)
    write_parquet(work.folder, BOARD, board)
    return StepResult({"recipes": len(results), "rows": board.height})


def merge_tasks(work: StepInputs) -> StepResult:
    """Put the tables of all tasks together."""
    from less_assets.method.evaluation.leaderboard import merge, to_markdown

    tables = [read_parquet(work.lineage.folder("task_results", task), BOARD) for task in work.project.task_names]
    board = merge(tables)
    write_parquet(work.folder, BOARD, board)
    work.folder.write_bytes(BOARD_MARKDOWN, (to_markdown(board) + "\n").encode())
    return StepResult({"tasks": len(tables), "rows": board.height})


def describe_board(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """The table as Markdown, charts of loss and score (values, and differences from random), and the columns."""
    from less_assets.method.evaluation.leaderboard import against_random, to_markdown
    from less_assets.report import charts

    board = read_parquet(folder, BOARD)
    shown = dict(metadata.summary(folder, manifest))
    if board.height:
        shown["results"] = dg.MetadataValue.md(to_markdown(board))
        losses, scores = board.filter(pl.col("metric") == "loss"), board.filter("primary")
        drawn = charts.leaderboard_chart(losses, value_title="held-out loss (lower is better)")
        shown["held_out_loss"] = metadata.picture(drawn, "held-out loss of each recipe")
        if scores.height:
            drawn = charts.leaderboard_chart(scores, value_title="score (higher is better)")
            shown["score"] = metadata.picture(drawn, "score of each recipe")
        titles = {"loss": "loss − random's (left is better)", "score": "score − random's (right is better)"}
        for what, title in titles.items():
            if (compared := against_random(board, what)).height:  # type: ignore[arg-type]
                drawn = charts.difference_chart(compared, value_title=title)
                shown[f"{what}_against_random"] = metadata.picture(
                    drawn, f"paired difference of the {what} from random"
                )
    return {**shown, "dagster/column_schema": metadata.column_schema(board)}
