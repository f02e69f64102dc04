"""What an asset is made from, declared once: Dagster's graph, plans and forecasts are all derived from it.

Belongs here: the form of a declaration and the rule by which partitions of one asset read those of another. The
declarations themselves stand beside what each asset computes, in `steps/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from less_assets.lineage.plan import Versions
from less_assets.project.project import Project

if TYPE_CHECKING:
    from less_assets.lineage.lineage import Lineage

Keys = Mapping[str, str]
"""Axis -> key of a partition on it."""
AxisKeys = Callable[[str], Sequence[str]]
"""All keys of an axis."""


@dataclass(frozen=True)
class Input:
    """An asset that another one reads.

    A partition reads the equal key on every axis that both assets have, and all keys on the others.

    Attributes:
        asset: Name of the asset that is read.
        read_by: Which recipes read it, by key; None: all. Only for assets with the axis `recipe`.
        of_recipe: The recipe whose partition a recipe reads, by key; None: its own.
        with_folds: Whether a task's partition reads those of its folds besides its own.
    """

    asset: str
    read_by: Callable[[Project, str], bool] | None = None
    of_recipe: Callable[[Project, str], str] | None = None
    with_folds: bool = False


def _nothing(lineage: "Lineage", keys: Keys) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What an asset is made from, and where its artifacts lie.

    Attributes:
        name: Name of the asset.
        axes: What it is partitioned by, in Dagster's order: by name.
        inputs: The assets that it reads.
        folder: Axis folder in the store, with the axes in braces; its `current.json` names the artifact in force.
        shared_folder: Folder of the artifacts where equal work of several partitions is shared; None: `folder`.
        settings: Settings of a partition that could change its numbers.
        shared_settings: Those of them that all partitions share, for Dagster's `code_version`; None: there are none.
        outside: Versions of what a partition is made from and no asset stands for, such as files.
        determined_by: From a partition's inputs to the part of them that its content depends on; None: all.
        needed_by: The recipes that need the asset, by key; None: it always exists.
        of_folds: Whether a task without one of its folds has it, too.
    """

    name: str
    axes: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    folder: str
    shared_folder: str | None = None
    settings: Callable[["Lineage", Keys], Mapping[str, Any]] = _nothing
    shared_settings: Callable[[Project], Mapping[str, Any]] | None = None
    outside: Callable[["Lineage", Keys], Versions] = _nothing
    determined_by: Callable[["Lineage", Keys, Versions], Versions] | None = None
    needed_by: Callable[[Project, str], bool] | None = None
    of_folds: bool = True

    def keys(self, partition: str | None) -> Keys:
        """A partition key by axis."""
        return dict(zip(self.axes, partition.split("|"), strict=True)) if partition else {}

    def partition(self, keys: Keys) -> str | None:
        """The partition key of some keys by axis, of which there may be more than the asset has axes."""
        return "|".join(keys[axis] for axis in self.axes) or None

    def recipes(self, project: Project) -> list[str]:
        """Keys of the recipes that need the asset."""
        return [key for key in project.recipe_keys if self.needed_by is None or self.needed_by(project, key)]

    def exists(self, project: Project) -> bool:
        """Whether the project has the asset: it always does, unless no recipe needs it."""
        return self.needed_by is None or bool(self.recipes(project))

    def partitions(self, project: Project, keys_of: AxisKeys) -> list[str | None]:
        """All partition keys; of grids of recipes those of the recipes that need the asset."""
        return self._product(project, keys_of, {})

    def read(
        self, project: Project, reader: "Declaration", read: Input, keys: Keys, keys_of: AxisKeys
    ) -> list[str | None]:
        """The partitions of this asset that a partition of another one reads.

        Args:
            project: The project file.
            reader: The asset that reads.
            read: The input of `reader` that names this asset.
            keys: The reader's partition.
            keys_of: All keys of an axis.
        """
        fixed = {axis: [key] for axis, key in keys.items() if axis in self.axes}
        if read.with_folds and "task" in fixed:
            fixed["task"] += project.folds_of(keys["task"])
        if recipe := keys.get("recipe"):
            if read.read_by is not None and not read.read_by(project, recipe):
                return []
            if read.of_recipe is not None:
                fixed["recipe"] = [read.of_recipe(project, recipe)]
        return self._product(project, keys_of, fixed)

    def _product(self, project: Project, keys_of: AxisKeys, fixed: Mapping[str, Sequence[str]]) -> list[str | None]:
        left_out = {
            "recipe": set(project.recipe_keys) - set(self.recipes(project)),
            "task": set() if self.of_folds else set(project.folds),
        }
        choices = [
            [key for key in (fixed[axis] if axis in fixed else keys_of(axis)) if key not in left_out.get(axis, ())]
            for axis in self.axes
        ]
        return ["|".join(keys) or None for keys in product(*choices)] if self.exists(project) else []


def axis_keys(project: Project, shards: Callable[[], Sequence[str]]) -> AxisKeys:
    """All keys of each axis of a project.

    Args:
        project: The project file.
        shards: Gives the keys of the pool's shards, when they are asked for.
    """
    fixed = {"checkpoint": project.checkpoints, "task": project.task_keys, "recipe": list(project.recipe_keys)}
    return lambda axis: fixed[axis] if axis in fixed else shards()
