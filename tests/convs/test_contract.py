"""What every variant must do, whatever it is. A variant joins by being registered in bgcbench.specs.VARIANTS."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bgcbench.convs import VariantConv2d, autotune, build_conv
from bgcbench.convs.lgc import LearnedGroupConv2d
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.counts import count
from bgcbench.specs import POINTWISE_ALGORITHMS, VARIANTS, ConvSpec, as_pair, indivisible, load_layer, unfit
from bgcbench.theory.moments import patch_second_moment

ALGORITHMS = [(name, algorithm) for name in VARIANTS for algorithm in VARIANTS[name].algorithms]
SHAPES = [
    pytest.param({"kernel_size": 3, "padding": 1}, id="3x3"),
    pytest.param({"kernel_size": 1}, id="1x1"),
    pytest.param({"kernel_size": 3, "stride": 2, "padding": 1}, id="stride2"),
    pytest.param({"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False}, id="dilation2-nobias"),
    pytest.param({"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)}, id="rectangular"),
    pytest.param({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, id="circular"),
]
GROUPS = (1, 2, 4, 8)
IN, OUT = 8, 16
# Some algorithms are for 1x1 kernels without padding only.
KERNEL = {algorithm: 1 if algorithm in POINTWISE_ALGORITHMS else 3 for _, algorithm in ALGORITHMS}
# Every algorithm with every shape and in two of the four N, so that every algorithm and every shape meet every N.
CASES = [
    pytest.param(name, algorithm, GROUPS[number % 4], *shape.values, id=f"{name}-{algorithm}-{shape.id}-{number % 4}")
    for place, (name, algorithm) in enumerate(ALGORITHMS)
    for at, shape in enumerate([*SHAPES, pytest.param({"kernel_size": 1, "stride": (2, 1)}, id="1x1-stride2")])
    if algorithm not in POINTWISE_ALGORITHMS or shape.values[0]["kernel_size"] == 1
    for number in ((place + at, place + at + 2) if name != "standard" else (0,))
]


def make(name: str, algorithm: str, groups: int, dtype: torch.dtype = torch.float64, **shape: object) -> VariantConv2d:
    """A layer of 8 -> 16 channels with a bias that is not zero; at N = 4 where N leaves nothing of it."""
    size = as_pair("kernel_size", shape["kernel_size"])  # type: ignore[arg-type]
    if groups > 4 and unfit(name, IN, OUT, groups, math.prod(size)):
        groups = 4
    layer = load_layer(name)(
        IN,
        OUT,
        groups=1 if name == "standard" else groups,
        algorithm=algorithm,
        dtype=dtype,
        **shape,  # type: ignore[arg-type]
    )
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    if isinstance(layer, LearnedGroupConv2d):
        layer.set_progress(1.0)  # before that it is a standard convolution
    return layer


def dense_output(layer: VariantConv2d, x: Tensor) -> Tensor:
    """The oracle: a plain convolution with the layer's dense kernel, in float64."""
    padding = layer.padding
    x = x.double()
    if layer.padding_mode != "zeros":
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=layer.padding_mode)
        padding = (0, 0)
    bias = None if layer.bias is None else layer.bias.double()
    return F.conv2d(x, layer.dense_weight().double(), bias, layer.stride, padding, layer.dilation)


