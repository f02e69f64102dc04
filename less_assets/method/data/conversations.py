"""A conversation: its turns, the tools it may call, its id, and the form in which trainers read it.

Belongs here: what every part of the program means by a message, whatever file it came from. How raw rows become
conversations is `row_formats.py`, tables of them are `examples.py`, token ids `chat.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import polars as pl

ROLES = ("system", "user", "assistant", "tool", "developer")

MESSAGE_TYPES: dict[str, pl.DataType] = {
    "role": pl.String(),
    "content": pl.String(),
    "reasoning": pl.String(),
    "tool_calls": pl.String(),
    "tool_call_id": pl.String(),
    "name": pl.String(),
    "train": pl.Boolean(),
}
"""Fields of a message in tables; all but `role` and `content` may be null, which means the default."""

MESSAGES_TYPE = pl.List(pl.Struct(MESSAGE_TYPES))
"""How turns are kept in tables."""

SHORT_ANSWER = 20


class Message(TypedDict):
    """One turn. A field that is absent or None has its default.

    Attributes:
        role: One of `ROLES`.
        content: Its text; may be empty where a tool answers nothing, or an assistant turn only calls tools.
        reasoning: What the assistant thought before it answered.
        tool_calls: JSON text of the assistant's calls, a list in OpenAI's form.
        tool_call_id: The call that a tool turn answers.
        name: Who speaks: the tool's or a participant's name.
        train: False: this assistant turn carries no loss. Without it assistant turns do, others never.
    """

    role: str
    content: str
    reasoning: NotRequired[str | None]
    tool_calls: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]
    name: NotRequired[str | None]
    train: NotRequired[bool | None]


class Conversation(NamedTuple):
    """What a row says.

    Attributes:
        messages: The turns.
        tools: JSON text of the list of tool schemas that the assistant may call; None: there are none.
    """

    messages: list[Message]
    tools: str | None = None


def stated(message: Message) -> Message:
    """Return a message without the fields that have their default, in the order of `MESSAGE_TYPES`.

    Args:
        message: For example a struct of a table, whose empty fields are None.
    """
    fields = {name: message.get(name) for name in MESSAGE_TYPES}
    return cast(Message, {name: value for name, value in fields.items() if value is not None})


def example_id(messages: Sequence[Message], tools: str | None = None) -> str:
    """Return the id of an example: blake2b-128 of canonical JSON, 32 hex characters.

    The JSON is [[role, content], …]. A turn with more fields is [role, content, {field: value}]; with tools the whole
    is {"messages": […], "tools": tools}. So a mask, a thought, a call or a tool makes another example, and a row that
    has none of them keeps the id that it always had.

    Args:
        messages: The turns; text is taken as it is, so a changed space is another example.
        tools: JSON text of the tools.
    """
    turns: list[list[object]] = []
    for message in messages:
        more = {name: value for name, value in stated(message).items() if name not in ("role", "content")}
        turns.append([message["role"], message["content"], *([more] if more else [])])
    whole = turns if tools is None else {"messages": turns, "tools": tools}
    canonical = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=16).hexdigest()


def carries_loss(message: Message) -> bool:
    """Return whether a turn is learned from: the assistant's, unless it is masked."""
    return message["role"] == "assistant" and message.get("train") is not False


def participant(message: Message) -> str | None:
    """Return who speaks, where the name says more than the role: not a tool's, whose call names it.

    Args:
        message: The turn.
    """
    name = message.get("name")
    return None if not name or message["role"] == "tool" or name.casefold() == message["role"] else name


def is_very_short(messages: Sequence[Message]) -> bool:
    """Return whether the turns with loss together have at most `SHORT_ANSWER` characters: a word or two.

    Reasoning and tool calls count as text.

    Args:
        messages: The turns.
    """
    said = ((turn["content"], turn.get("reasoning"), turn.get("tool_calls")) for turn in messages if carries_loss(turn))
    return sum(len((text or "").strip()) for texts in said for text in texts) <= SHORT_ANSWER


def full_text(message: Message) -> str:
    """Return all that a turn says: reasoning, content and tool calls, each on lines of its own.

    Args:
        message: The turn.
    """
    parts = (message.get("reasoning"), message["content"], message.get("tool_calls"))
    return "\n".join(part for part in parts if part)


def for_trainers(messages: Sequence[Message], tools: str | None = None) -> dict[str, Any]:
    """Return a conversation in the form that trainers read, with the fields that are stated and no others.

    `tool_calls` and `tools` are lists, reasoning is `reasoning_content`, as TRL's documentation has them ("Dataset
    formats"); a masked turn has `weight` 0, as in OpenAI's format of fine-tuning files. Reading it with
    `row_formats.normalize` gives the same conversation.

    Args:
        messages: The turns.
        tools: JSON text of the tools.

    Returns:
        `messages`, and `tools` if there are any.
    """
    turns = []
    for message in map(stated, messages):
        turn: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if reasoning := message.get("reasoning"):
            turn["reasoning_content"] = reasoning
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = json.loads(calls)
        turn |= {name: message[name] for name in ("tool_call_id", "name") if name in message}
        if message.get("train") is False:
            turn["weight"] = 0
        turns.append(turn)
    return {"messages": turns, **({"tools": json.loads(tools)} if tools else {})}


def with_all_fields(table: pl.DataFrame) -> pl.DataFrame:
    """Return a table whose `messages` have every field of `MESSAGE_TYPES` and that has a column `tools`.

    Tables written before these fields existed lack them; what they lack is null.

    Args:
        table: With a column `messages`.
    """
    if table.schema["messages"] != MESSAGES_TYPE:
        present = {field.name for field in cast(Any, table.schema["messages"]).inner.fields}
        fields = [
            pl.element().struct.field(name) if name in present else pl.lit(None, dtype).alias(name)
            for name, dtype in MESSAGE_TYPES.items()
        ]
        # An unfinished turn does not exist: structs in lists are never null, lists may be.
        table = table.with_columns(pl.col("messages").list.eval(pl.struct(fields)))
    return table if "tools" in table.columns else table.with_columns(pl.lit(None, pl.String).alias("tools"))


def json_text(value: Mapping[str, object] | Sequence[object]) -> str:
    """Return the JSON text in which tools and calls are kept: keys in the author's order, no spaces, no escapes.

    Raises:
        ValueError: It holds what JSON has not, such as NaN.
        TypeError: The same: bytes, dates.
        RecursionError: It is nested too deeply.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class EqualNamesError(ValueError):
    """A JSON object has two fields of one name, of which Python would keep the last."""


def parsed_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        EqualNamesError: An object has two fields of one name.
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_equal_names)


def _without_equal_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counted = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counted.items() if count > 1)
        raise EqualNamesError(f"the field {twice!r} stands twice in an object")
    return fields
