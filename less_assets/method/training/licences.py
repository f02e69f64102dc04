"""Under which licence a model or a data set is, as far as its files say.

Belongs here: reading it. Where it is shown is not decided here.
"""

import contextlib
import importlib.metadata
from pathlib import Path

import yaml


def card_licence(folder: Path) -> str | None:
    """Licence in the front matter of a model's or data set's card (`README.md`); None if there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    with contextlib.suppress(yaml.YAMLError):
        front = yaml.safe_load(parts[1])
        if isinstance(front, dict) and front.get("license"):
            return str(front["license"])
    return None


def package_licence(package: str) -> str | None:
    """Licence of the distribution that a package came with."""
    for distribution in importlib.metadata.packages_distributions().get(package, []):
        fields = importlib.metadata.metadata(distribution)
        for field in ("License-Expression", "License"):
            if field in fields and "\n" not in fields[field]:
                return fields[field]
    return None
