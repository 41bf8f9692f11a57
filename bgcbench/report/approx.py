"""The tables of an ``approx`` document: sampled convolutions beside the theory, or a network's layers by their loss."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bgcbench.report import Column, Report, label_of, notes, scaled, significant, where_line
from bgcbench.results import Json
from bgcbench.specs import LINEAR
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER
from bgcbench.theory.exact import white_error
from bgcbench.theory.fits import EXACT
from bgcbench.theory.pareto import front, uncertainty_of

TOLERATED = (0.05, 0.10, 0.20)  # shares of a layer's output energy


def approx_report(document: Json) -> Report:
    """The report of sampled convolutions, or with --model of a network's layers."""
    rows = document["results"]
    if "model" in document.get("config", {}) or any(row["params"]["input"] == "activations" for row in rows):
        return _network_report(document, rows)
    return _sampled_report(document, rows)


# ------------------------------------------------------------------------------------------------- sampled convolutions


def _sampled_report(document: Json, rows: Sequence[Json]) -> Report:
    marks = _fronts(rows)
    columns = [
        Column("input", [row["params"]["input"] for row in rows], right=False, lead=True),
        Column("variant", [label_of(row["params"]["variant"]) for row in rows], right=False, lead=True),
        Column("N", [str(row["params"]["groups"]) for row in rows], lead=True),
        Column("params", [_count(row, "params") for row in rows]),
        Column("MACs", [_count(row, "macs") for row in rows]),
        Column("E", [_number(row["error"], 5) for row in rows]),
        Column("Rel.E e-3", [_with_error(row) for row in rows]),
        Column("exact e-3", [_milli(row["exact_relative_error"]) for row in rows]),
        Column("in sample", [_in_sample(row) for row in rows]),
        Column("proof's weights e-3", [_milli(row["construction_relative_error"]) for row in rows]),
        Column("bound e-3", [_milli(row["bound_zero_mean"]) for row in rows]),
        Column("general bound", [_number(row["bound_general"], 3) for row in rows]),
        Column("scaled e-3", [_milli(row["scaled_error"]) for row in rows]),
        Column("lost", [_percent(row["output_relative_error"]) for row in rows]),
        Column("front", [marks.get(row["key"], "") for row in rows], right=False),
        Column("found by", [_method(row) for row in rows], right=False),
    ]
    sections = {
        "Slopes of log E against log(1 - 1/N)": [_slope(found, rows) for found in document.get("fits", ())],
        "What this shows": _findings(rows),
        "Notes": _sampled_notes(document, rows),
    }
    return Report(_sampled_title(document), columns, {k: v for k, v in sections.items() if v}, _sampled_records(rows))


def _count(row: Json, name: str) -> str:
    return "-" if row["counts"] is None else scaled(row["counts"][name])


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < value < 1e-6 else significant(value, digits)


def _milli(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _with_error(row: Json) -> str:
    value, spread = row["relative_error"], row["relative_error_se"]
    if value is None:
        return str(row["status"])
    return _milli(value) if spread is None else f"{value * 1e3:.4f} ± {spread * 1e3:.4f}"


def _in_sample(row: Json) -> str:
    """What was measured over what the closed form and the size of the sample lead to expect."""
    if not row["relative_error"] or not row["exact_relative_error"] or not row["in_sample_factor"]:
        return "-"
    return f"{row['relative_error'] / (row['exact_relative_error'] * row['in_sample_factor']):.4f}"


def _method(row: Json) -> str:
    names = {
        "exact": "itself",
        "schur": "least squares",
        "als": "alternating least squares",
        "partition-search": "search for a partition, least squares",
        "column-search": "inputs by energy, least squares",
    }
    solver = str(row["params"]["solver"])
    return f"{names.get(solver, solver)}, {row['params']['convolutions']}x"


def _fronts(rows: Sequence[Json]) -> dict[str, str]:
    """For each row on a Pareto front of its input, which: error against params, MACs, or both."""
    marks: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["params"]["input"] for row in rows):
        mine = [row for row in rows if row["params"]["input"] == name and row["status"] == "ok"]
        errors, spreads = [row["output_relative_error"] for row in mine], [uncertainty_of(row) for row in mine]
        for what, title in (("params", "params"), ("macs", "MACs")):
            on_front = front([row["counts"][what] for row in mine], errors, spreads)
            for row, chosen in zip(mine, on_front, strict=True):
                if chosen:
                    marks.setdefault(row["key"], []).append(title)
    return {key: ", ".join(titles) for key, titles in marks.items()}


