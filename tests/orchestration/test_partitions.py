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
  - {name: tuned, strategy: target_tuned, fraction: 0.1}
  - {name: as-tuned, strategy: length_matched, match: tuned, fraction: 0.1}
"""
WITH_TOURNAMENT = (
    PROJECT.replace(b".jsonl}}", b".jsonl}, validation: {path: more.jsonl}}")
    + b"  - {name: best, strategy: tournament, fraction: 0.1, candidates: [less, rds, as-targets]}\n"
)
CHECKPOINTS = ["epoch-1", "epoch-2", "epoch-3"]
SHARD_KEYS = ["plus-00000", "plus-00001"]
TASKS = ["sums", "sky", "both"]
RECIPES = ["less", "less-paper", "random-seed0", "random-seed1", "full", "base", "rds", "mid", "bm25", "dsir-seed0"]
RECIPES += ["as-less-seed0", "as-rds-seed0", "as-targets-seed0", "against-pool", "given", "tuned", "as-tuned-seed0"]
PILOTS = [
    f"best.pilot-{candidate}-seed{seed}" for candidate in ("less", "rds", "as-targets", "random") for seed in (0, 1)
]
AXES = {name: asset.axes for name, asset in ASSETS.items()}
KEYS = {"checkpoint": CHECKPOINTS, "shard": SHARD_KEYS, "task": TASKS, "recipe": [*RECIPES, "best"], "pilot": PILOTS}

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
    ("target_tuned_adapter", "sky", "base_model", [None]),
    ("target_tuned_adapter", "both", "target_examples", ["both"]),
    ("target_tuned_losses", "plus-00001|sky", "target_tuned_adapter", ["sky"]),
    ("target_tuned_losses", "plus-00001|sky", "instruction_pool", ["plus-00001"]),
    ("target_tuned_scores", "sky", "pool_index", [None]),
    ("target_tuned_scores", "sky", "pool_embeddings", SHARD_KEYS),
    ("target_tuned_scores", "sky", "target_tuned_losses", [f"{shard}|sky" for shard in SHARD_KEYS]),
    ("selected_subset", "tuned|sky", "target_tuned_scores", ["sky"]),
    ("selected_subset", "as-tuned-seed0|sky", "target_tuned_scores", ["sky"]),
    ("selected_subset", "less|sky", "target_tuned_scores", []),
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
    ("selected_subset", "best|sky", "tournament_results", ["best|sky"]),
    ("selected_subset", "best|sky", "influence_scores", ["sky"]),
    ("selected_subset", "best|sky", "exact_scores", ["less|sky"]),
    ("selected_subset", "best|sky", "embedding_scores", ["rds|sky"]),
    ("selected_subset", "best|sky", "text_scores", []),
    ("selected_subset", "best|sky", "target_examples", ["sky"]),
    ("selected_subset", "less|sky", "tournament_results", []),
    ("pilot_subset", "best.pilot-less-seed1|sky", "influence_scores", ["sky"]),
    ("pilot_subset", "best.pilot-less-seed1|sky", "exact_scores", ["less|sky"]),
    ("pilot_subset", "best.pilot-less-seed1|sky", "embedding_scores", []),
    ("pilot_subset", "best.pilot-rds-seed1|sky", "embedding_scores", ["rds|sky"]),
    ("pilot_subset", "best.pilot-rds-seed1|sky", "influence_scores", []),
    ("pilot_subset", "best.pilot-random-seed1|sky", "target_examples", []),
    ("pilot_subset", "best.pilot-as-targets-seed0|sky", "target_examples", ["sky"]),
    ("pilot_subset", "best.pilot-less-seed1|sky", "text_scores", []),
    ("pilot_subset", "best.pilot-less-seed1|sky", "preconditioned_scores", []),
    ("pilot_subset", "best.pilot-less-seed1|sky", "external_scores", []),
    ("pilot_subset", "best.pilot-less-seed1|sky", "pool_index", [None]),
    ("pilot_subset", "best.pilot-less-seed1|sky", "excluded_rows", [None]),
    ("pilot_model", "best.pilot-less-seed1|sky", "pilot_subset", ["best.pilot-less-seed1|sky"]),
    ("pilot_model", "best.pilot-less-seed1|sky", "base_model", [None]),
    ("pilot_results", "best.pilot-less-seed1|sky", "pilot_model", ["best.pilot-less-seed1|sky"]),
    ("pilot_results", "best.pilot-less-seed1|both", "target_examples", ["both"]),
    ("tournament_results", "best|sky", "pilot_results", [f"{pilot}|sky" for pilot in PILOTS]),
    ("selection_report", "best|sky", "tournament_results", ["best|sky"]),
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
    ("selection_report", "less|sky", "target_tuned_scores", []),
    ("selection_report", "tuned|sky", "target_tuned_scores", ["sky"]),
    ("selection_report", "random-seed1|sky", "selected_subset", ["random-seed1|sky"]),
    ("selection_report", "random-seed1|sky", "influence_scores", []),
    ("selection_report", "random-seed1|sky", "token_attribution", []),
    ("finetuned_model", "less|sky", "base_model", [None]),
    ("finetuned_model", "less|sky", "selected_subset", ["less|sky"]),
    ("eval_results", "less|sky", "finetuned_model", ["less|sky"]),
    ("eval_results", "less|sky", "target_examples", ["sky"]),
    ("task_results", "sky", "eval_results", [f"{recipe}|sky" for recipe in KEYS["recipe"]]),
    ("leaderboard", None, "task_results", TASKS),
]
SOME_RECIPES = {
    "exact_scores": ["less"],
    "embedding_scores": ["prefilter", "rds", "mid"],
    "text_scores": ["bm25", "dsir-seed0"],
    "preconditioned_scores": ["against-pool"],
    "external_scores": ["given"],
    "token_attribution": ["less", "less-paper"],
    "selection_report": [recipe for recipe in KEYS["recipe"] if recipe not in ("full", "base")],
    "tournament_results": ["best"],
}
WITHOUT_PARENTS = ["base_model", "instruction_pool", "target_examples", "recipe_settings"]


@pytest.fixture(scope="module")
def project() -> Project:
    return parse_project(WITH_TOURNAMENT)


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


def pilots(candidate: str) -> list[str]:
    return [pilot for pilot in PILOTS if f"-{candidate}-seed" in pilot and f"as-{candidate}" not in pilot]


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
        ("selected_subset", "influence_scores"): ["less", "less-paper", "as-less-seed0", "best"],
        ("selected_subset", "exact_scores"): ["less", "as-less-seed0", "best"],
        ("selected_subset", "embedding_scores"): ["rds", "mid", "as-rds-seed0", "best"],
        ("selected_subset", "text_scores"): ["bm25", "dsir-seed0"],
        ("selected_subset", "target_examples"): ["as-targets-seed0", "best"],
        ("selected_subset", "tournament_results"): ["best"],
        ("selection_report", "tournament_results"): ["best"],
        ("pilot_subset", "influence_scores"): pilots("less"),
        ("pilot_subset", "exact_scores"): pilots("less"),
        ("pilot_subset", "embedding_scores"): pilots("rds"),
        ("pilot_subset", "target_examples"): pilots("as-targets"),
        **{("pilot_subset", f"{kind}_scores"): [] for kind in ("text", "preconditioned", "external", "target_tuned")},
        ("selected_subset", "preconditioned_scores"): ["against-pool"],
        ("selected_subset", "external_scores"): ["given"],
        ("selected_subset", "target_tuned_scores"): ["tuned", "as-tuned-seed0"],
        ("embedding_scores", "target_embeddings"): ["prefilter", "rds"],
        ("embedding_scores", "pool_embeddings"): ["prefilter", *RECIPES],
        ("embedding_scores", "pool_index"): ["prefilter", *RECIPES],
        ("selection_report", "influence_scores"): ["less", "less-paper"],
        ("selection_report", "target_tuned_scores"): ["tuned"],
        ("selection_report", "token_attribution"): ["less", "less-paper"],
    }
    for child, axes in AXES.items():
        if child in WITHOUT_PARENTS or not axes:
            continue
        definition = graph.get(dg.AssetKey(child)).partitions_def
        for key in definition.get_partition_keys(dynamic_partitions_store=instance):
            for parent in graph.get(dg.AssetKey(child)).parent_keys:
                name = parent.to_user_string()
                known = readers.get((child, name), [*KEYS["recipe"], *PILOTS])
                reads = key.split("|")[0] in known or not {"recipe", "pilot"} & {*axes}
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
    text = text.replace(b"strategy: target_tuned, fraction: 0.1", b"strategy: full")
    text = text.replace(b"match: less, ", b"").replace(b"match: rds, ", b"").replace(b"match: tuned, ", b"")
    graph = build_definitions(parse_project(text)).resolve_asset_graph()
    assert dg.AssetKey("influence_scores") not in graph.get(dg.AssetKey("selected_subset")).parent_keys
    assert dg.AssetKey("influence_scores") in graph.get_all_asset_keys()
    optional = {dg.AssetKey(name) for name, asset in ASSETS.items() if asset.needed_by} & set(
        graph.get_all_asset_keys()
    )
    assert optional == {dg.AssetKey("selection_report")}, "of the random recipes"


def test_pilots_are_judged_on_folds_and_tournaments_are_held_for_whole_tasks(instance):
    text = WITH_TOURNAMENT.replace(b"  - {name: both, members: [sums, sky]}\n", b"").replace(
        b"sky.jsonl}, validation: {path: more.jsonl}", b"sky.jsonl}, validation: {folds: 2}"
    )
    grown = build_definitions(parse_project(text)).resolve_asset_graph()

    def keys_of(asset: str) -> list[str]:
        return list(grown.get(dg.AssetKey(asset)).partitions_def.get_partition_keys())

    folds = ["sky.fold-1", "sky.fold-2"]
    for asset in ("pilot_subset", "pilot_model", "pilot_results"):
        assert keys_of(asset) == [f"{pilot}|{task}" for pilot in PILOTS for task in ["sums", *folds]]
    assert keys_of("tournament_results") == ["best|sums", "best|sky"]
    for asset in ("selected_subset", "finetuned_model", "eval_results"):
        assert [key for key in keys_of(asset) if key.startswith("best|")] == ["best|sums", "best|sky"]
    read = parents(grown, instance, "tournament_results", "best|sky", "pilot_results")
    assert sorted(read) == sorted(f"{pilot}|{fold}" for pilot in PILOTS for fold in folds)
    read = parents(grown, instance, "pilot_subset", "best.pilot-less-seed0|sky.fold-2", "influence_scores")
    assert read == ["sky.fold-2"]
    read = parents(grown, instance, "task_results", "sky", "eval_results")
    assert set(read) == {f"{recipe}|{task}" for recipe in RECIPES for task in ["sky", *folds]} | {"best|sky"}
    grown.validate_partitions()


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
    sharing += ["target_tuned_losses"]
    sharing += ["influence_scores", "pool_embeddings"]  # scores: one pass over the datastore for all tasks
    assert set(single) == {
        *sharing,
        "gradient_datastore",
        "recipe_settings",
        "selected_subset",
        "kept_rows",
        "pilot_subset",
    }
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
