"""Plans and their status without Dagster: what each artifact is made from, and what a reader refuses."""

import json
import zipfile

import pytest
from support.bench import TURNS, Bench

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError, TargetFormatError
from less_assets.lineage.file_digests import files_digest
from less_assets.lineage.lineage import split
from less_assets.lineage.plan import digest
from less_assets.lineage.pool_files import PoolFiles
from less_assets.lineage.warmup_draw import draw_sample_again, sample_draw
from less_assets.steps.registry import ASSETS


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_what_is_stored_as_planned_is_fresh(bench):
    assert bench.states()["base_model"] == "missing"
    bench.put_everything()
    assert bench.states() == {}


def test_what_needs_something_missing_is_blocked_and_says_by_what(bench):
    status = bench.lineage.status("train_gradients", "epoch-1|plus-00000")
    assert status.state == "blocked"
    assert status.reasons == ("base_model has not been materialized",)


def test_a_reader_refuses_what_was_never_made_and_names_the_command(bench):
    with pytest.raises(MissingArtifactError, match="less-assets run --until base_model"):
        bench.lineage.fresh("base_model")


def test_a_reader_refuses_a_stale_artifact_and_names_both_sides(bench):
    bench.put_everything()
    before = bench.lineage.plan("target_examples", "sums").inputs["files"]
    (bench.folder / "sums.jsonl").write_text(json.dumps({"messages": [*TURNS, *TURNS]}) + "\n")
    now = bench.lineage.plan("target_examples", "sums").inputs["files"]
    with pytest.raises(StaleArtifactError) as error:
        bench.lineage.plan("target_gradients", "epoch-1|sums")
    assert "target_examples" in error.value.what
    assert before[:8] in error.value.what
    assert now[:8] in error.value.what
    assert bench.lineage.plan("target_gradients", "epoch-1|sky")


def test_a_changed_setting_is_named_with_both_values(bench):
    bench.put_everything()
    bench.settings["gradients"] = {"dimension": 512}
    status = bench.lineage.status("train_gradients", "epoch-1|plus-00000")
    assert status.state == "stale"
    (reason,) = status.reasons
    assert reason.startswith("dimension: made with ")
    assert reason.endswith("now 512")


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({"gradients": {"dimension": 512}}, {"train_gradients", "target_gradients"}),
        ({"warmup": {"epochs": 2, "learning_rate": 0.5}}, {"warmup_checkpoints"}),
        ({"warmup": {"epochs": 2, "seed": 9}}, {"warmup_sample"}),
        ({"finetuning": {"epochs": 9}}, {"finetuned_model"}),
        ({"gradients": {"token_budget": 64}}, set()),
        ({"name": "another"}, set()),
    ],
    ids=["dimension", "learning-rate", "warmup-seed", "finetuning", "token-budget", "name"],
)
def test_a_changed_setting_makes_stale_just_the_assets_that_read_it(bench, change, stale):
    bench.put_everything()
    bench.settings |= change
    assert {name.partition("/")[0] for name, state in bench.states().items() if state == "stale"} == stale


def test_finetuning_settings_leave_the_untrained_base_alone(bench):
    bench.put_everything()
    bench.settings["finetuning"] = {"epochs": 9}
    assert {name for name, state in bench.states().items() if state == "stale"} == {
        f"finetuned_model/{recipe}|{task}" for recipe in ("less", "random-seed0") for task in ("sums", "sky")
    }


def test_an_earlier_state_is_fresh_again_without_computing(bench):
    bench.put_everything()
    bench.settings["finetuning"] = {"epochs": 9}
    assert bench.states()
    del bench.settings["finetuning"]
    assert bench.states() == {}


def test_another_way_to_evaluate_a_task_keeps_the_fingerprint_of_its_gradients(bench):
    bench.put_everything()
    before = bench.lineage.plan("target_gradients", "epoch-1|sums")
    bench.settings["tasks"][0]["evaluation"]["max_new_tokens"] = 9
    bench.put("target_examples", "sums", examples_digest="e", evaluation_digest="another")
    after = bench.lineage.plan("target_gradients", "epoch-1|sums")
    assert after.inputs != before.inputs, "the new version of the task is recorded"
    assert after.fingerprint == before.fingerprint, "nothing is computed again"


def test_one_recipes_setting_touches_only_its_own_artifacts(bench):
    bench.put_everything()
    bench.settings["recipes"][0]["fraction"] = 0.25
    assert {name for name, state in bench.states().items() if state == "stale"} == {"recipe_settings/less"}
    bench.put("recipe_settings", "less")
    stale = {name for name, state in bench.states().items() if state == "stale"}
    assert stale == {"selected_subset/less|sums", "selected_subset/less|sky"}
    bench.put("selected_subset", "less|sky")
    stale = {name for name, state in bench.states().items() if state == "stale"}
    assert "selection_report/random-seed0|sky" in stale, "it compares with what less has selected"
    assert "selection_report/random-seed0|sums" not in stale


