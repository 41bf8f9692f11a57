"""The command line: parse, call, print. No maths here, and no torch before a command needs a device."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import bgcbench
from bgcbench.cli.common import app, say
from bgcbench.errors import BgcbenchError, UsageError

# Each registers its commands; --help lists them in this order.
from bgcbench.cli import profile, approx, train, transfer, show  # noqa: F401  # isort: skip

__all__ = ["app", "main", "run"]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"bgcbench {bgcbench.__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a mistake of the user's is one line on stderr."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = app(args=words, obj=words, prog_name="bgcbench", standalone_mode=False)
    except BgcbenchError as error:
        say(f"bgcbench: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has gone; whatever is in a file is in a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def run() -> None:
    """Console script."""
    raise SystemExit(main())
