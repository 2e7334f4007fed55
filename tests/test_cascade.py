"""A refiner as the base of another one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from projects import train, write_short_project
from sparserefine import BaseConfig, ExtractorConfig, FrozenBase, RefinerConfig, Selector, SparseRefiner, load_base
from sparserefine.bases import load
from sparserefine.bases.families.unet import UNet
from sparserefine.bases.refined import RefinedModel, refined
from sparserefine.commands.main import main
from sparserefine.files.labels import read_label
from sparserefine.images.resize import resize
from support import engine_of

TINY = RefinerConfig(selector=Selector(budget=200), extractor=ExtractorConfig(planes=(4, 6)))


def noisy(refiner: SparseRefiner) -> SparseRefiner:
    """With weights that do something."""
    with torch.no_grad():
        for parameter in refiner.trained_parameters():
            parameter.normal_(0, 0.5)
    return refiner.eval()


def inner_of(seed: int = 1, config: RefinerConfig = TINY) -> SparseRefiner:
    torch.manual_seed(seed)
    unet = UNet(3, (4, 8))
    torch.nn.init.normal_(unet.head.weight, 0, 100)
    return noisy(SparseRefiner(FrozenBase(unet, 3, BaseConfig(ratio=0.5)), config))


@pytest.fixture
def inner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SparseRefiner:
    """Stored in ``inner``, in the working directory."""
    monkeypatch.chdir(tmp_path)
    refiner = inner_of()
    refiner.save_pretrained("inner")
    return refiner


def outer_of(base: FrozenBase | None = None, engine: str = "torch") -> SparseRefiner:
    torch.manual_seed(2)
    return noisy(SparseRefiner(base or load_base(BaseConfig("refiner:inner", ratio=0.5)), TINY, engine=engine))


def photo(*size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("engine", ["torch", "cpu"])
@torch.no_grad()
def test_a_cascade_equals_its_parts_run_by_hand(inner: SparseRefiner, engine: str) -> None:
    if engine == "cpu":
        engine_of("cpu-generic")
    outer, image = outer_of(engine=engine), photo(37, 50)
    half = SparseRefiner.from_pretrained("inner", engine=engine)(resize(image, (18, 25)) / 255)
    expected = outer.refine(image, half.logits())
    found = outer(image)
    assert 0 < half.density < 1
    assert 0 < found.density < 1
    assert torch.equal(found.coarse.logits, half.logits())
    assert torch.equal(found.sites.coords, expected.sites.coords)
    assert torch.equal(found.logits(), expected.logits())
    assert torch.equal(found.labels(), expected.labels())


@torch.no_grad()
def test_a_stored_cascade_is_the_same(inner: SparseRefiner, tmp_path: Path) -> None:
    outer, image = outer_of(), photo(37, 50)
    outer.save_pretrained("outer")
    expected = outer(image).logits()
    assert torch.equal(SparseRefiner.from_pretrained("outer", engine="torch")(image).logits(), expected)
    (tmp_path / "inner").rename(tmp_path / "outer" / "inner")  # where it is looked up first
    (tmp_path / "outer").rename(tmp_path / "moved")
    assert torch.equal(SparseRefiner.from_pretrained("moved", engine="torch")(image).logits(), expected)


@torch.no_grad()
def test_three_stages(inner: SparseRefiner) -> None:
    outer_of().save_pretrained("outer")
    third = SparseRefiner(load_base(BaseConfig("refiner:outer", ratio=0.5)), TINY)
    noisy(third).save_pretrained("third")
    image = photo(40, 48)
    found = SparseRefiner.from_pretrained("third", engine="torch")
    half = SparseRefiner.from_pretrained("outer", engine="torch")(resize(image, (20, 24)) / 255)
    assert torch.equal(found(image).coarse.logits, half.logits())
    innermost = found.base.model.refiner.base.model.refiner
    assert innermost.engine.name == "torch"
    assert isinstance(innermost.base.model, UNet)


def test_the_refiner_in_the_package_is_a_base() -> None:
    base = load_base(BaseConfig("refiner:demo", ratio=0.5))
    assert base.classes is not None
    assert base.classes.names == ("background", "vessel")
    assert base(photo(64, 64)).shape == (2, 2, 32, 32)


def test_it_runs_on_the_engine_of_the_refiner_that_is_built_on_it(inner: SparseRefiner) -> None:
    base = load_base(BaseConfig("refiner:inner", ratio=0.5))
    for engine in ("torch", "auto"):
        outer_of(base, engine)
        assert base.model.refiner.engine.name == engine
    assert load_base(BaseConfig("refiner:inner", ratio=0.5), engine="torch").model.refiner.engine.name == "torch"


def test_8_bits_only_if_it_was_quantized(inner: SparseRefiner) -> None:
    engine_of("cpu-generic")
    base = load_base(BaseConfig("refiner:inner", ratio=0.5))
    outer_of(base, "cpu-int8")
    assert base.model.refiner.engine.name == "cpu"
    base.model.refiner.quantize([photo(40, 48)])
    outer_of(base, "cpu-int8")
    assert base.model.refiner.engine.name == "cpu-int8"


@torch.no_grad()
def test_operations_are_those_of_the_last_image(inner: SparseRefiner) -> None:
    outer, image = outer_of(), photo(40, 48)
    base = inner.base.macs(20, 24)
    assert base is not None
    assert outer.base.macs(40, 48) is None
    assert outer(image[1:]).macs["base"] == base + sum(inner(resize(image[1:], (20, 24)) / 255).sparse_macs.values())
    found = outer(image).macs["base"]
    both = inner(resize(image, (20, 24)) / 255)
    assert found == pytest.approx(2 * base + sum(both.sparse_macs.values()), abs=1)
    assert outer.base.macs(44, 48) is None


def test_identity_is_of_weights_settings_and_base(inner: SparseRefiner) -> None:
    def identity(refiner: SparseRefiner, ratio: float = 0.5) -> str:
        return FrozenBase(refined(refiner), config=BaseConfig(ratio=ratio)).identity

    here = identity(inner)
    assert load_base(BaseConfig("refiner:inner", ratio=0.5)).identity == here
    assert here.startswith("RefinedModel:")
    other = inner_of()
    assert identity(other) == here
    other.base = FrozenBase(other.base.model, 3, BaseConfig(ratio=0.25))
    different = [
        identity(inner_of(seed=2)),
        identity(inner_of(config=replace(TINY, selector=Selector(budget=100)))),
        identity(inner_of(config=replace(TINY, mean=(0.5, 0.5, 0.5)))),
        identity(other),
        identity(inner, ratio=0.25),
    ]
    assert len({here, *different}) == 6


def test_a_base_that_has_changed_is_refused(inner: SparseRefiner) -> None:
    outer_of().save_pretrained("outer")
    inner_of(seed=5).save_pretrained("inner")
    with pytest.raises(ValueError, match="base refiner:inner has changed since: its identity was RefinedModel:"):
        SparseRefiner.from_pretrained("outer")
    base = load_base(BaseConfig("refiner:inner", ratio=0.5))
    assert SparseRefiner.from_pretrained("outer", base=base).base is base


def test_a_base_that_is_not_there_is_told_with_where_it_is_looked_for(
    inner: SparseRefiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer_of().save_pretrained("outer")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = (
        r"outer.config\.json: base refiner:inner: inner: no such folder.*looked for in the refiner's folder, and then"
    )
    with pytest.raises(FileNotFoundError, match=words):
        SparseRefiner.from_pretrained(tmp_path / "outer")


def renamed_base(folder: Path, name: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["base"]["name"] = name
    values.pop("base_identity", None)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["refiner:outer", "refiner:.", "refiner:../outer", "refiner:inner"])
def test_a_circle_is_refused(inner: SparseRefiner, tmp_path: Path, name: str) -> None:
    outer_of().save_pretrained("outer")
    renamed_base(tmp_path / "outer", name)
    renamed_base(tmp_path / "inner", "refiner:outer")
    with pytest.raises(ValueError, match=r"expected at most 8 refiners, one the base of the other, and none twice"):
        SparseRefiner.from_pretrained("outer")


def test_a_long_chain_is_refused(inner: SparseRefiner, tmp_path: Path) -> None:
    outer_of().save_pretrained("0")
    for number in range(1, 9):
        shutil.copytree("0", str(number))
        renamed_base(tmp_path / str(number), f"refiner:{number - 1}")
    assert isinstance(SparseRefiner.from_pretrained("6").base.model, RefinedModel)  # 0 to 6, and inner
    with pytest.raises(ValueError, match="expected at most 8 refiners"):
        SparseRefiner.from_pretrained("7")


def test_code_in_the_base_of_a_base_must_be_trusted(inner: SparseRefiner, tmp_path: Path) -> None:
    (tmp_path / "cascade_module.py").write_text(
        "import torch\ndef build():\n    torch.manual_seed(0)\n    return torch.nn.Conv2d(3, 3, 1)\n"
    )
    base = load_base(BaseConfig("python:cascade_module:build", ratio=0.5), 3)
    SparseRefiner(base, TINY).save_pretrained("inner")
    with pytest.raises(ValueError, match=r"base python:cascade_module:build: runs code; pass trust_base=True"):
        load_base(BaseConfig("refiner:inner", ratio=0.5))
    trusted = load_base(BaseConfig("refiner:inner", ratio=0.5), trust_base=True)
    outer_of(trusted).save_pretrained("outer")
    with pytest.raises(ValueError, match=r"base python:cascade_module:build: runs code"):
        SparseRefiner.from_pretrained("outer")
    assert SparseRefiner.from_pretrained("outer", trust_base=True).base.identity == trusted.identity
    with pytest.raises(ValueError, match=r"base python:cascade_module:build: runs code"):
        load_base(BaseConfig("python:cascade_module:build", ratio=0.5), 3, trust_base=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, r"base\.mean = \(0\.5, 0\.5, 0\.5\).*normalises pixels itself; leave base\.mean"),
        ({"ratio": 0.5, "class_map": (0, 1)}, "class_map has 2 entries, expected 3"),
    ],
)
def test_settings_that_do_not_suit_a_refiner(inner: SparseRefiner, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_base(BaseConfig("refiner:inner", **{"ratio": 0.5, **settings}))


def test_a_runtime_is_for_the_innermost_base(inner: SparseRefiner) -> None:
    pytest.importorskip("openvino")
    config = BaseConfig("refiner:inner", ratio=0.5, runtime="openvino")
    found, image = load_base(config), photo(40, 48)
    assert found.model.refiner.base.config.runtime == "openvino"
    expected = load_base(replace(config, runtime=None))(image)
    torch.testing.assert_close(found(image), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"runs with torch; load it by name"):
        FrozenBase(refined(inner), config=config)


def test_without_a_reader_a_refiner_is_no_base(inner: SparseRefiner) -> None:
    with pytest.raises(ValueError, match=r"is a refiner; load it with sparserefine\.load_base"):
        load.load_base(BaseConfig("refiner:inner", ratio=0.5))


@pytest.mark.slow
def test_every_command_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train(out="first") == 0
    cascade = ["--base.name", "refiner:first/best", "--base.ratio", "0.5"]
    assert train(*cascade, out="live") == 0
    stored = ["--logits.source", "stored", "--logits.folder", "logits"]
    assert main(["logits", "config.yaml", *cascade, *stored]) == 0
    assert train(*cascade, *stored, out="stored") == 0
    weights = [(tmp_path / out / "best" / "model.safetensors").read_bytes() for out in ("live", "stored")]
    assert weights[0] == weights[1]
    refiner = ["--refiner", "live/best", "--engine", "torch", "--device", "cpu"]
    report = ["--dense", "refiner:first/best", "--dense_ratio", "0.5", "--json", "scores.json"]
    assert main(["evaluate", "config.yaml", *cascade, *refiner, *report]) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert rows["dense"]["dice"] == rows["coarse"]["dice"]
    assert rows["refined"]["gmacs"] > rows["coarse"]["gmacs"] == rows["dense"]["gmacs"] > 0
    assert main(["predict", "data/images/3.png", *refiner, "--out", "masks"]) == 0
    assert read_label(tmp_path / "masks" / "3.png").shape == (76, 88)
    capsys.readouterr()
    assert main(["benchmark", "--bases", "refiner:first/best", "--size", "64x64", "--presets", "slim16"]) == 0
    assert "left out" not in capsys.readouterr().err
