"""Nearest rows of a stream and influence on single targets, against brute force."""

import numpy as np
import pytest

from less_assets.method.selection.influence import score_block, target_directions
from less_assets.method.selection.neighbours import NearestRows, best_places, target_cosines, unit_rows

RNG = np.random.default_rng(0)


def nearest(features, stream, places, usable, count=3, block=7, center=None):
    found = NearestRows(features, places, count, center)
    for first in range(0, len(stream), block):
        places = np.arange(first, min(first + block, len(stream)))
        found.offer(places, stream[places], usable[places])
    return found


@pytest.mark.parametrize("block", [1, 7, 50])
def test_a_stream_gives_what_one_sort_would(block):
    stream = RNG.standard_normal((50, 12)).astype(np.float32)
    places = [3, 20, 49]
    usable = RNG.random(50) < 0.8
    found = nearest(stream[places], stream, places, usable, block=block)
    cosines = unit_rows(stream[places]) @ unit_rows(stream).T
    cosines[:, ~usable] = -np.inf
    cosines[np.arange(3), places] = -np.inf
    assert found.neighbours.tolist() == best_places(cosines, 3).tolist()
    np.testing.assert_allclose(found.cosines, np.sort(cosines, axis=1)[:, ::-1][:, :3], rtol=1e-5)


def test_a_row_is_not_its_own_neighbour_and_a_copy_is_at_cosine_one():
    stream = RNG.standard_normal((9, 8)).astype(np.float32)
    stream[5] = 3 * stream[2]
    found = nearest(stream[[2]], stream, [2], np.ones(9, dtype=bool))
    assert found.neighbours[0, 0] == 5
    assert found.cosines[0, 0] == pytest.approx(1)


def test_what_all_rows_share_is_taken_off():
    shared = 100 * np.ones(8, dtype=np.float32)
    own = np.eye(8, dtype=np.float32)
    stream = shared + own
    plain = nearest(stream[[0]], stream, [0], np.ones(8, dtype=bool))
    assert plain.cosines[0, 0] > 0.99
    centered = nearest(stream[[0]], stream, [0], np.ones(8, dtype=bool), center=stream.mean(axis=0))
    assert centered.cosines[0, 0] < 0.1


def test_too_small_a_pool_leaves_places_empty():
    found = nearest(np.ones((1, 4), np.float32), np.ones((2, 4), np.float32), [0], np.array([True, True]))
    assert found.neighbours.tolist() == [[1, -1, -1]]


def test_influence_on_single_targets_has_the_subtasks_influence_as_its_mean():
    rows = {name: RNG.standard_normal((6, 16)).astype(np.float32) for name in ("a", "b")}
    targets = {name: RNG.standard_normal((4, 16)).astype(np.float32) for name in ("a", "b")}
    weights = {"a": 0.7, "b": 0.3}
    found = target_cosines(rows, targets, weights)
    expected = sum(
        weights[name] * score_block(rows[name], target_directions(targets[name], ["x"] * 4, "mean_cosine")[1])
        for name in weights
    )
    np.testing.assert_allclose(found.mean(axis=1), expected[:, 0], rtol=1e-4, atol=1e-6)
