"""What the plan says a run would make, against what the run then makes: one kind of change after another.

Every test starts from the same finished run: project folder, artifacts and Dagster's records are put back before it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from support.graph import EVERYTHING, run
from support.tiny import TinyProject, question, write_rows

from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.errors import LessAssetsError
from less_assets.orchestration.definitions import build_definitions
from less_assets.planning import rehearsal
from less_assets.planning.rehearsal import rehearse
from less_assets.project.project import load_project
from less_assets.reading.files import EXAMPLES, SAMPLE, SUBSET
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.store.tables import read_parquet

Artifacts = set[tuple[str, str | None]]


class Finished:
    """A finished project on a persistent Dagster instance: may be planned and run."""

    def __init__(self, tiny: TinyProject, home: Path) -> None:
        self.tiny = tiny
        self.instance = dg.DagsterInstance.local_temp(str(home))

    def run(self, request: Request = EVERYTHING) -> Artifacts:
        """Bring it up to date; what was materialized."""
        made = run(self.tiny.path, self.instance, request).materialized
        return {(asset, partition) for asset, partitions in made.items() for partition in partitions}

    def plan(self) -> tuple[Artifacts, Artifacts, Artifacts]:
        """What is going to be made at most; what of it only perhaps; what of it takes work that is not stored yet."""
        project = load_project(self.tiny.path)
        store = open_store(project)
        register_shards(project, store, self.instance)
        runner = GraphRunner(build_definitions(project), project, store, self.instance, print)
        models = ModelLoader(project, cache_folder(store))
        with rehearse(runner, open_lineage(project, store), models, Request()) as rehearsed:
            due = {(asset, partition) for asset in rehearsed.statuses for partition in rehearsed.due(asset)}
            perhaps = {(asset, partition) for asset, some in rehearsed.perhaps.items() for partition in some}
            computed = {(asset, partition) for asset, some in rehearsed.computed.items() for partition in some}
        return due, perhaps, computed

    def folders(self, asset: str) -> set[Path]:
        """The artifacts of an asset that are stored."""
        root = self.tiny.folder / "artifacts"
        manifests = (json.loads(path.read_bytes()) for path in root.rglob("manifest.json"))
        return {root / found["key"] / found["fingerprint"] for found in manifests if found["kind"] == asset}

    def row_outside_the_sample(self, name: str) -> int:
        """Place of a row of a data file that the warm-up sample does not have, from 0."""
        project = load_project(self.tiny.path)
        lineage = open_lineage(project, open_store(project))
        ids = set(read_parquet(lineage.folder("warmup_sample"), SAMPLE)["example_id"])
        folders = [lineage.folder("instruction_pool", shard) for shard in lineage.shards()]
        tables = [read_parquet(folder, EXAMPLES) for folder in folders]
        return next(
            row["source_row"] - 1
            for table in tables
            for row in table.iter_rows(named=True)
            if row["source_file"] == name and row["example_id"] not in ids
        )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tiny_model) -> tuple[Path, Path, dict]:
    """A finished run: its folder, a copy of it to go back to, and the project's settings."""
    root = tmp_path_factory.mktemp("rehearsal")
    tiny = TinyProject(root / "live/project", tiny_model)
    tiny.settings["gradients"] |= {"certificate_rows": 8}
    tiny.settings["recipes"].append({"name": "twin", "strategy": "less", "fraction": 0.2})
    (root / "live/home").mkdir()
    finished = Finished(tiny, root / "live/home")
    finished.run()
    # Came after the warm-up sample was drawn: may go without making it impossible.
    write_rows(tiny.folder / "data/late.jsonl", [question(place, "sea") for place in range(6)])
    tiny.settings["pool"]["sources"].append({"name": "late", "path": "data/late.jsonl"})
    finished.run()
    finished.instance.dispose()
    shutil.copytree(root / "live", root / "kept")
    return root / "live", root / "kept", tiny.settings


@pytest.fixture
def finished(pristine) -> Iterator[Finished]:
    """The finished run, as if nothing had happened since; at the same path, which is part of what rows are."""
    live, kept, settings = pristine
    shutil.rmtree(live)
    shutil.copytree(kept, live)
    tiny = TinyProject.__new__(TinyProject)
    tiny.folder, tiny.settings = live / "project", json.loads(json.dumps(settings))
    found = Finished(tiny, live / "home")
    yield found
    found.instance.dispose()


