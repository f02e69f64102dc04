"""Physical rows of data files (JSON lines and arrays, CSV, Parquet, Arrow): counting, reading a range, digests.

Belongs here: finding and opening files, ranges of their rows. A broken row is reported with a reason and keeps its
position. How bytes become rows is `text_rows.py`, `json_array.py` and `parquet_rows.py`; what a record means (formats,
roles, turns) is the matter of `examples.py`.
"""

import fnmatch
import glob
import hashlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import fsspec
import pyarrow as pa

from less_assets.errors import PoolFormatError
from less_assets.method.data.json_array import ArrayElements
from less_assets.method.data.parquet_rows import (
    arrow_digests,
    count_arrow_rows,
    open_parquet,
    parquet_digests,
    read_arrow_rows,
    read_parquet_rows,
)
from less_assets.method.data.raw_rows import BLOCK_BYTES, Place, RawRow
from less_assets.method.data.text_rows import (
    BYTE_ORDER_MARK,
    CsvRecord,
    CsvRecords,
    DialectName,
    Lines,
    count_lines,
    read_csv_records,
    read_json,
    repeated,
)

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_BINARY = {"parquet", "arrow"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# Files that describe a dataset and hold no rows, by pattern of their names in small letters.
_METADATA = ("dataset_info*.json", "dataset_dict.json", "state.json", "config.json", "readme*")
# Words that name a split -> its name, as Hugging Face's `datasets` knows them.
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
    "heldout": "test",
    "held-out": "test",
    "held_out": "test",
}
_SPLIT_WORD = re.compile(rf"(?:^|(?<=[-._ ]))({'|'.join(_SPLITS)})(?=[-._ 0-9]|$)", re.IGNORECASE)
# How the parts of one table are numbered, as in `train-00000-of-00002.parquet`.
_PART = re.compile(r"(?P<table>.*)-(?P<number>\d{5})-of-(?P<parts>\d{5})(?P<suffix>\..+)")
_ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*(?:\{|\Z)")
# A first line that ends so goes on in the next: no row in a line of its own does.
_GOES_ON = re.compile(rb"\s*[\[{][^\r\n]*(?<=[\[{,])[ \t]*[\r\n]")
# How files begin that are no text.
_NOT_TEXT = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}

SourceDialect = Literal["auto"] | DialectName
"""How CSV and TSV files are written; `auto`: `.csv` as RFC 4180 says, `.tsv` without quoting."""


class FoundFiles(NamedTuple):
    """What a path stands for.

    Attributes:
        files: Data files, sorted.
        skipped: What else lies there and is not read, sorted: metadata, files of kinds that are not known, and
            subfolders with data where the folder has data files of its own.
    """

    files: list[str]
    skipped: list[str]


class RowRange(NamedTuple):
    """What is known of a range of rows.

    Attributes:
        digest: blake2b-128 of its rows' content, in hex.
        begins: Where its first row begins: `read_raw` goes there without reading what comes before.
    """

    digest: str
    begins: Place


def list_files(path: str) -> list[str]:
    """Return the data files that a path stands for, sorted; see `look_into`.

    Raises:
        PoolFormatError: As `look_into`.
    """
    return look_into(path).files


def look_into(path: str) -> FoundFiles:
    """Find the data files that a path stands for, and what is beside them.

    A folder that Hugging Face's `save_to_disk` has written is read through the Arrow files that its `state.json` names.

    Args:
        path: A file, a folder (its own data files; without any, those of its one subfolder that has some, as in the
            Hub's `data/`) or a glob pattern; local or any fsspec URL such as `s3://…`, `hf://datasets/…` or
            `zip://folder/file.jsonl::hf://…/archive.zip`. Local paths stay relative if given so.

    Raises:
        PoolFormatError: If there is no such file, none that matches, or if a folder holds several splits, several
            subfolders with data, or some of the numbered parts of a table only.
    """
    with _reading(path):
        filesystem, stripped = fsspec.url_to_fs(path)
        if filesystem.isfile(stripped):
            return FoundFiles([path], [])
        is_folder = filesystem.isdir(stripped)
        if "://" in path:
            pattern = f"{glob.escape(stripped.rstrip('/'))}/*" if is_folder else stripped
            paths = [_url(filesystem, match, path) for match in filesystem.glob(pattern)]
        else:
            paths = glob.glob(f"{glob.escape(path.rstrip('/'))}/*" if is_folder else path, recursive=True)
        shards = _saved_shards(filesystem, stripped) if is_folder else None
        files = sorted(file for file in paths if _is_data(file) and (shards is None or _name(file) in shards))
        others = sorted(set(paths) - set(files))
        below = _folders_with_data(filesystem, others) if is_folder else []
        if is_folder:
            _refuse_several_splits(path, files or below)
            _refuse_missing_parts(path, files)
        if not files and len(below) == 1:
            inner = look_into(below[0])
            others = [*(other for other in others if other not in below), *inner.skipped]
            files = inner.files
        elif not files and below:
            raise PoolFormatError(
                "The folder has no data file of its own, and several subfolders with some.",
                where=path,
                fix=f"write which one is meant: {', '.join(f'`{folder}`' for folder in below)}; "
                "if all are, give each a source of its own",
            )
        if not files:
            raise PoolFormatError(
                "No data file found.",
                where=path,
                fix="give a .jsonl, .csv, .tsv, .parquet or .arrow file, a folder or a pattern",
            )
        skipped = sorted(file for file in others if file in below or not filesystem.isdir(fsspec.url_to_fs(file)[1]))
    return FoundFiles(files, skipped)


