"""Which files the pool has, in order of first sight, and how their rows are cut into shards.

Belongs here: the ledger, its scan, its place in the store. Reading rows is `method/row_files.py` and
`method/data/examples.py`; the artifact of a shard is `instruction_pool`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import fsspec

from less_assets.errors import CorruptArtifactError, MissingArtifactError, PoolFormatError
from less_assets.lineage.plan import digest
from less_assets.project.project import Project
from less_assets.project.sections import Source
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import read_bytes, write_atomically

if TYPE_CHECKING:
    from less_assets.method.data.row_files import SourceDialect

LEDGER_FILE = "pool/ledger.json"
_Scanned = dict[tuple[str, int, int], tuple[str, tuple[int, int] | None]]
"""Path, first row and number of rows of a range → its digest, and where it begins."""


@dataclass(frozen=True)
class Segment:
    """A range of physical rows of one file: `rows` rows from the 0-based `first_row`; `digest` hashes their content.

    `begins` is where the first of them begins (bytes, lines), so that no shard reads those before it; None: not known.
    `path` is relative to the project file where the file is near it, so that a moved project keeps its artifacts;
    `data_path` gives the file.
    """

    path: str
    first_row: int
    rows: int
    digest: str
    begins: tuple[int, int] | None = None


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a source, across files where one ends; the unit that is recomputed when a row changes."""

    key: str
    source: str
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        """Physical rows, quarantined ones included."""
        return sum(segment.rows for segment in self.segments)

    @property
    def digest(self) -> str:
        """Hash of the content of all rows and of where they stand."""
        return digest([[segment.path, segment.first_row, segment.digest] for segment in self.segments])


@dataclass(frozen=True)
class _File:
    """A file as last seen; `stamp` tells cheaply whether it may have changed since."""

    path: str
    rows: int
    stamp: str


class PoolFiles:
    """The pool as last scanned.

    New files of a source go to its end, so that a row keeps its shard; an edited file changes its shards from the first
    edited row on. Removed sources drop out.
    """

    def __init__(self, files: dict[str, list[_File]], shards: list[Shard]) -> None:
        self._files = files
        self.shards = shards
        self._by_key = {shard.key: shard for shard in shards}

    def shard_keys(self) -> list[str]:
        """Keys of all shards: sources in the order of the project file, shards in row order."""
        return list(self._by_key)

    @property
    def rows(self) -> int:
        """Physical rows of all shards, quarantined ones included."""
        return sum(shard.rows for shard in self.shards)

    def shard(self, key: str) -> Shard:
        """The shard of a key.

        Raises:
            MissingArtifactError: The pool has no such shard (any more).
        """
        if key not in self._by_key:
            raise MissingArtifactError(
                f"the pool has no shard {key!r} (any more)",
                fix="scan the pool again with `less-assets run --until instruction_pool`",
            )
        return self._by_key[key]

    def refuse_changed(self, project: Project, key: str) -> None:
        """Refuse a shard whose files were written to since the scan; call it once its rows have been read.

        Else rows of today would be stored under the digest of yesterday's.

        Raises:
            PoolFormatError: The rows are not those of the scan any more.
        """
        from less_assets.method.data.row_files import scan_ranges

        dialect = project.source(self.shard(key).source).dialect
        stamps = {file.path: file.stamp for files in self._files.values() for file in files}
        for segment in self.shard(key).segments:
            file = data_path(project, segment.path)
            if _stamp(file, dialect) == stamps.get(segment.path):
                continue
            scanned = scan_ranges(file, [(segment.first_row, segment.rows)], dialect)[0]
            if scanned != (segment.digest, segment.begins):
                raise PoolFormatError(
                    "the file has changed since the pool was scanned",
                    where=f"{file}, rows {segment.first_row + 1} to {segment.first_row + segment.rows}",
                    fix="run the same command again once nobody writes to it: it scans the pool first",
                )

    @classmethod
    def load(cls, store: ArtifactStore) -> PoolFiles:
        """The ledger of the last scan; empty if there was none.

        Raises:
            CorruptArtifactError: The stored ledger is damaged.
        """
        path = store.root / LEDGER_FILE
        try:
            content = json.loads(read_bytes(path))
            files = {name: [_File(**file) for file in entries] for name, entries in content["files"].items()}
            shards = [
                Shard(entry["key"], entry["source"], tuple(_segment(**segment) for segment in entry["segments"]))
                for entry in content["shards"]
            ]
        except FileNotFoundError:
            return cls({}, [])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifactError(
                "the pool's ledger is damaged",
                where=str(path),
                fix="delete it; the next run scans the pool again (files added over time may change their order)",
            ) from error
        return cls(files, shards)

    @classmethod
    def scan(cls, project: Project, store: ArtifactStore) -> PoolFiles:
        """Look at the pool's files and write the ledger; unchanged files are not read again.

        Raises:
            PoolFormatError: A source has no file, or one cannot be read.
        """
        before = cls.load(store)
        known = {(file.path, file.stamp): file.rows for files in before._files.values() for file in files}
        unchanged = {path for path, _ in known}
        files: dict[str, list[_File]] = {}
        for source in project.pool.sources:
            files[source.name] = _look(
                project, source, [file.path for file in before._files.get(source.name, [])], known
            )
            unchanged -= {file.path for file in files[source.name] if (file.path, file.stamp) not in known}
        scanned: _Scanned = {
            (segment.path, segment.first_row, segment.rows): (segment.digest, segment.begins)
            for shard in before.shards
            for segment in shard.segments
            if segment.path in unchanged and segment.begins is not None
        }
        shards = [
            shard for source in project.pool.sources for shard in _cut(project, source, files[source.name], scanned)
        ]
        pool_files = cls(files, shards)
        content = {
            "files": {name: [asdict(file) for file in entries] for name, entries in files.items()},
            "shards": [asdict(shard) for shard in shards],
        }
        write_atomically(store.root / LEDGER_FILE, json.dumps(content, indent=1).encode())
        return pool_files


