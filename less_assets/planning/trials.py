"""How fast this machine works with this model: short trials of training, gradients, asking and scoring on real rows.

Belongs here: the trials and their time limits. What their results are multiplied with is `workload.py`.

Every trial first does the smallest piece of work there is, and from its time chooses a piece that fits the limit; so a
trial takes little more than its limit, except where a single row does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from less_assets.method.data.batching import plan_batches
from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.gradients.features import extract_features
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.gradients.quantization import encode
from less_assets.method.gradients.sketch import Sketch
from less_assets.method.selection.coded_directions import ROWS_AT_A_TIME, CodedDirections
from less_assets.method.training.epoch_folder import MOMENTS, read_moments
from less_assets.method.training.models import LoraSettings
from less_assets.method.training.training import TrainingSettings, TrainingStep, train_adapter

if TYPE_CHECKING:
    from peft import PeftModel

Item = TypeVar("Item")
MINIMUM_STEPS = 3
SCORED_ROWS = 512


@dataclass(frozen=True)
class Speed:
    """Seconds that some units of work took, and how many rows were tried."""

    seconds: float
    units: float
    rows: int


@dataclass(frozen=True)
class TrainingTrial:
    """A short training: its speed per token, and what it has trained, for the trials after it."""

    speed: Speed
    model: PeftModel
    moments: AdamMoments


def try_training(
    model: Any,
    tokenizer: Any,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    folder: Path,
    *,
    lora: LoraSettings,
    limit_seconds: float,
) -> TrainingTrial:
    """Train a few optimizer steps; setting up and writing checkpoints are not counted.

    Args:
        model: The base model; changed in place.
        tokenizer: Its tokenizer.
        examples: Rows with loss tokens, at least two, in no particular order.
        settings: As the project trains; batches are smaller where the limit leaves no room for them.
        folder: Empty local folder to work in.
        lora: The adapter.
        limit_seconds: About how long to try.
    """
    once = dataclasses.replace(settings, epochs=1, schedule="constant")

    def train(rows: Sequence[EncodedExample], batch_size: int, name: str) -> tuple[Speed, TrainingTrial]:
        stamps: list[tuple[float, TrainingStep]] = []
        result = train_adapter(
            model,
            tokenizer,
            rows,
            dataclasses.replace(once, batch_size=batch_size),
            folder / name,
            lora=lora,
            on_progress=lambda step: stamps.append((time.perf_counter(), step)),
        )
        # The first step also sets up the optimizer and the loader: it only starts the clock.
        speed = Speed(stamps[-1][0] - stamps[0][0], sum(step.tokens for _, step in stamps[1:]), len(rows))
        return speed, TrainingTrial(speed, result.model, read_moments(result.folder / MOMENTS))

    probe, trial = train(examples[:2], 1, "probe")
    fit = _fitting(len(examples), probe.seconds, limit_seconds)
    if fit < 2 * MINIMUM_STEPS:
        return trial
    batch = min(settings.batch_size, fit // MINIMUM_STEPS)
    return train(examples[: fit - fit % batch], batch, "trial")[1]


def try_gradients(
    trained: TrainingTrial,
    examples: Sequence[EncodedExample],
    *,
    forms: Sequence[str],
    sketch: Literal["sparse", "rademacher"],
    dimension: int,
    token_budget: int,
    pad_token_id: int,
    limit_seconds: float,
    gradient_checkpointing: bool = False,
) -> Speed:
    """Take per-example gradients of at most one full batch; units are tokens.

    Args:
        trained: Model and moments.
        examples: Rows with loss tokens.
        forms: Direction forms.
        sketch: Kind of projection.
        dimension: k.
        token_budget: Padded tokens of a batch.
        pad_token_id: Fills the padding.
        limit_seconds: About how long to try.
        gradient_checkpointing: As the project asks.
    """
    projection = Sketch(sketch, dimension, 0, lora_parameters(trained.model))

    def extract(rows: Sequence[EncodedExample]) -> float:
        started = time.perf_counter()
        extract_features(
            trained.model,
            rows,
            forms=forms,
            moments=trained.moments,
            sketch=projection,
            token_budget=token_budget,
            pad_token_id=pad_token_id,
            gradient_checkpointing=gradient_checkpointing,
        )
        return time.perf_counter() - started

    extract(examples[:1])  # the signs of the sketch are made at its first use
    fit = _fitting(len(examples), extract(examples[:1]), limit_seconds)
    batch = _one_batch(examples[:fit], token_budget)
    return Speed(extract(batch), sum(len(example.input_ids) for example in batch), len(batch))


def try_asking(ask: Callable[[Sequence[Item]], object], examples: Sequence[Item], limit_seconds: float) -> Speed:
    """Evaluate some examples; units are samples.

    Args:
        ask: Evaluates the examples it is given.
        examples: At least one.
        limit_seconds: About how long to try.
    """

    def asked(rows: Sequence[Item]) -> float:
        started = time.perf_counter()
        ask(rows)
        return time.perf_counter() - started

    asked(examples[:1])  # imports the harness
    fit = _fitting(len(examples), asked(examples[:1]), limit_seconds)
    rows = _spread(examples, fit)
    return Speed(asked(rows), len(rows), len(rows))


def try_scoring(dimension: int, storage: str, directions: int) -> Speed:
    """Score random codes against random directions; units are rows at one checkpoint and form."""
    generator = np.random.default_rng(0)
    codes, scale = encode(generator.standard_normal((SCORED_ROWS, dimension), dtype=np.float32), storage)
    coded = CodedDirections(generator.standard_normal((directions, dimension), dtype=np.float32), storage)
    coded.cosines(codes[:ROWS_AT_A_TIME], scale[:ROWS_AT_A_TIME])
    started = time.perf_counter()
    for start in range(0, SCORED_ROWS, ROWS_AT_A_TIME):
        stop = start + ROWS_AT_A_TIME
        coded.cosines(codes[start:stop], scale[start:stop])
    return Speed(time.perf_counter() - started, SCORED_ROWS, SCORED_ROWS)


def _fitting(rows: int, seconds_of_one: float, limit_seconds: float) -> int:
    """How many of `rows` rows fit the limit; at least one."""
    return max(1, min(rows, int(limit_seconds / max(seconds_of_one, 1e-6))))


def _one_batch(examples: Sequence[EncodedExample], token_budget: int) -> list[EncodedExample]:
    """The examples of the largest batch that the budget allows."""
    plan = plan_batches([len(example.input_ids) for example in examples], token_budget)
    return [examples[index] for index in max(plan, key=len)]


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items from all over the sequence."""
    return [items[len(items) * number // count] for number in range(count)]
