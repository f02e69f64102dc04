"""`strategy: target_tuned`, from the project file to the subset, against losses that two models have by hand."""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
import torch
from peft import PeftModel
from support.graph import StoredSubsets, replaced
from support.tiny import TinyProject, question, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from less_assets.errors import LessAssetsError
from less_assets.inspection.explain import explain_row, in_words
from less_assets.method.training import training
from less_assets.reading.files import CURVE, EMBEDDINGS, LOSSES, score_file
from less_assets.report.contents import report_contents
from less_assets.running.request import Request
from less_assets.steps.registry import ASSETS
from less_assets.store.tables import read_parquet

TUNED = Request(tasks=("sums",), recipes=("tuned", "tuned-few", "as-tuned-seed0"), until="selected_subset")
ASSETS_OF_TUNING = ("target_tuned_adapter", "target_tuned_losses", "target_tuned_scores")
RECIPES = [
    {"name": "tuned", "strategy": "target_tuned", "fraction": 0.2},
    {"name": "tuned-few", "strategy": "target_tuned", "rows": 3},
    {"name": "as-tuned", "strategy": "length_matched", "match": "tuned", "rows": 4},
    {"name": "rds", "strategy": "rds", "rows": 3},
]
TUNING = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 3, "seed": 5}


def tiny(folder: Path, model: Path) -> TinyProject:
    project = TinyProject(folder, model)
    rows = [question(place, "blue") for place in range(15)]
    # Longer than the model reads: no loss token is left of it.
    rows.append([{"role": "user", "content": "the sea " * 40}, {"role": "assistant", "content": "blue"}])
    write_rows(project.folder / "data/colors.jsonl", rows)
    project.settings["tasks"].append({"name": "both", "members": ["sums", "sky"]})
    project.settings["recipes"] = RECIPES
    project.settings["target_tuning"] = TUNING
    return project


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    with dg.DagsterInstance.ephemeral() as instance:
        found = StoredSubsets(tiny(tmp_path_factory.mktemp("tuned"), tiny_model), instance, TUNED)
        found.first = found.run()
        yield found


def scores(made: StoredSubsets, task: str = "sums") -> pl.DataFrame:
    folder = made.lineage.folder("target_tuned_scores", task)
    return pl.concat([read_parquet(folder, score_file(shard)) for shard in made.lineage.shards()])


