"""What an epoch of a training leaves on the disk, and how it is read and verified.

Belongs here: an epoch's folder: adapter, Adam's moments by parameter name, state. Not here: the training itself
(`training`), what LESS reads from a checkpoint (`warmup`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from less_assets.method.gradients.directions import AdamMoments
from less_assets.method.training.files import file_digest, reading, tensor_metadata, whole_folder, write_tensors
from less_assets.method.training.models import save_adapter

MOMENTS = "adam_moments.safetensors"
STATE = "state.json"


def finished_epochs(output_dir: Path) -> int:
    """The last epoch that a training in `output_dir` has finished; 0 if none."""
    names = [path.name for path in output_dir.glob("epoch-*")]
    return max((int(name.removeprefix("epoch-")) for name in names if re.fullmatch(r"epoch-\d+", name)), default=0)


def epoch_folder(output_dir: Path, epoch: int) -> Path:
    """Where epoch `epoch` (from 1) of a training leaves its files."""
    return output_dir / f"epoch-{epoch}"


def write_epoch(folder: Path, model: PeftModel, moments: AdamMoments, state: Mapping[str, Any]) -> None:
    """Write an epoch's folder, whole or not at all.

    Args:
        folder: The folder to appear.
        model: Its adapter is written.
        moments: Adam's state by parameter name.
        state: What `state.json` holds; at least `epoch`, `step`, `mean_learning_rate`, `losses`.
    """
    with whole_folder(folder) as partial:
        save_adapter(model, partial)
        write_moments(partial / MOMENTS, moments)
        sealed = {**state, "files": {file.name: file_digest(file) for file in sorted(partial.iterdir())}}
        sealed["state_digest"] = _state_digest(sealed)
        (partial / STATE).write_text(json.dumps(sealed, indent=1, sort_keys=True) + "\n")


def write_moments(path: Path, moments: AdamMoments) -> None:
    """Write Adam's state: tensors `exp_avg.<name>` and `exp_avg_sq.<name>`, constants as metadata."""
    tensors = {f"exp_avg.{name}": tensor.contiguous() for name, tensor in moments.exp_avg.items()}
    tensors |= {f"exp_avg_sq.{name}": tensor.contiguous() for name, tensor in moments.exp_avg_sq.items()}
    constants = {name: repr(getattr(moments, name)) for name in ("step", "beta1", "beta2", "eps")}
    write_tensors(path, tensors, {"format": "pt", **constants})


def read_moments(path: Path) -> AdamMoments:
    """Read what `write_moments` has written, in float32 on the CPU.

    Raises:
        CorruptArtifactError: The file is missing, damaged, or lacks step, beta1, beta2 or eps.
    """
    with reading(path):
        metadata = tensor_metadata(path)
        tensors = load_file(path)
        pick = {
            prefix: {key.removeprefix(f"{prefix}."): tensors[key] for key in tensors if key.startswith(f"{prefix}.")}
            for prefix in ("exp_avg", "exp_avg_sq")
        }
        if pick["exp_avg"].keys() != pick["exp_avg_sq"].keys():
            raise ValueError("first and second moments are not of the same parameters")
        return AdamMoments(
            exp_avg=pick["exp_avg"],
            exp_avg_sq=pick["exp_avg_sq"],
            step=int(metadata["step"]),
            beta1=float(metadata["beta1"]),
            beta2=float(metadata["beta2"]),
            eps=float(metadata["eps"]),
        )


def read_state(folder: Path) -> dict[str, Any]:
    """Content of an epoch folder's `state.json`.

    Raises:
        CorruptArtifactError: The file is missing or damaged.
    """
    path = folder / STATE
    with reading(path):
        state = json.loads(path.read_text())
        if not isinstance(state, dict):
            raise ValueError("not a JSON object")
        return state


def verified_state(folder: Path) -> dict[str, Any]:
    """Content of an epoch folder's `state.json`, once every file of the folder has been compared with its digest.

    Weights and moments have no checksums of their own: a flipped bit in them would be trained on.

    Raises:
        CorruptArtifactError: A file is missing or has other bytes than were written.
    """
    state = read_state(folder)
    digests = state.get("files")
    with reading(folder / STATE):
        if state.get("state_digest") != _state_digest(state) or not isinstance(digests, dict):
            raise ValueError("other bytes than were written")
    for name, digest in digests.items():
        with reading(folder / name):
            if file_digest(folder / name) != digest:
                raise ValueError("other bytes than were written")
    return state


def _state_digest(state: Mapping[str, Any]) -> str:
    content = {key: value for key, value in state.items() if key != "state_digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
