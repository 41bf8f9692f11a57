"""What every measuring command is: resolve or resume, plan, run while saving, render, exit code.

A command says only what is its own (:class:`Command`); :func:`run_command` does the rest for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from bgcbench import plots, results
from bgcbench.cli.output import Looks, Output, Said, closing, print_document, say, waiting, with_progress
from bgcbench.errors import OutputError, ResultFileError, UsageError
from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.options import (
    WORKLOAD,
    Asked,
    AskedOfTraining,
    Option,
    check_options,
    given_fields,
    options_of,
    shorthand,
)
from bgcbench.experiments.profile import check_same_fields, check_same_workload
from bgcbench.interrupts import Interrupts
from bgcbench.measure.allocator import memory_state
from bgcbench.results import Document, Json
from bgcbench.results.rows import Row
from bgcbench.training.launcher import own_rank, processes

if TYPE_CHECKING:
    from bgcbench.experiments.base import Session
    from bgcbench.training.distributed import World


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    kept: the rows of the file that it goes on with, by key, and stored, that file. folder: of checkpoints. afresh: no
    file was named to go on with. replace: whether files may be replaced. stop: whether it is asked to end.
    """

    stored: Document | None
    folder: Path | None
    afresh: bool
    replace: bool
    stop: Any

    @property
    def kept(self) -> dict[str, Any]:
        return {row.key: row for row in self.stored.results} if self.stored else {}

    @property
    def of_training(self) -> Json:
        """The options of a run that has checkpoints."""
        names = ("kept", "folder", "afresh", "replace", "stop")
        return {name: getattr(self, name) for name in names}


class Command(ABC):
    """What one of the commands is made of; the docstring is its --help. torch is imported in :meth:`open_session`.

    name: in bgcbench.results.rows.COMMANDS. kinds: its configurations, of a layer and of a network, or one. asked:
    where it begins and ends. preset: the help of --preset, which there is none of without. missing: what to say where
    no network is named and one must be. empty_file: whether a run that is stopped before its first row leaves a file
    to go on with.
    """

    summary: ClassVar[str]
    kinds: ClassVar[tuple[type[RunConfig], ...]]
    asked: ClassVar[type[Asked]] = Asked
    preset: ClassVar[str] = ""
    missing: ClassVar[str] = ""
    empty_file: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def extra(self) -> list[Option]:
        """Options that are no field of a configuration."""
        return [shorthand("preset", (), self.preset, panel=WORKLOAD)] if self.preset else []

    def option(self, field: str) -> str:
        """The option that fills a configuration's field: 'num_classes' -> '--classes'."""
        filling = [each for kind in self.kinds for each in options_of(kind).values() if field in each.fills]
        widest = max(filling, key=lambda each: len(each.fills), default=None)
        return f"--{widest.name if widest else field.replace('_', '-')}"

    def given(self, given: Json, preset: str | None, asked: Asked, context: typer.Context) -> Json:
        """``given``, the fields that are asked for, with what the preset fixes and what is found; raises UsageError."""
        return given

    def check(self, config: Any, *, fresh: bool, replace: bool) -> None:  # noqa: B027 - not all have anything to check
        """Refuse what can be seen to be wrong before torch is imported.

        fresh: whether the run begins anew; replace: whether it may replace files.
        """

    @abstractmethod
    def open_session(self, config: Any) -> Session:
        """The device of the run."""

    def joined(self, session: Session) -> contextlib.AbstractContextManager[World]:
        """This process among those that torchrun has started; by default it is alone."""
        from bgcbench.training.distributed import World

        return contextlib.nullcontext(World(device=session.device))

    @abstractmethod
    def prepare(self, config: Any, session: Session, world: World) -> Any:
        """What must be opened and can be wrong before anything is measured; completes ``session.settings``."""

    @abstractmethod
    def start(self, prepared: Any, session: Session, world: World, beginning: Beginning) -> Any:
        """The run over ``prepared``."""

    def plan_lines(self, run: Any, *, full: bool) -> list[str]:
        """The plan in words; ``full``: with everything there is to say."""
        lines: list[str] = run.plan_lines
        return lines

    def estimate(self, run: Any, interrupts: Interrupts, *, quiet: bool) -> int:
        """What a dry run does after the plan; returns the exit code."""
        return 0

    def said(self, update: Any, run: Any) -> Said:
        """What is shown of an update of the run."""
        return Said(update.doing, update.done)

    def is_look(self, update: Any, run: Any) -> bool:
        """Whether there is more of every row now than before."""
        return False

    def is_drawable(self, row: Row) -> bool:
        """Whether there is anything in a row that a picture shows."""
        return True

    def picture(self, preset: str | None) -> str | None:
        """Which picture is drawn; None for what there is."""
        return None


