"""How each recipe ranks the pool: which scores it reads, what it counts, what it passes over.

Belongs here: reading stored scores and rows for `method/selection.py`, shard by shard. Not here: making scores
(`selection.py`, `baselines.py`, `rescoring.py`) or storing the selected rows (`selection.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from less_assets.compute.step import StepInputs
from less_assets.lineage.lineage import Lineage
from less_assets.method.selection.ranking import Restraints, score_matrix
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.excluded import mark_excluded
from less_assets.reading.files import PLACES, score_file
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import checkpoint_weights, conversations_of
from less_assets.reading.scores import candidates_of, exact_scores_of
from less_assets.reading.shard_features import vectors_of_rows
from less_assets.steps.gradients import encode_targets
from less_assets.steps.matching import select_by_matching
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.tables import read_json, read_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.selection import Budget, Candidates, Selection

SCORE_ASSETS = {
    "text": "text_scores",
    "embeddings": "embedding_scores",
    "preconditioned": "preconditioned_scores",
    "external": "external_scores",
    "tuning": "target_tuned_scores",
}
"""What a recipe ranks by -> the asset that holds its scores, one column of them; influence lies in another form."""


class Pool:
    """The pool's usable rows by shard; tokens are counted once for each shard.

    Args:
        work: Reads the pool.
        exclude: Whether rows that the project leaves out are no candidates.
    """

    def __init__(self, work: StepInputs, *, exclude: bool = True) -> None:
        self._work, self._exclude = work, exclude
        self._index = PoolIndex(work.lineage)
        self._tokens: dict[str, pl.Series] = {}

    def mark_excluded(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows with the status `excluded` where the project leaves them out."""
        return mark_excluded(self._work.lineage, rows) if self._exclude else rows

    def shards(self, *, tokens: bool) -> Callable[[], Iterator[pl.DataFrame]]:
        """Rows of the index, "ok" or "excluded", shard by shard, and their loss tokens if asked for."""

        def read() -> Iterator[pl.DataFrame]:
            for shard in self._work.lineage.shards():
                yield self.rows(shard, tokens=tokens)

        return read

    def rows(self, shard: str, *, tokens: bool) -> pl.DataFrame:
        """A shard's usable rows, as in `shards`."""
        rows = self.mark_excluded(self._index.shard(shard).with_columns(pl.lit("ok").alias("status")))
        if not tokens:
            return rows
        if shard not in self._tokens:
            self._tokens[shard] = _loss_tokens(self._work, shard, rows)
        return rows.with_columns(self._tokens[shard])


def _loss_tokens(work: StepInputs, shard: str, rows: pl.DataFrame) -> pl.Series:
    encoder = work.models.encoder()
    wanted = conversations_of(work.lineage, shard)[rows["row"].to_list()]
    counts = [encoder.row(*conversation).loss_tokens for conversation in wanted.iter_rows()]
    return pl.Series("loss_tokens", counts, pl.Int32)


def budget_of(lineage: Lineage, recipe: ResolvedRecipe) -> Budget:
    """What a recipe may choose of its budget: all of it, but for the share that its `mix` draws."""
    from less_assets.method.selection.mixing import divide

    budget = whole_budget(lineage, recipe)
    return divide(budget, recipe.mix.share)[0] if recipe.mix else budget


def whole_budget(lineage: Lineage, recipe: ResolvedRecipe) -> Budget:
    """A recipe's budget in the method's words.

    A fraction is one of the pool's distinct examples, for every strategy alike: so that recipes stay comparable where
    one of them cannot use all rows.
    """
    from less_assets.method.selection.selection import Budget

    assert recipe.budget is not None
    budget = Budget(recipe.budget.unit, recipe.budget.amount)
    rows = budget.rows_of(lineage.summary("pool_index")["unique"])
    return Budget("rows", rows) if rows else budget


