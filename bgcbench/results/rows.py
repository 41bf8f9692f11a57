"""What a result file holds, as frozen types: the rows of each command, and what stands around them.

The JSON, its schema, the tables and the plots all read these; nothing else says what a row is. COMMANDS says which
command has which rows, and where its options, its report and its pictures are. Units stand in the names (SI). None is
unknown. Fields with a default came later than some file, or belong to some rows only: types with ``omit_defaults``
leave them out of a file where they have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from bgcbench.errors import ResultFileError
from bgcbench.specs import PLAN, PLANNED, Choice

Count = Annotated[int, Meta(ge=0)]
Whole = Annotated[int, Meta(ge=1)]
Nonnegative = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Ends = tuple[float, float]  # of a 95 % confidence interval
Sides = tuple[Whole, Whole]  # height and width
Forms = dict[str, dict[str, Count]]  # in each phase, how many layers ran in which algorithm
Status = Literal["ok", "oom", "invalid", "error", "interrupted"]
DONE = ("ok", "invalid")  # statuses that a resumed run keeps


class Data(Struct, frozen=True, kw_only=True):
    """Base of everything in a file."""

    def to_json(self) -> dict[str, Any]:
        """This as plain JSON."""
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return plain


class Row(Data, frozen=True):
    """One result: ok, or why not. key: unique in a file, and the same in every run of the same thing."""

    key: str
    status: Status
    reason: str | None

    @property
    def is_done(self) -> bool:
        return self.status in DONE


class Counts(Data, frozen=True, omit_defaults=True):
    """Of one image, forward. A MAC is one multiplication with its addition; adds are BGC's mean.

    paper_ops: the paper's formula ((3.14), section 4). bytes_min: what must be read and written at least. *_training:
    of a masked layer, which trains dense kernels.
    """

    params: Count
    macs: Count
    adds: Count | None = None
    paper_ops: Count | None = None
    bytes_min: Count | None = None
    params_training: Count | None = None
    macs_training: Count | None = None


# --------------------------------------------------------------------------------------------- what a conversion did


class Kept(Data, frozen=True):
    """A convolution that stays as it is, and why: for people, and as a code (bgcbench.conversion.selection.Reason)."""

    name: str
    reason: str
    code: str = ""


class Replaced(Data, frozen=True):
    """A convolution that was replaced: its name, where else it hangs, its shape, and the layer in its place.

    groups: N of this layer, which 'gcd' may have lowered; 1 of a 'standard' one, which is not replaced yet. rank: where
    that was asked for, and N follows from it. height, width: of its input, and calls: how often one forward pass runs
    it; None where the network could not be run.
    """

    name: str
    also: tuple[str, ...]
    in_channels: Whole
    out_channels: Whole
    kernel: Sides
    stride: Sides
    padding: tuple[Count, Count]
    dilation: Sides
    bias: bool
    padding_mode: str
    groups: Count
    height: Count | None
    width: Count | None
    calls: Count | None
    variant: str = "standard"
    algorithm: str = "auto"
    init: str = "white"
    rank: Whole | None = None


class CalibratedLayer(Data, frozen=True):
    """Shares of a layer's output that are lost on images held out: with copied weights, with white ones (before), and
    with calibrated ones (after); and what these were solved from."""

    name: str
    groups: Count
    copied: Nonnegative | None
    before: Nonnegative | None
    after: Nonnegative | None
    rows: Count
    held_out_rows: Count
    condition: Nonnegative | None
    ridge: Nonnegative | None
    centred: bool
    scarce: bool
    fitted: Nonnegative | None = None

    @property
    def is_white(self) -> bool:
        """Whether the closed form stayed, because no least squares did better."""
        return self.ridge is None


class Calibration(Data, frozen=True):
    """What was done with images: how many, held out, norms re-estimated, memory held, and what each layer lost.

    refitted: convolutions that stayed and were solved anew (init 'refit').
    """

    images: Count
    held_out: Count
    seed: Count
    rebn: bool
    norms: Count
    seconds: Nonnegative
    moment_bytes: Count
    in_flight_bytes: Count
    layers: tuple[CalibratedLayer, ...]
    refitted: tuple[CalibratedLayer, ...] = ()


class Budget(Data, frozen=True):
    """A share of what the replaced convolutions cost as they were (params or macs, biases apart): asked and reached."""

    cost: str
    asked: Nonnegative
    reached: Nonnegative


class Record(Data, frozen=True):
    """Everything that a conversion decided; with a network like the original it can be repeated (load_converted).

    variant, groups, init, algorithm: as they were asked for; each of ``layers``, those that were replaced, holds its
    own, and ``replaced`` their names. earlier: layers that conversions before this one had put into the network.
    source: how build_model makes the original network, None where it cannot. size: the input (channels, height, width)
    on which the network was run to find shapes, order and roles; None where it could not be. functional: convolutions
    that are called as functions, which no module owns and nothing here replaces. rebn: whether batch norm's statistics
    were re-estimated. rank: as it was asked for. budget: what ranks were spread under. planned: whether a plan said
    what each layer becomes; variant and groups, and algorithm if each variant has its own, then say nothing.
    """

    replaced: tuple[str, ...]
    kept: tuple[Kept, ...]
    variant: str = "standard"
    groups: Whole = 1
    where: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    init: str = "none"
    on_indivisible: str = "raise"
    algorithm: str = "auto"
    source: dict[str, Any] | None = None
    size: tuple[Whole, Whole, Whole] | None = None
    layers: tuple[Replaced, ...] = ()
    functional: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rebn: bool = False
    calibration: Calibration | None = None
    earlier: tuple[Replaced, ...] = ()
    rank: Whole | None = None
    budget: Budget | None = None
    planned: bool = False

    @property
    def indivisible(self) -> list[str]:
        """Convolutions that stayed dense only because N does not divide their channels."""
        return [kept.name for kept in self.kept if kept.code == "indivisible"]

    @classmethod
    def from_json(cls, stored: Any) -> Record:
        """The record that :meth:`to_json` wrote, in this version or an older one; raises ResultFileError."""
        try:
            return msgspec.convert(upgraded_record(stored), cls)
        except (msgspec.ValidationError, AttributeError, TypeError) as problem:
            raise ResultFileError(f"this is no record of a conversion: {problem}") from None


class Conversion(Data, frozen=True, kw_only=True):
    """What ``bgcbench convert`` did to a network, and what that costs an image before and after."""

    model: str
    weights: str
    before: Counts
    after: Counts
    record: Record
    notes: tuple[str, ...] = ()


def upgraded_record(stored: dict[str, Any]) -> dict[str, Any]:
    """A record with what older ones leave to be concluded: what each layer is, and the code of what is indivisible."""
    asked = {name: stored[name] for name in ("variant", "algorithm", "init") if name in stored}

    def kept(one: Any) -> Any:
        indivisible = isinstance(one, dict) and "does not divide" in str(one.get("reason"))
        return {"code": "indivisible"} | one if indivisible else one

    def layer(one: Any) -> Any:
        return asked | one if isinstance(one, dict) else one

    made = {"layers": layer, "kept": kept}
    lists = {name: stored[name] for name in made if isinstance(stored.get(name), list)}
    return stored | {name: [made[name](one) for one in found] for name, found in lists.items()}


# ----------------------------------------------------------------------------------------------------- of all commands

CellKey = tuple[str, int, int | None]  # variant, N and rank: what rows that differ in other things have in common


class Chosen(Data, frozen=True, kw_only=True):
    """Which convolutions a row is about. rank: r, where that was asked for in the place of N; groups is then the
    reduction that it keeps to (bgcbench.specs.ConvSpec), and 1 of a whole network, whose layers differ in that."""

    variant: str
    groups: Whole
    rank: Whole | None = None

    @property
    def cell(self) -> CellKey:
        """(variant, N, None), or (variant, 1, rank), where N follows from the layer."""
        return self.variant, self.groups if self.rank is None else 1, self.rank

    @property
    def choice(self) -> Choice:
        """The cell as what was asked for."""
        return PLANNED if self.variant == PLAN else Choice(*self.cell)


# ----------------------------------------------------------------------------------------------------------- profile


class Summary(Data, frozen=True):
    """Of a phase's samples."""

    n: Whole
    median_s: Seconds
    ci95_s: Ends | None
    mean_s: Seconds
    sd_s: Nonnegative | None
    min_s: Seconds
    q1_s: Seconds
    q3_s: Seconds
    max_s: Seconds


