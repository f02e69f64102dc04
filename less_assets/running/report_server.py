"""The web page that shows a project's reports while `less-assets dev` runs, so that links of Dagster's UI lead to them.

Belongs here: which files it shows, to whom, and at which address. Not here: what a report says (`report/`), which links
there are (`orchestration/ui_metadata.py`).

It listens on this machine alone, reads only, and shows reports and nothing else: an address is taken apart and has to
have the form of a report's, it is never joined to a folder as it came.
"""

import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote, unquote, urlsplit

from less_assets.errors import LessAssetsError
from less_assets.project.project import Project
from less_assets.reading.files import REPORT
from less_assets.steps.registry import ASSETS
from less_assets.store.artifacts import ArtifactStore
from less_assets.store.entry_page import ENTRY_NAME
from less_assets.store.files import local_path

HOST = "127.0.0.1"
DEFAULT_PORT = 3001
URL_VARIABLE = "LESS_REPORTS_URL"
"""By it the server tells the code location, which Dagster loads in processes of its own, where the reports are."""
ADDRESS_FILE = "less-assets-reports.json"
"""In Dagster's home: the port of the last server, for links that runs without a server write."""
FINGERPRINT = re.compile(r"[0-9a-f]{32}")
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Pages have a stricter policy of their own, which names their one script by its hash."""


def reports_url(project: Project, store: ArtifactStore, home: Path) -> str | None:
    """Where the links of this project's materializations lead, whether or not a server runs just now.

    Args:
        project: The project.
        store: Its artifacts.
        home: Dagster's home, which remembers the port of the last server.

    Returns:
        An address without a slash at its end; None if the artifacts are in a bucket, which no server shows.
    """
    if local_path(store.root) is None:
        return None
    try:
        port = int(json.loads((home / ADDRESS_FILE).read_text())["port"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        port = DEFAULT_PORT
    return _url(project, port)


@contextmanager
def reports_served(project: Project, store: ArtifactStore, home: Path, port: int) -> Iterator[str | None]:
    """Serve the reports in a thread, as long as the block lasts.

    Args:
        project: The project.
        store: Its artifacts.
        home: Dagster's home; the port is written down there.
        port: Port on this machine; 0: any that is free.

    Yields:
        The address; None if the artifacts are in a bucket.

    Raises:
        LessAssetsError: The port is in use.
    """
    root = local_path(store.root)
    if root is None:
        yield None
        return
    try:
        server = ReportServer(project, root, port)
    except OSError as error:
        raise LessAssetsError(
            f"The page of the reports cannot listen on port {port}: {error.strerror}.",
            where=f"{HOST}:{port}",
            fix="name another port with --reports-port",
        ) from error
    with server:
        (home / ADDRESS_FILE).write_text(json.dumps({"port": server.server_port}) + "\n")
        thread = Thread(target=server.serve_forever, name="reports", daemon=True)
        thread.start()
        try:
            yield _url(project, server.server_port)
        finally:
            server.shutdown()
            thread.join()


def _url(project: Project, port: int) -> str:
    # The name tells two projects apart that have used the same port one after the other.
    return f"http://{HOST}:{port}/{quote(project.name, safe='')}"


class ReportServer(ThreadingHTTPServer):
    """Shows the reports below a storage root.

    Args:
        project: The project; its name is the first part of every address.
        root: Root of its artifacts.
        port: Port on this machine; 0: any that is free.
    """

    def __init__(self, project: Project, root: Path, port: int) -> None:
        self.project, self.root = project, root
        super().__init__((HOST, port), _Handler)

    def page(self, path: str) -> tuple[HTTPStatus, bytes | Path]:
        """What is shown at an address: a page, or the file that holds it.

        Args:
            path: Path of the address as the browser sent it.
        """
        first, *parts = [unquote(part) for part in path.removeprefix("/").split("/")]
        if first in ("", self.project.name) and parts in ([], [""]):
            return HTTPStatus.OK, self._list()
        if first != self.project.name:
            return HTTPStatus.NOT_FOUND, _page(f"This is the page of {self.project.name}'s reports.", "")
        keys, rest = _keys(parts)
        is_page = rest == [ENTRY_NAME] or (len(rest) == 2 and FINGERPRINT.fullmatch(rest[0]) and rest[1] == REPORT)
        if keys is None or not is_page:
            return HTTPStatus.NOT_FOUND, _page("There is no such page.", "")
        file = self.root.joinpath(*parts)
        if file.is_file() and file.resolve().is_relative_to(self.root.resolve()):
            return HTTPStatus.OK, file
        command = ["less-assets", "run", "--until", "selection_report", "--project", str(self.project.path)]
        command += ["--task", keys["task"], "--recipe", keys["recipe"]]
        return HTTPStatus.NOT_FOUND, _page(
            f"The report of {keys['recipe']} for {keys['task']} is not made yet.",
            f"<p>Materialize <code>selection_report</code>, or:</p><pre>{html.escape(shlex.join(command))}</pre>",
        )

    def _list(self) -> bytes:
        links = []
        for file in sorted(self.root.glob(f"{_folder('*', '*')}/{ENTRY_NAME}")):
            parts = file.relative_to(self.root).parts
            keys, _ = _keys(list(parts))
            assert keys is not None
            address = "/".join(quote(part, safe="") for part in (self.project.name, *parts))
            links.append(f'<li><a href="/{address}">{html.escape(keys["recipe"])} for {html.escape(keys["task"])}</a>')
        return _page(f"Reports of {self.project.name}", f"<ul>{''.join(links)}</ul>" if links else "<p>None yet.</p>")


def _folder(recipe: str, task: str) -> str:
    return ASSETS["selection_report"].folder.format(recipe=recipe, task=task)


def _keys(parts: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """Recipe and task of a report's address, and what follows its folder; None if it is no report's."""
    form = _folder("{recipe}", "{task}").split("/")
    keys = {}
    for wanted, part in zip(form, parts, strict=False):
        if part in ("", ".", "..") or any(character in part for character in "/\\\0"):
            return None, []
        if wanted.startswith("{"):
            keys[wanted.strip("{}")] = part
        elif part != wanted:
            return None, []
    return (keys if len(parts) > len(form) else None), parts[len(form) :]


def _page(title: str, body: str) -> bytes:
    """A plain page; the title is text, the body HTML."""
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:16px system-ui;margin:3em auto;max-width:40em;padding:0 1em;color-scheme:light dark}"
        f"pre{{white-space:pre-wrap}}</style><h1>{title}</h1>{body}</html>\n"
    ).encode()


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer with a page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers of a page."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        # Another web site may have its name resolve to this machine; the browser then still sends that name.
        page: bytes | Path
        if self.headers.get("Host") not in {f"{host}:{self.server.server_port}" for host in (HOST, "localhost")}:
            status, page = HTTPStatus.FORBIDDEN, _page("This page is for this machine only.", "")
        else:
            status, page = self.server.page(urlsplit(self.path).path)
        size = page.stat().st_size if isinstance(page, Path) else len(page)
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        if isinstance(page, bytes):
            self.wfile.write(page)
            return
        with page.open("rb") as stream:
            shutil.copyfileobj(stream, self.wfile)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the terminal is Dagster's."""
