"""What the workers run: training on a rank's part of a batch, with partial labels given as masks."""

import contextlib
import functools
import itertools
import os
import socket
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.nn.utils import parametrize

import torchmto
from torchmto.gradients.ranks import whole
from torchmto.structure import active_task, split_norms
from toy import Toy, inner, reentrant

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
    if kind == "split groups":
        return split_norms(Toy(TASKS, norm=nn.GroupNorm(3, 6), width=6), TASKS)
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
    """All parameters in one vector, gathered if they are sharded."""
    return torch.cat([whole(p).detach().flatten() for p in model.parameters()])


def _save(net: nn.Module, optimizer: torch.optim.Optimizer, mt: torchmto.MultiTask, folder: str, group: Any) -> None:
    """A distributed checkpoint of model and optimizer; the method's state is the same on all ranks."""
    model_state, optimizer_state = get_state_dict(net, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder, process_group=group)
    if group is None or dist.get_rank(group) == 0:
        torch.save(mt.state_dict(), Path(folder) / "method.pt")
    if group is not None:
        dist.barrier(group=group)


def _load(net: nn.Module, optimizer: torch.optim.Optimizer, mt: torchmto.MultiTask, folder: str) -> None:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    group = mt.network.ranks.group
    checkpoint.load(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    mt.load_state_dict(torch.load(Path(folder) / "method.pt", weights_only=True))


def train(  # noqa: C901 - a branch per situation
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
    fsdp: str = "",
    unsynced: bool = False,
    independent: bool = False,
    optimizer: str = "adam",
    mt_options: Mapping[str, Any] | None = None,
    first: int = 0,
    load: str = "",
    save: str = "",
) -> dict[str, Any]:
    """Some steps on this rank's part of each batch (all of it if size is 1)."""
    net = build(model)
    wrapped: nn.Module = net
    if ddp and size > 1:
        wrapped = nn.parallel.DistributedDataParallel(net, process_group=group, find_unused_parameters=True)
    if fsdp and size > 1:
        mesh = DeviceMesh.from_group(group, "cpu")
        # The heads may stay unsharded.
        for layer in [*net.trunk, *([net] if fsdp == "all" else [net.trunk])]:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, mesh=mesh)
        if fsdp == "all":
            assert isinstance(net.heads["a"].weight, DTensor)
        if unsynced:
            net.set_requires_gradient_sync(False)
            net.set_is_last_backward(False)
    made = (
        torch.optim.Adam(net.parameters(), lr=0.01)
        if optimizer == "adam"
        else torch.optim.SGD(net.parameters(), lr=0.05)
    )
    more = dict(mt_options or {})
    if size == 1:
        more.pop("shard_gradients", None)
        # The reference keeps the rows.
        more.pop("gradients", None)
    if more.pop("scaler", False):
        more["scaler"] = torch.amp.GradScaler("cpu", init_scale=256.0)
    mt = torchmto.MultiTask(
        wrapped, made, tasks=TASKS, method=method_of(name, options), process_group=group if size > 1 else None, **more
    )
    if load:
        _load(net, made, mt, load)
    count = labelled != "all" or shares is not None
    infos = []
    grads = []
    for step in range(first, first + steps):
        sources = []
        for source in range(3 if independent else 1):
            whole = data(100 * source + step, batch, labelled)
            part = whole if size == 1 else split(whole, shares or [batch // size] * size)[rank]
            pieces = [part] if micro is None else split(part, micro[rank] if size > 1 else [len(part[0])])
            closures = [closure(wrapped, piece, count=count or micro is not None) for piece in pieces]
            sources.append(closures if micro is not None else closures[0])
        info = mt.step(sources[0], independent=tuple(sources[1:]))
        infos.append((dict(info.losses), None if info.weights is None else dict(info.weights), info.skipped))
        # Not those of `net`: after a forward without backward FSDP keeps the root's parameters gathered.
        grads.append([p.grad is not None for p in made.param_groups[0]["params"]])
    if save:
        _save(net, made, mt, save, group)
    if unsynced and size > 1:
        state = net._get_fsdp_state()
        assert not state._state_ctx.is_last_backward
        assert not any(part.reduce_grads for part in state._fsdp_param_groups)
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


def train_case(  # noqa: PLR0917
    rank: int, size: int, group: Any, name: str, options: Mapping[str, Any], arguments: Mapping[str, Any]
):
    """:func:`train` with its keywords as a mapping."""
    return train(rank, size, group, name, options, **arguments)


def try_sharded(rank: int, size: int, group: Any, table: Sequence[tuple[str, Mapping[str, Any]]]):
    """Which methods take ``shard_gradients=True``, and the messages of the others."""
    works, refused = [], {}
    for name, options in table:
        model = Toy(TASKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            torchmto.MultiTask(
                model,
                optimizer,
                tasks=TASKS,
                method=method_of(name, options),
                process_group=group,
                shard_gradients=True,
            )
            works.append(name)
        except ValueError as error:
            refused[name] = str(error)
    return works, refused


def decide(  # noqa: PLR0917
    rank: int, size: int, group: Any, name: str, options: Mapping[str, Any], steps: int, model: str
):
    """Train on data whose scale depends on the rank; record what the method decides."""
    net = build(model).train()
    mt = torchmto.MultiTask(
        net,
        torch.optim.SGD(net.parameters(), lr=0.02),
        tasks=TASKS,
        method=method_of(name, options),
        process_group=group,
    )
    decisions, local = [], []
    for step in range(steps):
        x, y, mask = data(10 * step + rank, 4, "all")
        part = (x, y * (1 + rank * torch.tensor([1.0, 0.1, 0.5])), mask)
        with active_task("a"):
            local.append(float(closure(net, part, count=False)(("a",))["a"]))
        info = mt.step(closure(net, part, count=False))
        chosen = {
            key: value
            for key, value in info.records.items()
            if key in ("phase", "groups", "order", "active", "priority_shares", "probabilities")
        }
        decisions.append((repr(chosen), repr(dict(info.losses)), info.num_optimizer_steps, info.num_conflicts))
    net_state = torch.cat([flat(net), *(buffer.double().flatten() for buffer in net.buffers())])
    return {"parameters": net_state, "decisions": decisions, "local": local}


class _Apart(nn.Module):
    """Tasks b and c share a layer that a doesn't reach; its norm can be found from a forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.first(x).tanh()
        if float(features.detach().sum()) > 1e9 or "a" not in tasks:
            features = self.norm(self.second(features))
        return {task: self.heads[task](features) for task in tasks}


def pair(rank: int, size: int, group: Any, schedule: str):
    """Rank 0 has task a alone, the others the other tasks; what the ranks pair, and the parameters."""
    torch.manual_seed(0)
    net = split_norms(_Apart(), TASKS).double()
    mt = torchmto.MultiTask(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        tasks=TASKS,
        method=method_of("connection_strength", {"schedule": schedule, "degenerate": "project"}),
        process_group=group,
    )
    for step in range(4):
        x, y, mask = data(10 * step + rank, 4, "all")
        mask[:, slice(1, 3) if rank == 0 else slice(0, 1)] = False
        info = mt.step(closure(net, (x, y, mask), count=False))
    return {
        "parameters": flat(net),
        "priorities": mt.state_dict()["method_state"]["priorities"],
        "records": dict(info.records),
    }


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("broken backward")


class _Interrupted(_Broken):
    @staticmethod
    def backward(ctx, grad):
        raise KeyboardInterrupt("stop")


def fail(  # noqa: C901, PLR0917 - one kind of failure after the other
    rank: int, size: int, group: Any, name: str, kind: str, pieces: int
):
    """Rank 2 fails in its second step."""
    net = build("toy")
    more = {"gradients": "layerwise"} if name.endswith("layerwise") else {}
    mt = torchmto.MultiTask(
        net,
        torch.optim.SGD(net.parameters(), lr=0.02),
        tasks=TASKS,
        method=name.split(",", maxsplit=1)[0],
        process_group=group,
        **more,
    )
    part = data(rank, 4, "all")
    good = closure(net, part, count=False)
    runs: list[tuple[str, ...]] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no rule")

    def bad(tasks: tuple[str, ...]) -> dict[str, Any]:
        runs.append(tasks)
        if kind == "closure":
            raise ValueError("no batch")
        if kind == "interrupt":
            raise KeyboardInterrupt("stop")
        if kind == "second run" and len(runs) == 2:
            raise OSError("no data the second time")
        losses = good(tasks)
        if kind == "no graph" and "b" in losses:
            losses["b"] = losses["b"].detach()
        if kind == "unknown":
            losses["z"] = next(iter(losses.values()))
        if kind == "backward" and "b" in losses:
            losses["b"] = _Broken.apply(losses["b"])
        if kind == "interrupted backward" and "b" in losses:
            losses["b"] = _Interrupted.apply(losses["b"])
        if kind in ("reentrant", "inner") and "b" in losses:
            run = reentrant if kind == "reentrant" else inner
            losses["b"] = run(net.heads["b"], net.trunk(part[0])).square().mean()
        return losses

    mt.step(good)
    before = flat(net)
    result = {}
    wrong = rank == 2
    if wrong and kind == "rule":
        rule = "weights" if name.startswith("pcgrad") else "loss_weights"
        setattr(mt.method, rule, broken)
    try:
        # What accumulates into a gradient that is there already is right, and not noticed.
        first = bad if wrong and kind == "inner" else good
        asked = ["nobody"] if wrong and kind == "argument" else None
        mt.step([first] * (pieces - 1) + [bad if wrong else good], tasks=asked)
    except BaseException as error:  # noqa: BLE001 - reported
        result = {"type": type(error).__name__, "message": str(error), "unchanged": torch.equal(before, flat(net))}
    if wrong and kind == "rule":
        delattr(mt.method, rule)
    mt.step(good)
    return {**result, "parameters": flat(net)}


def backward(rank: int, size: int, group: Any, name: str) -> dict[str, Any]:
    """``mt.backward`` on micro-batches, in one call for each, beside ``mt.step`` on their list."""
    nets = [build("toy"), build("toy")]
    stepping, stepped = (
        torchmto.MultiTask(
            net, torch.optim.SGD(net.parameters(), lr=0.05), tasks=TASKS, method=name, process_group=group, seed=1
        )
        for net in nets
    )
    parts = [data(rank + size * number, 4, "all") for number in range(2)]
    optimizer = stepped.network.optimizers.all[0]
    for _ in range(2):
        stepping.step([closure(nets[0], part, count=False) for part in parts])
        for number, part in enumerate(parts):
            stepped.backward(closure(nets[1], part, count=False), final=number == 1)
        optimizer.step()
        stepping.step(closure(nets[0], parts[0], count=False))
        stepped.backward(closure(nets[1], parts[0], count=False))
        optimizer.step()
    return {"stepping": flat(nets[0]), "stepped": flat(nets[1])}


def other_tasks(rank: int, size: int, group: Any) -> tuple[str, str]:
    """The last rank has a task less."""
    net = build("toy")
    own = TASKS if rank < size - 1 else TASKS[:2]
    mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), lr=0.1), tasks=own, method="gd", process_group=group)
    try:
        mt.step(closure(net, data(rank, 4, "all"), count=False))
    except ValueError as error:
        return type(error).__name__, str(error)
    return "", ""


def other_parameters(rank: int, size: int, group: Any) -> str:
    """The last rank has drawn another weight."""
    net = build("toy")
    if rank == size - 1:
        with torch.no_grad():
            net.heads["b"].weight += 1
    mt = torchmto.MultiTask(
        net, torch.optim.SGD(net.parameters(), lr=0.1), tasks=TASKS, method="gd", process_group=group
    )
    return _message(lambda: mt.step(closure(net, data(rank, 4, "all"), count=False)))


def reordered(rank: int, size: int, group: Any, what: str, name: str) -> tuple[Tensor, list[str]]:
    """Every rank lists the same parameters in another order, as a set of them does."""
    net = build("toy")

    def mixed(parameters: Any) -> list[Any]:
        given = list(parameters)
        return given[::-1] if rank else given

    chosen = mixed(net.parameters()) if what == "optimizer" else list(net.parameters())
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (chosen[:4], chosen[4:])] if what == "optimizers" else None
    mt = torchmto.MultiTask(
        net,
        torch.optim.SGD(chosen, lr=0.1) if optimizers is None else mixed(optimizers),
        tasks=TASKS,
        method=name,
        shared=mixed(net.trunk.parameters()) if what == "shared" else None,
        process_group=group,
    )
    x, y, mask = data(0, 8, "all")
    for _ in range(2):
        mt.step(closure(net, split((x, y, mask), [8 // size] * size)[rank], count=False))
    return flat(net), mt.state_dict()["roles"]["layout"]


def differ(rank: int, size: int, group: Any) -> dict[str, str]:
    """What the first rank is told, or holds, and the others aren't; and what happens in the next step."""
    result = {}

    def take(key: str, change: Any = None, *, before: Any = None, method: Any = "gd", **options: Any) -> None:
        net = build("toy")
        if before is not None:
            before(net)
        made = {"tasks": TASKS, "method": method, "process_group": group, **options}
        mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), lr=0.1), **made)
        good = closure(net, data(rank, 4, "all"), count=False)
        if change is not None:
            mt.step(good)
            state = mt.state_dict()
            change(mt, state)
        result[key] = _message(lambda: mt.step(good))

    def freeze(net: nn.Module) -> None:
        net.heads["a"].requires_grad_(False)

    def freeze_and_change(net: nn.Module) -> None:
        freeze(net)
        net.heads["a"].weight.data += rank

    def freeze_change_and_leave_alone(net: nn.Module) -> None:
        freeze_and_change(net)
        net._ddp_params_and_buffers_to_ignore = ["heads.a.weight", "heads.a.bias"]

    def expanded(net: nn.Module) -> None:
        net.fixed = nn.Parameter(torch.zeros(1).expand(4, 5), requires_grad=False)

    def freeze_elsewhere(mt: torchmto.MultiTask, state: Any) -> None:
        mt.network.model.heads[TASKS[rank % 2]].requires_grad_(False)

    def reordered_heads(net: nn.Module) -> None:
        if rank:
            net.heads = nn.ModuleDict(dict(reversed(list(net.heads.items()))))

    take("alike", before=freeze, method=method_of("graddrop", {"leak": 0.5}), weights={"a": 2.0}, clip=1.0)
    take("hyper-parameter", method=method_of("graddrop", {"leak": 0.5 * rank}))
    take("by task", method=method_of("static", {"weights": {"a": 1.0 + rank, "b": 1.0, "c": 1.0}}))
    take("clip", clip=1.0 + rank)
    take("weights", weights={"a": 1.0 + rank})
    take("weights later", lambda mt, _: mt.weights.update(a=2.0 + rank), weights={"a": 1.0})
    take("report", lambda mt, _: rank or mt.report(dict.fromkeys(TASKS, 0.5)), method="dtp")
    take("other report", lambda mt, _: mt.report(dict.fromkeys(TASKS, 0.1 + 0.5 * rank)), method="dtp")
    take("window", lambda mt, _: rank or mt.end_window(), method="dwa")
    take("state", lambda mt, state: rank or mt.load_state_dict(state), method="famo")
    take(
        "all told", lambda mt, state: (mt.report({"a": 0.1}), mt.end_window(), mt.load_state_dict(state)), method="dtp"
    )
    take("frozen", before=freeze_and_change)
    take("nobody hears it", lambda mt, _: (rank or mt.end_window(), mt.report({"a": 0.1 + rank})))
    take("left alone", before=freeze_change_and_leave_alone)
    take("numbers alike", weights={"a": 1.0 if rank else 1})
    take("expanded", before=expanded)
    take("other parameters", freeze_elsewhere)
    take("order", before=reordered_heads)
    return result


