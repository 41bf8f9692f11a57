from __future__ import annotations

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bgcbench.convs import CONVS
from bgcbench.measure.trace import trace


def test_macs_equal_half_of_what_torch_counts_as_flops() -> None:
    for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"):
        model = torchvision.models.get_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        assert 2 * trace(model, (3, 64, 64)).macs == counter.get_total_flops()


def test_variants_count_by_their_formula_and_once() -> None:
    model = nn.Sequential(CONVS["bgc"](8, 8, 3, padding=1, groups=4), CONVS["flgc"](8, 8, 1, groups=2))
    found = trace(model, (8, 6, 6))
    assert [call.macs for call in found.calls] == [layer.macs(6, 6) for layer in model]
    assert not found.functional


def test_nothing_of_the_network_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("called"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, (3, 8, 8))
    assert not seen
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_functional_convolutions_and_borrowed_weights_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.lent = nn.Conv2d(8, 8, 1)
            self.kernel = nn.Parameter(torch.randn(4, 8, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.conv2d(self.first(x), self.kernel, stride=2)
            return F.conv2d(torch.cat([x, x], 1), self.lent.weight)

    found = trace(Net(), (3, 12, 12))
    assert [(call.module, call.in_channels, call.out_channels, call.size) for call in found.convs] == [
        ("first", 3, 8, (12, 12)), (None, 8, 4, (10, 10)), (None, 8, 8, (4, 4))]  # fmt: skip
    assert len(found.functional) == 2
    assert found.borrowed == {"lent"}
    # 10 x 10 positions of 3 x 3 x 3 products, 4 x 4 of 9 x 8, 4 x 4 of 8.
    assert found.macs == 100 * 8 * 27 + 16 * 4 * 72 + 16 * 8 * 8


def test_shortcuts_are_told_by_the_additions_whatever_they_are_called() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.quiet = nn.Conv2d(8, 16, 1)
            self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            y = self.b(self.a(x).relu())
            y += F.batch_norm(self.quiet(x), torch.zeros(16), torch.ones(16))
            return self.left(y) + self.right(y)  # two equal branches: neither is the other's shortcut

    assert trace(Block(), (3, 8, 8)).shortcuts == {"quiet"}


def test_a_network_that_needs_numbers_is_run_with_numbers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y if float(y.sum()) < 1e30 else -y

    assert trace(Net(), (3, 8, 8)).macs == 36 * 4 * 27


def test_operations_outside_of_the_count_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y @ y.transpose(-1, -2)

    assert sum(trace(Net(), (3, 8, 8)).uncounted.values()) == 1


def test_the_convolution_that_ends_a_network_is_its_classifier_unless_a_norm_follows() -> None:
    plain = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1)]
    assert trace(nn.Sequential(*plain), (3, 8, 8)).heads == {"2"}
    assert trace(nn.Sequential(*plain, nn.BatchNorm2d(10)), (3, 8, 8)).heads == set()
    assert trace(nn.Sequential(*plain, nn.Flatten(), nn.Linear(360, 2)), (3, 8, 8)).heads == set()
    assert trace(torchvision.models.squeezenet1_1(), (3, 64, 64)).heads == {"classifier.1"}
