"""How much work is missing: tokens, model loads and bytes of the artifacts that a run would make.

Belongs here: what each asset's work grows with, from the project file, a sample of its data and what is stored already.
How fast a machine does it says `speeds.py`; how it is printed, `cli.py`.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from less_assets.compute.models import ModelLoader
from less_assets.compute.speeds import MODEL_LOAD, Rates
from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import Shard, data_path
from less_assets.project.project import Project

if TYPE_CHECKING:
    from less_assets.method.data.chat import ChatEncoder

RUN_SECONDS = 0.25
"""Starting and recording one Dagster run in this process (the demo: 0.2 to 0.3 s, two cores, local disk)."""
ARTIFACT_SECONDS = 0.1
"""Planning, sealing and recording one artifact (the demo: 0.1 s where nothing is computed)."""
SAMPLE_ROWS = 32
SAMPLE_PLACES = 4
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
            seconds = rates.seconds_per_unit(name)
            if units and seconds is None:
                return None
            total += units * (seconds or 0)
        return total


@dataclass(frozen=True)
class SourceSample:
    """What a sample of a source says about its rows.

    Attributes:
        usable: Share of rows that are neither quarantined nor refused.
        tokens: Mean tokens of a usable row, cut at `model.max_length`.
        loss_tokens: Mean tokens with loss.
        stored_bytes: Mean bytes of a row in the pool's Parquet files.
        examples: The usable ones of the sampled rows, encoded.
    """

    usable: float
    tokens: float
    loss_tokens: float
    stored_bytes: float
    examples: Sequence[Any]


def sample_source(project: Project, shards: Sequence[Shard], encoder: "ChatEncoder") -> SourceSample:
    """Read and encode a few rows from several places of a source."""
    import polars as pl

    from less_assets.method.data.examples import pool_table, read_rows

    source = project.source(shards[0].source)
    places = [shards[len(shards) * number // SAMPLE_PLACES] for number in range(min(SAMPLE_PLACES, len(shards)))]
    tables = [pool_table([])]
    for shard in places:
        first = shard.segments[0]
        rows = min(first.rows, -(-SAMPLE_ROWS // len(places)))
        file = data_path(project, first.path)
        tables += read_rows(file, source.name, source.format, first.first_row, rows, begins=first.begins)
    table = pl.concat(tables)
    good = table.filter(pl.col("status") == "ok")
    rows_as_tokens = (encoder.row(*row) for row in good.select("example_id", "messages", "tools").iter_rows())
    encoded = [example for example in rows_as_tokens if example.loss_tokens]
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    rows = max(1, len(encoded))
    return SourceSample(
        usable=len(encoded) / max(1, table.height),
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
            source: sample_source(self.project, shards, self._models.encoder())
            for source, shards in self._shards.items()
        }

    def rows(self, shards: Iterable[Shard]) -> float:
        """Usable rows of some shards, estimated from the samples."""
        return sum(shard.rows * self.samples[shard.source].usable for shard in shards)

    def tokens(self, shards: Iterable[Shard]) -> float:
        """Tokens of some shards' usable rows, estimated from the samples."""
        samples = self.samples
        return sum(shard.rows * samples[shard.source].usable * samples[shard.source].tokens for shard in shards)

    def kept_share(self, shard: Shard) -> float:
        """Share of a shard's usable rows that get gradients; before it is known, as if no two tasks kept the same."""
        prefilter = self.project.prefilter
        if prefilter is None:
            return 1.0
        if (kept := self.known("kept_rows", shard.key, "kept")) is not None:
            return float((kept + self.known("kept_rows", shard.key, "sampled")) / max(1.0, self.rows([shard])))
        return min(1.0, prefilter.keep * len(self.project.tasks) + prefilter.sample_rows / max(1.0, self.pool_rows))

    @cached_property
    def pool_rows(self) -> float:
        """Usable rows of the pool."""
        return self.known("pool_index", None, "usable") or self.rows(self.lineage.pool_files.shards)

    @property
    def sampled_rows(self) -> float:
        """Rows of the warm-up sample."""
        return self.known("warmup_sample", None, "rows") or self.project.warmup.fraction * self.pool_rows

    @cached_property
    def row_tokens(self) -> float:
        """Mean tokens of a usable row of the pool."""
        return self.tokens(self.lineage.pool_files.shards) / max(1.0, self.rows(self.lineage.pool_files.shards))

    def known(self, asset: str, partition: Partition, figure: str) -> Any:
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
        from less_assets.method.data.targets import read_targets

        encoder, encoded = self._models.encoder(), []
        for member in self.project.member_tasks(task):
            assert member.examples is not None
            encoded += [
                encoder.target(example, member.examples.max_length)
                for example in read_targets(member.examples.format, member.examples.path)
            ]
        return encoded

    @cached_property
    def target_sizes(self) -> dict[str, tuple[int, int, int]]:
        """Task → target examples, their tokens, subtasks."""
        sizes = {}
        for task in self.project.task_keys:
            encoded = self.targets(task)
            sizes[task] = (len(encoded), sum(len(example.input_ids) for example in encoded), len(self._subtasks(task)))
        return sizes

    def _subtasks(self, task: str) -> set[tuple[str, str]]:
        from less_assets.method.data.targets import read_targets

        return {
            (member.name, example.subtask)
            for member in self.project.member_tasks(task)
            if member.examples
            for example in read_targets(member.examples.format, member.examples.path)
        }

    def selected_rows(self, recipe_key: str, task: str, asset: str = "selected_subset") -> float:
        """Rows of the subset of a recipe, or (`pilot_subset`) of a pilot."""
        recipe = self.project.recipe(recipe_key)
        known = self.known(asset, f"{recipe_key}|{task}", "rows")
        if known is not None or not recipe.traits.chooses_rows:
            return float(known or 0)
        unique = self.known("pool_index", None, "unique") or self.pool_rows
        if recipe.budget is None:
            return float(unique)
        if recipe.budget.unit == "tokens":
            samples = list(self.samples.values())
            loss_tokens = sum(sample.loss_tokens for sample in samples) / len(samples)
            return float(min(unique, recipe.budget.amount / max(1.0, loss_tokens)))
        return float(unique * recipe.budget.amount if recipe.budget.unit == "fraction" else recipe.budget.amount)
