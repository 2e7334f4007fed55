"""What the cells of each level see of all their pixels, against dense means written here, and where it is added."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet
from sparserefine.engines.reference import context as definition
from sparserefine.images.coarse import Coarse
from sparserefine.images.upsampling import Upsampling, Window
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import PlanSpec, Sites
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.context import block_means
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.selector import Selector
from support import (
    CPU_ENGINES,
    ENGINES,
    KERNEL_ENGINES,
    assert_close,
    coarser_mask,
    device_of,
    engine_of,
    mask_of,
    slow_if_interpreted,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter divides by 0 aloud

DOWNS = ("paper", "cell")
SCALE = torch.tensor([0.02, 0.03, 0.04, *torch.linspace(0.01, 0.05, 13)])
SHIFT = torch.tensor([-0.5, 0.25, 1.0, *torch.linspace(-0.6, 0.6, 13)])
"""Of each channel of an image, the first ones for fewer."""
UPSAMPLINGS = {
    "logits": Upsampling(),
    "scores": Upsampling(outputs="scores"),
    "nearest": Upsampling("nearest", input_size=(9, 14)),
}


def photographs(batch: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randint(
        0, 256, (batch, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


def outputs_of(kind: str, k: int, size: tuple[int, int], batch: int = 1) -> Tensor:
    """Coarse logits; or scores, those of some pixels all zero."""
    values = torch.randn(batch, k, *size, generator=torch.Generator().manual_seed(6)) * 3
    return values.relu() * (values.amax(1, keepdim=True) > 2) if kind == "scores" else values


def probabilities(kind: str, coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """``float64 [B, K, H, W]``."""
    inner = UPSAMPLINGS[kind].input_size
    full = F.interpolate(coarse.double(), inner or size, mode="bilinear", align_corners=False)
    if inner:
        full = F.interpolate(full, size, mode="nearest-exact")
    if kind != "scores":
        return full.softmax(1)
    total = full.sum(1, keepdim=True)
    shares = torch.where(total > 0, full / total, 1 / full.shape[1]).clamp_min(1e-10)
    return shares / shares.sum(1, keepdim=True)


def seen_by_pixels(kind: str, image: Tensor, coarse: Tensor) -> Tensor:
    """``float64 [B, C + K, H, W]``."""
    scale, shift = (values[: image.shape[1], None, None].double() for values in (SCALE, SHIFT))
    return torch.cat([image.double() * scale + shift, probabilities(kind, coarse, tuple(image.shape[2:]))], 1)


def expected_means(seen: Tensor, valid: Tensor, mask: Tensor, levels: int, down: str) -> list[Tensor]:
    """Of each level, from dense sums over blocks and the number of pixels that count in each block."""
    height, width = mask.shape[1:]
    result = []
    for level in range(levels):
        side = 2**level
        pad = (0, -width % side, 0, -height % side)
        counted = F.pad(valid[:, None].double(), pad)
        sums = F.avg_pool2d(F.pad(seen * valid[:, None], pad) * counted, side) * side**2
        counts = F.avg_pool2d(counted, side) * side**2
        b, r, c = mask.nonzero(as_tuple=True)
        result.append((sums / counts.clamp_min(1))[b, :, r, c])
        mask = coarser_mask(mask, down)
    return result


def found(
    engine: str, image: Tensor, coarse: Coarse, mask: Tensor, levels: int, down: str, valid: Tensor | None = None
) -> list[Tensor]:
    """What an engine makes of it, on the CPU."""
    made, device = engine_of(engine), device_of(engine)
    logits = coarse.logits
    moved = replace(
        coarse, logits=logits.to(device) if isinstance(logits, Tensor) else [one.to(device) for one in logits]
    )
    channels = image.shape[1]
    image, mask, scale, shift = (v.to(device) for v in (image, mask, SCALE[:channels], SHIFT[:channels]))
    plan = made.plan(mask, PlanSpec(levels, down))  # type: ignore[arg-type]
    means = block_means(image, moved, None if valid is None else valid.to(device), plan, scale, shift, made)
    assert [tuple(one.shape) for one in means] == [(n, channels + coarse.num_classes) for n in plan.rows]
    assert all(one.dtype == torch.float32 and not one.requires_grad for one in means)
    return [one.cpu() for one in means]


def judge(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, torch.float32)


# ---- values

CASES = [
    (kind, k, size, pattern)
    for kind, k in (("logits", 2), ("logits", 5), ("scores", 3), ("nearest", 4))
    for size, pattern in (((23, 37), "random"), ((13, 10), "border"))
]
FEW = [("logits", 2, (13, 10), "border"), ("scores", 3, (13, 10), "border")]


@pytest.mark.parametrize(("engine", "kind", "k", "size", "pattern"), slow_if_interpreted(ENGINES, CASES, FEW))
@pytest.mark.parametrize("down", DOWNS)
def test_means_are_those_of_the_dense_image(
    engine: str, kind: str, k: int, size: tuple[int, int], pattern: str, down: str
) -> None:
    """Three images, one without a site; sizes that no block divides."""
    image, mask = photographs(3, size), mask_of(pattern, size, batch=3)
    logits = outputs_of(kind, k, (5, 7), batch=3)
    expected = expected_means(seen_by_pixels(kind, image, logits), torch.ones_like(mask), mask, 4, down)
    judge(found(engine, image, Coarse(logits, size, UPSAMPLINGS[kind]), mask, 4, down), expected)


@pytest.mark.parametrize("pattern", ["none", "one", "corner", "all"])
@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("engine", ENGINES)
def test_hardly_any_and_every_site(engine: str, down: str, pattern: str) -> None:
    """More levels than the image has."""
    size = (9, 6)
    image, mask, logits = photographs(1, size), mask_of(pattern, size), outputs_of("logits", 3, (4, 3))
    mask[0, -1, -1] |= pattern == "corner"
    expected = expected_means(seen_by_pixels("logits", image, logits), torch.ones_like(mask), mask, 6, down)
    judge(found(engine, image, Coarse(logits, size), mask, 6, down), expected)


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_crop_sees_what_the_image_sees_there(engine: str, down: str) -> None:
    """Cut at whole blocks, without a resize; the second crop reaches past its image, where nothing counts."""
    whole, size, levels = (40, 56), (16, 24), 4
    images, logits = photographs(2, whole), outputs_of("logits", 4, (10, 14), batch=2)
    seen = seen_by_pixels("logits", images, logits)
    corners = [(8, 16), (32, 40)]
    image, expected = torch.zeros(2, 3, *size, dtype=torch.uint8), torch.zeros(2, 7, *size, dtype=torch.float64)
    valid = torch.zeros(2, *size, dtype=torch.bool)
    for b, (top, left) in enumerate(corners):
        h, w = min(size[0], whole[0] - top), min(size[1], whole[1] - left)
        image[b, :, :h, :w] = images[b, :, top : top + h, left : left + w]
        expected[b, :, :h, :w] = seen[b, :, top : top + h, left : left + w]
        valid[b, :h, :w] = True
    windows = [Window((float(whole[0]), float(whole[1])), (float(top), float(left))) for top, left in corners]
    mask = mask_of("random", size, batch=2)  # also where nothing is valid: those cells see zeros
    judge(
        found(engine, image, Coarse(list(logits), size, windows=windows), mask, levels, down, valid),
        expected_means(expected, valid, mask, levels, down),
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_single_pixels_that_do_not_count(engine: str) -> None:
    size = (14, 11)
    image, mask, logits = photographs(1, size), mask_of("random", size), outputs_of("logits", 2, (5, 4))
    valid = torch.rand(1, *size, generator=torch.Generator().manual_seed(7)) < 0.3
    expected = expected_means(seen_by_pixels("logits", image, logits), valid, mask, 3, "cell")
    assert any(bool((one == 0).all(1).any()) for one in expected)
    judge(found(engine, image, Coarse(logits, size), mask, 3, "cell", valid), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_images_and_logits_of_other_dtypes(engine: str, dtype: torch.dtype) -> None:
    size = (7, 10)
    image, mask = (photographs(1, size).double() / 255).to(dtype), mask_of("random", size)
    logits = outputs_of("logits", 3, (4, 5)).to(dtype)
    expected = expected_means(seen_by_pixels("logits", image, logits), torch.ones_like(mask), mask, 3, "cell")
    judge(found(engine, image, Coarse(logits, size), mask, 3, "cell"), expected)


@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_many_classes(engine: str) -> None:
    size = (12, 9)
    image, mask, logits = photographs(1, size), mask_of("one", size), outputs_of("logits", 150, (3, 4))
    expected = expected_means(seen_by_pixels("logits", image, logits), torch.ones_like(mask), mask, 4, "cell")
    judge(found(engine, image, Coarse(logits, size), mask, 4, "cell"), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_channels(engine: str, channels: int, dtype: torch.dtype) -> None:
    """Three images, one without a site; some pixels do not count; as many classes as a vector holds, and more."""
    size = (13, 10)
    image, mask = photographs(3, size, channels).to(dtype), mask_of("random", size, 3)
    logits, valid = outputs_of("logits", channels + 2, (4, 3), 3), torch.ones_like(mask)
    valid[:, 4, 3], valid[:, :, 8:] = False, False
    expected = expected_means(seen_by_pixels("logits", image, logits), valid, mask, 3, "cell")
    judge(found(engine, image, Coarse(logits, size), mask, 3, "cell", valid), expected)


@pytest.mark.parametrize("values", [1, 40, 333])
@pytest.mark.parametrize("down", DOWNS)
def test_pixels_in_small_portions(values: int, down: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are looked at together: parts of a block, some blocks."""
    size = (13, 18)
    image, mask, coarse = photographs(3, size), mask_of("random", size, 3), outputs_of("logits", 3, (4, 6), batch=3)
    expected = found("torch", image, Coarse(coarse, size), mask, 4, down)
    monkeypatch.setattr(definition, "_CHUNK_VALUES", values)
    judge(found("torch", image, Coarse(coarse, size), mask, 4, down), expected)


