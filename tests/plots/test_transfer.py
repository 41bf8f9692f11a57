from __future__ import annotations

import statistics
from typing import Any

import pytest

from bgcbench.theory.paper import TABLE3
from tests.example_transfer import AFTER, BEFORE, LAYERS, LOST, UNTOUCHED, params_of, row_of, stop, transfer_document
from tests.plots.looking import (
    assert_nothing_is_cut_off_or_lies_on_another,
    figure_of,
    found,
    legend,
    shared_figure,
    texts,
)

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'plot'")

from matplotlib.axes import Axes

Json = dict[str, Any]


def labels(axes: Axes) -> set[str]:
    return {str(line.get_label()) for line in axes.get_lines()}


def notes(document: Json, picture: str) -> str:
    return " ".join("\n".join(texts(figure_of(document, picture))).split())


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors_stand_against_parameters_initial_and_final_training() -> None:
    figure = shared_figure(transfer_document, "errors", epochs=3, control=True)
    (axes,) = figure.axes
    for variant in ("gc", "bgc"):
        before, after = found(axes, f"_initial {variant}"), found(axes, f"_final {variant}")
        for line, errors in ((before, {n: BEFORE[variant, n, "calibrated"] for n in (2, 4, 8)}),
                             (after, {n: AFTER[variant, n] for n in (2, 4, 8)})):  # fmt: skip
            assert list(line.get_xdata()) == [params_of(variant, n) for n in (8, 4, 2)]
            assert list(line.get_ydata()) == pytest.approx([statistics.mean(errors[n]) for n in (8, 4, 2)])
        assert (before.get_markerfacecolor(), before.is_dashed()) == ("white", True)
        assert (after.get_markerfacecolor(), after.is_dashed()) == (after.get_color(), False)
    assert list(found(axes, "_initial").get_ydata()) == [UNTOUCHED] * 2
    assert list(found(axes, "_final").get_ydata()) == pytest.approx([statistics.mean(AFTER["standard", 1])] * 2)
    assert legend(figure) == ["GC", "BGC", "before training", "untouched network", "trained as long (control)"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("parameters (millions)", "test error (%)")
    assert axes.get_ylim()[0] < min(AFTER["bgc", 2])
    assert axes.get_ylim()[1] > max(BEFORE["gc", 8, "calibrated"])


def test_without_training_conversions_are_filled() -> None:
    figure = shared_figure(transfer_document, "errors")
    (axes,) = figure.axes
    assert found(axes, "_initial gc").get_markerfacecolor() == found(axes, "_initial gc").get_color()
    assert "_final gc" not in labels(axes)
    assert legend(figure) == ["GC", "BGC", "untouched network"]
    assert any(text.endswith("wrn_16_4 on digits, no training, 3 seeds") for text in texts(figure))


def test_a_panel_a_start_and_below_it_the_same_with_batch_norm_estimated_again() -> None:
    inits = ("copy", "white", "calibrated")
    figure = shared_figure(transfer_document, "errors", inits=inits)
    assert [axes.get_title() for axes in figure.axes] == ["Copied", "White", "Calibrated"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    figure = shared_figure(transfer_document, "errors", inits=inits, rebn=(False, True))
    assert [axes.get_title() for axes in figure.axes] == [
        *("Copied", "White", "Calibrated", "Copied + rebn", "White + rebn", "Calibrated + rebn")
    ]
    assert list(found(figure.axes[0], "_initial gc").get_ydata()) == pytest.approx([LOST] * 3)
    assert list(found(figure.axes[5], "_initial gc").get_ydata()) == pytest.approx([6.0, 1.0, 0.8])


def test_of_more_than_six_starts_the_last_ones_have_panels_and_the_others_are_named() -> None:
    starts = transfer_document(("bgc",), inits=("copy", "white", "calibrated", "scratch"), rebn=(False, True))
    titles = [axes.get_title() for axes in figure_of(starts, "errors").axes]
    assert titles == [
        *("White", "Calibrated", "From scratch", "White + rebn", "Calibrated + rebn", "From scratch + rebn")
    ]
    assert "No room for copy + rebn, copy: see the table." in notes(starts, "errors")


def test_where_a_panel_is_missing_the_one_above_it_has_the_name_of_the_axis() -> None:
    document = transfer_document(inits=("copy", "calibrated"), rebn=(False, True))
    document["results"] = [
        row for row in document["results"] if (row["params"]["init"], row["params"]["rebn"]) != ("copy", True)
    ]
    figure = figure_of(document, "errors")
    copied, calibrated, missing, below = figure.axes
    assert not missing.axison
    assert [axes.get_xlabel() for axes in (copied, calibrated, below)] == [
        *("parameters (millions)", "", "parameters (millions)")
    ]
    assert [axes.get_ylabel() for axes in (copied, calibrated, below)] == ["test error (%)", "", "test error (%)"]
    assert_nothing_is_cut_off_or_lies_on_another(figure)


def test_ranks_are_points_and_panels_of_their_own() -> None:
    document = transfer_document(variants=("gc", "bgc"), groups=(2, 4))
    for row in document["results"]:
        if row["params"]["variant"] == "bgc":
            row["params"] |= {"variant": "lowrank", "groups": 1, "rank": 4 * row["params"]["groups"]}
    assert "From right to left N = 2, 4. From right to left r = 16, 8." in notes(document, "errors")
    lines = [label.get_text() for label in figure_of(document, "layers").axes[0].get_yticklabels()]
    assert lines == ["GC N = 2", "GC N = 4", "LR r = 8", "LR r = 16"]


def test_an_error_of_0_stands_at_half_an_image() -> None:
    document = transfer_document(seeds=(0,), epochs=3)
    assert "half an image" not in notes(document, "errors")
    row_of(document, "bgc", 2)["error_final"] = 0.0
    assert "An error of 0 stands at 0.1 %, half an image." in notes(document, "errors")  # of 500
    (axes,) = figure_of(document, "errors").axes
    assert found(axes, "_final bgc").get_ydata()[-1] == 0.1
    assert axes.get_yscale() == "log"


def test_the_papers_errors_are_crosses() -> None:
    document = transfer_document(epochs=3, seeds=(0,), dataset="imagenet")
    for row in document["results"]:
        row["paper"] = {"error": TABLE3[row["params"]["variant"], row["params"]["groups"]]}
    figure = figure_of(document, "errors")
    crosses = [line for line in figure.axes[0].get_lines() if line.get_label() == "_paper bgc"]
    assert sorted(float(line.get_ydata()[0]) for line in crosses) == sorted(TABLE3["bgc", n] for n in (2, 4, 8))
    assert legend(figure)[-1] == "paper"


def test_conversions_are_drawn_even_if_their_training_did_not_end() -> None:
    document = transfer_document(epochs=3)
    for seed in range(3):
        stop(row_of(document, "gc", 4, seed), "interrupted", "converted, not trained yet")
        stop(row_of(document, "gc", 8, seed), "invalid", "8 does not divide", converted=False)
    (axes,) = figure_of(document, "errors").axes
    assert list(found(axes, "_initial gc").get_xdata()) == [params_of("gc", 4), params_of("gc", 2)]
    assert list(found(axes, "_final gc").get_xdata()) == [params_of("gc", 2)]


# -------------------------------------------------------------------------------------------------------------- layers


def test_layers_lose_with_copied_white_and_calibrated_weights_along_the_network() -> None:
    figure = figure_of(transfer_document(groups=(2, 4)), "layers")
    copied, white, calibrated, _ = figure.axes
    assert [axes.get_title() for axes in (copied, white, calibrated)] == ["copied", "white", "calibrated"]
    assert [text.get_text() for text in copied.get_yticklabels()] == ["GC N = 2", "GC N = 4", "BGC N = 2", "BGC N = 4"]
    assert [text.get_text() for text in copied.get_xticklabels()] == list(LAYERS)

    def line(axes: Axes, number: int) -> list[float]:
        found = axes.images[0].get_array()
        assert found is not None
        return [float(value) for value in found[number]]

    # (1 - 1/4)^2 and 1 - 2/4, less the deeper a layer is; and of that over 10 + 2 depth + seed
    assert line(copied, 3) == pytest.approx([56.25, 56.25 / 2, 56.25 / 3, 56.25 / 4])
    assert line(white, 3) == pytest.approx([50, 25, 50 / 3, 12.5])
    assert line(calibrated, 3)[0] == pytest.approx(statistics.mean(50 / (10 + seed) for seed in range(3)))
    # BGC with two groups loses nothing, which a logarithm has no place for
    assert line(calibrated, 2) == [0.1] * 4
    assert [text.get_text() for text in calibrated.texts[8:12]] == ["0"] * 4


def test_few_images_are_said() -> None:
    document = transfer_document(groups=(4,))
    assert "few images" not in notes(document, "layers")
    row_of(document, "gc", 4, 1)["convert"]["calibration"]["layers"][2]["scarce"] = True
    assert "Some are calibrated on few images for as many weights" in notes(document, "layers")


# ------------------------------------------------------------------------------------------------------------ tradeoff


def test_time_saved_stands_against_accuracy_lost_with_the_front() -> None:
    (axes,) = figure_of(transfer_document(time=True, seeds=(0,)), "tradeoff").axes
    points = {
        label.removeprefix("_"): (round(x, 6), round(y, 6), line.get_fillstyle())
        for line in axes.get_lines()
        if (label := str(line.get_label())).split(" ")[0] in ("_standard", "_gc", "_bgc")
        for x, y in [(float(line.get_xdata()[0]), float(line.get_ydata()[0]))]
    }
    # GC takes 6, 4 and 3 of 10 ms, BGC 11.5, 5.8 and 4.5; errors of seed 0 less 0.6
    assert points == {
        **{"gc 2": (40, 0.2, "none"), "gc 4": (60, 0.4, "full"), "gc 8": (70, 5.4, "full")},
        **{"bgc 2": (-15, 0, "none"), "bgc 4": (42, 0, "full"), "bgc 8": (55, 1, "none")},
        "standard ": (0, 0, "none"),  # BGC N = 4 loses as little, and is faster
    }
    front = found(axes, "_front")
    assert list(front.get_xdata()) == pytest.approx([42, 60, 70])
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        *("time saved (% of the original's)", "error less the original's (percentage points)"),
    )


def test_trained_networks_stand_with_what_they_lose_after_training() -> None:
    figure = figure_of(transfer_document(time=True, epochs=3), "tradeoff")
    for n in (2, 4, 8):
        lost = statistics.mean(AFTER["gc", n]) - UNTOUCHED
        assert list(found(figure.axes[0], f"_gc {n}").get_ydata()) == pytest.approx([lost])
    assert "after training; fwd" in " ".join(texts(figure))


# ---------------------------------------------------------------------------------------------------- whole documents


def test_without_a_name_both_are_drawn_where_there_is_a_calibration() -> None:
    assert len(shared_figure(transfer_document, groups=(2, 4)).axes) == 1 + 4  # three maps and their colours
    assert len(shared_figure(transfer_document, inits=("copy",)).axes) == 1
    assert len(shared_figure(transfer_document, dataset="synthetic", groups=(2, 4)).axes) == 4
