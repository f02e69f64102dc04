"""What a base model's files tell without being loaded.

Belongs here: cheap looks at a folder or a GGUF file that settings depend on. Loading is `method/training/models.py`,
hashes are `lineage/file_digests.py`.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path

DAY = b"strftime_now"
"""How a chat template asks for the day; transformers knows no other way."""
GGUF_HEAD = 64 << 20
"""Bytes at the beginning of a GGUF file in which its chat template stands: metadata come before weights."""


def template_writes_day(base: str) -> bool | None:
    """Return whether a base model's chat template asks for the day; None if its files are not known without a search.

    Args:
        base: As in the project file: a folder, `gguf:package/file.gguf`, or a Hugging Face id (None).
    """
    if base.startswith("gguf:"):
        return _gguf_writes_day(base)
    folder = Path(base)
    if not folder.is_dir():
        return None
    files = [folder / "tokenizer_config.json", folder / "chat_template.json", *folder.glob("*.jinja")]
    files += folder.glob("additional_chat_templates/*.jinja")
    return any(DAY in file.read_bytes() for file in files if file.is_file())


@lru_cache
def _gguf_writes_day(base: str) -> bool:
    package, _, name = base.removeprefix("gguf:").partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations if spec else None) or ():
        file = Path(location) / name
        if file.is_file():
            with file.open("rb") as stream:
                return DAY in stream.read(GGUF_HEAD)
    return False