def unlabelled(rank: int, size: int, group: Any, name: str) -> dict[str, Any]:
    """A model with batch norm; the last rank's second micro-batch has no labels, and another task than the others first."""
    torch.manual_seed(0)
    net = Toy(TASKS, norm=nn.BatchNorm1d(5))
    mt = torchmto.MultiTask(
        net, torch.optim.SGD(net.parameters(), lr=0.02), tasks=TASKS, method=name, process_group=group
    )
    full = closure(net, data(rank, 4, "all"), count=False)
    last = rank == size - 1
    mt.step([full, (lambda tasks: {}) if last else full])
    roles = mt.state_dict()["roles"]
    return {
        "buffers": {key: value.tolist() for key, value in net.named_buffers()},
        "roles": roles,
        "parameters": flat(net),
    }


def reuse(rank: int, size: int, group: Any, engine: str) -> tuple[list[int], Tensor]:
    """Backwards per step with weights that are reused: only the first rank has task b, only the last c, from step 2 on."""
    net = Toy(TASKS)
    method = method_of("pcgrad", {"refresh_every": 4, "shuffle": False})
    options = {"gradients": engine, "process_group": group}
    mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), lr=0.05), tasks=TASKS, method=method, **options)
    counts = []
    for step in range(8):
        x, y, mask = data(step * size + rank, 4, "all")
        mask[:, 1] = rank == 0
        mask[:, 2] = rank == size - 1 and step >= 2
        counts.append(mt.step(closure(net, (x, y, mask), count=True)).num_backward)
    return counts, flat(net)


