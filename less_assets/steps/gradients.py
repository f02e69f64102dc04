"""Gradient features: of the pool per checkpoint and shard, of the targets per checkpoint and task, and the gate.

Belongs here: wiring only. The mathematics is `method/gradients/features.py`, the arrays `store/features.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.models import LoadedCheckpoint
from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import StaleArtifactError, TargetFormatError
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.plan import Versions
from less_assets.project.project import Project
from less_assets.reading.files import BATCHING, FEATURES, TARGET_FEATURES, TARGETS
from less_assets.reading.rows import conversations_of
from less_assets.reading.shard_features import kept_rows
from less_assets.steps.asset import Asset
from less_assets.steps.shown import Shown, Stored, Table, one_table
from less_assets.store.files import read_bytes
from less_assets.store.tables import read_parquet, write_json, write_parquet

if TYPE_CHECKING:
    from less_assets.method.data.chat import EncodedExample
    from less_assets.method.gradients.features import RowStatus
    from less_assets.store.features import FeatureWriter

REASONS = 20
"""Reasons shown for rows that cannot be encoded with the chat template, the most frequent ones."""


def extract_train_gradients(work: StepInputs) -> StepResult:
    """Extract a shard's features block by block; blocks that an interrupted run finished are kept."""
    from less_assets.method.gradients.features import RowStatus
    from less_assets.store.features import FeatureWriter

    checkpoint, shard = split(work.partition)
    settings = work.project.gradients
    loaded = work.models.checkpoint(work.lineage, checkpoint)
    kept = kept_rows(work.lineage, shard)
    examples = encode_shard(work, shard, None if kept is None else kept["row"].to_list())
    writer = FeatureWriter(
        work.folder.path(FEATURES),
        settings.forms,
        len(examples),
        settings.dimension,
        settings.storage,
        min(settings.block_rows, max(1, len(examples))),
    )
    extracted, padding = _extract_blocks(work, loaded, writer, examples)
    reasons = Counter(example.problem for example in examples if example and example.problem)
    refused: dict[str, Any] = {"refused_rows": dict(reasons.most_common(REASONS))} if reasons else {}
    made = {"padding": padding, "sketch_digest": loaded.sketch(settings).fingerprint}
    summary = _feature_summary(work, RowStatus, total_tokens(examples)) | made | refused
    return StepResult(summary, units=extracted)


def _extract_blocks(
    work: StepInputs, loaded: LoadedCheckpoint, writer: FeatureWriter, examples: Sequence[EncodedExample | None]
) -> tuple[int, float]:
    """Extract the blocks that are not there yet; returns their tokens, and the share of padding in all batches."""
    from less_assets.method.data.batching import padding_share
    from less_assets.method.gradients.features import batched_tokens, extract_features

    settings, finished = work.project.gradients, writer.finished_blocks()
    lengths = [len(example.input_ids) for example in examples if example]
    mean_tokens = sum(lengths) / max(1, len(lengths))
    budget = _token_budget(work, loaded, max(lengths, default=1))
    done = sum(stop - start for start, stop in map(writer.bounds, finished))
    progress = work.progress(len(examples), "rows", done)
    extracted = 0
    for block in range(writer.blocks):
        if block in finished:
            continue
        start, stop = writer.bounds(block)
        features = extract_features(
            loaded.model,
            examples[start:stop],
            forms=settings.forms,
            moments=loaded.moments,
            sketch=loaded.sketch(settings),
            token_budget=budget,
            pad_token_id=loaded.pad_token_id,
            gradient_checkpointing=settings.gradient_checkpointing,
            on_progress=lambda rows: progress(rows, round(rows * mean_tokens)),
        )
        writer.write_block(block, features)
        extracted += total_tokens(examples[start:stop])
    blocks = (examples[slice(*writer.bounds(block))] for block in range(writer.blocks))
    return extracted, padding_share(map(batched_tokens, blocks), budget)


def total_tokens(examples: Iterable[EncodedExample | None]) -> int:
    """Tokens of encoded examples; None is a row that could not be encoded."""
    return sum(len(example.input_ids) for example in examples if example is not None)


