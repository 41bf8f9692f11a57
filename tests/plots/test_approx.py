from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bgcbench.experiments.approx import ApproxConfig, plan
from bgcbench.experiments.approx_run import ApproxRun, fits, open_session
from bgcbench.plots import heatmap, pareto
from bgcbench.plots.sampled import SMOOTH
from bgcbench.theory import paper
from bgcbench.theory.inputs import InputLaw
from tests.example_approx import network, new_document, row_of, sampled
from tests.plots.looking import figure_of, legend, lines, shared_figure, texts

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'plot'")

from matplotlib.colors import to_rgb, to_rgba
from matplotlib.container import ErrorbarContainer

Json = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------ figure 1


def test_figure_1_has_the_documents_errors_and_slopes() -> None:
    document = sampled(inputs=("normal", "uniform"), variants=("standard", "gc", "tlgc", "bgc"))
    figure = figure_of(document, "figure1")
    assert len(figure.axes) == 1
    assert len(legend(figure)) == len(document["fits"]) == 6
    labels = {"gc": "GC", "tlgc": "TLGC", "bgc": "BGC"}
    for fit in document["fits"]:
        exact = "" if fit["variant"] == "tlgc" else f" (exact {fit['exact_slope_mean']:.2f})"
        label = f"{labels[fit['variant']]}, {fit['input']}: slope {fit['slope_mean']:.2f}{exact}"
        assert label in legend(figure)
        x, y = lines(figure)[label].get_data()
        rows = [row_of(document, fit["variant"], n, fit["input"]) for n in fit["groups"]]
        assert list(x) == [math.log(1 - 1 / n) for n in fit["groups"]]
        assert list(y) == [math.log(row["error"]) for row in rows]


def test_figure_1_says_what_it_leaves_out_and_is_labelled_by_n() -> None:
    figure = shared_figure(sampled, "figure1", variants=("standard", "gc", "bgc"), samples=1000)
    assert "Not drawn, because nothing is lost: SC, BGC N = 2." in "\n".join(texts(figure))
    assert "lower by up to 1 %" in "\n".join(texts(figure))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8", "16"]
    assert list(axes.get_xticks()) == [math.log(1 - 1 / n) for n in (2, 4, 8, 16)]
    assert "log(1 - 1/N)" in axes.get_xlabel()
    assert "log E" in axes.get_ylabel()
    assert "1-D convolutions, 64 to 64 channels, k = 3, length 32; S = 1000" in figure.subfigs[0].get_suptitle()


def test_exact_curves_go_through_the_exact_values() -> None:
    document = sampled()
    drawn = lines(figure_of(document, "figure1"))
    for variant, kept, least in (("gc", 1, 2), ("bgc", 2, 4)):
        x, y = drawn[f"_exact {variant}, normal"].get_data()
        assert len(x) == SMOOTH
        assert (x[0], x[-1]) == pytest.approx((math.log(1 - 1 / least), math.log(1 - 1 / 16)))
        shares = [math.exp(value) for value in x]  # 1 - 1/N
        expected = [7000 / 64 * (share if kept == 1 else 2 * share - 1) for share in shares]
        assert [math.exp(value) for value in y] == pytest.approx(expected)


def test_on_other_inputs_the_exact_values_of_gc_are_joined() -> None:
    document = sampled(inputs=("relu",))
    drawn = lines(figure_of(document, "figure1"))
    assert len(drawn["_exact gc, relu"].get_xdata()) == 4
    assert len(drawn["_exact bgc, relu"].get_xdata()) == SMOOTH
    unit = 7000 * InputLaw.parse("relu").variance
    exact = [unit * row_of(document, "gc", n, "relu")["exact_relative_error"] for n in (2, 4, 8, 16)]
    assert list(drawn["_exact gc, relu"].get_ydata()) == pytest.approx([math.log(value) for value in exact])


def test_without_a_closed_form_the_errors_themselves_are_joined() -> None:
    drawn = lines(shared_figure(sampled, "figure1", variants=("flgc",)))
    measured = next(line for label, line in drawn.items() if label.startswith("FLGC"))
    assert drawn["_join flgc, normal"].get_xydata().tolist() == measured.get_xydata().tolist()
    assert not any(label.startswith("_exact") for label in drawn)


def test_one_n_is_a_point_without_a_slope() -> None:
    figure = shared_figure(sampled, "figure1", groups=(4,), inputs=("normal",))
    assert legend(figure) == ["GC, normal: no slope", "BGC, normal: no slope"]


