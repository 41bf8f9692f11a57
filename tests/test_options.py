"""An option is declared once, on the field that it fills; the rest follows."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bgcbench.cli import app
from bgcbench.cli.measuring import Profile
from bgcbench.cli.parameters import command_options, register
from bgcbench.cli.run import Command
from bgcbench.errors import ShapeError, UsageError
from bgcbench.experiments.options import (
    GRID,
    OUTPUT,
    WORKLOAD,
    check_options,
    given_fields,
    one_of,
    option,
    options_of,
    positive,
    shorthand,
    size,
)
from bgcbench.experiments.profile import NetworkConfig, ProfileConfig
from bgcbench.experiments.transfer import TransferConfig
from bgcbench.results import rows
from bgcbench.specs import VARIANTS, load

COMMANDS: list[Command] = [load(declared.command)(name) for name, declared in rows.COMMANDS.items()]


@dataclass(frozen=True)
class Base:
    groups: tuple[int, ...] = option((2, 4), "Group counts N.", panel=GRID, everyday=True, check=positive)
    layout: str = option("nchw", panel=WORKLOAD, check=one_of(("nchw", "nhwc")))
    height: int | None = None
    width: int | None = None
    reference: bool = option(True, name="no-reference", panel=GRID)
    flip: bool | None = option(None, flag="--flip/--no-flip", panel=WORKLOAD)

    SHORTHANDS = (shorthand("size", ("height", "width"), read=size, panel=WORKLOAD),)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Derived(Base):
    groups: tuple[int, ...] = option((8,))
    layout: str = option("nhwc", hidden=True)


def given(kind: type[Any], **typed: Any) -> dict[str, Any]:
    options = options_of(kind).values()
    return given_fields(options, {each.parameter: typed.get(each.parameter) for each in options})


def test_a_field_that_is_declared_anew_inherits_what_it_does_not_say() -> None:
    groups = options_of(Derived)["groups"]
    assert (groups.help, groups.panel, groups.everyday, groups.shown) == ("Group counts N.", GRID, True, "8")
    assert options_of(Base)["groups"].shown == "2,4"
    assert "layout" in options_of(Base)
    assert "layout" not in options_of(Derived)
    assert "height" not in options_of(Base)  # has no option of its own


def test_what_is_typed_fills_the_fields_and_what_is_not_leaves_them_out() -> None:
    assert given(Base) == {}
    assert given(Base, groups="2,4,2", size="7x14") == {"groups": (2, 4), "height": 7, "width": 14}
    assert given(Base, no_reference=True) == {"reference": False}
    assert given(Base, no_reference=False) == {}
    assert given(Base, flip=False) == {"flip": False}
    assert given(ProfileConfig, variants="all")["variants"] == tuple(VARIANTS)


def test_an_option_of_one_field_says_more_than_one_of_two() -> None:
    assert given(ProfileConfig, channels=8, out_channels=4) == {"in_channels": 8, "out_channels": 4}


def test_a_value_is_checked_by_the_check_on_its_field() -> None:
    with pytest.raises(ShapeError, match="groups=0 must be a whole number of at least 1"):
        Base(groups=(2, 0))
    with pytest.raises(UsageError, match="unknown layout 'nwhc': did you mean 'nhwc'"):
        Base(layout="nwhc")
    with pytest.raises(UsageError, match=r"--size 7x must be a number of pixels or HEIGHTxWIDTH"):
        given(Base, size="7x")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_at_most_twelve_everyday_options_stand_first(command: Command) -> None:
    shown = [each for each in command_options(command) if not each.argument]
    everyday = [each.everyday for each in shown]
    assert 0 < sum(everyday) <= 12
    assert everyday == sorted(everyday, reverse=True)
    assert {"variants", "groups", "quick", "dry-run", "out", "resume"} <= {each.name for each in shown if each.everyday}


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_help_has_words_for_every_option_no_type_for_switches_and_more_options_apart(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], terminal_width=200, env={"COLUMNS": "200"}).output
    first, *others = re.findall(r"^╭─ (.*?) ─+╮$", shown.replace("╭─ Arguments", "╭- Arguments"), re.MULTILINE)
    assert first == "Options"
    assert all(panel.startswith("More options: ") for panel in others)
    options = re.findall(r"^│ +\*? *(--[a-z-]+)(.*)│$", shown, re.MULTILINE)
    assert ("--help", "Show this message and exit.") in [(flag, " ".join(words.split())) for flag, words in options]
    assert len(shown.partition("╭─ More")[0].split("╭─ Options")[1].split("\n│ --")) - 1 <= 12 + 1  # --help
    for flag, words in options:
        said = re.sub(r"^(,?--?[a-z-]+|\s)*(<[a-z\[\]]+>)?", "", words).strip()
        assert said, flag
    assert "<bool>" not in shown
    assert "[default: (" not in shown


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_fills_fields_that_are_there(command: Command) -> None:
    for kind in (*command.kinds, command.asked):
        fields = {field.name for field in dataclasses.fields(kind)}
        for each in options_of(kind).values():
            assert set(each.fills) <= fields


@pytest.mark.usefixtures("brisk")
def test_a_new_field_of_a_configuration_is_an_option_and_reaches_the_run(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Warmer(ProfileConfig):
        warm_calls: int = option(1, "Calls before the first sample.", panel=OUTPUT, check=positive)

    class WarmProfile(Profile):
        kinds = (Warmer,)

    app = typer.Typer()
    app.callback()(lambda: None)
    register(app, WarmProfile("profile"))
    small = ["profile", "--channels", "8", "--size", "4", "--batch", "2", "--groups", "2", "--variants", "gc",
             "--quick"]  # fmt: skip
    file = tmp_path / "r.json"
    done = CliRunner().invoke(app, [*small, "--warm-calls", "3", "--device", "cpu", "--out", str(file), "--quiet"])
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text())["config"]["warm_calls"] == 3
    assert "Calls before the first sample." in CliRunner().invoke(app, ["profile", "--help"]).output
    wrong = CliRunner().invoke(app, [*small, "--warm-calls", "0"])
    assert isinstance(wrong.exception, ShapeError)


def test_words_are_known_whatever_their_case_and_paths_keep_theirs(tmp_path: Path, monkeypatch: Any) -> None:
    found = given(NetworkConfig, model="ResNet18", variants="GC,Bgc", precision="FP32", phases="FWD", device="CPU")
    assert found == {"model": "resnet18", "variants": ("gc", "bgc"), "precision": "fp32", "phases": ("fwd",),
                     "device": "cpu"}  # fmt: skip
    assert given(ProfileConfig, variants="All")["variants"] == tuple(VARIANTS)
    assert given(TransferConfig, model="TIMM/ResNet18", data="Digits", weights="NONE", init="White,COPY") == {
        "model": "timm/resnet18", "data": "digits", "weights": "none", "inits": ("white", "copy")
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Run.PT").touch()
    assert given(TransferConfig, model="Run.PT", data="My/Images", weights="W.pth") == {
        "model": "Run.PT", "data": "My/Images", "weights": "W.pth"
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_network_is_named_by_its_place_or_by_name_and_not_twice(command: Command) -> None:
    asked: list[Any] = []

    class Listening(type(command)):  # type: ignore[misc]
        def given(self, given: Any, *more: Any) -> Any:
            asked.append(given["model"])
            raise typer.Exit(0)

    app = typer.Typer()
    app.callback()(lambda: None)
    register(app, Listening(command.name))
    for words in (["wrn_10_1"], ["--model", "wrn_10_1"]):
        assert (
            CliRunner().invoke(app, [command.name, *words, "-g", "4", "-v", "gc", "-q", "-o", "r.json"]).exit_code == 0
        )
    assert asked == ["wrn_10_1"] * 2
    twice = CliRunner().invoke(app, [command.name, "wrn_10_1", "--model", "wrn_16_4"])
    assert "give one" in str(twice.exception)


def test_where_several_may_be_named_one_must_be() -> None:
    with pytest.raises(UsageError, match="--groups is empty; name at least one"):
        Base(groups=())
