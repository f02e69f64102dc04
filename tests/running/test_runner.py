"""What a request needs, and how it is cut into runs; nothing is computed here."""

import json
from collections.abc import Iterator

import dagster as dg
import pytest
import yaml

from less_assets.orchestration.definitions import build_definitions
from less_assets.orchestration.partitions import SHARDS
from less_assets.project.project import Project, load_project
from less_assets.running.runner import GraphRunner, Request, open_instance, register_shards
from less_assets.steps.registry import ASSETS, open_store
from less_assets.store.artifacts import ArtifactStore

EPOCHS = ["epoch-1", "epoch-2"]
KEYS = ["plus-00000", "plus-00001", "plus-00002"]
RECIPES = ["less", "less-exact", "random-seed0", "base"]
TASKS = ["sums", "sky"]


class Small:
    """A project whose pool is scanned; `runner` may be asked, but has no model to run."""

    def __init__(self, folder, instance: dg.DagsterInstance) -> None:
        self.folder, self.instance = folder, instance
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        for name, rows in (("plus", 5), ("sums", 1), ("sky", 1)):
            (folder / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * rows)
        self.settings = {
            "name": "small",
            "model": {"base": "someone/some-model"},
            "pool": {"shard_size": 2, "sources": [{"name": "plus", "path": "plus*.jsonl"}]},
            "warmup": {"epochs": 2},
            "tasks": [{"name": task, "examples": {"path": f"{task}.jsonl"}} for task in TASKS],
            "recipes": [
                {"name": "less", "strategy": "less", "fraction": 0.5},
                {"name": "less-exact", "strategy": "less", "fraction": 0.5, "rescore": "exact"},
                {"name": "random", "strategy": "random", "fraction": 0.5, "seeds": [0]},
                {"name": "base", "strategy": "none"},
            ],
        }
        register_shards(self.project, self.store, instance)

    @property
    def project(self) -> Project:
        path = self.folder / "project.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        return load_project(path)

    @property
    def store(self) -> ArtifactStore:
        return open_store(self.project)

    @property
    def runner(self) -> GraphRunner:
        return GraphRunner(build_definitions(self.project), self.project, self.store, self.instance, print)

    def needed(self, **request) -> dict[str, list]:
        """What a request needs."""
        return self.runner.needed(Request(**request))


@pytest.fixture
def small(tmp_path) -> Iterator[Small]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Small(tmp_path, instance)


def grid(first: list[str], second: list[str]) -> list[str]:
    return [f"{one}|{other}" for one in first for other in second]


def test_everything_is_every_partition_in_topological_order(small):
    needed = small.needed()
    axes = {"checkpoint": EPOCHS, "shard": KEYS, "task": TASKS, "recipe": RECIPES}
    left_out = {name for name, asset in ASSETS.items() if asset.needed_by and not asset.explains}
    assert set(ASSETS) - set(needed) == left_out - {"exact_scores"}
    for asset in needed:
        names = ASSETS[asset].axes
        if asset == "exact_scores":
            assert needed[asset] == grid(["less-exact"], TASKS)
        elif asset == "token_attribution":
            assert needed[asset] == grid([recipe for recipe in RECIPES if recipe.startswith("less")], TASKS)
        elif asset == "selection_report":
            assert needed[asset] == grid([recipe for recipe in RECIPES if recipe not in ("full", "base")], TASKS)
        elif len(names) == 2:
            assert needed[asset] == grid(axes[names[0]], axes[names[1]])
        else:
            assert needed[asset] == (axes[names[0]] if names else [None])
    order = list(needed)
    assert order.index("pool_index") < order.index("warmup_sample") < order.index("warmup_checkpoints")
    assert order.index("influence_scores") < order.index("exact_scores") < order.index("selected_subset")
    assert order[-3:] == ["leaderboard", "token_attribution", "selection_report"], "no training waits for explanations"


def test_certificates_come_after_the_models_and_before_reports_unless_extras_are_left_out(small):
    def order(**request) -> list[str]:
        asked = Request(**request)
        return small.runner.stages(small.runner.needed(asked), asked)

    assert order()[-4:] == ["leaderboard", "certificates", "token_attribution", "selection_report"]
    assert order(until="influence_scores")[-1] == "certificates"
    for request in ({"extras": False}, {"recipes": ("random-seed0",)}, {"until": "train_gradients"}):
        assert "certificates" not in order(**request), request
    small.settings["gradients"] = {"certificate_rows": 0, "real_step_rows": 0}
    assert "certificates" not in order()


def test_random_selection_needs_no_gradients(small):
    needed = small.needed(recipes=("random-seed0",))
    assert set(needed) == {
        *("base_model", "instruction_pool", "refused_rows", "pool_index", "target_examples", "recipe_settings"),
        *("selected_subset", "finetuned_model", "eval_results", "selection_report"),
    }
    assert needed["recipe_settings"] == ["random-seed0"]
    assert needed["eval_results"] == grid(["random-seed0"], TASKS)


