"""What assets are made from, the plans of their artifacts, and whether what is stored still matches them.

Belongs here: the form of a declaration, the rule by which partitions of one asset read those of another, and the way
from declarations to plans and stored artifacts. Not here: the declarations themselves, which stand in `steps/` beside
what each asset computes; computing anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Never

from pydantic import JsonValue

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.plan import ArtifactPlan, Versions
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import Project
from less_assets.project.recipes import PREFILTER
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest

Keys = Mapping[str, str]
"""Axis -> key of a partition on it."""
AxisKeys = Callable[[str], Sequence[str]]
"""All keys of an axis."""


@dataclass(frozen=True)
class Input:
    """An asset that another one reads.

    A partition reads the equal key on every axis that both assets have, of the axis `pilot` the keys of its own
    recipe's pilots, and all keys on the others.

    Attributes:
        asset: Name of the asset that is read.
        read_by: Which recipes, or pilots, read it, by key; None: all. Only for assets with one of these axes.
        of_recipes: The recipes whose partitions a recipe, or pilot, reads, by key; None: its own.
        with_folds: Whether a task's partition reads those of its folds besides its own.
        of_prefilter: Whether an asset without the axis `recipe` reads the prefilter's partition on it; else all.
    """

    asset: str
    read_by: Callable[[Project, str], bool] | None = None
    of_recipes: Callable[[Project, str], Sequence[str]] | None = None
    with_folds: bool = False
    of_prefilter: bool = False

    def is_read(self, project: Project, reader: "Declaration") -> bool:
        """Whether any recipe of the asset that has this input reads it."""
        return self.read_by is None or any(self.read_by(project, recipe) for recipe in reader.recipes(project))


def _nothing(lineage: "Lineage", keys: Keys) -> Mapping[str, Never]:
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
        of_weightless: Whether a checkpoint whose weight is 0, which changes no score, has it, too.
        of_prefilter: Whether the prefilter needs it as a recipe of its strategy does (then `needed_by` is asked).
        entry: HTML file of its artifacts that `index.html` in `folder` leads to, whichever is in force; None: none.
    """

    name: str
    axes: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    folder: str
    shared_folder: str | None = None
    settings: Callable[["Lineage", Keys], Mapping[str, JsonValue]] = _nothing
    shared_settings: Callable[[Project], Mapping[str, JsonValue]] | None = None
    outside: Callable[["Lineage", Keys], Versions] = _nothing
    determined_by: Callable[["Lineage", Keys, Versions], Versions] | None = None
    needed_by: Callable[[Project, str], bool] | None = None
    of_folds: bool = True
    of_weightless: bool = True
    of_prefilter: bool = False
    entry: str | None = None

    def keys(self, partition: str | None) -> Keys:
        """A partition key by axis."""
        return dict(zip(self.axes, partition.split("|"), strict=True)) if partition else {}

    def partition(self, keys: Keys) -> str | None:
        """The partition key of some keys by axis, of which there may be more than the asset has axes."""
        return "|".join(keys[axis] for axis in self.axes) or None

    def recipes(self, project: Project) -> list[str]:
        """Keys of the recipes that need the asset, that of the prefilter among them."""
        keys = [*(project.prefilter_recipe if self.of_prefilter else ()), *project.recipe_keys]
        return [key for key in keys if self.needed_by is None or self.needed_by(project, key)]

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
        fixed: dict[str, Sequence[str]] = {axis: [key] for axis, key in keys.items() if axis in self.axes}
        if read.with_folds and "task" in fixed:
            fixed["task"] = [keys["task"], *project.folds_of(keys["task"])]
        if read.of_prefilter:
            if PREFILTER not in self.recipes(project):
                return []
            fixed["recipe"] = [PREFILTER]
        if selecting := keys.get("recipe") or keys.get("pilot"):
            if read.read_by is not None and not read.read_by(project, selecting):
                return []
            if read.of_recipes is not None:
                fixed["recipe"] = read.of_recipes(project, selecting)
        if "recipe" in keys and "pilot" in self.axes:
            fixed["pilot"] = project.pilots_of(keys["recipe"])
        return self._product(project, keys_of, fixed)

    def _product(self, project: Project, keys_of: AxisKeys, fixed: Mapping[str, Sequence[str]]) -> list[str | None]:
        if not self.exists(project):
            return []
        recipes = self.recipes(project)
        choices = {axis: recipes if axis == "recipe" else keys_of(axis) for axis in self.axes} | dict(fixed)
        combined = (dict(zip(self.axes, keys, strict=True)) for keys in product(*(choices[axis] for axis in self.axes)))
        return [self.partition(keys) for keys in combined if self._has(project, recipes, keys)]

    def _has(self, project: Project, recipes: Sequence[str], keys: Keys) -> bool:
        """Whether the asset has a partition, given the recipes that need it."""
        recipe = keys.get("recipe")
        if recipe is not None and recipe not in recipes:
            return False
        # What the prefilter keeps for a task serves its folds, too.
        if keys.get("task") in project.folds and (not self.of_folds or recipe == PREFILTER):
            return False
        return project.combines(keys)


def axis_keys(project: Project, shards: Callable[[], Sequence[str]]) -> AxisKeys:
    """All keys of each axis of a project.

    Args:
        project: The project file.
        shards: Gives the keys of the pool's shards, when they are asked for.
    """
    fixed = {"checkpoint": project.checkpoints, "task": project.task_keys}
    fixed |= {"recipe": list(project.recipe_keys), "pilot": list(project.pilots)}
    return lambda axis: fixed[axis] if axis in fixed else shards()


