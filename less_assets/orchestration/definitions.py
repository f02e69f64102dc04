"""From a project file to Dagster definitions; `definitions.py` only calls it, tests call it with their own resources.

Belongs here: putting assets, checks, sensors and resources together. Does not belong here: any of them.
"""

import warnings
from typing import Any

import dagster as dg

from less_assets.compute.models import open_resources
from less_assets.lineage.lineage import shared_settings
from less_assets.lineage.plan import FORMAT_VERSION, digest
from less_assets.orchestration.checks import build_checks
from less_assets.orchestration.console_log import compact_console
from less_assets.orchestration.fairness_checks import build_guardrails
from less_assets.orchestration.partitions import Axes
from less_assets.orchestration.sensors import shard_sensor
from less_assets.project.data_check import not_built
from less_assets.project.project import Project
from less_assets.project.yaml_file import problems_error
from less_assets.steps import (
    baselines,
    evaluation,
    explanations,
    finetuning,
    gradients,
    pool,
    rescoring,
    selection,
    targets,
    warmup,
)


def build_definitions(project: Project, **resource_overrides: Any) -> dg.Definitions:
    """The whole graph of a project.

    Args:
        project: The project file, loaded.
        **resource_overrides: Replace a resource by name: `project`, `store`, `models`, `backend`. `ray_cluster` adds
            one: a `RayResource` of `dagster-ray` (such as `KubeRayCluster`), which makes the cluster that the backend
            `ray` then works on.

    Returns:
        Definitions that load without torch.

    Raises:
        ProjectFileError: The project asks for something that is not there yet.
    """
    if problems := not_built(project):
        raise problems_error(str(project.path), problems)
    axes = Axes(project)
    assets: list[dg.AssetsDefinition] = []
    with warnings.catch_warnings():
        # Backfill policies and partitioned checks; their behaviour is pinned by our tests.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        modules = (
            pool,
            warmup,
            gradients,
            targets,
            baselines,
            selection,
            rescoring,
            finetuning,
            evaluation,
            explanations,
        )
        for module in modules:
            assets += module.build_assets(axes)
        checks = [*build_checks(axes), *build_guardrails(axes)]
    versions = code_versions(project)
    versioned = dg.map_asset_specs(
        lambda spec: spec.replace_attributes(code_version=versions.get(spec.key.to_user_string(), versions["*"])),
        assets,
    )
    resources = open_resources(project) | resource_overrides
    if "ray_cluster" in resources and "backend" not in resource_overrides:
        resources["backend"] = _on_cluster(resources["backend"])
    return dg.Definitions(
        assets=versioned,
        asset_checks=checks,
        resources=resources,
        sensors=[shard_sensor(project)],
        loggers={"console": compact_console},
        executor=dg.in_process_executor,
    )


def _on_cluster(backend: Any) -> dg.ResourceDefinition:
    """The backend as a resource that Dagster opens after the cluster's."""

    @dg.resource(
        required_resource_keys={"ray_cluster"}, description="Hands partitions to the workers of `ray_cluster`."
    )
    def on_cluster(_: dg.InitResourceContext) -> Any:
        return backend

    return on_cluster


def code_versions(project: Project) -> dict[str, str]:
    """`code_version` of each asset: the artifacts' format and the settings all partitions share; `*`: the rest."""
    versions = {asset: digest([FORMAT_VERSION, shared])[:12] for asset, shared in shared_settings(project).items()}
    return {"*": digest([FORMAT_VERSION])[:12], **versions}
