"""docs/results.md and the tables of README.md and docs/deploy.md, computed from the files under results/.

    python -m benchmarks.claims            exit code 1 if a document does not say what the files say
    python -m benchmarks.claims --write    write the documents anew

A claim is one number: the row and column that it stands in, the file that it is read from, and the field.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from scipy.stats import spearmanr

from benchmarks import files
from benchmarks.bgc_forms import WIDE
from benchmarks.kernels_cuda import is_wrong, micros
from bgcbench.measure.statistics import Interval, Ratio, Series, ratio_of_medians
from bgcbench.results.aggregate import (
    Cell,
    Conversions,
    Spread,
    Start,
    at_equal_params,
    spread_of,
    training_cells,
)
from bgcbench.results.document import Document, loaded, read
from bgcbench.results.rows import LayerErrors, ProfileRow, SampledRow, TrainRow
from bgcbench.specs import REFIT, VARIANTS

ROOT = Path(__file__).resolve().parent.parent
FIGURES, ALL_SAMPLED = "approx-figures-cpu.json", "approx-variants-cpu.json"
DIGITS, TRANSFERRED = "approx-wrn_16_4-digits-cpu.json", "transfer-wrn_16_4-digits-cpu.json"
TRAINED, QUICKSTART = "train-wrn_10_2-digits-cpu.json", "train-quickstart-cpu.json"
TUNED, KERNELS, SOLVER = "bgc-forms-cpu.json", "kernels-cuda.json", "approx-solver.json"
PIPELINE, CONVERT = "train-speed-cpu.json", "convert-resnet50-cpu.json"
PHOTOGRAPHS = "transfer-efficientnet_lite0-cpu.json"
PLANNED, PLANNED_PHOTOGRAPHS = "plan-wrn_16_4-digits-cpu.json", "plan-efficientnet_lite0-cpu.json"
RANKS = "plan-ranks-cpu.json"
TIMED_PLANS = tuple(f"plan-{name}-time-cpu.json" for name in ("mobilenet_v2", "resnet50", "wrn_28_10"))
AGREE, TWICE = "agree-with-torch.json", "same-row-twice.json"
TABLE4, ALGORITHMS = "table4-cpu-fp32-nchw.json", "table4-cpu-fp32-nchw-algorithms.json"
EVERY, LAYERS = "network-resnet50-cpu-fp32-nchw-all.json", "network-resnet50-cpu-fp32-nchw-layers.json"
# The scripts' own files.
OWN: dict[str, type[files.File]] = {
    AGREE: files.Agreement,
    TWICE: files.Twice,
    SOLVER: files.Solver,
    PIPELINE: files.TrainSpeed,
    CONVERT: files.ConvertFile,
    TUNED: files.AlgorithmFile,
    KERNELS: files.KernelFile,
    PHOTOGRAPHS: files.PhotographFile,
    PLANNED: files.PlannedFile,
    RANKS: files.RankFile,
    PLANNED_PHOTOGRAPHS: files.PlannedPhotographFile,
}
# Files that a script made of several runs of the command line.
SCRIPTS = {
    DIGITS: "python -m benchmarks.approx_digits",
    TRANSFERRED: "python -m benchmarks.transfer_digits --train-groups 4",
    **{
        f"runtimes-{model}-cpu.json": f"python -m benchmarks.runtimes {model}"
        for model in ("resnet50", "mobilenet_v2", "efficientnet_b0")
    },
}


class Number(NamedTuple):
    """A number with the format in which it is read: 0.25 as ".0%"."""

    value: float
    form: str


Value = Ratio | Spread | Number | str | None


@dataclass(frozen=True)
class Claim:
    """One number: the row and column of its table, the file under results/, and the field, read at a place in it."""

    row: tuple[str, ...]
    column: str
    file: str
    at: Any
    field: Callable[[Any, Any], Value]

    @property
    def text(self) -> str:
        return text_of(self.field(opened(ROOT, self.file), self.at))


@dataclass(frozen=True)
class Table:
    """Claims under a title; ``heads`` name the parts of a row. about: what the numbers are, with their units."""

    title: str
    about: str
    heads: tuple[str, ...]
    claims: Sequence[Claim]

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(claim.file for claim in self.claims))

    def markdown(self) -> str:
        columns = list(dict.fromkeys(claim.column for claim in self.claims))
        rows = dict.fromkeys(claim.row for claim in self.claims)
        texts = {(claim.row, claim.column): claim.text for claim in self.claims}
        lines = [[*self.heads, *columns], ["---"] * len(self.heads) + ["---:"] * len(columns)]
        lines += [[*row, *(texts.get((row, column), "-") for column in columns)] for row in rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Rows = Mapping[Any, Any]  # the parts of a row's name, and where in the file it is read
Columns = Mapping[str, Callable[[Any, Any], Value]]


def claims_of(file: str, rows: Rows, columns: Columns) -> list[Claim]:
    """Every column of every row."""
    return [Claim(row, column, file, at, field) for row, at in rows.items() for column, field in columns.items()]


def text_of(value: Value) -> str:
    """A claim's number: "2.2 (1.9-2.6)" with its 95 % interval, "1.67 ± 0.42" over seeds, or by its own format."""
    if isinstance(value, Number):
        return format(value.value, value.form)
    if isinstance(value, Spread):
        return f"{value.mean:.2f}" + ("" if value.sd is None else f" ± {value.sd:.2f}")
    if isinstance(value, Ratio):
        ends = value.ci95
        digits = 2 if value.value < 1.95 or (ends and ends.width < 0.1) else 1
        interval = f" ({ends.low:.{digits}f}-{ends.high:.{digits}f})" if ends else ""
        return f"{value.value:.{digits}f}{interval}"
    return "-" if value is None else value


