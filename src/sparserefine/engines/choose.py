"""Engines by name: which one runs here, and why."""

from __future__ import annotations

import logging
from functools import cache

import torch

from sparserefine.sparse.interface import Engine, Unavailable

ENGINES = ("torch", "cpu", "cpu-int8", "triton")
"""Engines by name. ``auto`` does not pick ``cpu-int8``: it rounds."""


class EngineChoice:
    """Engines of one name, one for each kind of device; made when first asked for, and kept: they own packed weights.

    Copies and pickles are by name: where one is read there may be no GPU.

    Args:
        name: ``auto`` picks the fastest that works on a device; of ``ENGINES``, an engine that leaves devices it has no
            code for to engine ``torch``.

    Attributes:
        name: as given.

    Raises:
        ValueError: no engine has that name, or it cannot be used here.
    """

    def __init__(self, name: str = "auto") -> None:
        self.name = name
        self._named = None if name == "auto" else _named(name)
        self._kept: dict[str, Engine] = {}

    def __reduce__(self) -> tuple[type[EngineChoice], tuple[str]]:
        return type(self), (self.name,)

    def on(self, device: torch.device) -> Engine:
        """The engine for tensors on that device."""
        kind = device.type
        if kind not in self._kept:
            # Two threads may make one each; both take the one that came first.
            self._kept.setdefault(kind, self._for(device))
        return self._kept[kind]

    def _for(self, device: torch.device) -> Engine:
        if self._named is None:
            return _fastest(device)
        return self._named if _has_code_for(self.name, device) else _load("torch")


def get_engine(name: str = "auto", device: str | torch.device = "cpu") -> Engine:
    """One engine, for those who need no choice by device.

    Args:
        name: as for :class:`EngineChoice`.
        device: of the tensors, for ``auto``; any other engine is given as it is.

    Raises:
        ValueError: no engine has that name, or it cannot be used here.
    """
    return EngineChoice().on(torch.device(device)) if name == "auto" else _named(name)


def _fastest(device: torch.device) -> Engine:
    if device.type == "cpu":
        try:
            return _load("cpu")
        except Unavailable as error:
            _tell(logging.WARNING, f"engine torch, for engine cpu is not available: {error}")
    elif device.type == "cuda":
        try:
            return _load_for_gpu()
        except Unavailable as error:
            _tell(logging.WARNING, f"engine torch on the GPU, for engine triton is not available: {error}")
    return _load("torch")


def _has_code_for(name: str, device: torch.device) -> bool:
    """Whether the engine of that name, which was loaded, has code of its own for the device."""
    if name == "triton":
        from sparserefine.engines.triton.launch import runs_on

        return runs_on(device)
    return name == "torch" or device.type == "cpu"


def _named(name: str) -> Engine:
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is not known; choose 'auto' or one of {', '.join(ENGINES)}")
    try:
        return _load(name)
    except Unavailable as error:
        raise ValueError(f"engine {name!r} cannot be used here: {error}") from error


def _load(name: str) -> Engine:
    """The engine of that name, or ``Unavailable``. Engines import much, so each is imported when it is asked for."""
    if name == "torch":
        from sparserefine.engines.reference.engine import TorchEngine

        return TorchEngine()
    if name == "triton":
        return _load_triton()
    from sparserefine.engines.cpu.engine import CpuEngine, Int8Engine

    engine = Int8Engine() if name == "cpu-int8" else CpuEngine()
    _tell(logging.INFO, f"engine {name} ({engine.kernels.library.name})")
    return engine


def _load_triton() -> Engine:
    try:
        from sparserefine.engines.triton.engine import TritonEngine
    except Exception as error:  # triton looks for drivers and compilers when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise Unavailable("triton is not installed; on Linux, torch for a GPU brings it") from error
        raise Unavailable(f"triton does not load: {type(error).__name__}: {error}") from error
    engine = TritonEngine()
    _tell(logging.INFO, "engine triton")
    return engine


def _load_for_gpu() -> Engine:
    """Engine ``triton`` for tensors on a GPU, or ``Unavailable``."""
    engine = _load_triton()
    from sparserefine.engines.triton.launch import runs_on

    if not runs_on(torch.device("cuda")):
        raise Unavailable("TRITON_INTERPRET=1 is set, so its kernels run on the CPU")
    return engine


@cache
def _tell(level: int, words: str) -> None:
    """Once for each message: refiners are made often, and what they run on does not change."""
    logging.getLogger(__name__).log(level, words)


def engine_report() -> dict[str, str]:
    """Each engine and whether it works here, and what ``auto`` picks, in words."""
    cpu, triton = _cpu_report(), _triton_report()
    works, on_gpu = cpu.startswith(_AVAILABLE), triton.startswith(_AVAILABLE)
    if on_gpu:
        auto = f"{'cpu' if works else 'torch'} for tensors on the CPU, triton on the GPU"
    else:
        auto = "cpu for tensors on the CPU, torch elsewhere" if works else "torch, for engine cpu is not available"
    return {
        "auto": auto,
        "torch": "available on every device",
        "cpu": cpu,
        "cpu-int8": _int8_report() if works else "needs engine cpu",
        "triton": triton,
    }


_AVAILABLE = "available: "


def _cpu_report() -> str:
    from sparserefine.engines.cpu.native.build import NOTE
    from sparserefine.engines.cpu.native.library import available, load

    try:
        chosen = load().name
    except Unavailable as error:
        return str(error)
    note = f"; {NOTE.read_text(encoding='utf-8').strip()}" if NOTE.is_file() else ""
    others = ", ".join(name for name in available() if name != chosen)
    return f"{_AVAILABLE}{chosen}{f' (also {others})' if others else ''}{note}"


def _int8_report() -> str:
    try:
        get_engine("cpu-int8")
    except ValueError as error:
        return str(error)
    return "available for quantized refiners (`sparserefine quantize`); about 1 % of rounding in the logits"


def _triton_report() -> str:
    try:
        _load_for_gpu()
    except Unavailable as error:
        return str(error)
    import triton

    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"{_AVAILABLE}triton {triton.__version__}, {name} (compute capability {major}.{minor})"
