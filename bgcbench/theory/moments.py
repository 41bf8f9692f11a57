"""Second moments of a convolution's patches and outputs, added up as the inputs come.

At one output position a convolution is y = W u, with u the patch vector (length nK, in the order of
``torch.nn.functional.unfold``: channel-major, then kernel positions). What a variant can and cannot do on given inputs
depends on them only through sum u u^T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bgcbench.errors import ShapeError
from bgcbench.specs import output_length
from bgcbench.theory.leastsquares import Regression

BLOCK = 256  # rows of a moment that are added up at a time
CHUNK_NUMBERS = 2**22  # of the patches that are formed at once: 32 MiB in float64


class Patches:
    """Cuts the patch vectors (nK, in unfold order) of a convolution out of its inputs."""

    def __init__(
        self,
        kernel_size: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        self._geometry = kernel_size, dilation, padding, stride

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """(height, width) of the positions at which x (B, n, H, W) has patches."""
        kernel, dilation, padding, stride = self._geometry
        sides = zip(x.shape[-2:], kernel, stride, padding, dilation, strict=True)
        height, width = (output_length(*side) for side in sides)
        return height, width

    def all(self, x: Tensor) -> Tensor:
        """The patches at all positions of all images of x (B, n, H, W): (nK, positions), image by image."""
        patches: Tensor = torch.nn.functional.unfold(x, *self._geometry)  # (B, nK, D)
        return patches.transpose(0, 1).flatten(1)

    def at(self, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The patches of image (n, H, W) at the output positions (rows, columns), (P,) each: (nK, P)."""
        kernel, dilation, padding, stride = self._geometry
        padded = torch.nn.functional.pad(image, (padding[1], padding[1], padding[0], padding[0]))
        taps = [(i * dilation[0], j * dilation[1]) for i in range(kernel[0]) for j in range(kernel[1])]
        down, right = torch.tensor(taps).T  # (K,)
        places = (rows[None] * stride[0] + down[:, None]), (columns[None] * stride[1] + right[:, None])  # (K, P)
        gathered = padded[:, places[0].to(image.device), places[1].to(image.device)]  # (n, K, P)
        return gathered.flatten(0, 1)


def some_positions(count: int, at_most: int, generator: torch.Generator | None = None) -> Tensor:
    """``at_most`` of ``count`` positions, drawn without replacement and in order: (at_most,) on the CPU."""
    return torch.randperm(count, generator=generator, device="cpu")[:at_most].sort().values


class RegressionMoments:
    """Sums over positions of u u^T, y u^T, u, y and |y|^2, for patches u (nK,) and outputs y (m,) wanted there.

    Everything is added up in float64 about an origin, near the means, so that what varies keeps its digits where the
    means are large. Memory: (nK)^2 + m nK numbers. ``positions``: pairs seen.
    """

    def __init__(self, origin_in: Tensor, origin_out: Tensor) -> None:
        """origin_in: (nK,); origin_out: (m,); their device is where the sums live."""
        self.origin_in, self.origin_out = (origin.to(torch.float64) for origin in (origin_in, origin_out))
        inputs, outputs = len(origin_in), len(origin_out)
        self._total = self.origin_in.new_zeros(inputs, inputs)
        self._cross = self.origin_in.new_zeros(outputs, inputs)
        self._first_in, self._first_out = torch.zeros_like(self.origin_in), torch.zeros_like(self.origin_out)
        self._power = 0.0
        self.positions = 0

    def add(self, patches: Tensor, outputs: Tensor) -> None:
        """Count pairs in: patches (nK, P) and outputs (m, P)."""
        u = patches.to(self._total) - self.origin_in[:, None]
        y = outputs.to(self._total) - self.origin_out[:, None]
        # Only the lower half, in blocks: the other one is its mirror image.
        for begin in range(0, len(u), BLOCK):
            end = min(begin + BLOCK, len(u))
            self._total[begin:end, :end].addmm_(u[begin:end], u[:end].T)
        self._cross.addmm_(y, u.T)
        self._first_in += u.sum(1)
        self._first_out += y.sum(1)
        self._power += float(y.square().sum())
        self.positions += patches.shape[1]

    def absorb(self, other: RegressionMoments) -> None:
        """Add what ``other``, which has the same origin, has seen."""
        for name in ("_total", "_cross", "_first_in", "_first_out"):
            getattr(self, name).add_(getattr(other, name))
        self._power += other._power
        self.positions += other.positions

    @property
    def is_finite(self) -> bool:
        """Whether everything that was added is a number."""
        return math.isfinite(self._power) and bool(torch.isfinite(self._total.diagonal()).all())

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """E[u] (nK,) and E[y] (m,)."""
        self._check_seen()
        return self.origin_in + self._first_in / self.positions, self.origin_out + self._first_out / self.positions

    def about(self, mean_in: Tensor, mean_out: Tensor) -> Regression:
        """The moments about these values: the means for centred ones, zeros for those about zero."""
        self._check_seen()
        d, e = self._first_in / self.positions, self._first_out / self.positions  # means about the origin
        c, f = mean_in.to(d) - self.origin_in, mean_out.to(e) - self.origin_out
        # sum (u - c)(u - c)^T / P = sum u u^T / P - d c^T - c d^T + c c^T, and likewise the others.
        moment = self._total.tril().div_(self.positions)
        moment += moment.tril(-1).T
        moment.addr_(d, c, alpha=-1).addr_(c, d, alpha=-1).addr_(c, c)
        cross = self._cross / self.positions
        cross.addr_(e, c, alpha=-1).addr_(f, d, alpha=-1).addr_(f, c)
        power = self._power / self.positions - 2 * float(e @ f) + float(f @ f)
        return Regression(moment, cross, max(0.0, power))

    def _check_seen(self) -> None:
        if not self.positions:
            raise ShapeError("the moments of 0 positions are undefined; pass at least one image")


class PatchMoments:
    """sum u u^T and sum u over the patches of all inputs added so far.

    Memory: (nK)^2 + nK numbers of ``dtype``, and while adding the patches of one image at least, of 32 MiB otherwise,
    twice; the im2col matrix of a whole set is never formed.
    ``total``: (nK, nK); ``first``: (nK,); ``positions``: patches seen.
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
        self._patches = Patches(kernel_size, stride=stride, padding=padding, dilation=dilation)
        size = in_channels * kernel_size[0] * kernel_size[1]
        self.total = torch.zeros(size, size, dtype=dtype, device=device)
        self.first = torch.zeros(size, dtype=dtype, device=device)
        self.positions = 0

    def add(self, x: Tensor) -> None:
        """Count the patches of x (B, n, H, W) in."""
        x = x.detach()
        height, width = self._patches.output_size(x)
        for images in x.split(self._images_at_once(height * width)) if x.shape[0] else ():
            self.count(self._patches.all(images.to(self.total)))

    def count(self, patches: Tensor) -> None:
        """Count patches (nK, positions) in."""
        u = patches.to(self.total)
        self.total.addmm_(u, u.T)
        self.first += u.sum(1)
        self.positions += u.shape[1]

    @property
    def is_finite(self) -> bool:
        """Whether everything that was added is a number."""
        return all(bool(torch.isfinite(sums).all()) for sums in (self.first, self.total.diagonal()))

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
