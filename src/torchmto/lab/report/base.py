"""What all kinds of folders have in common on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

Study = dict[str, Any]


class ReportError(ValueError):
    """A folder that no report can be made of."""


def study(**parts: Any) -> Study:
    """A study of these parts, see `torchmto.lab.report.studies`; the others are empty."""
    empty: Study = {name: [] for name in ("warnings", "notes", "task_names", "metric_names", "method_names", "runs")}
    return {**empty, "baseline": None, **parts}


def provenance(made: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> list[list[str]]:
    """When, where and from what runs were made, and how long they took: pairs of heading and text.

    Args:
        made: What each run says about it, as `torchmto.lab.run.environment.made` gives it; nothing in older ones.
        seconds: Each run's wall time, as far as it is known.

    Example:
        >>> provenance([{"date": "2026-01-01T10:00:00+00:00"}, {"date": "2026-01-02T10:00:00+00:00"}], [40, 50])[0]
        ['Date', '2026-01-01 to 2026-01-02']
    """
    days = sorted({str(entry["date"])[:10] for entry in made if entry.get("date")})
    rows = [["Date", " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""]]
    for key, heading in (("machine", "Machine"), ("revision", "Revision")):
        rows.append([heading, ", ".join(sorted({str(entry[key]) for entry in made if entry.get(key)}))])
    total = sum(seconds)
    size = f"{total / 3600:.1f} h" if total >= 3600 else f"{total / 60:.1f} min" if total >= 60 else f"{total:.1f} s"
    rows.append(["Wall time", f"{size} in {len(seconds)} run{'s' * (len(seconds) > 1)}" if seconds else ""])
    return [[heading, text or "not recorded"] for heading, text in rows]
