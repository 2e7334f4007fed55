"""SparseRefiner: the whole method on one page (Liu et al., ECCV 2024, arXiv 2407.19014).

image -> base -> coarse logits -> selector -> sites -> extractor -> sparse logits -> ensembler -> refined logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sparserefine.bases.base import FrozenBase
from sparserefine.engines.choose import EngineChoice
from sparserefine.images.classes import Classes
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_image, check_normalisation, constant
from sparserefine.images.uncertainty import dense, entropy
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, Plan, Sites, calibrating
from sparserefine.stages.ensembler import EnsemblerConfig, build_ensembler
from sparserefine.stages.extractor import PRESETS, ExtractorConfig
from sparserefine.stages.selector import Selector

if TYPE_CHECKING:
    from sparserefine.capture import CapturedRefiner


class SparseRefiner(nn.Module):
    """A frozen base plus the three stages that refine its prediction where it is uncertain.

    Args:
        base: the frozen model.
        selector: which pixels are looked at again.
        extractor: shape of the sparse network.
        ensembler: how both predictions are blended.
        classes: names and colours; if not given, the base's own, or numbered ones.
        upsampling: ``bilinear``, or ``nearest`` as in the published code; thresholds belong to this choice.
        mean: subtracted from the refiner's own pixels in 0..1, per channel.
        std: divided by, per channel.
        engine: what executes the sparse network; see ``sparserefine info``.
    """

    def __init__(
        self,
        base: FrozenBase,
        *,
        selector: Selector | None = None,
        extractor: ExtractorConfig = PRESETS["slim"],
        ensembler: EnsemblerConfig | None = None,
        classes: Classes | None = None,
        upsampling: str = "bilinear",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        k = base.num_classes
        self.classes = classes or base.classes or Classes.numbered(k)
        if len(self.classes) != k:
            raise ValueError(f"{len(self.classes)} class names for a base of {k} classes; expected as many")
        if upsampling not in ("bilinear", "nearest"):
            raise ValueError(f"upsampling {upsampling!r}, expected 'bilinear' or 'nearest'")
        check_normalisation("refiner", mean, std)
        self.selector = selector or Selector(threshold=0.3)
        self.selector.check(k)
        self.extractor_config, self.ensembler_config = extractor, ensembler or EnsemblerConfig()
        self.upsampling, self.mean, self.std = upsampling, tuple(mean), tuple(std)
        self.base = base
        self.extractor = extractor.build(k)
        self.ensembler = build_ensembler(self.ensembler_config, k)
        self.engine = EngineChoice(engine)

    def forward(self, image: Tensor) -> Refinement:
        """Predicts full-size labels of a batch of images of one size.

        Args:
            image: ``[B, 3, H, W]``, uint8, or floating point in 0..1, on the device of the modules.
        """
        check_image(image)
        timer = StageTimer(image.device)
        with timer.stage("base"):
            coarse = self.base(image)
        return self._refine(image, coarse, None, None, timer)

    def refine(
        self,
        image: Tensor,
        coarse: Tensor | Sequence[Tensor],
        *,
        windows: Sequence[Window] | None = None,
        valid: Tensor | None = None,
    ) -> Refinement:
        """The method from given coarse logits on.

        Args:
            image: ``[B, 3, H, W]``.
            coarse: the base's outputs ``[B, K, h, w]``, or B times ``[K, h, w]`` where their sizes differ.
            windows: in training, the part of the whole image that each crop shows.
            valid: ``bool [B, H, W]``, false where the image is padding: never selected.
        """
        check_image(image)
        self._check_inputs(image, coarse, windows, valid)
        return self._refine(image, coarse, windows, valid, StageTimer(image.device))

    def _refine(
        self,
        image: Tensor,
        coarse: Tensor | Sequence[Tensor],
        windows: Sequence[Window] | None,
        valid: Tensor | None,
        timer: StageTimer,
        plan_of: Callable[[Tensor], Plan] | None = None,
    ) -> Refinement:
        """All stages after the base, on inputs that were checked; ``timer`` may have timed the base already.

        ``plan_of`` takes the place of the engine's ``plan``.
        """
        size = (image.shape[2], image.shape[3])
        how, engine, spec = self.how(size), self.engine.on(image.device), self.extractor.spec
        with timer.stage("uncertainty"), torch.no_grad():
            labels, entropies = engine.uncertainty(coarse, size, how, windows)
        with timer.stage("select"):
            mask = self.selector.mask(entropies, valid, engine)
        with timer.stage("plan"):
            plan = plan_of(mask) if plan_of else engine.plan(mask, spec)
            sites = plan.levels[0].sites
        with timer.stage("gather"):
            coarse_logits = engine.sample(coarse, sites.coords, size, how, windows)
            features = self._features(image, sites, coarse_logits, engine)
        with timer.stage("extractor"):
            packed = None if torch.is_grad_enabled() else engine.prepare(self.extractor)
            sparse_logits = (packed or self.extractor)(features, plan)
        with timer.stage("ensembler"):
            refined = self.ensembler(coarse_logits, sparse_logits.float(), engine)
        sparse_macs = {"extractor": self.extractor.macs(plan), "ensembler": self.ensembler.macs(len(sites))}
        return Refinement(
            coarse,
            labels,
            entropies,
            how,
            sites,
            coarse_logits,
            sparse_logits,
            refined,
            timer,
            sparse_macs,
            self.base,
            engine,
        )

    def _check_inputs(
        self,
        image: Tensor,
        coarse: Tensor | Sequence[Tensor],
        windows: Sequence[Window] | None,
        valid: Tensor | None,
    ) -> None:
        batch = len(image)
        if isinstance(coarse, Tensor):
            self.base.checked(coarse, batch)
        else:
            if len(coarse) != batch:
                raise ValueError(f"{len(coarse)} coarse logits, expected {batch}, one for each image")
            for item in coarse:
                self.base.checked(item[None], 1)
        if windows is not None and self.upsampling == "nearest" and self.base.config.size is None:
            # The grid of the base's input follows from the size of the whole image, which a window does not tell.
            raise ValueError("upsampling 'nearest' on crops needs a fixed base.size, not a base.ratio; give base.size")
        if windows is not None and len(windows) != batch:
            raise ValueError(f"{len(windows)} windows, expected {batch}, one for each image")
        wanted = (batch, *image.shape[2:])
        if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != wanted):
            raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}, expected torch.bool {wanted}")

    def how(self, size: tuple[int, int]) -> Upsampling:
        """How the base's outputs for an image of ``size`` [px] become full-resolution logits."""
        if self.upsampling == "nearest":
            return Upsampling("nearest", self.base.outputs, self.base.input_size(*size))
        return Upsampling("bilinear", self.base.outputs)

    def _features(self, image: Tensor, sites: Sites, coarse_logits: Tensor, engine: Engine) -> Tensor:
        """``[N, F]``: what :class:`ExtractorConfig` lists, in its order."""
        parts = []
        for name in self.extractor_config.features:
            if name == "rgb":
                mean, std = (constant(v, image.device) for v in (self.mean, self.std))
                white = 255 if image.dtype == torch.uint8 else 1
                parts.append(engine.pixels(image, sites, 1 / (std * white), -mean / std))
            elif name == "coords":
                extents = ((1, sites.height), (2, sites.width))
                parts += [((2 * sites.coords[:, axis] + 1) / extent - 1)[:, None] for axis, extent in extents]
            elif name == "probabilities":
                parts.append(coarse_logits.softmax(1))
            else:
                parts.append(entropy(coarse_logits, 1)[:, None])
        return torch.cat(parts, dim=1)

    def capture(
        self,
        images: Tensor | Sequence[Tensor],
        coarse: Tensor | Sequence[Tensor] | None = None,
        *,
        headroom: float = 1.5,
        capacities: Sequence[int] | None = None,
    ) -> CapturedRefiner:
        """Records all stages after the base as one CUDA graph, for a stream of images of one size on the GPU.

        The graph has room for a fixed number of sites at each level; an image with more is refined without it, and
        counted. It belongs to the weights, the selector and the precision of this moment, and to the images' shape:
        see :class:`sparserefine.capture.CapturedRefiner`. Precision is that of ``torch.autocast``, if it is on.

        Args:
            images: one or several typical ``[B, 3, H, W]`` on the GPU, of the shape and dtype that are to come.
            coarse: for each the base's outputs ``[B, K, h, w]``, where they are to come from elsewhere
                (``captured.refine(image, coarse)``); by default the base is run.
            headroom: room for so many times the sites that these have.
            capacities: or the room itself, in sites for each level, full size first.

        Raises:
            ValueError: there is no GPU, the images are of several shapes, or the numbers make no sense.
        """
        from sparserefine.capture import capture

        given, logits = ([one] if isinstance(one, Tensor) else one for one in (images, coarse))
        return capture(self, given or [], logits, headroom, capacities)

    def calibrate(self, images: Iterable[Tensor]) -> int:
        """Runs the method on a few typical images, so that engine ``cpu-int8`` knows how large activations get.

        What it learns is stored with the weights by :meth:`save_pretrained`; training forgets it.

        Args:
            images: each ``[B, 3, H, W]`` or ``[3, H, W]``, as for :meth:`forward`. Eight are plenty.

        Returns:
            The number of images.

        Raises:
            ValueError: no image was given, or none had a pixel to refine.
        """
        training, count = self.training, 0
        try:
            with calibrating(self.eval().extractor), torch.no_grad():
                for image in images:
                    batch = image[None] if image.dim() == 3 else image
                    self(batch)
                    count += len(batch)
        finally:
            self.train(training)
        return count

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the extractor and the ensembler: all that training changes."""
        yield from self.extractor.parameters()
        yield from self.ensembler.parameters()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Writes ``config.json`` and ``model.safetensors``; see :func:`sparserefine.storage.save_refiner`."""
        from sparserefine.storage import save_refiner

        save_refiner(self, folder, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        base: FrozenBase | None = None,
        trust_base: bool = False,
        engine: str = "auto",
        runtime: Literal["onnxruntime", "openvino"] | None = None,
    ) -> SparseRefiner:
        """Reads a refiner from a folder or a hub id; see :func:`sparserefine.storage.load_refiner`."""
        from sparserefine.storage import load_refiner

        return load_refiner(name, base=base, trust_base=trust_base, engine=engine, runtime=runtime)


