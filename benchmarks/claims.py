"""The README's table of claims, drawn from the files under results/.

    python -m benchmarks.claims            print the table
    python -m benchmarks.claims --write    put it into README.md and results/README.md

Every figure in the table is computed from a result file; a test holds the two documents to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import networks_cuda, table4_cuda, train_cuda
from benchmarks.bgc_forms import WIDE
from benchmarks.kernels_cuda import is_wrong, micros
from bgcbench import report, results
from bgcbench.report.format import scaled
from bgcbench.results.rows import ProfileRow
from bgcbench.specs import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- {}: python -m benchmarks.claims --write -->", "<!-- end of {} -->"
TRAINED = "train-wrn_10_2-digits-cpu.json"
TRANSFERRED = "transfer-wrn_16_4-digits-cpu.json"
COMMAND_TRANSFER = "python -m benchmarks.transfer_digits --train-variants gc,bgc"


def row_of(document: dict[str, Any], variant: str, groups: int, algorithm: str | None = None) -> dict[str, Any]:
    """The one row of that variant and N (and algorithm, where a file holds several)."""
    found = [
        row
        for row in document["results"]
        if (row["params"]["variant"], row["params"]["groups"]) == (variant, groups)
        and (algorithm is None or row["params"]["algorithm"] == algorithm)
    ]
    return found[0]


def speed_up(row: dict[str, Any], other: dict[str, Any], phase: str) -> report.Comparison | None:
    return report.speed_up(msgspec.convert(row, ProfileRow), msgspec.convert(other, ProfileRow), phase)


def speed(document: dict[str, Any], variant: str, groups: int, other: tuple[str, int] = ("standard", 1)) -> str:
    """ "2.0x faster than standard (95% CI 1.9-2.1)", forward and backward."""
    ratio = speed_up(row_of(document, variant, groups), row_of(document, *other), "fwd_bwd")
    if ratio is None:
        raise SystemExit(f"{variant} N={groups} was not measured beside {other}")
    name = "standard" if other[0] == "standard" else f"{other[0].upper()} N={other[1]}"
    return ratio.versus(name)


def minutes(document: dict[str, Any]) -> float:
    """How long the run took."""
    form = "%Y-%m-%dT%H:%M:%SZ"
    begin, end = (datetime.datetime.strptime(document[key], form) for key in ("started_at", "finished_at"))
    return (end - begin).total_seconds() / 60


def printed_above(row: dict[str, Any]) -> float:
    """MiB that Table 4 prints above input + weights (+ mean), both to the printed two digits."""
    sizes = row["memory"]["paper_bytes"], row["paper"]["memory_bytes"]
    ours, printed = (float(f"{size / 2**20:.2f}") for size in sizes)
    return round(printed - ours, 2)


def where(document: dict[str, Any]) -> str:
    """ "2 CPU threads", or the CUDA device's name."""
    environment = document["environment"]
    on_cuda = environment["device"]["type"] == "cuda"
    return str(environment["device"]["name"]) if on_cuda else f"{environment['cpu']['threads']} CPU threads"


def table4_claims(name: str, command: str, what: str) -> list[tuple[str, str, str]]:
    """BGC and GC at N = 4 and 16 against the standard convolution, from one Table 4 file."""
    document = results.read(ROOT / "results" / name)
    whole = row_of(document, "standard", 1)["counts"]["params"]
    lines = []
    for groups in (4, 16):
        share = whole / row_of(document, "bgc", groups)["counts"]["params"]
        lines.append(
            f"Table 4's layer on {where(document)}, {what}, forward and backward: BGC N={groups} "
            f"(1/{share:.0f} of the parameters) is {speed(document, 'bgc', groups)}; "
            f"GC N={groups} (1/{groups}) is {speed(document, 'gc', groups)}"
        )
    return [(line, name, command) for line in lines]


# Networks measured on the CPU, and the N of their file.
NETWORKS = {"resnet50": "2,4,8,16", "mobilenet_v2": "2,4,8", "efficientnet_b0": "2,4,8", "wrn_28_10": "2,4,8,16"}


