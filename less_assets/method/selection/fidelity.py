"""How far a selection by sketched scores can be trusted: chances at the cut, measures of agreement, real steps.

Belongs here: what follows from rows whose scores are known both sketched and exactly, and the comparison of predicted
with real influence. Not here: taking exact scores (`features`), choosing the sample's rows and storing any of it.

Some rows of the pool, more of them around the cut, are scored exactly. Sketched scores are exact ones plus an error,
so the rows with the highest sketched scores are, on average, less good than they look. `exact_given_sketched` takes
that into account: it says how a row's exact score is distributed given its sketched one. Hence the exact score that the
cut lies at, and the chance of each selected row to lie above it. What the sampled rows on either side of the cut say
directly then corrects these chances as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from scipy.special import expit, gammaincc, logit

from less_assets.errors import LessAssetsError
from less_assets.method.data.batching import collate
from less_assets.method.data.chat import EncodedExample
from less_assets.method.evaluation.evaluation import held_out_loss
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.gradients.exact import mean_gradients, score_exactly
from less_assets.method.gradients.features import Batching
from less_assets.method.gradients.per_example import lora_slices
from less_assets.method.selection.exact_given_sketched import exact_given_sketched
from less_assets.method.selection.ranking import Queue

if TYPE_CHECKING:
    from peft import PeftModel

CONFIDENCE = 0.95
"""Chance above which a selected row counts as certain."""
FEWEST = 8
"""Sampled rows below which nothing is judged."""
MOST_SOURCES = 8
"""Sources whose errors may differ in size from those of the others."""
SHIFT_DEVIATION = 1.2
"""Standard deviation of the prior on how far chances are off as a whole, in log odds."""
LOWER_DRAWS, LOWER_ERRORS = 0.1, 2.0
"""Where the lower end of a chance lies: quantile over the draws of the error, standard errors of the shift."""


TraitsOf = Callable[[pl.DataFrame], np.ndarray]


def row_traits(pool: pl.DataFrame) -> TraitsOf:
    """What may decide how large a sketch's error is: the row's source, and its length.

    Args:
        pool: `source` and `loss_tokens` of an even sample of the pool.

    Returns:
        From a table with these columns to float64 (n, p): one column for each of the largest sources but one, and the
        logarithm of the length against the median.
    """
    sources = pool["source"].value_counts().sort(["count", "source"], descending=[True, False])["source"]
    compared = sources.to_list()[1 : MOST_SOURCES + 1]
    typical = max(1.0, float(pool["loss_tokens"].median() or 1))  # type: ignore[arg-type]

    def traits(table: pl.DataFrame) -> np.ndarray:
        columns = [(table["source"] == source).to_numpy() for source in compared]
        columns.append(np.log(np.maximum(1, table["loss_tokens"].to_numpy()) / typical))
        return np.stack(columns, axis=1).astype(np.float64)

    return traits


def no_traits(table: pl.DataFrame) -> np.ndarray:
    """Nothing is known of rows but their scores: float64 (n, 0)."""
    return np.empty((table.height, 0))


@dataclass(frozen=True)
class ScoredSample:
    """What a certificate rests on, for one direction form and subtask rule.

    Attributes:
        sketched: Sketched scores of the sampled rows, float32 (n, J).
        exact: Exact scores of the same rows, float32 (n, J).
        pool: Sketched scores of an even sample of the pool, float32 (m, J).
        pool_rows: Usable rows of the pool.
        inclusion: Chance of each row of `pool` to be among the n, up to a factor, float64 (m,); None: all alike.
        traits: `traits_of` the n rows, float64 (n, p); None: nothing is known of rows.
        pool_traits: `traits_of` the m rows, float64 (m, p).
        traits_of: Gives the traits of selected rows.
    """

    sketched: np.ndarray
    exact: np.ndarray
    pool: np.ndarray
    pool_rows: int
    inclusion: np.ndarray | None = None
    traits: np.ndarray | None = None
    pool_traits: np.ndarray | None = None
    traits_of: TraitsOf = no_traits


class QueueFidelity:
    """How the exact scores of one order of rows are distributed, given the sketched ones.

    Args:
        sample: The certificate's scores.
        queue: The order.
        cut: Lowest sketched score selected in this order.

    Raises:
        ValueError: There are fewer than `FEWEST` sampled rows.
    """

    def __init__(self, sample: ScoredSample, queue: Queue, cut: float) -> None:
        rows = len(sample.sketched)
        if rows < FEWEST:
            raise ValueError(f"{rows} rows are too few to judge by; {FEWEST} are needed")
        sketched, exact, pool = (queue.scores(scores) for scores in (sample.sketched, sample.exact, sample.pool))
        traits = np.empty((rows, 0)) if sample.traits is None else sample.traits
        pool_traits = np.empty((len(pool), 0)) if sample.pool_traits is None else sample.pool_traits
        self.traits_of = sample.traits_of
        self.distribution = exact_given_sketched(
            sketched,
            exact,
            traits,
            pool=pool,
            pool_traits=pool_traits,
            inclusion=np.ones(len(pool)) if sample.inclusion is None else sample.inclusion,
            cut=cut,
        )
        self._exact = exact.astype(np.float64)
        self._cells = self.distribution.cells(sketched, traits)
        self._selected = sketched >= cut
        self._counts = {side: self._cell_counts(pool, pool_traits, (pool >= cut) == side) for side in (True, False)}
        self._rows = len(pool)

    def _cell_counts(self, pool: np.ndarray, traits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        counts = np.zeros(self.distribution.above.shape[1:3])
        np.add.at(counts, self.distribution.cells(pool[wanted], traits[wanted]), 1)
        return counts

    def exact_cut(self, share: float) -> float:
        """The exact score above which a share of the pool is expected."""
        wanted, values = share * self._rows, self.distribution.values
        above = np.moveaxis(self.distribution.above.mean(axis=0), -1, 0)
        expected = np.array([self._expected_rows(value, cells) for value, cells in zip(values, above, strict=True)])
        # Corrections by few rows make the expectation uneven: the middle of where it crosses.
        falling = np.minimum.accumulate(expected), np.maximum.accumulate(expected[::-1])[::-1]
        return float(np.mean([np.interp(-wanted, -rows, values) for rows in falling]))

    def _expected_rows(self, value: float, chances: np.ndarray) -> float:
        """Rows of the pool's sample expected above a value, from the chances of each cell."""
        return sum(
            float((counts * _shifted(chances, self._correction(value, side)[0])).sum())
            for side, counts in self._counts.items()
        )

    def chances(self, sketched: np.ndarray, selected: pl.DataFrame, value: float) -> tuple[np.ndarray, np.ndarray]:
        """Chance of each of K selected rows to have an exact score above a value, and its lower end.

        Args:
            sketched: Their sketched scores (K,).
            selected: The rows themselves, with what `ScoredSample.traits_of` reads.
            value: An exact score, such as the cut.

        Returns:
            float64 (K,) each.
        """
        cells = self.distribution.cells(sketched, self.traits_of(selected))
        drawn = self.distribution.chances(cells, value)
        shift, error = self._correction(value, selected=True)
        lower = _shifted(np.quantile(drawn, LOWER_DRAWS, axis=0), shift - LOWER_ERRORS * error)
        return _shifted(drawn.mean(axis=0), shift), lower

    def expected_left_out(self, share: float, values: np.ndarray) -> np.ndarray:
        """Rows of the pool's sample expected above some exact scores (v,), best share left aside, float64 (v,)."""
        counts = self._counts[True] + self._counts[False]
        below = np.cumsum(counts.sum(axis=0)) <= (1 - share) * self._rows
        expected = np.einsum("lb,lbv->v", counts[:, below], self.distribution.above.mean(axis=0)[:, below])
        rows: np.ndarray = np.interp(values, self.distribution.values, expected)
        return rows

    def _correction(self, value: float, selected: bool) -> tuple[float, float]:
        """How far chances on one side of the sketched cut are off, in log odds, and the standard error of that.

        It is the shift under which the sampled rows of that side are likeliest, with a normal prior around none.
        """
        side = self._selected == selected
        level, score_bin = self._cells
        chances = self.distribution.chances((level[side], score_bin[side]), value).mean(axis=0)
        hits = np.clip((self._exact[side] - value) / (2 * self.distribution.resolution(value)) + 0.5, 0, 1)
        shift, precision = 0.0, SHIFT_DEVIATION**-2
        for _ in range(20):
            shifted = _shifted(chances, shift)
            information = float((shifted * (1 - shifted)).sum()) + precision
            shift += float((hits - shifted).sum() - shift * precision) / information
        return shift, information**-0.5


