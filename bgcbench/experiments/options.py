"""Options, declared once: a field of a configuration carries its help, its panel, its default in words and its check.

The command line makes its parameters from them (:mod:`bgcbench.cli.parameters`), a configuration its checks. A subclass
that gives a field another default with ``option`` inherits all that it does not say anew. No torch and no typer here.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from bgcbench.errors import UsageError
from bgcbench.specs import (
    DATA_SETS,
    FORMATS,
    TIMM_PREFIX,
    VARIANTS,
    WEIGHTS,
    check_choice,
    check_positive,
    is_own,
    may_run,
    shard_of,
    spelt,
)

# The panels of --help, in this order. What a user wants every day stands before them all.
WORKLOAD = "Workload"
CONVERSION = "The conversion"
NETWORK = "A whole network"
GRID = "What is compared"
RECIPE = "Recipe (each replaces the recipe's own)"
MEASURE = "How it is measured"
OUTPUT = "Output"
PANELS = (WORKLOAD, CONVERSION, NETWORK, GRID, RECIPE, MEASURE, OUTPUT)


def more(panel: str) -> str:
    """The title of a panel, which stands after the everyday options."""
    return f"More options: {panel}"


T = TypeVar("T")
Check = Callable[[str, Any], object]
Reader = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """One option of a command.

    name: as it is typed, without the dashes; short: the same in one letter. fills: the fields that it gives values.
    kind: what typer parses: int, float, str, bool, Path or list[str]. flag: how a switch is typed, such as
    "--no-reference" or "--flip/--no-flip".
    read: makes what it fills of what typer has parsed, (name, parsed) -> value, one for each field where there are
    several. check: called with the first field's name and value; raises UsageError. shown: the default in words.
    everyday: stands first in --help. argument: may be given by its place, too. on: what a
    switch that can only be turned one way means.
    """

    name: str
    fills: tuple[str, ...]
    help: str = ""
    kind: Any = str
    panel: str = OUTPUT
    shown: str | None = None
    short: str = ""
    flag: str = ""
    read: Reader = lambda name, parsed: parsed
    check: Check | None = None
    everyday: bool = False
    argument: bool = False
    envvar: str | None = None
    on: bool | None = None

    @property
    def parameter(self) -> str:
        """Its name in Python."""
        return self.name.replace("-", "_")

    def values(self, parsed: Any) -> dict[str, Any]:
        """The fields that are asked for, of what typer has parsed; none where it was left out."""
        if parsed is None or parsed == [] or (self.on is not None and not parsed):
            return {}
        value: Any = self.read(self.name, parsed) if self.on is None else self.on
        if isinstance(self.check, one_of):
            value = self.check.spelt(value)
        return dict(zip(self.fills, value if len(self.fills) > 1 else (value,), strict=True))


def option(default: Any = None, help: str = "", **about: Any) -> Any:
    """A field that is an option; about: what :class:`Option` has. A subclass inherits what it does not say anew.

    hidden=True: of a subclass that does not offer it.
    """
    if help:
        about["help"] = help
    return dataclasses.field(default=default, metadata={"is_option": True, **about})


shorthand = Option  # one without a field of its own: it fills several, or one that has another option


def options_of(kind: type[Any]) -> dict[str, Option]:
    """The options of dataclass ``kind`` by the name of their field; those of SHORTHANDS first, by their own name."""
    hints = get_type_hints(kind)
    about: dict[str, dict[str, Any]] = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        for field in dataclasses.fields(base):
            if field.name in inspect.get_annotations(base):
                about[field.name] = {**about.get(field.name, {}), **field.metadata}
    found = {each.name: each for each in getattr(kind, "SHORTHANDS", ())}
    for field in dataclasses.fields(kind):
        if about[field.name].pop("is_option", False) and not about[field.name].pop("hidden", False):
            found[field.name] = _declared(field.name, hints[field.name], field.default, about[field.name])
    return found


def _declared(field: str, hint: Any, default: Any, about: dict[str, Any]) -> Option:
    """The option of a field, what is not said being made of its type and default."""
    name = about.pop("name", field.replace("_", "-"))
    made: dict[str, Any] = {"shown": _in_words(default)}
    kinds = [each for each in get_args(hint) if each is not type(None)]
    kind = kinds[0] if get_origin(hint) in (Union, types.UnionType) else hint
    if kind is bool and default is not None and "flag" not in about:
        made["on"] = not default
    if get_origin(kind) is tuple:
        made["read"] = numbers if get_args(kind)[0] is int else names
        kind = str
    return Option(name, (field,), **{"kind": kind, **made, **about})


def _in_words(default: Any) -> str | None:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or None
    if default is None or default == "" or isinstance(default, bool):
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)


def check_options(config: Any) -> None:
    """Call the check of every option of ``config`` that has a value; raises UsageError or ShapeError.

    Each of several values is checked, and there must be one at least.
    """
    for each in options_of(type(config)).values():
        if each.check is None:
            continue
        value = getattr(config, each.fills[0])
        if value == ():
            raise UsageError(f"--{each.name} is empty; name at least one")
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                each.check(each.fills[0], one)


def given_fields(options: Iterable[Option], parsed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are asked for, of what typer has parsed by parameter.

    An option of one field says more than one that fills several.
    """
    given: dict[str, Any] = {}
    for each in sorted(options, key=lambda each: len(each.fills), reverse=True):
        given |= each.values(parsed[each.parameter]) if each.fills else {}
    return given


