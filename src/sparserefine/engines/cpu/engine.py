"""The CPU engine: compiled kernels for float32 on the CPU. It inherits everything else from the torch engine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sparserefine.engines.cpu import uncertainty as fused
from sparserefine.engines.cpu.context import block_means
from sparserefine.engines.cpu.gate import gated
from sparserefine.engines.cpu.geometry import build_grid_plan
from sparserefine.engines.cpu.kernels import kernels
from sparserefine.engines.cpu.network import PackedNetwork
from sparserefine.engines.cpu.perceptron import perceptron
from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.images.coarse import Coarse
from sparserefine.sparse.interface import Perceptron, Unavailable
from sparserefine.sparse.plan import Plan, PlanSpec
from sparserefine.sparse.quantisation import is_calibrated
from sparserefine.sparse.sites import PaddedSites, Sites
from sparserefine.sparse.unet import SparseUNet, is_packable

_SAMPLED_VALUES = 64  # how many values of each parameter are compared, at least


class CpuEngine(TorchEngine):
    """Engine ``cpu``. Tensors on other devices or of other dtypes than float32 fall back to the torch engine.

    Args:
        instruction_set: ``avx512``, ``avx2`` or ``generic``; default: the best one that this processor runs.

    Raises:
        sparserefine.sparse.interface.Unavailable: the kernels were not built or do not run on this machine.
    """

    name = "cpu"
    int8 = False

    def __init__(self, instruction_set: str | None = None) -> None:
        self.kernels = kernels(instruction_set)
        self._packed: weakref.WeakKeyDictionary[SparseUNet, tuple[object, Tensor, PackedNetwork]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[type[CpuEngine], tuple[str]]:
        return type(self), (self.kernels.library.name,)  # for copy and pickle, which leave packed weights out

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """The plan of the sites. Its tables are made when first read."""
        if sites.coords.device.type != "cpu":
            return super().geometry(sites, spec)
        return build_grid_plan(sites, spec, self.name, self.kernels)

    def prepare(self, network: torch.nn.Module) -> PackedNetwork | None:  # type: ignore[override]
        """The packed network, or ``None`` if the network cannot be packed. Repacked only when parameters changed.

        Packs a :class:`SparseUNet` in evaluation mode, float32 on the CPU. Changes are detected by the address, version
        and a sample of the values of each parameter. Networks made in inference mode are not packed (their tensors have
        no version), nor are networks with hooks (a packed network would not call them).
        """
        if not is_packable(network):
            return None
        tensors = [*network.parameters(), *network.buffers()]
        if any(t.device.type != "cpu" or t.is_inference() for t in tensors):
            return None
        if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
            return None
        # Running statistics change without a new version, but the batch counter next to them gets one.
        state = tuple((t.data_ptr(), t._version) for t in tensors)
        # Writing through `.data`, as older optimisers and weight averages do, changes no version: compare some values.
        with torch.no_grad():
            sample = torch.cat([t.flatten()[:: max(1, t.numel() // _SAMPLED_VALUES)].float() for t in tensors])
        known = self._packed.get(network)
        if known is None or known[0] != state or not torch.equal(known[1], sample):
            known = (state, sample, PackedNetwork(network, self.kernels, int8=self.int8))
            self._packed[network] = known
        return known[2]

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy [nats] at full size, in one pass."""
        if _supported(*coarse.logits):
            return fused.uncertainty(self.kernels.library, coarse)
        return super().uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at the sites, ``float32 [N, K]``."""
        if _supported(*coarse.logits):
            return fused.sample(self.kernels.library, coarse, coords)
        return super().sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""
        if _supported(image, scale, shift) and image.dtype in (torch.uint8, torch.float32):
            return fused.gather_normalised(self.kernels.library, image.contiguous(), coords, scale, shift)
        return super().pixels(image, coords, scale, shift)

    def block_means(
        self,
        image: Tensor,
        coarse: Coarse,
        valid: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        cells: Sequence[Sites | PaddedSites],
    ) -> list[Tensor]:
        """What the cells of each level see; pixels of blocks without a cell are not looked at."""
        coords = [sites.coords for sites in cells if isinstance(sites, Sites)]
        fits = len(coords) == len(cells) and _supported(image, scale, shift, *coords, *coarse.logits)
        if not fits or image.dtype not in (torch.uint8, torch.float32):
            return super().block_means(image, coarse, valid, scale, shift, cells)
        valid = None if valid is None else valid.contiguous()
        return block_means(self.kernels.library, image.contiguous(), coarse, valid, scale, shift, coords)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """The result of :class:`sparserefine.stages.ensembler.GatedEnsembler`; ``None`` if no kernel applies."""
        tensors = (coarse, sparse, *gate, *fuser)
        if not _supported(*tensors) or any(t.dtype != torch.float32 for t in tensors):
            return None
        return gated(self.kernels.library, coarse.contiguous(), sparse.contiguous(), gate, fuser, residual)

    def perceptron(self, x: Tensor, weights: Perceptron) -> Tensor | None:
        """The perceptron of the columns of ``x [I, N]``, with gradients; ``None`` if no kernel applies."""
        if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in (x, *weights)):
            return None
        return perceptron(self.kernels.library, x, weights)

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """Writes the class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites.

        If several logits are equal, the first class wins.
        """
        if isinstance(sites, Sites) and _supported(labels, logits) and logits.dtype == torch.float32:
            fused.scatter_argmax(self.kernels.library, logits.detach().contiguous(), sites.coords, labels)
        else:
            super().write_labels(labels, logits, sites)


class Int8Engine(CpuEngine):
    """Engine ``cpu-int8``: like ``cpu``, with calibrated networks in 8 bits (:mod:`sparserefine.sparse.quantisation`).

    Raises:
        sparserefine.sparse.interface.Unavailable: engine ``cpu`` is, or the processor has no AVX-512 VNNI.
    """

    name, int8 = "cpu-int8", True

    def __init__(self, instruction_set: str | None = None) -> None:
        super().__init__(instruction_set)
        if not self.kernels.has_int8:
            raise Unavailable(f"{self.kernels.library.name} on this processor has no 8-bit products (AVX-512 VNNI)")

    def prepare(self, network: torch.nn.Module) -> PackedNetwork | None:  # type: ignore[override]
        """Like :meth:`CpuEngine.prepare`.

        Raises:
            ValueError: the network is not calibrated.
        """
        if is_packable(network) and not is_calibrated(network):
            raise ValueError(
                "engine 'cpu-int8' needs a quantized refiner: run `sparserefine quantize`, or refiner.quantize(images)"
            )
        return super().prepare(network)


def _supported(*tensors: Tensor) -> bool:
    """Whether the compiled kernels support these tensors: on the CPU, and no gradient is required."""
    return all(t.device.type == "cpu" and not (t.requires_grad and torch.is_grad_enabled()) for t in tensors)
