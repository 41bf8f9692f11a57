"""What FLGC and LGC share: a structure that training learns, as a masked dense kernel, and a small layer to deploy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.layouts import is_channels_last, like_layout_of

if TYPE_CHECKING:
    from typing_extensions import Self


class MaskedConv2d(VariantConv2d):
    """A variant that finds its sparse structure in training.

    algorithm: two layers with parameters of their own, equal in what they compute:
        'masked'    a dense kernel (m, n, kh, kw) times a 0/1 mask: what is trained; costs what a standard
                    convolution costs
        'deployed'  gathered inputs and the kept weights only: what is run afterwards; its structure is fixed, its
                    weights can still be trained
        'auto'      masked
    :meth:`deploy` makes the second from the first. N = 1 is the standard convolution in both.
    """

    # Names of parameters that weight decay must leave alone (see parameter_groups).
    exempt_from_decay: ClassVar[tuple[str, ...]] = ()

    @property
    def kernel_name(self) -> str:  # type: ignore[override]
        """A masked kernel is dense, in the order of inputs and outputs; a deployed one is packed by groups."""
        return "weight_packed" if self.is_packed else "weight"

    @property
    def is_deployed(self) -> bool:
        """Whether this layer is the deployed one."""
        return self.algorithm == "deployed"

    @property
    def is_packed(self) -> bool:
        """Whether this layer holds packed blocks instead of a dense kernel: deployed, with more than one group."""
        return self.is_deployed and self.groups > 1

    @abstractmethod
    def mask(self) -> Tensor:
        """The 0/1 mask (m, n) that multiplies all taps of the dense kernel."""

    @abstractmethod
    def training_state(self) -> Mapping[str, Tensor]:
        """The tensors that decide what the masked layer computes, by the names that ``project`` uses."""

    def set_progress(self, fraction: float) -> bool:
        """Prune as far as belongs to ``fraction`` (0 to 1) of the training; the training loop calls it at each step.

        Returns whether the layer has changed its structure; only a variant that prunes itself (LGC) ever does.
        """
        return False

    @property
    def is_settled(self) -> bool:
        """Whether the layer has made all the changes to its structure that training is to make (see set_progress)."""
        return True

    def group_lasso(self) -> Tensor | None:
        """The penalty that the variant wants in the loss, to be weighted; a scalar, None where it wants none."""
        return None

    def grouping(self) -> Tensor | None:
        """The learnt groups as whole numbers, to be compared with those at the start; None where there are none."""
        return None

    def learnt(self) -> Mapping[str, float]:
        """What describes the learnt structure (shares from 0 to 1), by name."""
        return {}

    def seen_entries(self) -> Iterator[Tensor]:
        """The entries of the inputs that the mask leaves to each group; groups without any are passed over."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        for kept in torch.unique(self.mask().detach() > 0, dim=0):
            if kept.any():
                yield torch.where(kept.repeat_interleave(taps))[0]

    def masked_kernel(self) -> Tensor:
        """kernel * mask: (m, n, kh, kw)."""
        return self.kernel if self.groups == 1 else self.kernel * self.mask()[:, :, None, None]

    def deploy(self) -> Self:
        """A deployed layer that computes what this one does now; the layer itself if it is one already."""
        if self.is_deployed:
            return self
        layer = self.of(
            replace(self.spec, algorithm="deployed"),
            padding_mode=self.padding_mode,
            device=self.kernel.device,
            dtype=self.kernel.dtype,
        )
        with torch.no_grad():
            layer.load_projected(self.training_state())
            if layer.bias is not None and self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.train(self.training)

    def _convolve_masked(self, x: Tensor) -> Tensor:
        # The convolution follows its kernel's layout where that is another one than x's.
        return self._convolve(x, like_layout_of(x, self.masked_kernel()), self.bias, groups=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Follow the structure that is loaded before the tensors are copied."""
        self._take_structure({name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _take_structure(self, buffers: Mapping[str, Tensor]) -> None:
        """Bring what is derived from the structure's buffers in line with ``buffers``."""


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index, :, :] of x (B, n, H, W) or (n, H, W), in x's layout."""
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(-1, index).permute(0, 3, 1, 2)
    return x.index_select(-3, index)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of ``model`` as optimiser groups: those that decay, and those that must not.

    FLGC's assignments must not decay: decay pulls all logits of a channel together, so the grouping would drift without
    a gradient. Everything else decays, norms and biases too, as in the paper's
    recipes. Use as ``torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.1)``; an empty group is left out.
    """
    exempt = {
        id(getattr(module, name))
        for module in model.modules()
        if isinstance(module, MaskedConv2d)
        for name in module.exempt_from_decay
        if hasattr(module, name)
    }
    parameters = list(model.parameters())
    split = (
        ([p for p in parameters if id(p) not in exempt], weight_decay),
        ([p for p in parameters if id(p) in exempt], 0.0),
    )
    return [{"params": members, "weight_decay": decay} for members, decay in split if members]
