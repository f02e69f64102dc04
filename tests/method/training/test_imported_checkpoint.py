"""Foreign checkpoints: paired by name or verified by order, shape and step; everything else refused with a reason."""

import contextlib
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from less_assets.errors import (
    CheckpointImportError,
    CorruptArtifactError,
    LessAssetsError,
    ModelLoadError,
    UnsupportedModelError,
)
from less_assets.method.training.epoch_folder import read_state, write_moments
from less_assets.method.training.imported_checkpoint import import_checkpoint, pair_moments, read_optimizer_state
from less_assets.method.training.models import LoraSettings, attach_adapter, load_adapter, save_adapter
from less_assets.method.training.training import adam_moments, trainable_parameters
from less_assets.method.training.warmup import load_checkpoint, load_moments

CASES = Path(__file__).parents[2] / "data" / "cases"
GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


class Rows(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, row):
        ids = torch.tensor(np.random.default_rng(row).integers(3, 64, 10))
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory):
    """A real Trainer run as a user has it: two checkpoints with optimizer.pt and trainer_state.json."""
    folder = tmp_path_factory.mktemp("trainer")
    model = attach_adapter(tiny_llama(), LoraSettings(rank=4, alpha=8, dropout=0.0), seed=1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="epoch",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    return folder, trainer


@pytest.fixture
def checkpoint(trainer_run, tmp_path):
    """A copy of the second checkpoint, to be damaged."""
    folder = tmp_path / "checkpoint-6"
    folder.mkdir()
    for file in (trainer_run[0] / "checkpoint-6").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def optimizer_state(folder: Path) -> dict:
    return torch.load(folder / "optimizer.pt", weights_only=True)


def refusal(folder: Path, error: type[Exception] = CheckpointImportError, **options) -> str:
    with pytest.raises(error) as caught:
        import_checkpoint(folder, tiny_llama(), folder.parent / "imported", epoch=1, **options)
    assert not (folder.parent / "imported").exists()
    return str(caught.value)


def test_trainer_checkpoint_gives_the_optimizer_s_own_moments(trainer_run, tmp_path):
    folder, trainer = trainer_run
    imported = import_checkpoint(folder / "checkpoint-6", tiny_llama(), tmp_path / "epoch-2", epoch=2)
    log = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert (imported.epoch, imported.step) == (2, 6)
    assert imported.mean_learning_rate == pytest.approx(np.mean([entry["learning_rate"] for entry in log[3:]]))
    assert list(imported.losses) == [entry["loss"] for entry in log[3:]]

    truth = adam_moments(trainer.optimizer, trainer.model)
    moments = load_moments(tmp_path / "epoch-2")
    assert (moments.step, moments.beta1, moments.beta2, moments.eps) == (6, 0.9, 0.999, 1e-8)
    assert moments.exp_avg.keys() == truth.exp_avg.keys()
    for name in truth.exp_avg:
        assert torch.equal(moments.exp_avg[name], truth.exp_avg[name])
        assert torch.equal(moments.exp_avg_sq[name], truth.exp_avg_sq[name])
    adapted = trainable_parameters(load_adapter(tiny_llama(), tmp_path / "epoch-2", trainable=True))
    for name, parameter in trainable_parameters(trainer.model).items():
        assert torch.equal(adapted[name], parameter)


@pytest.mark.parametrize("name", ["checkpoint-6", "checkpoint-12"])
def test_golden_optimizer_pt_equals_golden_moments_by_name(tmp_path, name):
    meta = json.loads((GOLDEN / "meta.json").read_text())
    expected = next(entry for entry in meta["checkpoints"] if entry["name"] == name)
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base")
    rate = expected["mean_learning_rate"]
    imported = import_checkpoint(GOLDEN / name, base, tmp_path / "epoch-1", epoch=1, mean_learning_rate=rate)
    assert (imported.step, imported.mean_learning_rate) == (expected["step"], rate)
    stored = load_file(GOLDEN / name / "adam_moments.safetensors")
    moments = load_moments(tmp_path / "epoch-1")
    assert [[name, list(tensor.shape)] for name, tensor in moments.exp_avg.items()] == sorted(meta["parameters"])
    for parameter in moments.exp_avg:
        assert torch.equal(moments.exp_avg[parameter], stored[f"exp_avg.{parameter}"])
        assert torch.equal(moments.exp_avg_sq[parameter], stored[f"exp_avg_sq.{parameter}"])


def test_own_checkpoint_is_imported_as_it_is(trainer_run, tmp_path):
    folder, _ = trainer_run
    import_checkpoint(folder / "checkpoint-6", tiny_llama(), tmp_path / "epoch-2", epoch=2)
    again = import_checkpoint(tmp_path / "epoch-2", tiny_llama(), tmp_path / "again", epoch=1, mean_learning_rate=1e-3)
    assert again.step == 6
    for name in ("adam_moments.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "epoch-2" / name).read_bytes()


@pytest.mark.parametrize("prefix", ["", "module.", "_fsdp_wrapped_module."])
def test_less_optimizer_bin_is_paired_by_name_in_any_order(trainer_run, checkpoint, tmp_path, prefix):
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "by-order", epoch=1)
    state = optimizer_state(checkpoint)
    names = list(trainable_parameters(trainer_run[1].model))
    by_name = {prefix + names[index]: state["state"][index] for index in reversed(range(len(names)))}
    group = {**state["param_groups"][0], "params": list(by_name)}
    torch.save({"state": by_name, "param_groups": [group]}, checkpoint / "optimizer.bin")
    (checkpoint / "optimizer.pt").unlink()
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "by-name", epoch=1)
    moments = "adam_moments.safetensors"
    assert (tmp_path / "by-name" / moments).read_bytes() == (tmp_path / "by-order" / moments).read_bytes()
    assert json.loads((tmp_path / "by-name" / "state.json").read_text())["imported"]["paired_by"] == "name"


