"""``bgcbench export``: a network in a file that runs without bgcbench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bgcbench.cli.output import say
from bgcbench.errors import UsageError
from bgcbench.experiments import options
from bgcbench.specs import EXPORTERS, OPSET, OUTPUT_TOLERANCE, PLAIN_ALGORITHMS, TARGETS, check_choice

MADE_BY = "transfer --save, plan --save, save_converted or train"


def register(app: typer.Typer) -> None:
    """Make it a command of ``app``."""
    app.command(short_help="Write a converted network to a file that runs without bgcbench.")(export)


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
    for path in (network, *([] if inputs is None else [inputs])):
        if not path.is_file():
            what = "is a folder; name a file in it" if path.is_dir() else "is not there"
            raise UsageError(f"{path} {what}; NETWORK is a file that {MADE_BY} wrote")
    from bgcbench.deployment.paths import files_of

    files_of(out, to, force=force)
    return _export(network, inputs, side, threads, out, to,
                   {"algorithm": algorithm, "batch": batch, "exporter": exporter, "opset": opset,
                    "tolerance": tolerance, "force": force})  # fmt: skip


def _export(
    network: Path,
    inputs: Path | None,
    side: tuple[int, int] | None,
    threads: int | None,
    out: Path,
    to: str,
    chosen: dict[str, Any],
) -> int:
    import torch

    from bgcbench.deployment.export import export
    from bgcbench.experiments.export_run import load_network, read_inputs

    if threads is not None:
        torch.set_num_threads(threads)
    model, own = load_network(network)
    example: Any = own if side is None else (own[0] if own else 3, *side)
    say(f"{network}: {type(model).__name__} on images of {'x'.join(map(str, example)) if example else 'any size'}")
    written = export(model, out, to, example_input=example if inputs is None else read_inputs(inputs), **chosen)
    print(written)
    return 0
