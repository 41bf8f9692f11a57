"""From the options of a command to what typer makes --help and the parsing of."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from bgcbench.cli.run import Command, run_command
from bgcbench.experiments.options import PANELS, Option, options_of


def command_options(command: Command) -> list[Option]:
    """The options of a command: of its configurations, those of none, and where a run begins and ends.

    Everyday ones come first, then panel by panel.
    """
    found: dict[str, Option] = {}
    kinds: tuple[type, ...] = (*command.kinds, command.asked)
    for kind in kinds:
        for each in options_of(kind).values():
            first = found.setdefault(each.name, each)
            if first.shown != each.shown:
                found[each.name] = dataclasses.replace(first, shown=f"{first.shown}; with --model {each.shown}")
    found |= {each.name: each for each in command.extra}
    return sorted(found.values(), key=lambda each: (not each.argument, not each.everyday, PANELS.index(each.panel)))


def register(app: typer.Typer, command: Command) -> None:
    """Make ``command`` one of ``app``; typer reads the parameters and the help of the function that it calls."""

    def callback(context: typer.Context, **parsed: Any) -> int:
        return run_command(command, context, parsed)

    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *map(_parameter, command_options(command)),
    ]
    callback.__doc__ = command.__doc__
    callback.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": int}
    callback.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    app.command(command.name, short_help=command.summary)(callback)


def _parameter(option: Option) -> inspect.Parameter:
    """What typer reads of an option; all but switches are None where they are left out."""
    flag = option.flag or f"--{option.name}"
    about: Any = (
        typer.Argument(help=option.help, show_default=False)
        if option.argument
        else typer.Option(
            flag,
            help=option.help or None,
            show_default=option.shown or False,
            envvar=option.envvar,
            rich_help_panel=None if option.everyday else option.panel,
        )
    )
    is_switch = option.on is not None
    return inspect.Parameter(
        option.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_switch else None,
        annotation=Annotated[bool if is_switch else option.kind | None, about],
    )
