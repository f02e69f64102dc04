"""Parquet tables and JSON documents inside an artifact folder, verified on reading.

Belongs here: how frames become files. Not here: which columns a table has (the asset or method that makes it).
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator

import polars as pl
from pydantic import JsonValue

from less_assets.errors import CorruptArtifactError
from less_assets.store.artifacts import ArtifactFolder, repair_command
from less_assets.store.files import local_path, read_bytes, written_file


def write_parquet(folder: ArtifactFolder, name: str, frame: pl.DataFrame | pl.LazyFrame) -> None:
    """Write a table atomically; a LazyFrame streams through bounded memory.

    Args:
        folder: The artifact.
        name: File name, ending in `.parquet`.
        frame: Rows in their final order.
    """
    with written_file(folder.path(name)) as file, _disk_trouble():
        if isinstance(frame, pl.LazyFrame):
            frame.sink_parquet(file, compression="zstd")
        else:
            frame.write_parquet(file, compression="zstd")


@contextlib.contextmanager
def _disk_trouble() -> Iterator[None]:
    """Turn what Polars makes of a failing disk (a ComputeError that quotes the system's error) into an OSError."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        if not re.search(r"os error|IO error|transport error", str(error)):
            raise
        raise OSError(str(error)) from error


def read_parquet(folder: ArtifactFolder, name: str, columns: list[str] | None = None) -> pl.DataFrame:
    """Read a table whose digest has been verified.

    Raises:
        MissingArtifactError: The artifact is not complete.
        CorruptArtifactError: The file is damaged.
    """
    source = _source(folder, name)
    try:
        return pl.read_parquet(source, columns=columns)
    except pl.exceptions.ColumnNotFoundError:
        raise
    except pl.exceptions.PolarsError as error:
        raise _unreadable(folder, name) from error


def scan_parquet(folder: ArtifactFolder, name: str) -> pl.LazyFrame:
    """Lazily read a table whose digest has been verified; a remote one is fetched whole (tables are per shard)."""
    return pl.scan_parquet(_source(folder, name))


def write_json(folder: ArtifactFolder, name: str, document: JsonValue) -> None:
    """Write a JSON document atomically, keys sorted. NaN and infinity raise ValueError."""
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    folder.write_bytes(name, text.encode() + b"\n")


def read_json(folder: ArtifactFolder, name: str) -> JsonValue:
    """Read a JSON document whose digest has been verified."""
    try:
        document: JsonValue = json.loads(folder.read_bytes(name))
        return document
    except ValueError as error:
        raise _unreadable(folder, name) from error


def _source(folder: ArtifactFolder, name: str) -> str | io.BytesIO:
    path = folder.verified(name)
    return str(path) if local_path(path) else io.BytesIO(read_bytes(path))


def _unreadable(folder: ArtifactFolder, name: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{folder.key}: {name} cannot be read.",
        where=str(folder.root / name),
        fix=repair_command(folder.manifest().kind),
    )
