"""What the benchmark measures, prints and draws. No time is judged here, only that the figures belong together."""

import dataclasses
import gc
import json
import platform
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.bases.loaded import LoadedModel
from sparserefine.commands.main import main
from sparserefine.engines.choose import get_engine
from sparserefine.studies.benchmark import clock, inputs
from sparserefine.studies.benchmark import measure as module
from sparserefine.studies.benchmark.inputs import RANDOM_MODELS, GivenSites, random_model, read_mask, synthetic_mask
from sparserefine.studies.benchmark.measure import benchmark
from sparserefine.studies.benchmark.records import BaseEntry, Record, Report, Settings, parse_base, parse_size
from sparserefine.studies.benchmark.report import (
    BreakEven,
    break_even,
    check_outputs,
    header,
    model_table,
    plot,
    summary,
    write_records,
)
from support import TRITON_ENGINES, coarser_mask, device_of, engine_of, shared

SIZE = (64, 128)
STAGES = ["uncertainty", "select", "plan", "gather", "extractor", "ensembler", "labels"]


class Tiny(nn.Module):
    """Five classes at a quarter of the size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)

    def forward(self, x):
        return self.conv(x)


class Hungry(Tiny):
    """Needs 67 MB for a moment."""

    def forward(self, x):
        held = x.new_ones(1 << 24)
        time.sleep(0.02)  # memory is looked at every 2 ms
        return super().forward(x) * held[0]


class OnlyCoarse(Tiny):
    """Does not take the whole image."""

    def forward(self, x):
        if x.shape[2] == SIZE[0]:
            raise RuntimeError("too large for this model\nand a second line")
        return super().forward(x)


def function(x):
    """A base that is no module."""
    return torch.nn.functional.avg_pool2d(x, 4)[:, [0, 1, 2, 0, 1]]


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """``python:benchmarked:...``, as a user's own models."""
    own = types.ModuleType("benchmarked")
    own.tiny, own.hungry, own.only_coarse, own.function = Tiny, Hungry, OnlyCoarse, lambda: function
    monkeypatch.setitem(sys.modules, "benchmarked", own)


@pytest.fixture
def unet(tmp_path):
    path = tmp_path / "unet.safetensors"
    save_unet(UNet(3, (4, 8)), path)
    return f"unet:{path}"


