"""Pixels without data are never selected, and count in no loss and no score: in training and wherever it is judged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from torch import Tensor

from projects import write_project
from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.commands.main import main
from sparserefine.data.batches import CropBatch
from sparserefine.data.crops import AugmentConfig, CropDataset, Uniform, Whole, random_crop
from sparserefine.data.focus import with_data
from sparserefine.data.readers.config import DataConfig
from sparserefine.data.readers.dataset import Dataset, Example, Sample
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.images import read_image, write_png
from sparserefine.images.classes import IGNORE, Classes
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.loading import load_base
from sparserefine.refiner import SparseRefiner
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.refinement import Refinement
from sparserefine.stages.selector import Selector
from sparserefine.studies.assess import assess
from sparserefine.studies.data_preview import preview
from sparserefine.studies.evaluate import evaluate
from sparserefine.training.checks import warn_if_vain
from sparserefine.training.config import Config, TrainingConfig
from sparserefine.training.items import WholeImage, WholeImages
from sparserefine.training.module import RefinerModule
from sparserefine.training.record import RunRecord

CPU = torch.device("cpu")
SIZE = (48, 64)
BLOCK = slice(10, 30), slice(5, 41)
"""Rows and columns without data."""


def image_label_valid() -> tuple[Tensor, Tensor, Tensor]:
    """Black where there is no data, and nowhere else."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(100, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
    label = torch.randint(0, 2, SIZE, generator=generator, dtype=torch.uint8)
    valid = torch.ones(SIZE, dtype=torch.bool)
    valid[BLOCK] = False
    return image * valid, torch.where(valid, label, IGNORE), valid


def uncertain(x: Tensor) -> Tensor:
    """Logits of a base that knows nothing anywhere."""
    return torch.zeros(len(x), 2, *x.shape[2:])


def black_is_one(x: Tensor) -> Tensor:
    """Logits of a model that differs from :func:`uncertain` only where there is no data: else it says class 0 too."""
    z = torch.where((x == 0).all(1, keepdim=True), 9.0, -9.0)
    return torch.cat([torch.zeros_like(z), z], 1)


def refiner_of(model: Any = uncertain, ratio: float = 0.5) -> SparseRefiner:
    torch.manual_seed(0)
    base = FrozenBase(model, 2, BaseConfig(ratio=ratio))
    return SparseRefiner(base, RefinerConfig(selector=Selector(0.1), extractor=ExtractorConfig((4, 8)))).eval()


def dense_of(model: Any) -> FrozenBase:
    return FrozenBase(model, 2, BaseConfig(ratio=1.0, mean=(0.0,) * 3, std=(1.0,) * 3))


# ---- data sets


def block_file(folder: Path) -> Dataset:
    image, label, _ = image_label_valid()
    label[BLOCK] = 1
    write_png(folder / "a.png", image)
    write_png(folder / "label.png", label)
    samples = (Sample("a", folder / "a.png", folder / "label.png"), Sample("b", folder / "a.png"))
    return Dataset(samples, Classes.numbered(2), images=ImageConfig(nodata=0))


def test_an_example_tells_where_it_has_data(tmp_path: Path) -> None:
    data, (_, label, valid) = block_file(tmp_path), image_label_valid()
    for index, truth in enumerate((label, torch.full(SIZE, IGNORE))):
        example = data.example(index)
        assert torch.equal(cast(Tensor, example.valid), valid)
        assert torch.equal(example.label, truth)
        assert all(map(torch.equal, data.read(index), example[:2]))
    everywhere = Dataset(data.samples, data.classes)
    assert everywhere.example(0).valid is None


# ---- crops


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.5), (1.7, 1.7), (0.5, 2.0)])
def test_a_crop_selects_all_but_padding_and_what_has_no_data(scale: tuple[float, float]) -> None:
    image, label, valid = image_label_valid()
    config = AugmentConfig((60, 40), scale, 1.0, flip=True, flip_vertical=True)
    refiner = refiner_of().train()
    for seed in range(6):
        crop = random_crop(Whole(image, label, torch.zeros(2, 12, 16), valid=valid), config, Uniform(seed))
        batch = CropBatch.of([crop], config.crop, CPU)
        result = refiner.refine(batch.image, batch.logits, windows=batch.parts, valid=batch.valid)
        assert torch.equal(result.sites.mask(), batch.label != IGNORE)  # labels are ignored there and nowhere else
        inside = batch.valid[0, : crop.size[0], : crop.size[1]]
        assert (~inside).any() == (~cast(Tensor, crop.valid)).any()


