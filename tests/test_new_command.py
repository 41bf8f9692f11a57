"""A command is its rows with their entry of COMMANDS, its run, its class in cli/ and its columns: four files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator as Validator

from bgcbench import cli, results
from bgcbench.cli import main
from bgcbench.cli.run import Beginning, Command
from bgcbench.experiments.approx_run import Step
from bgcbench.experiments.base import Run, Session, open_device
from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.options import WORKLOAD, option, positive
from bgcbench.measure.counts import count
from bgcbench.plots.style import Paint
from bgcbench.report.table import Column, Report, Table, group_columns, row_record, words
from bgcbench.results import Document
from bgcbench.results.rows import COMMANDS, Chosen, CommandSpec, Row
from bgcbench.specs import ConvSpec


class SizeRow(Row, frozen=True):  # 1: results/rows.py, with its entry
    params: Chosen
    weights: int


SIZE = CommandSpec(f"{__name__}:Size", (SizeRow,), f"{__name__}:report", {"sizes": f"{__name__}:picture"})


@dataclass(frozen=True)
class SizeConfig(RunConfig):  # 2: experiments/size.py
    channels: int = option(64, "Channels in and out of the layer.", panel=WORKLOAD, check=positive)
    what = "layer"

    def weights(self, of: Chosen) -> int:
        return count(ConvSpec(of.variant, self.channels, self.channels, 3, groups=of.groups, bias=False), 7, 7).params


class SizeRun(Run[SizeRow]):
    def __init__(self, config: SizeConfig, kept: Mapping[str, SizeRow]) -> None:
        self.config, self.known, self.warnings = config, dict(kept), []
        chosen = [Chosen(variant=each.variant, groups=each.groups) for each in config.choices]
        self.planned = [SizeRow(f"{of.variant}-n{of.groups}", "ok", None, of, config.weights(of)) for of in chosen]
        self.plan_lines = [f"plan: {len(self.planned)} rows"]

    def run(self) -> Iterator[Step]:
        for row in self.planned:
            yield Step(self.known.setdefault(row.key, row).key, save=True)


class Size(Command):  # 3: cli/size.py
    """Count the weights of each variant."""

    summary = "Count weights."
    kinds = (SizeConfig,)

    def open_session(self, config: Any) -> Session:
        return open_device(config, config.device)

    def prepare(self, config: Any, session: Session, world: Any) -> SizeConfig:
        return config

    def start(self, prepared: Any, session: Session, world: Any, beginning: Beginning) -> SizeRun:
        return SizeRun(prepared, beginning.kept)


def report(document: Document) -> Report:  # 4: report/size.py
    columns: list[Column[SizeRow]] = [
        words("variant", lambda row: row.params.variant, "What stands in."),
        *group_columns(lambda row: row.params),
        Column("weights", lambda row: row.weights, "Of its kernels."),
    ]
    records = [row_record(row, ()) for row in document.results]
    return Report([Table(["Weights"], columns, document.results)], records=records)


def picture(document: Document) -> Paint:  # and, where it has any, its picture in plots/
    return lambda panel: panel.subplots().plot([row.weights for row in document.results])


def test_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "size", SIZE)
    monkeypatch.setattr(cli, "app", cli.application())
    assert main(["size", "--channels", "0"]) == 2
    assert main(["size", "--channels", "8", "--groups", "2", "--device", "cpu", "--out", "size.json"]) == 0
    found = json.loads(Path("size.json").read_text())
    schema = Validator(results.schema())
    assert schema.is_valid(found)
    assert [row["weights"] for row in found["results"]] == [9 * 8 * 8 // 2, 2 * 9 * 8 * 8 // 2]
    found["results"][0]["weights"] = "many"
    assert not schema.is_valid(found)
    found["results"][0]["weights"] = 1  # a row that is there is kept as it is
    Path("size.json").write_text(json.dumps(found))
    assert main(["size", "--resume", "size.json", "--groups", "4"]) == 0
    capsys.readouterr()
    assert main(["show", "size.json", "--format", "csv", "--plot", "size.svg"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "key,variant,groups,status,reason,weights",
        *("gc-n2,gc,2,ok,,1", "bgc-n2,bgc,2,ok,,576", "gc-n4,gc,4,ok,,144", "bgc-n4,bgc,4,ok,,288"),
    ]
    assert main(["show", "size.json", "--format", "markdown"]) == 0
    assert "| bgc | 4 | 288 |" in capsys.readouterr().out.splitlines()
    assert main(["report", "size.json", "--out", "size.html"]) == 0
    assert "<svg" in Path("size.html").read_text()
    assert main(["show", "size.json", "--plot", "x.svg", "--picture", "curves"]) == 2
    assert "curves is no picture of 'size' results; they have sizes" in capsys.readouterr().err
    monkeypatch.delitem(COMMANDS, "size")
    assert main(["show", "size.json"]) == 2
    assert capsys.readouterr().err == "bgcbench: size.json is damaged: command: Invalid enum value 'size'\n"
    assert not Validator(results.schema()).is_valid(found | {"results": []})
