"""Messages to token ids and loss mask, in the tokenizer's own chat template or in the Tulu format.

Belongs here: everything between turns of text and `input_ids`/`labels`. Where the turns come from is the matter of
`examples.py` and `targets.py`, batches that of `batching.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2.exceptions import TemplateError

from less_assets.errors import ChatFormatError, TargetFormatError
from less_assets.method.data.conversations import Message

if TYPE_CHECKING:
    from less_assets.method.data.targets import TargetExample

ChatFormat = Literal["template", "tulu"]

IGNORED = -100
"""Label of a position without loss, as everywhere in transformers."""

_PROBE: list[Message] = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """An example as a model reads it.

    Attributes:
        example_id: Id of the example.
        input_ids: int32 (n,). n is 0 if the conversation cannot be rendered; see `problem`.
        labels: int32 (n,), unshifted as transformers wants them: the token id where there is loss, else −100.
        problem: Why the template refuses this conversation, for a person; None if it does not.
    """

    example_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    problem: str | None = None

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


class _UnsplittableError(Exception):
    """A conversation's rendering does not show where its assistant turns begin and end."""


def encode_messages(
    example_id: str,
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    chat_format: ChatFormat,
    max_length: int,
) -> EncodedExample:
    r"""Encode a conversation with loss on its assistant turns, end token included, cut from the right.

    `template`: the tokenizer's chat template as it is, with what it adds (a default system prompt, say). Loss is on
    what follows the generation prompt, up to and including the end-of-turn token, not on white space after it.
    `tulu`: `<|user|>\n{content}\n<|assistant|>\n{content}{eos}\n` with stripped contents and the tokenizer's begin
    token, as in LESS's `encode_with_messages_format`; like there the newline after the end token has loss.

    A token that is partly header and partly content has no loss, unless the header's part is mere white space and the
    content's is not: after a header that ends with a space, the first word is such a token.

    Args:
        example_id: Goes into the result.
        messages: The turns, at least one.
        tokenizer: A transformers tokenizer.
        chat_format: "template" or "tulu".
        max_length: Longest encoding in tokens; the rest is cut off, so that no loss tokens may remain.

    Returns:
        The encoding; with no tokens and a `problem` if the template refuses this one conversation (such as roles that
        do not alternate).

    Raises:
        ChatFormatError: If no conversation can be encoded so: no chat template, no end token, a template whose
            assistant turns cannot be told from the rest.
    """
    check_chat_format(tokenizer, chat_format)
    try:
        text, spans = (_tulu_spans if chat_format == "tulu" else _template_spans)(messages, tokenizer)
        ids, in_loss = _tokenize_spans(text, spans, tokenizer, begin=chat_format == "tulu")
    except _UnsplittableError as problem:
        return EncodedExample(example_id, np.zeros(0, np.int32), np.zeros(0, np.int32), str(problem))
    input_ids = np.asarray(ids[:max_length], dtype=np.int32)
    labels = np.where(in_loss[:max_length], input_ids, np.int32(IGNORED)).astype(np.int32)
    return EncodedExample(example_id, input_ids, labels)


def loss_token_texts(
    messages: Sequence[Message], tokenizer: Any, *, chat_format: ChatFormat, max_length: int
) -> tuple[list[LossToken], bool]:
    """Say what text each loss token of `encode_messages` stands for, with the same arguments.

    Args:
        messages: The turns; `encode_messages` can encode them.
        tokenizer: A transformers tokenizer.
        chat_format: "template" or "tulu".
        max_length: Longest encoding in tokens.

    Returns:
        One entry for each loss token, in order (texts of a turn joined are the turn as the model read it), and whether
        tokens were cut off for the length.
    """
    text, spans = (_tulu_spans if chat_format == "tulu" else _template_spans)(messages, tokenizer)
    begin = chat_format == "tulu"
    ids, in_loss = _tokenize_spans(text, spans, tokenizer, begin=begin)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    places = [place for place in range(1, min(len(ids), max_length)) if in_loss[place]]
    cut = len(ids) > max_length
    if not tokenizer.is_fast:
        firsts = [_tokens_before(text, start, ids, tokenizer, begin=begin) for start, _ in spans]
        owners = [sum(first <= place for first in firsts) - 1 for place in places]
        texts = [tokenizer.decode([ids[place]]) for place in places]
        return [LossToken(turns[owner], piece) for owner, piece in zip(owners, texts, strict=True)], cut
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = [(0, 0)] * (len(ids) - len(encoding["input_ids"])) + encoding["offset_mapping"]
    found: list[LossToken] = []
    span, reached = 0, 0
    for start, end in (offsets[place] for place in places):
        while start >= spans[span][1]:
            span += 1
        reached = max(reached, spans[span][0])
        # White space that a tokenizer leaves out of its offsets goes to the token that follows.
        found.append(LossToken(turns[span], text[reached:end]))
        reached = max(reached, end)
    return found, cut


