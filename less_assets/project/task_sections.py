"""The sections of a task: its target examples, its validation and its evaluation.

Belongs here: what these keys mean and may be. The other sections are `sections.py`.
"""

from collections.abc import Iterator
from typing import Literal

from less_assets.project.keys import BrokenRule, Section, repeated, setting
from less_assets.project.values import HarnessTask, Location, Name


class TargetExamples(Section):
    """A task's target examples: what the selected data shall teach."""

    path: Location = setting(
        ...,
        "JSON lines with `messages` and optional `subtask`; or the file or folder of a benchmark's own format",
        type="path or URL",
    )
    format: Literal["messages", "bbh", "mmlu", "tydiqa", "gsm8k"] = setting(
        "messages", "`messages`, or a benchmark's own files, turned into prompts exactly as LESS does"
    )
    max_length: int | None = setting(
        None,
        "Longest target example; longer prompts are cut from the left; null: the model's `max_length`",
        unit="tokens",
        ge=2,
    )


class Validation(Section):
    """Examples of the targets' own form that take no part in a selection: their loss after fine-tuning judges it."""

    path: Location | None = setting(
        None, "A file (or folder) of such examples, in the targets' format", type="path or URL"
    )
    folds: int | None = setting(
        None,
        "Instead of a file: parts of the target examples. Each is left out once: rows are selected for the others, a "
        "model is trained on them, and its loss on the part is taken. No pool gradient is taken again; each recipe "
        "that looks at the targets trains once more for each part",
        ge=2,
        le=20,
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        if (self.path is None) == (self.folds is None):
            said = "names both `path` and `folds`" if self.path else "names neither `path` nor `folds`"
            yield BrokenRule((), said, "give exactly one of them")


class Evaluation(Section):
    """How fine-tuned models are judged on a task: a harness task, a held-out file, or a benchmark's own files."""

    harness: HarnessTask = setting(
        None, "lm-evaluation-harness task: name, path of a YAML file, or the task itself", type="name, path or mapping"
    )
    held_out: Location | None = setting(
        None,
        "JSON lines with `messages` and optional `subtask`: loss and exact match of the last turn",
        type="path or URL",
    )
    format: Literal["bbh", "mmlu", "tydiqa", "gsm8k"] | None = setting(
        None, "Benchmark whose own test files `path` names"
    )
    path: Location | None = setting(None, "Test files in that format", type="path or URL")
    limit: int | None = setting(None, "First examples of each subtask only; null: all", unit="examples", ge=1)
    max_new_tokens: int | None = setting(
        None, "Longest answer; null: the format's own, or enough for the longest reference", unit="tokens", ge=1
    )
    max_length: int | None = setting(
        None, "Longest prompt and answer together; null: the model's `max_length`", unit="tokens", ge=2
    )
    token_budget: int = setting(4096, "Padded tokens per batch", unit="tokens", ge=1)
    few_shot: bool = setting(True, "Put the benchmark's worked examples into the prompts, as LESS does (`format` only)")
    num_fewshot: int | None = setting(None, "Worked examples in a prompt; null: the task's own (`harness` only)", ge=0)
    apply_chat_template: bool = setting(False, "Put prompts into the tokenizer's chat template (`harness` only)")
    grading: Literal["strict", "less"] = setting(
        "strict",
        "How BBH's answers are compared: `strict` respects sign, decimal point and brackets; `less` drops all "
        "punctuation, as LESS's script does, for which 3 is -3 and 1.5 is 15 (`format: bbh` only)",
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        kinds = [kind for kind in ("harness", "held_out", "format") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            said = f"names {' and '.join(kinds)}" if kinds else "names no examples"
            yield BrokenRule((), said, "give exactly one of `harness`, `held_out`, or `format` with `path`")
        if (self.format is None) != (self.path is None):
            yield BrokenRule(
                ("format",) if self.path is None else ("path",),
                "`format` and `path` go together",
                "give both, or neither",
            )
        if "harness" in kinds and self.max_new_tokens is not None:
            yield BrokenRule(("max_new_tokens",), "is the harness task's own matter", "leave it out")
        for key in self.given("num_fewshot", "apply_chat_template") if "harness" not in kinds else []:
            yield BrokenRule((key,), "applies to harness tasks only", "leave it out")
        if kinds != ["format"] and self.given("few_shot"):
            yield BrokenRule(("few_shot",), "applies to benchmark formats only", "leave it out")
        if self.format != "bbh" and self.given("grading"):
            yield BrokenRule(("grading",), "applies to `format: bbh` only", "leave it out")


class Task(Section):
    """A target: its examples and its evaluation, or a group of other tasks that share one subset."""

    name: Name = setting(..., "Name of the task; a partition key", type="name")
    examples: TargetExamples | None = setting(None, "Target examples")
    members: list[Name] | None = setting(
        None,
        "Instead of examples: other tasks, to select one subset for all of them, round-robin",
        type="list of names",
        min_length=1,
    )
    control: bool = setting(
        False,
        "The evaluation has nothing to do with the examples: a check warns if a recipe beats random on it all the same",
    )
    evaluation: Evaluation | None = setting(
        None, "How models are judged; null: selection only (a group is judged by its members' evaluations)"
    )
    validation: Validation | None = setting(
        None,
        "Examples of the targets' own form that no selection saw, for the validation loss; null: none (a group is "
        "judged by its members' files)",
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        if (self.examples is None) == (self.members is None):
            yield BrokenRule(
                ("members",) if self.members else (),
                "has both `examples` and `members`" if self.members else "has neither `examples` nor `members`",
                "give exactly one of them",
            )
        if self.members:
            yield from repeated(("members",), self.members)
            for key in self.given("evaluation", "validation"):
                yield BrokenRule((key,), f"a group is judged by its members' {key}s", "leave it out")
        if self.control and not self.evaluation:
            yield BrokenRule(("control",), "a control without evaluation shows nothing", "give it an `evaluation`")
