"""The rooms of `less_assets`, what each imports, and whether the house stands: `python -m tests.architecture`.

Belongs here: reading imports from the source, lazy ones and those for type checkers included, and judging them.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx

PACKAGE = "less_assets"
FLOORS = (
    "openmp",
    "errors",
    "method",
    "store",
    "project",
    "lineage",
    "compute",
    "reading",
    "report",
    "steps",
    "orchestration",
    "running",
    "planning",
    "inspection",
    "api",
    "demo",
    "cli",
)
"""Rooms from the ground up: each imports from those before it, and from itself."""
DAGSTER_ROOMS = ("orchestration", "running", "cli")
"""Where Dagster may be imported; the command line opens an instance and hands it on."""
METHOD_BANS = ("dagster", "zarr", "ray")
"""What the mathematics does without: it knows neither orchestration nor where things are kept."""
STEP_BANS = ("dagster", "ray")


@dataclass(frozen=True)
class Import:
    """One import statement: the module that has it, its line, and the module imported."""

    importer: str
    line: int
    imported: str


def read_imports(root: Path) -> tuple[set[str], list[Import]]:
    """The modules of a package and all their imports.

    Args:
        root: The package's folder.
    """
    modules = {_module(root, path): path for path in sorted(root.rglob("*.py"))}
    imports = [read for module, path in modules.items() for read in _imports(module, path, set(modules))]
    return set(modules), imports


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(module: str, path: Path, modules: set[str]) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(module, node.lineno, inner if inner in modules else node.module)


def room(module: str) -> str:
    """The room of a module of the package; the package itself belongs to none: ""."""
    return module.split(".")[1] if "." in module else ""


def upward(imports: list[Import]) -> list[str]:
    """Imports of a room from one above it, as sentences."""
    floor = {name: number for number, name in enumerate(FLOORS)}
    troubles = []
    for read in imports:
        above, below = room(read.importer), room(read.imported)
        if not read.imported.startswith(f"{PACKAGE}.") or not above:
            continue
        unknown = [name for name in (above, below) if name not in floor]
        if unknown:
            troubles.append(f"{read.importer}:{read.line} has to do with {unknown[0]}, which is no room")
        elif floor[below] > floor[above]:
            troubles.append(f"{read.importer}:{read.line} imports {read.imported}, and {below} is above {above}")
    return troubles


def misplaced(imports: list[Import]) -> list[str]:
    """Imports of libraries in rooms that do without them, as sentences."""
    troubles = []
    for read in imports:
        library, where = read.imported.split(".")[0], room(read.importer)
        banned = library == "dagster" and where not in DAGSTER_ROOMS
        banned |= where == "method" and library in METHOD_BANS
        banned |= where == "steps" and library in STEP_BANS
        if banned:
            troubles.append(f"{read.importer}:{read.line} imports {library}, which {where} does without")
    return troubles


def circles(modules: set[str], imports: list[Import]) -> list[list[str]]:
    """Modules that import each other in a circle, each circle once."""
    graph = networkx.DiGraph((read.importer, read.imported) for read in imports if read.imported in modules)
    return sorted(sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1)


def table(modules: set[str], imports: list[Import]) -> str:
    """The rooms from the ground up: modules, and imports from each other room."""
    sizes = Counter(map(room, modules))
    between = Counter(
        (room(read.importer), room(read.imported))
        for read in imports
        if read.imported in modules and room(read.importer) != room(read.imported)
    )
    lines = []
    for name in FLOORS:
        below = [f"{other} {between[name, other]}" for other in FLOORS if between[name, other]]
        if sizes[name]:
            lines.append(f"{name:<14}{sizes[name]:>4} modules   imports from {', '.join(below) or 'no other room'}")
    return "\n".join(lines)


def main(root: Path) -> int:
    """Print the rooms and every trouble; the number of troubles is the exit status.

    Args:
        root: The package's folder.
    """
    modules, imports = read_imports(root)
    print(table(modules, imports))
    found = circles(modules, imports)
    troubles = [*upward(imports), *misplaced(imports), *(f"a circle: {' ↔ '.join(circle)}" for circle in found)]
    print(f"\n{len(found)} circles, {len(troubles) - len(found)} imports that go up or are misplaced")
    print(*troubles, sep="\n")
    return min(len(troubles), 1)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[1] / PACKAGE))
