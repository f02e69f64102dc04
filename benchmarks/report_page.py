"""How fast the selection report opens and searches in a browser, at 13,500 selected rows (5 % of the paper's pool).

Rows are real where a pool is given (`--pool`, JSON lines with `messages` or another known format), else made up;
scores, neighbours and token shares are random numbers, for only their amount matters here. Opening is the time from
navigation to the first drawn rows; a search is the time from the keystroke to the redrawn list, over whole
conversations.

    python benchmarks/report_page.py --pool 'data/*.jsonl'

Needs Debian's chromium and the package playwright. Prints a table and writes `benchmarks/results/report_page.json`.
"""

import argparse
import glob
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from less_assets.method.data.conversations import example_id
from less_assets.method.data.examples import read_rows
from less_assets.report.comparison import CHARACTERS, ROWS_OF_ALL, ROWS_OF_ONE
from less_assets.report.contents import Cut, ReportContents
from less_assets.report.page import render_page
from less_assets.report.row_details import ID_CHARACTERS, MANY_CHARACTERS

ROWS, CONTEXT, TOKEN_ROWS, SUBTASKS, CHECKPOINTS, TARGETS = 13_500, 50, 100, 27, 4, 81
OTHERS = ROWS_OF_ALL // ROWS_OF_ONE
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SEARCHES = ["explain why", "python", "the capital of france", "no such words anywhere", "e"]
RESULTS = Path(__file__).parent / "results" / "report_page.json"


def conversations(pattern: str | None, count: int) -> list[tuple[str, list]]:
    """(source, messages) of so many rows, over again where there are fewer."""
    found: list[tuple[str, list]] = []
    for path in sorted(glob.glob(pattern)) if pattern else []:
        for table in read_rows(path, Path(path).stem):
            usable = table.filter(table["status"] == "ok")
            found += [
                (Path(path).stem, [(turn["role"], turn["content"]) for turn in row]) for row in usable["messages"]
            ]
    rng = random.Random(0)
    if not found:
        words = [f"word{number}" for number in range(3000)]
        found = [
            (
                "made-up",
                [("user", " ".join(rng.choices(words, k=40))), ("assistant", " ".join(rng.choices(words, k=90)))],
            )
            for _ in range(count)
        ]
    rng.shuffle(found)
    return [found[place % len(found)] for place in range(count)]