def test_ticks_that_would_touch_are_left_out() -> None:
    config: Json = {"in_channels": 512, "out_channels": 512, "inputs": ("normal",)}
    axes = figure_of(sampled(groups=(2, 4, 8, 16, 32, 64, 128, 256), **config), "figure1").axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown[0] == "2"
    assert shown[-1] == "256"
    assert "128" not in shown


def test_inputs_and_variants_are_told_apart_without_colour() -> None:
    names = ("normal", "uniform", "relu", "factor:0.5", "normal:1", "factor:0.2")
    drawn = lines(shared_figure(sampled, "figure1", inputs=names, variants=("gc", "tlgc", "bgc")))
    measured = [line for label, line in drawn.items() if not label.startswith("_")]
    assert len({(line.get_marker(), line.get_fillstyle()) for line in measured}) == len(measured) == 18
    exact = [line for label, line in drawn.items() if label.startswith("_exact gc")]
    assert len({str((line._dash_pattern, line.get_linestyle())) for line in exact}) == 6


# ------------------------------------------------------------------------------------------------------------ figure 2


def test_figure_2_has_the_documents_scaled_errors() -> None:
    document = sampled(variants=("gc", "shuffle", "bgc"))
    figure = figure_of(document, "figure2")
    drawn = lines(figure)
    for label, variant, groups in (("GC", "gc", [2, 4, 8, 16]), ("BGC", "bgc", [4, 8, 16])):
        for name in ("normal", "uniform"):
            line = drawn[f"{label}, {name}"]
            assert list(line.get_xdata()) == groups
            assert list(line.get_ydata()) == [1e3 * row_of(document, variant, n, name)["scaled_error"] for n in groups]
    built = drawn["BGC, normal: the proof's construction"]
    assert list(built.get_xdata()) == [2, 4, 8, 16]
    assert list(built.get_ydata()) == pytest.approx([1e3 / 64] * 4)
    assert list(drawn["_exact gc, normal"].get_ydata()) == pytest.approx([1e3 / 64] * SMOOTH)
    assert not any("huffle" in label for label in drawn)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8", "16"]
    assert axes.get_ylim()[0] > 5
    assert "p = 1 for GC, 2 for BGC" in axes.get_ylabel()


@pytest.mark.parametrize(("shape", "there"), [({}, True), ({"kernel": 1}, False), ({"out_channels": 128}, False)])
def test_the_papers_ceiling_stands_only_in_its_own_shape(shape: Json, there: bool) -> None:
    size = {"in_channels": 256, "out_channels": 256, "groups": paper.FIGURE_GROUPS, **shape}
    figure = figure_of(sampled(**size), "figure2")
    assert ("paper: all below 3.83e-3" in texts(figure)) is there
    if there:
        assert list(lines(figure)["_ceiling"].get_ydata()) == [1e3 * paper.FIGURE_CEILING] * 2


def test_bars_are_one_standard_error_up_and_down() -> None:
    document = sampled(0.1, inputs=("normal",), variants=("bgc",))
    (bars,) = [c for c in figure_of(document, "figure2").axes[0].containers if isinstance(c, ErrorbarContainer)]
    ends = [sorted(float(y) for _, y in segment) for segment in bars.lines[2][0].get_segments()]
    scaled = [1e3 * row_of(document, "bgc", n)["scaled_error"] for n in (4, 8, 16)]
    assert ends == [pytest.approx([0.9 * value, 1.1 * value]) for value in scaled]


# -------------------------------------------------------------------------------------------------------------- pareto


def test_the_front_has_a_panel_an_input() -> None:
    document = sampled(inputs=("normal", "uniform"), variants=("standard", "gc", "tlgc", "bgc"))
    figure = figure_of(document, "pareto")
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters"] * 2
    assert [axes.get_title() for axes in figure.axes] == ["input: normal", "input: uniform"]
    assert legend(figure) == ["SC", "GC", "TLGC", "BGC", "Pareto front"]
    for name, axes in zip(("normal", "uniform"), figure.axes, strict=True):
        points = {str(line.get_label()).split(" ", 1)[-1]: line for line in axes.get_lines()}
        for row in [row for row in document["results"] if row["params"]["input"] == name]:
            x, y = points[row["key"]].get_data()
            assert (list(x), list(y)) == ([row["counts"]["params"]], [100 * row["output_relative_error"]])


def test_macs_are_no_second_cost_because_they_grow_as_parameters_do() -> None:
    rows = sampled(variants=("standard", "gc", "shuffle", "lgc", "tlgc", "bgc", "lowrank"))["results"]
    assert len({row["counts"]["macs"] / row["counts"]["params"] for row in rows}) == 1


def test_a_picture_has_six_panels_and_names_what_has_no_room() -> None:
    names = tuple(f"normal:{mean}" for mean in range(1, 9))
    figure = figure_of(sampled(inputs=names, variants=("gc",)), "pareto")
    assert len(figure.axes) == 6
    assert "No room for normal:7, normal:8: see the table." in " ".join(texts(figure))


