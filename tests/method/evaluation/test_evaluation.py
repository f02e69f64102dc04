"""Evaluation with tiny random models: losses against autograd's own cross-entropy, verdicts of known answers."""

import copy
import datetime

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from less_assets.errors import EvaluationError
from less_assets.method.data.chat import ChatEncoder, EncodedExample
from less_assets.method.data.targets import EvaluationExample, TargetExample
from less_assets.method.evaluation.evaluation import (
    METRIC_SCHEMA,
    SAMPLE_SCHEMA,
    EvaluationSettings,
    evaluate_examples,
    evaluate_with_harness,
    held_out_loss,
    summarize,
)

FAST = EvaluationSettings(replicates=50)


def example(question, answer, subtask="all", references=(), choices=(), number=0, metric="exact_match"):
    return EvaluationExample(
        example_id=f"{question}-{number}",
        subtask=subtask,
        messages=[{"role": "user", "content": question}],
        assistant_prefix="",
        answers=list(references) or [answer],
        metric=metric,
        completion=answer,
        choices=tuple(choices),
    )


def encoded(ids, labels, name="row"):
    return EncodedExample(name, np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))


def random_rows(count, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = rng.integers(5, vocabulary, size=rng.integers(3, 40))
        labels = np.where(rng.random(len(ids)) < 0.4, ids, -100)
        labels[-1] = ids[-1]
        rows.append(encoded(ids, labels, f"row-{i}"))
    return rows


def test_held_out_loss_equals_the_models_own_for_every_budget(byte_model, byte_tokenizer):
    rows = random_rows(15, len(byte_tokenizer))
    expected = []
    for row in rows:
        ids, labels = torch.tensor(row.input_ids).long()[None], torch.tensor(row.labels).long()[None]
        expected.append(byte_model(input_ids=ids, labels=labels).loss.item())
    for budget in (1, 64, 10_000):
        losses, tokens = held_out_loss(byte_model, rows, token_budget=budget)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert tokens.tolist() == [(row.labels[1:] != -100).sum() for row in rows]


def test_held_out_loss_without_partial_head_is_the_same(byte_model, byte_tokenizer):
    class FullHead(torch.nn.Module):
        """A model whose forward cannot leave out positions."""

        def __init__(self):
            super().__init__()
            self.inner, self.config, self.device = byte_model, byte_model.config, byte_model.device

        def forward(self, input_ids, **others):
            return self.inner(input_ids=input_ids, **others)

    rows = random_rows(6, len(byte_tokenizer))
    np.testing.assert_allclose(held_out_loss(FullHead(), rows)[0], held_out_loss(byte_model, rows)[0], rtol=1e-5)


def test_example_without_loss_tokens_is_named(byte_model):
    with pytest.raises(EvaluationError, match="lonely"):
        held_out_loss(byte_model, [encoded([5, 6, 7], [5, -100, -100], "lonely")])


def test_generated_answers_are_graded_and_tabled(memorizing_model, byte_tokenizer):
    examples = [
        example("sky?", "blue.", "colours", references=["red", "Blue"]),
        example("sum?", "10", "numbers"),
        example("sum?", "11", "numbers", number=1),
    ]
    counted = []
    result = evaluate_examples(memorizing_model, byte_tokenizer, examples, FAST, on_progress=counted.append)
    samples, metrics = result.samples, result.metrics
    assert samples.schema == SAMPLE_SCHEMA
    assert metrics.schema == METRIC_SCHEMA
    assert samples["example_id"].to_list() == ["sky?-0", "sum?-0", "sum?-1"]
    assert samples["prompt"][0] == "<|user|>sky?<|assistant|>"
    assert samples["output"].to_list() == ["blue.", "10", "10"]
    assert samples["reference"][0] == "red\nBlue"
    assert samples["correct"].to_list() == [True, True, False]
    assert samples["loss"][1] < 0.1 < samples["loss"][2]
    assert sum(counted) == 3

    def value(metric, subtask):
        return metrics.filter(pl.col("metric") == metric, pl.col("subtask").eq_missing(subtask)).row(0, named=True)

    assert value("exact_match", None)["value"] == pytest.approx(2 / 3)
    assert value("exact_match", "numbers")["value"] == 0.5
    assert value("exact_match", "colours")["n"] == 1
    assert value("loss", None)["value"] == pytest.approx(samples["loss"].mean())
    assert value("exact_match", None)["primary"]
    assert not value("loss", None)["higher_is_better"]
    assert value("loss", None)["low"] <= value("loss", None)["value"] <= value("loss", None)["high"]


def test_losses_of_an_evaluation_are_the_held_out_losses(byte_model, byte_tokenizer):
    """Generation, likelihoods and the plain loss go different ways to the same number."""
    questions = [f"{'worked examples ' * 8} {i}?" for i in range(7)]
    answers = ["a", "bc", "a longer answer", "", "é", "b", "cd"]
    examples = [example(q, a or "x", choices=()) for q, a in zip(questions, answers, strict=True)]
    compared = [example(q, a or "x", choices=["other", a or "x"]) for q, a in zip(questions, answers, strict=True)]
    targets = [TargetExample("", "", each.messages, "", each.completion) for each in examples]
    rows = [ChatEncoder(byte_tokenizer, "template", 2048).target(each) for each in targets]
    losses, tokens = held_out_loss(byte_model, rows)
    for asked in (examples, compared):
        samples = evaluate_examples(byte_model, byte_tokenizer, asked, FAST).samples
        np.testing.assert_allclose(samples["loss"], losses, rtol=1e-4)
        assert samples["loss_tokens"].to_list() == tokens.tolist()


def test_evaluation_is_reproducible(memorizing_model, byte_tokenizer):
    examples = [example("sky?", "blue."), example("sum?", "11")]
    first = evaluate_examples(memorizing_model, byte_tokenizer, examples, FAST)
    second = evaluate_examples(memorizing_model, byte_tokenizer, examples, FAST)
    assert first.samples.equals(second.samples)
    assert first.metrics.equals(second.metrics)


def test_choices_are_compared_by_likelihood(memorizing_model, byte_tokenizer):
    examples = [
        example("sky?", "blue.", "colours", references=["blue."], choices=["green.", "blue."]),
        example("sum?", "12", "numbers", references=["12"], choices=["10", "12"]),
    ]
    counted = []
    result = evaluate_examples(
        memorizing_model,
        byte_tokenizer,
        examples,
        EvaluationSettings(rule="mmlu", replicates=50),
        on_progress=counted.append,
    )
    assert result.samples["output"].to_list() == ["blue.", "10"]
    assert result.samples["score"].to_list() == [1.0, 0.0]
    assert result.samples["metric"].to_list() == ["accuracy", "accuracy"]
    assert sum(counted) == 4


def test_choice_likelihoods_are_those_of_the_loss(byte_model, byte_tokenizer):
    """Choices share a row where only their last token differs; the sums must not depend on that."""
    from less_assets.method.evaluation.harness import HarnessModel

    lm = HarnessModel(byte_model, byte_tokenizer, max_length=256)
    pairs = [("Question: ", " A"), ("Question: ", " B"), ("Question: ", "something longer"), ("Q", "é\n")]
    for (context, continuation), (loss, tokens) in zip(pairs, lm.continuation_losses(pairs), strict=True):
        ids = torch.tensor([byte_tokenizer(context + continuation).input_ids])
        expected = cross_entropy(byte_model(input_ids=ids).logits[0, :-1][-tokens:], ids[0, -tokens:]).item()
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_harness_prompt_in_the_chat_template_is_what_rows_have_and_tells_the_projects_day(byte_model, byte_tokenizer):
    from less_assets.method.evaluation.harness import HarnessModel

    day = datetime.date(1999, 12, 31)
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + byte_tokenizer.chat_template
    lm = HarnessModel(byte_model, tokenizer, max_length=256, date=day)
    asked = [{"role": "user", "content": "sky?"}]
    assert lm.apply_chat_template(asked) == "1999<|user|>sky?<|assistant|>"
    begun = [*asked, {"role": "assistant", "content": "It is "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "1999<|user|>sky?<|assistant|>It is "


def test_two_metrics_of_one_format(memorizing_model, byte_tokenizer):
    examples = [example("sky?", "blue.", "english", references=["blue sky"], metric="tydiqa")]
    result = evaluate_examples(memorizing_model, byte_tokenizer, examples, FAST)
    scores = {each["metric"]: each["value"] for each in result.samples["scores"][0]}
    assert scores == {"f1": pytest.approx(2 / 3), "exact_match": 0.0}
    assert set(result.metrics["metric"]) == {"loss", "f1", "exact_match"}
    assert result.metrics.filter(pl.col("primary"))["metric"].unique().to_list() == ["f1"]


def test_prompts_longer_than_the_context_are_cut_from_the_left(byte_model, byte_tokenizer):
    result = evaluate_examples(
        byte_model, byte_tokenizer, [example("x" * 900 + "end", "y")], EvaluationSettings(max_length=100, replicates=50)
    )
    assert result.samples["prompt"][0].endswith("xend<|assistant|>")
    assert len(result.samples["prompt"][0]) < 130


def test_nothing_to_evaluate_is_an_error(byte_model, byte_tokenizer):
    with pytest.raises(EvaluationError, match="no evaluation examples"):
        evaluate_examples(byte_model, byte_tokenizer, [])
    with pytest.raises(EvaluationError, match="different kinds"):
        evaluate_examples(byte_model, byte_tokenizer, [example("a", "b"), example("a", "b", metric="bbh")], FAST)
    with pytest.raises(EvaluationError, match="choices"):
        evaluate_examples(byte_model, byte_tokenizer, [example("a", "b"), example("a", "b", choices=["b"])], FAST)


def test_summary_of_known_samples():
    rows = [("a", 1.0, 2.0), ("a", 0.0, 4.0), ("b", 1.0, None)]
    samples = pl.DataFrame(
        [
            {"subtask": s, "metric": "f1", "score": v, "scores": [{"metric": "f1", "value": v}], "loss": loss}
            for s, v, loss in rows
        ],
        schema_overrides={"loss": pl.Float64},
    )
    table = summarize(samples, average="subtasks", settings=FAST)
    totals = table.filter(pl.col("subtask").is_null())
    assert totals.select("metric", "value", "n").rows() == [("loss", 3.0, 2), ("f1", 0.75, 3)]


@pytest.fixture
def local_harness_task(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        '{"q": "sky?", "a": "blue.", "wrong": "green."}\n{"q": "sum?", "a": "11", "wrong": "10"}\n'
    )
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "doc_to_text": "<|user|>{{q}}<|assistant|>",
        "target_delimiter": "",
    }


def test_harness_task_as_dictionary_generates_and_grades(memorizing_model, byte_tokenizer, local_harness_task):
    task = local_harness_task | {
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_punctuation": True}
        ],
    }
    result = evaluate_with_harness(memorizing_model, byte_tokenizer, task, FAST)
    assert result.samples.schema == SAMPLE_SCHEMA
    assert result.samples["output"].to_list() == ["blue", "10"]
    assert result.samples["score"].to_list() == [1.0, 0.0]
    assert result.samples["reference"].to_list() == ["blue.", "11"]
    assert result.samples["subtask"].to_list() == ["local", "local"]
    assert result.samples["loss"][0] < 0.1 < result.samples["loss"][1]
    assert result.samples["example_id"].n_unique() == 2


def test_harness_task_as_yaml_compares_choices(memorizing_model, byte_tokenizer, local_harness_task, tmp_path):
    task = local_harness_task | {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{[wrong, a]}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(task))
    result = evaluate_with_harness(memorizing_model, byte_tokenizer, path, FAST, limit=2)
    assert result.samples["output"].to_list() == ["blue.", "10"]
    assert result.samples["score"].to_list() == [1.0, 0.0]
    assert result.samples["metric"].to_list() == ["acc", "acc"]
    total = result.metrics.filter(pl.col("metric") == "acc", pl.col("subtask").is_null())
    assert total["value"].to_list() == [0.5]


def test_harness_task_by_name_in_the_users_folder(memorizing_model, byte_tokenizer, local_harness_task, tmp_path):
    task = local_harness_task | {"task": "my_own", "output_type": "loglikelihood", "doc_to_target": "{{a}}"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/my_own.yaml").write_text(yaml.safe_dump(task))
    result = evaluate_with_harness(memorizing_model, byte_tokenizer, "my_own", FAST, include_path=tmp_path / "tasks")
    assert result.samples["subtask"].unique().to_list() == ["my_own"]
    assert result.samples["metric"].unique().to_list() == ["acc"]
    assert result.samples["score"].to_list() == [1.0, 0.0]
    assert "perplexity" in result.metrics["metric"].to_list()


def test_answers_that_leave_no_room_for_a_prompt_are_refused(byte_model, byte_tokenizer):
    with pytest.raises(EvaluationError, match="no room"):
        evaluate_examples(byte_model, byte_tokenizer, [example("a", "b")], EvaluationSettings(max_new_tokens=600))


def test_harness_figures_that_are_no_means_keep_the_harness_value(byte_model, byte_tokenizer, local_harness_task):
    task = local_harness_task | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    result = evaluate_with_harness(byte_model, byte_tokenizer, task, FAST)
    (row,) = result.metrics.filter(pl.col("metric") == "byte_perplexity").rows(named=True)
    # A token is a byte here, so the harness's figure follows from the losses.
    tokens = result.samples["loss_tokens"].to_numpy()
    assert row["value"] == pytest.approx(np.exp((result.samples["loss"].to_numpy() * tokens).sum() / tokens.sum()))
    assert row["low"] is None
    assert not row["higher_is_better"]


def test_unknown_or_unloadable_harness_tasks_are_one_clear_error(
    byte_model, byte_tokenizer, tmp_path, local_harness_task
):
    with pytest.raises(EvaluationError, match="does not exist"):
        evaluate_with_harness(byte_model, byte_tokenizer, tmp_path / "nowhere.yaml")
    broken = local_harness_task | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        evaluate_with_harness(byte_model, byte_tokenizer, broken)
