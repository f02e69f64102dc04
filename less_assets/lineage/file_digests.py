"""Hashes of files that no asset stands for: a task's examples and evaluation, a model's files."""

import importlib.util
from pathlib import Path

from less_assets.errors import TargetFormatError
from less_assets.lineage.plan import digest


def files_digest(paths: list[str]) -> str:
    """Hash of the content of files and folders, whatever they are called.

    Raises:
        TargetFormatError: One does not exist.
    """
    from less_assets.method.data.row_files import file_digest, files_below

    digests = []
    for path in paths:
        files = files_below(path)
        if not files:
            raise TargetFormatError("A task's file or folder does not exist.", where=path, fix="correct the path")
        digests.append([file_digest(file) for file in files])
    return digest(digests)


def model_stamp(base: str) -> str:
    """Tells cheaply whether a model's files may have changed; what they are is `base_model`'s data version."""
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
    return base
