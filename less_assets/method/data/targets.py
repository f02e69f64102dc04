r"""Target and evaluation examples of a task, read from LESS's own formats or from any JSONL with `messages`.

Belongs here: the prompts of MMLU, BBH, TyDiQA and GSM8K as LESS writes them (method.md, "Target tasks"; the reference
code's `get_validation_dataset.py` and `evaluation/eval/*/run_eval.py`). Token ids are the matter of `chat.py`, grading
that of `answers.py`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import polars as pl
from upath import UPath

from less_assets.errors import PoolFormatError, TargetFormatError
from less_assets.method.data.conversations import (
    MESSAGES_TYPE,
    Conversation,
    Message,
    example_id,
    stated,
    with_all_fields,
)
from less_assets.method.data.row_files import list_files, read_raw
from less_assets.method.data.row_formats import UnusableRowError, normalize
from less_assets.method.data.tydiqa_words import TYDIQA_WORDS
from less_assets.method.evaluation.answers import RuleName

Example = TypeVar("Example", "TargetExample", "EvaluationExample")

TargetFormat = Literal["bbh", "mmlu", "tydiqa", "gsm8k", "messages"]

TARGET_SCHEMA = pl.Schema(
    {
        "example_id": pl.String(),
        "subtask": pl.String(),
        "messages": MESSAGES_TYPE,
        "assistant_prefix": pl.String(),
        "completion": pl.String(),
        "tools": pl.String(),
    }
)
"""Columns of a table of target examples; see `TargetExample`."""

_CHOICES = "ABCD"
MMLU_CHOICES = tuple(f" {letter}" for letter in _CHOICES)
"""Continuations that answer a question of MMLU."""


@dataclass(frozen=True)
class TargetExample:
    """What the selection is to be good for: a prompt and the completion that carries the loss.

    Attributes:
        example_id: Content-derived id of the whole conversation. Not a key: some of BBH's subtasks share examples,
            and MMLU has a question twice; each counts in its place.
        subtask: Group within the task; the task's only one is "all" where the format has none.
        messages: The turns before the final assistant turn; the last one is the user's.
        assistant_prefix: How the final assistant turn starts, without loss; may be empty.
        completion: The rest of that turn, with loss and without an end token.
        tools: JSON text of the tool schemas that the conversation names; None: there are none.
    """

    example_id: str
    subtask: str
    messages: list[Message]
    assistant_prefix: str
    completion: str
    tools: str | None = None


@dataclass(frozen=True)
class EvaluationExample:
    """A held-out question with its accepted answers.

    Attributes:
        example_id: Content-derived id of the prompt (few-shot examples included) and the first answer.
        subtask: As in `TargetExample`.
        messages: Prompt up to the final assistant turn, few-shot examples included.
        assistant_prefix: How the answer begins, given to the model; may be empty.
        answers: Accepted answers, at least one.
        metric: Name of the rule in `answers.RULES` that grades a generated answer.
        completion: What a right continuation of the prompt looks like, for the answer loss: the worked answer where
            the file has one, else the first answer in the form of the task's target examples.
        choices: Continuations to compare by likelihood, in the order A, B, …; empty where an answer is generated.
        tools: As in `TargetExample`.
    """

    example_id: str
    subtask: str
    messages: list[Message]
    assistant_prefix: str
    answers: list[str]
    metric: RuleName
    completion: str
    choices: tuple[str, ...] = ()
    tools: str | None = None


def read_targets(format: TargetFormat, path: str) -> list[TargetExample]:
    """Read the target examples of a task, in the order of the files.

    | format | path | subtasks |
    |---|---|---|
    | `bbh` | `bbh-three-shot.json` or its folder | keys of the object |
    | `mmlu` | folder with `*_dev.csv`, `dev/` or `dev-*.parquet`; the first 5 rows of each count | subjects |
    | `tydiqa` | `tydiqa-one-shot.json` or its folder; the first example of each language counts | languages |
    | `gsm8k` | `cot-8-shot.json` or its folder | "gsm8k" |
    | `messages` | JSONL (or CSV, Parquet) in any pool format whose last turn is the assistant's | field `subtask` |

    Args:
        format: One of the above.
        path: Local path or fsspec URL, such as `hf://datasets/cais/mmlu/all`, also into an archive.

    Raises:
        TargetFormatError: If the files are missing, not of that format, or hold no example. No example is ever dropped.
    """
    examples = list(_reader(format, _TARGET_READERS)(path))
    if not examples:
        raise TargetFormatError(
            "There are no target examples.", where=path, fix="a task needs at least one target example"
        )
    return examples


def target_table(examples: Sequence[TargetExample]) -> pl.DataFrame:
    """Return target examples as a table with `TARGET_SCHEMA`.

    Args:
        examples: Any number of examples.
    """
    return pl.DataFrame([_row(example) for example in examples], schema=TARGET_SCHEMA, orient="row")


def targets_from_table(table: pl.DataFrame) -> list[TargetExample]:
    """Return the examples of a table with `TARGET_SCHEMA`.

    Args:
        table: As written by `target_table`, also by a version that knew neither tools nor masks.
    """
    rows = with_all_fields(table).select(list(TARGET_SCHEMA)).iter_rows(named=True)
    return [TargetExample(**row | {"messages": [stated(turn) for turn in row["messages"]]}) for row in rows]


def read_evaluation(
    format: TargetFormat,
    path: str,
    limit_per_subtask: int | None = None,
    *,
    shots_path: str | None = None,
    few_shot: bool = True,
) -> list[EvaluationExample]:
    """Read the held-out questions of a task with the prompts of LESS's evaluation.

    BBH 3-shot with worked answers, MMLU 5-shot, TyDiQA 1-shot with passage, GSM8K 8-shot with worked answers;
    `messages` as they are.

    Args:
        format: As in `read_targets`.
        path: `bbh`: folder of `*.json`; `mmlu`: folder with `*_test.csv` or with `test/`; `tydiqa`: SQuAD-format file
            or folder of them; `gsm8k`: `test.jsonl`; `messages`: as in `read_targets`. Or the Parquet files of the
            Hub's data sets: `hf://datasets/` with `lukaemon/bbh`, `cais/mmlu/all`,
            `google-research-datasets/tydiqa/secondary_task`, `openai/gsm8k/main`; a file or folder of that layout.
        limit_per_subtask: The first so many questions of each subtask; None: all.
        shots_path: The task's target examples (as for `read_targets`), used as few-shot examples; None: they lie where
            LESS's layout has them, beside or above `path`. Not used by `messages`.
        few_shot: False leaves the worked examples out and keeps the rest of the prompt.

    Raises:
        TargetFormatError: If the files are missing, not of that format, or hold no question.
    """
    questions = _reader(format, _EVALUATION_READERS)(path, shots_path or path, few_shot)
    taken: dict[str, int] = {}
    examples = []
    for question in questions:
        taken[question.subtask] = taken.get(question.subtask, 0) + 1
        if limit_per_subtask is None or taken[question.subtask] <= limit_per_subtask:
            examples.append(question)
    if not examples:
        raise TargetFormatError("There are no evaluation examples.", where=path)
    return examples


def _row(example: TargetExample) -> tuple[object, ...]:
    return tuple(getattr(example, name) for name in TARGET_SCHEMA)


def _target(
    subtask: str, messages: list[Message], assistant_prefix: str, completion: str, tools: str | None = None
) -> TargetExample:
    whole = [*messages, Message(role="assistant", content=assistant_prefix + completion)]
    return TargetExample(example_id(whole, tools), subtask, messages, assistant_prefix, completion, tools)


def _question(
    subtask: str,
    messages: list[Message],
    assistant_prefix: str,
    answers: Sequence[str],
    metric: RuleName,
    completion: str,
    choices: Sequence[str] = (),
    tools: str | None = None,
) -> EvaluationExample:
    whole = [*messages, Message(role="assistant", content=f"{assistant_prefix} {answers[0]}")]
    name = example_id(whole, tools)
    return EvaluationExample(
        name, subtask, messages, assistant_prefix, list(answers), metric, completion, tuple(choices), tools
    )


def _user(content: str) -> list[Message]:
    return [Message(role="user", content=content)]


# ---- files ----


def _reader(format: str, readers: Mapping[str, Callable[..., Iterable[Example]]]) -> Callable[..., Iterable[Example]]:
    if format not in readers:
        raise TargetFormatError(f"There is no target format {format!r}.", fix=f"one of: {', '.join(readers)}")
    return readers[format]


def _find(path: str, *names: str) -> UPath:
    """Return the path itself if it is a file, else the first of the names that exists in its folder."""
    given = UPath(path)
    if given.is_file():
        return given
    for name in names:
        if (given / name).is_file():
            return given / name
    raise TargetFormatError("The file does not exist.", where=path, fix=f"give the path of {names[0]}")


def _files(path: str, patterns: Sequence[str], *folders: str) -> list[UPath]:
    """Return the files of the first pattern that any has in the first of path/folder, sorted; or the path if a file."""
    if UPath(path).is_file():
        return [UPath(path)]
    for folder in folders:
        for pattern in patterns:
            files = sorted((UPath(path) / folder).glob(pattern)) if (UPath(path) / folder).is_dir() else []
            if files:
                return files
    raise TargetFormatError(
        f"There are no {' or '.join(patterns)} files.", where=path, fix="correct the path of the task's files"
    )


def _read_text(file: UPath) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetFormatError(f"The file cannot be read: {error}", where=str(file)) from error


def _read_json(file: UPath, expected: type) -> Any:
    try:
        content = json.loads(_read_text(file))
        json.dumps(content, ensure_ascii=False).encode()  # JSON can escape half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        raise TargetFormatError(
            f"A string holds half a surrogate pair: {error.object[error.start]!a}.", where=str(file)
        ) from error
    except (ValueError, RecursionError) as error:
        raise TargetFormatError(f"The file is not JSON: {error}", where=str(file)) from error
    if not isinstance(content, expected):
        raise TargetFormatError(f"The file holds no JSON {expected.__name__}.", where=str(file))
    return content


def _get(record: Any, where: str, *keys: str | int) -> Any:
    """Return record[key][key]… or say which is missing."""
    value = record
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise TargetFormatError(f"A field is missing: {'.'.join(map(str, keys))}.", where=where) from error
    return value


# ---- BBH ----


def _bbh_blocks(file: UPath) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield (subtask, task prompt, [(question, worked answer)] × 3)."""
    for subtask, text in _read_json(file, dict).items():
        parts = str(text).split("\n\n")
        worked = [(question, answer) for question, _, answer in (part.partition("\nA:") for part in parts[-3:])]
        if len(parts) < 3 or any(part.count("\nA:") != 1 for part in parts[-3:]):
            raise TargetFormatError(
                "A subtask must end with three worked examples, `Q: …` and `A: …` each, with blank lines between.",
                where=f"{file}, subtask {subtask}",
            )
        yield subtask, "\n\n".join(parts[:-3]).strip(), worked


