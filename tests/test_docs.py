"""What the documents tell people to type works as written."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import sparserefine
from sparserefine import SparseRefiner
from sparserefine.bases.load import BASE_NAMES
from sparserefine.commands import arguments
from sparserefine.commands.main import parser_of
from sparserefine.files.images import write_png
from sparserefine.studies.demo import demo_refiner_folder

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "examples", "benchmarks")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for f in FOLDERS for page in sorted((ROOT / f).rglob("*.md"))),
]
ELSEWHERE = ("../shared/", "runs/", "images/", "labels/", "manual1/", "best/", "dist/", ".venv")
"""Paths that a checkout does not have."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_bring_your_own_model_in_three_lines(page: str) -> None:
    (block,) = [code for code in blocks(ROOT / page, "python") if "my_model" in code]
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) == 3
    names: dict = {"my_model": nn.Conv2d(3, 19, 3, stride=4)}
    exec(block, names)
    refiner = names["refiner"]
    assert isinstance(refiner, SparseRefiner)
    assert refiner(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)).labels().shape == (1, 64, 96)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    """Of every `sparserefine ...` in a block or a line."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        if re.match(r"sparserefine [a-z]", line):
            _, name, *arguments = shlex.split(line, comments=True)
            known = {option for action in parser_of(name)._actions for option in action.option_strings}
            used = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
            assert used <= known, line


def test_ten_lines_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Those of README.md, with a refiner and an image where it says they are."""
    (code,) = [code for code in blocks(ROOT / "README.md", "python") if "read_image" in code]
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/best").symlink_to(demo_refiner_folder())
    write_png(tmp_path / "photo.png", torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8))
    (tmp_path / "photo.png").rename(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["labels"].shape == (1, 64, 96)
    assert "of the pixels refined, {" in capsys.readouterr().out


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of headings."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for file, anchor in links:
        if "://" not in file:
            target = page.parent / file if file else page
            assert target.exists(), file
            assert not anchor or anchor in headings(target), f"{file}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_modules_exist(page: Path) -> None:
    """Of each path in backquotes, from the root, the package or the page's folder; and of each `python -m`."""
    text = page.read_text(encoding="utf-8")
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for path in quoted:
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", path) and not path.startswith(ELSEWHERE):
            places = (ROOT, ROOT / "src/sparserefine", page.parent)
            assert any(list(place.glob(path.rstrip("/"))) for place in places), path
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    used = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(used) <= targets


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, flags=re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"^([a-z-]+):.* ## .", makefile, flags=re.MULTILINE))


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sparserefine.__version__
    assert citation["license"] == "MIT"
    (paper,) = citation["references"]
    assert len(paper["authors"]) == 8


def test_models_page_names_every_kind() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name in BASE_NAMES:
        kind = name.partition(":")[0]
        assert f"`{'segnext_t' if kind.startswith('segnext') else kind}:" in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_is_yaml(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    codes = {value for name, value in vars(arguments).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)} == {0, *codes}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" in index} == pages