def add_task(finished: Finished) -> None:
    folder = finished.tiny.folder
    write_rows(folder / "targets/sea.jsonl", [question(400 + place, "sea") for place in range(3)])
    write_rows(folder / "held_out/sea.jsonl", [question(500 + place, "sea") for place in range(3)])
    evaluation = {"held_out": "held_out/sea.jsonl", "max_new_tokens": 4}
    finished.tiny.settings["tasks"].append(
        {"name": "sea", "examples": {"path": "targets/sea.jsonl"}, "evaluation": evaluation}
    )


def add_file(finished: Finished) -> None:
    write_rows(finished.tiny.folder / "data/colors-more.jsonl", [question(100 + place, "red") for place in range(8)])


def change_row(finished: Finished) -> None:
    path = finished.tiny.folder / "data/plus.jsonl"
    lines = path.read_text().splitlines()
    lines[finished.row_outside_the_sample("data/plus.jsonl")] = json.dumps({"messages": question(900, "sea")})
    path.write_text("".join(f"{line}\n" for line in lines))


def change_spaces(finished: Finished) -> None:
    """Other bytes, and the same rows."""
    path = finished.tiny.folder / "data/plus.jsonl"
    path.write_text(path.read_text().replace('{"messages": ', '{"messages":   ', 1))


def change_rank(finished: Finished) -> None:
    finished.tiny.settings["lora"]["rank"] = 2


def add_recipe(finished: Finished) -> None:
    finished.tiny.settings["recipes"].append({"name": "more", "strategy": "less", "fraction": 0.4})


def rename_recipe(finished: Finished) -> None:
    """The same rows under another name."""
    finished.tiny.settings["recipes"][2]["name"] = "everything"


def change_budget(finished: Finished) -> None:
    finished.tiny.settings["recipes"][0]["fraction"] = 0.4


def change_budget_by_nothing(finished: Finished) -> None:
    """Another setting, and the same number of rows."""
    finished.tiny.settings["recipes"][0]["fraction"] = 0.201


def change_epochs(finished: Finished) -> None:
    finished.tiny.settings["finetuning"]["epochs"] = 2


def change_report(finished: Finished) -> None:
    finished.tiny.settings["report"] = {"token_rows": 2}


def remove_source(finished: Finished) -> None:
    del finished.tiny.settings["pool"]["sources"][2]


def change_evaluation(finished: Finished) -> None:
    finished.tiny.settings["tasks"][0]["evaluation"]["limit"] = 2


def change_questions(finished: Finished) -> None:
    write_rows(finished.tiny.folder / "held_out/sky.jsonl", [question(600 + place, "red") for place in range(3)])


def change_certificate(finished: Finished) -> None:
    finished.tiny.settings["gradients"]["certificate_rows"] = 10


def exclude_row(finished: Finished) -> None:
    """The row that `less` ranks first for a task."""
    lineage = open_lineage(load_project(finished.tiny.path), open_store(load_project(finished.tiny.path)))
    chosen = read_parquet(lineage.folder("selected_subset", "less|sky"), SUBSET).sort("rank")["example_id"][0]
    finished.tiny.settings["exclude"] = ["left-out.jsonl"]
    (finished.tiny.folder / "left-out.jsonl").write_text(json.dumps({"example_id": chosen, "reason": "wrong"}) + "\n")


def change_targets(finished: Finished) -> None:
    write_rows(finished.tiny.folder / "targets/sky.jsonl", [question(700 + place, "red") for place in range(4)])


EXACTLY_KNOWN = [
    add_task,
    add_recipe,
    rename_recipe,
    change_budget,
    change_budget_by_nothing,
    change_epochs,
    change_report,
    change_evaluation,
    change_spaces,
    change_questions,
    change_certificate,
]
KNOWN_AT_MOST = [add_file, change_row, remove_source, change_targets, change_rank, exclude_row]
"""The rows that `less` selects are known once gradients and scores are made: whether its models change, too."""


@pytest.mark.parametrize("change", EXACTLY_KNOWN)
def test_the_planned_partitions_are_those_that_the_run_makes(finished, change: Callable):
    change(finished)
    due, perhaps, computed = finished.plan()
    trained = finished.folders("finetuned_model")
    evaluated = finished.folders("eval_results")
    assert not perhaps
    assert finished.run() == due
    assert len(finished.folders("finetuned_model") - trained) == count(computed, "finetuned_model")
    assert len(finished.folders("eval_results") - evaluated) == count(computed, "eval_results")


@pytest.mark.parametrize("change", KNOWN_AT_MOST)
def test_what_only_a_change_of_content_makes_due_is_planned_as_at_most(finished, change: Callable):
    change(finished)
    due, perhaps, _ = finished.plan()
    made = finished.run()
    assert due - perhaps <= made <= due
    changing = {"finetuned_model", "eval_results", "task_results", "leaderboard", "selection_report"}
    assert {asset for asset, _ in perhaps} <= changing
    assert {recipe_of(partition) for asset, partition in perhaps if asset == "eval_results"} <= {"less", "twin"}