class Derived(Data, frozen=True):
    """What follows from a median: rates, the share of what the measured ceilings allow, and flags.

    contended_cores: how many more CPU cores this run and other processes wanted, on average, than there are.
    """

    images_per_s: Nonnegative
    tflops: Nonnegative
    gbytes_per_s: Nonnegative
    roofline_fraction: Nonnegative | None
    bound: Literal["compute", "memory"] | None
    launch_bound: bool | None
    page_faults: bool | None = None
    contended_cores: Nonnegative | None = None


class Discarded(Data, frozen=True):
    """Samples that were taken again: of rounds that a slow clock touched, or of a measurement with doubtful times."""

    samples_s: tuple[Seconds, ...]
    rounds: tuple[Count, ...]


class Phase(Data, frozen=True, kw_only=True):
    """A phase's samples, in order, each with the round that it was taken in."""

    samples_s: tuple[Seconds, ...]
    rounds: tuple[Count, ...]
    discarded: Discarded | None = None
    first_call_s: Nonnegative | None
    host_s: Nonnegative | None
    minor_faults_per_call: Nonnegative | None = None
    converged: bool
    stop_reason: str
    summary: Summary
    derived: Derived


class Failure(Data, frozen=True):
    """Why a phase has no samples."""

    status: Status
    reason: str


