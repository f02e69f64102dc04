"""The base model and the instruction pool: read, normalised, indexed.

Belongs here: wiring only. Formats are `method/data/row_formats.py`, files and shards `lineage/pool_files.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.errors import PoolFormatError
from less_assets.lineage.plan import digest
from less_assets.lineage.pool_files import data_path
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_one, materialize_range
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, write_parquet

EXAMPLES = "examples.parquet"
INDEX = "index.parquet"


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The assets `base_model`, `instruction_pool` and `pool_index`."""

    @dg.asset(group_name="model", kinds={"huggingface"}, pool="gpu")
    def base_model(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """The base model and its tokenizer, by content digest: a Hugging Face id, a folder, or a GGUF in a package."""
        return materialize_one(context, project, store, models, record_base_model, metadata.summary)

    @dg.asset(
        group_name="pool",
        kinds={"polars", "parquet"},
        partitions_def=axes.of("instruction_pool"),
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
    )
    def instruction_pool(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> Iterator[dg.MaterializeResult]:
        """Examples of one shard of the pool, normalised, with content-derived ids; bad rows are quarantined."""
        yield from materialize_range(context, project, store, models, read_shard, describe_shard)

    @dg.asset(group_name="pool", kinds={"polars", "parquet"}, deps=["instruction_pool"])
    def pool_index(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> dg.MaterializeResult:
        """Where every example of the pool stands, how often, and which copy counts."""
        return materialize_one(context, project, store, models, index_pool, describe_index)

    return [base_model, instruction_pool, pool_index]


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


def describe_shard(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Counts, the first examples, and every quarantined row with its reason."""
    table = read_parquet(folder, EXAMPLES)
    bad = table.filter(~pl.col("status").is_in(["ok", "blank"]))
    shown = {
        **metadata.summary(folder, manifest),
        "dagster/partition_row_count": table.height,
        "examples": metadata.example_table(table.filter(pl.col("status") == "ok").head(5)),
        "dagster/column_schema": metadata.column_schema(table),
    }
    if bad.height:
        columns = ["source_file", "source_row", "status", "detail"]
        shown["quarantine"] = metadata.table(bad.select(columns).head(metadata.TABLE_ROWS))
    return shown


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


def describe_index(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Counts, the share of each source, and the columns."""
    from less_assets.report import charts

    index = read_parquet(folder, INDEX)
    shown = {
        **metadata.summary(folder, manifest),
        "dagster/row_count": index.height,
        "dagster/column_schema": metadata.column_schema(index),
    }
    sources: Any = manifest.summary["sources"]
    if len(sources) > 1:
        drawn = charts.share_bars(sources, kind="source")
        shown["shares_by_source"] = metadata.picture(drawn, "share of each source among distinct rows")
    return shown
