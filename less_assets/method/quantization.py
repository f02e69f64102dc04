"""Feature rows in few bytes: float16, 8, 4 and 1 bits a number, each row with one scale.

Belongs here: encoding, decoding and the choice of bits for a byte budget. Not here: files (`less_assets.store`).

Scores are cosines, so a row's scale only has to preserve its direction: it is chosen for the least squared error, not
to hold the largest value. Sketches of Adam-like directions are close to Gaussian and lose little at 4 bits and even at
1; spending the saved bytes on dimensions wins (measured in `benchmarks/features.py`). Plain gradients have heavy tails
and want 8 bits.
"""

from __future__ import annotations

import numpy as np

STORAGES = ("float16", "int8", "int4", "int1")
BITS = {"float16": 16, "int8": 8, "int4": 4, "int1": 1}

_ROWS_AT_A_TIME = 32  # bounds the temporary arrays of encoding
_CLIPS = {  # largest representable value in units of the row's root mean square; the best one is kept row by row
    "int8": (3.5, 4.5, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0),
    "int4": (2.0, 2.35, 2.6, 3.0, 3.7, 4.6, 6.0, 9.0, 14.0),
}


def bytes_per_row(storage: str, dimension: int) -> int:
    """Bytes of a row's codes; its float32 scale adds 4."""
    return -(-dimension * BITS[storage] // 8)


def choose_storage(byte_budget: int, form: str, parameters: int | None = None) -> tuple[str, int]:
    """Storage and dimension that keep scores truest for a number of bytes a row.

    Few bits and many dimensions beat the reverse: 1 bit for `marginal`, 4 bits for the other Adam forms, 8 for `sgd`.
    Dimensions beyond the number of parameters would be empty: there the bits grow instead.

    Args:
        byte_budget: Bytes of codes a row, at least 1.
        form: Direction form.
        parameters: P, the length of the direction; None if not known.

    Returns:
        (storage, dimension) with `bytes_per_row(storage, dimension) <= byte_budget`.
    """
    ladder = {"marginal": ("int1", "int4", "int8", "float16"), "sgd": ("int8", "float16")}
    for storage in ladder.get(form, ("int4", "int8", "float16")):
        dimension = byte_budget * 8 // BITS[storage]
        if parameters is None or dimension <= parameters:
            return storage, dimension
    assert parameters is not None
    return "float16", parameters


def encode(features: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode feature rows.

    Args:
        features: float32 (n, k), finite.
        storage: One of `STORAGES`.

    Returns:
        codes: float16 (n, k), int8 (n, k), or uint8 (n, ceil(k·bits/8)) with the first number in the lowest bits.
        scale: float32 (n,); 0 for a row of zeros.

    Raises:
        ValueError: If a value is not finite or the storage is unknown.
    """
    features = np.asarray(features, dtype=np.float32)
    if not np.isfinite(features).all():
        raise ValueError("features to encode must be finite")
    if storage == "float16":
        scale = np.abs(features).max(axis=1, initial=0.0)
        return _divided(features, scale).astype(np.float16), scale
    if storage == "int1":
        # The scale of least squared error for the signs is the mean magnitude.
        return np.packbits(features >= 0, axis=1, bitorder="little"), np.abs(features).mean(axis=1, dtype=np.float32)
    if storage == "int8":
        return _encode_uniform(features, "int8", levels=127, half=0.0)
    if storage == "int4":
        # 16 levels at ±0.5, ±1.5, … ±7.5 steps, stored as 0 … 15, two numbers a byte.
        codes, scale = _encode_uniform(features, "int4", levels=7.5, half=0.5)
        nibbles = (codes + 8).astype(np.uint8)
        if nibbles.shape[1] % 2:
            nibbles = np.pad(nibbles, ((0, 0), (0, 1)))
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale
    raise ValueError(f"unknown storage {storage!r}; known are {list(STORAGES)}")


def decode(codes: np.ndarray, scale: np.ndarray, storage: str, dimension: int) -> np.ndarray:
    """Decode rows that `encode` wrote.

    Args:
        codes: As `encode` returned them, any number of rows.
        scale: float32 (n,).
        storage: The storage they were encoded with.
        dimension: k.

    Returns:
        float32 (n, k).
    """
    factor = np.asarray(scale, dtype=np.float32)[:, None]
    if storage in ("float16", "int8"):
        return codes.astype(np.float32) * factor
    table = _INT4_TABLE if storage == "int4" else _INT1_TABLE
    values = table[codes].reshape(len(codes), -1)[:, :dimension]
    return values * factor


# What each byte decodes to.
_INT4_TABLE = np.stack([np.arange(256) % 16 - 7.5, np.arange(256) // 16 - 7.5], axis=1).astype(np.float32)
_INT1_TABLE = (2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") - 1.0).astype(
    np.float32
)


def _divided(features: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return features / np.where(scale > 0, scale, 1)[:, None]


def _encode_uniform(features: np.ndarray, storage: str, *, levels: float, half: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes q and scale s that minimise |x − s·(q + half)|² over the clips of `storage`, row by row.

    Returns:
        codes: int8 (n, k), such that the decoded value is scale × (code + half).
        scale: float32 (n,).
    """
    codes = np.zeros(features.shape, dtype=np.int8)
    scale = np.zeros(len(features), dtype=np.float32)
    for start in range(0, len(features), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        block = features[rows]
        energy = _dot(block, block)
        rms = np.sqrt(energy / features.shape[1]).astype(np.float32)
        least = np.full(len(block), np.inf)
        for clip in _CLIPS[storage]:
            steps = _divided(block, rms * np.float32(clip / levels))
            rounded = np.clip(np.rint(steps - np.float32(half)), -levels - half, levels - half)
            values = rounded + np.float32(half)
            # For these codes the scale of least squared error is <x, q>/<q, q>.
            along, square = _dot(block, values), np.maximum(_dot(values, values), 1e-30)
            error = energy - along**2 / square
            better = (error < least) & (rms > 0)
            codes[rows][better] = rounded[better].astype(np.int8)
            scale[rows][better] = (along / square)[better].astype(np.float32)
            least[better] = error[better]
    return codes, scale


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row-wise inner products in float64, so that tiny gradients do not underflow."""
    return np.einsum("nk,nk->n", a, b, dtype=np.float64)