def contents(pattern: str | None) -> ReportContents:
    """A page's contents of the size that a selection of 5 % of the paper's pool has."""
    rng = random.Random(1)

    def score() -> float:
        return float(f"{rng.gauss(0.02, 0.02):.3g}")

    rows = conversations(pattern, ROWS + 2 * CONTEXT)
    groups = ["selected"] * ROWS + ["below_cut"] * CONTEXT + ["most_negative"] * CONTEXT
    details = []
    for place, (source, turns) in enumerate(rows):
        detail = {
            "messages": [list(turn) for turn in turns],
            "file": f"data/{source}.jsonl",
            "line": place + 1,
            "shard": f"{source}-00000",
            "row": place,
            "copies": 1,
            "also": [],
            "subtasks": [score() for _ in range(SUBTASKS)],
            "checkpoints": [score() for _ in range(CHECKPOINTS)],
            "targets": [[rng.randrange(TARGETS), score()] for _ in range(3)],
            "near": [_neighbour(rng, rows, number) for number in range(3)],
        }
        if place < TOKEN_ROWS:
            words = turns[-1][1].split(" ")
            shares = [[len(turns) - 1, [f"{word} " for word in words], [score() for _ in words]]]
            detail["heat"] = {"turns": shares, "momentum": 0.0, "influence": 0.1, "cut": False}
        details.append(detail)
    labels = [f"subtask-{number}" for number in range(SUBTASKS)]
    count = len(rows)
    sources = sorted({source for source, _ in rows})
    columns = {
        "id": [
            example_id(
                [{"role": role, "content": text} for role, text in turns] + [{"role": str(place), "content": ""}]
            )
            for place, (_, turns) in enumerate(rows)
        ],
        "group": groups,
        "rank": list(range(1, count + 1)),
        "score": [score() for _ in range(count)],
        "subtask": [rng.choice(labels) for _ in range(count)],
        "source": [source for source, _ in rows],
        "tokens": [rng.randrange(1, 800) for _ in range(count)],
        "length": [rng.choice(["1–16", "17–32", "33–64"]) for _ in range(count)],
        "turns": [len(turns) // 2 for _, turns in rows],
        "turn_class": [rng.choice(["1", "2"]) for _ in range(count)],
        "certain": [rng.random() < 0.8 for _ in range(count)],
        "duplicate": [rng.random() for _ in range(count)],
        "heat": [place < TOKEN_ROWS for place in range(count)],
    }
    target = {
        "subtask": labels[0],
        "messages": [["user", "Question? " * 40]],
        "prefix": "",
        "completion": "Answer. " * 60,
    }
    head = {
        "project": "benchmark", "task": "bbh", "recipe": "less", "settings": [["strategy", "less"]], "scored": True,
        "exact": False, "certificate": None, "near_duplicate": 0.9, "notes": [], "subtasks": labels,
        "overlap": [{"recipe": f"other-{place}", "rows": ROWS, "shared": 0, "expected": 0} for place in range(OTHERS)],
        "turns": labels, "tasks": ["bbh"], "excluded": [],
        "counts": {"selected": ROWS, "pool": 20 * ROWS, "tokens": 100 * ROWS, "estimated": False, "certain": None},
        "checkpoints": [{"name": f"epoch-{number}", "weight": 0.25} for number in range(1, CHECKPOINTS + 1)],
        "cuts": dict.fromkeys(labels, 0.02), "targets": [target] * TARGETS, "inputs": {},
        "composition": [{"name": "source", "title": "Source", "classes": [[name, 10, 20] for name in sources]}],
    }  # fmt: skip
    others = [_other(rows, number) for number in range(OTHERS)]
    edges = [place / 100 for place in range(-30, 31)]
    return ReportContents(
        head, columns, details, Cut(edges, [7] * 60, 0.0, None, "influence", "rows of the pool"), {}, others
    )


def _other(rows: list, number: int) -> dict:
    """What the page has of another recipe: the most that `comparison.py` puts there."""
    shown = [
        [f"{place:032x}", place, 0.5, turns[0][1][:CHARACTERS], turns[-1][1][:CHARACTERS]]
        for place, (_, turns) in enumerate(rows[number * ROWS_OF_ONE : (number + 1) * ROWS_OF_ONE])
    ]
    return {"recipe": f"other-{number}", "sources": [], "alone": ROWS, "rows": shown}


def _neighbour(rng: random.Random, rows: list, number: int) -> dict:
    """A neighbour as `contents.py` writes it for a page of many rows, none of them in the page itself."""
    (role, text), *_ = rng.choice(rows)[1]
    beginning = [[role, text[:MANY_CHARACTERS]]] if number == 0 else None
    name = f"{rng.getrandbits(4 * ID_CHARACTERS):0{ID_CHARACTERS}x}"
    return {"id": name, "cosine": 0.5, "place": None, "messages": beginning}


def main() -> None:
    """Make the page, open it several times, search in it, and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--pool", help="pattern of pool files with real rows")
    arguments.add_argument("--rounds", type=int, default=7)
    chosen = arguments.parse_args()
    from playwright.sync_api import sync_playwright

    started = time.monotonic()
    page_bytes = render_page(contents(chosen.pool))
    made = time.monotonic() - started
    opened, unpacked = [], []
    searches: dict[str, list[float]] = {words: [] for words in SEARCHES}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        file.write_bytes(page_bytes)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for _ in range(chosen.rounds):
            page = browser.new_page(viewport={"width": 1360, "height": 900})
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-unpacked]", timeout=120_000)
            # The page's own clock, which starts with the navigation: the test driver's polling is not measured.
            marks = dict(page.evaluate("performance.getEntriesByType('mark').map(mark => [mark.name, mark.startTime])"))
            opened.append(marks["rows drawn"])
            unpacked.append(marks["texts unpacked"])
            for words in SEARCHES:
                searches[words].append(
                    page.evaluate(
                        """async words => {
                          const field = document.querySelector('#search');
                          field.value = words;
                          const drawn = () => performance.getEntriesByName('rows drawn');
                          performance.clearMarks('rows drawn');
                          const start = performance.now();
                          field.dispatchEvent(new Event('input'));
                          while (!drawn().length) await new Promise(requestAnimationFrame);
                          return drawn()[0].startTime - start;
                        }""",
                        words,
                    )
                )
            page.close()
        browser.close()
    result = {
        "rows": ROWS,
        "real_rows": bool(chosen.pool),
        "megabytes": round(len(page_bytes) / 1e6, 2),
        "seconds_to_make": round(made, 1),
        "open_ms": round(statistics.median(opened)),
        "open_ms_worst": round(max(opened)),
        "texts_ready_ms": round(statistics.median(unpacked)),
        "search_ms": round(statistics.median([each for found in searches.values() for each in found])),
        "search_ms_worst": round(max(each for found in searches.values() for each in found)),
        "rounds": chosen.rounds,
    }
    for name, value in result.items():
        print(f"{name:<18}{value}")
    print("\nopen_ms: navigation to first rows; texts_ready_ms: search covers whole conversations from then on;")
    print("search_ms: keystroke to redrawn list, 60 ms of it waiting for the next keystroke.")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
