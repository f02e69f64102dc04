"""Gradient features of a (checkpoint, shard) or (checkpoint, task) as Zarr v3 arrays, written and read by blocks.

Belongs here: the array layout, resuming, damage detection, streaming. Not here: how numbers become codes
(method/quantization.py) or what they mean (method/features.py).

A block of rows is one Zarr shard with CRC32C, hence written whole or not at all; its `status` chunk is written last and
marks it finished. `scale` decodes `features`; `norm` is the exact norm of the direction before projection.
"""

import contextlib
import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import google_crc32c
import numpy as np
import zarr
from upath import UPath
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.errors import ContainsArrayError

from less_assets.errors import CorruptArtifactError, LessAssetsError, MissingArtifactError, StaleArtifactError
from less_assets.method.gradients.quantization import decode, encode
from less_assets.store.artifacts import ArtifactFolder, repair_command
from less_assets.store.files import list_files, local_path, remove_tree, storage_trouble

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]  # Any: the metadata of whichever Zarr format

BLOCK_ROWS = 512
DECODE_ROWS = 64  # 8 MiB of float32 at k = 32768: still in the cache (L3) when they are multiplied
UNWRITTEN = 255  # fill value of `status`, equal to RowStatus.PENDING
METADATA_BYTES = 1 << 20  # larger files of the group are chunks, which carry their own CRC32C

_SHARD_INDEX, _CHECKSUM = struct.Struct("<QQI"), struct.Struct("<I")


class FeatureRows(Protocol):
    """Features of consecutive rows, as `method.features.extract_features` returns them."""

    @property
    def features(self) -> Mapping[str, np.ndarray]:
        """Form -> float32 (n, k)."""

    @property
    def norms(self) -> Mapping[str, np.ndarray]:
        """Form -> float32 (n,), exact norm of the direction."""

    @property
    def loss(self) -> np.ndarray:
        """float32 (n,), mean cross-entropy over the loss tokens."""

    @property
    def loss_tokens(self) -> np.ndarray:
        """int32 (n,)."""

    @property
    def status(self) -> np.ndarray:
        """uint8 (n,), a `RowStatus`; 0 is OK. Features of other rows are stored as zeros."""


