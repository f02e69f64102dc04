"""LoRA training: gradients, schedule, Adam's moments by name, and resuming with identical bytes."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, get_scheduler

from less_assets.errors import CorruptArtifactError, StaleArtifactError, StorageError, TrainingError
from less_assets.method.data.batching import collate
from less_assets.method.data.chat import EncodedExample
from less_assets.method.training.epoch_folder import finished_epochs, read_moments
from less_assets.method.training.models import LoraSettings, attach_adapter
from less_assets.method.training.training import (
    TrainingSettings,
    adam_moments,
    epoch_order,
    learning_rate_factor,
    learning_rates,
    restore_moments,
    token_loss_sum,
    train_adapter,
    trainable_parameters,
)

LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
SETTINGS = TrainingSettings(epochs=3, learning_rate=1e-2, batch_size=8, micro_batch_tokens=64, seed=3)
TOKENIZER = SimpleNamespace(pad_token_id=0)


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.name_or_path = "tiny"
    return model


def tiny_examples(rows: int, seed: int = 0) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    examples = []
    for row in range(rows):
        length = int(rng.integers(5, 20))
        ids = rng.integers(3, 64, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, -100, ids).astype(np.int32)
        examples.append(EncodedExample(f"row-{row}", ids, labels))
    return examples


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), SETTINGS, folder, lora=LORA)


def test_every_epoch_leaves_a_whole_folder(undisturbed):
    names = {"adapter_model.safetensors", "adapter_config.json", "adam_moments.safetensors", "state.json"}
    for epoch in (1, 2, 3):
        assert set(contents(undisturbed.folder.parent / f"epoch-{epoch}")) == names
    assert not list(undisturbed.folder.parent.glob("*.partial"))


def test_training_lowers_the_loss_and_reports_every_step(undisturbed):
    curve = undisturbed.curve
    assert [step.step for step in curve] == list(range(1, 10))
    assert [step.rows for step in curve] == [8, 8, 4] * 3
    assert sum(step.tokens for step in curve if step.epoch == 1) == sum(len(e.input_ids) for e in tiny_examples(20))
    losses = [np.mean([step.loss for step in curve if step.epoch == epoch]) for epoch in (1, 3)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("done", [1, 2])
def test_resumed_training_ends_with_identical_bytes(undisturbed, tmp_path, done):
    examples = tiny_examples(20)
    torch.manual_seed(done)  # the state of the global generator must not matter
    train_adapter(tiny_llama(), TOKENIZER, examples, SETTINGS, tmp_path, lora=LORA, until_epoch=done)
    trained = []
    resumed = train_adapter(
        tiny_llama(), TOKENIZER, examples, SETTINGS, tmp_path, lora=LORA, on_epoch_end=lambda *end: trained.append(end)
    )
    assert resumed.resumed_epochs == done
    assert trained == [(epoch, tmp_path / f"epoch-{epoch}") for epoch in range(done + 1, 4)]
    assert contents(tmp_path) == contents(undisturbed.folder.parent)
    assert resumed.curve == undisturbed.curve


def test_training_killed_in_mid_epoch_resumes_with_identical_bytes(undisturbed, tmp_path):
    def kill(step):
        if step.step == 5:
            raise KeyboardInterrupt

    examples = tiny_examples(20)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny_llama(), TOKENIZER, examples, SETTINGS, tmp_path, lora=LORA, on_progress=kill)
    assert finished_epochs(tmp_path) == 1
    train_adapter(tiny_llama(), TOKENIZER, examples, SETTINGS, tmp_path, lora=LORA)
    assert contents(tmp_path) == contents(undisturbed.folder.parent)


def test_another_process_writes_identical_bytes(undisturbed, tmp_path):
    script = (
        "import sys; sys.path[:0] = ['tests', 'tests/method/training']\n"
        "from test_training import *\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "examples, folder = tiny_examples(20), Path(sys.argv[1])\n"
        "train_adapter(tiny_llama(), TOKENIZER, examples, SETTINGS, folder, lora=LORA, until_epoch=1)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
    assert contents(tmp_path / "epoch-1") == contents(undisturbed.folder.parent / "epoch-1")


def test_finished_training_is_only_read(undisturbed):
    again = train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), SETTINGS, undisturbed.folder.parent, lora=LORA)
    assert (again.resumed_epochs, again.curve) == (3, undisturbed.curve)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(again.model(ids).logits, undisturbed.model(ids).logits)


def test_keep_latest_leaves_one_folder_and_the_whole_curve(undisturbed, tmp_path):
    result = train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), SETTINGS, tmp_path, lora=LORA, keep="latest")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-3"]
    assert result.curve == undisturbed.curve


@pytest.mark.parametrize(
    ("change", "rows"), [({"learning_rate": 2e-2}, 20), ({"epochs": 4}, 20), ({"seed": 4}, 20), ({}, 21)]
)
def test_folder_of_another_training_is_refused(undisturbed, change, rows):
    settings = replace(SETTINGS, **change)
    with pytest.raises(StaleArtifactError, match="other examples, settings"):
        train_adapter(tiny_llama(), TOKENIZER, tiny_examples(rows), settings, undisturbed.folder.parent, lora=LORA)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adam_moments.safetensors", "state.json"])
def test_truncated_epoch_is_named(undisturbed, tmp_path, name):
    shutil.copytree(undisturbed.folder.parent / "epoch-1", tmp_path / "epoch-1")
    file = tmp_path / "epoch-1" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorruptArtifactError, match=name):
        train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), SETTINGS, tmp_path, lora=LORA)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adam_moments.safetensors", "adapter_config.json", "state.json"]
)
def test_a_flipped_bit_of_an_epoch_is_never_trained_on(undisturbed, tmp_path, name, place):
    shutil.copytree(undisturbed.folder.parent / "epoch-1", tmp_path / "epoch-1")
    file = tmp_path / "epoch-1" / name
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 2
    file.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=name):
        train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), SETTINGS, tmp_path, lora=LORA)


def test_a_disk_that_is_full_is_a_storage_error_and_keeps_what_was_finished(tmp_path):
    train_adapter(tiny_llama(), TOKENIZER, tiny_examples(8), SETTINGS, tmp_path, lora=LORA, until_epoch=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(StorageError, match=r"epoch-2(.|\n)*what is finished is kept"):
            train_adapter(tiny_llama(), TOKENIZER, tiny_examples(8), SETTINGS, tmp_path, lora=LORA, until_epoch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1"]


def test_adam_moments_by_name_equal_a_plain_loop_of_torch(tmp_path):
    """Two steps by hand: order, token mean, clipping, schedule and AdamW as torch has them."""
    lora = replace(LORA, dropout=0.0)
    settings = replace(SETTINGS, epochs=1, batch_size=10, max_grad_norm=0.1, weight_decay=0.01, warmup_ratio=0.0)
    examples = tiny_examples(20)
    result = train_adapter(tiny_llama(), TOKENIZER, examples, settings, tmp_path, lora=lora)

    model = attach_adapter(tiny_llama(), lora, settings.seed)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=settings.learning_rate, weight_decay=0.01)
    order = epoch_order(20, settings.seed, 1)
    for step, indices in enumerate([order[:10], order[10:]]):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / 2)
        optimizer.zero_grad()
        batch = collate([examples[index] for index in indices], 0)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.1)
        optimizer.step()

    moments = read_moments(result.folder / "adam_moments.safetensors")
    assert len(named) == 16
    assert moments.exp_avg.keys() == moments.exp_avg_sq.keys() == named.keys()
    assert (moments.step, moments.beta1, moments.beta2, moments.eps) == (2, 0.9, 0.999, 1e-8)
    trained = trainable_parameters(result.model)
    for name, parameter in named.items():
        torch.testing.assert_close(moments.exp_avg[name], optimizer.state[parameter]["exp_avg"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            moments.exp_avg_sq[name], optimizer.state[parameter]["exp_avg_sq"], rtol=1e-4, atol=1e-10
        )
        torch.testing.assert_close(trained[name], parameter, rtol=1e-3, atol=1e-5)


def test_restored_moments_are_the_ones_that_were_read():
    model = attach_adapter(tiny_llama(), LORA, seed=0)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values())
    model(**collate(tiny_examples(3), 0)).loss.backward()
    optimizer.step()
    moments = adam_moments(optimizer, model)
    other = torch.optim.AdamW(trainable_parameters(model).values())
    restore_moments(other, model, moments)
    again = adam_moments(other, model)
    assert again.step == 1
    assert all(torch.equal(again.exp_avg[name], moments.exp_avg[name]) for name in moments.exp_avg)
    assert all(torch.equal(again.exp_avg_sq[name], moments.exp_avg_sq[name]) for name in moments.exp_avg)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_micro_batches_do_not_change_what_is_learned(tmp_path, budget):
    lora = replace(LORA, dropout=0.0)
    whole = replace(SETTINGS, epochs=1, micro_batch_tokens=1 << 20)
    curves = [
        train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), settings, tmp_path / name, lora=lora).curve
        for name, settings in [("whole", whole), ("cut", replace(whole, micro_batch_tokens=budget))]
    ]
    np.testing.assert_allclose([s.loss for s in curves[0]], [s.loss for s in curves[1]], rtol=1e-4)


def test_gradient_checkpointing_learns_the_same(tmp_path):
    lora = replace(LORA, dropout=0.0)
    curves = []
    for checkpointing in (False, True):
        settings = replace(SETTINGS, epochs=1, gradient_checkpointing=checkpointing)
        folder = tmp_path / str(checkpointing)
        curves.append(train_adapter(tiny_llama(), TOKENIZER, tiny_examples(20), settings, folder, lora=lora).curve)
    np.testing.assert_allclose([s.loss for s in curves[0]], [s.loss for s in curves[1]], rtol=1e-5)


def test_bfloat16_base_trains_a_float32_adapter(tmp_path):
    result = train_adapter(
        tiny_llama(torch.bfloat16), TOKENIZER, tiny_examples(20), SETTINGS, tmp_path, lora=LORA, until_epoch=1
    )
    assert {parameter.dtype for parameter in trainable_parameters(result.model).values()} == {torch.float32}
    moments = read_moments(result.folder / "adam_moments.safetensors")
    assert {tensor.dtype for tensor in moments.exp_avg.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_on_some_columns_equals_the_model_s_own_loss(kind):
    torch.manual_seed(0)
    model = tiny_llama()
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    examples = tiny_examples(6)
    batch = collate(examples, 0)
    expected = sum(
        functional.cross_entropy(
            model(torch.tensor(example.input_ids[None], dtype=torch.long)).logits[0, :-1],
            torch.tensor(example.labels[1:], dtype=torch.long),
            reduction="sum",
        )
        for example in examples
    )
    torch.testing.assert_close(token_loss_sum(model, batch), expected)


@given(
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    total=st.integers(1, 300),
    ratio=st.floats(0, 0.5),
)
def test_schedules_equal_those_of_transformers(schedule, total, ratio):
    settings = TrainingSettings(schedule=schedule, warmup_ratio=ratio, learning_rate=1.0)
    warmup = -int(-total * ratio // 1)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate_factor(settings, total, step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_learning_rates_of_the_plan_are_those_of_the_training(undisturbed):
    planned = [rate for epoch in learning_rates(SETTINGS, 20) for rate in epoch]
    assert planned == [step.learning_rate for step in undisturbed.curve]


@given(rows=st.integers(1, 200), seed=st.integers(0, 2**31), epoch=st.integers(1, 9))
def test_every_epoch_sees_every_example_once(rows, seed, epoch):
    order = epoch_order(rows, seed, epoch)
    assert sorted(order) == list(range(rows))
    assert (order == epoch_order(rows, seed, epoch)).all()


def test_epochs_differ_in_order():
    assert (epoch_order(50, 0, 1) != epoch_order(50, 0, 2)).any()


def test_examples_without_loss_are_refused_by_name(tmp_path):
    silent = EncodedExample("silent", np.arange(4, dtype=np.int32), np.full(4, -100, np.int32))
    with pytest.raises(TrainingError, match="silent"):
        train_adapter(tiny_llama(), TOKENIZER, [*tiny_examples(3), silent], SETTINGS, tmp_path, lora=LORA)
    with pytest.raises(TrainingError, match="no example"):
        train_adapter(tiny_llama(), TOKENIZER, [], SETTINGS, tmp_path, lora=LORA)


def test_diverged_training_stops_and_keeps_what_was_finished(tmp_path):
    model = tiny_llama()
    train_adapter(model, TOKENIZER, tiny_examples(20), SETTINGS, tmp_path, lora=LORA, until_epoch=1)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(TrainingError, match="nan"):
        train_adapter(model, TOKENIZER, tiny_examples(20), SETTINGS, tmp_path, lora=LORA)
    assert finished_epochs(tmp_path) == 1


def test_state_holds_no_time_and_no_path(undisturbed):
    state = json.loads((undisturbed.folder / "state.json").read_text())
    known = {"epoch", "step", "mean_learning_rate", "losses", "curve", "training", "files", "state_digest"}
    assert set(state) == known
    assert str(undisturbed.folder.parent) not in json.dumps(state)
    assert (state["epoch"], state["step"]) == (3, 9)
    assert state["losses"] == [step.loss for step in undisturbed.curve[6:]]


def test_training_prints_nothing_and_leaves_no_other_files(tmp_path, capfd):
    train_adapter(tiny_llama(), TOKENIZER, tiny_examples(8), SETTINGS, tmp_path, lora=LORA, until_epoch=1)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1"]
