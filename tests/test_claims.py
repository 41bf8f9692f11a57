"""The documents say what the committed result files say, and every committed file is a valid result."""

from __future__ import annotations

import json

import jsonschema
import pytest

from benchmarks import bring_home, claims
from bgcbench import results

FILES = sorted((claims.ROOT / "results").glob("*.json"))


@pytest.mark.parametrize(("name", "prefix"), claims.DOCUMENTS.items())
def test_the_table_of_claims_is_drawn_from_the_files(name: str, prefix: str) -> None:
    text = (claims.ROOT / name).read_text(encoding="utf-8")
    assert claims.put_into(text, prefix) == text, "run python -m benchmarks.claims --write"


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.name.startswith("train-") and "speed" not in f.name], ids=lambda path: path.name
)
def test_a_committed_training_is_complete(path) -> None:
    document = results.read(path)
    jsonschema.validate(document, results.schema())
    assert document["complete"]
    assert document["quality"] == "full"
    for row in document["results"]:
        assert row["status"] == "ok"
        assert len(row["epochs"]) == row["params"]["epochs"]


def test_the_committed_conversions_are_whole_and_valid() -> None:
    document = results.read(claims.ROOT / "results" / claims.TRANSFERRED)
    jsonschema.validate(document, results.schema())
    assert {row["status"] for row in document["results"]} == {"ok"}
    assert {row["params"]["seed"] for row in document["results"]} == {0, 1, 2}


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.name.startswith(("table4", "network"))], ids=lambda path: path.name
)
def test_a_committed_run_is_complete_and_of_full_quality(path) -> None:
    document = results.read(path)
    jsonschema.validate(document, results.schema())
    assert document["complete"]
    assert document["quality"] == "full"
    assert {row["status"] for row in document["results"]} == {"ok"}
    for row in document["results"]:
        for phase in row["phases"].values():
            assert len(phase["samples_s"]) == phase["summary"]["n"] >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_a_place_on_somebodys_machine(path) -> None:
    assert not bring_home.MACHINE_PATH.search(path.read_text(encoding="utf-8"))
    assert json.loads(path.read_text(encoding="utf-8"))["environment"]["torch"]
