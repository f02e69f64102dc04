"""Messages to token ids and loss mask, in the tokenizer's own chat template or in the Tulu format.

Belongs here: the one encoder for pool rows, targets, held-out rows and prompts. What a template writes and where the
turns stand in it is `chat_template.py`; where the turns come from `examples.py` and `targets.py`, batches
`batching.py`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from less_assets.errors import ChatFormatError, TargetFormatError
from less_assets.method import DEFAULT_DATE
from less_assets.method.data.chat_template import AssistantTurn, UnusableConversationError, chat_template, loss_spans
from less_assets.method.data.conversations import Message, carries_loss, participant, stated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from less_assets.method.data.targets import TargetExample

ChatFormat = Literal["template", "tulu"]

REFUSED_SCHEMA = pl.Schema({"example_id": pl.String, "row": pl.Int64, "status": pl.String, "detail": pl.String})

IGNORED = -100
"""Label of a position without loss, as everywhere in transformers."""

_SENTINEL, _FIRST_WORD = "\ue002", "the"
"""Stand for an answer that is not there yet, in the text and in its tokens."""


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example as a model reads it.

    Attributes:
        example_id: Id of the example.
        input_ids: int32 (n,). n is 0 if the conversation cannot be rendered; see `problem`.
        labels: int32 (n,), unshifted as transformers wants them: the token id where there is loss, else −100.
        problem: Why the template cannot be used for this conversation, for a person; None if it can.
        status: "ok"; else `template_refuses`, `template_drops_text` or `unsupported_field: NAME`.
    """

    example_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    problem: str | None = None
    status: str = "ok"

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that a causal model takes the loss over: labels other than −100, the first one aside."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class LossToken:
    """A token that carries loss, for people to read.

    Attributes:
        turn: Number of its message in the conversation, from 0.
        text: The text that it adds; empty where it goes on with a character that an earlier token began.
    """

    turn: int
    text: str


