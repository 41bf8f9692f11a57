"""What the networks built here share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn


def stages(
    block: Callable[[int, int, int], nn.Module], channels: int, plan: Iterable[tuple[int, int, int]]
) -> nn.Sequential:
    """A stage for each (channels, blocks, stride) of ``plan``, the first on ``channels``; its first block strides.

    block: makes one from its channels in, its channels out and its stride.
    """
    made = nn.Sequential()
    for outside, blocks, stride in plan:
        steps = [(channels, stride), *[(outside, 1)] * (blocks - 1)]
        made.append(nn.Sequential(*(block(inside, outside, step) for inside, step in steps)))
        channels = outside
    return made


def initialise(model: nn.Module) -> None:
    """He initialisation of every convolution with its true fan_in, normal; norms at 1 and 0; linear biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
