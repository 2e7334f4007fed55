"""The exponential mean of the weights: its rule, when it is in use, and what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from projects import train, write_short_project
from sparserefine import BaseConfig, ExtractorConfig, FrozenBase, RefinerConfig, SparseRefiner
from sparserefine.training.averages import WeightMean
from sparserefine.training.config import TrainingConfig


@pytest.fixture
def refiner() -> SparseRefiner:
    base = FrozenBase(nn.Conv2d(3, 2, 1), 2, BaseConfig(ratio=0.5))
    return SparseRefiner(base, RefinerConfig(extractor=ExtractorConfig((4, 8))))


def fill(refiner: SparseRefiner, value: float) -> None:
    with torch.no_grad():
        for tensor in refiner.trained_state().values():
            tensor.fill_(value)


def test_the_rule_by_hand(refiner: SparseRefiner) -> None:
    mean = WeightMean(refiner, 0.2)
    expected = 0.0
    for step, value in enumerate((4.0, 8.0, 2.0), start=1):
        fill(refiner, value)
        mean.update()
        kept = min(0.2, (1 + step) / (10 + step))
        expected = value if step == 1 else kept * expected + (1 - kept) * value
    with mean.in_use():
        for name, tensor in refiner.trained_state().items():
            wanted = expected if tensor.is_floating_point() else 2  # counters are not averaged
            torch.testing.assert_close(tensor.double(), torch.full_like(tensor, wanted, dtype=torch.float64), msg=name)
    assert all((tensor == 2).all() for tensor in refiner.trained_state().values())


def test_statistics_are_averaged_and_the_base_is_not(refiner: SparseRefiner) -> None:
    mean = WeightMean(refiner, 0.5)
    mean.update()
    names = set(mean.state()["values"])
    assert any(name.endswith("running_var") for name in names)
    assert not any(name.startswith("base.") for name in names)


def test_the_state_goes_on_and_a_foreign_one_is_refused(refiner: SparseRefiner) -> None:
    first, second = WeightMean(refiner, 0.9), WeightMean(refiner, 0.9)
    fill(refiner, 1)
    first.update()
    second.load(first.state())
    fill(refiner, 3)
    for mean in (first, second):
        mean.update()
    assert first.state()["steps"] == second.state()["steps"] == 2
    for name, value in first.state()["values"].items():
        assert torch.equal(value, second.state()["values"][name])
    with pytest.raises(ValueError, match="another refiner"):
        second.load({"steps": 1, "values": {"extractor.stem.weight": torch.zeros(2)}})


def test_without_decay_nothing_happens(refiner: SparseRefiner) -> None:
    mean = WeightMean(refiner, 0.0)
    mean.update()
    assert mean.state() == {"steps": 0, "values": {}}
    fill(refiner, 2)
    with mean.in_use():
        assert all((tensor == 2).all() for tensor in refiner.trained_state().values())


@pytest.mark.slow
def test_runs_store_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps are made with and without a mean; what is stored differs, and holds the mean of the checkpoint."""
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train(out="plain") == 0
    assert train("--training.ema", "0.9", out="mean") == 0
    checkpoints = [torch.load(f"{out}/last.ckpt", weights_only=True) for out in ("plain", "mean")]
    for name, value in checkpoints[0]["state_dict"].items():
        assert torch.equal(value, checkpoints[1]["state_dict"][name]), name
    stored = load_file("mean/last/model.safetensors")
    own = load_file("plain/last/model.safetensors")
    mean = checkpoints[1]["mean"]["values"]
    assert all(torch.equal(stored[name], mean[name]) for name in stored)
    assert any(not torch.equal(stored[name], own[name]) for name in stored)


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"training\.ema"):
        TrainingConfig(ema=bad)