def run_command(command: Command, context: typer.Context, parsed: Mapping[str, Any]) -> int:
    """Do what the options ask for, and return the exit code."""
    preset = parsed["preset"].casefold() if parsed.get("preset") else None
    with only_first_speaks():
        asked = command.asked(**given_fields(options_of(command.asked).values(), parsed))
        check_options(asked)
        options = {each.name: each for kind in command.kinds for each in options_of(kind).values()}
        given = command.given(given_fields(options.values(), parsed), preset, asked, context)
        config, stored, output = settled(command, given, asked)
    with memory_state("kept"), Interrupts(patient=processes() > 1) as interrupts:
        silent = asked.quiet or own_rank() > 0
        with only_first_speaks(), waiting("opening the device", quiet=silent):
            session = command.open_session(config)  # torch, and what needs it
        with command.joined(session) as world:
            if not world.is_main:
                output = dataclasses.replace(output, path=None, to_stdout=True, quiet=True, plot=None)
            with waiting(f"preparing {config.what}", quiet=silent):
                with only_first_speaks():
                    prepared = command.prepare(config, session, world)
                    if stored is not None and not _failed_whole(stored):
                        results.check_resumable(stored, session.conditions, session.environment, str(output.path))
                output = output.named(command.name, config.what, session.environment.device)
                beginning = Beginning(
                    world.share(stored),
                    world.share(_checkpoints_of(output.path)),
                    afresh=stored is None,
                    replace=output.replace,
                    stop=interrupts.requested,
                )
                run = command.start(prepared, session, world, beginning)
            if not silent:
                with waiting("estimating the time", quiet=silent):
                    lines = command.plan_lines(run, full=asked.dry_run)
                for line in (*run.warnings, *lines, output.destination):
                    say(line)
            if asked.dry_run:
                return 0 if asked.quiet else command.estimate(run, interrupts, quiet=silent)
            execution = _Execution(command, run, output, stored, session, world, interrupts)
            document, code = execution.carry_out(context.obj or [])
        if output.plot is not None and any(map(command.is_drawable, document.results)):
            plots.draw(document, output.plot, command.picture(preset))
            if not output.quiet:
                say(f"drawn to {output.plot}")
        elif output.plot is not None:
            say(f"{output.plot} is not drawn: no row has what a picture shows")
        return code


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """What is wrong with the options is wrong in every process; one of them says so."""
    try:
        yield
    except (UsageError, OutputError) as error:
        if own_rank() == 0:
            raise
        raise typer.Exit(error.exit_code) from None


# ------------------------------------------------------------------------------------------------- resolve or resume


def settled(command: Command, given: Json, asked: Asked) -> tuple[Any, Document | None, Output]:
    """The configuration, the document that is gone on with (None for a new run) and where it goes: all checked.

    Nothing here needs torch. Raises UsageError, ResultFileError and OutputError.
    """
    if asked.out == "-" and "save_every_s" in given:
        raise UsageError("--save-every is for checkpoints, which --out - keeps none of; leave one of them out")
    path, stored = _file_to_resume(command, asked, given)
    output = Output.asked(asked, path, saves="save" in given)
    config = resolve_config(command, given, stored, str(path))
    command.check(config, fresh=stored is None, replace=asked.force)
    if own_rank() == 0:  # which alone writes
        output.probe(dry_run=asked.dry_run)
    if asked.is_auto and path is not None and not asked.quiet and own_rank() == 0:
        say(f"going on with {path}")
    return config, stored, output


