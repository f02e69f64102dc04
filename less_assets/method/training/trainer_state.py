"""What `trainer_state.json` of transformers' Trainer says of a checkpoint: its step, and the epoch's rates and losses.

Belongs here: reading the file and judging the mean learning rate. It needs no torch, so that `check` can look, too.
Adapter and optimizer state are `imported_checkpoint.py`'s.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from less_assets.errors import CheckpointImportError, CorruptArtifactError

TRAINER_STATE = "trainer_state.json"
FEW_STEPS = 10
"""Logged steps below which the mean learning rate of a longer epoch may be far from what was used."""


@dataclass(frozen=True)
class TrainerState:
    """What Trainer has logged of the epoch that ends with a checkpoint (or that holds its step).

    Attributes:
        step: Optimizer steps done, else those that a name such as `checkpoint-105` says; None if neither does.
        epoch: Epochs done at `logged_step`; None if the file does not say.
        logged_step: Optimizer steps done according to the file.
        rates: Learning rates.
        losses: Losses.
    """

    step: int | None = None
    epoch: float | None = None
    logged_step: int | None = None
    rates: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()


def read_trainer_state(source: Path) -> TrainerState:
    """Read a checkpoint's `trainer_state.json`; without one, only the folder's name says something.

    Args:
        source: The checkpoint's folder.

    Raises:
        CorruptArtifactError: The file is damaged.
    """
    named = re.fullmatch(r"checkpoint-(\d+)", source.name)
    step = int(named.group(1)) if named else None
    file = source / TRAINER_STATE
    if not file.is_file():
        return TrainerState(step)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtifactError(f"The file is damaged: {error}", where=str(file)) from error
    if not isinstance(content, dict):
        return TrainerState(step)
    logged, epoch, history = (content.get(name) for name in ("global_step", "epoch", "log_history"))
    logged = logged if isinstance(logged, int) else None
    step = logged if logged is not None and logged > 0 else step
    if not isinstance(epoch, int | float) or not math.isfinite(epoch):
        return TrainerState(step, None, logged)
    rates, losses = _of_epoch(history if isinstance(history, list) else [], epoch)
    return TrainerState(step, epoch, logged, rates, losses)


def mean_learning_rate(state: TrainerState, stated: float | None, source: Path) -> float:
    """The mean rate η̄ of the epoch: as stated, else of the logged steps.

    Args:
        state: From `read_trainer_state`.
        stated: What the project file says; None: nothing.
        source: The checkpoint's folder, named in errors.

    Raises:
        CheckpointImportError: It is not known, or not a positive number: every influence would be 0.
    """
    fix = "Give it in the project file: `warmup.mean_learning_rates`, one number per imported checkpoint."
    if stated is None and not state.rates:
        what = f"The mean learning rate of the epoch is not known: no {TRAINER_STATE} with learning rates in its log."
        raise CheckpointImportError(what, where=str(source), fix=fix)
    rate = fmean(state.rates) if stated is None else stated
    if not 0 < rate < math.inf:
        logged = f", the mean of {len(state.rates)} logged steps in {TRAINER_STATE}" if stated is None else ""
        what = f"The mean learning rate of the epoch is {rate:g}{logged}; the checkpoint would have no weight."
        raise CheckpointImportError(what, where=str(source), fix=fix)
    return rate


def few_logged_steps(state: TrainerState) -> str | None:
    """What to tell a person if so few of the epoch's steps were logged that their mean rate may be far off.

    Args:
        state: From `read_trainer_state`.
    """
    if state.logged_step is None or state.epoch is None or state.epoch <= 0:
        return None
    steps = round(state.logged_step / state.epoch) if state.epoch > 1 else state.logged_step
    if len(state.rates) >= min(steps, FEW_STEPS):
        return None
    return (
        f"the mean learning rate is that of {len(state.rates)} logged steps of about {steps}; "
        "give it in warmup.mean_learning_rates if the rate changed in between"
    )


def _of_epoch(history: list[object], epoch: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Learning rates and losses that were logged in the epoch that ends here (or that holds this step)."""
    # Epochs end at 0.99 where the last batch is incomplete, or a rounding error above the whole number.
    first = math.ceil(epoch - 1e-3) - 1
    entries = [
        entry
        for entry in history
        if isinstance(entry, dict)
        and isinstance(entry.get("epoch"), int | float)
        and first + 1e-3 < entry["epoch"] <= epoch
    ]
    rates, losses = (
        tuple(
            float(entry[key])
            for entry in entries
            if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
        )
        for key in ("learning_rate", "loss")
    )
    return rates, losses
