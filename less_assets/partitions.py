"""The four axes of the graph, its grids, and every partition mapping: one place.

Belongs here: which partition of which asset feeds which. Does not belong here: what assets compute.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import dagster as dg

from less_assets.project import Project

SHARDS = dg.DynamicPartitionsDefinition(name="shard")


@dataclass(frozen=True)
class Axes:
    """Partition definitions of one project, and the mappings that Dagster cannot infer.

    Dagster infers the mapping between a grid and one of its own dimensions, and between partitioned and unpartitioned
    assets. It does not infer one axis to an unrelated one, nor one grid to another: left out, those load silently
    as "no parents" (see `tests/test_partitions.py`).
    """

    project: Project
    checkpoint: dg.StaticPartitionsDefinition = field(init=False)
    task: dg.StaticPartitionsDefinition = field(init=False)
    recipe: dg.StaticPartitionsDefinition = field(init=False)
    checkpoint_shard: dg.MultiPartitionsDefinition = field(init=False)
    checkpoint_task: dg.MultiPartitionsDefinition = field(init=False)
    recipe_task: dg.MultiPartitionsDefinition = field(init=False)

    def __post_init__(self) -> None:
        checkpoint = dg.StaticPartitionsDefinition(list(self.project.checkpoints))
        task = dg.StaticPartitionsDefinition(list(self.project.task_names))
        recipe = dg.StaticPartitionsDefinition(list(self.project.recipe_keys))
        for name, value in {
            "checkpoint": checkpoint,
            "task": task,
            "recipe": recipe,
            "checkpoint_shard": dg.MultiPartitionsDefinition({"checkpoint": checkpoint, "shard": SHARDS}),
            "checkpoint_task": dg.MultiPartitionsDefinition({"checkpoint": checkpoint, "task": task}),
            "recipe_task": dg.MultiPartitionsDefinition({"recipe": recipe, "task": task}),
        }.items():
            object.__setattr__(self, name, value)

    def by_task(self, asset: str) -> dg.AssetDep:
        """Dependency of a recipe x task grid on the `task` partition of an asset partitioned by task."""
        return dg.AssetDep(asset, partition_mapping=_single_to_grid("task"))

    def by_recipe(self, asset: str) -> dg.AssetDep:
        """Dependency of a recipe x task grid on the `recipe` partition of an asset partitioned by recipe."""
        return dg.AssetDep(asset, partition_mapping=_single_to_grid("recipe"))

    def all_partitions(self, asset: str) -> dg.AssetDep:
        """Dependency on every partition of an asset whose axes this one does not share."""
        return dg.AssetDep(asset, partition_mapping=dg.AllPartitionMapping())

    def for_recipes(self, asset: str, recipes: Iterable[str]) -> dg.AssetDep:
        """Dependency of a recipe x task grid on a task's partition, for the recipes that read it and no others.

        So `random` never becomes stale because influence scores changed.
        """
        readers = list(recipes)
        downstream = {
            task: [dg.MultiPartitionKey({"recipe": recipe, "task": task}) for recipe in readers]
            for task in self.project.task_names
        }
        return dg.AssetDep(asset, partition_mapping=dg.StaticPartitionMapping(downstream))


def _single_to_grid(dimension: str) -> dg.PartitionMapping:
    from dagster._utils.warnings import disable_dagster_warnings

    # Beta in Dagster 1.13 and what it infers itself where it can; written out because grids can hide it.
    with disable_dagster_warnings():
        return dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name=dimension)


def by_checkpoint(partition_keys: Sequence[str], other: str) -> dict[str, list[dg.MultiPartitionKey]]:
    """Group the keys of a checkpoint grid by checkpoint, however Dagster cut the range.

    Args:
        partition_keys: Keys of a run, as `context.partition_keys` gives them.
        other: Name of the second dimension (`shard` or `task`); only used to check the keys.

    Returns:
        checkpoint → its keys, both in the order given: so that each checkpoint is loaded once.
    """
    grouped: dict[str, list[dg.MultiPartitionKey]] = {}
    for key in partition_keys:
        if not isinstance(key, dg.MultiPartitionKey) or other not in key.keys_by_dimension:
            raise TypeError(f"not a key of the checkpoint x {other} grid: {key!r}")
        grouped.setdefault(key.keys_by_dimension["checkpoint"], []).append(key)
    return grouped


def dimensions(partition_key: str) -> dict[str, str]:
    """The parts of a grid key by dimension name: `{"recipe": "less", "task": "bbh"}`."""
    if not isinstance(partition_key, dg.MultiPartitionKey):
        raise TypeError(f"not a grid key: {partition_key!r}")
    return dict(partition_key.keys_by_dimension)
