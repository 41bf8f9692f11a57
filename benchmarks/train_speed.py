"""How fast the input pipeline is, and how much the training loop adds to a step.

    python -m benchmarks.train_speed [--out results/train-speed-cpu.json]

pipeline: 50,000 images of 32 x 32 px, random crop out of 4 px of zeros, flip, normalised, in batches of 128: our gather
on bytes, and torchvision's transforms image by image in one process (the classic ones on PIL images and version 2 on
tensors; the ratio is to the faster). loop: steps of a tiny network by our loop, and by a bare loop of forward, backward
and optimiser over a preloaded batch. The sides take turns; medians, and the median of the differences turn by turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.common import CPU, save
from bgcbench.convs.masked import parameter_groups
from bgcbench.data import open_labelled
from bgcbench.data.labelled import ResidentData
from bgcbench.training.distributed import World
from bgcbench.training.loop import Prepared, Training
from bgcbench.training.recipes import make_recipe

ROUNDS, IMAGES, BATCH = 15, 50_000, 128
OUR_BATCHES, THEIR_BATCHES, STEPS = 100, 4, 200


def cifar_like() -> ResidentData:
    """Random images of CIFAR-10's numbers."""
    data = open_labelled("synthetic", (32, 32), [], counts=(IMAGES, 1000))
    if not isinstance(data, ResidentData):
        raise TypeError("synthetic data is resident")
    return data


def seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def pipelines(data: ResidentData) -> dict[str, Callable[[], float]]:
    """Images a second of each pipeline, by name."""
    feed = data.feed(CPU)
    prepare = Prepared(nn.Identity(), data.mean, data.std, torch.float32, "nchw")
    normalise = {"mean": data.mean, "std": data.std}
    classic = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
         transforms.Normalize(**normalise)]
    )  # fmt: skip
    newer = v2.Compose(
        [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize(**normalise)]
    )  # fmt: skip
    pictures = [transforms.functional.to_pil_image(image) for image in data.train_images[: THEIR_BATCHES * BATCH]]
    epoch = 0

    def ours() -> float:
        nonlocal epoch
        epoch += 1
        batches = torch.randperm(IMAGES)[: OUR_BATCHES * BATCH].split(BATCH)

        def run() -> None:
            for images, _ in feed.train(batches, 0, epoch):
                prepare(images)

        return OUR_BATCHES * BATCH / seconds(run)

    def theirs(transform: Any, images: Any) -> float:
        def run() -> None:
            for start in range(0, THEIR_BATCHES * BATCH, BATCH):
                torch.stack([transform(image) for image in images[start : start + BATCH]])

        return THEIR_BATCHES * BATCH / seconds(run)

    return {
        "bgcbench": ours,
        "torchvision, PIL": lambda: theirs(classic, pictures),
        "torchvision, v2": lambda: theirs(newer, data.train_images),
    }


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def loops() -> dict[str, Callable[[], float]]:
    """Seconds a step of each loop, by name."""
    data = open_labelled("synthetic", (8, 8), [], counts=(16 * STEPS, 100))
    recipe = make_recipe("digits", 8, {"batch_size": 16})
    training = Training(tiny(), data, recipe, World(), seed=0)
    bare = tiny()
    optimiser = torch.optim.SGD(parameter_groups(bare, recipe.weight_decay), lr=0.1, momentum=0.9, nesterov=True)
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10

    def ours() -> float:
        training.state.epoch, training.state.step = 0, 0

        def run() -> None:
            for _ in training._epoch():
                pass

        begin = time.perf_counter()
        training.evaluate()  # the epoch ends with one too
        evaluated = time.perf_counter() - begin
        return (seconds(run) - evaluated) / STEPS

    def plain() -> float:
        def run() -> None:
            for _ in range(STEPS):
                loss = F.cross_entropy(bare(images), labels)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)

        return seconds(run) / STEPS

    return {"bgcbench": ours, "bare": plain}


def take_turns(sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """ROUNDS numbers of each side, the sides taking turns; one round before is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            value = side()
            if number:
                found[name].append(value)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/train-speed-cpu.json"))
    options = parser.parse_args()
    speeds = take_turns(pipelines(cifar_like()))
    steps = take_turns(loops())
    loop, bare = steps.values()
    ours = speeds.pop("bgcbench")
    theirs = max(speeds.values(), key=statistics.median)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    added = statistics.median(a - b for a, b in zip(loop, bare, strict=True))
    print(f"pipeline: {statistics.median(ours):,.0f} images/s, {ratio:.1f} times torchvision's faster transforms")
    for name, values in speeds.items():
        print(f"  {name}: {statistics.median(values):,.0f} images/s")
    print(f"loop: {added * 1e3:.3f} ms a step more than the bare one ({statistics.median(bare) * 1e3:.3f} ms)")
    save(options.out, "python -m benchmarks.train_speed", {
        "cores": os.cpu_count(), "rounds": ROUNDS,
        "pipeline": {"batch": BATCH, "images_per_s": {"bgcbench": ours, **speeds}, "ratio": ratio},
        "loop": {"steps": STEPS, "step_s": steps, "added_s": added},
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
