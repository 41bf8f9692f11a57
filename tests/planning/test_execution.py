"""What is timed, in every mode and phase: it runs, leaves the network as it is, and says why where it cannot run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bgcbench
from bgcbench.conversion.convert import candidates
from bgcbench.convs import build_conv
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing
from bgcbench.measure.workload import Cell
from bgcbench.planning import plan as planning
from bgcbench.planning.execution import Execution
from bgcbench.planning.plan import counted_problem, timed
from bgcbench.specs import Choice, ConvSpec
from tests.deployment.example import needs_onnx
from tests.planning.test_plan import images, network

pytestmark = pytest.mark.usefixtures("brisk", "one_thread")
EVERY = [
    ("eager", "fwd"),
    ("eager", "train_step"),
    ("compile", "fwd"),
    ("compile", "train_step"),
    pytest.param("onnxruntime", "fwd", marks=needs_onnx),
]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was given to torch.compile, which only records it here."""
    given: list[Any] = []

    def record(module: nn.Module, **options: Any) -> nn.Module:
        given.append(module)
        return module

    monkeypatch.setattr(torch, "compile", record)
    return given


@pytest.mark.parametrize(("mode", "phase"), EVERY)
def test_a_budget_of_time_is_planned_and_the_network_stays_as_it_is(mode: str, phase: str, compiled: list[Any]) -> None:
    model = network()
    before, x = copy.deepcopy(model.state_dict()), images(16)
    given: dict[str, Any] = {"groups": (2,), "variants": ("gc", "lgc"), "exclude": ["[24].conv"]}
    plan = bgcbench.plan(model, [x], time=1.0, quick=True, try_out=False, mode=mode, phase=phase, **given)
    assert {layer.name for layer in plan.layers} == {"1.conv", "3.conv"}
    assert all(layer.chosen.seconds is not None for layer in plan.layers)
    assert not [note for note in plan.notes if "left out" in note or "could not be measured" in note]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    # Two shapes as themselves and as two choices; the network as it is, which alone loses nothing, and with each.
    assert len(compiled) == (9 if mode == "compile" else 0)


@needs_onnx
def test_in_onnx_runtime_a_layer_takes_no_longer_than_the_dense_convolution() -> None:
    """Because its kernel may be folded into one."""
    model = network()
    problem = counted_problem(
        candidates(model, exclude="[2-4].conv", example_input=(3, 12, 12)).chosen, ("tlgc",), (2, 4)
    )
    found = timed(model, problem, Passing(), (images(2),), Execution("onnxruntime"), quick=True)
    for options in found.layers:
        alone = {each.choice: each.seconds for each in options.options}
        assert len(alone) == 3
        saved = [(alone[Choice()] or 0) - (seconds or 0) for seconds in alone.values()]
        assert all(each * found.factors["tlgc"] >= 0 for each in saved)


@pytest.mark.parametrize(("mode", "phase"), EVERY)
def test_what_cannot_be_made_ready_is_left_out_and_said_why(
    mode: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Execution.layers

    def broken() -> Cell:
        raise RuntimeError("no kernel for this")

    def without_gc(self: Execution, layers: Any, x: torch.Tensor) -> dict[str, Callable[[], Cell]]:
        return {**ready(self, layers, x), "GC N=2": broken}

    monkeypatch.setattr(Execution, "layers", without_gc)
    model = network()
    problem = counted_problem(
        candidates(model, exclude="[2-4].conv", example_input=(3, 12, 12)).chosen, ("gc",), (2, 4)
    )
    found = timed(model, problem, Passing(), (images(4),), Execution(mode, phase), quick=True)
    assert [each.choice for each in found.layers[0].options] == [Choice(), Choice("gc", 4)]
    assert found.untimed == {("1.conv", Choice("gc", 2)): "RuntimeError: no kernel for this"}
    assert "such as GC N=2 of 1.conv: RuntimeError: no kernel for this" in "".join(found.notes)


def test_the_gradient_of_an_image_is_not_taken() -> None:
    """As in the network, whose first convolution reads images."""
    model, seen = network(), {}
    ready = Execution.layers

    def look(self: Execution, layers: Any, x: torch.Tensor) -> Any:
        seen[x.shape[1]] = x.requires_grad
        return ready(self, layers, x)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Execution, "layers", look)
        layers = candidates(model, include="0.conv", exclude="[2-4].conv", example_input=(3, 12, 12)).chosen
        problem = counted_problem(layers, ("lowrank",), (), (2,))
        frozen = model.requires_grad_(requires_grad=False)
        timed(frozen, problem, Passing(), (images(4),), Execution(phase="train_step"), quick=True)
    assert seen == {3: False, 16: True}


@needs_onnx
def test_layers_of_one_export_are_those_of_their_own() -> None:
    """One of an export of all computes what its module does; a wrong one is refused."""
    layers = {name: build_conv(ConvSpec(name, 16, 16, 3, 1, 1, groups=2)).eval() for name in ("gc", "bgc", "shuffle")}
    x = torch.randn(2, 16, 6, 6)
    makers = Execution("onnxruntime").layers(layers, x)
    assert list(makers) == list(layers)
    for make in makers.values():
        make().once()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Execution("graph"), "unknown mode 'graph'"),
        (lambda: Execution(phase="bwd"), "unknown phase 'bwd'"),
        (lambda: Execution("onnxruntime", "train_step"), "--mode onnxruntime has --phase fwd alone, not train_step"),
        (lambda: plan_with(mode="compile", forward_fn=lambda model, x: model(x)), "called with one tensor of images"),
        (lambda: plan_with(phase="train_step", outputs=nn.Unflatten(1, (2, 5))), "no row of class scores"),
        (lambda: plan_with(time=0.001), "time=0.001 cannot be met: the least is"),
        (lambda: plan_with(time=None, params=0.01), "params=0.01 cannot be met: the least is"),
    ],
)
def test_what_cannot_be_is_refused_before_losses_are_measured(
    call: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "scored", lambda *_: pytest.fail("losses were measured"))
    with pytest.raises(UsageError, match=message):
        call()


def plan_with(outputs: nn.Module | None = None, **options: Any) -> Any:
    model = network() if outputs is None else nn.Sequential(*network(), outputs).eval()
    given: dict[str, Any] = {"time": 0.9, "groups": (2,), "variants": ("gc",), "quick": True, "exclude": "[2-4].conv"}
    return bgcbench.plan(model, [images(16)], **{**given, **options})
