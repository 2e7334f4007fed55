"""Evaluation: rows against scores computed by hand from the refinement itself."""

import json
import math
from argparse import Namespace

import pytest
import torch

from sparserefine.bases.base import BaseConfig, FrozenBase
from sparserefine.bases.families.unet import UNet
from sparserefine.commands.evaluate import run
from sparserefine.files.results import write_results
from sparserefine.images.classes import Classes
from sparserefine.refiner import SparseRefiner
from sparserefine.scores.bootstrap import interval
from sparserefine.scores.confusion import confusion, dice
from sparserefine.scores.counts import Counts
from sparserefine.stages.config import RefinerConfig
from sparserefine.stages.extractor import ExtractorConfig
from sparserefine.stages.selector import Selector
from sparserefine.studies import evaluate as module
from sparserefine.studies import scoring
from sparserefine.studies.evaluate import evaluate
from sparserefine.studies.scoring import recovered


@pytest.fixture
def refiner():
    torch.manual_seed(0)
    base = FrozenBase(UNet(2, (4, 8)), 2, BaseConfig(ratio=0.5))
    config = RefinerConfig(selector=Selector(budget=300), extractor=ExtractorConfig((4, 8)))
    return SparseRefiner(base, config).eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    result = []
    for size in ((40, 48), (33, 29)):
        label = (torch.rand(size, generator=generator) < 0.3).to(torch.uint8)
        label[:3] = 255
        result.append((torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8), label))
    return result


def test_rows_are_dataset_wide_scores(refiner, images):
    result = evaluate(refiner, images, boundary_px=2)
    assert list(result.rows) == ["coarse", "sparse", "refined", "oracle"]
    expected = {name: torch.zeros(2, 2, dtype=torch.int64) for name in result.rows}
    wrong = found = 0
    with torch.no_grad():
        for image, truth in images:
            refinement = refiner(image[None])
            coarse = refinement.coarse_labels[0]
            mask = refinement.sites.mask()[0]
            oracle = torch.where(mask & (truth != 255), truth, coarse)
            sparse = coarse.clone()
            sparse[mask] = refinement.sparse_logits.argmax(1).to(torch.uint8)
            maps = {"coarse": coarse, "sparse": sparse, "refined": refinement.labels()[0], "oracle": oracle}
            for name, labels in maps.items():
                expected[name] += confusion(labels, truth, 2)
            errors = (coarse != truth) & (truth != 255)
            wrong, found = wrong + int(errors.sum()), found + int((errors & mask).sum())
    for name, matrix in expected.items():
        assert result.rows[name]["dice"] == pytest.approx(float(dice(matrix)[1])), name
    assert result.errors_selected == pytest.approx(found / wrong)
    assert result.density == pytest.approx((300 / (40 * 48) + 300 / (33 * 29)) / 2)
    assert result.rows["oracle"]["dice"] >= result.rows["coarse"]["dice"]


def test_costs(refiner, images):
    dense = FrozenBase(UNet(2, (4, 8)), 2, BaseConfig(ratio=1.0))
    result = evaluate(refiner, images, dense=dense, repeats=2)
    rows = result.rows
    assert rows["dense"]["gmacs"] > 3.5 * rows["coarse"]["gmacs"]  # four times the pixels, but for odd sizes
    assert rows["refined"]["gmacs"] > rows["coarse"]["gmacs"]
    assert all(rows[name]["ms"] > 0 and rows[name]["peak_mb"] >= 0 for name in ("coarse", "refined", "dense"))
    assert "ms" not in rows["oracle"]
    stages = {"base", "uncertainty", "select", "plan", "gather", "extractor", "ensembler"}
    assert set(result.stages_ms) == stages
    assert "oracle" in result.table()


@pytest.fixture
def dense():
    """Has both classes, unlike most networks of random weights."""
    return FrozenBase(lambda x: torch.cat([x[:, :1], x[:, 1:2]], 1), 2, BaseConfig(ratio=1.0))


def scored(maps_and_truths):
    """Dice of class 1 over all images."""
    return float(dice(sum(confusion(labels, truth, 2) for labels, truth in maps_and_truths))[1])


def test_agreement_is_the_score_on_the_dense_labels(refiner, images, dense):
    """On the pixels that the labels do not ignore; with labels and without."""
    seen = []
    result = evaluate(refiner, images, dense=dense, boundary_px=2, seen=lambda _, maps: seen.append(maps))
    assert list(result.rows) == ["coarse", "sparse", "refined", "oracle", "dense_at_sites", "dense"]
    assert list(result.agreement) == ["coarse", "sparse", "refined", "dense_at_sites", "dense"]
    for name, row in result.agreement.items():
        pairs = [
            (maps[name], torch.where(truth == 255, 255, maps["dense"]))
            for maps, (_, truth) in zip(seen, images, strict=True)
        ]
        assert row["dice"] == pytest.approx(scored(pairs)), name
    assert result.agreement["dense"]["dice"] == result.agreement["dense"]["boundary_iou"] == 1.0

    unlabelled = [(image, torch.full_like(label, 255)) for image, label in images]
    alone = evaluate(refiner, unlabelled, dense=dense, boundary_px=2)
    for name, row in alone.agreement.items():
        assert row["dice"] == pytest.approx(scored([(maps[name], maps["dense"]) for maps in seen])), name
        assert alone.rows[name]["dice"] is alone.rows[name]["boundary_iou"] is None
    assert "oracle" not in alone.rows
    assert alone.errors_selected is None
    assert alone.rows["refined"]["ms"] > 0
    assert alone.table().startswith("no labels: agreement with the dense model")
    assert f"{alone.agreement['refined']['dice']:.4f}" in alone.table()