# --------------------------------------------------------------------------------------------------------------- files


@functools.cache
def opened(root: Path, name: str) -> Any:
    """The Document in a file, or what a script's own file holds."""
    path = root / "results" / name
    return msgspec.convert(loaded(path), OWN[name]) if name in OWN else read(path)


def found(pattern: str) -> list[str]:
    """The files that are there, as a run on a device may not have been made yet."""
    return sorted(path.name for path in (ROOT / "results").glob(pattern))


def command_of(name: str) -> str:
    """The command that made a file, without where it wrote."""
    content = opened(ROOT, name)
    if name in SCRIPTS or not isinstance(content, Document):
        return SCRIPTS.get(name) or str(content.command)
    words, left = ["bgcbench"], list(content.argv)
    while left:
        word = left.pop(0)
        if word in ("--out", "--plot"):
            left.pop(0)
        elif word != "--force":
            words.append(word)
    return " ".join(words)


def condition_of(name: str) -> tuple[str, str]:
    """The device and the precision, layout and mode of a file of ``profile``."""
    document: Document = opened(ROOT, name)
    device, settings = document.environment.device, document.settings
    threads = document.environment.cpu.threads
    where = device.name if device.type == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    return where, f"{settings.precision}, {settings.layout}, {settings.mode or 'eager'}"


def named(variant: str, groups: int) -> str:
    label = VARIANTS[variant].label
    return label if variant == "standard" else f"{label} N={groups}"


def seconds_of(document: Document) -> float:
    form = "%Y-%m-%dT%H:%M:%SZ"
    begin, end = (datetime.datetime.strptime(at, form) for at in (document.started_at, document.finished_at or ""))
    return (end - begin).total_seconds()


# ------------------------------------------------------------------------------------------------------------- profile

At = tuple[str, int]  # variant, N
DENSE = ("standard", 1)


def row_at(document: Document, at: At, algorithm: str | None = None) -> ProfileRow:
    """The row of a layer or a whole network."""
    rows = (row for row in document.results if row.params.layer is None)
    alike = (row for row in rows if (row.params.variant, row.params.groups) == at)
    row: ProfileRow = next(row for row in alike if algorithm in (None, row.params.algorithm))
    return row


def faster(row: ProfileRow, other: ProfileRow, phase: str) -> Ratio:
    """Time of ``other`` over time of ``row``."""
    over, under = other.phases[phase], row.phases[phase]
    paired = row.interleaved is not None and row.interleaved == other.interleaved
    return ratio_of_medians(
        Series(over.samples_s, over.rounds), Series(under.samples_s, under.rounds), paired=paired
    )  # fmt: skip


def speed_up(document: Document, at: At, phase: str = "fwd_bwd", than: At = DENSE) -> Ratio:
    return faster(row_at(document, at), row_at(document, than), phase)


def params_share(document: Document, at: At) -> Value:
    ours, theirs = row_at(document, at).counts, row_at(document, DENSE).counts
    return Number(ours.params / theirs.params, ".0%") if ours and theirs else None


def cells_of(name: str) -> list[At]:
    """GC and BGC in a file, by N."""
    document: Document = opened(ROOT, name)
    cells = {(row.params.variant, row.params.groups) for row in document.results}
    return sorted(((v, n) for v, n in cells if v in ("gc", "bgc")), key=lambda at: (at[1], at[0] != "gc"))


def table4_files() -> list[str]:
    return [name for name in found("table4-cuda-*") + found("table4-cpu-*") if name != ALGORITHMS]


def layer_speed(groups: Sequence[int] = (2, 4, 8, 16)) -> Table:
    claims = [
        Claim(condition_of(name), named(*at), name, at, speed_up)
        for name in table4_files()
        for at in cells_of(name)
        if at[1] in groups
    ]
    about = "Speed-up over the standard convolution, forward and backward (95 % interval)."
    return Table("Layer speed: Table 4's layer", about, ("device", "precision, layout, mode"), claims)


def equal_parameters() -> Table:
    claims = [
        Claim(condition_of(name), f"{named(*bgc)} / {named(*gc)}", name, (bgc, gc), versus)
        for name in table4_files()
        for bgc, gc in at_equal_params({at: at for at in [DENSE, *cells_of(name)]})
    ]
    about = "Time of GC at N, or of the standard convolution, over that of BGC at 2N, forward and backward."
    return Table("BGC versus GC at equal parameters", about, ("device", "precision, layout, mode"), claims)


def versus(document: Document, pair: tuple[At, At]) -> Value:
    return speed_up(document, pair[0], than=pair[1])


