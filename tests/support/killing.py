"""Kills a run of a tiny project again and again, goes on with the same command, compares with an undisturbed run.

Belongs here: the project, the processes and the comparison. How often, and where results go: `test_kills.py` (a few
kills) and `soak.py` (hundreds).

An attempt is `less-assets run` in a process of its own, in a session of its own, and SIGKILL goes to the whole process
group. Importing takes ten times as long as what is to be killed, so attempts are forked from a process that has only
imported (`serve`): no thread runs in it and nothing has been computed, so a fork is what a fresh process is after its
imports. What a fork cannot show is a kill during the imports, which write nothing; `fresh=True` starts a real process
for comparison.
"""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from support.tiny import TinyProject

ROOT = Path(__file__).parents[2]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}
# Where results say how many minutes they took.
RESULTS = ("evaluation/tasks/", "evaluation/leaderboard/")
HANG_SECONDS = 600.0  # at idle priority on a busy machine


def dagster_settings(home: Path) -> str:
    """The project's `dagster.yaml` with one database for the events of all runs instead of one a run.

    Setting those up would take most of a tiny run's time.
    """
    storage = {"module": "dagster._core.storage.event_log", "class": "ConsolidatedSqliteEventLogStorage"}
    settings = yaml.safe_load((ROOT / "less_assets/running/dagster.yaml").read_text())
    return yaml.safe_dump(settings | {"event_log_storage": {**storage, "config": {"base_dir": str(home)}}})


def small_project(folder: Path, model: Path) -> TinyProject:
    """A project with every asset, two of every axis but tasks: seconds from nothing to the leaderboard."""
    project = TinyProject(folder, model)
    project.settings["pool"]["shard_size"] = 32
    project.settings["tasks"] = project.settings["tasks"][:1]
    project.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.2, "rescore": "exact"},
        {"name": "base", "strategy": "none"},
    ]
    project.settings["gradients"]["token_budget"] = 512
    project.settings["finetuning"]["epochs"] = 2
    return project


# ---- the process that is killed ----


def run_command(folder: Path, say: int, stop_at: int | None, blocking: bool) -> None:
    """In a forked process: run the command, say through a pipe when storage event `stop_at` comes, and leave.

    Args:
        folder: The project's folder; events below it count.
        say: File descriptor that receives one byte at the event, or the number of all events at the end.
        stop_at: Which event; None only counts.
        blocking: Wait there to be killed, so that the event does not happen.
    """
    os.setsid()
    seen = 0
    below = f"{folder}{os.sep}artifacts{os.sep}"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not arguments:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(below):
            seen += 1
            if seen == stop_at:
                os.write(say, b"!")
                if blocking:
                    signal.pause()

    sys.addaudithook(watch)
    with open(folder / "run.log", "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["DAGSTER_HOME"] = str(folder / "home")
    os.environ["PYTHONUNBUFFERED"] = "1"
    code = 1
    try:
        from less_assets.cli import app

        app(["run", "--project", str(folder / "project.yaml")], standalone_mode=False)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException as error:
        # Typer's Exit in this mode, or a bug: both belong into the log.
        code = int(getattr(error, "exit_code", 99))
        if code == 99:
            import traceback

            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(say, f"={seen}\n".encode())
        os._exit(code)


def serve(requests: Any, replies: Any) -> None:
    """Import everything once, then fork an attempt for every line of JSON; replies are lines of JSON too.

    A request is {folder, stop_at, blocking, after, seed}: SIGKILL comes `after` seconds after event `stop_at`, or, if
    that is null, after the start; if both are null, never. A reply is {code, events, killed}.
    """
    _import_everything()
    assert threading.active_count() == 1, [thread.name for thread in threading.enumerate()]
    tasks = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else ["1"]
    print(json.dumps({"ready": True, "threads": len(tasks)}), file=replies, flush=True)
    for line in requests:
        asked = json.loads(line)
        if "at_once" in asked:
            print(
                json.dumps({"codes": _run_at_once(Path(asked["folder"]), asked["at_once"])}), file=replies, flush=True
            )
            continue
        hear, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hear)
            run_command(Path(asked["folder"]), say, asked["stop_at"], asked["blocking"])
        os.close(say)
        reply = _watch(child, hear, asked["stop_at"] is not None, asked["after"])
        os.close(hear)
        print(json.dumps(reply), file=replies, flush=True)


