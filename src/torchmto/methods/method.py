"""What every method has: declared state, a random generator, declared properties, and one step."""

import contextlib
import copy
import functools
import inspect
import operator
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pprint import pformat
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchmto.checks import shown, warn
from torchmto.methods import hyper, states
from torchmto.methods.per_task import ByTask, PerTask, Primary, named
from torchmto.solvers.solution import Array, Solution
from torchmto.step import Losses, Network, StepContext, StepInfo, TaskGradients

Indices = Sequence[int]
"""Some of the tasks, by their numbers."""

SMALL = 100_000
"""Elements up to which a state tensor is copied at the start of a step, so that an error can undo its change."""


@dataclass(frozen=True)
class Properties:
    """What a method promises; the test battery checks it and the documentation prints it.

    Attributes:
        homogeneity: The degree d with A(s J) = s^d A(J) for s > 0 (for loss weightings: of the update when all losses are
            scaled by s); None if it isn't homogeneous.
        equivariant: Permuting the tasks permutes the weights (random methods: in distribution, so False).
        identity: With one task the update is that task's gradient, bit for bit.
        pareto: Whether it converges to the Pareto set on convex problems.
        nonconflicting: Whether the update never conflicts with a task's gradient.
        uses_losses: Whether a Gramian method also looks at the losses.
    """

    homogeneity: float | None = 1.0
    equivariant: bool = True
    identity: bool = True
    pareto: bool = True
    nonconflicting: bool = False
    uses_losses: bool = False


@dataclass(frozen=True)
class Domain:
    """What a method may be given; the documentation prints it, and the test battery tries it and what lies outside.

    A step with a loss outside is refused before anything has changed, as one with a loss that isn't finite. Gradients may
    be any finite ones (zero, colinear, opposed, of any lengths), and tasks any number, unless ``corners`` says otherwise.

    Attributes:
        above: What every loss must be larger than: "" for nothing, "0", or hyper-parameters of the method
            (see :meth:`Method.lower_bounds`).
        attained: Whether a loss may also equal it.
        corners: What happens at the edge, and where the method could stand still or explode.
    """

    above: str = ""
    attained: bool = False
    corners: str = ""

    @property
    def losses(self) -> str:
        """The losses in words.

        Example:
            >>> Domain("0").losses, Domain("`reference`", attained=True).losses
            ('positive losses', 'losses of at least `reference`')
        """
        if self.above == "0":
            return "non-negative losses" if self.attained else "positive losses"
        if self.above:
            return f"losses {'of at least' if self.attained else 'above'} {self.above}"
        return "any losses"


@dataclass(frozen=True)
class Cost:
    """Passes per step with K tasks, one micro-batch and shared norms.

    Attributes:
        num_forward: Calls of the closure.
        num_backward: Backward passes.
        num_optimizer_steps: Optimizer steps.
    """

    num_forward: int
    num_backward: int
    num_optimizer_steps: int = 1


