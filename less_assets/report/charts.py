"""Small charts: one function a chart; PNG bytes for Dagster's metadata and documents, SVG for the selection report.

Belongs here: drawing what others have computed. Every picture stays below 30 kB, because it lives in Dagster's event
log, has its own light background, so that it reads the same in a light and a dark page, and uses the Okabe-Ito colours,
which colour-blind people can tell apart (light and dark differ in lightness as well). An SVG has no background; the
page that it stands in exchanges its colours for those of its light or dark scheme.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from less_assets.method.evaluation.leaderboard import REFERENCES

if TYPE_CHECKING:
    import altair as alt
    from numpy.typing import ArrayLike

    Drawing = alt.Chart | alt.LayerChart | alt.FacetChart

MAX_BYTES = 30_000
BLUE, SKY, ORANGE, GREY = "#0072b2", "#56b4e9", "#e69f00", "#8c8c8c"
INK, PAPER, GRID, BAND = "#1f1f1f", "#ffffff", "#e4e4e4", "#d9d9d9"
OTHER = "other"


def score_histogram(
    scores: ArrayLike, cut: float | None = None, *, all_above: float | None = None, title: str = "", bins: int = 60
) -> bytes:
    """Draw the distribution of scores, with the part above the cut set off and the cut as a line.

    Args:
        scores: Scores (n,); values that are not finite are left out.
        cut: Score of the last selected row; None draws no line.
        all_above: Score above which every row is selected, where this is not the cut: subtasks may have cuts of their
            own, and a row may be passed over.
        title: Heading.
        bins: Number of bars.
    """
    import altair as alt

    values = np.asarray(scores, dtype=np.float64)
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins=bins)
    low = -np.inf if cut is None else cut
    high = low if all_above is None else all_above
    selected = "selected" if cut is not None else "rows"
    table = pl.DataFrame(
        {
            "from": edges[:-1],
            "to": edges[1:],
            "rows": counts,
            "part": [
                "not selected" if middle < low else "some selected" if middle < high else selected
                for middle in _middles(edges)
            ],
        }
    )
    parts = {"not selected": GREY, "some selected": SKY, "selected": BLUE, "rows": BLUE}
    present = [part for part in parts if part in set(table["part"])]
    bars = (
        alt.Chart(table)
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("from:Q", bin="binned", title="score"),
            x2="to:Q",
            y=alt.Y("rows:Q", title="rows"),
            color=_color("part:N", {part: parts[part] for part in present}, legend=cut is not None),
        )
    )
    if cut is None:
        return _png(bars, title)
    cuts = [cut] if high in (low, np.inf) else [cut, high]
    line = alt.Chart(pl.DataFrame({"cut": cuts, "text": [f"cut {cut:.4g}", ""][: len(cuts)]})).encode(x="cut:Q")
    label = line.mark_text(align="left", dx=4, color=INK, fontSize=11).encode(text="text:N", y=alt.value(8))
    return _png(bars + line.mark_rule(color=INK, strokeWidth=2, strokeDash=[5, 3]) + label, title)


def cut_histogram(
    edges: ArrayLike,
    counts: Sequence[int],
    cut: float,
    band: tuple[float, float] | None = None,
    *,
    width: int = 640,
    axis: str = "score",
    rows: str = "rows",
) -> str:
    """Draw where the cut lies among binned scores, and the band within which it could lie as well; returns SVG.

    Args:
        edges: Bounds of the n bins (n + 1,).
        counts: Rows in each (n,).
        cut: Score of the last selected row.
        band: Lower and upper end of the borderline; None draws none.
        width: Of the plot, in pixels.
        axis: Name of the score.
        rows: What is counted.
    """
    import altair as alt

    bounds = np.asarray(edges, dtype=np.float64)
    middles = _middles(bounds)
    table = pl.DataFrame(
        {
            "from": bounds[:-1],
            "to": bounds[1:],
            "rows": counts,
            "part": ["selected" if middle >= cut else "not selected" for middle in middles],
        }
    )
    bars = (
        alt.Chart(table, width=width, height=170)
        .mark_bar(binSpacing=0.5)
        .encode(
            x=alt.X("from:Q", bin="binned", title=axis, axis=alt.Axis(tickCount=max(3, width // 90))),
            x2="to:Q",
            y=alt.Y("rows:Q", title=rows, axis=alt.Axis(tickCount=4, tickMinStep=1)),
            color=_color("part:N", {"not selected": GREY, "selected": BLUE}, legend=False),
        )
    )
    line = alt.Chart(pl.DataFrame({"cut": [cut]})).encode(x="cut:Q").mark_rule(color=INK, strokeWidth=2)
    layers = [bars, line]
    if band is not None:
        shade = alt.Chart(pl.DataFrame({"low": [band[0]], "high": [band[1]]})).encode(x="low:Q", x2="high:Q")
        layers.insert(0, shade.mark_rect(color=ORANGE, opacity=0.35))
    return _svg(alt.layer(*layers))


def share_comparison(
    selected: Mapping[str, float], pool: Mapping[str, float], *, title: str = "", kind: str = "source", limit: int = 20
) -> bytes:
    """Draw each group's share of the selected rows next to its share of the pool.

    Args:
        selected: Group to number (or share) of selected rows.
        pool: Group to number (or share) of pool rows.
        title: Heading.
        kind: What a group is, for the axis.
        limit: Groups shown, the largest in either; the rest is summed up as "other".
    """
    import altair as alt

    names = sorted({*selected, *pool}, key=lambda name: (-_share(selected, name) - _share(pool, name), name))
    shown, rest = names[:limit], names[limit:]
    if len(rest) == 1:
        shown, rest = names, []
    order = [*shown, f"{OTHER} ({len(rest)})"] if rest else shown
    rows = []
    for label, counts in (("selected", selected), ("pool", pool)):
        rows += [(name, label, _share(counts, name)) for name in shown]
        if rest:
            rows.append((order[-1], label, sum(_share(counts, name) for name in rest)))
    table = pl.DataFrame(rows, schema={"group": pl.String, "of": pl.String, "share": pl.Float64}, orient="row")
    chart = (
        alt.Chart(table, height=alt.Step(9))
        .mark_bar()
        .encode(
            y=alt.Y("group:N", sort=order, title=kind),
            yOffset=alt.YOffset("of:N", sort=["selected", "pool"]),
            x=alt.X("share:Q", title="share of rows", axis=alt.Axis(format="%")),
            color=_color("of:N", {"selected": BLUE, "pool": ORANGE}),
        )
    )
    return _png(chart, title)


def share_bars(counts: Mapping[str, float], *, title: str = "", kind: str = "subtask", limit: int = 30) -> bytes:
    """Draw each group's share, largest first.

    Args:
        counts: Group to number (or share) of rows.
        title: Heading.
        kind: What a group is, for the axis.
        limit: Groups shown; the rest is summed up as "other".
    """
    import altair as alt

    names = sorted(counts, key=lambda name: (-counts[name], name))
    shown, rest = (names, []) if len(names) <= limit + 1 else (names[:limit], names[limit:])
    shares = {name: _share(counts, name) for name in shown}
    if rest:
        shares[f"{OTHER} ({len(rest)})"] = sum(_share(counts, name) for name in rest)
    table = pl.DataFrame(
        {"group": list(shares), "share": list(shares.values())}, schema={"group": pl.String, "share": pl.Float64}
    )
    base = alt.Chart(table, height=alt.Step(16)).encode(
        y=alt.Y("group:N", sort=list(shares), title=kind),
        x=alt.X("share:Q", title="share of rows", axis=alt.Axis(format="%")),
    )
    labels = base.mark_text(align="left", dx=3, color=INK, fontSize=10).encode(text=alt.Text("share:Q", format=".1%"))
    return _png(base.mark_bar(color=BLUE) + labels, title)


def training_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    title: str = "",
    held_out: Sequence[tuple[float, float]] = (),
) -> bytes:
    """Draw the training loss over optimizer steps, and the held-out loss where there is one.

    Args:
        steps: Optimizer step of each logged loss.
        losses: Training loss in nats per token, as many as steps; values that are not finite are left out.
        title: Heading.
        held_out: (step, held-out loss) pairs.
    """
    import altair as alt

    points = [(step, loss, "training") for step, loss in zip(steps, losses, strict=True)]
    points += [(step, loss, "held out") for step, loss in held_out]
    table = pl.DataFrame(
        [point for point in points if np.isfinite(point[1])],
        schema={"step": pl.Float64, "loss": pl.Float64, "curve": pl.String},
        orient="row",
    )
    colors = {"training": BLUE, "held out": ORANGE} if held_out else {"training": BLUE}
    chart = (
        alt.Chart(table)
        .mark_line(point=alt.OverlayMarkDef(size=18) if len(table) <= 60 else False)
        .encode(
            x=alt.X("step:Q", title="optimizer step"),
            y=alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False)),
            color=_color("curve:N", colors, legend=bool(held_out)),
            strokeDash=alt.StrokeDash("curve:N", sort=list(colors), legend=None),
        )
    )
    return _png(chart, title)


def agreement_scatter(
    sketched: Sequence[float],
    exact: Sequence[float],
    *,
    cut: tuple[float, float] | None = None,
    title: str = "",
    axes: tuple[str, str] = ("sketched score", "exact score"),
) -> bytes:
    """Draw what was predicted against what is, one point a row.

    Args:
        sketched: Predicted values (n,).
        exact: True values (n,).
        cut: The cut on both axes, drawn as two lines; None draws none.
        title: Heading.
        axes: Names of the two axes.
    """
    import altair as alt

    table = pl.DataFrame({"x": list(map(float, sketched)), "y": list(map(float, exact))})
    scale = alt.Scale(zero=False)
    chart: Drawing = (
        alt.Chart(table, width=300, height=260)
        .mark_point(color=BLUE, size=30, filled=True, opacity=0.7)
        .encode(x=alt.X("x:Q", title=axes[0], scale=scale), y=alt.Y("y:Q", title=axes[1], scale=scale))
    )
    if cut is not None:
        line = alt.Chart(pl.DataFrame({"x": [cut[0]], "y": [cut[1]]})).mark_rule(color=INK, strokeDash=[5, 3])
        chart = chart + line.encode(x="x:Q") + line.encode(y="y:Q")
    return _png(chart, title)


def leaderboard_chart(
    table: pl.DataFrame,
    *,
    title: str = "",
    value_title: str = "score",
    references: Sequence[str] = tuple(REFERENCES.values()),
) -> bytes:
    """Draw each recipe's value with its interval, one panel a task.

    Args:
        table: Columns task, recipe, strategy, value, low, high (low and high may be null); recipes appear in the
            table's order.
        title: Heading.
        value_title: Name of the value, for the axis; say there which direction is better.
        references: Strategies to compare with: drawn in grey, as hollow points.
    """
    import altair as alt

    shown = table.select(
        "task",
        "recipe",
        "value",
        "low",
        "high",
        pl.when(pl.col("strategy").is_in(list(references)))
        .then(pl.lit("reference"))
        .otherwise(pl.lit("recipe"))
        .alias("kind"),
    )
    base = _recipes(shown).encode(color=_color("kind:N", {"recipe": BLUE, "reference": GREY}, legend=False))
    scale = alt.Scale(zero=False, padding=6)
    intervals = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=value_title, scale=scale), x2="high:Q")
    points = base.mark_point(size=55, strokeWidth=2, opacity=1).encode(
        x=alt.X("value:Q", title=value_title, scale=scale),
        fill=alt.Fill("kind:N", legend=None, scale=alt.Scale(domain=["recipe", "reference"], range=[BLUE, PAPER])),
    )
    return _png(_one_panel_a_task(intervals + points, table), title)


VERDICTS = {"better": BLUE, "undecided": GREY, "worse": ORANGE}
"""What an interval says about a difference, and its colour."""


def difference_chart(table: pl.DataFrame, *, title: str = "", value_title: str = "difference from random") -> bytes:
    """Draw each recipe's paired difference from random with its interval, one panel a task.

    The band behind a point is one standard deviation of random's own seeds, and the heading says so: a difference
    within it might have come from another draw.

    Args:
        table: Columns task, recipe, value, low, high, spread (may be null), verdict (a key of `VERDICTS`).
        title: Heading.
        value_title: Name of the difference, for the axis; say there which direction is better.
    """
    import altair as alt

    present = {verdict: color for verdict, color in VERDICTS.items() if verdict in set(table["verdict"])}
    shown = table.with_columns(zero=pl.lit(0.0), below=-pl.col("spread"), above=pl.col("spread"))
    base = _recipes(shown)
    told = "grey band: one standard deviation of random over its seeds"
    title = " · ".join(part for part in (title, told if table["spread"].count() else "") if part)
    band = base.transform_filter("datum.spread != null").mark_bar(height=14, color=BAND)
    axis = alt.X("value:Q", title=value_title, scale=alt.Scale(padding=6), axis=alt.Axis(tickCount=4))
    judged = base.encode(color=_color("verdict:N", present))
    panel = (
        band.encode(x=alt.X("below:Q", title=value_title), x2="above:Q")
        + alt.Chart(shown).mark_rule(color=INK, strokeWidth=1).encode(x="zero:Q")  # through all rows
        + judged.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
        + judged.mark_point(size=55, strokeWidth=2, opacity=1, filled=True).encode(x=axis)
    )
    return _png(_one_panel_a_task(panel, table), title)


def _recipes(table: pl.DataFrame) -> alt.Chart:
    """A row for each recipe, in the table's order."""
    import altair as alt

    return alt.Chart(table, height=alt.Step(18), width=300 if table["task"].n_unique() == 1 else 190).encode(
        y=alt.Y("recipe:N", sort=table["recipe"].unique(maintain_order=True).to_list(), title=None)
    )


