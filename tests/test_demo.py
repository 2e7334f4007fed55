"""The embedded photograph, networks and table; and that an installed package carries them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparserefine.commands.main import main
from sparserefine.refiner import SparseRefiner
from sparserefine.studies import demo as module
from sparserefine.studies.demo import ASSETS, demo, demo_refiner_folder

ROOT = Path(__file__).resolve().parents[1]
DICE = {"coarse": 0.8249, "refined": 0.8298, "dense": 0.8316}


pytestmark = pytest.mark.xdist_group("demo")  # which is shown once
PART = (slice(900, 1220), slice(1500, 1820))
"""Rows and columns of the photograph."""


@pytest.fixture(scope="module", params=["part", pytest.param("whole", marks=pytest.mark.slow)])
def report(request, tmp_path_factory):
    """The demo of the photograph, and of a part of it, which takes two seconds."""
    out = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # eight megapixels are not tiny
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("read_image", "read_label") if request.param == "part" else ():
                read = getattr(module, name)
                patch.setattr(module, name, lambda path, read=read: read(path)[..., PART[0], PART[1]])
            demo(out, device=torch.device("cpu"), repeats=1)
    finally:
        torch.set_num_threads(threads)
    return out, json.loads((out / "demo.json").read_text()), request.param


def test_table(report):
    rows = report[1]["rows"]
    for name, expected in DICE.items():
        if report[2] == "whole":
            assert rows[name]["dice"] == pytest.approx(expected, abs=0.002), name
        assert {"dice", "iou", "boundary_iou", "ms", "gmacs"} <= set(rows[name])
    assert rows["refined"]["gmacs"] < rows["dense"]["gmacs"] / 3


def test_pictures(report):
    out, _, shown = report
    pictures = sorted(file.name for file in out.glob("*.png"))
    assert [name.split("_", 1)[1] for name in pictures] == [
        "image.png", "coarse.png", "entropy.png", "sites.png", "refined.png", "changes.png", "zoom.png", "overlay.png"
    ]  # fmt: skip
    for name in pictures:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.size[0] >= (1000 if shown == "whole" else 320)
    assert sorted(out.glob("*.json")) == [out / "demo.json"]


def test_bad_output_folders_are_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    for out, words in (("", "out: an empty path; is a shell variable unset"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=words):
            demo(out, device=torch.device("cpu"))


def test_the_command_refuses_an_unset_variable(capsys):
    assert main(["demo", "--out", "", "--device", "cpu"]) == 2
    assert "--out is empty; is a shell variable unset?" in capsys.readouterr().err


def test_embedded_files_are_small():
    sizes = {file: file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()}
    assert sum(size for file, size in sizes.items() if file.suffix == ".safetensors") <= 8e6
    assert sum(sizes.values()) <= 10e6


def test_embedded_refiner_is_named_demo():
    refiner = SparseRefiner.from_pretrained(demo_refiner_folder())
    assert refiner.classes.names == ("background", "vessel")
    assert sum(p.numel() for p in refiner.base.parameters()) <= 1_000_000


def test_wheel_carries_everything(tmp_path):
    """But compiled objects, see test_native_build.py; from a copy, since building writes beside the sources."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "objects"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    subprocess.run([*command, str(tmp_path), str(tree)], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = tree / "src" / "sparserefine"
    files = [f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {f"sparserefine/{file.relative_to(package).as_posix()}" for file in files} <= names
    assert "sparserefine/py.typed" in names
