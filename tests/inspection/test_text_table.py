"""Tables as plain text: whatever stands in a cell stands in the output, once and whole."""

import pytest

from less_assets.inspection.text_table import text_table


def test_columns_are_as_wide_as_their_widest_cell():
    shown = text_table([("a", "1", "why"), ("long name", "12,345", "")], ["asset", "rows", "note"], right_aligned=[1])
    assert shown.splitlines() == ["asset        rows  note", "a               1  why", "long name  12,345"]
    assert text_table([("x", "y"), ("xx", "y")], indent=2) == "  x   y\n  xx  y"


@pytest.mark.parametrize("columns", ["20", "80"])
def test_nothing_is_cut_wrapped_coloured_or_read_as_markup(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = "/a/long/path " * 40 + "end"
    cells = (path, "[0.1, 0.2]", "[bold]x[/bold]", ":smile:", "95 %")
    assert text_table([cells]) == "  ".join(cells)


def test_a_table_without_rows_is_its_headings():
    assert text_table([], ["a", "b"]) == "a  b"
    assert text_table([]) == ""
