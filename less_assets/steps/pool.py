"""The base model and the instruction pool: read, normalised, indexed.

Belongs here: wiring only. Formats are `method/data/row_formats.py`, files and shards `lineage/pool_files.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import PoolFormatError
from less_assets.lineage.file_digests import model_stamp
from less_assets.lineage.lineage import Input, Keys, Lineage
from less_assets.lineage.plan import digest
from less_assets.lineage.pool_files import data_path
from less_assets.reading.files import EXAMPLES, INDEX
from less_assets.steps.asset import ROW_COLUMNS, Asset
from less_assets.steps.checks import few_rows_quarantined
from less_assets.steps.fairness_checks import evaluation_not_in_pool
from less_assets.steps.shown import TABLE_ROWS, Picture, Shown, Stored, Table
from less_assets.store.tables import read_parquet, write_parquet

ROW_SECONDS = 2e-4
"""Reading and normalising a row on one two-core machine: small beside all work on tokens."""
INDEX_ROW_SECONDS = 5e-6
"""Listing a row in the index, likewise."""


def record_base_model(work: StepInputs) -> StepResult:
    """Load the base model once and record what it is."""
    description = work.models.describe_base(work.project.model.base)
    return StepResult(description, data_version=description["digest"])


def read_shard(work: StepInputs) -> StepResult:
    """Read the rows of a shard, normalise them and quarantine the bad ones."""
    from less_assets.method.data.conversations import is_very_short
    from less_assets.method.data.examples import pool_table, read_rows

    shard = work.lineage.pool_files.shard(work.partition)
    source = work.project.source(shard.source)
    tables = [
        table.with_columns(pl.lit(segment.path).alias("source_file"))
        for segment in shard.segments
        for table in read_rows(
            data_path(work.project, segment.path),
            source.name,
            source.format,
            segment.first_row,
            segment.rows,
            begins=segment.begins,
            dialect=source.dialect,
        )
    ]
    table = pl.concat([pool_table([]), *tables])
    work.lineage.pool_files.refuse_changed(work.project, work.partition)
    write_parquet(work.folder, EXAMPLES, table)
    bad = table.filter(pl.col("status") != "ok")
    reasons = dict(sorted(bad["status"].value_counts().iter_rows()))
    summary = {
        "source": source.name,
        "rows": table.height,
        "usable": table.height - bad.height,
        "quarantined": bad.height - reasons.get("blank", 0),
        "very_short": sum(map(is_very_short, table["messages"].drop_nulls())),
        "reasons": reasons,
    }
    rows = table.select("example_id", "source_file", "source_row", "status").rows()
    return StepResult(summary, data_version=digest([list(row) for row in rows]), units=table.height)


def index_pool(work: StepInputs) -> StepResult:
    """List every usable row of every shard; of equal examples the first one is canonical."""
    parts = []
    shards = work.lineage.pool_files.shard_keys()
    if not shards:  # else everything after it would go on with nothing, where only the ledger was lost
        raise PoolFormatError(
            "The pool has no rows: its files are empty, or they were not scanned.",
            where="pool.sources",
            fix="look at the files; `less-assets run` scans them, and so does the sensor `pool_shards` in Dagster",
        )
    for shard in shards:
        table = read_parquet(
            work.lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "source", "status"]
        )
        rows = table.with_row_index("row").filter(pl.col("status") == "ok")
        parts.append(rows.select("example_id", "source", pl.lit(shard).alias("shard"), pl.col("row").cast(pl.Int64)))
    index = pl.concat(parts).with_columns(
        pl.len().over("example_id").cast(pl.Int64).alias("copies"),
        pl.col("example_id").is_first_distinct().alias("canonical"),
    )
    write_parquet(work.folder, INDEX, index)
    unique = index.filter("canonical")
    summary = {
        "shards": shards,
        "usable": index.height,
        "unique": unique.height,
        "copies": index.height - unique.height,
        "sources": dict(sorted(unique["source"].value_counts().iter_rows())),
    }
    return StepResult(summary)


def describe_shard(stored: Stored) -> Shown:
    """The first examples, and every quarantined row with its reason."""
    table = stored.table(EXAMPLES)
    bad = table.filter(~pl.col("status").is_in(["ok", "blank"]))
    values: dict[str, Any] = {"examples": Table(table.filter(pl.col("status") == "ok").head(5), examples=True)}
    if bad.height:
        values["quarantine"] = Table(bad.select("source_file", "source_row", "status", "detail").head(TABLE_ROWS))
    return Shown(values, table.height, table.schema)


def describe_index(stored: Stored) -> Shown:
    """The share of each source."""
    from less_assets.report import charts

    sources: Any = stored.manifest.summary["sources"]
    index = stored.table(INDEX)
    drawn = charts.share_bars(sources, kind="source") if len(sources) > 1 else None
    values = {"shares_by_source": Picture(drawn, "share of each source among distinct rows")} if drawn else {}
    return Shown(values, index.height, index.schema)


def base_model_work(workload: Workload, due: Sequence[str]) -> Amount:
    """One look at the model's files."""
    return Amount(units={"base_model": 1})