def test_intervals_over_images(refiner, images, dense):
    """Those of the images' own counts; differences are drawn together."""
    three, seen = [*images, images[0]], []
    result = evaluate(refiner, three, dense=dense, seen=lambda _, maps: seen.append(maps))
    counts = {
        name: [Counts.of(maps[name], truth, 2) for maps, (_, truth) in zip(seen, three, strict=True)]
        for name in ("coarse", "refined", "dense")
    }
    refined = result.rows["refined"]
    assert refined["interval"] == interval(Counts.dice, counts["refined"])
    assert refined["interval"][0] <= refined["dice"] <= refined["interval"][1]
    for other in ("coarse", "dense"):
        assert refined[f"above_{other}"] == interval(Counts.dice, counts["refined"], counts[other])
    assert "above_coarse" not in result.rows["coarse"]
    assert result.agreement["coarse"]["above_dense"][1] < 0
    low, high = refined["above_dense"]
    assert f"{low:+.4f} to {high:+.4f} above dense" in result.table()
    assert evaluate(refiner, images).rows["refined"]["interval"] is None
    assert "draws" not in evaluate(refiner, images).table()


def test_an_image_without_labels_counts_in_the_agreement_only(refiner, images, dense):
    mixed = [*images, (images[0][0], torch.full_like(images[0][1], 255))]
    labelled, both = (evaluate(refiner, part, dense=dense, boundary_px=2) for part in (images, mixed))
    for name in labelled.rows:
        for score in ("dice", "boundary_iou", "accuracy"):
            assert both.rows[name][score] == labelled.rows[name][score]
    assert both.agreement["coarse"]["dice"] != labelled.agreement["coarse"]["dice"]


def test_dense_at_sites_bounds_what_a_refiner_learns_from_dense(refiner, images, dense):
    seen = []
    evaluate(refiner, images, dense=dense, seen=lambda *shown: seen.append(shown))
    for refinement, maps in seen:
        sites = refinement.sites.mask()[0]
        assert torch.equal(maps["dense_at_sites"], torch.where(sites, maps["dense"], maps["coarse"]))


def test_recovered_shares(refiner, images, dense):
    """Of Dice for two classes; undefined where there is nothing to recover, with the reason."""
    rows = evaluate(refiner, images, dense=dense).rows
    table = evaluate(refiner, images, dense=dense).table()
    coarse = rows["coarse"]["dice"]
    for key, bound in (("recovered", "dense"), ("recovered_at_sites", "dense_at_sites")):
        gain = rows[bound]["dice"] - coarse
        for name, row in rows.items():
            if name == "oracle":
                assert key not in row
            elif gain < 0.0005:
                assert row[key] is None
            else:
                assert row[key] == pytest.approx((row["dice"] - coarse) / gain)
    same = evaluate(refiner, images, dense=refiner.base)  # the base is its own dense model: nothing to recover
    for part in (same.rows, same.agreement):
        assert part["refined"]["recovered"] is None
        assert part["refined"]["recovered_at_sites"] is None
    lines = same.table().splitlines()
    reasons = [line for line in lines if line.startswith(("no share", "agreement: no share"))]
    assert len(reasons) == 4
    assert f"dense scores {same.rows['dense']['dice']:.4f}, coarse {coarse:.4f}" in reasons[0]
    assert "recovered" in table


@pytest.mark.parametrize(
    ("score", "bound", "share"),
    [
        (0.79, 0.80, 0.5),
        (0.78, 0.80, 0.0),
        (0.77, 0.80, -0.5),
        (0.9, 0.7804, None),
        (0.9, 0.7, None),
        (None, 0.8, None),
    ],
)
def test_recovered_share_by_hand(score, bound, share):
    assert recovered(score, 0.78, bound) == (None if share is None else pytest.approx(share))


