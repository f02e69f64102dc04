"""The four axes of the graph, its grids, and every partition mapping: one place.

Belongs here: which partition of which asset feeds which. Does not belong here: what assets compute.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from less_assets.project import Project

# The axes of every asset, in Dagster's order: by name.
ASSET_AXES: dict[str, tuple[str, ...]] = {
    "base_model": (),
    "instruction_pool": ("shard",),
    "pool_index": (),
    "warmup_sample": (),
    "warmup_checkpoints": ("checkpoint",),
    "train_gradients": ("checkpoint", "shard"),
    "gradient_datastore": ("checkpoint",),
    "target_examples": ("task",),
    "target_gradients": ("checkpoint", "task"),
    "influence_scores": ("task",),
    "recipe_settings": ("recipe",),
    "exact_scores": ("recipe", "task"),
    "selected_subset": ("recipe", "task"),
    "finetuned_model": ("recipe", "task"),
    "eval_results": ("recipe", "task"),
    "task_results": ("task",),
    "leaderboard": (),
}
SHARDS = dg.DynamicPartitionsDefinition(name="shard")


@dataclass(frozen=True)
class Axes:
    """Partition definitions of one project, and the mappings that Dagster cannot infer.

    Dagster infers the mapping between a grid and one of its own dimensions, and between partitioned and unpartitioned
    assets. It does not infer one axis to an unrelated one, nor one grid to another: left out, those load silently
    as "no parents" (see `tests/test_partitions.py`).
    """

    project: Project

    @cached_property
    def _single(self) -> dict[str, dg.PartitionsDefinition]:
        return {
            "checkpoint": dg.StaticPartitionsDefinition(list(self.project.checkpoints)),
            "task": dg.StaticPartitionsDefinition(list(self.project.task_names)),
            "recipe": dg.StaticPartitionsDefinition(list(self.project.recipe_keys)),
            "shard": SHARDS,
        }

    @cached_property
    def _definitions(self) -> dict[tuple[str, ...], dg.PartitionsDefinition]:
        return {
            axes: self._single[axes[0]]
            if len(axes) == 1
            else dg.MultiPartitionsDefinition({axis: self._single[axis] for axis in axes})
            for axes in set(ASSET_AXES.values())
            if axes
        }

    def of(self, asset: str) -> dg.PartitionsDefinition | None:
        """Partitions definition of an asset; None if it is unpartitioned."""
        if asset == "exact_scores":
            return self._rescoring
        return self._definitions.get(ASSET_AXES[asset])

    @cached_property
    def _rescoring(self) -> dg.PartitionsDefinition | None:
        """The recipe × task grid of the recipes that rescore exactly; None if there are none."""
        recipes = self.rescoring_recipes
        if not recipes:
            return None
        return dg.MultiPartitionsDefinition(
            {"recipe": dg.StaticPartitionsDefinition(recipes), "task": self._single["task"]}
        )

    @cached_property
    def rescoring_recipes(self) -> list[str]:
        """Keys of the recipes that rescore exactly."""
        return [key for key, recipe in self.project.recipe_keys.items() if recipe.candidates is not None]

    def by_task(self, asset: str) -> dg.AssetDep:
        """Dependency of a recipe x task grid on the `task` partition of an asset partitioned by task."""
        return dg.AssetDep(asset, partition_mapping=_single_to_grid("task"))

    def by_recipe(self, asset: str) -> dg.AssetDep:
        """Dependency of a recipe x task grid on the `recipe` partition of an asset partitioned by recipe."""
        return dg.AssetDep(asset, partition_mapping=_single_to_grid("recipe"))

    def by_rescoring_recipe(self, asset: str) -> dg.AssetDep:
        """Dependency of the grid of rescoring recipes on the `recipe` partition of an asset partitioned by recipe."""
        downstream = {
            recipe: [dg.MultiPartitionKey({"recipe": recipe, "task": task}) for task in self.project.task_names]
            for recipe in self.rescoring_recipes
        }
        return dg.AssetDep(asset, partition_mapping=dg.StaticPartitionMapping(downstream))

    def all_partitions(self, asset: str) -> dg.AssetDep:
        """Dependency on every partition of an asset whose axes this one does not share."""
        return dg.AssetDep(asset, partition_mapping=dg.AllPartitionMapping())

    def same_recipes(self, asset: str) -> dg.AssetDep:
        """Dependency of the recipe x task grid on a grid of some of its recipes: equal keys, none for the others."""
        recipes = {key: key for key in self.rescoring_recipes}
        mapping = dg.MultiPartitionMapping(
            {
                "recipe": dg.DimensionPartitionMapping("recipe", dg.StaticPartitionMapping(recipes)),
                "task": dg.DimensionPartitionMapping("task", dg.IdentityPartitionMapping()),
            }
        )
        return dg.AssetDep(asset, partition_mapping=mapping)

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
