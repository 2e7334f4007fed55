"""Coarse logits on disk: one safetensors file per image, float16, at the base's own output size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparserefine.files.whole import written_whole

FORMAT_VERSION = "1"
_HALF_MAX = 65504.0


class StoredLogits:
    """A folder of coarse logits, one file ``<folder>/<sample name>.safetensors`` per image."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """File of the sample called ``name``."""
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, logits: Tensor, *, base: str, image_size: tuple[int, int]) -> None:
        """Stores logits ``[K, h, w]`` with the identity of the base, and H and W of the image [px]."""
        header = {"format_version": FORMAT_VERSION, "base": base, "image": f"{image_size[0]}x{image_size[1]}"}
        half = quantised(logits).cpu().contiguous()
        with written_whole(self.path(name)) as temporary:
            save_file({"logits": half}, temporary, metadata=header)

    def base_of(self, name: str) -> str | None:
        """Identity of the base that made the stored logits; ``None`` if none are stored."""
        return self._header(name).get("base") if self.path(name).is_file() else None

    def read(self, name: str, *, base: str, image_size: tuple[int, int]) -> Tensor:
        """Reads logits, ``float16 [K, h, w]``.

        Raises:
            ValueError: the logits are missing, unreadable, of another base, of another image size, or not finite.
        """
        self.check(name, base=base)
        path, header = self.path(name), self._header(name)
        expected = f"{image_size[0]}x{image_size[1]}"
        if header.get("image") != expected:
            raise ValueError(
                f"{path}: logits of an image of {header.get('image')} pixels, this image has {expected}; "
                "delete the file and run `sparserefine logits` again"
            )
        with safe_open(path, framework="pt") as file:
            logits: Tensor = file.get_tensor("logits")
        bad = logits.numel() - int(logits.isfinite().sum())
        if bad:
            raise ValueError(
                f"{path}: {bad} of {logits.numel()} coarse logits of base {base} are NaN or infinite; "
                "delete the file and run `sparserefine logits` again"
            )
        return logits

    def check(self, name: str, *, base: str) -> None:
        """Raises ``ValueError`` unless logits of the sample are stored and ``base`` made them."""
        found = self.base_of(name)
        if found is None:
            raise ValueError(
                f"{self.path(name)}: no stored logits; run `sparserefine logits` with this configuration first"
            )
        if found != base:
            raise ValueError(
                f"{self.path(name)}: logits of base {found}, this configuration has base {base}; "
                "store them in another folder, or run `sparserefine logits --overwrite`"
            )

    def _header(self, name: str) -> dict[str, str]:
        try:
            with safe_open(self.path(name), framework="pt") as file:
                header: dict[str, str] = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{self.path(name)}: unreadable ({error}); delete the file and run `sparserefine logits` again"
            ) from error
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.path(name)}: format_version {header.get('format_version')!r}, expected {FORMAT_VERSION!r}; "
                "run `sparserefine logits` again in a new folder"
            )
        return header


def quantised(logits: Tensor) -> Tensor:
    """Rounds logits to float16, clamped to its range: the precision of storage and training."""
    return logits.clamp(-_HALF_MAX, _HALF_MAX).half()


@dataclass(frozen=True)
class StoredSplit:
    """Stored logits of the samples of one split. Holds plain values, so it can be sent to data loader processes.

    Attributes:
        folder: folder of the stored logits.
        names: name of each sample.
        bases: identity of the base for each sample.
    """

    folder: Path
    names: tuple[str, ...]
    bases: tuple[str, ...]

    def check(self) -> None:
        """Raises ``ValueError`` unless the logits of all samples are stored and their bases made them."""
        for name, base in zip(self.names, self.bases, strict=True):
            StoredLogits(self.folder).check(name, base=base)

    def __call__(self, index: int, image_size: tuple[int, int]) -> Tensor:
        """``float32 [K, h, w]`` of sample ``index``."""
        store = StoredLogits(self.folder)
        return store.read(self.names[index], base=self.bases[index], image_size=image_size).float()


@dataclass(frozen=True)
class LiveSplit:
    """Logits of the samples of one split, in memory, with the same precision as stored ones."""

    items: list[Tensor]

    def __call__(self, index: int, image_size: tuple[int, int]) -> Tensor:
        """``float32 [K, h, w]`` of sample ``index``."""
        return self.items[index].float()
