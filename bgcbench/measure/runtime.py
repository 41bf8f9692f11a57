"""ONNX Runtime: the one place that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bgcbench.errors import DeviceError, import_extra

MISSING = "onnxruntime is not installed; pip install 'bgcbench[onnx]'"


def version() -> str:
    """Of ONNX Runtime; raises UsageError where it is not installed."""
    return str(import_extra("onnxruntime", MISSING).__version__)


class Session:
    """A network in ONNX Runtime on ``device``, with as many threads as torch has.

    model: an ONNX file's bytes. Its threads wait for work no longer than a call lasts, so that they take no time from
    what runs between two calls. Raises UsageError without ONNX Runtime, DeviceError where it cannot use a CUDA device.
    """

    def __init__(self, model: bytes, device: torch.device | None = None) -> None:
        runtime = import_extra("onnxruntime", MISSING)
        self.device = device or torch.device("cpu")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; what is wrong is raised
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device.type == "cuda":
            check_cuda()
            providers = [("CUDAExecutionProvider", {"device_id": self.device.index or 0, "use_tf32": 0}), *providers]
        self._session = runtime.InferenceSession(model, options, providers=providers)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for ``inputs``, on the CPU."""
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, feeds)]

    def bound(self, inputs: Mapping[str, Tensor]) -> Any:
        """What runs the network on these inputs where they lie, with nothing copied: call it without arguments."""
        binding, kind = self._session.io_binding(), self.device.type
        number = self.device.index or 0
        for name, x in inputs.items():
            binding.bind_input(name, kind, number, _NUMPY[x.dtype], tuple(x.shape), x.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, kind, number)
        run, kept = self._session.run_with_iobinding, tuple(inputs.values())

        def call() -> object:
            run(binding)
            return kept

        return call


_NUMPY = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.int64: "int64"}


def check_cuda() -> None:
    """Raise DeviceError unless the installed ONNX Runtime has a provider for CUDA, UsageError without it."""
    found = import_extra("onnxruntime", MISSING).get_available_providers()
    if "CUDAExecutionProvider" not in found:
        raise DeviceError(
            "this onnxruntime has no CUDA provider; pip install onnxruntime-gpu in its place, or use --device cpu"
        )
