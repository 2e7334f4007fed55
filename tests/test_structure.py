"""The directions of imports: who may know whom. ``ROOMS`` is the order."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sparserefine

ROOT = Path(sparserefine.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
ROOMS = (
    *("commands", "studies", "inference", "training", "data", "scores"),
    *("loading", "refiner", "capture", "storage", "stages", "bases"),
    *("engines", "sparse", "images", "files", "machine"),
)
"""From top to bottom: a room, a folder or a file, imports from itself and from rooms below it."""
EXEMPT = ("__init__", "__main__")
"""Of the package itself: they may import from every room."""
OPTIONAL = {
    *("torchvision", "timm", "segmentation_models_pytorch"),
    *("transformers", "onnx", "onnxruntime", "openvino", "matplotlib", "rasterio"),
}


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Absolute names that a file imports: ``{"torch.nn", "sparserefine.sparse.plan.Plan"}``.

    Args:
        path: a Python file.
        at_import: only what runs when the module is imported: not in functions, not under ``if TYPE_CHECKING``.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def file_of(name: str) -> str | None:
    """The file that an absolute name leads to, by its name in ``FILES``; ``None``: no file of ours, or the package."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):
        path = "/".join(parts[1:end])
        found = next((file for file in (path, f"{path}/__init__") if file in FILES), None)
        if parts[0] == "sparserefine" and path and found:
            return found
    return None


@cache
def arrows() -> set[tuple[str, str]]:
    """Who imports whom, file by file; imports in functions and under ``TYPE_CHECKING`` included."""
    found = {(name, file_of(target)) for name in FILES if name not in EXEMPT for target in imported(FILES[name])}
    return {(name, target) for name, target in found if target is not None and target != name}


def circles(graph: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of two and more files that reach each other."""
    ahead: dict[str, set[str]] = {}
    for name, target in graph:
        ahead.setdefault(name, set()).add(target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = ahead.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in ahead}
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def room(name: str) -> str:
    return name.split("/")[0]


def test_every_file_is_in_a_room() -> None:
    assert {room(name) for name in FILES} - set(EXEMPT) == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_from_rooms_below_only(name: str) -> None:
    place = {other: number for number, other in enumerate(ROOMS)}
    up = {(a, b) for a, b in arrows() if room(a) == name and place[room(b)] < place[name]}
    assert not up


@pytest.mark.parametrize("name", [name for name in FILES if name not in EXEMPT])
def test_nothing_is_imported_from_the_package_itself(name: str) -> None:
    """Its public names lead anywhere; inside, a name is imported from where it is."""
    short = {found for found in imported(FILES[name]) if found.startswith("sparserefine.") and not file_of(found)}
    assert short <= {"sparserefine.__version__"}


def test_training_and_inference_do_not_know_each_other() -> None:
    assert not {(a, b) for a, b in arrows() if {room(a), room(b)} == {"training", "inference"}}


def test_there_is_no_circle_of_files() -> None:
    assert circles(arrows()) == []


def test_circles_are_found() -> None:
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "f"), ("f", "e")}) == [
        ["a", "b", "c"],
        ["e", "f"],
    ]


@pytest.mark.parametrize("name", FILES)
def test_triton_is_imported_for_kernels_on_the_gpu_only(name: str) -> None:
    """It looks for drivers and compilers, which takes its time and may fail."""
    if name.startswith("engines/triton/"):
        return
    modules = imported(FILES[name], at_import=True)
    assert "triton" not in {module.split(".")[0] for module in modules}
    assert not {module for module in modules if f"{module}.".startswith("sparserefine.engines.triton.")}


@pytest.mark.parametrize("name", FILES)
def test_optional_packages_are_not_needed_to_import_anything(name: str) -> None:
    top = {module.split(".")[0] for module in imported(FILES[name], at_import=True)}
    assert not top & OPTIONAL


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_quick_and_silent() -> None:
    """No torch, and nothing printed before our own line."""
    code = "import sys, sparserefine; print(sorted({'torch', 'numpy', 'PIL', 'lightning'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_engines_are_imported_when_they_are_asked_for() -> None:
    """Without a GPU nobody asks for the kernels in Triton: not the package, not engine ``auto``."""
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: False\n"
        "from sparserefine import SparseRefiner\n"
        "from sparserefine.engines.choose import get_engine; get_engine('auto')\n"
        "print([name for name in sys.modules if name.startswith('sparserefine.engines.triton')])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize("name", sparserefine.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(sparserefine, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Refiner'"):
        _ = sparserefine.Refiner
