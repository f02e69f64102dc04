"""What is computed again after a change, and what is not: counted on a whole tiny project, materialized once.

Every test starts from the same finished run: project folder, artifacts and Dagster's records are put back before it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from polars.testing import assert_frame_equal
from support.graph import replaced, run
from support.tiny import TinyProject, question, write_rows

from less_assets.errors import MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.reading.files import SAMPLE, score_file
from less_assets.running.runner import RANGE_END_TAG, RANGE_START_TAG, Request, register_shards
from less_assets.steps import gradients
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.store.tables import read_parquet

MEMORY = Path("/dev/shm")
RECIPES = ["less", "random-seed0", "base"]
TASKS = ["sums", "sky"]
EPOCHS = ["epoch-1", "epoch-2"]
UNTIL_SCORES = Request(until="influence_scores")
UNTIL_SUBSETS = Request(until="selected_subset")


class Finished:
    """A finished project on a persistent Dagster instance."""

    def __init__(self, project: TinyProject, home: Path) -> None:
        self.tiny, self.home = project, home
        # One database for the events of all runs instead of one a run: setting those up would take most of the time.
        storage = {"class": "ConsolidatedSqliteEventLogStorage", "config": {"base_dir": str(home)}}
        storage["module"] = "dagster._core.storage.event_log"
        self.instance = dg.DagsterInstance.local_temp(str(home), overrides={"event_log_storage": storage})

    def run(self, request: Request = Request()) -> dict[str, list]:  # noqa: B008 - immutable
        """Bring it up to date; asset → partitions that were materialized."""
        return run(self.tiny.path, self.instance, request).materialized

    @property
    def lineage(self) -> Lineage:
        """The artifacts as they stand now."""
        project = load_project(self.tiny.path)
        return open_lineage(project, open_store(project))

    def rows(self, name: str) -> list[dict]:
        """Rows of a data file."""
        return [json.loads(text) for text in (self.tiny.folder / name).read_text().splitlines()]

    def sampled(self) -> set[str]:
        """What the users ask in the warm-up's rows."""
        lineage = self.lineage
        ids = set(read_parquet(lineage.folder("warmup_sample"), SAMPLE)["example_id"])
        return {
            row["messages"][0]["content"]
            for shard in lineage.shards()
            for row in read_parquet(lineage.folder("instruction_pool", shard), "examples.parquet").iter_rows(named=True)
            if row["example_id"] in ids
        }

    def edit_row(self, name: str, place: int) -> None:
        """Replace one row by another good one."""
        rows = self.rows(name)
        rows[place] = {"messages": question(900 + place, "sea")}
        write_rows(self.tiny.folder / name, rows)

    def materialize(self, asset: str, partition: str) -> None:
        """Materialize one partition directly, as from the UI, without looking at what it needs."""
        project = load_project(self.tiny.path)
        register_shards(project, open_store(project), self.instance)
        job = build_definitions(project).resolve_implicit_global_asset_job_def()
        job.execute_in_process(
            asset_selection=[dg.AssetKey(asset)], partition_key=partition, instance=self.instance, raise_on_error=True
        )

    def not_fresh(self) -> dict[str, str]:
        """What Dagster itself calls stale or missing: `asset` or `asset/partition` → status."""
        graph = build_definitions(load_project(self.tiny.path)).resolve_asset_graph()
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        found = {}
        for asset in [name for name in ASSETS if dg.AssetKey(name) in graph.get_all_asset_keys()]:
            definition = graph.get(dg.AssetKey(asset)).partitions_def
            keys = definition.get_partition_keys(dynamic_partitions_store=self.instance) if definition else [None]
            for key in keys:
                status = resolver.get_status(dg.AssetKey(asset), key).value
                if status != "FRESH":
                    found[asset if key is None else f"{asset}/{key}"] = status
        return found

    def scores(self, task: str) -> pl.DataFrame:
        """All scores of a task, in the pool's order."""
        lineage = self.lineage
        folder = lineage.folder("influence_scores", task)
        return pl.concat([read_parquet(folder, score_file(shard)) for shard in lineage.shards()])


