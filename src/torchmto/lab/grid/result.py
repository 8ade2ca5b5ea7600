"""A comparison as an object: frames, figures, a report, all read from its folder."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmto.checks import check_choice, needed, shown
from torchmto.lab.atomic import BrokenFileError, read_json
from torchmto.lab.folders import FolderError
from torchmto.lab.grid.folder import SCHEMA_VERSION, run_files, run_name
from torchmto.lab.grid.plots import delta_m_figure
from torchmto.lab.run.scores import is_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_COSTS = ("num_forward", "num_backward", "num_optimizer_steps", "seconds_per_batch")


class Result:
    """A finished comparison.

    Args:
        path: Its folder.

    Raises:
        FolderError: If there is no finished comparison, or one of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        file = self.path / "results.json"
        if not file.is_file():
            raise FolderError(f"There is no finished comparison in `{self.path}`.")
        try:
            self.results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if "methods" not in self.results:
                raise FolderError(f"`{path}` holds no comparison.")
            found = self.results.get("schema_version")
            if found != SCHEMA_VERSION:
                raise FolderError(f"{file} has version {shown(found)}; this torchmto reads version {SCHEMA_VERSION}.")
            self._runs: list[tuple[str, dict[str, Any]]] = []
            for name, run_file in run_files(self.path, self.results):
                run = read_json(run_file, "torchmto compare run", SCHEMA_VERSION)
                self._runs.append((name or run_name(run["config"]), run))
        except (ValueError, AttributeError, BrokenFileError) as error:
            raise FolderError(str(error)) from error

    def table(self) -> "DataFrame":
        """One row per Run: method (``single:<task>`` for baselines), seed, ``<task>.<metric>`` of the test split, Δm, costs.

        Raises:
            ImportError: If pandas is missing.
        """
        tasks = self.results["tasks"]
        columns = [f"{task}.{metric}" for task, about in tasks.items() for metric in about["metrics"]]
        names = [*(f"single:{task}" for task in tasks), *self.results["methods"]]
        rows = []
        for name, run in self._runs:
            seed = run["config"]["seed"]
            if name not in names:
                continue
            test = run["result"]["test"] or {}
            values = {f"{task}.{metric}": value for task, own in test.items() for metric, value in own.items()}
            costs = {cost: run["result"]["cost"][cost] for cost in _COSTS}
            rows.append({"method": name, "seed": seed, **values, "delta_m": self._delta_m(name, seed, test), **costs})
        rows.sort(key=lambda row: (names.index(row["method"]), row["seed"]))
        return needed("A frame", "pandas").DataFrame(rows, columns=["method", "seed", *columns, "delta_m", *_COSTS])

    def _delta_m(self, name: str, seed: int, test: Mapping[str, Any]) -> float | None:
        """A method's; 0 of single-task models, as it is what the others are compared with, if their figure allows that."""
        if name in self.results["methods"]:
            found = self.results["methods"][name]["delta_m"]
            return None if found is None else float(found["per_seed"][seed])
        task = name.removeprefix("single:")
        value = test[task][self.results["tasks"][task]["primary_metric"]]
        return 0.0 if value and is_finite(value) else None

    def summary(self) -> "DataFrame":
        """One row per method, single-task models first: Δm with its interval, primary metrics, costs per batch."""
        tasks = {task: about["primary_metric"] for task, about in self.results["tasks"].items()}
        rows = []
        for name, entry in {"single_task": self.results["single_task"], **self.results["methods"]}.items():
            if entry is None:
                continue
            delta = entry.get("delta_m") or {}
            row = {"method": name, "delta_m": delta.get("mean"), "ci95": delta.get("ci95")}
            for task, metric in tasks.items():
                figure = entry["tasks"][task][metric]
                row |= {f"{task}.{metric}": figure["mean"], f"{task}.{metric}.std": figure["std"]}
            rows.append(row | {cost: entry["cost"][cost] for cost in (*_COSTS, "peak_memory_bytes")})
        return needed("A frame", "pandas").DataFrame(rows)

    def figure(self, name: str = "delta_m") -> "Figure":
        """A figure of the methods: their Δm, or a task's primary metric by its name.

        Args:
            name: ``"delta_m"``, or a task.

        Raises:
            ValueError: If there is no such figure.
        """
        check_choice("name", name, ("delta_m", *self.results["tasks"]))
        return delta_m_figure(self.results, None if name == "delta_m" else name)

    def report(self, out: Path | str | None = None) -> Path:
        """Write the HTML page about it, by default ``report.html`` in its folder."""
        from torchmto.lab.report import write_report  # noqa: PLC0415  it reads what this layer writes

        return write_report([self.path], None if out is None else Path(out))[0]

    def _repr_html_(self) -> str:
        """The summary, for notebooks."""
        table: str = self.summary().to_html(index=False, float_format=lambda value: f"{value:.4g}")
        return f"<p>{html.escape(str(self.path))}</p>{table}"

    def __repr__(self) -> str:
        methods: Mapping[str, Any] = self.results["methods"]
        return f"Result({str(self.path)!r}: {', '.join(methods)}; {self.results['config']['seeds']} seeds)"


def load_result(path: Path | str) -> Result:
    """A finished comparison from its folder.

    Raises:
        FolderError: If there is none.
    """
    return Result(path)
