"""The one primitive against dense convolution, and the plan's tables against loops over pixels."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from sparserefine.engines.choose import engine_report, get_engine
from sparserefine.engines.reference import convolution as engine_module
from sparserefine.engines.reference.geometry import TableStencil
from sparserefine.sparse import Plan, PlanSpec, Sites, SparseBatchNorm, SparseConv, SparseUNet, conv
from support import (
    DTYPES,
    ENGINES,
    KERNEL,
    PATTERNS,
    SIZES,
    TRITON_ENGINES,
    assert_close,
    at_sites,
    coarser_mask,
    dense_around,
    dense_down,
    dense_up,
    device_of,
    engine_of,
    mask_of,
    on_grid,
    slow_if_interpreted,
)

C_IN, C_OUT = 3, 5
SOME_ENGINES = ("torch", "cpu-generic", *TRITON_ENGINES)
"""One of each kind."""
DOWNS = ("paper", "cell")
KINDS = ("around", "down-paper", "up-paper", "down-cell", "up-cell")
SIZE = (6, 8)
MASKS = list(dict.fromkeys([*((p, SIZE) for p in PATTERNS), *(("random", size.values[0]) for size in SIZES)]))
"""Each pattern and each size, once: convolutions see tables only, which are compared on every pattern of every size."""
SHORT = (("none", SIZE), ("random", (9, 7)))
"""Of these, what fast tests leave to an interpreter."""


@cache
def plan_of(engine: str, down: str, shape: torch.Size, pixels: bytes) -> Plan:
    """Two levels of a mask; the same plan serves all kinds and precisions, as convolutions do not change it."""
    mask = torch.tensor(list(pixels), device=device_of(engine)).bool().view(shape)
    return engine_of(engine).geometry(Sites.from_mask(mask), PlanSpec(2, down))


def exact(engine: str) -> torch.dtype:
    """The highest precision of an engine."""
    return torch.float64 if engine == "torch" else torch.float32


class Case:
    """One convolution on one mask: the stencil under test, its operands, and the dense rule for the same thing."""

    def __init__(
        self,
        kind: str,
        mask: Tensor,
        dtype: torch.dtype = torch.float64,
        engine: str = "torch",
        channels: int = C_OUT,
        inputs: int = C_IN,
    ) -> None:
        self.kind, _, self.down = kind.partition("-")
        level = plan_of(engine, self.down or "cell", mask.shape, bytes(mask.flatten().tolist())).levels[0]
        mask = mask.to(device_of(engine))
        coarse = coarser_mask(mask, self.down or "cell")
        self.source, self.target = {"around": (mask, mask), "down": (mask, coarse), "up": (coarse, mask)}[self.kind]
        self.stencil = {
            "around": lambda: level.around,
            "down": lambda: level.down,
            "up": lambda: level.down.transposed(),
        }[self.kind]()
        taps = 9 if self.kind == "around" else KERNEL[self.down] ** 2
        random = torch.Generator().manual_seed(2)
        n_in, n_out = int(self.source.sum()), int(self.target.sum())

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(mask.device)

        # Scaled so that results and both gradients are of size about 1.
        self.x = normal(n_in, inputs).to(dtype)
        self.weight = (normal(taps, inputs, channels) / (taps * inputs) ** 0.5).to(dtype)
        self.grad = (normal(n_out, channels) / max(1, n_out) ** 0.5).to(dtype)

    def oracle(self, x: Tensor, weight: Tensor) -> Tensor:
        """y = dense convolution of the zero-filled image, read at the output sites."""
        image = on_grid(x, self.source)
        if self.kind == "around":
            result = dense_around(image, weight)
        elif self.kind == "down":
            result = dense_down(image, weight, self.down)
        else:
            result = dense_up(image, weight, self.down, tuple(self.target.shape[1:]))
        return at_sites(result, self.target)

    def check(self) -> None:
        """Value and both gradients."""
        operands = [t.clone().requires_grad_() for t in (self.x, self.weight)]
        y = conv(*operands, self.stencil)
        grads = torch.autograd.grad(y, operands, self.grad)
        exact = [t.double().requires_grad_() for t in (self.x, self.weight)]
        expected = self.oracle(*exact)
        expected_grads = torch.autograd.grad(expected, exact, self.grad.double())
        for actual, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
            assert actual.dtype == self.x.dtype
            assert_close(actual, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("engine", "pattern", "size"), slow_if_interpreted(ENGINES, MASKS, SHORT))
def test_equals_dense_convolution(engine: str, kind: str, size: tuple[int, int], pattern: str) -> None:
    Case(kind, mask_of(pattern, size, batch=2), exact(engine), engine).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("engine", "pattern"), slow_if_interpreted(SOME_ENGINES, [("none",), ("random",)], [("random",)])
)
def test_equals_dense_convolution_in_each_precision(engine: str, kind: str, pattern: str, dtype: torch.dtype) -> None:
    size = (9, 8) if engine != "triton" else (4, 5)  # interpreted, it takes its time
    Case(kind, mask_of(pattern, size, batch=3), dtype, engine).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("engine", "channels"), slow_if_interpreted(ENGINES, [(1,), (3,), (17,), (19,), (33,), (64,)], [(1,), (33,)])
)
def test_any_number_of_channels(engine: str, kind: str, channels: int) -> None:
    size = (30, 41) if engine != "triton" else (10, 13)  # interpreted, it takes its time
    Case(kind, mask_of("random", size, batch=2), exact(engine), engine, channels).check()


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_one_chunk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_CHUNK_BYTES", {"cpu": 1, "other": 1})
    case = Case(kind, mask_of("all", (50, 61)))
    assert len(engine_module._chunks(case.stencil.table, C_IN, 8)) > 1
    case.check()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, pattern: str) -> None:
    case = Case(kind, mask_of(pattern, (4, 3)))
    operands = (case.x.requires_grad_(), case.weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: conv(x, w, case.stencil), operands)


@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", SOME_ENGINES)
def test_only_the_gradient_that_is_wanted(engine: str, kind: str, wanted: str) -> None:
    case = Case(kind, mask_of("random", (6, 5)), exact(engine), engine)
    operand = getattr(case, wanted).requires_grad_()
    conv(case.x, case.weight, case.stencil).backward(case.grad)
    other = case.weight if wanted == "x" else case.x
    assert operand.grad is not None
    assert other.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", SOME_ENGINES)
def test_strided_operands(engine: str, kind: str) -> None:
    case = Case(kind, mask_of("random", (6, 5)), exact(engine), engine)
    expected = conv(case.x, case.weight, case.stencil)
    x = case.x.t().contiguous().t()
    weight = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(conv(x, weight, case.stencil), expected)


@pytest.mark.parametrize("engine", SOME_ENGINES)
def test_autocast_computes_in_its_own_precision(engine: str) -> None:
    case = Case("around", mask_of("random", (6, 5)), torch.float32, engine)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = conv(x, weight, case.stencil)
    y.backward(case.grad.bfloat16())
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert_close(y, case.oracle(x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        pytest.param(torch.zeros(4, 3), torch.zeros(9, 3, 5), ["(4, 3)", "[6, C_in]"], id="row count"),
        pytest.param(torch.zeros(6), torch.zeros(9, 3, 5), ["(6,)"], id="features not a matrix"),
        pytest.param(torch.zeros(6, 3), torch.zeros(4, 3, 5), ["(4, 3, 5)", "[9, 3, C_out]"], id="tap count"),
        pytest.param(torch.zeros(6, 3), torch.zeros(9, 2, 5), ["(9, 2, 5)", "[9, 3, C_out]"], id="channel count"),
        pytest.param(torch.zeros(6, 3), torch.zeros(9, 3), ["(9, 3)"], id="weight not of three axes"),
        pytest.param(torch.zeros(6, 3), torch.zeros(9, 3, 5).double(), ["float32", "float64"], id="two dtypes"),
        pytest.param(torch.zeros(6, 3).int(), torch.zeros(9, 3, 5).int(), ["int32"], id="integers"),
    ],
)
def test_refuses_operands_that_do_not_fit(x: Tensor, weight: Tensor, words: list[str]) -> None:
    around = Case("around", mask_of("all", (2, 3))).stencil
    with pytest.raises(ValueError, match=r"expected|reads") as error:
        conv(x, weight, around)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- tracing


@pytest.mark.parametrize("pattern", ["none", "random"])
@pytest.mark.parametrize("kind", ["around", "down-cell", "up-paper"])
def test_operators_of_the_cpu_engine_are_well_formed(kind: str, pattern: str) -> None:
    case = Case(kind, mask_of(pattern, (5, 6)), torch.float32, "cpu-generic")
    arguments = case.stencil.operands(case.x.requires_grad_(), case.weight.requires_grad_())
    ops = torch.ops.sparserefine
    torch.library.opcheck(ops.cpu_conv.default, arguments, raise_exception=True)
    around = Case("around", mask_of(pattern, (5, 6)), torch.float32, "cpu-generic")
    torch.library.opcheck(ops.cpu_conv_weight.default, (around.x, around.grad, around.stencil.table, "generic"))


@pytest.mark.parametrize("kind", ["around", "down-cell", "up-paper"])
@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_operators_of_the_triton_engine_are_well_formed(engine: str, kind: str) -> None:
    case = Case(kind, mask_of("random", (4, 5)), torch.float32, engine)
    ops = torch.ops.sparserefine
    arguments = case.stencil.operands(case.x.requires_grad_(), case.weight.requires_grad_())
    torch.library.opcheck(ops.triton_conv.default, arguments, raise_exception=True)
    around = Case("around", mask_of("random", (4, 5)), torch.float32, engine)
    torch.library.opcheck(ops.triton_conv_weight.default, (around.x, around.grad, around.stencil.table))


@pytest.mark.parametrize("pattern", ["none", "random"])
@pytest.mark.parametrize("kind", ["around", "up-paper"])
def test_operators_are_well_formed(kind: str, pattern: str) -> None:
    case = Case(kind, mask_of(pattern, (5, 6)), torch.float32)
    stencil, ops = case.stencil, torch.ops.sparserefine
    operands = (case.x.requires_grad_(), case.weight.requires_grad_())
    torch.library.opcheck(
        ops.gather_gemm.default, (*operands, stencil.table, stencil.reverse, stencil.mirrored), raise_exception=True
    )
    torch.library.opcheck(ops.gather_gemm_weight.default, (case.x.detach(), case.grad, stencil.table))


class TwoConvolutions(nn.Module):
    """Tables as inputs, so that one exported graph serves any site set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SparseConv(3, 4), SparseConv(4, 2)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        around = TableStencil(table, table, True)
        return self.second(self.first(x, around).relu(), around)


