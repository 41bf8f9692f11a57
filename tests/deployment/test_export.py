"""A network in a file computes what it computed, in programs that do not know bgcbench."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgcbench
from bgcbench.convs import autotune
from bgcbench.convs.lgc import LearnedGroupConv2d
from bgcbench.deployment import export as exporting
from bgcbench.deployment import fastest
from bgcbench.deployment.export import Exported
from bgcbench.errors import BgcbenchError, OutputError, UsageError
from bgcbench.specs import PLAIN_ALGORITHMS, TARGETS
from tests.deployment.example import TARGETS as WRITABLE
from tests.deployment.example import (
    EveryVariant,
    Foreign,
    TwoInputs,
    Undecided,
    converted,
    needs_onnx,
    opened,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def agrees(network: nn.Module, written: Exported, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected = network.eval()(*inputs)
    expected = list(expected.values()) if isinstance(expected, dict) else [expected]
    for found, right in zip(opened(written.paths, written.to)(*inputs), expected, strict=True):
        assert error(found, right) < 1e-5


@pytest.mark.parametrize("to", WRITABLE)
def test_every_variant_agrees_whatever_the_batch(to: str, tmp_path: Path) -> None:
    network = EveryVariant()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    written = bgcbench.export(
        network, tmp_path / f"net{TARGETS[to]}", to, example_input=(16, 8, 8), algorithm="two_conv"
    )
    agrees(network, written, torch.randn(5, 16, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())  # left as it is
    assert not any("norm" in kind.lower() for kind in written.nodes)  # folded, LGC's and FLGC's too
    assert written.error < 1e-5


@needs_onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", PLAIN_ALGORITHMS)
def test_every_algorithm_agrees_by_the_older_exporter(algorithm: str, tmp_path: Path) -> None:
    network = EveryVariant()
    written = bgcbench.export(
        network, tmp_path / "net.onnx", example_input=(16, 8, 8), algorithm=algorithm, exporter="torchscript"
    )
    agrees(network, written, torch.randn(4, 16, 8, 8))
    assert (algorithm == "dense") == (set(written.algorithms.values()) == {"dense"})
    if algorithm == "dense":
        assert written.nodes["Conv"] == len(written.algorithms)


@pytest.mark.parametrize(
    ("name", "variant", "size", "to"),
    [
        ("resnet18", "tlgc", 64, "torch"),
        ("mobilenet_v2", "bgc", 64, "torch"),
        pytest.param("timm/test_efficientnet", "shuffle", 64, "onnx", marks=needs_onnx),
        pytest.param("timm/resnet10t", "bgc", 64, "onnx", marks=needs_onnx),
        ("timm/resnet10t", "lowrank", 64, "exported"),
    ],
)
def test_networks_of_libraries_agree(name: str, variant: str, size: int, to: str, tmp_path: Path) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    network, path = converted(name, variant, size), tmp_path / f"net{TARGETS[to]}"
    algorithm = {"bgc": "two_conv", "shuffle": "stock"}.get(variant, "auto")
    written = bgcbench.export(network, path, to, example_input=(3, size, size), algorithm=algorithm)
    agrees(network, written, torch.randn(2, 3, size, size))
    assert not any("norm" in kind.lower() for kind in written.nodes)


@needs_onnx
def test_auto_takes_what_onnx_runtime_is_fastest_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first layer an algorithm that is worth it, of the second one that is not; of the networks the fastest."""
    times = [
        {"two_conv": 0.9, "matrix": 0.4, "split": 0.8, "dense": 1.0},
        {"two_conv": 1.5, "matrix": 1.4, "split": 0.95, "dense": 1.0},
        {"layer by layer": 0.7, "least work": 0.8, "dense": 1.0},
    ]
    left = iter([times[0], times[1], times[0], times[2]])

    def measured(make: Callable[[], Any], device: torch.device) -> autotune.Choice:
        seconds = next(left)
        assert list(make()) == list(seconds)
        for call in make().values():
            call()
        best = min(seconds, key=seconds.__getitem__)
        return autotune.Choice(best, seconds, best, seconds)

    monkeypatch.setattr(fastest, "measured", measured)
    layers = (bgcbench.BalancedGroupConv2d(8, 8, kernel, groups=4) for kernel in (3, 1, 3))
    network = nn.Sequential(nn.Conv2d(3, 8, 1), *layers).eval()
    written = bgcbench.export(network, tmp_path / "net.onnx", example_input=(3, 8, 8))
    assert written.algorithms == {"1": "matrix", "2": "dense", "3": "matrix"}  # the third sees fewer pixels
    assert written.seconds == times[2]
    assert "layer by layer 700 ms, least work 800 ms" in str(written)
    agrees(network, written, torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("to", WRITABLE)
def test_a_module_with_two_inputs_and_outputs_agrees(to: str, tmp_path: Path) -> None:
    network = bgcbench.convert(
        TwoInputs().eval(), "bgc", 2, include="conv", where="none",
        example_input=(torch.randn(1, 3, 8, 8), torch.randn(1, 16, 8, 8)),
    ).model  # fmt: skip
    inputs = torch.randn(4, 3, 8, 8), torch.randn(4, 16, 8, 8)
    written = bgcbench.export(network, tmp_path / f"net{TARGETS[to]}", to, example_input=inputs, algorithm="two_conv")
    agrees(network, written, *inputs)
    agrees(network, written, *(x[:1] for x in inputs))


@needs_onnx
def test_a_fixed_batch_is_the_only_one(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    written = bgcbench.export(network, tmp_path / "net.onnx", example_input=(3, 8, 8), batch=2)
    agrees(network, written, torch.randn(2, 3, 8, 8))
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        opened(written.paths, "onnx")(torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("to", WRITABLE)
def test_what_computes_something_else_is_not_written(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporting.made_plain

    def wrong(*given: object) -> nn.Module:
        made = right(*given)  # type: ignore[arg-type]
        with torch.no_grad():
            next(made.parameters())[0] *= 1.001
        return made

    monkeypatch.setattr(exporting, "made_plain", wrong)
    network = nn.Sequential(bgcbench.BalancedGroupConv2d(8, 8, 3, groups=4))
    path = tmp_path / f"net{TARGETS[to]}"
    with pytest.raises(BgcbenchError, match="computes something else: its outputs differ by") as refused:
        bgcbench.export(network, path, to, example_input=(8, 8, 8), algorithm="two_conv")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_the_same_for_all_images_are_no_proof(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    said = str(bgcbench.export(network, tmp_path / "net.pt", "torch", example_input=(3, 8, 8)))
    assert "hardly depend" not in said
    nn.init.zeros_(network[0].weight)  # type: ignore[arg-type]
    written = bgcbench.export(network, tmp_path / "net.pt", "torch", example_input=(3, 8, 8), force=True)
    assert written.spread < 1e-12
    assert "they hardly depend on the images" in str(written)


def test_a_file_that_does_not_run_is_refused() -> None:
    def broken(*_: Tensor) -> list[Tensor]:
        raise RuntimeError("Got invalid dimensions")

    with pytest.raises(BgcbenchError, match=r"the file cannot be run on 2 images \(Got invalid dimensions\)"):
        exporting.compared(nn.Identity(), broken, [(torch.randn(2, 3),)])


@pytest.mark.parametrize("to", WRITABLE)
def test_what_cannot_be_followed_is_named(to: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Undecided()), nn.Conv2d(4, 4, 1))
    with pytest.raises(BgcbenchError, match=r"^1\.1 \(Undecided\) cannot be written as .*; try ") as refused:
        bgcbench.export(network, tmp_path / f"net{TARGETS[to]}", to, example_input=(3, 8, 8))
    assert "\n" not in str(refused.value)


def test_code_quotes_what_a_repr_leaves_bare_and_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.GELU("tanh"))
    written = bgcbench.export(network, tmp_path / "net.pt", "torch", example_input=(3, 8, 8))
    assert "padding_mode='circular'" in written.paths[1].read_text()
    agrees(network, written, torch.randn(2, 3, 8, 8))
    odd = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))))
    with pytest.raises(BgcbenchError, match=r"1\.0.* cannot be written as"):
        bgcbench.export(odd, tmp_path / "odd.pt", "torch", example_input=(3, 8, 8))


