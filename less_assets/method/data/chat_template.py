r"""What a tokenizer's chat template makes of a conversation, and where in that text each assistant turn stands.

Belongs here: rendering and finding turns in the text. Tokens and labels are `chat.py`.

How turns are found: the conversation is rendered twice, as it is and with a mark in the place of every text. The second
rendering shows what the template writes by itself (headers, channels, empty thoughts, end tokens); the first must be
the same with the texts in the place of the marks, white space at their edges aside. What is not is not trained on.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from jinja2.exceptions import TemplateError

from less_assets.errors import ChatFormatError
from less_assets.method import DEFAULT_DATE
from less_assets.method.data.conversations import Message, carries_loss, participant, stated
from less_assets.method.data.tool_texts import left_out_of_calls, left_out_of_tools, names_a_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT, _REASONING = 0, 1
_MARK = re.compile("\ue000([0-9]+)\ue001")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_DAY_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_DAY_ASKED_FOR = re.compile(r"strftime_now(?!\s+is\s+(?:not\s+)?(?:defined|none)\b)|\{#.*?#\}", re.DOTALL)
_TOOL = {"name": "find_page", "description": "Find.", "parameters": {"type": "object", "properties": {}}}
_CALL = '[{"id":"a1b2c3d4e","type":"function","function":{"name":"find_page","arguments":{"title":"Zebra"}}}]'

_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template can end with."""

UnusableStatus = Literal[
    "template_refuses",
    "template_drops_text",
    "unsupported_field: tools",
    "unsupported_field: tool_calls",
    "unsupported_field: reasoning",
    "unsupported_field: name",
]


class UnusableConversationError(Exception):
    """This conversation cannot be encoded with this template.

    Attributes:
        status: Of the row.
    """

    def __init__(self, status: UnusableStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True)
class AssistantTurn:
    """Where an assistant turn stands in the rendered text.

    Attributes:
        turn: Its number in the conversation, from 0.
        spans: Ranges of characters that the model has to write: reasoning, content, calls, what closes them. Ordered,
            without overlap; empty if the turn says nothing.
        content: Range of its content; None if that is blank.
    """

    turn: int
    spans: list[tuple[int, int]]
    content: tuple[int, int] | None


@dataclass(frozen=True)
class _Skeleton:
    """A rendering with marks: `segments[0]`, mark `parts[0]`, `segments[1]`, …; a part is (turn, which text)."""

    segments: tuple[str, ...]
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Abilities:
    """What a template renders.

    Attributes:
        content: Whether contents are given as text or as a list of text parts.
        tools: Whether it shows tools.
        arguments: How the arguments of calls are given; None: it does not show calls.
        reasoning: Whether it shows the reasoning of a last turn.
    """

    content: Literal["text", "parts"] = "text"
    tools: bool = False
    arguments: Literal["object", "text"] | None = None
    reasoning: bool = False