class Memory(Data, frozen=True, kw_only=True):
    """paper_bytes: input + weights (+ mean), the paper's column. peak: of one step, by ``method``; delta: beyond the
    baseline. agreed: whether two passes did."""

    paper_bytes: Count | None
    params_bytes: Count
    input_bytes: Count
    output_bytes: Count
    optimizer_bytes: Count = 0
    baseline_bytes: Count | None = None
    peak_bytes: Count | None = None
    peak_delta_bytes: Count | None = None
    method: str = "formula"
    agreed: bool | None = None


class ProfileParams(Chosen, frozen=True, kw_only=True, omit_defaults=True):
    """Of a layer (channels, kernel, stride), of a network (model, where), or of a network's layer (both, layer)."""

    model: str | None = None
    layer: Count | None = None
    where: str | None = None
    in_channels: Whole | None = None
    out_channels: Whole | None = None
    kernel: Whole | None = None
    kernel_width: Whole | None = None
    stride: Whole | None = None
    batch: Whole
    height: Whole
    width: Whole
    precision: str
    layout: str
    mode: str
    algorithm: str


class DistinctLayer(Data, frozen=True, omit_defaults=True):
    """A convolution that --layers measures by itself, how often a network has it, and whether it is replaced."""

    label: str
    count: Whole
    names: tuple[str, ...]
    replaced: bool
    kernel: Sides | None = None
    padding: tuple[Count, Count] | None = None
    stride: Sides | None = None
    dilation: Sides | None = None
    groups: Whole | None = None


class PaperRow(Data, frozen=True):
    """What Table 4 prints for a row."""

    time_s: Seconds
    memory_bytes: Nonnegative
    error: Percent


class White(Data, frozen=True):
    """The closed-form share of the output's energy that is lost on white input; None where there is no closed form."""

    white_error: Nonnegative | None


class ProfileRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """A layer or a network, measured in each phase.

    failures: of phases that have no samples, or not all. forms: see Forms, where 'auto' has chosen. interleaved: the
    group that it was measured in. layer: of a network's convolution by itself.
    """

    params: ProfileParams
    counts: Counts | None
    approximability: White | None
    memory: Memory | None
    phases: dict[str, Phase]
    failures: dict[str, Failure] = {}
    forms: Forms = {}
    paper: PaperRow | None
    interleaved: Count | None = None
    convert: Record | None = None
    layer: DistinctLayer | None = None

    @property
    def ran(self) -> Counts | None:
        """Counts of the algorithm that ran: a masked one trains dense kernels."""
        if self.counts is None or self.params.algorithm != "masked":
            return self.counts
        params, macs = self.counts.params_training, self.counts.macs_training
        return Counts(params or self.counts.params, macs or self.counts.macs)

    def median_s(self, phase: str) -> float | None:
        """Median time of a phase; None where it was not measured."""
        return self.phases[phase].summary.median_s if phase in self.phases else None


# ------------------------------------------------------------------------------------------------------------ approx


