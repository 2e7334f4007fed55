"""Runs the tests of the CPU kernels on objects with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [options of pytest]

Reads and writes beside an array, overflows and misaligned pointers end the run with a report of where they are. The
objects that are installed stay as they are. About two minutes on one core.

All instruction sets of this machine are run, and 8-bit products (VNNI) where it has them. The sanitizer does not see
loads and stores with masks, so all objects have plain ones in their place (``SR_NO_MASKS`` in simd.h).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sparserefine.engines.cpu.native import build

TESTS = Path(__file__).parent
FILES = (
    *("test_cpu_kernels.py", "test_cpu_network.py", "test_cpu_uncertainty.py", "test_cpu_gate.py"),
    *("test_conformance_uncertainty.py", "test_conformance_gate.py", "test_int8.py", "test_context.py"),
    "test_bfloat16.py",
)
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
"""Loaded before Python, which is not built with them; the C++ runtime so that they see torch's exceptions."""
OPTIONS = "-DSR_NO_MASKS -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
LEFT_OUT = "trained or many_sites or triton or test_command or forgets or labels_are"
"""Large cases and whole commands, which show no more about memory than small cases, and kernels not compiled."""


def runtimes(command: list[str]) -> list[str] | str:
    """The sanitizers' libraries of this compiler, or why there are none."""
    paths = []
    for name in RUNTIMES:
        asked = [*command, f"-print-file-name={name}"]
        try:
            path = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        except OSError as error:
            return str(error)
        if not Path(path).is_absolute():
            return f"{command[0]} has no {name}"
        paths.append(path)
    return paths


def main(arguments: list[str]) -> int:
    """Compiles, runs pytest; its exit status."""
    command = build.compiler() or ["g++"]
    libraries = runtimes(command)
    if isinstance(libraries, str):
        print(f"nothing was checked: {libraries}; install g++ with its sanitizers (libasan, libubsan)")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for name in build.instruction_sets():
            build.compile_object(command, name, Path(folder, f"{name}.so"), OPTIONS)
        Path(folder, build.DIGEST.name).write_text(build.sources_digest(), encoding="utf-8")
        environment = {
            **os.environ,
            "SPARSEREFINE_OBJECTS": folder,
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "1",
        }
        # Standard error stays open for the sanitizers' reports.
        pytest = [sys.executable, "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
        files = [str(TESTS / name) for name in FILES if (TESTS / name).is_file()]
        return subprocess.run([*pytest, *files, *arguments], env=environment, cwd=TESTS.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
