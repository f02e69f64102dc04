"""What a base model's files tell without being loaded.

Belongs here: cheap looks at a folder or a GGUF file that settings depend on. Loading is `method/training/models.py`,
hashes are `lineage/file_digests.py`.
"""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    file = gguf_file(base)
    if file is None:
        return False
    with file.open("rb") as stream:
        return DAY in stream.read(GGUF_HEAD)


def gguf_file(base: str) -> Path | None:
    """The file that `gguf:package/file.gguf` names; None if it is not installed."""
    package, _, name = base.removeprefix("gguf:").partition("/")
    spec = importlib.util.find_spec(package)
    files = [Path(location) / name for location in (spec.submodule_search_locations if spec else None) or ()]
    return next((file for file in files if file.is_file()), None)


def embeddings_by_config(base: str) -> int | None:
    """How many tokens a model has embeddings for, by its `config.json`; None if it is no folder or does not say.

    Args:
        base: As in the project file.
    """
    try:
        config = json.loads((Path(base) / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    parts = [config.get("text_config"), config] if isinstance(config, dict) else []
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)


def tokenizer_at_hand(base: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase | None":
    """Load a base model's tokenizer if that takes no download, and else return None; nothing is written.

    Args:
        base: As in the project file.
        trust_remote_code: Run Python files that come with the model.
    """
    from transformers import AutoTokenizer

    name, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
    options = {"revision": revision} if revision else {}
    if base.startswith("gguf:"):
        file = gguf_file(base)
        name, options = (str(file.parent), {"gguf_file": file.name}) if file else (base, {})
    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError):  # not here, or not whole: a run says what is missing
        return None
