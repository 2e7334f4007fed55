"""A base in an ONNX file: the shapes, dtypes and outputs it may have, what is refused, copies, and its identity."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.onnx import OnnxModel, onnx, open_session
from sparserefine.bases.load import load_base
from support import assert_close

onnxlib = pytest.importorskip("onnx", reason="builds the files of these tests")
runtime = pytest.importorskip("onnxruntime", reason="runs them")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

K = 4
WEIGHT = np.random.default_rng(0).standard_normal((K, 3, 1, 1)).astype(np.float32)
DYNAMIC = ("batch", 3, "height", "width")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

Value = tuple[str, int, Sequence[int | str | None]]
"""Name, element type and shape of an input or output."""


def written(
    path: Path,
    shape: Sequence[int | str | None] = DYNAMIC,
    *,
    dtype: int = TensorProto.FLOAT,
    weight: np.ndarray[Any, Any] = WEIGHT,
    inputs: Sequence[Value] | None = None,
    outputs: Sequence[Value] | None = None,
    external: str | None = None,
) -> Path:
    """A file that maps an input of ``shape`` by a 1x1 convolution with ``weight``; other outputs on demand."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    out = (shape[0], K, *shape[2:])
    inputs = inputs if inputs is not None else [("image", dtype, shape)]
    outputs = outputs if outputs is not None else [("logits", dtype, out)]
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["labels"], axis=1, keepdims=1),
        helper.make_node("ReduceMean", ["logits"], ["mean"], keepdims=0),
        helper.make_node("Neg", ["logits"], ["auxiliary"]),
    ]
    names = {name for name, *_ in outputs}
    model = helper.make_model(
        helper.make_graph(
            [node for node in nodes if node.output[0] in names | {"logits"}],
            "g",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            [numpy_helper.from_array(weight.astype(kind), "weight")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    if external is None:
        onnxlib.save(model, path)
    else:
        onnxlib.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    return path


def elementwise(path: Path, operator: str, shape: Sequence[int | str], dtype: int, **attributes: Any) -> Path:
    """A file with one operator."""
    out = attributes.get("to", dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, ["image"], ["logits"], **attributes)],
        "g",
        [helper.make_tensor_value_info("image", dtype, shape)],
        [helper.make_tensor_value_info("logits", out, shape)],
    )
    onnxlib.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def expected(x: Tensor) -> Tensor:
    return torch.einsum("kc,bchw->bkhw", torch.from_numpy(WEIGHT)[..., 0, 0], x)


# ---- what it takes and gives


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        pytest.param(DYNAMIC, 3, id="all dynamic"),
        pytest.param((1, 3, 6, 8), 1, id="fixed"),
        pytest.param((1, 3, 6, 8), 3, id="image by image"),
        pytest.param((2, 3, "height", "width"), 2, id="fixed batch"),
        pytest.param(("batch", "channels", 6, "width"), 2, id="fixed height"),
    ],
)
def test_shapes(tmp_path: Path, shape: Sequence[int | str], batch: int) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx", shape))
    x = torch.randn(batch, 3, 6, 8)
    assert_close(model(x), expected(x))


def test_dynamic_sizes_change_from_call_to_call(tmp_path: Path) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx"))
    for size in ((6, 8), (1, 1), (7, 5)):
        x = torch.randn(2, 3, *size)
        assert_close(model(x), expected(x))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_files_in_other_precisions_take_and_give_float32(tmp_path: Path, dtype: int) -> None:
    x = torch.randn(2, 3, 6, 8)
    y = OnnxModel(elementwise(tmp_path / "m.onnx", "Exp", DYNAMIC, dtype))(x)
    assert y.dtype == torch.float32
    assert_close(y, x.exp(), torch.float16)


def test_a_network_in_half_precision(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 8)
    y = OnnxModel(written(tmp_path / "m.onnx", dtype=TensorProto.FLOAT16))(x)
    assert y.dtype == torch.float32
    assert_close(y, expected(x), torch.float16)


def test_any_memory_format_is_taken(tmp_path: Path) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx"))
    x = torch.randn(2, 3, 6, 8).contiguous(memory_format=torch.channels_last)
    assert_close(model(x), expected(x))
    assert_close(model(x.half()), expected(x.half().float()))


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx"))
    first = model(torch.ones(1, 3, 6, 8))
    before = first.clone()
    model(torch.zeros(1, 3, 6, 8))
    assert torch.equal(first, before)


def test_the_first_dense_output_of_floats_counts(tmp_path: Path) -> None:
    shape = ("batch", K, "height", "width")
    outputs = [
        ("labels", TensorProto.INT64, ("batch", 1, "height", "width")),
        ("mean", TensorProto.FLOAT, ()),
        ("logits", TensorProto.FLOAT, shape),
        ("auxiliary", TensorProto.FLOAT, shape),
    ]
    x = torch.randn(2, 3, 6, 8)
    assert_close(OnnxModel(written(tmp_path / "m.onnx", outputs=outputs))(x), expected(x))


