"""What the documents tell people to type works as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from sparserefine import SparseRefiner
from sparserefine.bases.load import BASE_NAMES
from sparserefine.commands.main import command_named

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    """Of every `sparserefine ...` in a block or a line."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        if re.match(r"sparserefine [a-z]", line):
            _, name, *arguments = shlex.split(line, comments=True)
            parser = ArgumentParser()
            command_named(name).add_arguments(parser)
            known = {option for action in parser._actions for option in action.option_strings}
            used = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
            assert used <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_models_page_names_every_kind() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name in BASE_NAMES:
        kind = name.partition(":")[0]
        assert f"`{'segnext_t' if kind.startswith('segnext') else kind}:" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_is_yaml(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
