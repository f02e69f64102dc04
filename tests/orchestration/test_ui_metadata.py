"""What the Dagster UI is told of an artifact: in an order that can be read, with columns that exist."""

import re

import dagster as dg
import polars as pl
import pytest

from less_assets.lineage.lineage import Lineage
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.steps.shown import Stored, Table
from less_assets.store.tables import scan_parquet


@pytest.fixture(scope="module")
def lineage(explained_project) -> Lineage:
    project = load_project(explained_project)
    return open_lineage(project, open_store(project))


def column_lineage(lineage: Lineage, asset: str, partition: str) -> dict[str, set[tuple[str, str]]]:
    """Column -> its upstream columns with their assets, as the UI is told."""
    manifest = lineage.fresh(asset, partition)
    upstream = {name.split("/")[0] for name in manifest.inputs}
    stored = Stored(lineage, partition, lineage.folder(asset, partition), manifest)
    shown = metadata.shown_metadata(ASSETS[asset], stored, upstream)
    columns = shown["dagster/column_lineage"]
    return {
        name: {(each.asset_key.to_user_string(), each.column_name) for each in parents}
        for name, parents in columns.deps_by_column.items()
    }


def stored_columns(lineage: Lineage, asset: str, partition: str | None) -> set[str]:
    folder = lineage.folder(asset, partition)
    files = {"influence_scores": "scores/plus-00000.parquet", "selected_subset": "subset.parquet"}
    files |= {"exact_scores": "exact.parquet", "token_attribution": "tokens.parquet", "pool_index": "index.parquet"}
    files |= {"target_gradients": "features.parquet", "target_examples": "targets.parquet"}
    return set(scan_parquet(folder, files[asset]).collect_schema().names())


@pytest.mark.parametrize(
    ("asset", "partition"),
    [
        ("influence_scores", "sums"),
        ("selected_subset", "less|sums"),
        ("selected_subset", "few|sums"),
        ("selected_subset", "random-seed0|sums"),
        ("exact_scores", "few|sums"),
        ("token_attribution", "less|sums"),
        ("target_gradients", "epoch-1|sums"),
    ],
)
def test_column_lineage_names_columns_that_exist(lineage, asset, partition):
    keys = {"target_gradients": "epoch-1|sums", "exact_scores": "few|sums", "selected_subset": partition}
    keys |= {"influence_scores": "sums", "target_examples": "sums"}
    found = column_lineage(lineage, asset, partition)
    assert set(found) <= stored_columns(lineage, asset, partition)
    for parents in found.values():
        for upstream, column in parents:
            assert column in stored_columns(lineage, upstream, keys.get(upstream))


def test_a_score_comes_from_the_form_and_rule_of_its_recipe(lineage):
    assert column_lineage(lineage, "selected_subset", "less|sums")["score"] == {
        ("influence_scores", "marginal.mean_cosine")
    }
    assert "score" not in column_lineage(lineage, "selected_subset", "random-seed0|sums"), "it read no scores"
    scores = column_lineage(lineage, "influence_scores", "sums")
    assert scores["adamw.mean_cosine.epoch-2"] == {("target_gradients", "features")}


def test_every_asset_that_is_a_table_says_what_its_columns_mean(lineage):
    tables = [("influence_scores", "sums"), ("selected_subset", "less|sums"), ("pool_index", None)]
    tables += [("token_attribution", "less|sums"), ("target_gradients", "epoch-1|sums"), ("exact_scores", "few|sums")]
    for asset, partition in tables:
        frame = pl.DataFrame(schema=dict.fromkeys(stored_columns(lineage, asset, partition), pl.String))
        described = {column.name: column.description for column in metadata.column_schema(frame.schema).columns}
        assert {name for name, words in described.items() if not words} == set()


def test_figures_come_first_and_what_is_long_last():
    frame = pl.DataFrame({"rank": [1]})
    shown = {
        "examples_digest": "0f",
        "dagster/column_schema": metadata.column_schema(frame.schema),
        "details": dg.MetadataValue.json({"a": [1, "b"]}),
        "best": metadata.table(frame),
        "chart": dg.MetadataValue.md("![](data:)"),
        "rows": 7,
        "share": 0.123456789,
    }
    ordered = metadata._in_order(shown)
    assert list(ordered) == ["rows", "share", "chart", "best", "details", "examples_digest", "dagster/column_schema"]
    assert ordered["share"] == 0.12346


