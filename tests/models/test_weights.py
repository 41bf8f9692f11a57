"""Published and own weights: what comes out of a file is what was put in, and every bad file is one line."""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import shutil
import socket
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
import torchvision
from torch import nn

from bgcbench.errors import UsageError
from bgcbench.models import build_model
from bgcbench.models.files import CONTAINERS
from bgcbench.models.preprocessing import published
from bgcbench.models.weights import _HASH_IN_NAME, Loaded, Weights, _file_name, has_default
from bgcbench.specs import NetSpec

WRN = NetSpec("wrn_10_1")
SMALL = NetSpec("squeezenet1_1")  # of torchvision's networks the one with the fewest numbers

pytestmark = pytest.mark.usefixtures("downloads")


def trained(spec: NetSpec) -> nn.Module:
    """A network with numbers unlike those of a new one, the running statistics included."""
    model = build_model(spec)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value))
        else:
            value.fill_(7)
    return model


def load_weights(model: nn.Module, spec: NetSpec, weights: str, key: str | None = None) -> Loaded:
    return Weights(spec.name, weights, key).load_into(model, spec)


def written(path: Path, stored: Any) -> str:
    torch.save(stored, path)
    return str(path)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashed(path: Path, digits: int = 8) -> Path:
    """The file, renamed to what torch calls a file with its contents."""
    return path.rename(path.with_name(f"{path.stem}-{sha256(path)[:digits]}{path.suffix}"))


def refused(spec: NetSpec, weights: str, match: str) -> str:
    """The message, which must be one line and leave the network as it was."""
    model = trained(spec)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=match) as error:
        load_weights(model, spec, weights)
    message = str(error.value)
    assert "\n" not in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return message


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """Makes a file the published one of a network: its name gets the hash, and torchvision's address that name."""

    def made(path: Path, name: str, member: str = "IMAGENET1K_V1") -> Path:
        renamed = hashed(path)
        enum = torchvision.models.get_model_weights(name)[member]
        monkeypatch.setattr(enum.value, "url", f"https://download.pytorch.org/models/{renamed.name}")
        return renamed

    return made


def test_none_leaves_the_network_as_it_is() -> None:
    model, twin = trained(WRN), build_model(WRN)
    twin.load_state_dict(model.state_dict())
    assert load_weights(model, WRN, "none") == Loaded("none", None)
    assert same(model, twin)


@pytest.mark.parametrize("container", [None, *CONTAINERS])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_file_gives_back_the_network_it_was_made_from(tmp_path: Path, container: str | None, prefix: str) -> None:
    source = trained(WRN)
    state: Any = OrderedDict((prefix + key, value) for key, value in source.state_dict().items())
    path = tmp_path / "mine.pt"
    written(path, {"epoch": 3, container: state} if container else state)
    model = build_model(WRN)
    loaded = load_weights(model, WRN, str(path))
    assert (loaded.name, loaded.sha256, loaded.notes) == ("mine.pt", sha256(path)[:16], ())
    assert loaded.key == (".".join(filter(None, (container, prefix.rstrip(".")))) or None)
    assert same(model, source)


def test_what_data_parallelism_and_compilation_write_is_read(tmp_path: Path) -> None:
    source = trained(WRN)
    for wrapped in (nn.DataParallel(source), torch.compile(source), torch.compile(nn.DataParallel(source))):
        model = build_model(WRN)
        load_weights(model, WRN, written(tmp_path / "a.pt", wrapped.state_dict()))
        assert same(model, source)


def test_of_several_state_dicts_the_first_container_is_taken(tmp_path: Path) -> None:
    first, second, model = trained(WRN), trained(WRN), build_model(WRN)
    stored = {"ema": second.state_dict(), "model": first.state_dict(), "state_dict": "not a state dict"}
    load_weights(model, WRN, written(tmp_path / "a.pt", stored))
    assert same(model, first)
    assert not same(model, second)


def test_files_of_torch_before_1_6_are_read(tmp_path: Path) -> None:
    source, model = trained(WRN), build_model(WRN)
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, WRN, str(tmp_path / "old.pth"))
    assert same(model, source)


def test_files_from_before_norms_counted_their_batches_are_read(tmp_path: Path) -> None:
    source, model = trained(WRN), build_model(WRN)
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    load_weights(model, WRN, written(tmp_path / "a.pt", state))
    assert torch.equal(model.stem.weight, source.stem.weight)


