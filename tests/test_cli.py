"""The command line as a user meets it: help, versions, and errors that are one line."""

import os
import subprocess
import sys

import pytest

import sparserefine
from sparserefine.commands.main import COMMANDS, command_named, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_help_does_not_load_torch(tmp_path):
    """From any folder, as a module; torch takes seconds to load."""
    code = (
        "import sys; from sparserefine.commands.main import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    run = subprocess.run(
        [sys.executable, "-m", "sparserefine", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout.strip() == f"sparserefine {sparserefine.__version__}"
    assert run.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"sparserefine {command}" in capsys.readouterr().out


def test_help_of_a_command_without_configuration_does_not_load_torch():
    code = (
        "import sys, contextlib; from sparserefine.commands.main import main\n"
        "for command in ('demo', 'predict', 'quantize', 'benchmark'):\n"
        "    with contextlib.suppress(SystemExit): main([command, '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_a_file(command):
    module = command_named(command)
    assert module.__name__ == f"sparserefine.commands.{command}"
    assert module.__doc__.startswith(f"``sparserefine {command}``")


def test_calibrate_is_called_quantize_now(capsys):
    assert main(["calibrate", "photos", "--refiner", "demo", "--out", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'calibrate' is called 'quantize' now" in line


def test_unknown_command_and_none(capsys):
    assert main(["refine"]) == 2
    assert "predict" in capsys.readouterr().err
    assert main([]) == 2


def test_missing_argument_is_one_line(capsys):
    assert main(["predict", "x.png"]) == 2
    error = capsys.readouterr().err
    assert "refiner" in error
    assert len(error.splitlines()) <= 2


def test_missing_refiner(capsys, tmp_path):
    assert main(["predict", "x.png", "--refiner", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_configuration(capsys):
    assert main(["train", "none.yaml"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert sparserefine.__version__ in text
    assert "torch" in text


def test_unknown_device(capsys, tmp_path):
    assert main(["demo", "--device", "abacus", "--out", str(tmp_path / "demo")]) == 1
    assert "abacus" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("precision", "words"),
    [("float8", "precision 'float8' is not known; choose from float32"), ("float16", "for GPUs, device is cpu")],
)
def test_precision_is_that_of_a_gpu(capsys, tmp_path, precision, words):
    options = ["--refiner", "demo", "--out", str(tmp_path / "out"), "--device", "cpu", "--precision", precision]
    assert main(["predict", "x.png", *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_installed_script():
    script = os.path.join(os.path.dirname(sys.executable), "sparserefine")  # noqa: PTH118, PTH120
    if not os.path.exists(script):  # noqa: PTH110
        pytest.skip("the package is on the path but not installed")
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0
