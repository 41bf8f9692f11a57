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
import sys
from typing import Any

import psutil
import torch

from bgcbench.measure.allocator import memory_state, minor_faults, resolve_memory
from bgcbench.measure.device import cache_bytes, tf32_state
from bgcbench.specs import FINGERPRINT_FIELDS, MEMORY


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The result file's ``environment`` (results-format: SI units, null where unknown)."""
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
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": _cudnn() if device.type == "cuda" else None,
        "triton": _version("triton"),
        "driver": _smi_gpu(device, "driver_version") if device.type == "cuda" else None,
        "device": _device(device),
    }
    return {"fingerprint": fingerprint(environment), **environment}


def fingerprint(environment: dict[str, Any]) -> str:
    """SHA-256 over the fields that decide a measurement."""
    decisive = {name: environment.get(name) for name in FINGERPRINT_FIELDS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {
            "type": "cpu",
            "name": _cpu_model(),
            "capability": None,
            "sm_count": None,
            "l2_bytes": cache_bytes(device),
            "total_bytes": psutil.virtual_memory().total,
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": cache_bytes(device),
        "total_bytes": properties.total_memory,
    }


def available_bytes(device: torch.device) -> int:
    """Bytes a new allocation could get: free RAM on a CPU; on CUDA what is free, and what this process holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


def diagnose(device: torch.device) -> list[tuple[str, str, str | None]]:
    """(what, how it stands, advice or None) for everything that could spoil a measurement on ``device``."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, psutil.cpu_count() or 1
    busy = _busy_processes()
    steal = getattr(psutil.cpu_times_percent(interval=0.2), "steal", None)
    available = psutil.virtual_memory().available
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    state = tf32_state()
    findings: list[tuple[str, str, str | None]] = [
        (
            "load average (1 min)",
            "unknown" if load is None else f"{load:.2f} on {cores} cores",
            "other work is running; wait for it or stop it" if load is not None and load > 0.5 * cores else None,
        ),
        ("busy processes", ", ".join(busy) or "none", "they share the CPU with the measurement" if busy else None),
        (
            "CPU time stolen by the host",
            "unknown" if steal is None else f"{steal:.1f} %",
            "a shared virtual machine: expect wide intervals" if steal is not None and steal > 1 else None,
        ),
        (
            "CPU governor",
            governor or "unknown",
            "the clock follows the load; 'performance' is steadier" if governor in ("powersave", "ondemand") else None,
        ),
        (
            "torch threads",
            f"{torch.get_num_threads()} of {cores}",
            "more threads than cores" if torch.get_num_threads() > cores else None,
        ),
        ("minor page faults a call of 1 MiB", *_page_faults()),
        ("free RAM", f"{available / 2**30:.1f} GiB", "little memory left" if available < 2 * 2**30 else None),
        (
            "TF32 default",
            f"conv {'on' if state['conv'] else 'off'}, matmul {'on' if state['matmul'] else 'off'}",
            None,  # bgcbench sets and records both
        ),
        ("cudnn.benchmark default", "on" if torch.backends.cudnn.benchmark else "off", None),
    ]
    if device.type == "cuda":
        findings += _diagnose_cuda(device)
    return findings


def _diagnose_cuda(device: torch.device) -> list[tuple[str, str, str | None]]:
    free, total = torch.cuda.mem_get_info(device)
    used = (total - free) / total
    others = _smi_processes(device)
    utilisation, throttle = _smi_gpu(device, "utilization.gpu"), _smi_gpu(device, "clocks_throttle_reasons.active")

    def pair(now: str, most: str) -> str:
        return f"{_smi_gpu(device, now) or 'unknown'} / {_smi_gpu(device, most) or 'unknown'}"

    return [
        (
            "device memory in use",
            f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB",
            "something else holds device memory" if used > 0.1 else None,
        ),
        (
            "other processes on the device",
            "unknown (no nvidia-smi)" if others is None else (", ".join(others) or "none"),
            "they share the device with the measurement" if others else None,
        ),
        (
            "device utilisation",
            utilisation or "unknown",
            "the device is busy" if utilisation and not utilisation.startswith("0 ") else None,
        ),
        ("SM clock now / most", pair("clocks.sm", "clocks.max.sm"), None),
        ("power limit now / default", pair("power.limit", "power.default_limit"), None),
        ("temperature (C)", _smi_gpu(device, "temperature.gpu") or "unknown", None),
        (
            "clock throttling",
            throttle or "unknown",
            "the clock is held back" if throttle and int(throttle, 16) & ~0x1 else None,  # bit 0: idle
        ),
    ]


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
    shares = []
    for process in others:
        try:
            process.cpu_percent(None)
        except psutil.Error:
            continue
    psutil.cpu_percent(0.3)
    for process in others:
        try:
            share = process.cpu_percent(None)
        except psutil.Error:
            continue
        if share > 10:
            shares.append((share, process.info["name"]))
    return [f"{name} ({share:.0f} %)" for share, name in sorted(shares, reverse=True)[:5]]


def _smi(*query: str) -> list[str] | None:
    """The lines nvidia-smi answers to a query (it is only ever read), or None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, *query, "--format=csv,noheader"], check=False, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines() if done.returncode == 0 else None


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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The processor's own name; platform.processor() is empty on many Linux systems."""
    if sys.platform == "linux" and (text := _read("/proc/cpuinfo")):
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None
