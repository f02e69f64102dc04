"""The two checks of influence scores, run as a user's run does, and what becomes of a certificate."""

import shutil
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl
import pytest
from support.graph import replaced
from support.tiny import question, write_rows

from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.method.gradients import exact
from less_assets.method.selection import fidelity as method_fidelity
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.reading.certificates import (
    POOL,
    SAMPLE,
    STEPS,
    certificate_plan,
    judge_selection,
    read_certificate,
    steps_plan,
)
from less_assets.reading.files import SUBSET
from less_assets.running.runner import (
    CHECKS_TAG,
    RANGE_END_TAG,
    RANGE_START_TAG,
    GraphRunner,
    Request,
    register_shards,
)
from less_assets.steps import certificates as fidelity
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.store.tables import read_parquet

CHECKED = {"certificate_rows": 64, "real_step_rows": 16}
ONLY_SUMS = Request(tasks=("sums",), until="selected_subset")


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def run(tiny_project, instance, request=ONLY_SUMS) -> Lineage:
    project = load_project(tiny_project.path)
    store = open_store(project)
    register_shards(project, store, instance)
    GraphRunner(build_definitions(project), project, store, instance, print).run(request)
    return open_lineage(project, store)


def evaluations(instance) -> dict[str, dg.AssetCheckEvaluation]:
    """Last evaluation of each check of `influence_scores`."""
    records = instance.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION))
    found = [record.event_log_entry.dagster_event.event_specific_data for record in reversed(list(records))]
    return {each.check_name: each for each in found if each.asset_key == dg.AssetKey("influence_scores")}


