"""Garbage collection: what nothing refers to goes, everything else stays."""

import os
import time

import pytest

from less_assets.errors import CorruptArtifactError
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import hold_folder, list_files
from less_assets.store.garbage import collect_garbage, collect_scratch

A, B, C = (f"{number:016x}" for number in (1, 2, 3))


def put(store, key, fingerprint, publish=True, at=None):
    with store.writing(key, fingerprint) as folder:
        folder.write_bytes("data", b"12345")
        folder.seal(kind="x")
    if publish:
        store.publish(store.artifact(key, fingerprint), at)


def begin(store, key, fingerprint):
    with store.resuming(key, fingerprint) as folder:
        folder.write_bytes("part", b"123")


def make_older(store, days=2.0):
    for name in list_files(store.root, partial=True):
        os.utime(store.root / name, (time.time() - days * 86400,) * 2)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}/root")


def test_what_current_refers_to_stays_and_what_it_no_longer_does_goes(store):
    put(store, "pool/s", A)
    put(store, "pool/s", B)
    put(store, "models", A, at="tuned/less/bbh")
    put(store, "models", C, publish=False)
    before = list_files(store.root)
    listed = collect_garbage(store, dry_run=True)
    assert [path for path, _ in listed] == [f"models/{C}", f"pool/s/{A}"]
    assert all(size > 5 for _, size in listed)
    assert list_files(store.root) == before
    assert collect_garbage(store, dry_run=False) == listed
    assert store.require("pool/s", "x").fingerprint == B
    store.require("tuned/less/bbh", "x").verify()
    assert not store.artifact("pool/s", A).exists()
    assert collect_garbage(store, dry_run=False) == []


def test_fresh_unfinished_work_stays_and_abandoned_work_goes(tmp_path):
    store = ArtifactStore(str(tmp_path))
    put(store, "gradients/s", A)
    begin(store, "gradients/s", B)
    (tmp_path / "gradients/s/x.123.partial").write_bytes(b"1")
    (tmp_path / "gradients/s/y.123.partial").mkdir()
    (tmp_path / "gradients/s/y.123.partial/data").write_bytes(b"12")
    assert collect_garbage(store, dry_run=False) == []
    make_older(store)
    paths = [path for path, _ in collect_garbage(store, dry_run=False)]
    assert paths == [f"gradients/s/{B}", "gradients/s/x.123.partial", "gradients/s/y.123.partial"]
    assert sorted(name for name in list_files(tmp_path, partial=True) if not name.endswith(".lock")) == [
        f"gradients/s/{A}/data",
        f"gradients/s/{A}/manifest.json",
        "gradients/s/current.json",
    ]


def test_what_is_no_artifact_is_never_touched(tmp_path):
    store = ArtifactStore(str(tmp_path))
    cache = tmp_path / "hub" / "snapshots" / ("ab" * 20)
    cache.mkdir(parents=True)
    (cache / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    make_older(store, days=900)
    assert collect_garbage(store, dry_run=False) == []
    assert (cache / "config.json").exists()


def test_a_damaged_record_stops_the_collection(store):
    put(store, "pool/s", A)
    put(store, "pool/t", A)
    put(store, "pool/t", B)
    (store.root / "pool" / "s" / "current.json").write_bytes(b"{")
    with pytest.raises(CorruptArtifactError, match="pool/s"):
        collect_garbage(store, dry_run=False)
    assert store.artifact("pool/t", A).exists()


def train(folder, name, days):
    (folder / name / "epoch-1").mkdir(parents=True)
    (folder / name / "epoch-1/state.json").write_text("{}")
    for path in (folder / name / "epoch-1/state.json", folder / name):
        os.utime(path, (time.time() - days * 86400,) * 2)


def test_trainings_that_nobody_goes_on_with_are_removed_and_others_stay(tmp_path):
    train(tmp_path, A, days=2)
    train(tmp_path, B, days=2)
    train(tmp_path, C, days=0.5)
    (tmp_path / "notes").mkdir()
    held = hold_folder(tmp_path / B)
    try:
        listed = collect_scratch(tmp_path, dry_run=True)
        assert listed == [(str(tmp_path / A), 2)]
        assert (tmp_path / A).exists()
        assert collect_scratch(tmp_path, dry_run=False) == listed
        assert {path.name for path in tmp_path.iterdir()} == {B, C, "notes"}
    finally:
        os.close(held)
    assert collect_scratch(tmp_path, dry_run=True) == [(str(tmp_path / B), 2)], "its process has ended"
    assert collect_scratch(tmp_path / "none", dry_run=True) == []
