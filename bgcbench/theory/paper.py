"""The figures that Lee, Park & Lee print: one layer (Tables 3 and 4) in SI units, and section 5.1."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Printed:
    """One cell group of Table 4: seconds (forward and backward), bytes (its "memory usage") and error (percent).

    The error column is Table 3's: ResNet-50 on ImageNet after 30 epochs of transfer learning, not a property of
    the layer that was timed.
    """

    time_s: float
    memory_bytes: int
    error: float


DEVICE = "RTX 3090"
# Table 4's layer: 3x3, 1024 -> 1024 channels, on 128 x 1024 x 7 x 7. (The text places it in ResNet-50, whose
# widest 3x3 has 512 channels; wide_resnet50_2 has this one.)
WORKLOAD = {"in_channels": 1024, "out_channels": 1024, "kernel": 3, "stride": 1, "batch": 128, "height": 7, "width": 7}
GROUPS = (2, 4, 8, 16)

# Section 5.1: 1-D convolutions, n = m, K = 3; the number of samples S and the length of the signals are not stated.
FIGURE_CHANNELS = 256
FIGURE_GROUPS = (4, 8, 16, 32, 64)
FIGURE_CEILING = 3.83e-3  # printed bound on every Rel.E / (1 - 1/N)^p
FIGURE_SLOPES = {"gc": 1, "bgc": 2}  # as the text reads them off Figure 1


def _printed(time_ms: float, memory_mib: float, error: float) -> Printed:
    return Printed(time_s=round(time_ms * 1e-3, 9), memory_bytes=round(memory_mib * MIB), error=error)


TABLE4: dict[tuple[str, int], Printed] = {
    ("standard", 1): _printed(7.979, 60.50, 23.87),
    ("gc", 2): _printed(9.056, 42.50, 26.54),
    ("gc", 4): _printed(4.449, 33.50, 36.70),
    ("gc", 8): _printed(2.120, 29.00, 43.72),
    ("gc", 16): _printed(2.265, 26.75, 50.09),
    ("bgc", 2): _printed(10.467, 75.75, 22.45),
    ("bgc", 4): _printed(4.790, 48.62, 25.51),
    ("bgc", 8): _printed(2.648, 37.06, 31.13),
    ("bgc", 16): _printed(2.557, 31.53, 35.45),
}
