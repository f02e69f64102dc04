"""What artifacts took: seconds of computing and tokens through a model, as recorded when they were made.

Belongs here: keeping those seconds, and adding up what an artifact and everything below it took. Seconds lie beside the
artifacts and never in them: equal work has equal bytes, but not equal times.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from less_assets.lineage.lineage import Lineage
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import read_bytes, write_atomically


@dataclass(frozen=True)
class Cost:
    """What artifacts took.

    Attributes:
        minutes: Minutes of computing, those of attempts that failed included; None if they were not recorded for all.
        tokens: Tokens that went through a model, forward or forward and backward, without padding.
    """

    minutes: float | None
    tokens: int


@contextmanager
def timed(store: ArtifactStore, asset: str, fingerprint: str) -> Iterator[None]:
    """Add the seconds that the body takes, also if it fails, to those on record for an artifact.

    Args:
        store: Where artifacts are kept.
        asset: The asset.
        fingerprint: The artifact's.
    """
    started = time.monotonic()
    try:
        yield
    finally:
        add_seconds(store, asset, fingerprint, time.monotonic() - started)


def add_seconds(store: ArtifactStore, asset: str, fingerprint: str, seconds: float) -> None:
    """Add seconds to those on record for an artifact."""
    total = (seconds_of(store, asset, fingerprint) or 0.0) + seconds
    write_atomically(store.root / _file(asset, fingerprint), json.dumps({"seconds": round(total, 3)}).encode())


def seconds_of(store: ArtifactStore, asset: str, fingerprint: str) -> float | None:
    """Seconds spent on an artifact; None if there is no (readable) record."""
    try:
        return float(json.loads(read_bytes(store.root / _file(asset, fingerprint)))["seconds"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _file(asset: str, fingerprint: str) -> str:
    return f"timings/{asset}/{fingerprint}.json"


def cost_of(lineage: Lineage, asset: str, partition: str | None) -> Cost:
    """What one artifact took; it must be fresh."""
    return _sum(lineage, [(asset, partition)])


def cost_with_inputs(lineage: Lineage, asset: str, partition: str | None) -> Cost:
    """What an artifact and all that it was made from took, each counted once; they must be fresh."""
    seen: set[tuple[str, str | None]] = set()
    waiting = [(asset, partition)]
    while waiting:
        artifact = waiting.pop()
        if artifact not in seen:
            seen.add(artifact)
            names = (name.partition("/") for name in lineage.fresh(*artifact).inputs)
            waiting += [(upstream, key or None) for upstream, _, key in names if upstream in lineage.declarations]
    return _sum(lineage, sorted(seen, key=str))


def _sum(lineage: Lineage, artifacts: list[tuple[str, str | None]]) -> Cost:
    manifests = [lineage.fresh(*artifact) for artifact in artifacts]
    seconds = [seconds_of(lineage.store, manifest.kind, manifest.fingerprint) for manifest in manifests]
    tokens = sum(count for manifest in manifests if isinstance(count := manifest.summary.get("tokens"), int))
    known = [value for value in seconds if value is not None]
    return Cost(sum(known) / 60 if len(known) == len(seconds) else None, tokens)