def _shifted(chances: np.ndarray, shift: float) -> np.ndarray:
    """Chances with their log odds shifted."""
    shifted: np.ndarray = expit(logit(np.clip(chances, 1e-7, 1 - 1e-7)) + shift)
    return shifted


JUDGED_SCHEMA = pl.Schema(
    {
        "example_id": pl.String,
        "chance": pl.Float32,  # that exact scores would select the row, too
        "certain": pl.Boolean,  # whether even the lower end of that chance is CONFIDENCE or more
    }
)


@dataclass(frozen=True)
class Judgement:
    """What a certificate says about one selection.

    Attributes:
        table: One row per selected row (`JUDGED_SCHEMA`), in the selection's order.
        overlap: Expected share of the selected rows that exact scores would select, too.
        certain: Number of selected rows labelled certain.
        bands: Per queue, the smallest distance above the cut at which a row is certain; None where no row is.
    """

    table: pl.DataFrame
    overlap: float
    certain: int
    bands: list[float | None]


def judge(
    sample: ScoredSample, queues: Sequence[Queue], selected: pl.DataFrame, *, candidates: float | None = None
) -> Judgement:
    """Label each selected row.

    Args:
        sample: Scores of the recipe's form and subtask rule.
        queues: `ranking.queues_of` the recipe.
        selected: `selection.SELECTION_SCHEMA`, every row with task and score.
        candidates: The rows were scored again exactly, this many times the budget of them: then a row is in doubt only
            if better ones may have been left out of the candidates.
    """
    parts, bands = [], []
    for queue in queues:
        taken = queue.taken(selected)
        if taken.is_empty():
            continue
        scores = taken["score"].to_numpy().astype(np.float64)
        if candidates is None:
            fidelity = QueueFidelity(sample, queue, float(scores.min()))
            # As deep as this queue went, rows that others took from it included.
            share = max(float((queue.scores(sample.pool) >= scores.min()).mean()), taken.height / sample.pool_rows)
            chance, lower = fidelity.chances(scores, taken, fidelity.exact_cut(min(1.0, share)))
        else:
            share = min(1.0, candidates * taken.height / sample.pool_rows)
            chance = lower = _chance_of_staying(sample, queue, scores, share)
        certain = lower >= CONFIDENCE
        bands.append(float(scores[certain].min() - scores.min()) if certain.any() else None)
        parts.append(
            taken.select("rank", "example_id").with_columns(chance=pl.Series(chance), certain=pl.Series(certain))
        )
    if not parts:
        return Judgement(pl.DataFrame(schema=JUDGED_SCHEMA), float("nan"), 0, [])
    table = pl.concat(parts).sort("rank").select(JUDGED_SCHEMA.names()).cast(dict(JUDGED_SCHEMA))  # type: ignore[arg-type]
    return Judgement(table, float(table["chance"].mean()), int(table["certain"].sum()), bands)  # type: ignore[arg-type]


