"""What is computed over several rows, against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from bgcbench.results.aggregate import (
    Conversions,
    Difference,
    Start,
    at_equal_n,
    at_equal_params,
    difference_of,
    front_of,
    lost_se,
    planned_seeds,
    spread_of,
    training_cells,
)
from bgcbench.results.document import Document
from bgcbench.results.rows import (
    CalibratedLayer,
    Calibration,
    Counts,
    NetworkTime,
    Ratio,
    Record,
    SampledParams,
    SampledRow,
    TrainParams,
    TrainRow,
    TransferRow,
)

IMAGES = 500  # so one image is 0.2 points
COPIED, CALIBRATED = Start("copy", True), Start("calibrated", True)


def params_of(variant: str, groups: int, seed: int, start: Start = Start("scratch", False)) -> TrainParams:  # noqa: B008
    return TrainParams(
        variant=variant, groups=groups, model="net", weights="none", dataset="digits", where="auto", init=start.init,
        rebn=start.rebn, distill=False, recipe="digits", epochs=3, seed=seed,
    )  # fmt: skip


def row_of(variant: str, groups: int, seed: int, final: float | None, **more: Any) -> TrainRow:
    params = more.pop("params", None) or params_of(variant, groups, seed)
    counts = Counts(params=1000 * (2 if variant == "bgc" else 1) // groups, macs=64)
    row: dict[str, Any] = {
        "key": f"{variant}-{groups}-{seed}", "status": "ok", "reason": None, "params": params, "counts": counts,
        "epochs": (), "error_initial": 90.0, "error_final": final, "error_best": final, "test_images": IMAGES,
        "paper": None, "convert": None,
    }  # fmt: skip
    return TrainRow(**(row | more))


def converted(variant: str, groups: int, seed: int, start: Start, initial: float, final: float | None = None,
              **more: Any) -> TransferRow:  # fmt: skip
    plain = row_of(variant, groups, seed, final, params=params_of(variant, groups, seed, start), error_initial=initial)
    fields = {name: getattr(plain, name) for name in plain.__struct_fields__} | more
    return TransferRow(**fields)


def document_of(*rows: TrainRow) -> Document:
    found = msgspec.convert(
        {"command": "train", "argv": [], "started_at": "", "environment": ENVIRONMENT, "settings": SETTINGS,
         "tool": {"version": "0", "git_commit": None, "git_dirty": None}},
        Document,
    )  # fmt: skip
    found.results = rows
    return found


def run_of(*rows: TransferRow) -> Conversions:
    return Conversions.of(document_of(*rows))


ENVIRONMENT: dict[str, Any] = {
    "fingerprint": "", "python": "3", "os": "", "cpu": {"model": "", "threads": 1}, "ram_bytes": 1, "torch": "2",
    "torchvision": None, "cuda": None, "cudnn": None, "triton": None, "driver": None,
    "device": {"type": "cpu", "name": "cpu", "total_bytes": 1},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "seed": 0, "precision": "fp32", "layout": "nchw", "tf32": {"conv": False, "matmul": False},
    "cudnn_benchmark": False,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- over the seeds


def test_a_spread_is_the_mean_and_the_sample_standard_deviation() -> None:
    assert spread_of([]) is None
    assert spread_of([3.0]) == (3.0, None, 1)
    assert spread_of([2.0, 3.0, 4.0, 7.0]) == (4.0, math.sqrt(14 / 3), 4)  # 4 + 1 + 0 + 9 over 3


def test_a_cell_holds_the_seeds_of_one_variant_and_n() -> None:
    interrupted = row_of("gc", 2, 2, 9.0, status="interrupted", reason="stopped")
    rows = [row_of("bgc", 4, 0, 1.0), row_of("gc", 4, 0, 2.0), row_of("gc", 2, 0, 3.0), row_of("gc", 2, 1, 5.0),
            interrupted, row_of("standard", 1, 0, 0.5)]  # fmt: skip
    cells = training_cells(rows)
    assert [(cell.variant, cell.groups) for cell in cells] == [("standard", 1), ("gc", 2), ("gc", 4), ("bgc", 4)]
    gc = cells[1]
    assert gc.errors == {0: 3.0, 1: 5.0}
    assert gc.known(lambda row: row.error_final) == {0: 3.0, 1: 5.0, 2: 9.0}
    assert gc.params == gc.params_training == 500
    assert gc.images_per_s is None


def test_counts_of_what_is_deployed_and_of_what_is_trained() -> None:
    masked = Counts(params=250, macs=8, params_training=1000, macs_training=32)
    (cell,) = training_cells([row_of("lgc", 4, 0, 1.0, counts=masked)])
    assert (cell.params, cell.params_training, cell.macs) == (250, 1000, 8)


def test_speeds_are_medians_over_the_seeds() -> None:
    (cell,) = training_cells([row_of("gc", 2, seed, 1.0, images_per_s=v) for seed, v in enumerate((10.0, 40.0, 20.0))])
    assert cell.images_per_s == 20.0


def test_synthetic_images_have_no_errors() -> None:
    params = msgspec.structs.replace(params_of("gc", 2, 0), dataset="synthetic")
    (cell,) = training_cells([row_of("gc", 2, 0, 90.0, params=params)])
    assert cell.errors == {}


def test_seeds_that_were_planned() -> None:
    document = document_of(row_of("gc", 2, 0, 1.0), row_of("gc", 2, 1, 1.0))
    assert planned_seeds(document) == 2
    document.config = {"seeds": [0, 1, 2]}
    assert planned_seeds(document) == 3


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_bgc_at_2n_has_the_parameters_of_gc_at_n_and_the_standard_convolution_is_gc_of_one_group() -> None:
    names = [("bgc", 2), ("bgc", 4), ("bgc", 16), ("gc", 4), ("gc", 2), ("gc", 8), ("standard", 1), ("tlgc", 2)]
    at = {name: f"{name[0]}{name[1]}" for name in names}
    assert at_equal_n(at) == [("bgc2", "gc2"), ("bgc4", "gc4")]
    assert at_equal_params(at) == [("bgc2", "standard1"), ("bgc4", "gc2"), ("bgc16", "gc8")]


def test_pairs_that_differ_in_size_are_not_at_equal_parameters() -> None:
    rows = [converted("gc", 2, 0, COPIED, 4.0), converted("bgc", 4, 0, COPIED, 3.0)]
    assert len(run_of(*rows).at_equal_params(COPIED)) == 1
    larger = converted("bgc", 4, 0, COPIED, 3.0, counts=Counts(params=511, macs=64))
    assert not run_of(rows[0], larger).at_equal_params(COPIED)


# ---------------------------------------------------------------------------------------------------------- differences


def test_a_difference_is_of_common_seeds_where_there_are_two() -> None:
    found = difference_of({0: 1.0, 1: 2.0, 7: 99.0}, {0: 2.0, 1: 4.0, 8: 50.0})
    assert found == Difference(1.5, 3.0, 2, math.sqrt(0.5))  # -1 and -2
    assert found.value == -1.5
    assert difference_of({0: 1.0, 1: 3.0}, {1: 5.0}) == Difference(2.0, 5.0, 1, None)
    assert difference_of({}, {0: 1.0}) is None


@pytest.mark.parametrize(
    ("ours", "seeds", "sd", "significant"),
    [(1.0, 2, 0.0, False), (1.0, 4, 0.99, True), (1.0, 4, 1.01, False), (0.2, 4, 0.0, False), (0.21, 4, 0.0, True)],
)
def test_a_difference_is_significant_beyond_two_standard_errors_and_one_image(
    ours: float, seeds: int, sd: float, significant: bool
) -> None:
    assert Difference(ours, 0.0, seeds, sd).significant(100 / IMAGES) is significant
    assert Difference(0.0, ours, seeds, sd).significant(100 / IMAGES) is significant


def test_a_training_is_compared_over_seeds_and_a_conversion_over_images() -> None:
    run = run_of(
        converted("standard", 1, 0, Start("none", False), 1.0),
        *[converted("gc", 4, s, COPIED, 30.0, 5.0 + s, agreement_initial=70.0) for s in range(3)],
        *[converted("bgc", 4, s, COPIED, 10.0, 2.0 + s, agreement_initial=90.0) for s in range(3)],
    )
    ((bgc, gc),) = run.at_equal_n(COPIED)
    final = run.compare(bgc, gc, "final")
    assert final is not None
    assert final.difference == Difference(3.0, 6.0, 3, 0.0)
    assert final.lower is bgc
    initial = run.compare(gc, bgc, "initial")
    assert initial is not None
    # All seeds end alike: d = 0.3 + 0.1 at most, variance (0.4 - 0.2^2) / 500, two standard errors 5.4 points of 20.
    assert initial.difference.value == 20.0
    assert initial.lower is bgc
    assert run.untouched == 1.0


def test_images_that_conversions_may_err_on_apart_hide_a_small_difference() -> None:
    def lower(difference: float) -> Any:
        gc = converted("gc", 4, 0, COPIED, 20.0 + difference, agreement_initial=100.0)
        bgc = converted("bgc", 4, 0, COPIED, 20.0, agreement_initial=91.0)
        run = run_of(gc, bgc)
        verdict = run.compare(*run.at_equal_n(COPIED)[0], "initial")
        assert verdict is not None
        return verdict.lower

    # d is at most 0.09, so two standard errors are 2 sqrt(0.09 / 500) = 2.68 points, a little less with the difference.
    assert lower(2.4) is None
    assert lower(2.8).variant == "bgc"
    assert lower(-2.8).variant == "gc"


def test_too_few_seeds_make_no_final_difference_significant() -> None:
    rows = [converted(variant, 4, s, COPIED, 50.0, 5.0) for variant in ("gc", "bgc") for s in range(2)]
    run = run_of(*rows)
    verdict = run.compare(*run.at_equal_n(COPIED)[0], "final")
    assert verdict is not None
    assert verdict.too_few
    assert verdict.lower is None


def timed(variant: str, groups: int, start: Start, seconds: float, ratio: float | None) -> TransferRow:
    ends = None if ratio is None else (ratio * 0.9, ratio * 1.1)
    phase = Ratio(seconds, (seconds * 0.8, seconds * 1.25), 9, ratio, ends)
    time = NetworkTime({"fwd": phase}, 1, "fp32", "nchw")
    return converted(variant, groups, 0, start, 5.0, time=time)


def test_a_speed_up_is_the_time_of_gc_over_that_of_bgc() -> None:
    run = run_of(timed("gc", 4, COPIED, 0.004, 2.0), timed("bgc", 4, COPIED, 0.002, 4.0),
                 converted("gc", 4, 0, CALIBRATED, 1.0), converted("bgc", 4, 0, CALIBRATED, 1.0))  # fmt: skip
    assert run.phases == ["fwd"]
    for start in run.starts:  # a start does not change the time
        found = run.speed_up(*run.at_equal_n(start)[0], "fwd")
        assert found is not None
        assert found.value == pytest.approx(2.0)
        assert found.ci95 is not None
        assert [found.ci95.low, found.ci95.high] == pytest.approx([3.6 / 2.2, 4.4 / 1.8])


def test_a_speed_up_without_the_untouched_network_is_of_the_medians() -> None:
    run = run_of(timed("gc", 4, COPIED, 0.006, None), timed("bgc", 4, COPIED, 0.002, None))
    found = run.speed_up(*run.at_equal_n(COPIED)[0], "fwd")
    assert found is not None
    assert found.value == pytest.approx(3.0)
    assert found.ci95 is not None
    assert [found.ci95.low, found.ci95.high] == pytest.approx([4.8 / 2.5, 7.5 / 1.6])


def test_a_run_in_the_order_of_its_table() -> None:
    run = run_of(converted("bgc", 2, 0, CALIBRATED, 1.0), converted("gc", 2, 0, CALIBRATED, 1.0),
                 converted("bgc", 2, 0, COPIED, 1.0), converted("gc", 4, 0, COPIED, 1.0),
                 converted("standard", 1, 0, Start("none", False), 1.0, 0.8))  # fmt: skip
    assert [(cell.variant, cell.groups, cell.start.init) for cell in run.cells] == [
        ("standard", 1, "none"), ("bgc", 2, "copy"), ("gc", 2, "calibrated"), ("bgc", 2, "calibrated"),
        ("gc", 4, "copy"),
    ]  # fmt: skip
    assert run.starts == [COPIED, CALIBRATED]
    assert run.control == {0: 0.8}
    assert not run.norms_differ


def test_what_the_layers_of_a_cell_lose_is_the_median_over_layers_and_seeds() -> None:
    def layer(name: str, after: float) -> CalibratedLayer:
        return CalibratedLayer(name, 2, 0.5, 0.25, after, 10, 10, 1.0, 1.0, False, False)

    def calibrated(seed: int, *after: float) -> TransferRow:
        layers = tuple(layer(str(number), lost) for number, lost in enumerate(after))
        record = Record(replaced=(), kept=(), calibration=Calibration(8, 2, seed, True, 0, 1.0, 0, 0, layers))
        return converted("gc", 2, seed, CALIBRATED, 1.0, convert=record)

    run = run_of(calibrated(0, 0.1, 0.9), calibrated(1, 0.2, 0.3))
    assert run.cells[0].lost(lambda layer: layer.after) == pytest.approx(0.25)
    assert run.cells[0].lost(lambda layer: layer.copied) == 0.5


# ----------------------------------------------------------------------------------------------- sampled convolutions


def sampled(variant: str, groups: int, params: int, lost: float, se: float | None = 0.0) -> SampledRow:
    # 10^9 input values, so that inputs scatter by next to nothing.
    about = SampledParams(
        variant=variant,
        groups=groups,
        in_channels=1000,
        out_channels=1000,
        kernel=3,
        dims=2,
        length=100,
        stride=1,
        input="normal",
        samples=100,
        convolutions=1,
        solver="schur",
        precision="fp64",
    )
    return SampledRow(f"{variant}-{groups}", "ok", None, about, Counts(params=params, macs=params), lost, None, lost,
                      se, lost, None, None, None, None, None, None, {})  # fmt: skip


def test_the_front_of_lost_energy_against_a_cost() -> None:
    rows = [sampled("gc", 2, 500, 0.5), sampled("bgc", 2, 1000, 0.0), sampled("gc", 4, 250, 0.75),
            sampled("shuffle", 2, 500, 0.6), sampled("bgc", 8, 250, 0.75)]  # fmt: skip
    assert [row.key for row in front_of(rows, lambda counts: counts.params)] == ["gc-2", "bgc-2", "gc-4", "bgc-8"]


def test_the_uncertainty_of_a_share_adds_convolutions_and_inputs() -> None:
    few = msgspec.structs.replace(sampled("gc", 2, 500, 0.5).params, in_channels=2, length=10, dims=1, samples=10)
    row = msgspec.structs.replace(sampled("gc", 2, 500, 0.5, 0.05), params=few)
    assert lost_se(row) == pytest.approx(0.5 * math.hypot(0.1, math.sqrt(2 / 200)))
