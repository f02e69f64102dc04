"""The base model and the instruction pool: read, normalised, tried on the tokenizer, indexed; what is left out of it.

Belongs here: wiring only. Formats are `method/data/row_formats.py`, files and shards `lineage/pool_files.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.errors import PoolFormatError
from less_assets.lineage.lineage import Input, Keys, Lineage
from less_assets.lineage.model_versions import model_stamp, recorded
from less_assets.lineage.plan import Versions, digest
from less_assets.lineage.pool_files import data_path
from less_assets.project.project import Project
from less_assets.reading.files import EXAMPLES, EXCLUDED, INDEX, REFUSED
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import conversations_of
from less_assets.steps.asset import ROW_COLUMNS, Asset
from less_assets.steps.checks import few_rows_quarantined
from less_assets.steps.fairness_checks import evaluation_not_in_pool
from less_assets.steps.shown import TABLE_ROWS, Picture, Shown, Stored, Table
from less_assets.store.files import working_folder
from less_assets.store.tables import read_parquet, write_parquet

NOTHING_REFUSED = digest([])
"""Version of `refused_rows` where there are none."""
ROW_SECONDS = 2e-4
"""Reading and normalising a row on one two-core machine: small beside all work on tokens."""
ENCODED_ROW_SECONDS = 2e-3
"""Encoding a row of 150 tokens, likewise."""
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


def refuse_rows(work: StepInputs) -> StepResult:
    """Encode a shard's rows, and list those of which nothing can be trained on; needs the tokenizer only."""
    from less_assets.method.data.chat import refusals

    table = conversations_of(work.lineage, work.partition)
    refused = refusals(work.models.encoder(), table, work.progress(table.height, "rows"))
    write_parquet(work.folder, REFUSED, refused)
    reasons = dict(sorted(refused["status"].value_counts().iter_rows()))
    summary = {"rows": table.height, "refused": refused.height, "reasons": reasons}
    version = digest([list(row) for row in refused.iter_rows()])
    return StepResult(summary, data_version=version, units=table.height)


def index_pool(work: StepInputs) -> StepResult:
    """List every usable row of every shard; of equal examples the first one is canonical. Refused rows stand apart."""
    from less_assets.method.data.copies import mark_copies

    shards = work.lineage.pool_files.shard_keys()
    if not shards:  # else everything after it would go on with nothing, where only the ledger was lost
        raise PoolFormatError(
            "The pool has no rows: its files are empty, or they were not scanned.",
            where="pool.sources",
            fix="look at the files; `less-assets run` scans them, and so does the sensor `pool_shards` in Dagster",
        )
    refused = pl.concat(_refused_of(work.lineage, shard) for shard in shards)
    with working_folder() as folder:
        index = mark_copies((_usable_of(work.lineage, shard) for shard in shards), folder)
        counted = index.group_by("source").agg(pl.len().alias("rows"), pl.col("canonical").sum().alias("unique"))
        sources = counted.sort("source").collect(engine="streaming")
        write_parquet(work.folder, INDEX, index)
    usable, unique = int(sources["rows"].sum()), int(sources["unique"].sum())
    if refused.height and not usable:
        reasons = ", ".join(
            f"{status}: {rows}" for status, rows in sorted(refused["status"].value_counts().iter_rows())
        )
        raise PoolFormatError(
            f"No row of the pool can be used with this model ({reasons}); the first says: {refused['detail'][0]}.",
            where="model",
            fix="set another `model.chat_format`, raise `model.max_length`, or correct the rows",
        )
    if refused.height:
        write_parquet(work.folder, REFUSED, refused)
    summary = {
        "shards": shards,
        "usable": usable,
        "unique": unique,
        "copies": usable - unique,
        "refused": refused.height,
        "sources": dict(sources.filter(pl.col("unique") > 0).select("source", "unique").iter_rows()),
    }
    return StepResult(summary)


def _usable_of(lineage: Lineage, shard: str) -> pl.DataFrame:
    """Where a shard's usable rows stand."""
    table = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "source", "status"])
    refused = read_parquet(lineage.folder("refused_rows", shard), REFUSED)
    rows = table.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row")).filter(pl.col("status") == "ok")
    used = rows.join(refused, on="row", how="anti", maintain_order="left")
    return used.select("example_id", "source", pl.lit(shard).alias("shard"), "row")


def _refused_of(lineage: Lineage, shard: str) -> pl.DataFrame:
    refused = read_parquet(lineage.folder("refused_rows", shard), REFUSED)
    return refused.select("example_id", pl.lit(shard).alias("shard"), "row", "status", "detail")


def list_excluded(work: StepInputs) -> StepResult:
    """List the rows that the project leaves out, with their reasons; those that the pool does not have say so.

    Its version is that of the ids that the pool has: another reason, or an unknown id, changes no selection.
    """
    from less_assets.method.data.excluded_rows import read_excluded

    reasons = read_excluded(work.project.exclude)
    schema = {"example_id": pl.String, "reason": pl.String}
    table = pl.DataFrame({"example_id": list(reasons), "reason": list(reasons.values())}, schema=schema)
    there = PoolIndex(work.lineage).of_ids(table["example_id"], ["example_id", "source", "canonical"])
    table = table.join(
        there.filter("canonical").drop("canonical"), on="example_id", how="left", maintain_order="left"
    ).with_columns(pl.col("source").is_not_null().alias("in_pool"))
    write_parquet(work.folder, EXCLUDED, table)
    left_out = table.filter("in_pool")
    summary = {
        "excluded": left_out.height,
        "unknown": table.height - left_out.height,
        "sources": dict(sorted(left_out["source"].value_counts().iter_rows())),
    }
    if unknown := table.filter(~pl.col("in_pool"))["example_id"].to_list():
        work.log(f"warning: {work.name}: the pool has no usable row with {len(unknown)} of the ids: {unknown[0]}, …")
    return StepResult(summary, data_version=digest(["excluded", *sorted(left_out["example_id"])]))


