"""From a plan to a stored artifact to an event in Dagster's log: for one partition, or for a range of them.

Belongs here: the order of these steps, the same for every asset, and the one helper that logs a range run's
materializations. What an asset is made from stands in `lineage.py`; the work itself in `assets/` and `method/`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from less_assets.compute import speeds as rates
from less_assets.compute.models import ModelLoader
from less_assets.compute.progress import Progress
from less_assets.compute.timings import add_seconds, seconds_of, timed
from less_assets.errors import CorruptArtifactError, LessAssetsError, MissingArtifactError
from less_assets.lineage.lineage import Lineage, split
from less_assets.lineage.plan import ArtifactPlan, Versions, digest
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.partitions import ASSET_AXES
from less_assets.project.project import Project
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
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
        units: Work that this call has done, as `rates.py` counts it for the asset: tokens, rows or samples; never
            stored in the artifact.
    """

    summary: Mapping[str, Any]
    data_version: str | None = None
    units: float = 0


Compute = Callable[[StepInputs], StepResult]
Describe = Callable[[ArtifactFolder, Manifest], Mapping[str, Any]]
Check = Callable[[Lineage, str, ModelLoader, Callable[[str], object]], dg.AssetCheckResult]
"""Judges a partition; takes the project's lineage, the partition's key, what loads models, and what receives lines."""


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
                _seal(folder, plan, compute(folder))
    # Equal content may come from other inputs than the first time: the pointer says from which this one came.
    return store.publish(store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)


def _seal(folder: ArtifactFolder, plan: ArtifactPlan, computed: StepResult) -> None:
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


class RangeRun:
    """Logs the materializations of a run over a range of partitions, one event as each partition finishes.

    Dagster copies a returned result's data version to every partition of the range, which leaves downstream assets
    falsely fresh; so range runs return nothing and log here, with the tags that Dagster itself would have set.
    A failure keeps what was logged.

    Args:
        context: Of the running asset, before anything was read: the upstream events of this moment are recorded.
    """

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._context = context
        layer = context.assets_def
        self._asset = context.asset_key
        self._code_version = layer.get_asset_spec(self._asset).code_version or context.run_id
        parents = [dependency.asset_key for dependency in layer.get_asset_spec(self._asset).deps]
        records = {record.asset_entry.asset_key: record for record in context.instance.get_asset_records(parents)}
        self._pointers: dict[dg.AssetKey, str] = {}
        for parent in parents:
            record = records.get(parent)
            last = record.asset_entry.last_materialization_record if record else None
            self._pointers[parent] = str(last.storage_id) if last else "NULL"

    def log(self, partition: str, manifest: Manifest, shown: Mapping[str, Any]) -> None:
        """Record that a partition was materialized.

        Args:
            partition: Key of the partition.
            manifest: Of the artifact now in force.
            shown: What a person sees at the materialization.
        """
        tags = {
            DATA_VERSION_TAG: manifest.data_version,
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            CODE_VERSION_TAG: self._code_version,
        }
        for parent, pointer in self._pointers.items():
            tags[get_input_data_version_tag(parent)] = _upstream_version(manifest.inputs, parent.to_user_string())
            tags[get_input_event_pointer_tag(parent)] = pointer
        event = dg.AssetMaterialization(self._asset, partition=partition, metadata=dict(shown), tags=tags)
        self._context.log_event(event)

    def log_checks(self, lineage: Lineage, partition: str, checks: Mapping[str, Check], models: ModelLoader) -> None:
        """Make the checks of a partition that was logged before; one that cannot be made says so, and stops nothing.

        Args:
            lineage: The project's lineage, as it is now.
            partition: Key of the partition.
            checks: All checks of the asset, by name.
            models: Loads models.
        """
        for name, check in checks.items():
            try:
                result = check(lineage, partition, models, self._context.log.info)
            except LessAssetsError as error:
                said = f"The check could not be made: {error}"
                result = dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description=said)
            self._log_check(partition, name, result)

    def _log_check(self, partition: str, name: str, result: dg.AssetCheckResult) -> None:
        asked = dg.AssetRecordsFilter(self._asset, asset_partitions=[partition])
        last = self._context.instance.fetch_materializations(asked, limit=1).records[0]
        evaluation = dg.AssetCheckEvaluation(
            asset_key=self._asset,
            check_name=name,
            passed=result.passed,
            metadata=result.metadata,
            target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
                storage_id=last.storage_id, run_id=last.run_id, timestamp=last.timestamp
            ),
            severity=result.severity,
            description=result.description,
            partition=partition,
        )
        self._context.log_event(evaluation)