def algorithms() -> Table:
    def milliseconds(document: Document, at: tuple[At, str]) -> Value:
        return Number(1e3 * row_at(document, *at).phases["fwd_bwd"].summary.median_s, ".0f")

    rows = [row.params for row in opened(ROOT, ALGORITHMS).results if row.params.variant == "bgc"]
    claims = [
        Claim((named("bgc", p.groups),), p.algorithm, ALGORITHMS, (("bgc", p.groups), p.algorithm), milliseconds)
        for p in rows
    ]
    about = "Median milliseconds of Table 4's layer, forward and backward, fp32 on the CPU."
    return Table("BGC's algorithms", about, ("layer",), claims)


def memory() -> Table:
    columns: Columns = {
        "input + weights (+ mean)": lambda d, at: mebibytes(m.paper_bytes if (m := row_at(d, at).memory) else None),
        "paper": lambda d, at: mebibytes(paper.memory_bytes if (paper := row_at(d, at).paper) else None),
    }
    claims = claims_of(TABLE4, {(named(*at),): at for at in [DENSE, *cells_of(TABLE4)]}, columns)
    return Table("The paper's memory column", "MiB of Table 4's layer.", ("layer",), claims)


def mebibytes(value: float | None) -> Value:
    return None if value is None else Number(value / 2**20, ".2f")


def networks(*, largest: bool = False) -> Table:
    """Every N, or the ``largest`` of each file."""
    claims = []
    apart = (EVERY, LAYERS, *found("network-*-lowrank.json"))
    for name in [n for n in found("network-*-cuda-*") + found("network-*-cpu-*") if n not in apart]:
        params, condition = opened(ROOT, name).results[0].params, ", ".join(condition_of(name))
        most = max(n for _, n in cells_of(name))
        for at in cells_of(name):
            row = (f"{params.model}, {params.batch} images of {params.height} px", condition, str(at[1]))
            columns = {f"{VARIANTS[at[0]].label} {words}": field for words, field in NETWORK.items()}
            claims += claims_of(name, {row: at}, columns) if at[1] == most or not largest else []
    about = "Speed-up over the dense network (95 % interval), and the share of its parameters that is left."
    return Table("Networks", about, ("network", "device", "N"), claims)


def peers() -> Table:
    """Low rank beside groups, in a network of wide 3x3 layers and in one of pointwise layers."""
    claims = []
    for name in found("network-*-lowrank.json"):
        params, condition = opened(ROOT, name).results[0].params, ", ".join(condition_of(name))
        cells = {(row.params.variant, row.params.groups) for row in opened(ROOT, name).results} - {DENSE}
        for at in sorted(cells, key=lambda at: (at[1], list(VARIANTS).index(at[0]))):
            row = (f"{params.model}, {params.batch} images of {params.height} px", condition, named(*at))
            claims += claims_of(name, {row: at}, {"params": params_share, "inference": network_speed_up("fwd")})
    about = "Speed-up over the dense network (95 % interval), and the share of its parameters that is left."
    return Table("Low rank beside groups in a network", about, ("network", "device", "as"), claims)


def network_speed_up(phase: str) -> Callable[[Document, At], Value]:
    """None where the file has no such phase."""
    return lambda document, at: speed_up(document, at, phase) if phase in row_at(document, at).phases else None


NETWORK: Columns = {
    "params": params_share,
    "training step": network_speed_up("train_step"),
    "inference": network_speed_up("fwd"),
}


def runtimes() -> Table:
    """Networks in eager PyTorch, compiled, and in ONNX Runtime: the dense one's time, and what others save of it."""
    claims = []
    for name in found("runtimes-*.json"):
        document: Document = opened(ROOT, name)
        params = document.results[0].params
        where = f"{params.model}, {params.batch} image{'s' * (params.batch > 1)} of {params.height} px"
        for at in dict.fromkeys((row.params.variant, row.params.groups) for row in document.results):
            modes = (document.settings.mode or "").split(",")
            columns: Columns = {"params": params_share, **{mode: in_mode(mode) for mode in modes}}
            label = "dense" if at == DENSE else named(*at)
            claims += claims_of(name, {(where, condition_of(name)[0], label): at}, columns)
    about = (
        "Inference: the dense network's time in each mode, and the speed-up over it in the same mode (95 % interval). "
        "onnxruntime runs what `bgcbench.export` writes: norms folded, and the algorithms that are the fastest there."
    )
    return Table("Runtimes", about, ("network", "device", "as"), claims)


def in_mode(mode: str) -> Callable[[Document, At], Value]:
    def field(document: Document, at: At) -> Value:
        rows = {(row.params.variant, row.params.groups): row for row in document.results if row.params.mode == mode}
        if at == DENSE:
            return f"{1e3 * (rows[at].median_s('fwd') or 0.0):.3g} ms"
        return faster(rows[at], rows[DENSE], "fwd")

    return field


def every_variant() -> Table:
    def times(phase: str, form: str) -> Callable[[Document, At], Value]:
        def field(document: Document, at: At) -> Value:
            algorithm = form if at[0] in ("lgc", "flgc") else None
            return faster(row_at(document, at, algorithm), row_at(document, DENSE), phase)

        return field

    columns = {"training step": times("train_step", "masked"), "inference": times("fwd", "deployed")}
    measured = {row.params.variant for row in opened(ROOT, EVERY).results}
    rows = {(named(variant, 4),): (variant, 4) for variant in VARIANTS if variant in measured - {"standard"}}
    about = "Speed-up of ResNet-50 over the dense one (95 % interval); LGC and FLGC train masked and infer deployed."
    return Table("All variants in a network", about, ("network",), claims_of(EVERY, rows, columns))


