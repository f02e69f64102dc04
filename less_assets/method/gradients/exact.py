"""Without projection: exact gradients and directions, mean target directions, exact scores.

Belongs here: what sketched features are measured against, and what `rescore: exact` and the certificate take. Not here:
how rows are batched and run through the model (`features`), how scores become a selection (`influence`, `selection`).

Everything but `per_example_gradients` runs layer by layer while the backward pass goes on, and keeps no row's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from less_assets.errors import TargetFormatError
from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.gradients.features import Batching, DirectionMaker, ExactNorms, RowStatus, backpropagate
from less_assets.method.gradients.per_example import LoraSlice, PerExampleBackward, lora_slices

if TYPE_CHECKING:
    from peft import PeftModel

Label = TypeVar("Label", str, tuple[str, str])


def per_example_gradients(
    model: PeftModel,
    examples: Sequence[EncodedExample],
    *,
    form: str = "sgd",
    moments: AdamMoments | None = None,
    batching: Batching = Batching(),
) -> np.ndarray:
    """Unprojected gradients, or directions in another form: for tests and small P, all of it in memory.

    Args:
        model: As for `extract_features`.
        examples: n rows.
        form: Direction form; `sgd` is the gradient itself.
        moments: Adam's state, for the other forms.
        batching: How rows are batched.

    Returns:
        float32 (n, P), columns in `lora_parameters(model)` order. Rows without loss tokens are zero.

    Raises:
        UnsupportedModelError: As `extract_features`.
    """
    sink = _ColumnSink(form, moments, len(examples))
    backpropagate(model, examples, batching, sink, None)
    return sink.columns


@dataclass(frozen=True)
class MeanDirections:
    """Exact mean target directions of J subtasks, for both subtask rules.

    Attributes:
        subtasks: Labels, sorted.
        mean: Mean gradient of each subtask, float32 (J, P): `cosine_of_mean` is the cosine with it.
        unit_mean: Mean of the unit gradients, float32 (J, P): `mean_cosine` is a unit row's inner product with it.
    """

    subtasks: list[str]
    mean: np.ndarray
    unit_mean: np.ndarray

    def rule(self, name: str) -> np.ndarray:
        """Directions D (J, P) such that a unit row's inner products with D are its influence under a subtask rule."""
        if name == "mean_cosine":
            return self.unit_mean
        unit: np.ndarray = self.mean / np.linalg.norm(self.mean, axis=1, keepdims=True)
        return unit


def mean_target_directions(
    model: PeftModel,
    examples: Sequence[EncodedExample],
    subtasks: Sequence[str],
    *,
    batching: Batching = Batching(),
    on_progress: Callable[[int], None] | None = None,
) -> MeanDirections:
    """Exact mean gradient and mean unit gradient per subtask; two passes over the examples, 2·J·P·4 bytes.

    Args:
        model: As for `extract_features`.
        examples: Target examples.
        subtasks: Label of each; subtasks may differ in size and order.
        batching: How rows are batched.
        on_progress: Called with the rows of each finished batch, of both passes.

    Raises:
        TargetFormatError: If a target's gradient is zero or not finite.
        UnsupportedModelError: As `extract_features`.
    """
    labels, membership = _membership(subtasks)
    norms = _gradient_norms(model, examples, subtasks, batching, on_progress)
    weights = np.stack([membership, membership / norms[:, None]])
    sums = _weighted_sums(model, examples, subtasks, weights, batching, on_progress)
    return MeanDirections(labels, sums[0], sums[1])


def mean_gradients(
    model: PeftModel, examples: Sequence[EncodedExample], subtasks: Sequence[str], *, batching: Batching = Batching()
) -> tuple[list[str], np.ndarray]:
    """`subtasks` and `mean` of `mean_target_directions` alone, from one pass over the examples."""
    labels, membership = _membership(subtasks)
    mean: np.ndarray = _weighted_sums(model, examples, subtasks, membership[None], batching)[0]
    return labels, mean


def _membership(subtasks: Sequence[Label]) -> tuple[list[Label], np.ndarray]:
    """Sorted labels, and the weights float32 (n, J) whose product with gradients is their mean per label."""
    labels = sorted(set(subtasks))
    members = np.array([labels.index(subtask) for subtask in subtasks])
    membership = np.eye(len(labels), dtype=np.float32)[members] / np.bincount(members)[members, None].astype(np.float32)
    return labels, membership


def _gradient_norms(
    model: PeftModel,
    examples: Sequence[EncodedExample],
    subtasks: Sequence[Label],
    batching: Batching,
    on_progress: Callable[[int], None] | None,
) -> np.ndarray:
    sink = _NormSink(len(examples))
    *_, status = backpropagate(model, examples, batching, sink, on_progress)
    _require_gradients(status, examples, subtasks)
    return sink.norms


