"""Rows of a batch one behind the other in one long row, so that no padding goes through the model.

Belongs here: attention that stays within each packed row, and the check that a model keeps packed rows apart. Which
batches are packed is decided in `fast_lora`.

Packed rows come with positions that begin anew. From these, transformers makes a mask in which no row sees another
(`transformers.masking_utils.find_packed_sequence_indices`). Attention over all pairs of tokens would cost more than the
padding did, so it is taken row by row, on the blocks of the mask's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from less_assets.errors import UnsupportedModelError
from less_assets.method.data.probe_rows import probe_rows
from less_assets.method.gradients.attention import FastAttention
from less_assets.method.gradients.per_example import is_out_of_memory, logits_at

if TYPE_CHECKING:
    from peft import PeftModel

FULL_PRECISION_ERROR = 1e-3
"""Relative error of packed rows' logits that float32 may have; a row that sees another one lies far above."""
HALF_PRECISION_ERROR = 0.05
_MASKED = -1e4
"""Numbers below this in a mask that is added to the scores mean that a token is not seen."""


class PackedAttention(FastAttention):
    """Context in which `scaled_dot_product_attention` over packed rows is taken row by row.

    Attributes:
        lengths: Tokens of each packed row; empty while batches are not packed.
        served: Calls over packed rows so far.

    Raises:
        UnsupportedModelError: Inside, if a model's mask does not keep packed rows apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: Sequence[int] = ()
        self.served = 0
        self._blocks: list[tuple[Tensor, list[Tensor | None]]] = []

    def pack(self, lengths: Sequence[int]) -> None:
        """State the rows of the next forward pass, and of its repetition in the backward pass; none: not packed."""
        self.lengths, self._blocks = lengths, []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention and self.lengths:
            self.served += 1
            return self._by_row(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _by_row(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if attn_mask is None or query.shape[0] != 1 or query.shape[2] != sum(self.lengths):
            raise UnsupportedModelError("The model has no mask that keeps packed rows apart.")
        rows = []
        for q, k, v, block in zip(
            *(tensor.split(list(self.lengths), dim=2) for tensor in (query, key, value)),
            self._blocks_of(attn_mask),
            strict=True,
        ):
            seen = {"is_causal": True} if block is None else {"attn_mask": block}
            given = {**seen, "dropout_p": dropout_p, **options}
            rows.append(super().__torch_function__(scaled_dot_product_attention, (), (q, k, v), given))
        return torch.cat(rows, dim=2)

    def _blocks_of(self, mask: Tensor) -> list[Tensor | None]:
        """The mask within each row; None: each token sees the row's tokens up to itself."""
        for known, blocks in self._blocks:  # layers share one mask, or two
            if known is mask:
                return blocks
        ends = list(accumulate(self.lengths, initial=0))
        spans = [slice(start, stop) for start, stop in pairwise(ends)]
        unseen = ~mask if mask.dtype == torch.bool else mask < _MASKED
        between = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device)
        for span in spans:
            between[span, span] = False
        if not unseen.masked_fill(~between, True).all():
            raise UnsupportedModelError("The model's mask does not keep packed rows apart.")
        blocks = [_unless_causal(mask[..., span, span], unseen[..., span, span]) for span in spans]
        self._blocks.append((mask, blocks))
        return blocks


def _unless_causal(block: Tensor, unseen: Tensor) -> Tensor | None:
    later = torch.ones(block.shape[-2:], dtype=torch.bool, device=block.device).triu_(1)
    plain = bool((unseen == later).all()) and (block.dtype == torch.bool or not block[~unseen].any())
    return None if plain else block


@torch.no_grad()
def keeps_rows_apart(model: PeftModel, pad_token_id: int) -> bool:
    """Whether packed rows give a model the logits that each row gives alone, tried on two short rows.

    Args:
        model: PEFT model; tried without dropout.
        pad_token_id: Not among the ids that are tried.

    Raises:
        RuntimeError: If memory runs out.
    """
    rows = [
        torch.as_tensor(row.input_ids, dtype=torch.int64, device=model.device)
        for row in probe_rows(model.get_input_embeddings().num_embeddings, pad_token_id)
    ]
    half = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters())
    attention, in_training = PackedAttention(), model.training
    model.eval()
    try:
        alone = torch.cat([_logits(model, {"input_ids": row[None]}) for row in rows])
        attention.pack([len(row) for row in rows])
        with attention:
            packed = _logits(model, packed_inputs(rows))
    except (UnsupportedModelError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    finally:
        model.train(in_training)
    errors = (packed - alone).norm(dim=1) / (alone - alone.mean(1, keepdim=True)).norm(dim=1)
    return bool(attention.served and errors.max() <= (HALF_PRECISION_ERROR if half else FULL_PRECISION_ERROR))


def packed_inputs(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a model is given for rows of ids int64 (n_i,): `input_ids` and `position_ids`, each int64 (1, Σ n_i)."""
    positions = [torch.arange(len(row), device=row.device) for row in rows]
    return {"input_ids": torch.cat(list(rows))[None], "position_ids": torch.cat(positions)[None]}


def _logits(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    every = torch.arange(inputs["input_ids"].shape[1], device=model.device)
    return logits_at(model, inputs, every).float()
