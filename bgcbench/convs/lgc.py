"""Learned group convolution (CondenseNet, Huang et al., 2018): prune a dense kernel into groups while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.convs.masked import MaskedConv2d, gather_channels
from bgcbench.convs.plain import Shuffled, Taken
from bgcbench.convs.shuffle import before_shuffle, shuffle_channels
from bgcbench.errors import UsageError
from bgcbench.theory.leastsquares import Fit, shrunk, solve_normal

LASSO_FLOOR = 1e-6  # under the root of the group lasso, whose gradient is unbounded at 0


class LearnedGroupConv2d(MaskedConv2d):
    """y_i = sum over the n/N inputs j that group i mod N has kept of W_ij x_j.

    The condensation factor is N, as in the paper's count: each of N groups ends with n/N inputs, chosen by itself, so
    an input may serve several groups or none. Outputs are interleaved: i belongs to group i mod N.

    Training (:meth:`set_progress`, called by the training loop and never by forward): in N - 1 stages, at the shares
    s / (2 (N - 1)) of the training, every group drops its n/N inputs with the smallest sum of |W_ij| (over its outputs
    and all taps); the second half of the training only trains. :meth:`group_lasso` is the penalty that goes with it.
    The original is for 1x1 kernels, with batch norm and ReLU in front of it; here the kernel may have any size, with
    one decision for all taps of a channel (its authors doubt that plain magnitude pruning suits 3x3 kernels).

    x: (B, n, H, W); returns (B, m, H', W'). Masked: ``weight`` (m, n, kh, kw) and the buffer ``kept`` (N, n); Kmn
    parameters (the paper counts the mask too: 2Kmn) and DKmn MACs. Deployed: ``weight_packed`` (m, n/N, kh, kw) in the
    order of the groups and the buffer ``columns`` (n,); Kmn/N and DKmn/N. Raises ShapeError if N does not divide n and
    m.
    """

    variant = "lgc"
    kept: Tensor
    columns: Tensor

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        n, groups = self.in_channels, self.groups
        per_row = n // groups if self.is_deployed else n
        shape = (self.out_channels, per_row, *self.kernel_size)
        self.register_parameter(self.kernel_name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._stage = 0
        if groups == 1:
            return
        if self.is_deployed:
            self.register_buffer("columns", torch.arange(n, device=device))  # (N * n/N,): group by group
        else:
            self.register_buffer("kept", torch.ones(groups, n, dtype=torch.bool, device=device))

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_packed:
            return self._convolve_masked(input)
        bias = None if self.bias is None else before_shuffle(self.bias, self.groups)
        y = self._convolve(gather_channels(input, self.columns), self.kernel, bias, self.groups)
        return shuffle_channels(y, self.groups)

    def dense_weight(self) -> Tensor:
        if not self.is_packed:
            return self.masked_kernel()
        m, n, groups = self.out_channels, self.in_channels, self.groups
        dense = self.kernel.new_zeros(groups, m // groups, n, *self.kernel_size)
        rows = self.kernel.unflatten(0, (groups, m // groups))  # (N, m/N, n/N, kh, kw)
        columns = self.columns.reshape(groups, n // groups)
        for group in range(groups):
            dense[group, :, columns[group]] = rows[group]
        return dense.transpose(0, 1).flatten(0, 1)  # output j N + g is row j of group g

    def _plain(self, algorithm: str) -> nn.Module:
        bias = None if self.bias is None else before_shuffle(self.bias, self.groups)
        conv = self._stock(self.kernel, bias, self.groups)
        return nn.Sequential(Taken(self.columns), conv, Shuffled(self.groups))

    def _scale_outputs(self, scale: Tensor) -> None:
        super()._scale_outputs(before_shuffle(scale, self.groups) if self.is_deployed else scale)

    def mask(self) -> Tensor:
        if self.groups == 1:
            return torch.ones_like(self.kernel[:, :, 0, 0])
        if self.is_deployed:
            kept = torch.zeros(self.groups, self.in_channels, dtype=torch.bool, device=self.columns.device)
            kept = kept.scatter(1, self.columns.reshape(self.groups, -1), True)
        else:
            kept = self.kept
        return kept.repeat(self.out_channels // self.groups, 1).to(self.kernel.dtype)  # row i: group i mod N

    def training_state(self) -> Mapping[str, Tensor]:
        if self.stage < self.stages:
            raise UsageError(
                f"this LGC layer has made {self.stage} of its {self.stages} drops and is not sparse yet; "
                "call set_progress(1.0), or train on, before deploy()"
            )
        return {"weight": self.kernel} if self.groups == 1 else {"weight": self.kernel, "kept": self.kept}

    def load_projected(self, values: Mapping[str, Tensor]) -> None:
        if "kept" in values:
            kept = values["kept"]
            if self.is_deployed:
                values = {self.kernel_name: pack(values["weight"], kept), "columns": kept_columns(kept).flatten()}
            self._stage = self.stages
        super().load_projected(values)

    def _take_structure(self, buffers: Mapping[str, Tensor]) -> None:
        if "kept" in buffers:
            per_group = int(buffers["kept"][0].sum())
            self._stage = (self.in_channels - per_group) // (self.in_channels // self.groups)

    @property
    def stages(self) -> int:
        """Number of drops in all: N - 1."""
        return self.groups - 1

    @property
    def stage(self) -> int:
        """Number of drops made so far."""
        return self.stages if self.is_deployed else self._stage

    @torch.no_grad()
    def set_progress(self, fraction: float) -> bool:
        """Bring the pruning to where it belongs after ``fraction`` (0 to 1) of the training; whether it dropped any.

        Drop s of 1..N-1 is made at fraction s / (2 (N - 1)). Going back does not bring anything back, and a deployed
        layer is at its end. Raises UsageError for a fraction outside 0..1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise UsageError(f"progress {fraction} must be a fraction between 0 and 1")
        # The tolerance lets s / (2 (N - 1)), computed in floating point, count as having arrived.
        stage = min(self.stages, math.floor(2 * fraction * self.stages + 1e-9))
        if stage <= self.stage:
            return False
        scores = column_scores(self.kernel * self.mask()[:, :, None, None], self.groups)
        scores = scores.masked_fill(~self.kept, -1.0)  # what is gone stays gone
        self.kept.copy_(top_columns(scores, self.in_channels - stage * (self.in_channels // self.groups)))
        self._stage = stage
        return True

    def group_lasso(self) -> Tensor:
        """sum_g sum_j sqrt(sum over i in g and taps of W_ij^2), to be weighted and added to the loss; a scalar.

        It draws a group's weight into few inputs while there is still something to drop, and is 0 after the last drop.
        """
        if self.stage >= self.stages:
            return self.kernel.new_zeros(())
        squares = column_scores(self.masked_kernel().square(), self.groups)  # (N, n)
        return squares.clamp_min(LASSO_FLOOR).sqrt().sum()

    @property
    def is_settled(self) -> bool:
        return self.stage >= self.stages

    def learnt(self) -> Mapping[str, float]:
        """kept: share of the inputs that a group has not yet dropped, at the end 1/N."""
        return {} if self.groups == 1 or self.is_deployed else {"kept": float(self.kept.float().mean())}

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """The kernel with n/N inputs kept in each group, in one shot.

        'copy' keeps those with the largest sum of |W_ij|, what the training's criterion would drop last; 'white' those
        with the most energy, which is the optimum on white input; 'least_squares' those whose contribution has the
        most energy by the second moment, with the weights then solved for (a search for the inputs, an optimum for
        the weights).
        """
        if self.groups == 1:
            return {"weight": weight}
        if fit is not None:
            return least_squares(weight, self.groups, fit)
        scores = column_scores(weight if projection == "copy" else weight.square(), self.groups)
        return {"weight": weight, "kept": top_columns(scores, weight.shape[1] // self.groups)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drops={self.stage}/{self.stages}"


def column_scores(values: Tensor, groups: int) -> Tensor:
    """Sum of |values| (m, n, kh, kw) over each group's outputs and all taps: (N, n). Output i is in group i mod N."""
    columns: Tensor = values.abs().flatten(2).sum(2).unflatten(0, (-1, groups))  # (m/N, N, n)
    return columns.sum(0)


def top_columns(scores: Tensor, count: int) -> Tensor:
    """The ``count`` inputs with the largest ``scores`` (N, n) in each group, as a mask (N, n)."""
    best = scores.topk(count, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


def kept_columns(kept: Tensor) -> Tensor:
    """The inputs that each group keeps, ascending: (N, n/N) from a mask (N, n) with equally many in each row."""
    return kept.nonzero()[:, 1].reshape(kept.shape[0], -1)


def pack(weight: Tensor, kept: Tensor) -> Tensor:
    """What ``kept`` (N, n) leaves of a dense kernel (m, n, kh, kw), group by group: (m, n/N, kh, kw)."""
    groups = kept.shape[0]
    rows = before_shuffle(weight, groups).unflatten(0, (groups, -1))  # (N, m/N, n, kh, kw)
    return torch.cat([rows[group][:, kept[group]] for group in range(groups)])


def least_squares(weight: Tensor, groups: int, fit: Fit) -> dict[str, Tensor]:
    """Inputs chosen by the energy of what they contribute, W_gj C_jj W_gj^T, and the best weights on them.

    weight: (m, n, kh, kw). Returns 'weight' (m, n, kh, kw), the solution in the kept columns and 0 elsewhere, and
    'kept' (N, n). A ridge shrinks C towards its white part; where outputs are wanted W gives way to the best dense
    kernel for them (see ``shrunk``).
    """
    weight, moment, whole = shrunk(weight, fit)
    m, n, height, width = weight.shape
    taps = height * width
    kept = top_columns(column_scores(contributions(weight, moment)[:, :, None, None], groups), n // groups)
    solved = torch.zeros_like(whole)
    for group in range(groups):
        at = kept[group].repeat_interleave(taps)  # which of the nK patch entries
        rows = slice(group, m, groups)
        part: Any = solved[rows]
        part[:, at] = solve_normal(moment[at][:, at], whole[rows][:, at])
    return {"weight": solved.reshape(m, n, height, width), "kept": kept}


def contributions(weight: Tensor, moment: Tensor) -> Tensor:
    """Q_ij = W_ij C_jj W_ij^T, the energy that input j alone brings to output i: (m, n)."""
    m, n = weight.shape[:2]
    taps = weight[0, 0].numel()
    diagonal = moment.reshape(n, taps, n, taps)[torch.arange(n), :, torch.arange(n)]  # C_jj: (n, K, K)
    flat = weight.reshape(m, n, taps).to(moment.dtype)
    return torch.einsum("ija,jab,ijb->ij", flat, diagonal, flat)
