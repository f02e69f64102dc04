"""How many rows of the pool can be used, and what stands against the others: what `check`, `plan` and `run` say.

Belongs here: counting stored rows, or a sample of the source files, and words for it. Which rows are refused decides
`method/data/chat.py`, which are quarantined `method/data/row_formats.py`.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import polars as pl

from less_assets.errors import ChatFormatError, ModelLoadError
from less_assets.inspection.text_table import text_table
from less_assets.lineage.lineage import Lineage
from less_assets.project.model_files import embeddings_by_config, tokenizer_at_hand
from less_assets.project.project import Project
from less_assets.project.yaml_file import Problem
from less_assets.reading.files import EXAMPLES, score_file
from less_assets.reading.rows import refused_rows, with_refusals
from less_assets.reading.shard_features import PREFILTERED
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.method.data.chat import ChatEncoder

REASONS = 5
"""Reasons shown against rows of the pool, the most frequent ones."""
LOSS_LIMIT = 0.1
"""Share of unusable rows above which a pool needs a look."""
SAMPLE_ROWS, SAMPLE_FILES = 256, 4
"""Rows encoded of all sources together, and files of each source that they come from, about."""


def pool_counts(lineage: Lineage) -> dict[str, Any] | None:
    """Count the rows of the indexed pool; None if it is not indexed.

    Args:
        lineage: Reads the pool, its index and, if there are any, scores: they know which rows have no gradient.

    Returns:
        `rows`, `usable`, `quarantined` (could not be read), `refused` (nothing of them can be trained on), and
        `reasons`, the most frequent first: `reason`, `rows`, `for_example` (id, or file:line of a row without one),
        `detail`.
    """
    if lineage.status("pool_index").state != "fresh":
        return None
    return _counted(_judged(lineage))


def _judged(lineage: Lineage) -> Iterator[pl.DataFrame]:
    """Every shard's rows with the pool's status, the final one, and an example's name."""
    refused = refused_rows(lineage)
    scored = [task for task in lineage.project.task_names if lineage.status("influence_scores", task).state == "fresh"]
    for shard in lineage.shards():
        columns = ["example_id", "source_file", "source_row", "status", "detail"]
        stored = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, columns)
        judged = with_refusals(stored, refused.filter(pl.col("shard") == shard))
        if scored:
            scores = read_parquet(lineage.folder("influence_scores", scored[0]), score_file(shard), ["status"])
            scores = scores.with_columns(pl.col("status").replace(PREFILTERED, "ok"))  # it could be used
            ranks = judged["status"] == "ok"
            judged = judged.with_columns(pl.when(ranks).then(scores["status"]).otherwise("status").alias("status"))
        line = pl.format("{}:{}", "source_file", "source_row")
        yield judged.with_columns(pl.coalesce("example_id", line).alias("for_example"), stored["status"].alias("pool"))


def encode_sample(project: Project) -> tuple[list[Problem], dict[str, Any] | None]:
    """Count as `pool_counts` a few hundred rows of all sources: the first ones of some of their files.

    Returns:
        Why no conversation can be encoded at all, or for this model; and the counts, `for_example` as file:line, or
        None if that is so or the tokenizer is not on this machine.

    Raises:
        PoolFormatError: A file cannot be read; `check_data` has said so before.
    """
    from less_assets.method.data.chat import ChatEncoder, check_chat_format
    from less_assets.method.training.base_checks import refuse_larger_vocabulary

    model = project.model
    tokenizer = tokenizer_at_hand(model.base, trust_remote_code=model.trust_remote_code)
    if tokenizer is None:
        return [], None
    try:
        if embeddings := embeddings_by_config(model.base):
            refuse_larger_vocabulary(tokenizer, embeddings, model.base)
        check_chat_format(tokenizer, model.chat_format, model.date)
    except ModelLoadError as error:
        return [Problem("model.base", error.what, error.fix)], None
    except ChatFormatError as error:
        return [Problem("model.chat_format", error.what, error.fix)], None
    return [], _counted(_sample(project, ChatEncoder(tokenizer, model.chat_format, model.max_length, model.date)))


