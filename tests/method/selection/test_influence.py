"""Influence: the formulas of method.md, the reference code's numbers, and no score without a direction."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.errors import TargetFormatError
from less_assets.method.selection.influence import (
    SIMILARITY_DIMENSION,
    SUBTASK_RULES,
    normalised_weights,
    row_statuses,
    score_block,
    score_shard,
    score_table,
    similarity_vectors,
    target_directions,
)

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


class Rows:
    """Features in memory, yielded in blocks as a reader does."""

    def __init__(self, features: dict[str, np.ndarray], block: int = 3) -> None:
        self.features, self.block = features, block
        self.rows = len(next(iter(features.values())))
        self.passes = 0

    storage = "float16"  # whose codes are the numbers themselves
    code_block_bytes = 0

    @property
    def code_blocks(self):
        return -(-self.rows // self.block)

    def codes(self, form, index, buffer=None):
        self.passes += index == 0
        block = self.features[form][index * self.block : (index + 1) * self.block]
        return index * self.block, block, np.ones(len(block), dtype=np.float32)


def random_rows(seed: int, rows: int, dimension: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


subtask_lists = st.lists(st.sampled_from(["b", "a", "c"]), min_size=1, max_size=7)


@given(subtask_lists, st.integers(0, 99))
def test_mean_cosine_is_the_mean_over_the_subtasks_examples(subtasks, seed):
    pool, targets = random_rows(seed, 4, 6), random_rows(seed + 100, len(subtasks), 6)
    labels, directions = target_directions(targets, subtasks, "mean_cosine")
    assert labels == sorted(set(subtasks))
    scores = score_block(pool, directions)
    for row in range(4):
        for place, label in enumerate(labels):
            members = [
                cosine(pool[row], target) for target, name in zip(targets, subtasks, strict=True) if name == label
            ]
            assert scores[row, place] == pytest.approx(np.mean(members), abs=1e-6)


@given(subtask_lists, st.integers(0, 99))
def test_cosine_of_mean_is_the_cosine_with_the_subtasks_mean_gradient(subtasks, seed):
    pool, targets = random_rows(seed, 4, 6), random_rows(seed + 100, len(subtasks), 6)
    labels, directions = target_directions(targets, subtasks, "cosine_of_mean")
    scores = score_block(pool, directions)
    for row in range(4):
        for place, label in enumerate(labels):
            mean = targets[[name == label for name in subtasks]].astype(np.float64).mean(axis=0)
            assert scores[row, place] == pytest.approx(cosine(pool[row], mean), abs=1e-6)


@given(st.permutations(range(5)))
def test_the_order_of_target_examples_does_not_matter(order):
    targets, subtasks = random_rows(0, 5, 6), ["x", "y", "x", "x", "y"]
    for rule in SUBTASK_RULES:
        labels, directions = target_directions(targets, subtasks, rule)
        again = target_directions(targets[list(order)], [subtasks[place] for place in order], rule)
        assert again[0] == labels
        np.testing.assert_allclose(again[1], directions, atol=1e-7)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("rule", SUBTASK_RULES)
def test_a_target_without_a_direction_is_an_error(rule, bad):
    targets = random_rows(0, 3, 4)
    targets[1] = bad
    with pytest.raises(TargetFormatError, match="zero or not finite"):
        target_directions(targets, ["a", "b", "a"], rule)


def test_no_targets_is_an_error():
    with pytest.raises(TargetFormatError, match="no target examples"):
        target_directions(np.empty((0, 4), np.float32), [], "mean_cosine")


def test_rows_without_a_direction_score_nan_and_others_are_untouched():
    pool, directions = random_rows(0, 5, 4), random_rows(1, 2, 4)
    clean = score_block(pool, directions)
    pool[1], pool[2, 0], pool[3, 1] = 0, np.nan, np.inf
    scores = score_block(pool, directions)
    assert np.isnan(scores[1:4]).all()
    np.testing.assert_array_equal(scores[[0, 4]], clean[[0, 4]])


@given(st.floats(1e-6, 1e6), st.integers(0, 20))
def test_the_length_of_a_row_does_not_matter(length, seed):
    pool, directions = random_rows(seed, 3, 8), random_rows(seed + 50, 2, 8)
    np.testing.assert_allclose(
        score_block(pool * np.float32(length), directions), score_block(pool, directions), atol=1e-6
    )


def test_weights_sum_to_one():
    assert normalised_weights({"epoch-1": 3e-5, "epoch-2": 1e-5}) == pytest.approx({"epoch-1": 0.75, "epoch-2": 0.25})
    for bad in ({"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": np.nan}, {}):
        with pytest.raises(ValueError, match="learning rates"):
            normalised_weights(bad)


def test_a_shard_is_scored_for_all_tasks_in_one_pass_as_a_double_loop_would():
    rates, forms = {"epoch-1": 3e-5, "epoch-2": 1e-5}, ["adamw", "sgd"]
    pool = {
        name: {form: random_rows(place * 10 + at, 8, 6) for at, form in enumerate(forms)}
        for place, name in enumerate(rates)
    }
    targets = {
        name: {task: random_rows(100 + place * 10 + len(task), 4, 6) for task in ("t", "long")}
        for place, name in enumerate(rates)
    }
    subtasks = {"t": ["b", "a", "b", "b"], "long": ["z"] * 4}
    sources = {name: Rows(features) for name, features in pool.items()}
    directions = {
        name: {
            (task, rule): target_directions(gradients, subtasks[task], rule)[1]
            for task, gradients in targets[name].items()
            for rule in SUBTASK_RULES
        }
        for name in rates
    }
    results = score_shard(sources, directions, normalised_weights(rates), forms)
    assert all(source.passes == len(forms) for source in sources.values())
    assert set(results) == {"t", "long"}
    for task, columns in results.items():
        labels = sorted(set(subtasks[task]))
        for form in forms:
            expected = np.zeros((8, len(labels)))
            for name, rate in rates.items():
                each = np.array(
                    [
                        [
                            np.mean(
                                [
                                    cosine(row, t)
                                    for t, s in zip(targets[name][task], subtasks[task], strict=True)
                                    if s == label
                                ]
                            )
                            for label in labels
                        ]
                        for row in pool[name][form]
                    ]
                )
                np.testing.assert_allclose(columns[f"{form}.mean_cosine.{name}"], each, atol=1e-6)
                expected += rate / sum(rates.values()) * each
            np.testing.assert_allclose(columns[f"{form}.mean_cosine"], expected, atol=1e-6)
            assert columns[f"{form}.cosine_of_mean"].shape == (8, len(labels))


def test_checkpoints_that_do_not_agree_are_refused():
    directions = {("t", "mean_cosine"): random_rows(0, 2, 4)}
    rows = Rows({"sgd": random_rows(1, 4, 4)})
    with pytest.raises(ValueError, match="checkpoints differ"):
        score_shard({"a": rows}, {"a": directions}, {"b": 1.0}, ["sgd"])
    fewer = Rows({"sgd": random_rows(1, 3, 4)})
    with pytest.raises(ValueError, match=r"has \[3, 4\] rows"):
        score_shard({"a": rows, "b": fewer}, {"a": directions, "b": directions}, {"a": 0.5, "b": 0.5}, ["sgd"])


def test_the_score_table_has_null_where_a_row_is_not_ok():
    rows = pl.DataFrame({"example_id": ["p", "q", None], "status": ["ok", "zero_gradient", "invalid_json"]})
    scores = {"sgd.mean_cosine": random_rows(0, 3, 2), "adamw.mean_cosine": random_rows(1, 3, 2)}
    table = score_table(rows, scores)
    assert table.columns == ["example_id", "status", "adamw.mean_cosine", "sgd.mean_cosine"]
    assert table.schema["sgd.mean_cosine"] == pl.Array(pl.Float32, 2)
    assert table["sgd.mean_cosine"].is_null().to_list() == [False, True, True]
    np.testing.assert_array_equal(table["sgd.mean_cosine"][0], scores["sgd.mean_cosine"][0])


def test_a_rows_status_is_the_first_reason_against_it():
    statuses = row_statuses(
        ["ok", "empty_turn", "ok", "ok", "ok"],
        {"epoch-1": np.array([0, 1, 2, 0, 6], np.uint8), "epoch-2": np.array([0, 1, 3, 5, 6], np.uint8)},
    )
    assert statuses == ["ok", "empty_turn", "no_loss_tokens", "nonfinite_gradient", "template_refuses"]


@pytest.mark.parametrize("form", ["reference", "adamw"])
def test_influence_agrees_with_the_published_code(form):
    from safetensors.numpy import load_file

    golden = load_file(GOLDEN / "golden.safetensors")
    meta = json.loads((GOLDEN / "meta.json").read_text())
    names = [entry["name"] for entry in meta["checkpoints"]]
    subtasks = [json.loads(line)["subtask"] for line in (GOLDEN / "target.jsonl").read_text().splitlines()]
    weights = normalised_weights({entry["name"]: entry["mean_learning_rate"] for entry in meta["checkpoints"]})
    sources = {name: Rows({form: golden[f"gamma_{form}.{name}"]}, block=7) for name in names}
    targets = {name: golden[f"target_gradient.{name}"] for name in names}

    each = [f"{place}" for place in range(6)]  # every example its own subtask: the influence on single examples
    directions = {
        name: {("each", "mean_cosine"): target_directions(targets[name], each, "mean_cosine")[1]} for name in names
    }
    influence = score_shard(sources, directions, weights, [form])["each"][f"{form}.mean_cosine"]
    np.testing.assert_allclose(influence, golden[f"influence_{form}"], atol=1e-5)

    directions = {
        name: {("task", "mean_cosine"): target_directions(targets[name], subtasks, "mean_cosine")[1]} for name in names
    }
    scores = score_shard(sources, directions, weights, [form])["task"][f"{form}.mean_cosine"]
    np.testing.assert_allclose(scores.max(axis=1), golden[f"score_{form}"], atol=1e-5)


class Blocks:
    """Features in memory, read in blocks of five rows."""

    storage = "float16"
    code_block_bytes = 0

    def __init__(self, features: np.ndarray) -> None:
        self.features, (self.rows, self.dimension) = features, features.shape
        self.code_blocks = -(-self.rows // 5)

    def codes(self, form, index, buffer=None):
        block = self.features[5 * index : 5 * index + 5]
        return 5 * index, block, np.ones(len(block), dtype=np.float32)


@pytest.mark.parametrize("width", [40, 3 * SIMILARITY_DIMENSION + 7])
def test_similarity_is_the_weighted_mean_of_the_cosines_at_all_checkpoints(width):
    rng = np.random.default_rng(0)
    common = rng.standard_normal(width)
    features = [
        (common * np.linspace(0, 3, 12)[:, None] + rng.standard_normal((12, width))).astype(np.float32)
        for _ in range(2)
    ]
    rows = np.array([0, 4, 5, 6, 11])
    found = similarity_vectors(
        {"epoch-1": Blocks(features[0]), "epoch-2": Blocks(features[1])},
        {"epoch-1": 0.75, "epoch-2": 0.25},
        "sgd",
        rows,
    )
    similar = found @ found.T
    exact = np.array(
        [[sum(w * cosine(f[i], f[j]) for w, f in zip((0.75, 0.25), features, strict=True)) for j in rows] for i in rows]
    )
    # Exact where nothing is folded; else within a few times 1/√2048, and closer where rows are nearly the same.
    np.testing.assert_allclose(similar, exact, atol=1e-5 if width == 40 else 0.08)
    assert found.shape == (5, 2 * min(width, SIMILARITY_DIMENSION))
