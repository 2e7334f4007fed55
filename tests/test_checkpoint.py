"""Weights files: which are read, what is refused and runs nothing, and how names become ours."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparserefine.bases.checkpoint import Checkpoint, load_renamed, read_checkpoint
from sparserefine.images.classes import Classes, wheel

MMENGINE = Path(__file__).parent / "data" / "parity" / "mmengine.pth"
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, -1.0])}
NAMES, PALETTE = ("road", "sky"), ((128, 64, 128), (70, 130, 180))
FORMATS = [pytest.param(True, id="zip"), pytest.param(False, id="legacy")]


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(found: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert list(found.tensors) == list(expected)
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.items())


# ---- what is read


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="plain"),
        pytest.param(lambda state: OrderedDict(state), id="ordered"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}}, id="state_dict"),
        pytest.param(lambda state: {"model": state, "args": ["--lr", 0.1]}, id="model"),
        pytest.param(lambda state: {f"module.{name}": value for name, value in state.items()}, id="data-parallel"),
        pytest.param(lambda state: {name: nn.Parameter(value) for name, value in state.items()}, id="parameters"),
    ],
)
def test_layouts(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any], zipped: bool) -> None:
    for suffix in ("pth", "pt"):
        found = read_checkpoint(saved(tmp_path / f"file.{suffix}", wrap(TENSORS), zipped))
        assert_same(found, TENSORS)
        assert found.classes is None


def test_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file.safetensors")
    found = read_checkpoint(tmp_path / "file.safetensors")
    assert set(found.tensors) == set(TENSORS)
    assert all(torch.equal(found.tensors[name], value) for name, value in TENSORS.items())


def test_module_is_taken_off_only_where_all_have_it(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "b": torch.zeros(1)}
    assert_same(read_checkpoint(saved(tmp_path / "file.pth", state)), state)


@pytest.mark.parametrize(
    "meta",
    [
        pytest.param({"CLASSES": NAMES, "PALETTE": [list(c) for c in PALETTE], "epoch": 1}, id="mmsegmentation 0.x"),
        pytest.param({"dataset_meta": {"classes": list(NAMES), "palette": PALETTE}}, id="mmengine 1.x"),
        pytest.param({"dataset_meta": {"CLASSES": NAMES, "PALETTE": PALETTE}}, id="mmengine before 1.0"),
    ],
)
def test_classes_of_the_file(tmp_path: Path, meta: dict[str, Any]) -> None:
    path = saved(tmp_path / "file.pth", {"meta": meta, "state_dict": TENSORS})
    assert read_checkpoint(path).classes == Classes(NAMES, PALETTE)


@pytest.mark.parametrize(
    "palette",
    [None, PALETTE[:1], "random", [(1, 2), (3, 4)], [(0, 0, 256), (0, 0, 0)], [(0.5, 0, 0), (0, 0, 0)]],
    ids=str,
)
def test_classes_without_usable_colours(tmp_path: Path, palette: Any) -> None:
    path = saved(tmp_path / "file.pth", {"meta": {"CLASSES": NAMES, "PALETTE": palette}, "state_dict": TENSORS})
    assert read_checkpoint(path).classes == Classes(NAMES, (wheel(0), wheel(1)))


@pytest.mark.parametrize(
    "meta", [None, "text", {}, {"CLASSES": None}, {"CLASSES": "road"}, {"CLASSES": [1, 2]}], ids=str
)
def test_no_classes(tmp_path: Path, meta: Any) -> None:
    assert read_checkpoint(saved(tmp_path / "file.pth", {"meta": meta, "state_dict": TENSORS})).classes is None


# ---- mmengine's own


def with_old_numpy(target: Path) -> Path:
    """mmengine's file as numpy 1 would have had it written."""
    with zipfile.ZipFile(MMENGINE) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.namelist():
            data = old.read(entry)
            if entry.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in data
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(entry, data)
    return target


