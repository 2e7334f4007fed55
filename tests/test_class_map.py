"""Class maps: files, errors that name the class, and probabilities that add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparserefine import BaseConfig, Classes, FrozenBase, SparseRefiner
from sparserefine.bases.class_map import merged, read_class_map
from sparserefine.bases.loaded import LoadedModel
from sparserefine.images.classes import CITYSCAPES, read_classes
from support import assert_close

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "camvid"
DATA = Classes(("ground", "thing"), ((0, 0, 0), (9, 9, 9)))
MODEL = Classes(("road", "grass", "car", "sky"), ((0, 0, 0),) * 4)
WHOLE = {"road": "ground", "grass": "ground", "car": "thing", "sky": None}


def write(path: Path, entries: dict) -> Path:
    def plain(value):
        return "null" if value is None else f"'{value}'" if isinstance(value, str) else value

    path.write_text("\n".join(f"{plain(key)}: {plain(value)}" for key, value in entries.items()) + "\n")
    return path


@pytest.mark.parametrize(
    ("entries", "model", "data"),
    [
        (WHOLE, MODEL, DATA),
        ({0: "ground", 1: "ground", "car": "thing", 3: None}, MODEL, DATA),
        ({0: 0, 1: 0, 2: 1, 3: None}, MODEL, DATA),
        ({0: 0, 1: 0, 2: 1, 3: None}, 4, 2),
        ({3: None, 2: 1, 1: 0, 0: 0}, None, None),
    ],
    ids=["names", "mixed", "numbers", "only counts known", "nothing known"],
)
def test_names_and_numbers(tmp_path, entries, model, data):
    assert read_class_map(write(tmp_path / "map.yaml", entries), model, data) == (0, 0, 1, -1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({**WHOLE, "boat": "thing"}, "class 'boat' of the model: unknown, expected one of road, grass, car, sky"),
        ({**WHOLE, "sky": "heaven"}, "class 'heaven' of the data: unknown, expected one of ground, thing"),
        ({**WHOLE, "sky": 2}, r"class 2 of the data: expected 0\.\.1"),
        ({**WHOLE, 4: None}, r"class 4 of the model: expected 0\.\.3"),
        ({**WHOLE, 0: "thing"}, "class 0 of the model .* is given twice"),
        ({**WHOLE, "car": "ground"}, "no class of the model maps to class 'thing' of the data"),
        (
            {"road": "ground", "car": "thing"},
            "2 of 4 classes of the model have no line, the first is 'grass'.*'grass: nu",
        ),
        ({**WHOLE, True: "thing"}, "class True of the model: expected a name or a number; put names such as 'no'"),
        ({}, "expected a line"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, entries, message):
    path = write(tmp_path / "map.yaml", entries)
    with pytest.raises(ValueError, match=rf"class map .*map\.yaml.*{message}"):
        read_class_map(path, MODEL, DATA)


def test_names_need_names(tmp_path):
    with pytest.raises(ValueError, match="its class names are not known; use numbers"):
        read_class_map(write(tmp_path / "map.yaml", WHOLE), 4, 2)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [", b"- road\n", b"road"])
def test_other_files(tmp_path, content):
    path = tmp_path / "map.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"map\.yaml"):
        read_class_map(path, MODEL, DATA)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"^class map .*nowhere\.yaml: no such file, expected a class map$"):
        read_class_map(tmp_path / "nowhere.yaml", MODEL, DATA)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.permutations([0, 0, 1, 2, -1]), st.integers(0, 1000))
def test_probabilities_add_up(class_map, seed):
    """Softmax of what is merged == sums of the softmax, renormalised over the classes that are mapped."""
    logits = 5 * torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.zeros(2, 3, 3, 2, dtype=torch.float64)
    for index, target in enumerate(class_map):
        if target >= 0:
            expected[:, target] += logits.softmax(1)[:, index]
    assert_close(merged(logits, tuple(class_map), "logits").softmax(1), expected / expected.sum(1, keepdim=True))
    scores = logits.softmax(1)
    assert_close(merged(scores, tuple(class_map), "scores"), expected)


def test_large_logits_stay_finite():
    assert merged(torch.full((1, 3, 1, 1), 300.0), (0, 0, 1), "logits").isfinite().all()


def four(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1] * 2], 1)


def test_base_with_a_map(tmp_path):
    path = write(tmp_path / "map.yaml", WHOLE)
    config = BaseConfig(ratio=1.0, class_map=str(path))
    base = FrozenBase(LoadedModel(four, 4, MODEL), config=config, classes=DATA)
    image = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    output = base(image)
    assert output.shape == (2, 2, 4, 5)
    assert_close(output[:, 1], base.model((image / 255 - mean_of(base)) / std_of(base))[:, 2])
    refiner = SparseRefiner(base)
    assert refiner.classes == DATA
    assert refiner(image).labels().max() <= 1
    assert base.config.class_map == (0, 0, 1, -1), "stored as numbers, so that the file is not needed again"


def mean_of(base: FrozenBase) -> Tensor:
    return torch.tensor(base.mean).view(3, 1, 1)


def std_of(base: FrozenBase) -> Tensor:
    return torch.tensor(base.std).view(3, 1, 1)


def test_other_class_count_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"4 classes, the data has 2; give a class map \(base\.class_map, or "):
        FrozenBase(LoadedModel(four, 4, MODEL), 2, BaseConfig(ratio=1.0))
    with pytest.raises(ValueError, match=r"4 classes, expected 2; give a class map"):  # known only when it runs
        FrozenBase(four, 2, BaseConfig(ratio=1.0))(torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ((0, 1, 1), "has 3 entries, expected 4: one per class of the model"),
        ((0, 1, 1, 2), r"maps to class 2, the data has 0\.\.1"),
        ((0, 1, 1, -2), "maps to class -2"),
        ((0, 0, 0, -1), "no class of the model maps to class 1 of the data"),
    ],
)
def test_maps_in_numbers_are_checked(class_map, message):
    with pytest.raises(ValueError, match=message):
        FrozenBase(LoadedModel(four, 4), 2, BaseConfig(ratio=1.0, class_map=class_map))


def test_output_that_does_not_fit_the_map():
    base = FrozenBase(four, 2, BaseConfig(ratio=1.0, class_map=(0, 1, 1)))
    with pytest.raises(ValueError, match="4 classes, expected 3"):
        base(torch.rand(1, 3, 2, 2))


def test_identity_tells_maps_apart():
    a, b = (FrozenBase(four, 2, BaseConfig(ratio=1.0, class_map=m)) for m in ((0, 1, 1, -1), (0, 1, 0, -1)))
    assert a.identity != b.identity


def test_what_is_known_of_the_classes():
    loaded = LoadedModel(four, 4, MODEL)
    base = FrozenBase(loaded, config=BaseConfig(ratio=1.0))
    assert SparseRefiner(base).classes == MODEL
    assert FrozenBase(loaded, config=BaseConfig(ratio=1.0, class_map=(0, 1, 1, 2))).num_classes == 3
    with pytest.raises(ValueError, match="num_classes is missing"):
        FrozenBase(four, config=BaseConfig(ratio=1.0))
    with pytest.raises(ValueError, match="num_classes = 3, but 2 class names"):
        FrozenBase(four, 3, BaseConfig(ratio=1.0), classes=DATA)
    with pytest.raises(ValueError, match=r"config=BaseConfig\(ratio=0\.5\)"):
        FrozenBase(four, 4)


def test_normalisation_and_kind_come_from_the_model_unless_given():
    loaded = LoadedModel(four, 4, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), outputs="scores")
    base = FrozenBase(loaded, config=BaseConfig(ratio=1.0))
    assert (base.mean, base.std, base.outputs) == (loaded.mean, loaded.std, "scores")
    assert (base.config.mean, base.config.std, base.config.outputs) == (loaded.mean, loaded.std, "scores")
    given_ = FrozenBase(loaded, config=BaseConfig(ratio=1.0, mean=(0, 0, 0), outputs="logits"))
    assert (given_.mean, given_.std, given_.outputs) == ((0, 0, 0), loaded.std, "logits")


def test_the_example_maps_cityscapes_to_camvid():
    camvid = read_classes(EXAMPLE / "classes.txt")
    found = read_class_map(EXAMPLE / "from_cityscapes.yaml", CITYSCAPES, camvid)
    assert len(found) == 19
    assert found[CITYSCAPES.names.index("truck")] == camvid.names.index("car")
    assert found[CITYSCAPES.names.index("terrain")] == -1


def test_a_line_given_twice_is_refused(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("road: ground\ngrass: ground\ncar: thing\nsky: null\ncar: null\n")
    with pytest.raises(ValueError, match=r"^class map .*map\.yaml, line 5: key 'car' is given twice$"):
        read_class_map(path, MODEL, DATA)


def named(*names: str) -> Classes:
    return Classes(names, ((0, 0, 0),) * len(names))


def test_the_same_classes_in_another_order_are_refused():
    loaded = LoadedModel(four, 4, MODEL)
    with pytest.raises(ValueError, match=r"another order \(class 0 is 'road' in the model and 'car' in the data\)"):
        FrozenBase(loaded, config=BaseConfig(ratio=1.0), classes=named("car", "Grass", "road", "sky"))
    in_order = FrozenBase(loaded, config=BaseConfig(ratio=1.0), classes=named("Road", "grass", "car ", "sky"))
    assert in_order.classes.names[0] == "Road"


def test_other_names_are_warned_of(caplog):
    FrozenBase(LoadedModel(four, 4, MODEL), config=BaseConfig(ratio=1.0), classes=named("road", "lawn", "car", "sky"))
    assert "class 1 is 'grass' in the model and 'lawn' in the data" in caplog.text


def test_probabilities_taken_for_logits_are_warned_of_once(caplog):
    base = FrozenBase(lambda x: four(x).softmax(1), 4, BaseConfig(ratio=1.0))
    for _ in range(2):
        base(torch.rand(1, 3, 4, 5))
    assert caplog.text.count("look like probabilities; if so, set base.outputs: scores") == 1
    FrozenBase(four, 4, BaseConfig(ratio=1.0))(torch.rand(1, 3, 4, 5))
    assert caplog.text.count("look like probabilities") == 1