def test_a_tournament_is_planned_to_the_last_pilot_and_its_winners_model_as_at_most(finished):
    settings = finished.tiny.settings
    for task, kind in zip(settings["tasks"], ("plus", "red"), strict=True):
        rows = [question(800 + place, kind) for place in range(4)]
        write_rows(finished.tiny.folder / f"validation/{task['name']}.jsonl", rows)
        task["validation"] = {"path": f"validation/{task['name']}.jsonl"}
    best = {"name": "best", "strategy": "tournament", "candidates": ["less"], "fraction": 0.4, "pilot": 0.5}
    settings["recipes"].append(best)
    due, perhaps, computed = finished.plan()
    assert not perhaps
    assert count(due, "pilot_model") == 8, "two candidates, two seeds, two tasks"
    assert finished.run() == due
    assert len(finished.folders("pilot_model")) == count(computed, "pilot_model") == 6, "random's serve both tasks"

    best["candidates"] = ["less", "twin"]
    due, perhaps, computed = finished.plan()
    made = finished.run()
    assert due - perhaps <= made <= due
    pilots = {partition for asset, partition in due if asset == "pilot_model"}
    assert {str(partition).rpartition("-seed")[0] for partition in pilots} == {"best.pilot-twin"}
    assert not count(computed, "pilot_model"), "its twin was trained on the same rows"
    assert ("finetuned_model", "best|sky") in perhaps


def count(artifacts: Artifacts, asset: str) -> int:
    return sum(name == asset for name, _ in artifacts)


def recipe_of(partition: str | None) -> str:
    return str(partition).partition("|")[0]


def test_an_added_file_costs_its_own_shard_and_no_training_of_the_warmup(finished):
    add_file(finished)
    due, _, computed = finished.plan()
    assert count(due, "instruction_pool") == 1
    assert count(due, "warmup_checkpoints") == 0
    assert count(due, "train_gradients") == 2
    assert count(computed, "warmup_sample") == 0
    assert count(due, "warmup_sample") == 1
    assert {recipe_of(partition) for asset, partition in due if asset == "finetuned_model"} >= {"full", "random-seed0"}
    assert "base" not in {recipe_of(partition) for asset, partition in due if asset == "finetuned_model"}


def test_a_new_task_trains_only_what_it_selects_itself(finished):
    add_task(finished)
    _, _, computed = finished.plan()
    trained = [partition for asset, partition in computed if asset == "finetuned_model"]
    assert trained == ["less|sea"], "its twin selects the same rows; all others have trained on theirs for other tasks"


def test_a_pool_that_is_too_large_to_look_into_makes_a_plan_of_at_most(finished, monkeypatch):
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    change_spaces(finished)
    due, perhaps, _ = finished.plan()
    made = finished.run()
    assert due - perhaps <= made <= due
    assert ("train_gradients", "epoch-1|plus-00000") in perhaps
    assert not any(asset == "eval_results" and recipe_of(partition) == "base" for asset, partition in due)


def test_a_plan_fails_as_the_run_would_where_rows_of_the_frozen_sample_are_gone(finished):
    del finished.tiny.settings["pool"]["sources"][1]
    with pytest.raises(LessAssetsError, match="warm-up examples are not in the pool any more"):
        finished.plan()
    with pytest.raises(LessAssetsError, match="warm-up examples are not in the pool any more"):
        finished.run()


def test_certificates_left_out_of_a_run_are_planned_alone_until_they_are_made(finished):
    add_task(finished)
    finished.run(Request(extras=False))
    due, perhaps, computed = finished.plan()
    assert {asset for asset, _ in due} == {"certificates", "token_attribution", "selection_report"}
    assert ("certificates", "sea") in due
    assert computed >= {("fidelity_certificate", "sea")}
    assert not perhaps
    assert finished.run() == due


def test_a_plan_leaves_the_store_as_it_is(finished):
    change_rank(finished)
    finished.plan()  # scans the pool

    def content() -> dict[str, bytes]:
        root = finished.tiny.folder / "artifacts"
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    before = content()
    finished.plan()
    assert content() == before


def test_the_version_of_an_artifact_tells_its_content_only_where_its_asset_says_so(finished):
    for path in (finished.tiny.folder / "artifacts").rglob("manifest.json"):
        manifest = json.loads(path.read_bytes())
        if manifest["kind"] in ASSETS:
            by_content = ASSETS[manifest["kind"]].versioned_by_content
            assert (manifest["data_version"] != manifest["fingerprint"]) == by_content, manifest["kind"]
