"""Scores by a short training on a task's target examples: the adapter, the losses of the pool with it, their fall.

Belongs here: wiring only; these assets exist only if a recipe has strategy `target_tuned`. The rule is
`method/selection/target_tuning.py`, the training `method/training/training.py`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import TRAINING, Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.project.project import Project
from less_assets.reading.files import EMBEDDINGS, EXAMPLES, LOSSES, PLACES
from less_assets.steps.asset import Asset
from less_assets.steps.baselines import embedded_content, write_scores
from less_assets.steps.finetuning import describe_training, train
from less_assets.steps.gradients import encode_shard, encode_targets, total_tokens
from less_assets.steps.shown import one_table
from less_assets.store.files import storage_trouble
from less_assets.store.tables import read_parquet, write_json, write_parquet

if TYPE_CHECKING:
    from less_assets.method.training.training import TrainingResult


def train_on_targets(work: StepInputs) -> StepResult:
    """Train an adapter on a task's target examples; a killed training goes on after its last whole epoch."""
    from less_assets.method.training.models import save_adapter
    from less_assets.method.training.training import TrainingSettings

    def keep(result: "TrainingResult") -> None:
        with work.folder.local() as folder, storage_trouble(work.folder.root, "write"):
            save_adapter(result.model, folder)  # without Adam's moments, which nobody reads

    settings = TrainingSettings(**work.project.target_tuning.training_values())
    model, tokenizer = work.models.base()
    examples, _ = encode_targets(work, work.partition)
    curve, trained = train(work, model, tokenizer, examples, settings, keep)
    summary = {
        "examples": len(examples),
        "steps": curve.height,
        "tokens": int(curve["tokens"].sum()),
        "mean_loss_of_first_epoch": _mean_loss(curve, 1),
        "mean_loss_of_last_epoch": _mean_loss(curve, settings.epochs),
    }
    return StepResult(summary, units=trained)


def _mean_loss(curve: pl.DataFrame, epoch: int) -> float:
    return float(curve.filter(pl.col("epoch") == epoch)["loss"].mean())  # type: ignore[arg-type]


def measure_losses(work: StepInputs) -> StepResult:
    """Take the losses of a shard's rows with the adapter that was trained on the targets."""
    from less_assets.method.selection.baselines import embed

    shard, task = split(work.partition)
    examples = encode_shard(work, shard)
    learnable = {number: example for number, example in enumerate(examples) if example and example.loss_tokens}
    usable = list(learnable.values())
    model = work.models.tuned_on_targets(work.lineage, task)
    # As the base model's losses are taken: a fall must not come from another way of batching.
    measured = embed(model, usable, on_progress=work.progress(len(usable), "rows")).losses
    losses = np.full(len(examples), np.nan, dtype=np.float32)
    losses[list(learnable)] = measured
    ids = read_parquet(work.lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id"])
    write_parquet(work.folder, LOSSES, ids.with_columns(pl.Series("loss", losses)))
    tokens = total_tokens(usable)
    summary = {
        "rows": len(examples),
        "usable": len(usable),
        "tokens": tokens,
        "mean_loss": float(measured.mean()) if usable else None,
    }
    return StepResult(summary, units=tokens)


def score_falls(work: StepInputs) -> StepResult:
    """Score the pool by the fall of each row's loss, shard by shard."""
    from less_assets.method.selection.target_tuning import relative_falls

    lineage, task = work.lineage, work.partition
    rows = fallen = scored = 0
    for shard in lineage.shards():
        columns = ["example_id", "source", "status", "loss_tokens", "loss"]
        before = read_parquet(lineage.folder("pool_embeddings", shard), EMBEDDINGS, columns)
        after = read_parquet(lineage.folder("target_tuned_losses", f"{shard}|{task}"), LOSSES, ["loss"])
        scores = relative_falls(before["loss"].to_numpy(), after["loss"].to_numpy())
        table = before.rename({"loss": "base_loss"}).with_columns(after["loss"].alias("tuned_loss"))
        write_scores(work, shard, table, scores[:, None])
        rows, scored = rows + table.height, scored + int(np.isfinite(scores).sum())
        fallen += int((scores > 0).sum())
    write_json(work.folder, PLACES, [[task, "all"]])
    return StepResult({"rows": rows, "scored": scored, "loss_has_fallen": fallen})


def training_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the target examples, times epochs."""
    epochs = workload.project.target_tuning.epochs
    tokens = float(sum(workload.target_sizes[task][1] for task in due) * epochs)
    stored = workload.training_bytes(len(due)) / 3  # no moments are kept
    return Amount(units={"target_tuned_adapter": tokens}, tokens=tokens, loads=len(due), bytes=stored)


def loss_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the shards, once for each task."""
    shards = [split(key)[0] for key in due]
    tokens = workload.tokens(map(workload.lineage.pool_files.shard, shards))
    return Amount(units={"target_tuned_losses": tokens}, tokens=tokens, loads=len(set(shards)))


def _training_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return _shared_training_settings(lineage.project)


def _shared_training_settings(project: Project) -> Mapping[str, JsonValue]:
    return {"model": project.model_settings(), **project.target_tuning_settings()}


def _tunes(project: Project, recipe: str) -> bool:
    return project.recipe(recipe).scores == "tuning"


ASSETS = (
    Asset(
        name="target_tuned_adapter",
        group="scores",
        kinds=frozenset({"pytorch", "huggingface"}),
        description="A PEFT adapter trained on a task's target examples alone, to see which rows it helps with.",
        axes=("task",),
        inputs=(Input("base_model"), Input("target_examples")),
        folder="target_tuning/adapter/{task}",
        settings=_training_settings,
        shared_settings=_shared_training_settings,
        determined_by=embedded_content,
        needed_by=_tunes,
        of_prefilter=True,
        compute=train_on_targets,
        describe=describe_training,
        loads_model=True,
        amount=training_work,
        passes=2,
        counts_tokens=True,
        speed=Guess(("finetuned_model", "warmup_checkpoints", TRAINING)),
    ),
    Asset(
        name="target_tuned_losses",
        group="scores",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Loss of every example of a shard once the base model was trained on a task's targets.",
        axes=("shard", "task"),
        inputs=(Input("target_tuned_adapter"), Input("instruction_pool")),
        folder="target_tuning/losses/{task}/{shard}",
        shared_settings=lambda project: {"model": project.model_settings()},
        needed_by=_tunes,
        of_prefilter=True,
        compute=measure_losses,
        describe=one_table(LOSSES),
        in_ranges=True,
        loads_model=True,
        amount=loss_work,
        passes=1,
        counts_tokens=True,
        speed=Guess(("pool_embeddings", "target_embeddings", "train_gradients")),
        columns_from={"instruction_pool": {"example_id": ["example_id"]}},
    ),
    Asset(
        name="target_tuned_scores",
        group="scores",
        kinds=frozenset({"numpy", "parquet"}),
        description="By what share the loss of each pool row has fallen through a training on a task's targets.",
        axes=("task",),
        inputs=(Input("pool_index"), Input("pool_embeddings"), Input("target_tuned_losses")),
        folder="selection/{task}/target_tuned",
        needed_by=_tunes,
        of_prefilter=True,
        compute=score_falls,
        columns_from={
            "pool_embeddings": {"base_loss": ["loss"], "score": ["loss"]},
            "target_tuned_losses": {"tuned_loss": ["loss"], "score": ["loss"]},
        },
    ),
)
