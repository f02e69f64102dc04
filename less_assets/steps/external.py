"""Scores of the pool that a file gives: what `strategy: external` ranks by.

Belongs here: wiring only. Reading the file is `method/selection/external.py`.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.step import StepInputs, StepResult
from less_assets.errors import PoolFormatError
from less_assets.lineage.file_digests import files_digest
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.plan import Versions
from less_assets.project.project import Project
from less_assets.reading.files import EXAMPLES, PLACES
from less_assets.steps.asset import Asset
from less_assets.steps.baselines import write_scores
from less_assets.store.tables import read_parquet, write_json


def score_externally(work: StepInputs) -> StepResult:
    """Give each row of the pool the score that the file has for it."""
    from less_assets.method.selection.external import read_scores, scores_of_rows

    lineage = work.lineage
    recipe, task = split(work.partition)
    path = str(work.project.recipe(recipe).scores_file)
    external = read_scores(path, task)
    rows = scored = 0
    before: dict[str, int] = {}
    for shard in lineage.shards():
        columns = ["example_id", "source", "status"]
        table = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, columns)
        source = lineage.pool_files.shard(shard).source
        first = before.get(source, 0)
        before[source] = first + table.height
        numbered = table.with_columns(pl.int_range(first, first + pl.len(), dtype=pl.Int64).alias("row"))
        scores = scores_of_rows(external, numbered)
        write_scores(work, shard, table, scores[:, None])
        rows += table.height
        scored += int(np.isfinite(scores[(table["status"] == "ok").to_numpy()]).sum())
    if not scored:
        raise PoolFormatError(
            "No row of the pool has a score in the file.",
            where=work.project.as_written(path),
            fix="ids are those of `examples.parquet`; `source` is a name of the project file, `row` counts from 0",
        )
    write_json(work.folder, PLACES, [[task, "all"]])
    return StepResult({"rows": rows, "scored": scored, "scores_in_file": external.table.height})


def _file(lineage: Lineage, keys: Keys) -> Versions:
    path = str(lineage.project.recipe(keys["recipe"]).scores_file)
    return {f"file {lineage.project.as_written(path)}": files_digest([path])}


def _content(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Equal scores under another name are equal."""
    return {"pool_index": inputs["pool_index"], "scores": next(inputs[name] for name in inputs if name != "pool_index")}


def _ranks_by_file(project: Project, recipe: str) -> bool:
    return project.recipe(recipe).scores == "external"


def _settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return {"task": keys["task"]}


ASSETS = (
    Asset(
        name="external_scores",
        group="scores",
        kinds=frozenset({"parquet"}),
        description="Scores of the pool's rows that a file gives, by id or by source and row.",
        axes=("recipe", "task"),
        inputs=(Input("pool_index"),),
        folder="selection/{task}/external/{recipe}",
        shared_folder="selection/{task}/external",
        settings=_settings,
        outside=_file,
        determined_by=_content,
        needed_by=_ranks_by_file,
        compute=score_externally,
    ),
)