@pytest.mark.parametrize(("name", "algorithm", "groups", "shape"), CASES)
class TestForward:
    def test_equals_the_convolution_with_its_dense_kernel_in_both_layouts(self, name, algorithm, groups, shape) -> None:
        layer = make(name, algorithm, groups, **shape)
        x = torch.randn(2, IN, 9, 7, dtype=torch.float64)
        expected = dense_output(layer, x)
        for layout in (torch.contiguous_format, torch.channels_last):
            layer.to(memory_format=layout)
            for grad in (True, False):  # which take other ways
                with torch.set_grad_enabled(grad):
                    y = layer(x.contiguous(memory_format=layout))
                assert layout == torch.contiguous_format or y.is_contiguous(memory_format=layout)
                torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    def test_gradients_equal_those_through_the_dense_kernel(self, name, algorithm, groups, shape) -> None:
        layer = make(name, algorithm, groups, **shape)
        x = torch.randn(2, IN, 9, 7, dtype=torch.float64, requires_grad=True)
        leaves = [x, *layer.parameters()]
        expected = dense_output(layer, x)
        upstream = torch.randn_like(expected)
        for own, reference in zip(
            torch.autograd.grad(layer(x), leaves, upstream),
            torch.autograd.grad(expected, leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(own, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "algorithm"), ALGORITHMS)
class TestModule:
    def test_float32_error_is_at_most_twice_that_of_the_default_algorithm(self, name, algorithm) -> None:
        # 64 channels: with fewer the CPU library picks kernels that sum in another order for some algorithms only.
        torch.manual_seed(0)  # the error of the bias's gradient scatters: 64 sums
        groups = 1 if name == "standard" else 4
        size = KERNEL[algorithm]
        layer, plain = (
            load_layer(name)(64, 64, size, padding=size // 2, groups=groups, algorithm=one)
            for one in (algorithm, VARIANTS[name].algorithms[0])
        )
        if layer.state_dict().keys() == plain.state_dict().keys():
            plain.load_state_dict(layer.state_dict())
        else:  # a deployed layer has parameters of its own
            plain = layer
        x = torch.randn(8, 64, 14, 14, requires_grad=True)
        leaves = [x, *layer.parameters()]
        oracle = dense_output(layer, x)
        upstream = torch.randn_like(oracle).float()
        exact = [oracle, *torch.autograd.grad(oracle, leaves, upstream.double())]

        def errors(module: VariantConv2d) -> list[float]:
            own_leaves = [x, *module.parameters()]
            y = module(x)
            results = [y, *torch.autograd.grad(y, own_leaves, upstream)]
            return [float((r - e).detach().norm() / e.detach().norm()) for r, e in zip(results, exact, strict=True)]

        eps = torch.finfo(torch.float32).eps
        for own, reference in zip(errors(layer), errors(plain), strict=True):
            # The gradients of two factors are products with the other one, of sums that each algorithm takes elsewhere.
            assert own <= 2 * reference + eps or name == "lowrank"
            assert own <= 8 * eps  # sums of 576 to 1568 products, in blocks

    def test_counts_equal_the_formulas_and_the_stored_parameters(self, name, algorithm) -> None:
        for groups in (1,) if name == "standard" else GROUPS:
            layer = make(
                name, algorithm, groups, kernel_size=KERNEL[algorithm], stride=2, padding=KERNEL[algorithm] // 2
            )
            counts, stored = layer.counts(9, 7), sum(p.numel() for p in layer.parameters())
            assert stored == (layer.params if layer.algorithm != "masked" or groups == 1 else counts.params_training)
            assert counts == count(layer.spec, 9, 7)
            assert layer.macs(9, 7) == count(layer.spec, 9, 7).macs

    def test_macs_equal_what_torch_counts_in_the_default_and_the_deployed_algorithm(self, name, algorithm) -> None:
        own = algorithm if algorithm in ("masked", "deployed") else VARIANTS[name].algorithms[0]
        layer = make(name, own, 4, kernel_size=3, stride=2, padding=1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, IN, 9, 7, dtype=torch.float64))
        if own != "masked":
            assert counter.get_total_flops() == 2 * layer.macs(9, 7)
            return
        mask = OUT * IN * 4 if name == "flgc" else 0  # t s^T, once a call
        assert counter.get_total_flops() == 2 * (layer.counts(9, 7).macs_training + mask)

    def test_state_dict_and_deep_copy_round_trip(self, name, algorithm) -> None:
        layer, other = (make(name, algorithm, 4, kernel_size=KERNEL[algorithm]) for _ in range(2))
        other.load_state_dict(layer.state_dict())
        x = torch.randn(1, IN, 5, 5, dtype=torch.float64)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    def test_folded_it_is_a_plain_convolution_that_computes_the_same(self, name, algorithm) -> None:
        size = KERNEL[algorithm]
        layer = make(name, algorithm, 4, kernel_size=size, stride=2, padding=size // 2, padding_mode="replicate").eval()
        x = torch.randn(2, IN, 6, 5, dtype=torch.float64)
        conv = layer.folded()
        assert type(conv) is torch.nn.Conv2d
        assert not conv.training
        torch.testing.assert_close(conv(x), layer(x), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            layer.kernel.zero_()
        assert conv.weight.any()  # a copy

    def test_its_input_is_called_as_that_of_a_conv2d(self, name, algorithm) -> None:
        layer = make(name, algorithm, 4, kernel_size=KERNEL[algorithm])
        x = torch.randn(2, IN, 5, 5, dtype=torch.float64)
        assert torch.equal(layer(input=x), layer(x))

    def test_autocast_computes_in_the_lower_precision(self, name, algorithm) -> None:
        layer = make(name, algorithm, 4, torch.float32, kernel_size=KERNEL[algorithm], padding=KERNEL[algorithm] // 2)
        x = torch.randn(2, IN, 6, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        error = (y.double() - dense_output(layer, x)).norm() / dense_output(layer, x).norm()
        assert error < 3 * torch.finfo(torch.bfloat16).eps

    def test_an_unbatched_image_is_a_batch_of_one(self, name, algorithm) -> None:
        layer = make(name, algorithm, 4, kernel_size=KERNEL[algorithm], padding=KERNEL[algorithm] // 2)
        x = torch.randn(IN, 5, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=1e-12, atol=1e-12)

    def test_an_empty_batch_gives_an_empty_batch(self, name, algorithm) -> None:
        layer = make(name, algorithm, 4, kernel_size=KERNEL[algorithm], padding=KERNEL[algorithm] // 2)
        assert layer(torch.empty(0, IN, 5, 6, dtype=torch.float64)).shape == (0, OUT, 5, 6)


# As ALGORITHMS, and the algorithm that is measured: whatever has been found, a record of the layer is the same one.
RECORDED = [*ALGORITHMS, *((name, "auto") for name in VARIANTS if VARIANTS[name].measured)]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")


def recordable(name: str, algorithm: str, mode: str = "zeros") -> VariantConv2d:
    size = KERNEL.get(algorithm, 3)
    shape = {"kernel_size": size, "stride": (2, 1), "padding": size // 2, "padding_mode": mode}
    return make(name, algorithm, 4, torch.float32, **shape).eval()


def was_measured(layer: VariantConv2d) -> bool:
    return layer.algorithm == "auto" and bool(layer.chosen)


def choose_every_algorithm_once(layer: VariantConv2d, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A turn for each algorithm that x may be run in, which the layer has just chosen for itself."""
    for algorithm in layer.candidates(x, layer.kernel):
        monkeypatch.setattr(autotune, "choose", lambda *_, algorithm=algorithm: algorithm)
        layer._picked.clear()
        with torch.no_grad():
            layer(x)
        layer(x)
        assert set(layer.chosen.values()) == {algorithm}
        yield


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(("name", "algorithm"), RECORDED)
class TestRecording:
    """torch.jit.trace, torch.fx, torch.compile and torch.export follow the single operations."""

    def test_every_trace_is_the_same_graph(self, name, algorithm, monkeypatch) -> None:
        layer, x = recordable(name, algorithm), torch.randn(2, IN, 6, 6)
        first = torch.jit.trace(layer, x, check_trace=False)
        assert not was_measured(layer)  # nothing was measured meanwhile
        other = torch.randn(3, IN, 5, 8)
        turns = choose_every_algorithm_once(layer, x, monkeypatch) if algorithm == "auto" else (None, None)
        for _ in turns:
            again = torch.jit.trace(layer, x)
            assert again.code == first.code
            assert "ops.bgcbench" not in again.code  # operators that only this package has
            assert "PythonOp" not in str(again.graph)
            torch.testing.assert_close(again(other), layer(other))

    @pytest.mark.parametrize("mode", ["zeros", "circular"])
    def test_a_symbolic_trace_takes_any_batch_size_and_layout(self, name, algorithm, mode) -> None:
        layer = recordable(name, algorithm, mode)
        traced = torch.fx.symbolic_trace(layer)
        assert not was_measured(layer)
        for shape in ((2, IN, 6, 6), (1, IN, 5, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(traced(x), layer(x))
            torch.testing.assert_close(traced(x.contiguous(memory_format=torch.channels_last)), layer(x))
            torch.testing.assert_close(traced(x[0]), layer(x[0]))
        assert dict(traced.named_parameters()).keys() == dict(layer.named_parameters()).keys()
        traced(torch.randn(1, IN, 5, 5)).sum().backward()
        assert all(p.grad is not None for n, p in layer.named_parameters())

    def test_a_layer_that_never_ran_compiles_into_one_graph(self, name, algorithm) -> None:
        torch.compiler.reset()  # it counts how often the same code is compiled for another layer, and then refuses
        layer, x = recordable(name, algorithm), torch.randn(2, IN, 6, 6)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y = compiled(x)
        assert not was_measured(layer)
        torch.testing.assert_close(y, layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)

    def test_an_export_is_the_same_whatever_has_run_before(self, name, algorithm, monkeypatch) -> None:
        layer, x = recordable(name, algorithm), torch.randn(2, IN, 6, 6)
        first = torch.export.export(layer, (x,))
        torch.testing.assert_close(first.module()(x), layer(x))
        if hasattr(torch.compiler, "is_exporting"):
            assert "bgcbench" not in first.graph_module.code
            for _ in choose_every_algorithm_once(layer, x, monkeypatch) if algorithm == "auto" else ():
                assert torch.export.export(layer, (x,)).graph_module.code == first.graph_module.code

    def test_make_fx_sees_the_composed_operations(self, name, algorithm) -> None:
        layer, x = recordable(name, algorithm), torch.randn(2, IN, 6, 6)
        traced = make_fx(layer)(x)
        assert not was_measured(layer)
        assert "aten.add_." not in traced.code  # nothing in place, as where nobody follows
        torch.testing.assert_close(traced(x), layer(x))

    def test_scripting_is_refused_in_one_line(self, name, algorithm) -> None:
        network = torch.nn.Sequential(recordable(name, algorithm), torch.nn.ReLU())
        with pytest.raises(UsageError, match=r"torch\.jit\.trace") as refused:
            torch.jit.script(network)
        assert "\n" not in str(refused.value)


class EveryAlgorithm(torch.nn.Module):
    """Every algorithm of every variant, side by side: one export of all takes as long as one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(recordable(name, algorithm) for name, algorithm in RECORDED)

    def forward(self, input: Tensor) -> list[Tensor]:
        return [layer(input) for layer in self.layers]


@needs_onnx
@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "newer"])
@pytest.mark.filterwarnings("ignore")  # the older exporter is deprecated
def test_onnx_computes_the_same(dynamo: bool, tmp_path: Path) -> None:
    import onnxruntime

    network, x = EveryAlgorithm().eval(), torch.randn(2, IN, 6, 6)
    with torch.no_grad():
        expected = network(x)
        torch.onnx.export(network, (x,), tmp_path / "all.onnx", dynamo=dynamo, input_names=["input"])
    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", providers=["CPUExecutionProvider"])
    for (name, algorithm), own, right in zip(RECORDED, session.run(None, {"input": x.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(own), right, rtol=1e-5, atol=1e-5, msg=f"{name} {algorithm}")


@pytest.mark.parametrize("name", VARIANTS)
class TestProjection:
    @pytest.mark.parametrize("groups", GROUPS)
    @pytest.mark.parametrize("projection", ["white", "least_squares", "copy"])
    def test_a_layer_is_rebuilt_from_its_own_dense_kernel(self, name, groups, projection) -> None:
        if name == "bgc" and projection == "copy" and groups > 1:
            pytest.skip("the paper's construction is no projection; test_bgc says what it gives")
        layer = make(name, "auto", groups, kernel_size=3)
        moment = random_moment(IN * 9) if projection == "least_squares" else None
        rebuilt = load_layer(name).from_dense(
            layer.dense_weight(), layer.groups, bias=layer.bias, projection=projection, second_moment=moment
        )
        torch.testing.assert_close(rebuilt.dense_weight(), layer.dense_weight(), rtol=1e-7, atol=1e-8)
        assert torch.equal(rebuilt.bias, layer.bias)

    @pytest.mark.parametrize("groups", GROUPS[1:])
    @pytest.mark.parametrize("projection", ["white", "least_squares"])
    def test_no_perturbation_lowers_the_error_it_minimises(self, name, groups, projection) -> None:
        if name == "standard":
            groups = 1
        weight = torch.randn(OUT, IN, 3, 3, dtype=torch.float64)
        moment = torch.eye(IN * 9, dtype=torch.float64) if projection == "white" else random_moment(IN * 9)
        layer = load_layer(name).from_dense(
            weight, groups, projection=projection, second_moment=None if projection == "white" else moment
        )
        best = lost_energy(weight, layer, moment)
        for _ in range(10):
            other = copy.deepcopy(layer)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
            assert lost_energy(weight, other, moment) >= best

    def test_stride_dilation_bias_and_dtype_are_taken_over(self, name) -> None:
        weight, bias = torch.randn(OUT, IN, 3, 3), torch.randn(OUT)
        layer = load_layer(name).from_dense(
            weight, 1 if name == "standard" else 2, bias=bias, stride=2, padding=1, dilation=2
        )
        x = torch.randn(2, IN, 9, 9)
        assert layer.kernel.dtype == torch.float32
        torch.testing.assert_close(layer(x).double(), dense_output(layer, x), rtol=1e-4, atol=1e-5)
        assert layer(x).shape == F.conv2d(x, weight, bias, 2, 1, 2).shape

    def test_what_would_not_be_used_is_refused(self, name) -> None:
        weight = torch.randn(OUT, IN, 3, 3)
        layer = load_layer(name)
        with pytest.raises(UsageError, match="second_moment"):
            layer.from_dense(weight, projection="least_squares")
        with pytest.raises(UsageError, match="uses no second_moment"):
            layer.from_dense(weight, projection="white", second_moment=torch.eye(72))
        with pytest.raises(UsageError, match="did you mean 'white'"):
            layer.from_dense(weight, projection="wite")
        with pytest.raises(ShapeError, match="standard kernel"):
            layer.from_dense(weight[0])

    def test_a_second_moment_of_the_wrong_size_is_refused(self, name) -> None:
        if name == "standard":
            pytest.skip("every projection of a standard kernel is itself")
        with pytest.raises(ShapeError, match=r"needs \(72, 72\)"):
            load_layer(name).from_dense(
                torch.randn(OUT, IN, 3, 3), 2, projection="least_squares", second_moment=torch.eye(8)
            )


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if VARIANTS[name].unfit is indivisible and name != "standard"]
)
def test_groups_that_do_not_divide_are_refused_with_those_that_would_do(name: str) -> None:
    with pytest.raises(
        ShapeError,
        match=r"in_channels=24 is not divisible by groups=16; groups that divide 24 -> 32 channels: 1, 2, 4, 8$",
    ):
        load_layer(name)(24, 32, 3, groups=16)
    with pytest.raises(
        ShapeError, match=r"out_channels=10 is not divisible by groups=4; groups that divide 8 -> 10 channels: 1, 2$"
    ):
        load_layer(name)(8, 10, 3, groups=4)


@pytest.mark.parametrize("wrong", [{"in_channels": 0}, {"out_channels": -4}, {"kernel_size": 0}, {"stride": 0},
                                   {"padding": -1}, {"dilation": 0}, {"groups": 0}, {"kernel_size": 3.0},
                                   {"padding": "same"}, {"kernel_size": (3, 3, 3)}])  # fmt: skip
def test_sizes_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    arguments = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, **wrong}
    for name in VARIANTS:
        with pytest.raises(ShapeError, match=f"{next(iter(wrong))}="):
            load_layer(name)(**arguments)


@pytest.mark.parametrize("name", VARIANTS)
def test_he_initialisation_uses_the_true_fan(name: str) -> None:
    layer = load_layer(name)(64, 128, 3, groups=1 if name == "standard" else 4)
    for parameter in (p for p in layer.parameters() if p.dim() == 4):
        # What one output sums over; FLGC's dense kernel is masked to 1/4 from the start, LGC's is not yet.
        fan = parameter[0].numel() // (4 if name == "flgc" else 1)
        # The sample variance of k normal numbers has a relative standard deviation of sqrt(2 / k).
        assert abs(float(parameter.detach().var()) * fan / 2 - 1) < 5 * (2 / parameter.numel()) ** 0.5
    assert layer.bias is not None
    assert not layer.bias.any()


@pytest.mark.parametrize(("name", "algorithm"), ALGORITHMS)
def test_build_conv_makes_the_layer_that_the_spec_describes(name: str, algorithm: str) -> None:
    groups = 1 if name == "standard" else 2
    size = KERNEL[algorithm]
    spec = ConvSpec(name, 8, 16, size, stride=2, padding=size // 2, groups=groups, bias=False, algorithm=algorithm)
    layer = build_conv(spec, dtype=torch.float64)
    assert type(layer) is load_layer(name)
    assert layer.spec == spec
    assert layer.algorithm == algorithm
    assert layer.kernel.dtype == torch.float64


def random_moment(size: int) -> Tensor:
    """A second moment far from white, of full rank."""
    root = torch.randn(size, size, dtype=torch.float64) + 2 * torch.randn(size, 1, dtype=torch.float64)
    return root @ root.T / size


def lost_energy(weight: Tensor, layer: VariantConv2d, moment: Tensor) -> float:
    """E||Wu - Du||^2 for inputs with E[u u^T] = moment."""
    difference = (weight - layer.dense_weight()).detach().flatten(1)
    return float(((difference @ moment) * difference).sum())


def test_the_moment_of_real_patches_gives_the_error_measured_on_them() -> None:
    x = torch.randn(3, IN, 6, 5, dtype=torch.float64).relu()
    weight = torch.randn(OUT, IN, 3, 3, dtype=torch.float64)
    moment = patch_second_moment(x, (3, 3), stride=(2, 1), padding=(1, 1))
    for name in ("bgc", "gc"):
        candidate = load_layer(name).from_dense(
            weight, 2, projection="least_squares", second_moment=moment, stride=(2, 1), padding=1
        )
        difference = F.conv2d(x, weight, None, (2, 1), 1) - candidate(x)
        measured = float(difference.detach().square().sum()) / (3 * 3 * 5)  # 3 images of 3 x 5 positions
        assert measured == pytest.approx(lost_energy(weight, candidate, moment), rel=1e-6, abs=1e-9)
