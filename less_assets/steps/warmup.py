"""Step 1: the warm-up sample, drawn once, and the checkpoints that gradients are taken at.

Belongs here: wiring only. Training is `method/training/warmup.py`, foreign checkpoints
`method/training/imported_checkpoint.py`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import TRAINING, Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import CorruptArtifactError, MissingArtifactError, TrainingError
from less_assets.lineage.file_digests import files_digest
from less_assets.lineage.lineage import Input, Keys, Lineage
from less_assets.lineage.plan import Versions, digest
from less_assets.lineage.warmup_draw import sample_draw
from less_assets.project.project import Project
from less_assets.reading.excluded import mark_excluded
from less_assets.reading.files import SAMPLE
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import conversations_of, refused_rows
from less_assets.steps.asset import Asset
from less_assets.steps.pool import INDEX_ROW_SECONDS
from less_assets.steps.shown import Picture, Shown, Stored, one_table
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.files import storage_trouble, working_folder
from less_assets.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from less_assets.method.data.chat import EncodedExample
    from less_assets.method.training.models import LoraSettings
    from less_assets.method.training.training import TrainingStep


def draw_warmup_sample(work: StepInputs) -> StepResult:
    """Draw the sample by a keyed hash of the ids, independent of the pool's order."""
    from less_assets.method.selection.selection import Budget, select_at_random

    settings = work.project.sample_settings()
    if not settings:  # imported checkpoints were trained on data of their own
        write_parquet(work.folder, SAMPLE, pl.DataFrame(schema={"example_id": pl.String, "shard": pl.String}))
        return StepResult({"rows": 0}, data_version=digest([]))
    index = PoolIndex(work.lineage)
    draw: Any = work.lineage.plan("warmup_sample").settings["draw"]
    seed = settings["seed"] + 1_000_003 * draw
    sample = select_at_random(
        lambda: (mark_excluded(work.lineage, rows) for rows in index.tables()),
        Budget("fraction", settings["fraction"]),
        seed,
    ).table
    write_parquet(work.folder, SAMPLE, sample.select("example_id", "shard"))
    sources = dict(sorted(sample["source"].value_counts().iter_rows()))
    return StepResult({"rows": sample.height, "sources": sources}, data_version=digest(sample["example_id"].to_list()))


def check_sample(lineage: Lineage) -> None:
    """Refuse to put a frozen sample in force again if a row of it has vanished from the pool.

    Raises:
        MissingArtifactError: A row of the sample is not in the pool any more.
    """
    plan = lineage.plan("warmup_sample")
    frozen = lineage.store.artifact(plan.folder, plan.fingerprint)
    try:
        sample = read_parquet(frozen, SAMPLE)["example_id"]
    except (MissingArtifactError, CorruptArtifactError):
        return  # it is going to be drawn from the pool as it is
    index = PoolIndex(lineage).of_ids(sample, ["example_id"])["example_id"]
    # A row that the tokenizer or a smaller max_length refuses now is still there: training leaves it out.
    there = pl.concat([index, refused_rows(lineage)["example_id"]])
    gone = sample.filter(~sample.is_in(there.implode()))
    if len(gone):
        raise MissingArtifactError(
            f"{len(gone)} of {len(sample)} warm-up examples are not in the pool any more, the first is {gone[0]}",
            fix="put the rows back, or draw and train again with `less-assets run --resample-warmup`",
        )


def make_checkpoint(work: StepInputs) -> StepResult:
    """Train (or go on training) up to the partition's epoch, or import the checkpoint that stands in its place."""
    if work.project.warmup.imported:
        return adopt_checkpoint(work)
    return train_checkpoint(work)


