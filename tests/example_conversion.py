"""What a conversion of a network of three convolutions may have been. Every number is made up."""

from __future__ import annotations

from typing import Any

import msgspec

from bgcbench.results.rows import Conversion

SHAPE = {"also": [], "in_channels": 16, "out_channels": 32, "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1],
         "dilation": [1, 1], "bias": False, "padding_mode": "zeros", "height": 8, "width": 8, "calls": 1}  # fmt: skip
LOSS = {"copied": 0.9, "before": 0.5, "rows": 9, "held_out_rows": 3, "condition": 10.0, "ridge": 0.1, "centred": True,
        "scarce": False}  # fmt: skip


def conversion(**more: Any) -> Conversion:
    layers = [{"name": name, "groups": 4, "variant": "lowrank", "rank": 8, "init": "calibrated", **SHAPE}
              for name in ("a", "b")]  # fmt: skip
    losses = [{"name": name, "groups": 4, "after": after, **LOSS} for name, after in (("a", 0.02), ("b", 0.3))]
    calibration = {"images": 8, "held_out": 2, "seed": 0, "rebn": True, "norms": 2, "seconds": 1.0, "moment_bytes": 9,
                   "in_flight_bytes": 9, "layers": losses}  # fmt: skip
    record = {"replaced": ["a", "b"], "kept": [{"name": "stem", "reason": "the first convolution", "code": "first"}],
              "variant": "lowrank", "groups": 1, "rank": 8, "init": "calibrated", "layers": layers,
              "calibration": calibration, "notes": ["a note of the conversion"]}  # fmt: skip
    done = {"model": "net", "weights": "own", "before": {"params": 1000, "macs": 4000000},
            "after": {"params": 250, "macs": 1000000}, "record": record, "notes": ["a note of the images"]}  # fmt: skip
    return msgspec.convert(done | more, Conversion)
