"""What a person sees at a materialization in the Dagster UI: counts, small tables, small charts.

Belongs here: turning manifests and tables into Dagster metadata. Charts are drawn in `report/charts.py`.
"""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, get_args
from urllib.parse import quote

import dagster as dg
import polars as pl

from less_assets.compute.timings import seconds_of
from less_assets.method.data.conversations import Message, full_text
from less_assets.project.project import Project
from less_assets.project.sections import SubtaskRule
from less_assets.project.values import is_url
from less_assets.report.charts import markdown_image
from less_assets.steps.asset import Asset
from less_assets.steps.registry import ASSETS
from less_assets.steps.shown import (
    PREVIEW_CHARACTERS,
    Command,
    File,
    Markdown,
    Picture,
    ReportLink,
    ReportLinks,
    Stored,
    Table,
    Verdict,
)
from less_assets.store.entry_page import ENTRY_NAME

FOLDER = "path"
"""Entry of every materialization: the artifact's folder."""
COLUMN_MEANINGS = {
    "aggregate": "how subtasks make one ranking",
    "answer": "the text that was generated",
    "assistant_prefix": "start of the last turn, without loss",
    "base_loss": "mean loss of the base model over the loss tokens, nats",
    "beats_random": "whether the difference from random lies beyond its interval, on the better side",
    "by_seed": "mean of each seed's pilot",
    "candidate": "recipe that the tournament chooses among",
    "canonical": "whether this is the copy that counts",
    "completion": "the rest of the last turn, with loss",
    "copies": "rows of the pool with this id",
    "cut": "whether the row was cut at the model's maximum length",
    "detail": "the reason in words",
    "difference": "paired difference from random's pilots",
    "embedding": "mean hidden state of the base model",
    "exact": "unprojected influence per subtask, summed over checkpoints",
    "example_id": "hash of the messages, 32 hexadecimal digits",
    "features": "sketched gradient",
    "high": "upper end of the 95 % interval",
    "higher_is_better": "direction of the metric",
    "in_pool": "whether the pool has the row",
    "influence": "exact influence on the row's subtask",
    "loss": "mean cross-entropy over the loss tokens, nats",
    "loss_tokens": "tokens with loss",
    "low": "lower end of the 95 % interval",
    "mean": "validation loss, or score, of the candidate's pilots",
    "member": "the task that the example belongs to",
    "messages": "the conversation",
    "metric": "name of the metric",
    "minutes": "minutes of training, mean over seeds",
    "model": "the model that was fine-tuned",
    "momentum": "part of the influence that belongs to no token",
    "n": "samples",
    "norm": "exact norm of the gradient",
    "decides": "whether a verdict may rest on the metric",
    "price": "tokens through a model for the selection and all that it was made from",
    "primary": "whether this is the task's score",
    "rank": "1 is the best",
    "recipe": "name of the recipe",
    "row": "row in the shard, from 0",
    "rows": "training rows, mean over seeds",
    "score": "influence by which the row was ranked",
    "seeds": "number of seeds",
    "selection_minutes": "minutes for the selection and all that it was made from",
    "selection_tokens": "tokens through a model for the selection and all that it was made from",
    "shard": "shard of the pool",
    "share": "each loss token's share of the influence",
    "sketched_score": "score by which the row became a candidate",
    "source": "name of the pool source",
    "source_file": "file that the row stands in",
    "source_row": "line of the file, from 1",
    "spread": "standard deviation over seeds",
    "status": "ok, or the reason why the row is not used",
    "strategy": "how the recipe selects",
    "subtask": "subtask of the task",
    "task": "name of the task",
    "text": "each loss token's text",
    "tokens": "training tokens seen, mean over seeds",
    "tools": "the tools that the assistant may call, as JSON",
    "tuned_loss": "mean loss after a training on the task's targets, nats",
    "turn": "each loss token's turn, from 0",
    "value": "value of the metric",
    "winner": "whether it gets the whole budget",
    "vs_base": "paired difference from the base model",
    "vs_base_high": "upper end of its 95 % interval",
    "vs_base_low": "lower end of its 95 % interval",
    "vs_full": "paired difference from the whole pool",
    "vs_full_high": "upper end of its 95 % interval",
    "vs_full_low": "lower end of its 95 % interval",
    "vs_random": "paired difference from random selection",
    "vs_random_high": "upper end of its 95 % interval",
    "vs_random_low": "lower end of its 95 % interval",
}
"""What columns mean, wherever they appear; docs/tables.md has all of them, table by table."""

