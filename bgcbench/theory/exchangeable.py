"""Exact errors on inputs with exchangeable channels: the sharp constants of Theorems 3.5 and 3.6.

For i.i.d. zero-mean weights and an input law of :mod:`bgcbench.theory.inputs`, values independent from position to
position, the second moment of the patches is M = A (x) I_n + B (x) 1 1^T with K x K matrices over the kernel's taps:

    A = v (1 - rho) diag(c)         what a channel has of its own
    B = v rho diag(c) + mu^2 c2     what all channels share

c[a]: output positions at which tap a meets the image, c2[a, b]: at which both do (fewer than D at a padded border). By
symmetry the best estimate of a channel from the n_N = n/N channels of a group uses their mean only, and from that and
the mean over the groups the average over the other groups. So the least error, summed over positions, is

    gc     (1 - 1/N) tr(A + B - B (A / n_N + B)^+ B)       white input: (1 - 1/N) tr A
    bgc    (1 - 2/N) tr A                                  whatever the input has in common

times E||W||_par^2 / K, and the construction in the proof of Theorem 3.6 loses (1 - 1/N)^2 tr A. Divided by
E||W||_par^2 E||x||^2 the white values are border / n times (1 - 1/N), (1 - 2/N) and (1 - 1/N)^2, where border = sum c /
(K D_in) is the share of taps that meet the image. The paper's bounds have K/n where border/n is attained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgcbench.specs import LINEAR, VARIANTS, ConvSpec, Pair, output_length
from bgcbench.theory.inputs import InputLaw


def axis_coverage(length: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Tensor:
    """c2 of one axis: output positions at which taps a and b both stand on the input; (k, k), float64."""
    outputs = output_length(length, kernel, stride, padding, dilation)
    at = torch.arange(outputs)[:, None] * stride + torch.arange(kernel) * dilation - padding  # (D, k)
    inside = ((at >= 0) & (at < length)).double()
    return inside.T @ inside


def coverage(spec: ConvSpec, height: int, width: int) -> Tensor:
    """c2 of a 2-D kernel, taps in row-major order: (K, K), float64; its diagonal is c."""
    rows, columns = (axis_coverage(*axis) for axis in spec.axes(height, width))
    return torch.kron(rows, columns)


def border_factor(spec: ConvSpec, height: int, width: int) -> float:
    """sum c / (K D_in): 1 without padding and stride; (3D - 2) / (3D) for three taps on a padded row of D.

    A stride s makes it about 1/s^2, because there are fewer outputs than inputs. Over n it is the sharp constant of
    Lemma 3.4, E||Wx||^2 / (E||W||_par^2 E||x||^2) for white x, where the lemma has K/n.
    """
    return float(coverage(spec, height, width).diagonal().mean()) / (height * width)


def exact_relative_error(spec: ConvSpec, size: Pair, law: InputLaw) -> float | None:
    """Least error of ``spec``'s variant and N, over E||W||_par^2 E||x||^2; None where no closed form is known."""
    groups, n = spec.groups, spec.in_channels
    if spec.is_dense:
        return 0.0
    if spec.variant not in LINEAR:
        return None
    both = coverage(spec, *size)
    count = both.diagonal()
    own = torch.diag(law.variance * (1 - law.correlation) * count)
    shared = torch.diag(law.variance * law.correlation * count) + law.mean**2 * both
    if VARIANTS[spec.variant].sees_mean:
        lost = (1 - 2 / groups) * float(own.trace())
    else:
        estimate = shared @ torch.linalg.pinv(own * (groups / n) + shared, hermitian=True) @ shared
        lost = (1 - 1 / groups) * float((own + shared - estimate).trace())
    power = law.variance + law.mean**2
    return lost / (spec.kernel_positions * n * size[0] * size[1] * power)
