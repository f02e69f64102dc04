"""Files that other trainers read: TRL, axolotl and LLaMA-Factory.

Belongs here: what each trainer's data and configuration look like, and which rows it cannot express. Keys are those of
the trainers' documentation: axolotl's "Conversation" page of dataset formats and its configuration reference,
LLaMA-Factory's `data/README.md` and its example configurations. Nothing here imports a trainer.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from less_assets.method.data.conversations import Message, stated
from less_assets.project.project import Project

TRL_SCRIPT = "train_trl.py"
SETTINGS = "training.json"
AXOLOTL, AXOLOTL_ROWS = "axolotl.yaml", "axolotl.jsonl"
LLAMA_FACTORY = "llama_factory"
DATASET = "selected"
NO_MODEL = "BASE_MODEL"
"""Stands for the base model where the project's is none that others can load by its name."""


def hub_name(base: str) -> str | None:
    """A base model's name on the Hub; None for a folder or a file of a package, which others do not have."""
    return None if base.startswith(("gguf:", "/", ".", "~")) or base.count("/") != 1 else base


def write_trainer_files(
    folder: Path, project: Project, base: str, rows: Sequence[tuple[Sequence[Message], str | None]]
) -> dict[str, int]:
    """Write data and configuration of all three.

    Args:
        folder: The export.
        project: Says how its own models are trained; the files say the same.
        base: The base model, as the recipe names it.
        rows: Messages and the JSON text of the tools of each selected row.

    Returns:
        Why rows are not in LLaMA-Factory's file, and how many.
    """
    script = Path(__file__).with_name(TRL_SCRIPT)
    (folder / TRL_SCRIPT).write_bytes(script.read_bytes())
    _write_json(folder / SETTINGS, _settings(project, base))
    (folder / AXOLOTL).write_text(_axolotl(project, base), encoding="utf-8")
    lines = [json.dumps(_axolotl_row(messages, tools), ensure_ascii=False) + "\n" for messages, tools in rows]
    (folder / AXOLOTL_ROWS).write_text("".join(lines), encoding="utf-8")
    return _write_llama_factory(folder / LLAMA_FACTORY, project, base, rows)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _settings(project: Project, base: str) -> dict[str, Any]:
    training = project.finetuning
    names = ("epochs", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "batch_size", "max_grad_norm")
    settings = {"model": hub_name(base), "max_length": project.model.max_length}
    return settings | {name: getattr(training, name) for name in names} | {"lora": project.lora.model_dump()}


# ---- axolotl ----


def _axolotl(project: Project, base: str) -> str:
    training, lora = project.finetuning, project.lora
    name, _, revision = (hub_name(base) or NO_MODEL).partition("@")
    settings: dict[str, Any] = {
        "base_model": name,
        **({"revision_of_model": revision} if revision else {}),
        "chat_template": "tokenizer_default",
        "datasets": [
            {
                "path": AXOLOTL_ROWS,
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
                "message_field_training": "train",
            }
        ],
        "train_on_inputs": False,
        "sequence_len": project.model.max_length,
        "adapter": "lora",
        "lora_r": lora.rank,
        "lora_alpha": round(lora.alpha),
        "lora_dropout": lora.dropout,
        "lora_target_modules": lora.target_modules,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": training.batch_size,
        "num_epochs": training.epochs,
        "optimizer": "adamw_torch",
        "lr_scheduler": training.schedule,
        "learning_rate": training.learning_rate,
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": "auto",
        "output_dir": "trained",
    }
    comment = "# axolotl train axolotl.yaml (in this folder). Never run by LESS Assets.\n"
    return comment + _replace_note(name) + yaml.safe_dump(settings, sort_keys=False)


def _replace_note(name: str) -> str:
    if name != NO_MODEL:
        return ""
    return f"# Replace {NO_MODEL}: the rows were selected for a model that has no name on the Hub.\n"