def test_equal_rows_share_one_model_folder_across_tasks(bench):
    bench.put_everything()
    plans = [bench.lineage.plan("finetuned_model", f"base|{task}") for task in ("sums", "sky")]
    assert plans[0].folder == plans[1].folder
    assert plans[0].pointer != plans[1].pointer


def test_random_does_not_read_scores(bench):
    bench.put_everything()
    assert not any(
        name.startswith("influence_scores") for name in bench.lineage.plan("selected_subset", "random-seed0|sky").inputs
    )
    assert "influence_scores/sky" in bench.lineage.plan("selected_subset", "less|sky").inputs


def test_the_frozen_sample_keeps_its_fingerprint_when_the_pool_grows(bench):
    bench.put_everything()
    before = bench.lineage.plan("warmup_sample")
    with open(bench.folder / "plus.jsonl", "a") as file:
        file.write(json.dumps({"messages": [*TURNS, *TURNS]}) + "\n")
    PoolFiles.scan(bench.project, bench.store)
    bench.put("instruction_pool", "plus-00000")
    bench.put("refused_rows", "plus-00000")
    bench.put("pool_index", shards=["plus-00000"])
    after = bench.lineage.plan("warmup_sample")
    assert after.inputs != before.inputs
    assert after.fingerprint == before.fingerprint


def test_drawing_again_changes_the_samples_fingerprint(bench):
    bench.put_everything()
    before = bench.lineage.plan("warmup_sample").fingerprint
    draw_sample_again(bench.store)
    assert sample_draw(bench.store) == 1
    assert bench.lineage.plan("warmup_sample").fingerprint != before


def test_a_damaged_record_of_draws_is_an_error_that_says_what_to_do(bench):
    draw_sample_again(bench.store)
    (bench.folder / "artifacts/warmup_sample/draw.json").write_text("many")
    with pytest.raises(CorruptArtifactError, match="resample-warmup"):
        sample_draw(bench.store)


def test_a_missing_target_file_is_an_error_of_the_task(bench):
    (bench.folder / "sky.jsonl").unlink()
    with pytest.raises(TargetFormatError) as error:
        bench.lineage.plan("target_examples", "sky")
    assert "sky.jsonl" in str(error.value)


def test_a_shard_that_is_gone_cannot_be_planned(bench):
    with pytest.raises(MissingArtifactError, match="colors-00000"):
        bench.lineage.plan("instruction_pool", "colors-00000")


def test_files_are_hashed_by_content_and_not_by_name(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    assert files_digest([str(tmp_path / "a")]) == files_digest([str(tmp_path / "b")])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a", "folder/a")
    assert files_digest([f"zip://folder::{tmp_path}/all.zip"]) == files_digest([str(tmp_path / "a")])
    (tmp_path / "b").write_text("other")
    assert files_digest([str(tmp_path / "a")]) != files_digest([str(tmp_path / "b")])


def test_a_grid_key_is_split_into_its_two_parts():
    assert split("epoch-1|plus-00000") == ("epoch-1", "plus-00000")


def test_a_subset_is_made_from_the_tokenizers_files_where_it_counts_tokens_and_nowhere_else(bench):
    bench.settings["recipes"] += [
        {"name": "by-tokens", "strategy": "random", "tokens": 5, "seeds": [0]},
        {"name": "by-length", "strategy": "length_matched", "fraction": 0.5, "seeds": [0]},
    ]
    bench.put_everything()
    plans = {key: bench.lineage.plan("selected_subset", f"{key}|sky") for key in bench.project.recipe_keys}
    version = bench.lineage.fresh("base_model").data_version
    assert {key: plan.inputs["base_model"] for key, plan in plans.items() if "base_model" in plan.inputs} == {
        "by-tokens-seed0": version,
        "by-length-seed0": version,
    }


def test_shared_settings_are_plain_json(bench):
    shared = [asset.shared_settings(bench.project) for asset in ASSETS.values() if asset.shared_settings]
    assert len(shared) > 5
    assert len(digest(shared)) == 32


def test_a_lineage_reads_each_manifest_once_and_a_new_one_sees_what_changed(bench):
    lineage = bench.lineage
    with pytest.raises(MissingArtifactError):
        lineage.fresh("base_model")
    bench.put("base_model")
    assert lineage.fresh("base_model").kind == "base_model"
    bench.settings["model"]["max_length"] = 77
    assert bench.lineage.status("base_model").state == "stale"
