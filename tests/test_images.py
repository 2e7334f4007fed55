"""Reading images and labels as a viewer shows them, files that are whole or absent, datasets and class lists."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.data.readers.folder import folder
from sparserefine.data.readers.hrf import hrf
from sparserefine.data.readers.labels import LabelsConfig
from sparserefine.files.images import ImageError, read_image, write_png
from sparserefine.files.labels import read_label
from sparserefine.files.whole import written_whole
from sparserefine.images.classes import Classes, read_classes, wheel
from support import shared

SIZE = (5, 7)


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(3).integers(0, high, shape).astype(np.uint8)


def stored(path: Path, image: Image.Image, **arguments: object) -> Path:
    image.save(path, **arguments)
    return path


def planes(array: np.ndarray) -> Tensor:
    """``[H, W, 3]`` or ``[H, W]`` -> ``uint8 [3, H, W]``."""
    array = np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array
    return torch.from_numpy(array.astype(np.uint8)).permute(2, 0, 1)


# ---- modes


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp", "ppm"])
def test_colour(suffix: str, tmp_path: Path) -> None:
    rgb = noise(*SIZE, 3)
    options = {"lossless": True} if suffix == "webp" else {}
    found = read_image(stored(tmp_path / f"a.{suffix}", Image.fromarray(rgb), **options))
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, planes(rgb))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pgm"])
def test_grey_becomes_three_equal_channels(suffix: str, tmp_path: Path) -> None:
    grey = noise(*SIZE)
    assert torch.equal(read_image(stored(tmp_path / f"a.{suffix}", Image.fromarray(grey))), planes(grey))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = noise(*SIZE, high=2)
    path = stored(tmp_path / "a.png", Image.fromarray(bits * 255).convert("1"))
    assert torch.equal(read_image(path), planes(bits * 255))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str, tmp_path: Path) -> None:
    """Result = a c + (1 - a) 255."""
    pixels = noise(*SIZE, len(mode))
    pixels[0, 0, -1], pixels[0, 1, -1] = 0, 255
    found = read_image(stored(tmp_path / "a.png", Image.fromarray(pixels, mode)))
    alpha = pixels[..., -1:] / 255
    expected = np.broadcast_to(alpha * pixels[..., :-1] + (1 - alpha) * 255, (*SIZE, 3))
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1
    assert found[:, 0, 0].tolist() == [255, 255, 255]
    assert found[:, 0, 1].tolist() == np.broadcast_to(pixels[0, 1, :-1], 3).tolist()


def palette_image(indices: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(colours.flatten().tolist())
    return image


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
def test_palette_is_resolved(suffix: str, tmp_path: Path) -> None:
    indices, colours = noise(*SIZE, high=4), noise(256, 3)
    assert torch.equal(
        read_image(stored(tmp_path / f"a.{suffix}", palette_image(indices, colours))), planes(colours[indices])
    )


@pytest.mark.parametrize("transparency", [2, bytes([255, 255, 0])], ids=["an index", "an alpha table"])
def test_palette_with_transparency(transparency: int | bytes, tmp_path: Path) -> None:
    indices, colours = noise(*SIZE, high=4), noise(256, 3)
    path = stored(tmp_path / "a.png", palette_image(indices, colours), transparency=transparency)
    colours[2] = 255
    assert torch.equal(read_image(path), planes(colours[indices]))


def test_grey_with_a_transparent_value(tmp_path: Path) -> None:
    grey = noise(*SIZE, high=4)
    path = stored(tmp_path / "a.png", Image.fromarray(grey), transparency=2)
    assert torch.equal(read_image(path), planes(np.where(grey == 2, 255, grey)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(suffix: str, tmp_path: Path) -> None:
    wide = np.array([[0, 256, 257, 300], [32768, 65279, 65535, 128]], dtype=np.uint16)
    found = read_image(stored(tmp_path / f"a.{suffix}", Image.fromarray(wide)))
    assert torch.equal(found, planes(np.round(wide / 257)))


def test_integers_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.tif", Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    with pytest.raises(ImageError, match=r"a\.tif: integer pixels .*70000"):
        read_image(path)


def test_floating_point_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.tif", Image.fromarray(np.zeros(SIZE, dtype=np.float32)))
    with pytest.raises(ImageError, match=r"a\.tif: floating-point pixels"):
        read_image(path)


def test_cmyk(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    found = read_image(stored(tmp_path / "a.tif", Image.fromarray(inks, "CMYK")))
    assert found.permute(1, 2, 0).tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]


ORIENTATIONS: dict[int, Callable[[Tensor], Tensor]] = {  # what the tag says was done to the picture, undone
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_rotated_by_the_exif_tag(orientation: int, suffix: str, tmp_path: Path) -> None:
    rgb = noise(*SIZE, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = stored(tmp_path / f"a.{suffix}", Image.fromarray(rgb), exif=exif, **options)
    assert torch.equal(read_image(path), ORIENTATIONS[orientation](planes(rgb)))


def test_labels_are_rotated_like_their_image(tmp_path: Path) -> None:
    indices = noise(*SIZE, high=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = stored(tmp_path / "a.png", Image.fromarray(indices), exif=exif)
    assert torch.equal(read_label(path), torch.from_numpy(np.rot90(indices, -1).astype(np.int64)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_one_pixel(mode: str, tmp_path: Path) -> None:
    assert read_image(stored(tmp_path / "a.png", Image.new(mode, (1, 1)))).shape == (3, 1, 1)


# ---- files that are no images


def encoded(suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 50, 3)).save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    return buffer.getvalue()


def image_or_message(path: Path) -> Tensor | str:
    """Any other exception than ImageError passes through."""
    try:
        return read_image(path)
    except ImageError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp", "ppm"])
def test_cut_short(suffix: str, tmp_path: Path) -> None:
    """Wherever the file is cut: the whole image (nothing lacks but its trailer), or an error that names the file."""
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    for length in (*range(0, 64, 3), *range(64, len(whole), len(whole) // 40)):
        path.write_bytes(whole[:length])
        found = image_or_message(path)
        assert str(path) in found if isinstance(found, str) else found.shape == (3, 40, 50)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="cut short"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp", "ppm"])
def test_damaged_bytes(suffix: str, tmp_path: Path) -> None:
    """Some image, or an error that names the file."""
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    random = np.random.default_rng(5)
    for _ in range(60):
        data = bytearray(whole)
        for position in random.integers(0, min(len(data), 400), 3):
            data[position] = random.integers(256)
        path.write_bytes(data)
        found = image_or_message(path)
        assert str(path) in found if isinstance(found, str) else found.dtype == torch.uint8


@pytest.mark.parametrize("read", [read_image, read_label])
@pytest.mark.parametrize(
    "content", [b"", b"no image at all\n", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "signature"]
)
def test_no_image(content: bytes, read: Callable[[Path], Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: not a readable image"):
        read(path)


@pytest.mark.parametrize("read", [read_image, read_label])
def test_missing_file_and_folder(read: Callable[[Path], Tensor], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder, expected a"):
        read(tmp_path)


# ---- labels


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_label_values_are_classes(mode: str, tmp_path: Path) -> None:
    indices = noise(*SIZE, high=2 if mode == "1" else 12)
    if mode == "1":
        image = Image.fromarray(indices * 255).convert("1")
    elif mode == "P":
        image = palette_image(indices, noise(256, 3))
    else:
        image = Image.fromarray(indices.astype(np.uint16 if mode == "I;16" else np.uint8))
    found = read_label(stored(tmp_path / "a.png", image))
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.from_numpy(indices.astype(np.int64)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "F"])
def test_what_is_no_label(mode: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "a.tif", Image.new(mode, (3, 3)))  # transparent, for those that can be
    with pytest.raises(ImageError, match=rf"a\.tif: labels must be an index image .* mode '{mode}'"):
        read_label(path)


# ---- writing


@pytest.mark.parametrize("size", [(1, 1), (5, 7)], ids=str)
def test_png_round_trips(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.png"
    small, wide = torch.randint(0, 256, size, dtype=torch.uint8), torch.randint(0, 300, size, dtype=torch.int16)
    rgb = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    write_png(path, small)
    assert torch.equal(read_label(path), small.long())
    write_png(path, wide)
    assert torch.equal(read_label(path), wide.long())
    write_png(path, rgb)
    assert torch.equal(read_image(path), rgb)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_png_with_a_palette_holds_indices_and_shows_colours(tmp_path: Path) -> None:
    labels, palette = torch.randint(0, 3, SIZE, dtype=torch.uint8), [(1, 2, 3), (200, 100, 0), (0, 0, 255)]
    write_png(tmp_path / "a.png", labels, palette)
    assert torch.equal(read_label(tmp_path / "a.png"), labels.long())
    assert torch.equal(read_image(tmp_path / "a.png"), torch.tensor(palette)[labels.long()].permute(2, 0, 1).byte())


def test_png_of_a_part_of_a_tensor(tmp_path: Path) -> None:
    labels = torch.randint(0, 256, (9, 12), dtype=torch.uint8)
    write_png(tmp_path / "a.png", labels[::2, 1:8].t())
    assert torch.equal(read_label(tmp_path / "a.png"), labels[::2, 1:8].t().long())


def test_png_refuses_labels_that_do_not_fit(tmp_path: Path) -> None:
    for labels in (torch.tensor([[70000]]), torch.tensor([[-1]], dtype=torch.int16)):
        with pytest.raises(ValueError, match=str(int(labels))):
            write_png(tmp_path / "a.png", labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [None, b"old"], ids=["new file", "replacing"])
def test_a_failure_while_writing_leaves_everything_as_it_was(old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)

    def fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_bytes(b"half of")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_who_reads_while_a_file_is_replaced_sees_the_old_one_whole(tmp_path: Path) -> None:
    """A rename, not a copy: whoever has the old file open reads it whole, and the new one is never partial."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with path.open() as reader:
        with written_whole(path) as temporary:
            temporary.write_text("new, and longer")
            assert path.read_text() == "old"
        assert reader.read() == "old"
    assert path.read_text() == "new, and longer"


