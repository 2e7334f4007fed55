"""All stages after the base as one CUDA graph.

The kernels start with one launch, the host does not wait in between, and every image takes the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from sparserefine.bases.base import FrozenBase
from sparserefine.engines.choose import EngineChoice
from sparserefine.images.coarse import Coarse
from sparserefine.images.normalisation import check_image
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, PaddedPlan, Plan, SparseUNet
from sparserefine.sparse.plan import coarser_size
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector

if TYPE_CHECKING:
    from sparserefine.engines.triton.engine import TritonEngine

_WARM_UP = 3  # runs before the recording: they compile kernels, and libraries allocate the memory that they keep

_CHANGED = "the refiner {} since it was captured; call refiner.eval() and refiner.capture(...) again"


class Step(Protocol):
    """All stages after the base, such as :meth:`sparserefine.refiner.SparseRefiner.step`."""

    def __call__(
        self,
        image: Tensor,
        coarse: Coarse,
        *,
        plan_of: Callable[[Tensor], Plan | PaddedPlan] | None = None,
        timer: StageTimer | None = None,
    ) -> Refinement:
        """Refines an image; see :meth:`sparserefine.refiner.SparseRefiner.step`."""


@dataclass(frozen=True)
class Recipe:
    """The parts of a refiner that capturing needs.

    Attributes:
        step: all stages after the base; the graph records it.
        base: makes the coarse logits, outside the graph.
        channels: C of the images.
        coarse_of: wraps logits ``[B, K, h, w]`` for images of a size (H, W), as ``step`` takes them.
        engine: chooses the engine of ``step`` by device.
        extractor: the network that ``step`` runs.
        selector: the selector that ``step`` uses; its budget limits the capacity that is needed.
        macs: multiply-accumulates of each stage, from the number of sites at each level.
        trained: parameters and buffers that the graph reads. The graph must not run after they have changed.
        changed: says what else has changed since, as the end of a sentence "the refiner ..."; ``None``: nothing.
    """

    step: Step
    base: FrozenBase
    channels: int
    coarse_of: Callable[[Tensor, tuple[int, int]], Coarse]
    engine: EngineChoice
    extractor: SparseUNet
    selector: Selector
    macs: Callable[[Sequence[int]], dict[str, int]]
    trained: Sequence[Tensor]
    changed: Callable[[], str | None]


class Graph:
    """One recorded step with its own buffers: image and coarse logits in, labels and logits at the sites out.

    This object keeps alive all memory that the recorded kernels use: the buffers, the packed weights, and the
    interpolation tables that the engine stores with the coarse logits. Each run overwrites the results of the last one.

    Args:
        recipe: the step to record.
        engine: the GPU's engine.
        packed: the packed extractor that the engine uses at present.
        image: an image with the shape and dtype of later ones.
        coarse: coarse logits with the shape and dtype of later ones.
        capacities: maximum number of sites at each level.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: TritonEngine,
        packed: object,
        image: Tensor,
        coarse: Coarse,
        capacities: Sequence[int],
    ) -> None:
        assert isinstance(coarse.logits, Tensor)
        self._recipe, self._engine, self._packed, self.capacities = recipe, engine, packed, tuple(capacities)
        self.image = image.clone()
        self.logits = coarse.logits.detach().clone(memory_format=torch.preserve_format)
        self._coarse = replace(coarse, logits=self.logits)
        self._graph: torch.cuda.CUDAGraph | None = None
        # Not in inference mode: the random number generator would keep an inference tensor, which breaks other graphs.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
            self._record()

    def _record(self) -> None:
        device = self.image.device
        if device.type != "cuda":  # interpreted kernels, in tests: run the same step without a graph
            self._step()
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads, such as data loaders, may use the GPU during the recording.
        recording = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), recording:
            self._step()

    def _step(self) -> None:
        """All stages after the base, without the host: this is what the graph records."""
        plans: list[PaddedPlan] = []

        def plan_of(mask: Tensor) -> PaddedPlan:
            plans.append(self._engine.padded_plan(mask, self._recipe.extractor.spec, self.capacities))
            return plans[0]

        self.result = self._recipe.step(self.image, self._coarse, plan_of=plan_of)
        (plan,) = plans
        self._sites = plan.levels[0].sites
        self.labels = self.result.coarse_labels.clone()
        self._engine.write_labels(self.labels, self.result.refined_logits, self._sites)
        self._report = torch.cat([plan.totals, self._recipe.base.bad_values(self.logits, self.image)[None]])

    def run(self, image: Tensor, logits: Tensor) -> None:
        """Queues one run on an image and its coarse logits. The host does not wait."""
        self.image.copy_(image)
        self.logits.copy_(logits)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def report(self) -> tuple[list[int], int]:
        """The last run's number of sites at each level, and whether logits or pixels were bad. Waits for the GPU."""
        counts: list[int]
        *counts, bad = self._report.tolist()
        return counts, bad

    def refinement(self, counts: Sequence[int], timer: StageTimer) -> Refinement:
        """A copy of the last run's result, without padding.

        Args:
            counts: its number of sites at each level, none above the capacity.
            timer: the timer of this run.
        """
        n, held = counts[0], self.result
        return replace(
            held,
            coarse=replace(self._coarse, logits=self.logits.clone()),
            coarse_labels=held.coarse_labels.clone(),
            coarse_entropy=held.coarse_entropy.clone(),
            sites=self._sites.first(n),
            coarse_logits=held.coarse_logits[:n].clone(),
            sparse_logits=held.sparse_logits[:n].clone(),
            refined_logits=held.refined_logits[:n].clone(),
            _timer=timer,
            _sparse_macs=self._recipe.macs(counts),
        )


