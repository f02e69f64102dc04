"""What a person asks a run for, and which partitions of which assets that needs.

Belongs here: what follows from the declarations alone, without Dagster: a command with nothing to do need not load it.
How the partitions are run, and in which runs, is `runner.py`.
"""

from dataclasses import dataclass

from less_assets.lineage.lineage import Lineage
from less_assets.project.project import Project
from less_assets.steps.asset import Asset
from less_assets.steps.registry import ASSETS

Partition = str | None


@dataclass(frozen=True)
class Request:
    """What a person asked for.

    Attributes:
        tasks: Only these tasks; empty for all.
        recipes: Only these recipe keys; empty for all.
        until: Stop with this asset; None runs everything.
        verify: Compare every stored file with its digest; what is damaged is made again.
        extras: Also make what only explains (token attribution, reports), and certificates of scores.
    """

    tasks: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    until: str | None = None
    verify: bool = False
    extras: bool = True


def needed(lineage: Lineage, request: Request) -> dict[str, list[Partition]]:
    """Which partitions of which assets a request needs, in the order of a run.

    Follows the graph upwards from what was asked for, partition by partition: `--recipe random` needs no gradients,
    `--task bbh` no other task's.

    Args:
        lineage: The project and its pool as last scanned.
        request: What was asked for.
    """
    project, keys_of = lineage.project, lineage.keys_of
    order = run_order(project)
    partitions = {asset.name: asset.partitions(project, keys_of) for asset in order}
    wanted: dict[str, set[Partition]] = {asset.name: set() for asset in order}
    for asset in order:
        if request.until in (None, asset.name) and (request.extras or not asset.explains):
            wanted[asset.name] = {key for key in partitions[asset.name] if _is_asked_for(asset, key, request)}
    for asset in reversed(order):
        for key in wanted[asset.name]:
            for read in asset.inputs:
                upstream = ASSETS[read.asset]
                if upstream.exists(project):
                    wanted[read.asset].update(upstream.read(project, asset, read, asset.keys(key), keys_of))
    return {
        asset.name: [key for key in partitions[asset.name] if key in wanted[asset.name]]
        for asset in order
        if wanted[asset.name]
    }


def run_order(project: Project) -> list[Asset]:
    """The project's assets, each after those that it reads, and those that explain last; else by name, as in Dagster.

    Args:
        project: The project file.
    """
    level: dict[str, int] = {}
    for name, asset in ASSETS.items():
        if asset.exists(project):
            read = [level[read.asset] for read in asset.inputs if read.asset in level and read.is_read(project, asset)]
            level[name] = 1 + max(read, default=0)
    return [ASSETS[name] for name in sorted(level, key=lambda name: (ASSETS[name].explains, level[name], name))]


def _is_asked_for(asset: Asset, partition: Partition, request: Request) -> bool:
    """Whether a partition is among those named: on every axis that the request names, it has one of the names."""
    filters = {axis: names for axis, names in (("task", request.tasks), ("recipe", request.recipes)) if names}
    if request.until is None and not filters.keys() <= set(asset.axes):
        return False  # it covers more than was asked for; what is needed of it follows from the graph
    keys = asset.keys(partition)
    return all(keys[axis] in names for axis, names in filters.items() if axis in keys)
