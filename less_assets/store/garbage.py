"""Finding and removing artifacts that nothing refers to any more.

Belongs here: what may go and what must stay. Not here: the command that asks (cli.py).
"""

import pathlib
import time
from collections import defaultdict

from upath import UPath

from less_assets.errors import CorruptArtifactError, LessAssetsError, MissingArtifactError, StaleArtifactError
from less_assets.store.artifacts import (
    CURRENT_NAME,
    FINGERPRINT,
    RECORDS_FOLDER,
    ArtifactFolder,
    ArtifactStore,
    check_key,
)
from less_assets.store.files import PARTIAL_SUFFIX, is_held, list_files, modified_at, remove_tree, storage_trouble
from less_assets.store.manifest import MANIFEST_NAME

UNFINISHED_SECONDS = 24 * 3600.0


def collect_garbage(
    store: ArtifactStore, *, dry_run: bool, unfinished_seconds: float = UNFINISHED_SECONDS
) -> list[tuple[str, int]]:
    """Remove artifacts that no `current.json` refers to, and what killed runs left behind.

    Unfinished work is what a run resumes from, and may be in the making right now: it goes only when nothing in it has
    changed for `unfinished_seconds`. Files that are not an artifact's are never touched.

    Args:
        store: The store.
        dry_run: Only list.
        unfinished_seconds: Age from which unfinished folders and temporary files count as abandoned.

    Returns:
        (path relative to the root, bytes) of what was or would be removed, sorted.

    Raises:
        CorruptArtifactError: A `current.json` is damaged, so that nobody can say what is in use; nothing is removed.
    """
    files = list_files(store.root, partial=True)
    files = {name: size for name, size in files.items() if not name.startswith(f"{RECORDS_FOLDER}/")}
    in_use = set()
    for name in files:
        key, _, file = name.rpartition("/")
        if file == CURRENT_NAME and PARTIAL_SUFFIX not in name and (pointer := store.pointer(key)):
            in_use.add(f"{pointer.folder.key}/{pointer.folder.fingerprint}")
    leftovers: dict[str, dict[str, int]] = defaultdict(dict)
    folders: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in files.items():
        parts = name.split("/")
        partial = next((depth for depth, part in enumerate(parts) if part.endswith(PARTIAL_SUFFIX)), None)
        finger = next((depth for depth, part in enumerate(parts[:-1]) if depth and FINGERPRINT.fullmatch(part)), None)
        if partial is not None:
            leftovers["/".join(parts[: partial + 1])][name] = size
        elif finger is not None:
            folders["/".join(parts[: finger + 1])][name] = size
    oldest = time.time() - unfinished_seconds

    def abandoned(names: dict[str, int]) -> bool:
        try:
            return all(modified_at(store.root.joinpath(name)) <= oldest for name in names)
        except FileNotFoundError:  # it was finished while we looked
            return False

    garbage = {path: names for path, names in leftovers.items() if abandoned(names)}
    for path, names in folders.items():
        if path in in_use or not (folder := _artifact(store, path, files)):
            continue
        if f"{path}/{MANIFEST_NAME}" in names or abandoned(names):
            garbage[path] = names
            if not dry_run:
                folder.discard()
    if not dry_run:
        for path in leftovers.keys() & garbage.keys():
            _remove(store, path)
    return sorted((path, sum(names.values())) for path, names in garbage.items())


def collect_scratch(
    folder: pathlib.Path, *, dry_run: bool, unfinished_seconds: float = UNFINISHED_SECONDS
) -> list[tuple[str, int]]:
    """Remove what trainings have left in a local folder: finished ones and those that nobody goes on with.

    A training whose process lives is never touched; nor is one in which something has changed for less than
    `unfinished_seconds`. Of the warm-up's epochs the store has its own copies, from which a training is taken up again.

    Args:
        folder: Holds one folder for each training, by fingerprint.
        dry_run: Only list.
        unfinished_seconds: Age from which a training counts as abandoned.

    Returns:
        (path, bytes) of what was or would be removed, sorted.
    """
    oldest = time.time() - unfinished_seconds
    removed = []
    with storage_trouble(UPath(folder), "list"):
        trainings = sorted(folder.iterdir()) if folder.is_dir() else []
    for training in trainings:
        if not training.is_dir() or not FINGERPRINT.fullmatch(training.name) or is_held(training):
            continue
        files = list_files(UPath(training), partial=True)
        newest = max([training.stat().st_mtime, *(modified_at(UPath(training / name)) for name in files)])
        if newest <= oldest:
            removed.append((str(training), sum(files.values())))
            if not dry_run:
                remove_tree(UPath(training))
    return removed


def _artifact(store: ArtifactStore, path: str, files: dict[str, int]) -> ArtifactFolder | None:
    """The folder as an artifact of this store, or None if it only looks like one (a cache in the same root, say)."""
    key, _, fingerprint = path.rpartition("/")
    try:
        folder = store.artifact(check_key(key), fingerprint)
    except LessAssetsError:
        return None
    if f"{key}/{CURRENT_NAME}" in files or f"{path}.lock" in files:
        return folder
    try:
        folder.manifest()
    except (MissingArtifactError, CorruptArtifactError):
        return None
    except StaleArtifactError:  # of an older version of less-assets, and still one
        return folder
    return folder


def _remove(store: ArtifactStore, path: str) -> None:
    target = store.root.joinpath(path)
    if target.is_dir():
        remove_tree(target)
    else:
        with storage_trouble(target, "remove"):
            target.unlink(missing_ok=True)
