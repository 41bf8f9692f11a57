"""The pictures of ``profile``: speed-ups against parameters, and time by layer."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bgcbench import plots
from bgcbench.errors import UsageError
from bgcbench.report import speed_up
from bgcbench.results.document import document_of
from bgcbench.results.times import layer_times
from tests.example import example_document
from tests.plots.looking import (
    assert_nothing_is_cut_off_or_lies_on_another,
    figure_of,
    legend,
    shared_figure,
    texts,
)
from tests.reporting import profile_rows
from tests.test_network import network_document

Json = dict[str, Any]


def test_speed_ups_stand_against_parameters_with_their_intervals() -> None:
    figure = shared_figure(example_document)
    forward, both = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["fwd", "fwd+bwd"]
    rows = {(row.params.variant, row.params.groups): row for row in profile_rows(example_document()) if row.phases}
    for axes, phase in ((forward, "fwd"), (both, "fwd_bwd")):
        for variant, shares in (("gc", [25, 50]), ("bgc", [50, 100])):  # of N = 4 and 2
            (drawn,) = [each for each in axes.containers if each.get_label().startswith(f"_speed-up {variant} ")]
            found = [speed_up(rows[variant, n], rows["standard", 1], phase) for n in (4, 2)]
            assert list(drawn.lines[0].get_xdata()) == pytest.approx(shares)
            assert list(drawn.lines[0].get_ydata()) == pytest.approx([one.value for one in found if one])
            ends = [tuple(segment[:, 1]) for segment in drawn.lines[2][0].get_segments()]
            assert ends == [pytest.approx((one.ci95.low, one.ci95.high)) for one in found if one and one.ci95]
    assert legend(figure) == ["GC", "BGC"]
    assert "Speed-up over the standard convolution" in " ".join(texts(figure))


def test_rows_from_too_few_rounds_are_not_drawn_and_counted() -> None:
    document = example_document()
    for phase in document["results"][1]["phases"].values():
        phase["rounds"] = [1] * len(phase["rounds"])
    figure = figure_of(document)
    assert any("Not drawn, for too few rounds or doubt: 6." in text for text in texts(figure))  # of 6 rows, 2 invalid
    for row in document["results"]:
        for phase in row["phases"].values():
            phase["rounds"] = [1] * len(phase["rounds"])
    with pytest.raises(UsageError, match="nothing to draw: the result has no row with an interval"):
        figure_of(document)


def test_the_algorithms_of_a_variant_are_lines_of_their_own() -> None:
    document = example_document()
    document["results"][2]["params"]["algorithm"] = "concat"
    figure = figure_of(document)
    assert len({name for name in legend(figure) if name.startswith("BGC ")}) == 2


def test_every_point_has_the_name_of_its_n_where_it_lies_on_nothing_else() -> None:
    figure = figure_of(example_document(), placed=True)
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts if text.get_visible()) == ["2", "2", "4", "4"]


def test_bars_are_the_shapes_of_a_network_before_and_with_what_is_fastest() -> None:
    figure = figure_of(network_document(layers=True), "cost")
    forward, both = figure.axes
    before, after = (float(number) for number in re.findall(r"([\d.]+) ms", both.get_title()))
    assert (before, after) == (pytest.approx(270, rel=0.02), pytest.approx(180, rel=0.02))  # 9 calls; 6 of them halved
    assert forward.get_yticklabels()[0].get_text() == "16 -> 16 3x3 at 16x16 (x2)"
    widths = {str(bar.get_label()): [patch.get_width() for patch in bar] for bar in both.containers[:2]}
    assert widths["_before"] == [pytest.approx(60, rel=0.02)]
    assert widths["_after"] == [pytest.approx(30, rel=0.02)]
    assert [text.get_text() for text in both.texts].count("GC 4") == 5
    assert legend(figure) == ["before", "stays", "GC"]
    assert_nothing_is_cut_off_or_lies_on_another(figure)


def test_a_planned_network_has_what_its_plan_makes_of_each_layer() -> None:
    document = network_document(layers=True)
    planned = next(row for row in document["results"] if row["params"]["variant"] == "bgc")
    planned["params"]["variant"], planned["convert"]["planned"] = "plan", True
    names = [layer["name"] for layer in planned["convert"]["layers"]]
    planned["convert"]["layers"] = [
        layer | {"variant": "bgc", "groups": 4} for layer in planned["convert"]["layers"] if layer["name"] == names[0]
    ]

    def saved() -> float:
        times = layer_times(document_of(document, "r.json").results, "fwd_bwd")
        return sum(one.before_s - one.after_s for one in times)

    assert saved() == pytest.approx(0.030 - 0.025, rel=0.1)
    for row in document["results"]:
        if (row.get("layer") or {}).get("names") == names[:2]:
            row["layer"]["count"] = 4  # each runs twice
    assert saved() == pytest.approx(2 * (0.030 - 0.025), rel=0.1)
    assert [text.get_text() for text in figure_of(document, "cost").axes[1].texts].count("BGC 4") == 1


def test_times_that_cannot_be_are_no_picture() -> None:
    document = network_document(layers=True)
    for phase in document["results"][0]["phases"].values():
        phase["summary"]["median_s"] /= 2  # 9 calls of a tenth of twice that
    with pytest.raises(UsageError, match="nothing to draw: cost needs convolutions measured by themselves"):
        figure_of(document, "cost")


def test_nothing_is_cut_off_or_lies_on_another_thing() -> None:
    assert_nothing_is_cut_off_or_lies_on_another(figure_of(example_document(), placed=True))


def test_inline_pictures_have_names_of_their_own_and_words() -> None:
    from bgcbench.results import document_of

    document = document_of(example_document(), "the example")
    (name, one), (_, other) = (plots.inline_pictures(document, prefix)[0] for prefix in ("f1", "f2"))
    assert name == "speedups"
    assert one == other.replace("f2-speedups", "f1-speedups")
    assert 'aria-label="Speed-up over the standard convolution, 3x3, 1024 to 1024 channels' in one
    assert "Legend: GC, BGC." in one
    assert "<!--" not in one
