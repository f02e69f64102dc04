"""What is stored about rows, what `explain` and `trace` say of them, against the numbers it was made from."""

import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from support.tiny import HOSTILE
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.errors import LessAssetsError, PoolFormatError
from less_assets.inspection.explain import explain_row, explain_text, in_words, parse_row
from less_assets.inspection.trace import trace_row
from less_assets.lineage.lineage import Lineage
from less_assets.method.data.conversations import stated
from less_assets.method.selection.fidelity import Judgement
from less_assets.method.selection.influence import normalised_weights
from less_assets.project.project import load_project
from less_assets.reading.certificates import judge_selection
from less_assets.reading.files import EXACT, NEIGHBOURS, ROWS, SUBSET, TOKENS
from less_assets.reading.rows import find_row
from less_assets.reading.selection_cut import Cuts
from less_assets.report import contents
from less_assets.report.contents import report_contents
from less_assets.steps.explanations import find_neighbours, rows_to_explain
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet


@pytest.fixture(scope="module")
def lineage(explained_project) -> Lineage:
    project = load_project(explained_project)
    return open_lineage(project, open_store(project))


@pytest.fixture(scope="module")
def subset(lineage) -> pl.DataFrame:
    return read_parquet(lineage.folder("selected_subset", "less|sums"), SUBSET)


def table(lineage, name: str, recipe: str = "less") -> pl.DataFrame:
    return read_parquet(lineage.folder("token_attribution", f"{recipe}|sums"), name)


def silent(total, unit):
    return lambda done: None


# ---- what is stored ----


def test_explained_rows_are_the_selected_ones_those_below_and_the_worst(lineage):
    rows = table(lineage, ROWS, "few")
    selected = read_parquet(lineage.folder("selected_subset", "few|sums"), SUBSET)
    assert rows.filter(pl.col("group") == "selected")["example_id"].to_list() == selected["example_id"].to_list()
    below = rows.filter(pl.col("group") == "below_cut")
    assert below["rank"].to_list() == [6, 7, 8, 9]
    assert rows["example_id"].is_unique().all()
    work = SimpleNamespace(lineage=lineage, project=lineage.project)
    assert rows.equals(rows_to_explain(work, lineage.project.recipe("few"), "sums"))
    assert table(lineage, ROWS)["group"].unique().to_list() == ["selected"], "nothing of the pool is left"


def test_token_shares_sum_to_the_exact_influence_at_every_checkpoint_and_in_all(lineage):
    tokens = table(lineage, TOKENS)
    assert tokens.height == table(lineage, ROWS).height
    sums = tokens["share"].list.sum().to_numpy()
    np.testing.assert_allclose(sums + tokens["momentum"].to_numpy(), tokens["influence"], atol=1e-5)
    assert (tokens["momentum"] == 0).all(), "the form is marginal"
    weights = normalised_weights(
        {
            name: lineage.summary("warmup_checkpoints", name)["mean_learning_rate"]
            for name in lineage.project.checkpoints
        }
    )
    weighted = sum(weight * tokens[f"share.{name}"].list.sum().to_numpy() for name, weight in weights.items())
    np.testing.assert_allclose(weighted, sums, atol=1e-6)
    lengths = tokens["share"].list.len()
    assert lengths.equals(tokens["text"].list.len(), check_names=False)


def test_token_shares_sum_to_the_exact_score_of_a_rescored_row(lineage):
    tokens = table(lineage, TOKENS, "few")
    exact = read_parquet(lineage.folder("exact_scores", "few|sums"), EXACT)
    labels = lineage.summary("influence_scores", "sums")["subtasks"]
    joined = tokens.join(exact, on="example_id", how="inner")
    assert joined.height >= 5
    scores = [row["exact"][labels.index(row["subtask"])] for row in joined.iter_rows(named=True)]
    np.testing.assert_allclose(joined["influence"], scores, rtol=1e-3, atol=1e-5)
    assert (joined["momentum"] != 0).any(), "the form is adamw: momentum is apart"


