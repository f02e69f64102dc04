"""Round trips through the four storages."""

from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: F401 - before the clock of hypothesis runs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from less_assets.method.gradients.quantization import STORAGES, bytes_per_row, choose_storage, decode, encode
from less_assets.method.selection.coded_directions import CodedDirections
from less_assets.method.selection.influence import score_block

ROWS = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=37),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


def cosine(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("storage", STORAGES)
@given(rows=ROWS)
def test_decoding_gives_back_shape_and_never_adds_error(storage, rows):
    codes, scale = encode(rows, storage)
    decoded = decode(codes, scale, storage, rows.shape[1])
    assert decoded.shape == rows.shape
    assert decoded.dtype == np.float32
    assert codes.nbytes == len(rows) * bytes_per_row(storage, rows.shape[1])
    error = np.linalg.norm(decoded.astype(np.float64) - rows, axis=1)
    assert (error <= np.linalg.norm(rows.astype(np.float64), axis=1) * 1.001).all()


@pytest.mark.parametrize("storage", STORAGES)
@given(rows=ROWS)
def test_encoding_what_was_decoded_changes_nothing_much(storage, rows):
    once = decode(*encode(rows, storage), storage, rows.shape[1])
    twice = decode(*encode(once, storage), storage, rows.shape[1])
    bound = {"float16": 1e-3, "int8": 0.02, "int4": 0.25, "int1": 1e-3}[storage]
    assert (np.linalg.norm(twice - once, axis=1) <= bound * np.linalg.norm(once, axis=1) + 1e-30).all()


@pytest.mark.parametrize(("storage", "error"), [("float16", 1e-3), ("int8", 0.012), ("int4", 0.111), ("int1", 0.605)])
@pytest.mark.parametrize("magnitude", [1e-25, 1e-8, 1.0, 1e20])
def test_gaussian_rows_keep_the_error_of_the_best_uniform_quantizer(storage, error, magnitude):
    """Max (1960): relative error 0.1074 at 4 bits, 0.603 at 1 bit, whatever the magnitude."""
    rows = (np.random.default_rng(0).standard_normal((4, 20_000)) * magnitude).astype(np.float32)
    decoded = decode(*encode(rows, storage), storage, 20_000).astype(np.float64)
    assert (np.linalg.norm(decoded - rows, axis=1) < error * np.linalg.norm(rows.astype(np.float64), axis=1)).all()


def test_int8_keeps_heavy_tailed_rows():
    rows = np.random.default_rng(0).standard_t(2.2, (4, 20_000)).astype(np.float32)
    assert cosine(rows, decode(*encode(rows, "int8"), "int8", 20_000)).min() > 0.99


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_of_zeros_stays_zero_beside_others(storage):
    rows = np.array([[0, 0, 0], [1, -2, 3]], np.float32)
    codes, scale = encode(rows, storage)
    assert scale[0] == 0
    assert not decode(codes, scale, storage, 3)[0].any()
    assert decode(codes, scale, storage, 3)[1, 2] > 0


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_do_not_influence_each_other(storage):
    rows = np.random.default_rng(1).standard_normal((80, 33)).astype(np.float32)
    codes, scale = encode(rows, storage)
    for row in (0, 31, 79):
        alone_codes, alone_scale = encode(rows[row : row + 1], storage)
        assert np.array_equal(codes[row], alone_codes[0])
        assert scale[row] == alone_scale[0]


@pytest.mark.parametrize("storage", STORAGES)
def test_no_rows_are_fine(storage):
    codes, scale = encode(np.zeros((0, 8), np.float32), storage)
    assert decode(codes, scale, storage, 8).shape == (0, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        encode(np.array([[1.0, value]], np.float32), "int4")


def test_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="unknown storage"):
        encode(np.zeros((1, 2), np.float32), "int2")


@given(st.integers(1, 1 << 20), st.sampled_from(["adamw", "paper", "reference", "marginal", "sgd"]))
def test_the_chosen_storage_fits_the_budget(budget, form):
    storage, dimension = choose_storage(budget, [form])
    assert bytes_per_row(storage, dimension) <= budget
    assert bytes_per_row(storage, dimension + 8) > budget


def test_bytes_are_spent_on_dimensions_until_there_are_no_more():
    assert choose_storage(16 << 10, ["marginal"]) == ("int1", 131_072)
    assert choose_storage(16 << 10, ["adamw", "marginal"]) == ("int1", 131_072)
    assert choose_storage(16 << 10, ["adamw", "sgd"]) == ("int8", 16_384)
    assert choose_storage(16 << 10, ["marginal"], parameters=40_000) == ("int4", 32_768)
    assert choose_storage(1 << 20, ["adamw"], parameters=1_000) == ("float16", 1_000)


@pytest.mark.parametrize("storage", STORAGES)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_cosines_of_codes_are_those_of_decoded_rows(storage, rows, seed):
    directions = np.random.default_rng(seed).standard_normal((3, rows.shape[1]), dtype=np.float32)
    codes, scale = encode(rows, storage)
    found = CodedDirections(directions, storage).cosines(codes, scale)
    # In float64, because decoded rows may be too small or too large for a norm in float32.
    decoded = decode(codes, np.ones_like(scale), storage, rows.shape[1]).astype(np.float64)
    decoded *= scale[:, None] > 0
    expected = score_block(decoded, directions.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.linalg.norm(directions, axis=1).max())


@pytest.mark.parametrize("storage", STORAGES)
def test_cosines_of_rows_that_are_zero_are_not_numbers(storage):
    rows = np.array([[0, 0, 0], [1, -2, 3]], dtype=np.float32)
    found = CodedDirections(np.eye(3, dtype=np.float32), storage).cosines(*encode(rows, storage))
    np.testing.assert_array_equal(np.isnan(found), [[True] * 3, [False] * 3])


@pytest.mark.parametrize("storage", STORAGES)
def test_scores_of_a_group_of_directions_do_not_depend_on_the_others(storage):
    rng = np.random.default_rng(5)
    codes, scale = encode(rng.standard_normal((64, 512), dtype=np.float32), storage)
    directions = rng.standard_normal((23, 512), dtype=np.float32)
    sizes = [1, 2, 4, 16]
    together = CodedDirections(directions, storage, sizes).cosines(codes, scale)
    start = 0
    for size in sizes:
        alone = CodedDirections(directions[start : start + size], storage).cosines(codes, scale)
        np.testing.assert_array_equal(together[:, start : start + size], alone)
        start += size
