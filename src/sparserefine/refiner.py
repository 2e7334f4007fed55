"""SparseRefiner: the whole method on one page (Liu et al., ECCV 2024, arXiv 2407.19014).

image -> base -> coarse logits -> selector -> sites -> extractor -> sparse logits -> ensembler -> refined logits

The base is the frozen dense model; it sees a downsized image. Sites are the full-resolution pixels where its prediction
is uncertain. A plan holds the neighbour tables that the sparse U-Net needs for one set of sites. An engine is the code
that computes: PyTorch, C++ on the CPU, or Triton on the GPU. Start with :meth:`SparseRefiner.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparserefine.bases.base import FrozenBase
from sparserefine.bases.loaded import LoadedModel
from sparserefine.bases.refined import RefinedModel, refined
from sparserefine.capture import CapturedRefiner, Recipe, capture
from sparserefine.engines.choose import EngineChoice
from sparserefine.files.tensors import check_weights, read_tensors
from sparserefine.files.text import printable
from sparserefine.images.classes import Classes
from sparserefine.images.coarse import Coarse
from sparserefine.images.normalisation import check_image, constant
from sparserefine.images.uncertainty import entropy
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, PaddedPlan, Plan, Sites, SparseConv, SparseUNet, calibrating
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.context import block_means
from sparserefine.stages.ensembler import build_ensembler
from sparserefine.stages.gather import pixels, sample
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector
from sparserefine.stages.warm_start import Shape, WarmStart, weights_to_start
from sparserefine.storage import CONFIG, DEMO, read_refiner, weights_of, write_refiner

_MOST_REFINERS = 8
"""Of which each is the base of the one before it."""


class SparseRefiner(nn.Module):
    """A frozen base plus the three stages that refine its prediction where it is uncertain.

    Args:
        base: the frozen model.
        config: which pixels are refined, the network that refines them, and how both predictions are blended; default:
            :class:`RefinerConfig` with its own defaults.
        classes: names and colours; default: the base's own, or else "class 0", "class 1", ...
        engine: name of the engine that runs the sparse network; ``sparserefine info`` lists them. A base that is itself
            a refiner runs on it from now on.

    Attributes:
        config: the configuration in use. Only :attr:`selector` can be replaced later.

    Raises:
        ValueError: the class count differs from the base's, the threshold is too high for it, or the base takes
            another number of channels than images have, which ``config.mean`` and ``config.std`` say.
    """

    def __init__(
        self,
        base: FrozenBase,
        config: RefinerConfig | None = None,
        *,
        classes: Classes | None = None,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        k = base.num_classes
        self.classes = classes or base.classes or Classes.numbered(k)
        if len(self.classes) != k:
            raise ValueError(f"{len(self.classes)} class names for a base of {k} classes; expected {k}")
        self.config = config = config or RefinerConfig()
        config.selector.check(k)
        base.check_channels(config.channels)
        if isinstance(base.model, RefinedModel) and base.config.bands is None:
            base.model.warn_if_read_otherwise(config.images)
        self.base = base
        self.extractor = config.extractor.build(k, config.channels)
        self.ensembler = build_ensembler(config.ensembler, k)
        self.engine = EngineChoice(engine)
        base.run_on(engine)

    @property
    def selector(self) -> Selector:
        """Threshold and budget. Assign a new selector at any time.

        Raises:
            ValueError: the new threshold is ln K or more, so it would select nothing.
        """
        return self.config.selector

    @selector.setter
    def selector(self, selector: Selector) -> None:
        selector.check(self.base.num_classes)
        self.config = replace(self.config, selector=selector)

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Refinement:
        """Runs the base and refines its prediction, for a batch of images of one size.

        Args:
            image: ``[B, C, H, W]``, uint8, or floating point in 0..1, on the same device as the refiner.
            valid: ``bool [B, H, W]``, false where the image has no data; nothing is refined there.

        Raises:
            ValueError: wrong shape or dtype of the image, pixels outside 0..1, or bad outputs of the base, such as NaN.
        """
        check_image(image, self.config.channels)
        timer = StageTimer(image.device)
        with timer.stage("base"):
            logits, check_values = self.base.begin(image)
        coarse = self.coarse_of(logits, (image.shape[2], image.shape[3]))
        _check_batch(coarse, len(image), valid)
        return self.step(image, coarse, valid, plan_of=self._plan_then(check_values, image.device), timer=timer)

    def refine(
        self,
        image: Tensor,
        coarse: Tensor | Sequence[Tensor],
        *,
        windows: Sequence[Window] | None = None,
        valid: Tensor | None = None,
    ) -> Refinement:
        """Refines given coarse logits, without running the base.

        In training mode the values of logits and pixels are not checked, because the check makes the host wait for the
        GPU. Training checks logits earlier, when they are computed or read from disk, and makes the pixels itself.

        Args:
            image: ``[B, C, H, W]``, uint8, or floating point in 0..1.
            coarse: the base's outputs ``[B, K, h, w]``, or B tensors ``[K, h, w]`` if their sizes differ.
            windows: in training, the part of the whole image that each crop shows.
            valid: ``bool [B, H, W]``, false where the image is padding, which is never selected.

        Raises:
            ValueError: shapes or dtypes do not fit, or (outside training) logits are NaN, infinite or too large, or
                floating-point pixels are outside 0..1.
        """
        check_image(image, self.config.channels)
        checked = self.coarse_of(coarse, (image.shape[2], image.shape[3]), windows)
        _check_batch(checked, len(image), valid)
        plan_of = None
        if not self.training:
            logits = [checked.logits] if isinstance(checked.logits, Tensor) else checked.logits
            plan_of = self._plan_then(self.base.look_at(*logits, image=image), image.device)
        return self.step(image, checked, valid, plan_of=plan_of, timer=StageTimer(image.device))

    def step(
        self,
        image: Tensor,
        coarse: Coarse,
        valid: Tensor | None = None,
        *,
        plan_of: Callable[[Tensor], Plan | PaddedPlan] | None = None,
        timer: StageTimer | None = None,
    ) -> Refinement:
        """All stages after the base (paper, section 3). Checks no values; callers do that.

        Args:
            image: ``[B, C, H, W]``, uint8, or floating point in 0..1.
            coarse: the base's outputs for this image; see :meth:`coarse_of`.
            valid: ``bool [B, H, W]``, false where no pixel may be selected.
            plan_of: makes the plan from the mask of selected pixels, ``bool [B, H, W]``; default: the engine's own
                function. If it returns a padded plan, sites and logits of the result have padding rows at the end.
            timer: times the stages; default: no timing.
        """
        engine, timer = self.engine.on(image.device), timer or StageTimer(None)
        with timer.stage("uncertainty"), torch.no_grad():
            # Upsample the coarse logits; label and entropy [nats] of every pixel, [B, H, W] each.
            labels, entropies = engine.uncertainty(coarse)
        with timer.stage("select"):
            # Section 3.1: the pixels above the entropy threshold, at most budget per image, [B, H, W].
            mask = self.selector.mask(entropies, valid, engine)
        with timer.stage("plan"):
            # The N sites, and who neighbours whom at each level of the U-Net.
            plan = plan_of(mask) if plan_of else engine.plan(mask, self.extractor.spec)
            sites = plan.sites
        with timer.stage("gather"):
            # What the next two stages read at the sites: coarse logits [N, K], image features [N, F].
            coarse_logits = sample(coarse, sites, engine)
            features = self._features(image, sites, coarse_logits, engine)
            # At each level, means over the pixels of each active cell's block, [n_l, C + K].
            context = None
            if self.config.extractor.context:
                context = block_means(image, coarse, valid, plan, *self._normalisation(image), engine)
        with timer.stage("extractor"):
            # Section 3.2: the sparse U-Net, [N, F] -> [N, K]; for inference the engine may have a faster version of it.
            packed = None if torch.is_grad_enabled() else engine.prepare(self.extractor)
            network: Callable[..., Tensor] = packed or self.extractor
            sparse_logits = network(features, plan, context)
        with timer.stage("ensembler"):
            # Section 3.3: the gate blends both predictions, [N, K].
            refined = self.ensembler(coarse_logits, sparse_logits.float(), engine)
        macs = self.sparse_macs(plan.rows)
        outputs = coarse_logits, sparse_logits, refined
        return Refinement(coarse, labels, entropies, sites, *outputs, timer, macs, self.base, engine)

    def coarse_of(
        self, logits: Tensor | Sequence[Tensor], size: tuple[int, int], windows: Sequence[Window] | None = None
    ) -> Coarse:
        """Wraps the base's outputs with the rule that upsamples them to ``size`` [px], and checks them.

        Args:
            logits: ``[B, K, h, w]``, or B tensors ``[K, h, w]`` if their sizes differ.
            size: H and W of the images, or of the crops if ``windows`` is given.
            windows: the part of the whole image that each crop shows; default: the images are whole.

        Raises:
            ValueError: wrong shape, dtype or class count; or crops with upsampling ``nearest`` and no fixed base size.
        """
        upsampling = Upsampling("bilinear", self.base.outputs)
        if self.config.upsampling == "nearest":
            # This mode needs the size of the base's input. With a ratio it depends on the size of the whole original
            # image, and a window only knows the resized one.
            if windows is not None and self.base.config.size is None:
                raise ValueError(
                    "upsampling 'nearest' on crops needs a fixed base.size, not a base.ratio; give base.size"
                )
            upsampling = Upsampling("nearest", self.base.outputs, self.base.input_size(*size))
        coarse = Coarse(logits, size, upsampling, windows)
        self.base.check_classes(coarse.num_classes)
        return coarse

    def sparse_macs(self, rows: Sequence[int]) -> dict[str, int]:
        """Multiply-accumulates of extractor and ensembler, from the number of sites at each level, full size first."""
        return {"extractor": self.extractor.macs_of(rows), "ensembler": self.ensembler.macs(rows[0])}

    def _plan_then(self, check_values: Callable[[], None], device: torch.device) -> Callable[[Tensor], Plan]:
        """A function that makes the engine's plan and then calls ``check_values``, which raises on bad values.

        Both make the host wait for the GPU. In this order the second wait is free.
        """
        engine, spec = self.engine.on(device), self.extractor.spec

        def plan_of(mask: Tensor) -> Plan:
            plan = engine.plan(mask, spec)
            check_values()
            return plan

        return plan_of

    def _features(self, image: Tensor, sites: Sites, coarse_logits: Tensor, engine: Engine) -> Tensor:
        """Input of the extractor, ``[N, F]``: the features named in :class:`ExtractorConfig`, in that order."""
        parts = []
        for name in self.config.extractor.features:
            if name == "rgb":
                parts.append(pixels(image, sites, *self._normalisation(image), engine))
            elif name == "coords":
                extents = ((1, sites.height), (2, sites.width))
                parts += [((2 * sites.coords[:, axis] + 1) / extent - 1)[:, None] for axis, extent in extents]
            elif name == "probabilities":
                parts.append(coarse_logits.softmax(1))
            else:
                parts.append(entropy(coarse_logits, 1)[:, None])
        return torch.cat(parts, dim=1)

    def _normalisation(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel: (pixel / white - mean) / std, written as pixel * scale + shift."""
        mean, std = (constant(v, image.device) for v in (self.config.mean, self.config.std))
        white = 255 if image.dtype == torch.uint8 else 1
        return 1 / (std * white), -mean / std

    def capture(
        self,
        images: Tensor | Sequence[Tensor],
        coarse: Tensor | Sequence[Tensor] | None = None,
        *,
        headroom: float = 1.5,
        capacities: Sequence[int] | None = None,
    ) -> CapturedRefiner:
        """Records all stages after the base as one CUDA graph, for many images of one size on the GPU.

        The graph has room for a fixed number of sites at each level. An image with more sites is refined without the
        graph, and counted. The graph is valid for the current weights, selector and precision (``torch.autocast``) and
        for one image shape and dtype; see :class:`sparserefine.capture.CapturedRefiner`.

        Args:
            images: one or several typical images ``[B, C, H, W]`` on the GPU, with the shape and dtype of later calls.
            coarse: the base's outputs ``[B, K, h, w]`` for each of ``images``, if later calls are
                ``captured.refine(image, coarse)``; default: the base is run.
            headroom: the graph has room for ``headroom`` times the most sites found in ``images``.
            capacities: the room itself, in sites per level, full size first; replaces ``headroom``.

        Raises:
            ValueError: there is no GPU, the images differ in shape, or a number is out of range.
        """
        image_list, logits = ([value] if isinstance(value, Tensor) else value for value in (images, coarse))
        selector, trained = self.selector, [*self.trained_parameters(), *self.extractor.buffers()]

        def changed() -> str | None:
            if self.training:
                return "is in training mode"
            return None if self.selector is selector else "has another selector"

        recipe = Recipe(
            self.step,
            self.base,
            self.config.channels,
            self.coarse_of,
            self.engine,
            self.extractor,
            selector,
            self.sparse_macs,
            trained,
            changed,
        )
        training = self.training
        self.eval()
        try:
            return capture(recipe, image_list or [], logits, headroom, capacities)
        except BaseException:  # nothing was captured, so nothing has changed
            self.train(training)
            raise

    def quantize(self, images: Iterable[Tensor]) -> int:
        """Measures the range of activations on a few typical images, for 8-bit inference by engine ``cpu-int8``.

        The weights do not change; engine ``cpu-int8`` quantizes a copy of them. :meth:`save_pretrained` stores the
        ranges with the weights; training discards them.

        Args:
            images: each ``[B, C, H, W]`` or ``[C, H, W]``, as for :meth:`forward`. Eight are enough.

        Returns:
            The number of images.

        Raises:
            ValueError: no image is given, no pixel of any image is selected, or an activation is NaN or infinite. What
                was measured before stays as it was then.
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

    def calibrate(self, images: Iterable[Tensor]) -> int:
        """Old name of :meth:`quantize`. Raises ``AttributeError`` with the new name."""
        raise AttributeError("SparseRefiner.calibrate is called SparseRefiner.quantize now; it prepares for 8 bits")

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the extractor and the ensembler. Training changes these and nothing else."""
        yield from self.extractor.parameters()
        yield from self.ensembler.parameters()

    def trained_state(self) -> dict[str, Tensor]:
        """``state_dict()`` without the base: weights and statistics of the extractor and the ensembler."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("base.")}

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Writes ``config.json`` and ``model.safetensors``; see :func:`sparserefine.storage.write_refiner`.

        Args:
            folder: created if missing; other files in it are left alone.
            dtype: dtype of the stored floating-point weights; loading converts them back to float32.

        Raises:
            ValueError: weights are NaN or infinite, or not within the range of ``dtype``; nothing is written.
            OSError: a file cannot be written; ``folder`` then has its old files.
        """
        write_refiner(folder, self.config, self.classes, self.base, self.trained_state(), dtype=dtype)

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
        """Loads a refiner that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            name: a folder, or a hub id such as ``user/refiner`` (needs ``pip install huggingface_hub``).
            base: the base to use; default: the one that ``config.json`` names.
            trust_base: allows a base ``python:<module>:<callable>`` in ``config.json``, which runs that code.
            engine: name of the engine, as for the constructor.
            runtime: runtime for the base that ``config.json`` names; see :class:`BaseConfig`.

        Raises:
            ValueError: the folder is incomplete, has another format version, or does not fit the base; a setting in
                ``config.json`` is wrong; or weights are NaN, infinite, or of a foreign dtype.
            FileNotFoundError: ``name`` is neither a folder nor a hub id.
        """
        return cls._load(name, base, Loading(trust_base, engine, runtime))

    @classmethod
    def _load(cls, name: str | Path, base: FrozenBase | None, loading: Loading) -> SparseRefiner:
        """See :meth:`from_pretrained`."""
        stored, runtime, engine = read_refiner(name), loading.runtime, loading.engine
        if base is None:
            base = stored.load_base(
                trust_base=loading.trust_base, runtime=runtime, refiners=loading.inside(stored.folder).as_base
            )
        elif runtime is not None:
            raise ValueError(f"runtime {runtime!r} with a base: give the runtime to the base, BaseConfig(runtime=...)")
        elif base.num_classes != len(stored.classes):
            where, count = stored.folder / CONFIG, len(stored.classes)
            raise ValueError(f"{where}: {count} classes, the base given has {base.num_classes}")
        weights = read_tensors(stored.weights)
        with torch.device("meta"):  # shapes only: a configuration may claim any size, and the weights decide
            shapes = cls(base, stored.config, classes=stored.classes, engine=engine)
        _check_weights(weights, shapes.extractor, shapes.ensembler, stored.weights)
        refiner = cls(base, stored.config, classes=stored.classes, engine=engine)
        refiner.load_state_dict(weights, strict=False)  # checked above
        return refiner.eval()

    def load_weights(self, folder: str | Path) -> None:
        """Loads the extractor and ensembler weights of a stored refiner of the same shape.

        Raises:
            ValueError: the folder has no weights file; the weights have other names, shapes or dtypes; or they are NaN
                or infinite. No weight has changed then.
        """
        file = weights_of(folder)
        weights = read_tensors(file)
        _check_weights(weights, self.extractor, self.ensembler, file)
        self.load_state_dict(weights, strict=False)

    def start_from(self, name: str | Path) -> WarmStart:
        """Takes over the weights of a stored refiner where they fit; its classes may be others.

        What depends on the number of classes, or of the images' channels, keeps its own initialisation if that differs,
        and so do context layers if the stored refiner has none; the result names them.

        Args:
            name: a folder that :meth:`save_pretrained` wrote, a hub id, or ``demo``: the refiner in this package.

        Raises:
            ValueError: the extractors differ in another way; or as :meth:`from_pretrained`. No weight has changed then.
            FileNotFoundError: ``name`` is neither a folder nor a hub id.
        """
        stored = read_refiner(DEMO if name == "demo" else name)
        weights, former = read_tensors(stored.weights), Shape(stored.config, len(stored.classes))
        with torch.device("meta"):
            extractor = stored.config.extractor.build(former.num_classes, stored.config.channels)
            ensembler = build_ensembler(stored.config.ensembler, former.num_classes)
        _check_weights(weights, extractor, ensembler, stored.weights)
        shape = Shape(self.config, self.base.num_classes)
        # Ranges for 8 bits are neither taken nor kept: other weights make other activations.
        own = {key: tensor for key, tensor in self.trained_state().items() if not key.endswith(".input_max")}
        chosen, report = weights_to_start(str(name), weights, former, own, shape)
        self.load_state_dict(chosen, strict=False)
        return report


