"""Which exact form of a layer is the fastest here: measured once for each case, then remembered.

What cudnn.benchmark does for the algorithms of one convolution, for the forms of one layer. A form of many small
kernels can keep the host busy for longer than the device, so two are chosen of one measurement: for calls by the host
the one with the least of the longer of both times, for a CUDA graph, where the host does nothing, the device's fastest.

All forms compute the same map, so a choice changes results by rounding only; that still matters to who wants the same
bits twice, so choices can be read (:func:`remembered`), taken over from another process (:func:`restore`) and dropped
(:func:`forget`).
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bgcbench.convs.followed import is_transformed
from bgcbench.convs.layouts import is_channels_last
from bgcbench.errors import ResultFileError, UsageError
from bgcbench.kernels.clock import device_and_host_seconds
from bgcbench.measure.device import tf32_state
from bgcbench.specs import ConvSpec

DEVICES = ("cpu", "cuda")  # where it is known how to time
ROUNDS = 7  # at least; every round calls each form that is still in the race
MOST_ROUNDS = 50
ENOUGH_S = 0.1  # rounds go on until so much time has been spent
LONG_S = 3.0  # once so much has been spent, calls are long, which scatter less: FEW_ROUNDS will do
FEW_ROUNDS = 3
HOPELESS = 1.5  # a form that takes so many times the best one's time is dropped after ...
GLIMPSES = 2  # ... so many rounds
WORTH = 0.99  # a form takes the place of one that stands before it only if it takes less than this share of its time


class Case(NamedTuple):
    """Everything that the time of a layer's forms depends on.

    spec: the layer, as it was asked for. dtype: the one that is computed in. layout: nchw or nhwc. device: a CUDA
    device's name; a CPU's number of threads. gradients: which are taken, of "x", "w" (weights), "xw" or "" (inference).
    state: switches that change what libraries choose.
    """

    spec: ConvSpec
    padding_mode: str
    batch: int
    height: int
    width: int
    dtype: str
    layout: str
    weight_layout: str
    device: str
    gradients: str
    state: str


@dataclass(frozen=True)
class Choice:
    """The form that is run, and the seconds of each that was tried (none where it was not measured here).

    seconds: the device's or the host's, whichever are more. graph_form, graph_seconds: the same in a CUDA graph, where
    only the device's count; equal on a CPU. left_out: those that could not run, each with the name of what it raised
    and its message's first line.
    """

    form: str
    seconds: Mapping[str, float]
    graph_form: str
    graph_seconds: Mapping[str, float]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def taken(self, captured: bool) -> str:
        return self.graph_form if captured else self.form


_remembered: dict[Case, Choice] = {}
_said: set[tuple[str, str, str]] = set()  # variant, form and error of the warnings so far
_era = [0]
_measuring = threading.RLock()


def choose(case: Case, device: torch.device, make: Callable[[], Mapping[str, Callable[[], object]]]) -> str | None:
    """The form to run in ``case``: remembered, or measured now on ``device``.

    make: the calls to be timed, by form, the default first; each does what one step would. A form that cannot run (its
    memory does not suffice, its kernel does not compile) is left out, with a warning the first time; if none can, the
    default is taken and nothing is remembered. While a CUDA graph is captured, the one for graphs, and None where
    nothing is remembered, as nothing can be measured then.
    """
    captured, known = is_captured(device), _remembered.get(case)
    if known is not None:
        return known.taken(captured)
    if captured:
        return None
    with _measuring:
        if case not in _remembered:
            with _unseen(device):
                found = _measured(make, device)
            if not found.seconds:
                return found.form
            _remembered[case] = found
            _warn_of(case, found)
        return _remembered[case].form


def is_captured(device: torch.device) -> bool:
    """Whether what is called on ``device`` now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def era() -> int:
    """A number that changes whenever choices are taken over or dropped, so that layers ask again."""
    return _era[0]


def remembered() -> list[dict[str, Any]]:
    """Every choice of this process as plain JSON: the fields of :class:`Case` and of :class:`Choice`."""
    return [{**case._asdict(), "spec": asdict(case.spec), **asdict(choice)} for case, choice in _remembered.items()]


def restore(choices: Iterable[Mapping[str, Any]]) -> None:
    """Take over ``choices`` (see :func:`remembered`); they go before what was measured here.

    Raises ResultFileError where they are none.
    """
    taken = {}
    for entry in choices:
        try:
            values = {name: entry[name] for name in Case._fields}
            case = Case(**{**values, "spec": ConvSpec(**values["spec"])})
            form, seconds = str(entry["form"]), dict(entry["seconds"])
            in_graph = str(entry.get("graph_form", form)), dict(entry.get("graph_seconds", seconds))
            taken[case] = Choice(form, seconds, *in_graph, dict(entry.get("left_out", {})))
        except (KeyError, TypeError, ValueError, UsageError) as problem:
            raise ResultFileError(f"this is no choice of an algorithm, or another version's ({problem})") from None
    _remembered.update(taken)
    _era[0] += 1


