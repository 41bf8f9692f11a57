from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from bgcbench.convs.flgc import FullyLearnableGroupConv2d, straight_through
from bgcbench.convs.masked import parameter_groups
from bgcbench.errors import ShapeError


def with_groups(inputs: list[int], outputs: list[int], groups: int, **options: object) -> FullyLearnableGroupConv2d:
    """A masked layer whose channels stand in these groups."""
    options = {"kernel_size": 3, "padding": 1, "dtype": torch.float64, **options}
    layer = FullyLearnableGroupConv2d(len(inputs), len(outputs), groups=groups, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.logits_in.copy_(3.0 * F.one_hot(torch.tensor(inputs), groups))
        layer.logits_out.copy_(3.0 * F.one_hot(torch.tensor(outputs), groups))
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def test_the_mask_connects_exactly_the_channels_in_one_group() -> None:
    layer = with_groups([0, 1, 0, 2], [2, 0, 1], 3)
    assert layer.mask().tolist() == [[0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_logits_still_give_one_group_a_channel(dtype: torch.dtype) -> None:
    one_hot = straight_through(torch.zeros(5, 4, dtype=dtype))
    assert one_hot.tolist() == [[1, 0, 0, 0]] * 5


def test_every_entry_of_the_logits_gets_the_gradient_of_a_softmax() -> None:
    layer = with_groups([0, 1, 0, 1], [1, 0, 1, 0], 2)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    (layer(x) ** 2).sum().backward()
    # By hand: dL/dM = sum over taps of dL/dW_eff W, dL/dt = dL/dM s, dL/ds = (dL/dM)^T t, then the softmax's Jacobian.
    s, t = (F.one_hot(logits.argmax(1), 2).double() for logits in (layer.logits_in, layer.logits_out))
    effective = (layer.weight * (t @ s.T)[:, :, None, None]).detach().requires_grad_()
    (F.conv2d(x, effective, layer.bias.detach(), padding=1) ** 2).sum().backward()
    to_mask = (effective.grad * layer.weight.detach()).sum((2, 3))
    for logits, upstream in ((layer.logits_out, to_mask @ s), (layer.logits_in, to_mask.T @ t)):
        p = logits.detach().softmax(1)
        expected = p * (upstream - (upstream * p).sum(1, keepdim=True))
        torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-10)
        assert logits.grad.ne(0).all()  # also for the groups that were not chosen


@pytest.mark.parametrize(("n", "m", "groups"), [(8, 16, 4), (7, 5, 3)])
def test_the_start_is_balanced_and_has_no_dead_output(n: int, m: int, groups: int) -> None:
    for _ in range(20):
        layer = FullyLearnableGroupConv2d(n, m, 1, groups=groups)
        sizes = layer.group_sizes()
        assert max(b for _, b in sizes) - min(b for _, b in sizes) <= 1
        assert max(a for a, _ in sizes) - min(a for a, _ in sizes) <= 1
        assert layer.dead_outputs() == 0.0
        assert layer.params == sum(a * b for a, b in sizes) + m


def test_starts_differ_from_layer_to_layer_and_repeat_with_the_seed() -> None:
    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return FullyLearnableGroupConv2d(32, 32, 1, groups=4).assignments()[0].tolist()

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "dead"),
    [
        ([0, 1, 0, 1], [1, 0, 0, 1, 1, 0], 2, 0.0),  # even
        ([0, 1, 0, 0, 2, 2], [2, 2, 0, 1], 3, 0.0),  # uneven
        ([0, 0, 2, 0], [1, 0, 2, 1, 0], 3, 2 / 5),  # group 1 has outputs and no inputs
        ([0, 1, 1, 0], [0, 0, 0], 2, 0.0),  # group 1 has inputs and no outputs
        ([0, 0], [1, 1, 1], 2, 1.0),  # nothing is connected
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_deployed_layer_equals_the_masked_one(inputs, outputs, groups, dead, bias, layout) -> None:
    layer = with_groups(inputs, outputs, groups, bias=bias, stride=2)
    deployed = layer.deploy().to(memory_format=layout)
    x = torch.randn(2, len(inputs), 7, 6, dtype=torch.float64).to(memory_format=layout)
    y = deployed(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(deployed(x[0]), y[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.fx.symbolic_trace(deployed)(x), y)
    assert torch.equal(deployed.dense_weight(), layer.dense_weight())
    assert torch.equal(deployed.mask(), layer.mask())
    assert layer.dead_outputs() == deployed.dead_outputs() == dead
    pairs = sum(a == b for a in inputs for b in outputs)
    assert layer.params == deployed.params == sum(p.numel() for p in deployed.parameters())
    assert deployed.params == 9 * pairs + (len(outputs) if bias else 0)
    assert deployed.macs(7, 6) == 4 * 3 * 9 * pairs
    assert deployed.deploy() is deployed


def test_a_deployed_layer_with_uneven_groups_loads_into_a_fresh_one() -> None:
    layer = with_groups([0, 1, 0, 0, 2, 2], [2, 2, 0, 1], 3).deploy()
    fresh = FullyLearnableGroupConv2d(6, 4, 3, padding=1, groups=3, algorithm="deployed", dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(fresh)(x), layer(x))


def test_a_deployed_layer_can_be_trained_compiled_and_exported() -> None:
    layer = with_groups([0, 0, 2, 0], [1, 0, 2, 1, 0], 3, dtype=torch.float32).deploy()
    x = torch.randn(2, 4, 5, 5)
    layer(x).square().sum().backward()
    assert layer.weight_packed.grad.ne(0).all()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_a_layer_without_numbers_takes_over_those_of_a_saved_one() -> None:
    layer = with_groups([0, 1, 0, 0, 2, 2], [2, 2, 0, 1], 3).deploy()
    with torch.device("meta"):
        fresh = FullyLearnableGroupConv2d(6, 4, 3, padding=1, groups=3, algorithm="deployed", dtype=torch.float64)
        FullyLearnableGroupConv2d(6, 4, 3, groups=3)
    fresh.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(fresh(x), layer(x))


def test_dead_outputs_have_the_type_of_the_others_under_autocast() -> None:
    layer = with_groups([0, 0, 2, 0], [1, 0, 2, 1, 0], 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer.deploy()(torch.ones(1, 4, 5, 5)), layer(torch.ones(1, 4, 5, 5))
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_more_groups_than_channels_are_refused() -> None:
    with pytest.raises(ShapeError, match="groups=8 is more than in_channels=4; use at most 4"):
        FullyLearnableGroupConv2d(4, 16, 1, groups=8)
    assert FullyLearnableGroupConv2d(4, 16, 1, groups=4).dead_outputs() == 0.0


def test_assignments_are_exempt_from_weight_decay_and_nothing_else_is() -> None:
    model = torch.nn.Sequential(
        FullyLearnableGroupConv2d(8, 8, 3, groups=4), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 2, 1)
    )
    decayed, exempt = parameter_groups(model, 5e-4)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (5e-4, 0.0)
    assert {id(p) for p in exempt["params"]} == {id(model[0].logits_in), id(model[0].logits_out)}
    assert len(decayed["params"]) + 2 == len(list(model.parameters()))
    torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.1)
    deployed = torch.nn.Sequential(model[0].deploy())
    assert [group["weight_decay"] for group in parameter_groups(deployed, 1.0)] == [1.0]


def test_loading_a_dense_kernel_keeps_the_most_energy_found_and_the_rest_for_later() -> None:
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    layer = FullyLearnableGroupConv2d.from_dense(weight, 4)
    assert torch.equal(layer.weight, weight)
    kept = float(layer.dense_weight().detach().square().sum() / weight.square().sum())
    diagonal = sum(float(weight[4 * g : 4 * g + 4, 4 * g : 4 * g + 4].square().sum()) for g in range(4))
    assert kept > diagonal / float(weight.square().sum())
    assert sorted(layer.group_sizes()) == [(4, 4)] * 4


def test_a_few_steps_of_training_lower_the_loss_and_change_assignments() -> None:
    # A target with planted groups; from a random balanced start, training finds better ones.
    torch.manual_seed(1)
    n, groups = 16, 4
    planted = torch.arange(n) % groups
    target_kernel = torch.randn(n, n, 1, 1) * (planted[:, None] == planted)[:, :, None, None]
    layer = FullyLearnableGroupConv2d(n, n, 1, groups=groups, bias=False)
    before = [part.clone() for part in layer.assignments()]
    optimiser = torch.optim.SGD(parameter_groups(layer, 0.0), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(200):
        x = torch.randn(64, n, 2, 2)
        loss = (layer(x) - F.conv2d(x, target_kernel)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    changed = sum(int((new != old).sum()) for new, old in zip(layer.assignments(), before, strict=True))
    assert changed > n // 2
    assert losses[-1] < 0.5 * losses[0]