def _message(run) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - reported
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refuse(rank: int, size: int, group: Any, name: str):
    """Errors that depend on what all ranks bring."""

    def make(**options: Any):
        net = build("toy")
        options = {"method": name, **options}
        mt = torchmto.MultiTask(
            net, torch.optim.SGD(net.parameters(), lr=0.02), tasks=TASKS, process_group=group, **options
        )
        return net, mt

    net, mt = make()
    good = closure(net, data(rank, 4, "all"), count=False)

    def nan(tasks: tuple[str, ...]) -> dict[str, Any]:
        losses = good(tasks)
        return {**losses, "a": losses["a"] * float("nan")} if rank == 1 else losses

    result = {"empty": _message(lambda: mt.step(lambda tasks: {})), "loss": _message(lambda: mt.step(nan))}
    result["tasks"] = _message(lambda: mt.step(good, tasks=TASKS[: 2 + rank]))
    mt.step(good)
    net, mt = make(on_nonfinite="skip")
    good = closure(net, data(rank, 4, "all"), count=False)
    info = mt.step(nan)
    result["skip"] = info.skipped, info.reason
    net, mt = make(seed=rank)
    good = closure(net, data(rank, 4, "all"), count=False)
    result["seed"] = _message(lambda: mt.step(good))
    net, mt = make(method="mgda" if rank and name == "pcgrad" else "uw" if rank else name)
    good = closure(net, data(rank, 4, "all"), count=False)
    result["method"] = _message(lambda: mt.step(good))
    for key, kind, more in (("lists", "toy", {"shard_gradients": True}), ("split lists", "split", {})):
        net = build(kind)
        options = {"method": "pcgrad", "process_group": group, **more}
        mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), lr=0.02), tasks=TASKS, **options)
        good = closure(net, data(rank, 4, "all"), count=False)
        result[key] = _message(lambda: mt.step([good] * (1 + rank)))  # noqa: B023 - called at once
    net, mt = make()
    x = data(rank, 4, "all")[0]
    features = x @ net.trunk[0].weight.detach().T
    result["unshared"] = _message(
        lambda: mt.step(lambda tasks: {t: (net.heads[t](features) - 1).square().mean() for t in TASKS[rank : rank + 2]})
    )
    return result


