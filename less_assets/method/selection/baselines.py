"""Cheap ways to score a pool, so that LESS is compared with more than chance.

Belongs here: pure functions from texts, embeddings, losses or lengths to scores, higher is better. Ranking and budgets
are those of `selection.py`: a matrix (n, J) with one column per subtask or target example goes there with its labels,
so the same aggregations serve every strategy. Random and full need no score; they live there too. The functions that
the table of strategies (`project/strategies.py`) names for text and embeddings are `bm25`, `dsir`, `rds`, `perplexity`.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from less_assets.errors import UnsupportedModelError
from less_assets.method.data.chat import IGNORED
from less_assets.method.selection.scorers import EmbeddedRows, PoolScorer, PoolTexts, TargetExamples, Texts

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from less_assets.method.data.chat import EncodedExample
    from less_assets.method.data.conversations import Message

NGRAM_BUCKETS = 10_000
# Words, and runs of what is neither letter nor space, as NLTK's wordpunct_tokenize cuts, which DSIR uses.
_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]+")
# Single letters and digits count: they are the answers of many tasks.
_WORDS = re.compile(r"(?u)\b\w+\b")
K1, B = 1.5, 0.75
BINS_PER_OCTAVE = 2
LENGTH_BINS = 64  # lengths up to 2**32


def text_of(messages: Sequence[Message]) -> str:
    """Return an example as one text, turns in order, roles left out: what BM25 and DSIR compare.

    Args:
        messages: The turns.
    """
    from less_assets.method.data.conversations import full_text

    return "\n".join(map(full_text, messages))


# ---- BM25 ----


@dataclass
class WordStatistics:
    """What BM25 needs to know of the whole pool, for the words of the queries only; a pool is counted shard by shard.

    Attributes:
        words: Word of the queries -> its column.
        containing: int64 (words,), texts of the pool that contain the word.
        texts: Number of texts counted.
        total_words: Words in all of them.
    """

    words: dict[str, int]
    containing: np.ndarray
    texts: int = 0
    total_words: int = 0

    @classmethod
    def of(cls, targets: Iterable[str]) -> WordStatistics:
        """Statistics over the words of these target texts, nothing counted yet."""
        words = {
            word: column for column, word in enumerate(sorted({word for text in targets for word in _bm25_words(text)}))
        }
        return cls(words, np.zeros(len(words), dtype=np.int64))

    def count(self, texts: Iterable[str]) -> None:
        """Count some texts of the pool."""
        for text in texts:
            words = _bm25_words(text)
            self.texts += 1
            self.total_words += len(words)
            self.containing[[self.words[word] for word in set(words) if word in self.words]] += 1


def bm25_scores(
    texts: Sequence[str], targets: Sequence[str], subtasks: Sequence[str], pool: WordStatistics
) -> tuple[list[str], np.ndarray]:
    """Score texts of a pool by BM25 with each target example as a query, averaged within the subtask.

    Lucene's variant (Robertson and Zaragoza 2009, §3; idf ln(1 + (N − n + ½) / (n + ½))) with k1 = 1.5 and b = 0.75,
    words in lower case, no stop words and no stemming, for pools have many languages; the same numbers as the package
    bm25s, whose index would hold the whole pool. A query that says a word twice counts it twice.

    Args:
        texts: n texts of the pool.
        targets: m target texts.
        subtasks: Subtask of each target, length m.
        pool: Statistics of the whole pool over the words of these targets.

    Returns:
        The J subtasks, sorted, and scores float32 (n, J); a text without words of a query scores 0.
    """
    labels = sorted(set(subtasks))
    wanted = np.zeros((len(pool.words), len(labels)))  # how often a mean query of the subtask says the word
    for text, subtask in zip(targets, subtasks, strict=True):
        for word, count in Counter(_bm25_words(text)).items():
            wanted[pool.words[word], labels.index(subtask)] += count / subtasks.count(subtask)
    idf = np.log1p((pool.texts - pool.containing + 0.5) / (pool.containing + 0.5))
    weights = idf[:, None] * wanted
    average = pool.total_words / max(1, pool.texts)
    scores = np.zeros((len(texts), len(labels)), dtype=np.float32)
    for row, text in enumerate(texts):
        words = _bm25_words(text)
        occurrences = Counter(pool.words[word] for word in words if word in pool.words)
        if occurrences:
            counts = np.fromiter(occurrences.values(), dtype=np.float64)
            scores[row] = (counts / (counts + K1 * (1 - B + B * len(words) / average))) @ weights[list(occurrences)]
    return labels, scores


def bm25(targets: TargetExamples, pool: PoolTexts) -> PoolScorer[Texts]:
    """The rule `bm25`: one score a subtask."""
    statistics = WordStatistics.of(targets.texts)
    for texts in pool():
        statistics.count(texts)
    column = dict(zip(targets.subtasks, targets.columns, strict=True))
    return PoolScorer(
        [column[label] for label in sorted(column)],
        lambda texts: bm25_scores(texts, targets.texts, targets.subtasks, statistics)[1],
    )


def _bm25_words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


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


def dsir(targets: TargetExamples, pool: PoolTexts) -> PoolScorer[Texts]:
    """The rule `dsir`: one log weight a task; rows are drawn by it."""
    members = list(dict.fromkeys(targets.members))
    wanted = [
        ngram_counts(text for text, member in zip(targets.texts, targets.members, strict=True) if member == name)
        for name in members
    ]
    counts = np.zeros(NGRAM_BUCKETS, dtype=np.int64)
    for texts in pool():
        counts += ngram_counts(texts)
    return PoolScorer(
        [(member, "all") for member in members],
        lambda texts: np.stack([dsir_log_weights(texts, target_counts, counts) for target_counts in wanted], axis=1),
    )


def _ngram_buckets(text: str, buckets: int) -> np.ndarray:
    words = _WORDS_AND_MARKS.findall(text.lower())
    ngrams = [*words, *(f"{first} {second}" for first, second in pairwise(words))]
    return np.array([zlib.crc32(ngram.encode("utf-8", "surrogatepass")) % buckets for ngram in ngrams], dtype=np.int64)


def draw_key(seed: int, stream: str) -> bytes:
    """Key of the hash that ranks ids in a draw: another one for every seed and stream."""
    return f"{stream}:{seed}".encode() if stream else str(seed).encode()


def with_gumbel_noise(log_weights: np.ndarray, example_ids: Sequence[str], seed: int, stream: str = "") -> np.ndarray:
    """Add Gumbel noise, so that the best k of the result are k draws without replacement by weight (DSIR, §2.3).

    The noise is a function of id, seed and stream: shards can be scored one by one and in any order.

    Args:
        log_weights: float (n,); not normalised.
        example_ids: Ids of the n rows.
        seed: Seed of the draw.
        stream: What the draw is for: streams are independent, also at equal seeds.

    Returns:
        float32 (n,).
    """
    key = draw_key(seed, stream)
    digests = [hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in example_ids]
    uniform = (np.frombuffer(b"".join(digests), dtype="<u8").astype(np.float64) + 0.5) / 2.0**64
    # 1 − 2⁻⁵³ at most: the very largest digests would round to 1 and their noise to infinity.
    noise = -np.log(-np.log(np.minimum(uniform, 1 - 2.0**-53)))
    return (np.asarray(log_weights, dtype=np.float64) + noise).astype(np.float32)


# ---- RDS+ ----


@dataclass(frozen=True)
class Embedded:
    """What one forward pass makes of n examples.

    Attributes:
        embeddings: float32 (n, hidden size), not normalised.
        losses: float32 (n,), mean cross-entropy over the loss tokens in nats, the log of the perplexity; NaN for an
            example without loss tokens.
    """

    embeddings: np.ndarray
    losses: np.ndarray


def embed(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[EncodedExample],
    *,
    token_budget: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed examples by the last hidden state, averaged with weights that grow with the position (RDS+).

    Token i of n weighs i / (1 + … + n), because in a causal model later tokens have seen more (Ivison et al. 2025,
    §3; the pooling is Muennighoff's SGPT). All tokens count, prompt and answer alike. Losses come from the same pass.

    Args:
        model: A causal language model, with or without an adapter.
        examples: n encoded examples, at least one token each.
        token_budget: Padded tokens per batch.
        on_progress: Called with the number of examples done since the last call.

    Raises:
        UnsupportedModelError: Naming the architecture, if it hides its final hidden states or padding changes them.
    """
    from less_assets.method.data.batching import plan_batches
    from less_assets.method.evaluation.generation import inference

    losses = np.full(len(examples), np.nan, dtype=np.float32)
    embeddings: np.ndarray | None = None
    with inference(model), _final_states(model) as final_states:
        if examples:
            _check_padding(model, final_states)
        for rows in plan_batches([len(example.input_ids) for example in examples], token_budget):
            pooled, losses[rows] = _embed_batch(model, final_states, [examples[row] for row in rows])
            if embeddings is None:
                embeddings = np.empty((len(examples), pooled.shape[1]), dtype=np.float32)
            embeddings[rows] = pooled
            if on_progress:
                on_progress(len(rows))
    return Embedded(np.empty((0, 0), dtype=np.float32) if embeddings is None else embeddings, losses)


