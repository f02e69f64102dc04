"""The table of simulated worlds in the documentation is the stored result, and keeps what the page promises."""

import json
from pathlib import Path

from benchmarks.certificate import RESULT, WORLDS, as_markdown

PAGE = Path(__file__).parents[1] / "docs/fidelity.md"


def test_the_page_has_the_stored_table():
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    assert results.keys() == WORLDS.keys()
    assert as_markdown(results) in PAGE.read_text(encoding="utf-8"), (
        "copy what benchmarks.certificate.as_markdown gives"
    )
    assert min(figures["right"] for figures in results.values()) >= 0.93
    assert max(abs(figures["bias"]) for figures in results.values()) <= 0.04
