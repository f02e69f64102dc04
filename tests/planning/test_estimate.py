"""What `less-assets plan` says a run costs: amounts against what a run really did, speeds, and where they are kept."""

import json
import math
import re

import dagster as dg
import pytest
from support.tiny import TinyProject

from less_assets.compute import speeds as rates
from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.compute.speeds import Rate, Rates
from less_assets.compute.workload import ARTIFACT_SECONDS, RUN_SECONDS, Amount
from less_assets.inspection.plan_words import plan_as_data, print_plan
from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import build_definitions
from less_assets.planning.estimate import Estimate, estimate
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import GUESSES, open_lineage, open_store


class Planned:
    """A project on an instance: may be estimated and run."""

    def __init__(self, tiny: TinyProject, instance: dg.DagsterInstance) -> None:
        self.tiny, self.instance = tiny, instance

    def _open(self):
        project = load_project(self.tiny.path)
        store = open_store(project)
        register_shards(project, store, self.instance)
        return project, store, GraphRunner(build_definitions(project), project, store, self.instance, print)

    def estimate(self, calibrate: bool = False, **request) -> Estimate:
        project, store, runner = self._open()
        models = ModelLoader(project, cache_folder(store))
        lineage = open_lineage(project, store)
        return estimate(runner, lineage, models, Request(**request), calibrate=calibrate, log=print)

    def run(self, **request) -> None:
        _, _, runner = self._open()
        runner.run(Request(**request))

    def rates(self) -> Rates:
        project, store, _ = self._open()
        return Rates.load(store, project, GUESSES)


@pytest.fixture
def planned(tiny_project):
    with dg.DagsterInstance.ephemeral() as instance:
        yield Planned(tiny_project, instance)


def by_asset(found: Estimate) -> dict:
    return {each.asset: each for each in found.assets}


def test_amounts_before_the_first_run_are_those_that_the_run_has(planned):
    """Every row of the tiny pool has the same length and is usable, so the sample must give exact counts."""
    expected = by_asset(planned.estimate())
    planned.run()
    found = planned.rates()
    project = load_project(planned.tiny.path)
    lineage = open_lineage(project, open_store(project))
    checkpoints, tasks = project.checkpoints, project.task_names
    for asset, partitions in {
        "train_gradients": [f"{checkpoint}|{shard}" for checkpoint in checkpoints for shard in lineage.shards()],
        "warmup_checkpoints": checkpoints,
        "target_gradients": [f"{checkpoint}|{task}" for checkpoint in checkpoints for task in tasks],
        "finetuned_model": [f"{recipe}|{task}" for recipe in project.recipe_keys for task in tasks],
    }.items():
        assert expected[asset].amount.tokens == pytest.approx(_tokens_of(lineage, asset, partitions), rel=0.05), asset
        assert found.get(asset).source == "measured"
        files = {
            (manifest.fingerprint, name): file.bytes
            for manifest in (lineage.fresh(asset, partition) for partition in partitions)
            for name, file in manifest.files.items()
            if name.endswith(".safetensors") or "/c/" in name
        }
        if files:  # of so small a model, the headers of the tensor files are a quarter
            tolerance = 0.3 if asset in ("warmup_checkpoints", "finetuned_model") else 0.05
            assert expected[asset].amount.bytes == pytest.approx(sum(files.values()), rel=tolerance), asset


def _tokens_of(lineage: Lineage, asset: str, partitions: list[str]) -> int:
    """Tokens that an asset's distinct artifacts have recorded."""
    manifests = {lineage.fresh(asset, each).fingerprint: lineage.summary(asset, each) for each in partitions}
    return sum(summary.get("tokens", 0) for summary in manifests.values())


