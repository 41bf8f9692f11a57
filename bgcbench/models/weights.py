"""Where the numbers in a network come from: torchvision's published weights, or a file."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import urllib.error
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bgcbench.errors import UsageError, did_you_mean, reason_of
from bgcbench.models import files
from bgcbench.models.preprocessing import members, of_published, published, stated
from bgcbench.specs import TIMM_PREFIX, WEIGHTS, NetSpec, Preprocessing, is_own

# torchvision switches these networks' input to the other scale that their published weights were trained with.
_OTHER_INPUT = ("googlenet", "inception_v3")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Loaded:
    """Where a network's numbers come from.

    name: as of :class:`Weights`. sha256: the first 16 hexadecimal digits of the file's; None without a file. key: what
    leads to them in the file, None where it holds nothing else. notes: what the user should know of the choice.
    """

    name: str
    sha256: str | None
    key: str | None = None
    notes: tuple[str, ...] = ()


class WeightsNotFound(UsageError):
    """Published weights are neither in the cache nor to be had."""


class Weights:
    """The weights of one network, found but not yet loaded.

    weights:
        'none'     the network stays as it is, untrained
        'own'      the same for a network of the user's own, as the function that makes it returns it
        'default'  torchvision's published weights (for resnet50 IMAGENET1K_V1, otherwise its DEFAULT where the network
                   can take it), from torch.hub's cache or else downloaded into it
        a path     of a file that torch.save or safetensors wrote, with a state dict somewhere in it (see
                   :mod:`bgcbench.models.files`). It is read without running any code that is in it

    key: which of a file's state dicts. A file named as torch names them (NAME-HASH.pth) must have that SHA-256.
    preprocessing: of the images that they were trained on: what is published with them (a published file is known by
    its name), what a checkpoint of ``bgcbench train`` says, or else what the network's library states; None where
    nobody says anything. Raises UsageError for weights that are not there or cannot be read.
    """

    def __init__(self, name: str, weights: str, key: str | None = None) -> None:
        self.weights, self.key, self._digest = weights, key, ""
        self.contents: files.Contents | None = None
        self.preprocessing: Preprocessing | None = None
        self._published: Any = published(name) if weights == "default" else None
        if weights == "own" and not is_own(name):
            raise UsageError(f"--weights own is for a network of your own, such as net.py:make, and not for {name}")
        if weights in ("none", "own"):
            return
        if weights != "default":
            path = _existing(weights)
            self._published = next((one for one in members(name) if _file_name(one) == path.name), None)
            self._digest = _checked_digest(path, "copy it again, or rename it if these digits are no hash")
            self.contents = files.read(path)
            self.preprocessing = self.contents.preprocessing
        if self.preprocessing is None:
            self.preprocessing = stated(name) if self._published is None else of_published(self._published)

    @property
    def name(self) -> str:
        """'none', 'own', torchvision's name such as 'IMAGENET1K_V1', or the file's name without its folder."""
        if self.weights == "default" and self._published is not None:
            return str(self._published.name)
        return Path(self.weights).name

    def load_into(self, model: nn.Module, spec: NetSpec) -> Loaded:
        """Put them into ``model``, the network that ``spec`` describes, and say what they were.

        GoogLeNet and Inception v3 with their published weights, by either way, scale their input as these expect
        (transform_input). Raises UsageError for weights that cannot be had or do not fit; ``model`` is then unchanged.
        """
        if self.weights in ("none", "own"):
            return Loaded(self.weights, None)
        contents = self.contents
        if contents is None:
            _check_published(spec, self._published)
            path = _fetched(self._published)
            self._digest = _checked_digest(path, "delete it, and it is downloaded again")
            contents = files.read(path)
        found = files.fitting(contents, model, spec, self.key)
        model.load_state_dict(found.state)
        if spec.name in _OTHER_INPUT and self._published is not None:
            model.transform_input = True  # type: ignore[assignment]
        return Loaded(self.name, self._digest[:16], found.key or None, found.notes)


def has_default(spec: NetSpec) -> bool:
    """Whether torchvision publishes weights of this network, whatever its num_classes."""
    return published(spec.name) is not None


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
        answered = isinstance(problem, urllib.error.HTTPError)  # which says more than its reason
        reason = reason_of(problem if answered else getattr(problem, "reason", problem))
        raise WeightsNotFound(
            f"--weights default: {path.name} is not in {path.parent} (TORCH_HOME moves this folder) and could not be "
            f"downloaded from {urllib.parse.urlparse(published.url).netloc} ({reason}); give a copy of it "
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


def _existing(weights: str) -> Path:
    """The path of the file ``weights``; raises UsageError for what is no file, or one of another format."""
    path = Path(weights)
    if os.path.isdir(weights):
        raise UsageError(f"--weights {weights} is a folder; give a file in it")
    if not os.path.isfile(weights):
        hint = did_you_mean(weights, WEIGHTS)
        raise UsageError(f"--weights {weights}: {hint}there is no such file; choose a file, {' or '.join(WEIGHTS)}")
    return path


def _checked_digest(path: Path, again: str) -> str:
    """The file's SHA-256 in hexadecimal; raises UsageError where its name has another one."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as problem:
        raise UsageError(f"{path} cannot be read ({reason_of(problem)}); give another file") from problem
    found = _HASH_IN_NAME.search(path.name)
    if found and not digest.hexdigest().startswith(found[1]):
        have = digest.hexdigest()[: len(found[1])]
        raise UsageError(
            f"{path} is damaged or renamed: its SHA-256 begins with {have}, not with {found[1]} as in its name; {again}"
        )
    return digest.hexdigest()