def test_class_count_is_told_where_the_file_has_it(tmp_path: Path) -> None:
    assert onnx(written(tmp_path / "known.onnx")).num_classes == K
    free = elementwise(tmp_path / "free.onnx", "Exp", ("batch", "channels", "height", "width"), TensorProto.FLOAT)
    assert onnx(free).num_classes is None
    assert FrozenBase(onnx(free), 3, BaseConfig(ratio=0.5)).num_classes == 3
    with pytest.raises(ValueError, match="num_classes is missing"):
        FrozenBase(onnx(free), config=BaseConfig(ratio=0.5))


def test_it_uses_as_many_threads_as_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    session = runtime.InferenceSession
    monkeypatch.setattr(runtime, "InferenceSession", lambda *a, **k: made.append(a[1]) or session(*a, **k))
    model = OnnxModel(written(tmp_path / "m.onnx"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # after it was loaded, before the first image
    model(torch.zeros(1, 3, 6, 8))
    assert made[-1].intra_op_num_threads == 3


# ---- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("used", [False, True])
def test_copies_run(tmp_path: Path, copied: Any, used: bool) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx"))
    x = torch.randn(2, 3, 6, 8)
    if used:
        model(x)
    twin = copied(model)
    assert twin.digest == model.digest
    assert_close(twin(x), expected(x))
    assert_close(model(x), expected(x))


# ---- what is refused


@pytest.mark.parametrize(
    ("shape", "x", "words"),
    [
        (
            (1, 3, 6, 8),
            (1, 3, 5, 8),
            r"takes images of 6 x 8, got 5 x 8; set base\.size: \[6, 8\], or export .* dynamic",
        ),
        (("b", 3, 6, "w"), (1, 3, 5, 7), r"takes images of 6 x any, got 5 x 7; set base\.size: \[6, 7\], or export"),
        (("b", 3, None, 8), (1, 3, 5, 7), r"takes images of any x 8, got 5 x 7; set base\.size: \[5, 8\], or export"),
        ((4, 3, "h", "w"), (3, 3, 6, 8), r"takes batches of 4, got 3; export .* dynamic batch"),
        (DYNAMIC, (3, 6, 8), r"input is torch\.float32 \(3, 6, 8\), expected one input of float pixels"),
    ],
    ids=str,
)
def test_input_of_another_size(tmp_path: Path, shape: Sequence[int | str | None], x: Sequence[int], words: str) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx", shape))
    with pytest.raises(ValueError, match=words):
        model(torch.zeros(*x))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_file_of_other_channels(tmp_path: Path, channels: int) -> None:
    weight = np.random.default_rng(1).standard_normal((K, channels, 1, 1)).astype(np.float32)
    loaded = onnx(written(tmp_path / "m.onnx", ("batch", channels, "height", "width"), weight=weight))
    assert loaded.channels == channels
    assert (loaded.mean, loaded.std) == ((0.5,) * channels, (0.25,) * channels)
    x = torch.randn(2, channels, 6, 8)
    assert_close(loaded.model(x), torch.einsum("kc,bchw->bkhw", torch.from_numpy(weight)[..., 0, 0], x))
    with pytest.raises(ValueError, match=rf"m.onnx: takes {channels} channels?, got 3"):
        loaded.model(torch.randn(1, 3, 6, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"inputs": [("image", 1, DYNAMIC), ("scale", 1, (1,))]},
            r"2 inputs \(image tensor\(float\) .*, scale .*\), expected one",
        ),
        ({"shape": (1, 6, 8, 3), "outputs": [("logits", 1, (1, K, 8, 3))]}, "channels come last.*NCHW"),
        ({"shape": (1, 60, 80, 4), "outputs": [("logits", 1, (1, K, 80, 4))]}, "channels come last.*NCHW"),
        (
            {"shape": (1, 17, 60, 80), "weight": np.zeros((K, 17, 1, 1))},
            r"\[1, 17, 60, 80\], expected .* of 1 to 16 ch",
        ),
        ({"outputs": [("labels", 7, ("b", 1, "h", "w"))]}, "no output is 4-D and floating point, got labels"),
    ],
    ids=["inputs", "layout", "layout of four", "channels", "outputs"],
)
def test_file_of_another_kind(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match=words) as error:
        OnnxModel(written(path, **arguments))
    assert str(path) in str(error.value)


def test_bytes_as_input_are_refused(tmp_path: Path) -> None:
    path = elementwise(tmp_path / "m.onnx", "Cast", DYNAMIC, TensorProto.UINT8, to=TensorProto.FLOAT)
    with pytest.raises(ValueError, match=r"input image is tensor\(uint8\) .*, expected one input of float pixels"):
        OnnxModel(path)