def test_names_that_torch_keeps_beat_the_order(trainer_run, checkpoint):
    model = trainer_run[1].model
    state = optimizer_state(checkpoint)
    names = list(trainable_parameters(model))
    shuffled = list(reversed(range(len(names))))
    state["param_groups"] = [{**state["param_groups"][0], "param_names": [names[index] for index in shuffled]}]
    state["state"] = {position: state["state"][index] for position, index in enumerate(shuffled)}
    torch.save(state, checkpoint / "optimizer.pt")
    moments = pair_moments(read_optimizer_state(checkpoint / "optimizer.pt"), model)
    truth = adam_moments(trainer_run[1].optimizer, model)
    assert all(torch.equal(moments.exp_avg[name], truth.exp_avg[name]) for name in names)


def test_adapter_from_before_safetensors_is_imported(checkpoint, tmp_path):
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "new", epoch=1)
    weights = load_file(checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save(weights, checkpoint / "adapter_model.bin")
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "old", epoch=1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_other_shape_is_refused_with_a_table(checkpoint):
    state = optimizer_state(checkpoint)
    state["state"][1], state["state"][0] = state["state"][0], state["state"][1]
    torch.save(state, checkpoint / "optimizer.pt")
    text = refusal(checkpoint)
    assert "2 of 16 parameters" in text
    assert "layers.0.self_attn.q_proj.lora_A.default.weight  4×32     32×4" in text
    assert "layers.0.self_attn.q_proj.lora_B.default.weight  32×4     4×32" in text


def test_other_step_is_refused(checkpoint):
    state = optimizer_state(checkpoint)
    state["state"][3]["step"] = torch.tensor(5.0)
    torch.save(state, checkpoint / "optimizer.pt")
    assert "step 5, not 6" in refusal(checkpoint)


def test_state_of_another_step_than_the_trainer_s_is_refused(trainer_run, checkpoint):
    other = trainer_run[0] / "checkpoint-3" / "optimizer.pt"
    (checkpoint / "optimizer.pt").write_bytes(other.read_bytes())
    assert "16 of 16" in refusal(checkpoint)


def test_step_is_checked_against_the_folder_s_name_where_there_is_no_trainer_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint-7"))
    assert "step 6, not 7" in refusal(renamed, mean_learning_rate=1e-3)


def test_missing_and_superfluous_names_are_listed(trainer_run, checkpoint):
    state = optimizer_state(checkpoint)
    names = [*list(trainable_parameters(trainer_run[1].model))[1:], "base_model.model.lm_head.weight"]
    by_name = dict(zip(names, state["state"].values(), strict=True))
    group = {**state["param_groups"][0], "params": names}
    (checkpoint / "optimizer.pt").unlink()
    torch.save({"state": by_name, "param_groups": [group]}, checkpoint / "optimizer.bin")
    text = refusal(checkpoint)
    assert "q_proj.lora_A.default.weight  4×32               missing" in text
    assert "base_model.model.lm_head.weight" in text


def test_fewer_states_than_parameters_are_refused(checkpoint):
    state = optimizer_state(checkpoint)
    del state["state"][15]
    state["param_groups"] = [{**state["param_groups"][0], "params": list(range(15))}]
    torch.save(state, checkpoint / "optimizer.pt")
    assert "1 of 16" in refusal(checkpoint)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -1.0])
