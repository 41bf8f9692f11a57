from __future__ import annotations

import pytest

import bgcbench
from bgcbench.errors import BgcbenchError, DeviceError, OutputError, ResultFileError, ShapeError, UsageError
from bgcbench.specs import VARIANTS, ConvSpec, check_choice, divisors, load_layer


@pytest.mark.parametrize("value", [1, 2, 12, 36, 97, 1024])
def test_divisors_are_all_of_them_in_order(value: int) -> None:
    assert divisors(value) == [d for d in range(1, value + 1) if value % d == 0]


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown variant 'bcg': did you mean 'bgc'\? choose from"):
        check_choice("variant", "bcg", VARIANTS)
    with pytest.raises(UsageError, match=r"unknown variant 'qqqqq': choose from"):
        check_choice("variant", "qqqqq", VARIANTS)


def test_a_standard_convolution_has_no_groups() -> None:
    with pytest.raises(ShapeError, match="groups=1, not 4"):
        ConvSpec("standard", 8, 8, 3, groups=4)


def test_flgc_may_have_uneven_groups_and_no_other_variant() -> None:
    assert ConvSpec("flgc", 10, 10, 3, groups=4).groups == 4
    with pytest.raises(ShapeError):
        ConvSpec("tlgc", 10, 10, 3, groups=4)


def test_an_algorithm_belongs_to_its_variant() -> None:
    assert ConvSpec("bgc", 8, 8, 3, groups=2, algorithm="concat").algorithm == "concat"
    with pytest.raises(UsageError, match="algorithm of gc"):
        ConvSpec("gc", 8, 8, 3, groups=2, algorithm="concat")


def test_specs_are_values() -> None:
    assert ConvSpec("gc", 8, 8, 3, groups=2) == ConvSpec("gc", 8, 8, (3, 3), groups=2)
    with pytest.raises(AttributeError):
        ConvSpec("gc", 8, 8, 3).groups = 2  # type: ignore[misc]


def test_every_registered_layer_carries_the_name_it_is_registered_under() -> None:
    for name, variant in VARIANTS.items():
        assert load_layer(name).variant == name
        assert load_layer(name).__module__ == f"bgcbench.convs.{name}"  # one name everywhere
        assert variant.label


def test_the_error_tree_and_its_exit_codes() -> None:
    codes = {BgcbenchError: 1, UsageError: 2, ShapeError: 2, ResultFileError: 2, DeviceError: 3, OutputError: 4}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert all(issubclass(kind, BgcbenchError) for kind in codes)
    assert issubclass(ShapeError, ValueError)


def test_the_public_names() -> None:
    assert bgcbench.__all__ == [
        "BalancedGroupConv2d",
        "BgcbenchError",
        "Choice",
        "ConvSpec",
        "Converted",
        "FullyLearnableGroupConv2d",
        "GroupConv2d",
        "LayerError",
        "LearnedGroupConv2d",
        "LowRankConv2d",
        "Plan",
        "ShuffleGroupConv2d",
        "StandardConv2d",
        "TwoLevelGroupConv2d",
        "Views",
        "__version__",
        "approximability",
        "build_conv",
        "build_model",
        "calibration",
        "convert",
        "export",
        "fold_norms",
        "load_converted",
        "parameter_groups",
        "plan",
        "profile",
        "save_converted",
    ]
    for name in bgcbench.__all__:
        assert getattr(bgcbench, name) is not None
    assert dir(bgcbench) == sorted(bgcbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bgcbench.nonsense  # noqa: B018
