"""Compiles the kernels: one shared object per instruction set. Runs when the package is built (hatch_build.py).

Needs only the standard library and a C++ compiler (``$CXX``, ``g++``, ``clang++`` or ``c++``). The objects do not link
torch, Python or an OpenMP runtime. They use the OpenMP runtime that torch has loaded, so there is one thread pool, and
one build works with every version of torch and Python.
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
"""One line that says how the objects were built, or why there are none. ``sparserefine info`` shows it."""

DIGEST = OBJECTS / "sources.sha256"
"""Hash of the sources of the objects. Objects built from other sources would be called with wrong arguments."""

PURE = "SPARSEREFINE_PURE"
"""Environment variable. ``1`` builds without kernels, for a wheel that runs on any machine."""

_OLDEST_GLIBC = 17
"""Minor version of glibc 2.x in the oldest manylinux policy still in use (2014), and the first for 64-bit Arm."""

_X86 = "-mavx2 -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt"
_AVX512 = f"{_X86} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {
    "avx512": (16, _AVX512),
    "avx2": (8, _X86),
    "generic": (4, ""),
}
"""Floats per vector and compiler options, best first. ``generic`` uses the compiler's default instruction set."""

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
    """The instruction sets to build for this kind of machine."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [name for name in INSTRUCTION_SETS if x86 or name == "generic"]


def pure_wanted() -> bool:
    """Whether ``$SPARSEREFINE_PURE`` requests a package without kernels.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(PURE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{PURE} is {value!r}; expected 1 (leave the compiled kernels out) or 0, or unset it")
    return value == "1"


def needed_glibc(path: Path) -> tuple[int, int] | None:
    """The oldest version (major, minor) of glibc with all symbols that an object needs; ``None`` if unknown.

    The object holds symbol versions as strings between zero bytes. ``None`` if it was linked with another C library
    (musl), which has no symbol versions, or if it needs a version that is not a number, such as ``GLIBC_ABI_DT_RELR``.
    """
    names = set(re.findall(rb"\0GLIBC_([^\0]+)(?=\0)", path.read_bytes()))
    versions = [re.fullmatch(rb"(\d+)\.(\d+)(?:\.\d+)?", name) for name in names]
    if not versions or None in versions:
        return None
    return max((int(found[1]), int(found[2])) for found in versions if found)


def wheel_tag() -> str:
    """The platform tag of a wheel with the built objects.

    ``py3-none-manylinux_2_X_ARCH`` means any Python 3 on Linux with glibc 2.X or newer. If the needed version is not
    known, the tag is ``py3-none-linux_ARCH``: such a wheel installs locally, but package indexes refuse it.
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
        command: the compiler's command.
        name: the instruction set.
        out: path of the object. The file appears only when it is complete.
        extra: further options, for example those of a sanitizer.

    Raises:
        RuntimeError: the compiler failed; the message contains its output.
    """
    floats, options = INSTRUCTION_SETS[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder, out.name)
        # -fopenmp for compiling only: linking with it would bind the object to a runtime that may not be torch's.
        compiled = [str(Path(folder, Path(source).stem + ".o")) for source in sources]
        for source, target in zip(sources, compiled, strict=True):
            _run([*command, *shlex.split(f"{_OPTIONS} -DVL={floats} {options} {extra} -fopenmp -c -o"), target, source])
        # Link only the C library and the compiler's own helpers, no C++ runtime and no OpenMP.
        _run([*command, "-shared", *shlex.split(extra), "-nodefaultlibs", *compiled, "-lgcc", "-lc", "-o", str(part)])
        part.replace(out)


def build() -> bool:
    """Compiles all objects for this machine into :data:`OBJECTS` and writes :data:`NOTE`. Returns whether it succeeded.

    Raises:
        ValueError: ``$SPARSEREFINE_PURE`` is neither 0 nor 1.
    """
    pure = pure_wanted()
    shutil.rmtree(OBJECTS, ignore_errors=True)
    OBJECTS.mkdir()
    if pure:
        _note("not built: this package comes without compiled kernels; on Linux, install the manylinux wheel instead")
        return False
    if not sys.platform.startswith("linux"):
        _note(f"not built: the compiled kernels need Linux, this is {sys.platform}")
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
        message = " ".join(str(error).split())[:300]
        _note(f"not built: the C++ compiler failed at installation: {message}")
        return False
    DIGEST.write_text(sources_digest() + "\n", encoding="utf-8")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    _note(f"built with {version.splitlines()[0] if version else shlex.join(command)}")
    return True


def _note(message: str) -> None:
    NOTE.write_text(message + "\n", encoding="utf-8")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        output = result.stderr or result.stdout
        # The first error goes first, because the note has only one line.
        first = next((line for line in output.splitlines() if "error" in line), "")
        raise RuntimeError(f"{first}\n{shlex.join(command)}\n{output}")
