"""A project whose artifacts are put into its store without computing anything."""

import json

import yaml

from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import Project, load_project
from less_assets.steps.registry import ASSETS, open_lineage
from less_assets.store.artifacts import ArtifactStore

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


class Bench:
    """A project over tiny files, and artifacts put into its store without computing anything."""

    def __init__(self, folder) -> None:
        self.folder = folder
        row = json.dumps({"messages": TURNS}) + "\n"
        for name in ("plus.jsonl", "sums.jsonl", "sky.jsonl", "held_out.jsonl"):
            (folder / name).write_text(row)
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text("{}")
        self.settings = {
            "name": "bench",
            "model": {"base": "model"},
            "pool": {"sources": [{"name": "plus", "path": "plus.jsonl"}]},
            "warmup": {"epochs": 2},
            "tasks": [
                {
                    "name": "sums",
                    "examples": {"path": "sums.jsonl"},
                    "evaluation": {"held_out": "held_out.jsonl", "max_new_tokens": 4},
                },
                {"name": "sky", "examples": {"path": "sky.jsonl"}},
            ],
            "recipes": [
                {"name": "less", "strategy": "less", "fraction": 0.5},
                {"name": "random", "strategy": "random", "fraction": 0.5, "seeds": [0]},
                {"name": "base", "strategy": "none"},
            ],
        }
        self.store = ArtifactStore(str(folder / "artifacts"))
        PoolFiles.scan(self.project, self.store)

    @property
    def project(self) -> Project:
        path = self.folder / "project.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        return load_project(path)

    @property
    def lineage(self) -> Lineage:
        """The lineage as it stands now."""
        return open_lineage(self.project, self.store)

    def put(self, asset: str, partition: str | None = None, lineage: Lineage | None = None, **summary) -> None:
        """Store an empty artifact as its plan stands."""
        plan = (lineage or self.lineage).plan(asset, partition)
        if not self.store.artifact(plan.folder, plan.fingerprint).exists():
            with self.store.writing(plan.folder, plan.fingerprint) as folder:
                folder.seal(
                    kind=asset,
                    settings=plan.settings,
                    inputs=plan.inputs,
                    data_version=plan.fingerprint,
                    summary=summary,
                )
        self.store.publish(self.store.artifact(plan.folder, plan.fingerprint), at=plan.pointer, inputs=plan.inputs)

    def put_everything(self) -> None:
        """Store an artifact for every partition of every asset, in order."""
        summaries = {
            "pool_index": {"shards": self.lineage.pool_files.shard_keys()},
            "target_examples": {"examples_digest": "e", "evaluation_digest": "v"},
        }
        lineage = self.lineage
        for asset, partition in self.artifacts(lineage):
            self.put(asset, partition, lineage, **summaries.get(asset, {}))

    def artifacts(self, lineage: Lineage) -> list[tuple[str, str | None]]:
        """Every partition of every asset of the project, in order."""
        return [
            (name, partition)
            for name, asset in ASSETS.items()
            for partition in asset.partitions(lineage.project, lineage.keys_of)
        ]

    def states(self) -> dict[str, str]:
        """State of every published artifact's asset and partition, fresh ones left out."""
        lineage = self.lineage
        return {
            asset if partition is None else f"{asset}/{partition}": state
            for asset, partition in self.artifacts(lineage)
            if (state := lineage.status(asset, partition).state) != "fresh"
        }
