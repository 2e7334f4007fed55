"""Assessment before training: what could be won, against label maps made by hand; prices, verdicts, the command."""

import json
import math
import shutil
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from lines import lines_image
from projects import write_project
from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet
from sparserefine.commands.main import main
from sparserefine.files.images import read_image
from sparserefine.files.labels import read_label
from sparserefine.images.classes import Classes
from sparserefine.machine.exhausted import out_of_memory
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.confusion import binned_confusion, confusion, dice
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.selector import Selector
from sparserefine.studies import assess as module
from sparserefine.studies.assess import assess, ladder
from sparserefine.studies.assessment import Cost, Rung, judge
from sparserefine.studies.scoring import dense_labels
from sparserefine.training.teacher import Teacher
from sparserefine.training.teacher_config import TeacherConfig

SIZE = (64, 80)
CPU = torch.device("cpu")
MS = {"base": 8.0, "labels": 2.0, "dense": 100.0}


def bright(x, sharpness=6.0):
    """Logits of a line: it knows all about the generated images, as far as it sees them."""
    z = sharpness * x.mean(1, keepdim=True)
    return torch.cat([torch.zeros_like(z), z], 1)


def base_at(ratio, model=bright):
    return FrozenBase(model, 2, BaseConfig(ratio=ratio))


def untrained(base, **selector):
    torch.manual_seed(0)
    config = RefinerConfig(selector=Selector(**(selector or {"threshold": 0.1})), extractor=ExtractorConfig((4, 8)))
    return SparseRefiner(base, config)


@pytest.fixture
def images(tmp_path):
    for seed in range(3):
        lines_image(tmp_path, seed, SIZE)
    files = [(str(seed), f"images/{seed}.png", f"labels/{seed}.png") for seed in range(3)]
    return [(name, read_image(tmp_path / image), read_label(tmp_path / label)) for name, image, label in files]


@pytest.fixture
def clock(monkeypatch):
    """Predictions take what :data:`MS` says; refinement 10 ms, and 100 ms more for each pixel of the image refined."""
    runs = []

    class Watch:
        def __init__(self, device, repeats):
            pass

        def time(self, kind, run):
            result = run()
            runs.append(kind)
            ms = 10 + 100 * result[0].density if kind == "refined" else MS[kind]
            return result, ms, 7.0

    monkeypatch.setattr(module, "Stopwatch", Watch)
    return runs


def test_what_could_be_won_is_that_of_label_maps_made_by_hand(images, clock):
    base, dense = base_at(0.25), base_at(1.0)
    refiner = untrained(base, threshold=0.1, budget=7)
    found = assess(refiner, images, dense)
    assert found.images == ("0", "1", "2")
    assert found.scored_on == "labels"
    assert [rung.threshold for rung in found.rungs] == sorted({*ladder(2), 0.1})
    engine = refiner.engine.on(torch.device("cpu"))
    totals = {name: torch.zeros(2, 2, dtype=torch.int64) for name in ("coarse", "dense")}
    for rung in found.rungs:
        won, known, share = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), 0.0
        for _, image, truth in images:
            coarse, entropy = engine.uncertainty(refiner.coarse_of(base(image[None]), SIZE))
            labels = dense_labels(engine, dense(image[None]), SIZE, "logits")[0]
            sites = entropy[0] > rung.threshold
            share += float(sites.float().mean()) / len(images)
            won += confusion(torch.where(sites, labels, coarse[0]), truth, 2)
            known += confusion(torch.where(sites, truth, coarse[0]), truth, 2)
            if rung is found.rungs[0]:
                totals["coarse"] += confusion(coarse[0], truth, 2)
                totals["dense"] += confusion(labels, truth, 2)
        assert rung.score == pytest.approx(float(dice(won)[1]))
        assert rung.oracle == pytest.approx(float(dice(known)[1]))
        assert rung.density == pytest.approx(share)
        gap = found.dense.score - found.coarse.score
        assert rung.share == pytest.approx((rung.score - found.coarse.score) / gap)
    for name, matrix in totals.items():
        assert getattr(found, name).score == pytest.approx(float(dice(matrix)[1]))
    assert found.dense.score > found.coarse.score + 0.1
    assert found.dense_better == 3
    assert refiner.selector == Selector(0.1, 7)  # as it was


