"""Rules beyond the best scores: from the project file to the subset, against what the stored features say."""

import dagster as dg
import numpy as np
import polars as pl
import pytest
from support.graph import StoredSubsets
from support.tiny import TinyProject, question, write_rows

from less_assets.reading.files import FEATURES, PASSED_OVER, TARGET_FEATURES
from less_assets.reading.rows import checkpoint_weights
from less_assets.running.runner import Request
from less_assets.store.features import open_features
from less_assets.store.tables import read_parquet

SUBSETS = Request(until="selected_subset")
RECIPES = [
    {"name": "less", "strategy": "less", "fraction": 0.3},
    {"name": "match", "strategy": "less", "aggregate": "match", "fraction": 0.3},
    {"name": "match-limited", "strategy": "less", "aggregate": "match", "rows": 10, "quotas": {"plus": 0.2}},
    {"name": "match-tokens", "strategy": "less", "aggregate": "match", "tokens": 25},
    {"name": "match-one", "strategy": "less", "aggregate": "match", "rows": 1},
    {"name": "mixed", "strategy": "less", "fraction": 0.3, "mix": {"share": 0.4}},
    {"name": "mixed-colors", "strategy": "bm25", "rows": 8, "mix": {"share": 0.5, "sources": ["colors"], "seed": 4}},
    {"name": "mixed-random", "strategy": "random", "tokens": 40, "mix": {"share": 0.5}},
    {"name": "against-pool", "strategy": "less", "rows": 9, "precondition": "pool", "aggregate": "mean"},
    {"name": "against-pool-more", "strategy": "less", "rows": 12, "precondition": "pool", "aggregate": "mean"},
    {"name": "given", "strategy": "external", "rows": 5, "scores": "by_place.csv"},
    {"name": "as-long", "strategy": "length_matched", "match": "mixed", "rows": 4},
]


class Made(StoredSubsets):
    """And the features of its pool."""

    def unit_features(self, form: str) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
        """The pool's distinct rows, and by checkpoint their unit features (n, k)."""
        lineage = self.lineage
        index = read_parquet(lineage.folder("pool_index"), "index.parquet").filter("canonical")
        units = {}
        for checkpoint in lineage.project.checkpoints:
            parts = []
            for shard in lineage.shards():
                reader = open_features(lineage.folder("train_gradients", f"{checkpoint}|{shard}"), FEATURES)
                parts.append(reader.take(form, index.filter(shard=shard)["row"].to_list()).astype(np.float64))
            rows = np.concatenate(parts)
            units[checkpoint] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return pl.concat([index.filter(shard=shard) for shard in lineage.shards()]), units

    def target_features(self, checkpoint: str, task: str) -> tuple[np.ndarray, list[str]]:
        """Unit features of the target examples, and their subtasks."""
        table = read_parquet(self.lineage.folder("target_gradients", f"{checkpoint}|{task}"), TARGET_FEATURES)
        rows = np.stack(table["features"].to_list()).astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True), table["subtask"].to_list()


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    project = TinyProject(tmp_path_factory.mktemp("rules"), tiny_model)
    write_rows(project.folder / "data/colors.jsonl", [question(place, "blue") for place in range(20)])
    project.settings["tasks"].append({"name": "both", "members": ["sums", "sky"]})
    project.settings["recipes"] = RECIPES
    scored = [f"plus,{row},{row % 7}.5,sums" for row in range(24)] + [
        "colors,3,9,sums",
        "colors,1,1,sky",
        "plus,1,2,both",
    ]
    (project.folder / "by_place.csv").write_text("\n".join(["source,row,score,task", *scored]) + "\n")
    with dg.DagsterInstance.ephemeral() as instance:
        found = Made(project, instance, SUBSETS)
        found.first = found.run()
        yield found


def by_trying_all(made: Made, task: str, count: int) -> list[str]:
    """Ids in the order of greedy matching, from decoded features alone."""
    index, units = made.unit_features("marginal")
    weights = checkpoint_weights(made.lineage)
    rows = np.concatenate([np.sqrt(weights[name]) * unit for name, unit in units.items()], axis=1)
    parts = []
    for name in units:
        targets, subtasks = made.target_features(name, task)
        labels = sorted(set(subtasks))
        means = [targets[np.array(subtasks) == label].mean(axis=0) for label in labels]
        parts.append(np.sqrt(weights[name]) * np.mean(means, axis=0))
    target = np.concatenate(parts)
    chosen: list[int] = []
    while len(chosen) < count:
        gains = []
        for row in range(len(rows)):
            total = rows[[*chosen, row]].sum(axis=0)
            gains.append(-np.inf if row in chosen else total @ target / np.linalg.norm(total))
        chosen.append(int(np.argmax(gains)))
    return index["example_id"][chosen].to_list()


@pytest.mark.parametrize("task", ["sums", "sky", "both"])
def test_matching_picks_what_trying_every_row_would(made, task):
    subset = made.subset(f"match|{task}")
    assert subset.height == 13
    assert subset["example_id"].to_list() == by_trying_all(made, task, 13)
    assert subset["rank"].to_list() == list(range(1, 14))
    assert subset["score"][0] == subset["score"].max()
    assert set(subset["task"]) <= ({"sums", "sky"} if task == "both" else {task})
    assert set(subset["subtask"]) <= {"part-0", "part-1"}


