"""Second moments of a convolution's patches, added up as the inputs come.

At one output position a convolution is y = W u, with u the patch vector (length nK, in the order of
``torch.nn.functional.unfold``: channel-major, then kernel positions). What a variant can and cannot do on given inputs
depends on them only through sum u u^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgcbench.errors import ShapeError

CHUNK_NUMBERS = 2**22  # of the patches that are formed at once: 32 MiB in float64


class PatchMoments:
    """sum u u^T and sum u over the patches of all inputs added so far.

    Memory: (nK)^2 + nK numbers of ``dtype``, and some 64 MiB of patches while adding; the im2col matrix of a whole set
    is never formed. ``total``: (nK, nK); ``first``: (nK,); ``positions``: patches seen; ``images``: inputs seen.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        self._geometry = kernel_size, dilation, padding, stride
        size = in_channels * kernel_size[0] * kernel_size[1]
        self.total = torch.zeros(size, size, dtype=dtype, device=device)
        self.first = torch.zeros(size, dtype=dtype, device=device)
        self.positions = 0
        self.images = 0

    def add(self, x: Tensor, at_most: int | None = None, generator: torch.Generator | None = None) -> None:
        """Count the patches of x (B, n, H, W) in.

        at_most: of each image take no more than that many positions, drawn without replacement from ``generator``.
        """
        x = x.detach().to(device=self.total.device, dtype=self.total.dtype)
        for image in x.split(self._images_at_once(x)) if x.shape[0] else ():
            patches = torch.nn.functional.unfold(image, *self._geometry)  # (B, nK, D)
            if at_most is not None and patches.shape[2] > at_most:
                chosen = torch.randperm(patches.shape[2], generator=generator, device="cpu")[:at_most].sort().values
                patches = patches.index_select(2, chosen.to(patches.device))
            flat = patches.transpose(0, 1).flatten(1)  # (nK, B D)
            self.total.addmm_(flat, flat.T)
            self.first += flat.sum(1)
            self.positions += flat.shape[1]
            self.images += image.shape[0]

    def _images_at_once(self, x: Tensor) -> int:
        _, _, _, stride = self._geometry
        patches = max(1, x.shape[2] // stride[0]) * max(1, x.shape[3] // stride[1])
        return max(1, CHUNK_NUMBERS // (patches * len(self.first)))

    @property
    def moment(self) -> Tensor:
        """E[u u^T], about zero: (nK, nK). Raises ShapeError while there is nothing to take a mean of."""
        self._check_seen()
        return self.total / self.positions

    @property
    def mean(self) -> Tensor:
        """E[u]: (nK,)."""
        self._check_seen()
        return self.first / self.positions

    def _check_seen(self) -> None:
        if not self.positions:
            raise ShapeError("the second moment of 0 images is undefined; pass at least one")


def patch_second_moment(
    x: Tensor,
    kernel_size: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """C = E[u u^T] over all patches of ``x`` (B, n, H, W), as (nK, nK) in float64. About zero, not centred."""
    moments = PatchMoments(x.shape[1], kernel_size, stride=stride, padding=padding, dilation=dilation, device=x.device)
    moments.add(x)
    return moments.moment