class ChatTemplate:
    """A tokenizer's chat template, with the dates that it writes frozen.

    Args:
        tokenizer: A transformers tokenizer.
        date: The day that the template is told.

    Raises:
        ChatFormatError: There is no template, or not even a plain conversation can be encoded with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date) -> None:
        self._tokenizer, self._date = tokenizer, date
        self._where = f"chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"
        if not tokenizer.chat_template:
            raise ChatFormatError(
                "The tokenizer has no chat template.",
                where=tokenizer.name_or_path or type(tokenizer).__name__,
                fix="set `chat_format: tulu` in the project file",
            )
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = tuple(token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token)
        self._first_special = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "$^")
        self._skeletons: dict[str, _Skeleton] = {}
        self._abilities = self._probe()

    # ---- what the template can do ----

    def _probe(self) -> _Abilities:
        asked: Message = {"role": "user", "content": "Who?"}
        said: Message = {"role": "assistant", "content": "Me."}
        self._abilities = _Abilities()
        try:
            self.render([asked, said])
        except UnusableConversationError as problem:
            self._abilities = _Abilities("parts")
            self._skeletons.clear()
            try:
                self.render([asked, said])
            except UnusableConversationError:
                raise ChatFormatError(
                    f"The chat template cannot be used to train on assistant turns: {problem}.",
                    where=self._where,
                    fix="set `chat_format: tulu` in the project file, or use a tokenizer with another template",
                ) from problem
        content = self._abilities.content
        tools = json.dumps([{"type": "function", "function": _TOOL}])
        reasoned: Message = {**said, "reasoning": "Hm."}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": _CALL}
        answered: Message = {"role": "tool", "content": "Stripes.", "tool_call_id": "a1b2c3d4e", "name": "find_page"}
        arguments: Literal["object", "text"] | None = None
        for form in cast(list[Literal["object", "text"]], ["object", "text"]):
            self._abilities = _Abilities(content, arguments=form)
            text = self._attempt([asked, calling, answered, said], None)
            # A template that joins text shows an object as Python writes it.
            if "find_page" in text and "Zebra" in text and "'Zebra'" not in text and '\\"Zebra\\"' not in text:
                arguments = form
                break
        reasons = "Hm." in self._attempt([asked, reasoned], None)
        self._skeletons.clear()
        return _Abilities(content, "find_page" in self._attempt([asked, said], tools), arguments, reasons)

    def _attempt(self, messages: Sequence[Message], tools: str | None) -> str:
        try:
            return self._render(messages, tools)
        except UnusableConversationError:
            return ""

    # ---- text ----

    def _render(self, messages: Sequence[Message], tools: str | None) -> str:
        schemas = json.loads(tools) if tools else None
        try:
            template = self._tokenizer.get_chat_template(tools=schemas)
            if not isinstance(template, str):
                raise TypeError(f"the tokenizer's template is of type {type(template).__name__}, not text")
            template = _with_day(template, self._date)
            return str(
                self._tokenizer.apply_chat_template(
                    [self._for_template(message) for message in messages],
                    tools=schemas,
                    chat_template=template,
                    tokenize=False,
                )
            )
        except _FAILURES as error:
            raise UnusableConversationError("template_refuses", f"the template says: {error}") from error

    def _for_template(self, message: Message) -> dict[str, Any]:
        text = message["content"]
        turn: dict[str, Any] = {"role": message["role"], "content": text}
        if self._abilities.content == "parts":
            turn["content"] = [{"type": "text", "text": text}] if text else []
        if reasoning := message.get("reasoning"):
            turn["reasoning_content"] = turn["thinking"] = reasoning
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = [self._call(call) for call in json.loads(calls)]
        return turn | {name: message[name] for name in ("tool_call_id", "name") if message.get(name)}

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments = function.get("arguments")
        if self._abilities.arguments == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif self._abilities.arguments == "object" and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        return {**call, "function": {**function, "arguments": arguments}}

    # ---- turns ----

    def render(self, messages: Sequence[Message], tools: str | None = None) -> tuple[str, list[AssistantTurn]]:
        """Render a conversation and say where its assistant turns stand.

        Args:
            messages: The turns.
            tools: JSON text of the tool schemas; None: there are none.

        Raises:
            UnusableConversationError: The template refuses the conversation, lacks one of its fields, or writes
                something else than its texts.
        """
        turns = [stated(message) for message in messages]
        self._refuse_fields(turns, tools)
        try:
            return self._located(turns, tools)
        except UnusableConversationError as problem:
            apart = [_thought_apart(message) for message in turns]
            if problem.status != "template_drops_text" or not self._abilities.reasoning or apart == turns:
                raise
            return self._located(apart, tools)

    def _refuse_fields(self, messages: Sequence[Message], tools: str | None) -> None:
        able = self._abilities
        if tools and not able.tools:
            raise UnusableConversationError("unsupported_field: tools", "the template shows no tools")
        if able.arguments is None and any(message.get("tool_calls") for message in messages):
            raise UnusableConversationError("unsupported_field: tool_calls", "the template shows no tool calls")
        if not able.reasoning and any(message.get("reasoning") for message in messages):
            raise UnusableConversationError("unsupported_field: reasoning", "the template shows no reasoning")
        named = {f"\ue002{turn}\ue003": turn for turn, message in enumerate(messages) if participant(message)}
        if named:
            marks = {turn: mark for mark, turn in named.items()}
            text = self._render([_renamed(message, marks.get(turn)) for turn, message in enumerate(messages)], tools)
            hidden = next((turn for mark, turn in named.items() if mark not in text), None)
            if hidden is not None:
                said = f"the name {messages[hidden]['name']!r} of turn {hidden + 1} is not in the text"
                raise UnusableConversationError("unsupported_field: name", said)

    def _located(self, messages: list[Message], tools: str | None) -> tuple[str, list[AssistantTurn]]:
        skeleton = self._skeleton(messages, tools)
        _check_whole(messages, tools, skeleton)
        text = self._render(messages, tools)
        places = _match(text, messages, skeleton)
        turns = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                spans = self._spans(text, turn, messages, tools, skeleton, places)
                content = next((places[i] for i, part in enumerate(skeleton.parts) if part == (turn, _CONTENT)), None)
                turns.append(AssistantTurn(turn, spans, content))
        return text, turns

    def _skeleton(self, messages: Sequence[Message], tools: str | None) -> _Skeleton:
        """The rendering with marks in the place of texts; remembered, since conversations of one form share it."""
        marked = [_marked(turn, message) for turn, message in enumerate(messages)]
        key = json.dumps([marked, tools], ensure_ascii=False)
        if key not in self._skeletons:
            pieces = _MARK.split(self._render(marked, tools))
            parts = tuple(divmod(int(number), 2) for number in pieces[1::2])
            if any(turn >= len(marked) or not _MARK.fullmatch(_text(marked[turn], which)) for turn, which in parts):
                raise UnusableConversationError("template_refuses", "a tool, call or name holds private characters")
            if len(self._skeletons) >= 512:
                self._skeletons.clear()
            self._skeletons[key] = _Skeleton(tuple(pieces[::2]), cast(Any, parts))
        return self._skeletons[key]

    def _spans(
        self,
        text: str,
        turn: int,
        messages: list[Message],
        tools: str | None,
        skeleton: _Skeleton,
        places: list[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """The characters of a turn that the model has to write."""
        parts = [i for i, part in enumerate(skeleton.parts) if part[0] == turn]
        calls = bool(messages[turn].get("tool_calls"))
        if not parts and not calls:
            return []
        spans: list[tuple[int, int]] = []
        for part, following in itertools.pairwise(parts):
            end, begin = places[part][1], places[following][0]
            spans.append((places[part][0], end + self._closing(text[end:begin])))
        if parts:
            spans.append(places[parts[-1]])
            index, offset = parts[-1] + 1, 0
        else:
            index, offset = self._calls_start(turn, messages, tools, skeleton)
        segment, base = skeleton.segments[index], places[index - 1][1] if index else 0
        end = max(offset, self._turn_end(segment, offset, turn, messages, tools, skeleton))
        if calls:
            _check_calls(segment[offset:end], messages[turn])
        if calls and parts:
            begin = self._calls_after_text(segment[:end], turn, messages, tools)
            spans.append((spans.pop()[0], base + self._closing(segment[:begin])))
            offset = begin
        spans.append((base + offset, base + end))
        joined: list[tuple[int, int]] = []
        for start, stop in spans:
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, stop))
        return joined

    def _closing(self, between: str) -> int:
        """How many characters between two texts of a turn are the model's: what closes the first one, not a header."""
        closing = self._first_special.search(between)
        return len(between) if closing is None or not between[closing.end() :].strip() else closing.end()

    def _calls_after_text(self, written: str, turn: int, messages: list[Message], tools: str | None) -> int:
        """Where in what follows a turn's text its calls begin: they are written as in a turn that says nothing."""
        calling: Message = {**messages[turn], "content": "", "reasoning": None}
        silent = [*messages[:turn], stated(calling), *messages[turn + 1 :]]
        try:
            skeleton = self._skeleton(silent, tools)
            index, offset = self._calls_start(turn, silent, tools, skeleton)
        except UnusableConversationError:
            return 0
        alone = skeleton.segments[index][offset:].rstrip()
        for said in (alone, alone.lstrip()):
            length = next((n for n in range(min(len(said), len(written)), 0, -1) if written.endswith(said[:n])), 0)
            with contextlib.suppress(UnusableConversationError):
                _check_calls(written[len(written) - length :], messages[turn])
                return len(written) - length
        return 0

    def _calls_start(
        self, turn: int, messages: list[Message], tools: str | None, skeleton: _Skeleton
    ) -> tuple[int, int]:
        """Where a turn that only calls tools begins: (segment, offset in it), after the header that texts have too."""
        speaking: Message = {"role": "assistant", "content": "Me."}
        for after in (messages[turn + 1 :], []):
            try:
                other = self._skeleton([*messages[:turn], speaking, *after], tools)
            except UnusableConversationError:
                continue
            index = next((i for i, part in enumerate(other.parts) if part == (turn, _CONTENT)), None)
            if index is None or other.parts[:index] != skeleton.parts[:index]:
                continue
            return index, self._common(skeleton.segments[index], other.segments[index])
        raise UnusableConversationError("template_refuses", f"where the calls of turn {turn + 1} begin cannot be seen")

    def _turn_end(
        self,
        segment: str,
        offset: int,
        turn: int,
        messages: list[Message],
        tools: str | None,
        skeleton: _Skeleton,
    ) -> int:
        """How many characters of the segment after a turn's last text belong to the turn: its calls and its end token.

        They are those that follow it where it is the last one, too; or those up to the first special token, since
        some templates end a last turn otherwise than a past one.
        """
        if turn + 1 == len(messages):
            stripped = segment.rstrip()
            return len(stripped) if stripped.endswith(self._special) else len(segment)
        try:
            alone = self._skeleton(messages[: turn + 1], tools)
        except UnusableConversationError:
            alone = _Skeleton(("",), ())
        last = alone.segments[-1]
        shared = self._common(segment, last)
        ends = [token.end() for token in self._first_special.finditer(segment, offset) if token.end() <= shared]
        if ends:
            return ends[-1]
        first = self._first_special.search(segment, offset)
        if first and (messages[turn].get("tool_calls") or not segment[offset : first.start()].strip()) and last.strip():
            return first.end()
        return shared if shared == len(last) else offset

    def _common(self, text: str, other: str) -> int:
        """Length of the common beginning, without a special token that only begins in it."""
        length = next(
            (i for i, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other))
        )
        for token in self._first_special.finditer(text):
            if token.start() < length < token.end():
                return token.start()
        return length


