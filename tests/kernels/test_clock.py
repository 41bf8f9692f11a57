"""Timing on a device that answers slower than it computes, on a simulated one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bgcbench.convs import autotune
from bgcbench.kernels import clock, tiles

HOST_S, CYCLES_PER_S = 100e-6, 2e9  # what the host needs to ask for a kernel; the device's clock


class Device:
    """A host and a device with a queue. Each has its own time; a kernel begins when it was asked for and is next."""

    def __init__(self, host_s: float = HOST_S) -> None:
        self.host_s, self.now, self.free_at, self.sleeps = host_s, 0.0, 0.0, list[int]()

    def launch(self, seconds: float) -> None:
        self.now += self.host_s
        self.free_at = max(self.free_at, self.now) + seconds

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.launch(cycles / CYCLES_PER_S)

    def wait(self) -> None:
        self.now = max(self.now, self.free_at)

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.free_at, self.device.now)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    def make(**options: float) -> Device:
        device = Device(**options)
        monkeypatch.setattr(torch.cuda, "Event", device.event)
        monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
        return device

    return make


@pytest.mark.parametrize("kernel_s", [2e-6, 40e-6, 5e-3])
def test_what_the_host_needs_is_not_in_the_time(kernel_s: float, simulated: Callable[..., Device]) -> None:
    device = simulated()
    assert clock.device_seconds(lambda: device.launch(kernel_s), 10) == pytest.approx(kernel_s)
    assert autotune._seconds(lambda: device.launch(kernel_s), torch.device("cuda"))[0] == pytest.approx(kernel_s)
    tile = tiles.Tile(64, 64, 64)
    assert tiles._time(lambda _: [device.launch(kernel_s)], tile) == pytest.approx(kernel_s)


def test_the_host_is_timed_by_itself(simulated: Callable[..., Device], monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulated()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: device.now)
    busy, host = clock.device_and_host_seconds(lambda: device.launch(5e-6), 10)
    assert (busy, host) == (pytest.approx(5e-6), pytest.approx(HOST_S))


def test_a_slow_host_gets_more_time_and_a_fast_one_is_not_kept_waiting(simulated: Callable[..., Device]) -> None:
    device = simulated(host_s=1e-6)
    clock.device_seconds(lambda: device.launch(1e-6))
    assert device.sleeps == [clock.SHORTEST]
    device = simulated(host_s=5e-3)
    assert clock.device_seconds(lambda: device.launch(1e-6)) == pytest.approx(1e-6)
    assert len(device.sleeps) > 1


def test_a_call_that_waits_for_the_device_ends_all_the_same(simulated: Callable[..., Device]) -> None:
    device = simulated()

    def call() -> None:
        device.launch(1e-6)
        device.wait()

    assert clock.device_seconds(call) >= 1e-6
    assert device.sleeps[-1] == clock.LONGEST
