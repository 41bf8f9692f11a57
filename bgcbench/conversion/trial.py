"""Whether a network still computes the same once its convolutions are layers of another kind.

A forward is any Python: it may ask for a convolution's type, its groups or the shape of its weight, or call one that it
keeps elsewhere. So the exchange is tried: on a copy whose new layers compute what the convolutions in their place did.
Where the outputs are not the original's, more than the convolution has changed, and the layer must stay.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bgcbench.conversion.record import put_in
from bgcbench.conversion.selection import Conv, Reason, describe, does_not_run, first_line, what_to_run
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing
from bgcbench.measure.device import is_out_of_memory
from bgcbench.measure.trace import Trace, clear_hooks
from bgcbench.measure.undisturbed import RandomState, same_outputs, seed_everything, undisturbed
from bgcbench.results.rows import Replaced

BYPASSED = Reason("bypassed", "called from outside of the module tree")
RANDOM = "the network draws random numbers in eval mode: calibration and comparisons give it the same ones every time"
Kernel = tuple[Tensor, Tensor | None]  # weight (m, n, kh, kw) and bias (m,)
UNREPEATABLE = (
    "the network computes something else each time it is run, from the same random state too: what it loses by the "
    "conversion cannot be told from that, and is fitted to it"
)


@contextlib.contextmanager
def standing_in(kernels: Mapping[VariantConv2d, Kernel], calls: Counter[VariantConv2d] | None = None) -> Iterator[None]:
    """Meanwhile each of these layers computes the standard convolution with that weight and bias; ``calls`` counts."""

    def standard(layer: VariantConv2d, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if calls is not None:
                calls[layer] += 1
            return layer._convolve(input, weight, bias, 1)

        return forward

    for layer, kernel in kernels.items():
        layer.forward = standard(layer, *kernel)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in kernels:
            vars(layer).pop("forward", None)


def keep_what_cannot_be_exchanged(
    model: nn.Module,
    convs: Sequence[Conv],
    found: Trace,
    example: Any,
    passing: Passing,
    *,
    fits: bool = False,
) -> list[str]:
    """Give a reason to each chosen one of ``convs`` whose exchange changes more than the convolution; returns notes.

    example: see what_to_run. fits: whether something
    will be fitted to what the network computes, so that it must be known whether it computes the same each time. Raises
    UsageError where only several together change something.
    """
    given, passing = what_to_run(found, example, passing)
    try:
        trial = _Trial(model, given, passing, fits=fits)
    except Exception as problem:
        if given is example and not isinstance(problem, _NotCopied):
            raise does_not_run(problem) from problem
        return [f"whether the network computes the same with other layers could not be tried: {first_line(problem)}"]
    while chosen := [conv for conv in convs if conv.reason is None]:
        reasons = trial.differences([describe(conv) for conv in chosen])
        for conv in chosen:
            conv.reason = reasons.get(conv.name)
        if not reasons:
            break
    return trial.notes


class _NotCopied(Exception):
    """The network cannot be copied."""


class _Trial:
    """The outputs of the original network, and how those of copies with exchanged layers differ from them."""

    def __init__(self, model: nn.Module, given: Any, passing: Passing, *, fits: bool) -> None:
        self.model, self.given, self.passing = model, given, passing
        self.hooks = False  # the user's hooks are left out, unless the network does not run without them
        self.draws = False
        try:
            self.expected = self._run(self._copy())
        except _NotCopied:
            raise
        except Exception:  # noqa: BLE001 - what goes wrong with them as well is raised
            self.hooks = True
            self.expected = self._run(self._copy())
        self.notes = [RANDOM] if self.draws else []
        if (fits or self.draws) and not self._repeats():
            self.notes = [UNREPEATABLE]

    def _repeats(self) -> bool:
        """Whether the original computes the same from the same random state."""
        return same_outputs(self.expected, self._run(self._copy()))

    def _copy(self) -> nn.Module:
        """A copy that shares the parameters, which eval mode leaves alone."""
        try:
            shared = copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})
        except Exception as problem:
            raise _NotCopied(f"it cannot be copied ({first_line(problem)})") from problem
        if not self.hooks:
            clear_hooks(shared)
        return shared

    def _run(self, network: nn.Module) -> Any:
        with undisturbed(network):
            seed_everything(0)
            before = RandomState.of(network)
            output = self.passing(network, self.given)
            self.draws = self.draws or not before.is_now()
            return output

    def differences(self, layers: Sequence[Replaced]) -> dict[str, Reason]:
        """Which of ``layers`` must stay, and why; empty where all of them can be exchanged together."""
        bypassed, problem = self._exchange(layers)
        if bypassed or problem is None:
            return dict.fromkeys(bypassed, BYPASSED)
        alone: dict[str, str | None] = {layers[0].name: problem}
        if len(layers) > 1:
            alone = {layer.name: self._exchange([layer])[1] for layer in layers}
        found = {name: Reason("type_read", text) for name, text in alone.items() if text}
        if not found:
            raise UsageError(
                f"with all of {', '.join(alone)} replaced {problem}; convert fewer of them (include, exclude)"
            )
        return found

    def _exchange(self, layers: Sequence[Replaced]) -> tuple[list[str], str | None]:
        """The layers that the network with ``layers`` put in does not run, and what else is wrong with it."""
        network = put_in(self._copy(), layers, weights=False)
        old, new = dict(self.model.named_modules()), dict(network.named_modules())
        pairs: Any = {new[layer.name]: (old[layer.name].weight, old[layer.name].bias) for layer in layers}
        calls: Counter[VariantConv2d] = Counter()
        try:
            with standing_in(pairs, calls):
                output = self._run(network)
        except Exception as problem:
            if is_out_of_memory(problem):
                raise
            return [], f"the network does not run any more ({first_line(problem)[:160]})"
        if UNREPEATABLE not in self.notes and not same_outputs(self.expected, output):
            if self._repeats():
                return [], "the network computes something else (it asks for the layer's type, groups or shape)"
            self.notes.append(UNREPEATABLE)
        return [layer.name for layer in layers if calls[new[layer.name]] < (layer.calls or 0)], None
