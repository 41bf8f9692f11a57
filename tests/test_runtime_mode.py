"""``profile --mode onnxruntime``: what is measured there, beside other modes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bgcbench
from bgcbench import results
from bgcbench.cli import main
from bgcbench.deployment import export as exporting
from bgcbench.deployment.workload import RuntimeWorkload, runtime_file
from bgcbench.errors import UsageError
from bgcbench.experiments.profile import ProfileConfig, plan
from bgcbench.measure import runtime
from bgcbench.measure.device import check_combination
from bgcbench.specs import VARIANTS
from tests.deployment.example import needs_onnx

pytestmark = [needs_onnx, pytest.mark.usefixtures("brisk", "one_thread")]
LAYER = ["--channels", "16", "--size", "6", "--batch", "2", "--groups", "4", "--phases", "fwd", "--device", "cpu"]
MODES = ["--mode", "eager,onnxruntime", "--quick", "--quiet"]


def profile(*words: str) -> results.Document:
    assert main(["profile", *words, *MODES, "--out", "run.json"]) == 0
    return results.read(Path("run.json"))


def test_variants_are_measured_beside_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    variants = {"standard", "gc", "bgc", "lgc"}  # one with a choice of algorithms and one that is learnt among them
    document = profile(*LAYER, "--variants", ",".join(variants))
    by_mode: dict[str, set[str]] = {}
    for row in document.results:
        assert row.status == "ok"
        assert row.phases["fwd"].samples_s
        by_mode.setdefault(row.params.mode, set()).add(row.params.variant)
    assert by_mode == {"eager": variants, "onnxruntime": variants}
    assert document.settings.mode == "eager,onnxruntime"
    assert (document.settings.runtime or "").startswith("onnxruntime ")
    assert len({row.interleaved for row in document.results}) == 1
    for row in (each for each in document.results if each.params.mode == "onnxruntime"):
        assert sum(row.forms["inference"].values()) == 1
        assert set(row.forms["inference"]) <= {"dense", *VARIANTS[row.params.variant].plain}
    live = capsys.readouterr().out
    assert main(["show", "run.json"]) == 0
    assert capsys.readouterr().out == live
    assert live.index("mode: eager") < live.index("mode: onnxruntime") < live.index("Modes (fwd):")
    assert "BGC N=4 in onnxruntime is " in live.partition("Modes (fwd):")[2]


def test_a_network_is_measured_and_an_algorithm_may_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "wrn_10_1", "--size", "8", "--batch", "1", "--groups", "4", "--variants", "bgc", "--device",
             "cpu", "--phases", "fwd", "--algorithm", "matrix"]  # fmt: skip
    document = profile(*words)
    rows = {(row.params.variant, row.params.mode): row for row in document.results}
    assert len(rows) == 4
    assert rows["bgc", "onnxruntime"].forms == {"inference": {"matrix": 6}}
    assert rows["bgc", "onnxruntime"].params.algorithm == "matrix"
    assert rows["standard", "onnxruntime"].counts == rows["standard", "eager"].counts
    assert "in onnxruntime is" in capsys.readouterr().out


def test_what_runs_there_is_the_module_in_eval_mode(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), bgcbench.ShuffleGroupConv2d(8, 8, 3, groups=2))
    nn.init.uniform_(module[1].running_var, 0.5, 2.0)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 6, 6)
    workload = RuntimeWorkload(runtime_file(module, x, "auto"), x)
    torch.testing.assert_close(workload.session(x)[0], module.eval()(x), rtol=1e-4, atol=1e-5)
    assert sum(workload.forms.values()) == 1
    workload.cell("fwd").once()
    with pytest.raises(UsageError, match="the phase fwd alone"):
        workload.cell("bwd")


def test_a_row_that_would_compute_something_else_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    right = exporting.made_plain

    def wrong(*given: Any) -> nn.Module:
        made = right(*given)
        with torch.no_grad():
            next(made.parameters())[0] *= 1.01
        return made

    monkeypatch.setattr(exporting, "made_plain", wrong)
    words = ["profile", *LAYER, "--variants", "bgc", *MODES, "--out", "run.json", "--algorithm", "two_conv"]
    assert main(words) == 1
    failed = [row for row in results.read(Path("run.json")).results if row.status == "error"]
    assert {row.params.mode for row in failed} == {"onnxruntime"}
    assert all("computes something else" in (row.reason or "") for row in failed)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mode": "eager,onnx"}, "did you mean 'onnxruntime'"),
        ({"mode": "eager,eager"}, "has a mode twice"),
        ({"mode": "onnxruntime", "phases": ("fwd", "bwd")}, "--phases fwd alone, not fwd,bwd"),
        ({"mode": "onnxruntime", "precision": "bf16"}, "--precision fp32 alone, not bf16"),
        ({"mode": "eager,onnxruntime", "layout": "nhwc"}, "--layout nchw alone, not nhwc"),
        ({"mode": "graph,onnxruntime", "device": "cpu"}, "graph replays CUDA graphs"),
    ],
)
def test_what_it_does_not_have_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        ProfileConfig(**{"phases": ("fwd",), **options})


def test_an_algorithm_of_another_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="no variant asked for has it in this mode"):
        plan(ProfileConfig(phases=("fwd",), variants=("bgc",), algorithm="matrix"))
    keys = [row.key for row in plan(ProfileConfig(
        in_channels=8, out_channels=8, groups=(4,), phases=("fwd",), variants=("bgc",), algorithm="all",
        mode="onnxruntime"))]  # fmt: skip
    assert [key.rpartition("onnxruntime-")[2] for key in keys[1:]] == ["two_conv", "matrix", "split", "dense"]


def test_a_cuda_device_is_refused_where_onnx_runtime_has_no_provider_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="pip install onnxruntime-gpu in the place of onnxruntime, or"):
        check_combination(torch.device("cuda", 0), "fp32", "onnxruntime")
    monkeypatch.setattr(onnxruntime(), "get_available_providers", lambda: ["CUDAExecutionProvider"])
    check_combination(torch.device("cuda", 0), "fp32", "onnxruntime")


def onnxruntime() -> Any:
    return pytest.importorskip("onnxruntime")


def test_on_a_cuda_device_it_computes_on_torchs_stream_where_the_input_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what ONNX Runtime is told; its CUDA provider itself has not been run here."""
    told: dict[str, Any] = {}

    class Binding:
        def bind_input(self, *given: Any) -> None:
            told["input"] = given

        def bind_output(self, *given: Any) -> None:
            told["output"] = given

    class Fake:
        def __init__(self, model: bytes, options: Any, providers: Any) -> None:
            told["providers"] = providers
            told["fallback"] = options.get_session_config_entry("session.disable_cpu_ep_fallback")
            told["threads"] = options.intra_op_num_threads

        def get_inputs(self) -> Any:
            return [SimpleNamespace(name="x")]

        def get_outputs(self) -> Any:
            return [SimpleNamespace(name="y")]

        def io_binding(self) -> Binding:
            return Binding()

        def run_with_iobinding(self, binding: Binding, options: Any) -> None:
            told["waits"] = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"

    monkeypatch.setattr(onnxruntime(), "InferenceSession", Fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=4711 + device.index))
    session = runtime.Session(b"", torch.device("cuda", 1))
    x = torch.randn(2, 3, 4, 4)  # only where it lies is looked at
    session.bound({"x": x})()
    ((name, options),) = told["providers"]
    assert (name, options) == (
        "CUDAExecutionProvider", {"device_id": "1", "user_compute_stream": "4712", "use_tf32": "0"},
    )  # fmt: skip
    *where, number, shape, address = told["input"]
    assert (where, shape, address) == (["x", "cuda", 1], (2, 3, 4, 4), x.data_ptr())
    assert number == x.numpy().dtype
    assert told["output"] == ("y", "cuda", 1)
    assert (told["fallback"], told["waits"]) == ("1", False)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_said_before_anything_is_measured(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["profile", *LAYER, *MODES, "--out", "run.json"]) == 2
    assert f"{package} is not installed; pip install 'bgcbench[onnx]'" in capsys.readouterr().err
    assert not Path("run.json").exists()
