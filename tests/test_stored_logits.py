"""Stored coarse logits belong to one base and one image; anything else in their place is refused in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from sparserefine.bases.base import BaseConfig
from sparserefine.bases.families.unet import UNet, save_unet
from sparserefine.commands.main import main
from sparserefine.data.readers.config import DataConfig
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.files import tensors, whole
from sparserefine.files.digest import sha256_of
from sparserefine.files.lock import locked
from sparserefine.images.classes import Classes
from sparserefine.training.config import Config, LogitsConfig
from sparserefine.training.logits import Bases, CoarseLogits
from sparserefine.training.stored_logits import StoredLogits, StoredSplit

LOGITS = torch.linspace(-3, 3, 60).view(3, 4, 5)


def written(store: StoredLogits, name: str, logits: torch.Tensor = LOGITS, digest: str = "d") -> StoredLogits:
    store.write(name, logits, base="UNet:1", image_size=(8, 10), digest=digest)
    return store


def test_logits_come_back_in_half_precision(tmp_path: Path) -> None:
    logits = LOGITS * 1e6  # more than half precision holds
    read = written(StoredLogits(tmp_path), "a/b", logits).read("a/b", base="UNet:1", image_size=(8, 10), digest="d")
    assert read.dtype == torch.float16
    assert torch.equal(read, logits.clamp(-65504, 65504).half())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"base": "UNet:2"}, "logits of base UNet:1, this configuration has base UNet:2"),
        ({"image_size": (9, 10)}, "8x10 pixels, this image has 9x10"),
        ({"digest": "other"}, r"logits of an image that has changed since, or is read otherwise now \(images\)"),
    ],
)
def test_logits_of_something_else_are_refused(wanted: dict[str, object], words: str, tmp_path: Path) -> None:
    store = written(StoredLogits(tmp_path), "a")
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{words}; run `sparserefine logits --overwrite`"):
        store.read("a", **{"base": "UNet:1", "image_size": (8, 10), "digest": "d", **wanted})


def test_missing_logits(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none.*: no stored logits; run `sparserefine logits` with this configuration"
    ):
        StoredLogits(tmp_path).read("none", base="UNet:1")


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    store = written(StoredLogits(tmp_path), "a")
    store.path("a").rename(store.path("b"))
    with pytest.raises(ValueError, match=r"b\.safetensors: logits of image 'a', expected 'b'"):
        store.read("b", base="UNet:1")


def headed(**entries: str | None) -> dict[str, str]:
    """A header that fits, with these entries changed, or left out."""
    header = {"format_version": "2", "name": "a", "base": "UNet:1", "image": "8x10", "image_sha256": "d", **entries}
    return {name: value for name, value in header.items() if value is not None}


NAN = LOGITS.half().masked_fill(LOGITS < -2, torch.nan)


@pytest.mark.parametrize(
    ("content", "header", "words"),
    [
        ({"logits": LOGITS.half()}, headed(format_version="1"), "format_version 1, expected 2"),
        ({"logits": LOGITS.half()}, {}, "format_version None, expected 2"),
        ({"logits": LOGITS.half()}, headed(image_sha256=None), "its header lacks image_sha256"),
        ({"logits": LOGITS}, headed(), r"logits are torch.float32 \[3, 4, 5\], expected torch.float16 \[K, h, w\]"),
        ({"logits": LOGITS.to(torch.int64)}, headed(), "logits are torch.int64"),
        ({"logits": LOGITS.half()[0]}, headed(), r"logits are torch.float16 \[4, 5\]"),
        ({"logits": LOGITS.half()[:, :0]}, headed(), r"logits are torch.float16 \[3, 0, 5\]"),
        ({"weight": LOGITS.half()}, headed(), "holds 1 tensors, expected one called 'logits'"),
        ({"logits": NAN}, headed(), f"{int(NAN.isnan().sum())} of 60 coarse logits of base UNet:1 are NaN or infinite"),
    ],
)
def test_foreign_files_are_refused(
    content: dict[str, torch.Tensor], header: dict[str, str], words: str, tmp_path: Path
) -> None:
    save_file(content, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(
        ValueError, match=rf"^[^\n]*a\.safetensors: {words}[^\n]*; run `sparserefine logits --overwrite`"
    ):
        StoredLogits(tmp_path).read("a", base="UNet:1")


@pytest.mark.parametrize("length", [0, 4, 50, -2])
def test_cut_files_are_refused(length: int, tmp_path: Path) -> None:
    path = written(StoredLogits(tmp_path), "a").path("a")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.safetensors: not a safetensors file, or cut short .*--overwrite"):
        StoredLogits(tmp_path).read("a", base="UNet:1")


def test_a_pipe_is_refused_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is a FIFO .*, expected stored logits"):
        StoredLogits(tmp_path).read("a", base="UNet:1")


@pytest.mark.parametrize("name", ["x" * 251, "y/" + "é" * 125, "z\n\x1b[31m", os.fsdecode(b"\xff\xfe")])
def test_any_name_of_an_image_has_a_file(name: str, tmp_path: Path) -> None:
    store = written(StoredLogits(tmp_path), name)
    assert store.read(name, base="UNet:1", digest="d").shape == LOGITS.shape
    assert len(os.fsencode(store.path(name).name)) <= 255
    if len(name) > 100:
        assert store.path(name) != store.path(name[:-1] + "w")


# ---- with images


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, 100, 50)).save(path)


@pytest.fixture
def split(tmp_path: Path) -> StoredSplit:
    """Two images and their stored logits."""
    store, samples = StoredLogits(tmp_path / "logits"), []
    for value, name in enumerate("ab"):
        picture(tmp_path / f"{name}.png", value)
        samples.append(Sample(name, tmp_path / f"{name}.png", tmp_path / f"{name}.png"))
        written(store, name, digest=sha256_of(samples[-1].image))
    return StoredSplit(store.folder, Dataset(tuple(samples), Classes.numbered(2)), ("UNet:1",) * 2)


def test_a_split_that_fits(split: StoredSplit) -> None:
    split.check()
    assert torch.equal(split(1, (8, 10)), LOGITS.half())


def test_swapped_images_are_refused(split: StoredSplit, tmp_path: Path) -> None:
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    (tmp_path / "c.png").rename(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"a\.safetensors: logits of an image that has changed since"):
        split.check()


def test_swapped_logits_are_refused(split: StoredSplit) -> None:
    a, b, c = (split.folder / f"{name}.safetensors" for name in "abc")
    a.rename(c)
    b.rename(a)
    c.rename(b)
    with pytest.raises(ValueError, match=r"a\.safetensors: logits of image 'b', expected 'a'"):
        split.check()


def test_all_images_are_compared(split: StoredSplit, tmp_path: Path) -> None:
    picture(tmp_path / "b.png", 200)
    with pytest.raises(ValueError, match=r"b\.safetensors: logits of an image that has changed since"):
        split.check()


def test_a_vanished_image_is_named(split: StoredSplit, tmp_path: Path) -> None:
    (tmp_path / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png: no such file, expected an image"):
        split.check()


# ---- the command


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of two training images and one to validate with, a base and a configuration, in the current folder."""
    for value, name in enumerate(("train/0", "train/1", "val/0")):
        picture(tmp_path / "data" / "images" / f"{name}.png", value)
        label = tmp_path / "data" / "labels" / f"{name}.png"
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 16)).save(label)
    (tmp_path / "data" / "classes.txt").write_text("ground\nline\n")
    save_unet(UNet(2, (4,)), tmp_path / "base.safetensors")
    config = {
        "data": {"name": "folder", "root": "data"},
        "base": {"name": "unet:base.safetensors", "ratio": 0.5},
        "out": "run",
        "logits": {"source": "stored", "folder": "logits"},
        "training": {"device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored_for_training() -> StoredSplit:
    """What training does with stored logits when it starts."""
    data, base = DataConfig("folder", "data"), BaseConfig("unet:base.safetensors", ratio=0.5)
    config, device = Config(data, base, "run", logits=LogitsConfig("stored", "logits")), torch.device("cpu")
    return CoarseLogits(config, data.read("train"), device, Bases(base, device)).stored()


def spoiled(project: Path, how: str) -> Path:
    """Makes the stored logits of ``train/1`` unfit; returns their file."""
    path = project / "logits" / "train" / "1.safetensors"
    if how == "image changed":
        picture(project / "data" / "images" / "train" / "1.png", 200)
    elif how == "older version":
        save_file(load_file(path), path, metadata={"format_version": "1", "base": "UNet:1", "image": "16x20"})
    elif how == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "NaN":
        with tensors.safe_open(path, framework="pt") as file:
            header = file.metadata()
        save_file({"logits": load_file(path)["logits"] * torch.nan}, path, metadata=header)
    return path


@pytest.mark.parametrize("how", ["image changed", "older version", "foreign", "cut", "NaN"])
def test_what_does_not_fit_is_refused_and_overwrite_mends_it(
    how: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logits", "config.yaml"]) == 0
    assert "3 stored in logits, 0 were there already" in capsys.readouterr().out
    path = spoiled(project, how)
    before = path.read_bytes()
    assert main(["logits", "config.yaml"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "train/1.safetensors" in error
    assert "run `sparserefine logits --overwrite`" in error
    assert path.read_bytes() == before
    if how != "NaN":  # training finds that when it reads the file
        with pytest.raises(ValueError, match=r"train/1\.safetensors.*--overwrite"):
            stored_for_training()
    assert main(["logits", "config.yaml", "--overwrite"]) == 0
    assert "1 stored in logits, 2 were there already" in capsys.readouterr().out
    stored_for_training()
    assert main(["logits", "config.yaml"]) == 0
    assert "0 stored in logits, 3 were there already" in capsys.readouterr().out


def test_a_renamed_sample_has_no_logits(project: Path) -> None:
    assert main(["logits", "config.yaml"]) == 0
    for kind in ("images", "labels"):
        (project / "data" / kind / "train" / "1.png").rename(project / "data" / kind / "train" / "2.png")
    with pytest.raises(ValueError, match=r"train/2\.safetensors: no stored logits; run `sparserefine logits`"):
        stored_for_training()


def test_a_moved_dataset_keeps_its_logits(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logits", "config.yaml"]) == 0
    (project / "data").rename(project / "moved")
    assert main(["logits", "config.yaml", "--data.root", "moved"]) == 0
    assert "0 stored in logits, 3 were there already" in capsys.readouterr().out


def test_leftovers_of_killed_runs_are_swept(project: Path) -> None:
    left = project / "logits" / "train" / f".sparserefine-{whole._host()}-999999999-0123abcd.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assert main(["logits", "config.yaml"]) == 0
    assert sorted(path.name for path in left.parent.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_two_runs_do_not_write_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked("logits", "logits"):
        assert main(["logits", "config.yaml"]) == 1
    assert "logits: logits (process" in capsys.readouterr().err
    assert main(["logits", "config.yaml"]) == 0


def test_a_full_disk_leaves_whole_files(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tensors.save_file

    def full(content: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if metadata["name"] == "train/1":
            Path(path).write_bytes(b"half")
            raise tensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(content, path, metadata)

    monkeypatch.setattr(tensors, "save_file", full)
    assert main(["logits", "config.yaml"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparserefine logits:")]
    assert "train/1.safetensors: cannot be written" in error
    assert "No space left" in error
    assert [path.name for path in (project / "logits").rglob("*") if path.is_file()] == ["0.safetensors"]


@pytest.mark.parametrize("folder", ["", " "])
def test_an_empty_folder_is_refused(folder: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = ["--logits.source", "live"]  # for stored logits the configuration itself refuses it
    assert main(["logits", "config.yaml", *live, "--logits.folder", folder]) == 1
    assert "logits.folder is empty" in capsys.readouterr().err


def test_an_empty_data_folder_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("data", ".", dirs_exist_ok=True)  # what an empty path would read
    assert main(["logits", "config.yaml", "--data.root", ""]) != 0
    assert "data.root is empty" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = StoredLogits.write

    def interrupted(self: StoredLogits, name: str, logits: torch.Tensor, **options: object) -> None:
        if name == "train/1":
            raise KeyboardInterrupt
        original(self, name, logits, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StoredLogits, "write", interrupted)
        assert main(["logits", "config.yaml"]) == 130
    assert [path.name for path in (project / "logits").rglob("*") if path.is_file()] == ["0.safetensors"]
    assert main(["logits", "config.yaml"]) == 0
    assert "2 stored in logits, 1 were there already" in capsys.readouterr().out
