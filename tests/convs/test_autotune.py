"""Choosing an algorithm by measuring: what is asked, what is remembered, and what must not be disturbed."""

from __future__ import annotations

import json
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bgcbench.convs import autotune
from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.convs.gc import GroupConv2d
from bgcbench.errors import ResultFileError, UsageError
from bgcbench.specs import ConvSpec


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    before = autotune.remembered()
    autotune.forget()
    yield
    autotune.forget()
    autotune.restore(before)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes one algorithm the fastest on an invented clock, which may tell (device's, host's) seconds; returns the
    list of calls that will be timed."""

    def make(**seconds: float | tuple[float, float]) -> list[str]:
        timed: list[str] = []

        def clock(call: Any, device: torch.device) -> tuple[float, float]:
            call()
            timed.append(call.args[0])
            told = seconds.get(call.args[0], 9.0)
            return told if isinstance(told, tuple) else (told, told)

        monkeypatch.setattr(autotune, "_seconds", clock)
        monkeypatch.setattr(autotune, "MIN_S", 0.0)
        return timed

    return make


def layer(**options: Any) -> BalancedGroupConv2d:
    return BalancedGroupConv2d(16, 32, 3, padding=1, groups=4, **options)


X = (4, 16, 6, 5)


def test_the_fastest_algorithm_is_taken_and_measured_once(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(dense=1.0)
    own = layer()
    own(torch.randn(X))
    assert own.chosen == {"training": "dense"}
    count = len(timed)
    assert count > 0
    own(torch.randn(X))
    layer()(torch.randn(X))  # another layer of the same kind
    assert len(timed) == count


def test_what_the_time_depends_on_is_a_case_of_its_own(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(concat=1.0)
    seen = 0

    def is_new(run: Callable[[], Tensor]) -> bool:
        nonlocal seen
        run()
        before, seen = seen, len(timed)
        return seen > before

    own = layer()
    assert is_new(lambda: own(torch.randn(X)))
    assert is_new(lambda: own(torch.randn(5, 16, 6, 5)))
    assert is_new(lambda: own(torch.randn(4, 16, 5, 6)))
    assert is_new(lambda: own(torch.randn(X).contiguous(memory_format=torch.channels_last)))
    assert is_new(lambda: own(torch.randn(X, requires_grad=True)))
    assert is_new(lambda: torch.no_grad()(own)(torch.randn(X)))
    assert is_new(lambda: own.requires_grad_(False)(torch.randn(X, requires_grad=True)))
    assert not is_new(lambda: own(torch.randn(X)))  # no gradients, as under no_grad
    assert is_new(lambda: layer(stride=2)(torch.randn(X)))
    assert is_new(lambda: layer(bias=False)(torch.randn(X)))
    assert is_new(lambda: layer().double()(torch.randn(X).double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_new(lambda: layer()(torch.randn(X)))
    torch.set_num_threads((threads := torch.get_num_threads()) + 1)
    try:
        assert is_new(lambda: layer()(torch.randn(X)))
    finally:
        torch.set_num_threads(threads)
    assert not is_new(lambda: layer()(torch.randn(X)))


@pytest.mark.filterwarnings("ignore:bgc")
def test_an_algorithm_that_cannot_run_is_left_out_and_if_none_can_the_default_is_taken(
    fastest: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(dense=1.0, concat=2.0)
    run, measured = BalancedGroupConv2d._run, autotune.measured
    broken = {"dense"}
    measuring = threading.Event()

    def watched(*arguments: Any) -> autotune.Choice:
        measuring.set()
        found = measured(*arguments)
        measuring.clear()
        return found

    monkeypatch.setattr(autotune, "measured", watched)

    def fails(self: BalancedGroupConv2d, algorithm: str, x: Tensor, weights: Any, bias: Any) -> Tensor:
        if algorithm in broken and measuring.is_set():
            raise torch.OutOfMemoryError("too much")
        return run(self, algorithm, x, weights, bias)

    monkeypatch.setattr(BalancedGroupConv2d, "_run", fails)
    own = layer()
    own(torch.randn(X))
    assert own.chosen == {"training": "concat"}
    autotune.forget()
    broken.update(own.spec.algorithms)
    own(torch.randn(X))
    assert own.chosen == {"training": "two_conv"}
    assert autotune.remembered() == []


class NoRoom(Exception):
    """What a launcher of kernels raises, which is no RuntimeError."""


def test_whatever_an_algorithm_raises_it_is_left_out_and_that_is_said_once(
    fastest: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(dense=1.0, concat=2.0)
    run = BalancedGroupConv2d._run

    def fails(self: BalancedGroupConv2d, algorithm: str, *arguments: Any) -> Tensor:
        if algorithm == "dense":
            raise NoRoom("out of resource: shared memory\nand more")
        return run(self, algorithm, *arguments)

    monkeypatch.setattr(BalancedGroupConv2d, "_run", fails)
    monkeypatch.setattr(autotune, "_warned", set())
    own = layer()
    with pytest.warns(UserWarning, match=r"bgc: algorithm 'dense' .*NoRoom: out of resource: shared memory\)"):
        own(torch.randn(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own(torch.randn(5, 16, 6, 5))
    assert own.chosen == {"training": "concat"}
    stored = json.loads(json.dumps(autotune.remembered()))
    assert [entry["left_out"] for entry in stored] == [{"dense": ["NoRoom", "out of resource: shared memory"]}] * 2
    autotune.restore(stored)
    assert json.loads(json.dumps(autotune.remembered())) == stored
    autotune.restore([{name: value for name, value in entry.items() if name != "left_out"} for entry in stored])


def test_where_no_algorithm_can_run_the_call_itself_says_why(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        layer()(torch.randn(4, 17, 6, 5))
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_kernels_are_tried_in_its_type(
    dtype: torch.dtype, fastest: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(triton=1.0)
    monkeypatch.setattr("bgcbench.kernels.device_ready", lambda kind, index: True)  # as if they could run here ...
    monkeypatch.setattr("bgcbench.kernels.operators.launchable", lambda *_: False)  # ... which they cannot
    own, x = layer(), torch.randn(X).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = own(x)
    assert own.chosen == {"training": "triton"}
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [BalancedGroupConv2d, GroupConv2d])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_code_keeps_the_kernels_of_our_own(kind: type[Any], autocast: bool) -> None:
    torch.compiler.reset()
    own, x = kind(16, 32, 3, padding=1, groups=4, algorithm="triton"), torch.randn(X)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        compiled = torch.compile(own, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), own(x))
    assert f"ops.bgcbench.{own.variant}_conv2d" in graphs[0]
    # There are no kernels of our own for several layers at once.
    mapped = torch.compile(torch.vmap(own.forward), backend=backend, fullgraph=True)
    torch.testing.assert_close(mapped(x[None]), own(x)[None], rtol=1e-4, atol=1e-4)
    assert "bgcbench" not in graphs[1]


def test_a_gain_that_is_none_changes_nothing(fastest: Callable[..., list[str]]) -> None:
    fastest(two_conv=1.0, concat=0.995, dense=0.999)
    own = layer()
    own(torch.randn(X))
    assert own.chosen == {"training": "two_conv"}


def test_an_algorithm_far_behind_is_dropped_early(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(two_conv=1.0, concat=1.1, dense=5.0)
    layer()(torch.randn(X))
    assert timed.count("dense") == autotune.PRUNE_AFTER
    assert timed.count("concat") >= autotune.MIN_ROUNDS


def test_calls_that_take_long_are_timed_less_often(
    fastest: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = fastest(two_conv=1.0, concat=1.1)
    monkeypatch.setattr(autotune, "LONG_S", 0.0)
    layer()(torch.randn(X))
    assert timed.count("two_conv") == timed.count("concat") == autotune.LONG_ROUNDS < autotune.MIN_ROUNDS


def test_calls_that_take_seconds_are_timed_once_more_and_those_far_behind_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first call of each tells which they are, and the same layer without gradients which to try with them."""
    run, calls = BalancedGroupConv2d._run, Counter[str]()
    takes, clock = {"two_conv": 0.5, "concat": 0.52, "dense": 2.0, "split": 2.0}, [0.0]

    def slow(self: BalancedGroupConv2d, algorithm: str, *given: Any) -> Tensor:
        calls[algorithm] += 1
        clock[0] += takes[algorithm]
        return run(self, algorithm, *given)

    monkeypatch.setattr(BalancedGroupConv2d, "_run", slow)
    monkeypatch.setattr(autotune, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    own, x = layer(), torch.randn(X)
    with torch.inference_mode():
        own(x)
    own(x)
    assert calls == {"two_conv": 6, "concat": 4, "dense": 1, "split": 1}  # two_conv is what runs then, too
    assert own.chosen == {"inference": "two_conv", "training": "two_conv"}


def test_a_hasty_choice_is_made_in_a_call_each_and_forgotten(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(dense=1.0)
    own, x = layer(), torch.randn(X)
    with autotune.hastily():
        own(x)
        assert sorted(timed) == ["concat", "dense", "split", "two_conv"]
        assert own.chosen == {"training": "dense"}
    assert autotune.remembered() == []
    own(x)
    assert timed.count("dense") == 1 + autotune.PRUNE_AFTER  # the others are far behind


def test_a_graph_takes_the_algorithm_that_is_fastest_on_the_device_and_a_call_what_the_host_can_keep_up_with(
    fastest: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(dense=(2.0, 8.0), concat=(4.0, 3.0), split=(5.0, 1.0))
    own, x = layer(), torch.randn(X)
    own(x)
    assert own.chosen == {"training": "concat"}
    monkeypatch.setattr(autotune, "is_captured", lambda _: True)
    own(x)
    assert own.chosen == {"training": "dense"}
    (stored,) = autotune.remembered()
    assert (stored["seconds"]["dense"], stored["graph_seconds"]["dense"]) == (8.0, 2.0)


def test_choices_of_files_that_know_no_graph_stand_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = layer(), torch.randn(X)
    own(x)
    (stored,) = autotune.remembered()
    for name in ("graph_form", "graph_seconds"):
        del stored[name]
    autotune.restore([{**stored, "form": "dense"}])
    for captured in (False, True):
        monkeypatch.setattr(autotune, "is_captured", lambda _, captured=captured: captured)
        own(x)
        assert own.chosen == {"training": "dense"}


def test_choices_outlive_the_process_and_go_before_what_is_measured(fastest: Callable[..., list[str]]) -> None:
    fastest(concat=1.0)
    layer()(torch.randn(X))
    stored = autotune.remembered()
    assert [entry["form"] for entry in stored] == ["concat"]
    assert stored[0]["seconds"]["concat"] == 1.0
    autotune.forget()
    timed = fastest(dense=1.0)
    autotune.restore(json.loads(json.dumps(stored)))
    own = layer()
    own(torch.randn(X))
    assert own.chosen == {"training": "concat"}
    assert timed == []
    with pytest.raises(ResultFileError, match="no choice of an algorithm"):
        autotune.restore([{"form": "dense"}])


def test_a_fixed_algorithm_is_never_measured(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(dense=1.0)
    own = layer(algorithm="concat")
    own(torch.randn(X))
    assert timed == []
    assert own.chosen == {"inference": "concat", "training": "concat"}


def test_deterministic_algorithms_are_asked_for_and_given(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(dense=1.0)
    torch.use_deterministic_algorithms(True)
    try:
        own = layer()
        expected = layer(algorithm="two_conv")
        expected.load_state_dict(own.state_dict())
        x = torch.randn(X)
        assert torch.equal(own(x), expected(x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert timed == []


def test_measuring_leaves_no_trace(fastest: Callable[..., list[str]]) -> None:
    fastest(two_conv=1.0)
    own, x = layer(), torch.randn(X, requires_grad=True)
    state = torch.get_rng_state()
    saved: list[Tensor] = []
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = own(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert counter.get_total_flops() == 2 * 4 * own.macs(6, 5)  # of one call, in the default algorithm
    assert len([tensor for tensor in saved if len(tensor) == len(x)]) == 2  # x and its mean; the others are kernels
    assert all(p.grad is None for p in own.parameters())
    assert x.grad is None
    y.sum().backward()
    assert x.grad is not None


def test_checkpointed_layers_measure_in_the_first_pass_only(fastest: Callable[..., list[str]]) -> None:
    fastest(concat=1.0)
    own, x = layer(), torch.randn(X, requires_grad=True)
    checkpoint(own, x, use_reentrant=False).sum().backward()
    again = layer(algorithm="concat")
    again.load_state_dict(own.state_dict())
    (expected,) = torch.autograd.grad(again(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_a_compiled_layer_takes_the_algorithm_of_the_last_eager_call(fastest: Callable[..., list[str]]) -> None:
    fastest(dense=1.0)
    torch.compiler.reset()
    own, x = layer(), torch.randn(X)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    expected = own(x)
    compiled = torch.compile(own, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert ".repeat(" in graphs[0]  # the folded kernel
    untouched = torch.compile(layer(), backend=backend, fullgraph=True)
    untouched(x)
    assert ".repeat(" not in graphs[1]


def test_transforms_of_torch_func_see_one_map() -> None:
    own = layer().double()
    x = torch.randn(3, *X, dtype=torch.float64)
    expected = torch.stack([own(part) for part in x])
    torch.testing.assert_close(torch.vmap(own)(x), expected)
    parameters = dict(own.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(own, values, (x[0],)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    for found, wanted in zip(
        gradients.values(), torch.autograd.grad(loss(parameters), parameters.values()), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    # B alone is mapped over: an in-place sum could not hold the result.
    many = torch.randn(2, *own.weight_mean.shape, dtype=torch.float64)
    outputs = torch.vmap(lambda b: torch.func.functional_call(own, {"weight_mean": b}, (x[0],)))(many)
    assert outputs.shape == (2, 4, 32, 6, 5)
    _, tangent = torch.func.jvp(own, (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, F.conv2d(torch.ones_like(x[0]), own.dense_weight(), None, 1, 1))


@pytest.mark.parametrize("algorithm", ConvSpec("bgc", 16, 32, 1, groups=4).algorithms)
def test_every_algorithm_can_be_differentiated_twice(algorithm: str) -> None:
    own = BalancedGroupConv2d(4, 6, 1, stride=2, groups=2, algorithm=algorithm, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in own.parameters()]
    names = [name for name, _ in own.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(own, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


def test_an_algorithm_for_1x1_kernels_is_refused_elsewhere() -> None:
    with pytest.raises(UsageError, match="'matmul' is for 1x1 kernels without padding; use 'auto'"):
        layer(algorithm="matmul")
    with pytest.raises(UsageError, match="'matmul'"):
        BalancedGroupConv2d(16, 32, 1, padding=1, groups=4, algorithm="matmul")


def test_a_variant_without_a_choice_has_none() -> None:
    own = GroupConv2d(16, 32, 3, groups=4)
    own(torch.randn(X))
    assert own.algorithm == "stock"
    assert autotune.remembered() == []


def test_threads_that_meet_at_a_new_case_measure_it_once(fastest: Callable[..., list[str]]) -> None:
    timed = fastest(dense=1.0)
    own, x = layer(), torch.randn(X)
    runs = [threading.Thread(target=own, args=(x,)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert timed.count("dense") <= autotune.MAX_ROUNDS
    assert len(autotune.remembered()) == 1