@pytest.fixture(scope="module")
def pristine(tiny_model) -> Iterator[tuple[Path, Path, dict]]:
    """A finished run: its folder, a copy of it to go back to, and the project's settings."""
    root = Path(tempfile.mkdtemp(prefix="less-recomputation-", dir=MEMORY if MEMORY.is_dir() else None))
    project = TinyProject(root / "live/project", tiny_model)
    write_rows(project.folder / "data/colors.jsonl", [question(place, "red") for place in range(16)])
    project.settings["recipes"] = [recipe for recipe in project.settings["recipes"] if recipe["name"] != "full"]
    (root / "live/home").mkdir()
    finished = Finished(project, root / "live/home")
    made = finished.run()
    assert made["train_gradients"] == [f"{epoch}|{shard}" for epoch in EPOCHS for shard in finished.lineage.shards()]
    assert finished.lineage.shards() == ["plus-00000", "plus-00001", "colors-00000"]
    finished.instance.dispose()
    shutil.copytree(root / "live", root / "kept")
    yield root / "live", root / "kept", project.settings
    shutil.rmtree(root)


@pytest.fixture
def finished(pristine, tiny_model) -> Iterator[Finished]:
    """The finished run, as if nothing had happened since; at the same path, which is part of what rows are."""
    live, kept, settings = pristine
    shutil.rmtree(live)
    shutil.copytree(kept, live)
    project = TinyProject.__new__(TinyProject)
    project.folder, project.settings = live / "project", json.loads(json.dumps(settings))
    found = Finished(project, live / "home")
    yield found
    found.instance.dispose()


def grid(first: list[str], second: list[str]) -> list[str]:
    return [f"{one}|{other}" for one in first for other in second]


def test_the_second_run_computes_nothing(finished):
    assert finished.run() == {}


def test_dagster_calls_everything_fresh_after_a_run(finished):
    assert finished.not_fresh() == {}


def test_a_new_shard_costs_that_shard_and_what_reads_the_whole_pool(finished):
    rows = [question(500 + place, "blue") for place in range(6)]
    write_rows(finished.tiny.folder / "data/colors_more.jsonl", rows)
    before = {epoch: finished.lineage.fresh("warmup_checkpoints", epoch) for epoch in EPOCHS}
    made = finished.run(UNTIL_SUBSETS)
    assert made == {
        "instruction_pool": ["colors-00001"],
        "refused_rows": ["colors-00001"],
        "pool_index": [None],
        "warmup_sample": [None],  # checked again, not drawn again: nothing is trained
        "train_gradients": ["epoch-1|colors-00001", "epoch-2|colors-00001"],
        "gradient_datastore": EPOCHS,
        "influence_scores": TASKS,
        "selected_subset": grid(RECIPES, TASKS),
    }
    assert {epoch: finished.lineage.fresh("warmup_checkpoints", epoch) for epoch in EPOCHS} == before
    below = [f"finetuned_model/{key}" for key in grid(RECIPES[:2], TASKS)]
    below += [f"selection_report/{key}" for key in grid(RECIPES[:2], TASKS)]
    assert finished.not_fresh().keys() == {*below, *(f"token_attribution/less|{task}" for task in TASKS)}


def test_scores_after_an_appended_shard_are_those_from_scratch(finished):
    rows = [question(500 + place, "blue") for place in range(6)]
    write_rows(finished.tiny.folder / "data/colors_more.jsonl", rows)
    finished.run(UNTIL_SCORES)
    grown = {task: finished.scores(task) for task in TASKS}
    assert grown["sums"].height == 24 + 16 + 6

    finished.tiny.settings["storage"] = {"root": "scratch"}
    for kept in ("warmup_sample", "warmup"):  # the sample is frozen: from scratch, it would be drawn from a larger pool
        shutil.copytree(finished.tiny.folder / "artifacts" / kept, finished.tiny.folder / "scratch" / kept)
    with dg.DagsterInstance.ephemeral() as instance:
        made = run(finished.tiny.path, instance, UNTIL_SCORES).materialized
    assert len(made["train_gradients"]) == 8
    for task in TASKS:
        assert_frame_equal(finished.scores(task), grown[task], check_exact=True)


def test_dagster_calls_the_gate_stale_after_an_appended_shard_and_nothing_else_of_the_gradients(finished):
    rows = [question(500 + place, "blue") for place in range(6)]
    write_rows(finished.tiny.folder / "data/colors_more.jsonl", rows)
    project = load_project(finished.tiny.path)
    register_shards(project, open_store(project), finished.instance)
    missing = {f"train_gradients/{epoch}|colors-00001": "MISSING" for epoch in EPOCHS}
    assert finished.not_fresh().items() >= {**missing, "instruction_pool/colors-00001": "MISSING"}.items()
    finished.materialize("instruction_pool", "colors-00001")
    assert finished.not_fresh()["pool_index"] == "STALE"
    finished.run(Request(until="warmup_sample"))
    finished.materialize("train_gradients", "epoch-1|colors-00001")
    found = finished.not_fresh()
    assert {name: found[name] for name in found if name.startswith("gradient_datastore")} == {
        f"gradient_datastore/{epoch}": "STALE" for epoch in EPOCHS
    }
    gradients_below = {name for name in found if name.startswith(("train_gradients", "warmup", "target"))}
    assert gradients_below == {"train_gradients/epoch-2|colors-00001"}


