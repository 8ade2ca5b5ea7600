"""Drives `mt.step` and `mt.backward` with random small problems and looks for steps that are wrong, unclear or leave a trace.

    python benchmarks/fuzz_steps.py --steps 10000
    python benchmarks/fuzz_steps.py --seed 17          # replay one finding, with its traceback
    python benchmarks/fuzz_steps.py --lines wpcgrad    # an interrupt at every line of one step

A world is a model with its optimizers and its MultiTask, all drawn from a seed, and a list of actions: steps with partial
tasks, micro-batches, NaN, huge scales, closures that raise or return nonsense; an error or Ctrl-C at the n-th line of a step;
parameters that are frozen or added; saving and loading. What must hold after every action:

* a step that ends is finite, and equal to a hand-written one where that is easy (`gd`, `static`);
* one that raises says why (by a `raise` of torchmto, not by an error from below), and if no optimizer has begun its step,
  everything is as before;
* a twin without the actions that failed, and without saving and loading, ends with the same state to the bit;
* a Gramian method ends the same, up to rounding, whatever engine computes the Gramian.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import math
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchmto
from torchmto.step.finite import SkippedError

SOURCE = str(Path(torchmto.__file__).parent)
CLEAR = (ValueError, TypeError, torchmto.NonFiniteError)
"""What a step may raise of its own; NonFiniteError is one of its own kinds."""
INPUTS = 6


class BoomError(Exception):
    """What a closure, or a line of a step, raises here."""


class FindingError(AssertionError):
    """Something that must not happen."""


class PoisonedGradient(torch.autograd.Function):
    """The identity, whose gradient isn't finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(gradient, ctx.value), None


TRUNKS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(INPUTS, width),
    "mlp": lambda width: nn.Sequential(nn.Linear(INPUTS, 5), nn.ReLU(), nn.Linear(5, width)),
    "norm": lambda width: nn.Sequential(nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.Tanh()),
    "split norm": lambda width: torchmto.structure.split_norms(TRUNKS["norm"](width), ["a", "b", "c", "d"]),
    "dropout": lambda width: nn.Sequential(nn.Linear(INPUTS, width), nn.Dropout(0.3), nn.Tanh()),
    "convolution": lambda width: nn.Sequential(
        nn.Unflatten(1, (1, INPUTS)),
        nn.Conv1d(1, width, 3),
        nn.GroupNorm(1, width),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    ),
    "attention": lambda width: nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(INPUTS, width),
    ),
    "nothing": nn.Identity,
}


