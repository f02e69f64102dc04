"""Dagster's graph and the plans tell the same story: each partition depends on just what its artifact is made from."""

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from support.tiny import TinyProject

from less_assets.lineage.lineage import axis_keys
from less_assets.lineage.pool_files import PoolFiles
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import register_shards
from less_assets.steps.registry import ASSETS, open_store

RECIPES = [
    {"name": "less", "strategy": "less", "fraction": 0.2},
    {"name": "exact", "strategy": "less", "fraction": 0.2, "rescore": "exact"},
    {"name": "bm25", "strategy": "bm25", "fraction": 0.2},
    {"name": "dsir", "strategy": "dsir", "fraction": 0.2},
    {"name": "rds", "strategy": "rds", "fraction": 0.2},
    {"name": "mid", "strategy": "perplexity", "fraction": 0.2},
    {"name": "tuned", "strategy": "target_tuned", "fraction": 0.2},
    {"name": "as-tuned", "strategy": "length_matched", "match": "tuned", "fraction": 0.2},
    {"name": "as-long", "strategy": "length_matched", "match": "rds", "fraction": 0.2},
    {"name": "as-less", "strategy": "length_matched", "match": "exact", "fraction": 0.2},
    {"name": "as-targets", "strategy": "length_matched", "fraction": 0.2},
    {"name": "random", "strategy": "random", "fraction": 0.2, "seeds": [0, 1]},
    {"name": "best", "strategy": "tournament", "fraction": 0.2, "candidates": ["exact", "bm25", "as-long", "random"]},
    {"name": "full", "strategy": "full"},
    {"name": "base", "strategy": "none"},
]


@pytest.mark.parametrize(
    ("recipes", "group"),
    [(RECIPES, True), (RECIPES, False), (RECIPES[:1], True), (RECIPES[-2:], True)],
    ids=["all", "with folds", "less", "without scores"],
)
def test_dagster_depends_on_what_the_plan_reads(tiny_model, tmp_path, recipes, group):
    tiny = TinyProject(tmp_path, tiny_model)
    for task in tiny.settings["tasks"]:
        task["validation"] = {"path": "more.jsonl"} if group else {"folds": 2}
    if group:
        tiny.settings["tasks"].append({"name": "both", "members": ["sums", "sky"]})
    tiny.settings["recipes"] = recipes
    if recipes is RECIPES:
        tiny.settings["exclude"] = ["left-out.jsonl"]
        tiny.settings["prefilter"] = {"strategy": "rds", "keep": 0.5}
    project = load_project(tiny.path)
    store = open_store(project)
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, store, instance)
        keys_of = axis_keys(project, PoolFiles.load(store).shard_keys)
        graph = build_definitions(project).resolve_asset_graph()
        existing = {name for name, asset in ASSETS.items() if asset.exists(project)}
        assert {key.to_user_string() for key in graph.get_all_asset_keys()} == existing
        compared = 0
        with partition_loading_context(dynamic_partitions_store=instance):
            for name in existing:
                node = graph.get(dg.AssetKey(name))
                partitions = ASSETS[name].partitions(project, keys_of)
                if node.partitions_def is not None:
                    assert sorted(node.partitions_def.get_partition_keys()) == sorted(map(str, partitions))
                for partition in partitions:
                    assert dagster_reads(graph, name, partition) == plan_reads(project, name, partition, keys_of)
                    compared += 1
    assert compared > 30


def dagster_reads(graph, name: str, partition: str | None) -> set[tuple[str, str | None]]:
    key, read = dg.AssetKey(name), set()
    for parent in graph.get(key).parent_keys:
        definition = graph.get(parent).partitions_def
        upstream = parent.to_user_string()
        if definition is None:
            read.add((upstream, None))
        elif partition is None:
            read |= {(upstream, other) for other in definition.get_partition_keys()}
        else:
            parents = graph.get_parent_partition_keys_for_child(partition, parent, key)
            read |= {(upstream, str(other)) for other in parents.partitions_subset.get_partition_keys()}
    return read


def plan_reads(project, name: str, partition: str | None, keys_of) -> set[tuple[str, str | None]]:
    declared = ASSETS[name]
    keys = declared.keys(partition)
    return {
        (read.asset, upstream)
        for read in declared.inputs
        for upstream in ASSETS[read.asset].read(project, declared, read, keys, keys_of)
    }
