"""Checks of whether a comparison is fair: nothing evaluated was trained on, and gains are the target's own.

Belongs here: checks that a person should see; they warn and stop nothing. Comparing texts is
`method/contamination.py`; checks of the pool, of rankings and of models are `checks.py`.
"""

from typing import Any

import dagster as dg
import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.checks import partition_of
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project
from less_assets.project.sections import Task
from less_assets.steps.evaluation import BOARD
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.targets import TARGETS
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.tables import read_parquet


def build_guardrails(axes: Axes) -> list[dg.AssetChecksDefinition]:
    """The checks of this module."""

    @dg.asset_check(
        asset="pool_index", description="No row of the pool is in an evaluation: by id, by 13 words in a row."
    )
    def evaluation_not_in_pool(
        project: dg.ResourceParam[Project], store: dg.ResourceParam[ArtifactStore]
    ) -> dg.AssetCheckResult:
        evaluated = {task.name: rows for task in project.tasks if (rows := evaluated_rows(task)) is not None}
        lineage = Lineage(project, store)
        for shard in lineage.shards():
            table = read_parquet(
                lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "messages", "status"]
            )
            rows = table.filter(status="ok").select("example_id", "messages").rows()
            for each in evaluated.values():
                each.look_up(rows)
        found = {task: each.found() for task, each in evaluated.items()}
        bad = {task: overlap for task, overlap in found.items() if overlap.shared}
        said = "; ".join(
            f"{task}: {overlap.shared:,} pool rows overlap with {overlap.evaluated:,} evaluated ones "
            f"({overlap.exact:,} are the same)"
            for task, overlap in bad.items()
        )
        pairs = [(task, *pair) for task, overlap in bad.items() for pair in overlap.pairs]
        table = pl.DataFrame(pairs, schema=["task", "pool_row", "evaluation_row"], orient="row")
        return _warning(
            not bad,
            said or f"No overlap with the evaluation of {', '.join(found) or 'any task (none could be read)'}.",
            {"overlaps": metadata.table(table.head(metadata.TABLE_ROWS))} if bad else {},
        )

    @dg.asset_check(
        asset="target_examples",
        partitions_def=axes.of("target_examples"),
        description="No target example is asked in the task's own evaluation.",
    )
    def targets_not_evaluated(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
    ) -> dg.AssetCheckResult:
        from less_assets.method.data.targets import targets_from_table

        table = read_parquet(Lineage(project, store).folder("target_examples", partition_of(context)), TARGETS)
        inside: list[tuple[str, str]] = []
        for task in project.member_tasks(partition_of(context)):
            rows = evaluated_rows(task)
            if rows is not None:
                inside += rows.targets_inside(targets_from_table(table.filter(member=task.name)))
        pairs = pl.DataFrame(inside, schema=["target_example", "evaluation_row"], orient="row")
        return _warning(
            not inside,
            f"{len(inside)} of {table.height} target examples are in the evaluation."
            if inside
            else "No target example is in the evaluation, as far as it can be read.",
            {"pairs": metadata.table(pairs.head(metadata.TABLE_ROWS))} if inside else {},
        )

    @dg.asset_check(
        asset="task_results",
        partitions_def=axes.of("task_results"),
        description="On a control task, whose evaluation is unrelated to its examples, no recipe beats random.",
    )
    def control_does_not_profit(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
    ) -> dg.AssetCheckResult:
        if not project.task(partition_of(context)).control:
            return _warning(True, "The task is no control.", {})
        board = read_parquet(Lineage(project, store).folder("task_results", partition_of(context)), BOARD)
        compared = board.filter(
            pl.col("vs_random").is_not_null(), ~pl.col("strategy").is_in(["none", "full", "random"])
        )
        if compared.is_empty():
            return _warning(True, "There is no recipe to compare with random.", {})
        better = pl.when("higher_is_better").then(pl.col("vs_random_low") > 0).otherwise(pl.col("vs_random_high") < 0)
        profits = compared.filter(better)
        said = ", ".join(
            f"{row['recipe']} ({row['metric']} {row['vs_random']:+.3f})" for row in profits.iter_rows(named=True)
        )
        return _warning(
            profits.is_empty(),
            f"Better than random on what it was not selected for: {said}. Gains elsewhere may have other reasons too."
            if said
            else "No recipe beats random on the control.",
            {},
        )

    @dg.asset_check(
        asset="task_results",
        partitions_def=axes.of("task_results"),
        description="No recipe leaves the model worse than the base model, beyond the paired difference's interval.",
    )
    def no_recipe_below_base(
        context: dg.AssetCheckExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
    ) -> dg.AssetCheckResult:
        board = read_parquet(Lineage(project, store).folder("task_results", partition_of(context)), BOARD)
        compared = board.filter((pl.col("metric") == "loss") | pl.col("primary"), pl.col("vs_base").is_not_null())
        if compared.is_empty():
            return _warning(True, "There is no recipe to compare with the base model (strategy `none`).", {})
        # A diverged model's loss is NaN, and so is its difference.
        below = pl.when("higher_is_better").then(pl.col("vs_base_high") < 0).otherwise(pl.col("vs_base_low") > 0)
        worse = compared.filter(below | pl.col("vs_base").is_nan())
        said = ", ".join(
            f"{row['recipe']} ({row['metric']} {row['vs_base']:+.3f} [{row['vs_base_low']:+.3f}, "
            f"{row['vs_base_high']:+.3f}])"
            for row in worse.iter_rows(named=True)
        )
        return _warning(
            worse.is_empty(),
            f"Worse than the base model on the same samples: {said}." if said else "No recipe is below the base model.",
            {},
        )

    return [
        evaluation_not_in_pool,
        targets_not_evaluated,
        control_does_not_profit,
        no_recipe_below_base,
    ]


def evaluated_rows(task: Task) -> Any:
    """What a task is evaluated on, without worked examples; None if it has no evaluation of its own.

    Tasks of the harness bring data that only the harness can read: they are not looked at.
    """
    from less_assets.method.data.contamination import EvaluatedRows
    from less_assets.method.data.targets import read_evaluation

    evaluation = task.evaluation
    path = evaluation and (evaluation.path or evaluation.held_out)
    if not evaluation or not path:
        return None
    shots = task.examples.path if task.examples and task.examples.format == evaluation.format else None
    examples = read_evaluation(
        evaluation.format or "messages", path, evaluation.limit, shots_path=shots, few_shot=False
    )
    return EvaluatedRows(examples, benchmark=evaluation.format is not None)


def _warning(passed: bool, description: str, details: dict[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=passed, severity=dg.AssetCheckSeverity.WARN, description=description, metadata=details
    )
