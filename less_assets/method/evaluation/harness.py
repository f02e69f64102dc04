"""lm-evaluation-harness on a model that is already in memory, offline, in length-bucketed batches.

Belongs here: the adapter between the harness and `generation.py`, and tasks given by name, YAML file or dictionary.
Which examples are asked, and the tables that come out, live in `evaluation.py`.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from less_assets.errors import EvaluationError
from less_assets.method import DEFAULT_DATE
from less_assets.method.data.chat import ChatEncoder
from less_assets.method.data.conversations import Message
from less_assets.method.evaluation.generation import generate_and_score, inference, logits_at

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A pair of texts (context, continuation) as token ids.
Encoding = tuple[Sequence[int], Sequence[int]]


class HarnessModel(HFLM):  # type: ignore[misc] # the harness has no types
    """A loaded model as the harness wants it: HFLM's tokenization and chat templates, our batching.

    HFLM takes a fixed number of rows per batch and sends every position through the language-model head; both are
    several times slower on prompts of mixed length, so generation and likelihoods go through `generation.py`.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        max_length: Longest prompt and continuation together, in tokens; None: what the model's configuration says.
            Longer prompts are cut from the left.
        token_budget: Padded tokens per batch.
        encodings: Token ids of (context, continuation) pairs whose encoding must not be derived from the text. A
            document's continuation is its field `gold`; its loss is found in `reference_losses` after a generation.
        date: The day that a chat template is told which asks for it.
        on_progress: Called with the number of requests done since the last call.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        token_budget: int = 4096,
        encodings: Mapping[tuple[str, str], Encoding] | None = None,
        date: datetime.date = DEFAULT_DATE,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        with _quiet(), inference(model):  # HFLM warns of what is meant here and leaves the model in eval mode
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length)
        self.token_budget = token_budget
        self.encodings = dict(encodings or {})
        self.reference_losses: dict[tuple[str, str], float] = {}
        self.on_progress = on_progress
        self._date = date

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Put a request into the chat template as rows and targets are.

        Args:
            chat_history: The turns.
            add_generation_prompt: False: the last turn is the beginning of the answer.

        Raises:
            ChatFormatError, TargetFormatError: The template cannot be used for it.
        """
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in chat_history]
        begun = "" if add_generation_prompt else messages.pop()["content"]
        encoder = ChatEncoder(self.tokenizer, "template", self.max_length, self._date)
        # The answer's first word brings the space before it, as in rows.
        return encoder.prompt_text(messages, begun) if begun else encoder.prompt_text(messages).rstrip(" ")

    def _encode_pair(self, context: str, continuation: str) -> Encoding:
        known = self.encodings.get((context, continuation))
        return known if known is not None else super()._encode_pair(context, continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer generation requests, greedily; requests that ask for sampling go to HFLM."""
        outputs = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for key, members in groups.items():
            options = json.loads(key)
            if options.get("do_sample"):
                texts = super().generate_until([requests[i] for i in members], disable_tqdm=True)
            else:
                texts = self._generate([requests[i] for i in members], options)
            for i, text in zip(members, texts, strict=True):
                outputs[i] = text
        return outputs

    def _generate(self, requests: Sequence[Instance], options: Mapping[str, Any]) -> list[str]:
        """Continue the requests' prompts, and note the losses of those whose reference is known."""
        until = options.get("until") or []
        new_tokens = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks)
        pairs = [self._known_pair(request) for request in requests]
        encoded = [
            self.encodings[pair] if pair else (self.tok_encode(request.args[0]), ())
            for pair, request in zip(pairs, requests, strict=True)
        ]
        room = [self.max_length - max(new_tokens, len(reference)) for _, reference in encoded]
        if min(room) < 1:
            raise EvaluationError(
                f"Answers of up to {new_tokens} tokens leave no room for a prompt in {self.max_length} tokens.",
                where=str(requests[0].task_name),
                fix="raise max_length or lower max_new_tokens",
            )
        texts, losses = generate_and_score(
            self.model,
            self.tokenizer,
            [prompt[-most:] for (prompt, _), most in zip(encoded, room, strict=True)],
            [reference for _, reference in encoded],
            max_new_tokens=new_tokens,
            stop=[until] if isinstance(until, str) else until,
            token_budget=self.token_budget,
            on_progress=self.on_progress,
        )
        self.reference_losses |= {pair: loss for pair, loss in zip(pairs, losses.tolist(), strict=True) if pair}
        return texts

    def _known_pair(self, request: Instance) -> tuple[str, str] | None:
        """Return the request's (context, reference) if their encoding is given, as for our own tasks."""
        reference = request.doc.get("gold") if isinstance(request.doc, Mapping) else None
        pair = (request.args[0], reference)
        return pair if isinstance(reference, str) and pair in self.encodings else None

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Score (context, continuation) ids; continuations that differ in their last token only share one row."""
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            ids = [*context, *continuation][-(self.max_length + 1) : -1]
            rows.setdefault((tuple(ids), min(len(continuation), len(ids))), []).append(i)
        keys = list(rows)
        results = [(0.0, False)] * len(requests)
        wanted = [np.arange(len(ids) - length, len(ids)) for ids, length in keys]
        scored = logits_at(
            self.model,
            [ids for ids, _ in keys],
            wanted,
            token_budget=self.token_budget,
        )
        for row, logits in scored:
            log_probabilities = logits.log_softmax(-1)
            best = log_probabilities.argmax(-1)
            for i in rows[keys[row]]:
                tokens = torch.as_tensor(requests[i][2][-len(best) :], device=best.device)
                total = log_probabilities.gather(1, tokens[:, None]).sum()
                results[i] = (float(total), bool((best == tokens).all()))
            if self.on_progress:
                self.on_progress(len(rows[keys[row]]))
        return results

    def continuation_losses(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Return the mean cross-entropy (nats per token) of each continuation and its number of tokens.

        Args:
            pairs: (context, continuation) texts; an empty context means the tokenizer's begin or end token.
        """
        encoded = []
        for context, continuation in pairs:
            if context:
                context_ids, ids = self._encode_pair(context, continuation)
            else:
                context_ids, ids = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            encoded.append((None, list(context_ids), list(ids)))
        scorable = [i for i, (_, _, ids) in enumerate(encoded) if ids]
        losses = [(float("nan"), 0)] * len(pairs)
        for i, (total, _) in zip(scorable, self._loglikelihood_tokens([encoded[i] for i in scorable]), strict=True):
            losses[i] = (-total / len(encoded[i][2]), len(encoded[i][2]))
        return losses


