"""Which engine is picked, what is said of it, and that engine ``auto`` of a machine with a GPU asks the right one."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.loaded import LoadedModel
from sparserefine.commands.info import info_text
from sparserefine.engines import choose as engine
from sparserefine.engines.auto import AutoEngine
from sparserefine.engines.choose import engine_report, get_engine
from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.images.coarse import Coarse
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Engine, PlanSpec, Sites
from sparserefine.sparse.interface import Unavailable
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.selector import Selector
from sparserefine.studies.evaluate import dense_labels
from support import CPU_ENGINES, engine_of, needs_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
METHODS = sorted(name for name in vars(Engine) if inspect.isfunction(vars(Engine)[name]) and name[0] != "_")


class Recording(TorchEngine):
    """Remembers what it was asked for; stands for an engine of its own name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in METHODS and name != "on":
            return lambda *arguments: self.asked.append(name)
        return super().__getattribute__(name)


class OnMeta(AutoEngine):
    """Takes the device ``meta`` for a GPU."""

    def on(self, device: torch.device) -> Engine:
        return super().on(CUDA if device.type == "meta" else device)


@pytest.fixture(autouse=True)
def _untold() -> Iterator[None]:
    """What is said once is said again."""
    engine._tell.cache_clear()
    yield
    engine._tell.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


@pytest.fixture
def triton(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And engine ``triton`` works there."""
    monkeypatch.setattr(engine, "_load_for_gpu", lambda: Recording("triton"))


def unavailable(words: str) -> Any:
    def load() -> Engine:
        raise Unavailable(words)

    return load


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- picking


def test_without_a_gpu_auto_is_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRITON_INTERPRET=1, which the tests run with, makes no difference."""
    without_gpu(monkeypatch)
    chosen = get_engine("auto")
    assert chosen.name in ("cpu", "torch")
    assert chosen.on(CPU) is chosen
    assert not engine_report()["triton"].startswith("available")
    assert chosen.name in engine_report()["auto"]


def test_with_a_gpu_auto_is_one_engine_for_each(triton: None) -> None:
    chosen = get_engine("auto")
    assert chosen.name == "auto"
    assert chosen.on(CUDA).name == "triton"
    assert chosen.on(torch.device("cuda:1")).name == "triton"
    assert chosen.on(CPU).name in ("cpu", "torch")
    assert chosen.on(torch.device("mps")).name == "torch"


def test_a_gpu_without_triton(gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engine, "_load_triton", unavailable("it broke"))
    with caplog.at_level(logging.WARNING):
        chosen = [get_engine("auto") for _ in range(3)]
    assert {one.name for one in chosen} <= {"cpu", "torch"}
    assert chosen[0].on(CUDA).name == "torch"
    said = [record.message for record in caplog.records if "GPU" in record.message]
    assert said == ["engine torch on the GPU, for engine triton is not available: it broke"]
    with pytest.raises(ValueError, match="engine 'triton' cannot be used here: it broke"):
        get_engine("triton")
    assert engine_report()["triton"] == "it broke"
    assert "torch" in engine_report()["auto"]


def test_interpreted_kernels_are_not_for_a_gpu(gpu: None) -> None:
    needs_triton()
    assert get_engine("auto").name in ("cpu", "torch")
    assert get_engine("triton").name == "triton"
    assert "TRITON_INTERPRET=1" in engine_report()["triton"]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    needs_triton(gpu=True)
    assert get_engine("auto").on(CUDA).name == "triton"
    report = engine_report()
    assert torch.cuda.get_device_name() in report["triton"]
    assert report["auto"].endswith("triton on the GPU")


def test_the_report_on_a_gpu(triton: None) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    report = engine_report()
    assert report["triton"].endswith("Some GPU (compute capability 9.0)")
    assert report["auto"] in (
        "cpu for tensors on the CPU, triton on the GPU",
        "torch for tensors on the CPU, triton on the GPU",
    )
    assert list(report) == ["auto", *engine.ENGINES]


BROKEN = """
import builtins, torch
torch.cuda.is_available = lambda: {gpu}
torch.cuda.device_count = lambda: 0
real = builtins.__import__

def importing(name, names=None, *rest, **named):
    ours = (names or {{}}).get("__name__", "").startswith("sparserefine.")  # torch imports it, too
    if ours and name.split(".")[0] == "triton":
        raise {error}
    return real(name, names, *rest, **named)

builtins.__import__ = importing
from sparserefine.commands.info import info_text
from sparserefine.engines.choose import get_engine
print(info_text())
print(get_engine("auto").name)
try:
    get_engine("triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("gpu", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["GPU", "no GPU"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ModuleNotFoundError(name='triton')", "triton is not installed; on Linux, torch for a GPU brings it"),
        ("RuntimeError('no driver')", "triton does not load: RuntimeError: no driver"),
    ],
    ids=["missing", "broken"],
)
def test_triton_that_does_not_load(gpu: bool, error: str, reason: str) -> None:
    code = BROKEN.format(gpu=gpu, error=error)
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    (told,) = [line for line in lines if line.startswith("engine triton ")]
    assert told.split(maxsplit=2)[2] == reason
    assert lines[-2] in ("cpu", "torch")
    assert lines[-1] == f"engine 'triton' cannot be used here: {reason}"


def test_info_lists_every_engine() -> None:
    for name in engine.ENGINES:
        assert f"engine {name} " in info_text()


# ---- engine auto


def calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of each method, all on one device."""
    rows, pixels = torch.zeros(1, 2, device=device), torch.zeros(1, 2, 3, device=device)
    mask, logits = pixels > 0, torch.zeros(1, 2, 2, 3, device=device)
    sites, spec = Sites(torch.zeros(1, 3, dtype=torch.int32, device=device), 1, 2, 3), PlanSpec(1, "cell")
    coarse = Coarse(logits, (2, 3))
    return {
        "keep_largest": (pixels, mask, 1),
        "plan": (mask, spec),
        "geometry": (sites, spec),
        "conv": (rows, rows, None),
        "prepare": (nn.Linear(1, 1, device=device),),
        "uncertainty": (coarse,),
        "sample": (coarse, sites.coords),
        "pixels": (logits, sites.coords, rows, rows),
        "gated": (rows, rows, (), (), True),
        "write_labels": (pixels, rows, sites),
    }


def test_the_calls_are_all_there_are() -> None:
    assert sorted([*calls(CPU), "on"]) == METHODS


@pytest.mark.parametrize("method", calls(CPU))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_device_of_the_tensors_decides(method: str, device: str) -> None:
    on_gpu, elsewhere = Recording("triton"), Recording("cpu")
    getattr(OnMeta(on_gpu, elsewhere), method)(*calls(torch.device(device))[method])
    assert (on_gpu.asked, elsewhere.asked) == (([], [method]) if device == "cpu" else ([method], []))


def test_a_network_without_parameters_is_not_packed() -> None:
    assert AutoEngine(Recording("triton"), Recording("cpu")).prepare(nn.ReLU()) is None


def auto_of(elsewhere: Engine) -> AutoEngine:
    return AutoEngine(Recording("triton"), elsewhere)


def refiner() -> SparseRefiner:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, 2, 1)
    base = FrozenBase(LoadedModel(model, 4), config=BaseConfig(ratio=0.5))
    return SparseRefiner(base, extractor=ExtractorConfig((4, 6)), selector=Selector(0.1, 50), engine="torch").eval()


