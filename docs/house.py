"""Draws the house, the folder tree of CONTRIBUTING.md: `python docs/house.py` writes it there anew.

A package or room is described by the first line of its `__init__.py`, rooms in the order of the import contract; all
other folders by `FOLDERS`.
"""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "pipeline": "models in, verified artifacts out",
    "pipeline/recipes": "Example recipes and their loaders; not in the wheel.",
    "targets": "devices and the way to them",
    "targets/devices": "An example inventory; not in the wheel.",
    "benchmarks": "measuring, judging, reporting",
    "benchmarks/suites": "Example suites; not in the wheel.",
    "benchmarks/studies": "Studies of published models, and what trains their specialists; not in the wheel.",
    "benchmarks/baselines": "Figures that the docs quote, each beside the script that makes it.",
    "tests": "every test; a test stands where what it tests stands",
    "tests/unit": "One room after the other: unit/<package>/<room>/.",
    "tests/contract": "One suite for every implementation of a seam: exporters, transports, meters, runners.",
    "tests/flow": "Whole commands, in their own processes.",
    "tests/golden": "Plans and merges that must stay bit-identical.",
    "tests/files": "What earlier releases wrote, still to be read.",
    "tests/house": "The rules of this page, and the documents.",
    "tests/twin": "Emulated devices.",
    "tests/system": "Virtual machines, container images, every fault.",
    "examples": "Python that a reader can run as it is",
    "docs": "these pages, and what Sphinx needs to build them",
    "docker": "images of the host, an emulated board, the kit builder",
}
_WIDTH = 26


def list_packages(top: Path) -> list[Path]:
    """The packages in a folder."""
    return sorted(path.parent for path in top.glob("*/__init__.py"))


def list_rooms(package: Path) -> list[Path]:
    """A package's rooms and the rooms inside them, the ones that import least first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers: list[str] = next((one["layers"] for one in contracts if one.get("containers") == [package.name]), [])
    order = [room for layer in reversed(layers) for room in re.split(r"\W+", layer)]
    rooms = (path.parent for path in package.rglob("__init__.py") if path.parent != package)
    return sorted(rooms, key=lambda room: (order.index(room.relative_to(package).parts[0]), room))


def describe(folder: Path) -> str:
    """The first line of a package's or room's docstring."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return docstring.partition("\n")[0]


def draw() -> str:
    """The tree: every folder with its line."""
    lines: list[tuple[int, str, str]] = []
    for name, what in FOLDERS.items():
        lines.append((name.count("/"), Path(name).name, what))
        for package in list_packages(ROOT / name):
            lines.append((1, package.name, describe(package)))
            rooms = list_rooms(package)
            lines += [(1 + len(room.relative_to(package).parts), room.name, describe(room)) for room in rooms]
    return "\n".join(f"{'  ' * depth + name + '/':{_WIDTH}}{what}" for depth, name, what in lines)


def place(text: str) -> str:
    """A document with today's tree between the fences of its block `text` under "The house"."""
    return re.sub(r"(## The house\n.*?```text\n).*?(\n```)", lambda at: at[1] + draw() + at[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    document = ROOT / "CONTRIBUTING.md"
    document.write_text(place(document.read_text()))
