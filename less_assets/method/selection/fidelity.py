"""How far a selection by sketched scores can be trusted: calibration on a sample, chances at the cut, real steps.

Belongs here: what follows from rows whose scores are known both sketched and exactly, and the comparison of predicted
with real influence. Not here: taking exact scores (`features`), choosing the sample's rows and storing any of it.

A random sample of the pool is scored exactly. Sketched scores are true ones plus noise, so the rows with the highest
sketched scores are, on average, less good than they look. The regression of exact on sketched scores over the sample
takes that into account: it says for any row how its exact score is distributed given its sketched one, hence which
exact score the cut lies at, and what chance each selected row has of lying above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch

from less_assets.errors import LessAssetsError
from less_assets.method.data.batching import collate
from less_assets.method.data.chat import EncodedExample
from less_assets.method.evaluation.evaluation import held_out_loss
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.gradients.exact import mean_target_directions, score_exactly
from less_assets.method.gradients.features import Batching
from less_assets.method.gradients.per_example import lora_slices
from less_assets.method.selection.ranking import Queue

if TYPE_CHECKING:
    from peft import PeftModel

CONFIDENCE = 0.95
"""Chance above which a selected row counts as certain."""
FEWEST = 8
"""Rows below which nothing is calibrated."""


@dataclass(frozen=True)
class Calibration:
    """How exact scores are distributed given sketched ones: normal around a line, as fitted to n sampled rows.

    Attributes:
        rows: n.
        intercept: Of the line.
        slope: Of the line; below 1 where the sketch's noise is part of the sketched scores' spread.
        spread: Standard deviation of exact scores around the line.
        center: Mean sketched score of the sample.
        scatter: Sum of squared distances from it.
    """

    rows: int
    intercept: float
    slope: float
    spread: float
    center: float
    scatter: float

    def chance_above(self, sketched: np.ndarray, exact_score: float) -> np.ndarray:
        """Chance that rows with these sketched scores (m,) have exact scores above a value, float64 (m,).

        The uncertainty of the line itself, which grows away from the sample's middle, is included.
        """
        sketched = np.asarray(sketched, dtype=np.float64)
        leverage = np.square(sketched - self.center) / self.scatter if self.scatter else 0.0
        deviation = self.spread * np.sqrt(1 + 1 / self.rows + leverage)
        distance = self.intercept + self.slope * sketched - exact_score
        with np.errstate(divide="ignore", invalid="ignore"):
            sigmas = np.where(deviation > 0, distance / deviation, np.sign(distance) * np.inf)
        chances: np.ndarray = torch.special.ndtr(torch.from_numpy(np.nan_to_num(sigmas, nan=0.0))).numpy()
        return chances

    def exact_cut(self, sketched: np.ndarray, share: float) -> float:
        """The exact score above which a share of the rows is expected, given the pool's sketched scores (m,)."""
        predicted = self.intercept + self.slope * np.asarray(sketched, dtype=np.float64)
        margin = 10 * self.spread + 1e-12
        low, high = float(predicted.min()) - margin, float(predicted.max()) + margin
        for _ in range(60):
            middle = (low + high) / 2
            if self.chance_above(sketched, middle).mean() > share:
                low = middle
            else:
                high = middle
        return (low + high) / 2