def test_checks_and_explanations_are_part_of_the_time(planned):
    """They pass rows through the model as well: left out, a plan was too low by a third."""
    planned.tiny.settings["gradients"] |= {"certificate_rows": 8, "real_step_rows": 3}
    expected = by_asset(planned.estimate())
    planned.run()
    found, last = planned.rates(), rates._MEMORY
    for name, asset in {
        "fidelity_certificate": "certificates",
        "real_steps": "certificates",
        "token_attribution": "token_attribution",
    }.items():
        assert found.get(name).source == "measured"
        measured = found.get(name).units / (1 + last) * 2  # of two equal tasks, the first one weighs a little less
        assert expected[asset].amount.units[name] == pytest.approx(measured, rel=0.1), name
    planned.tiny.settings["gradients"]["dimension"] = 128
    assert by_asset(planned.estimate())["certificates"].due == 2
    left_out = by_asset(planned.estimate(extras=False))
    assert left_out.keys().isdisjoint(("certificates", "token_attribution", "selection_report"))
    assert set(left_out["influence_scores"].amount.units) == {"influence_scores"}
    planned.tiny.settings["gradients"] |= {"certificate_rows": 0, "real_step_rows": 0}
    assert "certificates" not in by_asset(planned.estimate())


def test_where_a_speed_is_not_known_that_of_gradients_serves_as_often_as_a_token_takes_it():
    known = Rates({"train_gradients": Rate(2.0, 100)}, GUESSES)
    assert known.get("fidelity_certificate").per_unit == pytest.approx(0.02)
    assert known.get("token_attribution").per_unit == pytest.approx(0.05)
    assert known.get("real_steps").per_unit == pytest.approx(0.008)
    assert known.with_calibrated({"token_attribution": Rate(1.0, 100)}).get("token_attribution").per_unit == 0.01
    assert Rates({}, GUESSES).get("token_attribution") is None


def test_equal_trainings_are_counted_once(planned):
    amount = by_asset(planned.estimate())["finetuned_model"].amount
    assert amount.artifacts == 8
    assert amount.loads == 4, "less for each of two tasks, random once, full once, base never"


def test_after_a_run_nothing_is_due_and_after_a_change_only_that(planned):
    planned.run(until="selected_subset")
    assert all(each.amount is None for each in planned.estimate(until="selected_subset").assets)
    planned.tiny.settings["gradients"]["dimension"] = 128
    found = by_asset(planned.estimate(until="selected_subset"))
    assert found["warmup_checkpoints"].amount is None
    assert found["train_gradients"].due == 8
    planned.tiny.settings["gradients"]["dimension"] = 256
    planned.tiny.settings["recipes"][0]["fraction"] = 0.4
    found = by_asset(planned.estimate(until="selected_subset"))
    assert [asset for asset, each in found.items() if each.due] == ["recipe_settings", "selected_subset"]


def test_work_that_is_stored_already_costs_only_its_record(planned):
    planned.run(until="train_gradients")
    planned.tiny.settings["gradients"]["dimension"] = 128
    planned.run(until="train_gradients")
    planned.tiny.settings["gradients"]["dimension"] = 256
    found = by_asset(planned.estimate(until="train_gradients"))["train_gradients"]
    assert found.due == 8
    assert (found.amount.tokens, found.amount.bytes) == (0, 0)


