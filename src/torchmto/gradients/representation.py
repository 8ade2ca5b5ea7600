"""The Gramian of the tasks' gradients with respect to shared features instead of shared parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchmto.gradients.backwards import quiet
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
        graph = read_graph(forwards[0], stop={output.grad_fn for output in self._outputs if output.grad_fn is not None})
        self._above = graph.reached
        return self._above

    def gramian(self, wanted: Wanted) -> Tensor:
        """Z Zᵀ of the tasks' gradients on the features, Z [k, number of elements of all features]."""
        if any(id(parameter) in self._above for parameter in wanted.shared):
            raise ValueError(
                'gradients="representation": the losses reach a shared parameter without passing through the output of '
                '`features`. Give a module above all shared parameters, or use gradients="layerwise".'
            )
        losses, seeds, others = wanted.pieces[0].losses, wanted.pieces[0].seeds, wanted.others
        rows = []
        reaching = [0] * len(self._outputs)
        # Below the features as long as one task only has been seen: what it reaches alone isn't shared yet.
        below = [p for p in others if id(p) not in self._above]
        for task, loss in losses.items():
            heads = [p for p in others if self._above.get(id(p), 0) >> task & 1] + below
            gradients = torch.autograd.grad(
                loss, [*self._outputs, *heads], grad_outputs=seeds[task], retain_graph=True, allow_unused=True
            )
            count = len(self._outputs)
            reaching = [n + (found is not None) for n, found in zip(reaching, gradients[:count], strict=True)]
            parts = [
                real(torch.zeros_like(output) if gradient is None else gradient).flatten()
                for output, gradient in zip(self._outputs, gradients[:count], strict=True)
            ]
            rows.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            for parameter, gradient in zip(heads, gradients[count:], strict=True):
                if gradient is not None:
                    wanted.take(task, parameter, plain(gradient))
        if len(losses) > 1 and max(reaching) < 2:
            raise ValueError(
                'gradients="representation": no two tasks use the same output of `features`. Run the trunk once for all tasks, '
                'or use gradients="layerwise".'
            )
        self._rows = torch.stack([row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows])
        self._seeds = dict(seeds)
        return gramian(self._rows)

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
