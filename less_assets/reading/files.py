"""Names of the files in artifacts: written by one step, read by others; none is typed again.

Belongs here: names. What a table holds says docs/tables.md.
"""

# pool
EXAMPLES = "examples.parquet"
INDEX = "index.parquet"
EXCLUDED = "excluded.parquet"
REFUSED = "refused.parquet"
# prefilter
KEPT = "kept.parquet"
PREFILTER_SAMPLE = "prefilter_sample.parquet"
# warmup
SAMPLE = "sample.parquet"
# targets
TARGETS = "targets.parquet"
# gradients
FEATURES = "features.zarr"
BATCHING = "batching.json"
TARGET_FEATURES = "features.parquet"
# ranking
EXACT = "exact.parquet"
EXACT_COLUMN = "exact"
# selection
SUBSET = "subset.parquet"
SUBSET_JSONL = "subset.jsonl"
POOL_SCORES = "pool_scores.parquet"
SUBTASKS = "subtasks.json"
PASSED_OVER = "passed_over.parquet"
# tournament
CHOICE = "choice.parquet"
# evaluation
SAMPLES = "samples.parquet"
METRICS = "metrics.parquet"
BOARD = "leaderboard.parquet"
BOARD_MARKDOWN = "leaderboard.md"
# explanations
ROWS = "rows.parquet"
TOKENS = "tokens.parquet"
NEIGHBOURS = "neighbours.parquet"
REPORT = "report.html"
# finetuning
CURVE = "training_curve.parquet"
# baselines
EMBEDDINGS = "embeddings.parquet"
LOSSES = "losses.parquet"
PLACES = "places.json"
"""Member task and subtask of each number of a score."""


def score_file(shard: str) -> str:
    """Name of a shard's score table inside every asset of scores."""
    return f"scores/{shard}.parquet"