def small(*bases, **options):
    """Settings of a run that takes a blink."""
    quick = {"size": SIZE, "presets": ("slim",), "densities": (0.1,), "rounds": 1, "device": "cpu"}
    options = {**quick, "classes": 5, **options}
    return Settings(tuple(map(parse_base, bases)), **options)


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage():
    """A run collects garbage often, and the modules that all the other tests loaded are none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _counters():
    """What torch loads when it first counts MACs takes seconds on a busy machine: not a part of any test here."""
    assert module.FrozenBase(Tiny(), 5, module.BaseConfig(ratio=1.0)).macs(*SIZE)


@pytest.fixture(scope="module")
def report():
    """Two runtimes of one base, two presets, two densities, as a run would report them."""
    own = types.ModuleType("benchmarked")
    own.tiny = Tiny
    sys.modules["benchmarked"] = own
    try:
        bases = ("python:benchmarked:tiny", "python:benchmarked:tiny@16x32")
        done = benchmark(small(*bases, presets=("slim", "slim16"), densities=(0.1, 0.3), rounds=2))
    finally:
        del sys.modules["benchmarked"]
    return done


# --- parts ---


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    density=st.floats(0, 1),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_synthetic_masks_have_exactly_the_wanted_sites(height, width, density, seed):
    mask = synthetic_mask((height, width), density, seed)
    assert mask.shape == (height, width)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == round(density * height * width)


def test_synthetic_masks_are_bands_and_repeat():
    mask = synthetic_mask((256, 512), 0.1)
    assert torch.equal(mask, synthetic_mask((256, 512), 0.1))
    assert not torch.equal(mask, synthetic_mask((256, 512), 0.1, seed=1))
    thicker = synthetic_mask((256, 512), 0.2)
    assert not (mask & ~thicker).any()
    # A site's neighbour is a site nearly always, which it would be one time in ten if they were strewn.
    assert (mask[:, 1:] & mask[:, :-1]).sum() > 0.8 * mask.sum()
    # And no part of the image has them all.
    assert (torch.nn.functional.max_pool2d(mask[None, None].float(), 128) > 0).sum() >= 6


@pytest.mark.parametrize("name", ["street0_10pct", "street1_10pct"])
def test_synthetic_masks_are_as_coarse_as_those_of_streets(name):
    street = read_mask(shared(f"masks/{name}.png"), (1024, 2048))[None]
    synthetic = synthetic_mask((1024, 2048), float(street.float().mean()))[None]
    for _ in range(4):
        street, synthetic = coarser_mask(street, "cell"), coarser_mask(synthetic, "cell")
        assert int(synthetic.sum()) == pytest.approx(int(street.sum()), rel=0.15)


def test_mask_files(tmp_path):
    pixels = torch.zeros(4, 6, 3, dtype=torch.uint8)
    pixels[1, 2, 2] = 1  # any colour that is not black
    pixels[3, 5] = 255
    Image.fromarray(pixels.numpy()).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", (4, 6))
    assert mask.nonzero().tolist() == [[1, 2], [3, 5]]
    with pytest.raises(ValueError, match=r"mask.png is 4x6, expected 6x4"):
        read_mask(tmp_path / "mask.png", (6, 4))


def test_given_sites_are_selected_whatever_the_entropy():
    mask = synthetic_mask((8, 8), 0.25)
    selector = GivenSites(threshold=0.5, entropy=mask[None].float())
    assert torch.equal(selector(torch.rand(1, 8, 8)).mask()[0], mask)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("hrnet_w48", BaseEntry("hrnet_w48")),
        (" segnext_l@640x1280", BaseEntry("segnext_l", (640, 1280))),
        ("unet:a@b.safetensors", BaseEntry("unet:a@b.safetensors")),
        ("unet:a@b.safetensors@32x64", BaseEntry("unet:a@b.safetensors", (32, 64))),
    ],
)
def test_a_base_may_have_its_own_coarse_size(text, entry):
    assert parse_base(text) == entry


@pytest.mark.parametrize("text", ["1024", "0x5", "ax5", "5x5x5", "-1x4", "5,5", ""])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="1024x2048"):
        parse_size(text)


@pytest.mark.parametrize(
    ("dense", "points", "expected"),
    [
        (150, [(0.1, 100), (0.2, 200)], BreakEven(0.15, False)),
        (150, [(0.2, 200), (0.1, 100)], BreakEven(0.15, False)),
        (200, [(0.1, 100), (0.2, 200)], BreakEven(0.2, False)),
        (500, [(0.1, 100), (0.2, 200)], BreakEven(0.5, True)),
        (400, [(0.1, 50), (0.2, 100), (0.3, 300)], BreakEven(0.4, True)),  # 125 ms for each tenth, 150 ms at 0.2
        (310, [(0.1, 50), (0.2, 100), (0.3, 300)], BreakEven(0.328, True)),
        (310, [(0.1, 110), (0.2, 320), (0.3, 300)], BreakEven(0.3, True)),  # the line says 0.27: 0.3 was measured
        (2000, [(0.1, 100), (0.2, 200)], BreakEven(None, True)),
        (2000, [(0.5, 100), (1.0, 200)], BreakEven(None, False)),
        (200, [(0.1, 150), (0.2, 150)], BreakEven(None, True)),  # flat
        (150, [(0.1, 200), (0.2, 300)], BreakEven(0.05, True)),
        (100, [(0.1, 200), (0.2, 300)], BreakEven(0.0, True)),
        (50, [(0.1, 200), (0.2, 300)], BreakEven(0.0, True)),
        (50, [(0.0, 60), (0.2, 300)], BreakEven(0.0, False)),  # measured: dense is cheaper than no site
        (250, [(0.1, 100), (0.2, 300), (0.3, 200), (0.4, 400)], BreakEven(0.325, False)),  # the last crossing
        (150, [(0.1, 90), (0.1001, 110), (0.2, 200)], BreakEven(0.15, False)),  # two masks of one density
        (150, [(0.01, 100), (0.015, 200)], BreakEven(0.0125, False)),  # two densities, small as they are
        (150, [(0.0, 90), (0.0, 110), (0.2, 200)], BreakEven(0.1, False)),
        (150, [(0.1, 100)], None),
        (150, [(0.0, 100), (0.0, 110)], None),
        (150, [], None),
    ],
)
def test_break_even(dense, points, expected):
    found = break_even(dense, points)
    if expected is None or expected.density is None:
        assert found == expected
    else:
        assert found.density == pytest.approx(expected.density, abs=1e-4)
        assert found.extrapolated == expected.extrapolated


@pytest.mark.parametrize(
    ("even", "words"),
    [
        (BreakEven(0.254, False), "25 %"),
        (BreakEven(0.62, True), "~62 %*"),
        (BreakEven(None, False), "never"),
        (BreakEven(None, True), "never*"),
        (BreakEven(0.0, False), "0 %: always slower"),
    ],
)
def test_break_even_in_words(even, words):
    assert str(even) == words


# --- models with random weights ---


def test_each_random_model_has_its_builder(monkeypatch):
    built = []

    def fake(name, attributes):
        fake_module = types.ModuleType(f"sparserefine.bases.families.{name}")
        for attribute in attributes:
            setattr(
                fake_module, attribute, lambda *given, a=attribute: built.append((a, *given)) or LoadedModel(Tiny())
            )
        monkeypatch.setitem(sys.modules, f"sparserefine.bases.families.{name}", fake_module)
        monkeypatch.setattr(f"sparserefine.bases.families.{name}", fake_module, raising=False)

    fake("hrnet", ["hrnet_w48"])
    fake("segnext", ["segnext"])
    fake("hf", ["segformer_b5", "mask2former_t", "mask2former_l"])
    for name in RANDOM_MODELS:
        assert isinstance(random_model(name, 7), LoadedModel)
    assert built == [
        ("hrnet_w48", 7),
        ("segformer_b5", 7),
        ("mask2former_t", 7),
        ("mask2former_l", 7),
        *(("segnext", size, 7) for size in "tsbl"),
    ]


def test_random_weights_repeat_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    first, second = (random_model("segnext_t", 4).model.state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_random_model():
    with pytest.raises(ValueError, match="'resnet' is not known; choose from hrnet_w48"):
        random_model("resnet", 4)


# --- a run ---


def test_records_belong_together(report):
    assert not report.left_out
    keys = [(r.model, r.coarse_size, r.preset, r.density) for r in report.records]
    name = "python:benchmarked:tiny"
    tenth, third = round(0.1 * 64 * 128) / (64 * 128), round(0.3 * 64 * 128) / (64 * 128)
    assert keys == [
        (name, coarse, preset, density)
        for coarse in ("32x64", "16x32")
        for preset in ("slim", "slim16")
        for density in (tenth, third)
    ]
    for r in report.records:
        assert (r.size, r.mask, r.runtime, r.precision, r.device) == ("64x128", "synthetic", "torch", "float32", "cpu")
        assert (r.threads, r.rounds, r.classes) == (torch.get_num_threads(), 2, 5)
        assert r.sites == round(r.density * 64 * 128)
        assert r.ratio == pytest.approx(r.dense_ms / (r.coarse_ms + r.refine_ms))
        assert list(r.stages_ms) == STAGES
        assert min(r.dense_ms, r.coarse_ms, r.refine_ms, *r.stages_ms.values()) > 0
        assert r.dense_gmacs == pytest.approx(3 * 5 * 64 * 128 / 1e9)
        height, width = parse_size(r.coarse_size)
        assert r.coarse_gmacs == pytest.approx(3 * 5 * height * width / 1e9)
        assert torch.__version__ in r.machine
    by_density = [
        (a.refine_gmacs, b.refine_gmacs) for a, b in zip(report.records[::2], report.records[1::2], strict=True)
    ]
    assert all(0 < less < more for less, more in by_density)
    # What is the base's does not depend on the preset.
    assert len({(r.coarse_size, r.dense_ms, r.coarse_ms) for r in report.records}) == 2


def test_times_are_those_of_the_runs(monkeypatch):
    """By a clock that ticks once a second, whenever it is read."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    (record,) = benchmark(small("python:benchmarked:tiny", densities=(0.2,), rounds=3)).records
    assert (record.dense_ms, record.coarse_ms) == (1000, 1000)
    assert record.refine_ms > sum(record.stages_ms.values()) >= 1000 * len(STAGES)
    assert record.ratio == pytest.approx(1000 / (1000 + record.refine_ms))