def encode_target(target: TargetExample, tokenizer: Any, *, chat_format: ChatFormat, max_length: int) -> EncodedExample:
    """Encode a target example with loss on its completion only, without an end token, as LESS does.

    The prompt (turns, header of the assistant turn, `assistant_prefix`) and prompt + completion are tokenized
    separately; loss starts at the prompt's length. What is too long loses its prompt from the left, the tokenizer's
    begin token aside; a completion that is too long even then keeps one prompt token and is cut from the right.

    Args:
        target: The target example.
        tokenizer: A transformers tokenizer.
        chat_format: "template" or "tulu"; see `encode_messages`.
        max_length: Longest encoding in tokens.

    Raises:
        ChatFormatError: As in `encode_messages`.
        TargetFormatError: If the template refuses the conversation, or no loss token remains.
    """
    prompt = _prompt_text(target.messages, tokenizer, chat_format, target.example_id) + target.assistant_prefix
    prompt_ids = _tokenize(prompt, tokenizer, begin=chat_format == "tulu")
    ids = _tokenize(prompt + target.completion, tokenizer, begin=chat_format == "tulu")
    start = min(len(prompt_ids), len(ids))
    kept = _cut_left(ids[:start], max(1, max_length - (len(ids) - start)), tokenizer)
    input_ids = np.asarray((kept + ids[start:])[:max_length], dtype=np.int32)
    labels = input_ids.copy()
    labels[: len(kept)] = IGNORED
    encoded = EncodedExample(target.example_id, input_ids, labels)
    if not encoded.loss_tokens:
        raise TargetFormatError(
            "A target example has no token to take the loss over.",
            where=f"target example {target.example_id} (subtask {target.subtask}), max_length {max_length}",
            fix="give it a completion, or raise the task's max_length",
        )
    return encoded


def encode_prompt(
    messages: Sequence[Message],
    assistant_prefix: str,
    tokenizer: Any,
    *,
    chat_format: ChatFormat,
    max_length: int | None = None,
) -> list[int]:
    """Return the token ids after which a model is to go on: turns, header of the assistant turn, `assistant_prefix`.

    Args:
        messages: The turns, the last one not the assistant's.
        assistant_prefix: How the answer begins; may be empty.
        tokenizer: A transformers tokenizer.
        chat_format: "template" or "tulu"; see `encode_messages`.
        max_length: Longest prompt in tokens, cut from the left; None: not cut.

    Raises:
        ChatFormatError: As in `encode_messages`.
        TargetFormatError: If the template refuses the conversation.
    """
    text = _prompt_text(messages, tokenizer, chat_format, None) + assistant_prefix
    ids = _tokenize(text, tokenizer, begin=chat_format == "tulu")
    return ids if max_length is None else _cut_left(ids, max_length, tokenizer)


def check_chat_format(tokenizer: Any, chat_format: ChatFormat) -> None:
    """Raise if no conversation can be encoded with this tokenizer in this format.

    Args:
        tokenizer: A transformers tokenizer.
        chat_format: "template" or "tulu".

    Raises:
        ChatFormatError: No end token (tulu), no chat template, or one that does not show where assistant turns begin.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if chat_format == "tulu":
        if not tokenizer.eos_token:
            raise ChatFormatError("The tokenizer has no end token, which the Tulu format needs.", where=name)
        return
    if not tokenizer.chat_template:
        raise ChatFormatError(
            "The tokenizer has no chat template.", where=name, fix="set `chat_format: tulu` in the project file"
        )
    try:
        _probe_template(tokenizer, str(tokenizer.chat_template))
    except _UnsplittableError as problem:
        raise ChatFormatError(
            f"The chat template cannot be used to train on assistant turns: {problem}.",
            where=f"chat template of {name}",
            fix="set `chat_format: tulu` in the project file, or use a tokenizer with another template",
        ) from problem


@lru_cache(maxsize=8)
def _probe_template(tokenizer: Any, chat_template: str) -> None:
    """Encode a plain conversation; remembered per tokenizer and template."""
    _tokenize_spans(*_template_spans(_PROBE, tokenizer), tokenizer, begin=False)


# ---- text and the parts of it that carry loss ----


def _tulu_turn(message: Message, tokenizer: Any, *, strip: bool = True) -> str:
    content = message["content"].strip() if strip else message["content"].removesuffix("\n")
    end = f"{tokenizer.eos_token}\n" if message["role"] == "assistant" else "\n"
    return f"<|{message['role']}|>\n{content}{end}"


def _tulu_spans(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for message in messages:
        start = len(text) + len("<|assistant|>\n")
        text += _tulu_turn(message, tokenizer)
        if message["role"] == "assistant":
            spans.append((start, len(text)))
    return text, spans


def _prompt_text(messages: Sequence[Message], tokenizer: Any, chat_format: ChatFormat, example_id: str | None) -> str:
    check_chat_format(tokenizer, chat_format)
    if chat_format == "tulu":
        # As LESS writes its targets: contents are not stripped, and TyDiQA's own last newline is the only one.
        return "".join(_tulu_turn(message, tokenizer, strip=False) for message in messages) + "<|assistant|>\n"
    try:
        return _render(messages, tokenizer, generation_prompt=True)
    except _UnsplittableError as problem:
        raise TargetFormatError(
            f"The chat template refuses a conversation: {problem}",
            where=f"example {example_id}" if example_id else None,
            fix="correct its turns, or set `chat_format: tulu`",
        ) from problem


def _render(messages: Sequence[Message], tokenizer: Any, *, generation_prompt: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
        )
    except (TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
        raise _UnsplittableError(f"the template says: {error}") from error


def _template_spans(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find its assistant turns by rendering its beginnings."""
    text = _render(messages, tokenizer, generation_prompt=False)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _turn_start(text, messages[: turn + 1], tokenizer)
        end = _turn_end(text, start, messages[: turn + 1], tokenizer) if turn + 1 < len(messages) else len(text)
        if spans and start < spans[-1][1]:
            raise _UnsplittableError(f"assistant turn {turn + 1} seems to begin inside the one before")
        spans.append((start, _end_of_turn(text, start, end, tokenizer)))
    return text, spans


