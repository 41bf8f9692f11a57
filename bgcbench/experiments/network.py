"""``bgcbench profile --model``: what a whole network costs with its convolutions replaced.

The configuration is pure Python; the plan needs the network and stands in :mod:`bgcbench.experiments.network_run`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from bgcbench.errors import UsageError
from bgcbench.experiments.config import NetworkChoice, PlanChoice
from bgcbench.experiments.options import NETWORK, SIZE, Option, one_of, option
from bgcbench.experiments.profile import MeasureConfig
from bgcbench.specs import NETWORK_PHASES


@dataclass(frozen=True)
class NetworkConfig(PlanChoice, NetworkChoice, MeasureConfig):
    """One network to measure, dense and converted; valid once constructed (raises UsageError or ShapeError).

    layers adds each distinct convolution by itself.
    """

    model: str = option(
        "resnet50",
        "A whole network instead of a layer: resnet50, wrn_28_10, resnext29_8x64d, wide_resnet34_2, any classification "
        "network of torchvision, or timm/NAME.",
    )
    batch: int = option(32)
    phases: tuple[str, ...] = option(None, check=one_of(NETWORK_PHASES, "phase"))
    layers: bool = option(
        False, "Also each distinct convolution by itself: where the time goes, and what would save some.", panel=NETWORK
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (dataclasses.replace(SIZE, shown="the network's own"),)
    USUAL_PHASES: ClassVar[tuple[str, ...]] = NETWORK_PHASES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input_grad:
            raise UsageError("--no-input-grad is for one layer; a network's images take no gradient")
        self._resolve_network()
        self._settle_plan()

    @property
    def is_pointwise(self) -> bool:
        return self.where == "1x1"

    @property
    def what(self) -> str:
        """The workload in a file name."""
        return f"{self.model.replace('/', '-')}-{self.precision}-{self.layout}"
