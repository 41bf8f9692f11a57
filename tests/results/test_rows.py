"""The types of a result's rows: they read every file that was ever written, and lose nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bgcbench.results.document import Document, document_of, dumps, loaded, read
from bgcbench.results.json_schema import schema

RESULTS = Path(__file__).parent.parent.parent / "results"
FILES = [path for path in sorted(RESULTS.glob("*.json")) if "bgcbench.result" in path.read_text()[:200]]
# What reading concludes for a file of an older version; a record of a conversion says everything since 1.1.
CONCLUDED = {"stage", "code"}
DEFAULTS = (None, {}, [], 0, 1)  # what a field may be that a file leaves out


def lost(raw: Any, again: Any, place: str) -> list[str]:
    """Where ``again`` is not what ``raw`` says, but for what the types' defaults stand for."""
    if isinstance(raw, dict):
        gone = [f"{place}/{name}" for name, value in raw.items() if name not in again and value not in DEFAULTS]
        added = again.keys() - raw.keys() - CONCLUDED if "convert" not in place else ()
        more = [f"{place}/+{name}" for name in added if again[name] not in DEFAULTS]
        return (
            gone + more + [one for name in raw if name in again for one in lost(raw[name], again[name], place + name)]
        )
    if isinstance(raw, list):
        if len(raw) != len(again):
            return [place]
        return [one for old, new in zip(raw, again, strict=True) for one in lost(old, new, f"{place}[]")]
    return [] if raw == again else [f"{place}: {raw} {again}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_read_whole_and_is_of_the_schema(path: Path) -> None:
    raw, document = loaded(path), read(path)
    again = json.loads(dumps(document))
    assert isinstance(raw, dict)
    raw.pop("warnings"), again.pop("warnings")  # those in words that a row has as a code are left out
    assert lost(raw, again, "") == []
    assert document_of(again | {"warnings": []}, "again").results == document.results
    # As it is written again, tests of the commands hold it against the schema.
    assert not list(jsonschema.Draft202012Validator(schema()).iter_errors(raw | {"warnings": []}))


def test_a_row_that_is_not_of_its_type_is_refused_by_the_schema_too() -> None:
    raw = json.loads(dumps(read(FILES[0])))
    raw["results"][0]["counts"]["macs"] = -1
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(raw))


def test_what_a_resumed_run_keeps() -> None:
    document = read(RESULTS / "approx-figures-cpu.json")
    assert isinstance(document, Document)
    assert list(document.done) == [row.key for row in document.results]