def test_memory_of_the_base_is_what_it_needs_beyond_its_weights():
    (record,) = benchmark(small("python:benchmarked:hungry")).records
    assert 60 <= record.dense_peak_mb < 200
    assert 60 <= record.coarse_peak_mb < 200


@pytest.mark.parametrize(("engine", "buffers"), [pytest.param("torch", 1, marks=pytest.mark.slow), ("cpu", 6)])
def test_memory_of_refinement_has_all_features(engine, buffers):
    """``slim`` has 16 channels at full size, of which the packed network holds several buffers at a time.

    A buffer is above 32 MiB, so that malloc takes it from the system and gives it back: the process grows each time.
    """
    if engine == "cpu":
        engine_of("cpu-generic")
    options = {"size": (768, 768), "densities": (1.0, 0.01), "engine": engine}
    most, least = benchmark(small("python:benchmarked:tiny", **options)).records
    assert most.sites == 768 * 768
    assert most.refine_peak_mb >= buffers * most.sites * 16 * 4 / 1e6
    assert least.refine_peak_mb < 0.5 * most.refine_peak_mb
    if engine == "cpu":
        weights = sum(p.numel() for p in module.PRESETS["slim"].build(5).parameters())
        assert most.packed_mb == least.packed_mb >= 4 * weights / 1e6
    else:
        assert most.packed_mb is None


