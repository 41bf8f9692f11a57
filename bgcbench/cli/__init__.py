"""The command line: parse, call, print. No maths here, and no torch before a command needs a device."""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import bgcbench
from bgcbench.cli import converting, deploying, show
from bgcbench.cli.output import say
from bgcbench.cli.parameters import TopHelp, add, register, with_options
from bgcbench.errors import BgcbenchError, OutputError, UsageError
from bgcbench.results.rows import COMMANDS
from bgcbench.specs import VARIANTS, load

__all__ = ["app", "application", "main", "run"]


def application() -> typer.Typer:
    """All commands, in the order of --help."""
    made = typer.Typer(
        name="bgcbench",
        cls=TopHelp,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="Which convolutions of a network can be made cheaper, with which variant, how much time that saves on "
        "this device, and what it loses. Variants: "
        + ", ".join(f"{variant.name} ({variant.summary})" for variant in VARIANTS.values())
        + ".",
        epilog="Start with: bgcbench profile --quick. Exit codes: 0 done, 1 some rows failed, 2 usage, 3 no such "
        "device, 4 output not writable, 5 compare --fail-on, 130/143 interrupted (the file is valid and resumable).",
    )
    made.callback(invoke_without_command=True)(_top)
    for name, declared in COMMANDS.items():
        register(made, load(declared.command)(name))
    convert = with_options(converting.OPTIONS, converting.convert, converting.convert.__doc__)
    add(made, "convert", "Convert a network into a file.", convert)
    add(made, "export", "Write a converted network to a file that runs without bgcbench.", deploying.export)
    add(made, "show", "Print a result file again, or Table 1.", show.show)
    add(made, "report", "Make one HTML page of result files.", show.report)
    add(made, "merge", "Join the parts of one plan.", show.merge)
    add(made, "doctor", "Print what could spoil a measurement here.", show.doctor)
    add(made, "compare", "Compare two profile files.", show.compare)
    return made


def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"bgcbench {bgcbench.__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())


app = application()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a mistake of the user's is one line on stderr."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = app(args=words, obj=words, prog_name="bgcbench", standalone_mode=False)
        sys.stdout.flush()  # what is wrong with it is said here, and not by the interpreter when it ends
    except BgcbenchError as error:
        say(f"bgcbench: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has gone; whatever is in a file is in a file
        return 0
    except (KeyboardInterrupt, typer.Abort):
        say("bgcbench: interrupted")
        return 130
    except Exception as error:
        # Typer's own usage errors; their class lives in different modules in different versions.
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(str(error.format_message()).split())
        message += _value_given(message, words)
        say(f"bgcbench: {message} (see bgcbench {' '.join(_command_path(error))}--help)")
        return UsageError.exit_code
    return int(code or 0)


def _value_given(message: str, argv: Sequence[str]) -> str:
    """The value of the option that ``message`` calls invalid; Typer's message leaves it out."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in itertools.pairwise(words):
        if message.startswith("Invalid value") and f"'{option}'" in message and f"'{value}'" not in message:
            return f", not '{value}'"
    return ""


def _command_path(error: Exception) -> list[str]:
    context = getattr(error, "ctx", None)
    path = str(getattr(context, "command_path", "bgcbench")).split()[1:]
    return [*path, ""] if path else []


class _Stdout(io.FileIO):
    """What stands behind sys.stdout; that it cannot be written is the user's to know, and no bug."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"stdout cannot be written ({error.strerror or error})") from error


def run() -> None:
    """Console script."""
    out = sys.stdout
    # Where the shell has closed it (>&-), the next file to be opened would take its number, and what is printed.
    handle = os.open(os.devnull, os.O_RDONLY) if out is None else out.fileno()
    if out is None or not out.isatty():
        file = io.BufferedWriter(_Stdout(handle, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(file, "utf-8" if out is None else out.encoding, errors="backslashreplace")
    code = main()
    try:
        sys.stdout.flush()
    except (BrokenPipeError, OutputError):  # said, or none of our business: the interpreter need not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)