def where_time_goes() -> Table:
    def of_step(document: Document, replaced: bool) -> Value:
        own = [row for row in document.results if row.layer and row.params.variant == "standard"]
        chosen = [row for row in own if row.layer.replaced or not replaced]
        total = sum(row.phases["fwd_bwd"].summary.median_s * row.layer.count for row in chosen)
        return Number(total / row_at(document, DENSE).phases["train_step"].summary.median_s, ".0%")

    def shapes(document: Document, variant: str) -> Value:
        own = {row.params.layer: row for row in document.results if row.layer and row.params.variant == "standard"}
        rows = [row for row in document.results if row.layer and row.params.variant == variant]
        ratios = [faster(row, own[row.params.layer], "fwd_bwd") for row in rows]
        return f"{sum(bool(ratio.is_significant) and ratio.value > 1 for ratio in ratios)} of {len(ratios)}"

    rows: dict[tuple[str, ...], tuple[Any, Callable[[Any, Any], Value]]] = {
        ("share of all convolutions, each by itself",): (False, of_step),
        ("share of those that are replaced",): (True, of_step),
        ("replaced shapes in which GC N=4 is significantly faster",): ("gc", shapes),
        ("replaced shapes in which BGC N=4 is significantly faster",): ("bgc", shapes),
    }
    claims = [Claim(row, "value", LAYERS, at, field) for row, (at, field) in rows.items()]
    return Table("Where the time goes", "ResNet-50's training step on the CPU.", ("what",), claims)


# -------------------------------------------------------------------------------------------------------------- approx


def sampled(document: Document) -> dict[tuple[str, int, str], SampledRow]:
    """By variant, N and input."""
    rows = [row for row in document.results if isinstance(row, SampledRow) and row.status == "ok"]
    return {(row.params.variant, row.params.groups, row.params.input): row for row in rows}


def slopes() -> Table:
    columns: Columns = {
        "slope, mean": lambda d, at: Number(d.fits[at].slope_mean, ".2f"),
        "exact": lambda d, at: Number(d.fits[at].exact_slope_mean, ".2f"),
        "slope, regression": lambda d, at: Number(d.fits[at].slope_regression, ".2f"),
        "exact, regression": lambda d, at: Number(d.fits[at].exact_slope_regression, ".2f"),
        "largest scaled error e-3": lambda d, at: Number(1e3 * d.fits[at].max_scaled_error, ".2f"),
    }
    rows = {(VARIANTS[fit.variant].label, fit.input): at for at, fit in enumerate(opened(ROOT, FIGURES).fits)}
    about = (
        "Slopes of log E versus log(1 - 1/N), and errors over (1 - 1/N)^p. The paper reads 1 for GC, 2 for BGC and at "
        "most 3.83e-3."
    )
    return Table("Figures 1 and 2 of the paper", about, ("variant", "input"), claims_of(FIGURES, rows, columns))


def from_closed_form(document: Document, _: Any) -> Value:
    """Largest relative deviation of an error from the closed form with the sample's own factor."""
    rows = sampled(document).values()
    return largest(
        (row.relative_error, (row.exact_relative_error or 0.0) * (row.in_sample_factor or 0.0)) for row in rows
    )


def from_proof(document: Document, _: Any) -> Value:
    """Of the proof's weights, from rho (1 - 1/N)^2."""
    rows = sampled(document)
    rho = {law: (row.exact_relative_error or 0.0) / (1 - 1 / n) for (v, n, law), row in rows.items() if v == "gc"}
    bgc = [(rho[law] * (1 - 1 / n) ** 2, row) for (v, n, law), row in rows.items() if v == "bgc"]
    return largest((row.construction_relative_error, expected) for expected, row in bgc)


def from_equal_parameters(document: Document, _: Any) -> Value:
    """Of BGC at 2N, from GC at N."""
    rows = sampled(document)
    by_law = [{(v, n): row for (v, n, at), row in rows.items() if at == law} for law in {law for *_, law in rows}]
    pairs = [pair for at in by_law for pair in at_equal_params(at)]
    return largest((bgc.relative_error, gc.relative_error) for bgc, gc in pairs)


def largest(pairs: Iterable[tuple[float | None, float | None]]) -> Value:
    return Number(max(abs(value / expected - 1) for value, expected in pairs if value and expected), ".2%")


def lost_by_variant() -> Table:
    def lost(document: Document, at: tuple[str, int, str]) -> Value:
        return percent(sampled(document)[at].output_relative_error)

    cells = (("gc", 4), ("shuffle", 4), ("lgc", 4), ("flgc", 4), ("bgc", 8), ("tlgc", 4), ("lowrank", 4))
    laws = dict.fromkeys(law for *_, law in sampled(opened(ROOT, ALL_SAMPLED)))
    claims = [Claim((named(*at),), law, ALL_SAMPLED, (*at, law), lost) for at in cells for law in laws]
    about = (
        "Least share of a convolution's output energy that is lost at a quarter of its parameters (TLGC: a little "
        "more), by input. TLGC, FLGC and LGC are searches."
    )
    return Table("Approximability of all variants", about, ("variant",), claims)