def test_training_is_compared_with_selecting_for_each_recipe_that_needs_a_model_for_it(planned, monkeypatch, capsys):
    """Against the plan's own tokens: here nothing is shared, and every recipe selects as many rows of one length."""
    planned.tiny.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.2},
        {"name": "rds", "strategy": "rds", "fraction": 0.2},
        {"name": "tuned", "strategy": "target_tuned", "fraction": 0.2},
        {"name": "bm25", "strategy": "bm25", "fraction": 0.2},
        {"name": "base", "strategy": "none"},
    ]
    planned.tiny.settings["finetuning"]["epochs"] = 20
    found = planned.estimate()
    tokens = {line.asset: line.amount.tokens for line in found.assets if line.amount}
    training = 2 * tokens["finetuned_model"] / 4
    selection = {
        "less": 2 * (tokens["warmup_checkpoints"] + tokens["train_gradients"] + tokens["target_gradients"]),
        "rds": tokens["pool_embeddings"] + tokens["target_embeddings"],
        "tuned": tokens["pool_embeddings"] + tokens["target_tuned_losses"] + 2 * tokens["target_tuned_adapter"],
    }
    expected = {recipe: pytest.approx(training / cost) for recipe, cost in selection.items()}
    ratios = {ratio.recipe: ratio for ratio in found.ratios}
    assert {recipe: ratio.ratio for recipe, ratio in ratios.items()} == expected
    assert ratios["less"].cheaper == {"target_tuned": expected["tuned"], "rds": expected["rds"], "bm25": math.inf}
    assert set(ratios["rds"].cheaper) == {"bm25"}
    assert ratios["less"].ratio < 10
    print_plan(found)
    said = capsys.readouterr().out
    assert f"compute of fine-tuning ÷ compute of selecting: less {ratios['less'].ratio:.2g}, rds" in said
    assert re.search(r"less is below 10\. Cheaper: a selecting model .* \(LESS-T: 10\); `strategy: target_tuned`", said)
    assert "Warning: the warm-up has 12 optimizer steps" in said
    data = json.loads(json.dumps(plan_as_data(found)))
    assert data["compute"][0]["training_over_selection"] == ratios["less"].ratio
    assert data["compute"][0]["cheaper"]["bm25"] is None

    sizes = {planned.tiny.settings["model"]["base"]: 100, "owner/large": 700}
    monkeypatch.setattr(ModelLoader, "parameters", lambda self, base: sizes.get(base))
    planned.tiny.settings["recipes"][0]["model"] = "owner/large"
    planned.tiny.settings["recipes"][1]["model"] = "owner/never-seen"
    found = planned.estimate()
    assert {ratio.recipe: ratio.ratio for ratio in found.ratios} == {
        "less": pytest.approx(7 * training / selection["less"]),
        "rds": None,
        "tuned": expected["tuned"],
    }
    print_plan(found)
    assert "the size of the model that rds trains is not known" in capsys.readouterr().out
    assert planned.estimate(until="selected_subset").ratios == []


def test_a_calibration_measures_what_no_run_has_and_is_kept(planned):
    unknown = planned.estimate()
    assert set(unknown.unknown) >= {"train_gradients", "finetuned_model", "eval_results/sums", "eval_results/sky"}
    found = planned.estimate(calibrate=True)
    assert set(found.calibrated) >= {"train_gradients", "finetuned_model", "eval_results/sums", "influence_scores"}
    assert not set(found.unknown) & set(found.calibrated)
    timed = by_asset(found)
    for asset in ("base_model", "warmup_checkpoints", "train_gradients", "finetuned_model", "eval_results"):
        assert timed[asset].seconds > timed[asset].amount.artifacts * ARTIFACT_SECONDS, asset
    again = planned.estimate()  # without another calibration
    assert by_asset(again)["train_gradients"].seconds == timed["train_gradients"].seconds


def test_a_run_replaces_calibrated_speeds_by_measured_ones(planned):
    planned.estimate(calibrate=True, until="train_gradients")
    assert planned.rates().get("train_gradients").source == "calibrated"
    planned.run(until="train_gradients")
    found = planned.rates()
    assert found.get("train_gradients").source == found.get("warmup_checkpoints").source == "measured"
    assert found.get("model_load").source == "measured"


def test_artifacts_do_not_depend_on_speeds(planned):
    planned.run(until="train_gradients")
    root = planned.tiny.folder / "artifacts"
    manifests = {path: path.read_bytes() for path in root.rglob("manifest.json")}
    assert (root / "rates.json").exists()
    assert not any(b"seconds" in content for content in manifests.values())


