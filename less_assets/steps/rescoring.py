"""Two-stage exactness: the sketch retrieves candidates around the cut, exact gradients decide.

Belongs here: wiring only, also what certificates need of exact scores. The mathematics is `method/gradients/exact.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import polars as pl

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, split
from less_assets.reading.files import EXACT, EXACT_COLUMN
from less_assets.reading.rows import checkpoint_weights, conversations_of
from less_assets.reading.scores import candidates_of
from less_assets.steps.asset import Asset
from less_assets.steps.gradients import encode_targets, total_tokens
from less_assets.steps.ranking import budget_of
from less_assets.steps.shown import one_table
from less_assets.store.tables import write_parquet


def rescore(work: StepInputs) -> StepResult:
    """Take the candidates' gradients again and score them without projection."""
    from less_assets.method.selection.selection import select_by_score

    lineage = work.lineage
    recipe_key, task = split(work.partition)
    recipe = work.project.recipe(recipe_key)
    assert recipe.candidates is not None
    form, rule, aggregate = str(recipe.form), str(recipe.subtask), str(recipe.aggregate)
    sketched, budget = candidates_of(lineage, recipe, task), budget_of(lineage, recipe)
    ranked = select_by_score(sketched, budget.times(recipe.candidates), aggregate).table.sort("shard", "row")
    exact = score_rows_exactly(work, task, ranked, forms=(form,), rules=(rule,))
    kept = ["example_id", "source", "shard", "row", "loss_tokens"]
    table = ranked.select(*kept, pl.col("score").alias("sketched_score")).with_columns(
        pl.lit("ok").alias("status"),
        pl.lit(True).alias("canonical"),
        pl.Series(EXACT_COLUMN, exact.total(form, rule), dtype=pl.Array(pl.Float32, len(exact.labels))),
    )
    write_parquet(work.folder, EXACT, table)
    by_exact = select_by_score(candidates_of(lineage, recipe, task, exact=table), budget, aggregate).table
    by_sketch = select_by_score(sketched, budget, aggregate).table
    overlap = len(set(by_sketch["example_id"]) & set(by_exact["example_id"]))
    summary = {
        "candidates": table.height,
        "tokens": len(work.project.checkpoints) * exact.row_tokens,
        "subtasks": exact.labels,
        "overlap_with_sketch": overlap / max(1, by_exact.height),
    }
    return StepResult(summary, units=exact.tokens)


@dataclass(frozen=True)
class ExactScores:
    """Influence of n rows on a task's J subtasks without projection, at every checkpoint.

    Attributes:
        labels: The subtasks, sorted.
        weights: Checkpoint -> its normalised mean learning rate.
        scores: Form and subtask rule -> checkpoint -> float32 (n, J); NaN for rows without a usable gradient.
        row_tokens: Tokens of the rows.
        tokens: Tokens that were read at all checkpoints together, those of the targets included.
    """

    labels: list[str]
    weights: dict[str, float]
    scores: dict[tuple[str, str], dict[str, np.ndarray]]
    row_tokens: int
    tokens: int

    def total(self, form: str, rule: str) -> np.ndarray:
        """Influence over all checkpoints, float32 (n, J)."""
        scores = self.scores[form, rule]
        return reduce(np.add, [np.float32(weight) * scores[name] for name, weight in self.weights.items()])


def score_rows_exactly(
    work: StepInputs, task: str, rows: pl.DataFrame, *, forms: Sequence[str], rules: Sequence[str]
) -> ExactScores:
    """Take the gradients of rows and targets at every checkpoint and score the rows without projection.

    Args:
        work: Reads rows, targets and checkpoints.
        task: The task.
        rows: Columns shard and row; those of a shard next to each other.
        forms: Direction forms of the rows.
        rules: Subtask rules.
    """
    from less_assets.method.gradients.exact import exact_influence

    lineage, settings = work.lineage, work.project.gradients
    examples = encode_rows(work, rows)
    row_tokens, tokens = total_tokens(examples), 0
    labels: list[str] = []
    scores: dict[tuple[str, str], dict[str, np.ndarray]] = {(form, rule): {} for form in forms for rule in rules}
    # Target gradients are taken twice: once for their norms, once for the mean of unit directions.
    passes = len(examples) + 2 * lineage.summary("target_examples", task)["examples"]
    progress = work.progress(len(work.project.checkpoints) * len(rules) * passes, "rows")
    for checkpoint in work.project.checkpoints:
        loaded = work.models.checkpoint(lineage, checkpoint)
        targets, subtasks = encode_targets(work, task)
        batching = loaded.batching(settings, max(len(example.input_ids) for example in [*examples, *targets]))
        tokens += len(rules) * (row_tokens + 2 * total_tokens(targets))
        for rule in rules:
            labels, at_checkpoint = exact_influence(
                loaded.model,
                examples,
                targets,
                subtasks,
                rule=rule,
                forms=forms,
                moments=loaded.moments,
                batching=batching,
                directions_limit=settings.directions_limit,
                on_progress=progress,
            )
            for form in forms:
                scores[form, rule][checkpoint] = at_checkpoint[form]
    return ExactScores(labels, checkpoint_weights(lineage), scores, row_tokens, tokens)


def encode_rows(work: StepInputs, rows: pl.DataFrame) -> list[Any]:
    """Pool rows as tokens; `rows` has columns shard and row, those of a shard next to each other."""
    encoder = work.models.encoder()
    examples = []
    for shard in rows["shard"].unique(maintain_order=True):
        wanted = conversations_of(work.lineage, shard)[rows.filter(pl.col("shard") == shard)["row"].to_list()]
        examples += [encoder.row(*conversation) for conversation in wanted.iter_rows()]
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
        group="scores",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Exact, unprojected influence of the candidates around the cut, at every checkpoint.",
        axes=("recipe", "task"),
        inputs=(
            Input("influence_scores"),
            Input("recipe_settings"),
            Input("target_examples"),
            Input("pool_index"),
            Input("excluded_rows"),
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
