"""Compiles the kernels: one shared object for each instruction set. Runs when the package is built (hatch_build.py).

Needs nothing but the standard library and a C++ compiler (``$CXX``, ``g++``, ``clang++`` or ``c++``). The objects link
neither torch nor Python nor an OpenMP runtime: they use the runtime that torch has loaded, so there is one thread pool
and one build serves every version of torch and Python.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
OBJECTS = SOURCES / "objects"
NOTE = OBJECTS / "build.txt"
"""One line on how the objects were built, or why there are none; ``sparserefine info`` shows it."""

DIGEST = OBJECTS / "sources.sha256"
"""Of the sources that the objects were built from: objects of others would be called with wrong arguments."""

PURE = "SPARSEREFINE_PURE"
"""Environment variable: ``1`` leaves the kernels out, for a wheel that runs on any machine."""

_OLDEST_GLIBC = 17
"""Of the C library 2.x: what the oldest manylinux policy still in use (2014) names, and where 64-bit Arm begins."""

_X86 = "-mavx2 -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt"
_AVX512 = f"{_X86} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {
    "avx512": (16, _AVX512),
    "avx2": (8, _X86),
    "generic": (4, ""),
}
"""Floats of a vector and compiler options, best first; ``generic`` is what the compiler makes by default."""

_OPTIONS = (
    "-std=c++17 -O3 -shared -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -Wno-unknown-warning-option"
)


def compiler() -> list[str] | None:
    """The C++ compiler's command, ``$CXX`` first, or ``None``."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    return [found] if found else None


def instruction_sets() -> list[str]:
    """Those that this kind of machine may have."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [name for name in INSTRUCTION_SETS if x86 or name == "generic"]


def pure_wanted() -> bool:
    """Whether ``$SPARSEREFINE_PURE`` asks for a package without kernels.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(PURE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{PURE} is {value!r}; expected 1 (leave the compiled kernels out) or 0, or unset it")
    return value == "1"


def needed_glibc(path: Path) -> tuple[int, int] | None:
    """The oldest version of the GNU C library that has all symbols of an object; ``None`` if no version is enough.

    Symbol versions stand in the object as strings between zero bytes. ``None``: it was linked with another C library
    (musl), which names no versions, or it needs a version that is no number, as ``GLIBC_ABI_DT_RELR``.
    """
    names = set(re.findall(rb"\0GLIBC_([^\0]+)(?=\0)", path.read_bytes()))
    versions = [re.fullmatch(rb"(\d+)\.(\d+)(?:\.\d+)?", name) for name in names]
    if not versions or None in versions:
        return None
    return max((int(found[1]), int(found[2])) for found in versions if found)


def wheel_tag() -> str:
    """What the name of a wheel with the built objects has to say of the machines it is for.

    ``py3-none-manylinux_2_X_ARCH``: any Python 3 on Linux whose C library is 2.X or newer. Where the C library's
    version is not known: ``py3-none-linux_ARCH``, which installs here and which package indexes refuse.
    """
    needed = [needed_glibc(path) for path in OBJECTS.glob("*.so")]
    known = [version for version in needed if version is not None]
    if not known or len(known) < len(needed):
        return f"py3-none-linux_{platform.machine()}"
    major, minor = max(*known, (2, _OLDEST_GLIBC))
    return f"py3-none-manylinux_{major}_{minor}_{platform.machine()}"


def sources_digest() -> str:
    """SHA-256 of all sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def compile_object(command: list[str], name: str, out: Path, extra: str = "") -> None:
    """Compiles one object.

    Args:
        command: the compiler.
        name: instruction set.
        out: where the object goes; it appears there when it is whole.
        extra: more options, those of a sanitizer for instance.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    floats, options = INSTRUCTION_SETS[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder, out.name)
        # -fopenmp when compiling only: linked with it, the object would name one OpenMP runtime, maybe not torch's.
        compiled = [str(Path(folder, Path(source).stem + ".o")) for source in sources]
        for source, target in zip(sources, compiled, strict=True):
            _run([*command, *shlex.split(f"{_OPTIONS} -DVL={floats} {options} {extra} -fopenmp -c -o"), target, source])
        # Only the C library and the compiler's own helpers are linked: no C++ runtime, no OpenMP.
        _run([*command, "-shared", *shlex.split(extra), "-nodefaultlibs", *compiled, "-lgcc", "-lc", "-o", str(part)])
        part.replace(out)


def build() -> bool:
    """Compiles all objects of this machine into :data:`OBJECTS` and writes :data:`NOTE`; false if there are none.

    Raises:
        ValueError: ``$SPARSEREFINE_PURE`` is neither 0 nor 1.
    """
    pure = pure_wanted()
    shutil.rmtree(OBJECTS, ignore_errors=True)
    OBJECTS.mkdir()
    if pure:
        _note("not built: this package comes without compiled kernels; on Linux, install the manylinux wheel for them")
        return False
    if not sys.platform.startswith("linux"):
        _note(f"not built: the compiled kernels are for Linux, this is {sys.platform}")
        return False
    command = compiler()
    if command is None or not shutil.which(command[0]):
        missing = f"$CXX = {shlex.join(command)}" if command else "g++, clang++, c++"
        _note(f"not built: no C++ compiler was found at installation ({missing}); install g++ and reinstall")
        return False
    try:
        for name in instruction_sets():
            compile_object(command, name, OBJECTS / f"{name}.so")
    except (RuntimeError, OSError) as error:
        shutil.rmtree(OBJECTS)
        OBJECTS.mkdir()
        words = " ".join(str(error).split())[:300]
        _note(f"not built: the C++ compiler failed at installation: {words}")
        return False
    DIGEST.write_text(sources_digest() + "\n", encoding="utf-8")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    _note(f"built with {version.splitlines()[0] if version else shlex.join(command)}")
    return True


def _note(words: str) -> None:
    NOTE.write_text(words + "\n", encoding="utf-8")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = result.stderr or result.stdout
        # What went wrong first, for a note of one line.
        first = next((line for line in said.splitlines() if "error" in line), "")
        raise RuntimeError(f"{first}\n{shlex.join(command)}\n{said}")
