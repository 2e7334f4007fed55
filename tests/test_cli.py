"""The command line as a user meets it: help, versions, errors that are one line, signals, and what it prints."""

import errno
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparserefine
from sparserefine.bases.load import load_model
from sparserefine.commands import demo
from sparserefine.commands.main import COMMANDS, command_named, main
from sparserefine.commands.output import print_error
from sparserefine.machine.signals import Terminated, sigterm_raises


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


@pytest.fixture
def runs(monkeypatch):
    """Makes ``sparserefine demo`` run a function."""

    def set_run(function):
        monkeypatch.setattr(demo, "run", lambda arguments: function())

    return set_run


def failing(error):
    def run():
        raise error

    return run


class OutOfMemoryError(RuntimeError):
    """As ``torch.OutOfMemoryError``."""


MEMORY = "smaller images, crops or batches, or a --budget, need less"
REPORT = (
    "this may be a defect: --traceback shows where it is; report it to the maintainers, with that and what `sparser"
)


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (ValueError("a.png: no image"), ["a.png: no image"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["[Errno 28] No space left on device"]),
        (ImportError("pip install it"), ["pip install it"]),
        (TypeError("base x: returned a word"), ["base x: returned a word"]),
        (RuntimeError("broken\nin many\nlines"), ["RuntimeError: broken", REPORT]),
        (KeyError("steps"), ["KeyError: 'steps'", REPORT]),
        (ZeroDivisionError(), ["ZeroDivisionError: ZeroDivisionError", REPORT]),
        (
            RecursionError("maximum depth"),
            ["something is nested too deeply, a file or a model (maximum depth)", REPORT],
        ),
        (MemoryError(), [f"not enough memory (MemoryError); {MEMORY}"]),
        (OutOfMemoryError("CUDA out of memory"), [f"not enough memory (CUDA out of memory); {MEMORY}"]),
        (OSError(errno.ENOMEM, "Cannot allocate"), [f"not enough memory ([Errno 12] Cannot allocate); {MEMORY}"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["not enough memory (DefaultCPUAlloc"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_failed_is_a_line(capsys, runs, error, lines):
    runs(failing(error))
    assert main(["demo"]) == 1
    found = capsys.readouterr().err.splitlines()
    assert len(found) == len(lines)
    assert found[0].startswith(f"sparserefine demo: {lines[0]}")
    assert [line.startswith(start) for line, start in zip(found[1:], lines[1:], strict=True)] == [True] * len(found[1:])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError("a known one"), KeyError("an unknown one")])
def test_traceback_anywhere(capsys, runs, error, place):
    runs(failing(error))
    arguments = ["demo", "--device=cpu"]
    arguments.insert(place, "--traceback")
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "in failing" in shown or "raise error" in shown
    assert f"\nsparserefine demo: {'' if isinstance(error, ValueError) else 'KeyError: '}" in shown


def test_traceback_of_a_usage_error(capsys):
    assert main(["demo", "--no_such_option", "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "\nsparserefine demo: " in shown


@pytest.mark.parametrize("how", ["", "the same command goes on"])
@pytest.mark.parametrize(
    ("stop", "code", "word"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")]
)
def test_interruptions(capsys, runs, monkeypatch, stop, code, word, how):
    runs(failing(stop()))
    if how:
        monkeypatch.setattr(demo, "HOW_TO_GO_ON", how, raising=False)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == f"sparserefine demo: {word}{'; ' if how else ''}{how}\n"


def lightnings_answer():
    """What Lightning makes of an interruption."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(1)


def test_an_interruption_that_a_library_turns_into_an_exit(capsys, runs):
    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    runs(interrupted)
    assert main(["demo"]) == 130
    runs(lightnings_answer)
    assert main(["demo"]) == 143
    runs(lambda: sys.exit(3))
    with pytest.raises(SystemExit) as stop:
        main(["demo"])
    assert stop.value.code == 3


def test_sigterm_raises_once_and_is_handed_back():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def terminated():
        with sigterm_raises():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # while cleaning up: ignored
                seen.append("cleaned up")

    with pytest.raises(Terminated):
        terminated()
    assert seen == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) == before
    with sigterm_raises():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_sigterm_that_python_drops_is_not_the_last_one(monkeypatch):
    """An exception in ``__del__`` goes nowhere."""
    from sparserefine.machine import signals

    class Dropping:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    now = [100.0]
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)

    def terminated():
        with sigterm_raises():
            thing = Dropping()
            del thing
            for now[0] in (102.0, 104.0):
                signal.raise_signal(signal.SIGTERM)  # maybe while something cleans up
            now[0] = 105.0
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        terminated()
    assert now == [105.0]


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_a_library_makes_another_error_of_is_a_signal_still(number, stop):
    """safetensors says that a file is cut short, if a signal arrives while it reads one."""
    before = signal.getsignal(signal.SIGINT)

    def swallowed():
        with sigterm_raises():
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                raise ValueError("cut short") from None

    with pytest.raises(stop):
        swallowed()
    assert signal.getsignal(signal.SIGINT) == before


def test_lines_of_errors_have_a_length_that_can_be_read(capsys):
    print_error(f"a.png: {'x' * 100_000}; delete it")
    line = capsys.readouterr().err
    assert line.startswith("a.png: xx")
    assert line.endswith("x; delete it\n")
    assert len(line) < 4000


CHILD = """
import sys, time
from sparserefine.bases.load import load_model
from sparserefine.commands import demo
from sparserefine.commands.main import main

def run(arguments):
    try:
        print("running", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.5)
        print("clean", flush=True)

demo.run, demo.HOW_TO_GO_ON = run, "repeat it"
sys.exit(main(["demo"]))
"""


@pytest.mark.parametrize(
    ("signals", "code", "word"),
    [
        ([signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM], 143, "terminated"),
        ([signal.SIGTERM, signal.SIGTERM], 143, "terminated"),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM twice"],
)
def test_signals_to_a_process(signals, code, word):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, restore_signals=True
    )
    assert child.stdout.readline() == "running\n"
    for number, after in zip(signals, ["cleaning\n", "clean\n"], strict=False):
        child.send_signal(number)
        assert child.stdout.readline() == after
    output, errors = child.communicate(timeout=30)
    assert child.returncode == code
    assert output in ("clean\n", "")
    assert errors == f"sparserefine demo: {word}; repeat it\n"


def test_a_reader_that_leaves():
    """``sparserefine --help | head -1``. From Python 3.11 on argparse swallows it for the help of a command."""
    reader, writer = os.pipe()
    os.close(reader)
    swallowed = 0 if sys.version_info >= (3, 11) else 1
    for arguments, code in ((["--help"], 1), (["--version"], 1), (["demo", "--help"], swallowed)):
        run = subprocess.run(
            [sys.executable, "-m", "sparserefine", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        assert (run.returncode, run.stderr) == (code, "")
    os.close(writer)


def test_another_broken_pipe_is_told(capsys, runs):
    runs(failing(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "sparserefine demo: [Errno 32] Broken pipe\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "sparserefine", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 1
    assert run.stderr == "sparserefine: the output cannot be written ([Errno 28] No space left on device)\n"


def test_a_terminal_that_has_no_such_characters(monkeypatch, runs):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    runs(lambda: print("M\u00fcnchen, \udcff") or 0)
    assert main(["demo"]) == 0
    assert raw.getvalue() == b"M\\xfcnchen, \\udcff\n"


EVIL = "a\x1b[31m\nsparserefine demo: all is well"
ESCAPED = r"a\x1b[31m\nsparserefine demo: all is well"


def test_control_characters_in_errors(capsys, runs, tmp_path):
    runs(failing(ValueError(EVIL)))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"sparserefine demo: {ESCAPED}\n"
    runs(failing(KeyError(EVIL)))
    assert main(["demo"]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert main(["demo", "--traceback"]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert main([EVIL]) == 2
    assert "\x1b" not in capsys.readouterr().err
    runs(failing(FileNotFoundError(errno.ENOENT, "No such file", EVIL)))
    assert main(["demo"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_control_characters_in_files(capsys, tmp_path):
    """In the name of a refiner's folder, of an image, and in a value of a configuration."""
    assert main(["predict", "x.png", "--refiner", str(tmp_path / EVIL), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert len(shown.splitlines()) == 1
    config = tmp_path / "mine.yaml"
    config.write_text('data: {name: "\\e[31m"}\nbase: {name: "x:y", ratio: 1}\nout: o\n')
    assert main(["train", str(config)]) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "data.name" in shown


def test_control_characters_in_logs_and_warnings(capsys, runs, monkeypatch):
    def run():
        logging.getLogger("sparserefine.somewhere").warning("class %s", EVIL)
        logging.getLogger("a_library").warning(EVIL)
        logging.getLogger("a_library").info("not shown")
        sys.stderr.write(warnings.formatwarning(EVIL, FutureWarning, "a.py", 7))  # what Python shows
        return 0

    runs(run)
    before = (logging.lastResort, warnings.formatwarning, logging.getLogger("sparserefine").handlers[:])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's; a process has none
    assert main(["demo"]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert shown == [f"class {ESCAPED}", ESCAPED, f"a.py:7: FutureWarning: {ESCAPED}"]
    assert before == (logging.lastResort, warnings.formatwarning, logging.getLogger("sparserefine").handlers)


def test_info_is_escaped(capsys, monkeypatch):
    monkeypatch.setattr("sparserefine.commands.info.info", lambda: {"cpu": EVIL})
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"cpu  {ESCAPED}\n"


LIBRARIES = ("torch", "numpy", "yaml", "queue", "PIL", "jsonargparse", "typing", "logging", "psutil", "safetensors")
"""Names that files in the current folder have in the following tests."""


@pytest.fixture
def trapped(tmp_path):
    """A folder of modules that leave a note if they run."""
    folder = tmp_path / "trapped"
    folder.mkdir()
    for name in LIBRARIES:
        (folder / f"{name}.py").write_text(f"open('{folder}/RAN_{name}', 'w').close()\n")
    (folder / "my_base.py").write_text(
        "import torch\nimport my_neighbour\n\ndef make():\n    return torch.nn.Conv2d(3, 2, 1)\n"
    )
    (folder / "my_neighbour.py").write_text("def answer():\n    return 42\n")
    return folder


def ran(folder):
    return sorted(path.name for path in folder.glob("RAN_*"))


@pytest.mark.slow
def test_modules_of_the_current_folder_do_not_run(trapped):
    """Of every command, as a script; and as a module as far as Python itself leaves it to us."""
    script = trapped.parent / "sparserefine_script.py"
    script.write_text(
        "import sys\nfrom sparserefine.commands.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n        main([name, '--help'])\n    except SystemExit:\n        pass\n"
        "assert '' not in sys.path and not any('trapped' in folder for folder in sys.path), sys.path\n"
        "sys.exit(main(['predict', 'x.png', '--refiner', 'none', '--out', 'out']))\n"
    )
    for command in ([str(script)], ["-m", "sparserefine", "predict", "x.png", "--refiner", "none", "--out", "out"]):
        run = subprocess.run([sys.executable, *command], cwd=trapped, capture_output=True, text=True)
        assert ran(trapped) == []
        assert run.returncode == 1, run.stderr
        assert "none" in run.stderr


@pytest.mark.slow
def test_a_base_in_the_current_folder(trapped):
    """It is found, after all libraries."""
    base = ["--bases", "python:my_base:make", "--size", "32x32", "--presets", "slim16", "--classes", "2"]
    options = ["--densities", "0.1", "--rounds", "1", "--engine", "torch", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, "-m", "sparserefine", "benchmark", *base, *options],
        cwd=trapped,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert ran(trapped) == []


def test_a_checkout_that_is_the_current_folder_works():
    """``-S``: without site-packages, so without an installed copy."""
    source = Path(sparserefine.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-S", "-m", "sparserefine", "--version"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout == f"sparserefine {sparserefine.__version__}\n", run.stderr


def test_the_current_folder_is_searched_last_and_by_workers_too(trapped, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(trapped)
    with pytest.raises(ValueError, match="python:my_base:make: runs code"):
        load_model("python:my_base:make", trust_base=False)
    assert str(trapped) not in sys.path
    assert load_model("python:my_base:make").model.out_channels == 2
    assert sys.path[-1] == str(trapped)
    load_model("python:my_base:make")
    assert sys.path.count(str(trapped)) == 1
    try:
        with multiprocessing.get_context("spawn").Pool(1) as workers:
            assert workers.apply(sys.modules["my_neighbour"].answer) == 42
        with pytest.raises(ValueError, match=r"no 'make' in module 'queue' \(\S*queue.py\); .* is searched last"):
            load_model("python:queue:make")
    finally:
        for name in ("my_base", "my_neighbour"):
            sys.modules.pop(name, None)
    assert ran(trapped) == []


def test_a_deleted_current_folder_is_no_crash(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, '-m', 'sparserefine', '-V'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sparserefine.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], cwd=gone, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"sparserefine {sparserefine.__version__}\n"), done.stderr


def test_traceback_shows_failures_that_do_not_end_the_command(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from sparserefine.inference import predict

    def defect(*_: object) -> None:
        raise KeyError("boom")

    monkeypatch.setattr(predict, "_refine", defect)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = [
        "predict",
        str(tmp_path / "a.png"),
        "--refiner",
        "demo",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main(command) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main([*command, "--traceback"]) == 1
    shown = capsys.readouterr().err
    assert "in defect" in shown
    assert "boom" in shown


def test_a_raw_error_of_the_system_names_the_file_first(capsys, runs):
    runs(failing(PermissionError(13, "Permission denied", "folder\x1b/x")))
    assert main(["demo"]) == 1
    expected = "sparserefine demo: folder\\x1b/x: Permission denied; it may not be read or written by this user\n"
    assert capsys.readouterr().err == expected


def test_a_reader_that_leaves_an_output_without_buffer():
    environment = {**os.environ, "PYTHONPATH": str(Path(sparserefine.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sparserefine", "info"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
