"""Losses, stored logits, and the road from a configuration to a prediction on generated images."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from projects import write_project
from sparserefine import PRESETS, BaseConfig, Config, EnsemblerConfig, ExtractorConfig, RefinerConfig, SparseRefiner
from sparserefine.bases.families.unet import load_unet
from sparserefine.bases.load import load_base
from sparserefine.commands.main import main
from sparserefine.data.readers.config import DataConfig
from sparserefine.training.losses import cross_entropy, refinement_loss, soft_dice
from sparserefine.training.stored_logits import StoredLogits


def test_cross_entropy_ignores_255_and_bears_nothing():
    logits = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    truth = torch.arange(20) % 3
    truth[:5] = 255
    expected = F.cross_entropy(logits[5:].float(), truth[5:])
    torch.testing.assert_close(cross_entropy(logits, truth.to(torch.uint8)), expected)
    nothing = cross_entropy(logits, torch.full((20,), 255))
    nothing.backward()
    assert nothing == 0
    assert (logits.grad == 0).all()
    assert cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.uint8)) == 0


def test_soft_dice_of_two_classes_by_hand():
    p, truth = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1, 0, 255])
    logits = torch.stack([(1 - p).log(), p.log()], dim=1)
    assert float(soft_dice(logits, truth)) == pytest.approx(1 - (2 * 0.9 + 1) / (0.9 + 0.2 + 1 + 1))


def test_refinement_loss_is_the_sum():
    sparse, refined, truth = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9) % 4
    ce = cross_entropy(sparse, truth) + cross_entropy(refined, truth)
    torch.testing.assert_close(refinement_loss(sparse, refined, truth), ce)
    both = soft_dice(sparse, truth) + soft_dice(refined, truth)
    torch.testing.assert_close(refinement_loss(sparse, refined, truth, dice=0.3), ce + 0.3 * both)


def test_weights_of_sites():
    """A weighted mean; sites whose truth is 255 count in neither sum."""
    logits, truth, weight = torch.randn(30, 3), torch.arange(30) % 3, torch.rand(30) + 0.1
    truth[:7] = 255
    each = F.cross_entropy(logits[7:], truth[7:], reduction="none")
    expected = (each * weight[7:]).sum() / weight[7:].sum()
    torch.testing.assert_close(cross_entropy(logits, truth, weight), expected)
    torch.testing.assert_close(cross_entropy(logits, truth, torch.full((30,), 3.0)), cross_entropy(logits, truth))
    assert cross_entropy(logits, torch.full((30,), 255), weight) == 0
    both = cross_entropy(logits, truth, weight) + cross_entropy(-logits, truth, weight)
    torch.testing.assert_close(refinement_loss(logits, -logits, truth, weight=weight), both)


def test_soft_dice_of_many_classes_is_that_of_the_counted_rows():
    logits, truth = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 4
    truth[5:15] = 255
    kept = truth != 255
    p, target = logits[kept].softmax(1), F.one_hot(truth[kept], 4)
    expected = 1 - ((2 * (p * target).sum(0) + 1) / (p.sum(0) + target.sum(0) + 1)).mean()
    assert float(soft_dice(logits, truth.to(torch.uint8))) == pytest.approx(float(expected), abs=1e-6)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project; the working directory is its folder."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_logits_train_evaluate_predict(project, capsys):
    assert main(["logits", "config.yaml"]) == 0
    assert "3 stored" in capsys.readouterr().out
    (project / "logits" / "2.safetensors").unlink()
    assert main(["logits", "config.yaml"]) == 0  # resumes
    assert "1 stored in logits, 2 were there" in capsys.readouterr().out

    assert main(["train", "config.yaml"]) == 0
    log = [json.loads(line) for line in (project / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [12, 24]
    assert log[-1]["loss"] < log[0]["loss"]
    # The base knows nothing; pixels do.
    assert max(line["val_refined"] for line in log) > log[0]["val_coarse"] + 0.2

    assert main(["train", "config.yaml"]) == 1  # never over an earlier run
    assert "--resume" in capsys.readouterr().err

    arguments = ["evaluate", "config.yaml", "--refiner", "run/best", "--dense", "unet:base.safetensors"]
    assert main([*arguments, "--json", "scores.json"]) == 0
    table = capsys.readouterr().out
    report = json.loads((project / "scores.json").read_text())
    assert list(report["rows"]) == ["coarse", "sparse", "refined", "oracle", "dense_at_sites", "dense"]
    assert report["agreement"]["dense"]["accuracy"] == 1
    assert {"recovered", "recovered_at_sites"} <= report["rows"]["refined"].keys()
    rows = report["rows"]
    assert rows["oracle"]["dice"] >= max(rows["refined"]["dice"], rows["coarse"]["dice"])
    assert f"{rows['refined']['dice']:.4f}" in table
    assert rows["refined"]["gmacs"] > rows["coarse"]["gmacs"] > 0
    assert 0 <= report["errors_selected"] <= 1

    (project / "broken.png").write_bytes((project / "data/images/3.png").read_bytes()[:300])
    before = (project / "data/images/3.png").read_bytes()
    assert main(["predict", "data/images/3.png", "broken.png", "--refiner", "run/best", "--out", "masks"]) == 1
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert [file.name for file in (project / "masks").iterdir()] == ["3.png"]
    assert (project / "data/images/3.png").read_bytes() == before
    with Image.open(project / "masks" / "3.png") as mask:
        assert mask.size == (88, 76)
        assert set(np.unique(np.array(mask))) <= {0, 1}


def test_images_without_labels_are_refused_where_labels_teach(project, capsys):
    (project / "data" / "labels").rename(project / "data" / "gone")
    assert main(["train", "config.yaml"]) == 1
    assert "0.png: has no label, and training.targets = 'labels' needs labels" in capsys.readouterr().err
    assert not (project / "run" / "config.json").exists()


def test_evaluate_without_labels(project, capsys):
    """Scores the agreement with a dense model, and needs one."""
    base = load_base(BaseConfig("unet:base.safetensors", ratio=0.25), 2)
    SparseRefiner(base, RefinerConfig(extractor=ExtractorConfig((8, 16)))).save_pretrained("run/best")
    shutil.rmtree(project / "data" / "labels")
    arguments = ["evaluate", "config.yaml", "--refiner", "run/best", "--json", "scores.json", "--device", "cpu"]
    assert main(arguments) == 1
    refusal = capsys.readouterr().err
    assert "the test data in data have no labels to score by" in refusal
    assert "--dense teacher (here unet:base.safetensors)" in refusal
    assert main([*arguments, "--dense", "unet:other.safetensors"]) == 0
    assert "no labels: agreement with the dense model" in capsys.readouterr().out
    report = json.loads((project / "scores.json").read_text())
    assert report["agreement"]["dense"]["accuracy"] == 1
    assert report["rows"]["refined"]["dice"] is report["errors_selected"] is None
    assert 0 <= report["differences_selected"] <= 1


def test_logits_of_another_base_are_refused(project, capsys):
    assert main(["logits", "config.yaml"]) == 0
    other = ["--base.name", "unet:other.safetensors"]
    assert main(["train", "config.yaml", *other]) == 1
    assert "logits of base" in capsys.readouterr().err
    assert main(["logits", "config.yaml", *other]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["logits", "config.yaml", *other, "--overwrite"]) == 0


def test_crossfit_takes_each_image_from_its_own_base(project):
    fold = [{"split": "train", "base": "unet:other.safetensors"}]
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["logits"]["crossfit"] = fold
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["logits", "config.yaml"]) == 0
    bases = {name: StoredLogits(project / "logits").header(name)["base"] for name in "012"}
    assert bases["0"] == bases["1"] != bases["2"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--training.learning_rate", "1"], "learning_rate"),
        (["--training.lr", "fast"], "training.lr"),
        (["--augment.crop", "[1, 2, 3]"], "augment.crop"),
        (["--base.ratio", "3"], "base.ratio"),
        (["--data.name", "coco"], "data.name"),
        (["--training.steps", "25"], "training.steps"),
        (["--selector.threshold", "0.7"], "threshold"),
        (["--base.name", "resnet:x"], "unet:<file>"),
        (["--base.name", "unet:none.safetensors"], "none.safetensors"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.val", ""], "data.val"),
        (["--boundary_px", "0"], "boundary_px"),
        (["--preset", "slim16"], "preset"),
        (["--upsampling", "nearest", "--logits.source", "live"], "base.size"),
    ],
)
def test_wrong_configuration_is_named(project, capsys, arguments, named):
    assert main(["train", "config.yaml", *arguments]) != 0
    captured = capsys.readouterr()
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert not (project / "run" / "best").exists()


def test_unknown_key_in_the_file_is_named(project, capsys):
    text = (project / "config.yaml").read_text().replace("threshold", "treshold")
    (project / "config.yaml").write_text(text)
    assert main(["train", "config.yaml"]) != 0
    assert "treshold" in capsys.readouterr().err


def test_preset_by_name(project):
    """`preset: slim16` in the file, and no extractor."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    del config["extractor"]
    config["preset"] = "slim16"
    config["training"].update(steps=1, val_every=1)
    config["logits"] = {"source": "live"}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "config.yaml"]) == 0
    stored = json.loads((project / "run" / "best" / "config.json").read_text())
    assert stored["extractor"]["planes"] == [16, 32, 64, 128, 256]


