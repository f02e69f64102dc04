"""Every kind of stored file, every kind of damage, and what becomes of it on a finished tiny run.

Belongs here: which files there are, damaging them, asking the readers. `test_faults.py` tries each combination once,
`soak.py` many places in many files; the table in `docs/reliability.md` is what `table` makes of the outcomes.
"""

import contextlib
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg

from less_assets.compute import step as step_module
from less_assets.compute.models import ModelLoader
from less_assets.compute.step import StepInputs, make_artifact, make_together
from less_assets.errors import LessAssetsError
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import LEDGER_FILE
from less_assets.orchestration import materialization
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Outcome, Request, register_shards
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.artifacts import ArtifactStore
from support.killing import RESULTS, dagster_settings, differences, small_project, stored_files

NOBODY = 65534
# Set while the run is made; `test_secrets.py` looks for them everywhere.
SECRETS = {
    "HF_TOKEN": "hf_notarealtokenbutlonglikeone1234567",
    "AWS_SECRET_ACCESS_KEY": "notarealkey/butlonglikeone/1234567890abcd",
    "WANDB_API_KEY": "0123456789notarealkeyabcdef0123456789abc",
}
DAMAGES = ("flipped byte", "truncated", "missing", "unreadable")


@dataclass(frozen=True)
class Step:
    """One partition of one asset as the finished run has made it."""

    asset: str
    partition: str | None
    compute: Any

    @property
    def name(self) -> str:
        """Asset and partition."""
        return f"{self.asset} {self.partition}" if self.partition else self.asset


