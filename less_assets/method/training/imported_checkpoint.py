"""Import of warm-up checkpoints that other programs have trained: adapter, Adam's moments, mean learning rate.

Belongs here: reading the optimizer states of transformers' Trainer and of LESS's reference code, and refusing whatever
could only be guessed. What a checkpoint looks like here, and reading it again, is `warmup`'s.

Nothing is unpickled but tensors and plain containers (`weights_only`). Moments are paired with parameters by name where
the file has names; else by the order in which Trainer hands parameters to the optimizer, verified by number, shape and
step.
"""

from __future__ import annotations

import math
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from less_assets.errors import CheckpointImportError, ModelLoadError
from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.gradients.per_example import lora_parameters
from less_assets.method.training.base_checks import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from less_assets.method.training.epoch_folder import MOMENTS, read_moments, write_epoch
from less_assets.method.training.files import tensor_metadata
from less_assets.method.training.models import load_adapter
from less_assets.method.training.trainer_state import few_logged_steps, read_trainer_state
from less_assets.method.training.trainer_state import mean_learning_rate as learning_rate_of
from less_assets.method.training.training import trainable_parameters
from less_assets.method.training.warmup import Checkpoint, load_checkpoint

ROWS_SHOWN = 20

_MOMENT_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

_RETRAIN = "or leave `warmup.import` out and let this project train the warm-up."
_SHARDED_FSDP = (
    "Save with `fsdp_state_dict_type: FULL_STATE_DICT`, or join the shards: `python -m torch.distributed.checkpoint."
    "format_utils dcp_to_torch CHECKPOINT/optimizer_0 CHECKPOINT/optimizer.bin`, "
)
# Pattern of files in a checkpoint's folder -> what they are and what to do.
_SHARDED = {
    "global_step*/*optim_states.pt": ("DeepSpeed ZeRO", "Train the warm-up (5 % of the pool) without DeepSpeed, "),
    "*optim_states.pt": ("DeepSpeed ZeRO", "Train the warm-up (5 % of the pool) without DeepSpeed, "),
    "optimizer_*/*.distcp": ("FSDP (SHARDED_STATE_DICT)", _SHARDED_FSDP),
    "optimizer_*/.metadata": ("FSDP (SHARDED_STATE_DICT)", _SHARDED_FSDP),
    "*.distcp": ("FSDP (SHARDED_STATE_DICT)", _SHARDED_FSDP),
    "optimizer_rank*.bin": ("FSDP (LOCAL_STATE_DICT)", "Save with `fsdp_state_dict_type: FULL_STATE_DICT`, "),
    "rank*-of-*-optimizer.pt": ("XLA FSDP", "Train the warm-up on one device, "),
}
BITSANDBYTES_STATE = "__bnb_optimizer_quant_state__"
"""Where younger versions of bitsandbytes put a parameter's moments in a `state_dict`."""

