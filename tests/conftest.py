"""What every test starts from: the same random numbers, whatever ran before it, and one thread."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: on a busy machine, waiting for a second thread is most of the time


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
