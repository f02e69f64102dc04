"""The loss of a LoRA training step without the work that does not change it, for adapters of a known structure.

Belongs here: LoRA layers as one autograd function each, and the loss of a batch through them. Not here: the training
loop and the plain path, which serves every other model (`training`); attention between packed rows (`packing`);
per-example gradients (`gradients.per_example`).

What is saved against PEFT's forward pass: adapter products are taken in the dtype of the layer's input, with the weight
in float32 rounded to it; nothing is copied to float32 and back; the head sees only positions that carry loss; right
padding needs no attention mask, with which attention would be slow; what follows a row's last loss token is left out;
on a processor, rows of unequal length are packed, so that no padding is computed. Random numbers are drawn in the same
order and number, so on a processor dropout drops what it drops in the plain path.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from less_assets.errors import UnsupportedModelError
from less_assets.method.data.chat import IGNORED
from less_assets.method.gradients.attention import FastAttention, keeps_weights
from less_assets.method.gradients.per_example import LoraSlice, logits_at, lora_slices
from less_assets.method.gradients.self_check import check_gradients
from less_assets.method.training.packing import PackedAttention, keeps_rows_apart, packed_inputs

if TYPE_CHECKING:
    from peft import PeftModel


PACKED_SHARE = 0.95
"""Rows are packed if at most this share of a batch is no padding; less would hardly pay for making a mask."""
PACKED_TOKENS = 4096
"""Rows with more tokens together are not packed: the mask over all pairs of them would need much memory."""


class FastLora:
    """Context in which a PEFT model's LoRA layers run as one autograd function each.

    Attributes:
        attention: The context of its forward passes; gradient checkpointing needs it for the second one.

    Args:
        model: PEFT model with one active LoRA adapter on linear layers, which has passed `check_gradients`.
        pad_token_id: Fills the padding.

    Raises:
        UnsupportedModelError: As `per_example.lora_slices`.
    """

    def __init__(self, model: PeftModel, pad_token_id: int) -> None:
        self._model = model
        self._slices = lora_slices(model)
        # The base model's own dropout draws as many numbers as a batch has columns: those of the plain path.
        config: Any = model.get_base_model().config
        settings = config.get_text_config().to_dict()
        self._cuts = not any("drop" in name and value for name, value in settings.items())
        packs = self._cuts and model.device.type == "cpu" and keeps_rows_apart(model, pad_token_id)
        self._packed = PackedAttention() if packs else None
        served = keeps_weights(next(model.parameters()))
        self.attention: AbstractContextManager[Any] = self._packed or (FastAttention() if served else nullcontext())

    def __enter__(self) -> FastLora:
        for part in self._slices:
            part.layer.forward = partial(self._forward_layer, part)
        return self

    def __exit__(self, *exc: object) -> None:
        for part in self._slices:
            del part.layer.forward

    def token_loss_sum(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum of the cross-entropy over a batch's loss tokens, float32 scalar; `training.token_loss_sum`, faster.

        Args:
            batch: `input_ids`, `labels`, each int64 (rows, length), padded on the right, on the model's device.
        """
        ids, labels = batch["input_ids"], functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        # What follows a row's last loss token predicts none.
        lengths = ((labels != IGNORED) * columns).amax(1) if self._cuts else columns[-1:].expand(len(ids))
        width = int(lengths.max())
        kept = columns <= lengths[:, None]
        self._packs = self._packed is not None and int(kept.sum()) <= min(
            PACKED_TOKENS, PACKED_SHARE * len(ids) * width
        )
        if not self._packs:
            kept[:, :width] = True
        self._whole, self._width, self._kept = ids.shape, width, kept.flatten().nonzero().squeeze(1)
        labels = labels.flatten()[self._kept]
        if self._packed is not None:
            self._packed.pack([length for length in lengths.tolist() if length] if self._packs else [])
        if self._packs:
            inputs = packed_inputs([row[:length] for row, length in zip(ids, lengths, strict=True)])
        else:
            inputs = {"input_ids": ids[:, :width]}
        positions = (labels != IGNORED).nonzero().squeeze(1)
        with self.attention:
            logits = logits_at(self._model, inputs, positions)
        return functional.cross_entropy(logits.float(), labels[positions], reduction="sum")

    def _forward_layer(self, part: LoraSlice, x: Tensor) -> Tensor:
        base: Any = part.layer.base_layer
        (dropout,) = (part.layer.lora_dropout[name] for name in part.layer.active_adapters)
        rate = getattr(dropout, "p", 0.0) if part.layer.training else 0.0
        mask = self._mask(x, 1 - rate) if rate else None
        adapter = (part.a, part.b, part.scaling / (1 - rate), mask)
        fused = type(base) is nn.Linear
        output: Tensor = (
            _Lora.apply(x, base.weight, base.bias, None, *adapter)  # type: ignore[no-untyped-call]
            if fused
            else _Lora.apply(x, None, None, base(x), *adapter)  # type: ignore[no-untyped-call]
        )
        return output

    def _mask(self, x: Tensor, share: float) -> Tensor:
        """Zeros and ones of x's shape and dtype: the numbers that PEFT's dropout draws for the whole batch, cut."""
        rows, whole = self._whole
        given = (1, len(self._kept)) if self._packs else (rows, self._width)
        if x.dim() < 3 or x.shape[:2] != given:
            return torch.empty_like(x).bernoulli_(share)
        drawn = x.new_empty(rows, whole, *x.shape[2:]).bernoulli_(share)
        return drawn.flatten(0, 1)[self._kept][None] if self._packs else drawn[:, : self._width]


def fast_lora(model: PeftModel, pad_token_id: int) -> FastLora | None:
    """The fast path for a model, or None if its structure is not known to allow it.

    Args:
        model: PEFT model, ready to be trained.
        pad_token_id: Fills the padding.

    Raises:
        LessAssetsError: If memory runs out.
    """
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return None  # small gradients would vanish, which PEFT's products in float32 keep
    try:
        check_gradients(model, pad_token_id, "right")
        return FastLora(model, pad_token_id)
    except UnsupportedModelError:
        return None


class _Lora(torch.autograd.Function):
    """y = W·x + bias + s·B·A·(mask ∘ x); W·x + bias is `base`, if that is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        dropped = (x if mask is None else x * mask).flatten(0, -2)
        hidden = dropped @ a.T
        # A new tensor, not a view: models may add to it in place (Falcon does).
        output = x.new_empty(*x.shape[:-1], len(b))
        rows = output.flatten(0, -2)
        if weight is None:
            assert base is not None
            torch.addmm(base.flatten(0, -2), hidden, b.T, alpha=scaling, out=rows)
        else:
            if bias is None:
                torch.mm(x.flatten(0, -2), weight.T, out=rows)
            else:
                torch.addmm(bias, x.flatten(0, -2), weight.T, out=rows)
            rows.addmm_(hidden, b.T, alpha=scaling)
        ctx.save_for_backward(dropped, hidden, a, b, weight, mask)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        dropped, hidden, a, b, weight, mask = ctx.saved_tensors
        rows = error.flatten(0, -2)
        hidden_error = (rows @ b).mul_(ctx.scaling)
        of_a, of_b = (hidden_error.T @ dropped).float(), (rows.T @ hidden).float().mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = rows.new_zeros(dropped.shape) if weight is None else rows @ weight
            if mask is None:
                of_x.addmm_(hidden_error, a)
            else:
                of_x.addcmul_(hidden_error @ a, mask.flatten(0, -2))
            of_x = of_x.view(*error.shape[:-1], -1)
        return of_x, None, None, None if weight is not None else error, of_a, of_b, None, None
