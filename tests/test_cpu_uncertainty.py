"""What the compiled kernels of uncertainty and of access to the sites promise beside values: threads, memory, refusals.

That values are those of the definitions is in ``test_conformance_uncertainty.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparserefine.engines.cpu import uncertainty as cpu
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.native.build import INSTRUCTION_SETS
from sparserefine.engines.cpu.native.library import Library, available, load
from sparserefine.images.coarse import Coarse
from sparserefine.images.upsampling import Upsampling
from support import mask_of
from test_conformance_uncertainty import coarse_of


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def library(request: pytest.FixtureRequest) -> Library:
    if request.param not in available():
        pytest.skip(f"{request.param}: not built, or this processor lacks it")
    return load(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_no_result_depends_on_the_threads(library: Library, threads: Callable[[int], None]) -> None:
    results = []
    for n in (1, 2, 3):
        threads(n)
        torch.manual_seed(0)
        tensors: list[Tensor] = []
        for upsampling in (Upsampling(), Upsampling(outputs="scores")):
            for classes in (2, 19):
                logits = coarse_of(classes, (30, 150), upsampling)
                tensors += cpu.uncertainty(library, Coarse(logits, (140, 590), upsampling))
                coords = mask_of("random", (140, 590)).nonzero().int()
                tensors.append(cpu.sample(library, Coarse(logits, (140, 590), upsampling), coords))
        image = torch.randint(0, 256, (1, 3, 140, 590), dtype=torch.uint8)
        tensors.append(cpu.gather_normalised(library, image, coords, torch.rand(3), torch.rand(3)))
        cpu.scatter_argmax(library, tensors[-2], coords, tensors[3])
        results.append(tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("classes", [2, 19, 300])
def test_scratch_is_small(library: Library, classes: int) -> None:
    """Bytes of a thread, whatever the image's size."""
    assert 4 * cpu._function(library, "sr_uncertainty_scratch")(classes) < (200_000 if classes > 100 else 50_000)


# ---- sites


@pytest.mark.parametrize(
    "bad",
    [(0, -1, 0), (0, 8, 0), (0, 0, -1), (0, 0, 9), (0, 2**31 - 1, 2**31 - 1), (-1, 0, 0), (2, 0, 0), (-(2**31), 0, 0)],
    ids=str,
)
def test_coords_outside_are_refused(library: Library, bad: tuple[int, int, int]) -> None:
    coords = torch.tensor([[0, 0, 0], bad, [1, 7, 8]], dtype=torch.int32)
    image = torch.rand(2, 3, 8, 9)
    calls: list[Callable[[], object]] = [
        lambda: cpu.sample(library, Coarse(image, (8, 9)), coords),
        lambda: cpu.gather_normalised(library, image, coords, torch.ones(3), torch.ones(3)),
        lambda: cpu.scatter_argmax(library, torch.rand(3, 4), coords, torch.zeros(2, 8, 9, dtype=torch.uint8)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"coords run from .* expected each within \[0, 0, 0\] and \[1, 7, 8\]"):
            call()


def test_batches_out_of_order_are_refused(library: Library) -> None:
    coords = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="ascending"):
        cpu.sample(library, Coarse(torch.rand(2, 3, 4, 4), (8, 9)), coords)


# ---- refusals

IMAGE = torch.rand(2, 3, 8, 9)
COORDS = torch.zeros(4, 3, dtype=torch.int32)
LABELS = torch.zeros(2, 8, 9, dtype=torch.uint8)
ONES = torch.ones(3)
ON_CPU, ON_META = (Coarse(image, (8, 9)) for image in (IMAGE, IMAGE.to("meta")))
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "meta logits": ("uncertainty", (ON_META,), "on meta, contiguous; expected contiguous torch.float32 on the CPU"),
    "sample: int64 coords": ("sample", (ON_CPU, COORDS.long()), "coords are torch.int64 .* expected int32"),
    "sample: coords [N, 2]": ("sample", (ON_CPU, COORDS[:, :2]), r"\(4, 2\) on cpu, expected int32 \[N, 3\]"),
    "sample: coords elsewhere": ("sample", (ON_CPU, COORDS.to("meta")), r"on meta, expected int32"),
    "gather: [C, H, W]": ("gather_normalised", (IMAGE[0], COORDS, ONES, ONES), r"expected \[B, C, H, W\]"),
    "gather: float64": ("gather_normalised", (IMAGE.double(), COORDS, ONES, ONES), "image is torch.float64"),
    "gather: strided": ("gather_normalised", (IMAGE[..., ::2], COORDS, ONES, ONES), "not contiguous"),
    "gather: scale": ("gather_normalised", (IMAGE, COORDS, ONES[:2], ONES), r"scale \(2,\), .* expected .* \[C\]"),
    "gather: shift": ("gather_normalised", (IMAGE, COORDS, ONES, ONES.double()), "shift is torch.float64"),
    "scatter: rows": ("scatter_argmax", (torch.rand(5, 3), COORDS, LABELS), r"logits are \(5, 3\) for 4 sites"),
    "scatter: no class": ("scatter_argmax", (torch.rand(4, 0), COORDS, LABELS), r"logits are \(4, 0\)"),
    "scatter: half": ("scatter_argmax", (torch.rand(4, 3).half(), COORDS, LABELS), "logits is torch.float16"),
    "scatter: int64": ("scatter_argmax", (torch.rand(4, 3), COORDS, LABELS.long()), "labels are torch.int64"),
    "scatter: 300": ("scatter_argmax", (torch.rand(4, 300), COORDS, LABELS), "expected torch.int16"),
    "scatter: strided": ("scatter_argmax", (torch.rand(4, 3), COORDS, LABELS[..., ::2]), "not contiguous"),
}
"""What would make a kernel read or write where nothing is. Checked in Python: the instruction set does not matter."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        getattr(cpu, name)(load(available()[0]), *arguments)


def test_where_a_gradient_is_wanted_torch_computes(library: Library) -> None:
    engine, logits = CpuEngine(library.name), IMAGE.clone().requires_grad_()
    engine.sample(Coarse(logits, (16, 18)), COORDS).sum().backward()
    assert logits.grad is not None