@pytest.mark.parametrize("digits", [8, 10, 64])
def test_the_hash_in_a_files_name_is_checked(tmp_path: Path, digits: int) -> None:
    written(tmp_path / "net_0.5_top1.pth", trained(WRN).state_dict())
    path = hashed(tmp_path / "net_0.5_top1.pth", digits)
    have = sha256(path)[:digits]
    assert load_weights(build_model(WRN), WRN, str(path)).name == path.name
    other = path.rename(tmp_path / f"net-{'0' * digits}.pth")
    refused(WRN, str(other), f"is damaged or renamed: its SHA-256 begins with {have}, not with {'0' * digits} as in "
            "its name; copy it again, or rename it")  # fmt: skip
    without = other.rename(tmp_path / "net-0000000.pth")
    assert load_weights(build_model(WRN), WRN, str(without)).sha256 == sha256(without)[:16]


def test_every_published_file_has_its_hash_in_its_name() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    found = {name: published(name) for name in names if has_default(NetSpec(name))}
    assert {"resnet50", "mobilenet_v2", "efficientnet_b0", "mnasnet0_5", "googlenet"} <= found.keys()
    assert all(_HASH_IN_NAME.search(_file_name(weights)) for weights in found.values())
    # What the paper starts from, by the error that torchvision states (100 - 76.130 = 23.87 %).
    assert found["resnet50"].meta["_metrics"]["ImageNet-1K"]["acc@1"] == 76.130


@pytest.mark.parametrize(
    ("name", "has"),
    [("resnet50", True), ("vit_b_16", True), ("wrn_28_10", False), ("resnext29_8x64d", False),
     ("wide_resnet34_2", False), ("timm/resnet50", False), ("fcn_resnet50", False), ("no_such", False)],
)  # fmt: skip
def test_which_networks_have_published_weights(name: str, has: bool) -> None:
    assert has_default(NetSpec(name)) is has
    assert has_default(NetSpec(name, num_classes=7)) is has


def test_the_published_vision_transformer_takes_the_images_that_the_network_takes() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_h_14()
    assert published("vit_h_14").meta["num_params"] == sum(p.numel() for p in model.parameters())


def test_default_is_taken_from_torch_hubs_cache(downloads: Path, publish: Callable[..., Path]) -> None:
    source, model = trained(SMALL), build_model(SMALL)
    downloads.mkdir(parents=True)
    written(downloads / "squeezenet.pth", source.state_dict())
    path = publish(downloads / "squeezenet.pth", SMALL.name)
    assert load_weights(model, SMALL, "default") == Loaded("IMAGENET1K_V1", sha256(path)[:16])
    assert same(model, source)


