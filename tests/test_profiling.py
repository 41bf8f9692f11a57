"""``bgcbench.profile``: a network at hand, measured from Python."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgcbench
from bgcbench import results
from bgcbench.errors import OutputError, ShapeError, UsageError
from bgcbench.profiling import Profile
from tests.reporting import render

pytestmark = pytest.mark.usefixtures("brisk", "one_thread")


class Mine(nn.Sequential):
    """One that no library knows."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


IMAGES = torch.randn(2, 3, 8, 8)
LIGHT: dict[str, Any] = {
    "groups": [2],
    "device": "cpu",
    "quick": True,
    "max_time_s": 0.01,
    "phases": ["fwd", "train_step"],
}


@pytest.fixture(scope="module")
def found() -> Profile:
    return bgcbench.profile(Mine(), IMAGES, **LIGHT)


def test_rows_are_typed_and_count_what_the_networks_have(found: Profile) -> None:
    assert [(row.params.variant, row.params.groups, row.status) for row in found.rows] == [
        ("standard", 1, "ok"), ("gc", 2, "ok"), ("bgc", 2, "ok")
    ]  # fmt: skip
    for row in found.rows:
        assert (row.params.batch, row.params.height) == (2, 8)
        assert set(row.phases) == {"fwd", "train_step"}
    dense, gc = (row.counts.params for row in found.rows[:2] if row.counts)
    assert dense == sum(p.numel() for p in Mine().parameters())
    assert dense - gc == 8 * 8 * 9 // 2  # of the second convolution; the first reads the image


def test_the_network_is_left_as_it_is() -> None:
    model = Mine().train()
    before = copy.deepcopy(model.state_dict())
    bgcbench.profile(model, IMAGES, **{**LIGHT, "phases": ["train_step"]})
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_is_saved_is_a_result_file_that_shows_the_same_table(found: Profile, tmp_path: Path) -> None:
    found.save(tmp_path / "r.json")
    assert render(results.read(tmp_path / "r.json"), "markdown") == found.table()
    assert "GC N=2" in found.table()
    with pytest.raises(OutputError, match="exists"):
        found.save(tmp_path / "r.json")
    found.save(tmp_path / "r.json", replace=True)


def test_a_frame_has_a_row_for_each_network_and_phase(found: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = types.SimpleNamespace(from_records=list)
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=frame))  # type: ignore[arg-type]
    records = found.to_pandas()
    assert [(record["variant"], record["phase"]) for record in records] == [
        (variant, phase) for variant in ("standard", "gc", "bgc") for phase in ("fwd", "train_step")
    ]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        found.to_pandas()


def test_what_cannot_be_measured_is_said_before_anything_is() -> None:
    with pytest.raises(UsageError, match=r"example_input is \(2, 1, 8, 8\)"):
        bgcbench.profile(Mine(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ShapeError, match="groups=3"):
        bgcbench.profile(Mine(), IMAGES, **{**LIGHT, "groups": [3]})
    with pytest.raises(TypeError, match="quik"):
        bgcbench.profile(Mine(), IMAGES, quik=True)
    with pytest.raises(UsageError, match="unknown variant 'gcc'"):
        bgcbench.profile(Mine(), IMAGES, variants=["gcc"], **LIGHT)
    with pytest.raises(UsageError, match="must return a tensor of"):
        bgcbench.profile(nn.Conv2d(3, 8, 3), IMAGES, **LIGHT)
