"""What the reliability tests share: a finished tiny run whose readers are known."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import FinishedRun

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def finished(tiny_model) -> Iterator[FinishedRun]:
    """A finished run; tests leave it as they found it."""
    place = Path(tempfile.mkdtemp(prefix="less-finished-", dir=MEMORY if MEMORY.is_dir() else None))
    yield FinishedRun(place, tiny_model)
    shutil.rmtree(place)
