"""Agreement with the published reference code's arrays, and with a real `torch.optim.AdamW` step."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients.directions import FORMS, AdamMoments
from less_assets.method.gradients.exact import mean_target_directions, per_example_gradients, score_exactly
from less_assets.method.gradients.features import Batching, extract_features
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.gradients.sketch import Sketch

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CHECKPOINTS = ("checkpoint-6", "checkpoint-12")
BATCHING = Batching(token_budget=200)


def relative_error(a, b):
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


def golden_rows(name):
    rows = [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]
    examples = [
        EncodedExample(row["id"], np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32))
        for row in rows
    ]
    return examples, [row.get("subtask") for row in rows]


@pytest.fixture(scope="module")
def golden():
    arrays = {name: tensor.numpy() for name, tensor in load_file(GOLDEN / "golden.safetensors").items()}
    return arrays, json.loads((GOLDEN / "meta.json").read_text())


def golden_checkpoint(name, meta):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(GOLDEN / "base"), GOLDEN / name)
    saved = load_file(GOLDEN / name / "adam_moments.safetensors")
    moments = AdamMoments(
        exp_avg={key.removeprefix("exp_avg."): value for key, value in saved.items() if key.startswith("exp_avg.")},
        exp_avg_sq={
            key.removeprefix("exp_avg_sq."): value for key, value in saved.items() if key.startswith("exp_avg_sq.")
        },
        step=next(entry["step"] for entry in meta["checkpoints"] if entry["name"] == name),
        beta1=meta["betas"][0],
        beta2=meta["betas"][1],
        eps=meta["eps"],
    )
    return model, moments


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gradients_and_directions_equal_the_reference_codes(golden, name):
    arrays, meta = golden
    model, moments = golden_checkpoint(name, meta)
    assert [[key, list(shape)] for key, shape in lora_parameters(model)] == meta["parameters"]
    train, _ = golden_rows("train.jsonl")
    targets, _ = golden_rows("target.jsonl")
    found = per_example_gradients(model, train, batching=BATCHING)
    assert relative_error(found, arrays[f"train_gradient.{name}"]).max() <= 1e-5
    found = per_example_gradients(model, targets, batching=BATCHING)
    assert relative_error(found, arrays[f"target_gradient.{name}"]).max() <= 1e-5
    for form in ("reference", "adamw", "paper"):
        found = per_example_gradients(model, train, form=form, moments=moments, batching=BATCHING)
        assert relative_error(found, arrays[f"gamma_{form}.{name}"]).max() <= 1e-5
    sketch = Sketch("sparse", 256, 0, lora_parameters(model))
    block = extract_features(
        model, train, forms=["adamw"], moments=moments, sketch=sketch, token_budget=200, pad_token_id=0
    )
    np.testing.assert_allclose(block.loss, arrays[f"train_loss.{name}"], rtol=1e-5)
    np.testing.assert_allclose(block.norms["adamw"], np.linalg.norm(arrays[f"gamma_adamw.{name}"], axis=1), rtol=1e-5)


@pytest.mark.parametrize("form", ["reference", "adamw"])
def test_exact_influence_and_score_equal_the_reference_codes(golden, form):
    arrays, meta = golden
    train, _ = golden_rows("train.jsonl")
    targets, subtasks = golden_rows("target.jsonl")
    rates = {entry["name"]: entry["mean_learning_rate"] for entry in meta["checkpoints"]}
    influence = score = 0.0
    for name in CHECKPOINTS:
        model, moments = golden_checkpoint(name, meta)
        weight = rates[name] / sum(rates.values())
        single = mean_target_directions(model, targets, [f"{row}" for row in range(6)], batching=BATCHING)
        by_row = score_exactly(model, train, single.unit_mean, forms=[form], moments=moments, batching=BATCHING)
        influence += weight * by_row.cosines(form)
        means = mean_target_directions(model, targets, subtasks, batching=BATCHING)
        directions = means.rule("mean_cosine")
        by_subtask = score_exactly(model, train, directions, forms=[form], moments=moments, batching=BATCHING)
        score += weight * by_subtask.cosines(form)
    np.testing.assert_allclose(influence, arrays[f"influence_{form}"], atol=1e-5)
    np.testing.assert_allclose(score.max(axis=1), arrays[f"score_{form}"], atol=1e-5)


@pytest.fixture(scope="module")
def trained():
    """A tiny adapter after four real AdamW steps, its optimizer, and rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    ).eval()
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 64, length).astype(np.int32) for length in (9, 14, 6, 11, 8)]
    rows = [
        EncodedExample(f"{index}", row, np.where(np.arange(len(row)) > 3, row, -100)) for index, row in enumerate(ids)
    ]
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([weight for _, weight in weights], lr=1e-2, weight_decay=0.0)
    for row in [*rows[:3], rows[0]]:
        model_loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = AdamMoments(
        {name: optimizer.state[weight]["exp_avg"].clone() for name, weight in weights},
        {name: optimizer.state[weight]["exp_avg_sq"].clone() for name, weight in weights},
        step=4,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
    )
    return model, rows, moments, optimizer


def model_loss(model, row):
    ids, labels = (torch.from_numpy(np.asarray(part)).long()[None] for part in (row.input_ids, row.labels))
    return model(input_ids=ids, labels=labels).loss


def test_adamw_direction_is_the_step_that_torch_would_take(trained):
    model, rows, moments, optimizer = trained
    found = per_example_gradients(model, rows, form="adamw", moments=moments, batching=BATCHING)
    state = optimizer.state_dict()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    for index, row in enumerate(rows):
        stepper = torch.optim.AdamW(weights, lr=1.0, weight_decay=0.0)
        stepper.load_state_dict(deepcopy(state))
        stepper.param_groups[0]["lr"] = 1.0
        stepper.zero_grad()
        model_loss(model, row).backward()
        stepper.step()
        step = torch.cat([(old - new.detach()).flatten() for old, new in zip(before, weights, strict=True)])
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        assert relative_error(found[index : index + 1], step.numpy()[None]).max() < 1e-4  # θ − (θ − Γ) rounds


def test_every_form_equals_its_formula_on_the_autograd_gradient(trained):
    model, rows, moments, _ = trained
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    m = torch.cat([moments.exp_avg[name].flatten() for name, _ in weights]).double()
    v = torch.cat([moments.exp_avg_sq[name].flatten() for name, _ in weights]).double()
    for row in rows:
        gradient = torch.autograd.grad(model_loss(model, row), [weight for _, weight in weights])
        g = torch.cat([part.flatten() for part in gradient]).double()

        def adamw(g):
            first, second = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            return first / (1 - 0.9**5) / ((second / (1 - 0.999**5)).sqrt() + 1e-8)

        first, second = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = {
            "adamw": adamw(g),
            "paper": first / (1 - 0.9**5) / (second / (1 - 0.999**5) + 1e-8).sqrt(),
            "reference": first / (second + 1e-8).sqrt(),
            "marginal": adamw(g) - adamw(torch.zeros_like(g)),
            "sgd": g,
        }
        for form in FORMS:
            found = per_example_gradients(model, [row], form=form, moments=moments)
            assert relative_error(found, expected[form].numpy()[None]).max() < 1e-5, form