# Key of a parameter's state -> which optimizer has it. Γ needs Adam's own two moments in full.
_FOREIGN_STATES = {
    "qmap1": "an 8-bit optimizer of bitsandbytes",
    "absmax1": "an 8-bit optimizer of bitsandbytes",
    "unorm_vec": "LAMB or LARS",
    "exp_avg_sq_row": "Adafactor",
    "max_exp_avg_sq": "AMSGrad",
    "momentum_buffer": "SGD with momentum",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
}


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer file holds, before it is paired with parameters.

    Attributes:
        entries: State of each parameter, in the order of the optimizer's groups.
        names: Parameter names in the same order, None if the file has none.
        group_sizes: Number of parameters in each group.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Adam's ε.
        weight_decay: Decoupled weight decay of each group that has parameters; empty if the file does not say.
    """

    entries: list[Mapping[str, Any]]
    names: list[str] | None
    group_sizes: list[int]
    beta1: float
    beta2: float
    eps: float
    weight_decay: tuple[float, ...] = ()


def import_checkpoint(
    source: Path, model: Any, folder: Path, *, epoch: int, mean_learning_rate: float | None = None
) -> Checkpoint:
    """Turn a foreign checkpoint into one of this project.

    Args:
        source: Folder with a PEFT LoRA adapter (`adapter_config.json` and `adapter_model.safetensors` or `.bin`) and
            Adam's state: `optimizer.pt` of transformers' Trainer (by index or by name), `optimizer.bin` as FSDP and
            LESS write it (by name), or this project's own `adam_moments.safetensors`.
        model: The base model that the adapter was trained on; changed in place.
        folder: The checkpoint's folder to appear, whole or not at all.
        epoch: Number of the checkpoint, from 1.
        mean_learning_rate: Mean over the epoch that ends here; None reads it from `trainer_state.json`.

    Returns:
        The imported checkpoint. What it was imported from stands in its `state.json` under `imported`: `source`,
        `optimizer` and `paired_by`; `weight_decay` of the groups, where the file states it; `warnings`, where a person
        should look.

    Raises:
        CheckpointImportError: Anything that could only be guessed; with a table of the parameters that do not match.
        ModelLoadError: The adapter is missing or does not fit the base model.
        UnsupportedModelError: The adapter is more than plain LoRA on linear layers.
        CorruptArtifactError: A file is damaged.
    """
    if not source.is_dir():
        raise CheckpointImportError("There is no such folder.", where=str(source), fix="Correct `warmup.import`.")
    _refuse_sharded(source)
    trainer_state = read_trainer_state(source)
    rate = learning_rate_of(trainer_state, mean_learning_rate, source)
    adapted = _load_foreign_adapter(model, source)
    lora_parameters(adapted)  # refuses by name what has no exact per-example gradients
    file = _optimizer_file(source)
    if file.name == MOMENTS:
        moments = read_moments(file)
        paired_by = "name"
        entries: list[Mapping[str, Any]] = [
            {"exp_avg": moments.exp_avg[name], "exp_avg_sq": moments.exp_avg_sq[name], "step": moments.step}
            for name in moments.exp_avg
        ]
        state = OptimizerState(
            entries, list(moments.exp_avg), [len(entries)], moments.beta1, moments.beta2, moments.eps
        )
    else:
        state = read_optimizer_state(file)
        paired_by = "name" if state.names is not None else "order, shape and step"
    moments = pair_moments(state, adapted, expected_step=trainer_state.step, where=str(file))
    imported: dict[str, Any] = {"source": source.name, "optimizer": file.name, "paired_by": paired_by}
    if state.weight_decay:
        imported["weight_decay"] = sorted(set(state.weight_decay))
    if mean_learning_rate is None and (warning := few_logged_steps(trainer_state)):
        imported["warnings"] = [warning]
    record = {
        "epoch": epoch,
        "step": moments.step,
        "mean_learning_rate": rate,
        "losses": [*trainer_state.losses],
        "imported": imported,
    }
    write_epoch(folder, adapted, moments, record)
    return load_checkpoint(folder)


def read_optimizer_state(file: Path) -> OptimizerState:
    """Read an optimizer's `state_dict` of tensors and plain containers.

    Of bitsandbytes' optimizers, those are read that keep Adam's moments in 32 bits (`state1` is torch's `exp_avg`,
    `state2` its `exp_avg_sq`; `AdamW32bit`, paged or not).

    Args:
        file: `optimizer.pt` or `optimizer.bin`: `state` by index or by name, and `param_groups`.

    Raises:
        CheckpointImportError: The file holds more than tensors, is damaged, or is not the state of a plain Adam.
    """
    where = str(file)
    loaded = _load_tensors_only(file)
    states = loaded.get("state") if isinstance(loaded, dict) else None
    groups = loaded.get("param_groups") if isinstance(loaded, dict) else None
    if not isinstance(states, dict) or not isinstance(groups, list) or not states or not groups:
        raise CheckpointImportError(
            "The file is not an optimizer's state: `state` and `param_groups` are missing or empty.",
            where=where,
            fix="Point `warmup.import` to a checkpoint that was saved after an optimizer step.",
        )
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise CheckpointImportError("A parameter group lists no parameters.", where=where)
    used = [group for group in groups if group["params"]]
    keys = [key for group in used for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or set(keys) != set(states):
        only = sorted(map(str, set(map(str, keys)) ^ set(map(str, states))))
        raise CheckpointImportError(
            f"Groups and states are not of the same parameters; only in one of them: {', '.join(only[:ROWS_SHOWN])}.",
            where=where,
            fix="Save the checkpoint after a step in which every trainable parameter had a gradient.",
        )
    entries = [_with_names_of_torch(states[key]) for key in keys]
    _refuse_other_optimizers(entries, used, where)
    names = keys if all(isinstance(key, str) for key in keys) else _names_of_groups(used)
    constants = {_constants(group, where) for group in used}
    if len(constants) > 1:
        raise CheckpointImportError(f"Parameter groups differ in Adam's constants: {sorted(constants)}.", where=where)
    beta1, beta2, eps = constants.pop()
    sizes = [len(group["params"]) for group in groups]
    decays = [group.get("weight_decay") for group in used]
    stated = tuple(float(decay) for decay in decays if isinstance(decay, int | float) and math.isfinite(decay))
    return OptimizerState(entries, names, sizes, beta1, beta2, eps, stated if len(stated) == len(used) else ())


def pair_moments(
    state: OptimizerState, model: PeftModel, *, expected_step: int | None = None, where: str = ""
) -> AdamMoments:
    """Pair an optimizer's states with the adapter's parameters: by name, else by Trainer's order; verify them all.

    Args:
        state: What the optimizer file holds.
        model: PEFT model whose adapter is trainable.
        expected_step: Steps done according to the checkpoint itself, None if it does not say.
        where: Named in errors.

    Returns:
        Moments by parameter name in float32.

    Raises:
        CheckpointImportError: With a table of all parameters that are missing, superfluous, of another shape or step,
            or not finite.
    """
    parameters = {name: tuple(parameter.shape) for name, parameter in trainable_parameters(model).items()}
    if state.names is not None:
        canonical = [_canonical(name) for name in state.names]
        entries = dict(zip(canonical, state.entries, strict=True))
        wanted = {_canonical(name): name for name in parameters}
        pairs: list[tuple[str, Mapping[str, Any] | None]] = [
            (name, entries.get(short)) for short, name in wanted.items()
        ]
        superfluous = [name for name in canonical if name not in wanted]
        superfluous += [f"{name} (again)" for name in entries if canonical.count(name) > 1]
    else:
        order = _trainer_order(model, state.group_sizes, where)
        pairs = [
            (name, state.entries[index] if index < len(state.entries) else None) for index, name in enumerate(order)
        ]
        superfluous = [f"parameter {index}" for index in range(len(order), len(state.entries))]

    steps = [_step(entry) for _, entry in pairs if entry is not None]
    step = expected_step if expected_step is not None else next((step for step in steps if step is not None), None)
    mismatches = [
        (name, _shape_text(parameters[name]), fault)
        for name, entry in pairs
        if (fault := _fault(entry, parameters[name], step)) is not None
    ]
    mismatches += [(name, "no such parameter", "in the optimizer's state") for name in superfluous]
    if mismatches or step is None:
        total = max(len(parameters), len(state.entries))
        raise CheckpointImportError(
            f"{len(mismatches)} of {total} parameters do not match the optimizer's state:\n" + _table(mismatches),
            where=where,
            fix="Check that adapter, optimizer state and base model belong together; " + _RETRAIN,
        )
    return AdamMoments(
        exp_avg={name: _moment(entry, "exp_avg") for name, entry in pairs},
        exp_avg_sq={name: _moment(entry, "exp_avg_sq") for name, entry in pairs},
        step=step,
        beta1=state.beta1,
        beta2=state.beta2,
        eps=state.eps,
    )


def _refuse_sharded(source: Path) -> None:
    for pattern, (kind, fix) in _SHARDED.items():
        shard = next(source.glob(pattern), None)
        if shard is not None and not any((source / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):
            raise CheckpointImportError(
                f"The optimizer's state is sharded by {kind}, and a shard does not say which parameters it holds.",
                where=str(shard),
                fix=fix + _RETRAIN,
            )


def _optimizer_file(source: Path) -> Path:
    moments = source / MOMENTS
    if moments.is_file() and {"step", "beta1", "beta2", "eps"} <= tensor_metadata(moments).keys():
        return moments
    for name in ("optimizer.pt", "optimizer.bin"):
        if (source / name).is_file():
            return source / name
    raise CheckpointImportError(
        f"There is no optimizer state: neither optimizer.pt nor optimizer.bin, nor a complete {MOMENTS}.",
        where=str(source),
        fix="Save checkpoints with Trainer's `save_only_model=False`, " + _RETRAIN,
    )


def _load_tensors_only(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        more = f" ({refused.group(1)})" if refused else ""
        raise CheckpointImportError(
            f"The file is damaged or holds more than tensors and numbers{more}; it is not loaded, since it could run "
            "code.",
            where=str(file),
            fix="Save a plain `optimizer.state_dict()` (8-bit optimizers have none), " + _RETRAIN,
        ) from error
    except Exception as error:
        # A damaged archive makes torch.load raise nearly anything, struct.error and IndexError included.
        raise CheckpointImportError(
            f"The file can't be read: {type(error).__name__}: {str(error)[:200]}",
            where=str(file),
            fix="Copy the checkpoint again, " + _RETRAIN,
        ) from error


def _with_names_of_torch(entry: Any) -> Any:
    """A parameter's state in which moments that bitsandbytes keeps in floating point have torch's names."""
    if not isinstance(entry, dict):
        return entry
    inner = entry.get(BITSANDBYTES_STATE)
    if isinstance(inner, dict):
        entry = {**{key: value for key, value in entry.items() if key != BITSANDBYTES_STATE}, **inner}
    names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    return {names.get(key, key): value for key, value in entry.items()} if names.keys() <= entry.keys() else entry


def _refuse_other_optimizers(entries: Sequence[Any], groups: Sequence[Mapping[str, Any]], where: str) -> None:
    fix = "Train the warm-up with AdamW in 32 bits, " + _RETRAIN
    if not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointImportError("The state of a parameter is not a dictionary.", where=where, fix=fix)
    keys = {key for entry in entries for key in entry}
    kind = next((kind for key, kind in _FOREIGN_STATES.items() if key in keys), None)
    if kind is None and any(group.get("amsgrad") for group in groups):
        kind = "AMSGrad"
    if kind is not None:
        raise CheckpointImportError(f"The state is that of {kind}; LESS needs Adam's.", where=where, fix=fix)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        if any(name not in entry for entry in entries):
            raise CheckpointImportError(f"Not the state of Adam: {name} is missing.", where=where, fix=fix)
    tensors = [entry[name] for entry in entries for name in ("exp_avg", "exp_avg_sq")]
    if not all(type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_cpu for tensor in tensors):
        raise CheckpointImportError("Adam's moments are not plain tensors.", where=where, fix=fix)
    packed = next((tensor.dtype for tensor in tensors if tensor.dtype not in _MOMENT_DTYPES), None)
    if packed is not None:
        what = f"Adam's moments are stored as {packed}; 8-bit states do not hold what Γ needs."
        raise CheckpointImportError(what, where=where, fix=fix)
    if any(group.get("maximize") for group in groups):
        raise CheckpointImportError("The optimizer maximizes; LESS needs descent.", where=where, fix=fix)


def _names_of_groups(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Names that torch keeps when an optimizer was given named parameters."""
    names = [name for group in groups for name in (group.get("param_names") or [])]
    complete = len(names) == sum(len(group["params"]) for group in groups)
    return names if complete and all(isinstance(name, str) for name in names) else None