@dataclass(frozen=True, eq=False)
class ChatEncoder:
    r"""How conversations become tokens: one for a project's rows, targets, held-out rows and prompts.

    The same conversation gives the same ids everywhere: a target is the pool row without its end token, a prompt the
    part before the answer.

    Attributes:
        tokenizer: A transformers tokenizer.
        chat_format: "template": the tokenizer's chat template as it is, with what it adds (a default system prompt,
            say). "tulu": `<|user|>\n{content}\n<|assistant|>\n{content}{eos}\n` with stripped contents and the
            tokenizer's begin token, as in LESS's `encode_with_messages_format`.
        max_length: Longest encoding in tokens.
        date: The day that a template is told which asks for it.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat
    max_length: int
    date: datetime.date = DEFAULT_DATE

    def row(self, example_id: str, messages: Sequence[Message], tools: str | None = None) -> EncodedExample:
        r"""Encode a conversation with loss on its unmasked assistant turns, cut from the right.

        `template`: loss is on reasoning, content and calls and on the end-of-turn token, not on white space after it;
        headers, channels and empty thoughts have none. `tulu`: loss on the stripped content, the end token and, as in
        LESS, the newline after it.

        A token that is partly header and partly content has no loss, unless the header's part is mere white space and
        the content's is not: after a header that ends with a space, the first word is such a token.

        Args:
            example_id: Goes into the result.
            messages: The turns, at least one; fields may be None.
            tools: JSON text of the tool schemas; None: there are none.

        Returns:
            The encoding; what is too long is cut off, so that no loss tokens may remain (see `refusal`). With no
            tokens, a `status` and a `problem` if this one conversation cannot be encoded.

        Raises:
            ChatFormatError: If no conversation can be encoded so: no chat template, no end token, a template whose
                assistant turns cannot be told from the rest.
        """
        check_chat_format(self.tokenizer, self.chat_format, self.date)
        try:
            text, spans = self._spans(messages, tools)
            ids, in_loss = _tokenize_spans(
                text, [span for _, *span in spans], self.tokenizer, begin=self._begins, exact=True
            )
        except UnusableConversationError as problem:
            nothing = np.zeros(0, np.int32)
            return EncodedExample(example_id, nothing, nothing, str(problem), problem.status)
        input_ids = np.asarray(ids[: self.max_length], dtype=np.int32)
        labels = np.where(in_loss[: self.max_length], input_ids, np.int32(IGNORED)).astype(np.int32)
        return EncodedExample(example_id, input_ids, labels)

    def refusal(self, row: EncodedExample) -> tuple[str, str] | None:
        """Why nothing can be trained on an encoded row; None if something can.

        Args:
            row: From `row`.

        Returns:
            The status (that of the row, `prompt_too_long` or `no_loss_tokens`), and the reason for a person.
        """
        if row.problem:
            return row.status, row.problem
        if row.loss_tokens:
            return None
        if len(row.input_ids) == self.max_length:
            return "prompt_too_long", f"its answers begin after {self.max_length} tokens, which is `model.max_length`"
        return "no_loss_tokens", "no token of it carries loss"

    def loss_token_texts(self, messages: Sequence[Message], tools: str | None = None) -> tuple[list[LossToken], bool]:
        """Say what text each loss token of `row` stands for.

        Args:
            messages: The turns; `row` can encode them.
            tools: JSON text of the tool schemas.

        Returns:
            One entry for each loss token, in order (texts of a turn joined are the turn as the model read it), and
            whether tokens were cut off for the length.
        """
        tokenizer = self.tokenizer
        text, owned = self._spans(messages, tools)
        turns, spans = [turn for turn, *_ in owned], [span for _, *span in owned]
        ids, in_loss = _tokenize_spans(text, spans, tokenizer, begin=self._begins)
        positions = [position for position in range(1, min(len(ids), self.max_length)) if in_loss[position]]
        cut = len(ids) > self.max_length
        if not tokenizer.is_fast:
            firsts = [_tokens_before(text, start, ids, tokenizer, begin=self._begins) for start, _ in spans]
            owners = [sum(first <= position for first in firsts) - 1 for position in positions]
            texts = [str(tokenizer.decode([ids[position]])) for position in positions]
            return [LossToken(turns[owner], piece) for owner, piece in zip(owners, texts, strict=True)], cut
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = [(0, 0)] * (len(ids) - len(encoding["input_ids"])) + encoding["offset_mapping"]
        tokens: list[LossToken] = []
        span, reached = 0, 0
        for start, end in (offsets[position] for position in positions):
            while start >= spans[span][1]:
                span += 1
            reached = max(reached, spans[span][0])
            # White space that a tokenizer leaves out of its offsets goes to the token that follows.
            tokens.append(LossToken(turns[span], text[reached:end]))
            reached = max(reached, end)
        return tokens, cut

    def target(self, target: TargetExample, max_length: int | None = None) -> EncodedExample:
        """Encode a target example with loss on its completion only, without an end token, as LESS does.

        `template`: the ids are those that `row` gives the whole conversation, up to the end of the answer. `tulu`: as
        in LESS, prompt (turns, header of the assistant turn, `assistant_prefix`) and prompt + completion are tokenized
        separately, and loss starts at the prompt's length. What is too long loses its prompt from the left, the
        tokenizer's begin token aside; a completion that is too long even then keeps one prompt token and is cut from
        the right.

        Args:
            target: The target example.
            max_length: Longest encoding in tokens; None: the encoder's.

        Raises:
            ChatFormatError: As in `row`.
            TargetFormatError: If the template cannot be used for the conversation, or no loss token remains.
        """
        longest = self.max_length if max_length is None else max_length
        if self.chat_format == "tulu":
            prompt = self._tulu_prompt(target.messages) + target.assistant_prefix
            ids = _tokenize(prompt + target.completion, self.tokenizer, begin=True)
            start = min(len(_tokenize(prompt, self.tokenizer, begin=True)), len(ids))
        else:
            ids, start = self._template_target(target)
        kept = _cut_left(ids[:start], max(1, longest - (len(ids) - start)), self.tokenizer)
        input_ids = np.asarray((kept + ids[start:])[:longest], dtype=np.int32)
        labels = input_ids.copy()
        labels[: len(kept)] = IGNORED
        encoded = EncodedExample(target.example_id, input_ids, labels)
        if not encoded.loss_tokens:
            raise TargetFormatError(
                "A target example has no token to take the loss over.",
                where=f"target example {target.example_id} (subtask {target.subtask}), max_length {longest}",
                fix="give it a completion, or raise the task's max_length",
            )
        return encoded

    def prompt_text(self, messages: Sequence[Message], assistant_prefix: str = "", tools: str | None = None) -> str:
        """Return the text after which a model is to go on: turns, header of the assistant turn, `assistant_prefix`.

        Args:
            messages: The turns, the last one not the assistant's.
            assistant_prefix: How the answer begins; may be empty.
            tools: JSON text of the tool schemas.

        Raises:
            ChatFormatError: As in `row`.
            TargetFormatError: If the template cannot be used for the conversation.
        """
        if self.chat_format == "tulu":
            return self._tulu_prompt(messages) + assistant_prefix
        text, turn = self._answered(messages, assistant_prefix + _SENTINEL, tools, None)
        assert turn.content is not None
        return text[: turn.content[1] - len(_SENTINEL)]

    def prompt(
        self,
        messages: Sequence[Message],
        assistant_prefix: str = "",
        *,
        tools: str | None = None,
        max_length: int | None = None,
    ) -> list[int]:
        """Return the ids of `prompt_text`, without white space that shares a token with an answer's first word.

        Args:
            messages: As in `prompt_text`.
            assistant_prefix: As in `prompt_text`.
            tools: As in `prompt_text`.
            max_length: Longest prompt in tokens, cut from the left; None: not cut.

        Raises:
            ChatFormatError, TargetFormatError: As in `prompt_text`.
        """
        text = self.prompt_text(messages, assistant_prefix, tools)
        ids = _tokenize(text, self.tokenizer, begin=self._begins)
        if self.chat_format == "template" and not assistant_prefix[-1:].strip():
            span = (len(text), len(text) + len(_FIRST_WORD))
            answered, in_answer = _tokenize_spans(text + _FIRST_WORD, [span], self.tokenizer, begin=False)
            ids = answered[: int(np.argmax(in_answer))] if in_answer.any() else ids
        return ids if max_length is None else _cut_left(ids, max_length, self.tokenizer)

    @property
    def _begins(self) -> bool:
        """Whether the tokenizer's begin token is put before the text: a template writes its own."""
        return self.chat_format == "tulu"

    def _spans(self, messages: Sequence[Message], tools: str | None) -> tuple[str, list[tuple[int, int, int]]]:
        """The text of a conversation and what of it carries loss: (turn, first character, end)."""
        if self.chat_format == "template":
            text, turns = chat_template(self.tokenizer, self.date).render(messages, tools)
            return text, loss_spans(messages, turns)
        turns_as_stated = [stated(message) for message in messages]
        _refuse_fields_of_tulu(turns_as_stated, tools)
        return _tulu_spans(turns_as_stated, self.tokenizer)

    def _tulu_prompt(self, messages: Sequence[Message]) -> str:
        # As LESS writes its targets: contents are not stripped, and TyDiQA's own last newline is the only one.
        check_chat_format(self.tokenizer, self.chat_format)
        turns = "".join(_tulu_turn(message, self.tokenizer, strip=False) for message in messages)
        return turns + "<|assistant|>\n"

    def _answered(
        self, messages: Sequence[Message], answer: str, tools: str | None, example_id: str | None
    ) -> tuple[str, AssistantTurn]:
        """The text of a conversation with an answer, and where the answer stands in it."""
        whole: list[Message] = [*messages, {"role": "assistant", "content": answer}]
        template = chat_template(self.tokenizer, self.date)
        try:
            text, turns = template.render(whole, tools)
        except UnusableConversationError as problem:
            raise TargetFormatError(
                f"The chat template cannot be used for a conversation ({problem.status}): {problem}",
                where=f"example {example_id}" if example_id else None,
                fix="correct its turns, or set `chat_format: tulu`",
            ) from problem
        return text, turns[-1]

    def _template_target(self, target: TargetExample) -> tuple[list[int], int]:
        """Ids up to the end of the answer, and the number of those before its completion."""
        prefix, answer = target.assistant_prefix, target.assistant_prefix + target.completion
        text, turn = self._answered(target.messages, answer, target.tools, target.example_id)
        if turn.content is None:
            return [], 0
        start, end = turn.content
        # The template may have stripped what is at the edges of the answer, or taken a thought out of it.
        missing = answer.rindex(text[start:end])
        begin = min(end, start + max(0, len(prefix) - missing)) if prefix else turn.spans[0][0]
        ids, in_answer = _tokenize_spans(text, [(begin, end)], self.tokenizer, begin=False)
        positions = np.flatnonzero(in_answer)
        if not len(positions):
            return [], 0
        return ids[: positions[-1] + 1], int(positions[0])


