"""Replace convolutions of any network by a cheaper variant, and say what was replaced, what was kept, and why.

    converted = bgcbench.convert(torchvision.models.resnet50(weights="DEFAULT"), "bgc", 4)
    converted.model     # the network with its 3x3 convolutions replaced; the original is untouched
    converted.record    # which ones, with shapes; which were kept, with the reason

No variant is known by name here: a variant is a class that can be built from a dense kernel.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import IO, Any

import torch
from torch import Tensor, nn

from bgcbench.calibration import DEFAULT_IMAGES, MEMORY_BYTES, Calibration
from bgcbench.convs.base import PROJECTIONS
from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.measure.trace import Size, Trace, without_numbers
from bgcbench.models import build_model, identify
from bgcbench.policy import (
    Candidates,
    call_shape,
    candidates,
    check_wrapper,
    checked_example,
    collect,
    decide,
    describe,
    divide,
    look,
    nothing_to_replace,
    patterns,
    traced,
)
from bgcbench.record import CALIBRATED, SCRATCH, Converted, Kept, Record, Replaced, copied, record_in, replay
from bgcbench.specs import VARIANTS, WHERE, NetSpec, check_choice, check_positive

__all__ = ["Candidates", "Converted", "Kept", "Record", "Replaced", "candidates", "convert", "load_converted", "replay",
           "save_converted"]  # fmt: skip

INITS = (*(name for name in PROJECTIONS if name != "least_squares"), CALIBRATED, SCRATCH)
ON_INDIVISIBLE = ("raise", "skip", "gcd")
FORMAT = "bgcbench.converted/1"


def convert(
    model: nn.Module,
    variant: str,
    groups: int,
    *,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = "white",
    on_indivisible: str = "raise",
    algorithm: str = "auto",
    example_input: Tensor | Size | None = None,
    inplace: bool = False,
    calibration: Iterable[Any] | None = None,
    calibration_images: int | None = None,
    rebn: bool | None = None,
    memory_bytes: int = MEMORY_BYTES,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Converted:
    """Replace convolutions of ``model`` by ``variant`` with ``groups`` groups N.

    where:
        'auto'  every convolution with groups=1, except the first one executed and what else reads the image, those
                with 1x1 pixels of input (squeeze-and-excitation), shortcuts and downsampling, a convolution that
                serves as classifier (1x1, nothing but resizing after it) or writes the image (3 channels at most), and
                what a forward pass does not reach. In the networks that the paper names
                this is what it replaces; two of its families take a rule more: of a ResNet's bottlenecks only the
                3x3, and of MobileNetV2 and EfficientNet not the last convolution, which stands outside of the blocks
        '3x3'   those of them (without the two rules) that have a 3x3 kernel
        '1x1'   the same with 1x1 kernels
        'all'   the same and shortcuts, whatever the kernel
        'none'  only what ``include`` names
    include, exclude: patterns (``layer4.*``) of module names to add to that, or to keep. A pattern that matches no
        convolution is an error; so is including one by its full name that cannot be replaced.
    init: 'copy' (the paper: weights are copied), 'white' (the closed-form optimum for uncorrelated inputs),
        'calibrated' (least squares on the network's own activations, layer by layer, see :mod:`bgcbench.calibration`),
        'scratch' (He initialisation).
    on_indivisible: what to do where N does not divide the channels: 'raise' a ShapeError that names each of them,
        'skip' (keep it dense) or 'gcd' (the largest N that does).
    algorithm: the form of the layers that have a choice, such as 'deployed'.
    example_input: a batch of one, or (channels, height, width), to run the network on once without numbers, which is
        how order, shapes, shortcuts and functional convolutions are found. By default a size that works, or the first
        image of ``calibration``.
    calibration: anything that yields inputs as the network takes them (normalised), (B, C, H, W), or tuples that begin
        with one; no labels are needed. calibration_images: use so many of them at most (default 512).
    rebn: re-estimate the statistics of batch norm on these images, from the first replaced convolution on; by default
        where there are images. memory_bytes: what calibration may hold at a time; where more images are given than fit,
        fewer are used, and a note says so. seed: which positions of an image are looked at. stop: asked now and then
        whether to end early, which raises :class:`bgcbench.calibration.Stopped`; a network that was to be converted
        in place is then half done.

    Replaced are ``torch.nn.Conv2d`` with groups=1. Kept with a reason: subclasses with a forward of their own,
    parametrised or tied weights, convolutions with tensors or tensor hooks of their own, those that something outside
    of the module tree refers to (a list of layers), grouped ones, everything the policy names. A module used twice is
    converted once. Training mode, device, dtype, memory format, module hooks, attributes and requires_grad are taken
    over; the global random state is left alone unless ``init='scratch'``. ``model`` is untouched unless ``inplace``.
    The record's ``calibration`` says of each layer what it lost before and after.
    N = 1 is the standard convolution: nothing is replaced.

    Returns the network and the record. Raises UsageError for an unknown option, where nothing can be replaced, and for
    images that are missing, too few or not finite; ShapeError for an N that does not divide.
    """
    _check_options(variant, groups, where, init, on_indivisible, algorithm)
    check_wrapper(model)
    images = _calibration(model, init, calibration, calibration_images, rebn, memory_bytes, seed, stop)
    example = checked_example(example_input)
    if example is None and images is not None:
        example = images.example
    source = identify(model)
    found, notes = look(model, example)
    convs = collect(model, found)
    named = patterns(include), patterns(exclude)
    decide(model, convs, found, where, *named)
    if groups == 1 or variant == "standard":
        for conv in convs:
            conv.reason = conv.reason or "N = 1 is the standard convolution"
    divide(convs, variant, groups, on_indivisible)
    chosen = [conv for conv in convs if conv.reason is None]
    if not chosen and groups > 1 and variant != "standard":
        raise UsageError(nothing_to_replace(convs, where))

    def recorded() -> Record:
        return Record(
            variant,
            groups,
            where,
            *named,
            init,
            on_indivisible,
            algorithm,
            source,
            found.size if found else None,
            tuple(describe(conv) for conv in convs if conv.reason is None),
            tuple(Kept(conv.name, conv.reason) for conv in convs if conv.reason is not None),
            tuple(f"in {call.owner or 'the network'}: {call_shape(call)}" for call in found.functional)
            if found
            else (),
            tuple(notes),
        )

    record = recorded()
    if found is not None and chosen:
        for name in _still_dense(model, record, found, example):
            next(conv for conv in chosen if conv.name == name).reason = "called from outside of the module tree"
        record = recorded()
    if images is None or not chosen:
        return Converted(replay(model if inplace else copied(model), record), record)
    # What the original says comes first: a network that is converted in place cannot be asked any more.
    wanted = images.observe(model, record.replaced if init == CALIBRATED else ())
    target = replay(model if inplace else copied(model), record)
    report = images.settle(target, record, wanted)
    notes += images.notes
    return Converted(target, replace(record, rebn=images.rebn, calibration=report, notes=tuple(notes)))


def _calibration(
    model: nn.Module,
    init: str,
    batches: Iterable[Any] | None,
    images: int | None,
    rebn: bool | None,
    memory_bytes: int,
    seed: int,
    stop: Callable[[], bool],
) -> Calibration | None:
    """The images to calibrate with; None where none are needed. Raises UsageError where they are missing or no use."""
    needed = init == CALIBRATED or bool(rebn)
    if batches is None:
        if needed:
            what = "init='calibrated'" if init == CALIBRATED else "rebn=True"
            raise UsageError(f"{what} needs images: pass batches of them as calibration=loader (no labels are needed)")
        if images is not None:
            raise UsageError("calibration_images says how many of calibration=loader are used, and there is none")
        return None
    rebn = True if rebn is None else rebn
    if not rebn and init != CALIBRATED:
        raise UsageError(f"calibration images are of no use with init='{init}' and rebn=False; leave them out")
    return Calibration(
        model, batches, images=images or DEFAULT_IMAGES, rebn=rebn, memory_bytes=memory_bytes, seed=seed, stop=stop
    )


def _check_options(variant: str, groups: int, where: str, init: str, on_indivisible: str, algorithm: str) -> None:
    check_choice("variant", variant, VARIANTS)
    check_positive("groups", groups)
    check_choice("where", where, WHERE)
    check_choice("init", init, INITS)
    check_choice("on_indivisible", on_indivisible, ON_INDIVISIBLE)
    if algorithm != "auto":
        check_choice(f"algorithm of {variant}", algorithm, VARIANTS[variant].algorithms)
    if variant == "standard" and groups != 1:
        raise ShapeError(f"a standard convolution has groups=1, not {groups}; variant 'gc' has groups")


def _still_dense(model: nn.Module, record: Record, found: Trace, example: Any) -> list[str]:
    """Names of convolutions that the converted network does not run, because something else refers to the old ones.

    Found by converting a copy without numbers and running that (with numbers where the network needs them).
    """
    try:
        with torch.random.fork_rng(devices=[]):
            probe = copy.deepcopy(model) if found.numbers else without_numbers(model)
            again = traced(replay(probe, replace(record, init=SCRATCH)), example, found.size)
    except Exception:  # noqa: BLE001 - a network that only runs as it was: nothing can be said
        return []
    called = {call.module for call in again.convs if call.variant}
    names = {layer.name for layer in record.replaced if layer.calls}
    return sorted(names - called)


def save_converted(converted: Converted, path: str | PathLike[str] | IO[bytes]) -> None:
    """Write the weights, the record and the names of frozen parameters to ``path`` for :func:`load_converted`.

    The file is a ``torch.save`` of tensors and text, so it loads with ``weights_only=True``.
    """
    state = converted.model.state_dict()
    state = {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}
    frozen = [name for name, parameter in converted.model.named_parameters() if not parameter.requires_grad]
    record = json.dumps(converted.record.to_json())
    torch.save({"format": FORMAT, "record": record, "state_dict": state, "frozen": frozen}, path)


def load_converted(
    path: str | PathLike[str], model: nn.Module | None = None, *, map_location: Any = "cpu"
) -> nn.Module:
    """The network that :func:`save_converted` wrote, in eval mode.

    The original network is rebuilt from the record where :mod:`bgcbench.models` knows it (the paper's, torchvision's,
    timm's); for any other pass a dense one as ``model``, which is left untouched. Files made with ``torch.save`` of a
    dict with ``record`` (the Record, its ``to_json()`` or that as text) and ``state_dict`` load too.

    Only tensors and plain values are read from the file (``weights_only``), never code. Raises ResultFileError where
    the file is none of these or ``model`` is not the network that was converted.
    """
    try:
        with torch.serialization.safe_globals([Record, Replaced, Kept]):
            stored = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise ResultFileError(f"{path} is not there") from None
    except Exception as problem:  # whatever a damaged file makes the reader raise
        raise ResultFileError(f"{path} is no saved network: {str(problem).splitlines()[0][:160]}") from problem
    if not isinstance(stored, dict) or "record" not in stored:
        raise ResultFileError(f"{path} holds no 'record' of a conversion; write it with save_converted")
    state = next((stored[key] for key in ("state_dict", "state", "model") if isinstance(stored.get(key), dict)), None)
    if state is None:
        raise ResultFileError(f"{path} holds no 'state_dict'; write it with save_converted")
    record = record_in(stored)
    if model is not None:
        base = copied(model)
    elif record.source is not None:
        try:
            base = build_model(NetSpec(**record.source))
        except TypeError as problem:
            raise ResultFileError(f"{path} names a network that this version does not know: {problem}") from None
    else:
        raise ResultFileError(
            f"bgcbench cannot build the network of {path} by itself; pass a dense one: load_converted(path, model)"
        )
    # The weights come from the file, so nothing needs to be solved for.
    rebuilt = replay(base, replace(record, init=SCRATCH))
    try:
        rebuilt.load_state_dict(state, assign=True)  # with the dtypes and memory formats that were saved
    except RuntimeError as problem:
        first = " ".join(str(problem).split())[:200]
        raise ResultFileError(f"{path} does not fit the network: {first}") from None
    frozen = set(stored.get("frozen", ()))
    for name, parameter in rebuilt.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return rebuilt.to(map_location).eval() if isinstance(map_location, (str, torch.device)) else rebuilt.eval()


class _Callable(types.ModuleType):
    """``bgcbench.convert`` is this module's name and the public function's; it answers to both."""

    def __call__(self, *arguments: Any, **options: Any) -> Converted:
        return convert(*arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
