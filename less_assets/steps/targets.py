"""Target tasks: their examples by subtask, and what models will be judged on.

Belongs here: wiring only. Formats and prompts are `method/targets.py`.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.errors import TargetFormatError
from less_assets.lineage.plan import digest
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project, Task
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, write_parquet

TARGETS = "targets.parquet"


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The asset `target_examples`."""

    @dg.asset(group_name="targets", kinds={"polars", "parquet"}, partitions_def=axes.of("target_examples"))
    def target_examples(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """The task's target examples by subtask, normalised, and a digest of what it is evaluated on."""
        return materialize_one(context, project, store, models, read_task, describe_targets)

    return [target_examples]


def read_task(work: StepInputs) -> StepResult:
    """Read a task's target examples; a group has those of its members, by member and subtask."""
    from less_assets.method.data.targets import read_targets, target_table

    members = work.project.member_tasks(work.partition)
    group = work.project.task(work.partition).members is not None
    tables = []
    for member in members:
        assert member.examples is not None
        table = target_table(read_targets(member.examples.format, member.examples.path))
        prefix = f"{member.name}/" if group else ""
        subtask = (pl.lit(prefix) + pl.col("subtask")).alias("subtask")
        tables.append(table.with_columns(subtask, pl.lit(member.name).alias("member")))
    table = pl.concat(tables)
    if table.is_empty():
        raise TargetFormatError("The task has no target examples.", where=work.partition)
    write_parquet(work.folder, TARGETS, table)
    examples_digest = digest([_digest_fields(row) for row in table.iter_rows(named=True)])
    settings = work.project.task_settings(work.partition)
    files = dict(work.lineage.plan("target_examples", work.partition).inputs)
    evaluation_digest = digest([_evaluation_files(work, member) for member in members] + [settings])
    summary = {
        "examples": table.height,
        "subtasks": dict(sorted(table["subtask"].value_counts().iter_rows())),
        "evaluated": any(member.evaluation for member in members),
        "examples_digest": examples_digest,
        "evaluation_digest": evaluation_digest,
    }
    return StepResult(summary, data_version=digest([examples_digest, evaluation_digest, files, settings]))


def _digest_fields(row: dict[str, Any]) -> list[str]:
    """A row without what it leaves open, so that a column more does not make other examples of plain ones."""
    from less_assets.method.data.conversations import stated

    tools = row.pop("tools")
    row["messages"] = [stated(message) for message in row["messages"]]
    return [*map(str, row.values()), *([tools] if tools else [])]


def _evaluation_files(work: StepInputs, member: Task) -> list[str]:
    from less_assets.lineage.lineage import files_digest

    evaluation = member.evaluation
    if evaluation is None:
        return []
    harness = evaluation.harness if isinstance(evaluation.harness, str) else ""
    named = [harness] if harness.endswith((".yaml", ".yml")) else []
    return [files_digest([path]) for path in (evaluation.path, evaluation.held_out, *named) if path]


def describe_targets(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Counts, the first examples, and the table's columns."""
    table = read_parquet(folder, TARGETS)
    shown = table.select("subtask", "messages", "completion").head(metadata.TABLE_ROWS)
    return {
        **metadata.summary(folder, manifest),
        "target_examples": metadata.example_table(shown),
        "dagster/partition_row_count": table.height,
        "dagster/column_schema": metadata.column_schema(table),
    }
