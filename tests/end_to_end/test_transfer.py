"""LESS-T: rows selected with one model's gradients train another model, whose tokenizer is another one."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from support.graph import run

from less_assets.project.project import load_project
from less_assets.reading.files import BOARD, SAMPLES
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory) -> Path:
    """A folder with a random GPT-2 over bytes: another architecture, vocabulary and chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("byte-model")
    letters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_recipe_trains_another_model_on_the_same_rows(tiny_project, byte_folder):
    settings = tiny_project.settings
    settings["tasks"] = settings["tasks"][:1]
    settings["warmup"]["epochs"] = 1
    settings["model"]["max_length"] = 128
    settings["lora"]["target_modules"] = ["q_proj", "v_proj", "c_attn"]
    settings["finetuning"] = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 4}
    settings["recipes"] = [
        {"name": "base", "strategy": "none"},
        {"name": "base-t", "strategy": "none", "model": str(byte_folder)},
        {"name": "less", "strategy": "less", "fraction": 0.2},
        {"name": "less-t", "strategy": "less", "fraction": 0.2, "model": str(byte_folder)},
    ]
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project.path, instance)
        project = load_project(tiny_project.path)
        lineage = open_lineage(project, open_store(project))
        own, other = (lineage.fresh("selected_subset", f"{key}|sums") for key in ("less", "less-t"))
        assert own.data_version == other.data_version, "the rows are the same"
        trained = {key: lineage.summary("finetuned_model", f"{key}|sums") for key in ("less", "less-t")}
        assert trained["less"]["examples"] == trained["less-t"]["examples"]
        assert trained["less-t"]["tokens"] > 2 * trained["less"]["tokens"], "bytes are more than words"
        prompts = read_parquet(lineage.folder("eval_results", "less-t|sums"), SAMPLES)["prompt"]
        assert prompts.str.starts_with("[user]what is").all()
        board = read_parquet(lineage.folder("leaderboard"), BOARD).filter(metric="answer_loss")
        models = dict(board.select("recipe", "model").rows())
        assert models["less-t"] == models["base-t"] == str(byte_folder) != models["less"]
        values = {row["recipe"]: row for row in board.iter_rows(named=True)}
        for recipe, base in (("less", "base"), ("less-t", "base-t")):
            difference = values[recipe]["value"] - values[base]["value"]
            assert values[recipe]["vs_base"] == pytest.approx(difference), "each is compared with its own base model"
            assert difference < 0
        assert board.filter(pl.col("vs_base").is_not_null()).height == 2
        check = dg.AssetCheckKey(dg.AssetKey("eval_results"), "not_worse_than_base")
        history = instance.event_log_storage.get_asset_check_execution_history(check, limit=10)
        said = {each.partition: each.event.dagster_event.event_specific_data.description for each in history}
        assert said["less-t|sums"].endswith(f"base {values['base-t']['value']:.3f}"), (
            "the check knows the right base too"
        )
        assert said["less|sums"].endswith(f"base {values['base']['value']:.3f}")

        (byte_folder / "notes.txt").write_text("the folder has changed")
        lineage = open_lineage(load_project(tiny_project.path), open_store(project))
        assert lineage.status("finetuned_model", "less-t|sums").state == "stale"
        assert lineage.status("finetuned_model", "less|sums").state == "fresh"