def test_spare_memory_is_given_back_before_it_is_measured(monkeypatch):
    """By the function of GNU's C library; others have none."""
    asked = []
    library = types.SimpleNamespace(malloc_trim=asked.append)
    monkeypatch.setattr(clock.ctypes, "CDLL", lambda name: library)
    clock.trim()
    assert asked == [0]
    del library.malloc_trim
    clock.trim()
    if platform.libc_ver()[0] == "glibc":
        monkeypatch.undo()
        assert clock.ctypes.CDLL(None).malloc_trim(0) in (0, 1)


def test_masks_and_densities_together(tmp_path):
    Image.fromarray(synthetic_mask(SIZE, 0.125).numpy()).save(tmp_path / "street.png")
    wanted = small("python:benchmarked:tiny", masks=(str(tmp_path / "street.png"),), densities=(1.0,))
    report = benchmark(wanted)
    assert [(r.mask, r.density) for r in report.records] == [("street", 0.125), ("synthetic", 1.0)]


def test_masks_from_files(tmp_path):
    mask = synthetic_mask(SIZE, 0.125)
    Image.fromarray(mask.numpy()).save(tmp_path / "street.png")
    report = benchmark(small("python:benchmarked:tiny", densities=None, masks=(str(tmp_path / "street.png"),)))
    (record,) = report.records
    assert (record.mask, record.density, record.sites) == ("street", 0.125, 1024)
    assert "street" in model_table(report.records)
    assert " - " in summary(report)  # one density makes no line, so no break-even


def test_no_site_is_an_ordinary_case():
    (record,) = benchmark(small("python:benchmarked:tiny", densities=(0.0,))).records
    assert (record.sites, record.refine_gmacs) == (0, 0)


def test_a_file_knows_its_classes(unet):
    assert {r.classes for r in benchmark(small(unet)).records} == {3}


def test_scores_are_labelled_as_scores(monkeypatch):
    class Scores(Tiny):
        def forward(self, x):
            return super().forward(x).softmax(1)

    monkeypatch.setattr(inputs, "_built", lambda name, classes: LoadedModel(Scores(), classes, outputs="scores"))
    assert not benchmark(small("mask2former_t")).left_out


@pytest.mark.parametrize("name", ["torch", "cpu", "cpu-int8"])
def test_the_engine_is_the_chosen_one(name):
    try:
        get_engine(name)
    except ValueError as error:
        pytest.skip(str(error))
    report = benchmark(small("python:benchmarked:tiny", engine=name, densities=(0.5,)))
    assert not report.left_out
    assert [r.engine for r in report.records] == [name]


