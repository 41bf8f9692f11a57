"""Balanced group convolution (Lee, Park & Lee, eq. 3.1): a group convolution plus a convolution of the group mean.

    y^k = A^k x^k + B^k xbar,    xbar = (1/N) sum_l x^l,    groups k = 1..N contiguous

Equivalently one standard convolution with the dense kernel D[k, l] = [k = l] A^k + B^k / N. The map (A, B) -> D is
injective for N >= 2, so the layer is a linear space of dimension 2Kmn/N of standard convolutions; at N = 2 that is
all of them (2Kmn/2 = Kmn): BGC at N = 2 saves nothing and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench import kernels
from bgcbench.convs import bgc_algorithms
from bgcbench.convs.autotune import AutotunedConv2d, computed_in
from bgcbench.convs.bgc_algorithms import Geometry, dense_kernel, strided
from bgcbench.convs.blocks import diagonal_blocks, row_blocks
from bgcbench.convs.followed import is_followed, is_symbolic, is_transformed
from bgcbench.convs.gc import group_moments
from bgcbench.convs.layouts import like_layout_of
from bgcbench.convs.plain import Added, GroupSum, Sliced, fixed
from bgcbench.theory.leastsquares import Fit, solve_normal

MAX_SPLIT = 32  # groups; beyond, 'split' makes too many calls to be worth a try


class BalancedGroupConv2d(AutotunedConv2d):
    """y^k = A^k x^k + B^k xbar, with ``weight_group`` = A and ``weight_mean`` = B, both (m, n/N, kh, kw).

    x: (B, n, H, W); returns (B, m, H', W'). One bias (m,). Parameters 2Kmn/N, MACs 2DKmn/N and D_in n additions an
    image (eq. 3.14). Both branches share stride, padding and dilation, and the mean is taken once, before its
    convolution. He initialisation acts on A and B separately, each with fan_in K n/N (the paper says "He" and no
    more): on zero-mean independent inputs the second branch then carries 1/N of the first one's variance.

    algorithm: they compute the same map, equal to rounding:
        'two_conv'  a grouped convolution of x plus a convolution of xbar
        'concat'    one grouped convolution of [x^k ; xbar], the kernels concatenated
        'dense'     one standard convolution with the folded kernel D
        'split'     a convolution for each group, plus one of xbar: N + 1 large calls instead of a grouped one
        'matmul'    products of matrices; for 1x1 kernels without padding
        'triton'    one kernel of our own for both branches, forward and backward, on channels_last data (CUDA)
        'auto'      the fastest of these here, measured once for each shape (see bgcbench.convs.autotune)

    Where bgcbench is not (:meth:`plain`): 'two_conv', 'split' and 'dense' as here, the mean by slices, and 'matrix',
    which is 'two_conv' with the mean by a constant 1x1 convolution, for runtimes that lay channels out in blocks.

    N = 1: the mean is the input and B would only repeat A, so the layer holds A alone (``weight_mean`` is None) and
    is the standard convolution. N = n: one channel a group, a depthwise convolution plus one of the mean channel.
    Raises ShapeError if N does not divide n and m.
    """

    variant = "bgc"
    kernel_name = "weight_group"
    weight_group: nn.Parameter
    weight_mean: nn.Parameter | None

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super()._create_weights(device, dtype)
        self.weight_mean = nn.Parameter(torch.empty_like(self.weight_group)) if self.groups > 1 else None

    def forward(self, input: Tensor) -> Tensor:
        a, b = self.weight_group, self.weight_mean
        if b is None:
            return self._convolve(input, a, self.bias, groups=1)
        return self._run(self._pick(input), input, (a, b), self.bias)

    def candidates(self, x: Tensor, weight: Tensor) -> tuple[str, ...]:
        can_launch = kernels.usable(x, weight, self.stride, self.padding, self.dilation, self.groups)
        left_out = set() if can_launch else {"triton"}
        if self.groups > MAX_SPLIT:
            left_out.add("split")
        return tuple(name for name in self.spec.algorithms if name not in left_out)

    def _run(self, algorithm: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if not is_symbolic(x) and x.dim() == 3:
            return self._run(algorithm, x[None], weights, bias)[0]
        a, b = weights
        if not is_followed(x) and kernels.autocast_on(
            x.device.type
        ):  # what autocast would do to each operation, once for all of them
            dtype = computed_in(x)
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                return self._run(algorithm, x, (a, b), bias)
        padded, padding = self._padded(x)
        if algorithm == "triton" and self.dilation == (1, 1) and not is_transformed():
            from bgcbench.kernels.bgc import bgc_conv2d

            return like_layout_of(x, bgc_conv2d(padded, a, b, bias, self.stride, padding, self.groups))
        stride = self.stride
        if self.spec.is_pointwise and algorithm != "dense":
            padded, stride = strided(padded, stride), (1, 1)
        geometry = Geometry(stride, padding, self.dilation, self.groups)
        if algorithm == "matmul":
            y = bgc_algorithms.matrix_products(padded, a, b, bias, self.groups)
        elif algorithm == "dense":
            y = bgc_algorithms.dense(padded, a, b, bias, geometry)
        elif algorithm == "concat":
            y = bgc_algorithms.concatenated(padded, a, b, bias, geometry)
        else:
            y = bgc_algorithms.two_branches(padded, a, b, bias, geometry, split=algorithm == "split")
        return y

    def dense_weight(self) -> Tensor:
        if self.weight_mean is None:
            return self.weight_group
        return dense_kernel(self.weight_group, self.weight_mean, self.groups)

    def _plain(self, algorithm: str) -> nn.Module:
        a, groups = self.weight_group, self.groups
        b: Any = self.weight_mean
        if algorithm == "matrix":
            one = torch.eye(self.in_channels // groups, device=a.device, dtype=a.dtype) / groups
            shared = nn.Sequential(fixed(one.repeat(1, groups)), self._stock(b, self.bias))
        else:
            shared = nn.Sequential(GroupSum(self.in_channels, groups), self._stock(b / groups, self.bias))
        if algorithm != "split":
            return Added(self._stock(a, None, groups), shared)
        starts = range(0, self.in_channels, self.in_channels // groups)
        return Added(Sliced([self._stock(block) for block in a.chunk(groups)], starts), shared)

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """Theorem 3.6's construction ('copy'), the white optimum, or least squares on a second moment."""
        if self.groups == 1:
            return {"weight_group": weight}
        if fit is not None:
            a, b = least_squares(weight, self.groups, fit)
        else:
            a, b = copy_blocks(weight, self.groups) if projection == "copy" else white_optimum(weight, self.groups)
        return {"weight_group": a, "weight_mean": b}

    def normal_matrices(self, moment: Tensor) -> Iterator[Tensor]:
        if self.groups == 1:
            yield moment
        else:
            size = len(moment) // self.groups
            yield from regressor_moments(moment.reshape(self.groups, size, self.groups, size))