def test_counts_are_one_line_and_nothing_is_lost():
    values = {
        "counts": {"a": 1, "b": 1200},
        "nested": {"task": {"x": 0.12345678, "y": 2}},
        "words": ["one", "two"],
        "mixed": {"a": "text", "b": 1},
        "flags": {"a": True},
        "empty": {},
        "zero": 0,
    }
    shown = metadata._figures(values)
    assert shown["counts"] == "b 1,200 · a 1"
    assert shown["nested"] == "task/y 2 · task/x 0.12346"
    assert shown["words"] == "one · two"
    assert shown["mixed"].value == {"a": "text", "b": 1}
    assert shown["flags"].value == {"a": True}
    assert shown["zero"] == 0
    assert "empty" not in shown


def test_the_prompt_stands_beside_the_rank():
    frame = pl.DataFrame(
        {
            "rank": [1],
            "messages": [[{"role": "user", "content": "a  long\nquestion"}, {"role": "assistant", "content": "yes"}]],
            "source": ["plus"],
        }
    )
    (record,) = metadata._value(Table(frame, examples=True)).records
    assert list(record.data.items()) == [
        ("rank", 1),
        ("prompt", "a long question"),
        ("answer", "yes"),
        ("source", "plus"),
    ]


REPORTS_URL = "http://127.0.0.1:3001/tiny"


def shown(lineage: Lineage, asset: str, partition: str, reports_url: str | None) -> dict:
    manifest = lineage.fresh(asset, partition)
    stored = Stored(lineage, partition, lineage.folder(asset, partition), manifest)
    return metadata.shown_metadata(ASSETS[asset], stored, set(), reports_url)


@pytest.mark.parametrize("recipe", ["less", "random-seed0"])
def test_a_subset_leads_to_its_report_and_to_its_top_rows_there(lineage, recipe):
    entries = shown(lineage, "selected_subset", f"{recipe}|sums", REPORTS_URL)
    ids = [record.data["example_id"] for record in entries["top_rows"].records]
    address = f"{REPORTS_URL}/selection/sums/reports/{recipe}/index.html"
    assert entries["open_report"] == dg.MetadataValue.url(address)
    assert entries["open_top_row"] == dg.MetadataValue.url(f"{address}#row={ids[0]}")
    lines = entries["open_top_rows"].value.splitlines()
    assert [line.rpartition("](")[2] for line in lines] == [f"{address}#row={row})" for row in ids]
    assert entries["explain_top_row"].value == f"less-assets explain sums {ids[0]} --project {lineage.project.path}"
    leads = {"partition", "open_report", "open_top_row", "explain_top_row"}
    assert set(list(entries)[: len(leads)]) == leads, "they stand first"
    assert entries["partition"].value == f"{recipe}|sums"


def test_where_nobody_serves_reports_no_link_leads_to_one_and_the_path_stays(lineage):
    entries = shown(lineage, "selected_subset", "less|sums", None)
    assert not [name for name in entries if name.startswith("open_")]
    assert "explain_top_row" in entries
    for reports_url in (None, REPORTS_URL):
        report = shown(lineage, "selection_report", "less|sums", reports_url)["report"]
        assert isinstance(report, dg.PathMetadataValue)
        assert report.value.endswith("/report.html")


def test_words_of_a_link_are_text_whatever_stands_in_a_row():
    hostile = "[a](javascript:b) <script>`x`</script> ![i](http://x.y) www.x.y \\ |\n# *z*"
    rows = pl.DataFrame({"example_id": ["0f"], "messages": [[{"role": "user", "content": hostile}]]})
    line = metadata._row_links(REPORTS_URL, "less|sums", rows)
    words, _, address = line.removeprefix("1. [").rpartition("](")
    assert address == f"{REPORTS_URL}/selection/sums/reports/less/index.html#row=0f)"
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", words)
    assert not re.search(r"[!-/:-@\[-`{-~\n]", plain), "every sign is taken as it is"
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", words) == " ".join(hostile.split())


def test_every_materialization_tells_its_columns_and_its_upstream_versions(lineage):
    """Made again from what is stored: each asset that holds a table has a schema, and names what it was made from."""
    keys = {"warmup_sample": None, "selected_subset": "less|sums", "exact_scores": "few|sums"}
    keys |= {"token_attribution": "less|sums", "influence_scores": "sums", "target_gradients": "epoch-1|sums"}
    job = build_definitions(lineage.project).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        for asset, partition in keys.items():
            key = dg.AssetKey(asset)
            assert job.execute_in_process(instance=instance, partition_key=partition, asset_selection=[key]).success
            (record,) = instance.fetch_materializations(key, limit=1).records
            shown = record.asset_materialization.metadata
            assert shown["dagster/column_schema"].value.columns, asset
            assert shown["made_from"].value == dict(lineage.fresh(asset, partition).inputs), asset
            assert list(shown).index("made_from") > list(shown).index("dagster/column_schema")
            pictures = [value for value in shown.values() if isinstance(value, dg.MarkdownMetadataValue)]
            assert all(len(picture.value) < 4 / 3 * 30_000 + 100 for picture in pictures)
