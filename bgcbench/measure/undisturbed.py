"""Run a network without side effects (modes, random states), and find where its numbers stop being finite."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.measure.batches import tensors_of

# Two runs of one computation differ by at most this, relative to the largest output.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDING_OF_HALVES = 2e-2


@dataclass(frozen=True)
class RandomState:
    """The states of the generators that a forward pass may draw from: torch's, Python's and NumPy's global ones."""

    torch_state: Tensor
    cuda_states: dict[int, Tensor]
    python_state: Any
    numpy_state: Any

    @classmethod
    def of(cls, model: nn.Module) -> RandomState:
        """The states now, on the CPU and where ``model`` is."""
        indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        return cls._on(index for index in indices if index is not None)

    @classmethod
    def _on(cls, indices: Iterable[int]) -> RandomState:
        cuda = {index: torch.cuda.get_rng_state(index) for index in indices}
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), cuda, random.getstate(), None if numpy is None else numpy.random.get_state())

    @classmethod
    def seeded(cls, model: nn.Module, seed: int) -> RandomState:
        """The states after seeding; the current ones are restored."""
        with random_state_kept(model):
            seed_everything(seed)
            return cls.of(model)

    def is_now(self) -> bool:
        """Whether these generators have drawn nothing since."""
        now = self.now()
        return (
            torch.equal(self.torch_state, now.torch_state)
            and all(torch.equal(state, now.cuda_states[index]) for index, state in self.cuda_states.items())
            and self.python_state == now.python_state
            and (self.numpy_state is None or all(map(_equal, self.numpy_state, now.numpy_state)))
        )

    def now(self) -> RandomState:
        """The states now of the same generators."""
        return self._on(self.cuda_states)

    def restore(self) -> None:
        torch.set_rng_state(self.torch_state)
        for index, state in self.cuda_states.items():
            torch.cuda.set_rng_state(state, index)
        random.setstate(self.python_state)
        if self.numpy_state is not None:
            sys.modules["numpy"].random.set_state(self.numpy_state)


def _equal(one: Any, other: Any) -> bool:
    """Of parts of NumPy's state: an array among plain values."""
    return bool((one == other).all()) if hasattr(one, "shape") else bool(one == other)


def seed_everything(seed: int) -> None:
    """Set all the generators of RandomState."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random states after the block."""
    before = RandomState.of(model)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block with the network in eval mode and without gradients; restore its mode and the random states."""
    was_training = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.no_grad(), random_state_kept(model):
            model.eval()
            yield
    finally:
        for name, module in model.named_modules():
            module.training = was_training.get(name, module.training)


def same_outputs(one: Any, other: Any) -> bool:
    """Whether two outputs of a network are equal but for rounding."""
    ours, theirs = list(tensors_of(one)), list(tensors_of(other))
    return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta:
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    if not finite.any():
        return True
    allowed = ROUNDING.get(a.dtype, ROUNDING_OF_HALVES) * float(a[finite].abs().max())
    return float((a[finite] - b[finite]).abs().max()) <= allowed


def first_not_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Where the numbers of a forward pass first stop being finite, in words; None where they never do.

    run: runs ``model`` once. The innermost module that makes numbers that are not finite out of such as are is named,
    and what is wrong with its own: "layer1.bn1 puts out numbers that are not finite (running_var has negative ones)".
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
            if found or _are_finite(tensors_of(output)):
                return
            given = _are_finite(tensors_of((arguments, options)))
            what = f"{name or 'the network'} puts out" if given else f"what comes to {name or 'the network'} has"
            found.append(f"{what} numbers that are not finite{_damage(module)}")

        return leave

    # Innermost first: a module is left before the one around it.
    handles = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        with undisturbed(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _are_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values if value.is_floating_point())


def _damage(module: nn.Module) -> str:
    """What is wrong with the module's own numbers, in brackets; nothing where all are sound."""
    own = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
    bad = [f"{name} holds such" for name, value in own.items() if not _are_finite([value])]
    variance = own.get("running_var")
    bad += ["running_var has negative ones"] if variance is not None and bool((variance < 0).any()) else []
    return f" ({', '.join(bad)})" if bad else ""