def _constants(group: Mapping[str, Any], where: str) -> tuple[float, float, float]:
    betas, eps = group.get("betas"), group.get("eps")
    numbers = [*betas, eps] if isinstance(betas, list | tuple) and len(betas) == 2 else []
    if not numbers or not all(isinstance(number, int | float) for number in numbers):
        raise CheckpointImportError(
            "The optimizer's groups do not state Adam's betas and eps.",
            where=where,
            fix="They are never guessed; save a complete `optimizer.state_dict()`, " + _RETRAIN,
        )
    beta1, beta2, epsilon = (float(number) for number in numbers)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= epsilon < math.inf):
        raise CheckpointImportError(f"Not constants of Adam: betas {betas}, eps {eps}.", where=where)
    return beta1, beta2, epsilon


def _trainer_order(model: PeftModel, group_sizes: Sequence[int], where: str) -> list[str]:
    """Parameter names in the order of an optimizer that Trainer has made, or one made of `model.parameters()`.

    Trainer makes two groups, with weight decay and without (biases and norms), each in `named_parameters()` order.
    """
    names = list(trainable_parameters(model))
    if len(group_sizes) == 1:
        return names
    if len(group_sizes) > 2:
        raise CheckpointImportError(
            f"The optimizer has {len(group_sizes)} parameter groups and no names: their order can't be verified.",
            where=where,
            fix="Save the state by name (torch: pass `named_parameters()` to the optimizer), " + _RETRAIN,
        )
    with_decay = set(Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model)))
    decayed = [name for name in names if name in with_decay]
    if len(decayed) != group_sizes[0]:
        raise CheckpointImportError(
            f"The optimizer's groups have {group_sizes[0]} and {group_sizes[1]} parameters; Trainer would have made "
            f"them of {len(decayed)} and {len(names) - len(decayed)} for this adapter.",
            where=where,
            fix="Check that adapter and optimizer state belong together; " + _RETRAIN,
        )
    return decayed + [name for name in names if name not in with_decay]


