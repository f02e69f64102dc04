"""The table of row formats: what it says is what the code does."""

from pathlib import Path

from benchmarks.formats import RESULT, as_markdown, table
from less_assets.method.data.row_formats import normalize
from less_assets.method.data.row_keys import HARMLESS_KEYS, UNSUPPORTED_ROW_KEYS

PAGE = Path(__file__).parents[1] / "docs/row-formats.md"


def test_documentation_and_stored_result_have_the_table_that_the_code_gives():
    expected = as_markdown(table())
    assert expected in PAGE.read_text(encoding="utf-8"), "copy the table of benchmarks/results/formats.md"
    assert expected in RESULT.read_text(encoding="utf-8"), "run `python -m benchmarks.formats`"


def test_the_page_lists_the_harmless_keys():
    text = PAGE.read_text(encoding="utf-8").split("left out without a word:")[1].split("Every other key")[0]
    assert {key.strip(" `.\n") for key in text.split(",")} == HARMLESS_KEYS


def test_no_key_is_both_harmless_and_refused():
    assert not HARMLESS_KEYS & set(UNSUPPORTED_ROW_KEYS)
    row = {"prompt": "q", "completion": "a"}
    assert normalize(row | dict.fromkeys(HARMLESS_KEYS, "x")) == normalize(row)
