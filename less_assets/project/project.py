"""The project file: one YAML file is the whole experiment.

Belongs here: what every key means, what it may be, how it is checked, and the views that the rest of the code reads.
How YAML is parsed safely is `project_yaml.py`; whether the data it names is there and usable is `project_check.py`.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from less_assets.errors import ProjectFileError
from less_assets.method import DRAW_VERSION, SKETCH_VERSION
from less_assets.project.keys import BrokenRule, Section, explain, nearest, setting, shown_path
from less_assets.project.yaml_file import KeyPath, MarkedData, Problem, parse_yaml, problems_error, read_yaml

Form = Literal["adamw", "paper", "reference", "marginal", "sgd"]
Strategy = Literal["less", "random", "full", "none", "bm25", "dsir", "rds", "perplexity", "length_matched"]
SubtaskRule = Literal["mean_cosine", "cosine_of_mean"]
Aggregate = Literal["max", "mean", "round_robin"]
BUDGETS = ("fraction", "rows", "tokens")
SEEDED = ("random", "dsir", "length_matched")
"""Strategies that draw: one recipe key for each of their seeds."""
TEXT_SCORED = ("bm25", "dsir")
"""Strategies that score the pool's text."""
EMBEDDING_SCORED = ("rds", "perplexity")
"""Strategies that score what the base model makes of the pool's rows."""
AGGREGATED = ("less", "bm25", "rds")
"""Strategies with a score for each subtask (`rds`: for each target example)."""
MATCHABLE = ("less", "bm25", "rds", "perplexity")
"""Strategies whose selection `length_matched` may imitate: those that rank by a score and draw nothing."""
OPTIONAL_ASSETS = (
    "exact_scores",
    "text_scores",
    "pool_embeddings",
    "target_embeddings",
    "embedding_scores",
    "token_attribution",
    "selection_report",
)
"""Assets that exist only if a recipe needs them; grids of recipes among them have those recipes' partitions only."""
_TOKENIZER_KEYS = ("base", "chat_format", "max_length")
PAPER = "LESS"
MAX_SEED = 2**32 - 1

SomeSection = TypeVar("SomeSection", bound=Section)
Value = TypeVar("Value")

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _checked_name(value: str) -> str:
    if not _NAME.fullmatch(value) or len(value) > 64:
        raise PydanticCustomError(
            "name", "a name has at most 64 of a-z, 0-9, '_', '.', '-' and begins with a letter or digit"
        )
    return value


def _is_url(path: str) -> bool:
    return "://" in path or "::" in path


def _located(path: str, info: ValidationInfo) -> str:
    """An absolute path, relative ones being meant from the project file's folder; URLs stay as they are."""
    if "\0" in path:
        raise PydanticCustomError("path", "a path has no zero bytes")
    if _is_url(path):
        return path
    folder = str((info.context or {}).get("folder", Path.cwd()))
    # The pattern is the user's part only: a folder called `data [old]` is no pattern.
    prefix = glob.escape(folder) if glob.has_magic(path) else folder
    return os.path.normpath(os.path.join(prefix, os.path.expanduser(path)))


def _located_model(base: str, info: ValidationInfo) -> str:
    """A folder as absolute path; Hugging Face ids and `gguf:` references as they are."""
    if base.startswith("gguf:"):
        if not re.fullmatch(r"gguf:[A-Za-z_][\w.]*/[^\0]+\.gguf", base):
            raise PydanticCustomError("gguf", "write gguf:package/file.gguf for a file inside an installed package")
        return base
    folder = _located(base, info)
    return folder if base.startswith((".", "/", "~")) or os.path.isdir(folder) else base


