"""``bgcbench profile --model``: what a whole network costs with its convolutions replaced.

The configuration is pure Python; the plan needs the network and stands in :mod:`bgcbench.experiments.network_run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bgcbench.errors import UsageError
from bgcbench.experiments.profile import MeasureConfig
from bgcbench.specs import NETWORK_PHASES, WHERE, NetSpec, check_choice


@dataclass(frozen=True)
class NetworkConfig(MeasureConfig):
    """One network to measure, dense and converted; valid once constructed (raises UsageError or ShapeError).

    height, width, num_classes and stem_stride are None for the network's own; where, include and exclude choose the
    convolutions as in :func:`bgcbench.convert`. layers adds each distinct convolution by itself.
    """

    batch: int = 32
    phases: tuple[str, ...] = NETWORK_PHASES
    model: str = "resnet50"
    height: int | None = None
    width: int | None = None
    num_classes: int | None = None
    stem_stride: int | None = None
    where: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: bool = False

    PHASES: ClassVar[tuple[str, ...]] = NETWORK_PHASES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, WHERE)
        if not self.input_grad:
            raise UsageError("--no-input-grad is for one layer; a network's images take no gradient")
        spec = self.spec
        for name in ("height", "width", "num_classes", "stem_stride"):  # written out, so that a file says what ran
            object.__setattr__(self, name, getattr(spec, name))

    @property
    def spec(self) -> NetSpec:
        """The network."""
        return NetSpec(self.model, self.num_classes, self.height, self.width, self.stem_stride)

    @property
    def what(self) -> str:
        """The workload in a file name."""
        return f"{self.model.replace('/', '-')}-{self.precision}-{self.layout}"
