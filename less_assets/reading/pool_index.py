"""The pool's index, read shard by shard or looked up, never whole: it has a row for every usable row of the pool.

Belongs here: reading `pool_index` back. Not here: single rows and what they say (`rows.py`).
"""

from collections.abc import Iterator

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.reading.files import INDEX
from less_assets.store.tables import scan_parquet


class PoolIndex:
    """The index that is in force; its file is verified once.

    Args:
        lineage: Reads it.

    Attributes:
        rows: All rows, for whoever filters them.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.rows = scan_parquet(lineage.folder("pool_index"), INDEX)
        counted = self.rows.group_by("shard").len().collect(engine="streaming")
        counts = dict(counted.iter_rows())
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for shard in lineage.shards():
            self._places[shard] = (start, counts.get(shard, 0))
            start += counts.get(shard, 0)

    def shard(self, shard: str, columns: list[str] | None = None) -> pl.DataFrame:
        """A shard's rows, in their order; all columns by default."""
        rows = self.rows.slice(*self._places[shard])
        return (rows if columns is None else rows.select(columns)).collect()

    def tables(self) -> Iterator[pl.DataFrame]:
        """The rows of one shard after another, with the status "ok", as selections read them."""
        for shard in self._places:
            yield self.shard(shard).with_columns(pl.lit("ok").alias("status"))

    def of_ids(self, ids: pl.Series, columns: list[str]) -> pl.DataFrame:
        """Columns of the rows whose example is among some, in the index's order."""
        wanted = pl.LazyFrame({"example_id": ids.unique()})
        matched = self.rows.with_row_index("place").join(wanted, on="example_id", how="semi")
        return matched.collect(engine="streaming").sort("place").select(columns)
