"""The GPU engine: kernels in Triton; what it lacks it inherits from the torch engine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.engines.triton import uncertainty as fused
from sparserefine.engines.triton.convolution import DTYPES, operands, precision_of, triton_conv
from sparserefine.engines.triton.gate import gated
from sparserefine.engines.triton.geometry import GpuStencil, build_padded_plan, build_plan
from sparserefine.engines.triton.launch import INTERPRETED, runs_on
from sparserefine.engines.triton.network import PackedUNet
from sparserefine.engines.triton.selection import keep_largest
from sparserefine.images.coarse import Coarse
from sparserefine.sparse.interface import Engine, Perceptron, Unavailable
from sparserefine.sparse.plan import PaddedPlan, Plan, PlanSpec, Stencil
from sparserefine.sparse.sites import PaddedSites, Sites
from sparserefine.sparse.unet import SparseUNet, is_packable

_OLDEST = (8, 0)
"""Compute capability, of NVIDIA's GPUs, that Triton supports."""


class TritonEngine(TorchEngine):
    """Engine ``triton``. Tensors of other devices and dtypes go to the torch engine's code.

    Raises:
        sparserefine.sparse.interface.Unavailable: there is no GPU, or it is too old.
    """

    name = "triton"

    def __init__(self) -> None:
        if not INTERPRETED:
            _check_gpu()
        self._packed: weakref.WeakKeyDictionary[SparseUNet, tuple[object, PackedUNet]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[TritonEngine], tuple[()]]:
        return type(self), ()  # for copy and pickle; packed weights stay here

    def on(self, device: torch.device) -> Engine:
        """This engine where its kernels run, else the torch engine."""
        return self if runs_on(device) else TorchEngine()

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """Plan of the sites; reads the number of sites of each level from the GPU."""
        return self.plan(sites.mask(), spec) if runs_on(sites.coords.device) else super().geometry(sites, spec)

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """Plan of the true pixels of ``mask [B, H, W]``; reads the number of sites of each level from the GPU."""
        return build_plan(mask, spec, self) if runs_on(mask.device) else super().plan(mask, spec)

    def padded_plan(self, mask: Tensor, spec: PlanSpec, capacities: Sequence[int]) -> PaddedPlan:
        """As :meth:`plan`, with as many rows at each level as ``capacities`` says; reads nothing from the GPU.

        Such plans are for packed networks (:meth:`prepare`), which stop at the number of sites that there are.
        """
        return build_padded_plan(mask, spec, self, capacities)

    def conv(self, x: Tensor, weight: Tensor, stencil: Stencil) -> Tensor:
        """``[N_in, C_in]``, ``[T, C_in, C_out]`` -> ``[N_out, C_out]``, differentiable in ``x`` and ``weight``."""
        if isinstance(stencil, GpuStencil) and stencil.count is not None:
            raise ValueError("a padded plan serves packed networks only; build one by engine.plan for single layers")
        if x.dtype in DTYPES and runs_on(x.device):
            y: Tensor = triton_conv(*operands(x, weight, stencil))
            return y
        return super().conv(x, weight, stencil)

    def prepare(self, network: torch.nn.Module) -> PackedUNet | None:  # type: ignore[override]
        """The network packed, once for as long as its parameters stay what they are; ``None`` for what is not packed.

        Packed is :class:`SparseUNet` in evaluation mode on the GPU: in the precision of autocast where that is on, else
        in its own. Parameters are watched by address and version, for looking at values would wait for the GPU: what
        is written through ``.data`` goes unnoticed. Not packed are networks made in inference mode, whose tensors have
        no version, and those with hooks, which want to be called.
        """
        if not is_packable(network):
            return None
        tensors = [*network.parameters(), *network.buffers()]
        if any(not runs_on(t.device) or t.is_inference() for t in tensors):
            return None
        dtype, device = network.stem.weight.dtype, network.stem.weight.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype not in DTYPES:
            return None
        state = (dtype, precision_of(dtype), *((t.data_ptr(), t._version) for t in tensors))
        known = self._packed.get(network)
        if known is None or known[0] != state:
            known = (state, PackedUNet(network, dtype))
            self._packed[network] = known
        return known[1]

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Clears in ``mask [B, H, W]`` all but the ``budget`` largest ``values`` of each image."""
        if runs_on(mask.device):
            keep_largest(values, mask, budget)
        else:
            super().keep_largest(values, mask, budget)

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy at full size, in one pass."""
        if fused.takes(*coarse.logits):
            return fused.uncertainty(coarse)
        return super().uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at the sites, ``float32 [N, K]``."""
        if fused.takes(coords, *coarse.logits):
            return fused.sample(coarse, coords)
        return super().sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""
        if fused.takes(image, coords, scale, shift) and image.dtype in (torch.uint8, *DTYPES):
            return fused.pixels(image, coords, scale, shift)
        return super().pixels(image, coords, scale, shift)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """What :class:`sparserefine.stages.ensembler.GatedEnsembler` computes; ``None`` where a gradient is wanted."""
        return gated(coarse, sparse, gate, fuser, residual)

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """The first class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites."""
        if fused.takes(labels, logits) and logits.dtype in DTYPES:
            fused.write_labels(labels, logits, sites)
        else:
            super().write_labels(labels, logits, sites)


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("there is no GPU that torch can use")
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < _OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        raise Unavailable(f"{name} has compute capability {major}.{minor}; Triton needs 8.0 or newer")