def forget() -> None:
    """Drop all choices; the next call of each layer measures again."""
    _remembered.clear()
    _era[0] += 1


def case_of(spec: ConvSpec, padding_mode: str, x: Tensor, weights: Sequence[Tensor]) -> Case:
    """The case of x (B, n, H, W) in a layer with these kernels."""
    kind, grad = x.device.type, torch.is_grad_enabled()
    taken = {"x": grad and x.requires_grad, "w": grad and any(weight.requires_grad for weight in weights)}
    return Case(
        spec,
        padding_mode,
        x.shape[0],
        x.shape[2],
        x.shape[3],
        _name(computed_in(x)),
        layout_of(x),
        layout_of(weights[0]),
        f"{torch.get_num_threads()} CPU threads" if kind == "cpu" else torch.cuda.get_device_name(x.device),
        "".join(name for name, is_taken in taken.items() if is_taken),
        _state(kind),
    )


def computed_in(x: Tensor) -> torch.dtype:
    """The type that a convolution of ``x`` computes in: autocast's where that is on."""
    if is_autocast(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    if not torch._C._is_any_autocast_enabled():  # every call of a layer asks
        return False
    return x.device.type in DEVICES and torch.is_autocast_enabled(x.device.type)


def layout_of(x: Tensor) -> str:
    """nhwc where x is stored channels-last and not also contiguous."""
    return "nhwc" if is_channels_last(x) else "nchw"


def can_choose(x: Tensor) -> bool:
    """Whether there is a fastest form for x: a batch of real numbers on a device with a clock.

    Not under ``torch.use_deterministic_algorithms``: what is measured may fall out differently in the next run.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type not in DEVICES:
        return False
    return x.dim() == 4 and x.numel() > 0 and not torch.are_deterministic_algorithms_enabled() and not is_transformed()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state(kind: str) -> str:
    if kind == "cpu":
        return "mkldnn" if torch.backends.mkldnn.enabled else ""
    switches = {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "tf32": tf32_state()["conv"],
    }
    return ",".join(name for name, on in switches.items() if on)


# ---------------------------------------------------------------------------------------------------------- measuring


@contextmanager
def _unseen(device: torch.device) -> Iterator[None]:
    """None of the caller's modes are at work: autocast, gradients on or off, hooks of saved tensors (a checkpoint's
    count what forward saves), counters of operations. In the caller's own thread, because another one gets large blocks
    of memory from the system anew at each call, which favours forms that take little."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),  # of several pairs the last one is asked
        _disable_current_modes(),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _measured(make: Callable[[], Mapping[str, Callable[[], object]]], device: torch.device) -> Choice:
    calls = dict(make())
    default = next(iter(calls))
    left_out = {}
    for form in list(calls):
        try:
            calls[form]()  # the first call sets up what libraries keep
            _wait(device)
        except Exception as problem:  # noqa: BLE001 - compilers and launchers of kernels raise what they like
            left_out[form] = [type(problem).__name__, *str(problem).strip().splitlines()[:1]]
            del calls[form]
    best, in_graph = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, float("inf"))
    begun = time.perf_counter()
    for number in range(MOST_ROUNDS):
        for form in list(calls):
            busy, host = _seconds(calls[form], device)
            in_graph[form] = min(in_graph[form], busy)
            best[form] = min(best[form], max(busy, host))
        if number + 1 == GLIMPSES:
            hopeful = {form for seconds in (best, in_graph) for form in calls
                       if seconds[form] <= HOPELESS * min(seconds.values())}  # fmt: skip
            calls = {form: call for form, call in calls.items() if form in hopeful}
        spent = time.perf_counter() - begun
        is_enough = number + 1 >= ROUNDS and spent > ENOUGH_S
        if len(calls) < 2 or is_enough or (number + 1 >= FEW_ROUNDS and spent > LONG_S):
            break
    return Choice(_shortest(best, default), best, _shortest(in_graph, default), in_graph, left_out)


def _shortest(seconds: Mapping[str, float], default: str) -> str:
    chosen = default
    for form, spent in seconds.items():
        if chosen not in seconds or spent < WORTH * seconds[chosen]:
            chosen = form
    return chosen


def _warn_of(case: Case, found: Choice) -> None:
    """Say which forms were left out, and why: once for each kind of error."""
    for form, reason in found.left_out.items():
        about = (case.spec.variant, form, reason[0])
        if about not in _said:
            _said.add(about)
            text = f"{case.spec.variant}: the form '{form}' cannot run here and is left out ({': '.join(reason)})"
            warnings.warn(text, stacklevel=2)


def _seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """One call: the device's seconds and the host's. What disturbs a machine only ever adds time, so the least of
    several is what a form can do."""
    if device.type == "cuda":
        return device_and_host_seconds(call)
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return seconds, seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
