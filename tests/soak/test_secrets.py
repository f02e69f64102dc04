"""Secrets are in the environment and nowhere else: every file of a finished run is searched for them."""

from support.faults import SECRETS, FinishedRun


def test_no_file_of_a_run_holds_a_secret_of_the_environment(finished: FinishedRun):
    searched = 0
    for folder in (finished.root, finished.home):
        for file in folder.rglob("*"):
            if file.is_file():
                searched += 1
                data = file.read_bytes()
                for name, secret in SECRETS.items():
                    assert secret.encode() not in data, f"{name} is in {file}"
    assert searched > 200
    assert any(finished.home.rglob("*.db")), "Dagster's records were searched, too"
    for secret in SECRETS.values():
        assert secret not in finished.said
