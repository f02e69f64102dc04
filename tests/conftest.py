"""What end-to-end tests share: a tiny model with a tokenizer, tiny data, and a project file over them."""

import json
import os
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = ["add", "sub", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "red", "blue"]
WORDS += ["sky", "sea", "is", "the", "what", "of", "and", "plus"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of two layers and a word-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
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


def question(place: int, kind: str) -> list[dict[str, str]]:
    """A conversation that no other place or kind has."""
    first, second, third = WORDS[2 + place % 10], WORDS[2 + place // 10 % 10], WORDS[2 + place // 100 % 10]
    return [
        {"role": "user", "content": f"what is {first} {kind} {second} and {third} ?"},
        {"role": "assistant", "content": f"{second} {first}"},
    ]


def write_rows(path: Path, rows: list) -> Path:
    """Write conversations (or ready records) as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class TinyProject:
    """A project file over tiny data in a folder of its own; `settings` may be edited and written again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        write_rows(folder / "data/plus.jsonl", [question(place, "plus") for place in range(24)])
        write_rows(folder / "data/colors.jsonl", [question(place, "red") for place in range(20)])
        for task, kind in (("sums", "plus"), ("sky", "red")):
            targets = [{"messages": question(200 + place, kind), "subtask": f"part-{place % 2}"} for place in range(4)]
            write_rows(folder / f"targets/{task}.jsonl", targets)
            write_rows(folder / f"held_out/{task}.jsonl", [question(300 + place, kind) for place in range(4)])
        self.settings = {
            "name": "tiny",
            "storage": {"root": "artifacts"},
            "model": {"base": str(model), "dtype": "float32", "max_length": 32},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "pool": {
                "shard_size": 16,
                "sources": [
                    {"name": "plus", "path": "data/plus.jsonl"},
                    {"name": "colors", "path": "data/colors*.jsonl"},
                ],
            },
            "warmup": {"fraction": 0.5, "epochs": 2, "learning_rate": 1e-3, "batch_size": 4},
            "gradients": {"forms": ["adamw", "marginal"], "dimension": 256, "storage": "int8", "block_rows": 8},
            "tasks": [
                {
                    "name": task,
                    "examples": {"path": f"targets/{task}.jsonl"},
                    "evaluation": {"held_out": f"held_out/{task}.jsonl", "max_new_tokens": 4},
                }
                for task in ("sums", "sky")
            ],
            "recipes": [
                {"name": "less", "strategy": "less", "fraction": 0.2},
                {"name": "random", "strategy": "random", "fraction": 0.2, "seeds": [0]},
                {"name": "full", "strategy": "full"},
                {"name": "base", "strategy": "none"},
            ],
            "finetuning": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
        }

    @property
    def path(self) -> Path:
        """The project file, written from `settings`."""
        path = self.folder / "project.yaml"
        path.write_text(yaml.safe_dump(self.settings, sort_keys=False))
        return path


@pytest.fixture
def tiny_project(tmp_path, tiny_model) -> TinyProject:
    """A project that runs end to end in seconds."""
    return TinyProject(tmp_path, tiny_model)