def _token_budget(work: StepInputs, loaded: LoadedCheckpoint, longest: int) -> int:
    """The batch size in tokens: resolved once for an artifact and recorded, so that a resumed run batches alike."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # not asked yet, or damaged
        return int(json.loads(read_bytes(work.folder.path(BATCHING)))["token_budget"])
    budget = loaded.token_budget(work.project.gradients, longest)
    write_json(work.folder, BATCHING, {"token_budget": budget})
    return budget


def _feature_summary(work: StepInputs, statuses: type[RowStatus], tokens: int) -> dict[str, Any]:
    from less_assets.store.features import FeatureReader

    reader = FeatureReader(work.folder.path(FEATURES))
    usable = reader.status == statuses.OK
    counts = {
        statuses(code).name.lower(): int(count)
        for code, count in zip(*np.unique(reader.status, return_counts=True), strict=True)
    }
    return {
        "rows": reader.rows,
        "tokens": tokens,
        "usable": int(usable.sum()),
        "status": counts,
        "loss_tokens": int(reader.loss_tokens[usable].sum()),
        "mean_loss": float(reader.loss[usable].mean()) if usable.any() else None,
        "dimension": reader.dimension,
        "storage": reader.storage,
        "forms": list(reader.forms),
        "median_norm": {form: float(np.median(reader.norms(form)[usable])) for form in reader.forms}
        if usable.any()
        else {},
    }


def close_datastore(work: StepInputs) -> StepResult:
    """Check that every shard's features are whole, and list them."""
    from less_assets.store.features import open_features

    checkpoint = work.partition
    rows: dict[str, int] = {}
    usable = loss_tokens = 0
    sketches: dict[str, str] = {}
    for shard in work.lineage.shards():
        key = f"{checkpoint}|{shard}"
        shard_summary = work.lineage.summary("train_gradients", key)
        require_same_sketch(sketches, f"train_gradients {key}", shard_summary["sketch_digest"])
        open_features(work.lineage.folder("train_gradients", key), FEATURES)
        rows[shard] = shard_summary["rows"]
        usable += shard_summary["usable"]
        loss_tokens += shard_summary["loss_tokens"]
    summary = {
        "shards": len(rows),
        "rows": sum(rows.values()),
        "usable": usable,
        "loss_tokens": loss_tokens,
        "sketch_digest": next(iter(sketches.values()), None),
    }
    write_json(work.folder, "shards.json", {"rows": rows})  # type: ignore[dict-item]
    return StepResult(summary)


def require_same_sketch(known: dict[str, str], name: str, digest: str) -> None:
    """Remember an artifact's sketch, and refuse one that is not like those before.

    Equal settings give another sketch if a library has changed the order of the model's parameters, which no setting
    shows.

    Raises:
        StaleArtifactError: Naming both artifacts.
    """
    first = next(iter(known), None)
    if first is not None and known[first] != digest:
        raise StaleArtifactError(
            f"The features of {first} and {name} were sketched with the parameters in different orders.",
            where=name,
            fix="transformers or PEFT has changed in between; set another `gradients.seed` to make all features again",
        )
    known[name] = digest


def extract_target_gradients(work: StepInputs) -> StepResult:
    """Sketch the plain gradient of each target example."""
    from less_assets.method.gradients.features import RowStatus, extract_features

    checkpoint, task = split(work.partition)
    table = read_parquet(work.lineage.folder("target_examples", task), TARGETS)
    if known := _without_the_fold(work, checkpoint, task, table):
        return known
    settings = work.project.gradients
    loaded = work.models.checkpoint(work.lineage, checkpoint)
    examples, _ = encode_targets(work, task)
    longest = max(len(example.input_ids) for example in examples)
    block = extract_features(
        loaded.model,
        examples,
        forms=("sgd",),
        moments=None,
        sketch=loaded.sketch(settings),
        token_budget=loaded.token_budget(settings, longest),
        pad_token_id=loaded.pad_token_id,
        gradient_checkpointing=settings.gradient_checkpointing,
        on_progress=work.progress(len(examples), "target examples"),
    )
    bad = np.flatnonzero(block.status != RowStatus.OK)
    if len(bad):
        raise TargetFormatError(
            f"{len(bad)} target examples have no usable gradient: {RowStatus(block.status[bad[0]]).name.lower()}.",
            where=f"task {task}, example {table['example_id'][int(bad[0])]}",
            fix="look at the example's completion; a target is never left out silently",
        )
    stored = table.select("example_id", "subtask").with_columns(
        pl.Series("loss", block.loss),
        pl.Series("loss_tokens", block.loss_tokens),
        pl.Series("norm", block.norms["sgd"]),
        pl.Series("features", block.features["sgd"]),
    )
    tokens = total_tokens(examples)
    return _stored_targets(work, stored, tokens, loaded.sketch(settings).fingerprint, units=tokens)