def _bbh_targets(path: str) -> Iterator[TargetExample]:
    for subtask, task_prompt, worked in _bbh_blocks(_find(path, "bbh-three-shot.json")):
        for i, (question, answer) in enumerate(worked):
            others = "".join(f"{q}\nA:{a}\n\n" for j, (q, a) in enumerate(worked) if j != i)
            yield _target(subtask, _user(f"{task_prompt}\n\n{others}{question}"), "A:", answer)


def _bbh_evaluation(path: str, shots_path: str, few_shot: bool) -> Iterator[EvaluationExample]:
    files = _files(path, ("*/test-*.parquet", "*.json"), "test", "bbh", "")
    shots = _find(shots_path, "bbh-three-shot.json", "../bbh-three-shot.json")
    blocks = {subtask: (task_prompt, worked) for subtask, task_prompt, worked in _bbh_blocks(shots)}
    for file in files:
        if file.name == shots.name:
            continue
        subtask = file.parent.name if file.suffix == ".parquet" else file.stem
        task_prompt, worked = _get(blocks, f"{shots} (for {file})", subtask)
        demonstrations = "".join(f"{question}\nA:{answer}\n\n" for question, answer in worked) if few_shot else ""
        for where, example in _bbh_questions(file):
            question, answer = _get(example, where, "input"), str(_get(example, where, "target"))
            prompt = f"{task_prompt}\n\n{demonstrations}Q: {question}"
            yield _question(subtask, _user(prompt), "A:", [answer], "bbh", f" So the answer is {answer}.")


