"""ONNX Runtime: the one place that imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from bgcbench.errors import import_extra

MISSING = "onnxruntime is not installed; pip install 'bgcbench[onnx]'"


def version() -> str:
    """Of ONNX Runtime; raises UsageError where it is not installed."""
    return str(import_extra("onnxruntime", MISSING).__version__)


class Session:
    """A network in ONNX Runtime on the CPU, with as many threads as torch has.

    model: an ONNX file's bytes. Its threads wait for work no longer than a call lasts, so that they take no time from
    what runs between two calls. Raises UsageError without ONNX Runtime.
    """

    def __init__(self, model: bytes) -> None:
        runtime = import_extra("onnxruntime", MISSING)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; what is wrong is raised
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for ``inputs``."""
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, feeds)]

    def bound(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """What runs the network on these inputs where they lie, with nothing copied: call it without arguments."""
        binding = self._session.io_binding()
        for name, x in inputs.items():  # bound as arrays, which share their memory and keep it alive
            binding.bind_cpu_input(name, x.detach().numpy())
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        return partial(self._session.run_with_iobinding, binding)
