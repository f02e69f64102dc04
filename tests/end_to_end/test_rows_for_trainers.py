"""Rows with masks, tools and thoughts, from the file to what trainers read."""

import json

import dagster as dg
from support.tiny import question, showing_everything, write_rows

from less_assets.method.data.row_formats import normalize
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.registry import open_lineage, open_store
from less_assets.steps.selection import SUBSET_JSONL
from less_assets.store.tables import read_parquet

ASKED, ANSWER = question(400, "plus")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ROWS = [
    {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "two", "name": "add"},
            {"role": "assistant", "content": "two", "reasoning_content": "one and one"},
        ],
    },
    {"messages": [ASKED, {**ANSWER, "weight": 0}, *question(401, "plus")]},
    {"messages": [ASKED, ANSWER], "system": "the sky is blue"},
    {"messages": [ASKED, ANSWER]},
]


def test_what_a_row_says_reaches_the_subset_for_trainers(tiny_project, tiny_model, tmp_path_factory):
    model = showing_everything(tiny_model, tmp_path_factory.mktemp("showing"))
    tiny_project.settings["model"]["base"] = str(model)
    write_rows(tiny_project.folder / "data/plus.jsonl", [*ROWS, {**ROWS[3], "rejected_response": "no"}])
    tiny_project.settings["recipes"] = [{"name": "all", "strategy": "full"}]
    project = load_project(tiny_project.path)
    store = open_store(project)
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, store, instance)
        runner = GraphRunner(build_definitions(project), project, store, instance, lambda line: None)
        runner.run(Request(until="selected_subset"))
    lineage = open_lineage(project, store)
    pool = read_parquet(lineage.folder("instruction_pool", "plus-00000"), EXAMPLES)
    assert pool["status"].to_list() == ["ok"] * 4 + ["unsupported_field: rejected_response"]
    lines = lineage.folder("selected_subset", "all|sums").path(SUBSET_JSONL).read_text().splitlines()
    subset = {row["example_id"]: row for row in map(json.loads, lines)}
    for row, example_id in zip(ROWS, pool["example_id"], strict=False):
        exported = subset[example_id]
        assert normalize({key: exported[key] for key in ("messages", "tools") if key in exported}) == normalize(row)
        assert ("tools" in exported) == ("tools" in row)
    assert subset[pool["example_id"][0]]["messages"][3] == ROWS[0]["messages"][3]
    assert subset[pool["example_id"][3]]["messages"] == ROWS[3]["messages"], "a plain row is written as it was"
