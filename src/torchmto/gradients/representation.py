"""The Gramian of the tasks' gradients with respect to shared features instead of shared parameters."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from torchmto.gradients.backwards import ending_at, quiet
from torchmto.gradients.engine import Engine, Piece, Wanted, ratio
from torchmto.gradients.finite import like, plain, real
from torchmto.gradients.graph import read_graph
from torchmto.gradients.rows import gramian
from torchmto.gradients.torch_private import tree_leaves


class Representation(Engine):
    """K backwards through the heads down to the features, then one through the trunk.

    By the chain rule a task's gradient on the shared parameters is its gradient on the features times the trunk's Jacobian.
    The Gramian of the former is an approximation: an upper bound on what the trunk can do to conflicts, at the price of one
    trunk backward. The update itself, ``weights @ J``, is exact.

    Features may be computed from other features (several scales, a module that runs on its own output). A task's gradient on
    each is that of what reads it above the features: what it does to others by way of this one is in the gradients on those.

    Args:
        features: The module whose output (a tensor, or tensors in lists, tuples or dicts) all tasks share. Every shared
            parameter has to be below it.

    Source: Sener & Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018, section 3.3 (MGDA-UB).
    """

    name = "representation"

    def __init__(self, features: nn.Module) -> None:
        self._features = features
        self._outputs: list[Tensor] = []
        self._rows = torch.empty(0, 0)
        self._hook: RemovableHandle | None = None

    def begin(self) -> None:
        """Listen to the forward: the module has a hook until it is over."""
        self.forget()
        self._hook = self._features.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, args: Any, output: Any) -> None:
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self._outputs += [leaf for leaf in found if leaf.grad_fn is not None]

    def _end(self) -> None:
        """Listen no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def forget(self) -> None:
        """Give up the features, and listen no longer."""
        self._end()
        self._outputs = []
        self._rows = torch.empty(0, 0)

    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the graph above the features."""
        self._end()
        if not self._outputs:
            raise ValueError(
                "gradients=\"representation\": the module given as `features` wasn't run with gradients in this step's "
                "forward, so there are no features to differentiate with respect to."
            )
        # One result may be handed out several times.
        self._outputs = list({(output.grad_fn, output.output_nr): output for output in self._outputs}.values())
        self._above = read_graph(forwards[0], stop=self._nodes()).reached
        return self._above

    def _nodes(self) -> set[Node]:
        """The nodes of the features."""
        return {output.grad_fn for output in self._outputs if output.grad_fn is not None}

    def gramian(self, wanted: Wanted) -> Tensor:
        """Z Zᵀ of the tasks' gradients on the features, Z [k, number of elements of all features]."""
        if any(id(parameter) in self._above for parameter in wanted.shared):
            raise ValueError(
                'gradients="representation": the losses reach a shared parameter without passing through the output of '
                '`features`. Give a module above all shared parameters, or use gradients="layerwise".'
            )
        losses, seeds, others = wanted.pieces[0].losses, wanted.pieces[0].seeds, wanted.others
        # Nothing is above a single one.
        apart = ending_at(self._nodes()) if len(self._outputs) > 1 else contextlib.nullcontext()
        by_task = {}
        with apart:
            for task, loss in losses.items():
                heads = [p for p in others if self._above.get(id(p), 0) >> task & 1]
                gradients = torch.autograd.grad(
                    loss, [*self._outputs, *heads], grad_outputs=seeds[task], retain_graph=True, allow_unused=True
                )
                by_task[task] = gradients[: len(self._outputs)]
                _take(wanted, task, heads, gradients[len(self._outputs) :])
        self._take_below(wanted, by_task)
        reaching = [sum(gradient is not None for gradient in found) for found in zip(*by_task.values(), strict=True)]
        if len(losses) > 1 and max(reaching) < 2:
            raise ValueError(
                'gradients="representation": no two tasks use the same output of `features`. Run the trunk once for all tasks, '
                'or use gradients="layerwise".'
            )
        rows = [self._row(by_task.pop(task)) for task in losses]
        self._rows = torch.stack([row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows])
        self._seeds = dict(seeds)
        return gramian(self._rows)

    def _row(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """A task's gradients on the features as one vector; zeros where there are none."""
        parts = [
            real(torch.zeros_like(output) if gradient is None else gradient).flatten()
            for output, gradient in zip(self._outputs, gradients, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _take_below(self, wanted: Wanted, by_task: Mapping[int, Sequence[Tensor | None]]) -> None:
        """What a task reaches alone isn't shared yet, below the features too, as long as one task only has been seen."""
        below = [parameter for parameter in wanted.others if id(parameter) not in self._above]
        for task, found in by_task.items() if below else ():
            pairs = [(output, g) for output, g in zip(self._outputs, found, strict=True) if g is not None]
            if pairs:
                outputs, cotangents = zip(*pairs, strict=True)
                gradients = torch.autograd.grad(outputs, below, cotangents, retain_graph=True, allow_unused=True)
                _take(wanted, task, below, gradients)

    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> int:
        """One backward of the features, from the weighted sum of their gradients."""
        outputs, self._outputs = self._outputs, []
        if not shared:
            return 0
        # The rows have the seeds in them already.
        factors = torch.stack([ratio(c, self._seeds[task]).to(self._rows) for task, c in pieces[0].seeds.items()])
        combined = torch.split(factors @ self._rows, [real(output).numel() for output in outputs])
        self._rows = torch.empty(0, 0)
        with quiet(shared):
            torch.autograd.backward(
                outputs,
                [like(part, output) for part, output in zip(combined, outputs, strict=True)],
                inputs=list(shared),
            )
        return 1


def _take(wanted: Wanted, task: int, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Hand over a task's gradients of parameters that aren't shared, as far as there are any."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            wanted.take(task, parameter, plain(gradient))
