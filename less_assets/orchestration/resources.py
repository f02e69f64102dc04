"""What assets are given in Dagster: one workspace with the project file, the artifact store, models and backend.

Belongs here: opening these things for a run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dagster as dg

from less_assets.compute.backends import open_backend
from less_assets.compute.models import ModelLoader, cache_folder, spared_from_collection
from less_assets.compute.step import Backend
from less_assets.lineage.lineage import Lineage
from less_assets.project.project import Project
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.artifacts import ArtifactStore


@dataclass(frozen=True)
class Workspace:
    """What a run works with.

    Attributes:
        project: The project file.
        store: Where artifacts are kept.
        models: Loads models on demand; one for each run.
        backend: Where partitions are made.
        reports_url: Where a page shows the reports; None: nowhere.
    """

    project: Project
    store: ArtifactStore
    models: ModelLoader
    backend: Backend
    reports_url: str | None = None

    def lineage(self) -> Lineage:
        """The plans as they stand now."""
        return open_lineage(self.project, self.store)


def workspace_resource(
    project: Project, store: ArtifactStore, backend: Backend | None, required: set[str], reports_url: str | None
) -> dg.ResourceDefinition:
    """The workspace of a project, opened anew for each run.

    Args:
        project: The project file.
        store: Where artifacts are kept.
        backend: Where partitions are made; None: as the project file says.
        required: Resources that have to be opened before it, such as a cluster.
        reports_url: Where a page shows the reports; None: nowhere.
    """

    @dg.resource(required_resource_keys=required, description="Project file, artifact store, models and backend.")
    def workspace(_: dg.InitResourceContext) -> Iterator[Workspace]:
        models = ModelLoader(project, cache_folder(store))
        with spared_from_collection():
            yield Workspace(project, store, models, backend or open_backend(project), reports_url)
            models.forget()

    return workspace


def open_resources(project: Project, reports_url: str | None = None, **overrides: Any) -> dict[str, Any]:
    """The resources of a project, by the names that assets ask for.

    Args:
        project: The project file.
        reports_url: Where a page shows the reports; None: nowhere.
        **overrides: `store`, `backend`, `workspace`: in place of those that the project names; anything else (such as
            `ray_cluster`) is a resource of its own, opened before the workspace.
    """
    store = overrides.pop("store", None) or open_store(project)
    backend = overrides.pop("backend", None)
    workspace = overrides.pop("workspace", None)
    workspace = workspace or workspace_resource(project, store, backend, set(overrides), reports_url)
    return {**overrides, "store": store, "workspace": workspace}
