"""CIFAR-10 from small files in the published format. Truth is torchvision's own reader of the same files."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import shutil
import tarfile
import threading
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from bgcbench.data import cifar10, open_labelled
from bgcbench.data.cifar10 import PUBLISHED, CifarFiles, open_cifar10
from bgcbench.errors import UsageError

FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def fabricate(root: Path, each: int = 4) -> CifarFiles:
    """CIFAR-10 in small: five files to train with and one to test with, ``each`` random images in a file.

    They lie in ``root`` as a folder and as an archive.
    """
    draws = np.random.default_rng(0)
    folder = root / FOLDER
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name in names:
        batch = {
            "batch_label": name,
            "labels": draws.integers(0, 10, each).tolist(),
            "data": draws.integers(0, 256, (each, 3072), dtype=np.uint8),
            "filenames": [f"{name}_{number}.png" for number in range(each)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    (folder / "readme.html").write_text("<html>")
    with tarfile.open(root / ARCHIVE, "w:gz") as archive:
        archive.add(folder, FOLDER)
    return describe(root, each)


def describe(root: Path, each: int = 4) -> CifarFiles:
    """The description under which the files that now lie in ``root`` are the published ones."""
    train, test = (
        tuple((name, md5(root / FOLDER / name) if (root / FOLDER / name).exists() else "") for name, _ in files)
        for files in (PUBLISHED.train, PUBLISHED.test)
    )
    return replace(PUBLISHED, archive_md5=md5(root / ARCHIVE), train=train, test=test, train_images=5 * each,
                   test_images=each)  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both forms; what the whole package takes for the published files are these."""
    monkeypatch.setattr(cifar10, "PUBLISHED", fabricate(tmp_path / "data"))
    return tmp_path / "data"


def torchvisions(root: Path, *, train: bool) -> CIFAR10:
    files = cifar10.PUBLISHED
    patched = {
        "train_list": [list(pair) for pair in files.train],
        "test_list": [list(pair) for pair in files.test],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5(root / FOLDER / "batches.meta")},
    }
    return type("Small", (CIFAR10,), patched)(root, train=train)


def test_what_counts_as_published_is_what_torchvision_says() -> None:
    assert (PUBLISHED.folder, PUBLISHED.archive) == (FOLDER, ARCHIVE)
    assert [list(pair) for pair in PUBLISHED.train + PUBLISHED.test] == CIFAR10.train_list + CIFAR10.test_list
    assert (PUBLISHED.archive_md5, PUBLISHED.url) == (CIFAR10.tgz_md5, CIFAR10.url)
    assert (PUBLISHED.train_images, PUBLISHED.test_images) == (50_000, 10_000)


