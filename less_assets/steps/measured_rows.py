"""Measured values of sampled rows that stay true while the pool grows: what was measured before is read, not repeated.

Belongs here: which rows have to be measured, and putting known and new ones together. What is measured, and how, is
`certificates.py`.

An exact score and a real step depend on the row, the checkpoint and the targets, not on the rest of the pool. After a
few rows were added, most of a sample is the one of before.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from less_assets.compute.step import StepInputs
from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.plan import ArtifactPlan, digest
from less_assets.store.manifest import FORMAT_VERSION, Manifest
from less_assets.store.tables import read_parquet

Samples = Mapping[str, pl.DataFrame]
"""Task -> sampled rows: example_id, shard, row and more."""
Measure = Callable[[StepInputs, Samples], tuple[Mapping[str, pl.DataFrame], Mapping[str, float]]]
"""Measures rows of several tasks together; task -> example_id and values of its rows, and task -> units of work."""


@dataclass(frozen=True)
class Measurement:
    """What is measured of sampled rows, and where the values of the last time lie.

    Attributes:
        plan_of: Gives the plan of a task's artifact.
        file: Its table of values, one row for each sampled row.
        columns: The values that are wanted.
        measured_with: Task -> `measured_with`, which the artifact's summary has, too.
        measure: Measures rows.
    """

    plan_of: Callable[[Lineage, str], ArtifactPlan]
    file: str
    columns: Sequence[str]
    measured_with: Mapping[str, str]
    measure: Measure

    def of(self, works: Sequence[StepInputs], samples: Samples) -> dict[str, tuple[pl.DataFrame, float]]:
        """The values of each task's rows, in the sample's order, and the units of work that were done for them."""
        known = {work.partition: self._known(work) for work in works}
        new = {task: sample.join(known[task], on="example_id", how="anti") for task, sample in samples.items()}
        new = {task: rows for task, rows in new.items() if rows.height}
        tables: Mapping[str, pl.DataFrame] = {}
        units: Mapping[str, float] = {}
        if new:
            name, _, _ = works[0].name.partition(" ")
            together = replace(works[0], name=f"{name} {', '.join(new)}")
            tables, units = self.measure(together, new)
        results = {}
        for work in works:
            task, rows = work.partition, samples[work.partition].select("example_id")
            measured = new[task].height if task in new else 0
            if measured < rows.height:
                work.log(f"{work.name}: {rows.height - measured} of {rows.height} rows were measured before")
            every = pl.concat(
                [table for table in (known[task], tables.get(task)) if table is not None and table.height]
            )
            values = rows.join(every, on="example_id", how="left", maintain_order="left")
            results[task] = (values, units.get(task, 0))
        return results

    def _known(self, work: StepInputs) -> pl.DataFrame:
        """The rows that the last artifact of a task has measured in just this way."""
        nothing = pl.DataFrame(schema={"example_id": pl.String})
        manifest = in_force(work.lineage, self.plan_of(work.lineage, work.partition))
        if manifest is None or manifest.summary.get("measured_with") != self.measured_with[work.partition]:
            return nothing
        folder = work.lineage.store.artifact(manifest.key, manifest.fingerprint)
        try:
            folder.verify()
        except (CorruptArtifactError, MissingArtifactError):
            return nothing
        table = read_parquet(folder, self.file)
        return table.select("example_id", *self.columns) if set(self.columns) <= set(table.columns) else nothing


def measured_with(lineage: Lineage, task: str, checkpoints: Iterable[str], *settings: Any) -> str:
    """Digest of what the values depend on, besides the row and the direction form."""
    versions = [lineage.version("warmup_checkpoints", checkpoint) for checkpoint in checkpoints]
    examples = lineage.summary("target_examples", task)["examples_digest"]
    return digest([FORMAT_VERSION, lineage.project.model_settings(), versions, examples, *settings])


def in_force(lineage: Lineage, plan: ArtifactPlan) -> Manifest | None:
    """What was made last for a plan's task, whatever from; None if there is nothing that can be read."""
    try:
        return lineage.store.current(plan.pointer)
    except (CorruptArtifactError, MissingArtifactError, StaleArtifactError):
        return None
