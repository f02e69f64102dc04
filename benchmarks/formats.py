"""What becomes of each field of each row format: one row of each is really normalised, and the outcome written down.

`python -m benchmarks.formats` writes `benchmarks/results/formats.md`. docs/row-formats.md has the same table; a test
compares both with what the code does.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from less_assets.method.data.conversations import Conversation, carries_loss
from less_assets.method.data.row_formats import UnusableRowError, normalize, unknown_keys
from less_assets.method.data.row_keys import HARMLESS_KEYS

RESULT = Path(__file__).parent / "results/formats.md"
HEADINGS = ("format", "field", "example", "what happens")

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
MESSAGES = [USER, ANSWER, {"role": "user", "content": "again"}, {"role": "assistant", "content": "b"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look"}}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}

PLAIN: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
}
"""A row of each format with nothing but what it must have."""


@dataclass(frozen=True)
class Case:
    """A field of a format.

    Attributes:
        format: The format.
        field: How the table names it; `messages[]` stands for a turn.
        example: What a row has there.
        row: The whole row.
    """

    format: str
    field: str
    example: Any
    row: dict[str, Any]


def of_row(format: str, field: str, example: Any) -> Case:
    """A field of the row itself."""
    return Case(format, field, example, PLAIN[format] | {field: example})


def of_turn(field: str, example: Any, turn: int = 1, **more: Any) -> Case:
    """A field of the first answer, or of another turn."""
    turns = [message | {field: example} | more if place == turn else message for place, message in enumerate(MESSAGES)]
    role = turns[turn]["role"]
    name = f"messages[].{field}" if role == "assistant" else f"messages[].{field} ({role})"
    return Case("messages", name, example, {"messages": turns})


def inserted(turn: dict[str, Any]) -> Case:
    """A turn of another role between question and answer, or before both where it is a system's."""
    first = turn["role"] in ("system", "developer")
    turns = [turn, *MESSAGES] if first else [USER, turn, ANSWER]
    return Case("messages", "messages[].role", turn, {"messages": turns})


def shared(turn: dict[str, Any]) -> Case:
    """The same for ShareGPT."""
    turns = [turn, HUMAN, GPT] if turn["from"] == "system" else [HUMAN, turn, GPT]
    return Case("sharegpt", "conversations[].from", turn, {"conversations": turns})


