"""Whether a tracer, compiler or transform records the single operations on a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad

from bgcbench.kernels import constant_result

# What torch.compiler.is_exporting() reads, which compiled code of 2.11 is told to be True. torch 2.6 has the other one
# alone, set where it exports without Dynamo; with Dynamo it compiles.
_EXPORTING = "_is_exporting_flag" if hasattr(torch.compiler, "_is_exporting_flag") else "_is_compiling_flag"
_PROXY = torch._C._TorchDispatchModeKey.PROXY  # the mode of torch.fx.experimental.proxy_tensor.make_fx


def is_symbolic(x: Any) -> bool:
    """Whether x only stands for a tensor (``torch.fx.symbolic_trace``): shape, type and layout are not known."""
    return isinstance(x, fx.Proxy)


def is_recorded(x: Any) -> bool:
    """Whether torch.jit.trace, torch.fx, torch.export or torch.onnx records the operations on x for another program.

    That program may lack kernels of our own, and should be the same one every time."""
    if torch.compiler.is_compiling():
        return bool(getattr(torch.compiler, _EXPORTING))
    if torch._C._get_tracing_state() is not None or torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    return is_symbolic(x)


@constant_result  # Dynamo compiles anew under a transform
def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) or forward-mode differentiation is at work, which in-place
    operations and gradients written by hand may not suit."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_followed(x: Any) -> bool:
    """Whether anything records, compiles or transforms the single operations on x."""
    return torch.compiler.is_compiling() or is_recorded(x) or is_transformed()