def _turn_start(text: str, messages: Sequence[Message], tokenizer: Any) -> int:
    """Return where the last of `messages` begins in `text`: after the generation prompt."""
    *before, message = messages
    prompt = _render(before, tokenizer, generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    # A generation prompt may say more than the header of a past turn, such as an opened <think>.
    common = next(i for i, character in enumerate(prompt) if text[i : i + 1] != character)
    header = _render(before, tokenizer, generation_prompt=False)
    if text.startswith(header) and common > len(header) and _begins_with(text[common:], message["content"]):
        return common
    raise _UnsplittableError(f"the text before assistant turn {len(messages)} changes with what follows")


def _begins_with(text: str, content: str) -> bool:
    content = content.strip()
    return bool(content) and text.lstrip().startswith(content)


def _turn_end(text: str, start: int, messages: Sequence[Message], tokenizer: Any) -> int:
    """Return where the last of `messages`, which is not the last turn of `text`, ends in it."""
    through = _render(messages, tokenizer, generation_prompt=False)
    if text.startswith(through) and len(through) > start:
        return len(through)
    # A past turn may be rendered otherwise than a last one: Qwen3 drops its thoughts, Phi-4 puts another end token
    # after the whole conversation. Then the turn ends with the first special token right after its content.
    content = messages[-1]["content"].strip()
    for end, token in sorted((text.find(token, start), token) for token in _special_tokens(tokenizer)):
        said = text[start:end].strip()
        if end > start and said and content.endswith(said):
            return end + len(token)
    raise _UnsplittableError(f"the end of assistant turn {len(messages)} cannot be found")


def _end_of_turn(text: str, start: int, end: int, tokenizer: Any) -> int:
    """Leave white space after the end-of-turn token out of the turn."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(_special_tokens(tokenizer)) else end


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


# ---- text to tokens ----


@lru_cache(maxsize=8)
def _begin_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer itself puts before a text."""
    alone = tokenizer("")["input_ids"]
    return (alone[0],) if alone and alone[0] == tokenizer.bos_token_id else ()


def _tokenize(text: str, tokenizer: Any, *, begin: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*(_begin_ids(tokenizer) if begin else ()), *ids]


def _cut_left(ids: list[int], length: int, tokenizer: Any) -> list[int]:
    """Keep the last `length` ids; of these the first is the begin token if the whole begins with it."""
    if len(ids) <= length:
        return ids
    begin = _begin_ids(tokenizer)
    if length > 1 and begin and ids[0] == begin[0]:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


def _tokenize_spans(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, *, begin: bool
) -> tuple[list[int], np.ndarray]:
    """Return the ids (n,) of a text and whether each token belongs to one of the spans of characters, bool (n,)."""
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        inside = np.zeros(len(starts), dtype=bool)
        for start, end in spans:
            inside |= (starts >= start) & (starts < end) & (ends > starts)
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


def _tokens_before(text: str, position: int, ids: list[int], tokenizer: Any, *, begin: bool) -> int:
    """Return how many of `ids` encode `text[:position]`, for tokenizers that do not tell offsets."""
    before = _tokenize(text[:position], tokenizer, begin=begin)
    if ids[: len(before) - 1] != before[:-1]:
        raise _UnsplittableError("the tokenizer has no offsets and splits the text otherwise when more follows")
    return len(before)