MARKDOWN = re.compile(r"[!-/:-@\[-`{-~]")
"""Characters that can mean something in Markdown; a backslash before one makes it text (CommonMark 0.31, 2.4)."""
SCORE_COLUMN = re.compile(r"\w+\.(?:mean_cosine|cosine_of_mean)(?P<checkpoint>\..+)?")


def shown_metadata(
    asset: Asset, stored: Stored, upstream: Collection[str], reports_url: str | None = None
) -> dict[str, Any]:
    """All that the UI shows at a materialization.

    Args:
        asset: The asset.
        stored: What was made.
        upstream: Assets that it depends on in this project.
        reports_url: Where a page shows the reports; None: nowhere, and no link leads to one.
    """
    manifest, lineage = stored.manifest, stored.lineage
    shown = asset.describe(stored)
    # The overview of an asset shows the partition that was made last, without saying so.
    values: dict[str, Any] = {"partition": dg.MetadataValue.text(stored.partition)} if stored.partition else {}
    values |= _figures(manifest.summary)
    values |= _values(shown.values, reports_url)
    if shown.rows is not None:
        values["dagster/partition_row_count" if asset.axes else "dagster/row_count"] = shown.rows
    if shown.columns is not None:
        values["dagster/column_schema"] = column_schema(shown.columns)
    seconds = seconds_of(lineage.store, manifest.kind, manifest.fingerprint)
    return {
        **_in_order(values),
        **provenance(asset, manifest.inputs, upstream, _column_names(stored, asset)),
        FOLDER: dg.MetadataValue.path(str(stored.folder.root)),
        "fingerprint": manifest.fingerprint,
        **({} if seconds is None else {"seconds": seconds}),
    }


def check_result(verdict: Verdict) -> dg.AssetCheckResult:
    """What a check says, in Dagster's terms; it warns."""
    return dg.AssetCheckResult(
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=verdict.said,
        metadata=_in_order(_values(verdict.values, None)),
    )


def described(asset: Asset, project: Project, reports_url: str | None) -> str:
    """An asset's description in Markdown: what it holds and, where it leads to reports, where they are.

    The overview of an asset shows the partition that was made last; the reports of the others are one click away here.

    Args:
        asset: The asset.
        project: The project.
        reports_url: Where a page shows the reports; None: nowhere.
    """
    if not asset.leads_to_reports:
        return asset.description
    recipes = ASSETS["selection_report"].recipes(project)
    lines = []
    for task in project.task_names if recipes else ():
        names = [f"[{key}]({report_url(reports_url, f'{key}|{task}')})" if reports_url else key for key in recipes]
        lines.append(f"- **{task}**: {' · '.join(names)}")
    reports = [f"Reports:\n\n{chr(10).join(lines)}"] if lines and reports_url else []
    if is_url(project.storage.root):
        reports = ["The artifacts are in a bucket: no page serves reports from there, a copy of the file opens."]
    project_file = shlex.quote(str(project.path))
    explained = [
        f"Why a recipe's top row was chosen:\n\n```\nless-assets explain {task} --recipe {recipes[0]} "
        f"--project {project_file}\n```"
        for task in project.task_names[:1]
        if recipes
    ]
    return "\n\n".join([asset.description, *reports, *explained])


def tags_of(asset: Asset) -> dict[str, str]:
    """By what the assets of the graph can be filtered in the UI."""
    return {
        "less-assets/partitioned-by": "-by-".join(asset.axes) or "nothing",
        "less-assets/work": "model" if asset.loads_model else "tables",
        "less-assets/part": "extras" if asset.explains else "results",
    }


