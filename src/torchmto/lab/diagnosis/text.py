"""A diagnosis as text and as JSON."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from torchmto.lab.atomic import plain
from torchmto.lab.diagnosis.advice import Diagnosis, Plan
from torchmto.lab.diagnosis.measurements import Matrix, Measurements
from torchmto.lab.terminal import BOUNDLESS, Table, visible
from torchmto.lab.versions import versions

SCHEMA_VERSION = 2
_MARKS = {"warning": "!", "note": "-", "fine": "+"}


def as_json(measured: Measurements, plan: Plan, diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything, as it goes into diagnose.json; numbers that aren't finite become null."""
    content: dict[str, Any] = plain(
        {
            "schema_version": SCHEMA_VERSION,
            "measurements": asdict(measured),
            "plan": asdict(plan),
            "diagnosis": asdict(diagnosis),
            "versions": versions(),
        }
    )
    return content


def as_text(measured: Measurements, diagnosis: Diagnosis, width: int = BOUNDLESS) -> str:
    """What the command prints: the numbers, the findings, the methods that suit; on a terminal of so many columns."""
    lines: list[str | Table] = [f"Measured on {measured.num_batches} batches", "", _task_table(measured)]
    if len(measured.tasks) > 1:
        lines += ["", "Mean cosines of the gradients", _matrix(measured.tasks, measured.cosines, "{:+.2f}")]
        if measured.affinity is not None:
            title = "Mean affinity: what one step of the row's task takes off the column's loss, in percent"
            percent = tuple(tuple(100 * value for value in row) for row in measured.affinity)
            lines += ["", title, _matrix(measured.tasks, percent, "{:+.2g}")]
    for heading, kinds in (("Found", ("warning", "note")), ("In order", ("fine",))):
        chosen = [finding for finding in diagnosis.findings if finding.kind in kinds]
        if chosen:
            lines += ["", heading]
        for finding in chosen:
            lines += [f"  {_MARKS[finding.kind]} {finding.text}", f"      {finding.evidence}"]
    lines += ["", "Methods that suit"]
    for suggestion in diagnosis.suggestions:
        lines += [f"  {suggestion.method}", *(f"      {reason}" for reason in suggestion.reasons)]
    if not diagnosis.suggestions:
        lines += ["  Nothing measured speaks for one method in particular."]
    lines += [
        "",
        "A probing run sees the beginning of a training only: let `torchmto compare` decide between the candidates.",
    ]
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None)
    for line in lines:
        text = line.lstrip() if isinstance(line, str) else ""
        indent = 2 if isinstance(line, Table) else len(line) - len(text)
        console.print(
            Padding(line if isinstance(line, Table) else Text(visible(text)), (0, 0, 0, indent), expand=False)
        )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _task_table(m: Measurements) -> Table:
    rows = [
        [
            name,
            _cell(m.losses.get(name, math.nan), "{:.3g}"),
            _cell(m.gradient_norms[name], "{:.3g}"),
            _cell(m.sum_cosines[name], "{:+.2f}"),
            _cell(m.sum_shares[name], "{:.0%}"),
        ]
        for name in m.tasks
    ]
    return Table("", ["task", "loss", "gradient norm", "cosine with sum", "part of sum"], rows)


def _matrix(tasks: Sequence[str], matrix: Matrix, form: str) -> Table:
    rows = [[name, *(_cell(v, form) for v in row)] for name, row in zip(tasks, matrix, strict=True)]
    return Table("", ["", *tasks], rows)


def _cell(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"
