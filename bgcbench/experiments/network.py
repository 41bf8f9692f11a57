"""``bgcbench profile --model``: what a whole network costs with its convolutions replaced.

The configuration is pure Python; the plan needs the network and stands in :mod:`bgcbench.experiments.network_run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bgcbench.errors import UsageError
from bgcbench.experiments.config import NetworkChoice
from bgcbench.experiments.profile import MeasureConfig
from bgcbench.specs import NETWORK_PHASES


@dataclass(frozen=True)
class NetworkConfig(NetworkChoice, MeasureConfig):
    """One network to measure, dense and converted; valid once constructed (raises UsageError or ShapeError).

    layers adds each distinct convolution by itself.
    """

    batch: int = 32
    phases: tuple[str, ...] = NETWORK_PHASES
    layers: bool = False

    PHASES: ClassVar[tuple[str, ...]] = NETWORK_PHASES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input_grad:
            raise UsageError("--no-input-grad is for one layer; a network's images take no gradient")
        self._resolve_network()

    @property
    def is_pointwise(self) -> bool:
        return self.where == "1x1"

    @property
    def what(self) -> str:
        """The workload in a file name."""
        return f"{self.model.replace('/', '-')}-{self.precision}-{self.layout}"
