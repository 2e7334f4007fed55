"""Predicts image files: writes index images and reports every image, done or failed."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from sparserefine.files.image_config import ImageConfig
from sparserefine.files.images import IMAGE_SUFFIXES, Pixels, read_pixels, save_png, save_tiff
from sparserefine.files.lock import locked
from sparserefine.files.regular import given_path, regular_file
from sparserefine.files.text import printable
from sparserefine.files.tiff import placed
from sparserefine.files.whole import sweep, written_whole
from sparserefine.images.pictures import overlay as overlay_picture
from sparserefine.refiner import SparseRefiner

_log = logging.getLogger(__name__)
_NO_MORE_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing after which no other image can be written either: disk full, quota used up, disk read-only."""
_GONE = "its output was written but is gone now; does another process delete files there?"
_NO_DATA, _NO_DATA_16 = 255, 65535
"""Label of pixels without data, in a file of 8 bits and of 16."""
_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """An input that could not be predicted.

    Attributes:
        name: the file, or the input as the user gave it.
        reason: why it failed, and the cure.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)}: {printable(self.reason)}"


@dataclass(frozen=True)
class Predicted:
    """One predicted image.

    Attributes:
        image: the file read.
        outputs: the files written: the labels, then the overlay if requested.
        size: height and width [px].
        density: share of the pixels that were refined.
        ms: time of the base and all stages after it [ms]; reading and writing files is not included.
    """

    image: Path
    outputs: tuple[Path, ...]
    size: tuple[int, int]
    density: float
    ms: float


@dataclass(frozen=True)
class PredictReport:
    """The result of :func:`predict`. Every image it found is in one of the four.

    Attributes:
        images: predicted now.
        failures: with the reason of each.
        present: images whose outputs existed and were kept, see ``skip_existing``.
        not_tried: images left when the disk was full; the last failure says so.
    """

    images: tuple[Predicted, ...]
    failures: tuple[Failure, ...]
    present: tuple[Path, ...] = ()
    not_tried: tuple[Path, ...] = ()

    @property
    def written(self) -> tuple[Path, ...]:
        """All files written, in order."""
        return tuple(path for image in self.images for path in image.outputs)

    def summary(self) -> str:
        """One line.

        >>> PredictReport((Predicted(Path("a.jpg"), (Path("a.png"),), (8, 8), 0.1, 250.0),), ()).summary()
        '1 image predicted (density 10.0 %, 250 ms an image)'
        """
        parts = [f"{_count(len(self.images), 'image')} predicted"]
        if self.images:
            density, ms = median(i.density for i in self.images), median(i.ms for i in self.images)
            kind = "" if len(self.images) == 1 else "median "
            parts[0] += f" ({kind}density {100 * density:.1f} %, {ms:.0f} ms an image)"
        if self.present:
            parts.append(f"{len(self.present)} present already")
        if self.failures:
            parts.append(_count(len(self.failures), "failure"))
        if self.not_tried:
            parts.append(f"{len(self.not_tried)} not tried")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Found:
    """An image file, and its path relative to the input folder or to the part of the pattern before the wildcards."""

    image: Path
    relative: Path

    def outputs(self, kind: str, with_suffix: bool, overlay: bool) -> tuple[Path, ...]:
        """Paths relative to the output folder."""
        suffix = self.relative.suffix[1:]
        stem = f"{self.relative.stem}_{suffix}" if with_suffix and suffix else self.relative.stem
        names = (f"{stem}.{kind}", f"{stem}_overlay.png") if overlay else (f"{stem}.{kind}",)
        return tuple(self.relative.parent / name for name in names)


def predict(
    inputs: Sequence[str | Path],
    refiner: SparseRefiner,
    out: str | Path,
    *,
    overlay: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    format: Literal["auto", "png", "tif"] = "auto",
    max_megapixels: float | None = None,
    progress: bool = True,
    seen: Callable[[Predicted], None] | None = None,
) -> PredictReport:
    """Predicts image files and writes their labels as index images in the classes' colours.

    Bands, range and EXIF are those that the refiner was trained with (``refiner.config.images``). Where an image has no
    data, nothing is refined, and its label is 255 (65535 for 256 classes and more).

    An image ``a/b.jpg`` in an input folder is written to ``out/a/b.png``, a file given by name to ``out/<name>.png``.
    For a pattern, folders from the first wildcard on are kept: ``photos/*/x.tif`` is written to ``out/<folder>/x.png``.
    If two inputs would write the same file, both outputs get the input's suffix in their names (``a_jpg.png`` and
    ``a_tif.png``); if the names are still equal, both inputs fail. A file given twice is predicted once.

    A bad file does not stop the others: its error becomes a failure in the report, and it gets no outputs.
    Input files are never changed, not even with ``overwrite``. ``out`` is created if there is something to write, and
    locked meanwhile: another prediction into it is refused. An interrupted run leaves whole files only, and of each
    image all outputs or none; ``skip_existing`` goes on from there. A full disk ends the run: see
    :attr:`PredictReport.not_tried`.

    Args:
        inputs: files, folders and glob patterns. Folders are searched recursively; hidden files and files without an
            image suffix are skipped. In a pattern, ``**`` matches any number of folders. Files in ``out`` are skipped.
        refiner: runs in evaluation mode on its current device.
        out: output folder.
        overlay: also write ``<name>_overlay.png``, the class colours blended over the image.
        overwrite: replace existing outputs; without it, an image whose output exists is a failure.
        skip_existing: keep an image's outputs if all exist; if only some do, all are written again.
        format: ``png``; ``tif``, which keeps the coordinates of a GeoTIFF and names the label of pixels without data;
            ``auto``: ``tif`` for a GeoTIFF, ``png`` for all others.
        max_megapixels: the largest image that is read [million pixels]; default: 2147.
        progress: show a progress bar if stderr is a terminal and the run takes more than 2 s.
        seen: called with each image when its outputs are written; what an interrupted run did is known from it only.

    Raises:
        ValueError: there are no inputs, one is empty, ``out`` is not a folder, or ``overwrite`` and ``skip_existing``
            are both chosen; or ``format`` or ``max_megapixels`` is none.
        LockedError: another prediction writes into ``out``.
        OSError: ``out`` cannot be made or written.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    inputs, out = [given_path(given, "inputs") for given in inputs], given_path(out, "out")
    if overwrite and skip_existing:
        raise ValueError("overwrite and skip_existing contradict each other; choose one")
    if format not in ("auto", "png", "tif"):
        raise ValueError(f"format = {format!r}, expected 'auto', 'png' or 'tif'")
    how = refiner.config.images
    how = replace(how, max_megapixels=how.max_megapixels if max_megapixels is None else max_megapixels)
    if not inputs:
        raise ValueError("nothing to predict; give image files, folders or glob patterns")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{printable(out)}: is a file, expected a folder, or a new name, for the outputs")
    failures: list[Failure] = []
    found = _find(inputs, out, failures)
    kinds = [("tif" if _is_placed(item.image, how) else "png") if format == "auto" else format for item in found]
    jobs = _name_outputs(found, kinds, out, overlay, failures)
    if not jobs:
        return PredictReport((), tuple(failures))
    images: list[Predicted] = []
    present: list[Path] = []
    not_tried: list[Path] = []
    sources = {_identity(f.image) for f in found}
    was_training = refiner.training
    refiner.eval()
    try:
        with locked(out, "predict"):
            for folder in {path.parent for _, outputs in jobs for path in outputs}:
                sweep(folder)
            bar = tqdm(jobs, unit="image", delay=2, leave=False, disable=None if progress else True)
            for number, (image, outputs) in enumerate(bar):
                result: Predicted | str | None = _refusal(outputs, sources, overwrite or skip_existing)
                if result is None and skip_existing and all(path.exists() for path in outputs):
                    present.append(image)
                    continue
                try:
                    result = result or _predict_one(image, outputs, refiner, how)
                except OSError as error:
                    failures.append(Failure(str(image), _failure_reason(error, image)))
                    not_tried += [later for later, _ in jobs[number + 1 :]]
                    break
                if isinstance(result, str):
                    failures.append(Failure(str(image), result))
                    continue
                images.append(result)
                if seen:
                    seen(result)
    finally:
        refiner.train(was_training)
    there: list[Predicted] = []
    for done in images:
        if all(path.exists() for path in done.outputs):
            there.append(done)
        else:
            failures.append(Failure(str(done.image), _GONE))
    return PredictReport(tuple(there), tuple(failures), tuple(present), tuple(not_tried))


def _find(inputs: Sequence[str | Path], out: Path, failures: list[Failure]) -> list[_Found]:
    """Image files of all inputs, without duplicates; an input without images becomes a failure."""
    found: dict[Path, _Found] = {}
    for given in inputs:
        failed_before = len(failures)
        try:
            images = list(_images_of(Path(given), out.resolve(), failures))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{printable(given)}: ")
            failures.append(Failure(str(given), reason))
            continue
        if not images and len(failures) == failed_before:
            failures.append(Failure(str(given), f"no image found (files ending in {', '.join(IMAGE_SUFFIXES)})"))
        for item in images:
            found.setdefault(item.image.absolute(), item)
    return list(found.values())


def _images_of(given: Path, out: Path, failures: list[Failure]) -> Iterator[_Found]:
    if given.is_dir():
        if given.resolve() == out:
            reason = "is also the output folder, so outputs would mix with inputs; choose another output folder"
            failures.append(Failure(str(given), reason))
            return
        yield from (_Found(file, file.relative_to(given)) for file in _walk(given, out, failures) if _is_image(file))
    elif given.is_file() or not glob.has_magic(str(given)):
        yield _Found(regular_file(given, "an image, a folder or a pattern"), Path(given.name))
    else:
        fixed = next(i for i, part in enumerate(given.parts) if glob.has_magic(part))
        root, pattern = Path(*given.parts[:fixed]), Path(*given.parts[fixed:])
        skip_out = out != root.resolve() and out.is_relative_to(root.resolve())
        # Path.glob would also match hidden files.
        for name in sorted(glob.glob(str(pattern), root_dir=root, recursive=True)):  # noqa: PTH207
            file, relative = root / name, Path(name)
            if not file.is_dir() and _is_image(file) and not (skip_out and file.parent.resolve().is_relative_to(out)):
                # A pattern with '..' in it must not lead out of the output folder.
                yield _Found(file, Path(relative.name) if ".." in relative.parts else relative)


def _walk(folder: Path, out: Path, failures: list[Failure]) -> Iterator[Path]:
    """Files below ``folder`` in order, except hidden ones and those in ``out``. Follows links; visits a folder once."""
    seen = {out}

    def unreadable(error: OSError) -> None:
        failures.append(Failure(str(error.filename), error.strerror or str(error)))

    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(parent).resolve()
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(files) if not name.startswith("."))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _is_placed(file: Path, config: ImageConfig) -> bool:
    """Whether it is a GeoTIFF, as far as can be said; reading it says what else it is."""
    try:
        return file.is_file() and bool(placed(file, config))
    except OSError:
        return False


def _name_outputs(
    found: list[_Found], kinds: Sequence[str], out: Path, overlay: bool, failures: list[Failure]
) -> list[tuple[Path, tuple[Path, ...]]]:
    """Each image with its outputs; images whose outputs would have the same name become failures."""
    with_suffix: set[int] = set()
    while True:
        names = [item.outputs(kinds[i], i in with_suffix, overlay) for i, item in enumerate(found)]
        claims: dict[Path, list[int]] = defaultdict(list)
        for i, paths in enumerate(names):
            for path in paths:
                claims[path].append(i)
        clashes = {i: path for path, claimants in claims.items() if len(claimants) > 1 for i in claimants}
        if clashes.keys() <= with_suffix:
            break
        with_suffix |= clashes.keys()  # the new names may clash with a third file, so check again
    for i, path in clashes.items():
        others = ", ".join(str(found[j].image) for j in claims[path] if j != i)
        failures.append(
            Failure(
                str(found[i].image),
                f"would write {out / path}, as would {others}; use a separate output folder for each",
            )
        )
    return [
        (item.image, tuple(out / path for path in paths))
        for i, (item, paths) in enumerate(zip(found, names, strict=True))
        if i not in clashes
    ]


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, equal for all names of a file (links, file systems that ignore case)."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _refusal(outputs: tuple[Path, ...], sources: set[tuple[int, int] | None], overwrite: bool) -> str | None:
    """Why these outputs must not be written; ``None`` if they may be."""
    for path in outputs:
        identity = _identity(path)
        if identity is None:
            continue
        if identity in sources:
            return f"its output {path} is one of the input files, which are never overwritten; choose another folder"
        if not overwrite:
            return f"{path} exists; --overwrite (overwrite=True) replaces it, --skip_existing keeps it"
    return None


def _predict_one(
    image: Path, outputs: tuple[Path, ...], refiner: SparseRefiner, config: ImageConfig
) -> Predicted | str:
    """Predicts one image; returns the result, or why it failed. In either case there are all of its outputs or none.

    Raises:
        OSError: the disk is full or read-only.
    """
    before = [_identity(path) for path in outputs]
    try:
        pixels = read_pixels(image, config)
        labels, density, ms = _refine(pixels, refiner)
        shown = overlay_picture(pixels.image, labels, refiner.classes) if len(outputs) > 1 else None
        nodata = None
        if pixels.valid is not None:
            nodata = _NO_DATA if labels.dtype == torch.uint8 else _NO_DATA_16
            labels = torch.where(pixels.valid, labels if nodata == _NO_DATA else labels.int(), nodata)
            if shown is not None:
                shown = shown * pixels.valid
        palette = list(refiner.classes.palette)
        with ExitStack() as stack:  # both are complete before the first gets its name; the labels get theirs last
            file = stack.enter_context(written_whole(outputs[0]))
            if outputs[0].suffix == ".tif":
                save_tiff(file, labels, palette, place=placed(image, config), nodata=nodata)
            else:
                save_png(file, labels, palette)
            if shown is not None:
                save_png(stack.enter_context(written_whole(outputs[1])), shown, palette)
    except BaseException as error:  # an interruption too
        if _identity(outputs[0]) == before[0]:  # else all have their names, and are whole
            for path, old in zip(outputs[1:], before[1:], strict=True):
                if _identity(path) != old:
                    path.unlink(missing_ok=True)
        if not isinstance(error, Exception) or (isinstance(error, OSError) and error.errno in _NO_MORE_WRITING):
            raise
        _log.debug("predicting %s", image, exc_info=True)  # a user's base may raise anything, the next image may work
        return _failure_reason(error, image)
    return Predicted(image, outputs, (labels.shape[0], labels.shape[1]), density, ms)


@torch.no_grad()
def _refine(pixels: Pixels, refiner: SparseRefiner) -> tuple[Tensor, float, float]:
    """Refines one image: labels ``[H, W]`` on the CPU, density, time [ms]."""
    device = next(refiner.trained_parameters()).device
    valid = None if pixels.valid is None else pixels.valid[None].to(device)
    refinement = refiner(pixels.image[None].to(device), valid)
    return refinement.labels()[0].cpu(), refinement.density, sum(refinement.timings_ms.values())


def _failure_reason(error: Exception, image: Path) -> str:
    text = str(error).partition("\n")[0].removeprefix(f"{printable(image)}: ")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _OUT_OF_MEMORY.search(text):
        cure = "use a smaller budget, or a smaller input of the base"
        return f"out of memory ({text}); {cure}" if text else f"out of memory; {cure}"
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
