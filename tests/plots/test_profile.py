"""The picture of ``profile``: speed-ups against parameters."""

from __future__ import annotations

from typing import Any

import pytest

from bgcbench import plots
from bgcbench.errors import UsageError
from bgcbench.report import speed_up
from tests.example import example_document
from tests.plots.looking import (
    assert_nothing_is_cut_off_or_lies_on_another,
    figure_of,
    legend,
    shared_figure,
    texts,
)
from tests.reporting import profile_rows

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
