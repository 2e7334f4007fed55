"""The CPU engine: compiled kernels for float32 on the CPU; what it lacks it inherits from the torch engine."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from sparserefine.engines.cpu import uncertainty as fused
from sparserefine.engines.cpu.convolution import convolve
from sparserefine.engines.cpu.gate import gated
from sparserefine.engines.cpu.geometry import Across, Around, build_grid_plan
from sparserefine.engines.cpu.kernels import kernels
from sparserefine.engines.cpu.network import PackedUNet
from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.images.coarse import Coarse
from sparserefine.sparse.interface import Engine, Perceptron, Unavailable
from sparserefine.sparse.plan import Plan, PlanSpec, Stencil
from sparserefine.sparse.quantisation import is_calibrated
from sparserefine.sparse.sites import PaddedSites, Sites
from sparserefine.sparse.unet import SparseUNet, is_packable

_SAMPLE = 64  # values of each parameter that are compared


class CpuEngine(TorchEngine):
    """Engine ``cpu``. Tensors of other devices and other dtypes than float32 go to the torch engine's code.

    Args:
        instruction_set: ``avx512``, ``avx2`` or ``generic``; by default the best one that runs here.

    Raises:
        sparserefine.sparse.interface.Unavailable: the kernels were not built or do not run here.
    """

    name = "cpu"
    int8 = False

    def __init__(self, instruction_set: str | None = None) -> None:
        self.kernels = kernels(instruction_set)
        self._packed: weakref.WeakKeyDictionary[SparseUNet, tuple[object, Tensor, PackedUNet]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[type[CpuEngine], tuple[str]]:
        return type(self), (self.kernels.library.name,)  # for copy and pickle; packed weights stay here

    def on(self, device: torch.device) -> Engine:
        """This engine on the CPU, the torch engine elsewhere."""
        return self if device.type == "cpu" else TorchEngine()

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

        Packed is :class:`SparseUNet` in evaluation mode, float32 on the CPU. Parameters are watched by address, version
        and a sample of their values; tensors made in inference mode have no version: such networks are not packed, nor
        are those with hooks, which want to be called.
        """
        if not is_packable(network):
            return None
        tensors = [*network.parameters(), *network.buffers()]
        if any(t.device.type != "cpu" or t.is_inference() for t in tensors):
            return None
        if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
            return None
        # Running statistics change without a new version; the count of batches beside them has one.
        state = tuple((t.data_ptr(), t._version) for t in tensors)
        # And writing through `.data` makes no version at all; optimisers and averages of weights did so once.
        with torch.no_grad():
            sample = torch.cat([t.flatten()[:: max(1, t.numel() // _SAMPLE)].float() for t in tensors])
        known = self._packed.get(network)
        if known is None or known[0] != state or not torch.equal(known[1], sample):
            known = (state, sample, PackedUNet(network, self.kernels, int8=self.int8))
            self._packed[network] = known
        return known[2]

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy at full size, in one pass."""
        if _plain(*coarse.logits):
            return fused.uncertainty(self.kernels.library, coarse)
        return super().uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at the sites, ``float32 [N, K]``."""
        if _plain(*coarse.logits):
            return fused.sample(self.kernels.library, coarse, coords)
        return super().sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""
        if _plain(image, scale, shift) and image.dtype in (torch.uint8, torch.float32):
            return fused.gather_normalised(self.kernels.library, image.contiguous(), coords, scale, shift)
        return super().pixels(image, coords, scale, shift)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """What :class:`sparserefine.stages.ensembler.GatedEnsembler` computes; ``None`` where a gradient is wanted."""
        tensors = (coarse, sparse, *gate, *fuser)
        if not _plain(*tensors) or any(t.dtype != torch.float32 for t in tensors):
            return None
        return gated(self.kernels.library, coarse.contiguous(), sparse.contiguous(), gate, fuser, residual)

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """The first class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites."""
        if isinstance(sites, Sites) and _plain(labels, logits) and logits.dtype == torch.float32:
            fused.scatter_argmax(self.kernels.library, logits.detach().contiguous(), sites.coords, labels)
        else:
            super().write_labels(labels, logits, sites)


class Int8Engine(CpuEngine):
    """Engine ``cpu-int8``: as ``cpu``, with calibrated networks in 8 bits (:mod:`sparserefine.sparse.quantisation`).

    Raises:
        sparserefine.sparse.interface.Unavailable: as for ``cpu``, or the processor has no AVX-512 VNNI.
    """

    name, int8 = "cpu-int8", True

    def __init__(self, instruction_set: str | None = None) -> None:
        super().__init__(instruction_set)
        if not self.kernels.has_int8:
            raise Unavailable(f"{self.kernels.library.name} on this processor has no 8-bit products (AVX-512 VNNI)")

    def prepare(self, network: torch.nn.Module) -> PackedUNet | None:  # type: ignore[override]
        """As of ``cpu``.

        Raises:
            ValueError: the network is not calibrated.
        """
        if is_packable(network) and not is_calibrated(network):
            raise ValueError(
                "engine 'cpu-int8' needs a calibrated refiner: "
                "run `sparserefine calibrate`, or refiner.calibrate(images)"
            )
        return super().prepare(network)


def _plain(*tensors: Tensor) -> bool:
    """On the CPU, and no gradient is wanted of them: what the compiled kernels are for."""
    return all(t.device.type == "cpu" and not (t.requires_grad and torch.is_grad_enabled()) for t in tensors)
