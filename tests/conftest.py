"""What end-to-end tests share: a tiny model with a tokenizer, and a project over the data of `tiny.py`."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings
from support.tiny import HOSTILE, WORDS, TinyProject

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure: hypothesis fails what takes more than 0.2 s by default. The same commit has the same
# inputs wherever it is tested; `--hypothesis-profile exploring` has others each time.
settings.register_profile("exploring", parent=settings(), deadline=None)
settings.register_profile("repeatable", parent=settings.get_profile("exploring"), derandomize=True)
settings.load_profile("repeatable")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of two layers and a word-level tokenizer with a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def make_tiny_model(folder: Path) -> Path:
    """Write that model into a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokens = [*special, *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789.,?:=+-()"]
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:5],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=5,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def explained_project(tmp_path_factory, tiny_model) -> Path:
    """Project file of a tiny project, one task, that was run up to its selection reports; not to be changed."""
    import dagster as dg

    from less_assets.orchestration.definitions import build_definitions
    from less_assets.project.project import load_project
    from less_assets.running.runner import GraphRunner, Request, register_shards
    from less_assets.steps.registry import open_store

    tiny = TinyProject(tmp_path_factory.mktemp("explained"), tiny_model)
    plus = tiny.folder / "data/plus.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"what is {name} ?"}, {"role": "assistant", "content": text}]}
        for name, text in HOSTILE.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    copy = plus.read_bytes().splitlines(keepends=True)[0]
    plus.write_bytes(plus.read_bytes() + lines + b'{"prompt": "\xff\xfe", "completion": "no text"}\n' + copy)
    tiny.settings["tasks"] = tiny.settings["tasks"][:1]
    tiny.settings["recipes"] = [
        {"name": "less", "strategy": "less", "rows": 48},
        {"name": "few", "strategy": "less", "rows": 5, "form": "adamw", "aggregate": "mean", "rescore": "exact"},
        {"name": "random", "strategy": "random", "rows": 10, "seeds": [0]},
    ]
    tiny.settings["pool"]["shard_size"] = 40
    tiny.settings["report"] = {"token_rows": 50, "context_rows": 4}
    tiny.settings["gradients"]["certificate_rows"] = 12
    project = load_project(tiny.path)
    store = open_store(project)
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, store, instance)
        runner = GraphRunner(build_definitions(project), project, store, instance, lambda line: None)
        runner.run(Request(until="selection_report"))
    return project.path


@pytest.fixture
def tiny_project(tmp_path, tiny_model) -> TinyProject:
    """A project that runs end to end in seconds."""
    return TinyProject(tmp_path, tiny_model)