def test_a_batch_mixes_crops_with_and_without_such_pixels() -> None:
    image, label, valid = image_label_valid()
    config = AugmentConfig(SIZE, (1.0, 1.0), 1.0, flip=False)
    wholes = (Whole(image, label, torch.zeros(2, 12, 16), valid=there) for there in (valid, None))
    batch = CropBatch.of([random_crop(whole, config, Uniform(0)) for whole in wholes], SIZE, CPU)
    assert torch.equal(batch.valid, torch.stack([valid, torch.ones_like(valid)]))


def test_a_teacher_has_something_to_teach_in_each_crop() -> None:
    """A crop without any data is drawn again, as one without labels is."""
    valid = torch.zeros(40, 400, dtype=torch.bool)
    valid[:, 200:] = True
    whole = Whole(
        torch.zeros(3, 40, 400, dtype=torch.uint8),
        torch.full((40, 400), IGNORE, dtype=torch.uint8),
        torch.zeros(2, 10, 100),
        teacher=SoftLabels.of(torch.zeros(2, 40, 400), "logits"),
        valid=valid,
    )
    config = AugmentConfig((40, 40), (1.0, 1.0))
    crops = [random_crop(whole, config, Uniform(seed)) for seed in range(20)]
    assert all(cast(Tensor, crop.valid).any() for crop in crops)


def test_no_crop_is_drawn_around_what_has_no_data(tmp_path: Path) -> None:
    valid = image_label_valid()[2]
    coarse = torch.zeros(2, 12, 16)
    kept = with_data(torch.arange(12 * 16, dtype=torch.int32), coarse, valid)
    some = torch.stack([part.any() for row in valid.split(4) for part in row.split(4, 1)])
    assert kept.dtype == torch.int32
    assert torch.equal(kept.long(), some.nonzero()[:, 0])
    seen: list[int] = []
    data = block_file(tmp_path)
    focus = torch.arange(12 * 16, dtype=torch.int32)
    crops = CropDataset(data, lambda *_: coarse, AugmentConfig((16, 16), focus=1.0), 0, 1.0, focus=lambda _: focus)
    for index in range(2):
        crops[index]
        seen.append(len(cast(Tensor, crops._cache[index].focus)))
    assert seen == [int(some.sum())] * 2


def test_the_cache_counts_all_that_it_holds() -> None:
    image, label, valid = image_label_valid()
    without = Whole(image, label, torch.zeros(2, 12, 16))
    assert Whole(image, label, torch.zeros(2, 12, 16), valid=valid).nbytes == without.nbytes + 48 * 64


# ---- training


def module_of(folder: Path, **training: Any) -> RefinerModule:
    options = {"pictures": 0, "targets": "both", "dice": 0.5, "deep_supervision": 0.5}
    config = Config(
        data=DataConfig("folder", str(folder)),
        base=BaseConfig("unet:base.safetensors", ratio=0.25),
        out=str(folder),
        extractor=ExtractorConfig((4, 8)),
        training=TrainingConfig(**(options | training)),
    )
    return RefinerModule(refiner_of(), config, RunRecord(folder))


def learnt(module: RefinerModule, image: Tensor, label: Tensor, valid: Tensor, taught: Tensor) -> tuple[float, int]:
    """The loss of one crop, and the number of sites that have a target."""
    torch.manual_seed(0)
    whole = Whole(image, label, torch.zeros(2, 12, 16), teacher=SoftLabels.of(taught, "logits"), valid=valid)
    config = AugmentConfig(SIZE, (1.0, 1.0), 1.0, photometric=False)
    batch = CropBatch.of([random_crop(whole, config, Uniform(1))], SIZE, CPU)
    module.refiner.train()
    assert module._deep is not None
    with module._deep.watching():
        result = module.refiner.refine(batch.image, batch.logits, windows=batch.parts, valid=batch.valid)
    loss, has_target = module._loss(result, result.sites.gather(batch.label[:, None])[:, 0], batch)
    return float(loss.detach()), int(has_target.sum())


