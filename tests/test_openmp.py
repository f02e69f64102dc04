"""How OpenMP's threads wait is decided before torch is loaded, and a user's own setting wins."""

import os
import subprocess
import sys

import pytest

from less_assets.openmp import CHOSEN, SPIN_COUNT, WAIT_POLICY, choose_wait_policy

PROCESSORS = len(os.sched_getaffinity(0))
TWO_CORES = pytest.mark.skipif(PROCESSORS < 2, reason="needs two processors")


def chosen(others: float, **environment: str) -> dict[str, str]:
    choose_wait_policy(environment, lambda: others)
    return environment


@TWO_CORES
def test_threads_wait_asleep_only_where_something_else_runs():
    assert chosen(0) == {}
    assert chosen(1) == {WAIT_POLICY: "PASSIVE", CHOSEN: "busy"}


@TWO_CORES
def test_other_processes_that_leave_enough_processors_do_not_count():
    assert chosen(PROCESSORS, OMP_NUM_THREADS="1") == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("own", [{WAIT_POLICY: "ACTIVE"}, {WAIT_POLICY: "PASSIVE"}, {SPIN_COUNT: "500"}])
def test_a_setting_of_the_users_wins(own):
    assert chosen(5, **own) == own


@TWO_CORES
def test_a_process_started_by_another_one_looks_again():
    parent = chosen(1)
    assert chosen(0, **parent) == {}
    assert chosen(1, **parent) == parent
    assert chosen(0, **parent | {WAIT_POLICY: "ACTIVE"}) == {WAIT_POLICY: "ACTIVE"}


@TWO_CORES
@pytest.mark.parametrize(
    "module", ["less_assets.cli", "less_assets.orchestration.definitions", "less_assets.compute.backends"]
)
def test_the_setting_is_there_before_torch_is_loaded(module):
    """However a process begins, be it the command, Dagster's code location or what a Ray worker unpickles."""
    script = (
        "import builtins, os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'torch': print('torch after', os.environ.get('{WAIT_POLICY}'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}\n"
        "import torch\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in (WAIT_POLICY, SPIN_COUNT, CHOSEN)}
    environment |= {"OMP_NUM_THREADS": str(PROCESSORS), "PYTHONPATH": os.pathsep.join(sys.path)}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        ran = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert set(ran.stdout.splitlines()) == {"torch after PASSIVE"}
