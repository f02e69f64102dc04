"""What selections are compared with: embeddings of pool and targets, and scores from text or from embeddings.

Belongs here: wiring only; each of these assets exists only if a recipe needs it. Scores are
`method/selection/baselines.py`, ranking is `ranking.py`'s matter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.plan import Versions
from less_assets.project.project import Project
from less_assets.reading.files import EMBEDDINGS, EXAMPLES, PLACES, TARGETS, score_file
from less_assets.reading.rows import pool_rows
from less_assets.steps.asset import Asset
from less_assets.steps.gradients import encode_shard, encode_targets
from less_assets.steps.shown import one_table
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.tables import read_parquet, write_json, write_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.scorers import TargetExamples


def embed_shard(work: StepInputs) -> StepResult:
    """Embed a shard's examples; a row that cannot be encoded or has no loss token says so."""
    from less_assets.method.selection.baselines import embed

    columns = ["example_id", "source", "status"]
    table = read_parquet(work.lineage.folder("instruction_pool", work.partition), EXAMPLES, columns)
    model, _ = work.models.frozen_base()
    encoder = work.models.encoder()
    encoded = encode_shard(work, work.partition)
    usable = [example for example in encoded if example and example.loss_tokens]
    embedded = embed(model, usable, on_progress=work.progress(len(usable), "rows"))
    places = np.array([number for number, example in enumerate(encoded) if example and example.loss_tokens], dtype=int)
    width = embedded.embeddings.shape[1] or model.config.hidden_size
    embeddings = np.zeros((table.height, width), dtype=np.float32)
    losses = np.full(table.height, np.nan, dtype=np.float32)
    embeddings[places], losses[places] = embedded.embeddings, embedded.losses
    statuses = [
        status if example is None else (encoder.refusal(example) or ("ok", ""))[0]
        for status, example in zip(table["status"], encoded, strict=True)
    ]
    write_parquet(
        work.folder,
        EMBEDDINGS,
        table.select(
            "example_id",
            "source",
            pl.Series("status", statuses, dtype=pl.String),
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
            "mean_loss": float(embedded.losses.mean()) if usable else None,
            "dimension": width,
        },
        units=tokens,
    )


def embed_targets(work: StepInputs) -> StepResult:
    """Embed a task's target examples, prompt and completion."""
    from less_assets.method.selection.baselines import embed

    model, _ = work.models.frozen_base()
    examples, subtasks = encode_targets(work, work.partition)
    embedded = embed(model, examples, on_progress=work.progress(len(examples), "target examples"))
    table = read_parquet(work.lineage.folder("target_examples", work.partition), TARGETS, ["example_id", "member"])
    stored = table.with_columns(
        pl.Series("subtask", subtasks, dtype=pl.String),
        pl.Series("embedding", embedded.embeddings, dtype=pl.Array(pl.Float32, embedded.embeddings.shape[1])),
    )
    write_parquet(work.folder, EMBEDDINGS, stored.select("example_id", "member", "subtask", "embedding"))
    tokens = sum(len(example.input_ids) for example in examples)
    summary = {"examples": len(examples), "tokens": tokens, "mean_loss": float(embedded.losses.mean())}
    return StepResult(summary, units=tokens)


def score_embeddings(work: StepInputs) -> StepResult:
    """Score the pool from its embeddings, shard by shard, by the rule that the table of strategies names."""
    lineage = work.lineage
    recipe, task = split(work.partition)
    scorer = work.project.recipe(recipe).traits.load()(_embedded_targets(work, recipe, task))
    rows = 0
    for shard in lineage.shards():
        folder = lineage.folder("pool_embeddings", shard)
        table = read_parquet(folder, EMBEDDINGS, ["example_id", "source", "status", "loss_tokens"])
        scores = scorer.score(partial(_column, folder))
        write_scores(work, shard, table, scores)
        rows += table.height
    write_json(work.folder, PLACES, [list(column) for column in scorer.columns])
    return StepResult({"rows": rows, "scores": len(scorer.columns)})


def _embedded_targets(work: StepInputs, recipe: str, task: str) -> "TargetExamples":
    from less_assets.method.selection.scorers import TargetExamples

    if not _compares_embeddings(work.project, recipe):
        return TargetExamples(task, [], [])
    table = read_parquet(work.lineage.folder("target_embeddings", task), EMBEDDINGS)
    members, subtasks = table["member"].to_list(), table["subtask"].to_list()
    return TargetExamples(task, members, subtasks, embeddings=table["embedding"].to_numpy())


def _column(folder: ArtifactFolder, name: str) -> np.ndarray:
    return read_parquet(folder, EMBEDDINGS, [name])[name].to_numpy()


def score_texts(work: StepInputs) -> StepResult:
    """Score the pool from its text, by the rule that the table of strategies names.

    The rule passes over the shards to know the whole pool; then each shard is scored.
    """
    from less_assets.method.selection.scorers import TargetExamples

    lineage = work.lineage
    recipe, task = split(work.partition)
    table = read_parquet(lineage.folder("target_examples", task), TARGETS)
    texts = [_target_text(row) for row in table.iter_rows(named=True)]
    targets = TargetExamples(task, table["member"].to_list(), table["subtask"].to_list(), texts)
    rule = work.project.recipe(recipe).traits.load()
    scorer = rule(targets, lambda: (texts for _, _, texts in _pool_texts(work)))
    rows = 0
    for shard, usable, texts in _pool_texts(work):
        whole = pool_rows(lineage, shard, ["example_id", "source", "status"])
        scores = np.full((whole.height, len(scorer.columns)), np.nan, dtype=np.float32)
        scores[usable] = scorer.score(texts)
        write_scores(work, shard, whole, scores)
        rows += whole.height
    write_json(work.folder, PLACES, [list(column) for column in scorer.columns])
    return StepResult({"rows": rows, "scores": len(scorer.columns)})