def _upstream_version(inputs: Versions, asset: str) -> str:
    """The version of an upstream asset: its own, or a hash over the partitions that were read."""
    if asset in inputs:
        return inputs[asset]
    return digest({name: version for name, version in inputs.items() if name.startswith(f"{asset}/")})


def materialize_one(
    context: dg.AssetExecutionContext,
    project: Project,
    store: ArtifactStore,
    models: ModelLoader,
    compute: Compute,
    describe: Describe,
) -> dg.MaterializeResult:
    """Materialize the one partition of a run, or the unpartitioned asset."""
    lineage = Lineage(project, store)
    partition = context.partition_key if context.has_partition_key else None
    asset = context.asset_key.to_user_string()
    manifest = make_artifact(lineage, asset, partition, compute, models, context.log.info, resumable=False)
    shown = _shown(context, lineage, manifest, partition, describe)
    return dg.MaterializeResult(data_version=dg.DataVersion(manifest.data_version), metadata=shown)


def materialize_range(
    context: dg.AssetExecutionContext,
    project: Project,
    store: ArtifactStore,
    models: ModelLoader,
    compute: Compute,
    describe: Describe,
    backend: "Backend | None" = None,
    checks: Mapping[str, Check] | None = None,
) -> Iterator[dg.MaterializeResult]:
    """Materialize every partition of a range run as it finishes; one that fails does not keep the others from it.

    Yields nothing: an asset that returns, even None, has its event logged again by Dagster, over the ones logged here.
    Dagster therefore skips its checks: those of several partitions are made here. The result of a single partition of
    an asset with checks is yielded, and Dagster makes its checks.

    Args:
        context: Of the running asset.
        project: The project file.
        store: Where artifacts are kept.
        models: Loads models.
        compute: Makes one partition.
        describe: What a person sees of it.
        backend: Where partitions are made; None: here, one after another.
        checks: All checks of the asset, by name; None if it has none.

    Raises:
        LessAssetsError: Partitions failed; the others are materialized.
    """
    if checks and len(context.partition_keys) == 1:
        yield materialize_one(context, project, store, models, compute, describe)
        return
    run = RangeRun(context)
    lineage = Lineage(project, store)
    asset = context.asset_key.to_user_string()
    partitions = _still_there(context, lineage)
    # Grouped by their first dimension, in the order of its keys: each checkpoint's model is loaded once.
    groups = list(dict.fromkeys(key.split("|")[0] for key in partitions))
    partitions = sorted(partitions, key=lambda key: groups.index(key.split("|")[0]))
    progress = Progress(asset, len(partitions), "partitions", context.log.info)
    make = backend.make if backend else make_here
    for partition, manifest in make(lineage, asset, partitions, compute, models, context.log.info):
        run.log(partition, manifest, _shown(context, lineage, manifest, partition, describe))
        run.log_checks(Lineage(project, store), partition, checks or {}, models)
        progress(1)


def _still_there(context: dg.AssetExecutionContext, lineage: Lineage) -> list[str]:
    """The partitions of a range run, without shards that the pool has no more: Dagster goes on offering those.

    A run that asks for nothing else is left as it is, and fails with the reason.
    """
    partitions = list(context.partition_keys)
    axes = ASSET_AXES.get(context.asset_key.to_user_string(), ())
    if "shard" not in axes:
        return partitions
    shards = set(lineage.pool_files.shard_keys())
    left = [key for key in partitions if key.split("|")[axes.index("shard")] in shards]
    if left and len(left) < len(partitions):
        gone = ", ".join(key for key in partitions if key not in set(left))
        context.log.warning(f"left out, since the pool has these shards no more: {gone}")
    return left or partitions


