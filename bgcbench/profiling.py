"""``bgcbench.profile``: what ``bgcbench profile`` measures of a network, from Python, of one that is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bgcbench.errors import UsageError, import_extra
from bgcbench.experiments.network_run import begun
from bgcbench.experiments.profile import NetworkConfig
from bgcbench.models.own import held
from bgcbench.report import as_markdown, document_report
from bgcbench.results import Document
from bgcbench.results.document import dumps
from bgcbench.results.files import check_new, write_named
from bgcbench.results.rows import ProfileRow


@dataclass(frozen=True)
class Profile:
    """What was measured. document: what :meth:`save` writes, and ``bgcbench show`` and ``report`` read."""

    document: Document

    @property
    def rows(self) -> tuple[ProfileRow, ...]:
        """The network as it is, then each conversion; seconds and bytes."""
        return tuple(self.document.results)

    def table(self) -> str:
        """The tables and verdicts of ``bgcbench show``, as Markdown."""
        return as_markdown(document_report(self.document))

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each network and phase, in SI units; raises UsageError without pandas."""
        pandas = import_extra("pandas", "to_pandas needs pandas, which is not installed; pip install pandas")
        return pandas.DataFrame.from_records(document_report(self.document).records)

    def save(self, path: str | PathLike[str], *, replace: bool = False) -> None:
        """Write a result file; raises OutputError for one that is there (unless ``replace``) or cannot be written."""
        check_new(Path(path), "path", replace=replace)
        write_named(Path(path), "path", dumps(self.document).encode())


def profile(
    model: nn.Module,
    example_input: Tensor,
    *,
    variants: Sequence[str] = ("gc", "bgc"),
    groups: Sequence[int] = (2, 4, 8, 16),
    **options: Any,
) -> Profile:
    """Measure ``model`` and its conversions, interleaved: inference, and a training step.

    example_input: a batch of images as the network takes them, (B, 3, height, width), of which only the shape counts;
    the network gives (B, classes). options: of ``bgcbench profile MODEL``, by the names of
    :class:`bgcbench.experiments.profile.NetworkConfig`, such as where, plan (a bgcbench.Plan), phases, precision,
    layout, device, threads, quick, max_time_s, skip_invalid. ``model`` is left as it is. A phase or a row that fails
    says so in its row.

    Raises UsageError, ShapeError and DeviceError as the command does.
    """
    if example_input.dim() != 4 or example_input.shape[1] != 3:
        raise UsageError(f"example_input is {tuple(example_input.shape)}, and must be images: (B, 3, height, width)")
    batch, _, height, width = example_input.shape
    with held(model) as name:
        asked: dict[str, Any] = {"variants": variants, "groups": groups, **options}
        asked = {field: tuple(value) if isinstance(value, list) else value for field, value in asked.items()}
        config = NetworkConfig(model=name, batch=batch, height=height, width=width, **asked)
        run, document = begun(config)
        for _ in run.run():
            pass
    run.take_into(document)
    document.finish(len(run.planned))
    return Profile(document)
