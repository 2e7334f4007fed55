"""Runtime: a torch base on the CPU, run by ONNX Runtime or OpenVINO, which are mostly faster than torch there."""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparserefine.bases.checkpoint import first_line
from sparserefine.bases.families.onnx import OnnxModel, open_session
from sparserefine.bases.loaded import tensor_of

_log = logging.getLogger(__name__)

_Program = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""``[1, 3, h, w]`` of one size -> ``[1, K, h', w']``, not overwritten by the next call."""

MOST_SIZES = 4
"""Compiled programs that are kept; each has a copy of the weights."""

NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
"""The packages that each library needs to run a torch module."""

_CURE = "leave base.runtime out"


class Runtime:
    """Runs a base by another library than torch: ``runtime(x)`` is ``tensor_of(model(x))`` within rounding.

    At the first image of a size the model is compiled for that size, which takes seconds to a minute; a log line says
    how long. The four sizes used last are kept, each with its own copy of the weights. Images run one by one, in
    float32, with as many threads as torch has when the model is compiled. The weights are those at that time: a base is
    frozen, and later changes to the module are not seen. So is Python code of the module that depends on values of
    pixels: it stays as it ran for the first image. Copies and pickles compile anew.

    OpenVINO reports its use to its makers when it is imported, unless ``opt_in_out --opt_out`` was run once.

    Args:
        name: the library.
        model: a module in evaluation mode, float32 and on the CPU, that is called with ``float32 [1, 3, h, w]``; or an
            :class:`~sparserefine.bases.families.onnx.OnnxModel`, whose file is then read by the library.

    Raises:
        ValueError: the model is of another kind, in another precision or on a GPU, or the library cannot run it.
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
        packages = (name,) if isinstance(model, OnnxModel) else NEEDS[name]  # a file needs no exporter
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
        """Coarse outputs ``float32 [B, K, h', w']`` of ``float32 [B, 3, h, w]`` on the CPU."""
        if isinstance(self.model, OnnxModel) and self.name == "onnxruntime":
            return self.model(x)  # on a GPU too
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(
                f"base.runtime = {self.name!r} takes float32 on the CPU, got {x.dtype} on {x.device}; "
                + _cure(x.device)
            )
        if isinstance(self.model, OnnxModel):
            images = [part[i : i + 1] for part in self.model.parts(x) for i in range(len(part))]
        else:
            odd = next((p for p in self.model.parameters() if p.dtype != torch.float32 or p.device.type != "cpu"), None)
            if odd is not None:
                raise ValueError(
                    f"base.runtime = {self.name!r} runs models in float32 on the CPU, got {odd.dtype} on {odd.device}; "
                    + _cure(odd.device)
                )
            images = list(x.detach().contiguous().numpy()[:, None])
        program = self._program(x[:1])
        return torch.cat([torch.from_numpy(program(image)).float() for image in images])

    def _program(self, x: Tensor) -> _Program:
        """The program for the size of ``x [1, 3, h, w]``, compiled if there is none yet."""
        size = (x.shape[2], x.shape[3])
        if size not in self._programs:
            while len(self._programs) >= MOST_SIZES:
                self._programs.popitem(last=False)  # before, so that there are never more in memory
            start, label = time.perf_counter(), type(self.model).__name__
            compiled = _compiled_openvino if self.name == "openvino" else _compiled_onnxruntime
            try:
                # Not as the caller's surroundings would have it: autocast would become part of the program.
                with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet():
                    self._programs[size] = compiled(self.model, x.clone())
            except Exception as error:  # whatever these libraries raise for a model that they cannot take
                raise ValueError(
                    f"base.runtime = {self.name!r} cannot run {label} at {size[0]} x {size[1]} "
                    f"({first_line(error.__cause__ or error)}); {_CURE}"
                ) from error
            _log.info("%s: %s compiled for %d x %d in %.1f s", self.name, label, *size, time.perf_counter() - start)
        self._programs.move_to_end(size)
        return self._programs[size]


def _cure(device: torch.device) -> str:
    return _CURE if device.type == "cpu" else f"{_CURE}, or stay on the CPU (--device cpu)"


class _Logits(nn.Module):
    """A model that returns its coarse outputs and nothing else, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.label = model, type(model).__name__

    def forward(self, x: Tensor) -> Tensor:
        return tensor_of(self.model(x), self.label)


def _compiled_openvino(model: nn.Module | OnnxModel, x: Tensor) -> _Program:
    import openvino

    core = openvino.Core()
    output = 0
    if isinstance(model, OnnxModel):
        graph, output = core.read_model(model.path), model.output_index
        graph.reshape(list(x.shape))
    else:
        graph = openvino.convert_model(_Logits(model).eval(), example_input=x, input=[list(x.shape)])
    program = core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",  # it takes bfloat16 by itself where the CPU multiplies that fast
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Its compiler of fused operations (2026.4) crashes the process on y + group_norm(f(y)) where y is
            # relu(group_norm(x)), as SegNeXt has it, and makes none of the paper's models faster.
            "SNIPPETS_MODE": "DISABLE",
            "ENABLE_CPU_PINNING": False,  # pinned: no faster alone, 10 % slower on a busy machine
        },
    )
    return lambda image: np.asarray(program(image)[output])


def _compiled_onnxruntime(model: nn.Module | OnnxModel, x: Tensor) -> _Program:
    assert isinstance(model, nn.Module)  # an ONNX file is run by OnnxModel itself
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # an open file on Windows stays
        path = Path(folder, "model.onnx")
        # The older exporter (dynamo=False) is quicker, but its Mask2Former is refused by ONNX Runtime 1.31: GridSample.
        torch.onnx.export(_Logits(model).eval(), (x,), path, dynamo=True, verbose=False)
        session = open_session(path)
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run(None, {name: image})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of exporters, which are about their own insides; errors are heard."""
    before, level = logging.root.manager.disable, logging.root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.setLevel(level)  # OpenVINO sets it to ERROR, for everyone