def resolve_config(command: Command, given: Json, stored: Document | None, name: str) -> Any:
    """What to do: as asked, or what file ``name`` holds with the grid that is asked for added to it."""
    if stored is not None:
        return _resumed(command, given, stored, name)
    kind = command.kinds[-1 if "model" in given else 0]
    if command.missing and "model" not in given:
        raise UsageError(command.missing)
    for field in given.keys() - {field.name for field in dataclasses.fields(kind)}:
        why = (
            "describes a layer, and --model a network; leave one of them out"
            if "model" in given
            else "is for a network; name it with --model, or leave the option out"
        )
        raise UsageError(f"{command.option(field)} {why}")
    return kind(**given)


def _resumed(command: Command, given: Json, stored: Document, name: str) -> Any:
    """The configuration that continues ``stored``, from file ``name``: its own, with a grid that may have grown."""
    results.check_command(stored, command.name, name)
    kind = command.kinds[-1 if "model" in stored.config else 0]
    base = kind.from_json(stored.config)
    if unknown := given.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise UsageError(f"{command.option(min(unknown))} has no meaning for what {name} measures; leave it out")
    grown: Json = {
        grid: tuple(dict.fromkeys((*getattr(base, grid), *given[grid])))
        for grid in ("groups", "ranks", "variants", "inputs", "seeds", "inits")
        if grid in given
    }
    check_same_fields(stored.config, {**given, **grown}, base.FREE, name)  # before they are checked together
    config = dataclasses.replace(base, **{**given, **grown})
    check_same_workload(stored.config, config, name)
    return config


def _file_to_resume(command: Command, asked: Asked, given: Json) -> tuple[Path | None, Document | None]:
    """The result file to continue and what is in it; (None, None) for a new run."""
    resume, out = asked.resume, asked.out
    if resume is None:
        return None, None
    if not asked.is_auto:
        if out is not None:
            auto = ", or say --resume auto" * isinstance(asked, AskedOfTraining)
            raise UsageError(f"--resume writes to the file it continues; leave --out out{auto}")
        return Path(resume), results.read(Path(resume))
    if out == "-":
        raise UsageError("--resume auto needs a file; name one with --out, or leave --out out")
    wanted = resolve_config(command, given, None, "")
    if out is not None:
        if not Path(out).exists():
            return None, None
        stored = results.read(Path(out))
        _check_same_run(command, stored, wanted, out)
        return Path(out), stored
    files = Path("results").glob(f"{command.name}-*.json")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ResultFileError):  # of another run, or damaged
            stored = results.read(path)
            if not stored.complete:
                _check_same_run(command, stored, wanted, str(path))
                return path, stored
    return None, None


def _check_same_run(command: Command, stored: Document, wanted: Any, name: str) -> None:
    """Raise ResultFileError unless ``stored`` is a run of these very settings, those that were not typed included."""
    results.check_command(stored, command.name, name)
    # None is what is seen only in the data and the weights.
    late = ("num_classes", "height", "width")
    fields = {name: value for name, value in wanted.to_json().items() if value is not None or name not in late}
    check_same_fields(stored.config, fields, wanted.FREE, name)
    for grid in wanted.GRIDS:
        if (stored.config.get(grid) or None) != (fields[grid] or None):  # an older version had fewer of them
            raise ResultFileError(
                f"{name} cannot be resumed: its {grid} are {stored.config.get(grid)} and {fields[grid]} are asked "
                f"for; say --resume {name} to add to them, or start a new file with --out"
            )


# ------------------------------------------------------------------------------------------------------ plan and run


