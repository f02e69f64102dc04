"""How far a selection's scores can be trusted, as the page and its labels need it.

Belongs here: what a page takes from a certificate. Not here: measuring it (`assets/fidelity.py`) or reading it
(`certificates.py`).
"""

from dataclasses import dataclass

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.reading.certificates import judge_selection


def percent(share: float) -> str:
    """A share as the page writes it."""
    return f"{100 * share:.0f} %"


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


def certificate_of(lineage: Lineage, key: str, selected: pl.DataFrame) -> Certificate | None:
    """What the certificate of the scores in force says of a selection; None if there is none that covers it.

    Args:
        lineage: The project's lineage.
        key: Partition key `recipe|task`.
        selected: The subset as stored.
    """
    judged = judge_selection(lineage, key, selected)
    if judged is None:
        return None
    bands = [band for band in judged.bands if band is not None]
    whole = bool(judged.bands) and len(bands) == len(judged.bands)
    text = (
        f"By the certificate of the scores, exact scores would select {percent(judged.overlap)} of these rows, too. "
        "A certain row is one of which that holds with a chance of 95 % or more."
    )
    return Certificate(judged.table, max(bands) if whole else None, text)