def test_a_legend_that_were_too_long_names_variants_and_inputs() -> None:
    names = ("normal", "uniform", "relu", "factor:0.5", "normal:1", "factor:0.2")
    variants = ("gc", "shuffle", "lgc", "tlgc", "bgc")
    figure = figure_of(sampled(inputs=names, variants=variants), "figure1")
    assert legend(figure) == ["GC", "Shuffle", "LGC", "TLGC", "BGC", *names]


def test_bgc_at_2n_and_gc_at_n_are_on_the_front_together() -> None:
    document = sampled(inputs=("normal",), variants=("standard", "gc", "bgc"), samples=1000)
    row_of(document, "bgc", 8)["output_relative_error"] *= 1.0003  # what two samples of inputs differ by
    figure = figure_of(document, "pareto")
    for axes in figure.axes:
        labels = [text.get_text() for text in axes.texts]
        assert labels == ["SC\nBGC 2", "GC 2\nBGC 4", "GC 4\nBGC 8", "GC 8\nBGC 16", "16"]
        assert not any(str(line.get_label()).startswith("_off") for line in axes.get_lines())
    step = lines(figure)["_front"]
    assert list(step.get_ydata())[-1] == 0
    assert step.get_drawstyle() == "steps-post"


def test_points_off_the_front_are_open() -> None:
    document = sampled(inputs=("normal",), variants=("gc", "flgc"))
    drawn = lines(figure_of(document, "pareto"))
    for n in (2, 4, 8, 16):
        assert drawn[f"_off {row_of(document, 'gc', n)['key']}"].get_fillstyle() == "none"
        assert drawn[f"_front {row_of(document, 'flgc', n)['key']}"].get_fillstyle() == "full"


@pytest.mark.parametrize(("value", "text"), [(500, "500"), (1e3, "1 k"), (2e4, "20 k"), (5e6, "5 M"), (1e9, "1 G")])
def test_costs_at_ticks_are_readable(value: float, text: str) -> None:
    assert pareto.counted(value) == text


# ------------------------------------------------------------------------------------------------------------ heat map


def test_the_heat_map_has_every_number_on_its_cell() -> None:
    document = network()
    figure = figure_of(document, "heatmap")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("GC N = 2", "GC N = 4", "GC N = 8", "BGC N = 2", "BGC N = 4", "BGC N = 8")
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        *("layer1.0.conv2", "layer1.1.conv2", "layer4.2.conv2")
    ]
    cells = [text.get_text() for text in axes.texts]
    gc, bgc = cells[:9], cells[9:]
    assert gc == ["17", "33", "50", "25", "50", "75", "29", "-", "88"]
    assert bgc == ["0", "0", "0", "17", "33", "50", "25", "-", "75"]
    assert axes.get_facecolor() == to_rgba("#e6e6e6")  # of the cell without a number
    image = axes.images[0].get_array()
    assert image is not None
    assert image[2, 2] == pytest.approx(100 * (1 - 1 / 8))
    title = " ".join(texts(figure))
    assert "resnet50 (weights IMAGENET1K_V2)" in title
    assert "256 images of digits" in title
    assert "-: N or the rank does not fit" in title


def test_colours_tell_1_percent_from_10() -> None:
    image = figure_of(network(), "heatmap").axes[0].images[0]
    assert image.get_clim() == (0.1, 100)
    one, ten, hundred = (float(image.norm(value)) for value in (1, 10, 100))
    assert (one, ten, hundred) == pytest.approx((1 / 3, 2 / 3, 1))


def test_ranks_have_lines_of_their_own_in_the_heat_map() -> None:
    document = network()
    for row in document["results"]:
        if row["params"]["variant"] == "bgc":
            row["params"] |= {"variant": "lowrank", "groups": 3, "rank": 10 * row["params"]["groups"]}
    axes = figure_of(document, "heatmap").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("GC N = 2", "GC N = 4", "GC N = 8", "LR r = 20", "LR r = 40", "LR r = 80")
    ]
    assert [text.get_text() for text in axes.texts][9:] == ["0", "0", "0", "17", "33", "50", "25", "-", "75"]