# ------------------------------------------------------------------------------------------------- what a check may be


positive: Check = check_positive


@dataclass(frozen=True)
class one_of:
    """A check: the value is one of ``choices``, whatever its case where it is typed."""

    choices: Iterable[str]
    what: str = ""

    def __call__(self, field: str, value: str) -> None:
        check_choice(self.what or field, value, self.choices)

    def spelt(self, value: Any) -> Any:
        """A word that was typed, or each of several, as it stands among the choices."""
        return tuple(map(self.spelt, value)) if isinstance(value, tuple) else spelt(value, self.choices)


# ---------------------------------------------------------------------------------------------- what is read from text


def _split(kind: Callable[[str], Any], name: str, text: str, rule: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{name} {text} must be {rule}") from None


def numbers(name: str, text: str) -> tuple[int, ...]:
    """'2,4,8' as numbers, each once; raises UsageError for anything else."""
    return tuple(dict.fromkeys(_split(int, name, text, "whole numbers separated by commas, such as 2,4,8")))


def threads(name: str, text: str) -> int:
    """A number, or with 'auto' how many cores other processes leave; raises UsageError for anything else."""
    if text.casefold() == "auto":
        from bgcbench.measure.load import free_cores

        return free_cores()
    (number,) = _split(int, name, text.replace(",", "?"), "a positive whole number, or auto")
    return int(number)


def names(name: str, text: str) -> tuple[str, ...]:
    """'gc, bgc' as words, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def variants(name: str, text: str) -> tuple[str, ...]:
    """``names``, where all is every variant."""
    return tuple(VARIANTS) if text.strip().casefold() == "all" else names(name, text)


def word(name: str, text: str) -> str:
    """One of a few words, all of which are in small letters."""
    return text.casefold()


def word_or_path(words: Iterable[str]) -> Reader:
    """A reader of what is one of ``words``, whatever its case, or else a path."""
    return lambda name, text: spelt(text, words)


def images(words: Iterable[str]) -> Reader:
    """The same of images, which a function may load."""
    return lambda name, text: own(f"--{name}", text) if is_own(text) else spelt(text, words)


def own(option: str, text: str) -> str:
    """A function of the user's own, who has named it; raises UsageError for a file that is not there."""
    home = text.rpartition(":")[0]
    if home.endswith(".py") and not os.path.isfile(home):
        raise UsageError(f"{option} {text}: there is no file {home}")
    return may_run(text)


EXPORTED = (".pt2", ".ts", ".torchscript", ".ptl", ".onnx")


def network(name: str, text: str) -> str:
    """A network's name, whose case does not matter, the path of a checkpoint, or a function that makes a network.

    Raises UsageError for a file that no network can be made of.
    """
    if is_own(text):
        return own("MODEL", text)
    if text.endswith(".py"):
        raise UsageError(f"MODEL {text} must name the function that makes the network, too, such as {text}:make")
    if text.casefold().endswith(EXPORTED):
        raise UsageError(
            f"MODEL {text} is an exported program, whose convolutions cannot be replaced; name the function that makes "
            "the network, such as net.py:make"
        )
    is_path = os.path.exists(text) or (os.path.dirname(text) and not text.casefold().startswith(TIMM_PREFIX))
    return text if is_path else text.casefold()


def size(name: str, text: str) -> tuple[int, int]:
    """'7' or '7x14' as height and width; raises UsageError for anything else."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]+", part) for part in parts):
        raise UsageError(f"--{name} {text} must be a number of pixels or HEIGHTxWIDTH, such as 7 or 7x14")
    return int(parts[0]), int(parts[-1])


def is_shard(field: str, value: str) -> None:
    """A check: part K of M of a plan."""
    shard_of(value)


def in_shard(shard: str | None, rows: Sequence[T]) -> list[T]:
    """The rows of a plan that part K of M has: each M-th, from the K-th on; all without a ``shard``."""
    number, of = shard_of(shard) if shard else (1, 1)
    return list(rows[number - 1 :: of])


def three(name: str, text: str) -> tuple[float, ...]:
    """'0.5' or '0.4,0.5,0.6' as three numbers; raises UsageError for anything else."""
    values = _split(float, name, text, "one number or three separated by commas")
    return 3 * values if len(values) == 1 else values


def listed(name: str, values: Iterable[Any]) -> tuple[str, ...]:
    """The values of an option that is given several times."""
    return tuple(map(str, values))


# --------------------------------------------------------------------------------- what several configurations declare


def form_option() -> Any:
    """In which form a result is printed."""
    words = "auto (a table on a terminal, Markdown elsewhere), table, markdown, csv, json."
    return option("auto", words, name="format", shown=None, check=one_of(FORMATS, "format"))


def weights_option() -> Any:
    """The weights of a network that is not trained here."""
    words = "A file, default (torchvision's published ones) or none (untrained)."
    shown = "default where there are any"
    return option(None, words, panel=NETWORK, everyday=True, shown=shown, read=word_or_path(WEIGHTS))


def images_option(help: str) -> Any:
    """Images without labels."""
    return option("", help, short="d", panel=NETWORK, everyday=True, read=images(DATA_SETS))


SIZE = shorthand("size", ("height", "width"), read=size, panel=WORKLOAD, everyday=True)
CHANNELS = shorthand(
    "channels", ("in_channels", "out_channels"), "Channels in and out.", kind=int,
    read=lambda name, both: (both, both), panel=WORKLOAD, everyday=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------ options that are no configuration


@dataclass(frozen=True)
class Asked:
    """Where a run begins and ends, and what is shown of it, as it was typed."""

    dry_run: bool = option(False, "Check everything, print the plan and stop.", everyday=True)
    out: str | None = option(
        None,
        "Result file; - is stdout (JSON).",
        short="o",
        shown="results/COMMAND-WHAT-DEVICE-TIME.json",
        everyday=True,
    )
    force: bool = option(False, "Replace an existing --out file.")
    resume: str | None = option(
        None, "Continue this result file: keep what it holds, do the rest. Its settings are used.", everyday=True
    )
    form: str = form_option()
    wide: bool = option(False, "Show every column of every table on a terminal, too.")
    quiet: bool = option(False, "No progress and no notes on stderr.")
    plot: Path | None = None

    may_be_auto: ClassVar[bool] = False

    @property
    def is_auto(self) -> bool:
        """Whether the file to continue is to be looked for."""
        return self.may_be_auto and self.resume == "auto"


@dataclass(frozen=True)
class AskedOfPicture(Asked):
    """The same of a run that can be drawn."""

    force: bool = option(False, "Replace existing --out and --plot files.")
    plot: Path | None = option(None, "Draw the result: a .png, .svg or .pdf file (extra: plot).")


@dataclass(frozen=True)
class AskedOfPlan(AskedOfPicture):
    """The same of a run that saves a plan and its network."""

    force: bool = option(False, "Replace existing --out, --plot and --save files.")


@dataclass(frozen=True)
class AskedOfTraining(AskedOfPicture):
    """The same of a run that has checkpoints to go on from, and whose length is worth an estimate."""

    dry_run: bool = option(
        False, "Check everything, time a few steps, print what is replaced and how long all takes, and stop."
    )
    resume: str | None = option(
        None,
        "Continue this result file, from its last checkpoints; its settings are used. auto: continue --out, or the "
        "newest unfinished run of the same settings under results/; start one where there is none.",
    )
    may_be_auto: ClassVar[bool] = True


@dataclass(frozen=True)
class AskedOfTransfer(AskedOfTraining):
    """The same of a run that also saves networks."""

    force: bool = option(False, "Replace existing --out, --plot and --save files.")