def test_an_exact_copy_is_no_neighbour_and_neighbours_are_others(lineage):
    for name, rows in table(lineage, NEIGHBOURS).select("example_id", "rows").iter_rows():
        assert len(rows) == 3
        assert name not in [row["example_id"] for row in rows]
        cosines = [row["cosine"] for row in rows]
        assert cosines == sorted(cosines, reverse=True)


# ---- the page's contents ----


def test_margins_tell_selected_rows_from_the_others(lineage, subset):
    cuts = Cuts.of(lineage, lineage.project.recipe("less"), "sums")
    margins = np.concatenate(list(cuts.pool_margins()))
    assert (margins >= 0).sum() == subset.height
    assert (cuts.margins_of(subset) >= 0).all()
    exact = Cuts.of(lineage, lineage.project.recipe("few"), "sums")
    assert sum(int((part >= 0).sum()) for part in exact.pool_margins()) == 5


def test_a_certificate_labels_the_selected_rows(lineage, subset, monkeypatch):
    half = subset.height // 2
    judged = subset.select("example_id").with_columns(
        pl.Series("chance", [1.0] * half + [0.6] * (subset.height - half), pl.Float32),
        pl.Series("certain", [True] * half + [False] * (subset.height - half)),
    )
    found = Judgement(judged, 0.8, half, [0.01, 0.02])
    monkeypatch.setattr(contents, "judge_selection", lambda *_: found)
    labelled = report_contents(lineage, "less", "sums", silent)
    assert labelled.columns["certain"] == [True] * half + [False] * half
    assert labelled.head["counts"]["certain"] == half
    assert "80 %" in labelled.head["certificate"]
    assert labelled.details[-1]["chance"] == pytest.approx(0.6)
    assert labelled.cut.band == pytest.approx((0.0, 0.02))
    assert any("borderline" in note["text"] for note in labelled.head["notes"])
    monkeypatch.setattr(contents, "judge_selection", lambda *_: None)
    plain = report_contents(lineage, "less", "sums", silent)
    assert set(plain.columns["certain"]) == {None}
    assert any("certificate" in note["text"] for note in plain.head["notes"])


def test_the_certificate_of_the_run_is_on_the_page(lineage, subset):
    """The check of `influence_scores` left one; what it says of a selection is what the page shows."""
    judged = judge_selection(lineage, "less|sums", subset)
    head = report_contents(lineage, "less", "sums", silent).head
    assert head["counts"]["certain"] == judged.certain
    assert head["certificate"].startswith("By the certificate")
    assert "fidelity_certificate/sums" in lineage.plan("selection_report", "less|sums").inputs


def test_a_row_names_the_recipes_that_selected_it_as_well(lineage, subset):
    contents = report_contents(lineage, "few", "sums", silent)
    others = [other["recipe"] for other in contents.head["overlap"]]
    assert others == ["less", "random-seed0"]
    random = read_parquet(lineage.folder("selected_subset", "random-seed0|sums"), SUBSET)["example_id"].to_list()
    for name, detail in zip(contents.columns["id"], contents.details, strict=True):
        chosen = {"less": name in subset["example_id"].to_list(), "random-seed0": name in random}
        assert [others[place] for place in detail["also"]] == [other for other, has in chosen.items() if has]


def test_the_most_negative_rows_have_the_targets_that_they_harm_most(lineage):
    recipe, rows = lineage.project.recipe("few"), table(lineage, ROWS, "few")
    worst = find_neighbours(lineage, recipe, "sums", rows.with_columns(pl.lit("most_negative").alias("group")))
    for best, most in zip(table(lineage, NEIGHBOURS, "few")["targets"], worst["targets"], strict=True):
        helped = [each["cosine"] for each in best]
        harmed = [each["cosine"] for each in most]
        assert helped == sorted(helped, reverse=True)
        assert harmed == sorted(harmed)
        assert harmed[0] <= min(helped)


