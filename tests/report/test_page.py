"""The page as a file: self-contained, the same for the same contents, and no text of a row is ever markup."""

import base64
import gzip
import hashlib
import html
import json
import re

import pytest

from less_assets.report.contents import Cut, ReportContents
from less_assets.report.page import ROWS_OF_A_PACKAGE, render_page

HOSTILE = "</script><script>alert(1)</script> {{packages}} <!-- \u2028 javascript:x"


def contents(rows: int = 3, cut: Cut | None = None) -> ReportContents:
    head = {"recipe": "less", "task": "sums", "project": "tiny", "notes": [{"text": HOSTILE, "filter": None}]}
    details = [{"messages": [["user", f"{HOSTILE} {row}"]]} for row in range(rows)]
    return ReportContents(head, {"id": [str(row) for row in range(rows)]}, details, cut, {})


def packages(page: str) -> list:
    found = re.findall(r'<script type="application/octet-stream" class="package">([^<]*)</script>', page)
    return [json.loads(gzip.decompress(base64.b64decode(text))) for text in found]


def test_text_travels_packed_and_comes_out_whole():
    page = render_page(contents(rows=ROWS_OF_A_PACKAGE + 2)).decode()
    first, second = packages(page)
    assert (len(first), len(second)) == (ROWS_OF_A_PACKAGE, 2)
    assert second[1]["messages"] == [["user", f"{HOSTILE} {ROWS_OF_A_PACKAGE + 1}"]]
    assert "alert(1)" not in page
    assert not re.search(r"\{\{\w+\}\}", page)


def test_the_policy_allows_just_the_pages_own_script_and_style():
    page = render_page(contents()).decode()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for text in (script, style):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"""\sstyle=|\son\w+=|(?:src|href)=["'](?!#)""", page)


def test_equal_contents_are_equal_bytes():
    cut = Cut([-0.1, 0.0, 0.1], [5, 2], 0.0, (-0.02, 0.02), "influence", "rows of the pool")
    assert render_page(contents(cut=cut)) == render_page(contents(cut=cut))
    assert render_page(contents()) != render_page(contents(rows=2))


def test_the_cut_is_said_in_words_as_well():
    cut = Cut([-0.1, 0.0, 0.1], [1500, 2], 0.0, (-0.02, 0.02), "influence", "rows of the pool")
    page = render_page(contents(cut=cut)).decode()
    assert "Influence of 1,502 rows of the pool. The line is the cut; 2 are at or above it." in page
    assert "shaded band" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize("name", ["page.html", "page.css", "page.js"])
def test_the_files_of_the_page_are_part_of_the_package(name):
    import tomllib
    from fnmatch import fnmatch
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["less_assets"]
    assert any(fnmatch(f"report/{name}", pattern) for pattern in patterns)
    assert (root / "less_assets/report" / name).is_file()