class SampledParams(Chosen, frozen=True, kw_only=True, omit_defaults=True):
    in_channels: Whole
    out_channels: Whole
    kernel: Whole
    dims: Literal[1, 2]
    length: Whole
    stride: Whole
    input: str
    samples: Whole
    convolutions: Whole
    solver: str
    precision: Literal["fp64", "fp32"]


class SampledRow(Row, frozen=True):
    """The least error of a variant for sampled convolutions (eq. 5.1), and relative to other things; *_se: standard
    errors. scaled: relative_error / (1 - 1/N)^p. construction: with the weights of Theorem 3.6's proof. bound_*: the
    right-hand sides of Theorems 3.5 and 3.6. limit: of low rank on white input, as the channels grow
    (bgcbench.theory.lowrank); None for all else. null_reasons: why another number is None.

    Rounding may leave an error of 0 below it.
    """

    params: SampledParams
    counts: Counts | None = None
    error: float | None = None
    error_se: Nonnegative | None = None
    relative_error: float | None = None
    relative_error_se: Nonnegative | None = None
    output_relative_error: float | None = None
    scaled_error: float | None = None
    exact_relative_error: float | None = None
    limit_relative_error: Nonnegative | None = None
    in_sample_factor: float | None = None
    construction_relative_error: float | None = None
    bound_general: Nonnegative | None = None
    bound_zero_mean: Nonnegative | None = None
    null_reasons: dict[str, str] = {}


class LayerParams(Chosen, frozen=True, kw_only=True, omit_defaults=True):
    model: str
    weights: str
    layer: str
    kernel: Whole
    kernel_width: Whole
    stride: Whole
    in_channels: Whole
    out_channels: Whole
    input: str
    data: str
    calibration_images: Count


class LayerErrors(Data, frozen=True):
    """Shares of a layer's output energy that are lost on images held out."""

    copy: Nonnegative
    white: Nonnegative
    calibrated: Nonnegative


class LayerRow(Row, frozen=True):
    """What one convolution of a network loses as one variant, on its own activations."""

    params: LayerParams
    counts: Counts | None
    output_relative_error: LayerErrors | None
    ridge: Nonnegative | None
    rows: Count
    held_out_rows: Count
    macs_share: Nonnegative | None


class Fit(Data, frozen=True):
    """A variant's errors over N for one input: slopes in log(1 - 1/N), and c of eq. 5.2."""

    variant: str
    input: str
    groups: tuple[Whole, ...]
    slope_mean: float | None
    slope_regression: float | None
    c: float | None
    max_scaled_error: Nonnegative | None
    exact_slope_mean: float | None
    exact_slope_regression: float | None
    reason: str | None


class Moments(Data, frozen=True):
    bytes: Count
    passes: Count


class NetworkFacts(Data, frozen=True, kw_only=True):
    """The network of ``approx --model`` as a whole."""

    weights: str
    weights_sha256: str | None
    data_sha256: str | None = None
    kept: tuple[Kept, ...]
    moments: Moments


# ------------------------------------------------------------------------------------------------- train and transfer


class Epoch(Data, frozen=True, kw_only=True):
    """Errors in percent. learnt: what a learnt structure says of itself, by name."""

    epoch: Whole
    lr: Nonnegative
    train_loss: float
    test_loss: float | None
    test_error: Percent | None
    test_error_top5: Percent | None = None
    seconds: Nonnegative
    test_seconds: Nonnegative | None = None
    images_per_s: Nonnegative | None
    learnt: dict[str, float] | None = None
    world_size: Whole | None = None


class TrainParams(Chosen, frozen=True, kw_only=True):
    model: str
    weights: str
    dataset: str
    classes: Whole | None = None
    height: Whole | None = None
    width: Whole | None = None
    where: str
    init: str
    rebn: bool
    distill: bool
    recipe: str
    epochs: Count
    batch_size: Whole | None = None
    precision: str | None = None
    layout: str | None = None
    subset: Whole | None = None
    algorithm: str | None = None
    calibration_images: Count | None = None
    seed: Count

    @property
    def is_dense(self) -> bool:
        return self.variant == "standard"


class PaperError(Data, frozen=True):
    """What Table 3, 5 or 6 prints."""

    error: Percent


class Ratio(Data, frozen=True):
    """A phase's median time, and the standard network's time over it."""

    median_s: Seconds
    ci95_s: Ends | None
    n: Whole
    ratio: Nonnegative | None
    ratio_ci95: Ends | None


