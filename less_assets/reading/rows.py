"""Single rows of the pool, read back out of stored artifacts: where they stand, what they say, how they score.

Belongs here: looking rows up by id or address, for whoever explains them. Not here: what is made of it (`explain.py`,
`trace.py`, `report/`), or computing anything that is stored (`assets/`).
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl

from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.method.data.conversations import Conversation, stated, with_all_fields
from less_assets.project.warmup_steps import few_steps
from less_assets.reading.files import EXAMPLES, INDEX, REFUSED, TARGET_FEATURES, score_file
from less_assets.reading.shard_features import ShardFeatures
from less_assets.store.tables import read_parquet, scan_parquet

SHORTEST_PREFIX = 6
FILE_AND_LINE = re.compile(r"(?P<file>.+):(?P<line>[0-9]{1,18})")
ROWS_AT_ONCE = 512
"""Rows whose whole features are in memory at a time."""


def find_row(lineage: Lineage, example_id: str) -> pl.DataFrame:
    """All copies of a row of the pool, the one that counts first.

    Args:
        lineage: Reads the pool's index.
        example_id: The id, the beginning of one, or where it stands: `file:line`.

    Returns:
        Rows of `pool_index`, at least one.

    Raises:
        LessAssetsError: No usable row has such an id or stands there, or several do.
    """
    if place := FILE_AND_LINE.fullmatch(example_id.strip()):
        example_id = _id_at(lineage, place["file"], int(place["line"]))
    wanted = example_id.strip().lower()
    begins = scan_parquet(lineage.folder("pool_index"), INDEX).filter(pl.col("example_id").str.starts_with(wanted))
    rows = begins.collect().sort("canonical", descending=True)
    names = rows["example_id"].unique(maintain_order=True).to_list()
    if len(wanted) < SHORTEST_PREFIX or not names:
        raise LessAssetsError(
            f"The pool has no usable row {example_id!r}.",
            where=f"pool of {lineage.project.name}, {lineage.summary('pool_index')['usable']} usable rows",
            fix="ids stand in subset.jsonl, in the selection report and in examples.parquet of each shard; give at "
            f"least {SHORTEST_PREFIX} characters. Quarantined rows have none, and refused ones are not used",
        )
    if len(names) > 1:
        raise LessAssetsError(
            f"{len(names)} rows begin with {example_id!r}: {', '.join(names[:3])}", fix="give more of the id"
        )
    return rows


def _id_at(lineage: Lineage, file: str, number: int) -> str:
    """Id of the row that stands in a line of a source file, whose path may be given from any folder on."""
    name = file.removeprefix("./")
    statuses: dict[str, tuple[str | None, str]] = {}
    for shard in lineage.shards():
        rows = pool_rows(lineage, shard, ["source_file", "source_row", "example_id", "status"])
        same = (pl.col("source_file") == name) | pl.col("source_file").str.ends_with(f"/{name}")
        for path, _, example_id, status in rows.filter((pl.col("source_row") == number) & same).iter_rows():
            statuses[path] = (example_id, status)
    where = f"pool of {lineage.project.name}"
    if not statuses:
        raise LessAssetsError(
            f"The pool has no row {file}:{number}.",
            where=where,
            fix="name the file as the project file does, or by its name alone; lines count from 1",
        )
    if len(statuses) > 1:
        raise LessAssetsError(
            f"Several files are called {file}: {', '.join(sorted(statuses))}", fix="give more of the path"
        )
    ((path, (example_id, status)),) = statuses.items()
    if example_id is None or status != "ok":
        raise LessAssetsError(
            f"The row {path}:{number} is not used: {status}.",
            where=where,
            fix="the reasons stand at `instruction_pool` and `refused_rows`",
        )
    return example_id


def refused_rows(lineage: Lineage) -> pl.DataFrame:
    """The rows of the pool of which the base model's encoder leaves nothing: example_id, shard, row, status, detail.

    Args:
        lineage: Reads the pool's index.
    """
    if REFUSED in lineage.fresh("pool_index").files:
        return read_parquet(lineage.folder("pool_index"), REFUSED)
    texts = dict.fromkeys(("example_id", "shard", "status", "detail"), pl.String)
    return pl.DataFrame(schema={**texts, "row": pl.Int64})


def with_refusals(rows: pl.DataFrame, refused: pl.DataFrame) -> pl.DataFrame:
    """Rows with the encoder's `status` (and `detail`, if they have one) where it refuses them.

    Args:
        rows: Rows of the pool, whole and in order.
        refused: Columns `row` (number in `rows`), `status`, `detail`.
    """
    columns = [name for name in ("status", "detail") if name in rows.columns]
    return rows.with_columns(rows[name].scatter(refused["row"], refused[name]) for name in columns)


def pool_rows(lineage: Lineage, shard: str, columns: list[str]) -> pl.DataFrame:
    """A shard's rows, with the reason as `status` where one is quarantined or refused.

    Args:
        lineage: Reads the pool.
        shard: Key of the shard.
        columns: Columns of the pool's table, `status` among them.
    """
    rows = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, columns)
    return with_refusals(rows, refused_rows(lineage).filter(pl.col("shard") == shard))


def conversations_of(lineage: Lineage, shard: str, rows: pl.Series | None = None) -> pl.DataFrame:
    """What a shard's rows say: columns `example_id`, `messages`, `tools`, null where a row is quarantined.

    A pool that an earlier version wrote has fewer fields; they are null then.

    Args:
        lineage: Reads the pool.
        shard: Key of the shard.
        rows: Numbers of some rows, ascending; None: all.
    """
    table = scan_parquet(lineage.folder("instruction_pool", shard), EXAMPLES)
    if rows is not None:
        table = table.with_row_index("place").filter(pl.col("place").is_in(rows.implode()))
    return with_all_fields(table.collect()).select("example_id", "messages", "tools")


def conversations_by_id(lineage: Lineage, rows: pl.DataFrame) -> dict[str, Conversation]:
    """What rows of the pool say, by id.

    Args:
        lineage: Reads the pool.
        rows: Columns `shard` and `row`.
    """
    conversations: dict[str, Conversation] = {}
    for shard in rows["shard"].unique(maintain_order=True):
        wanted = conversations_of(lineage, shard)[rows.filter(pl.col("shard") == shard)["row"].to_list()]
        conversations |= {
            name: Conversation([stated(turn) for turn in messages], tools)
            for name, messages, tools in wanted.iter_rows()
        }
    return conversations


def scores_of(lineage: Lineage, task: str, rows: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """Columns of the score tables for some rows, in their order.

    Args:
        lineage: Reads `influence_scores`.
        task: The task.
        rows: Columns `shard` and `row`.
        columns: Names of score columns.
    """
    folder = lineage.folder("influence_scores", task)
    parts = []
    for shard in rows["shard"].unique(maintain_order=True):
        table = read_parquet(folder, score_file(shard), ["shard", "row", "status", "loss_tokens", *columns])
        parts.append(table[rows.filter(pl.col("shard") == shard)["row"].to_list()])
    places = rows.select("shard", pl.col("row").cast(pl.Int64))
    if not parts:
        return places
    return places.join(pl.concat(parts), on=["shard", "row"], how="left", maintain_order="left")


def score_column(form: str, rule: str, checkpoint: str | None = None) -> str:
    """Name of a score column."""
    return f"{form}.{rule}" if checkpoint is None else f"{form}.{rule}.{checkpoint}"


def subtask_label(lineage: Lineage, task: str) -> pl.Expr:
    """A selected row's subtask as the task's tables name it: of a group, `member/subtask`."""
    group = lineage.project.task(task).members is not None
    return pl.concat_str("task", "subtask", separator="/") if group else pl.col("subtask")


def checkpoint_weights(lineage: Lineage) -> dict[str, float]:
    """Normalised mean learning rate of each checkpoint that has any: there are no gradients at the others."""
    from less_assets.method.selection.influence import normalised_weights

    weights = normalised_weights(mean_learning_rates(lineage))
    return {name: weight for name, weight in weights.items() if weight}


def mean_learning_rates(lineage: Lineage) -> dict[str, float]:
    """Mean learning rate of each checkpoint's epoch."""
    return {
        name: lineage.summary("warmup_checkpoints", name)["mean_learning_rate"] for name in lineage.project.checkpoints
    }


