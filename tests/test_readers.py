"""Datasets on disk as people leave them: hidden files, equal names, pipes, lists and classes from any editor."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparserefine.data.readers.config import DataConfig
from sparserefine.data.readers.dataset import Dataset
from sparserefine.data.readers.folder import folder
from sparserefine.data.readers.labels import LabelsConfig
from sparserefine.images.classes import Classes, read_classes


def sample(root: Path, stem: str, value: int = 0) -> None:
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        path = root / kind / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (6, 4), value if mode == "L" else (value,) * 3).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for value, stem in enumerate(("a", "my photo", "city/b.left")):
        sample(tmp_path, stem, value)
    (tmp_path / "classes.txt").write_text("road\ncar\ntree\n")
    return tmp_path


def names(dataset: Dataset) -> list[str]:
    return [sample.name for sample in dataset.samples]


# ---- images and labels


def test_two_images_of_one_name_are_refused(data: Path) -> None:
    Image.new("RGB", (6, 4)).save(data / "images" / "a.bmp")
    with pytest.raises(
        ValueError, match=r"images/a\.bmp and .*images/a\.png: two images of one name; rename or remove"
    ):
        folder(data)


def test_two_labels_of_one_image_are_refused(data: Path) -> None:
    Image.new("L", (6, 4)).save(data / "labels" / "a.TIF")
    with pytest.raises(ValueError, match=r"labels/a\.TIF and .*labels/a\.png: two labels of one image; remove one"):
        folder(data)


def test_labels_of_no_image_may_be_many(data: Path) -> None:
    for suffix in ("png", "tif"):
        Image.new("L", (6, 4)).save(data / "labels" / f"other.{suffix}")
    assert len(folder(data)) == 3


def test_hidden_files_are_no_samples(data: Path) -> None:
    """macOS leaves ``._a.png`` beside files, and editors keep copies in hidden folders."""
    for kind in ("images", "labels"):
        (data / kind / "._a.png").write_bytes(b"Mac OS X")
        (data / kind / ".ipynb_checkpoints").mkdir()
        (data / kind / ".ipynb_checkpoints" / "a.png").write_bytes(b"")
    (data / "images" / "folder.png").mkdir()
    assert names(folder(data)) == ["a", "city/b.left", "my photo"]


def test_a_dataset_below_a_hidden_folder_is_read(data: Path) -> None:
    shutil.copytree(data, data / ".hidden" / "data")
    assert len(folder(data / ".hidden" / "data")) == 3


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_pipes_and_broken_links_are_named(kind: str, data: Path) -> None:
    expected = {"images": "an image", "labels": "a label image"}[kind]
    path = data / kind / "a.png"
    path.unlink()
    path.symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match=rf"{kind}/a\.png: no such file, expected {expected}"):
        folder(data)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{kind}/a\.png: is a FIFO .*, expected {expected}"):
        folder(data)


# ---- lists


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nmy photo\n", ["a", "my photo"]),
        (b"a city/b.left", ["a", "city/b.left"]),
        (b"a.png\nmy photo.png\ncity/b.left.png\n", ["a", "city/b.left", "my photo"]),
        (b"\xef\xbb\xbfa\r\nmy photo\r\n\r\n", ["a", "my photo"]),
        (b"a\rmy photo\r", ["a", "my photo"]),
        (b"\ta  \n a\n", ["a"]),
    ],
    ids=["lines", "words", "suffixes", "Windows", "old Mac", "blanks"],
)
def test_lists_of_any_editor(content: bytes, expected: list[str], data: Path) -> None:
    (data / "few.txt").write_bytes(content)
    assert names(folder(data, "few")) == expected


def test_a_name_that_ends_as_a_file_does(data: Path) -> None:
    sample(data, "a.png")
    (data / "few.txt").write_text("a.png\n")
    assert names(folder(data, "few")) == ["a.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nno photo\n", r"lists 'no photo', which is not in .*images"),
        ("a b", r"lists 'b', which is not in"),
        ("c.png", r"lists 'c\.png', which is not in"),
        ("a\nx\x1b[31m\n", r"line 2 holds control characters: x\\x1b\[31m"),
        (b"\xff\xfea\x00", r"is no text in UTF-8 .*, expected a list of images; save it as UTF-8"),
        (b"a\n\x00\x01", "line 2 holds control characters"),
    ],
)
def test_bad_lists_are_refused(content: str | bytes, words: str, data: Path) -> None:
    (data / "few.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^[^\n]*few\.txt:? {words}[^\n]*$"):
        folder(data, "few")


def test_a_list_that_is_a_pipe_is_refused(data: Path) -> None:
    os.mkfifo(data / "few.txt")
    with pytest.raises(ValueError, match=r"few\.txt: is a FIFO .*, expected a list of images"):
        folder(data, "few")


@pytest.mark.parametrize("split", ["/", "..", "../images", "city/../.."])
def test_a_split_stays_in_its_dataset(split: str, data: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder in .* or the stem of a list in"):
        folder(data, split)


def test_an_empty_root_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)  # what the empty path would read
    with pytest.raises(ValueError, match=r"data\.root is empty, expected the dataset's folder"):
        DataConfig(name="folder", root="")


# ---- classes


def test_classes_of_any_editor(data: Path) -> None:
    path = data / "classes.txt"
    path.write_bytes("\ufeffStraße 1 2 3\r\n\r\nside walk\r\n".encode())
    assert read_classes(path).names == ("Straße", "side walk")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n", r"is no text in UTF-8 .*, expected a list of classes; save it as UTF-8"),
        (b"road\nca\x1b[31mr\n", r"line 2 holds control characters: ca\\x1b\[31mr"),
        (b"road\x00\ncar\n", r"line 1 holds control characters: road\\x00"),
        (b"road\nside\twalk\n", r"the line 'side\\twalk' .* is no class; expected a name or 'name R G B'"),
        (b"road\n" + b"x" * 201, r".*\(201 characters\) is no class"),
        (b"road\ncar " + b"9" * 5000 + b" 0 0", r".*\(5008 characters\) is no class"),
        (b"x\n" * 600_000, "1200000 bytes, expected a list of classes of at most 1000000"),
    ],
    ids=["binary", "escape", "zero", "tab", "long", "number", "huge"],
)
def test_bad_classes_are_refused(content: bytes, words: str, data: Path) -> None:
    (data / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*classes\.txt: {words}[^\n]*$"):
        folder(data)


def test_classes_that_are_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(ValueError, match=r"classes\.txt: is a FIFO .*, expected a list of classes"):
        read_classes(tmp_path / "classes.txt")


# ---- without labels


def test_a_folder_without_labels(data: Path) -> None:
    assert folder(data).labelled
    (data / "labels").rename(data / "gone")
    dataset = folder(data)
    assert names(dataset) == ["a", "city/b.left", "my photo"]
    assert not dataset.labelled
    assert all(sample.label is None for sample in dataset.samples)
    image, label = dataset.read(1)
    assert image.unique().tolist() == [2]
    assert label.dtype == torch.uint8
    assert label.shape == (4, 6)
    assert label.unique().tolist() == [255]


def test_a_split_without_labels_beside_one_that_has_some(data: Path) -> None:
    sample(data, "train/c")
    sample(data, "val/d")
    shutil.rmtree(data / "labels" / "train")
    assert not folder(data, "train").labelled
    assert folder(data, "val").labelled
    with pytest.raises(ValueError, match=r"train/c\.png: no label .*train/c\.png"):
        folder(data)


def test_all_images_without_a_label_are_named(data: Path) -> None:
    for name in ("c", "d", "e"):
        sample(data, f"train/{name}")
        (data / "labels" / "train" / f"{name}.png").unlink()
    with pytest.raises(ValueError, match=r"train/c\.png: no label .*c\.png, and none for 2 more: train/d, train/e$"):
        folder(data, "train")


def test_masks_without_labels_are_ignored_too(data: Path) -> None:
    (data / "classes.txt").write_text("ground\nline\n")
    (data / "labels").rename(data / "gone")
    assert folder(data, black_white=True).read(0)[1].unique().tolist() == [255]


def test_what_needs_labels_says_so(data: Path) -> None:
    folder(data).check_labelled("this")
    (data / "labels").rename(data / "gone")
    with pytest.raises(ValueError, match=r"images/a\.png: has no label, and this needs labels; put a label image"):
        folder(data).check_labelled("this")


def test_without_labels_the_digest_is_of_the_images(data: Path) -> None:
    with_labels = folder(data).digest()
    (data / "labels").rename(data / "gone")
    without = folder(data).digest()
    assert without != with_labels
    path = data / "images" / "a.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert folder(data).digest() != without


# ---- digest


def test_a_moved_dataset_has_the_same_digest(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    assert folder(data).digest() == folder(tmp_path / "copy").digest()


def changed(data: Path, what: str) -> Dataset:
    if what in ("images", "labels"):
        path = data / what / "a.png"
        path.write_bytes(path.read_bytes() + b"\0")
    elif what == "name":
        for kind in ("images", "labels"):
            (data / kind / "a.png").rename(data / kind / "b.png")
    elif what == "swapped":
        a, b, c = (data / "images" / name for name in ("a.png", "my photo.png", "c.png"))
        a.rename(c)
        b.rename(a)
        c.rename(b)
    dataset = folder(data)
    if what == "classes":
        return replace(dataset, classes=Classes.numbered(3))
    if what == "ignore":
        return replace(dataset, classes=replace(dataset.classes, ignore=(2,)))
    if what == "black_white":
        return replace(dataset, labels=LabelsConfig(black_white=True))
    if what == "order":
        return replace(dataset, samples=dataset.samples[::-1])
    return dataset


@pytest.mark.parametrize("what", ["images", "labels", "name", "swapped", "classes", "ignore", "black_white", "order"])
def test_the_digest_tells_other_data(what: str, data: Path) -> None:
    before = folder(data).digest()
    assert changed(data, what).digest() != before


def test_a_file_that_vanished_is_named_by_the_digest(data: Path) -> None:
    dataset = folder(data)
    (data / "labels" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels/a\.png: no such file, expected a label image"):
        dataset.digest()
