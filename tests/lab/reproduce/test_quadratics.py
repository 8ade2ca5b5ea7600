"""The least-squares problems against the library's own methods and against algebra."""

import pytest
import torch
from torch import nn

import torchmto
from torchmto.lab.reproduce.quadratics import STRATEGIES, descend, related_tasks, stationarity, train


class Model(nn.Module):
    def __init__(self, problems):
        super().__init__()
        self.problems = problems
        self.shared = nn.Parameter(torch.zeros(problems.A.shape[3], dtype=torch.float64))
        self.heads = nn.ParameterList(
            [nn.Parameter(torch.zeros(problems.B.shape[3], dtype=torch.float64)) for _ in range(problems.A.shape[1])]
        )

    def forward(self, k):
        A, B, c = (part[0, k] for part in (self.problems.A, self.problems.B, self.problems.c))
        return 0.5 * (A @ self.shared + B @ self.heads[k] - c).square().sum()


@pytest.mark.parametrize(
    ("method", "groups"),
    [("gd", [[0, 1, 2, 3]]), ("sequential", [[0], [1], [2], [3]])],
)
def test_descent_is_the_librarys(method, groups):
    problems = related_tasks(1, torch.Generator().manual_seed(3))
    model = Model(problems)
    rate = 0.3 / float(problems.smoothness())
    tasks = ["0", "1", "2", "3"]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=method)
    state = problems.start()
    for _ in range(4):
        mt.step(lambda names: {name: model(int(name)) for name in names})
        state = descend(problems, state, torch.tensor([rate]), groups, shared=True, heads=True)
    torch.testing.assert_close(model.shared.detach(), state.shared[0])
    torch.testing.assert_close(torch.stack(list(model.heads)).detach(), state.heads[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_group_is_a_joint_step_whatever_the_strategy(strategy):
    problems = related_tasks(3, torch.Generator().manual_seed(0))
    rate = 0.5 / problems.smoothness()
    joint, _ = train(problems, rate, [[0, 1, 2, 3]], 3, strategy="joint")
    split, _ = train(problems, rate, [[0], [1], [2], [3]], 3, strategy="joint")
    other, _ = train(problems, rate, [[0, 1, 2, 3]], 3, strategy=strategy)
    torch.testing.assert_close(vars(joint), vars(split))
    torch.testing.assert_close(vars(joint), vars(other))


def test_the_minimum_is_stationary_and_nothing_is_lower():
    problems = related_tasks(3, torch.Generator().manual_seed(1))
    best = problems.minimizer()
    assert float(stationarity(problems, best).max()) < 1e-8
    assert float(stationarity(problems, problems.start()).min()) > 1e-3
    _, noted = train(problems, 1 / problems.smoothness(), [[0, 1, 2, 3]], 50, marks=(1, 50))
    assert bool((noted[50] < noted[1]).all())
    assert bool((noted[50] >= problems.optimum() - 1e-9).all())


def test_gradients_are_autograds():
    problems = related_tasks(2, torch.Generator().manual_seed(2), absolute=True)
    state = problems.start()
    shared = state.shared.clone().requires_grad_()
    losses = problems.losses(type(state)(shared, state.heads))
    (gradient,) = torch.autograd.grad(losses[:, 1].sum(), shared)
    torch.testing.assert_close(problems.gradients(state)[0][:, 1], gradient)
