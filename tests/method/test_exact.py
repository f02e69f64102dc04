"""Exact influence equals cosines of per-example gradients, however few directions fit into memory."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from less_assets.method.chat import EncodedExample
from less_assets.method.exact import exact_influence, subtasks_at_once
from less_assets.method.features import Batching, per_example_gradients

BATCHING = Batching(token_budget=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def examples(rows: int, seed: int) -> list[EncodedExample]:
    random = np.random.default_rng(seed)
    found = []
    for row in range(rows):
        ids = random.integers(1, 48, size=int(random.integers(6, 14))).astype(np.int32)
        labels = ids.copy()
        labels[:3] = -100
        found.append(EncodedExample(f"{seed}-{row}", ids, labels))
    return found


def units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("rule", ["mean_cosine", "cosine_of_mean"])
@pytest.mark.parametrize("limit", [1, 2 * 10**9])
def test_exact_influence_equals_cosines_of_gradients(model, rule, limit):
    rows, targets = examples(5, seed=1), examples(5, seed=2)
    subtasks = ["b", "a", "b", "c", "b"]
    labels, scores = exact_influence(
        model,
        [*rows, None],
        targets,
        subtasks,
        form="sgd",
        rule=rule,
        moments=None,
        batching=BATCHING,
        directions_limit=limit,
    )
    assert labels == ["a", "b", "c"]
    gradients = per_example_gradients(model, rows)
    of_targets = per_example_gradients(model, targets)
    for place, label in enumerate(labels):
        members = of_targets[[subtask == label for subtask in subtasks]]
        if rule == "mean_cosine":
            expected = (units(gradients) @ units(members).T).mean(axis=1)
        else:
            expected = (units(gradients) @ units(members.mean(axis=0, keepdims=True)).T)[:, 0]
        np.testing.assert_allclose(scores[:5, place], expected, atol=1e-5)
    assert np.isnan(scores[5]).all()


def test_at_least_one_subtask_is_held_however_small_the_limit():
    assert subtasks_at_once(10**9, 1) == 1
    assert subtasks_at_once(1000, 2 * 10**9) == 250_000
