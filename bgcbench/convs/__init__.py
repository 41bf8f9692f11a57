"""The convolution variants: one file each, registered by name in :data:`bgcbench.specs.VARIANTS`."""

from __future__ import annotations

from typing import Any

from bgcbench.convs.base import VariantConv2d
from bgcbench.specs import VARIANTS, ConvSpec, load_layer

__all__ = ["CONVS", "VariantConv2d", "build_conv"]

CONVS: dict[str, type[VariantConv2d]] = {name: load_layer(name) for name in VARIANTS}


def build_conv(spec: ConvSpec, **options: Any) -> VariantConv2d:
    """The layer that ``spec`` describes; ``options`` (device, dtype, padding_mode) go to its constructor."""
    layer: type[VariantConv2d] = load_layer(spec.variant)
    return layer.of(spec, **options)
