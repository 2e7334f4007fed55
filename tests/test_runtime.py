"""Bases run by ONNX Runtime and OpenVINO: the same outputs as torch, sizes, copies, and what is refused."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparserefine.bases import runtimes as module
from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.segnext import segnext
from sparserefine.bases.load import load_model
from sparserefine.bases.loaded import tensor_of
from sparserefine.bases.runtimes import NEEDS, Runtime
from test_libraries_end_to_end import mask2former_folder, segformer_folder

pytestmark = pytest.mark.xdist_group("runtime")  # models compiled once

K = 3
Name = Literal["onnxruntime", "openvino"]
NAMES: tuple[Name, ...] = ("onnxruntime", "openvino")


class Attentive(nn.Module):
    """What segmentation models are made of: convolution, batch norm, attention over all pixels, bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.qkv, self.head = nn.Conv2d(8, 24, 1), nn.Conv2d(8, K, 1)
        nn.init.uniform_(self.stem[1].running_var, 0.5, 2.0)
        nn.init.normal_(self.stem[1].running_mean)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        x = x + (v @ (q.transpose(1, 2) @ k).softmax(2).transpose(1, 2)).view_as(x)
        return {"logits": self.head(F.interpolate(x, image.shape[-2:], mode="bilinear")), "features": x}


class Pointwise(nn.Module):
    """Quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, K, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image)


def needed(name: Name) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"base.runtime = {name}")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return Attentive().eval()


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, model: nn.Module) -> Runtime:
    """Shared, as each size takes a second to compile."""
    needed(request.param)
    return Runtime(request.param, model)


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The sizes compiled so far, in their order."""
    caplog.set_level(logging.INFO, logger=module.__name__)
    return lambda: [line.split(" compiled for ")[1].split(" in ")[0] for line in caplog.messages]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-3 of the largest logit."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()


# ---- the same as torch


@pytest.mark.parametrize("size", [(16, 24), pytest.param((13, 9), marks=pytest.mark.slow)])  # each is compiled
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_eager(run: Runtime, model: nn.Module, size: tuple[int, int], batch: int) -> None:
    x = torch.randn(batch, 3, *size)
    with torch.no_grad():
        assert_same(run(x), model(x)["logits"])


def test_results_are_not_overwritten(run: Runtime) -> None:
    first = run(torch.ones(1, 3, 16, 24))
    before = first.clone()
    run(torch.zeros(1, 3, 16, 24))
    assert torch.equal(first, before)


def test_input_is_left_alone_in_any_memory_format(run: Runtime, model: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 24).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        assert_same(run(x), model(x)["logits"])
    assert torch.equal(x, before)


def test_surroundings_at_the_first_image_do_not_matter_and_stay() -> None:
    needed("openvino")
    model, level = Pointwise().eval(), logging.root.level
    run = Runtime("openvino", model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = run(torch.ones(1, 3, 4, 6))
    expected = model(torch.ones(1, 3, 4, 6)).detach()
    assert torch.equal(inside, run(torch.ones(1, 3, 4, 6)))
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-6)  # bfloat16 would miss by 1e-3
    assert logging.root.level == level


def test_nothing_is_registered_in_or_around_the_model(run: Runtime, model: nn.Module) -> None:
    assert run.model is model
    assert not isinstance(run, nn.Module)
    assert set(model._modules) == {"stem", "qkv", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder_of", [segformer_folder, mask2former_folder], ids=["segformer", "mask2former"])
def test_models_of_transformers(name: Name, folder_of: Callable[[Path], str], tmp_path: Path) -> None:
    needed(name)
    loaded = load_model(folder_of(tmp_path)).model
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_same(Runtime(name, loaded)(x), tensor_of(loaded(x), ""))


@pytest.mark.slow
def test_segnext() -> None:
    needed("openvino")
    segnext_t = segnext("t", K)
    for key, value in segnext_t.named_parameters():
        if "scale" in key:  # else the blocks add next to nothing
            nn.init.constant_(value, 0.5)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_same(Runtime("openvino", segnext_t)(x), segnext_t(x))


# ---- programs


@pytest.mark.slow
def test_each_size_is_compiled_once_and_the_one_used_longest_ago_goes(
    monkeypatch: pytest.MonkeyPatch, compilations: Callable[[], list[str]]
) -> None:
    needed("openvino")
    monkeypatch.setattr(module, "MOST_SIZES", 2)
    run = Runtime("openvino", Pointwise().eval())
    for height in (1, 1, 2, 1, 3, 1, 2):  # at 3, height 2 goes
        run(torch.zeros(2, 3, height, 5))
    assert compilations() == ["1 x 5", "2 x 5", "3 x 5", "2 x 5"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, pytest.param(lambda r: pickle.loads(pickle.dumps(r)), marks=pytest.mark.slow)]
)
def test_copies_compile_anew(copied: Any, compilations: Callable[[], list[str]]) -> None:
    needed("openvino")
    run = Runtime("openvino", Pointwise().eval())
    x = torch.randn(1, 3, 4, 6)
    expected = run(x)
    twin = copied(run)
    assert len(compilations()) == 1
    assert_same(twin(x), expected)
    assert len(compilations()) == 2
    assert twin.model is not run.model


