"""Copies are marked as if all rows were in memory at once, however few ids are."""

import numpy as np
import polars as pl
import pytest

from less_assets.method.data.copies import mark_copies


@pytest.mark.parametrize("ids_at_once", [7, 1000])
def test_marks_do_not_depend_on_how_many_ids_are_in_memory(tmp_path, ids_at_once):
    names = np.random.default_rng(0).integers(0, 60, 100)
    rows = pl.DataFrame({"example_id": [f"{name:032x}" for name in names], "row": range(100)})
    parts = [rows[:30], rows[30:30], rows[30:31], rows[31:]]
    expected = rows.with_columns(
        pl.len().over("example_id").cast(pl.Int64).alias("copies"),
        pl.col("example_id").is_first_distinct().alias("canonical"),
    )
    marked = mark_copies(parts, tmp_path, ids_at_once).collect()
    assert marked.equals(expected)
    assert marked.schema == expected.schema
    assert marked["copies"].max() > 1


def test_a_pool_without_rows_has_no_copies(tmp_path):
    empty = pl.DataFrame(schema={"example_id": pl.String})
    assert mark_copies([empty], tmp_path).collect().shape == (0, 3)
