from __future__ import annotations

import itertools

import pytest

from bgcbench.specs import VARIANTS, NetSpec
from bgcbench.theory import paper
from bgcbench.theory.paper import TABLE5, TABLE6, printed_error, transferred_error


@pytest.mark.parametrize(
    ("dataset", "model", "variant", "groups", "error"),
    [
        ("cifar10", "wrn_28_10", "standard", 1, 3.88),
        ("cifar10", "wrn_28_10", "gc", 16, 8.47),
        ("cifar10", "wrn_28_10", "flgc", 8, 9.81),
        ("cifar10", "wrn_28_10", "bgc", 2, 3.75),
        ("cifar10", "resnext29_8x64d", "shuffle", 4, 4.17),
        ("cifar10", "resnext29_8x64d", "bgc", 16, 5.60),
        ("cifar10", "efficientnet_b0", "tlgc", 8, 10.68),
        ("cifar10", "efficientnet_b0", "gc", 16, None),
        ("imagenet", "efficientnet_b0", "standard", 1, 30.68),
        ("imagenet", "wide_resnet34_2", "bgc", 8, 27.16),
        ("imagenet", "wide_resnet34_2", "flgc", 4, 38.30),
        ("imagenet", "mobilenet_v2", "tlgc", 2, 33.56),
        ("imagenet", "mobilenet_v2", "bgc", 16, None),
        ("imagenet", "wrn_28_10", "bgc", 2, None),
        ("cifar10", "wrn_28_10", "lgc", 2, None),
        ("digits", "wrn_28_10", "bgc", 2, None),
    ],
)
def test_a_cell_is_what_the_paper_prints(
    dataset: str, model: str, variant: str, groups: int, error: float | None
) -> None:
    assert printed_error(dataset, model, variant, groups) == error


def test_the_tables_have_every_cell_that_the_paper_fills() -> None:
    # a standard convolution and five variants at each N; EfficientNet-B0 at N = 16 is a dash
    assert len(TABLE5) == 3 * (1 + 5 * 4) - 5
    assert len(TABLE6) == 3 * (1 + 5 * 3)
    gone = set()
    for table, models, groups in ((TABLE5, paper.TABLE5_MODELS, paper.TABLE5_GROUPS),
                                  (TABLE6, paper.TABLE6_MODELS, paper.TABLE6_GROUPS)):  # fmt: skip
        cells = {(m, v, n) for m in models for v in paper.TABLE_VARIANTS[1:] for n in groups}
        cells |= {(model, "standard", 1) for model in models}
        assert set(table) <= cells
        gone |= cells - set(table)
    assert gone == {("efficientnet_b0", variant, 16) for variant in paper.TABLE_VARIANTS[1:]}


def test_sums_of_the_tables_columns_are_those_of_the_printed_page() -> None:
    def total(table: dict[tuple[str, str, int], float], name: str) -> float:
        return round(sum(error for (_, variant, _), error in table.items() if variant == name), 2)

    # added up by hand from the page
    assert total(TABLE5, "standard") == 17.62
    assert total(TABLE6, "standard") == 89.80
    assert total(TABLE5, "bgc") == round(22.46 + 16.75 + 23.28, 2)
    assert total(TABLE6, "gc") == round(125.24 + 95.58 + 137.62, 2)


def test_gc_loses_more_with_every_n_but_once_and_bgc_less_than_gc_everywhere() -> None:
    ups = []
    for table, groups in ((TABLE5, paper.TABLE5_GROUPS), (TABLE6, paper.TABLE6_GROUPS)):
        for model in {model for model, _, _ in table}:
            errors = [table[model, "gc", n] for n in groups if (model, "gc", n) in table]
            ups += [after > before for before, after in itertools.pairwise(errors)]
            for n in groups:
                if (model, "gc", n) in table:
                    assert table[model, "bgc", n] < table[model, "gc", n]
    assert ups.count(False) == 1  # ResNeXt-29 at N = 8


def test_every_name_is_one_that_the_package_knows() -> None:
    assert set(paper.TABLE_VARIANTS) <= set(VARIANTS)
    for model in (*paper.TABLE5_MODELS, *paper.TABLE6_MODELS):
        assert NetSpec(model).source["name"] == model


def test_table_3_has_the_errors_of_the_printed_page() -> None:
    cells = {cell: transferred_error("imagenet", "resnet50", *cell) for cell in paper.TABLE3}
    assert len(cells) == 9
    assert cells["standard", 1] == 23.87
    assert [cells["gc", n] for n in paper.GROUPS] == [26.54, 36.7, 43.72, 50.09]
    assert [cells["bgc", n] for n in paper.GROUPS] == [22.45, 25.51, 31.13, 35.45]
    assert {cell: printed.error for cell, printed in paper.TABLE4.items()} == cells  # it prints them once more
    for dataset, model, cell in (("imagenet", "resnet18", ("gc", 2)), ("digits", "resnet50", ("gc", 2)),
                                 ("imagenet", "resnet50", ("gc", 3))):  # fmt: skip
        assert transferred_error(dataset, model, *cell) is None