def load_task(task: str | Path | Mapping[str, Any], include_path: str | Path | None = None) -> dict[str, Any]:
    """Load a harness task, group or tag and return its leaf tasks by name.

    Args:
        task: A name that the harness (or `include_path`) knows, the path of a YAML file, or a task as a dictionary.
        include_path: Folder with the user's own task YAML files.

    Raises:
        EvaluationError: If there is no such task, its data cannot be had (offline), or its settings are wrong.
    """
    spec = dict(task) if isinstance(task, Mapping) else str(task)
    is_file = isinstance(spec, str) and Path(spec).suffix in {".yaml", ".yml"}
    if is_file and not Path(str(spec)).is_file():
        raise EvaluationError("The harness task file does not exist.", where=str(spec))
    # Reading the harness's own 14,000 YAML files takes some 20 s: only for names that may be theirs.
    if isinstance(spec, dict) or is_file:
        attempts = ["group" in (spec if isinstance(spec, dict) else Path(spec).read_text(encoding="utf-8"))]
    else:
        attempts = [False, True] if include_path else [True]
    for include_defaults in attempts:
        try:
            with _quiet():
                manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
                tasks: dict[str, Any] = manager.load([spec])["tasks"]
                return tasks
        except KeyError as error:
            missing = error
        except Exception as error:
            raise EvaluationError(
                f"The harness task cannot be loaded: {type(error).__name__}: {error}",
                where=spec if isinstance(spec, str) else str(spec.get("task")),
                fix="its data must be on this machine when the hub cannot be reached (HF_HUB_OFFLINE)",
            ) from error
    raise EvaluationError(
        f"lm-evaluation-harness cannot find {missing}.",
        where=spec if isinstance(spec, str) else str(spec.get("task")),
        fix="list the names with `lm_eval ls tasks`, or give the path of a task's YAML file",
    ) from missing


def run_tasks(
    lm: HarnessModel,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Run loaded harness tasks and return the harness's result, with every sample.

    This is `lm_eval.simple_evaluate` without its reseeding of the process's random numbers and without the inquiry into
    the environment, which starts subprocesses.

    Args:
        lm: The model.
        tasks: Leaf tasks by name, from `load_task`.
        limit: First examples of each task only; None: all.
        num_fewshot: Overrides each task's own number of examples, except where that is 0 by definition.
        apply_chat_template: Put the prompts into the tokenizer's chat template.
        seed: Seed of the few-shot sampling.
    """
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    with inference(lm.model), _quiet():
        result: dict[str, Any] | None = evaluate(
            lm=lm,
            task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    if result is None:
        raise EvaluationError("The harness returned nothing.", fix="run evaluation in a single process")
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's notices and progress bars: progress is reported through `on_progress`."""
    log = logging.getLogger("lm_eval")
    level, bar = log.level, lm_eval.api.task.tqdm
    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    log.setLevel(logging.ERROR)
    for module in modules:
        module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        log.setLevel(level)
        for module in modules:
            module.tqdm = bar