@pytest.mark.parametrize("targets", ["both", "teacher"])
def test_what_a_teacher_says_where_there_is_no_data_is_no_loss(targets: str, tmp_path: Path) -> None:
    weight = {"boundary_weight": 1.0} if targets == "both" else {}
    module, (image, label, valid) = module_of(tmp_path, targets=targets, **weight), image_label_valid()
    taught = torch.randn(2, *SIZE)
    other = taught.clone()
    other[:, BLOCK[0], BLOCK[1]] *= -7
    loss, sites = learnt(module, image, label, valid, taught)
    assert sites == int(valid.sum())
    assert learnt(module, image, label, valid, other) == (loss, sites)
    nowhere = torch.zeros_like(valid)
    assert learnt(module, image, torch.full_like(label, IGNORE), nowhere, taught) == (0, 0)


def watched(refiner: SparseRefiner, monkeypatch: pytest.MonkeyPatch) -> list[Refinement]:
    """The results of all further calls of ``refiner.refine``."""
    seen: list[Refinement] = []
    refine = refiner.refine

    def watch(*given: Any, **named: Any) -> Refinement:
        seen.append(refine(*given, **named))
        return seen[-1]

    monkeypatch.setattr(refiner, "refine", watch)
    return seen


def test_validation_scores_what_has_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (image, label, valid) = module_of(tmp_path), image_label_valid()
    seen = watched(module.refiner, monkeypatch)
    soft = SoftLabels.of(black_is_one(image[None].float())[0], "logits")
    module.validation_step(WholeImage("a", image, label, torch.zeros(2, 12, 16), soft, valid), 0)
    assert torch.equal(seen[0].sites.mask()[0], valid)
    assert {int(counts.matrix.sum()) for counts in module._counts.values()} == {int(valid.sum())}
    assert float(module._counts["agreement_coarse"].accuracy()) == 1


def test_a_base_that_is_uncertain_only_where_there_is_no_data_teaches_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    image, label, valid = image_label_valid()
    logits = torch.zeros(2, *SIZE)
    logits[0, valid] = 20
    soft = SoftLabels.of(logits, "logits")

    class Split(list[WholeImage]):
        teacher, data = soft, SimpleNamespace(labelled=False)

    def warned(valid: Tensor | None) -> bool:
        caplog.clear()
        split = cast(WholeImages, Split([WholeImage("a", image, label, logits, soft, valid)]))
        warn_if_vain(refiner_of(), split, split, CPU)
        return "no pixel is selected" in caplog.text

    with caplog.at_level(logging.WARNING):
        assert warned(valid)
        assert not warned(None)


# ---- studies


@pytest.mark.parametrize("labelled", [True, False])
def test_evaluate_neither_refines_nor_scores_what_has_no_data(labelled: bool) -> None:
    image, label, valid = image_label_valid()
    wrong = torch.where(valid, label if labelled else IGNORE, 1 if labelled else IGNORE)
    dense = dense_of(black_is_one)
    seen: list[Tensor] = []

    def look(result: Refinement, maps: dict[str, Tensor]) -> None:
        seen.append(result.sites.mask()[0])

    result = evaluate(refiner_of(), [(image, wrong, valid)], dense=dense, boundary_px=2, seen=look)
    assert torch.equal(seen[0], valid)
    assert result.agreement is not None
    assert result.agreement["coarse"]["accuracy"] == 1  # they differ where there is no data only
    assert result.differences_selected == 0
    control = evaluate(refiner_of(), [(image, wrong)], dense=dense, boundary_px=2)
    assert control.density == 1
    assert control.differences_selected == 1
    if labelled:
        of_class_0 = float((label[valid] == 0).float().mean())
        assert result.rows["coarse"]["accuracy"] == pytest.approx(of_class_0)
        assert result.rows["oracle"]["accuracy"] == result.errors_selected == 1


