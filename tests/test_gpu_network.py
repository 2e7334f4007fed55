"""The whole network on kernels for GPUs against its modules in float64, and how the engine keeps it packed."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from networks import K, context_of, expected_of, network
from sparserefine.engines.choose import get_engine
from sparserefine.files.images import read_image
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Plan, PlanSpec, Sites, SparseUNet
from sparserefine.studies.demo import ASSETS, IMAGE, demo_refiner_folder
from support import FEW_PATTERNS, TRITON_ENGINES, assert_close, device_of, engine_of, mask_of

if TYPE_CHECKING:
    from sparserefine.engines.triton.engine import TritonEngine
    from sparserefine.engines.triton.network import PackedNetwork

DOWNS = ("paper", "cell")
NETWORKS = [((16, 32), 2), ((3, 5, 7), 1), ((17,), 1)]
"""Planes and blocks."""
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
"""Of logits, in root mean squares of all."""


@pytest.fixture(scope="module", params=TRITON_ENGINES)
def device(request: pytest.FixtureRequest) -> torch.device:
    engine_of(request.param)
    return device_of(request.param)


@pytest.fixture
def engine(device: torch.device) -> TritonEngine:
    """One that has not packed anything."""
    from sparserefine.engines.triton.engine import TritonEngine

    return TritonEngine()


@cache
def reference(
    planes: tuple[int, ...], blocks: int, down: str, pattern: str
) -> tuple[SparseUNet, Tensor, Tensor, Tensor]:
    """Network, mask, features and what float64 makes of them."""
    with torch.random.fork_rng(devices=[]):  # whoever comes first, and whoever finds it made
        torch.manual_seed(0)
        net, mask = network(planes, blocks, down), mask_of(pattern, (7, 9), batch=3)
        x = torch.randn(int(mask.sum()), 3)
    return net, mask, x, expected_of(net, x, mask)


def of(device: torch.device, *case: object) -> tuple[SparseUNet, Tensor, Tensor, Tensor]:
    """:func:`reference` on a device."""
    net, mask, x, expected = reference(*case)
    return copy.deepcopy(net).to(device), mask.to(device), x.to(device), expected


def prepared(engine: TritonEngine, net: nn.Module) -> PackedNetwork:
    packed = engine.prepare(net)
    assert packed is not None
    return packed


def plan_of(engine: TritonEngine, net: SparseUNet, mask: Tensor) -> Plan:
    return engine.plan(mask, net.spec)


def judge(logits: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert not logits.requires_grad
    if len(expected):
        error = (logits.cpu() - expected).abs().max() / expected.square().mean().sqrt()
        assert float(error) <= LARGEST_ERROR[dtype]


# ---- values


@pytest.mark.parametrize("pattern", FEW_PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize(("planes", "blocks"), NETWORKS, ids=str)
def test_equals_the_modules(
    engine: TritonEngine, device: torch.device, planes: tuple[int, ...], blocks: int, down: str, pattern: str
) -> None:
    net, mask, x, expected = of(device, planes, blocks, down, pattern)
    packed, plan = prepared(engine, net), plan_of(engine, net, mask)
    logits = packed(x, plan)
    judge(logits, expected)
    assert torch.equal(packed(x, plan), logits)


@pytest.mark.parametrize("pattern", FEW_PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
def test_adds_the_context(engine: TritonEngine, device: torch.device, down: str, pattern: str) -> None:
    net, mask = network((3, 5, 7), 1, down, context=7), mask_of(pattern, (7, 9), batch=3)
    x = torch.randn(int(mask.sum()), 3)
    expected, net = expected_of(net, x, mask), net.to(device)
    plan = plan_of(engine, net, mask.to(device))
    judge(prepared(engine, net)(x.to(device), plan, context_of(net, plan)), expected)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("autocast", torch.float16),
        pytest.param("autocast", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("weights", torch.float16, marks=pytest.mark.slow),
        ("weights", torch.bfloat16),
    ],
)
def test_in_half_precision(engine: TritonEngine, device: torch.device, how: str, dtype: torch.dtype) -> None:
    net, mask, x, expected = of(device, (16, 32), 2, "paper", "random")
    if how == "weights":
        net = net.to(dtype)
        expected = expected_of(net, x, mask)
    with torch.autocast(device.type, dtype, enabled=how == "autocast"):
        packed = prepared(engine, net)
        logits = packed(x, plan_of(engine, net, mask))
    assert packed.dtype == dtype
    judge(logits, expected, dtype)


def test_many_channels_and_rows(engine: TritonEngine, device: torch.device) -> None:
    """More than one block of rows, of columns and of inputs."""
    net, mask = network((16, 144)).to(device), mask_of("random", (16, 20)).to(device)
    x = torch.randn(int(mask.sum()), 3, device=device)
    judge(prepared(engine, net)(x, plan_of(engine, net, mask)), expected_of(net, x, mask))


@pytest.mark.parametrize("down", DOWNS)
def test_more_levels_than_the_image_has(engine: TritonEngine, device: torch.device, down: str) -> None:
    net, mask = network((3, 8, 3, 8, 3), 1, down).to(device), mask_of("all", (5, 4)).to(device)
    x = torch.randn(20, 3, device=device)
    judge(prepared(engine, net)(x, plan_of(engine, net, mask)), expected_of(net, x, mask))


def test_input_is_left_alone_and_may_be_strided(engine: TritonEngine, device: torch.device) -> None:
    net, mask, x, expected = of(device, (16, 32), 2, "cell", "random")
    strided = x.t().contiguous().t().requires_grad_()
    judge(prepared(engine, net)(strided, plan_of(engine, net, mask)), expected)
    assert torch.equal(strided, x)


def test_what_is_not_a_number_stays_visible(engine: TritonEngine, device: torch.device) -> None:
    net, mask, x, _ = of(device, (16, 32), 2, "cell", "all")
    x[5, 1] = torch.nan
    logits = prepared(engine, net)(x, plan_of(engine, net, mask))
    assert torch.equal(logits.isnan(), net(x, plan_of(engine, net, mask)).isnan())
    assert bool(logits.isnan().any())


def test_no_image(engine: TritonEngine, device: torch.device) -> None:
    net = network((16, 32)).to(device)
    plan = engine.plan(torch.zeros(0, 4, 5, dtype=torch.bool, device=device), net.spec)
    assert prepared(engine, net)(torch.zeros(0, 3, device=device), plan).shape == (0, K)


@pytest.mark.parametrize("down", DOWNS)
def test_memory_is_freed_as_soon_as_it_is_read(
    engine: TritonEngine, device: torch.device, down: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each launch there are only the buffers that this or a later step reads."""
    from sparserefine.engines.triton import network as module

    net, mask, x, _ = of(device, (16, 32), 2, down, "random")
    packed, plan = prepared(engine, net), plan_of(engine, net, mask)
    made: list[weakref.ref[Tensor]] = []
    seen: list[int] = []
    empty = torch.empty

    def counted(*shape: object, **options: object) -> Tensor:
        tensor = empty(*shape, **options)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(module, "convolve", lambda *_, **__: seen.append(sum(one() is not None for one in made)))
    monkeypatch.setattr(torch, "empty", counted)
    packed(x, plan)
    steps, held, expected = packed.program.steps, 0, []
    for step in steps:
        held += len(step.begins)
        expected.append(held)
        held -= len(step.ends)
    assert seen == expected
    assert held == 1


