"""Lightning: a mixin by which a ``LightningModule`` trains several tasks with any method.

Where a method takes one step from one pass, Lightning's automatic optimization stays in charge: ``mt.backward`` takes the place
of ``loss.backward()``, so clipping, accumulation, precision, schedulers, checkpoints and the count of steps stay its own.
Methods that take several steps or forwards per batch drive the optimizers themselves: manual optimization.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchmto import Method, MultiTask, StepInfo, make_method
from torchmto.checks import check_tasks, found
from torchmto.integrations import require
from torchmto.task_norms import active_task

require("lightning", "lightning", "pytorch_lightning")

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object

KEY = "torchmto"
"""The checkpoint's entry with what the method knows."""


class MultiTaskMixin(_Base):
    """For a ``LightningModule`` of ``lightning.pytorch`` or ``pytorch_lightning``, named before it among the bases.

    Call :meth:`set_multitask` in ``__init__`` and write :meth:`task_losses`; ``training_step`` is here. It logs every task's
    loss as ``train/<task>``. The averaging window of dwa and wpcgrad is an epoch.

    Where ``mt.backward`` serves the method, optimization is automatic. Else it is manual, with Lightning's rules for that:
    ``clip=`` here instead of ``gradient_clip_val``, no ``accumulate_grad_batches``, schedulers are stepped by you, and
    ``global_step`` counts every optimizer step. Set ``automatic_optimization = False`` yourself for several optimizers.

    Attributes:
        step_info: What the last batch did, a :class:`~torchmto.StepInfo`; None before the first.

    Example:
        >>> import torch, lightning.pytorch as L
        >>> from torchmto.integrations.lightning import MultiTaskMixin
        >>> class Net(MultiTaskMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk = torch.nn.Linear(4, 8)
        ...         self.heads = torch.nn.ModuleDict({t: torch.nn.Linear(8, 1) for t in "ab"})
        ...         self.set_multitask(tasks=["a", "b"], method="cagrad")
        ...     def task_losses(self, batch, tasks):
        ...         x, targets = batch
        ...         features = self.trunk(x).relu()
        ...         return {t: (self.heads[t](features) - targets[t]).square().mean() for t in tasks}
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=1e-3)
        >>> Net().automatic_optimization
        True
    """

    step_info: StepInfo | None = None
    _arguments: dict[str, Any] | None = None
    _multitask: MultiTask | None = None
    _saved: dict[str, Any] | None = None
    _window: int | None = None
    _losses: Mapping[str, Any] | None = None
    _final: bool = True

    # ------------------------------------------------------------------ what a user calls and writes

    def set_multitask(self, tasks: Iterable[str], method: str | Method, **options: Any) -> None:
        """Choose tasks and method; call it in ``__init__``.

        Args:
            tasks: The names of the tasks.
            method: A method's name, or one from :func:`torchmto.make_method`.
            **options: Further arguments of :class:`torchmto.MultiTask`, such as ``weights=`` or ``seed=``; not its model,
                optimizer and scaler, which are Lightning's.

        Raises:
            TypeError: If this isn't a ``LightningModule``, or the mixin isn't named before it.
            ValueError: If a name is unknown, or an option belongs to Lightning; of ``clip`` with automatic optimization it says
                so when the fit begins.
        """
        kinds = type(self).__mro__
        base = next((i for i, kind in enumerate(kinds) if kind.__name__ == "LightningModule"), -1)
        if base < kinds.index(MultiTaskMixin):
            raise TypeError(
                "MultiTaskMixin should be named before LightningModule among the bases: "
                f"`class {kinds[0].__name__}(MultiTaskMixin, LightningModule)`."
            )
        for name in ("model", "optimizer", "scaler"):
            if name in options:
                raise ValueError(f"Parameter `{name}` is Lightning's. Found it in set_multitask.")
        method = make_method(method) if isinstance(method, str) else method
        weights = options.get("weights")
        if isinstance(weights, str):
            weights = options["weights"] = make_method(weights)
        for part in (method, weights):
            if isinstance(part, Method) and part.no_backward(1):
                self.automatic_optimization = False
        self._arguments = {"tasks": check_tasks(tasks), "method": method, **options}

    def task_losses(self, batch: Any, tasks: tuple[str, ...]) -> Mapping[str, Any]:
        """The losses of a batch, forward only: ``{task: loss}`` or ``{task: (loss, count)}``; yours to write.

        Args:
            batch: A batch of the training data.
            tasks: The tasks that are wanted; one the batch has no labels for is left out.
        """
        raise NotImplementedError(f"{type(self).__name__} should define `task_losses(self, batch, tasks)`.")

    @property
    def multitask(self) -> MultiTask:
        """What drives the method, while a trainer fits: for ``report``, say.

        Raises:
            RuntimeError: If :meth:`set_multitask` wasn't called, or no trainer is fitting.
        """
        if self._arguments is None:
            raise RuntimeError("Call `self.set_multitask(tasks=..., method=...)` in `__init__`.")
        optimizers: Any = self.optimizers() if self._is_fitting else []
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        if not optimizers:
            raise RuntimeError(
                "The multi-task method needs the trainer's optimizers: it is there while `trainer.fit` runs."
            )
        if self.automatic_optimization:
            optimizers = [wrapper.optimizer for wrapper in optimizers]
        known = [] if self._multitask is None else self._multitask.network.optimizers.all
        if self._multitask is None or [*map(id, known)] != [*map(id, optimizers)]:
            self._multitask = self._built(optimizers)
        return self._multitask

    # ------------------------------------------------------------------ Lightning's hooks

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The tasks' losses, whose sum is returned for the record; or a whole step, where the method takes it itself."""
        mt = self.multitask
        if self._window is not None and self._window != self.current_epoch:
            mt.end_window()
        self._window = self.current_epoch
        if not self.automatic_optimization:
            with torch.autocast(self.device.type, enabled=False):
                self.step_info = mt.step(lambda tasks: self._in_precision(batch, tasks))
            self.log_dict({f"train/{task}": loss for task, loss in self.step_info.losses.items()})
            return None
        trainer = self.trainer
        self._final = (
            (batch_idx + 1) % trainer.accumulate_grad_batches == 0
            or batch_idx + 1 == trainer.num_training_batches
            or trainer.is_last_batch
        )
        # Task-specific norms run one forward per task.
        groups = [(task,) for task in mt.tasks] if mt.network.split else [mt.tasks]
        losses: dict[str, Any] = {}
        for group in groups:
            with active_task(group[0]) if len(group) == 1 else contextlib.nullcontext():
                given = self.task_losses(batch, group)
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"`task_losses` should return a mapping of task names to losses. Found {type(given).__name__}."
                )
            losses.update(given)
        self._losses = losses
        values = {task: _value(loss) for task, loss in losses.items() if not _is_empty(loss)}
        self.log_dict({f"train/{task}": value for task, value in values.items()})
        return sum(values.values(), torch.zeros((), device=self.device))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """``mt.backward`` on the losses of ``training_step``.

        Raises:
            ValueError: If something was added to the loss that ``training_step`` returned.
        """
        if loss.requires_grad or self._losses is None:
            raise ValueError(
                "The method takes the losses that `task_losses` returns. Found a loss of another origin: let `training_step` "
                "return what MultiTaskMixin's returns, and add further terms to the tasks' losses."
            )
        losses, self._losses = self._losses, None
        self.step_info = self.multitask.backward(losses, final=self._final)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Before the first micro-batch of a step: of an accumulation that was broken off nothing is left."""
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        if self._multitask is not None:
            self._multitask.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Where the last micro-batch had no loss, those before it make the step. Call ``super()`` if you override this."""
        super().on_before_optimizer_step(optimizer)
        if self._multitask is not None and self._multitask.accumulating:
            self.step_info = self._multitask.backward({})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the method knows goes into the checkpoint. Call ``super()`` if you override this."""
        super().on_save_checkpoint(checkpoint)
        if self._arguments is not None and self._is_fitting:
            # Before the first step, too: what searches a learning rate or a batch size goes back to there.
            _ = self.multitask
        if self._state is not None:
            checkpoint[KEY] = self._state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back from it, if a trainer goes on with its run.

        ``load_from_checkpoint`` takes the weights: like the optimizer the method, which may be another one, starts afresh.
        """
        super().on_load_checkpoint(checkpoint)
        self._multitask = None
        self._saved = None if getattr(self, "_trainer", None) is None else checkpoint.get(KEY)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which needs nothing of the step that the original may be in."""
        kept: dict[str, Any] = super().__getstate__()
        left = {"_multitask": None, "_losses": None, "_saved": self._state}
        return {**kept, **left}

    # ------------------------------------------------------------------ behind them

    @property
    def _is_fitting(self) -> bool:
        trainer = getattr(self, "_trainer", None)
        return trainer is not None and bool(trainer.strategy.optimizers)

    @property
    def _state(self) -> dict[str, Any] | None:
        """What to save: of the method that is at work, else what was loaded."""
        if self._multitask is None:
            return self._saved
        return {"multitask": self._multitask.state_dict(), "window": self._window}

    def _built(self, optimizers: list[torch.optim.Optimizer]) -> MultiTask:
        assert self._arguments is not None
        strategy = self.trainer.strategy
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        if scaler is not None and not self.automatic_optimization:
            raise ValueError(
                f"Method `{self._arguments['method'].name}` takes its optimizer steps itself, which Lightning's gradient "
                'scaler can\'t follow: use precision="bf16-mixed" instead of "16-mixed".'
            )
        if self.automatic_optimization and (clip := self._arguments.get("clip")) is not None:
            raise ValueError(f"{found('clip', 'None', clip)} Clipping is `Trainer(gradient_clip_val=)`'s here.")
        assert strategy.model is not None
        saved, again = self._state, self._multitask is not None
        built = MultiTask(strategy.model, optimizers, scaler=scaler, **self._arguments)
        if saved is not None:
            built.load_state_dict(saved["multitask"])
            # The epochs of another fit are over, whatever their numbers.
            self._window = -1 if again and saved["window"] is not None else saved["window"]
        return built

    def _in_precision(self, batch: Any, tasks: tuple[str, ...]) -> Mapping[str, Any]:
        with self.trainer.precision_plugin.train_step_context():
            return self.task_losses(batch, tasks)


def _value(loss: Any) -> Tensor:
    """A loss as a number, without its count; zero for what `mt.backward` is about to refuse."""
    value = loss[0] if isinstance(loss, tuple | list) else loss
    return value.detach() if isinstance(value, Tensor) and value.dim() == 0 else torch.zeros(())


def _is_empty(loss: Any) -> bool:
    """Whether a loss is the mean of nothing."""
    return isinstance(loss, tuple) and len(loss) == 2 and bool(loss[1] == 0)


__all__ = ["MultiTaskMixin"]
