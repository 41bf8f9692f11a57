"""Norms folded into the layers before them: by us exactly, by other programs exactly or not at all."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bgcbench
from bgcbench.convs import CONVS
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.specs import VARIANTS

CELLS = [(name, algorithm) for name, variant in VARIANTS.items() for algorithm in (
    ("masked", "deployed") if "deployed" in variant.algorithms else ("auto",))]  # fmt: skip
OURS = [cell for cell in CELLS if cell[0] != "standard"]


def layer_of(variant: str, algorithm: str, *, groups: int = 4, bias: bool = False, kernel: int = 3) -> VariantConv2d:
    n = 1 if variant == "standard" else groups
    padding = kernel // 2
    made = CONVS[variant].from_dense(
        torch.randn(16, 8, kernel, kernel, dtype=torch.float64),
        n,
        bias=torch.randn(16, dtype=torch.float64) if bias else None,
        padding=padding,
        algorithm=algorithm,
    )
    if variant == "flgc" and algorithm == "deployed":  # uneven groups, and one without inputs
        group_in, group_out = (torch.randint(0, groups - 1, (c,)) for c in (8, 16))
        made._set_partition(group_in, group_out, torch.device("cpu"))
        with torch.no_grad():
            made.kernel.normal_()
    return made.eval()


def norm_of(channels: int = 16, kind: Callable[..., nn.Module] = nn.BatchNorm2d) -> Any:
    norm: Any = kind(channels).double().eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


X = torch.randn(3, 8, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("variant", "algorithm"), CELLS)
def test_a_layer_takes_a_norm_into_all_of_its_kernels(variant: str, algorithm: str, bias: bool) -> None:
    layer, norm = layer_of(variant, algorithm, bias=bias), norm_of()
    expected, kernel = norm(layer(X)), layer.dense_weight().clone()
    folded = bgcbench.fold_norms(nn.Sequential(layer, norm), example_input=X[:1])
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(X), expected, rtol=1e-12, atol=1e-12)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded[0].dense_weight(), kernel * scale[:, None, None, None], rtol=1e-12, atol=1e-12)
    assert folded[0].params == layer.params + (0 if bias else 16)
    assert torch.equal(layer.dense_weight(), kernel)  # a copy was folded


def test_a_whole_network_computes_the_same_without_its_norms() -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    converted = bgcbench.convert(model, "bgc", 4, init="copy", example_input=(3, 32, 32)).model
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = converted(x)
    for inplace in (False, True):
        folded = bgcbench.fold_norms(converted, example_input=(3, 32, 32), inplace=inplace)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert (folded is converted) is inplace
        torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)


def test_a_norm_that_activates_leaves_its_activation() -> None:
    timm = pytest.importorskip("timm")
    norm = norm_of(kind=timm.layers.BatchNormAct2d)
    layer = layer_of("bgc", "auto")
    expected = norm(layer(X))
    folded = bgcbench.fold_norms(nn.Sequential(layer, norm), example_input=X[:1])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(X), expected, rtol=1e-12, atol=1e-12)


class Shared(nn.Module):
    """Norms that must stay: of a sum, of a convolution that runs twice, of an output that is used elsewhere too; one
    that runs twice itself; one with nothing before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.used = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.of_sum, self.of_twice, self.of_used = (norm_of(8) for _ in range(3))
        self.pre, self.both = norm_of(8), norm_of(8)
        self.last = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.of_sum(self.stem(self.pre(x)) + x)
        x = self.of_twice(self.twice(self.twice(x)))
        used = self.used(x)
        x = self.of_used(used) + used
        return self.both(self.last(x)) + self.both(x.relu())


def test_only_norms_right_behind_one_convolution_are_folded() -> None:
    model = Shared().double().eval()
    folded = bgcbench.fold_norms(model, example_input=X[:1])
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 5
    torch.testing.assert_close(folded(X), model(X), rtol=1e-12, atol=1e-12)