def cases() -> list[Case]:
    """All fields, format by format."""
    part = {"type": "text", "text": "a"}
    return [
        *(Case(format, " + ".join(row), "…", row) for format, row in PLAIN.items()),
        Case(
            "prompt_completion",
            "prompt + completion (lists of turns)",
            "…",
            {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
        ),
        *(inserted({"role": role, "content": "s"}) for role in ("system", "developer", "tool", "function", "narrator")),
        inserted({"role": "system", "content": ""}),
        of_turn("content", [part]),
        of_turn("content", [part | {"train": False}]),
        of_turn("content", [part, {"type": "image_url", "image_url": {"url": "x.png"}}], 0),
        of_turn("content", [part, {"type": "input_audio", "input_audio": {"data": ""}}], 0),
        of_turn("tool_calls", [CALL]),
        of_turn("tool_calls", [{"name": "look", "input": {"x": 1}}]),
        of_turn("tool_calls", [{"name": "look", "arguments": {"x": 1}, "input": {"x": 2}}]),
        of_turn("function_call", CALL["function"]),
        of_turn("tool_calls", [CALL], 0),
        Case(
            "messages",
            "messages[].tool_call_id (tool)",
            "c1",
            {"messages": [USER, {"role": "tool", "content": "r", "tool_call_id": "c1"}, ANSWER]},
        ),
        of_turn("name", "Ann", 0),
        *(of_turn(key, "thought") for key in ("reasoning_content", "thinking", "reasoning")),
        of_turn("reasoning_content", "thought", 0),
        *(of_turn(key, 0) for key in ("weight", "loss", "loss_mask")),
        *(of_turn(key, False) for key in ("train", "training")),
        of_turn("weight", 1),
        of_turn("weight", 0, 0),
        of_turn("weight", 1, 0),
        of_turn("weight", 0.5),
        of_turn("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]),
        of_turn("refusal", "no"),
        *(of_turn(key, "thought") for key in ("thoughts", "reasoning_text")),
        *(of_turn(key, 0) for key in ("loss_weight", "loss_scale", "is_masked")),
        of_turn("images", ["x.png"], 0),
        of_turn("id", "m1"),
        of_turn("mood", "glad"),
        *(shared({"from": role, "value": "s"}) for role in ("system", "observation", "tool", "narrator")),
        shared({"from": "function_call", "value": '{"name": "look", "arguments": {}}'}),
        shared({"from": "function_call", "value": "look"}),
        shared({"from": "gpt", "value": "a", "content": "b"}),
        shared({"from": "gpt", "role": "user", "value": "a"}),
        of_row("sharegpt", "loss_mask", [0, 1]),
        of_row("alpaca", "input", "more"),
        of_row("alpaca", "history", [["first?", "first"]]),
        of_row("alpaca", "context", "more"),
        Case("alpaca", "response", "a", {"instruction": "q", "response": "a"}),
        *(of_row(format, "system", "s") for format in PLAIN),
        *(of_row("messages", key, "s") for key in ("system_prompt", "system_message", "developer")),
        Case(
            "messages",
            "system (and another system turn)",
            "s",
            {"system": "s", "messages": [{"role": "system", "content": "t"}, *MESSAGES]},
        ),
        of_row("messages", "tools", [TOOL]),
        of_row("messages", "tools", [{"type": "web_search"}]),
        of_row("messages", "functions", [TOOL["function"]]),
        of_row("messages", "loss_mask", [0, 0, 0, 1]),
        of_row("messages", "loss_mask", [0, 1]),
        of_row("messages", "label", False),
        of_row("messages", "label", True),
        of_row("messages", "label", -1),
        of_row("messages", "kto_tag", False),
        of_row("messages", "weight", 0.5),
        *(of_row("messages", key, "bad") for key in ("rejected", "rejected_response", "rejected_output")),
        Case("any", "chosen + rejected", "…", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        *(of_row("messages", key, ["x"]) for key in ("images", "image_path", "videos", "audios")),
        of_row("messages", "chat_template_kwargs", {"enable_thinking": False}),
        *(of_row("messages", key, "x") for key in ("id", "source", "dataset", "language", "category")),
        of_row("messages", "enable_thinking", False),
        of_row("messages", "documents", [{"text": "x"}]),
        *(of_row("messages", key, [0, 1]) for key in ("completion_mask", "mask", "loss_weights")),
        of_row("messages", "loss_weight", 0.5),
        *(of_row("prompt_completion", key, "thought") for key in ("reasoning_content", "cot")),
        of_row("prompt_completion", "tool_calls", [CALL]),
        of_row("prompt_completion", "history", [["first?", "first"]]),
        Case("alpaca", "output + response (that differ)", "b", PLAIN["alpaca"] | {"response": "b"}),
        Case("alpaca", "input + context (that differ)", "b", PLAIN["alpaca"] | {"input": "a", "context": "b"}),
        of_row("messages", "mood", "glad"),
    ]


def outcome(case: Case) -> str:
    """What happens to a field: the row is normalised with it and, where that is a row, without it."""
    try:
        conversation = normalize(case.row)
    except UnusableRowError as problem:
        return f"quarantined as `{problem.status}`"
    if unknown_keys(case.row):
        return "left out, counted by `check`"
    masked = sum(turn["role"] == "assistant" and not carries_loss(turn) for turn in conversation.messages)
    if masked:
        return f"masked: {masked} of {sum(turn['role'] == 'assistant' for turn in conversation.messages)} answers"
    if re.sub(r".*\[\]\.", "", case.field) in HARMLESS_KEYS:
        return "left out: it only describes"
    return "used" if conversation != _plain(case) else "used: says the same as the row without it"


def _plain(case: Case) -> Conversation | None:
    """What the row says without the field; None where the row is the field."""
    plain = PLAIN.get(case.format)
    return normalize(plain) if plain is not None and plain is not case.row else None


def table() -> list[tuple[str, str, str, str]]:
    """Format, field, example and outcome of every case, as Markdown cells."""
    return [
        (
            f"`{case.format}`",
            f"`{case.field}`",
            f"`{json.dumps(case.example, ensure_ascii=False)}`" if case.example != "…" else "",
            outcome(case),
        )
        for case in cases()
    ]


def as_markdown(rows: list[tuple[str, str, str, str]]) -> str:
    """The table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Write the result."""
    rows = table()
    text = f"# Row formats: each field and what happens\n\n{len(rows)} rows, by `python -m benchmarks.formats`.\n\n"
    RESULT.write_text(text + as_markdown(rows), encoding="utf-8")
    print(f"{RESULT}: {len(rows)} fields")


if __name__ == "__main__":
    main()
