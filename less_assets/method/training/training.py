"""LoRA training on transformers' Trainer that can be killed at any moment and ends with the same bytes.

Belongs here: the training loop, and going on from an epoch. Warm-up and fine-tuning share it. Not here: what an epoch
leaves on the disk (`epoch_folder`), models (`models`), what LESS reads from a checkpoint (`warmup`), text (`chat`).

Every epoch is one run of Trainer, whose starting point is exactly what the folder of the epoch before holds: adapter,
Adam's moments by parameter name, step. All else is a function of (seed, epoch): the order of the examples, the dropout.
So a resumed training cannot differ from an undisturbed one, there is no random state to keep, and nothing is pickled.

The loss of an optimizer step is the mean over all loss tokens of its batch, as in Trainer, however the batch is cut
into micro-batches: a long answer weighs more than a short one. (An example's own loss in `features` is the mean over
*its* tokens.) The adapter is trained in float32, the base model computes in its own dtype, without autocast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from less_assets.errors import StaleArtifactError, TrainingError
from less_assets.method.data.batching import collate, plan_batches
from less_assets.method.data.chat import IGNORED, EncodedExample
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.training.epoch_folder import (
    MOMENTS,
    epoch_folder,
    finished_epochs,
    read_moments,
    verified_state,
    write_epoch,
)
from less_assets.method.training.fast_lora import fast_lora
from less_assets.method.training.models import LoraSettings, attach_adapter, load_adapter

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class TrainingSettings:
    """Everything but the adapter's shape that decides what is learned.

    Attributes:
        epochs: Passes over the examples; the schedule spans them all.
        learning_rate: Highest learning rate.
        schedule: How it falls after the warm-up: linearly or as half a cosine to zero, or not at all.
        warmup_ratio: Share of the steps, rounded up, in which it rises linearly from zero.
        batch_size: Examples of an optimizer step; the last one of an epoch may have fewer.
        max_grad_norm: The gradient is scaled down to this norm; 0 leaves it alone.
        weight_decay: AdamW's, on all adapter weights.
        beta1: Decay of Adam's first moment.
        beta2: Decay of Adam's second moment.
        eps: Adam's ε.
        seed: Of adapter, order and dropout.
        micro_batch_tokens: Padded tokens that go through the model at once; bounds memory. Dropout and the order of
            summation depend on it, so it belongs to what decides the bytes.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
    """

    epochs: int = 4
    learning_rate: float = 2e-5
    schedule: Schedule = "linear"
    warmup_ratio: float = 0.03
    batch_size: int = 128
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    seed: int = 0
    micro_batch_tokens: int = 2048
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step: a point of the training curve.

    Attributes:
        step: Steps done, this one included.
        epoch: Epoch it belongs to, from 1.
        loss: Mean over the loss tokens of the batch, before the step.
        learning_rate: Of this step.
        gradient_norm: Before clipping.
        rows: Examples in the batch.
        tokens: Tokens in the batch, without padding.
        loss_tokens: Tokens with loss in the batch.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    rows: int
    tokens: int
    loss_tokens: int


@dataclass(frozen=True)
class TrainingResult:
    """A trained adapter.

    Attributes:
        model: The PEFT model in eval mode.
        folder: The last epoch's folder: adapter, Adam's moments, state.
        curve: All steps so far, those of earlier runs included.
        resumed_epochs: Epochs that an earlier run had finished.
    """

    model: PeftModel
    folder: Path
    curve: list[TrainingStep]
    resumed_epochs: int


def train_adapter(
    model: transformers.PreTrainedModel | PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    output_dir: Path,
    *,
    lora: LoraSettings,
    until_epoch: int | None = None,
    keep: Literal["all", "latest"] = "all",
    on_epoch_end: Callable[[int, Path], object] | None = None,
    on_progress: Callable[[TrainingStep], object] | None = None,
) -> TrainingResult:
    """Train a new LoRA adapter, or go on with the training in `output_dir` after its last whole epoch.

    Every epoch leaves `epoch-k/` in `output_dir`, whole or not at all: `adapter_model.safetensors`,
    `adapter_config.json`, `adam_moments.safetensors` and `state.json`. Byte identity of a resumed and an undisturbed
    training is claimed for the same machine, thread count and library versions.

    Args:
        model: The base model, or a PEFT model, whose adapter is taken off first; changed in place.
        tokenizer: Only its pad token is used.
        examples: What to learn; each must have at least one loss token. Kept in memory.
        settings: See `TrainingSettings`.
        output_dir: Local folder of this training, and of no other.
        lora: The adapter to train.
        until_epoch: Stop after this epoch, under the schedule of all `settings.epochs`; default is the last one.
        keep: "all" keeps every epoch's folder, "latest" only the one needed to go on.
        on_epoch_end: Receives epoch (from 1) and folder of every epoch that this call has finished.
        on_progress: Receives every optimizer step that this call has done.

    Raises:
        TrainingError: There is nothing to learn, an example has no loss token, the loss or a weight is not finite, or
            memory does not suffice.
        StaleArtifactError: `output_dir` holds epochs of a training with other examples, settings or base model.
        CorruptArtifactError: The epoch to go on from is damaged.
        ModelLoadError: The model has no layers of that name.
    """
    until = settings.epochs if until_epoch is None else until_epoch
    if not 1 <= until <= settings.epochs:
        raise ValueError(f"until_epoch must be between 1 and {settings.epochs}, not {until}")
    _check_examples(examples)
    fingerprint = _fingerprint(model, examples, settings, lora)
    done = min(finished_epochs(output_dir), until)
    if done:
        state = verified_state(epoch_folder(output_dir, done))
        if state.get("training") != fingerprint:
            raise StaleArtifactError(
                "The folder holds the epochs of a training with other examples, settings or base model.",
                where=str(epoch_folder(output_dir, done)),
                fix="Give this training a folder of its own, or remove that one.",
            )
        adapted = load_adapter(model, epoch_folder(output_dir, done), trainable=True)
        curve = [TrainingStep(**step) for step in state["curve"]]
    else:
        adapted = attach_adapter(model, lora, settings.seed)
        curve = []
    optimizer = _adamw(adapted, settings)
    if done:
        restore_moments(optimizer, adapted, read_moments(epoch_folder(output_dir, done) / MOMENTS))

    for epoch in range(done + 1, until + 1):
        steps = _train_epoch(adapted, optimizer, tokenizer, examples, settings, epoch, output_dir, on_progress)
        curve += steps
        _check_weights(adapted, epoch)
        folder = epoch_folder(output_dir, epoch)
        state = {
            "epoch": epoch,
            "step": curve[-1].step,
            "mean_learning_rate": fmean(step.learning_rate for step in steps),
            "losses": [step.loss for step in steps],
            "curve": [dataclasses.asdict(step) for step in curve],
            "training": fingerprint,
        }
        write_epoch(folder, adapted, adam_moments(optimizer, adapted), state)
        if keep == "latest" and epoch > 1:
            shutil.rmtree(epoch_folder(output_dir, epoch - 1), ignore_errors=True)
        if on_epoch_end is not None:
            on_epoch_end(epoch, folder)
    return TrainingResult(adapted.eval(), epoch_folder(output_dir, until), curve, done)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of an epoch over `rows` examples; an incomplete last batch is a step of its own."""
    return math.ceil(rows / batch_size)