def aggregate_of(recipe: ResolvedRecipe) -> str:
    """How a recipe's scores make one ranking; a single score is its own best, and matching begins with the mean."""
    return "mean" if recipe.aggregate == "match" else recipe.aggregate or "max"


def select_rows(work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str) -> Selection:
    """The rows that a recipe with a budget selects for a task: chosen, drawn, or some of both."""
    from less_assets.method.selection.mixing import divide, mix

    choose = draw_rows if recipe.traits.scores is None else select_by_recipe
    chosen = choose(work, pool, recipe, task)
    if recipe.mix is None:
        return chosen
    budget = divide(whole_budget(work.lineage, recipe), recipe.mix.share)[1]
    rows = pool.shards(tokens=budget.kind == "tokens")
    restraints = quotas_of(recipe)
    return mix(chosen, rows, budget, recipe.mix.seed, sources=recipe.mix.sources, restraints=restraints)


def select_by_recipe(work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str) -> Selection:
    """The rows that a recipe with scores selects for a task."""
    from less_assets.method.selection.selection import select_by_score

    exact = exact_scores_of(work.lineage, recipe, task)
    if exact is None:
        candidates = scored_pool(work, pool, recipe, task)
    else:
        candidates = candidates_of(work.lineage, recipe, task, exact=exact)
    if recipe.aggregate == "match":
        return select_by_matching(work, recipe, candidates, budget_of(work.lineage, recipe))
    return select_by_score(
        candidates, budget_of(work.lineage, recipe), aggregate_of(recipe), restraints_of(work, recipe)
    )


def draw_rows(work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str) -> Selection:
    """The rows that a recipe draws: all alike, or by their length."""
    from less_assets.method.selection.selection import select_at_random

    budget, restraints = budget_of(work.lineage, recipe), restraints_of(work, recipe)
    assert recipe.seed is not None
    by_length = recipe.traits.draws_by_length
    return select_at_random(
        pool.shards(tokens=by_length or budget.kind == "tokens"),
        budget,
        recipe.seed,
        stream=recipe.strategy,
        log_weights=_length_weights(work, pool, recipe, task) if by_length else None,
        restraints=restraints,
    )


def scored_pool(work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str) -> list[Candidates]:
    """The whole pool as a recipe scores it; see `candidates_of`."""
    if recipe.scores == "influence":
        return candidates_of(work.lineage, recipe, task)
    return _baseline_candidates(work, pool, recipe, task)


def _baseline_candidates(work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str) -> list[Candidates]:
    """The pool scored by a baseline: once for a task, once for each member of a group."""
    from less_assets.method.selection.selection import Candidates

    asset = SCORE_ASSETS[str(recipe.scores)]
    partition = work.lineage.declarations[asset].partition({"recipe": recipe.key, "task": task})
    folder = work.lineage.folder(asset, partition)
    places: Any = read_json(folder, PLACES)
    ranked_scores = _ranked_scores(work, recipe, folder)
    counted = recipe.budget is not None and recipe.budget.unit == "tokens"

    def shards(wanted: list[int]) -> Callable[[], Iterator[pl.DataFrame]]:
        kind = pl.Array(pl.Float32, len(wanted))

        def read() -> Iterator[pl.DataFrame]:
            for shard in work.lineage.shards():
                table = read_parquet(folder, score_file(shard)).drop("loss_tokens", strict=False)
                ids = table["example_id"].fill_null("").to_list()  # quarantined rows have none, and no score
                scores = ranked_scores(ids, score_matrix(table["score"]))[:, wanted]
                rows = pool.rows(shard, tokens=counted).drop("example_id", "source", "shard", "copies", "status")
                joined = table.with_columns(pl.Series("score", scores, dtype=kind)).join(
                    rows, on="row", how="left", maintain_order="left"
                )
                yield pool.mark_excluded(joined.with_columns(pl.col("canonical").fill_null(False)))

        return read

    # In the order of the project file, as influence does; a score that no task has a part in stands under the task.
    names = [member.name for member in work.project.member_tasks(task)]
    members = {name: [number for number, (member, _) in enumerate(places) if member == name] for name in [*names, task]}
    return [
        Candidates(member, "score", tuple(places[number][1] for number in own), shards(own))
        for member, own in members.items()
        if own
    ]


