"""All assets of the graph, in one table; whoever needs to know about assets reads it.

Belongs here: the list, and what opens a project's lineage with it. Each asset is declared beside what it computes.
"""

from graphlib import TopologicalSorter

from less_assets.compute.speeds import Guess
from less_assets.lineage.lineage import Lineage
from less_assets.project.project import Project
from less_assets.steps import (
    baselines,
    certificates,
    evaluation,
    explanations,
    external,
    finetuning,
    gradients,
    pool,
    preconditioning,
    prefilter,
    rescoring,
    selection,
    target_tuning,
    targets,
    tournament,
    warmup,
)
from less_assets.steps.asset import Asset
from less_assets.store.artifacts import ArtifactStore

_SELECTING = (baselines, target_tuning, prefilter, preconditioning, external, selection, rescoring)
_MODULES = (pool, warmup, targets, gradients, *_SELECTING, finetuning, evaluation, tournament, explanations)
_DECLARED: dict[str, Asset] = {asset.name: asset for module in _MODULES for asset in module.ASSETS}
_READS = {name: [read.asset for read in asset.inputs] for name, asset in _DECLARED.items()}
ASSETS: dict[str, Asset] = {name: _DECLARED[name] for name in TopologicalSorter(_READS).static_order()}
"""Name -> asset, each after those that it reads."""
GUESSES: dict[str, Guess] = {name: asset.speed for name, asset in ASSETS.items()} | certificates.SPEEDS
"""Name of a speed -> what serves where it was not measured."""


def open_store(project: Project) -> ArtifactStore:
    """The store that a project file names."""
    return ArtifactStore(project.storage.root)


def open_lineage(project: Project, store: ArtifactStore, *, verify_files: bool = False) -> Lineage:
    """The plans of a project as they stand now; see `Lineage`."""
    return Lineage(project, store, ASSETS, verify_files=verify_files)
