"""Every kind of stored file × every kind of damage: refused by name or made again, never read as if it were whole."""

import re
from pathlib import Path

import pytest
from support.faults import DAMAGES, FinishedRun, damaged, full_disk, judge, kept_or_repaired, table

from less_assets.errors import CorruptArtifactError, StorageError
from less_assets.lineage.pool_files import LEDGER_FILE
from less_assets.running.runner import Request

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
RECORDS = ("manifest.json", "current.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name_with_the_repair(finished: FinishedRun, damage):
    verdicts = {kind.name: judge(finished, kind, damage) for kind in finished.kinds}
    assert len(verdicts) > 60
    noticed = {name for name, verdict in verdicts.items() if verdict.noticed}
    # A lost ledger is scanned anew; `--verify` looks at artifacts.
    assert noticed | {"pool/ledger.json"} == set(verdicts)
    refused = {name for name, verdict in verdicts.items() if verdict.refused}
    assert {name.partition("/")[0] for name in refused} >= {"instruction_pool", "train_gradients", "finetuned_model"}


def test_the_table_in_the_docs_is_what_was_found(finished):
    assert table(finished) in PAGE.read_text()


def test_run_with_verify_makes_everything_damaged_again_with_the_same_bytes(finished):
    try:
        for place, kind in enumerate(finished.kinds):
            if kind.asset and kind.pattern not in RECORDS:
                data = kind.file.read_bytes()
                if place % 3:
                    kind.file.write_bytes(data[: len(data) // 2] if place % 3 == 1 else b"")
                else:
                    kind.file.unlink()
        assert kept_or_repaired(finished) == []
    finally:
        finished.restore()


def test_any_run_mends_damaged_and_lost_records_of_artifacts(finished):
    try:
        for place, kind in enumerate(kind for kind in finished.kinds if kind.pattern in RECORDS):
            if place % 2:
                kind.file.write_bytes(kind.file.read_bytes()[:-9])
            else:
                kind.file.unlink()
        (finished.root / LEDGER_FILE).unlink()
        finished.run()
        assert not finished.differences()
    finally:
        finished.restore()


def test_a_damaged_ledger_stops_a_run_until_it_is_deleted(finished):
    pool_files = finished.root / LEDGER_FILE
    with damaged(pool_files, "truncated"), pytest.raises(CorruptArtifactError, match="delete it"):
        finished.run()


def test_a_full_disk_is_a_storage_error_for_every_asset(finished):
    full = set()
    for place, step in enumerate(finished.steps.values()):
        with full_disk([0, 300][place % 2]):
            error = finished.read_by(step)
        if error is not None:
            assert isinstance(error, StorageError), f"{step.name}: {error}"
            assert re.search(r"free space(.|\n)*what is finished is kept", str(error))
            full.add(step.asset)
    assert full >= {"instruction_pool", "warmup_checkpoints", "train_gradients", "eval_results"}


def test_a_run_on_a_full_disk_leaves_what_was_finished_and_goes_on_once_there_is_room(finished):
    stored = finished.lineage.folder("influence_scores", "sums")
    stored.discard()
    try:
        with full_disk(1000), pytest.raises(StorageError):
            finished.run(Request(until="influence_scores"))
        assert not stored.exists()
        finished.run(Request(until="influence_scores"))
        assert not finished.differences()
    finally:
        finished.restore()
