"""Dagster's home as a folder: where it lies, and what is remembered in it beside Dagster's records.

Belongs here: what can be known of the records without loading Dagster. Opening them is `dagster_home.py`.

After a run, the data versions that it has seen in Dagster's records are remembered in a file, with the state of the
database that holds them. While that has not changed, a command that finds every artifact fresh, in just this version,
knows that there is nothing to do.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upath import UPath

from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import Project
from less_assets.reading.certificates import lacks_certificate
from less_assets.running.request import Partition, Request, needed
from less_assets.steps.registry import open_lineage
from less_assets.store.artifacts import RECORDS_FOLDER, ArtifactStore
from less_assets.store.files import local_path, write_atomically

PROCESSES_FOLDER = "less-assets-processes"
"""Of files that living runs hold; see `killed_runs.py`."""
RECORDED_FILE = "less-assets-recorded.json"
EVENTS = "history/runs/index.db"
"""SQLite's file of Dagster's events of assets, in the home; not there if `dagster.yaml` names another storage."""


def dagster_home(store: ArtifactStore) -> Path:
    """The folder of a project's records; it need not exist.

    Args:
        store: The project's artifacts.

    Returns:
        DAGSTER_HOME of the environment, if it is set; `.dagster` in the storage root; for a storage URL, a folder in
        the user's state directory (`XDG_STATE_HOME`, else `~/.local/state`) named by a hash of the URL, since
        Dagster's databases need a local disk.
    """
    if named := os.environ.get("DAGSTER_HOME"):
        return Path(named).expanduser().absolute()
    if root := local_path(store.root):
        return root.absolute() / RECORDS_FOLDER
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return state / "less-assets" / hashlib.sha256(str(store.root).encode()).hexdigest()[:16]


def remember_recorded(project: Project, store: ArtifactStore, request: Request) -> None:
    """Remember that all that a request needs is fresh and recorded by Dagster.

    Args:
        project: The project file.
        store: Its artifacts.
        request: What a run has just brought up to date; the records are closed again.
    """
    home = dagster_home(store)
    lineage = open_lineage(project, store)
    try:
        versions = {
            asset: {partition or "": lineage.fresh(asset, partition).data_version for partition in partitions}
            for asset, partitions in _made(lineage, request).items()
        }
        content = {"storage": str(store.root), "records": _state_of_records(home), "versions": versions}
        write_atomically(UPath(home / RECORDED_FILE), json.dumps(content).encode())
    except (LessAssetsError, OSError):  # Dagster's events are elsewhere, a file has changed: the next run looks
        (home / RECORDED_FILE).unlink(missing_ok=True)


def nothing_to_do(
    project: Project, store: ArtifactStore, request: Request
) -> tuple[Lineage, dict[str, list[Partition]]] | None:
    """Whether a run would find that there is nothing to do; Dagster is not loaded to know that, nor torch.

    Args:
        project: The project file.
        store: Its artifacts.
        request: What a person asked for.

    Returns:
        The plans and what the request needs, if all of it is fresh, certified, and remembered as recorded by Dagster;
        None: a run has to look.
    """
    home = dagster_home(store)
    try:
        remembered: Any = json.loads((home / RECORDED_FILE).read_bytes())
        same = remembered["storage"] == str(store.root) and remembered["records"] == _state_of_records(home)
        versions: Mapping[str, Mapping[str, str]] = remembered["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not same or any((home / PROCESSES_FOLDER).glob("*")):  # of a run that goes on, or was killed
        return None
    try:
        PoolFiles.scan(project, store)
        lineage = open_lineage(project, store)
        wanted = _made(lineage, request)
        fresh = all(
            lineage.status(asset, partition).state == "fresh"
            and versions[asset][partition or ""] == lineage.fresh(asset, partition).data_version
            for asset, partitions in wanted.items()
            for partition in partitions
        )
        tasks = wanted.get("influence_scores", []) if request.extras else []
        if not fresh or any(lacks_certificate(lineage, str(task)) for task in tasks):
            return None
    except (LessAssetsError, KeyError):  # the run says what is wrong with a file, and knows what is new
        return None
    return lineage, wanted


def _made(lineage: Lineage, request: Request) -> dict[str, list[Partition]]:
    """What a run that a request starts has made in the end: what is needed, without checkpoints of no weight."""
    return {
        asset: [partition for partition in partitions if not lineage.is_left_out(asset, partition)]
        for asset, partitions in needed(lineage, request).items()
    }


def _state_of_records(home: Path) -> list[list[int]]:
    """Size and time of change of the files that hold Dagster's events of assets, and of the file that names them.

    Raises:
        FileNotFoundError: Dagster keeps its events elsewhere.
    """
    write_ahead_log = home / f"{EVENTS}-wal"
    files = [home / "dagster.yaml", home / EVENTS, *([write_ahead_log] if write_ahead_log.exists() else [])]
    return [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in files)]
