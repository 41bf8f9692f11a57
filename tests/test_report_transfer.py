"""The tables of ``transfer``, from documents with known errors."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

import pytest

from bgcbench import results
from bgcbench.theory.paper import TABLE3
from tests.example_transfer import AFTER, BEFORE, LAYERS, UNTOUCHED, params_of, row_of, stop, transfer_document
from tests.reporting import check_width, render, report_of, widths

Json = dict[str, Any]
ALL = {"inits": ("copy", "white", "calibrated"), "rebn": (False, True)}


def shown(document: Json) -> dict[str, list[str]]:
    """The main table by header."""
    return next(table for table in report_of(document).tables if "variant" in table.by_title).by_title


def cell(document: Json, header: str, variant: str, groups: int, init: str = "calibrated") -> str:
    table = shown(document)
    labels = {"standard": "SC", "gc": "GC", "tlgc": "TLGC", "bgc": "BGC"}
    places = list(zip(table["variant"], table["N"], table["init"], strict=True))
    return table[header][places.index((labels[variant], str(groups), "-" if variant == "standard" else init))]


def versus(document: Json) -> list[dict[str, str]]:
    """The table of BGC versus GC, line by line."""
    table = report_of(document).tables[-1].by_title
    return [dict(zip(table, line, strict=True)) for line in zip(*table.values(), strict=True)]


def notes(document: Json) -> list[str]:
    return list(report_of(document).notes or ())


def note(document: Json, begin: str) -> str:
    (found,) = [text for text in notes(document) if text.startswith(begin)]
    return found


def layers_of(document: Json, variant: str, groups: int) -> list[Json]:
    """What the calibrations of all seeds say of the layers of one conversion."""
    rows = [row_of(document, variant, groups, seed) for seed in range(3)]
    return [layer for row in rows for layer in row["convert"]["calibration"]["layers"]]


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_example_is_a_result_file() -> None:
    results.document_of(transfer_document(**ALL, epochs=3, control=True, time=True), "the example")


def test_whether_batch_norm_was_estimated_again_has_a_column_only_where_it_differs() -> None:
    assert "rebn" not in shown(transfer_document(rebn=(False,)))
    table = shown(transfer_document(groups=(2,), rebn=(True, False)))
    assert table["rebn"] == ["-", "no", "no", "yes", "yes"]


def test_one_row_worked_out_by_hand() -> None:
    document = transfer_document(epochs=3, control=True, time=True)
    # before: 1.0, 1.2, 0.8; after: 0.8, 1.0, 0.6
    assert cell(document, "error initial %", "gc", 4) == "1.00 ± 0.20"
    assert cell(document, "error last %", "gc", 4) == "0.80 ± 0.20"
    assert cell(document, "error best %", "gc", 4) == "0.60 ± 0.20"
    # less the untouched network's 0.6; less the control's 0.4, 0.6, 0.4: 0.4, 0.4, 0.2
    assert cell(document, "to SC", "gc", 4) == "+0.20 ± 0.20"
    assert cell(document, "to SC trained", "gc", 4) == "+0.33 ± 0.12"
    # 3/4 of what a layer puts out over 10 + 2 depth + seed: the median of 12 is between those over 13 and over 14
    assert statistics.median(10 + 2 * depth + seed for depth in range(4) for seed in range(3)) == 14
    assert cell(document, "layer loss %", "gc", 4) == "5.4"
    # 10 ms over 4 ms, and 5 % to either side
    assert cell(document, "speed-up fwd", "gc", 4) == "2.50 [2.38, 2.62]"
    assert (cell(document, "params", "gc", 4), cell(document, "MACs", "gc", 4)) == ("92.0 k", "5.89 M")


def test_the_first_tables_have_the_errors_of_each_n_and_start_side_by_side() -> None:
    document = transfer_document(epochs=3, inits=("copy", "calibrated"))
    before, after = report_of(document).tables[:2]
    assert [table.caption for table in (before, after)] == [
        "test error % before any training, by N:", "test error % after the last epoch, by N:"
    ]  # fmt: skip
    lines = list(zip(before.by_title["N"], before.by_title["init"], before.by_title["BGC"], strict=True))
    assert lines[0][:2] == ("1", "-")
    for n, init, error in lines[1:]:
        assert error == cell(document, "error initial %", "bgc", int(n), init)
    for n, init, error in zip(*(after.by_title[name] for name in ("N", "init", "GC")), strict=True):
        assert n == "1" or error == cell(document, "error last %", "gc", int(n), init)
    assert "rebn" not in before.by_title


def test_the_untouched_network_is_one_without_seeds_until_it_is_the_control() -> None:
    document = transfer_document(epochs=3)
    expected = {"error initial %": "0.60", "error last %": "-", "to SC": "0", "seeds": "-"}
    assert {header: cell(document, header, "standard", 1) for header in expected} == expected
    assert "to SC trained" not in shown(document)
    document = transfer_document(epochs=3, control=True)
    last = f"{statistics.mean(AFTER['standard', 1]):.2f} ± {statistics.stdev(AFTER['standard', 1]):.2f}"
    expected = {"error initial %": "0.60", "error last %": last, "to SC trained": "0", "seeds": "3/3"}
    assert {header: cell(document, header, "standard", 1) for header in expected} == expected


def test_bgc_is_compared_with_gc_of_its_n_and_of_its_size() -> None:
    found = versus(transfer_document(epochs=3, control=True))
    assert [(row["BGC"], row["versus"]) for row in found] == [
        *(("BGC N=2", "GC N=2"), ("BGC N=4", "GC N=4"), ("BGC N=8", "GC N=8")),
        *(("BGC N=2", "SC"), ("BGC N=4", "GC N=2"), ("BGC N=8", "GC N=4")),
    ]
    assert [row["params"] for row in found] == ["1.88x", "1.78x", "1.64x", "1.00x", "1.00x", "1.00x"]
    # 1.6, 1.8, 1.4 less 6.0, 6.6, 5.4; and after training 1.2, 1.4, 1.0 less 1.6, 2.0, 1.8
    assert (found[2]["initial points"], found[2]["initial lower"]) == ("-4.40 ± 0.40", "BGC")
    assert (found[2]["last points"], found[2]["last lower"]) == ("-0.60 ± 0.20", "BGC")
    assert (found[5]["initial points"], found[5]["initial lower"]) == ("+0.60 ± 0.00", "GC")
    assert found[0]["initial lower"] == "not significant"


def test_sizes_that_are_not_equal_after_all_are_not_called_so() -> None:
    document = transfer_document(groups=(4, 8))
    for seed in range(3):  # N=8 does not divide some convolutions, which stay dense
        row_of(document, "bgc", 8, seed)["counts"]["params"] += 5_000
    assert [(row["BGC"], row["versus"]) for row in versus(document)] == [("BGC N=4", "GC N=4"), ("BGC N=8", "GC N=8")]


def test_times_are_compared_with_gc_too() -> None:
    found = versus(transfer_document(groups=(2, 4), time=True))
    # 6 over 11.5, 4 over 5.8; 10 over 11.5, 6 over 5.8 ms, each known to 5 %
    assert [row["speed-up fwd"].split()[0] for row in found] == ["0.52", "0.69", "0.87", "1.03"]
    document = transfer_document(groups=(4,), time=True)
    for row in document["results"]:  # measured without the standard convolution
        for measured in row["time"]["phase"].values():
            measured |= {"ratio": None, "ratio_ci95": None}
    assert cell(document, "speed-up fwd", "bgc", 4) == "-"
    assert versus(document)[0]["speed-up fwd"] == "0.69 [0.62, 0.76]"  # (0.95 4) / (1.05 5.8), (1.05 4) / (0.95 5.8)


def test_one_seed_compares_conversions_by_the_test_images_and_trainings_not_at_all() -> None:
    found = versus(transfer_document(seeds=(0,), groups=(4, 8), epochs=3))
    # 1.6 against 6.0 % of 500: they agree with the untouched network on 98.6 and 94.2 %, so they differ on 7.2 % of the
    # images at most, and twice sqrt((0.072 - 0.044^2) / 500) is 2.4 points; of 0.6 and 1.0 % it is 1.0 points.
    assert [row["initial lower"] for row in found[:2]] == ["not significant", "BGC"]
    assert {row["last lower"] for row in found} == {"too few seeds"}


@pytest.mark.parametrize(
    ("theirs", "agrees", "told"),
    [
        # 5.0 % against these of 500 images; twice sqrt((sum - difference^2) / 500) is 3.26 and 3.24 points
        (8.4, None, True),
        (8.2, None, False),
        # 96 and 97 % agreement with the same network: they differ on 7 % at most, which makes it 2.36 points
        (7.4, (96.0, 97.0), True),
        (7.2, (96.0, 97.0), False),
    ],
)
def test_what_chance_in_the_test_images_can_do(theirs: float, agrees: tuple[float, float] | None, told: bool) -> None:
    document = transfer_document(seeds=(0,), groups=(4,))
    for place, (variant, error) in enumerate((("bgc", 5.0), ("gc", theirs))):
        agreement = agrees[place] if agrees else None
        row_of(document, variant, 4).update(error_initial=error, agreement_initial=agreement)
    assert versus(document)[0]["initial lower"] == ("BGC" if told else "not significant")


def test_seeds_that_all_end_alike_tell_no_more_than_one() -> None:
    document = transfer_document(groups=(4,))
    for seed in range(3):
        row_of(document, "bgc", 4, seed)["error_initial"] = 0.6
        row_of(document, "gc", 4, seed)["error_initial"] = 1.2  # three images more, three times over
    assert versus(document)[0]["initial points"] == "-0.60 ± 0.00"
    assert versus(document)[0]["initial lower"] == "not significant"


# ---------------------------------------------------------------------------------------------------------------- notes


def test_notes_say_when_no_training_or_no_control_ran() -> None:
    assert notes(transfer_document(epochs=3))[1].startswith("no control: ")
    calibrated = "calibration: 512 training images without labels, 128 of them held out; 9 batch norms"
    assert note(transfer_document(), "calibration: ").startswith(calibrated)
    assert notes(transfer_document())[0] == "nothing was trained: the errors are those of the conversions"
    for document in (transfer_document(), transfer_document(epochs=3, control=True)):
        assert not any(text.startswith("no control") for text in notes(document))


@pytest.mark.parametrize(("error", "told"), [(81.0, True), (80.0, False)])  # guesses among 10 classes err on 90 %
def test_a_network_that_guesses_is_told_as_such(error: float, told: bool) -> None:
    document = transfer_document()
    for row in document["results"]:
        row["params"]["classes"] = 10
        if row["params"]["variant"] == "standard":
            row["error_initial"] = error
    line = (
        "as good as guessing, which errs on 90 %: the untouched network (81.00 %); nothing follows from such a network"
    )
    assert (line in (report_of(document).notes or ())) is told


def test_layers_with_few_images_and_layers_left_white_are_named_but_not_all() -> None:
    document = transfer_document()
    assert not any(text.startswith(("few images", "white weights")) for text in notes(document))
    for layer in layers_of(document, "bgc", 8):
        layer["scarce"] = layer["name"] in LAYERS[2:]
    for layer in [*layers_of(document, "gc", 4), *layers_of(document, "bgc", 2)]:  # which loses nothing with white
        layer["ridge"] = None
    few = "few images for as many weights (more --calibration-images)"
    assert note(document, few) == f"{few}: BGC N=8 (2 of 4 layers)"
    assert note(document, "white weights").endswith("did no better: GC N=4 (4 of 4 layers)")
    for cell_ in (("gc", 2), ("gc", 4), ("gc", 8), ("bgc", 4), ("bgc", 8)):
        for layer in layers_of(document, *cell_):
            layer["scarce"] = True
    assert note(document, few).endswith("GC N=8 (4 of 4 layers) and 1 more")


def test_the_papers_errors_stand_beside_what_it_did_differently() -> None:
    document = transfer_document(epochs=3, dataset="imagenet")
    assert "paper %" not in shown(document)
    for row in document["results"]:
        row["paper"] = {"error": TABLE3[row["params"]["variant"], row["params"]["groups"]]}
    assert cell(document, "paper %", "bgc", 4) == "25.51"
    assert "BGC N=2 (22.45 %) is below its baseline (23.87 %)" in note(document, "paper: ")


def test_synthetic_images_have_times_and_no_error() -> None:
    document = transfer_document(dataset="synthetic", epochs=3, time=True)
    for row in document["results"]:  # not even if the file has some
        row |= {"error_initial": 87.65, "error_final": 87.65, "agreement_initial": 87.65}
    assert not any("error" in header or header in ("to SC", "agrees %", "layer loss %") for header in shown(document))
    assert "87.65" not in render(document, "markdown") + render(document, "csv")
    assert versus(document)[0]["speed-up fwd"]
    assert note(document, "synthetic images: the speed is all")


def broken() -> Json:
    """Seed 2 was not trained, two trainings of others failed, and GC N=8 does not divide."""
    document = transfer_document(epochs=3, control=True, time=True)
    for row in document["results"]:
        if row["params"]["seed"] == 2:
            stop(row, "interrupted", "converted, not trained yet")
    stop(row_of(document, "bgc", 8, 0), "oom", "out of memory")
    stop(row_of(document, "gc", 4, 1), "error", "the loss is not finite", epochs=2)
    stop(row_of(document, "bgc", 2, 1), "error", "out of memory while converting", converted=False)
    for seed in range(3):
        stop(row_of(document, "gc", 8, seed), "invalid", "8 does not divide 12", converted=False)
    return {**document, "complete": False, "exit_reason": "interrupted", "quality": "quick", "warnings": ["busy"]}


def test_conversions_count_even_if_their_training_did_not_end() -> None:
    document = broken()
    assert cell(document, "error initial %", "gc", 4) == "1.00 ± 0.20"
    assert cell(document, "error last %", "gc", 4) == "0.80"
    assert cell(document, "seeds", "gc", 4) == "1/3"
    assert cell(document, "flags", "gc", 4) == "error (s1), not trained (s2)"
    assert cell(document, "flags", "bgc", 8) == "oom (s0), not trained (s2)"
    assert cell(document, "flags", "gc", 8) == "invalid"
    assert cell(document, "error initial %", "bgc", 2) == "0.60 ± 0.00"  # of two seeds
    assert ("BGC N=8", "GC N=8") not in [(row["BGC"], row["versus"]) for row in versus(document)]
    found = notes(document)
    assert "wrn_16_4-digits-bgc-n8-calibrated-s0: oom: out of memory" in found
    assert any(text.startswith("wrn_16_4-digits-gc-n4-calibrated-s1: error: the loss is not") for text in found)
    (waiting,) = [text for text in found if text.endswith("interrupted: converted, not trained yet")]
    assert " and 2 more: " in waiting


@pytest.mark.parametrize(("lost", "pairs"), [("standard", 5), ("gc", 1), ("bgc", 0)])  # BGC N=2 is held against SC too
def test_a_variant_that_is_not_there_is_not_missed(lost: str, pairs: int) -> None:
    document = transfer_document(epochs=3)
    document["results"] = [row for row in document["results"] if row["params"]["variant"] != lost]
    assert render(document, "markdown")
    assert sum(len(table.rows) for table in report_of(document).tables if "versus" in table.by_title) == pairs


# ------------------------------------------------------------------------------------------------------------ rendering


@widths
@pytest.mark.parametrize("make", [lambda: transfer_document(**ALL, epochs=3, control=True, time=True), broken])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(make: Any, width: int) -> None:
    check_width(make(), width)


def test_csv_has_a_line_a_conversion() -> None:
    document = broken()
    rows = list(csv.DictReader(io.StringIO(render(document, "csv"))))
    assert [row["key"] for row in rows] == [row["key"] for row in document["results"]]
    by_key = {row["key"]: row for row in rows}
    done = by_key["wrn_16_4-digits-gc-n4-calibrated-s0"]
    assert float(done["error_initial"]) == BEFORE["gc", 4, "calibrated"][0]
    assert float(done["error_final"]) == AFTER["gc", 4][0]
    assert float(done["initial_to_untouched"]) == pytest.approx(1.0 - UNTOUCHED)
    assert float(done["final_to_control"]) == pytest.approx(0.8 - 0.4)
    assert (float(done["ridge_min"]), float(done["ridge_max"])) == (0.001, 1.0)
    # 3/4 over 10, 12, 14 and 16
    assert float(done["layer_loss_calibrated"]) == pytest.approx((0.75 / 12 + 0.75 / 14) / 2)
    assert (done["layers_scarce"], done["layers_kept_white"], done["replaced"]) == ("0", "0", "4")
    assert int(done["params"]) == params_of("gc", 4)
    assert float(done["fwd_speed_up"]) == 2.5
    lost = by_key["wrn_16_4-digits-gc-n4-calibrated-s1"]
    assert (lost["status"], lost["epochs_done"]) == ("error", "2")
    assert (lost["error_initial"], lost["error_final"]) == ("1.2", "")
    assert by_key["wrn_16_4-digits-gc-n8-calibrated-s0"]["layer_loss_calibrated"] == ""


@pytest.mark.parametrize("command", ["transfer", "train"])
def test_a_file_of_a_run_that_was_stopped_at_once_can_be_shown(command: str) -> None:
    document = transfer_document()
    document |= {"command": command, "complete": False, "exit_reason": "interrupted", "results": []}
    assert document["config"]["model"] in render(document, "markdown")
    assert render(document, "table", 60)
    assert render(document, "csv", 60) == "\n"
