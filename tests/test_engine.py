"""Which engine is picked for a device, and what is said of it."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparserefine.commands.info import info_text
from sparserefine.engines import choose as engine
from sparserefine.engines.choose import EngineChoice, engine_report, get_engine
from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.sparse import Engine
from sparserefine.sparse.interface import Unavailable
from sparserefine.studies.scoring import dense_labels
from support import engine_of, needs_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Standing(TorchEngine):
    """Stands for engine ``triton``."""

    name = "triton"


@pytest.fixture(autouse=True)
def _untold() -> Iterator[None]:
    """What is said once is said again."""
    engine._log_once.cache_clear()
    yield
    engine._log_once.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))


@pytest.fixture
def triton(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And engine ``triton`` works there."""
    monkeypatch.setattr(engine, "_load_for_gpu", Standing)


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
    assert EngineChoice().on(CPU).name == chosen.name
    assert not engine_report()["triton"].startswith("available")
    assert chosen.name in engine_report()["auto"]


def test_with_a_gpu_auto_is_one_engine_for_each(triton: None) -> None:
    chosen = EngineChoice("auto")
    assert chosen.name == "auto"
    assert get_engine("auto", "cuda").name == "triton"
    assert chosen.on(CUDA).name == "triton"
    assert chosen.on(torch.device("cuda:1")).name == "triton"
    assert chosen.on(CPU).name in ("cpu", "torch")
    assert chosen.on(torch.device("mps")).name == "torch"


def test_a_gpu_without_triton(gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engine, "_load_triton", unavailable("it broke"))
    with caplog.at_level(logging.WARNING):
        chosen = [EngineChoice("auto") for _ in range(3)]
        assert {one.on(CPU).name for one in chosen} <= {"cpu", "torch"}
        assert {one.on(CUDA).name for one in chosen} == {"torch"}
    said = [record.message for record in caplog.records if "GPU" in record.message]
    assert said == ["using engine torch on the GPU, because engine triton is not available: it broke"]
    with pytest.raises(ValueError, match="engine 'triton' cannot be used here: it broke"):
        get_engine("triton")
    assert engine_report()["triton"] == "it broke"
    assert "torch" in engine_report()["auto"]


def test_interpreted_kernels_are_not_for_a_gpu(gpu: None) -> None:
    needs_triton()
    assert get_engine("auto").name in ("cpu", "torch")
    assert get_engine("auto", "cuda").name == "torch"
    assert get_engine("triton").name == "triton"
    assert "TRITON_INTERPRET=1" in engine_report()["triton"]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    needs_triton(gpu=True)
    assert EngineChoice("auto").on(CUDA).name == "triton"
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
        ("ModuleNotFoundError(name='triton')", "triton is not installed; on Linux, it comes with torch for GPUs"),
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


# ---- choosing by device


@pytest.mark.parametrize("name", ["auto", "torch", "cpu", "triton"])
def test_each_kind_of_device_has_one_engine(name: str, triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines own packed weights, so they are kept."""
    monkeypatch.setattr(engine, "_load_triton", Standing)
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    if name == "cpu":
        engine_of("cpu-generic")
    choice = EngineChoice(name)
    assert choice.name == name
    for device in (CPU, CUDA, torch.device("mps")):
        assert choice.on(device) is choice.on(device)
    assert choice.on(CUDA) is choice.on(torch.device("cuda:1"))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_torch_engine_is_for_every_device(device: str) -> None:
    assert EngineChoice("torch").on(torch.device(device)).name == "torch"


@pytest.mark.parametrize("name", ["cpu", "cpu-int8"])
def test_the_cpu_engine_leaves_other_devices_to_torch(name: str) -> None:
    try:
        choice = EngineChoice(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert choice.on(CPU).name == name
    assert choice.on(CUDA).name == "torch"


def test_the_triton_engine_leaves_devices_without_kernels_to_torch() -> None:
    """Interpreted, kernels are for the CPU."""
    needs_triton()
    choice = EngineChoice("triton")
    assert choice.on(CPU).name == "triton"
    assert choice.on(CUDA).name == "torch"


def test_an_engine_that_was_named_must_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_load_triton", unavailable("it broke"))
    with pytest.raises(ValueError, match="engine 'triton' cannot be used here: it broke"):
        EngineChoice("triton")
    for choose in (EngineChoice, get_engine):
        with pytest.raises(ValueError, match="engine 'spconv' is not known; choose 'auto' or one of torch, cpu"):
            choose("spconv")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda choice: pickle.loads(pickle.dumps(choice))])
def test_copies_are_by_name(copier: Callable[[EngineChoice], EngineChoice]) -> None:
    choice = EngineChoice("torch")
    other = copier(choice)
    assert other is not choice
    assert other.name == "torch"
    assert other.on(CPU) is not choice.on(CPU)


def test_copies_are_made_for_where_they_are_read(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = EngineChoice("auto")
    assert choice.on(CUDA).name == "triton"
    stored = pickle.dumps(choice)
    monkeypatch.setattr(engine, "_load_for_gpu", unavailable("there is no GPU"))
    assert pickle.loads(stored).on(CUDA).name == "torch"


@pytest.mark.parametrize("name", ["torch", "cpu-generic"])
def test_dense_labels_come_from_the_quickest(name: str) -> None:
    seen: list[str] = []

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.append("uncertainty")
        return uncertainty(*arguments)

    chosen = copy.copy(engine_of(name))
    uncertainty = chosen.uncertainty
    chosen.uncertainty = watched  # type: ignore[method-assign]
    logits = torch.randn(1, 3, 4, 5)
    expected = nn.functional.interpolate(logits, (9, 11), mode="bilinear").argmax(1)
    labels = dense_labels(chosen, logits, (9, 11), "logits")
    assert torch.equal(labels.long(), expected)
    assert seen == ([] if name == "torch" else ["uncertainty"])
