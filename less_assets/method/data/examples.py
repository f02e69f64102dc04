"""Instruction examples: what a message, an example and its id are, and reading any pool row into that form.

Belongs here: recognising and checking formats, and the reasons for which a row is quarantined. Physical rows of files
are the matter of `row_files.py`, token ids that of `chat.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import polars as pl

from less_assets.method.data.raw_rows import RawRow
from less_assets.method.data.row_files import SourceDialect, read_raw

RowFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"]

ROLES = ("system", "user", "assistant")

ROW_STATUSES = {
    "ok": "a usable example",
    "blank": "a blank line: no example, but its row number counts",
    "invalid_json": "the line is not JSON",
    "invalid_csv": "the record does not fit the header, or its quotes do not close",
    "invalid_utf8": "the bytes are not UTF-8, or a string holds half a surrogate pair",
    "wrong_type": "the row, a field or a turn is not of the type that its format asks for",
    "missing_field": "the row has none of the known formats, or not the stated one",
    "unknown_role": "a turn's role is none of system, user, assistant (or the format's words for them)",
    "empty_turn": "a turn has no text",
    "no_user_turn": "nobody asks",
    "no_assistant_turn": "there is nothing to learn from",
    "too_large": "the row has more than MAX_ROW_BYTES bytes",
}
"""Every `status` of a pool row and what it means."""

MESSAGES_TYPE = pl.List(pl.Struct({"role": pl.String(), "content": pl.String()}))
"""How turns are kept in tables."""

POOL_SCHEMA = pl.Schema(
    {
        "example_id": pl.String(),
        "source": pl.String(),
        "source_file": pl.String(),
        "source_row": pl.Int64(),
        "messages": MESSAGES_TYPE,
        "status": pl.String(),
        "detail": pl.String(),
    }
)
"""Columns of a table of pool rows; see `PoolRow`."""

SHORT_ANSWER = 20

_BATCH_BYTES = 32 << 20

# ShareGPT's words and those of its descendants.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class Message(TypedDict):
    """One turn: `role` is one of `ROLES`, `content` its text."""

    role: str
    content: str


@dataclass(frozen=True)
class PoolRow:
    """One physical row of a pool source, usable or quarantined.

    Attributes:
        example_id: Content-derived id; None unless the status is "ok".
        source: Name of the source.
        source_file: File as listed in the source.
        source_row: 1-based row in that file (line, CSV record or Parquet row).
        messages: The turns; None unless the status is "ok".
        status: "ok" or a key of `ROW_STATUSES`.
        detail: What exactly is wrong, for a person; None if nothing is.
    """

    example_id: str | None
    source: str
    source_file: str
    source_row: int
    messages: list[Message] | None
    status: str
    detail: str | None


class UnusableRowError(Exception):
    """Why a single row cannot be used; it becomes the row's status and detail.

    Args:
        status: A key of `ROW_STATUSES`.
        detail: What exactly is wrong.
    """

    def __init__(self, status: str, detail: str) -> None:
        # Names of fields are quoted, and may hold what no file can: half a surrogate pair, bytes that are not UTF-8.
        printable = detail.encode("utf-8", "backslashreplace").decode()
        super().__init__(printable)
        self.status, self.detail = status, printable


def example_id(messages: Sequence[Message]) -> str:
    """Return the id of an example: blake2b-128 of the canonical JSON of its [[role, content], …], 32 hex characters.

    Args:
        messages: The turns; text is taken as it is, so a changed space is another example.
    """
    turns = [[message["role"], message["content"]] for message in messages]
    canonical = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=16).hexdigest()


def is_very_short(messages: Sequence[Message]) -> bool:
    """Return whether the assistant's turns together have at most `SHORT_ANSWER` characters: a word or two.

    Args:
        messages: The turns.
    """
    return sum(len(turn["content"].strip()) for turn in messages if turn["role"] == "assistant") <= SHORT_ANSWER


def detect_format(record: Mapping[str, Any]) -> RowFormat | None:
    """Return the format of a record by its fields, or None if they are none of the known ones.

    Args:
        record: Field name to value; fields without a value count as absent.
    """
    present = {name for name, value in record.items() if value is not None}
    if "messages" in present:
        return "messages"
    if "conversations" in present:
        return "sharegpt"
    if "instruction" in present and present & {"output", "response"}:
        return "alpaca"
    if {"prompt", "completion"} <= present:
        return "prompt_completion"
    return None


def normalize(record: Mapping[str, Any], format: RowFormat = "auto") -> list[Message]:
    """Return the turns of a record; text is not changed.

    Formats: `messages` (list of role and content; in CSV as JSON text); `prompt_completion` (two strings, or two lists
    of messages); `alpaca` (`instruction`, optional `input` after a blank line, `output`; also Dolly's `context` and
    `response`); `sharegpt` (`conversations`: list of `from` and `value`).

    Args:
        record: Field name to value.
        format: One of the formats, or "auto": decided for each record by its fields.

    Raises:
        UnusableRowError: If the record is not in that format or not a usable conversation.
    """
    found = detect_format(record) if format == "auto" else format
    if found is None:
        raise UnusableRowError(
            "missing_field",
            "neither messages, conversations, instruction + output nor prompt + completion; there is: "
            + (", ".join(map(str, record)) or "nothing"),
        )
    if found == "messages":
        messages = _turns(_field(record, "messages"), "messages", "role", "content", {role: role for role in ROLES})
    elif found == "sharegpt":
        messages = _sharegpt(_field(record, "conversations"))
    elif found == "alpaca":
        messages = _alpaca(record)
    else:
        messages = _prompt_completion(_field(record, "prompt"), _field(record, "completion"))
    _check_conversation(messages)
    return messages


def read_rows(
    path: str,
    source: str,
    format: RowFormat = "auto",
    first_row: int = 0,
    max_rows: int | None = None,
    batch_rows: int = 1024,
    begins: tuple[int, int] | None = None,
    dialect: SourceDialect = "auto",
) -> Iterator[pl.DataFrame]:
    """Read the rows of a file (or a range of them) as tables; every physical row gives one table row.

    A row that cannot be used is quarantined: its status and detail say why, and nothing shifts. Memory is bounded by
    the batch, not by the file.

    Args:
        path: Local path or fsspec URL of a JSONL, CSV or Parquet file; see `row_files.read_raw`.
        source: Name of the source, for the column.
        format: Format of the records; see `normalize`.
        first_row: 0-based index of the first row to read.
        max_rows: At most so many rows; None: to the end.
        batch_rows: Rows per table at most; fewer where rows are large.
        begins: Where `first_row` begins, if that is known: a `raw_rows.Place`.
        dialect: Of CSV and TSV files.

    Yields:
        Tables with `POOL_SCHEMA`.

    Raises:
        PoolFormatError: If the file as a whole cannot be read.
    """
    batch: list[PoolRow] = []
    size = 0
    for raw in read_raw(path, first_row, max_rows, begins, dialect):
        row = _pool_row(raw, source, path, format)
        batch.append(row)
        size += sum(len(message["content"]) for message in row.messages or ())
        if len(batch) == batch_rows or size > _BATCH_BYTES:
            yield pool_table(batch)
            batch, size = [], 0
    if batch:
        yield pool_table(batch)


def pool_table(rows: Sequence[PoolRow]) -> pl.DataFrame:
    """Return pool rows as a table with `POOL_SCHEMA`.

    Args:
        rows: Any number of rows.
    """
    columns = zip(*map(_columns, rows), strict=True) if rows else ([] for _ in POOL_SCHEMA)
    return pl.DataFrame(
        [
            pl.Series(name, list(column), dtype)
            for (name, dtype), column in zip(POOL_SCHEMA.items(), columns, strict=True)
        ]
    )


def _columns(row: PoolRow) -> tuple:
    return (row.example_id, row.source, row.source_file, row.source_row, row.messages, row.status, row.detail)


def _pool_row(raw: RawRow, source: str, path: str, format: RowFormat) -> PoolRow:
    if raw.record is None:
        return PoolRow(None, source, path, raw.number, None, raw.status, raw.detail)
    try:
        messages = normalize(raw.record, format)
    except UnusableRowError as problem:
        return PoolRow(None, source, path, raw.number, None, problem.status, problem.detail)
    return PoolRow(example_id(messages), source, path, raw.number, messages, "ok", None)


# ---- formats ----


def _field(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise UnusableRowError(
            "missing_field", f"no field {name!r}; there is: {', '.join(map(str, record)) or 'nothing'}"
        )
    return record[name]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError("wrong_type", f"{what} is {_type_name(value)}, not text")
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _turns(value: Any, what: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Message]:
    if isinstance(value, str):  # the only way to keep turns in a CSV file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UnusableRowError("wrong_type", f"{what} is text, but not JSON") from error
    if not isinstance(value, list):
        raise UnusableRowError("wrong_type", f"{what} is {_type_name(value)}, not a list of turns")
    messages: list[Message] = []
    for position, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise UnusableRowError("wrong_type", f"turn {position} is {_type_name(turn)}, not an object")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise UnusableRowError("unknown_role", f"turn {position} has the role {role!r}"[:200])
        content = turn.get(text_key)
        messages.append(
            {"role": roles[role], "content": "" if content is None else _text(content, f"turn {position}'s {text_key}")}
        )
    return messages


def _sharegpt(value: Any) -> list[Message]:
    keys = ("from", "value")
    if isinstance(value, list) and value and isinstance(value[0], dict) and "from" not in value[0]:
        keys = ("role", "content")
    return _turns(value, "conversations", *keys, _SHAREGPT_ROLES)


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    instruction = _text(_field(record, "instruction"), "instruction")
    output = _text(_field(record, "output" if record.get("output") is not None else "response"), "output")
    context = record.get("input") if record.get("input") is not None else record.get("context")
    context = "" if context is None else _text(context, "input")
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _prompt_completion(prompt: Any, completion: Any) -> list[Message]:
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns(prompt + completion, "prompt", "role", "content", {role: role for role in ROLES})
    return [
        {"role": "user", "content": _text(prompt, "prompt")},
        {"role": "assistant", "content": _text(completion, "completion")},
    ]


def _check_conversation(messages: Sequence[Message]) -> None:
    for position, message in enumerate(messages, start=1):
        if not message["content"].strip():
            raise UnusableRowError("empty_turn", f"turn {position} ({message['role']}) has no text")
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableRowError("invalid_utf8", f"turn {position} holds half a surrogate pair") from error
    roles = {message["role"] for message in messages}
    if "assistant" not in roles:
        raise UnusableRowError("no_assistant_turn", "no assistant turn" if messages else "no turns at all")
    if "user" not in roles:
        raise UnusableRowError("no_user_turn", "no user turn")
