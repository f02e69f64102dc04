"""What counts as the right answer: extracting an answer from generated text and grading it, per task format.

Belongs here: pure functions on strings and the table of rules that names them. Generating the text, the harness and
confidence intervals live in `evaluation.py`, `generation.py` and `intervals.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

RuleName = Literal["exact_match", "bbh", "bbh_as_less", "gsm8k", "tydiqa", "mmlu"]

# A sign counts only where nothing stands before it ("16-3" holds 16 and 3); commas count only as thousands separators.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].%])[-−])?(?:[$€£¥]\s?)?(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
)
# Up to a period that ends a sentence, not one inside a number or a name.
_STATED = re.compile(r"\b[Tt]he answer is:?[ \t]*(.*?)(?:\.(?=\s|$)|\n|$)")
# Around an answer: bold, italics, code, strikethrough. Not quotes (>) and headings (#): Dyck words hold `>`.
_MARKDOWN = "*_`~"
# What an answer may do without: quotes, separators, marks that end a sentence; not signs, points of numbers, brackets.
_IDLE_PUNCTUATION = re.compile(r"""["'“”‘’`,;:!?]|\.(?!\d)""")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def last_number(text: str) -> str | None:
    """Return the last number of a text in canonical form, or None if there is none.

    Thousands separators, currency signs and trailing zeros after the point are dropped: "$1,080.50." gives "1080.5".

    Args:
        text: Generated or reference text.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    value = Decimal(last["digits"].replace(",", ""))
    if last["sign"]:
        value = -value
    if value == 0:
        return "0"
    return format(value.to_integral() if value == value.to_integral() else value.normalize(), "f")


def stated_answer(text: str) -> str:
    """Return what follows the first "the answer is", up to the end of that sentence or line; without one, the text.

    The first statement counts when there are several, as in the evaluation code that LESS uses: later ones usually
    belong to a next question that the model made up.

    Args:
        text: Generated worked answer, for example `"… = 6. So the answer is (B)."`, which gives `"(B)"`.
    """
    stated = _STATED.search(text)
    return (stated[1] if stated else text).strip()


def short_answer(text: str) -> str:
    """Return the text without surrounding space and without what a model adds after the first blank line.

    Args:
        text: Generated text.
    """
    return re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].strip()


def without_markdown(text: str) -> str:
    """Return an answer without the markdown around it (`**6**`, `_yes_`), unless it is made of nothing else.

    Args:
        text: Answer or reference.
    """
    return text.strip(_MARKDOWN + string.whitespace) or text.strip()


def normalize_plain(text: str) -> str:
    """Fold case and white space, drop markdown around the text and one trailing period, for the generic exact match.

    Args:
        text: Answer or reference.
    """
    folded = without_markdown(" ".join(text.casefold().split()))
    while folded.endswith(".") and not folded.endswith(".."):
        folded = without_markdown(folded[:-1])  # what is left may end in markdown and a period again: "6.*."
    return folded


def normalize_stated(text: str) -> str:
    """Fold case, white space, markdown and idle punctuation (quotes, commas, final periods), for BBH.

    Signs, decimal points and brackets stay: they are part of what an answer says ("-3", "1.5", Dyck words).

    Args:
        text: Answer or reference.
    """
    bare = without_markdown(" ".join(text.casefold().replace("−", "-").split()))
    bare = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), bare)
    # A comma between digits that separates no thousands separates numbers: "1,5" is not "15".
    bare = re.sub(r"(?<=\d),(?=\d)", " ", bare)
    bare = " ".join(_IDLE_PUNCTUATION.sub("", bare).split())
    return without_markdown(bare) or "".join(text.split())


def normalize_as_less(text: str) -> str:
    """Fold case, all ASCII punctuation and white space, as the evaluation code that LESS uses does for BBH.

    "3" and "-3", "1.5" and "15" are then the same. Text that is punctuation only (Dyck words) keeps it.

    Args:
        text: Answer or reference.
    """
    bare = " ".join(text.casefold().translate(_PUNCTUATION).split())
    return bare or "".join(text.split())


def normalize_squad(text: str) -> str:
    """Normalize as the official SQuAD 1.1 script does: lower case, no ASCII punctuation, no articles, single spaces.

    Args:
        text: Answer or reference.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_f1(answer: str, reference: str) -> float:
    """Return the token-overlap F1 of SQuAD 1.1; 0 if nothing overlaps, also when both are empty.

    Args:
        answer: Extracted answer.
        reference: One accepted answer.
    """
    got, wanted = normalize_squad(answer).split(), normalize_squad(reference).split()
    shared = sum((Counter(got) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(got), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _exact(normalize: Callable[[str], str]) -> Callable[[str, str], float]:
    def matches(answer: str, reference: str) -> float:
        wanted = normalize(reference)
        return float(bool(wanted) and normalize(answer) == wanted)

    return matches


def _same_number(answer: str, reference: str) -> float:
    wanted = last_number(reference)
    return float(wanted is not None and last_number(answer) == wanted)


@dataclass(frozen=True)
class AnswerRule:
    """How one format's generated answers are cut, extracted and graded.

    Attributes:
        extract: Generated text to answer.
        metrics: Metric name to a function of (answer, one reference) in [0, 1]; the best reference counts. The first
            metric is the score of a sample.
        stop: Strings that end the generation.
        max_new_tokens: Longest generation in tokens; None: long enough for the longest reference.
        average: Whether a total is the mean over samples or over subtasks (each subtask counts the same).
    """

    extract: Callable[[str], str]
    metrics: dict[str, Callable[[str, str], float]]
    stop: tuple[str, ...]
    max_new_tokens: int | None
    average: Literal["samples", "subtasks"]

    def grade(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Return every metric of an extracted answer against the reference that suits it best.

        Args:
            answer: What `extract` returned.
            references: Accepted answers, at least one.
        """
        return {
            name: max(metric(answer, reference) for reference in references) for name, metric in self.metrics.items()
        }


RULES: dict[RuleName, AnswerRule] = {
    "exact_match": AnswerRule(short_answer, {"exact_match": _exact(normalize_plain)}, (), None, "samples"),
    # Tasks count the same in BBH's and TyDiQA's averages; questions count the same in MMLU's and GSM8K's.
    "bbh": AnswerRule(stated_answer, {"exact_match": _exact(normalize_stated)}, ("\n\n",), 512, "subtasks"),
    "bbh_as_less": AnswerRule(stated_answer, {"exact_match": _exact(normalize_as_less)}, ("\n\n",), 512, "subtasks"),
    "gsm8k": AnswerRule(
        lambda text: last_number(text) or "", {"exact_match": _same_number}, ("\n\n", "Question:"), 512, "samples"
    ),
    "tydiqa": AnswerRule(str.strip, {"f1": squad_f1, "exact_match": _exact(normalize_squad)}, ("\n",), 50, "subtasks"),
    # MMLU compares likelihoods of the choices; nothing is generated, so `extract` only tidies the chosen letter.
    "mmlu": AnswerRule(str.strip, {"accuracy": _exact(normalize_plain)}, (), None, "samples"),
}
