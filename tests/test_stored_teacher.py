"""Stored predictions of the teacher belong to one teacher and one image, and are read as they were written or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.files.digest import sha256_of
from sparserefine.images.classes import Classes
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.training.stored_teacher import StoredTeacher, StoredTeacherSplit


def soft_of(k: int, seed: int = 0) -> SoftLabels:
    return SoftLabels.of(3 * torch.randn(k, 6, 7, generator=torch.Generator().manual_seed(seed)), "logits")


def written(store: StoredTeacher, name: str, k: int = 4, digest: str = "d") -> StoredTeacher:
    store.write(name, soft_of(k), teacher="UNet:1", image_size=(12, 14), digest=digest)
    return store


@pytest.mark.parametrize("k", [2, 3, 19])
def test_predictions_come_back_bit_for_bit(k: int, tmp_path: Path) -> None:
    store = written(StoredTeacher(tmp_path), "a/b", k)
    read = store.read("a/b", k, teacher="UNet:1", image_size=(12, 14), digest="d")
    assert torch.equal(read.values, soft_of(k).values)
    assert torch.equal(read.classes, soft_of(k).classes)
    assert (read.whole, read.start, read.num_classes) == ((6, 7), (0, 0), k)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"teacher": "UNet:2"}, "predictions of teacher UNet:1, this configuration has teacher UNet:2"),
        ({"image_size": (9, 10)}, "predictions of an image of 12x14 pixels, this image has 9x10"),
        ({"digest": "other"}, r"predictions of an image that has changed since, or is read otherwise now \(images\)"),
    ],
)
def test_predictions_of_something_else_are_refused(wanted: dict[str, Any], words: str, tmp_path: Path) -> None:
    store = written(StoredTeacher(tmp_path), "a")
    with pytest.raises(
        ValueError,
        match=rf"a\.safetensors: {words}; run `sparserefine logits --overwrite`, or give another teacher\.folder",
    ):
        store.read("a", 4, **{"teacher": "UNet:1", "image_size": (12, 14), "digest": "d", **wanted})


def test_coarse_logits_are_no_predictions(tmp_path: Path) -> None:
    header = {"format_version": "2", "name": "a", "base": "UNet:1", "image": "12x14", "image_sha256": "d"}
    save_file({"logits": torch.zeros(4, 6, 7)}, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(ValueError, match="its header lacks teacher"):
        StoredTeacher(tmp_path).read("a", 4, teacher="UNet:1")


def test_missing_predictions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no stored predictions; run `sparserefine logits` with this configuration"):
        StoredTeacher(tmp_path).read("a", 4, teacher="UNet:1")


def change(path: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Changes one value and leaves the header as it was."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name][index] = value
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(("name", "value"), [("values", 0.25), ("values", torch.nan), ("classes", 0), ("classes", 9)])
def test_a_changed_value_is_refused(name: str, value: float, tmp_path: Path) -> None:
    store = written(StoredTeacher(tmp_path), "a")
    found = load_file(store.path("a"))[name][1, 2, 3].item()
    change(store.path("a"), name, (1, 2, 3), value if found != value else 1)
    with pytest.raises(ValueError, match=r"a\.safetensors: its values have changed since they were stored; run"):
        store.read("a", 4, teacher="UNet:1")


@pytest.mark.parametrize("length", [0, 4, 50, -2])
def test_cut_files_are_refused(length: int, tmp_path: Path) -> None:
    store = written(StoredTeacher(tmp_path), "a")
    store.path("a").write_bytes(store.path("a").read_bytes()[:length])
    for values in (True, False):
        with pytest.raises(ValueError, match=r"a\.safetensors: not a safetensors file, or cut short"):
            store.read("a", 4, teacher="UNet:1", values=values)


GOOD = {"values": torch.full((2, 6, 7), 0.2).half(), "classes": torch.zeros(2, 6, 7, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"values": GOOD["values"]}, "holds 1 tensors, expected 'values' and 'classes'"),
        ({**GOOD, "values": GOOD["values"].float()}, r"values are torch.float32 \[2, 6, 7\], expected torch.float16"),
        ({**GOOD, "values": GOOD["values"][:1]}, r"values are .* \[1, 6, 7\], expected .* \[2, 6, 7\] for 4 classes"),
        ({**GOOD, "classes": GOOD["classes"][:, :5]}, r"classes are torch.uint8 \[2, 5, 7\], expected"),
        ({**GOOD, "classes": GOOD["classes"].short()}, r"classes are torch.int16 \[2, 6, 7\], expected torch.uint8"),
        ({key: tensor[:, 0] for key, tensor in GOOD.items()}, r"values are torch.float16 \[2, 7\], expected"),
        ({key: tensor[:, :0] for key, tensor in GOOD.items()}, r"values are torch.float16 \[2, 0, 7\], expected"),
        ({**GOOD, "values": 2 * GOOD["values"] + 1}, "84 values are no probabilities, or none of 4 classes"),
        ({**GOOD, "values": -GOOD["values"]}, "84 values are no probabilities"),
        ({**GOOD, "classes": GOOD["classes"] + 4}, "84 values are no probabilities, or none of 4 classes"),
    ],
)
def test_files_of_another_make_are_refused(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    store = StoredTeacher(tmp_path)
    soft = SoftLabels(*(tensors.get(key, torch.zeros(0)) for key in ("values", "classes")), 4, (6, 7))  # type: ignore[arg-type]
    store.write("a", soft, teacher="UNet:1", image_size=(12, 14), digest="d")
    if len(tensors) == 1:
        with safe_open(store.path("a"), framework="pt") as file:
            header = file.metadata()
        save_file(tensors, store.path("a"), metadata=header)
    with pytest.raises(ValueError, match=words):
        store.read("a", 4, teacher="UNet:1")


@pytest.fixture
def split(tmp_path: Path) -> StoredTeacherSplit:
    store, samples = StoredTeacher(tmp_path / "teacher"), []
    for value, name in enumerate("ab"):
        Image.new("RGB", (14, 12), (value, 100, 50)).save(tmp_path / f"{name}.png")
        samples.append(Sample(name, tmp_path / f"{name}.png"))
        written(store, name, digest=sha256_of(samples[-1].image))
    return StoredTeacherSplit(store.folder, Dataset(tuple(samples), Classes.numbered(4)), "UNet:1")


def test_a_split_that_fits(split: StoredTeacherSplit) -> None:
    split.check()
    assert torch.equal(split(1, (12, 14)).values, soft_of(4).values)


def test_a_split_is_checked_to_the_last_value(split: StoredTeacherSplit) -> None:
    change(split.folder / "b.safetensors", "values", (1, 5, 6), 0.5)
    with pytest.raises(ValueError, match=r"b\.safetensors: its values have changed"):
        split.check()


def test_swapped_and_changed_images_are_refused(split: StoredTeacherSplit, tmp_path: Path) -> None:
    Image.new("RGB", (14, 12)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.safetensors: predictions of an image that has changed since"):
        split.check()
