"""Runs whose process was killed: told apart from living ones, reported, and what they held is free again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from less_assets.running.home_folder import PROCESSES_FOLDER
from less_assets.running.killed_runs import PROCESS_TAG, process_name, report_killed_runs

ROOT = Path(__file__).parents[2]
# Not pipes: Dagster's capture of a step's output lives on for a while and holds them open.
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
# A run of one process that is killed while it works, holding the only slot of the pool `gpu`.
KILLED = """
import os, signal, sys
import dagster as dg
from less_assets.running.home_folder import PROCESSES_FOLDER
from less_assets.running.killed_runs import PROCESS_TAG, process_name

@dg.asset(pool="gpu")
def slow():
    os.kill(os.getpid(), signal.SIGKILL)

with dg.DagsterInstance.from_config(sys.argv[1]) as instance, process_name(instance) as name:
    dg.materialize([slow], instance=instance, tags={PROCESS_TAG: name})
"""


@pytest.fixture
def instance(tmp_path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text((ROOT / "less_assets/running/dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as found:
        yield found


def slots(instance: dg.DagsterInstance) -> list[str]:
    """Runs that hold the pool `gpu`."""
    return [slot.run_id for slot in instance.event_log_storage.get_concurrency_info("gpu").claimed_slots]


def test_a_killed_run_gives_its_pool_back_and_is_no_longer_called_started(instance, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, **QUIET)
    assert killed.returncode == -signal.SIGKILL
    (run,) = instance.get_runs()
    assert run.status == dg.DagsterRunStatus.STARTED
    assert slots(instance) == [run.run_id], "the next run would wait for ever"
    said = []
    report_killed_runs(instance, said.append)
    assert slots(instance) == []
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
    assert said == [f"run {run.run_id[:8]} was killed; what it had finished is kept"]
    assert list((tmp_path / PROCESSES_FOLDER).iterdir()) == []
    report_killed_runs(instance, said.append)
    assert len(said) == 1


def test_a_living_run_and_runs_of_others_are_left_alone(instance, tmp_path):
    with process_name(instance) as name:
        living = instance.create_run_for_job(job(), tags={PROCESS_TAG: name}, status=dg.DagsterRunStatus.STARTED)
        other = instance.create_run_for_job(job(), status=dg.DagsterRunStatus.STARTED)
        for run in (living, other):
            instance.event_log_storage.initialize_concurrency_limit_to_default("gpu")
            instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "slow")
        report_killed_runs(instance, lambda _: pytest.fail("nobody was killed"))
        assert instance.get_run_by_id(living.run_id).status == dg.DagsterRunStatus.STARTED
        assert slots(instance) == [living.run_id]
    assert not os.listdir(tmp_path / PROCESSES_FOLDER), "a process that ends well leaves nothing"


def job() -> dg.JobDefinition:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def small() -> None:
        nothing()

    return small
