"""Selected rows are stored some at a time: the files are the same however many at a time."""

from less_assets.project.project import load_project
from less_assets.reading.files import INDEX, SUBSET, SUBSET_JSONL
from less_assets.reading.pool_index import PoolIndex
from less_assets.running.without_dagster import make_with_inputs
from less_assets.steps import selection
from less_assets.steps.registry import open_store
from less_assets.store.tables import read_parquet


def test_subset_files_do_not_depend_on_how_many_rows_are_in_memory(tiny_project, monkeypatch):
    tiny_project.settings["recipes"] = [{"name": "random", "strategy": "random", "fraction": 0.6, "seeds": [0]}]
    project = load_project(tiny_project.path)
    lineage = make_with_inputs(project, open_store(project), "selected_subset", "random-seed0|sums", print)
    whole = lineage.folder("selected_subset", "random-seed0|sums")
    table, lines = read_parquet(whole, SUBSET), whole.read_bytes(SUBSET_JSONL)
    manifest = whole.manifest()
    assert table["rank"].to_list() == list(range(1, table.height + 1))
    assert len(table["shard"].unique()) > 2
    whole.discard()
    monkeypatch.setattr(selection, "ROWS_PER_FILE", 4)
    lineage = make_with_inputs(project, open_store(project), "selected_subset", "random-seed0|sums", print)
    again = lineage.folder("selected_subset", "random-seed0|sums")
    assert again.read_bytes(SUBSET_JSONL) == lines
    assert read_parquet(again, SUBSET).equals(table)
    assert again.manifest().summary == manifest.summary
    assert again.manifest().data_version == manifest.data_version

    index, rows = PoolIndex(lineage), read_parquet(lineage.folder("pool_index"), INDEX)
    for shard in lineage.shards():
        assert index.shard(shard).equals(rows.filter(shard=shard))
    some = rows["example_id"][3:9]
    assert index.of_ids(some, rows.columns).equals(rows.filter(rows["example_id"].is_in(some.implode())))
