"""The rows of a pool as tables: usable ones with their conversation and id, quarantined ones with the reason.

Belongs here: `PoolRow`, its table, and reading a file into such tables. Which rows are conversations is
`row_formats.py`, physical rows of files are `row_files.py`, token ids `chat.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from less_assets.method.data.conversations import MESSAGES_TYPE, Message, example_id
from less_assets.method.data.raw_rows import RawRow
from less_assets.method.data.row_files import SourceDialect, read_raw
from less_assets.method.data.row_formats import RowFormat, UnusableRowError, normalize, unknown_keys

POOL_SCHEMA = pl.Schema(
    {
        "example_id": pl.String(),
        "source": pl.String(),
        "source_file": pl.String(),
        "source_row": pl.Int64(),
        "messages": MESSAGES_TYPE,
        "tools": pl.String(),
        "status": pl.String(),
        "detail": pl.String(),
    }
)
"""Columns of a table of pool rows; see `PoolRow`."""

_BATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class PoolRow:
    """One physical row of a pool source, usable or quarantined.

    Attributes:
        example_id: Content-derived id; None unless the status is "ok".
        source: Name of the source.
        source_file: File as listed in the source.
        source_row: 1-based row in that file (line, CSV record or Parquet row).
        messages: The turns; None unless the status is "ok".
        tools: JSON text of the tool schemas; None if there are none.
        status: "ok", or a key of `row_formats.ROW_STATUSES`, one of them followed by a field's name.
        detail: What exactly is wrong, for a person; None if nothing is.
    """

    example_id: str | None
    source: str
    source_file: str
    source_row: int
    messages: list[Message] | None
    tools: str | None
    status: str
    detail: str | None


def read_rows(
    path: str,
    source: str,
    format: RowFormat = "auto",
    first_row: int = 0,
    max_rows: int | None = None,
    batch_rows: int = 1024,
    begins: tuple[int, int] | None = None,
    dialect: SourceDialect = "auto",
    unknown: Counter[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """Read the rows of a file (or a range of them) as tables; every physical row gives one table row.

    A row that cannot be used is quarantined: its status and detail say why, and nothing shifts. Memory is bounded by
    the batch, not by the file.

    Args:
        path: Local path or fsspec URL of a JSONL, CSV, Parquet or Arrow file; see `row_files.read_raw`.
        source: Name of the source, for the column.
        format: Format of the records; see `row_formats.normalize`.
        first_row: 0-based index of the first row to read.
        max_rows: At most so many rows; None: to the end.
        batch_rows: Rows per table at most; fewer where rows are large.
        begins: Where `first_row` begins, if that is known: a `raw_rows.Place`.
        dialect: Of CSV and TSV files.
        unknown: Counts the usable rows with each unknown key, if it is given; see `row_formats.unknown_keys`.

    Yields:
        Tables with `POOL_SCHEMA`.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
    """
    batch: list[PoolRow] = []
    size = 0
    for raw in read_raw(path, first_row, max_rows, begins, dialect):
        row = _pool_row(raw, source, path, format)
        if unknown is not None and raw.record is not None and row.status == "ok":
            unknown.update(unknown_keys(raw.record, format))
        batch.append(row)
        size += _text_size(row)
        if len(batch) == batch_rows or size > _BATCH_BYTES:
            yield pool_table(batch)
            batch, size = [], 0
    if batch:
        yield pool_table(batch)


def pool_table(rows: Sequence[PoolRow]) -> pl.DataFrame:
    """Return pool rows as a table with `POOL_SCHEMA`.

    Args:
        rows: Any number of rows.
    """
    columns = zip(*map(_columns, rows), strict=True) if rows else ([] for _ in POOL_SCHEMA)
    return pl.DataFrame(
        [
            pl.Series(name, list(column), dtype)
            for (name, dtype), column in zip(POOL_SCHEMA.items(), columns, strict=True)
        ]
    )


def _columns(row: PoolRow) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in POOL_SCHEMA)


def _text_size(row: PoolRow) -> int:
    texts = (text for message in row.messages or () for text in message.values())
    return sum(len(text) for text in (*texts, row.tools) if isinstance(text, str))


def _pool_row(raw: RawRow, source: str, path: str, format: RowFormat) -> PoolRow:
    if raw.record is None:
        return PoolRow(None, source, path, raw.number, None, None, raw.status, raw.detail)
    try:
        messages, tools = normalize(raw.record, format)
    except UnusableRowError as problem:
        return PoolRow(None, source, path, raw.number, None, None, problem.status, problem.detail)
    return PoolRow(example_id(messages, tools), source, path, raw.number, messages, tools, "ok", None)