def _one_panel_a_task(panel: alt.LayerChart, table: pl.DataFrame) -> alt.FacetChart:
    """Panels side by side, in the table's order, each with an axis of its own; four tasks make a square."""
    import altair as alt

    tasks = table["task"].unique(maintain_order=True).to_list()
    faceted = panel.facet(facet=alt.Facet("task:N", title=None, sort=tasks), columns=2 if len(tasks) == 4 else 3)
    independent: alt.FacetChart = faceted.resolve_scale(x="independent")
    return independent


def markdown_image(png: bytes, alt: str = "chart") -> str:
    """Return the picture as Markdown with a data URL, as Dagster's `MetadataValue.md` shows it.

    Args:
        png: A PNG file.
        alt: What the picture shows, for people who do not see it.
    """
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _middles(edges: np.ndarray) -> np.ndarray:
    return np.asarray((edges[:-1] + edges[1:]) / 2)


def _share(counts: Mapping[str, float], name: str) -> float:
    total = sum(counts.values())
    return counts.get(name, 0) / total if total else 0.0


def _color(field: str, colors: Mapping[str, str], *, legend: bool = True) -> alt.Color:
    import altair as alt

    return alt.Color(
        field,
        title=None,
        scale=alt.Scale(domain=list(colors), range=list(colors.values())),
        legend=alt.Legend(orient="top", title=None) if legend else None,
    )