def test_written_whole_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bin"
    for content in (b"first", b"second"):
        with written_whole(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with written_whole(tmp_path / "ours") as temporary:
        temporary.write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "ours")}
    assert len(modes) == 1


# ---- datasets


def make_pair(images: Path, labels: Path, stem: str, label: np.ndarray | None = None, suffix: str = ".png") -> None:
    label = noise(*SIZE, high=2) if label is None else label
    for place in (images / stem, labels / stem):
        place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*label.shape, 3)).save(images / f"{stem}{suffix}")
    Image.fromarray(label).save(labels / f"{stem}.png")


def names(dataset: Dataset) -> list[str]:
    return [sample.name for sample in dataset.samples]


@pytest.fixture
def fundus(tmp_path: Path) -> Path:
    for subject in ("01", "06", "07", "13", "14"):
        for kind in ("dr", "g", "h"):
            make_pair(tmp_path / "images", tmp_path / "labels", f"{subject}_{kind}", suffix=".jpg")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "subjects"),
    [("06-13", "06 07 13"), ("14", "14"), ("06,14", "06 14"), ("01-06, 14", "01 06 14"), ("01-99", "01 06 07 13 14")],
)
def test_hrf_splits(split: str, subjects: str, fundus: Path) -> None:
    dataset = hrf(fundus, split)
    assert names(dataset) == [f"{subject}_{kind}" for subject in subjects.split() for kind in ("dr", "g", "h")]
    assert dataset.classes.names == ("background", "vessel")


