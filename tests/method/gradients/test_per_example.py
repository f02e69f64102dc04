"""Per-example gradients against batch-size-1 autograd, on every architecture, and what is refused."""

from __future__ import annotations

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from less_assets.errors import LessAssetsError, UnsupportedModelError
from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients import per_example as gradients
from less_assets.method.gradients.attention import FastAttention, keeps_weights
from less_assets.method.gradients.exact import per_example_gradients
from less_assets.method.gradients.features import Batching, RowStatus, extract_features
from less_assets.method.gradients.per_example import logits_at, lora_parameters, lora_slices
from less_assets.method.gradients.sketch import Sketch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARCHITECTURES = {
    "llama": (LlamaConfig(**SMALL), ATTENTION),
    "llama with mlp": (LlamaConfig(**SMALL), [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "llama with head": (LlamaConfig(**SMALL), ["q_proj", "lm_head"]),
    "qwen3": (Qwen3Config(**SMALL), ATTENTION),
    "gemma2": (
        Gemma2Config(**SMALL, query_pre_attn_scalar=8, final_logit_softcapping=3.0, sliding_window=4),
        ATTENTION,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SMALL,
            query_pre_attn_scalar=8,
            final_logit_softcapping=3.0,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        ATTENTION,
    ),
    "phi3": (Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}), ["qkv_proj", "o_proj", "gate_up_proj"]),
    "gpt2": (
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        ["c_attn", "c_proj", "c_fc"],
    ),
}