def test_prices_are_those_of_an_untrained_refiner(images, clock):
    found = assess(untrained(base_at(0.25)), images, base_at(1.0))
    assert (found.coarse.ms, found.dense.ms, found.dense.peak_mb) == (10.0, 100.0, 7.0)
    assert 2 * len(images) <= clock.count("refined") <= 3 * len(images)
    for rung in found.rungs:
        if rung.density < 0.3:  # others are not run
            assert rung.ms == pytest.approx(8 + 10 + 100 * rung.density, rel=0.15)
    assert all(cheap.ms <= dear.ms for dear, cheap in zip(found.rungs, found.rungs[1:], strict=False))


def test_operations_are_those_of_the_refiner_at_that_threshold(images, clock):
    torch.manual_seed(0)
    base = FrozenBase(UNet(2, (4, 8)), 2, BaseConfig(ratio=0.5))
    refiner, dense = untrained(base), base_at(1.0)
    found = assess(refiner, images[:1], dense)
    refiner.selector = Selector(found.rungs[-1].threshold)
    with torch.no_grad():
        macs = refiner(images[0][1][None]).macs
    assert found.rungs[-1].gmacs == pytest.approx(sum(macs.values()) / 1e9)
    assert found.coarse.gmacs == pytest.approx(macs["base"] / 1e9)


def test_worth_it(images, clock):
    found = assess(untrained(base_at(0.25)), images, base_at(1.0))
    assert found.verdict == "worth it"
    chosen = next(rung for rung in found.rungs if rung.threshold == found.threshold)
    gains = [rung.score - found.coarse.score for rung in found.rungs]
    keeping = [r for r, gain in zip(found.rungs, gains, strict=True) if gain >= 0.95 * max(gains)]
    assert chosen is keeping[-1]
    table = found.table()
    assert table.count("<- start here") == 1
    assert f"selector.threshold: {found.threshold:g}" in table
    assert f"{found.coarse.score:.4f}" in table
    assert "dense is better than coarse on 3 of 3" in table


def test_a_base_that_gains_nothing_at_full_resolution(images, clock):
    """Labels: the dense model is worse than the base. No labels: both say the same."""
    worse = assess(untrained(base_at(1.0)), images, base_at(0.25))
    assert (worse.verdict, worse.threshold) == ("no gain", None)
    assert all(rung.share is None for rung in worse.rungs)
    assert "not worth it" in worse.table()
    assert "--dense NAME" in worse.reason
    unlabelled = [(name, image, torch.full_like(label, 255)) for name, image, label in images]
    same = assess(untrained(base_at(1.0)), unlabelled, base_at(1.0))
    assert (same.verdict, same.scored_on, same.coarse.score) == ("no gain", "dense", 1.0)
    assert "same labels" in same.reason


def test_without_labels_the_dense_model_stands_for_the_truth(images, clock):
    unlabelled = [(name, image, torch.full_like(label, 255)) for name, image, label in images]
    found = assess(untrained(base_at(0.25)), unlabelled, base_at(1.0))
    assert (found.scored_on, found.dense.score, found.dense_better) == ("dense", 1.0, None)
    assert all(rung.oracle is None for rung in found.rungs)
    assert found.verdict == "worth it"
    assert "lifts the agreement (Dice) from" in found.reason
    assert "nothing here knows whether they are right" in found.reason
    assert "oracle" not in found.table()


def test_a_base_that_is_sure_of_its_errors(images, clock):
    found = assess(untrained(base_at(0.25, lambda x: bright(x, 1e4))), images, base_at(1.0))
    assert found.verdict == "confident errors"
    assert "not where the base is unsure" in found.table()


def test_three_classes_are_scored_by_miou(images, clock):
    def three(x):
        return torch.cat([bright(x), bright(x)[:, 1:] - 2], 1)

    base, dense = (FrozenBase(three, 3, BaseConfig(ratio=ratio)) for ratio in (0.25, 1.0))
    found = assess(untrained(base), images, dense)
    assert found.score == "miou"
    assert "mIoU" in found.table()
    assert found.rungs[-1].threshold == pytest.approx(0.9 * math.log(3), rel=0.05)


COARSE, DENSE = Cost(0.70, 20.0, 1.0, 1.0), Cost(0.80, 100.0, 10.0, 1.0)


