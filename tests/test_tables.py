"""docs/tables.md explains every column once, in the words that ``show --explain`` prints.

BGCBENCH_GOLDEN=write python -m pytest tests/test_tables.py writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from bgcbench import report
from bgcbench.cli import main
from bgcbench.results import document_of
from bgcbench.results.document import read
from tests.conftest import ROOT
from tests.example import example_document
from tests.example_approx import network, sampled
from tests.example_conversion import conversion
from tests.example_plan import plan_document
from tests.example_train import train_document
from tests.example_transfer import transfer_document
from tests.reporting import report_of
from tests.test_golden import FILES, held

Json = dict[str, Any]
TITLES = {
    "profile": "bgcbench profile",
    "approx": "bgcbench approx",
    "plan": "bgcbench plan",
    "train": "bgcbench train",
    "transfer": "bgcbench transfer",
    "compare": "bgcbench compare",
    "table1": "bgcbench show --table1",
    "doctor": "bgcbench doctor",
    "convert": "bgcbench convert",
}
HEAD = """# Columns of the tables

`bgcbench show FILE --explain` prints the part that concerns one file, and all of its notes. A dash (-) is a value that
was not measured or is not known. Columns that a file has nothing for are left out of its tables. `--format csv` and
`--format json` hold the same numbers in SI units.
"""


def with_paper(document: Json, **more: Any) -> Json:
    for row in document["results"]:
        row |= {"paper": {"error": 25.0}, **more}
    return document


def with_rank(document: Json, **more: Any) -> Json:
    rows = [row | {"params": row["params"] | {"rank": 8}} | more for row in document["results"]]
    return document | {"results": rows}


def reports() -> Iterator[tuple[str, report.Report]]:
    """Reports that together have every column, by command."""
    for path in FILES:
        document = read(path)
        yield document.command, report.document_report(document)
    loss = {"expected": 0.5, "layers": [{"name": "conv", "loss": 0.4}]}
    for document in (
        example_document(),
        with_rank(example_document()),
        with_rank(sampled(), limit_relative_error=0.5),
        with_rank(network()),
        plan_document(),
        with_rank(train_document()),
        with_paper(train_document()),
        with_paper(transfer_document(epochs=3, control=True, time=True, rebn=(True, False)), error_final_top5=1.0),
        with_paper(transfer_document(dataset="none"), white_loss=loss),
        with_paper(transfer_document(dataset="unlabelled"), agreement_initial=90.0, agreement_final=95.0),
    ):
        yield document["command"], report_of(document)
    measured = document_of(example_document(), "the example")
    yield "compare", report.compare_report(measured, measured, ("a.json", "b.json"), None)[0]
    yield "table1", report.table1_report(8, 8, 3, (7, 7), (2,))
    yield "convert", report.conversion_report(conversion())
    yield "doctor", report.doctor_report(example_document()["environment"], [])


def meanings() -> dict[str, dict[str, str]]:
    """What each column means, by command and by the name under which it is explained."""
    found: dict[str, dict[str, str]] = {}
    for command, shown in reports():
        for table in shown.tables:
            for column in table.columns:
                name = column.name or column.title
                earlier = found.setdefault(command, {}).setdefault(name, column.meaning)
                assert earlier == column.meaning, (command, name)
    return found


def test_every_column_is_explained_once_in_the_documents() -> None:
    found = meanings()
    shared = {
        name: meaning
        for columns in found.values()
        for name, meaning in columns.items()
        if sum(name in others for others in found.values()) > 1
        and all(others.get(name, meaning) == meaning for others in found.values())
    }
    parts = {"In several tables": shared}
    parts |= {
        TITLES[command]: {name: meaning for name, meaning in columns.items() if name not in shared}
        for command, columns in found.items()
    }
    text = HEAD
    for title, columns in parts.items():
        assert all(columns.values()), title
        text += f"\n## {title}\n\n| column | meaning |\n| --- | --- |\n"
        text += "".join(f"| {name} | {meaning.replace('|', chr(92) + '|')} |\n" for name, meaning in columns.items())
    held(text, "../../docs/tables.md")


def test_explain_prints_what_the_columns_of_a_file_mean_and_all_notes(capsys: Any) -> None:
    path = str(ROOT / "results" / "train-wrn_28_10-synthetic-cuda-fast-eager.json")
    assert main(["show", path, "--explain", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    shown = report.document_report(read(ROOT / path))
    for column in shown.tables[0].columns:
        assert f"| {column.name or column.title} | {column.meaning} |" in text
    assert shown.notes is not None
    assert len(shown.notes) > 4
    assert text.count("\n- ") == len(shown.notes)
    assert main(["show", path, "--explain", "--format", "json"]) == 0
    assert [entry["column"] for entry in json.loads(capsys.readouterr().out)][:2] == ["variant", "N"]
    for arguments in (["show", "--explain"], ["show", "--explain", "--table1"]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
