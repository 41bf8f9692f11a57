"""Second moments of a convolution's patches, added up as the inputs come.

At one output position a convolution is y = W u, with u the patch vector (length nK, in the order of
``torch.nn.functional.unfold``: channel-major, then kernel positions). What a variant can and cannot do on given inputs
depends on them only through sum u u^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgcbench.errors import ShapeError
from bgcbench.specs import output_length

CHUNK_NUMBERS = 2**22  # of the patches that are formed at once: 32 MiB in float64


class PatchMoments:
    """sum u u^T and sum u over the patches of all inputs added so far.

    Memory: (nK)^2 + nK numbers of ``dtype``, and while adding the patches of one image at least, of 32 MiB otherwise,
    twice; the im2col matrix of a whole set is never formed.
    ``total``: (nK, nK); ``first``: (nK,); ``positions``: patches seen; ``images``: inputs seen.
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

        at_most: of each image take no more than that many positions, drawn without replacement from ``generator``, for
        each image anew; only their patches are formed.
        """
        x = x.detach()
        height, width = self.output_size(x)
        if at_most is not None and height * width > at_most:
            for image in x:
                chosen = torch.randperm(height * width, generator=generator, device="cpu")[:at_most].sort().values
                self._count(self._patches_at(image, chosen // width, chosen % width), 1)
            return
        for images in x.split(self._images_at_once(height * width)) if x.shape[0] else ():
            given = images.to(device=self.total.device, dtype=self.total.dtype)
            patches = torch.nn.functional.unfold(given, *self._geometry)  # (B, nK, D)
            self._count(patches.transpose(0, 1).flatten(1), images.shape[0])

    def _count(self, patches: Tensor, images: int) -> None:
        """Add patches (nK, positions)."""
        self.total.addmm_(patches, patches.T)
        self.first += patches.sum(1)
        self.positions += patches.shape[1]
        self.images += images

    def _patches_at(self, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The patches of image (n, H, W) at these output positions (P,): (nK, P), in unfold's order."""
        kernel, dilation, padding, stride = self._geometry
        padded = torch.nn.functional.pad(image, (padding[1], padding[1], padding[0], padding[0]))
        taps = [(i * dilation[0], j * dilation[1]) for i in range(kernel[0]) for j in range(kernel[1])]
        down, right = torch.tensor(taps).T  # (K,)
        at = (rows[None] * stride[0] + down[:, None]), (columns[None] * stride[1] + right[:, None])  # (K, P)
        gathered = padded[:, at[0].to(image.device), at[1].to(image.device)]  # (n, K, P)
        return gathered.flatten(0, 1).to(device=self.total.device, dtype=self.total.dtype)

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """(height, width) of the positions at which x (B, n, H, W) has patches."""
        kernel, dilation, padding, stride = self._geometry
        sides = zip(x.shape[-2:], kernel, stride, padding, dilation, strict=True)
        height, width = (output_length(*side) for side in sides)
        return height, width

    def _images_at_once(self, positions: int) -> int:
        return max(1, CHUNK_NUMBERS // (max(1, positions) * len(self.first)))

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
