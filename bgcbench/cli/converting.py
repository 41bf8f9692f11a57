"""``bgcbench convert``: a conversion alone, into a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from bgcbench.cli import output
from bgcbench.cli.measuring import check_images
from bgcbench.experiments.conversion import AskedOfConversion, ConversionConfig
from bgcbench.experiments.options import given_fields, options_of
from bgcbench.results import files

OPTIONS = [each for kind in (ConversionConfig, AskedOfConversion) for each in options_of(kind).values()]


def convert(context: typer.Context, parsed: Mapping[str, Any]) -> int:
    """Convert a network and save it; nothing is measured, evaluated or trained.

    Prints what was replaced, what was kept and why, and parameters and MACs before and after.
    bgcbench.load_converted reads the file.

    [bold]bgcbench convert resnet50 --variant bgc --groups 4 --data DIR -o resnet50-bgc4.pt[/bold]

    [bold]bgcbench convert net.py:make -v lowrank --rank 16 -o mine.pt[/bold]

    [bold]bgcbench convert resnet50 --plan plans/plan.json --data DIR -o planned.pt[/bold]
    """
    given = given_fields(options_of(ConversionConfig).values(), parsed)
    check_images(given)
    config = ConversionConfig(**given)
    asked = AskedOfConversion(**given_fields(options_of(AskedOfConversion).values(), parsed))
    files.check_new(asked.path, "--out", replace=asked.force)
    from bgcbench.experiments.conversion_run import converted_network
    from bgcbench.report import conversion_report

    with output.waiting(f"converting {config.model}", quiet=asked.quiet):
        network, done = converted_network(config)
    files.write_named(asked.path, "--out", network)
    output.emit(conversion_report(done), asked.form)
    if not asked.quiet:
        own = "" if done.record.source else "; bgcbench.load_converted(path, model) needs the original network, too"
        output.say(f"saved to {asked.path}{own}")
    return 0
