"""The figures that Lee, Park & Lee print: transfer (Table 3), one layer (Table 4), section 5.1, Tables 5 and 6."""

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

# Table 3: top-1 errors (percent) of ResNet-50 on ImageNet, converted with copied weights and trained 30 epochs more.
# The standard convolution's is that of the published weights (torchvision's IMAGENET1K_V1), trained no further.
TABLE3_MODEL, TABLE3_DATA, TABLE3_EPOCHS = "resnet50", "imagenet", 30
TABLE3: dict[tuple[str, int], float] = {
    ("standard", 1): 23.87,
    ("gc", 2): 26.54,
    ("gc", 4): 36.70,
    ("gc", 8): 43.72,
    ("gc", 16): 50.09,
    ("bgc", 2): 22.45,
    ("bgc", 4): 25.51,
    ("bgc", 8): 31.13,
    ("bgc", 16): 35.45,
}


def _printed(variant: str, groups: int, time_ms: float, memory_mib: float) -> Printed:
    return Printed(round(time_ms * 1e-3, 9), round(memory_mib * MIB), TABLE3[variant, groups])


TABLE4: dict[tuple[str, int], Printed] = {
    cell[:2]: _printed(*cell)
    for cell in (
        ("standard", 1, 7.979, 60.50),
        ("gc", 2, 9.056, 42.50),
        ("gc", 4, 4.449, 33.50),
        ("gc", 8, 2.120, 29.00),
        ("gc", 16, 2.265, 26.75),
        ("bgc", 2, 10.467, 75.75),
        ("bgc", 4, 4.790, 48.62),
        ("bgc", 8, 2.648, 37.06),
        ("bgc", 16, 2.557, 31.53),
    )
}

# Tables 5 and 6: top-1 errors (percent) of networks trained from scratch on CIFAR-10 and on ImageNet.
TABLE_VARIANTS = ("standard", "gc", "shuffle", "flgc", "tlgc", "bgc")
TABLE5_MODELS, TABLE5_GROUPS = ("efficientnet_b0", "wrn_28_10", "resnext29_8x64d"), (2, 4, 8, 16)
TABLE6_MODELS, TABLE6_GROUPS = ("efficientnet_b0", "wide_resnet34_2", "mobilenet_v2"), (2, 4, 8)
TABLE5_EPOCHS, TABLE6_EPOCHS = 200, 90

# The columns of a table from left to right; EfficientNet-B0 has no N = 16 in Table 5.
_TABLE5 = {
    "efficientnet_b0": {
        "standard": (8.42,),
        "gc": (10.02, 11.25, 13.14),
        "shuffle": (8.72, 9.41, 10.65),
        "flgc": (8.63, 9.70, 10.49),
        "tlgc": (8.93, 9.42, 10.68),
        "bgc": (7.16, 7.50, 7.80),
    },
    "wrn_28_10": {
        "standard": (3.88,),
        "gc": (4.33, 5.44, 6.43, 8.47),
        "shuffle": (4.00, 4.21, 4.73, 5.28),
        "flgc": (4.62, 6.16, 9.81, 11.26),
        "tlgc": (4.12, 4.34, 4.79, 4.95),
        "bgc": (3.75, 4.02, 4.22, 4.76),
    },
    "resnext29_8x64d": {
        "standard": (5.32,),
        "gc": (5.92, 6.76, 6.52, 6.92),
        "shuffle": (4.52, 4.17, 4.81, 4.89),
        "flgc": (4.68, 5.16, 5.25, 6.11),
        "tlgc": (5.16, 6.92, 6.56, 6.08),
        "bgc": (5.84, 5.84, 6.00, 5.60),
    },
}
_TABLE6 = {
    "efficientnet_b0": {
        "standard": (30.68,),
        "gc": (35.18, 41.64, 48.42),
        "shuffle": (33.91, 38.02, 42.74),
        "flgc": (35.53, 40.71, 45.38),
        "tlgc": (33.50, 36.38, 38.66),
        "bgc": (31.82, 33.78, 38.13),
    },
    "wide_resnet34_2": {
        "standard": (24.99,),
        "gc": (26.92, 31.96, 36.70),
        "shuffle": (25.12, 26.84, 29.03),
        "flgc": (30.53, 38.30, 45.54),
        "tlgc": (25.36, 27.17, 28.43),
        "bgc": (24.19, 25.36, 27.16),
    },
    "mobilenet_v2": {
        "standard": (34.13,),
        "gc": (39.50, 46.15, 51.97),
        "shuffle": (36.67, 38.14, 42.75),
        "flgc": (37.98, 44.37, 49.28),
        "tlgc": (33.56, 36.88, 39.16),
        "bgc": (36.10, 37.82, 42.65),
    },
}


def _cells(
    table: dict[str, dict[str, tuple[float, ...]]], groups: tuple[int, ...]
) -> dict[tuple[str, str, int], float]:
    """The cells by (model, variant, N); the standard convolution has N = 1 and one cell."""
    return {
        (model, variant, n): error
        for model, lines in table.items()
        for variant, errors in lines.items()
        for n, error in zip((1,) if variant == "standard" else groups, errors, strict=False)
    }


TABLE5 = _cells(_TABLE5, TABLE5_GROUPS)
TABLE6 = _cells(_TABLE6, TABLE6_GROUPS)


def printed_error(dataset: str, model: str, variant: str, groups: int) -> float | None:
    """The top-1 error (percent) that Table 5 (cifar10) or Table 6 (imagenet) prints; None where it has no such cell."""
    return {"cifar10": TABLE5, "imagenet": TABLE6}.get(dataset, {}).get((model, variant, groups))


def transferred_error(dataset: str, model: str, variant: str, groups: int) -> float | None:
    """The top-1 error (percent) that Table 3 prints for a converted network; None where it has no such cell."""
    return TABLE3.get((variant, groups)) if (dataset, model) == (TABLE3_DATA, TABLE3_MODEL) else None
