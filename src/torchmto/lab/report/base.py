"""What all kinds of folders have in common on the page."""

from collections.abc import Mapping
from typing import Any

__all__ = ["ReportError", "Study", "traced_point"]

Study = dict[str, Any]
_RECORDS = ("phase", "priority_shares", "affinity", "groups")
"""What the page shows of a method's records, besides the shares by layer and the noise floor."""


class ReportError(ValueError):
    """A folder that no report can be made of."""


def traced_point(point: Mapping[str, Any], names: Any, records: Mapping[str, Any]) -> dict[str, Any]:
    """A single step as the page shows it.

    Args:
        point: The step.
        names: Of the tasks that its cosines are of.
        records: What the method recorded.
    """
    kept: dict[str, Any] = {"step": point["step"]}
    if point.get("cosines") is not None:
        kept["names"] = list(names)
    kept |= {key: point[key] for key in ("weights", "cosines", "mean_cosine") if point.get(key) is not None}
    kept["records"] = {key: records[key] for key in _RECORDS if records.get(key) is not None}
    if layers := records.get("layer_priority_shares"):
        kept["layers"] = [[name, shares] for name, shares in layers.items()]
    return kept
