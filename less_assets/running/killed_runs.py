"""Runs of `less-assets run` whose process was killed: Dagster is told, so that what they held is free again.

A killed process says nothing: its run stays "started", and its slot in a pool (`gpu`) stays taken, for which the next
run would wait for ever. Belongs here: telling killed from running processes, and clearing up after the killed ones.
Runs that Dagster's daemon has launched are the daemon's matter (`run_monitoring` in dagster.yaml).
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg

from less_assets.errors import StorageError
from less_assets.orchestration.dagster_internals import NOT_FINISHED_STATUSES
from less_assets.running.home_folder import PROCESSES_FOLDER

PROCESS_TAG = "less-assets/process"


@contextlib.contextmanager
def process_name(instance: dg.DagsterInstance) -> Iterator[str]:
    """A name for this process, for `PROCESS_TAG` of its runs; `report_killed_runs` knows by it whether it still lives.

    The name is that of a locked file in the instance's folder: the kernel gives the lock up when the process dies, on
    this machine or on a network file system.

    Raises:
        StorageError: The folder cannot be written.
    """
    name = uuid.uuid4().hex
    path = _folder(instance) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "wb")  # noqa: SIM115 - open as long as the process lives
    except OSError as error:
        fix = "Check free space and permissions of DAGSTER_HOME."
        raise StorageError(f"Cannot write Dagster's records: {error}", where=str(path), fix=fix) from error
    with stream:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv), "started": time.ctime()}
        stream.write(json.dumps(who).encode())
        stream.flush()
        with contextlib.suppress(OSError):  # a file system without locks: then nobody will take us for dead
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield name
        path.unlink(missing_ok=True)  # not after an error: its runs may be unfinished


def report_killed_runs(instance: dg.DagsterInstance, log: Callable[[str], object]) -> None:
    """Report runs of killed processes as failed and free their slots in pools.

    Args:
        instance: Dagster's records.
        log: Receives one line for each killed run.
    """
    folder = _folder(instance)
    dead = {path.name for path in folder.glob("*") if _is_dead(path)} if folder.is_dir() else set()
    if not dead:
        return
    unfinished = instance.get_runs(dg.RunsFilter(statuses=NOT_FINISHED_STATUSES))
    for run in unfinished:
        if run.tags.get(PROCESS_TAG) in dead:
            # In this order: if we are killed in between, the run is still unfinished and the next one comes here again.
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            instance.report_run_failed(run, "Its process was killed.")
            log(f"run {run.run_id[:8]} was killed; what it had finished is kept")
    for name in dead:
        (folder / name).unlink(missing_ok=True)


def living_processes(home: Path) -> list[str]:
    """Other processes that run the graph on a home and have not ended: pid, host, command, since when.

    Args:
        home: DAGSTER_HOME.
    """
    lines = []
    for path in sorted((home / PROCESSES_FOLDER).glob("*")):
        try:
            who = json.loads(path.read_text())
        except (OSError, ValueError):  # it has just ended, or began before this version
            continue
        if who["pid"] != os.getpid() and not _is_dead(path):
            lines.append(f"process {who['pid']} on {who['host']} ({who['command']}) since {who['started']}")
    return lines


def lock_holders(home: Path) -> list[str]:
    """Other processes of this machine that hold a database of a home for writing: pid, host, command.

    Only Linux tells that (`man 5 proc_locks`); elsewhere the list is empty.

    Args:
        home: DAGSTER_HOME.
    """
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    # SQLite locks the database, or with a write-ahead log the index of the log.
    inodes = {str(path.stat().st_ino) for pattern in ("*.db", "*.db-shm") for path in home.rglob(pattern)}
    writers = {
        lock[4] for lock in locks if lock[1] == "POSIX" and lock[3] == "WRITE" and lock[5].split(":")[2] in inodes
    }
    lines = []
    for pid in sorted(writers - {str(os.getpid())}, key=int):
        with contextlib.suppress(OSError):  # it has just ended
            command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            lines.append(f"process {pid} on {socket.gethostname()} ({command})")
    return lines


def _folder(instance: dg.DagsterInstance) -> Path:
    return Path(instance.root_directory) / PROCESSES_FOLDER


def _is_dead(path: Path) -> bool:
    """Whether nobody holds the lock of a process's file; False where that cannot be known."""
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