@dataclass
class StoredKind:
    """Files that are alike: their pattern, an example of them, and who reads it.

    Attributes:
        asset: The asset whose files they are.
        pattern: Name inside the artifact, numbers and names left open.
        file: The example.
        owner: Partition that the example belongs to.
        readers: Steps of the finished run that opened the example, other than the one that made it.
    """

    asset: str
    pattern: str
    file: Path
    owner: Step
    readers: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the table in the docs calls it."""
        return f"{self.asset}/{self.pattern}" if self.asset else self.pattern


class FinishedRun:
    """A finished tiny project whose readers are known: who opened which file while it was made.

    Args:
        place: An empty folder of its own, readable by everybody on its way.
        model: The tiny model's folder.
    """

    def __init__(self, place: Path, model: Path) -> None:
        place.chmod(0o755)
        self.scratch = place / "scratch"
        self.scratch.mkdir()
        self.scratch.chmod(0o777)  # whoever does a step's work again, whatever user that is
        shutil.copytree(model, place / "model")
        (place / "model").chmod(0o755)
        for file in (place / "model").iterdir():
            file.chmod(0o644)
        (place / "live").mkdir()
        self.place, self.tiny = place, small_project(place / "live", place / "model")
        self.tiny.settings["recipes"] += [{"name": name, "strategy": name, "fraction": 0.2} for name in ("bm25", "rds")]
        self.root, self.file = self.tiny.folder / "artifacts", self.tiny.path
        self.steps: dict[tuple[str, str | None], Step] = {}
        self._opened: list[tuple[Step, str]] = []
        self._step: Step | None = None
        sys.addaudithook(self._watch)
        make, together = make_artifact, make_together

        def watched(lineage: Any, asset: str, partition: Any, compute: Any, *arguments: Any, **options: Any) -> Any:
            self._step = self.steps[asset, partition] = Step(asset, partition, compute)
            try:
                return make(lineage, asset, partition, compute, *arguments, **options)
            finally:
                self._step = None

        def watched_together(lineage: Any, asset: str, partitions: Any, compute: Any, *arguments: Any) -> Any:
            (partition,) = partitions
            self._step = self.steps[asset, partition] = Step(asset, partition, lambda work: compute([work])[0])
            try:
                yield from together(lineage, asset, partitions, compute, *arguments)
            finally:
                self._step = None

        materialization.make_artifact = step_module.make_artifact = watched
        step_module.make_together = watched_together
        self.home, self.said = place / "home", ""
        self.home.mkdir()
        (self.home / "dagster.yaml").write_text(dagster_settings(self.home))
        before = dict(os.environ)
        os.environ.update(SECRETS)
        try:
            with dg.DagsterInstance.from_config(str(self.home)) as instance:
                self._bring_up_to_date(instance, Request())
        finally:
            materialization.make_artifact = step_module.make_artifact = make
            step_module.make_together = together
            for name in SECRETS.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
        shutil.copytree(self.tiny.folder, place / "kept")
        self.expected = stored_files(self.root)
        self.kinds = self._find_kinds()

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._step is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
            self._opened.append((self._step, os.fspath(arguments[0])))

    def run(self, request: Request = Request()) -> Outcome:  # noqa: B008 - immutable
        """Bring the project up to date, on records of its own."""
        with dg.DagsterInstance.ephemeral() as instance:
            return self._bring_up_to_date(instance, request)

    def _bring_up_to_date(self, instance: dg.DagsterInstance, request: Request) -> Outcome:
        project = load_project(self.file)
        store = open_store(project)
        register_shards(project, store, instance)
        return GraphRunner(build_definitions(project), project, store, instance, self._hear).run(request)

    def _hear(self, line: str) -> None:
        self.said += line + "\n"

    @property
    def lineage(self) -> Lineage:
        """The artifacts as they stand now; every file is compared with its digest."""
        project = load_project(self.file)
        return open_lineage(project, open_store(project), verify_files=True)

    def differences(self) -> list[str]:
        """How the store differs from what the finished run has left."""
        return differences(self.expected, self.root)

    def restore(self) -> None:
        """Put everything back as the finished run has left it."""
        shutil.rmtree(self.tiny.folder)
        shutil.copytree(self.place / "kept", self.tiny.folder)

    def _find_kinds(self) -> list[StoredKind]:
        found: dict[str, StoredKind] = {}
        lineage = self.lineage
        for (asset, partition), step in self.steps.items():
            folder = lineage.folder(asset, partition)
            root, pointer = Path(str(folder.root)), self.root / lineage.plan(asset, partition).pointer
            files = {pattern(name): root / name for name in folder.manifest().files}
            files |= {"manifest.json": root / "manifest.json", "current.json": pointer / "current.json"}
            for name, file in files.items():
                kind = StoredKind(asset, name, file, step)
                kind.readers = self._readers(kind)
                # Of equal files take one that somebody reads.
                if kind.name not in found or (kind.readers and not found[kind.name].readers):
                    found[kind.name] = kind
        scan = Step("instruction_pool", self.lineage.shards()[0], None)
        pool_files = StoredKind("", LEDGER_FILE, self.root / LEDGER_FILE, scan)
        pool_files.readers = self._readers(pool_files)
        return [*found.values(), pool_files]

    def _readers(self, kind: StoredKind) -> list[Step]:
        # A kept partition's folder is opened by its own maker and describer too.
        steps = [step for step, path in self._opened if path == str(kind.file) and step != kind.owner]
        return list(dict.fromkeys(steps))

    def read_by(self, step: Step) -> LessAssetsError | None:
        """Do a step's work again, reading what is stored now, writing elsewhere; its refusal, if it refuses.

        Raises:
            AssertionError: It has gone through and its files are not those of the undisturbed run.
        """
        project = load_project(self.file)
        lineage = open_lineage(project, open_store(project))
        scratch = Path(tempfile.mkdtemp(dir=self.scratch))
        try:
            plan = lineage.plan(step.asset, step.partition)
            folder = ArtifactStore(str(scratch)).artifact(plan.folder, plan.fingerprint)
            models = ModelLoader(project, scratch / "cache")
            step.compute(StepInputs(lineage, step.partition or "", folder, models, lambda _: None, step.name))
        except LessAssetsError as error:
            return error
        stored = self.root / plan.folder / plan.fingerprint
        files = {file.relative_to(folder.root): file for file in Path(str(folder.root)).rglob("*") if file.is_file()}
        for name, file in files.items():
            same = file.read_bytes() == (stored / name).read_bytes()
            assert same or plan.folder.startswith(RESULTS), f"{step.name} went through with other numbers"
        return None


def pattern(name: str) -> str:
    """A file's name with numbers and names of shards and forms left open."""
    name = re.sub(r"/c/\d+(/\d+)?$", "/c/*", name)
    name = re.sub(r"^scores/.*", "scores/*.parquet", name)
    return re.sub(r"features\.zarr/(adamw|marginal|sgd)/", "features.zarr/FORM/", name)