def _column_names(stored: Stored, asset: Asset) -> Mapping[str, Sequence[str]]:
    """The direction forms, subtask rules and checkpoints that an artifact's columns are named after."""
    project = stored.lineage.project
    forms, rules = list(project.gradients.forms), list(get_args(SubtaskRule))
    if "recipe" in asset.axes:
        recipe = project.recipe(asset.keys(stored.partition)["recipe"])
        forms, rules = [recipe.form] if recipe.form else [], [recipe.subtask] if recipe.subtask else []
    checkpoints: Any = stored.manifest.summary.get("weights", project.checkpoints)  # those that have scores
    return {"form": forms, "rule": rules, "checkpoint": list(checkpoints)}


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a manifest's summary, each under its own name; what is empty is left out."""
    return {name: _figure(value) for name, value in summary.items() if value not in (None, {}, [], "")}


def _in_order(shown: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the UI, which lists it as it comes: what leads on, figures, pictures, tables, and what is long."""
    values = {name: _cell(value) if isinstance(value, float) else value for name, value in shown.items()}
    return dict(sorted(values.items(), key=lambda entry: _place(*entry)))


def _place(name: str, value: Any) -> int:
    kinds = (dg.MarkdownMetadataValue, dg.TableMetadataValue, dg.JsonMetadataValue)
    if name.startswith("dagster/") or name.endswith("digest"):
        return len(kinds) + 1
    if isinstance(value, dg.TextMetadataValue | dg.UrlMetadataValue):
        return -1
    return next((rank for rank, kind in enumerate(kinds, start=1) if isinstance(value, kind)), 0)


def _figure(value: Any) -> Any:
    """Counts by name and lists of words as one line of text, which takes less room than JSON; the rest as it is."""
    if isinstance(value, Mapping | list):
        parts = _parts(value)
        return dg.MetadataValue.json(value) if parts is None else " · ".join(parts)
    return value


def _parts(value: Any, prefix: str = "") -> list[str] | None:
    """`name number` of nested counts, largest first, or the words of a list; None for what is neither."""
    if isinstance(value, list):
        return list(value) if all(isinstance(part, str) for part in value) else None
    numbers = {name: number for name, number in value.items() if type(number) in (int, float)}
    ordered = sorted(numbers.items(), key=lambda item: -item[1])
    parts = [f"{prefix}{name} {_cell(number):,}" for name, number in ordered]
    for name, part in value.items():
        if name in numbers:
            continue
        below = _parts(part, f"{prefix}{name}/") if isinstance(part, Mapping) else None
        if below is None:
            return None
        parts += below
    return parts


def _values(described: Mapping[str, Any], reports_url: str | None) -> dict[str, Any]:
    """Values of a description in Dagster's terms; links only where something serves what they lead to."""
    shown: dict[str, Any] = {}
    for name, value in described.items():
        match value:
            case ReportLink(report, row):
                if reports_url:
                    shown[name] = dg.MetadataValue.url(report_url(reports_url, report, row))
            case ReportLinks(report, rows):
                if reports_url:
                    shown[name] = dg.MetadataValue.md(_row_links(reports_url, report, rows))
            case _:
                shown[name] = _value(value)
    return shown


def report_url(reports_url: str, report: str, row: str | None = None) -> str:
    """Address of a report that stays, whichever page is up to date.

    Args:
        reports_url: Where a page shows the reports.
        report: Recipe and task, `recipe|task`.
        row: Id of the row that it is to open with.
    """
    asset = ASSETS["selection_report"]
    folder = quote(asset.folder.format(**asset.keys(report)))
    return f"{reports_url}/{folder}/{ENTRY_NAME}" + (f"#row={quote(row)}" if row else "")


def _row_links(reports_url: str, report: str, rows: pl.DataFrame) -> str:
    """A list in Markdown, in the order of the rows; the start of a question is text, whatever stands in it."""
    lines = []
    for rank, (row, messages) in enumerate(rows.select("example_id", "messages").iter_rows(), 1):
        words = MARKDOWN.sub(r"\\\g<0>", _preview(messages, first=True)) or row
        lines.append(f"{rank}. [{words}]({report_url(reports_url, report, row)})")
    return "\n".join(lines)


def _value(value: Any) -> Any:
    """A value of a description that is no link."""
    match value:
        case Table(frame, examples):
            return table(_previewed(frame) if examples else frame)
        case Picture(png, alt):
            return dg.MetadataValue.md(markdown_image(png, alt))
        case Markdown(text):
            return dg.MetadataValue.md(text)
        case Command(text):
            return dg.MetadataValue.text(text)
        case File(path):
            return dg.MetadataValue.path(str(path))
        case dict():
            return dg.MetadataValue.json(value)
    return value


def table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """A small table as it is; nested values become text."""
    records = [
        dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in frame.iter_rows(named=True)
    ]
    return dg.MetadataValue.table(records=records, schema=column_schema(frame.schema) if not records else None)


def _cell(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return str(value)


def _previewed(frame: pl.DataFrame) -> pl.DataFrame:
    """Examples with the start of their first user turn and of their last turn in place of the column `messages`."""
    columns: list[pl.Series] = []
    for column in frame:
        if column.name == "messages":
            columns.append(pl.Series("prompt", [_preview(messages, first=True) for messages in column], pl.String))
            columns.append(pl.Series("answer", [_preview(messages, first=False) for messages in column], pl.String))
        elif column.name not in ("detail", "status"):
            columns.append(column)
    return pl.DataFrame(columns)


def _preview(messages: list[Message], *, first: bool) -> str:
    if first:
        turns = [message["content"] for message in messages if message["role"] == "user"]
    else:
        turns = [full_text(messages[-1])]
    text = " ".join(turns[0].split()) if turns else ""
    return text if len(text) <= PREVIEW_CHARACTERS else text[: PREVIEW_CHARACTERS - 1] + "…"


def column_schema(columns: Mapping[str, Any]) -> dg.TableSchema:
    """Names, types and meanings of a table's columns."""
    described = [dg.TableColumn(name, str(kind), description=_meaning(name)) for name, kind in columns.items()]
    return dg.TableSchema(columns=described)


def _meaning(column: str) -> str | None:
    if score := SCORE_COLUMN.fullmatch(column):
        return "influence per subtask, " + ("at the checkpoint" if score["checkpoint"] else "summed over checkpoints")
    if column.startswith("share."):
        return "each loss token's share of the influence at the checkpoint"
    return COLUMN_MEANINGS.get(column)


def provenance(
    asset: Asset, inputs: Mapping[str, str], upstream: Collection[str], names: Mapping[str, Sequence[str]]
) -> Mapping[str, object]:
    """What an artifact was made from: versions of what was read and, for tables, which column comes from which.

    Args:
        asset: The asset.
        inputs: `asset` or `asset/partition` -> data version.
        upstream: Assets that this one depends on in this project.
        names: What the names in braces of `Asset.columns_from` stand for: form, rule, checkpoint -> one or several.
    """
    shown: dict[str, Any] = {"made_from": dg.MetadataValue.json(dict(inputs))} if inputs else {}
    read = {name.split("/", 1)[0] for name in inputs} & set(upstream)
    columns: dict[str, list[dg.TableColumnDep]] = {}
    for source, own in asset.columns_from.items():
        for column, parents in own.items() if source in read else ():
            for name, named_parents in _named(column, parents, names):
                depended_on = (dg.TableColumnDep(dg.AssetKey(source), parent) for parent in named_parents)
                columns.setdefault(name, []).extend(depended_on)
    if columns:
        shown["dagster/column_lineage"] = dg.TableColumnLineage(columns)
    return shown


def _named(column: str, parents: Sequence[str], names: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """A column and its parents with every choice of the names that stand in braces in any of them."""
    used = [name for name in names if any(f"{{{name}}}" in text for text in (column, *parents))]
    for chosen in product(*(names[name] for name in used)):
        values = dict(zip(used, chosen, strict=True))
        yield column.format(**values), [parent.format(**values) for parent in parents]
