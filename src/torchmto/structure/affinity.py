"""Proximal inter-task affinity: how one group's step changes every task's loss; groups of tasks from it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchmto.checks import check_choice, check_number, check_tasks, unknown_task
from torchmto.solvers import clustering

Attribution = Literal["actor", "official"]
Normalization = Literal["paper", "official"]
Cluster = Literal["affinity_propagation", "correlation"]
_Matrix = npt.NDArray[np.float64]


class ProximalAffinity:
    """Tracks the affinity between tasks from the losses of successive group updates on one batch.

    A group's step changes the loss of task k by ``a_k = 1 - L_k(after) / L_k(before)``, shared and own
    parameters moved, same batch. For every source s in the group (all divided by the size of the group):

    - target t outside the group: ``a_t``;
    - t = s: ``a_s`` if it isn't negative, otherwise nothing;
    - another t in the group: ``a_t`` if ``a_t`` and ``a_s`` have the same sign (or one is zero), else
      ``-max(a_t, a_s)``;

    enters the moving average ``B[s, t] <- (1 - decay) B[s, t] + decay * value``.

    Per batch: :meth:`new_batch`, then for each group in turn its forward pass, :meth:`update` with the losses
    of that forward pass, backward, optimizer step. The losses before the next group's step are the losses
    after this one's; :meth:`finish` takes those after the last. Tasks without a loss before and after a step
    keep their entries, as do tasks whose loss before isn't positive (a relative change has no meaning then).

    Args:
        tasks: the K names, in the order of the matrix.
        decay: of the moving average, in (0, 1].
        attribution: ``"actor"`` credits a change to the group whose step caused it. ``"official"`` credits it
            to the group that steps next: what the released code does, because it takes the losses before a
            group's step. It is a defect there, kept to reproduce its numbers; :meth:`finish` credits nothing
            then, and :meth:`groups` accepts affinity propagation that hasn't converged, as that code does.
        normalization: see :func:`normalized_affinity`.

    Raises:
        TypeError: names that aren't strings, a string instead of a sequence of them, or a ``decay`` that isn't a number.
        ValueError: no task, a task twice, ``decay`` out of range, or an unknown option.

    Source: "Selective Task Group Updates for Multi-Task Optimization" (arXiv 2502.11986), proximal inter-task
    affinity.

    Example:
        >>> affinity = ProximalAffinity(["a", "b"], decay=0.5)
        >>> affinity.new_batch()
        >>> affinity.update(["a"], {"a": 1.0, "b": 2.0})
        >>> affinity.update(["b"], {"a": 0.8, "b": 1.5})  # a's step took 20 % off a's loss and 25 % off b's
        >>> affinity.matrix
        tensor([[0.1000, 0.1250],
                [0.0000, 0.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        tasks: Iterable[str],
        decay: float = 0.001,
        attribution: Attribution = "actor",
        normalization: Normalization = "paper",
    ) -> None:
        self.tasks = check_tasks(tasks)
        self.decay = check_number("decay", decay, above=0, maximum=1)
        self.attribution = check_choice("attribution", attribution, get_args(Attribution))
        self.normalization = check_choice("normalization", normalization, get_args(Normalization))
        self._matrix: _Matrix = np.zeros((len(self.tasks), len(self.tasks)))
        self._groups = [[name] for name in self.tasks]
        self._before: tuple[list[str], dict[str, float]] | None = None

    @property
    def matrix(self) -> Tensor:
        """The moving average, float64 ``[K, K]`` on the CPU (a copy): rows are sources, columns targets."""
        return torch.from_numpy(self._matrix.copy())

    def new_batch(self) -> None:
        """A new batch begins: its losses aren't compared with those of the last."""
        self._before = None

    def update(self, group: Iterable[str], losses: Mapping[str, float | Tensor]) -> None:
        """The losses of the forward pass just before this group's step.

        Args:
            group: the tasks about to be updated.
            losses: the loss of every task of this batch, a float or a tensor of one element.

        Raises:
            ValueError: an unknown task, a task twice in the group, an empty group, or a loss that isn't one
                finite number. Nothing has changed then.
        """
        names = self._checked_group(group)
        values = self._checked_losses(losses)
        if self._before is not None:
            actor, before = self._before
            self._credit(actor if self.attribution == "actor" else names, before, values)
        self._before = (names, values)

    def finish(self, losses: Mapping[str, float | Tensor]) -> None:
        """The losses after the batch's last step, from one more forward pass: credits the last group.

        Args:
            losses: as in :meth:`update`.

        Raises:
            ValueError: as in :meth:`update`.
        """
        values = self._checked_losses(losses)
        if self._before is not None and self.attribution == "actor":
            self._credit(*self._before, values)
        self._before = None

    def groups(self, random_state: int = 0, cluster: Cluster = "affinity_propagation") -> list[list[str]]:
        """The groups that the affinities suggest now.

        A task whose own affinity (diagonal) isn't positive stays alone. If the clustering fails, the groups
        it found last stay (at first every task alone).

        Args:
            random_state: of affinity propagation, which adds noise to break ties; for few tasks the noise
                decides.
            cluster: ``"affinity_propagation"``, the paper's; ``"correlation"``, the partition with the
                largest summed normalised affinity inside groups, which is deterministic and doesn't depend on
                the tasks' order.

        Returns:
            A partition of the tasks; names and groups in the tasks' order.

        Raises:
            ValueError: an unknown ``cluster``.
        """
        correlation = check_choice("cluster", cluster, get_args(Cluster)) == "correlation"
        converged = self.attribution == "actor"
        self._groups = self._partition(
            lambda X: (
                clustering.correlation_groups(X)
                if correlation
                else clustering.affinity_propagation_groups(X, random_state, converged=converged)
            )
        )
        return [list(group) for group in self._groups]

    def heterogeneous_groups(self) -> list[list[str]]:
        """The opposite of :meth:`groups`: tasks of low mutual affinity together, a baseline of the paper's ablation.

        Our reading: the partition that maximises the summed negated normalised affinity inside groups. A task whose
        own affinity isn't positive stays alone.

        Returns:
            A partition of the tasks; names and groups in the tasks' order.
        """
        return self._partition(lambda X: clustering.correlation_groups(-X))

    def _partition(self, split: Callable[[_Matrix], list[list[int]] | None]) -> list[list[str]]:
        """The tasks ``split`` by normalised affinities, those without one of their own each alone; as before if it fails."""
        own = np.flatnonzero(np.diagonal(self._matrix) > 0)
        matrix = self._matrix[np.ix_(own, own)]
        found = split(_normalized(matrix, self.normalization)) if own.size > 1 else [[0]] * own.size
        if found is None:
            return self._groups
        parts = [[index] for index in range(len(self.tasks)) if index not in own]
        parts += [[int(own[index]) for index in part] for part in found]
        return [[self.tasks[index] for index in part] for part in sorted(sorted(part) for part in parts)]

    def state_dict(self) -> dict[str, Any]:
        """All that changes, in types that ``torch.load(weights_only=True)`` accepts."""
        group, losses = self._before if self._before is not None else (None, {})
        return {
            "tasks": list(self.tasks),
            "matrix": self.matrix,
            "groups": [list(part) for part in self._groups],
            "before_group": None if group is None else list(group),
            "before_losses": dict(losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: from :meth:`state_dict`.

        Raises:
            ValueError: a state of other tasks, or one that doesn't fit. Nothing has changed then.
        """
        if list(state["tasks"]) != list(self.tasks):
            raise ValueError(f"The state belongs to the tasks {list(state['tasks'])}, not to {list(self.tasks)}.")
        matrix = torch.as_tensor(state["matrix"], dtype=torch.float64, device="cpu").numpy()
        if matrix.shape != self._matrix.shape:
            raise ValueError(f"The state's matrix should have shape {self._matrix.shape}. Found {matrix.shape}.")
        groups = [[str(name) for name in part] for part in state["groups"]]
        if sorted(name for part in groups for name in part) != sorted(self.tasks):
            raise ValueError(f"The state's groups should be a partition of {list(self.tasks)}. Found {groups}.")
        group = state["before_group"]
        before = None if group is None else (self._checked_group(group), self._checked_losses(state["before_losses"]))
        self._matrix, self._groups, self._before = matrix.copy(), groups, before

    def _credit(self, group: Sequence[str], before: Mapping[str, float], after: Mapping[str, float]) -> None:
        change = np.full(len(self.tasks), np.nan)
        for index, task in enumerate(self.tasks):
            if task in before and task in after and before[task] > 0:
                change[index] = 1 - after[task] / before[task]
        sources = [index for index, task in enumerate(self.tasks) if task in group and not math.isnan(change[index])]
        if not sources:
            return
        inside = np.zeros(len(self.tasks), dtype=bool)
        inside[sources] = True
        own = change[sources, None]
        target = np.broadcast_to(change, (len(sources), len(self.tasks)))
        conflict = inside & (np.sign(target) * np.sign(own) < 0)
        value = np.where(conflict, -np.maximum(target, own), target) / len(sources)
        is_self = np.arange(len(self.tasks)) == np.asarray(sources)[:, None]
        keeps = np.isnan(target) | (is_self & (own < 0))
        rows = self._matrix[sources]
        moved = (1 - self.decay) * rows + (self.decay * value).astype(rows.dtype)
        self._matrix[sources] = np.where(keeps, rows, moved)

    def _checked_group(self, group: Iterable[str]) -> list[str]:
        names = check_tasks(group, "group")
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(unknown_task(unknown[0], self.tasks, "in `group`"))
        return list(names)

    def _checked_losses(self, losses: Mapping[str, float | Tensor]) -> dict[str, float]:
        unknown = [task for task in losses if task not in self.tasks]
        if unknown:
            raise ValueError(f"Parameter `losses` should hold losses of {list(self.tasks)}. Found {unknown}.")
        values: dict[str, float] = {}
        for task, loss in losses.items():
            if isinstance(loss, Tensor) and loss.numel() != 1:
                raise ValueError(f"The loss of task {task!r} should be one number. Found shape {tuple(loss.shape)}.")
            value = values[task] = float(loss.item() if isinstance(loss, Tensor) else loss)
            if not math.isfinite(value):
                raise ValueError(f"Parameter `losses` should hold finite numbers. Found {value} for task {task!r}.")
        return values


def normalized_affinity(matrix: Tensor, normalization: Normalization = "paper") -> Tensor:
    """Affinities relative to the tasks' own, made symmetric: ``X[:, i] /= X[i, i]; X = (X + X^T) / 2``.

    Args:
        matrix: ``[K, K]``, rows sources, columns targets, with a positive diagonal.
        normalization: ``"paper"`` is the formula. ``"official"`` is what the released code computes: it
            divides a column by a view of the element it overwrites, so that everything below the diagonal is
            divided by 1, and the result depends on the order of the tasks.

    Returns:
        float64 ``[K, K]``.

    Raises:
        ValueError: a matrix that isn't square, has a diagonal entry that isn't positive, or an unknown
            option.

    Source: "Selective Task Group Updates for Multi-Task Optimization" (arXiv 2502.11986).

    Example:
        >>> normalized_affinity(torch.tensor([[2.0, 1.0], [4.0, 4.0]]))
        tensor([[1.0000, 1.1250],
                [1.1250, 1.0000]], dtype=torch.float64)
    """
    check_choice("normalization", normalization, get_args(Normalization))
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Parameter `matrix` should have shape [K, K]. Found {tuple(matrix.shape)}.")
    values = matrix.detach().cpu().double().numpy()
    if not bool((np.diagonal(values) > 0).all()):
        raise ValueError(f"Parameter `matrix` should have a positive diagonal. Found {np.diagonal(values).tolist()}.")
    return torch.from_numpy(_normalized(values, normalization))


def _normalized(matrix: _Matrix, normalization: str) -> _Matrix:
    divided = matrix / np.diagonal(matrix)
    if normalization == "official":
        divided = np.where(np.tri(len(matrix), k=-1, dtype=bool), matrix, divided)
    result: _Matrix = (divided + divided.T) / 2
    return result
