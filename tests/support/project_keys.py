"""What a change of each key of the project file makes stale."""

import datetime

MODEL = {"model", "finetuning", "untrained", "task"}
EVALUATION = {"task"}
RECIPE = {"recipe"}

CHANGES: dict[str, tuple[object, set[str]]] = {
    "name": ("other", set()),
    "storage.root": ("elsewhere", set()),
    "model.base": ("owner/other", {"model", "finetuning", "untrained"}),
    "model.dtype": ("float32", {"model", "finetuning", "untrained"}),
    "model.device": ("cpu", set()),
    "model.device_map": ("auto", set()),
    "model.max_length": (99, MODEL),
    "model.chat_format": ("tulu", {"model", "finetuning", "untrained"}),
    "model.date": (datetime.date(2026, 2, 1), {"model", "finetuning", "untrained"}),
    "model.quantization": ("4bit", {"model", "finetuning", "untrained"}),
    "model.trust_remote_code": (True, {"model", "finetuning", "untrained"}),
    "lora.rank": (9, {"warmup", "target_tuning", "finetuning"}),
    "lora.alpha": (9.0, {"warmup", "target_tuning", "finetuning"}),
    "lora.dropout": (0.2, {"warmup", "target_tuning", "finetuning"}),
    "lora.target_modules": (["q_proj"], {"warmup", "target_tuning", "finetuning"}),
    "pool.shard_size": (11, set()),
    "pool.sources[].path": ("other.jsonl", set()),
    "pool.sources[].format": ("alpaca", {"source"}),
    "pool.sources[].dialect": ("semicolon", set()),
    "pool.sources[].limit": (5, set()),
    "warmup.fraction": (0.6, {"sample"}),
    "warmup.seed": (8, {"sample", "warmup"}),
    "gradients.forms": (["adamw", "sgd"], {"gradients"}),
    "gradients.sketch": ("rademacher", {"gradients"}),
    "gradients.dimension": (64, {"gradients"}),
    "gradients.storage": ("int8", {"gradients"}),
    "gradients.bytes_per_row": ("1 KiB", {"gradients"}),
    "gradients.seed": (1, {"gradients"}),
    "gradients.token_budget": (77, set()),
    "gradients.gradient_checkpointing": (True, set()),
    "gradients.directions_limit": ("1 GB", set()),
    "gradients.certificate_rows": (9, set()),
    "gradients.real_step_rows": (9, set()),
    "gradients.block_rows": (5, {"gradients"}),
    "tasks[].examples.path": ("other.jsonl", set()),
    "tasks[].examples.format": ("bbh", {"task"}),
    "tasks[].examples.max_length": (55, {"task"}),
    "tasks[].evaluation.path": ("other", set()),
    "tasks[].evaluation.format": ("mmlu", EVALUATION | {"grading"}),
    "tasks[].evaluation.limit": (5, EVALUATION),
    "tasks[].evaluation.max_new_tokens": (5, EVALUATION),
    "tasks[].evaluation.max_length": (55, EVALUATION),
    "tasks[].evaluation.few_shot": (False, EVALUATION),
    "tasks[].evaluation.grading": ("less", {"grading"}),
    "tasks[].evaluation.token_budget": (5, set()),
    "recipes[].form": ("adamw", set()),
    "recipes[].subtask": ("cosine_of_mean", RECIPE),
    "recipes[].aggregate": ("max", RECIPE),
    "recipes[].fraction": (0.2, RECIPE),
    "recipes[].rescore": ("none", RECIPE),
    "recipes[].candidates": (2.0, RECIPE),
    "recipes[].near_duplicates": (0.9, RECIPE),
    "recipes[].quotas": ({"s": 0.5}, RECIPE),
    "recipes[].mix.share": (0.3, RECIPE),
    "recipes[].model": ("owner/third", {"finetuning"}),
    "tasks[].control": (True, set()),
    "tasks[].validation.path": ("other.jsonl", {"task"}),
    **{
        f"{section}.{key}": (value, {section} if changes else set())
        for section in ("warmup", "target_tuning", "finetuning")
        for key, value, changes in [
            ("epochs", 7, True),
            ("learning_rate", 0.5, True),
            ("schedule", "cosine", True),
            ("warmup_ratio", 0.5, True),
            ("weight_decay", 0.5, True),
            ("batch_size", 7, True),
            ("max_grad_norm", 0.5, True),
            ("micro_batch_tokens", 7, True),
            ("gradient_checkpointing", True, False),
        ]
    },
    "finetuning.seed": (8, {"finetuning"}),
    "target_tuning.seed": (8, {"target_tuning"}),
    "report.token_rows": (7, {"report"}),
    "report.context_rows": (7, {"report"}),
    "compute.backend": ("local", set()),
    "compute.address": ("ray://head", set()),
    "compute.gpus_per_worker": (2.0, set()),
    "compute.cpus_per_worker": (2.0, set()),
    "compute.workers": (2, set()),
    "tracking.mlflow": ("http://127.0.0.1:1", set()),
}


STRUCTURE = {
    "exclude",
    "prefilter.strategy",
    "prefilter.keep",
    "prefilter.sample_rows",
    "pool.sources[].name",
    "tasks[].name",
    "tasks[].members",
    "tasks[].validation.folds",
    "recipes[].name",
    "recipes[].strategy",
    "recipes[].rows",
    "recipes[].tokens",
    "recipes[].seeds",
    "recipes[].pilot",
    "recipes[].keep",
    "recipes[].match",
    "recipes[].mix.sources",
    "recipes[].mix.seed",
    "recipes[].precondition",
    "recipes[].damping",
    "recipes[].scores",
    "warmup.import",
    "warmup.mean_learning_rates",
    "tasks[].evaluation.harness",
    "tasks[].evaluation.held_out",
    "tasks[].evaluation.num_fewshot",
    "tasks[].evaluation.apply_chat_template",
}


def set_key(data: dict, path: str, value: object) -> None:
    """Set a key by its path as `all_keys` writes it; lists mean their first part."""
    here = data
    *above, last = path.split(".")
    for part in above:
        here = here.setdefault(part.removesuffix("[]"), {}) if isinstance(here, dict) else here
        here = here[0] if part.endswith("[]") and isinstance(here, list) else here
    if isinstance(here, dict):
        here[last] = value
