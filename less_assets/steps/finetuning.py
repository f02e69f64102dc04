"""Step 5: fine-tuning on a selected subset.

Belongs here: wiring only. Training is `method/training.py`.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import dagster as dg
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.errors import PoolFormatError
from less_assets.lineage.lineage import split
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project
from less_assets.steps.selection import SUBSET
from less_assets.steps.warmup import copy_files, lora_settings
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, write_parquet

CURVE = "training_curve.parquet"


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The asset `finetuned_model`."""

    @dg.asset(
        group_name="finetuning",
        kinds={"pytorch", "huggingface"},
        pool="gpu",
        partitions_def=axes.of("finetuned_model"),
        deps=["base_model", "selected_subset"],
    )
    def finetuned_model(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """A PEFT adapter trained on the selected rows; equal rows and settings are trained once for all tasks."""
        return materialize_one(context, project, store, models, finetune, describe_training)

    return [finetuned_model]


def finetune(work: StepInputs) -> StepResult:
    """Train an adapter on the subset; a killed training goes on after its last whole epoch."""
    from less_assets.method.training.training import TrainingSettings, steps_per_epoch, train_adapter

    recipe = work.project.recipe(split(work.partition)[0])
    if recipe.strategy == "none":
        return StepResult({"trained": False, "examples": 0, "loss_tokens": 0})
    settings = TrainingSettings(**work.project.finetuning.training_values())
    model, tokenizer = work.models.base(recipe.model)
    examples = subset_examples(work, tokenizer)
    scratch = work.models.scratch(work.folder.fingerprint)
    steps = steps_per_epoch(len(examples), settings.batch_size)
    progress = work.progress(steps * settings.epochs, "steps")
    trained: list[int] = []

    def follow(step: Any) -> None:
        progress(1, step.tokens)
        trained.append(step.tokens)

    result = train_adapter(
        model,
        tokenizer,
        examples,
        settings,
        scratch,
        lora=lora_settings(work.project),
        keep="latest",
        on_progress=follow,
    )
    copy_files(result.folder, work.folder)
    curve = pl.DataFrame([asdict(step) for step in result.curve])
    write_parquet(work.folder, CURVE, curve)
    shutil.rmtree(scratch, ignore_errors=True)
    last = curve.filter(pl.col("epoch") == curve["epoch"].max())
    return StepResult(
        {
            "trained": True,
            "examples": len(examples),
            "steps": curve.height,
            "tokens": int(curve["tokens"].sum()),
            "loss_tokens": int(curve["loss_tokens"].sum()),
            "mean_loss_of_last_epoch": float(last["loss"].mean()),  # type: ignore[arg-type]
        },
        units=sum(trained),
    )


def subset_examples(work: StepInputs, tokenizer: Any) -> list[Any]:
    """The selected rows, encoded for the model that is trained; rows without loss tokens are left out."""
    from less_assets.method.data.chat import encode_messages

    table = read_parquet(work.lineage.folder("selected_subset", work.partition), SUBSET, ["example_id", "messages"])
    model = work.project.model
    encoded = [
        encode_messages(name, messages, tokenizer, chat_format=model.chat_format, max_length=model.max_length)
        for name, messages in table.iter_rows()
    ]
    usable = [example for example in encoded if example.loss_tokens]
    if not usable:
        raise PoolFormatError(
            "No selected row has a loss token.", where=work.partition, fix="raise model.max_length or the budget"
        )
    return usable


def describe_training(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """The training's figures and its curve."""
    from less_assets.report import charts

    shown = dict(metadata.summary(folder, manifest))
    if CURVE in manifest.files:
        curve = read_parquet(folder, CURVE)
        drawn = charts.training_curve(curve["step"].to_list(), curve["loss"].to_list())
        shown["training_curve"] = metadata.picture(drawn, "loss over steps")
    return shown
