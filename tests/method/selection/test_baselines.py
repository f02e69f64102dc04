"""Baselines on texts, vectors and lengths whose order is known."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method.data.chat import EncodedExample
from less_assets.method.evaluation.evaluation import held_out_loss
from less_assets.method.selection import baselines
from less_assets.method.selection.baselines import (
    WordStatistics,
    bm25_scores,
    cosine_scores,
    dsir_log_weights,
    embed,
    length_histogram,
    length_matched_log_weights,
    ngram_counts,
    perplexity_scores,
    position_weighted_mean,
    text_of,
    with_gumbel_noise,
)
from less_assets.method.selection.scorers import TargetExamples
from less_assets.method.selection.selection import Budget, Candidates, select_by_score

POOL = [
    "The cat sat on the mat.",
    "Compute the integral of x squared.",
    "A cat and another cat, two cats in all: cat cat.",
    "Wie heißt die Hauptstadt von Finnland?",
    "",
    "!!!",
]


def ids(count):
    return [f"{i:032x}" for i in range(count)]


def select(scores, labels, rows):
    """Rank by `selection.select_by_score`, as the asset does; returns row numbers and labels."""
    matrix = np.asarray(scores, dtype=np.float32).reshape(len(scores), -1)
    table = pl.DataFrame(
        {
            "example_id": ids(len(matrix)),
            "source": "s",
            "shard": "s",
            "row": range(len(matrix)),
            "status": "ok",
            "canonical": True,
            "score": pl.Series(matrix, dtype=pl.Array(pl.Float32, matrix.shape[1])),
        },
        schema_overrides={"row": pl.Int64},
    )
    chosen = select_by_score(
        [Candidates("task", "score", tuple(labels), lambda: [table])], Budget("rows", rows), "round_robin"
    )
    return chosen.table["row"].to_list(), chosen.table["subtask"].to_list()


def bm25(pool, targets, subtasks):
    """Scores of a pool that is counted in two parts."""
    statistics = WordStatistics.of(targets)
    statistics.count(pool[:2])
    statistics.count(pool[2:])
    return bm25_scores(pool, targets, subtasks, statistics)


def test_bm25_finds_the_texts_that_share_rare_words():
    labels, scores = bm25(POOL, ["cat cat", "Hauptstadt", "the integral"], ["pets", "cities", "maths"])
    assert labels == ["cities", "maths", "pets"]
    assert scores.shape == (6, 3)
    assert scores.dtype == np.float32
    assert scores.argmax(axis=0).tolist() == [3, 1, 2]
    assert scores[4:].tolist() == [[0.0] * 3] * 2


def test_bm25_equals_the_printed_formula():
    _, scores = bm25(["a b b", "b c", "d"], ["b"], ["all"])
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    average = 6 / 3
    expected = [idf * n / (n + 1.5 * (1 - 0.75 + 0.75 * length / average)) for n, length in ((2, 3), (1, 2))]
    np.testing.assert_allclose(scores[:, 0], [*expected, 0.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "columns"),
    [(baselines.bm25, [("a", "pets"), ("b", "all"), ("b", "maths")]), (baselines.dsir, [("b", "all"), ("a", "all")])],
)
def test_a_rule_of_texts_scores_a_shard_by_what_it_knows_of_the_whole_pool(rule, columns):
    """Subtasks of a group stand under the task that has them; `b/all` is a subtask of that name."""
    targets = TargetExamples(
        "group", ["b", "a", "b"], ["b/maths", "a/pets", "b/all"], ["the integral", "cat cat", "Hauptstadt"]
    )
    in_shards = rule(targets, lambda: [POOL[:2], POOL[2:]])
    at_once = rule(targets, lambda: [POOL])
    assert in_shards.columns == at_once.columns == columns
    scores = at_once.score(POOL)
    assert scores.shape == (len(POOL), len(columns))
    np.testing.assert_allclose(np.concatenate([in_shards.score(POOL[:2]), in_shards.score(POOL[2:])]), scores)
    assert scores[:, columns.index(("b", "maths"))].argmax() == 1 if rule is baselines.bm25 else scores.any()


def test_the_rules_of_embeddings_read_the_column_they_rank_by():
    rows = {"embedding": np.array([[1.0, 0.0], [0.0, 2.0]], np.float32), "loss": np.array([3.0, 1.0], np.float32)}
    targets = TargetExamples("a", ["a", "a"], ["x", "x"], embeddings=np.array([[0.0, 1.0], [1.0, 0.0]], np.float32))
    cosines = baselines.rds(targets)
    assert cosines.columns == [("a", "x"), ("a", "x")]
    assert cosines.score(rows.__getitem__).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    losses = baselines.perplexity(TargetExamples("a", [], []))
    assert losses.columns == [("a", "all")]
    assert losses.score(rows.__getitem__).tolist() == [[3.0], [1.0]]


words = st.lists(st.sampled_from(["cat", "dog", "sum", "of", "two", "é"]), max_size=6).map(" ".join)


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=6), st.lists(words, min_size=1, max_size=3))
def test_bm25_equals_the_package_bm25s(pool, targets):
    import bm25s

    documents = [text.split() for text in pool]
    _, scores = bm25(pool, targets, [f"{place}" for place in range(len(targets))])
    if not any(documents):
        assert not scores.any()
        return
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(documents, show_progress=False)
    for place, target in enumerate(targets):
        known = [word for word in target.split() if word in index.vocab_dict]
        expected = index.get_scores(known) if known else np.zeros(len(pool))
        np.testing.assert_allclose(scores[:, place], expected, rtol=1e-4, atol=1e-6)


def test_bm25_averages_over_a_subtasks_examples_and_survives_unknown_words():
    _, once = bm25(POOL, ["cat"], ["pets"])
    _, twice = bm25(POOL, ["cat", "zebra unheard"], ["pets", "pets"])
    np.testing.assert_allclose(twice, once / 2)
    assert bm25(["", "?"], ["cat"], ["pets"])[1].tolist() == [[0.0], [0.0]]


def test_dsir_weighs_texts_of_the_targets_kind_higher():
    pool = ["the cat sat", "the dog sat", "sum of two numbers", "product of two numbers", ""]
    targets = ngram_counts(["a sum of two numbers", "add two numbers"])
    weights = dsir_log_weights(pool, targets, ngram_counts(pool))
    assert weights.argmax() == 2
    assert weights[2] > 0 > weights[3] > weights[0]

    softer = dsir_log_weights(pool, targets, ngram_counts(pool), floor=0.05)
    assert weights[2] - weights[3] > softer[2] - softer[3] > 0
    assert weights[4] == 0.0


def test_dsir_equals_the_definition_on_a_worked_case():
    target, pool = ngram_counts(["a a"]), ngram_counts(["a b"])
    # Unigram a twice and bigram "a a" once; against a, b and "a b" once each.
    expected = np.log(2 / 3 + 1e-8) - np.log(1 / 3 + 1e-8)
    assert dsir_log_weights(["a"], target, pool)[0] == pytest.approx(expected, rel=1e-6)
    assert dsir_log_weights(["b"], target, pool)[0] == pytest.approx(np.log(1e-8) - np.log(1 / 3 + 1e-8), rel=1e-6)


@given(st.lists(st.text(max_size=30), max_size=8), st.integers(0, 8))
def test_ngram_counts_of_parts_add_up(texts, cut):
    whole = ngram_counts(texts, 97)
    assert (whole == ngram_counts(texts[:cut], 97) + ngram_counts(texts[cut:], 97)).all()


def test_gumbel_draws_follow_the_weights_and_do_not_depend_on_order():
    log_weights = np.log([0.6, 0.3, 0.1])
    names = ids(3)
    first = [int(with_gumbel_noise(log_weights, names, seed).argmax()) for seed in range(3000)]
    np.testing.assert_allclose(np.bincount(first) / 3000, [0.6, 0.3, 0.1], atol=0.03)
    forward = with_gumbel_noise(log_weights, names, 7)
    backward = with_gumbel_noise(log_weights[::-1], names[::-1], 7)
    assert forward.tolist() == backward[::-1].tolist()
    assert forward.tolist() != with_gumbel_noise(log_weights, names, 8).tolist()


def test_position_weighted_mean_of_known_vectors():
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], [[6.0, 0.0], [0.0, 6.0], [6.0, 6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(position_weighted_mean(states, mask), torch.tensor([[1 / 3, 2 / 3], [4.0, 5.0]]))


def test_embeddings_do_not_depend_on_the_batch(byte_model):
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 200, size=n).astype(np.int32) for n in (3, 17, 8, 30)]
    examples = [EncodedExample(f"row-{i}", row, row) for i, row in enumerate(rows)]
    together = embed(byte_model, examples).embeddings
    alone = np.concatenate([embed(byte_model, [example]).embeddings for example in examples])
    assert together.shape == (4, 32)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    states = byte_model(input_ids=torch.tensor(rows[0]).long()[None], output_hidden_states=True).hidden_states[-1][0]
    expected = (states * torch.tensor([[1.0], [2.0], [3.0]]) / 6).sum(0).detach()
    np.testing.assert_allclose(together[0], expected, rtol=1e-4, atol=1e-5)
    assert embed(byte_model, []).embeddings.shape == (0, 0)


def test_the_losses_of_an_embedding_are_the_held_out_losses(byte_model):
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 200, size=n).astype(np.int32) for n in (3, 17, 8, 30)]
    labels = [np.where(np.arange(len(row)) < 2, -100, row) for row in rows]
    examples = [EncodedExample(f"{i}", row, label) for i, (row, label) in enumerate(zip(rows, labels, strict=True))]
    silent = EncodedExample("silent", rows[1], np.full(17, -100, np.int32))
    found = embed(byte_model, [*examples, silent], token_budget=40).losses
    np.testing.assert_allclose(found[:4], held_out_loss(byte_model, examples)[0], rtol=1e-5)
    assert np.isnan(found[4])
    assert np.isnan(embed(byte_model, [silent]).losses).all()


def test_rds_lets_target_examples_take_turns():
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    pool = np.array([[5.0, 0.1], [3.0, 0.3], [1.0, 1.0], [0.2, 1.0], [0.0, 0.0]])
    scores = cosine_scores(pool, targets)
    assert scores[:2, 0].tolist() == pytest.approx([5 / np.hypot(5, 0.1), 3 / np.hypot(3, 0.3)])
    assert np.isnan(scores[4]).all()
    # The second row is nearer to a target than the fourth, but it is not the second target's turn to take it.
    assert select(scores, ["t0", "t1"], 4) == ([0, 3, 1, 2], ["t0", "t1", "t0", "t1"])


def test_perplexity_mid_and_top():
    losses = np.array([5.0, 1.0, 3.0, np.nan, 2.0, 4.0, np.inf])
    top, mid = perplexity_scores(losses, "top", losses), perplexity_scores(losses, "mid", losses)
    parts = [perplexity_scores(part, "mid", losses) for part in (losses[:3], losses[3:])]
    np.testing.assert_array_equal(np.concatenate(parts), mid)
    assert np.argsort(-top[[0, 1, 2, 4, 5]]).tolist() == [0, 4, 2, 3, 1]
    assert np.nanargmax(mid) == 2
    assert mid[0] == mid[1] == np.nanmin(mid)
    assert np.isnan(top[[3, 6]]).all()
    assert np.isnan(mid[[3, 6]]).all()
    assert perplexity_scores(np.array([]), "mid", losses).shape == (0,)
    ties = np.array([1.0, 2.0, 2.0, 2.0, 3.0])
    assert len(set(perplexity_scores(ties, "mid", ties)[1:4].tolist())) == 1


def test_length_matched_draws_have_the_references_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, size=20_000)
    reference = np.exp(rng.normal(np.log(60), 0.3, size=400)).astype(int)
    pool = length_histogram(lengths[:9000]) + length_histogram(lengths[9000:])
    weights = length_matched_log_weights(lengths, pool, length_histogram(reference))
    scores = with_gumbel_noise(weights, ids(len(lengths)), seed=0)
    drawn = lengths[np.argsort(-scores)[:300]]
    assert np.median(drawn) == pytest.approx(np.median(reference), rel=0.15)
    np.testing.assert_allclose(
        np.quantile(np.log(drawn), [0.1, 0.9]), np.quantile(np.log(reference), [0.1, 0.9]), atol=0.2
    )


def test_lengths_without_reference_come_last_but_can_fill_a_budget():
    lengths = np.array([10, 500, 10, 500])
    weights = length_matched_log_weights(lengths, length_histogram(lengths), length_histogram(np.array([10, 11])))
    assert np.isfinite(weights).all()
    scores = with_gumbel_noise(weights, ids(4), seed=0)
    assert set(np.argsort(-scores)[:2].tolist()) == {0, 2}


def test_text_of_joins_turns():
    assert text_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "a\nb"