def _axolotl_row(messages: Sequence[Message], tools: str | None) -> dict[str, Any]:
    """A row for `type: chat_template`. Arguments and parameters stay JSON text, which axolotl reads as well.

    As mappings their keys would become columns of Arrow tables, which must have one type over all rows.
    """
    turns = []
    for message in map(stated, messages):
        turn: dict[str, Any] = {name: message[name] for name in ("role", "content")}
        if reasoning := message.get("reasoning"):
            turn["reasoning_content"] = reasoning
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = [_as_text(call, "arguments") for call in json.loads(calls)]
        turn |= {name: message[name] for name in ("tool_call_id", "name", "train") if name in message}
        turns.append(turn)
    row: dict[str, Any] = {"messages": turns}
    if tools:
        row["tools"] = [_as_text(tool, "parameters") for tool in json.loads(tools)]
    return row


def _as_text(entry: Mapping[str, Any], field: str) -> dict[str, Any]:
    function = entry.get("function")
    if not isinstance(function, dict) or field not in function or isinstance(function[field], str):
        return dict(entry)
    return {**entry, "function": {**function, field: json.dumps(function[field], ensure_ascii=False)}}


# ---- LLaMA-Factory ----


def _write_llama_factory(
    folder: Path, project: Project, base: str, rows: Sequence[tuple[Sequence[Message], str | None]]
) -> dict[str, int]:
    folder.mkdir()
    converted, left_out = [], Counter[str]()
    for messages, tools in rows:
        row = llama_factory_row(messages, tools)
        if isinstance(row, str):
            left_out[row] += 1
        else:
            converted.append(row)
    columns = {"messages": "messages"}
    if any("tools" in row for row in converted):
        columns["tools"] = "tools"
        converted = [{"tools": "", **row} for row in converted]
    _write_json(folder / "rows.json", converted)
    description = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": columns,
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    }
    _write_json(folder / "dataset_info.json", {DATASET: description})
    training, lora = project.finetuning, project.lora
    name, _, revision = (hub_name(base) or NO_MODEL).partition("@")
    settings: dict[str, Any] = {
        "model_name_or_path": name,
        **({"model_revision": revision} if revision else {}),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": lora.rank,
        "lora_alpha": round(lora.alpha),
        "lora_dropout": lora.dropout,
        "lora_target": ",".join(lora.target_modules),
        "dataset_dir": LLAMA_FACTORY,
        "dataset": DATASET,
        "cutoff_len": project.model.max_length,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": training.batch_size,
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "report_to": "none",
        "output_dir": "trained",
    }
    comment = (
        "# llamafactory-cli train llama_factory/train.yaml (in the folder above). Never run by LESS Assets.\n"
        "# Add `template:` with the name of the model's template; without it the tokenizer's own is taken.\n"
    )
    text = comment + _replace_note(name) + yaml.safe_dump(settings, sort_keys=False)
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    return dict(left_out)


def llama_factory_row(messages: Sequence[Message], tools: str | None) -> dict[str, Any] | str:
    """A row in LLaMA-Factory's ShareGPT form, or the reason for which that form cannot say what the row means.

    Its turns have no mask, so a row with a masked turn would be learned in full. It asks for user (or tool) and
    assistant turns in alternation after an optional system prompt; others it would skip.

    Args:
        messages: The turns.
        tools: JSON text of the tools.
    """
    turns = [stated(message) for message in messages]
    if any(turn.get("train") is False for turn in turns):
        return "an assistant turn is masked"
    if any(turn.get("reasoning") for turn in turns):
        return "an assistant turn has reasoning of its own"
    if any(turn.get("name") for turn in turns if turn["role"] != "tool"):
        return "a speaker has a name"
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    expected = [("user", "tool"), ("assistant",)]
    if len(spoken) % 2 or any(turn["role"] not in expected[number % 2] for number, turn in enumerate(spoken)):
        return "user and assistant turns do not alternate"
    converted = []
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if calls := turn.get("tool_calls"):
            if content.strip():
                return "an assistant turn has text beside a tool call"
            called = [_called(call) for call in json.loads(calls)]
            role, content = "function_call", json.dumps(called[0] if len(called) == 1 else called, ensure_ascii=False)
        converted.append({"role": role, "content": content})
    row: dict[str, Any] = {"messages": converted}
    if tools:
        functions = [tool.get("function", tool) for tool in json.loads(tools)]
        row["tools"] = json.dumps(functions, ensure_ascii=False)
    return row


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    return {"name": function["name"], "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