def _folders_with_data(filesystem: fsspec.AbstractFileSystem, paths: list[str]) -> list[str]:
    """Those of the paths that are folders with a data file in them or below; hidden ones do not count."""
    folders = []
    for path in paths:
        stripped = fsspec.url_to_fs(path)[1]
        hidden = _name(path).startswith((".", "__"))
        if not hidden and filesystem.isdir(stripped) and any(map(_is_data, filesystem.find(stripped))):
            folders.append(path)
    return folders


def _is_data(path: str) -> bool:
    return _suffix(path) in _KINDS and not any(fnmatch.fnmatch(_name(path).lower(), name) for name in _METADATA)


def _name(path: str) -> str:
    return path.partition("::")[0].rstrip("/").rsplit("/", 1)[-1]


def _saved_shards(filesystem: fsspec.AbstractFileSystem, folder: str) -> set[str] | None:
    """Names of the files that make up a dataset saved with `save_to_disk`; None for any other folder.

    Beside them lie caches of earlier computations (`cache-….arrow`), which are not the dataset.
    """
    state = f"{folder.rstrip('/')}/state.json"
    if not filesystem.isfile(state):
        return None
    content = json.loads(filesystem.cat_file(state))
    shards = content.get("_data_files") if isinstance(content, dict) else None
    if not shards:
        return None
    names = {str(shard["filename"]) for shard in shards}
    missing = sorted(name for name in names if not filesystem.isfile(f"{folder.rstrip('/')}/{name}"))
    if missing:
        raise PoolFormatError(
            f"Of the {len(names)} files that make up this dataset, {len(missing)} are not there: {missing[0]}"
            + (", …" if len(missing) > 1 else "."),
            where=state,
            fix="copy the whole folder again, or give the files that are there as a pattern",
        )
    if content.get("_indices_data_files"):
        raise PoolFormatError(
            "This dataset is a choice of rows from its files, and which ones stands in a file of indices.",
            where=state,
            fix="save it again with `dataset.flatten_indices().save_to_disk(...)`",
        )
    return names


def _refuse_several_splits(path: str, names: list[str]) -> None:
    """Refuse a folder whose files, or whose subfolders in place of files, are of several splits."""
    splits: dict[str, str] = {}
    for name in names:
        if split := _split(name):
            splits.setdefault(_SPLITS[split[0]], split[1])
    unnamed = [_name(name) for name in names if not _split(name)]
    if unnamed and splits.keys() & {"validation", "test"}:  # which of them the pool is, is not known
        splits["files of no split"] = unnamed[0]
    if len(splits) > 1:
        inner, chain, archive = path.partition("::")
        folder = inner.rstrip("/")
        patterns = ", ".join(f"`{folder}/{pattern}{chain}{archive}`" for _, pattern in sorted(splits.items()))
        raise PoolFormatError(
            f"The folder holds several splits: {', '.join(sorted(splits))}; a pool is made of one of them.",
            where=path,
            fix=f"write which one is meant: {patterns}",
        )


def _refuse_missing_parts(path: str, files: list[str]) -> None:
    """Refuse a folder whose files are numbered as parts of a whole, and not all are there."""
    tables: dict[tuple[str, int, str], set[int]] = {}
    for match in (_PART.fullmatch(_name(file)) for file in files):
        if match:
            numbered_as = (match["table"], int(match["parts"]), match["suffix"])
            tables.setdefault(numbered_as, set()).add(int(match["number"]))
    for (table, parts, suffix), numbers in tables.items():
        if missing := sorted(set(range(parts)) - numbers):
            raise PoolFormatError(
                f"Of the {parts} files `{table}-…-of-{parts:05d}{suffix}`, {len(missing)} are not there: "
                f"{table}-{missing[0]:05d}-of-{parts:05d}{suffix}" + (", …" if len(missing) > 1 else "."),
                where=path,
                fix="fetch the others, or give the files that are there as a pattern, if they are meant",
            )


