from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from bgcbench.errors import UsageError
from bgcbench.theory.paper import TABLE5
from tests.example_train import FINAL, papers, params_of, row_of, stop, train_document
from tests.plots.looking import all_found, figure_of, legend, lines, shared_figure, texts

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'plot'")

from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Json = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- errors


def test_means_stand_against_n_and_against_parameters() -> None:
    figure = shared_figure(train_document, "errors")
    by_groups, by_params = figure.axes
    for variant in ("gc", "shuffle", "lgc", "flgc", "tlgc", "bgc"):
        expected = [statistics.mean(FINAL[variant, n]) for n in (2, 4, 8)]
        left, right = all_found(by_groups, f"_mean {variant}"), all_found(by_params, f"_mean {variant}")
        assert list(left[0].get_ydata()) == pytest.approx(expected)
        # beside one another, and nearer to their own N than to the next
        assert [round(math.log2(x)) for x in left[0].get_xdata()] == [1, 2, 3]
        assert list(right[0].get_xdata()) == [params_of(variant, n) for n in (8, 4, 2)]
        assert list(right[0].get_ydata()) == pytest.approx(expected[::-1])
    assert legend(figure) == ["SC", "GC", "Shuffle", "LGC", "FLGC", "TLGC", "BGC"]
    assert [label.get_text() for label in by_groups.get_xticklabels()] == ["1", "2", "4", "8"]
    assert list(by_groups.get_xticks()) == [1, 2, 4, 8]
    assert by_groups.get_xscale() == by_params.get_xscale() == "log"
    assert (by_groups.get_xlabel(), by_params.get_xlabel()) == ("N", "parameters (millions)")
    assert by_groups.get_ylabel() == "test error (%)"


def test_bgc_at_2n_stands_above_gc_at_n_in_the_panel_of_parameters() -> None:
    right = shared_figure(train_document, "errors", variants=("gc", "bgc")).axes[1]
    gc, bgc = all_found(right, "_mean gc")[0], all_found(right, "_mean bgc")[0]
    assert list(gc.get_xdata())[1:] == list(bgc.get_xdata())[:2]


