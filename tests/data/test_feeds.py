"""Batches on a device. Truth is a loop over single images: pad, cut, flip, with numpy, Pillow and torchvision."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from bgcbench.data.feeds import Batch, FolderFeed, LabelledFiles, ResidentFeed, epoch_order, random_crop
from bgcbench.data.folder import IMAGENET_EVALUATION, load_image
from bgcbench.errors import BgcbenchError, ShapeError, UsageError
from tests.data.test_folder import save

CPU = torch.device("cpu")
HOW = IMAGENET_EVALUATION.at((20, 28))
TEST = 5


def labelled(count: int, size: tuple[int, int], seed: int = 0) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=draws)
    return images, torch.randint(0, 10, (count,), generator=draws)


def resident(count: int = 40, size: tuple[int, int] = (6, 9), pad: int = 2, flip: bool = True) -> ResidentFeed:
    return ResidentFeed(labelled(count, size), labelled(TEST, size, 1), CPU, pad=pad, flip=flip)


def cut(image: Tensor, pad: int, down: int, right: int, mirrored: int) -> np.ndarray:
    """What is done to one image, as one would say it."""
    _, height, width = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    crop = padded[:, down : down + height, right : right + width]
    return crop[:, :, ::-1] if mirrored else crop


def numbers(*batches: Iterable[int]) -> list[Tensor]:
    return [torch.tensor(list(batch), dtype=torch.int64) for batch in batches]


def by_number(batches: list[Tensor], fed: Iterable[Batch]) -> dict[int, tuple[Tensor, int]]:
    found = {}
    for chosen, (images, labels) in zip(batches, fed, strict=True):
        assert images.shape[0] == len(labels) == len(chosen)
        found |= {n: (image, int(label)) for n, image, label in zip(chosen.tolist(), images, labels, strict=True)}
    return found


def assert_same(one: dict[int, tuple[Tensor, int]], other: dict[int, tuple[Tensor, int]]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n][0], other[n][0]) and one[n][1] == other[n][1] for n in one)


@pytest.mark.parametrize("size", [(6, 9), (9, 6), (7, 7), (1, 5)])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (2, False), (3, True)])
def test_every_image_is_padded_with_black_cut_and_mirrored_as_its_draw_says(
    size: tuple[int, int], pad: int, flip: bool
) -> None:
    images, labels = labelled(40, size)
    feed = resident(40, size, pad, flip)
    everything = numbers(range(39, -1, -1))
    ((fed, classes),) = feed.train(everything, 3, 1)
    draws = torch.stack(feed.draws(3, 1), dim=1).tolist()
    expected = np.stack([cut(images[n], pad, *draws[n]) for n in everything[0].tolist()])
    np.testing.assert_array_equal(fed.numpy(), expected)
    assert torch.equal(classes, labels.flip(0))
    assert (fed.dtype, classes.dtype) == (torch.uint8, torch.int64)


def test_what_is_done_to_an_image_follows_from_its_number_not_from_order_and_batches() -> None:
    feed = resident()
    order = epoch_order(40, 0, 0).tolist()
    batches = numbers(order[:16], order[16:32], order[32:])
    whole = by_number(batches, feed.train(batches, 5, 2))
    for other in (numbers(range(40)), numbers(*([n] for n in reversed(order)))):
        assert_same(by_number(other, feed.train(other, 5, 2)), whole)
    rest = by_number(batches[1:], resident().train(batches[1:], 5, 2))
    assert_same(rest, {n: whole[n] for n in order[16:]})


def test_another_seed_or_epoch_draws_anew() -> None:
    feed = resident()
    (first,), *others = (list(feed.train(numbers(range(40)), *drawn)) for drawn in ((0, 0), (0, 1), (1, 0)))
    assert not any(torch.equal(first[0], other[0]) for ((other),) in others)


def test_offsets_and_flips_are_uniform_and_independent_of_one_another() -> None:
    count = 20_000
    feed = resident(count, (1, 1), pad=2)
    down, right, mirrored = feed.draws(7, 3)
    both = torch.bincount((down * 5 + right) * 2 + mirrored, minlength=50)
    # 400 of each of the 50 combinations, give or take 5 binomial standard deviations of sqrt(400).
    assert both.shape == (50,)
    assert (both - 400).abs().max() < 5 * 20


def test_offsets_are_independent_of_the_order() -> None:
    feed = resident(20, (1, 1), pad=2)
    # Of one stream of random numbers, the first would be taken mod 20 for the order and mod 5 for the first offset.
    alike = sum(int(epoch_order(20, seed, 0)[0]) % 5 == int(feed.draws(seed, 0)[0][0]) for seed in range(60))
    assert alike < 12 + 5 * 3.1  # binomial(60, 1/5)


def test_without_padding_and_flips_training_images_are_what_they_are() -> None:
    images, labels = labelled(40, (6, 9))
    ((fed, classes),) = resident(pad=0, flip=False).train(numbers(range(40)), 0, 0)
    assert torch.equal(fed, images)
    assert torch.equal(classes, labels)


def test_test_images_are_never_augmented() -> None:
    images, labels = labelled(TEST, (6, 9), 1)
    batches = list(resident().test(numbers([4, 0], [2])))
    assert torch.equal(batches[0][0], images[[4, 0]])
    assert torch.equal(batches[0][1], labels[[4, 0]])
    assert torch.equal(batches[1][0], images[[2]])


def test_batches_lie_in_memory_with_their_channels_last() -> None:
    for fed in (resident().train(numbers(range(8)), 0, 0), resident().test(numbers(range(4)))):
        assert next(fed)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["resident", "folder"])
def test_a_batch_may_be_empty_and_an_epoch_may_have_none_left(tmp_path: Path, kind: str) -> None:
    feed, size = (resident(), (6, 9)) if kind == "resident" else (folder(tmp_path, workers=1)[0], (20, 28))
    for fed in (feed.train(numbers([], [0]), 0, 0), feed.test(numbers([], [0]))):
        assert [(images.shape, labels.shape) for images, labels in fed] == [((n, 3, *size), (n,)) for n in (0, 1)]
    assert list(feed.train([], 0, 0)) == list(feed.test([])) == []


def test_an_epochs_order_is_a_permutation_that_follows_from_seed_and_epoch() -> None:
    order = epoch_order(100, 1, 2)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, 1, 2))
    # (1, 23) and (12, 3) must not read the same.
    others = [epoch_order(100, *drawn) for drawn in ((2, 1), (1, 3), (1, 23), (12, 3))]
    assert len({tuple(o.tolist()) for o in (order, *others)}) == 5


def test_the_global_random_states_are_neither_used_nor_moved(tmp_path: Path) -> None:
    feeds = (resident(), folder(tmp_path)[0])
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = [[images for images, _ in feed.train(numbers([3, 1]), 0, 0)] for feed in feeds]
    for feed in feeds:
        list(feed.test(numbers([0])))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    torch.manual_seed(12345)
    again = [[images for images, _ in feed.train(numbers([3, 1]), 0, 0)] for feed in feeds]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_those_of_the_cpu(tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    everything = numbers(range(25), range(25, 40))
    there = ResidentFeed(labelled(40, (6, 9)), labelled(TEST, (6, 9), 1), cuda, pad=2, flip=True)
    pairs = list(zip(there.train(everything, 0, 0), resident().train(everything, 0, 0), strict=True))
    files = [folder(tmp_path, device=device)[0].train(numbers([1, 0], [2]), 0, 0) for device in (cuda, CPU)]
    for on_gpu, on_cpu in (*pairs, *zip(*files, strict=True)):
        assert on_gpu[0].device.type == on_gpu[1].device.type == "cuda"
        assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
        assert torch.equal(on_gpu[1].cpu(), on_cpu[1])


def folder(root: Path, workers: int = 0, device: torch.device = CPU) -> tuple[FolderFeed, tuple[str, ...]]:
    """Six files of different sizes and formats, wide and high."""
    files = tuple(f"{n}.{ending}" for n, ending in enumerate(("png", "jpg", "png", "jpeg", "bmp", "png")))
    for number, name in enumerate(files):
        if not (root / name).exists():
            save(root / name, 40 + 9 * number, 70 - 7 * number)
    split = LabelledFiles(root, files, torch.arange(len(files)) % 3)
    return FolderFeed(split, split, HOW, device, workers=workers), files


def test_files_are_read_the_same_whatever_the_workers_and_the_batches(tmp_path: Path) -> None:
    batches, other = numbers([5, 0, 3], [1, 2, 4]), numbers([4], [0, 1, 2, 3], [5])
    here, there = folder(tmp_path)[0], folder(tmp_path, workers=2)[0]
    for read in (lambda feed, parts: feed.train(parts, 2, 7), lambda feed, parts: feed.test(parts)):
        whole = by_number(batches, read(here, batches))
        assert_same(by_number(batches, read(there, batches)), whole)
        assert_same(by_number(other, read(here, other)), whole)
        assert {n: label for n, (_, label) in whole.items()} == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}
        assert all(image.shape == (3, 20, 28) and image.dtype == torch.uint8 for image, _ in whole.values())


def test_test_files_are_prepared_as_calibration_images_are(tmp_path: Path) -> None:
    feed, files = folder(tmp_path)
    ((images, _),) = feed.test(numbers(range(6)))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, torch.stack([load_image(tmp_path / name, HOW) for name in files]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_training_file_is_cut_as_torchvision_does_it_and_mirrored_half_the_time(
    tmp_path: Path, interpolation: str
) -> None:
    how = replace(HOW, interpolation=interpolation)
    path = save(tmp_path / "a.png", 60, 44)
    whole, flips, seeds = Image.open(path), 0, 40
    for seed in range(seeds):
        torch.manual_seed(seed)
        cut = RandomResizedCrop((20, 28), interpolation=InterpolationMode(interpolation))
        expected = pil_to_tensor(cut(whole))
        found = random_crop(path, how, seed)
        flips += torch.equal(found, expected.flip(2))
        assert torch.equal(found, expected) or torch.equal(found, expected.flip(2))
    # Binomial(40, 1/2): within 4 standard deviations, sqrt(10), of 20.
    assert abs(flips - seeds / 2) < 4 * 10**0.5


def test_files_are_cut_anew_in_each_epoch_and_two_equal_files_are_cut_differently(tmp_path: Path) -> None:
    feed, _ = folder(tmp_path)
    drawn = [next(feed.train(numbers([0]), *which))[0] for which in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(images.flatten().tolist()) for images in drawn}) == 3
    save(tmp_path / "same.png")
    twice = LabelledFiles(tmp_path, ("same.png", "same.png"), torch.tensor([0, 1]))
    ((images, _),) = FolderFeed(twice, twice, HOW, CPU).train(numbers([0, 1]), 0, 0)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    feed, files = folder(tmp_path, workers)
    (tmp_path / files[4]).write_text("no image")
    fed = feed.train(numbers([0, 1], [2, 3, 4]), 0, 0)
    assert len(next(fed)[0]) == 2
    with pytest.raises(
        UsageError, match=f"^{tmp_path}/4.bmp cannot be read as an image .*; repair or remove it$"
    ) as refused:
        next(fed)
    # The traceback still has the iterator's frame.
    assert refused.tb is not None
    assert multiprocessing.active_children() == []


def test_workers_leave_signals_to_the_process_that_started_them(tmp_path: Path) -> None:
    batches = numbers(*([n % 6] for n in range(12)))
    fed = folder(tmp_path, workers=2)[0].train(batches, 0, 0)
    read = [next(fed)]
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    read += fed
    assert_same(by_number(batches, read), by_number(batches, folder(tmp_path)[0].train(batches, 0, 0)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_workers_block_the_signals_from_their_first_moment_and_ignore_them(tmp_path: Path) -> None:
    fed = folder(tmp_path, workers=2)[0].train(numbers([0], [1], [2]), 0, 0)
    next(fed), next(fed)  # one of each worker
    for worker in multiprocessing.active_children():
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
        for number in (signal.SIGINT, signal.SIGTERM):
            assert all(int(status[kind], 16) >> (number - 1) & 1 for kind in ("SigBlk", "SigIgn"))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}


def test_an_iterator_that_is_closed_early_ends_its_workers(tmp_path: Path) -> None:
    feed, _ = folder(tmp_path, workers=2)
    fed = feed.train(numbers(*([n % 6] for n in range(60))), 0, 0)
    next(fed)
    assert len(multiprocessing.active_children()) == 2
    fed.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []
    next(feed.test(numbers([0], [1])))  # forgotten rather than closed
    gc.collect()
    assert multiprocessing.active_children() == []


def test_python_does_not_wait_for_ever_for_the_workers_of_an_iterator_that_is_still_open_at_exit(
    tmp_path: Path,
) -> None:
    folder(tmp_path)
    code = (
        "import sys, torch; from pathlib import Path; from bgcbench.data.feeds import FolderFeed, LabelledFiles\n"
        "from bgcbench.data.folder import IMAGENET_EVALUATION\n"
        "split = LabelledFiles(Path(sys.argv[1]), ('0.png',) * 40, torch.zeros(40, dtype=torch.int64))\n"
        "feed = FolderFeed(split, split, IMAGENET_EVALUATION, torch.device('cpu'), workers=1)\n"
        "left_open = feed.train(torch.arange(40).split(1), 0, 0)\n"
        "next(left_open)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).resolve().parents[2], timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_that_is_killed_is_an_error_of_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never.png")  # opening it waits for a writer
    split = LabelledFiles(tmp_path, ("never.png",), torch.zeros(1, dtype=torch.int64))
    fed = FolderFeed(split, split, HOW, CPU, workers=1).train(numbers([0]), 0, 0)

    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    timer = threading.Timer(0.5, kill)
    timer.start()
    with pytest.raises(BgcbenchError, match=r"^a process that reads images was lost \(DataLoader worker .* --workers$"):
        next(fed)
    timer.join()


def test_paddings_and_workers_below_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="pad=-1"):
        resident(pad=-1)
    with pytest.raises(ShapeError, match="workers=-1"):
        folder(tmp_path, workers=-1)
