"""Label files as people have them: numbers, colours, palettes, masks; decoded exactly, or refused with the cure."""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sparserefine.commands.main import main
from sparserefine.commands.parser import Parser
from sparserefine.data.readers.check import check_labels
from sparserefine.data.readers.config import DataConfig
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.data.readers.folder import folder
from sparserefine.data.readers.labels import INDEX, LabelsConfig
from sparserefine.files.image_config import ImageConfig
from sparserefine.files.images import ImageError, orientation_of, stored_size
from sparserefine.files.labels import read_label
from sparserefine.images.classes import Classes, read_classes, wheel
from support import shared

COLOUR = LabelsConfig("colour")
TURNS = dict(
    enumerate(
        (
            *(Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
            *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE),
            Image.Transpose.ROTATE_90,
        ),
        2,
    )
)
"""By orientation of EXIF."""
RGB = Classes(("road", "car", "tree"), ((10, 20, 30), (200, 0, 0), (0, 255, 7)))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the shared collection of files as people have them."""
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, shared("cases/make.py"), folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def twelve(cases: Path) -> Classes:
    return read_classes(cases / "classes_12_with_colours.txt")


@pytest.fixture(scope="module")
def truth(cases: Path) -> torch.Tensor:
    """The classes 0, 1 and 11."""
    return torch.from_numpy(np.array(Image.open(cases / "label_index.png")))


def of_file(label: Path, classes: Classes, labels: LabelsConfig = INDEX) -> Dataset:
    """One sample, whose image is as large as the label."""
    image = label.parent / f"image of {label.name}.png"
    with Image.open(label) as opened:
        Image.new("RGB", opened.size).save(image)
    return Dataset((Sample("a", image, label),), classes, labels)


def decoded(label: Path, classes: Classes, labels: LabelsConfig = INDEX) -> torch.Tensor:
    return of_file(label, classes, labels).read(0)[1]


def saved(path: Path, pixels: object, *, mode: str | None = None, palette: list[int] | None = None) -> Path:
    array = np.array(pixels)
    image = Image.fromarray(array.astype(np.uint8) if array.dtype == np.int64 else array)
    if palette is not None:
        image.putpalette(palette)
    (image.convert(mode) if mode else image).save(path)
    return path


def refused(label: Path, classes: Classes, labels: LabelsConfig = INDEX) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        decoded(label, classes, labels)
    assert str(label) in str(caught.value)
    return str(caught.value)


# ---- the shared collection, a test for each of its rows on labels


def test_numbers(cases: Path, twelve: Classes, truth: torch.Tensor) -> None:
    assert torch.equal(decoded(cases / "label_index.png", twelve), truth)


def test_colours(cases: Path, twelve: Classes, truth: torch.Tensor) -> None:
    assert torch.equal(decoded(cases / "label_colours_rgb.png", twelve, COLOUR), truth)
    assert "data.labels.name: colour decodes it" in refused(cases / "label_colours_rgb.png", twelve)


def test_an_unknown_colour(cases: Path, twelve: Classes, tmp_path: Path) -> None:
    pixels = np.array(Image.open(cases / "label_colours_rgb.png"))
    pixels[4, 5:8] = 1, 2, 3
    pixels[9, 9] = 4, 5, 6
    message = refused(saved(tmp_path / "a.png", pixels), twelve, COLOUR)
    assert "3 pixels have colour 1 2 3, the first at row 4, column 5 (and 1 pixels with others)" in message
    assert "'1 2 3': null" in message


def test_a_palette_of_the_encoder(cases: Path, twelve: Classes, truth: torch.Tensor) -> None:
    path = cases / "label_colours_requantised.png"
    assert "the palette contradicts the indices" in (message := refused(path, twelve))
    assert "set data.labels.name: colour" in message
    assert torch.equal(decoded(path, twelve, COLOUR), truth)


def test_loss(cases: Path, twelve: Classes) -> None:
    message = refused(cases / "label_index.jpg", twelve)
    assert "JPEG, which changes values" in message
    assert "write it again from its source in a format without loss: PNG" in message
    assert "JPEG" in refused(cases / "label_index.jpg", twelve, COLOUR)


def test_three_equal_channels(cases: Path, twelve: Classes, truth: torch.Tensor) -> None:
    assert torch.equal(decoded(cases / "label_index_thrice_rgb.png", twelve), truth)


def test_0_and_255_of_two_classes(cases: Path, truth: torch.Tensor) -> None:
    dataset = of_file(cases / "label_0_255.png", Classes.numbered(2))
    with pytest.raises(ValueError, match=r"test split: .* all values are 0 or 255.*set data\.black_white: true"):
        check_labels(dataset, "test split")
    masks = replace(dataset, labels=LabelsConfig(black_white=True))
    check_labels(masks, "test split")
    assert torch.equal(masks.read(0)[1], (truth > 0).byte())


def test_values_below_0(cases: Path, twelve: Classes, truth: torch.Tensor) -> None:
    path = cases / "label_int16_negative.tif"
    assert read_label(path)[1:4, 0].tolist() == [-1, -2, -9999]
    message = refused(path, twelve)
    assert "30 pixels have label -1, expected 0..11 or 255 (ignored), the first at row 1, column 0 (and 60" in message
    assert "data.labels.ignore" in message
    expected = truth.clone()
    expected[1:4] = 255
    assert torch.equal(decoded(path, twelve, LabelsConfig(ignore=(-1, -2, -9999))), expected)
    assert "label -9999" in refused(path, twelve, LabelsConfig(ignore=(-1, -2)))


def test_0_is_void(cases: Path) -> None:
    path, classes = cases / "label_ade20k_0_is_void_1_to_150.png", Classes.numbered(150)
    stored = torch.from_numpy(np.array(Image.open(path))).int()
    assert "label 150, expected 0..149 or 255" in (message := refused(path, classes))
    assert "set data.labels.zero_is_void" in message
    assert "zero_is_void" not in refused(path, Classes.numbered(149))
    expected = torch.where(stored == 0, 255, stored - 1).byte()
    assert torch.equal(decoded(path, classes, LabelsConfig(zero_is_void=True)), expected)


def test_label_ids_by_suffix_and_map(cases: Path, tmp_path: Path) -> None:
    for place, there in (("images", "leftImg8bit"), ("labels", "gtFine")):
        (tmp_path / place).symlink_to(cases / "cityscapes" / there)
    (tmp_path / "classes.txt").write_text("road\nbuilding\ncar\n")
    labels = LabelsConfig(map={0: None, 4: None, 7: "road", 8: "road", 11: 1, 26: "car", 33: None})
    config = DataConfig(
        "folder", str(tmp_path), labels=labels, image_suffix="_leftImg8bit", label_suffix="_gtFine_labelIds"
    )
    dataset = config.read("train")
    assert [sample.name for sample in dataset.samples] == ["train/town/town_000000_000019"]
    label = dataset.samples[0].label
    assert label is not None
    stored, found = read_label(label), dataset.read(0)[1]
    for value, meant in {0: 255, 4: 255, 7: 0, 8: 0, 11: 1, 26: 2, 33: 255, 255: 255}.items():
        assert found[stored == value].unique().tolist() == [meant]
    (tmp_path / "few.txt").write_text("train/town/town_000000_000019_leftImg8bit.png\n")
    assert config.read("few").samples == dataset.samples


def test_an_image_turned_by_exif_and_its_label_not(cases: Path, twelve: Classes) -> None:
    sample = Sample("a", cases / "image_orientation_3.jpg", cases / "label_index.png")
    with pytest.raises(ValueError, match=r"EXIF says orientation 3, and that of its label .* images\.exif: apply .*"):
        Dataset((sample,), twelve).read(0)


# ---- exact values


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(np.uint16, [0, 300, 65535]), (np.int32, [0, -(2**31), 2**31 - 1]), (np.int16, [0, -1, 32767])],
    ids=["uint16", "int32", "int16"],
)
def test_wide_values_are_exact(dtype: type, values: list[int], tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([values], np.int32 if dtype != np.uint16 else np.uint16)).save(path)
    assert read_label(path).tolist() == [values]
    labels = LabelsConfig(map={values[0]: 0, values[1]: 1, values[2]: None})
    assert decoded(path, Classes.numbered(2), labels).tolist() == [[0, 1, 255]]
    assert "1 pixels have label" in refused(path, Classes.numbered(2), LabelsConfig(ignore=(values[1],)))


@pytest.mark.parametrize(("bits", "form", "expected"), [(8, 2, -2), (8, 1, 254), (32, 1, 2**32 - 2), (32, 2, -2)])
def test_the_sign_is_that_of_the_file(bits: int, form: int, expected: int, tmp_path: Path) -> None:
    """Pillow takes 8 bits for unsigned and 32 for signed ones."""
    path = tmp_path / "a.tif"
    values = np.array([[0, -2]], np.int8 if bits == 8 else np.int32)
    Image.fromarray(values.view(np.uint8) if bits == 8 else values).save(path, tiffinfo={339: 2})
    entry = struct.pack("<HHIH", 339, 3, 1, 2)
    assert entry in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(entry, struct.pack("<HHIH", 339, 3, 1, form)))
    assert read_label(path).tolist() == [[0, expected]]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.webp", "lossy WebP"), ("a.jp2", "JPEG 2000"), ("a.tif", "TIFF with jpeg compression")],
)
def test_other_formats_with_loss(name: str, words: str, tmp_path: Path) -> None:
    options: dict[str, dict[str, object]] = {
        "a.webp": {"quality": 90},
        "a.jp2": {"irreversible": True},
        "a.tif": {"compression": "jpeg"},
    }
    grey = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(grey).save(tmp_path / name, **options[name])
    with pytest.raises(ImageError, match=f"{words}, which changes values"):
        read_label(tmp_path / name)


def test_the_same_formats_without_loss(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    for name, options in (("a.webp", {"lossless": True}), ("a.tif", {"compression": "tiff_lzw"})):
        Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / name, **options)
        assert torch.equal(read_label(tmp_path / name), torch.from_numpy(values).long())


def test_16_bits_in_three_channels_are_refused(tmp_path: Path) -> None:
    """Pillow keeps the upper half of each."""
    header = bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, 2, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(png(header, bytes([0, 0, 5, 0, 5, 0, 5])))
    with pytest.raises(ImageError, match="16 bits in each of several channels"):
        read_label(tmp_path / "a.png")


def png(header: bytes, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_pgm_that_scales_its_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5\n# made by hand\n2 1\n18\n\x00\x12")
    with pytest.raises(ImageError, match="fractions of 18, expected 255 or 65535; save it as PNG"):
        read_label(tmp_path / "a.pgm")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 255\n\x00\x12")
    assert read_label(tmp_path / "a.pgm").tolist() == [[0, 18]]


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_several_images_in_a_file_are_refused(suffix: str, tmp_path: Path) -> None:
    first, second = (Image.new("L", (6, 4), value) for value in (0, 200))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    with pytest.raises(ImageError, match=rf"a\.{suffix}: holds 2 images, expected one"):
        read_label(tmp_path / f"a.{suffix}")


def test_bands_that_would_be_dropped_are_refused(cases: Path) -> None:
    with pytest.raises(ImageError, match="holds 4 bands, expected 1 or 3"):
        read_label(cases / "image_rgb_nir_unmarked.tif")


def test_an_opaque_alpha_channel_says_nothing(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30, 255], [200, 0, 0, 255]]], np.uint8)
    assert decoded(saved(tmp_path / "a.png", pixels), RGB, COLOUR).tolist() == [[0, 1]]
    pixels[0, 0, 3] = 254
    assert "without transparency" in refused(saved(tmp_path / "b.png", pixels), RGB, COLOUR)


# ---- colours


def test_colours_of_every_kind_of_file(tmp_path: Path) -> None:
    classes = Classes(("ground", "line"), ((0, 0, 0), (255, 255, 255)))
    for name, mode in (("a", "1"), ("b", "L"), ("c", "P"), ("d", "RGB")):
        path = saved(tmp_path / f"{name}.png", [[0, 255, 255]], mode=mode)
        assert decoded(path, classes, COLOUR).tolist() == [[0, 1, 1]]


def test_other_colours_are_mapped(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[[10, 20, 30], [224, 224, 192], [1, 2, 3], [200, 0, 0]]])
    labels = replace(COLOUR, map={"224 224 192": None, "#010203": "tree", "car": 0})
    assert decoded(path, RGB, labels).tolist() == [[0, 255, 2, 0]]


def test_near_colours_only_if_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[[12, 18, 30], [200, 3, 0], [0, 255, 7], [12, 18, 30]]])
    assert "2 pixels have colour 12 18 30" in refused(path, RGB, replace(COLOUR, tolerance=1))
    assert "1 pixels have colour 200 3 0" in refused(path, RGB, replace(COLOUR, tolerance=2))
    assert decoded(path, RGB, replace(COLOUR, tolerance=3)).tolist() == [[0, 1, 2, 0]]


def test_a_tolerance_never_reaches_two_classes(tmp_path: Path) -> None:
    close = replace(RGB, palette=((10, 20, 30), (10, 20, 37), (0, 255, 7)))
    path = saved(tmp_path / "a.png", [[[10, 20, 33], [10, 20, 34], [0, 255, 7]]])
    assert decoded(path, close, replace(COLOUR, tolerance=3)).tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match=r"10 20 30 and 10 20 37 are 7 apart, .* expected at most 3"):
        decoded(path, close, replace(COLOUR, tolerance=4))


def test_two_colours_of_one_class_may_be_near(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[[10, 20, 34], [200, 0, 0]]])
    labels = replace(COLOUR, map={"10 20 37": "road"}, tolerance=5)
    assert decoded(path, RGB, labels).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="'#010203' is a colour that is given twice"):
        decoded(path, RGB, replace(COLOUR, map={"1 2 3": 0, "#010203": 1}))


def test_classes_that_colours_cannot_tell(data: Path) -> None:
    (data / "classes.txt").write_text("road 1 2 3\ncar\n")
    with pytest.raises(ValueError, match=r"class 'car' has no colour; write 'car R G B' in classes\.txt"):
        folder(data, labels=COLOUR)
    (data / "classes.txt").write_text("road 1 2 3\ncar 1 2 3\n")
    with pytest.raises(ValueError, match="'road' and 'car' have one colour, 1 2 3"):
        folder(data, labels=COLOUR)


# ---- palettes of index images


def flat(colours: object) -> list[int]:
    return [int(channel) for colour in colours for channel in colour]  # type: ignore[attr-defined]  # of any kind


@pytest.mark.parametrize(
    ("palette", "classes"),
    [
        (RGB.palette, RGB),
        ([*RGB.palette[:2], (9, 9, 9)], RGB),  # of a class that is not in the file
        ([(k, k, k) for k in range(256)], RGB),
        ([(0, 0, 0), (255, 255, 255)], RGB),
        ([wheel(k) for k in range(256)], RGB),
        ([(200, 0, 0), (10, 20, 30)], Classes.numbered(3)),
        ([(200, 0, 0), (10, 20, 30)], replace(RGB, guessed=(0, 1, 2))),
    ],
    ids=["equal", "equal where used", "grey", "black and white", "VOC", "numbered", "no colours given"],
)
def test_palettes_of_index_images(palette: object, classes: Classes, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[0, 1, 1, 0]], palette=flat(palette))
    assert decoded(path, classes).tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize(
    "palette", [[(200, 0, 0), (10, 20, 30)], [(255, 255, 255), (0, 0, 0)], [(10, 20, 30), (0, 255, 7)]], ids=str
)
def test_palettes_that_contradict(palette: object, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[0, 1, 1, 0]], palette=flat(palette))
    assert "the palette contradicts the indices" in refused(path, RGB)


def test_greys_that_are_colours_of_classes_are_no_ramp(tmp_path: Path) -> None:
    classes = Classes(("line", "paper", "ground"), ((255, 255, 255), (9, 9, 9), (0, 0, 0)))
    path = saved(tmp_path / "a.png", [[0, 1, 1, 0]], palette=flat([(0, 0, 0), (255, 255, 255)]))
    assert "that of 'ground', expected 255 255 255 of 'line'" in refused(path, classes)
    assert decoded(path, classes, COLOUR).tolist() == [[2, 0, 0, 2]]


def test_a_void_index_has_any_colour(tmp_path: Path) -> None:
    """As in PASCAL VOC's files."""
    palette = [*RGB.palette, *[(0, 0, 0)] * 252, (224, 224, 192)]
    path = saved(tmp_path / "a.png", [[0, 1, 2, 255]], palette=flat(palette))
    assert decoded(path, RGB).tolist() == [[0, 1, 2, 255]]


