"""Where artifacts live and how they come into being: addresses, sealing, publishing, locking.

An artifact is a folder `<key>/<fingerprint>/` whose `manifest.json` is written last; `<key>/current.json` says which
one is in force. Belongs here: those folders. Not here: formats of the data inside (tables.py, features.py).
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pydantic import JsonValue
from upath import UPath

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError, StorageError
from less_assets.store.files import (
    file_digest,
    flush_folder,
    list_files,
    local_path,
    open_root,
    partial_name,
    read_bytes,
    remove_tree,
    storage_trouble,
    write_atomically,
)
from less_assets.store.manifest import MANIFEST_NAME, Manifest, StoredFile, canonical_json, content_version

CURRENT_NAME = "current.json"
LOCK_NAME = "store.lock"
RECORDS_FOLDER = ".dagster"
"""Folder in a store's root that Dagster keeps its records in; no artifact's."""
FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")
_KEY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,199}")

_log = logging.getLogger(__name__)


def check_key(key: str) -> str:
    """Return an artifact's axis path if it is a safe one.

    Raises:
        StorageError: A part is empty, `..`, absolute, has odd characters, or could be taken for a fingerprint.
    """
    for part in key.split("/"):
        reserved = part in (CURRENT_NAME, MANIFEST_NAME) or FINGERPRINT.fullmatch(part) or part.endswith(".partial")
        if reserved or not _KEY_PART.fullmatch(part):
            raise StorageError(
                f"{part!r} cannot be part of an artifact's path.",
                where=repr(key),
                fix="Use letters, digits, '_', '.' and '-', beginning with a letter or digit; 16 or more hexadecimal "
                "digits alone are kept for fingerprints.",
            )
    return key


def repair_command(kind: str | None) -> str:
    """What a user runs to have an artifact made again."""
    until = f" --until {kind}" if kind else ""
    return f"Run `less-assets run{until} --verify`: it makes damaged and missing artifacts again."


class ArtifactFolder:
    """One artifact: its files, and the manifest that makes them count.

    Args:
        root: The folder.
        key: Axis path of the artifact.
        fingerprint: Hash of everything that could change its numbers.
    """

    def __init__(self, root: UPath, key: str, fingerprint: str) -> None:
        self.root, self.key, self.fingerprint = root, key, fingerprint
        self._verified: set[str] = set()

    def __repr__(self) -> str:
        return f"ArtifactFolder({str(self.root)!r})"

    def path(self, name: str) -> UPath:
        """Path of the file or sub-folder `name` (POSIX, relative), which never leaves the folder.

        Raises:
            StorageError: The name would leave the folder or has odd characters.
        """
        parts = name.split("/")
        if name == MANIFEST_NAME or not all(_FILE_PART.fullmatch(part) for part in parts):
            raise StorageError(f"{name!r} cannot be the name of a file in an artifact.", where=str(self.root))
        return self.root.joinpath(*parts)

    def exists(self) -> bool:
        """Whether the artifact is complete, that is, sealed."""
        with storage_trouble(self.root, "look at"):
            return self._manifest_path.exists()

    @property
    def _manifest_path(self) -> UPath:
        return self.root / MANIFEST_NAME

    def manifest(self) -> Manifest:
        """Read the manifest from the store, verified.

        Raises:
            MissingArtifactError: The artifact is not there or not finished.
            CorruptArtifactError: The manifest is damaged or belongs to another folder.
            StaleArtifactError: An older version of less-assets wrote it.
        """
        where = str(self._manifest_path)
        try:
            data = read_bytes(self._manifest_path)
        except FileNotFoundError as error:
            raise MissingArtifactError(
                f"{self.key} is not there or not finished.", where=where, fix=repair_command(None)
            ) from error
        manifest = Manifest.from_bytes(data, where, fix=repair_command(None))
        if (manifest.key, manifest.fingerprint) != (self.key, self.fingerprint):
            raise CorruptArtifactError(
                f"The manifest is that of {manifest.key}/{manifest.fingerprint}.", where=where, fix=repair_command(None)
            )
        return manifest

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one file atomically."""
        write_atomically(self.path(name), data)

    def read_bytes(self, name: str) -> bytes:
        """Content of one file, verified against the manifest."""
        return read_bytes(self.verified(name))

    def verified(self, name: str) -> UPath:
        """Path of a file whose size and digest have been compared with the manifest's.

        Raises:
            MissingArtifactError: The artifact is not complete, or has no such file.
            CorruptArtifactError: The file is gone, has another size or other bytes.
        """
        path = self.path(name)
        if name not in self._verified:
            manifest = self.manifest()
            if name not in manifest.files:
                raise MissingArtifactError(
                    f"{self.key} has no file {name}.", where=str(self.root), fix=repair_command(manifest.kind)
                )
            self._check_file(manifest, name)
            self._verified.add(name)
        return path

    def verify(self, names: str = "", digests_up_to: int | None = None) -> Manifest:
        """Compare all files with the manifest.

        Args:
            names: Only files whose name begins with this.
            digests_up_to: Compare digests of files of at most this many bytes, and only sizes of larger ones (for files
                with checksums of their own, such as Zarr chunks); None compares every digest.

        Raises:
            MissingArtifactError: The artifact is not complete.
            CorruptArtifactError: A file is gone, has another size or other bytes.
        """
        manifest = self.manifest()
        sizes = list_files(self.root)
        for name, file in manifest.files.items():
            if not name.startswith(names):
                continue
            if sizes.get(name) != file.bytes:
                raise self._damage(manifest, name, f"has {sizes[name]} bytes" if name in sizes else "is missing")
            if digests_up_to is None or file.bytes <= digests_up_to:
                self._check_file(manifest, name)
        return manifest

    def _check_file(self, manifest: Manifest, name: str) -> None:
        try:
            digest = file_digest(self.root / name)
        except FileNotFoundError as error:
            raise self._damage(manifest, name, "is missing") from error
        if digest != manifest.files[name].digest:
            raise self._damage(manifest, name, "has other bytes than were written")

    def _damage(self, manifest: Manifest, name: str, how: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"{self.key}: {name} {how}.", where=str(self.root / name), fix=repair_command(manifest.kind)
        )

    def seal(
        self,
        *,
        kind: str,
        settings: Mapping[str, JsonValue] | None = None,
        inputs: Mapping[str, str] | None = None,
        data_version: str | None = None,
        summary: Mapping[str, JsonValue] | None = None,
    ) -> Manifest:
        """Declare the folder complete: digest every file, then write the manifest, last and atomically.

        Args:
            kind: Name of the asset.
            settings: What could change the numbers.
            inputs: Upstream artifact -> its data version.
            data_version: Version of the content; None takes the hash of all files.
            summary: Figures for people; JSON values.
        """
        files = {
            name: StoredFile(bytes=size, digest=file_digest(self.path(name)))
            for name, size in list_files(self.root).items()
            if name != MANIFEST_NAME
        }
        manifest = Manifest(
            kind=kind,
            key=self.key,
            fingerprint=self.fingerprint,
            settings=dict(settings or {}),
            inputs=dict(inputs or {}),
            data_version=data_version or content_version(files),
            files=files,
            summary=dict(summary or {}),
        )
        write_atomically(self._manifest_path, manifest.to_bytes())
        return manifest

    def unseal(self) -> None:
        """Declare the folder incomplete again, so that damaged parts can be rewritten in place."""
        self._verified.clear()
        with storage_trouble(self.root, "remove"), contextlib.suppress(FileNotFoundError):
            self._manifest_path.unlink()

    def discard(self) -> None:
        """Remove the folder: the manifest first, so that no reader takes the rest for whole."""
        self.unseal()
        remove_tree(self.root)

    @contextlib.contextmanager
    def local(self, *, write: bool = True) -> Iterator[pathlib.Path]:
        """The folder as a local path, for libraries that need one; a remote one is copied here and, after, back.

        Args:
            write: Bring changes back to the store at the end. Without it the files are verified first.
        """
        if not write:
            self.verify()
        if local := local_path(self.root):
            with storage_trouble(self.root, "create"):
                local.mkdir(parents=True, exist_ok=True)
            yield local
            return
        with tempfile.TemporaryDirectory(prefix="less-assets-") as temporary:
            folder = pathlib.Path(temporary)
            self._download(folder)
            before = _local_state(folder)
            yield folder
            if write:
                after = _local_state(folder)
                changed = [name for name, state in after.items() if before.get(name) != state]
                self._upload(folder, changed)
                with storage_trouble(self.root, "remove"):
                    for name in before.keys() - after.keys():
                        self.root.joinpath(name).unlink()

    def _download(self, folder: pathlib.Path) -> None:
        for name in list_files(self.root):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage_trouble(self.root, "read"):
                self.root.fs.get_file(self.root.joinpath(name).path, str(target))

    def _upload(self, folder: pathlib.Path, names: list[str]) -> None:
        for name in names:
            with storage_trouble(self.root, "write"):
                self.root.fs.put_file(str(folder / name), self.root.joinpath(name).path)


