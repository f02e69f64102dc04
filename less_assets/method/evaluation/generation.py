"""Running a causal language model over many prompts: greedy generation and logits in batches.

Belongs here: token ids in, text or logits out, for any Hugging Face causal model, with or without an adapter. Prompts,
answers and metrics live in `evaluation.py` and `answers.py`. Evaluation prompts begin alike (system prompt, worked
examples), so what a group of rows has in common is run once and its key-value cache shared: with GSM8K's eight worked
examples that is nine tenths of all tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers.cache_utils import DynamicCache, DynamicLayer

from less_assets.method.data.batching import plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows that agree on this many first tokens make a group of their own.
PREFIX_WINDOW = 64
# Below this many shared tokens a cache costs more than it saves.
MIN_PREFIX = 8
# Cached tokens per batch, in units of its token budget: they cost memory, but no computation.
CACHED_PER_TOKEN = 4

Tokens = Sequence[int] | np.ndarray


@contextmanager
def inference(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Run the body without gradients and with the model in eval mode, and put its mode back afterwards.

    Args:
        model: A torch module.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a generation: the tokenizer's end token and those of the model's generation settings.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
    """
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    token_budget: int = 8192,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue every prompt greedily; see `generate_and_score`."""
    return generate_and_score(
        model,
        tokenizer,
        prompts,
        [()] * len(prompts),
        max_new_tokens=max_new_tokens,
        stop=stop,
        token_budget=token_budget,
        on_progress=on_progress,
    )[0]


def generate_and_score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    references: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    token_budget: int = 8192,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[str], np.ndarray]:
    """Continue every prompt greedily, and take the loss of its reference continuation in the same pass.

    The reference runs behind its prompt in the first forward pass and is masked afterwards, so that the prompt, which
    is most of the work, is computed once. A row ends at an end token, a stop string or `max_new_tokens` tokens; a batch
    goes on without its ended rows.

    Args:
        model: A causal language model; its adapter, if any, is used as it is.
        tokenizer: Its tokenizer; only decodes.
        prompts: Token ids of each prompt, at least one each.
        references: Token ids of each reference continuation; may be empty.
        max_new_tokens: Longest continuation in tokens.
        stop: Strings that end a continuation; not part of the returned text.
        token_budget: Padded tokens per batch, prompts and continuations together.
        on_progress: Called after each batch with the number of prompts it held.

    Returns:
        The continuations in the order given, without special tokens and cut before the first stop string; and the mean
        cross-entropy of each reference in nats per token, float64 (n,), NaN for an empty one.
    """
    end_ids = end_token_ids(model, tokenizer)
    texts = [""] * len(prompts)
    losses = np.full(len(prompts), np.nan)
    rows = [[*prompt, *reference] for prompt, reference in zip(prompts, references, strict=True)]
    longest_prefixes = [len(prompt) - 1 for prompt in prompts]
    with inference(model):
        for batch, prefix, cache in _batches(model, rows, longest_prefixes, max_new_tokens, token_budget):
            scored = [len(references[i]) for i in batch]
            run = _Run(model, [rows[i][prefix:] for i in batch], scored, prefix, cache)
            losses[batch] = run.reference_losses
            new_ids = run.continue_greedily(tokenizer, max_new_tokens, end_ids, stop)
            for i, ids in zip(batch, new_ids, strict=True):
                texts[i] = cut_before(str(tokenizer.decode(ids, skip_special_tokens=True)), stop)
            if on_progress:
                on_progress(len(batch))
    return texts, losses


class _Run:
    """A batch of rows under way: the prompts and references are done, the next tokens are known.

    Args:
        model: A causal language model.
        rows: Token ids of each row behind the shared prefix: rest of the prompt, then the reference.
        scored: Tokens of each row's reference.
        prefix: Tokens that the cache holds for every row.
        cache: Their keys and values; None if there are none.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        rows: Sequence[Tokens],
        scored: Sequence[int],
        prefix: int,
        cache: DynamicCache | None,
    ) -> None:
        self.model = model
        input_ids, mask = _pad(rows, "left", model.device)
        self.mask = torch.cat([mask.new_ones(len(rows), prefix), mask], dim=1)
        kept = max(scored) + 1  # from the last token of the prompt on, which predicts the reference's first
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, prefix:]
        logits = self._forward(input_ids, positions, cache, kept)[:, -kept:]
        own = [logits[row, kept - 1 - length :] for row, length in enumerate(scored)]
        self.next_ids = torch.stack([logits[0].argmax(-1) for logits in own])
        self.reference_losses = [
            float(cross_entropy(logits[:-1].float(), input_ids[row, -length:])) if length else float("nan")
            for row, (logits, length) in enumerate(zip(own, scored, strict=True))
        ]
        self.positions = torch.empty_like(self.next_ids)
        for row, length in enumerate(scored):
            self.mask[row, self.mask.shape[1] - length :] = 0
            self.positions[row] = prefix + len(rows[row]) - length

    def _forward(self, input_ids: torch.Tensor, positions: torch.Tensor, cache: Any, kept: int) -> torch.Tensor:
        result = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": kept} if keeps_logits(self.model) else {}),
        )
        self.cache = result.past_key_values
        logits: torch.Tensor = result.logits
        return logits

    def continue_greedily(
        self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, end_ids: Sequence[int], stop: Sequence[str]
    ) -> list[list[int]]:
        """Return the new token ids of each row, end tokens excluded."""
        # A token decodes to at least one byte, so this many tokens always cover the longest stop string.
        window = max((len(string.encode()) for string in stop), default=0) + 2
        rows = list(range(len(self.next_ids)))  # which row of the batch each row of the tensors is
        open_rows = set(rows)
        new_ids: list[list[int]] = [[] for _ in rows]
        for left in range(max_new_tokens - 1, -1, -1):
            for row, token in zip(rows, self.next_ids.tolist(), strict=True):
                if row in open_rows and token in end_ids:
                    open_rows.remove(row)
                elif row in open_rows:
                    new_ids[row].append(token)
                    if stop and any(string in tokenizer.decode(new_ids[row][-window:]) for string in stop):
                        open_rows.remove(row)
            if not open_rows or not left:
                break
            # Leaving rows out copies the cache, so not for every single one.
            if 2 * len(open_rows) <= len(rows) and _can_share(self.cache):
                self._keep([position for position, row in enumerate(rows) if row in open_rows])
                rows = [row for row in rows if row in open_rows]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(self.next_ids[:, None], self.positions[:, None], self.cache, 1)
            self.next_ids, self.positions = logits[:, -1].argmax(-1), self.positions + 1
        return new_ids

    def _keep(self, places: list[int]) -> None:
        kept = torch.tensor(places, device=self.mask.device)
        self.cache.batch_select_indices(kept)
        self.mask, self.next_ids, self.positions = self.mask[kept], self.next_ids[kept], self.positions[kept]


