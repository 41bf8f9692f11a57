"""What a result file holds, as json reads it: what a user's own script would see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def stored(path: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found
