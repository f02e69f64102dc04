"""The warm-up's schedule and what its checkpoints hold."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from less_assets.errors import CorruptArtifactError
from less_assets.method.data.chat import EncodedExample
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.training.models import LoraSettings, load_adapter
from less_assets.method.training.training import TrainingSettings
from less_assets.method.training.warmup import load_checkpoint, load_moments, mean_learning_rates, warm_up

SETTINGS = TrainingSettings(epochs=2, learning_rate=1e-2, batch_size=4)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def run(folder: Path, **options):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 64, 9).astype(np.int32) for _ in range(10)]
    examples = [EncodedExample(f"row-{index}", ids, ids) for index, ids in enumerate(rows)]
    lora = LoraSettings(rank=2, alpha=4)
    return warm_up(tiny_llama(), SimpleNamespace(pad_token_id=0), examples, SETTINGS, folder, lora=lora, **options)


def test_mean_learning_rates_are_those_of_the_reference_code_s_readme():
    """README of princeton-nlp/LESS: 13,533 examples, batch 128, linear, warm-up 0.03; its 420 steps are 424 today."""
    rates = mean_learning_rates(TrainingSettings(schedule="linear"), rows=13_533)
    assert rates == pytest.approx([1.6877e-5, 1.2859e-5, 7.703e-6, 2.5616e-6], rel=0.02)


def test_cosine_of_the_paper_differs_from_the_reference_code_s_schedule():
    rates = mean_learning_rates(TrainingSettings(schedule="cosine"), rows=13_533)
    assert rates[0] > 1.75e-5
    assert rates[3] < 1.2e-6


def test_checkpoints_say_step_rate_and_losses(tmp_path):
    checkpoints = run(tmp_path)
    assert [(item.folder.name, item.epoch, item.step) for item in checkpoints] == [("epoch-1", 1, 3), ("epoch-2", 2, 6)]
    assert [item.mean_learning_rate for item in checkpoints] == pytest.approx(mean_learning_rates(SETTINGS, 10))
    assert [len(item.losses) for item in checkpoints] == [3, 3]
    assert checkpoints == [load_checkpoint(tmp_path / f"epoch-{epoch}") for epoch in (1, 2)]


def test_first_epoch_alone_is_under_the_schedule_of_all(tmp_path):
    first = run(tmp_path / "one", until_epoch=1)
    both = run(tmp_path / "two")
    assert len(first) == 1
    for name in ("adapter_model.safetensors", "adam_moments.safetensors", "state.json"):
        assert (first[0].folder / name).read_bytes() == (both[0].folder / name).read_bytes()


def test_moments_carry_the_names_and_shapes_of_the_gradient_engine(tmp_path):
    (checkpoint,) = run(tmp_path, until_epoch=1)
    moments = load_moments(checkpoint.folder)
    parameters = lora_parameters(load_adapter(tiny_llama(), checkpoint.folder))
    assert {name: tuple(tensor.shape) for name, tensor in moments.exp_avg.items()} == dict(parameters)
    assert all((tensor >= 0).all() and tensor.any() for tensor in moments.exp_avg_sq.values())
    assert moments.step == checkpoint.step


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CorruptArtifactError, match=r"state\.json"):
        load_checkpoint(tmp_path / "epoch-9")
    with pytest.raises(CorruptArtifactError, match="adam_moments"):
        load_moments(tmp_path / "epoch-9")