def _canonical(name: str) -> str:
    """A parameter's name without what wrappers and the adapter's own name add to it."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    name = name.removeprefix("module.")
    return re.sub(r"\.(lora_[AB])\.(?:[^.]+\.)?weight$", r".\1.weight", name)


def _step(entry: Mapping[str, Any]) -> int | None:
    step = entry["step"]
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(number, int | float) or not math.isfinite(number) or number < 1 or number != int(number):
        return None
    return int(number)


def _moment(entry: Mapping[str, Any] | None, name: str) -> Tensor:
    assert entry is not None
    moment: Tensor = entry[name]
    return moment.detach().to(torch.float32).contiguous()


def _fault(entry: Mapping[str, Any] | None, shape: tuple[int, ...], step: int | None) -> str | None:
    """What is wrong with a parameter's state, None if nothing is."""
    if entry is None:
        return "missing"
    shapes = [tuple(entry[name].shape) for name in ("exp_avg", "exp_avg_sq")]
    stored_step = _step(entry)
    if shapes != [shape, shape]:
        return " and ".join(dict.fromkeys(_shape_text(other) for other in shapes))
    if stored_step is None or stored_step != step:
        return f"step {stored_step if stored_step is not None else entry['step']}, not {step}"
    if not all(torch.isfinite(entry[name]).all() for name in ("exp_avg", "exp_avg_sq")):
        return "not finite"
    if (entry["exp_avg_sq"] < 0).any():
        return "negative second moment"
    return None


