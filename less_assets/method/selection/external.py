"""Scores that something else has given the pool's rows: another attribution tool, a classifier, a person.

Belongs here: reading a file of scores and finding each row's. Ranking is selection.py's matter.
"""

import io
from collections.abc import Callable
from typing import IO, NamedTuple

import fsspec
import numpy as np
import polars as pl

from less_assets.errors import PoolFormatError

BY_ID, BY_PLACE = ("example_id",), ("source", "row")


def _read_json(content: IO[bytes]) -> pl.DataFrame:
    """The rows of one array of objects, or of one object a line."""
    text = content.read()
    return (pl.read_json if text.lstrip().startswith(b"[") else pl.read_ndjson)(io.BytesIO(text))


_READERS: dict[str, Callable[[IO[bytes]], pl.DataFrame]] = {
    ".parquet": pl.read_parquet,
    ".jsonl": pl.read_ndjson,
    ".ndjson": pl.read_ndjson,
    ".json": _read_json,
    ".csv": pl.read_csv,
    ".tsv": lambda content: pl.read_csv(content, separator="\t"),
}
_FORM = "a table of `score` (higher is better) with `example_id`, or with `source` and `row` (from 0), one row each"


class ExternalScores(NamedTuple):
    """A file of scores.

    Attributes:
        table: The key's columns, and `score`, Float32; each key once.
        key: `BY_ID` or `BY_PLACE`.
    """

    table: pl.DataFrame
    key: tuple[str, ...]


def read_scores(path: str, task: str) -> ExternalScores:
    """Read a file of scores.

    Args:
        path: Parquet, JSON lines, a JSON array (`.json`), CSV or TSV, by its ending; a path or an fsspec URL.
        task: If the table has a column `task`, only its rows of this task count.

    Raises:
        PoolFormatError: The file cannot be read, lacks columns, holds no scores of the task, or gives a row two scores.
    """
    ending = next((ending for ending in _READERS if path.lower().endswith(ending)), None)
    if ending is None:
        raise PoolFormatError(
            "Scores are read from Parquet, JSON, CSV or TSV.",
            where=path,
            fix=f"give a file whose name ends in {', '.join(_READERS)}",
        )
    try:
        with fsspec.open(path, "rb") as file:
            table = _READERS[ending](io.BytesIO(file.read()))
    except (OSError, ImportError, ValueError, pl.exceptions.PolarsError) as error:
        raise PoolFormatError(f"The scores cannot be read: {error}", where=path, fix=f"give {_FORM}") from error
    key = next((key for key in (BY_ID, BY_PLACE) if set(key) <= set(table.columns)), None)
    if key is None or "score" not in table.columns:
        raise PoolFormatError(
            f"The file of scores has the columns {', '.join(table.columns) or 'none'}.", where=path, fix=f"give {_FORM}"
        )
    if "task" in table.columns:
        table = table.filter(pl.col("task").cast(pl.String) == task)
        if table.is_empty():
            raise PoolFormatError(
                f"The file of scores has a column `task`, and no row of task {task!r}.",
                where=path,
                fix="name the tasks as the project file does, or leave the column out",
            )
    types: dict[str, type[pl.DataType]] = {"example_id": pl.String, "source": pl.String, "row": pl.Int64}
    try:
        table = table.select(pl.col(name).cast(types[name]) for name in key).with_columns(
            table["score"].cast(pl.Float32)
        )
    except pl.exceptions.PolarsError as error:
        raise PoolFormatError(f"The scores are of another type: {error}", where=path, fix=f"give {_FORM}") from error
    twice = table.filter(table.select(key).is_duplicated())
    if twice.height:
        raise PoolFormatError(
            f"{twice.height} rows of the file give scores to rows that have one already.",
            where=f"{path}: {', '.join(map(str, twice.row(0)[: len(key)]))}",
            fix="give each row one score",
        )
    return ExternalScores(table, key)


def scores_of_rows(scores: ExternalScores, rows: pl.DataFrame) -> np.ndarray:
    """The scores of rows.

    Args:
        scores: The file.
        rows: Columns example_id, source, and row: the row's number among all rows of its source, from 0.

    Returns:
        float32 (n,); NaN, which never ranks, for rows that the file does not score.
    """
    keys = rows.select(pl.col("example_id", "source"), pl.col("row").cast(pl.Int64)).select(scores.key)
    matched = keys.join(scores.table, on=list(scores.key), how="left", maintain_order="left")
    return matched["score"].fill_null(float("nan")).to_numpy()
