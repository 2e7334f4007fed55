"""The refine step as one CUDA graph: no launches one by one, no waiting in between, the same time for every image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from sparserefine.bases.base import FrozenBase
from sparserefine.images.coarse import Coarse
from sparserefine.images.normalisation import check_image
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, PaddedPlan, Plan, SparseUNet
from sparserefine.sparse.plan import coarser_size
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector

if TYPE_CHECKING:
    from sparserefine.engines.triton.engine import TritonEngine

_WARM_UP = 3  # runs before the recording: kernels are compiled, and libraries take the memory that they keep

_CHANGED = "the refiner {} since it was captured; call refiner.eval() and refiner.capture(...) again"


class Step(Protocol):
    """All stages after the base; :meth:`sparserefine.refiner.SparseRefiner.step` is one."""

    def __call__(
        self,
        image: Tensor,
        coarse: Coarse,
        *,
        plan_of: Callable[[Tensor], Plan | PaddedPlan] | None = None,
        timer: StageTimer | None = None,
    ) -> Refinement:
        """The refinement of an image; see :meth:`sparserefine.refiner.SparseRefiner.step`."""


@dataclass(frozen=True)
class Recipe:
    """What is to be captured, as values.

    Attributes:
        step: what the graph holds.
        base: makes the coarse logits, outside the graph.
        coarse_of: logits ``[B, K, h, w]`` and the images' size -> what the step takes.
        engine: of the step.
        extractor: the network of the step.
        selector: of the step; its budget limits the room that is needed.
        macs: multiply-accumulates of each stage, from the sites of each level.
        trained: parameters and buffers that the graph reads. It is refused once they have changed.
        changed: what else has changed since, in words that follow "the refiner"; ``None``: nothing.
    """

    step: Step
    base: FrozenBase
    coarse_of: Callable[[Tensor, tuple[int, int]], Coarse]
    engine: Engine
    extractor: SparseUNet
    selector: Selector
    macs: Callable[[Sequence[int]], dict[str, int]]
    trained: Sequence[Tensor]
    changed: Callable[[], str | None]


class Graph:
    """One step recorded on buffers of its own: image and coarse logits in, labels and logits at the sites out.

    Whatever the recorded kernels read or write is held here: the buffers, packed weights, and the tables of taps that
    the engine keeps with the coarse logits. Tensors of the results lie where they lay before, and are written anew by
    each run.

    Args:
        recipe: the step.
        engine: of the GPU.
        packed: the packed network that the engine has for the step now.
        image: like the ones to come.
        coarse: likewise.
        capacities: rows of each level.
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
        self._recipe, self._engine, self._packed, self._capacities = recipe, engine, packed, tuple(capacities)
        self.image = image.clone()
        self.logits = coarse.logits.detach().clone(memory_format=torch.preserve_format)
        self._coarse = replace(coarse, logits=self.logits)
        self._graph: torch.cuda.CUDAGraph | None = None
        # Not in inference mode: the generator of random numbers would keep a tensor of it, and other graphs fail then.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
            self._record()

    def _record(self) -> None:
        device = self.image.device
        if device.type != "cuda":  # kernels are interpreted: the same steps, one by one
            self._step()
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Threads that do not take part, of loaders for one, may use the GPU meanwhile.
        recording = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), recording:
            self._step()

    def _step(self) -> None:
        """All stages after the base, without the host: what the graph holds."""
        plans: list[PaddedPlan] = []

        def plan_of(mask: Tensor) -> PaddedPlan:
            plans.append(self._engine.padded_plan(mask, self._recipe.extractor.spec, self._capacities))
            return plans[0]

        self.result = self._recipe.step(self.image, self._coarse, plan_of=plan_of)
        (plan,) = plans
        self._sites = plan.levels[0].sites
        self.labels = self.result.coarse_labels.clone()
        self._engine.write_labels(self.labels, self.result.refined_logits, self._sites)
        self._report = torch.cat([plan.totals, self._recipe.base.bad_values(self.logits)[None]])

    def run(self, image: Tensor, logits: Tensor) -> None:
        """Queues one run on an image and its coarse logits; the host waits for nothing."""
        self.image.copy_(image)
        self.logits.copy_(logits)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def report(self) -> tuple[list[int], int]:
        """Of the last run: the sites of each level, and how many coarse logits are no good. Waits for the GPU."""
        counts: list[int]
        *counts, bad = self._report.tolist()
        return counts, bad

    def refinement(self, counts: Sequence[int], timer: StageTimer) -> Refinement:
        """The last run's result without padding, in memory of its own.

        Args:
            counts: its sites at each level, none of them above the capacity.
            timer: what has timed it.
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
    """What :meth:`SparseRefiner.capture` returns: called as the refiner is, on images like the one it was made with.

    The base runs as ever. All after it is one CUDA graph, recorded with room for a fixed number of sites at each
    level (``capacities``). An image with more of them is refined without the graph, and counted.

    It is valid for the weights, selector and precision of the refiner, and for the shapes and dtypes of image and
    coarse logits, that it was made with. Weights and selectors that changed, and other images, are refused. Calls come
    one after the other, from one thread and one stream.

    Attributes:
        capacities: rows of each level, full size first.
        calls: images, or batches of them, so far.
        overflows: how many of these had more sites than ``capacities``.
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
        self.capacities, self.calls, self.overflows = tuple(capacities), 0, 0
        self._recipe, self._state = recipe, _versions(recipe.trained)
        kind = image.device.type
        half, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._autocast: dict[str, Any] = {"enabled": half, "dtype": dtype}
        self._graph = Graph(recipe, engine, packed, image, coarse, self.capacities)

    def __call__(self, image: Tensor) -> Refinement:
        """Predicts full-size labels; as :meth:`SparseRefiner.forward`.

        Args:
            image: of the shape and dtype that this was made with.

        Raises:
            ValueError: the image, or what the base makes of it, is of another shape or dtype.
            RuntimeError: the refiner has changed since.
        """
        check_image(image)
        timer = StageTimer(image.device)
        with self._as_recorded():
            with timer.stage("base"):
                logits = self._recipe.base.unchecked(image)
            return self._refine(image, logits, timer)

    def refine(self, image: Tensor, coarse: Tensor) -> Refinement:
        """From given coarse logits on; as :meth:`SparseRefiner.refine`. Raises as a call does."""
        check_image(image)
        with self._as_recorded():
            return self._refine(image, coarse, StageTimer(image.device))

    def labels(self, image: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Labels ``uint8 [B, H, W]`` only, the quickest way: nothing else leaves the graph. Raises as a call does.

        Args:
            image: of the shape and dtype that this was made with.
            coarse: the base's outputs; by default the base is run.
        """
        check_image(image)
        with self._as_recorded():
            logits = self._recipe.base.unchecked(image) if coarse is None else coarse
            if self._run(image, logits) is None:
                return self._without_graph(image, logits, StageTimer(image.device)).labels()
            return self._graph.labels.clone()

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """In the precision of the recording, whatever is on around the call: base, and images with too many sites."""
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
        """Sites of each level, results being in place; ``None`` where they were too many."""
        _check_like("image", image, self._graph.image)
        _check_like("coarse logits", logits, self._graph.logits)
        changed = self._recipe.changed()
        if changed is not None:
            raise RuntimeError(_CHANGED.format(changed))
        self._graph.run(image, logits)
        if _versions(self._recipe.trained) != self._state:  # asked while the GPU is busy
            raise RuntimeError(_CHANGED.format("has other weights"))
        counts, bad = self._graph.report()
        if bad:
            self._recipe.base.checked(logits, len(image))  # which says what is wrong
        self.calls += 1
        if any(count > capacity for count, capacity in zip(counts, self.capacities, strict=True)):
            self.overflows += 1
            return None
        return counts


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps converted weights until it ends, and frees them then: a graph must not have seen them."""
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
    """Records a graph; :meth:`sparserefine.refiner.SparseRefiner.capture` tells of the arguments and errors."""
    if not images:
        raise ValueError("no image is given; capture learns from one or several how many sites there are")
    if logits is not None and len(logits) != len(images):
        raise ValueError(f"{len(logits)} coarse logits for {len(images)} images; expected as many")
    if not headroom >= 1:
        raise ValueError(f"headroom = {headroom}, expected at least 1, the room that the given images need")
    for image in images:
        check_image(image)
        _check_like("image", image, images[0])
    first = images[0]
    engine = recipe.engine.on(first.device)
    if engine.name != "triton":
        raise ValueError(
            f"images are on {first.device}, where engine {engine.name!r} runs; a CUDA graph needs a GPU and engine "
            "'triton': move refiner and images to the GPU (`sparserefine info` says what is missing)"
        )
    with torch.inference_mode():
        if logits is None:
            logits = [recipe.base(image) for image in images]
        for image, given in zip(images, logits, strict=True):
            recipe.base.checked(given, len(image))
            _check_like("coarse logits", given, logits[0])
        coarse = [recipe.coarse_of(given, (first.shape[2], first.shape[3])) for given in logits]
        packed = engine.prepare(recipe.extractor)
        if packed is None:
            raise ValueError(
                "this extractor cannot be packed, so it cannot be captured: its weights were made in inference mode, "
                "or it has hooks, or is in a precision other than float16, bfloat16 and float32"
            )
        if capacities is None:
            capacities = _capacities(recipe, engine, images, coarse, headroom)
    levels = recipe.extractor.spec.levels
    if len(capacities) != levels or min(capacities) < 1:
        raise ValueError(f"capacities = {list(capacities)}, expected {levels} numbers of sites, one a level, above 0")
    return CapturedRefiner(recipe, cast("TritonEngine", engine), packed, first, coarse[0], capacities)


def _capacities(
    recipe: Recipe, engine: Engine, images: Sequence[Tensor], coarse: Sequence[Coarse], headroom: float
) -> list[int]:
    """Room for the most sites that any of the images has at each level, ``headroom`` times, in round numbers."""
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
        result.append(max(1, min(cells, _bucket(most * headroom))))
        height, width = coarser_size(height, spec.down), coarser_size(width, spec.down)
    return result


def _bucket(sites: float) -> int:
    """The next number of the form (8 to 15) times a power of two: at most an eighth more."""
    step = 1 << max(4, int(sites).bit_length() - 4)
    return (int(sites) // step + 1) * step


def _check_like(what: str, given: Tensor, wanted: Tensor) -> None:
    if given.shape != wanted.shape or given.dtype != wanted.dtype or given.device != wanted.device:
        raise ValueError(
            f"{what}: {given.dtype} {tuple(given.shape)} on {given.device}, captured for {wanted.dtype} "
            f"{tuple(wanted.shape)} on {wanted.device}; capture again for it, or call the refiner itself"
        )
