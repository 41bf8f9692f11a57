"""Which exact algorithm of a layer is the fastest here: measured once for each case, then remembered.

What cudnn.benchmark does for the algorithms of one convolution, for the algorithms of one layer. An algorithm of many
small kernels can keep the host busy for longer than the device, so one measurement yields two choices: for eager calls
the least of the longer of both times; for a CUDA graph, where the host does nothing, the device's fastest.

All algorithms compute the same map, so a choice changes results by rounding only. Who wants the same bits twice reads
the choices (:func:`remembered`), takes them over in another process (:func:`restore`) or drops them (:func:`forget`).
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bgcbench import kernels
from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.followed import is_recorded, is_transformed
from bgcbench.convs.layouts import is_channels_last
from bgcbench.errors import ResultFileError, UsageError
from bgcbench.kernels.clock import device_and_host_seconds
from bgcbench.measure.device import tf32_state
from bgcbench.specs import CUDA_ALGORITHMS, ConvSpec

MIN_ROUNDS, MAX_ROUNDS = 7, 50  # every round times each remaining algorithm once
MIN_S = 0.1  # measure for at least this long
LONG_S, LONG_ROUNDS = 3.0, 3  # after LONG_S stop at LONG_ROUNDS: long calls scatter less
PRUNE_RATIO, PRUNE_AFTER = 1.5, 2  # after PRUNE_AFTER rounds drop an algorithm slower than this multiple of the fastest
LONG_CALL_S = 0.1  # on a CPU what is set up in a first call is little of one that takes so long, and tells enough
NEAR_RATIO = 1.1  # of long calls those that took less than this multiple of the fastest are timed once more
FAR_RATIO = 2.0  # an algorithm that took this multiple of the fastest without gradients is not tried with them then
GAIN_RATIO = 0.99  # prefer an earlier algorithm unless a later one takes less than this share of its time


class Case(NamedTuple):
    """Everything that the times of a layer's algorithms depend on.

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
    """The algorithm (``form`` in files) that runs, and the seconds of each one tried (none if not measured here).

    seconds: the device's or the host's, whichever are more. graph_form, graph_seconds: the same in a CUDA graph, where
    only the device's count; equal on a CPU. left_out: those that could not run, each with the name of what it raised
    and its message's first line.
    """

    form: str
    seconds: Mapping[str, float]
    graph_form: str
    graph_seconds: Mapping[str, float]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)


_remembered: dict[Case, Choice] = {}
_warned: set[tuple[str, str, str]] = set()  # variant, algorithm and error of the warnings so far
_generation = [0]
_measuring = threading.RLock()
_hasty = [False]


def remembered() -> list[dict[str, Any]]:
    """Every choice of this process as plain JSON: the fields of :class:`Case` and of :class:`Choice`."""
    return [{**case._asdict(), "spec": asdict(case.spec), **asdict(choice)} for case, choice in _remembered.items()]


