"""How long calibrated conversion of ResNet-50 takes.

    python -m benchmarks.convert_resnet50 [--variant bgc] [--groups 4] [--images 512] [--threads 2] [--out FILE]

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
from benchmarks.common import save

SIDE = 224


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="bgc")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/convert-resnet50-cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    loader = [torch.randn(32, 3, SIDE, SIDE) for _ in range(-(-options.images // 32))]
    begin = time.perf_counter()
    converted = bgcbench.convert(
        model, options.variant, options.groups, init="calibrated", calibration=loader, calibration_images=options.images
    )
    seconds = time.perf_counter() - begin
    found = {name: value for name, value in (converted.record.calibration or {}).items() if name != "layers"}
    print(f"{options.variant} N={options.groups}, {options.images} images, {options.threads} threads: {seconds:.0f} s")
    command = f"python -m benchmarks.convert_resnet50 --variant {options.variant} --groups {options.groups} --images "
    command += f"{options.images} --threads {options.threads}"
    measured = {"layers": len(converted.record.replaced), "seconds": seconds, "threads": options.threads}
    save(options.out, command, {"results": [{**measured, "calibration": found}]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
