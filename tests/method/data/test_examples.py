"""Pool rows: every format is recognised, every bad row has its reason, good rows are never disturbed by bad ones."""

import csv
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.data.examples import (
    POOL_SCHEMA,
    ROLES,
    ROW_STATUSES,
    UnusableRowError,
    detect_format,
    example_id,
    normalize,
    pool_table,
    read_rows,
)
from less_assets.method.data.row_files import count_rows

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHARED_POOL = Path(__file__).parents[3].parent / "shared" / "data" / "pool"

text = st.text(st.characters(codec="utf-8"), max_size=12)
message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": text})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def table(path, **options) -> pl.DataFrame:
    return pl.concat([pool_table([]), *read_rows(str(path), "source", **options)])


# ---- ids ----


def test_the_id_is_blake2b_128_of_the_canonical_json():
    # python -c "hashlib.blake2b(b'[[\"user\",\"2 + 2?\"],[\"assistant\",\"4\"]]', digest_size=16).hexdigest()"
    assert example_id(ASKED) == "9714376c5b51937fc224ec91666187af"


def test_the_id_ignores_what_is_not_role_or_content_but_not_a_space():
    assert example_id([{"content": "2 + 2?", "role": "user", "name": "Ann"}, ASKED[1]]) == example_id(ASKED)
    assert example_id([{"role": "user", "content": "2 + 2? "}, ASKED[1]]) != example_id(ASKED)


@given(st.lists(message, max_size=3), st.lists(message, max_size=3))
def test_ids_are_equal_exactly_if_the_turns_are(first, second):
    assert (example_id(first) == example_id(second)) == (first == second)


# ---- formats ----


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": ASKED, "id": "7"}, "messages"),
        ({"messages": json.dumps(ASKED)}, "messages"),
        ({"prompt": "2 + 2?", "completion": "4"}, "prompt_completion"),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt_completion"),
        ({"instruction": "2 + 2?", "output": "4"}, "alpaca"),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "alpaca"),
        ({"instruction": "2 + 2?", "context": None, "response": "4", "category": "qa"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "sharegpt"),
        ({"conversations": ASKED}, "sharegpt"),
        ({"messages": None, "prompt": "2 + 2?", "completion": "4"}, "prompt_completion"),
    ],
)
def test_every_format_is_detected_and_can_be_stated(record, format):
    assert detect_format(record) == format
    assert normalize(record) == normalize(record, format) == ASKED


def test_alpaca_input_follows_the_instruction_after_a_blank_line():
    messages = normalize({"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"})
    assert messages[0] == {"role": "user", "content": "Translate.\n\nGuten Tag"}


def test_text_is_not_changed():
    messages = normalize({"prompt": "  2 + 2?\n", "completion": "\t4 "})
    assert [each["content"] for each in messages] == ["  2 + 2?\n", "\t4 "]


def test_extra_keys_of_turns_are_left_out():
    turns = [{**ASKED[0], "name": "Ann"}, {**ASKED[1], "tool_calls": None}]
    assert normalize({"messages": turns}) == ASKED


def test_sharegpt_words_for_roles_are_known():
    words = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "model": "assistant"}
    turns = [{"from": word, "value": "x"} for word in words]
    assert [turn["role"] for turn in normalize({"conversations": turns})] == list(words.values())


@pytest.mark.parametrize(
    ("record", "status", "detail"),
    [
        ({}, "missing_field", "nothing"),
        ({"text": "a"}, "missing_field", "there is: text"),
        ({"messages": None}, "missing_field", "messages"),
        ({"messages": []}, "no_assistant_turn", "no turns at all"),
        ({"messages": {}}, "wrong_type", "an object, not a list"),
        ({"messages": "not json"}, "wrong_type", "text, but not JSON"),
        ({"messages": [*ASKED, "a"]}, "wrong_type", "turn 3"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": 4}]}, "wrong_type", "turn 2's content is a number"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"text": "4"}]}]}, "wrong_type", "a list"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "empty_turn", "turn 2 (assistant)"),
        ({"messages": [ASKED[0], {"role": "assistant"}]}, "empty_turn", "turn 2"),
        ({"messages": [{"role": "user", "content": " \n\u2003"}, ASKED[1]]}, "empty_turn", "turn 1 (user)"),
        ({"messages": [{"role": "tool", "content": "a"}, *ASKED]}, "unknown_role", "'tool'"),
        ({"messages": [{"content": "a"}, *ASKED]}, "unknown_role", "None"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown_role", "turn 1"),
        ({"messages": [{"role": "human", "content": "a"}, ASKED[1]]}, "unknown_role", "'human'"),
        ({"messages": ASKED[:1]}, "no_assistant_turn", "no assistant turn"),
        ({"messages": ASKED[1:]}, "no_user_turn", "no user turn"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": "\ud83d"}]}, "invalid_utf8", "turn 2"),
        ({"prompt": 3, "completion": "4"}, "wrong_type", "prompt is a number"),
        ({"prompt": ASKED, "completion": "4"}, "wrong_type", "prompt is a list"),
        ({"prompt": "", "completion": "4"}, "empty_turn", "turn 1"),
        ({"instruction": "a", "input": 5, "output": "b"}, "wrong_type", "input is a number"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "unknown_role", "'narrator'"),
    ],
)
def test_an_unusable_record_says_why(record, status, detail):
    with pytest.raises(UnusableRowError, match=r".*") as caught:
        normalize(record)
    assert caught.value.status == status
    assert detail in caught.value.detail
    assert status in ROW_STATUSES


def test_a_stated_format_is_kept_to():
    with pytest.raises(UnusableRowError) as caught:
        normalize({"messages": ASKED}, "alpaca")
    assert caught.value.status == "missing_field"
    assert "'instruction'" in caught.value.detail


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
field = st.sampled_from(["messages", "conversations", "prompt", "completion", "instruction", "input", "output"])
turn = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), anything | st.sampled_from(ROLES))


@given(st.dictionaries(field, anything | st.lists(turn, max_size=3), max_size=4), st.sampled_from(["auto", "alpaca"]))
def test_any_record_is_either_a_conversation_or_refused_with_a_known_reason(record, format):
    problem = None
    try:
        messages = normalize(record, format)
    except UnusableRowError as refusal:
        problem = refusal
    if problem:
        assert problem.status in ROW_STATUSES
        assert problem.detail
    else:
        assert {"user", "assistant"} <= {each["role"] for each in messages} <= set(ROLES)
        assert all(each["content"].strip() for each in messages)
        assert len(example_id(messages)) == 32


# ---- files ----


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
    assert read["messages"][-1].to_list() == json.loads(path.read_bytes().split(b"\n")[-2])["messages"]
