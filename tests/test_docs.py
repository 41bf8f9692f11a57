"""What README.md and docs/ show is run: the fenced bash and python blocks, a page at a time in one empty folder.

A bash block that says "not run: REASON" after its language is parsed only: its commands and options must exist.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pytest
import typer.main

from bgcbench.cli import app, main
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+) *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, why it is not run (empty where it is) and what is in it."""

    language: str
    left_out: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """Its lines as words, without comments."""
        return filter(None, (shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()))


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def check_options(words: list[str]) -> None:
    """Parse a command without running it, as click does: an option or a value that does not exist raises."""
    if "benchmarks" in " ".join(words):
        assert importlib.util.find_spec(words[words.index("-m") + 1])
    if "bgcbench" in words:
        command, *rest = words[words.index("bgcbench") + 1 :]
        COMMANDS[command].make_context(command, rest)


@pytest.mark.usefixtures("brisk", "one_thread", "tried_once")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "bash":
            for words in block.commands():
                check_options(words)
                if not block.left_out:
                    assert words[0] == "bgcbench", words
                    assert main([file for word in words[1:] for file in sorted(glob(word)) or [word]]) == 0, words
        elif block.language == "python":
            exec(compile(block.text, name_of(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert not block.left_out or re.fullmatch(r"not run: .+", block.left_out)
        assert block.language in ("bash", "python") or (not block.left_out and block.language in ("sh", "text"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_within_the_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    options = {name for command in COMMANDS.values() for option in command.params
               for name in (*option.opts, *option.secondary_opts)} | {"--help", "--version"}  # fmt: skip
    for span in re.findall(r"`([^`\n]+)`", text):
        words = span.split()
        if words[0] == "bgcbench" and len(words) > 1 and not {"COMMAND", "--help"} & set(words):
            check_options(words)
        elif words[0].startswith("--"):
            assert words[0] in options, span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_the_readme_is_one_page_and_keeps_the_two_commands_that_set_it_up() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert "python -m pip install . && bgcbench profile --channels 1024 --groups 2,4,8,16" in lines
    assert "python -m pip install '.[test]' && python -m pytest" in lines
