"""The plans of a project's artifacts, and whether what is stored still matches them.

Belongs here: from declarations to plans, and from plans to stored artifacts. Not here: what an asset is made from
(declared in `steps/`), or computing anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.declaration import Declaration, axis_keys
from less_assets.lineage.plan import ArtifactPlan
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import Project
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.manifest import Manifest


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
