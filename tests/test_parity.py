"""Our base models give the logits of mmsegmentation's, for the same weights under its names.

What it computes is stored in ``data/parity``; ``make parity`` writes that, with mmsegmentation itself. The weights are
made anew here, from names and shapes, by the same rule as there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parity.weights import tensor, uniform
from sparserefine.bases.checkpoint import Checkpoint
from sparserefine.bases.families import hrnet, segnext

DATA = Path(__file__).parent / "data" / "parity"
BASES = "decode_head.hamburger.ham.bases"
BOUND = {torch.float32: 1e-5, torch.float64: 1e-7}
"""Of the largest logit. Those stored are float64 results, rounded by up to 6e-8; float32 itself is up to 1e-6 off."""
NAMES = ("hrnet_w48", "segnext_t", "segnext_s", "segnext_b", "segnext_l")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Tensor]], nn.Module]:
    """Makes the model of a name of ``tensors``, as out of a file of mmsegmentation that holds these."""

    def loaded(name: str, tensors: dict[str, Tensor]) -> nn.Module:
        bases = tensors.pop(BASES, None)  # no file has them: mmsegmentation draws them at each call
        for module in (hrnet, segnext):
            monkeypatch.setattr(module, "read_checkpoint", lambda path: Checkpoint(tensors, None))
        if name == "hrnet_w48":
            model = hrnet.load_hrnet_w48("a file").model
        else:
            model = segnext.load_segnext(name.removeprefix("segnext_"), "a file").model
            model.head.nmf.bases.copy_(bases)
        tensors.clear()  # a model of 66 million parameters in float64 comes next
        return model

    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_mmsegmentation(name: str, load: Callable[[str, dict[str, Tensor]], nn.Module]) -> None:
    with np.load(DATA / f"{name}.npz") as stored:
        shapes: dict[str, list[int]] = json.loads(str(stored["shapes"]))
        cases = [(stored[f"size{i}"].tolist(), torch.from_numpy(stored[f"logits{i}"])) for i in range(2)]
    model = load(name, {key: torch.from_numpy(tensor(key, shape)) for key, shape in shapes.items()})
    for dtype, checked in ((torch.float32, cases), (torch.float64, cases[1:])):  # float64 is slow
        model.to(dtype)
        for size, expected in checked:
            with torch.no_grad():
                logits = model(torch.from_numpy(uniform("image", size, -2, 2)).to(dtype))
            assert logits.shape == expected.shape
            error = float((logits - expected.double()).abs().max() / expected.abs().max())
            assert error <= BOUND[dtype], f"{dtype}, image of {size}"


def test_every_reference_is_compared() -> None:
    assert {path.stem for path in DATA.glob("*.npz")} == set(NAMES)
