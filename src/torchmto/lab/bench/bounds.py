"""What a step has to cost, written by hand in plain PyTorch without any torchmto code.

Each function builds a step: a callable without arguments. ``gd`` is the plain sum; ``lb`` is the bound for K task
gradients (one forward, K trunk backwards in which each head goes once, whose gradients nobody adds up or keeps, one optimizer
step); ``lbm`` adds what any method
that holds the rows must do (one copy into [K, P], ``J @ J.T``, one ``w @ J``); the others belong to procedures.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchmto.lab.bench.cases import Case

Step = Callable[[], object]


def gd(case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """The plain sum of the losses."""

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(case.losses()).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def lb(case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """One forward, K backwards, one step: with the last task's gradients, as adding them up isn't part of the bound."""
    trunk = list(case.trunk.parameters())
    heads = [list(head.parameters()) for head in case.heads]

    def step() -> None:
        optimizer.zero_grad()
        for task, loss in enumerate(case.losses()):
            retain = task < case.num_tasks - 1
            gradients = torch.autograd.grad(loss, [*trunk, *heads[task]], retain_graph=retain)
            for parameter, gradient in zip(heads[task], gradients[len(trunk) :], strict=True):
                parameter.grad = gradient
        for parameter, gradient in zip(trunk, gradients[: len(trunk)], strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


def lbm(case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """``lb`` with the rows copied, their Gramian and one combination."""
    trunk = list(case.trunk.parameters())
    heads = [list(head.parameters()) for head in case.heads]
    matrix = torch.empty(case.num_tasks, case.num_shared, device=case.inputs.device)
    combined = matrix.new_empty(case.num_shared)
    weights = matrix.new_ones(case.num_tasks)

    def step() -> Tensor:
        optimizer.zero_grad()
        for task, loss in enumerate(case.losses()):
            retain = task < case.num_tasks - 1
            gradients = torch.autograd.grad(loss, [*trunk, *heads[task]], retain_graph=retain)
            torch.cat([gradient.reshape(-1) for gradient in gradients[: len(trunk)]], out=matrix[task])
            for parameter, gradient in zip(heads[task], gradients[len(trunk) :], strict=True):
                parameter.grad = gradient
            del gradients
        gramian = matrix @ matrix.T
        torch.mv(matrix.T, weights, out=combined)
        start = 0
        for parameter in trunk:
            parameter.grad = combined[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        optimizer.step()
        return gramian

    return step


def singles(case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """K single-task steps one after the other: forward, backward, step."""

    def step() -> None:
        for task in range(case.num_tasks):
            optimizer.zero_grad()
            case.loss(task, case.trunk(case.inputs)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def turns(case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """K steps, each with the forward of all tasks and the backward of one."""

    def step() -> None:
        for task in range(case.num_tasks):
            optimizer.zero_grad()
            case.losses()[task].backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def separate(case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """K forwards and K backwards, one per task, and one step: what task-specific norms need."""

    def step() -> None:
        optimizer.zero_grad()
        for task in range(case.num_tasks):
            case.loss(task, case.trunk(case.inputs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


BOUNDS: dict[str, Callable[[Case, torch.optim.Optimizer], Step]] = {
    "gd*": gd,
    "lb*": lb,
    "lbm*": lbm,
    "singles*": singles,
    "turns*": turns,
    "separate*": separate,
}
"""By the name shown: a star marks a hand-written step."""
