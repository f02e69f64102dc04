"""The dependency and mapping table of the graph, by asking Dagster itself for the parents of every kind of key.

A mapping that is left out loads silently and resolves to no parents, so every edge is asked for.
"""

from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from dagster._core.definitions.partitions.context import partition_loading_context

from less_assets.orchestration.definitions import build_definitions
from less_assets.orchestration.partitions import SHARDS, Axes
from less_assets.project.project import Project, parse_project
from less_assets.steps.registry import ASSETS

PROJECT = b"""
name: small
model: {base: someone/some-model}
pool: {sources: [{name: plus, path: plus.jsonl}]}
exclude: [left-out.jsonl]
prefilter: {strategy: rds, keep: 0.9}
warmup: {epochs: 3}
gradients: {forms: [adamw, marginal]}
tasks:
  - {name: sums, examples: {path: sums.jsonl}}
  - {name: sky, examples: {path: sky.jsonl}}
  - {name: both, members: [sums, sky]}
recipes:
  - {name: less, strategy: less, fraction: 0.1, rescore: exact}
  - {name: less-paper, strategy: less, form: adamw, fraction: 0.1}
  - {name: random, strategy: random, fraction: 0.1, seeds: [0, 1]}
  - {name: full, strategy: full}
  - {name: base, strategy: none}
  - {name: rds, strategy: rds, fraction: 0.1}
  - {name: mid, strategy: perplexity, fraction: 0.1}
  - {name: bm25, strategy: bm25, fraction: 0.1}
  - {name: dsir, strategy: dsir, fraction: 0.1}
  - {name: as-less, strategy: length_matched, match: less, fraction: 0.1}
  - {name: as-rds, strategy: length_matched, match: rds, fraction: 0.1}
  - {name: as-targets, strategy: length_matched, fraction: 0.1}
  - {name: against-pool, strategy: less, fraction: 0.1, precondition: pool}
  - {name: given, strategy: external, fraction: 0.1, scores: scores.csv}
"""
CHECKPOINTS = ["epoch-1", "epoch-2", "epoch-3"]
SHARD_KEYS = ["plus-00000", "plus-00001"]
TASKS = ["sums", "sky", "both"]
RECIPES = ["less", "less-paper", "random-seed0", "random-seed1", "full", "base", "rds", "mid", "bm25", "dsir-seed0"]
RECIPES += ["as-less-seed0", "as-rds-seed0", "as-targets-seed0", "against-pool", "given"]
AXES = {name: asset.axes for name, asset in ASSETS.items()}
KEYS = {"checkpoint": CHECKPOINTS, "shard": SHARD_KEYS, "task": TASKS, "recipe": RECIPES}

