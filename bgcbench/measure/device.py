"""The device: finding it, setting its state, timing on it, and saying what went wrong on it."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bgcbench.errors import BgcbenchError, DeviceError, UsageError
from bgcbench.measure import runtime
from bgcbench.measure.allocator import minor_faults, trim_heap
from bgcbench.measure.workload import Cell
from bgcbench.specs import RUNTIME, check_on_cpu

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
FALLBACK_CACHE_BYTES = 32 * 2**20
CANARY_S = 4e-3  # what a canary takes at least where it can: long against the clock's grain, short against a round


def resolve_device(name: str) -> tuple[torch.device, str | None]:
    """The device that 'auto', 'cpu', 'cuda' or 'cuda:K' means here, and a warning if 'auto' fell back to the CPU.

    Raises DeviceError where the device asked for is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        if available:
            return torch.device("cuda", torch.cuda.current_device()), None
        return torch.device("cpu"), "no CUDA device found: measured on the CPU"
    device = torch.device(name)
    if device.type != "cuda":
        return device, None
    if not available:
        raise DeviceError(f"--device {name}: no CUDA device here; use --device cpu, or auto to fall back by itself")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise DeviceError(f"--device {name}: this machine's CUDA devices are cuda:0 to cuda:{last}")
    return torch.device("cuda", index), None


def check_combination(device: torch.device, precision: str, mode: str) -> None:
    """Raise UsageError for a precision or mode that ``device`` does not have."""
    if device.type != "cuda":
        check_on_cpu(precision, mode)
    elif mode == RUNTIME:
        runtime.check_device(device)
    elif precision == "bf16":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            raise UsageError(f"--precision bf16: {torch.cuda.get_device_name(device)} has none; use fp16 or fp32")


def tf32_state() -> dict[str, bool]:
    """Whether TF32 is on: {'conv': ..., 'matmul': ...}."""
    try:
        return {"conv": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}
    except RuntimeError:  # set through torch 2.9's fp32_precision, after which the older switches cannot be read
        conv, _, matmul = (owner.fp32_precision for owner in _newer_switches())
        return {"conv": conv == "tf32", "matmul": matmul == "tf32"}


def _newer_switches() -> tuple[Any, Any, Any]:
    """Who carries ``fp32_precision`` since torch 2.9: cuDNN's convolutions and recurrent layers, matrix products."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """TF32 on or off in convolutions and products for the block.

    The ``allow_tf32`` pair is written because it sets what torch 2.9 and newer read as well; writing only the newer
    ``fp32_precision`` would make the older one raise where torch.compile's own code still reads it.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        saved: list[tuple[Any, str, Any]] = [(owner, "allow_tf32", owner.allow_tf32) for owner in (cudnn, matmul)]
    except RuntimeError:
        saved = [(owner, "fp32_precision", owner.fp32_precision) for owner in _newer_switches()]
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = on
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


@contextmanager
def backend_state(precision: str, threads: int | None = None) -> Iterator[None]:
    """The global switches that a result file records, set for the block and put back after it.

    TF32 on for precision 'tf32' and off for all others, cudnn.benchmark on, deterministic off, ``threads`` CPU
    threads. PyTorch's own defaults (TF32 on in convolutions and off in products) are never inherited.
    """
    cudnn = torch.backends.cudnn
    saved, saved_threads = (cudnn.benchmark, cudnn.deterministic), torch.get_num_threads()
    with _tf32(precision == "tf32"):
        try:
            cudnn.benchmark, cudnn.deterministic = True, False
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = saved
            torch.set_num_threads(saved_threads)


def compile_state() -> AbstractContextManager[Any]:
    """Room for one compiled graph a layer and phase.

    All layers of a variant share one forward, and Dynamo gives up on a function after 8 recompilations.
    """
    import torch._dynamo

    patch: Any = torch._dynamo.config.patch
    state: AbstractContextManager[Any] = patch(cache_size_limit=4096, accumulated_cache_size_limit=4096)
    return state


def cache_bytes(device: torch.device) -> int | None:
    """Bytes of the last cache before memory: L2 on CUDA, the largest one that Linux reports on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size"):
        with suppress(OSError):
            if match := re.fullmatch(r"(\d+)([KM])", file.read_text(encoding="ascii").strip()):
                sizes.append(int(match[1]) * (2**10 if match[2] == "K" else 2**20))
    return max(sizes, default=None)


class DeviceStopwatch:
    """What both stopwatches share: the canary, the flush buffer and the clock."""

    def __init__(self, device: torch.device, *, flush_bytes: int = 0, canary_sizes: Sequence[int]) -> None:
        self.device = device
        self._flush = torch.empty(flush_bytes // 4, dtype=torch.int32, device=device) if flush_bytes else None
        self._canary = Cell(call=lambda: self._square @ self._square)
        for size in canary_sizes:
            self._square = torch.randn(size, size, device=device)
            if min(self.sample(self._canary, 2)) >= CANARY_S:
                break

    def now(self) -> float:
        return time.perf_counter()

    def canary(self) -> float:
        """Seconds of one product of two fixed square fp32 matrices: the largest size, or the first above CANARY_S."""
        return self.sample(self._canary, 1)[0]

    def flush(self) -> None:
        """Overwrite a buffer of twice the cache, so that the next call finds its inputs in memory."""
        if self._flush is not None:
            self._flush.zero_()

    def sample(self, cell: Cell, count: int, faults: list[int] | None = None) -> list[float]:
        """Seconds of each of ``count`` calls; Python's cyclic collector is off meanwhile.

        faults: gets the minor page faults of each, where there are any to count.
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            with cell.context():
                return self._times(cell, count, [] if faults is None else faults)
        finally:
            cell.release()
            if collecting:
                gc.enable()

    def _times(self, cell: Cell, count: int, faults: list[int]) -> list[float]:
        raise NotImplementedError

    def host_time(self, cell: Cell) -> float | None:
        """Seconds the host needs to enqueue one call; None where calls are not asynchronous."""
        return None

    def synchronize(self) -> None:
        """Wait for the device."""