def _size(value: Any) -> Any:
    """Bytes from a number or from text such as "2 GB"."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    if isinstance(value, str):
        raise PydanticCustomError("size", 'must be a size such as "2 GB", "512 MiB" or a number of bytes')
    return value


def _auto_as_none(value: Any) -> Any:
    return None if value == "auto" else value


def _harness(value: Any, info: ValidationInfo) -> Any:
    """A harness task's name, the absolute path of its YAML file, or the task itself; None for no harness task."""
    if value is None:
        return None
    if isinstance(value, str) and value:
        return _located(value, info) if value.endswith((".yaml", ".yml")) else value
    if isinstance(value, dict) and value and _is_json(value):
        return value
    raise PydanticCustomError("harness", "must be a task name, the path of a .yaml file, or a mapping of plain data")


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(key) and _is_json(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return value - value == 0  # neither infinite nor not-a-number
    return value is None or isinstance(value, bool | int)


Name = Annotated[str, AfterValidator(_checked_name)]
Text = Annotated[str, StringConstraints(min_length=1)]
Location = Annotated[Text, AfterValidator(_located)]
ModelReference = Annotated[Text, AfterValidator(_located_model)]
Size = Annotated[int, BeforeValidator(_size)]
OptionalSize = Annotated[int | None, BeforeValidator(_size)]
AutoCount = Annotated[int | None, BeforeValidator(_auto_as_none)]
HarnessTask = Annotated[Any, PlainValidator(_harness)]


class Storage(Section):
    """Where artifacts are kept."""

    root: Location = setting(
        "artifacts",
        "Folder, relative to this file, or fsspec URL (`s3://bucket/prefix`, `gs://…`); credentials belong in the "
        "environment",
        type="path or URL",
        validate_default=True,
    )


class Model(Section):
    """The model whose gradients are taken, and how examples become its input."""

    base: ModelReference = setting(
        ...,
        "Hugging Face id (`owner/name`, optionally `@revision`), folder, or `gguf:package/file.gguf` for a file "
        "inside an installed package",
        type="id or path",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Precision of weights and gradients; `auto`: bfloat16 where the machine is fast at it, else float32"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Where the model runs; `auto`: the best there is")
    device_map: Text | None = setting(
        None, "Spread the base model over several devices, as in transformers (`auto`, `balanced`, …)"
    )
    max_length: int = setting(
        2048, "Longest pool example; longer ones are cut from the right", unit="tokens", source=f"{PAPER} code", ge=2
    )
    chat_format: Literal["template", "tulu"] = setting(
        "template", "`template`: the tokenizer's own chat template; `tulu`: `<|user|>\\n…`, as in LESS"
    )
    quantization: Literal["none", "4bit"] = setting("none", "4-bit base weights by bitsandbytes (CUDA only)")
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model; only for sources you trust")

    def _broken_rules(self) -> Iterator[BrokenRule]:
        if self.device_map is not None and self.device == "cpu":
            yield BrokenRule(("device_map",), "has no meaning with device: cpu", "leave one of the two out")


class Lora(Section):
    """The adapter of warm-up and fine-tuning; its parameters are what gradients are taken of."""

    rank: int = setting(128, "Rank r", source=f"{PAPER} code", ge=1, le=65536)
    alpha: float = setting(
        512.0, "Scale; the adapter's output is multiplied by alpha / rank", source=f"{PAPER} code", gt=0
    )
    dropout: float = setting(
        0.1, "Dropout in training; off while gradients are taken", source=f"{PAPER} code", ge=0, lt=1
    )
    target_modules: list[Text] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        "Names of the linear layers that get an adapter",
        source=f"{PAPER} code",
        min_length=1,
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        yield from _repeated(("target_modules",), self.target_modules)


class Source(Section):
    """One set of files of the pool."""

    name: Name = setting(..., "Name of the source; part of shard keys and of every selected row", type="name")
    path: Location = setting(
        ...,
        "File, folder, pattern (`data/*.jsonl`) or fsspec URL (`hf://datasets/…`): JSON lines, CSV or TSV, also "
        "compressed (`.gz`, `.bz2`, `.xz`, `.zst`), Parquet, or Arrow (also a folder of Hugging Face's `save_to_disk`)",
        type="path or URL",
    )
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"] = setting(
        "auto", "Format of the rows; `auto`: decided row by row from the field names"
    )
    dialect: Literal["auto", "comma", "semicolon", "backslash", "tab", "tab_quoted"] = setting(
        "auto",
        "How CSV and TSV files are written; `auto`: `.csv` as RFC 4180 says (`comma`), `.tsv` without quoting (`tab`); "
        '`backslash`: `\\"` inside quoted fields',
    )
    limit: int | None = setting(None, "Use only the first rows of the source; null: all", unit="rows", ge=1)


class Pool(Section):
    """The instruction data to select from."""

    shard_size: int = setting(
        4096,
        "Rows per shard, the unit that is recomputed when data changes; keep a pool under 100 shards",
        unit="rows",
        ge=1,
    )
    sources: list[Source] = setting(..., "The files, by source", min_length=1)