@contextlib.contextmanager
def damaged(file: Path, damage: str, place: float = 0.5) -> Iterator[None]:
    """A file with a damage, whole again afterwards.

    Args:
        file: Which.
        damage: One of `DAMAGES`.
        place: Where in the file, as a share of its length.
    """
    data, mode, stamp = file.read_bytes(), file.stat().st_mode, file.stat()
    at = min(int(place * len(data)), len(data) - 1)
    identity: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if damage == "flipped byte":
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "truncated":
        file.write_bytes(data[:at])
    elif damage == "missing":
        file.unlink()
    else:
        file.chmod(0)
        identity = as_nobody()
    try:
        with identity:
            yield
    finally:
        if file.parent.is_dir():
            file.unlink(missing_ok=True)
            file.write_bytes(data)
            file.chmod(mode)
            os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything, in all threads of this process; nothing changes for other users."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: a write fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@dataclass(frozen=True)
class Verdict:
    """What a damage came to.

    Attributes:
        refused: Whether somebody reads such files, and has refused this one.
        message: The refusal.
        noticed: Whether `run --verify` sees the damage.
    """

    refused: bool
    message: str
    noticed: bool


def judge(finished: FinishedRun, kind: StoredKind, damage: str, place: float = 0.5) -> Verdict:
    """Damage a file, let everybody read it who reads such files, and look with `--verify`.

    Raises:
        AssertionError: A reader has gone through with other numbers, or its refusal does not name file and repair.
    """
    with damaged(kind.file, damage, place):
        refusals = [(step, finished.read_by(step)) for step in kind.readers[:1]]
        try:
            noticed = finished.lineage.status(kind.owner.asset, kind.owner.partition).state != "fresh"
        except LessAssetsError as error:  # of what it cannot even look at
            noticed = str(kind.file) in str(error)
    for file in finished.scratch.iterdir():
        shutil.rmtree(file)
    message = ""
    for step, error in refusals:
        assert error is not None, f"{step.name} has read a damaged {kind.name} and said nothing"
        message = str(error)
        assert str(kind.file) in message or kind.asset in message, f"{kind.name} is not named: {message}"
        assert re.search(r"less-assets run|permissions|delete it", message), f"no repair is named: {message}"
    return Verdict(bool(refusals), message, noticed)


def kept_or_repaired(finished: FinishedRun) -> list[str]:
    """What differs from the undisturbed run once `run --verify` has been through."""
    finished.run(Request(verify=True))
    return finished.differences()


def table(finished: FinishedRun) -> str:
    """The kinds of stored files as a Markdown table: who refuses a damaged one, and what puts it right."""
    everybody = "whoever reads the artifact"
    lines = ["| file | a damaged one is refused by | put right by |", "|---|---|---|"]
    lines += [f"| `{name}` of any artifact | {everybody} | any `run` |" for name in ("current.json", "manifest.json")]
    for kind in sorted(finished.kinds, key=lambda kind: kind.name):
        if kind.pattern in ("manifest.json", "current.json"):
            continue
        readers = sorted({step.asset for step in kind.readers})
        shown = ", ".join(f"`{name}`" for name in readers) or "nobody: it is for people, or kept as a record"
        shown = "every command" if not kind.asset else shown
        lines.append(f"| `{kind.name}` | {shown} | {'`run --verify`' if kind.asset else 'deleting it'} |")
    return "\n".join(lines)