def test_the_recovered_share_of_three_classes_is_that_of_miou(images):
    torch.manual_seed(0)
    base, peer = (FrozenBase(lambda x: x, 3, BaseConfig(ratio=ratio)) for ratio in (0.5, 1.0))
    config = RefinerConfig(selector=Selector(budget=300), extractor=ExtractorConfig((4, 8)))
    result = evaluate(SparseRefiner(base, config).eval(), images, dense=peer)
    rows = result.agreement
    gain = rows["dense"]["miou"] - rows["coarse"]["miou"]
    assert gain > 0.0005
    assert rows["sparse"]["recovered"] == pytest.approx((rows["sparse"]["miou"] - rows["coarse"]["miou"]) / gain)
    assert "coarse -> dense in mIoU" in result.table()


@pytest.fixture
def gpu_clock(monkeypatch):
    """The stopwatch of a GPU, without one: a clock that stands still unless a test moves it, and no memory."""

    class NoMemory:
        megabytes = 0.0

        def __init__(self, device):
            assert device.type == "cuda"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    now = [0.0]
    monkeypatch.setattr(scoring, "now_ms", lambda device: now[0])
    monkeypatch.setattr(scoring, "PeakMemory", NoMemory)
    return now


def test_on_a_gpu_what_only_the_first_run_does_is_not_timed(gpu_clock):
    """The first run of each way compiles its kernels for 500 ms; predicting takes 13 ms."""
    watch, runs = scoring.Stopwatch(torch.device("cuda"), 1), {"coarse": 0, "refined": 0}
    for image in range(3):
        for way in runs:

            def run(way=way, image=image):
                runs[way] += 1
                gpu_clock[0] += 13 if runs[way] > 1 else 500
                return way, image

            result, ms, _ = watch.time(way, run)
            assert result == (way, image)
            assert ms == 13
    assert runs == {"coarse": 1 + 3, "refined": 1 + 3}


@pytest.mark.parametrize(("device", "untimed"), [("cpu", 0), ("cuda", 1)])
def test_runs_of_each_way_of_predicting(device, untimed, refiner, images, monkeypatch, request):
    """Coarse and refined run the base, dense runs its own: on each image as often as asked for."""
    if device == "cuda":
        request.getfixturevalue("gpu_clock")
        stopwatch = scoring.Stopwatch
        monkeypatch.setattr(module, "Stopwatch", lambda _, repeats: stopwatch(torch.device(device), repeats))
    dense = FrozenBase(UNet(2, (4, 8)), 2, BaseConfig(ratio=1.0))
    calls = {"base": 0, "dense": 0}
    for name, base in (("base", refiner.base), ("dense", dense)):

        def counted(image, name=name, output=base._output):
            calls[name] += 1
            return output(image)

        monkeypatch.setattr(base, "_output", counted)
    evaluate(refiner, images, dense=dense, repeats=3)
    assert calls == {"base": 2 * (untimed + 3 * len(images)), "dense": untimed + 3 * len(images)}


def test_class_that_never_occurs_is_null(refiner, images):
    nothing = [(image, torch.zeros_like(label)) for image, label in images]
    refiner.selector = Selector(budget=0)
    with torch.no_grad():
        for parameter in refiner.base.model.parameters():
            parameter.zero_()
        refiner.base.model.head.bias[0] = 1.0  # everything is background
    result = evaluate(refiner, nothing)
    assert result.rows["coarse"]["class_iou"]["class 1"] is None
    assert math.isclose(result.rows["coarse"]["accuracy"], 1.0)


def test_no_image(refiner):
    with pytest.raises(ValueError, match="no image"):
        evaluate(refiner, [])


def test_nothing_to_score(refiner, images):
    labels = [(image, torch.full_like(label, 255)) for image, label in images]
    with pytest.raises(ValueError, match="nothing to score: every pixel of the 2 label images is ignored"):
        evaluate(refiner, labels)


def test_class_names_are_printed_on_one_line_and_stored_as_they_are(refiner, images, tmp_path):
    names = ("road\n\x1b[31m", "car", "sky")
    torch.manual_seed(0)
    base = FrozenBase(UNet(3, (4, 8)), 3, BaseConfig(ratio=0.5))
    config = RefinerConfig(selector=Selector(budget=300), extractor=ExtractorConfig((4, 8)))
    named = SparseRefiner(base, config, classes=Classes(names, ((0, 0, 0),) * 3)).eval()
    result = evaluate(named, images)
    assert all(line.isprintable() for line in result.table().split("\n"))
    assert r"road\n\x1b[31m" in result.table()
    write_results(tmp_path / "a.json", result.rows)
    assert list(json.loads((tmp_path / "a.json").read_text())["coarse"]["class_iou"]) == list(names)


def test_results_are_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    values = {"a": [1.5, math.nan, {"b": math.inf}], "c": (-math.inf, None, "NaN", 3)}
    write_results(tmp_path / "a.json", values)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None, {"b": None}], "c": [None, None, "NaN", 3]}


@pytest.mark.parametrize(("given", "words"), [("", "--json: an empty path"), (".", "is a folder")], ids=str)
def test_a_file_that_cannot_be_written_is_refused_at_the_start(given, words):
    with pytest.raises(ValueError, match=words):
        run(Namespace(json=given))