@pytest.mark.parametrize("what", ["image", "coarse logits", "valid"])
def test_sites_of_another_image_are_refused(what: str) -> None:
    size = (8, 8)
    image, coarse, valid = photographs(1, size), Coarse(outputs_of("logits", 2, (4, 4)), size), torch.ones(1, 8, 8) > 0
    if what == "image":
        image = photographs(1, (8, 9))
    elif what == "valid":
        valid = valid[:, :5]
    else:
        coarse = replace(coarse, size=(9, 8))
    engine = engine_of("torch")
    plan = engine.geometry(Sites.from_mask(mask_of("all", size)), PlanSpec(2, "cell"))
    with pytest.raises(ValueError, match=rf"{what} of \[B, H, W\] = .*, the sites are of \[1, 8, 8\]"):
        block_means(image, coarse, valid, plan, SCALE[:3], SHIFT[:3], engine)


@pytest.mark.parametrize(
    "wrong",
    [
        [(0, 3, 3), (0, 0, 1)],
        [(0, 2, 5), (0, 2, 4)],
        [(0, 2, 4), (0, 2, 4)],
        [(0, 6, 0)],
        [(0, 0, 8)],
        [(0, 0, -1)],
        [(0, -1, 0)],
        [(1, 0, 0), (0, 0, 0)],
        [(2, 0, 0)],
        [(-1, 0, 0)],
    ],
    ids=str,
)
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_compiled_code_refuses_cells_that_are_not_those_of_a_plan(engine: str, level: int, wrong: list) -> None:
    """It never writes elsewhere, and never leaves a row unwritten without a word."""
    size, made = (6, 8), engine_of(engine)
    coords = torch.tensor(wrong, dtype=torch.int32)
    right = torch.zeros(1, 3, dtype=torch.int32)
    cells = [Sites(coords if depth == level else right, 2, 6, 8) for depth in range(3)]
    with pytest.raises(ValueError, match=r"cells of .*outside of 2 images of 6 x 8 pixels, or not in ascending order"):
        made.block_means(
            photographs(2, size), Coarse(outputs_of("logits", 2, (3, 4), 2), size), None, SCALE[:3], SHIFT[:3], cells
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_threads_change_nothing(engine: str, threads: int) -> None:
    size, before = (90, 71), torch.get_num_threads()
    image, mask, coarse = (
        photographs(2, size),
        mask_of("random", size, 2),
        Coarse(outputs_of("logits", 5, (9, 8), 2), size),
    )
    expected = found(engine, image, coarse, mask, 3, "paper")
    torch.set_num_threads(threads)
    try:
        actual = found(engine, image, coarse, mask, 3, "paper")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


# ---- in a refiner


def refiner_of(engine: str = "torch", *, context: bool = True, down: str = "cell") -> SparseRefiner:
    """Nothing in it is at its start, except the context's own maps."""
    torch.manual_seed(4)
    base = FrozenBase(UNet(3, (4, 8)), 3, BaseConfig(ratio=0.5))
    extractor = ExtractorConfig((4, 6, 5), down=down, context=context)  # type: ignore[arg-type]
    config = RefinerConfig(selector=Selector(0.0, 60), extractor=extractor)
    refiner = SparseRefiner(base, config, engine=engine)
    for parameter in refiner.ensembler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return refiner.eval()


def with_weights(refiner: SparseRefiner) -> SparseRefiner:
    torch.manual_seed(8)
    for parameter in refiner.extractor.context.parameters():
        torch.nn.init.normal_(parameter)
    return refiner


@torch.inference_mode()
def logits_of(refiner: SparseRefiner, image: Tensor) -> Tensor:
    return refiner(image).sparse_logits


def test_it_starts_as_the_refiner_without(tmp_path: Path) -> None:
    image, plain, refiner = photographs(2, (13, 19)), refiner_of(context=False), refiner_of()
    names = {name: value for name, value in refiner.trained_state().items() if ".context." not in name}
    assert names.keys() == plain.trained_state().keys()
    refiner.load_state_dict(plain.trained_state(), strict=False)
    assert torch.equal(logits_of(refiner, image), logits_of(plain, image))
    assert not torch.allclose(logits_of(with_weights(refiner), image), logits_of(plain, image), atol=1e-2)


@pytest.mark.parametrize("down", DOWNS)
def test_the_network_is_given_the_means_of_its_levels(down: str) -> None:
    image, refiner, seen = photographs(2, (13, 19)), refiner_of(down=down), []
    refiner.extractor.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    result = refiner(image)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (refiner.config.mean, refiner.config.std))
    full = F.interpolate(result.coarse.logits.double(), (13, 19), mode="bilinear", align_corners=False).softmax(1)
    pixels = torch.cat([(image.double() / 255 - mean) / std, full], 1)
    mask = result.sites.mask()
    judge(seen[0], expected_means(pixels, torch.ones_like(mask), mask, 3, down))
    macs = refiner_of(context=False, down=down).extractor.macs_of([60, 40, 20])
    assert refiner.extractor.macs_of([60, 40, 20]) == macs + 6 * (60 * 4 + 40 * 6 + 20 * 5)


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_every_engine_refines_alike(engine: str, down: str) -> None:
    """At sites that are given: entropies of engines differ by rounding, and so may what is above a threshold."""
    image, coarse, mask = photographs(3, (13, 19)), outputs_of("logits", 3, (6, 9), 3), mask_of("random", (13, 19), 3)
    made, device = engine_of(engine), device_of(engine)

    def logits(name: str, device: torch.device) -> Tensor:
        refiner = with_weights(refiner_of(name, down=down)).to(device)
        runs = made if name != "torch" else engine_of(name)
        refiner.engine.on = lambda _: runs  # type: ignore[method-assign]
        given = refiner.coarse_of(coarse.to(device), (13, 19))
        with torch.inference_mode():
            result = refiner.step(
                image.to(device), given, plan_of=lambda _: runs.plan(mask.to(device), refiner.extractor.spec)
            )
        return result.sparse_logits.cpu()

    judge([logits(made.name, device)], [logits("torch", torch.device("cpu"))])


