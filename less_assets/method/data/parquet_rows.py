"""Rows of Parquet and Arrow files, a batch at a time; a damaged page shifts none of them.

Belongs here: a Parquet or Arrow stream to raw rows. Opening files is `row_files.py`.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from less_assets.method.data import raw_rows
from less_assets.method.data.raw_rows import RawRow, too_large
from less_assets.method.data.text_rows import repeated

_BATCH_ROWS = 64
_ARROW_FILE = b"ARROW1"


def read_parquet_rows(stream: io.BufferedIOBase, first_row: int) -> Iterator[RawRow]:
    """The rows from `first_row` on; row groups before it are not read."""
    file = open_parquet(stream)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    groups = [group for group, end in enumerate(ends) if end > first_row]
    if not groups:
        return
    yield from _rows(_batches(file, groups), ends[groups[0]] - sizes[groups[0]], first_row)


def _rows(batches: Iterable[pa.RecordBatch], start: int, first_row: int) -> Iterator[RawRow]:
    """The rows from `first_row` on of batches that begin with row `start`."""
    for batch in batches:
        skipped = min(max(0, first_row - start), batch.num_rows)
        for number, (record, problem) in enumerate(_records(batch.slice(skipped)), start=start + skipped + 1):
            size = _text_size(record)
            if record is None:
                yield RawRow(number, None, "invalid_utf8", problem)
            elif size > raw_rows.MAX_ROW_BYTES:
                yield RawRow(number, None, "too_large", too_large(size))
            else:
                yield RawRow(number, _stated_fields(record))
        start += batch.num_rows


def parquet_digests(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """blake2b-128 of each row's names and values."""
    file = open_parquet(stream)
    yield from _digests(_batches(file, range(file.num_row_groups)))


def read_arrow_rows(stream: io.BufferedIOBase, first_row: int) -> Iterator[RawRow]:
    """The rows from `first_row` on; those before it are read, but not turned into records."""
    yield from _rows(arrow_batches(stream), 0, first_row)


def arrow_digests(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """blake2b-128 of each row's names and values, the same as for Parquet."""
    yield from _digests(arrow_batches(stream))


def count_arrow_rows(stream: io.BufferedIOBase) -> int:
    """Number of rows, by reading them."""
    return sum(batch.num_rows for batch in arrow_batches(stream))


def arrow_batches(stream: io.BufferedIOBase) -> Iterator[pa.RecordBatch]:
    """The rows of an Arrow IPC stream, as Hugging Face's `save_to_disk` writes it, or of an Arrow IPC file.

    Raises:
        pyarrow.ArrowInvalid: It is damaged, or two columns have the same name.
    """
    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    if is_file:
        file = pa.ipc.open_file(stream)
        schema, batches = file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
    else:
        reader = pa.ipc.open_stream(stream)
        schema, batches = reader.schema, iter(reader)
    _refuse_equal_names(schema.names)
    for batch in batches:
        for first in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(first, _BATCH_ROWS)


def _refuse_equal_names(names: Sequence[str]) -> None:
    if equal := repeated(names):
        raise pa.ArrowInvalid(f"two columns have the name {equal[0]!r}")


def _digests(batches: Iterable[pa.RecordBatch]) -> Iterator[bytes]:
    for batch in batches:
        for record, _ in _records(batch):
            text = json.dumps(record, sort_keys=True, default=repr, ensure_ascii=True)
            yield hashlib.blake2b(text.encode(), digest_size=16).digest()


def open_parquet(stream: io.BufferedIOBase) -> pq.ParquetFile:
    """Read a file's footer.

    Raises:
        pyarrow.ArrowInvalid: It is damaged, disagrees with itself, or two columns have the same name.
    """
    file = pq.ParquetFile(stream)
    _refuse_equal_names(file.schema_arrow.names)
    counted = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    if file.metadata.num_rows != counted:
        raise pa.ArrowInvalid(f"its footer says {file.metadata.num_rows} rows, its row groups {counted}")
    return file


def _batches(file: pq.ParquetFile, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """The rows of row groups; a damaged page can hold fewer of them than were counted, and no row may shift."""
    left = sum(file.metadata.row_group(group).num_rows for group in groups)
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
        left -= batch.num_rows
        yield batch
    if left:
        raise pa.ArrowInvalid(f"it holds {abs(left)} rows {'fewer' if left > 0 else 'more'} than its footer says")


def _records(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, object] | None, str | None]]:
    """Yield (record, None) per row, or (None, problem) where a string is not UTF-8."""
    try:
        yield from ((record, None) for record in batch.to_pylist())
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0], None
            except UnicodeDecodeError as error:
                yield None, f"a string is not UTF-8: {error.reason}"


def _stated_fields(record: Mapping[str, object]) -> dict[str, object]:
    """A record without the null fields of its objects: a column has one type, so that each row has all rows' fields.

    Else a call to one tool would have the arguments of every other, as null.
    """
    return {name: _stated(inner) for name, inner in record.items() if inner is not None}


def _stated(value: object) -> object:
    if isinstance(value, dict):
        return _stated_fields(value)
    return list(map(_stated, value)) if isinstance(value, list) else value


def _text_size(value: object) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list) else 0
