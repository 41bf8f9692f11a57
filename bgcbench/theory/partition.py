"""Balanced partitions of outputs and inputs that keep the most of a kernel inside the groups.

Given Q_ij >= 0, what is kept when output i and input j stand in one group, choose balanced partitions t of the outputs
and s of the inputs that maximise sum over t_i = s_j of Q_ij. The problem is NP-hard; this is a search, not an optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ALTERNATIONS = 50
MAX_SWAPS_PER_ITEM = 4  # in one assignment; swaps that gain end by themselves, this only bounds rounding


def balanced_sizes(channels: int, groups: int) -> list[int]:
    """Sizes of ``groups`` groups that differ by at most one, the larger ones first."""
    return [channels // groups + (g < channels % groups) for g in range(groups)]


def contiguous_partition(channels: int, groups: int) -> Tensor:
    """The group of each channel, groups being contiguous and balanced: (channels,), int64, on the CPU."""
    groups_of = [group for group, size in enumerate(balanced_sizes(channels, groups)) for _ in range(size)]
    return torch.tensor(groups_of, dtype=torch.int64, device="cpu")


def kept_mass(mass: Tensor, outputs: Tensor, inputs: Tensor) -> float:
    """Sum of ``mass`` (m, n) over the pairs in one group. outputs: (m,), inputs: (n,)."""
    return float(mass[outputs[:, None] == inputs[None, :]].sum())


def search_partition(mass: Tensor, groups: int, *, restarts: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Balanced groups of the outputs (m,) and of the inputs (n,) with much of ``mass`` (m, n) inside; CPU, int64.

    From each start the two sides are assigned in turn until nothing is gained, each by regret and exchanges between
    pairs of groups. Starts: the contiguous partition (so the result is never worse than plain GC), a greedy peeling
    that recovers planted blocks, and ``restarts`` random ones from ``seed``.
    """
    mass = mass.detach().to(device="cpu", dtype=torch.float64)
    n = mass.shape[1]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    plain = contiguous_partition(n, groups)
    starts = [plain, _peel(mass, groups)]
    starts += [plain[torch.randperm(n, generator=generator, device="cpu")] for _ in range(restarts)]
    best: tuple[float, Tensor, Tensor] | None = None
    for inputs in starts:
        outputs = torch.empty(0, device="cpu")
        kept = -1.0
        for _ in range(MAX_ALTERNATIONS):
            outputs = assign(_by_group(mass, inputs, groups))
            inputs = assign(_by_group(mass.T, outputs, groups))  # noqa: PLW2901 - the start is improved in place
            before, kept = kept, kept_mass(mass, outputs, inputs)
            if kept <= before * (1 + 1e-12):
                break
        if best is None or kept > best[0]:
            best = kept, outputs, inputs
    contiguous = contiguous_partition(mass.shape[0], groups), plain
    if best is None or best[0] <= kept_mass(mass, *contiguous):
        return contiguous
    return best[1], best[2]


def assign(scores: Tensor) -> Tensor:
    """A balanced group for each row of ``scores`` (items, N) with a high total; (items,).

    Rows choose in the order of what they would lose by their second choice; then rows of two groups change places as
    long as that gains, over all pairs of groups.
    """
    items, groups = scores.shape
    free = balanced_sizes(items, groups)
    top = scores.topk(min(2, groups), dim=1).values
    order = (top[:, 0] - top[:, -1]).argsort(descending=True, stable=True)
    wishes = scores.argsort(dim=1, descending=True, stable=True).tolist()
    chosen = torch.empty(items, dtype=torch.int64, device=scores.device)
    for item in order.tolist():
        group = next(g for g in wishes[item] if free[g])
        chosen[item] = group
        free[group] -= 1
    _exchange(scores, chosen)
    return chosen


def _exchange(scores: Tensor, chosen: Tensor) -> None:
    """Let rows of two groups change places, the most gainful pair first, until no pair gains; ``chosen`` in place."""
    items, groups = scores.shape
    least = 1e-12 * float(scores.abs().max())
    gain = scores - scores.gather(1, chosen[:, None])  # of row i moving to group h
    for _ in range(MAX_SWAPS_PER_ITEM * items):
        # The best mover from each group g to each h; the two moves of a swap are independent of one another.
        best = scores.new_full((groups, groups), -torch.inf).scatter_reduce_(
            0, chosen[:, None].expand(-1, groups), gain, "amax"
        )
        total = best + best.T
        at = int(total.argmax())
        g, h = divmod(at, groups)
        if total[g, h] <= least:
            return
        movers = [int(torch.where(chosen == a, gain[:, b], -torch.inf).argmax()) for a, b in ((g, h), (h, g))]
        for mover, group in zip(movers, (h, g), strict=True):
            chosen[mover] = group
            gain[mover] = scores[mover] - scores[mover, group]


def _by_group(mass: Tensor, partition: Tensor, groups: int) -> Tensor:
    """For each row of ``mass`` (items, others), its sum over each group of the others: (items, N)."""
    return mass.new_zeros(mass.shape[0], groups).index_add_(1, partition, mass)


def _peel(mass: Tensor, groups: int) -> Tensor:
    """A partition of the inputs, one group after the other: the heaviest input left, the outputs that it feeds most,
    and the inputs that feed those most."""
    rest_in, rest_out = (torch.ones(side, dtype=torch.bool, device=mass.device) for side in mass.shape[::-1])
    inputs = torch.empty(mass.shape[1], dtype=torch.int64, device=mass.device)
    sizes = zip(balanced_sizes(mass.shape[0], groups), balanced_sizes(mass.shape[1], groups), strict=True)
    for group, (size_out, size_in) in enumerate(sizes):
        left = torch.where(rest_out[:, None] & rest_in, mass, -torch.inf)
        seed = left[rest_out].sum(0).argmax()
        outputs = left[:, seed].topk(size_out).indices
        members = torch.where(rest_in, mass[outputs].sum(0), -torch.inf).topk(size_in).indices
        inputs[members] = group
        rest_in[members], rest_out[outputs] = False, False
    return inputs
