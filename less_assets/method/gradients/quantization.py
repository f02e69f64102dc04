"""Feature rows in few bytes: float16, 8, 4 and 1 bits a number, each row with one scale.

Belongs here: encoding, decoding and the choice of bits for a byte budget. Not here: files (`less_assets.store`).

Scores are cosines, so a row's scale only has to preserve its direction: it is chosen for the least squared error, not
to hold the largest value. Sketches of Adam-like directions are close to Gaussian and lose little at 4 bits and even at
1; spending the saved bytes on dimensions wins (measured in `benchmarks/features.py`). Plain gradients have heavy tails
and want 8 bits.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

STORAGES = ("float16", "int8", "int4", "int1")
BITS = {"float16": 16, "int8": 8, "int4": 4, "int1": 1}

_ROWS_AT_A_TIME = 32  # bounds the temporary arrays of encoding
_INT4_CLIPS = (2.0, 2.51, 3.0, 3.7, 4.6, 6.0, 9.0, 14.0)
"""Outermost 4-bit level in root mean squares of the row, the best of which is kept (2.51 is that of a Gaussian)."""


def bytes_per_row(storage: str, dimension: int) -> int:
    """Bytes of a row's codes; its float32 scale adds 4."""
    return -(-dimension * BITS[storage] // 8)


def choose_storage(byte_budget: int, forms: Collection[str], parameters: int | None = None) -> tuple[str, int]:
    """Storage and dimension that keep scores truest for a number of bytes a row.

    Few bits and many dimensions beat the reverse (`benchmarks/results/features.json`): 1 bit for directions of Adam, 8
    where `sgd` is among the forms. Dimensions beyond the number of parameters would be empty: there the bits grow.

    Args:
        byte_budget: Bytes of codes a row, at least 1.
        forms: Direction forms that are stored alike.
        parameters: P, the length of the direction; None if not known.

    Returns:
        (storage, dimension) with `bytes_per_row(storage, dimension) <= byte_budget`.
    """
    for storage in ("int8", "float16") if "sgd" in forms else ("int1", "int4", "int8", "float16"):
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
            Only `decode` knows what they mean.
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
    if storage not in ("int8", "int4"):
        raise ValueError(f"unknown storage {storage!r}; known are {list(STORAGES)}")
    blocks = [features[start : start + _ROWS_AT_A_TIME] for start in range(0, max(1, len(features)), _ROWS_AT_A_TIME)]
    encoded = [(_encode_int8 if storage == "int8" else _encode_int4)(block) for block in blocks]
    return np.concatenate([codes for codes, _ in encoded]), np.concatenate([scale for _, scale in encoded])


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
    if storage == "float16":
        return codes.astype(np.float32) * factor
    if storage == "int8":
        values = codes.astype(np.float32)
        values *= np.abs(values)
    elif storage == "int4":
        # Both halves of every byte at once: …hl becomes …h…l; ten times faster than a table of 256 pairs.
        pairs = codes.view(np.uint8).astype("<u2")
        pairs |= pairs << 4
        pairs &= 0x0F0F
        values = pairs.view(np.uint8)[:, :dimension].astype(np.float32)
        values -= 7.5
    else:
        values = np.unpackbits(codes.view(np.uint8), axis=1, count=dimension, bitorder="little").astype(np.float32)
        values *= 2
        values -= 1
    values *= factor
    return values


def _divided(features: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return features / np.where(scale > 0, scale, 1)[:, None]


def _encode_int8(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes c with value s·c·|c|: fine steps for small numbers, range for the heavy tails of plain gradients."""
    largest = np.abs(features).max(axis=1, initial=0.0)
    codes = np.rint(127 * np.sqrt(np.abs(_divided(features, largest)))) * np.sign(features)
    values = codes * np.abs(codes)
    return codes.astype(np.int8), _least_squares_scale(features, values)


def _encode_int4(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen equal steps, levels at ±0.5, ±1.5, … ±7.5, with the clip of least squared error for each row."""
    energy = _dot(features, features)
    rms = np.sqrt(energy / features.shape[1]).astype(np.float32)
    least = np.full(len(features), np.inf)
    values = np.empty_like(features)
    for clip in _INT4_CLIPS:
        steps = _divided(features, rms * np.float32(clip / 7.5))
        candidate = np.clip(np.floor(steps) + np.float32(0.5), -7.5, 7.5)
        error = energy - _dot(features, candidate) ** 2 / _dot(candidate, candidate)
        better = error < least
        values[better], least[better] = candidate[better], error[better]
    nibbles = (values + np.float32(7.5)).astype(np.uint8)
    if nibbles.shape[1] % 2:
        nibbles = np.pad(nibbles, ((0, 0), (0, 1)))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), _least_squares_scale(features, values)


def _least_squares_scale(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The scale s that minimises |x − s·q|²: <x, q>/<q, q>."""
    scale: np.ndarray = (_dot(features, values) / np.maximum(_dot(values, values), 1e-30)).astype(np.float32)
    return scale


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row-wise inner products in float64, so that tiny gradients do not underflow."""
    products: np.ndarray = np.einsum("nk,nk->n", a, b, dtype=np.float64)
    return products