def test_the_standard_convolution_is_a_line_with_a_band() -> None:
    for axes in shared_figure(train_document, "errors").axes:
        assert list(all_found(axes, "_standard")[0].get_ydata()) == pytest.approx([1.4, 1.4])
        (band,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        low, high = sorted((band.get_y(), band.get_y() + band.get_height()))
        # 1.4, 1.2 and 1.6 have the standard deviation sqrt(0.08 / 2)
        assert (low, high) == pytest.approx((1.2, 1.6))


def test_bars_are_standard_deviations_and_dots_are_the_seeds() -> None:
    axes = shared_figure(train_document, "errors", variants=("standard", "gc"), groups=(4,)).axes[0]
    bars = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    assert len(bars) == 2
    ends = sorted(float(y) for _, y in bars[1].lines[2][0].get_segments()[0])
    assert ends == pytest.approx([3.4 - 0.4, 3.4 + 0.4])  # of 3.4, 3.8, 3.0
    assert list(all_found(axes, "_seeds gc")[0].get_ydata()) == [3.4, 3.8, 3.0]
    low, high = axes.get_ylim()
    assert low < 1.2
    assert high > 3.8


def test_one_seed_has_neither_bars_nor_dots_nor_a_band() -> None:
    figure = shared_figure(train_document, "errors", seeds=(0,))
    for axes in figure.axes:
        assert not axes.containers
        assert not axes.patches
        assert not any(str(line.get_label()).startswith("_seeds") for line in axes.get_lines())
    assert "1 seed" in figure_title(figure)
    assert not any("standard deviation" in text for text in texts(figure))


def test_the_papers_errors_are_hollow() -> None:
    figure = figure_of(papers(train_document(dataset="cifar10")), "errors")
    for axes in figure.axes:
        for variant in ("standard", "gc", "bgc"):
            drawn = all_found(axes, f"_paper {variant}")
            expected = [TABLE5["wrn_28_10", variant, n] for n in ((1,) if variant == "standard" else (2, 4, 8))]
            assert sorted(float(line.get_ydata()[0]) for line in drawn) == sorted(expected)
            assert all(line.get_markerfacecolor() == "none" for line in drawn)
            assert {line.get_marker() for line in drawn} == {all_found(axes, f"_mean {variant}")[0].get_marker()}
        assert not all_found(axes, "_paper lgc")
    assert legend(figure)[-1] == "paper"
    assert "paper" not in legend(shared_figure(train_document, "errors"))


def test_rows_that_did_not_finish_are_left_out_and_named() -> None:
    document = train_document(variants=("standard", "gc", "bgc"))
    stop(row_of(document, "gc", 4, 1), "error", "the loss is not finite", 3)
    for seed in range(3):
        stop(row_of(document, "bgc", 8, seed), "invalid", "8 does not divide")
    figure = figure_of(document, "errors")
    axes = figure.axes[0]
    assert list(all_found(axes, "_mean gc")[0].get_ydata()) == pytest.approx([2.0, 3.2, 6.4])
    assert list(all_found(axes, "_mean bgc")[0].get_ydata()) == pytest.approx([1.4, 1.8])
    assert "Not all finished: GC N = 4 (2 of 3 seeds), BGC N = 8 (0 of 3 seeds)." in "\n".join(texts(figure))


@pytest.mark.parametrize(("least", "scale"), [(0.0, "linear"), (0.5, "log"), (1.2, "linear")])
def test_the_axis_of_errors_is_logarithmic_from_a_factor_of_ten(least: float, scale: str) -> None:
    document = train_document(variants=("standard", "flgc"), seeds=(0,))  # at most 9.0
    row_of(document, "standard", 1)["error_final"] = least
    axes = figure_of(document, "errors").axes[0]
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[0] >= 0
    assert axes.get_ylim()[1] > 9.0


def test_rows_without_counts_have_no_place_among_the_parameters() -> None:
    document = train_document(variants=("standard", "gc"))
    for seed in range(3):
        row_of(document, "gc", 8, seed)["counts"] = None
    by_groups, by_params = figure_of(document, "errors").axes
    assert len(all_found(by_groups, "_mean gc")[0].get_xdata()) == 3
    assert list(all_found(by_params, "_mean gc")[0].get_xdata()) == [params_of("gc", 4), params_of("gc", 2)]


# -------------------------------------------------------------------------------------------------------------- curves


def test_curves_are_means_over_the_seeds_with_a_band_and_a_panel_an_n() -> None:
    document = train_document()
    figure = figure_of(document, "curves")
    assert [axes.get_title() for axes in figure.axes] == ["N = 2", "N = 4", "N = 8"]
    for n, axes in zip((2, 4, 8), figure.axes, strict=True):
        assert len(axes.get_lines()) >= 7
        for variant in ("standard", "gc", "flgc", "bgc"):
            rows = [row_of(document, variant, 1 if variant == "standard" else n, seed) for seed in range(3)]
            each = [[epoch["test_error"] for epoch in row["epochs"]] for row in rows]
            (line,) = all_found(axes, f"_curve {variant}")
            assert list(line.get_xdata()) == list(range(1, 11))
            assert list(line.get_ydata()) == pytest.approx([statistics.mean(at) for at in zip(*each, strict=True)])
        bands = [band for band in axes.collections if isinstance(band, FillBetweenPolyCollection)]
        assert len(bands) == 7
        y = bands[0].get_paths()[0].vertices[:, 1]
        standard = [[epoch["test_error"] for epoch in row_of(document, "standard", 1, s)["epochs"]] for s in range(3)]
        assert (min(y), max(y)) == (min(map(min, standard)), max(map(max, standard)))
    assert legend(figure) == ["SC", "GC", "Shuffle", "LGC", "FLGC", "TLGC", "BGC"]
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "test error (%)"
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}


def test_an_error_of_0_makes_the_axis_linear() -> None:
    document = train_document(variants=("standard", "gc"))
    row_of(document, "gc", 2, 1)["epochs"][-1]["test_error"] = 0.0
    axes = figure_of(document, "curves").axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0