def materialize_together(
    context: dg.AssetExecutionContext,
    project: Project,
    store: ArtifactStore,
    models: ModelLoader,
    compute: Callable[[list[StepInputs]], list[StepResult]],
    describe: Describe,
    checks: Mapping[str, Check],
) -> Iterator[dg.MaterializeResult]:
    """Materialize the partitions of a range run by one computation for all of them, one artifact and event each.

    Yields the result of a single partition, whose checks Dagster then runs; of several nothing, as `materialize_range`,
    and Dagster skips their checks: they are made here.

    Args:
        context: Of the running asset.
        project: The project file.
        store: Where artifacts are kept.
        models: Loads models.
        compute: Makes all partitions that are not stored yet; returns what `Compute` does, one for each, in order.
        describe: What a person sees of a partition.
        checks: All checks of the asset, by name.
    """
    run = RangeRun(context)
    lineage = Lineage(project, store)
    asset = context.asset_key.to_user_string()
    plans = {partition: lineage.plan(asset, partition) for partition in context.partition_keys}
    missing = [plan for plan in plans.values() if not _is_whole(lineage.store.artifact(plan.folder, plan.fingerprint))]
    if missing:
        with measured(lineage, asset, None, models) as done, ExitStack() as writing:
            works = [
                StepInputs(
                    lineage,
                    str(plan.partition),
                    writing.enter_context(store.writing(plan.folder, plan.fingerprint)),
                    models,
                    context.log.info,
                    f"{asset} {plan.partition}",
                )
                for plan in missing
            ]
            started = time.monotonic()
            done += compute(works)
            for plan in missing:  # the pass was for all of them alike
                add_seconds(store, asset, plan.fingerprint, (time.monotonic() - started) / len(missing))
            for plan, work, computed in zip(missing, works, done, strict=True):
                _seal(work.folder, plan, computed)
    for partition, plan in plans.items():
        manifest = store.publish(store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)
        shown = _shown(context, lineage, manifest, partition, describe)
        if len(plans) == 1:
            yield dg.MaterializeResult(data_version=dg.DataVersion(manifest.data_version), metadata=shown)
            return
        run.log(partition, manifest, shown)
    for partition in plans:
        run.log_checks(Lineage(project, store), partition, checks, models)


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


class Backend(Protocol):
    """Where the partitions of a range run are made."""

    def make(
        self,
        lineage: Lineage,
        asset: str,
        partitions: Sequence[str],
        compute: Compute,
        models: ModelLoader,
        log: Callable[[str], object],
    ) -> Iterator[tuple[str, Manifest]]:
        """Make partitions and put them in force; yield each with its manifest as it finishes, in any order.

        Args:
            lineage: The project's plans.
            asset: Name of the asset.
            partitions: What to make.
            compute: Makes one partition; a module-level function, so that another process finds it by name.
            models: Loads models in this process.
            log: Receives progress lines.

        Raises:
            LessAssetsError: Partitions failed; the others were made and yielded first.
        """
        ...


def make_here(
    lineage: Lineage,
    asset: str,
    partitions: Sequence[str],
    compute: Compute,
    models: ModelLoader,
    log: Callable[[str], object],
) -> Iterator[tuple[str, Manifest]]:
    """Make partitions in this process, in order: `Backend.make` of the local backend."""
    failures = Failures(asset, log)
    for partition in partitions:
        try:
            manifest = make_artifact(lineage, asset, partition, compute, models, log, resumable=True)
        except LessAssetsError as error:
            failures.add(partition, error)
            if failures.hopeless:
                break
        else:
            failures.succeeded()
            yield partition, manifest
    failures.raise_first()


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
    rates.record(lineage.store, lineage.project, rates.MODEL_LOAD, loading, models.loads - loads)
    units = sum(each.units for each in done)
    rates.record(lineage.store, lineage.project, rates.rate_name(asset, partition), seconds - loading, units)


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
        with timed(lineage.store, asset, plan.fingerprint), measured(lineage, asset, partition, models) as done:
            done.append(compute(StepInputs(lineage, partition or "", folder, models, log, name)))
        return done[0]

    return materialize(lineage.store, plan, timed_compute, resumable=resumable)


def _shown(
    context: dg.AssetExecutionContext, lineage: Lineage, manifest: Manifest, partition: str | None, describe: Describe
) -> dict[str, Any]:
    """What a person sees at a materialization."""
    folder = lineage.store.artifact(manifest.key, manifest.fingerprint)
    seconds = seconds_of(lineage.store, manifest.kind, manifest.fingerprint)
    dependencies = context.assets_def.get_asset_spec(context.asset_key).deps
    upstream = {dependency.asset_key.to_user_string() for dependency in dependencies}
    return {
        **metadata.in_order(describe(folder, manifest)),
        **metadata.provenance(
            manifest.kind, manifest.inputs, upstream, _column_names(lineage, manifest.kind, partition)
        ),
        "path": dg.MetadataValue.path(str(folder.root)),
        "fingerprint": manifest.fingerprint,
        **({} if seconds is None else {"seconds": seconds}),
    }


def _column_names(lineage: Lineage, asset: str, partition: str | None) -> Mapping[str, Sequence[str]]:
    """The direction forms, subtask rules and checkpoints that an artifact's columns are named after."""
    from less_assets.method.selection.influence import SUBTASK_RULES

    forms: list[str] = list(lineage.project.gradients.forms)
    rules = list(SUBTASK_RULES)
    if partition and asset in metadata.OF_A_RECIPE:
        recipe = lineage.project.recipe(split(partition)[0])
        forms, rules = [str(recipe.form)], [str(recipe.subtask)]
    return {"form": forms, "rule": rules, "checkpoint": lineage.project.checkpoints}