def test_8_bits_come_close_and_leave_the_context_in_float() -> None:
    from sparserefine.engines.choose import get_engine
    from sparserefine.sparse.interface import Unavailable

    try:
        get_engine("cpu-int8")
    except Unavailable as reason:
        pytest.skip(str(reason))
    image, refiner = photographs(2, (48, 40)), with_weights(refiner_of())
    refiner.selector = Selector(0.0)
    expected = logits_of(refiner, image)
    refiner.quantize([image])
    rounded = with_weights(refiner_of("cpu-int8"))
    rounded.selector = Selector(0.0)
    rounded.load_state_dict(refiner.state_dict(), strict=False)
    actual = logits_of(rounded, image)
    assert not torch.equal(actual, expected)
    assert float((actual - expected).norm()) <= 0.05 * float(expected.norm())


@pytest.mark.parametrize("engine", ["torch", "cpu"])
def test_training_reaches_its_weights(engine: str) -> None:
    refiner = refiner_of(engine).train()
    image, valid = photographs(2, (16, 16)), torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1, :, 9:] = False
    coarse = [outputs_of("logits", 3, (6, 7))[0], outputs_of("logits", 3, (5, 4))[0]]
    windows = [Window((24.0, 28.0), (3.5, 4.0)), Window((20.5, 9.0))]
    result = refiner.refine(image, coarse, windows=windows, valid=valid)
    result.sparse_logits.square().sum().backward()
    for name, parameter in refiner.extractor.context.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.slow
