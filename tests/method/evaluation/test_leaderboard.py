"""The leaderboard on hand-made evaluations whose differences are known."""

import numpy as np
import polars as pl
import pytest

from less_assets.errors import EvaluationError
from less_assets.method.data.targets import TargetExample
from less_assets.method.evaluation.evaluation import METRIC_SCHEMA, SAMPLE_SCHEMA, summarize, validation_samples
from less_assets.method.evaluation.leaderboard import (
    LEADERBOARD_SCHEMA,
    OTHER_FORM_NOTE,
    RecipeResult,
    against_random,
    compare_recipes,
    costs,
    differences,
    judging,
    markdown_table,
    merge,
    recipes_by_tasks,
    to_markdown,
    with_named_numbers,
)

ROWS = 60


def result(recipe, losses, scores, *, strategy="less", average="samples", subtasks=None, ids=None, **others):
    ids = ids or [f"row-{i}" for i in range(len(losses))]
    samples = pl.DataFrame(
        [
            {
                "example_id": ids[i],
                "subtask": subtasks[i] if subtasks else "all",
                "metric": "exact_match",
                "score": score,
                "scores": [{"metric": "exact_match", "value": score}],
                "loss": loss,
                "loss_tokens": 3,
            }
            for i, (loss, score) in enumerate(zip(losses, scores, strict=True))
        ],
        schema=SAMPLE_SCHEMA,
    )
    return RecipeResult(recipe, strategy, samples, summarize(samples, average=average), **others)


def cell(board, recipe, metric, column):
    (row,) = board.filter(pl.col("recipe") == recipe, pl.col("metric") == metric).rows(named=True)
    return row[column]


@pytest.fixture(scope="module")
def board():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(2.0, 1.0, ROWS)
    right = (rng.random(ROWS) < 0.4).astype(float)

    def losses(gain):
        return (difficulty - gain + rng.normal(0, 0.02, ROWS)).tolist()

    results = [
        result("base", losses(0.0), np.zeros(ROWS), strategy="none"),
        *(
            result(
                "random",
                losses(0.1 + seed / 100),
                right,
                strategy="random",
                seed=seed,
                budget="5 %",
                rows=50,
                minutes=2.0,
            )
            for seed in range(3)
        ),
        result("random-big", losses(0.3), right, strategy="random", budget="10 %"),
        result(
            "less",
            losses(0.2),
            right,
            budget="5 %",
            rows=50,
            tokens=4000,
            minutes=3.0,
            selection_tokens=90_000,
            selection_minutes=61.25,
        ),
        result("less-big", losses(0.2), right, budget="10 %"),
        result("full", losses(0.5), np.ones(ROWS), strategy="full", rows=1000, tokens=90_000),
    ]
    return compare_recipes("bbh", results)


def test_every_recipe_has_a_row_per_metric_and_seeds_become_one(board):
    assert board.schema == LEADERBOARD_SCHEMA
    assert board["recipe"].unique(maintain_order=True).to_list() == [
        "base", "random", "random-big", "less", "less-big", "full"
    ]  # fmt: skip
    assert board.filter(pl.col("recipe") == "random")["metric"].to_list() == ["answer_loss", "exact_match"]
    assert cell(board, "random", "answer_loss", "seeds") == 3
    assert cell(board, "random", "answer_loss", "spread") == pytest.approx(0.01, abs=0.004)
    assert cell(board, "less", "answer_loss", "spread") is None
    assert cell(board, "less", "answer_loss", "tokens") == 4000
    assert cell(board, "base", "answer_loss", "rows") is None


def test_paired_differences_are_far_tighter_than_the_values(board):
    assert cell(board, "less", "answer_loss", "vs_random") == pytest.approx(-0.09, abs=0.01)
    assert cell(board, "less", "answer_loss", "vs_random_high") < 0
    paired = cell(board, "less", "answer_loss", "vs_random_high") - cell(board, "less", "answer_loss", "vs_random_low")
    assert cell(board, "less", "answer_loss", "high") - cell(board, "less", "answer_loss", "low") > 20 * paired
    assert cell(board, "less", "answer_loss", "vs_base") == pytest.approx(-0.2, abs=0.01)
    assert cell(board, "less", "answer_loss", "vs_full") == pytest.approx(0.3, abs=0.01)
    assert cell(board, "full", "exact_match", "vs_base") == 1.0


