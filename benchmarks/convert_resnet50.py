"""How long calibrated conversion of ResNet-50 takes.

    python -m benchmarks.convert_resnet50 [--variant bgc] [--groups 4] [--images 512] [--threads 2] [--device cuda]

The weights are random and so are the images: neither changes what is computed. What is timed is the whole of
``convert(model, "bgc", 4, init="calibrated", calibration=loader)``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torchvision

import bgcbench
from benchmarks.common import find_device, save
from bgcbench.measure.device import backend_state, current

SIDE = 224


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="bgc")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the network is; the images come from the CPU")
    parser.add_argument("--out", type=Path, help="default: results/convert-resnet50-cpu.json, or -cuda")
    options = parser.parse_args()
    device = find_device(parser, options.device)
    out = options.out or Path(f"results/convert-resnet50-{device.type}.json")
    with backend_state("fp32", options.threads), current(device):
        return run(options, device, out)


def run(options: argparse.Namespace, device: torch.device, out: Path) -> int:
    """Convert once, and save how long it took."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval().to(device)
    loader = [torch.randn(32, 3, SIDE, SIDE) for _ in range(-(-options.images // 32))]
    begin = time.perf_counter()
    converted = bgcbench.convert(
        model, options.variant, options.groups, init="calibrated", calibration=loader, calibration_images=options.images
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    calibration = converted.record.calibration
    found = {} if calibration is None else {k: v for k, v in calibration.to_json().items() if k != "layers"}
    print(f"{options.variant} N={options.groups}, {options.images} images, {device}: {seconds:.0f} s")
    command = f"python -m benchmarks.convert_resnet50 --variant {options.variant} --groups {options.groups} --images "
    command += f"{options.images} --threads {options.threads}"
    command += f" --device {options.device}" if device.type != "cpu" else ""
    measured = {"layers": len(converted.record.replaced), "seconds": seconds, "threads": options.threads}
    save(out, command, {"results": [{**measured, "calibration": found}]}, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
