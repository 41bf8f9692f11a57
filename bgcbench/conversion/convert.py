"""Replace convolutions of any network by a cheaper variant, and say what was replaced, what was kept, and why.

    converted = bgcbench.convert(torchvision.models.resnet50(weights="DEFAULT"), "bgc", 4)
    converted.model     # the network with its 3x3 convolutions replaced; the original is untouched
    converted.record    # which ones, with shapes; which were kept, with the reason

No variant is known by name here: a variant is a class that can be built from a dense kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import IO, Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from bgcbench.conversion.budget import COSTS, centred, principal_energies, ranks_of
from bgcbench.conversion.calibration import DEFAULT_IMAGES, MEMORY_BYTES, Calibrator, Wanted
from bgcbench.conversion.layer_moments import Pictures
from bgcbench.conversion.record import (
    SCRATCH,
    Converted,
    copied,
    origin_of,
    record_in,
    replay,
    reverted,
    spec_of,
)
from bgcbench.conversion.selection import (
    call_shape,
    channels,
    check_wrapper,
    checked_example,
    choose,
    collect,
    decide,
    describe,
    follow,
    kept_of,
    look,
    nothing_to_replace,
    patterns,
    refittable,
    stay,
)
from bgcbench.conversion.trial import keep_what_cannot_be_exchanged
from bgcbench.convs.base import PROJECTIONS, VariantConv2d
from bgcbench.errors import ResultFileError, UsageError
from bgcbench.measure.allocator import memory_state
from bgcbench.measure.batches import Forward, Passing
from bgcbench.models import build_model, identify
from bgcbench.results.rows import Budget, CalibratedLayer, Calibration, Kept, Record, Replaced
from bgcbench.specs import REFIT, SOLVED, VARIANTS, WHERE, Choice, NetSpec, check_choice, divisors
from bgcbench.theory.knapsack import cheapest, greedy

INITS = (*(name for name in PROJECTIONS if name != "least_squares"), *SOLVED, SCRATCH)
ON_INDIVISIBLE = ("raise", "skip", "gcd")
FORMAT = "bgcbench.converted/1"


@memory_state("kept")
def convert(
    model: nn.Module,
    variant: str | None = None,
    groups: int | None = None,
    *,
    rank: int | None = None,
    budget: float | None = None,
    budget_of: str = "params",
    plan: Mapping[str, Choice | Mapping[str, Any]] | None = None,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = "white",
    on_indivisible: str = "raise",
    algorithm: str | Mapping[str, str] = "auto",
    example_input: Any = None,
    inplace: bool = False,
    calibration: Iterable[Any] | None = None,
    forward_fn: Forward | None = None,
    calibration_pictures: Pictures = None,
    calibration_images: int | None = None,
    rebn: bool | None = None,
    memory_bytes: int = MEMORY_BYTES,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Converted:
    """Replace convolutions of ``model`` by ``variant`` with ``groups`` groups N, or with what ``plan`` says.

    rank: in the place of groups, for a variant that has one ('lowrank'); budget: each layer gets its own, such that all
        of them together have at most that share (0 to 1) of the parameters ('params', or the multiply-adds 'macs':
        ``budget_of``) of the convolutions that they replace, and lose the least: by the second moments of the images
        with init='calibrated', by the kernels alone otherwise (see :mod:`bgcbench.conversion.budget`). A layer in which
        no rank is worth its loss stays dense.
    plan: what each convolution becomes, by its name: ``{"layer3.0.conv2": {"variant": "bgc", "groups": 4}}`` (or a
        Choice, or something with such ``choices``); those that it does not name stay. In the place of variant, groups
        and where.
    where:
        'auto'  every convolution with groups=1, except the first one executed and what else reads the image, those
                with 1x1 pixels of input (squeeze-and-excitation), shortcuts and downsampling, a classifier (1x1,
                nothing but resizing after it), one that writes the image (3 channels at most), and what a forward
                pass does not reach. The paper's networks follow its rules: of a ResNet's bottlenecks only the 3x3; of
                MobileNetV2 and EfficientNet not the last convolution, which stands outside of the blocks
        '3x3'   those of them (without the two rules) that have a 3x3 kernel
        '1x1'   the same with 1x1 kernels
        'all'   the same and shortcuts, whatever the kernel
        'none'  only what ``include`` names
    include, exclude: patterns (``layer4.*``) of module names to add to that, or to keep. A pattern that matches no
        convolution is an error; so is including one by its full name that cannot be replaced.
    init: 'copy' (the paper: weights are copied), 'white' (the closed-form optimum for uncorrelated inputs),
        'calibrated' (least squares on the network's own activations, layer by layer, see
        :mod:`bgcbench.conversion.calibration`), 'refit' (as 'calibrated', and so are the convolutions behind the first
        replaced one that stay, except what ``exclude`` names: they make up for what those before them lose, at no
        cost), 'scratch' (He initialisation).
    on_indivisible: what to do where N does not divide the channels: 'raise' a ShapeError that names each of them,
        'skip' (keep it dense) or 'gcd' (the largest N that does).
    algorithm: that of the layers, where they have a choice, such as 'deployed'; or by variant, for a plan that has
        several.
    example_input: what to run the network on, to find order, shapes, shortcuts and functional convolutions, and to see
        that it computes the same with other layers in it: (channels, height, width), a tensor, a tuple of its
        arguments, a dict of its keywords, a list of images. By default a size that works, or the first image of
        ``calibration``.
    calibration: anything that yields batches; no labels are needed. A tensor is the network's input, the elements of a
        tuple or list are its arguments, as many as its forward requires, a dict holds its keywords, a list of images
        (C, H, W) is one argument. forward_fn: called as forward_fn(model, batch) instead, for any other batch (and
        example_input, which then is one). calibration_images: use so many at most (default 512); batches that cannot
        be taken apart into images count as one each. calibration_pictures: which picture each image shows, if several
        are parts of one or frames of a film: names in the images' order, or a function of an image's number; by default
        ``calibration.pictures`` where that is there (see :class:`bgcbench.Views`). One picture in four is held out to
        choose by, whole: other crops of a picture that was fitted would say too little about others.
    rebn: re-estimate the statistics of batch norm on these images, from the first replaced convolution on; by default
        where there are images. memory_bytes: what calibration may hold at a time; where more images are given than fit,
        fewer are used, and a note says so. seed: which positions of an image are sampled. stop: asked now and then
        whether to end early, which raises :class:`bgcbench.conversion.lockstep.Stopped`; a network that was to be
        converted in place is then half done.

    Only ``torch.nn.Conv2d`` with groups=1 are replaced. The record names each other convolution with the reason why it
    is kept (:class:`bgcbench.conversion.selection.Reason`). A module used twice is converted once; layers of earlier
    conversions stay, and the record holds them too. Training mode, device, dtype, memory format, module hooks,
    attributes and requires_grad are taken over; the global random states are left alone unless ``init='scratch'``.
    ``model`` is untouched unless ``inplace``. The record's ``calibration`` has what each layer lost before and after.
    N = 1 is the standard convolution: nothing is replaced.

    Returns the network and the record. Raises UsageError for an unknown option, where nothing can be replaced, for a
    budget that cannot be met, and for images that are missing, too few, not finite or not what the network takes;
    ShapeError for an N that does not divide.
    """
    choices = None if plan is None else _checked_plan(plan, (variant, groups, rank, budget, include), where)
    choice = Choice() if plan is not None else _checked_choice(variant, groups, rank, budget, budget_of)
    by_variant = {choice.variant: algorithm} if isinstance(algorithm, str) else algorithm
    _check_options(by_variant, where, init, on_indivisible)
    check_wrapper(model)
    passing = Passing(forward_fn)
    _check_calibration(calibration is not None, init, calibration_images, rebn)
    images = None
    if calibration is not None:
        used = calibration_images or DEFAULT_IMAGES
        options: dict[str, Any] = {"rebn": rebn is not False, "memory_bytes": memory_bytes, "seed": seed, "stop": stop}
        images = Calibrator(model, calibration, passing=passing, pictures=calibration_pictures, images=used, **options)
    example = example_input if forward_fn is not None else checked_example(example_input)
    if example is None and images is not None:
        example = images.example
    source = identify(reverted(model) if any(map(origin_of, model.modules())) else model)
    found, notes = look(model, example, passing)
    convs = collect(model, found)
    named = patterns(include), patterns(exclude)
    wished = [choice] if choices is None else list(choices.values())
    replaces = not all(each.is_dense for each in wished)
    if choices is None:
        decide(model, convs, found, where, *named)
        choose(convs, choice, on_indivisible)
    else:
        follow(model, convs, found, choices, named[1])
    if found is not None and replaces:
        notes += keep_what_cannot_be_exchanged(model, convs, found, example, passing, fits=images is not None)
    chosen = [conv for conv in convs if conv.reason is None]
    if not chosen and replaces:
        raise UsageError(nothing_to_replace(convs, where))
    layers = tuple(
        replace(describe(conv), algorithm=by_variant.get(conv.choice.variant, "auto"), init=init) for conv in chosen
    )
    # What the original says comes first: a network that is converted in place cannot be asked any more.
    wanted = None
    if images is not None and chosen:
        refitted = tuple(map(describe, refittable(convs))) if init == REFIT else ()
        wanted = images.observe(model, (*layers, *refitted) if init in SOLVED else ())
    spent = None
    if budget is not None:
        layers, spent = _within(budget, budget_of, model, layers, wanted if init in SOLVED else None)
        stay(chosen, {layer.name for layer in layers})
        refitted = tuple(map(describe, refittable(convs))) if init == REFIT else ()
        if wanted is not None:
            wanted.keep_only((*layers, *refitted))
    origins = {conv.name: origin for conv in convs if (origin := origin_of(conv.module)) is not None}
    functional = () if found is None else found.functional
    record = Record(
        variant=choice.variant,
        groups=choice.groups,
        rank=rank,
        budget=spent,
        planned=choices is not None,
        where=where,
        include=named[0],
        exclude=named[1],
        init=init,
        on_indivisible=on_indivisible,
        algorithm=algorithm if isinstance(algorithm, str) else "auto",
        source=source,
        size=found.size if found else None,
        replaced=tuple(layer.name for layer in layers),
        layers=layers,
        kept=kept_of(convs),
        functional=tuple(f"in {call.owner or 'the network'}: {call_shape(call)}" for call in functional),
        notes=tuple(notes),
        earlier=tuple(replace(layer, name=name) for name, (layer, _) in origins.items()),
    )
    target = replay(model if inplace else copied(model), record)
    if images is None or wanted is None:
        return Converted(target, record)
    report = images.settle(target, record, wanted, refitted)
    return Converted(target, replace(record, rebn=images.rebn, calibration=report, notes=(*notes, *images.notes)))


def _within(
    budget: float, cost: str, model: nn.Module, layers: Sequence[Replaced], wanted: Wanted | None
) -> tuple[tuple[Replaced, ...], Budget]:
    """Those of ``layers`` that get a rank, and what all cost then; raises UsageError for a budget that is too small."""

    def energies(name: str) -> Tensor:
        if wanted is not None and wanted.outputs[name]:
            outputs = [each for calls in wanted.outputs[name].values() for each in calls]
            return principal_energies(centred(outputs))
        weight: Any = model.get_submodule(name).weight
        return principal_energies([weight.detach().flatten(1)])

    options = {layer.name: ranks_of(layer, energies(layer.name), cost) for layer in layers}
    whole = sum(ranks[-1].cost for ranks in options.values())
    found = greedy(options, budget * whole)
    if found is None:
        least = cheapest(options).cost / whole
        raise UsageError(f"budget={budget:g} cannot be met: rank 1 in every layer costs {least:.3g}; give more")
    ranked = (replace(layer, rank=found.keys[layer.name], groups=1) for layer in layers if found.keys[layer.name])
    chosen = tuple(replace(layer, groups=spec_of(layer).groups) for layer in ranked)
    return chosen, Budget(cost=cost, asked=budget, reached=found.cost / whole)


@dataclass(frozen=True)
class Candidates:
    """The convolutions of a network that :func:`convert` would replace, in the order of execution, and the others."""

    chosen: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]


def candidates(
    model: nn.Module,
    *,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Any = None,
    passing: Passing | None = None,
) -> Candidates:
    """What :func:`convert` with these options would replace, before any N is asked for (``groups`` is 1 in each).

    passing: how the network is run on ``example_input``. Raises UsageError for an unknown option or pattern and where
    nothing can be replaced.
    """
    check_choice("where", where, WHERE)
    check_wrapper(model)
    passing = passing or Passing()
    example = example_input if passing.forward is not None else checked_example(example_input)
    found, notes = look(model, example, passing)
    convs = collect(model, found)
    decide(model, convs, found, where, patterns(include), patterns(exclude))
    for conv in convs:
        if conv.reason is None:  # what is tried in its place is a group convolution
            conv.choice = Choice("gc", next(iter(divisors(math.gcd(*channels(conv.module)))[1:]), 1))
    if found is not None:
        notes += keep_what_cannot_be_exchanged(model, convs, found, example, passing, fits=True)
    chosen = tuple(replace(describe(conv), variant="standard", groups=1) for conv in convs if conv.reason is None)
    if not chosen:
        raise UsageError(nothing_to_replace(convs, where))
    return Candidates(chosen, kept_of(convs), tuple(notes))


def _check_calibration(given: bool, init: str, images: int | None, rebn: bool | None) -> None:
    """Raise UsageError where images to calibrate with are missing, or ``given`` and of no use."""
    if given and rebn is False and init not in SOLVED:
        raise UsageError(f"calibration images are of no use with init='{init}' and rebn=False; leave them out")
    if not given and (init in SOLVED or rebn):
        what = f"init='{init}'" if init in SOLVED else "rebn=True"
        raise UsageError(f"{what} needs images: pass batches of them as calibration=loader (no labels are needed)")
    if not given and images is not None:
        raise UsageError("calibration_images says how many of calibration=loader are used, and there is none")


def _check_options(algorithms: Mapping[str, str], where: str, init: str, on_indivisible: str) -> None:
    check_choice("where", where, WHERE)
    check_choice("init", init, INITS)
    check_choice("on_indivisible", on_indivisible, ON_INDIVISIBLE)
    for variant, algorithm in algorithms.items():
        check_choice("variant", variant, VARIANTS)
        if algorithm != "auto":
            check_choice(f"algorithm of {variant}", algorithm, VARIANTS[variant].algorithms)


def _checked_choice(
    variant: str | None, groups: int | None, rank: int | None, budget: float | None, budget_of: str
) -> Choice:
    """What every convolution becomes; with a budget, a rank that is not known yet."""
    if variant is None or [groups, rank, budget].count(None) != 2:
        raise UsageError("convert(model, variant, groups): name a variant with groups=, rank= or budget=, or a plan=")
    if not isinstance(variant, str):
        raise UsageError(
            f"variant is a {type(variant).__name__}, and one conversion takes one variant by its name; for several "
            "pass plan={name: {'variant': ..., 'groups': ...}}"
        )
    if budget is None:
        return Choice(variant, 1 if groups is None else groups, rank)
    check_choice("budget_of", budget_of, COSTS)
    if not 0 < budget < 1:
        raise UsageError(f"budget={budget} must be between 0 and 1: a share of what is there")
    return Choice(variant, rank=1)


def _checked_plan(plan: Any, given: tuple[Any, ...], where: str) -> dict[str, Choice]:
    """The choices of ``plan`` by name; raises UsageError where something else says what is converted, too."""
    if any(value is not None for value in given) or where != "auto":
        raise UsageError("a plan says what each convolution becomes; leave out variant, groups, rank, budget and where")
    choices = getattr(plan, "choices", plan)
    if not isinstance(choices, Mapping) or not choices:
        raise UsageError("plan must be {name of a convolution: {'variant': ..., 'groups': ...}}, with one at least")
    return {str(name): Choice.of(choice) for name, choice in choices.items()}


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
        with torch.serialization.safe_globals([Record, Replaced, Kept, Calibration, CalibratedLayer, Budget]):
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
    rebuilt = replay(base, record, weights=False)
    _rename_kernels(rebuilt, state)
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


def _rename_kernels(model: nn.Module, state: dict[str, Any]) -> None:
    """Give the kernels in ``state`` their names of today; older files call the first kernel of every layer weight."""
    for name, module in model.named_modules():
        if isinstance(module, VariantConv2d) and f"{name}.{module.kernel_name}" not in state:
            state[f"{name}.{module.kernel_name}"] = state.pop(f"{name}.weight", None)
