"""SparseRefiner: the whole method on one page (Liu et al., ECCV 2024, arXiv 2407.19014).

image -> base -> coarse logits -> selector -> sites -> extractor -> sparse logits -> ensembler -> refined logits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparserefine.bases.base import FrozenBase
from sparserefine.capture import CapturedRefiner, Recipe, capture
from sparserefine.engines.choose import get_engine
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.normalisation import IMAGENET_MEAN, IMAGENET_STD, check_image, check_normalisation, constant
from sparserefine.images.uncertainty import entropy
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, PaddedPlan, Plan, Sites, calibrating
from sparserefine.stages.ensembler import EnsemblerConfig, build_ensembler
from sparserefine.stages.extractor import PRESETS, ExtractorConfig
from sparserefine.stages.gather import pixels, sample
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector


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
        self.engine = get_engine(engine)

    def forward(self, image: Tensor) -> Refinement:
        """Predicts full-size labels of a batch of images of one size.

        Args:
            image: ``[B, 3, H, W]``, uint8, or floating point in 0..1, on the device of the modules.
        """
        check_image(image)
        timer = StageTimer(image.device)
        with timer.stage("base"):
            logits, judge = self.base.begin(image)
        coarse = self.coarse_of(logits, (image.shape[2], image.shape[3]))
        return self.step(image, coarse, plan_of=self._judging(judge, image.device), timer=timer)

    def refine(
        self,
        image: Tensor,
        coarse: Tensor | Sequence[Tensor],
        *,
        windows: Sequence[Window] | None = None,
        valid: Tensor | None = None,
    ) -> Refinement:
        """The method from given coarse logits on.

        In training mode nobody looks at the values of the logits, for which the host would wait for a GPU at each step:
        they are looked at when they are made or read.

        Args:
            image: ``[B, 3, H, W]``.
            coarse: the base's outputs ``[B, K, h, w]``, or B times ``[K, h, w]`` where their sizes differ.
            windows: in training, the part of the whole image that each crop shows.
            valid: ``bool [B, H, W]``, false where the image is padding: never selected.
        """
        check_image(image)
        given = self.coarse_of(coarse, (image.shape[2], image.shape[3]), windows)
        _check_batch(given, len(image), valid)
        plan_of = None
        if not self.training:
            logits = [given.logits] if isinstance(given.logits, Tensor) else given.logits
            plan_of = self._judging(self.base.look_at(*logits), image.device)
        return self.step(image, given, valid, plan_of=plan_of, timer=StageTimer(image.device))

    def step(
        self,
        image: Tensor,
        coarse: Coarse,
        valid: Tensor | None = None,
        *,
        plan_of: Callable[[Tensor], Plan | PaddedPlan] | None = None,
        timer: StageTimer | None = None,
    ) -> Refinement:
        """All stages after the base. Values are neither checked nor timed here: that is for who calls.

        Args:
            image: ``[B, 3, H, W]``.
            coarse: of this image, see :meth:`coarse_of`.
            valid: ``bool [B, H, W]``, false where nothing is to be selected.
            plan_of: makes the plan of a mask ``bool [B, H, W]``; by default the engine. A padded plan makes rows that
                are padding, sites and logits alike.
            timer: has timed the base already; by default no clock is read.
        """
        engine, timer = self.engine.on(image.device), timer or StageTimer(None)
        with timer.stage("uncertainty"), torch.no_grad():
            labels, entropies = engine.uncertainty(coarse)
        with timer.stage("select"):
            mask = self.selector.mask(entropies, valid, engine)
        with timer.stage("plan"):
            plan = plan_of(mask) if plan_of else engine.plan(mask, self.extractor.spec)
            sites = plan.sites
        with timer.stage("gather"):
            coarse_logits = sample(coarse, sites, engine)
            features = self._features(image, sites, coarse_logits, engine)
        with timer.stage("extractor"):
            packed = None if torch.is_grad_enabled() else engine.prepare(self.extractor)
            network: Callable[..., Tensor] = packed or self.extractor
            sparse_logits = network(features, plan)
        with timer.stage("ensembler"):
            refined = self.ensembler(coarse_logits, sparse_logits.float(), engine)
        macs = self.sparse_macs(plan.rows)
        outputs = coarse_logits, sparse_logits, refined
        return Refinement(coarse, labels, entropies, sites, *outputs, timer, macs, self.base, engine)

    def coarse_of(
        self, logits: Tensor | Sequence[Tensor], size: tuple[int, int], windows: Sequence[Window] | None = None
    ) -> Coarse:
        """What the base's outputs are for images of ``size`` [px].

        Args:
            logits: ``[B, K, h, w]``, or B times ``[K, h, w]``.
            size: H and W of the images, or of the crops that ``windows`` tell of.
            windows: the part of the whole image that each crop shows.

        Raises:
            ValueError: shapes, dtype or class count are wrong, or upsampling ``nearest`` cannot be told from a crop.
        """
        upsampling = Upsampling("bilinear", self.base.outputs)
        if self.upsampling == "nearest":
            # The grid of the base's input follows from the size of the whole image, which a window does not tell.
            if windows is not None and self.base.config.size is None:
                raise ValueError(
                    "upsampling 'nearest' on crops needs a fixed base.size, not a base.ratio; give base.size"
                )
            upsampling = Upsampling("nearest", self.base.outputs, self.base.input_size(*size))
        coarse = Coarse(logits, size, upsampling, windows)
        self.base.check_classes(coarse.num_classes)
        return coarse

    def sparse_macs(self, rows: Sequence[int]) -> dict[str, int]:
        """Multiply-accumulates of extractor and ensembler for so many sites at each level, full size first."""
        return {"extractor": self.extractor.macs_of(rows), "ensembler": self.ensembler.macs(rows[0])}

    def _judging(self, judge: Callable[[], None], device: torch.device) -> Callable[[Tensor], Plan]:
        """The engine's plan of a mask, then ``judge``: the host has just waited for the plan, so this is one wait."""
        engine, spec = self.engine.on(device), self.extractor.spec

        def plan_of(mask: Tensor) -> Plan:
            plan = engine.plan(mask, spec)
            judge()
            return plan

        return plan_of

    def _features(self, image: Tensor, sites: Sites, coarse_logits: Tensor, engine: Engine) -> Tensor:
        """``[N, F]``: what :class:`ExtractorConfig` lists, in its order."""
        parts = []
        for name in self.extractor_config.features:
            if name == "rgb":
                mean, std = (constant(v, image.device) for v in (self.mean, self.std))
                white = 255 if image.dtype == torch.uint8 else 1
                parts.append(pixels(image, sites, 1 / (std * white), -mean / std, engine))
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
        given, logits = ([one] if isinstance(one, Tensor) else one for one in (images, coarse))
        selector, trained = self.selector, [*self.trained_parameters(), *self.extractor.buffers()]

        def changed() -> str | None:
            if self.training:
                return "is in training mode"
            return None if self.selector is selector else "has another selector"

        recipe = Recipe(
            self.step,
            self.base,
            self.coarse_of,
            self.engine,
            self.extractor,
            selector,
            self.sparse_macs,
            trained,
            changed,
        )
        self.eval()
        return capture(recipe, given or [], logits, headroom, capacities)

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


def _check_batch(coarse: Coarse, batch: int, valid: Tensor | None) -> None:
    if coarse.batch != batch:
        one = isinstance(coarse.logits, Tensor)
        given = tuple(coarse.logits.shape) if isinstance(coarse.logits, Tensor) else f"of {coarse.batch} images"
        wanted = f"[{batch}, K, h, w]" if one else f"{batch}, one for each image"
        raise ValueError(f"coarse logits are {given}, expected {wanted}")
    wanted_shape = (batch, *coarse.size)
    if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != wanted_shape):
        raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}, expected torch.bool {wanted_shape}")
