"""Files of models on the disk: tensors, digests of folders, and folders that appear whole or not at all.

Belongs here: bytes, whatever they mean. Not here: models and adapters (`models`), an epoch's files
(`epoch_folder`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from less_assets.errors import CorruptArtifactError, StorageError

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.vocab",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
)
"""What is fetched of a repository on Hugging Face; all but the card make up a folder's digest."""
OWN_CODE = "*.py"
"""Python files of a model and its tokenizer: fetched, and in the digest, where they are run."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors: equal contents give equal bytes.

    The library writes the metadata's entries in random order; they are sorted here, which keeps the header's length.
    """
    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(ordered.ljust(size))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, without reading them.

    Raises:
        CorruptArtifactError: The file is damaged.
    """
    with reading(path), safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)


def tensor_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file.

    Raises:
        CorruptArtifactError: The file is damaged.
    """
    with reading(path), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the trouble of reading a safetensors or JSON file into a CorruptArtifactError that names it."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise CorruptArtifactError(
            f"The file is missing or damaged: {error}",
            where=str(path),
            fix="Remove its folder and materialize it again.",
        ) from error
    except OSError as error:
        raise StorageError(f"Cannot read: {error}", where=str(path), fix="Check permissions and the disk.") from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Yields:
        A temporary folder beside `folder`, `*.partial`. It gets the name once the block has ended without an error and
        everything is on the disk. If another process was faster, its folder stays. A killed process leaves the
        temporary folder behind, which nothing reads.

    Raises:
        StorageError: The disk is full, or permission is denied.
    """
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"Cannot write: {error}",
            where=str(folder),
            fix="Check free space and permissions, then run the same command again: what is finished is kept.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_digest(folder: Path, *, own_code: bool = False) -> str:
    """SHA-256 in hex over names and contents of a model folder's weights, configuration and tokenizer.

    Args:
        folder: The model's folder.
        own_code: Whether its Python files are run, and so count as well.
    """
    patterns = [*MODEL_FILES[:-1], OWN_CODE] if own_code else MODEL_FILES[:-1]
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