def _split(path: str) -> tuple[str, str] | None:
    """Word for the split in a file's or folder's name, and a pattern that matches the split's files."""
    name = _name(path)
    match = _SPLIT_WORD.search(name)
    if match is None:
        return None
    if not _suffix(path):
        return match[1].lower(), name
    return match[1].lower(), f"{name[: match.end(1)]}*"


def files_below(path: str) -> list[str]:
    """Return every file of a folder and its subfolders, or the file itself, as URLs, sorted; none if nothing is there.

    Args:
        path: Local path or fsspec URL, also into an archive.

    Raises:
        PoolFormatError: If it cannot be looked at.
    """
    with _reading(path):
        filesystem, stripped = fsspec.url_to_fs(path)
        return [_url(filesystem, file, path) for file in sorted(filesystem.find(stripped))]


def dialect_of(path: str, dialect: SourceDialect = "auto") -> DialectName | None:
    """The dialect in which a file is read; None where it is neither CSV nor TSV."""
    kind = _KINDS.get(_suffix(path))
    if kind not in ("csv", "tsv"):
        return None
    if dialect != "auto":
        return dialect
    return "comma" if kind == "csv" else "tab"


def row_rule(path: str, dialect: SourceDialect = "auto") -> str | None:
    """What decides where the rows of a text file begin; None for other files, which say it themselves.

    A file that was looked at under another rule must be looked at again.
    """
    return dialect_of(path, dialect) or ("any line end" if _KINDS.get(_suffix(path)) == "jsonl" else None)


def count_rows(path: str, dialect: SourceDialect = "auto") -> int:
    """Return the number of physical rows of a file, blank and broken ones included, as `read_raw` yields them.

    Args:
        path: Local path or fsspec URL.
        dialect: Of CSV and TSV files.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
    """
    kind = _kind(path)
    with _reading(path), _open(path, None if kind in _BINARY else "infer") as stream:
        if kind == "parquet":
            return int(open_parquet(stream).metadata.num_rows)
        if kind == "arrow":
            return count_arrow_rows(stream)
        if kind == "jsonl":
            lines = _json(path, stream)
            return count_lines(stream) if isinstance(lines, Lines) else sum(1 for _ in lines)
        return sum(1 for _ in _csv(path, stream, dialect)[0])


def read_raw(
    path: str,
    first_row: int = 0,
    max_rows: int | None = None,
    begins: tuple[int, int] | None = None,
    dialect: SourceDialect = "auto",
) -> Iterator[RawRow]:
    r"""Yield the rows `first_row`, … of a file, in order, holding a few rows in memory at a time.

    Lines end at `\n`, `\r\n` or `\r`: in JSON none of them stands inside a string, while U+2028 and its kin there are
    data. In CSV files the first record is the header, and a quoted field may span lines.

    Args:
        path: Local path or fsspec URL; `.jsonl`, `.ndjson`, `.json` (one object a line, or one array of them), `.csv`,
            `.tsv`, `.parquet`, `.arrow` (IPC stream or file), the text formats also compressed (`.gz`, `.bz2`,
            `.xz`, `.zst`).
        first_row: Rows to leave out at the start (0-based index of the first row to yield).
        max_rows: At most so many rows; None: all.
        begins: Where `first_row` begins, a `Place` of `scan_ranges`; None: the rows before it are read and left out.
        dialect: Of CSV and TSV files.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
    """
    kind = _kind(path)
    with _reading(path), _open(path, None if kind in _BINARY else "infer") as stream:
        if kind == "parquet":
            rows = read_parquet_rows(stream, first_row)
        elif kind == "arrow":
            rows = read_arrow_rows(stream, first_row)
        elif kind == "jsonl":
            rows = read_json(_json(path, stream), first_row, begins)
        else:
            records, header = _csv(path, stream, dialect)
            rows = read_csv_records(records, header.fields or [] if header else [], first_row, begins)
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


def scan_ranges(path: str, ranges: Sequence[tuple[int, int]], dialect: SourceDialect = "auto") -> list[RowRange]:
    r"""Return a digest of the content of each range of rows, and where it begins, in one pass over the file.

    Equal content gives equal digests wherever the rows stand, so the first range whose digest changed holds the first
    edited row. JSON lines are hashed as bytes without their `\n`, elements of an array as bytes, CSV records as bytes
    together with the header and the dialect, Parquet and Arrow rows by name and value.

    Args:
        path: Local path or fsspec URL.
        ranges: (first row, number of rows) of each range: ascending, not overlapping, 0-based.
        dialect: Of CSV and TSV files.

    Returns:
        One entry per range; a range beyond the end of the file hashes the rows that exist.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
        ValueError: If the ranges are not ascending.
    """
    scanned, position = [], 0
    if any(after[0] < before[0] + before[1] for before, after in itertools.pairwise(ranges)):
        raise ValueError(f"ranges must ascend without overlap: {list(ranges)}")
    with _reading(path), _row_digests(path, dialect) as (rows, next_place):
        for first_row, count in ranges:
            for _ in itertools.islice(rows, first_row - position):
                pass
            begins, digest = next_place(), hashlib.blake2b(digest_size=16)
            for row in itertools.islice(rows, count):
                digest.update(row)
            position = first_row + count
            scanned.append(RowRange(digest.hexdigest(), begins))
    return scanned


