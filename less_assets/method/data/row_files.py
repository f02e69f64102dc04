"""Physical rows of data files (JSON lines, CSV, Parquet): counting, reading a range, digests.

Belongs here: finding and opening files, ranges of their rows. A broken row is reported with a reason and keeps its
position. How bytes become rows is `text_rows.py` and `parquet_rows.py`; what a record means (formats, roles, turns)
is the matter of `examples.py`.
"""

import glob
import hashlib
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import fsspec
import pyarrow as pa

from less_assets.errors import PoolFormatError
from less_assets.method.data.parquet_rows import open_parquet, parquet_digests, read_parquet_rows
from less_assets.method.data.raw_rows import Place, RawRow
from less_assets.method.data.text_rows import (
    BLOCK_BYTES,
    BYTE_ORDER_MARK,
    CsvRecords,
    Lines,
    count_lines,
    read_csv_records,
    read_json_lines,
)

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


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
                return int(open_parquet(stream).metadata.num_rows)
        with _open(path) as stream:
            if kind == "jsonl":
                _refuse_json_array(path, stream)
                return count_lines(stream)
            return sum(1 for _ in itertools.islice(CsvRecords(stream, kind), 1, None))


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
                yield from itertools.islice(read_parquet_rows(stream, first_row), max_rows)
        else:
            with _open(path) as stream:
                if kind == "jsonl":
                    _refuse_json_array(path, stream)
                    rows = read_json_lines(stream, first_row, begins)
                else:
                    rows = read_csv_records(stream, kind, first_row, begins)
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
        while block := stream.read(BLOCK_BYTES):
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
            yield parquet_digests(stream), Place
        elif kind == "jsonl":
            lines = Lines(stream)
            yield (line.digest for line in lines), lambda: lines.place
        else:
            records = CsvRecords(stream, kind)
            header = next(records, None)
            before = header.digest if header else b""  # the header is part of what each of them says
            yield (before + row.digest for row in records), lambda: records.place


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
        start = stream.read(64).removeprefix(BYTE_ORDER_MARK).lstrip()
        stream.seek(0)
        if start.startswith(b"["):
            raise PoolFormatError(
                "This file is one JSON array; rows cannot be streamed from it.",
                where=path,
                fix="""write one object a line, e.g. with `jq -c '.[]' file.json > file.jsonl`""",
            )
