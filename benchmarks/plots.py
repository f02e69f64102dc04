"""Pictures of `benchmarks/results/features.json` for docs/fidelity.md: nothing here measures or chooses anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from less_assets.method.gradients.quantization import bytes_per_row
from less_assets.report.charts import BLUE, GREY, GRID, INK, ORANGE, PAPER

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BITS = {"float16": "16 bits", "int4": "4 bits", "int1": "1 bit"}
# What issue 3 asks for: ratios of tokens/s, ours over the other side.
SPEED = {
    "features_over_training_step": "a LoRA training step",
    "over_bergson": "bergson (k 512)",
    "over_reference_way": "the reference's way",
}


def draw(results: dict[str, Any], folder: Path = IMAGES) -> list[Path]:
    """Draw what the results hold: fidelity over stored bytes, and speed over the other sides.

    Args:
        results: Content of `features.json`; sections may be missing.
        folder: Where the pictures go.

    Returns:
        The files written, SVG.
    """
    pictures = {"fidelity.svg": fidelity(results), "speed.svg": speed(results)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in pictures.items():
        if chart is not None:
            styled = chart.configure(background=PAPER, font="sans-serif").configure_axis(
                gridColor=GRID, labelColor=INK, titleColor=INK, domainColor=INK
            )
            styled.save(folder / name)
            written.append(folder / name)
            print(f"wrote {folder / name}")
    return written


def fidelity(results: dict[str, Any]) -> alt.Chart | None:
    """Spearman correlation and overlap of the top 5 % over KiB a row, a line per number of bits, a column per form."""
    measures = {"spearman": "Spearman", "top5": "overlap of the top 5 %"}
    rows = []
    for key, value in results.items():
        if found := re.fullmatch(r"grid_(\w+?)_(float16|int4|int1)_(\d+)_(spearman|top5)", key):
            form, storage, k, measure = found.groups()
            kib = bytes_per_row(storage, int(k)) / 1024
            rows.append(
                {"form": form, "stored in": BITS[storage], "KiB": kib, "measure": measures[measure], "value": value}
            )
    if not rows:
        return None
    table = pl.DataFrame(rows)
    low = max(0.0, float(table["value"].to_numpy().min()) - 0.05)
    base = alt.Chart(table).encode(
        x=alt.X("KiB:Q", scale=alt.Scale(type="log", base=2), title="KiB a row, form and checkpoint"),
        y=alt.Y("value:Q", scale=alt.Scale(domain=[low, 1.0]), title=None),
        color=alt.Color("stored in:N", scale=alt.Scale(domain=list(BITS.values()), range=[GREY, BLUE, ORANGE])),
        shape=alt.Shape("stored in:N", scale=alt.Scale(domain=list(BITS.values()))),
    )
    marks = alt.layer(base.mark_line(), base.mark_point(size=60, filled=True)).properties(width=250, height=160)
    return marks.facet(
        column=alt.Column("form:N", title=None),
        row=alt.Row("measure:N", title=None, sort=list(measures.values())),
    )


def speed(results: dict[str, Any]) -> alt.Chart | None:
    """Tokens/s of features over those of the other sides, on a logarithmic axis."""
    rows = [
        {"against": name, "times": results[key], "label": f"{results[key]:.2f}×"}
        for key, name in SPEED.items()
        if results.get(key)
    ]
    if not rows:
        return None
    base = alt.Chart(pl.DataFrame(rows)).encode(y=alt.Y("against:N", sort=list(SPEED.values()), title=None))
    axis = alt.X("times:Q", scale=alt.Scale(type="log"), title="tokens/s of features at k 8192, ours ÷ theirs")
    even = alt.Chart(pl.DataFrame({"times": [1.0]})).mark_rule(color=INK, strokeDash=[5, 3]).encode(x="times:Q")
    points = base.mark_point(color=BLUE, size=90, filled=True).encode(x=axis)
    labels = base.mark_text(align="left", dx=9, color=INK).encode(x=axis, text="label:N")
    return alt.layer(points, labels, even).properties(width=420, height=90)
