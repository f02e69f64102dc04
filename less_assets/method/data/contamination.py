"""Whether what a model is evaluated on stands in what it is trained on, or in the target examples.

Belongs here: comparing texts, pure functions. Which files are compared, and what is made of it, is `guardrails.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from less_assets.method.data.conversations import Message, example_id, full_text
from less_assets.method.data.targets import EvaluationExample, TargetExample

NGRAM = 13
"""Words of an n-gram: shared ones hardly come about by chance (Brown et al. 2020, appendix C)."""
COMMON_ROWS = 10
COMMON_SHARE = 0.1
"""An n-gram in more evaluation rows than both say is the wording of the task (an instruction), not of a question."""
SHORTEST_QUESTION = 5
"""Words below which a question must be equal, not only contained, to count as the same."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """What rows and an evaluation have in common.

    Attributes:
        exact: Rows that are an evaluation example, word for word.
        shared: Rows that share an n-gram with one, the exact ones included.
        evaluated: Evaluation examples concerned.
        pairs: Id of a row and of an evaluation example that it overlaps with; the first hundred.
    """

    exact: int
    shared: int
    evaluated: int
    pairs: list[tuple[str, str]]


class EvaluatedRows:
    """Evaluation examples of a task, to look rows up in.

    Args:
        examples: Read without worked examples, which are in the prompt on purpose.
        benchmark: Whether questions follow an instruction and a blank line, as in the benchmarks' own formats.
    """

    def __init__(self, examples: Sequence[EvaluationExample], *, benchmark: bool) -> None:
        self._examples = examples
        self._questions = [_words(_question(example.messages, benchmark)) for example in examples]
        self._ids: dict[str, int] = {}
        self._ngrams: dict[int, int] = {}
        rows_with: Counter[int] = Counter()
        for index, example in enumerate(examples):
            answer = Message(role="assistant", content=example.assistant_prefix + example.completion)
            self._ids.setdefault(example_id([*example.messages, answer], example.tools), index)
            grams = _ngrams([*self._questions[index], *_words(example.completion)])
            rows_with.update(grams)
            for gram in grams:
                self._ngrams.setdefault(gram, index)
        common = max(COMMON_ROWS, COMMON_SHARE * len(examples))
        for gram, count in rows_with.items():
            if count > common:
                del self._ngrams[gram]
        self._benchmark = benchmark
        self._exact = self._shared = 0
        self._touched: set[int] = set()
        self._pairs: list[tuple[str, str]] = []

    def look_up(self, rows: Iterable[tuple[str, Sequence[Message]]]) -> None:
        """Compare some rows (id and turns); what is found adds up.

        Args:
            rows: For example a shard of the pool.
        """
        for row_id, messages in rows:
            exact = self._ids.get(row_id)
            touched = {exact} if exact is not None else set()
            text = _words(" ".join(map(full_text, messages)))
            touched |= {self._ngrams[gram] for gram in _ngrams(text) if gram in self._ngrams}
            if touched:
                self._exact += exact is not None
                self._shared += 1
                self._touched |= touched
                if len(self._pairs) < 100:
                    self._pairs.append((row_id, self._examples[min(touched)].example_id))

    def found(self) -> Overlap:
        """What all rows looked up so far have in common with the evaluation."""
        return Overlap(self._exact, self._shared, len(self._touched), list(self._pairs))

    def targets_inside(self, targets: Sequence[TargetExample]) -> list[tuple[str, str]]:
        """Return the ids of target examples whose question is evaluated too, each with that evaluation example's.

        A question is the last user turn, in the benchmarks' formats its last paragraph; two are the same if one
        contains the other, letters and digits compared only.

        Args:
            targets: The task's target examples.
        """
        pairs = []
        evaluated = [f" {' '.join(words)} " for words in self._questions]
        for target in targets:
            whole = f" {' '.join(_words(target.messages[-1]['content']))} "
            own_words = _words(_question(target.messages, self._benchmark))
            asked = f" {' '.join(own_words)} "
            for index, question in enumerate(evaluated):
                inside = len(self._questions[index]) >= SHORTEST_QUESTION and question in whole
                around = len(own_words) >= SHORTEST_QUESTION and asked in question
                if asked == question or inside or around:
                    pairs.append((target.example_id, self._examples[index].example_id))
                    break
        return pairs


def _question(messages: Sequence[Message], benchmark: bool) -> str:
    turn = messages[-1]["content"].strip()
    return turn.rpartition("\n\n")[2] if benchmark else turn


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str]) -> set[int]:
    # Python's own hash of text differs between processes, and is used within one only.
    return {hash(" ".join(words[start : start + NGRAM])) for start in range(len(words) - NGRAM + 1)}
