"""Chooses an engine by name and device, and reports which engines work here and why the others do not."""

from __future__ import annotations

import logging
from functools import cache

import torch

from sparserefine.sparse.interface import Engine, Unavailable

ENGINES = ("torch", "cpu", "cpu-int8", "triton")
"""Names of the engines. ``auto`` never picks ``cpu-int8``, because 8 bits change the results."""


class EngineChoice:
    """The engine for each kind of device. Engines are made on first use and kept, because they own packed weights.

    Copies and pickles hold only the name. With ``auto`` they work on any machine, with or without a GPU; with the
    name of an engine, only where that engine does.

    Args:
        name: ``auto`` picks the fastest engine that works on a device. A name of ``ENGINES`` picks that engine; on
            devices it does not support, engine ``torch`` runs instead.

    Attributes:
        name: as given.

    Raises:
        ValueError: there is no engine of that name, or it cannot be used here.
    """

    def __init__(self, name: str = "auto") -> None:
        self.name = name
        self._named = None if name == "auto" else _named(name)
        self._kept: dict[str, Engine] = {}

    def __reduce__(self) -> tuple[type[EngineChoice], tuple[str]]:
        return type(self), (self.name,)

    def on(self, device: torch.device) -> Engine:
        """The engine for tensors on ``device``."""
        kind = device.type
        if kind not in self._kept:
            # Two threads may each make an engine; both then use the one that was stored first.
            self._kept.setdefault(kind, self._for(device))
        return self._kept[kind]

    def _for(self, device: torch.device) -> Engine:
        if self._named is None:
            return _fastest(device)
        return self._named if _supports(self.name, device) else _load("torch")


def get_engine(name: str = "auto", device: str | torch.device = "cpu") -> Engine:
    """One engine, for callers that use a single device.

    Args:
        name: ``auto`` or a name of ``ENGINES``.
        device: device of the tensors. Only ``auto`` depends on it.

    Raises:
        ValueError: there is no engine of that name, or it cannot be used here.
    """
    return EngineChoice().on(torch.device(device)) if name == "auto" else _named(name)


def _fastest(device: torch.device) -> Engine:
    if device.type == "cpu":
        try:
            return _load("cpu")
        except Unavailable as error:
            _log_once(logging.WARNING, f"using engine torch, because engine cpu is not available: {error}")
    elif device.type == "cuda":
        try:
            return _load_for_gpu()
        except Unavailable as error:
            message = f"using engine torch on the GPU, because engine triton is not available: {error}"
            _log_once(logging.WARNING, message)
    return _load("torch")


def _supports(name: str, device: torch.device) -> bool:
    """Whether the engine has code of its own for the device. The engine must have been loaded."""
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
    """The engine of that name; raises ``Unavailable``. Engines are slow to import, so each is imported on first use."""
    if name == "torch":
        from sparserefine.engines.reference.engine import TorchEngine

        return TorchEngine()
    if name == "triton":
        return _load_triton()
    from sparserefine.engines.cpu.engine import CpuEngine, Int8Engine

    engine = Int8Engine() if name == "cpu-int8" else CpuEngine()
    _log_once(logging.INFO, f"engine {name} ({engine.kernels.library.name})")
    return engine


def _load_triton() -> Engine:
    try:
        from sparserefine.engines.triton.engine import TritonEngine
    except Exception as error:  # importing triton looks for drivers and compilers
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            raise Unavailable("triton is not installed; on Linux, it comes with torch for GPUs") from error
        raise Unavailable(f"triton does not load: {type(error).__name__}: {error}") from error
    engine = TritonEngine()
    _log_once(logging.INFO, "engine triton")
    return engine


def _load_for_gpu() -> Engine:
    """Engine ``triton`` for tensors on a GPU; raises ``Unavailable``."""
    engine = _load_triton()
    from sparserefine.engines.triton.launch import runs_on

    if not runs_on(torch.device("cuda")):
        raise Unavailable("TRITON_INTERPRET=1 is set, so its kernels run on the CPU")
    return engine


@cache
def _log_once(level: int, message: str) -> None:
    """Logs each message once. Refiners are made often, but the engines they use stay the same."""
    logging.getLogger(__name__).log(level, message)


def engine_report() -> dict[str, str]:
    """For each engine whether it works here, and what ``auto`` picks; as text for ``sparserefine info``."""
    cpu, triton = _cpu_report(), _triton_report()
    cpu_works, triton_works = cpu.startswith(_AVAILABLE), triton.startswith(_AVAILABLE)
    if triton_works:
        auto = f"{'cpu' if cpu_works else 'torch'} for tensors on the CPU, triton on the GPU"
    else:
        only_torch = "torch, because engine cpu is not available"
        auto = "cpu for tensors on the CPU, torch elsewhere" if cpu_works else only_torch
    return {
        "auto": auto,
        "torch": "available on every device",
        "cpu": cpu,
        "cpu-int8": _int8_report() if cpu_works else "needs engine cpu",
        "triton": triton,
    }


_AVAILABLE = "available: "


def _cpu_report() -> str:
    from sparserefine.engines.cpu.kernels import kernels
    from sparserefine.engines.cpu.native.build import NOTE
    from sparserefine.engines.cpu.native.library import available, load

    try:
        compiled = kernels(load().name)
    except Unavailable as error:
        return str(error)
    chosen = compiled.library.name
    half = "by AVX512-BF16" if compiled.has_bf16 else "computed in float32"
    note = f"; {NOTE.read_text(encoding='utf-8').strip()}" if NOTE.is_file() else ""
    others = ", ".join(name for name in available() if name != chosen)
    return f"{_AVAILABLE}{chosen}{f' (also {others})' if others else ''}; training in bfloat16 {half}{note}"


def _int8_report() -> str:
    try:
        get_engine("cpu-int8")
    except ValueError as error:
        return str(error)
    return "available for quantized refiners (`sparserefine quantize`); rounding changes the logits by about 1 %"


def _triton_report() -> str:
    try:
        _load_for_gpu()
    except Unavailable as error:
        return str(error)
    import triton

    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"{_AVAILABLE}triton {triton.__version__}, {name} (compute capability {major}.{minor})"
