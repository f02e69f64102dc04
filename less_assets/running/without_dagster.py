"""Making one artifact and all that it needs in this process, without Dagster: for notebooks.

Belongs here: which partitions are needed, and the order in which they are made. Nothing is recorded for the UI, and no
checks are made; `runner.py` does both.
"""

from less_assets.compute.models import ModelLoader, cache_folder, spared_from_collection
from less_assets.compute.step import Log, make_artifact, make_together
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import Project
from less_assets.steps.asset import Asset
from less_assets.steps.registry import ASSETS, open_lineage
from less_assets.store.artifacts import ArtifactStore


def make_with_inputs(project: Project, store: ArtifactStore, asset: str, partition: str | None, log: Log) -> Lineage:
    """Make a partition of an asset and whatever it needs that is missing or stale.

    Args:
        project: The project.
        store: Where artifacts are kept; what is there already and matches is not made again.
        asset: Name of the asset.
        partition: Its partition key; None for an unpartitioned asset.
        log: Receives a line for each asset that has something to make, and progress lines.

    Returns:
        The lineage as it stands then, which reads what was made.

    Raises:
        LessAssetsError: Something cannot be made. What was made before stays.
    """
    PoolFiles.scan(project, store)
    models = ModelLoader(project, cache_folder(store))
    with spared_from_collection():
        for name, partitions in _needed(open_lineage(project, store), asset, partition).items():
            lineage = open_lineage(project, store)
            due = [key for key in partitions if lineage.status(name, key).state != "fresh"]
            if due:
                log(f"{name}: {len(due)} of {len(partitions)} to make")
                _make(lineage, ASSETS[name], due, models, log)
        models.forget()
    return open_lineage(project, store)


def _needed(lineage: Lineage, asset: str, partition: str | None) -> dict[str, list[str | None]]:
    """Partitions of each asset that are needed, upstream first."""
    needed: dict[str, dict[str | None, None]] = {name: {} for name in ASSETS}
    needed[asset] = {partition: None}
    for name in reversed(ASSETS):
        declared = ASSETS[name]
        for key in needed[name]:
            for read in declared.inputs:
                upstream = ASSETS[read.asset]
                keys = upstream.read(lineage.project, declared, read, declared.keys(key), lineage.keys_of)
                needed[read.asset] |= dict.fromkeys(keys)
    return {name: list(keys) for name, keys in needed.items() if keys}


def _make(lineage: Lineage, asset: Asset, due: list[str | None], models: ModelLoader, log: Log) -> None:
    if asset.before:
        asset.before(lineage)
    if asset.compute_together:
        # Exhausted for its effect: it yields each partition as it is put in force.
        list(make_together(lineage, asset.name, list(map(str, due)), asset.compute_together, models, log))
        return
    assert asset.compute is not None
    for partition in due:
        make_artifact(lineage, asset.name, partition, asset.compute, models, log, resumable=asset.in_ranges)