class NetworkTime(Data, frozen=True):
    """What a converted network costs (--time)."""

    phase: dict[str, Ratio]
    batch: Whole
    precision: str
    layout: str
    mode: str = "eager"
    memory: str | None = None


class LayerLoss(Data, frozen=True):
    name: str
    loss: Nonnegative


class WhiteLoss(Data, frozen=True):
    """Shares of the layers' outputs lost on white input: of a kernel of independent entries, and of the own ones."""

    expected: Nonnegative | None
    layers: tuple[LayerLoss, ...] | None


class TrainRow(Row, frozen=True, kw_only=True):
    """A network with one variant, trained from one seed. Errors in percent; None where the labels mean nothing.

    stage: how far it came. matmul_fraction: arithmetic over what the device's best matrix product does in that time.
    """

    params: TrainParams
    counts: Counts | None
    epochs: tuple[Epoch, ...]
    error_initial: Percent | None
    error_final: Percent | None
    error_best: Percent | None
    error_final_top5: Percent | None = None
    epoch_best: Whole | None = None
    train_images: Count | None = None
    test_images: Count | None = None
    images_per_s: Nonnegative | None = None
    matmul_fraction: Nonnegative | None = None
    train_seconds: Nonnegative = 0.0
    world_size: Whole = 1
    paper: PaperError | None
    convert: Record | None
    forms: Forms = {}
    checkpoints: str | None = None
    stage: Literal["converted", "evaluated", "trained"] | None = None


class TransferRow(TrainRow, frozen=True, kw_only=True):
    """A trained network, converted, evaluated and perhaps trained on.

    agreement_initial: percent of the test images to which it gives the untouched network's class. agreement_final: the
    same after training, of images without labels.
    """

    error_initial_top5: Percent | None = None
    loss_initial: Nonnegative | None = None
    agreement_initial: Percent | None = None
    agreement_final: Percent | None = None
    convert_seconds: Nonnegative | None = None
    saved: str | None = None
    time: NetworkTime | None = None
    white_loss: WhiteLoss | None = None
    judged: bool = False


# -------------------------------------------------------------------------------------------------------------- plan


class PlanParams(Data, frozen=True, kw_only=True, omit_defaults=True):
    """Of a layer as a choice, or of a network as a whole (subject: dense, plan, what is tried out, or one choice)."""

    stage: Literal["cost", "loss", "trial", "choice", "proof"]
    model: str
    weights: str
    data: str
    variant: str
    groups: Whole
    rank: Whole | None = None
    layer: str | None = None
    shape: str | None = None
    subject: str | None = None


class PlanRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """What a layer costs or loses as a choice, what it becomes, or how a whole network compares with the original one.

    counts: of the layer, biases apart; seconds: of a call, as its saving shows in the network. loss: the share of the
    layer's output variance; felt: of the network's. better: the least costly choice that loses less; better_cost: what
    it costs more, as a share of what the network does. *_ratio: of the replaced convolutions (params, macs) or of the
    network (time), to the original. agreement, top5: percent of the images on which the original's first guess is the
    first, or among the first five. error: percent of labelled images whose first guess is wrong. logit_error of a
    trial: on the images held out of calibration.
    """

    params: PlanParams
    counts: Counts | None = None
    seconds: float | None = None
    loss: Nonnegative | None = None
    felt: Nonnegative | None = None
    better: str | None = None
    better_cost: Nonnegative | None = None
    params_ratio: Nonnegative | None = None
    macs_ratio: Nonnegative | None = None
    time_ratio: Nonnegative | None = None
    time_ratio_ci95: Ends | None = None
    error: Percent | None = None
    agreement: Percent | None = None
    top5: Percent | None = None
    kl: float | None = None
    logit_error: Nonnegative | None = None
    test_images: Count | None = None


class CurvePoint(Data, frozen=True):
    """The best plan for a budget: cost as a share of the original, and predicted loss."""

    cost: float
    loss: Nonnegative