def learning_rate_factor(settings: TrainingSettings, total_steps: int, step: int) -> float:
    """Learning rate of a step as a share of the highest one, as transformers' schedules of these names have it.

    Args:
        settings: Schedule and warm-up.
        total_steps: Steps of the whole training.
        step: Steps done before this one.
    """
    warmup_steps = math.ceil(total_steps * settings.warmup_ratio)
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match settings.schedule:
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        case "constant":
            return 1.0


def learning_rates(settings: TrainingSettings, rows: int) -> list[list[float]]:
    """Learning rate of every step, by epoch, of a training on `rows` examples; nothing is trained."""
    per_epoch = steps_per_epoch(rows, settings.batch_size)
    total = per_epoch * settings.epochs
    return [
        [
            settings.learning_rate * learning_rate_factor(settings, total, step)
            for step in range(first, first + per_epoch)
        ]
        for first in range(0, total, per_epoch)
    ]


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the examples in an epoch, int64 (rows,): a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def trainable_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's weights by name, in the order of `named_parameters()`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adam_moments(optimizer: torch.optim.Optimizer, model: PeftModel) -> AdamMoments:
    """Adam's state by parameter name, as float32 tensors on the CPU."""
    states = {name: optimizer.state[parameter] for name, parameter in trainable_parameters(model).items()}
    group = optimizer.param_groups[0]
    return AdamMoments(
        exp_avg={name: state["exp_avg"].detach().float().cpu() for name, state in states.items()},
        exp_avg_sq={name: state["exp_avg_sq"].detach().float().cpu() for name, state in states.items()},
        step=int(next(iter(states.values()))["step"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
    )


def restore_moments(optimizer: torch.optim.Optimizer, model: PeftModel, moments: AdamMoments) -> None:
    """Give an optimizer over the adapter's weights the state that `adam_moments` has read from another one."""
    for name, parameter in trainable_parameters(model).items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(moments.step)),
            "exp_avg": moments.exp_avg[name].to(parameter.device, copy=True),
            "exp_avg_sq": moments.exp_avg_sq[name].to(parameter.device, copy=True),
        }