def test_compiles_without_a_graph_break() -> None:
    module = TwoConvolutions()
    case = Case("around", mask_of("random", (6, 5)), torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_close(compiled(case.x, case.stencil.table), module(case.x, case.stencil.table))
    compiled(case.x, case.stencil.table).sum().backward()
    assert module.first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("engine", "down"), slow_if_interpreted(SOME_ENGINES, [("paper",), ("cell",)], [("cell",)]))
def test_a_network_compiles_without_a_graph_break(engine: str, down: str) -> None:
    if engine.startswith("cpu") and Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch.compile before torch 2.12 makes copies of frozen dataclasses from their fields alone")
    device = device_of(engine)
    mask, network = mask_of("random", (6, 5)).to(device), SparseUNet(3, 2, (3, 4), 1, down).to(device)
    plan = engine_of(engine).plan(mask, network.spec)
    x = torch.randn(int(mask.sum()), 3, device=device)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    seen = []
    for module in (network.eval(), compiled):
        network.zero_grad()
        logits = module(x, plan)
        logits.sum().backward()
        seen.append([logits.detach(), *(p.grad.clone() for p in network.parameters())])
    for actual, expected in zip(*seen, strict=True):
        assert_close(actual, expected)


def test_exports_for_any_number_of_sites() -> None:
    module = TwoConvolutions()
    first, second = (Case("around", mask_of(p, (6, 5)), torch.float32) for p in ("random", "all"))
    n = torch.export.Dim("n", min=2)
    program = torch.export.export(module, (first.x, first.stencil.table), dynamic_shapes=({0: n}, {0: n}))
    for case in (first, second):
        assert_close(program.module()(case.x, case.stencil.table), module(case.x, case.stencil.table))


