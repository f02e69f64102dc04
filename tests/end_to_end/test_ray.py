"""`compute.backend: ray` on a real Ray cluster of this machine with two workers: the same bytes as here.

Also when a worker is killed; and what is said where there is no Ray or no room.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from support.graph import replaced
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.compute import backends
from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.compute.step import OneByOne, StepInputs, StepResult
from less_assets.errors import ComputeError, TrainingError
from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import build_definitions
from less_assets.project import data_check
from less_assets.project.project import load_project
from less_assets.project.sections import Compute
from less_assets.running.runner import GraphRunner, Outcome, Request, register_shards
from less_assets.steps.registry import open_lineage, open_store

UNTIL_GRADIENTS = Request(until="train_gradients")
RAY = {"backend": "ray", "address": "local", "gpus_per_worker": 0, "workers": 2}


def run(tiny, instance, request: Request = UNTIL_GRADIENTS, **resources) -> Outcome:
    project = load_project(tiny.path)
    store = open_store(project)
    register_shards(project, store, instance)
    definitions = build_definitions(project, **resources)
    return GraphRunner(definitions, project, store, instance, print).run(request)


def test_without_ray_it_is_refused_before_anything_is_computed(tiny_project, tmp_path, monkeypatch):
    tiny_project.settings["compute"] = RAY
    monkeypatch.setattr(data_check, "find_spec", lambda name: None)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    for command in ("check", "plan", "run"):
        shown = CliRunner().invoke(app, [command, "--project", str(tiny_project.path)])
        assert shown.exit_code == 1
        assert "'ray' is not installed" in shown.output
        assert "less-assets[ray]" in shown.output
    assert not list(tiny_project.folder.rglob("manifest.json"))


def test_the_local_backend_needs_no_ray(tiny_project, monkeypatch):
    monkeypatch.setattr(data_check, "find_spec", lambda name: None)
    build_definitions(load_project(tiny_project.path))


@pytest.fixture(scope="module")
def paths() -> Iterator[None]:
    """Lets workers import what this process can."""
    tests = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(map(str, [tests.parent, tests, Path(__file__).parent])))
        patched.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield


@pytest.fixture(scope="module")
def cluster(paths) -> Iterator[None]:
    """Ray with two processors on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'less-assets[ray]'")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def here(tiny_project) -> Iterator[dict[str, bytes]]:
    """The files that the local backend writes; afterwards they are gone, and the project asks for Ray."""
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project, instance)
    gradients = tiny_project.folder / "artifacts/gradients"
    expected = files(gradients)
    (gradients / "train").rename(tiny_project.folder / "made here")
    tiny_project.settings["compute"] = RAY
    return expected


def killed_once(work: StepInputs) -> StepResult:
    """Extracts gradients, but kills its process in the middle of one shard the first time it is asked for it."""
    from less_assets.steps.gradients import extract_train_gradients
    from less_assets.store.features import FeatureWriter

    mark = Path(work.project.folder) / "killed"
    if work.partition != "epoch-1|plus-00001" or mark.exists():
        return extract_train_gradients(work)
    write = FeatureWriter.write_block

    def write_and_die(self, index, block):
        write(self, index, block)
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)

    FeatureWriter.write_block = write_and_die  # in the worker's process only, which ends here
    return extract_train_gradients(work)


def test_two_workers_write_the_bytes_of_one_process_also_when_one_is_killed(
    tiny_project, here, paths, monkeypatch, capfd
):
    """The cluster comes from a resource of `dagster-ray`, which starts one for each run here."""
    dagster_ray = pytest.importorskip("dagster_ray", reason="Ray is not installed: pip install 'less-assets[ray]'")
    options = {"num_cpus": 2, "include_dashboard": False, "logging_level": "ERROR"}
    replaced(monkeypatch, "train_gradients", compute=killed_once)
    with dg.DagsterInstance.ephemeral() as instance:
        local_ray = dagster_ray.LocalRay(ray_init_options=options)
        made = run(tiny_project, instance, ray_cluster=local_ray).materialized["train_gradients"]
        assert len(made) == 8
        assert run(tiny_project, instance).materialized == {}, "Dagster has recorded every partition's version"
    assert (tiny_project.folder / "killed").exists()
    found = files(tiny_project.folder / "artifacts/gradients")
    assert found.keys() == here.keys()
    assert [name for name in here if found[name] != here[name]] == []
    said = capfd.readouterr().err
    assert "epoch-1|plus-00001: its Ray worker was lost (1 times)" in said
    assert "over 2 Ray workers" in said


