"""``bgcbench approx --model``: what each convolution of a network loses, on the inputs that the network gives it.

The configuration is pure Python; :mod:`bgcbench.experiments.approx_network_run` computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from bgcbench.errors import UsageError
from bgcbench.experiments.config import ImageChoice, NetworkChoice, RunConfig
from bgcbench.experiments.options import NETWORK, SIZE, Option, images_option, option, positive, weights_option
from bgcbench.specs import DATA_SETS, DIGITS_PX, HELD_OUT, NetSpec, is_own


@dataclass(frozen=True)
class ApproxNetworkConfig(ImageChoice, NetworkChoice, RunConfig):
    """One network, its weights and the images to calibrate with; valid once constructed.

    weights: a file, 'default' (torchvision's published ones), 'none' (untrained), or None: default where there are any.
    data: a data set's name or a folder of images; digits are 16 px high for networks of up to 32 px.
    memory_gib: what the second moments may take at once. Raises UsageError or ShapeError.
    """

    model: str = option(
        "resnet50",
        "Ask every convolution of this network, on its own activations: resnet50, wrn_28_10, any classification "
        "network of torchvision, or timm/NAME.",
    )
    num_classes: int | None = option(None, "Classes of the network.")
    variants: tuple[str, ...] = option(("gc", "bgc"))
    groups: tuple[int, ...] = option((2, 4, 8, 16))
    precision: str = option("fp64")
    weights: str | None = weights_option()
    data: str = images_option("Images to run through it: digits, a folder of images, or your own: data.py:load.")
    calibration_images: int = option(
        None, "How many of them; one in four is held out to evaluate.", panel=NETWORK, shown="256"
    )
    batch: int = option(32, "Images at a time.", panel=NETWORK, check=positive)
    memory_gib: float = option(
        4.0,
        "GiB that the second moments may take; more layers than fit are done in several runs over the images.",
        name="memory",
        panel=NETWORK,
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (
        dataclasses.replace(
            SIZE,
            help="Their height and width: 224 or 224x160.",
            panel=NETWORK,
            everyday=False,
            shown="the network's own; 16 for digits and small networks",
        ),
    )
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp64",)
    FREE: ClassVar[tuple[str, ...]] = ("batch", "memory_gib", "threads")

    def __post_init__(self) -> None:
        if self.calibration_images is None:
            object.__setattr__(self, "calibration_images", 32 if self.quick else 256)
        super().__post_init__()
        if not self.data:
            raise UsageError("--model needs images to run: --data digits, or --data FOLDER of images")
        if self.calibration_images < HELD_OUT:
            raise UsageError(
                f"--calibration-images {self.calibration_images} must be at least {HELD_OUT}: one in four is held out"
            )
        if not 0 < self.memory_gib < float("inf"):
            raise UsageError(f"--memory {self.memory_gib} must be a positive number of GiB")
        if not self.choices:
            raise UsageError("a standard convolution (N = 1) loses nothing; name another variant and N of 2 or more")
        self._check_images(self.weights or "default", in_memory=self.data in DATA_SETS or is_own(self.data))
        self._resolve_network()

    @property
    def spec(self) -> NetSpec:
        """The network."""
        height, width = self.height, self.width
        own = NetSpec(self.model, self.num_classes, height, width, self.stem_stride)
        if height is None and self.data == "digits" and own.size[1] <= 32:
            own = NetSpec(self.model, self.num_classes, DIGITS_PX, DIGITS_PX, self.stem_stride)
        return own

    @property
    def what(self) -> str:
        """The workload in a file name."""
        return f"{self.model}-{self.data.rstrip('/').rpartition('/')[2]}"