def _slope(found: Json, rows: Sequence[Json]) -> str:
    name = f"{label_of(found['variant'])}, {found['input']}"
    if found["slope_mean"] is None:
        return f"{name}: {found['reason']}"
    line = f"{name}: {found['slope_mean']:.3f} on average, {found['slope_regression']:.3f} by regression"
    if found["exact_slope_mean"] is not None:
        line += f" (closed form {found['exact_slope_mean']:.3f}, {found['exact_slope_regression']:.3f})"
    groups = ", ".join(str(n) for n in found["groups"])
    line += f" over N = {groups}; C of (5.2) {found['c'] * 1e3:.3f}e-3"
    power = SCALING_POWER.get(found["variant"])
    if found["max_scaled_error"] is not None and power is not None:
        of = "(1 - 1/N)" if power == 1 else f"(1 - 1/N)^{power}"
        line += f"; Rel.E / {of} at most {found['max_scaled_error'] * 1e3:.3f}e-3"
    printed = paper.FIGURE_SLOPES.get(found["variant"])
    if printed is not None and found["input"] in ("normal", "uniform") and _is_papers(rows):
        line += f"; the paper reads {printed}, and at most {paper.FIGURE_CEILING * 1e3:.2f}e-3"
    return line


def _is_papers(rows: Sequence[Json]) -> bool:
    shape = {"in_channels": paper.FIGURE_CHANNELS, "out_channels": paper.FIGURE_CHANNELS, "kernel": 3, "dims": 1}
    return all(row["params"].get(name) == value for row in rows for name, value in shape.items())


def _findings(rows: Sequence[Json]) -> list[str]:
    """The theorem's weights against the best ones; BGC at 2N against GC at N."""
    ok = [row for row in rows if row["status"] == "ok"]
    lines = []
    for name in dict.fromkeys(row["params"]["input"] for row in ok):
        by = {(r["params"]["variant"], r["params"]["groups"]): r for r in ok if r["params"]["input"] == name}
        plain = {n: row for (variant, n), row in by.items() if variant == "gc"}
        pairs = [(by["bgc", 2 * n], row) for n, row in plain.items() if ("bgc", 2 * n) in by]
        if pairs:
            ratios = ", ".join(
                f"{b['relative_error'] / g['relative_error']:.4f} (N={b['params']['groups']})"
                for b, g in pairs
                if g["relative_error"] > EXACT
            )
            lines.append(f"{name}: BGC at 2N over GC at N, equal parameters: {ratios}")
        proofs = [row for (variant, n), row in by.items() if variant == "bgc" and row["relative_error"] > EXACT]
        if proofs:
            ratios = ", ".join(
                f"{row['construction_relative_error'] / row['relative_error']:.3f} (N={row['params']['groups']})"
                for row in proofs
            )
            lines.append(f"{name}: the weights in the proof of Theorem 3.6 over the best ones: {ratios}")
        if ("bgc", 2) in by:
            error = by["bgc", 2]["relative_error"]
            lines.append(f"{name}: BGC at N=2 can be every standard convolution; its Rel.E is {error:.1e}")
    return lines


def _sampled_title(document: Json) -> list[str]:
    config = document.get("config", {})
    lines = []
    if config:
        size = " x ".join([str(config["length"])] * config["dims"])
        lines.append(
            f"{config['dims']}-D convolutions, kernel {config['kernel']}, {config['in_channels']} -> "
            f"{config['out_channels']} channels, stride {config['stride']}, inputs of {size}; He initialisation, "
            f"S = {config['samples']} convolutions and inputs"
        )
    return [*lines, f"{document['settings']['precision']}; {where_line(document)}"]


def _sampled_notes(document: Json, rows: Sequence[Json]) -> list[str]:
    lines = [
        "E: least error (5.1), mean over the convolutions; Rel.E: over E||W||^2 E||x||^2 (5.3), ± its standard error "
        "over the convolutions, given the inputs; lost: over E||Wx||^2, the share of the output's energy",
        "exact: closed form for an endless sample, border included. in sample: Rel.E / (exact (1 - p/(SD))); the error "
        "within a sample is low by that factor, p being the numbers that an output fits and SD the positions it sees. "
        "It also carries what the inputs scatter, which all rows of an input share and ± leaves out",
        "proof's weights: error of the construction in the proofs of Theorems 3.5 and 3.6. bound: (K/n)(1 - 1/N)^p, "
        "general bound: K (1 - 1/N)^(p+1), p = 1 for GC and 2 for BGC; scaled: Rel.E / (1 - 1/N)^p",
        "front: no other row of the input has fewer params (MACs) without losing more",
    ]
    if any(row["params"]["solver"] not in ("schur", "exact") for row in rows):
        lines.append("searched rows are no proven minima, and are solved for the number of convolutions given (4x)")
    missing = {f"{name}: {why}" for row in rows for name, why in (row.get("null_reasons") or {}).items()
               if name.startswith("bound") and "no bound" not in why}  # fmt: skip
    lines += sorted(missing)
    lines += [f"{row['key']}: invalid: {row['reason']}" for row in rows if row["status"] == "invalid"]
    return lines + _failed(rows) + notes(document, [])


