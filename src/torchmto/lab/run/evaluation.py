"""Calling a problem's network, and measuring it on a split."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchmto import MultiTask
from torchmto.lab.data.base import Split, Task
from torchmto.lab.losses import check_shape, labelled_rows
from torchmto.lab.metrics import primary_metric, task_metrics
from torchmto.lab.problem import Problem, part_error
from torchmto.lab.user_code import user_frames
from torchmto.structure import active_task, has_split_norms

if TYPE_CHECKING:
    from torchmetrics import Metric

Metrics = dict[str, dict[str, float]]
"""Task -> metric -> value."""

MetricStates = dict[str, list[dict[str, Any]]]
"""Task -> of each of its `Measures.parts` the state by name: tensors, or lists of them."""


def placed(value: Any, device: str | torch.device) -> Any:
    """``value`` with all tensors in it on ``device``."""
    match value:
        case Tensor():
            return value.to(device, non_blocking=True)
        case _ if callable(getattr(value, "to", None)):  # a packed sequence, a graph, a tokenizer's batch
            return value.to(device)
        case Mapping():
            return {key: placed(entry, device) for key, entry in value.items()}
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(placed(entry, device) for entry in value))
        case list() | tuple():
            return type(value)(placed(entry, device) for entry in value)
        case _:
            return value


class Network(nn.Module):
    """A model that gives the outputs of the asked tasks, in the chosen precision.

    Args:
        model: ``model(x)`` or ``model(x, tasks)`` gives ``{task: output}``.
        autocast: Gives the context for a forward.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.interrupt: Callable[[], None] | None = None
        """Called before each forward; may raise, to leave a long evaluation."""
        positional = [
            p
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
        ]
        second = positional[1] if len(positional) > 1 else None
        self._takes_tasks = second is not None and (second.name == "tasks" or second.default is second.empty)

    def forward(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of the asked tasks.

        Raises:
            ProblemError: If the model gives something else.
        """
        if self.interrupt is not None:
            self.interrupt()
        with self.autocast():
            outputs = self.model(x, tasks) if self._takes_tasks else self.model(x)
        if not isinstance(outputs, Mapping):
            raise part_error("model", "a network that gives {task: output}", type(outputs).__name__)
        for task in tasks:
            if task not in outputs:
                raise part_error(
                    "model", f"a network with an output for `{task}`", f"outputs {', '.join(outputs) or 'of none'}"
                )
        return {task: outputs[task] for task in tasks}


class Measures:
    """One task's metrics at work.

    Without a label nothing is known, and of an output that is NaN where there is a label nothing can be said, whatever a
    metric makes of it (an argmax takes NaN for the highest logit): then every figure is NaN. Own metrics get outputs as they
    are and may judge them.

    Args:
        task: The task.
        device: Where outputs and targets are.
    """

    def __init__(self, task: Task, device: str | torch.device = "cpu") -> None:
        from torchmto.lab.streaming import Seen  # noqa: PLC0415  torchmetrics takes seconds to import

        self.task = task
        self.seen = Seen(task).to(device)
        self.metrics = {name: metric.to(device) for name, metric in task_metrics(task).items()}

    @property
    def parts(self) -> "tuple[Metric, ...]":
        """All that has a state."""
        return self.seen, *self.metrics.values()

    def update(self, output: Any, target: Tensor) -> None:
        """Add a batch.

        Raises:
            ProblemError: If the network's output is no tensor, or own metrics don't take it.
            ValueError: If it hasn't the shape that the kind's metrics are made for.
        """
        task, own = self.task, "metrics" in self.task.extra
        if task.kind != "own" and not isinstance(output, Tensor):
            should = f"a network whose output for `{task.name}` is a tensor in evaluation"
            raise part_error("model", should, type(output).__name__)
        undefined = None
        if not own and task.kind != "own":
            check_shape(task, output, target)
            undefined = output.isnan()
        self.seen.update(undefined, target)
        if undefined is not None:
            output = torch.where(undefined, 0.0, output)  # a metric may choke on NaN
        elif task.kind != "own":
            _, rows = labelled_rows(task, target)
            if not bool(rows.any()):
                return
            output, target = output[rows], target[rows]
        for name, metric in self.metrics.items():
            try:
                metric.update(output, target)
            except (TypeError, ValueError, RuntimeError) as error:
                if not own or user_frames(error):
                    raise
                came = f"outputs of shape {tuple(output.shape)} and " if isinstance(output, Tensor) else ""
                should = f"a metric that takes {came}targets of shape {tuple(target.shape)}"
                raise part_error(f"metrics[{task.name!r}][{name!r}]", should, " ".join(str(error).split())) from error

    def values(self) -> dict[str, float]:
        """The figures of everything that was added."""
        if not self.seen.labels or self.seen.undefined:
            return dict.fromkeys(self.metrics, math.nan)
        return {name: float(computed(metric)) for name, metric in self.metrics.items()}

    def cpu(self) -> "Measures":
        """The same, on the CPU."""
        self.seen, self.metrics = self.seen.cpu(), {name: metric.cpu() for name, metric in self.metrics.items()}
        return self


Measured = dict[str, Measures]
"""Task -> its metrics at work."""


@torch.no_grad()
def measure(
    network: nn.Module,
    problem: Problem,
    split: Split,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    steps: "Iterable[tuple[tuple[str, ...], Any]] | None" = None,
) -> Measured:
    """Metrics of every task that have seen a split, or this process' share of its batches.

    Whole batches are shared out, so a figure is made of the same batches whatever the number of processes. Where norms are
    split, tasks run one after the other.

    Args:
        network: ``network(x, names) -> {name: output}``; left in the mode it was in.
        problem: The data and the tasks.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        batch_size: Samples per batch.
        device: Where the model is.
        rank: This process' number.
        world_size: Number of processes.
        workers: Processes that prepare batches.
        steps: Batches in place of the split's.

    Returns:
        Task -> its metrics, on the CPU. `merged_values` makes figures of them.
    """
    measured = {task.name: Measures(task, device) for task in problem.task_list}
    split_norms = has_split_norms(network)
    training = network.training
    network.eval()
    try:
        if steps is None:
            steps = problem.once(split, batch_size, workers=workers, rank=rank, world_size=world_size)
        for names, batch in steps:
            batch = placed(batch, device)  # noqa: PLW2901
            known = [name for name in names if name in batch["targets"]]
            for group in [[name] for name in known] if split_norms else [known] if known else []:
                with active_task(group[0]):  # only split norms look at it, and then a group is one task
                    outputs = network(batch["input"], group)
                for name in group:
                    measured[name].update(outputs[name], batch["targets"][name])
    finally:
        network.train(training)
    return {name: measures.cpu() for name, measures in measured.items()}


def metric_states(measured: Measured) -> MetricStates:
    """What metrics have seen, to be sent to the process that calls `merged_values`."""
    return {name: [metric.metric_state for metric in measures.parts] for name, measures in measured.items()}


def merged_values(measured: Measured, others: Sequence[MetricStates] = ()) -> Metrics:
    """The figures of everything seen, by this process and by others.

    Args:
        measured: What this process' metrics have seen, from `measure`; they are changed.
        others: The other processes' `metric_states`.

    Returns:
        Task -> metric -> value.
    """
    values: Metrics = {}
    for name, measures in measured.items():
        for states in others:
            for metric, state in zip(measures.parts, states[name], strict=True):
                metric.merge_state(state)
        if measures.metrics:
            values[name] = measures.values()
    return values


def computed(metric: "Metric") -> Any:
    """A metric's value of the states that are here; torchmetrics by itself would ask the other processes for theirs."""
    metric.distributed_available_fn = _never
    return metric.compute()


def _never() -> bool:
    return False


def evaluate(network: nn.Module, problem: Problem, split: Split, **options: Any) -> Metrics:
    """Every metric of every task on one split.

    Args:
        network: As in `measure`.
        problem: The data and the tasks.
        split: Which samples.
        options: Those of `measure`.

    Returns:
        Task -> metric -> value.
    """
    return merged_values(measure(network, problem, split, **options))


def own_figures(model: nn.Module, problem: Problem) -> Metrics:
    """What a problem's own ``evaluate`` says of the tasks that are trained.

    Raises:
        ProblemError: If it gives something else.
    """
    assert problem.evaluate is not None
    training = model.training
    model.eval()
    try:
        values = problem.evaluate(model)
    finally:
        model.train(training)
    should = "a function that gives {task: {metric: number}}"
    if not isinstance(values, Mapping):
        raise part_error("evaluate", should, type(values).__name__)
    figures: Metrics = {}
    for task in problem.task_names:
        own = values.get(task)
        if not isinstance(own, Mapping) or not own:
            raise part_error("evaluate", should, f"{own!r} for the task `{task}`")
        try:
            figures[task] = {str(name): float(value) for name, value in own.items()}
        except (TypeError, ValueError) as error:
            raise part_error("evaluate", should, f"{dict(own)!r} for the task `{task}`") from error
    problem.settle(figures)
    for learnt in problem.task_list:
        metric, _ = primary_metric(learnt)
        if metric not in figures[learnt.name]:
            should = f"a function that gives `{metric}` of the task `{learnt.name}` (or what `primary` says) every time"
            raise part_error("evaluate", should, ", ".join(figures[learnt.name]))
    return figures


def primary_values(metrics: Mapping[str, Mapping[str, float]], tasks: Sequence[Task]) -> dict[str, float]:
    """Each task's one metric that stands for it in Δm, out of what `evaluate` returns."""
    return {task.name: metrics[task.name][primary_metric(task)[0]] for task in tasks}


def tell_method(multitask: MultiTask, values: Mapping[str, float], tasks: Sequence[Task]) -> None:
    """Report validation results to the method: each task's primary metric, finite ones only.

    A method that wants shares in [0, 1] (``wants_shares``: dtp) gets the metric itself where higher is better, cut to
    that range, and 1 / (1 + value) of an error.
    """
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if multitask.wants_shares:
        higher = {task.name: primary_metric(task)[1] for task in tasks}
        known = {n: min(max(v, 0.0), 1.0) if higher[n] else 1 / (1 + max(v, 0.0)) for n, v in known.items()}
    if known:
        multitask.report(known)
