from __future__ import annotations

import errno
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from bgcbench.errors import ResultFileError
from bgcbench.training import checkpoint
from bgcbench.training.checkpoint import Checkpoints, Stored, network_in


def stored(value: float = 1.0, **meta: Any) -> Stored:
    return Stored({"w": torch.full((3, 2), value)}, {"losses": torch.tensor([value])}, {"epoch": 1, **meta})


def warnings_of(checkpoints: Checkpoints) -> tuple[Stored | None, list[str]]:
    said: list[str] = []
    return checkpoints.latest(said.append), said


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "row")
    assert warnings_of(checkpoints) == (None, [])
    checkpoints.save(stored(2.5, text="ü"), 3, 17)
    found, said = warnings_of(checkpoints)
    assert found is not None
    assert said == []
    assert torch.equal(found.model["w"], torch.full((3, 2), 2.5))
    assert found.meta == {"epoch": 1, "text": "ü"}
    assert found.record is None


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number, (epoch, step) in enumerate([(0, 9), (0, 10), (1, 0), (10, 5), (9, 700)]):
        checkpoints.save(stored(number), epoch, step)
    found, _ = warnings_of(checkpoints)
    assert [name[:13] for name in checkpoints.names] == ["e0009-s000700", "e0010-s000005"]
    assert found is not None
    assert float(found.model["w"][0, 0]) == 3.0


def test_a_file_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(), 0, 1)
    (name,) = checkpoints.names
    assert name == f"e0000-s000001-{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:12]}.pt"


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(1.0), 0, 1)
    checkpoints.save(stored(2.0), 0, 2)
    path = tmp_path / checkpoints.names[-1]
    data = bytearray(path.read_bytes())
    if damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "flipped":  # in a number, where PyTorch's reader does not look
        at = data.index(torch.full((3, 2), 2.0).numpy().tobytes())
        data[at] ^= 1
    if damage == "foreign":
        torch.save({"epoch": 3}, path)
        data = bytearray(path.read_bytes())
        path.unlink()
        path = tmp_path / f"e0000-s000002-{hashlib.sha256(data).hexdigest()[:12]}.pt"
    path.write_bytes(data)
    found, said = warnings_of(checkpoints)
    assert found is not None
    assert float(found.model["w"][0, 0]) == 1.0
    assert len(said) == 1
    assert said[0].startswith(f"{path} is passed over: ")


def test_a_flipped_bit_is_damage_wherever_it_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(1.0), 0, 1)
    checkpoints.save(stored(2.0), 0, 2)
    path = tmp_path / checkpoints.names[-1]
    whole = path.read_bytes()
    for at in range(0, min(len(whole), 1400), 7):  # the pickle comes first
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        found = checkpoints.latest(lambda _: None)
        assert found is not None
        assert float(found.model["w"][0, 0]) == 1.0
        Path(f"{path}.damaged").rename(path)


def test_damaged_checkpoints_do_not_take_the_place_of_newer_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(stored(float(step)), 5, step)
    newest = tmp_path / checkpoints.names[-1]
    newest.write_bytes(b"torn")
    assert checkpoints.latest(lambda _: None) is not None
    assert Path(f"{newest}.damaged").read_bytes() == b"torn"
    for step in (3, 4):
        checkpoints.save(stored(10.0 + step), 5, step)
    found, said = warnings_of(checkpoints)
    assert found is not None
    assert (float(found.model["w"][0, 0]), said) == (14.0, [])


def test_only_damaged_checkpoints_are_an_error_and_not_a_start_from_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(), 0, 1)
    (tmp_path / checkpoints.names[0]).write_bytes(b"torn")
    with pytest.raises(ResultFileError, match="all 1 checkpoints are damaged; remove the folder to start"):
        checkpoints.latest(lambda _: None)


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


