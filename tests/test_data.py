"""``sparserefine data``: the check of all files, and the contact sheet."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import trees
from projects import write_project
from sparserefine.commands.main import main
from sparserefine.files.images import read_image, write_png


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def check(capsys, *options):
    """Exit code, what was printed, and the JSON file."""
    code = main(["data", "check", "config.yaml", "--json", "report.json", *options])
    return code, capsys.readouterr().out, json.loads(Path("report.json").read_text())


def test_data_without_fault(capsys):
    code, text, report = check(capsys)
    assert code == 0
    assert report["findings"] == []
    assert text.endswith("\n0 mistakes\n")
    train = report["splits"]["train"]
    assert (train["images"], train["labelled"], train["ignored"]) == (2, 2, 0)
    assert train["sizes"] == {"72x88": 1, "76x88": 1}
    assert train["kinds"] == {"3 x uint8": 2}
    assert sum(train["pixels"]) == 72 * 88 + 76 * 88
    assert train["images_with"] == [2, 2]
    share = 100 * train["pixels"][1] / sum(train["pixels"])
    row = next(line for line in text.splitlines() if line.strip().startswith("line"))
    assert f"{share:.2f} %" in row


def test_every_fault_is_told_and_not_only_the_first(project, capsys):
    label = read_image(project / "labels" / "0.png")[0]
    label[3, :7] = 9
    write_png(project / "labels" / "0.png", label)
    write_png(project / "labels" / "1.png", torch.zeros(5, 6, dtype=torch.uint8))
    shutil.copy(project / "images" / "2.png", project / "images" / "3.png")
    write_png(project / "labels" / "2.png", torch.full((72, 88), 255, dtype=torch.uint8))
    write_png(project / "images" / "extra.png", torch.zeros(3, 4, 4, dtype=torch.uint8))
    write_png(project / "labels" / "extra.png", torch.zeros(4, 4, dtype=torch.uint8))
    code, text, report = check(capsys)
    assert code == 1
    found = {(f["kind"], f["split"], f["file"]) for f in report["findings"]}
    assert found >= {
        ("a file cannot be read as it is meant", "train", "0"),
        ("a file cannot be read as it is meant", "train", "1"),
        ("an image is in two splits", "test", "3"),
        ("every pixel of a label is ignored", "val", "2"),
        ("a file of images/ belongs to no split", "all", "extra.png"),
        ("a file of labels/ belongs to no split", "all", "extra.png"),
    }
    assert "7 pixels" in text
    assert text.endswith("\n4 mistakes\n")
    assert [f["wrong"] for f in report["findings"]] == sorted((f["wrong"] for f in report["findings"]), reverse=True)


def test_a_split_that_cannot_be_read_does_not_hide_the_others(project, capsys):
    (project / "train.txt").write_text("0 nothing")
    code, text, report = check(capsys)
    assert code == 1
    assert [f["kind"] for f in report["findings"]] == ["the split cannot be read"]
    assert "nothing" in text
    assert report["splits"]["val"]["images"] == 1


def test_no_test_split_is_no_mistake(project, capsys):
    (project / "test.txt").unlink()
    code, _, report = check(capsys)
    assert code == 0
    assert [(f["kind"], f["split"]) for f in report["findings"]] == [("the split cannot be read", "test")]
    assert check(capsys, "--split", "test")[0] == 1


def test_masks_of_0_and_255(project, capsys):
    for name in "0123":
        label = read_image(project / "labels" / f"{name}.png")[0]
        write_png(project / "labels" / f"{name}.png", label * 255)
    code, text, report = check(capsys)
    assert code == 1
    assert {f["kind"] for f in report["findings"] if f["wrong"]} == {"labels that can only be a mistake"}
    assert "data.black_white: true" in text
    assert check(capsys, "--data.black_white", "true")[0] == 0


def test_a_class_that_never_occurs(project, capsys):
    (project / "classes.txt").write_text("ground\nline 255 0 0\nsky 0 0 255\n")
    code, _, report = check(capsys, "--base.class_map", "[0, 1]")
    assert code == 0
    never = [f for f in report["findings"] if f["kind"] == "classes of which there is no pixel"]
    assert [f["message"] for f in never] == ["sky"] * 3


def test_exif_is_told(project, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(project / "images" / "0.png") as image:
        image.save(project / "images" / "0.png", exif=exif)
    options = ("--split", "train", "--images.exif", "ignore")
    code, text, report = check(capsys, *options)
    assert code == 0
    assert [f["file"] for f in report["findings"]] == ["0"]
    assert "orientation 3; it is read as it is stored" in text


def test_one_split_for_two_purposes_is_no_mistake(project, capsys):
    code, _, report = check(capsys, "--data.test", "val")
    assert code == 0
    assert list(report["splits"]) == ["train", "val"]
    same, *others = report["findings"]
    assert same["message"] == "test is val"
    assert {f["kind"].partition("/")[0] for f in others} == {"a file of images", "a file of labels"}


def test_data_alone_needs_no_model_and_no_run(capsys):
    data = ["--data.name", "folder", "--data.root", "data"]
    assert main(["data", "check", *data]) == 0
    assert capsys.readouterr().out.endswith("\n0 mistakes\n")
    assert main(["data", "preview", *data, "--without_base"]) == 0
    assert Path("sheet.png").is_file()
    assert main(["data", "preview", *data]) == 1
    assert "--without_base" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_of_the_page(project, capsys):
    """Those of docs/datasets.md, as they stand there."""
    page = Path(__file__).resolve().parents[1] / "docs" / "datasets.md"
    trees.TREES["camvid_colours"](Path("CamVid"), (48, 64))
    Path("config.yaml").rename("mine.yaml")
    (block,) = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for command in block.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "sparserefine"
        assert main(arguments) == 0, capsys.readouterr()
    assert {path.name for path in Path().glob("*.*n*")} >= {"found.json", "sheet.png", "labels.png"}


def test_unlabelled_data(project, capsys):
    shutil.rmtree(project / "labels")
    code, text, report = check(capsys)
    assert code == 0
    assert report["splits"]["train"]["labelled"] == 0
    assert "share of the pixels" not in text


@pytest.mark.parametrize(("options", "columns"), [((), 5), (("--without_base",), 2)])
def test_a_sheet_shows_what_training_sees(options, columns, capsys):
    assert main(["data", "preview", "config.yaml", "--out", "sheet.png", "--most_images", "2", *options]) == 0
    assert capsys.readouterr().out == "sheet.png\n"
    sheet = read_image("sheet.png")
    assert columns * 88 < sheet.shape[2] < (columns + 1) * 88
    assert 2 * 76 < sheet.shape[1] < 4 * 76


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "folder"], "--out sheet.png"),
        (["--out", "sheet.png", "--most_images", "0"], "--most_images = 0, expected"),
        (["--out", "sheet.png", "--base.name", "unet:nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_a_sheet_that_cannot_be_made(options, words, capsys):
    assert main(["data", "preview", "config.yaml", *options]) == 1
    assert words in capsys.readouterr().err
    assert not Path("sheet.png").exists()
