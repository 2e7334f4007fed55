"""Sites: the selected full-resolution pixels of a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sites:
    """N selected pixels of a batch of images of one size, sorted by (batch, row, column), without duplicates.

    Attributes:
        coords: ``int32 [N, 3]``: batch, row, column.
        batch_size: B.
        height: H [px].
        width: W [px].

    Raises:
        ValueError: the coordinates have another shape or dtype. Their values are not checked.
    """

    coords: Tensor
    batch_size: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.coords.dim() != 2 or self.coords.shape[1] != 3 or self.coords.dtype != torch.int32:
            raise ValueError(
                f"coords are {self.coords.dtype} {tuple(self.coords.shape)}, expected int32 [N, 3] (batch, row, column)"
            )

    @classmethod
    def from_mask(cls, mask: Tensor) -> Sites:
        """Sites where ``mask``, ``bool [B, H, W]``, is true."""
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool [B, H, W]")
        b, h, w = mask.shape
        return cls(mask.nonzero().to(torch.int32), b, h, w)

    def __len__(self) -> int:
        return self.coords.shape[0]

    @property
    def flat(self) -> Tensor:
        """Row-major position in ``[B, H, W]``, ``int64 [N]``, ascending."""
        batch, row, column = self.coords.long().unbind(1)
        return (batch * self.height + row) * self.width + column

    @property
    def density(self) -> float:
        """N / (B H W)."""
        return len(self) / max(1, self.batch_size * self.height * self.width)

    def mask(self) -> Tensor:
        """``bool [B, H, W]``, true at the sites."""
        mask = torch.zeros(self.batch_size, self.height, self.width, dtype=torch.bool, device=self.coords.device)
        mask.view(-1)[self.flat] = True
        return mask

    def gather(self, image: Tensor) -> Tensor:
        """Values of ``image``, ``[B, C, H, W]``, at the sites: ``[N, C]``."""
        if image.shape[0] != self.batch_size or image.shape[2:] != (self.height, self.width):
            raise ValueError(
                f"image is {tuple(image.shape)}, the sites belong to "
                f"[{self.batch_size}, C, {self.height}, {self.width}]; expected the same batch, height and width"
            )
        batch, row, column = self.coords.long().unbind(1)
        within = row * self.width + column
        if self.batch_size == 1:
            return image[0].flatten(1).index_select(1, within).t().contiguous()
        return image[batch, :, row, column]


@dataclass(frozen=True)
class PaddedSites:
    """A fixed number of sites, independent of the image, as CUDA graphs require. The last ones may be padding.

    Attributes:
        rows: all sites, padding included. Sites past ``count`` are padding and have coordinates 0.
        count: ``int32 [1]`` on the device: number of rows in use.
    """

    rows: Sites
    count: Tensor

    def first(self, count: int) -> Sites:
        """The first ``count`` sites, copied. Pass the number in use, read from the device."""
        rows = self.rows
        return Sites(rows.coords[:count].clone(), rows.batch_size, rows.height, rows.width)
