"""What an artifact is made from, and how that is compared with what is stored.

Belongs here: fingerprints, and plans as data. What each asset is made from stands in `lineage.py`, how Dagster is told
in `materialization.py`, how manifests lie on disk in `store/`. No dagster.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue

from less_assets.store.manifest import FORMAT_VERSION, Manifest

Versions = Mapping[str, str]


def digest(value: object) -> str:
    """128-bit hash of a JSON value, as 32 hex characters; independent of the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ArtifactPlan:
    """What an artifact is going to be made from, known before anything is computed.

    Attributes:
        asset: Name of the asset.
        partition: Partition key; None for an unpartitioned asset.
        pointer: Axis folder in the store whose `current.json` names the artifact in force.
        folder: Folder that holds the artifacts by fingerprint; differs from `pointer` where equal work is shared.
        settings: Settings that could change the numbers.
        inputs: Version of every upstream artifact; `asset` or `asset/partition` → data version.
        determined_by: The part of the inputs that the content depends on; all of them by default. A frozen or
            narrower artifact (the warm-up sample; targets when only their evaluation changed) names fewer: then a
            new upstream version is recorded without computing anything again.
    """

    asset: str
    partition: str | None
    pointer: str
    folder: str
    settings: Mapping[str, JsonValue]
    inputs: Versions
    determined_by: Versions | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the content: 32 hex characters."""
        determined_by = self.inputs if self.determined_by is None else self.determined_by
        return digest([FORMAT_VERSION, self.asset, dict(self.settings), dict(determined_by)])

    def differences(self, manifest: Manifest) -> list[str]:
        """How a stored artifact differs from this plan, one line each; empty if it is what the plan would make."""
        lines = [
            f"{name}: made with {_show(manifest.settings.get(name))}, now {_show(self.settings.get(name))}"
            for name in sorted({*manifest.settings, *self.settings})
            if manifest.settings.get(name) != json.loads(json.dumps(self.settings.get(name)))
        ]
        for name in sorted({*manifest.inputs, *self.inputs}):
            before, now = manifest.inputs.get(name), self.inputs.get(name)
            if before is None:
                lines.append(f"{name} was not there when it was made")
            elif now is None:
                lines.append(f"{name} is gone")
            elif before != now:
                lines.append(f"{name} has changed ({before[:8]} → {now[:8]})")
        if not lines and manifest.fingerprint != self.fingerprint:
            lines.append("made by another version of LESS Assets")
        return lines


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
