"""The documents say what the committed result files say, and every committed file is a valid result."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from benchmarks import bring_home, claims
from bgcbench import results
from bgcbench.measure.statistics import Interval, Ratio
from bgcbench.results.aggregate import Spread

FILES = sorted((claims.ROOT / "results").glob("*.json"))


def test_the_documents_say_what_the_files_say() -> None:
    for path, text in claims.documents():
        assert path.read_text(encoding="utf-8") == text, "run python -m benchmarks.claims --write"


def test_every_claim_names_a_file_that_is_there_and_every_table_is_full() -> None:
    for table in (make() for make in claims.TABLES):
        places = [(claim.row, claim.column) for claim in table.claims]
        assert places
        assert len(set(places)) == len(places), table.title
        assert all((claims.ROOT / "results" / name).exists() for name in table.files)


def raw(name: str) -> list[dict[str, Any]]:
    """The rows of a file as JSON."""
    rows: list[dict[str, Any]] = json.loads((claims.ROOT / "results" / name).read_text(encoding="utf-8"))["results"]
    return rows


def value(table: claims.Table, file: str, column: str, **at: Any) -> Any:
    (claim,) = [c for c in table.claims if (c.file, c.column) == (file, column) and at.get("row", c.row) == c.row]
    return claim.field(claims.opened(claims.ROOT, file), claim.at)


def test_a_speed_up_is_the_standard_convolutions_median_time_over_the_rows() -> None:
    medians = {
        (row["params"]["variant"], row["params"]["groups"]): statistics.median(row["phases"]["fwd_bwd"]["samples_s"])
        for row in raw(claims.TABLE4)
    }
    found = value(claims.layer_speed(), claims.TABLE4, "BGC N=4")
    assert found.value == pytest.approx(medians["standard", 1] / medians["bgc", 4])
    assert found.ci95.low < found.value < found.ci95.high
    equal = value(claims.equal_parameters(), claims.TABLE4, "BGC N=16 / GC N=8")
    assert equal.value == pytest.approx(medians["gc", 8] / medians["bgc", 16])


def test_errors_are_means_over_the_seeds() -> None:
    trained = [row["error_final"] for row in raw(claims.TRAINED)
               if (row["params"]["variant"], row["params"]["groups"]) == ("bgc", 8)]  # fmt: skip
    found = value(claims.trainings(), claims.TRAINED, "error, last epoch", row=("BGC N=8",))
    assert (found.mean, found.sd) == pytest.approx((statistics.mean(trained), statistics.stdev(trained)))
    copied = [
        row["epochs"][0]["test_error"]
        for row in raw(claims.TRANSFERRED)
        if {"variant": "gc", "groups": 4, "init": "copy", "rebn": True}.items() <= row["params"].items()
    ]
    found = value(claims.conversions(), claims.TRANSFERRED, "after 1 epoch", row=("GC N=4", "copy"))
    assert found.mean == pytest.approx(statistics.mean(copied))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        ("7 of 7", "7 of 7"),
        (claims.Number(0.256, ".0%"), "26%"),
        (Spread(1.234, None, 1), "1.23"),
        (Spread(1.234, 0.5, 3), "1.23 ± 0.50"),
        (Ratio(1.5, Interval(1.25, 1.75), True), "1.50 (1.25-1.75)"),
        (Ratio(2.25, Interval(1.94, 2.61), True), "2.2 (1.9-2.6)"),
        (Ratio(3.376, Interval(3.374, 3.377), True), "3.38 (3.37-3.38)"),
        (Ratio(1.5, None, False), "1.50"),
    ],
)
def test_a_number_is_written_in_one_way(number: claims.Value, text: str) -> None:
    assert claims.text_of(number) == text


def test_a_table_has_a_dash_where_nothing_is_claimed() -> None:
    claim = claims.Claim(("GC",), "a", claims.SOLVER, None, lambda *_: "1")
    other = claims.Claim(("BGC",), "b", claims.SOLVER, None, lambda *_: "2")
    lines = claims.Table("", "", ("variant",), [claim, other]).markdown().splitlines()
    assert lines == ["| variant | a | b |", "| --- | ---: | ---: |", "| GC | 1 | - |", "| BGC | - | 2 |"]


@pytest.mark.parametrize(("said", "code"), [("as it is", 0), ("something else", 1)])
def test_the_check_names_a_document_that_is_stale(
    said: str, code: int, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "page.md").write_text("as it is")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "documents", lambda: [(tmp_path / "page.md", said)])
    monkeypatch.setattr("sys.argv", ["claims"])
    assert claims.main() == code
    assert ("page.md" in capsys.readouterr().out) is bool(code)


def test_only_what_stands_between_the_marks_is_written() -> None:
    text = "a\n<!-- claims: speed -->\nold\n<!-- end of claims -->\nb\n<!-- end of claims -->"
    start, _, rest = claims.put_into(text).partition("\n\n| device")
    assert start == "a\n<!-- claims: speed -->"
    assert rest.endswith("|\n\n<!-- end of claims -->\nb\n<!-- end of claims -->")
    assert "old" not in rest
    assert claims.put_into("no marks") == "no marks"


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.name.startswith("train-") and "speed" not in f.name], ids=lambda path: path.name
)
def test_a_committed_training_is_complete(path) -> None:
    document = results.read(path)
    assert document.complete
    assert document.quality == "full"
    for row in document.results:
        assert row.status == "ok"
        assert len(row.epochs) == row.params.epochs


def test_the_committed_conversions_are_whole() -> None:
    document = results.read(claims.ROOT / "results" / claims.TRANSFERRED)
    assert {row.status for row in document.results} == {"ok"}
    assert {row.params.seed for row in document.results} == {0, 1, 2}


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.name.startswith(("table4", "network"))], ids=lambda path: path.name
)
def test_a_committed_run_is_complete_and_of_full_quality(path) -> None:
    document = results.read(path)
    assert document.complete
    assert document.quality == "full"
    assert {row.status for row in document.results} == {"ok"}
    for row in document.results:
        for phase in row.phases.values():
            assert len(phase.samples_s) == phase.summary.n >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_a_place_on_somebodys_machine(path) -> None:
    assert not bring_home.MACHINE_PATH.search(path.read_text(encoding="utf-8"))
    assert json.loads(path.read_text(encoding="utf-8"))["environment"]["torch"]
