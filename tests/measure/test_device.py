from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from bgcbench.errors import DeviceError, UsageError
from bgcbench.measure import device as devices
from bgcbench.measure.ceilings import Ceilings, measure_ceilings
from bgcbench.measure.counts import CallWork
from bgcbench.measure.device import (
    CpuStopwatch,
    asked_bytes,
    backend_state,
    check_combination,
    compile_state,
    describe_failure,
    resolve_device,
    tf32_state,
)
from bgcbench.measure.environment import describe_environment, diagnose, fingerprint
from bgcbench.measure.load import Contention, free_cores
from bgcbench.measure.memory import measure_peak
from bgcbench.measure.workload import Cell, Workload

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_the_cpu_is_found() -> None:
    assert resolve_device("cpu") == (CPU, None)


@NO_CUDA
def test_auto_falls_back_to_the_cpu_and_says_so() -> None:
    found, warning = resolve_device("auto")
    assert found == CPU
    assert warning is not None
    assert "CPU" in warning


@NO_CUDA
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_cuda_device_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(DeviceError, match=f"--device {name}"):
        resolve_device(name)


@pytest.mark.parametrize(("precision", "mode"), [("tf32", "eager"), ("fp32", "graph")])
def test_what_a_cpu_cannot_do_is_refused(precision: str, mode: str) -> None:
    with pytest.raises(UsageError, match="on a CPU use"):
        check_combination(CPU, precision, mode)
    check_combination(CPU, "bf16", "compile")


def test_every_switch_is_set_inside_and_put_back_after() -> None:
    def state() -> tuple[object, ...]:
        cudnn = torch.backends.cudnn
        return tf32_state(), cudnn.benchmark, cudnn.deterministic, torch.get_num_threads()

    before = state()
    with backend_state("fp32", threads=1):
        assert state() == ({"conv": False, "matmul": False}, True, False, 1)
    with contextlib.suppress(KeyError), backend_state("tf32"):
        assert tf32_state() == {"conv": True, "matmul": True}
        raise KeyError
    assert state() == before


def test_the_stopwatch_times_the_call_and_nothing_else() -> None:
    events: list[str] = []
    cell = Cell(
        call=lambda: events.append("call"),
        prepare=lambda: events.append("prepare"),
        release=lambda: events.append("release"),
    )
    watch = CpuStopwatch(CPU)
    times = watch.sample(cell, 3)
    assert events == ["prepare", "call"] * 3 + ["release"]
    assert len(times) == 3
    assert all(t >= 0 for t in times)


def test_the_collector_is_off_while_sampling_and_on_again_even_after_a_failure() -> None:
    seen: list[bool] = []

    def call() -> None:
        seen.append(gc.isenabled())
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        CpuStopwatch(CPU).sample(Cell(call=call), 1)
    assert seen == [False]
    assert gc.isenabled()


def test_a_cold_cache_means_a_buffer_is_overwritten_before_every_call() -> None:
    watch = CpuStopwatch(CPU, flush_bytes=4096)
    assert watch._flush is not None
    found: list[int] = []

    def call() -> None:
        found.append(int(watch._flush.abs().sum()))
        watch._flush.fill_(7)

    watch.sample(Cell(call=call), 3)
    assert found == [0, 0, 0]


def test_switches_set_through_the_newer_interface_are_put_back() -> None:
    conv = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(conv, "fp32_precision"):
        pytest.skip("torch before 2.9 has one interface")
    before = tf32_state()
    try:
        conv.fp32_precision = "ieee"
        with backend_state("tf32"):
            assert tf32_state() == {"conv": True, "matmul": True}
        assert conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
        assert tf32_state() == {**before, "conv": False}
    finally:  # through the older interface, which leaves nothing mixed
        torch.backends.cudnn.allow_tf32 = before["conv"]
        torch.backends.cuda.matmul.allow_tf32 = before["matmul"]
    assert tf32_state() == before


