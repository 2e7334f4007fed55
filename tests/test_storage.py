"""A refiner on disk: read back as it was, interrupted at every rename, damaged in every way."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparserefine import storage
from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.files.whole import NEXT
from sparserefine.images.classes import Classes
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.ensembler import EnsemblerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.selector import Selector
from support import assert_close

K = 3
FILES = ["base.safetensors", "config.json", "model.safetensors"]
OLD_FORMAT = Path(__file__).parent / "data" / "refiner_0_1_0"


def base_of(config: BaseConfig | None = None, num_classes: int = K) -> FrozenBase:
    return FrozenBase(UNet(num_classes, (4, 8)), num_classes, config or BaseConfig(ratio=0.5))


def refiner_of(base: FrozenBase | None = None) -> SparseRefiner:
    """In evaluation mode, its ensembler not the plain blend that it starts as."""
    config = RefinerConfig(selector=Selector(0.0, 30), extractor=ExtractorConfig((4, 6), blocks=1))
    refiner = SparseRefiner(base or base_of(), config).eval()
    with torch.no_grad():
        for parameter in refiner.ensembler.parameters():
            parameter.normal_(std=0.3)
    return refiner


def pixels(batch: int = 1, size: tuple[int, int] = (9, 14)) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[SparseRefiner, Path]:
    """A refiner with nothing left at its default, and the folder that it was stored in, with its base."""
    folder = tmp_path / "refiner"
    base = base_of(BaseConfig("unet:base.safetensors", size=(6, 7), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)))
    save_unet(base.model, folder / "base.safetensors")
    refiner = SparseRefiner(
        base,
        RefinerConfig(
            selector=Selector(0.01, 40),
            extractor=ExtractorConfig((4, 6, 8), 2, "paper", ("rgb", "coords", "entropy")),
            ensembler=EnsemblerConfig(fuser="paper"),
            upsampling="nearest",
            mean=(0.1, 0.2, 0.3),
            std=(0.5, 0.6, 0.7),
        ),
        classes=Classes(("void", "road", "sky"), ((1, 2, 3), (4, 5, 6), (7, 8, 255))),
    )
    refiner.train()(pixels(2))  # moves the running statistics
    refiner.eval().save_pretrained(folder)
    return refiner, folder


def test_read_back_exactly(stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    found = SparseRefiner.from_pretrained(folder)
    assert not found.training
    assert found.classes == refiner.classes
    assert found.config == refiner.config
    assert found.base.config == refiner.base.config
    assert found.base.identity == refiner.base.identity
    state = found.state_dict()
    assert all(torch.equal(state[name], value) for name, value in refiner.state_dict().items())
    image = pixels(2, (11, 13))
    assert torch.equal(found(image).logits(), refiner(image).logits())
    assert sorted(p.name for p in folder.iterdir()) == ["base.safetensors", "config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_read_back_from_half_precision(dtype: torch.dtype, stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    full = (folder / "model.safetensors").stat().st_size
    refiner.save_pretrained(folder, dtype=dtype)
    assert (folder / "model.safetensors").stat().st_size < 0.75 * full
    # The same base: a rounded one selects other sites.
    found = SparseRefiner.from_pretrained(folder, base=refiner.base)
    assert all(p.dtype == torch.float32 for p in found.trained_parameters())
    image = pixels(2, (11, 13))
    assert_close(found(image).refined_logits, refiner(image).refined_logits, dtype)


def test_base_may_be_given(stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    (folder / "base.safetensors").unlink()
    found = SparseRefiner.from_pretrained(str(folder), base=refiner.base)
    image = pixels()
    assert torch.equal(found(image).logits(), refiner(image).logits())
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors"):
        SparseRefiner.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"config\.json: 3 classes, the base given has 4"):
        SparseRefiner.from_pretrained(folder, base=base_of(num_classes=4))


def test_storing_again_replaces(stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    other = refiner_of(base=refiner.base)
    other.save_pretrained(folder)
    image = pixels()
    assert torch.equal(SparseRefiner.from_pretrained(folder)(image).logits(), other(image).logits())


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, save: Callable[[], None]) -> bool:
    """Whether saving was killed just before the ``step``-th time that it renames or removes a name."""
    steps = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                raise Killed
            return method(*arguments)

        return call

    with monkeypatch.context() as patched:
        for name in ("replace", "rename", "rmdir"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        try:
            save()
        except Killed:
            return True
    return False


def same(found: SparseRefiner, expected: SparseRefiner) -> bool:
    """The same weights, base included, to the bit."""
    state, wanted = found.state_dict(), expected.state_dict()
    return state.keys() == wanted.keys() and all(torch.equal(state[k].float(), v.float()) for k, v in wanted.items())


@pytest.mark.parametrize("before", ["refiner", "refiner of 0.1.0"])
def test_killed_at_any_rename_it_is_the_old_or_the_new(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and base, which differ too, are of the same one."""
    new, step, found = refiner_of(), 0, []
    while True:
        step += 1
        folder = tmp_path / str(step)
        if before == "refiner":
            refiner_of().save_pretrained(folder)
        else:
            shutil.copytree(OLD_FORMAT, folder)
        old = SparseRefiner.from_pretrained(folder)
        if not killed_at(monkeypatch, step, lambda folder=folder: new.save_pretrained(folder)):
            break
        got = SparseRefiner.from_pretrained(folder)
        found.append("new" if same(got, new) else "old" if same(got, old) else "mixed")
        other = refiner_of(base=got.base)
        if got.config == other.config:
            other.load_weights(folder)
            assert same(other, got)
        third = refiner_of()
        third.save_pretrained(folder)
        assert same(SparseRefiner.from_pretrained(folder), third)
        assert sorted(p.name for p in folder.iterdir() if p.name != "expected.safetensors") == FILES
    assert len(found) >= 5
    assert found == sorted(found, reverse=True)  # first the old one, then the new one
    assert set(found) == {"old", "new"}


