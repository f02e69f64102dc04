"""Scores of the pool by target directions that are seen against the pool: what recipes with `precondition` rank by.

Belongs here: wiring only. Mathematics is `method/selection/preconditioning.py`; ranking is `ranking.py`'s matter.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.project.project import Project
from less_assets.reading.files import PLACES, score_file
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import checkpoint_weights
from less_assets.reading.shard_features import ShardFeatures, kept_rows
from less_assets.steps.asset import Asset
from less_assets.steps.baselines import write_scores
from less_assets.steps.selection import directions_of
from less_assets.store.tables import read_parquet, write_json

STREAM = "precondition"
"""Stream of the draw of the sample."""


def score_preconditioned(work: StepInputs) -> StepResult:
    """Score the pool for a recipe and a task, shard by shard, by preconditioned target directions."""
    from less_assets.method.selection.influence import score_shard
    from less_assets.method.selection.preconditioning import precondition

    lineage = work.lineage
    recipe_key, task = split(work.partition)
    recipe = work.project.recipe(recipe_key)
    damping = recipe.damping
    assert damping is not None
    form, rule = str(recipe.form), str(recipe.subtask)
    weights = checkpoint_weights(lineage)
    checkpoints = list(weights)
    labels, directions = directions_of(lineage, task)
    sample = _sample(lineage)
    directions = {
        name: {
            (task, rule): precondition(directions[name][task, rule], _features(lineage, name, form, sample), damping)
        }
        for name in checkpoints
    }
    rows = scored = 0
    progress = work.progress(lineage.summary("pool_index")["usable"], "rows")
    for shard in lineage.shards():
        features = {name: ShardFeatures.of(lineage, name, shard) for name in checkpoints}
        readers = {name: stored.reader for name, stored in features.items()}
        scores = score_shard(readers, directions, weights, [form])[task][f"{form}.{rule}"]
        # The same rows have a score as for recipes that do not precondition.
        table = read_parquet(
            lineage.folder("influence_scores", task), score_file(shard), ["example_id", "source", "status"]
        )
        write_scores(work, shard, table, features[checkpoints[0]].spread(scores))
        rows, scored = rows + table.height, scored + int((table["status"] == "ok").sum())
        progress(table.height)
    group = work.project.task(task).members is not None
    places = [label.split("/", 1) if group else [task, label] for label in labels]
    write_json(work.folder, PLACES, places)  # type: ignore[arg-type]
    summary = {"rows": rows, "scored": scored, "subtasks": labels, "sampled_rows": sample.height}
    return StepResult(summary, units=scored * len(checkpoints))


def _sample(lineage: Lineage) -> pl.DataFrame:
    """The rows that the second moment is estimated from: shard and row, in that order."""
    from less_assets.method.selection.preconditioning import SAMPLE_ROWS
    from less_assets.method.selection.selection import Budget, select_at_random

    index = PoolIndex(lineage)
    drawn = select_at_random(
        lambda: (_with_gradients(lineage, rows) for rows in index.tables()),
        Budget("rows", SAMPLE_ROWS),
        0,
        stream=STREAM,
    ).table
    return drawn.select("shard", "row").sort("shard", "row")


def _with_gradients(lineage: Lineage, rows: pl.DataFrame) -> pl.DataFrame:
    """Of a shard's rows those that a prefilter has kept; all of them without one."""
    kept = kept_rows(lineage, rows["shard"][0]) if rows.height else None
    if kept is None:
        return rows
    return rows.join(kept.filter(~pl.col("sampled")), on="row", how="semi", maintain_order="left")


def _features(lineage: Lineage, checkpoint: str, form: str, sample: pl.DataFrame) -> np.ndarray:
    """Features of the sampled rows at a checkpoint, float32 (n, k)."""
    parts = []
    for (shard,), part in sample.group_by("shard", maintain_order=True):
        parts.append(ShardFeatures.of(lineage, checkpoint, str(shard)).take(form, part["row"].to_numpy()))
    return np.concatenate(parts)


def preconditioning_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Products of one pass over the datastore for each recipe and task, and the bytes of the tables."""
    rows, checkpoints = workload.pool_rows, len(workload.project.checkpoints)
    subtasks = sum(workload.target_sizes[split(key)[1]][2] for key in due)
    return Amount(
        units={"preconditioned_scores": float(rows * checkpoints * len(due))},
        bytes=rows * (4.0 * subtasks + 24 * len(due)),
    )


def _settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    recipe = lineage.project.recipe(keys["recipe"])
    return {"form": recipe.form, "subtask": recipe.subtask, "damping": recipe.damping}


def _preconditions(project: Project, recipe: str) -> bool:
    return project.recipe(recipe).scores == "preconditioned"


ASSETS = (
    Asset(
        name="preconditioned_scores",
        group="scores",
        kinds=frozenset({"numpy", "parquet"}),
        description=(
            "Influence of every pool row on every subtask, target directions times the pool's inverse covariance."
        ),
        axes=("recipe", "task"),
        # Features are read; the version of the scores made from them stands for theirs.
        inputs=(Input("pool_index"), Input("influence_scores")),
        folder="selection/{task}/preconditioned/{recipe}",
        shared_folder="selection/{task}/preconditioned",
        settings=_settings,
        needed_by=_preconditions,
        compute=score_preconditioned,
        amount=preconditioning_work,
        speed=Guess(("influence_scores",)),
    ),
)