# ---- padded plans


@pytest.mark.parametrize("pattern", FEW_PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
def test_a_padded_plan_changes_no_bit(
    engine: TritonEngine, device: torch.device, down: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, mask, x, _ = of(device, (16, 32), 1, down, pattern)
    packed, plan = prepared(engine, net), plan_of(engine, net, mask)
    expected, n = packed(x, plan), len(x)
    padded = engine.padded_plan(mask, net.spec, [n + 40, n + 7])
    features = torch.full((n + 40, 3), torch.nan, device=device)
    features[:n] = x
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        """What a kernel does not write must not reach the result."""
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(packed(features, padded)[:n], expected)


def test_too_little_room_is_survived(engine: TritonEngine, device: torch.device) -> None:
    net, mask, x, _ = of(device, (16, 32), 2, "paper", "random")
    padded = engine.padded_plan(mask, net.spec, [15, 4])
    assert prepared(engine, net)(x[:15], padded).shape == (15, K)
    assert padded.totals.tolist() == [len(level.sites) for level in plan_of(engine, net, mask).levels]


def test_a_padded_plan_is_not_for_single_layers(engine: TritonEngine, device: torch.device) -> None:
    net, mask, _, _ = of(device, (16, 32), 2, "cell", "random")
    padded = engine.padded_plan(mask, net.spec, [100, 50])
    with pytest.raises(ValueError, match="padded plan is for packed networks only"):
        net(torch.zeros(100, 3, device=device), padded)


# ---- packing


def test_what_is_not_packed(engine: TritonEngine, device: torch.device) -> None:
    class Other(SparseUNet):
        pass

    assert engine.prepare(network((16,)).to(device).train()) is None
    assert engine.prepare(network((16,)).to(device).double()) is None
    assert engine.prepare(network((16,)).to("meta")) is None
    assert engine.prepare(nn.Linear(3, 4).to(device).eval()) is None
    assert engine.prepare(Other(3, K, (16,)).to(device).eval()) is None
    assert engine.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(network((16,)).to(device))) is None
    hooked = network((16,)).to(device)
    hooked.stem.register_forward_hook(lambda *_: None)
    assert engine.prepare(hooked) is None
    with torch.inference_mode():
        inside = network((16,)).to(device)
    assert engine.prepare(inside) is None


def _scale(net: SparseUNet) -> None:
    with torch.no_grad():
        net.head_norm.weight.mul_(-2)


def _replace(net: SparseUNet) -> None:
    net.head.weight = nn.Parameter(torch.randn_like(net.head.weight))


def _load(net: SparseUNet) -> None:
    net.load_state_dict({name: value * 1.25 for name, value in net.state_dict().items()})


def _statistics(net: SparseUNet) -> None:
    mask = mask_of("random", (9, 7)).to(net.head.weight.device)
    x = 5 * torch.randn(int(mask.sum()), 3, device=mask.device)
    with torch.no_grad():
        net.train()(x, get_engine("torch").geometry(Sites.from_mask(mask), net.spec))
    net.eval()


@pytest.mark.parametrize("change", [_scale, _replace, _load, _statistics])
def test_follows_its_parameters(
    engine: TritonEngine, device: torch.device, change: Callable[[SparseUNet], None]
) -> None:
    net, mask, x, expected = of(device, (16, 32), 1, "cell", "random")
    plan, first = plan_of(engine, net, mask), prepared(engine, net)
    judge(first(x, plan), expected)
    assert prepared(engine, net.train().eval()) is first
    change(net)
    second = prepared(engine, net)
    assert second is not first
    judge(second(x, plan), expected_of(net, x, mask))


def test_weights_are_copied_only_where_they_change(engine: TritonEngine, device: torch.device) -> None:
    net = network((16, 32)).to(device)
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert prepared(engine, net).megabytes == 0
    with torch.autocast(device.type, torch.bfloat16):
        assert prepared(engine, net).megabytes == weights * 2 / 1e6


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_copies_of_an_engine(
    engine: TritonEngine, device: torch.device, copier: Callable[[TritonEngine], TritonEngine]
) -> None:
    net, mask, x, expected = of(device, (16,), 1, "cell", "random")
    prepared(engine, net)
    other = copier(engine)
    assert other is not engine
    judge(prepared(other, net)(x, plan_of(other, net, mask)), expected)


# ---- checks


def test_a_plan_of_the_torch_engine_is_refused(engine: TritonEngine, device: torch.device) -> None:
    net, mask, x, _ = of(device, (16,), 1, "cell", "random")
    plan = get_engine("torch").geometry(Sites.from_mask(mask), net.spec)
    with pytest.raises(ValueError, match="built by engine 'torch'; build it by engine 'triton'"):
        prepared(engine, net)(x, plan)


@pytest.mark.parametrize("wrong", [PlanSpec(3, "paper"), PlanSpec(2, "cell")], ids=["kind", "levels"])
def test_a_plan_for_another_network_is_refused(engine: TritonEngine, device: torch.device, wrong: PlanSpec) -> None:
    net, mask, x, _ = of(device, (16, 32), 2, "paper", "random")
    with pytest.raises(ValueError, match="plan was built for") as error:
        prepared(engine, net)(x, engine.plan(mask, wrong))
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: x[:, :2], lambda x: x[:, 0]])
def test_features_that_do_not_fit_are_refused(
    engine: TritonEngine, device: torch.device, spoil: Callable[[Tensor], Tensor]
) -> None:
    net, mask, x, _ = of(device, (16, 32), 2, "cell", "random")
    with pytest.raises(ValueError, match=r"features are .*, expected"):
        prepared(engine, net)(spoil(x), plan_of(engine, net, mask))