def test_differences_from_random_are_judged_by_their_intervals(board):
    judged = {row["recipe"]: row for row in against_random(board, "answer_loss").rows(named=True)}
    assert list(judged) == ["base", "less", "less-big", "full"], "random is not compared with itself"
    assert {name: row["verdict"] for name, row in judged.items()} == {
        "base": "worse",
        "less": "better",
        "less-big": "worse",  # than the random of its own, larger budget
        "full": "better",
    }
    assert judged["less"]["spread"] == pytest.approx(cell(board, "random", "answer_loss", "spread"))
    assert judged["less-big"]["spread"] is None, "one seed has no spread"
    scores = {row["recipe"]: row["verdict"] for row in against_random(board, "score").rows(named=True)}
    assert scores == {"base": "worse", "less": "undecided", "less-big": "undecided", "full": "better"}


def test_random_of_the_same_budget_is_the_reference_and_references_do_not_meet_themselves(board):
    assert cell(board, "less-big", "answer_loss", "vs_random") == pytest.approx(0.1, abs=0.01)
    assert cell(board, "random", "answer_loss", "vs_random") is None
    assert cell(board, "random-big", "answer_loss", "vs_random") is None
    assert cell(board, "base", "answer_loss", "vs_base") is None


def test_costs_are_told_as_recorded_and_what_is_unknown_stays_unknown(board):
    rows = {row["recipe"]: row for row in costs(board).iter_rows(named=True)}
    assert rows["less"] == {
        "recipe": "less",
        "rows": "50",
        "training tokens": "4000",
        "training minutes": "3.0",
        "selection tokens": "90000",
        "selection minutes": "61.2",
    }
    assert rows["random"]["training minutes"] == "2.0"
    assert rows["base"]["training minutes"] == rows["random"]["selection minutes"] == "–"


def test_only_results_on_one_model_are_compared():
    zeros = [0.0] * 5
    table = compare_recipes(
        "bbh",
        [
            result("base", zeros, zeros, strategy="none", model="small"),
            result("less-to-large", zeros, zeros, model="large"),
        ],
        replicates=20,
    )
    assert cell(table, "less-to-large", "answer_loss", "vs_base") is None


def test_subtask_average_is_kept():
    table = compare_recipes(
        "tydiqa",
        [
            result("base", [1.0, 1.0, 4.0], [0, 0, 0], strategy="none", average="subtasks", subtasks=["a", "a", "b"]),
            result("less", [1.0, 1.0, 2.0], [1, 1, 0], average="subtasks", subtasks=["a", "a", "b"]),
        ],
        replicates=50,
    )
    assert cell(table, "base", "answer_loss", "value") == 2.5
    assert cell(table, "less", "answer_loss", "vs_base") == -1.0
    assert cell(table, "less", "exact_match", "value") == 0.5


def test_different_samples_are_refused():
    with pytest.raises(EvaluationError, match="different samples"):
        compare_recipes(
            "bbh",
            [result("base", [1.0], [0], strategy="none"), result("less", [1.0], [0], ids=["another"])],
        )


def test_repeated_questions_are_paired_in_order():
    ids = ["twice", "twice"]
    table = compare_recipes(
        "bbh",
        [
            result("base", [1.0, 5.0], [0, 0], strategy="none", ids=ids),
            result("less", [2.0, 6.0], [0, 0], ids=ids),
        ],
        replicates=20,
    )
    assert cell(table, "less", "answer_loss", "n") == 2
    assert (cell(table, "less", "answer_loss", "vs_base_low"), cell(table, "less", "answer_loss", "vs_base_high")) == (
        1.0,
        1.0,
    )


def test_members_of_a_group_get_rows_of_their_own():
    one = result("less", [1.0, 2.0], [0, 0])
    both = RecipeResult(
        "less",
        "less",
        one.samples.with_columns(task=pl.Series(["bbh", "gsm8k"])),
        pl.concat(
            [
                summarize(one.samples[i : i + 1], average="samples").with_columns(task=pl.lit(task))
                for i, task in enumerate(["bbh", "gsm8k"])
            ]
        ),
    )
    table = compare_recipes("both", [both], replicates=20)
    assert table.filter(pl.col("metric") == "answer_loss").select("task", "value").rows() == [
        ("both/bbh", 1.0),
        ("both/gsm8k", 2.0),
    ]


def test_figures_without_samples_are_passed_on():
    plain = result("less", [1.0], [1])
    figure = {
        "metric": "byte_perplexity",
        "subtask": None,
        "value": 7.0,
        "n": 1,
        "higher_is_better": False,
        "primary": False,
        "average": "samples",
    }
    metrics = pl.concat([plain.metrics, pl.DataFrame([figure], schema=METRIC_SCHEMA)])
    table = compare_recipes("x", [RecipeResult("less", "less", plain.samples, metrics)], replicates=20)
    assert cell(table, "less", "byte_perplexity", "value") == 7.0
    assert cell(table, "less", "byte_perplexity", "low") is None


