"""The lineage of a row: back to file and line, shard, arrays, settings and code; forward to whoever selected it.

Belongs here: gathering that as plain data, and putting it into words. Not here: why it was selected (`explain.py`), or
what artifacts are made from (`lineage.py`).
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import code_versions
from less_assets.reading.rows import find_row
from less_assets.steps.gradients import FEATURES
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.ranking import score_file
from less_assets.steps.selection import SUBSET
from less_assets.steps.warmup import SAMPLE
from less_assets.store.manifest import FORMAT_VERSION
from less_assets.store.tables import read_parquet


def trace_row(lineage: Lineage, example_id: str) -> dict[str, Any]:
    """Where a row of the pool comes from, what was computed of it, and every subset and model that it went into.

    Args:
        lineage: Reads the store as it stands; what is missing or stale is reported as that.
        example_id: The row's id, or the beginning of one.

    Returns:
        JSON values.

    Raises:
        LessAssetsError: The pool has no such row, or was not read yet.
    """
    copies = find_row(lineage, example_id)
    name, shard, row = copies.row(0, named=True)["example_id"], copies["shard"][0], int(copies["row"][0])
    project = lineage.project
    places = []
    for each in copies.iter_rows(named=True):
        table = read_parquet(lineage.folder("instruction_pool", each["shard"]), EXAMPLES, ["source_file", "source_row"])
        file, number = table.row(each["row"])
        segment = {"source": each["source"], "file": file, "line": number, "counts": each["canonical"]}
        places.append(segment | {"shard": each["shard"], "row": each["row"]})
    arrays = []
    for checkpoint in project.checkpoints:
        found = _artifact(lineage, "train_gradients", f"{checkpoint}|{shard}")
        if found["state"] == "fresh":
            found |= {"array": f"{found['path']}/{FEATURES}", "array_row": row, "forms": list(project.gradients.forms)}
        arrays.append({"checkpoint": checkpoint, **found})
    scores = []
    for task in project.task_names:
        found = _artifact(lineage, "influence_scores", task)
        if found["state"] == "fresh":
            found |= {"table": f"{found['path']}/{score_file(shard)}", "table_row": row}
        scores.append({"task": task, **found})
    return {
        "example_id": name,
        "project": project.name,
        "project_file": str(project.path),
        "places": places,
        "pool": _artifact(lineage, "instruction_pool", shard),
        "pool_index": _artifact(lineage, "pool_index", None),
        "warmup": _artifact(lineage, "warmup_sample", None) | {"in_sample": _in_sample(lineage, name)},
        "gradients": arrays,
        "scores": scores,
        "settings": {
            "model": project.model_settings(),
            "warmup": project.warmup_settings(),
            "gradients": project.gradient_settings(),
        },
        "code": {
            "less_assets": version("less-assets"),
            "artifact_format": FORMAT_VERSION,
            "code_versions": code_versions(project),
        },
        "selections": [
            _selection(lineage, recipe, task, name) for task in project.task_names for recipe in project.recipe_keys
        ],
    }


def _artifact(lineage: Lineage, asset: str, partition: str | None) -> dict[str, Any]:
    """State, path and versions of an artifact."""
    status = lineage.status(asset, partition)
    found: dict[str, Any] = {"asset": asset, "partition": partition, "state": status.state}
    if status.state != "fresh":
        return found | {"why": list(status.reasons)}
    manifest = lineage.fresh(asset, partition)
    path = str(lineage.folder(asset, partition).root)
    return found | {
        "path": path,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
        "made_from": dict(manifest.inputs),
    }


def _in_sample(lineage: Lineage, example_id: str) -> bool | None:
    if lineage.status("warmup_sample").state != "fresh":
        return None
    sample = read_parquet(lineage.folder("warmup_sample"), SAMPLE, ["example_id"])
    return example_id in sample["example_id"]


def _selection(lineage: Lineage, recipe: str, task: str, example_id: str) -> dict[str, Any]:
    """Whether a recipe selected the row for a task, and what was made of its subset."""
    key = f"{recipe}|{task}"
    found: dict[str, Any] = {"recipe": recipe, "task": task, **_artifact(lineage, "selected_subset", key)}
    if found["state"] != "fresh":
        return found
    subset = read_parquet(
        lineage.folder("selected_subset", key), SUBSET, ["rank", "example_id", "score", "subtask", "task"]
    ).rename({"task": "member"})
    row = subset.filter(pl.col("example_id") == example_id)
    found["selected"] = bool(row.height)
    if row.height:
        found |= row.drop("example_id").row(0, named=True)
        found["went_into"] = [_artifact(lineage, asset, key) for asset in ("finetuned_model", "eval_results")]
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """A lineage for a terminal.

    Args:
        found: From `trace_row`.
    """
    lines = [f"row {found['example_id']} of {found['project']} ({found['project_file']})", "", "comes from"]
    for place in found["places"]:
        note = "" if place["counts"] else "  (a further copy)"
        lines.append(
            f"  {place['file']}:{place['line']}  source {place['source']}, shard {place['shard']}, row {place['row']}"
            + note
        )
    lines += [f"  {_words(found['pool'])}", f"  {_words(found['pool_index'])}"]
    sampled = {True: "in the warm-up sample", False: "not in the warm-up sample", None: ""}[
        found["warmup"]["in_sample"]
    ]
    lines.append(f"  {_words(found['warmup'])}  {sampled}".rstrip())
    lines += ["", "its features"]
    lines += [
        f"  {each['array']}  row {each['array_row']}  version {each['data_version']}"
        if each["state"] == "fresh"
        else f"  {_words(each)}"
        for each in found["gradients"]
    ]
    lines += ["", "its scores"]
    lines += [
        f"  {each['table']}  row {each['table_row']}  version {each['data_version']}"
        if each["state"] == "fresh"
        else f"  {_words(each)}"
        for each in found["scores"]
    ]
    code, settings = found["code"], found["settings"]
    lines += ["", "made with", f"  less-assets {code['less_assets']}, artifact format {code['artifact_format']}"]
    for name in ("warmup_checkpoints", "train_gradients"):
        lines.append(f"  {name} code version {code['code_versions'][name]}")
    for name, values in settings.items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    lines += ["", "selected by"]
    selected = [each for each in found["selections"] if each.get("selected")]
    for each in selected:
        score = f", score {each['score']:+.4f}" if each["score"] is not None else ""
        lines.append(f"  {each['recipe']} for {each['task']}: rank {each['rank']:,}{score}  {each['path']}")
        lines += [f"    {_words(after)}" for after in each["went_into"] if after["state"] == "fresh"]
    if not selected:
        lines.append("  nobody")
    unknown = [each for each in found["selections"] if each["state"] != "fresh"]
    if unknown:
        names = ", ".join(f"{each['recipe']}|{each['task']}" for each in unknown)
        lines.append(f"  not known, their subsets are not up to date: {names}")
    return "\n".join(lines)


def _words(artifact: Mapping[str, Any]) -> str:
    name = artifact["asset"] + (f" {artifact['partition']}" if artifact["partition"] else "")
    if artifact["state"] != "fresh":
        return f"{name} is {artifact['state']}: {'; '.join(artifact['why'])}"
    return f"{name}  {artifact['path']}  version {artifact['data_version']}"