def test_the_histogram_counts_every_row_once_and_the_selected_above_the_cut(lineage, subset):
    for recipe, rows, above in (("less", 48, subset.height), ("few", 20, 5)):
        cut = report_contents(lineage, recipe, "sums", silent).cut
        assert sum(cut.counts) == rows
        assert sum(count for edge, count in zip(cut.edges, cut.counts, strict=False) if edge >= cut.at) == above


def test_composition_and_overlap_count_rows(lineage, subset):
    head = report_contents(lineage, "less", "sums", silent).head
    parts = {part["name"]: part["classes"] for part in head["composition"]}
    sources = dict(subset["source"].value_counts().iter_rows())
    assert {name: own for name, own, _ in parts["source"]} == sources
    for classes in parts.values():
        assert sum(own for _, own, _ in classes) == subset.height
        assert sum(pool for *_, pool in classes) == 48
    ids = set(subset["example_id"])
    for other in head["overlap"]:
        rows = read_parquet(lineage.folder("selected_subset", f"{other['recipe']}|sums"), SUBSET)["example_id"]
        assert other["shared"] == len(ids & set(rows))


# ---- explain ----


def test_explain_says_what_the_score_is_made_of(lineage, subset):
    chosen = subset.row(2, named=True)
    found = explain_row(lineage, "sums", chosen["example_id"][:10])
    assert found["example_id"] == chosen["example_id"]
    marginal = next(each for each in found["influence"] if each["form"] == "marginal")
    assert marginal["subtasks"][chosen["subtask"]] == pytest.approx(chosen["score"], rel=1e-5)
    total = sum(
        weight * marginal["checkpoints"][name][chosen["subtask"]]
        for name, weight in found["checkpoint_weights"].items()
    )
    assert total == pytest.approx(chosen["score"], rel=1e-4)
    less = found["recipes"][0]
    assert (less["recipe"], less["selected"], less["rank"]) == ("less", True, 3)
    assert less["above_cut"] >= 0
    per_target = [each["influence"] for each in found["nearest_targets"] if each["subtask"] == chosen["subtask"]]
    assert np.mean(per_target) == pytest.approx(chosen["score"], rel=1e-3), "two targets a subtask, all shown"
    assert found["tokens"]["text"]
    words = in_words(found)
    assert f"rank 3 of {subset.height}" in words
    assert "data/" in words


def test_a_row_given_as_text_scores_as_it_does_in_the_pool(lineage, subset):
    models = ModelLoader(lineage.project, cache_folder(lineage.store))
    chosen = subset.row(0, named=True)
    text = json.dumps({"messages": chosen["messages"]})
    found = explain_text(lineage, models, "sums", text)
    stored = explain_row(lineage, "sums", chosen["example_id"])
    assert found["in_pool"]
    for live, kept in zip(found["influence"], stored["influence"], strict=True):
        for label, value in kept["subtasks"].items():
            assert live["subtasks"][label] == pytest.approx(value, abs=2e-3)
    assert found["recipes"][0]["would_be_selected"]
    other = explain_text(lineage, models, "sums", "what is one red one ?\n\ntwo three")
    assert not other["in_pool"]
    assert "not in the pool; scored now" in in_words(other)


def test_a_row_is_parsed_from_text_or_json():
    expected = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because.\n\nSo."}]
    assert parse_row("Why?\n\nBecause.\n\nSo.\n").messages == expected
    assert parse_row(json.dumps(expected)).messages == expected
    assert parse_row('{"instruction": "Why?", "output": "Because.\\n\\nSo."}').messages == expected
    for wrong in ("no answer", "[1]", '{"a": 1}', "{", ""):
        with pytest.raises(PoolFormatError, match=r"row|JSON"):
            parse_row(wrong)


def test_a_row_that_is_not_there_is_named(lineage, subset):
    for wrong in ("ffffffffffff", "abc", "", "%"):
        with pytest.raises(LessAssetsError, match="no usable row"):
            find_row(lineage, wrong)
    with pytest.raises(LessAssetsError, match="nothing"):
        explain_row(lineage, "nothing", subset["example_id"][0])


