"""Sampled convolutions, summarised by the second moments of their rows.

The S convolutions are never held together: the rows of one output channel over all of them, (S, nK), are drawn, their
second moment is added to that of their group, and a group is handed on as soon as all of its rows are in.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench.errors import ShapeError

STRIPE = 192  # columns of a second moment that are formed at once
PRODUCT_NUMBERS = 2**22  # of rows that go into one matrix product: 32 MiB in float64


@dataclass(frozen=True)
class GroupMoment:
    """G = sum of w^T w over the rows w of one output group: ``matrix`` (nK, nK), of all convolutions together."""

    groups: int
    group: int
    matrix: Tensor


def contiguous_rows(out_channels: int, groups: int) -> list[int]:
    """The group of each output channel where groups are contiguous."""
    return [row * groups // out_channels for row in range(out_channels)]


def shuffled_rows(out_channels: int, groups: int) -> list[int]:
    """The group of each output channel behind a channel shuffle: p mod N."""
    return [row % groups for row in range(out_channels)]


def group_moments(
    draw: Callable[[int], Tensor], group_of: Mapping[int, Sequence[int]], out_channels: int
) -> Iterator[tuple[float, list[GroupMoment]]]:
    """For each N in ``group_of``, the row moments of every group; yields (share done, groups that are complete).

    draw: output channel -> its rows in all convolutions, (S, nK), the same every time. group_of: N -> the group of each
    output channel, such that the groups of a multiple of N lie within those of N. Rows are taken in the order in which
    groups become complete soonest; where one N divides the next, one unfinished group of each is held: (number of
    N + 1) (nK)^2 numbers. A yielded matrix is only valid until the next one is asked for.
    """
    numbers = sorted(group_of)
    # N takes the finished groups of the least multiple of its own that is asked for, or the rows themselves.
    feeds = {n: min((other for other in numbers if other > n and other % n == 0), default=None) for n in numbers}
    takers = Counter(feeds.values())
    order = sorted(range(out_channels), key=lambda row: [group_of[groups][row] for groups in numbers])
    missing = {groups: Counter(group_of[groups]) for groups in numbers}
    unfinished: dict[tuple[int, int], Tensor] = {}
    done = 0
    for ids, members in itertools.groupby(order, key=lambda row: {groups: group_of[groups][row] for groups in numbers}):
        block = list(members)
        own = _moment_of(draw(row) for row in block)
        done += len(block)
        complete: dict[int, GroupMoment] = {}
        for groups in reversed(numbers):
            k, source = ids[groups], feeds[groups]
            missing[groups][k] -= len(block)
            if source is not None and source not in complete:
                continue
            matrix = own if source is None else complete[source].matrix
            if (groups, k) in unfinished:
                unfinished[groups, k] += matrix
            else:  # taken over, unless several N build on it
                unfinished[groups, k] = matrix if takers[source] == 1 else matrix.clone()
            if not missing[groups][k]:
                complete[groups] = GroupMoment(groups, k, unfinished.pop((groups, k)))
        yield done / out_channels, list(complete.values())


def _moment_of(parts: Iterable[Tensor]) -> Tensor:
    """sum of X^T X over the parts X (S, nK), several in one product while they are small."""
    total: Tensor | None = None
    waiting: list[Tensor] = []
    for part in itertools.chain(parts, [None]):
        if waiting and (part is None or sum(w.numel() for w in waiting) + part.numel() > PRODUCT_NUMBERS):
            rows = torch.cat(waiting)
            if total is None:
                total = rows.new_zeros(rows.shape[1], rows.shape[1])
            _add_gram(total, rows)
            waiting = []
        if part is not None:
            waiting.append(part)
    if total is None:
        raise ShapeError("the second moment of no rows is undefined")
    for start in range(STRIPE, len(total), STRIPE):  # mirrored from above the diagonal
        total[start : start + STRIPE, :start] = total[:start, start : start + STRIPE].T
    return total


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """total += rows^T rows, in stripes and only on and above their diagonal: torch offers no symmetric product."""
    for start in range(0, len(total), STRIPE):
        stripe = slice(start, start + STRIPE)
        total[stripe, start:].addmm_(rows[:, stripe].T, rows[:, start:])


def he_rows(row: int, samples: int, size: int, seeds: Callable[[str], int], dtype: torch.dtype) -> Tensor:
    """The rows of output channel ``row`` in ``samples`` convolutions under He initialisation: (samples, size).

    i.i.d. N(0, 2 / fan_in) with fan_in = nK = ``size`` (He et al., 2015). Drawn in float32, as layers are initialised,
    from a generator of the row's own, so that the numbers depend on nothing but seed, row and shape.
    """
    generator = torch.Generator(device="cpu").manual_seed(seeds(f"weights:{row}"))
    numbers = torch.randn(samples, size, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.to(dtype).mul_(math.sqrt(2 / size))