def _shape_text(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape) or "scalar"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    shown = [("parameter", "adapter", "optimizer's state"), *rows[:ROWS_SHOWN]]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in shown]
    if len(rows) > ROWS_SHOWN:
        lines.append(f"  … and {len(rows) - ROWS_SHOWN} more")
    return "\n".join(lines)


def _load_foreign_adapter(model: Any, source: Path) -> PeftModel:
    """Load the adapter; one from the days before safetensors is read with `weights_only` and converted on the way."""
    old = source / "adapter_model.bin"
    if (source / ADAPTER_WEIGHTS).is_file() or not old.is_file() or not (source / ADAPTER_CONFIG).is_file():
        return load_adapter(model, source, trainable=True)
    weights = _load_tensors_only(old)
    if not isinstance(weights, dict) or not all(type(value) is Tensor for value in weights.values()):
        raise ModelLoadError("The file does not hold an adapter's weights.", where=str(old))
    with tempfile.TemporaryDirectory() as converted:
        shutil.copyfile(source / ADAPTER_CONFIG, Path(converted) / ADAPTER_CONFIG)
        save_file({str(name): value.contiguous() for name, value in weights.items()}, Path(converted) / ADAPTER_WEIGHTS)
        return load_adapter(model, Path(converted), trainable=True)
