"""`make soak`: hundreds of kills, thousands of storage faults, two million strange inputs; hours, to be left alone.

Belongs here: how often, and where results go: `benchmarks/results/soak.json`, written after every step. Interrupted, it
goes on from there; once all is done, the next start begins anew. What is done each time: `killing.py`, `faults.py`,
`fuzz.py`, `fuzz_conversations.py` with the rows of `odd_rows.py`.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

RESULTS = ROOT / "benchmarks/results/soak.json"
MEMORY = Path("/dev/shm")
BATCH = 2_000
NUMBERS = 4_000  # files of conversations that one process tries
FRESH_EVERY = 10  # campaigns between two whose processes are not forked
DEFAULT_RECORDS_EVERY = 4  # campaigns between two with Dagster's default of one database a run
HEADROOM_BYTES = 2 << 30
SILENCE_SECONDS = 1200.0


class Progress:
    """The results so far, on disk after every change."""

    def __init__(self, path: Path, targets: dict[str, int]) -> None:
        self.path, self.targets = path, targets
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if not self.found or all(self.found.get(name, 0) >= target for name, target in targets.items()):
            self.found = {"kills": 0, "faults": 0, "inputs": 0, "lost": 0, "failures": [], "seconds": 0.0}
            self.found |= {"campaigns": 0, "rounds": 0, "kills_by_asset": {}, "inputs_by_reader": {}, "commits": {}}
        self.found |= {"python": platform.python_version()}
        self.found.setdefault("conversations", 0)
        self.found.setdefault("conversation_files", 0)
        self.found.setdefault("conversations_by_outcome", {})
        self._commit = _commit()
        self._since = time.monotonic()

    def open(self, name: str) -> bool:
        """Whether a target has not been reached."""
        return self.found[name] < self.targets[name]

    def save(self, name: str) -> None:
        """Write the results, atomically, with the commit at which something was done for a target."""
        commits = self.found["commits"].setdefault(name, [])
        if self._commit not in commits:
            commits.append(self._commit)
        now = time.monotonic()
        self.found["seconds"], self._since = round(self.found["seconds"] + now - self._since, 1), now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")
        os.replace(partial, self.path)
        done = ", ".join(f"{self.found[name]:,} of {self.targets[name]:,} {name}" for name in self.targets)
        failures = len(self.found["failures"])
        print(f"{time.strftime('%H:%M:%S')}  {done}; {self.found['lost']} lost, {failures} failures", flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix=f"less-soak-{name}-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def tiny_model(place: Path) -> Path:
    """The model of the end-to-end tests, made in a process of its own: torch must not start threads in this one."""
    code = (
        "import sys; from conftest import make_tiny_model; from pathlib import Path; make_tiny_model(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code, str(place)], env=environment, check=True)
    return place


def kill_runs(progress: Progress) -> None:
    """Campaigns of kills until there were enough of them."""
    from support.killing import Killer, Tally

    with _folder("kills") as place:
        model = tiny_model(place / "model")
        killers: dict[bool, Killer] = {}
        try:
            while progress.open("kills"):
                campaign = progress.found["campaigns"]
                consolidated = campaign % DEFAULT_RECORDS_EVERY != DEFAULT_RECORDS_EVERY - 1
                if consolidated not in killers:
                    folder = place / ("consolidated" if consolidated else "default")
                    folder.mkdir()
                    killers[consolidated] = Killer(folder, model, consolidated=consolidated)
                tally = Tally()
                killers[consolidated].campaign(campaign, tally, fresh=campaign % FRESH_EVERY == FRESH_EVERY - 1)
                found = progress.found
                found["campaigns"] += 1
                found["kills"] += tally.kills
                found["lost"] += len(tally.lost)
                found["failures"] += tally.failures + [f"lost: {each}" for each in tally.lost]
                for asset, count in tally.by_asset.items():
                    found["kills_by_asset"][asset] = found["kills_by_asset"].get(asset, 0) + count
                progress.save("kills")
        finally:
            for killer in killers.values():
                killer.close()


def damage_files(progress: Progress) -> None:
    """Rounds of damage to every kind of file, at other places each time, and a repair after some of them."""
    from support.faults import DAMAGES, FinishedRun, full_disk, judge, kept_or_repaired

    from less_assets.errors import StorageError

    with _folder("faults") as place:
        (place / "run").mkdir()
        place.chmod(0o755)
        finished = FinishedRun(place / "run", tiny_model(place / "model"))
        while progress.open("faults"):
            found = progress.found
            draw = random.Random(found["rounds"])
            for kind in finished.kinds:
                for damage in DAMAGES:
                    try:
                        judge(finished, kind, damage, draw.random())
                    except Exception as error:
                        found["failures"].append(f"{damage} {kind.name}: {type(error).__name__}: {error}"[:2000])
                    found["faults"] += 1
            for step in finished.steps.values():
                largest = draw.choice([0, 50, 500, 2000, 5000])
                with full_disk(largest):
                    try:
                        error = finished.read_by(step)
                    except Exception as trouble:
                        error = trouble
                if not isinstance(error, StorageError | None):
                    found["failures"].append(f"disk full at {largest} bytes, {step.name}: {error!r}"[:2000])
                found["faults"] += 1
            kind = draw.choice([kind for kind in finished.kinds if kind.asset])
            data = kind.file.read_bytes()
            kind.file.write_bytes(data[: int(draw.random() * len(data))])
            if wrong := kept_or_repaired(finished):
                found["lost"] += len(wrong)
                found["failures"].append(f"not repaired after damage to {kind.name}: {wrong[:5]}")
            finished.restore()
            found["faults"], found["rounds"] = found["faults"] + 1, found["rounds"] + 1
            progress.save("faults")


def try_inputs(progress: Progress) -> None:
    """Batches of strange inputs, reader after reader, each batch in a process with bounded memory."""
    from support import fuzz

    names = list(fuzz.properties())
    fuzz.clear_scratch()
    counts = progress.found["inputs_by_reader"]
    while progress.open("inputs"):
        name = min(names, key=lambda each: counts.get(each, 0))
        target = -(-progress.targets["inputs"] // len(names))
        batches = max(1, min(10, -(-(target - counts.get(name, 0)) // BATCH)))
        seed, printed = counts.get(name, 0), ["0"]
        trouble = _worker(name, seed, batches, printed.append)
        done = int(printed[-1])
        trouble = trouble and f"after input {seed + done}: {trouble}"
        counts[name] = seed + max(done, 1)
        progress.found["inputs"] = sum(counts.values())
        if trouble:
            progress.found["failures"].append(f"{name}: {trouble}")
        progress.save("inputs")


def try_conversations(progress: Progress) -> None:
    """Files of conversations of known meaning, each worker with the numbers that follow."""

    def on_file(line: str) -> None:
        found["conversation_files"] += 1
        for outcome, rows in json.loads(line).items():
            found["conversations_by_outcome"][outcome] = found["conversations_by_outcome"].get(outcome, 0) + rows
            found["conversations"] += rows
        if found["conversation_files"] % 20 == 0:
            progress.save("conversations")

    found = progress.found
    while progress.open("conversations"):
        wanted = progress.targets["conversations"] - found["conversations"]
        if trouble := _worker("conversations", found["conversation_files"], min(NUMBERS, -(-wanted // 50)), on_file):
            found["failures"].append(f"conversations: {trouble}")
            found["conversation_files"] += 1
        progress.save("conversations")


def _worker(name: str, seed: int, batches: int, on_line: Callable[[str], object]) -> str:
    """Let a worker process try inputs; `on_line` is told what it prints. What went wrong, or nothing."""
    command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), "--batches", str(batches)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        watch = _watchdog(process)
        for line in process.stdout:
            watch.cancel()
            on_line(line)
            watch = _watchdog(process)
        watch.cancel()
        if process.wait() == 0:
            return ""
        errors.seek(0)
        return f"status {process.returncode}: {errors.read()[-3000:]}"


def _watchdog(process: "subprocess.Popen[str]") -> threading.Timer:
    """Kills a worker that says nothing for long: a reader that hangs."""
    timer = threading.Timer(SILENCE_SECONDS, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def work(name: str, seed: int, batches: int) -> None:
    """In a worker: try batches of inputs on one reader; prints how many after each, or what came of a file's rows."""
    if name == "conversations":
        _converse(seed, batches)
        return
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from support import fuzz

    found = fuzz.properties()[name]
    found.check(_example(found.inputs))  # imports come before the limit
    _limit_memory()
    tried = 0

    def check(each: Any) -> None:
        nonlocal tried
        tried += 1
        found.check(each)

    run = settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    try:
        for batch in range(batches):
            seeded(seed + batch)(run(given(found.inputs)(check)))()
            print(tried, flush=True)
    finally:
        fuzz.clear_scratch()


def _converse(first: int, numbers: int) -> None:
    from support import fuzz, fuzz_conversations

    fuzz_conversations.check(first)  # imports come before the limit
    _limit_memory()
    try:
        for number in range(first, first + numbers):
            print(json.dumps(fuzz_conversations.check(number)), flush=True)
    finally:
        fuzz.clear_scratch()


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM_BYTES, resource.RLIM_INFINITY))


def _example(strategy: Any) -> Any:
    from hypothesis import find, settings

    return find(strategy, lambda _: True, settings=settings(database=None, max_examples=5))


def main() -> int:
    """Run what is asked for; status 1 if anything was lost or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--faults", type=int, default=4_000)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--conversations", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if asked.worker:
        work(asked.worker, asked.seed, asked.batches)
        return 0
    targets = {name: getattr(asked, name) for name in ("kills", "faults", "inputs", "conversations")}
    progress = Progress(asked.results, targets)
    kill_runs(progress)
    try_inputs(progress)
    try_conversations(progress)
    damage_files(progress)
    for failure in progress.found["failures"]:
        print(f"\n{failure}")
    return 1 if progress.found["failures"] or progress.found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