def _run_at_once(folder: Path, processes: int) -> list[int]:
    """Exit statuses of several processes that run the same command at the same time."""
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            run_command(folder, os.open(os.devnull, os.O_WRONLY), None, blocking=False)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _watch(child: int, hear: int, at_event: bool, after: float | None) -> dict[str, Any]:
    """Kill the child's whole process group when its time has come; what became of it."""
    started, heard, killed, deadline = time.monotonic(), b"", False, None
    if after is not None and not at_event:
        deadline = started + after
    while True:
        now = time.monotonic()
        if now - started > HANG_SECONDS:
            deadline, killed = now, True
        if deadline is not None and now >= deadline:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:  # before its setsid
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        wait = 0.5 if deadline is None else max(0.0, min(0.5, deadline - now))
        ready, _, _ = select.select([hear], [], [], wait)
        if ready:
            piece = os.read(hear, 100)
            heard += piece
            if piece.startswith(b"!") and after is not None:
                deadline = time.monotonic() + after
            if not piece:
                break
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    events = int(heard.partition(b"=")[2] or -1)
    return {"code": code, "events": events, "hung": killed, "seconds": time.monotonic() - started}


def _import_everything() -> None:
    """What a run imports on its way, so that forks need not; nothing is computed."""
    import accelerate  # noqa: F401
    import altair  # noqa: F401
    import dagster  # noqa: F401
    import peft  # noqa: F401
    import polars  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    import vl_convert  # noqa: F401
    import zarr  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401


# ---- the process that kills ----


