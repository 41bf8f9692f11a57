"""``bgcbench.export``: a network in a file that runs without bgcbench, checked against the network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.conversion.record import Converted, copied
from bgcbench.conversion.selection import checked_example, look, what_to_run
from bgcbench.deployment.fastest import fastest_algorithms
from bgcbench.deployment.paths import files_of
from bgcbench.deployment.plain import chosen_algorithms, counted, made_plain, settled
from bgcbench.deployment.targets import CodeTarget, Inputs, OnnxTarget, ProgramTarget, Run, Target
from bgcbench.errors import BgcbenchError, OutputError, UsageError
from bgcbench.measure.batches import Passing, copied_to, reference_of, tensors_of
from bgcbench.results import write_atomically
from bgcbench.specs import EXPORTERS, OPSET, OUTPUT_TOLERANCE, check_choice, check_positive

TRIED = (1, 3)  # images of the random inputs that a file for any batch is tried on
LEAST_SPREAD = 1e-3  # of outputs from image to image; an untrained network may have less


@dataclass(frozen=True)
class Exported:
    """What was written; ``str()`` says it in one line.

    paths: the files. algorithms: of the layers of variants, by name. nodes: how many of which operator ('torch': of
    which part). error, spread: see :class:`Compared`, on ``tried`` inputs. seconds: of the networks compared where the
    algorithms were chosen by measuring in ONNX Runtime, by what they were made of.
    """

    to: str
    paths: tuple[Path, ...]
    algorithms: Mapping[str, str]
    nodes: Mapping[str, int]
    error: float
    spread: float
    tried: int
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        most = ", ".join(f"{count} {name}" for name, count in list(self.nodes.items())[:4])
        line = (
            f"{' and '.join(map(str, self.paths))}: {sum(self.nodes.values())} nodes ({most}); outputs within "
            f"{self.error:.1e} of the network's on {self.tried} inputs"
        )
        if self.algorithms:
            found = ", ".join(f"{count} {name}" for name, count in counted(self.algorithms.values()).items())
            line += f"; algorithms: {found}"
        if len(self.seconds) > 1:
            line += f"; in ONNX Runtime {', '.join(f'{name} {s * 1e3:.3g} ms' for name, s in self.seconds.items())}"
        if self.spread < LEAST_SPREAD:
            line += f"; they hardly depend on the images ({self.spread:.0e} of their norm), so that this says little"
        return line


def export(
    model: nn.Module | Converted,
    path: str | PathLike[str],
    to: str = "onnx",
    *,
    example_input: Any = None,
    algorithm: str = "auto",
    batch: int | None = None,
    exporter: str = EXPORTERS[0],
    opset: int = OPSET,
    tolerance: float = OUTPUT_TOLERANCE,
    force: bool = False,
) -> Exported:
    """Write ``model`` to ``path`` such that it runs without bgcbench, and check that it computes the same.

    to:
        'onnx'      an ONNX file (.onnx), weights inside, of standard operators alone
        'torch'     a state dict (.pt) for ``torch.load(weights_only=True)``, and beside it, as .py, the module of
                    torch.nn parts that it belongs to: code to read, to train on, to quantise
        'exported'  torch.export's file (.pt2) for ``torch.export.load(path).module()``

    The network is written in eval mode: LGC and FLGC deployed, batch norm folded, and every layer of a variant as
    standard operations, by ``algorithm`` where the layer has it (see VariantConv2d.plain). 'auto' is for ONNX what is
    the fastest in ONNX Runtime here, on one image or on ``batch``, with as many threads as torch has; otherwise what
    multiplies least. ``model`` itself stays as it is.

    example_input: (channels, height, width) of an image, or what the network is called with, a tensor or a tuple of
    them; such inputs are tried besides random ones. The first axis is the batch, which may have any size in the file
    unless ``batch`` fixes it; other sizes are fixed. exporter: 'dynamo' or 'torchscript', both torch's. opset: ONNX's.
    tolerance: the largest ||y - y'|| / ||y|| between the outputs of ``model`` and those of the file, in float32.
    force: replace existing files.

    Raises UsageError for a wrong argument, a missing package (pip install 'bgcbench[onnx]') and a layer that is not
    ready (LGC before its last drop), OutputError where a file exists or cannot be written, and BgcbenchError for a
    network that cannot be written, naming the module, or whose file computes something else.
    """
    path = Path(path)
    paths = files_of(path, to, force=force)
    network = model.model if isinstance(model, Converted) else model
    target = target_of(to, path, type(network).__name__, exporter, opset)
    inputs, tried = inputs_of(network, example_input, batch)
    own = copied(network).cpu().eval()
    ready = settled(own, inputs.args)
    made = written(ready, inputs, target, algorithm)
    nodes = target.nodes(made.contents)
    found = compared(own, target.opened(made.contents), tried)
    check_error(found.error, target, tolerance)
    for file, content in zip(paths, made.contents, strict=True):
        try:
            write_atomically(file, content)
        except OSError as problem:
            raise OutputError(f"{file} cannot be written ({problem.strerror or problem}); choose another") from problem
    return Exported(to, paths, made.algorithms, nodes, found.error, found.spread, len(tried), made.seconds)


def target_of(to: str, path: Path, network: str, exporter: str, opset: int) -> Target:
    """The kind of file; raises UsageError for an exporter or opset that cannot be, and for a missing package."""
    check_choice("exporter", exporter, EXPORTERS)
    check_positive("opset", opset)
    if to == "onnx":
        return OnnxTarget(exporter, opset)
    return CodeTarget(path.stem, network) if to == "torch" else ProgramTarget()


def inputs_of(model: nn.Module, example_input: Any, batch: int | None) -> tuple[Inputs, list[tuple[Tensor, ...]]]:
    """What ``model`` is followed on, and what the file is tried on.

    Raises UsageError for what a network cannot be exported with, or does not run on.
    """
    if batch is not None:
        check_positive("batch", batch)
    example = checked_example(example_input)
    found, notes = look(model, example, Passing())
    if found is None:
        raise UsageError(notes[0])
    given, _ = what_to_run(found, example, Passing())
    if isinstance(given, dict):
        given = inspect.signature(model.forward).bind(**given).args
    if not all(isinstance(part, Tensor) for part in given):
        raise UsageError("a network that is exported is called with tensors alone; wrap it in a module that is")
    given = tuple(part.cpu() for part in copied_to(given, model))
    if reference_of(model).dtype != torch.float32:
        raise UsageError(f"the network is in {reference_of(model).dtype}; export its float() version")
    images = len(given[0])
    batched = tuple(part.dim() > 0 and len(part) == images for part in given)

    generator = torch.Generator().manual_seed(0)

    def of(size: int, *, random: bool) -> tuple[Tensor, ...]:
        """The input with ``size`` images: its own, over and over, or random numbers in the place of its numbers."""
        made = []
        for part, is_batched in zip(given, batched, strict=True):
            rows = part[torch.arange(size) % images] if is_batched else part
            is_drawn = random and part.is_floating_point()
            made.append(torch.randn(rows.shape, generator=generator) if is_drawn else rows.contiguous())
        return tuple(made)

    tried = [of(size, random=True) for size in (TRIED if batch is None else (batch, batch))]
    if example is not None and not isinstance(example[0], int):
        tried.append(given if batch is None else of(batch, random=False))
    names = list(inspect.signature(model.forward).parameters)[: len(given)]
    if len(names) < len(given):
        names = [f"x{number}" for number in range(len(given))]
    # Two at least where there may be any number: exporters take a 1 for a constant.
    args = of(max(2, images) if batch is None else batch, random=False)
    return Inputs(args, tuple(names), tuple(batch is None and each for each in batched)), tried


@dataclass(frozen=True)
class Made:
    """The contents of the files, the algorithm of each layer by name, and the seconds of what was compared for it."""

    contents: list[bytes]
    algorithms: Mapping[str, str]
    seconds: Mapping[str, float]


def written(ready: nn.Module, inputs: Inputs, target: Target, algorithm: str) -> Made:
    """The network ``ready`` (see ``settled``) by ``algorithm``, which is as for :func:`export`."""
    files: dict[frozenset[tuple[str, str]], list[bytes]] = {}

    def by(algorithms: Mapping[str, str]) -> list[bytes]:
        made = frozenset(algorithms.items())
        if made not in files:
            files[made] = target.written(made_plain(ready, algorithms), inputs)
        return files[made]

    algorithms, seconds = chosen_algorithms(ready, algorithm), dict[str, float]()
    if isinstance(target, OnnxTarget) and algorithm == "auto":
        algorithms, seconds = fastest_algorithms(ready, inputs.one, lambda found: by(found)[0], target)
    return Made(by(algorithms), algorithms, seconds)


def check_error(error: float, target: Target, tolerance: float = OUTPUT_TOLERANCE) -> None:
    """Raise BgcbenchError where a file's outputs differ by more than ``tolerance``."""
    if not error <= tolerance:
        raise BgcbenchError(
            f"the network as {target.what} computes something else: its outputs differ by {error:.1e} of their norm, "
            f"and {tolerance:.1e} is allowed"
        )