class CapturedRefiner:
    """Result of :meth:`SparseRefiner.capture`. Call it like the refiner, with images of the captured shape and dtype.

    The base runs as usual. All later stages are one CUDA graph, with room for a fixed number of sites at each level
    (``capacities``). An image with more sites is refined without the graph, and counted.

    The graph is valid for the weights, selector and precision that the refiner had, and for the shapes and dtypes of
    image and coarse logits. If any of them changes, except precision, a call raises; precision stays the captured one.
    Call it from one thread and one stream only, one call at a time.

    Attributes:
        capacities: maximum number of sites at each level, full size first.
        calls: number of calls so far; a batch is one call.
        overflows: how many of these calls had more sites than ``capacities``.
    """

    def __init__(self, recipe: Recipe, graph: Graph) -> None:
        self.capacities, self.calls, self.overflows = graph.capacities, 0, 0
        self._recipe, self._graph, self._state = recipe, graph, _versions(recipe.trained)
        kind = graph.image.device.type
        half, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._autocast: dict[str, Any] = {"enabled": half, "dtype": dtype}

    def __call__(self, image: Tensor) -> Refinement:
        """Runs the base and refines its prediction, like :meth:`SparseRefiner.forward`.

        Args:
            image: ``[B, C, H, W]``, with the captured shape and dtype.

        Raises:
            ValueError: the image or its coarse logits have another shape, dtype or device, or values that
                :meth:`FrozenBase.look_at` refuses. The graph checks them; the host reads the result with the counts.
            RuntimeError: the refiner has changed since it was captured.
        """
        check_image(image, self._recipe.channels)
        timer = StageTimer(image.device)
        with self._as_recorded():
            with timer.stage("base"):
                logits = self._recipe.base.unchecked(image)
            return self._refine(image, logits, timer)

    def refine(self, image: Tensor, coarse: Tensor) -> Refinement:
        """Refines given coarse logits, like :meth:`SparseRefiner.refine`. Raises what a call raises."""
        check_image(image, self._recipe.channels)
        with self._as_recorded():
            return self._refine(image, coarse, StageTimer(image.device))

    def labels(self, image: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Only the labels, ``uint8 [B, H, W]`` (int16 above 255 classes). The fastest call: it copies nothing else.

        Raises what a call raises.

        Args:
            image: ``[B, C, H, W]``, with the captured shape and dtype.
            coarse: the base's outputs ``[B, K, h, w]``; default: the base is run.
        """
        check_image(image, self._recipe.channels)
        with self._as_recorded():
            logits = self._recipe.base.unchecked(image) if coarse is None else coarse
            if self._run(image, logits) is None:
                return self._without_graph(image, logits, StageTimer(image.device)).labels()
            return self._graph.labels.clone()

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """Uses the captured precision instead of the caller's, also for the base and for images with too many sites."""
        with torch.inference_mode(), torch.autocast(self._graph.image.device.type, **self._autocast):
            yield

    def _refine(self, image: Tensor, logits: Tensor, timer: StageTimer) -> Refinement:
        with timer.stage("refine"):
            counts = self._run(image, logits)
        if counts is None:
            return self._without_graph(image, logits, timer)
        return self._graph.refinement(counts, timer)

    def _without_graph(self, image: Tensor, logits: Tensor, timer: StageTimer) -> Refinement:
        coarse = self._recipe.coarse_of(logits, (image.shape[2], image.shape[3]))
        return self._recipe.step(image, coarse, timer=timer)

    def _run(self, image: Tensor, logits: Tensor) -> list[int] | None:
        """Runs the graph and returns the number of sites at each level; ``None`` if there were too many for it."""
        _check_like("image", image, self._graph.image)
        _check_like("coarse logits", logits, self._graph.logits)
        changed = self._recipe.changed()
        if changed is not None:
            raise RuntimeError(_CHANGED.format(changed))
        self._graph.run(image, logits)
        if _versions(self._recipe.trained) != self._state:  # checked while the GPU is busy
            raise RuntimeError(_CHANGED.format("has other weights"))
        counts, bad = self._graph.report()
        if bad:
            self._recipe.base.look_at(logits, image=image)()  # raises, and says what is wrong
        self.calls += 1
        if any(count > capacity for count, capacity in zip(counts, self.capacities, strict=True)):
            self.overflows += 1
            return None
        return counts


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Address and version of each tensor: they differ once a tensor was replaced or written to."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Switches off autocast's cache of converted weights: it is freed later, and the graph would read freed memory."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def capture(
    recipe: Recipe,
    images: Sequence[Tensor],
    logits: Sequence[Tensor] | None,
    headroom: float,
    capacities: Sequence[int] | None,
) -> CapturedRefiner:
    """Records a graph; see :meth:`sparserefine.refiner.SparseRefiner.capture` for arguments and errors."""
    if not images:
        raise ValueError("no image is given; pass one or several typical images, so that their sites can be counted")
    if logits is not None and len(logits) != len(images):
        raise ValueError(f"{len(logits)} coarse logits for {len(images)} images; expected one for each image")
    if not 1 <= headroom < math.inf:
        raise ValueError(f"headroom = {headroom}, expected at least 1, which is the room for the given images")
    for image in images:
        check_image(image, recipe.channels)
        _check_like("image", image, images[0])
    first = images[0]
    engine = recipe.engine.on(first.device)
    if engine.name != "triton":
        raise ValueError(
            f"images are on {first.device}, where engine {engine.name!r} runs; a CUDA graph needs a GPU and engine "
            "'triton': move the refiner and the images to the GPU (`sparserefine info` says what is missing)"
        )
    with torch.inference_mode():
        if logits is None:
            logits = [recipe.base(image) for image in images]
        for image, given in zip(images, logits, strict=True):
            recipe.base.checked(given, len(image), image)
            _check_like("coarse logits", given, logits[0])
        coarse = [recipe.coarse_of(given, (first.shape[2], first.shape[3])) for given in logits]
        packed = engine.prepare(recipe.extractor)
        if packed is None:
            raise ValueError(
                "this extractor cannot be packed, so it cannot be captured: its weights were made in inference mode, "
                "it has hooks, or its dtype is not float16, bfloat16 or float32"
            )
        if capacities is None:
            capacities = _capacities(recipe, engine, images, coarse, headroom)
    levels = recipe.extractor.spec.levels
    if len(capacities) != levels or min(capacities) < 1:
        raise ValueError(f"capacities = {list(capacities)}, expected {levels} numbers of sites, one per level, above 0")
    graph = Graph(recipe, cast("TritonEngine", engine), packed, first, coarse[0], capacities)
    return CapturedRefiner(recipe, graph)


def _capacities(
    recipe: Recipe, engine: Engine, images: Sequence[Tensor], coarse: Sequence[Coarse], headroom: float
) -> list[int]:
    """Capacity of each level: ``headroom`` times the most sites of any image, rounded up, at most all its pixels."""
    spec, largest = recipe.extractor.spec, [0] * recipe.extractor.spec.levels
    for one in coarse:
        _, entropies = engine.uncertainty(one)
        plan = engine.plan(recipe.selector.mask(entropies, None, engine), spec)
        largest = [max(most, rows) for most, rows in zip(largest, plan.rows, strict=True)]
    batch, _, height, width = images[0].shape
    budget, result = recipe.selector.budget, []
    for depth, most in enumerate(largest):
        cells = batch * height * width
        if depth == 0 and budget is not None:
            cells = min(cells, batch * budget)
        result.append(max(1, min(cells, _rounded_up(most * headroom))))
        height, width = coarser_size(height, spec.down), coarser_size(width, spec.down)
    return result


def _rounded_up(sites: float) -> int:
    """Rounds up to a multiple of a power of two, by at most an eighth, or 16 if that is more."""
    step = 1 << max(4, int(sites).bit_length() - 4)
    return (int(sites) // step + 1) * step


def _check_like(what: str, given: Tensor, wanted: Tensor) -> None:
    if given.shape != wanted.shape or given.dtype != wanted.dtype or given.device != wanted.device:
        raise ValueError(
            f"{what}: {given.dtype} {tuple(given.shape)} on {given.device}, captured for {wanted.dtype} "
            f"{tuple(wanted.shape)} on {wanted.device}; capture again for it, or call the refiner instead"
        )
