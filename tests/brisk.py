"""The command line with short warm-ups and no matrix products, on one thread: ``python -m tests.brisk ARGUMENTS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bgcbench.cli import run
from bgcbench.experiments import profile_run
from bgcbench.measure import ceilings, device
from bgcbench.measure.timing import Rules


def shorten(put: Callable[[Any, str, Any], None]) -> None:
    """``put`` in place what takes seconds of no interest to a test or depends on how busy the machine is.

    Warm-ups, the device's ceilings, the canary, where no time is asked for that of each row and rounds after those that
    an interval needs, a quick look, and a second measurement of what cannot be.
    """
    from bgcbench.planning import plan

    for_device = Rules.for_device

    def shortened(device_type: str, *, max_time_s: float | None = None, **options: Any) -> Rules:
        rules = replace(for_device(device_type, max_time_s=max_time_s, **options), warmup_min_s=0.01, warmup_max_s=0.02)
        return replace(rules, max_time_s=0.02, target_half_width=10.0) if max_time_s is None else rules

    put(Rules, "for_device", shortened)
    put(profile_run, "QUICK_S", 0.5)
    put(plan, "layer_rules", shortened)
    put(ceilings, "measure_ceilings", lambda *_, **__: ceilings.Ceilings(1e11, 1e10, (1,), 1))
    put(device, "CANARY_S", 0.0)  # its smallest product
    put(profile_run, "diagnose", lambda _: [])
    put(profile_run, "is_doubtful", lambda *_: False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shorten(setattr)
    run()
