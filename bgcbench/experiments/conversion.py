"""``bgcbench convert``: one conversion of one network, into a file. No torch here.

:mod:`bgcbench.experiments.conversion_run` carries it out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bgcbench.errors import UsageError
from bgcbench.experiments.approx import ApproxNetworkConfig
from bgcbench.experiments.config import ConvertedNetwork, ImageChoice
from bgcbench.experiments.options import (
    CONVERSION,
    MEASURE,
    NETWORK,
    Option,
    check_options,
    form_option,
    images_option,
    one_of,
    option,
    positive,
    weights_option,
)
from bgcbench.specs import DATA_SETS, HELD_OUT, PLANNED, RANKED, SOLVED, VARIANTS, Choice, is_own

INITS = ("copy", "white", *SOLVED)


@dataclass(frozen=True)
class ConversionConfig(ImageChoice, ConvertedNetwork):
    """One network, what its convolutions become, and with which weights; valid once constructed.

    plan: of each convolution by name, in the place of variant, groups, rank and of which are replaced. init: None for
    calibrated where there are images, and white without. Raises UsageError or ShapeError.
    """

    model: str = option(
        "", "resnet50, wrn_28_10, any classification network of torchvision, timm/NAME, or your own: net.py:make."
    )
    variant: str | None = option(
        None, "What they become.", short="v", panel=CONVERSION, everyday=True, shown="bgc",
        check=one_of([name for name in VARIANTS if name != "standard"], "variant"),
    )  # fmt: skip
    groups: int | None = option(
        None, "N.", short="g", panel=CONVERSION, everyday=True, shown="4; none with --rank", check=positive
    )
    rank: int | None = option(None, "Rank of low rank, in place of N.", panel=CONVERSION, check=positive)
    plan: Mapping[str, Any] | None = option(
        None,
        "What each becomes: plan.json of bgcbench plan --save, or its result file.",
        panel=CONVERSION,
        everyday=True,
    )
    init: str | None = option(
        None,
        "How the weights are found: calibrated (on --data), refit (so are the convolutions that stay), white (closed "
        "form), copy.",
        panel=CONVERSION,
        everyday=True,
        shown="calibrated with --data, white without",
        check=one_of(INITS, "init"),
    )
    weights: str | None = weights_option()
    data: str = images_option(
        "Images to calibrate with, without labels: digits, a folder of images, or your own: data.py:load."
    )
    calibration_images: int = option(256, "How many of them; one in four is held out to choose by.", panel=NETWORK)
    skip_invalid: bool = option(False, "Keep dense what N or the rank does not fit.", panel=CONVERSION)
    seed: int = option(0, panel=MEASURE)

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (
        dataclasses.replace(ApproxNetworkConfig.SHORTHANDS[0], shown="the network's own"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.model:
            raise UsageError("name a MODEL to convert, such as resnet50")
        if self.plan is not None:
            for name in ("variant", "groups", "rank"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--plan says what each convolution becomes; leave --{name} out")
        elif self.variant is None:
            object.__setattr__(self, "variant", "bgc")
        self._settle_plan()
        if self.rank is not None and self.groups is not None:
            raise UsageError(f"--rank {self.rank} stands in place of --groups {self.groups}; leave one of them out")
        if self.rank is not None and self.variant not in RANKED:
            raise UsageError(f"--rank is for {' and '.join(RANKED)}, not for {self.variant}; give --groups N")
        if self.plan is None and self.rank is None and self.groups is None:
            object.__setattr__(self, "groups", 4)
        if self.init is None:
            object.__setattr__(self, "init", "calibrated" if self.data else "white")
        if self.init in SOLVED and not self.data:
            raise UsageError(f"--init {self.init} needs images: --data digits, or --data FOLDER")
        if self.data and self.calibration_images < HELD_OUT:
            raise UsageError(f"--calibration-images {self.calibration_images} must be at least {HELD_OUT}")
        self._check_images(self.weights or "default", in_memory=self.data in DATA_SETS or is_own(self.data))
        self._resolve_network()

    @property
    def choices(self) -> list[Choice]:
        return [PLANNED if self.plan is not None else Choice(self.variant or "bgc", self.groups or 1, self.rank)]


@dataclass(frozen=True)
class AskedOfConversion:
    """Where the network goes, and what is shown."""

    out: str | None = option(None, "The converted network, for bgcbench.load_converted.", short="o", everyday=True)
    force: bool = option(False, "Replace an existing --out file.")
    form: str = form_option()
    quiet: bool = option(False, "No notes on stderr.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.out is None:
            raise UsageError("name the file for the converted network: -o FILE")

    @property
    def path(self) -> Path:
        return Path(self.out or "")
