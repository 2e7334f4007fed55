"""The CPU engine: compiled kernels for float32 on the CPU; what it lacks it inherits from the torch engine."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from sparserefine.sparse.cpu.convolution import convolve
from sparserefine.sparse.cpu.geometry import Across, Around, build_grid_plan
from sparserefine.sparse.cpu.kernels import kernels
from sparserefine.sparse.cpu.network import PackedUNet
from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import Sites
from sparserefine.sparse.torch_engine import TorchEngine
from sparserefine.sparse.unet import SparseUNet


class CpuEngine(TorchEngine):
    """Engine ``cpu``. Tensors of other devices and other dtypes than float32 go to the torch engine's code.

    Args:
        instruction_set: ``avx512``, ``avx2`` or ``generic``; by default the best one that runs here.

    Raises:
        sparserefine.native.library.Unavailable: the kernels were not built or do not run here.
    """

    name = "cpu"

    def __init__(self, instruction_set: str | None = None) -> None:
        self.kernels = kernels(instruction_set)
        self._packed: weakref.WeakKeyDictionary[SparseUNet, tuple[object, PackedUNet]] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: object) -> CpuEngine:
        return CpuEngine(self.kernels.library.name)

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """Plan of the sites; its tables are made when they are first read."""
        if sites.coords.device.type != "cpu":
            return super().geometry(sites, spec)
        return build_grid_plan(sites, spec, self, self.kernels)

    def conv(self, x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
        """``[N_in, C_in]``, ``[T, C_in, C_out]`` -> ``[N_out, C_out]``, differentiable in ``x`` and ``weight``."""
        if x.dtype == torch.float32 and x.device.type == "cpu" and isinstance(stencil, Around | Across):
            return convolve(x, weight, stencil, self.kernels.library.name)
        return super().conv(x, weight, stencil)

    def prepare(self, network: torch.nn.Module) -> PackedUNet | None:  # type: ignore[override]
        """The network packed, once for as long as its parameters stay what they are; ``None`` for what is not packed.

        Packed is :class:`SparseUNet` in evaluation mode, float32 on the CPU. Parameters are watched by their address
        and version; tensors made in inference mode have no version, so networks made there are not packed.
        """
        if type(network) is not SparseUNet or network.training:
            return None
        tensors = [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]
        if any(t.dtype != torch.float32 or t.device.type != "cpu" or t.is_inference() for t in tensors):
            return None
        state = tuple((t.data_ptr(), t._version) for t in tensors)
        known = self._packed.get(network)
        if known is None or known[0] != state:
            known = (state, PackedUNet(network, self.kernels))
            self._packed[network] = known
        return known[1]