class PlanFacts(Data, frozen=True, kw_only=True):
    """The plan of a run. asked, predicted, measured: shares of ``kind``. choices: by convolution, as in a plan file.
    rest_s, factors: the network's time besides its convolutions, and by variant the share of their savings alone that
    shows in the network; predicted times follow from them, and from scale: how many times as much the plan's own
    network saves. by: which of the plans tried out it is. real: what each layer loses in the network that is converted
    by sensitivity."""

    kind: Literal["params", "macs", "time", "loss"]
    asked: Nonnegative
    predicted: float | None = None
    loss: Nonnegative | None = None
    measured: Nonnegative | None = None
    choices: dict[str, dict[str, Any]] = {}
    curve: tuple[CurvePoint, ...] = ()
    rest_s: float = 0.0
    factors: dict[str, float] = {}
    scale: float | None = None
    by: str | None = None
    real: dict[str, Nonnegative] = {}


# ------------------------------------------------------------------------------------------------------ the commands


@dataclass(frozen=True)
class CommandSpec:
    """A command that measures: all that the package has to know of it besides its parts, each "module:name".

    command: its class (bgcbench.cli.run.Command). rows: the types of its rows, of a layer and of a network, or one for
    both. report: makes a report of a document. pictures: by name, what says how a document is painted, in the order of
    a figure of all; nothing: why a document has none of them.
    """

    command: str
    rows: tuple[type[Row], ...]
    report: str
    pictures: Mapping[str, str] = field(default_factory=dict)
    nothing: str = "there are no pictures of it"

    def row_type(self, row: object) -> type[Row]:
        """The type of a row, as json reads it."""
        params = row.get("params") if isinstance(row, dict) else None
        return self.rows[-1 if isinstance(params, dict) and "model" in params else 0]


# The one registration of the commands that measure, in the order of --help.
COMMANDS: dict[str, CommandSpec] = {
    "profile": CommandSpec(
        "bgcbench.cli.measuring:Profile",
        (ProfileRow,),
        "bgcbench.report.profile:profile_report",
        {"speedups": "bgcbench.plots.speedups:part", "cost": "bgcbench.plots.times:part"},
        "the result has no row with an interval beside the standard convolution's",
    ),
    "approx": CommandSpec(
        "bgcbench.cli.measuring:Approx",
        (SampledRow, LayerRow),
        "bgcbench.report.approx:approx_report",
        {
            "figure1": "bgcbench.plots.figures:figure1",
            "figure2": "bgcbench.plots.figures:figure2",
            "pareto": "bgcbench.plots.pareto:part",
            "heatmap": "bgcbench.plots.heatmap:of_approx",
        },
        "the result has no finished row with an error above 0; run approx first",
    ),
    "plan": CommandSpec(
        "bgcbench.cli.planning:PlanCommand",
        (PlanRow,),
        "bgcbench.report.plan:plan_report",
        {
            "plans": "bgcbench.plots.plan:curve",
            "cost": "bgcbench.plots.plan:cost",
            "tradeoff": "bgcbench.plots.tradeoff:of_plan",
        },
        "the result has no plan yet; resume it",
    ),
    "train": CommandSpec(
        "bgcbench.cli.training:Train",
        (TrainRow,),
        "bgcbench.report.training:train_report",
        {"errors": "bgcbench.plots.errors:against_size", "curves": "bgcbench.plots.errors:by_epoch"},
        "the result has no test error, which only finished trainings on real images have",
    ),
    "transfer": CommandSpec(
        "bgcbench.cli.training:Transfer",
        (TransferRow,),
        "bgcbench.report.transfer:transfer_report",
        {
            "errors": "bgcbench.plots.conversions:part",
            "layers": "bgcbench.plots.heatmap:of_transfer",
            "tradeoff": "bgcbench.plots.tradeoff:of_transfer",
        },
        "the result has neither the test error of a conversion, which takes real images, nor a calibration",
    ),
}


# ---------------------------------------------------------------------------------------------- around the rows


class Schema(Data, frozen=True):
    name: str
    version: str


class Tool(Data, frozen=True):
    version: str
    git_commit: str | None
    git_dirty: bool | None


class Cpu(Data, frozen=True):
    model: str
    threads: Whole
    cores: Whole | None = None
    capability: str | None = None


class Device(Data, frozen=True, kw_only=True):
    type: Literal["cpu", "cuda"]
    name: str
    capability: str | None = None
    sm_count: Count | None = None
    l2_bytes: Count | None = None
    total_bytes: Count


