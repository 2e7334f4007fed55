"""The directions of imports: who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparserefine

ROOT = Path(sparserefine.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
STAGES = ("base", "selector", "extractor", "ensembler", "refiner")
USES = (
    *("training", "predict", "evaluate", "benchmark", "benchmark_records", "benchmark_report"),
    *("cli", "demo", "data"),
)
OPTIONAL = {
    *("torchvision", "timm", "segmentation_models_pytorch"),
    *("transformers", "onnx", "onnxruntime", "openvino", "matplotlib"),
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


def project_parts(path: Path) -> set[str]:
    """First names inside the package: ``sparserefine.sparse.plan.Plan`` -> ``sparse``."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("sparserefine.")}


def below(*folders: str) -> list[str]:
    return [name for name in FILES if name.split("/")[0] in folders]


@pytest.mark.parametrize("name", below("sparse"))
def test_sparse_knows_only_itself_uncertainty_and_the_kernels(name: str) -> None:
    assert project_parts(FILES[name]) <= {"sparse", "uncertainty", "native"}


@pytest.mark.parametrize("name", FILES)
def test_triton_is_imported_for_kernels_on_the_gpu_only(name: str) -> None:
    """It looks for drivers and compilers, which takes its time and may fail."""
    if name.startswith("sparse/gpu/"):
        return
    modules = imported(FILES[name], at_import=True)
    assert "triton" not in {module.split(".")[0] for module in modules}
    assert not {module for module in modules if f"{module}.".startswith("sparserefine.sparse.gpu.")}


@pytest.mark.parametrize("name", below("native"))
def test_kernels_know_only_themselves(name: str) -> None:
    assert project_parts(FILES[name]) <= {"native"}


@pytest.mark.parametrize("name", below("uncertainty"))
def test_uncertainty_knows_only_itself(name: str) -> None:
    assert project_parts(FILES[name]) <= {"uncertainty"}


@pytest.mark.parametrize("name", below(*STAGES))
def test_stages_do_not_know_their_uses(name: str) -> None:
    assert not project_parts(FILES[name]) & set(USES)


@pytest.mark.parametrize("name", FILES)
def test_optional_packages_are_not_needed_to_import_anything(name: str) -> None:
    top = {module.split(".")[0] for module in imported(FILES[name], at_import=True)}
    assert not top & OPTIONAL


def test_the_files_that_these_rules_are_about_exist() -> None:
    assert set(STAGES) <= set(FILES)
    assert below("sparse")
    assert below("uncertainty")


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
        "from sparserefine import SparseRefiner; from sparserefine.sparse import get_engine; get_engine('auto')\n"
        "print([name for name in sys.modules if name.startswith('sparserefine.sparse.gpu')])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize("name", sparserefine.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(sparserefine, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Refiner'"):
        _ = sparserefine.Refiner
