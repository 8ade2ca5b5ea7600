"""Task-specific normalisation: one copy of every norm layer per task, everything else shared."""

import copy
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchmto.checks import check_tasks, found
from torchmto.gradients.torch_private import InstanceNorm, NormBase, children_of, is_single

_NORM_TYPES = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r"norm(alization)?(1d|2d|3d)?$", re.IGNORECASE)


class _Own(threading.local):
    """The tasks whose norms this thread uses."""

    tasks: tuple[str, ...] = ()


OWN = _Own()
"""This thread's."""

_TRAINING: dict[int, tuple[str, ...]] = {}
"""The same of every thread that has some, for autograd's workers."""


def current_tasks() -> tuple[str, ...]:
    """The tasks made active by :func:`active_task` or :func:`active_tasks` in this thread; empty where there are none.

    Autograd recomputes checkpointed blocks on worker threads of its own where the backward runs on a GPU. They see the tasks of
    the thread that trains.

    Raises:
        RuntimeError: If a worker of autograd asks while several threads train different tasks.
    """
    if OWN.tasks or not _TRAINING:
        return OWN.tasks
    if type(threading.current_thread()).__name__ != "_DummyThread":  # what Python makes of threads that others started
        return ()
    training = set(list(_TRAINING.values()))  # noqa: C414 - in one go, while other threads come and go
    if len(training) > 1:
        raise RuntimeError(
            "Several threads train different tasks at the same time, and a checkpointed block is run again by a thread of "
            f"autograd, which can't tell for whom: {sorted(training)}. Train one model at a time, or without checkpointing."
        )
    return next(iter(training), ())


class _Activated(ContextDecorator):
    """Makes tasks active inside a ``with`` block; a class, because a generator takes twice as long, once per forward."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        self._former: list[tuple[str, ...]] = []  # a block may be entered again inside itself

    def __enter__(self) -> None:
        self._former.append(OWN.tasks)
        OWN.tasks = self.tasks
        _TRAINING[threading.get_ident()] = self.tasks

    def __exit__(self, *_: object) -> None:
        # As `activate` does: a call less in every forward.
        OWN.tasks = former = self._former.pop()
        if former:
            _TRAINING[threading.get_ident()] = former
        else:
            del _TRAINING[threading.get_ident()]


def activate(tasks: tuple[str, ...]) -> None:
    """Make these this thread's tasks, where an interrupt has lost the end of a block."""
    OWN.tasks = tasks
    if tasks:
        _TRAINING[threading.get_ident()] = tasks
    else:
        _TRAINING.pop(threading.get_ident(), None)


def active_task(name: str) -> AbstractContextManager[None]:
    """Split norms use this task's copy inside the ``with`` block.

    Blocks nest; the former task comes back at the end, after an error too. The active task is the thread's own: threads may
    train different models at the same time. With activation checkpointing the forward pass runs again inside ``backward``, so
    ``backward`` has to run in the block as well.

    Args:
        name: the task.

    Raises:
        TypeError: ``name`` isn't a string.
    """
    if not isinstance(name, str):
        raise TypeError(found("name", "the name of a task", name))
    return _Activated((name,))


@contextmanager
def active_tasks(names: Sequence[str]) -> Iterator[None]:
    """Split norms take their input as equal chunks along dimension 0, one per task, in this order.

    This is what lets several tasks share one batched pass; :func:`torchmto.structure.stacked` builds the
    batch. The fused inference path of ``nn.TransformerEncoderLayer``, which reads one norm's parameters, is
    off inside.

    Args:
        names: the tasks, in the order in which their examples lie in the batch; no task twice.

    Raises:
        TypeError: ``names`` is a string or holds something else than strings.
        ValueError: no task, or a task twice.
    """
    tasks = check_tasks(names, "names")
    fused = torch.backends.mha.get_fastpath_enabled()
    if len(tasks) > 1:
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Activated(tasks):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class PerTask(nn.Module):
    """A module with one copy per task, so that a model with one needs a forward pass per task.

    The copies are direct children named after the tasks, so a state key is ``<path>.<task>.<weight|bias|...>``.
    """

    def __init__(self, module: nn.Module, copies: dict[str, nn.Module]) -> None:
        super().__init__()
        self.task_names = tuple(copies)
        self.training = module.training
        for task, task_copy in copies.items():
            self.add_module(task, task_copy)


