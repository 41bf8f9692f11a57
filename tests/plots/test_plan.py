"""Pictures of plans: what is drawn where, read back from the figure."""

from __future__ import annotations

from typing import Any

import pytest

from bgcbench.errors import UsageError
from tests.example_plan import plan_document

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'plot'")

from tests.plots.looking import figure_of, lines


def test_the_curve_is_what_is_predicted_and_the_marks_what_is_measured() -> None:
    drawn = figure_of(plan_document(), "plans")
    found = {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines(drawn).items()}
    assert found["_curve"] == ([0.4], [0.3])  # a loss of 0 has no place on a logarithmic axis
    assert found["_proof-plan"] == ([0.71], [0.02])
    assert found["_proof-gc"] == ([0.7], [0.02])
    assert drawn.axes[0].get_xlabel() == "share of the time kept"


def test_bars_are_the_layers_before_and_after() -> None:
    costs = plan_document()["results"]
    dense: dict[str, Any] = {**costs[0], "key": "cost-a-standard-n1", "seconds": 2e-4,
             "params": {**costs[0]["params"], "variant": "standard", "groups": 1}}  # fmt: skip
    chosen = next(row for row in costs if row["key"] == "choice-a") | {"seconds": 1e-4}
    drawn = figure_of(plan_document(results=[dense, chosen]), "cost")
    assert [bar.get_height() for bar in drawn.axes[0].patches] == pytest.approx([0.2, 0.1])
    assert [text.get_text() for text in drawn.axes[0].get_xticklabels()] == ["a"]


def test_a_plan_that_is_not_finished_has_no_picture() -> None:
    with pytest.raises(UsageError, match="nothing to draw: the result has no plan yet; resume it"):
        figure_of(plan_document(results=plan_document()["results"][:2]))


def test_without_labels_time_saved_stands_against_first_guesses_that_changed() -> None:
    drawn = figure_of(plan_document(), "tradeoff")
    at = {label: (line.get_xdata()[0], line.get_ydata()[0]) for label, line in lines(drawn).items()}
    assert (at["_standard "], at["_plan plan"], at["_gc 2"]) == (
        (0, 0),
        (pytest.approx(29), 5),
        (pytest.approx(30), 16),
    )
    assert drawn.axes[0].get_ylabel() == "first guess not the original's (% of images)"


def test_with_labels_it_is_the_error() -> None:
    document = plan_document()
    errors = {"proof-dense": 1.0, "proof-plan": 2.5, "proof-gc": 9.0}
    for row in document["results"]:
        if row["key"] in errors:
            row["error"] = errors[row["key"]]
    drawn = figure_of(document, "tradeoff")
    lost = {label: line.get_ydata()[0] for label, line in lines(drawn).items()}
    assert (lost["_plan plan"], lost["_gc 2"]) == (1.5, 8.0)
    assert drawn.axes[0].get_ylabel() == "error less the original's (percentage points)"