def _local_state(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    paths = {name: os.stat(folder / name) for name in list_files(UPath(folder))}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in paths.items()}


class Pointer(NamedTuple):
    """What a key refers to: the folder, its published data version, and the inputs that it stands for."""

    folder: ArtifactFolder
    version: str
    inputs: dict[str, str]


class ArtifactStore:
    """All artifacts of a project, in a local folder or below an fsspec URL.

    Args:
        root: Local path or URL (`s3://…`, `gs://…`, `az://…`).
        storage_options: Options of the fsspec file system. Secrets belong in the environment.
    """

    def __init__(self, root: str, storage_options: Mapping[str, object] | None = None) -> None:
        self.root = open_root(root, storage_options)

    def artifact(self, key: str, fingerprint: str) -> ArtifactFolder:
        """The artifact's folder, whether it exists or not."""
        if not FINGERPRINT.fullmatch(fingerprint):
            raise StorageError(f"{fingerprint!r} is not a fingerprint (16 to 64 hexadecimal digits).", where=key)
        return ArtifactFolder(self.root.joinpath(*check_key(key).split("/"), fingerprint), key, fingerprint)

    def publish(
        self, folder: ArtifactFolder, at: str | None = None, inputs: Mapping[str, str] | None = None
    ) -> Manifest:
        """Make a sealed artifact the one in force, atomically.

        Args:
            folder: The artifact.
            at: The key that shall refer to it; None is its own. Several keys may share one artifact.
            inputs: Data versions of the inputs that it stands for under this key; None are those it was made from.
                Equal work may be asked for by unequal inputs: a model trained on the same rows for two tasks.

        Returns:
            The manifest as `current` gives it for that key.

        Raises:
            MissingArtifactError: The artifact is not sealed.
        """
        manifest = folder.manifest()
        inputs = dict(manifest.inputs if inputs is None else inputs)
        pointer: dict[str, JsonValue] = {
            "key": manifest.key,
            "fingerprint": manifest.fingerprint,
            "version": manifest.data_version,
            "inputs": dict(inputs),
        }
        sealed = {**pointer, "digest": _content_digest(pointer)}
        write_atomically(self._pointer_path(at or manifest.key), canonical_json(sealed) + b"\n")
        return manifest.model_copy(update={"inputs": inputs})

    def _pointer_path(self, key: str) -> UPath:
        return self.root.joinpath(*check_key(key).split("/"), CURRENT_NAME)

    def pointer(self, key: str) -> Pointer | None:
        """What a key refers to, or None if nothing was ever published.

        Raises:
            CorruptArtifactError: The record is damaged.
        """
        path = self._pointer_path(key)
        try:
            data = read_bytes(path)
        except FileNotFoundError:
            return None
        try:
            pointer = json.loads(data)
            if pointer.pop("digest") != _content_digest(pointer):
                raise ValueError("other bytes than were written")
            folder = self.artifact(pointer["key"], pointer["fingerprint"])
            return Pointer(folder, str(pointer["version"]), dict(pointer["inputs"]))
        except (ValueError, KeyError, TypeError, AttributeError, StorageError, RecursionError) as error:
            raise CorruptArtifactError(
                f"The record of which {key} is in force is damaged.", where=str(path), fix=repair_command(None)
            ) from error

    def current(self, key: str) -> Manifest | None:
        """Manifest of the artifact in force for a key, with the key's inputs; None if none was ever published.

        Raises:
            MissingArtifactError: The record is there but the artifact is gone.
            CorruptArtifactError: Record or manifest is damaged, or they do not belong together.
        """
        pointer = self.pointer(key)
        return None if pointer is None else _agreed_manifest(key, pointer)

    def require(self, key: str, asset: str) -> ArtifactFolder:
        """The artifact in force for a key.

        Args:
            key: Axis path.
            asset: The asset that makes it, named in the error.

        Raises:
            MissingArtifactError: It was never made, or its data is gone.
            CorruptArtifactError: Record or manifest is damaged.
            StaleArtifactError: Another version of less-assets wrote it.
        """
        try:
            pointer = self.pointer(key)
            if pointer is None:
                raise MissingArtifactError(f"{key} has not been made yet.", where=str(self.root))
            _agreed_manifest(key, pointer)
        except (MissingArtifactError, CorruptArtifactError, StaleArtifactError) as error:
            raise type(error)(error.what, where=error.where, fix=repair_command(asset)) from error
        return pointer.folder

    def published(self) -> list[str]:
        """Every key that has an artifact in force, sorted."""
        names = (name.rpartition("/") for name in list_files(self.root))
        return [key for key, _, file in names if file == CURRENT_NAME]

    @contextlib.contextmanager
    def writing(self, key: str, fingerprint: str) -> Iterator[ArtifactFolder]:
        """Write a small artifact whole or not at all: fill the yielded folder, `seal()` it, leave the block.

        A sealed artifact is immutable: where an intact one of the same address exists already (another run was
        faster), that one stays and the new files are dropped. A damaged one is replaced. Publish what
        `artifact(key, fingerprint)` then holds.
        """
        final = self.artifact(key, fingerprint)
        local_root, target = local_path(self.root), local_path(final.root)
        if target:
            staging = target.with_name(partial_name(fingerprint))
        else:
            staging = pathlib.Path(tempfile.mkdtemp(prefix="less-assets-"))
        try:
            with storage_trouble(UPath(staging), "create"):
                staging.mkdir(parents=True, exist_ok=True)
            folder = ArtifactFolder(UPath(staging), key, fingerprint)
            yield folder
            if not folder.exists():
                raise RuntimeError(f"{key} was written but not sealed")
            if local_root and target:
                with exclusive_lock(local_root / LOCK_NAME):
                    _move_into_place(staging, target, final)
            else:
                _upload_into_place(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextlib.contextmanager
    def resuming(self, key: str, fingerprint: str) -> Iterator[ArtifactFolder]:
        """Write a large artifact in place, alone: what an earlier, killed run finished is still there.

        On a local root a second writer of the same address waits; it should then ask `exists()` again. The lock dies
        with its process. Object stores have no locks: there two writers do the same work twice, chunk by chunk whole.
        """
        folder = self.artifact(key, fingerprint)
        with contextlib.ExitStack() as stack:
            if local := local_path(folder.root):
                with storage_trouble(folder.root, "create"):
                    local.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(local.with_name(f"{fingerprint}.lock")))
            yield folder


