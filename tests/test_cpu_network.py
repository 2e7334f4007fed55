"""The whole network on compiled kernels against its modules in float64, and how the engine keeps it packed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import K, context_of, expected_of, network
from sparserefine.engines.choose import get_engine
from sparserefine.engines.cpu import network as network_module
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.network import PackedNetwork
from sparserefine.files.images import read_image
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Plan, PlanSpec, Sites, SparseUNet
from sparserefine.studies.demo import ASSETS, IMAGE, demo_refiner_folder
from support import CPU_ENGINES, PATTERNS, assert_close, engine_of, mask_of

DOWNS = ("paper", "cell")
NETWORKS = [((16, 32, 64), 2), ((3, 5, 7), 2), ((17, 33), 3), ((16,), 1), ((64, 128), 1)]
"""Planes and blocks."""
LARGEST_ERROR = 5e-4
"""Of logits, in root mean squares of all."""
SAME_LABELS = 0.9999
HRF = Path(__file__).parents[1] / "runs" / "hrf"


@pytest.fixture(scope="module", params=CPU_ENGINES)
def engine(request: pytest.FixtureRequest) -> CpuEngine:
    found = engine_of(request.param)
    assert isinstance(found, CpuEngine)
    return found


@pytest.fixture
def fresh(engine: CpuEngine) -> CpuEngine:
    """An engine that has not packed anything."""
    return CpuEngine(engine.kernels.library.name)


@cache
def reference(
    planes: tuple[int, ...], blocks: int, down: str, pattern: str
) -> tuple[SparseUNet, Tensor, Tensor, Tensor]:
    """Network, mask, features and what float64 makes of them."""
    with torch.random.fork_rng(devices=[]):  # whoever comes first, and whoever finds it made
        torch.manual_seed(0)
        net, mask = network(planes, blocks, down), mask_of(pattern, (21, 30), batch=3)
        x = torch.randn(int(mask.sum()), 3)
    return net, mask, x, expected_of(net, x, mask)


def plan_of(engine: CpuEngine, net: SparseUNet, mask: Tensor) -> Plan:
    return engine.geometry(Sites.from_mask(mask), net.spec)


def prepared(engine: CpuEngine, net: nn.Module) -> PackedNetwork:
    packed = engine.prepare(net)
    assert packed is not None
    return packed


def judge(logits: Tensor, expected: Tensor) -> None:
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert not logits.requires_grad
    if len(expected):
        error = (logits - expected).abs().max() / expected.square().mean().sqrt()
        assert float(error) <= LARGEST_ERROR
        assert float((logits.argmax(1) == expected.argmax(1)).double().mean()) >= SAME_LABELS


# ---- values


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize(("planes", "blocks"), NETWORKS, ids=str)
def test_equals_the_modules(engine: CpuEngine, planes: tuple[int, ...], blocks: int, down: str, pattern: str) -> None:
    net, mask, x, expected = reference(planes, blocks, down, pattern)
    packed, plan = prepared(engine, net), plan_of(engine, net, mask)
    logits = packed(x, plan)
    judge(logits, expected)
    assert torch.equal(packed(x, plan), logits)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize(("planes", "blocks"), NETWORKS[:2], ids=str)
def test_adds_the_context(engine: CpuEngine, planes: tuple[int, ...], blocks: int, down: str, pattern: str) -> None:
    net, mask = network(planes, blocks, down, context=7), mask_of(pattern, (21, 30), batch=3)
    x, plan = torch.randn(int(mask.sum()), 3), plan_of(engine, net, mask)
    logits = prepared(engine, net)(x, plan, context_of(net, plan))
    judge(logits, expected_of(net, x, mask))


@pytest.mark.parametrize("down", DOWNS)
def test_equals_the_modules_on_many_sites(engine: CpuEngine, down: str) -> None:
    """More than one block of rows and of tiles at each level."""
    net, mask = network((16, 32, 48), 1, down), mask_of("random", (90, 120))
    x = torch.randn(int(mask.sum()), 3)
    judge(prepared(engine, net)(x, plan_of(engine, net, mask)), expected_of(net, x, mask))


@pytest.mark.parametrize(("fewest", "most"), [(8, 0), (10**6, 10**6), (1, 10**6)], ids=["F(2x2)", "indirect", "F(4x4)"])
def test_each_way_to_convolve(engine: CpuEngine, monkeypatch: pytest.MonkeyPatch, fewest: int, most: int) -> None:
    monkeypatch.setattr(network_module, "_FEWEST_CHANNELS", fewest)
    monkeypatch.setattr(network_module, "_MOST_CHANNELS", most)
    net, mask, x, expected = reference((16, 32, 64), 2, "cell", "random")
    judge(PackedNetwork(net, engine.kernels)(x, plan_of(engine, net, mask)), expected)


@pytest.mark.parametrize("down", DOWNS)
def test_more_levels_than_the_image_has(engine: CpuEngine, down: str) -> None:
    net, mask = network((3, 8, 3, 8, 3), 1, down), mask_of("all", (5, 4))
    x = torch.randn(20, 3)
    judge(prepared(engine, net)(x, plan_of(engine, net, mask)), expected_of(net, x, mask))


def test_images_of_a_batch_do_not_see_each_other(engine: CpuEngine) -> None:
    net, mask = network((16, 32)), mask_of("random", (9, 7), batch=2)
    x, first, packed = torch.randn(int(mask.sum()), 3), int(mask[0].sum()), prepared(engine, net)
    alone = [packed(x[:first], plan_of(engine, net, mask[:1])), packed(x[first:], plan_of(engine, net, mask[1:]))]
    assert torch.equal(packed(x, plan_of(engine, net, mask)), torch.cat(alone))


def test_input_is_left_alone_and_may_be_strided(engine: CpuEngine) -> None:
    net, mask, x, expected = reference((16, 32, 64), 2, "cell", "random")
    strided = x.t().contiguous().t().requires_grad_()
    judge(prepared(engine, net)(strided, plan_of(engine, net, mask)), expected)
    assert torch.equal(strided, x)


@pytest.mark.parametrize("count", [2, 3])
def test_number_of_threads_changes_no_bit(engine: CpuEngine, count: int) -> None:
    net, mask, x, _ = reference((16, 32, 64), 2, "paper", "random")
    packed = prepared(engine, net)
    alone = packed(x, plan_of(engine, net, mask))
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert torch.equal(packed(x, plan_of(engine, net, mask)), alone)
    finally:
        torch.set_num_threads(before)


def test_milliseconds_of_each_level(engine: CpuEngine) -> None:
    net, mask, x, _ = reference((16, 32, 64), 2, "cell", "random")
    ms: list[float] = []
    prepared(engine, net)(x, plan_of(engine, net, mask), levels_ms=ms)
    assert len(ms) == 3
    assert min(ms) > 0


# ---- packing


def test_what_is_not_packed(fresh: CpuEngine) -> None:
    class Other(SparseUNet):
        pass

    assert fresh.prepare(network((16,)).train()) is None
    assert fresh.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(network((16,)))) is None
    assert fresh.prepare(network((16,)).double()) is None
    assert fresh.prepare(network((16,)).to("meta")) is None
    assert fresh.prepare(nn.Linear(3, 4).eval()) is None
    assert fresh.prepare(Other(3, K, (16,)).eval()) is None
    with torch.inference_mode():
        inside = network((16,))
    assert fresh.prepare(inside) is None
    half = network((16, 32))
    half.head.double()
    assert fresh.prepare(half) is None


def _scale(net: SparseUNet) -> None:
    with torch.no_grad():
        net.head.weight.mul_(-2)


def _scale_in_inference_mode(net: SparseUNet) -> None:
    with torch.inference_mode():
        net.stem.weight.mul_(-2)


def _scale_data(net: SparseUNet) -> None:
    net.stem.weight.data.mul_(-2)  # which makes no new version


def _replace(net: SparseUNet) -> None:
    net.head.weight = nn.Parameter(torch.randn_like(net.head.weight))


def _load(net: SparseUNet) -> None:
    net.load_state_dict({name: value * 1.25 for name, value in net.state_dict().items()})


def _assign(net: SparseUNet) -> None:
    net.load_state_dict({name: value * 1.25 for name, value in net.state_dict().items()}, assign=True)


def _train(net: SparseUNet) -> None:
    mask, optimiser = mask_of("random", (9, 7)), torch.optim.AdamW(net.parameters(), 0.1)
    logits = net.train()(torch.randn(int(mask.sum()), 3), get_engine("torch").geometry(Sites.from_mask(mask), net.spec))
    logits.square().sum().backward()
    optimiser.step()
    net.eval()


def _statistics(net: SparseUNet) -> None:
    mask = mask_of("random", (9, 7))
    with torch.no_grad():
        net.train()(5 * torch.randn(int(mask.sum()), 3), get_engine("torch").geometry(Sites.from_mask(mask), net.spec))
    net.eval()


@pytest.mark.parametrize(
    "change", [_scale, _scale_in_inference_mode, _scale_data, _replace, _load, _assign, _train, _statistics]
)
def test_follows_its_parameters(fresh: CpuEngine, change: Callable[[SparseUNet], None]) -> None:
    net, mask = network((16, 32)), mask_of("random", (9, 7))
    x, plan = torch.randn(int(mask.sum()), 3), plan_of(fresh, net, mask)
    first = prepared(fresh, net)
    before = first(x, plan)
    assert prepared(fresh, net) is first
    assert prepared(fresh, net.train().eval()) is first
    change(net)
    second = prepared(fresh, net)
    assert second is not first
    assert prepared(fresh, net) is second
    assert torch.equal(first(x, plan), before)
    judge(second(x, plan), expected_of(net, x, mask))
    assert not torch.equal(second(x, plan), before)


def test_each_network_its_own(fresh: CpuEngine) -> None:
    net = network((16,))
    twin = copy.deepcopy(net)
    assert prepared(fresh, net) is not prepared(fresh, twin)
    assert prepared(fresh, net) is prepared(fresh, net)
    del twin
    assert len(fresh._packed) == 1


def test_in_inference_mode(fresh: CpuEngine) -> None:
    net, mask, x, expected = reference((16, 32, 64), 2, "cell", "random")
    with torch.inference_mode():
        packed = prepared(fresh, net)
        judge(packed(x, plan_of(fresh, net, mask)), expected)
        assert prepared(fresh, net) is packed
    judge(packed(x.clone(), plan_of(fresh, net, mask)), expected)


def test_megabytes(engine: CpuEngine) -> None:
    """At least the weights as they are, Winograd's four times as many."""
    net = network((32, 64))
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1) * 4 / 1e6
    assert weights < prepared(engine, net).megabytes < 5 * weights


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_copies_of_an_engine(engine: CpuEngine, copier: Callable[[CpuEngine], CpuEngine]) -> None:
    net, mask, x, expected = reference((16, 32, 64), 2, "cell", "random")
    prepared(engine, net)
    other = copier(engine)
    assert other is not engine
    assert other.kernels.library.name == engine.kernels.library.name
    judge(prepared(other, net)(x, plan_of(other, net, mask)), expected)


