"""Raw rows to conversations: what changes a row's meaning is carried, or the row is refused by the field's name."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.data.conversations import ROLES, carries_loss, example_id
from less_assets.method.data.row_formats import (
    ROW_STATUSES,
    UnusableRowError,
    detect_format,
    normalize,
    unknown_keys,
)

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
LONGER = [*ASKED, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLS = '[{"type":"function","function":{"name":"add","arguments":"{}"}}]'
TOOLS = '[{"type":"function","function":{"name":"add"}}]'


def refusal(record: dict) -> UnusableRowError:
    with pytest.raises(UnusableRowError) as caught:
        normalize(record)
    return caught.value


def learned(record: dict) -> list[str]:
    """Texts of the turns with loss."""
    return [turn["content"] for turn in normalize(record).messages if carries_loss(turn)]


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
    assert normalize(record) == normalize(record, format) == (ASKED, None)


def test_alpaca_input_follows_the_instruction_after_a_blank_line():
    messages, _ = normalize({"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"})
    assert messages[0] == {"role": "user", "content": "Translate.\n\nGuten Tag"}


def test_text_is_not_changed():
    messages, _ = normalize({"prompt": "  2 + 2?\n", "completion": "\t4 "})
    assert [each["content"] for each in messages] == ["  2 + 2?\n", "\t4 "]


def test_sharegpt_words_for_roles_are_known():
    words = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "model": "assistant"}
    turns = [{"from": word, "value": "x"} for word in words]
    assert [turn["role"] for turn in normalize({"conversations": turns}).messages] == list(words.values())


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
        ({"messages": [ASKED[0], {"role": "assistant", "content": [4]}]}, "wrong_type", "part 1"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "empty_turn", "turn 2 (assistant)"),
        ({"messages": [ASKED[0], {"role": "assistant"}]}, "empty_turn", "turn 2"),
        ({"messages": [{"role": "user", "content": " \n\u2003"}, ASKED[1]]}, "empty_turn", "turn 1 (user)"),
        ({"messages": [{"role": "critic", "content": "a"}, *ASKED]}, "unknown_role", "'critic'"),
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
        messages, _ = normalize(record, format)
    except UnusableRowError as refusal:
        problem = refusal
    if problem:
        assert problem.status.partition(":")[0] in ROW_STATUSES
        assert problem.detail
    else:
        assert {"user", "assistant"} <= {each["role"] for each in messages} <= set(ROLES)
        assert any(map(carries_loss, messages))
        assert len(example_id(messages)) == 32


# ---- roles, parts and system prompts ----


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"prompt": "2 + 2?", "completion": "4"},
        {"instruction": "2 + 2?", "output": "4"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_a_system_prompt_beside_the_turns_is_the_first_turn(row, key):
    system = {"role": "system", "content": "Be brief."}
    assert normalize({**row, key: "Be brief."}).messages == [system, *ASKED]
    assert normalize({**row, key: " "}).messages == ASKED


def test_a_system_prompt_said_twice_stands_once_and_two_different_ones_are_refused():
    turns = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert normalize({"messages": turns, "system": "Be brief."}).messages == turns
    assert refusal({"messages": turns, "system": "Be long."}).status == "unsupported_field: system"
    assert refusal({"messages": ASKED, "system": "a", "system_prompt": "b"}).status == "unsupported_field: system"


def test_an_empty_system_turn_is_dropped_and_a_mask_still_fits_the_turns():
    empty = {"role": "system", "content": ""}
    assert normalize({"messages": [empty, *ASKED]}).messages == ASKED
    assert learned({"messages": [empty, *LONGER], "loss_mask": [0, 0, 0, 0, 1]}) == ["Yes."]
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert [turn["role"] for turn in normalize({"conversations": turns}).messages] == ["user", "assistant"]


def test_alpaca_history_comes_before_the_question():
    row = {"instruction": "Sure?", "output": "Yes.", "history": [["2 + 2?", "4"]]}
    assert normalize(row).messages == LONGER
    assert normalize({**row, "history": '[["2 + 2?", "4"]]'}).messages == LONGER
    assert normalize({**row, "history": []}).messages == LONGER[2:]
    assert refusal({**row, "history": [["2 + 2?"]]}).status == "wrong_type"


def test_text_parts_are_joined_and_other_parts_refused_by_name():
    parts = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?", "image_url": None}]
    assert normalize({"messages": [{"role": "user", "content": parts}, ASKED[1]]}).messages == ASKED
    for part, name in (
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image_url"),
        ({"type": "image"}, "image"),
        ({"type": "text", "text": "a", "image": "a.png"}, "image"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "something new"}, "content"),
    ):
        row = {"messages": [{"role": "user", "content": [*parts, part]}, ASKED[1]]}
        assert refusal(row).status == f"unsupported_field: {name}"


# ---- masks ----


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_mask"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_a_masked_answer_carries_no_loss_and_stays(key, value):
    turns = [ASKED[0], {**ASKED[1], key: value}, *LONGER[2:]]
    assert learned({"messages": turns}) == ["Yes."]
    assert [turn["content"] for turn in normalize({"messages": turns}).messages] == ["2 + 2?", "4", "Sure?", "Yes."]
    unmasked = [{**turn, key: int(turn["role"] == "assistant")} for turn in LONGER]
    assert normalize({"messages": unmasked}).messages == LONGER


def test_a_rows_loss_mask_has_one_entry_for_each_turn():
    assert learned({"messages": LONGER, "loss_mask": [0, 0, 0, 1]}) == ["Yes."]
    assert learned({"messages": LONGER, "loss_mask": "[0, 1, 0, 0]"}) == ["4"]
    for mask in ([0, 1], [0, 0, 0, 2], "all", [[0], 0, 0, 1]):
        assert refusal({"messages": LONGER, "loss_mask": mask}).status == "unsupported_field: loss_mask"


@pytest.mark.parametrize(
    "turns",
    [
        [ASKED[0], {**ASKED[1], "weight": 0.5}],
        [ASKED[0], {**ASKED[1], "weight": "1"}],
        [ASKED[0], {**ASKED[1], "weight": float("nan")}],
        [{**ASKED[0], "weight": 1}, ASKED[1]],
        [ASKED[0], {**ASKED[1], "weight": 1, "loss": 0}],
        [ASKED[0], {**ASKED[1], "weight": 0, "loss": True}],
    ],
)
def test_masks_that_cannot_be_followed_are_refused(turns):
    assert refusal({"messages": turns}).status in ("unsupported_field: weight", "unsupported_field: loss")


def test_masks_of_row_and_turn_that_contradict_each_other_are_refused():
    for turn, row in ((0, 1), (1, 0)):
        turns = [ASKED[0], {**ASKED[1], "weight": turn}, *LONGER[2:]]
        assert refusal({"messages": turns, "loss_mask": [0, row, 0, 1]}).status == "unsupported_field: loss_mask"


def test_a_row_with_every_answer_masked_has_nothing_to_learn():
    assert refusal({"messages": [ASKED[0], {**ASKED[1], "train": False}]}).status == "no_assistant_turn"


def test_answers_in_a_prompt_carry_no_loss_unless_a_mask_says_so():
    row = {"prompt": LONGER[:3], "completion": LONGER[3:]}
    assert learned(row) == ["Yes."]
    assert learned({**row, "loss_mask": [0, 1, 0, 1]}) == ["4", "Yes."]
    assert learned({**row, "prompt": [LONGER[0], {**LONGER[1], "weight": 1}, LONGER[2]]}) == ["4", "Yes."]


# ---- tools and thoughts ----


@pytest.mark.parametrize(
    "answer",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "id": None, "function": {**CALL["function"], "strict": None}}]},
        {"function_call": CALL["function"]},
    ],
)
def test_calls_are_kept_in_openais_form(answer):
    turns = [ASKED[0], {"role": "assistant", "content": None, **answer}]
    assert normalize({"messages": turns}).messages[1] == {"role": "assistant", "content": "", "tool_calls": CALLS}


def test_sharegpt_calls_and_observations_are_those_of_openai():
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ]
    shared = normalize({"conversations": turns, "tools": json.dumps([{"name": "add"}])})
    openai = [
        ASKED[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    assert shared == normalize({"messages": openai, "tools": [{"type": "function", "function": {"name": "add"}}]})
    assert shared.tools == TOOLS
    turns[1]["value"] = "add()"
    assert refusal({"conversations": turns}).status == "wrong_type"


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_none(tools):
    assert normalize({"messages": ASKED, "tools": tools}) == (ASKED, None)


@pytest.mark.parametrize(
    "tools", ["add", {"name": "add"}, [1], [{"type": "function", "function": {"d": float("nan")}}]]
)
def test_tools_of_another_form_are_refused(tools):
    assert refusal({"messages": ASKED, "tools": tools}).status == "wrong_type"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_kept_of_the_assistant_only(key):
    turns = [ASKED[0], {**ASKED[1], key: "two and two"}]
    assert normalize({"messages": turns}).messages[1] == {**ASKED[1], "reasoning": "two and two"}
    assert normalize({"messages": [ASKED[0], {**ASKED[1], key: " "}]}).messages == ASKED
    assert refusal({"messages": [{**ASKED[0], key: "hm"}, ASKED[1]]}).status == f"unsupported_field: {key}"


def test_an_empty_tool_result_is_a_result():
    turns = [*ASKED, {"role": "tool", "content": ""}, {"role": "assistant", "content": "Nothing."}]
    assert normalize({"messages": turns}).messages == turns


# ---- what cannot be carried, and what is left out ----


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"label": False}, "label"),
        ({"label": 0}, "label"),
        ({"label": "False"}, "label"),
        ({"kto_tag": False}, "kto_tag"),
        ({"rejected_response": "bad"}, "rejected_response"),
        ({"rejected": ASKED}, "rejected"),
        ({"images": ["a.png"]}, "images"),
        ({"weight": 0.5}, "weight"),
        ({"weight": 0}, "weight"),
        ({"train": False}, "train"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ],
)
def test_a_field_that_cannot_be_carried_quarantines_the_row_by_name(more, name):
    for row in ({"messages": ASKED}, {"prompt": "q", "completion": "a"}):
        problem = refusal({**row, **more})
        assert problem.status == f"unsupported_field: {name}"
        assert name in problem.detail


def test_a_preference_pair_is_named_and_not_taken_for_a_row_without_a_format():
    assert refusal({"prompt": "q", "chosen": "a", "rejected": "b"}).status == "unsupported_field: rejected"


def test_empty_fields_count_as_absent():
    row = {"messages": ASKED, "images": [], "rejected": None, "tools": "", "loss_mask": [], "weight": 1, "label": True}
    assert normalize(row) == (ASKED, None)
    assert unknown_keys(row) == []


def test_unknown_keys_are_named_and_harmless_ones_are_not():
    turns = [{**ASKED[0], "colour": "red", "id": 1}, {**ASKED[1], "colour": "blue", "shape": None}]
    row = {"messages": turns, "mood": "glad", "id": "7", "source": "s", "prompt": "2 + 2?", "label": "arithmetic"}
    assert unknown_keys(row) == ["mood", "prompt", "label", "messages[].colour"]
    assert unknown_keys({"instruction": "a", "output": "b", "messages": ASKED}, "alpaca") == ["messages"]
    assert unknown_keys({"messages": ASKED, "\ud800": 1})[0].encode()


FOLDER = Path(__file__).parents[2] / "data/cases"
IGNORED_BEFORE = (FOLDER / "ignored-fields/rows.jsonl").read_text().splitlines()
EXPECTED: list[tuple[str, list[str]] | str] = [
    ("user assistant user assistant", ["right"]),
    ("user assistant user assistant", ["yes"]),
    ("user assistant user assistant", ["yes"]),
    "label",
    "label",
    ("system user assistant", ["bonjour"]),
    ("system user assistant user assistant", ["first step", "second step"]),
    ("user assistant", ["Let me look."]),
    ("user assistant", ["42"]),
    "rejected_response",
]
"""Roles and learned answers, or the field that quarantines the row."""


@pytest.mark.parametrize(("line", "expected"), zip(IGNORED_BEFORE, EXPECTED, strict=True))
def test_no_field_of_the_cases_is_ignored(line, expected):
    row = json.loads(line)
    if isinstance(expected, str):
        assert refusal(row).status == f"unsupported_field: {expected}"
        return
    roles, answers = expected
    assert " ".join(turn["role"] for turn in normalize(row).messages) == roles
    assert learned(row) == answers
    assert unknown_keys(row) == []


@pytest.mark.parametrize("line", (FOLDER / "empty-system/pool.jsonl").read_text().splitlines())
def test_an_empty_system_turn_of_the_cases_is_dropped(line):
    assert [turn["role"] for turn in normalize(json.loads(line)).messages] == ["user", "assistant"]


def test_every_answer_of_several_turns_is_learned():
    assert learned({"messages": LONGER}) == ["4", "Yes."]


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize("word", ["arguments", "parameters", "args", "input"])
def test_arguments_of_a_call_are_kept_whatever_they_are_called(word):
    flat, nested = {"name": "f", word: {"x": 1}}, {"type": "function", "function": {"name": "f", word: {"x": 1}}}
    for call in (flat, nested):
        turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        (made,) = json.loads(normalize({"messages": turns}).messages[1]["tool_calls"])
        assert made["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"instruction": "q", "output": "a", "response": "b"}, "unsupported_field: response"),
        ({"instruction": "q", "output": "a", "input": "a", "context": "b"}, "unsupported_field: context"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "content": "b"}]},
            "content",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "role": "user", "value": "a"}]}, "role"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "thoughts": "hm"}]}, "unsupported_field: thoughts"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "trainable": False}]}, "trainable"),
        ({"prompt": "q", "completion": "a", "completion_mask": [0, 1]}, "unsupported_field: completion_mask"),
        ({"prompt": "q", "completion": "a", "enable_thinking": False}, "unsupported_field: enable_thinking"),
    ],
)
def test_what_may_mean_two_things_is_quarantined(row, status):
    with pytest.raises(UnusableRowError) as refused:
        normalize(row)
    assert refused.value.status.endswith(status)


def test_two_words_that_say_the_same_are_no_trouble():
    row = {"instruction": "q", "output": "a", "response": "a", "input": "", "context": "b"}
    assert [turn["content"] for turn in normalize(row).messages] == ["q\n\nb", "a"]
    turns = [{"from": "human", "value": "", "content": "q"}, {"from": "gpt", "role": "gpt", "value": "a"}]
    assert [turn["content"] for turn in normalize({"conversations": turns}).messages] == ["q", "a"]


def test_a_tools_schema_in_anthropics_words_is_its_parameters():
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    stored = json.loads(normalize({"prompt": "q", "completion": "a", "tools": tools}).tools)
    assert stored == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


# ---- the same kinds under other words ----


@pytest.mark.parametrize(
    ("more", "name"),
    [
        *(({key: "hm"}, key) for key in ("reasoning_content", "thinking", "reasoning", "cot", "thoughts")),
        *(({key: ["x.png"]}, key) for key in ("image_path", "image_urls", "video_url", "audio_path", "attachments")),
        *(({key: "bad"}, key) for key in ("rejected_output", "rejected_completion", "chosen_output")),
        *(({key: [0, 1]}, key) for key in ("mask", "assistant_mask", "loss_weights", "weights", "token_masks")),
        ({"train_on_inputs": True}, "train_on_inputs"),
        ({"tool_calls": [CALL]}, "tool_calls"),
        ({"history": [["first?", "first"]]}, "history"),
        ({"developer": "Be brief."}, "developer"),
        ({"label": -1}, "label"),
        ({"label": " Rejected"}, "label"),
        ({"desirable": False}, "desirable"),
    ],
)
def test_a_field_of_the_row_is_refused_under_its_other_words_too(more, name):
    assert refusal({"prompt": "q", "completion": "a", **more}).status == f"unsupported_field: {name}"
    empty = dict.fromkeys(more)
    assert normalize({"prompt": "q", "completion": "a", **empty}) == normalize({"prompt": "q", "completion": "a"})


@pytest.mark.parametrize(
    ("more", "name"),
    [
        *(({key: value}, key) for key in ("loss_scale", "train_on_turn", "is_masked") for value in (0.0, False)),
        ({"ignore": True}, "ignore"),
        ({"cot": "hm"}, "cot"),
        ({"recipient": "functions.f"}, "recipient"),
        ({"content": [{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "b"}]}, "train"),
        ({"content": [{"type": "text", "text": "a", "weight": 0}]}, "weight"),
        ({"tool_calls": [CALL], "function_call": CALL["function"]}, "function_call"),
        ({"tool_calls": [{**CALL, "arguments": {"x": 1}}]}, "tool_calls"),
    ],
)
def test_a_field_of_a_turn_is_refused_under_its_other_words_too(more, name):
    assert refusal({"messages": [USER, {"role": "assistant", "content": "a", **more}]}).status == (
        f"unsupported_field: {name}"
    )


@pytest.mark.parametrize("key", ["system_message", "system_instruction"])
def test_a_system_prompt_may_have_other_names(key):
    assert normalize({"messages": ASKED, key: "Be brief."}).messages[0] == {"role": "system", "content": "Be brief."}
    assert unknown_keys({"messages": ASKED, key: "Be brief."}) == []


def test_turns_that_a_csv_file_has_as_text_are_turns():
    prompt, completion = json.dumps([*LONGER[:3]]), json.dumps(LONGER[3:])
    assert learned({"prompt": prompt, "completion": completion}) == ["Yes."]
    assert refusal({"prompt": prompt, "completion": "Yes."}).status == "wrong_type"
    assert learned({"prompt": '["no", "turns"]', "completion": '[{"x": 1}]'}) == ['[{"x": 1}]']


def test_a_question_that_is_all_in_the_input_begins_with_no_blank_line():
    assert normalize({"instruction": "", "input": "2 + 2?", "output": "4"}).messages == ASKED


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_list_of_turns_does_not_hide_the_rows_other_format(empty):
    assert normalize({"messages": empty, "prompt": "2 + 2?", "completion": "4"}).messages == ASKED
    assert detect_format({"messages": empty}) == "messages"


def test_equal_names_in_json_text_are_refused_as_in_a_line():
    turns = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]'
    assert "'content' stands twice" in refusal({"messages": turns}).detail
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}
    problem = refusal({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert (problem.status, "'x' stands twice" in problem.detail) == ("wrong_type", True)


@pytest.mark.parametrize("tool", [{}, {"type": "web_search"}, {"type": "function", "function": "f"}])
def test_a_tool_without_a_name_is_refused(tool):
    assert refusal({"messages": ASKED, "tools": [tool]}).detail == "tool 1 does not name a function"


def test_unknown_keys_inside_parts_and_calls_are_named():
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    turns = [USER, {"role": "assistant", "content": [part], "tool_calls": [{**CALL, "id": "1", "output": "42"}]}]
    assert unknown_keys({"messages": turns}) == ["messages[].content[].cache_control", "messages[].tool_calls[].output"]
    assert unknown_keys({"messages": [USER, {"role": "assistant", "content": '[{"mood": 1}]'}]}) == []


@pytest.mark.parametrize(
    ("turn", "status"),
    [
        ({"role": "user", "content": "q", "value": "r"}, "unsupported_field: value"),
        ({"role": "user", "content": "q", "from": "gpt"}, "unsupported_field: from"),
        ({"role": "function", "content": "q", "from": "human"}, "unsupported_field: from"),
        ({"role": "user", "content": "q", "value": "q", "from": "human"}, None),
        ({"role": "user", "content": "q", "value": "", "from": "Ann"}, None),
    ],
)
def test_a_turn_that_says_other_things_in_sharegpts_words_is_refused(turn, status):
    row = {"messages": [*ASKED, turn, *ASKED]}
    if status:
        assert refusal(row).status == status
    else:
        assert normalize(row).messages == [*ASKED, USER, *ASKED]


def test_a_system_prompt_that_is_said_later_too_is_refused():
    later = [*ASKED, {"role": "system", "content": "s"}, *LONGER]
    assert refusal({"messages": later, "system": "s"}).status == "unsupported_field: system"


def test_unknown_keys_of_a_call_of_sharegpt_are_named():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}, "mood": "hm"}'}
    turns = [{"from": "human", "value": "q"}, call, {"from": "observation", "value": "r"}]
    assert unknown_keys({"conversations": turns}) == ["conversations[].tool_calls[].mood"]
