"""Running the graph from the command line: what is missing or stale, asset after asset, through Dagster.

Belongs here: which partitions to run, in which runs, and in which order. Does not belong here: what they compute, or
how results are printed (`cli.py`).
"""

import contextlib
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from less_assets.compute.step import Failures
from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import PoolFiles
from less_assets.orchestration.dagster_internals import (
    DATA_VERSION_TAG,
    DagsterEventType,
    DagsterExecutionInterruptedError,
    InstanceRef,
    NoOpComputeLogManager,
    dagster_instance_config,
    partition_loading_context,
)
from less_assets.orchestration.materialization import CHECKS_LATER_TAG
from less_assets.orchestration.ui_metadata import FOLDER
from less_assets.project.project import Project
from less_assets.reading.certificates import CERTIFICATES, certified_tasks, is_due, lacks_certificate
from less_assets.reading.files import SUBSET_JSONL
from less_assets.running.event_log import KeptEventLog
from less_assets.running.killed_runs import PROCESS_TAG, process_name, report_killed_runs
from less_assets.running.request import Partition, Request, needed
from less_assets.steps.registry import ASSETS, open_lineage
from less_assets.store.artifacts import ArtifactStore

PARTITION_TAG = "dagster/partition"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
CHECKS_TAG = "less-assets/checks"
"""Of runs that only make checks: of which asset. Dagster's list of runs shows tags."""


@dataclass(frozen=True)
class Warned:
    """A check that found something to look at, in what a run has made."""

    asset: str
    partition: str
    check: str
    said: str


@dataclass
class Outcome:
    """What a run of the graph did.

    Attributes:
        materialized: Asset → partitions that were materialized (None: the asset is unpartitioned). `CERTIFICATES` →
            tasks whose scores were certified.
        fresh: Number of artifacts that were there already and matched.
        warned: Checks of what was made that warn.
    """

    materialized: dict[str, list[Partition]] = field(default_factory=dict)
    fresh: int = 0
    warned: list[Warned] = field(default_factory=list)


Tell = Callable[[str, Mapping[str, Any]], object]
"""Receives what happens, for programs: a kind of event, and its values as plain data. docs/watching.md has them."""


