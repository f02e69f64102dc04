"""Rows of the pool that the project leaves out: `exclude` of the project file.

Belongs here: reading them back, and marking them for whoever ranks or draws rows. Not here: reading the files that name
them (`method/data/excluded_rows.py`).
"""

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.reading.files import EXCLUDED
from less_assets.store.tables import read_parquet

EXCLUDED_STATUS = "excluded"
"""Status of a usable row that the project leaves out."""


def excluded_reasons(lineage: Lineage) -> dict[str, str]:
    """Rows of the pool that are left out: example_id -> reason; empty without `exclude` in the project file."""
    if not lineage.project.exclude:
        return {}
    table = read_parquet(lineage.folder("excluded_rows"), EXCLUDED).filter("in_pool")
    return dict(table.select("example_id", "reason").iter_rows())


def mark_excluded(lineage: Lineage, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows (columns example_id and status), of which those that are left out have the status `excluded`.

    Args:
        lineage: Reads `excluded_rows`.
        rows: Any rows of the pool; a status other than "ok" stays.
    """
    names = list(excluded_reasons(lineage))
    if not names:
        return rows
    left_out = (pl.col("status") == "ok") & pl.col("example_id").is_in(names)
    return rows.with_columns(pl.when(left_out).then(pl.lit(EXCLUDED_STATUS)).otherwise("status").alias("status"))