def _chance_of_staying(sample: ScoredSample, queue: Queue, exact: np.ndarray, share: float) -> np.ndarray:
    """Chance that fewer better rows were left out of the candidates than there are selected rows from a row down.

    The number of those left out is taken as Poisson; its expectation is a sum over the pool below the candidates.
    """
    pool = queue.scores(sample.pool)
    fidelity = QueueFidelity(sample, queue, float(np.quantile(pool, 1 - share)))
    grid = np.quantile(exact, np.linspace(0, 1, 65))
    missed = fidelity.expected_left_out(share, grid) * sample.pool_rows / len(pool)
    expected = np.interp(exact, grid, missed)
    from_below = exact.argsort(kind="stable").argsort(kind="stable") + 1.0
    chance: np.ndarray = gammaincc(from_below, expected)
    return chance


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two (n,) arrays (`scipy.stats.pearsonr`); NaN if one is constant."""
    from scipy.stats import pearsonr

    return float("nan") if _is_constant(a) or _is_constant(b) else float(pearsonr(a, b).statistic)


def spearman(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Rank correlation of two (n,) arrays (`scipy.stats.spearmanr`): ties share their rank; NaN if one is constant.

    With weights (n,), such as one over the chance to be sampled, a row stands for as many rows.
    """
    from scipy.stats import spearmanr

    if _is_constant(a) or _is_constant(b):
        return float("nan")
    if weights is None:
        return float(spearmanr(a, b).statistic)
    covariance = np.cov(_weighted_ranks(a, weights), _weighted_ranks(b, weights), aweights=weights)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    _, group = np.unique(values, return_inverse=True)
    total = np.bincount(group, weights=weights)
    ranks: np.ndarray = (np.cumsum(total) - total / 2)[group]
    return ranks


def _is_constant(values: np.ndarray) -> bool:
    return np.unique(values).size < 2


