"""The GPU kernels compile for a real GPU, without one, into what they are meant to be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = Path(__file__).parents[1] / "src/sparserefine/engines/triton/kernels"

Facts = dict[str, Any]


def compiled(pytestconfig: pytest.Config, folder: Path) -> Path:
    """Where Triton keeps what it compiled, by sources, options and versions: with pytest's cache, if there is one."""
    return pytestconfig.cache.mkdir("triton") if pytestconfig.pluginmanager.has_plugin("cacheprovider") else folder


@pytest.fixture(scope="module")
def report(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Facts], dict[str, Facts]]:
    """Facts of each kernel as compiled, and of each case by its name; float16 and one kind of GPU."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"registers and instructions are known for Triton 3.9, this is {triton.__version__}")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / name).is_file()]
    if missing:
        pytest.skip(f"this triton comes without {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("triton")
    cache = str(compiled(pytestconfig, folder))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode in (0, 1), run.stderr  # 1: there are problems, which the tests tell
    assert "Traceback" not in run.stderr, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return [line for line in lines if "kernel" in line], {line["case"]: line for line in lines if "case" in line}


def test_every_kernel_is_compiled(report) -> None:
    written = [
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def ([a-z]\w*)\(", path.read_text(), re.MULTILINE)
    ]
    assert len(written) > 10
    assert {facts["kernel"] for facts in report[0]} == set(written)


def test_no_kernel_is_refused_spills_or_does_without_matrix_instructions(report) -> None:
    assert [facts for facts in report[0] if facts["problems"]] == []


def test_a_network_needs_few_kernels(report) -> None:
    kernels, cases = report
    convolutions = {facts["id"] for facts in kernels if facts["kernel"] == "convolve"}
    needed = set(cases["paper float16, one image"]["kernels"])
    assert len(needed & convolutions) <= 16  # each takes a second or two of the first call
    assert len(needed - convolutions) <= 9
    assert len(set(cases["paper float16, many sites"]["kernels"]) - needed) <= 4
    assert cases["paper float16, one image"]["launches"] > 3 * len(needed)


def test_another_image_needs_no_other_kernels(report) -> None:
    one, another = (report[1][f"paper float16, {name}"]["kernels"] for name in ("one image", "another image"))
    assert one == another


def test_the_number_of_classes_makes_no_other_kernels(report) -> None:
    for name in ("nearest", "scores"):
        few, many = (report[1][f"uncertainty {classes} float16, {name}"]["kernels"] for classes in (19, 150))
        assert few == many