@dataclass(frozen=True)
class Compared:
    """The outputs of a file and those of its network. error: the largest ||y - y'|| / ||y||. spread: the least share
    of an output's norm by which it differs from image to image; where that is nothing, equal outputs say nothing."""

    error: float
    spread: float


def compared(network: nn.Module, run: Run, tried: list[tuple[Tensor, ...]]) -> Compared:
    """``run``, which runs a file, and ``network`` on the same inputs.

    Raises UsageError for outputs that are not finite, BgcbenchError for others than the network has and for a file that
    does not run.
    """
    error, rows = 0.0, dict[int, list[Tensor]]()
    for args in tried:
        with torch.no_grad():
            expected = [y.double() for y in tensors_of(network(*(arg.clone() for arg in args)))]
        try:
            found = list(run(*args))
        except Exception as problem:  # whatever what runs it raises
            first = " ".join(str(problem).split())[:160]
            raise BgcbenchError(f"the file cannot be run on {len(args[0])} images ({first})") from problem
        if [y.shape for y in found] != [y.shape for y in expected]:
            raise BgcbenchError(
                f"the file gives outputs of {[tuple(y.shape) for y in found]}, the network of "
                f"{[tuple(y.shape) for y in expected]}"
            )
        for number, (y, right) in enumerate(zip(found, expected, strict=True)):
            if not right.isfinite().all():
                raise UsageError("the network's outputs are not finite, so that nothing can be checked")
            error = max(error, float((y.double() - right).norm()) / (float(right.norm()) or 1.0))
            rows.setdefault(number, []).append(right.reshape(len(right) if right.dim() else 1, -1))
    spreads = []
    for images in map(torch.cat, rows.values()):
        spreads.append(float((images - images.mean(0)).norm()) / (float(images.norm()) or 1.0))
    return Compared(error, min(spreads))