def _content_digest(value: JsonValue) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _agreed_manifest(key: str, pointer: Pointer) -> Manifest:
    manifest = pointer.folder.manifest()
    if manifest.data_version != pointer.version:
        raise CorruptArtifactError(
            f"{key} was published as version {pointer.version}, but its folder holds version {manifest.data_version}.",
            where=str(pointer.folder.root),
            fix=repair_command(manifest.kind),
        )
    return manifest.model_copy(update={"inputs": pointer.inputs})


def _intact(folder: ArtifactFolder) -> bool:
    try:
        folder.verify()
    except (MissingArtifactError, CorruptArtifactError):
        return False
    return True


def _move_into_place(staging: pathlib.Path, target: pathlib.Path, final: ArtifactFolder) -> None:
    """Rename a staged folder to its address, under the store's lock; an intact one that is there already stays."""
    if _intact(final):
        return
    with storage_trouble(final.root, "replace"):
        remove_tree(final.root)
        os.rename(staging, target)
        flush_folder(target.parent)


def _upload_into_place(staging: pathlib.Path, final: ArtifactFolder) -> None:
    """Copy a staged folder into the bucket, manifest last; the first intact one there wins."""
    if _intact(final):
        return
    final.discard()
    names = [name for name in list_files(UPath(staging)) if name != MANIFEST_NAME]
    final._upload(staging, names)
    write_atomically(final.root / MANIFEST_NAME, (staging / MANIFEST_NAME).read_bytes())


@contextlib.contextmanager
def exclusive_lock(path: pathlib.Path) -> Iterator[None]:
    """Hold a lock on this machine or network file system; the kernel frees it when the process dies."""
    with storage_trouble(UPath(path), "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "ab")  # noqa: SIM115 - closed below; the caller's errors must not look like ours
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another run is writing %s; waiting for it", path.with_suffix(""))
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s cannot be locked (%s); make sure that only one run writes here", path, error)
        yield
