"""Builds the source package and both wheels, installs each wheel into an environment of its own and runs it there.

    python tests/wheels.py dist [constraints.txt]

The wheels are built from the source package alone. The native one carries the compiled kernels and is for Linux, the
pure one is for any machine. Each goes into a fresh virtual environment with its dependencies, in the versions of the
constraints, and has to label a piece of the embedded photograph; both must come to the same labels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPH = ROOT / "src/sparserefine/assets/demo/01_h.webp"
PIECE = (1500, 900, 2012, 1284)
"""Of the photograph [px]: left, top, right, bottom."""
KINDS = {"native": "manylinux_", "pure": "py3-none-any"}
"""Both wheels, and what the name of each has to contain."""
SAME = 0.999
"""Share of the pixels whose labels agree: the kernels add in another order."""


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    """Runs a command; stdout and stderr together.

    Raises:
        SystemExit: it failed; with all it said.
    """
    # Nothing of the checkout: neither its path nor its choice of kernels.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEREFINE_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=folder, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\nended with status {done.returncode}")
    return done.stdout


def build(root: Path, out: Path) -> dict[str, Path]:
    """The source package of ``root`` and both wheels made of it, in ``out``; the wheels by kind.

    Raises:
        SystemExit: a build failed, or a wheel has the wrong tag.
    """
    out.mkdir(parents=True, exist_ok=True)
    hatchling = [sys.executable, "-m", "hatchling", "build", "--target"]
    with tempfile.TemporaryDirectory() as folder:
        run([*hatchling, "sdist", "--directory", folder], root)
        (package,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(package) as archive:
            archive.extractall(folder)
        package.replace(out / package.name)
        (unpacked,) = (path for path in Path(folder).iterdir() if path.is_dir())
        wheels = {}
        for kind, expected in KINDS.items():
            run(
                [*hatchling, "wheel", "--directory", Path(folder, kind)],
                unpacked,
                SPARSEREFINE_PURE=str(+(kind == "pure")),
            )
            (wheel,) = Path(folder, kind).iterdir()
            if expected not in wheel.name:
                raise SystemExit(
                    f"the {kind} wheel is {wheel.name}; expected {expected} in its name: no Linux, no compiler?"
                )
            wheels[kind] = wheel.replace(out / wheel.name)
    return wheels


def environment(folder: Path, wheel: Path, constraints: Path | None) -> Path:
    """A new virtual environment with the wheel installed; its folder of programs.

    Args:
        folder: where it goes; must not exist.
        wheel: pip looks at its tag and installs it.
        constraints: versions of the dependencies. ``None``: nothing but the wheel is installed, and the dependencies
            are those of the environment that runs this. An editable installation of sparserefine there stays out of
            sight, for it is found by a ``.pth`` file, which is not read.

    Raises:
        SystemExit: pip refused.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    programs = folder / "bin"
    install: list[str | Path] = [programs / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if constraints is None:
        run([*install, "--no-deps", "--no-index", wheel], folder)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    else:
        run([*install, "--constraint", constraints, wheel], folder)
        run([programs / "python", "-m", "pip", "check"], folder)
    return programs


def labels(programs: Path, kind: str, folder: Path) -> np.ndarray:
    """Runs ``sparserefine info`` and ``predict`` of an environment in ``folder``; the labels, ``uint8 [H, W]``.

    Raises:
        SystemExit: one of them failed, another copy of the package was used, or another engine.
    """
    folder.mkdir()
    place = run([programs / "python", "-c", "import sparserefine; print(sparserefine.__file__)"], folder)
    expect(place.startswith(str(programs.parent)), f"the package of the {kind} wheel is imported", place)
    report = run([programs / "sparserefine", "info"], folder)
    lines = dict(line.split("  ", 1) for line in report.splitlines())
    cpu, auto = lines["engine cpu"].strip(), lines["engine auto"].strip()
    expect(cpu.startswith("available: " if kind == "native" else "not built: "), f"engine cpu of the {kind} wheel", cpu)
    expect(auto.startswith("cpu" if kind == "native" else "torch"), f"engine auto of the {kind} wheel", auto)

    with Image.open(PHOTOGRAPH) as photograph:
        photograph.crop(PIECE).save(folder / "piece.png")
    predict = ["predict", "piece.png", "--refiner", "demo", "--out", "masks", "--device", "cpu"]
    said = run([programs / "sparserefine", *predict], folder)
    warnings = [line for line in said.splitlines() if "engine cpu is not available" in line]
    expect(len(warnings) == (kind == "pure"), f"the line about engine cpu, of the {kind} wheel", said)
    with Image.open(folder / "masks/piece.png") as image:
        found = np.asarray(image)
    expect(found.shape == (PIECE[3] - PIECE[1], PIECE[2] - PIECE[0]), "size of the labels", str(found.shape))
    expect(0 < found.mean() < 0.5, "some of the labels are vessels", str(found.mean()))
    print(f"{kind}: engine cpu: {cpu}\n{kind}: {said.strip().splitlines()[-1]}")
    return found


def expect(holds: bool, what: str, seen: str) -> None:
    """Ends the program with what was seen where ``what`` does not hold."""
    if not holds:
        raise SystemExit(f"not as expected: {what}\n{seen}")


def check(wheels: dict[str, Path], folder: Path, constraints: Path | None = None) -> None:
    """Installs and runs each wheel below ``folder``, and compares the labels; see :func:`environment`."""
    found = {}
    for kind, wheel in wheels.items():
        programs = environment(folder / kind, wheel, constraints)
        found[kind] = labels(programs, kind, folder / f"{kind}-run")
    same = float((found["native"] == found["pure"]).mean())
    expect(same >= SAME, f"both wheels give the same labels on {SAME:.1%} of the pixels", f"{same:.4%}")
    print(f"the same labels on {same:.4%} of the pixels")


def main(arguments: list[str]) -> int:
    """Builds and checks; 0, or a message of what was wrong."""
    out = Path(arguments[0] if arguments else "dist").resolve()
    constraints = Path(arguments[1]).resolve() if len(arguments) > 1 else ROOT / "constraints.txt"
    wheels = build(ROOT, out)
    with tempfile.TemporaryDirectory() as folder:
        check(wheels, Path(folder).resolve(), constraints)
    print(*(f"{out / wheel.name}" for wheel in wheels.values()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
