"""8-bit arithmetic: the kernel against exact integers, the network against rounding in float64, and calibration."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sparserefine.commands.main import main
from sparserefine.engines.choose import EngineChoice, engine_report, get_engine
from sparserefine.engines.cpu.kernels import Kernels
from sparserefine.files.lock import locked
from sparserefine.refiner import SparseRefiner
from sparserefine.sparse import Sites, SparseBatchNorm, SparseConv, SparseUNet, calibrating
from sparserefine.sparse.epilogue import Activation, Epilogue
from sparserefine.sparse.quantisation import quantised_convs, quantised_weight, step_of
from sparserefine.studies.demo import demo_refiner_folder
from support import mask_of


@pytest.fixture
def kernel() -> Kernels:
    return engine().kernels


def engine():
    try:
        return get_engine("cpu-int8")
    except ValueError as error:
        pytest.skip(str(error))


def features(n: int, channels: int) -> Tensor:
    """``uint8 [n + 1, channels]``, rows of whole fours, the last one zero; what pads the fours is not zero."""
    x = torch.randint(0, 256, (n + 1, -(-channels // 4) * 4), dtype=torch.uint8)
    x[-1] = 0
    return x[:, :channels]


def exact(x: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    """``int64 [n, C_out]``; the last row of ``x`` is what a missing neighbour reads."""
    return torch.einsum("ntk,tkc->nc", x.long()[table.long()], weight.long())


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 12, 13, 700])
@pytest.mark.parametrize(("c_in", "c_out"), [(1, 1), (3, 17), (4, 16), (5, 33), (16, 16), (17, 48), (33, 32), (64, 80)])
@pytest.mark.parametrize("taps", [1, 4, 9])
def test_sums_are_exact(kernel: Kernels, taps: int, c_in: int, c_out: int, n: int) -> None:
    x, n_in = features(50, c_in), 50
    table = torch.randint(0, n_in + 1, (n, taps), dtype=torch.int32)
    weight = torch.randint(-127, 128, (taps, c_in, c_out), dtype=torch.int8)
    scale, y = torch.rand(c_out) + 0.5, torch.empty(n, c_out)
    kernel.convolve_int8(x, table, kernel.pack_int8(weight, scale), Epilogue(raw=y), n)
    torch.testing.assert_close(y, exact(x, table, weight).float() * scale, rtol=1e-6, atol=0)


def test_epilogue_and_rows(kernel: Kernels) -> None:
    n, c = 37, 19
    x, table = features(n, 8), torch.randint(0, n + 1, (n, 9), dtype=torch.int32)
    weight, scale = torch.randint(-127, 128, (9, 8, c), dtype=torch.int8), torch.full((c,), 1e-3)
    residual, factor, shift = torch.randn(n, c), torch.rand(c) + 0.5, torch.randn(c)
    poisoned = torch.full((n, c + 5), 77, dtype=torch.uint8)
    raw, active = torch.empty(n, c), torch.empty(n, c)
    rows = torch.randperm(n).int()
    activated = (Activation(poisoned[:, 2 : 2 + c], factor, shift), Activation(active, factor, shift))
    epilogue = Epilogue(residual, raw=raw, activated=activated)
    kernel.convolve_int8(x, table, kernel.pack_int8(weight, scale), epilogue, n, rows=rows)
    expected = torch.empty(n, c).index_copy(0, rows.long(), exact(x, table, weight) * 1e-3) + residual
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(active, F.relu(expected * factor + shift))
    rounded = F.relu(expected * factor + shift).clamp(max=255)
    assert bool(((poisoned[:, 2 : 2 + c] - rounded).abs() <= 0.5 + 1e-3).all())
    assert bool((poisoned[:, :2] == 77).all())
    assert bool((poisoned[:, 2 + c :] == 77).all())


@pytest.mark.parametrize("name", ["cpu-avx512", "cpu-avx2", "cpu-generic"])
def test_float_kernels_write_bytes_too(name: str) -> None:
    from support import engine_of

    x, c = torch.randn(50, 5) * 100, 19
    kernel, weight = engine_of(name).kernels, torch.randn(1, 5, c)
    out, one, zero = torch.empty(50, c, dtype=torch.uint8), torch.ones(c), torch.zeros(c)
    kernel.convolve(x, None, kernel.pack(weight), Epilogue(activated=(Activation(out, one, zero),)), 50)
    expected = F.relu(x @ weight[0]).clamp(max=255)
    assert bool(((out - expected).abs() <= 0.5 + 1e-3).all())
    assert out.max() == 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(6, 8)}, "float32"),
        ({"x": torch.zeros(6, 7, dtype=torch.uint8)}, r"uint8 \[N \+ 1, 8\]"),
        ({"x": torch.zeros(8, 6, dtype=torch.uint8).t()}, "strides"),
        ({"table": torch.zeros(5, 4, dtype=torch.int32)}, r"expected \[n, 9\]"),
        ({"table": torch.zeros(5, 9)}, "int32"),
        ({"y": torch.zeros(5, 4)}, r"\[5, 3\]"),
        ({"rows": torch.zeros(4, dtype=torch.int32)}, "5"),
    ],
    ids=["float", "channels", "transposed", "taps", "table dtype", "output", "rows"],
)
def test_refuses_what_does_not_fit(kernel: Kernels, change: dict, words: str) -> None:
    packed = kernel.pack_int8(torch.ones(9, 8, 3, dtype=torch.int8), torch.ones(3))
    given = {"x": torch.zeros(6, 8, dtype=torch.uint8), "table": torch.zeros(5, 9, dtype=torch.int32)}
    given |= {"y": torch.empty(5, 3), "rows": None} | change
    with pytest.raises(ValueError, match=words):
        kernel.convolve_int8(given["x"], given["table"], packed, Epilogue(raw=given["y"]), 5, rows=given["rows"])


@pytest.mark.parametrize("bad", [-1, 7, 1 << 30])
def test_tables_out_of_range(kernel: Kernels, bad: int) -> None:
    packed = kernel.pack_int8(torch.ones(9, 4, 3, dtype=torch.int8), torch.ones(3))
    x, table = torch.zeros(6, 4, dtype=torch.uint8), torch.full((5, 9), 5, dtype=torch.int32)
    table[3, 2] = bad
    with pytest.raises(IndexError, match="table has entries out of range"):
        kernel.convolve_int8(x, table, packed, Epilogue(raw=torch.empty(5, 3)), 5)
    rows = torch.tensor([0, 1, 2, 3, bad if bad != 7 else 5], dtype=torch.int32)
    with pytest.raises(IndexError, match="table has entries out of range"):
        kernel.convolve_int8(x, table.fill_(5), packed, Epilogue(raw=torch.empty(5, 3)), 5, rows=rows)


# ---- networks


def network(planes: tuple[int, ...], blocks: int, down: str) -> SparseUNet:
    net = SparseUNet(3, 4, planes, blocks=blocks, down=down)
    for module in net.modules():
        if isinstance(module, SparseBatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.bias.data.uniform_(-0.5, 0.5)
    return net.eval()


def rounded_in_float64(net: SparseUNet, x: Tensor, mask: Tensor) -> Tensor:
    """The module path, inputs and weights of the convolutions rounded as 8 bits are."""
    convs = {conv: step_of(conv) for conv in quantised_convs(net)}
    steps = {conv: (step.double(), quantised_weight(conv.weight, step)) for conv, step in convs.items()}
    net = net.double()
    hooks = []
    for conv, (step, (weight, scale)) in steps.items():
        conv.weight.data = weight.double() * scale.double() / step[:, None]

        def rounding(_: nn.Module, inputs: tuple[Tensor, object], step: Tensor = step) -> tuple[Tensor, object]:
            return (inputs[0] / step + 0.5).floor().clamp(max=255) * step, inputs[1]

        hooks.append(conv.register_forward_pre_hook(rounding))
    with torch.no_grad():
        return net(x.double(), get_engine("torch").geometry(Sites.from_mask(mask), net.spec))


@pytest.mark.parametrize("pattern", ["none", "one", "border", "all", "random"])
@pytest.mark.parametrize(
    ("planes", "blocks", "down"),
    [((16, 32, 64), 1, "cell"), ((16, 32), 2, "paper"), ((3, 5, 7), 1, "cell"), ((17,), 2, "cell")],
)
def test_network_rounds_as_told(planes: tuple[int, ...], blocks: int, down: str, pattern: str) -> None:
    net, mask = network(planes, blocks, down), mask_of(pattern, (23, 18), batch=3)
    full = mask_of("all", (23, 18), batch=3)
    with calibrating(net), torch.no_grad():
        net(torch.randn(int(full.sum()), 3), engine().geometry(Sites.from_mask(full), net.spec))
    run, x = engine(), torch.randn(int(mask.sum()), 3)
    with torch.inference_mode():
        packed = run.prepare(net)
        assert packed.int8
        logits = packed(x, run.geometry(Sites.from_mask(mask), net.spec))
        again = packed(x, run.geometry(Sites.from_mask(mask), net.spec))
    assert torch.equal(logits, again)
    expected = rounded_in_float64(net, x, mask)
    # Sums in another order round a few inputs to the neighbouring unit.
    assert float((logits - expected).norm()) <= 0.02 * float(expected.norm()) + 1e-6


def test_hooks_are_called_so_such_networks_are_not_packed() -> None:
    net, run = network((16,), 1, "cell"), get_engine("auto")
    handle = net.stem.register_forward_hook(lambda *_: None)
    assert run.prepare(net) is None
    handle.remove()
    if run.name == "cpu":
        assert run.prepare(net) is not None


# ---- calibration


def refiner(engine: str = "torch") -> SparseRefiner:
    return SparseRefiner.from_pretrained(demo_refiner_folder(), engine=engine)


def photograph(size: int = 128) -> Tensor:
    from sparserefine import read_image
    from sparserefine.studies.demo import ASSETS

    return read_image(ASSETS / "01_h.webp")[:, 1000 : 1000 + size, 1500 : 1500 + size].contiguous()


def test_calibration_keeps_the_largest_input(tmp_path: Path) -> None:
    stored, images = refiner(), [photograph(), photograph().flip(-1)]
    names = set(stored.state_dict())
    assert stored.quantize(iter(images)) == 2
    convs = quantised_convs(stored.extractor)
    assert len(set(stored.state_dict()) - names) == len(convs)
    largest: list[Tensor] = []
    hook = convs[3].register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].amax(0)))
    with torch.no_grad():
        for image in images:
            stored(image[None])
    hook.remove()
    torch.testing.assert_close(convs[3].input_max, torch.stack(largest).amax(0))
    stored.save_pretrained(tmp_path)
    again = SparseRefiner.from_pretrained(tmp_path, engine="torch")
    for name, value in stored.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # And weights without calibration are read as before.
    again.load_state_dict({name: value for name, value in again.state_dict().items() if "input_max" not in name})
    assert set(again.state_dict()) == names


def test_training_forgets_the_calibration() -> None:
    stored = refiner()
    stored.quantize([photograph()])
    stored.train()(photograph()[None])
    assert all(conv.input_max is None for conv in stored.extractor.modules() if isinstance(conv, SparseConv))


def test_calibration_needs_sites() -> None:
    stored = refiner()
    with pytest.raises(ValueError, match="saw no site"):
        stored.quantize([])
    assert not stored.training


def test_calibration_refuses_what_is_not_finite(tmp_path: Path) -> None:
    stored = refiner()
    stored.quantize([photograph()])
    before = {name: value.clone() for name, value in stored.state_dict().items() if "input_max" in name}
    assert before
    with torch.no_grad():
        stored.extractor.stem.weight[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations that are NaN or infinite"):
        stored.quantize([photograph()])
    assert all(torch.equal(stored.state_dict()[name], value) for name, value in before.items())


def test_calibrate_is_called_quantize_now() -> None:
    with pytest.raises(AttributeError, match=r"called SparseRefiner\.quantize now"):
        refiner().calibrate([photograph()])


def test_labels_are_those_of_float() -> None:
    engine()
    stored, image = refiner("cpu-int8"), photograph(256)
    with pytest.raises(ValueError, match="sparserefine quantize"), torch.inference_mode():
        stored(image[None])
    stored.quantize([image])
    with torch.inference_mode():
        labels = stored(image[None]).labels()
        stored.engine = EngineChoice("torch")
        assert float((stored(image[None]).labels() == labels).float().mean()) > 0.997


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine()
    (tmp_path / "in").mkdir()
    Image.fromarray(photograph(160).permute(1, 2, 0).numpy()).save(tmp_path / "in" / "a.png")
    out, labels = str(tmp_path / "refiner"), str(tmp_path / "labels")
    assert main(["quantize", str(tmp_path / "in"), "--refiner", "demo", "--out", out]) == 0
    assert "quantized with 1 image," in capsys.readouterr().out
    assert main(["predict", str(tmp_path / "in"), "--refiner", out, "--engine", "cpu-int8", "--out", labels]) == 0
    assert (tmp_path / "labels" / "a.png").is_file()
    assert main(["quantize", str(tmp_path / "in"), "--refiner", out, "--out", out]) == 1
    assert "give another one" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["quantize", str(tmp_path / "empty"), "--refiner", "demo", "--out", out + "2"]) == 1
    assert "no image in" in capsys.readouterr().err


def quantize(*arguments: object) -> int:
    return main(["quantize", *map(str, arguments)])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.fromarray(photograph(96).permute(1, 2, 0).numpy()).save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


def test_command_that_cannot_measure_stores_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(pictures, "--refiner", "demo", "--out", out, "--budget", 0) == 1
    assert "saw no site" in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []
    os.mkfifo(pictures / "b.png")
    assert quantize(pictures, "--refiner", "demo", "--out", out) == 1
    assert "b.png: is a FIFO" in capsys.readouterr().err
    assert quantize(pictures / "nowhere.png", "--refiner", "demo", "--out", out) == 1
    assert "nowhere.png: no such file, expected an image" in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []


def test_command_takes_no_empty_path(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable of the shell that is not set gives it; it would be the current folder."""
    for inputs, name, out in (("", "demo", "out"), (pictures, "", "out"), (pictures, "demo", "")):
        assert quantize(inputs, "--refiner", name, "--out", out) == 2
        assert "is empty; is a shell variable unset?" in capsys.readouterr().err


def test_command_does_not_write_beside_another(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "out", "train"):
        assert quantize(pictures, "--refiner", "demo", "--out", tmp_path / "out") == 1
    assert re.search(r"out: train \(process \d+ .* writes there", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_auto_does_not_round() -> None:
    assert get_engine("auto").name in ("cpu", "torch")
    assert "cpu-int8" in engine_report()
