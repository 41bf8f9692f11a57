"""From the options of a command to what typer makes --help and the parsing of, and how --help looks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bgcbench.cli.run import Command, run_command
from bgcbench.errors import UsageError
from bgcbench.experiments.options import PANELS, Option, more, options_of

BY_NAME = "_by_name"  # what the parameter of --model is called beside MODEL's


class TopHelp(TyperGroup):
    """The top-level help without rich panels, whose Markdown machinery doubles the time to the first line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


class CommandHelp(TyperCommand):
    """A command whose --help has whole paragraphs, switches without a type, and defaults as they are."""

    def __init__(self, name: str | None, *, help: str | None = None, **settings: Any) -> None:
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        super().__init__(name, help="\n\n".join(" ".join(each.split()) for each in paragraphs), **settings)

    def get_params(self, ctx: Any) -> Any:
        found: Any = super().get_params(ctx)
        for each in found:
            if getattr(each, "is_flag", False):
                each.metavar = ""
            default = getattr(each, "show_default", None)
            if isinstance(default, str):  # typer would put a text into brackets of its own
                each.help, each.show_default = f"{each.help or ''} \\[default: {default}]".lstrip(), False
        return found


def command_options(command: Command) -> list[Option]:
    """The options of a command: of its configurations, those of none, and where a run begins and ends; in order."""
    found: dict[str, Option] = {}
    kinds: tuple[type, ...] = (*command.kinds, command.asked)
    for kind in kinds:
        for each in options_of(kind).values():
            first = found.setdefault(each.name, each)
            if first.shown != each.shown:
                found[each.name] = dataclasses.replace(first, shown=f"{first.shown}; with --model {each.shown}")
    found |= {each.name: each for each in command.extra}
    return in_order(found.values())


def in_order(options: Iterable[Option]) -> list[Option]:
    """As --help shows them: everyday ones first, then panel by panel."""
    return sorted(options, key=lambda each: (not each.argument, not each.everyday, PANELS.index(each.panel)))


def register(app: typer.Typer, command: Command) -> None:
    """Make ``command`` one of ``app``."""
    call = functools.partial(run_command, command)
    add(app, command.name, command.summary, with_options(command_options(command), call, command.__doc__))


def add(app: typer.Typer, name: str, summary: str, function: Callable[..., int]) -> None:
    """Make ``function`` the command ``name`` of ``app``; typer reads its parameters and its docstring."""
    app.command(name, short_help=summary, cls=CommandHelp)(function)


def with_options(options: Iterable[Option], call: Callable[..., int], about: str | None) -> Callable[..., int]:
    """``call(context, parsed)`` as a function with these options for its parameters and ``about`` for its docstring."""

    def callback(context: typer.Context, **parsed: Any) -> int:
        for place in [each.removesuffix(BY_NAME) for each in parsed if each.endswith(BY_NAME)]:
            by_name = parsed.pop(place + BY_NAME)
            if by_name is not None and parsed[place] is not None:
                raise UsageError(f"{place.upper()} {parsed[place]} and --{place} {by_name} are the same; give one")
            parsed[place] = by_name if parsed[place] is None else parsed[place]
        return call(context, parsed)

    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(parameter for option in in_order(options) for parameter in _parameters(option)),
    ]
    callback.__doc__ = about
    callback.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": int}
    callback.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    return callback


def _parameters(option: Option) -> Iterator[inspect.Parameter]:
    """What typer reads of an option; all but switches are None where they are left out.

    One that may be given by its place has a second parameter for its name, which --help need not repeat.
    """
    if option.argument:
        yield _parameter(
            option,
            option.parameter,
            typer.Argument(help=option.help, show_default=False, metavar=option.parameter.upper()),
        )
    about = typer.Option(
        *([option.flag or f"--{option.name}"] + ([f"-{option.short}"] if option.short else [])),
        help=option.help or None,
        show_default=option.shown or False,
        envvar=option.envvar,
        rich_help_panel=None if option.everyday else more(option.panel),
        hidden=option.argument,
    )
    yield _parameter(option, option.parameter + BY_NAME * option.argument, about)


def _parameter(option: Option, name: str, about: Any) -> inspect.Parameter:
    one_way = option.on is not None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if one_way else None,
        annotation=Annotated[bool if one_way else option.kind | None, about],
    )
