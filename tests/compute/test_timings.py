"""Recorded costs: seconds beside the artifacts, everything below an artifact counted once, nothing made up."""

import time

import pytest
from support.bench import Bench

from less_assets.compute.timings import cost_of, cost_with_inputs, seconds_of, timed
from less_assets.errors import TrainingError


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def record(bench, seconds):
    """Put all artifacts, each with its seconds on record: asset -> seconds, others 0."""
    bench.put_everything()
    for kind, fingerprint in {(found.kind, found.fingerprint) for found in manifests(bench)}:
        path = bench.store.root / f"timings/{kind}/{fingerprint}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"seconds": {seconds.get(kind, 0)}}}')


def manifests(bench):
    return [found for key in bench.store.published() if (found := bench.store.current(key))]


def fail_slowly(store, fingerprint):
    with timed(store, "thing", fingerprint):
        time.sleep(0.02)
        raise TrainingError("no memory")


def test_seconds_add_up_over_attempts_and_failures(bench):
    fingerprint = "a" * 32
    assert seconds_of(bench.store, "thing", fingerprint) is None
    with pytest.raises(TrainingError):
        fail_slowly(bench.store, fingerprint)
    first = seconds_of(bench.store, "thing", fingerprint)
    with timed(bench.store, "thing", fingerprint):
        time.sleep(0.02)
    assert first >= 0.02
    assert seconds_of(bench.store, "thing", fingerprint) >= first + 0.02


def test_a_damaged_record_is_no_record(bench):
    with timed(bench.store, "thing", "a" * 32):
        pass
    (bench.store.root / f"timings/thing/{'a' * 32}.json").write_text("soon")
    assert seconds_of(bench.store, "thing", "a" * 32) is None


def test_what_an_artifact_was_made_from_counts_once(bench):
    record(bench, {"warmup_checkpoints": 60, "train_gradients": 600, "selected_subset": 6, "eval_results": 1000})
    lineage = bench.lineage
    # Two checkpoints, each with gradients of one shard; scores read both of them through several inputs.
    assert cost_with_inputs(lineage, "selected_subset", "less|sums").minutes == pytest.approx((2 * 660 + 6) / 60)
    assert cost_with_inputs(lineage, "selected_subset", "random-seed0|sums").minutes == pytest.approx(0.1)
    assert cost_of(lineage, "selected_subset", "less|sums").minutes == pytest.approx(0.1)


def test_a_cost_that_was_not_recorded_for_all_is_unknown(bench):
    record(bench, {})
    fingerprint = bench.lineage.fresh("train_gradients", "epoch-1|plus-00000").fingerprint
    (bench.store.root / f"timings/train_gradients/{fingerprint}.json").unlink()
    assert cost_with_inputs(bench.lineage, "selected_subset", "less|sums").minutes is None
    assert cost_with_inputs(bench.lineage, "selected_subset", "random-seed0|sums").minutes == 0
