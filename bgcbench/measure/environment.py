"""The machine that a measurement ran on, and what on it could spoil a measurement."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from bgcbench.measure.allocator import memory_state, minor_faults, resolve_memory
from bgcbench.measure.device import cache_bytes, tf32_state
from bgcbench.specs import FINGERPRINT_FIELDS, MEMORY


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The result file's ``environment`` (results-format: SI units, null where unknown)."""
    on_cuda = device.type == "cuda"
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores": psutil.cpu_count(logical=False),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "ram_bytes": psutil.virtual_memory().total,
        "torch": str(torch.__version__),
        "torchvision": _version("torchvision"),
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": _cudnn() if on_cuda else None,
        "triton": _version("triton"),
        "driver": _smi_gpu(device, "driver_version") if on_cuda else None,
        "device": _device(device),
    }
    return {"fingerprint": fingerprint(environment), **environment}


def fingerprint(environment: dict[str, Any]) -> str:
    """SHA-256 over the fields that decide a measurement."""
    decisive = {name: environment.get(name) for name in FINGERPRINT_FIELDS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _device(device: torch.device) -> dict[str, Any]:
    on_cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "type": "cuda" if on_cuda else "cpu",
        "name": on_cuda.name if on_cuda else _cpu_model(),
        "capability": f"{on_cuda.major}.{on_cuda.minor}" if on_cuda else None,
        "sm_count": on_cuda.multi_processor_count if on_cuda else None,
        "l2_bytes": cache_bytes(device),
        "total_bytes": on_cuda.total_memory if on_cuda else psutil.virtual_memory().total,
    }


def available_bytes(device: torch.device) -> int:
    """Bytes a new allocation could get: free RAM on a CPU; on CUDA what is free, and what this process holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


Finding = tuple[str, str, str | None]


def diagnose(device: torch.device) -> list[Finding]:
    """(what, how it stands, advice or None) for everything that could spoil a measurement on ``device``."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, psutil.cpu_count() or 1
    busy, threads = ", ".join(_busy_processes()), torch.get_num_threads()
    steal = getattr(psutil.cpu_times_percent(interval=0.2), "steal", None)
    free = psutil.virtual_memory().available
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    fewer = max(1, cores - round(load or 0))
    spare = f", or leave it its cores: --threads {fewer}" if fewer < threads else ""
    tf32 = ", ".join(f"{what} {'on' if on else 'off'}" for what, on in tf32_state().items())
    findings = [
        _finding("load average (1 min)", load is not None and f"{load:.2f} on {cores} cores",
                 f"other work is running; wait for it or stop it{spare}", (load or 0) > 0.5 * cores),
        _finding("busy processes", busy or "none", "they share the CPU with the measurement", bool(busy)),
        _finding("CPU time stolen by the host", steal is not None and f"{steal:.1f} %",
                 "a shared virtual machine: expect wide intervals", (steal or 0) > 1),
        _finding("CPU governor", governor, "the clock follows the load; 'performance' is steadier",
                 governor in ("powersave", "ondemand")),
        _finding("torch threads", f"{threads} of {cores}", "more threads than cores", threads > cores),
        ("minor page faults a call of 1 MiB", *_page_faults()),
        _finding("free RAM", f"{free / 2**30:.1f} GiB", "little memory left", free < 2 * 2**30),
        _finding("TF32 default", tf32),  # bgcbench sets and records both
        _finding("cudnn.benchmark default", "on" if torch.backends.cudnn.benchmark else "off"),
    ]  # fmt: skip
    return findings + _diagnose_cuda(device) if device.type == "cuda" else findings


def _finding(what: str, state: str | Literal[False] | None, advice: str = "", needed: bool = False) -> Finding:
    """What was found, with its advice only where that is needed."""
    return what, state or "unknown", advice if needed else None


def _diagnose_cuda(device: torch.device) -> list[Finding]:
    free, total = torch.cuda.mem_get_info(device)
    others, throttle = _smi_processes(device), _smi_gpu(device, "clocks_throttle_reasons.active")
    utilisation = _smi_gpu(device, "utilization.gpu")

    def pair(now: str, most: str) -> str:
        return f"{_smi_gpu(device, now) or 'unknown'} / {_smi_gpu(device, most) or 'unknown'}"

    return [
        _finding("device memory in use", f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB",
                 "something else holds device memory", (total - free) / total > 0.1),
        _finding("other processes on the device",
                 "unknown (no nvidia-smi)" if others is None else (", ".join(others) or "none"),
                 "they share the device with the measurement", bool(others)),
        _finding("device utilisation", utilisation, "the device is busy",
                 utilisation is not None and not utilisation.startswith("0 ")),
        _finding("SM clock now / most", pair("clocks.sm", "clocks.max.sm")),
        _finding("power limit now / default", pair("power.limit", "power.default_limit")),
        _finding("temperature (C)", _smi_gpu(device, "temperature.gpu")),
        _finding("clock throttling", throttle, "the clock is held back",
                 throttle is not None and int(throttle, 16) & ~0x1 != 0),  # bit 0: idle
    ]  # fmt: skip


def _page_faults() -> tuple[str, str | None]:
    """What the C library's memory does in each state that ``--memory`` sets, and advice."""
    counted: dict[str, float] = {}
    for state in MEMORY if resolve_memory(None, "cpu") is not None else ():
        with memory_state(state):
            for _ in range(16):  # what is kept was new for some calls
                before = minor_faults() or 0
                torch.ones(2**18)
                counted[state] = (minor_faults() or 0) - before
    if not counted or minor_faults() is None:
        return "unknown", None
    advice = "another allocator than glibc's is at work: --memory says nothing" if counted["kept"] > 16 else None
    return ", ".join(f"{count:.0f} {state}" for state, count in counted.items()), advice


def _busy_processes() -> list[str]:
    """Other processes above a tenth of a core, by name and share."""
    others = [p for p in psutil.process_iter(["name"]) if p.pid != os.getpid()]
    shares: dict[psutil.Process, float] = {}
    for interval in (0.0, 0.3):  # a share is of the time since the last reading
        time.sleep(interval)
        for process in others:
            with suppress(psutil.Error):
                shares[process] = process.cpu_percent(None)
    busy = sorted(((share, p.info["name"]) for p, share in shares.items() if share > 10), reverse=True)
    return [f"{name} ({share:.0f} %)" for share, name in busy[:5]]


def _smi(*query: str) -> list[str] | None:
    """The lines nvidia-smi answers to a query (it is only ever read), or None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):  # no answer, or not in time
        command = [tool, *query, "--format=csv,noheader"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip().splitlines()
    return None


def _smi_id(device: torch.device) -> str:
    """The device by UUID: nvidia-smi numbers all devices, whatever CUDA_VISIBLE_DEVICES leaves."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device.index or 0) if uuid is None else f"GPU-{uuid}"


def _smi_gpu(device: torch.device, field: str) -> str | None:
    lines = _smi(f"--query-gpu={field}", f"--id={_smi_id(device)}")
    return lines[0].strip() if lines and not lines[0].startswith("[") else None


def _smi_processes(device: torch.device) -> list[str] | None:
    lines = _smi("--query-compute-apps=pid,process_name", f"--id={_smi_id(device)}")
    return None if lines is None else [line for line in lines if not line.startswith(f"{os.getpid()},")]


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version()
    return None if version is None else str(version)


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu_model() -> str:
    """The processor's own name; platform.processor() is empty on many Linux systems."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _read(path: str) -> str | None:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return None
