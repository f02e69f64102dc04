"""How much work is missing: tokens, model loads and bytes of the artifacts that a run would make.

Belongs here: what each asset's work grows with, from the project file, a sample of its data and what is stored already.
How fast a machine does it says `rates.py`; how it is printed, `cli.py`.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from less_assets.compute.models import ModelLoader
from less_assets.compute.speeds import MODEL_LOAD, Rates, rate_name
from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage, split
from less_assets.lineage.pool_files import Shard, data_path
from less_assets.project.project import Project
from less_assets.project.sections import Task
from less_assets.reading.certificates import CERTIFICATE, REAL_STEPS, certified_rules

RUN_SECONDS = 0.25
"""Starting and recording one Dagster run in this process (the demo: 0.2 to 0.3 s, two cores, local disk)."""
ARTIFACT_SECONDS = 0.1
"""Planning, sealing and recording one artifact (the demo: 0.1 s where nothing is computed)."""
ASSUMED = {"instruction_pool": 2e-4, "selected_subset": 2e-5}
"""Seconds a row where no run has measured it: of one two-core machine, and small beside all work on tokens."""
SAMPLE_ROWS = 32
SAMPLE_PLACES = 4
TOKEN_ASSETS = (
    *("warmup_checkpoints", "train_gradients", "target_gradients", "exact_scores", "finetuned_model"),
    *("pool_embeddings", "target_embeddings", "token_attribution"),
)
"""Assets whose work is counted in tokens."""
_NOT_THERE = (MissingArtifactError, StaleArtifactError, CorruptArtifactError)

Partition = str | None


@dataclass(frozen=True)
class Amount:
    """Work of some artifacts of an asset.

    Attributes:
        runs: Dagster runs.
        artifacts: Events that are recorded, equal work included.
        units: Rate name → units of work, as `Computed.units` counts them.
        tokens: Tokens that go through the model.
        loads: Times the base model is loaded.
        bytes: Written to the store; 0 for assets that are small.
    """

    runs: int = 0
    artifacts: int = 0
    units: Mapping[str, float] = field(default_factory=dict)
    tokens: float = 0
    loads: int = 0
    bytes: float = 0

    def seconds(self, rates: Rates) -> float | None:
        """Time of all of it; None if the speed of a part is not known."""
        total = self.runs * RUN_SECONDS + self.artifacts * ARTIFACT_SECONDS
        for name, units in {**self.units, MODEL_LOAD: self.loads}.items():
            rate = rates.get(name)
            seconds = rate.per_unit if rate else ASSUMED.get(name)
            if units and seconds is None:
                return None
            total += units * (seconds or 0)
        return total


@dataclass(frozen=True)
class SourceSample:
    """What a sample of a source says about its rows.

    Attributes:
        usable: Share of rows that are not quarantined.
        tokens: Mean tokens of a usable row, cut at `model.max_length`.
        loss_tokens: Mean tokens with loss.
        stored_bytes: Mean bytes of a row in the pool's Parquet files.
        examples: The sampled rows, encoded.
    """

    usable: float
    tokens: float
    loss_tokens: float
    stored_bytes: float
    examples: Sequence[Any]


def sample_source(project: Project, shards: Sequence[Shard], tokenizer: Any) -> SourceSample:
    """Read and encode a few rows from several places of a source."""
    import polars as pl

    from less_assets.method.data.chat import encode_messages
    from less_assets.method.data.examples import pool_table, read_rows

    source = project.source(shards[0].source)
    places = [shards[len(shards) * place // SAMPLE_PLACES] for place in range(min(SAMPLE_PLACES, len(shards)))]
    tables = [pool_table([])]
    for shard in places:
        first = shard.segments[0]
        rows = min(first.rows, -(-SAMPLE_ROWS // len(places)))
        file = data_path(project, first.path)
        tables += read_rows(file, source.name, source.format, first.first_row, rows, begins=first.begins)
    table = pl.concat(tables)
    good = table.filter(pl.col("status") == "ok")
    model = project.model
    encoded = [
        encode_messages(name, messages, tokenizer, chat_format=model.chat_format, max_length=model.max_length)
        for name, messages in good.select("example_id", "messages").iter_rows()
    ]
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    rows = max(1, len(encoded))
    return SourceSample(
        usable=good.height / max(1, table.height),
        tokens=sum(len(example.input_ids) for example in encoded) / rows,
        loss_tokens=sum(example.loss_tokens for example in encoded) / rows,
        stored_bytes=len(buffer.getvalue()) / max(1, table.height),
        examples=encoded,
    )


class Workload:
    """The work of a project's missing artifacts.

    Args:
        lineage: The plans and what is stored.
        models: Gives the tokenizer, when tokens have to be counted, and the adapter's size.
    """

    def __init__(self, lineage: Lineage, models: ModelLoader) -> None:
        self.lineage, self.project, self._models = lineage, lineage.project, models

    def amount(self, asset: str, due: Sequence[Partition], runs: int) -> Amount:
        """Work of the due partitions of an asset.

        Args:
            asset: Name of the asset.
            due: Partitions that are missing, stale, or wait for something that is.
            runs: In how many Dagster runs they are made.
        """
        new = [partition for partition in due if not self._exists(asset, partition)]
        found = _AMOUNTS[asset](self, new) if asset in _AMOUNTS and new else Amount()
        return replace(found, runs=runs, artifacts=len(due))

    def _exists(self, asset: str, partition: Partition) -> bool:
        """Whether the artifact is stored already and only has to be put in force again."""
        try:
            plan = self.lineage.plan(asset, partition)
            return self.lineage.store.artifact(plan.folder, plan.fingerprint).exists()
        except _NOT_THERE:
            return False

    @cached_property
    def _shards(self) -> dict[str, list[Shard]]:
        sources: dict[str, list[Shard]] = {}
        for shard in self.lineage.pool_files.shards:
            sources.setdefault(shard.source, []).append(shard)
        return sources

    @cached_property
    def samples(self) -> dict[str, SourceSample]:
        """A sample of each source of the pool."""
        return {
            source: sample_source(self.project, shards, self._models.tokenizer())
            for source, shards in self._shards.items()
        }

    def rows(self, shards: Iterable[Shard]) -> float:
        """Usable rows of some shards, estimated from the samples."""
        return sum(shard.rows * self.samples[shard.source].usable for shard in shards)

    def tokens(self, shards: Iterable[Shard]) -> float:
        """Tokens of some shards' usable rows, estimated from the samples."""
        samples = self.samples
        return sum(shard.rows * samples[shard.source].usable * samples[shard.source].tokens for shard in shards)

    @cached_property
    def pool_rows(self) -> float:
        """Usable rows of the pool."""
        return self._known("pool_index", None, "usable") or self.rows(self.lineage.pool_files.shards)

    @cached_property
    def row_tokens(self) -> float:
        """Mean tokens of a usable row of the pool."""
        return self.tokens(self.lineage.pool_files.shards) / max(1.0, self.rows(self.lineage.pool_files.shards))

    def _known(self, asset: str, partition: Partition, figure: str) -> Any:
        """A figure of a fresh artifact, or None."""
        try:
            return self.lineage.summary(asset, partition)[figure]
        except (*_NOT_THERE, KeyError):
            return None

    def training_bytes(self, trainings: int) -> float:
        """Adapter and two moments of trained models, float32."""
        return 12.0 * self._models.adapter_parameters() * trainings if trainings else 0.0

    def targets(self, task: str) -> list[Any]:
        """A task's target examples, encoded; read from its files."""
        from less_assets.method.data.chat import encode_target
        from less_assets.method.data.targets import read_targets

        model, found = self.project.model, []
        for member in self.project.member_tasks(task):
            assert member.examples is not None
            longest = member.examples.max_length or model.max_length
            found += [
                encode_target(example, self._models.tokenizer(), chat_format=model.chat_format, max_length=longest)
                for example in read_targets(member.examples.format, member.examples.path)
            ]
        return found

    @cached_property
    def _targets(self) -> dict[str, tuple[int, int, int]]:
        """Task → target examples, their tokens, subtasks."""
        found = {}
        for task in self.project.task_names:
            encoded = self.targets(task)
            found[task] = (len(encoded), sum(len(each.input_ids) for each in encoded), len(self._subtasks(task)))
        return found

    def _subtasks(self, task: str) -> set[tuple[str, str]]:
        from less_assets.method.data.targets import read_targets

        return {
            (member.name, example.subtask)
            for member in self.project.member_tasks(task)
            if member.examples
            for example in read_targets(member.examples.format, member.examples.path)
        }

    def selected_rows(self, recipe_key: str, task: str) -> float:
        """Rows of a recipe's subset."""
        recipe = self.project.recipe(recipe_key)
        known = self._known("selected_subset", f"{recipe_key}|{task}", "rows")
        if known is not None or recipe.strategy == "none":
            return float(known or 0)
        unique = self._known("pool_index", None, "unique") or self.pool_rows
        if recipe.budget is None:
            return float(unique)
        if recipe.budget.unit == "tokens":
            samples = list(self.samples.values())
            loss_tokens = sum(each.loss_tokens for each in samples) / len(samples)
            return float(min(unique, recipe.budget.amount / max(1.0, loss_tokens)))
        return float(unique * recipe.budget.amount if recipe.budget.unit == "fraction" else recipe.budget.amount)


