"""``bgcbench profile`` and ``bgcbench approx``: what variants cost, and how well they stand in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from bgcbench.cli.output import Said
from bgcbench.cli.run import Beginning, Command
from bgcbench.errors import UsageError
from bgcbench.experiments.approx import PRESETS, ApproxConfig, ApproxNetworkConfig
from bgcbench.experiments.approx import plan as approx_plan
from bgcbench.experiments.options import Asked, AskedOfPicture, in_shard
from bgcbench.experiments.profile import NetworkConfig, ProfileConfig, plan
from bgcbench.measure.statistics import ROUNDS_OF_INTERVAL
from bgcbench.results import Json
from bgcbench.specs import DATA_SETS, WEIGHTS, check_choice, is_own

if TYPE_CHECKING:
    from bgcbench.experiments.approx_network_run import ApproxNetworkRun
    from bgcbench.experiments.approx_run import ApproxRun
    from bgcbench.experiments.base import Session
    from bgcbench.experiments.profile_run import ProfileRun, Update
    from bgcbench.training.distributed import World


class Profile(Command):
    """Measure what a convolution, or a network, and its cheaper variants cost on this device.

    Without a shape it is the paper's Table 4: 3x3, 1024 -> 1024 channels, 128 images of 7x7. Every row is interleaved
    with the standard convolution (the dense network), so that the ratios hold while the machine drifts.

    [bold]bgcbench profile --channels 1024 --groups 2,4,8,16[/bold]

    [bold]bgcbench profile --channels 256 --size 14 --precision bf16 --layout nhwc --variants all --quick[/bold]

    [bold]bgcbench profile resnet50 --groups 4 --batch 4 --layers --quick[/bold]
    """

    summary = "Measure what convolution variants cost here."
    empty_file = False
    asked = AskedOfPicture
    kinds = (ProfileConfig, NetworkConfig)
    preset = "table4: the paper's Table 4 (also what no shape means)."

    def given(self, given: Json, preset: str | None, asked: Asked, context: typer.Context) -> Json:
        check_reference(given)
        if preset is None:
            return with_plan(given, asked)
        check_choice("preset", preset, ("table4",))
        free = ("in_channels", "out_channels", "kernel", "stride", "batch", "height", "model")
        for field in (each for each in free if each in given):
            how = "takes another workload" if field == "model" else "changes it"
            raise UsageError(
                f"--preset {preset} fixes the layer, and {self.option(field)} {how}; leave one of them out"
            )
        return given

    def check(self, config: Any, *, fresh: bool, replace: bool) -> None:
        if isinstance(config, ProfileConfig):  # a network's rows are planned when it has been built
            plan(config)

    def open_session(self, config: Any) -> Session:
        from bgcbench.experiments.profile_run import open_session

        return open_session(config)

    def prepare(self, config: Any, session: Session, world: World) -> Any:
        if not isinstance(config, NetworkConfig):
            return config
        from bgcbench.experiments.network_run import plan_network  # and with it torchvision

        planned = plan_network(config)
        session.warnings.extend(planned.notes)
        return planned

    def start(self, prepared: Any, session: Session, world: World, beginning: Beginning) -> ProfileRun:
        from bgcbench.experiments.profile_run import ProfileRun

        interleaved = beginning.stored.interleaved if beginning.stored else ()
        shared: Json = {"kept": beginning.kept, "interleaved": interleaved, "stop": beginning.stop}
        if isinstance(prepared, ProfileConfig):
            return ProfileRun(prepared, session, in_shard(prepared.shard, plan(prepared)), **shared)
        return ProfileRun(prepared.config, session, in_shard(prepared.config.shard, prepared.rows), **shared)

    def plan_lines(self, run: ProfileRun, *, full: bool) -> list[str]:
        config, device, cpu = run.config, run.session.environment.device, run.session.environment.cpu
        on = f"{device.name} ({cpu.threads} thread{'s' * (cpu.threads != 1)})" if device.type == "cpu" else device.name
        lines = [
            f"plan: {len(run.subjects)} rows x {', '.join(config.phases)} on {on}, "
            f"{config.precision}, {config.layout}, {config.mode}; roughly {_duration(run.estimated_s())}"
        ]
        return lines + [f"  {row.key}" + (f"  invalid: {row.invalid}" if row.invalid else "") for row in run.planned]

    def is_drawable(self, row: Any) -> bool:
        rounds = [len(set(phase.rounds)) for phase in row.phases.values()]
        return row.params.variant != "standard" and max(rounds, default=0) >= ROUNDS_OF_INTERVAL

    def is_look(self, update: Update, run: ProfileRun) -> bool:
        return update.progress is not None and update.progress.round_done

    def said(self, update: Update, run: ProfileRun) -> Said:
        progress = update.progress
        if progress is None:
            return Said(update.doing)
        text = update.doing
        if progress.track is not None:
            text += f"  {progress.track.label}"
            if progress.track.samples:
                text += f"  median {progress.track.summary().median_s * 1e3:.3f} ms"
        if progress.left_s is None:
            return Said(text)
        share = progress.elapsed_s / ((progress.elapsed_s + progress.left_s) or 1.0)
        return Said(f"{text}  at most {progress.left_s:.0f} s left", share)


class Approx(Command):
    """How well a variant can stand in for standard convolutions: exactly, beside the paper's bounds.

    Without a shape it is section 5.1 of the paper: 1-D convolutions, 256 -> 256 channels, He initialisation, the least
    error over the variant's own weights (5.1). With --model every convolution of a network is asked on the activations
    that it really sees, with copied, white-optimal and calibrated weights.

    [bold]bgcbench approx --plot figures.png[/bold]

    [bold]bgcbench approx --variants all --channels 64 --groups 2,4,8 --input normal,relu,factor:0.5[/bold]

    [bold]bgcbench approx resnet50 --data path/to/images --plot heatmap.png[/bold]
    """

    summary = "How well variants can stand in for standard convolutions."
    kinds = (ApproxConfig, ApproxNetworkConfig)
    asked = AskedOfPicture
    preset = "figure1, figure2: section 5.1 of the paper (also what no shape means), with that picture."

    def given(self, given: Json, preset: str | None, asked: Asked, context: typer.Context) -> Json:
        if preset is not None:
            check_choice("preset", preset, PRESETS)
            free = {"samples", "device", "threads", "seed", "quick", "length"}  # what the paper does not state
            if fixed := [name for name in given if name not in free]:
                raise UsageError(
                    f"--preset {preset} fixes the experiment, and {self.option(fixed[0])} changes it; leave one of "
                    "them out"
                )
        check_images(given)
        return given

    def check(self, config: Any, *, fresh: bool, replace: bool) -> None:
        if isinstance(config, ApproxConfig):
            approx_plan(config)

    def open_session(self, config: Any) -> Session:
        from bgcbench.experiments.approx_run import open_session

        return open_session(config)

    def prepare(self, config: Any, session: Session, world: World) -> Any:
        if isinstance(config, ApproxConfig):
            return config
        from bgcbench.experiments.approx_network_run import prepare

        prepared = prepare(config)
        session.settings |= prepared.settings
        return prepared

    def start(
        self, prepared: Any, session: Session, world: World, beginning: Beginning
    ) -> ApproxRun | ApproxNetworkRun:
        from bgcbench.experiments.approx_network_run import ApproxNetworkRun
        from bgcbench.experiments.approx_run import ApproxRun

        if isinstance(prepared, ApproxConfig):
            return ApproxRun(prepared, session, approx_plan(prepared), kept=beginning.kept, stop=beginning.stop)
        return ApproxNetworkRun(prepared, session, kept=beginning.kept, stop=beginning.stop)

    def picture(self, preset: str | None) -> str | None:
        return preset


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def check_reference(given: Json) -> None:
    """Raise UsageError where the standard convolution is asked for and left out."""
    if given.get("reference") is False and (1 in given.get("groups", ()) or "standard" in given.get("variants", ())):
        raise UsageError("--no-reference leaves the standard convolution out, and it is asked for; drop one of the two")


def with_plan(given: Json, asked: Asked) -> Json:
    """``given`` with nothing beside a plan, where one is given and no variants, N or ranks are."""
    goes_on = asked.resume is not None and not asked.is_auto
    if "plan" not in given or goes_on or not given.keys().isdisjoint(("variants", "groups", "ranks")):
        return given
    return {**given, "variants": ("standard",)}


def check_images(given: Json) -> None:
    """Raise UsageError for a folder of images or a file of weights that is clearly not there."""
    data, weights = given.get("data"), given.get("weights")
    if data is not None and data not in DATA_SETS and not is_own(data) and _is_missing(data):
        raise UsageError(f"--data {data} is not there; give {', '.join(DATA_SETS)}, or a folder of images")
    if weights is not None and weights not in WEIGHTS and _is_missing(weights):
        raise UsageError(f"--weights {weights}: there is no such file; choose a file, {' or '.join(WEIGHTS)}")


def _is_missing(path: str) -> bool:
    """Whether ``path`` is clearly one, and nothing is there."""
    return bool(os.path.dirname(path)) and not os.path.exists(path)