def train_checkpoint(work: StepInputs) -> StepResult:
    """Train epochs 1 to k under the schedule of all epochs; finished epochs are taken from earlier runs."""
    from less_assets.method.training.training import TrainingSettings, steps_per_epoch
    from less_assets.method.training.warmup import mean_learning_rates, warm_up

    lineage, epoch = work.lineage, work.project.checkpoints.index(work.partition) + 1
    settings = TrainingSettings(**work.project.warmup.training_values())
    examples = warmup_examples(work)
    if examples and not any(mean_learning_rates(settings, len(examples))):
        raise TrainingError(
            f"All steps of the warm-up have the learning rate 0: {len(examples)} examples are too few for it.",
            where="warmup",
            fix="Lower warmup.batch_size, or raise warmup.fraction or warmup.epochs.",
        )
    model, tokenizer = work.models.base()
    folder = work.models.scratch(training_fingerprint(lineage))
    restore_epochs(lineage, folder, epoch - 1)
    steps = steps_per_epoch(len(examples), settings.batch_size)
    progress = work.progress(steps * epoch, "steps", done=steps * _finished(folder, epoch))
    trained: list[int] = []

    def follow(step: TrainingStep) -> None:
        progress(1, step.tokens)
        trained.append(step.tokens)

    checkpoint = warm_up(
        model,
        tokenizer,
        examples,
        settings,
        folder,
        lora=lora_settings(work.project),
        until_epoch=epoch,
        on_progress=follow,
    )[-1]
    copy_files(checkpoint.folder, work.folder)
    return StepResult(
        {
            "step": checkpoint.step,
            "mean_learning_rate": checkpoint.mean_learning_rate,
            "mean_loss": fmean(checkpoint.losses),
            "examples": len(examples),
            "tokens": sum(len(example.input_ids) for example in examples),  # of the epoch that the checkpoint ends
        },
        units=sum(trained),
    )


def adopt_checkpoint(work: StepInputs) -> StepResult:
    """Import the checkpoint that the project file names in this epoch's place; it is verified, never guessed."""
    from less_assets.method.training.epoch_folder import read_state
    from less_assets.method.training.imported_checkpoint import import_checkpoint

    settings = work.project.warmup
    number = work.project.checkpoints.index(work.partition)
    rates = settings.mean_learning_rates
    model, _ = work.models.base()
    source = Path(settings.imported[number])  # type: ignore[index]
    with working_folder() as temporary:
        checkpoint = import_checkpoint(
            source,
            model,
            temporary / work.partition,
            epoch=number + 1,
            mean_learning_rate=rates[number] if rates else None,
        )
        imported = read_state(checkpoint.folder)["imported"]
        copy_files(checkpoint.folder, work.folder)
    for warning in imported.get("warnings", []):
        work.log(f"warning: {work.name}: {warning}")
    return StepResult(
        {
            "imported_from": source.name,
            "step": checkpoint.step,
            "mean_learning_rate": checkpoint.mean_learning_rate,
            "mean_loss": fmean(checkpoint.losses) if checkpoint.losses else None,
            **{name: imported[name] for name in ("weight_decay", "warnings") if name in imported},
        }
    )


def warmup_examples(work: StepInputs) -> list[EncodedExample]:
    """The warm-up sample, encoded, in the order it was drawn; rows without loss tokens are left out."""
    sample = read_parquet(work.lineage.folder("warmup_sample"), SAMPLE)
    encoder = work.models.encoder()
    said: dict[str, Any] = {}
    for shard in sample["shard"].unique(maintain_order=True):
        table = conversations_of(work.lineage, shard)
        wanted = table.filter(pl.col("example_id").is_in(sample["example_id"].implode()))
        said |= {name: conversation for name, *conversation in wanted.iter_rows()}
    encoded = [encoder.row(name, *said[name]) for name in sample["example_id"]]
    return [example for example in encoded if example.loss_tokens]


def training_fingerprint(lineage: Lineage) -> str:
    """One fingerprint for all epochs of the warm-up: what its scratch folder is called."""
    plan = lineage.plan("warmup_checkpoints", lineage.project.checkpoints[0])
    settings = {name: value for name, value in plan.settings.items() if name != "checkpoint"}
    return digest([settings, dict(plan.inputs)])


def restore_epochs(lineage: Lineage, folder: Path, epochs: int) -> None:
    """Bring finished epochs from the store into an empty scratch folder (a new machine, a cleared cache)."""
    from less_assets.method.training.files import whole_folder

    for checkpoint in lineage.project.checkpoints[:epochs]:
        plan = lineage.plan("warmup_checkpoints", checkpoint)
        stored = lineage.store.artifact(plan.folder, plan.fingerprint)
        if stored.exists() and not (folder / checkpoint).exists():
            with stored.local(write=False) as source, whole_folder(folder / checkpoint) as target:
                for name in stored.manifest().files:
                    shutil.copyfile(source / name, target / name)


def _finished(folder: Path, epoch: int) -> int:
    from less_assets.method.training.epoch_folder import finished_epochs

    return min(finished_epochs(folder), epoch)


def copy_files(source: Path, folder: ArtifactFolder) -> None:
    """Copy the files of a local folder into an artifact."""
    with folder.local() as target, storage_trouble(folder.root, "write"):
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, target / file.name)


