"""The convolutions of a sparse U-Net, with their operations and least traffic: lower bounds on their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from benchmarks.gpu.device import ITEM_BYTES
from sparserefine.sparse import Plan, SparseUNet, Stencil
from sparserefine.sparse.fused import Kind, fuse


@dataclass(frozen=True)
class Layer:
    """One convolution as the packed network runs it.

    Attributes:
        kind: kind of stencil.
        depth: level; for ``down`` and ``up`` the finer of the two.
        rows_in: N_in.
        rows_out: N_out.
        c_in: input channels.
        c_out: output channels.
        kernel: T, number of taps of the weight.
        taps: taps that reach one output: all of them, except in up-sampling, where it is 9/4 on average for 3x3 and
            1 for 2x2.
        written: copies of the outputs that are written: raw for the residual, and activated for each normalisation.
        residual: whether a tensor of the outputs' shape is added.
        float_out: whether outputs are float32 for any type of input, as logits are.
    """

    kind: Kind
    depth: int
    rows_in: int
    rows_out: int
    c_in: int
    c_out: int
    kernel: int
    taps: float
    written: int = 1
    residual: bool = False
    float_out: bool = False

    @property
    def macs(self) -> float:
        """Multiply-accumulates. Missing neighbours count, because the kernels multiply their zeros too."""
        return self.rows_out * self.taps * self.c_in * self.c_out

    def bytes(self, item: int, *, tables: bool = True) -> float:
        """Least traffic [bytes]: reads inputs, residual, weights and table once, writes each copy of the outputs once.

        Args:
            item: bytes of a feature or weight.
            tables: whether neighbours are read from a table, 4 bytes for each tap and output.
        """
        out = self.rows_out * self.c_out * (4 if self.float_out else item)
        moved = item * (self.rows_in * self.c_in + self.kernel * self.c_in * self.c_out) + self.written * out
        table = 4 * self.taps * self.rows_out if tables and self.kind != "own" else 0
        return moved + table + (out if self.residual else 0)


@dataclass(frozen=True)
class Floor:
    """Lower bound on the time of a computation.

    Attributes:
        operations_ms: time of its operations at the measured rate of matrix products [ms].
        bytes_ms: time of its least traffic at the measured rate of a copy [ms].
    """

    operations_ms: float
    bytes_ms: float

    @property
    def ms(self) -> float:
        """The larger of both."""
        return max(self.operations_ms, self.bytes_ms)


def layers(network: SparseUNet, counts: Sequence[int]) -> list[Layer]:
    """All convolutions of a forward, in order.

    Args:
        network: the network.
        counts: number of sites at each level, full size first.
    """
    program, weights = fuse(network)
    found = []
    for step, own in zip(program.steps, weights, strict=True):
        kernel, c_in, c_out = own.weight.shape
        read = {"down": step.level - 1, "up": step.level + 1}.get(step.kind, step.level)
        reach = kernel / 4 if step.kind == "up" else kernel
        out = Layer(step.kind, step.finer, counts[read], counts[step.level], c_in, c_out, kernel, reach)
        written = (step.raw is not None) + len(step.activated)
        logits = step.raw is not None and step.raw.buffer == program.result
        found.append(replace(out, written=written, residual=step.residual is not None, float_out=logits))
    return found


def distinct(found: Sequence[Layer]) -> list[Layer]:
    """One layer for each combination of stencil and channels, which is all that kernels distinguish."""
    return list({(one.kind, one.depth, one.c_in, one.c_out): one for one in reversed(found)}.values())[::-1]


def stencil_of(layer: Layer, plan: Plan) -> Stencil:
    """The stencil of a layer; for ``own``, which reads no table, the one with the same rows."""
    level = plan.levels[layer.depth]
    if layer.kind in ("around", "own"):
        return level.around
    assert level.down is not None
    return level.down if layer.kind == "down" else level.down.transposed()


def table_arguments(layer: Layer, stencil: Stencil) -> dict[str, Tensor | None]:
    """Arguments ``table`` and ``order`` of ``sparserefine.engines.triton.convolution.convolve``."""
    own = layer.kind == "own"
    return {"table": None if own else stencil.table, "order": None if own else getattr(stencil, "order", None)}


def floor_of(
    found: Sequence[Layer], dtype: str, ceilings: Mapping[str, float], *, tables: bool = True, passes: int = 1
) -> Floor:
    """Lower bound of these layers run one after the other.

    Args:
        found: the layers, from :func:`layers`.
        dtype: one of :data:`benchmarks.gpu.device.DTYPES`.
        ceilings: measured rates: ``copy`` [GB/s], and matrix products of each dtype [TFLOP/s].
        tables: see :meth:`Layer.bytes`.
        passes: 1 for a forward; 3 for a training step, as each of the two gradients costs as much as the forward.
    """
    operations = 2 * sum(one.macs for one in found)
    moved = sum(one.bytes(ITEM_BYTES[dtype], tables=tables) for one in found)
    return Floor(passes * operations / ceilings[dtype] * 1e-9, passes * moved / ceilings["copy"] * 1e-6)
