"""The fixed random projection Π: R^P → R^k, the same for every example, task, checkpoint and machine.

Belongs here: the two kinds of sketch and the random bits they are made of. Not here: what is projected (`directions`)
or how sketches are stored (`quantization`).

*sparse*: the flattened vector is cut into contiguous blocks of k; each coordinate gets a random sign, each block is
rolled by a random shift, and the blocks are summed. One addition per coordinate whatever k is, and the inner product
of two sketches is unbiased with variance at most that of a dense Rademacher projection, about 1/k for unit vectors:
two coordinates of different blocks share a bucket with probability 1/k, two of the same block never.

*rademacher*: a dense k × P matrix of ±1/sqrt(k), the paper's own (section 4.1), generated in pieces. O(P·k).

Random bits are SplitMix64 (Steele, Lea, Flood 2014) evaluated at a counter: 64-bit integer arithmetic, hence the same
on every device and independent of threads and of the order of calls. Sums run in order of coordinates with one
rounding per term, so the sparse sketch of a vector has the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from less_assets.method import SKETCH_VERSION

KINDS = ("sparse", "rademacher")
_SIGNS, _SHIFTS, _DENSE = 1, 2, 3  # one stream of random words for each use
_GOLDEN = 0x9E3779B97F4A7C15
_DENSE_PIECE = 1 << 24  # signs generated at a time


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as torch's int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shift_right(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shift_right(words, 31)


def random_words(seed: int, stream: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """64 random bits for each counter in [start, stop): SplitMix64 seeded by (seed, stream).

    Args:
        seed: Any integer; taken modulo 2^64.
        stream: Separates independent uses of one seed.
        start: First counter.
        stop: One past the last counter.
        device: Where to compute.

    Returns:
        int64 (stop − start,); the same on every device.
    """
    origin = torch.tensor([_signed(seed * _GOLDEN + stream)], dtype=torch.int64, device=device)
    counters = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    return _mix(_mix(origin) + counters * _signed(_GOLDEN))


def random_signs(seed: int, stream: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Random signs number start … stop − 1 of a stream, 64 from each word, lowest bit first.

    Returns:
        int8 (stop − start,) of ±1.
    """
    words = random_words(seed, stream, start // 64, -(-stop // 64), device)
    # Eight bytes of a word, then eight bits of a byte: small integers keep the temporary arrays small.
    shifts = torch.arange(0, 64, 8, dtype=torch.int64, device=device)
    octets = ((words.unsqueeze(1) >> shifts) & 0xFF).to(torch.uint8)
    bits = (octets.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    signs = bits.to(torch.int8).mul_(2).sub_(1).flatten()
    return signs[start % 64 : start % 64 + stop - start]


class Sketch:
    """A random projection of the flattened parameters to `dimension` numbers.

    Args:
        kind: `sparse` or `rademacher`.
        dimension: k.
        seed: Fixes the projection.
        parameters: (name, shape) in `named_parameters()` order: the columns of Π. Another order is another sketch, with
            another `fingerprint` (hex).

    Raises:
        ValueError: If the kind is unknown or the dimension is below 1.
    """

    def __init__(
        self,
        kind: Literal["sparse", "rademacher"],
        dimension: int,
        seed: int,
        parameters: Sequence[tuple[str, tuple[int, ...]]],
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown sketch {kind!r}; known are {list(KINDS)}")
        if dimension < 1:
            raise ValueError(f"the dimension of a sketch must be at least 1, not {dimension}")
        self.kind, self.dimension, self.seed = kind, dimension, seed
        self.parameters = [(name, tuple(shape)) for name, shape in parameters]
        self.size = sum(math.prod(shape) for _, shape in self.parameters)
        content = json.dumps([SKETCH_VERSION, kind, dimension, seed, self.parameters])
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self._signs: dict[tuple[int, int, torch.device], Tensor] = {}

    @cached_property
    def _shifts(self) -> list[int]:
        words = random_words(self.seed, _SHIFTS, 0, -(-self.size // self.dimension))
        return (_shift_right(words, 1) % self.dimension).tolist()

    def add(self, accumulator: Tensor, offset: int, values: Tensor) -> None:
        """Add the projection of a slice of the flattened parameters.

        Args:
            accumulator: (..., k) float32; changed in place. Zeros before the first slice.
            offset: First coordinate of the slice.
            values: (..., p) float32, on the accumulator's device.
        """
        if self.kind == "sparse":
            self._add_sparse(accumulator, offset, values)
        else:
            self._add_rademacher(accumulator, offset, values)

    def __call__(self, values: Tensor) -> Tensor:
        """Project whole vectors, (..., P) float32, to (..., k)."""
        accumulator = values.new_zeros((*values.shape[:-1], self.dimension))
        self.add(accumulator, 0, values)
        return accumulator

    def _slice_signs(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Signs of a slice, kept after first use: P bytes in all when a sketch is fed the same slices again."""
        key = (start, stop, device)
        if key not in self._signs:
            self._signs[key] = random_signs(self.seed, _SIGNS, start, stop, device)
        return self._signs[key]

    def _add_sparse(self, accumulator: Tensor, offset: int, values: Tensor) -> None:
        stop = offset + values.shape[-1]
        signs = self._slice_signs(offset, stop, values.device).to(values.dtype)
        start = offset
        while start < stop:
            block, column = divmod(start, self.dimension)
            bucket = (column + self._shifts[block]) % self.dimension
            # As far as neither the slice, nor the block, nor the row of buckets ends.
            length = min(stop - start, self.dimension - column, self.dimension - bucket)
            part = slice(start - offset, start - offset + length)
            accumulator[..., bucket : bucket + length].addcmul_(values[..., part], signs[part])
            start += length

    def _add_rademacher(self, accumulator: Tensor, offset: int, values: Tensor) -> None:
        piece = max(1, _DENSE_PIECE // self.dimension)
        k = self.dimension
        for start in range(0, values.shape[-1], piece):
            part = values[..., start : start + piece]
            first, last = offset + start, offset + start + part.shape[-1]
            signs = random_signs(self.seed, _DENSE, first * k, last * k, values.device).view(-1, k)
            accumulator += part @ signs.to(values.dtype).mul_(k**-0.5)
