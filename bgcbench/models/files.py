"""What is in a file of weights: the state dicts, under whatever keys and prefixes training scripts put them."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.errors import UsageError, import_extra, some
from bgcbench.specs import NetSpec, Preprocessing

State = dict[str, Tensor]

# Where training scripts keep it. Of several that fit the first is taken, averages over the training last.
CONTAINERS = (
    *("state_dict", "model", "model_state", "model_state_dict", "net", "network", "params", "weights"),
    *("model_ema", "state_dict_ema", "ema"),
)
# What wrappers put before every key: data parallelism and averages, torch.compile, Fabric, modules of Lightning.
WRAPPERS = ("module", "_orig_mod", "_forward_module", "model", "net", "network")

_NESTED = 4  # dicts within one another that are looked through
# Values beside the weights that torch.load refuses by default: plain ones, and nobody needs them here.
_PLAIN = {
    "argparse": ("Namespace",),
    "builtins": ("bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"),
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "PathNode", "StringNode"),
    "typing": ("Any",),
    "_codecs": ("encode",),
}
_DICTS = {
    "collections": ("defaultdict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "lightning.pytorch.utilities.parsing": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
}
# DenseNet's published files are older than the rule that a module's name has no dot.
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")


class _Skipped:
    """Stands in for a value that is not needed: nothing of its class is imported or run."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _SkippedDict:
    """Stands in for a kind of dict; torch.load fills plain ones only."""

    def __new__(cls, *_: Any) -> Any:
        return {}


# torch tells what is allowed by module and name, which these have.
_STAND_INS: list[Any] = [
    type(name, (kind,), {"__module__": module, "__qualname__": name})
    for kind, table in ((_Skipped, _PLAIN), (_SkippedDict, _DICTS))
    for module, names in table.items()
    for name in names
]


@dataclass(frozen=True)
class Contents:
    """The state dicts in a file by the keys that lead to them ("" for the file itself), in the order of preference.

    preprocessing: how the images were prepared that they were trained on, where the file says it.
    """

    path: Path
    states: dict[str, State]
    preprocessing: Preprocessing | None = None


def read(path: Path) -> Contents:
    """What is in ``path``, a file that torch.save or safetensors wrote. No code in it is run.

    Raises UsageError for any other file, and for one without a state dict.
    """
    stored = _safetensors(path) if path.suffix.lower() == ".safetensors" else _torch(path)
    states = dict(sorted(_states(stored), key=lambda found: _preference(found[0])))
    if not states:
        raise UsageError(
            f"{path} holds no state dict, neither as it is nor in the dicts in it; write it with "
            "torch.save(model.state_dict(), FILE)"
        )
    return Contents(path, states, _own_preprocessing(stored))


def _torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.simplefilter("ignore", UserWarning)  # about a pickle protocol that then turns out to be no file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        if code := re.search(r"GLOBAL ([\w.]+)", str(problem)):
            raise UsageError(
                f"{path} holds pickled code ({code[1]}), which is not run: a file of weights must hold tensors only; "
                "write it with torch.save(model.state_dict(), FILE)"
            ) from problem
        raise UsageError(
            f"{path} is truncated, damaged or not a file that torch.save wrote; copy it again, or give another"
        ) from problem


def _safetensors(path: Path) -> Any:
    missing = f"{path} needs safetensors to be read; pip install 'bgcbench[safetensors]'"
    reader = import_extra("safetensors.torch", missing)
    try:
        return reader.load_file(path)
    except Exception as problem:
        raise UsageError(
            f"{path} is truncated, damaged or no safetensors file; copy it again, or give another"
        ) from problem


def _states(stored: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, State]]:
    """The state dicts in nested dicts, each with its keys joined by dots."""
    if not isinstance(stored, dict):
        return
    if stored and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in stored.items()):
        yield ".".join(keys), stored
        return
    for key, value in stored.items() if len(keys) < _NESTED else ():
        if isinstance(key, str):
            yield from _states(value, (*keys, key))


def _preference(keys: str) -> tuple[int, ...]:
    """Sorts known containers first; nested ones by their innermost key."""
    known = [CONTAINERS.index(key) if key in CONTAINERS else len(CONTAINERS) for key in keys.split(".")]
    return known[-1], len(known)


