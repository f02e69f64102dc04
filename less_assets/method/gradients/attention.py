"""Causal attention in bfloat16 on processors, from plain matrix products.

Belongs here: the autograd function, and the context in which models use it. Not here: attention on accelerators, in
float32, with a mask or over long rows: torch's own kernels serve there.

torch's fused kernel is made for long rows. On a processor, its many small bfloat16 products do not reach the bfloat16
instructions, and for SmolLM2-135M at 250 tokens attention takes as long as all the other products of a layer together;
batched products, which do reach them, take half of that. Scores are summed and normalised in float32, only factors of
products are rounded to bfloat16, so nothing is lost in precision (`tests/method/test_attention.py`). The weights are
kept for the backward pass, which costs memory: heads × T numbers a token and layer, where rows are short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 400
"""Tokens of a row up to which this was measured to be faster than the fused kernel, which skips half of the scores."""
_CHUNK_SCORES = 1 << 17  # scores at a time: a few temporary arrays of them stay in a processor's cache


def keeps_weights(tensor: Tensor) -> bool:
    """Whether attention over numbers like these is taken from plain products, whose weights are kept."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and _has_products()


@cache
def _has_products() -> bool:
    """Whether oneDNN has products in bfloat16 for this processor."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class FastAttention(TorchFunctionMode):
    """Context in which `scaled_dot_product_attention` takes plain products where these are faster.

    Attributes:
        calls: Calls that took them so far.
    """

    calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention and _is_served(*args, **(kwargs or {})):
            self.calls += 1
            query, key, value = args
            scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
            return _Attention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _is_served(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *other: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> bool:
    return (
        key is not None
        and value is not None
        and not other
        and attn_mask is None
        and not dropout_p
        and is_causal
        and keeps_weights(query)
        and query.dim() == 4
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[3] == value.shape[3]
        and query.shape[1] % key.shape[1] == 0
    )


@contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """Products of float32 matrices round their factors to bfloat16 and sum in float32, where the processor can."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class _Attention(torch.autograd.Function):
    """softmax(s·Q·Kᵀ + causal mask)·V; query heads that share a key head are rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length = query.shape[2]
        groups = key.shape[0] * key.shape[1]
        q, k, v = (tensor.reshape(groups, -1, tensor.shape[3]) for tensor in (query, key, value))
        out, weights = torch.empty_like(q), q.new_empty(groups, q.shape[1], length)
        mask = torch.full((length, length), float("-inf")).triu_(1)
        with _bfloat16_factors():
            for part in _parts(weights):
                products = torch.bmm(q[part].float(), k[part].float().mT).unflatten(1, (-1, length))
                weights[part] = torch.add(mask, products, alpha=scale).softmax(-1).flatten(1, 2)
                out[part] = torch.bmm(weights[part], v[part])
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        e = error.reshape(q.shape)
        of_q, of_k, of_v = (torch.empty_like(tensor) for tensor in (q, k, v))
        with _bfloat16_factors():
            for part in _parts(weights):
                of_v[part] = torch.bmm(weights[part].mT, e[part])
                products = torch.bmm(e[part].float(), v[part].float().mT)
                # dS = s·P∘(dP − Σ dP∘P), torch's backward pass of softmax.
                scores = torch._softmax_backward_data(products, weights[part].float(), -1, torch.float32)
                scores = scores.mul_(ctx.scale).to(e.dtype)
                of_q[part] = torch.bmm(scores, k[part])
                of_k[part] = torch.bmm(scores.mT, q[part])
        return *(gradient.view(shape) for gradient, shape in zip((of_q, of_k, of_v), ctx.shapes, strict=True)), None


def _parts(weights: Tensor) -> list[slice]:
    """Ranges of weights (n, heads·T, T) of few enough elements."""
    step = max(1, _CHUNK_SCORES // (weights.shape[1] * weights.shape[2]))
    return [slice(start, start + step) for start in range(0, len(weights), step)]
