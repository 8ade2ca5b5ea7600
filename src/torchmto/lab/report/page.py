"""The page: template, style, script, Plotly and the data in one HTML file."""

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from torchmto._version import __version__
from torchmto.lab.atomic import write_bytes
from torchmto.lab.report.base import ReportError, Study
from torchmto.lab.report.studies import read_studies

REPORT_NAME = "report.html"
MAX_BYTES = 3_000_000
"""Largest page."""
_FEWEST_POINTS = 3


def write_report(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write one page that shows all these folders.

    Args:
        folders: Folders of ``torchmto compare``, ``torchmto train`` or ``torchmto reproduce``.
        out: The file; by default ``report.html`` in each folder.

    Returns:
        The files written.

    Raises:
        ReportError: If a folder holds no finished run.
    """
    text = page(read_studies(folders)).encode()
    targets = [folder / REPORT_NAME for folder in folders] if out is None else [out]
    for target in targets:
        try:
            write_bytes(target, text)
        except OSError as error:
            raise ReportError(f"Can't write `{target}`: {error.strerror or error}.") from error
    return targets


def page(studies: Sequence[Study]) -> str:
    """The HTML page.

    Nothing in it is loaded from elsewhere, and its content security policy forbids all scripts but its own three. Where the
    page would grow beyond `MAX_BYTES`, curves and time lines are thinned, and the page says so; tables never are.

    Args:
        studies: From `read_studies`.
    """
    assets = files("torchmto.lab.report")
    template, style, script = (assets.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    vendored = (
        assets.joinpath("vendor", f"{name}.min.js").read_text("utf-8") for name in ("plotly-cartesian", "sortable")
    )
    plotly, sortable, script = (_inline(text) for text in (*vendored, script))
    room = MAX_BYTES - len((template + style + script + sortable + plotly).encode()) - 10_000
    return Template(template).substitute(
        title=html.escape("torchmto: " + ", ".join(study["title"] for study in studies)),
        version=html.escape(__version__),
        style=style,
        data=_fitting(studies, room),
        plotly=plotly,
        sortable=sortable,
        script=script,
        script_hashes=" ".join(_csp_hash(text) for text in (plotly, sortable, script)),
    )


def _inline(script: str) -> str:
    """A script as it may stand inside ``<script>``: line ends as HTML reads them, and no end tag within."""
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _embedded(studies: Sequence[Study]) -> str:
    """JSON that can't end the ``<script>`` it stands in."""
    text = json.dumps({"studies": studies}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half of a surrogate pair can't be written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()


def _fitting(studies: Sequence[Study], room: int) -> str:
    """The JSON of the studies, thinned until it has at most ``room`` bytes.

    Raises:
        ValueError: If even the tables are too large.
    """
    for smaller in _smaller(studies):
        text = _embedded(smaller)
        if len(text.encode()) <= room:
            return text
    raise ValueError("There are too many methods and tasks for one page; report on fewer folders at a time.")


def _smaller(studies: Sequence[Study]) -> Iterator[Sequence[Study]]:
    """The studies as they are, with ever fewer points, and without curves and plots."""
    yield studies
    note = "To keep this page small, curves show six digits and fewer points than were recorded; all are in the runs' files."
    studies = [{**study, "runs": _rounded(study["runs"]), "notes": [*study["notes"], note]} for study in studies]
    yield studies
    points = max((len(run[part]) for study in studies for run in study["runs"] for part in _CURVES), default=0)
    while (points := points * 2 // 3) >= _FEWEST_POINTS:
        for study in studies:
            study["runs"] = [{**run, **{p: _spread(run[p], points) for p in _CURVES}} for run in study["runs"]]
        yield studies
    note = "There are too many runs to show their curves and plots."
    yield [{**study, "runs": [], "plots": [], "notes": [*study["notes"], note]} for study in studies]


_CURVES = ("history", "trace")


def _spread(points: list[Any], count: int) -> list[Any]:
    """About ``count`` points, evenly spread, the first and the last among them.

    Example:
        >>> _spread(list(range(10)), 4)
        [0, 3, 6, 9]
    """
    if len(points) <= count:
        return points
    return [points[round(index * (len(points) - 1) / (count - 1))] for index in range(count)]


def _rounded(value: Any) -> Any:
    """``value`` with six significant digits in all its floats."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))
