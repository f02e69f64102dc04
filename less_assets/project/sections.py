"""The sections of a project file: what every key means, what it may be, and the rules between keys of one section.

Belongs here: one class a section. Rules between sections are `rules.py`, what holds for any key `keys.py`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, JsonValue

from less_assets.method import DEFAULT_DATE
from less_assets.project.keys import BrokenRule, Section, repeated, setting
from less_assets.project.strategies import STRATEGIES, STRATEGY_KEYS, readers
from less_assets.project.values import (
    AutoCount,
    Candidates,
    Day,
    Location,
    ModelReference,
    Name,
    OptionalSize,
    Size,
    Text,
    TrackingUri,
    is_url,
)

Form = Literal["adamw", "paper", "reference", "marginal", "sgd"]
SubtaskRule = Literal["mean_cosine", "cosine_of_mean"]
Aggregate = Literal["max", "mean", "round_robin", "match"]
Perplexities = Literal["mid", "top"]
FeatureStorage = Literal["float16", "int8", "int4", "int1"]
if TYPE_CHECKING:
    StrategyName = str
    PrefilterName = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]
    PrefilterName = Literal[tuple(name for name, strategy in STRATEGIES.items() if strategy.prefilters)]
Unit = Literal["fraction", "rows", "tokens"]
BUDGETS: tuple[Unit, ...] = get_args(Unit)
PAPER = "LESS"
OURS = "ours: few steps, see docs/method.md"
DRAWN = ", ".join(f"`{name}`" for name, strategy in STRATEGIES.items() if strategy.draws)
MAX_SEED = 2**32 - 1


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
    date: Day = setting(
        DEFAULT_DATE,
        "The day that a chat template is told which asks for it (Llama 3, gpt-oss); it stays, so that token ids do",
        type="date",
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
        yield from repeated(("target_modules",), self.target_modules)


class Source(Section):
    """One set of files of the pool."""

    name: Name = setting(..., "Name of the source; part of shard keys and of every selected row", type="name")
    path: Location = setting(
        ...,
        "File, folder, pattern (`data/*.jsonl`) or fsspec URL (`hf://datasets/…`): JSON lines, a JSON array "
        "(`.json`), CSV or TSV, also compressed (`.gz`, `.bz2`, `.xz`, `.zst`), Parquet, or Arrow (also a folder of "
        "Hugging Face's `save_to_disk`)",
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

    def training_settings(self) -> dict[str, JsonValue]:
        """Those of them that can change numbers, for fingerprints."""
        return self.model_dump(include=set(Training.model_fields) - {"gradient_checkpointing"})


class TargetTuning(Training):
    """How `strategy: target_tuned` trains the base model on a task's target examples, and on nothing else."""

    epochs: int = setting(4, "Passes over the target examples", source=OURS, ge=1, le=1000)
    learning_rate: float = setting(1e-4, "Highest learning rate", source=OURS, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = setting(
        "constant", "Learning rate after its warm-up", source=OURS
    )
    warmup_ratio: float = setting(
        0.0,
        "Share of the steps in which the learning rate rises from 0: of few steps the first shall count",
        source=OURS,
        ge=0,
        lt=1,
    )
    batch_size: int = setting(32, "Examples per optimizer step", unit="examples", source=OURS, ge=1)


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
        yield from repeated(("import",), self.imported)
        for position, path in enumerate(self.imported):
            if is_url(path):
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
    dimension: int = setting(
        lambda above: _chosen_storage(above)[1],
        "Dimension k of a feature; the paper has 8192",
        shown="32768",
        ge=8,
        le=2**26,
    )
    storage: FeatureStorage = setting(
        lambda above: _chosen_storage(above)[0],
        "Precision of stored features; more dimensions buy more than more bits. The paper has float16",
        shown="int4",
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
        "Pool rows, most of them around the cut, that the check `sketch_is_faithful` scores exactly, to say how far a "
        "selection can be "
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
        yield from repeated(("forms",), self.forms)
        for key in self.given("dimension", "storage") if self.bytes_per_row is not None else []:
            yield BrokenRule((key,), "is what `bytes_per_row` chooses", "leave one of the two out")
        for key, fewest in (("certificate_rows", 8), ("real_step_rows", 3)):
            if 0 < getattr(self, key) < fewest:
                yield BrokenRule((key,), f"fewer than {fewest} rows say nothing", f"write 0, or {fewest} or more")


def _chosen_storage(above: dict[str, Any]) -> tuple[str, int]:
    """Storage and dimension where the file does not state them, from the keys above them that are valid."""
    if above.get("bytes_per_row") is None or "forms" not in above:
        return "int4", 32768
    from less_assets.method.gradients.quantization import choose_storage

    return choose_storage(above["bytes_per_row"], above["forms"])


class Prefilter(Section):
    """Gradients are taken for the best part of the pool only, as a cheaper strategy ranks it for each task."""

    strategy: PrefilterName = setting(..., "How the pool is ranked, as a recipe of this strategy ranks it by default")
    keep: float = setting(
        0.2,
        "Share of the pool's distinct examples that is kept for each task; a row is kept if any task keeps it",
        gt=0,
        lt=1,
    )
    sample_rows: int = setting(
        512,
        "About so many random rows of those left out get gradients, too, to estimate how much of each selection is "
        "lost; they are never selected. 0: none, and no estimate",
        unit="rows",
        ge=0,
    )


class Mix(Section):
    """A share of a recipe's budget that is drawn at random instead of chosen: some of the rest stays in the subset."""

    share: float = setting(..., "Share of the budget that is drawn at random", gt=0, lt=1)
    sources: list[Name] | None = setting(
        None, "Sources to draw from; null: the whole pool", type="list of sources", min_length=1
    )
    seed: int = setting(0, "Seed of the draw", ge=0, le=MAX_SEED)

    def _broken_rules(self) -> Iterator[BrokenRule]:
        yield from repeated(("sources",), self.sources or [])


class Recipe(Section):
    """A way to choose a subset, and the model to fine-tune on it."""

    name: Name = setting(
        ...,
        f"Name of the recipe; a partition key ({DRAWN}: with `-seed0`, …)",
        type="name",
    )
    strategy: StrategyName = setting(
        ...,
        "What to choose; " + "; ".join(f"`{strategy.name}`: {strategy.chooses}" for strategy in STRATEGIES.values()),
    )
    form: Form | None = setting(
        None,
        f"Direction Γ ({readers('form')}), one of `gradients.forms`; null: `marginal` if listed, else the first",
    )
    subtask: SubtaskRule = setting(
        "mean_cosine",
        f"Influence on a subtask ({readers('subtask')}): mean of cosines (LESS code) or cosine of the mean gradient "
        "(paper)",
    )
    aggregate: Aggregate = setting(
        "round_robin",
        f"How subtasks (`rds`: target examples) make one ranking ({readers('aggregate')}): `max` is LESS's and lets "
        "one subtask take most; `round_robin` takes turns; `match` (`less`): greedily the row that brings the sum of "
        "the selected directions nearest to the targets', whatever is covered already",
    )
    precondition: Literal["none", "pool"] = setting(
        "none",
        "`pool`: multiply target directions by the regularised inverse covariance of the pool's directions, so that "
        f"what all rows share counts little ({readers('precondition')})",
    )
    damping: float = setting(
        1.0,
        "With `precondition`: what is added to the covariance, as a multiple of its mean eigenvalue; less of it counts "
        "rare directions more",
        gt=0,
    )
    scores: Location | None = setting(
        None,
        f"File of scores, higher is better ({readers('scores')}): Parquet, JSON lines or array, CSV or TSV with "
        "`score` and `example_id`, or `source` and `row` (counted from 0 within the source); with a column `task`, "
        "those of each task",
        type="path or URL",
    )
    fraction: float | None = setting(
        None, "Budget: share of the pool's distinct examples; the paper has 0.05", gt=0, lt=1
    )
    rows: int | None = setting(None, "Budget: examples", unit="rows", ge=1)
    tokens: int | None = setting(None, "Budget: loss tokens", unit="tokens", ge=1)
    rescore: Literal["none", "exact"] = setting(
        "none", f"`exact`: score the candidates around the cut again with unprojected gradients ({readers('rescore')})"
    )
    candidates: Candidates = setting(
        4.0,
        "With `rescore`: candidates to rescore, as a multiple of the budget. `tournament`: recipes to choose among; "
        "one with strategy `random` is added if there is none",
        type="number ≥ 1, or list of names",
    )
    pilot: float = setting(
        0.25,
        f"Share of the budget that each candidate selects for its trial ({readers('pilot')})",
        gt=0,
        le=1,
    )
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = setting(
        [0],
        f"One draw, one recipe key for each seed ({DRAWN}). `tournament`: each trial is trained, and drawn, with each "
        "of at least two seeds, `[0, 1]` unless the file says otherwise",
        type="list of numbers",
        min_length=1,
    )
    keep: Perplexities = setting(
        "mid", f"Rows to keep ({readers('keep')}): the middle of the pool's distribution, or the highest"
    )
    match: Name | None = setting(
        None,
        f"Recipe whose selected rows' lengths are matched ({readers('match')}); null: those of the task's target "
        "examples",
        type="name",
    )
    near_duplicates: float | None = setting(
        None,
        "Pass over a row whose gradient has at least this cosine with that of a row selected before it "
        f"({readers('near_duplicates')}); null: keep all",
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
    mix: Mix | None = setting(None, "A share of the budget that is drawn at random instead of chosen")

    def _broken_rules(self) -> Iterator[BrokenRule]:
        budgets = [unit for unit in BUDGETS if getattr(self, unit) is not None]
        strategy = STRATEGIES[self.strategy]
        if not strategy.has_budget:
            for unit in budgets:
                yield BrokenRule((unit,), f"strategy {self.strategy} has no budget", "leave it out")
        elif len(budgets) != 1:
            said = f"has {len(budgets)} budgets: {', '.join(budgets)}" if budgets else "has no budget"
            yield BrokenRule((budgets[1],) if budgets else (), said, "give exactly one of `fraction`, `rows`, `tokens`")
        for key in self.given(*STRATEGY_KEYS):
            if not strategy.reads(key):
                draws_nothing = f"strategy {self.strategy} draws nothing"
                said = draws_nothing if key == "seeds" else f"has no meaning for strategy {self.strategy}"
                yield BrokenRule((key,), said, "leave it out")
        if strategy.reads("rescore") and self.given("candidates"):
            if self.rescore == "none":
                yield BrokenRule(("candidates",), "has no meaning without `rescore: exact`", "leave it out")
            elif isinstance(self.candidates, list):
                yield BrokenRule(("candidates",), "is a list of recipes", "write a multiple of the budget, such as 4")
        if strategy.reads("scores") and self.scores is None:
            yield BrokenRule((), "has no file of scores", "give `scores`")
        if self.precondition == "none" and self.given("damping") and strategy.reads("damping"):
            yield BrokenRule(("damping",), "has no meaning without `precondition: pool`", "leave it out")
        if self.precondition == "pool" and self.rescore == "exact":
            what = "compares exact gradients with the targets as they are"
            yield BrokenRule(("rescore",), what, "leave one of `rescore` and `precondition` out")
        yield from self._matching_rules()
        if strategy.holds_tournament:
            yield from self._tournament_rules()
        elif self.mix and not strategy.has_budget:
            yield BrokenRule(("mix",), f"strategy {self.strategy} has no budget", "leave it out")
        yield from repeated(("seeds",), self.seeds)

    def _tournament_rules(self) -> Iterator[BrokenRule]:
        if isinstance(self.candidates, float):
            path = ("candidates",) if self.given("candidates") else ()
            yield BrokenRule(path, "has no list of candidates", "give `candidates`: names of recipes to choose among")
        else:
            yield from repeated(("candidates",), self.candidates)
        if self.given("seeds") and len(set(self.seeds)) < 2:
            yield BrokenRule(("seeds",), "one seed cannot tell luck from merit", "give at least two, such as [0, 1]")
        if self.mix:
            yield BrokenRule(("mix",), "is the candidates' own matter", "give it to the recipes that are candidates")

    def _matching_rules(self) -> Iterator[BrokenRule]:
        if self.aggregate != "match":
            return
        if self.strategy != "less":
            yield BrokenRule(("aggregate",), "`match` needs gradients: strategy less", "choose another aggregate")
        if self.precondition == "pool":
            what = "compares directions as they are"
            yield BrokenRule(("aggregate",), f"`match` {what}", "leave one of `match` and `precondition` out")
        for key in self.given("rescore", "near_duplicates"):
            if getattr(self, key) not in ("none", None):
                what = "has no meaning with `aggregate: match`, which looks at the rows selected before by itself"
                yield BrokenRule((key,), what, "leave it out")


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


class Tracking(Section):
    """Where runs are tracked besides Dagster; nothing that is computed depends on it."""

    mlflow: TrackingUri | None = setting(
        None,
        "MLflow server (`http://host:5000`) or database (`sqlite:///mlflow.db`, relative to this file) that gets the "
        "settings, losses and results of each model; needs `less-assets[mlflow]`; null: none",
        type="URI",
    )


class Compute(Section):
    """Where the heavy assets run."""

    backend: Literal["local", "ray"] = setting(
        "local", "`local`: this process; `ray`: shards and tasks spread over a Ray cluster"
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
