"""ONNX Runtime: the one place that imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bgcbench.errors import UsageError, import_extra

MISSING = "onnxruntime is not installed; pip install 'bgcbench[onnx]'"
CPU = torch.device("cpu")


def version() -> str:
    """Of ONNX Runtime; raises UsageError where it is not installed."""
    return str(import_extra("onnxruntime", MISSING).__version__)


def check_device(device: torch.device) -> None:
    """Raise UsageError where ONNX Runtime does not run on ``device``."""
    if device.type == "cuda" and _CUDA not in import_extra("onnxruntime", MISSING).get_available_providers():
        raise UsageError(
            f"ONNX Runtime as it is installed has no {_CUDA}; pip install onnxruntime-gpu in the place of onnxruntime, "
            "or use --device cpu"
        )


_CUDA = "CUDAExecutionProvider"


class Session:
    """A network in ONNX Runtime on ``device``, with as many CPU threads as torch has.

    model: an ONNX file's bytes. Its threads wait for work no longer than a call lasts, so that they take no time from
    what runs between two calls. On a CUDA device it computes on torch's current stream, without TF32, and what only a
    CPU could do is an error. Raises UsageError without ONNX Runtime.
    """

    def __init__(self, model: bytes, device: torch.device = CPU) -> None:
        runtime = import_extra("onnxruntime", MISSING)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; what is wrong is raised
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.device, self._options = device, runtime.RunOptions()
        provider: Any = "CPUExecutionProvider"
        if device.type == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            # A call only queues its work, as torch's do.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            stream = torch.cuda.current_stream(device).cuda_stream
            given = {"device_id": device.index or 0, "user_compute_stream": stream, "use_tf32": 0}
            provider = (_CUDA, {name: str(value) for name, value in given.items()})
        self._session = runtime.InferenceSession(model, options, providers=[provider])
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for ``inputs``, on the CPU."""
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, feeds)]

    def bound(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """What runs the network on these inputs (float32, contiguous, on its device) where they lie, with nothing
        copied: call it without arguments."""
        binding, index = self._session.io_binding(), self.device.index or 0
        kept = [x.detach() for x in inputs.values()]
        for name, x in zip(inputs, kept, strict=True):
            if self.device.type == "cuda":
                number = torch.empty(0).numpy().dtype.type
                binding.bind_input(name, "cuda", index, number, tuple(x.shape), x.data_ptr())
            else:  # as arrays, which share their memory
                binding.bind_cpu_input(name, x.numpy())
        for name in self.outputs:
            binding.bind_output(name, self.device.type, index)
        return partial(self._run, binding, kept)

    def _run(self, binding: Any, kept: list[Tensor]) -> None:
        """kept: what the binding points to, alive as long as this may be called."""
        self._session.run_with_iobinding(binding, self._options)
