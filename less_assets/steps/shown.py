"""What steps and checks say of themselves, as plain values: whoever shows them decides how.

Belongs here: the few kinds of values besides numbers, words, lists and mappings. Not here: Dagster, which gets them
from `orchestration/ui_metadata.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, scan_parquet

TABLE_ROWS = 20
PREVIEW_CHARACTERS = 160


@dataclass(frozen=True)
class Table:
    """A small table; with `examples`, its column `messages` is shown by the start of the first and of the last turn."""

    frame: pl.DataFrame
    examples: bool = False


@dataclass(frozen=True)
class Picture:
    """A small chart as PNG, and what it shows in words."""

    png: bytes
    alt: str


@dataclass(frozen=True)
class Markdown:
    """Text in Markdown."""

    text: str


@dataclass(frozen=True)
class File:
    """Where a file lies."""

    path: str


@dataclass(frozen=True)
class Command:
    """A command for a terminal."""

    text: str


@dataclass(frozen=True)
class ReportLink:
    """The report of a recipe and task (`recipe|task`), at a row of it if one is named; shown where a page serves it."""

    report: str
    row: str | None = None


@dataclass(frozen=True)
class ReportLinks:
    """Rows in the report of a recipe and task: `example_id`, and `messages`, whose start each link shows."""

    report: str
    rows: pl.DataFrame


@dataclass(frozen=True)
class Stored:
    """An artifact that was made, for whoever describes it.

    Attributes:
        lineage: The project's lineage.
        partition: Key of the partition; empty for an unpartitioned asset.
        folder: Its files.
        manifest: Its manifest, whose summary is shown anyway.
    """

    lineage: Lineage
    partition: str
    folder: ArtifactFolder
    manifest: Manifest

    def table(self, file: str, columns: list[str] | None = None) -> pl.DataFrame:
        """One of its tables."""
        return read_parquet(self.folder, file, columns)

    def scan(self, file: str) -> pl.LazyFrame:
        """One of its tables, of which only what is asked for is read."""
        return scan_parquet(self.folder, file)


@dataclass(frozen=True)
class Shown:
    """What is shown of an artifact besides the figures of its summary.

    Attributes:
        values: By name: numbers, words, or one of this module's kinds.
        rows: Number of rows of its table; None if it is no table.
        columns: Names and types of its columns.
    """

    values: Mapping[str, Any]
    rows: int | None = None
    columns: Mapping[str, Any] | None = None


Describe = Callable[[Stored], Shown]


def only_figures(stored: Stored) -> Shown:
    """Nothing besides the summary's figures."""
    return Shown({})


def one_table(file: str) -> Describe:
    """What describes an asset that is one table: its number of rows and its columns; no row is read."""

    def describe(stored: Stored) -> Shown:
        frame = stored.scan(file)
        return Shown({}, frame.select(pl.len()).collect().item(), frame.collect_schema())

    return describe


@dataclass(frozen=True)
class Verdict:
    """What a check says; it warns and stops nothing.

    Attributes:
        passed: Whether there is nothing to look at.
        said: One sentence with the figures.
        values: As in `Shown`.
    """

    passed: bool
    said: str
    values: Mapping[str, Any]