def _weighted_sums(
    model: PeftModel,
    examples: Sequence[EncodedExample],
    subtasks: Sequence[Label],
    weights: np.ndarray,
    batching: Batching,
    on_progress: Callable[[int], None] | None = None,
    columns: tuple[int, int | None] = (0, None),
) -> np.ndarray:
    """Weights (R, n, J) times gradients, float32 (R, J, columns)."""
    sink = _MeanSink(weights, *columns)
    *_, status = backpropagate(model, examples, batching, sink, on_progress)
    _require_gradients(status, examples, subtasks)
    return sink.sums


def _require_gradients(status: np.ndarray, examples: Sequence[EncodedExample], subtasks: Sequence[Label]) -> None:
    if (status != RowStatus.OK).any():
        row = int(np.argmax(status != RowStatus.OK))
        raise TargetFormatError(
            f"A target example has no usable gradient: {RowStatus(status[row]).name}.",
            where=f"target example {examples[row].example_id} (subtask {subtasks[row]})",
            fix="Correct or remove the example.",
        )


@dataclass(frozen=True)
class ExactScores:
    """Unprojected inner products of n rows with D target directions.

    Attributes:
        dots: Per form, float32 (n, D).
        norms: Per form, exact norms of the rows' directions, float32 (n,).
        status: `RowStatus` codes, uint8 (n,); rows that are not OK hold zeros.
    """

    dots: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    status: np.ndarray

    def cosines(self, form: str) -> np.ndarray:
        """Inner products of the unit rows with the directions, float32 (n, D); NaN for rows that are not OK."""
        norms = np.where(self.status == RowStatus.OK, self.norms[form], np.nan)
        return (self.dots[form] / norms[:, None]).astype(np.float32)


def score_exactly(
    model: PeftModel,
    examples: Sequence[EncodedExample | None],
    target_directions: np.ndarray,
    *,
    forms: Sequence[str],
    moments: AdamMoments | None,
    batching: Batching = Batching(),
    on_progress: Callable[[int], None] | None = None,
) -> ExactScores:
    """Inner products with exact target directions, without projection, accumulated layer by layer.

    Args:
        model: As for `extract_features`.
        examples: n rows; None is a quarantined one.
        target_directions: float32 (D, P), e.g. `MeanDirections.rule(…)`; may be a memory map, a layer's columns are
            read at a time.
        forms: Direction forms of the rows.
        moments: Adam's state; None if the only form is `sgd`.
        batching: How rows are batched.
        on_progress: Called with the rows of each finished batch.

    Raises:
        UnsupportedModelError: As `extract_features`.
        ValueError: If the directions have another number of columns than the adapter.
    """
    if (size := sum(part.size for part in lora_slices(model))) != target_directions.shape[1]:
        raise ValueError(f"target directions have {target_directions.shape[1]} columns, the adapter {size}")
    sink = _InnerProductSink(forms, moments, target_directions, len(examples))
    *_, status = backpropagate(model, examples, batching, sink, on_progress)
    bad = status != RowStatus.OK
    dots, norms = {}, {}
    for index, form in enumerate(forms):
        sink.dots[index][bad] = 0
        sink.norms[index][bad] = 0
        dots[form], norms[form] = sink.dots[index], sink.norms[index]
    return ExactScores(dots, norms, status)


