"""Sides of a comparison: processes that wait for their turn.

Belongs here: starting a side, telling it to work, and the tree of an earlier commit for it. Not here: what a side does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LANDED = "b31d571"
"""The commit that today's figures are compared with."""


class Side:
    """A process that works when it is told to, and answers with JSON.

    Args:
        command: Arguments of Python; the process calls `serve`.
        environment: Its whole environment.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid
        self._answer()

    def __call__(self) -> Any:
        """What one turn answers."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("a side has ended: see what it printed")
        return json.loads(line)


def serve(turn: Callable[[], Any]) -> None:
    """Take one turn to get warm, then one for every line that comes in."""
    turn()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def one_thread(tree: Path) -> dict[str, str]:
    """Environment of a side that runs the package of a tree on one thread."""
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def tree_of(commit: str, folder: Path, *paths: str) -> Path:
    """Files of the repository at a commit, by default the package, written into a folder."""
    wanted = ["git", "archive", commit, *(paths or ("less_assets",))]
    archive = subprocess.run(wanted, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder
