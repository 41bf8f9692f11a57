"""Images of the user's own: what their function may return, and that no file makes it run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bgcbench import specs
from bgcbench.data import open_images, open_labelled
from bgcbench.errors import UsageError

LOADER = """
import numpy, torch

generator = torch.Generator().manual_seed(0)
train, test = (torch.randint(0, 256, (n, 3, 4, 6), dtype=torch.uint8, generator=generator) for n in (8, 4))
labels = torch.arange(8) % 3

def load(): return train, labels, test, labels[:4]
def arrays(): return tuple(array.numpy() for array in load())
def images(): return train
def floats(): return train.float()
def grey(): return train[:, :1]
def none(): return train[:0]
def words(): return "images"
def two(): return train, labels
def few(): return train, labels[:7], test, labels[:4]
def below(): return train, labels - 1, test, labels[:4]
def halves(): return train, labels / 2, test, labels[:4]
def sizes(): return train, labels, test[..., :3], labels[:4]
def fails(): raise OSError("no disk")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "_named_by_user", set())
    (tmp_path / "mine.py").write_text(LOADER)
    return tmp_path


def name(function: str) -> str:
    return specs.may_run(f"mine.py:{function}")


@pytest.mark.parametrize("function", ["load", "arrays"])
def test_four_arrays_are_two_splits_with_labels(function: str) -> None:
    data = open_labelled(name(function), None, [])
    assert (data.num_classes, data.size, len(data.train_labels), len(data.test_labels)) == (3, (4, 6), 8, 4)
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    (batch,) = data.calibration().batches(8, 8, seed=0)
    assert (batch.min() >= 0, batch.max() <= 1, batch.max() > 0.9) == (True, True, True)  # black is 0, white 1


@pytest.mark.parametrize("function", ["images", "load"])
def test_images_to_calibrate_with_are_those_to_train_with(function: str) -> None:
    images = open_images(name(function), (4, 6))
    assert len(images) == 8
    assert torch.equal(images.read([3]), open_images(name("images")).read([3]))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("floats", "must return uint8 images .* it is torch.float32 of shape"),
        ("grey", r"it is torch.uint8 of shape \(8, 1, 4, 6\)"),
        ("none", r"of shape \(0, 3, 4, 6\)"),
        ("words", "it is str"),
        ("two", "must return four arrays"),
        ("few", "a label from 0 up, a whole number, for each of 8 images"),
        ("below", "a label from 0 up"),
        ("halves", "a whole number"),
        ("sizes", "images of 4x6 px to train and 4x3 to test"),
        ("fails", "calling it without arguments failed: OSError: no disk"),
        ("lode", "did you mean 'load'"),
    ],
)
def test_what_a_function_may_not_return_is_named(function: str, words: str) -> None:
    opened = open_images if function in ("floats", "grey", "none", "words") else open_labelled
    with pytest.raises(UsageError, match=words):
        opened(name(function), None, *([] if opened is open_images else [[]]))


def test_another_size_and_a_function_that_only_a_file_names_are_refused() -> None:
    with pytest.raises(UsageError, match="has images of 4x6 px, and 8x8 are needed: --size 4x6"):
        open_images(name("images"), (8, 8))
    specs._named_by_user.clear()
    for opened in (open_images, lambda data: open_labelled(data, None, [])):
        with pytest.raises(UsageError, match="name it on the command line"):
            opened("mine.py:load")


def test_the_commands_take_it(here: Path, capsys: Any) -> None:
    from bgcbench.cli import main

    shared = ["wrn_10_1", "--data", "mine.py:load", "--size", "4x6", "--groups", "2", "--quiet"]
    assert main(["approx", *shared, "--weights", "none", "--calibration-images", "8", "--out", "a.json"]) == 0
    assert "8 images of mine.py:load, 4 x 6 px" in capsys.readouterr().out
    assert main(["approx", "wrn_10_1", "--data", "gone.py:load"]) == 2
    assert "--data gone.py:load: there is no file gone.py" in capsys.readouterr().err
