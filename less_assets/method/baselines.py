"""Cheap ways to score a pool, so that LESS is compared with more than chance.

Belongs here: pure functions from texts, embeddings, losses or lengths to scores, higher is better. Ranking and budgets
are those of `selection.py`: a matrix (n, J) with one column per subtask or target example goes there with its labels,
so the same aggregations serve every strategy. Random and full need no score; they live there too.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from less_assets.method.chat import EncodedExample
    from less_assets.method.examples import Message

NGRAM_BUCKETS = 10_000
# Words, and runs of what is neither letter nor space, as NLTK's wordpunct_tokenize cuts, which DSIR uses.
_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]+")
# Single letters and digits count: they are the answers of many tasks.
_WORDS = r"(?u)\b\w+\b"


def text_of(messages: Sequence[Message]) -> str:
    """Return an example as one text, turns in order, roles left out: what BM25 and DSIR compare.

    Args:
        messages: The turns.
    """
    return "\n".join(message["content"] for message in messages)


# ---- BM25 ----


def bm25_scores(pool: Sequence[str], targets: Sequence[str], subtasks: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Score pool texts by BM25 with each target example as a query, averaged within the subtask.

    Lucene's variant with k1 = 1.5 and b = 0.75, words in lower case, no stop words and no stemming, for pools have many
    languages. The index holds the whole pool (about 8 bytes per distinct word of each text).

    Args:
        pool: n texts.
        targets: m target texts.
        subtasks: Subtask of each target, length m.

    Returns:
        The J subtasks, sorted, and scores float32 (n, J); a text without words scores 0.
    """
    import bm25s

    labels = sorted(set(subtasks))
    scores = np.zeros((len(pool), len(labels)), dtype=np.float32)
    documents = _bm25_words(pool)
    if not any(documents):
        return labels, scores
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(documents, show_progress=False)
    for words, subtask in zip(_bm25_words(targets), subtasks, strict=True):
        known = [word for word in words if word in index.vocab_dict]
        if known:
            scores[:, labels.index(subtask)] += index.get_scores(known)
    return labels, scores / np.array([subtasks.count(label) for label in labels], dtype=np.float32)


def _bm25_words(texts: Sequence[str]) -> list[list[str]]:
    pattern = re.compile(_WORDS)
    return [pattern.findall(text.lower()) for text in texts]


# ---- DSIR ----


def ngram_counts(texts: Iterable[str], buckets: int = NGRAM_BUCKETS) -> np.ndarray:
    """Count hashed unigrams and bigrams of all texts together (Xie et al. 2023, "DSIR", §3).

    Counts of parts of a pool add up to the pool's, so a pool can be counted shard by shard.

    Args:
        texts: Any number of texts.
        buckets: Number of hash buckets.

    Returns:
        int64 (buckets,).
    """
    counts = np.zeros(buckets, dtype=np.int64)
    for text in texts:
        counts += np.bincount(_ngram_buckets(text, buckets), minlength=buckets)
    return counts


def dsir_log_weights(
    texts: Iterable[str], target_counts: np.ndarray, pool_counts: np.ndarray, floor: float = 1e-8
) -> np.ndarray:
    """Return each text's log importance weight log p_target(x) − log p_pool(x) under bags of hashed n-grams.

    As in the paper and its code the weight is a sum over n-grams. With few target texts most n-grams of a row are
    unknown to the target and cost it log(floor) each, so short rows win; a larger floor softens that.

    Args:
        texts: n pool texts.
        target_counts: `ngram_counts` of the target texts, (buckets,).
        pool_counts: `ngram_counts` of the whole pool, (buckets,).
        floor: Added to every probability; 1e-8 is the published code's.

    Returns:
        float32 (n,); 0 for a text without n-grams.
    """
    log_target, log_pool = (np.log(counts / max(1, counts.sum()) + floor) for counts in (target_counts, pool_counts))
    difference = log_target - log_pool
    return np.array([difference[_ngram_buckets(text, len(difference))].sum() for text in texts], dtype=np.float32)


def _ngram_buckets(text: str, buckets: int) -> np.ndarray:
    words = _WORDS_AND_MARKS.findall(text.lower())
    ngrams = [*words, *(f"{first} {second}" for first, second in pairwise(words))]
    return np.array([zlib.crc32(ngram.encode("utf-8", "surrogatepass")) % buckets for ngram in ngrams], dtype=np.int64)


def with_gumbel_noise(log_weights: np.ndarray, example_ids: Sequence[str], seed: int) -> np.ndarray:
    """Add Gumbel noise, so that the best k of the result are k draws without replacement by weight (DSIR, §2.3).

    The noise is a function of id and seed: shards can be scored one by one and in any order.

    Args:
        log_weights: float (n,); not normalised.
        example_ids: Ids of the n rows.
        seed: Seed of the draw.

    Returns:
        float32 (n,).
    """
    key = str(seed).encode()
    digests = [hashlib.blake2b(each.encode(), digest_size=8, key=key).digest() for each in example_ids]
    uniform = (np.frombuffer(b"".join(digests), dtype="<u8").astype(np.float64) + 0.5) / 2.0**64
    # 1 − 2⁻⁵³ at most: the very largest digests would round to 1 and their noise to infinity.
    noise = -np.log(-np.log(np.minimum(uniform, 1 - 2.0**-53)))
    return (np.asarray(log_weights, dtype=np.float64) + noise).astype(np.float32)


