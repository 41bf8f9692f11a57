"""ONNX files: written by torch's exporters, read to see what is in them. The one place that imports onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.errors import BgcbenchError, import_extra

STANDARD = ("", "ai.onnx")


def check_packages(exporter: str) -> None:
    """Raise UsageError where a package is missing that writing an ONNX file, and checking it, takes."""
    for package in ("onnx", "onnxruntime", *(["onnxscript"] if exporter == "dynamo" else [])):
        import_extra(package, f"{package} is not installed; pip install 'bgcbench[onnx]'")


def written(
    model: nn.Module,
    args: tuple[Tensor, ...],
    names: tuple[Sequence[str], Sequence[str]],
    dynamic: Sequence[bool],
    *,
    exporter: str,
    opset: int,
) -> bytes:
    """``model`` on ``args`` as an ONNX file with all its weights inside.

    names: of its inputs and of its outputs. dynamic: which inputs begin with the batch, of any size; with one, all
    outputs do. Raises whatever the exporter raises, and BgcbenchError for a file that is not of ``opset``.
    """
    onnx = import_extra("onnx", "onnx is not installed; pip install 'bgcbench[onnx]'")
    shared: dict[str, Any] = {
        "input_names": list(names[0]),
        "output_names": list(names[1]),
        "opset_version": opset,
        "verbose": False,
    }
    with torch.no_grad(), quiet():
        if exporter == "dynamo":
            shapes = dynamic_shapes(dynamic)
            program: Any = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=shapes, **shared)
            proto = program.model_proto
        else:
            file: Any = io.BytesIO()
            batched = [name for name, is_batched in zip(names[0], dynamic, strict=True) if is_batched]
            axes = {name: {0: "batch"} for name in (*batched, *(names[1] if batched else ()))}
            torch.onnx.export(model, args, file, dynamo=False, dynamic_axes=axes, **shared)
            proto = onnx.load_from_string(file.getvalue())
    for node in proto.graph.node:  # from which line of whose source code it comes
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    found = next(entry.version for entry in proto.opset_import if entry.domain in STANDARD)
    if found != opset:
        raise BgcbenchError(f"opset {opset} was asked for, and torch {torch.__version__} writes {found}; ask for that")
    content: bytes = proto.SerializeToString()
    return content


def dynamic_shapes(dynamic: Sequence[bool]) -> tuple[Any, ...] | None:
    """The same for torch.export: the first axis of these inputs is one number that is not known."""
    batch = torch.export.Dim("batch")
    return tuple({0: batch} if is_batched else None for is_batched in dynamic) if any(dynamic) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print, log and warn of; what is wrong with a file is found by running it."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def part_of(content: bytes, output: str) -> bytes:
    """The nodes of an ONNX file that ``output`` depends on, with the inputs that they read, as a file of their own."""
    onnx = import_extra("onnx", "onnx is not installed; pip install 'bgcbench[onnx]'")
    proto = onnx.load_from_string(content)
    makers = {name: node for node in proto.graph.node for name in node.output}
    wanted, read = [output], set()
    while wanted:
        node = makers.get(name := wanted.pop())
        if node is None:
            read.add(name)
        else:
            wanted.extend(node.input)
    inputs = [value.name for value in proto.graph.input if value.name in read]
    part: bytes = onnx.utils.Extractor(proto).extract_model(inputs, [output]).SerializeToString()
    return part


def nodes_in(content: bytes) -> dict[str, int]:
    """How many nodes of which operator an ONNX file has, the most frequent first; raises BgcbenchError for custom ones.

    A file that ONNX's own checker refuses raises what that raises.
    """
    onnx = import_extra("onnx", "onnx is not installed; pip install 'bgcbench[onnx]'")
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto)
    custom = {f"{node.domain}::{node.op_type}" for node in proto.graph.node if node.domain not in STANDARD}
    custom |= {f"{function.domain}::{function.name}" for function in proto.functions}
    if custom:
        raise BgcbenchError(f"the ONNX file needs operators that are not ONNX's own: {', '.join(sorted(custom))}")
    return dict(Counter(node.op_type for node in proto.graph.node).most_common())
