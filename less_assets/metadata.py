"""What a person sees at a materialization in the Dagster UI: counts, small tables, small charts.

Belongs here: turning manifests and tables into Dagster metadata. Charts are drawn in `report/charts.py`.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from less_assets.store.artifacts import ArtifactFolder
from less_assets.store.manifest import Manifest

TABLE_ROWS = 20
PREVIEW_CHARACTERS = 160


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
    return dg.TableSchema(columns=[dg.TableColumn(name, str(dtype)) for name, dtype in frame.schema.items()])


def picture(png: bytes, alt: str) -> dg.MarkdownMetadataValue:
    """A small chart, shown by the UI's "Show Markdown"."""
    from less_assets.report.charts import markdown_image

    return dg.MetadataValue.md(markdown_image(png, alt))
