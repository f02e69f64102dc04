"""From a plan to a stored artifact to an event in Dagster's log: for one partition, or for a range of them.

Belongs here: the order of these steps, the same for every asset, and the one helper that logs a range run's
materializations. What an asset is made from stands in `lineage.py`; the work itself in `assets/` and `method/`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from less_assets import metadata
from less_assets.costs import seconds_of, timed
from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage import Lineage
from less_assets.progress import Progress
from less_assets.project import Project
from less_assets.provenance import ArtifactPlan, Versions, digest
from less_assets.resources import ModelLoader
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest


@dataclass(frozen=True)
class Work:
    """What a compute function is given.

    Attributes:
        line: The project's lineage; reads upstream artifacts and refuses stale ones.
        partition: Key of the partition; empty for an unpartitioned asset.
        folder: Where to write the files.
        models: Loads models and keeps the last one.
        log: Writes one line into Dagster's log.
        name: Asset and partition, for progress lines.
    """

    line: Lineage
    partition: str
    folder: ArtifactFolder
    models: ModelLoader
    log: Callable[[str], object]
    name: str

    @property
    def project(self) -> Project:
        """The project file."""
        return self.line.project

    def progress(self, total: int, unit: str, done: int = 0) -> Progress:
        """A progress line with an estimate of the time left."""
        return Progress(self.name, total, unit, self.log, done)


@dataclass(frozen=True)
class Computed:
    """What computing an artifact yields besides its files.

    Attributes:
        summary: JSON numbers and words that a person wants at a glance; stored in the manifest.
        data_version: Hash of the content where equal content may come from unequal inputs; None: the fingerprint.
    """

    summary: Mapping[str, Any]
    data_version: str | None = None


Compute = Callable[[Work], Computed]
Describe = Callable[[ArtifactFolder, Manifest], Mapping[str, Any]]


def materialize(
    store: ArtifactStore, plan: ArtifactPlan, compute: Callable[[ArtifactFolder], Computed], *, resumable: bool = False
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
                computed = compute(folder)
                folder.seal(
                    kind=plan.asset,
                    settings=plan.settings,
                    inputs=plan.inputs,
                    data_version=computed.data_version or plan.fingerprint,
                    summary=computed.summary,
                )
    # Equal content may come from other inputs than the first time: the pointer says from which this one came.
    return store.publish(store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)


def _is_whole(folder: ArtifactFolder) -> bool:
    """Whether the artifact is there; a damaged one is removed, so that it is made again."""
    if not folder.exists():
        return False
    try:
        folder.verify()
    except (CorruptArtifactError, MissingArtifactError, StaleArtifactError):
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
    line = Lineage(project, store)
    partition = context.partition_key if context.has_partition_key else None
    manifest, shown = _make(context, line, partition, models, compute, describe, resumable=False)
    return dg.MaterializeResult(data_version=dg.DataVersion(manifest.data_version), metadata=shown)


def materialize_range(
    context: dg.AssetExecutionContext,
    project: Project,
    store: ArtifactStore,
    models: ModelLoader,
    compute: Compute,
    describe: Describe,
) -> Iterator[dg.MaterializeResult]:
    """Materialize every partition of a range run, in the run's order; what is finished stays if a later one fails.

    Yields nothing: an asset that returns, even None, has its event logged again by Dagster, over the ones logged here.
    """
    yield from ()
    run = RangeRun(context)
    line = Lineage(project, store)
    # Grid keys come grouped by their first dimension, the checkpoint, so each checkpoint's model is loaded once.
    partitions = sorted(context.partition_keys, key=lambda key: key.split("|")[0])
    progress = Progress(context.asset_key.to_user_string(), len(partitions), "partitions", context.log.info)
    for partition in partitions:
        manifest, shown = _make(context, line, partition, models, compute, describe, resumable=True)
        run.log(partition, manifest, shown)
        progress(1)


def _upstream(context: dg.AssetExecutionContext) -> set[str]:
    dependencies = context.assets_def.get_asset_spec(context.asset_key).deps
    return {dependency.asset_key.to_user_string() for dependency in dependencies}


def _make(
    context: dg.AssetExecutionContext,
    line: Lineage,
    partition: str | None,
    models: ModelLoader,
    compute: Compute,
    describe: Describe,
    *,
    resumable: bool,
) -> tuple[Manifest, dict[str, Any]]:
    plan = line.plan(context.asset_key.to_user_string(), partition)
    name = f"{plan.asset} {partition}" if partition else plan.asset

    def timed_compute(folder: ArtifactFolder) -> Computed:
        with timed(line.store, plan.asset, plan.fingerprint):
            return compute(Work(line, partition or "", folder, models, context.log.info, name))

    manifest = materialize(line.store, plan, timed_compute, resumable=resumable)
    folder = line.store.artifact(manifest.key, manifest.fingerprint)
    seconds = seconds_of(line.store, plan.asset, plan.fingerprint)
    shown = {
        "fingerprint": manifest.fingerprint,
        "path": dg.MetadataValue.path(str(folder.root)),
        **({} if seconds is None else {"seconds": seconds}),
        **describe(folder, manifest),
        **metadata.provenance(plan.asset, manifest.inputs, _upstream(context)),
    }
    return manifest, shown