def restore(choices: Iterable[Mapping[str, Any]]) -> None:
    """Take over ``choices`` (see :func:`remembered`); they replace what was measured here.

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
    _generation[0] += 1


def forget() -> None:
    """Drop all choices; the next call of each layer measures again."""
    _remembered.clear()
    _generation[0] += 1


def cache_generation() -> int:
    """A number that changes whenever choices are taken over or dropped, so that layers ask again."""
    return _generation[0]


@contextmanager
def hastily() -> Iterator[None]:
    """For the block, choose after two calls of each algorithm (one that takes long: one); what was chosen so is
    forgotten afterwards."""
    before, was = dict(_remembered), _hasty[0]
    _hasty[0] = True
    try:
        yield
    finally:
        _hasty[0] = was
        _remembered.clear()
        _remembered.update(before)
        _generation[0] += 1


# -------------------------------------------------------------------------------------------------------- the layer


class AutotunedConv2d(VariantConv2d):
    """A variant with several exact algorithms, of which ``algorithm='auto'`` runs the fastest."""

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super()._create_weights(device, dtype)
        self._chosen: dict[str, str] = {}
        self._picked: dict[tuple[Any, ...], tuple[int, str]] = {}  # of calls so far: cache generation, algorithm

    @abstractmethod
    def candidates(self, x: Tensor, weight: Tensor) -> tuple[str, ...]:
        """The algorithms that 'auto' chooses from for x and a kernel like ``weight``, the default first."""

    @abstractmethod
    def _run(self, algorithm: str, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """forward by ``algorithm``, with these weights and bias in the place of the layer's own."""

    @property
    def chosen(self) -> Mapping[str, str]:
        return super().chosen if self.algorithm != "auto" else dict(self._chosen)

    def settle(self, x: Tensor) -> None:
        """Find the algorithm for ``x`` now, in the present state (gradients, autocast), and not in the next call."""
        self._pick(x)

    def _pick(self, x: Tensor) -> str:
        """The algorithm for x: the one that was asked for or, with 'auto', the fastest.

        What is recorded for other programs runs stock operations, the default with 'auto'. While code is compiled
        nothing can be measured: the choice of the last call outside of it is taken, or the default where there was
        none.
        """
        asked, default = self.spec.algorithm, self.spec.algorithms[0]
        if is_recorded(x):
            return default if asked in ("auto", *CUDA_ALGORITHMS) else asked
        if asked != "auto":
            return asked
        grad = torch.is_grad_enabled()
        phase = "training" if grad else "inference"
        if torch.compiler.is_compiling():
            return self._chosen.get(phase, default)
        # All that can differ from call to call, so that only the first call of each kind builds the whole case.
        kernel = self.kernel
        key = (grad, x.requires_grad, kernel.requires_grad, x.shape, x.stride(), type(x), x.device, computed_in(x),
               kernel.dtype, torch.are_deterministic_algorithms_enabled(), is_captured(x.device))  # fmt: skip
        generation, algorithm = self._picked.get(key, (None, None))
        if algorithm is None or generation != cache_generation():
            generation, algorithm = cache_generation(), self._choose(x)
            if algorithm is None:
                return default
            self._picked[key] = generation, algorithm
        self._chosen[phase] = algorithm
        return algorithm

    def _choose(self, x: Tensor) -> str | None:
        """The fastest algorithm for x, remembered or measured; None where there is none to be found."""
        if not can_choose(x):
            return None
        weights = self._weights()
        case = case_of(self.spec, self.padding_mode, x, weights)
        return choose(case, x.device, lambda: self._calls(x, case, weights))

    def _calls(self, x: Tensor, case: Case, weights: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
        """What is timed, by algorithm: one step's work of this layer on random tensors of the same shapes."""
        drawn = torch.Generator(x.device).manual_seed(0)

        def like(given: Tensor, layout: str, grad: bool) -> Tensor:
            memory_format = torch.channels_last if layout == "nhwc" and given.dim() == 4 else torch.contiguous_format
            dtype = getattr(torch, case.dtype)
            made = torch.empty(given.shape, dtype=dtype, device=given.device, memory_format=memory_format)
            return made.normal_(generator=drawn).requires_grad_(grad)

        u = like(x, case.layout, "x" in case.gradients)
        own = [like(weight, case.weight_layout, "w" in case.gradients) for weight in weights]
        bias = None if self.bias is None else like(self.bias, "", "w" in case.gradients)
        leaves = [tensor for tensor in (u, *own, bias) if tensor is not None and tensor.requires_grad]
        given: list[Tensor] = []  # the gradient of the output, made when its layout is known

        def call(algorithm: str) -> object:
            if not leaves:
                with torch.no_grad():
                    return self._run(algorithm, u, own, bias)
            y = self._run(algorithm, u, own, bias)
            if not given:
                given.append(torch.empty_like(y).normal_(generator=drawn))
            return torch.autograd.grad(y, leaves, given[0])

        return {algorithm: functools.partial(call, algorithm) for algorithm in self.candidates(u, own[0])}


# --------------------------------------------------------------------------------------------------------- the case


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
        str(computed_in(x)).removeprefix("torch."),
        _layout_of(x),
        _layout_of(weights[0]),
        f"{torch.get_num_threads()} CPU threads" if kind == "cpu" else torch.cuda.get_device_name(x.device),
        "".join(name for name, is_taken in taken.items() if is_taken),
        _state(kind),
    )