@pytest.mark.parametrize("kept", [0, 1, 60, -10])
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, kept: int) -> None:
    whole = written(tmp_path / "m.onnx").read_bytes()
    path = tmp_path / "broken.onnx"
    path.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"broken\.onnx: not an ONNX file that can be run, or cut short") as error:
        OnnxModel(path)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.onnx: no such file, expected an ONNX file"):
        OnnxModel(tmp_path / "none.onnx")
    path = written(tmp_path / "m.onnx", external="m.weights")
    (tmp_path / "m.weights").unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.onnx: its weights are in m\.weights, which is not there"):
        OnnxModel(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    """Opening a FIFO would wait for ever; the weights beside a file are opened too."""
    path = written(tmp_path / "m.onnx", external="m.weights")
    (tmp_path / "m.weights").unlink()
    os.mkfifo(tmp_path / "m.weights")
    with pytest.raises(ValueError, match=r"m\.weights: is a FIFO.*, expected weights of .*m\.onnx"):
        OnnxModel(path)
    with pytest.raises(ValueError, match=r"is a folder, expected an ONNX file"):
        OnnxModel(tmp_path)


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = written(tmp_path / "folder" / "m.onnx", external="m.weights")
    (tmp_path / "folder" / "m.weights").rename(tmp_path / "m.weights")
    model = onnxlib.load(path, load_external_data=False)
    for place in ("../m.weights", str(tmp_path / "m.weights")):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        onnxlib.save(model, path)
        with pytest.raises(ValueError, match=r"m\.onnx: not an ONNX file that can be run") as error:
            OnnxModel(path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("location", ["Berlin", "/dev/zero", "../other", "", "b" * 300, "\0"], ids=ascii)
def test_notes_that_look_like_a_weights_file(tmp_path: Path, location: str) -> None:
    """They are neither read nor missing; the file beside, which is a weights file, is still read."""
    if location == "../other" and tuple(map(int, runtime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("this ONNX Runtime would read it if it were a weights file, so we refuse it")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").write_text("not read")
    path = written(tmp_path / "folder" / "m.onnx", external="m.weights")
    model = onnxlib.load(path, load_external_data=False)
    model.metadata_props.add(key="location", value=location)
    onnxlib.save(model, path)
    content = path.read_bytes() + (tmp_path / "folder" / "m.weights").read_bytes()
    assert OnnxModel(path).digest == hashlib.sha256(content).hexdigest()


# ---- as a base


@pytest.mark.parametrize("name", [None, "m.weights", "w" * 200], ids=["inside", "beside", "long name"])
def test_identity_is_that_of_the_content(tmp_path: Path, name: str | None) -> None:
    def identity(folder: str, weight: np.ndarray[Any, Any]) -> str:
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder / "m.onnx", weight=weight, external=name)
        return FrozenBase(onnx(path), config=BaseConfig(ratio=0.5)).identity

    assert identity("a", WEIGHT) == identity("b", WEIGHT) != identity("c", WEIGHT + 1)


def test_frozen_base_end_to_end(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", (1, 3, 6, 8))
    image = torch.rand(2, 3, 6, 8)
    base = FrozenBase(onnx(path), config=BaseConfig(size=(6, 8), **PLAIN))
    assert base.num_classes == K
    assert_close(base(image), expected(image))
    assert_close(copy.deepcopy(base)(image), expected(image))
    assert base.macs(6, 8) is None
    assert base(torch.rand(1, 3, 13, 19)).shape == (1, K, 6, 8)
    with pytest.raises(ValueError, match=r"base\.size: \[6, 8\]"):
        FrozenBase(onnx(path), config=BaseConfig(ratio=0.5))(image)


def test_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx")
    image = torch.rand(1, 3, 6, 8)
    assert_close(load_base(BaseConfig(f"onnx:{path}", ratio=1.0, **PLAIN))(image), expected(image))
    with pytest.raises(ValueError, match=r"4 classes, .*7"):
        load_base(BaseConfig(f"onnx:{path}", ratio=1.0), 7)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'sparserefine\[onnx\]'"):
        OnnxModel(path)


def test_cuda_that_does_not_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime then goes on with the next provider."""
    wanted, session = [], runtime.InferenceSession

    def fallen_back(*given: Any, providers: Sequence[Any]) -> Any:
        wanted.append(providers)
        return session(*given, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(runtime, "InferenceSession", fallen_back)
    path = written(tmp_path / "m.onnx")
    open_session(path)
    assert not caplog.messages
    open_session(path, torch.device("cuda:1"))
    assert wanted[-1] == [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path}: runs on the CPU" in record.getMessage()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_a_gpu_come_back_to_it(tmp_path: Path) -> None:
    model = OnnxModel(written(tmp_path / "m.onnx"))
    x = torch.randn(2, 3, 6, 8)
    y = model(x.cuda())
    assert y.is_cuda
    assert_close(y.cpu(), expected(x))