def test_a_palette_is_that_of_the_mapped_classes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[7, 8]], palette=flat([(0, 0, 0)] * 7 + list(RGB.palette)))
    assert decoded(path, RGB, LabelsConfig(map={7: 0, 8: 1})).tolist() == [[0, 1]]
    assert "7 has colour 10 20 30, that of 'road', expected 200 0 0 of 'car'" in refused(
        path, RGB, LabelsConfig(map={7: 1, 8: 0})
    )


def test_a_mask_is_white_where_it_is_class_1(tmp_path: Path) -> None:
    """Whatever numbers an encoder gives black and white."""
    labels = LabelsConfig(black_white=True)
    path = saved(tmp_path / "a.png", [[0, 1]], palette=flat([(0, 0, 0), (255, 255, 255)]))
    assert decoded(path, Classes.numbered(2), labels).tolist() == [[0, 1]]
    path = saved(tmp_path / "b.png", [[0, 1]], palette=flat([(255, 255, 255), (0, 0, 0)]))
    assert "0 is shown as white, expected black" in refused(path, Classes.numbered(2), labels)
    classes = Classes(("ground", "line"), ((0, 0, 0), (255, 255, 255)))
    assert decoded(path, classes, COLOUR).tolist() == [[1, 0]]


def test_soft_edges_of_masks(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[0, 127, 128, 255]])
    message = refused(path, Classes.numbered(2), LabelsConfig(black_white=True))
    assert "label 127, expected 0 or 255, the first at row 0, column 1 (and 1 pixels with others)" in message
    assert "{name: colour, tolerance: 127}" in message
    classes = Classes(("ground", "line"), ((0, 0, 0), (255, 255, 255)))
    assert decoded(path, classes, replace(COLOUR, tolerance=127)).tolist() == [[0, 0, 1, 1]]