@pytest.mark.parametrize("split", ["", "6-13", "a", "06-", "06-13-14", "06;13", "train"])
def test_hrf_bad_split(split: str, fundus: Path) -> None:
    with pytest.raises(ValueError, match=f"HRF split '{split}': expected subject numbers"):
        hrf(fundus, split)


@pytest.mark.parametrize("split", ["02-05", "13-06"])
def test_hrf_split_without_images(split: str, fundus: Path) -> None:
    with pytest.raises(ValueError, match=f"no image in split '{split}'"):
        hrf(fundus, split)


def test_hrf_as_published(tmp_path: Path) -> None:
    """Folder ``manual1``, TIFF labels of 0 and 255, upper-case suffixes."""
    label = noise(*SIZE, high=2)
    (tmp_path / "images").mkdir()
    (tmp_path / "manual1").mkdir()
    Image.fromarray(noise(*SIZE, 3)).save(tmp_path / "images" / "01_dr.JPG")
    Image.fromarray(label * 255).save(tmp_path / "manual1" / "01_dr.tif")
    assert torch.equal(hrf(tmp_path, "01").read(0)[1], torch.from_numpy(label))


def test_hrf_itself() -> None:
    dataset = hrf(shared("data/hrf"), "14-15")
    assert names(dataset) == ["14_dr", "14_g", "14_h", "15_dr", "15_g", "15_h"]
    assert set(read_label(dataset.samples[0].label).unique().tolist()) == {0, 1}


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("road 128 64 128\n\nside walk\ncar\n")
    for stem in ("train/a", "train/city/b.left", "val/c"):
        make_pair(tmp_path / "images", tmp_path / "labels", stem, noise(*SIZE, high=3))
    return tmp_path


def test_folder_and_its_splits(streets: Path) -> None:
    assert names(folder(streets)) == ["train/a", "train/city/b.left", "val/c"]
    assert names(folder(streets, "train")) == ["train/a", "train/city/b.left"]
    (streets / "few.txt").write_text("val/c\ntrain/a\n")
    assert names(folder(streets, "few")) == ["train/a", "val/c"]
    image, label = folder(streets, "val").read(0)
    assert torch.equal(image, read_image(streets / "images/val/c.png"))
    assert torch.equal(label, read_label(streets / "labels/val/c.png").byte())
    assert label.dtype == torch.uint8


def test_folder_ignores_other_files(streets: Path) -> None:
    (streets / "images" / "train" / "notes.md").touch()
    (streets / "labels" / "train" / "Thumbs.db").touch()
    make_pair(streets / "elsewhere", streets / "labels", "train/no_image")
    assert names(folder(streets, "train")) == ["train/a", "train/city/b.left"]


