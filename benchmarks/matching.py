"""Time and memory of `aggregate: match` over a large synthetic datastore, from stored sketches to the order of picks.

    python benchmarks/matching.py                        # 13,533 of 270,679 rows, 4 checkpoints, the default storage
    python benchmarks/matching.py --rows 20000 --checkpoints 2

How to read it: `select_s` is what a selection takes once the scores are there (reading the candidates' sketches,
folding them, all picks), `peak_gib` the memory of that process. It must stay under 5 minutes and 2 GiB on two cores.
The pool's shards share one artifact's bytes on disk, so the disk itself is not measured: add rows × bytes per row ÷ its
rate where that is slower. Rows are clustered, so that they repeat each other; scores are those of the written sketches.
Results go to `benchmarks/results/matching.json`.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch  # noqa: F401 - what computes is loaded before the clock starts

sys.path.insert(0, str(Path(__file__).parent))
from scoring import BLOCK_ROWS, FORM, SHARD_ROWS, datastore_parser, peak_gib, written_datastore

from less_assets.method.selection.influence import similarity_vectors
from less_assets.method.selection.matching import REACH, Limits, match, vector_dimension
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.features import FeatureWriter, open_features

CLUSTERS = 64
RESULTS = Path(__file__).parent / "results/matching.json"


def write_features(root: str, dimension: int, storage: str) -> None:
    """One shard of clustered features; all blocks but the first hold the same rows, rolled, to keep this short."""
    folder = ArtifactStore(root).artifact("gradients/shard", "0" * 16)
    writer = FeatureWriter(folder.path("features.zarr"), [FORM], SHARD_ROWS, dimension, storage, BLOCK_ROWS)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, dimension), dtype=np.float32)
    rows = (
        rng.standard_normal((BLOCK_ROWS, dimension), dtype=np.float32) + centres[rng.integers(0, CLUSTERS, BLOCK_ROWS)]
    )
    for index in range(writer.blocks):
        ones = np.ones(BLOCK_ROWS)
        rows = np.roll(rows, 1, axis=1)
        norms = np.linalg.norm(rows, axis=1)
        features = {FORM: rows}
        block = SimpleNamespace(features=features, norms={FORM: norms}, loss=ones, loss_tokens=ones, status=0 * ones)
        writer.write_block(index, block)
    folder.seal(kind="train_gradients")


def select(root: str, rows: int, checkpoints: int, dimension: int, share: float) -> dict[str, float]:
    """Fold the candidates of every shard and choose among them."""
    folder = ArtifactStore(root).artifact("gradients/shard", "0" * 16)
    names = [f"epoch-{number + 1}" for number in range(checkpoints)]
    weights = dict.fromkeys(names, 1 / checkpoints)
    rng = np.random.default_rng(1)
    budget = int(share * rows)
    # The two orders of candidates overlap little at worst: twice the reach.
    candidates = min(rows, int(2 * REACH * budget))
    chosen = np.sort(rng.choice(rows, candidates, replace=False))
    started = time.perf_counter()
    width = vector_dimension(candidates, checkpoints)
    vectors: np.ndarray | None = None
    done = 0
    for first in range(0, rows, SHARD_ROWS):
        of_shard = chosen[(chosen >= first) & (chosen < first + SHARD_ROWS)] - first
        sources = {name: open_features(folder) for name in names}
        found = similarity_vectors(sources, weights, FORM, of_shard, width)
        if vectors is None:
            vectors = np.empty((candidates, found.shape[1]), dtype=np.float32)
        vectors[done : done + len(found)] = found
        done += len(found)
    assert vectors is not None
    folded = time.perf_counter()
    target = vectors[:: max(1, candidates // 16)].mean(axis=0)
    influence = vectors @ target + 0.01 * rng.standard_normal(candidates)
    limits = Limits(np.ones(candidates, dtype=np.int64), budget, ["pool"] * candidates, {})
    matched = match(vectors, influence, limits)
    finished = time.perf_counter()
    assert len(set(matched.chosen)) == budget
    return {
        "rows": rows,
        "checkpoints": checkpoints,
        "dimension": dimension,
        "candidates": candidates,
        "selected": budget,
        "numbers_a_vector": vectors.shape[1],
        "fold_s": round(folded - started, 1),
        "match_s": round(finished - folded, 1),
        "select_s": round(finished - started, 1),
        "peak_gib": round(peak_gib(), 2),
        "cores": os.cpu_count() or 0,
    }


def main() -> None:
    """Run, print one line of JSON, and keep it if the design was the full one."""
    parser = datastore_parser(__doc__, rows=270_679, checkpoints=4)
    parser.add_argument("--share", type=float, default=0.05)
    asked = parser.parse_args()
    with written_datastore(asked, write_features) as root:
        result = select(root, asked.rows, asked.checkpoints, asked.dimension, asked.share)
    print(json.dumps(result))
    if len(sys.argv) == 1:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
