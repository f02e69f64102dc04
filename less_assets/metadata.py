"""What a person sees at a materialization in the Dagster UI: counts, small tables, small charts.

Belongs here: turning manifests and tables into Dagster metadata. Charts are drawn in `report/charts.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import dagster as dg
import polars as pl

from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.manifest import Manifest

TABLE_ROWS = 20
PREVIEW_CHARACTERS = 160

COLUMN_MEANINGS = {
    "aggregate": "how subtasks make one ranking",
    "answer": "the text that was generated",
    "assistant_prefix": "start of the last turn, without loss",
    "canonical": "whether this is the copy that counts",
    "completion": "the rest of the last turn, with loss",
    "copies": "rows of the pool with this id",
    "detail": "the reason in words",
    "exact": "unprojected influence per subtask, summed over checkpoints",
    "example_id": "hash of the messages, 32 hexadecimal digits",
    "high": "upper end of the 95 % interval",
    "influence": "exact influence on the row's subtask",
    "loss": "mean cross-entropy over the loss tokens, nats",
    "loss_tokens": "tokens with loss",
    "low": "lower end of the 95 % interval",
    "member": "the task that the example belongs to",
    "messages": "the conversation",
    "metric": "name of the metric",
    "momentum": "part of the influence that belongs to no token",
    "n": "samples",
    "norm": "exact norm of the gradient",
    "rank": "1 is the best",
    "recipe": "name of the recipe",
    "row": "row in the shard, from 0",
    "score": "influence by which the row was ranked",
    "shard": "shard of the pool",
    "share": "each loss token's share of the influence",
    "sketched_score": "score by which the row became a candidate",
    "source": "name of the pool source",
    "source_file": "file that the row stands in",
    "source_row": "line of the file, from 1",
    "status": "ok, or the reason why the row is not used",
    "subtask": "subtask of the task",
    "task": "name of the task",
    "text": "each loss token's text",
    "value": "value of the metric",
}
"""What columns mean, wherever they appear; docs/tables.md has all of them, table by table."""

_ROW = {"example_id": ["example_id"], "source": ["source"]}
COLUMN_SOURCES: dict[str, dict[str, dict[str, list[str]]]] = {
    "pool_index": {"instruction_pool": _ROW},
    "warmup_sample": {"pool_index": {"example_id": ["example_id"], "shard": ["shard"]}},
    "target_gradients": {"target_examples": {"example_id": ["example_id"], "subtask": ["subtask"]}},
    "influence_scores": {
        "pool_index": _ROW | {"shard": ["shard"], "row": ["row"]},
        "target_gradients": {"{form}.{rule}": ["features", "subtask"], "{form}.{rule}.{checkpoint}": ["features"]},
    },
    "exact_scores": {
        "influence_scores": {"example_id": ["example_id"], "sketched_score": ["{form}.{rule}"]},
        "target_examples": {"exact": ["messages", "completion", "subtask"]},
        "pool_index": {"source": ["source"], "shard": ["shard"], "row": ["row"]},
    },
    "selected_subset": {
        "pool_index": _ROW | {"shard": ["shard"], "row": ["row"]},
        "influence_scores": {
            "score": ["{form}.{rule}"],
            "rank": ["{form}.{rule}"],
            "subtask": ["{form}.{rule}"],
            "loss_tokens": ["loss_tokens"],
        },
        "exact_scores": {"score": ["exact"], "rank": ["exact"], "subtask": ["exact"]},
    },
    "token_attribution": {
        "selected_subset": {"example_id": ["example_id"], "subtask": ["subtask"], "text": ["messages"]},
        "influence_scores": {"example_id": ["example_id"]},
        "target_examples": {"share": ["messages", "completion"], "influence": ["messages", "completion"]},
    },
    "task_results": {"eval_results": {name: [name] for name in ("metric", "subtask", "value", "low", "high", "n")}},
    "leaderboard": {"task_results": {name: [name] for name in ("task", "recipe", "metric", "value", "low", "high")}},
}
"""Asset -> upstream asset -> column -> the upstream columns that it is made from."""


def summary(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """The figures of a manifest's summary, each under its own name."""
    return {name: _value(value) for name, value in manifest.summary.items() if value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, Mapping | list):
        return dg.MetadataValue.json(value)
    return value


def table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """A small table as it is; nested values become text."""
    records = [
        dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in frame.iter_rows(named=True)
    ]
    return dg.MetadataValue.table(records=records, schema=column_schema(frame) if not records else None)


def _cell(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return str(value)


def example_table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """Examples with the start of their first user turn and of their last turn.

    Args:
        frame: With a column `messages`; other columns are shown before it.
    """
    others = [name for name in frame.columns if name not in ("messages", "detail", "status")]
    shown = frame.select(
        *others,
        pl.Series("prompt", [_preview(messages, first=True) for messages in frame["messages"]], pl.String),
        pl.Series("answer", [_preview(messages, first=False) for messages in frame["messages"]], pl.String),
    )
    return table(shown)


def _preview(messages: list[dict[str, str]], *, first: bool) -> str:
    if first:
        turns = [message["content"] for message in messages if message["role"] == "user"]
    else:
        turns = [messages[-1]["content"]]
    text = " ".join(turns[0].split()) if turns else ""
    return text if len(text) <= PREVIEW_CHARACTERS else text[: PREVIEW_CHARACTERS - 1] + "…"


def column_schema(frame: pl.DataFrame) -> dg.TableSchema:
    """Names and types of a table's columns."""
    columns = [
        dg.TableColumn(name, str(dtype), description=COLUMN_MEANINGS.get(name)) for name, dtype in frame.schema.items()
    ]
    return dg.TableSchema(columns=columns)


def provenance(asset: str, inputs: Mapping[str, str], upstream: Collection[str]) -> Mapping[str, Any]:
    """What an artifact was made from: versions of what was read and, for tables, which column comes from which.

    Args:
        asset: Name of the asset.
        inputs: `asset` or `asset/partition` -> data version.
        upstream: Assets that this one depends on in this project.
    """
    shown: dict[str, Any] = {"made_from": dg.MetadataValue.json(dict(inputs))} if inputs else {}
    columns: dict[str, list[dg.TableColumnDep]] = {}
    for source, own in COLUMN_SOURCES.get(asset, {}).items():
        if source in upstream:
            for name, parents in own.items():
                columns.setdefault(name, []).extend(dg.TableColumnDep(dg.AssetKey(source), each) for each in parents)
    if columns:
        shown["dagster/column_lineage"] = dg.TableColumnLineage(columns)
    return shown


def picture(png: bytes, alt: str) -> dg.MarkdownMetadataValue:
    """A small chart, shown by the UI's "Show Markdown"."""
    from less_assets.report.charts import markdown_image

    return dg.MetadataValue.md(markdown_image(png, alt))
