"""A network as source code: a module of torch.nn parts alone, written from what torch.fx follows of its forward."""

from __future__ import annotations

import ast
import keyword
import re
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgcbench.errors import BgcbenchError

OWN = ("torch", "math", "operator", "_operator", "builtins")  # packages that a function in the code may come from
# A text among the arguments in a module's repr, which some modules show without quotes.
_UNQUOTED = re.compile(r"=(same|valid|zeros|reflect|replicate|circular)\b")

FILE = '''"""{what}, written by bgcbench {version}: torch.nn parts alone.

    from {stem} import load
    network = load()  # in eval mode, with the weights in {stem}.pt, which must lie beside this file
"""

from pathlib import Path

import torch
from torch import nn
{imports}

class Network(nn.Module):
    def __init__(self):
        super().__init__()
{parts}

{forward}

def load(path=Path(__file__).with_suffix(".pt"), map_location="cpu"):
    network = Network()
    network.load_state_dict(torch.load(path, map_location=map_location, weights_only=True))
    return network.eval()
'''


def written(model: nn.Module, stem: str, what: str, version: str) -> tuple[str, dict[str, Tensor]]:
    """Source code of ``model`` and the state dict that goes with it. stem: the names of both files without suffix.

    Raises BgcbenchError for what cannot be written, by name, and whatever torch.fx raises for what it cannot follow.
    """
    graph = fx.Tracer().trace(model)
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}
    for node in list(graph.nodes):
        node.type = None  # an annotation, which may be a name of another module's
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if isinstance(module, nn.Identity):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                continue
            part: Any = module
        elif node.op == "get_attr":
            part = _attribute(model, str(node.target))
        else:
            if node.op == "call_function":
                _check_function(node)
            continue
        node.target = names.setdefault(str(node.target), _flat(str(node.target), names))
        parts[node.target] = part
    used = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
    lines: list[str] = []
    state: dict[str, Tensor] = {}
    for name, flat in names.items():
        if flat in used:
            line, own = _declared(name, flat, parts[flat])
            lines.append(f"        {line}")
            state |= own
    code = fx.GraphModule({flat: parts[flat] for flat in used}, graph)._graph.python_code("self")
    forward = "\n".join(f"    {line}".rstrip() for line in code.src.strip().splitlines())
    named = {name: value for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)}
    text = FILE.format(
        what=what,
        version=version,
        stem=stem,
        imports=_imports(named),
        parts="\n".join(lines) or "        pass",
        forward=forward,
    )
    return text, state


def run(source: str, state: dict[str, Tensor]) -> nn.Module:
    """The network of ``source``, as another program would have it."""
    namespace: dict[str, Any] = {"__file__": "network.py", "__name__": "network"}
    exec(compile(source, "network.py", "exec"), namespace)  # what this package has just written
    network: nn.Module = namespace["Network"]()
    network.load_state_dict(state)
    return network.eval()


def _flat(name: str, taken: dict[str, str]) -> str:
    """'layer1.0.conv1' as 'layer1_0_conv1', and never the same for two."""
    flat = re.sub(r"\W", "_", name)
    if flat[0].isdigit() or keyword.iskeyword(flat) or hasattr(nn.Module(), flat):
        flat = f"_{flat}"
    while flat in taken.values():
        flat += "_"
    return flat


def _attribute(model: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    value = getattr(model.get_submodule(owner), last)
    if not isinstance(value, Tensor):
        raise BgcbenchError(f"{name} is a {type(value).__name__}, which is no part of torch.nn")
    return value


def _declared(name: str, flat: str, part: Any) -> tuple[str, dict[str, Tensor]]:
    """The line that makes a part of the network in its constructor, and the part's numbers."""
    if isinstance(part, Tensor):
        kind = f"torch.empty({tuple(part.shape)}, dtype={part.dtype})"
        if isinstance(part, nn.Parameter):
            return f"self.{flat} = nn.Parameter({kind})", {flat: part.detach()}
        return f'self.register_buffer("{flat}", {kind})', {flat: part.detach()}
    text = f"nn.{_UNQUOTED.sub(lambda found: f'={found[1]!r}', repr(part))}"
    own = {key: value.detach() for key, value in part.state_dict().items()}
    if not _makes(text, part):
        raise BgcbenchError(f"{name} ({type(part).__name__}) cannot be written as a line of torch.nn")
    return f"self.{flat} = {_shortest(text, part)}", {f"{flat}.{key}": value for key, value in own.items()}


def _makes(text: str, part: nn.Module) -> bool:
    """Whether ``text`` is a constructor of such a module."""
    try:
        with torch.device("meta"):
            made = eval(text, {"nn": nn, "torch": torch})  # as the file will
        shapes = {key: value.shape for key, value in made.state_dict().items()}
    except Exception:  # noqa: BLE001 - whatever becomes of a repr that is no constructor
        return False
    alike = type(made) is type(part) and repr(made) == repr(part)
    return alike and shapes == {key: value.shape for key, value in part.state_dict().items()}


def _shortest(text: str, part: nn.Module) -> str:
    """``text`` without what is so by default: an older torch need not know it."""
    call: Any = ast.parse(text, mode="eval").body
    for given in list(getattr(call, "keywords", ())):
        place = call.keywords.index(given)
        call.keywords.remove(given)
        if not _makes(ast.unparse(call), part):
            call.keywords.insert(place, given)
    return ast.unparse(call)


def _check_function(node: fx.Node) -> None:
    home = str(getattr(node.target, "__module__", None) or "builtins").split(".")[0]
    if home not in OWN:
        raise BgcbenchError(f"it calls {home}'s function {getattr(node.target, '__name__', node.target)}")


def _imports(found: dict[str, Any]) -> str:
    """What binds the names in the code to what they stand for, besides torch."""
    lines = []
    for name, value in found.items():
        if name == "torch":
            continue
        if isinstance(value, float):
            lines.append(f"from math import {name}")
        elif value is type(None):
            lines.append(f"{name} = type(None)")
        elif isinstance(value, types.ModuleType):
            lines.append(f"import {value.__name__} as {name}")
        else:
            lines.append(f"from {value.__module__} import {value.__qualname__} as {name}")
    return "".join(f"{line}\n" for line in sorted(lines, key=lambda line: (" = " in line, line)))