class Environment(Data, frozen=True):
    """The machine and its software; fingerprint: of what decides a measurement."""

    fingerprint: str
    python: str
    os: str
    cpu: Cpu
    ram_bytes: Count
    torch: str
    torchvision: str | None
    cuda: str | None
    cudnn: str | None
    triton: str | None
    driver: str | None
    device: Device

    @property
    def where(self) -> str:
        """The device and torch, for people."""
        threads = "" if self.device.type == "cuda" else f", {self.cpu.threads} threads"
        return f"{self.device.name}{threads}; torch {self.torch}"


class Tf32(Data, frozen=True):
    conv: bool
    matmul: bool


class TimingRules(Data, frozen=True):
    """The rules of protocol timing/1 that a run was measured by (bgcbench.measure.timing.Rules)."""

    protocol: str = "timing/1"
    warmup_min_s: Nonnegative | None = None
    warmup_min_calls: Count | None = None
    warmup_tolerance: Nonnegative | None = None
    warmup_max_s: Nonnegative | None = None
    min_rounds: Count | None = None
    min_samples: Count | None = None
    target_half_width: Nonnegative | None = None
    max_time_s: Nonnegative | None = None
    max_queue: Count | None = None
    slice_share: Nonnegative | None = None
    canary_tolerance: Nonnegative = 0.02
    canary_redo: Count | None = None


class Preprocessing(Data, frozen=True):
    """How images are prepared (bgcbench.specs.Preprocessing)."""

    size: Sides
    resize: Sides | None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None
    crop: Literal["center", "squash"]
    mean: tuple[Annotated[float, Meta(ge=0, le=1)], ...]
    std: tuple[Seconds, ...]
    source: Literal["weights", "library", "data"]


class Settings(Data, frozen=True):
    """The conditions that a run set on purpose; a resumed run must have the same.

    mode: one or several with commas. runtime: what besides torch runs networks, with its version.
    """

    seed: Count
    precision: str
    layout: str
    tf32: Tf32
    cudnn_benchmark: bool
    deterministic: bool | None = None
    mode: str | None = None
    runtime: str | None = None
    cache: str | None = None
    memory: Literal["kept", "fresh"] | None = None
    phases: tuple[str, ...] | None = None
    input_grad: bool | None = None
    timing: TimingRules | None = None
    pad: Count | None = None
    flip: bool | None = None
    data_sha256: str | None = None
    weights_sha256: str | None = None
    weights_key: str | None = None
    preprocessing: Preprocessing | None = None


class Ceilings(Data, frozen=True):
    """What the device did at its best in this run: matrix products, copies."""

    flops_per_s: Seconds
    bytes_per_s: Seconds
    matmul_sizes: tuple[Whole, ...]
    copy_bytes: Count


class Canary(Data, frozen=True):
    """A fixed product timed at every round's edge; slow_rounds: those in which it was slow."""

    baseline_s: Nonnegative | None = None
    readings_s: tuple[Nonnegative, ...] = ()
    slow_rounds: tuple[Count, ...] = ()
    redone: Count = 0


class Group(Data, frozen=True):
    """Rows that were measured in turn, or ``alone``, because they do not fit into memory together."""

    id: Count
    max_time_s: Nonnegative | None = None
    rounds: Count = 0
    rows: Count = 0
    alone: bool = False
    canary: Canary | None = None


class Config(Data, frozen=True, kw_only=True):
    """What of a run's configuration is told beside its results; None where the command has no such option."""

    batch: Whole | None = None
    height: Whole | None = None
    width: Whole | None = None
    model: str | None = None
    num_classes: Whole | None = None
    stem_stride: Whole | None = None
    where: str | None = None
    data: str | None = None
    calibration_images: Count | None = None
    seeds: tuple[Count, ...] = ()
    precision: str | None = None
    layout: str | None = None
    mode: str | None = None
    phase: str | None = None
    compile: bool = False
    recipe: str | None = None
    epochs: Count | None = None
    batch_size: Whole | None = None
    accumulate: Whole = 1
    subset: Whole | None = None
    lr: Nonnegative | None = None
    schedule: str | None = None
    milestones: tuple[Count, ...] = ()
    gamma: Nonnegative | None = None
    momentum: Nonnegative | None = None
    nesterov: bool = False
    weight_decay: Nonnegative | None = None
    label_smoothing: Nonnegative | None = None
    group_lasso: Nonnegative | None = None
    pad: Count | None = None
    flip: bool | None = None