class GraphRunner:
    """Brings a project's graph up to date in this process, on a persistent Dagster instance.

    Args:
        definitions: The project's definitions.
        project: The project file.
        store: Where artifacts are kept.
        instance: Receives runs and events; the UI on the same DAGSTER_HOME shows them.
        log: Receives one line for each asset that has something to do.
    """

    def __init__(
        self,
        definitions: dg.Definitions,
        project: Project,
        store: ArtifactStore,
        instance: dg.DagsterInstance,
        log: Callable[[str], object],
    ) -> None:
        self._project, self._store, self._instance, self._log = project, store, instance, log
        self._tell: Tell = lambda kind, values: None
        self._graph = definitions.resolve_asset_graph()
        self._job = definitions.resolve_implicit_global_asset_job_def()

    def run(self, request: Request, log: Callable[[str], object] | None = None, tell: Tell | None = None) -> Outcome:
        """Materialize what is missing or stale, in order; status is looked at again after each asset.

        Args:
            request: What to make.
            log: Receives the lines of this run, instead of the runner's own `log`.
            tell: Receives its events.

        Raises:
            LessAssetsError: What was asked for does not exist, or something failed: what can be made without it is made
                first, unless `Failures` has no hope. What is done stays done.
        """
        self._log, self._tell = log or self._log, tell or self._tell
        report_killed_runs(self._instance, self._log)
        with process_name(self._instance) as name:
            return self._run(request, name)

    def _run(self, request: Request, process: str) -> Outcome:
        outcome = Outcome()
        needed = self.needed(request)
        made: dict[str, set[Partition]] = {asset: set() for asset in needed}
        failed: dict[str, set[Partition]] = {asset: set() for asset in needed}
        trouble: LessAssetsError | None = None
        order = self.stages(needed, request)
        for stage, asset in enumerate(order, 1):
            stages = {"stage": stage, "stages": len(order)}
            if asset == CERTIFICATES:
                self._certify(needed["influence_scores"], made["influence_scores"], stages, outcome, process)
                continue
            partitions = needed[asset]
            lineage = open_lineage(self._project, self._store, verify_files=request.verify)
            partitions = [partition for partition in partitions if not lineage.is_left_out(asset, partition)]
            due = [partition for partition in partitions if not self._is_current(lineage, asset, partition)]
            if trouble:
                due = self._not_waiting(lineage, asset, [key for key in due if key not in failed[asset]])
            if due:
                first = [asset, *self._never_made_from(asset, due[:1], needed)]
                self._log(f"{', '.join(first)}: {_count(due, partitions)}")
                self._tell("asset_started", {"asset": asset, **stages, "partitions": len(due)})
            failures = Failures(asset, self._log)
            for chunk in self.runs(asset, due):
                together = [asset, *self._never_made_from(asset, chunk, needed)]
                try:
                    outcome.warned += self._execute(together, chunk, process)
                except LessAssetsError as error:
                    failures.add(_span(chunk), error)
                    if failures.hopeless:
                        failures.raise_first()
                    for name in together:
                        failed[name].update(chunk)
                else:
                    failures.succeeded()
                    for name in together:
                        made[name].update(chunk)
                        self._tell("made", {"asset": name, "partitions": [key for key in chunk if key]})
            trouble = trouble or failures.first
            if due:
                self._tell("asset_finished", {"asset": asset, "made": len(made[asset]), "failed": len(failed[asset])})
            if made[asset]:
                outcome.materialized[asset] = [partition for partition in partitions if partition in made[asset]]
            outcome.fresh += len(partitions) - len(made[asset])
        if trouble:
            raise trouble
        return outcome

    def stages(self, needed: Mapping[str, Sequence[Partition]], request: Request) -> list[str]:
        """What a run goes through: the needed assets in order, and `CERTIFICATES` after the models.

        Only assets that explain come after them: reports read certificates.
        """
        order = list(needed)
        if request.extras and certified_tasks(self._project, needed.get("influence_scores", ())):
            last = next((number for number, asset in enumerate(order) if ASSETS[asset].explains), len(order))
            order.insert(last, CERTIFICATES)
        return order

    def _show_subset(self, entry: dg.EventLogEntry) -> None:
        """Say where rows lie the moment they are selected: a run of several partitions goes on with the next one."""
        event = entry.dagster_event
        if event is None or not event.is_step_materialization or event.asset_key != dg.AssetKey("selected_subset"):
            return
        recipe, _, task = str(event.partition).partition("|")
        if self._project.recipe(recipe).strategy != "none":
            folder = event.step_materialization_data.materialization.metadata[FOLDER].value
            path = f"{folder}/{SUBSET_JSONL}"
            self._log(f"rows of {recipe} for {task}: {path}")
            self._tell("subset", {"recipe": recipe, "task": task, "path": path})

    def _not_waiting(self, lineage: Lineage, asset: str, due: Sequence[Partition]) -> list[Partition]:
        """What of an asset can be made although something has failed before; the log says how much cannot."""
        left = [partition for partition in due if lineage.status(asset, partition).state != "blocked"]
        if len(left) < len(due):
            self._log(f"{asset}: {len(due) - len(left)} of {len(due)} cannot be made without what failed")
        return left

    def _never_made_from(
        self, asset: str, partitions: Sequence[Partition], needed: Mapping[str, Sequence[Partition]]
    ) -> list[str]:
        """Assets that the same run can go on with: needed, of the same partition, and never made before.

        What was made before has to wait: whether it is stale, only the content of what it is made from can tell.
        """
        follower = ASSETS[asset].same_run
        if follower is None or len(partitions) != 1 or partitions[0] not in needed.get(follower, ()):
            return []
        return [follower] if self.recorded_version(follower, partitions[0]) is None else []

    def needed(self, request: Request) -> dict[str, list[Partition]]:
        """Which partitions of which assets a request needs, in the order of the run."""
        return needed(open_lineage(self._project, self._store), request)

    def _is_current(self, lineage: Lineage, asset: str, partition: Partition) -> bool:
        """Whether the stored artifact matches its plan and Dagster has recorded just this version of it."""
        if lineage.status(asset, partition).state != "fresh":
            return False
        return self.recorded_version(asset, partition) == lineage.fresh(asset, partition).data_version

    def recorded_version(self, asset: str, partition: Partition) -> str | None:
        """Data version of an artifact's last materialization that Dagster has recorded; None if there is none."""
        key = dg.AssetKey(asset)
        if partition is None:
            event = self._instance.get_latest_materialization_event(key)
            materialized = event.asset_materialization if event else None
            return (materialized.tags or {}).get(DATA_VERSION_TAG) if materialized else None
        tags = self._instance.event_log_storage.get_latest_tags_by_partition(
            key, DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG], asset_partitions=[partition]
        )
        return tags.get(partition, {}).get(DATA_VERSION_TAG)

    def runs(self, asset: str, due: Sequence[Partition]) -> list[list[Partition]]:
        """Cut what is due into runs: neighbours in one run where the asset takes ranges, else one run each.

        Base models come first: checks compare other models with them.
        """
        key = dg.AssetKey(asset)
        policy = self._graph.get(key).backfill_policy
        if policy is None or due == [None]:
            return [[partition] for partition in sorted(due, key=lambda key: self._chooses_rows(asset, key))]
        with partition_loading_context(dynamic_partitions_store=self._instance):
            definition = self._graph.get(key).partitions_def
            assert definition is not None
            every = list(definition.get_partition_keys(dynamic_partitions_store=self._instance))
        position = {partition: index for index, partition in enumerate(every)}
        grid = isinstance(definition, dg.MultiPartitionsDefinition)
        runs: list[list[Partition]] = []
        for partition in sorted(due, key=lambda name: position[str(name)]):
            previous = runs[-1][-1] if runs else None
            neighbours = previous is not None and position[str(partition)] == position[str(previous)] + 1
            # A range of a grid is a product of two ranges: it must stay within one checkpoint.
            same_row = not grid or (previous is not None and _row(previous) == _row(partition))
            if neighbours and same_row:
                runs[-1].append(partition)
            else:
                runs.append([partition])
        return runs

    def _chooses_rows(self, asset: str, partition: Partition) -> bool:
        if "recipe" not in ASSETS[asset].axes:
            return False
        return self._project.recipe(_part(partition, asset, "recipe")).traits.chooses_rows

    def _execute(self, assets: Sequence[str], partitions: Sequence[Partition], process: str) -> list[Warned]:
        """Run assets of the same partitions, or one asset of several; returns the checks that warn."""
        for asset in assets:
            self._tell_who_is_waited_for(asset)
        tags = {"less-assets/command": "run", PROCESS_TAG: process, CHECKS_LATER_TAG: "later"}
        partition_key = None
        if len(partitions) > 1:
            tags |= {RANGE_START_TAG: str(partitions[0]), RANGE_END_TAG: str(partitions[-1])}
        else:
            partition_key = partitions[0]
        run_id = str(uuid.uuid4())
        if "selected_subset" in assets:
            self._instance.add_event_listener(run_id, self._show_subset)
        with _interrupts():
            result = self._job.execute_in_process(
                asset_selection=[dg.AssetKey(asset) for asset in assets],
                run_id=run_id,
                run_config={"loggers": {"console": {"config": {}}}},
                partition_key=partition_key,
                tags=tags,
                instance=self._instance,
                raise_on_error=True,
            )
        return _warned(result, _span(partitions) if len(partitions) == 1 else "")

    def _check(self, asset: str, partition: str, process: str) -> list[Warned]:
        """Run an asset's checks on a partition that is there already; returns those that warn."""
        checks = self._graph.get_check_keys_for_assets({dg.AssetKey(asset)})
        with _interrupts():
            result = self._job.get_subset(asset_selection=set(), asset_check_selection=checks).execute_in_process(
                run_config={"loggers": {"console": {"config": {}}}},
                tags={"less-assets/command": "run", PROCESS_TAG: process, PARTITION_TAG: partition, CHECKS_TAG: asset},
                instance=self._instance,
                raise_on_error=True,
            )
        return _warned(result, partition)

    def _certify(
        self,
        partitions: Sequence[Partition],
        scored: Collection[Partition],
        stages: Mapping[str, int],
        outcome: Outcome,
        process: str,
    ) -> None:
        """Run the checks of scores in force: of those that this run has made, and of those that lack a certificate."""
        lineage = open_lineage(self._project, self._store)
        tasks = certified_tasks(self._project, partitions)
        in_force = [task for task in tasks if lineage.status("influence_scores", task).state == "fresh"]
        due = [task for task in in_force if is_due(lineage, task, scored)]
        made: list[Partition] = []
        if due:
            self._log(f"{CERTIFICATES}: {_count(due, tasks)}")
            self._tell("asset_started", {"asset": CERTIFICATES, **stages, "partitions": len(due)})
            self._tell_who_is_waited_for("influence_scores")
            for task in due:
                outcome.warned += self._check("influence_scores", task, process)
                if not lacks_certificate(open_lineage(self._project, self._store), task):  # else the check has said why
                    made.append(task)
                    self._tell("made", {"asset": CERTIFICATES, "partitions": [task]})
            self._tell("asset_finished", {"asset": CERTIFICATES, "made": len(made), "failed": len(due) - len(made)})
        if made:
            outcome.materialized[CERTIFICATES] = made
        outcome.fresh += len(in_force) - len(due)

    def _tell_who_is_waited_for(self, asset: str) -> None:
        """Say so if a pool of the asset is full: the run is going to wait, and nobody else tells."""
        for pool in self._graph.get(dg.AssetKey(asset)).pools or ():
            limit = self._instance.event_log_storage.get_concurrency_info(pool)
            if limit.claimed_slots and len(limit.claimed_slots) >= limit.slot_count:
                holders = ", ".join(sorted(slot.run_id[:8] for slot in limit.claimed_slots))
                self._log(
                    f"{asset}: waiting for the pool {pool}, held by run {holders}. If that run is dead, start "
                    "Dagster (`less-assets dev`): it frees the pool, or do it by hand under Deployment, Concurrency."
                )


