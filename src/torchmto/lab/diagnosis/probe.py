"""Short training runs that measure: gradients, affinities, channel priorities, times."""

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchmto.checks import check_integer, check_tasks
from torchmto.lab.diagnosis.measurements import (
    Array,
    Layer,
    Margins,
    Measurements,
    matrix_of,
    mean_and_error,
    relative_margins,
    summarize_gramians,
    summarize_margins,
)
from torchmto.methods import make_method
from torchmto.methods.method import GradientCombiner
from torchmto.multitask import MultiTask
from torchmto.solvers.unit import EPS
from torchmto.step import TaskGradients
from torchmto.step.losses import Closure
from torchmto.structure import (
    SplitNorm,
    StructuredLayer,
    find_norm_pairs,
    has_split_norms,
    normalized_strength,
    record_dataflow,
)

_TIMED = 4
"""Steps per kind of method that are timed; the first of them doesn't count."""


class _Watch(GradientCombiner):
    """The plain sum of the gradients, with every layer's Gramian written down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layer_of = {id(p): name.rpartition(".")[0] or "(model)" for name, p in model.named_parameters()}
        self.gramians: list[Array] = []
        self.precision = EPS
        self.layers: list[dict[str, Array]] = []
        self.sizes: dict[str, int] = {}

    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The sum of the rows, [P]."""
        number = len(self.tasks)
        present = np.ix_(task_grads.indices, task_grads.indices)
        layers: dict[str, Array] = {}
        sizes: dict[str, int] = {}
        for parameter in task_grads.parameters:
            layer = self._layer_of.get(id(parameter), "(model)")
            rows = task_grads.matrix[:, task_grads.columns(parameter)]
            full = layers.setdefault(layer, np.full((number, number), np.nan))
            products = (rows.double() @ rows.double().T).cpu().numpy()
            full[present] = np.nan_to_num(full[present]) + products
            sizes[layer] = sizes.get(layer, 0) + parameter.numel()
        total = np.full((number, number), np.nan)
        total[present] = task_grads.gramian.numpy()
        self.gramians.append(total)
        self.precision = max(self.precision, task_grads.precision)
        self.layers.append(layers)
        self.sizes = sizes
        return task_grads.matrix.sum(dim=0)


def probe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: Iterable[str],
    batches: Iterable[Closure],
    *,
    num_batches: int = 20,
    affinity: bool = True,
    seed: int = 0,
    **options: Any,
) -> Measurements:
    """Train for a few batches and measure; afterwards model, optimizer and random state are as before.

    Three parts follow one another, on batches of their own as long as there are enough: times of the kinds of methods;
    ``num_batches`` steps of the plain sum, with every task's gradient; ``num_batches`` batches of single-task steps,
    whose effect on every loss is the affinity. These steps start from an empty optimizer state, since momentum would carry
    other tasks' gradients into them.

    Args:
        model: Any module, in training mode.
        optimizer: Its optimizer; affinities depend on its learning rate.
        tasks: K names.
        batches: One forward-only closure per batch, as `torchmto.MultiTask.step` takes them. Taken in turn; begun again
            where they run out.
        num_batches: Batches per part.
        affinity: Whether to measure affinities.
        seed: Of dropout and the like.
        **options: Further arguments of `torchmto.MultiTask`, such as ``shared``.

    Returns:
        The measurements.

    Raises:
        ValueError: If there is no batch, or an argument makes no sense.
    """
    names = check_tasks(tasks)
    check_integer("num_batches", num_batches, minimum=1)
    following = _endless(batches)
    with _restored(model, optimizer, seed):
        seconds = {}
        for kind in ("gd", "sequential"):
            mt = MultiTask(model, optimizer, tasks=names, method=kind, seed=seed, **options)
            seconds[kind] = _least_seconds(mt, following, _TIMED)
    with _restored(model, optimizer, seed):
        watch = _Watch(model)
        mt = MultiTask(model, optimizer, tasks=names, method=watch, seed=seed, **options)
        losses: list[Mapping[str, float]] = []
        seconds["gramian"] = _least_seconds(mt, following, num_batches, losses)
        found = (
            _affinities(model, optimizer, names, following, number=num_batches, seed=seed, options=options)
            if affinity
            else {}
        )
    statistics = summarize_gramians(np.array(watch.gramians), watch.precision)
    conditions = statistics["conditions"]
    condition = float(np.median(conditions)) if len(conditions) else math.inf
    num_shared = sum(watch.sizes.values())
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return Measurements(
        tasks=names,
        num_batches=len(watch.gramians),
        losses=_means(losses, names),
        gradient_norms=dict(zip(names, statistics["norms"].tolist(), strict=True)),
        cosines=matrix_of(statistics["cosines"]),
        cosine_errors=matrix_of(statistics["cosine_errors"]),
        conflict_shares=matrix_of(statistics["conflict_shares"]),
        sum_cosines=dict(zip(names, statistics["sum_cosines"].tolist(), strict=True)),
        sum_shares=dict(zip(names, statistics["sum_shares"].tolist(), strict=True)),
        condition_number=condition if math.isfinite(condition) else None,
        sum_ratio=float(statistics["sum_ratio"]),
        layers=_layers(watch),
        num_shared=num_shared,
        num_other=sum(parameter.numel() for parameter in trained) - num_shared,
        gradient_bytes=len(names) * num_shared * trained[0].element_size(),
        seconds=seconds,
        **found,
    )