def rungs(*values):
    """Rungs of (score, ms)."""
    return [Rung(0.1 * (i + 1), 0.5 / (i + 1), score, None, None, ms, None) for i, (score, ms) in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "verdict", "threshold"),
    [
        ([(0.80, 60), (0.797, 40), (0.75, 30)], "worth it", 0.2),  # 97 % of the gain, cheaper
        ([(0.80, 120), (0.796, 90), (0.76, 30)], "worth it", 0.3),  # 60 % of it, the rest is too dear
        ([(0.80, 120), (0.796, 90), (0.74, 30)], "too slow", None),
        ([(0.80, 120), (0.80, 110), (0.80, 81)], "too slow", None),
        ([(0.701, 60), (0.701, 40), (0.70, 30)], "confident errors", None),
    ],
)
def test_the_rule(values, verdict, threshold):
    found, at, reason = judge(rungs(*values), COARSE, DENSE, "labels", "dice")
    assert (found, at) == (verdict, None if threshold is None else pytest.approx(threshold))
    assert ("Verdict: worth it" in reason) == (verdict == "worth it")
    assert "\nNext: " in reason


def test_a_dense_model_that_is_better_at_a_few_pixels_only():
    worse = replace(DENSE, score=0.68)
    verdict, at, reason = judge(rungs((0.69, 60), (0.73, 40)), COARSE, worse, "labels", "miou")
    assert (verdict, at) == ("no gain", None)
    assert "Only at the pixels above 0.2 nats are its labels better (0.7300)" in reason


def test_binned_confusion_is_that_of_the_pixels_of_each_bin():
    generator = torch.Generator().manual_seed(0)
    labels, truth, bins = (torch.randint(0, 3, (20, 30), generator=generator, dtype=torch.uint8) for _ in range(3))
    truth[:4] = 255
    found = binned_confusion(labels, truth, bins, 3, 4)
    for b in range(4):
        assert torch.equal(found[b], confusion(labels[bins == b], truth[bins == b], 3))


def test_at_least_one_image_whatever_the_time(images, clock):
    assert assess(untrained(base_at(0.25)), images, base_at(1.0), minutes=-1.0).images == ("0",)
    assert clock.count("refined") == 2


def test_no_image_begins_that_would_end_too_late(images, clock, monkeypatch):
    """Each image takes 25 s of a clock that only the dense prediction moves."""
    now, lines, timed = [0.0], [], module.Stopwatch.time
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(watch, kind, run):
        now[0] += 25 * (kind == "dense")
        return timed(watch, kind, run)

    monkeypatch.setattr(module.Stopwatch, "time", slow)
    found = assess(untrained(base_at(0.25)), images, base_at(1.0), minutes=1.0, progress=lines.append)
    assert found.images == ("0", "1")
    assert found.seconds == 50
    assert sum("dense model" in line for line in lines) == 2


def test_no_image():
    with pytest.raises(ValueError, match="no image to assess"):
        assess(untrained(base_at(0.25)), [], base_at(1.0))


def test_a_class_that_never_occurs(images, clock):
    nothing = base_at(1.0, lambda x: torch.cat([torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1])], 1))
    coarse = FrozenBase(
        nothing.model, 2, BaseConfig(ratio=0.5), classes=Classes(("ground", "line\n"), ((0, 0, 0),) * 2)
    )
    with pytest.raises(ValueError, match=r"class 1, 'line\\n', occurs in no label"):
        assess(untrained(coarse), [(n, x, torch.zeros_like(y)) for n, x, y in images], nothing)


@pytest.mark.parametrize(
    ("error", "fits"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), False),
        (RuntimeError("MPS backend out of memory"), False),
        (RuntimeError("shapes differ"), True),
    ],
)
def test_a_dense_model_that_does_not_fit(error, fits, images, clock):
    def fails(x):
        raise error

    with pytest.raises(RuntimeError if fits else ValueError) as caught:
        assess(untrained(base_at(0.25)), images, base_at(1.0, fails))
    if not fits:
        assert "64 x 80 pixels does not fit into the memory of cpu" in str(caught.value)
        assert "--dense_ratio 0.5" in str(caught.value)


def test_a_teacher_in_windows_is_the_same_dense_model(images, clock, project):
    """It sees each pixel for itself, so windows change nothing."""
    config = TeacherConfig("python:bright_model:build", window=32, overlap=0)
    teacher = Teacher(config, BaseConfig("python:bright_model:build", ratio=0.25), Classes.numbered(2), CPU)
    whole, windows = (assess(untrained(base_at(0.25)), images, dense) for dense in (base_at(1.0), teacher))
    assert windows.dense.score == whole.dense.score
    assert [rung.score for rung in windows.rungs] == [rung.score for rung in whole.rungs]