def _bbh_questions(file: UPath) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".parquet":
        yield from _records(str(file))
    else:
        for i, example in enumerate(_get(_read_json(file, dict), str(file), "examples")):
            yield f"{file}, example {i + 1}", example


# ---- MMLU ----


def _mmlu_subjects(path: str, split: str, *folders: str) -> dict[str, list[list[str]]]:
    """Return subject -> rows of six fields: question, four choices, letter of the right one."""
    subjects: dict[str, list[list[str]]] = {}
    for file in _files(path, (f"*_{split}.csv", f"{split}-*.parquet"), *folders):
        if file.suffix == ".parquet":
            for where, record in _records(str(file)):
                choices, answer = _get(record, where, "choices"), _get(record, where, "answer")
                if not isinstance(choices, list) or len(choices) != 4 or answer not in range(4):
                    raise TargetFormatError(
                        "A row must have four `choices` and the place of the right one, 0 to 3, as `answer`.",
                        where=where,
                    )
                row = [str(cell) for cell in (_get(record, where, "question"), *choices, _CHOICES[answer])]
                subjects.setdefault(str(_get(record, where, "subject")), []).append(row)
        else:
            subjects[file.name.removesuffix(f"_{split}.csv")] = _mmlu_rows(file)
    return subjects


def _mmlu_rows(file: UPath) -> list[list[str]]:
    rows = [row for row in csv.reader(io.StringIO(_read_text(file), newline="")) if row]
    for number, row in enumerate(rows, start=1):
        if len(row) != 6 or row[5] not in set(_CHOICES):
            raise TargetFormatError(
                "A row must have six fields: question, A, B, C, D and the answer's letter.",
                where=f"{file}, record {number}",
            )
    return rows


