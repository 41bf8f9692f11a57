"""What this machine is, and what on it could spoil a measurement (``bgcbench doctor``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bgcbench.report.table import Column, Report, Table, label, words
from bgcbench.results.rows import Environment

Finding = tuple[str, str, str | None]  # what, how it stands, and the advice; None: all is well


def doctor_report(described: Mapping[str, Any], findings: Sequence[Finding]) -> Report:
    """The machine's environment, and the findings with advice."""
    machine = msgspec.convert(described, Environment)
    versions = {
        "python / torch / torchvision": (machine.python, machine.torch, machine.torchvision),
        "cuda / cudnn / triton / driver": (machine.cuda, machine.cudnn, machine.triton, machine.driver),
    }
    lines: list[Finding] = [("device", f"{machine.device.name} ({machine.device.type})", None)]
    lines += [(names, " / ".join(version or "-" for version in found), None) for names, found in versions.items()]
    lines += findings
    columns: list[Column[Finding]] = [
        label("what", lambda line: line[0], "What was looked at."),
        words("how it stands", lambda line: line[1], "What was found."),
        words("advice", lambda line: line[2] or "ok", "What to do, or ok."),
    ]
    concerns = sum(advice is not None for _, _, advice in lines)
    summary = f"{concerns} thing{'s' if concerns != 1 else ''} could spoil a measurement" if concerns else "all clear"
    records = [{"what": what, "state": state, "advice": advice} for what, state, advice in lines]
    return Report([Table(["bgcbench doctor"], columns, lines, {"Summary": [summary]})], records=records)
