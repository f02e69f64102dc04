"""What a rule that scores the pool from text or from embeddings is given, and what it gives back.

Belongs here: these two types. Not here: the rules themselves (baselines.py) and reading the pool (`steps/`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

Rows = TypeVar("Rows")

Texts = list[str]
"""One text for each row."""
PoolTexts = Callable[[], Iterable[Texts]]
"""Called for every pass over the pool; yields the texts of its usable rows, shard by shard."""
EmbeddedRows = Callable[[str], np.ndarray]
"""Reads a column of n rows: `embedding`, float32 (n, d), or `loss`, the base model's, float32 (n,)."""


@dataclass(frozen=True)
class TargetExamples:
    """The m target examples of a task.

    Attributes:
        task: Name of the task, or of a group of tasks.
        members: Task of each example; the group's members, where it is a group.
        subtasks: Subtask of each example; of a group, `member/subtask`.
        texts: Text of each example, completion included; empty for rules that score embeddings.
        embeddings: float32 (m, d); empty for rules that score text, or that are the same for every task.
    """

    task: str
    members: Sequence[str]
    subtasks: Sequence[str]
    texts: Sequence[str] = ()
    embeddings: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Task and subtask of each example, the subtask without its task's name."""
        return [
            (member, subtask.removeprefix(f"{member}/"))
            for member, subtask in zip(self.members, self.subtasks, strict=True)
        ]


@dataclass(frozen=True)
class PoolScorer(Generic[Rows]):
    """Scores rows of the pool, a shard at a time; higher is better.

    Attributes:
        columns: Task and subtask of each of the J scores; a score of no subtask says `all`.
        score: From n rows (`Texts` or `EmbeddedRows`) to scores, float (n, J); NaN never ranks.
    """

    columns: list[tuple[str, str]]
    score: Callable[[Rows], np.ndarray]
