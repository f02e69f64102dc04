"""Raw rows to conversations: formats are recognised, what changes a row's meaning is carried, or the row is refused.

Belongs here: which field of which format means what, and the reasons for which a row is quarantined. Physical rows of
files are `row_files.py`, conversations `conversations.py`, tables of rows `examples.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

from less_assets.method.data.conversations import (
    ROLES,
    Conversation,
    EqualNamesError,
    Message,
    carries_loss,
    json_text,
    parsed_json,
)
from less_assets.method.data.row_keys import (
    CALL_KEYS,
    CONTENT_PARTS,
    FORMAT_KEYS,
    HARMLESS_KEYS,
    MASK_KEYS,
    PART_KEYS,
    REASONING_KEYS,
    ROW_KEYS,
    SYSTEM_KEYS,
    TURN_KEYS,
    UNSUPPORTED_OF_ROWS,
    UNSUPPORTED_OF_TURNS,
    UNSUPPORTED_ROW_KEYS,
    UNSUPPORTED_TURN_KEYS,
    VERDICT_KEYS,
    VERDICTS_AGAINST,
)

RowFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"]

ROW_STATUSES = {
    "ok": "a usable example",
    "blank": "a blank line: no example, but its row number counts",
    "invalid_json": "the line is not JSON",
    "invalid_csv": "the record does not fit the header, or its quotes do not close",
    "invalid_utf8": "the bytes are not UTF-8, or a string holds half a surrogate pair",
    "wrong_type": "the row, a field or a turn is not of the type that its format asks for",
    "missing_field": "the row has none of the known formats, or not the stated one",
    "unsupported_field": "the field that is named after the colon changes what the row means, and cannot be carried",
    "unknown_role": "a turn's role is none of system, developer, user, assistant, tool, nor the format's word for one",
    "empty_turn": "a turn has no text",
    "no_user_turn": "nobody asks",
    "no_assistant_turn": "there is nothing to learn from: no assistant turn, or none with loss",
    "too_large": "the row has more than MAX_ROW_BYTES bytes",
}
"""Every `status` of a pool row and what it means; `unsupported_field` goes on with a colon and the field's name."""

_OPENAI_ROLES = {**{role: role for role in ROLES}, "function": "tool"}