def test_refinement_that_does_not_fit_at_high_densities_is_left_out(images, clock, monkeypatch):
    refiner, tried = untrained(base_at(0.25)), []
    refine = refiner.refine

    def small(image, logits, valid=None):
        result = refine(image, logits)
        tried.append(result.density)
        if len(set(tried)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(refiner, "refine", small)
    found = assess(refiner, images[:1], base_at(1.0))
    assert len(set(tried)) == 2
    assert found.rungs[0].ms > found.rungs[-1].ms  # in proportion to what was seen


def test_an_error_of_values_is_no_lack_of_memory():
    assert not out_of_memory(ValueError("an image that says 'out of memory'"))
    assert out_of_memory(MemoryError())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project whose base knows lines; the working directory is its folder."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bright_model.py").write_text(
        "import torch\ndef build():\n    return bright\n"
        "def bright(x):\n    z = 6 * x.mean(1, keepdim=True)\n    return torch.cat([torch.zeros_like(z), z], 1)\n"
    )
    monkeypatch.delitem(sys.modules, "bright_model", raising=False)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["base"] = {"name": "python:bright_model:build", "ratio": 0.25}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_command(project, capsys):
    assert main(["assess", "config.yaml", "--json", "out/a.json", "--split", "train", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "base python:bright_model:build at ratio 0.25; dense python:bright_model:build at ratio 1" in printed.out
    assert "2 images in " in printed.out
    assert "Verdict: " in printed.out
    assert "dense model, input of 72 x 88 pixels" in printed.err
    report = json.loads((project / "out/a.json").read_text())
    assert set(report) == set(asdict(judged()))
    assert sorted(report["images"]) == ["0", "1"]
    assert {"threshold", "density", "score", "share", "oracle", "ms", "gmacs"} == set(report["rungs"][0])
    assert report["dense"]["score"] > report["coarse"]["score"]
    assert 0.1 in [rung["threshold"] for rung in report["rungs"]]  # the configuration's


def judged():
    """Any assessment, for its fields."""
    from sparserefine.studies.assessment import Assessment

    judgement = judge(rungs((0.8, 60)), COARSE, DENSE, "labels", "dice")
    return Assessment((), 0.0, "labels", "dice", COARSE, DENSE, 1, (), *judgement)


def test_the_dense_model_is_the_teacher_unless_another_is_named(project, capsys):
    def described(*options):
        assert main(["assess", "config.yaml", "--device", "cpu", "--most_images", "1", *options]) == 0
        return capsys.readouterr().out.splitlines()[0].partition("; dense ")[2]

    teacher = ["--teacher.name", "unet:other.safetensors", "--teacher.ratio", "0.5"]
    assert described(*teacher) == "unet:other.safetensors at ratio 0.5"
    assert described(*teacher, "--dense", "teacher", "--dense_ratio", "1") == "unet:other.safetensors at ratio 1"
    assert described(*teacher, "--dense", "unet:base.safetensors") == "unet:base.safetensors at ratio 1"
    assert described("--teacher.window", "64", "--teacher.overlap", "0") == "python:bright_model:build at ratio 1"
    assert described("--teacher.size", "[72, 88]") == "python:bright_model:build at 72x88"


def test_the_command_without_labels(project, capsys):
    shutil.rmtree(project / "data/labels")
    assert main(["assess", "config.yaml", "--minutes", "0.0001", "--split", "train", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "1 image in " in printed
    assert "by agreement with the dense model" in printed


def test_the_command_says_how_to_train(project, capsys, clock):
    assert main(["assess", "config.yaml", "--device", "cpu", "--most_images", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("sparserefine train config.yaml --selector.threshold 0.")
    shutil.rmtree(project / "data/labels")
    assert main(["assess", "config.yaml", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith(" --training.targets teacher\n")


def test_the_number_of_images_has_another_name(project, capsys):
    """``images`` is a section of the configuration."""
    assert main(["assess", "config.yaml", "--images", "3"]) == 2
    assert capsys.readouterr().err == "sparserefine assess: option --images is called --most_images now\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--most_images", "0"], "--most_images = 0, expected"),
        (["--most_images", "11"], "--most_images = 11, expected"),
        (["--minutes", "0"], "--minutes = 0"),
        (["--json", "."], "is a folder"),
        (["--dense_ratio", "2"], "--dense_ratio = 2.0, expected"),
    ],
)
def test_what_cannot_be_is_refused(project, options, words, capsys):
    assert main(["assess", "config.yaml", "--device", "cpu", *options]) == 1
    assert words in capsys.readouterr().err
