"""From the options of a command to its configuration: of a new run, or of one that is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bgcbench.errors import UsageError
from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.profile import check_same_fields, check_same_workload
from bgcbench.results import check_command

Config = TypeVar("Config", bound=RunConfig)

# Fields of a configuration that an option of another name fills.
OPTIONS = {
    "num_classes": "classes",
    "in_channels": "channels",
    "out_channels": "channels",
    "inputs": "input",
    "inits": "init",
    "memory_gib": "memory",
    "data_dirs": "data_dir",
    "save_every_s": "save_every",
}


def option(field: str) -> str:
    """The option that fills a configuration's field: 'num_classes' -> '--classes'."""
    return f"--{OPTIONS.get(field, field).replace('_', '-')}"


def fresh(given: Mapping[str, Any], layer: type[Config], network: type[Config]) -> Config:
    """The configuration of a new run: of a network where --model is given, else of a layer."""
    kind = network if "model" in given else layer
    for name in given:
        if name not in {field.name for field in dataclasses.fields(kind)}:
            why = (
                "describes a layer, and --model a network; leave one of them out"
                if "model" in given
                else "is for a network; name it with --model, or leave the option out"
            )
            raise UsageError(f"{option(name)} {why}")
    return kind(**given)


def resumed(
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    name: str,
    command: str,
    layer: type[Config],
    network: type[Config],
) -> Config:
    """The configuration that continues ``stored``, from file ``name``: its own, with a grid that may have grown."""
    check_command(dict(stored), command, name)
    kind = network if "model" in stored.get("config", {}) else layer
    base = kind.from_json(stored.get("config", {}))
    fields = {field.name for field in dataclasses.fields(kind)}
    if unknown := given.keys() - fields:
        raise UsageError(f"{option(min(unknown))} has no meaning for what {name} measures; leave it out")
    grown = {
        grid: tuple(dict.fromkeys((*getattr(base, grid), *given[grid])))
        for grid in ("groups", "variants", "inputs", "seeds", "inits")
        if grid in given
    }
    check_same_fields(stored["config"], {**given, **grown}, base.FREE, name)  # before they are checked together
    config = dataclasses.replace(base, **{**given, **grown})
    check_same_workload(stored["config"], config, name)
    return config
