"""Conversations: ids, what is short, the trainers' form, and tables of earlier versions."""

import json

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.data.conversations import (
    MESSAGE_TYPES,
    MESSAGES_TYPE,
    ROLES,
    Conversation,
    example_id,
    for_trainers,
    full_text,
    is_very_short,
    json_text,
    stated,
    with_all_fields,
)
from less_assets.method.data.row_formats import normalize

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
CALLS = json_text([{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}])

text = st.text(st.characters(codec="utf-8"), max_size=12)
message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": text})
said = text.filter(lambda words: bool(words.strip()))
arguments = st.dictionaries(text, st.none() | st.integers() | text, max_size=2)
calls = st.lists(
    st.builds(
        lambda name, given: {"type": "function", "function": {"name": name, "arguments": given}},
        text,
        text | arguments,
    ),
    min_size=1,
    max_size=2,
).map(json_text)
user = st.fixed_dictionaries({"role": st.just("user"), "content": said}, optional={"name": said})
tool = st.fixed_dictionaries({"role": st.just("tool"), "content": text}, optional={"tool_call_id": said, "name": said})
answer = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": said},
    optional={"reasoning": said, "tool_calls": calls, "train": st.just(False)},
)
conversations = st.builds(
    lambda before, last, tools: Conversation([*before, {"role": "assistant", "content": last}], tools),
    st.tuples(user, st.lists(user | tool | answer, max_size=4)).map(lambda parts: [parts[0], *parts[1]]),
    said,
    st.none() | calls,
)


def test_the_id_is_blake2b_128_of_the_canonical_json():
    # python -c "hashlib.blake2b(b'[[\"user\",\"2 + 2?\"],[\"assistant\",\"4\"]]', digest_size=16).hexdigest()"
    assert example_id(ASKED) == "9714376c5b51937fc224ec91666187af"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": ASKED}, "9714376c5b51937fc224ec91666187af"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    *ASKED,
                    {"role": "user", "content": "And 3 + 3?\n"},
                    {"role": "assistant", "content": "„6“ \u2028"},
                ]
            },
            "cb976abe1709f561b825ef7b9bce2991",
        ),
        ({"prompt": "Why?", "completion": "Because."}, "e1ce0f58e48c62234726ed1c5e4d3227"),
        ({"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}, "1269b953cc9d0d07894b698d78b27bb8"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "ed03ca1a367ff99eb316e55596639cac",
        ),
    ],
)
def test_rows_without_masks_tools_or_thoughts_keep_the_ids_of_earlier_versions(row, name):
    assert example_id(*normalize(row)) == name


def test_a_space_makes_another_example_and_an_empty_field_does_not():
    assert example_id([{"role": "user", "content": "2 + 2? "}, ASKED[1]]) != example_id(ASKED)
    assert example_id([dict.fromkeys(MESSAGE_TYPES) | turn for turn in ASKED]) == example_id(ASKED)


def test_every_field_and_the_tools_are_part_of_the_id():
    more = [{"train": False}, {"reasoning": "x"}, {"tool_calls": "x"}, {"tool_call_id": "x"}, {"name": "x"}]
    ids = {example_id([ASKED[0], ASKED[1] | fields]) for fields in more}
    assert len({*ids, example_id(ASKED), example_id(ASKED, "[]")}) == 7


@given(st.lists(message, max_size=3), st.lists(message, max_size=3))
def test_ids_are_equal_exactly_if_the_turns_are(first, second):
    assert (example_id(first) == example_id(second)) == (first == second)


@given(conversations)
def test_the_trainers_form_is_json_without_nulls_and_reads_back_as_the_same_conversation(conversation):
    exported = json.loads(json.dumps(for_trainers(*conversation)))
    assert normalize(exported) == conversation
    assert all(value is not None for turn in exported["messages"] for value in turn.values())


def test_the_trainers_form_has_trls_names():
    turns = [ASKED[0], {**ASKED[1], "reasoning": "hm", "tool_calls": CALLS, "train": False}]
    assert for_trainers(turns, CALLS) == {
        "messages": [
            ASKED[0],
            {**ASKED[1], "reasoning_content": "hm", "tool_calls": json.loads(CALLS), "weight": 0},
        ],
        "tools": json.loads(CALLS),
    }
    assert for_trainers(ASKED) == {"messages": ASKED}


@given(st.lists(conversations, max_size=3))
def test_a_table_gives_back_the_conversations(rows):
    table = pl.DataFrame({"messages": pl.Series([row.messages for row in rows], dtype=MESSAGES_TYPE)})
    assert [[stated(turn) for turn in turns] for turns in table["messages"].to_list()] == [
        [stated(turn) for turn in row.messages] for row in rows
    ]


def test_a_table_of_an_earlier_version_gets_the_fields_that_it_lacks():
    earlier = pl.List(pl.Struct({"role": pl.String(), "content": pl.String()}))
    table = with_all_fields(pl.DataFrame({"messages": pl.Series([ASKED, None, []], dtype=earlier)}))
    assert table.schema == {"messages": MESSAGES_TYPE, "tools": pl.String}
    assert [stated(turn) for turn in table["messages"][0]] == ASKED
    assert table["messages"].to_list()[1:] == [None, []]
    assert with_all_fields(table).equals(table)


def test_short_is_what_little_text_carries_loss():
    assert is_very_short(ASKED)
    long = {"role": "assistant", "content": "a" * 21}
    assert not is_very_short([*ASKED, long])
    assert is_very_short([*ASKED, {**long, "train": False}])
    assert not is_very_short([ASKED[0], {**ASKED[1], "reasoning": "a" * 21}])


def test_the_full_text_has_thoughts_and_calls():
    assert full_text(ASKED[1]) == "4"
    assert full_text({**ASKED[1], "content": "", "tool_calls": CALLS}) == CALLS
    assert full_text({**ASKED[1], "reasoning": "hm"}) == "hm\n4"
