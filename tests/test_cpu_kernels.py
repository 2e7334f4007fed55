"""Every compiled kernel on every instruction set against float64; their checks; tables of the geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparserefine.engines.choose import get_engine
from sparserefine.engines.cpu.convolution import parity_taps
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.geometry import Cells
from sparserefine.engines.cpu.kernels import Kernels, Tiles
from sparserefine.sparse import Plan, PlanSpec, Sites
from sparserefine.sparse.epilogue import Activation, Epilogue
from support import CPU_ENGINES, PATTERNS, assert_close, at_sites, dense_around, engine_of, mask_of, on_grid

CHANNELS = [(1, 1), (3, 16), (16, 3), (17, 19), (19, 17), (33, 1), (16, 33), (64, 16), (33, 64), (64, 80), (80, 64)]
ROWS = (0, 1, 5, 7, 9, 11, 13, 1000)
"""None; one; one less and one more than the rows of the microkernels' tiles (6, 8, 10, 12); several blocks of 240."""
WINOGRAD = {4: 1e-4, 2: 1e-5}
"""Largest error of each tile size, for results of size about 1."""
KINDS = ("indirect", "linear", "tile 4", "tile 2")
SIZES = [pytest.param(size, id="{}x{}".format(*size)) for size in ((1, 1), (3, 5), (4, 4), (37, 41))]
WIDTHS = [(5, 1), (3, 63), (6, 64), (7, 65), (9, 127), (4, 130), (1, 1), (2, 2), (37, 41)]
DOWNS = ("paper", "cell")
POISON = 1e30
FUZZ = settings(derandomize=True, deadline=None, max_examples=25)


@pytest.fixture(scope="module", params=CPU_ENGINES)
def engine(request: pytest.FixtureRequest) -> CpuEngine:
    found = engine_of(request.param)
    assert isinstance(found, CpuEngine)
    return found


@pytest.fixture(scope="module")
def kernel(engine: CpuEngine) -> Kernels:
    return engine.kernels


@pytest.fixture(scope="module")
def one() -> CpuEngine:
    """For what is refused before a kernel runs, in Python: the instruction set does not matter."""
    found = engine_of("cpu-generic")
    assert isinstance(found, CpuEngine)
    return found


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def within(rows: int, channels: int, fill: float = POISON) -> Tensor:
    """``[rows, channels]``, one float beside any alignment, the columns left and right of it poisoned."""
    wide = torch.full((rows, channels + 6), POISON)
    wide[:, 1 : 1 + channels] = fill
    return wide[:, 1 : 1 + channels]


def unharmed(view: Tensor) -> bool:
    """The columns beside a view of :func:`within` are what they were."""
    wide = view._base
    assert wide is not None
    return bool((wide[:, :1] == POISON).all() and (wide[:, 1 + view.shape[1] :] == POISON).all())


def table_of(n: int, n_in: int, taps: int) -> Tensor:
    """Any row or none (``n_in``), a third of them none."""
    rows = torch.randint(0, n_in + 1, (n, taps))
    return rows.where(torch.rand(n, taps) < 2 / 3, n_in).int()


