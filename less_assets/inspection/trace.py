"""The lineage of a row: back to file and line, shard, arrays, settings and code; forward to whoever selected it.

Belongs here: gathering that as plain data, and putting it into words. Not here: why it was selected (`explain.py`), or
what artifacts are made from (`lineage.py`).
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.orchestration.definitions import code_versions
from less_assets.reading.files import EXAMPLES, FEATURES, SAMPLE, SUBSET, score_file
from less_assets.reading.rows import find_row
from less_assets.reading.shard_features import kept_rows
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
    for copy in copies.iter_rows(named=True):
        table = read_parquet(lineage.folder("instruction_pool", copy["shard"]), EXAMPLES, ["source_file", "source_row"])
        file, number = table.row(copy["row"])
        segment = {"source": copy["source"], "file": file, "line": number, "counts": copy["canonical"]}
        places.append(segment | {"shard": copy["shard"], "row": copy["row"]})
    arrays = []
    for checkpoint in project.checkpoints:
        if lineage.is_left_out("train_gradients", f"{checkpoint}|{shard}"):
            continue
        array = {"checkpoint": checkpoint, **_artifact(lineage, "train_gradients", f"{checkpoint}|{shard}")}
        if array["state"] == "fresh":
            stored_row, forms = _place(lineage, shard, row), list(project.gradients.forms)
            array |= {"array": f"{array['path']}/{FEATURES}", "array_row": stored_row, "forms": forms}
        arrays.append(array)
    scores = []
    for task in project.task_names:
        table_of_task = {"task": task, **_artifact(lineage, "influence_scores", task)}
        if table_of_task["state"] == "fresh":
            table_of_task |= {"table": f"{table_of_task['path']}/{score_file(shard)}", "table_row": row}
        scores.append(table_of_task)
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
    artifact: dict[str, Any] = {"asset": asset, "partition": partition, "state": status.state}
    if status.state != "fresh":
        return artifact | {"why": list(status.reasons)}
    manifest = lineage.fresh(asset, partition)
    path = str(lineage.folder(asset, partition).root)
    return artifact | {
        "path": path,
        "fingerprint": manifest.fingerprint,
        "data_version": manifest.data_version,
        "made_from": dict(manifest.inputs),
    }


def _place(lineage: Lineage, shard: str, row: int) -> int | None:
    """Where a row of a shard stands in the shard's arrays; None if the prefilter has left it out."""
    kept = kept_rows(lineage, shard)
    return row if kept is None else kept["row"].index_of(row)


def _in_sample(lineage: Lineage, example_id: str) -> bool | None:
    if lineage.status("warmup_sample").state != "fresh":
        return None
    sample = read_parquet(lineage.folder("warmup_sample"), SAMPLE, ["example_id"])
    return example_id in sample["example_id"]


def _selection(lineage: Lineage, recipe: str, task: str, example_id: str) -> dict[str, Any]:
    """Whether a recipe selected the row for a task, and what was made of its subset."""
    key = f"{recipe}|{task}"
    selection: dict[str, Any] = {"recipe": recipe, "task": task, **_artifact(lineage, "selected_subset", key)}
    if selection["state"] != "fresh":
        return selection
    subset = read_parquet(
        lineage.folder("selected_subset", key), SUBSET, ["rank", "example_id", "score", "subtask", "task"]
    ).rename({"task": "member"})
    row = subset.filter(pl.col("example_id") == example_id)
    selection["selected"] = bool(row.height)
    if row.height:
        selection |= row.drop("example_id").row(0, named=True)
        selection["went_into"] = [_artifact(lineage, asset, key) for asset in ("finetuned_model", "eval_results")]
    return selection


def in_words(trace: Mapping[str, Any]) -> str:
    """A lineage for a terminal.

    Args:
        trace: From `trace_row`.
    """
    sampled = {True: "  in the warm-up sample", False: "  not in the warm-up sample", None: ""}
    lines = [f"row {trace['example_id']} of {trace['project']} ({trace['project_file']})", "", "comes from"]
    lines += [
        f"  {copy['file']}:{copy['line']}  source {copy['source']}, shard {copy['shard']}, row {copy['row']}"
        + ("" if copy["counts"] else "  (a further copy)")
        for copy in trace["places"]
    ]
    lines += [f"  {_words(trace['pool'])}", f"  {_words(trace['pool_index'])}"]
    lines.append(f"  {_words(trace['warmup'])}{sampled[trace['warmup']['in_sample']]}")
    lines += ["", "its features", *(_row_words(array, "array") for array in trace["gradients"])]
    lines += ["", "its scores", *(_row_words(table, "table") for table in trace["scores"])]
    code = trace["code"]
    lines += ["", "made with", f"  less-assets {code['less_assets']}, artifact format {code['artifact_format']}"]
    for asset in ("warmup_checkpoints", "train_gradients"):
        lines.append(f"  {asset} code version {code['code_versions'][asset]}")
    for name, values in trace["settings"].items():
        lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    return "\n".join([*lines, "", "selected by", *_selection_words(trace["selections"])])


def _row_words(artifact: Mapping[str, Any], kind: str) -> str:
    """Where the row lies in a stored array or table."""
    if artifact["state"] != "fresh":
        return f"  {_words(artifact)}"
    row = artifact[f"{kind}_row"]
    where = "not there: the prefilter left the row out" if row is None else f"row {row}"
    return f"  {artifact[kind]}  {where}  version {artifact['data_version']}"


def _selection_words(selections: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for selection in selections:
        if selection.get("selected"):
            score = f", score {selection['score']:+.4f}" if selection["score"] is not None else ""
            what = f"{selection['recipe']} for {selection['task']}: rank {selection['rank']:,}{score}"
            lines.append(f"  {what}  {selection['path']}")
            lines += [f"    {_words(after)}" for after in selection["went_into"] if after["state"] == "fresh"]
    lines = lines or ["  nobody"]
    unknown = [f"{stale['recipe']}|{stale['task']}" for stale in selections if stale["state"] != "fresh"]
    if unknown:
        lines.append(f"  not known, their subsets are not up to date: {', '.join(unknown)}")
    return lines


def _words(artifact: Mapping[str, Any]) -> str:
    name = artifact["asset"] + (f" {artifact['partition']}" if artifact["partition"] else "")
    if artifact["state"] != "fresh":
        return f"{name} is {artifact['state']}: {'; '.join(artifact['why'])}"
    return f"{name}  {artifact['path']}  version {artifact['data_version']}"