@dataclass(frozen=True)
class Refinement:
    """A prediction: coarse everywhere, refined at the sites. Nothing of size ``[K, H, W]`` until asked for.

    Attributes:
        coarse: the base's outputs, ``[B, K, h, w]`` (or a list of B).
        coarse_labels: ``uint8 [B, H, W]`` (int16 above 255 classes), before refinement.
        coarse_entropy: ``float32 [B, H, W]`` [nats], before refinement: what the selector saw.
        how: how ``coarse`` was upsampled.
        sites: the N selected pixels.
        coarse_logits: the base's logits at the sites, ``[N, K]``.
        sparse_logits: the extractor's, ``[N, K]``.
        refined_logits: the ensembler's, ``[N, K]``.
    """

    coarse: Tensor | Sequence[Tensor]
    coarse_labels: Tensor
    coarse_entropy: Tensor
    how: Upsampling
    sites: Sites
    coarse_logits: Tensor
    sparse_logits: Tensor
    refined_logits: Tensor
    _timer: StageTimer
    _sparse_macs: dict[str, int]
    _base: FrozenBase
    _engine: Engine

    def labels(self) -> Tensor:
        """Refined labels, ``uint8 [B, H, W]`` (int16 above 255 classes)."""
        labels = self.coarse_labels.clone()
        self._engine.write_labels(labels, self.refined_logits, self.sites)
        return labels

    def with_sites(self, site_labels: Tensor) -> Tensor:
        """The coarse labels with ``site_labels [N]`` at the sites: how every variant of the method is scored."""
        labels = self.coarse_labels.clone()
        labels.view(-1)[self.sites.flat] = site_labels.to(labels.dtype)
        return labels

    def logits(self) -> Tensor:
        """Refined logits of every pixel, ``float32 [B, K, H, W]``: 4 B K H W bytes, made by this call."""
        size = (self.sites.height, self.sites.width)
        result = dense(self.coarse, size, self.how)
        batch, row, column = self.sites.coords.long().unbind(1)
        result[batch, :, row, column] = self.refined_logits.to(result.dtype)
        return result

    def entropy(self) -> Tensor:
        """Entropy that remains, ``float32 [B, H, W]`` [nats]: refined at the sites, the base's elsewhere."""
        result = self.coarse_entropy.clone()
        result.view(-1)[self.sites.flat] = entropy(self.refined_logits, 1).to(result.dtype)
        return result

    @property
    def density(self) -> float:
        """Share of the pixels that were looked at again, N / (B H W)."""
        return self.sites.density

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of each stage, in order; ``base`` is absent where coarse logits were given."""
        return self._timer.milliseconds()

    @property
    def macs(self) -> dict[str, int | None]:
        """Multiply-accumulates of the batch by stage; ``base`` is ``None`` where they cannot be counted."""
        base = self._base.macs(self.sites.height, self.sites.width)
        return {"base": None if base is None else base * self.sites.batch_size, **self._sparse_macs}
