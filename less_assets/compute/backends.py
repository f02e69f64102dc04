"""Where the shards of a checkpoint are worked through: in this process, or by the workers of a Ray cluster.

Belongs here: handing partitions out, getting manifests back, lost workers. What a worker does with a partition is the
same function as here, `step.make_artifact`, and it writes straight to the store, so bytes are the same.
"""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.compute.step import Backend, Failures, Log, OneByOne, Together
from less_assets.errors import ComputeError, LessAssetsError
from less_assets.lineage.lineage import Declaration, Lineage
from less_assets.project.project import Project, parse_project
from less_assets.project.sections import Compute as ComputeSettings
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.manifest import Manifest

LOSSES_PER_PARTITION = 3
"""A partition whose worker is lost so often is given up: it is probably what kills them."""


class LocalBackend:
    """Works through partitions in this process, in order, with one loaded checkpoint."""

    def make(
        self,
        lineage: Lineage,
        computation: OneByOne | Together,
        partitions: Sequence[str],
        models: ModelLoader,
        log: Log,
    ) -> Iterator[tuple[str, Manifest]]:
        """See `Backend.make`."""
        return computation.make(lineage, partitions, models, log)


class PartitionWorker:
    """What a Ray actor runs: opens the project in its own process, and keeps the loaded checkpoint between partitions.

    Args:
        content: The project file's bytes.
        path: Where it lies; relative paths in it are meant from there, so workers of other machines need that folder
            too, or a project whose paths are URLs.
        declarations: What each asset is made from.
    """

    def __init__(self, content: bytes, path: str, declarations: Mapping[str, Declaration]) -> None:
        self._project = parse_project(content, path)
        store = ArtifactStore(self._project.storage.root)
        self._lineage = Lineage(self._project, store, declarations)
        self._models = ModelLoader(self._project, cache_folder(store))
        self._log = logging.getLogger("less_assets.worker").info

    def make(self, computation: OneByOne | Together, partitions: Sequence[str]) -> list[Manifest]:
        """Make partitions and put them in force."""
        made = computation.make(self._lineage, partitions, self._models, self._log)
        return [manifest for _, manifest in made]


@dataclass(frozen=True)
class RayBackend:
    """Hands partitions to actors of a Ray cluster, each with a process, a model and its share of a device.

    An actor gets its next partition when it has finished one, so nothing queues up behind a slow worker. Actors live as
    long as a range run: between runs the devices are free for training. A lost actor is replaced and its partition
    handed out again; it goes on at the last finished block.

    Args:
        project: The project file.
    """

    project: Project

    def make(
        self,
        lineage: Lineage,
        computation: OneByOne | Together,
        partitions: Sequence[str],
        models: ModelLoader,
        log: Log,
    ) -> Iterator[tuple[str, Manifest]]:
        """See `Backend.make`. The checkpoints of a range come one after another, so that a worker loads each once.

        Raises:
            ComputeError: The cluster cannot be reached, has no room, or loses worker after worker.
            LessAssetsError: Partitions failed; the others were made and yielded first.
        """
        import ray

        if isinstance(computation, Together) and len(partitions) < 2:
            yield from computation.make(lineage, partitions, models, log)
            return
        settings = self.project.compute
        connect(settings)
        count = min(workers_that_fit(settings), len(partitions))
        groups = computation.groups(partitions, count)
        worker = ray.remote(PartitionWorker).options(
            num_gpus=settings.gpus_per_worker, num_cpus=settings.cpus_per_worker, max_restarts=0
        )
        content, path = self.project.path.read_bytes(), str(self.project.path)
        log(f"{computation.asset}: {len(partitions)} partitions over {count} Ray workers")
        waiting, losses = deque(groups), dict.fromkeys(groups, 0)
        idle: list[Any] = [worker.remote(content, path, lineage.declarations) for _ in range(count)]
        running: dict[Any, tuple[Any, tuple[str, ...]]] = {}
        failures = Failures(computation.asset, log)
        try:
            while running or (waiting and not failures.hopeless):
                while idle and waiting and not failures.hopeless:
                    actor, group = idle.pop(), waiting.popleft()
                    running[actor.make.remote(computation, group)] = (actor, group)
                (finished,), _ = ray.wait(list(running), num_returns=1)
                actor, group = running.pop(finished)
                named = ", ".join(group)
                try:
                    manifests = ray.get(finished)
                except _lost() as error:
                    losses[group] += 1
                    log(f"{computation.asset} {named}: its Ray worker was lost ({losses[group]} times)")
                    if losses[group] >= LOSSES_PER_PARTITION:
                        failures.add(named, _given_up(computation.asset, named, error))
                    else:
                        waiting.appendleft(group)
                    if waiting:
                        idle.append(worker.remote(content, path, lineage.declarations))
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, LessAssetsError):
                        raise  # an error of the program, with the worker's traceback
                    failures.add(named, error.cause)
                    idle.append(actor)
                else:
                    failures.succeeded()
                    idle.append(actor)
                    yield from zip(group, manifests, strict=True)
            failures.raise_first()
        finally:
            for actor in [*idle, *(actor for actor, _ in running.values())]:
                ray.kill(actor)


def open_backend(project: Project) -> Backend:
    """The backend that a project file names."""
    return RayBackend(project) if project.compute.backend == "ray" else LocalBackend()


def connect(settings: ComputeSettings) -> None:
    """Join the Ray cluster, unless this process belongs to one already (a `dagster-ray` resource may have seen to it).

    Raises:
        ComputeError: There is no cluster at the address.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=settings.address, include_dashboard=False if settings.address == "local" else None)
    except Exception as error:  # Ray raises bare ones too, such as for a node that does not come up in time
        raise ComputeError(
            f"There is no Ray cluster: {type(error).__name__}: {error}",
            where=f"compute.address: {settings.address}",
            fix="Start one with `ray start --head`, correct the address, or let one be started here with "
            "`address: local`.",
        ) from error


def workers_that_fit(settings: ComputeSettings) -> int:
    """Number of workers: the project's, or as many as the cluster has GPUs (or processors) for.

    Raises:
        ComputeError: Not one fits, or fewer than the project asks for could ever be placed.
    """
    import ray

    have = ray.cluster_resources()
    shares = [have.get("CPU", 0.0) / settings.cpus_per_worker]
    if settings.gpus_per_worker:
        shares.append(have.get("GPU", 0.0) / settings.gpus_per_worker)
    fit = int(min(shares))
    if fit < max(1, settings.workers or 1):
        raise ComputeError(
            f"The Ray cluster has room for {fit} workers of {settings.gpus_per_worker:g} GPUs and "
            f"{settings.cpus_per_worker:g} processors each.",
            where=f"compute.address: {settings.address}, with {have.get('GPU', 0):g} GPUs and "
            f"{have.get('CPU', 0):g} processors",
            fix="Lower compute.workers, compute.gpus_per_worker (0: processors only) or compute.cpus_per_worker.",
        )
    return settings.workers or fit


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises when the process or the machine that works on a partition is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
    )


def _given_up(asset: str, partition: str, error: Exception) -> ComputeError:
    return ComputeError(
        f"{LOSSES_PER_PARTITION} Ray workers were lost over the same partition, the last one: {error}",
        where=f"{asset} {partition}",
        fix="Look into the workers' logs: often memory runs out. Lower gradients.token_budget, or give workers more "
        "room. What is finished is kept.",
    )
