"""Networks to be exported, and how other programs open what was written."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bgcbench
from bgcbench.convs.lgc import LearnedGroupConv2d
from bgcbench.specs import VARIANTS, load_layer
from tests.convs.test_contract import HAS_ONNX

Opened = Callable[..., list[Tensor]]
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
if HAS_ONNX:  # torch makes its table of operators anew for each export, which is half of the time of a small one
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
TARGETS = [pytest.param("onnx", marks=needs_onnx), "torch", "exported"]


def trained_norm(channels: int) -> nn.BatchNorm2d:
    """A norm whose numbers are not those that it starts with."""
    norm = nn.BatchNorm2d(channels)
    for number, tensor in enumerate((norm.running_mean, norm.running_var, norm.weight, norm.bias)):
        torch.nn.init.uniform_(tensor, 0.5, 1.5 + number / 2)  # type: ignore[arg-type]
    return norm


class EveryVariant(nn.Module):
    """A convolution of every variant and a norm behind each, LGC and FLGC as they are trained; no order of groups."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for name in VARIANTS:
            conv = load_layer(name)(16, 16, 3, padding=1, groups=1 if name == "standard" else 4, bias=name != "gc")
            if isinstance(conv, LearnedGroupConv2d):
                conv.set_progress(1.0)
            layers += [conv, trained_norm(16), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.body(image)
        return y


class TwoInputs(nn.Module):
    """By hand: two inputs, a shortcut, a functional pooling, two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, other: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.stem(image) + other)
        y = x + self.conv(x)
        return {"scores": self.head(y.mean((2, 3))), "map": nn.functional.avg_pool2d(y, 2)}


@torch.fx.wrap
def wrapped(x: Tensor) -> Tensor:
    return x.relu()


class Foreign(nn.Module):
    """Calls a function that torch.fx does not look into."""

    def forward(self, x: Tensor) -> Tensor:
        return wrapped(x)


class Undecided(nn.Module):
    """What no exporter can follow: which way it goes depends on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def converted(name: str, variant: str, size: int, groups: int = 4, **options: object) -> nn.Module:
    model = bgcbench.build_model(name, num_classes=10).eval()
    example = (3, size, size)
    return bgcbench.convert(model, variant, groups, example_input=example, on_indivisible="skip", **options).model  # type: ignore[arg-type]


def opened(paths: Sequence[Path], to: str) -> Opened:
    """The network in the files, by other means than bgcbench's."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(paths[0], providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return lambda *xs: [
            torch.from_numpy(y) for y in session.run(None, dict(zip(names, (x.numpy() for x in xs), strict=True)))
        ]
    if to == "torch":
        spec = importlib.util.spec_from_file_location("written", paths[1])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        network = module.load()
        assert "bgcbench" not in paths[1].read_text().replace("written by bgcbench", "")
    else:
        network = torch.export.load(paths[0]).module()

    def run(*xs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            y = network(*xs)
        return list(y.values()) if isinstance(y, dict) else [y]

    return run
