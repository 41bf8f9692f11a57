"""The numbers in a network: torchvision's published weights, or those of a file."""

from __future__ import annotations

import copy
import difflib
import hashlib
import http.client
import os
import re
import socket
import urllib.error
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from bgcbench.errors import UsageError
from bgcbench.specs import TIMM_PREFIX, WEIGHTS, NetSpec

CONTAINERS = ("state_dict", "model", "model_state", "ema")  # where training scripts keep it; the first found is taken
PREFIXES = ("module.", "_orig_mod.")  # which data parallelism and torch.compile put before every key

# Not the enum's DEFAULT: the balanced-group paper starts from 23.87 % error, which V1 has; this vit_h_14 takes 224 px.
_CHOSEN = {"resnet50": "IMAGENET1K_V1", "vit_h_14": "IMAGENET1K_SWAG_LINEAR_V1"}
# torchvision switches these networks' input to the other scale that their published weights were trained with.
_OTHER_INPUT = ("googlenet", "inception_v3")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
# DenseNet's published files are older than the rule that a module's name has no dot.
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")
_TIMEOUT_S = 30.0
_NAMED = 3  # keys that a message names


@dataclass(frozen=True)
class Loaded:
    """Where a network's numbers come from.

    name: 'none' (as it was initialised), torchvision's name such as 'IMAGENET1K_V1', or the file's name without its
    folder. sha256: the first 16 hexadecimal digits of the file's; None without a file. size_px: the side of the images
    that published weights are evaluated on, where torchvision says it.
    """

    name: str
    sha256: str | None
    size_px: int | None = None


def has_default(spec: NetSpec) -> bool:
    """Whether torchvision publishes weights of this network, whatever its num_classes."""
    return _published(spec.name) is not None


def load_weights(model: nn.Module, spec: NetSpec, weights: str) -> Loaded:
    """Put ``weights`` into ``model``, the network that ``spec`` describes, and say what they were.

    weights:
        'none'     the network stays as it is
        'default'  torchvision's published weights (for resnet50 IMAGENET1K_V1, otherwise its DEFAULT where the network
                   can take it), from torch.hub's cache or else downloaded into it
        a path     of a file that torch.save wrote: a state dict, or a dict that has one under one of CONTAINERS. It is
                   read without running any code that is in it; the keys' PREFIXES are taken off

    A file named as torch names them (NAME-HASH.pth) must have that SHA-256. GoogLeNet and Inception v3 with their
    published weights, by either way, scale their input as these expect (transform_input).

    Raises UsageError for weights that are not there, cannot be read or do not fit exactly; ``model`` is then unchanged.
    """
    if weights == "none":
        return Loaded("none", None)
    published = _published(spec.name)
    if weights == "default":
        _check_published(spec, published)
        path, name, again = _fetched(published), published.name, "delete it, and it is downloaded again"
    else:
        path = _existing(weights)
        name, again = path.name, "copy it again, or rename it if these digits are no hash"
    digest = _checked_digest(path, again)
    state = _state_dict(path)
    if spec.name.startswith("densenet"):
        state = _renamed(state)
    _check_fit(model, spec, state, path)
    model.load_state_dict(state)
    if spec.name in _OTHER_INPUT and published is not None and path.name == _file_name(published):
        model.transform_input = True  # type: ignore[assignment]
    size = published.transforms().crop_size[0] if weights == "default" else None
    return Loaded(name, digest[:16], size)


def _published(name: str) -> Any:
    """torchvision's enum member with the weights to use for the network ``name``; None where there are none."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    return getattr(torchvision.models.get_model_weights(name), _CHOSEN.get(name, "DEFAULT"), None)


def _file_name(published: Any) -> str:
    return Path(urllib.parse.urlparse(published.url).path).name


def _check_published(spec: NetSpec, published: Any) -> None:
    """Raise UsageError unless there are published weights and they have as many classes as the network."""
    way_out = "give --weights FILE, or --weights none for an untrained network"
    if spec.name.startswith(TIMM_PREFIX):
        raise UsageError(f"--weights default is for torchvision's networks, and {spec.name} is timm's; {way_out}")
    if published is None:
        raise UsageError(f"--weights default: there are no published weights of {spec.name}; {way_out}")
    classes = len(published.meta["categories"])
    if spec.classes != classes:
        raise UsageError(
            f"--classes {spec.classes} does not go with --weights default: the published weights of {spec.name} have "
            f"{classes} classes; leave --classes out, or {way_out}"
        )


def _fetched(published: Any) -> Path:
    """The file of published weights in torch.hub's cache, downloaded into it where it is missing."""
    path = Path(torch.hub.get_dir(), "checkpoints", _file_name(published))
    if os.path.exists(path):
        return path
    found = _HASH_IN_NAME.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _impatient():
            torch.hub.download_url_to_file(published.url, str(path), found and found[1], progress=False)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as problem:
        raise UsageError(
            f"--weights default: {path.name} is not in {path.parent} (TORCH_HOME moves this folder) and could not be "
            f"downloaded from {urllib.parse.urlparse(published.url).netloc} ({_reason(problem)}); give a copy of it "
            "with --weights FILE, or --weights none for an untrained network"
        ) from problem
    return path