def computed_in(x: Tensor) -> torch.dtype:
    """The type that a convolution of ``x`` computes in: autocast's where that is on."""
    if kernels.autocast_on(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _layout_of(x: Tensor) -> str:
    return "nhwc" if is_channels_last(x) else "nchw"


def _state(kind: str) -> str:
    if kind == "cpu":
        return "mkldnn" if torch.backends.mkldnn.enabled else ""
    switches = {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "tf32": tf32_state()["conv"],
    }
    return ",".join(name for name, on in switches.items() if on)


def can_choose(x: Tensor) -> bool:
    """Whether there is a fastest algorithm for x: a batch of real numbers on a device with a clock.

    Not under ``torch.use_deterministic_algorithms``: the next run may measure something else.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type not in ("cpu", "cuda"):
        return False
    return x.dim() == 4 and x.numel() > 0 and not torch.are_deterministic_algorithms_enabled() and not is_transformed()


def is_captured(device: torch.device) -> bool:
    """Whether what is called on ``device`` now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------------------------------------------------- measuring


def choose(case: Case, device: torch.device, make: Callable[[], dict[str, Callable[[], object]]]) -> str | None:
    """The algorithm to run in ``case``: remembered, or measured now on ``device``.

    make: the calls to be timed, by algorithm, the default first; each does what one step would. An algorithm that
    cannot run (its memory does not suffice, its kernel does not compile) is left out, with a warning the first time; if
    none can, the default is taken and nothing is remembered. While a CUDA graph is captured, the one for graphs, and
    None where nothing is remembered, as nothing can be measured then.
    """
    captured, known = is_captured(device), _remembered.get(case)
    if known is not None:
        return known.graph_form if captured else known.form
    if captured:
        return None
    with _measuring:
        if case not in _remembered:
            with _unseen(device):
                found = measured(lambda: _near(case, make()), device)
            if not found.seconds:
                return found.form
            _remembered[case] = found
            _warn_of(case, found)
        return _remembered[case].form


def _near(case: Case, calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """``calls`` without those that were far behind in long calls of the same layer with other gradients."""
    for known, choice in _remembered.items():
        least = min(choice.seconds.values(), default=0.0)
        if least > LONG_CALL_S and known._replace(gradients=case.gradients) == case:
            calls = {name: call for name, call in calls.items() if choice.seconds.get(name, 0.0) <= FAR_RATIO * least}
    return calls


@contextmanager
def _unseen(device: torch.device) -> Iterator[None]:
    """Switch off the caller's modes: autocast, gradients, hooks of saved tensors (a checkpoint's count what forward
    saves), counters of operations. Stays in the caller's thread: another thread gets large blocks of memory from the
    system anew at each call, which favours algorithms that take little."""
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


def measured(make: Callable[[], Mapping[str, Callable[[], object]]], device: torch.device) -> Choice:
    """The fastest of the calls that ``make`` makes, by name, the default first; what cannot run is left out."""
    calls = dict(make())
    default = next(iter(calls))
    left_out = {}
    first = {}
    for name in list(calls):
        begun = time.perf_counter()
        try:
            calls[name]()  # the first call sets up what libraries keep
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            first[name] = time.perf_counter() - begun
        except Exception as problem:  # noqa: BLE001 - compilers and launchers of kernels raise what they like
            left_out[name] = [type(problem).__name__, *str(problem).strip().splitlines()[:1]]
            del calls[name]
    best, in_graph = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, float("inf"))
    most = 1 if _hasty[0] else MAX_ROUNDS
    if device.type == "cpu" and min(first.values(), default=0.0) > LONG_CALL_S:
        best, in_graph = first, dict(first)
        limit = NEAR_RATIO * min(first.values())
        # Not the first of all, which may have set up torch's own threads and memory.
        calls = {name: call for name, call in calls.items() if name == default or first[name] <= limit}
        most = 1 if len(calls) > 1 and not _hasty[0] else 0
    begun = time.perf_counter()
    for rounds in range(1, most + 1):
        for name, call in calls.items():
            busy, host = _seconds(call, device)
            in_graph[name] = min(in_graph[name], busy)
            best[name] = min(best[name], max(busy, host))
        if rounds == PRUNE_AFTER:
            limits = [(seconds, PRUNE_RATIO * min(seconds.values())) for seconds in (best, in_graph)]
            calls = {n: call for n, call in calls.items() if any(seconds[n] <= limit for seconds, limit in limits)}
        spent = time.perf_counter() - begun
        is_enough = rounds >= MIN_ROUNDS and spent > MIN_S
        if len(calls) < 2 or is_enough or (rounds >= LONG_ROUNDS and spent > LONG_S):
            break
    return Choice(_fastest(best, default), best, _fastest(in_graph, default), in_graph, left_out)


def _fastest(seconds: Mapping[str, float], default: str) -> str:
    chosen = default
    for name, spent in seconds.items():
        if chosen not in seconds or spent < GAIN_RATIO * seconds[chosen]:
            chosen = name
    return chosen


def _warn_of(case: Case, found: Choice) -> None:
    """Name the algorithms that were left out, and why: once for each kind of error."""
    for name, reason in found.left_out.items():
        about = (case.spec.variant, name, reason[0])
        if about not in _warned:
            _warned.add(about)
            text = f"{case.spec.variant}: algorithm '{name}' cannot run here and is left out ({': '.join(reason)})"
            warnings.warn(text, stacklevel=2)


def _seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """One call: the device's seconds and the host's. Disturbances only ever add time, so the least of several calls
    is what an algorithm can do."""
    if device.type == "cuda":
        return device_and_host_seconds(call)
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return seconds, seconds