def _mmlu_prompt(subject: str, worked: Sequence[Sequence[str]], row: Sequence[str]) -> str:
    # Two spaces before the subject, as in the original: its words each have one in front.
    name = "".join(f" {word}" for word in subject.split("_"))
    text = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    text += "".join(f"{_mmlu_question(shown)} {shown[5]}\n\n" for shown in worked)
    return text + _mmlu_question(row)


def _mmlu_question(row: Sequence[str]) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_CHOICES, row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:"


def _mmlu_targets(path: str) -> Iterator[TargetExample]:
    for subject, rows in _mmlu_subjects(path, "dev", "", "dev").items():
        for row in rows[:5]:
            yield _target(subject, _user(_mmlu_prompt(subject, (), row)), "The answer is:", f" {row[5]}")


def _mmlu_evaluation(path: str, shots_path: str, few_shot: bool) -> Iterator[EvaluationExample]:
    shots = _mmlu_subjects(shots_path, "dev", "", "dev", "../dev") if few_shot else {}
    for subject, rows in _mmlu_subjects(path, "test", "", "test").items():
        worked = _get(shots, f"{shots_path} (for {subject} of {path})", subject)[:5] if few_shot else ()
        for row in rows:
            prompt = _mmlu_prompt(subject, worked, row)
            yield _question(
                subject,
                _user(prompt),
                "The answer is:",
                [row[5]],
                "mmlu",
                f" {row[5]}",
                MMLU_CHOICES,
            )


# ---- TyDiQA ----


def _tydiqa_words(language: str, where: str) -> tuple[str, str, str, str]:
    if language not in TYDIQA_WORDS:
        raise TargetFormatError(f"There is no TyDiQA prompt in {language!r}.", where=where)
    return TYDIQA_WORDS[language]