class Evaluated:
    def __reduce__(self) -> Any:
        return eval, ("__import__('pathlib').Path('exploded').touch()",)


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("named_right", [True, False])
@pytest.mark.parametrize("bomb", [Bomb, Evaluated])
def test_a_checkpoint_with_code_in_it_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, named_right: bool, bomb: type
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path / "row")
    checkpoints.save(stored(), 0, 1)
    path = tmp_path / "row" / "e0000-s000002-123456789abc.pt"
    if form == "torch":
        torch.save({"format": checkpoint.FORMAT, "meta": "{}", "model": {"w": bomb()}, "extra": {}}, path)
    else:
        path.write_bytes(pickle.dumps(bomb(), protocol=2))
    if named_right:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        path = path.rename(path.with_name(f"e0000-s000002-{digest}.pt"))
    with pytest.raises(ResultFileError, match="holds pickled code") as caught:
        checkpoints.latest(lambda _: None)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_the_best_weights_have_one_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(stored(1.0), 4)
    checkpoints.save_best(stored(2.0), 9)
    (name,) = checkpoints.names
    assert name.startswith("best-e0009-")
    assert checkpoints.latest(lambda _: None) is None  # it has nothing to go on from


def test_a_training_that_is_done_keeps_its_end_and_nothing_to_go_on_from(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(stored(), 1)
    checkpoints.save(stored(), 1, 0)
    checkpoints.save(stored(), 1, 5)
    checkpoints.save_final(stored(7.0), 2)
    assert [name.split("-")[0] for name in checkpoints.names] == ["best", "final"]
    found = checkpoints.latest(lambda _: None)
    assert found is not None
    assert float(found.model["w"][0, 0]) == 7.0


def test_clearing_leaves_other_files_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(), 0, 1)
    checkpoints.save_best(stored(), 1)
    for name in ("mine.pt", "notes.txt", "e0001.pt", "diagnosis.json"):
        (tmp_path / name).write_text("x")
    checkpoints.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0001.pt", "mine.pt", "notes.txt"]


def test_a_full_disk_is_a_problem_to_tell_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(1.0), 0, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_atomically", full)
        for step in (2, 3, 4):
            checkpoints.save(stored(2.0), 0, step)
        checkpoints.save_final(stored(2.0), 1)
    assert checkpoints.problem is not None
    assert "No space left on device" in checkpoints.problem
    found = checkpoints.latest(lambda _: None)
    assert found is not None
    assert float(found.model["w"][0, 0]) == 1.0
    checkpoints.save(stored(3.0), 0, 5)
    assert checkpoints.problem is None


NETWORK = {"model": "wrn_10_1", "num_classes": 10, "height": 16, "width": 16, "stem_stride": None}


def test_a_checkpoint_says_which_network_it_holds_whatever_it_is_called(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(stored(identity={**NETWORK, "lr": 0.1}), 0, 1)
    (name,) = checkpoints.names
    assert network_in(tmp_path / name) == NETWORK
    assert network_in((tmp_path / name).rename(tmp_path / "mine")) == NETWORK


def test_other_files_than_dense_checkpoints_are_refused_with_what_to_do(tmp_path: Path) -> None:
    def refused(content: Any, message: str) -> None:
        path = tmp_path / "file.pt"
        torch.save(content, path) if not isinstance(content, bytes) else path.write_bytes(content)
        with pytest.raises(ResultFileError, match=message) as caught:
            network_in(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    whole = {"format": checkpoint.FORMAT, "meta": "{}", "model": {}, "extra": {}}
    refused({**whole, "record": "{}"}, "holds a converted network, and only a dense one is converted: give the")
    refused({"w": torch.ones(2)}, "does not say which network it holds.* give the file with --weights")
    refused(whole, "does not say which network it holds")
    refused({**whole, "meta": "{"}, "does not say which network it holds")
    refused([1, 2], "does not say which network it holds")
    refused(b"nothing of the kind", "is no checkpoint of bgcbench: it is damaged, or holds more than tensors")
    refused(pickle.dumps(os.system), "is no checkpoint of bgcbench")
    with pytest.raises(ResultFileError, match="cannot be read"):
        network_in(tmp_path / "gone.pt")
