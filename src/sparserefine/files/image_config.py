"""ImageConfig: which bands of an image file are read, and what their values mean."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

MAX_BANDS = 16
"""Most channels of an image."""
MAX_MEGAPIXELS = 1_000_000.0
"""The highest limit that can be asked for."""
_MAX_BAND = 65_535
"""Of a TIFF, whose number of bands has 16 bits."""
_BITS = ("10bit", "12bit", "14bit", "16bit")


@dataclass(frozen=True)
class Percentiles:
    """A range that each image has for itself.

    Attributes:
        percentile: two percentiles of all pixels of a band, such as 2 and 98, whose values become 0 and 1.
    """

    percentile: tuple[float, float]

    def __post_init__(self) -> None:
        low, high = self.percentile
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentile = [{low}, {high}], expected two of 0 to 100, the lower one first")
        object.__setattr__(self, "percentile", (float(low), float(high)))


@dataclass(frozen=True)
class ImageConfig:
    """How image files become pixels. Stored with a refiner, which so reads what it was trained on.

    Attributes:
        bands: the bands to read, in this order, counted from 1. They are then the image's channels, as stored: nothing
            is blended or resolved but the colours of a palette. ``null``: three channels as a viewer shows them; files
            of other bands than grey or red, green and blue, with transparency or without, are refused.
        range: the values that become 0 and 1; those outside are clipped. ``[low, high]``, one ``[low, high]`` for each
            channel, ``10bit`` to ``16bit`` (such as ``12bit``: 0 to 4095), or ``{percentile: [low, high]}`` of the
            whole image, for each channel. ``null``: all values that 8 or 16 bits can have.
        exif: the orientation that cameras store beside the pixels: ``apply`` turns the image, ``ignore`` leaves it as
            it is stored. ``null``: applied.
        nodata: value that marks pixels without data; ``null``: the one that the file names, if it does.
        max_megapixels: the largest image that is read [million pixels]; ``null``: 2147. It guards this machine's
            memory, and is not stored with a refiner.

    Raises:
        ValueError: a value is out of range; or there are as many ranges as bands nowhere.
    """

    bands: tuple[int, ...] | None = None
    range: (
        Literal["10bit", "12bit", "14bit", "16bit"]
        | Percentiles
        | tuple[float, float]
        | tuple[tuple[float, float], ...]
        | None
    ) = None
    exif: Literal["apply", "ignore"] | None = None
    nodata: float | None = None
    max_megapixels: float | None = None

    def __post_init__(self) -> None:
        if self.bands is not None:
            if not 1 <= len(self.bands) <= MAX_BANDS:
                raise ValueError(f"images.bands = {list(self.bands)}, expected 1 to {MAX_BANDS} bands")
            wrong = next((b for b in self.bands if type(b) is not int or not 1 <= b <= _MAX_BAND), None)
            if wrong is not None:
                raise ValueError(f"images.bands has {wrong!r}, expected whole numbers from 1, the first band")
        if isinstance(self.range, str) and self.range not in _BITS:
            raise ValueError(f"images.range = {self.range!r}, expected {', '.join(_BITS)} or [low, high]")
        ranges = self.ranges or ()
        if ranges and isinstance(self.range, tuple):  # 0 and 0.0 are one range
            object.__setattr__(self, "range", ranges[0] if isinstance(self.range[0], float | int) else ranges)
        for low, high in ranges:
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"images.range has [{low}, {high}], expected two finite numbers, the lower one first")
        if self.ranges is not None and len(ranges) not in (1, self.channels):
            raise ValueError(
                f"images.range has {len(ranges)} pairs for {self.channels} channels, expected one for all or one each"
            )
        if self.exif not in (None, "apply", "ignore"):
            raise ValueError(f"images.exif = {self.exif!r}, expected 'apply' or 'ignore'")
        if self.nodata is not None:
            if not math.isfinite(self.nodata):
                raise ValueError(
                    f"images.nodata = {self.nodata}, expected a finite number: NaN and infinity are never data"
                )
            object.__setattr__(self, "nodata", float(self.nodata))  # 0 and 0.0 are one value, and one digest
        if self.max_megapixels is not None and not 0 < self.max_megapixels <= MAX_MEGAPIXELS:
            raise ValueError(
                f"images.max_megapixels = {self.max_megapixels}, expected above 0 and at most {MAX_MEGAPIXELS:.0f}"
            )

    def digest(self, sha256: str) -> str:
        """Fingerprint of the pixels that are read from a file of that SHA-256: this one, if they are the default's."""
        how = replace(self, max_megapixels=None, exif="ignore" if self.exif == "ignore" else None)
        return sha256 if how == ImageConfig() else hashlib.sha256(f"{sha256} {how}".encode()).hexdigest()

    @property
    def channels(self) -> int:
        """C of the images that are read."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def ranges(self) -> tuple[tuple[float, float], ...] | None:
        """The declared ranges, one or one for each channel; ``None``: none, or percentiles."""
        if self.range is None or isinstance(self.range, Percentiles):
            return None
        if isinstance(self.range, str):
            return ((0.0, float(2 ** int(self.range.removesuffix("bit")) - 1)),)
        pairs: list[tuple[float, float]] = []
        numbers: list[float] = []
        for item in self.range:
            if isinstance(item, tuple):
                pairs.append(item)
            else:
                numbers.append(item)
        if numbers and (pairs or len(numbers) != 2):
            raise ValueError(f"images.range = {self.range!r}, expected [low, high] or one such pair for each channel")
        pairs = pairs if pairs or not numbers else [(numbers[0], numbers[1])]
        return tuple((float(low), float(high)) for low, high in pairs)
