"""What the GPU's gated ensembler takes beyond the CPU's, and what it leaves to the modules.

That values are those of the module is in ``test_conformance_gate.py``.
"""

from __future__ import annotations

import pytest
import torch

from support import TRITON_ENGINES, assert_close, device_of, needs_triton
from test_conformance_gate import ensembler_of, expected_of, logits_of, run, weights_of

# The interpreter tells of infinite values aloud.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    needs_triton(gpu=request.param == "triton-gpu")
    return device_of(request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_other_precisions_and_layouts(engine: str, dtype: torch.dtype) -> None:
    ensembler, (coarse, sparse) = ensembler_of(5).to(dtype), logits_of(40, 5)
    expected = expected_of(ensembler, coarse, sparse)
    strided = coarse.t().contiguous().t()
    assert_close(run(engine, ensembler, strided, torch.cat([sparse, sparse], 1)[:, :5]), expected)


def test_what_no_kernel_does(device: torch.device) -> None:
    from sparserefine.engines.triton.gate import MAX_CLASSES, gated

    ensembler = ensembler_of(3).to(device)
    gate, fuser = weights_of(ensembler.gate), weights_of(ensembler.fuser)
    coarse, sparse = (logits.to(device) for logits in logits_of(4, 3))
    assert gated(coarse.half(), sparse, gate, fuser, True) is None
    assert gated(coarse, sparse.double(), gate, fuser, True) is None
    assert gated(coarse.to("meta"), sparse, gate, fuser, True) is None
    assert gated(coarse.clone().requires_grad_(), sparse, gate, fuser, True) is None
    ensembler.requires_grad_()
    assert gated(coarse, sparse, gate, fuser, True) is None
    with torch.no_grad():
        assert gated(coarse, sparse, gate, fuser, True) is not None
    many = ensembler_of(MAX_CLASSES + 1).to(device)
    both = torch.zeros(4, MAX_CLASSES + 1, device=device)
    assert gated(both, both, weights_of(many.gate), weights_of(many.fuser), True) is None
