"""``bgcbench plan``: what each convolution of a network becomes for one budget, and the proof. No torch here.

:mod:`bgcbench.experiments.plan_run` carries it out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from bgcbench.errors import UsageError
from bgcbench.experiments.approx import ApproxNetworkConfig
from bgcbench.experiments.options import GRID, MEASURE, NETWORK, Option, one_of, option, positive
from bgcbench.planning import PLAN_MODES, TRIED, asked_for
from bgcbench.specs import LAYOUTS, NETWORK_PHASES, RUNTIME, check_in_runtime, check_on_cpu


def _share(field: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"--{field} {value:g} must be above 0 and at most 1: a share of what is there")


@dataclass(frozen=True)
class PlanConfig(ApproxNetworkConfig):
    """One network, its images, one budget and what is tried; valid once constructed (raises UsageError or ShapeError).

    params, macs, time, loss: of them one or none; see :func:`bgcbench.plan`. mode, phase, precision, layout, batch: of
    a call that is timed.
    test_images: never used to plan, to compare the planned network with the original one.
    """

    model: str = option("", "resnet50, wrn_28_10, any classification network of torchvision, or timm/NAME.")
    variants: tuple[str, ...] = option(TRIED)
    params: float | None = option(
        None, "Keep at most this share of the convolutions' parameters.", panel=GRID, everyday=True, check=_share
    )
    macs: float | None = option(None, "Of their multiply-adds.", panel=GRID, everyday=True, check=_share)
    time: float | None = option(None, "Of the network's time, measured here.", panel=GRID, everyday=True, check=_share)
    loss: float | None = option(
        None, "The fewest MACs with at most this predicted loss.", panel=GRID, everyday=True, check=_share
    )
    quick: bool = option(False, "A look: fewer images, rounds and networks. No claim.")
    device: str = option("auto", everyday=False)
    weights: str | None = option(None, everyday=False)
    most_variants: int | None = option(
        None, "Use so many different variants at most.", panel=GRID, check=positive, shown="all"
    )
    precision: str = option("fp32", "What is timed: fp32, tf32, bf16 or fp16.")
    layout: str = option(
        "nchw", "nchw, or nhwc (channels_last): of what is timed.", panel=MEASURE, check=one_of(LAYOUTS)
    )
    mode: str = option(
        "eager",
        "What is timed runs in eager PyTorch, compile (torch.compile) or onnxruntime (extra: onnx).",
        panel=MEASURE,
        check=one_of(PLAN_MODES, "mode"),
    )
    phase: str = option(
        "fwd", "What is timed: fwd (inference) or train_step.", panel=MEASURE, check=one_of(NETWORK_PHASES, "phase")
    )
    batch: int = option(8, "Images of a call that is timed.", panel=MEASURE)
    test_images: int = option(
        512, "Images to compare with, none of which is planned on.", panel=NETWORK, check=positive
    )
    skip_invalid: bool = option(True, hidden=True)
    save: str | None = option(
        None, "A folder for plan.json, which you can edit, and the planned network.", panel=NETWORK, everyday=True
    )

    measured: str | None = option(
        None, "Take costs and losses from this plan's result file, such as for another budget.", panel=MEASURE
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = tuple(
        dataclasses.replace(each, everyday=False) for each in ApproxNetworkConfig.SHORTHANDS
    )
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "bf16", "fp16")
    FREE: ClassVar[tuple[str, ...]] = ("memory_gib", "save", "measured")
    # What is chosen by and compared with, once costs and losses are known.
    AFTERWARDS: ClassVar[frozenset[str]] = frozenset(
        ("params", "macs", "time", "loss", "most_variants", "test_images", "save", "measured", "memory_gib", "device")
    )

    # What times are of, and losses are not.
    OF_TIMES: ClassVar[tuple[str, ...]] = ("mode", "phase", "precision", "layout", "batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked_for(self._budgets, "--")
        if self.device == "cpu":
            check_on_cpu(self.precision, self.mode)
        if self.mode == RUNTIME:
            check_in_runtime(phase=self.phase, precision=self.precision, layout=self.layout)

    @property
    def _budgets(self) -> dict[str, float | None]:
        return {"params": self.params, "macs": self.macs, "time": self.time, "loss": self.loss}

    @property
    def budget(self) -> tuple[str, float]:
        """Its kind and how much; all MACs where none is asked for: then everything stays, and there is the curve."""
        return asked_for(self._budgets)
