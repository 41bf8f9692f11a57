"""Compiles our kernels for the layers that the other scripts measure, in several processes at once.

    python -m benchmarks.compile_kernels [--processes 12] [--seconds 50]

Every candidate of the tuner is compiled for Table 4's layer and for the 3x3 layers of ResNet-50 and WRN-28-10, forward
and backward, and lands in Triton's cache on disk (TRITON_CACHE_DIR), where the next process finds it. What the tuner
times here is thrown away: the processes share the device. The most wanted come first; what --seconds leave no time for
is compiled when it is needed. Exit code 1 if a kernel cannot be compiled or run, 3 where no kernel can run.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.bgc_forms import distinct
from bgcbench import kernels
from bgcbench.convs import build_conv
from bgcbench.errors import DeviceError
from bgcbench.measure.device import DTYPES, backend_state, random_input
from bgcbench.specs import ConvSpec


@dataclass(frozen=True)
class Job:
    """A layer, its input's size and the precision that it is compiled for."""

    spec: ConvSpec
    batch: int
    side: int
    precision: str


def jobs() -> Iterator[Job]:
    """The most wanted first: Table 4's layer in bf16 and tf32, the networks' layers with N = 4, then the rest."""

    def table4(precision: str) -> Iterator[Job]:
        for groups, variant in itertools.product((4, 16, 2, 8), ("bgc", "gc")):
            yield _job(variant, 1024, 1024, 1, groups, 7, precision)

    layers = [layer for layer in distinct(["resnet50", "wrn_28_10"]) if layer.kernel == 3]
    yield from table4("bf16")
    yield from table4("tf32")
    for precision, layer in itertools.product(("bf16", "tf32"), layers):
        yield _job("bgc", layer.in_channels, layer.out_channels, layer.stride, 4, layer.height, precision)
    yield from table4("fp32")


def _job(variant: str, n: int, m: int, stride: int, groups: int, side: int, precision: str) -> Job:
    spec = ConvSpec(variant, n, m, 3, stride, 1, groups=groups, bias=False, algorithm="triton")
    return Job(spec, 128, side, precision)


REHEARSAL = [Job(ConvSpec("bgc", 8, 8, 3, padding=1, groups=2, bias=False, algorithm="triton"), 2, 4, "fp32")]


def work(job: Job) -> tuple[Job, float, str | None]:
    """Run a layer forward and backward once: (job, seconds, why it failed)."""
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with backend_state(job.precision):
            dtype = DTYPES[job.precision]
            x = random_input((job.batch, job.spec.in_channels, job.side, job.side), device, dtype, "nhwc", seed=0)
            layer = build_conv(job.spec).to(device=device, dtype=dtype)
            layer(x.requires_grad_()).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
    except Exception as problem:  # noqa: BLE001 - the other kernels are wanted all the same
        return job, time.monotonic() - begin, f"{type(problem).__name__}: {str(problem)[:300]}"
    return job, time.monotonic() - begin, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--seconds", type=float, default=50)
    parser.add_argument("--rehearse", action="store_true", help="one tiny layer; on a CPU with TRITON_INTERPRET=1")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not kernels.device_ready(device, 0):
        print("benchmarks.compile_kernels: no device for our kernels here, and no TRITON_INTERPRET=1")
        return DeviceError.exit_code
    wanted = REHEARSAL if options.rehearse else list(jobs())
    deadline, done, failed = time.monotonic() + options.seconds, 0, 0
    with multiprocessing.get_context("spawn").Pool(min(options.processes, len(wanted))) as pool:
        found = pool.imap_unordered(work, wanted)
        while done < len(wanted):
            try:
                job, seconds, problem = found.next(timeout=max(deadline - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                break
            done, failed = done + 1, failed + (problem is not None)
            size = f"{job.spec.variant} {job.spec.in_channels}-{job.spec.out_channels} N={job.spec.groups}"
            print(f"{size} {job.side}px {job.precision}: {problem or f'{seconds:.1f} s'}", flush=True)
    print(f"{done} of {len(wanted)} layers, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