def test_an_image_without_any_data_adds_nothing() -> None:
    image, label, valid = image_label_valid()
    dense = dense_of(black_is_one)
    examples = [Example(image, label, valid), Example(image, label, torch.zeros_like(valid))]
    both, first = (evaluate(refiner_of(), part, dense=dense, boundary_px=2) for part in (examples, examples[:1]))
    for name, row in first.rows.items():
        assert both.rows[name]["accuracy"] == row["accuracy"]
    assert both.agreement is not None
    assert both.agreement["coarse"]["accuracy"] == 1
    assert both.density == first.density / 2


def bright_or_black(x: Tensor) -> Tensor:
    """Logits of a model that finds class 1 in the brighter half, and where there is no data."""
    mean = x.mean(1, keepdim=True)
    z = torch.where((mean > BRIGHT / 255) | (mean == 0), 9.0, -9.0)
    return torch.cat([torch.zeros_like(z), z], 1)


BRIGHT = 178.5


@pytest.mark.parametrize("labelled", [True, False])
def test_assess_neither_refines_nor_scores_what_has_no_data(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _, valid = image_label_valid()
    dense = dense_of(bright_or_black)
    truth = (image.float().mean(0) > BRIGHT).byte()  # the dense model is wrong where there is no data, and only there
    label = truth if labelled else torch.full_like(truth, IGNORE)
    refiner = refiner_of()
    seen = watched(refiner, monkeypatch)
    result = assess(refiner, [("a", image, label, valid)], dense)
    share = float(valid.float().mean())
    assert [rung.density for rung in result.rungs] == pytest.approx([share] * len(result.rungs))
    assert all(torch.equal(one.sites.mask()[0], valid) for one in seen)
    assert seen
    assert result.dense.score == 1
    if labelled:
        assert assess(refiner_of(), [("a", image, label)], dense).dense.score < 1


# ---- commands


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The upper quarter of each image has no data."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in sorted((tmp_path / "data" / "images").iterdir()):
        image = read_image(path).clamp_min(1)
        image[:, : image.shape[1] // 4] = 0
        write_png(path, image)
    config = yaml.safe_load(Path("config.yaml").read_text())
    config |= {"images": {"nodata": 0}, "logits": {"source": "live"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_check_tells_the_share_without_data(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(project / "data" / "images" / "3.png", torch.zeros(3, 76, 88, dtype=torch.uint8))
    assert main(["data", "check", "config.yaml", "--json", "report.json"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("without data"))
    assert row.split() == ["without", "data", "25.00", "%", "25.00", "%", "100.00", "%"]
    report = json.loads(Path("report.json").read_text())
    train = report["splits"]["train"]
    assert (train["seen"], train["without_data"]) == (148 * 88, 37 * 88)
    assert train["ignored"] == train["without_data"]
    assert [(f["kind"], f["file"]) for f in report["findings"] if f["split"] == "test" and f["file"]] == [
        ("no pixel of an image has data", "3")
    ]


def test_the_sheet_shows_no_site_without_data(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []

    def noted(panels: list[tuple[str, Tensor]], **_: Any) -> Tensor:
        captions.extend(text for text, _ in panels)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)

    monkeypatch.setattr("sparserefine.studies.data_preview.side_by_side", noted)
    data = Dataset((Sample("0", project / "data/images/0.png"),), Classes.numbered(2), images=ImageConfig(nodata=0))
    preview(data, 1, refiner_of())
    assert captions[0] == "0, 88x72, 25.0 % without data"
    assert captions[-1] == "sites: 75.0 %"


@pytest.mark.parametrize("command", ["evaluate", "assess"])
def test_commands_hand_on_where_there_is_data(
    command: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(refiner: SparseRefiner, images: Any, *_: Any, **__: Any) -> None:
        valid = next(iter(images))[-1]
        raise ValueError(f"{float(valid.float().mean()):.2f} of the pixels")

    monkeypatch.setattr(f"sparserefine.studies.{command}.{command}", stop)
    config = RefinerConfig(selector=Selector(0.1), extractor=ExtractorConfig((4, 8)), images=ImageConfig(nodata=0))
    base = load_base(BaseConfig("unet:base.safetensors", ratio=0.25), Classes.numbered(2))
    SparseRefiner(base, config).save_pretrained("refiner")
    options = ["--refiner", "refiner"] if command == "evaluate" else []
    assert main([command, "config.yaml", "--device", "cpu", *options]) == 1
    assert "0.75 of the pixels" in capsys.readouterr().err
