"""The examples: the runner of stages, the stages themselves, and their configurations."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    """A script of the examples, as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stages(monkeypatch):
    """The runner."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load("stages")


@pytest.fixture
def run(stages, monkeypatch, tmp_path, capsys):
    """Runs stages given as (name, Python code, needs): what it printed, and what it ended with."""

    def run(*given, argv=()):
        made = [stages.Stage(name, ("-c", code), tuple(needs), again=("again",)) for name, code, needs in given]
        monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path), *argv])
        try:
            stages.main("doc", "data", "out", lambda options: made)
            ended = None
        except SystemExit as error:
            ended = error.code
        return capsys.readouterr().out, ended

    return run


def append(tmp_path, word):
    """Code that adds a word to a file."""
    return f"open({str(tmp_path / 'log')!r}, 'a').write('{word} ')"


def test_stages_run_once_and_in_the_order_of_their_needs(run, tmp_path):
    given = [("second", append(tmp_path, "second"), ["first"]), ("first", append(tmp_path, "first"), [])]
    assert run(*given)[1] is None
    assert (tmp_path / "log").read_text() == "first second "
    assert run(*given) == ("second: done before\nfirst: done before\n", None)
    assert (tmp_path / "log").read_text() == "first second "


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(run, tmp_path):
    given = [("bad", "raise SystemExit(3)", []), ("after", "", ["bad"]), ("other", append(tmp_path, "other"), [])]
    out, ended = run(*given)
    assert ended == "not done: bad, after; the same command goes on"
    assert "bad: exit code 3" in out
    assert (tmp_path / "log").read_text() == "other "
    assert not (tmp_path / "bad" / "done").exists()


def test_a_stage_that_was_begun_goes_on(run, tmp_path):
    given = [("run", f"import sys; open({str(tmp_path / 'log')!r}, 'w').write(' '.join(sys.argv[1:]))", [])]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    run(*given)
    assert (tmp_path / "log").read_text() == "again"


def test_nothing_is_begun_after_the_time(run, tmp_path):
    out, ended = run(("late", append(tmp_path, "late"), []), argv=("--minutes", "-1"))
    assert ended == "not done: late; the same command goes on"
    assert out == ""
    assert not (tmp_path / "log").exists()


def test_only_names_stages(run, tmp_path):
    given = [(name, append(tmp_path, name), []) for name in ("base4", "base8", "dense")]
    assert run(*given, argv=("--only", "base8", "den"))[1] is None
    assert sorted((tmp_path / "log").read_text().split()) == ["base8", "dense"]


@pytest.fixture(params=["hrf", "camvid"])
def experiment(request, stages, monkeypatch, tmp_path):
    """The stages of an example, run on a tenth of the steps."""
    monkeypatch.chdir(EXAMPLES.parent)
    data = tmp_path / "data"
    for part in ("images/train", "images/val", "labels"):
        (data / part).mkdir(parents=True)
    options = stages.Options(str(data), tmp_path / "out", "cpu", 0.1)
    return load(f"{request.param}/all").stages(options)


def test_every_need_is_a_stage_before(experiment):
    seen: set[str] = set()
    for stage in experiment:
        assert stage.name not in seen
        assert seen.issuperset(stage.needs), stage
        seen.add(stage.name)


def test_every_command_is_understood(experiment):
    from sparserefine.commands.arguments import config_of
    from sparserefine.commands.main import _config_as_option, parser_of

    parsers = {name: parser_of(name) for name in ("logits", "train", "evaluate")}
    for stage in experiment:
        if stage.command[:2] == ("-m", "sparserefine"):
            parser = parsers[stage.command[2]]
            parsed = parser.parse_args(_config_as_option(parser, list(stage.command[3:])))
            config = config_of(parser.instantiate(parsed))
            assert config.training.steps % config.training.val_every == 0
            if stage.command[2] == "train":
                assert Path(config.out).name == stage.name
        else:
            assert Path(stage.command[0]).is_file()


def test_camvid_chooses_on_no_image_that_it_fits_or_tests(stages, tmp_path):
    camvid = load("camvid/all")
    for part, drive, count in (("train", "A", 20), ("train", "B", 10), ("val", "A", 6)):
        (tmp_path / part).mkdir(exist_ok=True)
        for frame in range(count):
            (tmp_path / part / f"{drive}_{part}{frame:03}.webp").touch()
    found = camvid.splits(tmp_path)
    assert [len(found[name]) for name in ("fit", "choose", "test", "first", "second")] == [26, 4, 6, 12, 14]
    assert sorted(found["first"] + found["second"]) == sorted(found["fit"])
    assert not {*found["fit"]} & {*found["choose"]}
    assert len({*found["fit"], *found["choose"], *found["test"]}) == 36