def probe_priorities(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: Iterable[str],
    batches: Iterable[Closure],
    *,
    num_batches: int = 20,
    seed: int = 0,
) -> Margins | None:
    """How clearly channels find a leading task in some steps of connection strength's phase 1; all is restored.

    Args:
        model: A model with task-specific norms (`torchmto.structure.split_norms`), in training mode.
        optimizer: Its optimizer.
        tasks: K >= 2 names.
        batches: As in `probe`.
        num_batches: Steps of phase 1.
        seed: Of dropout and the like.

    Returns:
        The margins, or None if no shared layer has a task-specific norm.
    """
    names = check_tasks(tasks)
    check_integer("num_batches", num_batches, minimum=2)
    if not has_split_norms(model):
        return None
    following = _endless(batches)
    with _restored(model, optimizer, seed):
        method = make_method("connection_strength", schedule="phase1", record_layers=False)
        mt = MultiTask(model, optimizer, tasks=names, method=method, seed=seed)
        with record_dataflow(model) as recording:
            mt.step(next(following))
        layers = _shared_layers(mt, find_norm_pairs(model, recording=recording))
        leaders: list[list[Tensor]] = []
        for number in range(1, num_batches + 1):
            if number > 1:
                mt.step(next(following))
            if number in {num_batches // 2, num_batches}:
                strengths = [normalized_strength(layer.strengths(names)) for layer in layers]
                leaders.append([strength.argmax(dim=0) for strength in strengths])
        if not layers:
            return None
        same = torch.cat([first == last for first, last in zip(*leaders, strict=True)]).double().mean()
        return summarize_margins([relative_margins(s).cpu() for s in strengths], float(same), num_batches)


def _shared_layers(mt: MultiTask, layers: Iterable[StructuredLayer]) -> list[StructuredLayer]:
    """The layers of several tasks that a task-specific norm goes with; heads have no channels to share."""
    names = {id(parameter): name for name, parameter in mt.network.model.named_parameters()}
    return [
        layer
        for layer in layers
        if (isinstance(layer.norm_out, SplitNorm) or isinstance(layer.norm_in, SplitNorm))
        and mt.network.roles.is_shared(names.get(id(layer.weight), ""))
    ]


def _endless(batches: Iterable[Closure]) -> Iterator[Closure]:
    while True:
        empty = True
        for closure in batches:
            empty = False
            yield closure
        if empty:
            raise ValueError(
                "Parameter `batches` should hold at least one closure, and be one that can be gone through again."
            )


@contextlib.contextmanager
def _restored(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Iterator[None]:
    """Leave no trace of what is done inside."""
    before = copy.deepcopy(model.state_dict())
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = sorted(
        {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    )
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.load_state_dict(before)
        optimizer.load_state_dict(optimizer_before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _least_seconds(
    mt: MultiTask, batches: Iterator[Closure], number: int, losses: list[Mapping[str, float]] | None = None
) -> float:
    """Take steps and time the quickest, as what else a machine does only adds; the first counts if there is no other."""
    times = []
    for _ in range(number):
        closure = next(batches)
        _synchronize()
        began = time.perf_counter()
        info = mt.step(closure)
        _synchronize()
        times.append(time.perf_counter() - began)
        if losses is not None:
            losses.append(info.losses)
    return min(times[1:] or times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _affinities(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: tuple[str, ...],
    batches: Iterator[Closure],
    *,
    number: int,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    matrices, floors = [], []
    # Momentum would carry the gradients of other tasks into a task's step: every step starts with an empty memory.
    forgetting = optimizer.register_step_post_hook(lambda stepped, *_: stepped.state.clear())
    optimizer.state.clear()
    try:
        for index in range(number):
            # Nothing is averaged over time (decay 1), and a fresh method holds nothing of the batch before.
            method = make_method("task_groups", groups="per_task", measure_last=True, noise_floor=True, decay=1.0)
            info = MultiTask(model, optimizer, tasks=names, method=method, seed=seed + index, **options).step(
                next(batches)
            )
            matrix = np.full((len(names), len(names)), np.nan)
            present = [names.index(name) for name in info.losses]
            measured = info.records["affinity"].numpy()
            matrix[np.ix_(present, present)] = measured[np.ix_(present, present)]
            matrices.append(matrix)
            floor = info.records.get("noise_floor", {})
            floors.append({name: abs(value) for name, value in floor.items()})
    finally:
        forgetting.remove()
    mean, error = mean_and_error(np.array(matrices))
    return {"affinity": matrix_of(mean), "affinity_errors": matrix_of(error), "noise_floor": _means(floors, names)}


def _means(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    values = {name: [row[name] for row in rows if name in row and math.isfinite(row[name])] for name in names}
    return {name: sum(entries) / len(entries) for name, entries in values.items() if entries}


def _layers(watch: _Watch) -> tuple[Layer, ...]:
    upper = np.triu_indices(len(watch.tasks), 1)
    negative: dict[str, float] = {}
    shares: dict[str, float] = {}
    for name in watch.sizes:
        products = np.array([layers[name][upper] for layers in watch.layers if name in layers])
        known = products[np.isfinite(products)]
        negative[name] = float(np.maximum(-known, 0).sum())
        shares[name] = float((known < 0).mean()) if len(known) else 0.0
    total = sum(negative.values()) or 1.0
    layers = [Layer(name, size, shares[name], negative[name] / total) for name, size in watch.sizes.items()]
    return tuple(sorted(layers, key=lambda layer: -layer.conflict_part))
