"""Cards of an export: what was selected from what, by which rule, how far it can be trusted, under which licences.

Belongs here: words in the form that the Hugging Face Hub reads (YAML between lines of dashes, then Markdown). What an
export holds besides is `export.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from less_assets.compute.progress import counted
from less_assets.errors import MissingArtifactError, StaleArtifactError
from less_assets.inspection.export_trainers import hub_name
from less_assets.lineage.lineage import Lineage, split
from less_assets.lineage.pool_files import data_path
from less_assets.method.data.conversations import carries_loss
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.certificates import judge_selection
from less_assets.reading.files import BOARD, EXAMPLES
from less_assets.reading.tournaments import choice_table
from less_assets.store.tables import read_parquet

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(
    lineage: Lineage,
    recipe: ResolvedRecipe,
    task: str,
    subset: pl.DataFrame,
    kept: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, int],
    *,
    has_adapter: bool,
) -> str:
    """The README of an exported selection.

    Args:
        lineage: Reads what is stored.
        recipe: The recipe.
        task: The task.
        subset: The selected rows (`subset.parquet`).
        kept: Further columns of each row; empty mappings without `--keep-columns`.
        left_out: Why rows are not in LLaMA-Factory's file, and how many.
        has_adapter: Whether the fine-tuned model is part of the export.
    """
    licences = source_licences(lineage, subset)
    stated = {licence for licence in licences.values() if licence is not None}
    size = next((name for limit, name in _SIZES if subset.height < limit), "n>1M")
    front = {
        "pretty_name": f"{lineage.project.name}: {recipe.key} for {task}",
        "license": stated.pop() if len(stated) == 1 and None not in licences.values() else "unknown",
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": ["data-selection", "less", "less-assets"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }
    parts = [
        f"# {_text(lineage.project.name)}: rows selected for {_text(task)}",
        _selected(lineage, recipe, task, subset),
        "## How far the selection can be trusted\n\n" + _certificate(lineage, recipe, task, subset),
        "## Against random rows\n\n" + _comparison(lineage, recipe, task),
        "## Licences\n\n" + _licences(lineage, licences, kept),
        "## Files\n\n" + _files(recipe, has_adapter=has_adapter),
        "## Training on it\n\n" + _training(lineage, subset, left_out),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(parts) + "\n"


def model_card(lineage: Lineage, key: str, base: str | None) -> str:
    """The README of an exported adapter.

    Args:
        lineage: Reads what is stored.
        key: Partition key `recipe|task`.
        base: The base model's name on the Hub; None if it has none.
    """
    recipe, task = split(key)
    project, summary = lineage.project, lineage.summary("finetuned_model", key)
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "less-assets"], "license": "unknown"}
    if base:
        front["base_model"] = base.partition("@")[0]
    trained = {"lora": project.lora.model_dump(), "training": project.finetuning.training_settings()}
    parts = [
        f"# {_text(project.name)}: adapter of {_text(recipe)} for {_text(task)}",
        f"A LoRA adapter for {_base_words(lineage, project.recipe(recipe))}, trained on {summary['examples']:,} rows "
        f"in {counted(summary['steps'], 'optimizer step')}. Mean loss of the last epoch: "
        f"{summary['mean_loss_of_last_epoch']:.3f} nats per token. It has the licence of the base "
        "model, as far as that asks for one; the rows' licences stand in the card of the data set.",
        f"Its fingerprint is `{lineage.fresh('finetuned_model', key).fingerprint}`. Chat format of training: "
        f"`{project.model.chat_format}`. Settings:",
        f"```yaml\n{yaml.safe_dump(trained, sort_keys=False)}```",
        "## Against random rows\n\n" + _comparison(lineage, project.recipe(recipe), task),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _text(name: str) -> str:
    """A name as Markdown shows it, letter by letter."""
    return name.replace("_", "\\_").replace("*", "\\*").replace("|", "\\|")


def _base_words(lineage: Lineage, recipe: ResolvedRecipe) -> str:
    base = recipe.model or lineage.project.model.base
    name = hub_name(base) or (base if base.startswith("gguf:") else Path(base).name)
    if recipe.model is not None:
        return f"`{name}`"
    described = lineage.summary("base_model")
    return f"`{name}` (licence: {described['licence'] or 'not stated'}; digest `{described['digest'][:16]}`)"


def _selected(lineage: Lineage, recipe: ResolvedRecipe, task: str, subset: pl.DataFrame) -> str:
    key = f"{recipe.key}|{task}"
    manifest, pool = lineage.fresh("selected_subset", key), lineage.summary("pool_index")
    sources = dict(subset["source"].value_counts().iter_rows())
    rows = "\n".join(
        f"| {_text(source)} | {count:,} | {sources.get(source, 0):,} |" for source, count in pool["sources"].items()
    )
    settings = yaml.safe_dump(json.loads(json.dumps(_recipe_settings(lineage, recipe))))
    choice = choice_table(lineage, recipe.key, task)
    chosen = f" By trials of several recipes: {choice[1]}." if choice else ""
    order = ", best first" if recipe.traits.scores else ""
    model = "Model whose gradients were taken" if recipe.traits.scores == "influence" else "Model of the project"
    return (
        f"{subset.height:,} rows, selected from {pool['unique']:,} different usable rows by the recipe "
        f"`{recipe.key}` for the task `{task}`{order}.{chosen}\n\n"
        f"Made with LESS Assets {version('less-assets')}. Fingerprint of the selection: `{manifest.fingerprint}`; "
        f"version of its content: `{manifest.data_version}`. {model}: "
        f"{_base_words(lineage, replace(recipe, model=None))}.\n\n"
        f"```yaml\n{settings}```\n\n| source | rows of the pool | selected |\n|---|---:|---:|\n{rows}"
    )


def _recipe_settings(lineage: Lineage, recipe: ResolvedRecipe) -> Mapping[str, object]:
    """What the recipe says, without what does not apply to it."""
    settings = lineage.project.recipe_settings(recipe.key)
    return {name: value for name, value in settings.items() if value not in (None, {}, [])}


def _certificate(lineage: Lineage, recipe: ResolvedRecipe, task: str, subset: pl.DataFrame) -> str:
    if not recipe.ranks_by_influence:
        return "The recipe does not take the rows of the highest influence, so that there is nothing to certify."
    judged = judge_selection(lineage, f"{recipe.key}|{task}", subset)
    if judged is None:
        return "No certificate was made for these scores."
    return (
        "Scores are computed from compressed gradients. A random sample of the pool was scored exactly, too. By that, "
        f"{100 * judged.overlap:.0f} % of the selected rows are expected to be selected by exact scores as well, and "
        f"{judged.certain:,} of {subset.height:,} are certain to be (with a chance of 95 % or more, each)."
    )


def _comparison(lineage: Lineage, recipe: ResolvedRecipe, task: str) -> str:
    from less_assets.method.evaluation.leaderboard import OTHER_FORM_NOTE, in_words, with_named_numbers

    try:
        board = with_named_numbers(read_parquet(lineage.folder("task_results", task), BOARD))
    except (MissingArtifactError, StaleArtifactError):
        return "Not evaluated: the project's evaluation was not run, or is out of date."
    compared = board.filter(pl.col("recipe") == recipe.name, pl.col("vs_random").is_not_null())
    if compared.is_empty():
        return "No comparison: the project has no evaluation of this task, or no random recipe of the same budget."
    heading = "| task | metric | value | difference from random | samples |\n|---|---|---:|---:|---:|"
    lines = [
        f"| {_text(row['task'])} | {in_words(row['metric'])}{'' if row['decides'] else ' °'} | {row['value']:.3f} | "
        f"{row['vs_random']:+.3f} "
        f"[{row['vs_random_low']:+.3f}, {row['vs_random_high']:+.3f}] | {row['n']} |"
        for row in compared.iter_rows(named=True)
    ]
    note = (
        "A model trained on these rows, compared with one trained on as many random rows, on the same held-out "
        "samples. Brackets: 95 % bootstrap interval over samples. Losses are in nats per token, lower is better; other "
        "metrics: higher is better. Validation loss: examples of the target's form that no selection saw; answer loss: "
        "the evaluation's reference answers."
    )
    if not compared["decides"].all():
        note += f" {OTHER_FORM_NOTE}."
    if recipe.seed is not None:
        note += " Values are means over the recipe's seeds."
    return "\n".join([note, "", heading, *lines])


def source_licences(lineage: Lineage, subset: pl.DataFrame) -> dict[str, str | None]:
    """Licence of each source that has selected rows, where a `README.md` beside its files states one; else None."""
    from less_assets.method.training.licences import card_licence

    files = _files_of(lineage, subset)
    licences: dict[str, str | None] = {}
    for source, paths in files.items():
        local = [Path(data_path(lineage.project, path)) for path in paths if "://" not in path]
        folders = {folder for path in local for folder in (path.parent, path.parent.parent)}
        stated = {licence for folder in folders if (licence := card_licence(folder))}
        licences[source] = stated.pop() if len(stated) == 1 else None
    return licences


def _files_of(lineage: Lineage, subset: pl.DataFrame) -> dict[str, list[str]]:
    files: dict[str, dict[str, None]] = {source: {} for source in subset["source"].unique(maintain_order=True)}
    for shard in subset["shard"].unique(maintain_order=True):
        table = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, ["source", "source_file"])
        for source, file in table.unique(maintain_order=True).iter_rows():
            files.setdefault(source, {})[file] = None
    return {source: list(paths) for source, paths in files.items()}


def _licences(lineage: Lineage, licences: Mapping[str, str | None], kept: Sequence[Mapping[str, Any]]) -> str:
    stated = {str(row[name]) for row in kept for name in ("license", "licence") if row.get(name)}
    lines = [f"- {_text(source)}: {licence or 'not stated'}" for source, licence in licences.items()]
    words = (
        "Rows keep the licence of the source that they come from. Known is only what a `README.md` beside a source's "
        "files says; look at the sources before you publish anything."
    )
    if stated:
        lines.append(f"- stated in rows: {', '.join(sorted(map(_text, stated)))}")
    return words + "\n\n" + "\n".join(lines)


def _files(recipe: ResolvedRecipe, *, has_adapter: bool) -> str:
    lines = [
        "- `data/train-00000-of-00001.parquet`: the rows. `tool_calls` of messages and `tools` are JSON text; `train` "
        "of a message is false where an assistant turn carries no loss, and null elsewhere.",
        "- `rows.jsonl`: the same with `tool_calls` and `tools` as lists, and `weight: 0` beside `train: false`.",
        "- `train_trl.py` and `training.json`; `axolotl.yaml` and `axolotl.jsonl`; `llama_factory/`: see below.",
    ]
    if has_adapter:
        lines.append("- `adapter/`: the LoRA adapter trained on these rows, with a card of its own.")
    else:
        lines.append(f"- No adapter: no model trained on the rows of `{recipe.key}` is up to date.")
    return "\n".join(lines)


def _training(lineage: Lineage, subset: pl.DataFrame, left_out: Mapping[str, int]) -> str:
    masked = sum(any(_is_masked(turn) for turn in messages) for messages in subset["messages"].to_list())
    missing = sum(left_out.values())
    reasons = "; ".join(f"{count:,} because {reason}" for reason, count in left_out.items())
    lines = [
        f"{masked:,} of {subset.height:,} rows have an assistant turn that must not be learned (a masked turn). What "
        "each trainer makes of that:",
        "",
        "- TRL (`python train_trl.py`) has no mask for single turns. The script makes one example of each turn that "
        "carries loss, with everything before it as the prompt. Masked turns are read and never learned.",
        "- axolotl (`axolotl train axolotl.yaml`) reads `train: false` of a turn by `message_field_training`. Masked "
        "turns are read and never learned.",
        "- LLaMA-Factory (`llamafactory-cli train llama_factory/train.yaml`) learns every assistant turn and has no "
        "mask. "
        + (
            f"{missing:,} rows are therefore not in its file: {reasons}."
            if missing
            else "All rows are in its file: it can express each of them."
        ),
        "",
        "Only the TRL script is run by the tests of LESS Assets. The other files follow the documented keys of their "
        "trainers. The learning settings are those of the project; a learning rate for adapters of another size or of "
        "a larger model is another one.",
    ]
    if lineage.project.model.chat_format == "tulu":
        words = "Trainers take the tokenizer's chat template instead: give it one of that form if you want the same."
        lines += ["", f"The rows were scored in the form `<|user|>`, `<|assistant|>` (`chat_format: tulu`). {words}"]
    return "\n".join(lines)


def _is_masked(turn: Any) -> bool:
    return turn["role"] == "assistant" and not carries_loss(turn)