@pytest.mark.parametrize("given", [".", FOLDER, ARCHIVE])
def test_folder_archive_and_what_they_lie_in_give_the_images_that_torchvision_reads(root: Path, given: str) -> None:
    data = open_cifar10(None, [root / given])
    for images, labels, train in (
        (data.train_images, data.train_labels, True),
        (data.test_images, data.test_labels, False),
    ):
        truth = torchvisions(root, train=train)
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), truth.data)
        assert labels.tolist() == truth.targets
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert (data.name, data.size, data.num_classes, data.meaningful) == ("cifar10", (32, 32), 10, True)
    assert (data.pad, data.flip, data.mean, data.std) == (
        4, True, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # fmt: skip


def test_the_archive_is_read_where_it_lies_and_nothing_is_unpacked(root: Path) -> None:
    whole = open_cifar10((32, 32), [root]).fingerprint
    shutil.rmtree(root / FOLDER)
    assert open_cifar10((32, 32), [root]).fingerprint == whole
    assert os.listdir(root) == [ARCHIVE]
    os.rename(root / ARCHIVE, root / "renamed.tgz")
    assert open_cifar10((32, 32), [root / "renamed.tgz"]).fingerprint == whole


def test_folders_are_searched_in_order(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    data = open_labelled("cifar10", None, [tmp_path / "nowhere", tmp_path / "empty", root])
    assert len(data.train_labels) == 20


def test_where_nothing_is_found_it_is_said_what_was_looked_for_and_where(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as refused:
        open_cifar10(None, [tmp_path / "nowhere", tmp_path / "empty"])
    assert str(refused.value) == (
        f"cifar10 was not found: {tmp_path}/nowhere is not there; {tmp_path}/empty has neither {FOLDER} nor {ARCHIVE}; "
        "give another --data-dir (or BGCBENCH_DATA_DIR), or add --download to fetch it"
    )


@pytest.mark.parametrize("download", [False, True])
def test_without_a_folder_all_ways_to_one_are_named(download: bool) -> None:
    with pytest.raises(UsageError) as refused:
        open_cifar10(None, [], download=download)
    assert str(refused.value) == (
        f"cifar10 needs --data-dir (or BGCBENCH_DATA_DIR): the folder that has {FOLDER} or {ARCHIVE}, or that "
        "--download is to fetch it into"
    )


@pytest.mark.parametrize(
    ("name", "version"),
    [("cifar-10-binary.tar.gz", "binary"), ("cifar-10-batches-bin/data_batch_1.bin", "binary"),
     ("cifar-10-matlab.tar.gz", "MATLAB"), ("cifar-10-batches-mat/data_batch_1.mat", "MATLAB")],
)  # fmt: skip
def test_the_binary_and_the_matlab_version_are_told_from_the_python_version(
    tmp_path: Path, name: str, version: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    top = Path(name).parts[0]
    for given, found in ((tmp_path, top), (tmp_path / top, name), (tmp_path / name, name)):
        with pytest.raises(UsageError) as refused:
            open_cifar10(None, [given])
        assert str(refused.value).startswith(
            f"cifar10 was not found: {tmp_path / found} is of the {version} version, and the Python version is needed, "
            f"{ARCHIVE}; give another --data-dir"
        )


def test_a_missing_file_is_named(root: Path) -> None:
    (root / FOLDER / "data_batch_3").unlink()
    (root / FOLDER / "test_batch").unlink()
    with pytest.raises(UsageError) as refused:
        open_cifar10(None, [root])
    assert str(refused.value) == (
        f"{root / FOLDER} has no data_batch_3 and no test_batch; copy it again or use --download"
    )


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_file_with_another_md5_is_refused_before_it_is_unpickled(root: Path, tmp_path: Path) -> None:
    file, trace = root / FOLDER / "data_batch_2", tmp_path / "trace"
    published = md5(file)
    file.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UsageError) as refused:
        open_cifar10(None, [root])
    assert str(refused.value) == (
        f"{file} has the MD5 {md5(file)}, not {published}: it is truncated, damaged or another file; remove it, then "
        "copy it again or use --download"
    )
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists()  # it would have


def test_an_archive_with_another_md5_is_refused_before_it_is_opened(root: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (root / FOLDER / "data_batch_1").write_bytes(pickle.dumps(Bomb(trace)))
    with tarfile.open(root / ARCHIVE, "w:gz") as archive:
        archive.add(root / FOLDER, FOLDER)
    for content in ((root / ARCHIVE).read_bytes(), b"\x1f\x8b"):
        (root / ARCHIVE).write_bytes(content)
        with pytest.raises(UsageError, match=f"^{root / ARCHIVE} has the MD5 {md5(root / ARCHIVE)}, not "):
            open_cifar10(None, [root / ARCHIVE])
    # And one whose own MD5 is right, but not that of a file in it.
    files = replace(cifar10.PUBLISHED, archive_md5=md5(root / ARCHIVE))
    (root / ARCHIVE).unlink()
    with tarfile.open(root / ARCHIVE, "w:gz") as archive:
        archive.add(root / FOLDER, FOLDER)
    files = replace(files, archive_md5=md5(root / ARCHIVE))
    with pytest.raises(UsageError, match=f"^{root / ARCHIVE / 'data_batch_1'} has the MD5 "):
        open_cifar10(None, [root / ARCHIVE], files=files)
    assert not trace.exists()


def test_an_archive_that_cannot_be_read_is_refused(root: Path) -> None:
    (root / ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(
        UsageError, match=f"^{root / ARCHIVE} cannot be read .not a gzip file.; copy it again or use --download$"
    ):
        open_cifar10(None, [root / ARCHIVE], files=describe(root))


@pytest.mark.parametrize(
    "wrong",
    [{"data": np.zeros((4, 3071), np.uint8)}, {"data": np.zeros((3, 3072), np.uint8)}, {"labels": [0, 1, 2, 10]},
     {"labels": [0, 1, 2, -1]}, {"data": np.zeros((4, 3072), np.float32)}],
)  # fmt: skip
def test_columns_and_labels_are_verified(root: Path, wrong: dict[str, object]) -> None:
    file = root / FOLDER / "test_batch"
    file.write_bytes(pickle.dumps({**pickle.loads(file.read_bytes()), **wrong}))
    with pytest.raises(UsageError, match=f"^{file} has not 3,072 bytes and a label from 0 to 9 an image; copy it"):
        open_cifar10(None, [root], files=describe(root))


def test_counts_are_verified(root: Path) -> None:
    with pytest.raises(UsageError, match=f"^{root / FOLDER} has 20 images in a split that has 50,000; copy it again$"):
        open_cifar10(None, [root], files=replace(cifar10.PUBLISHED, train_images=50_000))
    with pytest.raises(UsageError, match="has 4 images in a split that has 10,000"):
        open_cifar10(None, [root], files=replace(cifar10.PUBLISHED, test_images=10_000))


@pytest.mark.parametrize("size", [(64, 64), (32, 31)])
def test_another_size_is_refused(root: Path, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"^size \(.*\) is not that of cifar10, whose images have 32 x 32 px; leave"):
        open_cifar10(size, [root])


@pytest.fixture
def served(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The archive on a server of its own; tells how many requests there were."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requests: list[str] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said: object) -> None:
            requests.append(str(said))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/{ARCHIVE}"
    monkeypatch.setattr(cifar10, "PUBLISHED", replace(cifar10.PUBLISHED, url=url))
    yield lambda: len(requests)
    server.shutdown()
    server.server_close()


def test_it_is_downloaded_when_asked_for_and_only_once(root: Path, tmp_path: Path, served: Callable[[], int]) -> None:
    target = tmp_path / "new" / "folder"
    data = open_labelled("cifar10", None, [target, tmp_path / "elsewhere"], download=True)
    assert data.fingerprint == open_cifar10(None, [root]).fingerprint
    assert os.listdir(target) == [ARCHIVE]
    before = served()
    assert open_labelled("cifar10", None, [tmp_path / "elsewhere", target], download=True).num_classes == 10
    assert served() == before > 0


def test_a_download_that_is_damaged_is_refused_and_leaves_nothing(
    root: Path, tmp_path: Path, served: Callable[[], int]
) -> None:
    (root / ARCHIVE).write_bytes(b"something else")
    with pytest.raises(UsageError, match=r"^cifar-10-python.tar.gz could not be downloaded from 127.0.0.1:\d+ \(File "):
        open_cifar10(None, [tmp_path / "new"], download=True)
    assert os.listdir(tmp_path / "new") == []


def test_offline_the_host_the_file_and_the_place_for_a_copy_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(cifar10, "download_url", offline)
    with pytest.raises(UsageError) as refused:
        open_cifar10(None, [tmp_path], download=True)
    assert str(refused.value) == (
        f"{ARCHIVE} could not be downloaded from www.cs.toronto.edu (Name or service not known); get it "
        f"elsewhere and put it into {tmp_path}"
    )
