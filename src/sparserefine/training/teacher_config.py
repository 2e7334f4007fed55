"""TeacherConfig: which model teaches the refiner, and where its predictions come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparserefine.bases.base import BaseConfig
from sparserefine.bases.other import other_config
from sparserefine.machine.bounds import check_whole

ALIGNED = 32
"""Windows begin at multiples of this [px], and are cut there: the coarsest output cells of usual models."""
_MAX_WINDOW = 65_536


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model whose predictions teach the refiner; ``training.targets`` says whether it does.

    Attributes:
        name: name of a base; empty: the refiner's own base. With another name, mean, std, outputs, class map and
            bands are those of ``base`` only if both are of the same kind, such as ``unet:``.
        ratio: input size of the teacher relative to the image; 1: full resolution.
        size: fixed height and width of its input [px], in place of ``ratio``.
        class_map: of the teacher; see ``base.class_map``.
        bands: of the teacher; see ``base.bands``.
        source: ``stored``: read the files that ``sparserefine logits`` wrote; ``live``: computed when training starts,
            and kept in memory.
        folder: folder of the stored predictions.
        window: the teacher sees windows of this height and width [px of its input], a multiple of 32, where the whole
            image does not fit into memory; 0: the whole image.
        overlap: of two neighbouring windows [px], a multiple of 64, smaller than ``window``. Each window counts up to
            the middle of the overlap: with twice the reach of the model's receptive field, the result is that of the
            whole image.
    """

    name: str = ""
    ratio: float = 1.0
    size: tuple[int, int] | None = None
    class_map: tuple[int, ...] | str | None = None
    source: Literal["stored", "live"] = "live"
    folder: str = ""
    window: int = 0
    overlap: int = 256
    bands: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):  # null in a configuration
            raise ValueError(
                f"teacher.name = {self.name!r}, expected the name of a base, or nothing for the base's own"
            )
        if not 0 < self.ratio <= 1:
            raise ValueError(f"teacher.ratio = {self.ratio}, expected more than 0 and at most 1")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"teacher.size = {self.size}, expected at least 1 pixel each way")
        if self.source not in ("stored", "live"):
            raise ValueError(f"teacher.source = {self.source!r}, expected 'stored' or 'live'")
        if self.source == "stored" and not self.folder.strip():
            raise ValueError(
                "teacher.source = 'stored' needs teacher.folder, the folder that `sparserefine logits` wrote"
            )
        for name, step in (("window", ALIGNED), ("overlap", 2 * ALIGNED)):
            value = getattr(self, name)
            check_whole(f"teacher.{name}", value, 0, _MAX_WINDOW)
            if value % step:
                raise ValueError(f"teacher.{name} = {value}, expected a multiple of {step}")
        if self.window and self.overlap >= self.window:
            raise ValueError(f"teacher.overlap = {self.overlap}, expected less than teacher.window = {self.window}")

    def base_config(self, base: BaseConfig) -> BaseConfig:
        """Configuration of the teacher as a base, where ``base`` is that of the refiner's own."""
        ratio = self.ratio if self.size is None else None
        return other_config(
            base, self.name or base.name, ratio=ratio, size=self.size, class_map=self.class_map, bands=self.bands
        )