def test_a_new_task_costs_its_own_gradients_and_one_scan(finished):
    folder = finished.tiny.folder
    write_rows(folder / "targets/sea.jsonl", [question(700 + place, "sea") for place in range(3)])
    write_rows(folder / "held_out/sea.jsonl", [question(800 + place, "sea") for place in range(3)])
    finished.tiny.settings["tasks"].append(
        {
            "name": "sea",
            "examples": {"path": "targets/sea.jsonl"},
            "evaluation": {"held_out": "held_out/sea.jsonl", "max_new_tokens": 2},
        }
    )
    models = set((folder / "artifacts/models").glob("[0-9a-f]*/manifest.json"))
    assert finished.run() == {
        "target_examples": ["sea"],
        "target_gradients": grid(EPOCHS, ["sea"]),
        "influence_scores": ["sea"],
        "selected_subset": grid(RECIPES, ["sea"]),
        "finetuned_model": grid(RECIPES, ["sea"]),
        "eval_results": grid(RECIPES, ["sea"]),
        "task_results": ["sea"],
        "leaderboard": [None],
        "token_attribution": ["less|sea"],
        "selection_report": grid(RECIPES[:2], ["sea"]),
    }
    trained = set((folder / "artifacts/models").glob("[0-9a-f]*/manifest.json")) - models
    assert len(trained) == 1, "random and base are the same models as for the other tasks"


def test_a_new_recipe_costs_its_own_training(finished):
    finished.tiny.settings["recipes"].append(
        {"name": "less-mean", "strategy": "less", "fraction": 0.1, "aggregate": "mean"}
    )
    own = grid(["less-mean"], TASKS)
    assert finished.run() == {
        "recipe_settings": ["less-mean"],
        "selected_subset": own,
        "finetuned_model": own,
        "eval_results": own,
        "task_results": TASKS,
        "leaderboard": [None],
        "token_attribution": own,
        # Pages of the other recipes compare with it; nothing of what they explain is computed again.
        "selection_report": grid([*RECIPES[:2], "less-mean"], TASKS),
    }
    assert finished.not_fresh() == {}


def test_a_changed_recipe_touches_only_its_own(finished):
    finished.tiny.settings["recipes"][0]["fraction"] = 0.4
    assert finished.run(Request(until="finetuned_model")) == {
        "recipe_settings": ["less"],
        "selected_subset": grid(["less"], TASKS),
        "finetuned_model": grid(["less"], TASKS),
    }
    finished.tiny.settings["recipes"][0]["fraction"] = 0.2
    models = set((finished.tiny.folder / "artifacts/models").iterdir())
    finished.run(Request(until="finetuned_model"))
    assert set((finished.tiny.folder / "artifacts/models").iterdir()) == models, "the old model was still there"


def test_a_request_for_a_recipe_leaves_what_others_need_alone(finished):
    finished.tiny.settings["gradients"]["dimension"] = 128
    assert finished.run(Request(recipes=("random-seed0",))) == {}
    assert "train_gradients" in finished.run(Request(recipes=("less",), tasks=("sums",), until="influence_scores"))
    assert "influence_scores/sky" in finished.not_fresh()
    assert "influence_scores/sums" not in finished.not_fresh()


def test_changed_targets_make_the_subsets_that_read_their_scores_stale_and_no_others(finished):
    finished.edit_row("targets/sums.jsonl", 1)
    assert finished.run(UNTIL_SCORES) == {
        "target_examples": ["sums"],
        "target_gradients": grid(EPOCHS, ["sums"]),
        "influence_scores": ["sums"],
    }
    subsets = {name for name in finished.not_fresh() if name.startswith("selected_subset")}
    assert subsets == {"selected_subset/less|sums"}, "random and base do not read scores"


def test_another_way_to_evaluate_a_task_computes_no_gradients(finished):
    finished.tiny.settings["tasks"][0]["evaluation"]["max_new_tokens"] = 3
    stamps = {path: path.stat().st_mtime_ns for path in (finished.tiny.folder / "artifacts").rglob("features.*")}
    finished.run(UNTIL_SCORES)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list((finished.tiny.folder / "artifacts").rglob("features.*"))) == len(stamps)


