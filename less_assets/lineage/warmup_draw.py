"""How often the warm-up sample was asked to be drawn again: a small file beside the artifacts."""

import json

from less_assets.errors import CorruptArtifactError
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import read_bytes, write_atomically

DRAW_FILE = "warmup_sample/draw.json"


def sample_draw(store: ArtifactStore) -> int:
    """How often the warm-up sample was asked to be drawn again."""
    try:
        return int(json.loads(read_bytes(store.root / DRAW_FILE)))
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError) as error:
        raise CorruptArtifactError(
            "The record of warm-up draws is damaged.",
            where=str(store.root / DRAW_FILE),
            fix="delete it, or draw again with `less-assets run --resample-warmup`",
        ) from error


def draw_sample_again(store: ArtifactStore) -> None:
    """Make the next run draw another warm-up sample."""
    write_atomically(store.root / DRAW_FILE, json.dumps(sample_draw(store) + 1).encode())
