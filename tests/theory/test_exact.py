from __future__ import annotations

import pytest
import torch

from bgcbench.convs import CONVS
from bgcbench.theory.exact import white_error


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_the_closed_form_is_what_the_white_projection_really_loses(name: str, groups: int) -> None:
    if name == "standard":
        groups = 1
    lost = total = 0.0
    closed_form = white_error(name, groups)
    for seed in range(3 if closed_form is None else 20):
        weight = torch.randn(64, 64, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        layer = CONVS[name].from_dense(weight, groups, projection="white")
        lost += float((weight - layer.dense_weight()).detach().square().sum())
        total += float(weight.square().sum())
    if closed_form is None:  # a search, or a rank-one sum: at least what GC's blocks keep is kept
        assert 0 < lost / total < 1 - 1 / groups
    else:
        assert lost / total == pytest.approx(closed_form, rel=0.02, abs=1e-12)


def test_at_equal_parameters_bgc_and_gc_lose_the_same_on_white_input() -> None:
    assert all(white_error("bgc", 2 * n) == white_error("gc", n) for n in (1, 2, 4, 8, 16))


@pytest.mark.parametrize("name", ["lgc", "flgc", "tlgc"])
def test_no_number_where_no_closed_form_exists(name: str) -> None:
    assert white_error(name, 4) is None
    assert white_error(name, 1) == 0.0