# ShareGPT's words and those of its descendants.
_SHAREGPT_ROLES = {
    **_OPENAI_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


class UnusableRowError(Exception):
    """Why a single row cannot be used; it becomes the row's status and detail.

    Args:
        status: A key of `ROW_STATUSES`, or `unsupported_field: NAME`.
        detail: What exactly is wrong.
    """

    def __init__(self, status: str, detail: str) -> None:
        # Names of fields are quoted, and may hold what no file can: half a surrogate pair, bytes that are not UTF-8.
        printable = detail.encode("utf-8", "backslashreplace").decode()
        super().__init__(printable)
        self.status, self.detail = status, printable


def detect_format(record: Mapping[str, object]) -> RowFormat | None:
    """Return the format of a record by its fields, or None if they are none of the known ones.

    Args:
        record: Field name to value; fields that are null count as absent, empty ones where others say more.
    """
    stated = {name for name, value in record.items() if not _is_empty(value)}
    present = {name for name, value in record.items() if value is not None}
    return _format_of(stated) or _format_of(present)


def _format_of(names: Collection[str]) -> RowFormat | None:
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if "instruction" in names and ("output" in names or "response" in names):
        return "alpaca"
    if "prompt" in names and "completion" in names:
        return "prompt_completion"
    return None


def normalize(record: Mapping[str, object], format: RowFormat = "auto") -> Conversation:
    """Return the conversation of a record; text is not changed, all turns are kept, an empty system turn is not.

    docs/row-formats.md lists every field and what becomes of it.

    Args:
        record: Field name to value.
        format: One of the formats, or "auto": decided for each record by its fields.

    Raises:
        UnusableRowError: If the record is not in that format, not a usable conversation, or means what cannot be
            carried.
    """
    row_format = detect_format(record) if format == "auto" else format
    _refuse_unsupported(record, row_format)
    if row_format is None:
        raise UnusableRowError(
            "missing_field",
            "neither messages, conversations, instruction + output nor prompt + completion; there is: "
            + (", ".join(map(str, record)) or "nothing"),
        )
    if row_format == "messages":
        messages = _turns(_field(record, "messages"), "messages", _OPENAI_ROLES)
    elif row_format == "sharegpt":
        messages = _turns(_field(record, "conversations"), "conversations", _SHAREGPT_ROLES)
    elif row_format == "alpaca":
        messages = _alpaca(record)
    else:
        messages = _prompt_completion(record)
    _apply_loss_mask(messages, record.get("loss_mask"))
    messages = _with_system(messages, record)
    for message in messages:
        if message.get("train"):  # stated, and the default
            del message["train"]
    messages = [turn for turn in messages if turn["content"].strip() or turn["role"] not in ("system", "developer")]
    conversation = Conversation(messages, _tools(record))
    _check_conversation(conversation)
    return conversation


def unknown_keys(record: Mapping[str, object], format: RowFormat = "auto") -> list[str]:
    """Return the keys of a usable record that mean nothing here and are not known to be harmless.

    Args:
        record: Field name to value.
        format: As in `normalize`.

    Returns:
        Keys of the row, and `messages[].KEY` (or `conversations[].KEY`, …) for keys of turns; each once.
    """
    row_format = detect_format(record) if format == "auto" else format
    own_keys = FORMAT_KEYS.get(str(row_format), ())
    known = {*own_keys, *ROW_KEYS, *UNSUPPORTED_ROW_KEYS, *VERDICT_KEYS, "weight", *HARMLESS_KEYS}
    unknown = [str(key) for key, value in record.items() if key not in known and not _is_empty(value)]
    unknown += [key for key in VERDICT_KEYS if not _is_empty(record.get(key)) and _verdict(record[key]) != 1]
    known_of_turns = {*TURN_KEYS, *REASONING_KEYS, *MASK_KEYS, *UNSUPPORTED_TURN_KEYS, *HARMLESS_KEYS}
    for name in own_keys:
        turns = _parsed(record.get(name)) if name != "history" else None
        unknown += _unknown_of_objects(turns, name, known_of_turns)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                for text in ("content", "value"):
                    unknown += _unknown_of_objects(turn.get(text), f"{name}[].{text}", PART_KEYS)
                called = "value" if turn.get("from") == "function_call" else "function_call"
                for calls in (turn.get("tool_calls"), turn.get(called)):
                    unknown += _unknown_of_objects(_parsed(calls), f"{name}[].tool_calls", CALL_KEYS)
    return list(dict.fromkeys(key.encode("utf-8", "backslashreplace").decode() for key in unknown))


def _unknown_of_objects(objects: object, name: str, known: Collection[str]) -> list[str]:
    """Keys of a list's objects, or of one object, that are none of those known and say something."""
    return [
        f"{name}[].{key}"
        for item in (objects if isinstance(objects, list) else [objects])
        if isinstance(item, dict)
        for key, value in item.items()
        if key not in known and not _is_empty(value)
    ]


def other_columns(record: Mapping[str, object], format: RowFormat = "auto") -> dict[str, object]:
    """Return the fields of a usable record that are not part of its conversation, in their order.

    Args:
        record: Field name to value.
        format: As in `normalize`.
    """
    row_format = detect_format(record) if format == "auto" else format
    read = {*FORMAT_KEYS.get(str(row_format), ()), *ROW_KEYS}
    return {name: value for name, value in record.items() if name not in read}


# ---- what cannot be carried ----


def _is_empty(value: object) -> bool:
    """Null, no text, no entries: a column that this row does not use."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _unsupported(name: str, detail: str) -> UnusableRowError:
    return UnusableRowError(f"unsupported_field: {name}", detail)


def _refuse_unsupported(record: Mapping[str, object], row_format: str | None) -> None:
    named = [name for name in UNSUPPORTED_ROW_KEYS if name in record]
    carried = (*ROW_KEYS, "weight")
    named += [name for name in record if name not in carried and UNSUPPORTED_OF_ROWS.fullmatch(str(name))]
    named += ["history"] if row_format != "alpaca" else []
    for name in named:
        if not _is_empty(record.get(name)):
            raise _unsupported(name, f"the row has {name!r}, which cannot be carried")
    for name in VERDICT_KEYS:
        if _verdict(record.get(name)) in VERDICTS_AGAINST:
            raise _unsupported(name, f"{name} is {record[name]!r}: the answer is one not to learn")
    weight = record.get("weight")
    if not _is_empty(weight) and _verdict(weight) != 1:
        raise _unsupported("weight", f"the row's weight is {weight!r}"[:200] + "; each row counts once")


def _verdict(value: object) -> object:
    """A truth value or number, also as the text that a CSV file has."""
    return _parsed(value.strip().lower()) if isinstance(value, str) else value


# ---- fields ----


def _field(record: Mapping[str, object], name: str) -> object:
    if record.get(name) is None:
        raise UnusableRowError(
            "missing_field", f"no field {name!r}; there is: {', '.join(map(str, record)) or 'nothing'}"
        )
    return record[name]


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError("wrong_type", f"{what} is {_type_name(value)}, not text")
    return value


def _type_name(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _parsed(value: object) -> object:
    """A value, or what its JSON text says; text that is not JSON stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parsed_json(value)
    except (ValueError, RecursionError):
        return value


def _list(value: object, what: str, of: str) -> list[object]:
    """A list, also as JSON text: the only way to keep one in a CSV file."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = parsed_json(value)
        except (ValueError, RecursionError) as error:
            raise UnusableRowError("wrong_type", f"{what} is text, but not JSON: {error}"[:200]) from error
    if not isinstance(parsed, list):
        raise UnusableRowError("wrong_type", f"{what} is {_type_name(parsed)}, not a list of {of}")
    return parsed


def _json(value: Sequence[object], what: str) -> str:
    try:
        return json_text(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UnusableRowError("wrong_type", f"{what} cannot be written as JSON: {error}"[:200]) from error


# ---- turns ----


def _turns(value: object, what: str, roles: Mapping[str, str]) -> list[Message]:
    turns = _list(value, what, "turns")
    return [_turn(turn, f"turn {position}", roles) for position, turn in enumerate(turns, start=1)]


def _turn(turn: object, what: str, roles: Mapping[str, str]) -> Message:
    """One turn, of OpenAI's keys or of ShareGPT's; the latter only where the format has its words for roles."""
    if not isinstance(turn, dict):
        raise UnusableRowError("wrong_type", f"{what} is {_type_name(turn)}, not an object")
    sharegpt = "human" in roles
    said_role = turn.get(_one_of(turn, "from", "role", what) if sharegpt else "role")
    text_key = _one_of(turn, "value", "content", what) if sharegpt else "content"
    if not isinstance(said_role, str) or said_role not in roles:
        raise UnusableRowError("unknown_role", f"{what} has the role {said_role!r}"[:200])
    named = [name for name in UNSUPPORTED_TURN_KEYS if name in turn]
    named += [name for name in turn if name not in MASK_KEYS and UNSUPPORTED_OF_TURNS.fullmatch(str(name))]
    for name in named:
        if not _is_empty(turn[name]):
            raise _unsupported(name, f"{what} has {name!r}, which cannot be carried")
    if not sharegpt:
        _refuse_other_words(turn, what)
    message: Message = {"role": roles[said_role], "content": ""}
    calls: list[object] = []
    if said_role == "function_call":
        called = _parsed(turn.get(text_key))
        calls = called if isinstance(called, list) else [called]
    else:
        message["content"] = _content(turn.get(text_key), f"{what}'s {text_key}")
    if reasoning := _reasoning(turn, what, message["role"]):
        message["reasoning"] = reasoning
    if not _is_empty(turn.get("tool_calls")):
        if calls:
            raise _unsupported("tool_calls", f"{what} has its calls under two names")
        calls = [*_list(turn["tool_calls"], f"{what}'s tool_calls", "calls")]
    if not _is_empty(turn.get("function_call")):
        if calls:
            raise _unsupported("function_call", f"{what} has its calls under two names")
        calls = [_parsed(turn["function_call"])]
    if calls:
        if message["role"] != "assistant":
            raise _unsupported("tool_calls", f"{what} ({message['role']}) calls tools; only the assistant does")
        message["tool_calls"] = _json([_call(call, what) for call in calls], f"{what}'s tool_calls")
    if not _is_empty(turn.get("tool_call_id")):
        message["tool_call_id"] = _text(turn["tool_call_id"], f"{what}'s tool_call_id")
    if not _is_empty(turn.get("name")):
        message["name"] = _text(turn["name"], f"{what}'s name")
    for name in MASK_KEYS:
        if turn.get(name) is not None:
            _set_mask(message, turn[name], name, what)
    return message


def _refuse_other_words(turn: Mapping[str, object], what: str) -> None:
    """Refuse a turn in OpenAI's words that says something else in ShareGPT's."""
    if not _is_empty(turn.get("value")) and turn["value"] != turn.get("content"):
        raise _unsupported("value", f"{what} has 'content' and 'value', and they differ")
    speaker = turn.get("from")
    if isinstance(speaker, str) and _SHAREGPT_ROLES.get(speaker, turn["role"]) != _OPENAI_ROLES[str(turn["role"])]:
        raise _unsupported("from", f"{what} has 'role' and 'from', and they differ")


def _content(value: object, what: str) -> str:
    """Text, or a list of text parts, which are joined as chat templates do: with nothing between."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _text(value, what)
    texts = []
    for number, part in enumerate(value, start=1):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise UnusableRowError("wrong_type", f"part {number} of {what} is {_type_name(part)}, not an object")
        kind = part.get("type")
        more = [key for key, value in part.items() if key not in ("type", "text") and not _is_empty(value)]
        if (
            kind in (None, "text", "input_text", "output_text")
            and isinstance(part.get("text"), str)
            and not any(map(_changes_a_part, more))
        ):
            texts.append(part["text"])
            continue
        named = [name for name in (kind, *more) if isinstance(name, str) and _changes_a_part(name)]
        raise _unsupported(named[0] if named else "content", f"part {number} of {what} is no text"[:200])
    return "".join(texts)


def _changes_a_part(name: object) -> bool:
    """Whether a key, or the type, of a content part makes it more than its text: media, a thought, a mask."""
    return name in CONTENT_PARTS or bool(UNSUPPORTED_OF_TURNS.fullmatch(str(name)))


def _reasoning(turn: Mapping[str, object], what: str, role: str) -> str | None:
    thoughts = {name: turn[name] for name in REASONING_KEYS if not _is_empty(turn.get(name))}
    texts = {_text(value, f"{what}'s {name}") for name, value in thoughts.items()}
    if not any(text.strip() for text in texts):
        return None
    name = next(iter(thoughts))
    if role != "assistant":
        raise _unsupported(name, f"{what} ({role}) has {name}; only the assistant's can be carried")
    if len(texts) > 1:
        raise _unsupported(name, f"{what} has different texts in {' and '.join(thoughts)}")
    return texts.pop()


def _one_of(record: Mapping[str, object], name: str, other: str, what: str) -> str:
    """Which of two words for one thing a record uses; where both say something, and not the same, nobody knows."""
    if _is_empty(record.get(name)):
        return other if record.get(name) is None or not _is_empty(record.get(other)) else name
    if not _is_empty(record.get(other)) and record[name] != record[other]:
        raise _unsupported(other, f"{what} has {name!r} and {other!r}, and they differ")
    return name


_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""What makers of data call the arguments of a call."""


def _call(call: object, what: str) -> dict[str, object]:
    """A call in OpenAI's form; arguments stay as they are, an object or its JSON text."""
    if not isinstance(call, dict):
        raise UnusableRowError("wrong_type", f"a call of {what} is {_type_name(call)}, not an object")
    call = {name: value for name, value in call.items() if value is not None}
    if "function" not in call:
        named = {name: call.pop(name) for name in ("name", *_ARGUMENTS) if name in call}
        arguments = _one_arguments(named, what)
        call = {"type": "function", **call, "function": {"name": named.get("name"), "arguments": {}} | arguments}
    elif outside := [name for name in _ARGUMENTS if not _is_empty(call.get(name))]:
        raise _unsupported("tool_calls", f"a call of {what} has {outside[0]!r} beside its function, not in it")
    function = call["function"]
    if isinstance(function, dict):
        function = _one_arguments({name: value for name, value in function.items() if value is not None}, what)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRowError("wrong_type", f"a call of {what} does not name a function")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str | dict):
        raise UnusableRowError("wrong_type", f"arguments of a call of {what} are neither an object nor text")
    try:
        parsed_json(arguments if isinstance(arguments, str) else "{}")
    except EqualNamesError as error:
        raise UnusableRowError("wrong_type", f"arguments of a call of {what}: {error}"[:200]) from error
    except (ValueError, RecursionError):  # text that is not JSON stays text
        pass
    return {"type": "function", **call, "function": function}


