"""Scoring and selecting over a large synthetic datastore: peak memory, and time against a bare matrix product.

    python benchmarks/scoring.py --rows 1000000 --checkpoints 1
    python benchmarks/scoring.py --rows 250000 --checkpoints 4

How to read it: `peak_gib` must not grow with `--rows`; `over_matmul` is the wall time of everything (reading, checking
CRC32C, decoding, scoring, writing score tables, selecting 5 %) divided by that of the float32 products alone, over
decoded blocks that already lie in memory, with as many directions (one form, one subtask rule). The pool's shards share
one artifact's bytes on disk, so the disk itself is not measured: add rows × bytes per row ÷ its rate where that is
slower.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import torch  # noqa: F401 - what computes is loaded before the clock starts

from less_assets.method.selection.influence import normalised_weights, score_shard, score_table, target_directions
from less_assets.method.selection.selection import Budget, Candidates, select_by_score
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.features import FeatureWriter, open_features
from less_assets.store.tables import read_parquet, write_parquet

SHARD_ROWS, BLOCK_ROWS, FORM, RULE = 8192, 512, "adamw", "mean_cosine"


def write_features(root: str, dimension: int, storage: str) -> None:
    """One shard of random features; all blocks but the first hold the same rows, rolled, to keep this short."""
    folder = ArtifactStore(root).artifact("gradients/shard", "0" * 16)
    writer = FeatureWriter(folder.path("features.zarr"), [FORM], SHARD_ROWS, dimension, storage, BLOCK_ROWS)
    rows = np.random.default_rng(0).standard_normal((BLOCK_ROWS, dimension), dtype=np.float32)
    for index in range(writer.blocks):
        ones = np.ones(BLOCK_ROWS)
        rows = np.roll(rows, 1, axis=1)
        norms = np.linalg.norm(rows, axis=1)
        block = SimpleNamespace(
            features={FORM: rows}, norms={FORM: norms}, loss=ones, loss_tokens=ones, status=0 * ones
        )
        writer.write_block(index, block)
    folder.seal(kind="train_gradients")


def score_and_select(root: str, rows: int, checkpoints: int, dimension: int, subtasks: int) -> dict[str, float]:
    """Seconds of scoring and of selecting."""
    store = ArtifactStore(root)
    names = [f"epoch-{number + 1}" for number in range(checkpoints)]
    rng = np.random.default_rng(1)
    labels = [f"subtask-{number}" for number in range(subtasks)]
    directions = {
        name: {
            ("task", RULE): target_directions(
                rng.standard_normal((3 * subtasks, dimension), dtype=np.float32), labels * 3, RULE
            )[1]
        }
        for name in names
    }
    weights = normalised_weights(dict.fromkeys(names, 1.0))
    started = time.perf_counter()
    shards = []
    for number in range(-(-rows // SHARD_ROWS)):
        sources = {name: open_features(store.artifact("gradients/shard", "0" * 16)) for name in names}
        scores = score_shard(sources, directions, weights, [FORM])["task"]
        index = np.arange(SHARD_ROWS)
        ids = pl.DataFrame(
            {
                "example_id": [f"{number * SHARD_ROWS + row:032x}" for row in index],
                "source": "pool",
                "shard": f"pool-{number:05d}",
                "row": index,
                "status": "ok",
                "canonical": True,
            }
        )
        with store.writing(f"scores/pool-{number:05d}", "0" * 16) as folder:
            write_parquet(folder, "scores.parquet", score_table(ids, scores))
            folder.seal(kind="influence_scores")
        shards.append(store.artifact(folder.key, folder.fingerprint))
    scored = time.perf_counter()
    pool = Candidates(
        "task", f"{FORM}.{RULE}", tuple(labels), lambda: (read_parquet(shard, "scores.parquet") for shard in shards)
    )
    chosen = select_by_score([pool], Budget("fraction", 0.05), "round_robin")
    finished = time.perf_counter()
    return {
        "scored_rows": len(shards) * SHARD_ROWS,
        "selected_rows": chosen.summary.rows,
        "score_s": scored - started,
        "select_s": finished - scored,
        "peak_gib": peak_gib(),
    }


def peak_gib() -> float:
    """Highest resident memory of this process so far; `ru_maxrss` would count the memory of whoever started it, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def bare_products(rows: int, checkpoints: int, dimension: int, subtasks: int) -> float:
    """Seconds of the float32 matrix products alone, block after block, all in memory."""
    rng = np.random.default_rng(2)
    blocks = [rng.standard_normal((BLOCK_ROWS, dimension), dtype=np.float32) for _ in range(4)]
    directions = rng.standard_normal((subtasks, dimension), dtype=np.float32)
    blocks[0] @ directions.T
    count = -(-rows // BLOCK_ROWS) * checkpoints
    started = time.perf_counter()
    for number in range(count):
        blocks[number % 4] @ directions.T
    return time.perf_counter() - started


def datastore_parser(description: str | None, *, rows: int, checkpoints: int) -> argparse.ArgumentParser:
    """Options of a synthetic datastore, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--checkpoints", type=int, default=checkpoints)
    parser.add_argument("--dimension", type=int, default=32768)
    parser.add_argument("--storage", default="int4")
    parser.add_argument("--write-only", metavar="ROOT", help=argparse.SUPPRESS)
    return parser


@contextmanager
def written_datastore(asked: argparse.Namespace, write: Callable[[str, int, str], None]) -> Iterator[str]:
    """A folder with features that a process of its own has written, so that its memory does not count."""
    if asked.write_only:
        write(asked.write_only, asked.dimension, asked.storage)
        sys.exit()
    with tempfile.TemporaryDirectory() as root:
        subprocess.run([sys.executable, *sys.argv, "--write-only", root], check=True)
        yield root


def main() -> None:
    """Run and print one line of JSON."""
    parser = datastore_parser(__doc__, rows=100_000, checkpoints=1)
    parser.add_argument("--subtasks", type=int, default=9)
    asked = parser.parse_args()
    with written_datastore(asked, write_features) as root:
        result = score_and_select(root, asked.rows, asked.checkpoints, asked.dimension, asked.subtasks)
    products = bare_products(result["scored_rows"], asked.checkpoints, asked.dimension, asked.subtasks)
    wall = result["score_s"] + result["select_s"]
    print(json.dumps({**vars(asked), **result, "matmul_s": products, "over_matmul": wall / products}, indent=1))


if __name__ == "__main__":
    main()
