"""Two-stage exactness: the sketch retrieves candidates around the cut, exact gradients decide.

Belongs here: wiring only, also what certificates need of exact scores. The mathematics is `method/gradients/exact.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Lineage, split
from less_assets.reading.files import EXACT, EXACT_COLUMN, TARGET_FEATURES
from less_assets.reading.rows import checkpoint_weights, conversations_of
from less_assets.reading.scores import candidates_of
from less_assets.steps.asset import Asset
from less_assets.steps.gradients import encode_targets, total_tokens
from less_assets.steps.ranking import budget_of
from less_assets.steps.shown import one_table
from less_assets.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from less_assets.method.data.chat import EncodedExample


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
    exact = score_rows_exactly(work, {task: ranked}, forms=(form,), rules=(rule,))[task]
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
        "tokens": len(exact.weights) * exact.row_tokens,
        "subtasks": exact.labels,
        "overlap_with_sketch": overlap / max(1, by_exact.height),
    }
    return StepResult(summary, units=exact.tokens)


@dataclass(frozen=True)
class ExactScores:
    """Influence of n rows on a task's J subtasks without projection, at every checkpoint that has a weight.

    Attributes:
        labels: The subtasks, sorted.
        weights: Checkpoint -> its normalised mean learning rate.
        scores: Form and subtask rule -> checkpoint -> float32 (n, J); NaN for rows without a usable gradient.
        row_tokens: Tokens of the rows.
        tokens: Tokens at all checkpoints together, those of the targets included, as if for this task alone.
    """

    labels: list[str]
    weights: dict[str, float]
    scores: dict[tuple[str, str], dict[str, np.ndarray]]
    row_tokens: int
    tokens: int

    def total(self, form: str, rule: str) -> np.ndarray:
        """Influence over all checkpoints, float32 (n, J)."""
        return weighted_total(self.scores[form, rule], self.weights)


def weighted_total(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Influence over all checkpoints from that at each, float32 (n, J)."""
    return reduce(np.add, [np.float32(weight) * scores[name] for name, weight in weights.items()])


def score_rows_exactly(
    work: StepInputs,
    rows: Mapping[str, pl.DataFrame],
    *,
    forms: Sequence[str],
    rules: Sequence[str],
    known_norms: bool = False,
) -> dict[str, ExactScores]:
    """Take the gradients of rows and targets at every checkpoint and score the rows without projection.

    A row of several tasks is run through the model once for all of them, as far as their target directions fit into
    `gradients.directions_limit` together.

    Args:
        work: Reads rows, targets and checkpoints.
        rows: Task -> the rows that are scored for it: columns shard and row.
        forms: Direction forms of the rows.
        rules: Subtask rules.
        known_norms: Take the norms of the targets' gradients from `target_gradients`, which is fresh.

    Returns:
        Task -> scores of its rows.
    """
    from less_assets.method.gradients.exact import exact_influence

    lineage, settings = work.lineage, work.project.gradients
    both = pl.concat([table.select("shard", "row") for table in rows.values()]).unique().sort("shard", "row")
    examples = encode_rows(work, both)
    places = {
        task: table.join(both.with_row_index("place"), on=["shard", "row"], maintain_order="left")["place"].to_list()
        for task, table in rows.items()
    }
    targets = {task: encode_targets(work, task) for task in rows}
    # Besides their mean, `mean_cosine` needs the norms of the targets' gradients.
    target_passes = sum(1 if known_norms or rule != "mean_cosine" else 2 for rule in rules)
    passed = len(rules) * len(examples) + target_passes * sum(len(encoded) for encoded, _ in targets.values())
    weights = checkpoint_weights(lineage)
    progress = work.progress(len(weights) * passed, "rows")
    scores: dict[str, dict[tuple[str, str], dict[str, np.ndarray]]] = {
        task: {(form, rule): {} for form in forms for rule in rules} for task in rows
    }
    for checkpoint in weights:
        loaded = work.models.checkpoint(lineage, checkpoint)
        every = [example for encoded, _ in targets.values() for example in encoded]
        batching = loaded.batching(settings, max(len(example.input_ids) for example in [*examples, *every]))
        for tasks in _fitting_together(targets, settings.directions_limit // (4 * loaded.parameters)):
            wanted = sorted({row for task in tasks for row in places[task]})
            labels = [(task, subtask) for task in tasks for subtask in targets[task][1]]
            for rule in rules:
                compared, influence = exact_influence(
                    loaded.model,
                    [examples[row] for row in wanted],
                    [example for task in tasks for example in targets[task][0]],
                    labels,
                    rule=rule,
                    forms=forms,
                    moments=loaded.moments,
                    target_norms=_known_norms(lineage, checkpoint, tasks) if known_norms else None,
                    batching=batching,
                    directions_limit=settings.directions_limit,
                    on_progress=progress,
                )
                for task in tasks:
                    own_rows = np.searchsorted(wanted, places[task])
                    columns = [column for column, (name, _) in enumerate(compared) if name == task]
                    for form in forms:
                        scores[task][form, rule][checkpoint] = influence[form][own_rows][:, columns]
    exact = {}
    for task, (encoded, subtasks) in targets.items():
        row_tokens = total_tokens(examples[row] for row in places[task])
        passed = len(rules) * row_tokens + target_passes * total_tokens(encoded)
        tokens = len(weights) * passed
        exact[task] = ExactScores(sorted(set(subtasks)), weights, scores[task], row_tokens, tokens)
    return exact


def _fitting_together(
    targets: Mapping[str, tuple[Sequence[EncodedExample], Sequence[str]]], directions: int
) -> list[list[str]]:
    """Tasks in groups that have at most so many subtasks together, or one task alone."""
    groups: list[list[str]] = []
    room = 0
    for task, (_, subtasks) in targets.items():
        count = len(set(subtasks))
        if groups and count <= room:
            groups[-1].append(task)
        else:
            groups.append([task])
            room = directions
        room -= count
    return groups


def _known_norms(lineage: Lineage, checkpoint: str, tasks: Sequence[str]) -> np.ndarray:
    """Exact norms of the target examples' gradients, task by task."""
    folders = [lineage.folder("target_gradients", f"{checkpoint}|{task}") for task in tasks]
    return np.concatenate([read_parquet(folder, TARGET_FEATURES, ["norm"])["norm"].to_numpy() for folder in folders])


def encode_rows(work: StepInputs, rows: pl.DataFrame) -> list[EncodedExample]:
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
        passes=2,
        counts_tokens=True,
        speed=Guess(("train_gradients",)),
        columns_from={
            "influence_scores": {"example_id": ["example_id"], "sketched_score": ["{form}.{rule}"]},
            "target_examples": {"exact": ["messages", "completion", "subtask"]},
            "pool_index": {"source": ["source"], "shard": ["shard"], "row": ["row"]},
        },
    ),
)
