"""Memory that is free but kept."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from sparserefine.machine.memory import give_back_free_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has malloc_trim")
def test_free_memory_between_memory_in_use_is_given_back():
    size = 100_000  # floats: small enough for the heap, as are the tensors of a training step
    tensors = [torch.ones(size) for _ in range(500)]
    kept = tensors[::10]  # gaps between
    del tensors
    before = psutil.Process().memory_info().rss
    assert give_back_free_memory()
    given = before - psutil.Process().memory_info().rss
    if given < 1e6:
        pytest.skip("this C library keeps nothing")
    assert given > 100e6
    assert all(bool((one == 1).all()) for one in kept)


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not give_back_free_memory()