def overflow(rank: int, size: int, group: Any, name: str):
    """Rank 1's gradients overflow."""
    net = build("toy")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    mt = torchmto.MultiTask(
        net, torch.optim.SGD(net.parameters(), lr=0.02), tasks=TASKS, method=name, process_group=group, scaler=scaler
    )
    part = data(rank, 4, "all")

    def losses(tasks: tuple[str, ...]) -> dict[str, Any]:
        values = closure(net, part, count=False)(tasks)
        if rank == 1:
            values["a"] = (
                values["a"]
                + (net.trunk[0].weight * 1e-200).square().sum().sqrt() * 0
                + _Infinite.apply(net.trunk[0].weight)
            )
        return values

    return mt.step(losses).skipped, scaler.get_scale()


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return grad.new_full(ctx.shape, float("inf"))


def _fully_sharded(group: Any) -> nn.Module:
    net = Toy(TASKS)
    fully_shard(net.trunk[0], mesh=DeviceMesh.from_group(group, "cpu"))
    return fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))


def try_fsdp(rank: int, size: int, group: Any, table: Sequence[tuple[str, Mapping[str, Any]]]):
    """Which methods take a model sharded by FSDP2, and the messages of the others."""
    works, refused = [], {}
    net = _fully_sharded(group)
    for name, options in table:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        try:
            torchmto.MultiTask(net, optimizer, tasks=TASKS, method=method_of(name, options), process_group=group)
            works.append(name)
        except ValueError as error:
            refused[name] = str(error)
    return works, refused