def pool_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Rows read and normalised, and their bytes."""
    shards = [workload.lineage.pool_files.shard(str(key)) for key in due]
    stored = sum(shard.rows * workload.samples[shard.source].stored_bytes for shard in shards)
    return Amount(units={"instruction_pool": sum(shard.rows for shard in shards)}, bytes=stored)


def _model_settings(lineage: Lineage, keys: Keys) -> Mapping[str, Any]:
    return {"model": lineage.project.model_settings(), "stamp": model_stamp(lineage.project.model.base)}


def _source_settings(lineage: Lineage, keys: Keys) -> Mapping[str, Any]:
    return lineage.project.source_settings(lineage.pool_files.shard(keys["shard"]).source)


def _files(lineage: Lineage, keys: Keys) -> dict[str, str]:
    return {"files": lineage.pool_files.shard(keys["shard"]).digest}


ASSETS = (
    Asset(
        name="base_model",
        group="model",
        kinds=frozenset({"huggingface"}),
        description=(
            "The base model and its tokenizer, by content digest: a Hugging Face id, a folder, or a GGUF in a package."
        ),
        folder="model",
        settings=_model_settings,
        compute=record_base_model,
        loads_model=True,
        amount=base_model_work,
        versioned_by_content=True,
    ),
    Asset(
        name="instruction_pool",
        group="pool",
        kinds=frozenset({"polars", "parquet"}),
        description=(
            "Examples of one shard of the pool, normalised, with content-derived ids; bad rows are quarantined."
        ),
        axes=("shard",),
        folder="pool/{shard}",
        settings=_source_settings,
        outside=_files,
        compute=read_shard,
        describe=describe_shard,
        in_ranges=True,
        amount=pool_work,
        speed=Guess(seconds=ROW_SECONDS),
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: ROW_SECONDS * lineage.pool_files.shard(keys["shard"]).rows,
    ),
    Asset(
        name="pool_index",
        group="pool",
        kinds=frozenset({"polars", "parquet"}),
        description="Where every example of the pool stands, how often, and which copy counts.",
        inputs=(Input("instruction_pool"),),
        folder="pool_index",
        # A removed source changes no partition that is left; by this Dagster sees that the index is another one.
        shared_settings=lambda project: {"sources": [*sorted(source.name for source in project.pool.sources)]},
        compute=index_pool,
        describe=describe_index,
        checks=(few_rows_quarantined, evaluation_not_in_pool),
        rehearsal_seconds=lambda lineage, keys: INDEX_ROW_SECONDS * lineage.pool_files.rows,
        columns_from={"instruction_pool": ROW_COLUMNS},
    ),
)
