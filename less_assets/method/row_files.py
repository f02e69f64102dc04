"""Physical rows of data files (JSON lines, CSV, Parquet): counting, reading a range, digests.

Belongs here: bytes to raw records, row by row, in memory that does not grow with the file. A broken row is reported
with a reason and keeps its position. What a record means (formats, roles, turns) is the matter of `examples.py`.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from less_assets.errors import PoolFormatError

MAX_ROW_BYTES = 1_000_000
"""Rows with more bytes are not parsed but reported as `too_large`: at 4 bytes a token far beyond any context."""

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BLOCK_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRow:
    """One physical row of a file.

    Attributes:
        number: 1-based row in the file: the line of a JSONL file, the record after the header of a CSV file, the row of
            a Parquet file.
        record: Field name to value; None if the row cannot be read.
        status: "ok", or why there is no record: "blank", "invalid_json", "invalid_csv", "invalid_utf8",
            "wrong_type", "too_large".
        detail: The same for a person; None if the row is ok or blank.
    """

    number: int
    record: dict[str, Any] | None
    status: str = "ok"
    detail: str | None = None


class Place(NamedTuple):
    """Where a row of a text file begins; 0 and 0 for Parquet files, whose rows are found by their footer.

    Attributes:
        offset: Bytes before it, of the content after decompression.
        line: Lines before it.
    """

    offset: int = 0
    line: int = 0


class RowRange(NamedTuple):
    """What is known of a range of rows.

    Attributes:
        digest: blake2b-128 of its rows' content, in hex.
        begins: Where its first row begins: `read_raw` goes there without reading what comes before.
    """

    digest: str
    begins: Place


def list_files(path: str) -> list[str]:
    """Return the data files that a path stands for, sorted.

    Args:
        path: A file, a folder (its data files, not those of subfolders) or a glob pattern; local or any fsspec URL such
            as `s3://…`, `hf://datasets/…` or `zip://folder/file.jsonl::hf://…/archive.zip`. Local paths stay relative
            if given so.

    Raises:
        PoolFormatError: If there is no such file, or none that matches.
    """
    with _reading(path):
        filesystem, stripped = fsspec.url_to_fs(path)
        if filesystem.isfile(stripped):
            return [path]
        is_folder = filesystem.isdir(stripped)
        if "://" in path:
            pattern = f"{glob.escape(stripped.rstrip('/'))}/*" if is_folder else stripped
            found = [_url(filesystem, each, path) for each in filesystem.glob(pattern)]
        else:
            found = glob.glob(f"{glob.escape(path.rstrip('/'))}/*" if is_folder else path, recursive=True)
    found = [each for each in found if _suffix(each) in _KINDS]
    if not found:
        raise PoolFormatError(
            "No data file found.", where=path, fix="give a .jsonl, .csv, .tsv or .parquet file, a folder or a pattern"
        )
    return sorted(found)


def files_below(path: str) -> list[str]:
    """Return every file of a folder and its subfolders, or the file itself, as URLs, sorted; none if nothing is there.

    Args:
        path: Local path or fsspec URL, also into an archive.

    Raises:
        PoolFormatError: If it cannot be looked at.
    """
    with _reading(path):
        filesystem, stripped = fsspec.url_to_fs(path)
        return [_url(filesystem, each, path) for each in sorted(filesystem.find(stripped))]


def count_rows(path: str) -> int:
    """Return the number of physical rows of a file, blank and broken ones included, as `read_raw` yields them.

    Args:
        path: Local path or fsspec URL.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
    """
    kind = _kind(path)
    with _reading(path):
        if kind == "parquet":
            with _open(path, compression=None) as stream:
                return int(_parquet_file(stream).metadata.num_rows)
        with _open(path) as stream:
            if kind == "jsonl":
                _refuse_json_array(path, stream)
                return _count_lines(stream)
            return sum(1 for _ in itertools.islice(_CsvRecords(stream, kind), 1, None))


def read_raw(
    path: str, first_row: int = 0, max_rows: int | None = None, begins: tuple[int, int] | None = None
) -> Iterator[RawRow]:
    r"""Yield the rows `first_row`, … of a file, in order, holding a few rows in memory at a time.

    Lines end at `\n` only: U+2028 and its kin inside strings are data. In CSV files the first record is the header, and
    a quoted field may span lines.

    Args:
        path: Local path or fsspec URL; `.jsonl`, `.ndjson`, `.json` (one object a line), `.csv`, `.tsv`, `.parquet`,
            the text formats also compressed (`.gz`, `.bz2`, `.xz`, `.zst`).
        first_row: Rows to leave out at the start (0-based index of the first row to yield).
        max_rows: At most so many rows; None: all.
        begins: Where `first_row` begins, a `Place` of `scan_ranges`; None: the rows before it are read and left out.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
    """
    kind = _kind(path)
    with _reading(path):
        if kind == "parquet":
            with _open(path, compression=None) as stream:
                yield from itertools.islice(_parquet_rows(stream, first_row), max_rows)
        else:
            with _open(path) as stream:
                if kind == "jsonl":
                    _refuse_json_array(path, stream)
                    rows = _jsonl_rows(stream, first_row, begins)
                else:
                    rows = _csv_rows(stream, kind, first_row, begins)
                yield from itertools.islice(rows, max_rows)


def file_digest(path: str) -> str:
    """Return the blake2b-128 of a file's bytes as they are stored, in hex.

    Args:
        path: Local path or fsspec URL.

    Raises:
        PoolFormatError: If the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with _reading(path), _open(path, compression=None) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def scan_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[RowRange]:
    r"""Return a digest of the content of each range of rows, and where it begins, in one pass over the file.

    Equal content gives equal digests wherever the rows stand, so the first range whose digest changed holds the first
    edited row. JSON lines are hashed as bytes without their `\n`, CSV records as bytes together with the header,
    Parquet rows by name and value.

    Args:
        path: Local path or fsspec URL.
        ranges: (first row, number of rows) of each range: ascending, not overlapping, 0-based.

    Returns:
        One entry per range; a range beyond the end of the file hashes the rows that exist.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
        ValueError: If the ranges are not ascending.
    """
    found, position = [], 0
    if any(after[0] < before[0] + before[1] for before, after in itertools.pairwise(ranges)):
        raise ValueError(f"ranges must ascend without overlap: {list(ranges)}")
    with _reading(path), _row_digests(path) as (rows, next_place):
        for first_row, count in ranges:
            for _ in itertools.islice(rows, first_row - position):
                pass
            begins, digest = next_place(), hashlib.blake2b(digest_size=16)
            for each in itertools.islice(rows, count):
                digest.update(each)
            position = first_row + count
            found.append(RowRange(digest.hexdigest(), begins))
    return found