def products(x: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    """float64 ``v[n] = sum_t x[table[n, t]] @ W[t]``, the row after the last one zero."""
    rows = torch.cat([x.double(), x.new_zeros(1, x.shape[1]).double()])[table.long()]
    return torch.einsum("ntc,tco->no", rows, weight.double())


def weight_of(taps: int, c_in: int, c_out: int) -> Tensor:
    """Scaled so that results are of size about 1."""
    return torch.randn(taps, c_in, c_out) / (taps * c_in * 2 / 3) ** 0.5


def cells_of(engine: CpuEngine, mask: Tensor) -> Cells:
    return Cells.of_sites(engine.kernels, Sites.from_mask(mask))


class Case:
    """One convolution of some kind: operands, the sums that float64 gives, and a call with any epilogue."""

    def __init__(self, engine: CpuEngine, kind: str, channels: tuple[int, int], mask: Tensor | None = None) -> None:
        c_in, self.c_out = channels
        kernel, (name, _, tile) = engine.kernels, kind.partition(" ")
        mask = mask_of("random", (9, 14), batch=2) if mask is None else mask
        self.kind, self.n = kind, int(mask.sum())
        self.x = within(self.n, c_in)
        self.x.copy_(torch.randn(self.n, c_in))
        weight = weight_of(1 if kind == "linear" else 9, *channels)
        packed = kernel.pack(weight, int(tile or 0))
        if name == "tile":
            cells = cells_of(engine, mask)
            tiles = cells.tiles if tile == "4" else cells.quarters
            self.sums = at_sites(dense_around(on_grid(self.x.double(), mask), weight.double()), mask)
            self._call: Callable[[Epilogue], None] = lambda e: kernel.winograd(self.x, tiles, packed, e)
        else:
            identity = torch.arange(self.n)[:, None]
            table = None if kind == "linear" else table_of(self.n, self.n, 9)
            self.sums = products(self.x, identity if table is None else table, weight)
            self._call = lambda e: kernel.convolve(self.x, table, packed, e, self.n)

    def __call__(self, epilogue: Epilogue) -> None:
        self._call(epilogue)

    def raw(self) -> Tensor:
        """The results without any epilogue."""
        result = within(self.n, self.c_out)
        self(Epilogue(raw=result))
        assert unharmed(result)
        return result

    def judge(self, actual: Tensor, expected: Tensor) -> None:
        if not self.kind.startswith("tile"):
            assert_close(actual, expected)
            return
        assert actual.shape == expected.shape
        if expected.numel():
            assert float((actual - expected).abs().max()) <= WINOGRAD[int(self.kind[-1])]


# ---- values


@pytest.mark.parametrize("channels", CHANNELS, ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
def test_indirect(kernel: Kernels, taps: int, channels: tuple[int, int]) -> None:
    weight = weight_of(taps, *channels)
    packed = kernel.pack(weight)
    for n in ROWS if taps != 2 else ROWS[:-1]:
        x, table, y = torch.randn(57, channels[0]), table_of(n, 57, taps), within(n, channels[1])
        kernel.convolve(x, table, packed, Epilogue(raw=y), n)
        assert_close(y, products(x, table, weight))
        assert unharmed(y)


@pytest.mark.parametrize("channels", [(8192 // 64 + 1, 64), (600, 33), (1100, 7)], ids="{0[0]}-{0[1]}".format)
def test_weights_that_pass_in_parts(kernel: Kernels, channels: tuple[int, int]) -> None:
    weight, x, table, y = (
        weight_of(9, *channels),
        torch.randn(9, channels[0]),
        table_of(40, 9, 9),
        within(40, channels[1]),
    )
    kernel.convolve(x, table, kernel.pack(weight), Epilogue(raw=y), 40)
    assert_close(y, products(x, table, weight))


def test_no_input_rows(kernel: Kernels) -> None:
    y = within(13, 5)
    kernel.convolve(torch.empty(0, 3), torch.zeros(13, 4).int(), kernel.pack(weight_of(4, 3, 5)), Epilogue(raw=y), 13)
    assert (y == 0).all()
    assert unharmed(y)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tile", ["tile 4", "tile 2"])
def test_winograd_on_patterns(engine: CpuEngine, tile: str, pattern: str, size: tuple[int, int]) -> None:
    case = Case(engine, tile, (16, 19), mask_of(pattern, size, batch=2))
    case.judge(case.raw(), case.sums)


@pytest.mark.parametrize("channels", CHANNELS, ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("tile", ["tile 4", "tile 2"])
def test_winograd_on_channels(engine: CpuEngine, tile: str, channels: tuple[int, int]) -> None:
    case = Case(engine, tile, channels)
    case.judge(case.raw(), case.sums)


@pytest.mark.parametrize(("tile", "channels"), [("tile 4", (128, 80)), ("tile 4", (64, 144)), ("tile 2", (192, 112))])
def test_winograd_with_weights_beyond_the_cache(engine: CpuEngine, tile: str, channels: tuple[int, int]) -> None:
    case = Case(engine, tile, channels)
    case.judge(case.raw(), case.sums)


@pytest.mark.parametrize("channels", CHANNELS, ids="{0[0]}-{0[1]}".format)
def test_weight_gradient(kernel: Kernels, channels: tuple[int, int]) -> None:
    for taps, n in ((9, 0), (4, 1), (9, 7), (1, 511), (4, 512), (2, 513), (9, 1100)):
        x, grad, table = torch.randn(57, channels[0]), torch.randn(n, channels[1]), table_of(n, 57, taps)
        grad /= max(1, n) ** 0.5
        rows = torch.cat([x, x.new_zeros(1, channels[0])])[table.long()].double()
        assert_close(kernel.weight_gradient(x, grad, table), torch.einsum("ntc,no->tco", rows, grad.double()))


# ---- epilogues


@pytest.mark.parametrize("activations", [0, 1, 2])
@pytest.mark.parametrize("residual", ["no residual", "residual", "in place"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_epilogue(engine: CpuEngine, kind: str, bias: bool, residual: str, activations: int) -> None:
    for c_out in (3, 16, 33):
        case = Case(engine, kind, (9, c_out))
        raw = within(case.n, c_out)
        kwargs: dict[str, Any] = {"raw": raw}
        expected = case.sums.clone()
        if bias:
            kwargs["bias"] = torch.randn(c_out)
            expected += kwargs["bias"]
        if residual != "no residual":
            kwargs["residual"] = raw if residual == "in place" else within(case.n, c_out)
            expected += kwargs["residual"].copy_(torch.randn(case.n, c_out))
        outs = [Activation(within(case.n, c_out), torch.randn(c_out), torch.randn(c_out)) for _ in range(activations)]
        case(Epilogue(**kwargs, activated=tuple(outs)))
        case.judge(raw, expected)
        for out, scale, shift in outs:
            assert_close(out, (raw * scale + shift).relu())
            assert unharmed(out)
        assert unharmed(raw)
        assert residual != "residual" or unharmed(kwargs["residual"])


@pytest.mark.parametrize("kind", KINDS)
def test_activation_without_raw(engine: CpuEngine, kind: str) -> None:
    case = Case(engine, kind, (16, 17))
    out, scale, shift = Activation(within(case.n, 17), torch.rand(17), torch.randn(17))
    case(Epilogue(activated=(Activation(out, scale, shift),)))
    case.judge(out, (case.sums * scale + shift).relu())
    case(Epilogue())


@pytest.mark.parametrize("n", [0, 1, 11, 700])
def test_results_go_to_some_rows(kernel: Kernels, n: int) -> None:
    x, table, weight = torch.randn(20, 5), table_of(n, 20, 4), weight_of(4, 5, 19)
    rows = torch.randperm(n + 9)[:n].int()
    raw, residual, activated = (within(n + 9, 19) for _ in range(3))
    residual.copy_(torch.randn(n + 9, 19))
    epilogue = Epilogue(residual, None, raw, (Activation(activated, torch.ones(19), torch.zeros(19)),))
    kernel.convolve(x, table, kernel.pack(weight), epilogue, n + 9, rows=rows)
    expected = torch.full((n + 9, 19), POISON).double()
    expected[rows.long()] = products(x, table, weight) + residual[rows.long()].double()
    assert_close(raw, expected)
    assert_close(activated, expected.relu())
    assert unharmed(raw)
    assert unharmed(activated)


# ---- what stays equal to the bit


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_threads_changes_no_bit(engine: CpuEngine, kind: str, threads: Callable[[int], None]) -> None:
    case = Case(engine, kind, (17, 33), mask_of("random", (60, 70)))
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(case.raw())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_number_of_threads_changes_no_bit_of_the_gradient(kernel: Kernels, threads: Callable[[int], None]) -> None:
    x, grad, table = torch.randn(300, 17), torch.randn(1300, 33), table_of(1300, 300, 9)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(kernel.weight_gradient(x, grad, table))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_number_of_threads_changes_no_table(engine: CpuEngine, threads: Callable[[int], None]) -> None:
    sites, seen = Sites.from_mask(mask_of("random", (70, 90), batch=2)), []
    for count in (1, 2, 3):
        threads(count)
        plan = engine.geometry(sites, PlanSpec(3, "paper"))
        seen.append([t for level in plan.levels for t in tables_of(level)])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_nan_reaches_its_neighbours_and_nobody_else(kernel: Kernels) -> None:
    x, table, packed = torch.randn(57, 19), table_of(500, 57, 9), kernel.pack(weight_of(9, 19, 17))
    expected, raw, activated = within(500, 17), within(500, 17), within(500, 17)
    kernel.convolve(x, table, packed, Epilogue(raw=expected), 500)
    x[7] = torch.nan
    kernel.convolve(
        x, table, packed, Epilogue(raw=raw, activated=(Activation(activated, torch.ones(17), torch.zeros(17)),)), 500
    )
    reached = (table == 7).any(1)
    assert raw[reached].isnan().all()
    assert activated[reached].isnan().all()
    assert torch.equal(raw[~reached], expected[~reached])
    assert torch.equal(activated[~reached], expected[~reached].relu())


@pytest.mark.parametrize("tile", [4, 2])
def test_nan_reaches_only_tiles_that_read_it(engine: CpuEngine, tile: int) -> None:
    mask = mask_of("random", (30, 41))
    case, cells = Case(engine, f"tile {tile}", (16, 16), mask), cells_of(engine, mask)
    expected = case.raw()
    case.x[40] = torch.nan
    patches = patches_of(cells, tile)
    reads = (patches == 40).flatten(1).any(1)
    reached = torch.zeros(case.n + 1, dtype=torch.bool)
    reached[patches[reads][:, 1:-1, 1:-1].flatten().long()] = True
    raw = case.raw()
    assert raw[40].isnan().all()
    assert torch.equal(raw[~reached[:-1]], expected[~reached[:-1]])


# ---- checks


def patches_of(cells: Cells, tile: int) -> Tensor:
    """Rows of x that each tile (6x6) or each listed quarter (4x4) reads."""
    tiles = cells.quarters.table.view(-1, 6, 6)
    if tile == 4:
        return tiles
    assert cells.quarters.quarters is not None
    listed = cells.quarters.quarters.tolist()
    return torch.stack([tiles[q // 4][q % 4 // 2 * 2 :, q % 2 * 2 :][:4, :4] for q in listed])


N, C_IN, C_OUT = 6, 3, 5


class Call:
    """A valid call; each test spoils one operand."""

    def __init__(self, engine: CpuEngine, tile: int = 0) -> None:
        self.kernel, cells = engine.kernels, cells_of(engine, mask_of("all", (2, 3)))
        self.x, self.table, self.num_outputs = torch.randn(N, C_IN), cells.around.clone(), N
        tiles = cells.quarters
        assert tiles.quarters is not None
        self.tiles: Tiles = Tiles(tiles.table.clone(), tiles.quarters.clone())
        self.weight = weight_of(9, C_IN, C_OUT)
        self.packed, self.tile = self.kernel.pack(self.weight, tile), tile
        self.epilogue = Epilogue(raw=torch.empty(N, C_OUT))
        self.rows: Tensor | None = None
        self.scratch: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.tile:
            self.kernel.winograd(self.x, self.tiles, self.packed, self.epilogue, scratch=self.scratch)
        else:
            self.kernel.convolve(
                *(self.x, self.table, self.packed, self.epilogue, self.num_outputs),
                rows=self.rows,
                scratch=self.scratch,
            )
        assert self.epilogue.raw is not None
        return self.epilogue.raw


def activation(out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Activation:
    return Activation(out, torch.ones(C_OUT) if scale is None else scale, torch.ones(C_OUT) if shift is None else shift)


OUT = (N, C_OUT)
WRONG: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "features float64": ("x", lambda: torch.zeros(N, C_IN).double(), ["features", "float64", "float32"]),
    "features integer": ("x", lambda: torch.zeros(N, C_IN).int(), ["features", "int32", "float32"]),
    "features of too many channels": ("x", lambda: torch.zeros(N, C_IN + 1), ["features", "(6, 4)", "[N, 3]"]),
    "features not a matrix": ("x", lambda: torch.zeros(N), ["features", "(6,)", "[N, 3]"]),
    "features transposed": ("x", lambda: torch.zeros(C_IN, N).t(), ["features", "(1, 6)", "contiguous channels"]),
    "features on another device": ("x", lambda: torch.zeros(N, C_IN, device="meta"), ["features", "meta", "CPU"]),
    "raw float64": ("epilogue", lambda: Epilogue(raw=torch.zeros(OUT).double()), ["raw", "float64"]),
    "raw too short": ("epilogue", lambda: Epilogue(raw=torch.zeros(N - 1, C_OUT)), ["raw", "(5, 5)", "[6, 5]"]),
    "raw too narrow": ("epilogue", lambda: Epilogue(raw=torch.zeros(N, C_OUT - 1)), ["raw", "(6, 4)", "[6, 5]"]),
    "raw transposed": ("epilogue", lambda: Epilogue(raw=torch.zeros(C_OUT, N).t()), ["raw", "contiguous channels"]),
    "residual too short": ("epilogue", lambda: Epilogue(torch.zeros(N - 1, C_OUT)), ["residual", "[6, 5]"]),
    "activated too short": (
        "epilogue",
        lambda: Epilogue(activated=(activation(torch.zeros(N - 1, C_OUT)),)),
        ["activated", "[6, 5]"],
    ),
    "bias too long": ("epilogue", lambda: Epilogue(bias=torch.zeros(C_OUT + 1)), ["bias", "(6,)", "[5]"]),
    "bias float64": ("epilogue", lambda: Epilogue(bias=torch.zeros(C_OUT).double()), ["bias", "float64"]),
    "bias strided": ("epilogue", lambda: Epilogue(bias=torch.zeros(2 * C_OUT)[::2]), ["bias", "contiguous"]),
    "scale too short": (
        "epilogue",
        lambda: Epilogue(activated=(activation(torch.zeros(OUT), scale=torch.ones(C_OUT - 1)),)),
        ["scale", "(4,)", "[5]"],
    ),
    "shift float64": (
        "epilogue",
        lambda: Epilogue(activated=(activation(torch.zeros(OUT), shift=torch.ones(C_OUT).double()),)),
        ["shift", "float64"],
    ),
    "three activations": (
        "epilogue",
        lambda: Epilogue(activated=(activation(torch.zeros(OUT)),) * 3),
        ["3 activated", "at most 2"],
    ),
    "scratch too small": ("scratch", lambda: torch.empty(7), ["scratch of 7 floats"]),
    "scratch of bytes": ("scratch", lambda: torch.empty(1 << 21, dtype=torch.int8), ["scratch", "float32"]),
    "scratch strided": ("scratch", lambda: torch.empty(1 << 20)[::2], ["scratch", "contiguous"]),
}
WRONG_INDIRECT: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "table of too few taps": ("table", lambda: torch.zeros(N, 4).int(), ["table", "(6, 4)", "[n, 9]"]),
    "table int64": ("table", lambda: torch.zeros(N, 9).long(), ["table", "int64", "int32"]),
    "table transposed": ("table", lambda: torch.zeros(9, N).int().t(), ["table", "not contiguous"]),
    "no table": ("table", lambda: None, ["9 taps", "1 tap without table"]),
    "other number of outputs": ("num_outputs", lambda: N + 1, ["7 outputs", "[6]"]),
    "rows too few": ("rows", lambda: torch.zeros(N - 1).int(), ["rows", "(5,)", "[6]"]),
    "rows int64": ("rows", lambda: torch.zeros(N).long(), ["rows", "int64", "int32"]),
}
WRONG_TILES: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "tiles of too few cells": ("tiles", lambda: Tiles(torch.zeros(2, 16).int(), None), ["tiles", "(2, 16)", "36"]),
    "tiles int64": ("tiles", lambda: Tiles(torch.zeros(2, 36).long(), torch.zeros(1).int()), ["tiles", "int64"]),
}


def refuses(call: Call, spoiled: str, make: Callable[[], Any], words: list[str]) -> None:
    setattr(call, spoiled, make())
    with pytest.raises(ValueError, match=r"expected") as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("wrong", WRONG | WRONG_INDIRECT)
def test_convolve_refuses(one: CpuEngine, wrong: str) -> None:
    refuses(Call(one), *(WRONG | WRONG_INDIRECT)[wrong])


@pytest.mark.parametrize("wrong", WRONG | WRONG_TILES)
@pytest.mark.parametrize("tile", [4, 2])
def test_winograd_refuses(one: CpuEngine, tile: int, wrong: str) -> None:
    refuses(Call(one, tile), *(WRONG | WRONG_TILES)[wrong])


@pytest.mark.parametrize("bad", [N + 1, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("tile", [0, 4, 2])
def test_a_table_that_points_outside(engine: CpuEngine, tile: int, bad: int) -> None:
    call = Call(engine, tile)
    (call.tiles.table if tile else call.table).view(-1)[14] = bad
    with pytest.raises(IndexError, match=r"has entries out of range.*expected 0\.\.N"):
        call()


@pytest.mark.parametrize("bad", [N, 2**31 - 1, -1, -(2**31)])
def test_rows_that_point_outside(engine: CpuEngine, bad: int) -> None:
    call = Call(engine)
    call.rows = torch.arange(N).int()
    call.rows[3] = bad
    with pytest.raises(IndexError, match="has entries out of range"):
        call()


def test_an_identity_longer_than_the_outputs_is_refused(one: CpuEngine) -> None:
    kernel = one.kernels
    packed = kernel.pack(weight_of(1, C_IN, C_OUT))
    with pytest.raises(ValueError, match="7 outputs"):
        kernel.convolve(torch.zeros(N, C_IN), None, packed, Epilogue(), N + 1)


@pytest.mark.parametrize("bad", [-1, -2, -3, -4, -(2**31), 2**31 - 1, 4])
def test_a_quarter_of_no_tile(engine: CpuEngine, bad: int) -> None:
    call = Call(engine, 2)
    assert call.tiles.quarters is not None
    quarters = call.tiles.quarters.clone()
    quarters[-1] = bad
    # Around the tile lie entries that are valid: reading them is not noticed by the check of entries.
    around = torch.full((3, 36), N).int()
    around[1] = call.tiles.table[0]
    call.tiles = Tiles(around[1:2], quarters)
    with pytest.raises(IndexError, match="has entries out of range"):
        call()


@pytest.mark.parametrize("bad", [58, -1, 2**31 - 1])
def test_a_gradients_table_that_points_outside(kernel: Kernels, bad: int) -> None:
    table = table_of(40, 57, 4)
    table[39, 3] = bad
    with pytest.raises(IndexError, match="has entries out of range"):
        kernel.weight_gradient(torch.randn(57, 3), torch.randn(40, 5), table)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda x, g, t: (x.double(), g, t), "x is torch.float64", id="x float64"),
        pytest.param(lambda x, g, t: (x, g.t(), t), r"expected \[N_in, C_in\]", id="grad transposed"),
        pytest.param(lambda x, g, t: (x.t().contiguous().t(), g, t), "x is .*not contiguous", id="x strided"),
        pytest.param(lambda x, g, t: (x, g, t.long()), "table is torch.int64", id="table int64"),
        pytest.param(lambda x, g, t: (x, g, t[:-1]), r"expected \[N_in, C_in\]", id="too few rows"),
        pytest.param(lambda x, g, t: (x[0], g, t), r"expected \[N_in, C_in\]", id="x not a matrix"),
    ],
)
def test_weight_gradient_refuses(one: CpuEngine, spoil: Callable[..., tuple[Tensor, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one.kernels.weight_gradient(*spoil(torch.randn(57, 3), torch.randn(40, 5), table_of(40, 57, 4)))


@pytest.mark.parametrize(
    ("shape", "tile"), [((9, 3), 0), ((0, 3, 5), 0), ((9, 3, 0), 0), ((4, 3, 5), 4), ((9, 3, 5), 3), ((1, 3, 5), 2)]
)
def test_pack_refuses_shapes(one: CpuEngine, shape: tuple[int, ...], tile: int) -> None:
    with pytest.raises(ValueError, match=r"weight is .*expected \[T, C_in, C_out\]"):
        one.kernels.pack(torch.zeros(shape), tile)


@pytest.mark.parametrize("weight", [torch.zeros(9, 3, 5).double(), torch.zeros(9, 5, 3).mT, torch.zeros(9, 3, 5).int()])
def test_pack_refuses_layouts(one: CpuEngine, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight is .*expected contiguous torch\.float32"):
        one.kernels.pack(weight)


def test_weights_packed_for_another_kernel_are_refused(one: CpuEngine) -> None:
    call = Call(one)
    for tile in (2, 4):
        call.packed = one.kernels.pack(call.weight, tile)
        with pytest.raises(ValueError, match=f"tile {tile}; expected tile 0"):
            call()
    call = Call(one, 4)
    call.packed = one.kernels.pack(call.weight)
    with pytest.raises(ValueError, match="tile 0; expected 4, or 2"):
        call()
    call.packed, call.tiles = one.kernels.pack(call.weight, 2), replace(call.tiles, quarters=None)
    with pytest.raises(ValueError, match="tile 2; expected 4, or 2 with quarters"):
        call()


@pytest.mark.parametrize("tile", [0, 4, 2])
def test_weights_packed_for_another_instruction_set_are_refused(tile: int) -> None:
    """Their order is another one, and those of shorter vectors may be fewer."""
    longer, shorter = engine_of("cpu-avx2"), engine_of("cpu-generic")
    assert isinstance(longer, CpuEngine)
    assert isinstance(shorter, CpuEngine)
    call = Call(shorter, tile)
    call.packed = longer.kernels.pack(call.weight, tile)  # the longer ones: nothing is read that is not there
    with pytest.raises(ValueError, match=r"avx2.*generic|generic.*avx2|expected"):
        call()


# ---- geometry


def tables_of(level: Any) -> list[Tensor]:
    """All tables of a level of the CPU engine's plan."""
    cells = level.around.cells
    tables = [level.sites.coords, cells.around, cells.tiles.table, cells.quarters.quarters]
    if level.down is not None:
        between = level.down.between
        rows, counts, parents = between.parities
        used = sum(n * len(taps) for n, taps in zip(counts, parity_taps(level.down.taps), strict=True))
        tables += [between.children, between.parents, rows, parents[:used]]
    return tables


def same_plan(engine: CpuEngine, mask: Tensor, down: str, levels: int = 4) -> None:
    """All tables equal those of the torch engine."""
    sites, spec = Sites.from_mask(mask), PlanSpec(levels, down)
    plan: Plan = engine.geometry(sites, spec)
    expected = get_engine("torch").geometry(sites, spec)
    assert plan.spec == spec
    for level, wanted in zip(plan.levels, expected.levels, strict=True):
        assert torch.equal(level.sites.coords, wanted.sites.coords)
        assert level.sites.batch_size == wanted.sites.batch_size
        assert (level.sites.height, level.sites.width) == (wanted.sites.height, wanted.sites.width)
        assert torch.equal(level.around.table, wanted.around.table)
        check_tiles(engine, level.around.cells)
        if wanted.down is None:
            assert level.down is None
            continue
        for stencil, other in ((level.down, wanted.down), (level.down.transposed(), wanted.down.transposed())):
            assert (stencil.num_inputs, stencil.num_outputs, stencil.taps) == (
                other.num_inputs,
                other.num_outputs,
                other.taps,
            )
            assert torch.equal(stencil.table, other.table)
            assert torch.equal(stencil.reverse, other.reverse)
            assert (stencil.single is None) == (other.single is None)
            assert stencil.single is None or torch.equal(stencil.single, other.single)
        check_parities(level, wanted.down.reverse)
    for (fine, _), (wanted_fine, _) in zip(pairwise(plan.levels), pairwise(expected.levels), strict=True):
        assert fine.down.num_inputs == len(wanted_fine.sites)


def check_parities(level: Any, parents: Tensor) -> None:
    """The parities list each site once, by parity of row and column, and put together they are the parents."""
    rows, counts, flat = level.down.between.parities
    assert rows.sort().values.tolist() == list(range(len(level.sites)))
    table = torch.full_like(parents, len(level.down.between.coarse.sites))
    row = first = 0
    for parity, (count, taps) in enumerate(zip(counts, parity_taps(parents.shape[1]), strict=True)):
        part = rows[row : row + count].long()
        assert (level.sites.coords[part, 1:] % 2 == torch.tensor([parity // 2, parity % 2])).all()
        table[part[:, None], torch.tensor(taps)] = flat[first : first + count * len(taps)].view(count, len(taps))
        row, first = row + count, first + count * len(taps)
    assert row == len(rows)
    assert torch.equal(table, parents)


def check_tiles(engine: CpuEngine, cells: Cells) -> None:
    """Tiles: every entry is the site of its cell, every site an output of one tile; quarters: those with a site."""
    sites, n = cells.sites, len(cells.sites)
    table = cells.tiles.table
    assert torch.equal(table, cells.quarters.table)
    assert table.shape[1:] == (36,)
    index = torch.full((sites.batch_size, sites.height + 10, sites.width + 10), n)  # five cells on each side
    b, r, c = sites.coords.long().unbind(1)
    index[b, r + 5, c + 5] = torch.arange(n)
    inner = table.view(-1, 6, 6)[:, 1:5, 1:5]
    outputs = inner[inner != n].long()
    assert torch.equal(outputs.sort().values, torch.arange(n))
    present = inner.flatten(1) != n
    assert present.any(1).all()
    where = present.int().argmax(1)
    some = inner.flatten(1).gather(1, where[:, None])[:, 0].long()
    top, left = r[some] - where // 4, c[some] - where % 4
    assert (top % 4 == 0).all()
    steps = torch.arange(6) - 1
    rows, columns = top[:, None, None] + steps[:, None] + 5, left[:, None, None] + steps + 5
    assert torch.equal(index[b[some][:, None, None], rows, columns].int().flatten(1), table)
    halves = inner.reshape(-1, 2, 2, 2, 2).transpose(2, 3)  # [tiles, row of quarters, column, 2, 2]
    quarters = (halves != n).flatten(3).any(3).flatten()
    assert cells.tiles.quarters is None
    assert torch.equal(cells.quarters.quarters, quarters.nonzero()[:, 0].int())


@pytest.mark.parametrize("size", WIDTHS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("down", DOWNS)
def test_geometry_equals_the_torch_engines(engine: CpuEngine, down: str, pattern: str, size: tuple[int, int]) -> None:
    same_plan(engine, mask_of(pattern, size, batch=3), down)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("down", DOWNS)
def test_images_of_no_pixels(engine: CpuEngine, down: str, size: tuple[int, int]) -> None:
    same_plan(engine, torch.zeros(2, *size, dtype=torch.bool), down)


def test_no_images(engine: CpuEngine) -> None:
    same_plan(engine, torch.zeros(0, 5, 7, dtype=torch.bool), "cell")


@pytest.mark.parametrize(
    "coords",
    [
        pytest.param([[0, 1, 1], [0, 0, 1]], id="rows not sorted"),
        pytest.param([[0, 0, 2], [0, 0, 1]], id="columns not sorted"),
        pytest.param([[1, 0, 0], [0, 0, 0]], id="batches not sorted"),
        pytest.param([[0, 1, 1], [0, 1, 1]], id="repeated"),
        pytest.param([[2, 0, 0]], id="batch"),
        pytest.param([[0, 4, 0]], id="row"),
        pytest.param([[0, 0, 5]], id="column"),
        pytest.param([[-1, 0, 0]], id="negative batch"),
        pytest.param([[0, -1, 0]], id="negative row"),
        pytest.param([[0, 0, -1]], id="negative column"),
        pytest.param([[2**31 - 1, 2**31 - 1, 2**31 - 1]], id="largest"),
        pytest.param([[-(2**31), -(2**31), -(2**31)]], id="smallest"),
    ],
)
def test_geometry_refuses_sites(engine: CpuEngine, coords: list[list[int]]) -> None:
    sites = Sites(torch.tensor(coords, dtype=torch.int32), 2, 4, 5)
    with pytest.raises(ValueError, match=r"2 images of 4 x 5.*expected \(batch, row, column\) in ascending order"):
        engine.geometry(sites, PlanSpec(2, "cell"))


@pytest.mark.parametrize(
    "coords", [torch.zeros(1, 3).long(), torch.zeros(1, 2).int(), torch.zeros(3).int()], ids=["int64", "two", "vector"]
)
def test_geometry_refuses_coordinates(one: CpuEngine, coords: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected int32 \[N, 3\]"):
        one.geometry(Sites(coords, 2, 4, 5), PlanSpec(2, "cell"))


def test_geometry_takes_strided_coordinates(engine: CpuEngine) -> None:
    sites = Sites.from_mask(mask_of("random", (9, 7)))
    strided = replace(sites, coords=sites.coords.t().contiguous().t())
    plan, expected = (engine.geometry(s, PlanSpec(1, "cell")) for s in (strided, sites))
    assert torch.equal(plan.levels[0].around.table, expected.levels[0].around.table)


# ---- any shape

SIZE = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 140))
WIDTH = st.integers(1, 70)
SEED = st.integers(0, 2**31)
DENSITY = st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0])


def random_mask(size: tuple[int, int, int], density: float) -> Tensor:
    return torch.rand(size) < density


@FUZZ
@given(taps=st.integers(1, 9), c_in=WIDTH, c_out=WIDTH, n=st.integers(0, 300), n_in=st.integers(0, 90), seed=SEED)
def test_any_indirect(kernel: Kernels, taps: int, c_in: int, c_out: int, n: int, n_in: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, table, weight, y = (
        torch.randn(n_in, c_in),
        table_of(n, n_in, taps),
        weight_of(taps, c_in, c_out),
        within(n, c_out),
    )
    kernel.convolve(x, table, kernel.pack(weight), Epilogue(raw=y), n)
    assert_close(y, products(x, table, weight))
    assert unharmed(y)


@FUZZ
@given(size=SIZE, density=DENSITY, c_in=WIDTH, c_out=WIDTH, tile=st.sampled_from([4, 2]), seed=SEED)
def test_any_winograd(
    engine: CpuEngine, size: tuple[int, int, int], density: float, c_in: int, c_out: int, tile: int, seed: int
) -> None:
    torch.manual_seed(seed)
    case = Case(engine, f"tile {tile}", (c_in, c_out), random_mask(size, density)[:, :20, :40])
    case.judge(case.raw(), case.sums)


@FUZZ
@given(size=SIZE, density=DENSITY, down=st.sampled_from(DOWNS), levels=st.integers(1, 5), seed=SEED)
def test_any_geometry(
    engine: CpuEngine, size: tuple[int, int, int], density: float, down: str, levels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    same_plan(engine, random_mask(size, density), down, levels)
