"""Sketches: the same bits everywhere, unbiased, and as precise as theory says."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method import SKETCH_VERSION
from less_assets.method.gradients.sketch import Sketch, random_signs, random_words

KINDS = ["sparse", "rademacher"]


def vector(size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size).astype(np.float32))


def digest(array):
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def splitmix64(state):
    """The published generator, in Python integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(-(2**63), 2**64), st.integers(0, 9), st.integers(0, 2**40))
def test_random_words_are_splitmix64(seed, stream, start):
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    origin = splitmix64(seed * golden + stream)
    expected = [splitmix64(origin + golden * (start + 1 + index)) for index in range(3)]
    assert [word & mask for word in random_words(seed, stream, start, start + 3).tolist()] == expected


@given(st.integers(0, 300), st.integers(1, 200))
def test_signs_do_not_depend_on_where_a_slice_begins(start, length):
    whole = random_signs(5, 1, 0, 600)
    assert torch.equal(random_signs(5, 1, start, start + length), whole[start : start + length])


def test_bits_are_those_of_version_1():
    assert SKETCH_VERSION == 1
    assert digest(random_words(7, 1, 0, 1000).numpy()) == "f57bc6c72ebaf40d"
    assert digest(random_signs(7, 1, 3, 100_003).numpy()) == "6a92cf95f0b65fc6"
    # Integers, so that no rounding hides behind the digest.
    values = torch.arange(10_000, dtype=torch.float32) % 17 - 8
    assert digest(Sketch("sparse", 512, 7, [("w", (10_000,))])(values).numpy()) == "5b55826b0d3810ce"
    dense = Sketch("rademacher", 256, 7, [("w", (10_000,))])(values) * 16
    assert digest(dense.numpy()) == "6b03c940ad27add7"


def test_real_vectors_have_the_same_bytes_on_every_machine():
    values = (torch.arange(5_000, dtype=torch.float64) * 0.7).remainder(1.0).float()
    assert digest(Sketch("sparse", 300, 11, [("w", (5_000,))])(values).numpy()) == "875a1f2b78a77f7b"


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.integers(1, 999), max_size=6), dimension=st.sampled_from([1, 7, 64, 333, 4096]))
@settings(max_examples=15, deadline=None)
def test_a_sketch_is_the_sum_of_its_slices_sketches(kind, cuts, dimension):
    sketch = Sketch(kind, dimension, 3, [("w", (1000,))])
    values = vector(2000).view(2, 1000)
    edges = [0, *sorted(set(cuts)), 1000]
    accumulator = torch.zeros(2, dimension)
    for start, stop in pairwise(edges):
        sketch.add(accumulator, start, values[:, start:stop])
    torch.testing.assert_close(accumulator, sketch(values), rtol=1e-4, atol=1e-4)


def test_the_sparse_sketch_is_bitwise_the_same_however_it_is_sliced():
    sketch = Sketch("sparse", 100, 3, [("w", (1000,))])
    values = vector(1000)
    accumulator = torch.zeros(100)
    for start in range(0, 1000, 37):
        sketch.add(accumulator, start, values[start : start + 37])
    assert torch.equal(accumulator, sketch(values))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_is_linear(kind):
    sketch = Sketch(kind, 64, 1, [("w", (500,))])
    a, b = vector(500, 1), vector(500, 2)
    torch.testing.assert_close(sketch(2 * a - b), 2 * sketch(a) - sketch(b), rtol=1e-4, atol=1e-4)


def test_a_sparse_sketch_with_room_for_every_coordinate_loses_nothing():
    values = vector(400)
    sketched = Sketch("sparse", 400, 1, [("w", (400,))])(values)
    assert torch.equal(sketched.abs().sort().values, values.abs().sort().values)


@pytest.mark.parametrize("structure", ["dense", "periodic", "heavy tails"])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_variance_one_over_k(kind, structure):
    """E<Πx,Πy> = <x,y>; Var = (|x|²|y|² + <x,y>² − 2Σx²y²)/k for dense signs, and not more for the sparse sketch."""
    size, k, seeds = 960, 64, 600
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, size))
    if structure == "periodic":  # outlier channels that a sketch without random shifts would pile up
        x[::k] *= 12
        y[::k] *= 12
    elif structure == "heavy tails":
        x, y = rng.standard_t(2.5, (2, size))
    y = y + 0.3 * x
    both = torch.from_numpy(np.stack([x / np.linalg.norm(x), y / np.linalg.norm(y)]).astype(np.float32))
    x, y = both.double().numpy()
    estimates = []
    for seed in range(seeds):
        a, b = Sketch(kind, k, seed, [("w", (size,))])(both).double()
        estimates.append(float(a @ b))
    variance = (1 + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / k
    assert abs(np.mean(estimates) - x @ y) < 4 * np.sqrt(variance / seeds)
    ratio = np.var(estimates) / variance
    assert ratio < 1.3  # four standard errors of a variance over 600 seeds
    if kind == "rademacher":
        assert ratio > 0.7


def test_different_seeds_and_orders_of_parameters_are_different_sketches():
    values = vector(100)
    first = Sketch("sparse", 32, 0, [("w", (100,))])(values)
    assert not torch.equal(first, Sketch("sparse", 32, 1, [("w", (100,))])(values))


def test_the_fingerprint_tells_sketches_apart_and_nothing_else():
    weights = [("a", (3, 2)), ("b", (6,))]
    same = Sketch("sparse", 8, 1, weights).fingerprint
    assert Sketch("sparse", 8, 1, [("a", [3, 2]), ("b", [6])]).fingerprint == same
    others = [("rademacher", 8, 1, weights), ("sparse", 9, 1, weights), ("sparse", 8, 2, weights)]
    others.append(("sparse", 8, 1, weights[::-1]))
    assert len({same, *(Sketch(*other).fingerprint for other in others)}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_byte_of_a_sparse_sketch_and_no_sign_of_a_dense_one(kind):
    values = torch.arange(4 * 50_000, dtype=torch.float32).view(4, -1) % 17 - 8  # integers: sums are exact
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(Sketch(kind, 256, 3, [("w", (50_000,))])(values).numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1] == made[2]


def test_nan_stays_in_its_row():
    sketch = Sketch("sparse", 16, 0, [("w", (100,))])
    values = torch.stack([vector(100), torch.full((100,), float("nan"))])
    assert torch.equal(sketch(values)[0], sketch(values[0]))


def test_unknown_kinds_and_empty_dimensions_are_refused():
    with pytest.raises(ValueError, match="unknown sketch"):
        Sketch("fourier", 8, 0, [("w", (10,))])
    with pytest.raises(ValueError, match="dimension"):
        Sketch("sparse", 0, 0, [("w", (10,))])
