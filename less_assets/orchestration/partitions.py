"""The four axes of the graph, its grids, and every partition mapping: one place.

Belongs here: which partition of which asset feeds which. Does not belong here: what assets compute.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from less_assets.project.project import OPTIONAL_ASSETS, Project

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
    "pool_embeddings": ("shard",),
    "target_embeddings": ("task",),
    "embedding_scores": ("recipe", "task"),
    "text_scores": ("recipe", "task"),
    "exact_scores": ("recipe", "task"),
    "selected_subset": ("recipe", "task"),
    "token_attribution": ("recipe", "task"),
    "selection_report": ("recipe", "task"),
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
    assets. It does not infer one axis to an unrelated one, nor one list of keys to another: left out, those load
    silently as "no parents" (see `tests/test_partitions.py`).
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
            else self._recipes_by_task(self.project.recipe_keys)
            if axes == ("recipe", "task")
            else dg.MultiPartitionsDefinition({axis: self._single[axis] for axis in axes})
            for axes in set(ASSET_AXES.values())
            if axes
        }

    def _recipes_by_task(self, recipes: Iterable[str]) -> dg.StaticPartitionsDefinition:
        """The keys `recipe|task` of some recipes.

        One dimension, written out: some recipes read scores and others do not, and Dagster follows such a mapping in
        both directions (backfills need that) only between two static dimensions. In the launch dialog, type `|bbh` and
        select all: every recipe of a task.
        """
        return dg.StaticPartitionsDefinition([f"{recipe}|{task}" for recipe in recipes for task in self._tasks])

    @property
    def _tasks(self) -> list[str]:
        return list(self.project.task_names)

    def of(self, asset: str) -> dg.PartitionsDefinition | None:
        """Partitions definition of an asset; None if it is unpartitioned, or if no recipe needs it."""
        if asset in OPTIONAL_ASSETS:
            recipes = self.needed_by(asset)
            if not recipes:
                return None
            if "recipe" in ASSET_AXES[asset]:
                return self._recipes_by_task(recipes)
        return self._definitions.get(ASSET_AXES[asset])

    def needed_by(self, asset: str) -> list[str]:
        """Keys of the recipes that need one of `OPTIONAL_ASSETS`."""
        return [key for key in self.project.recipe_keys if self.project.needs(key, asset)]

    def by_task(self, asset: str, recipes: Iterable[str] | None = None) -> dg.AssetDep:
        """Dependency of `recipe|task` on the task's partition of an asset.

        Args:
            asset: An asset partitioned by task.
            recipes: Keys of the recipes that read it, and no others: so `random` never becomes stale because influence
                scores changed. None: all.
        """
        readers = list(self.project.recipe_keys if recipes is None else recipes)
        return _static(asset, {task: [f"{recipe}|{task}" for recipe in readers] for task in self._tasks})

    def by_recipe(self, asset: str, recipes: Iterable[str] | None = None) -> dg.AssetDep:
        """Dependency of `recipe|task` on the recipe's partition of an asset; `recipes` as in `by_task`."""
        readers = list(self.project.recipe_keys if recipes is None else recipes)
        return _static(asset, {recipe: [f"{recipe}|{task}" for task in self._tasks] for recipe in readers})

    def same_key(self, asset: str, recipes: Iterable[str]) -> dg.AssetDep:
        """Dependency of `recipe|task` on the equal key of an asset, for some recipes and no others."""
        keys = [f"{recipe}|{task}" for recipe in recipes for task in self._tasks]
        return _static(asset, {key: [key] for key in keys})

    def scores_of_recipes(self, asset: str) -> dg.AssetDep:
        """Dependency of `recipe|task` on the scores that the recipe ranks by, an asset of some recipes only.

        These are its own, or those of the recipe whose rows' lengths it matches; the other recipes depend on none.
        """
        readers = {
            key: [reader for reader in self.project.recipe_keys if self.project.ranked_by(reader) == key]
            for key in self.needed_by(asset)
        }
        children = {
            f"{key}|{task}": [f"{reader}|{task}" for reader in found]
            for key, found in readers.items()
            for task in self._tasks
        }
        return _static(asset, children)

    def all_recipes(self, asset: str) -> dg.AssetDep:
        """Dependency of a task on every `recipe|task` of an asset."""
        keys = [(f"{recipe}|{task}", [task]) for recipe in self.project.recipe_keys for task in self._tasks]
        return _static(asset, dict(keys))

    def all_partitions(self, asset: str) -> dg.AssetDep:
        """Dependency on every partition of an asset whose axes this one does not share."""
        return dg.AssetDep(asset, partition_mapping=dg.AllPartitionMapping())


def _static(asset: str, children: dict[str, list[str]]) -> dg.AssetDep:
    return dg.AssetDep(asset, partition_mapping=dg.StaticPartitionMapping(children))
