"""Gradient features by the rows of a shard, where a prefilter has left out some of them.

Belongs here: which rows have gradients, and the way from a row of the shard to its features. Not here: arrays and files
(`store/features.py`), and which rows a prefilter keeps (`steps/prefilter.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.method.selection.influence import SIMILARITY_DIMENSION, similarity_vectors
from less_assets.reading.files import FEATURES, KEPT
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.store.features import FeatureReader

PREFILTERED = "prefiltered"
"""Status of a usable row that the prefilter leaves out: never ranked, in the sample that has gradients or not."""


def kept_rows(lineage: Lineage, shard: str) -> pl.DataFrame | None:
    """The rows of a shard that have gradients, in order: `row`, and whether it is `sampled` only; None: all rows have.

    Args:
        lineage: Reads `kept_rows`.
        shard: Key of the shard.
    """
    if lineage.project.prefilter is None:
        return None
    return read_parquet(lineage.folder("kept_rows", shard), KEPT, ["row", "sampled"])


@dataclass(frozen=True)
class ShardFeatures:
    """Features of a shard at a checkpoint.

    Attributes:
        reader: The stored features, in the order of `numbers`.
        numbers: Row of the shard that each stored row is, int64, ascending; None: all rows are stored.
        rows: Rows of the shard.
    """

    reader: "FeatureReader"
    numbers: np.ndarray | None
    rows: int

    @classmethod
    def of(cls, lineage: Lineage, checkpoint: str, shard: str) -> "ShardFeatures":
        """Open what is stored.

        Raises:
            LessAssetsError: It is not there, stale or damaged.
        """
        from less_assets.store.features import open_features  # Zarr takes as long to load as a plan

        reader = open_features(lineage.folder("train_gradients", f"{checkpoint}|{shard}"), FEATURES)
        if (kept := kept_rows(lineage, shard)) is None:
            return cls(reader, None, reader.rows)
        return cls(reader, kept["row"].to_numpy(), int(lineage.summary("instruction_pool", shard)["rows"]))

    @property
    def status(self) -> np.ndarray:
        """Why each row of the shard has features or has none, `RowStatus` as uint8 (rows,)."""
        from less_assets.method.gradients.features import RowStatus

        if self.numbers is None:
            return self.reader.status
        status = np.full(self.rows, RowStatus.PREFILTERED, dtype=np.uint8)
        status[self.numbers] = self.reader.status
        return status

    @property
    def loss_tokens(self) -> pl.Series:
        """Loss tokens of each row of the shard, Int32; null for those that a prefilter left out."""
        stored = pl.Series("loss_tokens", self.reader.loss_tokens)
        if self.numbers is None:
            return stored
        empty = pl.Series("loss_tokens", [None], pl.Int32).new_from_index(0, self.rows)
        return empty.scatter(self.numbers, stored)

    def spread(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the stored rows (n, J) as those of the shard's rows (rows, J); NaN where nothing is stored."""
        if self.numbers is None:
            return scores
        whole = np.full((self.rows, scores.shape[1]), np.nan, dtype=scores.dtype)
        whole[self.numbers] = scores
        return whole

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of the shard, all of them with gradients, stand among the stored ones."""
        return rows if self.numbers is None else np.searchsorted(self.numbers, rows)

    def take(self, form: str, rows: np.ndarray) -> np.ndarray:
        """Features of rows of the shard that have gradients, float32 (n, k), in their order."""
        return self.reader.take(form, self.places(rows))  # type: ignore[arg-type]


def vectors_of_rows(
    lineage: Lineage,
    weights: Mapping[str, float],
    form: str,
    shard: str,
    rows: np.ndarray,
    dimension: int = SIMILARITY_DIMENSION,
) -> np.ndarray:
    """Vectors whose inner products tell how similar rows of a shard are to the training; see `similarity_vectors`.

    Args:
        lineage: Reads features.
        weights: Checkpoint -> normalised mean learning rate.
        form: Direction form.
        shard: Key of the shard.
        rows: Rows with gradients, int (n,), ascending.
        dimension: Numbers a row and checkpoint, at most.
    """
    features = {name: ShardFeatures.of(lineage, name, shard) for name in weights}
    places = next(iter(features.values())).places(rows)
    return similarity_vectors(
        {name: stored.reader for name, stored in features.items()}, weights, form, places, dimension
    )
