"""``sparserefine quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparserefine.commands.arguments import add_base, add_max_megapixels, add_refiner, refiner_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

HOW_TO_GO_ON = "the output folder holds what it held, or the new refiner, whole; repeat the command"
"""What to do after an interruption."""


def add_arguments(parser: ArgumentParser) -> None:
    """Inputs, refiner, output folder, base."""
    parser.add_argument(
        "inputs", nargs="+", help="a few typical images, to measure the range of activations: files or folders"
    )
    add_refiner(parser)
    parser.add_argument(
        "--out", required=True, help="output folder for the quantized refiner; must differ from --refiner"
    )
    add_max_megapixels(parser)
    add_base(parser)


def run(arguments: Namespace) -> int:
    """Runs :meth:`sparserefine.SparseRefiner.quantize` and saves the quantized refiner."""
    from dataclasses import replace

    from tqdm import tqdm

    from sparserefine.files.images import read_image
    from sparserefine.files.lock import locked
    from sparserefine.files.text import printable

    out = Path(arguments.out)
    if out.resolve() == Path(arguments.refiner).resolve():
        raise ValueError(f"--out {out} is the folder of --refiner, which is never changed; give another one")
    files = _images_in(arguments.inputs)
    refiner = refiner_of(arguments, trust_base=arguments.trust_base, runtime=arguments.runtime)
    device = next(refiner.extractor.parameters()).device
    how = replace(refiner.config.images, max_megapixels=arguments.max_megapixels)
    with locked(out, "quantize"):
        with tqdm(files, desc="quantize", unit="image") as bar:  # closed, so that what is said next begins a line
            count = refiner.quantize(read_image(file, how).to(device) for file in bar)
        refiner.save_pretrained(out)
    images = "1 image" if count == 1 else f"{count} images"
    print(f"quantized with {images}, stored in {printable(out)}; --engine cpu-int8 runs it in 8 bits")
    return 0


def _images_in(inputs: Sequence[str]) -> list[Path]:
    """The given files, and the images in the given folders. Files are looked up first: a FIFO would wait for ever."""
    from sparserefine.files.images import IMAGE_SUFFIXES
    from sparserefine.files.regular import regular_file

    files: list[Path] = []
    for given in map(Path, inputs):
        inside = [given]
        if given.is_dir():  # hidden files are those that macOS puts beside others
            inside = [f for f in sorted(given.iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "."]
        files += (regular_file(file, "an image") for file in inside if inside == [given] or not file.is_dir())
    if not files:
        raise ValueError(f"no image in {', '.join(inputs)}; expected {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return files