@contextmanager
def _final_states(model: PreTrainedModel | PeftModel) -> Iterator[list[Tensor]]:
    """Yield a list that holds, after each forward pass, the final hidden states (rows, tokens, hidden size).

    They are what the outermost model without a head returns. Where it lies differs between architectures (OPT and
    Llama 4 call an inner one directly), so all inner models are listened to, and the outermost, which returns last,
    is taken.
    """
    from transformers import PreTrainedModel

    core = _without_peft(model)
    final_states: list[Tensor] = []

    def keep(_module: object, _arguments: object, output: object) -> None:
        if (states := getattr(output, "last_hidden_state", None)) is not None:
            final_states[:] = [states]

    inner = [module for module in core.modules() if isinstance(module, PreTrainedModel) and module is not core]
    hooks = [module.register_forward_hook(keep) for module in inner]
    try:
        yield final_states
    finally:
        for hook in hooks:
            hook.remove()


def _embed_batch(
    model: PreTrainedModel | PeftModel, final_states: list[Tensor], examples: Sequence[EncodedExample]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float32 (rows, hidden size) and mean losses float32 (rows,) of one batch."""
    import torch
    from torch.nn.functional import cross_entropy

    from less_assets.method.data.batching import collate
    from less_assets.method.evaluation.generation import keeps_logits

    batch = {name: tensor.to(model.device) for name, tensor in collate(examples, 0).items()}
    labels, mask = batch["labels"][:, 1:], batch["attention_mask"]
    columns = torch.nonzero((labels != IGNORED).any(0)).flatten()  # the head is needed there only
    kept = {"logits_to_keep": columns} if keeps_logits(model) and len(columns) else {}
    final_states.clear()
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, **kept).logits
    logits = (logits if kept else logits[:, columns]).float()
    if not final_states or final_states[0].shape[:2] != mask.shape:
        raise _no_embeddings(model, "It does not return its final hidden states")
    losses = np.full(len(examples), np.nan, dtype=np.float32)
    for row in range(len(examples)):
        wanted = labels[row, columns]
        if (wanted != IGNORED).any():
            losses[row] = float(cross_entropy(logits[row], wanted, ignore_index=IGNORED))
    return position_weighted_mean(final_states.pop().float(), mask).cpu().numpy(), losses


def _check_padding(model: PreTrainedModel | PeftModel, final_states: list[Tensor]) -> None:
    """Refuse a model for which a row's embedding or loss depends on its padding: two short rows show it."""
    from less_assets.method.data.probe_rows import probe_rows

    full_precision = next(model.parameters()).element_size() >= 4
    allowed = 1e-3 if full_precision else 0.1
    vocabulary = cast("nn.Embedding", _without_peft(model).get_input_embeddings()).num_embeddings
    rows = probe_rows(vocabulary, 0)
    together, losses = _embed_batch(model, final_states, rows)
    for row, (embedding, loss) in enumerate(zip(together, losses, strict=True)):
        (alone,), (loss_alone,) = _embed_batch(model, final_states, [rows[row]])
        if not np.isfinite(alone).all():
            continue  # a damaged model: its scores say so row by row
        error = np.linalg.norm(embedding - alone) / np.linalg.norm(alone)
        if not (error <= allowed and abs(loss - loss_alone) <= allowed * abs(loss_alone)):
            raise _no_embeddings(
                model, f"Padding changes a row's embedding by {error:.1%}, its loss from {loss_alone:.4f} to {loss:.4f}"
            )


def _without_peft(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def _no_embeddings(model: PreTrainedModel | PeftModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{reason}: this architecture can't embed rows or take their perplexity.",
        where=type(_without_peft(model)).__name__,
        fix="Leave out recipes with the strategies rds, perplexity and target_tuned, or choose another base model.",
    )


def position_weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
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
            np.asarray(vectors, dtype=np.float32) / np.linalg.norm(vectors, axis=1, keepdims=True)
            for vectors in (pool, targets)
        )
        cosines: np.ndarray = pool @ targets.T
    return cosines


def rds(targets: TargetExamples) -> PoolScorer[EmbeddedRows]:
    """The rule `rds`: one cosine a target example."""
    return PoolScorer(targets.columns, lambda column: cosine_scores(column("embedding"), targets.embeddings))


# ---- perplexity and length ----


def perplexity(targets: TargetExamples) -> PoolScorer[EmbeddedRows]:
    """The rule `perplexity`: the base model's loss; rows rank by `perplexity_scores` of it."""
    return PoolScorer([(targets.task, "all")], lambda column: column("loss")[:, None])


def perplexity_scores(losses: np.ndarray, keep: Literal["mid", "top"], pool: np.ndarray) -> np.ndarray:
    """Score rows by the base model's loss on them: the middle of the pool's distribution, or the highest.

    Marion et al. 2023 ("When less is more") found the middle of the perplexity distribution best for pretraining. The
    loss is the log of the perplexity, so both have one order.

    Args:
        losses: Mean loss of some rows of the pool, (n,); NaN stays NaN and never ranks.
        keep: "mid": nearest to the median in rank; "top": highest perplexity.
        pool: Mean losses of the whole pool; those that are not finite do not count.

    Returns:
        float32 (n,).
    """
    losses = np.asarray(losses, dtype=np.float64)
    scores = np.full(losses.shape, np.nan, dtype=np.float32)
    finite = np.isfinite(losses)
    if keep == "top":
        scores[finite] = losses[finite]
        return scores
    ordered = np.sort(np.asarray(pool, dtype=np.float64)[np.isfinite(pool)])
    # Equal losses share the middle of their ranks, so that copies score alike.
    ranks = (np.searchsorted(ordered, losses[finite], "left") + np.searchsorted(ordered, losses[finite], "right")) / 2
    scores[finite] = -np.abs(ranks / max(1, len(ordered)) - 0.5)
    return scores


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """Count lengths in bins of half an octave; counts of parts of a pool add up to the pool's.

    Args:
        lengths: Lengths in tokens, int (n,); those below 1 count as 1.

    Returns:
        int64 (bins,).
    """
    return np.bincount(_length_bins(lengths), minlength=LENGTH_BINS)


def length_matched_log_weights(lengths: np.ndarray, pool: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return log weights under which random draws have the reference's distribution of lengths.

    The control for "it only picked rows of a certain length": everything but the length is left to chance. The weight
    is the ratio of the two histograms. Rank with `with_gumbel_noise`.

    Args:
        lengths: Lengths of some rows of the pool in tokens, int (n,).
        pool: `length_histogram` of the whole pool.
        reference: `length_histogram` of the lengths to match, such as those of a selected subset or of the targets.

    Returns:
        float64 (n,); lengths that the reference does not have rank after all that it has.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((reference / max(1, reference.sum())) / (pool / max(1, pool.sum())))
    # Far below any Gumbel noise (at most 37), yet finite, so that a budget larger than the match can be filled.
    weights: np.ndarray = np.maximum(np.nan_to_num(ratio, nan=-1000.0), -1000.0)[_length_bins(lengths)]
    return weights


def _length_bins(lengths: np.ndarray) -> np.ndarray:
    bins: np.ndarray = np.floor(np.log2(np.maximum(1, np.asarray(lengths))) * BINS_PER_OCTAVE).astype(np.int64)
    return bins
