"""Step 5: fine-tuning on a selected subset.

Belongs here: wiring only. Training is `method/training/training.py`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import TRAINING, Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import PoolFormatError
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.model_versions import model_stamp, pinned, recorded
from less_assets.lineage.plan import Versions
from less_assets.reading.files import CURVE, SUBSET
from less_assets.steps.asset import Asset
from less_assets.steps.checks import trained_on_every_row
from less_assets.steps.shown import Picture, Shown, Stored
from less_assets.steps.warmup import copy_files, lora_settings
from less_assets.store.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from less_assets.method.data.chat import EncodedExample
    from less_assets.method.training.training import TrainingResult, TrainingSettings, TrainingStep


def finetune(work: StepInputs) -> StepResult:
    """Train an adapter on the selected rows."""
    recipe = work.project.recipe(split(work.partition)[0])
    if not recipe.traits.chooses_rows:
        commit = work.models.commit_of(recipe.model)
        return StepResult({"trained": False, "examples": 0, "loss_tokens": 0, **commit})
    return train_on(work, "selected_subset", work.project.finetuning.training_values())


def train_on(work: StepInputs, subset: str, values: Mapping[str, Any]) -> StepResult:
    """Train an adapter on a subset; a killed training goes on after its last whole epoch.

    Args:
        work: Reads the subset, and writes.
        subset: Asset whose equal partition holds the rows.
        values: Keyword arguments of `TrainingSettings`.
    """
    from less_assets.method.training.training import TrainingSettings

    recipe = work.project.recipe(split(work.partition)[0])
    commit = work.models.commit_of(recipe.model)
    model, tokenizer = work.models.base(pinned(recipe.model, commit))
    examples, refused = subset_examples(work, subset, tokenizer)
    settings = TrainingSettings(**values)
    curve, trained = train(
        work, model, tokenizer, examples, settings, lambda result: copy_files(result.folder, work.folder)
    )
    last = curve.filter(pl.col("epoch") == curve["epoch"].max())
    return StepResult(
        {
            "trained": True,
            "examples": len(examples),
            "steps": curve.height,
            "tokens": int(curve["tokens"].sum()),
            "loss_tokens": int(curve["loss_tokens"].sum()),
            "mean_loss_of_last_epoch": float(last["loss"].mean()),  # type: ignore[arg-type]
            **({"refused": refused} if refused else {}),
            **commit,
        },
        units=trained,
    )


def train(
    work: StepInputs,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[EncodedExample],
    settings: TrainingSettings,
    keep: Callable[[TrainingResult], object],
) -> tuple[pl.DataFrame, int]:
    """Train an adapter, and store its curve; a killed training goes on after its last whole epoch.

    Args:
        work: Writes, and says how far it is.
        model: The base model.
        tokenizer: Its tokenizer.
        examples: Encoded for it, each with a loss token.
        settings: Of the training.
        keep: Stores what the step keeps of the training, before its scratch folder goes.

    Returns:
        The curve, a line for each step, and the tokens that were trained on now: those of epochs done before are none.
    """
    from less_assets.method.training.training import steps_per_epoch, train_adapter

    scratch = work.models.scratch(work.folder.fingerprint)
    progress = work.progress(steps_per_epoch(len(examples), settings.batch_size) * settings.epochs, "steps")
    trained: list[int] = []

    def follow(step: TrainingStep) -> None:
        progress(1, step.tokens)
        trained.append(step.tokens)

    lora = lora_settings(work.project)
    result = train_adapter(model, tokenizer, examples, settings, scratch, lora=lora, keep="latest", on_progress=follow)
    keep(result)
    curve = pl.DataFrame([asdict(step) for step in result.curve])
    write_parquet(work.folder, CURVE, curve)
    shutil.rmtree(scratch, ignore_errors=True)
    return curve, sum(trained)


def subset_examples(
    work: StepInputs, subset: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[EncodedExample], dict[str, int]]:
    """The selected rows, encoded for the model that is trained, and by status how many rows leave it nothing to learn.

    The pool's refused rows are those of the project's model. Another one that a recipe trains may refuse more.
    """
    from less_assets.method.data.conversations import with_all_fields

    table = with_all_fields(read_parquet(work.lineage.folder(subset, work.partition), SUBSET))
    encoder = work.models.encoder(tokenizer)
    encoded = [
        encoder.row(*conversation) for conversation in table.select("example_id", "messages", "tools").iter_rows()
    ]
    refusals = [(example.example_id, reason) for example in encoded if (reason := encoder.refusal(example))]
    if len(refusals) == len(encoded):
        raise PoolFormatError(
            f"The model that is trained can use no selected row; the first says: {refusals[0][1][1]}."
            if refusals
            else "No row is selected.",
            where=work.partition,
            fix="raise model.max_length or the budget, or train a model whose chat template takes these rows",
        )
    for example_id, (status, detail) in refusals[:1]:
        work.log(
            f"warning: {work.name}: {len(refusals):,} of {len(encoded):,} selected rows are not trained on; "
            f"{example_id}: {status}: {detail}"
        )
    usable = [example for example in encoded if not encoder.refusal(example)]
    return usable, dict(sorted(Counter(status for _, (status, _) in refusals).items()))


def describe_training(stored: Stored) -> Shown:
    """The training's curve."""
    from less_assets.report import charts

    if CURVE not in stored.manifest.files:
        return Shown({})
    curve = stored.table(CURVE)
    drawn = charts.training_curve(curve["step"].to_list(), curve["loss"].to_list())
    return Shown({"training_curve": Picture(drawn, "loss over steps")})


def training_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the subsets, times epochs."""
    trained = [key for key in due if workload.project.recipe(split(key)[0]).traits.chooses_rows]
    return work_of_trainings(workload, trained, "finetuned_model", "selected_subset")


def work_of_trainings(workload: Workload, due: Sequence[str], asset: str, subset: str) -> Amount:
    """Tokens of the subsets that models of an asset are trained on, times epochs."""
    rows = sum(workload.selected_rows(*split(key), subset) for key in due)
    tokens = rows * workload.row_tokens * workload.project.finetuning.epochs
    return Amount(units={asset: tokens}, tokens=tokens, loads=len(due), bytes=workload.training_bytes(len(due)))


def _settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    settings = lineage.project.finetuning_settings(keys["recipe"])
    if other := lineage.project.recipe(keys["recipe"]).model:
        # No asset stands for another model than the project's: what was trained says at which commit.
        settings |= {"stamp": model_stamp(other, lambda: recorded(lineage, "finetuned_model", keys))}
    return settings


def _trained_rows(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Equal rows are trained once: `full`, `random` and the base model for all tasks."""
    rows = inputs[f"selected_subset/{keys['recipe']}|{keys['task']}"]
    return {"base_model": inputs["base_model"], "rows": rows}


ASSETS = (
    Asset(
        name="finetuned_model",
        group="finetuning",
        kinds=frozenset({"pytorch", "huggingface"}),
        description=(
            "A PEFT adapter trained on the selected rows; equal rows and settings are trained once for all tasks."
        ),
        axes=("recipe", "task"),
        inputs=(Input("base_model"), Input("selected_subset")),
        folder="models/of/{recipe}/{task}",
        shared_folder="models",
        settings=_settings,
        shared_settings=lambda project: project.finetuning_settings(),
        determined_by=_trained_rows,
        compute=finetune,
        describe=describe_training,
        checks=(trained_on_every_row,),
        loads_model=True,
        same_run="eval_results",
        amount=training_work,
        passes=2,
        counts_tokens=True,
        speed=Guess(("warmup_checkpoints", TRAINING)),
    ),
)
