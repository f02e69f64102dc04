"""Train an adapter on the rows of this folder with TRL: `python train_trl.py --model ORG/MODEL`.

This file is copied into every export as it is, and uses nothing of LESS Assets. Settings stand in `training.json`.
It needs `trl` 1.16, `transformers` 5, `peft`, and `datasets` 4.7, or later ones.

Only assistant turns that carry loss are learned. TRL has no mask for single turns, so a conversation becomes one
example for each such turn: everything before the turn is its prompt, and the turn is the completion.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def examples_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the prompt, the completion and the tools of each assistant turn of a row that carries loss."""
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in row["messages"]]
    learned = [turn["role"] == "assistant" and turn.pop("train", True) for turn in turns]
    for turn in turns:
        if "tool_calls" in turn:
            turn["tool_calls"] = json.loads(turn["tool_calls"])
    tools = json.loads(row["tools"]) if row.get("tools") else None
    for number, turn in enumerate(turns):
        if learned[number]:
            yield {"prompt": turns[:number], "completion": [turn], "tools": tools}


def load_examples() -> Any:
    """Return the examples as a `datasets.Dataset`."""
    from datasets import Dataset, Features, Json, List, load_dataset

    rows = load_dataset("parquet", data_files=str(FOLDER / "data" / "*.parquet"), split="train")
    examples = [example for row in rows for example in examples_of(row)]
    features = {"prompt": List(Json()), "completion": List(Json()), "tools": Json()}
    if all(example["tools"] is None for example in examples):
        del features["tools"]
    columns = {name: [example[name] for example in examples] for name in features}
    return Dataset.from_dict(columns, features=Features(features))


def main() -> None:
    """Train, and write the adapter."""
    settings = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Train an adapter on the rows of this folder with TRL.")
    parser.add_argument("--model", default=settings["model"], required=settings["model"] is None)
    parser.add_argument("--gguf-file", help="name of a GGUF file in the folder or repository of --model")
    parser.add_argument("--output", default="trained", help="folder of the adapter")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many optimizer steps")
    arguments = parser.parse_args()

    import torch
    import transformers
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    loading = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    name, _, revision = arguments.model.partition("@")
    loading |= {"revision": revision} if revision else {}
    tokenizer = AutoTokenizer.from_pretrained(name, **loading)
    if tokenizer.chat_template is None:
        raise SystemExit("The tokenizer has no chat template: give `tokenizer.chat_template` one in this script.")
    safetensors = not arguments.gguf_file or None  # never pickled weights, which run code
    if arguments.gguf_file and hasattr(transformers, "GgufConfig"):  # younger versions keep weights quantized
        loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # LoRA's weights are trained in full precision.
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=safetensors, **loading)
    if arguments.gguf_file:
        model.is_quantized = False  # its weights are plain numbers now; Trainer refuses what is not
    lora = settings["lora"]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_examples(),
        peft_config=LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["target_modules"],
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=arguments.output,
            max_length=settings["max_length"],
            num_train_epochs=settings["epochs"],
            max_steps=arguments.max_steps,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type=settings["schedule"],
            warmup_steps=settings["warmup_ratio"],  # below 1: a share of all steps
            weight_decay=settings["weight_decay"],
            max_grad_norm=settings["max_grad_norm"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=settings["batch_size"],
            completion_only_loss=True,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            logging_steps=1,
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model(arguments.output)


if __name__ == "__main__":
    main()
