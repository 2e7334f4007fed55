"""What every test starts from: the same random numbers, whatever ran before it, and one thread."""

from __future__ import annotations

import os

import pytest
import torch

from late import pytest_runtest_makereport, pytest_runtest_setup, pytest_terminal_summary  # noqa: F401 (hooks)

collect_ignore = ["compile_kernels.py"]  # a program: looking for doctests in it would import compiled kernels

torch.set_num_threads(1)  # tiny tensors: on a busy machine, waiting for a second thread is most of the time


def pytest_configure(config: pytest.Config) -> None:
    """Kernels for GPUs run on the CPU, interpreted, but for the tests of a GPU (``make test-gpu``)."""
    expression = config.option.markexpr
    if expression != "gpu" and not expression.startswith("gpu and "):
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
