"""``bgcbench approx``: how well a variant can stand in for standard convolutions (section 5.1 of Lee, Park & Lee), and
for those of a network on the inputs that it gives them. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from bgcbench.errors import UsageError
from bgcbench.experiments.config import ImageChoice, NetworkChoice, RunConfig, refuse_misfits
from bgcbench.experiments.options import (
    CHANNELS,
    NETWORK,
    SIZE,
    WORKLOAD,
    Option,
    images_option,
    option,
    positive,
    weights_option,
)
from bgcbench.results.rows import SampledParams, SampledRow
from bgcbench.specs import DATA_SETS, DIGITS_PX, HELD_OUT, LINEAR, VARIANTS, Choice, ConvSpec, NetSpec, Pair, is_own
from bgcbench.theory import paper
from bgcbench.theory.inputs import InputLaw

FP32_MEAN = 10  # above it the squares of a mean hide the rest of a single-precision moment
FEW_ROWS = 10  # rows an unknown below which the in-sample error is low by more than a tenth
QUICK_SAMPLES = 64


@dataclass(frozen=True)
class ApproxConfig(RunConfig):
    """Sampled convolutions on random inputs; without a shape section 5.1 of the paper. Valid once constructed.

    dims: 1 or 2; kernel and length are those of one axis, padded by (kernel - 1) // 2. inputs: laws of
    :mod:`bgcbench.theory.inputs`. samples: S convolutions and S inputs (5.1). search_samples: of the convolutions, how
    many the variants that are not linear are solved for, each by itself.
    Raises UsageError for a precision below fp32 (moments need it), ShapeError where the input leaves no output.
    """

    variants: tuple[str, ...] = option(("gc", "bgc"))
    groups: tuple[int, ...] = option(paper.FIGURE_GROUPS)
    precision: str = option("fp64", "fp64 or fp32; with --model fp64.")
    quick: bool = option(False, "A look: 64 samples, or 32 images. No claim.")
    in_channels: int = option(
        paper.FIGURE_CHANNELS, "Input channels.", panel=WORKLOAD, shown="--channels", check=positive
    )
    out_channels: int = option(
        paper.FIGURE_CHANNELS, "Output channels.", panel=WORKLOAD, shown="--channels", check=positive
    )
    kernel: int = option(3, "Kernel size of an axis; padded by (k - 1) // 2.", panel=WORKLOAD, check=positive)
    dims: int = option(1, "1-D or 2-D convolutions.", panel=WORKLOAD)
    length: int = option(32, "Input length of an axis.", panel=WORKLOAD, check=positive)
    stride: int = option(1, panel=WORKLOAD, check=positive)
    inputs: tuple[str, ...] = option(
        ("normal", "uniform"),
        "Laws of the input: normal, uniform, normal:MU (a mean), relu (rectified normal), factor:RHO (a factor common "
        "to all channels, with that share of the variance).",
        name="input",
        panel=WORKLOAD,
        everyday=True,
        check=lambda field, name: InputLaw.parse(name),
    )
    samples: int = option(None, "S: convolutions, and inputs.", panel=WORKLOAD, shown="1000")
    search_samples: int = option(
        4,
        "Of the convolutions, how many tlgc, flgc and lgc are solved for, each by itself.",
        panel=WORKLOAD,
        check=positive,
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (dataclasses.replace(CHANNELS, shown=str(paper.FIGURE_CHANNELS)),)
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64", "fp32")

    def __post_init__(self) -> None:
        if self.samples is None:
            object.__setattr__(self, "samples", QUICK_SAMPLES if self.quick else 1000)
        super().__post_init__()
        if self.dims not in (1, 2):
            raise UsageError(f"--dims {self.dims} must be 1 or 2")
        # Under their canonical names, so that normal:0.50 and normal:0.5 are one row.
        object.__setattr__(self, "inputs", tuple(dict.fromkeys(law.name for law in self.laws)))
        for law in self.laws if self.precision == "fp32" else ():
            if abs(law.mean) > FP32_MEAN:
                rule = f"use fp64, or at most {FP32_MEAN}"
                raise UsageError(f"input '{law.name}' has too large a mean for --precision fp32: {rule}")
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples} must be a whole number of at least 1")
        self.spec().output_size(*self.size)

    @property
    def laws(self) -> tuple[InputLaw, ...]:
        """The input laws."""
        return tuple(InputLaw.parse(name) for name in self.inputs)

    def _pair(self, along: int, across: int = 1) -> Pair:
        """(height, width): a row of values is an image one pixel high."""
        return (across if self.dims == 1 else along), along

    @property
    def size(self) -> Pair:
        """(height, width) of an input."""
        return self._pair(self.length)

    def spec(self, choice: Choice | None = None) -> ConvSpec:
        """The layer of a row, a 1-D kernel being (1, k). Raises ShapeError for an N or a rank that does not fit."""
        geometry = self._pair(self.kernel), self._pair(self.stride), self._pair(self._pad, 0)
        asked = dataclasses.asdict(choice or Choice())
        return ConvSpec(asked.pop("variant"), self.in_channels, self.out_channels, *geometry, bias=False, **asked)

    @property
    def _pad(self) -> int:
        return (self.kernel - 1) // 2

    @property
    def taps_used(self) -> int:
        """Kernel positions that ever meet the input; the others only see padding and fit nothing."""
        starts = range(-self._pad, self.length + self._pad - self.kernel + 1, self.stride)
        used = sum(any(0 <= start + tap < self.length for start in starts) for tap in range(self.kernel))
        return int(used**self.dims)

    def unknowns(self, params: SampledParams) -> int:
        """p, the free numbers that one output's least squares fits.

        They make the error within the sample low by the factor 1 - p / (S D).
        """
        groups = params.groups
        return VARIANTS[params.variant].unknowns(self.taps_used * self.in_channels // groups, groups)

    @property
    def rows_of_data(self) -> int:
        """S D: positions that each least-squares problem sees."""
        height, width = self.spec().output_size(*self.size)
        return self.samples * height * width

    @property
    def what(self) -> str:
        return f"conv{self.dims}d-{self.in_channels}x{self.out_channels}k{self.kernel}-{self.precision}"


@dataclass(frozen=True)
class ApproxNetworkConfig(ImageChoice, NetworkChoice, RunConfig):
    """One network, its weights and the images to calibrate with; valid once constructed.

    weights: a file, 'default' (torchvision's published ones), 'none' (untrained), or None: default where there are any.
    data: a data set's name or a folder of images; digits are 16 px high for networks of up to 32 px.
    memory_gib: what the second moments may take at once. Raises UsageError or ShapeError.
    """

    model: str = option(
        "resnet50",
        "Ask every convolution of this network, on its own activations: resnet50, wrn_28_10, any classification "
        "network of torchvision, or timm/NAME.",
    )
    num_classes: int | None = option(None, "Classes of the network.")
    variants: tuple[str, ...] = option(("gc", "bgc"))
    groups: tuple[int, ...] = option((2, 4, 8, 16))
    precision: str = option("fp64")
    weights: str | None = weights_option()
    data: str = images_option("Images to run through it: digits, a folder of images, or your own: data.py:load.")
    calibration_images: int = option(
        None, "How many of them; one in four is held out to evaluate.", panel=NETWORK, shown="256"
    )
    batch: int = option(32, "Images at a time.", panel=NETWORK, check=positive)
    memory_gib: float = option(
        4.0,
        "GiB that the second moments may take; more layers than fit are done in several runs over the images.",
        name="memory",
        panel=NETWORK,
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (
        dataclasses.replace(
            SIZE,
            help="Their height and width: 224 or 224x160.",
            panel=NETWORK,
            everyday=False,
            shown="the network's own; 16 for digits and small networks",
        ),
    )
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64",)
    FREE: ClassVar[tuple[str, ...]] = ("batch", "memory_gib", "threads")

    def __post_init__(self) -> None:
        if self.calibration_images is None:
            object.__setattr__(self, "calibration_images", 32 if self.quick else 256)
        super().__post_init__()
        if not self.data:
            raise UsageError("--model needs images to run: --data digits, or --data FOLDER of images")
        if self.calibration_images < HELD_OUT:
            raise UsageError(
                f"--calibration-images {self.calibration_images} must be at least {HELD_OUT}: one in four is held out"
            )
        if not 0 < self.memory_gib < float("inf"):
            raise UsageError(f"--memory {self.memory_gib} must be a positive number of GiB")
        if not self.choices:
            raise UsageError("a standard convolution (N = 1) loses nothing; name another variant and N of 2 or more")
        self._check_images(self.weights or "default", in_memory=self.data in DATA_SETS or is_own(self.data))
        self._resolve_network()

    @property
    def spec(self) -> NetSpec:
        height, width = self.height, self.width
        own = NetSpec(self.model, self.num_classes, height, width, self.stem_stride)
        if height is None and self.data == "digits" and own.size[1] <= 32:
            own = NetSpec(self.model, self.num_classes, DIGITS_PX, DIGITS_PX, self.stem_stride)
        return own

    @property
    def what(self) -> str:
        return f"{self.model}-{self.data.rstrip('/').rpartition('/')[2]}"


def plan(config: ApproxConfig) -> list[SampledRow]:
    """The rows of ``config``, undone or invalid: by input, then N in the order of the variants, then rank.

    N = 1 of any variant is the standard convolution and is one row. Raises ShapeError naming every N and rank that does
    not fit the channels unless ``skip_invalid``, UsageError where there are fewer data than unknowns.
    """
    standard = [Choice()] * ("standard" in config.variants or 1 in config.groups)
    rows = [_row(config, law, choice) for law in config.laws for choice in standard + config.choices]
    if not config.skip_invalid:
        refuse_misfits(row.reason for row in rows if row.reason)
    worst = _worst(config, rows)
    if worst is None:
        raise UsageError("nothing to compute: --groups and --variants leave no valid row")
    unknowns = config.unknowns(worst)
    if config.rows_of_data < unknowns:
        least = -(-unknowns * config.samples // config.rows_of_data)
        raise UsageError(
            f"--samples {config.samples} gives {config.rows_of_data} positions for {unknowns} unknowns an output "
            f"of {worst.choice.label}: fewer than one, so any error could be fitted away; use at least {least}, or "
            f"{10 * least} for an error that is low by less than a tenth, or larger N"
        )
    return rows


def few_rows(config: ApproxConfig, rows: Sequence[SampledRow]) -> list[str]:
    """A warning where some row has fewer than ten data an unknown."""
    worst = _worst(config, rows)
    if worst is None or config.unknowns(worst) <= config.rows_of_data / FEW_ROWS:
        return []
    share = config.rows_of_data / config.unknowns(worst)
    return [
        f"only {share:.1f} data an unknown for {worst.choice.label}: its error within the sample is low by a factor of "
        f"about {1 - 1 / share:.2f}, and others by less; use more --samples"
    ]


def _worst(config: ApproxConfig, rows: Sequence[SampledRow]) -> SampledParams | None:
    """The first of the valid rows with the most unknowns."""
    return max((row.params for row in rows if row.status != "invalid"), key=config.unknowns, default=None)


def _row(config: ApproxConfig, law: InputLaw, choice: Choice) -> SampledRow:
    variant, channels = choice.variant, (config.in_channels, config.out_channels, config.kernel**config.dims)
    groups = choice.reduction(*channels)
    solved = config.samples if variant in ("standard", *LINEAR) else min(config.search_samples, config.samples)
    own = {"groups": groups, "input": law.name, "convolutions": solved, "solver": VARIANTS[variant].solver}
    params = msgspec.convert(vars(config) | dataclasses.asdict(choice) | own, SampledParams)
    shape = f"{config.in_channels}x{config.out_channels}-k{config.kernel}-d{config.dims}-l{config.length}"
    key = f"{choice.key}-{shape}-s{config.stride}-{law.name}-S{config.samples}-{config.precision}"
    unfit = choice.unfit(*channels)
    return SampledRow(key, "invalid" if unfit else "interrupted", unfit, params)


# Both are section 5.1 as the defaults have it; they differ in the picture that is drawn.
PRESETS = ("figure1", "figure2")
