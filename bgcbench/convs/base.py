"""The contract that every convolution variant keeps.

A variant maps x (B, n, H, W) to y (B, m, H', W') linearly and translation-equivariantly, so it equals a standard
convolution with a structured dense kernel D (m, n, kh, kw). The contract, run over all variants by
tests/convs/test_contract.py:

    layer(x) == conv2d(x, layer.dense_weight(), layer.bias, stride, padding, dilation)
    layer_type.from_dense(W, ...) is the member of the variant closest to W in the sense of its projection
    layer.params and layer.macs(H, W) are the formulas of bgcbench.measure.counts

Forward, dense kernel and projection are only right relative to one another, so each variant keeps the three in one
file as functions of tensors; the module only owns parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs import choices
from bgcbench.convs.followed import is_recorded
from bgcbench.convs.layouts import is_channels_last, like_layout_of
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.counts import Counts, count
from bgcbench.specs import CUDA_ALGORITHMS, VARIANTS, ConvSpec, as_pair, check_choice
from bgcbench.theory.leastsquares import Fit

if TYPE_CHECKING:
    from typing_extensions import Self

PROJECTIONS = ("copy", "white", "least_squares")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class VariantConv2d(nn.Module, ABC):
    """Base of the variants: Conv2d's arguments, validation, padding, initialisation and counts.

    Arguments are those of ``torch.nn.Conv2d`` in the same order up to ``bias``; the rest are keyword-only.
    ``padding`` is a number or a pair, not a string.
    Raises ShapeError for sizes below 1 and for channels that ``groups`` does not divide.
    """

    variant: ClassVar[str]
    # Programs that fold norms, prune or quantise take weight, bias and groups for all that a convolution is. A layer
    # with more kernels, or with rows in another order than its outputs, has another name for its first one, so that
    # they fail instead of being wrong (see bgcbench.fold_norms).
    kernel_name: str = "weight"
    # Names of parameters that weight decay must leave alone (see parameter_groups).
    exempt_from_decay: ClassVar[tuple[str, ...]] = ()
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = ConvSpec(
            self.variant, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, algorithm
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size)
        self.stride = as_pair("stride", stride)
        self.padding = as_pair("padding", padding, 0)
        self.dilation = as_pair("dilation", dilation)
        self.padding_mode = check_choice("padding_mode", padding_mode, _PADDING_MODES)
        self._chosen: dict[str, str] = {}
        self._met: dict[tuple[Any, ...], tuple[int, str]] = {}  # what has come so far: era of the choice, form
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
        """The kernels, each initialised with its own fan."""
        return [self.kernel]

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

    @classmethod
    @abstractmethod
    def project(cls, weight: Tensor, groups: int, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """This variant's parameters, by name, for the standard kernel ``weight`` (m, n, kh, kw).

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
        layer = cls(
            in_channels,
            out_channels,
            (height, width),
            stride,
            padding,
            dilation,
            groups,
            bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        with torch.no_grad():
            layer.load_projected(cls.project(weight.detach().double(), groups, projection, fit))
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    def folded(self) -> nn.Conv2d:
        """PyTorch's standard convolution that computes what this layer does now, with the kernel ``dense_weight()``.

        For inference where that is the faster form (BGC at N = 2, narrow layers): the kernel is made once instead of at
        each call. It holds K m n weights and follows no later change of this layer.
        """
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            padding_mode=cast("Any", self.padding_mode),
            device=self.kernel.device,
            dtype=self.kernel.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
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
        """The exact form that forward runs in; 'auto' where the fastest is measured (see bgcbench.convs.choices)."""
        return VARIANTS[self.variant].settled(self.spec.algorithm)

    @property
    def chosen(self) -> Mapping[str, str]:
        """The form that the last call took, 'inference' and 'training' apart; what has not been called is missing."""
        settled = {} if self.algorithm == "auto" else dict.fromkeys(("inference", "training"), self.algorithm)
        return settled or dict(self._chosen)

    def forms(self, x: Tensor, weight: Tensor) -> tuple[str, ...]:
        """The algorithms that 'auto' chooses from for x and a kernel like ``weight``, the default first."""
        return self.spec.algorithms

    def _run(self, form: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """forward in one of :meth:`forms`, with these in the place of the layer's own weights and bias."""
        raise NotImplementedError

    def _form(self, x: Tensor) -> str:
        """The form to run x in: the one that was asked for or, with 'auto', the fastest.

        What is recorded for other programs has a form of stock operations, the default with 'auto'. While code is
        compiled nothing can be measured: the form of the last call outside of it is taken, or the default where there
        was none.
        """
        asked = self.spec.algorithm
        if is_recorded(x):
            return self.spec.algorithms[0] if asked in ("auto", *CUDA_ALGORITHMS) else asked
        if asked != "auto":
            return asked
        grad = torch.is_grad_enabled()
        phase = "training" if grad else "inference"
        if torch.compiler.is_compiling():
            return self._chosen.get(phase, self.spec.algorithms[0])
        # What can differ from call to call, so that the whole case is put together for the first call of each only.
        kernel = self.kernel
        key = (grad, x.requires_grad, kernel.requires_grad, x.shape, x.stride(), type(x), x.device,
               choices.computed_in(x), kernel.dtype, torch.are_deterministic_algorithms_enabled(),
               choices.is_captured(x.device))  # fmt: skip
        era, form = self._met.get(key, (None, None))
        if form is None or era != choices.era():
            era, form = choices.era(), self._choose(x)
            if form is None:
                return self.spec.algorithms[0]
            self._met[key] = era, form
        self._chosen[phase] = form
        return form

    def _choose(self, x: Tensor) -> str | None:
        """The fastest form for x, remembered or measured; None where there is none to be found."""
        if not choices.can_choose(x):
            return None
        weights = self._weights()
        case = choices.case_of(self.spec, self.padding_mode, x, weights)
        return choices.choose(case, x.device, lambda: self._calls(x, case, weights))

    def _calls(self, x: Tensor, case: choices.Case, weights: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
        """What is timed, by form: one step's work of this layer on tensors of the same shapes, and random numbers."""
        drawn = torch.Generator(x.device).manual_seed(0)

        def like(given: Tensor, layout: str, grad: bool) -> Tensor:
            made = torch.empty(
                given.shape,
                dtype=getattr(torch, case.dtype),
                device=given.device,
                memory_format=torch.channels_last if layout == "nhwc" and given.dim() == 4 else torch.contiguous_format,
            )
            return made.normal_(generator=drawn).requires_grad_(grad)

        u = like(x, case.layout, "x" in case.gradients)
        own = [like(weight, case.weight_layout, "w" in case.gradients) for weight in weights]
        bias = None if self.bias is None else like(self.bias, "", "w" in case.gradients)
        leaves = [tensor for tensor in (u, *own, bias) if tensor is not None and tensor.requires_grad]
        given: list[Tensor] = []  # the gradient of the output, made when its layout is known

        def call(form: str) -> object:
            if not leaves:
                with torch.no_grad():
                    return self._run(form, u, own, bias)
            y = self._run(form, u, own, bias)
            if not given:
                given.append(torch.empty_like(y).normal_(generator=drawn))
            return torch.autograd.grad(y, leaves, given[0])

        return {form: functools.partial(call, form) for form in self.forms(u, own[0])}

    @property
    def params(self) -> int:
        """Numbers this layer stores, its bias included (formula; equals the sum of its parameters' sizes).

        This is what a masked layer (LGC, FLGC) deploys; while it trains it stores ``counts(...).params_training``.
        """
        return self.counts(*self._smallest_input()).params

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one image of ``height`` x ``width``, forward. FLOPs are twice that (+ BGC's mean)."""
        return self.counts(height, width).macs

    def counts(self, height: int, width: int) -> Counts:
        """All counts of one image of ``height`` x ``width`` (see bgcbench.measure.counts)."""
        return count(self.spec, height, width)

    def set_progress(self, fraction: float) -> bool:
        """Be told by a training loop, before every step, which ``fraction`` (0 to 1) of the training has passed.

        Returns whether the layer has changed its structure; only a variant that prunes itself (LGC) ever does.
        """
        return False

    def group_lasso(self) -> Tensor | None:
        """The penalty that the variant wants in the loss, to be weighted; a scalar, None where it wants none."""
        return None

    @property
    def is_settled(self) -> bool:
        """Whether the layer has made all the changes to its structure that training is to make (see set_progress)."""
        return True

    def grouping(self) -> Tensor | None:
        """A structure that is learnt, as whole numbers that can be compared with those at the start; mostly None."""
        return None

    def learnt(self) -> Mapping[str, float]:
        """What there is to say of a structure that is learnt (shares from 0 to 1), by name; mostly nothing."""
        return {}

    def _smallest_input(self) -> tuple[int, int]:
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return height, width

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, stride: tuple[int, int] | None = None
    ) -> Tensor:
        """conv2d with this layer's stride (but where another is given), padding and dilation."""
        x, padding = self._padded(x)
        return F.conv2d(x, weight, bias, stride or self.stride, padding, self.dilation, groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x with the padding that is no zeros around it, and how much of zeros is still to be added."""
        if self.padding_mode == "zeros":
            return x, self.padding
        rows, columns = self.padding
        padded = F.pad(x, (columns, columns, rows, rows), mode=self.padding_mode)
        return like_layout_of(x, padded), (0, 0)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        text += f", bias={self.bias is not None}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if len(VARIANTS[self.variant].algorithms) > 1:
            text += f", algorithm={self.algorithm}"
        return text


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of ``model`` as optimiser groups: those that decay, and those that must not.

    What must not decay are the assignments of FLGC: decay pulls every logit of a channel together, so the grouping
    would drift without any gradient asking for it. Everything else decays, norms and biases too, as in the paper's
    recipes. Use as ``torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.1)``; an empty group is left out.
    """
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if isinstance(module, VariantConv2d)
        for name in module.exempt_from_decay
        if name in dict(module.named_parameters(recurse=False))
    }
    parameters = list(model.parameters())
    split = (
        ([p for p in parameters if id(p) not in exempt], weight_decay),
        ([p for p in parameters if id(p) in exempt], 0.0),
    )
    return [{"params": members, "weight_decay": decay} for members, decay in split if members]


def row_blocks(weight: Tensor, groups: int) -> Tensor:
    """A dense kernel (m, n, kh, kw) as the paper's blocks W^{kl} (eq. 2.2): (N, m/N, N, n/N, kh, kw)."""
    m, n, height, width = weight.shape
    return weight.reshape(groups, m // groups, groups, n // groups, height, width)


def diagonal_blocks(weight: Tensor, groups: int) -> Tensor:
    """The blocks W^{kk} stacked as a grouped kernel: (m, n/N, kh, kw)."""
    blocks = row_blocks(weight, groups)  # (N, m/N, N, n/N, kh, kw)
    return torch.stack([blocks[k, :, k] for k in range(groups)]).flatten(0, 1)  # (m, n/N, kh, kw)


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """A grouped kernel (m, n/N, kh, kw) as the dense kernel (m, n, kh, kw) it stands for (eq. 2.3)."""
    blocks = weight.unflatten(0, (groups, 1, -1))  # (N, 1, m/N, n/N, kh, kw)
    # A^k and N blocks of zeros, over and over: every (N + 1)th of N x N blocks in a row is one of the diagonal.
    padded = F.pad(blocks, (0, 0) * 4 + (0, groups)).flatten(0, 1)[: groups * groups]
    dense: Tensor = padded.unflatten(0, (groups, groups)).transpose(1, 2)  # (N, m/N, N, n/N, kh, kw)
    return dense.flatten(2, 3).flatten(0, 1)