def test_matching_keeps_to_quotas_and_to_tokens(made):
    limited = made.subset("match-limited|sums")
    assert limited.height == 10
    assert limited.filter(source="plus").height == 2
    passed = read_parquet(made.lineage.folder("selected_subset", "match-limited|sums"), PASSED_OVER)
    assert set(passed["reason"]) == {"quota"}
    assert set(passed["source"]) == {"plus"}
    assert made.subset("match-one|sums")["example_id"].to_list() == [made.subset("match|sums")["example_id"][0]]
    tokens = made.subset("match-tokens|sums")
    assert 0 < tokens["loss_tokens"].sum() <= 25
    assert tokens["example_id"].to_list() == made.subset("match|sums")["example_id"][: tokens.height].to_list()


def test_a_mixed_selection_begins_with_the_best_rows_and_ends_with_drawn_ones(made):
    mixed, plain = made.subset("mixed|sums"), made.subset("less|sums")
    assert mixed.height == plain.height == 13
    assert mixed["example_id"][:8].to_list() == plain["example_id"][:8].to_list()
    drawn = mixed[8:]
    assert drawn["score"].null_count() == drawn["task"].null_count() == 5
    assert mixed["example_id"].is_unique().all()
    assert set(drawn["example_id"]) != set(plain["example_id"][8:])
    summary = made.lineage.summary("selected_subset", "mixed|sums")
    assert summary["rows"] == 13
    assert sum(summary["sources"].values()) == 13
    assert sum(sum(part.values()) for part in summary["subtasks"].values()) == 8


def test_a_mix_may_name_its_sources_and_works_for_random_rows_in_tokens(made):
    colors = made.subset("mixed-colors|sums")
    assert set(colors["source"][:4]) == {"plus"}
    assert colors["source"][4:].to_list() == ["colors"] * 4
    tokens = made.subset("mixed-random-seed0|sums")
    assert tokens["loss_tokens"].sum() <= 40
    assert tokens["example_id"].is_unique().all()


def test_what_is_not_ranked_by_influence_has_a_report_and_no_shares_of_tokens(made):
    keys = [f"{recipe}|sums" for recipe in ("match", "mixed", "mixed-colors")]
    request = Request(tasks=("sums",), recipes=("match", "mixed", "mixed-colors"), until="selection_report")
    made.run(request)
    lineage = made.lineage
    assert all(lineage.status("selection_report", key).state == "fresh" for key in keys)
    explained = read_parquet(lineage.folder("token_attribution", "mixed|sums"), "rows.parquet")
    assert explained.filter(group="selected").height == 8
    drawn = made.subset("mixed|sums")["example_id"][8:].to_list()
    assert not set(drawn) & set(explained["example_id"])
    assert "match|sums" not in lineage.declarations["token_attribution"].partitions(lineage.project, lineage.keys_of)


@pytest.mark.parametrize("task", ["sums", "both"])
def test_preconditioned_scores_are_those_of_the_inverse_written_out(made, task):
    index, units = made.unit_features("marginal")
    weights = checkpoint_weights(made.lineage)
    means: dict[str, np.ndarray] = {}
    for name, rows in units.items():
        count = len(rows)
        moment = rows.T @ rows / count + np.eye(rows.shape[1]) / count
        targets, subtasks = made.target_features(name, task)
        for label in sorted(set(subtasks)):
            direction = targets[np.array(subtasks) == label].mean(axis=0)
            seen = np.linalg.solve(moment, direction)
            seen *= np.linalg.norm(direction) / np.linalg.norm(seen)
            means[label] = means.get(label, 0) + weights[name] * (rows @ seen)
    subset = made.subset(f"against-pool|{task}")
    score = dict(zip(index["example_id"], np.stack(list(means.values()), axis=1), strict=True))
    for row in subset.filter(task="sums").iter_rows(named=True):
        own = score[row["example_id"]][[label.startswith("sums/") or task == "sums" for label in means]]
        assert row["score"] == pytest.approx(own.mean(), abs=1e-4)
    if task == "sums":
        best = sorted(score, key=lambda name: -score[name].mean())[:9]
        assert subset["example_id"].to_list() == best
        assert best != made.subset("less|sums")["example_id"][:9].to_list()


def test_recipes_that_differ_in_their_budget_share_preconditioned_scores(made):
    first, second = (
        made.lineage.folder("preconditioned_scores", f"{name}|sums") for name in ("against-pool", "against-pool-more")
    )
    assert str(first.root) == str(second.root)


def test_rows_are_found_by_source_and_row_and_each_task_has_its_scores(made):
    subset = made.subset("given|sums")
    assert subset["score"].to_list() == [9.0, 6.5, 6.5, 6.5, 5.5]
    asked = [messages[0]["content"] for messages in subset["messages"]]
    assert asked[0] == question(3, "blue")[0]["content"]
    assert sorted(asked[1:4]) == sorted(question(row, "plus")[0]["content"] for row in (6, 13, 20))
    assert made.subset("given|sky").height == made.subset("given|both").height == 1
    assert made.lineage.summary("external_scores", "given|sums")["scored"] == 25


def test_other_scores_are_another_selection(made):
    path = made.tiny.folder / "by_place.csv"
    path.write_text(path.read_text().replace("colors,3,9,sums", "colors,4,9,sums"))
    again = made.run(Request(tasks=("sums",), until="selected_subset"))
    assert set(again) == {"external_scores", "selected_subset"}
    assert made.subset("given|sums")["messages"][0][0]["content"] == question(4, "blue")[0]["content"]