# ---- training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("down", DOWNS)
def test_gradients_equal_the_torch_engines(
    engine: TritonEngine, device: torch.device, down: str, training: bool
) -> None:
    mask, seen = mask_of("random", (7, 9), batch=3).to(device), []
    n = int(mask.sum())
    x, cotangent = torch.randn(n, 3, device=device), torch.randn(n, K, device=device) / n**0.5
    for how, dtype in ((engine, torch.float32), (get_engine("torch"), torch.float64)):
        net = network((9, 17), 1, down).to(device, dtype).train(training)
        features = x.to(dtype).requires_grad_()
        logits = net(features, how.geometry(Sites.from_mask(mask), net.spec))
        gradients = torch.autograd.grad(logits, [features, *net.parameters()], cotangent.to(dtype))
        seen.append([logits, *gradients, *net.buffers()])
    for actual, expected in zip(*seen, strict=True):
        scale = max(1e-3, float(expected.detach().double().square().mean().sqrt()))
        assert_close((actual.double() / scale).float(), expected.double() / scale)


def test_training_in_half_precision(engine: TritonEngine, device: torch.device) -> None:
    """Autocast, as Lightning's ``bf16-mixed``: parameters and their gradients stay float32."""
    mask = mask_of("random", (9, 7)).to(device)
    net, x = network((8, 16)).to(device).train(), torch.randn(int(mask.sum()), 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = net(x, engine.plan(mask, net.spec)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


# ---- a trained network


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "same"), [(torch.float32, 1.0), (torch.float16, 0.99)])
def test_a_trained_network_gives_the_same_labels(
    engine: TritonEngine, device: torch.device, dtype: torch.dtype, same: float
) -> None:
    image = read_image(ASSETS / f"{IMAGE}.webp")[None, :, 1040:1072, 1640:1680]
    seen = []
    for name in ("torch", "triton"):
        refiner = SparseRefiner.from_pretrained(demo_refiner_folder(), engine=name, trust_base=True).eval()
        with torch.inference_mode():
            coarse = refiner.base(image)
            half = name == "triton" and dtype == torch.float16
            with torch.autocast(device.type, torch.float16, enabled=half):
                seen.append(refiner.to(device).refine(image.to(device), coarse.to(device)))
    expected, found = seen
    assert torch.equal(found.sites.coords, expected.sites.coords)
    assert found.density > 0.1
    at = found.sites.mask()
    assert float((found.labels() == expected.labels())[at].double().mean()) >= same