def test_an_edited_row_recomputes_only_its_shard(finished):
    sampled = finished.sampled()
    place = next(
        place
        for place, row in enumerate(finished.rows("data/plus.jsonl"))
        if place >= 16 and row["messages"][0]["content"] not in sampled
    )
    finished.edit_row("data/plus.jsonl", place)
    made = finished.run(Request(until="train_gradients"))
    assert made["instruction_pool"] == ["plus-00001"]
    assert made["train_gradients"] == grid(EPOCHS, ["plus-00001"])
    assert "warmup_checkpoints" not in made


def test_rows_appended_to_a_file_change_its_last_shard_and_add_new_ones(finished):
    rows = finished.rows("data/plus.jsonl") + [{"messages": question(950 + place, "sea")} for place in range(16)]
    write_rows(finished.tiny.folder / "data/plus.jsonl", rows)
    made = finished.run(UNTIL_SCORES)
    assert made["instruction_pool"] == ["plus-00001", "plus-00002"]
    assert sorted(made["train_gradients"]) == grid(EPOCHS, ["plus-00001", "plus-00002"])
    assert "warmup_checkpoints" not in made
    assert finished.scores("sky").height == 24 + 16 + 16


def test_all_tasks_that_are_due_are_scored_in_one_pass_with_the_bytes_of_a_pass_each(finished, monkeypatch):
    from less_assets.method.selection import influence

    score, passes = influence.score_shard, []

    def counted(sources, *arguments):
        passes.append(len(sources))
        return score(sources, *arguments)

    def forget() -> None:
        passes.clear()
        for task in TASKS:
            shutil.rmtree(finished.tiny.folder / "artifacts/selection" / task / "influence")

    monkeypatch.setattr(influence, "score_shard", counted)
    together = [finished.lineage.fresh("influence_scores", task) for task in TASKS]
    forget()
    for task in TASKS:
        finished.materialize("influence_scores", task)
    assert len(passes) == len(TASKS) * len(finished.lineage.shards())
    assert [finished.lineage.fresh("influence_scores", task) for task in TASKS] == together
    forget()
    assert finished.run(UNTIL_SCORES) == {"influence_scores": TASKS}
    assert passes == [len(EPOCHS)] * len(finished.lineage.shards()), "the datastore is read once for all tasks"
    assert [finished.lineage.fresh("influence_scores", task) for task in TASKS] == together
    assert finished.not_fresh() == {}


def test_an_inserted_row_recomputes_its_source_from_the_first_changed_shard(finished):
    rows = finished.rows("data/plus.jsonl")
    rows.insert(18, {"messages": question(901, "sea")})
    write_rows(finished.tiny.folder / "data/plus.jsonl", rows)
    assert finished.run(Request(until="train_gradients"))["train_gradients"] == grid(EPOCHS, ["plus-00001"])
    rows.insert(2, {"messages": question(902, "sea")})
    write_rows(finished.tiny.folder / "data/plus.jsonl", rows)
    made = finished.run(Request(until="train_gradients"))
    assert made["train_gradients"] == grid(EPOCHS, ["plus-00000", "plus-00001"])


def test_a_row_of_the_warmup_sample_that_vanished_is_refused_until_it_is_put_back(finished):
    sampled = finished.sampled()
    place = next(
        place for place, row in enumerate(finished.rows("data/plus.jsonl")) if row["messages"][0]["content"] in sampled
    )
    before = finished.rows("data/plus.jsonl")
    finished.edit_row("data/plus.jsonl", place)
    for _ in range(2):  # it is refused again, not only the first time
        with pytest.raises(MissingArtifactError, match="--resample-warmup"):
            finished.run(UNTIL_SUBSETS)
    with pytest.raises(StaleArtifactError, match="warmup_sample"):
        finished.materialize("warmup_checkpoints", "epoch-1")
    write_rows(finished.tiny.folder / "data/plus.jsonl", before)
    made = finished.run()
    assert "warmup_checkpoints" not in made
    assert finished.run() == {}, "with the row put back, all is as it was"


def test_a_source_that_came_and_went_leaves_everything_as_it_was(finished):
    scores = finished.lineage.fresh("influence_scores", "sky").fingerprint
    write_rows(finished.tiny.folder / "data/extra.jsonl", [question(600 + place, "nine") for place in range(5)])
    finished.tiny.settings["pool"]["sources"].append({"name": "extra", "path": "data/extra.jsonl"})
    assert finished.run(UNTIL_SCORES)["train_gradients"] == grid(EPOCHS, ["extra-00000"])
    assert finished.lineage.fresh("influence_scores", "sky").fingerprint != scores
    del finished.tiny.settings["pool"]["sources"][-1]
    made = finished.run(UNTIL_SCORES)
    assert "instruction_pool" not in made
    assert "train_gradients" not in made
    assert finished.lineage.shards() == ["plus-00000", "plus-00001", "colors-00000"]
    assert finished.lineage.fresh("influence_scores", "sky").fingerprint == scores
    assert finished.run(UNTIL_SCORES) == {}


