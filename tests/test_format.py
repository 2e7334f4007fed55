"""A refiner that version 0.1.0 wrote is read for ever, and gives what it gave then.

``data/refiner_0_1_0`` was written by ``save_pretrained`` at commit 6bb4233, nothing in it left at its default, the
activations measured for 8-bit arithmetic. ``expected.safetensors`` beside it holds an image, and the logits and labels
that engine ``torch`` gave. Nothing in that folder is ever to be changed; a new format gets a folder of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparserefine import Classes, EnsemblerConfig, ExtractorConfig, RefinerConfig, Selector, SparseRefiner
from sparserefine.sparse.quantisation import is_calibrated

FOLDER = Path(__file__).parent / "data" / "refiner_0_1_0"


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_it_predicts_what_it_predicted(engine: str) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    refiner = SparseRefiner.from_pretrained(FOLDER, engine=engine)
    with torch.inference_mode():
        result = refiner(expected["image"])
    assert len(result.sites) == 116
    assert torch.equal(result.labels(), expected["labels"])
    torch.testing.assert_close(result.logits(), expected["logits"], rtol=1e-4, atol=1e-4)


def test_it_is_what_it_was() -> None:
    refiner = SparseRefiner.from_pretrained(FOLDER)
    assert refiner.config == RefinerConfig(
        selector=Selector(0.814, 116),
        extractor=ExtractorConfig((4, 6), 1, "cell", ("rgb", "coords", "entropy")),
        ensembler=EnsemblerConfig(fuser="paper"),
        upsampling="nearest",
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
    )
    assert refiner.classes == Classes(("void", "road", "sky"), ((1, 2, 3), (4, 5, 6), (7, 8, 255)))
    assert refiner.base.config.ratio == 0.5
    assert (refiner.base.mean, refiner.base.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert is_calibrated(refiner.extractor)


def test_stored_again_it_is_the_same(tmp_path: Path) -> None:
    """Keys, their order and format_version included."""
    SparseRefiner.from_pretrained(FOLDER).save_pretrained(tmp_path)
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, tmp_path))
    for config in (was, now):
        config.pop("weights_sha256")  # the order of the tensors in the file is not promised
    assert "base_sha256" not in was  # 0.1.0 did not check the base
    del now["base_sha256"]
    assert json.dumps(now) == json.dumps(was)
    for name in ("model.safetensors", "base.safetensors"):
        before, after = load_file(FOLDER / name), load_file(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