def test_normalisation_by_name(project):
    """`mean:` and `std:` in the file are the refiner's own, and are stored with it."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    config |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "logits": {"source": "live"}}
    config["training"].update(steps=1, val_every=1)
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "config.yaml"]) == 0
    refiner = SparseRefiner.from_pretrained("run/best")
    assert (refiner.config.mean, refiner.config.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert main(["train", "config.yaml", "--std", "[0.5, 0, 0.5]", "--out", "other"]) != 0
    assert not (project / "other").exists()


def test_the_choices_of_a_refiner_are_those_of_the_configuration():
    data, base = DataConfig(name="folder", root="data"), BaseConfig("unet:x", ratio=0.5)
    config = Config(data, base, "run", ensembler=EnsemblerConfig("mean"), std=(1.0, 1.0, 1.0), preset="slim16")
    expected = RefinerConfig(ensembler=EnsemblerConfig("mean"), std=(1.0, 1.0, 1.0), extractor=PRESETS["slim16"])
    assert config.refiner == expected
    assert type(config.refiner) is RefinerConfig
    with pytest.raises(ValueError, match="upsampling 'bicubic'"):
        Config(data, base, "run", upsampling="bicubic")


def test_refiner_folder_works_anywhere(project, monkeypatch, tmp_path_factory):
    """The small base travels with the refiner; saving what was loaded keeps it."""
    from sparserefine.refiner import SparseRefiner

    short = ["--logits.source", "live", "--training.steps", "1", "--training.val_every", "1"]
    assert main(["train", "config.yaml", *short]) == 0
    first = SparseRefiner.from_pretrained(project / "run" / "best")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    first.save_pretrained("copy")
    (project / "base.safetensors").unlink()
    second = SparseRefiner.from_pretrained(elsewhere / "copy")
    image = torch.randint(0, 256, (1, 3, 40, 44), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(first(image).logits(), second(image).logits())


def test_training_loads_its_base_once(project, monkeypatch):
    """A large one three times over would be most of the memory of a training run."""
    loads = []

    def counted(path):
        loads.append(str(path))
        return load_unet(path)

    monkeypatch.setattr("sparserefine.bases.families.unet.load_unet", counted)
    short = ["--logits.source", "live", "--training.steps", "1", "--training.val_every", "1"]
    assert main(["train", "config.yaml", *short]) == 0
    assert loads.count("base.safetensors") == 1


@pytest.mark.parametrize(("dense", "mean"), [("unet:other.safetensors", 0.1), ("python:dense_peer:build", 0.485)])
def test_a_dense_peer_of_another_kind_has_its_own_normalisation(dense, mean, project, monkeypatch):
    class Seen(BaseException):
        """The command line makes a line of any other exception."""

    def caught(*arguments, dense, **options):
        raise Seen(dense.mean[0])

    (project / "dense_peer.py").write_text("from torch import nn\ndef build():\n    return nn.Conv2d(3, 2, 1)\n")
    monkeypatch.delitem(sys.modules, "dense_peer", raising=False)
    base = load_base(BaseConfig("unet:base.safetensors", ratio=0.25), 2)
    SparseRefiner(base, RefinerConfig(extractor=ExtractorConfig((8, 16)))).save_pretrained("run/best")
    monkeypatch.setattr("sparserefine.studies.evaluate.evaluate", caught)
    arguments = ["evaluate", "config.yaml", "--refiner", "run/best", "--base.mean", "[0.1, 0.2, 0.3]"]
    with pytest.raises(Seen, match=f"^{mean}$"):
        main([*arguments, "--dense", dense])
