"""From a plan to an artifact: once per fingerprint, whole or not at all."""

import pytest

from less_assets.compute.step import StepResult, materialize
from less_assets.errors import TrainingError
from less_assets.lineage.plan import ArtifactPlan
from less_assets.store.artifacts import ArtifactStore

PLAN = ArtifactPlan("thing", "one", "things/one", "things", {"size": 3}, {"input": "a" * 32})


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


class Maker:
    """Counts how often it is asked to compute."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error = 0, error

    def __call__(self, folder) -> StepResult:
        self.calls += 1
        folder.write_bytes("part.txt", b"half")
        if self.error:
            raise self.error
        return StepResult({"rows": 2})


def test_an_artifact_is_computed_once(store):
    make = Maker()
    first, second = (materialize(store, PLAN, make) for _ in range(2))
    assert make.calls == 1
    assert first == second == store.current("things/one")
    assert (first.data_version, first.summary, first.settings) == (PLAN.fingerprint, {"rows": 2}, {"size": 3})


def test_equal_work_for_another_key_is_shared_and_recorded_with_its_own_inputs(store):
    make = Maker()
    materialize(store, PLAN, make)
    inputs = {"input": "a" * 32, "recorded": "b" * 32}
    other = ArtifactPlan("thing", "two", "things/two", "things", PLAN.settings, inputs, determined_by=PLAN.inputs)
    manifest = materialize(store, other, make)
    assert make.calls == 1
    assert manifest.inputs == inputs
    assert store.current("things/one").inputs == dict(PLAN.inputs)
    assert other.differences(store.current("things/two")) == []


def test_other_inputs_are_other_work(store):
    make = Maker()
    materialize(store, PLAN, make)
    materialize(store, ArtifactPlan("thing", "one", "things/one", "things", PLAN.settings, {"input": "c" * 32}), make)
    assert make.calls == 2


def test_a_failure_leaves_nothing_in_force_and_nothing_behind(store, tmp_path):
    with pytest.raises(TrainingError):
        materialize(store, PLAN, Maker(TrainingError("no memory")))
    assert store.current("things/one") is None
    assert not [path for path in tmp_path.rglob("*") if path.name == "part.txt"]
    assert materialize(store, PLAN, Maker()).summary == {"rows": 2}


def test_a_failure_of_a_resumable_artifact_keeps_what_was_finished(store):
    with pytest.raises(TrainingError):
        materialize(store, PLAN, Maker(TrainingError("killed")), resumable=True)
    assert store.current("things/one") is None
    seen = []

    def go_on(folder) -> StepResult:
        seen.append(folder.path("part.txt").read_bytes())
        return StepResult({})

    materialize(store, PLAN, go_on, resumable=True)
    assert seen == [b"half"]


def test_a_failed_attempt_leaves_the_artifact_in_force_before_it(store):
    before = materialize(store, PLAN, Maker())
    newer = ArtifactPlan("thing", "one", "things/one", "things", {"size": 4}, PLAN.inputs)
    with pytest.raises(TrainingError):
        materialize(store, newer, Maker(TrainingError("no memory")))
    assert store.current("things/one") == before


def test_a_stated_data_version_is_kept(store):
    manifest = materialize(store, PLAN, lambda _: StepResult({}, data_version="d" * 32))
    assert manifest.data_version == "d" * 32
    assert manifest.fingerprint == PLAN.fingerprint