@contextmanager
def _impatient() -> Iterator[None]:
    """Connections opened inside fail after _TIMEOUT_S without an answer; torch.hub itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(problem: BaseException) -> str:
    """Why a file could not be had, in one short line."""
    inner: object = problem
    if isinstance(problem, urllib.error.URLError) and not isinstance(problem, urllib.error.HTTPError):
        inner = problem.reason
    text = inner.strerror if isinstance(inner, OSError) else None
    return (text or str(inner) or type(inner).__name__).splitlines()[0][:120]


def _existing(weights: str) -> Path:
    """The path of the file ``weights``; raises UsageError for what is no file, or one of another format."""
    path = Path(weights)
    if os.path.isdir(weights):
        raise UsageError(f"--weights {weights} is a folder; give a file in it")
    if not os.path.isfile(weights):
        near = difflib.get_close_matches(weights.lower(), WEIGHTS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"--weights {weights}: {hint}there is no such file; choose a file, {' or '.join(WEIGHTS)}")
    if path.suffix.lower() == ".safetensors":
        raise UsageError(
            f"--weights {weights}: safetensors files are not supported; write the state dict with torch.save"
        )
    return path


def _checked_digest(path: Path, again: str) -> str:
    """The file's SHA-256 in hexadecimal; raises UsageError where its name has another one."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as problem:
        raise UsageError(f"{path} cannot be read ({_reason(problem)}); give another file") from problem
    found = _HASH_IN_NAME.search(path.name)
    if found and not digest.hexdigest().startswith(found[1]):
        have = digest.hexdigest()[: len(found[1])]
        raise UsageError(
            f"{path} is damaged or renamed: its SHA-256 begins with {have}, not with {found[1]} as in its name; {again}"
        )
    return digest.hexdigest()


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, without PREFIXES; raises UsageError for a file that has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a pickle protocol that then turns out to be no file
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        if code := re.search(r"GLOBAL ([\w.]+)", str(problem)):
            raise UsageError(
                f"{path} holds pickled code ({code[1]}), which is not run: a file of weights must hold tensors only; "
                "write it with torch.save(model.state_dict(), FILE)"
            ) from problem
        raise UsageError(
            f"{path} is truncated, damaged or not a file that torch.save wrote; copy it again, or give another"
        ) from problem
    if isinstance(stored, Mapping):
        stored = next((stored[key] for key in CONTAINERS if isinstance(stored.get(key), Mapping)), stored)
    if not _is_state_dict(stored):
        raise UsageError(
            f"{path} holds no state dict, neither as it is nor under {', '.join(CONTAINERS)}; write it with "
            "torch.save(model.state_dict(), FILE)"
        )
    state: dict[str, Tensor] = stored
    for prefix in (*PREFIXES, *PREFIXES):  # a compiled network in data parallelism has both, in either order
        if all(key.startswith(prefix) for key in state):
            consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _is_state_dict(stored: Any) -> bool:
    return (
        isinstance(stored, dict)
        and bool(stored)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in stored.items())
    )


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a DenseNet with the keys that torchvision's network has today."""
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def _check_fit(model: nn.Module, spec: NetSpec, state: dict[str, Tensor], path: Path) -> None:
    """Raise UsageError unless ``state`` loads strictly. Tried on a copy: a failing load changes what does fit."""
    own = model.state_dict()
    shapes = {key: (value.shape, own[key].shape) for key, value in state.items() if key in own}
    wrong = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    fitting = copy.copy(state)
    for key in wrong:
        del fitting[key]
    try:
        missing, unexpected = copy.deepcopy(model).load_state_dict(fitting, strict=False)
    except (RuntimeError, ValueError) as problem:
        reason = str(problem).splitlines()[-1].strip()[:160]
        raise UsageError(f"{path} does not fit {spec.name} ({reason}); give another file") from problem
    problems = list(
        chain(
            (f"{key} is {_shape(has)}, not {_shape(needs)}" for key, (has, needs) in wrong.items()),
            (f"{key} is missing" for key in missing if key not in wrong),
            (f"{key} is unexpected" for key in unexpected),
        )
    )
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise UsageError(
            f"{path} does not fit {spec.name} with {spec.classes} classes: {', '.join(problems[:_NAMED])}{more}; give "
            "the weights of this very network"
        )


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"
