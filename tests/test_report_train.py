"""The table of ``train``, from documents with known errors."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

import pytest

from bgcbench.report.training import recipe_line
from bgcbench.results import document_of
from bgcbench.theory.paper import printed_error
from tests.example_train import MASKED, params_of, row_of, stop, train_document
from tests.reporting import check_width, render, report_of, widths

Json = dict[str, Any]


def shown(document: Json) -> dict[str, list[str]]:
    """The table of all columns by header."""
    return report_of(document).tables[-1].by_title


def cell(document: Json, header: str, variant: str, groups: int) -> str:
    table = shown(document)
    labels = {"standard": "SC", "gc": "GC", "lgc": "LGC", "flgc": "FLGC", "bgc": "BGC"}
    places = list(zip(table["variant"], table["N"], strict=True))
    return table[header][places.index((labels[variant], str(groups)))]


def notes(document: Json) -> list[str]:
    return list(report_of(document).notes or ())


def findings(document: Json) -> list[str]:
    return [line for table in report_of(document).tables for line in table.sections.get("What this shows", ())]


# ------------------------------------------------------------------------------------------------------------ the table


def test_one_row_worked_out_by_hand() -> None:
    document = train_document()
    # GC N=4: 3.4, 3.8, 3.0; mean 3.4, deviations 0, 0.4, -0.4, sd = sqrt(0.32 / 2) = 0.4
    assert cell(document, "error last %", "gc", 4) == "3.40 ± 0.40"
    # less SC's 1.4, 1.2, 1.6: 2.0, 2.6, 1.4; mean 2.0, sd = sqrt(0.72 / 2) = 0.6
    assert cell(document, "to SC", "gc", 4) == "+2.00 ± 0.60"
    assert cell(document, "to SC", "standard", 1) == "0"
    # 20,000 that stay dense and 288,000 / 4
    assert cell(document, "params", "gc", 4) == "92.0 k"
    assert cell(document, "MACs", "gc", 4) == "5.89 M"
    # 1004, 1014 and 1024 images/s
    assert cell(document, "images/s", "gc", 4) == "1014"


def test_the_first_table_has_a_row_for_each_n_and_the_variants_side_by_side() -> None:
    document = train_document()
    table = report_of(document).tables[0]
    assert table.by_title["N"] == ["1", "2", "4", "8"]
    for variant, title in (("gc", "GC"), ("bgc", "BGC")):
        errors = table.by_title[title]
        assert errors[0] == cell(document, "error last %", "standard", 1)
        assert errors[1:] == [cell(document, "error last %", variant, n) for n in (2, 4, 8)]


def test_masked_variants_show_what_they_train_and_what_is_deployed() -> None:
    document = train_document()
    for variant in MASKED:
        assert cell(document, "params", variant, 4) == "92.0 k"
        assert cell(document, "trained params", variant, 4) == "308 k"
    assert cell(document, "trained params", "gc", 4) == "92.0 k"
    plain = train_document(variants=("standard", "gc"))
    assert "trained params" not in shown(plain)


def test_groups_that_are_learnt_unevenly_show_the_mean_of_their_counts() -> None:
    document = train_document(variants=("flgc",), groups=(2,))
    for seed, params in enumerate((100_000, 110_000, 120_000)):
        row_of(document, "flgc", 2, seed)["counts"]["params"] = params
    assert cell(document, "params", "flgc", 2) == "110 k"


def test_seeds_that_are_not_common_are_not_paired() -> None:
    document = train_document(variants=("standard", "gc"), groups=(4,))
    stop(row_of(document, "gc", 4, 0), "error", "the loss is not finite")
    # seeds 1 and 2: 3.8 - 1.2 and 3.0 - 1.6
    assert cell(document, "to SC", "gc", 4) == f"{2.0:+.2f} ± {statistics.stdev([2.6, 1.4]):.2f}"
    stop(row_of(document, "gc", 4, 1), "error", "the loss is not finite")
    # seed 2 alone, less the mean of the standard convolution's
    assert cell(document, "to SC", "gc", 4) == f"{3.0 - 1.4:+.2f}"


def test_without_a_standard_convolution_nothing_is_held_against_it() -> None:
    assert set(shown(train_document(variants=("gc", "bgc")))["to SC"]) == {"-"}
    document = train_document(variants=("standard", "gc"))
    for seed in range(3):
        stop(row_of(document, "standard", 1, seed), "interrupted", "not begun")
    assert set(shown(document)["to SC"][1:]) == {"-"}


def test_the_papers_errors_have_a_column_where_there_are_any() -> None:
    document = train_document(dataset="cifar10")
    assert "paper %" not in shown(document)
    for row in document["results"]:
        printed = printed_error("cifar10", "wrn_28_10", row["params"]["variant"], row["params"]["groups"])
        row["paper"] = None if printed is None else {"error": printed}
    assert cell(document, "paper %", "bgc", 4) == "4.02"
    assert cell(document, "paper %", "lgc", 4) == "-"
    (line,) = [line for line in notes(document) if line.startswith("paper: ")]
    assert "Table 5 of Lee, Park & Lee" in line
    assert "it trained 200 epochs, this run 10" in line
    assert "recipe digits is not its own" in line
    for row in document["results"]:
        row["params"] |= {"recipe": "paper", "epochs": 200}
    (line,) = [line for line in notes(document) if line.startswith("paper: ")]
    assert "epochs" not in line
    assert "recipe" not in line


def test_synthetic_images_have_a_speed_and_no_error() -> None:
    document = train_document(dataset="synthetic")
    assert {"error last %", "error best %", "top-5 %", "to SC"}.isdisjoint(shown(document))
    assert cell(document, "images/s", "bgc", 8) == "1018"
    assert any("synthetic images: the speed is all" in line for line in notes(document))
    assert not findings(document)
    for row in document["results"]:  # not even if the file has some
        row |= {"error_final": 50.0, "error_final_top5": 10.0}
    assert "50.0" not in render(document, "markdown") + render(document, "csv")


# ------------------------------------------------------------------------------------------------------- what it shows


def test_bgc_is_compared_with_gc_of_its_n_and_of_its_size_by_the_n_of_gc() -> None:
    assert [line.partition(" (")[0] for line in findings(train_document())] == [
        *("BGC N=2 versus SC", "BGC N=2 versus GC N=2", "BGC N=4 versus GC N=2", "BGC N=4 versus GC N=4"),
        *("BGC N=8 versus GC N=4", "BGC N=8 versus GC N=8"),
    ]
    assert any("chance does that in about 18 %" in line for line in notes(train_document()))


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        # differences from GC's 3.4, 3.8, 3.0, and twice their standard error
        ((2.4, 2.8, 2.0), "lower by 1.00 ± 0.00 points over 3 seeds: significant"),
        ((2.4, 3.0, 2.8), "lower by 0.67 ± 0.42 points over 3 seeds: significant"),  # 0.48
        ((2.4, 3.2, 3.0), "lower by 0.53 ± 0.50 points over 3 seeds: not significant"),  # 0.58
        ((4.4, 5.0, 3.8), "higher by 1.00 ± 0.20 points over 3 seeds: significant"),
        ((3.2, 3.6, 2.8), "lower by 0.20 ± 0.00 points over 3 seeds: not significant"),  # one image
    ],
)
def test_a_difference_counts_from_two_standard_errors_on(ours: tuple[float, ...], words: str) -> None:
    document = train_document(variants=("gc", "bgc"), groups=(4,))
    for seed, error in enumerate(ours):
        row_of(document, "bgc", 4, seed)["error_final"] = error
    (line,) = findings(document)
    assert line.endswith(words)


@pytest.mark.parametrize(("seeds", "words"), [((0, 1), "2 common seeds are too few to tell"),
                                              ((2,), "1 common seed is too few to tell")])  # fmt: skip
def test_fewer_than_three_seeds_are_too_few(seeds: tuple[int, ...], words: str) -> None:
    document = train_document(variants=("gc", "bgc"), groups=(4,), seeds=seeds)
    assert findings(document)[0].endswith(words)
    assert not any("chance does that" in line for line in notes(document))


def test_networks_that_guess_are_named() -> None:
    document = train_document()
    assert not any("guessing" in line for line in notes(document))
    for row in document["results"]:
        row["params"]["classes"] = 10
        if (row["params"]["variant"], row["params"]["groups"]) == ("gc", 4):
            row["error_final"] = 88.5
    (line,) = [line for line in notes(document) if "guessing" in line]
    assert line.startswith("as good as guessing, which errs on 90 %: GC N=4 (88.50 %); nothing follows")


def test_a_comparison_needs_both_sides() -> None:
    document = train_document(variants=("gc", "bgc"), groups=(4,))
    for seed in range(3):
        stop(row_of(document, "gc", 4, seed), "oom", "out of memory")
    assert findings(document) == []
    document = train_document(variants=("gc", "bgc"), groups=(4,))
    for seed, variant in ((0, "gc"), (1, "gc"), (2, "bgc")):
        stop(row_of(document, variant, 4, seed), "oom", "out of memory")
    assert findings(document)[0].endswith("no common seeds are too few to tell")


# ---------------------------------------------------------------------------------------------------------------- notes


def test_the_recipe_is_told_as_it_ran_and_without_what_is_off() -> None:
    document = train_document(variants=("gc",))
    document["settings"] |= {"flip": True, "pad": 4}
    document["config"] |= {"lr": 0.05, "schedule": "multistep", "milestones": [60, 120]}
    document["config"] |= {"accumulate": 2, "label_smoothing": 0.1, "nesterov": False}

    def recipe() -> str:
        typed = document_of(document, "the example")
        return recipe_line(typed, typed.results)

    assert recipe() == (
        "recipe digits: 10 epochs, batch 64, in 2 parts, SGD at lr 0.05, multistep, at epochs 60, 120, times 0.1, "
        "momentum 0.9, weight decay 0.0005, label smoothing 0.1, crops of images padded by 4, flipped at random"
    )
    document["config"] = {}
    assert recipe() == "recipe digits: 10 epochs, batch 64, crops of images padded by 4, flipped at random"
    assert "wrn_10_2 on digits, 16 x 16 px, 10 classes" in render(document, "markdown")


def test_what_was_learnt_badly_is_told() -> None:
    document = train_document(variants=("flgc", "lgc"), groups=(2, 4))
    assert not any("ended" in line for line in notes(document))
    for seed, dead in ((0, 0.02), (2, 0.04)):
        row_of(document, "flgc", 4, seed)["epochs"][-1]["learnt"] = {"dead_outputs": dead}
    row_of(document, "lgc", 2, 1)["epochs"][-1]["learnt"] = {"kept": 0.75}
    found = notes(document)
    assert "FLGC N=4: 3.0 % of the outputs ended dead, without inputs (2 of 3 seeds)" in found
    assert "LGC N=2: its groups ended with 75 % of the inputs and not 50 % (1 of 3 seeds)" in found
    records = {r["key"]: r for r in report_of(document).records}
    assert records["wrn_10_2-digits-flgc-n4-s0"]["dead_outputs"] == 0.02
    assert records["wrn_10_2-digits-lgc-n2-s1"]["kept"] == 0.75


def test_convolutions_that_n_does_not_divide_are_named() -> None:
    document = train_document(variants=("gc",), groups=(8,))
    for row in document["results"]:
        row["convert"]["kept"].append({"name": "stages.0.0.conv1", "reason": "no matter", "code": "indivisible"})
    assert cell(document, "flags", "gc", 8) == "1 kept dense"
    assert "GC N=8: N does not divide, kept dense: stages.0.0.conv1" in notes(document)
    for row in document["results"]:
        row["params"]["variant"] = row["params"]["variant"].replace("gc", "lowrank")
    assert "LR N=8: N leaves no rank, kept dense: stages.0.0.conv1" in notes(document)


def test_ranks_are_cells_of_their_own_and_in_no_pair() -> None:
    document = train_document(variants=("standard", "gc", "bgc"), groups=(2, 4))
    for row in document["results"]:
        if row["params"]["variant"] == "gc":
            row["params"] |= {"variant": "lowrank", "groups": 1, "rank": 4 * row["params"]["groups"]}
    table = shown(document)
    assert list(zip(table["variant"], table["N"], table["rank"], strict=True)) == [
        ("SC", "1", "-"), ("BGC", "2", "-"), ("BGC", "4", "-"), ("LR", "-", "8"), ("LR", "-", "16"),
    ]  # fmt: skip
    assert not any("LR" in line for line in findings(document))


def test_more_than_one_process_is_in_the_title() -> None:
    document = train_document(variants=("gc",), groups=(2,))
    assert "processes" not in render(document, "markdown")
    document["results"][1]["world_size"] = 2
    assert "fp32, nchw, 2 processes; Some CPU" in render(document, "markdown")


def broken() -> Json:
    """GC N=4 lost seed 1, BGC N=4 has not one seed, and FLGC N=4 was stopped."""
    document = train_document(variants=("standard", "gc", "flgc", "bgc"), groups=(2, 4))
    stop(row_of(document, "gc", 4, 1), "error", "the loss is not finite", 3)
    stop(row_of(document, "flgc", 4, 1), "interrupted", "stopped by the user", 2)
    stop(row_of(document, "flgc", 4, 2), "interrupted", "not begun")
    for seed in range(3):
        stop(row_of(document, "bgc", 4, seed), "invalid", "in_channels=6 is not divisible by groups=4")
    return {**document, "complete": False, "exit_reason": "interrupted", "quality": "quick", "warnings": ["busy"]}


def test_rows_that_did_not_finish_are_flagged_and_named_with_their_reason() -> None:
    document = broken()
    assert cell(document, "seeds", "gc", 4) == "2/3"
    assert cell(document, "flags", "gc", 4) == "error (s1)"
    assert cell(document, "flags", "flgc", 4) == "interrupted (s1, s2)"
    assert cell(document, "flags", "bgc", 4) == "invalid"
    assert cell(document, "error last %", "gc", 4) == f"3.20 ± {statistics.stdev([3.4, 3.0]):.2f}"
    assert cell(document, "error last %", "flgc", 4) == "4.80"
    for header in ("params", "MACs", "error last %", "error best %", "images/s", "to SC"):
        assert cell(document, header, "bgc", 4) == "-"
    found = notes(document)
    # (10 - 3)^3 / 10^3 of the way from 3.8 to chance, 90, times 1.1 for seed 1
    error = 3.8 + (90 - 3.8) * 0.343 * 1.1
    bgc = ", ".join(f"wrn_10_2-digits-bgc-n4-s{seed}" for seed in range(3))
    assert {
        "this run is not complete (interrupted)",
        f"wrn_10_2-digits-gc-n4-s1: error: the loss is not finite; 3 of 10 epochs, the last test error {error:.2f} %",
        "wrn_10_2-digits-flgc-n4-s2: interrupted: not begun",
        f"{bgc}: invalid: in_channels=6 is not divisible by groups=4",
        "a quick look: few epochs or images, no claim; run without --quick",
        "warning: busy",
    } < set(found)
    assert any("the mean is of those that did" in line for line in found)
    assert render(document, "markdown").count("\n- ") == len(findings(document)) + 5  # and so many notes are not shown


def test_seeds_of_a_stopped_run_are_held_against_those_that_were_planned() -> None:
    document = train_document(variants=("standard",))
    document["results"] = document["results"][:1]
    assert cell(document, "seeds", "standard", 1) == "1/3"


# ------------------------------------------------------------------------------------------------------------ rendering


@widths
@pytest.mark.parametrize("make", [train_document, broken])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(make: Any, width: int) -> None:
    check_width(make(), width)


def test_csv_has_a_line_a_training() -> None:
    document = broken()
    rows = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert [row["key"] for row in rows] == [row["key"] for row in document["results"]]
    by_key = {row["key"]: row for row in rows}
    done, lost = by_key["wrn_10_2-digits-gc-n4-s2"], by_key["wrn_10_2-digits-gc-n4-s1"]
    assert (float(done["error_final"]), float(done["error_best"])) == (3.0, 2.8)
    assert float(done["to_standard"]) == 1.4  # 3.0 - 1.6
    assert (int(done["epochs"]), int(done["epochs_done"])) == (10, 10)
    assert int(done["params"]) == params_of("gc", 4)
    assert (lost["status"], lost["epochs_done"], lost["error_final"], lost["to_standard"]) == ("error", "3", "", "")
    assert by_key["wrn_10_2-digits-bgc-n4-s0"]["params"] == ""
    assert int(by_key["wrn_10_2-digits-flgc-n2-s0"]["params_training"]) == 308_000