def few_warmup_steps(lineage: Lineage) -> str | None:
    """What to say of a warm-up whose checkpoints were made after too few optimizer steps; None if they suffice."""
    warmup, last = lineage.project.warmup, lineage.project.checkpoints[-1]
    made = lineage.summary("warmup_checkpoints", last)
    return few_steps(warmup, made["step"], None if warmup.imported else made["examples"])


def target_features(lineage: Lineage, checkpoint: str, task: str) -> np.ndarray:
    """Sketched gradients of a task's target examples at a checkpoint, float32 (m, k)."""
    table = read_parquet(lineage.folder("target_gradients", f"{checkpoint}|{task}"), TARGET_FEATURES, ["features"])
    return np.stack(list(table["features"].to_numpy()))


def target_influence(
    lineage: Lineage, form: str, task: str, rows: pl.DataFrame, weights: Mapping[str, float]
) -> np.ndarray:
    """Influence of rows on every single target example, float32 (n, m), in the order of `rows`.

    Args:
        lineage: Reads features.
        form: Direction form.
        task: Whose target examples.
        rows: Columns `place` (0 … n − 1), `shard`, `row`.
        weights: Checkpoint -> normalised mean learning rate.
    """
    from less_assets.method.selection.neighbours import target_cosines

    targets = {name: target_features(lineage, name, task) for name in weights}
    cosines = np.zeros((rows.height, len(next(iter(targets.values())))), dtype=np.float32)
    for name, weight in weights.items():
        for places, features in features_of(lineage, name, form, rows):
            cosines[places] += target_cosines({name: features}, {name: targets[name]}, {name: weight})
    return cosines


def features_of(
    lineage: Lineage, checkpoint: str, form: str, rows: pl.DataFrame
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Features of rows, a few hundred at a time, in order of shard and row.

    Args:
        lineage: Reads features.
        checkpoint: At which checkpoint.
        form: Direction form.
        rows: Columns `place`, `shard`, `row`.

    Yields:
        Places (from the column `place`) and features float32 (·, k).
    """
    for (shard,), part in rows.sort("shard", "row").group_by("shard", maintain_order=True):
        features = ShardFeatures.of(lineage, checkpoint, str(shard))
        for piece in part.iter_slices(ROWS_AT_ONCE):
            yield piece["place"].to_list(), features.take(form, piece["row"].to_numpy())