class Model(nn.Module):
    """A trunk, one head per task, and what else a model can have."""

    def __init__(self, draw: random.Random, tasks: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        trunk = draw.choice(list(TRUNKS))
        width = INPUTS if trunk == "nothing" else draw.choice((1, 3, 4))
        self.trunk = TRUNKS[trunk](width)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})
        self.extras = {
            name for name in ("complex", "empty", "unused", "tied", "mixed", "lonely") if draw.random() < 0.15
        }
        if "complex" in self.extras:
            self.complex = nn.Parameter(torch.randn(width, dtype=torch.complex64))
        if "empty" in self.extras:
            self.empty = nn.Parameter(torch.zeros(0, 3))
        if "unused" in self.extras:
            self.unused = nn.Parameter(torch.ones(2))
        if "tied" in self.extras and len(tasks) > 1:
            self.heads[tasks[1]].weight = self.heads[tasks[0]].weight
        self.to(dtype)
        if "complex" in self.extras:
            self.complex.data = self.complex.data.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        if "mixed" in self.extras:
            self.heads.to(torch.float32)
        if draw.random() < 0.2:
            draw.choice(list(self.parameters())).requires_grad_(False)

    def forward(self, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        features = self.trunk(x)
        if "complex" in self.extras:
            features = torch.view_as_real(features * self.complex).sum(-1)
        if "empty" in self.extras:
            features = features + self.empty.sum()
        outputs = {}
        for i, task in enumerate(tasks):
            head = self.heads[task]
            lonely = "lonely" in self.extras and i == 0
            outputs[task] = head((x if lonely and head.in_features == INPUTS else features).to(head.weight.dtype))
        return outputs


@dataclass(frozen=True)
class Action:
    """One thing that is done to a world.

    Attributes:
        kind: "step", "backward", "keep" (a micro-batch of an accumulated batch), or a change between steps.
        seed: Of the data and the noise.
        asked: The argument `tasks`; None for all.
        present: The tasks with labels.
        sizes: The sizes of the micro-batches.
        counted: Whether losses come with counts.
        ready: Whether losses come ready, not in a closure.
        independent: Further mini-batches.
        scale: A factor of all losses.
        fault: What is wrong with the closure; "" for nothing.
        line: At which line of the step an error is raised; 0 for none.
        interrupt: Whether that is Ctrl-C.
    """

    kind: str
    seed: int
    asked: tuple[str, ...] | None = None
    present: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (4,)
    counted: bool = False
    ready: bool = False
    independent: int = 0
    scale: float = 1.0
    fault: str = ""
    line: int = 0
    interrupt: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.fault and not self.line and abs(math.log10(self.scale)) < 3


RAISED: dict[str, BaseException] = {"raises": BoomError(), "interrupted": KeyboardInterrupt(), "exits": SystemExit(3)}
FAULTS = (
    "nan loss", "inf loss", "nan gradient", "inf gradient", "raises", "interrupted", "exits", "vector", "no graph",
    "unknown task", "not a tensor", "none", "list", "negative count", "nan count", "empty", "backward inside", "in no_grad",
    "integer", "same loss twice", "half loss", "zero loss",
)  # fmt: skip


def draw_action(draw: random.Random, tasks: tuple[str, ...]) -> Action:
    """One action."""

    def some() -> tuple[str, ...]:
        return tuple(task for task in tasks if draw.random() < 0.7) or tasks[:1]

    kind = draw.choices(
        ("step", "backward", "keep", "freeze", "group", "rate", "reload", "report", "end_window", "option"),
        (60, 15, 8, 3, 2, 3, 4, 2, 3, 2),
    )[0]
    return Action(
        kind,
        draw.randrange(2**31),
        asked=some() if draw.random() < 0.15 else None,
        present=some() if draw.random() < 0.25 else tasks,
        sizes=tuple(draw.choice((2, 3, 4)) for _ in range(draw.choice((1, 1, 1, 2, 3)))),
        counted=draw.random() < 0.2,
        ready=draw.random() < 0.1,
        independent=draw.choice((0, 0, 0, 0, 0, 1, 2)),
        scale=10.0 ** draw.choice((-30, -8, 8, 30)) if draw.random() < 0.15 else 1.0,
        fault=draw.choice(FAULTS) if draw.random() < 0.3 else "",
        line=int(10 ** draw.uniform(0, 3.3)) if draw.random() < 0.3 else 0,
        interrupt=draw.random() < 0.5,
    )


class World:
    """A model, its optimizers and its MultiTask, all drawn from a seed.

    Args:
        seed: Of everything.
        method: The method's name, in place of a drawn one.
        engine: The engine, in place of a drawn one.
    """

    def __init__(self, seed: int, method: str | None = None, engine: str | None = None) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.seed, self.name, self.engine = seed, method or draw.choice(torchmto.methods()), engine
        self.tasks = ("a", "b", "c", "d")[: draw.choice((1, 2, 2, 3, 3, 4))]
        self.dtype = draw.choices((torch.float64, torch.float32, torch.bfloat16), (6, 3, 1))[0]
        self.model = Model(draw, self.tasks, self.dtype)
        chosen = draw.choice(("parameters", "layerwise", "auto", "auto", "representation"))
        self.engine = engine or chosen
        kinds: tuple[Callable[[Any], torch.optim.Optimizer], ...] = (
            lambda p: torch.optim.SGD(p, lr=0.05),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            lambda p: torch.optim.Adam(p, lr=0.01),
            lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        )
        make, two, groups = draw.choice(kinds), draw.random() < 0.15, draw.random() < 0.2
        trunk = list(self.model.trunk.parameters())
        inside = {id(p) for p in trunk}
        others = [p for p in self.model.parameters() if id(p) not in inside]
        if two and trunk:
            self.optimizers = [make(trunk), make(others)]
        else:
            self.optimizers = [make([{"params": trunk}, {"params": others}] if groups else self.model.parameters())]
        self.begun = 0
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self._begin)
        options: dict[str, Any] = {
            "on_nonfinite": draw.choice(("raise", "raise", "skip")),
            "clip": draw.choice((None, None, 0.5)),
            "same_noise": draw.random() < 0.2,
            "seed": draw.choice((None, 0, 7)),
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0) if draw.random() < 0.15 else None,
            "weights": draw.choice((None, None, None, {"a": 0.5}, "uw", "si", "rlw")),
            "shared": self.model.trunk.parameters() if trunk and draw.random() < 0.1 else None,
        }
        arguments = {}
        if self.name in ("constant", "static"):
            arguments["weights"] = [1.0 + i for i in range(len(self.tasks))]
        self.options = options
        self.mt = torchmto.MultiTask(
            self.model,
            self.optimizers,
            tasks=self.tasks,
            method=torchmto.make_method(self.name, **arguments),
            gradients=self.engine,
            features=self.model.trunk if self.engine == "representation" else None,
            **options,
        )
        self.further = max(part.independent_batches for part in self.mt.method.parts())
        self.groups = 0
        self.log: list[str] = []

    def _begin(self, *_: Any) -> None:
        self.begun += 1

    def __str__(self) -> str:
        extras = ", ".join(sorted(self.model.extras))
        return (
            f"{self.name}, {self.engine}, {len(self.tasks)} tasks, {type(self.model.trunk).__name__} {extras}, {self.dtype}, "
            f"{[type(o).__name__ for o in self.optimizers]}, {self.options}"
        )

    # ------------------------------------------------------------------ what is done

    def data(self, action: Action) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of an action."""
        generator = torch.Generator().manual_seed(action.seed)
        for size in action.sizes * (1 + min(action.independent, self.further)):
            x = torch.randn(size, INPUTS, generator=generator, dtype=torch.float64)
            yield x.to(self.dtype), torch.randn(size, 1, generator=generator, dtype=torch.float64)

    def closure(self, action: Action, x: Tensor, y: Tensor) -> Callable[..., Any]:
        """The closure of one micro-batch."""

        def closure(tasks: tuple[str, ...]) -> Any:
            present = tuple(task for task in tasks if task in action.present)
            outputs = self.model(x, present)
            losses: dict[str, Any] = {
                task: action.scale * (output - (1 + i) * y.to(output)).square().mean()
                for i, (task, output) in enumerate(outputs.items())
            }
            if action.counted:
                losses = {task: (loss, len(x) + i) for i, (task, loss) in enumerate(losses.items())}
            return self._spoil(action.fault, losses, tasks) if action.fault else losses

        return closure

    def _spoil(self, fault: str, losses: dict[str, Any], tasks: tuple[str, ...]) -> Any:
        """What a broken closure returns, or raises."""
        if not losses:
            return losses
        last = list(losses)[-1]
        loss = losses[last][0] if isinstance(losses[last], tuple) else losses[last]
        if fault in RAISED:
            torch.rand(3)
            raise RAISED[fault]
        if fault == "backward inside" and loss.requires_grad:
            loss.backward(retain_graph=True)
        whole: Any = {
            "none": None,
            "list": list(losses.values()),
            "empty": {},
            "unknown task": {**losses, "zzz": loss},
            "in no_grad": {task: (v[0] if isinstance(v, tuple) else v).detach() for task, v in losses.items()},
            "same loss twice": dict.fromkeys(losses, loss),
            "backward inside": losses,
        }
        if fault in whole:
            return whole[fault]
        spoilt: Any = {
            "nan loss": lambda: loss * math.nan,
            "inf loss": lambda: loss * math.inf,
            "nan gradient": lambda: PoisonedGradient.apply(loss, math.nan),
            "inf gradient": lambda: PoisonedGradient.apply(loss, math.inf),
            "vector": lambda: loss.expand(2),
            "no graph": loss.detach,
            "not a tensor": lambda: 1.5,
            "negative count": lambda: (loss, -1),
            "nan count": lambda: (loss, math.nan),
            "integer": lambda: torch.tensor(3),
            "half loss": loss.half,
            "zero loss": lambda: loss * 0,
        }[fault]()
        return {**losses, last: spoilt}

    def do(self, action: Action, line: int | None = None) -> Any:
        """Do it; errors go through. `line` overrides the line that raises."""
        draw = random.Random(action.seed)
        torch.manual_seed(action.seed % 1000)
        self.begun = 0
        mt = self.mt
        match action.kind:
            case "freeze":
                parameter = draw.choice(list(self.model.parameters()))
                parameter.requires_grad_(not parameter.requires_grad)
            case "group":
                self.groups += 1
                self.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=self.dtype))]})
            case "rate":
                self.optimizers[0].param_groups[0]["lr"] *= 0.5
            case "report":
                mt.report({task: draw.random() for task in self.tasks})
            case "end_window":
                mt.end_window()
            case "option":
                mt.on_nonfinite = draw.choice(("raise", "skip"))
            case "reload":
                self.reload()
            case _:
                return self._step(action, action.line if line is None else line)
        return None

    def _step(self, action: Action, line: int) -> Any:
        closures: list[Any] = [self.closure(action, x, y) for x, y in self.data(action)]
        if action.ready and not list(self.model.buffers()):
            closures = [closure(action.asked or self.tasks) for closure in closures]
        size = len(action.sizes)
        batches = [closures[i : i + size] for i in range(0, len(closures), size)]
        first = batches[0] if size > 1 else batches[0][0]
        options = {"tasks": action.asked, "independent": batches[1:]}
        raised = KeyboardInterrupt() if action.interrupt else BoomError()
        with self._around(), raising_at(line, raised) if line else contextlib.nullcontext():
            if action.kind == "step":
                return self.mt.step(first, **options)
            info = self.mt.backward(first, **options, final=action.kind == "backward")
        if action.kind == "backward" and self.mt.network.scaler is None and not info.skipped:
            for optimizer in self.optimizers:
                optimizer.step()
        return info

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        """In every fourth world a mode of the caller, which a step must neither mind nor change."""
        if self.seed % 4:
            yield
            return
        with torch.device("meta"):
            try:
                yield
            finally:
                if torch.empty(0).device.type != "meta":
                    raise FindingError("The caller's default device is lost")
        if torch.empty(0).device.type == "meta":
            raise FindingError("A default device is left")

    def reload(self) -> None:
        """Save everything, and load it into a world made anew."""
        saved = io.BytesIO()
        scaler = self.mt.network.scaler
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "mt": self.mt.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            },
            saved,
        )
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        fresh = World(self.seed, self.name, self.engine)
        fresh.model.load_state_dict(state["model"])
        for mine, its in zip(self.model.parameters(), fresh.model.parameters(), strict=True):
            its.requires_grad_(mine.requires_grad)
        for group in self.optimizers[0].param_groups[len(self.optimizers[0].param_groups) - self.groups :]:
            fresh.optimizers[0].add_param_group({"params": [nn.Parameter(p.detach().clone()) for p in group["params"]]})
        fresh.mt.load_state_dict(state["mt"])
        for optimizer, its in zip(fresh.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        if scaler is not None:
            fresh.mt.network.scaler.load_state_dict(state["scaler"])
        fresh.mt.on_nonfinite = self.mt.on_nonfinite
        log, groups = self.log, self.groups
        self.__dict__.update(fresh.__dict__)
        for optimizer in self.optimizers:
            optimizer._optimizer_step_pre_hooks.clear()
            optimizer.register_step_pre_hook(self._begin)
        self.log, self.groups = log, groups

    # ------------------------------------------------------------------ what must hold

    def state(self) -> dict[str, Any]:
        """A copy of all that a failed step must leave as it was."""
        scaler = self.mt.network.scaler
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "trained": [p.requires_grad for p in self.model.parameters()],
                "training": [module.training for module in self.model.modules()],
                "hooks": [
                    len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.model.modules()
                ],
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "mt": self.mt.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "modes": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()),
            }
        )

    def by_hand(self, action: Action) -> list[Tensor] | None:
        """The parameters after a hand-written step; None where none is easy."""
        easy = (
            self.name in ("gd", "static")
            and action.kind == "step"
            and action.plain
            and not action.independent
            and self.mt.network.scaler is None
            and not isinstance(self.mt.weights, torchmto.LossWeighting)
            and not any(word in str(self.model) for word in ("Dropout(p=0.3", "TaskNorm", "Split"))
        )
        if not easy:
            return None
        other = World(self.seed, self.name, self.engine)
        other.model, other.optimizers = copy.deepcopy((self.model, self.optimizers))
        asked = action.asked or self.tasks
        sums, counts = Counter[str](), Counter[str]()
        for x, y in other.data(action):
            for task, loss in other.closure(action, x, y)(tuple(t for t in self.tasks if t in asked)).items():
                value, count = loss if isinstance(loss, tuple) else (loss, 1)
                sums[task], counts[task] = sums[task] + count * value, counts[task] + count  # type: ignore[assignment]
        factors = self.mt.weights if isinstance(self.mt.weights, Mapping) else {}
        of = {task: (1.0 + i if self.name == "static" else 1.0) for i, task in enumerate(self.tasks)}
        total: Any = sum(of[task] * factors.get(task, 1.0) * sums[task] / counts[task] for task in sums)
        for optimizer in other.optimizers:
            optimizer.zero_grad()
        if not isinstance(total, Tensor) or not total.requires_grad:
            return None
        total.backward()
        if self.mt.clip is not None:
            nn.utils.clip_grad_norm_(
                [p for o in other.optimizers for g in o.param_groups for p in g["params"]], self.mt.clip
            )
        for optimizer in other.optimizers:
            optimizer.step()
        return list(other.model.parameters())


@contextlib.contextmanager
def raising_at(line: int, error: BaseException) -> Iterator[list[int]]:
    """Raise `error` at the n-th line that runs in torchmto; gives a list whose one entry counts the lines."""
    count = [0]

    def local(frame: Any, event: str, argument: Any) -> Any:
        # What is raised while another error is being handled is a second failure, which isn't promised anything.
        if event == "line" and isinstance(sys.exception(), SkippedError | None):
            count[0] += 1
            if count[0] == line:
                raise error
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename.startswith(SOURCE) else None)
    try:
        yield count
    finally:
        sys.settrace(before)


def differs(a: Any, b: Any, at: str = "") -> str:
    """Where two nested states differ by a bit; "" if nowhere."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return "" if alike and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) else at
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{at}: {set(a) ^ set(b)}"
        return next((where for key in a if (where := differs(a[key], b[key], f"{at}.{key}"))), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{at}: lengths"
        return next(
            (where for i, pair in enumerate(zip(a, b, strict=True)) if (where := differs(*pair, f"{at}.{i}"))), ""
        )
    return "" if a == b or str(a) == str(b) == "nan" else f"{at}: {a!r} != {b!r}"


def is_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def attempt(world: World, action: Action) -> tuple[BaseException | None, bool]:
    """Do an action, and check what must hold after it; returns its error, and whether an optimizer had begun by then."""
    before, finite = world.state(), is_finite(world.model)
    by_hand = world.by_hand(action)
    try:
        info = world.do(action)
    except BaseException as error:  # noqa: BLE001  which of them are right is checked
        return error, check_error(world, error, before)
    if finite and not is_finite(world.model):
        raise FindingError("A step that ended has left parameters that aren't finite.")
    if by_hand is not None and not info.skipped:
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(world.dtype, 0.1)
        tolerance = tolerance if "mixed" not in world.model.extras else max(tolerance, 1e-4)
        for got, right in zip(world.model.parameters(), by_hand, strict=True):
            if not torch.allclose(got, right, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise FindingError(f"Not the hand-written step: {(got - right).abs().max():.2g} away.")
    return None, False


def check_error(world: World, error: BaseException, before: dict[str, Any]) -> bool:
    """Check that an error is clear and has left no trace; returns whether an optimizer had begun before it."""
    if not isinstance(error, BoomError | KeyboardInterrupt | SystemExit):
        message = str(error)
        if not isinstance(error, CLEAR) or not from_us(error) or not 0 < len(message) < 1000:
            raise FindingError(f"An unclear error: {error!r}") from error
    if world.begun:
        World(world.seed, world.name, world.engine).mt.load_state_dict(world.mt.state_dict())
        return True
    where = differs(before, world.state())
    if where:
        raise FindingError(f"{error!r} has left a trace: {where}") from error
    return False


def from_us(error: BaseException) -> bool:
    """Whether a `raise` of torchmto has raised it, not Python or PyTorch below."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(SOURCE) and (last.line or "").startswith("raise")


def live(seed: int, length: int, method: str | None = None) -> tuple[int, Counter[str]]:
    """One world with its twin; returns how many steps were taken, and how they ended.

    Raises:
        FindingError: If something is wrong.
    """
    ends: Counter[str] = Counter()
    try:
        world = World(seed, method)
    except CLEAR:
        return 0, Counter({"refused": 1})
    draw = random.Random(seed + 1)
    actions = [draw_action(draw, world.tasks) for _ in range(length)]
    done: list[Action | None] = []
    comparable = True
    for action in actions:
        world.log.append(str(action))
        error, begun = attempt(world, action)
        plain = action.kind == "step" and action.plain and not action.independent
        ends["error" if error is not None else "done"] += 1
        if plain:
            ends["plain steps refused" if error is not None else "plain steps taken"] += 1
        if begun:
            comparable = False
            break
        failed = error is not None
        if failed and world.mt._carried is not None:
            continue  # interrupted before the step began: it has lost nothing
        done.append((None if action.kind in ("step", "backward", "keep") else action) if failed else action)
        if action.kind in ("step", "backward", "keep"):
            ends["steps"] += 1
    if comparable:
        twin = World(seed, method)
        repeat(twin, done)
        where = differs(twin.state(), world.state())
        if where:
            raise FindingError(f"A twin without what failed differs: {where}")
        compare_engines(seed, method, world, done)
    return ends["steps"], ends


def repeat(twin: World, done: list[Action | None]) -> None:
    """Do again what was done without an error, and without saving and loading."""
    for action in done:
        if action is None or action.kind == "reload":
            # An error, and loading, drop what was kept of a batch.
            twin.mt.load_state_dict(twin.mt.state_dict())
        else:
            twin.do(replace(action, line=0))


def compare_engines(seed: int, method: str | None, world: World, done: list[Action | None]) -> None:
    """The same actions by the engine that keeps the rows."""
    exact = world.engine in ("auto", "layerwise") and world.dtype == torch.float64 and "mixed" not in world.model.extras
    plain = all(action.plain for action in done if action and action.kind in ("step", "backward", "keep"))
    if not exact or not plain or not isinstance(world.mt.method, torchmto.GramianWeighting) or len(done) > 4:
        return
    rows = World(seed, method, "parameters")
    repeat(rows, done)
    for got, right in zip(world.model.parameters(), rows.model.parameters(), strict=True):
        if not torch.allclose(got, right, rtol=1e-4, atol=1e-5):
            raise FindingError(f"{world.engine} and the rows differ by {(got - right).abs().max():.2g}.")


def every_line(method: str, seed: int = 0, stride: int = 1) -> int:
    """An interrupt at every line of the second of three steps; the third must be what it would have been. Returns the lines."""
    tasks = ("a", "b", "c")
    action = Action("step", 5, present=tasks, interrupt=True)

    def world() -> World:
        made = World(seed, method, "auto")
        made.do(replace(action, seed=3))
        return made

    calm = world()
    before = calm.state()
    with raising_at(-1, BoomError()) as count:
        calm.do(action, line=0)
    after = calm.state()
    calm.do(replace(action, seed=6))
    for line in range(1, count[0] + 200, stride):
        hit = world()
        try:
            hit.do(action, line=line)
        except KeyboardInterrupt:
            if hit.begun:
                hit.mt.load_state_dict(hit.mt.state_dict())
                if hit.name != "m_config":
                    hit.do(replace(action, seed=6))
                continue
            where = differs(before, hit.state())
            if where:
                raise FindingError(f"{method}: an interrupt at line {line} has left a trace: {where}") from None
            hit.do(action, line=0)
        else:
            break
        where = differs(after, hit.state())
        if where:
            raise FindingError(f"{method}: after an interrupt at line {line} the step differs: {where}")
    return line


def run(
    seeds: Iterator[int], *, steps: int = 0, seconds: float = math.inf, length: int = 8
) -> tuple[Counter[str], list[str]]:
    """Worlds one after the other until there were enough steps, or time is over; returns counts and findings."""
    ends: Counter[str] = Counter()
    findings = []
    end = time.monotonic() + seconds
    names = torchmto.methods()
    for seed in seeds:
        if (steps and ends["steps"] >= steps) or time.monotonic() > end:
            break
        try:
            _, more = live(seed, length, names[seed % len(names)])
            ends += more
        except Exception as error:  # noqa: BLE001  all are findings
            findings.append(f"--seed {seed} ({names[seed % len(names)]}): {type(error).__name__}: {error}")
        ends["worlds"] += 1
    if ends["plain steps refused"] > ends["plain steps taken"]:
        findings.append(f"Most plain steps are refused: {dict(ends)}")
    return ends, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=8, help="actions per world")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument(
        "--lines", metavar="METHOD", help="an interrupt at every line of one step; `all` for every method"
    )
    parser.add_argument("--stride", type=int, default=1, help="with --lines: every n-th line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.lines:
        failed = 0
        for name in torchmto.methods() if arguments.lines == "all" else [arguments.lines]:
            try:
                print(f"{name}: {every_line(name, stride=arguments.stride)} lines", flush=True)
            except Exception as error:  # noqa: BLE001  all are findings
                failed += 1
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                if arguments.lines != "all":
                    traceback.print_exc()
        return int(failed > 0)
    if arguments.seed is not None:
        names = torchmto.methods()
        method = names[arguments.seed % len(names)]
        with contextlib.suppress(*CLEAR):
            print(World(arguments.seed, method))
        attempted = functools.partial(live, arguments.seed, arguments.length, method)
        original = World.do

        def loud(self: World, action: Action, line: int | None = None) -> Any:
            print(action)
            return original(self, action, line)

        World.do = loud  # type: ignore[method-assign]
        attempted()
        return 0
    ends, findings = run(iter(range(arguments.start, sys.maxsize)), steps=arguments.steps, length=arguments.length)
    print(*findings, sep="\n")
    print(f"{dict(ends)}; {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
