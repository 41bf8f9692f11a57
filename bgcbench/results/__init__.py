"""Result files: the types of their rows, how they are written so that they are never broken, how they are read."""

from bgcbench.results.document import (
    SCHEMA_NAME,
    Document,
    Json,
    check_command,
    document_of,
    dumps,
    printable,
    stage_of,
    typed,
    utc_now,
)
from bgcbench.results.files import ResultWriter, default_path, rescue, write_atomically
from bgcbench.results.rows import DONE
from bgcbench.results.untyped import (
    SCHEMA_VERSION,
    check_document,
    check_resumable,
    finish,
    measurement_warnings,
    new_document,
    read,
    reopened,
    schema,
    upgraded,
)

__all__ = [
    "DONE",
    "SCHEMA_NAME",
    "SCHEMA_VERSION",
    "Document",
    "Json",
    "ResultWriter",
    "check_command",
    "check_document",
    "check_resumable",
    "default_path",
    "document_of",
    "dumps",
    "finish",
    "measurement_warnings",
    "new_document",
    "printable",
    "read",
    "reopened",
    "rescue",
    "schema",
    "stage_of",
    "typed",
    "upgraded",
    "utc_now",
    "write_atomically",
]
