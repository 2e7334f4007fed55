"""A base in an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import logging
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparserefine.bases.loaded import LoadedModel
from sparserefine.files.regular import regular_file
from sparserefine.files.text import first_line, printable
from sparserefine.images.normalisation import IMAGENET_MEAN, MOST_CHANNELS, channels_text, default_normalisation

_log = logging.getLogger(__name__)
_CHECKS_PATHS = (1, 24)
"""The first ONNX Runtime that refuses weights outside of the model's folder by itself."""
_MAX_NAME, _MAX_PATH = 255, 4096
"""Longest name of a file, and longest path, on most systems."""

_FLOATS: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
_EXPECTED = f"expected one input of float pixels, [B, C, h, w] of 1 to {MOST_CHANNELS} channels"


def onnx(path: str | Path) -> LoadedModel:
    """Loads an ONNX file, with the counts of classes and channels if it has them; errors as in :class:`OnnxModel`."""
    model = OnnxModel(path)
    mean, std = default_normalisation(model.channels or len(IMAGENET_MEAN))
    return LoadedModel(model, model.num_classes, None, mean, std, channels=model.channels)


class OnnxModel:
    """An ONNX file as a base: normalised ``float32 [B, C, h, w]`` -> ``float32 [B, K, h', w']``.

    The file must have one input, ``[B, C, h, w]`` of float32, float16 or float64. Its sizes may be dynamic or fixed;
    with a batch size fixed at 1, images run one by one. If there are several outputs, the first one that is 4-D and
    floating point is used.

    It runs with the number of threads that torch has at the first image. They do not spin between images, because the
    refiner uses the same cores. Images on a GPU run there if ONNX Runtime has its CUDA provider (``onnxruntime-gpu``),
    otherwise on the CPU; the result is on the images' device. Do not move the file: it is opened at the first image,
    and again by copies of this object and in other processes.

    Attributes:
        path: of the file.
        digest: hexadecimal SHA-256 of the file and of its external weight files, if it has any.
        num_classes: K if the file has it, else ``None``.
        channels: C if the file has it, else ``None``.

    Raises:
        FileNotFoundError: the file or one of its weight files is missing.
        ValueError: not a regular file, not an ONNX file, cut short, or its input or outputs are not as described above.
        ImportError: ONNX Runtime is missing; the message says what to install.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = regular_file(path, "an ONNX file")
        for file in _weight_files(self.path):
            if file.exists() and not file.is_dir():  # a note in the file may look like the name of a folder
                regular_file(file, f"weights of {self.path}")
        session = open_session(self.path, optimize=False)
        try:
            self._input, self._shape, self._dtype = _input_of(session, self.path)
            self.channels = self._shape[1] if isinstance(self._shape[1], int) else None
            self._output, self._output_index, self.num_classes = _output_of(session, self.path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not an ONNX file that can be run (a name is no UTF-8)") from error
        self.digest = _digest(self.path)
        self._sessions: dict[torch.device, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}

    def __call__(self, x: Tensor) -> Tensor:
        """Coarse outputs of ``[B, C, h, w]``; raises ``ValueError`` if the file does not take this size."""
        session = self._session(x.device)
        return torch.cat([self._run(session, part) for part in self.parts(x)]).to(x.device)

    def parts(self, x: Tensor) -> Iterator[np.ndarray[Any, Any]]:
        """Splits the input into batches that the file takes: the whole of it, or single images.

        Raises:
            ValueError: the file has a fixed size or number of channels that differs from that of ``x``.
        """
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{self.path}: input is {x.dtype} {tuple(x.shape)}, {_EXPECTED}")
        batch, channels, *fixed = self._shape
        if isinstance(channels, int) and channels != x.shape[1]:
            raise ValueError(f"{self.path}: takes {channels_text(channels)}, got {x.shape[1]}")
        if any(isinstance(n, int) and n != m for n, m in zip(fixed, x.shape[2:], strict=True)):
            height, width = (n if isinstance(n, int) else "any" for n in fixed)
            size = [n if isinstance(n, int) else m for n, m in zip(fixed, x.shape[2:], strict=True)]
            raise ValueError(
                f"{self.path}: takes images of {height} x {width}, got {x.shape[2]} x {x.shape[3]}; set base.size: "
                f"{size}, or export the model with dynamic height and width"
            )
        if isinstance(batch, int) and batch not in (1, len(x)):
            raise ValueError(
                f"{self.path}: takes batches of {batch}, got {len(x)}; export the model with a dynamic batch or a "
                "batch of 1"
            )
        array = x.detach().cpu().contiguous().numpy().astype(self._dtype, copy=False)
        return (array[i : i + 1] for i in range(len(x))) if batch == 1 else iter((array,))

    @property
    def output_index(self) -> int:
        """Index of the file's output that is used."""
        return self._output_index

    def _session(self, device: torch.device) -> Any:
        import onnxruntime

        if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            device = torch.device("cpu")
        if device not in self._sessions:
            self._sessions[device] = open_session(self.path, device)
        return self._sessions[device]

    def _run(self, session: Any, part: np.ndarray[Any, Any]) -> Tensor:
        try:
            (output,) = session.run([self._output], {self._input: part})
        except Exception as error:  # the library has an exception class of its own for each of its failures
            raise ValueError(f"{self.path}: failed for an input of {part.shape} ({first_line(error)})") from error
        return torch.from_numpy(output).float()