def losses_by_hand(model, tokenizer, conversations: list[list[dict]]) -> list[float]:
    """Mean cross-entropy over the tokens of the answer and its end, row by row, without padding."""
    found = []
    for prompt, answer in conversations:
        before = tokenizer(f"<|user|> {prompt['content']} <|end|> <|assistant|>")["input_ids"]
        wanted = tokenizer(f"{answer['content']} <|end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted))))
    return found


def test_only_what_the_strategy_needs_is_made(made):
    shards = made.lineage.shards()
    assert made.first["target_tuned_adapter"] == ["sums"]
    assert made.first["target_tuned_losses"] == [f"{shard}|sums" for shard in shards]
    assert made.first["pool_embeddings"] == shards
    assert made.first["target_tuned_scores"] == ["sums"]
    assert not {"warmup_checkpoints", "train_gradients", "influence_scores", "target_embeddings"} & set(made.first)
    assert made.run() == {}


def test_losses_before_and_after_are_those_of_two_models_and_the_largest_relative_falls_are_selected(made, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    stored = scores(made)
    usable = stored.filter(status="ok")
    rows = [question(place, "plus") for place in range(24)] + [question(place, "blue") for place in range(15)]
    assert usable.height == len(rows) == stored.height - 1
    before = losses_by_hand(base, tokenizer, rows)
    with made.lineage.folder("target_tuned_adapter", "sums").local(write=False) as folder:
        after = losses_by_hand(PeftModel.from_pretrained(base, folder).eval(), tokenizer, rows)
    assert usable["base_loss"].to_list() == pytest.approx(before, abs=1e-5)
    assert usable["tuned_loss"].to_list() == pytest.approx(after, abs=1e-5)
    falls = 1 - np.array(after) / np.array(before)
    assert usable["score"].to_numpy()[:, 0] == pytest.approx(falls, abs=1e-5)
    best = usable["example_id"].gather(np.argsort(-falls)[:7].tolist()).to_list()
    assert made.subset("tuned|sums")["example_id"].to_list() == best
    assert made.subset("tuned-few|sums")["example_id"].to_list() == best[:3]
    assert made.subset("tuned|sums")["score"].to_list() == pytest.approx(sorted(falls)[::-1][:7], abs=1e-5)
    assert stored.filter(pl.col("status") != "ok")["score"].to_list() == [None]


def test_training_lowers_the_loss_of_the_targets_and_sees_nothing_else(made):
    summary = made.lineage.summary("target_tuned_adapter", "sums")
    curve = read_parquet(made.lineage.folder("target_tuned_adapter", "sums"), CURVE)
    assert curve["rows"].to_list() == [3, 1, 3, 1], "four target examples, two epochs, batches of three"
    assert curve["learning_rate"].to_list() == [1e-2] * 4
    assert summary["mean_loss_of_last_epoch"] < summary["mean_loss_of_first_epoch"]
    inputs = made.lineage.plan("target_tuned_adapter", "sums").inputs
    assert set(inputs) == {"base_model", "target_examples/sums"}


def test_rows_as_long_as_those_of_the_recipe_are_drawn(made):
    assert made.subset("as-tuned-seed0|sums").height == 4


def test_a_rows_explanation_states_both_losses(made):
    made.run(Request(tasks=("sums",), until="influence_scores"))
    row = made.subset("tuned-few|sums")["example_id"][0]
    found = explain_row(made.lineage, "sums", row)
    losses = scores(made).filter(example_id=row)
    standings = {standing["recipe"]: standing for standing in found["recipes"]}
    for recipe in ("tuned", "tuned-few"):
        stated = [standings[recipe][name] for name in ("base_loss", "tuned_loss")]
        assert stated == [losses["base_loss"][0], losses["tuned_loss"][0]]
    assert "base_loss" not in standings["as-tuned-seed0"]
    before, after = stated
    said = f"loss {before:.4g} before and {after:.4g} after training on the targets ({after / before - 1:+.1%})"
    assert said in in_words(found)


def silent(total: int, unit: str):
    return lambda done: None


def test_the_report_states_both_losses_of_each_row(made):
    contents = report_contents(made.lineage, "tuned", "sums", silent)
    table = scores(made).unique("example_id", keep="first")
    known = {row["example_id"]: (row["base_loss"], row["tuned_loss"]) for row in table.iter_rows(named=True)}
    subset = made.subset("tuned|sums")["example_id"].to_list()
    assert len(contents.details) == len(subset) > 0
    for name, detail in zip(subset, contents.details, strict=True):
        assert detail["losses"] == pytest.approx(known[name], rel=1e-3)
    others = report_contents(made.lineage, "as-tuned-seed0", "sums", silent).details
    assert others
    assert not any("losses" in detail for detail in others)


def test_a_group_is_tuned_on_the_targets_of_all_members(made):
    again = made.run(Request(tasks=("both",), recipes=("tuned",), until="selected_subset"))
    assert again["target_tuned_adapter"] == ["both"]
    assert "pool_embeddings" not in again, "the base model's losses are there"
    assert made.lineage.summary("target_tuned_adapter", "both")["examples"] == 8
    assert set(made.subset("tuned|both")["task"]) == {"both"}


def test_a_new_shard_and_another_evaluation_train_nothing_again(made):
    write_rows(made.tiny.folder / "data/colors_more.jsonl", [question(500 + place, "blue") for place in range(6)])
    made.tiny.settings["tasks"][0]["evaluation"]["max_new_tokens"] = 5
    again = made.run()
    assert again["target_tuned_losses"] == ["colors-00001|sums"]
    assert again["pool_embeddings"] == ["colors-00001"]
    assert again["target_tuned_adapter"] == ["sums"], "recorded for the new version of the task"
    stored = made.lineage.folder("target_tuned_adapter", "sums").root.parent
    assert len([folder for folder in stored.iterdir() if folder.is_dir()]) == 1, "and not trained again"


def test_another_learning_rate_takes_the_losses_again_and_the_base_models_stay(made):
    made.tiny.settings["target_tuning"] = TUNING | {"learning_rate": 1e-3}
    again = made.run()
    assert set(again) == {*ASSETS_OF_TUNING, "selected_subset"}
    made.tiny.settings["target_tuning"] = TUNING


def files_of(made: StoredSubsets) -> dict[str, bytes]:
    """Content of every file of the adapter and the losses."""
    content = {}
    for asset in ("target_tuned_adapter", "target_tuned_losses"):
        for partition in ASSETS[asset].partitions(made.lineage.project, made.lineage.keys_of):
            if made.lineage.status(asset, partition).state == "fresh":
                folder = made.lineage.folder(asset, partition)
                for name in folder.manifest().files:
                    content[f"{asset} {partition} {name}"] = folder.read_bytes(name)
    return content


def test_an_interrupted_training_and_losses_go_on_with_the_same_bytes(tmp_path, tiny_model, monkeypatch):
    request = Request(tasks=("sums",), recipes=("tuned",), until="target_tuned_scores")
    with dg.DagsterInstance.ephemeral() as instance:
        again = StoredSubsets(tiny(tmp_path / "interrupted", tiny_model), instance, request)
        trained: list[int] = []
        train_epoch = training._train_epoch

        def breaks_in_the_second_epoch(*arguments):
            epoch = arguments[5]
            if epoch == 2 and len(trained) == 1:
                trained.append(0)
                raise LessAssetsError("the machine went away")
            trained.append(epoch)
            return train_epoch(*arguments)

        monkeypatch.setattr(training, "_train_epoch", breaks_in_the_second_epoch)
        with pytest.raises(LessAssetsError, match="went away"):
            again.run()
        compute, measured = ASSETS["target_tuned_losses"].compute, []

        def breaks_at_the_second_shard(work):
            measured.append(work.partition)
            if len(measured) == 2:
                raise LessAssetsError("the disk went away")
            return compute(work)

        with monkeypatch.context() as patched:
            replaced(patched, "target_tuned_losses", compute=breaks_at_the_second_shard)
            with pytest.raises(LessAssetsError, match="disk"):
                again.run()
        assert trained == [1, 0, 2], "the first epoch was kept"
        shards = again.lineage.shards()
        assert again.run()["target_tuned_losses"] == [f"{shards[1]}|sums"], "the others were kept"
        resumed = files_of(again)
    with dg.DagsterInstance.ephemeral() as instance:
        other = StoredSubsets(tiny(tmp_path / "undisturbed", tiny_model), instance, request)
        other.run()
        assert files_of(other) == resumed
    assert any(LOSSES in name for name in resumed)
    assert not any("moments" in name or EMBEDDINGS in name for name in resumed)
