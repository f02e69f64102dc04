"""Partitions and their mappings in Dagster's terms, derived from what assets declare.

Belongs here: which partition of which asset feeds which, as Dagster has to be told. What an asset reads is declared in
`steps/`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from less_assets.lineage.lineage import Declaration, Input, axis_keys
from less_assets.project.project import Project
from less_assets.project.recipes import PREFILTER
from less_assets.steps.registry import ASSETS

SHARDS = dg.DynamicPartitionsDefinition(name="shard")
WRITTEN_OUT = (("recipe", "task"), ("pilot", "task"))
"""Pairs of axes that are one dimension."""


@dataclass(frozen=True)
class Axes:
    """Partition definitions and dependencies of one project's assets.

    Dagster infers the mapping between a grid and one of its own dimensions, and between partitioned and unpartitioned
    assets. It does not infer one axis to an unrelated one, nor one list of keys to another: left out, those load
    silently as "no parents" (see `tests/orchestration/test_partitions.py`).
    """

    project: Project

    @cached_property
    def _single(self) -> dict[str, dg.PartitionsDefinition]:
        keys = axis_keys(self.project, lambda: ())
        static = {axis: dg.StaticPartitionsDefinition(list(keys(axis))) for axis in ("checkpoint", "task", "recipe")}
        return {**static, "shard": SHARDS}

    @cached_property
    def _grids(self) -> dict[tuple[str, ...], dg.PartitionsDefinition]:
        grids = {asset.axes for asset in ASSETS.values() if len(asset.axes) > 1 and asset.axes not in WRITTEN_OUT}
        return {axes: dg.MultiPartitionsDefinition({axis: self._single[axis] for axis in axes}) for axes in grids}

    def of(self, asset: Declaration) -> dg.PartitionsDefinition | None:
        """Partitions definition of an asset; None if it is unpartitioned.

        Recipes by tasks are one dimension, written out, and so are pilots by tasks: some recipes read scores and others
        do not, and Dagster follows such a mapping in both directions (backfills need that) only between two static
        dimensions. In the launch dialog, type `|bbh` and select all: every recipe of a task.
        """
        if not asset.axes:
            return None
        if asset.axes in WRITTEN_OUT:
            return dg.StaticPartitionsDefinition(self._keys(asset))
        if asset.axes == ("task",) and not asset.of_folds:
            return dg.StaticPartitionsDefinition(self.project.task_names)
        return self._single[asset.axes[0]] if len(asset.axes) == 1 else self._grids[asset.axes]

    def dependencies(self, asset: Declaration) -> list[dg.AssetDep]:
        """What an asset depends on, with every partition mapping that Dagster does not infer."""
        return [
            dg.AssetDep(read.asset, partition_mapping=self._mapping(asset, read))
            for read in asset.inputs
            if self._exists(read) and read.is_read(self.project, asset)
        ]

    def _exists(self, read: Input) -> bool:
        recipes = ASSETS[read.asset].recipes(self.project)
        return ASSETS[read.asset].exists(self.project) and (not read.of_prefilter or PREFILTER in recipes)

    def _mapping(self, asset: Declaration, read: Input) -> dg.PartitionMapping | None:
        """How partitions of an asset read those of an input; None where Dagster infers it."""
        upstream = ASSETS[read.asset]
        if not asset.axes or not upstream.axes:
            return None
        shared = set(asset.axes) & set(upstream.axes)
        if not {asset.axes, upstream.axes} & {*WRITTEN_OUT}:
            inferred = shared in (set(asset.axes), set(upstream.axes))
            return None if inferred else dg.AllPartitionMapping()
        if not shared:
            return dg.AllPartitionMapping()
        readers: dict[str, list[str]] = {}
        for reader, key in self._pairs(asset, read, upstream):
            readers.setdefault(key, []).append(reader)
        same = self._keys(asset) == self._keys(upstream) and all(names == [key] for key, names in readers.items())
        return None if same else dg.StaticPartitionMapping(readers)

    def _pairs(self, asset: Declaration, read: Input, upstream: Declaration) -> Iterator[tuple[str, str]]:
        """Keys of an asset, each with every key of the input that it reads."""
        keys_of = axis_keys(self.project, lambda: ())
        for reader in self._keys(asset):
            for key in upstream.read(self.project, asset, read, asset.keys(reader), keys_of):
                yield reader, str(key)

    def _keys(self, asset: Declaration) -> Sequence[str]:
        return [str(key) for key in asset.partitions(self.project, axis_keys(self.project, lambda: ()))]