@lru_cache(maxsize=16)
def _with_day(template: str, date: datetime.date) -> str:
    """The template with the day written out wherever it asks for today's, which transformers would fill in."""
    frozen = _DAY_CALL.sub(lambda call: json.dumps(date.strftime(call[1] or call[2] or "")), template)
    if any(not mention[0].startswith("{#") for mention in _DAY_ASKED_FOR.finditer(frozen)):
        raise ChatFormatError(
            "The chat template writes a day in a form that it computes, so that the day cannot be frozen.",
            where="chat template",
            fix="set `chat_format: tulu` in the project file, or use a tokenizer with another template",
        )
    return frozen


@lru_cache(maxsize=8)
def _template(tokenizer: PreTrainedTokenizerBase, chat_template: str, date: datetime.date) -> ChatTemplate:
    return ChatTemplate(tokenizer, date)


def chat_template(tokenizer: PreTrainedTokenizerBase, date: datetime.date = DEFAULT_DATE) -> ChatTemplate:
    """Return the tokenizer's template, probed once for each tokenizer, template and date.

    Raises:
        ChatFormatError: See `ChatTemplate`.
    """
    return _template(tokenizer, str(tokenizer.chat_template), date)


def loss_spans(messages: Sequence[Message], turns: Sequence[AssistantTurn]) -> list[tuple[int, int, int]]:
    """Return what carries loss: (turn, first character, end), of the turns that are not masked."""
    return [(turn.turn, *span) for turn in turns if carries_loss(messages[turn.turn]) for span in turn.spans]


