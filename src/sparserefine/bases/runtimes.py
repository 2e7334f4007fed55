"""Runtime: runs a torch base on the CPU by ONNX Runtime or OpenVINO, which are mostly faster than torch."""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparserefine.bases.families.onnx import OnnxModel, open_session
from sparserefine.bases.loaded import tensor_of
from sparserefine.files.text import first_line

_log = logging.getLogger(__name__)

_Program = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""``[1, C, h, w]`` of one size -> ``[1, K, h', w']``, an array that the next call does not overwrite."""

MOST_SIZES = 4
"""Most compiled programs to keep, one for each input size; each has a copy of the weights."""

NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
"""The packages that each library needs to run a torch module."""

_LEAVE_OUT = "leave base.runtime out"


class Runtime:
    """Runs a base by another library than torch: ``runtime(x)`` equals ``tensor_of(model(x))`` up to rounding.

    The first image of each size compiles the model for that size, which takes seconds to a minute; a log line says how
    long. The four sizes used last are kept, each with its own copy of the weights. Images run one by one, in float32,
    with the number of threads that torch has when the model is compiled. Compiling freezes the weights: later changes
    to the module have no effect. It also freezes Python branches that depend on pixel values: every image takes the
    branch of the first one. Copied and unpickled objects compile again.

    OpenVINO sends usage statistics to its makers when it is imported, unless ``opt_in_out --opt_out`` was run once.

    Args:
        name: the library.
        model: a module in evaluation mode, in float32 and on the CPU, that takes ``float32 [1, C, h, w]``; or an
            :class:`~sparserefine.bases.families.onnx.OnnxModel`, whose file the library reads itself.

    Raises:
        ValueError: the model is neither of these, has another precision, is on a GPU, or the library cannot run it.
        ImportError: the library is missing; the message says what to install.
    """

    def __init__(self, name: Literal["onnxruntime", "openvino"], model: Callable[..., Any]) -> None:
        if not isinstance(model, nn.Module | OnnxModel):
            raise ValueError(
                f"base.runtime = {name!r} runs torch modules and ONNX files, got {type(model).__name__}; leave "
                "base.runtime out, or make the base an nn.Module"
            )
        if name not in NEEDS:
            raise ValueError(f"base.runtime = {name!r}, expected one of {', '.join(NEEDS)}")
        packages = (name,) if isinstance(model, OnnxModel) else NEEDS[name]  # an ONNX file needs no exporter
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ImportError(
                    f"base.runtime = {name!r} needs {package} ({first_line(error)}); pip install 'sparserefine[{name}]'"
                ) from error
        self.name, self.model = name, model
        self._programs: OrderedDict[tuple[int, int], _Program] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": OrderedDict()}

    def __call__(self, x: Tensor) -> Tensor:
        """Coarse outputs ``float32 [B, K, h', w']`` of ``float32 [B, C, h, w]`` on the CPU."""
        if isinstance(self.model, OnnxModel) and self.name == "onnxruntime":
            return self.model(x)  # on a GPU too
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(
                f"base.runtime = {self.name!r} takes float32 on the CPU, got {x.dtype} on {x.device}; "
                + _advice(x.device)
            )
        if isinstance(self.model, OnnxModel):
            images = [part[i : i + 1] for part in self.model.parts(x) for i in range(len(part))]
        else:
            misfit = next(
                (p for p in self.model.parameters() if p.dtype != torch.float32 or p.device.type != "cpu"), None
            )
            if misfit is not None:
                raise ValueError(
                    f"base.runtime = {self.name!r} runs models in float32 on the CPU, got {misfit.dtype} on "
                    f"{misfit.device}; " + _advice(misfit.device)
                )
            images = list(x.detach().contiguous().numpy()[:, None])
        program = self._program(x[:1])
        return torch.cat([torch.from_numpy(program(image)).float() for image in images])

    def _program(self, x: Tensor) -> _Program:
        """The program for the size of ``x [1, C, h, w]``, compiled if there is none yet."""
        size = (x.shape[2], x.shape[3])
        if size not in self._programs:
            while len(self._programs) >= MOST_SIZES:
                self._programs.popitem(last=False)  # before compiling, so that there are never more in memory
            start, label = time.perf_counter(), type(self.model).__name__
            compiled = _compiled_openvino if self.name == "openvino" else _compiled_onnxruntime
            try:
                # Without the caller's modes: autocast, for example, would become part of the program.
                with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet():
                    self._programs[size] = compiled(self.model, x.clone())
            except Exception as error:  # these libraries raise many kinds for a model that they cannot run
                raise ValueError(
                    f"base.runtime = {self.name!r} cannot run {label} at {size[0]} x {size[1]} "
                    f"({first_line(error.__cause__ or error)}); {_LEAVE_OUT}"
                ) from error
            _log.info("%s: %s compiled for %d x %d in %.1f s", self.name, label, *size, time.perf_counter() - start)
        self._programs.move_to_end(size)
        return self._programs[size]


def _advice(device: torch.device) -> str:
    return _LEAVE_OUT if device.type == "cpu" else f"{_LEAVE_OUT}, or stay on the CPU (--device cpu)"


class _SingleOutput(nn.Module):
    """Wraps a model to return its coarse outputs as one tensor, which exporters need."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.label = model, type(model).__name__

    def forward(self, x: Tensor) -> Tensor:
        return tensor_of(self.model(x), self.label)


@cache
def _openvino_core() -> Any:
    """One for the whole process. OpenVINO (2026.4) sets a stack for signal handlers when a core is made; when several
    cores end in another order than they began, the stack is freed memory, and Ctrl-C ends the process with a crash.
    """
    import openvino

    return openvino.Core()


def _compiled_openvino(model: nn.Module | OnnxModel, x: Tensor) -> _Program:
    import openvino

    core, output = _openvino_core(), 0
    if isinstance(model, OnnxModel):
        graph, output = core.read_model(model.path), model.output_index
        graph.reshape(list(x.shape))
    else:
        graph = openvino.convert_model(_SingleOutput(model).eval(), example_input=x, input=[list(x.shape)])
    program = core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",  # by default it uses bfloat16 on CPUs with fast bfloat16 products
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Its compiler of fused operations (2026.4) crashes the process on SegNeXt's y + group_norm(f(y)) with
            # y = relu(group_norm(x)), and makes none of the paper's models faster.
            "SNIPPETS_MODE": "DISABLE",
            "ENABLE_CPU_PINNING": False,  # pinning is no faster on an idle machine, and 10 % slower on a busy one
        },
    )
    return lambda image: np.asarray(program(image)[output])


def _compiled_onnxruntime(model: nn.Module | OnnxModel, x: Tensor) -> _Program:
    assert isinstance(model, nn.Module)  # an ONNX file is run by OnnxModel itself
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows cannot delete an open file
        path = Path(folder, "model.onnx")
        # The older exporter (dynamo=False) is quicker, but ONNX Runtime 1.31 refuses its Mask2Former (GridSample).
        torch.onnx.export(_SingleOutput(model).eval(), (x,), path, dynamo=True, verbose=False)
        session = open_session(path)
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run(None, {name: image})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporters' warnings, which are about their internals; errors still appear."""
    before, level = logging.root.manager.disable, logging.root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.setLevel(level)  # OpenVINO sets the root logger to ERROR
