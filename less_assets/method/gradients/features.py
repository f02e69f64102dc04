"""From encoded examples to features: exact per-example gradients, their directions, and sketches of them.

Belongs here: extraction of a block of rows, the run of rows through the model batch by batch, and the token budget. Not
here: how a gradient is taken (`gradients`), what a direction or a sketch is (`directions`, `sketch`), the same without
projection (`exact`), files and resuming (the caller stores block after block).

Everything runs layer by layer while the backward pass goes on: a layer's gradients become directions, are added to
the sketches and are dropped. Memory does not depend on the number of rows or, but for the sketch, on that of
parameters; `resolve_token_budget` has the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from less_assets.errors import LessAssetsError
from less_assets.method.data.batching import collate, plan_batches
from less_assets.method.data.chat import IGNORED, EncodedExample
from less_assets.method.gradients.attention import LONGEST, keeps_weights
from less_assets.method.gradients.directions import AdamMoments, Directions
from less_assets.method.gradients.per_example import LoraSlice, PerExampleBackward, lora_slices
from less_assets.method.gradients.self_check import check_gradients
from less_assets.method.gradients.sketch import Sketch

if TYPE_CHECKING:
    from peft import PeftModel


class RowStatus(IntEnum):
    """Why a row has features, or has none."""

    OK = 0
    QUARANTINED = 1  # already bad in the pool
    NO_LOSS_TOKENS = 2
    ZERO_GRADIENT = 3
    NONFINITE_LOSS = 4
    NONFINITE_GRADIENT = 5
    TEMPLATE_REFUSES = 6  # `EncodedExample.problem` says why, here and in the next two
    TEMPLATE_DROPS_TEXT = 7
    UNSUPPORTED_FIELD = 8
    PREFILTERED = 9  # not stored: a row that the prefilter left out
    PENDING = 255


@dataclass(frozen=True)
class FeatureBlock:
    """Features of a block of n rows, in the order given. Rows whose status is not OK hold zeros.

    Attributes:
        features: Per form, the sketched directions, float32 (n, k).
        norms: Per form, the exact norms of the unprojected directions, float32 (n,).
        loss: Mean cross-entropy over the loss tokens, float32 (n,); NaN where it was not computed or not finite.
        loss_tokens: int32 (n,).
        status: `RowStatus` codes, uint8 (n,).
    """

    features: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    loss: np.ndarray
    loss_tokens: np.ndarray
    status: np.ndarray


@dataclass(frozen=True)
class Batching:
    """How rows are batched: what an extraction's time and memory depend on, and (but for rounding) not its numbers.

    Attributes:
        token_budget: Padded tokens of a batch; see `resolve_token_budget`.
        pad_token_id: Fills the padding.
        padding_side: Right padding is faster (no attention mask is needed).
        gradient_checkpointing: Recompute decoder layers in the backward pass; for long sequences.
    """

    token_budget: int = 4096
    pad_token_id: int = 0
    padding_side: Literal["left", "right"] = "right"
    gradient_checkpointing: bool = False


def extract_features(
    model: PeftModel,
    examples: Sequence[EncodedExample | None],
    *,
    forms: Sequence[str],
    moments: AdamMoments | None,
    sketch: Sketch,
    token_budget: int,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
    gradient_checkpointing: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> FeatureBlock:
    """Sketched directions of each example, in several forms, from one backward pass.

    The same arguments give the same bytes on the same kind of machine and number of threads; the caller resumes by
    leaving out blocks that it has stored.

    Args:
        model: PEFT model on its device and in the dtype to compute in; one active LoRA adapter.
        examples: One block of rows; None is a row that the pool has quarantined.
        forms: Direction forms, see `directions`.
        moments: Adam's state; None if the only form is `sgd`.
        sketch: Projection whose parameters are the model's (`lora_parameters(model)`).
        token_budget: Padded tokens of a batch.
        pad_token_id: Fills the padding.
        padding_side: Where the padding goes.
        gradient_checkpointing: Recompute decoder layers in the backward pass.
        on_progress: Called with the number of rows that each finished batch had.

    Returns:
        The block's features, norms, losses and statuses.

    Raises:
        UnsupportedModelError: If the adapter's gradients would not be exact.
        LessAssetsError: If memory runs out, or moments or sketch do not fit the model.
    """
    parameters = [pair for part in lora_slices(model) for pair in zip(part.parameters, part.shapes, strict=True)]
    if parameters != sketch.parameters:
        raise LessAssetsError(
            "The sketch was made for other parameters than the model has.",
            where=_first_difference(parameters, sketch.parameters),
            fix="Make the sketch from lora_parameters(model) of this adapter.",
        )
    batching = Batching(token_budget, pad_token_id, padding_side, gradient_checkpointing)
    sink = _FeatureSink(forms, moments, sketch, len(examples))
    loss, loss_tokens, status = backpropagate(model, examples, batching, sink, on_progress)
    bad = status != RowStatus.OK
    features, norms = {}, {}
    for index, form in enumerate(forms):
        sink.features[index][bad] = 0
        sink.norms[index][bad] = 0
        features[form], norms[form] = sink.features[index], sink.norms[index]
    return FeatureBlock(features, norms, loss, loss_tokens, status)


def resolve_token_budget(
    model: PeftModel,
    *,
    forms: Sequence[str],
    dimension: int,
    longest: int,
    gradient_checkpointing: bool = False,
    free_bytes: int | None = None,
) -> int:
    """The number of padded tokens of a batch that fits into free memory, at most where more no longer helps.

    `token_bytes` says what one token needs. Half of the free memory is planned for; the rest is room for temporary
    arrays and for other architectures.

    Args:
        model: PEFT model on its device.
        forms: Direction forms that will be extracted.
        dimension: k of the sketch.
        longest: Tokens of the longest row that can come: the budget never falls below it.
        gradient_checkpointing: Whether it will be on.
        free_bytes: Memory to plan with; None asks the device.

    Returns:
        Token budget, between `longest` and the larger of `longest` and 4,096 (CPU) or 65,536 (accelerators). Record
        it with the features: batches are a pure function of rows and budget.

    Raises:
        LessAssetsError: If the longest row alone needs more than all the free memory.
    """
    base: Any = model.get_base_model()
    weight = next(base.parameters())
    device = weight.device
    per_token = token_bytes(
        base.config.get_text_config(),
        weight.element_size(),
        sketches=len(forms) * dimension,
        kept_weights=min(longest, LONGEST) if keeps_weights(weight) else 0,
        gradient_checkpointing=gradient_checkpointing,
    )
    free = _free_memory(device) if free_bytes is None else free_bytes
    if longest * per_token > free:
        raise LessAssetsError(
            f"A row of {longest} tokens needs about {longest * per_token / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free.",
            where=f"device {device}",
            fix="Lower the maximum length, switch gradient checkpointing on, or use a larger machine.",
        )
    most = 4096 if device.type == "cpu" else 65536
    return int(max(longest, min(most, free // 2 // per_token)))


def token_bytes(
    config: Any, number: int, *, sketches: int, kept_weights: int = 0, gradient_checkpointing: bool = False
) -> int:
    """About the bytes that a padded token of a batch needs while features are taken.

    With L layers, hidden size H, feed-forward size I, vocabulary V, s bytes a number, a batch of T padded tokens holds

        T · L·s·(10·H + 4·I)      activations; T·s·(L·H + 10·H + 4·I) with gradient checkpointing
        + T · L·s·A·min(T', 400)  weights of A attention heads over rows of T' tokens, if kept (`attention`)
        + T · 20·V                logits and their gradients in float32, if every token carries loss
        + rows · F · k · 4        sketches of F forms; T/32 rows are reckoned with

    bytes. On SmolLM2-135M (float32, CPU, every token with loss) this gives 2.4 MB a token, and 1.1 MB with gradient
    checkpointing, where 1.9 and 1.0 MB were measured.

    Args:
        config: The model's text configuration.
        number: Bytes of one of its numbers, s.
        sketches: F · k.
        kept_weights: Attention weights kept for each token and head: min(T', 400), or 0.
        gradient_checkpointing: Whether it is on.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = number * (10 * hidden + 4 * feed_forward)
    if kept_weights:
        layer += number * config.num_attention_heads * kept_weights
    activations = layers * number * hidden + layer if gradient_checkpointing else layers * layer
    return int(activations + 20 * config.vocab_size + sketches * 4 // 32)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import psutil

    return int(psutil.virtual_memory().available)


def _first_difference(parameters: Sequence[object], expected: Sequence[object]) -> str:
    for index, (a, b) in enumerate(zip(parameters, expected, strict=False)):
        if a != b:
            return f"parameter {index}: model has {a}, sketch has {b}"
    return f"model has {len(parameters)} parameters, sketch has {len(expected)}"


def up_to_last_loss(example: EncodedExample) -> EncodedExample:
    """The example up to its last loss token: what follows has no influence on loss or gradient."""
    labels = np.array(example.labels)
    labels[0] = IGNORED  # nothing comes before it to predict it from, but left padding would
    length = int(np.flatnonzero(labels != IGNORED)[-1]) + 1
    return replace(example, input_ids=example.input_ids[:length], labels=labels[:length])


def batched_tokens(examples: Sequence[EncodedExample | None]) -> list[int]:
    """Tokens that each row brings into a batch, for the rows that gradients are taken of."""
    usable = (example for example in examples if example is not None and example.status == "ok")
    return [_batched_tokens(up_to_last_loss(example)) for example in usable if example.loss_tokens]


def _batched_tokens(trimmed: EncodedExample) -> int:
    return len(trimmed.input_ids) - 1  # the last one is only predicted


class Sink(Protocol):
    """What becomes of the gradients."""

    def start(self, rows: np.ndarray, backward: PerExampleBackward) -> None:
        """Begin a batch of rows, given by their places in the block."""

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        """Take a layer's gradients (n, size) of some rows of the batch."""

    def finish(self) -> None:
        """End the batch."""


def backpropagate(
    model: PeftModel,
    examples: Sequence[EncodedExample | None],
    batching: Batching,
    sink: Sink,
    on_progress: Callable[[int], None] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run all rows through a sink, batch by batch.

    Args:
        model: As for `extract_features`.
        examples: n rows; None is a quarantined one.
        batching: How rows are batched.
        sink: Receives the gradients.
        on_progress: Called with the rows of each finished batch.

    Returns:
        Loss float32 (n,), loss tokens int32 (n,) and `RowStatus` uint8 (n,).

    Raises:
        UnsupportedModelError: As `extract_features`.
        LessAssetsError: If memory runs out.
    """
    loss = np.full(len(examples), np.nan, dtype=np.float32)
    loss_tokens = np.zeros(len(examples), dtype=np.int32)
    status = np.full(len(examples), RowStatus.PENDING, dtype=np.uint8)
    trimmed: list[EncodedExample] = []
    usable = []
    for row, example in enumerate(examples):
        if example is None:
            status[row] = RowStatus.QUARANTINED
            continue
        if example.status != "ok":
            status[row] = RowStatus[example.status.partition(":")[0].upper()]
            continue
        # The first token has no prediction before it, so a loss on it cannot be taken.
        loss_tokens[row] = np.count_nonzero(np.asarray(example.labels)[1:] != IGNORED)
        if loss_tokens[row] == 0:
            status[row] = RowStatus.NO_LOSS_TOKENS
            continue
        usable.append(row)
        trimmed.append(up_to_last_loss(example))

    if trimmed:
        check_gradients(model, batching.pad_token_id, batching.padding_side)
    with PerExampleBackward(model, gradient_checkpointing=batching.gradient_checkpointing) as backward:
        plan = plan_batches(list(map(_batched_tokens, trimmed)), batching.token_budget)
        for members in plan:
            rows = np.array([usable[member] for member in members])
            batch = collate([trimmed[member] for member in members], batching.pad_token_id, batching.padding_side)
            squares = ExactNorms(1, len(rows), backward)

            def add(part: LoraSlice, within: slice, gradient: Tensor, squares: ExactNorms = squares) -> None:
                squares.add(part, within, [gradient])
                sink.add(part, within, gradient)

            sink.start(rows, backward)
            loss[rows] = backward(batch, add).numpy()
            sink.finish()
            norms = squares.norms()[0]
            status[rows] = np.select(
                [~np.isfinite(loss[rows]), ~np.isfinite(norms), norms == 0],
                [RowStatus.NONFINITE_LOSS, RowStatus.NONFINITE_GRADIENT, RowStatus.ZERO_GRADIENT],
                RowStatus.OK,
            )
            if on_progress:
                on_progress(len(rows))
    return loss, loss_tokens, status


class ExactNorms:
    """Exact norms of a batch's directions: float32 per layer, summed over layers in float64.

    Args:
        forms: Direction forms.
        rows: Rows of the batch.
        backward: What takes their gradients.
    """

    def __init__(self, forms: int, rows: int, backward: PerExampleBackward) -> None:
        self._place = {part.name: index for index, part in enumerate(backward.slices)}
        self._norms = torch.zeros((len(backward.slices), forms, rows), device=backward.device)

    def add(self, part: LoraSlice, rows: slice, directions: list[Tensor]) -> None:
        """Take a layer's directions of some rows, one tensor (n, size) for each form."""
        for index, values in enumerate(directions):
            self._norms[self._place[part.name], index, rows] = torch.linalg.vector_norm(values, dim=1)

    def norms(self) -> np.ndarray:
        """float32 (forms, rows)."""
        return self._norms.cpu().double().square().sum(0).sqrt().float().numpy()


class DirectionMaker:
    """The directions of every LoRA layer, with Adam's constant terms precomputed per layer.

    Args:
        forms: Direction forms.
        moments: Adam's state; None if the only form is `sgd`.
    """

    def __init__(self, forms: Sequence[str], moments: AdamMoments | None) -> None:
        self.forms = tuple(forms)
        self._moments = moments
        self._prepared: dict[str, Directions] = {}

    def __call__(self, part: LoraSlice, gradient: Tensor) -> list[Tensor]:
        """Directions (n, size) of a layer's gradients, one per form; see `Directions`."""
        return self.of(part, gradient.device)(gradient)

    def of(self, part: LoraSlice, device: torch.device) -> Directions:
        """The layer's directions, prepared at first use."""
        if part.name not in self._prepared:
            self._prepared[part.name] = self._prepare(part, device)
        return self._prepared[part.name]

    def _prepare(self, part: LoraSlice, device: torch.device) -> Directions:
        moments = self._moments
        if moments is None:
            return Directions(self.forms)

        def flat(tensors: dict[str, Tensor]) -> Tensor:
            for name, shape in zip(part.parameters, part.shapes, strict=True):
                if name not in tensors or tuple(tensors[name].shape) != shape:
                    have = f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
                    raise LessAssetsError(
                        f"Adam's moments do not fit the adapter: {have} instead of {shape}.",
                        where=name,
                        fix="Use the optimizer state that was saved with this adapter.",
                    )
            return torch.cat([tensors[name].flatten() for name in part.parameters]).to(device, torch.float32)

        return Directions(
            self.forms,
            flat(moments.exp_avg),
            flat(moments.exp_avg_sq),
            step=moments.step,
            beta1=moments.beta1,
            beta2=moments.beta2,
            eps=moments.eps,
        )


class _FeatureSink:
    """Sketches and exact norms of the directions: `features` (forms, n, k) and `norms` (forms, n)."""

    def __init__(self, forms: Sequence[str], moments: AdamMoments | None, sketch: Sketch, rows: int) -> None:
        self._directions, self._sketch = DirectionMaker(forms, moments), sketch
        self.features = np.zeros((len(forms), rows, sketch.dimension), dtype=np.float32)
        self.norms = np.zeros((len(forms), rows), dtype=np.float32)

    def start(self, rows: np.ndarray, backward: PerExampleBackward) -> None:
        shape = (len(self.features), len(rows), self._sketch.dimension)
        self._rows, self._accumulator = rows, torch.zeros(shape, device=backward.device)
        self._squares = ExactNorms(len(self.features), len(rows), backward)

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        directions = self._directions(part, gradient)
        self._squares.add(part, rows, directions)
        for index, values in enumerate(directions):
            self._sketch.add(self._accumulator[index, rows], part.offset, values)

    def finish(self) -> None:
        self.features[:, self._rows] = self._accumulator.cpu().numpy()
        self.norms[:, self._rows] = self._squares.norms()