# Child, one of its keys, parent, the parent's keys that it reads. Where the parent is unpartitioned: [None].
PARENTS: list[tuple[str, str | None, str, list[str] | list[None]]] = [
    ("refused_rows", "plus-00001", "base_model", [None]),
    ("refused_rows", "plus-00001", "instruction_pool", ["plus-00001"]),
    ("pool_index", None, "instruction_pool", SHARD_KEYS),
    ("pool_index", None, "refused_rows", SHARD_KEYS),
    ("excluded_rows", None, "pool_index", [None]),
    ("prefiltered_pool", "sky", "pool_index", [None]),
    ("prefiltered_pool", "sky", "embedding_scores", ["prefilter|sky"]),
    ("kept_rows", "plus-00001", "pool_index", [None]),
    ("kept_rows", "plus-00001", "prefiltered_pool", TASKS),
    ("warmup_sample", None, "pool_index", [None]),
    ("warmup_sample", None, "excluded_rows", [None]),
    ("exact_scores", "less|sky", "excluded_rows", [None]),
    ("selected_subset", "less|sky", "excluded_rows", [None]),
    ("token_attribution", "less|sky", "excluded_rows", [None]),
    ("selection_report", "less|sky", "excluded_rows", [None]),
    ("warmup_checkpoints", "epoch-2", "base_model", [None]),
    ("warmup_checkpoints", "epoch-2", "warmup_sample", [None]),
    ("train_gradients", "epoch-2|plus-00001", "warmup_checkpoints", ["epoch-2"]),
    ("train_gradients", "epoch-2|plus-00001", "instruction_pool", ["plus-00001"]),
    ("train_gradients", "epoch-2|plus-00001", "kept_rows", ["plus-00001"]),
    ("gradient_datastore", "epoch-2", "train_gradients", [f"epoch-2|{shard}" for shard in SHARD_KEYS]),
    ("gradient_datastore", "epoch-2", "pool_index", [None]),
    ("target_gradients", "epoch-2|sky", "warmup_checkpoints", ["epoch-2"]),
    ("target_gradients", "epoch-2|sky", "target_examples", ["sky"]),
    ("influence_scores", "sky", "gradient_datastore", CHECKPOINTS),
    ("influence_scores", "sky", "target_gradients", [f"{checkpoint}|sky" for checkpoint in CHECKPOINTS]),
    ("influence_scores", "sky", "pool_index", [None]),
    ("influence_scores", "sky", "kept_rows", SHARD_KEYS),
    ("influence_scores", "both", "target_gradients", [f"{checkpoint}|both" for checkpoint in CHECKPOINTS]),
    ("exact_scores", "less|sky", "influence_scores", ["sky"]),
    ("exact_scores", "less|sky", "recipe_settings", ["less"]),
    ("exact_scores", "less|sky", "warmup_checkpoints", CHECKPOINTS),
    ("exact_scores", "less|sky", "target_examples", ["sky"]),
    ("exact_scores", "less|sky", "pool_index", [None]),
    ("pool_embeddings", "plus-00001", "base_model", [None]),
    ("pool_embeddings", "plus-00001", "instruction_pool", ["plus-00001"]),
    ("target_embeddings", "sky", "base_model", [None]),
    ("target_embeddings", "sky", "target_examples", ["sky"]),
    ("embedding_scores", "rds|sky", "pool_embeddings", SHARD_KEYS),
    ("embedding_scores", "rds|sky", "target_embeddings", ["sky"]),
    ("embedding_scores", "rds|sky", "pool_index", [None]),
    ("embedding_scores", "mid|sky", "pool_embeddings", SHARD_KEYS),
    ("embedding_scores", "mid|sky", "target_embeddings", []),
    ("text_scores", "bm25|sky", "target_examples", ["sky"]),
    ("text_scores", "bm25|sky", "pool_index", [None]),
    ("preconditioned_scores", "against-pool|sky", "influence_scores", ["sky"]),
    ("preconditioned_scores", "against-pool|sky", "pool_index", [None]),
    ("external_scores", "given|sky", "pool_index", [None]),
    ("selected_subset", "against-pool|sky", "preconditioned_scores", ["against-pool|sky"]),
    ("selected_subset", "against-pool|sky", "influence_scores", []),
    ("selected_subset", "given|sky", "external_scores", ["given|sky"]),
    ("selected_subset", "rds|sky", "embedding_scores", ["rds|sky"]),
    ("selected_subset", "rds|sky", "text_scores", []),
    ("selected_subset", "dsir-seed0|sky", "text_scores", ["dsir-seed0|sky"]),
    ("selected_subset", "dsir-seed0|sky", "embedding_scores", []),
    ("selected_subset", "as-rds-seed0|sky", "embedding_scores", ["rds|sky"]),
    ("selected_subset", "as-rds-seed0|sky", "influence_scores", []),
    ("selected_subset", "as-less-seed0|sky", "influence_scores", ["sky"]),
    ("selected_subset", "as-less-seed0|sky", "exact_scores", ["less|sky"]),
    ("selected_subset", "as-targets-seed0|sky", "target_examples", ["sky"]),
    ("selected_subset", "as-targets-seed0|sky", "exact_scores", []),
    ("selected_subset", "rds|sky", "target_examples", []),
    ("selected_subset", "random-seed0|sky", "embedding_scores", []),
    ("selected_subset", "random-seed0|sky", "text_scores", []),
    ("selected_subset", "random-seed0|sky", "target_examples", []),
    ("selected_subset", "less|sky", "recipe_settings", ["less"]),
    ("selected_subset", "less|sky", "pool_index", [None]),
    ("selected_subset", "less|sky", "influence_scores", ["sky"]),
    ("selected_subset", "less|sky", "exact_scores", ["less|sky"]),
    ("selected_subset", "less-paper|both", "influence_scores", ["both"]),
    ("selected_subset", "less-paper|both", "exact_scores", []),
    ("selected_subset", "random-seed1|sky", "recipe_settings", ["random-seed1"]),
    ("selected_subset", "random-seed1|sky", "influence_scores", []),
    ("selected_subset", "full|sky", "influence_scores", []),
    ("selected_subset", "base|sky", "influence_scores", []),
    ("token_attribution", "less|sky", "selected_subset", ["less|sky"]),
    ("token_attribution", "less|sky", "recipe_settings", ["less"]),
    ("token_attribution", "less|sky", "influence_scores", ["sky"]),
    ("token_attribution", "less|sky", "target_examples", ["sky"]),
    ("token_attribution", "less|sky", "warmup_checkpoints", CHECKPOINTS),
    ("token_attribution", "less|sky", "pool_index", [None]),
    ("selection_report", "less|sky", "selected_subset", ["less|sky"]),
    ("selection_report", "less|sky", "recipe_settings", ["less"]),
    ("selection_report", "less|sky", "target_examples", ["sky"]),
    ("selection_report", "less|sky", "influence_scores", ["sky"]),
    ("selection_report", "less|sky", "token_attribution", ["less|sky"]),
    ("selection_report", "less|sky", "pool_index", [None]),
    ("selection_report", "random-seed1|sky", "selected_subset", ["random-seed1|sky"]),
    ("selection_report", "random-seed1|sky", "influence_scores", []),
    ("selection_report", "random-seed1|sky", "token_attribution", []),
    ("finetuned_model", "less|sky", "base_model", [None]),
    ("finetuned_model", "less|sky", "selected_subset", ["less|sky"]),
    ("eval_results", "less|sky", "finetuned_model", ["less|sky"]),
    ("eval_results", "less|sky", "target_examples", ["sky"]),
    ("task_results", "sky", "eval_results", [f"{recipe}|sky" for recipe in RECIPES]),
    ("leaderboard", None, "task_results", TASKS),
]
SOME_RECIPES = {
    "exact_scores": ["less"],
    "embedding_scores": ["prefilter", "rds", "mid"],
    "text_scores": ["bm25", "dsir-seed0"],
    "preconditioned_scores": ["against-pool"],
    "external_scores": ["given"],
    "token_attribution": ["less", "less-paper"],
    "selection_report": [recipe for recipe in RECIPES if recipe not in ("full", "base")],
}
WITHOUT_PARENTS = ["base_model", "instruction_pool", "target_examples", "recipe_settings"]