@dataclass(frozen=True)
class StepEffects:
    """Predicted and real influence of n rows on the mean loss of a task's target examples.

    Attributes:
        real: Fall of the loss after one step of torch's AdamW on the row alone, float64 (n,); positive is better.
        predicted: First-order prediction of it, η·⟨Γ, ∇loss⟩ with Γ in form `adamw`, float64 (n,).
        cosines: Per form, the cosine of Γ and ∇loss, which is what LESS ranks by, float32 (n,).
    """

    real: np.ndarray
    predicted: np.ndarray
    cosines: dict[str, np.ndarray]


def step_effects(
    model: PeftModel,
    examples: Sequence[EncodedExample],
    targets: Mapping[str, Sequence[EncodedExample]],
    *,
    forms: Sequence[str],
    moments: AdamMoments,
    learning_rate: float,
    batching: Batching,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, StepEffects]:
    """Take one true optimizer step on each row by itself, from the same checkpoint, and see what becomes of the losses.

    Costs a training step per row and, per row and once before, a forward pass over the targets of all tasks. The model
    is left exactly as it was, bit by bit, also after an error.

    Args:
        model: PEFT model with one active LoRA adapter.
        examples: n rows, each with a loss token.
        targets: Task -> target examples, whose mean loss is looked at.
        forms: Forms whose cosines are wanted.
        moments: Adam's state at the checkpoint.
        learning_rate: η of the step.
        batching: How rows are batched for predicted influence and for the targets' losses.
        on_progress: Called with 1 after each row's step.

    Returns:
        Task -> effects on its loss.

    Raises:
        LessAssetsError: A row has no usable gradient.
        UnsupportedModelError: As `extract_features`.
    """
    every = [example for examples_of in targets.values() for example in examples_of]
    task_of = [task for task, examples_of in targets.items() for _ in examples_of]
    tasks, mean = mean_gradients(model, every, task_of, batching=batching)
    asked = tuple(dict.fromkeys(("adamw", *forms)))
    exact = score_exactly(model, examples, mean, forms=asked, moments=moments, batching=batching)
    if exact.status.any():
        row = int(np.flatnonzero(exact.status)[0])
        raise LessAssetsError(
            "A row has no usable gradient, so no step can be taken on it.",
            where=f"example {examples[row].example_id}",
            fix="Leave it out.",
        )
    rows_of = [np.flatnonzero(np.array(task_of) == task) for task in tasks]

    def losses() -> np.ndarray:
        losses, _ = held_out_loss(model, every, token_budget=batching.token_budget)
        return np.array([losses[rows].mean() for rows in rows_of])

    real = np.empty((len(examples), len(tasks)))
    with _trainable_adapter(model, moments) as step:
        before = losses()
        for number, example in enumerate(examples):
            with step(example, batching.pad_token_id, learning_rate):
                real[number] = before - losses()
            if on_progress:
                on_progress(1)
    predicted = learning_rate * exact.dots["adamw"].astype(np.float64)
    norms = np.linalg.norm(mean, axis=1)
    return {
        task: StepEffects(
            real[:, column],
            predicted[:, column],
            {form: exact.cosines(form)[:, column] / norms[column] for form in forms},
        )
        for column, task in enumerate(tasks)
    }


@contextmanager
def _trainable_adapter(model: PeftModel, moments: AdamMoments) -> Iterator[Callable[..., AbstractContextManager[None]]]:
    """Gives a context manager that takes one AdamW step on one row and takes it back."""
    weights = {
        name: weight
        for part in lora_slices(model)
        for name, weight in zip(part.parameters, (part.a, part.b), strict=True)
    }
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    needed = {name: weight.requires_grad for name, weight in weights.items()}
    was_training = model.training

    def restore() -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
                weight.grad = None

    @contextmanager
    def step(example: EncodedExample, pad_token_id: int, learning_rate: float) -> Iterator[None]:
        optimizer = torch.optim.AdamW(
            weights.values(),
            lr=learning_rate,
            betas=(moments.beta1, moments.beta2),
            eps=moments.eps,
            weight_decay=0.0,  # the same for every row, and no part of the predicted influence
        )
        for name, weight in weights.items():
            optimizer.state[weight] = {
                "step": torch.tensor(float(moments.step)),
                "exp_avg": moments.exp_avg[name].to(weight.device, weight.dtype, copy=True),
                "exp_avg_sq": moments.exp_avg_sq[name].to(weight.device, weight.dtype, copy=True),
            }
        batch = {name: tensor.to(weight.device) for name, tensor in collate([example], pad_token_id).items()}
        try:
            with torch.enable_grad():
                model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            yield
        finally:
            restore()

    try:
        model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        yield step
    finally:
        restore()
        for name, weight in weights.items():
            weight.requires_grad_(needed[name])
        model.train(was_training)
