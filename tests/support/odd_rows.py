"""Rows as people write them: conversations of known meaning in every way to write them down, troubles, and edits.

Belongs here: what is drawn. What must come of it is `fuzz_conversations.py`.

Drawn with `random` and not with hypothesis, which takes longer to draw such a row than the program to read and encode
it; a number gives the same rows again.
"""

import copy
import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from less_assets.method.data.conversations import MESSAGE_TYPES
from less_assets.method.data.row_keys import MASK_KEYS, REASONING_KEYS

Row = dict[str, Any]
Turn = dict[str, Any]


class Meaning(NamedTuple):
    """What a row is to say: turns with the fields of `conversations.Message`, calls as lists; and tools, or None."""

    turns: list[Turn]
    tools: list[Row] | None


# ---- what is meant ----

_WORDS = [
    *(
        "the fox",
        "Who is it?",
        "Oslo, 2 km",
        "Ünï 🙂",
        "1.5",
        "ok.",
        "a\n\nb",
        "- x\n- y",
        "it’s",
        "日本語。",
        "x = [1, 2]",
    ),
    *("{{ 1 / 0 }}", "{% raw %}", "a\tb", "a\r\nb", "e\u0301", "\u2028", "\u00a0", "\u200d", "אב", "a\x00b", "\x7f"),
    *("null", "[]", "{}", '{"type": "text", "text": "x"}', "false", "0", '"', "\\", "'", "\\n", "True", "None"),
    *(
        "<think>",
        "</think>",
        "<think>\nhm\n</think>\n",
        "user:",
        "assistant\n",
        "\nUSER: ",
        "### Response:\n",
        "User: ",
    ),
    *("<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "[INST]", "[/INST]", "<|assistant|>\n", "<|end|>"),
    *("<|endoftext|>", "<|eot_id|>", "<end_of_turn>\n", "<tool_call>", "<|channel|>", "\ufeff", "\ufffd", "\u0085"),
]
_PLAIN = _WORDS[:11]
_CITIES = ["Oslo", "Ünï", "a b", "2", "日本", "x-y"]
_VALUES: list[Any] = [
    None,
    True,
    1.5,
    -3,
    10**12,
    [],
    {},
    ["Oslo", 2],
    {"a": {"b": "Oslo"}},
    "a\nb",
    'a "b"',
    "\\",
    "</s>",
    "",
]


def _text(draw: random.Random) -> str:
    """Some words, mostly plain ones, now and then with white space at the edges; never blank."""
    words = _WORDS if draw.random() < 0.3 else _PLAIN
    said = draw.choice([" ", " ", "\n", ""]).join(draw.choices(words, k=draw.choice([1, 1, 2, 3, 8])))
    if draw.random() < 0.1:
        said = draw.choice([" ", "\n", "\t", "  \n"]) + said + draw.choice(["", " ", "\n", "\n\n"])
    return said if said.strip() else "the fox"


def _call(draw: random.Random, number: int) -> Row:
    arguments: Any = {"city": draw.choice(_CITIES)}
    if draw.random() < 0.5:
        arguments["days"] = number
    if draw.random() < 0.2:
        arguments[draw.choice(["x", "Ünï", "a b"])] = draw.choice(_VALUES)
    if draw.random() < 0.05:
        arguments = {}
    if draw.random() < 0.3:
        arguments = json.dumps(arguments, ensure_ascii=draw.random() < 0.5)
    call: Row = {
        "type": "function",
        "function": {"name": draw.choice(["weather", "find_page"]), "arguments": arguments},
    }
    return {**call, "id": f"call{number:05}"} if draw.random() < 0.7 else call


def meaning(draw: random.Random) -> Meaning:
    """A conversation that may be learned from: at least one question and one answer with loss."""
    turns: list[Turn] = []
    plain = draw.random() < 0.4
    if draw.random() < 0.4:
        turns.append({"role": "developer" if draw.random() < 0.15 and not plain else "system", "content": _text(draw)})
    with_calls, with_thoughts = (not plain and draw.random() < share for share in (0.3, 0.3))
    if draw.random() < 0.03:
        turns.append({"role": "assistant", "content": _text(draw)})
    for number in range(draw.choice([1, 1, 2, 3])):
        turns.append({"role": "user", "content": _text(draw)})
        if not plain and draw.random() < 0.05:
            turns[-1]["name"] = "Ann"
        if with_calls and draw.random() < 0.7:
            calls = [_call(draw, 2 * number + i) for i in range(draw.choice([1, 1, 1, 2]))]
            calling: Turn = {"role": "assistant", "content": draw.choice(["", "", _text(draw)]), "tool_calls": calls}
            turns.append(calling)
            for call in calls:
                answer: Turn = {"role": "tool", "content": draw.choice(["", _text(draw), _text(draw)])}
                if "id" in call:
                    answer |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
                turns.append(answer)
        turns.append({"role": "assistant", "content": _text(draw)})
        if draw.random() < 0.03:
            turns.append({"role": draw.choice(["assistant", "user"]), "content": _text(draw)})
    if not plain and draw.random() < 0.05:
        turns.append({"role": "user", "content": _text(draw)})
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    for answer in answers:
        if with_thoughts and draw.random() < 0.6:
            answer["reasoning"] = _text(draw)
        if not plain and draw.random() < 0.2:
            answer["train"] = False
    if not any(map(_learned, answers)):
        draw.choice(answers).pop("train")
    tools = [_tool(draw) for _ in range(draw.choice([1, 2]))] if not plain and draw.random() < 0.25 else None
    return Meaning(turns, tools)


def _tool(draw: random.Random) -> Row:
    function: Row = {"name": draw.choice(["weather", "find_page"]), "description": draw.choice(["Tell.", "Ünï"])}
    if draw.random() < 0.8:
        city: Row = {"type": "string"} | draw.choice([{}, {"description": 'A "town".\n'}, {"enum": ["Ås", "Oslo"]}])
        function["parameters"] = {"type": "object", "properties": {"city": city}}
    return {"type": "function", "function": function}


def _learned(turn: Turn) -> bool:
    return turn["role"] == "assistant" and turn.get("train") is not False


# ---- how it is written ----

_SHARED = {"user": ["human", "user"], "assistant": ["gpt", "chatgpt", "assistant", "model"], "tool": ["observation"]}
_NOTES: list[tuple[str, Any]] = [("id", "m1"), ("source", "x"), ("mood", "glad"), ("images", []), ("score", 0.5)]


def written(meant: Meaning, draw: random.Random) -> Row:
    """A row that says what is meant, in one of the formats that can say it."""
    turns, row = copy.deepcopy(meant.turns), {}
    front = turns[0] if turns[0]["role"] == "system" else None
    pairs = turns[1:] if front else turns
    simple = all(turn.keys() == {"role", "content"} for turn in pairs) and [turn["role"] for turn in pairs] == [
        "user",
        "assistant",
    ] * (len(pairs) // 2)
    formats = ["messages", "messages", "sharegpt", "lists"] + ["alpaca", "alpaca", "pair"] * simple
    format = draw.choice(formats)
    if format == "pair" and len(pairs) != 2:
        format = "alpaca"
    if front and (format in ("alpaca", "pair") or draw.random() < 0.3):
        row[draw.choice(["system", "system_prompt"])] = front["content"]
        if format in ("alpaca", "pair") or draw.random() < 0.8:
            turns = turns[1:]
    if format == "alpaca":
        row |= _as_alpaca([turn["content"] for turn in turns], draw)
    elif format == "pair":
        row |= {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
    else:
        row |= _as_turns(turns, format, draw)
    if meant.tools:
        as_functions = draw.random() < 0.3
        tools = [tool["function"] for tool in meant.tools] if as_functions or draw.random() < 0.2 else meant.tools
        row["functions" if as_functions else "tools"] = (
            json.dumps(tools) if draw.random() < 0.3 else copy.deepcopy(tools)
        )
    if draw.random() < 0.3:
        key, value = draw.choice(_NOTES)
        row[key] = value
    return row


def _as_alpaca(texts: list[str], draw: random.Random) -> Row:
    *before, question, answer = texts
    row: Row = {"instruction": question, draw.choice(["output", "response"]): answer}
    instruction, gap, more = question.partition("\n\n")
    if instruction.strip() and gap and more.strip() and draw.random() < 0.7:
        row |= {"instruction": instruction, draw.choice(["input", "context"]): more}
    elif draw.random() < 0.3:
        row["input"] = draw.choice(["", None])
    if before or draw.random() < 0.1:
        history = [list(pair) for pair in zip(before[::2], before[1::2], strict=True)]
        row["history"] = json.dumps(history) if draw.random() < 0.2 else history
    return row


def _as_turns(turns: list[Turn], format: str, draw: random.Random) -> Row:
    """Lists of turns; masks at the turns or, for some, in one list of the row."""
    masked = any(turn.get("train") is False for turn in turns)
    listed = (masked or draw.random() < 0.1) and draw.random() < 0.3
    split = draw.randrange(1, len(turns)) if format == "lists" and len(turns) > 1 else len(turns)
    raw = []
    for place, turn in enumerate(turns):
        mask: Row = {}
        if turn["role"] == "assistant" and not listed:
            if not _learned(turn):
                implied = place < split and format == "lists" and draw.random() < 0.5
                mask = {} if implied else {draw.choice(MASK_KEYS): draw.choice([0, False, 0.0])}
            elif (place < split and format == "lists") or draw.random() < 0.1:
                mask = {draw.choice(MASK_KEYS): draw.choice([1, True, 1.0])}
        elif draw.random() < 0.05:
            mask = {draw.choice(MASK_KEYS): draw.choice([0, False, None])} if turn["role"] != "assistant" else {}
        raw.append(_as_turn(turn, draw, shared=format == "sharegpt") | mask)
    row: Row = {"loss_mask": [draw.choice([1, True]) if _learned(turn) else 0 for turn in turns]} if listed else {}
    if format == "lists":
        return row | {"prompt": raw[:split], "completion": raw[split:]}
    key = "conversations" if format == "sharegpt" else "messages"
    return row | {key: json.dumps(raw) if draw.random() < 0.05 else raw}


def _as_turn(turn: Turn, draw: random.Random, *, shared: bool) -> Turn:
    role, text, calls = turn["role"], turn["content"], turn.get("tool_calls")
    roles = _SHARED.get(role, [role]) if shared else [role] * 5 + ["function"] * (role == "tool")
    raw: Turn = {"role": draw.choice(roles), "content": text}
    if calls and shared and not text and draw.random() < 0.6:
        said = [call["function"] if call.keys() == {"type", "function"} else call for call in calls]
        raw |= {"role": "function_call", "content": json.dumps(said[0] if len(said) == 1 else said)}
    elif calls:
        if len(calls) == 1 and "id" not in calls[0] and draw.random() < 0.5:
            raw["function_call"] = calls[0]["function"]
        else:
            written = [_as_call(call, draw) for call in calls]
            raw["tool_calls"] = json.dumps(written) if draw.random() < 0.1 else written
        if not text and draw.random() < 0.5:
            raw["content"] = draw.choice([None, []])
    if isinstance(raw["content"], str) and raw["content"] and raw["role"] != "function_call" and draw.random() < 0.15:
        cut = draw.randrange(len(text) + 1)
        pieces = [piece for piece in (text[:cut], text[cut:]) if piece]
        kind = draw.choice(["text", "text", "input_text", "output_text"])
        raw["content"] = [{"type": kind, "text": piece} if draw.random() < 0.8 else piece for piece in pieces]
    if thought := turn.get("reasoning"):
        raw[draw.choice(REASONING_KEYS)] = thought
    raw |= {name: turn[name] for name in ("tool_call_id", "name") if name in turn}
    if draw.random() < 0.05:
        raw[draw.choice(["id", "mood", "refusal", "tool_calls" if not calls else "id"])] = None
    if shared and draw.random() < 0.9:
        raw["from"], raw["value"] = raw.pop("role"), raw.pop("content")
    return raw


def _as_call(call: Row, draw: random.Random) -> Row:
    if draw.random() < 0.7:
        return call
    flat = {name: value for name, value in call.items() if name != "function"} | call["function"]
    if draw.random() < 0.5:
        del flat["type"]
    return flat


# ---- what must not be accepted ----

_NOT_TEXT: list[Any] = [5, True, {"text": "x"}, [["x"]], [5]]


def _turns_of(row: Row) -> list[Turn]:
    return row["messages"]


def _answer_of(row: Row) -> Turn:
    return next(turn for turn in reversed(_turns_of(row)) if turn["role"] == "assistant")


def _user_of(row: Row) -> Turn:
    return next(turn for turn in _turns_of(row) if turn["role"] == "user")


def _masked(row: Row, draw: random.Random) -> None:
    for turn in _turns_of(row):
        if turn["role"] == "assistant":
            for name in MASK_KEYS:
                turn.pop(name, None)
            turn[draw.choice(MASK_KEYS)] = draw.choice([0, False])
    row.pop("loss_mask", None)


def _contradicting(row: Row, draw: random.Random) -> None:
    one, other = draw.sample(MASK_KEYS, 2)
    _answer_of(row).update({one: draw.choice([0, False]), other: draw.choice([1, True])})


TROUBLES: dict[str, Callable[[Row, random.Random], object]] = {
    "a row's media": lambda row, draw: row.update({draw.choice(["images", "image", "video", "audios"]): ["x.png"]}),
    "a turn's media": lambda row, draw: draw.choice(_turns_of(row)).update({draw.choice(["images", "audio"]): "x"}),
    "an image part": lambda row, draw: draw.choice(_turns_of(row)).update(
        content=[{"type": "text", "text": "x"}, {"type": draw.choice(["image_url", "input_audio"]), "image_url": "y"}]
    ),
    "a picture in a text part": lambda row, draw: _user_of(row).update(
        content=[{"type": "text", "text": "x", "image_url": {"url": "y"}}]
    ),
    "half a weight": lambda row, draw: _answer_of(row).update(
        {draw.choice(MASK_KEYS): draw.choice([0.5, -1, 2, "1x"])}
    ),
    "a row's weight": lambda row, draw: row.update(weight=draw.choice([0.5, 0, 2, "0.5"])),
    "a verdict": lambda row, draw: row.update(
        {draw.choice(["label", "kto_tag"]): draw.choice([False, 0, "false", 0.0])}
    ),
    "a pair": lambda row, draw: row.update({draw.choice(["rejected", "rejected_response", "chosen"]): "bad"}),
    "template arguments": lambda row, draw: row.update(chat_template_kwargs={"enable_thinking": False}),
    "a role": lambda row, draw: draw.choice(_turns_of(row)).update(
        role=draw.choice(["narrator", None, 3, "Assistant "])
    ),
    "no text": lambda row, draw: _user_of(row).update(content=draw.choice(["", " \n", None, [], "\u2028"])),
    "a wrong type": lambda row, draw: draw.choice(_turns_of(row)).update(content=draw.choice(_NOT_TEXT)),
    "a short mask": lambda row, draw: row.update(loss_mask=[1] * (len(_turns_of(row)) + draw.choice([-1, 1]))),
    "a question's loss": lambda row, draw: _user_of(row).update({draw.choice(MASK_KEYS): draw.choice([1, True])}),
    "masks that differ": _contradicting,
    "no loss": _masked,
    "two systems": lambda row, draw: row.update(system="One.", system_prompt="Two."),
    "a question's thought": lambda row, draw: _user_of(row).update({draw.choice(REASONING_KEYS): "hm"}),
    "two thoughts": lambda row, draw: _answer_of(row).update(reasoning_content="one", thinking="two"),
    "a question's call": lambda row, draw: _user_of(row).update(tool_calls=[{"name": "f", "arguments": {}}]),
    "a refusal": lambda row, draw: _answer_of(row).update(refusal="no"),
    "spans of loss": lambda row, draw: _answer_of(row).update(train_detail=[{"begin_offset": 0, "train": False}]),
    "a call without a name": lambda row, draw: _answer_of(row).update(tool_calls=[{"function": {"arguments": {}}}]),
    "arguments in a list": lambda row, draw: _answer_of(row).update(tool_calls=[{"name": "f", "arguments": [1]}]),
    "no number": lambda row, draw: _answer_of(row).update(tool_calls=[{"name": "f", "arguments": {"x": math.nan}}]),
    "half a pair": lambda row, draw: draw.choice(_turns_of(row)).update(content="a\ud800b"),
    "half a pair in a thought": lambda row, draw: _answer_of(row).update(reasoning_content="a\udc00"),
    "a turn of text": lambda row, draw: _turns_of(row).append(draw.choice(["x", 5, None])),
    "two lists of tools": lambda row, draw: row.update(tools=[{"name": "f"}], functions=[{"name": "f"}]),
    "tools of text": lambda row, draw: row.update(tools="look, find"),
    "no user": lambda row, draw: row.update(messages=[turn for turn in _turns_of(row) if turn["role"] != "user"]),
    "no answer": lambda row, draw: row.update(
        messages=[turn for turn in _turns_of(row) if turn["role"] != "assistant"]
    ),
}
"""Changes of a row of `messages` after which it must be quarantined."""


def plain_row(meant: Meaning, draw: random.Random) -> Row:
    """A row of `messages` that says what is meant, without its tools."""
    turns = [_as_turn(turn, draw, shared=False) | {"role": turn["role"]} for turn in copy.deepcopy(meant.turns)]
    for turn, raw in zip(meant.turns, turns, strict=True):
        if turn.get("train") is False:
            raw["weight"] = 0
    return {"messages": turns}


def troubled(meant: Meaning, draw: random.Random) -> tuple[str, Row]:
    """A row with a trouble, and the trouble's name."""
    row = plain_row(meant, draw)
    name = draw.choice(list(TROUBLES))
    TROUBLES[name](row, draw)
    return name, row


# ---- of which anything may come ----

_ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 10**30, math.inf, "", " ", "q", "null", "[]", "a\x00b", "\ud800", "½", "0"),
    *([], [[]], [None], {}, {"": None}, {"role": "assistant"}, ["x"], {"type": "text", "text": "x"}, "<|im_end|>"),
]


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of every object and list: (what holds it, key or position)."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _spots(value[key])


def edit(row: Row, draw: random.Random) -> None:
    """Replace, remove, repeat, exchange or rename something in a row."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        spots = list(_spots(row))
        if not spots:
            return
        holder, key = draw.choice(spots)
        how = draw.choice(["replace", "remove", "exchange", "repeat", "rename"])
        if how == "replace":
            holder[key] = copy.deepcopy(draw.choice(_ODD))
        elif how == "remove":
            del holder[key]
        elif how == "exchange":
            other, position = draw.choice(spots)
            holder[key], other[position] = copy.deepcopy(other[position]), copy.deepcopy(holder[key])
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            name = draw.choice([*MASK_KEYS, *REASONING_KEYS, "content", "value", "name", "tools", "system", "x", ""])
            holder[name] = holder.pop(key) if how == "rename" else copy.deepcopy(holder[key])


# ---- files whose columns have one type each ----


def in_columns(meant: Meaning) -> Row:
    """A row whose columns have one type each, as Parquet needs: absent is null, arguments are JSON text."""
    turns = []
    for turn in meant.turns:
        raw = dict.fromkeys((*MESSAGE_TYPES, "tool_calls")) | turn
        raw["tool_calls"] = [
            {
                "id": call.get("id"),
                "type": "function",
                "function": call["function"] | {"arguments": arguments_text(call)},
            }
            for call in turn.get("tool_calls", [])
        ]
        turns.append(raw)
    return {"messages": turns, "tools": json.dumps(meant.tools) if meant.tools else None}


def in_cells(meant: Meaning, draw: random.Random) -> Row:
    """A row of a CSV file: lists as JSON text, and no value where a row has none."""
    row = plain_row(meant, draw)
    cells = {"messages": json.dumps(row["messages"], ensure_ascii=draw.random() < 0.5), "tools": "", "mood": "glad"}
    return cells | {"tools": json.dumps(meant.tools)} if meant.tools else cells


def csv_bytes(rows: list[Row]) -> bytes:
    """Rows as a CSV file, quoted as RFC 4180 has it."""
    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue().encode()


def arguments_text(call: Row) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments)