def check_chat_format(
    tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, date: datetime.date = DEFAULT_DATE
) -> None:
    """Raise if no conversation can be encoded with this tokenizer in this format.

    Args:
        tokenizer: A transformers tokenizer.
        chat_format: "template" or "tulu".
        date: The day that a template is told.

    Raises:
        ChatFormatError: No end token (tulu), no chat template, or one that does not show where assistant turns begin.
    """
    if chat_format == "template":
        chat_template(tokenizer, date)
    elif not tokenizer.eos_token:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ChatFormatError("The tokenizer has no end token, which the Tulu format needs.", where=name)


def refusals(
    encoder: ChatEncoder, rows: pl.DataFrame, on_row: Callable[[int], object] = lambda row: None
) -> pl.DataFrame:
    """Encode rows of the pool, and list those of which nothing can be trained on.

    Args:
        encoder: Encodes them.
        rows: Columns `example_id` (null where a row is quarantined), `messages`, `tools`.
        on_row: Called after each row with 1.

    Returns:
        example_id, row (number in `rows`), status, detail (why, for a person).
    """
    refused = []
    for row, (example_id, messages, tools) in enumerate(rows.select("example_id", "messages", "tools").iter_rows()):
        if example_id and (reason := encoder.refusal(encoder.row(example_id, messages, tools))):
            refused.append((example_id, row, *reason))
        on_row(1)
    return pl.DataFrame(refused, REFUSED_SCHEMA, orient="row")