@dataclasses.dataclass(frozen=True)
class _Execution:
    """A run that is ready, and all that carrying it out takes; stored: the document that it goes on with."""

    command: Command
    run: Any
    output: Output
    stored: Document | None
    session: Session
    world: World
    interrupts: Interrupts

    def carry_out(self, argv: Sequence[str]) -> tuple[Document, int]:
        """Carry the run out into the result file, whatever happens; returns the document and the exit code."""
        run, output, interrupts = self.run, self.output, self.interrupts
        with contextlib.ExitStack() as claim:
            writers: list[results.ResultWriter | None] = []
            with only_first_speaks():
                self.world.once(lambda: writers.append(claim.enter_context(output.claimed(self.stored, interrupts))))
                run.make_room()
            if not self.command.empty_file and interrupts.requested():
                say("interrupted before anything was measured; nothing was written")
                raise typer.Exit(interrupts.exit_code)
            writer = writers[0] if writers else None
            document = self._document(argv)
            planned = len({*run.keys, *(row.key for row in document.results)})  # a file may hold rows beyond the plan
            failed: str | None = None
            try:
                # A run that is killed in its first epoch has checkpoints to go on from, and needs the file for that.
                if writer is not None and issubclass(self.command.asked, AskedOfTraining):
                    writer.write(document)
                with_progress(self._saved(document, writer), quiet=output.quiet)
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"
                raise
            finally:
                run.take_into(document)
                document.finish(planned, interrupted=interrupts.requested(), failed=failed)
                if writer is not None:
                    writer.write(document)
                if failed is not None and document.results and self.world.is_main:
                    print_document(document, output.form, wide=output.wide)  # what there is; the error follows
            done = len(document.done)
            if not self.world.is_main:
                return document, interrupts.exit_code if interrupts.requested() else int(done < planned)
            self._show(document, writer)
            return document, closing(writer, interrupts, document, planned, quiet=output.quiet)

    def _document(self, argv: Sequence[str]) -> Document:
        """The document that the run fills: a new one, or what it goes on with."""
        config, session = self.run.config, self.session
        if self.stored is None:
            return results.new_document(
                self.command.name, argv, config.to_json(), session.environment, session.conditions, quick=config.quick
            )
        document = results.reopened(self.stored, config.to_json())
        if _failed_whole(self.stored):
            document.settings, document.environment, document.warnings = session.conditions, session.environment, ()
        return document

    def _saved(self, document: Document, writer: results.ResultWriter | None) -> Iterator[Said]:
        """What is to be shown of the run; each update that is worth it is already in the document and on the disk."""
        told, looks = len(self.run.warnings), Looks()
        for update in self.run.run():
            if update.save:
                self.run.take_into(document)
                if writer is not None:
                    writer.write(document)
            said = self.command.said(update, self.run)
            shown = not self.output.quiet and self.command.is_look(update, self.run)
            table = looks.of(document, quick=self.run.config.quick) if shown else ()
            yield dataclasses.replace(said, warnings=tuple(self.run.warnings[told:]), table=table)
            told = len(self.run.warnings)

    def _show(self, document: Document, writer: results.ResultWriter | None) -> None:
        """Print the document; raises OutputError that says where the result is instead."""
        if not document.results and self.output.form != "json":  # a run that was stopped at once has nothing to show
            return
        try:
            print_document(document, self.output.form, wide=self.output.wide)
        except OutputError as error:
            path = writer.path if writer is not None else results.rescue(document, f"{document.command}.json")
            kept = f"the result is in {path}" if path else "the result is lost"
            raise OutputError(f"{error}; {kept}") from error


def _failed_whole(stored: Document) -> bool:
    """Whether a file has no row that other conditions could be mixed with."""
    return all(row.status == "error" for row in stored.results)


def _checkpoints_of(path: Path | None) -> Path | None:
    """The folder beside a result file that its checkpoints are kept in."""
    return None if path is None else path.with_name(f"{path.name.removesuffix('.json')}.checkpoints")
