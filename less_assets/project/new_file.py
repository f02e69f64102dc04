"""A first project file for the data it is pointed at: `less-assets init`.

Belongs here: which settings suit how many rows, and the text with its comments. Those that depend on model and machine
are `first_settings.py`; whether the result is usable says `data_check.py`.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from less_assets.errors import LessAssetsError, ProjectFileError
from less_assets.project.first_settings import (
    checkpointing,
    gpu_bytes,
    lora_rank,
    max_length,
    parameters_of,
    row_tokens,
)
from less_assets.project.values import is_url
from less_assets.project.warmup_steps import FEWEST_STEPS

COUNTED_ROWS = 100_000
"""Rows that are counted at most: a larger pool gets the same settings."""
WARMUP_EPOCHS = 4
WARMUP_ROWS, SELECTED_ROWS = 100, 20
"""What warm-up and selection have at least, if the pool has so many."""
LARGEST_BATCH = 128
FEWEST_IN_FOLDS = 6
"""Target examples from which on they are cut into two parts; twice as many: into three."""


@dataclass(frozen=True)
class Answers:
    """What a person says of a new project; paths are meant from the current folder.

    Attributes:
        pool: Files, folders, patterns or URLs of instruction rows, one source each.
        model: Base model: Hugging Face id, folder, or `gguf:package/file.gguf`.
        task: Name of the task.
        examples: JSON lines with examples of the task.
        held_out: Rows that models are evaluated on; None: models are compared on the examples, if there are enough.
    """

    pool: Sequence[str]
    model: str
    task: str
    examples: str
    held_out: str | None = None


def project_text(answers: Answers, path: Path) -> str:
    """The commented text of a project file.

    Args:
        answers: What it is about.
        path: Where the file will lie; paths in it are relative to its folder.

    Raises:
        ProjectFileError: The pool has no usable row, or no name can be made for a task.
        PoolFormatError: A file of the pool cannot be read.
    """
    folder = path.absolute().parent
    tokens = [count for source in answers.pool for count in _tokens(source)]
    rows = len(tokens)
    if not rows:
        raise ProjectFileError(
            "The pool has no usable row.",
            where=", ".join(answers.pool),
            fix="docs/row-formats.md lists the forms that a row can have",
        )
    counted = f"more than {COUNTED_ROWS:,}" if rows >= COUNTED_ROWS else f"{rows:,}"
    warmup_fraction, selected_fraction = _fraction(WARMUP_ROWS, rows), _fraction(SELECTED_ROWS, rows)
    batch = _batch_size(round(rows * warmup_fraction) * WARMUP_EPOCHS // FEWEST_STEPS)
    finetuning_batch = _batch_size(round(rows * selected_fraction) // 4)
    length = max_length(tokens, answers.model)
    parameters = parameters_of(answers.model)
    rank, twice = lora_rank(parameters), checkpointing(parameters, length.value)
    again = ", gradient_checkpointing: true" if twice else ""
    gradients = (
        f"gradients: {{gradient_checkpointing: true}}   # {twice}"
        if twice
        else "# gradients: {bytes_per_row: 4 KiB}      # for a pool of millions; the defaults suit a model of any size"
    )
    machine = (
        "" if gpu_bytes() else "\n# This machine has no CUDA GPU: `less-assets plan` says how long it takes without."
    )
    names = _source_names(answers.pool)
    sources = "\n".join(
        f"    - {{name: {name}, path: {_quoted(_from(folder, source))}}}"
        for name, source in zip(names, answers.pool, strict=True)
    )
    evaluation = _evaluation(answers, folder)
    return f"""\
# Written by `less-assets init` for {counted} usable rows. Relative paths are meant from this file's folder.
# Keys that are left out have their defaults; all of them: docs/project-file.md of less-assets.
# Next: `less-assets check`, then `less-assets plan` (what it costs), then `less-assets run`.{machine}

name: {_name(folder.name, "project")}
storage: {{root: artifacts}}             # everything that is computed; or s3://bucket/prefix
model:
  base: {_quoted(_model(folder, answers.model))}
  max_length: {length.value}   # tokens; longer rows are cut from the right ({length.why})
# The adapter whose gradients are compared; target_modules: [q_proj, k_proj, v_proj, o_proj] unless you name others.
lora: {{rank: {rank.value}, alpha: {4 * rank.value}}}   # {rank.why}
{gradients}

pool:                                  # what to select from
  sources:
{sources}

# A short training on a random part of the pool. It needs {FEWEST_STEPS} optimizer steps or more, so that Adam's moments
# mean something: fraction × rows × epochs / batch_size. Each epoch is a checkpoint, each costs a pass over the pool.
warmup: {{fraction: {warmup_fraction}, epochs: {WARMUP_EPOCHS}, learning_rate: 2e-5, batch_size: {batch}{again}}}

tasks:                                 # what the selected rows shall teach
  - name: {_name(answers.task, "task")}
    examples: {{path: {_quoted(_from(folder, answers.examples))}}}
{evaluation}

