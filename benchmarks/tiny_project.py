"""A project of any size over synthetic questions and a random model, for measurements that need no good model.

Belongs here: the data, the model and the project file. What is measured on them stands in `scale.py`.
"""

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = [f"word{number}" for number in range(400)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """A random Llama with a word-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=tokens[2:4],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=4,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def conversation(place: int, answer_words: int = 8) -> dict[str, Any]:
    """A question and an answer that no other place has."""
    digits = [place // 400**power % 400 for power in range(4)]
    question = " ".join(WORDS[digit] for digit in digits)
    answer = " ".join(
        WORDS[(digits[0] * 7 + digits[1] * 3 + step * (digits[2] + 1)) % 400] for step in range(answer_words)
    )
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "subtask": f"part-{place % 3}"}


def write_rows(path: Path, first: int, rows: int, answer_words: int = 8) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        for place in range(first, first + rows):
            stream.write(json.dumps(conversation(place, answer_words)) + "\n")


def write_project(
    folder: Path,
    *,
    rows: int,
    shard_size: int,
    epochs: int = 1,
    tasks: int = 1,
    recipes: int = 1,
    answer_words: int = 8,
    warmup_rows: int = 200,
    **sections: Any,
) -> Path:
    """A project file with its data and model; the warm-up has the same size whatever the pool's."""
    model = folder / "model"
    if not model.exists():
        write_model(model)
    write_rows(folder / "data/pool-a.jsonl", 0, rows, answer_words)
    for number in range(tasks):
        write_rows(folder / f"targets/task-{number}.jsonl", 10**7 + 100 * number, 9)
        write_rows(folder / f"held_out/task-{number}.jsonl", 2 * 10**7 + 100 * number, 4)
    settings = {
        "name": "scale",
        "model": {"base": str(model), "dtype": "float32", "device": "cpu", "max_length": 128},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "pool": {"shard_size": shard_size, "sources": [{"name": "pool", "path": "data/pool-*.jsonl"}]},
        "warmup": {"fraction": min(1.0, warmup_rows / rows), "epochs": epochs, "learning_rate": 1e-3, "batch_size": 32},
        "gradients": {"forms": ["adamw"], "dimension": 4096, "storage": "int4", "token_budget": 2048},
        "tasks": [
            {
                "name": f"task-{number}",
                "examples": {"path": f"targets/task-{number}.jsonl"},
                "evaluation": {"held_out": f"held_out/task-{number}.jsonl", "max_new_tokens": 4},
            }
            for number in range(tasks)
        ],
        "recipes": [
            {"name": f"recipe-{number}", "strategy": "less", "fraction": 0.01 + 0.01 * number}
            for number in range(recipes)
        ],
        "finetuning": {"epochs": 1, "learning_rate": 1e-3},
        **sections,
    }
    path = folder / "project.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