def percent(value: float | None, form: str = ".1%") -> Value:
    return None if value is None else Number(value, form)


def lost_by_layers() -> Table:
    def median(weights: Callable[[LayerErrors], float]) -> Callable[[Document, At], Value]:
        def field(document: Document, at: At) -> Value:
            rows = [row for row in document.results if (row.params.variant, row.params.groups) == at]
            return percent(statistics.median(weights(row.output_relative_error) for row in rows))

        return field

    columns = {
        "copied": median(lambda errors: errors.copy),
        "white": median(lambda errors: errors.white),
        "calibrated": median(lambda errors: errors.calibrated),
    }
    present = {row.params.variant for row in opened(ROOT, DIGITS).results}
    rows = {(named(v, n),): (v, n) for n in (2, 4, 8, 16) for v in VARIANTS if v in present}
    about = (
        "Share of a layer's output energy that is lost on images held out, without training: median over the "
        "convolutions of a wrn_16_4 trained on digits."
    )
    return Table("Approximability of a trained network", about, ("variant",), claims_of(DIGITS, rows, columns))


# -------------------------------------------------------------------------------------------------- train and transfer


def trained_at(document: Document, at: At) -> Cell:
    return next(cell for cell in training_cells(document.results) if (cell.variant, cell.groups) == at)


def final_error(document: Document, at: At) -> Value:
    return spread_of(trained_at(document, at).errors.values())


def trainings() -> Table:
    columns: Columns = {
        "params": lambda d, at: Number(trained_at(d, at).params or 0.0, ",.0f"),
        "MACs": lambda d, at: Number(trained_at(d, at).macs or 0.0, ",.0f"),
        "error, last epoch": final_error,
        "error, best epoch": lambda d, at: spread_of(trained_at(d, at).by_seed(lambda row: row.error_best).values()),
        "images/s": lambda d, at: Number(trained_at(d, at).images_per_s or 0.0, ",.0f"),
    }
    cells = [(cell.variant, cell.groups) for cell in training_cells(opened(ROOT, TRAINED).results)]
    about = "wrn_10_2 on digits, 20 epochs; test errors in %, mean ± standard deviation of 3 seeds."
    claims = claims_of(TRAINED, {(named(*at),): at for at in cells}, columns)
    return Table("Trained from scratch", about, ("variant",), claims)


Converted = tuple[str, int, str]  # variant, N, initialisation


def converted_at(document: Document, at: Converted, rebn: bool) -> Cell | None:
    variant, groups, init = at
    cells = Conversions.of(document).at(Start(init, rebn and variant != "standard"))
    return cells.get((variant, groups))


def error_after(epochs: int, *, rebn: bool = True) -> Callable[[Document, Converted], Value]:
    """Test error of a conversion after so many epochs of training; 0 is as converted."""

    def error(row: TrainRow) -> float | None:
        if epochs == 0:
            return row.error_initial
        return row.epochs[epochs - 1].test_error if len(row.epochs) >= epochs else None

    def field(document: Document, at: Converted) -> Value:
        cell = converted_at(document, at, rebn)
        return spread_of(cell.known(error).values()) if cell else None

    return field


def layer_loss(document: Document, at: Converted) -> Value:
    cell = converted_at(document, at, rebn=True)
    return percent(cell.lost(lambda layer: layer.after)) if cell else None


def conversions() -> Table:
    columns = {
        "norms as they were": error_after(0, rebn=False),
        "norms re-estimated": error_after(0),
        "after 1 epoch": error_after(1),
        "after 3 epochs": error_after(3),
        "layer loss": layer_loss,
    }
    cells = Conversions.of(opened(ROOT, TRANSFERRED)).cells
    rows = {
        (named(cell.variant, cell.groups), cell.start.init): (cell.variant, cell.groups, cell.start.init)
        for cell in cells
    }
    about = (
        "wrn_16_4 trained on digits and converted: test errors in %, mean ± standard deviation of 3 seeds, before any "
        "training and after training on from re-estimated norms. Layer loss: median over layers and seeds of the share "
        "of the output energy that is lost on images held out."
    )
    return Table("Converted", about, ("variant", "weights"), claims_of(TRANSFERRED, rows, columns))


def photographed() -> Table:
    """EfficientNet-lite0 on photographs: each way to keep half, or 0.7, of the pointwise convolutions' parameters."""
    about = (
        "EfficientNet-lite0 with ImageNet weights, its 31 pointwise convolutions replaced and calibrated, without "
        "training; on crops of photographs that were not fitted, versus the original network."
    )
    return _photographed("On photographs", about, PHOTOGRAPHS, lambda row: row.how)


def planned_photographed() -> Table:
    """The same for plans, at more budgets."""
    about = (
        "The same network planned layer by layer (by predicted loss), the best choice for all layers, and low rank with"
        " ranks under one budget; calibrated on 4 crops of each photograph, not 8 as above."
    )
    return _photographed("Planned, on photographs", about, PLANNED_PHOTOGRAPHS, lambda row: f"{row.label}, {row.init}")


