"""Cosines of stored codes with target directions, without decoding a row: the arithmetic of scoring.

Belongs here: the products. Not here: what codes mean (quantization.py), where they come from, and what the scores are
for (influence.py).
"""

import threading
from collections.abc import Sequence

import numpy as np

ROWS_AT_A_TIME = 256
"""Rows whose codes and temporary arrays (1.5 bytes a number) stay near the processor at k = 32768."""

_DIGITS = (1.0, 128.0, 16384.0)
_LARGEST = 63 * sum(int(digit) for digit in _DIGITS)
"""A direction's numbers become integers of at most this size: three digits from -64 to 63, about 21 bits. Digits of
seven bits, since processors without VNNI add pairs of products in 16 bits."""

_COLUMNS = 16  # widths that the integer product is fast at are multiples of this
_MIDDLE = 113  # a square of a 4-bit code, 0 to 225, less this is a signed byte


class CodedDirections:
    """Directions made ready for cosines with codes of one storage.

    A cosine does not depend on a row's scale, and a code is an integer plus a constant: it is enough to multiply the
    integers. Codes of 4 bits and 1 bit are multiplied in integer arithmetic: more than twice as fast as float32, and
    exact, so that neither the machine, nor the number of threads, nor other directions change a score.

    Args:
        directions: float32 (J, k), finite.
        storage: The storage of the codes.
        groups: Sizes of consecutive groups of directions, J in all. The float32 product of float16 and int8 codes
            rounds differently at another width, so each group is multiplied by itself: its scores do not depend on
            which others are there. Default is one group.
    """

    def __init__(self, directions: np.ndarray, storage: str, groups: Sequence[int] | None = None) -> None:
        directions = np.asarray(directions, dtype=np.float32)
        self._storage, self._dimension, self._scratch = storage, directions.shape[1], threading.local()
        if storage in ("int4", "int1"):
            integers, self._step = _integers(directions)
            self._sum = integers.sum(axis=1, dtype=np.float64)
            if storage == "int4":  # the numbers in the low halves of the bytes, and those in the high ones
                padded = np.pad(integers, ((0, 0), (0, self._dimension % 2)))
                self._digits = [_digits(padded[:, 0::2]), _digits(padded[:, 1::2])]
            else:
                self._digits = [_digits(integers)]
            self._ones = np.ones((len(self._digits[0]), 1), dtype=np.int8)
        else:
            ends = np.cumsum([len(directions)] if groups is None else groups)
            bounds = zip([0, *ends], ends, strict=False)
            self._groups = [np.ascontiguousarray(directions[start:end]).T for start, end in bounds]

    def cosines(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Cosine-type scores `unit(row) @ direction`; may be called from several threads.

        Args:
            codes: As `quantization.encode` returned them, n rows, `ROWS_AT_A_TIME` or fewer for speed.
            scale: float32 (n,).

        Returns:
            float32 (n, J); NaN for rows of zeros, whose scale is 0, and for those that are not finite.
        """
        if self._storage == "int4":
            products, squares = self._int4(codes.view(np.uint8))
        elif self._storage == "int1":
            bits = np.unpackbits(codes.view(np.uint8), axis=1, count=self._dimension, bitorder="little")
            products = (2 * self._sums(bits, self._digits[0])[1] - self._sum) * self._step
            squares = np.full(len(codes), float(self._dimension))
        else:
            values = codes.astype(np.float32)
            if self._storage == "int8":
                values *= np.abs(values)
            products = np.concatenate([values @ group for group in self._groups], axis=1)
            squares = np.vecdot(values, values)
        with np.errstate(divide="ignore", invalid="ignore"):
            scores: np.ndarray = (products / np.sqrt(squares)[:, None]).astype(np.float32)
        scores[~(np.isfinite(squares) & (squares > 0) & np.isfinite(scale) & (scale > 0))] = np.nan
        return scores

    def _int4(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inner products float64 (n, J) with (code - 7.5), and the squared norms of those."""
        numbers, squared = self._arrays(codes.shape)
        total, squares, products = np.zeros(len(codes)), np.zeros(len(codes)), np.zeros((len(codes), len(self._sum)))
        for split, mask, digits in zip((np.bitwise_and, np.right_shift), (15, 4), self._digits, strict=True):
            split(codes, mask, out=numbers)
            sums, inner = self._sums(numbers, digits)
            total += sums
            products += inner
            np.multiply(numbers, numbers, out=squared)
            np.subtract(squared, np.uint8(_MIDDLE), out=squared)
            squares += _integer_product(squared, self._ones)[:, 0] + float(_MIDDLE * codes.shape[1])
        return (products - 7.5 * self._sum) * self._step, squares - 15 * total + 56.25 * self._dimension

    def _sums(self, codes: np.ndarray, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums float64 (n,) of each row's codes, and inner products float64 (n, J) with the integers; both exact."""
        products = _integer_product(codes, digits).astype(np.float64)
        count = len(self._sum)
        places = products[:, 1 : 1 + len(_DIGITS) * count].reshape(len(codes), len(_DIGITS), count)
        return products[:, 0], np.tensordot(_DIGITS, places, axes=(0, 1))

    def _arrays(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays of bytes of this thread's own; new ones for every call would cost more than the arithmetic."""
        kept = getattr(self._scratch, "arrays", None)
        if kept is None or len(kept[0]) < shape[0]:
            kept = self._scratch.arrays = (np.empty(shape, np.uint8), np.empty(shape, np.uint8))
        return kept[0][: shape[0]], kept[1][: shape[0]]


def _integers(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers int32 (J, k) and steps float64 (J,): directions rounded to 2^-20 of their largest number."""
    step = np.abs(directions).max(axis=1, initial=0.0).astype(np.float64) / _LARGEST
    return np.rint(directions / np.where(step > 0, step, 1)[:, None]).astype(np.int32), step


def _digits(integers: np.ndarray) -> np.ndarray:
    """Ones and the three digits of integers (J, w), as columns int8 (w, 1 + 3 J and zeros)."""
    rest, columns = integers, [np.ones((1, integers.shape[1]), dtype=np.int32)]
    for _ in _DIGITS:
        digit = (rest + 64) % 128 - 64
        columns.append(digit)
        rest = (rest - digit) // 128
    stacked = np.concatenate(columns)
    stacked = np.pad(stacked, ((0, -len(stacked) % _COLUMNS), (0, 0)))
    return np.ascontiguousarray(stacked.T.astype(np.int8))


def _integer_product(codes: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Product int32 (n, columns) of bytes (n, w), read as signed, and int8 (w, columns)."""
    import torch  # oneDNN's integer product; NumPy has none that is fast

    return torch._int_mm(torch.from_numpy(codes.view(np.int8)), torch.from_numpy(digits)).numpy()