@contextmanager
def _row_digests(path: str) -> Iterator[tuple[Iterator[bytes], Callable[[], Place]]]:
    """The digest of each row, and a function that tells where the next one begins."""
    kind = _kind(path)
    with _open(path, compression=None if kind == "parquet" else "infer") as stream:
        if kind == "parquet":
            yield _parquet_digests(stream), Place
        elif kind == "jsonl":
            lines = _Lines(stream)
            yield (line.digest for line in lines), lambda: lines.place
        else:
            records = _CsvRecords(stream, kind)
            header = next(records, None)
            before = header.digest if header else b""  # the header is part of what each of them says
            yield (before + row.digest for row in records), lambda: records.place


# ---- files ----


def _url(filesystem: fsspec.AbstractFileSystem, stripped: str, path: str) -> str:
    """URL of a file found at `path`; inside an archive it goes on with where the archive is, as `path` does."""
    inner, chain, archive = path.partition("::")
    if not chain:
        return str(filesystem.unstrip_protocol(stripped))
    return f"{inner.partition('://')[0]}://{stripped.lstrip('/')}::{archive}"


def _suffix(path: str) -> str:
    name = path.partition("::")[0].rsplit("/", 1)[-1].lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return "." + name.rsplit(".", 1)[-1] if "." in name else ""


def _kind(path: str) -> str:
    kind = _KINDS.get(_suffix(path))
    if kind is None or (kind == "parquet" and path.partition("::")[0].lower().endswith(_COMPRESSIONS)):
        raise PoolFormatError(
            "The kind of this file is not known by its name.", where=path, fix=f"name it {', '.join(_KINDS)}"
        )
    return kind


@contextmanager
def _open(path: str, compression: str | None = "infer") -> Iterator[io.BufferedIOBase]:
    # The file system must outlive the stream: an archive is closed with its file system.
    with fsspec.open(path, "rb", compression=compression) as stream:
        yield stream if isinstance(stream, io.BufferedIOBase) else io.BufferedReader(stream)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn the many ways in which a file cannot be read into one error that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise PoolFormatError("The file does not exist.", where=path, fix="correct the path of the source") from error
    except pa.ArrowInvalid as error:
        raise PoolFormatError(f"This is not a readable Parquet file: {error}", where=path) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise PoolFormatError(f"The file cannot be read: {error}", where=path) from error
    except (ImportError, ValueError) as error:
        raise PoolFormatError(f"This kind of path cannot be opened: {error}", where=path) from error