def _photographed(title: str, about: str, file: str, named: Callable[[Any], str]) -> Table:
    def said(what: str, form: str) -> Callable[[Any, int], Value]:
        return lambda content, at: Number(getattr(content.results[at].unseen, what), form)

    columns: Columns = {
        "params": lambda c, at: Number(c.results[at].params_ratio, ".3f"),
        "agrees %": said("agreement", ".1f"),
        "top-5 %": said("top5", ".1f"),
        "KL": said("kl", ".2f"),
        "logit error": said("logit_error", ".2f"),
    }
    rows = enumerate(opened(ROOT, file).results)
    named_rows = {(f"{row.budget:g}", named(row), str(row.seed)): at for at, row in rows}
    return Table(title, about, ("budget", "as", "seed"), claims_of(file, named_rows, columns))


def planned() -> Table:
    """wrn_16_4 on digits: the plan and the best choice of each variant for all layers, at the same budget."""

    def said(what: str, form: str) -> Callable[[Any, tuple[float, str]], Value]:
        def mean(content: Any, at: tuple[float, str]) -> Value:
            rows = [row for row in content.results if (row.budget, row.network) == at]
            return (
                spread_of(getattr(row, what) for row in rows)
                if form == ""
                else Number(statistics.fmean(getattr(row, what) for row in rows), form)
            )

        return mean

    columns: Columns = {
        "params": said("params_ratio", ".3f"),
        "error %": said("error", ""),
        "agrees %": said("agreement", ".1f"),
        "KL": said("kl", ".4f"),
        "logit error": said("logit_error", ".4f"),
    }
    found = dict.fromkeys((row.budget, row.network) for row in opened(ROOT, PLANNED).results)
    rows = {(f"{budget:g}", network): (budget, network) for budget, network in found}
    about = (
        "wrn_16_4 trained on digits, planned and converted without training; on the 500 test images, versus the "
        "original network. Means of 3 seeds, of errors with the standard deviation."
    )
    return Table("Planned layer by layer", about, ("params asked", "network"), claims_of(PLANNED, rows, columns))


def planned_times() -> Table:
    """Networks planned for a share of their time: what was asked, predicted and measured."""

    def proved(content: Any, _: object) -> Value:
        (plan,) = (row for row in content.results if row.params.stage == "proof" and row.params.subject == "plan")
        return Ratio(plan.time_ratio, Interval(*plan.time_ratio_ci95), paired=True)

    columns: Columns = {
        "asked": lambda c, _: Number(c.plan.asked, ".2f"),
        "predicted": lambda c, _: Number(c.plan.predicted, ".3f"),
        "measured": proved,
    }
    claims = [
        claim
        for name in TIMED_PLANS
        for claim in claims_of(name, {(opened(ROOT, name).results[0].params.model,): None}, columns)
    ]
    about = (
        "Share of the network's time in inference, batch 4, 2 CPU threads; untrained weights, which serve for time. A "
        "quick look (--quick)."
    )
    return Table("Planned for a time", about, ("network",), claims)


def accuracy() -> Table:
    """The README's: SC, GC and BGC, trained from scratch and converted."""
    claims = []
    for variant in ("standard", "gc", "bgc"):
        label, dense = VARIANTS[variant].label, variant == "standard"
        for n in (4, 8):
            row = ("wrn_10_2, trained from scratch, 20 epochs", str(n))
            claims.append(Claim(row, label, TRAINED, DENSE if dense else (variant, n), final_error))
        for words, init in (("copied", "copy"), ("calibrated", "calibrated")):
            for n in (4, 8, 16):
                row, at = (f"wrn_16_4, converted, {words} weights, no training", str(n)), (variant, 1 if dense else n)
                claims.append(Claim(row, label, TRANSFERRED, (*at, init), error_after(0, rebn=init == "calibrated")))
    about = "Test error in % on digits, mean ± standard deviation of 3 seeds."
    return Table("Accuracy", about, ("network", "N"), claims)


def training_speed() -> Table:
    columns: Columns = {
        "images/s": lambda d, at: Number(d.row(at).images_per_s, ",.0f"),
        "of the matrix peak": lambda d, at: percent(d.row(at).matmul_fraction, ".0%"),
    }
    claims = []
    for name in found("train-*-synthetic-cuda-*"):
        document: Document = opened(ROOT, name)
        p, device = document.results[0].params, document.environment.device.name
        about_run = f"{p.model}, recipe {p.recipe}", f"{device}, {document.settings.precision}"
        rows = {(*about_run, named(row.params.variant, row.params.groups)): row.key for row in document.results}
        claims += claims_of(name, rows, columns)
    about = "On synthetic images. Peak: MACs done over those of the device's best matrix product in the same time."
    return Table("Training speed", about, ("network", "device", "variant"), claims)


# ------------------------------------------------------------------------------------------- the scripts' own files


def kernel_micros(variant: str, *, ours: bool) -> Callable[[Any, int], Value]:
    """Of the fastest algorithm with right results in a cell."""

    def field(content: files.KernelFile, at: int) -> Value:
        cell = content.table4[at]
        right = [row for row in cell.rows if not is_wrong(row, cell.precision)]
        mine = [row for row in right if (row.variant, row.algorithm == "triton") == (variant, ours)]
        return Number(min(micros(row.device_s, "fwd_bwd") for row in mine), ".0f") if mine else None

    return field


