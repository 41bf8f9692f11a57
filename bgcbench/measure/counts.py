"""What a convolution must cost, by the rule of its variant (``specs.VARIANTS``): parameters, multiply-adds, additions,
bytes. No torch here.

Everything is per image and for the forward pass unless a name says otherwise. Conventions: a MAC is one
multiply-add and counts 1; MACs on zero padding count, as they do in every published table; a bias is not counted
in MACs. Symbols n, m, N, K, D as in :mod:`bgcbench.specs`, D_in for the input's positions.

Two columns come from the paper itself: Table 1's parameters (``paper_params``) and the operations of (3.14) and
section 4 (``paper_ops``). They mix stored and deployed layers and per-conversion with per-forward work (LGC, FLGC),
so they stand beside ``params`` and ``macs``, never in their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bgcbench.specs import PRECISIONS, VARIANTS, ConvSpec, Sizes, one_block


@dataclass(frozen=True)
class Counts:
    """Costs of one convolution, one image, forward. ``None`` where a column does not apply.

    params: numbers the deployed layer stores (with its bias). macs: multiply-adds. adds: additions outside the
    products (BGC's mean). paper_params, paper_ops: Table 1 and (3.14) / section 4 evaluated (with one D, that of
    the output, as printed). params_training, macs_training: of a masked layer, while it trains. bytes_min: input
    read once, output written once, and this image's share of reading the weights once a batch.
    """

    params: int
    macs: int
    adds: int
    paper_params: int
    paper_ops: int
    bytes_min: int
    params_training: int | None = None
    macs_training: int | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations: a MAC is two, an addition one."""
        return 2 * self.macs + self.adds

    def executed(self, algorithm: str) -> Counts:
        """What ``algorithm`` does: a masked layer stores and multiplies a dense kernel."""
        if algorithm != "masked" or self.params_training is None or self.macs_training is None:
            return self
        return replace(self, params=self.params_training, macs=self.macs_training)

    def to_json(self) -> dict[str, int]:
        """The counts of a result row; what a variant does not have is left out."""
        names = ("params", "macs", "adds", "paper_ops", "bytes_min", "params_training", "macs_training")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def balanced_pairs(spec: ConvSpec) -> int:
    """sum_g m_g n_g of groups as even as they can be: mn/N where N divides both."""
    return sum(
        (spec.in_channels // spec.groups + (g < spec.in_channels % spec.groups))
        * (spec.out_channels // spec.groups + (g < spec.out_channels % spec.groups))
        for g in range(spec.groups)
    )


def count(
    spec: ConvSpec, height: int, width: int, *, batch: int = 1, precision: str = "fp32", pairs: int | None = None
) -> Counts:
    """Costs of ``spec`` on an input of ``height`` x ``width`` pixels (Table 1, eq. 3.14 and section 4).

    ``batch`` and ``precision`` enter ``bytes_min`` only: weights are read once a batch and a number takes
    ``PRECISIONS[precision]`` bytes. ``pairs`` is FLGC's sum_g m_g n_g where its groups are not balanced.
    """
    out_height, out_width = spec.output_size(height, width)
    sizes = Sizes(
        n=spec.in_channels,
        m=spec.out_channels,
        groups=spec.groups,
        rank=spec.rank,
        pairs=balanced_pairs(spec) if pairs is None else pairs,
        k=spec.kernel_positions,
        d=out_height * out_width,
        d_in=height * width,
    )
    costs = (one_block if spec.is_dense else VARIANTS[spec.variant].costs)(sizes)
    bias = spec.out_channels if spec.bias else 0
    params = costs.weights + bias
    macs = sizes.d * costs.weights
    itemsize = PRECISIONS[precision]
    activations = (sizes.n * sizes.d_in + sizes.m * sizes.d) * itemsize
    return Counts(
        params=params,
        macs=macs,
        adds=costs.adds,
        paper_params=costs.weights if costs.paper_params is None else costs.paper_params,
        paper_ops=macs + costs.paper_extra,
        bytes_min=activations + -(-params * itemsize // batch),
        params_training=None if costs.trained is None else costs.trained + bias,
        macs_training=None if costs.trained is None else sizes.d * sizes.k * sizes.m * sizes.n,
    )


@dataclass(frozen=True)
class CallWork:
    """Operations and least bytes of one call on a whole batch, in one phase."""

    flops: int
    bytes: int


def passes(phase: str, input_grad: bool = True) -> int:
    """How many convolution-sized passes a phase makes: forward 1, backward 2 (1 without the input's gradient).

    Each of the three (y from x and W, dx from dy and W, dW from x and dy) does the same MACs and touches one
    input-sized, one output-sized and one weight-sized tensor.
    """
    backward = 2 if input_grad else 1
    return {"fwd": 1, "bwd": backward, "fwd_bwd": 1 + backward}[phase]


def call_work(counts: Counts, batch: int, phase: str, *, input_grad: bool = True) -> CallWork:
    """FLOPs and least bytes of one call of ``phase`` on ``batch`` images, by the variant's own formula.

    The formula counts, whatever the algorithm does: a BGC folded into a dense kernel is credited with BGC's work.
    """
    scale = passes(phase, input_grad) * batch
    return CallWork(flops=scale * counts.flops, bytes=scale * counts.bytes_min)


def paper_bytes(spec: ConvSpec, height: int, width: int, batch: int, precision: str = "fp32") -> int:
    """Bytes of the paper's memory column: input + weights, and for BGC the mean (N >= 2).

    This is how Table 4 can be read: every GC entry and BGC at N = 4 agree to the printed digit (MiB, printed "Mb").
    BGC's other three entries are printed 3 MiB (N = 2), 0.5 MiB (N = 8) and 1 MiB (N = 16) above it. It is no
    peak: the output, the gradients and the workspace are missing.
    """
    counts = count(spec, height, width)
    numbers = batch * spec.in_channels * height * width + counts.params
    if counts.adds:  # the mean
        numbers += batch * (spec.in_channels // spec.groups) * height * width
    return numbers * PRECISIONS[precision]