def shown_of(instance, asset: str, key: str) -> dict[str, dg.MetadataValue]:
    """Metadata of a partition's last materialization."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key]), limit=1
    ).records
    return records[0].asset_materialization.metadata


def test_a_run_certifies_its_scores_and_labels_what_it_selects(tiny_project, instance):
    # More dimensions than parameters: the sketch only permutes and signs, so sketched scores are exact.
    tiny_project.settings["gradients"] |= {"dimension": 4096, "storage": "float16", **CHECKED}
    lineage = run(tiny_project, instance, Request(tasks=("sums",), until="selection_report"))
    faithful, reality = (evaluations(instance)[name] for name in ("sketch_is_faithful", "influence_is_real"))
    assert faithful.passed
    assert faithful.partition == "sums"
    assert faithful.severity == dg.AssetCheckSeverity.WARN
    certificate = read_certificate(lineage, "sums")
    summary = certificate.manifest().summary
    assert summary["rows"] == summary["pool_rows"] == 44  # the whole pool is less than 64 rows
    assert max(summary["cosine_error"].values()) < 1e-3
    sample = read_parquet(certificate, SAMPLE)
    for form in ("adamw", "marginal"):
        sketched, exact = (sample[f"{kind}.{form}.mean_cosine"].to_numpy() for kind in ("sketched", "exact"))
        np.testing.assert_allclose(sketched, exact, atol=2e-3)
    shown = shown_of(instance, "selection_report", "less|sums")
    assert shown["certain_rows"].value + shown["borderline_rows"].value == 8
    assert shown["certain_rows"].value >= 5
    assert "certain_rows" not in shown_of(instance, "selection_report", "random-seed0|sums")

    steps = lineage.store.current(steps_plan(lineage, "sums").pointer)
    assert steps.summary["rows"] == 16
    assert reality.metadata["agreement"].value.records[0].data["predictor"] == "predicted"
    table = read_parquet(lineage.store.artifact(steps.key, steps.fingerprint), STEPS)
    assert pl.Series(table["real"]).n_unique() > 1
    assert reality.passed, reality.description


def test_subsets_made_by_one_run_are_described_and_checked_each(tiny_project, instance, monkeypatch):
    def broken(*_):
        raise LessAssetsError("Lost, say.")

    first, *others = ASSETS["selected_subset"].checks
    replaced(monkeypatch, "selected_subset", checks=(replace(first, judge=broken), *others))
    tiny_project.settings["gradients"] |= {"certificate_rows": 0, "real_step_rows": 0}
    lineage = run(tiny_project, instance, Request(until="selected_subset"))
    keys = [f"{recipe}|{task}" for recipe in lineage.project.recipe_keys for task in lineage.project.task_names]
    (made,) = [each for each in instance.get_runs() if each.asset_selection == {dg.AssetKey("selected_subset")}]
    judged = instance.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION))
    found = [each.event_log_entry.dagster_event.event_specific_data for each in judged]
    checks = ("no_subtask_dominates", "not_only_very_short_rows")
    assert {(each.check_name, each.partition) for each in found} >= {(name, key) for name in checks for key in keys}
    assert all("Lost, say." in each.description for each in found if each.check_name == "no_subtask_dominates")
    for key in keys:
        subset = read_parquet(lineage.folder("selected_subset", key), SUBSET)
        shown = shown_of(instance, "selected_subset", key)
        assert shown["rows"].value == subset.height, key
        assert shown["path"].value.endswith(str(lineage.folder("selected_subset", key).root)), key
    assert made.is_success


def test_a_coarse_sketch_is_told_and_errors_of_a_check_stop_nothing(tiny_project, instance, monkeypatch):
    tiny_project.settings["warmup"]["epochs"] = 1
    tiny_project.settings["gradients"] |= {"dimension": 8, "storage": "int1", "certificate_rows": 64}
    lineage = run(tiny_project, instance)
    check = evaluations(instance)["sketch_is_faithful"]
    assert not check.passed
    assert "rescore: exact" in check.description
    assert check.metadata["one_over_root_k"].value == pytest.approx(8**-0.5, abs=1e-5)
    assert "No real steps are asked for" in evaluations(instance)["influence_is_real"].description
    subset = read_parquet(lineage.folder("selected_subset", "less|sums"), SUBSET)
    assert judge_selection(lineage, "less|sums", subset).certain < 8

    def broken(*_, **__):
        raise LessAssetsError("Out of memory, say.")

    monkeypatch.setattr("less_assets.method.gradients.exact.exact_influence", broken)
    monkeypatch.setattr("less_assets.method.selection.fidelity.step_effects", broken)
    tiny_project.settings["warmup"]["learning_rate"] = 2e-3  # exact scores at other checkpoints are not known
    tiny_project.settings["gradients"] |= {"dimension": 16, "real_step_rows": 4}
    lineage = run(tiny_project, instance)
    assert lineage.status("selected_subset", "less|sums").state == "fresh"
    for check in evaluations(instance).values():
        assert not check.passed
        assert "Out of memory, say." in check.description
    assert read_certificate(lineage, "sums") is None, "a certificate of other scores must not count"


def test_scores_whose_run_was_killed_before_their_checks_are_checked_by_the_next(tiny_project, instance):
    tiny_project.settings["gradients"] |= {"certificate_rows": 8, "real_step_rows": 3}
    lineage = run(tiny_project, instance, Request(until="influence_scores"))

    def checks() -> int:
        return len(instance.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION)))

    before = checks()
    run(tiny_project, instance, Request(until="influence_scores"))
    assert checks() == before, "all of them were there"
    steps = steps_plan(lineage, "sums")
    for pointer in (certificate_plan(lineage, "sums").pointer, steps.pointer):
        (tiny_project.path.parent / "artifacts" / pointer / "current.json").unlink()
    assert read_certificate(lineage, "sums") is None
    run(tiny_project, instance, Request(until="influence_scores"))
    assert read_certificate(lineage, "sums") is not None
    assert lineage.store.current(steps.pointer) is not None
    assert checks() > before


def test_tasks_that_share_a_pass_over_the_pool_are_certified_each(tiny_project, instance, capfd):
    tiny_project.settings["gradients"] |= {"certificate_rows": 8, "real_step_rows": 0}
    lineage = run(tiny_project, instance, Request(until="influence_scores"))
    assert len(lineage.project.task_names) > 1
    for task in lineage.project.task_names:
        assert read_certificate(lineage, task) is not None, task
    assert "Skipping" not in capfd.readouterr().err, "the run makes the checks itself"
    assert {dg.AssetKey("influence_scores")} in [made.asset_selection for made in instance.get_runs()]
    runs = instance.get_runs()
    assert all(made.asset_selection or made.tags[CHECKS_TAG] for made in runs), "the UI's list of runs says what for"
    assert [made.tags["dagster/partition"] for made in reversed(runs) if CHECKS_TAG in made.tags] == ["sums", "sky"]
    damaged = read_certificate(lineage, "sky").path(SAMPLE)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert read_certificate(lineage, "sky") is None, "a damaged certificate is none, and stops no selection"
    damaged.write_bytes(whole)
    assert read_certificate(lineage, "sky") is not None
    records = instance.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION))
    found = [record.event_log_entry.dagster_event.event_specific_data for record in records]
    certified = {
        each.partition for each in found if each.check_name == "sketch_is_faithful" and each.passed is not None
    }
    assert certified == set(lineage.project.task_names)


def test_a_backfill_of_several_tasks_makes_the_checks_of_each(tiny_project, instance):
    tiny_project.settings["gradients"] |= {"certificate_rows": 0, "real_step_rows": 0}
    run(tiny_project, instance, Request(until="influence_scores"))
    tiny_project.settings["gradients"]["certificate_rows"] = 8
    project = load_project(tiny_project.path)
    lineage = open_lineage(project, open_store(project))
    tasks = lineage.project.task_names
    assert [read_certificate(lineage, task) for task in tasks] == [None, None]
    done = (
        build_definitions(project)
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            asset_selection=[dg.AssetKey("influence_scores")],
            tags={RANGE_START_TAG: tasks[0], RANGE_END_TAG: tasks[-1]},
            instance=instance,
        )
    )
    assert all(read_certificate(lineage, task) is not None for task in tasks)
    judged = {(each.check_name, each.partition): each for each in done.get_asset_check_evaluations()}
    assert set(judged) == {(name, task) for name in ("sketch_is_faithful", "influence_is_real") for task in tasks}
    for (_, task), evaluation in judged.items():
        asked = dg.AssetRecordsFilter(dg.AssetKey("influence_scores"), asset_partitions=[task])
        (last,) = instance.fetch_materializations(asked, limit=1).records
        assert evaluation.target_materialization_data.storage_id == last.storage_id
    key = dg.AssetCheckKey(dg.AssetKey("influence_scores"), "sketch_is_faithful")
    recorded = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert recorded.run_id == done.run_id
    assert recorded.status.value == ("SUCCEEDED" if judged[key.name, recorded.partition].passed else "FAILED")


@pytest.mark.parametrize("shard_rows", [7, 100])
def test_samples_do_not_depend_on_how_the_pool_is_cut(shard_rows, monkeypatch):
    pool = pl.DataFrame({"example_id": [f"{place:032x}" for place in range(44)], "row": range(44)})
    pool = pool.with_columns(shard=pl.lit("shard"))

    def shards(_line, _task, _columns=None):
        return pool.iter_slices(shard_rows)

    class Scores:
        def summary(self, *_):
            return {"scored": pool.height}

    monkeypatch.setattr(fidelity, "_scored_rows", shards)
    drawn = fidelity.draw_sample(Scores(), "task", 10)
    by_hash = sorted(pool["example_id"], key=fidelity._hash)[:10]
    assert drawn["example_id"].to_list() == sorted(by_hash)
    whole, rows = fidelity.even_sample(Scores(), "task", ["row"])
    assert (whole["row"].to_list(), rows) == (list(range(44)), 44)
    monkeypatch.setattr(fidelity, "POOL_SAMPLE", 15)
    thinned, rows = fidelity.even_sample(Scores(), "task", ["row"])
    assert (thinned["row"].to_list(), rows) == (list(range(0, 44, 3)), 44)


def test_a_group_of_tasks_with_turns_is_certified_by_subtask(tiny_project, instance):
    tiny_project.settings["tasks"].append({"name": "both", "members": ["sums", "sky"]})
    tiny_project.settings["recipes"] = [
        {"name": "turns", "strategy": "less", "rows": 8, "aggregate": "round_robin", "subtask": "cosine_of_mean"},
        {"name": "again", "strategy": "less", "rows": 8, "aggregate": "mean", "rescore": "exact", "candidates": 3},
        {"name": "tokens", "strategy": "less", "tokens": 40, "aggregate": "max"},
    ]
    tiny_project.settings["warmup"]["epochs"] = 1
    tiny_project.settings["gradients"] |= {"dimension": 4096, "storage": "float16", "certificate_rows": 64}
    lineage = run(tiny_project, instance, Request(tasks=("both",), until="selected_subset"))
    records = evaluations(instance)["sketch_is_faithful"].metadata["recipes"].value.records
    assert [record.data["recipe"] for record in records] == ["turns", "again", "tokens"]
    assert set(read_parquet(read_certificate(lineage, "both"), POOL).columns) >= {
        "marginal.cosine_of_mean",
        "adamw.mean_cosine",
    }
    for recipe in ("turns", "again", "tokens"):
        subset = read_parquet(lineage.folder("selected_subset", f"{recipe}|both"), SUBSET)
        judged = judge_selection(lineage, f"{recipe}|both", subset)
        assert judged.table["example_id"].to_list() == subset["example_id"].to_list()
        assert judged.overlap > 0.8


class CountedSteps:
    """Counts the rows that certificates and real steps run through the model, targets left aside."""

    def __init__(self, monkeypatch) -> None:
        self.scored, self.stepped = 0, 0
        exactly, really = exact.exact_influence, method_fidelity.step_effects

        def exact_influence(model, examples, *given, **named):
            self.scored += len(examples)
            return exactly(model, examples, *given, **named)

        def step_effects(model, examples, *given, **named):
            self.stepped += len(examples)
            return really(model, examples, *given, **named)

        monkeypatch.setattr(exact, "exact_influence", exact_influence)
        monkeypatch.setattr(method_fidelity, "step_effects", step_effects)

    def taken(self) -> tuple[int, int]:
        """Rows scored exactly and rows stepped on since the last call."""
        counts, self.scored, self.stepped = (self.scored, self.stepped), 0, 0
        return counts


def certified(lineage, task) -> tuple[pl.DataFrame, pl.DataFrame, dict]:
    """A task's sample and steps, by example, and the errors of its sketch."""
    steps = lineage.store.current(steps_plan(lineage, task).pointer)
    certificate = read_certificate(lineage, task)
    tables = (
        read_parquet(certificate, SAMPLE),
        read_parquet(lineage.store.artifact(steps.key, steps.fingerprint), STEPS),
    )
    return *(table.sort("example_id") for table in tables), certificate.manifest().summary["cosine_error"]


