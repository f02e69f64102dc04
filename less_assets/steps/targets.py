"""The target examples of a task: what the selected data shall teach.

Belongs here: wiring only. Formats are `method/data/targets.py`.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl
from pydantic import JsonValue

from less_assets.compute.step import StepInputs, StepResult
from less_assets.errors import TargetFormatError
from less_assets.lineage.file_digests import files_digest
from less_assets.lineage.lineage import Keys, Lineage
from less_assets.lineage.plan import Versions, digest
from less_assets.project.task_sections import Task
from less_assets.reading.files import TARGETS
from less_assets.steps.asset import Asset
from less_assets.steps.fairness_checks import targets_not_evaluated
from less_assets.steps.judging_examples import validation_examples
from less_assets.steps.shown import TABLE_ROWS, Shown, Stored, Table
from less_assets.store.tables import write_parquet


def read_task(work: StepInputs) -> StepResult:
    """Read a task's target examples; a group has those of its members, by member and subtask."""
    from less_assets.method.data.targets import read_targets, target_table

    members = work.project.member_tasks(work.partition)
    group = work.project.task(work.partition).members is not None
    # A fold is left out by id: what stands twice in the file must not be both selected for and judged on.
    left_out = validation_examples(work.project, members[0]) if work.partition in work.project.folds else []
    unseen = {target.example_id for target in left_out}
    tables = []
    for member in members:
        assert member.examples is not None
        targets = read_targets(member.examples.format, member.examples.path)
        table = target_table([target for target in targets if target.example_id not in unseen])
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
    judged_on: list[Any] = [_evaluation_files(member) for member in members]
    if left_out:
        judged_on.append([_digest_fields(row) for row in target_table(left_out).iter_rows(named=True)])
    evaluation_digest = digest([*judged_on, settings])
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


def _evaluation_files(member: Task) -> list[str]:
    return [files_digest([path]) for path in _evaluation_paths(member)]


def _evaluation_paths(member: Task) -> list[str]:
    """Files that a task is evaluated on: its own, a harness task's that lies in a file, that of its validation."""
    evaluation = member.evaluation
    validation = [member.validation.path] if member.validation and member.validation.path else []
    if evaluation is None:
        return validation
    harness = evaluation.harness if isinstance(evaluation.harness, str) else ""
    named = [harness] if harness.endswith((".yaml", ".yml")) else []
    return [path for path in (evaluation.path, evaluation.held_out, *named, *validation) if path]


def describe_targets(stored: Stored) -> Shown:
    """The first examples."""
    table = stored.table(TARGETS)
    first = table.select("subtask", "messages", "completion").head(TABLE_ROWS)
    return Shown({"target_examples": Table(first, examples=True)}, table.height, table.schema)


def _settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.task_settings(keys["task"])


def _files(lineage: Lineage, keys: Keys) -> Versions:
    paths: list[str] = []
    for member in lineage.project.member_tasks(keys["task"]):
        assert member.examples is not None
        paths += [member.examples.path, *_evaluation_paths(member)]
    return {"files": files_digest(paths)}


ASSETS = (
    Asset(
        name="target_examples",
        group="targets",
        kinds=frozenset({"polars", "parquet"}),
        description="The task's target examples by subtask, normalised, and a digest of what it is evaluated on.",
        axes=("task",),
        folder="targets/{task}",
        settings=_settings,
        outside=_files,
        compute=read_task,
        describe=describe_targets,
        checks=(targets_not_evaluated,),
        automatic=True,
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: 0,
    ),
)