def test_a_network_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(UsageError, match="pass example_input"):
        bgcbench.fold_norms(nn.Sequential(nn.Linear(7, 3), nn.Conv2d(4, 4, 1)))


# ------------------------------------------------------------------------------------------------- other programs' ways


def torch_fusion(layer: Any, norm: Any) -> nn.Module:
    return fuse_conv_bn_eval(layer, norm)


def yolo_style(layer: Any, norm: Any) -> nn.Module:
    """As detection repositories do: a new convolution of the same description, its weight a product of matrices."""
    where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    fused = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **where).double()
    with torch.no_grad():
        scale = torch.diag(norm.weight.div(torch.sqrt(norm.eps + norm.running_var)))
        fused.weight.copy_(torch.mm(scale, layer.weight.clone().view(layer.out_channels, -1)).view(fused.weight.shape))
        own = torch.zeros(layer.out_channels).double() if layer.bias is None else layer.bias
        shift = norm.bias - norm.weight.mul(norm.running_mean).div(torch.sqrt(norm.running_var + norm.eps))
        fused.bias.copy_(torch.mm(scale, own.reshape(-1, 1)).reshape(-1) + shift)
    return fused.eval()


FOLDERS = [torch_fusion, yolo_style]
# A masked kernel's rows are those of a dense one, and its mask stays.
MASKED_AS_DENSE = [("lgc", "masked", torch_fusion), ("flgc", "masked", torch_fusion)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(("variant", "algorithm"), CELLS)
def test_other_folders_are_right_or_fail(variant: str, algorithm: str, folder: Any, bias: bool) -> None:
    layer, norm = layer_of(variant, algorithm, bias=bias), norm_of()
    expected = norm(layer(X))
    fails = contextlib.nullcontext()
    if variant not in ("standard", "gc") and (variant, algorithm, folder) not in MASKED_AS_DENSE:
        fails = pytest.raises((AttributeError, RuntimeError))
    with fails:
        folded = folder(copy.deepcopy(layer), norm)
    if not isinstance(fails, contextlib.nullcontext):
        return
    torch.testing.assert_close(folded(X), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("variant", "algorithm"), OURS)
def test_timms_reparameterisation_is_right_or_fails(variant: str, algorithm: str) -> None:
    """Of a block with three branches: it adds up what it takes for the kernels of their convolutions."""
    timm = pytest.importorskip("timm")
    block = timm.models.byobnet.MobileOneBlock(8, 8, kernel_size=3).double().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    converted = bgcbench.convert(
        block, variant, 4, where="all", include="*", exclude="*scale*", algorithm=algorithm, example_input=X[:1]
    ).model.eval()
    expected = converted(X)
    try:
        folded = timm.utils.reparameterize_model(converted)
        got = folded(X)
    except (AttributeError, RuntimeError):
        return
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_kernels_that_are_no_convolutions_weight_have_another_name() -> None:
    names = {(variant, algorithm): layer_of(variant, algorithm).kernel_name for variant, algorithm in CELLS}
    assert {cell for cell, name in names.items() if name == "weight"} == {
        ("standard", "auto"), ("gc", "auto"), ("lgc", "masked"), ("flgc", "masked"),
    }  # fmt: skip
    assert all(hasattr(layer_of(*cell), "weight") is (name == "weight") for cell, name in names.items())


def test_files_of_before_the_names_were_changed_load(tmp_path: Any) -> None:
    converted = bgcbench.convert(bgcbench.build_model("wrn_10_1"), "bgc", 4)
    bgcbench.save_converted(converted, tmp_path / "new.pt")
    stored = torch.load(tmp_path / "new.pt", weights_only=True)
    stored["state_dict"] = {name.replace("weight_group", "weight"): v for name, v in stored["state_dict"].items()}
    torch.save(stored, tmp_path / "old.pt")
    x = torch.randn(1, 3, 32, 32)
    loaded = bgcbench.load_converted(tmp_path / "old.pt")
    torch.testing.assert_close(loaded(x), converted.model.eval()(x), rtol=0, atol=0)
