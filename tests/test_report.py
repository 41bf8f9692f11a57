"""The tables of ``profile`` and ``approx``, Table 1 and ``compare``, from documents with known numbers."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from bgcbench import report, results
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.statistics import Interval
from bgcbench.report import format as forms
from bgcbench.results import document_of
from tests.example import example_document
from tests.reporting import check_width, profile_rows, render, report_of, widths
from tests.stored import stored
from tests.test_golden import held
from tests.test_network import network_document


@pytest.mark.parametrize(("name", "form", "width"), [("profile.md", "markdown", 80), ("profile-80.txt", "table", 80),
                                                     ("profile-200.txt", "table", 200)])  # fmt: skip
def test_the_rendered_example_is_the_one_looked_at(name: str, form: str, width: int) -> None:
    held(render(example_document(), form, width), name)


def test_a_document_reads_alike_before_and_after_it_was_a_file(tmp_path: Path) -> None:
    results.ResultWriter(tmp_path / "r.json").write(document_of(example_document(), "the example"))
    for form in ("table", "markdown", "csv"):
        assert render(stored(tmp_path / "r.json"), form) == render(example_document(), form)


@widths
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    check_width(example_document(), width)


@pytest.mark.parametrize(
    ("value", "ends", "words"),
    [
        (2.9, (2.8, 3.0), "2.9x faster than standard (95% CI 2.8-3.0)"),
        (1.67, (1.65, 1.69), "1.67x faster than standard (95% CI 1.65-1.69)"),
        (0.5, (0.4, 0.625), "2.0x slower than standard (95% CI 1.6-2.5)"),
        (1.001, (0.996, 1.006), "as fast as standard: no detectable difference (< 0.60 %)"),
        (1.2, (0.8, 2.0), "not significantly different from standard (95% CI of the speed-up 0.80-2.00)"),
        (3.0, None, "not compared with standard: too few rounds for an interval"),
        (0.5, None, "not compared with standard: too few rounds for an interval"),
    ],
)
def test_a_comparison_in_plain_words(value: float, ends: tuple[float, float] | None, words: str) -> None:
    compared = report.Comparison(value, Interval(*ends) if ends else None, paired=True)
    assert compared.versus("standard") == words
    apart = report.Comparison(value, compared.ci95, paired=False).versus("standard")
    assert apart == (words if ends is None else f"{words[:-1]}, measured apart)")


def test_the_first_table_has_a_row_for_each_n_and_the_variants_side_by_side() -> None:
    table = report_of(example_document()).tables[0]
    assert [column.title for column in table.columns] == [
        "N", "GC ms", "speed-up", "params", "MiB", "BGC ms", "speed-up", "params", "MiB"
    ]  # fmt: skip
    n, gc_ms, gc, gc_params, _, bgc_ms, bgc, bgc_params, _ = table.cells
    assert n == ["1", "2", "3", "4"]
    assert gc_ms[:2] == ["8.018", "4.012"]  # of fwd+bwd; N = 1 is every variant's
    assert (bgc_ms[0], gc[0], bgc[0]) == ("8.018", "1", "1")
    assert (gc[2], bgc[2]) == ("invalid", "invalid")
    assert gc_params[1] == bgc_params[3] == "4.72 M"
    assert [text.endswith("*") for text in gc] == [False, True, False, False]  # versus BGC N=4 of its size
    assert not any(text.endswith("*") for text in bgc)


def test_a_terminal_shows_every_column_only_if_it_is_asked_to() -> None:
    lines = {wide: render(example_document(), "table", 80, wide=wide).splitlines() for wide in (False, True)}
    assert any("roofline" in line for line in lines[True])
    assert not any("roofline" in line for line in lines[False])
    assert "all columns: bgcbench show FILE --wide, or --format csv" in lines[False]
    assert "without MiB, for which there is no room; all columns: --wide" in lines[False]
    assert "without MiB, params, for which there is no room" in render(example_document(), "table", 60)
    assert "roofline" in render(example_document(), "markdown")


def test_each_time_has_a_bar_where_the_terminal_has_room_for_all() -> None:
    wide, narrow = (render(example_document(), "table", width) for width in (110, 90))
    assert "8.018 ████████ " in wide
    assert "4.012 ████ " in wide  # half of it
    assert "1.998 ██ " in wide
    assert not set("█▏▎▍▌▋▊▉") & set(narrow + render(example_document(), "markdown"))
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    report.emit(report_of(example_document()), "table", Console(file=out, width=110, no_color=True))  # no such letters
    out.flush()


def test_of_many_variants_each_speed_up_says_whose_it_is_where_times_have_no_room() -> None:
    document = example_document()
    document["results"] += [
        row | {"key": f"shuffle-{row['key']}", "params": row["params"] | {"variant": "shuffle"}}
        for row in document["results"]
        if row["params"]["variant"] == "gc"
    ]
    text = render(document, "table", 80)
    assert re.search(r"^N +GC speed-up +BGC speed-up +Shuffle speed-up$", text, re.MULTILINE)
    assert "without MiB, params, GC ms, " in text


def test_the_answer_can_stand_before_the_tables() -> None:
    document = network_document(layers=True)
    out = {first: io.StringIO() for first in (False, True)}
    for first, file in out.items():
        console = Console(file=file, width=100, no_color=True, highlight=False)
        report.emit(report_of(document), "table", console, answer_first=first)
    tables_first, answer_first = (out[first].getvalue() for first in (False, True))
    assert set(tables_first.splitlines()) == set(answer_first.splitlines())
    order = ["wrn_10_1", "Best", "Verdict (fwd)", "Where the time goes (fwd)", "Notes", "fwd, by N:", "convolution "]
    places = [answer_first.index(f"\n{what}" if number else what) for number, what in enumerate(order)]
    assert places == sorted(places)
    assert tables_first.index("fwd, by N:") < tables_first.index("Best")


def test_the_layers_have_the_names_of_their_modules() -> None:
    document = network_document(layers=True)
    names = "stages.0.0.conv1, stages.0.0.conv2"
    assert f"| 16 -> 16 3x3 at 16x16 | 2 | {names} |" in render(document, "markdown")
    assert "stages.0.0.conv1 and 1 more " in render(document, "table", 200)
    lines = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert {line["modules"] for line in lines if "layer1-" in line["key"]} == {names}
    assert "modules" not in render(example_document(), "csv").partition("\n")[0]


def test_layers_are_one_table_on_a_narrow_terminal_with_a_line_on_what_is_left_out() -> None:
    text = render(network_document(layers=True), "table", 80)
    heads = [line for line in text.splitlines() if line.startswith("convolution ")]
    assert [head.split() for head in heads] == [
        ["convolution", "times", "fastest", "fwd", "share", "fwd+bwd", "fastest", "fwd+bwd"]
    ]
    assert "without flags, modules, fwd ms, fwd+bwd ms, share fwd, for which there is no room; all columns" in " ".join(
        text.split()
    )


def test_a_speed_up_is_the_others_time_over_the_rows_paired_within_one_run() -> None:
    standard, gc, _, invalid = profile_rows(example_document())[:4]  # 8 and 4 ms
    compared = report.speed_up(gc, standard, "fwd_bwd")
    assert compared.value == pytest.approx(2, rel=0.01)
    assert (compared.paired, compared.is_significant, compared.faster) == (True, True, True)
    assert not report.speed_up(standard, gc, "fwd_bwd").faster
    assert not report.speed_up(msgspec.structs.replace(gc, interleaved=2), standard, "fwd").paired
    assert report.speed_up(invalid, standard, "fwd") is None


def test_rows_that_failed_stay_in_the_table_with_their_reason() -> None:
    document = example_document()
    document["results"][1] |= {"status": "oom", "reason": "out of memory: 7 bytes asked for", "phases": {}}
    text = render(document, "markdown")
    assert "GC N=2: oom: out of memory: 7 bytes asked for" in text
    assert re.search(r"\| GC \| 2 \|.*\| oom \|", text)


def test_a_file_without_any_measured_row_is_still_a_table() -> None:
    document = example_document()
    document["exit_reason"] = "interrupted"
    for row in document["results"]:
        row.update(phases={}, status="interrupted", reason="not measured yet")
    text = render(document, "markdown")
    assert "this run is not complete (interrupted)" in text
    assert "interrupted" in text


def test_csv_has_a_line_a_row_and_phase_in_si_units() -> None:
    lines = list(csv.DictReader(io.StringIO(render(example_document(), "csv"))))
    document = example_document()
    assert len(lines) == 5 * 2 + 2
    first = document["results"][0]
    assert float(lines[0]["median_s"]) == first["phases"]["fwd"]["summary"]["median_s"]
    assert (lines[0]["key"], lines[0]["phase"]) == (first["key"], "fwd")
    assert float(lines[1]["speed_up"]) == 1.0
    invalid = [line for line in lines if line["status"] == "invalid"]
    assert len(invalid) == 2
    assert invalid[0]["median_s"] == ""


def test_two_ranks_of_one_n_are_two_rows_with_a_column_that_others_have_not() -> None:
    document = example_document()
    assert "rank" not in render(document, "csv").partition("\n")[0].split(",")
    assert "| rank |" not in render(document, "markdown")
    for row, rank in zip(document["results"][1:3], (7, 8), strict=True):
        row["params"] |= {"variant": "lowrank", "groups": 4, "rank": rank, "algorithm": "two_conv"}
    text = render(document, "markdown")
    assert "| LR | 4 | 7 |" in text
    assert "- LR r=8 is " in text
    lines = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert [line["rank"] for line in lines[:6]] == ["", "", "7", "7", "8", "8"]


def test_flags_tell_what_to_know_before_a_number_is_used() -> None:
    row = example_document()["results"][0]

    def flags() -> list[str]:
        return report.flags(msgspec.convert(row, results.rows.ProfileRow), ["fwd", "fwd_bwd"])

    assert flags() == []
    row["phases"]["fwd"]["converged"] = False
    assert flags() == ["fwd n=40"]
    row["phases"]["fwd_bwd"]["converged"] = False
    assert flags() == ["n=40"]
    row["phases"]["fwd"]["derived"]["launch_bound"] = True
    summary = row["phases"]["fwd"]["summary"]
    for spread, word in ((0.05, "uneven"), (0.2, "noisy")):
        summary["q3_s"] = summary["q1_s"] + spread * summary["median_s"]
        assert f"fwd {word}" in flags()
    assert "fwd launch-bound" in flags()


def test_too_few_rounds_give_no_verdict_and_no_best() -> None:
    document = example_document()
    for row in document["results"]:
        row["params"] |= {"model": "net"}
        for phase in row["phases"].values():
            phase["rounds"] = [1] * len(phase["rounds"])
    text = render(document, "markdown")
    assert "GC N=2 is not compared with the dense network: too few rounds for an interval; it has half the para" in text
    assert "fwd: not known yet, from too few rounds for an interval" in text
    assert not re.search(r"(faster|slower) than|x the time", text)
    assert re.search(r"\| GC \| 2 \|.*\| [12]\.\d\d \[\?\] \|", text)
    change = compared(document, document, 0.0)[0].tables[0].by_title["verdict"]
    assert set(change) == {"not known: too few rounds for an interval"}


def test_a_time_that_cannot_be_is_flagged_and_gets_no_verdict() -> None:
    document = example_document()
    assert "doubtful" not in render(document, "markdown")
    reference, gc = document["results"][:2]
    for phase in gc["phases"].values():  # half the work in a hundredth of the time
        phase["samples_s"] = [sample / 50 for sample in phase["samples_s"]]
        phase["summary"]["median_s"] /= 50
    text = render(document, "markdown")
    assert "GC N=2 is doubtful (40 samples): measure again, on a quiet machine" in text
    assert re.search(r"\| GC \| 2 \|.*doubtful", text)
    assert "GC N=2, " not in text  # is no best
    gc["phases"]["fwd_bwd"]["derived"]["roofline_fraction"] = 4.01
    assert report_of(document).tables[-1].by_title["roofline"][1] == "doubtful"
    reference["phases"]["fwd"]["summary"]["median_s"] = 0.02
    reference["phases"]["fwd"]["derived"]["roofline_fraction"] = 0.004
    assert re.search(r"\| SC \| 1 \|.*fwd doubtful", render(document, "markdown"))


def test_rows_that_shared_the_processor_are_flagged() -> None:
    document = example_document()
    for row, cores in zip(document["results"][:2], (0.2, 0.4), strict=True):
        for phase in row["phases"].values():
            phase["derived"]["contended_cores"] = cores
    text = render(document, "markdown")
    assert not re.search(r"\| SC \| 1 \|.*busy CPU", text)
    assert re.search(r"\| GC \| 2 \|.*busy CPU", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(9437184, "9.44 M"), (589824, "590 k"), (1.37e11, "137 G"), (999, "999"), (0.5, "0.500"), (2.5e12, "2.50 T")],
)
def test_counts_with_three_digits(value: float, text: str) -> None:
    assert forms.scaled(value) == text


@pytest.mark.parametrize(("seconds", "unit"), [([0.002, 3.0], "s"), ([2e-3], "ms"), ([2e-4], "us"), ([], "s")])
def test_the_unit_is_the_one_the_largest_time_reads_best_in(seconds: list[float], unit: str) -> None:
    assert forms.time_unit(seconds)[1] == unit


def test_table_1_has_every_variant_at_every_n() -> None:
    table = report.table1_report(8, 12, 3, (7, 7), (4, 2))
    assert [(r["variant"], r["groups"]) for r in table.records] == [
        ("standard", 1),
        *((name, n) for n in (2, 4) for name in ("gc", "shuffle", "lgc", "flgc", "tlgc", "bgc", "lowrank")),
    ]
    with pytest.raises(ShapeError, match="groups=5"):
        report.table1_report(8, 12, 3, (7, 7), (5,))


def compared(before: dict[str, Any], after: dict[str, Any], limit: float | None) -> tuple[report.Report, bool]:
    documents = [document_of(document, "the example") for document in (before, after)]
    return report.compare_report(documents[0], documents[1], ("a.json", "b.json"), limit)


def slower(document: dict[str, Any], factor: float) -> dict[str, Any]:
    for row in document["results"]:
        for phase in row["phases"].values():
            phase["samples_s"] = [factor * sample for sample in phase["samples_s"]]
            phase["summary"]["median_s"] *= factor
    return document


@pytest.mark.parametrize(("factor", "limit", "tripped"), [(1.0, 0.03, False), (1.1, 0.03, True), (1.1, 0.2, False),
                                                          (0.8, 0.0, False), (1.1, None, False)])  # fmt: skip
def test_compare_trips_only_for_a_slowdown_beyond_doubt(factor: float, limit: float | None, tripped: bool) -> None:
    before, after = example_document(), slower(example_document(), factor)
    table, found = compared(before, after, limit)
    assert found is tripped
    assert len(table.records) == 10
    assert all(record["ratio"] == pytest.approx(factor) for record in table.records)


def test_compare_says_what_is_in_one_file_only_and_that_machines_differ() -> None:
    before, after = example_document(), example_document()
    gone = after["results"].pop(1)
    after["environment"]["fingerprint"] = "1" * 64
    table, _ = compared(before, after, None)
    sections = table.tables[0].sections
    assert f"fwd+bwd of {gone['key']}: not in the file" in sections["Measured before and no longer"]
    assert any("different machines" in note for note in sections["Notes"])


def test_compare_names_what_differs_between_the_machines_and_how_busy_they_were() -> None:
    before, after = example_document(), example_document()
    after["environment"] |= {"fingerprint": "1" * 64, "torch": "9.9"}
    after["environment"]["cpu"]["threads"] = 7
    for phase in after["results"][0]["phases"].values():
        phase["derived"]["contended_cores"] = 1.0
    notes = compared(before, after, None)[0].tables[0].sections["Notes"]
    assert "cpu threads was 2 and is 7; torch was 2.15.0 and is 9.9" in notes[1]
    assert "warning: other processes kept the CPU busy in 0 rows before and 1 after" in notes


def test_compare_pairs_rows_by_all_but_the_setting_that_differs() -> None:
    before, after = example_document(), slower(example_document(), 2.0)
    after["settings"]["layout"] = "nhwc"
    for row in after["results"]:
        row["key"] = row["key"].replace("nchw", "nhwc")
        row["params"]["layout"] = "nhwc"
    assert not {row["key"] for row in before["results"]} & {row["key"] for row in after["results"]}
    table, _ = compared(before, after, None)
    assert len(table.records) == 10
    assert all(record["ratio"] == pytest.approx(2.0) for record in table.records)
    assert any("layout was" in note for note in table.tables[0].sections["Notes"])


def test_compare_trips_on_a_row_that_is_no_longer_measured() -> None:
    before, after = example_document(), example_document()
    after["results"][1] |= {"status": "oom", "reason": "out of memory", "phases": {}}
    table, tripped = compared(before, after, 0.5)
    assert tripped
    assert all(line.endswith(": oom") for line in table.tables[0].sections["Measured before and no longer"])
    assert not compared(before, after, None)[1]
    after["results"] = []
    with pytest.raises(UsageError, match="no measured row in common"):
        compared(before, after, None)


class TestApprox:
    """A network's layers; every number is made up."""

    def document(self) -> dict[str, Any]:
        errors = {  # layer: {(variant, N): calibrated}
            "a": {("gc", 4): 0.04, ("bgc", 4): 0.01, ("bgc", 8): 0.03},
            "b": {("gc", 4): 0.30, ("bgc", 4): 0.06, ("bgc", 8): 0.33},
            "c": {("gc", 4): 0.10, ("bgc", 4): 0.05, ("bgc", 8): 0.08},
        }
        shares = {"a": 0.5, "b": 0.2, "c": 0.3}
        rows = [
            {
                "key": f"{layer}-{variant}-{groups}",
                "params": {"model": "net", "weights": "none", "layer": layer, "variant": variant, "groups": groups,
                           "kernel": 3, "kernel_width": 3, "stride": 2 if layer == "b" else 1, "in_channels": 16,
                           "out_channels": 32, "input": "activations", "data": "photos", "calibration_images": 8},
                "status": "ok", "reason": None, "counts": {"params": 1152, "macs": 73728},
                "output_relative_error": {"copy": 0.9, "white": 0.8, "calibrated": error},
                "ridge": 0.01, "rows": 384, "held_out_rows": 128, "macs_share": shares[layer],
            }
            for layer, cells in errors.items()
            for (variant, groups), error in cells.items()
        ]  # fmt: skip
        base = example_document()
        return {**base, "command": "approx", "config": {}, "results": rows, "warnings": []}

    def test_layers_stand_by_what_they_lose_on_average_and_by_what_they_tolerate(self) -> None:
        shown, weights = report_of(self.document()).tables
        assert shown.by_title["layer"] == ["b", "c", "a"]
        assert shown.by_title["BGC N=8"] == ["33.0%", "8.0%", "3.0%"]
        lines = shown.sections["Which layers tolerate what"]
        assert lines[0] == (
            "GC N=4, of 3 layers: 1 at most 5% (50% of the MACs), 2 at most 10% (80% of the MACs), 2 at most 20% (80% "
            "of the MACs); most is lost in b (30.0%); white input would lose 75.0%"
        )
        # BGC N=8 over GC N=4: 0.75, 1.1 and 0.8
        assert lines[3].startswith("at equal parameters, BGC N=8 loses less than GC N=4 in 2 of 3 layers (calibrated; ")
        assert "median 0.80 of GC's" in lines[3]
        shares = [weights.by_title[name][0] for name in ("copied", "white", "calibrated")]
        assert shares == ["90.00%", "80.00%", "30.00%"]

    def test_a_row_that_failed_has_no_numbers_and_its_reason(self) -> None:
        document = self.document()
        document["results"][0] |= {
            "status": "error",
            "reason": "singular",
            "output_relative_error": None,
            "ridge": None,
        }
        shown = report_of(document)
        table = shown.tables[0].by_title
        assert table["GC N=4"][table["layer"].index("a")] == "-"
        assert shown.notes == ["a-gc-4: error: singular"]
        assert report.as_csv(shown).splitlines()[1].startswith("a-gc-4,gc,4,net,none,a,3,3")
