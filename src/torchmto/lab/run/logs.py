"""Where a run's figures go: CSV, TensorBoard, W&B, MLflow; and what of a step is logged."""

import contextlib
import csv
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch import Tensor

from torchmto.lab.atomic import plain, write_bytes
from torchmto.step import StepInfo

LARGEST_LOGGED_AFFINITY = 10
"""Tasks up to which all K x K affinities become curves; the matrix itself is always in records.jsonl."""


class Logger(Protocol):
    """Where figures go."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers of one step."""

    def finalize(self, status: str) -> None:
        """The run ends: it is ``finished``, ``failed`` or ``killed`` (interrupted; it may go on)."""


class CsvLog:
    """Figures in one growing table ``step,name,value``, which a crash can't spoil and a resumed run continues.

    Args:
        path: The file.
        resume_step: The step the run goes on from: rows of later steps are removed, it will write them again. None: a new run.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self._file = _reopened(path, resume_step, _step_of_row, "step,name,value\r\n")
        self._writer = csv.writer(self._file)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row per number."""
        self._writer.writerows((step, name, value) for name, value in metrics.items())
        self._file.flush()

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """Figures in TensorBoard's event files.

    Args:
        folder: For the files.
        resume_step: The step the run goes on from: points of later steps, which a killed run logged, come again. None: a new
            run.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415 - takes seconds to import

        self._writer = SummaryWriter(folder, purge_step=None if resume_step is None else resume_step + 1)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finalize(self, status: str) -> None:
        """Close the files."""
        self._writer.close()


class WandbLog:
    """Figures in Weights & Biases, whose local files go into the run's folder.

    Args:
        folder: The run's folder.
        config: The settings.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # noqa: PLC0415 - takes seconds to import

        note = folder / ".wandb-run"  # a run that goes on is the same one there
        self._run = wandb.init(
            project="torchmto",
            name=folder.name,
            dir=folder,
            config=dict(config),
            id=note.read_text() if note.is_file() else None,
            resume="allow",
            reinit="create_new",
        )
        note.write_text(self._run.id)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers of one step."""
        self._run.log(metrics, step=step)

    def finalize(self, status: str) -> None:
        """The run ends."""
        self._run.finish(exit_code=int(status != "finished"))


class MlflowLog:
    """Figures in MLflow: at ``MLFLOW_TRACKING_URI``, else in an SQLite file and artifacts in the run's folder.

    Args:
        folder: The run's folder.
        config: The settings, shown as parameters.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415 - takes seconds to import

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name("torchmto")
        place = (folder / "mlartifacts").resolve().as_uri()
        number = known.experiment_id if known else self._client.create_experiment("torchmto", artifact_location=place)
        note = folder / ".mlflow-run"  # a run that goes on writes where it was
        if note.is_file():
            self._run = note.read_text()
            self._client.update_run(self._run, "RUNNING")
        else:
            self._run = self._client.create_run(number, run_name=folder.name).info.run_id
            note.write_text(self._run)
            for name, value in config.items():
                self._client.log_param(self._run, name, str(value)[:500])

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers of one step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run, _NOT_IN_NAMES.sub("_", name), value, step=step or 0)

    def finalize(self, status: str) -> None:
        """The run ends."""
        self._client.set_terminated(self._run, status.upper())


_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


