"""Running a causal language model over many prompts: greedy generation and token log-probabilities in batches.

Belongs here: token ids in, text or numbers out, for any Hugging Face causal model, with or without an adapter. Prompts,
answers and metrics live in `evaluation.py` and `answers.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria

from less_assets.method.batching import plan_batches


@contextmanager
def inference(model: Any) -> Iterator[None]:
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


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a generation: the tokenizer's end token and those of the model's generation settings.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
    """
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


class _StopStrings(StoppingCriteria):
    """Ends a row once one of the stop strings is in what it generated."""

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.prompt_length, self.stop = tokenizer, prompt_length, tuple(stop)
        # A token decodes to at least one byte, so this many tokens always cover the longest stop string.
        self.window = max(len(each.encode()) for each in stop) + 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :][:, -self.window :])
        ended = [any(stop in tail for stop in self.stop) for tail in tails]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    token_budget: int = 8192,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue every prompt greedily and return the new text, cut before the first stop string.

    Prompts of similar length share a left-padded batch; a batch ends when each of its rows has met an end token or stop
    string or has `max_new_tokens` tokens.

    Args:
        model: A causal language model with `generate`; its adapter, if any, is used as it is.
        tokenizer: Its tokenizer; only decodes.
        prompts: Token ids of each prompt, at least one each.
        max_new_tokens: Longest continuation in tokens.
        stop: Strings that end a continuation; not part of the returned text.
        token_budget: Padded tokens per batch, prompts and continuations together.
        on_progress: Called after each batch with the number of prompts it held.

    Returns:
        One string per prompt, in the order given, without special tokens.
    """
    end_ids = end_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0] if end_ids else 0
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    outputs = [""] * len(prompts)
    with inference(model):
        for batch in plan_batches([len(prompt) + max_new_tokens for prompt in prompts], token_budget):
            longest = max(len(prompts[i]) for i in batch)
            input_ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                input_ids[row, longest - len(prompts[i]) :] = torch.as_tensor(prompts[i], dtype=torch.long)
                attention_mask[row, longest - len(prompts[i]) :] = 1
            generated = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=settings,
                stopping_criteria=[_StopStrings(tokenizer, longest, stop)] if stop else None,
            )
            texts = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                outputs[i] = cut_before(text, stop)
            if on_progress:
                on_progress(len(batch))
    return outputs


def cut_before(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings.

    Args:
        text: Generated text.
        stop: Strings that end it.
    """
    ends = [position for each in stop if (position := text.find(each)) >= 0]
    return text[: min(ends)] if ends else text


def logits_at(
    model: Any,
    sequences: Sequence[Sequence[int] | np.ndarray],
    positions: Sequence[np.ndarray],
    *,
    pad_token_id: int,
    token_budget: int = 4096,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the logits of each sequence at its wanted positions, batch by batch (longest sequences first).

    Only positions that some row of the batch wants go through the language-model head, if the model can leave out the
    others (`logits_to_keep`); with large vocabularies the head is most of the memory and much of the time.

    Args:
        model: A causal language model.
        sequences: Token ids of each sequence.
        positions: For each sequence an increasing int array of input positions, at least one; the logits at position t
            predict token t + 1.
        pad_token_id: Any valid id; padding is masked.
        token_budget: Padded tokens per batch.

    Yields:
        Index of the sequence and its float32 logits (positions, vocabulary) on the model's device.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(core.forward).parameters
    with inference(model):
        for batch in plan_batches([len(ids) for ids in sequences], token_budget):
            longest = max(len(sequences[i]) for i in batch)
            input_ids = torch.full((len(batch), longest), pad_token_id, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                input_ids[row, : len(sequences[i])] = torch.as_tensor(sequences[i], dtype=torch.long)
                attention_mask[row, : len(sequences[i])] = 1
            columns = np.unique(np.concatenate([positions[i] for i in batch]))
            kept = torch.as_tensor(columns, device=model.device)
            logits = model(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                use_cache=False,
                **({"logits_to_keep": kept} if keeps else {}),
            ).logits
            for row, i in enumerate(batch):
                wanted = np.searchsorted(columns, positions[i]) if keeps else positions[i]
                yield int(i), logits[row, torch.as_tensor(wanted, device=logits.device)].float()