def test_folder_without_what_it_needs(streets: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'test': neither a folder .* nor a list .*test\.txt"):
        folder(streets, "test")
    (streets / "few.txt").write_text("val/c val/z")
    with pytest.raises(ValueError, match=r"few\.txt lists 'val/z'"):
        folder(streets, "few")
    (streets / "labels" / "val" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"c\.png: no label .*c\.png"):
        folder(streets)
    (streets / "images" / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in split 'empty'"):
        folder(streets, "empty")


def test_folder_without_images(streets: Path) -> None:
    (streets / "images").rename(streets / "gone")
    with pytest.raises(ValueError, match="no folder images in it"):
        folder(streets)


def test_label_of_another_size(streets: Path) -> None:
    Image.fromarray(noise(4, 7, high=3)).save(streets / "labels/val/c.png")
    with pytest.raises(ValueError, match=r"c\.png: label is \(4, 7\) pixels, image c\.png \(5, 7\)"):
        folder(streets, "val").read(0)


def test_unknown_label(streets: Path) -> None:
    label = np.zeros(SIZE, dtype=np.uint8)
    label[0, :4] = 3
    Image.fromarray(label).save(streets / "labels/val/c.png")
    with pytest.raises(ValueError, match=r"c\.png: 4 pixels have label 3, expected 0..2 or 255"):
        folder(streets, "val").read(0)
    assert folder(streets, "val", ignore=[3]).read(0)[1].unique().tolist() == [0, 255]


def test_ignored_values_become_255(streets: Path) -> None:
    label = np.array([[0, 1, 2, 11, 255]], dtype=np.uint8)
    make_pair(streets / "images", streets / "labels", "val/c", label)
    assert folder(streets, "val", ignore=[2, 11]).read(0)[1].tolist() == [[0, 1, 255, 255, 255]]


def two_classes(path: Path, values: list[int]) -> Dataset:
    make_pair(path / "images", path / "labels", "a", np.array([values], dtype=np.uint8))
    return Dataset((Sample("a", path / "images/a.png", path / "labels/a.png"),), Classes.numbered(2))


def test_black_and_white_masks_are_two_classes(tmp_path: Path) -> None:
    dataset = two_classes(tmp_path, [0, 255, 255, 0])
    assert dataset.read(0)[1].tolist() == [[0, 255, 255, 0]]  # ignored, unless said otherwise
    assert replace(dataset, labels=LabelsConfig(black_white=True)).read(0)[1].tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("values", [[1, 255, 1], [0, 1, 255]], ids=str)
def test_255_beside_a_1_is_ignored(values: list[int], tmp_path: Path) -> None:
    assert two_classes(tmp_path, values).read(0)[1].tolist() == [values]


def test_more_than_255_classes(tmp_path: Path) -> None:
    make_pair(tmp_path / "images", tmp_path / "labels", "a", np.zeros((1, 4), dtype=np.uint8))
    (tmp_path / "classes.txt").write_text("".join(f"class {k}\n" for k in range(256)))
    with pytest.raises(ValueError, match="256 classes, expected at most 255"):
        folder(tmp_path)


# ---- classes


def test_classes_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("road 128 64 128\n\n  side walk \nlane 1\ncar\t0 0 255\n", encoding="utf-8")
    classes = read_classes(path, [11])
    assert classes.names == ("road", "side walk", "lane 1", "car")
    assert classes.palette == ((128, 64, 128), wheel(1), wheel(2), (0, 0, 255))
    assert classes.ignore == (11,)
    assert len(classes) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 classes, expected at least 2"),
        ("road\n", "1 classes, expected at least 2"),
        ("road 0 0 256\ncar\n", "colour 0 0 256 of class 'road' is outside 0..255"),
    ],
)
def test_bad_classes_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.txt: {words}"):
        read_classes(path)


def test_missing_classes_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes\.txt: no classes file"):
        read_classes(tmp_path / "classes.txt")
    with pytest.raises(ValueError, match=r"nowhere: no such folder.*data\.root"):
        read_classes(tmp_path / "nowhere" / "classes.txt")


def test_as_many_colours_as_names() -> None:
    with pytest.raises(ValueError, match="2 class names, 1 colours"):
        Classes(("a", "b"), ((0, 0, 0),))


def test_colours_of_the_wheel_differ() -> None:
    assert len({wheel(index) for index in range(256)}) == 256


def test_equal_stems_of_two_splits_are_two_samples(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / kind / split / "1.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    names = [folder(tmp_path, split).samples[0].name for split in ("train", "val")]
    assert names == ["train/1", "val/1"]