class Training(Section):
    """How an adapter is trained with AdamW on the loss of assistant tokens."""

    epochs: int = setting(4, "Passes over the data", source=PAPER, ge=1, le=1000)
    learning_rate: float = setting(2e-5, "Highest learning rate", source=PAPER, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "linear", "Learning rate after its warm-up; the paper's text says cosine", source=f"{PAPER} code"
    )
    warmup_ratio: float = setting(
        0.03, "Share of the steps in which the learning rate rises from 0", source=PAPER, ge=0, lt=1
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", source=f"{PAPER} code", ge=0)
    batch_size: int = setting(128, "Examples per optimizer step", unit="examples", source=PAPER, ge=1)
    max_grad_norm: float = setting(
        1.0, "Clip the gradient's norm to this; 0: never", source="transformers' default, which LESS uses", ge=0
    )
    seed: int = setting(0, "Seed of the adapter's start, the order of examples and dropout", ge=0, le=MAX_SEED)
    micro_batch_tokens: int = setting(
        2048,
        "Padded tokens that go through the model at once; bounds memory, not the optimizer step",
        unit="tokens",
        ge=1,
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, a third more time"
    )

    def training_values(self) -> dict[str, Any]:
        """Keyword arguments of `method.training.TrainingSettings`."""
        return self.model_dump(include=set(Training.model_fields))

    def training_settings(self) -> dict[str, Any]:
        """Those of them that can change numbers, for fingerprints."""
        return self.model_dump(include=set(Training.model_fields) - {"gradient_checkpointing"})


class Warmup(Training):
    """Step 1: a short training on a random part of the pool, or checkpoints from elsewhere."""

    fraction: float = setting(0.05, "Share of the pool that is drawn once and then frozen", source=PAPER, gt=0, le=1)
    seed: int = setting(
        3,
        "Seed of the draw, the adapter's start, the order of examples and dropout",
        source=f"{PAPER} code (README)",
        ge=0,
        le=MAX_SEED,
    )
    imported: list[Location] | None = setting(
        None,
        "Checkpoint folders from another training (adapter and optimizer state), in order, instead of a warm-up here",
        alias="import",
        type="list of paths",
        min_length=1,
    )
    mean_learning_rates: list[Annotated[float, Field(gt=0)]] | None = setting(
        None,
        "Mean learning rate of the epoch that ends at each imported checkpoint; null: read from its trainer state",
        type="list of numbers",
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        if self.imported is None:
            if self.mean_learning_rates is not None:
                yield BrokenRule(
                    ("mean_learning_rates",), "belongs to imported checkpoints", "leave it out, or give `import`"
                )
            return
        yield from _repeated(("import",), self.imported)
        for position, path in enumerate(self.imported):
            if _is_url(path):
                yield BrokenRule(("import", position), "is a URL", "copy the checkpoint to a local folder first")
        for key in self.given("fraction", *Training.model_fields):
            yield BrokenRule((key,), "has no meaning with `import`: nothing is trained", "leave one of the two out")
        if self.mean_learning_rates is not None and len(self.mean_learning_rates) != len(self.imported):
            yield BrokenRule(
                ("mean_learning_rates",),
                f"has {len(self.mean_learning_rates)} values for {len(self.imported)} checkpoints",
                "give one for each checkpoint",
            )


class Gradients(Section):
    """Steps 2 and 3: the features of pool and target examples."""

    forms: list[Form] = setting(
        ["adamw", "marginal"],
        "Directions Γ to store, all from one backward pass: `adamw` torch's step, `paper` the printed formula, "
        "`reference` the published code, `marginal` what the example adds to the step, `sgd` the plain gradient",
        min_length=1,
    )
    sketch: Literal["sparse", "rademacher"] = setting(
        "sparse", "Random projection: `sparse` costs the same at any dimension, `rademacher` is the paper's"
    )
    dimension: int = setting(32768, "Dimension k of a feature; the paper has 8192", ge=8, le=2**26)
    storage: Literal["float16", "int8", "int4", "int1"] = setting(
        "int4", "Precision of stored features; more dimensions buy more than more bits. The paper has float16"
    )
    bytes_per_row: OptionalSize = setting(
        None,
        "Instead of `dimension` and `storage`: choose the two that keep scores truest for so many bytes a row, form "
        "and checkpoint (`16 KiB`): 1 bit a dimension, or 8 where `sgd` is among the forms; more dimensions than the "
        "adapter has parameters buy nothing",
        type="size",
        unit="bytes",
        ge=8,
        le=2**23,
    )
    seed: int = setting(0, "Seed of the projection, the same for everything that is compared", ge=0, le=MAX_SEED)
    token_budget: AutoCount = setting(
        None,
        "Padded tokens per batch; `auto`: what fits into memory, resolved once and recorded",
        type="`auto` or number",
        unit="tokens",
        shown="auto",
        ge=1,
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory for long rows, a third more time"
    )
    directions_limit: Size = setting(
        2 * 10**9,
        "Exact target directions held at a time by `rescore: exact`; more passes where they do not fit",
        type="size",
        unit="bytes",
        shown="2 GB",
        ge=0,
    )
    certificate_rows: int = setting(
        64,
        "Random pool rows that the check `sketch_is_faithful` scores exactly, to say how far a selection can be "
        "trusted; 0: no certificate, else at least 8",
        unit="rows",
        ge=0,
    )
    real_step_rows: int = setting(
        16,
        "Random pool rows on which the check `influence_is_real` takes a true optimizer step, to compare what becomes "
        "of the targets' loss with the prediction; 0: none, else at least 3",
        unit="rows",
        ge=0,
    )
    block_rows: int = setting(
        512, "Rows per stored block; a killed run resumes at the last finished one", unit="rows", ge=1
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        yield from _repeated(("forms",), self.forms)
        for key in self.given("dimension", "storage") if self.bytes_per_row is not None else []:
            yield BrokenRule((key,), "is what `bytes_per_row` chooses", "leave one of the two out")
        for key, fewest in (("certificate_rows", 8), ("real_step_rows", 3)):
            if 0 < getattr(self, key) < fewest:
                yield BrokenRule((key,), f"fewer than {fewest} rows say nothing", f"write 0, or {fewest} or more")

    @model_validator(mode="after")
    def _choose_storage(self) -> "Gradients":
        if self.bytes_per_row is not None:
            from less_assets.method.gradients.quantization import choose_storage

            storage, dimension = choose_storage(self.bytes_per_row, self.forms)
            # Resolved once, here: whoever reads the two need not know where they come from.
            object.__setattr__(self, "storage", storage)
            object.__setattr__(self, "dimension", dimension)
        return self


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

    def _broken_rules(self) -> Iterator[BrokenRule]:
        if (self.examples is None) == (self.members is None):
            yield BrokenRule(
                ("members",) if self.members else (),
                "has both `examples` and `members`" if self.members else "has neither `examples` nor `members`",
                "give exactly one of them",
            )
        if self.members:
            yield from _repeated(("members",), self.members)
            if self.evaluation:
                yield BrokenRule(("evaluation",), "a group is judged by its members' evaluations", "leave it out")
        if self.control and not self.evaluation:
            yield BrokenRule(("control",), "a control without evaluation shows nothing", "give it an `evaluation`")


class Recipe(Section):
    """A way to choose a subset, and the model to fine-tune on it."""

    name: Name = setting(
        ...,
        "Name of the recipe; a partition key (`random`, `dsir` and `length_matched`: with `-seed0`, …)",
        type="name",
    )
    strategy: Strategy = setting(
        ...,
        "`less` by influence; `random`; `full` the whole pool; `none` the base model; `bm25` shared words; `dsir` "
        "n-gram importance; `rds` cosine of hidden states (RDS+); `perplexity` of the base model; `length_matched` "
        "random rows as long as others",
    )
    form: Form | None = setting(
        None, "Direction Γ (`less`), one of `gradients.forms`; null: `marginal` if it is there, else the first"
    )
    subtask: SubtaskRule = setting(
        "mean_cosine",
        "Influence on a subtask (`less`): mean of cosines (LESS code) or cosine of the mean gradient (paper)",
    )
    aggregate: Aggregate = setting(
        "round_robin",
        "How subtasks make one ranking (`less`, `bm25`; `rds`: target examples): `max` is LESS's and lets one subtask "
        "take most; `round_robin` takes turns",
    )
    fraction: float | None = setting(
        None, "Budget: share of the pool's distinct examples; the paper has 0.05", gt=0, lt=1
    )
    rows: int | None = setting(None, "Budget: examples", unit="rows", ge=1)
    tokens: int | None = setting(None, "Budget: loss tokens", unit="tokens", ge=1)
    rescore: Literal["none", "exact"] = setting(
        "none", "`exact`: score the candidates around the cut again with unprojected gradients (`less`)"
    )
    candidates: float = setting(4.0, "Candidates to rescore, as a multiple of the budget", ge=1)
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = setting(
        [0],
        "One draw, one recipe key for each seed (`random`, `dsir`, `length_matched`)",
        type="list of numbers",
        min_length=1,
    )
    keep: Literal["mid", "top"] = setting(
        "mid", "Rows to keep (`perplexity`): the middle of the pool's distribution, or the highest"
    )
    match: Name | None = setting(
        None,
        "Recipe whose selected rows' lengths are matched (`length_matched`); null: those of the task's target examples",
        type="name",
    )
    near_duplicates: float | None = setting(
        None,
        "Pass over a row whose gradient has at least this cosine with that of a row selected before it (`less`); null: "
        "keep all",
        gt=0,
        le=1,
    )
    quotas: dict[Name, Annotated[float, Field(gt=0, le=1)]] | None = setting(
        None,
        "Largest share of the budget that a source may have, by name of the source; sources not named have no limit",
        type="mapping of sources to shares",
        min_length=1,
    )
    model: ModelReference | None = setting(
        None, "Fine-tune this model instead of `model.base` (LESS-T)", type="id or path", source=PAPER
    )

    def _broken_rules(self) -> Iterator[BrokenRule]:
        budgets = [key for key in BUDGETS if getattr(self, key) is not None]
        if self.strategy in ("full", "none"):
            for key in budgets:
                yield BrokenRule((key,), f"strategy {self.strategy} has no budget", "leave it out")
        elif len(budgets) != 1:
            said = f"has {len(budgets)} budgets: {', '.join(budgets)}" if budgets else "has no budget"
            yield BrokenRule((budgets[1],) if budgets else (), said, "give exactly one of `fraction`, `rows`, `tokens`")
        read = {"form": ("less",), "subtask": ("less",), "aggregate": AGGREGATED, "rescore": ("less",)}
        read |= {"candidates": ("less",), "near_duplicates": ("less",), "keep": ("perplexity",)}
        read |= {"match": ("length_matched",), "quotas": tuple(set(get_args(Strategy)) - {"full", "none"})}
        for key in self.given(*read):
            if self.strategy not in read[key]:
                yield BrokenRule((key,), f"has no meaning for strategy {self.strategy}", "leave it out")
        if self.strategy == "less" and self.rescore == "none" and self.given("candidates"):
            yield BrokenRule(("candidates",), "has no meaning without `rescore: exact`", "leave it out")
        if self.strategy not in SEEDED and self.given("seeds"):
            yield BrokenRule(("seeds",), f"strategy {self.strategy} draws nothing", "leave it out")
        yield from _repeated(("seeds",), self.seeds)


class Report(Section):
    """What the selection report shows besides the selected rows, and for how many rows it goes down to tokens."""

    token_rows: int = setting(
        100,
        "Selected rows, best first, whose tokens get their shares; costs three passes over a row at each checkpoint. "
        "Rows below the cut and most negative ones always get them",
        unit="rows",
        ge=0,
    )
    context_rows: int = setting(
        50, "Rows shown below the cut, and as many of the most negative ones", unit="rows", ge=0
    )


class Compute(Section):
    """Where the heavy assets run."""

    backend: Literal["local", "ray"] = setting(
        "local", "`local`: this process; `ray`: shards spread over a Ray cluster"
    )
    address: Text = setting(
        "auto",
        "Ray: address of the cluster (`ray://host:10001`); `auto`: the one this machine belongs to; `local`: start one "
        "on this machine",
    )
    gpus_per_worker: float = setting(1.0, "Ray: GPUs of each worker; 0: processors only", ge=0)
    cpus_per_worker: float = setting(1.0, "Ray: processors of each worker, also its number of threads", gt=0)
    workers: int | None = setting(None, "Ray: number of workers; null: as many as fit", ge=1)

    def _broken_rules(self) -> Iterator[BrokenRule]:
        keys = ("address", "gpus_per_worker", "cpus_per_worker", "workers")
        for key in self.given(*keys) if self.backend == "local" else []:
            yield BrokenRule((key,), "has no meaning with backend: local", "leave it out, or say backend: ray")


@dataclass(frozen=True)
class Budget:
    """How much to select: `amount` of `unit`."""

    unit: Literal["fraction", "rows", "tokens"]
    amount: float | int


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with defaults filled in and seeds written out; what one recipe key stands for.

    Attributes:
        key: Partition key.
        name: Name in the file; recipes of several seeds share it.
        strategy: How to choose.
        budget: None for `full` and `none`.
        form: Direction form; None unless the strategy is `less`, as the next.
        subtask: Influence on a subtask.
        aggregate: How subtasks make one ranking; None where there is one score only.
        candidates: Candidates for exact rescoring as a multiple of the budget; None: no rescoring.
        seed: Seed of the draw; None for strategies that draw nothing.
        keep: Rows to keep by perplexity; None for other strategies.
        match: Key of the recipe whose lengths are matched; None: those of the targets, or another strategy.
        near_duplicates: Cosine from which a row is passed over; None: never.
        quotas: Largest share of the budget by source; empty: no limits.
        model: Model to fine-tune instead of the project's.
    """

    key: str
    name: str
    strategy: Strategy
    budget: Budget | None
    form: Form | None
    subtask: SubtaskRule | None
    aggregate: Aggregate | None
    candidates: float | None
    seed: int | None
    keep: Literal["mid", "top"] | None
    match: str | None
    near_duplicates: float | None
    quotas: Mapping[str, float]
    model: str | None


class Project(Section):
    """A project file, checked; paths are absolute or URLs."""

    name: Name = setting(..., "Name of the project", type="name")
    storage: Storage = setting({}, "Where artifacts are kept", validate_default=True)
    model: Model = setting(..., "The model whose gradients are taken, and how examples become its input")
    lora: Lora = setting({}, "The adapter of warm-up and fine-tuning", validate_default=True)
    pool: Pool = setting(..., "The instruction data to select from")
    warmup: Warmup = setting(
        {}, "Step 1: a short training on a random part of the pool, or imported checkpoints", validate_default=True
    )
    gradients: Gradients = setting({}, "Steps 2 and 3: the features of pool and target examples", validate_default=True)
    tasks: list[Task] = setting(..., "What the selected data shall teach", min_length=1)
    recipes: list[Recipe] = setting(..., "Ways to choose a subset", min_length=1)
    finetuning: Training = setting({}, "Step 5: training on a subset", validate_default=True)
    report: Report = setting({}, "How much the selection report explains", validate_default=True)
    compute: Compute = setting({}, "Where the heavy assets run", validate_default=True)

    _path: Path = PrivateAttr(default=Path("project.yaml"))

    @property
    def path(self) -> Path:
        """The project file, absolute."""
        return self._path

    @property
    def folder(self) -> Path:
        """The project file's folder, absolute: where relative paths start."""
        return self._path.parent

    def as_written(self, path: str) -> str:
        """A path relative to the project file's folder, so that it names the same thing after the project moved."""
        return path if _is_url(path) or not os.path.isabs(path) else Path(os.path.relpath(path, self.folder)).as_posix()

    @cached_property
    def checkpoints(self) -> list[str]:
        """Keys of the checkpoint axis: `epoch-1`, … for each epoch, or for each imported checkpoint."""
        imported = self.warmup.imported
        return [f"epoch-{k}" for k in range(1, (len(imported) if imported else self.warmup.epochs) + 1)]

    @property
    def task_names(self) -> list[str]:
        """Keys of the task axis, groups included, in the order of the file."""
        return [task.name for task in self.tasks]

    @cached_property
    def recipe_keys(self) -> dict[str, ResolvedRecipe]:
        """Keys of the recipe axis, in the order of the file, and what they stand for."""
        return {each.key: each for recipe in self.recipes for each in _resolve(recipe, self.gradients.forms)}

    def task(self, name: str) -> Task:
        """The task of a name.

        Raises:
            ProjectFileError: There is none.
        """
        return _by_name("task", {task.name: task for task in self.tasks}, name, self.path)

    def recipe(self, key: str) -> ResolvedRecipe:
        """What a recipe key stands for.

        Raises:
            ProjectFileError: There is none.
        """
        return _by_name("recipe", self.recipe_keys, key, self.path)

    def source(self, name: str) -> Source:
        """The pool source of a name.

        Raises:
            ProjectFileError: There is none.
        """
        return _by_name("source", {source.name: source for source in self.pool.sources}, name, self.path)

    def member_tasks(self, name: str) -> list[Task]:
        """The tasks with examples that a task stands for: a group's members, or the task itself."""
        task = self.task(name)
        return [self.task(member) for member in task.members] if task.members else [task]

    def needs(self, key: str, asset: str) -> bool:
        """Whether a recipe needs one of `OPTIONAL_ASSETS`, for scores of its own or to be explained."""
        recipe = self.recipe(key)
        if asset == "exact_scores":
            return recipe.candidates is not None
        if asset == "token_attribution":
            return self.selects_by_influence(key)
        if asset == "selection_report":
            return recipe.strategy not in ("full", "none")  # these choose nothing
        strategies = {"text_scores": TEXT_SCORED, "target_embeddings": ("rds",)}
        return recipe.strategy in strategies.get(asset, EMBEDDING_SCORED)

    def ranked_by(self, key: str) -> str:
        """Key of the recipe whose scores a recipe reads: its own, or that of the recipe whose lengths it matches."""
        return self.recipe(key).match or key

    def selects_by_influence(self, key: str) -> bool:
        """Whether a recipe ranks the pool by influence itself."""
        return self.recipe(key).strategy == "less"

    def reads_scores(self, key: str) -> bool:
        """Whether a recipe reads influence scores."""
        return self.recipe(self.ranked_by(key)).strategy == "less"

    def matches_targets(self, key: str) -> bool:
        """Whether a recipe draws rows that are as long as the task's target examples."""
        recipe = self.recipe(key)
        return recipe.strategy == "length_matched" and recipe.match is None

    def counts_tokens(self, key: str) -> bool:
        """Whether a recipe's selection depends on the lengths of rows in tokens of the base model."""
        recipe = self.recipe(key)
        return recipe.strategy == "length_matched" or (recipe.budget is not None and recipe.budget.unit == "tokens")

    # What follows names the settings that can change numbers, as plain data for fingerprints. Left out is what cannot:
    # where things are kept and run, batch sizes that only change rounding, and paths, whose content is hashed instead.

    def model_settings(self) -> dict[str, Any]:
        """Settings of the base model and of how examples are encoded for it."""
        return self.model.model_dump(exclude={"device", "device_map"}) | {"base": self.as_written(self.model.base)}

    def source_settings(self, name: str) -> dict[str, Any]:
        """Settings of a pool source; which rows it has is the ledger's matter."""
        return {"format": self.source(name).format}

    def sample_settings(self) -> dict[str, Any]:
        """Settings of the warm-up draw; empty if checkpoints are imported."""
        return {} if self.warmup.imported else self.warmup.model_dump(include={"fraction", "seed"})

    def warmup_settings(self) -> dict[str, Any]:
        """Settings of the warm-up training and its adapter, or of the import."""
        if self.warmup.imported:
            paths = [self.as_written(path) for path in self.warmup.imported]
            return {"import": paths, "mean_learning_rates": self.warmup.mean_learning_rates}
        return {"lora": self.lora.model_dump(), "warmup": self.warmup.training_settings()}

    def gradient_settings(self) -> dict[str, Any]:
        """Settings of features, except the token budget, which is resolved and recorded with them, and of checks."""
        left_out = {"token_budget", "gradient_checkpointing", "directions_limit", "certificate_rows", "real_step_rows"}
        left_out |= {"bytes_per_row"}  # what it chooses is there
        settings = self.gradients.model_dump(exclude=left_out)
        return settings | {"forms": sorted(self.gradients.forms), "sketch_version": SKETCH_VERSION}

    def task_settings(self, name: str) -> dict[str, Any]:
        """Settings of a task; files are hashed by whoever reads them."""
        task = self.task(name)
        if task.members:
            return {"members": {member: self.task_settings(member) for member in task.members}}
        examples, evaluation = task.examples, task.evaluation
        assert examples is not None
        settings: dict[str, Any] = {
            "examples": {"format": examples.format, "max_length": examples.max_length or self.model.max_length},
            "evaluation": None,
        }
        if evaluation is not None:
            stated = evaluation.model_dump(exclude={"path", "held_out", "token_budget", "grading"})
            if evaluation.format == "bbh":
                stated["grading"] = evaluation.grading
            elif evaluation.held_out:
                stated["grading"] = "exact_match without markdown"
            if isinstance(evaluation.harness, str):
                stated["harness"] = self.as_written(evaluation.harness)
            settings["evaluation"] = stated | {"max_length": evaluation.max_length or self.model.max_length}
        return settings

    def recipe_settings(self, key: str) -> dict[str, Any]:
        """Settings of a selection: equal for recipes that differ in name or in the model to fine-tune only."""
        recipe = self.recipe(key)
        settings = asdict(recipe)
        if recipe.match:
            settings["match"] = self.recipe_settings(recipe.match)
        if recipe.seed is not None:
            settings["draw_version"] = DRAW_VERSION
        return {name: settings[name] for name in settings if name not in ("key", "name", "model")}

    def tokenizer_settings(self) -> dict[str, Any]:
        """Settings that decide how long a row is in tokens."""
        return {name: value for name, value in self.model_settings().items() if name in _TOKENIZER_KEYS}

    def report_settings(self) -> dict[str, Any]:
        """Settings of what a report explains."""
        return self.report.model_dump()

    def finetuning_settings(self, key: str | None = None) -> dict[str, Any]:
        """Settings of a recipe's fine-tuning; without a key, those that all recipes share.

        The base model itself (`strategy: none`) is not trained: its settings do not change with the training's.
        """
        recipe = self.recipe(key) if key else None
        model = self.model_settings()
        if recipe and recipe.model:
            model["base"] = self.as_written(recipe.model)
        if recipe and recipe.strategy == "none":
            return {"model": model, "training": None}
        return {"model": model, "lora": self.lora.model_dump(), "training": self.finetuning.training_settings()}


def load_project(path: str | os.PathLike[str]) -> Project:
    """Read and check a project file.

    Args:
        path: YAML file; relative paths inside are meant from its folder.

    Returns:
        The project.

    Raises:
        ProjectFileError: All that is wrong with it, each problem with line, key and what to do.
    """
    marked = read_yaml(Path(path).expanduser(), os.fspath(path))
    return _build(marked, Path(os.path.abspath(Path(path).expanduser())))


def parse_project(content: bytes, path: str | os.PathLike[str] = "project.yaml") -> Project:
    """Check the bytes of a project file that need not exist; see `load_project`."""
    return _build(parse_yaml(content, os.fspath(path)), Path(os.path.abspath(path)))


def _build(marked: MarkedData, path: Path) -> Project:
    context = {"folder": path.parent}
    project: Project | None = None
    problems = list(marked.problems)
    if not isinstance(marked.data, dict):
        raise ProjectFileError(
            "A project file is a mapping of keys to values.",
            where=marked.where(()),
            fix="start from projects/template.yaml, which shows every key",
        )
    try:
        project = Project.model_validate(marked.data, context=context)
    except ValidationError as error:
        problems += explain(error, marked, Project)
    problems += [
        Problem(marked.where(rule.path), f"{shown_path(rule.path)}: {rule.what}", rule.fix)
        for rule in _rules_between_sections(marked.data, context)
    ]
    if problems or project is None:
        raise problems_error(marked.file, sorted(set(problems), key=_line_number))
    project._path = path
    return project


def _line_number(problem: Problem) -> tuple[int, str]:
    return int(problem.where.rpartition(":")[2]), problem.what


def _rules_between_sections(data: Mapping[str, Any], context: dict[str, Any]) -> Iterator[BrokenRule]:
    """Rules that concern several sections, checked on all parts that are valid by themselves."""
    pool = data.get("pool")
    sources = _valid_parts(Source, pool.get("sources") if isinstance(pool, dict) else None, context)
    tasks = _valid_parts(Task, data.get("tasks"), context)
    recipes = _valid_parts(Recipe, data.get("recipes"), context)
    gradients = _valid_parts(Gradients, [data.get("gradients", {})], context)
    yield from _taken(("pool", "sources"), [(index, source.name) for index, source in sources.items()], "source")
    yield from _taken(("tasks",), [(index, task.name) for index, task in tasks.items()], "task")
    yield from _taken(("recipes",), [(index, recipe.name) for index, recipe in recipes.items()], "recipe")
    distinct = {recipe.name: index for index, recipe in reversed(recipes.items())}.values()
    keys = [(index, each.key) for index in sorted(distinct) for each in _resolve(recipes[index], ["adamw"])]
    yield from _taken(("recipes",), keys, "recipe key")
    all_names = _stated_names(data.get("tasks"))
    groups = {task.name for task in tasks.values() if task.members}
    for index, task in tasks.items():
        for position, member in enumerate(task.members or []):
            path: KeyPath = ("tasks", index, "members", position)
            if member not in all_names:
                yield BrokenRule(path, f"there is no task {member!r}", nearest(member, sorted(all_names - {task.name})))
            elif member in groups:
                yield BrokenRule(path, f"{member!r} is a group itself", "name its members instead: groups do not nest")
    for index, recipe in recipes.items() if gradients else []:
        if recipe.form and recipe.form not in gradients[0].forms:
            yield BrokenRule(
                ("recipes", index, "form"),
                f"gradients.forms does not list {recipe.form!r}",
                f"add it there, or choose one of {', '.join(gradients[0].forms)}",
            )
    stated = _stated_names(pool.get("sources") if isinstance(pool, dict) else None)
    yield from _names_in_recipes(recipes, stated, _stated_names(data.get("recipes")))


def _stated_names(parts: Any) -> set[str]:
    """Names of the parts of a list, valid or not."""
    listed = parts if isinstance(parts, list) else []
    return {part["name"] for part in listed if isinstance(part, dict) and isinstance(part.get("name"), str)}


def _names_in_recipes(recipes: Mapping[int, Recipe], sources: set[str], names: set[str]) -> Iterator[BrokenRule]:
    """Recipes name sources and other recipes: they must exist, and be of a kind that makes sense there."""
    strategies = {recipe.name: recipe.strategy for recipe in recipes.values()}
    matchable = sorted(name for name, strategy in strategies.items() if strategy in MATCHABLE)
    for index, recipe in recipes.items():
        for name in sorted({*(recipe.quotas or {})} - sources):
            path: KeyPath = ("recipes", index, "quotas", name)
            yield BrokenRule(path, f"there is no source {name!r}", nearest(name, sorted(sources)))
        path = ("recipes", index, "match")
        if recipe.match is not None and recipe.match not in names:
            yield BrokenRule(path, f"there is no recipe {recipe.match!r}", nearest(recipe.match, matchable))
        elif recipe.match in strategies and recipe.match not in matchable:
            what = f"{recipe.match!r} has strategy {strategies[str(recipe.match)]}"
            yield BrokenRule(path, what, f"name a recipe with strategy {', '.join(MATCHABLE)}")


def _valid_parts(kind: type[SomeSection], parts: Any, context: dict[str, Any]) -> dict[int, SomeSection]:
    valid = {}
    for index, part in enumerate(parts if isinstance(parts, list) else []):
        try:
            valid[index] = kind.model_validate(part, context=context)
        except ValidationError:
            continue  # told already
    return valid


def _taken(path: KeyPath, names: list[tuple[int, str]], what: str) -> Iterator[BrokenRule]:
    first: dict[str, int] = {}
    for index, name in names:
        if first.setdefault(name, index) != index:
            yield BrokenRule((*path, index, "name"), f"the {what} {name!r} exists already", "choose another name")


def _repeated(path: KeyPath, values: list[Any]) -> Iterator[BrokenRule]:
    for value, count in Counter(values).items():
        if count > 1:
            yield BrokenRule(path, f"{value!r} is listed {count} times", "list it once")


def _resolve(recipe: Recipe, forms: list[Form]) -> Iterator[ResolvedRecipe]:
    less = recipe.strategy == "less"
    unit = next((key for key in BUDGETS if getattr(recipe, key) is not None), None)
    for seed in recipe.seeds if recipe.strategy in SEEDED else [None]:
        yield ResolvedRecipe(
            key=recipe.name if seed is None else f"{recipe.name}-seed{seed}",
            name=recipe.name,
            strategy=recipe.strategy,
            budget=Budget(unit, getattr(recipe, unit)) if unit else None,  # type: ignore[arg-type]
            form=(recipe.form or ("marginal" if "marginal" in forms else forms[0])) if less else None,
            subtask=recipe.subtask if less else None,
            aggregate=recipe.aggregate if recipe.strategy in AGGREGATED else None,
            candidates=recipe.candidates if recipe.rescore == "exact" else None,
            seed=seed,
            keep=recipe.keep if recipe.strategy == "perplexity" else None,
            match=recipe.match,
            near_duplicates=recipe.near_duplicates,
            quotas=recipe.quotas or {},
            model=recipe.model,
        )


def _by_name(what: str, known: Mapping[str, Value], name: str, path: Path) -> Value:
    if name not in known:
        raise ProjectFileError(f"There is no {what} {name!r}.", where=str(path), fix=nearest(name, list(known)))
    return known[name]