def test_it_uses_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="base.runtime = openvino")
    seen = []
    compile_model = openvino.Core.compile_model

    def compiled(core: Any, graph: Any, device: str, options: dict[str, Any]) -> Any:
        seen.append(options["INFERENCE_NUM_THREADS"])
        return compile_model(core, graph, device, options)

    monkeypatch.setattr(openvino.Core, "compile_model", compiled)
    run = Runtime("openvino", Pointwise().eval())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # after construction, before the first image
    run(torch.zeros(1, 3, 4, 6))
    assert seen == [2]


def test_exporters_are_not_heard(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    needed("onnxruntime")
    capfd.readouterr()  # what ONNX Runtime says when it is imported
    Runtime("onnxruntime", Pointwise().eval())(torch.zeros(1, 3, 4, 6))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    logging.getLogger("other").warning("heard")
    assert caplog.messages[-1] == "heard"


# ---- ONNX files


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    onnx = pytest.importorskip("onnx", reason="builds the file")
    pytest.importorskip("onnxruntime", reason="reads it")
    shape = ("batch", 3, "height", "width")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Softmax", ["image"], ["other"], axis=1),
            onnx.helper.make_node("ArgMax", ["image"], ["labels"], axis=1),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
        [
            onnx.helper.make_tensor_value_info("labels", onnx.TensorProto.INT64, ("batch", 1, "height", "width")),
            onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, shape),
        ],
    )
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_onnx_file(name: Name, file: Path) -> None:
    from sparserefine.bases.families.onnx import OnnxModel

    needed(name)
    run = Runtime(name, OnnxModel(file))
    for size in ((6, 8), (5, 9)):
        x = torch.randn(2, 3, *size)
        assert_same(run(x), x.softmax(1))


def test_onnx_files_need_no_exporter_and_are_left_to_their_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes any precision, and runs on a GPU where ONNX Runtime can."""
    from sparserefine.bases.families.onnx import OnnxModel

    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    run, x = Runtime("onnxruntime", OnnxModel(file)), torch.randn(2, 3, 6, 8).half()
    assert_same(run(x), x.float().softmax(1))


# ---- what is refused


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [lambda x: x, print], ids=["function", "builtin"])
def test_other_callables(name: Name, given: Any) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' runs torch modules and ONNX files, got .*leave base\.runtime out"):
        Runtime(name, given)


def test_other_libraries() -> None:
    with pytest.raises(ValueError, match=r"base\.runtime = 'tensorrt', expected one of onnxruntime, openvino"):
        Runtime("tensorrt", Pointwise())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "package"), [(name, package) for name in NAMES for package in NEEDS[name]])
def test_missing_libraries_are_told_at_once(name: Name, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in NEEDS[name]:  # none of them is there to be missed before it
        if other != package:
            monkeypatch.setitem(sys.modules, other, SimpleNamespace())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package} .*pip install 'sparserefine\[{name}\]'"):
        Runtime(name, Pointwise())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    needed("openvino")
    x = torch.zeros(1, 3, 4, 6)
    cure = r"leave base\.runtime out"
    with pytest.raises(ValueError, match=rf"takes float32 on the CPU, got {dtype} on cpu; {cure}$"):
        Runtime("openvino", Pointwise().eval())(x.to(dtype))
    with pytest.raises(ValueError, match=rf"runs models in float32 on the CPU, got {dtype} on cpu; {cure}$"):
        Runtime("openvino", Pointwise().eval().to(dtype))(x)


def test_other_devices() -> None:
    needed("openvino")
    cure = r"leave base\.runtime out, or stay on the CPU \(--device cpu\)"
    with pytest.raises(ValueError, match=rf"takes float32 on the CPU, got torch.float32 on meta; {cure}"):
        Runtime("openvino", Pointwise().eval())(torch.zeros(1, 3, 4, 6, device="meta"))
    with pytest.raises(ValueError, match=rf"runs models in float32 on the CPU, got torch.float32 on meta; {cure}"):
        Runtime("openvino", Pointwise().eval().to("meta"))(torch.zeros(1, 3, 4, 6))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_cannot_be_converted(name: Name) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel for it\nand more lines")

    needed(name)
    with pytest.raises(
        ValueError, match=rf"'{name}' cannot run Broken at 4 x 6 \(.*; leave base\.runtime out"
    ) as error:
        Runtime(name, Broken())(torch.zeros(1, 3, 4, 6))
    assert "no kernel for it" in str(error.value)
    assert "\n" not in str(error.value)


# ---- as a base


@pytest.mark.slow
def test_frozen_base_end_to_end(model: nn.Module) -> None:
    needed("openvino")
    plain = FrozenBase(model, K, BaseConfig(ratio=0.5))
    run = FrozenBase(model, K, BaseConfig(ratio=0.5, runtime="openvino"))
    image = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    assert_same(run(image), plain(image))
    assert run.identity == plain.identity
    assert run.macs(32, 48) == plain.macs(32, 48)
    assert run.state_dict().keys() == plain.state_dict().keys()
    twin = copy.deepcopy(run)
    assert_same(twin(image), plain(image))
    with pytest.raises(ValueError, match=r"got torch.float16 on cpu; leave base\.runtime out"):
        twin.half()(image)


CTRL_C = """
import signal, torch
from sparserefine.bases.runtimes import Runtime

runtimes = [Runtime("openvino", torch.nn.Conv2d(3, 2, 3).eval()) for _ in range(2)]
for runtime in runtimes:
    runtime(torch.rand(1, 3, 8, 8))
runtimes.pop(0)
del runtime
runtimes.pop(0)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_ctrl_c_after_openvino_is_no_crash():
    """OpenVINO's cores leave a stack for signal handlers behind that is freed, if there are several."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