def test_a_removed_source_is_seen_by_dagster_and_left_out_of_its_range_runs(finished):
    colors = finished.tiny.settings["pool"]["sources"].pop()
    assert finished.not_fresh()["pool_index"] == "STALE"
    project = load_project(finished.tiny.path)
    register_shards(project, open_store(project), finished.instance)
    job = build_definitions(project).resolve_implicit_global_asset_job_def()
    tags = {RANGE_START_TAG: "plus-00000", RANGE_END_TAG: "colors-00000"}
    asset = [dg.AssetKey("instruction_pool")]
    assert job.execute_in_process(asset_selection=asset, tags=tags, instance=finished.instance).success
    with pytest.raises(MissingArtifactError, match="no shard 'colors-00000'"):
        finished.materialize("instruction_pool", "colors-00000")
    finished.tiny.settings["pool"]["sources"].append(colors)
    assert finished.run() == {}, "put back, all is as it was"


def test_an_interrupted_range_run_keeps_what_is_logged_and_a_later_run_goes_on(finished, monkeypatch):
    finished.tiny.settings["gradients"]["dimension"] = 128
    extract, seen = gradients.extract_train_gradients, []

    def breaks(work):
        seen.append(work.partition)
        if len(seen) == 3:
            raise RuntimeError("the machine went away")
        return extract(work)

    replaced(monkeypatch, "train_gradients", compute=breaks)
    until = Request(until="train_gradients")
    with pytest.raises(RuntimeError, match="went away"):
        finished.run(until)
    monkeypatch.undo()
    every = grid(EPOCHS, finished.lineage.shards())
    assert seen == every[:3]
    assert {name for name in finished.not_fresh() if name.startswith("train_gradients")} == {
        f"train_gradients/{key}" for key in every[2:]
    }
    assert finished.run(until) == {"train_gradients": every[2:]}


def test_a_stale_upstream_is_refused_by_name_with_both_versions(finished):
    before = finished.lineage.fresh("target_examples", "sums").inputs["files"]
    finished.edit_row("targets/sums.jsonl", 0)
    now = finished.lineage.plan("target_examples", "sums").inputs["files"]
    with pytest.raises(StaleArtifactError) as error:
        finished.materialize("target_gradients", "epoch-1|sums")
    assert "target_examples" in str(error.value)
    assert f"({before[:8]} → {now[:8]})" in str(error.value)
    assert "less-assets run --until target_examples" in str(error.value)


def test_gradients_of_other_settings_are_refused_and_not_mixed(finished):
    finished.tiny.settings["gradients"]["dimension"] = 128
    finished.materialize("train_gradients", "epoch-1|plus-00000")
    with pytest.raises(StaleArtifactError, match="dimension: made with 256, now 128"):
        finished.materialize("gradient_datastore", "epoch-1")


def test_deleted_data_is_noticed_and_made_again(finished):
    folder = finished.lineage.folder("train_gradients", "epoch-2|plus-00001")
    shutil.rmtree(os.fspath(folder.root))
    assert finished.run() == {"train_gradients": ["epoch-2|plus-00001"]}
    assert finished.run() == {}


def test_a_lost_dagster_home_costs_records_and_no_computing(finished):
    stamps = {path: path.stat().st_mtime_ns for path in (finished.tiny.folder / "artifacts").rglob("manifest.json")}
    with dg.DagsterInstance.ephemeral() as instance:
        run(finished.tiny.path, instance, UNTIL_SUBSETS)
        assert run(finished.tiny.path, instance, UNTIL_SUBSETS).materialized == {}
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert set((finished.tiny.folder / "artifacts").rglob("manifest.json")) == set(stamps)


def test_changed_warmup_settings_train_and_extract_anew(finished):
    finished.tiny.settings["warmup"]["learning_rate"] = 2e-3
    made = finished.run(Request(until="gradient_datastore"))
    assert made == {
        "warmup_checkpoints": EPOCHS,
        "train_gradients": grid(EPOCHS, finished.lineage.shards()),
        "gradient_datastore": EPOCHS,
    }