@pytest.mark.parametrize("name", ["torch", *CPU_ENGINES])
def test_a_refiner_predicts_the_same_with_auto(name: str) -> None:
    chosen, image = engine_of(name), torch.rand(2, 3, 12, 16)
    one, other = refiner(), refiner()
    one.engine, other.engine = chosen, auto_of(chosen)
    with torch.no_grad():
        expected, actual = one(image), other(image)
    assert torch.equal(actual.refined_logits, expected.refined_logits)
    assert torch.equal(actual.labels(), expected.labels())
    assert len(actual.sites) == 100
    assert other.engine.plan(actual.sites.mask(), other.extractor.spec).levels[0].around.engine is chosen


def test_copies_are_made_for_where_they_are_read(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = get_engine("auto")
    assert copy.deepcopy(chosen).name == "auto"
    stored = pickle.dumps(chosen)
    without_gpu(monkeypatch)
    assert pickle.loads(stored).name in ("cpu", "torch")


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_the_cpu_engine_leaves_other_devices_to_torch(engine: str) -> None:
    chosen = engine_of(engine)
    assert chosen.on(CPU) is chosen
    assert chosen.on(CUDA).name == "torch"


@pytest.mark.parametrize("name", ["torch", "cpu-generic", "auto of torch", "auto of cpu-generic"])
def test_dense_labels_come_from_the_quickest(name: str) -> None:
    seen: list[str] = []

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.append("uncertainty")
        return uncertainty(*arguments)

    chosen = copy.copy(engine_of(name.removeprefix("auto of ")))
    uncertainty = chosen.uncertainty
    chosen.uncertainty = watched  # type: ignore[method-assign]
    logits = torch.randn(1, 3, 4, 5)
    expected = nn.functional.interpolate(logits, (9, 11), mode="bilinear").argmax(1)
    labels = dense_labels(auto_of(chosen) if name.startswith("auto") else chosen, logits, (9, 11), "logits")
    assert torch.equal(labels.long(), expected)
    assert seen == ([] if name.endswith("torch") else ["uncertainty"])
