"""Low-rank factorisation (Denton et al., 2014): what data-aware compression would use in the place of groups.

    y = P (R * x)

R is a convolution to r channels with the layer's own kernel, stride, padding and dilation, P a pointwise one to the m
outputs. Flattened to (m, nK) the dense kernel is D = P R, any matrix of rank r at most. The paper does not compare it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs.autotune import AutotunedConv2d
from bgcbench.convs.bgc_algorithms import strided
from bgcbench.convs.followed import is_symbolic
from bgcbench.convs.layouts import is_channels_last, like_layout_of
from bgcbench.convs.plain import fixed
from bgcbench.specs import rank_of
from bgcbench.theory.leastsquares import Fit, shrunk


class LowRankConv2d(AutotunedConv2d):
    """y = P (R * x), with ``weight_reduce`` = R (r, n, kh, kw) and ``weight_expand`` = P (m, r, 1, 1).

    x: (B, n, H, W); returns (B, m, H', W'). One bias (m,). Parameters r(Kn + m), MACs D times that. ``groups`` = N is
    the reduction, for comparison at equal parameters: r = floor(Kmn / (N(Kn + m))), so that the layer has at most the
    Kmn/N of a group convolution; N need not divide the channels. ``rank`` = r says it directly, and N is then the
    largest reduction that this rank keeps to (1 where it keeps to none). He initialisation acts on each factor with
    its own fan (Kn and r).

    algorithm: they compute the same map, equal to rounding:
        'two_conv'  R's convolution, then the pointwise one
        'dense'     one standard convolution with the folded kernel D
        'matmul'    two products of matrices; for 1x1 kernels without padding
        'auto'      the fastest of these here, measured once for each shape (see bgcbench.convs.autotune)

    N = 1 without a rank: the layer holds the dense kernel alone (``weight_expand`` is None) and is the standard
    convolution. Raises ShapeError where N leaves no rank, and for a rank above min(m, Kn).
    """

    variant = "lowrank"
    kernel_name = "weight_reduce"
    weight_reduce: nn.Parameter
    weight_expand: nn.Parameter | None

    @property
    def rank(self) -> int:
        """r, the channels between the factors; m where there is one kernel alone (N = 1)."""
        return len(self.weight_reduce)

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super()._create_weights(device, dtype)
        self.weight_expand, rank = None, self.out_channels
        if not self.spec.is_dense:
            rank = self.spec.rank or rank_of(
                self.in_channels, self.out_channels, self.groups, self.spec.kernel_positions
            )
            self.weight_expand = nn.Parameter(torch.empty(self.out_channels, rank, 1, 1, device=device, dtype=dtype))
        shape = (rank, self.in_channels, *self.kernel_size)
        self.weight_reduce = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        if self.weight_expand is None:
            return self._convolve(input, self.weight_reduce, self.bias, 1)
        return self._run(self._pick(input), input, self._weights(), self.bias)

    def candidates(self, x: Tensor, weight: Tensor) -> tuple[str, ...]:
        return self.spec.algorithms

    def _run(self, algorithm: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        reduce, expand = weights
        if is_symbolic(x):  # a product of kernels alone would be recorded as a constant
            algorithm = "two_conv"
        if algorithm == "dense":
            return self._convolve(x, dense_kernel(reduce, expand), bias, 1)
        if algorithm == "matmul":
            return like_layout_of(x, products(strided(x, self.stride), reduce, expand, bias))
        y = F.conv2d(self._convolve(x, reduce, None, 1), expand, bias)
        return like_layout_of(x, y)

    def _scale_outputs(self, scale: Tensor) -> None:
        (self.weight_reduce if self.weight_expand is None else self.weight_expand).mul_(scale[:, None, None, None])

    def dense_weight(self) -> Tensor:
        if self.weight_expand is None:
            return self.weight_reduce
        return dense_kernel(self.weight_reduce, self.weight_expand)

    def _plain(self, algorithm: str) -> nn.Module:
        expand: Any = self.weight_expand
        pointwise = fixed(expand[:, :, 0, 0])
        pointwise.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return nn.Sequential(self._stock(self.weight_reduce), pointwise)

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """The truncated singular value decomposition ('copy' and 'white'), or reduced-rank regression."""
        if self.weight_expand is None:
            return {"weight_reduce": weight}
        if fit is None:
            expand, reduce = factored(weight.flatten(1), None, self.rank)
        else:
            best, moment, _ = shrunk(weight, fit)
            expand, reduce = factored(best.flatten(1), moment, self.rank)
        return {"weight_reduce": reduce.reshape(-1, *weight.shape[1:]), "weight_expand": expand[:, :, None, None]}

    def seen_entries(self) -> Iterator[Tensor]:
        """All of them: R reads every channel."""
        yield torch.arange(self.weight_reduce[0].numel(), device=self.weight_reduce.device)


def dense_kernel(reduce: Tensor, expand: Tensor) -> Tensor:
    """D = P R (m, n, kh, kw). reduce: (r, n, kh, kw); expand: (m, r, 1, 1)."""
    return torch.einsum("mr,rnhw->mnhw", expand.flatten(1), reduce)


def products(x: Tensor, reduce: Tensor, expand: Tensor, bias: Tensor | None) -> Tensor:
    """P (R x) of a 1x1 kernel as two products of matrices, in the layout of x (B, n, H, W) or (n, H, W)."""
    r, p = reduce.flatten(1), expand.flatten(1)
    if is_channels_last(x):
        return F.linear(F.linear(x.permute(0, 2, 3, 1), r), p, bias).permute(0, 3, 1, 2)
    y = x.flatten(-2)
    for matrix in (r, p):  # one for each image: for one alone torch.matmul would lay the images out anew
        y = matrix.expand(*y.shape[:-2], -1, -1) @ y  # (..., m, H W)
    y = y if bias is None else y + bias[:, None].to(y.dtype)  # autocast leaves a bias as it is
    return y.reshape(*y.shape[:-1], *x.shape[-2:])


def factored(target: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(P, R) of the given rank that minimise tr((T - P R) C (T - P R)^T) for T = ``target`` (m, p).

    moment: C (p, p), positive semidefinite and of any rank; None for the identity. With U the first ``rank``
    eigenvectors of T C T^T, P R = U U^T T is the optimum: U U^T T C^(1/2) is the truncated singular value
    decomposition of T C^(1/2) (Eckart & Young, 1936), and C^(1/2) need not be inverted. Where T is the least squares
    of wanted outputs, that is reduced-rank regression (Izenman, 1975). The factors share the singular values evenly.
    Returns P (m, rank), R (rank, p).
    """
    m, p = target.shape
    if m <= p:
        gram = target @ target.T if moment is None else target @ moment @ target.T  # (m, m)
        _, vectors = torch.linalg.eigh((gram + gram.T) / 2)  # ascending
        expand = vectors[:, -rank:].flip(1)  # (m, r)
    else:  # the same from the other side, which is smaller: with C = L L^T, U spans T L V, V of (T L)^T T L
        seen = target if moment is None else target @ _root(moment)  # (m, p)
        _, vectors = torch.linalg.eigh(seen.T @ seen)
        expand = torch.linalg.qr(seen @ vectors[:, -rank:].flip(1)).Q
    reduce = expand.T @ target  # (r, p)
    root = reduce.norm(dim=1).sqrt()
    root = torch.where(root > 0, root, torch.ones_like(root))
    return expand * root, reduce / root[:, None]


def _root(moment: Tensor) -> Tensor:
    """L (p, p) with L L^T = C, of any rank."""
    energies, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * energies.clamp_min(0).sqrt()
    return root