def exact_influence(
    model: PeftModel,
    examples: Sequence[EncodedExample | None],
    targets: Sequence[EncodedExample],
    subtasks: Sequence[Label],
    *,
    rule: str,
    forms: Sequence[str],
    moments: AdamMoments | None,
    target_norms: np.ndarray | None = None,
    batching: Batching = Batching(),
    directions_limit: int = 2 << 30,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[Label], dict[str, np.ndarray]]:
    """Unprojected influence at one checkpoint, with directions that need not fit into memory.

    As many layers as fit the limit are taken at a time: their mean target directions, then the rows' inner products
    with them. If all layers fit (J·P·4 bytes) that is one pass over the rows, else ceil(J·P·4 / limit) passes.

    Args:
        model: As for `extract_features`.
        examples: n rows; None is a quarantined one.
        targets: Target examples.
        subtasks: Label of each target: its subtask, or several words, such as task and subtask.
        rule: `mean_cosine` or `cosine_of_mean`.
        forms: Direction forms of the rows.
        moments: Adam's state; None if the only form is `sgd`.
        target_norms: Norms of the targets' gradients, float32 (m,), where they are known: `mean_cosine` needs them, and
            spares a pass over the targets.
        batching: How rows are batched.
        directions_limit: Bytes of target directions in memory at a time.
        on_progress: Called with the rows of each finished batch, of every pass.

    Returns:
        The J labels, sorted, and per form the influence, float32 (n, J); NaN for rows without a usable gradient.

    Raises:
        TargetFormatError: If a target's gradient is zero or not finite.
        UnsupportedModelError: As `extract_features`.
    """
    labels, weights = _membership(subtasks)
    if rule == "mean_cosine":
        if target_norms is None:
            target_norms = _gradient_norms(model, targets, subtasks, batching, on_progress)
        weights = weights / target_norms[:, None]
    dots = np.zeros((len(forms), len(examples), len(labels)))
    squares, target_squares = np.zeros((len(forms), len(examples))), np.zeros(len(labels))
    for start, stop in _layer_groups(lora_slices(model), directions_limit // (4 * len(labels))):
        (mean,) = _weighted_sums(model, targets, subtasks, weights[None], batching, on_progress, (start, stop))
        sink = _InnerProductSink(forms, moments, mean, len(examples), start)
        *_, status = backpropagate(model, examples, batching, sink, on_progress)
        dots += sink.dots
        squares += np.square(sink.norms, dtype=np.float64)
        target_squares += np.square(mean, dtype=np.float64).sum(1)
    squares[:, status != RowStatus.OK] = np.nan
    scores = dots / np.sqrt(squares)[:, :, None]
    if rule == "cosine_of_mean":
        scores /= np.sqrt(target_squares)
    return labels, {form: scores[index].astype(np.float32) for index, form in enumerate(forms)}


def _layer_groups(slices: Sequence[LoraSlice], columns: int) -> list[tuple[int, int]]:
    """Ranges of columns of at most so many (at least one layer) that end where layers end."""
    groups: list[tuple[int, int]] = []
    for part in slices:
        stop = part.offset + part.size
        if groups and stop - groups[-1][0] <= columns:
            groups[-1] = (groups[-1][0], stop)
        else:
            groups.append((part.offset, stop))
    return groups


class _ColumnSink:
    """The unprojected directions themselves: `columns` (n, P)."""

    def __init__(self, form: str, moments: AdamMoments | None, rows: int) -> None:
        self._directions, self._n = DirectionMaker((form,), moments), rows
        self.columns = np.zeros((rows, 0), dtype=np.float32)

    def start(self, rows: np.ndarray, backward: PerExampleBackward) -> None:
        self._rows = rows
        if not self.columns.size:
            self.columns = np.zeros((self._n, backward.size), dtype=np.float32)

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        (values,) = self._directions(part, gradient)
        self.columns[self._rows[rows], part.offset : part.offset + part.size] = values.cpu().numpy()

    def finish(self) -> None: ...


class _NormSink:
    """The gradients' norms: `norms` (n,)."""

    def __init__(self, rows: int) -> None:
        self.norms = np.zeros(rows, dtype=np.float32)

    def start(self, rows: np.ndarray, backward: PerExampleBackward) -> None:
        self._rows, self._squares = rows, ExactNorms(1, len(rows), backward)

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        self._squares.add(part, rows, [gradient])

    def finish(self) -> None:
        self.norms[self._rows] = self._squares.norms()[0]


class _MeanSink:
    """Weighted sums of gradients, weights (R, n, J), in columns [start, stop): `sums` (R, J, columns)."""

    def __init__(self, weights: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        self._weights, self._first, self._last = weights, start, stop
        self.sums = np.zeros((weights.shape[0], weights.shape[2], 0), dtype=np.float32)

    def start(self, rows: np.ndarray, backward: PerExampleBackward) -> None:
        self._batch = torch.from_numpy(self._weights[:, rows]).to(backward.device)
        if not self.sums.size:
            self._last = backward.size if self._last is None else self._last
            self.sums = np.zeros((*self.sums.shape[:2], self._last - self._first), dtype=np.float32)

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        assert self._last is not None
        if self._first <= part.offset < self._last:
            columns = slice(part.offset - self._first, part.offset - self._first + part.size)
            self.sums[..., columns] += (self._batch[:, rows].mT @ gradient).cpu().numpy()

    def finish(self) -> None: ...


class _InnerProductSink:
    """Inner products with target directions, `dots` (forms, n, D), and `norms` (forms, n), over some columns.

    The columns are those that `targets` (D, columns) has, beginning at column `first` of all.
    """

    def __init__(
        self, forms: Sequence[str], moments: AdamMoments | None, targets: np.ndarray, rows: int, first: int = 0
    ) -> None:
        self._directions, self._targets, self._first = DirectionMaker(forms, moments), targets, first
        self.dots = np.zeros((len(forms), rows, len(targets)), dtype=np.float32)
        self.norms = np.zeros((len(forms), rows), dtype=np.float32)

    def start(self, rows: np.ndarray, backward: PerExampleBackward) -> None:
        self._rows = rows
        self._sums = torch.zeros((len(self.dots), len(rows), self.dots.shape[2]), device=backward.device)
        self._squares = ExactNorms(len(self.dots), len(rows), backward)

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        start = part.offset - self._first
        if not 0 <= start < self._targets.shape[1]:
            return
        columns = np.ascontiguousarray(self._targets[:, start : start + part.size], dtype=np.float32)
        targets = torch.from_numpy(columns).to(gradient.device)
        directions = self._directions(part, gradient)
        self._squares.add(part, rows, directions)
        for index, values in enumerate(directions):
            self._sums[index, rows] += values @ targets.T

    def finish(self) -> None:
        self.dots[:, self._rows] = self._sums.cpu().numpy()
        self.norms[:, self._rows] = self._squares.norms()
