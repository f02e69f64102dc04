"""Tournaments: pilots of several recipes, the choice among them, and the whole budget for the winner."""

from collections import Counter

import dagster as dg
import numpy as np
import polars as pl
import pytest
from support.graph import StoredSubsets, replaced
from support.tiny import TinyProject, question, write_rows

from less_assets.compute.step import StepInputs, StepResult
from less_assets.errors import LessAssetsError
from less_assets.inspection.explain import explain_row, in_words
from less_assets.lineage.lineage import split
from less_assets.method.evaluation.evaluation import validation_samples
from less_assets.method.evaluation.leaderboard import of_number
from less_assets.reading.files import BOARD, CHOICE, REPORT, SAMPLES
from less_assets.report.contents import report_contents
from less_assets.running.runner import Request
from less_assets.steps.judging_examples import validation_examples
from less_assets.steps.registry import ASSETS
from less_assets.steps.tournament import judging_number
from less_assets.store.tables import read_parquet, write_parquet

SUBSETS = Request(recipes=("best",), until="selected_subset")
BEST = {"name": "best", "strategy": "tournament", "candidates": ["bm25"], "fraction": 0.5, "pilot": 0.5}
RECIPES = [{"name": "bm25", "strategy": "bm25", "rows": 3}, BEST, {"name": "base", "strategy": "none"}]


