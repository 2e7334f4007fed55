"""Arguments and configurations: strict files, nothing imported, nothing empty."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from pathlib import Path

import pytest

from sparserefine.commands.main import COMMANDS, parser_of
from sparserefine.commands.parser import Parser
from sparserefine.files.image_config import ImageConfig, Percentiles

CONFIG = 'data: {name: folder, root: my_data}\nbase: {name: "hf:x", ratio: 1e-1}\nout: runs/a\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def train() -> Parser:
    return parser_of("train")


def refusal(parser: Parser, *arguments: str) -> str:
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(arguments)
    return str(error.value)


def test_a_configuration(train: Parser, config: Path) -> None:
    parsed = train.parse_args(["--config", str(config), "--training.steps", "7", "--logits.folder", ""])
    assert parsed.base.ratio == 0.1
    assert parsed.training.steps == 7
    assert parsed.data.root == "my_data"
    assert parsed.logits.folder == ""


def test_a_configuration_is_utf_8_in_any_locale(train: Parser, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(CONFIG.replace("my_data", "m\u00fc_data"), encoding="utf-8")
    real = open
    # What `open` does in a locale of another encoding, such as Windows has.
    monkeypatch.setattr("builtins.open", lambda file, mode="r", *a, **k: real(file, mode, *a, **{"encoding": "cp1252"}))
    assert train.parse_args(["--config", str(config)]).data.root == "m\u00fc_data"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONFIG + "out: runs/b\n", "mine.yaml, line 4: key 'out' is given twice"),
        (CONFIG + "training: {lr: 1, lr: 2}\n", "mine.yaml, line 4: key 'lr' is given twice"),
        (CONFIG + "x: &x [*x]\n", "mine.yaml, line 4: an alias stands for something that contains it"),
        ("- a\n", "mine.yaml: holds no 'name: value'"),
        ("\0", "mine.yaml: unacceptable character"),
        ("data: other.yaml\n", "mine.yaml: data is 'other.yaml', expected its entries"),
        (CONFIG + "<<: 3\n", "expected a mapping"),
        (CONFIG + "training: {lr: 0x" + "f" * 5000 + "}\n", "line 4: a number of 5002 characters"),
    ],
)
def test_bad_configurations(train: Parser, config: Path, text: str, message: str) -> None:
    config.write_text(text)
    assert message in refusal(train, "--config", str(config))


def test_what_is_no_file_is_no_configuration(train: Parser, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "fifo: is a FIFO" in refusal(train, "--config", str(tmp_path / "fifo"))
    assert "/dev/null: is a character device" in refusal(train, "--config=/dev/null")
    assert "is a folder, expected a configuration" in refusal(train, "--config", str(tmp_path))
    assert "none.yaml: no such file" in refusal(train, "--config", str(tmp_path / "none.yaml"))


def test_values_on_the_command_line_are_strict_too(train: Parser, config: Path) -> None:
    assert "--training other.yaml: expected entries" in refusal(
        train, "--config", str(config), "--training", "other.yaml"
    )
    assert "'out' is given twice" in refusal(train, "--config", "{out: a, out: b}")
    assert train.parse_args(["--config", str(config), "--training", "{steps: 7}"]).training.steps == 7


def test_a_list_of_entries(train: Parser, config: Path) -> None:
    config.write_text(CONFIG + "logits: {crossfit: [{split: train, base: 'unet:other.safetensors'}]}\n")
    (fold,) = train.parse_args(["--config", str(config)]).logits.crossfit
    assert (fold.split, fold.base) == ("train", "unet:other.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        "training: victim.thing",
        "training: {class_path: victim.thing}",
        "logits: {crossfit: [victim.thing]}",
        "logits: {crossfit: [{class_path: victim.thing}]}",
        "selector: {threshold: {class_path: victim.thing}}",
    ],
)
def test_a_configuration_imports_nothing(
    train: Parser, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    (tmp_path / "victim.py").write_text("thing = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    config.write_text(CONFIG + entry + "\n")
    refusal(train, "--config", str(config))
    assert "victim" not in sys.modules


EMPTY = {
    "predict": (["x.png", "--refiner", "r", "--out", "o"], ["--refiner", "--out", "--engine", "--device"]),
    "quantize": (["x.png", "--refiner", "r", "--out", "o"], ["--refiner", "--out"]),
    "train": (["--data.name", "folder", "--data.root", "d", "--out", "o"], ["--config", "--out"]),
    "logits": (["--data.name", "folder", "--data.root", "d", "--out", "o"], ["--config", "--out", "--device"]),
    "evaluate": (
        ["--data.name", "folder", "--data.root", "d", "--out", "o", "--refiner", "r"],
        ["--config", "--refiner", "--json", "--dense", "--dense_class_map"],
    ),
    "assess": (
        ["--data.name", "folder", "--data.root", "d", "--out", "o"],
        ["--config", "--json", "--dense", "--dense_class_map", "--engine"],
    ),
    "benchmark": (["--bases", "b"], ["--bases", "--masks", "--json", "--plot", "--coarse"]),
    "demo": ([], ["--device"]),
}


@pytest.mark.parametrize("command", EMPTY)
def test_no_argument_is_empty(command: str) -> None:
    """As an unset shell variable leaves it: ``--out "$OUT"``. As a path it would be the current folder."""
    parser, (given, options) = parser_of(command), EMPTY[command]
    parser.parse_args(given)
    for option in options:
        assert f"{option} is empty; is a shell variable unset?" in refusal(parser, *given, option, "")
        assert f"{option} is empty; is a shell variable unset?" in refusal(parser, *given, f"{option}=")


@pytest.mark.parametrize("command", ["predict", "quantize"])
def test_no_input_is_empty(command: str) -> None:
    options = ["--refiner", "r", "--out", "o"]
    assert "inputs is empty" in refusal(parser_of(command), "", *options)
    assert "inputs is empty" in refusal(parser_of(command), "x.png", "", *options)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_knows_traceback(command: str) -> None:
    parser = parser_of(command)
    assert any("--traceback" in action.option_strings for action in parser._actions)
    assert "--traceback" in parser.format_help()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("[0, 3000]", (0, 3000)),
        ("12bit", "12bit"),
        ("{percentile: [2, 98]}", Percentiles((2, 98))),
        ("[[0, 1], [2, 3], [4, 5]]", ((0, 1), (2, 3), (4, 5))),
        ("null", None),
    ],
)
def test_ranges_of_images(given: str, read: object, train: Parser, config: Path) -> None:
    config.write_text(f"{CONFIG}images: {{range: {given}, bands: [4, 3, 2]}}\n")
    in_file = train.instantiate(train.parse_args(["--config", str(config)])).images
    config.write_text(CONFIG)
    options = ["--images.range", given, "--images.bands", "[4, 3, 2]"]
    as_option = train.instantiate(train.parse_args(["--config", str(config), *options])).images
    assert in_file == as_option == ImageConfig(bands=(4, 3, 2), range=read)
