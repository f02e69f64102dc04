"""Whether a loaded model's per-example gradients are exact: tried on two short rows before any are stored.

Belongs here: the comparison of the batched path with autograd, one row at a time, and its verdict. Not here: which
adapters are supported at all (`per_example`).

Some architectures look at padding (recurrent states that run over it, attention in both directions, positions counted
from the first column). Nothing in their code says so, and the gradients would be wrong without a sign. Two rows of
different length show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from less_assets.errors import UnsupportedModelError
from less_assets.method.data.batching import collate
from less_assets.method.data.probe_rows import probe_rows
from less_assets.method.gradients.per_example import LoraSlice, PerExampleBackward, is_out_of_memory, lora_slices

if TYPE_CHECKING:
    from peft import PeftModel

    from less_assets.method.data.chat import EncodedExample

FULL_PRECISION_ERROR = 1e-3
"""Relative error that float32 may have: rounding in deep models stays below, what padding does lies far above."""
HALF_PRECISION_ERROR = 0.5
"""Relative error of a row alone in 16 bits or over quantized weights, where rounding differs from kernel to kernel."""
HALF_PRECISION_PADDING = 0.05
PADDING_FACTOR = 8
"""A padded row may be this much further from autograd than the same row alone; in 16 bits 0.05 is always allowed.

SmolLM2-135M: in float32 0 alone and 8e-6 padded, in bfloat16 0.11 and 0.11.
"""

_OTHER_MODEL = "Choose another base model, or put LoRA on other layers."

_passed: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()
"""Base model -> what was checked: padding side, dtype, LoRA layers."""


def check_gradients(model: PeftModel, pad_token_id: int, padding_side: Literal["left", "right"]) -> None:
    """Refuse a model whose batched per-example gradients are not those of each row alone; once for its layers.

    Args:
        model: PEFT model with one active LoRA adapter.
        pad_token_id: Fills the padding.
        padding_side: Where the padding goes.

    Raises:
        UnsupportedModelError: Naming the architecture, if the gradients differ or autograd can't take them; and as
            `lora_slices`.
        LessAssetsError: If memory runs out.
    """
    base = model.get_base_model()
    checked = (padding_side, next(model.parameters()).dtype, *(part.name for part in lora_slices(model)))
    if checked in _passed.get(base, ()):
        return
    architecture = type(base).__name__
    try:
        errors = _relative_errors(model, pad_token_id, padding_side)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"The gradients of two short rows can't be taken: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=architecture,
            fix=_OTHER_MODEL,
        ) from error
    for alone, padded in errors:
        _judge(alone, padded, _limit(model), architecture, padding_side)
    _passed.setdefault(base, set()).add(checked)


def _relative_errors(
    model: PeftModel, pad_token_id: int, padding_side: Literal["left", "right"]
) -> list[tuple[float, float]]:
    """For each probe row the distance of its gradient from autograd's: taken alone, and taken in a padded batch."""
    rows = probe_rows(model.get_input_embeddings().num_embeddings, pad_token_id)
    with PerExampleBackward(model) as backward:
        slices = backward.slices
        padded = _batched_gradients(backward, rows, pad_token_id, padding_side)
        alone = [_batched_gradients(backward, [row], pad_token_id, padding_side) for row in rows]
    errors = []
    for index, row in enumerate(rows):
        reference = _autograd_gradients(model, slices, row)
        of_row_alone = {name: gradients[0] for name, gradients in alone[index].items()}
        of_padded_row = {name: gradients[index] for name, gradients in padded.items()}
        errors.append((_relative_error(of_row_alone, reference), _relative_error(of_padded_row, reference)))
    return errors


def _limit(model: PeftModel) -> float:
    quantized = getattr(model.get_base_model(), "is_quantized", False)
    half = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    return HALF_PRECISION_ERROR if half or quantized else FULL_PRECISION_ERROR


def _judge(alone: float, padded: float, limit: float, architecture: str, padding_side: str) -> None:
    if alone > limit:
        raise UnsupportedModelError(
            f"The gradients of a single row differ from autograd's by {alone:.1%}: exact per-example gradients are not "
            "available.",
            where=architecture,
            fix=_OTHER_MODEL,
        )
    least = FULL_PRECISION_ERROR if limit == FULL_PRECISION_ERROR else HALF_PRECISION_PADDING
    if padded > min(limit, max(least, PADDING_FACTOR * alone)):
        raise UnsupportedModelError(
            f"This architecture is not indifferent to padding on the {padding_side}: a padded row's gradient differs "
            f"by {padded:.1%} from that of the row alone.",
            where=architecture,
            fix="Pad on the right." if padding_side == "left" else "Choose another base model: a causal decoder.",
        )


def _batched_gradients(
    backward: PerExampleBackward,
    rows: Sequence[EncodedExample],
    pad_token_id: int,
    padding_side: Literal["left", "right"],
) -> dict[str, Tensor]:
    """Per LoRA layer the rows' gradients, float32 (rows, size), from the path that extraction takes."""
    gradients: dict[str, list[Tensor]] = {part.name: [] for part in backward.slices}

    def collect(part: LoraSlice, _rows: slice, gradient: Tensor) -> None:
        gradients[part.name].append(gradient.clone())

    backward(collate(rows, pad_token_id, padding_side), collect)
    return {name: torch.cat(parts) for name, parts in gradients.items()}


@torch.enable_grad()
def _autograd_gradients(model: PeftModel, slices: Sequence[LoraSlice], row: EncodedExample) -> dict[str, Tensor]:
    """Per LoRA layer one row's gradient, float32 (size,), by the model's own forward pass and autograd."""
    weights = [weight for part in slices for weight in (part.a, part.b)]
    trainable, training = [weight.requires_grad for weight in weights], model.training
    model.eval()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        batch = collate([row], 0)
        ids, targets = (batch[name].to(weights[0].device) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits.float(), targets[0, 1:])
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
    finally:
        model.train(training)
        for weight, before in zip(weights, trainable, strict=True):
            weight.requires_grad_(before)
    flat = [gradient.float().flatten() for gradient in gradients]
    return {part.name: torch.cat(flat[2 * index : 2 * index + 2]) for index, part in enumerate(slices)}


def _relative_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """‖g − r‖ / ‖r‖ over all layers; 0 if the reference itself is not finite, which row statuses report."""

    def norm(values: Callable[[str], Tensor]) -> float:
        return float(torch.stack([torch.linalg.vector_norm(values(name)) for name in reference]).double().norm())

    length = norm(lambda name: reference[name])
    difference = norm(lambda name: gradients[name] - reference[name])
    if not math.isfinite(length) or difference == 0:
        return 0.0
    return difference / length if length and math.isfinite(difference) else math.inf
