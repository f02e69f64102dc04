"""Result files that several benchmarks share: each merges its keys.

Belongs here: nothing but that. What a key means says the benchmark that writes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
FEATURES, SCALE = FOLDER / "features.json", FOLDER / "scale.json"


def merge(path: Path, figures: Mapping[str, Any]) -> None:
    """Set keys of a result file; the others stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | dict(figures), indent=1, sort_keys=True) + "\n")
