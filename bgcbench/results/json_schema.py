"""The JSON Schema of a result file, made from the types of its rows."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from bgcbench.results.document import SCHEMA_NAME, Command, Document, row_type

_REFERENCE = "#/$defs/{name}"


def schema() -> dict[str, Any]:
    """Of every document that this version writes and reads; rows of a command are of its types."""
    rows = {
        command: list({row_type(command, {"params": params}) for params in ({}, {"model": ""})})
        for command in get_args(Command)
    }
    kinds = [kind for several in rows.values() for kind in several]
    (document, *_), parts = msgspec.json.schema_components([Document, *kinds], ref_template=_REFERENCE)
    cases = [
        {
            "if": {"properties": {"command": {"const": command}}},
            "then": {"properties": {"results": {"items": {"anyOf": [{"$ref": _named(kind)} for kind in several]}}}},
        }
        for command, several in rows.items()
    ]
    parts["Schema"]["properties"]["name"] = {"const": SCHEMA_NAME}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": parts, "allOf": [document, *cases]}


def _named(kind: type) -> str:
    return _REFERENCE.format(name=kind.__name__)