def test_killed_first_saving_is_nothing_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, step, found = refiner_of(), 0, []
    while killed_at(monkeypatch, step := step + 1, lambda: new.save_pretrained(tmp_path / str(step))):
        try:
            found.append(same(SparseRefiner.from_pretrained(tmp_path / str(step)), new))
        except ValueError as error:
            assert "no config.json in it" in str(error)  # noqa: PT017 (either is right)
            found.append(None)
    assert found[0] is None
    assert found[1:] == [True] * 4


def test_what_is_left_of_a_killed_saving_does_not_count_once_the_folder_is_whole(
    stored: tuple[SparseRefiner, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when files were copied there, or an older version saved after the kill."""
    folder, good, other = tmp_path / "a", stored[1], refiner_of()
    assert killed_at(monkeypatch, 2, lambda: other.save_pretrained(folder))
    assert same(SparseRefiner.from_pretrained(folder), other)
    for name in FILES:
        shutil.copy(good / name, folder / name)
    assert same(SparseRefiner.from_pretrained(folder), stored[0])
    (folder / NEXT / "config.json").write_text("{")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a/model\.safetensors: missing, or not the file"):
        SparseRefiner.from_pretrained(folder)


def test_a_refiner_that_is_stored_again_while_it_is_read_is_the_new_one(
    stored: tuple[SparseRefiner, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``best/`` of a run that goes on."""
    _, folder = stored
    new, read, saved = refiner_of(), storage.read_json, []

    def read_json(path: Path) -> dict[str, Any]:
        values = read(path)
        if not saved:
            saved.append(path)
            new.save_pretrained(folder)
        return values

    monkeypatch.setattr(storage, "read_json", read_json)
    assert same(SparseRefiner.from_pretrained(folder), new)


def test_a_failed_save_leaves_the_former_refiner(
    stored: tuple[SparseRefiner, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner, folder = stored

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as broken:
        broken.setattr("sparserefine.files.tensors.save_file", full)
        with pytest.raises(OSError, match=r"cannot be written \(.*No space left on device.*free space"):
            refiner_of().save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert same(SparseRefiner.from_pretrained(folder), refiner)


def test_a_base_of_another_refiner_is_refused(stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    save_unet(UNet(K, (4, 8)), folder / "base.safetensors")
    with pytest.raises(ValueError, match=r"base\.safetensors: not the file that config\.json was written with"):
        SparseRefiner.from_pretrained(folder)
    assert SparseRefiner.from_pretrained(folder, base=refiner.base).base is refiner.base


def test_an_empty_name_is_not_the_current_folder(
    stored: tuple[SparseRefiner, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored[1])
    assert same(SparseRefiner.from_pretrained("."), stored[0])
    with pytest.raises(ValueError, match="is empty"):
        SparseRefiner.from_pretrained("")
    with pytest.raises(ValueError, match="is empty"):
        stored[0].save_pretrained("")


def test_a_base_of_ones_own_needs_no_stored_base(stored: tuple[SparseRefiner, Path]) -> None:
    """So a base that this version cannot read is no obstacle."""
    refiner, folder = stored
    changed(base__name="hologram:x", base__depth=3)(folder)
    assert SparseRefiner.from_pretrained(folder, base=refiner.base).base is refiner.base
    with pytest.raises(ValueError, match=r"config\.json: base: unknown key 'depth'"):
        SparseRefiner.from_pretrained(folder)


def changed(**changes: Any) -> Callable[[Path], None]:
    """Changes entries of config.json; a dotted one lies inside another."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            place, _, inner = key.rpartition("__")
            (config[place] if place else config)[inner] = value
        path.write_text(json.dumps(config))

    return change


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        place, _, inner = key.partition("__")
        del (config[place] if inner else config)[inner or place]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


DAMAGE = {
    "no configuration": (lambda f: (f / "config.json").unlink(), r"no config\.json in it"),
    "empty configuration": (lambda f: (f / "config.json").write_text(""), "not readable as JSON"),
    "binary configuration": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not readable as JSON"),
    "cut configuration": (lambda f: (f / "config.json").write_text('{"format_version": 1'), "not readable as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "holds list, expected an object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: missing"),
    "a flipped bit": (flip_a_byte, r"model\.safetensors: missing, or not the file"),
    "newer format": (changed(format_version=2), "format_version 2, this sparserefine reads 1"),
    "no format": (without("format_version"), "format_version None"),
    "unknown key": (changed(colour="red"), "missing or unknown: colour"),
    "missing key": (without("selector"), "missing or unknown: selector"),
    "unknown key inside": (changed(selector__rate=3), "selector: unknown key 'rate', expected threshold, budget"),
    "bad value inside": (changed(selector__threshold=-1), "selector: threshold = -1"),
    "wrong type inside": (
        changed(selector__threshold="high"),
        "selector.threshold = 'high', expected a finite number or",
    ),
    "not an object inside": (changed(selector=5), "selector = 5, expected an object"),
    "another shape": (changed(extractor__planes=[4, 6, 9]), "does not fit"),
    "another depth": (changed(extractor__planes=[4, 6]), "unexpected"),
    "more blocks": (changed(extractor__blocks=3), "missing"),
    "unknown down-sampling": (changed(extractor__down="mean"), "extractor.down = 'mean', expected 'paper' or 'cell'"),
    "planes not whole": (
        changed(extractor__planes=[4.5, 6, 8]),
        r"extractor.planes\[0\] = 4.5, expected a whole",
    ),
    "blocks not whole": (changed(extractor__blocks=1.5), "extractor.blocks = 1.5, expected a whole number"),
    "a threshold too high": (changed(selector__threshold=1.2), "selector: threshold = 1.2 nats would select nothing"),
    "unknown upsampling": (changed(upsampling="bicubic"), "upsampling = 'bicubic', expected 'bilinear' or 'nearest'"),
    "no base": (changed(base__name=""), "names no base .*base=FrozenBase"),
    "unknown base": (changed(base__name="resnet:x"), "'resnet:x' is not known"),
    "base runs code": (changed(base__name="python:os:getcwd"), "pass trust_base=True"),
    "base not an object": (changed(base=None), "base = None, expected an object"),
    "fewer classes": (changed(classes=["a", "b"]), "2 class names, 3 colours"),
    "classes not a list": (changed(classes=None), "classes"),
    "mean not a list": (changed(mean=None), "mean = None, expected a list"),
    "mean of two channels": (changed(mean=[0.1, 0.2]), r"mean = \(0.1, 0.2\), .* expected a number for each channel"),
    "std of zero": (changed(std=[0.1, 0.0, 0.2]), "refiner.std = "),
    "mean not finite": (changed(mean=[0.1, math.nan, 0.3]), "NaN is no finite number"),
    "mean of a digit too many": (changed(mean=[0.1, 10**400, 0.3]), "is beyond 64 bits"),
    "std too small for float32": (changed(std=[0.1, 1e-300, 0.3]), "std above 0"),
    "std a truth value": (changed(std=[0.1, True, 0.3]), r"std\[1\] = True, expected a finite number"),
    "threshold not finite": (changed(selector__threshold=math.nan), "NaN is no finite number"),
    "threshold infinite": (changed(selector__threshold=math.inf), "Infinity is no finite number"),
    "budget a truth value": (changed(selector__budget=True), "selector.budget = True, expected a whole number or null"),
    "budget a text": (changed(selector__budget="9"), "selector.budget = '9', expected a whole number or null"),
    "budget beyond int32": (changed(selector__budget=2**31), "selector: budget = 2147483648 sites"),
    "missing key inside": (without("selector__budget"), "selector: key 'budget' is missing"),
    "planes not a list": (changed(extractor__planes="468"), "extractor.planes = '468', expected a list"),
    "no planes": (changed(extractor__planes=[]), r"extractor: planes = \(\)"),
    "planes that no memory holds": (changed(extractor__planes=[4, 10**9]), r"extractor: planes = \(4, 1000000000\)"),
    "planes of 40 levels": (changed(extractor__planes=[4] * 40), "extractor: planes = .* at most 16 levels"),
    "too many weights": (changed(extractor__planes=[60000, 4]), "extractor: .*about 3e.11 weights, expected at most"),
    "weights that the file has not": (changed(extractor__planes=[4, 6, 2500]), r"does not fit .*expected \[.*2500"),
    "blocks beyond reason": (changed(extractor__blocks=10**6), "extractor: blocks = 1000000"),
    "a feature twice": (changed(extractor__features=["rgb", "rgb"]), "extractor: features = .*each once"),
    "an ensembler in a list": (changed(ensembler=[["name", "mean"]]), "ensembler = .*expected an object"),
    "a number as ensembler": (changed(ensembler__name=3), "ensembler.name = 3, expected 'gated' or"),
    "class names that are numbers": (changed(classes=["a", 2, "c"]), r"classes\[1\] = 2, expected a text"),
    "one class": (changed(classes=["a"], palette=[[0, 0, 0]]), "classes: 1 names, expected 2 to 32767"),
    "too many classes": (changed(classes=["a"] * 40_000), "classes: 40000 names, expected 2 to 32767"),
    "colours of two values": (
        changed(palette=[[1, 2], [1, 2], [1, 2]]),
        r"palette\[0\] = \[1, 2\], expected a list of",
    ),
    "colours beyond a byte": (changed(palette=[[0, 0, 0], [0, 0, 256], [1, 1, 1]]), r"palette: \[0, 0, 256\]"),
    "size of one value": (changed(base__size=[5]), r"base.size = \[5\], expected a list of 2"),
    "size of nothing": (changed(base__size=[0, 5]), r"base: base.size = \(0, 5\)"),
    "size that no memory holds": (
        changed(base__size=[100_000, 100_000]),
        "base: base.size = .*at most 268435456",
    ),
    "ratio a text": (
        changed(base__size=None, base__ratio="0.5"),
        "base.ratio = '0.5', expected a finite",
    ),
    "ratio not a number": (
        changed(base__size=None, base__ratio=math.nan),
        "NaN is no finite number",
    ),
    "class map beyond labels": (
        changed(base__class_map=[0, 1, 10**12]),
        "base.class_map has 3 entries up to 10+,",
    ),
    "class map of fractions": (
        changed(base__class_map=[0, 1.5]),
        r"base.class_map\[1\] = 1.5, expected a whole",
    ),
    "nothing but brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), "not readable as JSON"),
    "a number of many digits": (lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), "not readable"),
    "a FIFO as configuration": (lambda f: as_fifo(f / "config.json"), r"no config\.json in it"),
    "a FIFO as weights": (lambda f: as_fifo(f / "model.safetensors"), r"model\.safetensors: missing"),
    "a FIFO as base": (lambda f: as_fifo(f / "base.safetensors"), r"base\.safetensors: is a FIFO"),
    "a key that is no line": (changed(**{"a\x1b[2J\n": 1}), r"missing or unknown: a\\x1b\[2J\\n$"),
    "version a truth value": (changed(format_version=True), "format_version True"),
}
"""What is changed in the folder, and what the message says."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder(damage: str, stored: tuple[SparseRefiner, Path]) -> None:
    folder = stored[1]
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(ValueError, match=words) as error:
        SparseRefiner.from_pretrained(folder)
    named = ("config.json", "model.safetensors", "base.safetensors", "resnet:x", "python:os:getcwd")
    assert any(name in str(error.value) for name in named), f"says not where: {error.value}"
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/no/where/at/all", "~/nowhere", Path("user/refiner")], ids=str
)
def test_missing_folder(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SparseRefiner.from_pretrained(name)


def test_hub_id_without_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"user/refiner: no such folder.*pip install huggingface_hub"):
        SparseRefiner.from_pretrained("user/refiner")


# ---- values


@pytest.mark.parametrize("part", ["refiner", "base"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_stored(part: str, bad: float, stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        (refiner.extractor.head if part == "refiner" else refiner.base.model.head).bias[0] = bad
    with pytest.raises(ValueError, match=r"1 of 3 values of (extractor\.)?head\.bias are NaN or infinite"):
        refiner.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_out_of_the_range_of_half_precision_are_not_stored(stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    with torch.no_grad():
        refiner.extractor.head.bias[0] = 1e5
    refiner.save_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"in torch\.float16: 1 of 3 values of extractor\.head\.bias are .* infinite"):
        refiner.save_pretrained(folder, dtype=torch.float16)
    for dtype in (torch.float64, torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"dtype = {dtype}, expected torch.float32"):
            refiner.save_pretrained(folder, dtype=dtype)


def rewritten(name: str, change: Callable[[Tensor], Tensor], file: str = "model.safetensors") -> Callable[[Path], None]:
    """Changes one tensor of a stored refiner, with a digest that fits."""

    def apply(folder: Path) -> None:
        path = folder / file
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(path)
        tensors[name] = change(tensors[name])
        save_file(tensors, path, metadata=metadata)
        key = {"model.safetensors": "weights_sha256", "base.safetensors": "base_sha256"}[file]
        changed(**{key: hashlib.sha256(path.read_bytes()).hexdigest()})(folder)

    return apply


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


FOREIGN = {
    "NaN": (rewritten("extractor.head.bias", with_value(math.nan)), r"1 of 3 values of extractor\.head\.bias"),
    "infinite": (rewritten("ensembler.gate.0.weight", with_value(-math.inf)), r"1 of 512 values of ensembler\.gate\.0"),
    "NaN in a buffer": (rewritten("extractor.head_norm.running_mean", with_value(math.nan)), "head_norm.running_mean"),
    "negative variance": (rewritten("extractor.head_norm.running_var", with_value(-1.0)), "has negative variances"),
    "integers": (
        rewritten("extractor.head.bias", Tensor.int),
        r"head\.bias is torch\.int32, expected float32",
    ),
    "float64": (rewritten("extractor.head.bias", Tensor.double), r"is torch\.float64, expected float32, float16 or"),
    "float8": (
        rewritten("extractor.head.bias", lambda t: t.to(torch.float8_e4m3fn)),
        r"is torch\.float8_e4m3fn, expected float32, float16 or bfloat16",
    ),
    "complex": (rewritten("extractor.head.bias", lambda t: t.to(torch.complex64)), r"is torch\.complex64, expected"),
    "a counter of floats": (
        rewritten("extractor.head_norm.num_batches_tracked", Tensor.float),
        r"num_batches_tracked is torch\.float32, expected torch\.int64",
    ),
    "another shape": (rewritten("extractor.head.bias", lambda t: t[:2]), r"head\.bias is \[2\], expected \[3\]"),
    "NaN in the base": (
        rewritten("head.bias", with_value(math.nan), "base.safetensors"),
        r"1 of 3 values of head\.bias are NaN or infinite",
    ),
    "integers in the base": (
        rewritten("head.bias", Tensor.int, "base.safetensors"),
        r"head\.bias is torch\.int32",
    ),
}
"""Weights whose digest fits and that are no weights."""


@pytest.mark.parametrize("case", FOREIGN)
def test_weights_that_are_none_are_refused(case: str, stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    change, words = FOREIGN[case]
    try:
        change(folder)
    except KeyError as error:
        pytest.skip(f"this version of safetensors cannot write {error}")
    with pytest.raises(ValueError, match=rf"safetensors: .*{words}"):
        SparseRefiner.from_pretrained(folder)
    if "base" not in case:
        before = {name: value.clone() for name, value in refiner.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            refiner.load_weights(folder)
        assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items())


def test_ranges_for_8_bits_must_fit_their_layer(stored: tuple[SparseRefiner, Path]) -> None:
    refiner, folder = stored
    refiner.quantize([pixels()])
    refiner.save_pretrained(folder)
    assert same(SparseRefiner.from_pretrained(folder), refiner)
    rewritten("extractor.descend.0.0.conv2.input_max", lambda t: t[:1])(folder)
    with pytest.raises(ValueError, match=r"conv2\.input_max is \[1\], expected \[4\]"):
        SparseRefiner.from_pretrained(folder)


def test_a_configuration_larger_than_its_weights_takes_no_memory(
    stored: tuple[SparseRefiner, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(extractor__planes=[4, 6, 2000])(stored[1])
    build, devices = ExtractorConfig.build, []

    def noted(config: ExtractorConfig, *counts: int) -> Any:
        network = build(config, *counts)
        devices.extend(parameter.device.type for parameter in network.parameters())
        return network

    monkeypatch.setattr(ExtractorConfig, "build", noted)
    with pytest.raises(ValueError, match="does not fit"):
        SparseRefiner.from_pretrained(stored[1])
    assert set(devices) == {"meta"}


def test_no_random_numbers_are_spent_on_nothing(stored: tuple[SparseRefiner, Path]) -> None:
    """Loading a refiner draws as many numbers as making one."""
    refiner, folder = stored
    torch.manual_seed(0)
    SparseRefiner(refiner.base, refiner.config)
    expected = torch.rand(1)
    torch.manual_seed(0)
    SparseRefiner.from_pretrained(folder, base=refiner.base)
    assert torch.equal(torch.rand(1), expected)