def _text(message: Message, which: int) -> str:
    return message["content"] if which == _CONTENT else message.get("reasoning") or ""


def _marked(turn: int, message: Message) -> Message:
    marked = message.copy()
    if message["content"].strip():
        marked["content"] = f"\ue000{2 * turn + _CONTENT}\ue001"
    if (message.get("reasoning") or "").strip():
        marked["reasoning"] = f"\ue000{2 * turn + _REASONING}\ue001"
    return marked


def _renamed(message: Message, name: str | None) -> Message:
    return message if name is None else {**message, "name": name}


def _thought_apart(message: Message) -> Message:
    """A turn whose content begins with a thought, with the thought as its reasoning."""
    inside = _THOUGHT.fullmatch(message["content"]) if message["role"] == "assistant" else None
    if inside is None or message.get("reasoning") or not inside[1].strip():
        return message
    return {**message, "reasoning": inside[1], "content": inside[2]}


def _check_calls(written: str, message: Message) -> None:
    """Refuse a rendering that leaves out a part of a turn's calls."""
    calls = json.loads(message.get("tool_calls") or "[]")
    if not all(names_a_function(call) for call in calls):
        raise UnusableConversationError("template_refuses", "a call names no function")
    if problem := left_out_of_calls(written, calls):
        raise UnusableConversationError("template_drops_text", problem)