def test_a_curve_ends_with_the_shortest_seed_only_where_none_has_finished() -> None:
    document = train_document(variants=("standard", "gc", "bgc"), groups=(4,))
    stop(row_of(document, "gc", 4, 1), "interrupted", "stopped", 3)
    for seed, epochs in enumerate((6, 4, 0)):
        stop(row_of(document, "bgc", 4, seed), "interrupted", "stopped", epochs)
    axes = figure_of(document, "curves").axes[0]
    assert list(all_found(axes, "_curve gc")[0].get_xdata()) == list(range(1, 11))
    assert list(all_found(axes, "_curve bgc")[0].get_xdata()) == [1, 2, 3, 4]
    rows = [row_of(document, "bgc", 4, seed)["epochs"][3]["test_error"] for seed in (0, 1)]
    assert all_found(axes, "_curve bgc")[0].get_ydata()[-1] == pytest.approx(statistics.mean(rows))


def test_a_run_of_which_nothing_finished_still_has_its_curves() -> None:
    document = train_document(variants=("gc",), groups=(2,), seeds=(0,))
    stop(document["results"][0], "interrupted", "stopped", 3)
    assert len(figure_of(document).axes) == 1
    with pytest.raises(UsageError, match="nothing to draw: errors needs finished trainings"):
        figure_of(document, "errors")


@pytest.mark.parametrize(("variants", "groups"), [(("gc",), (2, 4)), (("standard",), (2,))])
def test_curves_need_neither_the_standard_convolution_nor_another(variants: Any, groups: Any) -> None:
    figure = shared_figure(train_document, "curves", variants=variants, groups=groups)
    expected = ["N = 1"] if variants == ("standard",) else ["N = 2", "N = 4"]
    assert [axes.get_title() for axes in figure.axes] == expected


def test_four_panels_stand_in_two_rows_and_each_column_is_labelled_below(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {("gc", n): (20.0, 21.0, 22.0) for n in (16, 32)}
    monkeypatch.setattr("tests.example_train.FINAL", {**FINAL, **more})
    for groups, labelled in (((2, 4, 8, 16), 2), ((2, 4, 8, 16, 32), 3)):
        figure = figure_of(train_document(variants=("gc",), groups=groups), "curves")
        figure.draw_without_rendering()
        assert sum(axes.get_xlabel() == "epoch" for axes in figure.axes) == labelled
        assert [axes.get_title() for axes in figure.axes if axes.axison] == [f"N = {n}" for n in groups]


# ---------------------------------------------------------------------------------------------------- whole documents


def figure_title(figure: Figure) -> str:
    return next(text for text in texts(figure) if text.startswith("Test error"))


def test_ranks_have_no_place_on_the_axis_of_n_and_panels_of_their_own() -> None:
    document = train_document(variants=("standard", "gc", "bgc"), groups=(2, 4))
    for row in document["results"]:
        if row["params"]["variant"] == "gc":
            row["params"] |= {"variant": "lowrank", "groups": 1, "rank": 4 * row["params"]["groups"]}
    by_groups, by_params = figure_of(document, "errors").axes
    assert not all_found(by_groups, "_mean lowrank")
    assert len(all_found(by_params, "_mean lowrank")[0].get_xdata()) == 2
    panels = figure_of(document, "curves").axes
    assert [axes.get_title() for axes in panels if axes.axison] == ["N = 2", "N = 4", "r = 8", "r = 16"]
    assert [len(all_found(axes, "_curve lowrank")) for axes in panels if axes.axison] == [0, 0, 1, 1]


def test_without_a_name_both_are_drawn_and_the_title_says_what_ran() -> None:
    document = {**train_document(), "quality": "quick", "complete": False}
    figure = figure_of(document)
    assert len(figure.axes) == 2 + 3
    assert figure_title(figure).endswith("wrn_10_2 on digits, 10 epochs, 3 seeds, a quick run, not complete")


def test_the_title_counts_the_seeds_of_a_standard_convolution_alone() -> None:
    assert figure_title(shared_figure(train_document, variants=("standard",))).endswith("3 seeds")


def test_synthetic_images_have_no_error_even_if_the_file_has_one() -> None:
    document = train_document(variants=("gc",))
    for row in document["results"]:
        row["params"]["dataset"] = "synthetic"
    with pytest.raises(UsageError, match="nothing to draw"):
        figure_of(document)


def test_a_variant_looks_the_same_in_both_pictures() -> None:
    figure = shared_figure(train_document)
    drawn = lines(figure)
    for variant in ("gc", "bgc", "tlgc"):
        mean, curve = drawn[f"_mean {variant}"], drawn[f"_curve {variant}"]
        assert (mean.get_color(), mean.get_marker()) == (curve.get_color(), curve.get_marker())