def kernels() -> Table:
    """The cells that have our kernels and the stock algorithms."""
    columns = {
        "BGC, ours": kernel_micros("bgc", ours=True),
        "BGC, stock": kernel_micros("bgc", ours=False),
        "GC, ours": kernel_micros("gc", ours=True),
        "GC, cuDNN": kernel_micros("gc", ours=False),
        "SC, cuDNN": kernel_micros("standard", ours=False),
    }
    claims = []
    for name in found(KERNELS):
        content: files.KernelFile = opened(ROOT, name)
        cells = sorted(enumerate(content.table4), key=lambda item: (item[1].precision, item[1].shape.groups))
        for at, cell in cells:
            row = (content.environment.device.name, cell.precision, str(cell.shape.groups))
            if all(field(content, at) for field in columns.values()):
                claims += claims_of(name, {row: at}, columns)
    about = "Microseconds of Table 4's layer, forward and backward, as a CUDA graph."
    return Table("Our kernels versus stock ones", about, ("device", "precision", "N"), claims)


def over_half(content: files.AlgorithmFile, at: tuple[int, str, float]) -> Value:
    """Geometric mean of a subject's time over GC(N/2)'s, in channels-last inference with 1x1 kernels.

    at: N, the subject, and how many inputs the layers have at least for each output.
    """
    groups, subject, narrowing = at
    times = [
        cell.median_s[subject] / cell.median_s["gc_half"]
        for cell in content.results
        if (cell.kernel, cell.layout, cell.phase, cell.groups) == ((1, 1), "nhwc", "fwd", groups)
        and cell.in_channels // groups >= WIDE
        and cell.in_channels >= narrowing * cell.out_channels
        and cell.size[2:] != (1, 1)
    ]
    return Number(statistics.geometric_mean(times), ".2f")


def half_width(content: files.Twice, _: Any) -> Value:
    widths = [width for entry in content.tries if (width := entry.half_width) is not None]
    return Number(statistics.median(widths), ".1%")


def held(content: files.ConvertFile, _: Any) -> Value:
    calibration = content.results[0].calibration
    return Number((calibration.moment_bytes + calibration.in_flight_bytes) / 2**30, ".1f")


def minutes(document: Document, _: Any) -> Value:
    return Number(seconds_of(document) / 60, ".1f")


def rank_of_random(content: files.RankFile, at: tuple[str, str]) -> Value:
    """The same of one thing that is known of random plans with another, for each network."""
    by_network: dict[str, list[tuple[float, float]]] = {}
    for row in content.results:
        by_network.setdefault(row.weights, []).append((getattr(row, at[0]), getattr(row, at[1])))
    return ", ".join(f"{spearmanr(pairs).statistic:.2f}" for pairs in by_network.values())


def rank_of_photographed(content: files.PlannedPhotographFile, _: Any) -> Value:
    """Spearman's correlation of predicted loss with KL on unseen photographs, over the networks of the first split."""
    rows = {row.predicted: row.unseen.kl for row in content.results if row.seed == 0 and row.init == REFIT}
    rows.pop(None, None)
    return Number(float(spearmanr(list(rows), list(rows.values())).statistic), ".2f")