def _one_arguments(function: dict[str, object], what: str) -> dict[str, object]:
    """The fields of a function that is called, with its arguments under their own name whatever they were called."""
    given = [name for name in _ARGUMENTS if function.get(name) not in (None, {}, "")]
    if len(given) > 1:
        raise _unsupported("tool_calls", f"a call of {what} has its arguments in {' and '.join(given)}")
    said = {"arguments": function[given[0]]} if given and given != ["arguments"] else {}
    return {name: value for name, value in function.items() if name not in _ARGUMENTS[1:]} | said


def _set_mask(message: Message, value: object, name: str, what: str) -> None:
    """Carry a mask. Turns of others never carry loss, so that 0 says nothing there and 1 cannot be followed."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise _unsupported(name, f"{what}'s {name} is {value!r}"[:200] + "; a turn has loss (1) or none (0)")
    role = message["role"]
    if role != "assistant":
        if value:
            raise _unsupported(name, f"{what} ({role}) is to carry loss; only assistant turns can")
    elif message.setdefault("train", bool(value)) is not bool(value):
        raise _unsupported(name, f"{what}'s {name} contradicts another mask")


def _apply_loss_mask(messages: Sequence[Message], mask: object) -> None:
    """Carry a row's `loss_mask`: one entry for each turn."""
    if _is_empty(mask):
        return
    entries = _parsed(mask)
    if not isinstance(entries, list) or len(entries) != len(messages):
        size = f"{len(entries)} entries" if isinstance(entries, list) else _type_name(entries)
        raise _unsupported("loss_mask", f"loss_mask is {size}, the row has {len(messages)} turns; one entry each")
    for position, (message, value) in enumerate(zip(messages, entries, strict=True), start=1):
        _set_mask(message, value, "loss_mask", f"turn {position}")


