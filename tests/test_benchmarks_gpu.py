"""The benchmark of the GPU, rehearsed on the CPU: every step runs, floors are right, what is wrong is not timed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparserefine.engines.choose import get_engine
from sparserefine.sparse import Sites, SparseUNet
from sparserefine.stages.extractor import ExtractorConfig
from support import at_sites, needs_triton, on_grid

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and cores are read from Linux")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("benchmarks.gpu.__main__")


def part(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.fixture
def run(gpu: ModuleType) -> Any:
    """Of a rehearsal, for single steps."""
    needs_triton()
    options = gpu._options(gpu._parser().parse_args(["--rehearse", "--presets", "slim", "--dtypes", "float16"]))
    device = gpu.Rehearsal()
    return gpu.Run(options, device, gpu.Results(None, device.machine()))


# ---- the whole command


@pytest.mark.slow
def test_rehearsal_takes_every_step(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_triton()
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    for name in ("checks", "tilings"):  # two of many convolutions, and one set of inputs: the rest is alike
        monkeypatch.setattr(part(name), "distinct", lambda found: found[:2])
    for name in ("unet", "parts", "tilings"):
        monkeypatch.setattr(part(name), "SETS", 1)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        gpu.main(["--rehearse", "--only", ",".join(gpu.PARTS), "--presets", "slim", "--dtypes", "float16"])
    printed = out.getvalue()
    assert "WRONG" not in printed
    assert "left out" not in printed
    steps, figures = printed.split("REHEARSAL: interpreted on the CPU, each step once. The figures below mean nothing.")
    for line in (
        "triton eager, slim, tiny",
        "triton graph, slim, tiny",
        "torch eager, slim, tiny",
        "dense eager, slim",
    ):
        assert line in steps
    for title in ("Measured ceilings", "Sparse U-Net", "Other engines", "Single convolutions"):
        assert f"**{title}" in figures
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("wrong", ["value", "hole"])
def test_a_wrong_kernel_is_not_timed(
    gpu: ModuleType, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_triton()
    convolution = importlib.import_module("sparserefine.engines.triton.convolution")
    right, checks = convolution.convolve, part("checks")

    def convolve(x: torch.Tensor, weight: torch.Tensor, epilogue: Any, n_out: int, **options: Any) -> None:
        if wrong == "value":
            right(x, 1.01 * weight, epilogue, n_out, **options)
        else:
            right(x, weight, epilogue, n_out, **options)
            epilogue.raw[-1].fill_(torch.nan)  # as if it had not been written

    monkeypatch.setattr(convolution, "convolve", convolve)
    monkeypatch.setattr(checks, "_networks", lambda *_: iter(()))
    monkeypatch.setattr(checks, "_gradient_errors", lambda *_: ({}, True))
    monkeypatch.setitem(gpu.TIMED, "ceilings", lambda run: pytest.fail("it is timed"))
    with pytest.raises(SystemExit) as error:
        gpu.main(["--rehearse", "--only", "checks,ceilings", "--presets", "slim", "--dtypes", "float16"])
    assert error.value.code == 1
    printed = capsys.readouterr().out
    assert "checks failed, so nothing is timed" in printed
    assert "WRONG slim, float16, around 0, 8 -> 8: values" in printed
    assert ("error None" in printed) == (wrong == "hole")


def test_a_check_that_raises_is_wrong(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any) -> Iterator[Any]:
        raise RuntimeError("out of\nresource")
        yield

    for name in ("_tables", "_convolutions", "_networks", "_uncertainty"):
        monkeypatch.setattr(part("checks"), name, raising)
    found = part("checks").checks(run)
    assert len(found) == 5
    assert not any(check.ok for check in found)
    assert "RuntimeError: out of resource" in found[0].name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "speed"], "part 'speed' is not known; choose from checks, ceilings, unet"),
        (["--plans", "slim"], "option --plans is called --presets now"),
        (["--presets", "fat"], "preset 'fat' is not known; choose from paper, slim, slim16"),
        (["--masks", "no.png"], "mask 'no.png' is not found"),
        (["--batches", "3"], "batch size '3' is not known; choose from 1, 2, 4, 8"),
        (["--dtypes", "int8"], "dtype 'int8' is not known; choose from float16, bfloat16, tf32, float32"),
        (["--models", "yolo"], "model 'yolo' is not known; choose from hrnet_w48"),
        (["--budget-s", "0"], "budget = 0 s, expected more than 0"),
        (["--rehearse", "--json", "a.json"], "a rehearsal has no figures to write"),
        (["--rehearse", "--dtypes", "bfloat16"], "a rehearsal is in float16 or float32"),
        (["--table", "no.json"], "no.json: No such file or directory"),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(gpu: ModuleType, options: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as error:
        gpu.main(options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_gpu_nothing_is_measured(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: there is no CUDA GPU here"):
        gpu.main([])


def test_without_masks_the_others_run(
    gpu: ModuleType, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "MASKS", tmp_path)
    assert gpu._mask_files(None) == []
    run.options = replace(run.options, masks={}, parts=("unet", "uncertainty"))
    monkeypatch.setitem(gpu.TIMED, "uncertainty", lambda run: None)
    assert gpu._execute(run)
    assert run.left_out == ["unet: ../shared/masks is not there; pass --masks FILE.png[,FILE.png]"]


# ---- time, failures, results


def test_what_fails_or_comes_too_late_is_told(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("no\ngood")

    assert run.attempt("one", lambda: 7) == 7
    assert run.attempt("theirs", fail, peer=True) is None
    assert run.failures == []
    assert run.attempt("ours", fail) is None
    assert run.failures == ["ours: ValueError: no good"]
    run.options = replace(run.options, budget_s=1e-9)
    assert run.attempt("late", lambda: 7) is None
    assert run.left_out == ["theirs: ValueError: no good", "ours: ValueError: no good", "late: no time left"]
    assert "left out: late: no time left" in capsys.readouterr().out


def test_spconv_is_asked_once(run: Any, tmp_path: Path) -> None:
    run.options = replace(run.options, spconv_python=tmp_path / "python")
    assert not part("unet")._works(run, "spconv-triton")
    assert run.left_out == [f"spconv-triton: {tmp_path / 'python'} does not start: No such file or directory"]


def test_results_are_merged(gpu: ModuleType, tmp_path: Path) -> None:
    records, path, machine = part("records"), tmp_path / "gpu.json", {"gpu": "A 1", "torch": "2"}

    def ceiling(name: str, rate: float) -> Any:
        return records.Ceiling(name, rate, "GB/s", 1.0, 0.9, 1.1, 30)

    first = records.Results(path, machine)
    first.add("ceilings", [ceiling("copy", 1.0), ceiling("float16", 2.0)])
    first.leave_out("spconv: none")
    second = records.Results(path, machine)
    second.add("ceilings", [ceiling("copy", 3.0)])
    stored = json.loads(path.read_text())
    assert stored == second.content()
    assert {r["name"]: r["rate"] for r in stored["ceilings"]} == {"copy": 3.0, "float16": 2.0}
    assert stored["machine"] == machine
    assert stored["left_out"] == []
    with pytest.raises(ValueError, match="of another machine or version"):
        records.Results(path, {**machine, "torch": "3"})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": {}, "unet": 3}'])
def test_other_files_are_refused(gpu: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="is not a file of results"):
        part("records").read_results(tmp_path / "other.json")


def test_keys_are_fields(gpu: ModuleType) -> None:
    records = part("records")
    kinds = {
        "checks": records.Check,
        "ceilings": records.Ceiling,
        "unet": records.UNetRecord,
        "uncertainty": records.UncertaintyRecord,
        "training": records.TrainingRecord,
        "models": importlib.import_module("sparserefine.studies.benchmark.records").Record,
        "tilings": records.TilingRecord,
    }
    assert tuple(kinds) == records.PARTS
    for name, kind in kinds.items():
        assert set(records.KEYS[name]) <= set(kind.__dataclass_fields__)


def test_spread(gpu: ModuleType) -> None:
    spread = part("device").Spread
    assert spread.of([5.0]) == spread(5.0, 5.0, 5.0, 1)
    assert spread.of([float(i) for i in range(11)]) == spread(5.0, 1.0, 9.0, 11)


def test_precision_is_put_back(gpu: ModuleType) -> None:
    device, before = part("device"), torch.get_float32_matmul_precision()
    for dtype, wanted in (("tf32", "high"), ("float32", "highest"), ("float16", "highest")):
        with device.precision(dtype) as kind:
            assert kind == device.DTYPES[dtype]
            assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == before


# ---- floors and inputs


def test_floors_by_hand(gpu: ModuleType) -> None:
    """Two levels of 100 and 30 sites, 4 and 8 channels, one block, 2 inputs, 5 classes."""
    layers, network = part("layers"), SparseUNet(2, 5, (4, 8), 1, "cell")
    found = layers.layers(network, [100, 30])
    around, wide = 100 * 9 * 4 * 4, 100 * 9 * 8 * 4
    macs = [
        *(100 * 9 * 2 * 4, around, around),
        *(30 * 4 * 4 * 8, 30 * 9 * 8 * 8, 30 * 9 * 8 * 8),
        *(100 * 1 * 8 * 4, 100 * 8 * 4, wide, around),
        100 * 4 * 5,
    ]
    assert [one.macs for one in found] == macs
    item, table = 2, 4 * 9 * 100
    moved = [
        item * (200 + 9 * 8 + 2 * 400) + table,  # inputs, weight, raw and activated
        item * (400 + 9 * 16 + 400) + table,
        item * (400 + 9 * 16 + 400 + 3 * 400) + table,  # residual; raw and activated for above, activated for below
        item * (400 + 4 * 32 + 2 * 240) + 4 * 4 * 30,
        item * (240 + 9 * 64 + 240) + 4 * 9 * 30,
        item * (240 + 9 * 64 + 240 + 240) + 4 * 9 * 30,
        item * (240 + 4 * 32 + 2 * 400) + 4 * 100,
        item * (800 + 32 + 400),
        item * (800 + 9 * 32 + 400) + table,
        item * (400 + 9 * 16 + 400 + 400) + table,
        item * (400 + 20) + 4 * 500,
    ]
    assert [one.bytes(item) for one in found] == moved
    assert sum(one.bytes(item, tables=False) for one in found) == sum(moved) - 5 * table - 4 * 22 * 30 - 400

    ceilings = {"copy": 2.0, "float16": 0.5}  # GB/s, TFLOP/s
    floor = layers.floor_of(found, "float16", ceilings)
    assert floor.operations_ms == pytest.approx(2 * sum(macs) / 0.5e12 * 1e3)
    assert floor.bytes_ms == pytest.approx(sum(moved) / 2e9 * 1e3)
    assert floor.ms == max(floor.operations_ms, floor.bytes_ms)
    assert layers.floor_of(found, "float16", ceilings, passes=3).ms == pytest.approx(3 * floor.ms)


def test_floors_count_what_the_network_counts(gpu: ModuleType) -> None:
    """But for up-sampling, of whose 9 taps 9/4 reach a pixel on average."""
    counts, network = [1000, 300, 90], SparseUNet(3, 19, (16, 32, 64), 2, "paper")
    found = part("layers").layers(network, counts)
    full = [replace(one, taps=one.kernel) for one in found]
    assert sum(one.macs for one in full) == network.macs_of(counts)
    assert sum(one.kernel * one.c_in * one.c_out for one in found) == sum(
        value.numel() for name, value in network.named_parameters() if "norm" not in name and name != "head.bias"
    )


def test_sets_of_inputs_differ_but_not_in_number(gpu: ModuleType) -> None:
    mask = torch.rand(16, 32) < 0.2
    sets = part("run").input_sets(mask, 2, torch.device("cpu"))
    masks = [image for one in sets for image in one.mask]
    assert all(int(image.sum()) == int(mask.sum()) for image in masks)
    assert len({tuple(image.flatten().tolist()) for image in masks}) == 6
    assert all(len(one.features) == int(one.mask.sum()) for one in sets)
    assert part("unet").capacities_of([[100, 8], [90, 12]]) == [126, 16]


# ---- the dense peer


@pytest.mark.parametrize("size", [(16, 24), (9, 13)], ids=str)
@pytest.mark.parametrize("down", ["paper", "cell"])
def test_the_dense_network_is_the_sparse_one_on_all_pixels(gpu: ModuleType, down: Any, size: tuple[int, int]) -> None:
    config = ExtractorConfig((4, 6, 8), 2, down)
    network = part("run").network_of(config, torch.device("cpu"))
    dense = part("dense_unet").DenseUNet(3, 19, config.planes, config.blocks, down).eval()
    dense.load_weights(network.state_dict())
    mask = torch.ones(2, *size, dtype=torch.bool)
    plan = get_engine("torch").geometry(Sites.from_mask(mask), network.spec)
    x = torch.randn(int(mask.sum()), 3)
    with torch.no_grad():
        torch.testing.assert_close(at_sites(dense(on_grid(x, mask)), mask), network(x, plan), rtol=1e-4, atol=1e-4)
    assert part("unet").dense_counts(size, 2, network.spec) == [len(level.sites) for level in plan.levels]


# ---- tables


def unet_record(engine: str, ms: float, **fields: Any) -> dict[str, Any]:
    """Of preset paper on a tenth of 1024x2048, one image, float16."""
    eager = fields.get("mode", "eager") == "eager" and engine != "dense"
    record = {
        "engine": engine,
        "preset": "paper",
        "mask": "street",
        "size": "1024x2048",
        "batch": 1,
        "dtype": "float16",
        "mode": "eager",
        "sites": 209716,
        "density": 0.1,
        "ms": ms,
        "low_ms": ms,
        "high_ms": ms,
        "repetitions": 30,
        "plan_ms": 0.25 if eager else None,
        "forward_ms": ms - 0.25 if eager else None,
        "peak_mb": 500.0,
        "gmacs": 217.3,
        "operations_ms": 0.5,
        "bytes_ms": 0.25,
        "floor_ms": 0.5,
        "difference": None,
    }
    return {**record, **fields}


def test_tables_of_a_file(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = part("records")
    content: dict[str, Any] = {"machine": {"gpu": "Made-up 1"}, **{name: [] for name in records.PARTS}}
    content["ceilings"] = [{"name": "copy", "rate": 4321.0, "unit": "GB/s"}]
    content["checks"] = [{"name": "paper", "error": None, "bound": 1e-3, "ok": False}]
    content["unet"] = [
        unet_record("triton", 5.0),
        unet_record("triton", 2.5, mode="graph"),
        unet_record("triton", 8.0, mode="graph", batch=4),
        unet_record("torch", 20.0, difference=1e-3),
        unet_record("spconv", 5.0),
        unet_record("spconv-triton", 3.0),
        unet_record("dense", 80.0, mask="all", density=1.0, gmacs=1086.5),
        unet_record("dense", 50.0, mask="all", density=1.0, gmacs=1086.5, mode="compiled"),
    ]
    common = {"case": "19 classes, 256x512 -> 1024x2048", "dtype": "float32", "floor_ms": 0.01, "peak_mb": 10.0}
    content["uncertainty"] = [
        {"engine": "triton", "mode": "eager", "ms": 0.05, **common},
        {"engine": "plain", "mode": "eager", "ms": 2.0, **common},
    ]
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(content))
    gpu.main(["--table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpu Made-up 1"
    assert "- WRONG: paper" in lines
    assert "| copy | 4321 GB/s |" in lines
    assert "| preset paper, graph | <= 4 ms | 2.5 ms | yes |" in lines
    assert "| preset slim16, graph | <= 1 ms | - | - |" in lines
    assert "| uncertainty of 19 classes | <= 0.15 ms | 0.05 ms | yes |" in lines
    assert "| preset paper, times as fast as spconv-triton | >= 1.5 x | 1.2 x | no |" in lines
    assert (
        "| preset paper, times as fast as the dense U-Net, over the ratio of operations | >= 2 x | 4 x | yes |" in lines
    )
    last = "0.5 | operations | 5x | 217 | 500 |"
    assert f"| paper | street | 1 | float16 | 2.5 | 5 | 20 | 5 | 3 | 50 | 8x | 2x | 1.2x | 20x | {last}" in lines
    last = "0.5 | operations | 16x | 217 | 500 |"
    assert f"| paper | street | 4 | float16 | 8 | - | - | - | - | - | - | - | - | - | {last}" in lines
    assert "| triton | paper | street | 1 | float16 | 0.25 | 4.75 | 5 | 5..5 |" in lines
    assert "| dense | compiled | paper | all | 1 | float16 | 50 | 0.5 | operations | 500 | - |" in lines
    case = "| 19 classes, 256x512 -> 1024x2048 | float32 |"
    assert f"{case} triton, eager | 0.05 | 40x | 0.01 | 5x | 10 |" in lines
    widths = [line.count("|") for line in lines if line.startswith("|")]
    headers = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(headers) == 6
    assert min(widths) >= 3


def test_a_missing_figure_is_no_figure(gpu: ModuleType) -> None:
    content = {"machine": {"gpu": "Made-up 1"}, **{name: [] for name in part("records").PARTS}}
    assert part("table").tables(content) == "gpu Made-up 1"