def _refuse_json_array(path: str, stream: io.BufferedIOBase) -> None:
    if _suffix(path) == ".json":
        start = stream.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip()
        stream.seek(0)
        if start.startswith(b"["):
            raise PoolFormatError(
                "This file is one JSON array; rows cannot be streamed from it.",
                where=path,
                fix="""write one object a line, e.g. with `jq -c '.[]' file.json > file.jsonl`""",
            )


# ---- lines ----


@dataclass(frozen=True)
class _Line:
    content: bytes
    size: int
    quotes: int
    digest: bytes


class _Lines:
    r"""Lines of a stream that end at `\n` only; of an oversized line only the start is kept."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream, self._offset, self._line = stream, 0, 0

    @property
    def place(self) -> Place:
        """Where the next line begins."""
        return Place(self._offset, self._line)

    def skip_to(self, place: tuple[int, int]) -> None:
        """Go on with the line that begins there; streams that cannot seek are read up to it."""
        offset, self._line = place
        if self._stream.seekable():
            self._stream.seek(offset)
        else:
            left = offset - self._offset
            while left and (block := self._stream.read(min(left, _BLOCK_BYTES))):
                left -= len(block)
        self._offset = offset

    def __iter__(self) -> Iterator[_Line]:
        return self

    def __next__(self) -> _Line:
        # Two bytes more than the limit: room for `\r\n`.
        piece = kept = self._stream.readline(MAX_ROW_BYTES + 2)
        if not piece:
            raise StopIteration
        digest, size, quotes = hashlib.blake2b(digest_size=16), 0, 0
        is_first = not self._offset
        while piece:
            self._offset += len(piece)
            digest.update(piece.removesuffix(b"\n"))
            size += len(piece.removesuffix(b"\n").removesuffix(b"\r"))
            quotes += piece.count(b'"')
            piece = b"" if piece.endswith(b"\n") else self._stream.readline(MAX_ROW_BYTES + 2)
        self._line += 1
        if is_first:
            kept = kept.removeprefix(_BYTE_ORDER_MARK)
        return _Line(kept, size, quotes, digest.digest())


def _count_lines(stream: io.BufferedIOBase) -> int:
    lines, last = 0, b"\n"
    while block := stream.read(_BLOCK_BYTES):
        lines += block.count(b"\n")
        last = block
    return lines + (not last.endswith(b"\n"))


def _too_large(size: int) -> str:
    return f"{size:,} bytes, more than {MAX_ROW_BYTES:,}"


def _jsonl_rows(stream: io.BufferedIOBase, first_row: int, begins: tuple[int, int] | None) -> Iterator[RawRow]:
    lines = _Lines(stream)
    _skip(lines, first_row, begins)
    for index, line in enumerate(lines, start=first_row + 1):
        if line.size > MAX_ROW_BYTES:
            yield RawRow(index, None, "too_large", _too_large(line.size))
        elif not line.content.strip():
            yield RawRow(index, None, "blank")
        else:
            yield _parse_json_line(index, line.content)


def _skip(rows: _Lines | _CsvRecords, count: int, place: tuple[int, int] | None) -> None:
    """Leave out so many rows: go to where they end, if that is known."""
    if place is not None:
        rows.skip_to(place)
    else:
        for _ in itertools.islice(rows, count):
            pass


def _parse_json_line(number: int, line: bytes) -> RawRow:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(number, None, "invalid_utf8", f"byte {line[error.start]:#04x} at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return RawRow(
            number, None, "invalid_json", f"{error}" if isinstance(error, ValueError) else "nested too deeply"
        )
    if not isinstance(record, dict):
        return RawRow(number, None, "wrong_type", f"a JSON object is expected, not {type(record).__name__}")
    return RawRow(number, record)


# ---- CSV ----


@dataclass(frozen=True)
class _CsvRecord:
    fields: list[str] | None
    line: int
    size: int
    error: str | None
    digest: bytes


class _CsvRecords:
    """Records of a CSV stream with what they are made of; an oversized record costs no memory and shifts nothing."""

    def __init__(self, stream: io.BufferedIOBase, kind: str) -> None:
        # An unterminated quote ends as an error after so many characters instead of swallowing the rest of the file.
        csv.field_size_limit(MAX_ROW_BYTES)
        self._lines = _Lines(stream)
        self._reader = csv.reader(self._feed(), delimiter="\t" if kind == "tsv" else ",")
        self._begin_record()

    def _begin_record(self) -> None:
        self._first_line, self._size, self._digest = self.place.line + 1, 0, hashlib.blake2b(digest_size=16)

    @property
    def place(self) -> Place:
        """Where the next record begins."""
        return self._lines.place

    def skip_to(self, place: tuple[int, int]) -> None:
        """Go on with the record that begins there."""
        self._lines.skip_to(place)
        self._begin_record()

    def _feed(self) -> Iterator[str]:
        for line in self._lines:
            self._size += line.size
            self._digest.update(line.digest)
            if line.size > MAX_ROW_BYTES:
                # All that the reader needs to know of it is whether a quoted field goes on in the next line.
                yield '"\n' if line.quotes % 2 else "\n"
            else:
                yield line.content.decode("utf-8", errors="surrogateescape")

    def __iter__(self) -> Iterator[_CsvRecord]:
        return self

    def __next__(self) -> _CsvRecord:
        fields, error = None, None
        try:
            fields = next(self._reader)
        except csv.Error as problem:
            error = str(problem)
        record = _CsvRecord(fields, self._first_line, self._size, error, self._digest.digest())
        self._begin_record()
        return record


def _csv_rows(stream: io.BufferedIOBase, kind: str, first_row: int, begins: tuple[int, int] | None) -> Iterator[RawRow]:
    records = _CsvRecords(stream, kind)
    header = next(records, None)
    if header is None:
        return
    names = header.fields or []
    _skip(records, first_row, begins)
    for number, record in enumerate(records, start=first_row + 1):
        yield _csv_row(number, names, record)


def _csv_row(number: int, names: list[str], record: _CsvRecord) -> RawRow:
    at = f"line {record.line}: "
    if record.size > MAX_ROW_BYTES:
        return RawRow(number, None, "too_large", at + _too_large(record.size))
    if record.fields is None:
        return RawRow(number, None, "invalid_csv", at + str(record.error))
    if not record.fields:
        return RawRow(number, None, "blank")
    if any(not _is_text(field) for field in record.fields):
        return RawRow(number, None, "invalid_utf8", at + "a field is not UTF-8")
    if len(record.fields) != len(names):
        return RawRow(number, None, "invalid_csv", at + f"{len(record.fields)} fields, the header has {len(names)}")
    return RawRow(number, dict(zip(names, record.fields, strict=True)))


def _is_text(field: str) -> bool:
    try:
        field.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---- Parquet ----


def _parquet_rows(stream: io.BufferedIOBase, first_row: int) -> Iterator[RawRow]:
    file = _parquet_file(stream)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    groups = [group for group, end in enumerate(ends) if end > first_row]
    if not groups:
        return
    start = ends[groups[0]] - sizes[groups[0]]
    for batch in _batches(file, groups):
        skipped = min(max(0, first_row - start), batch.num_rows)
        for number, (record, problem) in enumerate(_records(batch.slice(skipped)), start=start + skipped + 1):
            size = _text_size(record)
            if problem:
                yield RawRow(number, None, "invalid_utf8", problem)
            elif size > MAX_ROW_BYTES:
                yield RawRow(number, None, "too_large", _too_large(size))
            else:
                yield RawRow(number, record)
        start += batch.num_rows


def _parquet_digests(stream: io.BufferedIOBase) -> Iterator[bytes]:
    file = _parquet_file(stream)
    for batch in _batches(file, range(file.num_row_groups)):
        for record, _ in _records(batch):
            text = json.dumps(record, sort_keys=True, default=repr, ensure_ascii=True)
            yield hashlib.blake2b(text.encode(), digest_size=16).digest()


def _parquet_file(stream: io.BufferedIOBase) -> pq.ParquetFile:
    file = pq.ParquetFile(stream)
    counted = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    if file.metadata.num_rows != counted:
        raise pa.ArrowInvalid(f"its footer says {file.metadata.num_rows} rows, its row groups {counted}")
    return file


def _batches(file: pq.ParquetFile, groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """The rows of row groups; a damaged page can hold fewer of them than were counted, and no row may shift."""
    left = sum(file.metadata.row_group(group).num_rows for group in groups)
    for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, row_groups=groups):
        left -= batch.num_rows
        yield batch
    if left:
        raise pa.ArrowInvalid(f"it holds {abs(left)} rows {'fewer' if left > 0 else 'more'} than its footer says")


def _records(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """Yield (record, None) per row, or (None, problem) where a string is not UTF-8."""
    try:
        yield from ((record, None) for record in batch.to_pylist())
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0], None
            except UnicodeDecodeError as error:
                yield None, f"a string is not UTF-8: {error.reason}"


def _text_size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list) else 0
