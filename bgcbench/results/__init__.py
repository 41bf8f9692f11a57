"""Result files: the types of their rows, how they are written so that they are never broken, how they are read."""

from bgcbench.results.document import (
    SCHEMA_NAME,
    SCHEMA_VERSION,
    Document,
    Json,
    check_command,
    check_resumable,
    document_of,
    dumps,
    new_document,
    printable,
    read,
    reopened,
    utc_now,
)
from bgcbench.results.files import ResultWriter, default_path, rescue, write_atomically
from bgcbench.results.json_schema import schema
from bgcbench.results.rows import DONE

__all__ = [
    "DONE",
    "SCHEMA_NAME",
    "SCHEMA_VERSION",
    "Document",
    "Json",
    "ResultWriter",
    "check_command",
    "check_resumable",
    "default_path",
    "document_of",
    "dumps",
    "new_document",
    "printable",
    "read",
    "reopened",
    "rescue",
    "schema",
    "utc_now",
    "write_atomically",
]
