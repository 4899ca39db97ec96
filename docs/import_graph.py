"""Draw the packages of plmtune and the imports between them: ``python docs/import_graph.py`` writes docs/packages.svg.

Each package stands above those it imports. An import that follows from two others (cli imports data, data imports io)
is not drawn, nor are the modules that every package may import. ``tests/test_imports.py`` reads the same imports and
compares them with a table of the allowed imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = tuple(sorted([*(ROOT / "plmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]))
BOX, GAP, ROW = (104, 26), 40, 74  # pixels
HIDDEN = {"__main__", "dtypes", "errors", "extras", "ranges", "units"}  # not drawn


def module_of(path: Path) -> str:
    """plmtune/io/hub.py -> plmtune.io.hub"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> frozenset[str]:
    """Names of all modules that a file imports, at any depth; a submodule of ours that ``from`` names counts as one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & _ours()
            # `from plmtune.io import hub` imports hub; the package's own file only where a name is not a module.
            found |= modules if len(modules) == len(node.names) else modules | {node.module}
    return frozenset(found)


@cache
def _ours() -> frozenset[str]:
    return frozenset(map(module_of, SOURCES))


def package_of(module: str) -> str | None:
    """plmtune.io.hub -> io; recipes.sft -> recipes; None for a module that is not ours."""
    parts = module.split(".")
    if parts[0] == "recipes":
        return "recipes"
    return (parts[1] if len(parts) > 1 else "plmtune") if parts[0] == "plmtune" else None


def package_imports() -> dict[str, set[str]]:
    """Package: the other packages that its files import. A file beside the packages counts as one."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        package = package_of(module_of(path)) or ""
        graph.setdefault(package, set()).update(filter(None, map(package_of, imports(path))))
    return {package: others - {package} for package, others in graph.items()}


def find_cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One cycle of a graph, first node repeated at its end; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if cycle := visit(other, [*path, node]):
                    return cycle
            done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def depths(graph: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Package: 0 if none imports it, else one more than the deepest that does."""
    importers = {package: [other for other, held in graph.items() if package in held] for package in graph}
    depth: dict[str, int] = {}
    while len(depth) < len(graph):
        for package, above in importers.items():
            if package not in depth and all(other in depth for other in above):
                depth[package] = max((depth[other] + 1 for other in above), default=0)
    return depth


def draw(graph: Mapping[str, set[str]]) -> str:
    """SVG of a graph without cycles: imports point down."""
    graph = {package: others - HIDDEN for package, others in graph.items() if package not in HIDDEN}
    depth = depths(graph)
    below: dict[str, set[str]] = {}
    for package in sorted(graph, key=depth.__getitem__, reverse=True):
        below[package] = graph[package].union(*(below[other] for other in graph[package]))
    arrows = {
        package: [o for o in sorted(others) if not any(o in below[between] for between in others - {o})]
        for package, others in graph.items()
    }
    rows = [sorted(p for p in graph if depth[p] == level) for level in range(max(depth.values()) + 1)]
    width = max(map(len, rows)) * (BOX[0] + GAP) + BOX[0]
    middle: dict[str, float] = {}
    for level, row in enumerate(rows):  # each below the middle of those that point at it
        above = {p: [middle[other] for other in middle if p in arrows[other]] for p in row}
        row.sort(key=lambda p: (sum(above[p]) / max(len(above[p]), 1), p))
        # Rows are set off from each other, so that an arrow past a row goes between its boxes.
        left = (width - len(row) * (BOX[0] + GAP) + GAP) / 2 + (BOX[0] + GAP) / 4 * (-1) ** level
        middle |= {p: left + place * (BOX[0] + GAP) + BOX[0] / 2 for place, p in enumerate(row)}
    lines, boxes = [], []
    for package in sorted(graph):
        x, y = middle[package], GAP + depth[package] * ROW
        for other in arrows[package]:
            to = GAP + depth[other] * ROW - 3
            lines.append(f'<path d="M{x:.0f} {y + BOX[1]} L{middle[other]:.0f} {to}"/>')
        boxes.append(
            f'<rect x="{x - BOX[0] / 2:.0f}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="4"/>'
            f'<text x="{x:.0f}" y="{y + 17}">{package}</text>'
        )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {GAP + len(rows) * ROW}">',
        "<title>The packages of plmtune; an arrow points at what is imported</title>",
        "<style>rect{fill:#eef2ff;stroke:#4a5a9a} text{font:13px sans-serif;text-anchor:middle;fill:#111}",
        "path{stroke:#8a93b5;stroke-width:1.2;marker-end:url(#arrow);fill:none}</style>",
        '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" style="fill:#8a93b5;stroke:none"/></marker>',
        *lines,
        *boxes,
        "</svg>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    found = package_imports()
    if cycle := find_cycle(found):
        sys.exit(f"packages import each other: {' -> '.join(cycle)}")
    (ROOT / "docs" / "packages.svg").write_text(draw(found), encoding="utf-8")