# ---- maps


def test_a_map_in_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[0, 7, 8, 2, 255]])
    (tmp_path / "map.yaml").write_text("7: car\n'8': 2\ntree: road\n0: null\n")
    labels = LabelsConfig(map=str(tmp_path / "map.yaml"))
    assert decoded(path, RGB, labels).tolist() == [[255, 1, 2, 0, 255]]


def test_with_a_map_other_values_mean_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", [[7, 1]])
    message = refused(path, RGB, LabelsConfig(map={7: "car"}))
    assert "1 pixels have label 1, expected a value of data.labels.map ([7]) or 255 (ignored)" in message
    assert decoded(path, RGB, LabelsConfig(map={7: "car"}, ignore=(1,))).tolist() == [[1, 255]]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ("7: bus", r"'bus' is no class, expected 0\.\.2, null for ignored, or one of road, car, tree"),
        ("7: 3", "3 is no class"),
        ("bus: car", "'bus', expected a value of the label files, or one of road"),
        ("no: car", "expected names or numbers, or null for ignored; put names such as 'no'"),
        ("- 7", "expected lines 'value: class'"),
        ("7: car\n7: tree", "key 7 is given twice"),
        ("7: car\n'7': tree", "'7' is value 7, which is given twice"),
    ],
)
def test_bad_maps(entries: str, words: str, data: Path) -> None:
    (data / "classes.txt").write_text("road\ncar\ntree\n")
    (data / "map.yaml").write_text(entries)
    with pytest.raises(ValueError, match=rf"map.*{words}"):
        folder(data, labels=LabelsConfig(map=str(data / "map.yaml")))


