"""Tiny data and a project file over them, for tests that run the whole graph."""

import json
import shutil
from pathlib import Path

import yaml

WORDS = ["add", "sub", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "red", "blue"]
WORDS += ["sky", "sea", "is", "the", "what", "of", "and", "plus"]


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


HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "closing": "</script><img src=x onerror='window.hacked = 2'><!--",
    "address": "[click](javascript:window.hacked=3)",
    "bytes": "broken \ufffd bytes \u202e backwards \x07 bell",
}
"""Contents of pool rows that a page must show as text and nothing else."""


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
            "gradients": {
                "forms": ["adamw", "marginal"],
                "dimension": 256,
                "storage": "int8",
                "block_rows": 8,
                # Tests that are about them switch them on.
                "certificate_rows": 0,
                "real_step_rows": 0,
            },
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


def showing_everything(model: Path, folder: Path) -> Path:
    """A copy of a tiny model whose chat template shows tools, calls and thoughts, too."""
    copy = Path(shutil.copytree(model, folder / "model"))
    (copy / "chat_template.jinja").write_text(
        "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.reasoning_content %}{{ m.reasoning_content }} ? {% endif %}{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %} {{ call.function.name }} "
        "{{ call.function.arguments | tojson }}{% endfor %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return copy
