"""The page of the reports: it shows reports to this machine, and nothing else to anybody."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from less_assets.errors import LessAssetsError
from less_assets.project.project import Project, parse_project
from less_assets.reading.files import REPORT
from less_assets.running.report_server import ADDRESS_FILE, DEFAULT_PORT, reports_served, reports_url
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.entry_page import write_entry_page

SETTINGS = {
    "name": "tiny",
    "model": {"base": "someone/some-model"},
    "pool": {"sources": [{"name": "plus", "path": "plus.jsonl"}]},
    "tasks": [{"name": "sums", "examples": {"path": "sums.jsonl"}}],
    "recipes": [{"name": "less", "strategy": "less", "fraction": 0.1}],
}
FOLDER = "selection/sums/reports/less"
FINGERPRINT = "0123456789abcdef" * 2
PAGE = b"<!doctype html><title>a report</title>"


class Served:
    """A project with one report, and the server that shows it."""

    def __init__(self, folder: Path) -> None:
        self.project: Project = parse_project(yaml.safe_dump(SETTINGS).encode(), folder / "project.yaml")
        self.store, self.root, self.home = ArtifactStore(str(folder / "artifacts")), folder / "artifacts", folder
        (self.root / FOLDER / FINGERPRINT).mkdir(parents=True)
        (self.root / FOLDER / FINGERPRINT / REPORT).write_bytes(PAGE)
        (self.root / FOLDER / FINGERPRINT / "manifest.json").write_text("{}")
        write_entry_page(self.store, FOLDER, FINGERPRINT, REPORT)
        (folder / "secret.html").write_text("secret")

    def ask(self, path: str, method: str = "GET", host: str | None = None) -> tuple[int, http.client.HTTPMessage, str]:
        """Status, headers and body of an answer; the path goes out as it is."""
        port = json.loads((self.home / ADDRESS_FILE).read_text())["port"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, body


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    """The server on a free port, as long as the test lasts."""
    found = Served(tmp_path)
    with reports_served(found.project, found.store, found.home, 0):
        yield found


def test_a_report_and_the_address_that_stays_are_shown(served):
    status, headers, body = served.ask(f"/tiny/{FOLDER}/{FINGERPRINT}/{REPORT}")
    assert (status, body) == (200, PAGE.decode())
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, headers, body = served.ask(f"/tiny/{FOLDER}/index.html?x=1")
    assert status == 200
    assert f"{FINGERPRINT}/{REPORT}" in body
    status, headers, body = served.ask(f"/tiny/{FOLDER}/{FINGERPRINT}/{REPORT}", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(len(PAGE)), "")


@pytest.mark.parametrize("path", ["/", "/tiny", "/tiny/"])
def test_the_first_page_lists_the_reports(served, path):
    status, _, body = served.ask(path)
    assert status == 200
    assert f'href="/tiny/{FOLDER}/index.html"' in body


@pytest.mark.parametrize(
    "path",
    [
        "/secret.html",
        "/tiny/secret.html",
        "/tiny/../secret.html",
        "/tiny/%2e%2e/secret.html",
        f"/tiny/{FOLDER}/../../../../../secret.html",
        f"/tiny/{FOLDER}/..%2f..%2f..%2f..%2f..%2fsecret.html",
        "/tiny/selection/../reports/../../../secret.html",
        "/tiny/selection/%2e%2e/reports/%2e%2e/index.html",
        "/tiny/selection/a%00b/reports/less/index.html",
        "/tiny/selection/..%2f..%2fsecret.html%00/reports/less/index.html",
        f"/tiny/{FOLDER}",
        f"/tiny/{FOLDER}/",
        f"/tiny/{FOLDER}/{FINGERPRINT}/",
        f"/tiny/{FOLDER}/{FINGERPRINT}/manifest.json",
        f"/tiny/{FOLDER}/current.json",
        f"/tiny//{FOLDER}/index.html",
        "//etc/passwd",
        "/tiny//etc/passwd",
        f"/other/{FOLDER}/index.html",
    ],
)
def test_nothing_else_is_shown(served, path):
    status, _, body = served.ask(path)
    assert status == 404
    assert "secret" not in body
    assert body.startswith("<!doctype html>")


def test_a_link_in_a_reports_place_that_leads_out_is_not_followed(served):
    folder = served.root / "selection/sums/reports/random-seed0"
    folder.mkdir()
    (folder / "index.html").symlink_to(served.home / "secret.html")
    status, _, body = served.ask("/tiny/selection/sums/reports/random-seed0/index.html")
    assert status == 404
    assert body.count("secret") == 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_reads_only(served, method):
    assert served.ask(f"/tiny/{FOLDER}/index.html", method)[0] == 501


def test_a_name_of_another_site_is_refused(served):
    """A site whose name resolves to this machine would otherwise read the pages."""
    assert served.ask(f"/tiny/{FOLDER}/index.html", host="evil.example:80")[0] == 403


def test_a_report_that_is_not_made_yet_says_how_it_is_made(served):
    status, _, body = served.ask("/tiny/selection/sums/reports/%3Cb%3E/index.html")
    assert status == 404
    assert "&lt;b&gt; for sums is not made yet" in body
    assert "less-assets run --until selection_report" in body
    assert str(served.project.path) in body
    assert "<b>" not in body


def test_it_listens_on_this_machine_alone_and_ends_with_the_block(tmp_path):
    found = Served(tmp_path)
    with reports_served(found.project, found.store, found.home, 0) as url:
        assert url is not None
        port = int(url.split(":")[2].split("/")[0])
        assert url == f"http://127.0.0.1:{port}/tiny" == reports_url(found.project, found.store, found.home)
        with (
            pytest.raises(LessAssetsError, match="--reports-port"),
            reports_served(found.project, found.store, found.home, port),
        ):
            raise AssertionError("two servers on one port")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
    assert url == reports_url(found.project, found.store, found.home), "links of later runs lead to the same port"


@pytest.mark.parametrize("written", [None, "", "[]", '{"port": null}', '{"port": "x"}'])
def test_without_an_earlier_server_links_lead_to_the_usual_port(tmp_path, written):
    found = Served(tmp_path)
    if written is not None:
        (found.home / ADDRESS_FILE).write_text(written)
    assert reports_url(found.project, found.store, found.home) == f"http://127.0.0.1:{DEFAULT_PORT}/tiny"


def test_a_bucket_is_not_served_and_no_link_leads_there(tmp_path):
    found = Served(tmp_path)
    bucket = ArtifactStore("memory://somewhere")
    assert reports_url(found.project, bucket, found.home) is None
    with reports_served(found.project, bucket, found.home, 0) as url:
        assert url is None
    assert not (found.home / ADDRESS_FILE).exists()
