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
from bgcbench.convs.base import VariantConv2d, diagonal_blocks, is_channels_last, like_layout_of, row_blocks
from bgcbench.convs.choices import is_autocast, is_transformed
from bgcbench.convs.gc import group_cross_moments
from bgcbench.theory.leastsquares import Fit, solve_normal

MOST_CALLS = 32  # groups that 'split' is offered for
PART_BYTES = 2**23  # of input that 'parts' works on at a time


class BalancedGroupConv2d(VariantConv2d):
    """y^k = A^k x^k + B^k xbar, with ``weight`` = A and ``weight_mean`` = B, both (m, n/N, kh, kw).

    x: (B, n, H, W); returns (B, m, H', W'). One bias (m,). Parameters 2Kmn/N, MACs 2DKmn/N and D_in n additions an
    image (eq. 3.14). Both branches share stride, padding and dilation, and the mean is taken once, before its
    convolution. He initialisation acts on A and B separately, each with fan_in K n/N (the paper says "He" and no
    more): on zero-mean independent inputs the second branch then carries 1/N of the first one's variance.

    algorithm: forms of the same map, equal to rounding:
        'two_conv'  a grouped convolution of x plus a convolution of xbar
        'concat'    one grouped convolution of [x^k ; xbar], the kernels concatenated
        'dense'     one standard convolution with the folded kernel D
        'split'     a convolution for each group, plus one of xbar: N + 1 large calls instead of a grouped one
        'parts'     'two_conv' on a few images at a time, whose activations stay in the cache
        'matmul'    batched matrix products; for 1x1 kernels without padding
        'triton'    one kernel of our own for both branches, forward and backward, on channels_last data (CUDA)
        'auto'      the fastest of these here, measured once for each shape (see bgcbench.convs.choices)

    N = 1: the mean is the input and B would only repeat A, so the layer holds A alone (``weight_mean`` is None) and
    is the standard convolution. N = n: one channel a group, a depthwise convolution plus one of the mean channel.
    Raises ShapeError if N does not divide n and m.
    """

    variant = "bgc"
    weight_mean: nn.Parameter | None

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super()._create_weights(device, dtype)
        self.weight_mean = nn.Parameter(torch.empty_like(self.weight)) if self.groups > 1 else None

    def _weights(self) -> list[nn.Parameter]:
        return [self.weight] if self.weight_mean is None else [self.weight, self.weight_mean]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_mean is None:
            return self._convolve(x, self.weight, self.bias, groups=1)
        return self._run(self._form(x), x, (self.weight, self.weight_mean), self.bias)

    def forms(self, x: Tensor) -> tuple[str, ...]:
        can_launch = kernels.usable(x, self.weight, self.stride, self.padding, self.dilation, self.groups)
        left_out = set() if can_launch else {"triton"}
        if self.groups > MOST_CALLS:
            left_out.add("split")
        if len(x) <= images_in_part(x):
            left_out.add("parts")  # there would be one
        return tuple(form for form in self.spec.algorithms if form not in left_out)

    def _run(self, form: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if x.dim() == 3:
            return self._run(form, x[None], weights, bias)[0]
        a, b = weights
        if form == "triton" and self.dilation == (1, 1) and not is_transformed():
            from bgcbench.kernels.bgc import bgc_conv2d

            padded, padding = self._padded(x)
            return like_layout_of(x, bgc_conv2d(padded, a, b, bias, self.stride, padding, self.groups))
        if form == "dense":
            folded = dense_kernel(a, b, self.groups)
            if is_channels_last(x):  # the convolution follows its kernel's layout where the two differ
                folded = folded.contiguous(memory_format=torch.channels_last)
            return self._convolve(x, folded, bias, groups=1)
        if form == "parts":
            parts = x.split(images_in_part(x))
            return torch.cat([self._run("two_conv", part, weights, bias) for part in parts])
        return self._branches(form, x, weights, bias)

    def _branches(self, form: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """The forms in which the groups and their mean stand side by side."""
        a, b = weights
        stride = self.stride
        if self.spec.is_pointwise:
            x, stride = strided(x, stride), (1, 1)
        mean, b = mean_and_kernel(x, b, self.groups)
        if form == "matmul":
            return matrix_products(x, mean, a, b, bias, self.groups)
        if form == "concat":
            both = torch.cat([a, b], dim=1)  # (m, 2n/N, kh, kw)
            return self._convolve(append_to_groups(x, mean, self.groups), both, bias, self.groups, stride)
        # The mean's branch first: backward runs in the opposite order, so that the gradient of x is there, whole, when
        # that of the mean (which is expanded, not stored) is added to it in place.
        shared = self._convolve(mean, b, bias, 1, stride)
        if form == "split":
            pairs = zip(x.chunk(self.groups, 1), a.chunk(self.groups), strict=True)
            own = torch.cat([self._convolve(group, kernel, None, 1, stride) for group, kernel in pairs], dim=1)
        else:
            own = self._convolve(x, a, None, self.groups, stride)
        return _added(own, shared)

    def dense_weight(self) -> Tensor:
        if self.weight_mean is None:
            return self.weight
        return dense_kernel(self.weight, self.weight_mean, self.groups)

    @classmethod
    def project(cls, weight: Tensor, groups: int, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """Theorem 3.6's construction ('copy'), the white optimum, or least squares on a second moment."""
        if groups == 1:
            return {"weight": weight}
        if fit is not None:
            a, b = least_squares(weight, groups, fit.second_moment, fit.ridge, fit.cross_moment)
        else:
            a, b = copy_blocks(weight, groups) if projection == "copy" else white_optimum(weight, groups)
        return {"weight": a, "weight_mean": b}

    def normal_matrices(self, moment: Tensor) -> Iterator[Tensor]:
        if self.groups == 1:
            yield moment
        else:
            size = len(moment) // self.groups
            yield from regressor_moments(moment.reshape(self.groups, size, self.groups, size))


def images_in_part(x: Tensor) -> int:
    """Images of x (B, n, H, W) that 'parts' works on at a time: as many as keep within PART_BYTES, at least 1."""
    return max(1, PART_BYTES // max(1, x[0].numel() * x.element_size())) if len(x) else 1


def strided(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The positions of x (B, n, H, W) that a 1x1 kernel without padding sees; the others need not even be averaged."""
    if stride == (1, 1):
        return x
    return like_layout_of(x, x[..., :: stride[0], :: stride[1]])


def by_groups(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """A view of x (..., n, H, W) with an axis for the groups, and which one: x's layout decides where it is."""
    if is_channels_last(x):
        # On the NHWC view sums run over one contiguous axis pair, and their result is channels_last again.
        return x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1)), -2  # (B, H, W, N, n/N)
    return x.unflatten(-3, (groups, -1)), -4  # (..., N, n/N, H, W)


def group_mean(x: Tensor, groups: int) -> Tensor:
    """xbar = (1/N) sum_k x^k over contiguous groups. x: (..., n, H, W); returns (..., n/N, H, W), x's layout."""
    grouped, axis = by_groups(x, groups)
    mean = grouped.mean(axis)
    return mean.permute(0, 3, 1, 2) if axis == -2 else mean


def mean_and_kernel(x: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """xbar and B; or sum_k x^k and B/N, which are as good and cheaper: the gradient of a sum is never stored.

    x: (..., n, H, W); b: (m, n/N, kh, kw). In half precision a sum could be too large, and B/N too small.
    """
    if x.dtype not in (torch.float32, torch.float64) or is_autocast(x):
        return group_mean(x, groups), b
    grouped, axis = by_groups(x, groups)
    alone = groups == 2 and not torch.is_grad_enabled()  # adding two is several times faster than a sum over an axis
    total = torch.add(*grouped.unbind(axis)) if alone else grouped.sum(axis)
    return total.permute(0, 3, 1, 2) if axis == -2 else total, b / groups


def append_to_groups(x: Tensor, mean: Tensor, groups: int) -> Tensor:
    """[x^1 ; xbar ; x^2 ; xbar ; ...]: every group followed by the same maps.

    x: (..., n, H, W); mean: (..., n/N, H, W); returns (..., 2n, H, W) in x's layout.
    """
    grouped, axis = by_groups(x, groups)
    if axis == -2:
        rows = mean.permute(0, 2, 3, 1).unsqueeze(-2).expand_as(grouped)
        return torch.cat([grouped, rows], dim=-1).flatten(-2).permute(0, 3, 1, 2)
    return torch.cat([grouped, mean.unsqueeze(-4).expand_as(grouped)], dim=-3).flatten(-4, -3)


def matrix_products(x: Tensor, mean: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The layer with 1x1 kernels as batched products of matrices.

    x: (B, n, H, W); mean: (B, n/N, H, W); a, b: (m, n/N, 1, 1); bias: (m,); returns (B, m, H, W).
    """
    images, channels, height, width = x.shape
    outputs, size = len(a), channels // groups
    if is_channels_last(x):
        positions = images * height * width
        rows = x.permute(0, 2, 3, 1).reshape(positions, groups, size).transpose(0, 1)  # (N, R, n/N)
        blocks = a.reshape(groups, outputs // groups, size).mT  # (N, n/N, m/N)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed() or is_autocast(x)):
            # Products added straight into their columns of the result, which autograd would have to copy each time.
            shared = nn.functional.conv2d(mean, b, bias).contiguous(memory_format=torch.channels_last)
            y = shared.permute(0, 2, 3, 1)  # (B, H, W, m)
            columns = y.view(positions, groups, outputs // groups).unbind(1)
            for own, group, kernel in zip(columns, rows, blocks, strict=True):
                own.addmm_(group, kernel)
            return y.permute(0, 3, 1, 2)
        means, kernel = mean.permute(0, 2, 3, 1).reshape(positions, size), b.flatten(1).mT
        shared = means @ kernel if bias is None else torch.addmm(bias, means, kernel)  # (R, m)
        y = torch.baddbmm(shared.unflatten(-1, (groups, -1)).transpose(0, 1), rows, blocks)  # (N, R, m/N)
        return y.transpose(0, 1).reshape(images, height, width, outputs).permute(0, 3, 1, 2)
    kernels, means = b.flatten(1).expand(images, -1, -1), mean.flatten(2)
    shared = kernels @ means if bias is None else torch.baddbmm(bias[:, None], kernels, means)  # (B, m, HW)
    blocks = a.reshape(1, groups, outputs // groups, size).expand(images, -1, -1, -1).flatten(0, 1)  # (B N, m/N, n/N)
    grouped = x.reshape(images * groups, size, height * width)
    y = torch.baddbmm(shared.reshape(images * groups, outputs // groups, height * width), blocks, grouped)
    return y.reshape(images, outputs, height, width)


def _added(own: Tensor, shared: Tensor) -> Tensor:
    """own + shared, in the memory of the first where nobody else can be looking at it."""
    plain = torch.compiler.is_compiling() or is_transformed()
    return own + shared if plain else own.add_(shared)


def dense_kernel(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """D[k, l] = [k = l] A^k + B^k / N (eq. 3.1 written as one convolution).

    a, b: (m, n/N, kh, kw); returns (m, n, kh, kw).
    """
    everywhere = (b / groups).unflatten(0, (groups, -1)).unsqueeze(2)  # (N, m/N, 1, n/N, kh, kw)
    everywhere = everywhere.expand(-1, -1, groups, -1, -1, -1)
    diagonal = everywhere.diagonal(dim1=0, dim2=2) + a.unflatten(0, (groups, -1)).movedim(0, -1)
    return torch.diagonal_scatter(everywhere, diagonal, dim1=0, dim2=2).flatten(2, 3).flatten(0, 1)


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


def least_squares(
    weight: Tensor, groups: int, second_moment: Tensor, ridge: float = 0.0, cross_moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The (A, B) that minimise E||Wu - D u||^2 for inputs with C = E[u u^T] = ``second_moment``.

    With z_k = [u^k ; ubar] = T_k u:  [A^k B^k] = W^{k,:} C T_k^T (T_k C T_k^T)^+ ; ``ridge`` pulls it towards the
    white optimum. With ``cross_moment`` K = E[y u^T] in the place of W C it is E||y - D u||^2. weight: (m, n, kh, kw);
    second_moment: (nK, nK), u in unfold order; N >= 2; returns A, B: (m, n/N, kh, kw).
    """
    moment, cross = group_cross_moments(weight, groups, second_moment, cross_moment)  # (N, p, N, p), (N, m/N, N, p)
    prior = torch.cat([part.flatten(1) for part in white_optimum(weight, groups)], dim=1)  # (m, 2p)
    prior = prior.to(moment.dtype).unflatten(0, (groups, -1))  # (N, m/N, 2p)
    solved = []
    for k, gram in enumerate(regressor_moments(moment)):
        target = torch.cat([cross[k, :, k], cross[k].mean(1)], dim=1)  # W^{k,:} C T_k^T: (m/N, 2p)
        solved.append(solve_normal(gram, target, ridge=ridge, prior=prior[k]))
    shape: tuple[Any, ...] = (weight.shape[0], weight.shape[1] // groups, *weight.shape[2:])
    a, b = torch.cat(solved).chunk(2, dim=1)  # (m, p) each
    return a.reshape(shape), b.reshape(shape)
