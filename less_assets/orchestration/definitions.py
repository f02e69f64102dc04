"""From a project file to Dagster definitions; `definitions.py` only calls it, tests call it with their own resources.

Belongs here: one Dagster asset for each declared asset, one Dagster check for each declared check, put together. Not
here: what any of them does.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import dagster as dg

from less_assets.errors import LessAssetsError
from less_assets.lineage.plan import digest
from less_assets.orchestration.automation import settings_condition, settings_sensor
from less_assets.orchestration.console_log import compact_console
from less_assets.orchestration.materialization import materialize
from less_assets.orchestration.partitions import Axes
from less_assets.orchestration.resources import Workspace, open_resources
from less_assets.orchestration.sensors import shard_sensor
from less_assets.orchestration.ui_metadata import check_result, described, tags_of
from less_assets.project.data_check import not_built
from less_assets.project.project import Project
from less_assets.project.yaml_file import problems_error
from less_assets.steps.asset import Asset, Check
from less_assets.steps.registry import ASSETS
from less_assets.store.manifest import FORMAT_VERSION


def build_definitions(project: Project, *, reports_url: str | None = None, **resource_overrides: Any) -> dg.Definitions:
    """The whole graph of a project.

    Args:
        project: The project file, loaded.
        reports_url: Where a page shows the reports; None: nowhere, and no link leads to one.
        **resource_overrides: Replace a resource by name: `store`, `backend`, `workspace`. Others are added, and opened
            before the workspace: `ray_cluster`, a `RayResource` of `dagster-ray` (such as `KubeRayCluster`), makes the
            cluster that the backend `ray` then works on.

    Returns:
        Definitions that load without torch.

    Raises:
        ProjectFileError: The project asks for something that is not there yet.
    """
    if problems := not_built(project):
        raise problems_error(str(project.path), problems)
    axes = Axes(project)
    assets = [asset for asset in ASSETS.values() if asset.exists(project)]
    versions = code_versions(project)
    with warnings.catch_warnings():
        # Backfill policies and partitioned checks; their behaviour is pinned by our tests.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.Definitions(
            assets=[_dagster_asset(asset, axes, versions[asset.name], reports_url) for asset in assets],
            asset_checks=[_dagster_check(asset, check, axes) for asset in assets for check in asset.checks_in(project)],
            resources=open_resources(project, reports_url, **resource_overrides),
            sensors=[shard_sensor(project), settings_sensor([asset.name for asset in assets if asset.automatic])],
            loggers={"console": compact_console},
            executor=dg.in_process_executor,
        )


def _dagster_asset(asset: Asset, axes: Axes, code_version: str, reports_url: str | None) -> dg.AssetsDefinition:
    @dg.asset(
        name=asset.name,
        description=described(asset, axes.project, reports_url),
        group_name=asset.group,
        owners=[f"team:{axes.project.name}"],
        kinds=set(asset.kinds),
        tags=tags_of(asset),
        automation_condition=settings_condition(axes.project) if asset.automatic else None,
        pool="gpu" if asset.loads_model else None,
        partitions_def=axes.of(asset),
        deps=axes.dependencies(asset),
        code_version=code_version,
        backfill_policy=dg.BackfillPolicy.single_run() if asset.in_ranges else None,
        output_required=not asset.in_ranges,
    )
    def made(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> Iterator[dg.MaterializeResult]:
        yield from materialize(asset, context, workspace)

    return made


def _dagster_check(asset: Asset, check: Check, axes: Axes) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        name=check.name,
        asset=asset.name,
        description=check.description,
        partitions_def=axes.of(asset),
        pool="gpu" if check.loads_model else None,
    )
    def judged(context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]) -> dg.AssetCheckResult:
        partition = _partition_of(context) if asset.axes else ""
        return check_result(check.judge(workspace.lineage(), partition, workspace.models, context.log.info))

    return judged


def _partition_of(context: dg.AssetCheckExecutionContext) -> str:
    """The one partition that a check looks at.

    Raises:
        LessAssetsError: The run has none, or several.
    """
    if not context.has_partition_key:
        raise LessAssetsError(
            f"The check {context.check_specs[0].name} looks at one partition, and this run has none or a range.",
            where=context.check_specs[0].asset_key.to_user_string(),
            fix="Materialize a single partition of the asset in Dagster, which runs its checks too; "
            "`less-assets run` checks each partition that it makes.",
        )
    return str(context.partition_key)


def code_versions(project: Project) -> dict[str, str]:
    """`code_version` of each asset that the project has: the format and the settings that all its partitions share."""
    versions = {}
    for asset in ASSETS.values():
        if asset.exists(project):
            shared = [asset.shared_settings(project)] if asset.shared_settings else []
            versions[asset.name] = digest([FORMAT_VERSION, *shared])[:12]
    return versions
