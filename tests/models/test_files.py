"""Files of weights as people have them: written here as the scripts of other people write them."""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import os
import pathlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bgcbench.errors import UsageError
from bgcbench.models import build_model
from bgcbench.specs import NetSpec
from tests.models.test_weights import WRN, Hostile, load_weights, refused, same, trained, written


def read(path: Path, source: nn.Module, key: str | None = None) -> tuple[str | None, tuple[str, ...]]:
    """Load ``path``, which must give back ``source``; what was taken, and the notes."""
    model = build_model(WRN)
    loaded = load_weights(model, WRN, str(path), key)
    assert same(model, source)
    return loaded.key, loaded.notes


def optimised(model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser that has made a step: its state dict has tensors of its own."""
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser.step()
    model.load_state_dict(before)
    return optimiser


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torchvisions_training_script_writes(tmp_path: Path, zipped: bool) -> None:
    # references/classification/train.py: with --model-ema there is an average, a module of a module.
    source, average = trained(WRN), trained(WRN)
    optimiser = optimised(source)
    ema = torch.optim.swa_utils.AveragedModel(average)
    checkpoint = {
        "model": source.state_dict(),
        "optimizer": optimiser.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimiser, 30).state_dict(),
        "epoch": 89,
        "args": argparse.Namespace(data_path="data", lr=0.1, opt="sgd", device="cuda", weights=None, output=Path(".")),
        "model_ema": ema.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
    }
    path = tmp_path / "model_89.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    key, (note,) = read(path, source)
    assert key == "model"
    assert note == ("model_89.pth has weights that fit under model, which are taken, and under model_ema.module: "
                    "--weights-key chooses")  # fmt: skip
    for asked in ("model_ema", "model_ema.module"):
        assert read(path, average, asked) == ("model_ema.module", ())


def test_what_timms_training_script_writes(tmp_path: Path) -> None:
    utils = pytest.importorskip("timm.utils")
    source, average = trained(WRN), trained(WRN)
    args = argparse.Namespace(model="wrn_10_1", opt="sgd", lr=0.05, mean=(0.5, 0.5, 0.5))
    saver = utils.CheckpointSaver(
        source,
        optimised(source),
        args=args,
        model_ema=types.SimpleNamespace(module=average, state_dict=average.state_dict),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=71.2)
    for name in ("last.pth.tar", "model_best.pth.tar"):
        key, (note,) = read(tmp_path / name, source)
        assert (key, "under state_dict_ema" in note) == ("state_dict", True)
        read(tmp_path / name, average, "state_dict_ema")


@contextmanager
def pretended(module: str, name: str) -> Iterator[Any]:
    """A class of a package that is not installed, while a file of it is written."""
    parts = module.split(".")
    modules = {".".join(parts[: n + 1]): types.ModuleType(".".join(parts[: n + 1])) for n in range(len(parts))}
    made = type(name, (dict,), {"__module__": module})
    setattr(modules[module], name, made)
    before = {key: sys.modules.get(key) for key in modules}
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for key, value in before.items():
            sys.modules.pop(key)
            if value is not None:
                sys.modules[key] = value


@pytest.mark.parametrize("attribute", ["model", "net"])
@pytest.mark.parametrize("module", ["lightning.fabric.utilities.data", "pytorch_lightning.utilities.parsing"])
def test_what_lightning_writes(tmp_path: Path, attribute: str, module: str) -> None:
    source = trained(WRN)
    whole = nn.ModuleDict({attribute: source, "criterion": nn.Linear(2, 2)})
    with pretended(module, "AttributeDict") as attributes:
        written(
            tmp_path / "epoch=3.ckpt",
            {
                "epoch": 3,
                "global_step": 90,
                "pytorch-lightning_version": "2.5.0",
                "state_dict": whole.state_dict(),
                "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"completed": 3}}}},
                "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "dirpath": Path("logs")}},
                "optimizer_states": [optimised(source).state_dict()],
                "lr_schedulers": [],
                "hparams_name": "kwargs",
                "hyper_parameters": attributes(lr=0.1, depth=10),
            },
        )
    key, (note,) = read(tmp_path / "epoch=3.ckpt", source)
    assert key == f"state_dict.{attribute}"
    assert note == "epoch=3.ckpt: criterion.weight, criterion.bias not of wrn_10_1, left out"


def test_what_fabric_and_stochastic_weight_averaging_write(tmp_path: Path) -> None:
    source = trained(WRN)
    fabric = {"_forward_module._orig_mod." + name: value for name, value in source.state_dict().items()}
    assert read(Path(written(tmp_path / "a.pt", {"model": fabric})), source)[1] == ()
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(source)).state_dict()
    assert "n_averaged" in averaged
    assert read(Path(written(tmp_path / "b.pt", averaged)), source) == ("module.module", ())


@pytest.mark.parametrize(
    "keys",
    [("net",), ("params",), ("weights",), ("model_state_dict",), ("network",), ("state", "model"), ("a", "b", "c"),
     ("teacher",)],
)  # fmt: skip
def test_weights_are_found_under_any_key_and_in_nested_dicts(tmp_path: Path, keys: tuple[str, ...]) -> None:
    source = trained(WRN)
    stored: Any = source.state_dict()
    for key in reversed(keys):
        stored = {"epoch": 3, key: stored}
    path = Path(written(tmp_path / "a.pt", stored))
    assert read(path, source) == (".".join(keys), ())
    assert read(path, source, ".".join(keys)) == (".".join(keys), ())


def test_plain_values_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    source = trained(WRN)
    stored = {
        "state_dict": source.state_dict(),
        "best_acc1": np.float64(93.1),
        "best_epoch": np.int64(3),
        "confusion": np.arange(6).reshape(2, 3),
        "rng": {"numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        "by_class": collections.defaultdict(list, {np.int64(3): [np.float32(1.5)]}),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "where": [pathlib.PurePosixPath("runs"), pathlib.PureWindowsPath("C:/runs"), Path("runs")],
        "args": argparse.Namespace(nested=argparse.Namespace(lr=np.float32(0.1)), dtype=torch.float16, path=Path(".")),
    }
    assert read(Path(written(tmp_path / "a.pt", stored)), source) == ("state_dict", ())


def test_nothing_of_those_values_is_imported_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, ran = trained(WRN), []
    written(tmp_path / "a.pt", {"model": source.state_dict(), "args": argparse.Namespace(lr=np.float32(0.1))})
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda self, **_: ran.append(self))
    before = set(torch.serialization.get_safe_globals())
    read(tmp_path / "a.pt", source)
    assert ran == []
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("what", ["beside", "within"])
def test_code_beside_weights_is_refused_and_not_run(tmp_path: Path, what: str) -> None:
    mark = tmp_path / "it ran"
    hostile: Any = Hostile(mark) if what == "beside" else argparse.Namespace(inside=[Hostile(mark)])
    path = written(tmp_path / "a.pt", {"model": trained(WRN).state_dict(), "args": hostile})
    refused(WRN, path, rf"a.pt holds pickled code \({os.mkdir.__module__}.mkdir\), which is not run")
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------- which, and prefixes


def test_of_several_that_fit_the_taken_one_is_said_and_another_can_be_chosen(tmp_path: Path) -> None:
    first, second, third = trained(WRN), trained(WRN), trained(WRN)
    path = Path(written(tmp_path / "a.pt", {"ema": second.state_dict(), "other": third.state_dict(),
                                            "model": first.state_dict()}))  # fmt: skip
    key, (note,) = read(path, first)
    assert (key, "and under ema and other: --weights-key chooses" in note) == ("model", True)
    assert read(path, second, "ema") == ("ema", ())
    assert read(path, third, "other") == ("other", ())
    model = build_model(WRN)
    with pytest.raises(UsageError, match=r"^--weights-key emma: .*a\.pt has no weights there; choose from model, ema"):
        load_weights(model, WRN, str(path), "emma")


def test_one_that_does_not_fit_is_passed_over_for_one_that_does(tmp_path: Path) -> None:
    source, other = trained(WRN), trained(NetSpec("wrn_10_2"))
    path = Path(written(tmp_path / "a.pt", {"model": other.state_dict(), "student": source.state_dict()}))
    assert read(path, source) == ("student", ())
    with pytest.raises(UsageError, match=r"a\.pt does not fit wrn_10_1 with 10 classes: stages.0.0.conv1.weight is "):
        load_weights(build_model(WRN), WRN, str(path), "model")


def test_a_prefix_that_explains_it_all_is_named_before_a_list_of_missing_keys(tmp_path: Path) -> None:
    source, other = trained(WRN), trained(WRN)
    state = {f"backbone.encoder.{name}": value for name, value in source.state_dict().items()}
    path = Path(written(tmp_path / "a.pt", {"state_dict": {**state, "head.weight": torch.zeros(3)}}))
    message = refused(WRN, str(path), "behind a prefix: take them with --weights-key state_dict.backbone.encoder$")
    assert "missing" not in message
    assert read(path, source, "state_dict.backbone.encoder") == ("state_dict.backbone.encoder", ())
    both = {**state, **{f"head.{name}": value for name, value in other.state_dict().items()}}
    path = Path(written(tmp_path / "b.pt", both))
    refused(WRN, str(path), "take them with --weights-key head or --weights-key backbone.encoder$")
    assert read(path, other, "head") == ("head", ())


def test_behind_a_prefix_the_keys_that_do_not_fit_are_the_networks_own(tmp_path: Path) -> None:
    state = trained(NetSpec("wrn_10_1", num_classes=7)).state_dict()
    path = written(tmp_path / "a.pt", {"state_dict": {f"model.{name}": value for name, value in state.items()}})
    message = refused(WRN, path, "a.pt does not fit wrn_10_1 with 10 classes: ")
    assert message.endswith("fc.weight is 7x64, not 10x64, fc.bias is 7, not 10; give the weights of this very network")


def test_a_network_whose_own_keys_begin_like_a_wrapper_keeps_them(tmp_path: Path) -> None:
    from bgcbench.models.files import fitting
    from bgcbench.models.files import read as contents_of

    torch.manual_seed(1)
    model = nn.Sequential(collections.OrderedDict(model=nn.Linear(2, 3), net=nn.Linear(3, 2)))
    path = Path(written(tmp_path / "a.pt", model.state_dict()))
    found = fitting(contents_of(path), model, WRN)
    assert (list(found.state), found.key, found.notes) == (list(model.state_dict()), "", ())


# --------------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_files_are_read(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    source = trained(WRN)
    path = tmp_path / "model.safetensors"
    library.save_file(source.state_dict(), path)
    assert read(path, source) == (None, ())
    library.save_file({f"module.{name}": value for name, value in source.state_dict().items()}, path)
    assert read(path, source) == ("module", ())
    path.write_bytes(path.read_bytes()[:-9])
    refused(WRN, str(path), r"model.safetensors is truncated, damaged or no safetensors file; copy it again, or give")


def test_without_safetensors_its_files_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    (tmp_path / "a.SafeTensors").write_bytes(b"")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"a\.SafeTensors needs safetensors to be read; pip install 'bgcbench\[safete"):
        load_weights(nn.Identity(), WRN, str(tmp_path / "a.SafeTensors"))
