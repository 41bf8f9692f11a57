"""``--shard K/M`` runs a part of the rows of a plan, and ``bgcbench merge`` joins the parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bgcbench import results
from bgcbench.cli import main
from bgcbench.errors import UsageError
from bgcbench.experiments.options import in_shard
from bgcbench.specs import shard_of
from tests.stored import stored

SMALL = ["profile", "--channels", "16", "--batch", "2", "--size", "5", "--groups", "2,4", "--device", "cpu", "--quick",
         "--max-time", "0.01", "--quiet"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("brisk", "one_thread", "here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a whole run and of its two parts, once for all tests; by name."""
    folder = tmp_path_factory.mktemp("parts")
    for name, more in (("all", []), ("one", ["--shard", "1/2"]), ("two", ["--shard", "2/2"])):
        assert main([*SMALL, *more, "--out", str(folder / f"{name}.json")]) == 0
    return {path.name: path.read_text() for path in folder.glob("*.json")}


@pytest.fixture
def files(made: dict[str, str], here: Path) -> Path:
    for name, text in made.items():
        (here / name).write_text(text)
    return here


def keys(document: dict[str, Any]) -> list[str]:
    return [row["key"] for row in document["results"]]


@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_parts_share_the_rows_among_them(of: int) -> None:
    parts = [in_shard(f"{number}/{of}", range(7)) for number in range(1, of + 1)]
    assert sorted(row for part in parts for row in part) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert in_shard(None, range(7)) == list(range(7))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "2", "a/b", "1/2/3", "-1/2", ""])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be K/M, part K of M, such as 2/8"):
        shard_of(text)


def test_the_joined_file_has_the_rows_of_one_run_in_its_order(files: Path, capsys: Any) -> None:
    assert main(["merge", "two.json", "one.json", "-o", "joined.json"]) == 0
    assert capsys.readouterr().err == "joined.json: 5 rows of 2 parts\n"
    joined, whole = stored(files / "joined.json"), stored(files / "all.json")
    assert keys(joined) == keys(whole)
    assert joined["config"] == whole["config"]
    assert (joined["complete"], joined["exit_reason"]) == (True, "ok")
    assert main(["show", "joined.json"]) == 0
    # Rows of two parts were not in turn, whatever the numbers of their groups were.
    groups = {row["key"]: row["interleaved"] for row in joined["results"]}
    parts = [keys(stored(files / name)) for name in ("one.json", "two.json")]
    assert [len({groups[key] for key in part}) for part in parts] == [1, 1]
    assert len(set(groups.values())) == len(joined["interleaved"]) == 2


def test_parts_that_are_missing_are_told(files: Path, capsys: Any) -> None:
    one = json.loads((files / "one.json").read_text())
    for number in (1, 3):
        one["config"]["shard"] = f"{number}/3"
        (files / f"{number}.json").write_text(json.dumps(one))
    assert main(["merge", "1.json", "3.json", "-o", "joined.json"]) == 1
    assert "not complete: parts, or rows of parts, are missing" in capsys.readouterr().err
    assert results.read(files / "joined.json").exit_reason == "partial"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"config": {"shard": None}}, 2, "two.json is no part of a plan: it was made without --shard"),
        ({"config": {"shard": "1/2"}}, 2, "two.json is part 1/2, and so is one.json"),
        ({"config": {"shard": "2/3"}}, 2, "its number of parts is 3, and in one.json 2"),
        ({"config": {"batch": 8}}, 2, "two.json is a part of another plan: its batch is 8, and in one.json 2"),
        ({"settings": {"precision": "fp64"}}, 2, "its precision is fp64, and in one.json fp32"),
        ({"environment": {"torch": "9.9"}}, 2, "its torch is 9.9, and in one.json"),
        ({"quality": "full"}, 2, "its quality is full"),
    ],
)
def test_parts_of_other_plans_are_refused(
    change: dict[str, Any], code: int, words: str, files: Path, capsys: Any
) -> None:
    two = json.loads((files / "two.json").read_text())
    for name, value in change.items():
        two[name] = two[name] | value if isinstance(value, dict) else value
    (files / "two.json").write_text(json.dumps(two))
    assert main(["merge", "one.json", "two.json", "-o", "joined.json"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (files / "joined.json").exists()


def test_merge_needs_a_file_to_write_and_parts_to_read(files: Path, capsys: Any) -> None:
    assert main(["merge", "one.json", "two.json"]) == 2
    assert main(["merge", "one.json", "two.json", "-o", "all.json"]) == 4
    assert main(["merge", "one.json", "-o", "joined.json"]) == 2
    for words, line in zip(
        ("-o FILE", "exists", "two files or more"), capsys.readouterr().err.splitlines(), strict=True
    ):
        assert words in line


def test_a_part_of_a_training_trains_its_rows_alone(here: Path) -> None:
    pytest.importorskip("sklearn")
    small = ["train", "wrn_10_1", "--data", "digits", "--size", "8", "--subset", "64", "--epochs", "1", "--groups",
             "2", "--device", "cpu", "--quiet"]  # fmt: skip
    for number in (1, 2):
        assert main([*small, "--shard", f"{number}/2", "--out", f"{number}.json"]) == 0
    assert [len(keys(stored(here / f"{number}.json"))) for number in (1, 2)] == [2, 1]
    assert main(["merge", "1.json", "2.json", "-o", "all.json"]) == 0
    assert [row["params"]["variant"] for row in stored(here / "all.json")["results"]] == ["standard", "gc", "bgc"]