@contextmanager
def _row_digests(path: str, dialect: SourceDialect) -> Iterator[tuple[Iterator[bytes], Callable[[], Place]]]:
    """The digest of each row, and a function that tells where the next one begins."""
    kind = _kind(path)
    with _open(path, compression=None if kind in _BINARY else "infer") as stream:
        if kind in _BINARY:
            yield (parquet_digests if kind == "parquet" else arrow_digests)(stream), Place
        elif kind == "jsonl":
            lines = _json(path, stream)
            yield (line.digest for line in lines), lambda: lines.place
        else:
            records, header = _csv(path, stream, dialect)
            # Header and dialect are part of what each of them says.
            before = str(dialect_of(path, dialect)).encode() + (header.digest if header else b"")
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
    if kind is None or (kind in _BINARY and path.partition("::")[0].lower().endswith(_COMPRESSIONS)):
        raise PoolFormatError(
            "The kind of this file is not known by its name.", where=path, fix=f"name it {', '.join(_KINDS)}"
        )
    return kind


@contextmanager
def _open(path: str, compression: str | None = "infer") -> Iterator[io.BufferedReader]:
    # The file system must outlive the stream: an archive is closed with its file system.
    with fsspec.open(path, "rb", compression=compression) as stream:
        yield stream if hasattr(stream, "peek") else io.BufferedReader(stream)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn the many ways in which a file cannot be read into one error that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise PoolFormatError("The file does not exist.", where=path, fix="correct the path of the source") from error
    except pa.ArrowInvalid as error:
        raise PoolFormatError(f"This is not a readable Parquet or Arrow file: {error}", where=path) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise PoolFormatError(f"The file cannot be read: {error}", where=path) from error
    except (ImportError, ValueError) as error:
        raise PoolFormatError(f"This kind of path cannot be opened: {error}", where=path) from error


def _refuse_other_kinds(path: str, stream: io.BufferedReader) -> None:
    """Refuse a file that is no text in UTF-8, though its name says that it is."""
    start = stream.peek(8)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PoolFormatError(
            "This file is text in UTF-16; text is read as UTF-8.",
            where=path,
            fix="write it in UTF-8, e.g. with `iconv -f UTF-16 -t UTF-8`",
        )
    for mark, kind in _NOT_TEXT.items():
        if start.startswith(mark):
            raise PoolFormatError(f"This file is {kind}, not text.", where=path, fix="correct its name")


def _csv(path: str, stream: io.BufferedReader, dialect: SourceDialect) -> tuple[CsvRecords, CsvRecord | None]:
    """The records after the header, and the header; None if the file is empty."""
    _refuse_other_kinds(path, stream)
    name = dialect_of(path, dialect)
    assert name is not None
    records = CsvRecords(stream, name)
    header = next(records, None)
    if header and header.error:
        raise PoolFormatError(
            f"The header cannot be read: {header.error}.",
            where=f"{path}, line {header.line}",
            fix="correct it, or state the source's `dialect` in the project file",
        )
    if header and (equal := repeated(header.fields or [])):
        raise PoolFormatError(
            f"Two columns have the same name {equal[0]!r}; which one is meant is not known.",
            where=f"{path}, line {header.line}",
            fix="rename or remove one of them",
        )
    return records, header


def _json(path: str, stream: io.BufferedReader) -> Lines | ArrayElements:
    """The lines of a file of JSON; the elements of one that is named `.json` and is an array."""
    _refuse_other_kinds(path, stream)
    start = stream.peek(4096).removeprefix(BYTE_ORDER_MARK)
    if _suffix(path) == ".json" and start.lstrip().startswith(b"["):
        return ArrayElements(stream, path)
    if _ARRAY_OF_OBJECTS.match(start):
        raise PoolFormatError(
            "This file is one JSON array, though its name says JSON lines.",
            where=path,
            fix="""name it .json, or write one object a line, e.g. with `jq -c '.[]' file.json > file.jsonl`""",
        )
    if _GOES_ON.match(start):
        raise PoolFormatError(
            "The first line of this file is not a whole JSON value: it goes on in the next line.",
            where=path,
            fix="write one object a line, e.g. with `jq -c . file.json > file.jsonl`, or with `jq -c '.data[]'` where "
            "the rows are a list in an object; if the file holds no rows, name the others by a pattern",
        )
    return Lines(stream)
