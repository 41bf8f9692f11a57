"""Batch norm folded into the convolution before it, for inference: a layer less to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bgcbench.conversion.record import copied, exchanged
from bgcbench.conversion.selection import checked_example, look, what_to_run
from bgcbench.conversion.survey import is_norm, survey
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Forward, Passing
from bgcbench.measure.undisturbed import undisturbed

PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # which are norms and nothing besides


def fold_norms(
    model: nn.Module, *, example_input: Any = None, forward_fn: Forward | None = None, inplace: bool = False
) -> nn.Module:
    """The network in eval mode with every batch norm that stands right behind a convolution folded into it.

        gamma (y - mean) / sqrt(var + eps) + beta  =  s y + t,    s = gamma / sqrt(var + eps),    t = beta - s mean

    Of a variant s scales all kernels (both branches of BGC), output by output, and t goes into its bias. An identity
    takes the norm's place, or what it does besides (timm's norms activate, too). A norm is folded where nothing else
    takes the convolution's output and both run once in a forward pass; to see that, the network is run on
    ``example_input``, by ``forward_fn`` (both as in :func:`bgcbench.convert`). A conversion is to be saved before its
    norms are folded. Raises UsageError where the network cannot be run.

    Other programs that fold norms take ``weight``, ``bias`` and ``groups`` for all that a convolution is. Layers that
    are more than that have no ``weight``, so those programs end with an error.
    """
    passing = Passing(forward_fn)
    example = example_input if forward_fn is not None else checked_example(example_input)
    found, notes = look(model, example, passing)
    if found is None:
        raise UsageError(notes[0])
    given, passing = what_to_run(found, example, passing)
    network = (model if inplace else copied(model)).eval()
    modules = dict(network.named_modules())
    convs = {name for name, module in modules.items() if type(module) is nn.Conv2d or isinstance(module, VariantConv2d)}
    with undisturbed(network):
        seen = survey(network, convs, lambda: passing(network, given))
    put: dict[int, nn.Module] = {}
    for name, follower in seen.norms.items():
        conv, norm = modules[name], modules[follower]
        besides = _besides(norm)
        if besides is None or seen.calls[name] != 1 or seen.calls[follower] != 1:
            continue
        _fold(conv, norm)
        put[id(norm)] = besides.eval()
    return exchanged(network, put)


def _besides(norm: nn.Module) -> nn.Module | None:
    """What a norm does besides normalising; None where that cannot be told."""
    if type(norm) in PLAIN_NORMS:
        return nn.Identity()
    if is_norm(norm) and type(norm).__module__.startswith("timm."):
        parts = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
        return nn.Sequential(*parts)
    return None


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
    if isinstance(conv, nn.Conv2d):
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        return
    scale: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -scale * norm.running_mean
    conv.fold_affine(scale, shift if norm.bias is None else shift + norm.bias)
