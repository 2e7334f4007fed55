"""``sparserefine recipes``: configurations that come with the package, to train with or to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

FOLDER = Path(__file__).parents[1] / "assets" / "recipes"
"""One file for each recipe. Its first line, a comment, says what it is."""


def add_arguments(parser: ArgumentParser) -> None:
    """Show, and the name of a recipe."""
    parser.usage = f"{parser.prog} [show NAME]"
    parser.add_argument("action", nargs="?", choices=("show",), help="print a recipe, to save and to change")
    parser.add_argument("name", nargs="?", help="name of the recipe; without it, all are listed")


def run(arguments: Namespace) -> int:
    """Lists the recipes, or prints one."""
    if arguments.action is None:
        names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        width = max(map(len, names))
        for name in names:
            print(f"{name:<{width}}  {_text(name).partition(chr(10))[0].removeprefix('# ')}")
        print("\n`sparserefine recipes show NAME > mine.yaml` copies one; `sparserefine train NAME` uses it as it is.")
        return 0
    if arguments.name is None:
        raise ValueError("recipes show: which one? `sparserefine recipes` lists them")
    if not is_recipe(arguments.name):
        raise ValueError(f"no recipe {arguments.name!r}; `sparserefine recipes` lists them")
    print(_text(arguments.name), end="")
    return 0


def is_recipe(name: str) -> bool:
    """Whether a recipe has this name."""
    return name.isidentifier() and recipe(name).is_file()


def recipe(name: str) -> Path:
    """The file of the recipe called ``name``."""
    return FOLDER / f"{name}.yaml"


def _text(name: str) -> str:
    return recipe(name).read_text(encoding="utf-8")
