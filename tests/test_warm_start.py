"""A refiner that starts from the weights of another one, with the same classes or with others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from projects import train, write_short_project
from sparserefine import BaseConfig, EnsemblerConfig, ExtractorConfig, FrozenBase, RefinerConfig, SparseRefiner
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.stages.extractor import PRESETS

TINY = ExtractorConfig(planes=(4, 6), features=("rgb", "probabilities", "entropy"))


def refiner_of(num_classes: int, seed: int, extractor: ExtractorConfig = TINY, **settings: Any) -> SparseRefiner:
    base = FrozenBase(nn.Conv2d(3, num_classes, 1), num_classes, BaseConfig(ratio=0.5))
    torch.manual_seed(seed)
    refiner = SparseRefiner(base, RefinerConfig(extractor=extractor, **settings), engine="torch")
    for parameter in refiner.trained_parameters():  # none is zero, so that none is alike by chance
        nn.init.normal_(parameter)
    return refiner


@pytest.fixture
def former(tmp_path: Path) -> tuple[SparseRefiner, Path]:
    refiner = refiner_of(3, seed=1)
    refiner.save_pretrained(tmp_path / "former")
    return refiner, tmp_path / "former"


def copies(refiner: SparseRefiner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in refiner.trained_state().items()}


def test_the_same_classes_take_everything(former: tuple[SparseRefiner, Path]) -> None:
    refiner = refiner_of(3, seed=2)
    report = refiner.start_from(former[1])
    state, expected = refiner.trained_state(), former[0].trained_state()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert str(report) == f"init {former[1]}: all {len(expected)} tensors taken"


def test_other_classes_take_what_does_not_depend_on_them(former: tuple[SparseRefiner, Path]) -> None:
    refiner = refiner_of(5, seed=2)
    before, there = copies(refiner), former[0].trained_state()
    report = refiner.start_from(former[1])
    anew = ("extractor.stem.", "extractor.head.", "ensembler.gate.", "ensembler.fuser.")
    for name, tensor in refiner.trained_state().items():
        if name == "extractor.stem.weight":  # rgb, probabilities, entropy
            assert torch.equal(tensor[:, :3], there[name][:, :3])
            assert torch.equal(tensor[:, 3:8], before[name][:, 3:8])
            assert torch.equal(tensor[:, 8:], there[name][:, 6:])
        else:
            assert torch.equal(tensor, before[name] if name.startswith(anew) else there[name]), name
    parts = ", ".join(f"{part} (3 -> 5 classes)" for part in ("stem", "head", "gate", "fuser"))
    total = len(before)
    # One tensor of the stem, two of the head, four of each perceptron.
    assert str(report) == f"init {former[1]}: {total - 11} of {total} tensors taken; new: {parts}"


def test_the_stem_of_pixels_alone_is_taken_whole() -> None:
    """The refiner in the package, for 11 classes."""
    refiner = refiner_of(11, seed=2, extractor=replace(PRESETS["slim"], context=True))
    stem = refiner.extractor.stem.weight.clone()
    report = refiner.start_from("demo")
    assert not torch.equal(refiner.extractor.stem.weight, stem)
    parts = ("head", "context", "gate", "fuser")
    assert report.new == tuple(f"{part} (2 -> 11 classes)" for part in parts)
    assert str(report).startswith(f"init demo: {report.total - 18} of {report.total} tensors taken; new: head (2 ->")


@pytest.mark.parametrize(
    ("here", "new"),
    [
        (EnsemblerConfig(fuser="paper"), ("fuser (residual -> paper)",)),
        (EnsemblerConfig("mean"), ()),
    ],
)
def test_other_ensemblers(former: tuple[SparseRefiner, Path], here: EnsemblerConfig, new: tuple[str, ...]) -> None:
    """A fuser of another kind has the same shapes and another meaning."""
    refiner = refiner_of(3, seed=2, ensembler=here)
    before = copies(refiner)
    assert refiner.start_from(former[1]).new == new
    for name, tensor in refiner.trained_state().items():
        expected = before if name.startswith("ensembler.fuser.") else former[0].trained_state()
        assert torch.equal(tensor, expected[name])


def test_an_ensembler_that_was_not_there_begins_anew(tmp_path: Path) -> None:
    refiner_of(3, seed=1, ensembler=EnsemblerConfig("mean")).save_pretrained(tmp_path)
    report = refiner_of(3, seed=2).start_from(tmp_path)
    assert report.new == ("gate (not there before)", "fuser (not there before)")


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("planes", (4, 8), r"extractor\.planes = \[4, 6\], this configuration has \[4, 8\]"),
        ("blocks", 2, r"extractor\.blocks = 1, this configuration has 2"),
        ("down", "paper", r"extractor\.down = cell, this configuration has paper"),
        ("features", ("rgb",), r"extractor\.features = \['rgb', 'probabilities', 'entropy'\], this configuration has"),
    ],
)
def test_other_extractors_are_refused(former: tuple[SparseRefiner, Path], field: str, value: Any, shown: str) -> None:
    refiner = refiner_of(3, seed=2, extractor=replace(TINY, **{field: value}))
    before = copies(refiner)
    with pytest.raises(ValueError, match=rf"former: was trained with {shown}.* or another training\.init"):
        refiner.start_from(former[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in refiner.trained_state().items())


@torch.no_grad()
def test_context_that_was_not_there_begins_as_none(former: tuple[SparseRefiner, Path]) -> None:
    """The refiner with context is at first the one without."""
    base, config = former[0].base, former[0].config
    refiner = SparseRefiner(base, replace(config, extractor=replace(TINY, context=True)), engine="torch").eval()
    assert refiner.start_from(former[1]).new == ("context (not there before)",)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(refiner(image).sparse_logits, former[0].eval()(image).sparse_logits)


def test_context_for_other_classes_begins_anew(tmp_path: Path) -> None:
    extractor = replace(TINY, context=True)
    refiner_of(3, seed=1, extractor=extractor).save_pretrained(tmp_path)
    refiner = refiner_of(5, seed=2, extractor=extractor)
    before = copies(refiner)
    assert "context (3 -> 5 classes)" in refiner.start_from(tmp_path).new
    found = {name: tensor for name, tensor in refiner.trained_state().items() if ".context." in name}
    assert len(found) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    with pytest.raises(ValueError, match=r"extractor\.context = True, this configuration has False"):
        refiner_of(3, seed=2).start_from(tmp_path)


def test_other_normalisation_is_said(former: tuple[SparseRefiner, Path], caplog: pytest.LogCaptureFixture) -> None:
    refiner_of(3, seed=2, mean=(0.5, 0.5, 0.5)).start_from(former[1])
    assert "was trained with mean = [0.485, 0.456, 0.406], this configuration has [0.5, 0.5, 0.5]" in caplog.text
    assert "std" not in caplog.text


def test_ranges_for_8_bits_are_not_taken(former: tuple[SparseRefiner, Path]) -> None:
    """Neither those of the stored refiner nor those that were measured here."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    former[0].quantize([image])
    former[0].save_pretrained(former[1])
    refiner = refiner_of(3, seed=2)
    refiner.quantize([image])
    assert any(name.endswith("input_max") for name in refiner.trained_state())
    refiner.start_from(former[1])
    assert not any(name.endswith("input_max") for name in refiner.trained_state())


def test_weights_that_do_not_fit_their_own_configuration_are_refused(former: tuple[SparseRefiner, Path]) -> None:
    config = json.loads((former[1] / "config.json").read_text())
    config["extractor"]["planes"] = [4, 8]
    (former[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit its network"):
        refiner_of(3, seed=2, extractor=replace(TINY, planes=(4, 8))).start_from(former[1])


@pytest.mark.slow
def test_a_run_says_what_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train(out="first") == 0
    steps = ["--training.steps", "2"]
    (tmp_path / "data" / "classes.txt").write_text("ground\nline\nroad\n")
    save_unet(UNet(3, (4, 8)), tmp_path / "three.safetensors")
    init = ["--base.name", "unet:three.safetensors", "--training.init", "first/best", *steps]
    assert train(*init, out="second") == 0
    line = "tensors taken; new: head (2 -> 3 classes), gate (2 -> 3 classes), fuser (2 -> 3 classes)"
    assert line in caplog.text
    assert json.loads((tmp_path / "second" / "run.json").read_text())["starts"][0]["init"].endswith(line)
    assert train(*init, "--extractor.planes", "[8, 8]", out="third") == 1
    assert "extractor.planes = [8, 16], this configuration has [8, 8]" in capsys.readouterr().err
