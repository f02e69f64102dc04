"""How far a selection's scores can be trusted, as the page and its labels need it.

Belongs here: the certificate as data, and which rows it makes certain. Not here: measuring it.
"""

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class Certificate:
    """What a certificate says about one selection.

    Attributes:
        rows: One row per selected row: example_id, chance (that exact scores would select it, too), certain.
        band: A selected row nearer to the cut than this may be borderline; None where every row may.
        text: What was measured, in a sentence.
    """

    rows: pl.DataFrame
    band: float | None
    text: str

    def judge(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows with columns `chance` and `certain`, null for rows that it does not speak of."""
        judged = self.rows.select("example_id", "chance", "certain")
        return rows.join(judged, on="example_id", how="left", maintain_order="left")