@pytest.fixture(scope="module")
def project() -> Project:
    return parse_project(PROJECT)


@pytest.fixture(scope="module")
def graph(project) -> AssetGraph:
    return build_definitions(project).resolve_asset_graph()


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as found:
        found.add_dynamic_partitions(str(SHARDS.name), SHARD_KEYS)
        yield found


def parents(graph: AssetGraph, instance: dg.DagsterInstance, child: str, key: str | None, parent: str) -> list:
    """What Dagster says a partition reads of a parent; `[None]` for an unpartitioned parent."""
    assert dg.AssetKey(parent) in graph.get(dg.AssetKey(child)).parent_keys
    if graph.get(dg.AssetKey(parent)).partitions_def is None:
        return [None]
    with partition_loading_context(dynamic_partitions_store=instance):
        found = graph.get_parent_partition_keys_for_child(key, dg.AssetKey(parent), dg.AssetKey(child))
        assert not found.required_but_nonexistent_subset.get_partition_keys()
        return list(found.partitions_subset.get_partition_keys())


@pytest.mark.parametrize(("child", "key", "parent", "expected"), PARENTS)
def test_a_partition_reads_just_these_partitions_of_its_parent(graph, instance, child, key, parent, expected):
    assert sorted(parents(graph, instance, child, key, parent), key=str) == sorted(expected, key=str)


def test_every_dependency_of_the_graph_is_in_the_table(graph):
    stated = {(child, parent) for child, _, parent, _ in PARENTS}
    found = {
        (key.to_user_string(), parent.to_user_string())
        for key in graph.get_all_asset_keys()
        for parent in graph.get(key).parent_keys
    }
    assert found == stated
    assert [asset for asset in ASSETS if not graph.get(dg.AssetKey(asset)).parent_keys] == WITHOUT_PARENTS