def _target_text(row: dict[str, Any]) -> str:
    from less_assets.method.selection.baselines import text_of

    return text_of([*row["messages"], {"role": "assistant", "content": row["assistant_prefix"] + row["completion"]}])


def _pool_texts(work: StepInputs) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Shard, numbers and texts of its usable rows, shard by shard; what stands in the pool twice counts twice."""
    from less_assets.method.selection.baselines import text_of

    for shard in work.lineage.shards():
        table = pool_rows(work.lineage, shard, ["messages", "status"])
        usable = table.with_row_index("row").filter(pl.col("status") == "ok")
        yield shard, usable["row"].to_numpy(), list(map(text_of, usable["messages"]))


def write_scores(work: StepInputs, shard: str, rows: pl.DataFrame, scores: np.ndarray) -> None:
    """Store the scores (n, J) of a shard's rows; null where a row's status is not "ok"."""
    usable = rows["status"] == "ok"
    column = pl.Series("score", scores.astype(np.float32), dtype=pl.Array(pl.Float32, scores.shape[1]))
    table = rows.with_columns(
        pl.lit(shard).alias("shard"),
        pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
        pl.when(usable).then(column).otherwise(None).alias("score"),
    )
    write_parquet(work.folder, score_file(shard), table)


def pool_embedding_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the shards."""
    tokens = workload.tokens(workload.lineage.pool_files.shard(str(key)) for key in due)
    return Amount(units={"pool_embeddings": tokens}, tokens=tokens, loads=1)


def target_embedding_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Tokens of the target examples."""
    tokens = sum(workload.target_sizes[str(task)][1] for task in due)
    return Amount(units={"target_embeddings": tokens}, tokens=tokens, loads=1)


def _model_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return {"model": lineage.project.model_settings()}


def _strategy(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return {"strategy": lineage.project.recipe(keys["recipe"]).strategy}


def embedded_content(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Another way to evaluate the task leaves what the base model makes of its targets as it is."""
    examples = lineage.summary("target_examples", keys["task"])["examples_digest"]
    return {"base_model": inputs["base_model"], "examples": examples}


def _scored_text(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """Another way to evaluate the task leaves its scores as they are."""
    examples = lineage.summary("target_examples", keys["task"])["examples_digest"]
    return {"pool_index": inputs["pool_index"], "examples": examples}


def _ranks_by(scores: str) -> Callable[[Project, str], bool]:
    return lambda project, recipe: project.recipe(recipe).traits.scores == scores


def _compares_embeddings(project: Project, recipe: str) -> bool:
    traits = project.recipe(recipe).traits
    return traits.scores == "embeddings" and not traits.same_for_every_task


ASSETS = (
    Asset(
        name="pool_embeddings",
        group="scores",
        kinds=frozenset({"pytorch", "parquet"}),
        description=(
            "Hidden state and loss that the base model has for every example of a shard, from one forward pass."
        ),
        axes=("shard",),
        inputs=(Input("base_model"), Input("instruction_pool")),
        folder="embeddings/pool/{shard}",
        settings=_model_settings,
        shared_settings=lambda project: {"model": project.model_settings()},
        needed_by=lambda project, recipe: project.recipe(recipe).traits.scores in ("embeddings", "tuning"),
        of_prefilter=True,
        compute=embed_shard,
        describe=one_table(EMBEDDINGS),
        in_ranges=True,
        loads_model=True,
        spread=True,
        amount=pool_embedding_work,
        passes=1,
        counts_tokens=True,
        speed=Guess(("target_embeddings", "train_gradients")),  # a forward pass: at most what gradients take
    ),
    Asset(
        name="target_embeddings",
        group="scores",
        kinds=frozenset({"pytorch", "parquet"}),
        description="Hidden state that the base model has for each of a task's target examples.",
        axes=("task",),
        inputs=(Input("base_model"), Input("target_examples")),
        folder="embeddings/target/{task}",
        settings=_model_settings,
        shared_settings=lambda project: {"model": project.model_settings()},
        determined_by=embedded_content,
        needed_by=_compares_embeddings,
        of_prefilter=True,
        compute=embed_targets,
        describe=one_table(EMBEDDINGS),
        loads_model=True,
        amount=target_embedding_work,
        passes=1,
        counts_tokens=True,
        speed=Guess(("pool_embeddings", "train_gradients")),
    ),
    Asset(
        name="embedding_scores",
        group="scores",
        kinds=frozenset({"numpy", "parquet"}),
        description=(
            "Cosine of every pool row with each target example (`rds`), or the base model's loss on it (`perplexity`)."
        ),
        axes=("recipe", "task"),
        inputs=(
            Input("pool_index"),
            Input("pool_embeddings"),
            Input("target_embeddings", read_by=_compares_embeddings),
        ),
        folder="selection/{task}/embedding/{recipe}",
        # By fingerprint alone: recipes that differ in their budget only share the scores.
        shared_folder="selection/{task}/embedding",
        settings=_strategy,
        needed_by=_ranks_by("embeddings"),
        of_prefilter=True,
        compute=score_embeddings,
    ),
    Asset(
        name="text_scores",
        group="scores",
        kinds=frozenset({"numpy", "parquet"}),
        description="BM25 of every pool row with each subtask, or its n-gram importance (DSIR).",
        axes=("recipe", "task"),
        inputs=(Input("pool_index"), Input("target_examples")),
        folder="selection/{task}/text/{recipe}",
        shared_folder="selection/{task}/text",
        settings=_strategy,
        determined_by=_scored_text,
        needed_by=_ranks_by("text"),
        of_prefilter=True,
        compute=score_texts,
    ),
)