def calibrate(sketched: np.ndarray, exact: np.ndarray) -> Calibration:
    """Fit the line of exact on sketched scores.

    Args:
        sketched: Scores (n,) of a random sample of the pool, from stored features.
        exact: Scores (n,) of the same rows, without projection.

    Raises:
        ValueError: There are fewer than `FEWEST` rows.
    """
    if len(sketched) < FEWEST:
        raise ValueError(f"{len(sketched)} rows are too few to calibrate on; {FEWEST} are needed")
    x, y = np.asarray(sketched, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    center = x.mean()
    scatter = float(np.square(x - center).sum())
    slope = float((x - center) @ (y - y.mean()) / scatter) if scatter else 0.0
    intercept = float(y.mean() - slope * center)
    residuals = y - intercept - slope * x
    spread = float(np.sqrt(np.square(residuals).sum() / (len(x) - 2)))
    return Calibration(len(x), intercept, slope, spread, float(center), scatter)


@dataclass(frozen=True)
class ScoredSample:
    """What a certificate rests on, for one direction form and subtask rule.

    Attributes:
        sketched: Sketched scores of the sampled rows, float32 (n, J).
        exact: Exact scores of the same rows, float32 (n, J).
        pool: Sketched scores of an even sample of the pool, float32 (m, J).
        pool_rows: Usable rows of the pool.
    """

    sketched: np.ndarray
    exact: np.ndarray
    pool: np.ndarray
    pool_rows: int


JUDGED_SCHEMA = pl.Schema(
    {
        "example_id": pl.String,
        "chance": pl.Float32,  # that exact scores would select the row, too
        "certain": pl.Boolean,  # whether that is CONFIDENCE or more
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
        taken = selected.filter(pl.col("task") == queue.task)
        if queue.subtask is not None:
            taken = taken.filter(pl.col("subtask") == queue.subtask)
        if taken.is_empty():
            continue
        calibration = calibrate(queue.scores(sample.sketched), queue.scores(sample.exact))
        pool, scores = queue.scores(sample.pool), taken["score"].to_numpy().astype(np.float64)
        if candidates is None:
            # As deep as this queue went, rows that others took from it included.
            share = max(float((pool >= scores.min()).mean()), taken.height / sample.pool_rows)
            chance = calibration.chance_above(scores, calibration.exact_cut(pool, min(1.0, share)))
        else:
            share = min(1.0, candidates * taken.height / sample.pool_rows)
            chance = _chance_of_staying(calibration, pool, scores, share, sample.pool_rows)
        certain = chance >= CONFIDENCE
        bands.append(float(scores[certain].min() - scores.min()) if certain.any() else None)
        parts.append(
            taken.select("rank", "example_id").with_columns(chance=pl.Series(chance), certain=pl.Series(certain))
        )
    if not parts:
        return Judgement(pl.DataFrame(schema=JUDGED_SCHEMA), float("nan"), 0, [])
    table = pl.concat(parts).sort("rank").select(JUDGED_SCHEMA.names()).cast(dict(JUDGED_SCHEMA))  # type: ignore[arg-type]
    return Judgement(table, float(table["chance"].mean()), int(table["certain"].sum()), bands)  # type: ignore[arg-type]


def _chance_of_staying(
    calibration: Calibration, pool: np.ndarray, exact: np.ndarray, share: float, pool_rows: int
) -> np.ndarray:
    """Chance that fewer better rows were left out of the candidates than there are selected rows from a row down.

    The number of those left out is taken as Poisson; its expectation is a sum over the pool below the candidates.
    """
    left_out = np.sort(pool)[: round((1 - share) * len(pool))]
    grid = np.quantile(exact, np.linspace(0, 1, 65))
    missed = [calibration.chance_above(left_out, score).sum() * pool_rows / len(pool) for score in grid]
    expected = np.interp(exact, grid, missed)
    from_below = exact.argsort(kind="stable").argsort(kind="stable") + 1.0
    chances: np.ndarray = torch.special.gammaincc(torch.from_numpy(from_below), torch.from_numpy(expected)).numpy()
    return chances


def root_mean_square_error(sketched: np.ndarray, exact: np.ndarray) -> float:
    """Root of the mean squared difference of two arrays of scores."""
    return float(np.sqrt(np.mean(np.square(np.asarray(sketched, np.float64) - np.asarray(exact, np.float64)))))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two (n,) arrays (`scipy.stats.pearsonr`); NaN if one is constant."""
    from scipy.stats import pearsonr

    return float("nan") if _is_constant(a) or _is_constant(b) else float(pearsonr(a, b).statistic)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,) arrays (`scipy.stats.spearmanr`): ties share their rank; NaN if one is constant."""
    from scipy.stats import spearmanr

    return float("nan") if _is_constant(a) or _is_constant(b) else float(spearmanr(a, b).statistic)


def _is_constant(values: np.ndarray) -> bool:
    return np.unique(values).size < 2


def top_overlap(a: np.ndarray, b: np.ndarray, share: float) -> float:
    """Share of the best rows by one (n,) array that are among the best by another; at least one row is taken."""
    count = max(1, round(share * len(a)))
    best = [set(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count].tolist()) for scores in (a, b)]
    return len(best[0] & best[1]) / count


@dataclass(frozen=True)
class StepEffects:
    """Predicted and real influence of n rows on the mean loss of the target examples.

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
    targets: Sequence[EncodedExample],
    *,
    forms: Sequence[str],
    moments: AdamMoments,
    learning_rate: float,
    batching: Batching,
    on_progress: Callable[[int], None] | None = None,
) -> StepEffects:
    """Take one true optimizer step on each row by itself, from the same checkpoint, and see what becomes of the loss.

    Costs a training step per row and, per row and once before, a forward pass over the targets. The model is left
    exactly as it was, bit by bit, also after an error.

    Args:
        model: PEFT model with one active LoRA adapter.
        examples: n rows, each with a loss token.
        targets: Target examples, whose mean loss is looked at.
        forms: Forms whose cosines are wanted.
        moments: Adam's state at the checkpoint.
        learning_rate: η of the step.
        batching: How rows are batched for predicted influence and for the targets' losses.
        on_progress: Called with 1 after each row's step.

    Raises:
        LessAssetsError: A row has no usable gradient.
        UnsupportedModelError: As `extract_features`.
    """
    mean = mean_target_directions(model, targets, ["target"] * len(targets), batching=batching).mean
    asked = tuple(dict.fromkeys(("adamw", *forms)))
    exact = score_exactly(model, examples, mean, forms=asked, moments=moments, batching=batching)
    if exact.status.any():
        row = int(np.flatnonzero(exact.status)[0])
        raise LessAssetsError(
            "A row has no usable gradient, so no step can be taken on it.",
            where=f"example {examples[row].example_id}",
            fix="Leave it out.",
        )
    norm = np.float32(np.linalg.norm(mean))
    real = np.empty(len(examples))
    with _trainable_adapter(model, moments) as step:
        before = _mean_loss(model, targets, batching)
        for number, example in enumerate(examples):
            with step(example, batching.pad_token_id, learning_rate):
                real[number] = before - _mean_loss(model, targets, batching)
            if on_progress:
                on_progress(1)
    return StepEffects(
        real,
        learning_rate * exact.dots["adamw"][:, 0].astype(np.float64),
        {form: exact.cosines(form)[:, 0] / norm for form in forms},
    )


def _mean_loss(model: PeftModel, targets: Sequence[EncodedExample], batching: Batching) -> float:
    losses, _ = held_out_loss(model, targets, token_budget=batching.token_budget)
    return float(losses.mean())


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
