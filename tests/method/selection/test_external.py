"""Files of scores: every row gets the score that the file has for it, and files that are none say so."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.errors import PoolFormatError
from less_assets.method.selection.external import ExternalScores, read_scores, scores_of_rows

TABLE = pl.DataFrame({"example_id": ["a", "b"], "score": [1.5, -2.0]})


@settings(max_examples=60)
@given(
    st.dictionaries(st.integers(0, 30), st.floats(-5, 5, width=32), max_size=20),
    st.lists(st.integers(0, 30), max_size=20),
    st.booleans(),
)
def test_each_row_has_the_score_of_its_key(known, asked, by_place):
    rows = pl.DataFrame(
        {"example_id": [f"id-{row}" for row in asked], "source": [f"s{row % 3}" for row in asked], "row": asked},
        schema={"example_id": pl.String, "source": pl.String, "row": pl.Int64},
    )
    keys = {"source": [f"s{row % 3}" for row in known], "row": list(known)}
    keys = keys if by_place else {"example_id": [f"id-{row}" for row in known]}
    table = pl.DataFrame({**keys, "score": pl.Series(list(known.values()), dtype=pl.Float32)})
    table = table.cast({name: rows.schema[name] for name in keys})
    found = scores_of_rows(ExternalScores(table, tuple(keys)), rows)
    np.testing.assert_array_equal(found, np.array([known.get(row, np.nan) for row in asked], dtype=np.float32))


def test_every_kind_of_file_says_the_same(tmp_path):
    TABLE.write_parquet(tmp_path / "s.parquet")
    TABLE.write_ndjson(tmp_path / "s.jsonl")
    TABLE.write_json(tmp_path / "s.json")
    TABLE.write_csv(tmp_path / "s.csv")
    TABLE.write_csv(tmp_path / "s.tsv", separator="\t")
    for ending in ("parquet", "jsonl", "json", "csv", "tsv"):
        found = read_scores(str(tmp_path / f"s.{ending}"), "t")
        assert found.key == ("example_id",)
        assert found.table.rows() == TABLE.rows()
    TABLE.write_ndjson(tmp_path / "lines.json")
    assert read_scores(str(tmp_path / "lines.json"), "t").table.rows() == TABLE.rows()


def test_scores_of_other_tasks_do_not_count(tmp_path):
    rows = [{"example_id": "a", "score": 1, "task": "t"}, {"example_id": "a", "score": 2, "task": "u"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_scores(str(tmp_path / "s.jsonl"), "u").table.rows() == [("a", 2.0)]
    with pytest.raises(PoolFormatError, match="no row of task 'v'"):
        read_scores(str(tmp_path / "s.jsonl"), "v")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("s.txt", "a", "Parquet, JSON, CSV or TSV"),
        ("s.csv", "example_id,value\na,1\n", "columns example_id, value"),
        ("s.csv", "row,score\n1,1\n", "columns row, score"),
        ("s.csv", "example_id,score\na,high\n", "another type"),
        ("s.csv", "example_id,score\na,1\na,2\n", "have one already"),
        ("s.parquet", "no parquet", "cannot be read"),
        ("s.jsonl", "{", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_scores_is_told(tmp_path, name, content, what):
    (tmp_path / name).write_text(content)
    with pytest.raises(PoolFormatError, match=what) as raised:
        read_scores(str(tmp_path / name), "t")
    assert name in str(raised.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(PoolFormatError, match="cannot be read"):
        read_scores(str(tmp_path / "s.csv"), "t")