@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_the_refinement_as_a_graph(engine, monkeypatch):
    engine_of(engine)
    monkeypatch.setitem(module.PRESETS, "slim", module.PRESETS["slim"].__class__((4, 6), blocks=1))
    tiny = {"size": (8, 16), "densities": (0.1, 0.2), "device": str(device_of(engine))}
    report = benchmark(small("python:benchmarked:tiny", engine="triton", graph=True, **tiny))
    assert not report.left_out
    assert [(r.engine, r.mode, list(r.stages_ms)) for r in report.records] == 2 * [("triton", "graph", ["graph"])]
    assert all(r.refine_ms == r.stages_ms["graph"] > 0 for r in report.records)
    assert report.records[0].refine_gmacs < report.records[1].refine_gmacs
    assert "engine triton (graph)" in header(report)


def test_a_graph_without_a_gpu_is_refused_at_once(nothing_runs):
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU and engine 'triton', this is 'torch' on cpu"):
        benchmark(small("python:benchmarked:tiny", engine="torch", graph=True))


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_half_precision_is_of_the_base(engine):
    seen = []

    class Watched(Tiny):
        def forward(self, x):
            if x.device.type != "meta":
                seen.append((x.dtype, self.conv.weight.dtype))
            return super().forward(x)

    sys.modules["benchmarked"].tiny = Watched
    report = benchmark(small("python:benchmarked:tiny", precision="bfloat16", engine=engine))
    assert not report.left_out
    assert seen[0] == (torch.float32, torch.float32)  # which counted the classes
    assert set(seen[1:]) == {(torch.bfloat16, torch.bfloat16)}
    assert {r.precision for r in report.records} == {"bfloat16"}
    assert "64x128, base bfloat16, refiner float32, device cpu" in header(report)
    assert all(r.dense_gmacs for r in report.records)


def test_settings_of_torch_are_put_back_even_after_an_interruption():
    before = torch.get_num_threads()
    assert torch.backends.cudnn.allow_tf32
    used, tf32 = [], []

    class Watched(Tiny):
        def forward(self, x):
            tf32.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    sys.modules["benchmarked"].tiny = Watched

    def interrupt(report):
        used.extend(r.threads for r in report.records)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(small("python:benchmarked:tiny", threads=before + 1), seen=interrupt)
    assert used == [before + 1]
    assert not any(tf32)
    assert torch.get_num_threads() == before
    assert torch.backends.cudnn.allow_tf32


def test_a_function_runs_as_it_is():
    """And has the classes that it has, whatever the number for random models."""
    report = benchmark(small("python:benchmarked:function", runtimes=("torch",), classes=19))
    assert {(r.runtime, r.dense_gmacs, r.classes) for r in report.records} == {("own", None, 5)}
    assert " - " in model_table(report.records)


def test_a_runtime_that_fails_is_left_out_and_the_rest_goes_on(monkeypatch):
    def refuse(self, name, model):
        raise ValueError("cannot be exported:\nline two")

    monkeypatch.setattr("sparserefine.bases.runtimes.Runtime.__init__", refuse)
    monkeypatch.setattr(module, "_check_packages", lambda settings: None)
    lines = []
    wanted = small("python:benchmarked:tiny", "python:benchmarked:function", runtimes=("openvino", "torch"))
    report = benchmark(wanted, tell=lines.append)
    tiny, other = "python:benchmarked:tiny", "python:benchmarked:function"
    assert {(r.model, r.runtime) for r in report.records} == {(tiny, "torch"), (other, "own")}
    assert report.left_out == tuple(
        f"{name} with runtime openvino is left out: cannot be exported: line two" for name in (tiny, other)
    )
    assert set(report.left_out) <= set(lines)
    assert summary(report).splitlines()[-2:] == list(report.left_out)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_runs_the_base(runtime):
    for package in module.NEEDS[runtime]:
        pytest.importorskip(package, reason=f"runtime {runtime} needs it")
    report = benchmark(small("python:benchmarked:tiny", runtimes=("torch", runtime)))
    assert not report.left_out
    assert [r.runtime for r in report.records] == ["torch", runtime]