@dataclass(frozen=True)
class Loading:
    """How a refiner is loaded, and its base if that is a refiner, and so on.

    Attributes:
        trust_base: allows bases ``python:<module>:<callable>``.
        engine: name of the engine of all of them.
        runtime: runtime of the innermost base.
        outer: the folders of the refiners that it is the base of, the outermost first.
    """

    trust_base: bool = False
    engine: str = "auto"
    runtime: Literal["onnxruntime", "openvino"] | None = None
    outer: tuple[Path, ...] = ()

    def as_base(self, name: str) -> LoadedModel:
        """The refiner of that name, a folder, a hub id or ``demo``, as the model of a base."""
        return refined(SparseRefiner._load(DEMO if name == "demo" else name, None, self))

    def inside(self, folder: Path) -> Loading:
        """For the base of the refiner in ``folder``.

        Raises:
            ValueError: its base is the refiner itself, or there are too many.
        """
        outer = (*self.outer, folder.resolve())
        if outer[-1] in self.outer or len(outer) > _MOST_REFINERS:
            chain = " -> ".join(map(printable, outer[-3:]))
            many = f"expected at most {_MOST_REFINERS} refiners, one the base of the other, and none twice"
            raise ValueError(f"base refiner:{printable(folder)}: {chain}: {many}; give the first one another base")
        return replace(self, outer=outer)


