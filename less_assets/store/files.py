"""Bytes on a disk or in a bucket: atomic writes, listings, digests, one error type for storage trouble.

Belongs here: what differs between a local folder and an object store. Not here: what the bytes mean (manifest.py,
tables.py, features.py) or where an artifact lives (artifacts.py).
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from upath import UPath

from less_assets.errors import StorageError

PARTIAL_SUFFIX = ".partial"  # the suffix of Zarr's own temporary files too: one rule finds every leftover
CHUNK_BYTES = 8 << 20
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"}
STORAGE_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
STORAGE_PACKAGES |= dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs")
# Packages of object-store clients that raise types of their own instead of OSError.
CLIENT_PACKAGES = {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "requests"}


def open_root(root: str, storage_options: Mapping[str, Any] | None = None) -> UPath:
    """Path object of a storage root: an absolute local path, or an fsspec URL such as `s3://bucket/prefix`.

    Raises:
        StorageError: The URL holds a password, or its client's package is not installed.
    """
    if "://" not in root or root.startswith("file://"):
        return UPath(os.path.abspath(os.path.expanduser(root.removeprefix("file://"))))
    if urlsplit(root).password:
        what = "The storage root holds a password, which would show in logs and in Dagster."
        raise StorageError(what, where="storage.root", fix="Give credentials in the environment.")
    # A cached listing would show a folder as it was before another process wrote to it.
    try:
        path: UPath = UPath(root.rstrip("/"), **{"use_listings_cache": False, **(storage_options or {})})
        _ = path.fs  # the client is imported here
    except ImportError as error:
        scheme = root.partition("://")[0]
        what = f"Storage at {scheme}:// needs a Python package that is not installed: {error}"
        fix = f"pip install {STORAGE_PACKAGES.get(scheme, 'the package that the message names')}"
        raise StorageError(what, where="storage.root", fix=fix) from error
    return path


def local_path(path: UPath) -> pathlib.Path | None:
    """`path` as a path on a file system of this machine (where renames are atomic), or None if it is elsewhere."""
    return path if isinstance(path, pathlib.Path) else None


@contextlib.contextmanager
def storage_trouble(path: UPath, action: str) -> Iterator[None]:
    """Turn a failing disk or object store into a StorageError; a missing file stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in CLIENT_PACKAGES:
            raise
        raise StorageError(
            f"Cannot {action}: {type(error).__name__}: {error}",
            where=str(path),
            fix="Check free space, permissions and the connection, then run the same command again: "
            "what is finished is kept.",
        ) from error


def hold_folder(folder: pathlib.Path) -> int:
    """Mark a local folder as worked in until this process ends (or the returned descriptor is closed).

    Returns:
        A descriptor of the folder, with a shared lock where the file system has such.
    """
    with storage_trouble(UPath(folder), "lock"):
        descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def is_held(folder: pathlib.Path) -> bool:
    """Whether a living process has called `hold_folder`; False where that cannot be known."""
    with storage_trouble(UPath(folder), "lock"):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def partial_name(name: str) -> str:
    """A name nobody else uses for a file or folder that is not finished yet."""
    return f"{name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def write_atomically(path: UPath, data: bytes) -> None:
    """Write a file so that a reader or a killed process never leaves or sees half of it.

    Raises:
        StorageError: The disk is full, permission is denied, or the object store fails.
    """
    with storage_trouble(path, "write"):
        if local_path(path):
            with written_file(path) as temporary:
                temporary.write_bytes(data)
        else:
            try:
                path.fs.pipe_file(path.path, data)
            except FileNotFoundError as error:
                if _is_bucket(path):
                    # Making folders would make the bucket: a misspelt one must not come into being.
                    raise StorageError(
                        "There is no such bucket.", where=str(path), fix="Correct storage.root, or create the bucket."
                    ) from error
                path.fs.makedirs(path.parent.path, exist_ok=True)  # file servers want the folder first
                path.fs.pipe_file(path.path, data)


@contextlib.contextmanager
def written_file(path: UPath) -> Iterator[pathlib.Path]:
    """A file on this machine to write into, which then takes its place as `write_atomically` does it.

    Raises:
        StorageError: The disk is full, permission is denied, or the object store fails.
    """
    with storage_trouble(path, "write"), contextlib.ExitStack() as remote:
        if local := local_path(path):
            local.parent.mkdir(parents=True, exist_ok=True)
            temporary = local.with_name(partial_name(local.name))
        else:
            temporary = remote.enter_context(working_folder()) / "written"
        try:
            yield temporary
            if local:
                finish_file(temporary, local)
            else:
                write_atomically(path, temporary.read_bytes())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def working_folder() -> Iterator[pathlib.Path]:
    """A folder on this machine for files that are read again at once; it goes afterwards.

    Raises:
        StorageError: Its disk is full, or permission is denied.
    """
    with tempfile.TemporaryDirectory(prefix="less-assets-") as folder, storage_trouble(UPath(folder), "write"):
        yield pathlib.Path(folder)


def _is_bucket(path: UPath) -> bool:
    protocol = path.fs.protocol
    return bool(BUCKETS & ({protocol} if isinstance(protocol, str) else set(protocol)))


def finish_file(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Flush a finished temporary file to the disk and give it its name, atomically."""
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    flush_folder(path.parent)


def flush_folder(folder: pathlib.Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: UPath) -> bytes:
    """Whole content of a file.

    Raises:
        FileNotFoundError: There is no such file.
        StorageError: The file exists but cannot be read.
    """
    with storage_trouble(path, "read"):
        return path.read_bytes()


def file_digest(path: UPath) -> str:
    """SHA-256 of a file in hex, read in pieces (SHA-256 runs in hardware: about twice BLAKE2's speed)."""
    digest = hashlib.sha256()
    with storage_trouble(path, "read"), path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: UPath, *, partial: bool = False) -> dict[str, int]:
    """Files below a folder: POSIX name relative to it -> bytes, sorted; an absent folder has none.

    Args:
        folder: Where to look.
        partial: Also list unfinished temporary files.
    """
    sizes: dict[str, int] = {}
    with storage_trouble(folder, "list"):
        if local := local_path(folder):
            for directory, _, names in os.walk(local):
                for name in names:
                    file = os.path.join(directory, name)
                    with contextlib.suppress(FileNotFoundError):  # another process may be finishing or removing it
                        sizes[os.path.relpath(file, local).replace(os.sep, "/")] = os.path.getsize(file)
        else:
            base = folder.path.rstrip("/") + "/"
            with contextlib.suppress(FileNotFoundError):
                for file, entry in folder.fs.find(folder.path, detail=True).items():
                    sizes[file.lstrip("/").removeprefix(base.lstrip("/"))] = int(entry["size"])
    return {name: sizes[name] for name in sorted(sizes) if partial or PARTIAL_SUFFIX not in name}


def modified_at(path: UPath) -> float:
    """When a file last changed, in seconds since the epoch."""
    with storage_trouble(path, "look at"):
        if local := local_path(path):
            return local.stat().st_mtime
        return float(path.fs.modified(path.path).timestamp())


def remove_tree(folder: UPath) -> None:
    """Remove a folder and all it holds; nothing happens where there is none."""
    with storage_trouble(folder, "remove"), contextlib.suppress(FileNotFoundError):
        if local := local_path(folder):
            # Renamed first: a reader sees the whole folder or none of it.
            doomed = local.with_name(partial_name(local.name))
            os.rename(local, doomed)
            shutil.rmtree(doomed)
        else:
            folder.fs.rm(folder.path, recursive=True)