def tiny_model(config=None, targets=ATTENTION, seed=0, **lora):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL))
    settings = {"r": 3, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": targets, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(settings | lora)))


def rows(lengths, seed=1, vocabulary=97):
    """Rows with scattered loss tokens; the last tokens carry no loss."""
    rng = np.random.default_rng(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = rng.integers(3, vocabulary, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.5, ids, -100).astype(np.int32)
        labels[length // 2] = ids[length // 2]
        labels[-1 - index % 2 :] = -100
        labels[length // 2 + 1] = ids[length // 2 + 1]
        made.append(EncodedExample(f"row-{index}", ids, labels))
    return made


def autograd_gradients(model, examples):
    """Batch size 1, the model's own loss, torch's own gradients."""
    model.eval()
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    gradients, losses = [], []
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        labels = torch.from_numpy(example.labels).long()[None]
        loss = model(input_ids=ids, labels=labels).loss
        gradient = torch.autograd.grad(loss, weights)
        gradients.append(torch.cat([part.flatten() for part in gradient]).numpy())
        losses.append(loss.item())
    return np.stack(gradients), np.array(losses)


def relative_error(a, b):
    return np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)


LENGTHS = [7, 19, 12, 30, 8, 12]


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_gradients_equal_autograd_one_by_one(architecture, padding_side):
    config, targets = ARCHITECTURES[architecture]
    model = tiny_model(config, targets)
    if architecture == "phi3":
        model.double()  # in float32 its rounding alone comes close to the bound
    examples = rows(LENGTHS)
    expected, _ = autograd_gradients(model, examples)
    for budget in (1, 70, 10_000):
        batching = Batching(token_budget=budget, padding_side=padding_side)
        found = per_example_gradients(model, examples, batching=batching)
        assert relative_error(found, expected).max() < 1e-5


@pytest.mark.parametrize("targets", [ATTENTION, ["up_proj"]])
def test_gradients_with_checkpointing_and_rslora_equal_autograd(targets):
    model = tiny_model(targets=targets, use_rslora=True)
    examples = rows(LENGTHS)
    expected, _ = autograd_gradients(model, examples)
    found = per_example_gradients(model, examples, batching=Batching(gradient_checkpointing=True))
    assert relative_error(found, expected).max() < 1e-5


def test_gradients_of_a_frozen_adapter_equal_those_of_a_trainable_one():
    model = tiny_model()
    examples = rows(LENGTHS)
    expected = per_example_gradients(model, examples)
    model.requires_grad_(False)
    assert np.array_equal(per_example_gradients(model, examples), expected)


def test_layers_that_the_loss_does_not_reach_have_zero_gradients():
    model = tiny_model(targets=["q_proj"])
    examples = rows([9, 12])
    reached = per_example_gradients(model, examples)
    layer = model.get_base_model().model.layers[1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    found = per_example_gradients(model, examples)
    assert found.shape == reached.shape
    half = found.shape[1] // 2
    assert np.abs(found[:, half:]).max() == 0
    assert np.abs(found[:, :half]).max() > 0


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    ids = torch.arange(3, 20)[None]
    before = model.eval()(input_ids=ids).logits
    model.train()
    per_example_gradients(model, rows([9, 12]), batching=Batching(gradient_checkpointing=True))
    assert model.training
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_at_loss_positions_are_the_models_own(architecture):
    config, targets = ARCHITECTURES[architecture]
    model = tiny_model(config, targets).eval()
    ids = torch.randint(3, 97, (3, 11))
    positions = torch.tensor([0, 4, 10, 17, 32])
    expected = model(input_ids=ids).logits.flatten(0, 1)[positions]
    found = logits_at(model, {"input_ids": ids}, positions)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama with head"])
def test_the_head_sees_loss_positions_only(architecture):
    model = tiny_model(*ARCHITECTURES[architecture])
    examples, seen = rows(LENGTHS), []
    per_example_gradients(model, examples)  # the first time also tries two rows
    model.get_base_model().get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[:-1].numel())
    )
    per_example_gradients(model, examples)
    assert seen == [sum(int((example.labels[1:] != -100).sum()) for example in examples)]


def test_bfloat16_gradients_point_the_same_way_as_float32():
    model = tiny_model(seed=4)
    examples = rows(LENGTHS)
    exact = per_example_gradients(model, examples)
    half = per_example_gradients(model.to(torch.bfloat16), examples)
    cosines = (exact * half).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(half, axis=1)
    assert cosines.min() > 0.99


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2"])
def test_attention_in_bfloat16_is_the_fast_one_and_its_gradients_are_as_good(architecture, monkeypatch):
    if not keeps_weights(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("this processor has no fast bfloat16 products")
    config, targets = ARCHITECTURES[architecture]
    model, examples = tiny_model(config, targets), rows(LENGTHS)
    exact = per_example_gradients(model, examples)
    made = []
    model.to(torch.bfloat16)
    per_example_gradients(model, examples)  # the first time also tries two rows
    monkeypatch.setattr(gradients, "FastAttention", lambda: made.append(FastAttention()) or made[-1])
    found = per_example_gradients(model, examples)
    again = per_example_gradients(model, examples, batching=Batching(gradient_checkpointing=True))
    assert [fast.calls for fast in made] == [2, 4], "once for each layer; twice with gradient checkpointing"
    monkeypatch.setattr(gradients, "FastAttention", nullcontext)
    fused = per_example_gradients(model, examples)
    assert np.array_equal(again, found)
    # Rounding of the other layers outweighs that of attention, whose own precision test_attention.py looks at.
    assert np.linalg.norm(found - exact) < 2 * np.linalg.norm(fused - exact)


def test_a_nan_row_does_not_poison_its_batch():
    model = tiny_model()
    good = rows([10, 12, 9])
    bad = EncodedExample("bad", np.full(11, 96, np.int32), np.full(11, 96, np.int32))
    for row in good:
        row.input_ids[row.input_ids == 96] = 5
    sketch = Sketch("sparse", 64, 0, lora_parameters(model))
    settings = {"forms": ["sgd"], "moments": None, "sketch": sketch, "token_budget": 10_000, "pad_token_id": 0}
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[96] = float("nan")
    mixed = extract_features(model, [good[0], bad, good[1], good[2]], **settings)
    alone = extract_features(model, good, **settings)
    assert list(mixed.status) == [RowStatus.OK, RowStatus.NONFINITE_LOSS, RowStatus.OK, RowStatus.OK]
    assert not mixed.features["sgd"][1].any()
    assert mixed.norms["sgd"][1] == 0
    np.testing.assert_allclose(mixed.features["sgd"][[0, 2, 3]], alone.features["sgd"], rtol=1e-4, atol=1e-6)


def refused(model) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        lora_slices(model)
    return str(caught.value)


def test_dora_is_refused_by_name():
    assert "DoRA" in refused(tiny_model(use_dora=True))


def test_lora_bias_is_refused_by_name():
    assert "lora_bias" in refused(tiny_model(ARCHITECTURES["gpt2"][0], ["c_attn"], lora_bias=True))


def test_modules_to_save_are_refused_by_name():
    assert "modules_to_save" in refused(tiny_model(modules_to_save=["lm_head"]))


def test_trainable_tokens_are_refused_by_name():
    assert "trainable_token_indices" in refused(tiny_model(trainable_token_indices=[1, 2]))


def test_lora_on_embeddings_is_refused_by_name():
    message = refused(tiny_model(targets=["q_proj", "embed_tokens"]))
    assert "Embedding" in message
    assert "embed_tokens" in message


def test_fused_expert_weights_are_refused_by_name():
    config = MixtralConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, num_local_experts=2)
    model = tiny_model(config, ["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0)
    assert "target_parameters" in refused(model)


def test_quantized_layers_are_refused_by_name():
    model = tiny_model(targets=["q_proj"])
    attention = model.get_base_model().model.layers[1].self_attn
    config = LoraConfig(r=2)
    attention.q_proj = GPTQLoraLinear(attention.q_proj.base_layer, "default", config, r=2)
    message = refused(model)
    assert "GPTQLoraLinear" in message
    assert "layers.1.self_attn.q_proj" in message


def quantized_model(bits: int, repacks: bool):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="125 MB that only quantization needs")
    make = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "head_dim": 16}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | sizes)).requires_grad_(False)
    for layer in base.model.layers:
        for name in ATTENTION:
            plain = getattr(layer.self_attn, name)
            quantized = make(plain.in_features, plain.out_features, bias=False)
            quantized.load_state_dict(plain.state_dict())
            quantized.support_avx512bf16_for_cpu = repacks
            setattr(layer.self_attn, name, quantized.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    settings = LoraConfig(r=3, target_modules=ATTENTION, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, settings)


def test_gradients_over_4_bit_weights_equal_autograd():
    model, examples = quantized_model(4, repacks=False), rows(LENGTHS)
    assert type(model.get_base_model().model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    expected, _ = autograd_gradients(model, examples)
    for budget in (1, 70, 10_000):
        found = per_example_gradients(model, examples, batching=Batching(token_budget=budget))
        assert relative_error(found, expected).max() < 1e-5


@pytest.mark.parametrize(("bits", "name"), [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_8_bit_weights_and_4_bit_ones_that_get_repacked_are_refused_by_name(bits, name):
    assert name in refused(quantized_model(bits, repacks=True))


def test_several_active_adapters_are_refused():
    model = tiny_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=ATTENTION))
    model.base_model.set_adapter(["default", "second"])
    assert "2 adapters" in refused(model)


def test_one_active_adapter_of_several_is_exact():
    model = tiny_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False))
    model.set_adapter("second")
    assert all("second" in name for name, _ in lora_parameters(model))
    examples = rows(LENGTHS)
    found = per_example_gradients(model, examples)
    model.delete_adapter("default")
    expected, _ = autograd_gradients(model, examples)
    assert relative_error(found, expected).max() < 1e-5