class Story(StoredSubsets):
    """A project whose first run is killed; it goes on, and later has another candidate and another task."""

    killed: dict[str, list]
    finished: dict[str, list]
    grown: dict[str, list]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """The whole story, with real trainings."""
    tiny = TinyProject(tmp_path_factory.mktemp("tournament"), tiny_model)
    write_rows(tiny.folder / "validation.jsonl", [question(600 + place, "red") for place in range(5)])
    sums, sky = tiny.settings["tasks"]
    sums["validation"], sky["validation"] = {"folds": 2}, {"path": "validation.jsonl"}
    tiny.settings["tasks"] = [sums]
    tiny.settings["warmup"]["epochs"] = 1
    tiny.settings["recipes"] = [dict(recipe) for recipe in RECIPES]
    with dg.DagsterInstance.ephemeral() as instance, pytest.MonkeyPatch.context() as patch:
        story = Story(tiny, instance, Request(extras=False))
        train, trained = ASSETS["pilot_model"].compute, Counter()

        def killed_at_the_third(work: StepInputs) -> StepResult:
            trained["pilots"] += 1
            if trained["pilots"] == 3:
                raise KeyboardInterrupt
            return train(work)

        replaced(patch, "pilot_model", compute=killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            story.run()
        story.killed = {"pilot_model": stored_pilots(story)}
        replaced(patch, "pilot_model", compute=train)
        story.finished = story.run()
        tiny.settings["recipes"].insert(0, {"name": "less", "strategy": "less", "fraction": 0.5})
        tiny.settings["recipes"][2] = BEST | {"candidates": ["less", "bm25"]}
        tiny.settings["tasks"].append(sky)
        story.grown = story.run(Request())
        yield story


def stored_pilots(story: StoredSubsets) -> list[str]:
    """Keys of pilots whose models are up to date."""
    lineage = story.lineage
    keys = [f"{pilot}|{fold}" for pilot in lineage.project.pilots for fold in lineage.project.folds]
    return [key for key in keys if lineage.status("pilot_model", key).state == "fresh"]


def pilots(*candidates: str, parts: tuple[str, ...]) -> set[str]:
    return {f"best.pilot-{name}-seed{seed}|{part}" for name in candidates for seed in (0, 1) for part in parts}


def choice(story: StoredSubsets, task: str) -> pl.DataFrame:
    return read_parquet(story.lineage.folder("tournament_results", f"best|{task}"), CHOICE)


FOLDS = ("sums.fold-1", "sums.fold-2")


def test_a_killed_run_keeps_the_pilots_that_were_finished(made):
    assert len(made.killed["pilot_model"]) >= 2
    again = set(made.finished["pilot_model"])
    assert not again & set(made.killed["pilot_model"])
    assert again | set(made.killed["pilot_model"]) == pilots("bm25", "random", parts=FOLDS)


def test_another_candidate_and_another_task_make_only_their_own_pilots(made):
    expected = pilots("less", parts=FOLDS) | pilots("less", "bm25", "random", parts=("sky",))
    for asset in ("pilot_subset", "pilot_model", "pilot_results"):
        assert set(made.grown[asset]) == expected
    assert made.run() == {}


def test_pilots_select_their_share_and_random_is_trained_once_for_all_folds(made):
    lineage = made.lineage
    every = pilots("less", "bm25", "random", parts=(*FOLDS, "sky"))
    assert {lineage.summary("pilot_subset", key)["rows"] for key in every} == {11}, "a quarter of 44"

    def models(candidate: str, *parts: str) -> set[str]:
        return {str(lineage.folder("pilot_model", key).root) for key in pilots(candidate, parts=parts)}

    assert len(models("random", *FOLDS, "sky")) == 2, "one for each seed"
    assert len(models("bm25", "sky")) == 2, "equal rows, trained with two seeds"


def test_pilots_are_judged_on_what_their_rows_were_not_selected_for(made):
    judged = []
    for fold in FOLDS:
        kept = set(read_parquet(made.lineage.folder("target_examples", fold), "targets.parquet")["example_id"])
        samples = read_parquet(made.lineage.folder("pilot_results", f"best.pilot-less-seed0|{fold}"), SAMPLES)
        assert not kept & set(samples["example_id"])
        judged += samples["example_id"].to_list()
    whole = read_parquet(made.lineage.folder("target_examples", "sums"), "targets.parquet")
    assert sorted(judged) == sorted(whole["example_id"])
    assert made.lineage.summary("tournament_results", "best|sums")["examples"] == len(judged)


def test_the_choice_is_that_of_the_losses_and_its_winner_gets_the_whole_budget(made):
    for task, parts in (("sums", FOLDS), ("sky", ("sky",))):
        table = choice(made, task)
        assert table["candidate"].to_list() == ["less", "bm25", "random"]
        for row in table.iter_rows(named=True):
            losses = [
                scores[0]["value"]
                for key in pilots(row["candidate"], parts=parts)
                for scores in read_parquet(made.lineage.folder("pilot_results", key), SAMPLES)["scores"]
            ]
            assert row["mean"] == pytest.approx(np.mean(losses))
        assert dict(table.select("candidate", "price").iter_rows())["random"] == 0
        assert dict(table.select("candidate", "price").iter_rows())["less"] > 0
        winner = table.filter("winner")["candidate"].item()
        summary = made.lineage.summary("selected_subset", f"best|{task}")
        assert (summary["rows"], summary["selected_as"], summary["recipe"]) == (22, winner, "best")
        if winner == "less":
            assert made.subset(f"best|{task}").equals(made.subset(f"less|{task}"))


def test_the_verdict_is_given_on_questions_that_no_pilot_saw(made):
    board = read_parquet(made.lineage.folder("leaderboard"), BOARD)
    assert set(board["recipe"]) == {"less", "bm25", "best", "base"}, "pilots are no recipes of the leaderboard"
    assert "best" in of_number(board, "answer_loss")["recipe"]
    assert "best" in of_number(board, "score")["recipe"]
    assert set(of_number(board, "validation_loss")["recipe"]) == {"less", "bm25", "base"}
    tokens = dict(board.unique("recipe").select("recipe", "selection_tokens").iter_rows())
    assert tokens["best"] > tokens["less"] > tokens["bm25"], "the pilots' trainings are part of the price"


def test_the_choice_stands_in_the_ui_the_report_and_explain(made):
    lineage = made.lineage
    record = made.instance.get_latest_materialization_event(dg.AssetKey("tournament_results")).asset_materialization
    assert {"choice", "why", "winner"} <= {name.rpartition("/")[2] for name in record.metadata}
    contents = report_contents(lineage, "best", "sums", lambda total, unit: lambda done: None)
    why = lineage.summary("tournament_results", "best|sums")["why"]
    assert contents.head["choice"]["why"] == why
    assert [row[0] for row in contents.head["choice"]["rows"]] == ["less", "bm25", "random"]
    assert lineage.folder("selection_report", "best|sums").path(REPORT).is_file()
    assert report_contents(lineage, "less", "sums", lambda total, unit: lambda done: None).head["choice"] is None
    example = made.subset("best|sums")["example_id"][0]
    said = in_words(explain_row(lineage, "sums", example))
    assert f"tournament best: {why}" in said


# ---- outcomes, with stand-ins for what pilots lose ----


@pytest.fixture
def tournament(tmp_path, tiny_model):
    """A tournament of two recipes, of which `rds` costs a pass over the pool, on one task; nothing is run yet."""
    tiny = TinyProject(tmp_path, tiny_model)
    write_rows(tiny.folder / "validation.jsonl", [question(600 + place, "red") for place in range(20)])
    tiny.settings["tasks"] = tiny.settings["tasks"][1:]
    tiny.settings["tasks"][0]["validation"] = {"path": "validation.jsonl"}
    best = BEST | {"candidates": ["rds", "bm25", "random"], "seeds": [3, 4, 5]}
    rds = {"name": "rds", "strategy": "rds", "fraction": 0.5}
    random = {"name": "random", "strategy": "random", "rows": 2, "seeds": [7, 8]}
    tiny.settings["recipes"] = [rds, *RECIPES[:1], random, best]
    with dg.DagsterInstance.ephemeral() as instance:
        yield StoredSubsets(tiny, instance, SUBSETS)


def with_losses(patch: pytest.MonkeyPatch, losses: dict[str, float]) -> None:
    """Let the pilots of each candidate lose so much, with some noise, without any training."""

    def judge(work: StepInputs) -> StepResult:
        key, task = split(work.partition)
        pilot = work.project.pilots[key]
        examples = validation_examples(work.project, work.project.task(task))
        noise = np.random.default_rng([pilot.seed, len(pilot.candidate)]).normal(0, 0.1, len(examples))
        samples = validation_samples(examples, losses[pilot.candidate] + noise, np.ones(len(examples), np.int64))
        write_parquet(work.folder, SAMPLES, samples.with_columns(pl.lit(task).alias("task")))
        return StepResult({"examples": len(examples)})

    replaced(patch, "pilot_model", compute=lambda work: StepResult({"trained": False}))
    replaced(patch, "pilot_results", compute=judge)


@pytest.mark.parametrize(
    ("losses", "winner", "said"),
    [
        ({"rds": 1.0, "bm25": 1.0, "random": 2.0}, "bm25", "ties with"),
        ({"rds": 0.5, "bm25": 1.0, "random": 2.0}, "rds", "every other candidate"),
        ({"rds": 2.0, "bm25": 2.4, "random": 2.0}, "random", "no candidate beats random"),
    ],
)
def test_a_tie_goes_to_the_cheaper_one_and_random_is_taken_where_nothing_beats_it(
    tournament, monkeypatch, losses, winner, said
):
    with_losses(monkeypatch, losses)
    tournament.run()
    table = choice(tournament, "sky")
    assert table.filter("winner")["candidate"].item() == winner
    assert said in tournament.lineage.summary("tournament_results", "best|sky")["why"]
    prices = dict(table.select("candidate", "price").iter_rows())
    assert prices["rds"] > prices["bm25"] == prices["random"] == 0
    verdict = ASSETS["tournament_results"].checks[0].judge(tournament.lineage, "best|sky", None, print)
    assert verdict.passed == (winner != "random")
    subset = tournament.subset("best|sky")
    assert subset.height == 22
    if winner == "rds":
        tournament.run(Request(recipes=("rds",), until="selected_subset"))
        assert subset["example_id"].to_list() == tournament.subset("rds|sky")["example_id"].to_list()
    if winner == "random":
        seeds = {pilot.recipe.seed for pilot in tournament.lineage.project.pilots.values() if "random" in pilot.key}
        assert seeds == {3, 4, 5}
        assert tournament.lineage.project.candidates("best")["random"].seed == 7


def test_an_example_that_the_evaluation_asks_judges_no_pilot(tournament):
    tournament.tiny.settings["tasks"][0]["validation"] = {"path": "held_out/sky.jsonl"}
    with pytest.raises(LessAssetsError, match="4 validation examples, on which the tournament judges") as caught:
        tournament.run()
    assert "other validation examples" in str(caught.value)


def test_answers_are_graded_where_there_are_enough_questions(tournament, monkeypatch):
    """Short answers are; the tiny model gives none that is right, so that the loss goes on judging."""
    monkeypatch.setattr("less_assets.method.selection.tournament.ENOUGH_QUESTIONS", 20)
    tournament.tiny.settings["recipes"][-1] |= {"candidates": ["bm25"], "seeds": [0, 1]}
    made = tournament.run()
    assert len(made["pilot_results"]) == 4
    for key in made["pilot_results"]:
        samples = read_parquet(tournament.lineage.folder("pilot_results", key), SAMPLES)
        assert samples.height == 20
        for scores in samples["scores"]:
            assert [score["metric"] for score in scores] == ["validation_loss", "validation_score"]
            assert scores[1]["value"] in (0.0, 1.0)
    assert tournament.lineage.summary("tournament_results", "best|sky")["judged_by"] == "validation_loss"


def test_scores_judge_where_all_are_graded_and_can_tell_apart():
    def samples(right: float, *, graded: bool = True) -> pl.DataFrame:
        scores = [
            [{"metric": "validation_loss", "value": 1.0}]
            + ([{"metric": "validation_score", "value": float(place < 200 * right)}] if graded else [])
            for place in range(200)
        ]
        return pl.DataFrame({"task": ["t"] * 200, "scores": scores})

    assert judging_number([samples(0.5)] * 2, {"t": 0.0}) == "validation_score"
    assert judging_number([samples(0.01)] * 2, {"t": 0.0}) == "validation_loss", "nothing is right yet"
    assert judging_number([samples(0.3)] * 2, {"t": 0.25}) == "validation_loss", "no better than guessing"
    assert judging_number([samples(0.5), samples(0.5, graded=False)], {"t": 0.0}) == "validation_loss"
