"""On a real CUDA device: the layers against float64, the stopwatch, and whole runs in every mode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bgcbench.cli import main
from bgcbench.conversion.convert import convert, load_converted, save_converted
from bgcbench.convs import CONVS
from bgcbench.experiments.network_run import plan_network
from bgcbench.experiments.profile import NetworkConfig, ProfileConfig, plan
from bgcbench.experiments.profile_run import ProfileRun, open_session, subjects_of
from bgcbench.measure.device import CudaStopwatch, backend_state, device_answers
from bgcbench.measure.environment import describe_environment, diagnose
from bgcbench.measure.memory import measure_peak
from bgcbench.measure.workload import Cell, capture
from bgcbench.models import build_model
from bgcbench.specs import POINTWISE_ALGORITHMS, VARIANTS
from bgcbench.training.checkpoint import Checkpoints
from bgcbench.training.distributed import World
from bgcbench.training.loop import Training
from tests.stored import stored
from tests.training.example import tiny_data, tiny_network, tiny_recipe

pytestmark = pytest.mark.gpu
FORMS = [(name, form) for name in CONVS for form in VARIANTS[name].algorithms]
# Relative error of a product of that many terms in each precision, against float64 on the rounded operands.
TOLERANCE = {"fp32": 2e-6, "tf32": 2e-3, "bf16": 1e-2}
SMALL = ProfileConfig(in_channels=64, out_channels=64, batch=8, groups=(2, 4), device="cuda", max_time_s=0.5)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_layers_equal_float64_forward_and_backward(device, name, form, precision, layout) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kernel, padding = (1, 0) if form in POINTWISE_ALGORITHMS else (3, 1)
    layer = CONVS[name](64, 64, kernel, 2, padding, groups=1 if name == "standard" else 4, algorithm=form)
    layer.to(device=device, dtype=dtype, memory_format=layout)
    x = torch.randn(8, 64, 13, 13, device=device, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    dense, bias, x64 = (t.detach().double() for t in (layer.dense_weight(), layer.bias, x))
    expected = F.conv2d(x64.requires_grad_(), dense, bias, 2, padding)
    upstream = torch.randn_like(expected).to(dtype)
    (expected_dx,) = torch.autograd.grad(expected, x64, upstream.double())
    with backend_state(precision):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, upstream)
    for own, exact in ((y, expected), (dx, expected_dx)):
        assert float((own.detach().double() - exact.detach()).norm() / exact.detach().norm()) < TOLERANCE[precision]


def test_events_time_the_device_and_not_the_launch(device: torch.device) -> None:
    a = torch.randn(4096, 4096, device=device)
    watch = CudaStopwatch(device, flush_bytes=2**20)
    one, ten = (
        Cell(call=lambda n=n: [a @ a for _ in range(n)], context=torch.inference_mode) for n in (1, 10)
    )  # fmt: skip
    watch.sample(ten, 3)
    short, long = min(watch.sample(one, 10)), min(watch.sample(ten, 10))
    assert 8 < long / short < 12
    host = watch.host_time(one)
    assert host is not None
    assert host < short


def test_the_peak_is_the_allocators(device: torch.device) -> None:
    size = 64 * 2**20
    held: list[torch.Tensor] = []
    cell = Cell(
        call=lambda: held.append(torch.ones(size, dtype=torch.uint8, device=device)), release=held.clear
    )  # fmt: skip
    peak = measure_peak(cell, device)
    assert (peak.method, peak.delta_bytes, peak.agreed) == ("cuda_allocator", size, True)


@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_run_in_every_mode_and_precision(mode: str, precision: str) -> None:
    config = replace(SMALL, mode=mode, precision=precision, layout="nhwc", phases=("fwd", "bwd", "fwd_bwd"))
    done = ProfileRun(config, open_session(config), plan(config))
    assert list(done.run())
    assert {row.status for row in done.results} == {"ok"}, [row.reason for row in done.results]
    for row in done.results:
        assert row.memory.method == "cuda_allocator"
        for measured in row.phases.values():
            assert measured.host_s > 0
            assert len(set(measured.rounds)) >= 10


def test_a_graph_computes_what_the_eager_call_does(device: torch.device) -> None:
    config = replace(SMALL, mode="graph", groups=(2,))
    run = ProfileRun(config, open_session(config), plan(config))
    with backend_state("fp32"):
        for row in run.rows:
            work = run._workload(row)
            cell = work.cell("fwd_bwd")
            cell.once()
            torch.cuda.synchronize()
            graphed = [leaf.grad.clone() for leaf in work.leaves if leaf.grad is not None]
            upstream = work._grad_out
            leaves = [leaf for leaf in work.leaves if leaf.requires_grad]
            eager = torch.autograd.grad(work.module(work.x), leaves, upstream)
            assert len(graphed) == len(eager)
            for own, reference in zip(graphed, eager, strict=True):
                torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-4)


def test_a_capture_that_fails_spoils_nothing(device: torch.device) -> None:
    x, total = torch.ones(8, device=device), torch.ones(8, device=device)
    with pytest.raises(RuntimeError, match="captur"):
        capture(lambda: x.sum().item(), torch.cuda.graph_pool_handle())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    assert torch.randn(8, device=device).isfinite().all()
    replay = capture(lambda: total.add_(x), torch.cuda.graph_pool_handle())
    replay()
    assert total.tolist() == [2.0] * 8


NETWORK = NetworkConfig(model="wrn_10_1", batch=8, groups=(2, 4), device="cuda", max_time_s=0.5)


@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_networks_in_every_mode(mode: str, precision: str) -> None:
    config = replace(NETWORK, mode=mode, precision=precision, layout="nhwc", variants=tuple(VARIANTS), groups=(4,))
    planned = plan_network(config)
    done = ProfileRun(config, open_session(config), planned.rows)
    assert list(done.run())
    assert {row.status for row in done.results} == {"ok"}, [row.reason for row in done.results]
    assert {phase for row in done.results for phase in row.phases} == {"fwd", "train_step"}


def test_a_captured_training_step_computes_the_gradients_of_an_eager_one(device: torch.device) -> None:
    planned = plan_network(replace(NETWORK, mode="graph"))
    session = open_session(NETWORK)
    x = torch.randn(8, 3, 32, 32, device=device)
    for subject in subjects_of(planned.rows).values():
        work = subject.workload(session, x, None)
        work.cell("train_step").call()
        torch.cuda.synchronize()
        graphed = [p.grad.clone() for p in work.plain.parameters()]
        loss = F.cross_entropy(work.plain(x), work.labels)
        eager = torch.autograd.grad(loss, list(work.plain.parameters()))
        for own, reference in zip(graphed, eager, strict=True):
            torch.testing.assert_close(own, reference, rtol=1e-2, atol=1e-4)


def test_a_converted_network_stays_on_its_device_and_loads_there(device: torch.device, tmp_path: Path) -> None:
    model = build_model("wrn_10_1").to(device=device, memory_format=torch.channels_last)
    converted = convert(model, "bgc", 2)
    assert all(p.device == device for p in converted.model.parameters())
    x = torch.randn(2, 3, 32, 32, device=device)
    save_converted(converted, tmp_path / "net.pt")
    loaded = load_converted(tmp_path / "net.pt", map_location=device)
    with backend_state("fp32"):
        expected = model.eval()(x)
        for network in (converted.model.eval(), loaded):  # exact at N = 2
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


def test_running_out_of_memory_is_a_row_and_the_device_lives_on(device, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["profile", "--channels", "64", "--size", "7", "--groups", "2", "--device", "cuda", "--quick"]
    assert main([*arguments, "--batch", "100000000", "--out", "r.json", "--quiet"]) == 1
    assert {row["status"] for row in stored(tmp_path / "r.json")["results"]} == {"oom"}
    assert device_answers(device)


def test_a_real_allocation_failure_in_one_row_leaves_the_others(device, monkeypatch) -> None:
    forward = CONVS["gc"].forward

    def greedy(self: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
        torch.empty(2**50, dtype=torch.uint8, device=device)
        return forward(self, input)

    monkeypatch.setattr(CONVS["gc"], "forward", greedy)
    done = ProfileRun(SMALL, open_session(SMALL), plan(SMALL))
    assert list(done.run())
    assert [row.status for row in done.results] == ["ok", "oom", "ok", "oom", "ok"]
    assert all(str(2**50) in row.reason for row in done.results if row.status == "oom")


def test_the_environment_and_the_doctor_know_the_device(device: torch.device) -> None:
    environment = describe_environment(device)
    assert environment["device"]["name"] == torch.cuda.get_device_name(device)
    assert environment["device"]["sm_count"] > 0
    assert environment["device"]["l2_bytes"] > 0
    assert json.dumps(environment)
    assert any(what == "device memory in use" for what, _, _ in diagnose(device))


@pytest.mark.parametrize("variant", ["standard", "bgc", "lgc", "flgc"])
def test_a_training_step_computes_what_it_does_on_a_cpu(device: torch.device, variant: str) -> None:
    groups = 1 if variant == "standard" else 2
    losses = []
    for where in (torch.device("cpu"), device):
        with backend_state("fp32"):
            run = Training(
                tiny_network(variant, groups).double().to(where),
                tiny_data(),
                tiny_recipe(),
                World(device=where),
                seed=5,
            )
            for _ in run.run():
                pass
        losses.append([epoch.train_loss for epoch in run.state.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_training_is_resumed_on_the_device(device: torch.device, tmp_path: Path) -> None:
    found = []
    for stopped in (False, True):
        where = Checkpoints(tmp_path / str(stopped))
        for last in (False, True) if stopped else (True,):
            run = Training(
                tiny_network("bgc", 2, dropout=0.2).to(device, torch.float64), tiny_data(), tiny_recipe(),
                World(device=device), seed=5, checkpoints=where,
            )  # fmt: skip
            if not last:
                run.stop = lambda run=run: run.state.epoch == 1 and run.state.step == 2  # type: ignore[misc]
            for _ in run.run():
                pass
            assert run.stopped is not last
        found.append(run.network.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_network_trains_and_says_how_near_the_peak_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "wrn_10_2", "--data", "synthetic", "--recipe", recipe, "--epochs", "2", "--variants", "all",
                 "--groups", "4", "--device", "cuda", "--quiet", "--out", "r.json"]  # fmt: skip
    assert main(arguments) == 0
    found = stored(tmp_path / "r.json")
    assert len(found["results"]) == 7
    for row in found["results"]:
        assert row["images_per_s"] > 0
        assert 0 < row["matmul_fraction"] < 1


def test_digits_are_learnt_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "wrn_10_2", "--data", "digits", "--groups", "4", "--variants", "bgc", "--device", "cuda",
                 "--quiet", "--out", "r.json"]  # fmt: skip
    assert main(arguments) == 0
    assert all(row["error_final"] < 4 for row in stored(tmp_path / "r.json")["results"])
