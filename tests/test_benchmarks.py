"""The benchmarks run and report; nothing here judges a time."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and cores are read from Linux")


@pytest.fixture
def sparse_unet(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.sparse_unet")


@pytest.fixture
def uncertainty(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.uncertainty")


@pytest.fixture
def mask(tmp_path):
    """32 x 48, a tenth of it white."""
    image = (torch.rand(32, 48, generator=torch.Generator().manual_seed(1)) < 0.1).to(torch.uint8) * 255
    path = tmp_path / "small.png"
    Image.fromarray(image.numpy()).convert("1").save(path)
    return path


def check_types(record: dict, kind: type) -> None:
    """Each field is there, and of the type that the dataclass says."""
    assert list(record) == [field.name for field in dataclasses.fields(kind)]
    simple = {"str": str, "int": int, "float": float, "list[float]": list, "None": type(None)}
    for field in dataclasses.fields(kind):
        allowed = tuple(simple[name] for name in field.type.split(" | "))
        assert isinstance(record[field.name], allowed), field.name


@pytest.mark.slow
def test_the_network_is_timed_and_reported(sparse_unet, mask, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sparse_unet, "sgemm_gflops", lambda threads: 100.0)  # by itself: a worker, and seconds
    report = tmp_path / "report.json"
    missing = tmp_path / "no-python"
    options = ["--presets", "slim", "--engines", "torch,spconv", "--rounds", "1", "--threads", "1"]
    sparse_unet.main([*options, "--masks", str(mask), "--json", str(report), "--spconv-python", str(missing)])

    (record,) = json.loads(report.read_text())
    check_types(record, sparse_unet.Record)
    assert (record["engine"], record["preset"], record["mask"], record["threads"]) == ("torch", "slim", "small", 1)
    assert record["sites"] == int(sparse_unet.read_mask(str(mask)).sum())
    assert record["ms"] == pytest.approx(record["geometry_ms"] + record["forward_ms"])
    assert min(record["geometry_ms"], record["forward_ms"], record["gflops"], record["sgemm_share"]) > 0
    assert record["difference"] == 0
    printed = capsys.readouterr().out
    assert f"engine spconv is left out: {missing} does not start" in printed
    assert "small: 1" in printed


def test_the_matrix_product_is_timed(sparse_unet):
    assert importlib.import_module("benchmarks.common").Sgemm().round()["gflops"] > 0


@pytest.mark.slow
def test_uncertainty_is_timed_and_agrees(uncertainty, tmp_path, capsys):
    report = tmp_path / "report.json"
    options = ["--cases", "tiny", "--engines", "plain,torch", "--rounds", "1", "--threads", "1"]
    uncertainty.main([*options, "--json", str(report)])

    plain, ours = json.loads(report.read_text())
    for record in (plain, ours):
        check_types(record, uncertainty.Record)
    assert (plain["engine"], ours["engine"]) == ("plain", "torch")
    assert plain["ratio"] == 1
    assert ours["labels_agree"] > 0.99
    assert ours["entropy_difference"] < 1e-4
    assert "tiny: 5 classes, 16x24 -> 64x96" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--plans", "slim"], "option --plans is called --presets now"),
        (["--presets", "fat"], "preset 'fat' is not known; choose from paper, slim, slim16"),
        (["--engines", "gpu"], "engine 'gpu' is not known; choose from torch, cpu, spconv"),
        (["--engines", ","], "no engine is chosen; choose from torch, cpu, spconv"),
        (["--threads", "0"], "number of threads '0' is not known; choose from 1"),
        (["--rounds", "0"], "rounds = 0, expected at least 1"),
        (["--json", "no/such/folder/report.json"], "its folder does not exist"),
        (["--masks", "no.png"], "mask 'no.png' is not found"),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(sparse_unet, mask, options, words):
    with pytest.raises(SystemExit) as error:
        sparse_unet.main(["--masks", str(mask), *options])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("present", "words"),
    [(("b", "a"), "choose from a, b, or pass a PNG file"), ((), "../shared/masks is not there: pass --masks FILE.png")],
)
def test_a_missing_mask_names_those_there_are(sparse_unet, mask, monkeypatch, tmp_path, present, words):
    folder = tmp_path / "masks"
    folder.mkdir()
    for name in present:
        (folder / f"{name}.png").write_bytes(mask.read_bytes())
    monkeypatch.setattr(sys.modules["benchmarks.common"], "MASKS", folder)
    with pytest.raises(SystemExit, match=words):
        sparse_unet.main(["--masks", "c"])


@pytest.mark.slow
def test_a_training_step_is_timed_part_by_part(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT)
    training = importlib.import_module("benchmarks.training")
    report = tmp_path / "report.json"
    options = ["--rehearse", "--rounds", "1", "--device", "cpu", "--loader-threads", "0,1", "--precisions", "32-true"]
    training.main([*options, "--json", str(report)])
    records = json.loads(report.read_text())
    assert [record["engine"] for record in records] == ["auto", "torch"]
    for record in records:
        assert list(record["parts_ms"]) == list(training.PARTS)
        assert record["sites"] > 0
        assert record["step_ms"] == pytest.approx(sum(record["parts_ms"].values()))
        assert record["crops_s"] == pytest.approx(2 * record["steps_s"])
    assert "crops alone, 1 loader threads" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no folder; pass --data FOLDER"):
        training.main(["--data", str(tmp_path / "none")])