def describe_shard(stored: Stored) -> Shown:
    """The first examples, and every quarantined row with its reason."""
    table = stored.table(EXAMPLES)
    bad = table.filter(~pl.col("status").is_in(["ok", "blank"]))
    values: dict[str, Any] = {"examples": Table(table.filter(pl.col("status") == "ok").head(5), examples=True)}
    if bad.height:
        values["quarantine"] = Table(bad.select("source_file", "source_row", "status", "detail").head(TABLE_ROWS))
    return Shown(values, table.height, table.schema)


def describe_refused(stored: Stored) -> Shown:
    """Every refused row with its reason."""
    refused = stored.table(REFUSED)
    values = {"refused_rows": Table(refused.head(TABLE_ROWS))} if refused.height else {}
    return Shown(values, refused.height, refused.schema)


def describe_index(stored: Stored) -> Shown:
    """The share of each source."""
    from less_assets.report import charts

    sources: Any = stored.manifest.summary["sources"]
    index = stored.scan(INDEX)
    drawn = charts.share_bars(sources, kind="source") if len(sources) > 1 else None
    values = {"shares_by_source": Picture(drawn, "share of each source among distinct rows")} if drawn else {}
    return Shown(values, index.select(pl.len()).collect().item(), index.collect_schema())


def describe_excluded(stored: Stored) -> Shown:
    """Every row that is left out, with its reason."""
    table = stored.table(EXCLUDED)
    return Shown({"excluded": Table(table.head(TABLE_ROWS))}, table.height, table.schema)


def base_model_work(workload: Workload, due: Sequence[str]) -> Amount:
    """One look at the model's files."""
    return Amount(units={"base_model": 1})


def pool_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Rows read and normalised, and their bytes."""
    shards = [workload.lineage.pool_files.shard(str(key)) for key in due]
    stored = sum(shard.rows * workload.samples[shard.source].stored_bytes for shard in shards)
    return Amount(units={"instruction_pool": sum(shard.rows for shard in shards)}, bytes=stored)


def refusal_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Rows encoded."""
    shards = [workload.lineage.pool_files.shard(str(key)) for key in due]
    return Amount(units={"refused_rows": sum(shard.rows for shard in shards)})


def _tokenizer_settings(project: Project) -> Mapping[str, JsonValue]:
    return {"tokenizer": project.tokenizer_settings()}


def _indexed_rows(lineage: Lineage, keys: Keys, inputs: Versions) -> Versions:
    """A shard without refused rows adds nothing: its index is the one that earlier versions made."""
    return {
        name: version
        for name, version in inputs.items()
        if not name.startswith("refused_rows/") or version != NOTHING_REFUSED
    }


def _model_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    stamp = model_stamp(lineage.project.model.base, lambda: recorded(lineage, "base_model", keys))
    return {"model": lineage.project.model_settings(), "stamp": stamp}


def _source_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.source_settings(lineage.pool_files.shard(keys["shard"]).source)


def _exclude_files(lineage: Lineage, keys: Keys) -> dict[str, str]:
    from less_assets.method.data.row_files import file_digest, list_files

    return {"files": digest([file_digest(file) for path in lineage.project.exclude for file in list_files(path)])}


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
        name="refused_rows",
        group="pool",
        kinds=frozenset({"huggingface", "parquet"}),
        description=(
            "Rows of one shard that leave nothing to train on: refused by the base model's chat template, or too long."
        ),
        axes=("shard",),
        inputs=(Input("base_model"), Input("instruction_pool")),
        folder="refused/{shard}",
        settings=lambda lineage, keys: _tokenizer_settings(lineage.project),
        shared_settings=_tokenizer_settings,
        compute=refuse_rows,
        describe=describe_refused,
        in_ranges=True,
        amount=refusal_work,
        speed=Guess(seconds=ENCODED_ROW_SECONDS),
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: ENCODED_ROW_SECONDS * lineage.pool_files.shard(keys["shard"]).rows,
        columns_from={"instruction_pool": {"example_id": ["example_id"]}},
    ),
    Asset(
        name="pool_index",
        group="pool",
        kinds=frozenset({"polars", "parquet"}),
        description="Where every usable example of the pool stands, how often, and which copy counts.",
        inputs=(Input("instruction_pool"), Input("refused_rows")),
        folder="pool_index",
        # A removed source changes no partition that is left; by this Dagster sees that the index is another one.
        shared_settings=lambda project: {"sources": [*sorted(source.name for source in project.pool.sources)]},
        determined_by=_indexed_rows,
        compute=index_pool,
        describe=describe_index,
        checks=(few_rows_quarantined, evaluation_not_in_pool),
        rehearsal_seconds=lambda lineage, keys: INDEX_ROW_SECONDS * lineage.pool_files.rows,
        columns_from={"instruction_pool": ROW_COLUMNS},
    ),
    Asset(
        name="excluded_rows",
        group="pool",
        kinds=frozenset({"polars", "parquet"}),
        description="Rows of the pool that the project leaves out of every selection, with their reasons.",
        inputs=(Input("pool_index"),),
        folder="excluded_rows",
        outside=_exclude_files,
        needed_by=lambda project, recipe: bool(project.exclude),
        compute=list_excluded,
        automatic=True,
        describe=describe_excluded,
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: INDEX_ROW_SECONDS * lineage.pool_files.rows,
        columns_from={"pool_index": {"source": ["source"], "in_pool": ["example_id"]}},
    ),
)
