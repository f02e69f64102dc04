"""Token shares add up to the row's exact influence, and each is what its token's own gradient says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

from less_assets.method.data.chat import IGNORED, EncodedExample
from less_assets.method.gradients.attribution import attribute_tokens
from less_assets.method.gradients.directions import FORMS, AdamMoments, Directions
from less_assets.method.gradients.exact import mean_target_directions, per_example_gradients, score_exactly
from less_assets.method.gradients.features import Batching
from less_assets.method.gradients.per_example import lora_parameters

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "llama": (LlamaConfig(**SMALL, **HEADS), ["q_proj", "v_proj", "down_proj"]),
    "qwen3": (Qwen3Config(**SMALL, **HEADS, head_dim=8), ["q_proj", "v_proj"]),
    "gemma3": (Gemma3TextConfig(**SMALL, **HEADS, head_dim=8, sliding_window=8), ["k_proj", "o_proj"]),
    "phi3": (Phi3Config(**SMALL, **HEADS), ["qkv_proj"]),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2), ["c_attn"]),
}


def adapted(architecture: str):
    config, targets = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_config(config), lora)


@pytest.fixture(scope="module")
def model():
    return adapted("llama")


def moments_of(model) -> AdamMoments:
    generator = torch.Generator().manual_seed(1)
    first = {name: torch.randn(shape, generator=generator) * 1e-2 for name, shape in lora_parameters(model)}
    second = {name: torch.rand(shape, generator=generator) * 1e-3 for name, shape in lora_parameters(model)}
    return AdamMoments(first, second, step=7, beta1=0.9, beta2=0.999, eps=1e-8)


def rows(count: int, seed: int = 0) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        ids = rng.integers(3, 63, rng.integers(6, 20)).astype(np.int32)
        loss = rng.random(len(ids)) < 0.5
        loss[-2] = True
        made.append(EncodedExample(f"{seed}-{index}", ids, np.where(loss, ids, IGNORED).astype(np.int32)))
    return made


def token_alone(example: EncodedExample, place: int) -> EncodedExample:
    """The example with the loss of one token only."""
    labels = np.full_like(example.labels, IGNORED)
    labels[place] = example.labels[place]
    return replace(example, labels=labels)


@pytest.mark.parametrize("form", FORMS)
def test_shares_and_momentum_sum_to_the_exact_influence(model, form):
    examples, targets = rows(7), rows(5, seed=1)
    moments = moments_of(model)
    means = mean_target_directions(model, targets, ["a", "b", "a", "b", "b"])
    directions = means.rule("mean_cosine")
    which = [0, 1, 1, 0, 0, 1, 0]
    found = attribute_tokens(
        model, examples, directions, which, form=form, moments=moments, batching=Batching(token_budget=45)
    )
    exact = score_exactly(model, examples, directions, forms=[form], moments=moments).cosines(form)
    expected = exact[np.arange(7), which]
    np.testing.assert_allclose(found.influence, expected, rtol=1e-4, atol=1e-6)
    sums = np.array([shares.sum() for shares in found.shares])
    np.testing.assert_allclose(sums + found.momentum, expected, rtol=1e-3, atol=2e-6)
    assert [len(shares) for shares in found.shares] == [example.loss_tokens for example in examples]
    assert (found.momentum == 0).all() == (form in ("marginal", "sgd"))


def test_without_adam_shares_sum_to_the_inner_product_of_plain_gradients(model):
    examples, targets = rows(4), rows(3, seed=1)
    gradients = per_example_gradients(model, examples)
    direction = per_example_gradients(model, targets).mean(axis=0, keepdims=True)
    found = attribute_tokens(model, examples, direction, [0] * 4, form="sgd", moments=None)
    norms = np.linalg.norm(gradients, axis=1)
    sums = np.array([shares.sum() for shares in found.shares]) * norms
    np.testing.assert_allclose(sums, (gradients @ direction[0]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", ["sgd", "adamw"])
def test_a_share_is_the_inner_product_with_the_tokens_own_gradient(architecture, form):
    model = adapted(architecture)
    moments = moments_of(model)
    example = rows(1, seed=3)[0]
    direction = per_example_gradients(model, rows(1, seed=4))
    (shares,) = attribute_tokens(model, [example], direction, [0], form=form, moments=moments).shares
    places = [place for place in range(1, len(example.labels)) if example.labels[place] != IGNORED]
    own = per_example_gradients(model, [token_alone(example, place) for place in places]) / len(places)
    whole = own.sum(axis=0)
    names = [name for name, _ in lora_parameters(model)]
    flat = [torch.cat([part[name].flatten() for name in names]) for part in (moments.exp_avg, moments.exp_avg_sq)]
    made = Directions([form], *flat, step=7)
    gamma = made(torch.from_numpy(whole[None]))[0].numpy()[0]
    start = made(torch.zeros(1, len(whole)))[0].numpy()[0]
    slope = (gamma.astype(np.float64) - start) / whole
    expected = own @ (slope * direction[0]) / np.linalg.norm(gamma)
    np.testing.assert_allclose(shares, expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())


def test_batches_padding_and_memory_do_not_change_shares(model):
    examples = rows(6)
    direction = per_example_gradients(model, rows(1, seed=4))
    moments = moments_of(model)
    settings = {"form": "marginal", "moments": moments}
    together = attribute_tokens(model, examples, direction, [0] * 6, **settings)
    for other in (
        {"batching": Batching(token_budget=20)},
        {"batching": Batching(padding_side="left")},
        {"weight_bytes": 1},
        {"batching": Batching(gradient_checkpointing=True)},
    ):
        found = attribute_tokens(model, examples, direction, [0] * 6, **settings, **other)
        for one, two in zip(together.shares, found.shares, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-6)


def test_a_row_without_loss_tokens_is_refused(model):
    ids = np.arange(3, 9, dtype=np.int32)
    empty = EncodedExample("empty", ids, np.full(6, IGNORED, np.int32))
    with pytest.raises(ValueError, match="empty"):
        attribute_tokens(model, [empty], np.ones((1, 4), np.float32), [0], form="sgd", moments=None)