class CpuStopwatch(DeviceStopwatch):
    """perf_counter_ns around each call."""

    def __init__(self, device: torch.device, *, flush_bytes: int = 0) -> None:
        super().__init__(device, flush_bytes=flush_bytes, canary_sizes=(128, 256, 512, 1024))

    def _times(self, cell: Cell, count: int, faults: list[int]) -> list[float]:
        clock, times = time.perf_counter_ns, []
        for _ in range(count):
            cell.prepare()
            self.flush()
            before = minor_faults()
            begin = clock()
            cell.call()
            times.append((clock() - begin) / 1e9)
            if before is not None:
                faults.append((minor_faults() or before) - before)
        return times


class CudaStopwatch(DeviceStopwatch):
    """A pair of CUDA events around each call, a whole batch queued before one synchronisation."""

    def __init__(self, device: torch.device, *, flush_bytes: int = 0) -> None:
        super().__init__(device, flush_bytes=flush_bytes, canary_sizes=(4096,))

    def _times(self, cell: Cell, count: int, faults: list[int]) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in pairs:
            cell.prepare()
            self.flush()
            begin.record()
            cell.call()
            end.record()
        self.synchronize()
        return [round(begin.elapsed_time(end) * 1e-3, 9) for begin, end in pairs]

    def host_time(self, cell: Cell) -> float | None:
        asked, times = cell.eager or cell, []
        with asked.context():
            for _ in range(10):
                asked.prepare()
                self.synchronize()
                begin = time.perf_counter_ns()
                asked.call()
                times.append((time.perf_counter_ns() - begin) / 1e9)
        self.synchronize()
        # A graph replays into the tensors it was captured with; only an eager cell may drop its own.
        cell.release()
        return statistics.median(times)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one: streams, events and graphs belong to whichever device is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_stopwatch(device: torch.device, *, cold: bool) -> DeviceStopwatch:
    """The stopwatch of ``device``; ``cold`` flushes a buffer of twice the cache before every call."""
    flush = 2 * (cache_bytes(device) or FALLBACK_CACHE_BYTES) if cold else 0
    kind = CudaStopwatch if device.type == "cuda" else CpuStopwatch
    return kind(device, flush_bytes=flush)


@dataclass(frozen=True)
class Failure:
    """A row's status and the reason to show for it."""

    status: Literal["oom", "error"]
    reason: str


DEVICE_LOST = Failure("error", "device lost")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)?")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, None: 1}


def asked_bytes(message: str) -> int | None:
    """Bytes that a failed allocation asked for, read from PyTorch's message (CUDA's or the CPU allocator's)."""
    match = _ASKED.search(message)
    return None if match is None else round(float(match[1].rstrip(".")) * _UNITS[match[2]])


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether ``failure`` is the device's or the host's refusal to allocate."""
    signs = ("allocate memory", "out of memory", "alloc_failed")
    told = isinstance(failure, RuntimeError) and any(sign in str(failure).lower() for sign in signs)
    return told or isinstance(failure, (torch.OutOfMemoryError, MemoryError))


def describe_failure(failure: BaseException, device: torch.device, way_out: str = "use a smaller --batch") -> Failure:
    """What a row that raised ``failure`` is called: out of memory, device lost, or an error with its first line."""
    message = str(failure).strip() or type(failure).__name__
    if is_out_of_memory(failure):
        asked = asked_bytes(message)
        size = "an unknown size" if asked is None else f"{asked} bytes"
        return Failure("oom", f"out of memory: {size} asked for; {way_out}")
    if not device_answers(device):
        return DEVICE_LOST
    kind = "" if isinstance(failure, BgcbenchError) else f"{type(failure).__name__}: "
    return Failure("error", kind + message.splitlines()[0])


def device_answers(device: torch.device) -> bool:
    """Whether ``device`` still computes; after a sticky CUDA error it does not."""
    try:
        probe = torch.ones(8, device=device)
        return float((probe + probe).sum()) == 16.0
    except RuntimeError:
        return False


def free_memory(device: torch.device) -> None:
    """Drop what Python and the allocator hold on to, so that the next row starts clean."""
    gc.collect()
    if device.type == "cpu":
        trim_heap()
    elif device.type == "cuda":
        with suppress(RuntimeError):  # the device is lost; describe_failure says so
            torch.cuda.empty_cache()


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What lives already (torch's modules, above all) is left out of the block's garbage collections.

    A run collects before each memory pass; walking all of torch's objects would take 0.2 s every time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def random_input(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Standard normal numbers from their own generator. Never zeros: some kernels run faster on those."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
