"""``bgcbench export``: a network in a file that runs without bgcbench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bgcbench.cli.output import say, waiting
from bgcbench.errors import UsageError
from bgcbench.experiments import options
from bgcbench.specs import EXPORTERS, OPSET, OUTPUT_TOLERANCE, PLAIN_ALGORITHMS, TARGETS, check_choice

MADE_BY = "transfer --save, plan --save, save_converted or train"


def export(
    network: Annotated[Path, typer.Argument(help=f"A file that {MADE_BY} wrote.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="onnx, torch (a state dict and code of torch.nn parts) or exported (torch.export's .pt2).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file to write: .onnx, .pt or .pt2.", show_default=False)
    ],
    size: Annotated[
        str | None,
        typer.Option(help="Height and width of an image: 224 or 224x320.", show_default="what the file says"),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Fix the number of images of a call.", show_default="any")] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help=f"How variants are computed: {', '.join(PLAIN_ALGORITHMS)}, where a layer has it; or auto, "
            "for ONNX the fastest in ONNX Runtime here, else what multiplies least."
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads that auto measures with.", show_default="as many as torch uses")
    ] = None,
    exporter: Annotated[str, typer.Option(help="torch's exporter to ONNX: dynamo or torchscript, the older one.")] = (
        EXPORTERS[0]
    ),
    opset: Annotated[int, typer.Option(help="ONNX's.")] = OPSET,
    inputs: Annotated[
        Path | None,
        typer.Option(help="Images to compare outputs on besides random ones: a tensor (B, C, H, W), .pt or .npy."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest error of the outputs, relative to their norm.")] = (
        OUTPUT_TOLERANCE
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> int:
    """Write a converted or trained network to a file that runs without bgcbench, and check that it computes the same.

    Learnt variants are deployed, batch norm is folded, and BGC, Shuffle, TLGC and low rank become standard operations.

    [bold]bgcbench export networks/bgc-n4.pt --to onnx -o network.onnx[/bold]
    """  # fmt: skip
    check_choice("exporter", exporter, EXPORTERS)
    check_choice("target", to, TARGETS)
    if algorithm != "auto":
        check_choice("algorithm", algorithm, PLAIN_ALGORITHMS)
    if (exporter, opset) != (EXPORTERS[0], OPSET) and to != "onnx":
        raise UsageError(f"--exporter and --opset are for --to onnx, not {to}; leave them out")
    for name, value in (("batch", batch), ("threads", threads), ("opset", opset)):
        if value is not None:
            options.positive(name, value)
    if not tolerance > 0:
        raise UsageError(f"--tolerance {tolerance:g} must be a positive number, such as {OUTPUT_TOLERANCE:g}")
    if size is not None and inputs is not None:
        raise UsageError("--inputs are images of a size; leave --size out")
    side = None if size is None else options.size("size", size)
    for what, path in (("NETWORK", network), ("--inputs", inputs)):
        if path is not None and not path.is_file():
            wrong = "is a folder; name a file in it" if path.is_dir() else "is not there"
            made = f"a file that {MADE_BY} wrote" if path is network else "a .pt or .npy file with a tensor"
            raise UsageError(f"{what} {path} {wrong}; give {made}")
    from bgcbench.deployment.paths import files_of

    files_of(out, to, force=force)  # what can be wrong with it is said before torch is imported
    import torch

    from bgcbench.deployment.export import export as write
    from bgcbench.experiments.export_run import load_network, read_inputs

    if threads is not None:
        torch.set_num_threads(threads)
    model, own = load_network(network)
    example: Any = own if side is None else (own[0] if own else 3, *side)
    if inputs is not None:
        example = read_inputs(inputs)
    say(f"{network}: {type(model).__name__} on {_size_of(example)}")
    with waiting(f"exporting {network}", quiet=False):
        written = write(
            model, out, to, example_input=example, algorithm=algorithm, batch=batch, exporter=exporter, opset=opset,
            tolerance=tolerance, force=force,
        )  # fmt: skip
    print(written)
    return 0


def _size_of(example: Any) -> str:
    """Of the images that a network is exported for."""
    if example is None:
        return "images of the first size that it takes"
    channels, height, width = example if isinstance(example, tuple) else example.shape[-3:]
    return f"images of {channels}x{height}x{width}"
