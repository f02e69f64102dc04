"""Files of rows as tables: good rows are never disturbed by bad ones, and every bad row has its reason."""

import csv
import json
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from less_assets.method.data.conversations import example_id, stated
from less_assets.method.data.examples import POOL_SCHEMA, pool_table, read_rows
from less_assets.method.data.row_files import count_rows

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHARED_POOL = Path(__file__).parents[3].parent / "shared" / "data" / "pool"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def table(path, **options) -> pl.DataFrame:
    return pl.concat([pool_table([]), *read_rows(str(path), "source", **options)])


def test_good_rows_are_used_bad_rows_are_kept_with_file_row_and_reason(folder):
    lines = [
        json.dumps({"messages": ASKED}),
        "",
        '{"messages": [',
        json.dumps({"messages": [{"role": "user", "content": "a\u2028b"}, ASKED[1]]}, ensure_ascii=False),
        json.dumps({"messages": [{"role": "user", "content": " "}, ASKED[1]]}),
        json.dumps({"prompt": "a" * 1_000_001, "completion": "b"}),
        json.dumps({"instruction": "Say hi.", "output": "hi"}),
        json.dumps({"messages": [ASKED[0], {"role": "assistant", "content": "\udc00"}]}),
        json.dumps({"messages": ASKED}),
    ]
    path = folder / "pool.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    rows = table(path)
    assert rows.schema == POOL_SCHEMA
    assert rows["source_row"].to_list() == list(range(1, 10)) == list(range(1, count_rows(str(path)) + 1))
    assert rows["status"].to_list() == [
        "ok",
        "blank",
        "invalid_json",
        "ok",
        "empty_turn",
        "too_large",
        "ok",
        "invalid_utf8",
        "ok",
    ]
    assert rows["example_id"][0] == rows["example_id"][8] == example_id(ASKED)
    assert rows["messages"][3].to_list()[0]["content"] == "a\u2028b"
    bad = rows.filter(pl.col("status") != "ok")
    assert bad["messages"].null_count() == bad["example_id"].null_count() == bad.height
    assert set(rows["source_file"]) == {str(path)}
    assert set(rows["source"]) == {"source"}


def test_a_shard_read_alone_equals_its_part_of_the_whole(folder):
    path = folder / "shards.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n\n" * (i % 3) for i in range(20)))
    whole = table(path)
    parts = [table(path, first_row=i, max_rows=7, batch_rows=3) for i in range(0, whole.height, 7)]
    assert pl.concat(parts).equals(whole)


def test_tables_are_cut_by_rows_and_by_size(folder, monkeypatch):
    path = folder / "cut.jsonl"
    path.write_text((json.dumps({"prompt": "q" * 100, "completion": "a"}) + "\n") * 10)
    assert [each.height for each in read_rows(str(path), "s", batch_rows=4)] == [4, 4, 2]
    monkeypatch.setattr("less_assets.method.data.examples._BATCH_BYTES", 250)
    assert [each.height for each in read_rows(str(path), "s", batch_rows=4)] == [3, 3, 3, 1]


def test_jsonl_csv_and_parquet_give_the_same_examples(folder):
    records = [{"instruction": f'line\nbreak, "{i}"', "input": "", "output": "ü" * (i + 1)} for i in range(5)]
    (folder / "same.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    pl.DataFrame(records).write_parquet(folder / "same.parquet")
    with (folder / "same.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    same = [table(folder / f"same.{kind}").drop("source_file") for kind in ("jsonl", "csv", "parquet")]
    assert same[0]["status"].to_list() == ["ok"] * 5
    assert same[0].equals(same[1])
    assert same[0].equals(same[2])


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"\xebnstruction,input\nx,y\n"), ("a.jsonl", b'{"\\ud800": 1}\n'), ("a.tsv", b"\xff\ta\nx\ty\n")],
)
def test_field_names_that_are_no_text_are_quoted_readably(folder, name, content):
    (folder / name).write_bytes(content)
    (table,) = read_rows(str(folder / name), "odd")
    assert table["status"].to_list() == ["missing_field"]
    assert table["detail"][0].encode()


def test_an_empty_file_has_no_rows(folder):
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.csv").write_bytes(b"")
    for name in ("empty.jsonl", "empty.csv"):
        assert count_rows(str(folder / name)) == table(folder / name).height == 0


@pytest.mark.skipif(not SHARED_POOL.is_dir(), reason="../shared/data/pool is not there")
@pytest.mark.parametrize(("name", "rows"), [("oasst1", 2000), ("dolly", 3000)])
def test_the_real_pool_is_read_without_loss(name, rows):
    path = SHARED_POOL / f"{name}.jsonl"
    read = table(path)
    assert read.height == count_rows(str(path)) == rows
    assert set(read["status"]) == {"ok"}
    assert [stated(turn) for turn in read["messages"][-1]] == json.loads(path.read_bytes().split(b"\n")[-2])["messages"]


def test_tools_masks_and_calls_are_kept_in_the_table(folder):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    row = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            ASKED[0],
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        ],
    }
    (folder / "tools.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"messages": ASKED}) + "\n")
    rows = table(folder / "tools.jsonl")
    assert rows.schema == POOL_SCHEMA
    assert [json.loads(text) if text else None for text in rows["tools"]] == [row["tools"], None]
    called, answered, last = rows["messages"][0].to_list()[1:]
    assert stated(called) == {
        "role": "assistant",
        "content": "",
        "tool_calls": json.dumps([call], separators=(",", ":")),
        "train": False,
    }
    assert stated(answered) == {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}
    assert stated(last) == {"role": "assistant", "content": "4", "reasoning": "two and two"}
    assert rows["example_id"][1] == example_id(ASKED) != rows["example_id"][0]


def test_unknown_keys_are_counted_in_usable_rows_only(folder):
    rows = [
        {"messages": ASKED, "mood": "glad", "id": 3},
        {"messages": ASKED, "mood": "sad", "empty": None},
        {"messages": [{**ASKED[0], "colour": "red"}, ASKED[1]]},
        {"messages": [], "mood": "glad"},
    ]
    (folder / "keys.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts: Counter[str] = Counter()
    table(folder / "keys.jsonl", unknown=counts)
    assert counts == {"mood": 2, "messages[].colour": 1}


def test_a_call_in_parquet_has_no_arguments_of_other_calls(folder):
    def called(name: str, given: dict) -> dict:
        calls = [{"type": "function", "function": {"name": name, "arguments": given}}]
        return {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]}

    rows = [called("add", {"a": 1}), called("look", {"city": "Rome"})]
    pl.DataFrame(rows).write_parquet(folder / "calls.parquet")
    (folder / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = table(folder / "calls.parquet")
    assert stored["status"].to_list() == ["ok", "ok"]
    assert stored["example_id"].to_list() == table(folder / "calls.jsonl")["example_id"].to_list()