def test_code_that_would_call_another_package_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Foreign())
    with pytest.raises(BgcbenchError, match=r"^1 \(Foreign\) cannot be .*calls tests's function wrapped"):
        bgcbench.export(network, tmp_path / "net.pt", "torch", example_input=(3, 8, 8))


def test_a_layer_that_is_not_yet_sparse_is_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), LearnedGroupConv2d(8, 8, 3, groups=4))
    with pytest.raises(UsageError, match=r"^1: this LGC layer has made 0 of its 3 drops"):
        bgcbench.export(network, tmp_path / "net.pt", "torch", example_input=(3, 8, 8))


@pytest.mark.parametrize(
    ("name", "to", "options", "problem"),
    [
        ("net.onnx", "torch", {}, r"ends with \.pt; name it"),
        ("a-b.pt", "torch", {}, r"name it .*a_b\.pt"),
        ("net.pt", "tensorrt", {}, "unknown target 'tensorrt'"),
        ("net.pt", "torch", {"algorithm": "split"}, "of none of the network's layers; the network has no layer"),
        ("net.pt", "torch", {"algorithm": "triton"}, "unknown algorithm 'triton'"),
        ("net.pt", "torch", {"exporter": "onnx2"}, "unknown exporter"),
        ("net.pt", "torch", {"batch": 0}, "batch=0"),
        ("net.pt", "torch", {"example_input": 7}, "example_input is a int"),
    ],
)
def test_wrong_arguments_are_refused(name: str, to: str, options: dict[str, object], problem: str,
                                     tmp_path: Path) -> None:  # fmt: skip
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(UsageError, match=problem):
        bgcbench.export(network, tmp_path / name, to, **{"example_input": (3, 8, 8), **options})  # type: ignore[arg-type]


def test_networks_that_are_not_float32_or_not_finite_are_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(UsageError, match=r"torch\.float64; export its float\(\) version"):
        bgcbench.export(network.double(), tmp_path / "net.pt", "torch", example_input=(3, 8, 8))
    with torch.no_grad():
        network.float()[0].weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="not finite"):
        bgcbench.export(network, tmp_path / "net.pt", "torch", example_input=(3, 8, 8))


def test_an_existing_file_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    network, path = nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "net.pt"
    path.with_suffix(".py").write_text("mine")  # of the two files, the one that was not named
    with pytest.raises(OutputError, match=r"net\.py exists; --force"):
        bgcbench.export(network, path, "torch", example_input=(3, 8, 8))
    assert path.with_suffix(".py").read_text() == "mine"
    agrees(
        network, bgcbench.export(network, path, "torch", example_input=(3, 8, 8), force=True), torch.randn(1, 3, 8, 8)
    )


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"^{package} is not installed; pip install 'bgcbench\[onnx\]'"):
        bgcbench.export(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "net.onnx", example_input=(3, 8, 8))