def _tydiqa_shots(file: UPath) -> dict[str, tuple[str, str, str]]:
    """Return language -> (context, question, first answer) of its first example."""
    shots = {}
    for language, examples in _read_json(file, dict).items():
        where = f"{file}, language {language}"
        _tydiqa_words(language, where)
        shots[language] = (
            _get(examples, where, 0, "context"),
            _get(examples, where, 0, "question"),
            _get(examples, where, 0, "answers", 0, "text"),
        )
    return shots


def _tydiqa_targets(path: str) -> Iterator[TargetExample]:
    file = _find(path, "tydiqa-one-shot.json", "dev/tydiqa-one-shot.json")
    for language, (context, question, answer) in _tydiqa_shots(file).items():
        instruction, passage_word, question_word, answer_word = TYDIQA_WORDS[language]
        prompt = f"{instruction}{passage_word} {context}\n{question_word} {question}\n"
        yield _target(language, _user(prompt), answer_word, f" {answer}")


def _tydiqa_evaluation(path: str, shots_path: str, few_shot: bool) -> Iterator[EvaluationExample]:
    shots = {}
    if few_shot:
        names = "tydiqa-one-shot.json", "dev/tydiqa-one-shot.json", "../tydiqa-one-shot.json"
        shots = _tydiqa_shots(_find(shots_path, *names))
    for file in _files(path, ("*dev*.json", "validation-*.parquet"), "dev", "", "secondary_task"):
        for where, context, qa, texts in _tydiqa_questions(file):
            language = str(_get(qa, where, "id")).split("-")[0]
            instruction, passage_word, question_word, answer_word = _tydiqa_words(language, where)
            prompt = f"{instruction}\n\n"
            if few_shot:
                shown, asked, answer = _get(shots, f"{shots_path} (for {where})", language)
                prompt += f"{passage_word} {shown}\n{question_word} {asked}\n{answer_word} {answer}\n\n"
            prompt += f"{passage_word} {context}\n{question_word} {_get(qa, where, 'question')}\n"
            answers = list(dict.fromkeys(texts))
            if not answers:
                raise TargetFormatError("A question has no answer.", where=where)
            yield _question(language, _user(prompt), answer_word, answers, "tydiqa", f" {answers[0]}")


def _tydiqa_questions(file: UPath) -> Iterator[tuple[str, str, Any, list[str]]]:
    """Yield (where it stands, passage, question with its id, accepted answers)."""
    if file.suffix == ".parquet":
        for where, record in _records(str(file)):
            yield where, _get(record, where, "context"), record, list(_get(record, where, "answers", "text"))
        return
    for article in _get(_read_json(file, dict), str(file), "data"):
        for paragraph in _get(article, str(file), "paragraphs"):
            for qa in _get(paragraph, str(file), "qas"):
                where = f"{file}, {_get(qa, str(file), 'id')}"
                texts = [_get(accepted, where, "text") for accepted in _get(qa, where, "answers")]
                yield where, _get(paragraph, where, "context"), qa, texts


# ---- GSM8K ----


def _gsm8k_shots(file: UPath) -> list[tuple[str, str]]:
    return [
        (_get(shown, f"{file}, example {i + 1}", "question"), _get(shown, f"{file}, example {i + 1}", "cot_answer"))
        for i, shown in enumerate(_read_json(file, list))
    ]


def _gsm8k_targets(path: str) -> Iterator[TargetExample]:
    for question, answer in _gsm8k_shots(_find(path, "cot-8-shot.json")):
        yield _target("gsm8k", _user(question), "", answer)