def network_speed(document: dict[str, Any], variant: str, groups: int, phase: str, algorithm: str | None = None) -> str:
    """ "2.0x faster (95% CI 1.9-2.1)" than the dense network."""
    ratio = speed_up(row_of(document, variant, groups, algorithm), row_of(document, "standard", 1), phase)
    if ratio is None:
        raise SystemExit(f"{variant} N={groups} was not measured beside the dense network")
    return ratio.versus("dense")


def network_claim(model: str, name: str, command: str, what: str) -> tuple[str, str, str]:
    """A training step and inference of GC and BGC at the largest N, from one network's file."""
    document = results.read(ROOT / "results" / name)
    config, whole = document["config"], row_of(document, "standard", 1)["counts"]["params"]
    most = max(config["groups"])
    parts = []
    for variant in ("gc", "bgc"):
        row = row_of(document, variant, most)
        share = row["counts"]["params"] / whole
        parts.append(
            f"{variant.upper()} N={most} ({share:.0%} of the parameters): training step "
            f"{network_speed(document, variant, most, 'train_step')}, inference "
            f"{network_speed(document, variant, most, 'fwd')}"
        )
    return (
        f"{model}, {config['batch']} images of {config['height']} px, {where(document)}, {what}: {'; '.join(parts)}",
        name,
        command,
    )


def all_variants_claim() -> tuple[str, str, str]:
    """Every variant in one network at N = 4: a training step of the form that trains, inference of the deployed one."""
    name = "network-resnet50-cpu-fp32-nchw-all.json"
    document = results.read(ROOT / "results" / name)
    forms = {"lgc": ("masked", "deployed"), "flgc": ("masked", "deployed")}
    parts = []
    for variant in ("gc", "shuffle", "lgc", "flgc", "tlgc", "bgc"):
        trained, deployed = forms.get(variant, (None, None))
        times = {
            phase: row_of(document, "standard", 1)["phases"][phase]["summary"]["median_s"]
            / row_of(document, variant, 4, form)["phases"][phase]["summary"]["median_s"]
            for phase, form in (("train_step", trained), ("fwd", deployed))
        }
        parts.append(f"{variant} {times['train_step']:.2f}x / {times['fwd']:.2f}x")
    batch = document["config"]["batch"]
    return (
        "resnet50 with each variant at N=4, speed-up of a training step / of inference (lgc, flgc: masked / deployed): "
        + ", ".join(parts),
        name,
        f"bgcbench profile --model resnet50 --device cpu --batch {batch} --groups 4 --variants all",
    )


def layers_claim() -> tuple[str, str, str]:
    """Where a network's time goes, and how many of its shapes each variant makes faster."""
    name = "network-resnet50-cpu-fp32-nchw-layers.json"
    document = results.read(ROOT / "results" / name)
    _, layers = report.document_report(results.document_of(document, name)).tables
    lines = layers.sections["Where the time goes (fwd+bwd)"]
    config = document["config"]
    return (
        f"In resnet50's training step, {lines[0]}; {'; '.join(line.partition(', saving')[0] for line in lines[2:])}",
        name,
        f"bgcbench profile --model resnet50 --device cpu --batch {config['batch']} --groups 4 --layers "
        f"--max-time {config['max_time_s']:g}",
    )


