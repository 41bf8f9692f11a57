"""The JSON Schema of a result file, made from the types of its rows."""

from __future__ import annotations

from typing import Any

import msgspec

from bgcbench.results.document import SCHEMA_NAME, Document
from bgcbench.results.rows import COMMANDS

_REFERENCE = "#/$defs/{name}"


def schema() -> dict[str, Any]:
    """Of every document that this version writes and reads; rows of a command are of its types."""
    kinds = [kind for command in COMMANDS.values() for kind in command.rows]
    (document, *_), parts = msgspec.json.schema_components([Document, *kinds], ref_template=_REFERENCE)
    cases = []
    for name, command in COMMANDS.items():
        items = {"anyOf": [{"$ref": _REFERENCE.format(name=kind.__name__)} for kind in command.rows]}
        then = {"properties": {"results": {"items": items}}}
        cases.append({"if": {"properties": {"command": {"const": name}}}, "then": then})
    parts["Schema"]["properties"]["name"] = {"const": SCHEMA_NAME}
    parts["Document"]["properties"]["command"] = {"enum": sorted(COMMANDS)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": parts, "allOf": [document, *cases]}