def _failed(rows: Sequence[Json]) -> list[str]:
    return [f"{row['key']}: {row['status']}: {row['reason']}" for row in rows if row["status"] in ("oom", "error")]


def _sampled_records(rows: Sequence[Json]) -> list[Json]:
    marks = _fronts(rows)
    records = []
    for row in rows:
        numbers = {
            name: value
            for name, value in row.items()
            if name not in ("params", "counts", "null_reasons", "key", "status", "reason")
        }
        head = {"key": row["key"], **row["params"], "status": row["status"], "reason": row["reason"]}
        records.append({**head, **(row["counts"] or {}), **numbers, "front": marks.get(row["key"], "")})
    return records


# ------------------------------------------------------------------------------------------------------- real networks


def _network_report(document: Json, rows: Sequence[Json]) -> Report:
    by_layer: dict[str, list[Json]] = {}
    for row in rows:
        by_layer.setdefault(row["params"]["layer"], []).append(row)
    cells = list(dict.fromkeys((row["params"]["variant"], row["params"]["groups"]) for row in rows))
    order = sorted(by_layer, key=lambda name: -_loss(by_layer[name]))
    columns = [
        Column("layer", order, right=False, lead=True),
        Column("convolution", [_shape(by_layer[name][0]) for name in order], right=False),
        Column("MACs share", [_percent(by_layer[name][0]["macs_share"]) for name in order]),
    ]
    for variant, groups in cells:
        texts = [_cell(by_layer[name], variant, groups) for name in order]
        columns.append(Column(f"{label_of(variant)} N={groups}", texts))
    sections = {"Which layers tolerate what": _tolerant(by_layer, cells)} if rows else {}
    sections["Notes"] = _network_notes(document, rows)
    records = [_network_record(row) for row in rows]
    return Report(
        _network_title(document, rows), columns, sections, records, [_by_weights(rows, order)] if rows else []
    )


def _calibrated(row: Json) -> float | None:
    errors = row["output_relative_error"]
    return None if errors is None else errors["calibrated"]


def _loss(rows: Sequence[Json]) -> float:
    """What a layer loses on average over the variants and N asked for, calibrated."""
    known = [error for row in rows if (error := _calibrated(row)) is not None]
    return sum(known) / len(known) if known else -1.0


def _shape(row: Json) -> str:
    params = row["params"]
    stride = f" /{params['stride']}" if params["stride"] > 1 else ""
    return f"{params['kernel']}x{params['kernel_width']} {params['in_channels']}->{params['out_channels']}{stride}"


def _cell(rows: Sequence[Json], variant: str, groups: int) -> str:
    for row in rows:
        if (row["params"]["variant"], row["params"]["groups"]) == (variant, groups):
            error = _calibrated(row)
            return "-" if error is None else f"{error:.1%}"
    return ""


def _by_weights(rows: Sequence[Json], order: Sequence[str]) -> Report:
    """Copied, white-optimal and calibrated weights side by side, layer by layer."""
    place = {name: number for number, name in enumerate(order)}
    listed = sorted(rows, key=lambda row: place[row["params"]["layer"]])

    def cells(name: str) -> list[str]:
        return [_percent(r["output_relative_error"][name]) if r["output_relative_error"] else "-" for r in listed]

    columns = [
        Column("layer", [row["params"]["layer"] for row in listed], right=False, lead=True),
        Column("variant", [label_of(row["params"]["variant"]) for row in listed], right=False, lead=True),
        Column("N", [str(row["params"]["groups"]) for row in listed], lead=True),
        Column("params", [_count(row, "params") for row in listed]),
        Column("copied", cells("copy")),
        Column("white", cells("white")),
        Column("calibrated", cells("calibrated")),
        Column("ridge", ["-" if row["ridge"] is None else f"{row['ridge']:g}" for row in listed]),
        Column("positions", [f"{row['rows']:,} + {row['held_out_rows']:,}" for row in listed]),
        Column("why not", [row["reason"] or "" for row in listed], right=False),
    ]
    return Report(["Lost output energy by weights"], columns)