def _stored_targets(work: StepInputs, stored: pl.DataFrame, tokens: int, sketch: str, *, units: float) -> StepResult:
    write_parquet(work.folder, TARGET_FEATURES, stored)
    return StepResult(
        {
            "examples": stored.height,
            "subtasks": dict(sorted(stored["subtask"].value_counts().iter_rows())),
            "mean_loss": float(stored["loss"].mean()),  # type: ignore[arg-type]
            "tokens": tokens,
            "loss_tokens": int(stored["loss_tokens"].sum()),
            "sketch_digest": sketch,
        },
        units=units,
    )


def _without_the_fold(work: StepInputs, checkpoint: str, task: str, table: pl.DataFrame) -> StepResult | None:
    """The features of a task without one of its folds, out of the task's own; None if these are not there."""
    fold = work.project.folds.get(task)
    whole = f"{checkpoint}|{fold.task}" if fold else None
    if whole is None or work.lineage.status("target_gradients", whole).state != "fresh":
        return None
    stored = read_parquet(work.lineage.folder("target_gradients", whole), TARGET_FEATURES)
    kept = stored.filter(pl.col("example_id").is_in(table["example_id"].implode()))
    if kept["example_id"].to_list() != table["example_id"].to_list():
        return None
    known = work.lineage.summary("target_gradients", whole)
    return _stored_targets(work, kept, known["tokens"], known["sketch_digest"], units=0)


def encode_shard(work: StepInputs, shard: str, rows: list[int] | None = None) -> list[EncodedExample | None]:
    """A shard's rows, or some of them by number, as tokens; None for a quarantined one."""
    encoder = work.models.encoder()
    conversations = conversations_of(work.lineage, shard)
    return [
        encoder.row(name, messages, tools) if name else None
        for name, messages, tools in (conversations if rows is None else conversations[rows]).iter_rows()
    ]


def encode_targets(work: StepInputs, task: str) -> tuple[list[EncodedExample], list[str]]:
    """A task's target examples as tokens, and the subtask of each; a group's members keep their own longest length."""
    from less_assets.method.data.targets import targets_from_table

    encoder = work.models.encoder()
    table = read_parquet(work.lineage.folder("target_examples", task), TARGETS)
    longest = {
        member.name: (member.examples.max_length if member.examples else None) or encoder.max_length
        for member in work.project.member_tasks(task)
    }
    examples = [
        encoder.target(target, longest[member])
        for target, member in zip(targets_from_table(table), table["member"], strict=True)
    ]
    return examples, table["subtask"].to_list()


def describe_train_gradients(stored: Stored) -> Shown:
    """The shard's median norms, and why rows cannot be encoded with the template."""
    summary: Any = stored.manifest.summary
    # One figure each, so that the UI plots them over checkpoints and shards.
    values: dict[str, Any] = {f"median_norm/{form}": norm for form, norm in summary["median_norm"].items()}
    if refused := summary.get("refused_rows"):
        values["refused_rows"] = Table(pl.DataFrame(list(refused.items()), ["reason", "rows"], orient="row"))
    return Shown(values, summary["rows"])