def test_only_a_recipe_that_rescores_needs_exact_scores(small):
    assert "exact_scores" not in small.needed(recipes=("less",))
    assert small.needed(recipes=("less-exact",), tasks=("sky",))["exact_scores"] == ["less-exact|sky"]


def test_one_task_needs_no_other_tasks_gradients(small):
    needed = small.needed(tasks=("sky",))
    assert needed["target_gradients"] == grid(EPOCHS, ["sky"])
    assert needed["influence_scores"] == needed["target_examples"] == needed["task_results"] == ["sky"]
    assert needed["train_gradients"] == grid(EPOCHS, KEYS)
    assert "leaderboard" not in needed


def test_until_an_asset_needs_nothing_below_it(small):
    assert set(small.needed(until="warmup_checkpoints")) == {
        *("base_model", "instruction_pool", "refused_rows", "pool_index", "warmup_sample", "warmup_checkpoints"),
    }
    subsets = small.needed(until="selected_subset", tasks=("sums",), recipes=("less",))
    assert subsets["selected_subset"] == ["less|sums"]
    assert subsets["influence_scores"] == ["sums"]


def test_until_an_asset_without_the_named_axis_takes_all_of_it(small):
    assert small.needed(until="train_gradients", tasks=("sums",))["train_gradients"] == grid(EPOCHS, KEYS)


def test_shards_of_a_source_that_was_removed_need_nothing_though_dagster_still_knows_them(small):
    (small.folder / "extra.jsonl").write_text((small.folder / "sums.jsonl").read_text())
    small.settings["pool"]["sources"].append({"name": "extra", "path": "extra.jsonl"})
    register_shards(small.project, small.store, small.instance)
    assert small.needed()["instruction_pool"] == [*KEYS, "extra-00000"]
    del small.settings["pool"]["sources"][-1]
    register_shards(small.project, small.store, small.instance)
    assert "extra-00000" in small.instance.get_dynamic_partitions(str(SHARDS.name))
    assert small.needed()["instruction_pool"] == KEYS
    assert small.needed()["train_gradients"] == grid(EPOCHS, KEYS)


def test_shards_are_registered_once_and_in_order(small):
    (small.folder / "plus-b.jsonl").write_text((small.folder / "sums.jsonl").read_text() * 3)
    for _ in range(2):
        register_shards(small.project, small.store, small.instance)
        assert list(small.instance.get_dynamic_partitions(str(SHARDS.name))) == [*KEYS, "plus-00003"]


def test_neighbours_share_a_run_within_one_checkpoint_only(small):
    runner = small.runner
    assert runner.runs("train_gradients", grid(EPOCHS, KEYS)) == [grid([epoch], KEYS) for epoch in EPOCHS]
    holes = ["epoch-1|plus-00000", "epoch-1|plus-00002", "epoch-2|plus-00000"]
    assert runner.runs("train_gradients", holes) == [[key] for key in holes]
    assert runner.runs("instruction_pool", KEYS) == [KEYS]
    assert runner.runs("warmup_checkpoints", EPOCHS) == [EPOCHS]


def test_runs_follow_dagsters_order_of_keys_whatever_order_they_are_due_in(small):
    assert small.runner.runs("instruction_pool", [KEYS[2], KEYS[0], KEYS[1]]) == [KEYS]


def test_assets_without_range_runs_get_one_run_for_each_partition(small):
    assert small.runner.runs("finetuned_model", grid(["less"], TASKS)) == [["less|sums"], ["less|sky"]]
    assert small.runner.runs("pool_index", [None]) == [[None]]


def test_base_models_come_first_so_that_others_can_be_compared_with_them(small):
    due = grid(["less", "base"], TASKS)
    assert small.runner.runs("finetuned_model", due) == [[key] for key in grid(["base", "less"], TASKS)]
    assert small.runner.runs("eval_results", due) == [[key] for key in grid(["base", "less"], TASKS)]


@dg.job
def talk():
    @dg.op
    def say():
        print("said by a step", flush=True)

    say()


def test_what_a_step_prints_goes_straight_to_the_terminal_unless_dagster_is_told_to_keep_it(tmp_path, capfd):
    with open_instance(tmp_path) as instance:
        talk.execute_in_process(instance=instance)
    assert "said by a step" in capfd.readouterr().out
    assert not list(tmp_path.rglob("*.out")), "Dagster has diverted it into files, and copied it back"
    kept = tmp_path / "kept"
    compute_logs = {"module": "dagster._core.storage.local_compute_log_manager", "class": "LocalComputeLogManager"}
    compute_logs["config"] = {"base_dir": str(kept)}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"compute_logs": compute_logs}))
    with open_instance(tmp_path) as instance:
        talk.execute_in_process(instance=instance)
    assert any("said by a step" in file.read_text() for file in kept.rglob("*.out"))
