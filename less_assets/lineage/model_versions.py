"""Which version of a model is meant: what tells that its files may have changed, and the commit that was recorded.

Belongs here: cheap looks at a model's files and at Hugging Face's cache; nothing is loaded or fetched. What a model's
content is, is `base_model`'s data version.
"""

import contextlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from less_assets.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from less_assets.lineage.lineage import Keys, Lineage
from less_assets.lineage.plan import digest
from less_assets.store.manifest import Manifest

_COMMIT = re.compile("[0-9a-f]{40}")


def is_hub_id(base: str) -> bool:
    """Whether a model is named by its Hugging Face id: neither a folder nor a file in a package."""
    return not base.startswith(("gguf:", "/", ".", "~")) and not Path(base).is_dir()


def model_stamp(base: str, last: Callable[[], Manifest | None] = lambda: None) -> str:
    """Tells cheaply whether a model's files may have changed.

    Of a Hugging Face model the name says nothing unless it has a commit: `owner/name`, branches and tags are moved. So
    it has another stamp as soon as this machine's cache has another commit than the one that was recorded.

    Args:
        base: As in the project file.
        last: Gives the artifact in force that was made with the model; None: there is none.
    """
    if base.startswith("gguf:"):
        package, _, file = base.removeprefix("gguf:").partition("/")
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        metadata = [Path(folder) / file for folder in places if (Path(folder) / file).is_file()]
        return f"{metadata[0].stat().st_size} bytes" if metadata else "not installed"
    folder = Path(base)
    if folder.is_dir():
        templates = folder.glob("additional_chat_templates/*")
        files = sorted(file for file in [*folder.iterdir(), *templates] if file.is_file())
        return digest(
            [[file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        )
    commit, made = cached_commit(base), last()
    if made is not None and pinned(base, made.summary) != base and commit in (None, made.summary["revision"]):
        return str(made.settings["stamp"])
    return f"{base}@{commit}" if commit else base


def cached_commit(base: str) -> str | None:
    """The commit that this machine's cache has of a Hugging Face model; None if it has none, or the name says it.

    Args:
        base: `owner/name` or `owner/name@revision`.
    """
    from huggingface_hub import constants

    name, _, revision = base.partition("@")
    if not is_hub_id(base) or _COMMIT.fullmatch(revision):
        return None
    # https://huggingface.co/docs/huggingface_hub/guides/manage-cache: what a branch or tag stands for
    reference = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def pinned(base: str | None, made: Mapping[str, Any]) -> Any:
    """A model's name with the commit at which something was made with it; the name alone where none is recorded.

    Args:
        base: As in the project file; None: none is named.
        made: The summary of what was made: `base`, `revision`.
    """
    if base is None or not is_hub_id(base) or made.get("base") != base or not made.get("revision"):
        return base
    return f"{base.partition('@')[0]}@{made['revision']}"


def recorded(lineage: Lineage, asset: str, keys: Keys) -> Manifest | None:
    """The artifact in force of a partition, fresh or not; None if there is none that can be read."""
    with contextlib.suppress(MissingArtifactError, CorruptArtifactError, StaleArtifactError):
        return lineage.store.current(lineage.declarations[asset].folder.format(**keys))
    return None
