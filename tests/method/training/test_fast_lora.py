"""The fast path of training gives the losses of the plain one, step by step, or is not taken."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from less_assets.method.data.batching import collate
from less_assets.method.data.chat import IGNORED, EncodedExample
from less_assets.method.training import training
from less_assets.method.training.fast_lora import fast_lora
from less_assets.method.training.models import LoraSettings, attach_adapter
from less_assets.method.training.packing import keeps_rows_apart
from less_assets.method.training.training import TrainingSettings, token_loss_sum, train_adapter, trainable_parameters

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": (LlamaConfig(**SMALL, **HEADS), ("q_proj", "v_proj", "down_proj")),
    "qwen3": (Qwen3Config(**SMALL, **HEADS, head_dim=8), ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mistral": (MistralConfig(**SMALL, **HEADS, sliding_window=8), ("q_proj", "v_proj")),
    "gemma2": (Gemma2Config(**SMALL, **HEADS, head_dim=8, sliding_window=8), ("k_proj", "o_proj")),
    "phi3": (Phi3Config(**SMALL, **HEADS), ("qkv_proj",)),
    "gpt2": (GPT2Config(**GPT2), ("c_attn", "c_proj")),  # with dropout of its own, biases and transposed weights
    "mamba": (
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0),
        ("in_proj",),
    ),
}
PACKED = ("llama", "qwen3", "mistral", "phi3")
"""Families whose rows are packed: gemma2's attention is not torch's, gpt2 drops, mamba's state runs from row to row."""
SETTINGS = TrainingSettings(epochs=2, learning_rate=1e-2, batch_size=6, micro_batch_tokens=64, seed=3)


def base(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0]).to(dtype).eval()
    model.name_or_path = family
    return model


def examples(rows: int) -> list[EncodedExample]:
    """Rows of several lengths, some of which end without loss."""
    rng = np.random.default_rng(0)
    made = []
    for row in range(rows):
        ids = rng.integers(3, 64, rng.integers(6, 20)).astype(np.int32)
        loss = rng.random(len(ids)) < 0.4
        loss[2], loss[-3:] = True, row % 3 == 0
        made.append(EncodedExample(f"row-{row}", ids, np.where(loss, ids, IGNORED).astype(np.int32)))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_losses_of_every_step_are_those_of_the_plain_path(monkeypatch, tmp_path, family, dropout):
    lora = LoraSettings(rank=4, alpha=8, dropout=dropout, target_modules=FAMILIES[family][1])
    assert fast_lora(attach_adapter(base(family), lora, 0), 0) is not None
    pad = SimpleNamespace(pad_token_id=0)
    fast = train_adapter(base(family), pad, examples(16), SETTINGS, tmp_path / "fast", lora=lora).curve
    monkeypatch.setattr(training, "fast_lora", lambda *_: None)
    plain = train_adapter(base(family), pad, examples(16), SETTINGS, tmp_path / "plain", lora=lora).curve
    np.testing.assert_allclose([step.loss for step in fast], [step.loss for step in plain], rtol=1e-5)
    np.testing.assert_allclose(
        [step.gradient_norm for step in fast], [step.gradient_norm for step in plain], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_near_to_those_in_double_precision_as_the_plain_ones(dtype):
    """In bfloat16 both round; the fast path must not round worse than twice as much."""
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=FAMILIES["llama"][1])
    batch = collate(examples(8), 0)

    def gradients(fast: bool, dtype: torch.dtype) -> torch.Tensor:
        model = attach_adapter(base("llama", dtype), lora, 0)
        if dtype == torch.float64:
            model.double()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in trainable_parameters(model).items():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        path = fast_lora(model, 0) if fast else None
        if path is None:
            token_loss_sum(model, batch).backward()
        else:
            with path:
                path.token_loss_sum(batch).backward()
        return torch.cat([weight.grad.double().flatten() for weight in trainable_parameters(model).values()])

    exact = gradients(False, torch.float64)
    errors = [float((gradients(fast, dtype) - exact).norm() / exact.norm()) for fast in (True, False)]
    assert errors[0] <= max(2 * errors[1], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_packed_where_the_model_keeps_them_apart(family):
    model = attach_adapter(base(family), LoraSettings(rank=4, target_modules=FAMILIES[family][1]), 0)
    assert keeps_rows_apart(model, 0) == (family in (*PACKED, "gpt2"))
    path, batch, seen = fast_lora(model, 0), collate(examples(6), 0), []
    assert path is not None
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    with path, hook:
        path.token_loss_sum(batch)
    shifted = batch["labels"][:, 1:] != IGNORED
    before_the_last_loss = [int(row.nonzero().max()) + 1 for row in shifted]
    assert seen == [(1, sum(before_the_last_loss)) if family in PACKED else (6, seen[0][1])]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_recomputed_packed_rows_have_the_same_gradients(tmp_path, family):
    lora = LoraSettings(rank=4, alpha=8, dropout=0.25, target_modules=FAMILIES[family][1])
    curves = [
        train_adapter(
            base(family),
            SimpleNamespace(pad_token_id=0),
            examples(16),
            replace(SETTINGS, gradient_checkpointing=recomputed),
            tmp_path / str(recomputed),
            lora=lora,
        ).curve
        for recomputed in (False, True)
    ]
    for name in ("loss", "gradient_norm"):
        first, second = ([getattr(step, name) for step in curve] for curve in curves)
        np.testing.assert_allclose(first, second, rtol=1e-4)


def test_a_model_of_another_structure_takes_the_plain_path():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True)
    assert fast_lora(get_peft_model(base("llama"), config), 0) is None
    assert fast_lora(attach_adapter(base("llama", torch.float16), LoraSettings(rank=2), 0), 0) is None


def test_layers_are_as_they_were_afterwards():
    model = attach_adapter(base("llama"), LoraSettings(rank=2, dropout=0.0), 0)
    before = {name: module.forward for name, module in model.named_modules()}
    path = fast_lora(model, 0)
    assert path is not None
    with path:
        assert {name: module.forward for name, module in model.named_modules()} != before
    assert {name: module.forward for name, module in model.named_modules()} == before