def test_no_partition_of_a_partitioned_asset_is_without_parents(graph, instance):
    """Every key, not only the ones in the table; recipes that do not read what others do are the one exception."""
    readers = {
        ("selected_subset", "influence_scores"): ["less", "less-paper", "as-less-seed0"],
        ("selected_subset", "exact_scores"): ["less", "as-less-seed0"],
        ("selected_subset", "embedding_scores"): ["rds", "mid", "as-rds-seed0"],
        ("selected_subset", "text_scores"): ["bm25", "dsir-seed0"],
        ("selected_subset", "target_examples"): ["as-targets-seed0"],
        ("selected_subset", "preconditioned_scores"): ["against-pool"],
        ("selected_subset", "external_scores"): ["given"],
        ("embedding_scores", "target_embeddings"): ["prefilter", "rds"],
        ("embedding_scores", "pool_embeddings"): ["prefilter", *RECIPES],
        ("embedding_scores", "pool_index"): ["prefilter", *RECIPES],
        ("selection_report", "influence_scores"): ["less", "less-paper"],
        ("selection_report", "token_attribution"): ["less", "less-paper"],
    }
    for child, axes in AXES.items():
        if child in WITHOUT_PARENTS or not axes:
            continue
        definition = graph.get(dg.AssetKey(child)).partitions_def
        for key in definition.get_partition_keys(dynamic_partitions_store=instance):
            for parent in graph.get(dg.AssetKey(child)).parent_keys:
                name = parent.to_user_string()
                reads = key.split("|")[0] in readers.get((child, name), RECIPES) or "recipe" not in axes
                assert bool(parents(graph, instance, child, key, name)) is reads, (child, key, name)


def test_a_partition_is_found_from_its_parents_as_backfills_look_for_it(graph, instance):
    with partition_loading_context(dynamic_partitions_store=instance):
        for child, key, parent, expected in PARENTS:
            for upper in expected if key else []:
                if upper is not None:
                    found = graph.get_child_partition_keys_of_parent(upper, dg.AssetKey(parent), dg.AssetKey(child))
                    assert key in found, (child, parent)


def test_a_new_task_or_recipe_leaves_the_parents_of_others_alone(instance):
    text = PROJECT.replace(b"recipes:\n", b"recipes:\n  - {name: first, strategy: less, fraction: 0.5}\n")
    text = text.replace(b"tasks:\n", b"tasks:\n  - {name: zero, examples: {path: zero.jsonl}}\n")
    grown = build_definitions(parse_project(text)).resolve_asset_graph()
    assert parents(grown, instance, "selected_subset", "less|sky", "influence_scores") == ["sky"]
    assert parents(grown, instance, "selected_subset", "random-seed0|sky", "influence_scores") == []
    assert parents(grown, instance, "exact_scores", "less|sky", "influence_scores") == ["sky"]
    assert set(parents(grown, instance, "influence_scores", "sky", "target_gradients")) == {
        f"{checkpoint}|sky" for checkpoint in CHECKPOINTS
    }


def test_a_project_without_a_recipe_that_reads_scores_has_no_such_dependency():
    text = PROJECT.replace(b"strategy: less, form: adamw, fraction: 0.1", b"strategy: full")
    text = text.replace(b"strategy: less, fraction: 0.1, rescore: exact", b"strategy: full")
    for strategy in (b"rds", b"perplexity", b"bm25", b"dsir"):
        text = text.replace(b"strategy: " + strategy + b", fraction: 0.1", b"strategy: full")
    text = text.replace(b"strategy: less, fraction: 0.1, precondition: pool", b"strategy: full")
    text = text.replace(b"strategy: external, fraction: 0.1, scores: scores.csv", b"strategy: full")
    text = text.replace(b"exclude: [left-out.jsonl]\n", b"").replace(b"prefilter: {strategy: rds, keep: 0.9}\n", b"")
    text = text.replace(b"match: less, ", b"").replace(b"match: rds, ", b"")
    graph = build_definitions(parse_project(text)).resolve_asset_graph()
    assert dg.AssetKey("influence_scores") not in graph.get(dg.AssetKey("selected_subset")).parent_keys
    assert dg.AssetKey("influence_scores") in graph.get_all_asset_keys()
    optional = {dg.AssetKey(name) for name, asset in ASSETS.items() if asset.needed_by} & set(
        graph.get_all_asset_keys()
    )
    assert optional == {dg.AssetKey("selection_report")}, "of the random recipes"


