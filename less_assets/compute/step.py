"""From a plan to a stored artifact: for one partition, or for several of them.

Belongs here: what a step is given and gives back, and the order of planning, computing, sealing and publishing, the
same for every asset. What an asset computes stands in `steps/`, how Dagster is told in
`orchestration/materialization.py`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from less_assets.compute import speeds
from less_assets.compute.models import ModelLoader
from less_assets.compute.progress import Progress
from less_assets.compute.timings import add_seconds, timed
from less_assets.errors import CorruptArtifactError, LessAssetsError, MissingArtifactError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.plan import ArtifactPlan
from less_assets.project.project import Project
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.entry_page import write_entry_page
from less_assets.store.manifest import Manifest

FAILURES_IN_A_ROW = 3
"""So many partitions that fail one after another end the work on an asset: then the trouble is not theirs."""


@dataclass(frozen=True)
class StepInputs:
    """What a compute function is given.

    Attributes:
        lineage: The project's lineage; reads upstream artifacts and refuses stale ones.
        partition: Key of the partition; empty for an unpartitioned asset.
        folder: Where to write the files.
        models: Loads models and keeps the last one.
        log: Writes one line into Dagster's log.
        name: Asset and partition, for progress lines.
    """

    lineage: Lineage
    partition: str
    folder: ArtifactFolder
    models: ModelLoader
    log: Callable[[str], object]
    name: str

    @property
    def project(self) -> Project:
        """The project file."""
        return self.lineage.project

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """A progress line with an estimate of the time left."""
        return Progress(self.name, total, unit, self.log, done)


@dataclass(frozen=True)
class StepResult:
    """What computing an artifact yields besides its files.

    Attributes:
        summary: JSON numbers and words that a person wants at a glance; stored in the manifest.
        data_version: Hash of the content where equal content may come from unequal inputs; None: the fingerprint.
        units: Work that this call has done, as `speeds.py` counts it for the asset: tokens, rows or samples; never
            stored in the artifact.
    """

    summary: Mapping[str, Any]
    data_version: str | None = None
    units: float = 0


Compute = Callable[[StepInputs], StepResult]
"""Makes one partition."""
ComputeTogether = Callable[[Sequence[StepInputs]], Sequence[StepResult]]
"""Makes several partitions at once; a result for each, in order."""
Log = Callable[[str], object]
"""Receives one line."""


def materialize(
    store: ArtifactStore,
    plan: ArtifactPlan,
    compute: Callable[[ArtifactFolder], StepResult],
    *,
    resumable: bool = False,
) -> Manifest:
    """Make the artifact of a plan unless it exists, and put it in force.

    Args:
        store: Where artifacts are kept.
        plan: What to make.
        compute: Writes the files into the folder it is given; called only if no complete artifact has the plan's
            fingerprint.
        resumable: Whether the folder keeps what an interrupted call has left; otherwise it is written whole or not
            at all.

    Returns:
        The manifest now in force for `plan.pointer`.
    """
    if not _is_whole(store.artifact(plan.folder, plan.fingerprint)):
        opened = store.resuming if resumable else store.writing
        with opened(plan.folder, plan.fingerprint) as folder:
            if not folder.exists():  # another run may have finished it while this one waited
                seal(folder, plan, compute(folder))
    # Equal content may come from other inputs than the first time: the pointer says from which this one came.
    return store.publish(store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)


def seal(folder: ArtifactFolder, plan: ArtifactPlan, computed: StepResult) -> None:
    """Declare an artifact complete, with what its plan and its computation say of it."""
    folder.seal(
        kind=plan.asset,
        settings=plan.settings,
        inputs=plan.inputs,
        data_version=computed.data_version or plan.fingerprint,
        summary=computed.summary,
    )


def _is_whole(folder: ArtifactFolder) -> bool:
    """Whether the artifact is there; a damaged one is removed, so that it is made again."""
    if not folder.exists():
        return False
    try:
        folder.verify()
    except (CorruptArtifactError, MissingArtifactError):
        folder.discard()
        return False
    return True


class Failures:
    """What failed of an asset, while its other partitions are made.

    Args:
        asset: Name of the asset.
        log: Receives a line as something fails.
    """

    def __init__(self, asset: str, log: Callable[[str], object]) -> None:
        self._asset, self._log = asset, log
        self._found: dict[str, LessAssetsError] = {}
        self._in_a_row = 0

    @property
    def hopeless(self) -> bool:
        """Whether so many failed in a row that the rest would, too: the disk is full, the model cannot be loaded."""
        return self._in_a_row >= FAILURES_IN_A_ROW

    def add(self, partition: str, error: LessAssetsError) -> None:
        """Note what failed, and say so."""
        self._found[partition] = error
        self._in_a_row += 1
        self._log(f"{self._asset} {partition}".rstrip() + f" failed: {error.what}")

    def succeeded(self) -> None:
        """Note that something did not fail."""
        self._in_a_row = 0

    @property
    def first(self) -> LessAssetsError | None:
        """What failed first."""
        return next(iter(self._found.values()), None)

    def raise_first(self) -> None:
        """Raise what failed first, if anything did; of several the log names all."""
        if len(self._found) > 1:
            self._log(f"{self._asset} failed for {', '.join(self._found)}; the first one's trouble follows")
        if self.first:
            raise self.first


@dataclass(frozen=True)
class OneByOne:
    """Partitions of an asset are made one after another; one that fails does not keep the others from being made."""

    asset: str
    compute: Compute

    def make(
        self, lineage: Lineage, partitions: Sequence[str], models: ModelLoader, log: Log
    ) -> Iterator[tuple[str, Manifest]]:
        """Make partitions here and in order; see `Backend.make`."""
        failures = Failures(self.asset, log)
        for partition in partitions:
            try:
                manifest = make_artifact(lineage, self.asset, partition, self.compute, models, log, resumable=True)
            except LessAssetsError as error:
                failures.add(partition, error)
                if failures.hopeless:
                    break
            else:
                failures.succeeded()
                yield partition, manifest
        failures.raise_first()

    def groups(self, partitions: Sequence[str], workers: int) -> list[tuple[str, ...]]:
        """What a worker is given at a time: a partition."""
        return [(partition,) for partition in partitions]


@dataclass(frozen=True)
class Together:
    """Partitions of an asset are made by one computation, whose failure is that of all."""

    asset: str
    compute: ComputeTogether

    def make(
        self, lineage: Lineage, partitions: Sequence[str], models: ModelLoader, log: Log
    ) -> Iterator[tuple[str, Manifest]]:
        """Make partitions here; all are in force before the first is yielded. See `Backend.make`."""
        yield from list(make_together(lineage, self.asset, partitions, self.compute, models, log))

    def groups(self, partitions: Sequence[str], workers: int) -> list[tuple[str, ...]]:
        """What a worker is given at a time: about as many partitions as any other."""
        count = min(workers, len(partitions))
        return [tuple(partitions[first::count]) for first in range(count)]


class Backend(Protocol):
    """Where the partitions of a range run are made."""

    def make(
        self,
        lineage: Lineage,
        computation: OneByOne | Together,
        partitions: Sequence[str],
        models: ModelLoader,
        log: Log,
    ) -> Iterator[tuple[str, Manifest]]:
        """Make partitions and put them in force; yield each with its manifest as it finishes, in any order.

        Args:
            lineage: The project's plans.
            computation: The asset, and how its partitions are made; its function is one of a module, so that another
                process finds it by name.
            partitions: What to make.
            models: Loads models in this process.
            log: Receives progress lines.

        Raises:
            LessAssetsError: Partitions failed; the others were made and yielded first.
        """
        ...


@contextmanager
def measured(lineage: Lineage, asset: str, partition: str | None, models: ModelLoader) -> Iterator[list[StepResult]]:
    """Record how fast the work of the block was done; loading models is counted by itself.

    Yields:
        A list, to which the block adds what it has computed.
    """
    started, loads, loading = time.perf_counter(), models.loads, models.loading_seconds
    done: list[StepResult] = []
    yield done
    seconds = time.perf_counter() - started
    loading = models.loading_seconds - loading
    speeds.record(lineage.store, lineage.project, speeds.MODEL_LOAD, loading, models.loads - loads)
    units = sum(result.units for result in done)
    speeds.record(lineage.store, lineage.project, speeds.rate_name(asset, partition), seconds - loading, units)


def make_artifact(
    lineage: Lineage,
    asset: str,
    partition: str | None,
    compute: Compute,
    models: ModelLoader,
    log: Callable[[str], object],
    *,
    resumable: bool,
) -> Manifest:
    """Make one artifact unless it is stored, put it in force, and record how fast it was; no Dagster.

    Args:
        lineage: The project's plans.
        asset: Name of the asset.
        partition: Key of the partition; None for an unpartitioned asset.
        compute: Makes it.
        models: Loads models.
        log: Receives progress lines.
        resumable: See `materialize`.
    """
    plan = lineage.plan(asset, partition)
    name = f"{asset} {partition}" if partition else asset

    def timed_compute(folder: ArtifactFolder) -> StepResult:
        models.pin(lineage)
        with timed(lineage.store, asset, plan.fingerprint), measured(lineage, asset, partition, models) as done:
            done.append(compute(StepInputs(lineage, partition or "", folder, models, log, name)))
        return done[0]

    manifest = materialize(lineage.store, plan, timed_compute, resumable=resumable)
    if entry := lineage.declarations[asset].entry:
        write_entry_page(lineage.store, plan.pointer, plan.fingerprint, entry)
    return manifest


def make_together(
    lineage: Lineage, asset: str, partitions: Sequence[str], compute: ComputeTogether, models: ModelLoader, log: Log
) -> Iterator[tuple[str, Manifest]]:
    """Make all partitions that are not stored by one computation, and put each in force; no Dagster.

    Args:
        lineage: The project's plans.
        asset: Name of the asset.
        partitions: What to make.
        compute: Makes all of them.
        models: Loads models.
        log: Receives progress lines.

    Yields:
        Each partition with its manifest.
    """
    plans = [lineage.plan(asset, partition) for partition in partitions]
    yield from zip(partitions, materialize_together(lineage, plans, compute, models, log), strict=True)


def materialize_together(
    lineage: Lineage, plans: Sequence[ArtifactPlan], compute: ComputeTogether, models: ModelLoader, log: Log
) -> Iterator[Manifest]:
    """Make the artifacts of several plans of one asset, as `materialize` does, those that are missing together.

    Yields:
        The manifest now in force for each plan.
    """
    store = lineage.store
    missing = [plan for plan in plans if not _is_whole(store.artifact(plan.folder, plan.fingerprint))]
    if missing:
        asset = missing[0].asset
        models.pin(lineage)
        with measured(lineage, asset, None, models) as done, ExitStack() as writing:
            steps = [
                StepInputs(
                    lineage,
                    str(plan.partition),
                    writing.enter_context(store.writing(plan.folder, plan.fingerprint)),
                    models,
                    log,
                    f"{asset} {plan.partition}",
                )
                for plan in missing
            ]
            started = time.monotonic()
            done += compute(steps)
            for plan in missing:  # the pass was for all of them alike
                add_seconds(store, asset, plan.fingerprint, (time.monotonic() - started) / len(missing))
            for plan, step, result in zip(missing, steps, done, strict=True):
                seal(step.folder, plan, result)
    for plan in plans:
        yield store.publish(store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)