# ---- the Tulu format ----


def _tulu_turn(message: Message, tokenizer: PreTrainedTokenizerBase, *, strip: bool = True) -> str:
    content = message["content"].strip() if strip else message["content"].removesuffix("\n")
    end = f"{tokenizer.eos_token}\n" if message["role"] == "assistant" else "\n"
    return f"<|{message['role']}|>\n{content}{end}"


def _tulu_spans(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int, int]]]:
    text, spans = "", []
    for turn, message in enumerate(messages):
        start = len(text) + len("<|assistant|>\n")
        text += _tulu_turn(message, tokenizer)
        if carries_loss(message):
            spans.append((turn, start, len(text)))
    return text, spans


def _refuse_fields_of_tulu(messages: Sequence[Message], tools: str | None) -> None:
    """The format has contents only."""
    if tools:
        raise UnusableConversationError("unsupported_field: tools", "the Tulu format shows no tools")
    if any(message.get("tool_calls") for message in messages):
        raise UnusableConversationError("unsupported_field: tool_calls", "the Tulu format shows no tool calls")
    if any(message.get("reasoning") for message in messages):
        raise UnusableConversationError("unsupported_field: reasoning", "the Tulu format shows no reasoning")
    if any(participant(message) for message in messages):
        raise UnusableConversationError("unsupported_field: name", "the Tulu format shows no names of participants")


# ---- text to tokens ----


@lru_cache(maxsize=8)
def _begin_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the tokenizer itself puts before a text."""
    alone = tokenizer("")["input_ids"]
    return (alone[0],) if alone and alone[0] == tokenizer.bos_token_id else ()


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, begin: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*(_begin_ids(tokenizer) if begin else ()), *ids]


def _cut_left(ids: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Keep the last `length` ids; of these the first is the begin token if the whole begins with it."""
    if len(ids) <= length:
        return ids
    begin = _begin_ids(tokenizer)
    if length > 1 and begin and ids[0] == begin[0]:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def _tokenize_spans(
    text: str,
    spans: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    begin: bool,
    exact: bool = False,
) -> tuple[list[int], np.ndarray]:
    """Return the ids (n,) of a text and whether each token belongs to one of the spans of characters, bool (n,).

    `exact`: a token that is partly a span's and partly not, white space aside, is refused; only tokenizers that tell
    offsets show it.
    """
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        inside = np.zeros(len(starts), dtype=bool)
        for start, end in spans:
            inside |= (starts >= start) & (starts < end) & (ends > starts)
            for edge in (start, end) if exact else ():
                for token in np.flatnonzero((starts < edge) & (ends > edge)):
                    if text[starts[token] : edge].strip() and text[edge : ends[token]].strip():
                        shared = text[starts[token] : ends[token]]
                        problem = f"the token {shared!r} belongs to an answer and to what the template writes beside it"
                        raise UnusableConversationError("template_refuses", problem)
            for token in np.flatnonzero((starts < start) & (ends > start)):
                inside[token] = not text[starts[token] : start].strip() and bool(text[start : ends[token]].strip())
        before = _begin_ids(tokenizer) if begin else ()
        return [*before, *encoding["input_ids"]], np.concatenate([np.zeros(len(before), dtype=bool), inside])
    ids = _tokenize(text, tokenizer, begin=begin)
    inside = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        first, last = (_tokens_before(text, position, ids, tokenizer, begin=begin) for position in (start, end))
        inside[first:last] = True
    return ids, inside


def _tokens_before(text: str, position: int, ids: list[int], tokenizer: PreTrainedTokenizerBase, *, begin: bool) -> int:
    """Return how many of `ids` encode `text[:position]`, for tokenizers that do not tell offsets."""
    before = _tokenize(text[:position], tokenizer, begin=begin)
    if ids[: len(before) - 1] != before[:-1]:
        raise UnusableConversationError(
            "template_refuses", "the tokenizer has no offsets and splits the text otherwise when more follows"
        )
    return len(before)