def _check_whole(messages: Sequence[Message], tools: str | None, skeleton: _Skeleton) -> None:
    """Refuse a rendering that leaves out a text or tool, repeats an assistant's, or changes the order of turns."""
    if problem := left_out_of_tools("\0".join(skeleton.segments), json.loads(tools or "[]")):
        raise UnusableConversationError("template_drops_text", problem)
    for turn, message in enumerate(messages):
        for which in (_CONTENT, _REASONING):
            text = _text(message, which)
            times = skeleton.parts.count((turn, which))
            name = f"the {'content' if which == _CONTENT else 'reasoning'} of turn {turn + 1} ({message['role']})"
            if text.strip() and not times:
                raise UnusableConversationError("template_drops_text", f"{name} is not in the text")
            if times > 1 and message["role"] == "assistant":
                raise UnusableConversationError("template_drops_text", f"{name} is in the text {times} times")
    order = [turn for turn, _ in skeleton.parts if messages[turn]["role"] not in ("system", "developer")]
    if order != sorted(order):
        raise UnusableConversationError("template_refuses", "the template changes the order of turns")


def _match(text: str, messages: Sequence[Message], skeleton: _Skeleton) -> list[tuple[int, int]]:
    """Where each marked part stands in the text itself: as it is, or without white space at its edges."""
    places: list[tuple[int, int]] = []
    position = 0
    for i, (turn, which) in enumerate(skeleton.parts):
        before, after = skeleton.segments[i], skeleton.segments[i + 1]
        message = messages[turn]
        said = _text(message, which)
        written = [said] if message["role"] == "assistant" else [said, json.dumps(said, ensure_ascii=False)[1:-1]]
        is_last = i + 1 == len(skeleton.parts)
        span = None
        if text.startswith(before, position):
            position += len(before)
            for form in written:
                span = span or _span_of(text, position, form, after, is_last)
        if span is None:
            raise UnusableConversationError(
                "template_drops_text", f"the template changes the text of turn {turn + 1} ({message['role']})"
            )
        places.append(span)
        position = span[1]
    if not skeleton.parts and text != skeleton.segments[0]:
        raise UnusableConversationError("template_drops_text", "the template changes the text")
    return places


def _span_of(text: str, position: int, said: str, after: str, is_last: bool) -> tuple[int, int] | None:
    core = said.strip()
    lead, trail = said[: len(said) - len(said.lstrip())], said[len(said.rstrip()) :]
    for cut in range(len(lead) + 1):
        start = lead[cut:] + core
        if text.startswith(start, position):
            for kept in range(len(trail), -1, -1):
                end = position + len(start) + kept
                if text.startswith(trail[:kept] + after, position + len(start)) and (
                    not is_last or end + len(after) == len(text)
                ):
                    return position, end
    return None
