"""Several processes, one a device, that torchrun has started: who this one is, and what they agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bgcbench.errors import BgcbenchError, DeviceError, UsageError
from bgcbench.training.launcher import launched

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class World:
    """``size`` processes, this one being ``rank``; alone by default. device: where its tensors live."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each of ``values`` over all processes, in float64: whole numbers stay exact below 2^53."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def least(self, value: int) -> int:
        """The smallest of the processes' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    def share(self, value: Shared) -> Shared:
        """The main process's ``value``, in every process. The other processes' own is ignored."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]  # type: ignore[return-value]

    def once(self, action: Callable[[], Shared]) -> Shared:
        """What ``action`` returns in the main process, in every process; a BgcbenchError of it is raised in every one.

        Nobody is left waiting for a process that has found something wrong.
        """
        if self.size == 1:
            return action()
        done: tuple[bool, Any] = (True, None)
        if self.is_main:
            try:
                done = True, action()
            except BgcbenchError as error:
                done = False, error
        good, value = self.share(done)
        if not good:
            raise value
        return value  # type: ignore[no-any-return]

    def first(self, action: Callable[[], Shared]) -> Shared:
        """What ``action`` returns in this process; the main one goes first, so that a download is made once."""
        found: list[Shared] = []
        self.once(lambda: found.append(action()))
        return found[0] if found else action()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in one of the processes at least."""
        return self.total([flag])[0] > 0

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers (running statistics), which each has counted for itself."""
        self._send(module.buffers())

    def share_module(self, module: nn.Module) -> None:
        """Give every process the main one's parameters and buffers; ``module`` is built alike in all of them."""
        self._send((*(parameter.detach() for parameter in module.parameters()), *module.buffers()))

    def _send(self, tensors: Iterable[Tensor]) -> None:
        if self.size > 1:
            for tensor in tensors:
                # gloo knows no bool, nccl no layout but the plain one
                sent = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()
                dist.broadcast(sent, src=0)
                if sent is not tensor:
                    tensor.copy_(sent)


def own_device(name: str) -> str:
    """The device for this process: under torchrun each takes the CUDA device of its number on the machine.

    Raises UsageError for one named device for several processes, DeviceError where there are fewer devices.
    """
    found = launched()
    if found is None or found[1] == 1 or name == "cpu":
        return name
    if name.startswith("cuda:"):
        raise UsageError(f"--device {name} is one device for {found[1]} processes; use --device cuda, one for each")
    devices = torch.cuda.device_count()
    if name == "auto" and not devices:
        return "cpu"
    if found[2] >= devices:
        raise DeviceError(
            f"--device {name}: process {found[2]} of this machine finds {devices} CUDA devices; start fewer with "
            "--nproc-per-node, or use --device cpu"
        )
    return f"cuda:{found[2]}"


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """This process among those that torchrun has started, for the block: nccl on CUDA, gloo on a CPU."""
    found = launched()
    if found is None or found[1] == 1:
        yield World(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(found[0], found[1], device)
    finally:
        dist.destroy_process_group()