class FeatureWriter:
    """Writes features block by block; one writer per folder (see `ArtifactStore.resuming`).

    Args:
        path: The Zarr group, for example `folder.path("features.zarr")`; made if absent.
        forms: Direction forms.
        rows: Number of rows in all.
        dimension: k, length of a sketch.
        storage: Number format, one of `method.quantization.STORAGES`.
        block_rows: Rows of a block; the last one may be shorter.

    Raises:
        StaleArtifactError: The group exists with another layout.
        StorageError: The group cannot be made.
    """

    def __init__(
        self,
        path: UPath,
        forms: Sequence[str],
        rows: int,
        dimension: int,
        storage: str,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self.path, self.forms, self.rows, self.dimension = path, tuple(forms), rows, dimension
        self.storage, self.block_rows = storage, block_rows
        self.layout = {
            "forms": list(forms),
            "rows": rows,
            "dimension": dimension,
            "storage": storage,
            "block_rows": block_rows,
        }
        with storage_trouble(path, "write"):
            try:
                self._arrays = self._open_or_create()
            except (OSError, LessAssetsError):
                raise
            except Exception:  # damaged metadata: nothing under it can be read, so begin again
                remove_tree(path)
                self._arrays = self._open_or_create()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.block_rows)

    def bounds(self, index: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        return index * self.block_rows, min((index + 1) * self.block_rows, self.rows)

    def _open_or_create(self) -> "dict[str, ZarrArray]":
        group = zarr.open_group(store=_zarr_store(self.path), mode="a")
        layout = dict(group.attrs)
        if layout and layout != self.layout:
            raise StaleArtifactError(
                f"Features were begun with another layout: {layout}, now {self.layout}.",
                where=str(self.path),
                fix="Remove that folder and run the same command again.",
            )
        for name, (shape, dtype, fill) in _array_specs(self.layout).items():
            with contextlib.suppress(ContainsArrayError):
                group.create_array(
                    name,
                    shape=shape,
                    dtype=dtype,
                    chunks=(self.block_rows, *shape[1:]),
                    shards=(self.block_rows, *shape[1:]) if len(shape) == 2 else None,
                    compressors=[Crc32cCodec()],
                    filters=None,
                    fill_value=fill,
                )
        if not layout:  # last, so that a group with a layout has all its arrays
            group.update_attributes(self.layout)
        # Without this a block of zeros would not be stored, and its absence could not be told from a loss.
        return {
            name: array.with_config({"write_empty_chunks": True})
            for name, array in _checked_arrays(group, self.layout).items()
        }

    def finished_blocks(self) -> set[int]:
        """Blocks that are stored whole; each is read back, so that a damaged one is written again."""
        stored = list_files(self.path)
        return {index for index in range(self.blocks) if self._is_whole(index, stored)}

    def _is_whole(self, index: int, stored: Mapping[str, int]) -> bool:
        start, stop = self.bounds(index)
        try:
            if (_read(self._arrays["status"], self.path, "status", start, stop) == UNWRITTEN).any():
                return False
            for name, array in self._arrays.items():
                if not stored.get(_chunk_file(name, array, index)):
                    return False
                _read(array, self.path, name, start, stop)
        except CorruptArtifactError:
            return False
        return True

    def write_block(self, index: int, block: FeatureRows) -> None:
        """Encode and store one block; finished once this returns.

        Raises:
            ValueError: Shapes or statuses do not fit.
            StorageError: The disk or object store fails.
        """
        start, stop = self.bounds(index)
        status = np.asarray(block.status, dtype=np.uint8)
        if not 0 <= start < stop or status.shape != (stop - start,) or (status == UNWRITTEN).any():
            raise ValueError(f"block {index} holds rows {start} to {stop}, each with a status other than {UNWRITTEN}")
        usable = (status == 0)[:, None]
        with storage_trouble(self.path, "write"):
            for form in self.forms:
                features = np.where(usable, np.asarray(block.features[form], dtype=np.float32), np.float32(0))
                if features.shape != (stop - start, self.dimension):
                    raise ValueError(f"block {index}: features of {form} have shape {features.shape}")
                codes, scale = encode(features, self.storage)
                self._arrays[f"{form}/features"][start:stop] = codes
                self._arrays[f"{form}/scale"][start:stop] = scale
                self._arrays[f"{form}/norm"][start:stop] = np.asarray(block.norms[form], dtype=np.float32)
            self._arrays["loss"][start:stop] = np.asarray(block.loss, dtype=np.float32)
            self._arrays["loss_tokens"][start:stop] = np.asarray(block.loss_tokens, dtype=np.int32)
            self._arrays["status"][start:stop] = status


class FeatureReader:
    """Reads features without ever holding more than two blocks of them.

    Args:
        path: The Zarr group.
        asset: The asset that makes it, named in errors.

    Attributes:
        forms: Direction forms.
        rows: Number of rows.
        dimension: k.
        storage: Number format of the codes.
        block_rows: Rows of a stored block.
        status: uint8 (rows,), a `RowStatus`.
        loss: float32 (rows,).
        loss_tokens: int32 (rows,).

    Raises:
        MissingArtifactError: There is no such group or it is not finished.
        CorruptArtifactError: A file is missing or damaged.
    """

    def __init__(self, path: UPath, asset: str | None = None) -> None:
        self.path, self._asset = path, asset
        files = list_files(path)
        if "zarr.json" not in files:
            raise MissingArtifactError("There are no features.", where=str(path), fix=repair_command(asset))
        try:
            with storage_trouble(path, "read"):
                group = zarr.open_group(store=_WholeStore(_zarr_store(path)), mode="r")
                layout: dict[str, Any] = dict(group.attrs)
                self.forms: tuple[str, ...] = tuple(layout["forms"])
                self.rows, self.dimension = int(layout["rows"]), int(layout["dimension"])
                self.storage, self.block_rows = str(layout["storage"]), int(layout["block_rows"])
                self._arrays = _checked_arrays(group, layout)
        except LessAssetsError:
            raise
        except Exception as error:
            raise self._damage("zarr.json", f"{type(error).__name__}: {error}") from error
        self._check_chunks(files)
        self.status = self._column("status")
        self.loss = self._column("loss")
        self.loss_tokens = self._column("loss_tokens")
        if (self.status == UNWRITTEN).any():
            raise MissingArtifactError(
                f"{int((self.status == UNWRITTEN).sum())} of {self.rows} rows have no features yet.",
                where=str(path),
                fix=repair_command(asset),
            )

    def _damage(self, name: str, how: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"Features are damaged: {how}", where=str(self.path / name), fix=repair_command(self._asset)
        )

    def _check_chunks(self, files: Mapping[str, int]) -> None:
        """An absent or empty chunk would silently read as the fill value."""
        finished = range(-(-self.rows // self.block_rows))
        unwritten = [index for index in finished if _chunk_file("status", self._arrays["status"], index) not in files]
        if unwritten:
            raise MissingArtifactError(
                f"{len(unwritten)} of {len(finished)} blocks of features are not finished.",
                where=str(self.path),
                fix=repair_command(self._asset),
            )
        for name, array in self._arrays.items():
            for index in finished:
                file = _chunk_file(name, array, index)
                if not files.get(file):
                    raise self._damage(file, "the file is missing or empty")

    def _column(self, name: str) -> np.ndarray:
        return _read(self._arrays[name], self.path, name, 0, self.rows, self._asset)

    def norms(self, form: str) -> np.ndarray:
        """Exact norms of the directions of a form, float32 (rows,)."""
        return self._column(f"{form}/norm")

    @property
    def code_blocks(self) -> int:
        """Number of stored blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def code_block_bytes(self) -> int:
        """Size of the file of a block of codes."""
        array = self._arrays[f"{self.forms[0]}/features"]
        return array.dtype.itemsize * int(np.prod(array.chunks)) + _CHECKSUM.size + _SHARD_INDEX.size

    def codes(self, form: str, index: int, buffer: np.ndarray | None = None) -> tuple[int, np.ndarray, np.ndarray]:
        """The codes of a stored block; may be called from several threads.

        Args:
            form: Direction form.
            index: Which block, below `code_blocks`.
            buffer: uint8 (code_block_bytes,) that the codes may be read into; with the same one for every block no
                memory has to be cleared, which takes longer than reading.

        Returns:
            First row, codes of the block's rows as `method.quantization.encode` returned them, and their float32 scale.

        Raises:
            CorruptArtifactError: A chunk is damaged; the error names its file.
        """
        start, stop = index * self.block_rows, min((index + 1) * self.block_rows, self.rows)
        array = self._arrays[f"{form}/features"]
        block = _local_block(self.path / _chunk_file(f"{form}/features", array, index), array, buffer)
        if block is None:
            block = _read(array, self.path, f"{form}/features", start, stop, self._asset)
        scale = _read(self._arrays[f"{form}/scale"], self.path, f"{form}/scale", start, stop, self._asset)
        return start, block[: stop - start], scale

    def blocks(self, form: str, rows: int = DECODE_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """Decoded features of all rows in order, read and decoded while the caller works on those before.

        Args:
            form: Direction form.
            rows: At most this many decoded rows at once.

        Returns:
            First row and float32 (n, k), n ≤ `rows`, until all rows are through. Rows whose status is not 0 are zeros.

        Raises:
            CorruptArtifactError: A chunk is damaged; the error names its file.
        """
        array, scales = self._arrays[f"{form}/features"], self._column(f"{form}/scale")

        def codes() -> Iterator[tuple[int, np.ndarray]]:
            for start in range(0, self.rows, self.block_rows):
                stop = min(start + self.block_rows, self.rows)
                yield start, _read(array, self.path, f"{form}/features", start, stop, self._asset)

        def decoded() -> Iterator[tuple[int, np.ndarray]]:
            for start, block in _ahead(codes(), 1):
                for first in range(0, len(block), rows):
                    part = block[first : first + rows]
                    scale = scales[start + first : start + first + len(part)]
                    yield start + first, decode(part, scale, self.storage, self.dimension)

        # Reading, decoding and the caller's arithmetic run at the same time: NumPy and the disk release the GIL.
        return _ahead(decoded(), 2)

    def take(self, form: str, rows: Sequence[int]) -> np.ndarray:
        """Decoded features of some rows; reads the blocks that they stand in, one at a time.

        Args:
            form: Direction form.
            rows: Rows in any order, n of them.

        Returns:
            float32 (n, k), in the order asked for.

        Raises:
            CorruptArtifactError: A chunk is damaged; the error names its file.
        """
        array, scales = self._arrays[f"{form}/features"], self._column(f"{form}/scale")
        wanted = np.asarray(rows, dtype=np.int64)
        taken = np.zeros((len(wanted), self.dimension), dtype=np.float32)
        for index in np.unique(wanted // self.block_rows):
            start = int(index) * self.block_rows
            stop = min(start + self.block_rows, self.rows)
            block = _read(array, self.path, f"{form}/features", start, stop, self._asset)
            of_block = np.flatnonzero(wanted // self.block_rows == index)
            codes = block[wanted[of_block] - start]
            taken[of_block] = decode(codes, scales[wanted[of_block]], self.storage, self.dimension)
        return taken


def _ahead(items: Iterator[tuple[int, np.ndarray]], depth: int) -> Iterator[tuple[int, np.ndarray]]:
    """The same items, computed by a thread up to `depth` items before they are asked for."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="features") as thread:
        pending = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, items, None))
            yield item


def open_features(folder: ArtifactFolder, name: str = "features.zarr") -> FeatureReader:
    """Features of a sealed artifact: sizes of all files and digests of the small ones are compared with the manifest.

    Raises:
        MissingArtifactError: The artifact is not complete.
        CorruptArtifactError: A file is missing or damaged.
    """
    manifest = folder.verify(f"{name}/", digests_up_to=METADATA_BYTES)
    return FeatureReader(folder.path(name), asset=manifest.kind)


def _array_specs(layout: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype, float]]:
    """Name -> (shape, dtype, fill value) of every array; `status` is last, as it is in writing."""
    rows = int(layout["rows"])
    codes, _ = encode(np.zeros((1, int(layout["dimension"])), dtype=np.float32), str(layout["storage"]))
    specs: dict[str, tuple[tuple[int, ...], np.dtype, float]] = {}
    for form in layout["forms"]:
        specs[f"{form}/features"] = ((rows, codes.shape[1]), codes.dtype, 0)
        specs[f"{form}/scale"] = ((rows,), np.dtype(np.float32), 0.0)
        specs[f"{form}/norm"] = ((rows,), np.dtype(np.float32), 0.0)
    specs["loss"] = ((rows,), np.dtype(np.float32), 0.0)
    specs["loss_tokens"] = ((rows,), np.dtype(np.int32), 0)
    specs["status"] = ((rows,), np.dtype(np.uint8), UNWRITTEN)
    return specs


