"""``bgcbench report``: the page, as it is read by a parser and by a browser."""

from __future__ import annotations

import base64
import builtins
import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bgcbench import plots, results
from bgcbench.cli import main
from bgcbench.report import html
from tests.browser import browser
from tests.conftest import ROOT
from tests.example import example_document
from tests.example_approx import network
from tests.example_plan import plan_document
from tests.example_train import train_document
from tests.example_transfer import transfer_document
from tests.reporting import report_of, typed

Json = dict[str, Any]
EXAMPLE = ROOT / "docs" / "example-report.html"
EMPTY = ("meta", "br", "img", "link", "input")
NASTY = "</td><script>alert(1)</script>&amp; \u202e"


class Reader(HTMLParser):
    """The tables of a page as lists of rows of texts; its elements with their attributes; its texts and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data
        else:
            self.texts.append(data.strip())


def page_of(*documents: Json) -> str:
    return html.page([html.Part(number, f"{number}.json", typed(document), report_of(document), [])
                      for number, document in enumerate(documents, 1)])  # fmt: skip


DOCUMENTS = [example_document, network, plan_document, train_document, transfer_document]


@pytest.mark.parametrize("make", DOCUMENTS)
def test_the_page_has_what_a_terminal_has(make: Any) -> None:
    shown, reader = report_of(make()), Reader(page_of(make()))
    overview, *tables = reader.tables
    assert overview[1][0] == "1.json"
    for table, found in zip(shown.tables, tables, strict=True):
        assert found[0] == [column.title for column in table.columns]
        assert found[1:] == [list(row) for row in zip(*table.cells, strict=True)]
        assert {entry for entries in table.sections.values() for entry in entries} <= set(reader.texts)
    assert set(shown.notes or ()) <= set(reader.texts)


def test_what_a_file_says_is_text_and_nothing_on_the_page_comes_from_elsewhere() -> None:
    document = example_document()
    document["results"][1] |= {"status": "error", "reason": NASTY, "phases": {}}
    document["argv"] = ["profile", NASTY]
    document["environment"]["device"]["name"] = NASTY
    page = page_of(document)
    reader = Reader(page)
    assert not reader.open
    assert any("</td><script>alert(1)</script>&amp; \\u202e" in text for text in reader.texts)
    assert "\u202e" not in page
    (script,) = reader.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [about["content"] or "" for tag, about in reader.elements if about.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    addresses = [about.get(name) for _, about in reader.elements for name in ("href", "src") if name in about]
    assert addresses == ["#file-1"]
    assert "@import" not in page
    assert "url(" not in page


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two results, one of them with pictures, and of a file that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, document in (("layer", example_document()), ("trained", train_document())):
        results.ResultWriter(tmp_path / "runs" / f"{name}.json").write(typed(document))
    (tmp_path / "runs" / "other.json").write_text('{"schema": {"name": "another"}}')
    return tmp_path


def test_a_folder_is_its_result_files_with_pictures_that_are_told_in_words(files: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", "runs", "runs/layer.json", "-o", "page.html"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0].startswith("left out: runs/other.json is not a bgcbench result")
    assert said.err.splitlines()[1] == "page.html: 2 result files, 3 pictures"
    page = (files / "page.html").read_text(encoding="utf-8")
    reader = Reader(page)
    pictures = [about for tag, about in reader.elements if tag == "svg"]
    assert [about["role"] for about in pictures] == ["img"] * 3
    assert (pictures[1]["aria-label"] or "").startswith("Test error after the last epoch, ")
    assert "Legend: SC, GC" in (pictures[1]["aria-label"] or "")
    commands = [text for text in reader.texts if text.startswith("bgcbench ")]
    assert commands[-2:] == [f"bgcbench show runs/trained.json --plot trained-{name}.svg --picture {name}"
                             for name in ("errors", "curves")]  # fmt: skip
    ids = [about["id"] for _, about in reader.elements if "id" in about]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'"#([^"]+)"|url\(#(.+?)\)', page))
    assert {one or other for one, other in referred} <= set(ids)


def test_the_page_is_whole_without_matplotlib_and_says_how_to_get_pictures(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = builtins.__import__

    def gone(name: str, *more: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return there(name, *more)

    monkeypatch.setattr(builtins, "__import__", gone)
    assert main(["report", "runs/trained.json"]) == 0
    text = (files / "report.html").read_text(encoding="utf-8")
    assert "<svg" not in text
    assert plots.MISSING in Reader(text).texts


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["runs/layer.json", "-o", "page.pdf"], 2, "must end in .html"),
        (["runs/layer.json", "-o", "there.html"], 4, "--out there.html exists; use --force"),
        (["gone.json"], 2, "gone.json cannot be read"),
        (["runs/other.json"], 2, "is not a bgcbench result"),
        (["empty"], 2, "no result file in empty"),
        ([], 2, "Missing argument 'files'"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_page(
    files: Path, arguments: list[str], code: int, words: str, capsys: Any
) -> None:
    (files / "there.html").write_text("mine")
    (files / "empty").mkdir()
    assert main(["report", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (files / "there.html").read_text() == "mine"
    assert not (files / "report.html").exists()


def without_pictures(page: str) -> str:
    return re.sub(r"<figure>.*?</figure>\n", "", page, flags=re.DOTALL)


def test_the_example_in_the_documents_is_what_the_command_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """BGCBENCH_GOLDEN=write makes it anew, which is the only time that its pictures are drawn here."""
    monkeypatch.chdir(ROOT)
    if os.environ.get("BGCBENCH_GOLDEN") == "write":
        assert main(["report", "results", "--out", str(EXAMPLE), "--force"]) == 0
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert text.count("<svg") == text.count("<figure>") > 10
    monkeypatch.setattr(plots, "inline_pictures", lambda document, prefix: [])
    made: list[str] = []
    monkeypatch.setattr(results.files, "write_named", lambda path, option, content: made.append(content.decode()))
    assert main(["report", "results", "--out", "example.html"]) == 0
    assert without_pictures(text) == made[0]


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser_nothing_is_wider_than_the_page_and_keys_sort_a_table(width: int, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(EXAMPLE, width)
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.value("Math.max(...[...document.body.querySelectorAll('h1, h2, p, li, dd, .scroll')]"
                          ".map((each) => each.getBoundingClientRect().right))") <= width  # fmt: skip
        title = "[...document.querySelectorAll('h2')].find((h2) => h2.textContent.includes('fp32-nchw-algorithms'))"
        file = f"document.querySelector(`[aria-labelledby=${{{title}.id}}]`)"
        params = f"[...{file}.querySelectorAll('th')].findLast((each) => each.textContent === 'params')"
        column = (
            f"[...{params}.closest('table').tBodies[0].rows].map((row) => "
            f"Number(row.cells[{params}.cellIndex].dataset.sort))"
        )
        measured = page.value(column)
        assert len(measured) > 5
        assert measured != sorted(measured)
        page.value(f"{params}.previousElementSibling.querySelector('button').focus()")
        page.press("Tab")
        for order, expected in (("ascending", sorted(measured)), ("descending", sorted(measured, reverse=True)),
                                (None, measured)):  # fmt: skip
            page.press("Enter")
            assert (page.value(f"{params}.ariaSort"), page.value(column)) == (order, expected)
        assert page.complaints == []


@pytest.mark.browser
def test_a_page_in_another_order_keeps_what_is_unknown_last(tmp_path: Path) -> None:
    document = example_document()
    document["results"][1]["counts"] = None
    (tmp_path / "page.html").write_text(page_of(document), encoding="utf-8")
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html", 800)
        head = "[...document.querySelectorAll('#file-1 th')].find((each) => each.textContent === 'white err')"
        texts = f"[...{head}.closest('table').tBodies[0].rows].map((row) => row.cells[{head}.cellIndex].textContent)"
        for _ in range(2):
            page.value(f"{head}.querySelector('button').click()")
            found = page.value(texts)
            unknown = found.count("-")
            assert unknown
            assert found[-unknown:] == ["-"] * unknown
        assert page.complaints == []