# ---- trace ----


def test_trace_leads_to_the_line_of_the_file_and_to_who_selected_it(lineage, subset, explained_project):
    first = read_parquet(lineage.folder("instruction_pool", "plus-00000"), "examples.parquet").row(0, named=True)
    found = trace_row(lineage, first["example_id"])
    assert [place["counts"] for place in found["places"]] == [True, False], "the last line of the file is a copy"
    for place in found["places"]:
        text = (explained_project.parent / place["file"]).read_bytes().splitlines()[place["line"] - 1]
        assert json.loads(text)["messages"] == [stated(turn) for turn in first["messages"]]
    selected = {each["recipe"]: each.get("selected") for each in found["selections"]}
    assert selected["less"] == (first["example_id"] in subset["example_id"])
    for each in found["gradients"]:
        assert each["data_version"] == lineage.fresh("train_gradients", each["partition"]).data_version
    assert found["settings"]["gradients"]["dimension"] == 256
    assert found["code"]["code_versions"]["train_gradients"]
    json.dumps(found, allow_nan=False)


def test_a_row_is_found_by_its_line_in_a_source_file(lineage):
    first = read_parquet(lineage.folder("instruction_pool", "plus-00000"), "examples.parquet").row(0, named=True)
    for address in ("data/plus.jsonl:1", "plus.jsonl:1", "./data/plus.jsonl:1", "plus.jsonl:30"):
        assert trace_row(lineage, address)["example_id"] == first["example_id"], "line 30 is a copy of line 1"
    for address, words in (("plus.jsonl:29", "is not used"), ("plus.jsonl:31", "no row"), ("lus.jsonl:1", "no row")):
        with pytest.raises(LessAssetsError, match=words):
            trace_row(lineage, address)


# ---- the commands ----


def test_the_commands_print_words_or_json(explained_project, subset):
    runner = CliRunner()
    name = subset["example_id"][0]
    project = ["--project", str(explained_project)]
    shown = runner.invoke(app, ["explain", "sums", name, *project])
    assert shown.exit_code == 0, shown.output
    assert "influence on sums" in shown.output
    loaded = json.loads(runner.invoke(app, ["explain", "sums", name, "--json", *project]).output)
    assert loaded["example_id"] == name
    traced = runner.invoke(app, ["trace", name, *project])
    assert "selected by" in traced.output
    assert "less for sums: rank 1" in traced.output
    assert json.loads(runner.invoke(app, ["trace", name, "--json", *project]).output)["example_id"] == name
    for wrong in (["explain", "sums"], ["explain", "sums", name, "--text", "a\n\nb"], ["trace", "nobody"]):
        failed = runner.invoke(app, [*wrong, *project])
        assert failed.exit_code == 1
        assert "error:" in failed.output


def test_a_row_is_named_by_its_recipe_and_rank(explained_project, subset):
    def says(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["explain", "sums", *arguments, "--project", str(explained_project), "--json"])
        return done.output

    assert json.loads(says("--recipe", "less"))["example_id"] == subset.filter(pl.col("rank") == 1)["example_id"][0]
    third = json.loads(says("--recipe", "less", "--rank", "3"))["example_id"]
    assert third == subset.filter(pl.col("rank") == 3)["example_id"][0]
    assert "there is no rank 49" in says("--recipe", "less", "--rank", "49")
    assert "less" in says("--recipe", "les"), "the name that was meant"
    assert "One row is to be explained" in says("--recipe", "less", third)
    assert "One row is to be explained" in says()


def test_control_characters_of_a_row_do_not_reach_the_terminal(lineage, subset):
    row = next(row for row in subset.iter_rows(named=True) if row["messages"][-1]["content"] == HOSTILE["bytes"])
    words = in_words(explain_row(lineage, "sums", row["example_id"]))
    assert "\x07" not in words
    assert "\u202e" not in words