@pytest.mark.parametrize("asked", [("torch",), ("torch", "onnxruntime")])
def test_an_onnx_file_is_run_as_it_is(monkeypatch, tmp_path, asked):
    """By ONNX Runtime, once, in one session for each size, and not by way of :class:`Runtime`."""
    onnx = pytest.importorskip("onnx", reason="writes the file")
    for package in module.NEEDS["onnxruntime"]:
        pytest.importorskip(package, reason="asked for as runtime")
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    kernel = onnx.numpy_helper.from_array(torch.rand(4, 3, 1, 1).numpy(), "kernel")
    image, logits = (value(name, 1, [1, c, "h", "w"]) for name, c in (("image", 3), ("logits", 4)))
    graph = onnx.helper.make_graph([node("Conv", ["image", "kernel"], ["logits"])], "g", [image], [logits], [kernel])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "model.onnx")
    run = {}
    call = module.OnnxModel.__call__

    def watched(model, x):
        run.setdefault(id(model), (model, set()))[1].add(tuple(x.shape[2:]))
        return call(model, x)

    def refuse(self, name, model):
        raise AssertionError("an ONNX file needs no other runtime")

    monkeypatch.setattr(module.OnnxModel, "__call__", watched)
    monkeypatch.setattr("sparserefine.bases.runtimes.Runtime.__init__", refuse)
    report = benchmark(small(f"onnx:{tmp_path / 'model.onnx'}", runtimes=asked))
    assert not report.left_out
    assert [(r.runtime, r.classes) for r in report.records] == [("onnxruntime", 4)]
    assert [sizes for _, sizes in run.values()] == [{SIZE}, {(32, 64)}]


def test_a_model_that_fails_is_left_out_and_the_rest_goes_on():
    seen = []
    report = benchmark(small("python:benchmarked:only_coarse", "python:benchmarked:tiny"), seen=seen.append)
    (line,) = report.left_out
    assert "only_coarse with runtime torch is left out: RuntimeError: too large for this model and a second" in line
    assert {r.model for r in report.records} == {"python:benchmarked:tiny"}
    assert [len(r.records) for r in seen] == [0, 1]
    nothing = dataclasses.replace(report, records=())
    assert "nothing was measured" in summary(nothing)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot(nothing, "never.png")


# --- what is refused before the run ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presets": ("fat",)}, "preset 'fat' is not known; choose from paper, slim, slim16"),
        ({"presets": ()}, "no preset is chosen"),
        ({"presets": ("slim", "slim")}, "preset 'slim' is given twice"),
        ({"runtimes": ("tensorrt",)}, "runtime 'tensorrt' is not known; choose from torch, onnxruntime, openvino"),
        ({"precision": "int8"}, "precision 'int8' is not known"),
        ({"precision": "float16", "runtimes": ("openvino",)}, "precision float16 is for runtime torch, not openvino"),
        ({"densities": (1.5,)}, "density 1.5, expected a share of the pixels between 0 and 1"),
        ({"densities": ()}, "no density is chosen"),
        ({"coarse": (32, 256)}, "32x256 is larger than the image, 64x128"),
        ({"classes": 1}, "classes = 1, expected at least 2"),
        ({"rounds": 0}, "rounds = 0, expected at least 1"),
        ({"threads": 0}, "threads = 0, expected at least 1"),
    ],
)
def test_wrong_settings(options, words):
    with pytest.raises(ValueError, match=words):
        small("python:benchmarked:tiny", **options)


def test_bases_are_checked_too():
    with pytest.raises(ValueError, match="no base is chosen"):
        small()
    for same in ("a", "a@32x64"):  # by default half of the size
        with pytest.raises(ValueError, match="base 'a@32x64' is given twice"):
            small("a", same)
    with pytest.raises(ValueError, match=r"tiny@\.\.\.: 128x128 is larger"):
        small("tiny@128x128")
    assert len(small("a", "a@32x32").bases) == 2


def test_a_runtime_on_a_gpu_is_refused_at_once(nothing_runs, monkeypatch):
    monkeypatch.setattr(module, "device_named", lambda name: torch.device("cuda"))
    with pytest.raises(ValueError, match="openvino run on the CPU, the device is cuda; choose --device cpu"):
        benchmark(small("python:benchmarked:tiny", runtimes=("torch", "openvino")))


