"""Which rows of a pool are copies of others, in memory that does not grow with the pool.

Belongs here: counting equal ids over rows that lie on the disk. Not here: what makes two rows equal (conversations.py).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

IDS_AT_ONCE = 2_000_000
"""About so many ids are in memory at a time, some hundred bytes each."""


def mark_copies(parts: Iterable[pl.DataFrame], folder: Path, ids_at_once: int = IDS_AT_ONCE) -> pl.LazyFrame:
    """Add to rows how often their example is there, and whether they are the first of its copies.

    Args:
        parts: Rows of the pool with the column `example_id`, in order; one part is in memory at a time.
        folder: A folder on this machine that the result is read from; it takes what the rows take.
        ids_at_once: How many ids may be in memory.

    Returns:
        All rows with `copies` Int64 and `canonical` Boolean; they are read where they are asked for.
    """
    files: list[Path] = []
    ends = [0]
    for number, part in enumerate(parts):
        files.append(folder / f"{number:06d}.arrow")
        part.write_ipc(files[-1])
        ends.append(ends[-1] + part.height)
    copies = np.memmap(folder / "copies", np.int64, "w+", shape=max(1, ends[-1]))
    canonical = np.memmap(folder / "canonical", np.bool_, "w+", shape=max(1, ends[-1]))
    buckets = max(1, -(-ends[-1] // ids_at_once))
    for bucket in range(buckets):  # equal ids are in one bucket
        of_bucket = pl.col("example_id").hash() % buckets == bucket
        ids = pl.concat(
            pl.read_ipc(file, columns=["example_id"]).with_row_index("place", start).filter(of_bucket)
            for file, start in zip(files, ends[:-1], strict=True)
        ).with_columns(
            pl.len().over("example_id").alias("copies"), pl.col("example_id").is_first_distinct().alias("first")
        )
        copies[ids["place"].to_numpy()] = ids["copies"].to_numpy()
        canonical[ids["place"].to_numpy()] = ids["first"].to_numpy()
    marked = [file.with_suffix(".marked.arrow") for file in files]
    for file, start, end, target in zip(files, ends[:-1], ends[1:], marked, strict=True):
        marks = pl.Series("copies", copies[start:end]), pl.Series("canonical", canonical[start:end])
        pl.read_ipc(file).with_columns(*marks).write_ipc(target)
        file.unlink()
    return pl.scan_ipc(marked)