def train_gradient_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the shards, and the bytes of their features."""
    from less_assets.method.gradients.quantization import bytes_per_row

    settings = workload.project.gradients
    shards = [workload.lineage.pool_files.shard(split(key)[1]) for key in due]
    row = len(settings.forms) * (bytes_per_row(settings.storage, settings.dimension) + 8) + 9
    kept = [workload.kept_share(shard) for shard in shards]
    rows = [math.ceil(share * shard.rows) for share, shard in zip(kept, shards, strict=True)]
    stored = sum(_stored_rows(count, settings.block_rows) * row for count in rows)
    tokens = sum(share * workload.tokens([shard]) for share, shard in zip(kept, shards, strict=True))
    loads = len({split(key)[0] for key in due})
    # Ray's workers share the shards; a speed is one worker's.
    units = tokens / (workload.project.compute.workers or 1)
    return Amount(units={"train_gradients": units}, tokens=tokens, loads=loads, bytes=stored)


def _stored_rows(rows: int, block_rows: int) -> int:
    """Rows of a shard's blocks, which are stored at full size, the last one too."""
    block = min(block_rows, max(1, rows))
    return -(-rows // block) * block


def target_gradient_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the target examples, and the bytes of their features."""
    counts = [workload.target_sizes[split(key)[1]] for key in due]
    tokens = sum(tokens for _, tokens, _ in counts)
    stored = sum(examples for examples, _, _ in counts) * 4.0 * workload.project.gradients.dimension
    loads = len({split(key)[0] for key in due})
    return Amount(units={"target_gradients": tokens}, tokens=tokens, loads=loads, bytes=stored)


def _shared_settings(project: Project) -> Mapping[str, JsonValue]:
    return {"model": project.model_settings(), **project.gradient_settings()}


def _settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return _shared_settings(lineage.project)


def _target_content(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Another way to evaluate the task leaves its gradients as they are."""
    checkpoint = f"warmup_checkpoints/{keys['checkpoint']}"
    examples = lineage.summary("target_examples", keys["task"])["examples_digest"]
    return {checkpoint: inputs[checkpoint], "examples": examples}


ASSETS = (
    Asset(
        name="train_gradients",
        group="gradients",
        kinds=frozenset({"pytorch", "zarr"}),
        description=(
            "Sketched Adam directions of every example of a shard at a checkpoint, with exact norms and losses."
        ),
        axes=("checkpoint", "shard"),
        inputs=(Input("warmup_checkpoints"), Input("instruction_pool"), Input("kept_rows")),
        folder="gradients/train/{checkpoint}/{shard}",
        of_weightless=False,
        settings=_settings,
        shared_settings=_shared_settings,
        compute=extract_train_gradients,
        describe=describe_train_gradients,
        in_ranges=True,
        loads_model=True,
        spread=True,
        amount=train_gradient_work,
        passes=2,
        counts_tokens=True,
    ),
    Asset(
        name="gradient_datastore",
        group="gradients",
        kinds=frozenset({"json"}),
        description=(
            "The gate before scoring: every shard of the pool has features at this checkpoint, all of one making."
        ),
        axes=("checkpoint",),
        inputs=(Input("pool_index"), Input("train_gradients")),
        folder="gradients/datastore/{checkpoint}",
        of_weightless=False,
        compute=close_datastore,
        in_ranges=True,
    ),
    Asset(
        name="target_gradients",
        group="gradients",
        kinds=frozenset({"pytorch"}),
        description="Sketched plain gradients of a task's target examples at a checkpoint.",
        axes=("checkpoint", "task"),
        inputs=(Input("warmup_checkpoints"), Input("target_examples")),
        folder="gradients/target/{checkpoint}/{task}",
        of_weightless=False,
        settings=_settings,
        shared_settings=_shared_settings,
        determined_by=_target_content,
        compute=extract_target_gradients,
        describe=one_table(TARGET_FEATURES),
        in_ranges=True,
        loads_model=True,
        amount=target_gradient_work,
        passes=2,
        counts_tokens=True,
        speed=Guess(("train_gradients",)),
        columns_from={"target_examples": {"example_id": ["example_id"], "subtask": ["subtask"]}},
    ),
)