recipes:                               # ways to choose rows; each is trained and compared
  - {{name: less, strategy: less, fraction: {selected_fraction}}}
  - {{name: random, strategy: random, fraction: {selected_fraction}, seeds: [0, 1, 2]}}
  - {{name: full, strategy: full}}
  - {{name: base, strategy: none}}       # the model as it is
  # To train a large model, let a small one of its family select (LESS-T): `base` above names the small one, `model` of
  # a recipe the large one. Taking gradients of the pool costs as much more as the selecting model is larger;
  # `less-assets plan` says how many times what the selection costs the fine-tuning does.
  # - {{name: less-large, strategy: less, fraction: {selected_fraction}, model: owner/large-model}}
  # - {{name: base-large, strategy: none, model: owner/large-model}}

finetuning: {{epochs: 4, learning_rate: 2e-5, batch_size: {finetuning_batch}{again}}}
"""


def _evaluation(answers: Answers, folder: Path) -> str:
    """By what models are compared: held-out rows, else the examples in folds, where there are enough."""
    if answers.held_out:
        path = _quoted(_from(folder, answers.held_out))
        return f"    evaluation: {{held_out: {path}}}  # rows that nothing trains on"
    evaluation = "    # evaluation: {held_out: held-out.jsonl}   # rows that nothing trains on, to compare models by"
    examples = _count_examples(answers.examples)
    if examples < FEWEST_IN_FOLDS:
        return evaluation
    folds = 3 if examples >= 2 * FEWEST_IN_FOLDS else 2
    return f"""\
    # Models are compared on the {examples} examples: each of {folds} parts is left out once, rows are selected without
    # it, and it judges. That is {folds} trainings more for a recipe; held-out rows need none.
    validation: {{folds: {folds}}}
{evaluation}"""


def _count_examples(path: str) -> int:
    """How many target examples a file has; 0 if it cannot be read, which `check` explains."""
    from less_assets.method.data.targets import read_targets

    try:
        return len(read_targets("messages", path if is_url(path) else os.path.abspath(os.path.expanduser(path))))
    except LessAssetsError:
        return 0


def _tokens(source: str) -> list[float]:
    """About how many tokens each usable row has, of so many rows as are counted."""
    from less_assets.method.data.examples import read_rows
    from less_assets.method.data.row_files import list_files

    tokens: list[float] = []
    for file in list_files(source if is_url(source) else os.path.abspath(os.path.expanduser(source))):
        for table in read_rows(file, "rows", max_rows=COUNTED_ROWS - len(tokens)):
            tokens.extend(row_tokens(table))
        if len(tokens) >= COUNTED_ROWS:
            break
    return tokens


def _fraction(at_least: int, rows: int) -> float:
    """5 % of the rows, but so much that it makes a number of rows, up to half of them."""
    return round(max(0.05, min(0.5, at_least / rows)), 3)


def _batch_size(largest: int) -> int:
    """The largest power of two up to a number."""
    return min(LARGEST_BATCH, 1 << max(0, largest.bit_length() - 1))


def _model(folder: Path, model: str) -> str:
    if not os.path.isdir(os.path.expanduser(model)):
        return model
    relative = _from(folder, model)
    return relative if relative.startswith((".", "/")) else f"./{relative}"


def _from(folder: Path, path: str) -> str:
    """A path that was meant from the current folder, as it is meant from another one."""
    if is_url(path):
        return path
    absolute = os.path.abspath(os.path.expanduser(path))
    relative = os.path.relpath(absolute, folder)
    return Path(absolute if relative.startswith("../..") else relative).as_posix()


def _source_names(paths: Sequence[str]) -> list[str]:
    names: list[str] = []
    for number, path in enumerate(paths, 1):
        name = _name(re.split(r"[/\\]", path.rstrip("/"))[-1].split(".")[0], f"source-{number}")
        names.append(name if name not in names else f"{name}-{number}")
    return names


def _name(text: str, otherwise: str) -> str:
    """A name as a project file allows it, close to a text; quoted where YAML would take it for a number or a word."""
    name = re.sub(r"[^a-z0-9_.-]+", "-", text.lower()).strip("-_.")[:60]
    return _quoted(name or otherwise)


def _quoted(text: str) -> str:
    """A text for YAML, in a flow mapping too; JSON's form is YAML's."""
    plain = re.fullmatch(r"[A-Za-z./][A-Za-z0-9_./-]*", text)
    return (
        text
        if plain and text.lower() not in ("y", "n", "yes", "no", "true", "false", "on", "off", "null")
        else json.dumps(text)
    )


def write_project_file(answers: Answers, path: Path, *, overwrite: bool = False) -> None:
    """Write the project file.

    Raises:
        LessAssetsError: The file is there already; see also `project_text`.
    """
    if path.exists() and not overwrite:
        raise LessAssetsError(
            "There is a project file already; it stays as it is.",
            where=str(path),
            fix="name another one with --output, or replace it with --force",
        )
    text = project_text(answers, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