def test_impossible_moments_are_refused(checkpoint, damage):
    state = optimizer_state(checkpoint)
    state["state"][2]["exp_avg_sq"][0, 0] = damage
    torch.save(state, checkpoint / "optimizer.pt")
    assert "k_proj.lora_A" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("global_step6/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed ZeRO"),
        ("optimizer_0/__0_0.distcp", "FSDP"),
        ("optimizer_rank0.bin", "FSDP"),
    ],
)
def test_sharded_states_are_refused_by_name(checkpoint, file, kind):
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_bytes(b"shard")
    text = refusal(checkpoint)
    assert kind in text
    assert "warmup.import" in text


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"state1": torch.zeros(3, dtype=torch.uint8), "state2": torch.zeros(3), "qmap1": torch.zeros(3)}, "8-bit"),
        (
            {"state1": torch.zeros(3, dtype=torch.uint8), "state2": torch.zeros(3, dtype=torch.uint8), "step": 1},
            "8-bit",
        ),
        ({"state1": torch.zeros(3), "step": 1}, "exp_avg is missing"),
        ({"state1": torch.zeros(3), "state2": torch.zeros(3), "step": 1, "unorm_vec": torch.zeros(1)}, "LAMB"),
        ({"exp_avg_sq_row": torch.zeros(3), "exp_avg_sq_col": torch.zeros(3)}, "Adafactor"),
        ({"momentum_buffer": torch.zeros(3)}, "SGD"),
        ({"exp_avg": torch.zeros(3), "step": 1}, "exp_avg_sq is missing"),
        ({"exp_avg": torch.zeros(3, dtype=torch.uint8), "exp_avg_sq": torch.zeros(3), "step": 1}, "8-bit"),
        ({"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "max_exp_avg_sq": torch.zeros(3)}, "AMSGrad"),
    ],
)
def test_other_optimizers_are_refused_by_name(checkpoint, state, kind):
    group = {"params": [0], "betas": (0.9, 0.999), "eps": 1e-8}
    torch.save({"state": {0: state}, "param_groups": [group]}, checkpoint / "optimizer.pt")
    assert kind in refusal(checkpoint)


def test_constants_of_adam_are_never_guessed(checkpoint):
    state = optimizer_state(checkpoint)
    del state["param_groups"][0]["eps"]
    torch.save(state, checkpoint / "optimizer.pt")
    assert "betas and eps" in refusal(checkpoint)


EXPLOITED = Path(tempfile.gettempdir()) / "less-assets-exploited"


