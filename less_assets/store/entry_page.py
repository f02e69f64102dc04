"""A page at an address that stays, which leads to the HTML file of the artifact in force beside it.

Belongs here: that page. Not here: what the HTML file shows.
"""

import base64
import hashlib

from less_assets.store.artifacts import ArtifactStore
from less_assets.store.files import write_atomically

ENTRY_NAME = "index.html"
_SCRIPT = 'location.replace(document.querySelector("a").getAttribute("href") + location.hash)'


def write_entry_page(store: ArtifactStore, key: str, fingerprint: str, file: str) -> None:
    """Write `<key>/index.html`; what follows `#` in its address is passed on.

    Args:
        store: Where the artifact lies.
        key: Its folder.
        fingerprint: Folder of the artifact in force, below `key`.
        file: Name of an HTML file in it.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Selection report</title>'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'sha256-{digest}'\">"
        f'<a href="{fingerprint}/{file}">the report that is up to date</a><script>{_SCRIPT}</script></html>\n'
    )
    write_atomically(store.root / key / ENTRY_NAME, page.encode())