class SplitNorm(PerTask):
    """A norm layer with one copy per task; a call goes to the active task's copy.

    Settings such as ``eps`` or ``normalized_shape`` are read from the
    copies; tensors such as ``weight`` from the active task's copy.

    A GroupNorm, and a BatchNorm or InstanceNorm without running statistics, keep no scale of what they normalise.
    Their copies get a buffer ``running_group_var``, a moving average (momentum 0.1, training mode only) of the
    variance of each group or channel, which connection strength needs; it doesn't change what the norm computes.
    """

    def __init__(self, norm: nn.Module, copies: dict[str, nn.Module]) -> None:
        super().__init__(norm, copies)
        for task_copy in copies.values():
            groups = _groups_without_scale(task_copy)
            if groups:
                reference = next(task_copy.parameters())
                task_copy.register_buffer("running_group_var", torch.ones_like(reference[:1]).detach().repeat(groups))

    def copy_for(self, task: str) -> nn.Module:
        """The copy of one task.

        Raises:
            RuntimeError: the norm has no copy for this task.
        """
        norm = children_of(self).get(task)
        if norm is None:
            raise RuntimeError(
                f"A split norm was called for task {task!r}. It has copies for {list(self.task_names)} only."
            )
        return norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise with the active task's copy, or chunk by chunk with those of several active tasks."""
        tasks = current_tasks()
        if not tasks:
            raise RuntimeError(
                "A split norm was called while no task is active. Run the forward pass inside "
                f"`with torchmto.structure.active_task(name):` with one of {list(self.task_names)}; "
                "an evaluation loops over the tasks."
            )
        if len(tasks) == 1:
            return self._normalize(tasks[0], args, kwargs)
        if not args:
            raise RuntimeError("Several tasks are active: a split norm takes its input as a positional argument then.")
        stacked, *rest = args
        if stacked.shape[0] % len(tasks):
            raise RuntimeError(
                f"{len(tasks)} tasks are active, so dimension 0 should hold one equal chunk per task. "
                f"Found an input of shape {tuple(stacked.shape)}."
            )
        chunks = stacked.chunk(len(tasks))
        return torch.cat(
            [self._normalize(task, (chunk, *rest), kwargs) for task, chunk in zip(tasks, chunks, strict=True)]
        )

    def _normalize(self, task: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        norm = self.copy_for(task)
        if norm.training and args and _groups_without_scale(norm):
            _track_group_var(norm, args[0])
        return norm(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            copies = self.__dict__.get("_modules")
            if name.startswith("__") or not copies:  # while copying or unpickling there is nothing to ask yet
                raise
        tasks = current_tasks()
        active = copies.get(tasks[0]) if len(tasks) == 1 else None
        value = getattr(active if active is not None else next(iter(copies.values())), name)
        if active is None and isinstance(value, Tensor):
            raise AttributeError(f"`{name}` of a split norm differs between tasks: read it inside `active_task(name)`.")
        if not callable(value):  # a method would act on one copy only
            return value
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def extra_repr(self) -> str:
        """The tasks."""
        return f"tasks={list(self.task_names)}"


def split_norms(
    model: nn.Module,
    tasks: Iterable[str],
    *,
    modules: Iterable[nn.Module | str] | None = None,
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """Give every norm layer of a model one copy per task. The model is changed in place and returned.

    BatchNorm, SyncBatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, their subclasses and other
    libraries' modules that look like them (:func:`is_norm`) are replaced by a :class:`SplitNorm`; every other
    module keeps its place. Copies start equal to the original. A norm used at two places stays one norm, and
    norms that share a parameter still share it, task by task. Norms with neither parameters nor buffers are
    left alone. A norm already split for the same tasks is left alone too.

    Call it after loading pretrained weights and before building the optimizer: the parameters of the norms
    are new.

    Args:
        model: any module.
        tasks: the names of the tasks. They become parts of state keys.
        modules: split only norms inside these modules, given as objects or paths. Default: the whole model.
        exclude: paths of modules whose norms stay as they are, for instance ``"heads"``.

    Returns:
        ``model``.

    Raises:
        TypeError: tasks that aren't strings, or a string instead of a sequence of them.
        ValueError: no task, a task twice, a name that can't be part of a state key, a model that is itself a
            norm, a lazy norm that hasn't run yet, norms already split for other tasks, or a path that doesn't exist.

    Source: task-specific normalisation in "Quantifying Task Priority for Multi-Task Optimization"
    (arXiv 2406.02996); the paper splits BatchNorm, other norms are our generalisation.

    Example:
        >>> model = split_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["seg", "depth"])
        >>> sorted(key for key in model.state_dict() if key.endswith("weight"))
        ['0.weight', '1.depth.weight', '1.seg.weight']
        >>> with active_task("seg"):
        ...     model(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 8, 3, 3])
    """
    names = check_tasks(tasks)
    inside = _modules(model, [model] if modules is None else modules) - _modules(model, exclude)
    if is_norm(model):
        raise ValueError("Parameter `model` is itself a norm, which can't be replaced in place. Wrap it in a module.")

    places: list[tuple[nn.Module, str, nn.Module]] = []
    for module in model.modules():
        for child_name, child in children_of(module).items():
            if child is None or child not in inside:
                continue
            if isinstance(child, SplitNorm):
                if child.task_names != names:
                    raise ValueError(
                        f"The norm {child_name!r} is already split for the tasks {list(child.task_names)}."
                    )
            elif not isinstance(module, SplitNorm) and is_norm(child) and _has_state(child):
                if any(map(is_lazy, (*child.parameters(), *child.buffers()))):
                    raise ValueError(
                        f"The norm {child_name!r} has parameters without a shape (a lazy module). Run the model once before."
                    )
                check_key_parts(names, child)
                places.append((module, child_name, child))
    check_key_parts(names, nn.Module())

    memos: dict[str, dict[int, Any]] = {task: {} for task in names}
    split: dict[nn.Module, SplitNorm] = {}
    for parent, name, norm in places:
        if norm not in split:
            # One memo per task keeps parameters that two norms share shared within each task.
            split[norm] = SplitNorm(norm, {task: copy.deepcopy(norm, memos[task]) for task in names})
        setattr(parent, name, split[norm])
    return model


def has_split_norms(model: nn.Module) -> bool:
    """Whether a forward pass of the model needs an active task.

    So it is if any norm was split by :func:`split_norms`, or any layer by
    :func:`torchmto.structure.make_task_specific`.
    """
    return any(isinstance(module, PerTask) for module in model.modules())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer: torch's own, their subclasses, or one that looks like them.

    A module of another library counts if its class is named ``...Norm`` (or ``...Norm2d`` and the like), it
    has no children and all its parameters, at least one, are vectors: ``LlamaRMSNorm``, ``T5LayerNorm``.
    """
    if isinstance(module, _NORM_TYPES):
        return True
    parameters = list(module.parameters())
    return (
        _NORM_NAME.search(type(module).__name__) is not None
        and next(module.children(), None) is None
        and bool(parameters)
        and all(parameter.dim() == 1 for parameter in parameters)
    )


def _groups_without_scale(norm: nn.Module) -> int:
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    if isinstance(norm, NormBase) and norm.running_var is None:
        return norm.num_features
    return 0


@torch.no_grad()
def _track_group_var(norm: nn.Module, x: Tensor, momentum: float = 0.1) -> None:
    tracked = norm.get_buffer("running_group_var")
    if is_single(norm, x):
        x = x.unsqueeze(0)
    groups = x.detach().reshape(x.shape[0], tracked.shape[0], -1)
    if isinstance(norm, NormBase) and not isinstance(norm, InstanceNorm):
        groups = groups.transpose(0, 1).reshape(1, tracked.shape[0], -1)  # a BatchNorm's is that of the batch
    var = groups.var(dim=-1, unbiased=False).mean(dim=0)
    tracked.lerp_(var.to(tracked.dtype), momentum)


def _has_state(norm: nn.Module) -> bool:
    return next(norm.parameters(), None) is not None or next(norm.buffers(), None) is not None


def check_key_parts(names: Iterable[str], module: nn.Module) -> None:
    """Raise if a module can't have copies with these names.

    Raises:
        ValueError: If so.
    """
    for name in names:
        if not name or "." in name:
            raise ValueError(
                "Parameter `tasks` should hold names that can be part of a state key: not empty, no dot. "
                f"Found {name!r}."
            )
        if hasattr(module, name) or hasattr(SplitNorm, name) or name == "task_names":
            raise ValueError(
                "Parameter `tasks` should hold names that can be part of a state key. "
                f"Found {name!r}, which is an attribute of {type(module).__name__}."
            )


def _modules(model: nn.Module, roots: nn.Module | str | Iterable[nn.Module | str]) -> set[nn.Module]:
    """All modules inside some of a model, given as objects or paths."""
    known = set(model.modules())
    found_inside: set[nn.Module] = set()
    for root in [roots] if isinstance(roots, (str, nn.Module)) else roots:
        try:
            module = model.get_submodule(root) if isinstance(root, str) else root
        except AttributeError as error:
            raise ValueError(f"The model has no module {root!r}.") from error
        if module not in known:
            raise ValueError(f"Parameter `modules` should hold modules of the model. Found a {type(module).__name__}.")
        found_inside.update(module.modules())
    return found_inside