def test_compiling_has_room_for_every_layer_of_a_grid() -> None:
    import torch._dynamo

    before = torch._dynamo.config.cache_size_limit
    with compile_state():
        assert torch._dynamo.config.cache_size_limit >= 4096
    assert torch._dynamo.config.cache_size_limit == before


@pytest.mark.parametrize("phase", ["fwd", "bwd", "fwd_bwd"])
@pytest.mark.parametrize("input_grad", [True, False])
def test_a_phase_does_what_its_name_says(phase: str, input_grad: bool) -> None:
    module = torch.nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 5, requires_grad=input_grad)
    work = Workload(module, x)
    cell = work.cell(phase)
    cell.once()
    assert (module.weight.grad is not None) == (phase != "fwd")
    assert (x.grad is not None) == (phase != "fwd" and input_grad)
    cell.release()
    assert module.weight.grad is None
    assert x.grad is None
    assert work._y is None


def test_gradients_are_not_accumulated_from_call_to_call() -> None:
    module, x = torch.nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5, requires_grad=True)
    cell = Workload(module, x).cell("fwd_bwd")
    cell.once()
    first = module.bias.grad.clone()
    cell.once()
    torch.testing.assert_close(module.bias.grad, first)


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown phase 'sideways'"):
        Workload(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 1, 1)).cell("sideways")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB", 20 * 2**30),
        ("CUDA out of memory. Tried to allocate 512.00 MiB.", 512 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("something else", None),
    ],
)  # fmt: skip
def test_the_bytes_asked_for_are_read_from_both_allocators_messages(message: str, expected: int | None) -> None:
    assert asked_bytes(message) == expected


def test_failures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    oom = describe_failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 KiB."), CPU)
    assert (oom.status, "2048 bytes" in oom.reason) == ("oom", True)
    for message in ("CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert describe_failure(RuntimeError(message), CPU).status == "oom"
    other = describe_failure(RuntimeError("first line\nsecond line"), CPU)
    assert (other.status, other.reason) == ("error", "RuntimeError: first line")
    monkeypatch.setattr(devices, "device_answers", lambda device: False)
    lost = describe_failure(RuntimeError("CUDA error: an illegal memory access"), CPU)
    assert (lost.status, lost.reason) == ("error", "device lost")


def test_a_real_allocation_that_no_machine_can_serve_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    found = describe_failure(caught.value, CPU)
    assert found.status == "oom"
    assert str(2**60) in found.reason


def test_the_peak_of_a_step_is_seen() -> None:
    size = 64 * 2**20
    held: list[torch.Tensor] = []
    cell = Cell(call=lambda: held.append(torch.ones(size, dtype=torch.uint8)), release=held.clear)
    peak = measure_peak(cell, CPU)
    assert peak.method == "rss_sampled"
    assert 0.9 * size <= peak.delta_bytes <= 1.5 * size
    assert held == []


def test_the_roofline_by_hand() -> None:
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0, matmul_sizes=(1,), copy_bytes=1)
    dense, thin = CallWork(flops=1000, bytes=50), CallWork(flops=100, bytes=50)
    assert ceilings.floor_s(dense) == 10.0
    assert ceilings.floor_s(thin) == 5.0
    assert (ceilings.bound(dense), ceilings.bound(thin)) == ("compute", "memory")
    assert ceilings.roofline_fraction(dense, 20.0) == 0.5
    assert ceilings.roofline_fraction(thin, 4.0) == 1.25  # not clamped


def test_ceilings_are_positive_and_say_how_they_were_taken() -> None:
    found = measure_ceilings(CpuStopwatch(CPU), torch.float32, quick=True)
    assert found.flops_per_s > 1e8
    assert found.bytes_per_s > 1e8
    assert found.copy_bytes >= 64 * 2**20


