"""Result files from strangers: whatever stands in one, it is shown as it is, or refused in one line."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from bgcbench import report, results
from bgcbench.cli import main
from bgcbench.errors import ResultFileError
from bgcbench.results import document_of, printable
from tests.conftest import ROOT
from tests.example import example_document

Json = dict[str, Any]
FILES = (
    "table4-cpu-fp32-nchw",
    "network-resnet50-cpu-fp32-nchw-layers",
    "approx-figures-cpu",
    "approx-wrn_16_4-digits-cpu",
    "train-quickstart-cpu",
    "transfer-wrn_16_4-digits-cpu",
)
ESCAPES = "\x1b[31mred\x1b[0m\x07\x9b2J\u202e\r\n"
MARKUP = "*em* __strong__ `code` [link](x) ![image](x) <b>html</b> ~~gone~~ a|b [bold]rich[/bold] &lt;"
WRONG: tuple[Any, ...] = (
    None, -1, 0, -0.004, 1e300, 10**400, 1e-300, math.nan, math.inf, True, "", "\ud800", ESCAPES, MARKUP, [], {},
    [ESCAPES], {ESCAPES: MARKUP},
)  # fmt: skip
MISSING = object()


def short(name: str) -> Json:
    """A file of results/ with one row of each kind, and few samples."""
    document: Json = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    kinds: dict[Any, list[Json]] = {}
    for row in document["results"]:
        kinds.setdefault((row["params"]["variant"], "layer" in row["params"]), []).append(row)
    document["results"] = [row for rows in kinds.values() for row in rows[:1]]
    for row in document["results"]:
        for measured in row.get("phases", {}).values():
            measured |= {name: measured[name][:7] for name in ("samples_s", "rounds")}
    return document


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def alike(document: Json) -> dict[tuple[Any, ...], list[tuple[Any, ...]]]:
    """All places but the whole, those together that differ only in the row, the sample or the layer."""
    found: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in places(document):
        if path:
            found.setdefault(tuple("#" if isinstance(key, int) else key for key in path), []).append(path)
    return found


def changed(document: Json, value: Any, *paths: tuple[Any, ...]) -> Json:
    """A copy with ``value`` in these places, or without them."""
    document = copy.deepcopy(document)
    for path in paths:
        at = _at(document, path[:-1])
        if value is MISSING:
            del at[path[-1]]
        else:
            at[path[-1]] = value
    return document


def _at(document: Json, path: tuple[Any, ...]) -> Any:
    value: Any = document
    for key in path:
        value = value[key]
    return value


def shown(document: Json, form: str) -> str:
    out = io.StringIO()
    report.emit(report.document_report(document_of(document, "r.json")), form, Console(file=out, width=100), document)
    return out.getvalue()


def check_shown(document: Json) -> None:
    """Every format shows it, in text that no terminal acts on."""
    for form in ("table", "markdown", "csv", "json"):
        for line in shown(document, form).split("\n"):
            assert line == printable(line), form
    if document["command"] == "profile" and any(row["phases"] for row in document["results"]):
        typed = document_of(document, "r.json")
        report.settings_that_differ(typed, typed)
        report.compare_report(typed, typed, ("a.json", "b.json"), 0.03)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_anything_in_it_is_shown_or_refused(name: str, tmp_path: Path) -> None:
    document, draw = short(name), random.Random(name)
    check_shown(document)
    refused = 0
    for paths in draw.sample(list(alike(document).values()), 40):
        path = draw.choice(paths)
        tried = changed(document, draw.choice((MISSING, *WRONG)), path)
        (tmp_path / "r.json").write_text(json.dumps(tried), encoding="utf-8")
        try:
            results.document.read(tmp_path / "r.json")
        except ResultFileError:
            refused += 1
        else:
            check_shown(tried)
    assert 0 < refused < 40


@pytest.mark.parametrize("name", FILES)
def test_markup_in_a_file_is_text(name: str) -> None:
    """All of its free strings replaced at once; what a Markdown reader makes of the output is text and our tables."""
    document = short(name)
    for number, paths in enumerate(alike(document).values()):
        texts = [path for path in paths if isinstance(_at(document, path), str)]
        tried = changed(document, f"{number} {ESCAPES}{MARKUP}", *texts)
        try:
            document_of(tried, "r.json")
        except ResultFileError:
            continue  # a word of a list
        document = tried
    check_shown(document)
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = reader.parse(shown(document, "markdown"))
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or ()}
    assert {
        kind for kind in kinds if not re.match("table|thead|tbody|t[rhd]_|bullet_list|list_item|paragraph", kind)
    } == {
        "inline",
        "text",
        "softbreak",
    } & kinds
    text = "".join(child.content for token in tokens for child in token.children or ())
    assert MARKUP in text


def one_cell(title: str, header: str, cell: str, note: str) -> report.Report:
    column = report.Column(header, lambda row: row, right=False)
    return report.Report([report.Table([title], [column], [cell], {"Notes": [note]})])


@pytest.mark.parametrize("text", ["# x", "> x", "- x", "+ x", "1. x", "12) x", "= x", "    x", "=", "---", "x\n# y"])
def test_no_line_of_a_file_begins_a_block_of_its_own(text: str) -> None:
    markdown = report.as_markdown(one_cell(text, text, text, text))
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    assert [token.type for token in tokens if token.type.endswith("_open") and token.level == 0] == [
        "paragraph_open", "table_open", "paragraph_open", "bullet_list_open",
    ]  # fmt: skip
    assert sum(token.type == "list_item_open" for token in tokens) == 1
    first = next(token.children[0].content for token in tokens if token.children)
    assert first == printable(text).strip()


def test_numbers_and_names_are_not_escaped() -> None:
    for text in ("wrn_10_2 95% CI 1.98 [1.97, 1.99] -> +0.40 ± 0.20 (<0.1)", "3x3 256->256 /2", "-0.40", "1.5 MiB"):
        table = report.as_markdown(one_cell("t", "a", text, f"x {text}"))
        assert f"| {text} |" in table
        assert f"- x {text}" in table


def test_a_text_that_a_spreadsheet_would_compute_is_text() -> None:
    table = report.as_csv(report.Report([], records=[{"a": "=1+1", "b": -1.5, "c": "x", "d": None, "@e": ["-1"]}]))
    assert table == "a,b,c,d,'@e\n'=1+1,-1.5,x,,['-1']\n"


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("results", 0, "phases", "fwd", "summary", "median_s"), -0.004, "results/0/phases/fwd/summary/median_s"),
        (("results", 0, "phases", "fwd", "samples_s", 3), 0, "results/0/phases/fwd/samples_s/3"),
        (("results", 0, "phases", "fwd", "rounds"), [1], "results/0/phases/fwd: samples_s and rounds"),
        (("results", 1, "counts", "params"), 10**40, "results/1/counts/params"),
        (("ceilings", "flops_per_s"), math.nan, "ceilings/flops_per_s"),
        (("config", "batch"), "many", "config/batch"),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused_by_its_place(
    path: tuple[Any, ...], value: Any, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(changed(example_document(), value, path)), encoding="utf-8")
    for command in (["show", str(file)], ["compare", str(file), str(file)]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        # typed reading leaves out keys that are no fields, such as a phase
        assert f"r.json is damaged: {place}" in line or f"r.json is damaged: {place.replace('fwd/', '')}" in line


def test_messages_hold_nothing_that_a_terminal_acts_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(changed(example_document(), ESCAPES, ("config", "layout"))), encoding="utf-8")
    assert main(["profile", "--resume", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown layout '\\x1b[31mred" in line


def test_a_picture_of_a_strangers_file_is_drawn_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ("approx-figures-cpu", ("results", 0, "params", "groups"), 1),
        ("approx-figures-cpu", ("results", 0, "params", "variant"), "novel"),
        ("approx-figures-cpu", ("results", 0, "error"), -1),
        ("train-quickstart-cpu", ("results", 0, "params", "variant"), ESCAPES),
        ("train-quickstart-cpu", ("results", 0, "params", "dataset"), "$\\frac" + ESCAPES),
    ]
    for number, (name, path, value) in enumerate(cases):
        file = tmp_path / "r.json"
        file.write_text(json.dumps(changed(short(name), value, path)), encoding="utf-8")
        code = main(["show", str(file), "--plot", str(tmp_path / f"{number}.svg")])
        assert code in (0, 2)
        assert len(capsys.readouterr().err.splitlines()) == (code == 2)


def test_square_brackets_are_no_markup_of_a_table() -> None:
    """rich would drop '[bold]', and end with an error at '[/nope]'."""
    text = "[bold]x[/nope]"
    shown_as = io.StringIO()
    report.emit(one_cell(text, text, text, text), "table", Console(file=shown_as, width=100))
    assert shown_as.getvalue().count(text) == 4