def _checked_arrays(group: zarr.Group, layout: Mapping[str, Any]) -> "dict[str, ZarrArray]":
    """All arrays of the group; ValueError if one is not what the layout says."""
    arrays: dict[str, ZarrArray] = {}
    for name, (shape, dtype, _) in _array_specs(layout).items():
        array = group[name]
        if not isinstance(array, zarr.Array) or (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(f"{name} does not have the shape {shape} and type {dtype} of the layout")
        if (array.shards or array.chunks)[0] != layout["block_rows"]:
            raise ValueError(f"{name} is not stored in blocks of {layout['block_rows']} rows")
        arrays[name] = array
    return arrays


def _zarr_store(path: UPath) -> Store:
    if folder := local_path(path):
        return zarr.storage.LocalStore(folder)
    return zarr.storage.FsspecStore.from_url(str(path), storage_options=dict(path.storage_options))


class _WholeStore(zarr.storage.WrapperStore[Store]):
    """A store in which an absent chunk is an error: Zarr takes it for a chunk of the fill value, hence for numbers.

    `FeatureReader` looks for all chunks when it opens; this is for one that is lost while it reads.
    """

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        content = await super().get(key, prototype, byte_range)
        if content is None and "/c/" in f"/{key}":
            raise FileNotFoundError(f"{key} is missing")
        return content


def _chunk_file(name: str, array: "ZarrArray", index: int) -> str:
    return f"{name}/c/{index}/0" if array.ndim == 2 else f"{name}/c/{index}"


def _local_block(path: UPath, array: "ZarrArray", buffer: np.ndarray | None = None) -> np.ndarray | None:
    """The rows of a block in a local file, read into a buffer if there is one; None to read it through Zarr.

    A chunk is its bytes and their CRC32C; a Zarr shard of one chunk ends with the chunk's offset and length and their
    CRC32C. Whatever is not so is left to Zarr, whose errors say what is wrong. Ten times faster for small chunks.
    https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
    """
    if not (file := local_path(path)):
        return None
    size, start = array.dtype.itemsize * int(np.prod(array.chunks)), 0
    try:
        with file.open("rb", buffering=0) as opened:
            if buffer is None:  # not mapped: a file that is cut off while it is mapped kills the process
                buffer = np.empty(os.fstat(opened.fileno()).st_size, dtype=np.uint8)
            data = buffer[: opened.readinto(buffer.data)]
        end = len(data)
        if array.shards:
            end -= _SHARD_INDEX.size
            start, length, checksum = _SHARD_INDEX.unpack_from(data.data, end)
            if start + length != end or google_crc32c.value(data[end:-4]) != checksum:
                return None
        if end - start != size + _CHECKSUM.size:
            return None
        (checksum,) = _CHECKSUM.unpack_from(data.data, start + size)
        content = data[start : start + size]
    except (OSError, ValueError, struct.error):
        return None
    return content.view(array.dtype).reshape(array.chunks) if google_crc32c.value(content) == checksum else None


def _read(array: "ZarrArray", path: UPath, name: str, start: int, stop: int, asset: str | None = None) -> np.ndarray:
    """Rows start to stop; whatever Zarr raises about their bytes becomes a CorruptArtifactError naming the file."""
    block_rows = (array.shards or array.chunks)[0]
    indices = range(start // block_rows, -(-stop // block_rows))
    blocks = [_local_block(path / _chunk_file(name, array, index), array) for index in indices]
    local = [block for block in blocks if block is not None]
    if local and len(local) == len(blocks):
        first = indices[0] * block_rows
        return (local[0] if len(local) == 1 else np.concatenate(local))[start - first : stop - first]
    try:
        with storage_trouble(path, "read"):
            return np.asarray(array[start:stop])
    except LessAssetsError:
        raise
    except Exception as error:
        if stop - start > block_rows:  # several files: find the damaged one
            for first in range(start, stop, block_rows):
                _read(array, path, name, first, min(first + block_rows, stop), asset)
        file = _chunk_file(name, array, start // block_rows)
        raise CorruptArtifactError(
            f"Features are damaged: {error}", where=str(path / file), fix=repair_command(asset)
        ) from error
