"""Token shares: how much of a row's influence each of its loss tokens brings.

Belongs here: the decomposition, computed for a few rows at a time. Not here: the tokens' text (`chat`), which rows are
explained (the asset), gradients and forward mode themselves (`gradients`).

A row's loss is the mean over its T loss tokens, so its gradient is a sum over them: g = Σ_t g_t, g_t = ∇ℓ_t / T. Its
influence on a target direction d at a checkpoint is ⟨Γ(g), d⟩ / ‖Γ(g)‖. For `sgd` Γ(g) = g and token t's share is
⟨g_t, d⟩ / ‖g‖. For the Adam forms Γ is not linear; along the line from 0 to g, though, it is exactly
Γ(g) = ρ·g + Γ(0) elementwise with the secant slope ρ = (Γ(g) − Γ(0)) / g. Hence

    share of token t  =  ⟨ρ·g_t, d⟩ / ‖Γ(g)‖,        influence  =  Σ_t share_t  +  ⟨Γ(0), d⟩ / ‖Γ(g)‖.

The last term is momentum's: the same for every row but for the norm, zero for `marginal` and `sgd`, and no token's
merit. It is reported apart. Shares add up exactly; what they do not say is what the influence would be without a token,
because ρ and the norm belong to the whole row.

All T shares of a row cost one backward pass (for g, ρ and the norm) and one forward pass in forward mode (the
derivative of every token's loss along w = ρ·d), not T backward passes. Shares are of loss tokens, not of positions: a
prompt token shapes what follows, but nothing is learned on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from less_assets.method.data.batching import collate, plan_batches
from less_assets.method.data.chat import IGNORED, EncodedExample
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.gradients.features import Batching, DirectionMaker, up_to_last_loss
from less_assets.method.gradients.per_example import LoraSlice, PerExampleBackward
from less_assets.method.gradients.self_check import check_gradients

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHT_BYTES = 1 << 30
"""Memory for the rows' weights w: so many rows at a time, and at least one."""


@dataclass(frozen=True)
class TokenShares:
    """Shares of n rows at one checkpoint, each against its own target direction.

    Attributes:
        shares: Per row float32 (T,), its loss tokens in order; the units are those of the influence.
        momentum: Part of the influence that belongs to no token, float32 (n,).
        influence: Exact, unprojected influence, float32 (n,): `shares[i].sum() + momentum[i]` but for rounding.
    """

    shares: list[np.ndarray]
    momentum: np.ndarray
    influence: np.ndarray


def attribute_tokens(
    model: PeftModel,
    examples: Sequence[EncodedExample],
    target_directions: np.ndarray,
    direction_of: Sequence[int],
    *,
    form: str,
    moments: AdamMoments | None,
    batching: Batching | None = None,
    weight_bytes: int = WEIGHT_BYTES,
    on_progress: Callable[[int], None] | None = None,
) -> TokenShares:
    """Split each row's exact influence at a checkpoint into its loss tokens' shares.

    Args:
        model: As for `features.extract_features`.
        examples: n rows, each with at least one loss token.
        target_directions: float32 (D, P), such as `MeanDirections.rule(…)`.
        direction_of: For each row, the number of the direction it is compared with.
        form: Direction form of the rows.
        moments: Adam's state; None for `sgd`.
        batching: How rows are batched; None: the defaults of `Batching`.
        weight_bytes: Memory for the rows' weights, 4·P bytes a row.
        on_progress: Called with the rows of each finished batch.

    Raises:
        UnsupportedModelError: As `features.extract_features`.
        ValueError: If a row has no loss token, or the directions have another number of columns than the adapter.
    """
    batching = batching or Batching()
    if empty := [example.example_id for example in examples if not example.loss_tokens]:
        raise ValueError(f"rows without a loss token have no shares: {', '.join(empty[:5])}")
    trimmed = [up_to_last_loss(example) for example in examples]
    n = len(trimmed)
    shares: list[np.ndarray] = [np.zeros(0, np.float32)] * n
    momentum, influence = np.zeros(n, np.float32), np.zeros(n, np.float32)
    if trimmed:
        check_gradients(model, batching.pad_token_id, batching.padding_side)
    with PerExampleBackward(model, gradient_checkpointing=batching.gradient_checkpointing) as backward:
        if target_directions.shape[1] != backward.size:
            raise ValueError(f"directions have {target_directions.shape[1]} columns, the adapter {backward.size}")
        directions = torch.from_numpy(np.ascontiguousarray(target_directions, dtype=np.float32))
        maker = DirectionMaker((form,), moments)
        rows_at_once = max(1, weight_bytes // (4 * backward.size))
        for batch_rows in plan_batches([len(row.input_ids) - 1 for row in trimmed], batching.token_budget):
            for start in range(0, len(batch_rows), rows_at_once):
                rows = batch_rows[start : start + rows_at_once]
                batch = collate([trimmed[row] for row in rows], batching.pad_token_id, batching.padding_side)
                sink = _SecantSink(maker, directions, [direction_of[row] for row in rows])
                backward(batch, sink.add)
                derivatives = backward.token_derivatives(batch, sink.weights).numpy()
                norms = sink.squares.sqrt().cpu().numpy()
                in_loss = batch["labels"][:, 1:].numpy() != IGNORED
                for index, row in enumerate(rows):
                    of_tokens = derivatives[index][in_loss[index]]
                    shares[row] = (of_tokens / (len(of_tokens) * norms[index])).astype(np.float32)
                momentum[rows] = sink.constant.cpu().numpy() / norms
                influence[rows] = (sink.linear + sink.constant).cpu().numpy() / norms
                if on_progress:
                    on_progress(len(rows))
    return TokenShares(shares, momentum, influence)


class _SecantSink:
    """Takes the layers' gradients of a batch and keeps the rows' weights w = ρ·d, their sums, and ‖Γ‖².

    Attributes:
        weights: LoRA layer name -> w (rows, size), float32 on the model's device.
        linear: ⟨w, g⟩, float64 (rows,).
        constant: ⟨Γ(0), d⟩, float64 (rows,).
        squares: ‖Γ‖², float64 (rows,).
    """

    def __init__(self, maker: DirectionMaker, directions: Tensor, direction_of: Sequence[int]) -> None:
        self._maker, self._directions = maker, directions
        self._direction_of = torch.as_tensor(direction_of)
        self.weights: dict[str, Tensor] = {}
        self.linear, self.constant, self.squares = torch.zeros(3, len(direction_of), dtype=torch.float64)

    def add(self, part: LoraSlice, rows: slice, gradient: Tensor) -> None:
        """As `gradients.GradientSink`."""
        columns = self._directions[self._direction_of[rows], part.offset : part.offset + part.size]
        target = columns.to(gradient.device)
        ((slope, constant),) = self._maker.of(part, gradient.device).secants(gradient)
        direction = slope * gradient if constant is None else slope * gradient + constant
        self.squares[rows] += direction.double().square().sum(1).cpu()
        weight = slope.mul_(target)
        self.linear[rows] += (weight * gradient).sum(1, dtype=torch.float64).cpu()
        if constant is not None:
            self.constant[rows] += (target * constant).sum(1, dtype=torch.float64).cpu()
        if part.name not in self.weights:
            self.weights[part.name] = torch.empty(len(self._direction_of), part.size, device=gradient.device)
        self.weights[part.name][rows] = weight
