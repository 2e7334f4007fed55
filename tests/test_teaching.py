"""Training without labels, from a configuration to a refiner that agrees with its teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.apply_func import move_data_to_device
from PIL import Image

from lines import lines_image
from projects import assert_same_run, killed_at, train
from sparserefine import SparseRefiner
from sparserefine.commands.main import main
from sparserefine.files.images import read_image
from sparserefine.images.soft_labels import SoftLabels
from sparserefine.training.items import WholeImage
from sparserefine.training.stored_teacher import StoredTeacher
from teaching import write_unlabelled_project

STORED = ["--teacher.source", "stored", "--logits.source", "stored"]
SHORT = ["--training.steps", "4", "--training.val_every", "2"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without labels; the working directory is its folder."""
    write_unlabelled_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(out: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def with_labels(project: Path) -> None:
    """Labels of the images as they were drawn."""
    for seed in range(4):
        lines_image(project / "drawn", seed, (72 + 4 * (seed % 2), 88))
    shutil.move(project / "drawn" / "labels", project / "data" / "labels")


# ---- from images alone


def test_without_labels_a_refiner_comes_to_agree_with_its_teacher(project: Path) -> None:
    assert train() == 0
    log = log_of()
    assert [set(row) for row in log] == [
        {"step", "loss", "val_agreement_coarse", "val_agreement_refined", "val_density"}
    ] * 2
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["val_agreement_refined"] > log[-1]["val_agreement_coarse"] + 0.08
    best = max(row["val_agreement_refined"] for row in log)
    refiner = SparseRefiner.from_pretrained("run/best", trust_base=True)
    agreement = dice_with_teacher(refiner, project)
    assert agreement == pytest.approx(best, abs=1e-3)


def test_a_third_class(project: Path) -> None:
    (project / "data" / "classes.txt").write_text("ground\nline\nnothing\n")
    assert train("--base.name", "python:bright_or_dark:of_three_classes") == 0
    row = log_of()[-1]
    assert row["val_agreement_refined"] > row["val_agreement_coarse"] + 0.04


def test_a_teacher_in_windows_teaches_the_same(project: Path) -> None:
    """This one looks at single pixels, so that windows need no overlap."""
    assert train(*SHORT, out="whole") == 0
    assert train(*SHORT, "--teacher.window", "32", "--teacher.overlap", "0", out="windows") == 0
    assert_same_run("whole", "windows")


def dice_with_teacher(refiner: SparseRefiner, project: Path) -> float:
    """Of the validation image, by hand: the teacher says line where the mean of the normalised pixel is above 0."""
    image = read_image(project / "data" / "images" / "2.png")
    truth = ((image / 255 - 0.47) / 0.25).mean(0) > 0
    found = refiner(image[None]).labels()[0] == 1
    return 2 * float((truth & found).sum()) / float(truth.sum() + found.sum())


def test_stored_predictions_teach_what_live_ones_do(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, out="live") == 0
    assert "the teacher's predictions, 2 images: 0.0" in capsys.readouterr().err
    assert main(["logits", "config.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "3 stored in logits, 0 were there already\n3 stored in teacher, 0 were there already\n"
    assert "coarse logits, 3 images: 0.00 MB in logits, about" in captured.err
    assert "the teacher's predictions, 3 images: 0.04 MB in teacher, about" in captured.err
    assert train(*SHORT, *STORED, out="stored") == 0
    assert_same_run("live", "stored")
    (project / "teacher" / "1.safetensors").unlink()
    assert main(["logits", "config.yaml"]) == 0  # resumes
    assert "1 stored in teacher, 2 were there already" in capsys.readouterr().out
    assert train(*SHORT, *STORED, "--training.workers", "1", out="workers") == 0
    assert_same_run("live", "workers")


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(project: Path) -> None:
    assert train(*SHORT, out="whole") == 0
    killed_at(3, *SHORT)
    assert train("--resume", *SHORT) == 0
    assert_same_run("whole", "run")


def test_where_labels_teach_too_they_must_be_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for targets in ("labels", "both"):
        assert train("--training.targets", targets) == 1
        assert f"0.png: has no label, and training.targets = '{targets}' needs labels" in capsys.readouterr().err
    assert not (project / "run" / "config.json").exists()


def test_validation_by_labels_needs_labels(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_labels(project)
    for split, names in (("train", "01"), ("val", "2")):
        for kind in ("images", "labels"):
            (project / "data" / kind / split).mkdir()
            for name in names:
                (project / "data" / kind / f"{name}.png").rename(project / "data" / kind / split / f"{name}.png")
    shutil.rmtree(project / "data" / "labels" / "val")
    assert train("--training.targets", "labels") == 1
    assert "validation with training.targets = 'labels' needs labels" in capsys.readouterr().err
    assert train("--training.targets", "both", *SHORT) == 0
    assert "val_agreement_refined" in log_of()[0]
    assert "val_refined" not in log_of()[0]


# ---- with labels too


def test_with_labels_the_best_is_chosen_by_them_and_agreement_is_shown(project: Path) -> None:
    assert train(*SHORT, out="without") == 0
    with_labels(project)
    assert train(*SHORT, out="with") == 0
    columns = {"val_coarse", "val_refined", "val_agreement_coarse", "val_agreement_refined"}
    assert columns <= set(log_of("with")[0])
    # Labels that are there but are no target change no weight.
    last = [
        SparseRefiner.from_pretrained(f"{out}/last", trust_base=True).trained_state() for out in ("with", "without")
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_both_targets_are_the_sum_of_both_losses(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparserefine.training import module

    with_labels(project)
    losses: dict[str, list[float]] = {"refinement_loss": [], "teacher_loss": []}
    for name, seen in losses.items():
        original = getattr(module, name)

        def noted(*args, original=original, seen=seen):
            loss = original(*args)
            seen.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(module, name, noted)
    once = ["--training.steps", "1", "--training.val_every", "1"]
    assert train(*once, "--training.targets", "both", "--training.teacher_weight", "0.25") == 0
    (by_labels,), (by_teacher,) = losses["refinement_loss"], losses["teacher_loss"]
    assert log_of()[0]["loss"] == pytest.approx(by_labels + 0.25 * by_teacher, abs=1e-4)
    assert by_labels != pytest.approx(by_teacher)
    assert train(*once, "--training.targets", "teacher", out="teacher") == 0
    assert log_of("teacher")[0]["loss"] == pytest.approx(by_teacher, abs=1e-4)
    assert len(losses["refinement_loss"]) == 1
    options = ["--training.temperature", "2", "--training.dice", "1"]
    assert train(*once, "--training.targets", "teacher", *options, out="options") == 0
    assert losses["teacher_loss"][-1] > 2 * by_teacher  # T^2, and Dice


@pytest.mark.parametrize(("targets", "weight"), [("teacher", "0"), ("both", "0")])
def test_the_weight_is_of_both_only(targets: str, weight: str, project: Path) -> None:
    """With the teacher alone it does nothing; with both, 0 is training by labels."""
    with_labels(project)
    assert train(*SHORT, "--training.targets", targets, "--training.teacher_weight", weight) == 0
    other = "labels" if targets == "both" else targets
    assert train(*SHORT, "--training.targets", other, out="other") == 0
    last = [SparseRefiner.from_pretrained(f"{out}/last", trust_base=True).trained_state() for out in ("run", "other")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


# ---- which teacher


def test_predictions_of_another_teacher_are_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logits", "config.yaml"]) == 0
    half = ["--teacher.ratio", "0.5"]
    for command in (["train", "config.yaml", *STORED, *half], ["logits", "config.yaml", *half]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "predictions of teacher Bright:" in error
        assert "--overwrite" in error
    assert main(["logits", "config.yaml", *half, "--overwrite"]) == 0
    assert "0 stored in logits, 3 were there already\n3 stored in teacher" in capsys.readouterr().out
    assert train(*SHORT, *STORED, *half) == 0


def test_a_changed_teacher_is_refused_by_a_run_that_goes_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--teacher.name", "unet:base.safetensors"]
    with_labels(project)
    killed_at(3, *SHORT, *other)
    assert set(json.loads((project / "run" / "run.json").read_text())["origin"]["bases"]) == {"base", "teacher"}
    shutil.copy("base.safetensors", "copy.safetensors")
    (project / "base.safetensors").write_bytes((project / "other.safetensors").read_bytes())
    assert train("--resume", *SHORT, *other) == 1
    assert "the teacher had identity UNet:" in capsys.readouterr().err
    assert train("--resume", *SHORT, "--teacher.name", "unet:copy.safetensors") == 0  # the same one elsewhere


def test_a_run_from_before_there_were_teachers_is_resumed(project: Path) -> None:
    with_labels(project)
    labels = [*SHORT, "--training.targets", "labels"]
    assert train(*labels, out="whole") == 0
    killed_at(3, *labels)
    path = project / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["teacher"], stored["training"]["targets"], stored["training"]["teacher_weight"]
    del stored["training"]["temperature"]
    path.write_text(json.dumps(stored))
    assert train("--resume", *SHORT, "--training.targets", "teacher") == 1
    config = yaml.safe_load(Path("config.yaml").read_text())
    del config["teacher"]  # as it was then
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert train("--resume", *labels) == 0
    assert_same_run("whole", "run")


def test_one_folder_for_both_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logits", "config.yaml", "--teacher.folder", "logits/"]) != 0
    assert "teacher.folder = logits.folder = 'logits/', expected a folder for each" in capsys.readouterr().err


def test_what_is_not_needed_is_not_stored(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logits", "config.yaml", "--training.targets", "labels"]) == 0
    assert capsys.readouterr().out == "3 stored in logits, 0 were there already\n"
    assert main(["logits", "config.yaml", "--logits.folder", ""]) == 0
    assert capsys.readouterr().out == "3 stored in teacher, 0 were there already\n"
    assert StoredTeacher("teacher").header("2")["teacher"].startswith("Bright:")


def test_cross_fitting_is_of_coarse_logits_only(project: Path) -> None:
    config = yaml.safe_load(Path("config.yaml").read_text())
    config["logits"]["crossfit"] = [{"split": "train", "base": "unet:other.safetensors"}]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["logits", "config.yaml"]) == 0
    assert len({StoredTeacher("teacher").header(name)["teacher"] for name in "012"}) == 1


# ---- nothing to learn, nothing to score


def test_images_without_a_pixel_to_select(
    project: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in "012":
        Image.new("RGB", (88, 72)).save(project / "data" / "images" / f"{name}.png")
    assert train(*SHORT) == 1
    assert "training split: no pixel is selected, so nothing can be learnt" in caplog.text
    assert "no pixel was selected; lower selector.threshold = 0.1" in capsys.readouterr().err


def test_a_teacher_that_finds_nothing_cannot_choose(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "--teacher.name", "unet:base.safetensors") == 1
    error = capsys.readouterr().err
    assert "in data.val = 'val' no pixel is of class 1 by the teacher; check unet:base.safetensors" in error


# ---- on devices


def test_an_image_moves_to_a_device_with_its_teacher() -> None:
    soft = SoftLabels.of(torch.randn(3, 4, 5), "logits")
    item = WholeImage("a", torch.zeros(3, 4, 5), torch.zeros(4, 5), torch.zeros(3, 2, 2), soft)
    moved = move_data_to_device(item, torch.device("meta"))
    assert moved.teacher.values.device.type == moved.teacher.classes.device.type == moved.label.device.type == "meta"
    assert move_data_to_device(item._replace(teacher=None), torch.device("meta")).teacher is None
