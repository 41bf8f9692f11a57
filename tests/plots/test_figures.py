"""What all pictures have in common: legible, the same bytes for the same document, whole files, errors in a line."""

from __future__ import annotations

import copy
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bgcbench import plots, results
from bgcbench.errors import OutputError, UsageError
from tests.example import example_document
from tests.example_approx import network, new_document, sampled
from tests.example_plan import plan_document, with_plan
from tests.example_train import papers, stop, train_document
from tests.example_transfer import transfer_document
from tests.plots.looking import assert_nothing_is_cut_off_or_lies_on_another, draw, figure_of

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'plot'")

from matplotlib import rcParams

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent.parent


def failed(document: Json) -> Json:
    for row in document["results"]:
        stop(row, "invalid", "N does not divide")
    return document


DOCUMENTS: dict[str, Callable[[], Json]] = {
    "approx paper": lambda: sampled(in_channels=256, out_channels=256, groups=(4, 8, 16, 32, 64)),
    "approx all": lambda: sampled(
        variants=("standard", "gc", "shuffle", "lgc", "flgc", "tlgc", "bgc"), inputs=("normal", "relu", "factor:0.5")
    ),
    "approx one": lambda: sampled(variants=("gc",), inputs=("normal",), groups=(4,)),
    "approx network": network,
    "approx layer": lambda: network(("conv1",), ("bgc",), (4,)),
    "approx long": lambda: network(
        tuple(f"features.{i}.conv.a_long_name_of_a_module.depthwise" for i in range(9)),
        ("gc", "shuffle", "lgc", "flgc", "tlgc", "bgc"),
        (2, 4, 8, 16, 32, 64),
        weights="a_checkpoint_with_a_long_name_" * 5,
    ),
    "train all": train_document,
    "train paper": lambda: papers(train_document(dataset="cifar10")),
    "train one": lambda: train_document(variants=("gc",), groups=(4,), seeds=(1,)),
    "train two": lambda: train_document(variants=("gc", "bgc"), groups=(2,)),
    "train plan": lambda: with_plan(train_document(variants=("standard", "gc", "bgc"), groups=(2, 4))),
    "train standard": lambda: train_document(variants=("standard",), seeds=(0,)),
    "transfer all": lambda: transfer_document(("gc", "tlgc", "bgc"), epochs=3, control=True),
    "transfer starts": lambda: transfer_document(inits=("copy", "white", "calibrated"), rebn=(False, True), epochs=3),
    "transfer plan": lambda: with_plan(transfer_document(("gc", "bgc"), epochs=3, control=True)),
    "transfer deep": lambda: transfer_document(time=True, inits=("copy", "white", "calibrated")),
    "plan": plan_document,
    "transfer one": lambda: transfer_document(("bgc",), (4,), (1,)),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_text_is_cut_off_and_none_lies_on_another(name: str) -> None:
    assert_nothing_is_cut_off_or_lies_on_another(figure_of(DOCUMENTS[name](), placed=True))


def test_a_picture_is_a_slide_and_several_are_as_many(tmp_path: Path) -> None:
    for picture, slides in (("figure1", 1), (None, 3)):
        draw(sampled(), tmp_path / "p.png", picture)
        header = (tmp_path / "p.png").read_bytes()[16:24]
        assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (1200, 675 * slides)
        (tmp_path / "p.png").unlink()


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    draw(network(("a$b$_{",), data="$\\frac$ folder"), tmp_path / "p.png")


@pytest.mark.parametrize(
    ("document", "picture", "why"),
    [
        (new_document(), None, "nothing to draw: the result has no finished row"),
        (sampled(variants=("standard",)), None, "nothing to draw"),
        (sampled(variants=("standard",)), "figure1", "figure1 needs rows of sampled convolutions with N > 1"),
        (sampled(variants=("shuffle",)), "figure2", "figure2 needs rows of gc or bgc"),
        (sampled(), "heatmap", r"heatmap needs finished rows of a network's layers \(approx --model\)"),
        (network(), "figure1", "figure1 needs rows of sampled convolutions"),
        (network(), "figure2", "figure2 needs rows of gc or bgc on sampled convolutions"),
        (network(), "pareto", "pareto needs finished rows of sampled convolutions"),
        (
            sampled(),
            "figure3",
            r"unknown picture 'figure3': did you mean 'figure[12]'\? choose from speedups, cost, figure1",
        ),
        (train_document(dataset="synthetic"), None, "nothing to draw: the result has no test error"),
        (train_document(dataset="synthetic"), "errors", "errors needs finished trainings on real images"),
        (train_document(dataset="synthetic"), "curves", "curves needs test errors by epoch"),
        (failed(train_document()), None, "nothing to draw"),
        ({**train_document(), "results": []}, None, "nothing to draw"),
        (train_document(), "pareto", "pareto is no picture of 'train' results; they have errors, curves"),
        (new_document(), "curves", "'approx' results; they have figure1, figure2, pareto, heatmap"),
        (train_document(), "curve", "unknown picture 'curve': did you mean 'curves'"),
        ({**example_document(), "results": []}, None, "nothing to draw: the result has no row with an interval"),
        (example_document(), "errors", "errors is no picture of 'profile' results; they have speedups, cost"),
        (transfer_document(dataset="synthetic"), "errors", "errors needs conversions evaluated on real images"),
        (transfer_document(inits=("copy",)), "layers", "layers needs calibrated conversions"),
        ({**transfer_document(), "results": []}, None, "nothing to draw: the result has neither"),
        (
            transfer_document(),
            "curves",
            "curves is no picture of 'transfer' results; they have errors, layers, tradeoff",
        ),
        (transfer_document(), "tradeoff", "tradeoff needs networks whose time and whose accuracy are both known"),
        (example_document(), "cost", r"cost needs convolutions measured by themselves \(--layers\)"),
    ],
)
def test_what_a_document_does_not_have_is_named_in_one_line(document: Json, picture: str | None, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        figure_of(document, picture)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("suffix", "make"),
    [(".PNG", sampled), (".svg", transfer_document), (".pdf", train_document)],
)
def test_the_same_document_gives_the_same_bytes(tmp_path: Path, suffix: str, make: Callable[[], Json]) -> None:
    document = make()
    before = copy.deepcopy(document)
    for name in ("a", "b"):
        draw(document, tmp_path / f"{name}{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert content == (tmp_path / f"b{suffix}").read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix.lower()])
    assert b"Date" not in content
    assert document == before


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_so_it_does_in_another_process_and_under_other_settings(tmp_path: Path, suffix: str) -> None:
    document, file = network(), tmp_path / "r.json"
    file.write_text(results.dumps(document), encoding="utf-8")
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\nsavefig.bbox: tight\n")
    code = (
        "import pathlib, sys; from bgcbench import plots; from bgcbench.results.document import read; "
        "plots.draw(read(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])); "
        "sys.exit(99 if 'torch' in sys.modules or 'matplotlib.pyplot' in sys.modules else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path / f"a{suffix}")], check=False,
                          capture_output=True, text=True, timeout=120, env=environment)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    draw(document, tmp_path / f"b{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_settings_of_the_program_around_it_stay_as_they_are(tmp_path: Path) -> None:
    def settings() -> Json:
        return {name: rcParams[name] for name in rcParams if name != "backend"}  # to ask for it is to choose one

    before = settings()
    draw(sampled(), tmp_path / "p.svg", "figure1")
    assert settings() == before


def test_an_older_figure_survives_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    draw(sampled(), path, "figure1")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"p.png cannot be written \(No space left on device\); choose another"):
        draw(network(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_figure_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "p.pdf"
    plain.touch()
    draw(network(), ours)
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_check_refuses_before_anything_is_computed_what_could_not_be_written(tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    file.write_text("something of the user's")
    with pytest.raises(OutputError, match=r"--plot .*p.png exists; use --force"):
        plots.check_plot(file, replace=False)
    plots.check_plot(file, replace=True)
    assert file.read_text() == "something of the user's"
    for name in ("p.jpg", "p", "png", ".png"):
        with pytest.raises(UsageError, match=r"the name must end in .png, .svg, .pdf"):
            plots.check_plot(tmp_path / name, replace=True)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        plots.check_plot(tmp_path / "folder.svg", replace=True)
    with pytest.raises(OutputError, match="is no folder"):
        plots.check_plot(file / "p.png", replace=False)
    with pytest.raises(OutputError, match="cannot be written"):
        plots.check_plot(Path("/dev/null/folder/p.png"), replace=False)
    plots.check_plot(tmp_path / "new" / "folder" / "p.PDF", replace=False)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_the_check_imports_neither_matplotlib_nor_torch(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from bgcbench import plots; plots.check_plot(pathlib.Path(sys.argv[1]), replace=False); "
        "sys.exit(99 if {'torch', 'matplotlib', 'numpy'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.png")], check=False, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0


def test_matplotlib_that_is_missing_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (lambda: figure_of(sampled()), lambda: draw(sampled(), tmp_path / "p.png")):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == ("pictures need matplotlib, which is not installed; pip install 'bgcbench[plot]'")
    assert list(tmp_path.iterdir()) == []