def _warned(result: dg.ExecuteInProcessResult, partition: str) -> list[Warned]:
    """The checks that warn in a run of one partition, or of several which they name themselves."""
    return [
        Warned(
            check.asset_key.to_user_string(), check.partition or partition, check.check_name, check.description or ""
        )
        for check in result.get_asset_check_evaluations()
        if not check.passed
    ]


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C while Dagster works is Ctrl-C: not an error of Dagster's, nor forgotten, as it is between two steps."""
    if threading.current_thread() is not threading.main_thread():  # only that one can be interrupted
        yield
        return
    received, sent = socket.socketpair()
    with received, sent:
        received.setblocking(False)
        sent.setblocking(False)
        before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
        try:
            yield
        except DagsterExecutionInterruptedError:
            raise KeyboardInterrupt from None
        finally:
            signal.set_wakeup_fd(before)
        with contextlib.suppress(BlockingIOError):
            if {signal.SIGINT, signal.SIGTERM} & set(received.recv(4096)):
                raise KeyboardInterrupt


def open_instance(home: Path) -> dg.DagsterInstance:
    """Dagster's records in a folder, for runs in this process: what they print goes to its terminal, as it is.

    By default Dagster diverts it into files and starts four processes a run that copy it back. Where `dagster.yaml` has
    `compute_logs`, these are kept. Likewise its event log is opened once, unless `dagster.yaml` names a storage.

    Args:
        home: DAGSTER_HOME.
    """
    configured, _ = dagster_instance_config(str(home))
    overrides: dict[str, Any] = {}
    if not configured.get("compute_logs"):
        overrides["compute_logs"] = _named(NoOpComputeLogManager)
    if not configured.keys() & {"storage", "run_storage", "event_log_storage", "schedule_storage"}:
        usual = InstanceRef.config_defaults(str(home))["event_log_storage"]
        assert usual is not None
        overrides["event_log_storage"] = {**_named(KeptEventLog), "config": usual.config_dict}
    return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home), overrides=overrides))


def _named(storage: type) -> dict[str, str]:
    return {"module": storage.__module__, "class": storage.__name__}


def register_shards(project: Project, store: ArtifactStore, instance: dg.DagsterInstance) -> PoolFiles:
    """Scan the pool's files, write the ledger, and register new shards with Dagster."""
    pool_files = PoolFiles.scan(project, store)
    known = set(instance.get_dynamic_partitions("shard"))
    new = [key for key in pool_files.shard_keys() if key not in known]
    if new:
        instance.add_dynamic_partitions("shard", new)
    return pool_files


def _part(partition: Partition, asset: str, axis: str) -> str:
    return dict(zip(ASSETS[asset].axes, str(partition).split("|"), strict=True))[axis]


def _row(partition: Partition) -> str:
    return str(partition).partition("|")[0]


def _span(partitions: Sequence[Partition]) -> str:
    return " to ".join(dict.fromkeys(key or "" for key in (partitions[0], partitions[-1])))


def _count(due: Sequence[Partition], every: Sequence[Partition]) -> str:
    if due == [None]:
        return "to make"
    return f"{len(due)} of {len(every)} partitions to make"