def test_folds_are_keys_of_the_task_axis_that_only_the_tasks_results_read(instance):
    text = PROJECT.replace(b"examples: {path: sky.jsonl}", b"examples: {path: sky.jsonl}, validation: {folds: 2}")
    grown = build_definitions(parse_project(text)).resolve_asset_graph()
    folds = ["sky.fold-1", "sky.fold-2"]
    assert list(grown.get(dg.AssetKey("target_examples")).partitions_def.get_partition_keys()) == [
        "sums",
        "sky",
        *folds,
        "both",
    ]
    assert list(grown.get(dg.AssetKey("task_results")).partitions_def.get_partition_keys()) == TASKS
    read = parents(grown, instance, "task_results", "sky", "eval_results")
    assert set(read) == {f"{recipe}|{task}" for recipe in RECIPES for task in ["sky", *folds]}
    assert set(parents(grown, instance, "task_results", "sums", "eval_results")) == {
        f"{recipe}|sums" for recipe in RECIPES
    }
    assert parents(grown, instance, "selected_subset", "less|sky.fold-2", "influence_scores") == ["sky.fold-2"]
    for asset in ("token_attribution", "selection_report"):
        keys = grown.get(dg.AssetKey(asset)).partitions_def.get_partition_keys()
        assert not any(".fold-" in key for key in keys)
    grown.validate_partitions()


def test_axes_are_those_of_the_assets_definitions(graph, instance):
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == set(ASSETS)
    for asset, axes in AXES.items():
        definition = graph.get(dg.AssetKey(asset)).partitions_def
        if not axes:
            assert definition is None, asset
            continue
        keys = definition.get_partition_keys(dynamic_partitions_store=instance)
        if len(axes) == 1:
            assert list(keys) == KEYS[axes[0]], asset
        else:
            rows = SOME_RECIPES.get(asset, KEYS[axes[0]])
            assert list(keys) == [f"{first}|{second}" for first in rows for second in KEYS[axes[1]]], asset
        # Dagster orders the parts of a grid's key by dimension name.
        assert list(axes) == sorted(axes), asset
        if isinstance(definition, dg.MultiPartitionsDefinition):
            assert tuple(definition.partition_dimension_names) == axes, asset


def test_dagster_accepts_every_mapping(graph):
    """What `dagster definitions validate` and every backfill check; a mapping that it refuses still loads."""
    graph.validate_partitions()


def test_range_runs_are_for_the_assets_that_share_a_model_or_a_pass_or_cost_less_than_a_run(graph):
    single = [asset for asset in ASSETS if graph.get(dg.AssetKey(asset)).backfill_policy is not None]
    sharing = ["instruction_pool", "refused_rows", "warmup_checkpoints", "train_gradients", "target_gradients"]
    sharing += ["influence_scores", "pool_embeddings"]  # scores: one pass over the datastore for all tasks
    assert set(single) == {*sharing, "kept_rows", "gradient_datastore", "recipe_settings", "selected_subset"}
    for asset in single:
        assert graph.get(dg.AssetKey(asset)).backfill_policy == dg.BackfillPolicy.single_run()


def test_the_shard_axis_is_dynamic_and_the_others_are_static(project):
    axes = Axes(project)
    assert axes.of(ASSETS["instruction_pool"]) is SHARDS
    for asset in ("warmup_checkpoints", "target_examples", "recipe_settings"):
        assert isinstance(axes.of(ASSETS[asset]), dg.StaticPartitionsDefinition)


def test_imported_checkpoints_are_the_checkpoint_axis():
    text = PROJECT.replace(b"{epochs: 3}", b"{import: [one, two]}")
    checkpoints = Axes(parse_project(text)).of(ASSETS["warmup_checkpoints"])
    assert list(checkpoints.get_partition_keys()) == [
        "epoch-1",
        "epoch-2",
    ]