def _ranked_scores(
    work: StepInputs, recipe: ResolvedRecipe, folder: ArtifactFolder
) -> Callable[[list[str], np.ndarray], np.ndarray]:
    """From the ids and stored scores (n, J) of rows to the scores that a recipe ranks by, as its strategy says."""
    from less_assets.method.selection.baselines import with_gumbel_noise

    traits = recipe.traits
    if traits.draws:
        seed = int(recipe.seed or 0)
        return lambda ids, scores: np.stack(
            [with_gumbel_noise(column, ids, seed, recipe.strategy) for column in scores.T], axis=1
        )
    if (ranks_by := traits.load_ranks_by()) is None:
        return lambda _, scores: scores
    # A score takes four bytes a row of the pool.
    tables = [read_parquet(folder, score_file(shard), ["score"]) for shard in work.lineage.shards()]
    pool = np.concatenate([score_matrix(table["score"]) for table in tables])
    keys = {key: getattr(recipe, key) for key in traits.keys if key not in ("aggregate", "seeds")}
    return lambda _, scores: np.stack(
        [ranks_by(column, pool=whole, **keys) for column, whole in zip(scores.T, pool.T, strict=True)], axis=1
    )


def _length_weights(
    work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str
) -> Callable[[pl.DataFrame], np.ndarray]:
    """Log weights under which rows drawn at random are as long as the matched recipe's, or as the task's targets."""
    from less_assets.method.selection.baselines import length_histogram, length_matched_log_weights

    drawn_from = pl.col("canonical") & (pl.col("status") == "ok")
    lengths = (rows.filter(drawn_from)["loss_tokens"].to_numpy() for rows in pool.shards(tokens=True)())
    counts = np.sum([length_histogram(part) for part in lengths], axis=0)
    reference = length_histogram(_matched_lengths(work, pool, recipe, task))
    return lambda rows: length_matched_log_weights(rows["loss_tokens"].to_numpy(), counts, reference)


def _matched_lengths(work: StepInputs, pool: Pool, recipe: ResolvedRecipe, task: str) -> np.ndarray:
    """Loss tokens of the rows that the matched recipe selects, or of the task's target examples."""
    if recipe.match is None:
        examples, _ = encode_targets(work, task)
        return np.array([example.loss_tokens + 1 for example in examples])  # a row of the pool has its end token
    chosen = select_rows(work, pool, work.project.recipe(recipe.match), task).table
    parts = []
    for shard in chosen["shard"].unique(maintain_order=True):
        rows = pool.rows(shard, tokens=True)
        parts.append(rows.filter(pl.col("row").is_in(chosen.filter(shard=shard)["row"].implode()))["loss_tokens"])
    return pl.concat(parts).to_numpy()


def quotas_of(recipe: ResolvedRecipe) -> Restraints:
    """A recipe's quotas."""
    return Restraints(recipe.quotas)


def restraints_of(work: StepInputs, recipe: ResolvedRecipe) -> Restraints:
    """A recipe's quotas, and its near-duplicates by the cosine of gradient features."""
    if recipe.near_duplicates is None:
        return quotas_of(recipe)
    lineage, weights = work.lineage, checkpoint_weights(work.lineage)

    def vectors(rows: pl.DataFrame) -> np.ndarray:
        """Vectors of rows that come sorted by shard and row."""
        parts = []
        for (shard,), within in rows.group_by("shard", maintain_order=True):
            parts.append(vectors_of_rows(lineage, weights, str(recipe.form), str(shard), within["row"].to_numpy()))
        return np.concatenate(parts)

    return Restraints(recipe.quotas, recipe.near_duplicates, vectors)
