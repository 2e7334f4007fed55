"""Weights of sites, and deep supervision: by their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from projects import train, write_short_project
from sparserefine.engines.choose import get_engine
from sparserefine.sparse import PlanSpec, Sites, SparseUNet
from sparserefine.training.checkpoint import read_checkpoint
from sparserefine.training.config import TrainingConfig, check_class_weights
from sparserefine.training.deep import DeepHeads, cell_shares
from sparserefine.training.soft_losses import soft_cross_entropy
from sparserefine.training.weights import SiteWeights, nearness


def test_nearness_by_hand() -> None:
    """A boundary between columns 9 and 10; column 20 is ignored, so it makes none."""
    label = torch.zeros(1, 20, 30, dtype=torch.uint8)
    label[..., 10:] = 1
    label[..., 20] = 255
    near = nearness(label)[0]
    distance = [10 - c if c < 10 else c - 9 for c in range(30)]
    expected = torch.tensor([sum(d <= ring for ring in (1, 3, 7)) / 3 for d in distance])
    torch.testing.assert_close(near, expected.expand(20, 30))


def test_weights_are_by_class_and_distance() -> None:
    label = torch.randint(0, 3, (2, 12, 14), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    label[:, 3] = 255
    sites = Sites.from_mask(torch.ones(2, 12, 14, dtype=torch.bool))
    truth = sites.gather(label[:, None])[:, 0]
    assert SiteWeights(None, 0.0).by_labels(truth, label, sites) is None
    weight = SiteWeights((1.0, 2.0, 5.0), 0.5).by_labels(truth, label, sites)
    kept = truth != 255
    by_class = torch.tensor([1.0, 2.0, 5.0])[truth[kept].long()]
    expected = by_class * (1 + 0.5 * sites.gather(nearness(label)[:, None])[:, 0][kept])
    torch.testing.assert_close(weight[kept], expected)


def test_a_teachers_weight_is_the_expected_one() -> None:
    teacher = torch.randn(7, 3)
    assert SiteWeights(None, 1.0).by_teacher(teacher) is None
    weight = SiteWeights((1.0, 0.0, 4.0), 1.0).by_teacher(teacher)
    p = teacher.softmax(1)
    torch.testing.assert_close(weight, p[:, 0] + 4 * p[:, 2])
    student = torch.randn(7, 3)
    each = -(p * student.log_softmax(1)).sum(1)
    torch.testing.assert_close(soft_cross_entropy(student, teacher, 1.0, weight), (each * weight).sum() / weight.sum())


@pytest.mark.parametrize("down", ["cell", "paper"])
def test_shares_of_cells_are_those_of_their_sites(down: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 21, 27, generator=generator) < 0.2
    plan = get_engine("torch").plan(mask, PlanSpec(3, down))
    truth = torch.randint(0, 3, (len(plan.sites),), generator=generator).to(torch.uint8)
    truth[::4] = 255
    for depth in (1, 2):
        cells = plan.levels[depth].sites
        shares, counted = cell_shares(cells, depth, plan.sites, truth, 3)
        for (b, r, c), share, there in zip(cells.coords.tolist(), shares, counted, strict=True):
            values = [
                int(value)
                for (sb, sr, sc), value in zip(plan.sites.coords.tolist(), truth, strict=True)
                if value != 255 and sb == b
                and (min(sr >> depth, cells.height - 1), min(sc >> depth, cells.width - 1)) == (r, c)
            ]  # fmt: skip
            assert bool(there) == bool(values)
            expected = torch.tensor([values.count(k) / max(1, len(values)) for k in range(3)])
            torch.testing.assert_close(share, expected)


def test_deep_heads_see_the_decoder_and_leave_no_hook() -> None:
    torch.manual_seed(0)
    network = SparseUNet(3, 2, (4, 6, 8), blocks=1, down="cell")
    mask = torch.rand(1, 30, 34) < 0.3
    plan = get_engine("torch").plan(mask, network.spec)
    heads = DeepHeads(network, 2)
    assert [head.in_features for head in heads.heads] == [6, 8]
    assert not [name for name, _ in network.named_parameters() if "heads" in name]
    with heads.watching():
        network(torch.randn(len(plan.sites), 3), plan)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    truth = torch.randint(0, 2, (len(plan.sites),))
    with torch.no_grad():
        for head in heads.heads:
            head.weight.zero_()
            head.bias.zero_()
    loss = heads.loss(truth)
    assert float(loss.detach()) == pytest.approx(0.6931, abs=1e-3)  # ln 2: the heads say nothing yet
    loss.backward()
    assert all(head.bias.grad is not None for head in heads.heads)
    with heads.watching():
        network(torch.randn(len(plan.sites), 3), plan)
    nothing = heads.loss(torch.full((len(plan.sites),), 255))
    assert float(nothing.detach()) == 0


def test_weights_of_the_wrong_length_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train("--training.class_weights", "[1, 2, 3]") == 1
    assert "3 weights for 2 classes" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_bad_weights_are_refused() -> None:
    check_class_weights(TrainingConfig(class_weights=(1.0, 0.0)), 2)
    for bad in ((-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"training\.class_weights"):
            TrainingConfig(class_weights=bad)
    assert dataclasses.replace(TrainingConfig(), boundary_weight=2.0).boundary_weight == 2


def test_boundaries_need_labels() -> None:
    assert TrainingConfig(boundary_weight=2.0, targets="both").boundary_weight == 2
    with pytest.raises(ValueError, match=r"boundary_weight = 2\.0 with training\.targets = 'teacher'"):
        TrainingConfig(boundary_weight=2.0, targets="teacher")


@pytest.mark.slow
def test_levers_change_the_run_and_not_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train(out="plain") == 0
    plain = load_file("plain/last/model.safetensors")
    for name, value in (("deep_supervision", "1"), ("class_weights", "[1, 4]"), ("boundary_weight", "3")):
        assert train(f"--training.{name}", value, out=name) == 0
        stored = load_file(f"{name}/last/model.safetensors")
        assert stored.keys() == plain.keys()
        assert any(not torch.equal(stored[key], plain[key]) for key in plain)
    assert set(read_checkpoint(Path("deep_supervision/last.ckpt"))["heads"]) == {"heads.0.weight", "heads.0.bias"}
