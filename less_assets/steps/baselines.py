"""What selections are compared with: embeddings of pool and targets, and scores from text or from embeddings.

Belongs here: wiring only; each of these assets exists only if a recipe needs it. Scores are `method/baselines.py`,
ranking is `selection.py`'s matter.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.lineage.lineage import split
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one, materialize_range
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project
from less_assets.steps.gradients import encode_targets
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.targets import TARGETS
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.tables import read_parquet, write_json, write_parquet

EMBEDDINGS = "embeddings.parquet"
PLACES = "places.json"
"""Member task and subtask of each number of a score."""


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The assets `pool_embeddings`, `target_embeddings`, `embedding_scores` and `text_scores` that recipes ask for."""

    @dg.asset(
        group_name="selection",
        kinds={"pytorch", "parquet"},
        pool="gpu",
        partitions_def=axes.of("pool_embeddings"),
        deps=["base_model", "instruction_pool"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
    )
    def pool_embeddings(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> Iterator[dg.MaterializeResult]:
        """Hidden state and loss that the base model has for every example of a shard, from one forward pass."""
        describe = metadata.table_summary(EMBEDDINGS)
        yield from materialize_range(context, project, store, models, embed_shard, describe)

    @dg.asset(
        group_name="selection",
        kinds={"pytorch", "parquet"},
        pool="gpu",
        partitions_def=axes.of("target_embeddings"),
        deps=["base_model", "target_examples"],
    )
    def target_embeddings(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """Hidden state that the base model has for each of a task's target examples."""
        describe = metadata.table_summary(EMBEDDINGS)
        return materialize_one(context, project, store, models, embed_targets, describe)

    targets = []
    if axes.of("target_embeddings") is not None:
        targets.append(axes.by_task("target_embeddings", axes.needed_by("target_embeddings")))

    @dg.asset(
        group_name="selection",
        kinds={"numpy", "parquet"},
        partitions_def=axes.of("embedding_scores"),
        deps=[axes.all_partitions("pool_embeddings"), *targets, "pool_index"],
    )
    def embedding_scores(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """Cosine of every pool row with each target example (`rds`), or the base model's loss on it (`perplexity`)."""
        return materialize_one(context, project, store, models, score_embeddings, metadata.summary)

    @dg.asset(
        group_name="selection",
        kinds={"numpy", "parquet"},
        partitions_def=axes.of("text_scores"),
        deps=[axes.by_task("target_examples", axes.needed_by("text_scores")), "pool_index"],
    )
    def text_scores(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """BM25 of every pool row with each subtask, or its n-gram importance (DSIR)."""
        return materialize_one(context, project, store, models, score_texts, metadata.summary)

    built = {
        "pool_embeddings": pool_embeddings,
        "target_embeddings": target_embeddings,
        "embedding_scores": embedding_scores,
        "text_scores": text_scores,
    }
    return [asset for name, asset in built.items() if axes.of(name) is not None]


def score_file(shard: str) -> str:
    """Name of a shard's table inside `embedding_scores` and `text_scores`."""
    return f"scores/{shard}.parquet"


def embed_shard(work: StepInputs) -> StepResult:
    """Embed a shard's examples; a row that cannot be encoded or has no loss token says so."""
    from less_assets.method.data.chat import encode_messages
    from less_assets.method.selection.baselines import embed

    columns = ["example_id", "source", "messages", "status"]
    table = read_parquet(work.lineage.folder("instruction_pool", work.partition), EXAMPLES, columns)
    settings = work.project.model
    model, tokenizer = work.models.frozen_base()
    encoded = [
        encode_messages(
            row["example_id"],
            row["messages"],
            tokenizer,
            chat_format=settings.chat_format,
            max_length=settings.max_length,
        )
        if row["status"] == "ok"
        else None
        for row in table.iter_rows(named=True)
    ]
    usable = [example for example in encoded if example and example.loss_tokens]
    found = embed(model, usable, on_progress=work.progress(len(usable), "rows"))
    places = np.array([place for place, example in enumerate(encoded) if example and example.loss_tokens], dtype=int)
    width = found.embeddings.shape[1] or model.config.hidden_size
    embeddings = np.zeros((table.height, width), dtype=np.float32)
    losses = np.full(table.height, np.nan, dtype=np.float32)
    embeddings[places], losses[places] = found.embeddings, found.losses
    known = pl.Series(np.isin(np.arange(table.height), places))
    write_parquet(
        work.folder,
        EMBEDDINGS,
        table.select(
            "example_id",
            "source",
            pl.when(known | (pl.col("status") != "ok"))
            .then("status")
            .otherwise(pl.lit("no_loss_tokens"))
            .alias("status"),
            pl.Series("loss", losses),
            pl.Series("loss_tokens", [example.loss_tokens if example else 0 for example in encoded], dtype=pl.Int32),
            pl.Series("embedding", embeddings, dtype=pl.Array(pl.Float32, width)),
        ),
    )
    tokens = sum(len(example.input_ids) for example in usable)
    return StepResult(
        {
            "rows": table.height,
            "usable": len(usable),
            "tokens": tokens,
            "mean_loss": float(found.losses.mean()) if usable else None,
            "dimension": width,
        },
        units=tokens,
    )


def embed_targets(work: StepInputs) -> StepResult:
    """Embed a task's target examples, prompt and completion."""
    from less_assets.method.selection.baselines import embed

    model, tokenizer = work.models.frozen_base()
    examples, subtasks = encode_targets(work, work.partition, tokenizer)
    found = embed(model, examples, on_progress=work.progress(len(examples), "target examples"))
    table = read_parquet(work.lineage.folder("target_examples", work.partition), TARGETS, ["example_id", "member"])
    stored = table.with_columns(
        pl.Series("subtask", subtasks, dtype=pl.String),
        pl.Series("embedding", found.embeddings, dtype=pl.Array(pl.Float32, found.embeddings.shape[1])),
    )
    write_parquet(work.folder, EMBEDDINGS, stored.select("example_id", "member", "subtask", "embedding"))
    tokens = sum(len(example.input_ids) for example in examples)
    summary = {"examples": len(examples), "tokens": tokens, "mean_loss": float(found.losses.mean())}
    return StepResult(summary, units=tokens)


def score_embeddings(work: StepInputs) -> StepResult:
    """Score the pool from its embeddings, shard by shard."""
    from less_assets.method.selection.baselines import cosine_scores

    lineage = work.lineage
    recipe, task = split(work.partition)
    rds = work.project.recipe(recipe).strategy == "rds"
    if rds:
        targets = read_parquet(lineage.folder("target_embeddings", task), EMBEDDINGS)
        directions = targets["embedding"].to_numpy()
        places = [
            [member, subtask.removeprefix(f"{member}/")] for member, subtask in targets["member", "subtask"].rows()
        ]
    else:
        places = [[task, "all"]]
    rows = 0
    for shard in lineage.shards():
        columns = ["example_id", "source", "status", "loss_tokens", "embedding" if rds else "loss"]
        table = read_parquet(lineage.folder("pool_embeddings", shard), EMBEDDINGS, columns)
        scores = cosine_scores(table["embedding"].to_numpy(), directions) if rds else table["loss"].to_numpy()[:, None]
        _write_scores(work, shard, table.select("example_id", "source", "status", "loss_tokens"), scores)
        rows += table.height
    write_json(work.folder, PLACES, places)  # type: ignore[arg-type]
    return StepResult({"rows": rows, "scores": len(places)})


def score_texts(work: StepInputs) -> StepResult:
    """Score the pool from its text: one pass over the shards to know the whole pool, one to score each of them."""
    from less_assets.method.selection import baselines

    lineage = work.lineage
    recipe, task = split(work.partition)
    table = read_parquet(lineage.folder("target_examples", task), TARGETS)
    texts = [_target_text(row) for row in table.iter_rows(named=True)]
    if work.project.recipe(recipe).strategy == "bm25":
        pool = baselines.WordStatistics.of(texts)
        for _, messages in _pool_messages(work):
            pool.count(map(baselines.text_of, messages["messages"]))
        members = dict(table.select("subtask", "member").rows())
        places = [[members[label], label.removeprefix(f"{members[label]}/")] for label in sorted(members)]
        score: Any = partial(_bm25, targets=texts, subtasks=table["subtask"].to_list(), pool=pool)
    else:
        names = table["member"].unique(maintain_order=True).to_list()
        places = [[name, "all"] for name in names]
        wanted = [
            baselines.ngram_counts(text for text, member in zip(texts, table["member"], strict=True) if member == name)
            for name in names
        ]
        counts = np.zeros_like(wanted[0])
        for _, messages in _pool_messages(work):
            counts += baselines.ngram_counts(map(baselines.text_of, messages["messages"]))
        score = partial(_dsir, wanted=wanted, pool=counts)
    rows = 0
    for shard, messages in _pool_messages(work):
        scores = score([baselines.text_of(each) for each in messages["messages"]])
        whole = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "source", "status"])
        spread = np.full((whole.height, len(places)), np.nan, dtype=np.float32)
        spread[messages["row"].to_numpy()] = scores
        _write_scores(work, shard, whole, spread)
        rows += whole.height
    write_json(work.folder, PLACES, places)  # type: ignore[arg-type]
    return StepResult({"rows": rows, "scores": len(places)})


def _bm25(texts: list[str], *, targets: list[str], subtasks: list[str], pool: Any) -> np.ndarray:
    from less_assets.method.selection.baselines import bm25_scores

    return bm25_scores(texts, targets, subtasks, pool)[1]


def _dsir(texts: list[str], *, wanted: list[np.ndarray], pool: np.ndarray) -> np.ndarray:
    from less_assets.method.selection.baselines import dsir_log_weights

    return np.stack([dsir_log_weights(texts, counts, pool) for counts in wanted], axis=1)


def _target_text(row: dict[str, Any]) -> str:
    from less_assets.method.selection.baselines import text_of

    return text_of([*row["messages"], {"role": "assistant", "content": row["assistant_prefix"] + row["completion"]}])


def _pool_messages(work: StepInputs) -> Iterator[tuple[str, pl.DataFrame]]:
    """Row and messages of every usable row, shard by shard; what stands in the pool twice counts twice."""
    for shard in work.lineage.shards():
        table = read_parquet(work.lineage.folder("instruction_pool", shard), EXAMPLES, ["messages", "status"])
        yield shard, table.with_row_index("row").filter(pl.col("status") == "ok").select("row", "messages")


def _write_scores(work: StepInputs, shard: str, rows: pl.DataFrame, scores: np.ndarray) -> None:
    usable = rows["status"] == "ok"
    column = pl.Series("score", scores.astype(np.float32), dtype=pl.Array(pl.Float32, scores.shape[1]))
    table = rows.with_columns(
        pl.lit(shard).alias("shard"),
        pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
        pl.when(usable).then(column).otherwise(None).alias("score"),
    )
    write_parquet(work.folder, score_file(shard), table)