def _own_preprocessing(stored: Any) -> Preprocessing | None:
    """What a checkpoint of ``bgcbench train`` says of its images; None for any other file."""
    try:
        found = json.loads(stored["meta"])["identity"]["preprocessing"]
        return Preprocessing.from_json({**found, "source": "weights"})
    except (KeyError, TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------- into a network


@dataclass(frozen=True)
class Fitting:
    """The state dict of a file that fits a network, under the network's own keys.

    key: what leads to it in the file, "" for the file itself. notes: what was left out, and what else could be meant.
    """

    state: State
    key: str
    notes: tuple[str, ...]


def fitting(contents: Contents, model: nn.Module, spec: NetSpec, wanted: str | None = None) -> Fitting:
    """The state dict of ``contents`` that ``model``, the network of ``spec``, loads strictly.

    wanted: the key that leads to it, those of nested dicts joined by dots, a prefix of its keys at the end. By default
    the first that fits, prefixes of WRAPPERS taken off. Raises UsageError where none fits.
    """
    own, name = model.state_dict(), contents.path.name
    states = contents.states if wanted is None else _at(contents, wanted)
    if spec.name.startswith("densenet"):
        states = {
            key: {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in state.items()}
            for key, state in states.items()
        }
    tried = [
        Fitting(_below(state, prefix), _joined(key, prefix), _left_out(name, state, prefix, spec))
        for key, state in states.items()
        for prefix in _prefixes(state, own, wrapped=True) or [""]
    ]
    alike = [one for one in tried if _same_shapes(one.state, own)]
    chosen, *others = alike or tried
    if not alike:
        _name_prefix(contents, spec, states, own)
    _check_fit(model, spec, chosen.state, contents.path)
    if others and alike:
        also = " and ".join(other.key for other in others)
        told = f"{name} has weights that fit under {chosen.key or 'no key'}, which are taken, and under {also}: "
        chosen = replace(chosen, notes=(*chosen.notes, f"{told}--weights-key chooses"))
    return chosen


def _at(contents: Contents, wanted: str) -> dict[str, State]:
    """The state dict that ``wanted`` leads to, by itself; raises UsageError where there is none."""
    for key, state in contents.states.items():
        if key == wanted:
            return {key: state}
        above = f"{key}." if key else ""
        if wanted.startswith(above) and (inner := _below(state, f"{wanted.removeprefix(above)}.")):
            return {wanted: inner}
    there = ", ".join(filter(None, contents.states)) or "none but the file itself"
    raise UsageError(f"--weights-key {wanted}: {contents.path} has no weights there; choose from {there}")


def _prefixes(state: State, own: State, *, wrapped: bool) -> list[str]:
    """What may stand before a network's ``own`` keys in ``state``, the shortest first.

    wrapped: the prefixes that WRAPPERS make (and none at all), or those that they do not make.
    """
    first = next(iter(own), "")
    found = {key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")}
    known = {prefix for prefix in found if set(prefix.split(".")[:-1]) <= set(WRAPPERS)}
    return sorted(known if wrapped else found - known, key=len)


def _below(state: State, prefix: str) -> State:
    """What is below ``prefix``, with the versions of its modules' formats, which some networks ask for."""
    if not prefix:
        return state
    inner = OrderedDict((key.removeprefix(prefix), state[key]) for key in state if key.startswith(prefix))
    versions = getattr(state, "_metadata", {}).items()
    inner._metadata = {  # type: ignore[attr-defined]
        key[len(prefix) :]: version for key, version in versions if f"{key}.".startswith(prefix)
    }
    return inner


def _joined(key: str, prefix: str) -> str:
    return ".".join(filter(None, (key, prefix.rstrip("."))))


def _left_out(name: str, state: State, prefix: str, spec: NetSpec) -> tuple[str, ...]:
    """A note on what is beside a wrapped network; averages count how many they are of."""
    left = [key for key in state if not key.startswith(prefix) and key != "n_averaged"]
    return (f"{name}: {some(left)} not of {spec.name}, left out",) if left else ()


def _same_shapes(state: State, own: State) -> bool:
    """Whether the keys and shapes are the same; norms may not have counted their batches, as before torch 0.4.1."""
    return all(key in own and value.shape == own[key].shape for key, value in state.items()) and all(
        key in state or key.endswith("num_batches_tracked") for key in own
    )


def _name_prefix(contents: Contents, spec: NetSpec, states: Mapping[str, State], own: State) -> None:
    """Raise UsageError where a prefix that nothing is known of is all that keeps weights from fitting."""
    found = [
        _joined(key, prefix)
        for key, state in states.items()
        for prefix in _prefixes(state, own, wrapped=False)
        if _same_shapes(_below(state, prefix), own)
    ]
    if found:
        raise UsageError(
            f"{contents.path} has the weights of {spec.name} behind a prefix: take them with --weights-key "
            f"{' or --weights-key '.join(found)}"
        )


def _check_fit(model: nn.Module, spec: NetSpec, state: State, path: Path) -> None:
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
    problems = [
        *(f"{key} is {_shape(has)}, not {_shape(needs)}" for key, (has, needs) in wrong.items()),
        *(f"{key} is missing" for key in missing if key not in wrong),
        *(f"{key} is unexpected" for key in unexpected),
    ]
    if problems:
        raise UsageError(
            f"{path} does not fit {spec.name} with {spec.classes} classes: {some(problems)}; give the weights of this "
            "very network"
        )


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"
