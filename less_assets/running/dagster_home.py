"""Dagster's home: the folder of its records (runs, events), by default inside the project's storage.

Belongs here: whose folder it is, and opening it although others use it. What is in it is Dagster's.
"""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import dagster as dg
import sqlalchemy
from sqlalchemy import event
from upath import UPath

from less_assets.errors import LessAssetsError, StorageError
from less_assets.running.home_folder import dagster_home
from less_assets.running.killed_runs import living_processes, lock_holders
from less_assets.running.runner import open_instance
from less_assets.store.artifacts import ArtifactStore, exclusive_lock
from less_assets.store.files import local_path, storage_trouble

DEFAULT_SETTINGS = files("less_assets.running").joinpath("dagster.yaml")
WORKSPACE = files("less_assets.running").joinpath("workspace.yaml")
"""What `dagster dev` serves: `code_location.py`."""
OWNER_FILE = "less-assets-project.json"
PATIENCE_SECONDS = 60
"""How long a locked database is waited for."""


def prepare_home(project: str, store: ArtifactStore, home: str | os.PathLike[str] | None = None) -> Path:
    """Create the home if need be, with the defaults of our `dagster.yaml`.

    Args:
        project: The project's name.
        store: Its artifacts.
        home: The folder; None: `dagster_home`.

    Raises:
        StorageError: The home belongs to another project, or cannot be written.
    """
    folder = Path(home).expanduser().absolute() if home else dagster_home(store)
    with storage_trouble(UPath(folder), "create"):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / "creating.lock"), storage_trouble(UPath(folder), "write"):
        claim_home(folder, project, store)
        settings = folder / "dagster.yaml"
        if not settings.exists():
            settings.write_text(DEFAULT_SETTINGS.read_text())
    return folder


def claim_home(home: Path, project: str, store: ArtifactStore) -> None:
    """Write down whose home a folder is, or refuse it if it is another project's.

    A project is known by its storage and its name. One that was moved together with its home has another root at the
    same relative place: that is accepted.

    Args:
        home: The folder; it is there.
        project: The project's name.
        store: Its artifacts.

    Raises:
        StorageError: The home belongs to another project, or cannot be written.
    """
    root = local_path(store.root)
    places = {"storage": str(root.absolute() if root else store.root)}
    if root:
        places["storage_from_here"] = os.path.relpath(root.absolute(), home)
    owner = {"project": project, **places}
    path = home / OWNER_FILE
    try:
        written = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        written = None
    if isinstance(written, dict) and not any(written.get(name) == value for name, value in places.items()):
        raise StorageError(
            f"This folder of Dagster's records belongs to another project, with its artifacts in "
            f"{written.get('storage')}; this project's are in {places['storage']}.",
            where=str(path),
            fix="unset DAGSTER_HOME (each project then has its own), or let it name another folder; if the other "
            "project is gone, remove the file",
        )
    if isinstance(written, dict) and written.get("project", project) != project:
        raise StorageError(
            f"These records of Dagster belong to another project of the same storage, {written['project']!r}; "
            f"this one is named {project!r}.",
            where=str(path),
            fix="give this project a `storage.root` of its own. If both files are one project, give them one `name`; "
            "if it was renamed, remove the file",
        )
    if written != owner:
        with storage_trouble(UPath(path), "write"):
            path.write_text(json.dumps(owner, indent=1) + "\n")


@contextmanager
def opened_records(
    project: str, store: ArtifactStore, home: str | os.PathLike[str] | None = None
) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance in the project's home, for as long as the block lasts; a locked database is waited for.

    Args:
        project: The project's name.
        store: Its artifacts.
        home: The folder; None: `dagster_home`.

    Raises:
        StorageError: The home is another project's; its `dagster.yaml` names a storage whose package is not installed;
            or a database stayed locked, and it says by whom.
    """
    folder = prepare_home(project, store, home)
    with _patient(folder):
        with exclusive_lock(folder / "creating.lock"):  # two first commands at once would both create Dagster's tables
            with _packages_of(folder):
                instance = open_instance(folder)
            instance.get_runs(limit=1)
            instance.get_asset_keys(limit=1)
        with instance:
            yield instance


@contextmanager
def _packages_of(home: Path) -> Iterator[None]:
    """Name the package that `dagster.yaml` wants and that is not installed."""
    try:
        yield
    except Exception as error:
        missing = next((cause for cause in _causes(error) if isinstance(cause, ModuleNotFoundError)), None)
        if missing is None or not missing.name:
            raise
        package = missing.name.partition(".")[0]
        raise StorageError(
            f"Dagster's records are to be kept with the Python package {package!r}, which is not installed.",
            where=str(home / "dagster.yaml"),
            fix=f"pip install {package.replace('_', '-')}, or take what names it out of the file",
        ) from error


@contextmanager
def _patient(home: Path) -> Iterator[None]:
    """Let every SQLite connection of this process wait for locks, and say who holds one that does not come free.

    Dagster gives up after five seconds in its databases of runs and schedules, and offers no setting for it.
    """

    def wait(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute(f"PRAGMA busy_timeout = {int(PATIENCE_SECONDS * 1000)}")

    event.listen(sqlalchemy.Engine, "connect", wait)
    try:
        yield
    except Exception as error:
        if isinstance(error, LessAssetsError) or not _says_locked(error):
            raise
        holders = lock_holders(home) or living_processes(home)
        raise StorageError(
            f"Dagster's records stayed locked for {PATIENCE_SECONDS:g} s; "
            + (
                f"in use by {'; '.join(holders)}"
                if holders
                else "by a process that is no run of less-assets, such as Dagster's UI"
            )
            + ".",
            where=str(home),
            fix="wait until it has ended, or end it; then repeat the command. On a network file system without locks, "
            "set DAGSTER_HOME to a local folder",
        ) from error
    finally:
        event.remove(sqlalchemy.Engine, "connect", wait)


def _says_locked(error: BaseException) -> bool:
    """Whether SQLite's complaint of a lock is at the bottom of an error."""
    return any(isinstance(cause, sqlite3.OperationalError) and "locked" in str(cause) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()  # an error that is raised again can be in its own chain
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
