"""What a run would make, found by going through its stages without their work.

Belongs here: the store in which a run is only rehearsed, and the two ways it can turn out. What the work costs is
`estimate.py`; which partitions a request needs, `running/runner.py`.

A run decides what is due after each stage, from the versions of what was made. Most versions follow from what an
artifact is made from, and are known before. Those that tell the content (which rows were selected, say) are known once
it is made: what is cheap to make and has its inputs is made, in a folder that is thrown away. The rest is assumed, once
to change and once to stay as it is: what is due only in the first case is due perhaps.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from less_assets.compute.models import ModelLoader
from less_assets.compute.step import StepInputs, seal
from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage, Status
from less_assets.lineage.plan import ArtifactPlan, digest
from less_assets.reading.certificates import CERTIFICATES, asked_plans, certified_tasks, is_due
from less_assets.running.request import Partition, Request
from less_assets.steps.asset import Asset
from less_assets.steps.registry import ASSETS, open_lineage
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore, Pointer
from less_assets.store.manifest import Manifest

if TYPE_CHECKING:
    from less_assets.running.runner import GraphRunner

SECONDS = 3.0
"""About how long all artifacts may take that are made for a rehearsal."""
NOT_RECORDED = Status("stale", ("Dagster has no record of it",))


class ExpectedFolder(ArtifactFolder):
    """An artifact that a run would make: a manifest without files.

    Args:
        folder: Where it would be.
        manifest: What is known of it before.
    """

    def __init__(self, folder: ArtifactFolder, manifest: Manifest) -> None:
        super().__init__(folder.root, folder.key, folder.fingerprint)
        self._expected = manifest

    def exists(self) -> bool:
        """Whether the artifact is complete: in the rehearsal it is."""
        return True

    def manifest(self) -> Manifest:
        """What is known of it before it is made."""
        return self._expected

    def verify(self, names: str = "", digests_up_to: int | None = None) -> Manifest:
        """What is known of it; there are no files to compare."""
        return self._expected


class RehearsalStore(ArtifactStore):
    """A store as it would be after some steps; nothing is written into the real one.

    Args:
        store: The real store.
        scratch: Folder for what is made for the rehearsal.
    """

    def __init__(self, store: ArtifactStore, scratch: str) -> None:
        self.root = store.root
        self._made = ArtifactStore(scratch)
        self._expected: dict[tuple[str, str], Manifest] = {}
        self._pointers: dict[str, Pointer] = {}

    def artifact(self, key: str, fingerprint: str) -> ArtifactFolder:
        """The artifact's folder: as expected, as made for the rehearsal, or the real one."""
        if manifest := self._expected.get((key, fingerprint)):
            return ExpectedFolder(super().artifact(key, fingerprint), manifest)
        made = self._made.artifact(key, fingerprint)
        return made if made.exists() else super().artifact(key, fingerprint)

    def expect(self, plan: ArtifactPlan, data_version: str, summary: Mapping[str, JsonValue] | None = None) -> None:
        """Go on as if the artifact of a plan was made and had this data version, and these figures."""
        self._expected[plan.folder, plan.fingerprint] = Manifest(
            kind=plan.asset,
            key=plan.folder,
            fingerprint=plan.fingerprint,
            settings=dict(plan.settings),
            inputs=dict(plan.inputs),
            data_version=data_version,
            summary=dict(summary or {}),
        )

    @contextmanager
    def writing(self, key: str, fingerprint: str) -> Iterator[ArtifactFolder]:
        """Write an artifact into the scratch folder."""
        with self._made.writing(key, fingerprint) as folder:
            yield folder

    def publish(
        self, folder: ArtifactFolder, at: str | None = None, inputs: Mapping[str, str] | None = None
    ) -> Manifest:
        """Put an artifact in force for the rehearsal."""
        manifest = folder.manifest()
        if inputs is not None:
            manifest = manifest.model_copy(update={"inputs": dict(inputs)})
        self._pointers[at or manifest.key] = Pointer(folder, manifest.data_version, manifest.inputs)
        return manifest

    def pointer(self, key: str) -> Pointer | None:
        """What a key refers to, in the rehearsal or else really."""
        return self._pointers.get(key) or super().pointer(key)


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do.

    Attributes:
        statuses: Asset -> status of each partition that the request needs, when its turn comes. `CERTIFICATES` -> that
            of each task's certificate.
        perhaps: Asset -> partitions that are due only if something they are made from turns out to have changed.
        computed: Asset -> due partitions with work that is not stored yet; one for equal work of several. The parts of
            a certificate count by themselves: `CERTIFICATE`, `REAL_STEPS`.
        lineage: The plans as they would stand after the run.
    """

    statuses: Mapping[str, Mapping[Partition, Status]]
    perhaps: Mapping[str, frozenset[Partition]]
    computed: Mapping[str, Sequence[Partition]]
    lineage: Lineage

    def due(self, asset: str) -> list[Partition]:
        """The partitions of an asset that the run would make, or would perhaps make."""
        return [partition for partition, status in self.statuses[asset].items() if status.state != "fresh"]


@contextmanager
def rehearse(runner: "GraphRunner", lineage: Lineage, models: ModelLoader, request: Request) -> Iterator[Rehearsal]:
    """Go through the stages of a run; its artifacts of small cost can be read inside the block.

    Args:
        runner: Knows what the request needs and what Dagster has recorded.
        lineage: The project and what is stored.
        models: Loads the tokenizer where rows have to be encoded.
        request: What a person asked for.

    Raises:
        LessAssetsError: The run would fail: data cannot be read, rows of the frozen warm-up sample are gone.
    """
    needed = runner.needed(request)
    with tempfile.TemporaryDirectory(prefix="less-assets-") as scratch:
        at_most = _Walk(runner, lineage, models, scratch, contents_change=True)
        at_most.go(needed, request)
        perhaps: dict[str, frozenset[Partition]] = dict.fromkeys(at_most.statuses, frozenset())
        if at_most.has_assumed:
            at_least = _Walk(runner, lineage, models, scratch, contents_change=False)
            at_least.go(needed, request)
            perhaps = {
                asset: frozenset(
                    partition
                    for partition, status in statuses.items()
                    if status.state != "fresh" and at_least.statuses[asset][partition].state == "fresh"
                )
                for asset, statuses in at_most.statuses.items()
            }
        yield Rehearsal(at_most.statuses, perhaps, at_most.computed, at_most.lineage)


class _Walk:
    """One way in which a run can turn out.

    Args:
        runner, lineage, models: As in `rehearse`.
        scratch: Folder for what is made.
        contents_change: Whether contents that nobody can know are assumed to change, or to stay what they are.
    """

    def __init__(
        self, runner: "GraphRunner", lineage: Lineage, models: ModelLoader, scratch: str, *, contents_change: bool
    ) -> None:
        self._runner, self._real, self._models = runner, lineage.store, models
        self._contents_change, self._seconds_left = contents_change, SECONDS
        self._store = RehearsalStore(lineage.store, scratch)
        self.lineage = open_lineage(lineage.project, self._store)
        self.statuses: dict[str, dict[Partition, Status]] = {}
        self.computed: dict[str, list[Partition]] = {}
        self.has_assumed = False
        self._without_files: set[str] = set()
        """Names of artifacts, as plans call their inputs, that exist in the rehearsal without files."""

    def go(self, needed: Mapping[str, Sequence[Partition]], request: Request) -> None:
        """Go through all stages."""
        for asset in self._runner.stages(needed, request):
            if asset == CERTIFICATES:
                self._certify(needed["influence_scores"])
                continue
            partitions = [key for key in needed[asset] if not self.lineage.is_left_out(asset, key)]
            self.statuses[asset] = {partition: self._status(asset, partition) for partition in partitions}
            due = [partition for partition, status in self.statuses[asset].items() if status.state != "fresh"]
            plans = [self.lineage.plan(asset, partition) for partition in due]
            declared = ASSETS[asset]
            if declared.before and all(map(self._can_read, plans)) and plans:
                declared.before(self.lineage)
            new = {(plan.folder, plan.fingerprint): plan for plan in reversed(plans) if not self._is_stored(plan)}
            self.computed[asset] = [plan.partition for plan in reversed(new.values())]
            self._make(declared, new.values())
            for plan in plans:
                self._publish(plan)

    def _status(self, asset: str, partition: Partition) -> Status:
        status = self.lineage.status(asset, partition)
        if status.state != "fresh":
            return status
        recorded = self._runner.recorded_version(asset, partition)
        return status if recorded == self.lineage.fresh(asset, partition).data_version else NOT_RECORDED

    def _is_stored(self, plan: ArtifactPlan) -> bool:
        try:
            self._store.artifact(plan.folder, plan.fingerprint).manifest()
        except (MissingArtifactError, CorruptArtifactError, StaleArtifactError):
            return False
        return True

    def _publish(self, plan: ArtifactPlan) -> None:
        self._store.publish(self._store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)

    def _can_read(self, plan: ArtifactPlan) -> bool:
        return not self._without_files & plan.inputs.keys()

    def _make(self, declared: Asset, plans: Collection[ArtifactPlan]) -> None:
        """Make all artifacts of an asset that can be made and take little time together; expect the others."""
        seconds = {plan.partition: self._seconds(declared, plan) for plan in plans}
        total = sum(time or 0 for time in seconds.values())
        if in_time := total <= self._seconds_left:
            self._seconds_left -= total
        for plan in plans:
            time = seconds[plan.partition]
            if time is not None and (in_time or time == 0):
                self._compute(declared, plan)
            else:
                self._without_files.add(plan.asset if plan.partition is None else f"{plan.asset}/{plan.partition}")
                figures = declared.known_figures(self.lineage, declared.keys(plan.partition))
                self._store.expect(plan, self._expected_version(declared, plan), figures)

    def _seconds(self, declared: Asset, plan: ArtifactPlan) -> float | None:
        """About how long making an artifact takes; None if it cannot, or shall not, be made for a rehearsal."""
        if declared.rehearsal_seconds is None:
            return None
        seconds = declared.rehearsal_seconds(self.lineage, declared.keys(plan.partition))
        return seconds if seconds == 0 or self._can_read(plan) else None

    def _compute(self, declared: Asset, plan: ArtifactPlan) -> None:
        assert declared.compute is not None
        with self._store.writing(plan.folder, plan.fingerprint) as folder:
            inputs = StepInputs(
                self.lineage, plan.partition or "", folder, self._models, lambda line: None, f"{plan.asset} (rehearsed)"
            )
            seal(folder, plan, declared.compute(inputs))

    def _expected_version(self, declared: Asset, plan: ArtifactPlan) -> str:
        """The data version of an artifact that was not made: its fingerprint, or what is assumed of its content."""
        if not declared.versioned_by_content:
            return plan.fingerprint
        try:
            before = self._real.pointer(plan.pointer)
        except CorruptArtifactError:
            before = None
        self.has_assumed |= before is not None
        if before is not None and not self._contents_change:
            return before.version
        # What is made from equal contents is equal, whatever the partitions are called.
        contents = sorted((name.partition("/")[0], version) for name, version in plan.inputs.items())
        return f"expected-{digest([plan.asset, dict(plan.settings), contents])}"

    def _certify(self, tasks: Sequence[Partition]) -> None:
        """The certificates that the checks of scores make; reports are made from them, too."""
        scored = {task for task, status in self.statuses["influence_scores"].items() if status.state != "fresh"}
        statuses = self.statuses[CERTIFICATES] = {}
        for task in certified_tasks(self.lineage.project, tasks):
            due = is_due(self.lineage, task, scored)
            statuses[task] = Status("missing") if due else Status("fresh")
            for plan in asked_plans(self.lineage, task) if due else ():
                if not self._is_stored(plan):
                    self.computed.setdefault(plan.asset, []).append(task)
                    self._store.expect(plan, plan.fingerprint)
                self._publish(plan)
