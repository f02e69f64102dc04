"""Two-stage exactness: the sketch retrieves candidates around the cut, exact gradients decide.

Belongs here: wiring only. Exact scores are `method/exact.py`.
"""

from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.lineage.lineage import split
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project
from less_assets.steps.gradients import encode_targets
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.ranking import EXACT, EXACT_COLUMN, budget_of, candidates_of
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.tables import read_parquet, write_parquet


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The asset `exact_scores`, if a recipe asks for it."""
    recipes = axes.needed_by("exact_scores")
    if not recipes:
        return []

    @dg.asset(
        group_name="selection",
        kinds={"pytorch", "parquet"},
        pool="gpu",
        partitions_def=axes.of("exact_scores"),
        deps=[
            axes.by_task("influence_scores", recipes),
            axes.by_recipe("recipe_settings", recipes),
            axes.all_partitions("warmup_checkpoints"),
            axes.by_task("target_examples", recipes),
            "pool_index",
        ],
    )
    def exact_scores(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """Exact, unprojected influence of the candidates around the cut, at every checkpoint."""
        return materialize_one(context, project, store, models, rescore, metadata.table_summary(EXACT))

    return [exact_scores]


def rescore(work: StepInputs) -> StepResult:
    """Take the candidates' gradients again and score them without projection."""
    from less_assets.method.gradients.exact import exact_influence
    from less_assets.method.selection.influence import normalised_weights
    from less_assets.method.selection.selection import select_by_score

    lineage = work.lineage
    recipe_key, task = split(work.partition)
    recipe = work.project.recipe(recipe_key)
    assert recipe.candidates is not None
    sketched = candidates_of(lineage, recipe, task)
    budget = budget_of(lineage, recipe)
    found = select_by_score(sketched, budget.times(recipe.candidates), str(recipe.aggregate))
    ranked = found.table.sort("shard", "row")
    examples = encode_rows(work, ranked)
    checkpoints = work.project.checkpoints
    weights = normalised_weights(
        {name: lineage.summary("warmup_checkpoints", name)["mean_learning_rate"] for name in checkpoints}
    )
    total: Any = None
    tokens = 0
    targets = lineage.summary("target_examples", task)["examples"]
    progress = work.progress(len(checkpoints) * (len(examples) + 2 * targets), "rows")
    for checkpoint in checkpoints:
        loaded = work.models.checkpoint(lineage, checkpoint)
        encoded, subtasks = encode_targets(work, task, loaded.tokenizer)
        longest = max(len(example.input_ids) for example in [*examples, *encoded])
        # Target gradients are taken twice: once for their norms, once for the mean of unit directions.
        tokens += sum(len(example.input_ids) for example in [*examples, *encoded, *encoded])
        labels, scores = exact_influence(
            loaded.model,
            examples,
            encoded,
            subtasks,
            rule=str(recipe.subtask),
            forms=(str(recipe.form),),
            moments=loaded.moments,
            batching=loaded.batching(work.project.gradients, longest),
            directions_limit=work.project.gradients.directions_limit,
            on_progress=progress,
        )
        part = np.float32(weights[checkpoint]) * scores[str(recipe.form)]
        total = part if total is None else total + part
    kept = ["example_id", "source", "shard", "row", "loss_tokens"]
    table = ranked.select(*kept, pl.col("score").alias("sketched_score")).with_columns(
        pl.lit("ok").alias("status"),
        pl.lit(True).alias("canonical"),
        pl.Series(EXACT_COLUMN, total, dtype=pl.Array(pl.Float32, len(labels))),
    )
    write_parquet(work.folder, EXACT, table)
    exact = select_by_score(candidates_of(lineage, recipe, task, exact=table), budget, str(recipe.aggregate))
    first = set(select_by_score(sketched, budget, str(recipe.aggregate)).table["example_id"])
    kept_rows = exact.table.height
    summary = {
        "candidates": table.height,
        "tokens": len(checkpoints) * sum(len(example.input_ids) for example in examples),
        "subtasks": labels,
        "overlap_with_sketch": len(first & set(exact.table["example_id"])) / max(1, kept_rows),
    }
    return StepResult(summary, units=tokens)


def encode_rows(work: StepInputs, rows: pl.DataFrame) -> list[Any]:
    """Pool rows as tokens; `rows` has columns shard and row, those of a shard next to each other."""
    from less_assets.method.data.chat import encode_messages

    model, tokenizer = work.project.model, work.models.tokenizer()
    examples = []
    for shard in rows["shard"].unique(maintain_order=True):
        table = read_parquet(work.lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "messages"])
        for name, messages in table[rows.filter(pl.col("shard") == shard)["row"].to_list()].iter_rows():
            examples.append(
                encode_messages(name, messages, tokenizer, chat_format=model.chat_format, max_length=model.max_length)
            )
    return examples
