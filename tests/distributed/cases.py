"""What the workers run: training on a rank's part of a batch, with partial labels given as masks."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy import Toy

import torchmto
from torchmto.structure import split_norms

TASKS = ("a", "b", "c")


class Branching(nn.Module):
    """Every pair of tasks shares another layer, so what a rank finds depends on the tasks it sees."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Linear(4, 5)
            self.pairs = nn.ModuleDict({name: nn.Linear(5, 5) for name in ("bc", "ab", "ac")})
            self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        self.double()

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.stem(x).tanh()
        out = {}
        for task in tasks:
            branches = [layer(features).tanh() for name, layer in self.pairs.items() if task in name]
            out[task] = self.heads[task](torch.stack(branches).sum(0))
        return out


def build(kind: str) -> nn.Module:
    """A model by name."""
    if kind == "branching":
        return Branching()
    if kind == "split":
        # In eval mode batch norm doesn't couple the samples.
        model = split_norms(Toy(TASKS, norm=nn.BatchNorm1d(5)), TASKS).double()
        with torch.no_grad():
            for i, task in enumerate(TASKS):
                for j in range(5):
                    model.get_parameter(f"trunk.1.{task}.weight")[j] = 1 + 0.3 * i + 0.1 * j * (-1) ** i
        return model.eval()
    return Toy(TASKS)


Data = tuple[Tensor, Tensor, Tensor]


def data(seed: int, size: int, labelled: str) -> Data:
    """Inputs [B, 4], targets [B, K] and which of them exist, bool [B, K].

    labelled: "all"; "halves": rank 0 of 2 lacks c and rank 1 lacks a; "idle": only the first quarter has labels;
    "mixed": at random, by seed.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(size, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]) + 0.5
    mask = torch.ones(size, 3, dtype=torch.bool)
    if labelled == "halves":
        mask[: size // 2, 2] = False
        mask[size // 2 :, 0] = False
    elif labelled == "idle":
        mask[size // 4 :] = False
    elif labelled == "mixed":
        mask = torch.rand(size, 3, generator=generator) < 0.5
        mask[0] = torch.tensor([True, seed % 2 == 0, seed % 3 == 0])
    return x, y, mask


def closure(model: nn.Module, part: Data, *, count: bool):
    """The mean squared error over a task's labelled samples, left out where there is none."""
    x, y, mask = part

    def losses(tasks: tuple[str, ...]) -> dict[str, Any]:
        present = [t for t in tasks if bool(mask[:, TASKS.index(t)].any())]
        if not present:
            return {}
        outputs = model(x, present)
        result: dict[str, Any] = {}
        for task in present:
            i = TASKS.index(task)
            errors = (outputs[task][:, 0] - y[:, i])[mask[:, i]].square()
            result[task] = (errors.mean(), len(errors)) if count else errors.mean()
        return result

    return losses


def split(part: Data, pieces: Sequence[int]) -> list[Data]:
    """Parts of the given sizes."""
    return list(zip(*(tensor.split(list(pieces)) for tensor in part), strict=True))


def method_of(name: str, options: Mapping[str, Any]) -> torchmto.Method:
    """A method with fresh state."""
    return torchmto.make_method(name, **options)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(
    rank: int,
    size: int,
    group: Any,
    name: str,
    options: Mapping[str, Any],
    *,
    model: str = "toy",
    labelled: str = "all",
    steps: int = 3,
    batch: int = 8,
    shares: Sequence[int] | None = None,
    micro: Sequence[Sequence[int]] | None = None,
    ddp: bool = False,
    independent: bool = False,
    optimizer: str = "adam",
    mt_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Some steps on this rank's part of each batch (all of it if size is 1)."""
    net = build(model)
    wrapped: nn.Module = net
    if ddp and size > 1:
        wrapped = nn.parallel.DistributedDataParallel(net, process_group=group, find_unused_parameters=True)
    made = (
        torch.optim.Adam(net.parameters(), lr=0.01)
        if optimizer == "adam"
        else torch.optim.SGD(net.parameters(), lr=0.05)
    )
    more = dict(mt_options or {})
    if size == 1:
        more.pop("shard_gradients", None)
    if more.pop("scaler", False):
        more["scaler"] = torch.amp.GradScaler("cpu", init_scale=256.0)
    mt = torchmto.MultiTask(
        wrapped, made, tasks=TASKS, method=method_of(name, options), process_group=group if size > 1 else None, **more
    )
    count = labelled != "all" or shares is not None
    infos = []
    grads = []
    for step in range(steps):
        sources = []
        for source in range(3 if independent else 1):
            whole = data(100 * source + step, batch, labelled)
            part = whole if size == 1 else split(whole, shares or [batch // size] * size)[rank]
            pieces = [part] if micro is None else split(part, micro[rank] if size > 1 else [len(part[0])])
            closures = [closure(wrapped, piece, count=count or micro is not None) for piece in pieces]
            sources.append(closures if micro is not None else closures[0])
        info = mt.step(sources[0], independent=tuple(sources[1:]))
        infos.append((dict(info.losses), None if info.weights is None else dict(info.weights), info.skipped))
        grads.append([p.grad is not None for p in net.parameters()])
    return {
        "parameters": flat(net),
        "infos": infos,
        "grads": grads,
        "generator": zlib.crc32(bytes(mt.method.generator.get_state().tolist())),
        "state": mt.state_dict(),
        "bytes": getattr(mt.network.ranks, "bytes_sent", 0),
    }


def train_many(rank: int, size: int, group: Any, table: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]):
    """One :func:`train` per row."""
    results = []
    for name, options, arguments in table:
        results.append(train(rank, size, group, name, options, **arguments))
        if group is not None:
            dist.barrier(group=group)
    return results


def train_case(rank: int, size: int, group: Any, name: str, options: Mapping[str, Any], arguments: Mapping[str, Any]):
    """:func:`train` with its keywords as a mapping."""
    return train(rank, size, group, name, options, **arguments)