def _sample(project: Project, encoder: "ChatEncoder") -> Iterator[pl.DataFrame]:
    from less_assets.method.data.chat import refusals
    from less_assets.method.data.examples import read_rows
    from less_assets.method.data.row_files import list_files

    for source in project.pool.sources:
        files = list_files(source.path)
        files = files[:: -(-len(files) // SAMPLE_FILES)]
        rows = -(-SAMPLE_ROWS // (len(project.pool.sources) * len(files)))
        for file in files:
            for table in read_rows(file, source.name, source.format, max_rows=rows, dialect=source.dialect):
                line = pl.format("{}:{}", pl.lit(project.as_written(file)), "source_row")
                judged = with_refusals(table, refusals(encoder, table))
                yield judged.with_columns(line.alias("for_example"), table["status"].alias("pool"))


def _counted(parts: Iterable[pl.DataFrame]) -> dict[str, Any]:
    kinds = ["pool", "status"]
    first = [pl.first("for_example"), pl.first("detail")]
    counted = [
        part.filter(pl.col("pool") != "blank").group_by(kinds, maintain_order=True).agg(pl.len().alias("rows"), *first)
        for part in parts
    ]
    counts = pl.concat(counted).group_by(kinds, maintain_order=True).agg(pl.sum("rows"), *first)
    lost = counts.filter(pl.col("status") != "ok").sort("rows", "status", descending=[True, False])
    total, unused = int(counts["rows"].sum()), int(lost["rows"].sum())
    quarantined = int(lost.filter(pl.col("pool") != "ok")["rows"].sum())
    reasons = lost.head(REASONS).select(pl.col("status").alias("reason"), "rows", "for_example", "detail").to_dicts()
    figures = {"rows": total, "usable": total - unused, "quarantined": quarantined, "refused": unused - quarantined}
    return {**figures, "reasons": reasons}


def prefilter_in_words(lineage: Lineage) -> str:
    """What the prefilter keeps, for each task and in all; empty without one, or where that is not known."""
    shards = lineage.shards() if lineage.status("pool_index").state == "fresh" else []
    prefilter = lineage.project.prefilter
    if prefilter is None or not shards or any(lineage.status("kept_rows", key).state != "fresh" for key in shards):
        return ""
    rows, kept, sampled = (
        sum(lineage.summary("kept_rows", shard)[name] for shard in shards) for name in ("rows", "kept", "sampled")
    )
    tasks = ", ".join(
        f"{lineage.summary('prefiltered_pool', task)['kept']:,} rows for {task}" for task in lineage.project.task_names
    )
    return (
        f"Prefilter: {prefilter.strategy} keeps {tasks}; together {kept:,} of {rows:,} distinct rows "
        f"({kept / max(1, rows):.0%}) have gradients, and {sampled:,} of the others as a sample"
    )


def counts_in_words(counts: dict[str, Any], of: str = "Pool") -> str:
    """Say what `pool_counts` has counted: a line, a table of reasons, and a warning if too many rows are lost.

    Args:
        counts: From `pool_counts` or `sample_counts`.
        of: What was counted.
    """
    rows, usable, quarantined, refused = (counts[name] for name in ("rows", "usable", "quarantined", "refused"))
    lines = [f"{of}: {rows:,} rows, {usable:,} usable, {quarantined:,} quarantined, {refused:,} refused"]
    cells = [
        (reason["reason"], str(reason["rows"]), reason["for_example"], reason["detail"] or "")
        for reason in counts["reasons"]
    ]
    if cells:
        lines.append(text_table(cells, ("reason", "rows", "for example", "in words")))
    if rows - usable > LOSS_LIMIT * rows:
        lines.append(f"Warning: {1 - usable / rows:.0%} of these rows cannot be used; look at the reasons first.")
    return "\n".join(lines)