def test_default_is_taken_from_where_set_dir_put_the_cache(
    tmp_path: Path, publish: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # restores what set_dir changes
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    written(tmp_path / "checkpoints" / "squeezenet.pth", trained(SMALL).state_dict())
    publish(tmp_path / "checkpoints" / "squeezenet.pth", SMALL.name)
    assert load_weights(build_model(SMALL), SMALL, "default").name == "IMAGENET1K_V1"


def test_resnet50_gets_the_first_weights_not_torchvisions_default() -> None:
    assert published("resnet50") is torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    assert torchvision.models.ResNet50_Weights.DEFAULT is not torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    assert published("mobilenet_v2") is torchvision.models.MobileNet_V2_Weights.DEFAULT


def test_default_is_downloaded_into_the_cache_where_it_is_missing(
    tmp_path: Path,
    downloads: Path,
    publish: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, model = trained(SMALL), build_model(SMALL)
    written(tmp_path / "squeezenet.pth", source.state_dict())
    server = publish(tmp_path / "squeezenet.pth", SMALL.name)
    asked: list[Any] = []

    def download(url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        asked.append((url, hash_prefix, progress, socket.getdefaulttimeout()))
        shutil.copy(server, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    loaded = load_weights(model, SMALL, "default")
    assert loaded == load_weights(model, SMALL, "default") == Loaded("IMAGENET1K_V1", sha256(server)[:16])
    assert same(model, source)
    assert asked == [(f"https://download.pytorch.org/models/{server.name}", sha256(server)[:8], False, 30.0)]
    assert socket.getdefaulttimeout() is None
    assert (downloads / server.name).exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (URLError(socket.gaierror(-3, "Temporary failure in name resolution")), "Temporary failure in name resolution"),
        (URLError("unknown url type: ftp"), "unknown url type: ftp"),
        (HTTPError("https://download.pytorch.org", 404, "Not Found", None, None), "HTTP Error 404: Not Found"),
        (TimeoutError("The read operation timed out"), "The read operation timed out"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (http.client.IncompleteRead(b"", 5), "IncompleteRead"),
        (RuntimeError('invalid hash value (expected "a", got "b")'), "invalid hash value"),
    ],
)
def test_a_failed_download_says_what_where_why_and_the_way_out(
    downloads: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, reason: str
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    message = refused(SMALL, "default", "^--weights default: squeezenet1_1-b8a52dc0.pth is not in ")
    assert f"{downloads} (TORCH_HOME moves this folder)" in message
    assert f"could not be downloaded from download.pytorch.org ({reason}" in message
    assert message.endswith("give a copy of it with --weights FILE, or --weights none for an untrained network")


def test_without_a_network_torch_hub_leaves_nothing_behind(downloads: Path) -> None:
    message = refused(SMALL, "default", "squeezenet1_1-b8a52dc0.pth is not in ")
    assert "(Temporary failure in name resolution)" in message
    assert list(downloads.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(downloads: Path) -> None:
    downloads.parent.parent.write_text("a file where the cache should be")
    assert f"is not in {downloads} " in refused(SMALL, "default", "Not a directory|File exists")


def test_a_damaged_file_in_the_cache_is_named(downloads: Path, publish: Callable[..., Path]) -> None:
    downloads.mkdir(parents=True)
    written(downloads / "squeezenet.pth", trained(SMALL).state_dict())
    path = publish(downloads / "squeezenet.pth", SMALL.name)
    path.write_bytes(path.read_bytes()[:1000])
    refused(SMALL, "default", f"{path} is damaged or renamed: .*; delete it, and it is downloaded again$")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (WRN, "there are no published weights of wrn_10_1; give --weights FILE, or --weights none"),
        (NetSpec("resnext29_2x4d"), "no published weights of resnext29_2x4d"),
        (NetSpec("timm/resnet18"), "is for torchvision's networks, and timm/resnet18 is timm's; give --weights FILE"),
        (NetSpec("squeezenet1_1", num_classes=10),
         "--classes 10 does not go with --weights default: the published weights of squeezenet1_1 have 1000 classes; "
         "leave --classes out, or give --weights FILE, or --weights none"),
    ],
)  # fmt: skip
def test_a_network_that_the_published_weights_are_not_for_is_refused(spec: NetSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_weights(nn.Identity(), spec, "default")


def test_a_densenets_old_keys_are_those_of_today(tmp_path: Path) -> None:
    def small() -> nn.Module:
        return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 1), num_init_features=8, num_classes=3)

    source, model = small(), small()
    state = {
        key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2."): value
        for key, value in source.state_dict().items()
    }  # fmt: skip
    assert "features.denseblock1.denselayer2.norm.1.weight" in state
    for stored in (state, source.state_dict()):
        load_weights(model, NetSpec("densenet121", num_classes=3), written(tmp_path / "a.pt", stored))
        assert same(model, source)


def test_googlenets_published_weights_bring_their_auxiliary_heads_and_their_scale_of_input(
    downloads: Path, tmp_path: Path, publish: Callable[..., Path]
) -> None:
    def new() -> nn.Module:  # build_torchvision's, without its slow numbers
        return torchvision.models.googlenet(init_weights=False)

    spec, model = NetSpec("googlenet"), new()
    downloads.mkdir(parents=True)
    written(downloads / "googlenet.pth", model.state_dict())
    own = shutil.copy(downloads / "googlenet.pth", tmp_path / "own.pth")
    path = publish(downloads / "googlenet.pth", "googlenet")
    # The same numbers, but whoever trained them may have had images on the usual scale.
    load_weights(model, spec, str(own))
    assert (model.aux_logits, model.transform_input) == (True, False)
    assert load_weights(model, spec, "default").name == "IMAGENET1K_V1"
    assert (model.aux_logits, model.transform_input) == (True, True)
    copied = new()
    assert load_weights(copied, spec, str(path)).name == path.name
    assert same(copied, model)
    assert copied.transform_input is torchvision.models.googlenet(weights="IMAGENET1K_V1").transform_input is True


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(WRN, str(tmp_path / "no.pth"), "no.pth: there is no such file; choose a file, none or default")
    refused(WRN, "defualt", r"--weights defualt: did you mean 'default'\? there is no such file")
    refused(WRN, "None", "--weights None: did you mean 'none'")
    refused(WRN, str(tmp_path), "is a folder; give a file in it")
    refused(WRN, "", "there is no such file")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = written(tmp_path / "a.pth", {})

    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", closed)
    refused(WRN, weights, r"a.pth cannot be read \(Permission denied\)")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, kept: float) -> None:
    path = tmp_path / "a.pth"
    torch.save(trained(WRN).state_dict(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refused(WRN, str(path), "a.pth is truncated, damaged or not a file that torch.save wrote; copy it again")


@pytest.mark.parametrize("text", ["hello world\n", "<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.pth").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(WRN, str(tmp_path / "a.pth"), "not a file that torch.save wrote")


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("how", ["zipped", "old", "bare"])
def test_code_in_a_file_is_not_run(tmp_path: Path, how: str) -> None:
    path, mark = tmp_path / "a.pth", tmp_path / "it ran"
    if how == "bare":
        path.write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    else:
        torch.save({"a": Hostile(mark)}, path, _use_new_zipfile_serialization=how == "zipped")
    message = refused(WRN, str(path), "holds pickled code|not a file that torch.save wrote")
    assert how == "bare" or "must hold tensors only; write it with torch.save(model.state_dict(), FILE)" in message
    assert not mark.exists()


def test_a_whole_pickled_network_is_refused_naming_its_class(tmp_path: Path) -> None:
    weights = written(tmp_path / "a.pth", nn.Linear(2, 2))
    refused(WRN, weights, r"a.pth holds pickled code \(torch.nn.modules.linear.Linear\), which is not run")


@pytest.mark.parametrize(
    "stored",
    [[1, 2], torch.zeros(3), {}, {"epoch": 3}, {"state_dict": {"a": 1}}, {0: torch.zeros(1)}, {"model": {}},
     {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}}}],
)  # fmt: skip
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, stored: Any) -> None:
    refused(WRN, written(tmp_path / "a.pt", stored), "a.pt holds no state dict, neither as it is nor in the dicts in "
            r"it; write it with torch.save\(model.state_dict")  # fmt: skip


def test_weights_that_do_not_fit_name_three_keys_and_count_the_others(tmp_path: Path) -> None:
    weights = written(tmp_path / "a.pt", trained(NetSpec("wrn_10_1", num_classes=7)).state_dict())
    message = refused(WRN, weights, "a.pt does not fit wrn_10_1 with 10 classes: ")
    assert message.endswith(
        "classes: fc.weight is 7x64, not 10x64, fc.bias is 7, not 10; give the weights of this very network"
    )
    state = trained(WRN).state_dict()
    state["extra"] = state.pop("fc.bias")
    message = refused(WRN, written(tmp_path / "b.pt", state), "does not fit")
    assert message.endswith("classes: fc.bias is missing, extra is unexpected; give the weights of this very network")
    message = refused(WRN, written(tmp_path / "c.pt", {"a": torch.zeros(1), "fc.bias": torch.zeros(())}), "fit")
    # Counts of batches that norms have seen start anew where a file is too old to have them; "a" is the one more.
    expected = 1 + sum(not key.endswith("num_batches_tracked") for key in build_model(WRN).state_dict())
    assert "fc.bias is one number, not 10, stem.weight is missing, stages.0.0.bn1.weight is missing and " in message
    assert f" and {expected - 3} more; give" in message


def test_what_a_network_itself_refuses_is_one_line(tmp_path: Path) -> None:
    # MNASNet wants to know the version of its format, which only a state dict as torch makes it carries.
    spec = NetSpec("mnasnet0_5", num_classes=3)
    source = trained(spec)
    refused(spec, written(tmp_path / "a.pt", dict(source.state_dict())), r"a.pt does not fit mnasnet0_5 \(version sh")
    model = build_model(spec)
    for stored in (source.state_dict(), nn.DataParallel(source).state_dict()):
        load_weights(model, spec, written(tmp_path / "b.pt", stored))
        assert same(model, source)
