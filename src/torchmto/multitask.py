"""The user's handle: drives a model and its optimizer with a multi-task method."""

import contextlib
import inspect
import operator
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchmto.checks import check_choice, check_number, check_tasks, found, nearest, shown, unknown_task, warn
from torchmto.gradients.choice import Auto
from torchmto.gradients.engine import Engine
from torchmto.gradients.layerwise import Layerwise
from torchmto.gradients.ranks import Ranks
from torchmto.gradients.representation import Representation
from torchmto.gradients.torch_private import compiled_inside, keep_buffers, may_compile
from torchmto.methods import GramianWeighting, LossWeighting, Method, make_method
from torchmto.methods.method import as_before, derived_seed
from torchmto.step import Network, StepContext, StepInfo
from torchmto.step.finite import SkippedError
from torchmto.step.losses import Source, Weigh, needs_closure
from torchmto.step.messages import EndedTogether, RankFailedError, meet, tell
from torchmto.step.parts import Carried, Parts
from torchmto.step.surroundings import Surroundings
from torchmto.step.wrappers import replicas, take_over
from torchmto.task_norms import OWN, activate

STATE_VERSION = 1

_DRIVEN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers of a first step: the gradients that are there afterwards are a step's own."""

_STEPPED_ON: weakref.WeakKeyDictionary[Method, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""The model that a method has taken a step on."""

ENGINES = ("auto", "parameters", "layerwise", "representation")


def _engine(name: str, features: str | nn.Module | None, model: nn.Module, ranks: Ranks) -> Engine | None:
    """The engine called ``name``; None for the one that keeps the rows."""
    if name != "representation":
        if features is not None:
            raise ValueError(f'Parameter `features` belongs to gradients="representation". Found gradients="{name}".')
        return Layerwise(ranks) if name == "layerwise" else Auto() if name == "auto" else None
    if isinstance(features, str):
        try:
            features = model.get_submodule(features)
        except AttributeError as error:
            known = [path for path, _ in model.named_modules()]
            raise ValueError(
                found("features", "a module or the name of one in the model", features) + nearest(features, known)
            ) from error
    if not isinstance(features, nn.Module):
        raise TypeError(found("features", 'a module (or its name) for gradients="representation"', features))
    return Representation(features)


def _check_parts(model: object, optimizers: Sequence[object], scaler: object, seed: object) -> None:
    """Raise if a part isn't what it should be, or an optimizer can't be driven."""
    if not isinstance(model, nn.Module):
        raise TypeError(found("model", "a torch.nn.Module", type(model)))
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(found("optimizer", "a torch.optim.Optimizer, or a sequence of them", type(optimizer)))
        _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
        if any(
            argument.default is argument.empty and argument.kind < argument.VAR_POSITIONAL for argument in arguments
        ):
            name = type(optimizer).__name__
            raise ValueError(
                f"Parameter `optimizer` should be one whose `step()` needs no closure. Found {name}, which evaluates the loss "
                "several times per step, and a multi-task step has gradients instead of one loss."
            )
    if not optimizers:
        raise ValueError(found("optimizer", "at least one torch.optim.Optimizer", list(optimizers)))
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(found("scaler", "a torch.amp.GradScaler", scaler))
    if seed is not None:
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(found("seed", "an int", seed))
        if not -(2**63) <= operator.index(seed) < 2**64:
            raise ValueError(found("seed", "an int of 64 bits", seed))


class MultiTask:
    """Decides, at every step, how K task losses update one model.

    Args:
        model: Any module; nothing is subclassed. It, or parts of it, may be in ``DistributedDataParallel``.
        optimizer: An ordinary optimizer, or several with different parameters, which step one after the other. Their parameters
            that require a gradient are trained, and no others get a gradient.
            Schedulers, hooks and parameter groups keep working. One that needs a closure (LBFGS) is refused.
        tasks: The names of the tasks.
        method: A method's name, or a method from :func:`torchmto.make_method`.
        shared: The shared parameters. Default: found by walking the autograd graph of the losses; a parameter is shared
            once a second task has reached it, as all do where the tasks' outputs lie in one tensor.
        weights: Factors of the losses before any method sees them: task -> float (missing ones are 1), or a loss weighting
            (a name or a method), whose weights are then used; "si" gives the gradients of the log-losses, which some code
            calls the LOG variant of a method.
        scaler: A ``torch.amp.GradScaler``. Gradients are unscaled before they are combined.
        clip: Largest global norm of the gradient over all parameters, after combining, per optimizer step.
        seed: Reseeds the method's random generator; those of methods inside it and of ``weights`` get seeds derived from it.
        process_group: The processes that train together; default the default group if ``torch.distributed`` is initialised.
        on_nonfinite: "raise": a NaN or infinite loss or gradient, or a loss outside the method's domain, raises
            :class:`~torchmto.NonFiniteError`; "skip": the step is left
            out and ``StepInfo.skipped`` says so. Either way model, optimizer and method are as before. With a
            scaler, non-finite gradients skip the step and lower the scale.
        same_noise: Give all forwards of one batch the same random state.
        shard_gradients: Divide the columns of the K x P gradient matrix among the N ranks, each of which then holds K x P/N of
            them. The update is the same. Refused for methods that need whole rows.
        gradients: How Gramian methods get their Gramian. "auto": exactly, by what a rule over the graph's shapes and K says is
            cheapest, the rows of "parameters", or a mix: rows for some parameters, and for layers with few samples only what
            combines their gradients, which are never formed; ``StepInfo.engine`` says which. Rows wherever else could cost
            memory or surprise: several micro-batches, ready losses, several ranks, hooks on activations or parameters,
            checkpointing, nested tensors. "parameters": from the K x P matrix of the tasks' gradients, which is kept.
            "layerwise": the same Gramian, segment by segment of the graph, never holding more than one segment's K gradients,
            then one weighted backward: a backward more, much less memory (all micro-batches' graphs are kept, though). That
            backward gives the weighted sum of the gradients only as far as it is linear: what a function's own backward
            adds (an auxiliary loss), or a hook clamps, it does once, with weight 1. "representation": an
            approximation, from the gradients with respect to the output of ``features``: K backwards through the heads and
            one through the trunk; one micro-batch, one process. "layerwise" and "representation" are for
            Gramian methods.
        features: For "representation": the module, or its name in the model, whose output all tasks share.
        stacked: The closure itself runs several tasks through task-specific norms (:func:`torchmto.structure.stacked`), so
            it may be asked for several tasks at once. Otherwise a model with split norms is run once per task.

    Raises:
        TypeError: If an argument has the wrong type, or the method has no such hyper-parameter.
        ValueError: If an argument's value makes no sense, or a wrapper around the model can't be driven.

    Example:
        >>> import torch, torchmto
        >>> _ = torch.manual_seed(0)
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleDict({"a": torch.nn.Linear(8, 1), "b": torch.nn.Linear(8, 1)})
        >>> model = torch.nn.ModuleDict({"trunk": trunk, "heads": heads})
        >>> mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="pcgrad")
        >>> x, y = torch.randn(16, 4), torch.randn(16, 1)
        >>> info = mt.step(lambda tasks: {t: (heads[t](trunk(x)) - y).square().mean() for t in tasks})
        >>> (info.num_forward, info.num_backward, info.num_optimizer_steps)
        (1, 2, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        tasks: Iterable[str],
        method: str | Method,
        shared: Iterable[Tensor] | None = None,
        weights: Mapping[str, float] | str | LossWeighting | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip: float | None = None,
        seed: int | None = None,
        process_group: Any = None,
        on_nonfinite: str = "raise",
        same_noise: bool = False,
        shard_gradients: bool = False,
        stacked: bool = False,
        gradients: str = "auto",
        features: str | nn.Module | None = None,
    ) -> None:
        optimizers: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        _check_parts(model, optimizers, scaler, seed)
        self.tasks = check_tasks(tasks)
        self._clip = None if clip is None else check_number("clip", clip, above=0)
        self.on_nonfinite = check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
        self.same_noise = bool(same_noise)
        if isinstance(method, str):
            method = make_method(method)
        if not isinstance(method, Method):
            raise TypeError(found("method", "a method's name or a torchmto method", method))
        self._method = method
        self._weights = self._check_weights(weights)
        weighting = [self.weights] if isinstance(self.weights, LossWeighting) else []
        self._methods: tuple[Method, ...] = (method, *weighting)
        self._weighing = self._weigh()
        parts = [part for whole in self._methods for part in whole.parts()]
        twice = next((part for i, part in enumerate(parts) if any(part is other for other in parts[:i])), None)
        if twice is not None:
            raise ValueError(f"Method `{twice.name}` is used in two places. Each needs an object of its own.")
        if process_group is None:
            process_group = next((replica.process_group for replica in replicas(model)), None)
        ranks = Ranks(process_group)
        self.network = Network(
            model,
            optimizers,
            num_tasks=len(self.tasks),
            shared=shared,
            scaler=scaler,
            clip=self._clip,
            ranks=ranks,
            stacked=bool(stacked),
            shard_gradients=bool(shard_gradients),
            engine=_engine(check_choice("gradients", gradients, ENGINES), features, model, ranks),
            sparse=isinstance(method, LossWeighting),
        )
        self._met = False
        self._told = (0, 0)
        self._stepping = False
        self._driven = False
        self._carried: dict[int, Carried] | None = None
        self._carried_tasks: tuple[str, ...] = ()
        self._check_engine()
        self._check_methods()
        with contextlib.ExitStack() as stack:
            Surroundings().keep_out(stack)
            stack.enter_context(as_before(parts))
            for part in self._methods:
                part.bind(self.tasks)
                part.attach(self.network)
            self._every = tuple(part for whole in self._methods for part in whole.parts())
            self._warn_of_another_model(self._every)
        if seed is not None:
            method.seed(seed)
        if isinstance(self.weights, LossWeighting):
            # Unless it was given a seed by hand.
            first = method.generator.initial_seed()
            if seed is not None or self.weights.generator.initial_seed() == first:
                self.weights.seed(derived_seed(first, "weights"))
        bounded = any(part.domain.above or type(part).outside is not Method.outside for part in self._every)
        self._outside = [part.outside for part in self._methods] if bounded else []

    @property
    def method(self) -> Method:
        """The method, for as long as this object lives: another one needs another ``MultiTask``."""
        return self._method

    @property
    def weights(self) -> dict[str, float] | LossWeighting | None:
        """The loss weights, a mapping of all tasks whose numbers may be changed between steps, or a loss weighting."""
        return self._weights

    @property
    def clip(self) -> float | None:
        """The largest norm of the gradient, for as long as this object lives."""
        return self._clip

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy.

        Raises:
            RuntimeError: In the middle of an accumulated batch, whose gradients belong to the original's parameters.
        """
        if self.accumulating:
            raise RuntimeError(
                "A MultiTask can't be copied in the middle of an accumulated batch. Call `mt.backward(losses)` for the last "
                "micro-batch first."
            )
        return {**self.__dict__, "_stepping": False}

    def _check_engine(self) -> None:
        """Raise if the engine without rows can't serve the method or the network."""
        engine, name = self.network.engine, self._method.name
        if engine is None:
            return
        reason = ""
        if not isinstance(self._method, GramianWeighting):
            reason = f"method `{name}` isn't a function of the Gramian (see `torchmto methods`: family gramian)"
        elif self.network.sharded:
            reason = "sharded parameters (FSDP) are summed within each backward, which goes through the whole graph"
        elif self.network.shard_gradients:
            reason = "shard_gradients=True divides the matrix, which this engine doesn't keep"
        elif self.network.split and not engine.adds:
            reason = "task-specific norms run one forward per task, so the tasks have no features in common"
        elif self.network.ranks.size > 1 and not engine.adds:
            reason = "it works on one process"
        if engine.optional:
            if reason or any(part.refusal(self.network) for part in self._methods):
                self.network.engine = None
        elif reason:
            raise ValueError(f'gradients="{engine.name}" can\'t be used here: {reason}. Use gradients="parameters".')

    def _check_methods(self) -> None:
        """Raise if a method can't work on the network, or brings gradients that the optimizer can't take."""
        network = self.network
        for part in self._methods:
            reason = part.refusal(network)
            if reason:
                where = "sharded parameters" if network.sharded else "shard_gradients=True"
                where = where if network.engine is None else f'gradients="{network.engine.name}"'
                raise ValueError(f"Method `{part.name}` doesn't work with {where}: it {reason}.")
        weights = self.weights
        if isinstance(weights, LossWeighting) and not self._weighing[2] and self._method.one_by_one:
            warn(
                f"Method `{self._method.name}` runs one task at a time, where weighting `{weights.name}` can't weigh it "
                "against the others: that has no effect there. Weights by task have: `weights={'task': 0.5}`."
            )
        if not network.sparse and any(isinstance(o, torch.optim.SparseAdam) for o in network.optimizers.all):
            raise ValueError(
                "SparseAdam takes sparse gradients only. They stay sparse for loss weightings on one process; method "
                f"`{self._method.name}` on {network.ranks.size} makes them dense. Use SGD or Adagrad, say, or sparse=False."
            )

    def _check_weights(
        self, weights: Mapping[str, float] | str | LossWeighting | None
    ) -> dict[str, float] | LossWeighting | None:
        if weights is None or isinstance(weights, LossWeighting):
            return weights
        if isinstance(weights, str):
            made = make_method(weights)
            if not isinstance(made, LossWeighting):
                raise ValueError(found("weights", "a loss weighting", weights))
            return made
        if not isinstance(weights, Mapping):
            raise TypeError(found("weights", "a mapping of task names to floats, or a loss weighting", weights))
        for name, value in weights.items():
            if name not in self.tasks:
                raise ValueError(unknown_task(name, self.tasks, "in `weights`"))
            check_number(f"weights[{name!r}]", value, minimum=0)
        return {name: float(weights.get(name, 1.0)) for name in self.tasks}

    def _weigh(self) -> tuple[Weigh | None, bool, bool]:
        """The user's loss weights as a function, whether they are fixed, and whether a task's depends on it alone."""
        if self.weights is None:
            return None, True, True
        if isinstance(self.weights, LossWeighting):
            return self.weights.loss_weights, self.weights.fixed, self.weights.fixed or self.weights.separable
        return self._factors, True, True

    def _factors(self, values: Tensor, indices: tuple[int, ...]) -> Tensor:
        # Read at every step: they are the user's to change.
        assert isinstance(self.weights, dict)
        names = [self.tasks[i] for i in indices]
        return values.new_tensor([check_number(f"weights[{n!r}]", self.weights.get(n), minimum=0) for n in names])

    # ------------------------------------------------------------------ the step

    def step(
        self,
        losses: Source | Sequence[Source],
        *,
        tasks: Iterable[str] | None = None,
        independent: Sequence[Source | Sequence[Source]] = (),
    ) -> StepInfo:
        """Take one step on one batch.

        Gradients that are set already are dropped: add a term to the losses instead of calling its ``backward()`` before.
        ``.grad`` may lie in memory that the next step writes over: an optimizer or a hook that keeps it has to clone it.

        Args:
            losses: A forward-only closure ``closure(tasks) -> {task: loss}``; or ready losses, for methods that need one
                forward; or a list of either: micro-batches of one step. A loss may be ``(loss, count)``. Tasks without
                labels in this batch are left out.
            tasks: The tasks this step is about; default all.
            independent: Further mini-batches drawn independently (same forms), for the methods that use them.

        Returns:
            What was done.

        Raises:
            ValueError: If a loss is unknown, not scalar or without graph, the batch is empty, the method combines gradients and
                the tasks share no parameter, the model hides parameters from the graph, the method needs a closure, or there
                are more ``independent`` batches than it uses.
            NonFiniteError: If a loss or a gradient isn't finite, or a loss lies outside the method's domain (see its page),
                under ``on_nonfinite="raise"``.
        """
        self._carried = None
        return self._run(self._take, losses, tasks, independent)

    def backward(
        self,
        losses: Source | Sequence[Source],
        *,
        tasks: Iterable[str] | None = None,
        independent: Sequence[Source | Sequence[Source]] = (),
        final: bool = True,
    ) -> StepInfo:
        """Fill ``.grad`` of every trained parameter with what :meth:`step` would hand to the optimizer, and take no step.

        For trainers that own the step, in place of ``loss.backward()``. Gradients that are there are replaced; ``clip`` is left
        to the trainer. ``.grad`` may lie in memory that the next call writes over: clone what you keep. With ``scaler`` the
        gradient stays times its scale, and one that isn't finite stays in ``.grad``: then
        ``scaler.step`` leaves the step out. What the method learns, it learns here.

        Args:
            losses: As in :meth:`step`.
            tasks: As in :meth:`step`.
            independent: As in :meth:`step`.
            final: Whether this is the whole batch, or the last micro-batch of one that is accumulated over several calls. With
                False the tasks' gradients of this micro-batch are kept, K backwards, and nothing is set; the call with True
                combines those of all. A loss weighting whose weights don't depend on these losses keeps their weighted sum, one
                backward. An error, :meth:`step`, :meth:`zero_grad` or :meth:`load_state_dict` drops what is kept.

        Returns:
            What was done, with 0 optimizer steps; of a micro-batch that isn't the last, its losses.

        Raises:
            ValueError: As in :meth:`step`; and for a method that takes several optimizer steps or forwards per batch, or steps
                itself.
            NonFiniteError: As in :meth:`step`.

        Example:
            >>> import torch, torchmto
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> mt = torchmto.MultiTask(model, optimizer, tasks=["a", "b"], method="pcgrad")
            >>> info = mt.backward(lambda tasks: dict(zip("ab", model(torch.ones(2)).square())))
            >>> optimizer.step()
        """
        carried, self._carried = self._carried, None
        if final:
            return self._run(self._take, losses, tasks, independent, stepping=False, carried=carried)
        carried = {} if carried is None else carried
        info = self._run(self._keep, losses, tasks, independent, stepping=False, carried=carried)
        self._carried = carried
        return info

    @property
    def accumulating(self) -> bool:
        """Whether a call of :meth:`backward` that wasn't ``final`` has kept something for the next one."""
        return self._carried is not None

    def zero_grad(self) -> None:
        """Drop every gradient, and what calls of :meth:`backward` that weren't ``final`` have kept."""
        self._carried = None
        self.network.zero_grad()

    def _check_backward(self, num_sources: int, *, accumulated: bool) -> None:
        """Raise if a method, or an engine, can't do with one backward and no step."""
        for part in self._methods:
            reason = part.no_backward(num_sources)
            if reason:
                raise ValueError(
                    f"Method `{part.name}` {reason}, so mt.backward can't serve it: call mt.step(closure)."
                )
        engine = self.network.engine
        if accumulated and (self.network.shard_gradients or (engine is not None and engine.name == "representation")):
            raise ValueError(
                "A batch that is accumulated over several calls needs whole rows: neither shard_gradients=True nor "
                'gradients="representation".'
            )

    def _check_carried(
        self, carried: Mapping[int, Carried], asked: tuple[str, ...], num_independent: int, *, gone: bool
    ) -> None:
        """Raise if a call doesn't go on with the batch that earlier calls have begun."""
        if asked != self._carried_tasks:
            raise ValueError(
                "Parameter `tasks` should be the same in all calls for an accumulated batch. Found "
                f"{list(asked)} after {list(self._carried_tasks)}: leave tasks without labels out of what the "
                "closure returns instead."
            )
        if num_independent < max(carried):
            raise ValueError(
                f"Parameter `independent` should hold a part of each of the {max(carried)} independent batches that earlier "
                f"calls for an accumulated batch have begun. Found {num_independent}."
            )
        if gone:
            raise ValueError(
                "Parameters were replaced, or left the optimizer, between two calls for an accumulated batch, whose gradients "
                "so far are those of the former ones. Do so between batches."
            )

    @property
    def _summed(self) -> bool:
        """Whether accumulated batches are kept as a weighted sum: no weights depend on the losses."""
        fixed = self.weights is None or not isinstance(self.weights, LossWeighting) or self.weights.fixed
        return fixed and isinstance(self._method, LossWeighting) and self._method.fixed

    def _run(
        self,
        work: Callable[[StepContext], StepInfo],
        losses: Source | Sequence[Source],
        tasks: Iterable[str] | None,
        independent: Sequence[Any],
        *,
        stepping: bool = True,
        carried: dict[int, Carried] | None = None,
    ) -> StepInfo:
        """Do the work of one call. An error ends it on all ranks, and before the first optimizer step undoes everything."""
        network = self.network
        ranks, grad, active = network.ranks, torch.is_grad_enabled(), OWN.tasks
        if ranks.lost or self._stepping or not self._met:
            self._prepare()
        try:
            self._stepping = True
            first = not self._driven
            parts = self._begin(losses, tasks, independent, stepping=stepping, carried=carried)
            context = StepContext(parts)
            network.mark()
            self._kept = [(part, part.snapshot()) for part in self._methods]
            around = contextlib.ExitStack()
            try:
                if network.untold:
                    network.tell_trained()
                with around:
                    if not parts.surroundings.neutral:
                        parts.surroundings.keep_out(around)
                    if network.replicas or network.shards:
                        take_over(network.replicas, network.shards, around)
                    if first or network.compiled or may_compile():
                        keep_buffers(around)
                    return work(context)
            except BaseException as error:
                # An interrupt on the way into or out of a `with` has lost its end.
                around.close()
                if context.num_optimizer_steps == 0:
                    self._undo(keep_buffers=False)
                if isinstance(error, RuntimeError):
                    network.check_trained(error)
                raise
        except EndedTogether as ended:
            raise ended.error from None
        except BaseException as error:
            torch.set_grad_enabled(grad)
            activate(active)
            tell(ranks, len(self.tasks), network.device, error)
            raise
        finally:
            self._stepping = False

    def _prepare(self) -> None:
        """Before the first step, or one that can't be taken now."""
        if self.network.ranks.lost:
            raise RankFailedError(
                "A message between the ranks has failed before, and nobody knows which one the others wait for now. Start the "
                "processes again, from a checkpoint."
            )
        # An interrupt may have kept the last step from saying that it has ended.
        outer = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code is MultiTask._run.__code__)
        if self._stepping and sum(frame.f_locals["self"] is self for frame in outer) > 1:
            raise RuntimeError(
                "mt.step was called inside its own step, by the closure or a hook. A closure runs forwards and returns losses."
            )
        if not self._met:
            # Before anything is told: messages of ranks with different tasks don't fit.
            meet(self.network, self._settings())
            self._met = True

    def _settings(self) -> dict[str, str]:
        """What every rank has to be built with, in words -> as text; what may change is looked at in every step."""
        network = self.network
        engine = None if network.engine is None else network.engine.name
        given = {"clip": self.clip, "on_nonfinite": self.on_nonfinite, "same_noise": self.same_noise}
        given |= {"gradients": engine, "shard_gradients": network.shard_gradients}
        settings = {"tasks": str(self.tasks)} | {f"`{name}`": str(value) for name, value in given.items()}
        for part in self._every:
            settings |= {f"`{name}` of method `{part.name}`": text for name, text in part.settings().items()}
        return settings

    def _undo(self, *, keep_buffers: bool) -> None:
        self.network.undo(keep_buffers=keep_buffers)
        for part, kept in self._kept:
            part.restore(kept)

    def _take(self, context: StepContext) -> StepInfo:
        """The method's step on a whole batch, or on the last part of one that is accumulated."""
        try:
            info = self._method.step(context)
            context.check_present()
            if context.skipped and context.num_optimizer_steps == 0:
                self._undo(keep_buffers=context.overflowed)
            elif isinstance(self._weights, LossWeighting):
                self._weights.after_step(context.unweighted(), context)
                info = context.recounted(info)
        except SkippedError as skipped:
            if context.num_optimizer_steps == 0:
                self._undo(keep_buffers=skipped.overflow)
            if skipped.overflow and not context.stepping:
                self.network.set_infinite()
            context.note_skip(skipped.reason)
            return context.info()
        return info

    def _keep(self, context: StepContext) -> StepInfo:
        """One micro-batch of a batch that is accumulated, which isn't the last."""
        context.keep(self._method.loss_weights if isinstance(self._method, LossWeighting) else None)
        self._carried_tasks = context.asked
        return context.info()

    def _begin(
        self,
        losses: Source | Sequence[Source],
        tasks: Iterable[str] | None,
        independent: Sequence[Any],
        *,
        stepping: bool,
        carried: dict[int, Carried] | None,
    ) -> Parts:
        """Check the arguments of a step."""
        asked = self.tasks
        if tasks is not None:
            given = check_tasks(list(tasks) if isinstance(tasks, set | frozenset) else tasks)
            unknown = [name for name in given if name not in self.tasks]
            if unknown:
                raise ValueError(unknown_task(unknown[0], self.tasks))
            asked = tuple(name for name in self.tasks if name in given)
        sources = [self._micro_batches("losses", losses)]
        if not isinstance(independent, list | tuple):
            raise TypeError(found("independent", "a sequence of closures", independent))
        sources += [self._micro_batches("independent", entry) for entry in independent]
        ready = [id(entry) for source in sources for entry in source if isinstance(entry, Mapping)]
        if len(set(ready)) < len(ready):
            raise ValueError(
                "Every micro-batch should have losses of its own, since a backward uses up their graph. Found the same ready "
                "losses twice."
            )
        if independent:
            most = max(part.independent_batches for part in self._every)
            if len(independent) > most:
                uses = f"at most {most} batches, which is what method `{self._method.name}` uses"
                raise ValueError(f"Parameter `independent` should hold {uses}. Found {len(independent)}.")
        if not stepping:
            self._check_backward(len(sources), accumulated=carried is not None)
        network = self.network
        gone = network.refresh()
        if carried:
            self._check_carried(carried, asked, len(independent), gone=gone)
        if not self._driven:
            self._warn_of_gradients()
            self._driven = True
            model = weakref.ref(compiled_inside(network.model))
            _STEPPED_ON.update(dict.fromkeys(self._every, model))
        about = ""
        if network.ranks.size > 1:
            states = [f"{part.name} with random state {part.random_checksum():08x}" for part in self._methods]
            if isinstance(self.weights, dict):
                states.append(f"weights {[*map(float, self.weights.values())]}")
            about = f"of {', '.join(asked)} on {len(sources)} batches with {network.fingerprint}, {', '.join(states)}"
            about = f"{about}, told {self._told[0]} times ({self._told[1]:08x})"
        weigh, weigh_fixed, weigh_apart = self._weighing
        return Parts(
            self.tasks,
            on_nonfinite=self.on_nonfinite,
            weigh=weigh,
            weigh_fixed=weigh_fixed,
            weigh_apart=weigh_apart,
            outside=self._outside,
            repeats=any(part.needs_closure or part.needs_losses_after for part in self._every),
            same_noise=self.same_noise,
            network=network,
            sources=sources,
            asked=asked,
            about=about,
            stepping=stepping,
            carried=carried,
            summed=carried is not None and self._summed,
            several=network.ranks.size > 1,
        )

    def _warn_of_another_model(self, parts: Sequence[Method]) -> None:
        """What a method has learnt on one model goes on with the next."""
        model = compiled_inside(self.network.model)
        for part in parts:
            # Without states of its own there is nothing beside the random generator.
            if part in _STEPPED_ON and _STEPPED_ON[part]() is not model and len(part.state_dict()) > 1:
                warn(
                    f"Method `{part.name}` has taken steps on another model, and goes on with what it learnt there. Give every "
                    "model (of a fold, of a seed) a method of its own."
                )
                break

    def _warn_of_gradients(self) -> None:
        """Before an optimizer's first step: gradients that are there were set by somebody else."""
        network = self.network
        if all(optimizer in _DRIVEN for optimizer in network.optimizers.all):
            return
        _DRIVEN.update(network.optimizers.all)
        given = [network.name(parameter) for parameter in network.parameters if parameter.grad is not None]
        if given:
            warn(
                f"Parameter `{given[0]}` has a gradient already ({len(given)} in all). mt.step drops it: it sets all gradients "
                "itself. Add such a term to the losses; `optimizer.zero_grad()` before the first step ends this warning.",
            )

    def _micro_batches(self, name: str, value: Any) -> list[Source]:
        entries = list(value) if isinstance(value, list | tuple) else [value]
        if not entries:
            raise ValueError(f"Parameter `{name}` should hold at least one closure. Found an empty list.")
        for entry in entries:
            if isinstance(entry, Mapping):
                repeats = next((part for part in self._methods if part.repeats), None)
                if repeats is not None:
                    raise needs_closure(f"Method `{repeats.name}`")
            elif not callable(entry):
                raise TypeError(
                    "mt.step takes a closure, a mapping of losses, or a list of these. "
                    f"Found {type(entry).__name__}: a single loss can't say which task it belongs to."
                )
        return entries

    # ------------------------------------------------------------------ what a trainer tells the method

    @property
    def wants_shares(self) -> bool:
        """Whether :meth:`report` should be given shares in [0, 1], higher being better (dtp), and not plain metrics."""
        return any(part.wants_shares for part in self._methods)

    def report(self, performance: Mapping[str, float]) -> None:
        """Tell the method validation results: task -> performance. Used by dtp and wpcgrad with priority="performance".

        Raises:
            ValueError: If a task is unknown or a value isn't finite.
        """
        if not isinstance(performance, Mapping):
            raise TypeError(found("performance", "a mapping of task names to floats", performance))
        values: dict[str, float] = {}
        for name, value in performance.items():
            if name not in self.tasks:
                raise ValueError(unknown_task(name, self.tasks, "in the report"))
            number: Any = value
            if hasattr(value, "item"):
                # Metrics often are tensors or numpy scalars; what holds several values isn't one.
                with contextlib.suppress(RuntimeError, ValueError):
                    number = value.item()
            values[name] = check_number(f"performance[{name!r}]", number)
        with self._restoring():
            for part in self._methods:
                part.report(values)
        self._note("report", sorted(values.items()))

    def end_window(self) -> None:
        """Tell the method that an averaging window (usually an epoch) has ended. Used by dwa and wpcgrad."""
        with self._restoring():
            for part in self._methods:
                part.end_window()
        self._note("end_window")

    def _note(self, call: str, told: object = None) -> None:
        """Count the calls that methods hear between steps, and what they say: on another rank it can't be anything else."""
        if call == "load_state_dict" or any(getattr(type(p), call) is not getattr(Method, call) for p in self._every):
            number, checksum = self._told
            self._told = number + 1, zlib.crc32(repr((call, told)).encode(), checksum)

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        """After an error, put the methods' states back."""
        kept = [(part, part.snapshot()) for part in self._methods]
        try:
            yield
        except BaseException:
            for part, before in kept:
                part.restore(before)
            raise

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything the step knows beyond model, optimizer and scaler; loads with ``torch.load(weights_only=True)``."""
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "tasks": list(self.tasks),
            "method": self._method.name,
            "method_state": self._method.state_dict(),
            "roles": self.network.roles.state_dict(),
        }
        if isinstance(self.weights, LossWeighting):
            state["weights"] = self.weights.name
            state["weights_state"] = self.weights.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Everything is checked before anything changes.

        Raises:
            ValueError: If the state belongs to other tasks, another method or another version, or its shared parameters
                contradict ``shared``.
        """
        if not isinstance(state, Mapping):
            raise TypeError(found("state", "what `mt.state_dict()` returned", type(state)))
        weights = self.weights.name if isinstance(self.weights, LossWeighting) else None
        expected = {
            "version": STATE_VERSION,
            "tasks": list(self.tasks),
            "method": self._method.name,
            "weights": weights,
        }
        for key, value in expected.items():
            # By what they look like: whether a tensor equals something isn't a yes or no.
            if repr(state.get(key)) != repr(value):
                raise ValueError(
                    f"The saved state has {key} = {shown(state.get(key))}, but this MultiTask has {value!r}."
                )
        needed = ("method_state", "roles", *(("weights_state",) if weights is not None else ()))
        missing = [key for key in needed if key not in state]
        if missing:
            raise ValueError(f"The saved state isn't complete: it has no {missing[0]}.")
        self._carried = None
        kept = [(part, part.state_dict()) for part in self._methods]
        loading = "method_state"
        try:
            self._method.load_state_dict(state["method_state"])
            if isinstance(self.weights, LossWeighting):
                loading = "weights_state"
                self.weights.load_state_dict(state["weights_state"])
            loading = "roles"
            self.network.load_roles(state["roles"])
        except BaseException as error:
            for part, before in kept:
                part.load_state_dict(before)
            if isinstance(error, Exception) and not isinstance(error, ValueError):
                raise ValueError(f"The saved state's {loading} doesn't fit: {shown(error)}.") from error
            raise
        self._note("load_state_dict")


__all__ = ["MultiTask"]
