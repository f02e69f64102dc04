"""Killed at random moments, a run goes on with the same command and ends with the same bytes (`make soak`: more)."""

import shutil
import tempfile
from pathlib import Path

import pytest
from support.killing import Killer, Tally, differences

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def killer(tiny_model):
    place = Path(tempfile.mkdtemp(prefix="less-kills-", dir=MEMORY if MEMORY.is_dir() else None))
    found = Killer(place, tiny_model)
    yield found
    found.close()
    shutil.rmtree(place)


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(killer):
    tally = Tally()
    killer.campaign(1, tally, kills=5)
    assert tally.failures == []
    assert tally.lost == []
    assert tally.kills == 5, tally


def test_two_runs_at_once_end_with_one_whole_set_of_artifacts(killer):
    killer.reset()
    assert killer.at_once(2) == [0, 0], killer.log()[-3000:]
    assert differences(killer.expected, killer.live / "artifacts") == []
    assert killer.attempt()["code"] == 0, killer.log()[-6000:]
    assert "nothing was computed" in killer.log()
