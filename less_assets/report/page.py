"""The page of a selection as one HTML file: template, style and script are the files beside this one.

Belongs here: putting them together safely. Not here: what the page says (`contents.py`) or does (the scripts).

Nothing on the page comes from elsewhere: a content security policy forbids every request and every script but the one
whose hash it names. Text of the pool travels as compressed JSON in base64, which holds no character that HTML knows,
and the script puts it on the page as text only. Rows are packed a few hundred together and unpacked when they are
needed, so that a page of many rows is small and opens fast.
"""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources

from less_assets.report.contents import Cut, ReportContents

ROWS_OF_A_PACKAGE = 256
SCRIPTS = ("page.js", "row.js", "marking.js", "comparison.js", "start.js")
"""Parts of the page's one script, in order."""
PLOT_WIDTHS = {"wide": 660, "narrow": 270}


@cache
def _file(name: str) -> str:
    return resources.files("less_assets.report").joinpath(name).read_text(encoding="utf-8")


@cache
def page_digest() -> str:
    """Hash of everything but data that a page is made of: a changed design makes pages anew."""
    names = ("page.html", "page.css", *SCRIPTS, "page.py", "contents.py", "row_details.py", "comparison.py")
    parts = [_file(name) for name in names]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def render_page(contents: ReportContents) -> bytes:
    """One self-contained HTML page; equal contents give equal bytes.

    Args:
        contents: What it shows.
    """
    head = contents.head
    style, script = _file("page.css"), "\n".join(map(_file, SCRIPTS))
    allowed = f"script-src {_hash(script)}; style-src {_hash(style)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    packages = "\n".join(
        f'<script type="application/octet-stream" class="package">{_packed(part)}</script>'
        for part in _slices(contents.details, ROWS_OF_A_PACKAGE)
    )
    parts = {
        "{{policy}}": html.escape(policy),
        "{{title}}": html.escape(f"{head['recipe']} for {head['task']} · {head['project']}"),
        "{{style}}": style,
        "{{script}}": script,
        "{{cut}}": _cut_figure(contents.cut),
        "{{head}}": _packed({"head": head | {"rows_of_a_package": ROWS_OF_A_PACKAGE}, "columns": contents.columns}),
        "{{others}}": _packed(contents.others),
        "{{packages}}": packages,
    }
    page = _file("page.html")
    for name, text in parts.items():
        page = page.replace(name, text)
    return page.encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _packed(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone half of a surrogate pair is no character; what cannot be written is shown as "?".
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)).decode()


def _slices(values: Sequence[object], size: int) -> Iterator[Sequence[object]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _cut_figure(cut: Cut | None) -> str:
    """The histogram, for wide and for narrow windows, and what it says in words."""
    if cut is None:
        return ""
    from less_assets.report.charts import cut_histogram

    above = sum(count for edge, count in zip(cut.edges, cut.counts, strict=False) if edge >= cut.at)
    total = sum(cut.counts)
    pictures = "".join(
        f'<div class="plot {name}" aria-hidden="true">'
        + cut_histogram(cut.edges, cut.counts, cut.at, cut.band, width=width, axis=cut.axis, rows=cut.rows)
        + "</div>"
        for name, width in PLOT_WIDTHS.items()
    )
    words = (
        f"{html.escape(cut.axis.capitalize())} of {total:,} {html.escape(cut.rows)}. "
        f"The line is the cut; {above:,} are at or above it."
    )
    if cut.band is not None:
        words += " Selected rows in the shaded band are borderline."
    return f'<figure role="group" aria-label="{words}">{pictures}<figcaption>{words}</figcaption></figure>'
