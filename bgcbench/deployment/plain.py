"""A network made ready to leave: learnt variants deployed, norms folded, variants made of torch.nn parts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bgcbench.conversion.folding import fold_norms
from bgcbench.conversion.record import copied, exchanged
from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.masked import MaskedConv2d
from bgcbench.errors import UsageError
from bgcbench.specs import PLAIN_ALGORITHMS, check_choice


def settled(model: nn.Module, example: Any) -> nn.Module:
    """A copy of ``model`` in eval mode with LGC and FLGC deployed and batch norm folded (see ``fold_norms``).

    Raises UsageError for a layer that is not yet what it will be, by name.
    """
    network = copied(model).eval()
    fresh: dict[int, nn.Module] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, MaskedConv2d):
            try:
                fresh[id(layer)] = layer.deploy()
            except UsageError as problem:
                raise UsageError(f"{name or 'the layer'}: {problem}") from None
    return fold_norms(exchanged(network, fresh), example_input=example, inplace=True)


def variants_in(model: nn.Module) -> dict[str, VariantConv2d]:
    """The layers of variants in ``model`` by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VariantConv2d)}


def chosen_algorithms(model: nn.Module, algorithm: str) -> dict[str, str]:
    """``algorithm`` for every layer that has it; for the others, and with 'auto', the one that multiplies least.

    Raises UsageError for an algorithm that no layer of ``model`` has.
    """
    layers = variants_in(model)
    if algorithm != "auto":
        check_choice("algorithm", algorithm, PLAIN_ALGORITHMS)
        if not any(algorithm in layer.spec.plain for layer in layers.values()):
            there = dict.fromkeys(name for layer in layers.values() for name in layer.spec.plain)
            offered = f"they have {', '.join(there)}" if there else "the network has no layer of a variant"
            raise UsageError(f"algorithm '{algorithm}' is of none of the network's layers; {offered}; or use 'auto'")
    return {name: algorithm if algorithm in layer.spec.plain else least_work(layer) for name, layer in layers.items()}


def least_work(layer: VariantConv2d) -> str:
    """The plain algorithm with the fewest weights, one convolution where that has no more than others."""

    def weights(algorithm: str) -> int:
        return sum(weight.numel() for weight in layer.plain(algorithm).parameters())

    return min(layer.spec.plain, key=lambda algorithm: (weights(algorithm), algorithm != "dense"))


def made_plain(model: nn.Module, algorithms: Mapping[str, str]) -> nn.Module:
    """A copy of ``model`` with its layers of variants (by name) made of standard operations by these algorithms."""
    network = copied(model)
    layers = variants_in(network)
    put: dict[int, nn.Module] = {id(layer): layer.plain(algorithms[name]) for name, layer in layers.items()}
    for module in network.modules():
        if type(module).__name__ == "StochasticDepth":  # torchvision's, which does nothing outside of training
            put[id(module)] = nn.Identity()
    return exchanged(network, put)


def counted(algorithms: Iterable[str]) -> dict[str, int]:
    """How many layers run which algorithm, the most used first."""
    return dict(Counter(algorithms).most_common())