def cut_before(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings.

    Args:
        text: Generated text.
        stop: Strings that end it.
    """
    ends = [position for string in stop if (position := text.find(string)) >= 0]
    return text[: min(ends)] if ends else text


def logits_at(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Tokens],
    positions: Sequence[np.ndarray],
    *,
    token_budget: int = 4096,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the logits of each sequence at its wanted positions, batch by batch.

    Only positions that some row of the batch wants go through the language-model head, if the model can leave out the
    others (`logits_to_keep`); with large vocabularies the head is most of the memory and much of the time.

    Args:
        model: A causal language model.
        sequences: Token ids of each sequence.
        positions: For each sequence an increasing int array of input positions, at least one; the logits at position t
            predict token t + 1.
        token_budget: Padded tokens per batch.

    Yields:
        Index of the sequence and its float32 logits (positions, vocabulary) on the model's device.
    """
    keeps = keeps_logits(model)
    # What follows the last wanted position changes nothing.
    sequences = [ids[: int(wanted[-1]) + 1] for ids, wanted in zip(sequences, positions, strict=True)]
    first_wanted = [int(wanted[0]) for wanted in positions]
    with inference(model):
        for batch, prefix, cache in _batches(model, sequences, first_wanted, 0, token_budget):
            input_ids, mask = _pad([sequences[i][prefix:] for i in batch], "right", model.device)
            columns = np.unique(np.concatenate([positions[i] for i in batch])) - prefix
            logits = model(
                input_ids=input_ids,
                attention_mask=torch.cat([mask.new_ones(len(batch), prefix), mask], dim=1),
                position_ids=torch.arange(prefix, prefix + input_ids.shape[1], device=model.device)[None],
                past_key_values=cache,
                use_cache=cache is not None,
                **({"logits_to_keep": torch.as_tensor(columns, device=model.device)} if keeps else {}),
            ).logits
            for row, i in enumerate(batch):
                wanted = positions[i] - prefix
                kept = np.searchsorted(columns, wanted) if keeps else wanted
                yield int(i), logits[row, torch.as_tensor(kept, device=logits.device)].float()


def _batches(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Tokens],
    longest_prefixes: Sequence[int],
    new_tokens: int,
    token_budget: int,
) -> Iterator[tuple[np.ndarray, int, DynamicCache | None]]:
    """Yield batches of rows with the number of tokens that a cache holds for all of them, and that cache.

    A pure function of the sequences and the budget but for the caches, whose batch dimension is that of the rows.
    """
    for members, prefix in group_by_prefix(sequences, longest_prefixes):
        shared = None
        if prefix:
            ids = torch.as_tensor(np.asarray(sequences[members[0]][:prefix]), dtype=torch.long, device=model.device)
            only_last = {"logits_to_keep": 1} if keeps_logits(model) else {}
            shared = model(input_ids=ids[None], use_cache=True, **only_last).past_key_values
            if not _can_share(shared):
                prefix, shared = 0, None
        lengths = [
            max(len(sequences[i]) - prefix + new_tokens, (len(sequences[i]) + new_tokens) // CACHED_PER_TOKEN)
            for i in members
        ]
        for batch in plan_batches(lengths, token_budget):
            cache = copy.deepcopy(shared)
            if cache is not None:
                cache.batch_repeat_interleave(len(batch))
            yield members[batch], prefix, cache


def group_by_prefix(sequences: Sequence[Tokens], longest_prefixes: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """Group rows that begin alike, and say how many tokens each group's rows have in common.

    Args:
        sequences: Token ids of each row.
        longest_prefixes: Most tokens of each row that may be shared.

    Returns:
        Index arrays, together every row once, each with its number of shared tokens (0: not worth sharing).
    """
    groups: dict[bytes, list[int]] = {}
    for i, ids in enumerate(sequences):
        start = np.asarray(ids[:PREFIX_WINDOW], dtype=np.int64)
        groups.setdefault(start.tobytes() if len(start) == PREFIX_WINDOW else b"", []).append(i)
    alone = [i for start, members in groups.items() if not start or len(members) == 1 for i in members]
    alike = [members for start, members in groups.items() if start and len(members) > 1]
    grouped = []
    for members in [*alike, sorted(alone)]:
        if members:
            common = min(longest_prefixes[i] for i in members)
            first = np.asarray(sequences[members[0]])[:common]
            for i in members:
                differs = np.flatnonzero(first != np.asarray(sequences[i])[: len(first)])
                first = first[: differs[0]] if len(differs) else first
            worthwhile = len(members) > 1 and len(first) >= MIN_PREFIX
            grouped.append((np.array(members), len(first) if worthwhile else 0))
    return grouped


def _pad(rows: Sequence[Tokens], side: str, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and attention mask, int64 (rows, longest); the padding's id does not matter, it is masked."""
    longest = max(len(ids) for ids in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        columns = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        input_ids[row, columns] = torch.as_tensor(np.asarray(ids), dtype=torch.long)
        mask[row, columns] = 1
    return input_ids.to(device), mask.to(device)


def keeps_logits(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model's forward can leave out positions before its head.

    Args:
        model: A causal language model, with or without an adapter.
    """
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(core.forward).parameters


def _can_share(cache: Any) -> bool:
    """Whether rows can be repeated and left out: plain attention caches, not sliding windows or recurrent states."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
