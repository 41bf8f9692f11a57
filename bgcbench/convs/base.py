"""The contract that every convolution variant keeps.

A variant maps x (B, n, H, W) to y (B, m, H', W') linearly and translation-equivariantly, so it equals a standard
convolution with a structured dense kernel D (m, n, kh, kw). The contract, run over all variants by
tests/convs/test_contract.py:

    layer(x) == conv2d(x, layer.dense_weight(), layer.bias, stride, padding, dilation)
    layer_type.from_dense(W, ...) is the member of the variant closest to W in the sense of its projection
    layer.params and layer.macs(H, W) are the counting rule of the variant (specs.VARIANTS)

Forward, dense kernel and projection are only right relative to one another, so each variant keeps the three in one
file as functions of tensors; the module only owns parameters.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs.layouts import is_channels_last, like_layout_of
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.counts import Counts, count
from bgcbench.specs import VARIANTS, ConvSpec, as_pair, check_choice
from bgcbench.theory.leastsquares import Fit

if TYPE_CHECKING:
    from typing_extensions import Self

PROJECTIONS = ("copy", "white", "least_squares")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class VariantConv2d(nn.Module, ABC):
    """Base of the variants: Conv2d's arguments, validation, padding, initialisation and counts.

    Arguments are those of ``torch.nn.Conv2d`` in the same order up to ``bias``; the rest are keyword-only.
    ``padding`` is a number or a pair, not a string. ``rank`` is for variants that have one (see ConvSpec).
    Raises ShapeError for sizes below 1 and for channels that ``groups`` does not divide.
    """

    variant: ClassVar[str]
    # Programs that fold norms, prune or quantise assume that weight, bias and groups describe a convolution. A layer
    # with more kernels, or with rows in another order than its outputs, gives its first kernel another name, so that
    # such programs fail instead of computing something wrong (see bgcbench.fold_norms).
    kernel_name: str = "weight"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        padding_mode: str = "zeros",
        algorithm: str = "auto",
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = ConvSpec(
            self.variant,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            algorithm,
            rank,
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, self.spec.groups
        self.kernel_size = as_pair("kernel_size", kernel_size)
        self.stride = as_pair("stride", stride)
        self.padding = as_pair("padding", padding, 0)
        self.dilation = as_pair("dilation", dilation)
        self.padding_mode = check_choice("padding_mode", padding_mode, _PADDING_MODES)
        self._create_weights(device=device, dtype=dtype)
        own = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        self.reset_parameters()

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Create the ``kernel`` (m, n/N, kh, kw); variants with more tensors extend this."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self.register_parameter(self.kernel_name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @property
    def kernel(self) -> nn.Parameter:
        """The first kernel, whatever its name."""
        kernel: nn.Parameter = getattr(self, self.kernel_name)
        return kernel

    def _weights(self) -> list[nn.Parameter]:
        """The kernels, each initialised with its own fan: the parameters whose names begin with "weight"."""
        return [own for name, own in self.named_parameters(recurse=False) if name.startswith("weight")]

    def reset_parameters(self) -> None:
        """He initialisation: every kernel normal with variance 2 / fan_in, the bias zero (He et al., 2015).

        fan_in is K n/N, what one output really sums over. PyTorch's fan_out of a grouped kernel is K m instead of
        K m/N, which would make its variance N times too small, so fan_in is what compares variants fairly.
        """
        for weight in self._weights():
            nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """y (B, m, H', W') for an input x (B, n, H, W)."""

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for before it looks at a module."""
        raise UsageError(
            f"{type(self).__name__} cannot be scripted; use torch.jit.trace, torch.export or torch.compile, "
            "or put its folded() in its place"
        )

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """D (m, n, kh, kw), the kernel of the standard convolution that this layer equals. Differentiable."""

    @abstractmethod
    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """The parameters of such a layer, by name, for the standard kernel ``weight`` (m, n, kh, kw).

        fit: what 'least_squares' looks at, None for the other projections.
        """

    def normal_matrices(self, moment: Tensor) -> Iterator[Tensor]:
        """The matrices E[z z^T] that least squares solves with, a group each, for inputs with E[u u^T] = ``moment``.

        moment: (nK, nK); z is what the outputs of a group see of a patch u. Of a variant that is no linear space, of
        its part that is solved for last, as its structure is now.
        """
        for at in self.seen_entries():
            yield moment[at][:, at]

    def seen_entries(self) -> Iterator[Tensor]:
        """Which of the nK entries of a patch each group's own kernel sees, as numbers: contiguous groups, here."""
        size = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        yield from torch.arange(size, device=self.kernel.device).chunk(self.groups)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        groups: int = 1,
        *,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        projection: str = "white",
        second_moment: Tensor | None = None,
        cross_moment: Tensor | None = None,
        ridge: float = 0.0,
        **options: Any,
    ) -> Self:
        """The layer of this variant that stands in for the standard convolution with kernel ``weight``.

        weight: (m, n, kh, kw); bias: (m,) or None, taken over as it is; ``options`` go to the constructor.
        Device and dtype are the weight's; the projection is computed in float64.

        projection:
            'copy'           what the paper does: weights are copied (BGC: the construction in the proof of Thm 3.6)
            'white'          the closed-form optimum for uncorrelated inputs of equal power
            'least_squares'  the optimum for inputs with ``second_moment`` E[u u^T] (nK, nK), u the patch vector in
                             ``torch.nn.functional.unfold``'s order (see theory.moments.patch_second_moment);
                             ``ridge`` >= 0 pulls it towards 'white'. With ``cross_moment`` E[y u^T] (m, nK) it is
                             to make the outputs y, which may be others than W u, from these inputs

        Raises ShapeError where shapes do not fit and UsageError for an unknown projection, for
        'least_squares' without a second moment and for a second moment or ridge that would not be used.
        """
        if weight.dim() != 4:
            raise ShapeError(f"weight has shape {tuple(weight.shape)}; a standard kernel is (m, n, kh, kw)")
        check_choice("projection", projection, PROJECTIONS)
        if projection == "least_squares" and second_moment is None:
            raise UsageError("projection 'least_squares' needs second_moment=E[u u^T]; without one use 'white'")
        if projection != "least_squares" and (second_moment is not None or cross_moment is not None or ridge):
            raise UsageError(
                f"projection '{projection}' uses no second_moment, cross_moment or ridge; use 'least_squares'"
            )
        fit = None if second_moment is None else Fit(second_moment, cross_moment, ridge)
        out_channels, in_channels, height, width = weight.shape
        shape = in_channels, out_channels, (height, width), stride, padding, dilation, groups, bias is not None
        layer = cls(*shape, device=weight.device, dtype=weight.dtype, **options)
        with torch.no_grad():
            layer.load_projected(layer.project(weight.detach().double(), projection, fit))
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    @classmethod
    def of(cls, spec: ConvSpec, **options: Any) -> Self:
        """The layer that ``spec`` describes; ``options`` (device, dtype, padding_mode) go to the constructor."""
        arguments = {name: value for name, value in vars(spec).items() if name != "variant"}
        return cls(**arguments, **options)

    def folded(self) -> nn.Conv2d:
        """PyTorch's standard convolution that computes what this layer does now, with the kernel ``dense_weight()``.

        For inference where that is faster (BGC at N = 2, narrow layers): the kernel is made once instead of at each
        call. It holds K m n weights and follows no later change of this layer.
        """
        return self._stock(self.dense_weight(), self.bias)

    def plain(self, algorithm: str) -> nn.Module:
        """What this layer computes now as a module of standard operations alone, which needs nothing of bgcbench.

        algorithm: one of ``spec.plain``; all of them compute the same map, equal to rounding. 'dense' is
        :meth:`folded`; the layer's docstring has the others. A masked layer (LGC, FLGC) is to be deployed first. The
        module follows no later change of this layer. Raises UsageError for another algorithm.
        """
        check_choice(f"plain algorithm of {self.variant}", algorithm, self.spec.plain)
        with torch.no_grad():
            module = self.folded() if algorithm == "dense" else self._plain(algorithm)
        return module.train(self.training)

    def _plain(self, algorithm: str) -> nn.Module:
        """plain by an algorithm that is not 'dense'; of variants that have one."""
        raise NotImplementedError(algorithm)

    def _stock(self, kernel: Tensor, bias: Tensor | None = None, groups: int = 1) -> nn.Conv2d:
        """PyTorch's convolution with copies of ``kernel`` and ``bias``, and this layer's geometry and layout."""
        conv = nn.Conv2d(
            groups * kernel.shape[1],
            len(kernel),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            groups,
            bias=bias is not None,
            padding_mode=cast("Any", self.padding_mode),
            device=kernel.device,
            dtype=kernel.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(kernel)
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias)
        if is_channels_last(self.kernel):
            conv = conv.to(memory_format=torch.channels_last)
        return conv.train(self.training)

    @torch.no_grad()
    def fold_affine(self, scale: Tensor, shift: Tensor) -> None:
        """Make the layer put out scale y + shift in the place of y, channel by channel, (m,) each; in place.

        All kernels are scaled, and a layer without a bias gets one.
        """
        self._scale_outputs(scale.to(self.kernel))
        total = shift if self.bias is None else shift + scale * self.bias.to(scale)
        if self.bias is None:
            self.spec = dataclasses.replace(self.spec, bias=True)
            self.bias = nn.Parameter(total.to(self.kernel), self.kernel.requires_grad)
        else:
            self.bias.copy_(total)

    def _scale_outputs(self, scale: Tensor) -> None:
        """Multiply what makes output channel c by scale (m,); here the rows of every kernel are in that order."""
        for kernel in self._weights():
            kernel.mul_(scale[:, None, None, None])

    def load_projected(self, values: Mapping[str, Tensor]) -> None:
        """Take over the tensors that :meth:`project` returned."""
        state = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, value in values.items():
            state[name].copy_(value)

    @property
    def algorithm(self) -> str:
        """The exact algorithm that forward runs; 'auto' where the fastest is measured (see bgcbench.convs.autotune)."""
        return VARIANTS[self.variant].settled(self.spec.algorithm)

    @property
    def chosen(self) -> Mapping[str, str]:
        """The algorithm of the last call in 'inference' and in 'training'; without a call there is none."""
        return dict.fromkeys(("inference", "training"), self.algorithm)

    @property
    def params(self) -> int:
        """Numbers this layer stores, its bias included (formula; equals the sum of its parameters' sizes).

        This is what a masked layer (LGC, FLGC) deploys; while it trains it stores ``counts(...).params_training``.
        """
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return self.counts(height, width).params

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one image of ``height`` x ``width``, forward. FLOPs are twice that (+ BGC's mean)."""
        return self.counts(height, width).macs

    def counts(self, height: int, width: int) -> Counts:
        """All counts of one image of ``height`` x ``width`` (see bgcbench.measure.counts)."""
        return count(self.spec, height, width)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """conv2d with this layer's stride, padding and dilation."""
        x, padding = self._padded(x)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x padded by all that is not zeros, and the padding by zeros that remains to be done."""
        if self.padding_mode == "zeros":
            return x, self.padding
        rows, columns = self.padding
        padded = F.pad(x, (columns, columns, rows, rows), mode=self.padding_mode)
        return like_layout_of(x, padded), (0, 0)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if self.spec.rank is not None:
            text += f", rank={self.spec.rank}"
        if len(VARIANTS[self.variant].algorithms) > 1:
            text += f", algorithm={self.algorithm}"
        return text
