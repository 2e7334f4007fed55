"""Memory of a network's features: one block, reused by every forward pass, and the place of each buffer in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparserefine.sparse.fused import Program, Step

_ALIGNED = 16  # floats per cache line


class Scratch:
    """Memory of a network's features: each running forward pass has a block, and the largest is kept for the next pass.

    Fresh memory would cost as much time as a convolution, because the operating system clears every page of it.
    """

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self, floats: int) -> Iterator[Tensor]:
        """A block ``float32 [>= floats]`` for exclusive use within the ``with`` statement."""
        with self._lock:
            block = self._idle.pop() if self._idle else None
        if block is None or block.numel() < floats:
            # NumPy requests huge pages from the system, torch does not.
            block = torch.from_numpy(np.empty(floats, np.float32))
        try:
            yield block
        finally:
            with self._lock:
                self._idle = [max([block, *self._idle], key=len)]

    def clear(self) -> None:
        """Frees the kept block."""
        with self._lock:
            self._idle = []


@dataclass(frozen=True)
class Shape:
    """Shape and dtype of a buffer, without the number of rows.

    Attributes:
        level: its sites are the rows.
        channels: columns of each row.
        int8: false: ``float32 [N, C]``. True: ``uint8 [N + 1, C]`` with rows padded to a multiple of 4 channels;
            missing neighbours read the last row, which is zero.
    """

    level: int
    channels: int
    int8: bool

    def floats(self, rows: Sequence[int]) -> int:
        """Size of the buffer [floats], given the number of rows at each level."""
        n = rows[self.level]
        return padded((n + 1) * self._stride // 4 if self.int8 else n * self.channels)

    def view(self, block: Tensor, start: int, rows: Sequence[int]) -> Tensor:
        """The buffer at offset ``start`` [floats] of a block."""
        n, floats = rows[self.level], block[start : start + self.floats(rows)]
        if not self.int8:
            return floats[: n * self.channels].view(n, self.channels)
        return floats.view(torch.uint8)[: (n + 1) * self._stride].view(n + 1, self._stride)[:, : self.channels]

    @property
    def _stride(self) -> int:
        return -(-self.channels // 4) * 4


class Layout:
    """Assigns the buffers of a program to slots, and slots to memory.

    Buffers of the same shape that are never needed at the same time share a slot. A result may overwrite the residual
    that it is added to. Slots that are never needed at the same time may overlap in memory.

    Args:
        program: its buffers are assigned, except the result.
        int8: whether buffers that may be rounded have 8 bits.

    Attributes:
        shapes: shape of each slot.
        slot_of: slot of each buffer.
    """

    def __init__(self, program: Program, *, int8: bool) -> None:
        self.shapes: list[Shape] = []
        self.slot_of: dict[int, int] = {}
        alive: list[int] = []  # per slot, a bit mask of the steps in which it is used
        begun: dict[int, int] = {}
        idle: dict[Shape, list[int]] = {}
        for number, step in enumerate(program.steps):
            for buffer in step.begins:
                if buffer == program.result:
                    continue
                wanted = program.buffers[buffer]
                shape = Shape(wanted.level, wanted.channels, int8 and wanted.rounded)
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
        # Place finer levels first, and in each level the slots that live longest. Deeper levels then fit into the gaps.
        order = sorted(range(len(alive)), key=lambda slot: (self.shapes[slot].level, -alive[slot].bit_count()))
        self._order = [
            (slot, [other for other in order[:place] if alive[other] & alive[slot]]) for place, slot in enumerate(order)
        ]

    def _in_place(self, program: Program, step: Step, buffer: int, shape: Shape) -> int | None:
        """The slot of the residual, if this buffer may overwrite it."""
        residual = step.residual
        if residual is None or residual == step.source or residual not in step.ends:
            return None
        slot = self.slot_of[residual]
        taken = any(self.slot_of.get(other) == slot for other in step.begins)
        part = next(part for part in (step.raw, *step.activated) if part is not None and part.buffer == buffer)
        whole = part.stop - part.start == shape.channels
        return slot if whole and not taken and self.shapes[slot] == shape else None

    def starts(self, rows: Sequence[int]) -> tuple[list[int], int]:
        """Offset of each slot and the total size [floats], given the number of rows at each level."""
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
    """Rounds up to whole cache lines."""
    return -(-floats // _ALIGNED) * _ALIGNED