# ---- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "color"}, "data.labels.name = 'color', expected 'index' or 'colour'"),
        ({"tolerance": 3}, "tolerance is for name: colour"),
        ({"name": "colour", "tolerance": 128}, "tolerance = 128"),
        ({"name": "colour", "ignore": (3,)}, "ignore is for name: index"),
        ({"name": "colour", "black_white": True}, "black_white is for name: index"),
        ({"zero_is_void": True, "black_white": True}, "zero_is_void and black_white are given"),
        ({"map": {1: 0}, "zero_is_void": True}, "map and zero_is_void are given"),
        ({"map": {}}, "map is empty"),
        ({"black_white": True, "ignore": (255,)}, "black_white makes 255 class 1"),
    ],
)
def test_settings_that_contradict(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LabelsConfig(**settings)  # type: ignore[arg-type]  # some are wrong


def test_the_same_setting_in_two_places(data: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.ignore = \[1\] and data\.labels\.ignore = \[2\]: give only one"):
        DataConfig("folder", str(data), ignore=(1,), labels=LabelsConfig(ignore=(2,)))
    old, new = (
        DataConfig("folder", str(data), **given).read("")  # type: ignore[arg-type]  # one of both
        for given in ({"ignore": (1,)}, {"labels": LabelsConfig(ignore=(1,))})
    )
    assert old.digest() == new.digest()


@pytest.mark.parametrize("given", ["{7: road, 'car': 1, 8: null}", "map.yaml"])
def test_the_command_line_reads_maps(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.yaml").write_text("7: road\n")
    parser = Parser()
    parser.add_argument("--data", type=DataConfig)
    arguments = ["--data.name=folder", "--data.root=x", "--data.labels.map", given]
    found = parser.instantiate(parser.parse_args(arguments)).data.labels.map
    assert found == ({7: "road", "car": 1, 8: None} if given.startswith("{") else given)


# ---- suffixes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        Image.new("L", (6, 4)).save(tmp_path / kind / "a.png")
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    return tmp_path


def test_images_and_labels_in_one_folder(data: Path) -> None:
    (data / "labels" / "a.png").rename(data / "images" / "7_mask.png")
    (data / "labels").rmdir()
    for image, suffix in (("7_sat.jpg", "_sat"), ("7.jpg", "")):
        (data / "images" / "a.png").rename(data / "images" / image)
        (sample,) = folder(data, image_suffix=suffix, label_suffix="_mask").samples
        assert sample == Sample("7", data / "images" / image, data / "images" / "7_mask.png")
        (data / "images" / image).rename(data / "images" / "a.png")


def test_files_without_the_suffix_are_no_samples(data: Path) -> None:
    Image.new("L", (6, 4)).save(data / "images" / "b_left.png")
    Image.new("L", (6, 4)).save(data / "labels" / "b_ids.png")
    assert [sample.name for sample in folder(data, image_suffix="_left", label_suffix="_ids").samples] == ["b"]
    with pytest.raises(ValueError, match=r"b_left\.png: no label .*labels/b_gt\.png"):
        folder(data, image_suffix="_left", label_suffix="_gt")


# ---- what a split shows


def masks(data: Path, *values: list[list[int]], classes: int = 2) -> Dataset:
    for index, value in enumerate(values):
        for kind in ("images", "labels"):
            saved(data / kind / f"{index}.png", value)
    for kind in ("images", "labels"):
        (data / kind / "a.png").unlink(missing_ok=True)
    (data / "classes.txt").write_text("".join(f"class {k}\n" for k in range(classes)))
    return folder(data)


def test_classes_that_are_never_there_are_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_labels(masks(data, [[0, 1]], [[2, 2]], classes=3), "training split")
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        check_labels(masks(data, [[0, 1]], [[0, 0]], classes=3), "training split")
    assert "training split: in the first 2 label files there is no pixel of class 2; check data.labels" in caplog.text


def test_labels_that_are_all_ignored_are_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_labels(masks(data, [[255, 255]]), "training split")
    assert "training split: in the label file every pixel is ignored" in caplog.text


def test_masks_among_more_classes_are_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A street of nothing but road is one, too."""
    check_labels(masks(data, [[0, 255]], classes=3), "test split")
    assert "all values are 0 or 255, and 255 means ignored, so there is only class 0; if they are masks" in caplog.text


def test_a_rim_of_255_is_no_mask(data: Path) -> None:
    check_labels(masks(data, [[0, 255]], [[1, 255]]), "test split")
    told = replace(masks(data, [[0, 255]], [[0, 255]]), labels=LabelsConfig(ignore=(255,)))
    check_labels(told, "test split")


def test_few_files_are_read_where_all_classes_are_there(data: Path) -> None:
    dataset = masks(data, [[0, 1]], [[0, 1]])
    (data / "labels" / "1.png").write_bytes(b"no image")
    check_labels(dataset, "test split")


def test_unlabelled_splits_are_left_alone(data: Path) -> None:
    dataset = masks(data, [[0, 255]])
    check_labels(replace(dataset, samples=tuple(replace(s, label=None) for s in dataset.samples)), "test split")


@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.slow), "evaluate", "assess"])
def test_commands_look_first(
    command: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a base is loaded: here there is none."""
    masks(data, [[0, 255, 255]])
    for split in ("train", "val", "test"):
        (data / f"{split}.txt").write_text("0\n")
    config = {
        "data": {"name": "folder", "root": "."},
        "base": {"name": "unet:no.safetensors", "ratio": 0.5},
        "out": "run",
    }
    (data / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(data)
    more = {"train": [], "evaluate": ["--refiner", "no"], "assess": ["--dense", "teacher"]}[command]
    assert main([command, "config.yaml", *more]) == 1
    assert "all values are 0 or 255" in (told := capsys.readouterr().err)
    assert "set data.black_white: true" in told


# ---- EXIF


def turned(path: Path, orientation: int, size: tuple[int, int] = (6, 4)) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", size).save(path, exif=exif)
    return path


def test_image_and_label_turned_alike(tmp_path: Path) -> None:
    sample = Sample("a", turned(tmp_path / "a.jpg", 6), turned(tmp_path / "b.png", 6))
    image, label = Dataset((sample,), Classes.numbered(2)).read(0)
    assert image.shape[1:] == label.shape == (6, 4)


def test_sizes_can_prove_that_a_label_was_drawn_on_the_turned_picture(tmp_path: Path) -> None:
    sample = Sample("a", turned(tmp_path / "a.jpg", 6), turned(tmp_path / "b.png", 1, (4, 6)))
    image, label = Dataset((sample,), Classes.numbered(2)).read(0)
    assert image.shape[1:] == label.shape == (6, 4)


@pytest.mark.parametrize(("orientation", "size"), [(6, (6, 4)), (6, (5, 5)), (3, (6, 4)), (2, (6, 4))])
def test_what_sizes_cannot_prove_is_asked(orientation: int, size: tuple[int, int], tmp_path: Path) -> None:
    image, label = turned(tmp_path / "a.jpg", orientation, size), turned(tmp_path / "b.png", 1, size)
    with pytest.raises(
        ValueError, match=r"a\.jpg: EXIF says orientation .* images\.exif: apply .* images\.exif: ignore"
    ):
        Dataset((Sample("a", image, label),), Classes.numbered(2)).read(0)


@pytest.mark.parametrize(("exif", "expected"), [("apply", [[5, 4, 3], [2, 1, 0]]), ("ignore", [[0, 1, 2], [3, 4, 5]])])
@pytest.mark.parametrize("own", [1, 8])
def test_both_are_turned_or_neither(exif: str, expected: list[list[int]], own: int, tmp_path: Path) -> None:
    tag, tag_of_label = Image.Exif(), Image.Exif()
    tag[0x0112], tag_of_label[0x0112] = 3, own
    pixels = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    pixels.save(tmp_path / "a.png", exif=tag)
    pixels.save(tmp_path / "b.png", exif=tag_of_label)
    images = ImageConfig(exif=exif)  # type: ignore[arg-type]  # one of both
    sample = Sample("a", tmp_path / "a.png", tmp_path / "b.png")
    image, label = Dataset((sample,), Classes.numbered(6), images=images).read(0)
    assert label.tolist() == expected
    assert image[0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_label_is_turned_once(suffix: str, orientation: int, tmp_path: Path) -> None:
    """By whoever: Pillow turns a TIFF when it is loaded."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    stored = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    stored.save(tmp_path / f"a.{suffix}", exif=tag)
    expected = stored if orientation == 1 else stored.transpose(TURNS[orientation])
    assert read_label(tmp_path / f"a.{suffix}").tolist() == np.array(expected).tolist()
    assert stored_size(tmp_path / f"a.{suffix}") == (2, 3)


def test_to_look_for_exif_does_not_decode_a_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert orientation_of(tmp_path / "a.png") == 1


# ---- digest


def test_the_digest_covers_what_values_mean(data: Path) -> None:
    (data / "classes.txt").write_text("road 0 0 0\ncar 1 1 1\n")
    (data / "map.yaml").write_text("0: 0\n")
    settings = [
        LabelsConfig(),
        COLOUR,
        replace(COLOUR, map={"5 5 5": 1}),
        LabelsConfig(zero_is_void=True),
        LabelsConfig(map={0: 1}),
        LabelsConfig(map={0: 1}, ignore=(7,)),
        LabelsConfig(map=str(data / "map.yaml")),
    ]
    digests = [folder(data, labels=labels).digest() for labels in settings]
    (data / "map.yaml").write_text("0: 0\n1: 1\n")
    digests.append(folder(data, labels=settings[-1]).digest())
    assert len(set(digests)) == len(digests)