def lora_settings(project: Project) -> LoraSettings:
    """The project's adapter in the method's words."""
    from less_assets.method.training.models import LoraSettings

    lora = project.lora
    return LoraSettings(lora.rank, lora.alpha, lora.dropout, tuple(lora.target_modules))


def describe_sample(stored: Stored) -> Shown:
    """The share of each source."""
    from less_assets.report import charts

    sources: Any = stored.manifest.summary.get("sources", {})
    drawn = charts.share_bars(sources, kind="source") if len(sources) > 1 else None
    values = {"shares_by_source": Picture(drawn, "share of each source")} if drawn else {}
    return replace(one_table(SAMPLE)(stored), values=values)


def describe_checkpoint(stored: Stored) -> Shown:
    """The losses of the epoch's steps."""
    from less_assets.report import charts

    losses = json.loads(stored.folder.read_bytes("state.json"))["losses"]
    if not losses:
        return Shown({})
    last: Any = stored.manifest.summary["step"]
    steps = list(range(last - len(losses) + 1, last + 1))
    return Shown({"losses": Picture(charts.training_curve(steps, losses), "loss of the epoch's steps")})


def checkpoint_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the warm-up, an epoch a checkpoint."""
    if workload.project.warmup.imported:
        return Amount(loads=len(due), bytes=workload.training_bytes(len(due)))
    # A killed training goes on after its last whole epoch; an epoch that is due is trained once.
    tokens = workload.sampled_rows * workload.row_tokens * len(due)
    return Amount(
        units={"warmup_checkpoints": tokens}, tokens=tokens, loads=len(due), bytes=workload.training_bytes(len(due))
    )


def _schedule_figures(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    """The mean learning rate follows from the schedule and the size of the sample.

    Where that is not known yet, every row of the pool counts as usable: an epoch of one step with that many rows has
    one with fewer, so what has no weight here has none in the run.
    """
    from less_assets.method.training.training import TrainingSettings
    from less_assets.method.training.warmup import mean_learning_rates

    warmup = lineage.project.warmup
    if warmup.imported:
        return {}
    rows = lineage.summary("warmup_sample").get("rows") or math.ceil(warmup.fraction * lineage.pool_files.rows)
    epoch = lineage.project.checkpoints.index(keys["checkpoint"])
    rates = mean_learning_rates(TrainingSettings(**warmup.training_values()), rows)
    return {"mean_learning_rate": rates[epoch]}


def _sample_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.sample_settings() | {"draw": sample_draw(lineage.store)}


def _checkpoint_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return {**_shared_settings(lineage.project), "checkpoint": keys["checkpoint"]}


def _shared_settings(project: Project) -> Mapping[str, JsonValue]:
    return {"model": project.model_settings(), **project.warmup_settings()}


def _imported_files(lineage: Lineage, keys: Keys) -> Versions:
    imported = lineage.project.warmup.imported
    position = lineage.project.checkpoints.index(keys["checkpoint"])
    return {"files": files_digest([imported[position]])} if imported else {}


def _only_settings(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Drawn once and frozen: the pool's version is recorded, but an appended shard never draws again."""
    return {}


ASSETS = (
    Asset(
        name="warmup_sample",
        group="warmup",
        kinds=frozenset({"polars", "parquet"}),
        description="Ids of the warm-up examples: drawn once and frozen, so that an appended shard never trains again.",
        inputs=(Input("pool_index"), Input("excluded_rows")),
        folder="warmup_sample",
        settings=_sample_settings,
        shared_settings=lambda project: project.sample_settings(),
        determined_by=_only_settings,
        before=check_sample,
        compute=draw_warmup_sample,
        describe=describe_sample,
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: INDEX_ROW_SECONDS * lineage.pool_files.rows,
        columns_from={"pool_index": {"example_id": ["example_id"], "shard": ["shard"]}},
    ),
    Asset(
        name="warmup_checkpoints",
        group="warmup",
        kinds=frozenset({"pytorch", "huggingface"}),
        description=(
            "Adapter, Adam's moments by parameter name, and mean learning rate after an epoch of the warm-up training."
        ),
        axes=("checkpoint",),
        inputs=(Input("base_model"), Input("warmup_sample")),
        folder="warmup/{checkpoint}",
        settings=_checkpoint_settings,
        shared_settings=_shared_settings,
        outside=_imported_files,
        compute=make_checkpoint,
        describe=describe_checkpoint,
        known_figures=_schedule_figures,
        in_ranges=True,
        loads_model=True,
        amount=checkpoint_work,
        passes=2,
        counts_tokens=True,
        speed=Guess(("finetuned_model", TRAINING)),
    ),
)
