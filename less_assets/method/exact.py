"""Exact influence: the same cosines as from sketches, from unprojected gradients that are taken again.

Belongs here: exact scores of chosen rows at one checkpoint, within bounded memory. How gradients are taken is
`features.py`; which rows are worth it, and what their scores decide, is the caller's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from less_assets.method.features import mean_target_directions, score_exactly
from less_assets.method.gradients import lora_parameters

if TYPE_CHECKING:
    from peft import PeftModel

    from less_assets.method.chat import EncodedExample
    from less_assets.method.directions import AdamMoments
    from less_assets.method.features import Batching

DIRECTIONS_LIMIT = 2 * 10**9


def subtasks_at_once(parameters: int, directions_limit: int = DIRECTIONS_LIMIT) -> int:
    """How many subtasks' exact directions are held together: two float32 vectors of P elements each, at least one."""
    return max(1, directions_limit // (2 * 4 * parameters))


def exact_influence(
    model: PeftModel,
    examples: Sequence[EncodedExample | None],
    targets: Sequence[EncodedExample],
    subtasks: Sequence[str],
    *,
    form: str,
    rule: str,
    moments: AdamMoments | None,
    batching: Batching,
    directions_limit: int = DIRECTIONS_LIMIT,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[str], np.ndarray]:
    """Influence of rows on each subtask at one checkpoint, without any projection.

    The directions of as many subtasks as fit into `directions_limit` are held at once; the rows' gradients are taken
    again for every such group.

    Args:
        model: PEFT model of the checkpoint.
        examples: n rows; None is a quarantined one.
        targets: m target examples.
        subtasks: Label of each target.
        form: Direction form of the rows.
        rule: `mean_cosine` or `cosine_of_mean`, as in `influence.target_directions`.
        moments: Adam's state; None for form `sgd`.
        batching: How rows are batched.
        directions_limit: Bytes for exact directions.
        on_progress: Called with rows done; in all n rows and 2·m targets for each group of subtasks.

    Returns:
        labels: The J subtasks, sorted.
        scores: float32 (n, J); NaN for rows without a usable gradient.
    """
    labels = sorted(set(subtasks))
    parameters = sum(int(np.prod(shape)) for _, shape in lora_parameters(model))
    size = subtasks_at_once(parameters, directions_limit)
    parts = []
    for first in range(0, len(labels), size):
        group = set(labels[first : first + size])
        places = [place for place, subtask in enumerate(subtasks) if subtask in group]
        directions = mean_target_directions(
            model,
            [targets[place] for place in places],
            [subtasks[place] for place in places],
            batching=batching,
            on_progress=on_progress,
        )
        scores = score_exactly(
            model,
            examples,
            directions.rule(rule),
            forms=(form,),
            moments=moments,
            batching=batching,
            on_progress=on_progress,
        )
        parts.append(scores.cosines(form))
    return labels, np.concatenate(parts, axis=1)