def test_copies_of_an_owner(engine: CpuEngine) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.engine = network((16,)), engine

    owner, mask = Owner(), mask_of("random", (6, 7))
    prepared(engine, owner.net)
    twin, x = copy.deepcopy(owner), torch.randn(int(mask.sum()), 3)
    results = [prepared(o.engine, o.net)(x, plan_of(o.engine, o.net, mask)) for o in (owner, twin)]
    assert torch.equal(*results)


# ---- checks


def test_a_plan_of_the_torch_engine_is_refused(engine: CpuEngine) -> None:
    net, mask, x, _ = reference((16,), 1, "cell", "random")
    plan = get_engine("torch").geometry(Sites.from_mask(mask), net.spec)
    with pytest.raises(ValueError, match="built by engine 'torch'; build it by engine 'cpu'"):
        prepared(engine, net)(x, plan)


@pytest.mark.parametrize("wrong", [PlanSpec(3, "paper"), PlanSpec(2, "cell")], ids=["kind", "levels"])
def test_a_plan_for_another_network_is_refused(engine: CpuEngine, wrong: PlanSpec) -> None:
    net, mask, x, _ = reference((16, 32, 64), 2, "cell", "random")
    with pytest.raises(ValueError, match="plan was built for") as error:
        prepared(engine, net)(x, engine.geometry(Sites.from_mask(mask), wrong))
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda x: x[:-1], "expected", id="too few sites"),
        pytest.param(lambda x: torch.cat([x, x[:1]]), "expected", id="too many sites"),
        pytest.param(lambda x: x.double(), "float64.*expected float32", id="float64"),
        pytest.param(lambda x: x.half(), "float16.*expected float32", id="float16"),
        pytest.param(lambda x: x[:, :2], "2.*expected", id="too few channels"),
        pytest.param(lambda x: x[:, 0], "expected", id="not a matrix"),
        pytest.param(lambda x: x.to("meta"), "meta.*expected", id="another device"),
    ],
)
def test_features_that_do_not_fit_are_refused(engine: CpuEngine, spoil: Callable[[Tensor], Tensor], words: str) -> None:
    net, mask, x, _ = reference((16, 32, 64), 2, "cell", "random")
    with pytest.raises(ValueError, match=words):
        prepared(engine, net)(spoil(x), plan_of(engine, net, mask))