def open_session(path: Path, device: torch.device | None = None, *, optimize: bool = True) -> Any:
    """Opens a session of ONNX Runtime with torch's number of threads.

    ``optimize=False`` is quick to open: for reading inputs and outputs, not for running.

    Raises:
        ValueError: the file is not ONNX, is cut short, or needs what this ONNX Runtime does not have.
        FileNotFoundError: a weight file is missing.
        ImportError: ONNX Runtime is missing; the message says what to install.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path}: ONNX files need ONNX Runtime; pip install 'sparserefine[onnx]'") from error
    if _version_of(onnxruntime) < _CHECKS_PATHS:
        outside = [name for name in _locations(path) if not _is_inside(name) and (path.parent / name).is_file()]
        if outside:
            raise ValueError(
                f"{path}: not an ONNX file that can be run: its weights are in {printable(outside[0])}, outside of its "
                "folder; put them beside it"
            )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # only errors; its warnings are about missed optimizations
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait slow the refiner down: with two threads on two cores, torch's convolutions
    # right after a network of 110 ms took 93 ms instead of 62; the network itself was no faster.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers: list[Any] = ["CPUExecutionProvider"]
    if device is not None and device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the library has an exception class of its own for each of its failures
        missing = [file.name for file in _weight_files(path) if file.name in str(error) and not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{path}: its weights are in {', '.join(missing)}, which is not there") from error
        raise ValueError(f"{path}: not an ONNX file that can be run, or cut short ({first_line(error)})") from error
    if len(providers) > 1 and session.get_providers()[0] != "CUDAExecutionProvider":
        _log.warning(
            "%s: runs on the CPU: ONNX Runtime cannot load its CUDA provider; install the CUDA and cuDNN that this "
            "onnxruntime-gpu was built for",
            path,
        )
    return session


def _input_of(session: Any, path: Path) -> tuple[str, tuple[int | str | None, ...], type[np.floating[Any]]]:
    """Name, shape (a dynamic size is a name or ``None``) and dtype of the only input."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs) or "none"
        raise ValueError(f"{path}: {len(inputs)} inputs ({names}), {_EXPECTED}")
    (found,) = inputs
    seen = f"{path}: input {found.name} is {found.type} {found.shape}"
    if found.type not in _FLOATS:
        raise ValueError(f"{seen}, {_EXPECTED}; export the model without the steps that turn bytes into floats")
    if len(found.shape) != 4:
        raise ValueError(f"{seen}, {_EXPECTED}")
    first, last = (n if isinstance(n, int) and 1 <= n <= MOST_CHANNELS else None for n in found.shape[1::2])
    if last is not None and (first is None or (last == 3 and first != 3)):  # images of three columns are unlikely
        raise ValueError(f"{seen}: channels come last, {_EXPECTED}; export the model with channels first (NCHW)")
    if isinstance(found.shape[1], int) and first is None:
        raise ValueError(f"{seen}, {_EXPECTED}")
    return found.name, tuple(found.shape), _FLOATS[found.type]


def _output_of(session: Any, path: Path) -> tuple[str, int, int | None]:
    """Name and index of the first 4-D floating-point output, and its class count if fixed."""
    outputs = session.get_outputs()
    for index, output in enumerate(outputs):
        if output.type in _FLOATS and len(output.shape) == 4:
            classes = output.shape[1]
            return output.name, index, classes if isinstance(classes, int) else None
    seen = ", ".join(f"{o.name} {o.type} {o.shape}" for o in outputs) or "none"
    raise ValueError(f"{path}: no output is 4-D and floating point, got {seen}; expected logits [B, K, h, w]")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in (path, *filter(Path.is_file, _weight_files(path))):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _version_of(onnxruntime: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", onnxruntime.__version__)[:2])


def _weight_files(path: Path) -> list[Path]:
    """The files beside ``path`` that hold its weights. Names that point outside the folder are left out."""
    return [path.parent / name for name in _locations(path) if _is_inside(name) and len(str(name)) <= _MAX_NAME]


def _is_inside(name: Path) -> bool:
    return not name.is_absolute() and ".." not in name.parts


def _locations(path: Path) -> list[Path]:
    """The names of files with weights that ``path`` mentions.

    An external tensor has a pair of strings, "location" and the name of its file. In protocol buffers that is: tag,
    length, text, tag, length (seven bits a byte), text. Metadata of an exporter may look the same, so a file found here
    need not exist.
    """
    with path.open("rb") as stream:
        if not path.stat().st_size:
            return []
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = set()
            for match in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]?[\x00-\x7f])", data):
                length = sum((byte & 127) << 7 * i for i, byte in enumerate(match[1]))
                if 0 < length <= _MAX_PATH:
                    names.add(data[match.end() : match.end() + length].decode(errors="replace"))
    return [Path(name) for name in sorted(names) if "\0" not in name]
