"""Loads the compiled kernels: picks the object for this processor and lets it use torch's OpenMP runtime."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparserefine.engines.cpu.native import structures
from sparserefine.engines.cpu.native.build import DIGEST, INSTRUCTION_SETS, NOTE, OBJECTS, sources_digest
from sparserefine.sparse.interface import Unavailable

CHOICE = "SPARSEREFINE_CPU"
"""Environment variable that forces an instruction set, for tests and comparisons. ``torch`` disables the kernels."""
FOLDER = "SPARSEREFINE_OBJECTS"
"""Environment variable that names another folder of objects, for example built with sanitizers."""

_OPENMP = ("libgomp", "libiomp5", "libomp")


class Library:
    """One loaded object.

    Raises:
        Unavailable: the object does not load, or the sizes of its structures differ from Python's.

    Attributes:
        name: name of its instruction set.
        lanes: floats per vector.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.lanes = name, INSTRUCTION_SETS[name][0]
        try:
            self._object = ctypes.CDLL(str(folder / f"{name}.so"))
        except OSError as error:
            raise Unavailable(f"{name}.so does not load: {error}") from error
        self._check_structures()

    def _check_structures(self) -> None:
        """Refuses an object whose structures differ in size from those that Python fills."""
        for structure in structures.STRUCTURES:
            name, size = structure.__name__, ctypes.sizeof(structure)
            try:
                compiled = self.function(f"sr_size_of_{name}")()
            except AttributeError:
                compiled = None
            if compiled != size:
                there = "is not there" if compiled is None else f"has {compiled} bytes there"
                raise Unavailable(
                    f"{self.name}.so was built from other sources: structure {name} {there}, {size} bytes here; "
                    "reinstall (pip install -e .)"
                )

    def function(self, name: str, *arguments: type, result: type | None = ctypes.c_int64) -> ctypes._NamedFuncPointer:
        """The entry point ``name``, with its argument and result types set."""
        function = self._object[name]
        function.argtypes, function.restype = list(arguments), result
        return function


def load(name: str | None = None) -> Library:
    """The best kernels for this processor, or those for the instruction set ``name``.

    Raises:
        Unavailable: they were not built, or this processor cannot run them.
    """
    wanted = name or os.environ.get(CHOICE) or None
    return _load(wanted, os.environ.get(FOLDER) or str(OBJECTS))


def available() -> list[str]:
    """Instruction sets that run here, best first. Empty if nothing was built."""
    names = []
    for name in INSTRUCTION_SETS:
        try:
            load(name)
        except Unavailable:
            continue
        names.append(name)
    return names


@lru_cache
def _load(wanted: str | None, folder_name: str) -> Library:
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        known = ", ".join(INSTRUCTION_SETS)
        if wanted == "torch":
            raise Unavailable(f"switched off by {CHOICE}=torch")
        raise Unavailable(f"instruction set {wanted!r} is not known; set {CHOICE} to one of {known}, or unset it")
    folder = Path(folder_name)
    built = [name for name in INSTRUCTION_SETS if (folder / f"{name}.so").is_file()]
    if "generic" not in built:
        note = folder / NOTE.name
        message = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
        raise Unavailable(message if message.startswith("not built") else f"no objects in {folder}; reinstall")
    if folder == OBJECTS and (not DIGEST.is_file() or DIGEST.read_text(encoding="utf-8").strip() != sources_digest()):
        raise Unavailable(f"the objects in {folder} were built from other sources; reinstall (pip install -e .)")
    _share_openmp()
    generic = Library("generic", folder)
    runs = generic.function("sr_processor_runs", ctypes.c_int64)
    usable = [name for name in built if runs(INSTRUCTION_SETS[name][0])]
    if wanted is None:
        wanted = usable[0]
    if wanted not in usable:
        why = "this processor lacks it" if wanted in built else "it was not built"
        raise Unavailable(f"instruction set {wanted!r}: {why}; usable here: {', '.join(usable)}")
    return Library(wanted, folder)


def _share_openmp() -> None:
    """Makes torch's OpenMP runtime visible to our objects, which are not linked with any."""
    torch.get_num_threads()
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"the compiled kernels need Linux, this is {sys.platform}")
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    runtimes = [path for path in sorted(mapped) if Path(path).name.startswith(_OPENMP)]
    # Prefer torch's own runtime, in case another package has loaded a second one.
    runtimes.sort(key=lambda path: "torch" not in path)
    if not runtimes:
        raise Unavailable("torch has loaded no OpenMP runtime, but the kernels need libgomp, libiomp5 or libomp")
    ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)


def pointer(tensor: Tensor | None, dtype: torch.dtype | tuple[torch.dtype, ...], name: str) -> int | None:
    """The address of a CPU tensor, after checks that a kernel cannot make itself.

    Args:
        tensor: ``None`` gives a null pointer.
        dtype: the dtype, or dtypes, that the kernel reads.
        name: name of the argument, for the error.

    Raises:
        ValueError: the tensor is on another device, of another dtype, or not contiguous.
    """
    if tensor is None:
        return None
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        expected = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, {layout}; "
            f"expected contiguous {expected} on the CPU"
        )
    return tensor.data_ptr()