# ---- memory and threads


def test_scratch_is_kept_for_the_next_forward(fresh: CpuEngine) -> None:
    net = network((16, 32))
    packed = prepared(fresh, net)
    masks = [mask_of(pattern, (30, 40)) for pattern in ("all", "random", "one", "none", "all")]
    blocks = []
    for mask in masks:
        packed(torch.randn(int(mask.sum()), 3), plan_of(fresh, net, mask))
        assert len(packed._memory._idle) == 1
        blocks.append(packed._memory._idle[0])
    assert all(block is blocks[0] for block in blocks)


def test_scratch_grows_to_the_largest_forward(fresh: CpuEngine) -> None:
    net, floats = network((16, 32)), []
    packed = prepared(fresh, net)
    for pattern in ("one", "all", "one"):
        mask = mask_of(pattern, (30, 40))
        packed(torch.randn(int(mask.sum()), 3), plan_of(fresh, net, mask))
        floats.append([len(block) for block in packed._memory._idle])
    assert floats[0][0] < floats[1][0] == floats[2][0]
    assert all(len(kept) == 1 for kept in floats)


def test_scratch_comes_back_after_an_error(fresh: CpuEngine) -> None:
    net, mask = network((16, 32)), mask_of("all", (8, 8))
    packed, plan = prepared(fresh, net), plan_of(fresh, net, mask)
    packed(torch.randn(64, 3), plan)
    (block,) = packed._memory._idle
    with pytest.raises(ValueError, match="expected"):
        packed(torch.randn(64, 3).double(), plan)
    assert packed._memory._idle[0] is block


