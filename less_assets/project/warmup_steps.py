"""How many optimizer steps a warm-up has, and what to do if they are too few.

Belongs here: the rule and its words, for whoever knows the number of rows: `check` counts them in the files, `plan` and
the report know them from what is stored. Not here: training.
"""

import math

from less_assets.project.sections import Warmup

FEWEST_STEPS = 20
"""Steps below which Adam's second moment, a mean over the last 1,000 at beta2 = 0.999, rests on next to nothing."""


def steps_of(warmup: Warmup, rows: int) -> int:
    """Optimizer steps of a warm-up on this many examples; the last batch of an epoch may be smaller."""
    return math.ceil(rows / warmup.batch_size) * warmup.epochs


def enough_rows(warmup: Warmup) -> int:
    """Rows of a pool from which on the warm-up has `FEWEST_STEPS`."""
    sampled = (math.ceil(FEWEST_STEPS / warmup.epochs) - 1) * warmup.batch_size + 1
    return math.ceil(sampled / warmup.fraction)


def few_steps(warmup: Warmup, steps: int, rows: int | None) -> str | None:
    """What is wrong with a warm-up that has too few steps, and what to do, in a sentence; None if they suffice.

    Args:
        warmup: The section of the project file.
        steps: Its optimizer steps.
        rows: Its examples; None if it was imported.
    """
    if steps >= FEWEST_STEPS:
        return None
    said = (
        f"the warm-up has {steps} optimizer steps, fewer than {FEWEST_STEPS}: Adam's moments mean little yet, and so "
    )
    said += "do directions taken with them"
    if rows is None:
        return f"{said}; import checkpoints of a longer training"
    batches = math.ceil(FEWEST_STEPS / warmup.epochs)
    largest = (rows - 1) // (batches - 1) if batches > 1 else rows
    lower = f"set `warmup.batch_size` to {largest} or less, or " if largest >= 1 else ""
    return f"{said}; {lower}raise `warmup.fraction` or `warmup.epochs`"