def test_merged_and_disabled_adapters_are_refused():
    model = tiny_model()
    model.merge_adapter()
    assert "merged" in refused(model)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert "disabled" in refused(model)


def test_a_trainable_parameter_outside_lora_is_refused_by_name():
    model = tiny_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert "model.norm.weight" in refused(model)


def test_a_shared_adapter_weight_is_refused():
    model = tiny_model(targets=["q_proj"])
    first, second = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    second.lora_A["default"].weight = first.lora_A["default"].weight
    assert "shared" in refused(model)


def test_a_layer_used_twice_is_refused():
    model = tiny_model(targets=["q_proj"])
    layers = model.get_base_model().model.layers
    layers[1] = layers[0]
    with pytest.raises(UnsupportedModelError, match=r"shared|more than once"):
        per_example_gradients(model, rows([9]))


def test_a_layer_that_mixes_rows_is_refused():
    model = tiny_model(targets=["down_proj"])
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x).flatten(0, 1)).view(x.shape)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.down_proj"):
        per_example_gradients(model, rows([9, 8]))


def test_running_out_of_memory_is_explained():
    model = tiny_model(targets=["q_proj"])

    def fail(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.get_base_model().model.layers[0].mlp.forward = fail
    with pytest.raises(LessAssetsError, match="token budget"):
        per_example_gradients(model, rows([9, 8]))
