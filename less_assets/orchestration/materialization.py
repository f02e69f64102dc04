"""From Dagster's run to steps, and from what they made to events in Dagster's log: for one partition, or for a range.

Belongs here: the one way by which every asset is materialized in Dagster, and the one helper that logs a range run's
materializations. What an asset is made from and computes is declared in `steps/`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from less_assets.compute.backends import LocalBackend
from less_assets.compute.models import ModelLoader
from less_assets.compute.progress import Progress
from less_assets.compute.step import OneByOne, Together, make_artifact
from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.plan import Versions, digest
from less_assets.orchestration.dagster_internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    AssetCheckEvaluationTargetMaterializationData,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from less_assets.orchestration.resources import Workspace
from less_assets.orchestration.tracking import track
from less_assets.orchestration.ui_metadata import check_result, shown_metadata
from less_assets.steps.asset import Asset, Check
from less_assets.steps.registry import ASSETS
from less_assets.steps.shown import Stored, Verdict
from less_assets.store.manifest import Manifest

CHECKS_LATER_TAG = "less-assets/explaining-checks"
"""Of runs whose checks that explain are made by a later run: `less-assets run` makes them after the models."""


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

    def log_checks(self, lineage: Lineage, partition: str, checks: Sequence[Check], models: ModelLoader) -> None:
        """Make the checks of a partition that was logged before; one that cannot be made says so, and stops nothing.

        Args:
            lineage: The project's lineage, as it is now.
            partition: Key of the partition.
            checks: Checks of the asset.
            models: Loads models.
        """
        for check in checks:
            try:
                verdict = check.judge(lineage, partition, models, self._context.log.info)
            except LessAssetsError as error:
                verdict = Verdict(False, f"The check could not be made: {error}", {})
            self._log_check(partition, check.name, check_result(verdict))

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


def materialize(
    asset: Asset, context: dg.AssetExecutionContext, workspace: Workspace
) -> Iterator[dg.MaterializeResult]:
    """Materialize what a run asks of an asset.

    The result of an asset without ranges, and of a single partition of an asset with checks, is yielded: Dagster makes
    its checks. A range run yields nothing: an asset that returns, even None, has its event logged again by Dagster,
    over the ones logged here. Dagster therefore skips its checks: they are made here. So does a run that leaves checks
    for later.

    Args:
        asset: The asset.
        context: Of the running asset.
        workspace: Project, store, models and backend.

    Raises:
        LessAssetsError: Partitions failed; the others are materialized.
    """
    lineage = workspace.lineage()
    if asset.before:
        asset.before(lineage)
    if not asset.in_ranges:
        partition = context.partition_key if context.has_partition_key else None
        yield _materialize_one(asset, context, workspace, lineage, partition)
        return
    run = RangeRun(context)
    partitions = [
        partition
        for partition in _in_order(asset, _still_there(context, lineage))
        if not lineage.is_left_out(asset.name, partition)
    ]
    # A backfill of a partition without neighbours is a range run, of one: its checks know no partition key.
    declared = asset.checks_in(lineage.project)
    checks = [check for check in declared if not (check.explains and CHECKS_LATER_TAG in context.run.tags)]
    by_dagster = bool(declared) and len(checks) == len(declared) and context.has_partition_key
    if by_dagster and asset.compute:
        yield _materialize_one(asset, context, workspace, lineage, partitions[0])
        return
    for partition, manifest in _make(asset, context, workspace, lineage, partitions):
        shown = _shown(context, workspace, lineage, manifest, partition)
        if by_dagster:
            yield dg.MaterializeResult(data_version=dg.DataVersion(manifest.data_version), metadata=shown)
            return
        run.log(partition, manifest, shown)
        run.log_checks(workspace.lineage(), partition, checks, workspace.models)


def _materialize_one(
    asset: Asset, context: dg.AssetExecutionContext, workspace: Workspace, lineage: Lineage, partition: str | None
) -> dg.MaterializeResult:
    assert asset.compute is not None
    manifest = make_artifact(
        lineage, asset.name, partition, asset.compute, workspace.models, context.log.info, resumable=False
    )
    shown = _shown(context, workspace, lineage, manifest, partition)
    return dg.MaterializeResult(data_version=dg.DataVersion(manifest.data_version), metadata=shown)


def _make(
    asset: Asset, context: dg.AssetExecutionContext, workspace: Workspace, lineage: Lineage, partitions: Sequence[str]
) -> Iterator[tuple[str, Manifest]]:
    """Partitions with their manifests, each as it is in force."""
    log = context.log.info
    backend = workspace.backend if asset.spread else LocalBackend()
    computation: OneByOne | Together
    if asset.compute_together:
        computation = Together(asset.name, asset.compute_together)
    else:
        assert asset.compute is not None
        computation = OneByOne(asset.name, asset.compute)
    progress = Progress(asset.name, len(partitions), "partitions", log)
    for made in backend.make(lineage, computation, partitions, workspace.models, log):
        yield made
        progress(1)


def _in_order(asset: Asset, partitions: Sequence[str]) -> list[str]:
    """Grouped by their first dimension, in the order of its keys: each checkpoint's model is loaded once.

    Recipes in reverse: the UI's overview of an asset shows the partition that was made last, which then is the first
    recipe of the project file, and not a baseline.
    """
    groups = list(dict.fromkeys(key.split("|")[0] for key in partitions))
    ordered = sorted(partitions, key=lambda key: groups.index(key.split("|")[0]))
    return ordered[::-1] if "recipe" in asset.axes else ordered


def _still_there(context: dg.AssetExecutionContext, lineage: Lineage) -> list[str]:
    """The partitions of a range run, without shards that the pool has no more: Dagster goes on offering those.

    A run that asks for nothing else is left as it is, and fails with the reason.
    """
    partitions = list(context.partition_keys)
    axes = ASSETS[context.asset_key.to_user_string()].axes
    if "shard" not in axes:
        return partitions
    shards = set(lineage.pool_files.shard_keys())
    left = [key for key in partitions if key.split("|")[axes.index("shard")] in shards]
    if left and len(left) < len(partitions):
        gone = ", ".join(key for key in partitions if key not in set(left))
        context.log.warning(f"left out, since the pool has these shards no more: {gone}")
    return left or partitions


def _shown(
    context: dg.AssetExecutionContext,
    workspace: Workspace,
    lineage: Lineage,
    manifest: Manifest,
    partition: str | None,
) -> dict[str, Any]:
    """What a person sees at a materialization."""
    dependencies = context.assets_def.get_asset_spec(context.asset_key).deps
    upstream = {dependency.asset_key.to_user_string() for dependency in dependencies}
    stored = Stored(lineage, partition or "", lineage.store.artifact(manifest.key, manifest.fingerprint), manifest)
    shown = shown_metadata(ASSETS[manifest.kind], stored, upstream, workspace.reports_url)
    return shown | track(stored, context.log.warning)
