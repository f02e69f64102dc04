"""Settings of a first project file that depend on rows, model and machine.

Belongs here: how long rows may be, how large the adapter is, what must be computed twice to fit into a GPU. The text of
the file is `new_file.py`.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

BYTES_PER_TOKEN = 3
"""Fewer than most tokenizers need for English (4) and about what they need for code and other scripts: rather too many
tokens are expected than too few."""
TURN_TOKENS, ROW_TOKENS = 16, 32
"""What a chat template adds to a turn, and to a row, at most as a rule."""
UNKNOWN_CONTEXT = 2048
"""Tokens at most where nothing on this machine says what the model can read."""
LENGTH_STEP = 128
PAPER_PARAMETERS = 7e9
_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """A value for the project file, and why it is this one."""

    value: int
    why: str


def row_tokens(table: pl.DataFrame) -> pl.Series:
    """About how many tokens each usable row of a table of pool rows has, by its bytes; Float64 (n,).

    Args:
        table: Columns messages, tools and status, as `POOL_SCHEMA` has them.
    """
    names = ("content", "reasoning", "tool_calls")
    texts = [pl.element().struct.field(name).str.len_bytes().fill_null(0) for name in names]
    turns = pl.col("messages").list
    size = turns.eval(pl.sum_horizontal(texts)).list.sum() + pl.col("tools").str.len_bytes().fill_null(0)
    tokens = size / BYTES_PER_TOKEN + turns.len() * TURN_TOKENS + ROW_TOKENS
    return table.filter(pl.col("status") == "ok").select(tokens=tokens.cast(pl.Float64))["tokens"]


def max_length(tokens: Sequence[float], model: str) -> Setting:
    """Room for 99 of 100 rows, if the model can read so much.

    Args:
        tokens: Of each row; at least one.
        model: As the project file names it.
    """
    most = float(np.quantile(tokens, 0.99))
    wanted = -(-int(np.ceil(most)) // LENGTH_STEP) * LENGTH_STEP
    context = _config(model).get("max_position_embeddings")
    if isinstance(context, int) and wanted > context:
        return Setting(context, "what the model can read")
    if not isinstance(context, int) and wanted > UNKNOWN_CONTEXT:
        return Setting(UNKNOWN_CONTEXT, f"99 of 100 rows have up to {wanted}; more if the model can read it")
    return Setting(wanted, "99 of 100 rows have no more, by their bytes")


def lora_rank(parameters: float | None) -> Setting:
    """The paper's rank for models as large as the paper's, less for smaller ones."""
    if parameters is None:
        return Setting(128, "the paper's, for 7 and 13 billion parameters; less for a smaller model")
    if parameters >= PAPER_PARAMETERS / 2:
        return Setting(128, "the paper's, for models of 7 and 13 billion parameters")
    rank = 16 if parameters < 1e9 else 64
    return Setting(rank, f"the paper has 128 for 7 billion parameters, this model has {_in_words(parameters)}")


def checkpointing(parameters: float | None, length: int) -> str | None:
    """Why activations must be computed twice to fit a row into this machine's GPU; None: they need not, or no GPU.

    Args:
        parameters: Of the model; None: not known, so that nothing is said.
        length: Tokens of the longest row.
    """
    memory = gpu_bytes()
    if not memory or parameters is None:
        return None
    row = (9e9 if parameters < 2e9 else 19e9) * length / 2048  # `python -m benchmarks.memory`
    needed = 2 * parameters + row
    if needed <= memory:
        return None
    return f"a row of {length} tokens needs about {needed / 1e9:.0f} GB, the GPU has {memory / 1e9:.0f}"


def gpu_bytes() -> int:
    """Memory of this machine's first CUDA device; 0: there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def parameters_of(model: str) -> float | None:
    """About how many parameters a model has, by its name (`SmolLM2-135M`) or the size of its files; None: not known."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        width = 4 if _config(model).get("torch_dtype", _config(model).get("dtype")) == "float32" else 2
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / width or None
    sizes = _SIZE_IN_NAME.findall(model.partition("@")[0])
    return float(sizes[-1][0]) * (1e9 if sizes[-1][1] in "bB" else 1e6) if sizes else None


def _in_words(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{max(1, round(parameters / 1e6))} million"


def _config(model: str) -> dict[str, Any]:
    """A model's `config.json` in its folder or in Hugging Face's cache; empty if it is in neither."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = model.partition("@")
    path: Any = Path(model).expanduser() / "config.json"
    try:
        if not path.parent.is_dir():
            path = try_to_load_from_cache(name, "config.json", revision=revision or None)
        config = json.loads(Path(path).read_text()) if isinstance(path, str | os.PathLike) else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