def test_time_is_runs_artifacts_loads_and_units():
    speeds = Rates({"train_gradients": Rate(10, 1000), "model_load": Rate(6, 2)}, GUESSES)
    amount = Amount(runs=2, artifacts=5, units={"train_gradients": 300}, loads=2)
    assert amount.seconds(speeds) == pytest.approx(2 * RUN_SECONDS + 5 * ARTIFACT_SECONDS + 2 * 3 + 3)
    assert Amount(units={"eval_results/sky": 4}).seconds(speeds) is None


def test_new_measurements_weigh_more_than_old_ones(planned):
    project, store, _ = planned._open()
    for _ in range(30):
        rates.record(store, project, "train_gradients", 10, 100)
    for _ in range(30):
        rates.record(store, project, "train_gradients", 1, 100)
    assert Rates.load(store, project, GUESSES).get("train_gradients").per_unit == pytest.approx(0.01, rel=0.5)


def test_speeds_belong_to_a_machine_a_model_and_its_gradients(planned, monkeypatch):
    project, store, _ = planned._open()
    rates.record(store, project, "train_gradients", 10, 100)
    planned.tiny.settings["gradients"]["dimension"] = 128
    assert planned.rates().get("train_gradients").source == "similar"
    planned.tiny.settings["model"]["max_length"] = 16
    assert planned.rates().get("train_gradients") is None
    planned.tiny.settings["model"]["max_length"] = 32
    planned.tiny.settings["gradients"]["dimension"] = 256
    assert planned.rates().get("train_gradients").per_unit == 0.1
    monkeypatch.setattr(rates, "machine", lambda: "another machine")
    assert planned.rates().get("train_gradients") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"setups": {"x": {"y": {"seconds": 0, "units": 1}}}}'])
def test_damaged_speeds_are_measured_anew_and_stop_nothing(planned, content):
    project, store, _ = planned._open()
    (planned.tiny.folder / "artifacts/rates.json").write_bytes(content)
    assert planned.rates().get("train_gradients") is None
    rates.record(store, project, "train_gradients", 10, 100)
    assert planned.rates().get("train_gradients").per_unit == 0.1


def test_the_table_adds_up(planned, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from less_assets.cli import app

    (tmp_path / "home").mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    quick = CliRunner().invoke(app, ["plan", "--project", str(planned.tiny.path), "--no-calibrate"])
    assert quick.exit_code == 0, quick.output
    assert "speeds not known, left out of the time: base_model" in quick.output
    (line,) = [line for line in quick.output.splitlines() if line.startswith("train_gradients")]
    assert re.search(r"train_gradients +0 +8 +\d+(\.\d+)? k? +\? +[\d.]+ kB +8 never made", line)
    shown = CliRunner().invoke(app, ["plan", "--project", str(planned.tiny.path)]).output
    assert re.search(r"about [\w ]+; [\d.]+ k tokens through the model; [\d.]+ [kM]B", shown)
    assert "speeds of a short trial: base_model, eval_results/sky" in shown
    content = json.loads((planned.tiny.folder / "artifacts/rates.json").read_text())
    assert {rate["source"] for speeds in content["setups"].values() for rate in speeds.values()} == {"calibrated"}


def test_one_run_makes_a_model_and_its_answers_and_changed_answers_get_runs_of_their_own(planned):
    """Answers come as soon as a model is trained, not after the last training; what exists is not made again."""
    planned.run()
    runs = [run.asset_selection for run in reversed(planned.instance.get_runs())]
    assert runs.count({dg.AssetKey("finetuned_model"), dg.AssetKey("eval_results")}) == 8
    assert {dg.AssetKey("finetuned_model")} not in runs
    assert {dg.AssetKey("eval_results")} not in runs
    planned.tiny.settings["tasks"][0]["evaluation"]["max_new_tokens"] = 3
    planned.run()
    later = [run.asset_selection for run in planned.instance.get_runs()][: -len(runs)]
    assert later.count({dg.AssetKey("eval_results")}) == 4
    assert not any(dg.AssetKey("finetuned_model") in run for run in later)
