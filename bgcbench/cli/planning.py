"""``bgcbench plan``: what each convolution of a network becomes for one budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bgcbench import results
from bgcbench.cli.measuring import check_images
from bgcbench.cli.run import Beginning, Command
from bgcbench.experiments.options import Asked, AskedOfPlan
from bgcbench.experiments.plan import PlanConfig
from bgcbench.results import Json

if TYPE_CHECKING:
    from bgcbench.experiments.base import Session
    from bgcbench.experiments.plan_run import PlanRun, Prepared
    from bgcbench.training.distributed import World


class PlanCommand(Command):
    """Choose layer by layer what each convolution becomes for one budget, from measured cost and loss, and prove it.

    The budget is a share of the parameters or multiply-adds of the convolutions that may be replaced, of the network's
    time on this device, or a predicted loss; without one there is the curve of the best plans. The planned network and
    the best uniform conversions at the same budget are compared with the original on images that were never used.

    [bold]bgcbench plan resnet50 --data DIR --time 0.7[/bold]

    [bold]bgcbench plan timm/resnet18 --weights FILE --data DIR --macs 0.5 --save plans[/bold]
    """

    summary = "Choose what each convolution becomes, for one budget."
    kinds = (PlanConfig,)
    asked = AskedOfPlan
    missing = "name a MODEL to plan, such as resnet50"

    def given(self, given: Json, preset: str | None, asked: Asked, context: typer.Context) -> Json:
        check_images(given)
        return given

    def open_session(self, config: Any) -> Session:
        from bgcbench.experiments.base import open_device

        return open_device(config, config.device, modes=(config.mode,), layout=config.layout)

    def prepare(self, config: Any, session: Session, world: World) -> Prepared:
        from bgcbench.experiments.plan_run import prepare

        prepared = prepare(config)
        session.settings |= prepared.settings
        return prepared

    def start(self, prepared: Any, session: Session, world: World, beginning: Beginning) -> PlanRun:
        from bgcbench.experiments.plan_run import PlanRun, measured

        facts = beginning.stored.plan if beginning.stored else None
        replace = beginning.replace or not beginning.afresh
        run = PlanRun(prepared, session, kept=beginning.kept, facts=facts, replace=replace, stop=beginning.stop)
        if run.config.measured is not None and facts is None:
            measured(results.read(Path(run.config.measured)), run.config.measured, run)
        return run

    def plan_lines(self, run: PlanRun, *, full: bool) -> list[str]:
        lines = run.plan_lines
        return lines if full else [line for line in lines if not line.startswith("  ")]