def test_ranks_are_in_the_front_and_in_no_figure_of_the_paper() -> None:
    document = sampled(variants=("gc", "lowrank"), groups=(2, 4), ranks=(9, 3), inputs=("normal",))
    (by_groups,) = figure_of(document, "figure1").axes
    assert [len(line.get_xdata()) for line in by_groups.lines if line.get_label().startswith("LR")] == [2]
    front = figure_of(document, "pareto").axes[0]
    keys = {row["key"] for row in document["results"] if row["params"].get("rank")}
    assert len(keys) == 2
    assert {line.get_label().partition(" ")[2] for line in front.lines} >= keys
    assert {"r = 3", "r = 9"} & {text.get_text() for text in front.texts}


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "-"), (1e-14, "0"), (0.01, "<0.1"), (4.26, "4.3"), (9.96, "10"), (47.5, "48"), (130, "130")],
)
def test_cells_have_two_digits(value: float, text: str) -> None:
    assert heatmap.percent(value) == text


def luminance(colour: Any) -> float:
    """Relative luminance of an sRGB colour (WCAG 2): 0 for black to 1 for white."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def test_numbers_can_be_read_on_every_colour() -> None:
    document = network(tuple(f"layer{i}" for i in range(40)), groups=(2, 4, 16, 32))
    axes = figure_of(document, "heatmap").axes[0]
    image = axes.images[0]
    numbers = [text for text in axes.texts if text.get_text() != "-"]
    assert len(numbers) > 300
    for text in numbers:
        j, i = (round(at) for at in text.get_position())
        ground = luminance(image.cmap(image.norm(image.get_array()[i, j])))
        front = luminance(to_rgb(text.get_color()))
        light, dark = max(ground, front), min(ground, front)
        assert (light + 0.05) / (dark + 0.05) > 4.5


def test_errors_beyond_the_scale_are_printed_as_they_are() -> None:
    document = network()
    document["results"][0]["output_relative_error"]["calibrated"] = 1.3
    figure = figure_of(document, "heatmap")
    assert "130" in texts(figure)
    assert figure.axes[0].images[0].get_clim() == (0.1, 100)


def test_numbers_and_names_that_have_no_room_are_left_out_and_said() -> None:
    names = tuple(f"features.{i}.a_very_long_name_of_a_module.conv" for i in range(61))
    axes = figure_of(network(names[:3]), "heatmap").axes[0]
    assert axes.get_xticklabels()[2].get_text() == "features.2...dule.conv"
    assert len(axes.texts) == 18
    figure = figure_of(network(names), "heatmap")
    assert figure.axes[0].get_xlabel() == "layer"
    assert not figure.axes[0].texts
    assert f"Layers in the order in which they run, from {names[0]} to {names[-1]}." in " ".join(texts(figure))


# ---------------------------------------------------------------------------------------------------- whole documents


@pytest.mark.parametrize(("variants", "panels"), [(("gc", "bgc"), 4), (("tlgc",), 3), (("standard", "gc"), 4)])
def test_without_a_name_everything_that_fits_is_drawn(variants: tuple[str, ...], panels: int) -> None:
    assert len(shared_figure(sampled, variants=variants).axes) == panels


def test_a_network_has_its_heat_map_and_nothing_else() -> None:
    assert len(shared_figure(network).axes) == 1 + 1  # with the scale of colours
    both = new_document(results=[*sampled()["results"], *network()["results"]], fits=[])
    assert len(figure_of(both).axes) == 4 + 2


def test_rows_that_failed_are_left_out() -> None:
    document = sampled(inputs=("normal",))
    unknown = dict.fromkeys(name for name in document["results"][0] if name not in ("key", "params", "null_reasons"))
    document["results"][0] |= {**unknown, "status": "invalid", "reason": "4 channels"}
    drawn = lines(figure_of(document, "figure1"))
    gc = next(line for label, line in drawn.items() if label.startswith("GC"))
    assert list(gc.get_xdata()) == [math.log(1 - 1 / n) for n in (4, 8, 16)]


def test_a_title_says_when_a_run_is_quick_or_not_complete() -> None:
    document = {**sampled(), "quality": "quick", "complete": False}
    assert figure_of(document, "figure2").subfigs[0].get_suptitle().endswith("a quick run, not complete")


def test_a_real_run_can_be_drawn(tmp_path: Path) -> None:
    config = ApproxConfig(
        device="cpu", in_channels=8, out_channels=8, samples=30, groups=(1, 2, 4), variants=("gc", "lgc", "bgc")
    )
    run = ApproxRun(config, open_session(config), plan(config))
    for _ in run.run():
        pass
    document = new_document(
        results=[row.to_json() for row in run.results], fits=[fit.to_json() for fit in fits(run.results)]
    )
    assert len(figure_of(document).axes) == 4
    slope = next(f["slope_mean"] for f in document["fits"] if (f["variant"], f["input"]) == ("gc", "normal"))
    assert any(text.startswith(f"GC, normal: slope {slope:.2f} (exact 1.00)") for text in legend(figure_of(document)))