def test_scores_of_two_tasks_and_embeddings_from_two_workers_have_the_bytes_of_one_process(
    tiny_project, cluster, capfd
):
    tiny_project.settings["warmup"]["epochs"] = 1
    tiny_project.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.5},
        {"name": "rds", "strategy": "rds", "fraction": 0.5},
    ]
    requests = Request(until="influence_scores"), Request(until="pool_embeddings")
    artifacts = tiny_project.folder / "artifacts"
    spread = [artifacts / "embeddings/pool", *(artifacts / f"selection/{task}/influence" for task in ("sums", "sky"))]
    with dg.DagsterInstance.ephemeral() as instance:
        for request in requests:
            run(tiny_project, instance, request)
    expected = [files(folder) for folder in spread]
    for place, folder in enumerate(spread):
        folder.rename(tiny_project.folder / f"made here {place}")
    tiny_project.settings["compute"] = RAY
    capfd.readouterr()
    with dg.DagsterInstance.ephemeral() as instance:
        made = [run(tiny_project, instance, request).materialized for request in requests]
    assert [len(made[0]["influence_scores"]), len(made[1]["pool_embeddings"])] == [2, 4]
    assert [files(folder) for folder in spread] == expected
    said = capfd.readouterr().err
    assert "influence_scores: 2 partitions over 2 Ray workers" in said
    assert "pool_embeddings: 4 partitions over 2 Ray workers" in said


def always_killed(work: StepInputs) -> StepResult:
    os.kill(os.getpid(), signal.SIGKILL)
    return StepResult({})


def always_fails(work: StepInputs) -> StepResult:
    if work.partition.endswith("plus-00001"):
        raise TrainingError("no memory", fix="buy some")
    work.folder.write_bytes("made.txt", b"made")
    return StepResult({})


class Fanned:
    """A backend, and a line whose inputs are there."""

    def __init__(self, tiny) -> None:
        project = load_project(tiny.path)
        self.lineage = open_lineage(project, open_store(project))
        self.backend = backends.open_backend(project)
        self.models = ModelLoader(project, cache_folder(self.lineage.store))
        self.said: list[str] = []
        self.done: list[str] = []

    def make(self, compute, *partitions: str) -> None:
        found = self.backend.make(
            self.lineage, OneByOne("train_gradients", compute), partitions, self.models, self.said.append
        )
        for partition, _ in found:
            self.done.append(partition)


def test_a_partition_that_kills_every_worker_is_given_up_and_one_that_fails_says_why(tiny_project, here, cluster):
    fanned = Fanned(tiny_project)
    with pytest.raises(ComputeError, match="3 Ray workers were lost over the same partition"):
        fanned.make(always_killed, "epoch-1|plus-00000")
    assert sum("was lost" in line for line in fanned.said) == 3
    fanned.said.clear()
    with pytest.raises(TrainingError, match="no memory"):
        fanned.make(always_fails, "epoch-1|colors-00000", "epoch-1|plus-00001", "epoch-1|colors-00001")
    assert sorted(fanned.done) == ["epoch-1|colors-00000", "epoch-1|colors-00001"]
    assert not fanned.lineage.store.artifact(*_address(fanned.lineage, "epoch-1|plus-00001")).exists()


def _address(lineage: Lineage, partition: str) -> tuple[str, str]:
    plan = lineage.plan("train_gradients", partition)
    return plan.folder, plan.fingerprint


def test_more_workers_than_fit_are_refused(tiny_project, here, cluster):
    tiny_project.settings["compute"] = {**RAY, "workers": 5}
    with pytest.raises(ComputeError, match="room for 2 workers"):
        Fanned(tiny_project).make(always_fails, "epoch-1|colors-00000")
    tiny_project.settings["compute"] = {**RAY, "gpus_per_worker": 1}
    with pytest.raises(ComputeError, match="room for 0 workers"):
        Fanned(tiny_project).make(always_fails, "epoch-1|colors-00000")


def test_an_address_without_a_cluster_is_one_clear_error(monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'less-assets[ray]'")

    def finds_none(**options):
        raise ConnectionError(f"Could not find any running Ray instance ({options['address']}).")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", finds_none)  # looking for one takes Ray a minute
    with pytest.raises(ComputeError, match="There is no Ray cluster") as error:
        backends.connect(Compute(backend="ray", address="10.0.0.1:6379"))
    assert "compute.address: 10.0.0.1:6379" in str(error.value)
    assert "ray start --head" in str(error.value)