def _gsm8k_evaluation(path: str, shots_path: str, few_shot: bool) -> Iterator[EvaluationExample]:
    files = _files(path, ("test.jsonl", "test-*.parquet"), "", "main")
    prompt = "Answer the following question.\n\n"
    if few_shot:
        beside = shots_path if shots_path != path or UPath(path).is_dir() else str(UPath(path).parent)
        worked = _gsm8k_shots(_find(beside, "cot-8-shot.json"))
        demonstrations = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in worked)
        prompt = f"Answer the following questions.\n\n{demonstrations}"
    for where, record in (record for file in files for record in _records(str(file))):
        worked_answer, mark, number = str(_get(record, where, "answer")).rpartition("####")
        if not mark:
            raise TargetFormatError("The answer has no `#### number` at its end.", where=where)
        answer = number.strip().replace(",", "")
        # Without the calculator's annotations and with the ending of the worked examples.
        steps = re.sub(r"<<.*?>>", "", worked_answer).strip()
        question = f"Question: {str(_get(record, where, 'question')).strip()}"
        yield _question(
            "gsm8k",
            _user(prompt + question),
            "Answer:",
            [answer],
            "gsm8k",
            f" {steps} So the answer is {number.strip()}.",
        )


# ---- any task: messages ----


def _records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) of every row that is not blank; a broken one is an error, since no target is dropped."""
    try:
        for file in list_files(path):
            for row in read_raw(file):
                where = f"{file}, row {row.number}"
                if row.record is not None:
                    yield where, row.record
                elif row.status != "blank":
                    raise TargetFormatError(f"A row cannot be read: {row.status}: {row.detail}", where=where)
    except PoolFormatError as error:
        raise TargetFormatError(error.what, where=error.where, fix=error.fix) from error


def _conversations(path: str) -> Iterator[tuple[str, Conversation, str]]:
    """Yield (subtask, conversation before the last turn, text of the last turn)."""
    for where, record in _records(path):
        try:
            messages, tools = normalize(record)
        except UnusableRowError as problem:
            raise TargetFormatError(
                f"An example cannot be used: {problem.status}: {problem}",
                where=where,
                fix="give each row a form of docs/row-formats.md, such as fields `prompt` and `completion`; "
                "of target examples none is left out",
            ) from problem
        if messages[-1]["role"] != "assistant" or len(messages) < 2 or messages[-2]["role"] not in ("user", "tool"):
            raise TargetFormatError(
                "The last two turns must be the user's or a tool's, and the assistant's.", where=where
            )
        if more := stated(messages[-1]).keys() - {"role", "content", "name"}:
            raise TargetFormatError(
                f"The last turn of an example has {' and '.join(sorted(more))}; its text alone is what is wanted.",
                where=where,
                fix="end the example with a turn that is text and carries loss",
            )
        subtask = record.get("subtask")
        if subtask is not None and not isinstance(subtask, str):
            raise TargetFormatError("`subtask` must be text.", where=where)
        # Nothing before the last turn carries loss, so that masks say nothing there.
        before = [stated(turn | {"train": None}) for turn in messages[:-1]]
        yield subtask or "all", Conversation(before, tools), messages[-1]["content"]


def _message_targets(path: str) -> Iterator[TargetExample]:
    for subtask, (messages, tools), completion in _conversations(path):
        yield _target(subtask, messages, "", completion, tools)


def _message_evaluation(path: str, shots_path: str, few_shot: bool) -> Iterator[EvaluationExample]:
    del shots_path, few_shot  # prompts are taken as they stand in the file
    for subtask, (messages, tools), completion in _conversations(path):
        yield _question(subtask, messages, "", [completion], "exact_match", completion, tools=tools)


_TARGET_READERS: dict[str, Callable[[str], Iterable[TargetExample]]] = {
    "bbh": _bbh_targets,
    "mmlu": _mmlu_targets,
    "tydiqa": _tydiqa_targets,
    "gsm8k": _gsm8k_targets,
    "messages": _message_targets,
}

_EVALUATION_READERS: dict[str, Callable[[str, str, bool], Iterable[EvaluationExample]]] = {
    "bbh": _bbh_evaluation,
    "mmlu": _mmlu_evaluation,
    "tydiqa": _tydiqa_evaluation,
    "gsm8k": _gsm8k_evaluation,
    "messages": _message_evaluation,
}