def _base_model(work: Workload, _: Sequence[Partition]) -> Amount:
    return Amount(units={"base_model": 1})


def _instruction_pool(work: Workload, due: Sequence[Partition]) -> Amount:
    shards = [work.lineage.pool_files.shard(str(key)) for key in due]
    stored = sum(shard.rows * work.samples[shard.source].stored_bytes for shard in shards)
    return Amount(units={"instruction_pool": sum(shard.rows for shard in shards)}, bytes=stored)


def _warmup_checkpoints(work: Workload, due: Sequence[Partition]) -> Amount:
    if work.project.warmup.imported:
        return Amount(loads=len(due), bytes=work.training_bytes(len(due)))
    # A killed training goes on after its last whole epoch; an epoch that is due is trained once.
    rows = work._known("warmup_sample", None, "rows") or work.project.warmup.fraction * work.pool_rows
    tokens = rows * work.row_tokens * len(due)
    return Amount(
        units={"warmup_checkpoints": tokens}, tokens=tokens, loads=len(due), bytes=work.training_bytes(len(due))
    )


def _train_gradients(work: Workload, due: Sequence[Partition]) -> Amount:
    from less_assets.method.gradients.quantization import bytes_per_row

    settings = work.project.gradients
    shards = [work.lineage.pool_files.shard(split(key)[1]) for key in due]
    row = len(settings.forms) * (bytes_per_row(settings.storage, settings.dimension) + 8) + 9
    stored = sum(_stored_rows(shard.rows, settings.block_rows) * row for shard in shards)
    tokens = work.tokens(shards)
    loads = len({split(key)[0] for key in due})
    # Ray's workers share the shards; a speed is one worker's.
    units = tokens / (work.project.compute.workers or 1)
    return Amount(units={"train_gradients": units}, tokens=tokens, loads=loads, bytes=stored)