@pytest.mark.parametrize("numpy", ["2", "1"])
def test_file_of_mmengine(tmp_path: Path, numpy: str) -> None:
    path = MMENGINE if numpy == "2" else with_old_numpy(tmp_path / "file.pth")
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):  # the kind of file that torch itself refuses
        torch.load(path, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    found = read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert found.classes == Classes(NAMES, PALETTE)
    shapes = {name: tuple(value.shape) for name, value in found.tensors.items()}
    assert shapes == {
        "backbone.0.weight": (2, 3, 1, 1),
        "backbone.1.weight": (2,),
        "backbone.1.bias": (2,),
        "backbone.1.running_mean": (2,),
        "backbone.1.running_var": (2,),
        "backbone.1.num_batches_tracked": (),
        "decode_head.weight": (2, 2, 1, 1),
        "decode_head.bias": (2,),
    }
    assert int(found.tensors["backbone.1.num_batches_tracked"]) == 3  # the iterations that it was trained for
    assert all(0 < value.float().abs().max() < 10 for value in found.tensors.values())


# ---- what could run code


class Reduced:
    """Pickles as the call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("place", ["weights", "elsewhere", "instead"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(eval, "eval"), (Path.touch, "getattr|Path"), (nn.Linear, "torch.nn.modules.linear.Linear")],
    ids=["eval", "method", "class"],
)
def test_code_is_refused_and_not_run(
    tmp_path: Path, function: Callable[..., Any], name: str, place: str, zipped: bool
) -> None:
    mark = tmp_path / "it ran"
    arguments = {"eval": (f"open({str(mark)!r}, 'w')",), "touch": (mark,), "Linear": (2, 2)}[function.__name__]
    bad = Reduced(function, *arguments)
    content = {"weights": {**TENSORS, "bad": bad}, "elsewhere": {"state_dict": TENSORS, "meta": bad}, "instead": bad}
    path = saved(tmp_path / "bad.pth", content[place], zipped)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(
        ValueError, match=rf"bad.pth: contains \S*({name})\S* and is not loaded, because it could run code"
    ):
        read_checkpoint(path)
    assert not mark.exists()
    assert set(torch.serialization.get_safe_globals()) == before


def test_system_calls_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "bad.pth", {"meta": Reduced(os.system, f"touch {tmp_path}/mark"), **TENSORS})
    with pytest.raises(ValueError, match=r"bad.pth: contains \w+.system and is not loaded"):
        read_checkpoint(path)
    assert not (tmp_path / "mark").exists()


def test_what_stands_in_for_getattr_gets_nothing(tmp_path: Path) -> None:
    """``getattr`` is let through, as mmengine's log needs it, but it is not Python's: no way leads on from it."""
    reached = Reduced(getattr, torch.Size, "__init__")
    path = saved(tmp_path / "file.pth", {"state_dict": TENSORS, "meta": reached})
    assert_same(read_checkpoint(path), TENSORS)
    path = saved(tmp_path / "file.pth", {"state_dict": {**TENSORS, "bad": reached}})
    with pytest.raises(ValueError, match=r"2 tensors and, besides them, 'bad' \(getattr\)"):
        read_checkpoint(path)


def test_arrays_are_no_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", {"state_dict": {"a": torch.ones(2).numpy()}})
    with pytest.raises(ValueError, match=r"file.pth: .*no tensors but 'a' \(_reconstruct\)"):
        read_checkpoint(path)


# ---- what is no weights file


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights, text\n" * 9, bytes(300), b"PK\x03\x04", bytes(range(256)) * 4])
def test_other_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file.{suffix}: not a .* cut short \(.+\)"):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_cut_short(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        saved(path, TENSORS, kind == "zip")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{path.name}: not a .* cut short"):
        read_checkpoint(path)


def test_archive_without_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as file:
        file.writestr("readme.txt", "no weights")
    with pytest.raises(ValueError, match=r"file.pth: not a torch weights file"):
        read_checkpoint(tmp_path / "file.pth")


def repacked(source: Path, target: Path, compression: int, change: Callable[[str, bytes], bytes]) -> Path:
    """Writes the archive anew, its parts changed."""
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w", compression) as write:
        for name in read.namelist():
            write.writestr(name, change(name, read.read(name)))
    return target


def test_archives_take_no_more_memory_than_they_have_bytes(tmp_path: Path) -> None:
    """torch would unpack them."""
    source, target = saved(tmp_path / "a.pth", TENSORS), tmp_path / "b.pth"
    assert_same(read_checkpoint(repacked(source, target, zipfile.ZIP_STORED, lambda _, part: part)), TENSORS)
    repacked(source, target, zipfile.ZIP_DEFLATED, lambda name, part: part + bytes(10**7 * name.endswith("pkl")))
    assert target.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"b.pth: not a torch weights file, or cut short \(it is compressed\)"):
        read_checkpoint(target)
    content = bytearray(source.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the table of contents: sizes at 20 and 24
    content[entry + 20 : entry + 28] = 2 * (2**31 - 1).to_bytes(4, "little")
    target.write_bytes(content)
    with pytest.raises(ValueError, match=r"b.pth: .*its parts claim to be larger than the file"):
        read_checkpoint(target)


def test_shapes_that_the_file_does_not_hold(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", {"a": torch.ones(2, 2)})
    small, large = b"K\x02K\x02\x86", b"J\x60\xea\0\0J\x60\xea\0\0\x86"  # (2, 2) and (60000, 60000)

    def change(name: str, part: bytes) -> bytes:
        assert not name.endswith("pkl") or small in part
        return part.replace(small, large, 1)

    with pytest.raises(ValueError, match=r"b.pth: not a torch weights file, or cut short \(.*storage"):
        read_checkpoint(repacked(source, tmp_path / "b.pth", zipfile.ZIP_STORED, change))


OTHER_KINDS = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.zeros(2, 2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tensors_of_another_kind(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"expected names and tensors.*'a' \(a torch.* tensor\)"):
        read_checkpoint(saved(tmp_path / "file.pth", {"a": OTHER_KINDS[kind](), "b": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "holds list, expected a state dict"),
        (torch.ones(2), "holds Tensor, expected a state dict"),
        ({}, "found nothing"),
        ({"state_dict": {}}, "found nothing"),
        ({"epoch": 3, "best": 0.5}, r"no tensors but 'epoch' \(int\), 'best' \(float\)"),
        ({**TENSORS, "epoch": 3}, r"found 2 tensors and, besides them, 'epoch' \(int\)"),
        ({"state_dict": {"a": 1, "b": 2, "c": 3, "d": 4}}, r"'a' \(int\), 'b' \(int\), 'c' \(int\), \.\.\."),
    ],
    ids=["list", "tensor", "empty", "empty state dict", "no tensors", "flat", "numbers"],
)
def test_other_content(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"file.pth: .*{words}"):
        read_checkpoint(saved(tmp_path / "file.pth", content))


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file, expected a weights file"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_file(tmp_path: Path, suffix: str) -> None:
    """Opening a FIFO would wait for ever."""
    folder, fifo = tmp_path / f"folder.{suffix}", tmp_path / f"fifo.{suffix}"
    folder.mkdir()
    os.mkfifo(fifo)
    for path, kind in ((folder, "a folder"), (fifo, "a FIFO")):
        with pytest.raises(ValueError, match=f"is {kind}.*, expected a weights file"):
            read_checkpoint(path)


# ---- names


RULES = ((r"net\.conv(\d)\.(weight|bias)", r"\1.\2"), (r"net\.bn\.(.+)", r"1.\1"), (r"net\..+", "never"))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def theirs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    values = {
        f"net.conv{name}" if name[0] == "0" else f"net.bn{name[1:]}": v for name, v in model().state_dict().items()
    }
    return {
        name: torch.rand_like(value).to(dtype) if value.is_floating_point() else value for name, value in values.items()
    }


def load(into: nn.Module, tensors: dict[str, Tensor], rules: Sequence[tuple[str, str]] = RULES) -> None:
    load_renamed(into, tensors, rules, ("auxiliary_head.", "teacher."), "some.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_all_tensors_find_their_place(dtype: torch.dtype) -> None:
    tensors, loaded = theirs(dtype), model()
    load(loaded, tensors)
    for name, value in loaded.state_dict().items():
        source = name.replace("0.", "net.conv0.").replace("1.", "net.bn.")
        assert torch.equal(value, tensors[source].to(value.dtype))
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_the_model_keeps_nothing_of_the_file() -> None:
    tensors, loaded = theirs(), model()
    load(loaded, tensors)
    before = loaded[0].weight.clone()
    tensors["net.conv0.weight"].zero_()
    assert torch.equal(loaded[0].weight, before)


@pytest.mark.parametrize("counters", [True, False])
def test_counted_batches_may_be_there_or_not(counters: bool) -> None:
    tensors = theirs()
    if counters:
        tensors["net.other.num_batches_tracked"] = torch.tensor(7)
    else:
        del tensors["net.bn.num_batches_tracked"]
    load(model(), tensors)


def test_dropped_parts() -> None:
    load(model(), {**theirs(), "auxiliary_head.conv.weight": torch.ones(3), "teacher.a": torch.ones(2)})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("inf"), torch.float16), (1e300, torch.float64), (-1e300, torch.float64)],
)
def test_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    """Also those that become so in the model's dtype; nothing is loaded then."""
    tensors, loaded = theirs(), model()
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    tensors["net.conv0.bias"] = torch.full_like(tensors["net.conv0.bias"], value, dtype=dtype)
    count = tensors["net.conv0.bias"].numel()
    with pytest.raises(ValueError, match=rf"1 tensors hold values that are NaN or infinite: 0\.bias \({count}\)"):
        load(loaded, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


FAULTS = {
    "8-bit floats": (
        {"net.bn.bias": torch.ones(2).to(torch.float8_e5m2)},
        r"bias is torch\.float8_e5m2, expected torch\.float32",
    ),
    "missing": ({"net.conv0.bias": None}, r"1 missing: 0\.bias"),
    "extra": ({"other.weight": torch.ones(2)}, r"1 unexpected: other\.weight"),
    "extra for a later rule": ({"net.other": torch.ones(2)}, r"1 unexpected: net\.other"),
    "another shape": ({"net.bn.bias": torch.ones(3)}, r"1 of another shape: net\.bn\.bias is 3, expected 2"),
    "a single number": ({"net.bn.bias": torch.tensor(1.0)}, r"net\.bn\.bias is a single number, expected 2"),
    "whole numbers": (
        {"net.bn.bias": torch.ones(2, dtype=torch.long)},
        r"bias is torch\.int64, expected torch\.float32",
    ),
    "twice": ({"net.conv0.bias.": torch.ones(2)}, r"1 given twice: net\.conv0\.bias\. as 0\.bias"),
    "all at once": (
        {"net.conv0.bias": None, "other": torch.ones(2), "net.bn.bias": torch.ones(3)},
        r"1 missing: 0\.bias; 1 unexpected: other; 1 of another shape: net\.bn\.bias is 3, expected 2$",
    ),
    "many": (
        {f"other{i}": torch.ones(2) for i in range(5)},
        r"5 unexpected: other0, other1, other2, \.\.\.$",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str) -> None:
    """Each is named with the file, and nothing of the rest is loaded."""
    change, words = FAULTS[fault]
    tensors = {name: value for name, value in {**theirs(), **change}.items() if value is not None}
    loaded = model()
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    rules = ((r"net\.conv0\.bias\.", "0.bias"), *RULES)
    with pytest.raises(ValueError, match=rf"^some\.pth: does not fit Sequential, nothing is loaded; .*{words}"):
        load(loaded, tensors, rules)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_training_are_taken_off(prefix: str, suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"weights{suffix}", {f"{prefix}a.weight": torch.ones(2), f"{prefix}b": torch.ones(1)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    assert set(read_checkpoint(path).tensors) == {"a.weight", "b"}


def test_an_error_of_the_system_about_the_content_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some damaged archives make torch raise."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(22, "Invalid argument")

    path = saved(tmp_path / "a.pth", {"weight": torch.ones(2)})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=r"a\.pth: not a torch weights file, or cut short"):
        read_checkpoint(path)
