"""What every command keeps of a file that it goes on with: all that is done, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bgcbench.cli import main
from bgcbench.models import build_model
from bgcbench.specs import NetSpec
from tests.stored import stored

pytestmark = pytest.mark.usefixtures("brisk", "one_thread", "tried_once")

SHARED = ["--device", "cpu", "--threads", "1", "--quiet", "--variants", "gc,bgc"]
SHORT = ["--quick", "--max-time", "0.01"]
IMAGES = ["--data", "digits", "--size", "8"]
COMMANDS = {
    "profile": ["--channels", "8", "--size", "4", "--batch", "2", *SHORT],
    "profile --model": ["--model", "wrn_10_1", "--size", "8", "--batch", "2", *SHORT],
    "approx": ["--channels", "8", "--dims", "1", "--length", "8", "--samples", "4"],
    "approx --model": ["--model", "wrn_10_1", *IMAGES, "--calibration-images", "8"],
    "train": ["wrn_10_1", *IMAGES, "--epochs", "1", "--subset", "64", "--batch-size", "32"],
    "transfer": ["wrn_10_1", *IMAGES, "--weights", "mine.pt", "--epochs", "0", "--calibration-images", "8"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_whole_file_is_left_as_it_is_and_a_larger_grid_keeps_what_is_done_and_measures_the_rest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(build_model(NetSpec("wrn_10_1", 10, 8)).state_dict(), "mine.pt")
    command, *_ = name.split()
    assert main([command, *COMMANDS[name], *SHARED, "--groups", "2", "--out", "r.json"]) == 0
    first, table = stored("r.json"), capsys.readouterr().out

    assert main([command, "--resume", "r.json", "--quiet"]) == 0
    assert stored("r.json")["results"] == first["results"]
    assert capsys.readouterr().out == table

    assert main([command, "--resume", "r.json", "--groups", "2,4", "--ranks", "2,3", "--quiet"]) == 0
    second = stored("r.json")
    kept = {row["key"]: row for row in second["results"]}
    assert {row["key"]: kept[row["key"]] for row in first["results"]} == {row["key"]: row for row in first["results"]}
    assert len(kept) == len(second["results"]) > len(first["results"])
    assert {row["params"].get("rank") for row in second["results"]} == {None, 2, 3}
    assert (second["started_at"], second["argv"]) == (first["started_at"], first["argv"])
    assert (second["complete"], second["exit_reason"], second["warnings"]) == (True, "ok", first["warnings"])