def refuse_fsdp(rank: int, size: int, group: Any):
    """What else a sharded model can't do."""
    net = _fully_sharded(group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def make(method: Any = "pcgrad", **options: Any) -> torchmto.MultiTask:
        return torchmto.MultiTask(net, optimizer, tasks=TASKS, method=method, process_group=group, **options)

    part = data(rank, 4, "all")
    full = closure(net, part, count=False)

    def fewer(tasks: tuple[str, ...]) -> dict[str, Any]:
        losses = full(tasks)
        return {t: losses[t] for t in losses if t != "c" or rank == 0}

    def divided() -> None:
        other = _fully_sharded(group)
        made = torch.optim.SGD(other.parameters(), lr=0.1)
        mt = torchmto.MultiTask(other, made, tasks=TASKS, method="gd", process_group=group)
        other.set_gradient_divide_factor(3.0)
        mt.step(closure(other, part, count=False))

    return {
        "scaler": _message(lambda: make(scaler=torch.amp.GradScaler("cpu"))),
        "shard_gradients": _message(lambda: make(shard_gradients=True)),
        "reused weights": _message(lambda: make(torchmto.make_method("pcgrad", refresh_every=3))),
        "missing task": _message(lambda: make().step(fewer)),
        "divide factor": _message(divided),
    }


def _tcp_bytes_sent() -> int:
    """What the kernel has sent over this process' TCP connections, without what it sent again (``tcpi_bytes_sent``)."""
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        number = int(entry.name)
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = struct.unpack_from("2Q", info, 200)
                    total += sent - again
    return total


class Wide(Toy):
    """A trunk of 300 x 400 weights."""

    def __init__(self) -> None:
        super().__init__(TASKS)
        self.trunk = nn.Linear(300, 400)
        self.heads = nn.ModuleDict({task: nn.Linear(400, 1) for task in TASKS})


def _wide(group: Any, name: str, **more: Any):
    torch.manual_seed(0)
    net = Wide()
    torch.manual_seed(dist.get_rank(group))
    x = torch.randn(2, 300)
    options = {"groups": "per_task"} if name == "task_groups" else {}
    mt = torchmto.MultiTask(
        net,
        torch.optim.SGD(net.parameters(), lr=0.01),
        tasks=TASKS,
        method=method_of(name, options),
        process_group=group,
        **more,
    )

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return {task: out.square().mean() for task, out in net(x, tasks).items()}

    return mt, losses


def count_bytes(rank: int, size: int, group: Any, name: str, more: Mapping[str, Any]):
    """Bytes of one step, counted and on the wire, and the number of collectives."""
    mt, losses = _wide(group, name, **more)
    mt.step(losses)  # agrees on the roles
    ranks = mt.network.ranks
    numbers = []
    inner = ranks._count

    def count(tensor: Tensor, passes: int) -> None:
        numbers.append(passes)
        inner(tensor, passes)

    ranks._count = count
    dist.barrier(group=group)  # all have received what was sent to them, so it was sent
    counted, sent = ranks.bytes_sent, _tcp_bytes_sent()
    mt.step(losses)
    dist.barrier(group=group)
    return {"counted": ranks.bytes_sent - counted, "sent": _tcp_bytes_sent() - sent, "collectives": len(numbers)}


def trace_events(rank: int, size: int, group: Any, divided: bool) -> list[str]:
    """The order of backwards and of the rows' sums."""
    mt, losses = _wide(group, "pcgrad", shard_gradients=divided)
    mt.step(losses)
    events: list[str] = []

    ranks = mt.network.ranks
    name = "start_scatter" if divided else "start_sum"
    inner = getattr(ranks, name)

    def start(*tensors: Tensor) -> Any:
        large = tensors[-1].numel() > 100_000
        if large:
            events.append("start row")
        wait = inner(*tensors)

        def waited() -> None:
            events.append("wait")
            wait()

        return waited if large else wait

    setattr(ranks, name, start)

    def traced(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        values = losses(tasks)
        for value in values.values():
            value.register_hook(lambda grad: events.append("backward"))
        return values

    mt.step(traced)
    return events


def _wrapped(  # noqa: C901, PLR0915 - a branch per kind
    kind: str, group: Any
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model and an optimizer in what ``kind`` names, and further arguments of MultiTask."""
    net, options = Toy(TASKS), {}
    fsdp = functools.partial(FullyShardedDataParallel, process_group=group, device_id=torch.device("cpu"))
    ddp = functools.partial(DistributedDataParallel, process_group=group)
    model: nn.Module = net
    if kind in ("fsdp flat", "fsdp", "fsdp shared", "fsdp inside"):
        model = fsdp(net, use_orig_params=kind != "fsdp flat")
        options = {"shared": list(net.trunk.parameters())} if kind == "fsdp shared" else {}
        model = net if kind == "fsdp inside" else model
    elif kind == "fsdp trunk":
        net.trunk = fsdp(net.trunk, use_orig_params=True)
    elif kind == "static_graph trunk":
        net.trunk = ddp(net.trunk, static_graph=True)
    elif kind in ("static_graph", "static_graph compiled"):
        model = ddp(net, static_graph=True)
        model = torch.compile(model, backend="eager") if "compiled" in kind else model
    elif kind == "hook":
        model = ddp(net)
        model.register_comm_hook(None, default_hooks.allreduce_hook)
    elif kind == "mixed precision":
        model = ddp(net.float(), mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16))
    elif kind == "delayed":
        names = [name for name, _ in net.named_parameters()]
        model = ddp(
            net,
            delay_all_reduce_named_params=[(names[0], net.get_parameter(names[0]))],
            param_to_hook_all_reduce=net.get_parameter(names[1]),
        )
    elif kind == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["heads.a.weight"])
        model = ddp(net)
    elif kind == "replicate":
        model = replicate(net, process_group=group)
    elif kind == "tensor parallel":
        model = parallelize_module(net, DeviceMesh.from_group(group, "cpu"), {"trunk.0": ColwiseParallel()})
    elif kind == "deepspeed":
        engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
        model = engine()
        model.module = net
    elif kind == "unused":
        model = ddp(net, find_unused_parameters=True)
    elif kind == "bucket view":
        model = ddp(net, gradient_as_bucket_view=True)
    elif kind == "parts":
        net.trunk = ddp(net.trunk)
        net.heads = nn.ModuleDict({task: ddp(head) for task, head in net.heads.items()})
    elif kind == "of compiled":
        model = ddp(torch.compile(net, backend="aot_eager"))
    elif kind == "compiled":
        model = torch.compile(ddp(net), backend="aot_eager")
    elif kind == "parametrized":
        parametrize.register_parametrization(net.trunk[0], "weight", nn.Identity())
        model = ddp(net)
    elif kind == "zero":
        model = ddp(net)
        return (
            model,
            ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, process_group=group, lr=0.02),
            options,
        )
    return model, torch.optim.Adam(model.parameters(), lr=0.02, fused=kind == "fused"), options


def wrap(rank: int, size: int, group: Any, kinds: Sequence[str]):
    """What comes of building MultiTask for each kind of wrapper."""

    def built(kind: str) -> None:
        model, optimizer, options = _wrapped(kind, group)
        torchmto.MultiTask(model, optimizer, tasks=TASKS, method="gd", process_group=group, **options)

    return {kind: _message(lambda kind=kind: built(kind)) for kind in kinds}


def drive(rank: int, size: int, group: Any, kinds: Sequence[str], method: str):
    """The parameters after some steps with each kind of wrapper, and without one."""
    results = {}
    for kind in ("plain", *kinds):
        model, optimizer, options = _wrapped(kind, group)
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, process_group=group, **options)
        for step in range(3):
            x, y, _ = data(2 * step + rank, 4, "all")

            def losses(tasks, model=model, kind=kind, x=x, y=y):
                call = model
                if kind == "functional":
                    call = functools.partial(torch.func.functional_call, model, dict(model.named_parameters()))
                    outputs = call((x, tasks))
                else:
                    outputs = call(x, tasks)
                return {t: (outputs[t][:, 0] - y[:, TASKS.index(t)]).square().mean() for t in tasks}

            mt.step(losses)
        results[kind] = torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters(), key=_place)])
    return results


def ready(rank: int, size: int, group: Any, method: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters after steps on ready losses, of some tasks on some ranks; and after the user's own backward."""
    results = {}
    for kind in ("plain", "unused", "bucket view"):
        model, optimizer, _ = _wrapped(kind, group)
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, process_group=group, seed=0, **options)

        def losses(step, tasks, model=model):
            x, y, _ = data(2 * step + rank, 4, "all")
            outputs = model(x, tasks)
            return {t: (outputs[t][:, 0] - y[:, TASKS.index(t)]).square().mean() for t in tasks}

        for step in range(3):
            mt.step(losses(step, TASKS if rank + step < 2 else TASKS[:1]))
        for step in range(3, 5):
            mt.backward(losses(step, TASKS), final=step == 4)
        optimizer.step()
        if kind != "plain":
            optimizer.zero_grad()
            sum(losses(5, TASKS).values()).backward()
            results[f"{kind}, own"] = torch.cat([p.grad.flatten() for p in model.parameters()])
        results[kind] = flat(model)
    return results


def _place(pair: tuple[str, Tensor]) -> str:
    names = ("module.", "_orig_mod.", "parametrizations.", ".original")
    return functools.reduce(lambda name, part: name.replace(part, ""), names, pair[0])


def outside(rank: int, size: int, group: Any, method: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters after steps through a wrapper that MultiTask wasn't given; a rank lacks a task, or all of them."""
    results = {}
    for kind in ("given", "around", "around a part", "around, unused"):
        torch.manual_seed(0)
        model = Toy(TASKS, norm=nn.BatchNorm1d(5))
        net: nn.Module = model
        if kind == "around a part":
            net.trunk = DistributedDataParallel(trunk := model.trunk, process_group=group)
            model = nn.ModuleDict({"trunk": trunk, "heads": model.heads})
        else:
            net = DistributedDataParallel(model, process_group=group, find_unused_parameters=kind == "around, unused")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        mt = torchmto.MultiTask(
            net if kind == "given" else model, optimizer, tasks=TASKS, method=method, process_group=group, **options
        )
        for step in range(3):
            part = data(2 * step + rank, 4, "all")
            part[2][:, 1 + step % 2 :] = rank == 0
            part[2][:] &= (rank, step) != (1, 0)
            mt.step(closure(net, part, count=True))
        results[kind] = torch.cat([p.detach().flatten() for p in (*net.parameters(), *net.buffers())])
    return results


def late(rank: int, size: int, group: Any) -> dict[str, Any]:
    """What comes of wrappers that turn up after MultiTask is built, and how a step leaves one."""
    part = data(rank, 4, "all")

    def made(change: Any, **options: Any) -> str:
        net = Toy(TASKS)
        mt = torchmto.MultiTask(
            net, torch.optim.SGD(net.parameters(), lr=0.1), tasks=TASKS, method="gd", process_group=group
        )
        wrapper = DistributedDataParallel(net, **{"process_group": group, **options})
        for _ in range(2):
            mt.step(closure(wrapper, part, count=False))
            found.append((wrapper.require_forward_param_sync, wrapper.require_backward_grad_sync))
            change(wrapper)
        return "nothing"

    found: list[Any] = []
    own = dist.new_group(list(range(size)))
    return {
        "plain": _message(lambda: made(lambda wrapper: None)),
        "static": _message(lambda: made(lambda wrapper: None, static_graph=True)),
        "group": _message(lambda: made(lambda wrapper: None, process_group=own)),
        "hook": _message(lambda: made(lambda wrapper: wrapper.register_comm_hook(None, default_hooks.allreduce_hook))),
        "found": found,
    }


def join(rank: int, size: int, group: Any):
    """A step inside ``join()``."""
    model = DistributedDataParallel(Toy(TASKS), process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method="gd", process_group=group)
    with model.join(enable=False):
        model._join_config = model._join_config._replace(enable=True)
        return _message(lambda: mt.step(closure(model, data(rank, 4, "all"), count=False)))


def lose(rank: int, size: int, group: Any, place: int, after: bool) -> list[str]:
    """Rank 1's message number `place` of the second step fails, before or after it is sent."""
    own = dist.new_group(list(range(size)), timeout=timedelta(seconds=2))
    net = build("toy")
    mt = torchmto.MultiTask(
        net, torch.optim.SGD(net.parameters(), lr=0.02), tasks=TASKS, method="gd", process_group=own
    )
    good = closure(net, data(rank, 4, "all"), count=False)
    mt.step(good)
    before, number, original = flat(net), itertools.count(), dist.all_reduce

    def failing(*args: Any, **kwargs: Any) -> Any:
        here = rank == 1 and next(number) == place
        work = original(*args, **kwargs) if after or not here else None
        if here:
            raise MemoryError("no room")
        return work

    dist.all_reduce = failing
    ends = []
    try:
        for _ in range(2):
            try:
                mt.step(good)
                ends.append("done")
            except Exception as error:  # noqa: BLE001 - reported
                ends.append(f"{type(error).__name__}: {error}")
    finally:
        dist.all_reduce = original
        dist.destroy_process_group(own)
    return [*ends, str(torch.equal(before, flat(net)))]