class Exploit:
    def __reduce__(self):
        return (Path.touch, (EXPLOITED,))


def test_pickled_code_is_not_run(checkpoint):
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Exploit()))
    refusal(checkpoint)
    torch.save({"state": Exploit(), "param_groups": []}, checkpoint / "optimizer.pt")
    assert "could run code" in refusal(checkpoint)
    assert not EXPLOITED.exists()


def test_unknown_learning_rate_is_asked_for(checkpoint, tmp_path):
    (checkpoint / "trainer_state.json").unlink()
    assert "warmup.mean_learning_rates" in refusal(checkpoint)
    imported = import_checkpoint(checkpoint, tiny_llama(), tmp_path / "given", epoch=1, mean_learning_rate=2e-5)
    assert imported == load_checkpoint(tmp_path / "given")
    assert (imported.mean_learning_rate, imported.losses) == (2e-5, ())


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ((CASES / "import-lr-zero" / "trainer_state.json").read_text(), "is 0, the mean of 1 logged"),
        ("{}", "not known"),
    ],
)
def test_a_checkpoint_without_weight_is_refused_before_its_states_are_read(checkpoint, tmp_path, log, said):
    (checkpoint / "trainer_state.json").write_text(log)
    optimizer = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(b"damaged")
    told = refusal(checkpoint)
    assert said in told
    assert "warmup.mean_learning_rates" in told
    (checkpoint / "trainer_state.json").unlink()
    (checkpoint / "optimizer.pt").write_bytes(optimizer)
    imported = import_checkpoint(checkpoint, tiny_llama(), tmp_path / "given", epoch=1, mean_learning_rate=1e-5)
    assert imported.mean_learning_rate == 1e-5


@pytest.mark.parametrize("rate", [0.0, -1e-5, float("nan"), float("inf")])
def test_a_stated_rate_that_gives_no_weight_is_refused(checkpoint, rate):
    assert "warmup.mean_learning_rates" in refusal(checkpoint, mean_learning_rate=rate)


@pytest.mark.parametrize(("logged", "warned"), [(100, False), (10, False), (9, True), (1, True)])
def test_few_logged_steps_are_told(checkpoint, tmp_path, logged, warned):
    steps = [{"step": 6, "epoch": 2 - 0.9 * index / 100, "learning_rate": 1e-5} for index in range(logged)]
    log = {"global_step": 200, "epoch": 2.0, "log_history": steps}
    (checkpoint / "trainer_state.json").write_text(json.dumps(log))
    state = optimizer_state(checkpoint)
    for entry in state["state"].values():
        entry["step"] = torch.tensor(200.0)
    torch.save(state, checkpoint / "optimizer.pt")
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "epoch-2", epoch=2)
    warnings = read_state(tmp_path / "epoch-2")["imported"].get("warnings", [])
    assert bool(warnings) == warned
    assert not warned or f"{logged} logged steps of about 100" in warnings[0]


def test_nothing_is_told_of_a_run_that_logged_every_step(trainer_run, tmp_path):
    import_checkpoint(trainer_run[0] / "checkpoint-3", tiny_llama(), tmp_path / "epoch-1", epoch=1)
    imported = read_state(tmp_path / "epoch-1")["imported"]
    assert "warnings" not in imported
    assert imported["weight_decay"] == [0.0]