class Method(ABC):
    """A rule that decides how K task losses update one model.

    State is declared with :meth:`add_state` and then lives in ordinary attributes; it is saved, loaded, moved and, after an
    error, put back without further code. Learnable loss scales and inner methods are states too: whatever has a
    ``state_dict``. Every random choice draws from :attr:`generator`.

    Hyper-parameters are declared in the body of the class, ``c: float = number(0.5, minimum=0)``: they are taken by name,
    checked, and become attributes. A subclass may as well have an ``__init__`` of its own.

    Args:
        **given: The hyper-parameters that aren't to be as they are by default.

    Raises:
        TypeError: If there is no such hyper-parameter, one is missing, or it is of another type.
        ValueError: If one is out of range.

    Attributes:
        name: The name it is registered under.
        family: "loss weighting", "gramian", "combiner" or "procedure".
        source: Where it comes from: authors, title, venue, year, equation; by default what the docstring says after "Source:".
        use: When to use it, in one sentence.
        norms: "shared", or "per task": what it is made for is a model with one copy of every norm for each task.
        adapts: Whether it adapts the size of every step itself, so that its optimizer had better be plain SGD.
        whole_rows: What it does with whole rows of gradients, if it does: then it can't work where every rank holds a part of
            the columns only (``network.divided``: by ``shard_gradients=True`` or because FSDP shards the parameters).
        tuning_space: What a search draws its hyper-parameters from: name -> ("log", low, high), ("linear", low, high) or
            ("choice", ...). Empty if there are none to choose, or none that depend on the data. Of declared hyper-parameters:
            their ``search``.
        takes_shares: Whether its :meth:`report` takes performances in [0, 1], higher being better.
        independent_batches: How many further batches (``mt.step(..., independent=)``) it uses at most.
        recorded: Numbers per task to record, [K]: the record's name -> the attribute's, dotted if need be.
        properties: What it promises.
        domain: Which losses it takes. Where a hyper-parameter decides, the object's own.
        needs_closure: Whether it runs the model more than once per step.
        needs_losses_after: Whether it needs the losses after the step.
        generator: The random generator, seed 0 at construction. That of a method inside this one has a seed derived from this
            one's (:func:`derived_seed`).
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    source: ClassVar[str] = ""
    use: ClassVar[str] = ""
    norms: ClassVar[Literal["shared", "per task"]] = "shared"
    adapts: ClassVar[bool] = False
    whole_rows: ClassVar[str] = ""
    tuning_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    takes_shares: ClassVar[bool] = False
    independent_batches: ClassVar[int] = 0
    recorded: ClassVar[Mapping[str, str]] = {}
    properties: ClassVar[Properties] = Properties()
    domain: Domain = Domain()
    needs_closure: bool = False
    needs_losses_after: bool = False
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cited = re.search(r"^ *Source: (.+?)(\n *\n|\Z)", cls.__doc__ or "", re.DOTALL | re.MULTILINE)
        if cited and "source" not in vars(cls):
            cls.source = " ".join(cited[1].split()).removesuffix(".")
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if owner is Method:
            known = states.declared(cls, hyper.HyperParameter).values()
            cls.__signature__ = inspect.Signature([parameter.as_parameter() for parameter in known])
            if "tuning_space" not in vars(cls):
                cls.tuning_space = {parameter.name: parameter.search for parameter in known if parameter.search}
        else:
            own = inspect.signature(vars(owner)["__init__"])
            cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])

    def __init__(self, **given: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self._states: list[str] = []
        self.tasks: tuple[str, ...] = ()
        self.num_tasks = 0
        for attribute, known in states.declared(type(self), hyper.HyperParameter).items():
            value = given.pop(known.name, known.default)
            if value is hyper.REQUIRED:
                raise TypeError(f"{type(self).__name__} needs the hyper-parameter `{known.name}`.")
            setattr(self, attribute, known.check(known.name, value))
        if given:
            raise TypeError(f"{type(self).__name__} has no hyper-parameter `{next(iter(given))}`.")
        self.__post_init__()

    def __post_init__(self) -> None:
        """What there is to do once the hyper-parameters have been checked one by one; overridden."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, for another process too: PyTorch can't send a generator to one that is spawned."""
        return {**vars(self), "generator": self.generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.generator = torch.Generator()
        self.generator.set_state(torch.frombuffer(bytearray(state["generator"]), dtype=torch.uint8))

    # ------------------------------------------------------------------ state

    def add_state(self, name: str, value: Any) -> None:
        """Declare the attribute ``name`` as state, with its initial value.

        Values are tensors, numbers, strings, None, lists, tuples and dicts of these, or objects with a ``state_dict``.
        Tensors with more than 100,000 elements must only be changed once the optimizer step has been taken (in ``after_step``,
        or a combiner's ``remember``), because they aren't copied to undo an error.
        """
        if name not in self._states:
            self._states.append(name)
        setattr(self, name, value)
        if isinstance(value, Method):
            value.seed(derived_seed(self.generator.initial_seed(), name))

    def setup(self, num_tasks: int) -> None:
        """Declare the states whose size depends on the number of tasks. Called once, before the first use.

        By default those in the class's body, ``first: Tensor = states.each(torch.nan)``; an override calls this for them.
        """
        for name, state in states.declared(type(self), states.State).items():
            self.add_state(name, state.first(self, num_tasks))

    def ensure_setup(self, num_tasks: int) -> None:
        """Call :meth:`setup` if it hasn't been called: for use without :class:`MultiTask`."""
        if self.num_tasks == 0:
            self.num_tasks = num_tasks
            self.setup(num_tasks)
        elif num_tasks > self.num_tasks:
            raise ValueError(f"Method `{self.name}` was set up for {self.num_tasks} tasks. Found {num_tasks}.")

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Tell the method, the methods inside it and its values per task the names of the tasks, once, before the first step.

        Raises:
            ValueError: If it is bound to other tasks already, or its hyper-parameters don't fit them.
        """
        if self.tasks and self.tasks != tasks:
            raise ValueError(f"Method `{self.name}` is already bound to the tasks {self.tasks}. Found {tasks}.")
        # What is inside first: where it doesn't fit the tasks, this method stays unbound.
        for value in vars(self).values():
            if isinstance(value, ByTask):
                value.bind(tasks)
        for inner in self._inner():
            inner.bind(tasks)
        self.tasks = tasks
        self.ensure_setup(len(tasks))
        for inner in self._inner():
            if inner.tasks != tasks:
                inner.bind(tasks)

    # An event reaches the methods inside by these defaults: what overrides one of them, and holds methods, calls super().

    def attach(self, network: Network) -> None:
        """Look at the network before the first step."""
        for inner in self._inner():
            inner.attach(network)

    def seed(self, seed: int) -> None:
        """Reseed every random choice, inner methods included, each with a seed of its own."""
        self.generator.manual_seed(seed)
        for state in self._states:
            value = getattr(self, state)
            if isinstance(value, Method):
                value.seed(derived_seed(seed, state))

    def generator_on(self, device: torch.device) -> torch.Generator:
        """:attr:`generator`; for another device than the CPU a new one there that it seeds."""
        if device.type == "cpu":
            return self.generator
        seed = int(torch.randint(2**62, (), generator=self.generator))
        return torch.Generator(device=device).manual_seed(seed)

    def settings(self) -> dict[str, str]:
        """The declared hyper-parameters that are plain values: name -> text that is the same in every process."""
        known = states.declared(type(self), hyper.HyperParameter)
        values = {parameter.name: getattr(self, attribute) for attribute, parameter in known.items()}
        values = {
            name: value.given if isinstance(value, PerTask | Primary) else value for name, value in values.items()
        }
        return {name: pformat(value) for name, value in values.items() if _is_plain(value)}

    def random_checksum(self) -> int:
        """A checksum of the random generators' states, inner methods included."""
        states = (part.generator.get_state().numpy().tobytes() for part in self.parts())
        return functools.reduce(lambda checksum, state: zlib.crc32(state, checksum), states, 0)

    def _inner(self) -> list["Method"]:
        """The methods inside this one."""
        values = (getattr(self, state) for state in self._states)
        return [value for value in values if isinstance(value, Method)]

    def label(self, index: int) -> str:
        """The name of a task; its number while no tasks are known."""
        return self.tasks[index] if self.tasks else str(index)

    def parts(self) -> Iterator["Method"]:
        """This method and all methods inside it."""
        yield self
        for inner in self._inner():
            yield from inner.parts()

    def lower_bounds(self, indices: Indices) -> Tensor:
        """What the losses of the tasks ``indices`` must exceed (or reach: ``domain.attained``), on the CPU, [k]."""
        return torch.zeros(len(indices), dtype=torch.float64)

    def outside(self, losses: Tensor, indices: Indices) -> str:
        """Why this method, or one inside it, can't take these losses; empty if it can.

        Args:
            losses: Losses of the present tasks, on the CPU, [k].
            indices: Which tasks they are.
        """
        if self.domain.above and len(losses):
            # In the losses' own precision, which the objective is computed in.
            bounds = self.lower_bounds(indices).to(losses)
            for index, loss, bound in zip(indices, losses.tolist(), bounds.tolist(), strict=True):
                if not (loss > bound or (self.domain.attained and loss == bound)):
                    needed = self.domain.losses if self.domain.above == "0" else f"{self.domain.losses} ({bound:g})"
                    return f"Method `{self.name}` needs {needed}. That of task `{self.label(index)}` is {loss:g}."
        reasons = (inner.outside(losses, indices) for inner in self._inner())
        return next((reason for reason in reasons if reason), "")

    def check_losses(self, losses: Tensor, indices: Indices | None = None) -> None:
        """For use without :class:`MultiTask`, whose steps check losses before they change anything.

        Raises:
            ValueError: If the losses are outside the method's domain.
        """
        reason = self.outside(losses.detach().cpu(), range(len(losses)) if indices is None else indices)
        if reason:
            raise ValueError(reason)

    def refusal(self, network: Network) -> str:
        """Why the method, or one inside it, can't work on a network; empty if it can."""
        if network.divided and self.whole_rows:
            return self.whole_rows
        return next((reason for reason in (value.refusal(network) for value in self._inner()) if reason), "")

    @property
    def one_by_one(self) -> bool:
        """Whether it asks the model for one task at a time, so that weightings see no other task's loss."""
        return False

    @property
    def repeats(self) -> bool:
        """Whether a step of this method, or of one inside it, runs the model more than once."""
        return any(part.needs_closure or part.needs_losses_after for part in self.parts())

    def state_dict(self) -> dict[str, Any]:
        """Everything the method knows, of types that ``torch.load(weights_only=True)`` reads."""
        return self.snapshot(small=False)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the names of the states differ, or which of them are methods.
        """
        expected = {"generator", *self._states}
        if set(state) != expected:
            raise ValueError(
                f"The state isn't one of method `{self.name}` with these hyper-parameters: it holds "
                f"{shown(sorted(state))}, expected {sorted(expected)}."
            )
        for name in self._states:
            inside = isinstance(getattr(self, name), Method)
            if inside != (isinstance(state[name], Mapping) and "generator" in state[name]):
                raise ValueError(
                    f"The state isn't one of method `{self.name}` with these hyper-parameters: `{name}` is "
                    f"{'a method here, and none there' if inside else 'a method there, and none here'}."
                )
        self.generator.set_state(state["generator"])
        for name in self._states:
            self._put(name, copied(state[name]))

    def _put(self, name: str, value: Any) -> None:
        """Give a state a new value, in its own memory where it has some."""
        current = getattr(self, name)
        if hasattr(current, "load_state_dict"):
            current.load_state_dict(value)
        elif isinstance(current, Tensor) and isinstance(value, Tensor) and current.shape == value.shape:
            with torch.no_grad():
                current.copy_(value)
        else:
            setattr(self, name, value)

    def snapshot(self, *, small: bool = True) -> dict[str, Any]:
        """Copies of the states, of the ``small`` ones only to undo a step that fails."""
        kept: dict[str, Any] = {"generator": self.generator.get_state()}
        for name in self._states:
            value = getattr(self, name)
            if isinstance(value, Method):
                kept[name] = value.snapshot() if small else value.state_dict()
            elif not (small and isinstance(value, Tensor) and value.numel() > SMALL):
                # An optimizer's state_dict holds its live tensors.
                kept[name] = copied(value.state_dict() if hasattr(value, "state_dict") else value)
        return kept

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Undo changes since :meth:`snapshot`."""
        for name, value in kept.items():
            current = getattr(self, name)
            if name == "generator":
                self.generator.set_state(value)
            elif isinstance(current, Method):
                current.restore(value)
            elif isinstance(current, Tensor) and isinstance(value, Tensor) and current.dtype != value.dtype:
                setattr(self, name, value)
            else:
                self._put(name, value)

    # ------------------------------------------------------------------ what a trainer tells the method

    @property
    def wants_shares(self) -> bool:
        """Whether this method, or one inside it, takes reported performances as shares in [0, 1] (dtp)."""
        return any(part.takes_shares for part in self.parts())

    def report(self, performance: Mapping[str, float]) -> None:
        """Validation results, one number per task (``mt.report``)."""
        for inner in self._inner():
            inner.report(performance)

    def end_window(self) -> None:
        """End of an averaging window, usually an epoch (``mt.end_window``)."""
        for inner in self._inner():
            inner.end_window()

    # ------------------------------------------------------------------ the step

    def cost(self, num_tasks: int) -> Cost:
        """Passes per step with ``num_tasks`` tasks, shared norms and one micro-batch."""
        return Cost(1, num_tasks, 1)

    def no_backward(self, num_sources: int) -> str:
        """Why ``mt.backward`` can't serve the method: it doesn't take one step from one pass. Empty if it does.

        Args:
            num_sources: How many independent batches there are.
        """
        after = any(part.needs_losses_after for part in self.parts())
        return "runs the model again after the step" if after else ""

    @abstractmethod
    def step(self, context: StepContext) -> StepInfo:
        """Take one step on ``context`` and report what was done."""

    def records(self) -> Mapping[str, Any]:
        """What to put into ``StepInfo.records``: what :attr:`recorded` names, as it is after the step."""
        held = self.recorded if self.num_tasks else {}
        return {key: named(self.tasks, operator.attrgetter(name)(self)) for key, name in held.items()}

    def after_step(self, losses: Losses, context: StepContext) -> None:
        """Update state once the step has been taken."""
        for inner in self._inner():
            inner.after_step(losses, context)


@contextlib.contextmanager
def as_before(parts: Sequence[Method]) -> Iterator[None]:
    """After an error inside, methods know what they knew before: of tasks that they were bound to nothing."""
    # The list is the one attribute that is changed in place.
    kept = [(part, {**vars(part), "_states": list(part._states)}) for part in parts]  # noqa: SLF001 - its own class's
    try:
        yield
    except BaseException:
        for part, before in kept:
            vars(part).clear()
            vars(part).update(before)
        raise


def derived_seed(seed: int, name: str) -> int:
    """The seed of the method called ``name`` inside, or beside, one with the seed ``seed``.

    With one seed for both their draws would be the same numbers.
    """
    return zlib.crc32(name.encode(), seed)


def _is_plain(value: object) -> bool:
    """Whether a value is made of numbers, texts and containers of these: it prints the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value, *value.values()]))
    return value is None or isinstance(value, int | float | str)


def copied(value: Any) -> Any:
    """A copy of a state: tensors cloned, containers copied. What ``copy.deepcopy`` does, several times as fast."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [copied(entry) for entry in value]
    return value if isinstance(value, str | int | float | None) else copy.deepcopy(value)


def clipped(weights: Tensor, gramian: Tensor, max_norm: float) -> Tensor:
    """The weights [k], made smaller where ``weights @ J`` is longer than ``max_norm``; G = J Jᵀ is [k, k].

    Example:
        >>> import torch
        >>> clipped(torch.tensor([1.0, 1.0]), torch.tensor([[9.0, 0.0], [0.0, 16.0]]), 1.0)
        tensor([0.2000, 0.2000])
    """
    lengths = gramian.diagonal().clamp_min(0).sqrt() * weights.abs()
    largest = lengths.max()
    if not bool(largest > 0):
        return weights
    # Squares of the weights or of G alone could overflow; the products of both can't.
    scaled = weights / largest
    norm = largest * (scaled @ (gramian @ scaled)).clamp_min(0).sqrt()
    return weights * (max_norm / norm).clamp_max(1) if bool(norm > 0) else weights


class LossWeighting(Method):
    """Base of the methods that only combine losses: one forward, one backward.

    A subclass implements :meth:`objective`. Its gradient with respect to the losses gives the weights; learnable
    parameters inside the objective are updated in :meth:`after_step`.

    Attributes:
        fixed: Whether the weights depend neither on the losses nor on which tasks are present, so that micro-batches can
            be done one after the other.
        separable: Whether no task's weight depends on another task's loss or presence, as where they are ``fixed``.
    """

    family = "loss weighting"
    fixed: ClassVar[bool] = False
    separable: ClassVar[bool] = False

    @abstractmethod
    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The scalar to minimise, a differentiable function of the losses. Must not change state, random draws apart.

        Args:
            losses: Losses of the present tasks, [k].
            indices: Which tasks they are, ascending; default the first k.
        """

    def present(self, losses: Tensor, indices: Indices | None = None) -> list[int]:
        """The tasks these losses belong to, for an :meth:`objective` that has state per task; sets it up if need be."""
        chosen = list(range(len(losses)) if indices is None else indices)
        self.ensure_setup(max(chosen) + 1)
        return chosen

    def loss_weights(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weights of the losses in the update, [k]: the gradient of the objective."""
        with torch.enable_grad():
            values = losses.detach().requires_grad_()
            objective: object = self.objective(values, indices)
            if not isinstance(objective, Tensor) or objective.ndim or not objective.requires_grad:
                raise ValueError(
                    f"Method `{self.name}`: `objective` should return a scalar tensor that depends on the losses it is given. "
                    f"Found {shown(objective)}."
                )
            (weights,) = torch.autograd.grad(objective, values)
        return weights

    def cost(self, num_tasks: int) -> Cost:
        """One forward and one backward, whatever the number of tasks."""
        return Cost(1, 1, 1)

    def step(self, context: StepContext) -> StepInfo:
        """Forward, one backward of the weighted losses, optimizer step, then the method's own update."""
        used: list[tuple[tuple[int, ...], Tensor]] = []

        def weigh(values: Tensor, indices: tuple[int, ...]) -> Tensor:
            used.append((indices, self.loss_weights(values, indices)))
            return used[-1][1]

        losses = context.backward(weigh, fixed=self.fixed)
        context.apply()
        self.after_step(losses, context)
        indices, weights = used[-1]
        if indices != losses.indices:
            weights = weights[[indices.index(index) for index in losses.indices]]
        return context.info(weights=weights, indices=losses.indices, records=self.records())


class GramianWeighting(Method):
    """Base of the methods whose weights are a function of the Gramian G = J Jᵀ: K backwards.

    A subclass implements :meth:`weights`, a plain function that can be called without a model. The update of the shared
    parameters is ``weights @ J``.

    Args:
        heads: "unit": a head gets its own task's gradient; "weighted": times the task's weight.
        refresh_every: Recompute the weights every n steps; the steps in between are one plain weighted backward, in which a
            head that a second task begins to use may still be taken for the first one's. A task that is absent then keeps the
            weight it has. With one that has none yet a batch recomputes them; so do all lists of micro-batches as long as a
            task has none.

    Attributes:
        head_weights: What the heads' gradients are multiplied with unless ``heads="unit"``, [k]; None for the weights.
        max_norm: The longest update of the shared parameters, :meth:`shortened` to that; 0 for no bound.
    """

    family = "gramian"
    heads: str = hyper.choice("unit", "weighted")
    refresh_every: int = hyper.integer(1, minimum=1)
    head_weights: Tensor | None = None
    max_norm: float = 0.0
    num_fallbacks = 0
    _precision: float | None = None
    _warned = False
    _age: int
    _kept_weights: dict[int, float]
    _unclipped: Tensor

    def __post_init__(self) -> None:
        """Steps that reuse weights need to know some."""
        if self.refresh_every > 1:
            self.add_state("_age", 0)
            self.add_state("_kept_weights", {})

    def refusal(self, network: Network) -> str:
        """Reused weights need gradients of heads alone, which FSDP doesn't compute."""
        if network.sharded and self.refresh_every > 1 and self.heads == "unit":
            return 'needs heads="weighted" to reuse its weights with sharded parameters'
        return super().refusal(network)

    @abstractmethod
    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The weight of every present task's gradient in the update.

        Args:
            gramian: G = J Jᵀ of the present tasks, [k, k]. Called by itself, the gradients count as precise as its type.
            losses: Their losses, [k].
            indices: Which tasks they are, ascending; default the first k.

        Returns:
            Weights [k], of the Gramian's dtype and device.
        """

    @property
    def only_weighs(self) -> bool:
        """Whether its weights are all that it does, so that another method may take them and leave the rest."""
        return True

    @staticmethod
    def as_array(tensor: Tensor) -> Array:
        """A tensor as the float64 array the solvers take."""
        array: Array = tensor.detach().to(device="cpu", dtype=torch.float64).numpy()
        return array

    def precision_of(self, gramian: Tensor) -> float:
        """The machine precision of the gradients behind ``gramian``: of this step's rows, or without a step of its type."""
        return torch.finfo(gramian.dtype).eps if self._precision is None else self._precision

    def solved(self, solver: Callable[..., Solution], gramian: Tensor, **options: Any) -> Tensor:
        """The weights, like ``gramian``, that a solver of :mod:`torchmto.solvers` finds for it, :meth:`accept`-ed."""
        return self.accept(solver(self.as_array(gramian), precision=self.precision_of(gramian), **options), gramian)

    def accept(self, solution: Solution, gramian: Tensor) -> Tensor:
        """A solver's weights as a tensor like ``gramian``; a solve that fell back is counted, and warned of once."""
        if not solution.converged:
            self.num_fallbacks += 1
            if not self._warned:
                self._warned = True
                warn(
                    f"Method `{self.name}`: a solve didn't converge (residual {solution.residual:.1e}); its documented "
                    "fallback is used. StepInfo.num_fallbacks counts these; this warning isn't repeated.",
                )
        return torch.from_numpy(solution.weights).to(gramian)

    def step_weights(self, context: StepContext, gradients: TaskGradients) -> Tensor:
        """The weights of this step's gradients; overridden by methods that look at more than their Gramian."""
        self._precision = gradients.precision
        try:
            return self.weights(gradients.gramian, gradients.losses, gradients.indices)
        finally:
            self._precision = None

    def descend(self, context: StepContext, gradients: TaskGradients) -> Tensor | None:
        """One optimizer step along the weighted sum of these gradients; returns the weights, if tasks have one each."""
        self.num_fallbacks = 0
        weights = self._combine(context, gradients)
        context.apply()
        self.after_step(gradients.reduced, context)
        return weights

    def _combine(self, context: StepContext, gradients: TaskGradients) -> Tensor | None:
        """Set the gradient of this step; returns the weights, if tasks have one each."""
        weights = self.step_weights(context, gradients)
        context.combine(gradients, weights, heads=self.heads, head_weights=self.head_weights)
        return weights

    def step(self, context: StepContext) -> StepInfo:
        """Per-task gradients, weights from their Gramian, one combined step."""
        if self.refresh_every > 1 and self._age % self.refresh_every:
            info = self._reuse(context)
            if info is not None:
                return info
        gradients = context.gradients()
        weights = self.descend(context, gradients)
        if self.refresh_every > 1 and weights is not None:
            new = dict(zip(gradients.indices, self.kept(weights).tolist(), strict=True))
            self._kept_weights = {**self._kept_weights, **new}
            self._age = 1
        return context.info(
            weights=weights,
            indices=gradients.indices,
            gradients=gradients,
            num_fallbacks=self.num_fallbacks,
            records=self.records(),
        )

    def _reuse(self, context: StepContext) -> StepInfo | None:
        """A step with the weights of earlier ones: a single backward. None if a task has no weight yet."""
        kept: dict[int, float] = self._kept_weights
        asked = {context.tasks.index(name) for name in context.asked}
        if not asked <= set(kept):
            present = context.present()
            if present is None or not present <= set(kept):
                return None

        def weigh(values: Tensor, indices: tuple[int, ...]) -> Tensor:
            return values.new_tensor([kept[i] for i in indices])

        losses = context.backward(weigh, fixed=True, heads=self.heads)
        factor = self.bound(context)
        context.apply()
        self._age += 1
        self.after_step(losses, context)
        return context.info(
            weights=weigh(losses.values, losses.indices) * factor, indices=losses.indices, records=self.records()
        )

    def shortened(self, weights: Tensor, gramian: Tensor) -> Tensor:
        """The weights of this step's gradients for weights [k] that may be too large."""
        self._unclipped = weights
        return clipped(weights, gramian, self.max_norm) if self.max_norm else weights

    def kept(self, weights: Tensor) -> Tensor:
        """What other steps take over of a step's weights: those from before they were :meth:`shortened` to its gradients."""
        return self._unclipped if self.max_norm else weights

    def bound(self, context: StepContext) -> float:
        """Shorten the gradient of a step that reuses weights; by which factor."""
        return context.bound(self.max_norm, heads=self.heads) if self.max_norm else 1.0


class GradientCombiner(Method):
    """Base of the methods that combine the rows of J entry by entry or layer by layer: K backwards.

    A subclass implements :meth:`combine`.

    Args:
        heads: "unit" or "weighted" (the latter for methods that have weights).

    Attributes:
        head_weights: What ``heads="weighted"`` multiplies the heads' gradients with, [k]; set by :meth:`combine`, None for 1.
    """

    family = "combiner"
    whole_rows = "combines the rows entry by entry or layer by layer, or tracks them"
    heads: str = hyper.choice("unit", "weighted")
    head_weights: Tensor | None = None
    num_fallbacks = 0

    @abstractmethod
    def combine(self, task_grads: Any) -> Tensor:
        """The combined gradient of the shared parameters.

        Args:
            task_grads: The rows (:class:`~torchmto.step.TaskGradients`): ``matrix`` [k, P], ``gramian``, ``losses``,
                ``indices`` and per-parameter views. Their gradients are finite. The matrix may be changed in place.

        Returns:
            A vector [P].
        """

    def remember(self, task_grads: Any) -> None:
        """Move states as large as the rows, once the step has been taken.

        Args:
            task_grads: The same object, as :meth:`combine` left it.
        """

    def _gradients(self, context: StepContext) -> TaskGradients:
        """What is combined in this step."""
        return context.gradients()

    def step(self, context: StepContext) -> StepInfo:
        """Per-task gradients, their combination, one step."""
        self.num_fallbacks = 0
        gradients = self._gradients(context)
        vector = self.combine(gradients)
        context.combine(gradients, self.head_weights, vector=vector, heads=self.heads)
        context.apply()
        self.remember(gradients)
        self.after_step(gradients.reduced, context)
        return context.info(gradients=gradients, num_fallbacks=self.num_fallbacks, records=self.records())


class Procedure(Method):
    """Base of the methods that take several forwards, backwards or optimizer steps per batch. They override ``step``."""

    family = "procedure"
    needs_closure = True

    def no_backward(self, num_sources: int) -> str:
        """Overridden by those that take one step from one pass."""
        return "takes several optimizer steps or forwards per batch"