def test_a_network_with_it_compiles_without_a_graph_break() -> None:
    net, engine = with_weights(refiner_of()).extractor.train(), engine_of("torch")
    plan = engine.plan(mask_of("random", (6, 5)), net.spec)
    x, context = torch.randn(len(plan.sites), 3), [torch.randn(n, 6) for n in plan.rows]
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, plan, context), net(x, plan, context))


def test_stored_and_read_back(tmp_path: Path) -> None:
    image, refiner = photographs(1, (13, 19)), with_weights(refiner_of())
    refiner.save_pretrained(tmp_path / "with")
    read = SparseRefiner.from_pretrained(tmp_path / "with", base=refiner.base, engine="torch")
    assert read.config == refiner.config
    assert torch.equal(logits_of(read, image), logits_of(refiner, image))
    assert "extractor.context.2.weight" in read.trained_state()


def test_a_refiner_without_is_stored_as_before_there_was_any(tmp_path: Path) -> None:
    """So that older versions read it."""
    refiner_of(context=False).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["extractor"]
    assert list(stored) == ["planes", "blocks", "down", "features"]
    read = SparseRefiner.from_pretrained(tmp_path, base=refiner_of().base)
    assert read.config == refiner_of(context=False).config


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_it_is_true_or_false(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"context = .*, expected true or false"):
        ExtractorConfig(context=value)  # type: ignore[arg-type]
    refiner_of().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["extractor"]["context"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"extractor\.context = .*, expected true or false"):
        SparseRefiner.from_pretrained(tmp_path, base=refiner_of().base)


@pytest.mark.parametrize("engine", ["torch", "cpu", "triton"])
def test_a_network_with_context_wants_it_and_one_without_refuses_it(engine: str) -> None:
    made, mask = engine_of("cpu-generic" if engine == "cpu" else engine), mask_of("all", (4, 4))
    for context in (True, False):
        net = refiner_of(context=context).extractor
        plan = made.plan(mask, net.spec)
        run = net if engine == "torch" else made.prepare(net)
        assert run is not None
        given = None if context else [torch.zeros(n, 6) for n in plan.rows]
        with pytest.raises(ValueError, match=r"context is .*, expected .*: see ExtractorConfig.context"):
            run(torch.zeros(16, 3), plan, given)
