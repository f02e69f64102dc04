"""The rooms of the package: no circle, no import that goes up, no Dagster where it is not at home."""

from pathlib import Path

import architecture
import pytest

PACKAGE = Path(__file__).parents[1] / architecture.PACKAGE


def test_the_house_stands(capsys):
    assert architecture.main(PACKAGE) == 0, capsys.readouterr().out


PLANTED = {
    "an import that goes up": (
        {"method/loss.py": "def f():\n    from less_assets.store import files\n", "store/files.py": ""},
        "less_assets.method.loss:2 imports less_assets.store.files, and store is above method",
    ),
    "a circle of lazy imports": (
        {
            "store/files.py": "from less_assets.store.tables import read",
            "store/tables.py": "def read():\n    from less_assets.store import files\n",
        },
        "a circle: less_assets.store.files ↔ less_assets.store.tables",
    ),
    "Dagster in a step": (
        {"steps/pool.py": "import dagster as dg"},
        "less_assets.steps.pool:1 imports dagster, which steps does without",
    ),
    "a store in the mathematics": (
        {"method/loss.py": "from zarr import open_array"},
        "less_assets.method.loss:1 imports zarr, which method does without",
    ),
    "a module without a room": (
        {"misc/loss.py": "from less_assets.store import files", "store/files.py": ""},
        "less_assets.misc.loss:1 has to do with misc, which is no room",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_wrong_is_named_with_its_line(planted, tmp_path, capsys):
    files, trouble = PLANTED[planted]
    for name, source in files.items():
        path = tmp_path / architecture.PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert architecture.main(tmp_path / architecture.PACKAGE) == 1
    assert capsys.readouterr().out.splitlines()[-1] == trouble