def _stored_rows(rows: int, block_rows: int) -> int:
    """Rows of a shard's blocks, which are stored at full size, the last one too."""
    block = min(block_rows, max(1, rows))
    return -(-rows // block) * block


def _target_gradients(work: Workload, due: Sequence[Partition]) -> Amount:
    counts = [work._targets[split(key)[1]] for key in due]
    tokens = sum(tokens for _, tokens, _ in counts)
    stored = sum(examples for examples, _, _ in counts) * 4.0 * work.project.gradients.dimension
    loads = len({split(key)[0] for key in due})
    return Amount(units={"target_gradients": tokens}, tokens=tokens, loads=loads, bytes=stored)


def _pool_embeddings(work: Workload, due: Sequence[Partition]) -> Amount:
    tokens = work.tokens(work.lineage.pool_files.shard(str(key)) for key in due)
    return Amount(units={"pool_embeddings": tokens}, tokens=tokens, loads=1)


def _target_embeddings(work: Workload, due: Sequence[Partition]) -> Amount:
    tokens = sum(work._targets[str(task)][1] for task in due)
    return Amount(units={"target_embeddings": tokens}, tokens=tokens, loads=1)


def _influence_scores(work: Workload, due: Sequence[Partition]) -> Amount:
    rows, forms = work.pool_rows, len(work.project.gradients.forms)
    passes = rows * forms * len(work.project.checkpoints)
    subtasks = sum(work._targets[str(task)][2] for task in due)
    columns = 2 * forms * (len(work.project.checkpoints) + 1)  # two subtask rules; each checkpoint, and their sum
    checks, tokens = _checks_of_scores(work, due)
    return Amount(
        # Tasks that are due together share one pass over the datastore.
        units={"influence_scores": passes, **checks},
        tokens=tokens,
        loads=(len(work.project.checkpoints) + 1) * len(due) if tokens else 0,
        bytes=rows * (4.0 * columns * subtasks + 24 * len(due)),
    )


def _checks_of_scores(work: Workload, tasks: Sequence[Partition]) -> tuple[dict[str, float], float]:
    """Tokens of the certificates of some tasks, and of the real steps; and both together."""
    from less_assets.steps.certificates import STEP_TARGETS

    settings, checkpoints = work.project.gradients, len(work.project.checkpoints)
    rules = len(certified_rules(work.project))
    found = {CERTIFICATE: 0.0, REAL_STEPS: 0.0}
    for task in tasks:
        examples, tokens, _ = work._targets[str(task)]
        if settings.certificate_rows and rules:
            sample = min(settings.certificate_rows, work.pool_rows) * work.row_tokens
            found[CERTIFICATE] += checkpoints * rules * (sample + 2 * tokens)
        if settings.real_step_rows:
            steps = min(settings.real_step_rows, work.pool_rows)
            looked_at = tokens / max(1, -(-examples // STEP_TARGETS))
            found[REAL_STEPS] += steps * (looked_at + work.row_tokens)
    return {name: tokens for name, tokens in found.items() if tokens}, sum(found.values())


def _token_attribution(work: Workload, due: Sequence[Partition]) -> Amount:
    report, checkpoints = work.project.report, len(work.project.checkpoints)
    tokens = 0.0
    for key in due:
        selected = min(work.selected_rows(*split(key)), report.token_rows)
        rows = min(work.pool_rows, selected + 2 * report.context_rows)
        tokens += checkpoints * (rows * work.row_tokens + work._targets[split(key)[1]][1])
    return Amount(units={"token_attribution": tokens}, tokens=tokens, loads=checkpoints * len(due))


def _exact_scores(work: Workload, due: Sequence[Partition]) -> Amount:
    tokens = 0.0
    for key in due:
        recipe, task = split(key)
        candidates = min(
            work.pool_rows, work.selected_rows(recipe, task) * (work.project.recipe(recipe).candidates or 1)
        )
        tokens += (candidates * work.row_tokens + 2 * work._targets[task][1]) * len(work.project.checkpoints)
    loads = len(due) * len(work.project.checkpoints)
    return Amount(units={"exact_scores": tokens}, tokens=tokens, loads=loads)


def _selected_subset(work: Workload, due: Sequence[Partition]) -> Amount:
    samples = list(work.samples.values())
    row = 2 * sum(each.stored_bytes for each in samples) / max(1, len(samples))  # Parquet, and JSON lines
    stored = sum(work.selected_rows(*split(key)) * row for key in due)
    return Amount(units={"selected_subset": work.pool_rows * len(due)}, bytes=stored)


def _finetuned_model(work: Workload, due: Sequence[Partition]) -> Amount:
    trained = {}
    for key in due:
        recipe, task = split(key)
        resolved = work.project.recipe(recipe)
        if resolved.strategy != "none":
            same = (resolved.strategy, resolved.budget, resolved.seed, resolved.model)
            # Equal models are trained once.
            trained[same if resolved.traits.same_for_every_task else (recipe, task)] = work.selected_rows(recipe, task)
    tokens = sum(trained.values()) * work.row_tokens * work.project.finetuning.epochs
    stored = work.training_bytes(len(trained))
    return Amount(units={"finetuned_model": tokens}, tokens=tokens, loads=len(trained), bytes=stored)


def _eval_results(work: Workload, due: Sequence[Partition]) -> Amount:
    units: dict[str, float] = {}
    loads = 0
    for key in due:
        _, task = split(key)
        members = [member for member in work.project.member_tasks(task) if member.evaluation]
        samples = sum(evaluation_samples(member) for member in members)
        name = rate_name("eval_results", key)
        units[name] = units.get(name, 0) + samples
        loads += 1
    return Amount(units=units, loads=loads)


def evaluation_samples(task: Task) -> int:
    """Samples of a task's evaluation; 1 stands for a harness task, whose data only the harness knows."""
    from less_assets.steps.evaluation import evaluation_examples

    if task.evaluation is None or task.evaluation.harness is not None:
        return 0 if task.evaluation is None else 1
    return len(evaluation_examples(task))


_AMOUNTS: dict[str, Callable[[Workload, Sequence[Partition]], Amount]] = {
    "base_model": _base_model,
    "instruction_pool": _instruction_pool,
    "warmup_checkpoints": _warmup_checkpoints,
    "train_gradients": _train_gradients,
    "target_gradients": _target_gradients,
    "pool_embeddings": _pool_embeddings,
    "target_embeddings": _target_embeddings,
    "influence_scores": _influence_scores,
    "exact_scores": _exact_scores,
    "selected_subset": _selected_subset,
    "finetuned_model": _finetuned_model,
    "eval_results": _eval_results,
    "token_attribution": _token_attribution,
}
