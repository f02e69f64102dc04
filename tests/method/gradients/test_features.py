"""Features of a block of rows, exact scores, and the token budget."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from less_assets.errors import LessAssetsError, TargetFormatError
from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients import exact as exact_module
from less_assets.method.gradients.attention import keeps_weights
from less_assets.method.gradients.directions import FORMS, AdamMoments
from less_assets.method.gradients.exact import (
    exact_influence,
    mean_gradients,
    mean_target_directions,
    per_example_gradients,
    score_exactly,
)
from less_assets.method.gradients.features import (
    Batching,
    RowStatus,
    backpropagate,
    extract_features,
    resolve_token_budget,
)
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.gradients.sketch import Sketch
from less_assets.method.selection.influence import score_block, target_directions

BATCHING = Batching(token_budget=60)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_config(config), lora)


@pytest.fixture(scope="module")
def moments(model):
    generator = torch.Generator().manual_seed(1)
    first = {name: torch.randn(shape, generator=generator) * 1e-2 for name, shape in lora_parameters(model)}
    second = {name: torch.rand(shape, generator=generator) * 1e-3 for name, shape in lora_parameters(model)}
    return AdamMoments(first, second, step=7, beta1=0.9, beta2=0.999, eps=1e-8)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        ids = rng.integers(1, 63, rng.integers(5, 30)).astype(np.int32)
        made.append(EncodedExample(f"{seed}-{index}", ids, np.where(np.arange(len(ids)) > 2, ids, -100)))
    return made


def extract(model, examples, moments, forms=FORMS, kind="sparse", dimension=128, budget=60, **settings):
    sketch = Sketch(kind, dimension, 5, lora_parameters(model))
    return extract_features(
        model, examples, forms=forms, moments=moments, sketch=sketch, token_budget=budget, pad_token_id=0, **settings
    )


@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_features_are_the_sketched_exact_directions_and_their_norms(model, moments, kind):
    examples = rows(9)
    block = extract(model, examples, moments, kind=kind)
    sketch = Sketch(kind, 128, 5, lora_parameters(model))
    for form in FORMS:
        exact = per_example_gradients(model, examples, form=form, moments=moments, batching=BATCHING)
        expected = sketch(torch.from_numpy(exact)).numpy()
        np.testing.assert_allclose(block.features[form], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(block.norms[form], np.linalg.norm(exact, axis=1), rtol=1e-5)
    assert (block.status == RowStatus.OK).all()
    assert block.loss_tokens.tolist() == [len(example.input_ids) - 3 for example in examples]


def test_one_form_alone_has_the_same_bytes_as_among_others(model, moments):
    examples = rows(6)
    together = extract(model, examples, moments)
    for form in FORMS:
        alone = extract(model, examples, moments, forms=[form])
        assert np.array_equal(alone.features[form], together.features[form]), form


def test_the_same_block_has_the_same_bytes_again(model, moments):
    first, second = (extract(model, rows(8), moments, forms=["adamw"]) for _ in range(2))
    assert first.features["adamw"].tobytes() == second.features["adamw"].tobytes()
    assert first.norms["adamw"].tobytes() == second.norms["adamw"].tobytes()


def test_rows_keep_their_order_and_batches_do_not_change_them(model, moments):
    examples = rows(8)
    whole = extract(model, examples, moments, forms=["marginal"], budget=10_000)
    for row, example in enumerate(examples):
        alone = extract(model, [example], moments, forms=["marginal"])
        np.testing.assert_allclose(whole.features["marginal"][row], alone.features["marginal"][0], rtol=1e-3, atol=1e-3)


def test_unusable_rows_are_marked_with_the_reason(model, moments):
    good = rows(2)
    ids = np.arange(1, 9, dtype=np.int32)
    no_loss = EncodedExample("no loss", ids, np.full(8, -100, np.int32))
    only_first = EncodedExample("loss on the first token", ids, np.array([1] + [-100] * 7, np.int32))
    nothing = EncodedExample("nothing", np.zeros(0, np.int32), np.zeros(0, np.int32))
    refused = replace(nothing, problem="roles must alternate", status="template_refuses")
    seen = []
    bad = [None, refused, no_loss, only_first, nothing]
    block = extract(model, [good[0], *bad, good[1]], moments, on_progress=seen.append)
    reasons = [RowStatus.QUARANTINED, RowStatus.TEMPLATE_REFUSES, *[RowStatus.NO_LOSS_TOKENS] * 3]
    assert block.status.tolist() == [RowStatus.OK, *reasons, RowStatus.OK]
    assert np.isnan(block.loss).tolist() == [False, *[True] * 5, False]
    assert all(not block.features[form][1:6].any() and not block.norms[form][1:6].any() for form in FORMS)
    assert sum(seen) == 2


def test_a_row_whose_gradient_is_zero_is_marked_although_momentum_moves_on(model, moments):
    examples = rows(3)
    head = model.get_base_model().lm_head
    weight = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.zero_()
    try:
        block = extract(model, examples, moments)
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)
    assert (block.status == RowStatus.ZERO_GRADIENT).all()
    assert not block.features["adamw"].any()


def test_a_block_without_usable_rows_is_fine(model, moments):
    block = extract(model, [None, None], moments)
    assert (block.status == RowStatus.QUARANTINED).all()
    assert block.features["sgd"].shape == (2, 128)


def test_moments_of_another_adapter_are_refused_by_name(model, moments):
    name, shape = lora_parameters(model)[3]
    wrong = AdamMoments(moments.exp_avg | {name: torch.zeros(shape).T}, moments.exp_avg_sq, 7, 0.9, 0.999, 1e-8)
    with pytest.raises(LessAssetsError, match=name.replace(".", r"\.")):
        extract(model, rows(2), wrong)


def test_a_sketch_of_other_parameters_is_refused(model, moments):
    sketch = Sketch("sparse", 64, 0, lora_parameters(model)[::-1])
    with pytest.raises(LessAssetsError, match="other parameters"):
        extract_features(model, rows(2), forms=["sgd"], moments=None, sketch=sketch, token_budget=50, pad_token_id=0)


@pytest.mark.parametrize("rule", ["mean_cosine", "cosine_of_mean"])
def test_exact_influence_equals_that_of_unprojected_features(model, moments, rule):
    examples, targets, subtasks = rows(7), rows(5, seed=9), ["b", "a", "b", "b", "a"]
    gradients = per_example_gradients(model, targets)
    labels, directions = target_directions(gradients, subtasks, rule)
    means = mean_target_directions(model, targets, subtasks, batching=BATCHING)
    assert means.subtasks == labels
    np.testing.assert_allclose(means.rule(rule), directions, rtol=1e-3, atol=1e-6)
    scored = score_exactly(
        model, [*examples, None], means.rule(rule), forms=["adamw", "sgd"], moments=moments, batching=BATCHING
    )
    norms = np.linalg.norm(gradients, axis=1)
    for limit, known in ((1 << 30, None), (1, None), (1 << 30, norms)):  # all layers at once; layer by layer
        found_labels, influence = exact_influence(
            model,
            [*examples, None],
            targets,
            subtasks,
            rule=rule,
            forms=["adamw", "sgd"],
            moments=moments,
            target_norms=known,
            batching=BATCHING,
            directions_limit=limit,
        )
        assert found_labels == labels
        for form in ("adamw", "sgd"):
            exact = per_example_gradients(model, examples, form=form, moments=moments)
            expected = score_block(exact, directions)
            np.testing.assert_allclose(influence[form][:-1], expected, atol=1e-5)
            np.testing.assert_allclose(scored.cosines(form)[:-1], expected, atol=1e-5)
            assert np.isnan(influence[form][-1]).all()
            assert np.isnan(scored.cosines(form)[-1]).all()


def test_influence_on_two_tasks_together_is_that_on_each_alone(model, moments):
    examples, targets = rows(6), rows(5, seed=9)
    arguments = {"rule": "mean_cosine", "forms": ["adamw"], "moments": moments, "batching": BATCHING}
    tasks = {"first": (targets[:2], ["b", "a"]), "second": (targets[2:], ["a", "b", "a"])}
    labels = [(task, subtask) for task, (_, subtasks) in tasks.items() for subtask in subtasks]
    found, together = exact_influence(model, examples, targets, labels, **arguments)
    assert found == [("first", "a"), ("first", "b"), ("second", "a"), ("second", "b")]
    for place, (own, subtasks) in enumerate(tasks.values()):
        _, alone = exact_influence(model, examples, own, subtasks, **arguments)
        np.testing.assert_allclose(together["adamw"][:, 2 * place : 2 * place + 2], alone["adamw"], atol=1e-5)


def test_means_need_one_pass_and_name_a_target_without_gradient(model, monkeypatch):
    targets, subtasks = rows(5, seed=9), ["b", "a", "b", "b", "a"]
    passes = []
    monkeypatch.setattr(exact_module, "backpropagate", lambda *given: passes.append(1) or backpropagate(*given))
    labels, mean = mean_gradients(model, targets, subtasks, batching=BATCHING)
    assert len(passes) == 1
    both = mean_target_directions(model, targets, subtasks, batching=BATCHING)
    assert labels == both.subtasks
    np.testing.assert_allclose(mean, both.mean, atol=1e-6)
    bad = EncodedExample("empty target", np.arange(1, 5, dtype=np.int32), np.full(4, -100, np.int32))
    with pytest.raises(TargetFormatError, match="empty target"):
        mean_gradients(model, [*rows(1), bad], ["a", "b"])


def test_a_target_without_gradient_is_an_error_that_names_it(model):
    bad = EncodedExample("empty target", np.arange(1, 5, dtype=np.int32), np.full(4, -100, np.int32))
    with pytest.raises(TargetFormatError, match="empty target"):
        mean_target_directions(model, [*rows(1), bad], ["a", "b"])


def budget(model, **settings):
    return resolve_token_budget(model, **({"forms": ["adamw"], "dimension": 8192, "longest": 64} | settings))


def test_the_token_budget_follows_free_memory(model):
    small, large = budget(model, free_bytes=10 << 20), budget(model, free_bytes=20 << 20)
    assert small < large < 4096
    assert budget(model, free_bytes=10 << 20, forms=["adamw", "sgd"]) < small
    assert budget(model, free_bytes=10 << 20, gradient_checkpointing=True) > small
    assert budget(model, free_bytes=1 << 40) == 4096


def test_attention_weights_that_are_kept_count(model):
    half = deepcopy(model).to(torch.bfloat16)
    if not keeps_weights(next(half.parameters())):
        pytest.skip("this processor has no fast bfloat16 products")
    short, long = (budget(half, free_bytes=10 << 20, longest=longest) for longest in (10, 400))
    assert long < short


def test_the_longest_row_always_fits_or_the_reason_is_told(model):
    assert budget(model, free_bytes=10 << 20, longest=1500) == 1500
    with pytest.raises(LessAssetsError, match="2000 tokens"):
        budget(model, free_bytes=1 << 20, longest=2000)


def test_free_memory_of_this_machine_gives_a_budget(model):
    assert 64 <= budget(model) <= 4096