class Slow(CpuStopwatch):
    """A CPU of so many FLOP/s and 1 GB/s: what a call computes tells how long it takes there."""

    def __init__(self, flops_per_s: float) -> None:
        self.flops_per_s, self.spent_s = flops_per_s, 0.0
        super().__init__(CPU)

    def _times(self, cell: Cell, count: int, faults: list[int]) -> list[float]:
        result = cell.call()
        assert isinstance(result, torch.Tensor)
        copied = result.dim() == 1
        seconds = 2 * result.nbytes / 1e9 if copied else 2 * result.shape[0] ** 3 / self.flops_per_s
        self.spent_s += count * seconds
        return [seconds] * count


@pytest.mark.parametrize(
    ("flops_per_s", "quick", "sizes", "most_s"),
    [(1e9, True, (256,), 1.0), (3e9, True, (256, 512), 1.0), (3e9, False, (256, 512, 1024), 6.0),
     (5e10, True, (256, 512, 1024), 1.0), (5e10, False, (256, 512, 1024, 2048), 6.0)],
)  # fmt: skip
def test_the_ceilings_of_a_slow_machine_take_no_longer_than_they_may(
    flops_per_s: float, quick: bool, sizes: tuple[int, ...], most_s: float
) -> None:
    watch = Slow(flops_per_s)
    watch.spent_s = 0.0
    found = measure_ceilings(watch, torch.float32, quick=quick)
    assert found.flops_per_s == pytest.approx(flops_per_s)
    assert found.bytes_per_s == pytest.approx(1e9)
    assert found.matmul_sizes == sizes
    assert watch.spent_s < most_s


@pytest.mark.parametrize(("flops_per_s", "size"), [(1e9, 128), (3e9, 256), (5e10, 512), (1e12, 1024)])
def test_the_canary_is_as_long_on_a_slow_machine_as_on_a_fast_one(flops_per_s: float, size: int) -> None:
    assert Slow(flops_per_s).canary() == pytest.approx(2 * size**3 / flops_per_s)


def test_the_environment_names_what_decides_a_measurement() -> None:
    environment = describe_environment(CPU)
    assert environment["torch"] == torch.__version__
    assert environment["device"]["type"] == "cpu"
    assert environment["fingerprint"] == fingerprint(environment)
    assert fingerprint({**environment, "torch": "0.0"}) != environment["fingerprint"]
    assert fingerprint({**environment, "os": "another"}) == environment["fingerprint"]


@pytest.mark.parametrize(
    ("seconds", "spent", "cores"),
    [(10.0, 0.0, 0.0), (10.0, 20.0, 0.0), (10.0, 25.0, 0.5), (0.1, 20.0, None)],  # 2 of 4 cores are this run's
)
def test_contention_is_what_is_wanted_beyond_the_cores_there_are(
    seconds: float, spent: float, cores: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([(100.0, 7.0), (100.0 + seconds, 7.0 + spent)])
    monkeypatch.setattr(Contention, "_now", staticmethod(lambda: next(readings)))
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    assert Contention(2).cores == (None if cores is None else pytest.approx(cores))


@pytest.mark.parametrize(("others", "own", "free"), [(0.0, 4, 4), (0.4, 4, 4), (1.7, 4, 2), (4.2, 4, 1), (0.0, 2, 2)])
def test_free_cores_are_those_that_others_leave_of_what_this_process_may_use(
    others: float, own: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([(100.0, 7.0), (101.0, 7.0 + others)])
    monkeypatch.setattr(Contention, "_now", staticmethod(lambda: next(readings)))
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(own)), raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert free_cores() == free


def test_the_doctor_names_every_concern_with_an_advice() -> None:
    with backend_state("fp32", threads=torch.get_num_threads() + 100):
        findings = {what: (state, advice) for what, state, advice in diagnose(CPU)}
    assert {"load average (1 min)", "busy processes", "torch threads", "TF32 default"} <= set(findings)
    assert findings["torch threads"][1] == "more threads than cores"