@dataclass
class Tally:
    """What has been survived so far; `lost` and `failures` must stay empty."""

    kills: int = 0
    runs: int = 0
    by_asset: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Killer:
    """A tiny project, an undisturbed run of it, and campaigns of kills against copies.

    Args:
        place: An empty folder of its own, best in memory.
        model: The tiny model's folder.
        consolidated: One database for Dagster's events; False takes the project's own `dagster.yaml`.
    """

    def __init__(self, place: Path, model: Path, *, consolidated: bool = True) -> None:
        self.place, self.live, self.kept = place, place / "live", place / "kept"
        home = self.live / "home"
        home.mkdir(parents=True)
        small_project(self.live, model).path  # noqa: B018 - written as it is read
        if consolidated:
            (home / "dagster.yaml").write_text(dagster_settings(home))
        shutil.copytree(self.live, self.kept)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "POLARS_MAX_THREADS": "1"}
        self._environment = environment
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self._server.stdout is not None
        ready = self._server.stdout.readline()
        self.threads = json.loads(ready or '{"threads": -1}')["threads"]
        reply = self.attempt()
        if reply["code"] != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{self.log()}")
        self.events, self.seconds = int(reply["events"]), float(reply["seconds"])
        self.expected = stored_files(self.live / "artifacts")

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def attempt(
        self, *, stop_at: int | None = None, blocking: bool = False, after: float | None = None
    ) -> dict[str, Any]:
        """One run of the command, killed as asked; see `serve`."""
        return self._ask(stop_at=stop_at, blocking=blocking, after=after)

    def at_once(self, processes: int) -> list[int]:
        """Exit statuses of several runs of the command at the same time."""
        return self._ask(at_once=processes)["codes"]

    def _ask(self, **asked: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"folder": str(self.live), **asked}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def attempt_afresh(self, after: float) -> int:
        """One run of the command in a process that nobody has prepared, killed after some seconds; its exit status."""
        command = [sys.executable, "-m", "less_assets.cli", "run", "--project", str(self.live / "project.yaml")]
        environment = {**self._environment, "DAGSTER_HOME": str(self.live / "home")}
        with open(self.live / "run.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            try:
                return process.wait(after)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait()

    def reset(self) -> None:
        """Back to before the first run, at the same path and with the same time stamps."""
        shutil.rmtree(self.live)
        shutil.copytree(self.kept, self.live)

    def log(self) -> str:
        """What the attempts have printed since the reset."""
        file = self.live / "run.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def asset(self) -> str:
        """What the last attempt was working on when it ended, by its log."""
        assets = [line[10:].partition(": ")[0] for line in self.log().splitlines() if " to make" in line]
        return assets[-1] if assets else "before the first asset"

    def campaign(self, seed: int, tally: Tally, kills: int | None = None, fresh: bool = False) -> None:
        """Kill one run at random moments until it is through, then compare everything.

        Half of the kills come exactly before a storage event (a file created, renamed, removed), a quarter within
        50 ms after one, a quarter at a moment drawn evenly over the run's time.

        Args:
            seed: Of the moments.
            tally: Is counted up.
            kills: Stop killing after so many; None kills until an attempt outruns its killer.
            fresh: Let every attempt be a process that nobody has prepared.
        """
        draw = random.Random(seed)
        self.reset()
        done = 0
        while kills is None or done < kills:
            before = sealed(self.live / "artifacts")
            place = draw.randint(1, max(2, self.events // 8))
            how = draw.choice(["before", "before", "after", "moment"])
            if fresh:
                code = self.attempt_afresh(draw.uniform(0.3, 3) * max(10.0, self.seconds))
                reply = {"code": code, "hung": False}
            elif how == "moment":
                reply = self.attempt(after=draw.uniform(0, self.seconds / 3))
            else:
                delay = 0.0 if how == "before" else draw.uniform(0, 0.05)
                reply = self.attempt(stop_at=place, blocking=how == "before", after=delay)
            tally.runs += 1
            tally.lost += [f"seed {seed}: {name}" for name in _lost(before, sealed(self.live / "artifacts"))]
            if reply["hung"]:
                tally.failures.append(
                    f"seed {seed}: an attempt did not end within {HANG_SECONDS:.0f} s ({self.asset()})"
                )
                return
            if reply["code"] == 0:
                break
            if reply["code"] != -signal.SIGKILL:
                tally.failures.append(f"seed {seed}: status {reply['code']}\n{self.log()[-4000:]}")
                return
            tally.kills, done = tally.kills + 1, done + 1
            tally.by_asset[self.asset()] = tally.by_asset.get(self.asset(), 0) + 1
        before = sealed(self.live / "artifacts")
        reply = self.attempt()
        tally.lost += [f"seed {seed}: {name}" for name in _lost(before, sealed(self.live / "artifacts"))]
        if reply["code"] != 0:
            tally.failures.append(f"seed {seed}: status {reply['code']} undisturbed\n{self.log()[-4000:]}")
            return
        tally.failures += [f"seed {seed}: {each}" for each in differences(self.expected, self.live / "artifacts")]


def stored_files(root: Path) -> dict[str, bytes]:
    """All that counts in a store: artifacts, records of what is in force, the ledger.

    Not: locks, leftovers, caches, and how long things took. Results name minutes, so of their tables all other columns
    are taken, and of their manifests all but the digests of those files.
    """
    found = {}
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root).as_posix()
        passing = name.startswith(("cache/", "timings/", "rates.json")) or name.endswith(".lock") or ".partial" in name
        if file.is_file() and not passing:
            found[name] = _without_minutes(file) if name.startswith(RESULTS) else file.read_bytes()
    return found


def _without_minutes(file: Path) -> bytes:
    if file.suffix == ".parquet":
        table = pl.read_parquet(file)
        return table.drop([name for name in table.columns if name.endswith("minutes")]).write_json().encode()
    if file.name == "manifest.json":
        content = json.loads(file.read_bytes())
        return json.dumps({key: content[key] for key in content if key not in ("files", "manifest_digest")}).encode()
    return b"" if file.suffix == ".md" else file.read_bytes()


def differences(expected: dict[str, bytes], root: Path) -> list[str]:
    """How the files of a store differ from those of the undisturbed run."""
    found = stored_files(root)
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} is too many" for name in found.keys() - expected.keys()]
    lines += [f"{name} has other bytes" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return sorted(lines)


def sealed(root: Path) -> dict[str, int]:
    """Every finished artifact by its manifest, and when that was written."""
    return {file.relative_to(root).as_posix(): file.stat().st_mtime_ns for file in root.rglob("manifest.json")}


def _lost(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Finished artifacts that are gone, or were made again although they were finished."""
    return [
        f"{name} {'was made again' if name in after else 'is gone'}"
        for name, stamp in before.items()
        if after.get(name) != stamp and ".partial" not in name
    ]


if __name__ == "__main__":
    # The pipe to the parent must not be written to by anything that prints.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies)
