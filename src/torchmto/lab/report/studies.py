"""Reading run folders into what the page shows.

A *study* is one comparison, or several training runs on the same data and tasks, or an experiment: ``title``, ``about``,
``made`` (pairs of heading and text), ``warnings``, ``notes``, ``task_names``, ``metric_names`` (per task), ``method_names``,
``seeds``, ``baseline`` (what Δm is relative to, in words, or None), ``results`` (as in a comparison's results.json), ``runs``
and ``settings`` (pairs of heading and mapping). A run has ``method``, ``seed``, ``task`` (of a single-task run, else None),
``history`` (one entry per validation), ``trace`` (single steps) and ``noise_floor``. An experiment has no tasks, methods and
runs, but ``tables`` and ``plots`` (name and data URIs as PNG and SVG).

Lists of names come beside the mappings because JavaScript sorts keys that look like numbers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchmto.lab.atomic import plain
from torchmto.lab.report.base import ReportError, Study
from torchmto.lab.report.comparisons import comparison_study
from torchmto.lab.report.experiments import arms_of, experiment_study
from torchmto.lab.report.trainings import Baseline, Training, comparison_baselines, read_training, training_studies


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """The studies in these folders; training runs that can be compared become one.

    Args:
        folders: Folders of ``torchmto compare``, ``torchmto train`` or ``torchmto reproduce``.

    Raises:
        ReportError: If a folder isn't a finished one of these, or one of its files is broken.
    """
    studies: list[Study] = []
    trainings: list[Training] = []
    baselines: list[Baseline] = []
    for folder, title in _with_arms(folders):
        results = _read_results(folder)
        try:
            if "experiment" in results:
                studies.append(experiment_study(folder, results))
            elif "methods" in results:
                studies.append({**comparison_study(folder, results), "title": title})
                baselines += comparison_baselines(folder, results)
            else:
                trainings.append(read_training(folder, results))
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, ReportError):
                raise
            raise ReportError(f"{folder} doesn't hold what it should: {type(error).__name__} {error}.") from error
    return [*studies, *training_studies(trainings, baselines)]


def _with_arms(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """The folders, each once, with what the page calls them, and after each experiment the comparisons it is made of."""
    every: dict[Path, tuple[Path, str]] = {}
    for folder in folders:
        name = folder.resolve().name
        for path, title in [(folder, name), *((arm, f"{name}: {arm.name}") for arm in arms_of(folder))]:
            every.setdefault(path.resolve(), (path, title))
    return list(every.values())


def _read_results(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ReportError(f"There is no folder {folder}.")
    path = folder / "results.json"
    if not path.is_file():
        unfinished = any((folder / name).exists() for name in ("config.json", "config.yaml"))
        hint = (
            "it isn't finished; the command that made it goes on with it" if unfinished else "it isn't a run's folder"
        )
        raise ReportError(f"{folder} has no results.json: {hint}.")
    try:
        results = plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is broken: it isn't JSON ({error}).") from error
    kinds = ({"methods", "tasks"}, {"primary", "cost"}, {"experiment", "tables"})
    if not isinstance(results, dict) or not any(keys <= set(results) for keys in kinds):
        raise ReportError(f"{path} holds neither a comparison nor a training run nor an experiment.")
    return results
