"""A file that says what each convolution becomes: which ones are read, and what is said of all others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bgcbench.errors import ResultFileError
from bgcbench.planning import FORMAT, read_plan
from bgcbench.planning.plan import Plan
from bgcbench.specs import Choice
from tests.example_plan import plan_document

CHOICES = {"a": Choice("gc", 4), "b": Choice()}
JSON = {"a": {"variant": "gc", "groups": 4}, "b": {"variant": "standard"}}


def written(folder: Path, content: Any) -> Path:
    path = folder / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "budget"),
    [
        (JSON, {}),
        ({"choices": JSON}, {}),
        ({"format": FORMAT, "budget": {"kind": "macs", "asked": 0.5}, "choices": JSON}, {"kind": "macs", "asked": 0.5}),
        (plan_document(), {"kind": "time", "asked": 0.7, "cost": 0.7, "loss": 0.02}),
    ],
    ids=["choices", "in a plan file", "plan file", "result file"],
)
def test_choices_are_read_from_each_of_the_files_that_hold_them(content: Any, budget: Any, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    assert read_plan(path) == (CHOICES, budget)
    plan = Plan.load(path)
    assert plan.choices == CHOICES
    assert {name: getattr(plan, name) for name in budget} == budget


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no plan: Expecting property name"),
        ([JSON], "is no plan: it must be {name of a convolution: {variant, groups}}, with one at least"),
        ({}, "with one at least"),
        ({"choices": 3}, "with one at least"),
        ({"a": 3}, "is no plan: a: 3 is no choice for a convolution"),
        ({"a": {"variant": "nope"}}, "is no plan: a: unknown variant 'nope'"),
        ({"a": {"variant": "plan"}}, "is no plan: a: unknown variant 'plan'"),
        ({"a": {"variant": "gc", "groups": "4"}}, "is no plan: a: groups=4 must be a whole number"),
        ({"a": {"variant": "gc", "rank": 4}}, "is no plan: a: gc has groups and no rank"),
        ('{"a": {"variant": "gc", "groups": 4}, "a": {"variant": "gc", "groups": 2}}', "it has a twice; keep one"),
        ({"format": "bgcbench.plan/2", "choices": JSON}, "its format is bgcbench.plan/2, and this version reads"),
        ({"choices": JSON, "budget": {"colour": 1}}, "its budget may have kind, asked, cost, loss"),
        (plan_document(command="train"), "it is a result of bgcbench train; give one of bgcbench plan"),
        (plan_document(plan=None), "its run has not come to the choice yet; bgcbench plan --resume goes on with it"),
    ],
)  # fmt: skip
def test_any_other_file_is_refused_in_one_line(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match=re.escape(message)) as refused:
        read_plan(written(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match=re.escape("none.json cannot be read (No such file or directory)")):
        read_plan(tmp_path / "none.json")


def test_reading_a_plan_takes_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from bgcbench.planning import read_plan; read_plan(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(written(tmp_path, JSON))], check=False).returncode == 0
