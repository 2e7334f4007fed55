"""The refine step as one CUDA graph: no launches one by one, no waiting in between, the same time for every image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sparserefine.images.normalisation import check_image
from sparserefine.machine.timing import StageTimer
from sparserefine.sparse import Engine, Plan, Sites
from sparserefine.sparse.plan import coarser_size

if TYPE_CHECKING:
    from sparserefine.engines.triton.engine import TritonEngine
    from sparserefine.engines.triton.geometry import PaddedPlan
    from sparserefine.refiner import Refinement, SparseRefiner

_WARM_UP = 3  # runs before the recording: kernels are compiled, and libraries take the memory that they keep

_CHANGED = "the refiner {} since it was captured; call refiner.eval() and refiner.capture(...) again"


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
        self, refiner: SparseRefiner, engine: TritonEngine, image: Tensor, coarse: Tensor, capacities: Sequence[int]
    ) -> None:
        self.capacities, self.calls, self.overflows = tuple(capacities), 0, 0
        self._refiner, self._engine, self._selector = refiner, engine, refiner.selector
        self._image, self._coarse = image.clone(), coarse.detach().clone(memory_format=torch.preserve_format)
        self._packed = engine.prepare(refiner.extractor)  # its memory is the graph's, whatever the engine packs next
        self._watched = [*refiner.trained_parameters(), *refiner.extractor.buffers()]
        self._state = self._versions()
        self._graph: torch.cuda.CUDAGraph | None = None
        kind = image.device.type
        half, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._autocast: dict[str, Any] = {"enabled": half, "dtype": dtype}
        # Not in inference mode: the generator of random numbers would keep a tensor of it, and other graphs fail then.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
            self._record()

    def _record(self) -> None:
        device = self._image.device
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
        """All stages after the base, without the host: what the graph holds. Results lie where they lay before."""
        timer = StageTimer(torch.device("cpu"))  # of the recording; nobody asks it
        self._result = self._refiner._refine(self._image, self._coarse, None, None, timer, self._plan)
        self._labels = self._result.labels()
        bad = ~self._coarse.isfinite()
        if self._refiner.base.outputs == "scores":
            bad |= self._coarse < 0
        self._report = torch.cat([self._totals, bad.sum(dtype=torch.int32)[None]])

    def _plan(self, mask: Tensor) -> Plan:
        plan: PaddedPlan = self._engine.padded_plan(mask, self._refiner.extractor.spec, self.capacities)
        self._totals = plan.totals
        return plan

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
                coarse = self._refiner.base.unchecked(image)
            return self._refine(image, coarse, timer)

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
            coarse = self._refiner.base.unchecked(image) if coarse is None else coarse
            if self._run(image, coarse) is None:
                return self._eager(image, coarse, StageTimer(image.device)).labels()
            return self._labels.clone()

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """In the precision of the recording, whatever is on around the call: base, and images with too many sites."""
        with torch.inference_mode(), torch.autocast(self._image.device.type, **self._autocast):
            yield

    def _refine(self, image: Tensor, coarse: Tensor, timer: StageTimer) -> Refinement:
        with timer.stage("refine"):
            counts = self._run(image, coarse)
        if counts is None:
            return self._eager(image, coarse, timer)
        return self._copy(counts, timer)

    def _eager(self, image: Tensor, coarse: Tensor, timer: StageTimer) -> Refinement:
        return self._refiner._refine(image, coarse, None, None, timer)

    def _run(self, image: Tensor, coarse: Tensor) -> list[int] | None:
        """Sites of each level, results being in place; ``None`` where they were too many."""
        _check_like("image", image, self._image)
        _check_like("coarse logits", coarse, self._coarse)
        if self._refiner.training:
            raise RuntimeError(_CHANGED.format("is in training mode"))
        if self._refiner.selector is not self._selector:
            raise RuntimeError(_CHANGED.format("has another selector"))
        self._image.copy_(image)
        self._coarse.copy_(coarse)
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        if self._versions() != self._state:  # asked while the GPU is busy
            raise RuntimeError(_CHANGED.format("has other weights"))
        counts: list[int]
        *counts, bad = self._report.tolist()
        if bad:
            self._refiner.base.checked(coarse, len(image))  # which says what is wrong
        self.calls += 1
        if any(count > capacity for count, capacity in zip(counts, self.capacities, strict=True)):
            self.overflows += 1
            return None
        return counts

    def _copy(self, counts: list[int], timer: StageTimer) -> Refinement:
        """The result without padding, in memory of its own: the graph's is written anew by the next image."""
        n, held = counts[0], self._result
        sites = Sites(held.sites.coords[:n].clone(), held.sites.batch_size, held.sites.height, held.sites.width)
        refiner = self._refiner
        macs = {"extractor": refiner.extractor.macs_of(counts), "ensembler": refiner.ensembler.macs(n)}
        return replace(
            held,
            coarse=self._coarse.clone(),
            coarse_labels=held.coarse_labels.clone(),
            coarse_entropy=held.coarse_entropy.clone(),
            sites=sites,
            coarse_logits=held.coarse_logits[:n].clone(),
            sparse_logits=held.sparse_logits[:n].clone(),
            refined_logits=held.refined_logits[:n].clone(),
            _timer=timer,
            _sparse_macs=macs,
        )

    def _versions(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._watched]


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
    refiner: SparseRefiner,
    images: Sequence[Tensor],
    coarse: Sequence[Tensor] | None,
    headroom: float,
    capacities: Sequence[int] | None,
) -> CapturedRefiner:
    """See :meth:`SparseRefiner.capture`, which is this."""
    if not images:
        raise ValueError("no image is given; capture learns from one or several how many sites there are")
    if coarse is not None and len(coarse) != len(images):
        raise ValueError(f"{len(coarse)} coarse logits for {len(images)} images; expected as many")
    if not headroom >= 1:
        raise ValueError(f"headroom = {headroom}, expected at least 1, the room that the given images need")
    for image in images:
        check_image(image)
        _check_like("image", image, images[0])
    first = images[0]
    engine = refiner.engine.on(first.device)
    if engine.name != "triton":
        raise ValueError(
            f"images are on {first.device}, where engine {engine.name!r} runs; a CUDA graph needs a GPU and engine "
            "'triton': move refiner and images to the GPU (`sparserefine info` says what is missing)"
        )
    refiner.eval()
    with torch.inference_mode():
        if coarse is None:
            coarse = [refiner.base(image) for image in images]
        for image, logits in zip(images, coarse, strict=True):
            refiner.base.checked(logits, len(image))
            _check_like("coarse logits", logits, coarse[0])
        packed = engine.prepare(refiner.extractor)
        if packed is None:
            raise ValueError(
                "this extractor cannot be packed, so it cannot be captured: its weights were made in inference mode, "
                "or it has hooks, or is in a precision other than float16, bfloat16 and float32"
            )
        if capacities is None:
            capacities = _capacities(refiner, engine, images, coarse, headroom)
    levels = refiner.extractor.spec.levels
    if len(capacities) != levels or min(capacities) < 1:
        raise ValueError(f"capacities = {list(capacities)}, expected {levels} numbers of sites, one a level, above 0")
    return CapturedRefiner(refiner, cast("TritonEngine", engine), first, coarse[0], capacities)


def _capacities(
    refiner: SparseRefiner, engine: Engine, images: Sequence[Tensor], coarse: Sequence[Tensor], headroom: float
) -> list[int]:
    """Room for the most sites that any of the images has at each level, ``headroom`` times, in round numbers."""
    spec, largest = refiner.extractor.spec, [0] * refiner.extractor.spec.levels
    for image, logits in zip(images, coarse, strict=True):
        size = (image.shape[2], image.shape[3])
        _, entropies = engine.uncertainty(logits, size, refiner.how(size))
        plan = engine.plan(refiner.selector.mask(entropies, None, engine), spec)
        largest = [max(most, len(level.sites)) for most, level in zip(largest, plan.levels, strict=True)]
    batch, _, height, width = images[0].shape
    budget, result = refiner.selector.budget, []
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
