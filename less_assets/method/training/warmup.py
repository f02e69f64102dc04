"""Warm-up: a short LoRA training whose checkpoints keep all that LESS reads from them.

Belongs here: the warm-up's checkpoints, as written, read and scheduled. The training loop itself is `training`; foreign
checkpoints come in through `checkpoints`.

A checkpoint is a folder `epoch-k/` with the adapter (PEFT's own files), `adam_moments.safetensors` (`exp_avg.<name>`,
`exp_avg_sq.<name>`; step, beta1, beta2, eps as metadata) and `state.json` (step, mean learning rate η̄ of the epoch,
losses). Xia et al. 2024, section 2 and step 1 of section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.training.epoch_folder import MOMENTS, STATE, epoch_folder, read_moments, read_state
from less_assets.method.training.files import reading
from less_assets.method.training.models import LoraSettings
from less_assets.method.training.training import TrainingSettings, TrainingStep, learning_rates, train_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """A warm-up checkpoint.

    Attributes:
        folder: Where its files are.
        epoch: Epoch that it ends, from 1.
        step: Optimizer steps done, t.
        mean_learning_rate: Mean over the epoch's steps, η̄.
        losses: Loss of each of the epoch's steps; empty if an imported checkpoint does not know them.
    """

    folder: Path
    epoch: int
    step: int
    mean_learning_rate: float
    losses: tuple[float, ...]


def warm_up(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    output_dir: Path,
    *,
    lora: LoraSettings,
    until_epoch: int | None = None,
    on_epoch_end: Callable[[int, Path], object] | None = None,
    on_progress: Callable[[TrainingStep], object] | None = None,
) -> list[Checkpoint]:
    """Train epochs 1 to `until_epoch` under the schedule of all epochs, going on from those that are there.

    Args:
        model: The base model; changed in place.
        tokenizer: Only its pad token is used.
        examples: The warm-up sample, each example with at least one loss token.
        settings: See `TrainingSettings`.
        output_dir: Local folder of this warm-up, and of no other.
        lora: The adapter to train.
        until_epoch: Default is the last epoch.
        on_epoch_end: Receives epoch and folder of every epoch that this call has trained.
        on_progress: Receives every optimizer step that this call has done.

    Returns:
        The checkpoints of epochs 1 to `until_epoch` that are in `output_dir`, in order.

    Raises:
        TrainingError, StaleArtifactError, CorruptArtifactError, ModelLoadError: See `train_adapter`.
    """
    result = train_adapter(
        model,
        tokenizer,
        examples,
        settings,
        output_dir,
        lora=lora,
        until_epoch=until_epoch,
        on_epoch_end=on_epoch_end,
        on_progress=on_progress,
    )
    last = load_checkpoint(result.folder).epoch
    folders = [epoch_folder(output_dir, epoch) for epoch in range(1, last + 1)]
    return [load_checkpoint(folder) for folder in folders if folder.is_dir()]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself; adapter and moments stay on the disk.

    Raises:
        CorruptArtifactError: `state.json` is missing or damaged.
    """
    state = read_state(folder)
    with reading(folder / STATE):
        return Checkpoint(
            folder=folder,
            epoch=int(state["epoch"]),
            step=int(state["step"]),
            mean_learning_rate=float(state["mean_learning_rate"]),
            losses=tuple(float(loss) for loss in state["losses"]),
        )


def load_moments(folder: Path) -> AdamMoments:
    """Adam's moments of a checkpoint by parameter name, float32 on the CPU.

    Raises:
        CorruptArtifactError: The file is missing or damaged.
    """
    return read_moments(folder / MOMENTS)


def mean_learning_rates(settings: TrainingSettings, rows: int) -> list[float]:
    """Mean learning rate η̄ of every epoch of a warm-up on `rows` examples, from the schedule alone."""
    return [fmean(rates) for rates in learning_rates(settings, rows)]