@pytest.fixture
def nothing_runs(monkeypatch):
    def measured(self):
        raise AssertionError("measured before all was checked")

    monkeypatch.setattr(module._BaseBenchmark, "measure", measured)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bases", "python:benchmarked:tiny,resnet"], "hrnet_w48, segformer_b5"),
        (["--bases", "unet:none.safetensors"], "none.safetensors"),
        (["--bases", "python:benchmarked:huge"], "huge"),
        (["--bases", ","], "no base is chosen"),
        (["--bases", "python:benchmarked:tiny", "--size", "64"], "size '64', expected height x width"),
        (["--bases", "python:benchmarked:tiny", "--coarse", "x"], "coarse size 'x'"),
        (["--bases", "python:benchmarked:tiny", "--densities", "a"], "density 'a', expected a number"),
        (["--bases", "python:benchmarked:tiny", "--masks", "none.png"], "none.png: no such file"),
        (["--bases", "python:benchmarked:tiny", "--json", "no/folder/a.json"], "its folder does not exist"),
        (["--bases", "python:benchmarked:tiny", "--plot", "no/folder/a.png"], "its folder does not exist"),
        (["--bases", "python:benchmarked:tiny", "--json", "."], "is a folder"),
        (["--bases", "python:benchmarked:tiny", "--plot", "a.jpeg"], "ends with .png, .svg, .pdf"),
        (["--bases", "python:benchmarked:tiny", "--device", "abacus"], "abacus"),
        (["--bases", "python:benchmarked:tiny", "--engine", "steam"], "engine 'steam' is not known"),
    ],
)
def test_errors_come_before_the_run(nothing_runs, capsys, options, words):
    assert main(["benchmark", "--device", "cpu", "--size", "64x128", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_missing_package_is_said_before_the_run(nothing_runs, monkeypatch):
    find = module.importlib.util.find_spec
    gone = ("openvino", "transformers", "scipy")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    with pytest.raises(ImportError, match=r"openvino needs openvino, .* 'sparserefine\[openvino\]'"):
        benchmark(small("python:benchmarked:tiny", runtimes=("openvino",)))
    with pytest.raises(ImportError, match=r"segformer_b5 needs transformers, .* 'sparserefine\[hf\]'"):
        benchmark(small("segformer_b5"))
    with pytest.raises(ImportError, match=r"mask2former_t needs transformers and scipy, .* 'sparserefine\[hf\]'"):
        benchmark(small("mask2former_t"))


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sparserefine\[plot\]'"):
        check_outputs(None, tmp_path / "a.png")
    check_outputs(tmp_path / "a.json", None)


def test_empty_names_of_outputs_are_refused_at_once():
    for outputs in (("", None), (None, "")):
        with pytest.raises(ValueError, match="an empty path; is a shell variable unset"):
            check_outputs(*outputs)


# --- what is written ---


def test_json_round_trip(report, tmp_path):
    write_records(tmp_path / "report.json", report.records)
    records = json.loads((tmp_path / "report.json").read_text())
    assert tuple(Record(**record) for record in records) == report.records
    assert set(records[0]) == {
        *("model", "size", "density", "preset", "engine", "threads", "dense_ms", "coarse_ms", "refine_ms", "ratio"),
        *("runtime", "precision", "device", "coarse_size", "mask", "sites", "classes", "stages_ms"),
        *("dense_gmacs", "coarse_gmacs", "refine_gmacs", "dense_peak_mb", "coarse_peak_mb", "refine_peak_mb"),
        *("packed_mb", "rounds", "machine", "mode"),
    }


def test_names_are_printed_on_one_line(report, tmp_path):
    bad = "unet:a\n\x1b[31mb"
    records = [dataclasses.replace(record, model=bad, mask="m\r") for record in report.records]
    named = Report(report.settings, report.machine, tuple(records), (f"{bad} is left out: why\x07",))
    for text in (model_table(records), summary(named), summary(Report(named.settings, "", (), named.left_out))):
        assert all(line.isprintable() for line in text.split("\n"))
        assert r"unet:a\n\x1b[31mb" in text
    write_records(tmp_path / "report.json", records)
    assert json.loads((tmp_path / "report.json").read_text())[0]["model"] == bad


def test_tables_say_what_was_measured(report):
    first = report.records[0]
    assert torch.__version__ in header(report)
    assert "64x128, float32, device cpu, 1 thread, engine" in header(report)
    text = model_table(report.records)
    assert f"{first.model}, torch, 5 classes: 32x64 instead of 64x128" in text
    assert text.count(f"{first.ratio:.2f}x") >= 1
    assert "labels" in text
    lines = summary(report).splitlines()
    assert "density of 10%" in lines[0]
    rows = [line for line in lines if line.startswith(first.model)]
    assert len(rows) == 2
    assert ("32x64" in rows[0], "16x32" in rows[1]) == (True, True)


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("count", [1, 4])
def test_plots(report, tmp_path, suffix, count):
    """Of one base, and of several with two runtimes one of which is left out once."""
    pytest.importorskip("matplotlib", reason="plots are drawn by it")
    records = (
        report.records
        if count == 1
        else tuple(
            dataclasses.replace(r, model=f"model {i}", runtime=runtime)
            for i in range(count)
            for runtime in ("torch", "openvino")
            for r in report.records[:4]
            if (i, runtime) != (1, "openvino")
        )
    )
    drawn = Report(report.settings, report.machine, records)
    path = tmp_path / f"plot.{suffix}"
    plot(drawn, path)
    if suffix == "png":
        with Image.open(path) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 5
    else:
        text = path.read_text()
        assert "</svg>" in text
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# --- the command ---

COMMAND = ["benchmark", "--size", "64x128", "--presets", "slim", "--densities", "0.1,0.3", "--rounds", "1"]
COMMAND += ["--device", "cpu"]


def test_the_command(unet, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot draws with it")
    bases = f"{unet},python:benchmarked:tiny@16x32"
    outputs = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "report.svg")]
    assert main([*COMMAND, "--bases", bases, "--classes", "5", *outputs]) == 0
    printed = capsys.readouterr()
    records = json.loads((tmp_path / "report.json").read_text())
    assert [(r["model"], r["coarse_size"], round(r["density"], 2)) for r in records] == [
        (unet, "32x64", 0.1),
        (unet, "32x64", 0.3),
        ("python:benchmarked:tiny", "16x32", 0.1),
        ("python:benchmarked:tiny", "16x32", 0.3),
    ]
    assert "</svg>" in (tmp_path / "report.svg").read_text()
    assert printed.out.count(records[0]["machine"]) == 1
    for record in records:
        assert f"{record['ratio']:.2f}x" in printed.out
    assert "break-even" in printed.out
    assert "round 1 of 1" in printed.err
    assert "round 1 of 1" not in printed.out


@pytest.mark.parametrize("old", [["--plans", "slim"], ["--plans=slim"]])
def test_plans_are_called_presets_now(old, capsys):
    assert main(["benchmark", "--bases", "hrnet_w48", *old]) == 2
    assert capsys.readouterr().err == "sparserefine benchmark: option --plans is called --presets now\n"


def test_the_command_tells_by_its_exit_code_that_something_is_left_out(tmp_path, capsys):
    bases = "python:benchmarked:only_coarse,python:benchmarked:tiny"
    file = tmp_path / "report.json"
    assert main([*COMMAND, "--bases", bases, "--classes", "5", "--json", str(file)]) == 1
    assert "only_coarse with runtime torch is left out" in capsys.readouterr().out
    assert len(json.loads(file.read_text())) == 2


def test_nothing_measured_replaces_the_records_of_an_earlier_run(tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text("[{}]")
    assert main([*COMMAND, "--bases", "python:benchmarked:only_coarse", "--json", str(file)]) == 1
    assert json.loads(file.read_text()) == []
    assert "nothing was measured" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_bases_that_were_done(unet, monkeypatch, tmp_path, capsys):
    measure = module._BaseBenchmark.measure

    def interrupted(self):
        if "tiny" in self._entry.name:
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(module._BaseBenchmark, "measure", interrupted)
    file = tmp_path / "report.json"
    assert main([*COMMAND, "--bases", f"{unet},python:benchmarked:tiny", "--json", str(file)]) == 130
    assert {r["model"] for r in json.loads(file.read_text())} == {unet}
    assert unet in capsys.readouterr().out