@pytest.mark.parametrize("wrapped", [False, True])
def test_states_of_a_paged_32_bit_optimizer_are_adams(trainer_run, checkpoint, tmp_path, wrapped):
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "torch", epoch=1)
    state = optimizer_state(checkpoint)
    for index, entry in state["state"].items():
        moments = {"state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}
        moments = {"__bnb_optimizer_quant_state__": moments} if wrapped else moments
        state["state"][index] = {"step": int(entry["step"]), **moments}
    for group in state["param_groups"]:
        group["weight_decay"] = 0.1
    torch.save(state, checkpoint / "optimizer.pt")
    import_checkpoint(checkpoint, tiny_llama(), tmp_path / "paged", epoch=1)
    assert read_state(tmp_path / "paged")["imported"]["weight_decay"] == [0.1]
    expected, got = (load_moments(tmp_path / name) for name in ("torch", "paged"))
    assert got.step == expected.step
    for name in expected.exp_avg:
        assert torch.equal(got.exp_avg[name], expected.exp_avg[name])
        assert torch.equal(got.exp_avg_sq[name], expected.exp_avg_sq[name])


def test_learning_rates_of_epochs_with_an_incomplete_batch(checkpoint, tmp_path):
    """LESS's own run: 105.7 batches an epoch, so that epochs end at 0.99, 1.99, 2.99."""
    steps = [{"step": step, "epoch": step / 105.7, "learning_rate": float(step), "loss": 1.0} for step in range(1, 212)]
    log = {"global_step": 6, "epoch": 211 / 105.7, "log_history": [*steps, {"step": 211, "epoch": 2.0, "eval_loss": 1}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(log))
    imported = import_checkpoint(checkpoint, tiny_llama(), tmp_path / "epoch-2", epoch=2)
    assert imported.mean_learning_rate == np.mean(range(106, 212))


def test_missing_parts_are_named(checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    assert "neither optimizer.pt nor optimizer.bin" in refusal(checkpoint)
    (checkpoint / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(checkpoint, ModelLoadError)
    assert "no such folder" in refusal(checkpoint / "nowhere")


def test_moments_without_constants_are_not_enough(trainer_run, checkpoint):
    (checkpoint / "optimizer.pt").unlink()
    file = checkpoint / "adam_moments.safetensors"
    write_moments(file, adam_moments(trainer_run[1].optimizer, trainer_run[1].model))
    save_file(load_file(file), file)
    assert "complete adam_moments.safetensors" in refusal(checkpoint)


def test_adapter_of_another_model_is_refused(checkpoint):
    weights = load_file(checkpoint / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, checkpoint / "adapter_model.safetensors", {"format": "pt"})
    assert "1 weights of the adapter do not fit" in refusal(checkpoint, ModelLoadError)


def test_dora_is_refused(checkpoint):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    save_adapter(model, checkpoint)
    refusal(checkpoint, UnsupportedModelError)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"]
)
def test_truncated_files_are_named(checkpoint, name):
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    text = refusal(checkpoint, (CheckpointImportError, CorruptArtifactError, ModelLoadError))
    assert name in text or str(checkpoint) in text


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4))
tensors = st.sampled_from(
    [
        torch.zeros(4, 32),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.full((4, 32), float("nan")),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
    ]
)
values = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 3) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
adam_like = st.fixed_dictionaries({}, optional={"exp_avg": values, "exp_avg_sq": values, "step": values})
group_like = st.fixed_dictionaries({}, optional={"params": st.just([0]) | values, "betas": values, "eps": values})
states = st.fixed_dictionaries(
    {
        "state": st.dictionaries(st.integers(0, 3) | st.text(max_size=3), adam_like | values, max_size=2) | values,
        "param_groups": st.lists(group_like | values, max_size=3) | values,
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(state=states | values)
def test_any_content_is_read_or_refused(trainer_run, tmp_path, state):
    file = tmp_path / "optimizer.pt"
    torch.save(state, file)
    with contextlib.suppress(LessAssetsError):
        pair_moments(read_optimizer_state(file), trainer_run[1].model)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(position=st.integers(0, 2**31), byte=st.integers(0, 255))
def test_any_flipped_byte_is_read_or_refused(trainer_run, tmp_path, position, byte):
    data = bytearray((trainer_run[0] / "checkpoint-6" / "optimizer.pt").read_bytes())
    data[position % len(data)] = byte
    file = tmp_path / "optimizer.pt"
    file.write_bytes(data)
    with contextlib.suppress(LessAssetsError):
        pair_moments(read_optimizer_state(file), trainer_run[1].model)