# ---- RDS+ ----


def embed(model: Any, examples: Sequence[EncodedExample], *, token_budget: int = 4096) -> np.ndarray:
    """Embed examples by the last hidden state, averaged with weights that grow with the position (RDS+).

    Token i of n weighs i / (1 + … + n), because in a causal model later tokens have seen more (Ivison et al. 2025,
    §3; the pooling is Muennighoff's SGPT). All tokens count, prompt and answer alike.

    Args:
        model: A causal language model, with or without an adapter.
        examples: n encoded examples, at least one token each; labels play no part.
        token_budget: Padded tokens per batch.

    Returns:
        float32 (n, hidden size), not normalised.
    """
    import torch

    from less_assets.method.batching import collate, plan_batches
    from less_assets.method.generation import inference

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings: np.ndarray | None = None
    with inference(model):
        for batch in plan_batches([len(example.input_ids) for example in examples], token_budget):
            padded = collate([examples[i] for i in batch], pad_token_id=0)
            mask = padded["attention_mask"].to(model.device)
            states = core.base_model(
                input_ids=padded["input_ids"].to(model.device), attention_mask=mask, use_cache=False
            ).last_hidden_state
            pooled = position_weighted_mean(states.to(torch.float32), mask).cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((len(examples), pooled.shape[1]), dtype=np.float32)
            embeddings[batch] = pooled
    return np.empty((0, 0), dtype=np.float32) if embeddings is None else embeddings


def position_weighted_mean(states: Any, mask: Any) -> Any:
    """Average hidden states with weights proportional to the position, 1 for the first token.

    Args:
        states: Tensor (rows, tokens, hidden size).
        mask: Tensor (rows, tokens), 1 for tokens and 0 for padding.

    Returns:
        Tensor (rows, hidden size).
    """
    weights = (mask.cumsum(1) * mask).to(states.dtype)
    return (states * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)


def cosine_scores(pool: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the cosine of every pool embedding with every target embedding.

    RDS+ lets the target examples take their nearest remaining row in turn: rank these columns with `round_robin`, one
    label per target example (Ivison et al. 2025, algorithm 1).

    Args:
        pool: float (n, d).
        targets: float (m, d).

    Returns:
        float32 (n, m); NaN, which never ranks, for a row without length or with values that are not finite.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        pool, targets = (
            np.asarray(each, dtype=np.float32) / np.linalg.norm(each, axis=1, keepdims=True) for each in (pool, targets)
        )
        return pool @ targets.T


# ---- perplexity and length ----


def perplexity_scores(losses: np.ndarray, keep: Literal["mid", "top"]) -> np.ndarray:
    """Score rows by the base model's loss on them: the middle of the pool's distribution, or the highest.

    Marion et al. 2023 ("When less is more") found the middle of the perplexity distribution best for pretraining. The
    loss is the log of the perplexity, so both have one order.

    Args:
        losses: Mean loss of each row of the whole pool, (n,); NaN stays NaN and never ranks.
        keep: "mid": nearest to the median in rank; "top": highest perplexity.

    Returns:
        float32 (n,).
    """
    losses = np.asarray(losses, dtype=np.float64)
    scores = np.full(losses.shape, np.nan, dtype=np.float32)
    finite = np.isfinite(losses)
    if keep == "top":
        scores[finite] = losses[finite]
        return scores
    ordered = np.sort(losses[finite])
    # Equal losses share the middle of their ranks, so that copies score alike.
    ranks = (np.searchsorted(ordered, losses[finite], "left") + np.searchsorted(ordered, losses[finite], "right")) / 2
    scores[finite] = -np.abs(ranks / max(1, len(ordered)) - 0.5)
    return scores


def length_matched_log_weights(lengths: np.ndarray, reference: np.ndarray, bins_per_octave: int = 2) -> np.ndarray:
    """Return log weights under which random draws have the reference's distribution of lengths.

    The control for "it only picked rows of a certain length": everything but the length is left to chance. The weight
    is the ratio of the two histograms over log2(length). Rank with `with_gumbel_noise`.

    Args:
        lengths: Lengths of the whole pool in tokens, int (n,), at least 1 each.
        reference: Lengths to match, int (m,), such as those of a selected subset or of the targets.
        bins_per_octave: Histogram bins per doubling of the length.

    Returns:
        float64 (n,); lengths that the reference does not have rank after all that it has.
    """
    bins, targets = (
        np.floor(np.log2(np.maximum(1, np.asarray(each))) * bins_per_octave).astype(np.int64)
        for each in (lengths, reference)
    )
    size = int(max(bins.max(initial=0), targets.max(initial=0))) + 1
    pool_share = np.bincount(bins, minlength=size) / max(1, len(bins))
    wanted_share = np.bincount(targets, minlength=size) / max(1, len(targets))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(wanted_share / pool_share)
    # Far below any Gumbel noise (at most 37), yet finite, so that a budget larger than the match can be filled.
    return np.maximum(ratio, -1000.0)[bins]