# What a number is, its file, its place in it, and the field.
SINGLE: tuple[tuple[str, str, Any, Callable[[Any, Any], Value]], ...] = (
    ("our medians differ from torch.utils.benchmark's by at most", AGREE, None,
     lambda c, _: Number(c.worst, ".1%")),
    ("tries in which a row differs significantly from itself", TWICE, None,
     lambda c, _: f"{c.told_apart} of {len(c.tries)}"),
    ("median half-width of the interval of that ratio", TWICE, None, half_width),
    ("minutes of `profile --preset table4` on the CPU", TABLE4, None, minutes),
    ("minutes of the training of the quick start (SC, GC, BGC)", QUICKSTART, None, minutes),
    *((f"test error in % of {named(*at)} there", QUICKSTART, at, final_error)
      for at in (DENSE, ("gc", 4), ("bgc", 4))),
    ("seconds of `approx` (two inputs, GC and BGC, five N)", FIGURES, None,
     lambda d, _: Number(seconds_of(d), ".0f")),
    ("largest deviation of a sampled error from the closed form", FIGURES, None, from_closed_form),
    ("the same of the weights in the proof of Theorem 3.6", FIGURES, None, from_proof),
    ("the same of BGC at 2N from GC at N, white input", FIGURES, None, from_equal_parameters),
    *((f"median loss of EfficientNet-lite0's pointwise layers as {cell}", PHOTOGRAPHS, cell,
       lambda c, cell: percent(c.medians[cell]))
      for cell in ("gc N=2", "bgc N=4", "tlgc N=2", "lowrank N=2", "gc N=4", "bgc N=8", "lowrank N=4")),
    *((f"rank correlation of {what}, over 30 random plans of each of three trained wrn_16_4", RANKS, at, rank_of_random)
      for what, at in (
          ("predicted loss with the error of the class scores", ("felt", "logit_error")),
          ("predicted loss with KL", ("felt", "kl")), ("the layers' losses alone with KL", ("plain", "kl")),
          ("the error of the class scores with KL", ("logit_error", "kl")),
      )),
    ("rank correlation of predicted loss with KL on photographs never seen, over the networks above",
     PLANNED_PHOTOGRAPHS, None, rank_of_photographed),
    ("our solver versus one least-squares problem a convolution and group, times as fast", SOLVER, None,
     lambda c, _: Number(c.ratios.conventional, ".0f")),
    ("our solver versus one shared factorisation, times as fast", SOLVER, None,
     lambda c, _: Number(c.ratios.shared, ".1f")),
    ("the errors of these agree to", SOLVER, None, lambda c, _: Number(c.largest_relative_difference, ".0e")),
    ("images/s of the CIFAR pipeline", PIPELINE, None,
     lambda c, _: Number(statistics.median(c.pipeline.images_per_s["bgcbench"]), ",.0f")),
    ("the pipeline versus torchvision's transforms in one process, times as fast", PIPELINE, None,
     lambda c, _: Number(c.pipeline.ratio, ".0f")),
    ("milliseconds a step that the training loop adds to a bare one", PIPELINE, None,
     lambda c, _: Number(1e3 * c.loop.added_s, ".2f")),
    ("minutes of a calibrated conversion of ResNet-50, 512 images, 2 cores", CONVERT, None,
     lambda c, _: Number(c.results[0].seconds / 60, ".1f")),
    ("GiB that it holds meanwhile", CONVERT, None, held),
    ("cells (layer, N, layout, phase) in which BGC's algorithms were measured", TUNED, None,
     lambda c, _: Number(c.summary.cells, ".0f")),
    ("of these, the measured choice is within 5 % of the best in", TUNED, None,
     lambda c, _: Number(c.summary.within_5_percent / c.summary.cells, ".0%")),
    ("BGC(N) versus GC(N/2), groups of at least 32 channels, times as long (geometric mean)", TUNED, None,
     lambda c, _: Number(c.summary.ratio_to_gc_of_half, ".2f")),
    *((f"{label}, N={n}, the same in channels-last inference with 1x1 kernels{where}", TUNED, (n, subject, least),
       over_half)
      for n in (4, 8)
      for label, subject, least, where in (
          ("BGC(N)", "auto", 0.0, ""), ("GC(N)", "gc", 0.0, ""),
          ("BGC(N)", "auto", 2.0, ", at least twice as many inputs as outputs"),
      )),
)  # fmt: skip


def single_numbers() -> Table:
    claims = [Claim((what,), "value", file, at, field) for what, file, at, field in SINGLE]
    return Table("Single numbers", "Checks, durations and what else is one number.", ("what",), claims)


# ----------------------------------------------------------------------------------------------------------- documents

TABLES: tuple[Callable[[], Table], ...] = (
    *(
        layer_speed,
        equal_parameters,
        algorithms,
        memory,
        networks,
        peers,
        runtimes,
        every_variant,
        where_time_goes,
        training_speed,
    ),
    *(
        kernels,
        slopes,
        lost_by_variant,
        lost_by_layers,
        trainings,
        conversions,
        photographed,
        planned,
        planned_photographed,
        planned_times,
        single_numbers,
    ),
)
MARKED: dict[str, Callable[[], Table]] = {  # tables of README.md and docs/deploy.md
    "speed": lambda: layer_speed((4, 16)),
    "networks": lambda: networks(largest=True),
    "accuracy": accuracy,
    "runtimes": runtimes,
}
HEAD = """# Results

Every number here is computed from a file under [results](../results) by `python -m benchmarks.claims --write`; a test
holds this page to the files. [results/README.md](../results/README.md) says how the files came to be. Intervals are of
95 %; a speed-up whose interval holds 1 is not significant.
"""


def results_page() -> str:
    """docs/results.md."""
    parts = [HEAD]
    for table in [make() for make in TABLES]:
        if table.claims:
            sources = [f"- [{name}](../results/{name}): `{command_of(name)}`" for name in table.files]
            parts.append(f"## {table.title}\n\n{table.about}\n\n{table.markdown()}\n\n" + "\n".join(sources) + "\n")
    return "\n".join(parts)


def put_into(text: str) -> str:
    """``text`` of a page with its tables between their marks, where it has these."""
    end = "<!-- end of claims -->"
    for name, make in MARKED.items():
        start = f"<!-- claims: {name} -->"
        if start in text:
            head, _, rest = text.partition(start)
            text = f"{head}{start}\n\n{make().markdown()}\n\n{end}{rest.partition(end)[2]}"
    return text


def documents() -> Iterator[tuple[Path, str]]:
    """Each document and what it should say."""
    yield ROOT / "docs" / "results.md", results_page()
    for page in (ROOT / "README.md", ROOT / "docs" / "deploy.md"):
        yield page, put_into(page.read_text(encoding="utf-8"))


def write() -> None:
    """Write the documents anew."""
    for path, text in documents():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the documents anew")
    if parser.parse_args().write:
        write()
        return 0
    stale = [path for path, text in documents() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} does not say what results/ says: run python -m benchmarks.claims --write")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