def test_logits_outlive_the_next_forward(engine: CpuEngine) -> None:
    net, mask, x, expected = reference((16, 32, 64), 2, "cell", "random")
    packed, plan = prepared(engine, net), plan_of(engine, net, mask)
    first = packed(x, plan)
    packed(-x, plan)
    judge(first, expected)


def test_two_python_threads_at_once(fresh: CpuEngine) -> None:
    net, masks = network((16, 32)), [mask_of("all", (30, 40)), mask_of("random", (50, 60))]
    packed = prepared(fresh, net)
    jobs = [(torch.randn(int(mask.sum()), 3), plan_of(fresh, net, mask)) for mask in masks]
    alone = [packed(*job) for job in jobs]
    results: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        for _ in range(10):
            results[index].append(packed(*jobs[index]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for found, wanted in zip(results, alone, strict=True):
        assert len(found) == 10
        assert all(torch.equal(logits, wanted) for logits in found)
    assert len(packed._memory._idle) == 1


# ---- training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("down", DOWNS)
def test_gradients_equal_the_torch_engines(engine: CpuEngine, down: str, training: bool) -> None:
    mask, seen = mask_of("random", (21, 30), batch=3), []
    x, cotangent = torch.randn(int(mask.sum()), 3), torch.randn(int(mask.sum()), K) / int(mask.sum()) ** 0.5
    for how, dtype in ((engine, torch.float32), (get_engine("torch"), torch.float64)):
        net = network((9, 17, 33), 1, down).to(dtype).train(training)
        features = x.to(dtype).requires_grad_()
        logits = net(features, how.geometry(Sites.from_mask(mask), net.spec))
        gradients = torch.autograd.grad(logits, [features, *net.parameters()], cotangent.to(dtype))
        seen.append([logits, *gradients, *net.buffers()])
    for actual, expected in zip(*seen, strict=True):
        scale = max(1e-3, float(expected.detach().double().square().mean().sqrt()))
        assert_close((actual.double() / scale).float(), expected.double() / scale)


# ---- trained networks


@pytest.mark.parametrize(
    "folder", [demo_refiner_folder(), *(HRF / name / "best" for name in ("refiner4", "refiner4p", "refiner8"))], ids=str
)
def test_trained_networks_give_the_same_labels(folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    image = read_image(ASSETS / f"{IMAGE}.webp")[None, :, 900:1300, 1500:1900]
    seen = []
    for name in ("cpu", "torch"):
        refiner = SparseRefiner.from_pretrained(folder, engine=name, trust_base=True).eval()
        with torch.inference_mode():
            seen.append(refiner(image))
    cpu, expected = seen
    error = (cpu.entropy() - expected.entropy()).abs().mean()
    assert float(error) < 1e-5
    sites = cpu.sites.mask() | expected.sites.mask()
    assert sites.float().mean() > 0.02
    assert (cpu.labels() == expected.labels())[sites].double().mean() >= SAME_LABELS
    assert abs(len(cpu.sites) - len(expected.sites)) <= 1e-4 * len(expected.sites) + 1