class RecordLog:
    """What isn't a number, one JSON object per line: groups, affinities, priority shares by layer.

    Args:
        path: The file.
        resume_step: The step the run goes on from: lines of later steps are removed. None: a new run.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self._file = _reopened(path, resume_step, _step_of_record)

    def write(self, step: int, records: Mapping[str, Any]) -> None:
        """Append the records of a step, if there are any."""
        if records:
            self._file.write(json.dumps({"step": step, **plain(records)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _reopened(path: Path, resume_step: int | None, step_of: Callable[[str], float], header: str = "") -> TextIO:
    """A file of lines to go on with; those of later steps, and half a last line that a killed run has left, are removed."""
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    last = -1 if resume_step is None else resume_step
    kept = [line for line in re.findall(r".*\n", text) if step_of(line) <= last]
    write_bytes(path, "".join([header, *kept]).encode())
    return path.open("a", newline="")


def _step_of_row(line: str) -> float:
    step = line.partition(",")[0]
    return int(step) if step.isdecimal() else float("inf")


def _step_of_record(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def step_figures(info: StepInfo, tasks: Sequence[str]) -> dict[str, float]:
    """The numbers of a step that make curves: losses, weights, conflicts, priorities, affinities, costs.

    Args:
        info: What the step did.
        tasks: The names of all tasks, in the order of an affinity matrix.
    """
    figures: dict[str, float] = {f"loss/{task}": loss for task, loss in info.losses.items()}
    figures |= {f"weight/{task}": weight for task, weight in (info.weights or {}).items()}
    figures |= {
        "cost/num_forward": info.num_forward,
        "cost/num_backward": info.num_backward,
        "cost/num_optimizer_steps": info.num_optimizer_steps,
        "step/skipped": float(info.skipped),
        "step/num_fallbacks": info.num_fallbacks,
    }
    if info.num_conflicts is not None:
        figures["conflicts/pairs"] = info.num_conflicts
        pairs = len(info.losses) * (len(info.losses) - 1) / 2
        figures["conflicts/share"] = info.num_conflicts / max(pairs, 1)
    if info.cosines is not None and len(info.cosines) > 1:
        number = len(info.cosines)
        figures["conflicts/mean_cosine"] = float((info.cosines.sum() - info.cosines.trace()) / (number * (number - 1)))
    for name, value in info.records.items():
        figures |= _record_figures(name, value, tasks)
    return figures


def _record_figures(name: str, value: Any, tasks: Sequence[str]) -> dict[str, float]:
    match value:
        case bool() | int() | float():
            return {f"method/{name}": float(value)}
        case Tensor() if value.shape == (len(tasks), len(tasks)) and len(tasks) <= LARGEST_LOGGED_AFFINITY:
            rows = value.tolist()
            return {
                f"{name}/{source}_to_{target}": rows[i][j]
                for i, source in enumerate(tasks)
                for j, target in enumerate(tasks)
                if i != j
            }
        case Mapping() if value and all(isinstance(entry, int | float) for entry in value.values()):
            return {f"{name}/{key}": float(entry) for key, entry in value.items()}
        case list() if name == "groups":
            return {"method/num_groups": len(value)}
        case _:
            return {}


def check_loggers(names: Sequence[str]) -> None:
    """Raise if a logger's package is missing.

    Raises:
        ImportError: With the line to type.
    """
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ImportError(f"The logger `{name}` needs {name}: pip install {name}")


def make_loggers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], *, resume_step: int | None = None
) -> list[Logger]:
    """The loggers of a run.

    Args:
        names: Which of csv, tensorboard, wandb, mlflow.
        folder: The run's folder; everything that is local goes into it.
        config: The settings, shown by W&B and MLflow.
        resume_step: The step the run goes on from; None for a new run.

    Raises:
        OSError: If one can't be made.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "csv": lambda: CsvLog(folder / "metrics.csv", resume_step=resume_step),
        "tensorboard": lambda: TensorBoardLog(folder / "tensorboard", resume_step=resume_step),
        "wandb": lambda: WandbLog(folder, config),
        "mlflow": lambda: MlflowLog(folder, config),
    }
    loggers = []
    for name in names:
        with told_by(name):
            loggers.append(makers[name]())
    return loggers


@contextlib.contextmanager
def told_by(logger: Logger | str) -> Iterator[None]:
    """Whatever a logger's package raises inside the block is an OSError of one line: a full disk, a server that is gone.

    Raises:
        OSError: In place of anything else.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = logger if isinstance(logger, str) else type(logger).__name__.removesuffix("Log").lower()
        raise OSError(f"The logger `{name}` failed: {first}") from error
