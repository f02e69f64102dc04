"""What the page is given of a conversation."""

from less_assets.method.data.conversations import MESSAGE_TYPES
from less_assets.report.contents import page_conversation


def test_a_plain_turn_is_role_and_text_and_others_have_what_they_have():
    empty = dict.fromkeys(MESSAGE_TYPES)
    calls = '[{"type":"function","function":{"name":"add","arguments":{}}}]'
    turns = [
        empty | {"role": "user", "content": "q", "train": False},
        empty | {"role": "assistant", "content": "", "tool_calls": calls, "train": False, "reasoning": "hm"},
        empty | {"role": "tool", "content": "4", "name": "add"},
        empty | {"role": "assistant", "content": "a"},
    ]
    call = {"name": "add", "arguments": {}}
    assert page_conversation(turns, "[]") == {
        "messages": [
            ["user", "q"],
            ["assistant", "", {"reasoning": "hm", "calls": [call], "masked": True}],
            ["tool", "4", {"name": "add"}],
            ["assistant", "a"],
        ],
        "tools": "[]",
    }
    called = [
        empty | {"role": "assistant", "content": "", "tool_calls": '[{"id":"7","type":"function","function":{}}]'},
        empty | {"role": "tool", "content": "4", "tool_call_id": "7"},
    ]
    assert page_conversation(called, None)["messages"] == [
        ["assistant", "", {"calls": [{}], "call_ids": ["7"]}],
        ["tool", "4", {"call_id": "7"}],
    ]
    assert page_conversation(turns[3:], None) == {"messages": [["assistant", "a"]]}