def _tolerant(by_layer: dict[str, list[Json]], cells: Sequence[tuple[str, int]]) -> list[str]:
    """For each variant and N: how many layers, with which share of the MACs, lose at most 5, 10, 20 %."""
    lines = []
    for variant, groups in cells:
        known = {}
        for name, rows in by_layer.items():
            for row in rows:
                error = _calibrated(row)
                if (row["params"]["variant"], row["params"]["groups"]) == (variant, groups) and error is not None:
                    known[name] = (error, row["macs_share"] or 0.0)
        if not known:
            continue
        parts = []
        for limit in TOLERATED:
            within = [share for error, share in known.values() if error <= limit]
            parts.append(f"{len(within)} at most {limit:.0%} ({sum(within):.0%} of the MACs)")
        worst = max(known, key=lambda name: known[name][0])
        white = white_error(variant, groups)
        beside = "" if white is None else f"; white input would lose {white:.1%}"
        lines.append(
            f"{label_of(variant)} N={groups}, of {len(known)} layers: {', '.join(parts)}; most is lost in "
            f"{worst} ({known[worst][0]:.1%}){beside}"
        )
    return lines + _at_equal_size(by_layer, cells)


def _at_equal_size(by_layer: dict[str, list[Json]], cells: Sequence[tuple[str, int]]) -> list[str]:
    """BGC at 2N against GC at N, which have as many parameters, layer by layer."""
    lines = []
    for groups in [n for variant, n in cells if variant == "gc" and ("bgc", 2 * n) in cells]:
        ratios = []
        for rows in by_layer.values():
            errors = {(row["params"]["variant"], row["params"]["groups"]): _calibrated(row) for row in rows}
            plain, balanced = errors.get(("gc", groups)), errors.get(("bgc", 2 * groups))
            if plain and balanced is not None:
                ratios.append(balanced / plain)
        if ratios:
            fewer = sum(ratio < 1 for ratio in ratios)
            lines.append(
                f"at equal parameters, BGC N={2 * groups} loses less than GC N={groups} in {fewer} of {len(ratios)} "
                f"layers (calibrated; median {statistics.median(ratios):.2f} of GC's loss)"
            )
    return lines


def _network_title(document: Json, rows: Sequence[Json]) -> list[str]:
    config, network = document.get("config", {}), document.get("network", {})
    lines = []
    if config:
        size = f"{config['height']} x {config['width']}"
        images = next((row["params"]["calibration_images"] for row in rows), config["calibration_images"])
        lines.append(
            f"{config['model']} (weights: {network.get('weights', 'unknown')}) on {images} "
            f"images of {config['data']}, {size} px; convolutions: {config['where']}"
        )
    return [*lines, f"{document['settings']['precision']}; {where_line(document)}"]


def _network_notes(document: Json, rows: Sequence[Json]) -> list[str]:
    network = document.get("network", {})
    lines = [
        "in the table: share of a convolution's output energy that its variant loses on the inputs that the network "
        "gives it, E||Wu - Vu||^2 / E||Wu||^2, with calibrated weights; layers by what they lose on average",
        "copied: as the paper does; white: closed-form optimum for uncorrelated inputs; calibrated: least squares on "
        "the activations, pulled towards white by the ridge that serves best",
        "one image in four is held out and judges; the others are what is solved on. positions: solved on + judged on. "
        "Every layer is asked by itself, the rest of the network being dense",
        "MACs share: of the convolutions in this table",
    ]
    if moments := network.get("moments"):
        lines.append(
            f"second moments took up to {moments['bytes'] / 2**30:.2g} GiB at once, in {moments['passes']} run(s) over "
            "the images"
        )
    if not {row["params"]["variant"] for row in rows} <= {"standard", *LINEAR}:
        lines.append("TLGC, FLGC and LGC are searches, with one fixed ridge")
    return lines + _failed(rows) + notes(document, [])


def _network_record(row: Json) -> Json:
    errors = row["output_relative_error"] or {}
    head = {"key": row["key"], **row["params"], "status": row["status"], "reason": row["reason"]}
    rest = {name: row[name] for name in ("ridge", "rows", "held_out_rows", "macs_share")}
    lost = {f"output_relative_error_{name}": errors.get(name) for name in ("copy", "white", "calibrated")}
    return {**head, **(row["counts"] or {}), **lost, **rest}
