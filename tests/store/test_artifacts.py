"""Artifacts: whole or not there, verified on reading, switched at once, never outside the root."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.errors import (
    CorruptArtifactError,
    LessAssetsError,
    MissingArtifactError,
    StaleArtifactError,
    StorageError,
)
from less_assets.store.artifacts import FINGERPRINT, ArtifactStore
from less_assets.store.files import list_files
from less_assets.store.manifest import Manifest, canonical_json

KEY, OLD, NEW = "pool/dolly-00000", "0" * 16, "1" * 16


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}/root")


def write(store: ArtifactStore, fingerprint: str = OLD, text: bytes = b"rows", publish: bool = True):
    with store.writing(KEY, fingerprint) as folder:
        folder.write_bytes("a/data.bin", text)
        folder.write_bytes("b.bin", text * 2)
        folder.seal(kind="instruction_pool", settings={"size": 4}, inputs={"base": "v1"}, summary={"rows": 4})
    folder = store.artifact(KEY, fingerprint)
    if publish:
        store.publish(folder)
    return folder


def test_a_published_artifact_is_found_with_everything_it_was_sealed_with(store):
    write(store)
    manifest = store.current(KEY)
    assert (manifest.kind, manifest.key, manifest.fingerprint) == ("instruction_pool", KEY, OLD)
    assert (manifest.settings, manifest.inputs, manifest.summary) == ({"size": 4}, {"base": "v1"}, {"rows": 4})
    assert {name: file.bytes for name, file in manifest.files.items()} == {"a/data.bin": 4, "b.bin": 8}
    folder = store.require(KEY, "instruction_pool")
    assert folder.read_bytes("a/data.bin") == b"rows"
    assert folder.verify() == manifest
    assert store.published() == [KEY]


def test_nothing_published_is_none_or_an_error_with_the_command(store):
    assert store.current(KEY) is None
    with pytest.raises(MissingArtifactError, match=r"pool/dolly-00000(.|\n)*less-assets run --until instruction_pool"):
        store.require(KEY, "instruction_pool")


def test_an_unpublished_artifact_exists_but_is_not_current(store):
    folder = write(store, publish=False)
    assert folder.exists()
    assert store.current(KEY) is None


def test_publishing_switches_and_can_switch_back(store):
    write(store, OLD, b"old")
    write(store, NEW, b"new")
    assert store.current(KEY).fingerprint == NEW
    store.publish(store.artifact(KEY, OLD))
    assert store.require(KEY, "x").read_bytes("b.bin") == b"oldold"


def test_several_keys_share_one_artifact(store):
    folder = write(store, publish=False)
    for at in ("models/full/bbh", "models/full/gsm8k"):
        store.publish(folder, at=at)
        assert store.require(at, "finetuned_model").root == folder.root
    assert store.published() == ["models/full/bbh", "models/full/gsm8k"]


def test_the_data_version_is_that_of_the_content_unless_given(store):
    version = write(store, OLD).manifest().data_version
    assert write(store, NEW).manifest().data_version == version
    assert write(store, "2" * 16, b"other").manifest().data_version != version
    with store.writing(KEY, "3" * 16) as folder:
        assert folder.seal(kind="x", data_version="mine").data_version == "mine"


def test_equal_artifacts_have_equal_bytes(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        write(ArtifactStore(str(root)))
    files = [{name: (root / name).read_bytes() for name in list_files(root)} for root in roots]
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in b"".join(files[0].values())


def test_a_failed_write_leaves_nothing(store):
    def fail() -> None:
        with store.writing(KEY, OLD) as folder:
            folder.write_bytes("data.bin", b"rows")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert not store.artifact(KEY, OLD).exists()
    assert [name for name in list_files(store.root, partial=True) if name != "store.lock"] == []


def test_an_unsealed_write_is_a_mistake(store):
    with pytest.raises(RuntimeError, match="not sealed"), store.writing(KEY, OLD) as folder:
        folder.write_bytes("data.bin", b"rows")
    assert not store.artifact(KEY, OLD).exists()


def test_the_first_intact_artifact_of_an_address_stays(store):
    write(store, OLD, b"first")
    write(store, OLD, b"second")
    assert store.require(KEY, "x").read_bytes("a/data.bin") == b"first"


def test_a_damaged_artifact_is_replaced(store):
    folder = write(store, OLD, b"first")
    folder.path("b.bin").write_bytes(b"FIRSTfirst")
    write(store, OLD, b"second")
    assert store.require(KEY, "x").read_bytes("a/data.bin") == b"second"


def test_any_flipped_byte_cut_or_lost_file_is_an_error(store):
    names = ["a/data.bin", "b.bin", "manifest.json", "../current.json"]
    for name in names:
        folder = write(store)
        file = folder.root.parent / "current.json" if name.startswith("..") else folder.root.joinpath(*name.split("/"))
        data = file.read_bytes()
        damages = [bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]]) for at in range(len(data)) for bit in (1, 64)]
        for damaged in [*damages, data[:-3], b"", b"null", b"[]", None]:
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.raises((CorruptArtifactError, MissingArtifactError)) as caught:
                store.require(KEY, "instruction_pool").verify()
            assert "less-assets run --until instruction_pool" in str(caught.value)
        file.write_bytes(data)


def test_a_record_without_data_is_missing_not_none(store):
    write(store).discard()
    with pytest.raises(MissingArtifactError):
        store.current(KEY)


def test_a_manifest_from_elsewhere_is_refused(store):
    write(store, OLD)
    folder = write(store, NEW, b"new")
    (folder.root / "manifest.json").write_bytes((store.artifact(KEY, OLD).root / "manifest.json").read_bytes())
    with pytest.raises(CorruptArtifactError, match="manifest is that of"):
        store.current(KEY)


def test_a_sealed_folder_changed_after_publishing_is_refused(store):
    folder = write(store)
    folder.write_bytes("b.bin", b"changed")
    folder.seal(kind="instruction_pool")
    with pytest.raises(CorruptArtifactError, match="was published as version"):
        store.require(KEY, "instruction_pool")


def test_another_format_version_is_stale():
    old = Manifest(kind="x", key=KEY, fingerprint=OLD, data_version="v", format_version=0)
    with pytest.raises(StaleArtifactError, match="format 0"):
        Manifest.from_bytes(old.to_bytes(), "there")


@given(st.binary(max_size=300) | st.recursive(st.none() | st.text(), st.lists).map(canonical_json))
def test_any_bytes_as_a_manifest_are_an_error_of_ours(data):
    with pytest.raises(LessAssetsError):
        Manifest.from_bytes(data, "there")


def test_summaries_hold_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Manifest(kind="x", key=KEY, fingerprint=OLD, data_version="v", summary={"loss": float("nan")}).to_bytes()


ODD_NAMES = ["..", "a/../b", "/etc", "a//b", "", "a/", "~", "a\\b", "C:", "a\0", "."]


@given(st.text(max_size=30) | st.sampled_from(ODD_NAMES))
def test_no_name_leaves_the_root(name):
    store = ArtifactStore("/srv/store")
    for make in (lambda: store.artifact(name, OLD).root, lambda: store.artifact("a", OLD).path(name)):
        try:
            path = make()
        except StorageError:
            continue
        assert os.path.normpath(path) == str(path)
        assert str(path).startswith("/srv/store/")
    if not FINGERPRINT.fullmatch(name):
        with pytest.raises(StorageError):
            store.artifact("a", name)


@pytest.mark.parametrize("key", ["a/current.json", "manifest.json", f"models/{OLD}", "x.partial"])
def test_keys_that_would_be_taken_for_something_else_are_refused(key):
    with pytest.raises(StorageError):
        ArtifactStore("/srv/store").artifact(key, OLD)


def test_libraries_that_need_a_local_path_get_one(store):
    with store.resuming(KEY, OLD) as folder:
        with folder.local() as path:
            (path / "sub").mkdir()
            (path / "sub" / "adapter.safetensors").write_bytes(b"one")
            (path / "gone.txt").write_bytes(b"x")
        with folder.local() as path:
            assert (path / "sub" / "adapter.safetensors").read_bytes() == b"one"
            (path / "gone.txt").unlink()
            (path / "sub" / "adapter.safetensors").write_bytes(b"two")
        folder.seal(kind="warmup_checkpoints")
    assert list(folder.manifest().files) == ["sub/adapter.safetensors"]
    with folder.local(write=False) as path:
        assert (path / "sub" / "adapter.safetensors").read_bytes() == b"two"
    (folder.root / "sub" / "adapter.safetensors").write_bytes(b"bad")
    with pytest.raises(CorruptArtifactError), folder.local(write=False):
        pass


def test_resumed_work_keeps_what_is_there(store):
    with store.resuming(KEY, OLD) as folder:
        folder.write_bytes("part-0", b"0")
    with store.resuming(KEY, OLD) as folder:
        assert not folder.exists()
        assert list(list_files(folder.root)) == ["part-0"]
        folder.write_bytes("part-1", b"1")
        folder.seal(kind="x")
    assert store.artifact(KEY, OLD).exists()


def test_two_threads_never_resume_the_same_artifact_at_once(tmp_path):
    store, inside, most = ArtifactStore(str(tmp_path)), [0], [0]

    def work() -> None:
        for _ in range(20):
            with store.resuming(KEY, OLD) as folder:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                folder.write_bytes("part", b"x")
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def _write_repeatedly(root: str, text: bytes, rounds: int) -> None:
    for round_ in range(rounds):
        write(ArtifactStore(root), f"{round_:016x}", text)


def test_of_two_processes_one_wins_whole_and_readers_see_whole_artifacts(tmp_path):
    spawn, rounds = multiprocessing.get_context("fork"), 30
    writers = [spawn.Process(target=_write_repeatedly, args=(str(tmp_path), text, rounds)) for text in (b"a", b"bb")]
    for writer in writers:
        writer.start()
    store, seen = ArtifactStore(str(tmp_path)), set()
    while any(writer.is_alive() for writer in writers):
        if store.current(KEY):
            folder = store.require(KEY, "x")
            folder.verify()
            seen.add((folder.fingerprint, folder.read_bytes("a/data.bin") * 2 == folder.read_bytes("b.bin")))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen
    assert all(whole for _, whole in seen)
    for round_ in range(rounds):
        assert store.artifact(KEY, f"{round_:016x}").verify().files["a/data.bin"].bytes in (1, 2)


def test_a_killed_writer_leaves_the_artifact_in_force_and_no_lock(tmp_path):
    store = ArtifactStore(str(tmp_path))
    write(store)
    code = f"""
import os, signal
from less_assets.store.artifacts import ArtifactStore
with ArtifactStore({str(tmp_path)!r}).resuming({KEY!r}, {NEW!r}) as folder:
    folder.write_bytes("part-0", b"0")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9
    assert store.current(KEY).fingerprint == OLD
    with store.resuming(KEY, NEW) as folder:
        assert (folder.root / "part-0").read_bytes() == b"0"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_forbidden_folder_is_a_storage_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission"):
        write(ArtifactStore(str(tmp_path)))


def test_a_root_that_cannot_hold_folders_is_a_storage_error_that_names_it():
    with pytest.raises(StorageError, match=r"/dev/full/store"):
        write(ArtifactStore("/dev/full/store"))


def test_a_root_may_be_relative_or_a_file_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(ArtifactStore("artifacts"))
    assert ArtifactStore(f"file://{tmp_path}/artifacts").current(KEY).fingerprint == OLD