def _check_weights(weights: Mapping[str, Tensor], extractor: SparseUNet, ensembler: nn.Module, file: Path) -> None:
    """Raises ``ValueError`` unless these are weights for extractor and ensembler."""
    own = {**extractor.state_dict(prefix="extractor."), **ensembler.state_dict(prefix="ensembler.")}
    for name, module in extractor.named_modules(prefix="extractor"):
        if isinstance(module, SparseConv):  # the range of its inputs is stored only if it was measured for 8 bits
            own.pop(f"{name}.input_max", None)
            if f"{name}.input_max" in weights:
                own[f"{name}.input_max"] = module.weight[0, :, 0]
    check_weights(weights, own, file)


def _check_batch(coarse: Coarse, batch: int, valid: Tensor | None) -> None:
    """Raises ``ValueError`` unless coarse logits and ``valid`` are for ``batch`` images of the given size."""
    if coarse.batch != batch:
        stacked = isinstance(coarse.logits, Tensor)
        given = tuple(coarse.logits.shape) if isinstance(coarse.logits, Tensor) else f"of {coarse.batch} images"
        wanted = f"[{batch}, K, h, w]" if stacked else f"{batch}, one for each image"
        raise ValueError(f"coarse logits are {given}, expected {wanted}")
    wanted_shape = (batch, *coarse.size)
    if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != wanted_shape):
        raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}, expected torch.bool {wanted_shape}")
