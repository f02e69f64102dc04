"""Two-stage exactness: the sketch retrieves candidates around the cut, exact gradients decide.

Belongs here: wiring only. Exact scores are `method/gradients/exact.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.declaration import Input
from less_assets.lineage.lineage import split
from less_assets.reading.files import EXACT, EXACT_COLUMN, EXAMPLES
from less_assets.reading.rows import checkpoint_weights
from less_assets.reading.scores import candidates_of
from less_assets.steps.asset import Asset
from less_assets.steps.gradients import encode_targets
from less_assets.steps.ranking import budget_of
from less_assets.steps.shown import one_table
from less_assets.store.tables import read_parquet, write_parquet


def rescore(work: StepInputs) -> StepResult:
    """Take the candidates' gradients again and score them without projection."""
    from less_assets.method.gradients.exact import exact_influence
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
    weights = checkpoint_weights(lineage)
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


def rescoring_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of candidates and targets, at every checkpoint."""
    tokens = 0.0
    for key in due:
        recipe, task = split(key)
        candidates = min(
            workload.pool_rows, workload.selected_rows(recipe, task) * (workload.project.recipe(recipe).candidates or 1)
        )
        tokens += (candidates * workload.row_tokens + 2 * workload.target_sizes[task][1]) * len(
            workload.project.checkpoints
        )
    loads = len(due) * len(workload.project.checkpoints)
    return Amount(units={"exact_scores": tokens}, tokens=tokens, loads=loads)


ASSETS = (
    Asset(
        name="exact_scores",
        group="selection",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Exact, unprojected influence of the candidates around the cut, at every checkpoint.",
        axes=("recipe", "task"),
        inputs=(
            Input("influence_scores"),
            Input("recipe_settings"),
            Input("target_examples"),
            Input("pool_index"),
            Input("warmup_checkpoints"),
        ),
        folder="selection/{task}/exact/{recipe}",
        needed_by=lambda project, recipe: project.recipe(recipe).candidates is not None,
        compute=rescore,
        describe=one_table(EXACT),
        loads_model=True,
        amount=rescoring_work,
        counts_tokens=True,
        speed=Guess(("train_gradients",)),
        columns_from={
            "influence_scores": {"example_id": ["example_id"], "sketched_score": ["{form}.{rule}"]},
            "target_examples": {"exact": ["messages", "completion", "subtask"]},
            "pool_index": {"source": ["source"], "shard": ["shard"], "row": ["row"]},
        },
    ),
)