# ---- the other formats ----


def _alpaca(record: Mapping[str, object]) -> list[Message]:
    instruction = _text(_field(record, "instruction"), "instruction")
    output = _text(_field(record, _one_of(record, "output", "response", "the row")), "output")
    context = record.get(_one_of(record, "input", "context", "the row"))
    context = "" if context is None else _text(context, "input")
    question = "\n\n".join(text for text in (instruction, context) if text.strip()) or instruction
    return [
        message
        for asked, answered in (*_history(record.get("history")), (question, output))
        for message in (Message(role="user", content=asked), Message(role="assistant", content=answered))
    ]


def _history(value: object) -> Iterator[tuple[str, str]]:
    """Earlier questions and answers."""
    for number, pair in enumerate([] if _is_empty(value) else _list(value, "history", "pairs"), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableRowError("wrong_type", f"entry {number} of history is no pair of question and answer")
        yield _text(pair[0], f"history {number}'s question"), _text(pair[1], f"history {number}'s answer")


def _prompt_completion(record: Mapping[str, object]) -> list[Message]:
    """Two texts, or two lists of turns; the prompt's assistant turns carry no loss unless the row says so."""
    prompt, completion = (_turns_or_text(_field(record, name)) for name in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _turns(prompt, "prompt", _OPENAI_ROLES)
        for message in asked:
            if message["role"] == "assistant" and _is_empty(record.get("loss_mask")):
                message.setdefault("train", False)
        return [*asked, *_turns(completion, "completion", _OPENAI_ROLES)]
    return [
        {"role": "user", "content": _text(prompt, "prompt")},
        {"role": "assistant", "content": _text(completion, "completion")},
    ]


def _turns_or_text(value: object) -> object:
    """A list of turns where a text is the JSON of one, as a CSV file has it; else the value as it is."""
    parsed = _parsed(value)
    are_turns = isinstance(parsed, list) and all(isinstance(turn, dict) and "role" in turn for turn in parsed)
    return parsed if parsed and are_turns else value


def _with_system(messages: list[Message], record: Mapping[str, object]) -> list[Message]:
    """Put a row's system prompt in front, unless the turns begin with the same."""
    prompts = {name: _text(record[name], name) for name in SYSTEM_KEYS if record.get(name) is not None}
    prompts = {name: text for name, text in prompts.items() if text.strip()}
    if not prompts:
        return messages
    name, prompt = next(iter(prompts.items()))
    said = [turn for turn in messages if turn["content"].strip()]
    spoken = [turn["content"] for turn in said if turn["role"] in ("system", "developer")]
    if {*prompts.values(), *spoken} != {prompt}:
        raise _unsupported(name, "the row has several system prompts, and they differ")
    if spoken and said[0]["role"] not in ("system", "developer"):
        raise _unsupported(name, "the row's system prompt is said in a later turn, too")
    return messages if spoken else [{"role": "system", "content": prompt}, *messages]


def _tools(record: Mapping[str, object]) -> str | None:
    """Tool schemas in OpenAI's form; a bare function is put into it."""
    stated = {name: record[name] for name in ("tools", "functions") if not _is_empty(_parsed(record.get(name)))}
    if not stated:
        return None
    if len(stated) > 1:
        raise _unsupported("functions", "the row has both tools and functions")
    ((name, value),) = stated.items()
    tools = []
    for number, tool in enumerate(_list(value, name, "tools"), start=1):
        if not isinstance(tool, dict):
            raise UnusableRowError("wrong_type", f"tool {number} is {_type_name(tool)}, not an object")
        bare = "function" not in tool and isinstance(tool.get("name"), str) and tool.get("type") in (None, "function")
        if bare:
            function = {key: part for key, part in tool.items() if key != "type"}
            if "input_schema" in function and "parameters" not in function:  # Anthropic's word
                function["parameters"] = function.pop("input_schema")
            tool = {"type": "function", "function": function}
        described = tool.get("function")
        if not isinstance(described, dict) or not isinstance(described.get("name"), str):
            raise UnusableRowError("wrong_type", f"tool {number} does not name a function")
        tools.append(tool)
    return _json(tools, name)


# ---- the conversation as a whole ----


def _check_conversation(conversation: Conversation) -> None:
    for position, message in enumerate(conversation.messages, start=1):
        says_nothing = not message["content"].strip() and not message.get("tool_calls")
        if says_nothing and message["role"] != "tool":
            raise UnusableRowError("empty_turn", f"turn {position} ({message['role']}) has no text")
        for value in message.values():
            _check_text(value, f"turn {position}")
    _check_text(conversation.tools, "tools")
    roles = {message["role"] for message in conversation.messages}
    if "assistant" not in roles:
        detail = "no assistant turn" if conversation.messages else "no turns at all"
        raise UnusableRowError("no_assistant_turn", detail)
    if "user" not in roles:
        raise UnusableRowError("no_user_turn", "no user turn")
    if not any(map(carries_loss, conversation.messages)):
        raise UnusableRowError("no_assistant_turn", "every assistant turn is masked")


def _check_text(value: object, what: str) -> None:
    try:
        if isinstance(value, str):
            value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableRowError("invalid_utf8", f"{what} holds half a surrogate pair") from error