def approx_rows(document: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """{(variant, N, input): row} of an approx file."""
    return {
        (row["params"]["variant"], row["params"]["groups"], row["params"]["input"]): row
        for row in document["results"]
        if row["status"] == "ok"
    }


def figure_claims() -> list[tuple[str, str, str]]:
    """Section 5.1 of the paper, computed again."""
    name = "approx-figures-cpu.json"
    document = results.read(ROOT / "results" / name)
    rows, config = approx_rows(document), document["config"]
    gc = {(n, law): row for (variant, n, law), row in rows.items() if variant == "gc"}
    bgc = {(n, law): row for (variant, n, law), row in rows.items() if variant == "bgc"}
    fits = {(fit["variant"], fit["input"]): fit for fit in document["fits"]}

    def span(variant: str, field: str) -> str:
        values = sorted({f"{fit[field]:.2f}" for (name, _), fit in fits.items() if name == variant})
        return values[0] if len(values) == 1 else f"{values[0]}-{values[-1]}"

    def deviation(value: float, expected: float) -> float:
        return abs(value / expected - 1)

    closed = max(
        deviation(row["relative_error"], row["exact_relative_error"] * row["in_sample_factor"]) for row in rows.values()
    )
    rho = {law: row["exact_relative_error"] / (1 - 1 / n) for (n, law), row in gc.items()}
    proof = max(
        deviation(row["construction_relative_error"], rho[law] * (1 - 1 / n) ** 2) for (n, law), row in bgc.items()
    )
    equal = max(
        deviation(bgc[2 * n, law]["relative_error"], row["relative_error"])
        for (n, law), row in gc.items()
        if (2 * n, law) in bgc
    )
    most = max(fit["max_scaled_error"] for fit in document["fits"])
    lines = [
        f"Figure 1 of the paper, S = {config['samples']}: the slope of log E against log(1 - 1/N) is "
        f"{span('gc', 'slope_mean')} for GC (exactly 1; the paper reads 1), and for BGC {span('bgc', 'slope_mean')} on "
        f"average, {span('bgc', 'slope_regression')} by regression (exactly {span('bgc', 'exact_slope_mean')} and "
        f"{span('bgc', 'exact_slope_regression')}; the paper reads 2): its least error falls as 1 - 2/N",
        f"Figure 2: every scaled error is at most {most * 1e3:.2f}e-3 (the paper: 3.83e-3). All {len(rows)} errors are "
        f"within {closed:.2%} of the closed form with the sample's own factor; those of the proof's weights are within "
        f"{proof:.2%} of rho (1 - 1/N)^2",
        f"At equal parameters on white input BGC(2N) and GC(N) lose the same: they differ by {equal:.2%} at most",
        f"That whole run (two inputs, GC and BGC, five N) takes {minutes(document) * 60:.0f} s",
    ]
    return [(line, name, "bgcbench approx --device cpu") for line in lines]


def variants_claim() -> tuple[str, str, str]:
    """Where each variant stands at equal parameters, on white and on correlated inputs."""
    name = "approx-variants-cpu.json"
    document = results.read(ROOT / "results" / name)
    rows, config = approx_rows(document), document["config"]
    parts = []
    for law in config["inputs"]:
        cells = (("gc", 4), ("shuffle", 4), ("lgc", 4), ("flgc", 4), ("bgc", 8), ("tlgc", 4))
        lost = [f"{VARIANTS[v].label} N={n} {rows[v, n, law]['output_relative_error']:.1%}" for v, n in cells]
        parts.append(f"{law}: {', '.join(lost)}")
    return (
        "Least share of a convolution's output that is lost at a quarter of its parameters (TLGC: a little more; "
        "searches for TLGC, FLGC, LGC). "
        + "; ".join(parts),
        name,
        "bgcbench approx --variants all --device cpu --input " + ",".join(config["inputs"]) + " --groups "
        + ",".join(map(str, config["groups"])),
    )  # fmt: skip


def digits_claim() -> tuple[str, str, str]:
    """A trained network's own activations: copied, white and calibrated weights."""
    name = "approx-wrn_16_4-digits-cpu.json"
    document = results.read(ROOT / "results" / name)
    parts = []
    for variant, groups in (("gc", 4), ("bgc", 4), ("bgc", 8)):
        mine = [r["output_relative_error"] for r in document["results"]
                if (r["params"]["variant"], r["params"]["groups"]) == (variant, groups)]  # fmt: skip
        copied, white, calibrated = (
            statistics.median(errors[kind] for errors in mine) for kind in ("copy", "white", "calibrated")
        )
        parts.append(
            f"{variant.upper()} N={groups} {copied:.0%} copied, {white:.0%} white, {calibrated:.1%} calibrated"
        )
    layers = len({row["params"]["layer"] for row in document["results"]})
    return (
        f"A trained wrn_16_4 on digits, median over its {layers} convolutions of the output energy lost on images held "
        f"out, without any training: {'; '.join(parts)}",
        name,
        "python -m benchmarks.approx_digits",
    )


def solver_claim() -> tuple[str, str, str]:
    """The solver against the conventional way and against a shared factorisation."""
    name = "approx-solver.json"
    document = json.loads((ROOT / "results" / name).read_text())
    return (
        f"Solving through second moments, S = {document['samples']}: {document['ratios']['conventional']:.0f} times as "
        "fast as one least-squares problem a convolution and group, "
        f"{document['ratios']['shared']:.1f} times as fast as one shared factorisation with stacked right-hand sides; "
        f"the errors agree to {document['largest_relative_difference']:.0e}",
        name,
        document["command"],
    )


def train_claims() -> list[tuple[str, str, str]]:
    """wrn_10_2 on digits: the standard convolution, and what each variant loses at the largest N; the quick start."""
    document = results.read(ROOT / "results" / TRAINED)
    config = document["config"]
    seeds = len(config["seeds"])

    def mean(variant: str, groups: int) -> str:
        errors = [row["error_final"] for row in document["results"]
                  if (row["params"]["variant"], row["params"]["groups"]) == (variant, groups)]  # fmt: skip
        return f"{statistics.fmean(errors):.2f} ± {statistics.stdev(errors):.2f} %"

    dense = row_of(document, "standard", 1)["counts"]["params"]
    most = max(config["groups"])
    parts = [
        f"{VARIANTS[name].label} {mean(name, most)} ({row_of(document, name, most)['counts']['params'] / dense:.0%})"
        for name in VARIANTS
        if name != "standard"
    ]
    command = (
        "bgcbench train wrn_10_2 --data digits --variants all --groups 2,4,8 --seeds 0,1,2 --device cpu --threads 1"
    )
    whole = (
        f"Trained from scratch: wrn_10_2 on digits, test error after {config['epochs']} epochs, mean ± standard "
        f"deviation of {seeds} seeds: SC {mean('standard', 1)}; at N={most} (with that share of SC's parameters) "
        + ", ".join(parts)
    )
    name = "train-quickstart-cpu.json"
    quick = results.read(ROOT / "results" / name)
    errors = ", ".join(
        f"{VARIANTS[row['params']['variant']].label} {row['error_final']:.1f} %" for row in quick["results"]
    )
    start = (
        f"Training wrn_10_2 on digits with SC, GC and BGC N=4 takes {minutes(quick):.1f} minutes on 2 cores ({errors}; "
        "one seed)"
    )
    return [
        (whole, TRAINED, command),
        (start, name, "bgcbench train wrn_10_2 --data digits --variants standard,gc,bgc --groups 4"),
    ]


def transfer_cells() -> dict[tuple[str, int, str, bool], list[dict[str, Any]]]:
    """The rows of the conversions on digits by variant, N, initialisation and whether norms were re-estimated."""
    found: dict[tuple[str, int, str, bool], list[dict[str, Any]]] = {}
    for row in results.read(ROOT / "results" / TRANSFERRED)["results"]:
        params = row["params"]
        found.setdefault((params["variant"], params["groups"], params["init"], params["rebn"]), []).append(row)
    return found


def errors_of(rows: list[dict[str, Any]], epoch: int | None = None) -> str:
    """Mean and standard deviation of the error before training or after ``epoch``; "-" where it is not there."""
    values = [
        row["error_initial"] if epoch is None else row["epochs"][epoch - 1]["test_error"]
        for row in rows
        if epoch is None or len(row["epochs"]) >= epoch
    ]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else "-"


def transfer_claim() -> tuple[str, str, str]:
    """What copied and calibrated weights leave of a network before any training."""
    cells = transfer_cells()
    dense = next(rows for at, rows in cells.items() if at[0] == "standard")
    parts = []
    for groups in (4, 8, 16):
        for variant in ("gc", "bgc"):
            copied, calibrated = (
                errors_of(cells[variant, groups, init, init == "calibrated"]) for init in ("copy", "calibrated")
            )
            parts.append(f"{VARIANTS[variant].label} N={groups} {copied} % copied, {calibrated} % calibrated")
    return (
        f"A trained wrn_16_4 on digits (error {errors_of(dense)} %, {len(dense)} trainings), converted without any "
        f"training: {'; '.join(parts)}",
        TRANSFERRED,
        COMMAND_TRANSFER,
    )


def convert_claim() -> tuple[str, str, str]:
    """How long the calibrated conversion of a large network takes."""
    name = "convert-resnet50-cpu.json"
    document = json.loads((ROOT / "results" / name).read_text())
    (row,) = document["results"]
    calibration = row["calibration"]
    held = (calibration["moment_bytes"] + calibration["in_flight_bytes"]) / 2**30
    return (
        f"Calibrated conversion of ResNet-50 ({row['layers']} convolutions, {calibration['images']} images of 224 px) "
        f"takes {row['seconds'] / 60:.1f} minutes on {row['threads']} CPU cores, and holds {held:.1f} GiB meanwhile",
        name,
        document["command"],
    )


def forms_claims() -> list[tuple[str, str, str]]:
    """Whether the form of BGC that is chosen is the right one; what it costs beside a group convolution, where most."""
    name = "bgc-forms-cpu.json"
    document = json.loads((ROOT / "results" / name).read_text())
    found = document["summary"]
    share = found["within_5_percent"] / found["cells"]
    layers = {cell["key"].split("-n")[0] for cell in document["results"]}
    whole = "" if len(layers) == len(document["shapes"]) else f" of {len(document['shapes'])}"
    told = (
        f"BGC's form chosen by measuring is within 5 % of the best of the exact forms in {share:.0%} of "
        f"{found['cells']} cells ({len(layers)}{whole} layers of five networks, N = 2, 4, 8, both layouts, "
        "inference and training, fp32); where a group has at least 32 channels, BGC(N) takes "
        f"{found['ratio_to_gc_of_half']:.2f} times as long as PyTorch's GC(N/2), which does the same multiply-adds "
        f"(geometric mean of {found['wide_cells']})"
    )
    lost = []
    for groups in (4, 8):
        slow = [
            cell
            for cell in document["results"]
            if (cell["kernel"], cell["layout"], cell["phase"], cell["groups"]) == ([1, 1], "nhwc", "fwd", groups)
            and cell["in_channels"] // groups >= WIDE and cell["size"][2:] != [1, 1]
        ]  # fmt: skip
        narrowing = [cell for cell in slow if cell["in_channels"] >= 2 * cell["out_channels"]]
        lost.append(
            f"N={groups} {over_half(slow, 'auto'):.2f} times GC(N/2)'s time (GC(N) itself {over_half(slow, 'gc'):.2f}, "
            f"not half), layers with at least twice as many inputs as outputs {over_half(narrowing, 'auto'):.2f}"
        )
    most = "BGC loses most in channels-last inference with 1x1 kernels: " + "; ".join(lost)
    return [(text, name, document["command"]) for text in (told, most)]


def over_half(cells: list[dict[str, Any]], row: str) -> float:
    """Geometric mean of the time of ``row`` over that of GC(N/2)."""
    times = [cell["median_s"] for cell in cells]
    return statistics.geometric_mean(time[row] / time["gc_half"] for time in times)


def transfer_table() -> str:
    """Errors before training and after 1 and 3 epochs, by variant, N and start."""
    cells = transfer_cells()
    trained = [epoch for epoch in (1, 3) if any(len(row["epochs"]) >= epoch for rows in cells.values() for row in rows)]
    names = ["variant", "N", "weights", "params", "error %, norms as they were", "norms re-estimated", "layer loss"]
    names += [f"after {epoch} epoch{'s' * (epoch > 1)}" for epoch in trained]
    lines = [f"| {' | '.join(names)} |", f"| --- | ---: | --- |{' ---: |' * (len(names) - 3)}"]
    order = {name: place for place, name in enumerate(VARIANTS)}
    for variant, groups, init in sorted(
        {at[:3] for at in cells},
        key=lambda at: (at[1], order[at[0]], ("none", "copy", "white", "calibrated").index(at[2])),
    ):
        plain, rebn = (cells.get((variant, groups, init, way), []) for way in (False, True))
        rows = rebn or plain
        losses = [
            statistics.median(layer["after"] for layer in row["convert"]["calibration"]["layers"])
            for row in rebn
            if init == "calibrated"
        ]
        lines.append(
            f"| {VARIANTS[variant].label} | {groups} | {'untouched' if variant == 'standard' else init} "
            f"| {scaled(rows[0]['counts']['params'])} | {errors_of(plain)} "
            f"| {errors_of(rebn) if variant != 'standard' else '-'} "
            f"| {f'{statistics.fmean(losses):.1%}' if losses else '-'} "
            + "".join(f"| {errors_of(rows, epoch)} " for epoch in trained)
            + "|"
        )
    return "\n".join(lines)


def train_speed_claim() -> tuple[str, str, str]:
    """The input pipeline against torchvision's, and the loop against a bare one."""
    name = "train-speed-cpu.json"
    document = json.loads((ROOT / "results" / name).read_text())
    pipeline, loop = document["pipeline"], document["loop"]
    speed = statistics.median(pipeline["images_per_s"]["bgcbench"])
    return (
        f"The CIFAR pipeline (crop, flip, normalise, batch) delivers {speed:,.0f} images/s, {pipeline['ratio']:.0f} "
        "times torchvision's faster per-image transforms in one process; the training loop adds "
        f"{loop['added_s'] * 1e3:.2f} ms a step to a bare one, images and labels included",
        name,
        document["command"],
    )


def cuda_claims() -> list[tuple[str, str, str]]:
    """What the runs for a CUDA device found, where their files are there."""
    found: list[tuple[str, str, str]] = []
    for run in (*table4_cuda.RUNS, *networks_cuda.RUNS, *train_cuda.RUNS):
        if not (ROOT / "results" / run.file).exists():
            continue
        command = " ".join(["bgcbench", *run.words(device="cuda")])
        condition = ", ".join(str(run.options[name]) for name in ("precision", "layout", "mode") if name in run.options)
        if run in table4_cuda.RUNS:
            found += table4_claims(run.file, command, condition)
        elif run in networks_cuda.RUNS:
            found.append(network_claim(run.options["model"], run.file, command, condition))
        else:
            found.append(training_speed_claim(run.file, command, run.options["model"], run.name.split("-cuda-")[1]))
    return found + kernel_claims()


def training_speed_claim(name: str, command: str, model: str, recipe: str) -> tuple[str, str, str]:
    """Images a second of each variant at N = 4."""
    document = results.read(ROOT / "results" / name)
    speeds = [
        f"{VARIANTS[row['params']['variant']].label} {row['images_per_s']:,.0f} images/s"
        + ("" if row["matmul_fraction"] is None else f" ({row['matmul_fraction']:.0%} of the matrix peak)")
        for row in document["results"]
    ]
    return f"Training {model} on {where(document)}, recipe {recipe}: {', '.join(speeds)}", name, command


def kernel_claims() -> list[tuple[str, str, str]]:
    """Our kernels against the fastest stock form, forward and backward of Table 4's layer, cell by cell."""
    name = "kernels-cuda.json"
    if not (ROOT / "results" / name).exists():
        return []
    document = json.loads((ROOT / "results" / name).read_text())
    found = []
    for cell in document.get("table4", ()):
        best: dict[tuple[str, bool], float] = {}
        for row in cell["rows"]:
            if not is_wrong(row, cell["precision"]):
                kind = row["variant"], row["algorithm"] == "triton"
                best[kind] = min(best.get(kind, math.inf), micros(row, "fwd_bwd"))
        if len(best) < 5:
            continue
        text = (
            f"Our kernels on {where(document)}, Table 4's layer, {cell['precision']}, N={cell['shape']['groups']}, "
            f"forward and backward in a graph: BGC {best['bgc', True]:.0f} us (stock forms {best['bgc', False]:.0f}), "
            f"GC {best['gc', True]:.0f} us (cuDNN {best['gc', False]:.0f}; standard {best['standard', False]:.0f})"
        )
        found.append((text, name, document["command"]))
    return found


def claims() -> list[tuple[str, str, str]]:
    """(claim, file under results/, command) of every row."""
    rows = []
    plain = results.read(ROOT / "results" / "table4-cpu-fp32-nchw.json")
    command = "bgcbench profile --preset table4 --device cpu"
    rows += table4_claims("table4-cpu-fp32-nchw.json", command, "fp32")
    rows.append(
        (
            f"BGC N=2 has the parameters of the standard convolution, loses nothing and is {speed(plain, 'bgc', 2)}",
            "table4-cpu-fp32-nchw.json",
            command,
        )
    )
    rows.append(
        (
            f"At equal parameters, BGC N=4 is {speed(plain, 'bgc', 4, ('gc', 2))}, and BGC N=16 is "
            f"{speed(plain, 'bgc', 16, ('gc', 8))}",
            "table4-cpu-fp32-nchw.json",
            command,
        )
    )
    rows += table4_claims("table4-cpu-fp32-nhwc.json", f"{command} --layout nhwc", "fp32, channels_last")
    rows += table4_claims("table4-cpu-bf16-nchw.json", f"{command} --precision bf16", "bf16")
    name = "table4-cpu-fp32-nchw-algorithms.json"
    document = results.read(ROOT / "results" / name)
    parts = []
    for groups in (2, 4, 8, 16):
        times = {
            row["params"]["algorithm"]: row["phases"]["fwd_bwd"]["summary"]["median_s"]
            for row in document["results"]
            if (row["params"]["variant"], row["params"]["groups"]) == ("bgc", groups)
        }
        order = sorted(times, key=times.__getitem__)
        parts.append(f"N={groups}: " + ", ".join(f"{form} {times[form] * 1e3:.0f} ms" for form in order))
    rows.append(
        (
            "BGC's exact forms, forward and backward, fastest first: " + "; ".join(parts),
            name,
            f"{command} --algorithm all --variants bgc --phases fwd_bwd",
        )
    )
    above = {
        f"{row['params']['variant'].upper()} N={row['params']['groups']}": printed_above(row)
        for row in plain["results"]
    }
    off = ", ".join(f"{name} {difference:g} MiB" for name, difference in above.items() if difference)
    exact = sum(difference == 0 for difference in above.values())
    rows.append(
        (
            f"The paper's memory column is input + weights (+ mean): {exact} of its {len(above)} entries follow to the "
            f"printed digit; printed higher are {off}",
            "table4-cpu-fp32-nchw.json",
            command,
        )
    )
    rows += [
        network_claim(
            model,
            f"network-{model}-cpu-fp32-nchw.json",
            f"bgcbench profile --model {model} --device cpu --batch 4 --groups {groups}",
            "fp32",
        )
        for model, groups in NETWORKS.items()
    ]
    rows += [all_variants_claim(), layers_claim()]
    rows += [*figure_claims(), variants_claim(), digits_claim(), solver_claim()]
    rows += [*train_claims(), train_speed_claim(), transfer_claim(), convert_claim(), *forms_claims()]
    agree = json.loads((ROOT / "results" / "agree-with-torch.json").read_text())
    rows.append(
        (
            f"Our medians and torch.utils.benchmark's agree within {agree['worst']:.1%} on "
            f"{len(agree['rows'])} rows measured alternately",
            "agree-with-torch.json",
            agree["command"],
        )
    )
    twice = json.loads((ROOT / "results" / "same-row-twice.json").read_text())
    widths = [(entry["ci95"][1] - entry["ci95"][0]) / 2 for entry in twice["tries"] if entry["ci95"]]
    rows.append(
        (
            f"One layer entered twice in a run is told apart from itself in {twice['told_apart']} of "
            f"{len(twice['tries'])} tries (median half-width of the ratio's interval {statistics.median(widths):.1%})",
            "same-row-twice.json",
            twice["command"],
        )
    )
    rows.append(
        (
            f"The full default run takes {minutes(plain):.1f} minutes on the same CPU",
            "table4-cpu-fp32-nchw.json",
            command,
        )
    )
    return [*cuda_claims(), *rows]


def table(prefix: str) -> str:
    """The claims as Markdown, links relative to a document for which results/ is ``prefix``."""
    lines = ["| claim | file | command |", "| --- | --- | --- |"]
    lines += [f"| {claim} | [{name}]({prefix}{name}) | `{command}` |" for claim, name, command in claims()]
    return "\n".join(lines)


def trained_table() -> str:
    """The table of the training on digits, and what is told apart in it."""
    found = report.document_report(results.document.read(ROOT / "results" / TRAINED))
    (table,) = found.tables
    return report.as_markdown(report.Report([dataclasses.replace(table, title=[], sections={})])).strip()


def put_into(text: str, prefix: str) -> str:
    """``text`` with its tables between their marks; the README alone has the training's."""
    for name, content in {"claims": table(prefix), "training": trained_table(), "transfer": transfer_table()}.items():
        start, end = (mark.format(name) for mark in MARKS)
        if start not in text:
            continue
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        text = f"{head}{start}\n\n{content}\n\n{end}{tail}"
    return text


DOCUMENTS = {"README.md": "results/", "results/README.md": ""}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(table("results/"))
        return 0
    write()
    return 0


def write() -> None:
    """Put the tables into the documents."""
    for name, prefix in DOCUMENTS.items():
        path = ROOT / name
        path.write_text(put_into(path.read_text(encoding="utf-8"), prefix), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
