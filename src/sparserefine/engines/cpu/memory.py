"""Memory of a network's features: one block that is kept from forward to forward, and where in it each buffer lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparserefine.sparse.fused import Program, Step

_ALIGNED = 16  # floats of a cache line


class Scratch:
    """Memory of a network's features: one block for each forward at a time, kept for the next one.

    Fresh memory costs as much time as a convolution: the kernel of the system clears every page of it.
    """

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self, floats: int) -> Iterator[Tensor]:
        """``float32 [>= floats]``, nobody else's until the end of the ``with``; then the largest block is kept."""
        with self._lock:
            block = self._idle.pop() if self._idle else None
        if block is None or block.numel() < floats:
            # NumPy asks the system for large pages, torch does not.
            block = torch.from_numpy(np.empty(floats, np.float32))
        try:
            yield block
        finally:
            with self._lock:
                self._idle = [max([block, *self._idle], key=len)]

    def clear(self) -> None:
        """Gives the kept block back to the system."""
        with self._lock:
            self._idle = []


@dataclass(frozen=True)
class Shape:
    """Of a buffer, but for the number of rows.

    Attributes:
        level: whose sites are the rows.
        channels: of a row.
        int8: ``uint8 [N + 1, C]``, rows of whole fours of channels, the last one zero: missing neighbours read it; or
            ``float32 [N, C]``.
    """

    level: int
    channels: int
    int8: bool

    def floats(self, rows: Sequence[int]) -> int:
        """Memory in float32, for so many rows of each level."""
        n = rows[self.level]
        return padded((n + 1) * self._stride // 4 if self.int8 else n * self.channels)

    def view(self, block: Tensor, start: int, rows: Sequence[int]) -> Tensor:
        """The buffer that lies in a block from ``start``."""
        n, floats = rows[self.level], block[start : start + self.floats(rows)]
        if not self.int8:
            return floats[: n * self.channels].view(n, self.channels)
        return floats.view(torch.uint8)[: (n + 1) * self._stride].view(n + 1, self._stride)[:, : self.channels]

    @property
    def _stride(self) -> int:
        return -(-self.channels // 4) * 4


class Layout:
    """Which buffers of a program share memory.

    Buffers of one shape that are not needed at the same time share a slot, and a result may take the place of the
    residual that it is added to. Slots that are not needed at the same time may overlap in memory.

    Args:
        program: whose buffers they are, but for the result.
        int8: buffers that may be rounded are of 8 bits.

    Attributes:
        shapes: of the slots.
        slot_of: slot of each buffer.
    """

    def __init__(self, program: Program, *, int8: bool) -> None:
        self.shapes: list[Shape] = []
        self.slot_of: dict[int, int] = {}
        alive: list[int] = []  # of each slot, a bit for each step
        begun: dict[int, int] = {}
        idle: dict[Shape, list[int]] = {}
        for number, step in enumerate(program.steps):
            for buffer in step.begins:
                if buffer == program.result:
                    continue
                of = program.buffers[buffer]
                shape = Shape(of.level, of.channels, int8 and of.rounded)
                slot = self._in_place(program, step, buffer, shape)
                if slot is None and idle.get(shape):
                    slot = idle[shape].pop()
                if slot is None:
                    slot = len(self.shapes)
                    self.shapes.append(shape)
                    alive.append(0)
                self.slot_of[buffer], begun[buffer] = slot, number
            taken = {self.slot_of[buffer] for buffer in step.begins if buffer != program.result}
            for buffer in step.ends:
                slot = self.slot_of[buffer]
                alive[slot] |= (2 << number) - (1 << begun[buffer])
                if slot not in taken or buffer in step.begins:
                    idle.setdefault(self.shapes[slot], []).append(slot)
        # Those that live long come first, the finer levels' before all: the deeper ones then fit into their gaps.
        order = sorted(range(len(alive)), key=lambda slot: (self.shapes[slot].level, -alive[slot].bit_count()))
        self._order = [
            (slot, [other for other in order[:place] if alive[other] & alive[slot]]) for place, slot in enumerate(order)
        ]

    def _in_place(self, program: Program, step: Step, buffer: int, shape: Shape) -> int | None:
        """The residual's slot, if this buffer may lie there."""
        residual = step.residual
        if residual is None or residual == step.source or residual not in step.ends:
            return None
        slot = self.slot_of[residual]
        taken = any(self.slot_of.get(other) == slot for other in step.begins)
        part = next(part for part in (step.raw, *step.activated) if part is not None and part.buffer == buffer)
        whole = part.stop - part.start == shape.channels
        return slot if whole and not taken and self.shapes[slot] == shape else None

    def starts(self, rows: Sequence[int]) -> tuple[list[int], int]:
        """Where each slot begins, and the end of all, in float32, for so many rows of each level."""
        starts, sizes = [0] * len(self.shapes), [shape.floats(rows) for shape in self.shapes]
        for slot, others in self._order:
            start = 0
            for begin, end in sorted((starts[other], starts[other] + sizes[other]) for other in others):
                if begin - start >= sizes[slot]:
                    break
                start = max(start, end)
            starts[slot] = start
        return starts, max((start + size for start, size in zip(starts, sizes, strict=True)), default=0)


def padded(floats: int) -> int:
    """The next multiple of a cache line."""
    return -(-floats // _ALIGNED) * _ALIGNED
