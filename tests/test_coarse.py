"""What the base said, checked once when it is made; and what is read with it at the sites."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.images.coarse import MAX_CLASSES, Coarse
from sparserefine.images.upsampling import Axis, Upsampling, Window
from sparserefine.sparse import PaddedSites, Sites
from sparserefine.stages.gather import pixels, sample

IMAGE = torch.rand(2, 3, 8, 9)
SIZE = (16, 18)


def test_what_it_says() -> None:
    coarse = Coarse(IMAGE, SIZE)
    assert (coarse.batch, coarse.num_classes, coarse.device) == (2, 3, IMAGE.device)
    assert coarse.upsampling == Upsampling()
    several = Coarse([IMAGE[0], IMAGE[1, :, 1:]], SIZE)
    assert (several.batch, several.num_classes) == (2, 3)


def test_axes() -> None:
    assert Coarse(IMAGE, SIZE).axes(1) == (Axis(16, 8, 16.0), Axis(18, 9, 18.0))
    windows = [Window((1.5, 2)), Window((40, 50.5), (3, -4))]
    assert Coarse(IMAGE, SIZE, windows=windows).axes(1) == (Axis(16, 8, 40.0, 3.0), Axis(18, 9, 50.5, -4.0))
    nearest = Upsampling("nearest", input_size=(4, 5))
    assert Coarse(IMAGE, SIZE, nearest).axes(0) == (Axis(16, 8, 16.0, 0.0, 4), Axis(18, 9, 18.0, 0.0, 5))


def test_what_was_checked_does_not_change() -> None:
    logits, windows = [*IMAGE], [Window((8, 9))] * 2
    coarse = Coarse(logits, SIZE, windows=windows)
    logits.clear()
    windows.clear()
    assert coarse.batch == len(coarse.windows or ()) == 2


def test_values_are_not_looked_at() -> None:
    """For that the host would wait for a GPU. A tensor on ``meta`` has none."""
    Coarse(torch.full((1, 3, 2, 2), math.nan), SIZE)
    assert Coarse(IMAGE.to("meta"), SIZE).device.type == "meta"


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "integers": ((IMAGE.int(), SIZE), "logits are torch.int32, expected floating-point logits, not labels"),
    "one image": ((IMAGE[0], SIZE), r"logits are \(3, 8, 9\), expected \[B, K, h, w\], or B times \[K, h, w\]"),
    "images with a batch": (([IMAGE, IMAGE], SIZE), r"\(2, 3, 8, 9\), expected \[K, h, w\]"),
    "no image": ((IMAGE[:0], SIZE), "of no image"),
    "empty list": (([], SIZE), "of no image"),
    "no class": ((IMAGE[:, :0], SIZE), r"\(0, 8, 9\), expected"),
    "no coarse pixel": ((IMAGE[..., :0], SIZE), r"\(3, 8, 0\), expected"),
    "too many classes": ((torch.zeros(1, MAX_CLASSES + 1, 1, 1), SIZE), "32767"),
    "classes that differ": (([IMAGE[0], IMAGE[0, :2]], SIZE), r"\(2, 8, 9\), expected .* the same K"),
    "an integer among them": (([IMAGE[0], IMAGE[0].int()], SIZE), "torch.int32"),
    "devices that differ": (([IMAGE[0], IMAGE[0].to("meta")], SIZE), "are on meta, those of the first image on cpu"),
    "no pixel": ((IMAGE, (0, 9)), r"size = \(0, 9\)"),
    "three sizes": ((IMAGE, (3, 8, 9)), r"size = \(3, 8, 9\)"),
    "windows missing": ((IMAGE, SIZE, Upsampling(), [Window((8, 9))]), "1 windows .* 2 images"),
    "window without end": ((IMAGE[:1], SIZE, Upsampling(), [Window((math.inf, 9))]), "expected finite numbers"),
    "window of no number": ((IMAGE[:1], SIZE, Upsampling(), [Window((8, 9), (math.nan, 0))]), "expected finite"),
    "window of nothing": ((IMAGE[:1], SIZE, Upsampling(), [Window((8, 0))]), "above 0 pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        Coarse(*arguments)


@pytest.mark.parametrize("input_size", [(0, 4), (4,)], ids=str)
def test_nearest_needs_a_whole_input(input_size: Any) -> None:
    with pytest.raises(ValueError, match=r"input_size = .* at least 1 pixel"):
        Upsampling("nearest", input_size=input_size)


# ---- at the sites

COORDS = torch.zeros(4, 3, dtype=torch.int32)
SITES = Sites(COORDS, 2, *SIZE)
ONES = torch.ones(3)
TORCH = get_engine("torch")


@pytest.mark.parametrize("coords", [COORDS.long(), COORDS[:, :2], COORDS[0]], ids=["int64", "[N, 2]", "[3]"])
def test_sites_are_int32_rows_of_three(coords: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int32 \[N, 3\]"):
        Sites(coords, 2, *SIZE)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        (Sites(COORDS, 1, *SIZE), r"\[2, 16, 18\] on cpu, the sites are of \[1, 16, 18\]"),
        (Sites(COORDS, 2, 16, 17), r"the sites are of \[2, 16, 17\]"),
        (Sites(COORDS.to("meta"), 2, *SIZE), "on meta; expected the same"),
    ],
    ids=["batch", "size", "device"],
)
def test_sites_of_other_images(sites: Sites, words: str) -> None:
    with pytest.raises(ValueError, match=f"coarse logits .*{words}"):
        sample(Coarse(IMAGE, SIZE), sites, TORCH)
    with pytest.raises(ValueError, match=f"image .*{words}"):
        pixels(torch.zeros(2, 3, *SIZE), sites, ONES, ONES, TORCH)


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (ONES[:2], ONES, r"scale is torch.float32 \(2,\), expected float32 \[3\]"),
        (ONES, ONES.double(), "shift is torch.float64"),
    ],
    ids=["scale", "shift"],
)
def test_factors_of_other_channels(scale: Tensor, shift: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(torch.zeros(2, 3, *SIZE), SITES, scale, shift, TORCH)


def test_padding_is_not_written() -> None:
    """The definition; engine ``triton`` does it without asking how many rows are in use."""
    coords = torch.tensor([[0, 1, 1], [0, 2, 3], [0, 0, 0]], dtype=torch.int32)
    sites = PaddedSites(Sites(coords, 1, 4, 5), torch.tensor([2], dtype=torch.int32))
    labels = torch.full((1, 4, 5), 9, dtype=torch.uint8)
    TORCH.write_labels(labels, torch.eye(3), sites)
    expected = torch.full((4, 5), 9, dtype=torch.uint8)
    expected[1, 1], expected[2, 3] = 0, 1
    assert torch.equal(labels[0], expected)
    assert torch.equal(sites.first(2).coords, coords[:2])
