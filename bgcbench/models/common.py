"""What the networks built here share."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module) -> None:
    """He initialisation of every convolution with its true fan_in, normal; norms at 1 and 0; linear biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
