"""The GPU engine: Triton kernels. It inherits everything else from the torch engine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sparserefine.engines.reference.engine import TorchEngine
from sparserefine.engines.triton import context
from sparserefine.engines.triton import uncertainty as fused
from sparserefine.engines.triton.convolution import DTYPES, precision_of
from sparserefine.engines.triton.gate import gated
from sparserefine.engines.triton.geometry import NAME, build_padded_plan, build_plan
from sparserefine.engines.triton.launch import INTERPRETED, runs_on
from sparserefine.engines.triton.network import PackedNetwork
from sparserefine.engines.triton.selection import keep_largest
from sparserefine.images.coarse import Coarse
from sparserefine.sparse.interface import Perceptron, Unavailable
from sparserefine.sparse.plan import PaddedPlan, Plan, PlanSpec
from sparserefine.sparse.sites import PaddedSites, Sites
from sparserefine.sparse.unet import SparseUNet, is_packable

_OLDEST = (8, 0)
"""Oldest compute capability of NVIDIA GPUs that Triton supports."""


class TritonEngine(TorchEngine):
    """Engine ``triton``. Tensors on other devices or of other dtypes fall back to the torch engine.

    Raises:
        sparserefine.sparse.interface.Unavailable: there is no GPU, or the GPU is too old.
    """

    name = NAME

    def __init__(self) -> None:
        if not INTERPRETED:
            _check_gpu()
        self._packed: weakref.WeakKeyDictionary[SparseUNet, tuple[object, PackedNetwork]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[TritonEngine], tuple[()]]:
        return type(self), ()  # for copy and pickle, which leave packed weights out

    def geometry(self, sites: Sites, spec: PlanSpec) -> Plan:
        """The plan of the sites. The host waits once, to read the number of sites at each level from the GPU."""
        return self.plan(sites.mask(), spec) if runs_on(sites.coords.device) else super().geometry(sites, spec)

    def plan(self, mask: Tensor, spec: PlanSpec) -> Plan:
        """The plan of the true pixels of ``mask [B, H, W]``. The host waits once, as in :meth:`geometry`."""
        return build_plan(mask, spec) if runs_on(mask.device) else super().plan(mask, spec)

    def padded_plan(self, mask: Tensor, spec: PlanSpec, capacities: Sequence[int]) -> PaddedPlan:
        """Like :meth:`plan`, with ``capacities[level]`` rows at each level. The host does not wait for the GPU.

        Only packed networks (:meth:`prepare`) can use such plans, because they stop at the rows in use.
        """
        return build_padded_plan(mask, spec, capacities)

    def prepare(self, network: torch.nn.Module) -> PackedNetwork | None:  # type: ignore[override]
        """The packed network, or ``None`` if the network cannot be packed. Repacked only when parameters changed.

        Packs a :class:`SparseUNet` in evaluation mode on the GPU: in autocast's dtype if autocast is on, otherwise in
        its own. Changes are detected by the address and version of each parameter, because reading values would wait
        for the GPU. Writes through ``.data`` therefore go unnoticed. Networks made in inference mode are not packed
        (their tensors have no version), nor are networks with hooks (a packed network would not call them).
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
            known = (state, PackedNetwork(network, dtype))
            self._packed[network] = known
        return known[1]

    def keep_largest(self, values: Tensor, mask: Tensor, budget: int) -> None:
        """Keeps only the ``budget`` largest ``values`` per image: clears the rest of ``mask [B, H, W]`` in place."""
        if runs_on(mask.device):
            keep_largest(values, mask, budget)
        else:
            super().keep_largest(values, mask, budget)

    def uncertainty(self, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Labels and entropy [nats] at full size, in one pass."""
        if fused.runs_kernels_on(*coarse.logits):
            return fused.uncertainty(coarse)
        return super().uncertainty(coarse)

    def sample(self, coarse: Coarse, coords: Tensor) -> Tensor:
        """Full-resolution logits at the sites, ``float32 [N, K]``."""
        if fused.runs_kernels_on(coords, *coarse.logits):
            return fused.sample(coarse, coords)
        return super().sample(coarse, coords)

    def pixels(self, image: Tensor, coords: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """``image [B, C, H, W]`` at the sites, times ``scale [C]`` plus ``shift [C]``: ``float32 [N, C]``."""
        if fused.runs_kernels_on(image, coords, scale, shift) and image.dtype in (torch.uint8, *DTYPES):
            return fused.pixels(image, coords, scale, shift)
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
        """What the cells of each level see. The host does not wait for the GPU."""
        coords = [(sites.rows if isinstance(sites, PaddedSites) else sites).coords for sites in cells]
        known = image.dtype in (torch.uint8, *DTYPES) and coarse.num_classes <= context.MOST_CLASSES
        if known and fused.runs_kernels_on(image, scale, shift, *coords, *coarse.logits):
            return context.block_means(image, coarse, valid, scale, shift, coords)
        return super().block_means(image, coarse, valid, scale, shift, cells)

    def gated(
        self, coarse: Tensor, sparse: Tensor, gate: Perceptron, fuser: Perceptron, residual: bool
    ) -> Tensor | None:
        """The result of :class:`sparserefine.stages.ensembler.GatedEnsembler`; ``None`` if no kernel can compute it."""
        return gated(coarse, sparse, gate, fuser, residual)

    def write_labels(self, labels: Tensor, logits: Tensor, sites: Sites | PaddedSites) -> None:
        """Writes the class of the largest of ``logits [N, K]`` into ``labels [B, H, W]`` at the sites.

        If several logits are equal, the first class wins.
        """
        if fused.runs_kernels_on(labels, logits) and logits.dtype in DTYPES:
            fused.write_labels(labels, logits, sites)
        else:
            super().write_labels(labels, logits, sites)


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("torch finds no GPU that it can use; check torch.cuda.is_available()")
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < _OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        raise Unavailable(f"{name} has compute capability {major}.{minor}; Triton needs 8.0 or newer")