class _EpochTrainer(Trainer):
    """Trainer for one epoch over examples in a given order, with micro-batches of similar length."""

    def __init__(
        self,
        settings: TrainingSettings,
        pad_token_id: int,
        token_loss_sum: Callable[[Mapping[str, Tensor]], Tensor],
        report: Callable[..., None],
        **options: Any,
    ):
        super().__init__(data_collator=lambda rows: {"rows": rows}, **options)
        self.settings, self.pad_token_id, self.report = settings, pad_token_id, report
        self.token_loss_sum = token_loss_sum
        self.rows: list[EncodedExample] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, self.train_dataset))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Gradient of the mean loss over all loss tokens of a batch; returns that loss."""
        self.rows = inputs["rows"]
        loss_tokens = sum(row.loss_tokens for row in self.rows)
        lengths = [len(row.input_ids) for row in self.rows]
        model.train()
        total = torch.zeros((), device=self.args.device)
        for indices in plan_batches(lengths, self.settings.micro_batch_tokens):
            batch = collate([self.rows[index] for index in indices], self.pad_token_id)
            loss = self.token_loss_sum({name: tensor.to(self.args.device) for name, tensor in batch.items()})
            loss = loss / loss_tokens
            self.accelerator.backward(loss)
            total += loss.detach()
        if not torch.isfinite(total):
            raise TrainingError(
                f"The loss has become {total.item()}.",
                where=", ".join(row.example_id for row in self.rows[:8]),
                fix="Lower the learning rate, or use dtype float32. Finished epochs are kept.",
            )
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer would look for input ids that are made in `training_step`."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report a step instead of printing it."""
        if "loss" in logs:
            self.report(logs, self.rows)