def _off_diagonal_sum(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The diagonal blocks W^{kk} and S^k = sum_{l != k} W^{kl}, each (m, n/N, kh, kw)."""
    diagonal = diagonal_blocks(weight, groups)
    return diagonal, row_blocks(weight, groups).sum(2).flatten(0, 1) - diagonal


def copy_blocks(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The construction in the proof of Theorem 3.6: A^k = W^{kk}, B^k = S^k = sum_{l != k} W^{kl}.

    White error (1 - 1/N)^2. It is not a projection: rebuilding a layer from its own dense kernel gives A + B/N and
    (N-1)/N of B. weight: (m, n, kh, kw); returns A, B: (m, n/N, kh, kw).
    """
    return _off_diagonal_sum(weight, groups)


def white_optimum(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The least-squares optimum for uncorrelated inputs: A^k = W^{kk} - S^k/(N-1), B^k = N/(N-1) S^k, N >= 2.

    The coefficient of every x^l with l != k is the shared B^k/N, whose best value is the mean of W^{kl} over l != k;
    A^k then makes the k-th coefficient exact. White error 1 - 2/N, exact for every W at N = 2. It stays optimal for
    any input whose groups are exchangeable: E[x^l | x^k, xbar] = (N xbar - x^k)/(N - 1) for each l != k.
    weight: (m, n, kh, kw); returns A, B: (m, n/N, kh, kw).
    """
    diagonal, rest = _off_diagonal_sum(weight, groups)
    return diagonal - rest / (groups - 1), rest * (groups / (groups - 1))


def regressor_moments(moment: Tensor) -> Iterator[Tensor]:
    """T_k C T_k^T = E[z_k z_k^T] for z_k = [u^k ; ubar], group by group: (2p, 2p). moment: C as (N, p, N, p)."""
    with_mean = moment.mean(2)  # E[u^k ubar^T]: (N, p, p)
    mean_mean = with_mean.mean(0)  # E[ubar ubar^T]: (p, p)
    for k in range(len(moment)):
        upper = torch.cat([moment[k, :, k], with_mean[k]], dim=1)
        yield torch.cat([upper, torch.cat([with_mean[k].T, mean_mean], dim=1)])


def least_squares(weight: Tensor, groups: int, fit: Fit) -> tuple[Tensor, Tensor]:
    """The (A, B) that minimise E||Wu - D u||^2 for the inputs of ``fit``, or E||y - D u||^2 for its outputs y.

    With z_k = [u^k ; ubar] = T_k u:  [A^k B^k] = W^{k,:} C T_k^T (T_k C T_k^T)^+ , with E[y u^T] in the place of W C;
    a ridge pulls it towards the white optimum. weight: (m, n, kh, kw); N >= 2; returns A, B: (m, n/N, kh, kw).
    """
    moment, cross = group_moments(weight, groups, fit)  # (N, p, N, p), (N, m/N, N, p)
    prior = torch.cat([part.flatten(1) for part in white_optimum(weight, groups)], dim=1)  # (m, 2p)
    prior = prior.to(moment.dtype).unflatten(0, (groups, -1))  # (N, m/N, 2p)
    solved = []
    for k, gram in enumerate(regressor_moments(moment)):
        target = torch.cat([cross[k, :, k], cross[k].mean(1)], dim=1)  # W^{k,:} C T_k^T: (m/N, 2p)
        solved.append(solve_normal(gram, target, ridge=fit.ridge, prior=prior[k]))
    shape: tuple[Any, ...] = (weight.shape[0], weight.shape[1] // groups, *weight.shape[2:])
    a, b = torch.cat(solved).chunk(2, dim=1)  # (m, p) each
    return a.reshape(shape), b.reshape(shape)
