"""What methods need of a Run beside their hyper-parameters: norms, an optimizer, its length, single-task values."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchmto.checks import nearest
from torchmto.lab.data.base import Task
from torchmto.lab.metrics import primary_metric
from torchmto.lab.specs import MethodSpec
from torchmto.methods import LossWeighting, Method, method_class, methods


def check_weighting(name: str) -> None:
    """Raise a ValueError if there is no loss weighting of this name."""
    known = [n for n in methods() if issubclass(method_class(n), LossWeighting)]
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(
            f"Parameter `method.weights` should be by task, or a loss weighting's name. Found `{name}`.{hint}"
        )


def make(
    spec: MethodSpec, *, total_steps: int, tasks: Sequence[Task] = (), baseline: Mapping[str, float] | None = None
) -> Method:
    """The method, which is told what it asks for and the text leaves open.

    Args:
        spec: Its name and hyper-parameters.
        total_steps: Batches of the whole training.
        tasks: The tasks.
        baseline: Single-task value of every task's primary metric, for ``wpcgrad(priority=performance)``.

    Raises:
        ValueError: If a hyper-parameter makes no sense, or a single-task value is missing.
    """
    more: dict[str, Any] = {}
    if spec.takes("total_steps"):
        more["total_steps"] = total_steps
    if spec.hyperparameters.get("priority") == "performance" and spec.takes("baseline") and baseline is not None:
        if missing := [task.name for task in tasks if task.name not in baseline]:
            raise ValueError(
                f"Method `{spec.label}` needs a single-task value of each task. There is none for `{missing[0]}`: it "
                "wasn't a finite number."
            )
        more["baseline"] = {task.name: baseline[task.name] for task in tasks}
        more["higher_is_better"] = {task.name: primary_metric(task)[1] for task in tasks}
    return spec.make(**more)