def _styled(chart: Drawing, background: str, padding: int) -> Drawing:
    styled: Drawing = (
        chart.configure(background=background, padding=padding)
        .configure_axis(labelColor=INK, titleColor=INK, gridColor=GRID, labelLimit=220, titleFontWeight="normal")
        .configure_legend(labelColor=INK)
        .configure_header(labelColor=INK, labelFontWeight="bold")
        .configure_view(stroke=None, continuousWidth=460, continuousHeight=180)
    )
    return styled


def _svg(chart: Drawing) -> str:
    import vl_convert

    return vl_convert.vegalite_to_svg(_styled(chart, "transparent", 4).to_dict())


def _png(chart: Drawing, title: str) -> bytes:
    """Render at the sharpest scale that keeps the picture below `MAX_BYTES`."""
    import altair as alt
    import vl_convert

    if title:
        chart = chart.properties(title=alt.TitleParams(title, anchor="start", fontSize=13, color=INK))
    specification = _styled(chart, PAPER, 8).to_dict()
    for scale in (2.0, 1.5, 1.25, 1.0, 0.75):
        png = _small_palette(vl_convert.vegalite_to_png(specification, scale=scale))
        if len(png) < MAX_BYTES:
            break
    return png


def _small_palette(png: bytes) -> bytes:
    """Store the picture with 64 colours: a chart of a few flat colours loses nothing and shrinks about fivefold."""
    from PIL import Image

    packed = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(packed, format="PNG")
    return packed.getvalue()
