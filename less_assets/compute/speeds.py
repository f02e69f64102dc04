"""Measured speeds: seconds per unit of work of each asset, kept beside the artifacts and outside them.

Belongs here: the file of rates, what it is keyed by, and recording into it. How much work there is says `workload.py`;
how a speed is measured before anything ran, `planning/trials.py`.
"""

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from less_assets.errors import StorageError
from less_assets.lineage.plan import digest
from less_assets.project.project import Project
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import read_bytes, write_atomically

RATES_FILE = "rates.json"
MODEL_LOAD = "model_load"
TRAINING = "training"
"""What a calibration measures for warm-up and fine-tuning, which are the same loop."""
_MEMORY = 0.9
"""Weight of all earlier measurements against a new one of the same size: a machine may have become faster."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rate:
    """How long a unit of work takes.

    Attributes:
        seconds: Time measured, older measurements weighing less.
        units: Units of work in that time: tokens, rows, samples or loads, as the asset counts them.
        source: `measured`: in runs; `similar`: in runs with other settings of adapter and gradients; `calibrated`: by a
            short trial, until a run has measured it.
    """

    seconds: float
    units: float
    source: Literal["measured", "similar", "calibrated"] = "measured"

    @property
    def per_unit(self) -> float:
        """Seconds per unit."""
        return self.seconds / self.units


@dataclass(frozen=True)
class Guess:
    """What serves where the speed of a name was not measured.

    Attributes:
        like: Names whose speed serves, best first.
        times_longer: How much longer a unit takes than one of those.
        seconds: Seconds a unit where none of those was measured either; None: not known.
    """

    like: tuple[str, ...] = ()
    times_longer: float = 1.0
    seconds: float | None = None


class Rates:
    """The rates of one project on one machine.

    Args:
        rates: Name (`rate_name`) → rate.
        guesses: Name → what serves where no rate is known.
    """

    def __init__(self, rates: Mapping[str, Rate], guesses: Mapping[str, Guess]) -> None:
        self._rates, self._guesses = dict(rates), guesses

    @classmethod
    def load(cls, store: ArtifactStore, project: Project, guesses: Mapping[str, Guess]) -> "Rates":
        """The rates stored so far for this project's model on this machine; none if the file is gone or damaged.

        Those that were never measured with the project's settings of adapter and gradients are taken from the settings
        that were first measured last.
        """
        setup, stored = setup_of(project), _read(store)
        rates: dict[str, Rate] = {}
        for other, measured in stored.items():
            if other.partition("-")[0] == setup.partition("-")[0]:
                rates |= {
                    name: replace(rate, source="similar")
                    for name, rate in measured.items()
                    if rate.source == "measured"
                }
        return cls(rates | stored.get(setup, {}), guesses)

    def get(self, name: str) -> Rate | None:
        """The rate of a name, or of the one most like it; None if nothing is known."""
        if name in self._rates:
            return self._rates[name]
        guess = self._guesses.get(name, Guess())
        similar = next((self._rates[other] for other in guess.like if other in self._rates), None)
        return similar and replace(similar, seconds=similar.seconds * guess.times_longer)

    def seconds_per_unit(self, name: str) -> float | None:
        """Seconds for a unit of work, measured or guessed; None if nobody knows."""
        rate = self.get(name)
        return rate.per_unit if rate else self._guesses.get(name, Guess()).seconds

    def with_calibrated(self, rates: Mapping[str, Rate]) -> "Rates":
        """These rates, and calibrated ones where nothing was measured."""
        measured = {name: rate for name, rate in self._rates.items() if rate.source == "measured"}
        return Rates({**self._rates, **rates, **measured}, self._guesses)


def rate_name(asset: str, partition: str | None) -> str:
    """What an artifact's speed is filed under: its asset, and for evaluations, whose samples differ, the task too."""
    return f"{asset}/{str(partition).partition('|')[2]}" if asset == "eval_results" else asset


def record(store: ArtifactStore, project: Project, name: str, seconds: float, units: float) -> None:
    """Add a measurement. Two runs at once may lose one another's: a speed is an estimate, and never stops a run."""
    if units <= 0 or seconds <= 0:
        return
    setup = setup_of(project)
    content = _read(store)
    before = content.setdefault(setup, {}).get(name)
    if before is None or before.source == "calibrated":
        content[setup][name] = Rate(seconds, units)
    else:
        content[setup][name] = Rate(_MEMORY * before.seconds + seconds, _MEMORY * before.units + units)
    _write(store, content)


def keep_calibrated(store: ArtifactStore, project: Project, rates: Mapping[str, Rate]) -> None:
    """Keep what a calibration found, except where a run has measured the same."""
    setup = setup_of(project)
    content = _read(store)
    known = content.setdefault(setup, {})
    known |= {name: rate for name, rate in rates.items() if name not in known or known[name].source == "calibrated"}
    _write(store, content)


def setup_of(project: Project) -> str:
    """Hash of machine and model, which speed depends on most, and one of the rest: the adapter, and the gradients."""
    model = project.model
    placed = [model.device, model.device_map, project.compute.backend]
    most = digest([machine(), project.model_settings(), placed])[:12]
    return f"{most}-{digest([project.lora.model_dump(), project.gradient_settings()])[:12]}"


def machine() -> str:
    """This machine's processors and accelerators in words; no library is loaded for it."""
    parts = [platform.machine(), f"{os.cpu_count()} cores", _first_value(Path("/proc/cpuinfo"), "model name")]
    parts += sorted(
        _first_value(path, "Model") for path in Path("/proc/driver/nvidia/gpus").glob("*/information") if path.is_file()
    )
    if threads := os.environ.get("OMP_NUM_THREADS"):
        parts.append(f"{threads} threads")
    return ", ".join(part for part in parts if part)


def _first_value(path: Path, name: str) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _read(store: ArtifactStore) -> dict[str, dict[str, Rate]]:
    try:
        content = json.loads(read_bytes(store.root / RATES_FILE))
        stored = {
            setup: {name: Rate(**rate) for name, rate in rates.items()} for setup, rates in content["setups"].items()
        }
        sound = all(rate.seconds > 0 and rate.units > 0 for rates in stored.values() for rate in rates.values())
        return stored if sound else {}
    except FileNotFoundError:
        return {}
    except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("the speeds of earlier runs cannot be read and are measured anew: %s", error)
        return {}


def _write(store: ArtifactStore, content: Mapping[str, Mapping[str, Rate]]) -> None:
    document = {
        "setups": {
            setup: {name: asdict(rate) for name, rate in sorted(rates.items())} for setup, rates in content.items()
        }
    }
    try:
        write_atomically(store.root / RATES_FILE, json.dumps(document, indent=1).encode() + b"\n")
    except StorageError as error:
        _log.warning("the speed of this step is not kept: %s", error)