def assert_close(table, other):
    assert table.columns == other.columns
    for name in table.columns:
        if table[name].dtype == pl.String:
            assert table[name].to_list() == other[name].to_list()
        else:
            np.testing.assert_allclose(
                table[name].to_numpy(), other[name].to_numpy(), rtol=1e-3, atol=2e-6, err_msg=name
            )


def test_after_rows_were_added_only_new_rows_are_measured_and_figures_are_those_from_scratch(
    tiny_project, instance, monkeypatch
):
    tiny_project.settings["warmup"] |= {"epochs": 2}
    tiny_project.settings["gradients"] |= {"certificate_rows": 30, "real_step_rows": 6}
    scores = Request(until="influence_scores")
    counted = CountedSteps(monkeypatch)
    lineage = run(tiny_project, instance, scores)
    before = {task: certified(lineage, task) for task in ("sums", "sky")}
    scored, stepped = counted.taken()
    every = [set(before[task][0]["example_id"]) for task in before]
    assert scored == 2 * len(every[0] | every[1]), "at each checkpoint, once for both tasks"
    assert stepped == 6, "the same rows for both tasks"

    rows = [question(place, "plus") for place in range(24)] + [question(400 + place, "plus") for place in range(6)]
    write_rows(tiny_project.folder / "data/plus.jsonl", rows)
    lineage = run(tiny_project, instance, scores)
    after = {task: certified(lineage, task) for task in before}
    new = [set(after[task][0]["example_id"]) - set(before[task][0]["example_id"]) for task in before]
    scored, stepped = counted.taken()
    assert 0 < scored == 2 * len(new[0] | new[1]) < 2 * 15
    assert stepped == len(set(after["sums"][1]["example_id"]) - set(before["sums"][1]["example_id"])) < 6

    for task in before:
        for plan in (certificate_plan(lineage, task), steps_plan(lineage, task)):
            shutil.rmtree(tiny_project.folder / "artifacts" / plan.pointer)
    lineage = run(tiny_project, instance, scores)
    assert counted.taken()[1] == 6
    for task in before:
        sample, steps, errors = certified(lineage, task)
        assert_close(sample, after[task][0])
        assert_close(steps, after[task][1])
        assert errors == pytest.approx(after[task][2], rel=1e-3)

    tiny_project.settings["tasks"][0]["examples"]["path"] = "targets/sky.jsonl"
    run(tiny_project, instance, scores)
    scored, stepped = counted.taken()
    assert (scored, stepped) == (2 * 30, 6), "of other targets nothing is known; the other task's figures stay"