@dataclass(frozen=True)
class Status:
    """Whether an artifact is there and matches its plan.

    Attributes:
        state: `missing`: never made, or its data is gone. `stale`: made from something else. `blocked`: what it needs
            is itself missing or stale.
        reasons: One line each; empty when fresh.
    """

    state: Literal["fresh", "stale", "missing", "blocked"]
    reasons: tuple[str, ...] = ()


class Lineage:
    """The plans of one project against one store, as they stand now; make a new one after anything was materialized.

    Args:
        project: The project file.
        store: Where artifacts are kept.
        declarations: What each asset is made from, by name (`steps.registry.open_lineage` gives them).
        verify_files: Whether `status` compares every file with its digest; reads everything that is stored.
    """

    def __init__(
        self,
        project: Project,
        store: ArtifactStore,
        declarations: Mapping[str, Declaration],
        *,
        verify_files: bool = False,
    ) -> None:
        self.project, self.store, self.declarations, self.verify_files = project, store, declarations, verify_files
        self.keys_of = axis_keys(project, lambda: self.pool_files.shard_keys())
        self._plans: dict[tuple[str, str | None], ArtifactPlan] = {}
        self._fresh: dict[tuple[str, str | None], Manifest] = {}
        self._pool_files: PoolFiles | None = None

    @property
    def pool_files(self) -> PoolFiles:
        """The pool's files and shards as last scanned."""
        if self._pool_files is None:
            self._pool_files = PoolFiles.load(self.store)
        return self._pool_files

    def plan(self, asset: str, partition: str | None = None) -> ArtifactPlan:
        """What the artifact is going to be made from.

        Raises:
            MissingArtifactError: Something it needs was never made.
            StaleArtifactError: Something it needs was made from other settings or inputs than the ones in force.
        """
        key = (asset, partition)
        if key not in self._plans:
            self._plans[key] = self._plan(self.declarations[asset], partition)
        return self._plans[key]

    def _plan(self, declared: Declaration, partition: str | None) -> ArtifactPlan:
        keys = declared.keys(partition)
        inputs: dict[str, str] = {}
        for read in declared.inputs:
            for upstream in self.declarations[read.asset].read(self.project, declared, read, keys, self.keys_of):
                if not self.is_left_out(read.asset, upstream):
                    inputs |= self.version(read.asset, upstream)
        inputs |= declared.outside(self, keys)
        pointer = declared.folder.format(**keys)
        return ArtifactPlan(
            declared.name,
            partition,
            pointer,
            pointer if declared.shared_folder is None else declared.shared_folder.format(**keys),
            declared.settings(self, keys),
            inputs,
            determined_by=None if declared.determined_by is None else declared.determined_by(self, keys, inputs),
        )

    def is_left_out(self, asset: str, partition: str | None) -> bool:
        """Whether a partition is never made: it belongs to a checkpoint that is known to have no weight."""
        declared = self.declarations[asset]
        if declared.of_weightless:
            return False
        try:
            checkpoint = self.summary("warmup_checkpoints", declared.keys(partition)["checkpoint"])
        except (MissingArtifactError, StaleArtifactError):
            return False  # not known yet
        return checkpoint.get("mean_learning_rate") == 0

    def fresh(self, asset: str, partition: str | None = None) -> Manifest:
        """The manifest of an artifact that may be read: present, and made from what is in force.

        Raises:
            MissingArtifactError, StaleArtifactError: It is not; the message names the command that makes it.
        """
        key = (asset, partition)
        if key not in self._fresh:
            plan = self.plan(asset, partition)
            manifest = self.store.current(plan.pointer)
            if manifest is None:
                raise MissingArtifactError(
                    f"{asset} has not been materialized", where=partition, fix=f"less-assets run --until {asset}"
                )
            differences = plan.differences(manifest)
            if differences:
                raise StaleArtifactError(
                    f"{asset} was made from something else than what is in force now: {'; '.join(differences)}",
                    where=partition,
                    fix=f"less-assets run --until {asset}",
                )
            self._fresh[key] = manifest
        return self._fresh[key]

    def status(self, asset: str, partition: str | None = None) -> Status:
        """Whether the artifact is there and matches its plan, and if not, why."""
        try:
            plan = self.plan(asset, partition)
        except (MissingArtifactError, StaleArtifactError) as error:
            return Status("blocked", (error.what,))
        try:
            manifest = self.store.current(plan.pointer)
            if manifest is not None and self.verify_files:
                self.store.artifact(manifest.key, manifest.fingerprint).verify()
        except (MissingArtifactError, CorruptArtifactError) as error:
            return Status("missing", (error.what,))
        except StaleArtifactError as error:  # another version of LESS Assets wrote it
            return Status("stale", (error.what,))
        if manifest is None:
            return Status("missing", ("never materialized",))
        differences = plan.differences(manifest)
        return Status("stale", tuple(differences)) if differences else Status("fresh")

    def version(self, asset: str, partition: str | None = None) -> dict[str, str]:
        """One entry of a plan's inputs: `asset` or `asset/partition` → data version of the artifact in force."""
        name = asset if partition is None else f"{asset}/{partition}"
        return {name: self.fresh(asset, partition).data_version}

    def summary(self, asset: str, partition: str | None = None) -> dict[str, Any]:
        """The figures of an artifact that may be read."""
        return dict(self.fresh(asset, partition).summary)

    def shards(self) -> list[str]:
        """Keys of the shards that the pool index lists, in its order."""
        return list(self.summary("pool_index")["shards"])

    def folder(self, asset: str, partition: str | None = None) -> ArtifactFolder:
        """The stored files of an artifact that may be read."""
        manifest = self.fresh(asset, partition)
        return self.store.artifact(manifest.key, manifest.fingerprint)


def split(partition: str | None) -> tuple[str, str]:
    """The two parts of a grid key, in the order of their dimension names."""
    first, _, second = str(partition).partition("|")
    return first, second
