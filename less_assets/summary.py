"""What `less-assets run` says at its end: results, where they lie, how to look at them.

Belongs here: words for a terminal. The tables are made by `method/leaderboard.py`.
"""

from less_assets.project import Project
from less_assets.store.artifacts import ArtifactStore


def results(project: Project, store: ArtifactStore) -> str:
    """The leaderboard if there is one, and where everything is."""
    return f"artifacts: {store.root}"
