"""Charts are small, opaque pictures that show what they were given."""

import base64
import io

import numpy as np
import polars as pl
import pytest
from PIL import Image

from less_assets.report.charts import (
    BAND,
    BLUE,
    MAX_BYTES,
    ORANGE,
    SKY,
    agreement_scatter,
    difference_chart,
    leaderboard_chart,
    markdown_image,
    score_histogram,
    share_bars,
    share_comparison,
    training_curve,
)

LEADERBOARD = pl.DataFrame(
    [
        {
            "task": task,
            "recipe": recipe,
            "strategy": {"base": "none"}.get(recipe, recipe.partition("-")[0]),
            "value": 1.0 + i / 10,
            "low": 0.95 + i / 10,
            "high": 1.05 + i / 10,
        }
        for task in ("bbh", "gsm8k", "mmlu", "tydiqa")
        for i, recipe in enumerate(["base", "random", "less", "less-paper", "full"])
    ]
)
DIFFERENCES = LEADERBOARD.select(
    "task",
    "recipe",
    pl.col("value", "low", "high") - 1.2,
    spread=pl.lit(0.05),
    verdict=pl.col("recipe").replace_strict({"base": "worse", "full": "better"}, default="undecided"),
)
MANY = {f"a kind of task with a long name, number {i}": float(i + 1) for i in range(106)}
SCORES = np.random.default_rng(0).normal(size=5000)

CHARTS = {
    "histogram with cut": lambda: score_histogram(SCORES, 1.64, title="Scores"),
    "histogram with two cuts": lambda: score_histogram(SCORES, 1.0, all_above=1.64),
    "histogram with rows passed over": lambda: score_histogram(SCORES, 1.0, all_above=np.inf),
    "histogram without cut": lambda: score_histogram(SCORES),
    "histogram of equal scores": lambda: score_histogram(np.full(7, 0.5), 0.5),
    "histogram of nothing": lambda: score_histogram([], 0.5),
    "histogram with what is not finite": lambda: score_histogram([np.nan, 1.0, np.inf, 2.0]),
    "sources": lambda: share_comparison({"cot": 30, "dolly": 10}, {"cot": 300, "dolly": 300, "oasst1": 200}),
    "106 sources": lambda: share_comparison(MANY, MANY, title="Kinds", kind="kind"),
    "no selection": lambda: share_comparison({}, {"cot": 1}),
    "106 subtasks": lambda: share_bars(MANY, title="Subtasks"),
    "one subtask": lambda: share_bars({"all": 3}),
    "training": lambda: training_curve(range(5), [3, 2, float("nan"), 1.5, 1.4], held_out=[(2, 2.0), (4, 1.7)]),
    "long training": lambda: training_curve(range(2000), 3 / np.sqrt(np.arange(2000) + 1) + SCORES[:2000] / 20),
    "agreement": lambda: agreement_scatter(SCORES[:1000], SCORES[1000:2000], cut=(1.6, 1.5), title="Agreement"),
    "agreement without cut": lambda: agreement_scatter([0.1], [0.2], axes=("predicted", "real")),
    "leaderboard": lambda: leaderboard_chart(LEADERBOARD, title="Leaderboard"),
    "leaderboard of 16 recipes": lambda: leaderboard_chart(
        pl.concat([LEADERBOARD.with_columns(recipe=pl.format("{}-{}", "recipe", pl.lit(i))) for i in range(3)])
    ),
    "leaderboard with NaN": lambda: leaderboard_chart(LEADERBOARD.with_columns(value=pl.lit(float("nan")))),
    "leaderboard without intervals": lambda: leaderboard_chart(
        LEADERBOARD.head(5).with_columns(low=pl.lit(None, pl.Float64), high=pl.lit(None, pl.Float64))
    ),
    "differences": lambda: difference_chart(DIFFERENCES, title="From random"),
    "differences without spread": lambda: difference_chart(
        DIFFERENCES.filter(task="bbh").with_columns(spread=pl.lit(None, pl.Float64))
    ),
    "differences of 52 recipes": lambda: difference_chart(
        pl.concat(
            [DIFFERENCES.filter(task="bbh").with_columns(recipe=pl.format("{}-{}", "recipe", i)) for i in range(11)]
        )
    ),
}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def count_of(color: str, png: bytes) -> int:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels(png) - wanted).max(axis=-1) <= 6).sum())


@pytest.mark.parametrize("name", CHARTS)
def test_chart_is_a_small_opaque_picture_with_a_light_background(name):
    png = CHARTS[name]()
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert len(png) < MAX_BYTES
    assert min(image.size) > 80
    assert "A" not in image.getbands()
    assert "transparency" not in image.info
    assert pixels(png)[0, 0].tolist() == [255, 255, 255]


def test_cut_further_right_marks_fewer_rows_as_selected():
    assert count_of(BLUE, score_histogram(SCORES, 1.0)) > 2 * count_of(BLUE, score_histogram(SCORES, 2.0)) > 0


def test_histogram_sets_off_scores_between_the_cuts_of_subtasks():
    one, two = score_histogram(SCORES, 1.0), score_histogram(SCORES, 1.0, all_above=2.0)
    assert count_of(SKY, one) == 0
    assert count_of(SKY, two) > count_of(BLUE, two) > 0
    assert count_of(BLUE, score_histogram(SCORES, 1.0, all_above=np.inf)) == 0


def test_comparison_shows_both_shares_in_proportion():
    png = share_comparison({"a": 1, "b": 1}, {"a": 1, "b": 1})
    assert count_of(BLUE, png) == pytest.approx(count_of(ORANGE, png), rel=0.2)
    assert count_of(BLUE, png) > 1000


def test_references_are_known_by_their_strategy_and_not_by_their_name():
    renamed = LEADERBOARD.with_columns(recipe=pl.format("my-{}", "recipe"))
    assert count_of(BLUE, leaderboard_chart(renamed)) == pytest.approx(
        count_of(BLUE, leaderboard_chart(LEADERBOARD)), rel=0.1
    )


def test_the_colour_of_a_difference_is_its_verdict():
    def drawn(verdict: str) -> bytes:
        return difference_chart(DIFFERENCES.with_columns(verdict=pl.lit(verdict)))

    assert count_of(BLUE, drawn("better")) > 500 > count_of(ORANGE, drawn("better"))
    assert count_of(ORANGE, drawn("worse")) > 500 > count_of(BLUE, drawn("worse"))


def test_the_band_is_as_wide_as_the_spread_of_random():
    def band(spread: float) -> int:
        one = DIFFERENCES.filter(task="bbh").with_columns(spread=pl.lit(spread))
        return count_of(BAND, difference_chart(one))

    assert band(0.1) > 1.8 * band(0.05) > 0


def test_equal_input_gives_equal_bytes():
    assert share_bars({"a": 1, "b": 2}) == share_bars({"b": 2, "a": 1})


def test_markdown_image_holds_the_picture():
    text = markdown_image(b"\x89PNG", "scores")
    assert text.startswith("![scores](data:image/png;base64,")
    assert base64.b64decode(text.split(",")[1].rstrip(")")) == b"\x89PNG"
