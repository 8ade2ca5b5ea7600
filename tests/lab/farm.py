"""A user's own file: a recurrent model, an own metric, labels partly missing."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanAbsoluteError

from torchmto import lab
from torchmto.structure import active_task


class Fields(torch.utils.data.Dataset):
    """Weather over six weeks, the crop and the yield; a quarter of the yields is unknown."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 6, 3, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        targets = {"crop": int(x.sum(0).argmax()), "yield": x.mean().reshape(1)}
        if index % 4 == 0:
            del targets["yield"]
        return x + 0.01 * torch.randn(x.shape), targets  # the noise is an augmentation


class FarmNet(nn.Module):
    """A recurrent trunk that all tasks share."""

    def __init__(self, width):
        super().__init__()
        self.trunk = nn.GRU(3, width, batch_first=True)
        self.heads = nn.ModuleDict({"crop": nn.Linear(width, 3), "yield": nn.Linear(width, 1)})

    def forward(self, x, tasks):
        _, state = self.trunk(x)
        return {task: self.heads[task](state[0]) for task in tasks}


def farm(width=8, size=48):
    """What a user compares."""
    return lab.Problem(
        tasks=[lab.Task("crop", "classification", 3), lab.Task("yield", "regression", 1, unit="t/ha")],
        train=Fields(size, 0),
        validation=Fields(32, 1),
        test=Fields(32, 2),
        model=lambda: FarmNet(width),
        losses={"yield": lambda output, target: (output - target).abs().mean()},
        metrics={"yield": {"mae": MeanAbsoluteError()}},
    )


def pinn(steps=3):
    """u'' = -u with u(0) = 0 and u'(0) = 1: no data set at all."""

    def closure(model, batch, tasks):
        assert batch is None
        t = torch.linspace(0, 1, 16)[:, None].requires_grad_()
        u = model(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), t, create_graph=True)
        losses = {"equation": (ddu + u).square().mean(), "start": (u[0] ** 2 + (du[0] - 1) ** 2).sum()}
        return {task: losses[task] for task in tasks}

    def evaluate(model):
        t = torch.linspace(0, 1, 32)[:, None]
        with torch.no_grad():
            error = (model(t) - t.sin()).abs()
        return {"equation": {"error": error.mean()}, "start": {"error": error[0].item() + 1e-3}}

    return lab.Problem(
        tasks=["equation", "start"],
        train=steps,
        model=lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)),
        closure=closure,
        evaluate=evaluate,
        primary={"equation": ("error", False), "start": ("error", False)},
    )


def disjoint():
    """Two data sets of different length; no sample has both labels."""

    def samples(size, seed, label):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        return [(x[i], label(x[i])) for i in range(size)]

    def parts(seed):
        return {
            "sign": samples(24, seed, lambda x: int(x[0] > 0)),
            "sum": samples(9, seed + 1, lambda x: {"sum": x.sum().reshape(1)}),
        }

    return lab.Problem(
        tasks=[lab.Task("sign", "classification", 2), lab.Task("sum", "regression", 1)],
        train=parts(0),
        validation=parts(10),
        test=parts(20),
        model="mlp",
    )


class OfMean(MeanAbsoluteError):
    """The error of a distribution's mean."""

    def update(self, output, target):
        super().update(output["mean"] if isinstance(output, dict) else output[0], target)


class SpreadNet(FarmNet):
    """Says of a yield how sure it is, too: by name, or as a pair."""

    def __init__(self, named):
        super().__init__(8)
        self.named, self.spread = named, nn.Linear(1, 1)

    def forward(self, x, tasks):
        outputs = super().forward(x, ["crop", "yield"])
        mean, spread = outputs["yield"], self.spread(outputs["yield"]).exp()
        return {**outputs, "yield": {"mean": mean, "spread": spread} if self.named else (mean, spread)}


def spread(named=True):
    """A task of its own kind, whose output is no tensor."""

    def likelihood(output, target):
        mean, spread = output.values() if named else output
        return ((mean - target) ** 2 / spread + spread.log()).mean()

    def rows(seed):
        return [(x, {"crop": int(x.sum(0).argmax()), "yield": x.mean().reshape(1)}) for x in Fields(12, seed).x]

    return lab.Problem(
        tasks=[lab.Task("crop", "classification", 3), lab.Task("yield", "own")],
        train=[*rows(0)],
        validation=[*rows(1)],
        test=[*rows(2)],
        model=lambda: SpreadNet(named),
        losses={"yield": likelihood},
        metrics={"yield": {"mae": OfMean()}},
    )


def breaks():
    """A user's mistake in a user's code."""
    raise ValueError("the farm is flooded")


class NormedNet(nn.Module):
    """Norms on the way to both heads."""

    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in ("sum", "first")})

    def forward(self, x, tasks):
        h = checkpoint(self.trunk, x, use_reentrant=False) if self.checkpointed else self.trunk(x)
        return {task: self.heads[task](h) for task in tasks}


def normed(shape="samples"):
    """A model with norms, given as samples, as disjoint data sets or with a closure that looks at all tasks every time."""
    tasks = [lab.Task("sum", "regression", 1), lab.Task("first", "regression", 1)]
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    targets = {"sum": x.sum(1, keepdim=True), "first": x[:, :1]}

    def model():
        return NormedNet(shape == "checkpointed")

    def closure(model, rows, tasks):
        outputs = model(x[rows], tuple(targets))
        return {task: (outputs[task] - y[rows]).square().mean() for task, y in targets.items()}

    def evaluate(model):
        figures = {}
        for task, y in targets.items():
            with active_task(task), torch.no_grad():
                figures[task] = {"mae": float((model(x, (task,))[task] - y).abs().mean())}
        return figures

    if shape == "closure":
        primary = dict.fromkeys(targets, ("mae", False))
        rows = list(torch.arange(32).split(8))
        return lab.Problem(list(targets), rows, model=model, closure=closure, evaluate=evaluate, primary=primary)
    if shape == "disjoint":
        data = {task: [(x[i], y[i]) for i in range(32)] for task, y in targets.items()}
    else:
        data = [(x[i], {task: y[i] for task, y in targets.items()}) for i in range(32)]
    return lab.Problem(tasks, data, data, data, model=model)
