"""What people read, as files: the tables of every result in results/, and every --help.

BGCBENCH_GOLDEN=write python -m pytest tests/test_golden.py writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import inspect
import io
import json
import os
from pathlib import Path
from typing import get_type_hints

import pytest
from rich.console import Console

from bgcbench import report, results
from bgcbench.cli import app
from tests.conftest import ROOT

GOLDEN = Path(__file__).parent / "golden"
FILES = [
    path
    for path in sorted((ROOT / "results").glob("*.json"))
    if (json.loads(path.read_text(encoding="utf-8")).get("schema") or {}).get("name") == results.SCHEMA_NAME
]
FORMS = {"markdown": ("md", 80), "csv": ("csv", 80), "table": ("txt", 200)}
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def held(text: str, name: str) -> None:
    """Hold ``text`` against the file ``name``."""
    path = GOLDEN / name
    if os.environ.get("BGCBENCH_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_are_shown_as_they_were(path: Path, form: str) -> None:
    suffix, width = FORMS[form]
    out = io.StringIO()
    document = results.document.read(path)
    console = Console(file=out, width=width, no_color=True, highlight=False)
    report.emit(report.document_report(document), form, console, document)
    held(out.getvalue(), f"results/{path.stem}.{suffix}")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_it_said(command: str) -> None:
    """Panel by panel what stands in it; how that is drawn is typer's and rich's affair."""
    found = next(each for each in app.registered_commands if (each.name or each.callback.__name__) == command)
    lines = [f"{command}: {found.help or inspect.cleandoc(found.callback.__doc__)}", ""]
    for name, hint in get_type_hints(found.callback, include_extras=True).items():
        for about in [about for about in getattr(hint, "__metadata__", ()) if not about.hidden]:
            declared = (about.default, *(about.param_decls or ()))  # typer takes a first name for a default
            flags = "/".join(filter(lambda word: isinstance(word, str), declared)) or f"--{name.replace('_', '-')}"
            default = f" [default: {about.show_default}]" if isinstance(about.show_default, str) else ""
            said = (about.help or "").replace("\\[", "[")
            lines.append(f"{about.rich_help_panel or ''} | {flags}: {said}{default}")
    held("\n".join(lines) + "\n", f"help/{command}.txt")
