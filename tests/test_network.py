"""``profile --model``: its plan, its counts, real runs of a small network on the CPU, and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bgcbench import results
from bgcbench.cli import main
from bgcbench.convs.gc import GroupConv2d
from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.experiments.images import sized
from bgcbench.experiments.network_run import NetworkSubject, distinct_convolutions, plan_network
from bgcbench.experiments.profile import NetworkConfig, check_same_workload
from bgcbench.experiments.profile_run import ProfileRun, open_session, subjects_of
from bgcbench.measure import environment
from bgcbench.measure.trace import trace
from bgcbench.measure.workload import NetworkWorkload
from bgcbench.models import build_empty, build_model
from bgcbench.report import as_markdown
from bgcbench.results.times import is_doubtful
from bgcbench.specs import VARIANTS
from tests.example import _phase
from tests.reporting import report_of, typed
from tests.stored import stored

SMALL = NetworkConfig(model="wrn_10_1", batch=2, height=16, groups=(2, 4), device="cpu", max_time_s=0.01)


pytestmark = pytest.mark.usefixtures("brisk", "one_thread", "tried_once")


def run(config: NetworkConfig, **options: Any) -> ProfileRun:
    planned = plan_network(config)
    done = ProfileRun(config, open_session(config), planned.rows, **options)
    assert list(done.run())
    return done


class TestPlan:
    def test_defaults_are_the_networks_own(self) -> None:
        config = NetworkConfig(model="wrn_28_10")
        assert (config.height, config.width, config.num_classes, config.batch) == (32, 32, 10, 32)
        assert config.phases == ("fwd", "train_step")
        assert NetworkConfig(model="efficientnet_b0").stem_stride == 2
        assert NetworkConfig(model="efficientnet_b0", height=32).stem_stride == 1
        assert NetworkConfig.from_json(config.to_json()) == config

    @pytest.mark.parametrize(
        ("model", "side"),
        [("resnet50", 224), ("inception_v3", 299), ("efficientnet_b1", 240), ("swin_v2_t", 256),
         ("timm/test_resnet", 160), ("timm/coat_lite_medium_384", 384)],
    )  # fmt: skip
    def test_a_network_is_measured_on_images_of_the_size_that_it_is_made_for(self, model: str, side: int) -> None:
        if model.startswith("timm"):
            pytest.importorskip("timm")
        config = sized(NetworkConfig(model=model, device="cpu"))
        assert (config.height, config.width, config.spec.size) == (side, side, (3, side, side))
        assert trace(build_empty(config.spec), config.spec.size).macs > 0
        assert sized(replace(config, height=320, width=352)).spec.size == (3, 320, 352)

    def test_the_plan_has_that_size_and_its_file_says_so(self) -> None:
        planned = plan_network(NetworkConfig(model="inception_v3", variants=("gc",), groups=(2,), skip_invalid=True))
        assert {(row.params.height, row.params.width) for row in planned.rows} == {(299, 299)}
        assert planned.config.to_json()["height"] == 299
        assert {subject.input_shape for subject in subjects_of(planned.rows).values()} == {(32, 3, 299, 299)}

    def test_a_size_that_a_network_does_not_take_is_refused_with_its_own(self) -> None:
        with pytest.raises(
            UsageError, match=r"^inception_v3 takes no images of 32x32 px \(.*\); its own --size is 299x"
        ):
            plan_network(NetworkConfig(model="inception_v3", height=32, skip_invalid=True))

    def test_the_rows_are_the_dense_network_and_each_variant_by_n(self) -> None:
        rows = plan_network(replace(SMALL, variants=("gc", "flgc", "bgc"))).rows
        assert [(r.params.variant, r.params.groups, r.params.algorithm) for r in rows] == [
            ("standard", 1, "stock"),
            ("gc", 2, "stock"), ("flgc", 2, "masked"), ("flgc", 2, "deployed"), ("bgc", 2, "auto"),
            ("gc", 4, "stock"), ("flgc", 4, "masked"), ("flgc", 4, "deployed"), ("bgc", 4, "auto"),
        ]  # fmt: skip
        assert len({row.key for row in rows}) == len(rows)
        assert set(rows[0].params.to_json()) == {"model", "variant", "groups", "where", "batch", "height", "width",
                                                 "precision", "layout", "mode", "algorithm"}  # fmt: skip

    def test_efficientnet_b0_at_n_16_is_refused_and_with_skip_invalid_says_what_stays_dense(self) -> None:
        config = NetworkConfig(model="efficientnet_b0", groups=(8, 16), device="cpu")
        with pytest.raises(ShapeError, match="groups=16 does not divide the channels of 8 convolutions") as refused:
            plan_network(replace(config, groups=(16,)))
        assert str(refused.value).count(" -> ") == 8  # once, not for each variant
        assert "N that fits all: 2, 4, 8; " in str(refused.value)
        assert "use --skip-invalid" in str(refused.value)
        planned = plan_network(replace(config, skip_invalid=True, variants=("bgc",)))
        dense = {
            (subject.record.variant, subject.record.groups): sum(k.code == "indivisible" for k in subject.record.kept)
            for subject in subjects_of(planned.rows).values()
            if isinstance(subject, NetworkSubject) and subject.record is not None
        }
        assert dense == {("bgc", 8): 0, ("bgc", 16): 8}

    def test_a_rank_is_that_of_every_layer_or_leaves_one_dense(self) -> None:
        config = replace(SMALL, variants=("lowrank",), groups=(2,), ranks=(8, 20))
        refused = r"^rank=20 is too high for the channels of 2 convolutions: stages.0.0.conv1 \(16 -> 16\), .*; drop .*"
        with pytest.raises(ShapeError, match=refused):
            plan_network(config)
        planned = plan_network(replace(config, skip_invalid=True, layers=True))
        rows = {row.key.removesuffix("-b2-16x16-fp32-nchw-eager"): row for row in planned.rows}
        assert len(rows) == len(planned.rows)
        networks = [rows[f"wrn_10_1-lowrank-{what}-auto"] for what in ("n2", "r8", "r20")]
        assert [row.params.choice.label for row in networks] == ["LR N=2", "LR r=8", "LR r=20"]
        assert [row.params.cell for row in networks] == [("lowrank", 2, None), ("lowrank", 1, 8), ("lowrank", 1, 20)]
        assert [len(row.row.convert.indivisible) for row in networks] == [0, 0, 2]
        assert {layer.rank for layer in networks[1].row.convert.layers} == {8}
        own = [rows[f"wrn_10_1-layer1-lowrank-{what}"] for what in ("n2", "r8", "r20")]
        assert [(row.params.groups, row.params.rank, bool(row.invalid)) for row in own] == [
            (2, None, False), (1, 8, False), (1, 20, True),
        ]  # fmt: skip
        document = typed(network_document())
        text = as_markdown(report_of(msgspec.structs.replace(document, results=tuple(r.row for r in planned.rows))))
        assert "| LR | 2 | - | 6 |" in text
        assert "| LR | - | 20 | 4 |" in text
        assert "LR r=20: the rank is too high, kept dense: stages.0.0.conv1, stages.0.0.conv2" in text

    @pytest.mark.parametrize(
        ("wrong", "error", "message"),
        [
            ({"model": "wrn_11_1"}, ShapeError, "not 11"),
            ({"model": "resnet49"}, UsageError, "did you mean 'resnet"),
            ({"phases": ("fwd_bwd",)}, UsageError, "choose from fwd, train_step"),
            ({"where": "5x5"}, UsageError, "unknown where"),
            ({"include": ("nothing*",)}, UsageError, "no convolution of the network"),
            ({"input_grad": False}, UsageError, "--no-input-grad"),
            ({"stem_stride": 1}, UsageError, "--stem-stride"),
            ({"groups": (3,)}, ShapeError, "--skip-invalid"),
            ({"reference": False, "variants": ("standard",)}, UsageError, "nothing to measure"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, wrong: dict[str, Any], error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            plan_network(replace(SMALL, **wrong))

    def test_another_network_does_not_continue_a_file_and_a_larger_grid_or_its_layers_do(self) -> None:
        stored = SMALL.to_json()
        check_same_workload(stored, replace(SMALL, groups=(2, 4, 8), layers=True), "r.json")
        for change in ({"model": "wrn_16_1"}, {"where": "all"}, {"exclude": ("stem",)}, {"batch": 4}):
            with pytest.raises(ResultFileError, match="cannot be resumed"):
                check_same_workload(stored, replace(SMALL, **change), "r.json")


class TestCounts:
    @pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "standard"])
    def test_parameters_and_macs_equal_those_of_the_network_that_is_measured(self, variant: str) -> None:
        # The form whose operations the formula counts; the fastest one may do more of them.
        config = replace(
            SMALL, variants=(variant,), groups=(4,), algorithm="two_conv" if variant in ("bgc", "lowrank") else "auto"
        )
        session = open_session(config)
        for row in plan_network(config).rows[1:]:
            subject = subjects_of(plan_network(config).rows)[row.key]
            assert isinstance(subject, NetworkSubject)
            model = subject.module(session).eval()
            stored = sum(p.numel() for p in model.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.randn(1, *config.spec.size))
            executed = counter.get_total_flops() // 2
            masked = row.params.algorithm == "masked"
            if masked and variant == "flgc":  # t s^T, once a call for each layer
                layers = [m for m in model.modules() if getattr(m, "variant", "") == "flgc"]
                executed -= sum(m.out_channels * m.in_channels * m.groups for m in layers)
            counts = subject.counts
            assert stored == (counts.params_training if masked else counts.params)
            assert executed == (counts.macs_training if masked else counts.macs)
            # BGC's mean: one addition for each input value of each replaced convolution.
            replaced = [call for call in trace(model, config.spec.size).convs if call.module in
                        {layer.name for layer in subject.record.layers}]  # fmt: skip
            assert counts.adds == (sum(call.values_in for call in replaced) if variant == "bgc" else 0)

    def test_work_of_a_training_step_is_three_passes(self) -> None:
        subject = subjects_of(plan_network(SMALL).rows)["wrn_10_1-standard-n1-auto-b2-16x16-fp32-nchw-eager"]
        macs = trace(build_model("wrn_10_1"), (3, 16, 16)).macs
        assert subject.work("fwd").flops == 2 * macs * 2
        assert subject.work("train_step").flops == 3 * subject.work("fwd").flops

    def test_distinct_convolutions_cover_every_call_once(self) -> None:
        found = trace(build_model("wrn_16_1"), (3, 32, 32))
        shapes = [shape for _, shape in distinct_convolutions(found, {"stages.0.0.conv1"})]
        assert sum(shape.count for shape in shapes) == len(found.convs)
        assert sorted(name for shape in shapes for name in shape.names) == sorted(c.module for c in found.convs)
        (same,) = [shape for shape in shapes if "stages.0.0.conv1" in shape.names]
        assert same.names == ("stages.0.0.conv1", "stages.0.0.conv2", "stages.0.1.conv1", "stages.0.1.conv2")
        assert same.label == "16 -> 16 3x3 at 32x32"
        assert same.replaced


class TestTrainStep:
    def test_it_computes_the_gradients_of_cross_entropy_and_leaves_the_weights(self) -> None:
        model = build_model("wrn_10_1")
        x, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
        before = [p.detach().clone() for p in model.parameters()]
        work = NetworkWorkload(model, x, labels=labels)
        cell = work.cell("train_step")
        cell.once()
        assert model.training
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        assert all("momentum_buffer" in state for state in work.optimiser.state.values())
        cell.release()
        assert all(p.grad is None for p in model.parameters())

    def test_inference_is_in_eval_mode_without_a_graph(self) -> None:
        model = build_model("wrn_10_1")
        work = NetworkWorkload(model, torch.randn(2, 3, 16, 16), labels=torch.zeros(2, dtype=torch.int64))
        modes = []
        model.register_forward_hook(lambda module, _, y: modes.append((module.training, y.is_inference())))
        work.cell("fwd").once()
        assert modes == [(False, True)]

    def test_auxiliary_heads_are_trained_with_the_network(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
                return self.a(x), None, self.b(x)

        model = Two()
        NetworkWorkload(model, torch.randn(4, 3), labels=torch.tensor([0, 1, 0, 1])).cell("train_step").once()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    def test_an_unknown_phase_is_refused(self) -> None:
        with pytest.raises(UsageError, match="unknown phase 'bwd'"):
            NetworkWorkload(nn.Linear(3, 2), torch.randn(1, 3), labels=torch.zeros(1)).cell("bwd")


class TestRun:
    def test_every_variant_is_measured_interleaved_with_the_dense_network(self) -> None:
        done = run(replace(SMALL, variants=tuple(VARIANTS), groups=(4,)))
        assert [(row.status, row.reason) for row in done.results] == [("ok", None)] * 10
        assert {row.interleaved for row in done.results} == {1}
        dense = done.results[0]
        assert dense.convert is None
        for row in done.results:
            assert set(row.phases) == {"fwd", "train_step"}
            for measured in row.phases.values():
                assert measured.derived.images_per_s == pytest.approx(2 / measured.summary.median_s)
            if row is not dense:
                assert list(row.convert.replaced) == [f"stages.{s}.0.conv{c}" for s in range(3) for c in (1, 2)]
                assert {kept.name for kept in row.convert.kept} >= {"stem", "stages.1.0.shortcut"}

    def test_what_is_not_replaced_has_the_same_weights_in_every_row(self) -> None:
        planned, session = plan_network(SMALL), open_session(SMALL)
        models = [subject.module(session) for subject in subjects_of(planned.rows).values()]
        assert all(torch.equal(model.stem.weight, models[0].stem.weight) for model in models)
        assert all(torch.equal(model.fc.weight, models[0].fc.weight) for model in models)

    def test_layers_are_measured_each_beside_its_variants(self) -> None:
        done = run(replace(SMALL, layers=True, groups=(4,), phases=("fwd",)))
        layers = [row for row in done.results if row.layer is not None]
        assert {row.status for row in layers} == {"ok"}
        groups: dict[int, set[str]] = {}
        for row in layers:
            groups.setdefault(row.interleaved, set()).add(row.params.variant)
        replaced = [found for found in groups.values() if len(found) > 1]
        assert replaced == [{"standard", "gc", "bgc"}] * 5
        kept = [row.layer.label for row in layers if not row.layer.replaced]
        assert "3 -> 16 3x3 at 16x16" in kept
        assert sum(row.layer.count for row in layers if row.params.variant == "standard") == 9

        dense, own = done.results[0], layers[0]
        often = msgspec.structs.replace(own, layer=msgspec.structs.replace(own.layer, count=10**6))
        assert is_doubtful(often, "fwd", own, dense)  # all of a shape, longer than the network
        assert not is_doubtful(often, "fwd", own)

    def test_a_network_that_fails_is_a_row_and_the_others_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: GroupConv2d, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("it broke")

        planned = plan_network(SMALL)
        monkeypatch.setattr(GroupConv2d, "forward", broken)
        done = ProfileRun(SMALL, open_session(SMALL), planned.rows)
        assert list(done.run())
        assert [(row.params.variant, row.status) for row in done.results] == [
            ("standard", "ok"), ("gc", "error"), ("bgc", "ok"), ("gc", "error"), ("bgc", "ok")]  # fmt: skip

    def test_a_training_step_that_fails_leaves_inference_and_says_the_way_out(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # At 32 px the last batch norms see one position: with one image that is one value a channel.
        arguments = ["profile", "--model", "shufflenet_v2_x0_5", "--size", "32", "--where", "1x1", "--groups", "2",
                     "--variants", "gc", "--device", "cpu", "--quick", "--max-time", "0.01",
                     "--phases", "fwd,train_step", "--out", str(tmp_path / "r.json")]  # fmt: skip
        assert main([*arguments, "--batch", "1"]) == 1
        printed = capsys.readouterr().out
        found = stored(tmp_path / "r.json")
        for row in found["results"]:
            assert (row["status"], set(row["phases"]), set(row["failures"])) == ("error", {"fwd"}, {"train_step"})
            assert row["phases"]["fwd"]["samples_s"]
            assert row["memory"]["peak_bytes"] is not None
            failure = row["failures"]["train_step"]
            assert (failure["status"], row["reason"]) == ("error", f"train_step: {failure['reason']}")
            assert failure["reason"].startswith("ValueError: Expected more than 1 value per channel when training")
            assert failure["reason"].endswith("use a larger --batch (batch norm needs more than one value a channel), "
                                              "or leave it out with --phases fwd")  # fmt: skip
        table = [line for line in printed.partition("All columns")[2].splitlines() if line.startswith("| ")][2:]
        assert table
        assert all(line.endswith("| train step error |") for line in table)
        assert "GC N=2 is " in printed
        assert "[error]" not in printed
        assert "Verdict (train step)" not in printed
        assert main([*arguments, "--batch", "2", "--no-reference", "--force", "--quiet"]) == 0
        assert all("failures" not in row for row in stored(tmp_path / "r.json")["results"])

    @pytest.mark.parametrize("begins", ["in the first look", "in a round"])
    def test_a_phase_fails_by_itself_whenever_it_does(self, begins: str, monkeypatch: pytest.MonkeyPatch) -> None:
        flag, step = {"up": begins == "in the first look"}, NetworkWorkload._step

        def brittle(self: NetworkWorkload) -> None:
            if flag["up"] and any(isinstance(module, GroupConv2d) for module in self.plain.modules()):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            step(self)

        monkeypatch.setattr(NetworkWorkload, "_step", brittle)
        config = replace(SMALL, groups=(2,), variants=("gc",))
        planned = plan_network(config)
        done = ProfileRun(config, open_session(config), planned.rows)
        for update in done.run():
            flag["up"] |= update.progress is not None and update.progress.round == 2
        dense, gc = done.results
        assert (dense.status, set(dense.phases), dense.failures) == ("ok", {"fwd", "train_step"}, {})
        assert (gc.status, set(gc.failures)) == ("oom", {"train_step"})
        assert gc.reason.startswith("train_step: out of memory: ")
        assert set(gc.phases["fwd"].rounds) == set(dense.phases["fwd"].rounds)
        assert ("train_step" in gc.phases) is (begins == "in a round")  # what there is of it stays

    def test_what_does_not_fit_into_memory_leaves_what_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = replace(SMALL, groups=(2,), variants=("gc",))
        needed = next(iter(subjects_of(plan_network(config).rows).values())).needed_bytes
        monkeypatch.setattr(environment, "available_bytes", lambda device: needed("train_step") - 1)
        dense, gc = run(config).results
        assert needed("fwd") < needed("train_step")
        assert (dense.status, set(dense.phases), set(dense.failures)) == ("oom", {"fwd"}, {"train_step"})
        assert (gc.status, set(gc.phases)) == ("ok", {"fwd", "train_step"})

    @pytest.mark.parametrize(("precision", "layout"), [("bf16", "nhwc"), ("fp64", "nchw")])
    def test_precision_and_layout_are_those_asked_for(self, precision: str, layout: str) -> None:
        config = replace(SMALL, precision=precision, layout=layout, groups=(2,), quick=True)
        model = next(iter(subjects_of(plan_network(config).rows).values())).module(open_session(config))
        weight = model.stem.weight
        assert weight.dtype == {"bf16": torch.bfloat16, "fp64": torch.float64}[precision]
        assert weight.is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
        assert {row.status for row in run(config).results} == {"ok"}


QUICK = ["profile", "--model", "wrn_10_1", "--size", "16", "--batch", "2", "--groups", "2", "--device", "cpu",
         "--quick", "--max-time", "0.01", "--phases", "fwd,train_step"]  # fmt: skip


class TestCommand:
    def test_a_run_prints_names_the_best_and_writes_a_valid_file(self, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        assert main([*QUICK, "--layers"]) == 0
        out = capsys.readouterr().out
        (path,) = (tmp_path / "results").iterdir()
        assert path.name.startswith("profile-wrn_10_1-fp32-nchw-cpu-")
        document = stored(path)
        jsonschema.validate(document, results.schema())
        assert document["complete"]
        for heading in ("Verdict (fwd):", "Verdict (train step):", "Best:", "Convolutions by themselves", "Notes:"):
            assert heading in out
        assert "| dense | 1 |" in out
        assert "| 16 -> 16 3x3 at 16x16 | 2 |" in out  # both of the first stage
        main(["show", str(path)])
        assert capsys.readouterr().out == out

    def test_a_file_is_continued_with_more_groups_and_with_layers(self, tmp_path: Path, capsys) -> None:
        path = tmp_path / "net.json"
        assert main([*QUICK, "--out", str(path)]) == 0
        before = stored(path)["results"]
        assert main(["profile", "--resume", str(path), "--groups", "4"]) == 0
        after = stored(path)
        assert after["results"][:3] == before
        assert [row["params"]["groups"] for row in after["results"]] == [1, 2, 2, 4, 4]
        assert main(["profile", "--resume", str(path), "--model", "wrn_16_1"]) == 2
        assert "its model is wrn_10_1 and wrn_16_1 is asked for" in capsys.readouterr().err
        assert main(["profile", "--resume", str(path), "--channels", "8"]) == 2
        assert "--channels has no meaning for what" in capsys.readouterr().err

    def test_a_dry_run_measures_and_writes_nothing(self, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        assert main([*QUICK, "--dry-run", "--layers"]) == 0
        assert "wrn_10_1-layer0-standard-n1" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "resnet50", "--channels", "8"], "--channels describes a layer, and --model a network"),
            (["--model", "resnet50", "--kernel", "3"], "--kernel describes a layer"),
            (["--model", "resnet50", "--no-input-grad"], "--no-input-grad is for one layer"),
            (["--where", "all"], "--where is for a network; name it with --model"),
            (["--layers"], "--layers is for a network"),
            (["--classes", "3"], "--classes is for a network"),
            (["--model", "wrn_29_1"], "not 29; next to it are 28 and 34"),
            (["--model", "resnet50", "--preset", "table4"], "--preset"),
            (["--model", "resnet50", "--phases", "bwd"], "choose from fwd, train_step"),
        ],
    )
    def test_a_mistake_is_one_clear_line(self, arguments: list[str], message: str, capsys) -> None:
        assert main(["profile", *arguments]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert message in err

    def test_table_1_is_not_for_a_network(self, tmp_path: Path, capsys) -> None:
        path = tmp_path / "net.json"
        path.write_text(json.dumps(network_document()))
        assert main(["show", str(path), "--table1"]) == 2
        assert "measured a network" in capsys.readouterr().err


# Seconds: fwd, train_step by row; the layers' own, and in parts of it their variants'.
TIMES = {"standard-1": (0.100, 0.300), "gc-2": (0.080, 0.200), "bgc-2": (0.1, 0.29), "gc-4": (0.0799, 0.15),
         "bgc-4": (0.12, 0.25), "flgc-4": (0.1, 0.4)}  # fmt: skip


def network_document(**options: Any) -> dict[str, Any]:
    """A document of wrn_10_1 with made-up, fixed times."""
    config = replace(SMALL, **options)
    planned = plan_network(config)
    rows = []
    for seed, each in enumerate(planned.rows):
        params, row = each.params, each.row.to_json()
        names = ("fwd", "train_step") if params.layer is None else ("fwd", "fwd_bwd")
        scale = 1.0 if params.layer is None else 0.1
        times = zip(names, TIMES[f"{params.variant}-{params.groups}"], strict=True)
        peak = {"baseline_bytes": 1, "peak_bytes": 2**20, "peak_delta_bytes": 2**20, "method": "rss_sampled"}
        rows.append(row | {
            "status": "ok",
            "reason": None,
            "memory": row["memory"] | peak,
            "phases": {name: _phase(scale * time, 10 * seed + i) for i, (name, time) in enumerate(times)},
            "interleaved": 1 if params.layer is None else 2 + params.layer,
        })  # fmt: skip
    from tests.example import example_document

    document = example_document()
    document |= {"config": config.to_json(), "results": rows, "warnings": planned.notes}
    return document


class TestReport:
    def test_the_best_row_is_named_in_each_phase_and_doubt_is_said(self) -> None:
        document = network_document()
        jsonschema.validate(document, results.schema())
        text = as_markdown(report_of(document))
        assert "- fwd: GC N=2, 1.25x faster than the dense network" in text
        assert "GC N=4 is not significantly slower" in text  # 80.0 and 79.9 ms with 1 % of noise
        assert "- train step: GC N=4, 2.00x faster than the dense network" in text
        assert "next is GC N=2" in text
        assert "BGC N=4 is 1.21x slower than the dense network" in text

    def test_where_nothing_is_faster_it_says_so(self) -> None:
        document = network_document()
        for row in document["results"][1:]:
            row["phases"]["fwd"] = _phase(0.2, 5)
        assert "- fwd: none is significantly faster than the dense network" in as_markdown(report_of(document))

    def test_images_a_second_parameters_and_replacements_are_in_the_table(self) -> None:
        lines = as_markdown(report_of(network_document())).splitlines()
        header = next(line for line in lines if line.startswith("| network"))
        dense = next(line for line in lines if line.startswith("| dense"))
        gc = next(line for line in lines if line.startswith("| GC | 4"))
        column = [cell.strip() for cell in header.split("|")].index("fwd images/s")
        assert float(dense.split("|")[column]) == pytest.approx(1280, rel=0.01)  # the example's 128 images in 0.1 s
        assert gc.split("|")[3].strip() == "6"

    def test_layers_are_listed_by_their_share_with_the_fastest_variant(self) -> None:
        text = as_markdown(report_of(network_document(layers=True)))
        table = [line for line in text.splitlines() if line.startswith("| ") and " at " in line]
        # Every shape takes 10 ms of the network's 100; the first stage's is there twice.
        assert len(table) == 8
        assert table[0].startswith("| 16 -> 16 3x3 at 16x16 | 2 |")
        assert "| 20." in table[0] or "| 19." in table[0]
        assert sum("GC N=4 2.0" in line or "GC N=4 1.9" in line for line in table) == 5  # fwd+bwd 15 against 30 ms
        assert "| kept |" in next(line for line in table if line.startswith("| 3 -> 16"))
        assert "GC N=4 is faster in 5 of 5 replaced shapes, saving 90" in text  # 6 calls, 15 ms each
        assert "BGC N=2 is faster in 0 of 5 replaced shapes" in text

    def test_masked_rows_show_what_trains_and_deployed_ones_what_runs(self) -> None:
        text = as_markdown(report_of(network_document(variants=("flgc",), groups=(4,))))
        rows = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in text.splitlines() if "FLGC" in line
                and line.startswith("|")}  # fmt: skip
        dense = sum(p.numel() for p in build_model("wrn_10_1").parameters())
        assert float(rows["FLGC masked"].removesuffix(" k")) * 1e3 > dense  # and its assignments
        assert float(rows["FLGC deployed"].removesuffix(" k")) * 1e3 < dense

    def test_rows_with_convolutions_kept_dense_are_flagged(self) -> None:
        document = network_document()
        document["results"][1]["convert"]["kept"].append(
            {"name": "stages.0.0.conv1", "reason": "N=2 does not divide 3 -> 5 channels", "code": "indivisible"}
        )
        text = as_markdown(report_of(document))
        assert "1 kept dense" in text
        assert "GC N=2: N does not divide, kept dense: stages.0.0.conv1" in text