# ---- plans


def brute_force(mask: Tensor, down: str) -> tuple[list, list, list, list]:
    """Neighbours, cells of the next level, children and parents, by loops over pixels.

    around[n][dr, dc] = row of site (r + dr - 1, c + dc - 1); children[o][i, j] = row of site (2 o_r + i, 2 o_c + j);
    parents[n][i, j] = row of the cell o with 2 o + (i, j) = the site; the number of rows where there is none.
    """
    batch, height, width = mask.shape
    k = 3 if down == "paper" else 2
    h, w = (max(0, (n - 3) // 2 + 1) if down == "paper" else -(-n // 2) for n in (height, width))
    taps = [(i, j) for i in range(k) for j in range(k)]
    sites = [(b, r, c) for b in range(batch) for r in range(height) for c in range(width) if mask[b, r, c]]
    row_of = {site: n for n, site in enumerate(sites)}
    cells = [
        (b, r, c)
        for b in range(batch)
        for r in range(h)
        for c in range(w)
        if any((b, 2 * r + i, 2 * c + j) in row_of for i, j in taps)
    ]
    cell_row = {cell: n for n, cell in enumerate(cells)}
    around = [[row_of.get((b, r + i, c + j), len(sites)) for i in (-1, 0, 1) for j in (-1, 0, 1)] for b, r, c in sites]
    children = [[row_of.get((b, 2 * r + i, 2 * c + j), len(sites)) for i, j in taps] for b, r, c in cells]
    parents = [
        [
            cell_row.get((b, (r - i) // 2, (c - j) // 2), len(cells)) if (r - i) % 2 == (c - j) % 2 == 0 else len(cells)
            for i, j in taps
        ]
        for b, r, c in sites
    ]
    return around, cells, children, parents


@pytest.mark.parametrize("down", DOWNS)
@pytest.mark.parametrize(
    ("engine", "size", "pattern"),
    slow_if_interpreted(
        SOME_ENGINES, product([size.values[0] for size in SIZES], PATTERNS), [((9, 7), "random"), ((1, 7), "all")]
    ),
)
def test_tables_against_loops(engine: str, down: str, size: tuple[int, int], pattern: str) -> None:
    mask = mask_of(pattern, size, batch=3)
    plan = engine_of(engine).geometry(Sites.from_mask(mask), PlanSpec(3, down))
    assert len(plan.levels) == 3
    assert plan.levels[-1].down is None
    for fine, coarse in zip(plan.levels, plan.levels[1:], strict=False):
        around, cells, children, parents = brute_force(fine.sites.mask(), down)
        assert fine.around.table.dtype == fine.down.table.dtype == torch.int32
        assert fine.around.table.tolist() == around
        assert fine.down.table.tolist() == children
        assert fine.down.reverse.tolist() == parents
        assert coarse.sites.coords.tolist() == [list(cell) for cell in cells]


@pytest.mark.parametrize(("down", "sizes"), [("paper", (9, 4, 1, 0, 0)), ("cell", (9, 5, 3, 2, 1))])
def test_level_sizes(down: str, sizes: tuple[int, ...]) -> None:
    plan = get_engine("torch").geometry(Sites.from_mask(mask_of("all", (9, 9))), PlanSpec(5, down))
    assert tuple(level.sites.height for level in plan.levels) == sizes
    assert [len(level.sites) for level in plan.levels] == [size**2 for size in sizes]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
def test_sites_of_every_level_are_sorted_and_unique(down: str, pattern: str) -> None:
    plan = get_engine("torch").geometry(Sites.from_mask(mask_of(pattern, (11, 14), batch=3)), PlanSpec(4, down))
    for level in plan.levels:
        assert bool((level.sites.flat.diff() > 0).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cell_gives_every_site_one_parent(pattern: str) -> None:
    plan = get_engine("torch").geometry(Sites.from_mask(mask_of(pattern, (9, 7))), PlanSpec(2, "cell"))
    fine, coarse = plan.levels
    assert bool(((fine.down.reverse < len(coarse.sites)).sum(1) == 1).all())


@pytest.mark.parametrize(
    ("levels", "down", "words"), [(0, "cell", "levels = 0"), (2, "mean", "down = 'mean', expected 'paper' or 'cell'")]
)
def test_bad_plan_spec(levels: int, down: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PlanSpec(levels, down)


# ---- sites


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sites_and_mask_are_the_same_thing(pattern: str) -> None:
    mask = mask_of(pattern, (5, 7), batch=3)
    sites = Sites.from_mask(mask)
    assert torch.equal(sites.mask(), mask)
    assert sites.flat.tolist() == [i for i, true in enumerate(mask.flatten().tolist()) if true]
    assert len(sites) == int(mask.sum())
    assert sites.density == int(mask.sum()) / mask.numel()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gather_reads_the_pixels(pattern: str, batch: int, dtype: torch.dtype) -> None:
    mask = mask_of(pattern, (5, 7), batch)
    image = torch.randint(0, 255, (batch, 3, 5, 7)).to(dtype)
    assert torch.equal(Sites.from_mask(mask).gather(image), at_sites(image, mask))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 5, 8), (1, 3, 4, 7)])
def test_gather_refuses_another_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected the same") as error:
        Sites.from_mask(mask_of("all", (5, 7))).gather(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("mask", [torch.ones(1, 2, 2), torch.ones(2, 2, dtype=torch.bool)], ids=["float", "2 axes"])
def test_from_mask_refuses_what_is_no_mask(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected bool \[B, H, W\]"):
        Sites.from_mask(mask)


# ---- few rows, engines


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_few_rows_uses_the_running_statistics(rows: int) -> None:
    norm = SparseBatchNorm(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(rows, 4)
    y = norm.train()(x)
    y.sum().backward()
    assert_close(y, (x - before["running_mean"]) / (before["running_var"] + norm.eps).sqrt())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None


def test_batch_norm_of_two_rows_learns() -> None:
    norm = SparseBatchNorm(4)
    x = torch.randn(2, 4)
    assert_close(norm.train()(x), torch.nn.functional.batch_norm(x, None, None, training=True))
    assert norm.num_batches_tracked == 1


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match=r"engine 'spconv' is not known.*torch"):
        get_engine("spconv")


def test_engine_report_says_what_auto_picks() -> None:
    assert get_engine("auto").name in engine_report()["auto"]