def token_loss_sum(model: transformers.PreTrainedModel | PeftModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of the cross-entropy over a batch's loss tokens, float32 scalar; `fast_lora` has a faster way to it.

    Only the columns in which some row has loss go through the language-model head, whose logits are the largest tensor
    of a small model's training.

    Args:
        model: A causal language model.
        batch: `input_ids`, `attention_mask`, `labels`, each int64 (rows, length), on the model's device.
    """
    labels = batch["labels"][:, 1:]
    columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _train_epoch(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    epoch: int,
    output_dir: Path,
    on_progress: Callable[[TrainingStep], object] | None,
) -> list[TrainingStep]:
    """Train one epoch (from 1) and return its steps."""
    per_epoch = steps_per_epoch(len(examples), settings.batch_size)
    steps_before = (epoch - 1) * per_epoch
    total_steps = per_epoch * settings.epochs
    schedule = LambdaLR(
        optimizer, lambda step: learning_rate_factor(settings, total_steps, step), last_epoch=steps_before - 1
    )
    steps: list[TrainingStep] = []

    def report(logs: dict[str, float], rows: Sequence[EncodedExample]) -> None:
        step = TrainingStep(
            step=steps_before + len(steps) + 1,
            epoch=epoch,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            gradient_norm=float(logs["grad_norm"]),
            rows=len(rows),
            tokens=sum(len(row.input_ids) for row in rows),
            loss_tokens=sum(row.loss_tokens for row in rows),
        )
        steps.append(step)
        if on_progress is not None:
            on_progress(step)

    fast = fast_lora(model, tokenizer.pad_token_id)
    verbosity = transformers.logging.get_verbosity()
    trainer = _EpochTrainer(
        settings,
        tokenizer.pad_token_id,
        partial(token_loss_sum, model) if fast is None else fast.token_loss_sum,
        report,
        model=model,
        args=_arguments(model, settings, epoch, output_dir),
        train_dataset=[examples[index] for index in epoch_order(len(examples), settings.seed, epoch)],
        optimizers=(optimizer, schedule),
    )
    if settings.gradient_checkpointing:
        recomputed = nullcontext() if fast is None else fast.attention
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": lambda: (nullcontext(), recomputed),  # the second forward pass is like the first
            }
        )
    try:
        with fast or nullcontext():
            trainer.train()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "The accelerator's memory does not suffice for training.",
            where=f"epoch {epoch}, after step {steps_before + len(steps)}",
            fix=f"Lower micro_batch_tokens (now {settings.micro_batch_tokens}) or switch on gradient_checkpointing.",
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
    return steps


def _arguments(model: PeftModel, settings: TrainingSettings, epoch: int, output_dir: Path) -> TrainingArguments:
    on_cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        max_grad_norm=settings.max_grad_norm,
        # Trainer seeds every generator with this: dropout is a function of (seed, epoch).
        seed=int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0]),
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
    )
    if arguments.n_gpu > 1:  # one process, one GPU: Trainer would spread the batch over all it can see
        arguments._n_gpu = 1
    return arguments


def _adamw(model: PeftModel, settings: TrainingSettings) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        list(trainable_parameters(model).values()),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    optimizer.param_groups[0]["initial_lr"] = settings.learning_rate  # what a schedule starts from in mid-training
    return optimizer


def _check_examples(examples: Sequence[EncodedExample]) -> None:
    if not examples:
        raise TrainingError("There is no example to train on.", fix="Check the pool's quarantine and the budget.")
    silent = [example.example_id for example in examples if not example.loss_tokens]
    if silent:
        raise TrainingError(
            f"{len(silent)} examples have no token with loss.",
            where=", ".join(silent[:8]),
            fix="Leave them out, or raise max_length so that their answers are not cut off.",
        )


def _check_weights(model: PeftModel, epoch: int) -> None:
    for name, parameter in trainable_parameters(model).items():
        if not torch.isfinite(parameter).all():
            raise TrainingError(
                f"Weights are not finite after epoch {epoch}.", where=name, fix="Lower the learning rate."
            )


def _fingerprint(
    model: transformers.PreTrainedModel | PeftModel,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    lora: LoraSettings,
) -> dict[str, Any]:
    """What decides the bytes of a training, readable, with the examples as a digest."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(f"{example.example_id} {len(example.input_ids)}\n".encode())
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.labels.astype("<i4").tobytes())
    described = {
        "base": model.name_or_path if not isinstance(model, PeftModel) else model.get_base_model().name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "examples": digest.hexdigest(),
        "settings": dataclasses.asdict(settings),
        "lora": dataclasses.asdict(lora),
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(described))
    return as_stored