def data_path(project: Project, path: str) -> str:
    """The file that a path in the ledger means: absolute, or a URL."""
    return path if "://" in path or os.path.isabs(path) else os.path.normpath(project.folder / path)


def _look(project: Project, source: Source, known_order: list[str], known: dict[tuple[str, str], int]) -> list[_File]:
    """The source's files, known ones first and in their old order, with row counts."""
    from less_assets.method.data.row_files import count_rows, list_files

    listed = [project.as_written(path) for path in list_files(source.path)]
    order = [path for path in known_order if path in set(listed)]
    order += [path for path in listed if path not in set(order)]
    files = []
    for path in order:
        file = data_path(project, path)
        stamp = _stamp(file, source.dialect)
        rows = known.get((path, stamp))
        files.append(_File(path, count_rows(file, source.dialect) if rows is None else rows, stamp))
    return files


def _segment(begins: list[int] | None = None, **stored: Any) -> Segment:
    return Segment(**stored, begins=None if begins is None else (begins[0], begins[1]))


def _stamp(path: str, dialect: SourceDialect) -> str:
    """Size and time of change; the rule by which rows begin too, since under another one they may begin elsewhere."""
    from less_assets.method.data.row_files import row_rule

    filesystem, stripped = fsspec.url_to_fs(path)
    info = filesystem.info(stripped)
    names = ("mtime", "ETag", "etag", "LastModified", "md5", "CRC")  # the last is an archive member's
    changed = next((info[name] for name in names if info.get(name)), None)
    rule = row_rule(path, dialect)
    return f"{info.get('size')}-{changed}" + (f"-{rule}" if rule else "")


def _cut(project: Project, source: Source, files: list[_File], scanned: _Scanned) -> list[Shard]:
    """Cut the rows of all files, one after another, into shards of `pool.shard_size` rows."""
    shard_size = project.pool.shard_size
    left = sum(file.rows for file in files) if source.limit is None else source.limit
    pieces: list[list[tuple[str, int, int]]] = [[]]
    room = shard_size
    for file in files:
        position = 0
        while position < file.rows and left > 0:
            if room == 0:
                pieces.append([])
                room = shard_size
            take = min(room, file.rows - position, left)
            pieces[-1].append((file.path, position, take))
            position, room, left = position + take, room - take, left - take
    _scan_missing(project, source.dialect, [piece for shard in pieces for piece in shard], scanned)
    return [
        Shard(f"{source.name}-{index:05d}", source.name, tuple(Segment(*piece, *scanned[piece]) for piece in shard))
        for index, shard in enumerate(pieces)
        if shard
    ]


def _scan_missing(
    project: Project, dialect: SourceDialect, pieces: list[tuple[str, int, int]], scanned: _Scanned
) -> None:
    """Hash the row ranges that are not known and find where they begin, reading each file once."""
    from less_assets.method.data.row_files import scan_ranges

    missing: dict[str, list[tuple[int, int]]] = {}
    for path, first_row, rows in pieces:
        if (path, first_row, rows) not in scanned:
            missing.setdefault(path, []).append((first_row, rows))
    for path, ranges in missing.items():
        row_ranges = scan_ranges(data_path(project, path), ranges, dialect)
        for (first_row, rows), row_range in zip(ranges, row_ranges, strict=True):
            scanned[path, first_row, rows] = row_range