def test_merged_board_as_markdown(board):
    other = board.filter(pl.col("recipe").is_in(["less", "base"])).with_columns(task=pl.lit("gsm8k"))
    merged = merge([board, other.reverse()])
    assert merged.filter(pl.col("task") == "gsm8k")["recipe"].unique(maintain_order=True).to_list() == ["base", "less"]
    losses = recipes_by_tasks(merged, "answer_loss")
    assert losses.columns == ["recipe", "bbh", "gsm8k"]
    less, random = (losses.row(by_predicate=pl.col("recipe") == name, named=True) for name in ("less", "random"))
    assert "*" in less["bbh"]
    assert "(3 seeds)" in random["bbh"]
    assert "*" not in random["bbh"]
    assert random["gsm8k"] == "–"
    assert recipes_by_tasks(merged, "score").columns == ["recipe", "bbh exact_match", "gsm8k exact_match"]
    assert differences(merged, "random")["recipe"].to_list() == ["base", "less", "less-big", "full"]
    text = to_markdown(merged)
    assert "| less |" in text
    assert "Answer loss (nats per token" in text
    assert "Validation loss" not in text
    assert "| full | 1000 | 90000 | – |" in text


def test_board_without_random_or_score_still_renders():
    lone = compare_recipes("x", [result("less", [1.0, 2.0], [0, 1])], replicates=20)
    assert "| less |" in to_markdown(merge([lone]))
    assert merge([]).is_empty()
    assert to_markdown(merge([]))


def test_nan_losses_stay_visible():
    table = compare_recipes("x", [result("less", [1.0, float("nan")], [0, 1])], replicates=20)
    assert np.isnan(cell(table, "less", "answer_loss", "value"))
    assert "nan" in recipes_by_tasks(table, "answer_loss")["x"][0].lower()


def test_markdown_cells_are_escaped():
    assert markdown_table(pl.DataFrame({"a|b": ["x|y", None]})) == "| a\\|b |\n| --- |\n| x\\|y |\n|  |"


def validated(name: str, losses: list[float], strategy: str = "less") -> RecipeResult:
    """A recipe that was judged on validation examples only."""
    examples = [TargetExample(f"v{place}", f"s{place % 2}", [], "", "yes", None) for place in range(len(losses))]
    samples = validation_samples(examples, np.array(losses), np.full(len(losses), 3))
    return RecipeResult(name, strategy, samples, summarize(samples, average="samples"), model="m")


def test_validation_losses_are_paired_and_lower_is_better():
    board = compare_recipes(
        "x", [validated("less", [1.0, 2.0, 3.0]), validated("random", [1.5, 2.5, 3.5], "random")], replicates=20
    )
    assert board["metric"].to_list() == ["validation_loss", "validation_loss"]
    assert cell(board, "less", "validation_loss", "vs_random") == -0.5
    assert against_random(board, "validation_loss")["verdict"].to_list() == ["better"]
    assert against_random(board, "answer_loss").is_empty()
    assert not board["higher_is_better"].any()
    assert "Validation loss" in to_markdown(board)


def test_answers_of_another_form_are_shown_and_decide_nothing(board):
    results = [
        result("less", [1.0] * 4, [1.0] * 4),
        result("random", [2.0] * 4, [0.0] * 4, strategy="random"),
    ]
    table = compare_recipes("x", results, other_form=["x"], replicates=20)
    assert cell(table, "less", "answer_loss", "vs_random") == -1.0
    assert against_random(table, "answer_loss")["verdict"].to_list() == ["undecided"]
    assert against_random(table, "score")["verdict"].to_list() == ["better"]
    assert "answer_loss" not in judging(table)["metric"].to_list()
    assert "°" in recipes_by_tasks(table, "answer_loss")["x"][0]
    assert "*" not in recipes_by_tasks(table, "answer_loss")["x"][0]
    assert OTHER_FORM_NOTE in to_markdown(table)
    assert OTHER_FORM_NOTE not in to_markdown(board)


def test_a_board_of_an_earlier_version_is_read_by_its_new_names(board):
    old = board.drop("decides").with_columns(pl.col("metric").replace("answer_loss", "loss"))
    assert with_named_numbers(old).equals(board)
    assert with_named_numbers(board).equals(board)
