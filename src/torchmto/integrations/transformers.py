"""Hugging Face's Trainer: several tasks by any method that takes one step from one pass.

``mt.backward`` takes the place of ``accelerator.backward(loss)``; clipping, ``grad_norm``, precision, schedules, checkpoints
and the one optimizer step per effective batch stay the Trainer's.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchmto import Method, MultiTask, StepInfo, make_method
from torchmto.checks import check_tasks, found, unknown_task, warn
from torchmto.integrations import require
from torchmto.task_norms import active_task, has_split_norms

require("transformers", "transformers")
require("transformers", "accelerate")

from transformers import Trainer, TrainerCallback, default_data_collator  # noqa: E402  its absence is said above

STATE = "multitask.pt"
"""The file of a checkpoint with what the method knows."""


class PartialLabels:
    """A collator for samples that have labels for some of the tasks.

    A sample is a mapping whose entry ``labels`` is ``{task: label}``; a task that it lacks, or that is None, has no label. In
    the batch, ``labels[task]`` holds a label for every sample, ``missing[task]`` where there is none; a task without any label
    is left out.

    Args:
        missing: For every task, what stands for a missing label: a number such as -100 or ``math.nan``, or a tensor of a
            label's shape.
        collate: What makes a batch of everything else.

    Example:
        >>> from torchmto.integrations.transformers import PartialLabels
        >>> collate = PartialLabels({"topic": -100, "stars": float("nan")})
        >>> samples = [{"x": [0.0], "labels": {"topic": 2}}, {"x": [1.0], "labels": {"topic": None}}]
        >>> collate(samples)["labels"]
        {'topic': tensor([   2, -100])}
    """

    def __init__(
        self,
        missing: Mapping[str, float | Tensor],
        collate: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
    ) -> None:
        if not isinstance(missing, Mapping):
            raise TypeError(found("missing", "a mapping of task names to what stands for a missing label", missing))
        self.missing = {task: torch.as_tensor(value) for task, value in missing.items()}
        self.collate = collate

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of the samples ``features``.

        Raises:
            TypeError: If a sample's labels aren't by task.
            ValueError: If a sample has a label of an unknown task.
        """
        given = [{} if feature.get("labels") is None else feature["labels"] for feature in features]
        for labels in given:
            if not isinstance(labels, Mapping):
                raise TypeError(found("labels", "a mapping of task names to labels in every sample", labels))
            for task in labels.keys() - self.missing.keys():
                raise ValueError(found("labels", f"about the tasks {', '.join(self.missing)}", task))
        batch = dict(self.collate([{k: v for k, v in feature.items() if k != "labels"} for feature in features]))
        stacked = {task: self._stacked(task, [labels.get(task) for labels in given]) for task in self.missing}
        batch["labels"] = {task: labels for task, labels in stacked.items() if labels is not None}
        return batch

    def _stacked(self, task: str, labels: Sequence[Any]) -> Tensor | None:
        tensors = [None if label is None else torch.as_tensor(label) for label in labels]
        known = [tensor for tensor in tensors if tensor is not None]
        if not known:
            return None
        kinds = (tensor.dtype for tensor in known)
        blank = self.missing[task].to(reduce(torch.promote_types, kinds, self.missing[task].dtype))
        blank = blank.expand(known[0].shape)
        return torch.stack([blank if tensor is None else tensor.to(blank.dtype) for tensor in tensors])

    def filled(self, labels: Mapping[str, Tensor], size: int, device: torch.device) -> dict[str, Tensor]:
        """Labels of all tasks for a batch of ``size``, missing ones too, so that batches can be put together."""
        blanks = {task: blank.to(device).expand(size, *blank.shape) for task, blank in self.missing.items()}
        return {task: labels.get(task, blank) for task, blank in blanks.items()}


class MultiTaskTrainer(Trainer):
    """A ``transformers.Trainer`` whose gradient is a multi-task method's.

    The model's output has an entry ``losses``, ``{task: loss}`` or ``{task: (loss, count)}``, without the tasks that the batch
    has no labels of; or override :meth:`task_losses`. With counts, micro-batches and processes are averaged by them. A log has
    every task's loss as ``loss_<task>``, an evaluation as ``eval_<task>_loss``, whose sum is ``eval_loss``. A checkpoint holds
    what the method knows. The averaging window of dwa and wpcgrad is an epoch; validation results go to
    ``trainer.multitask.report``.

    Args:
        *args: The Trainer's.
        tasks: The names of the tasks.
        method: A method's name, or one from :func:`torchmto.make_method`: one that takes one step from one pass.
        multitask_options: Further arguments of :class:`torchmto.MultiTask`, such as ``weights`` or ``seed``.
        **kwargs: The Trainer's.

    Attributes:
        step_info: What the last call of ``mt.backward`` did; None before the first.

    Raises:
        ValueError: If the method takes several optimizer steps or forwards per batch, an option is the Trainer's, or a setting
            is about the Trainer's own loss.
    """

    def __init__(
        self,
        *args: Any,
        tasks: Iterable[str],
        method: str | Method,
        multitask_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tasks = check_tasks(tasks)
        options = dict(multitask_options or {})
        for name, instead in (("clip", "`max_grad_norm`"), ("scaler", "`fp16`"), ("optimizer", "`optimizers`")):
            if name in options:
                raise ValueError(
                    f"Parameter `{name}` is the Trainer's: use its {instead}. Found it in `multitask_options`."
                )
        method = make_method(method) if isinstance(method, str) else method
        if isinstance(options.get("weights"), str):
            options["weights"] = make_method(options["weights"])
        for part in (method, options.get("weights")):
            if isinstance(part, Method) and (reason := part.no_backward(1)):
                raise ValueError(
                    f"Method `{part.name}` {reason}, and the Trainer takes one step per batch: call mt.step(closure) in a "
                    "loop of your own, or use torchmto.integrations.lightning."
                )
        self._options = self._fresh = {"method": method, **options}
        self._multitask: MultiTask | None = None
        self._wrapped: nn.Module | None = None
        self._saved: dict[str, Any] | None = None
        self._window: int | None = None
        self._epoch: int | None = None
        self._trained: dict[str, list[float]] = {}
        self._evaluated: dict[str, list[float]] | None = None
        self.step_info: StepInfo | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Beginnings(self))
        own = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func,
        }
        for name, value in own.items():
            if value:
                raise ValueError(
                    f"Parameter `{name}` is about the Trainer's own loss, which isn't trained here. Leave it out, and compute "
                    "the tasks' losses in the model or in `task_losses`."
                )

    @property
    def multitask(self) -> MultiTask:
        """What drives the method, once training has begun.

        Raises:
            RuntimeError: Before.
        """
        if self.optimizer is None:
            raise RuntimeError(
                "The multi-task method needs the Trainer's optimizer: it is there once training has begun."
            )
        at_work = self._multitask
        if (
            at_work is None
            or at_work.network.optimizers.all[0] is not self.optimizer
            or self._wrapped is not self.model_wrapped
        ):
            saved = self._state()
            at_work = MultiTask(
                self.model_wrapped, self.optimizer, tasks=self.tasks, scaler=self.accelerator.scaler, **self._options
            )
            if saved is not None:
                at_work.load_state_dict(saved["multitask"])
                self._window = saved["window"]
            self._multitask, self._wrapped = at_work, self.model_wrapped
        return at_work

    def task_losses(
        self, model: nn.Module, inputs: Mapping[str, Any], tasks: tuple[str, ...], return_outputs: bool = False
    ) -> Any:
        """The losses of a batch, forward only; yours to override.

        Args:
            model: The model, as the Trainer has wrapped it.
            inputs: A batch, on the model's device.
            tasks: The tasks that are wanted; one the batch has no labels for is left out.
            return_outputs: Whether predictions are wanted too, for an evaluation.

        Returns:
            ``{task: loss}`` or ``{task: (loss, count)}``; with ``return_outputs`` these and the model's outputs.
        """
        outputs = model(**inputs)
        given = outputs.get("losses") if isinstance(outputs, Mapping) else None
        if not isinstance(given, Mapping):
            raise ValueError(
                "The model's output should have an entry `losses`, {task: loss}. Return it from `forward`, or override "
                "`MultiTaskTrainer.task_losses`."
            )
        for task in given:
            if task not in self.tasks:
                raise ValueError(unknown_task(task, self.tasks, "among the losses"))
        losses = {task: given[task] for task in tasks if task in given}
        return (losses, outputs) if return_outputs else losses

    # ------------------------------------------------------------------ training

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model (``model_init=``), of which the method knows nothing yet."""
        parts = {name: copy.deepcopy(self._fresh.get(name)) for name in ("method", "weights")}
        self._options = {**self._fresh, **parts}
        self._multitask, self._saved, self._window, self._trained = None, None, None, {}
        model: nn.Module = super().call_model_init(trial)
        return model

    def begin_training(self) -> None:
        """Of one that was broken off nothing is left, and its epochs are over; one that goes on has loaded what it needs."""
        self._epoch = None
        if self._multitask is not None:
            self._multitask.zero_grad()
            self._window = -1

    def begin_epoch(self) -> None:
        """Count it: ``state.epoch`` is a step late where a data set doesn't know its length."""
        self._epoch = int(self.state.epoch or 0) if self._epoch is None else self._epoch + 1

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """``mt.backward`` on one micro-batch; what is returned adds up to the loss of the effective batch."""
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):
            switch()
        inputs = self._prepare_inputs(inputs)
        mt = self.multitask
        if self._window is not None and self._window != self._epoch:
            mt.end_window()
        self._window = self._epoch

        def closure(tasks: tuple[str, ...]) -> Any:
            with self.compute_loss_context_manager():
                return self.task_losses(model, inputs, tasks)

        final = bool(self.accelerator.sync_gradients)
        self.step_info = mt.backward(closure, final=final)
        losses = self.step_info.losses if final else {}
        _add(self._trained, {task: (loss, 1.0) for task, loss in losses.items()})
        return torch.tensor(float(sum(losses.values())), device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add every task's loss to a training log."""
        if "loss" in logs:
            logs.update({f"loss_{task}": total / count for task, (total, count) in self._trained.items()})
            self._trained = {}
        super().log(logs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Nothing: every task has a count of its own."""

    # ------------------------------------------------------------------ evaluation

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the tasks' losses, for an evaluation."""
        losses: dict[str, Any] = {}
        if has_split_norms(model):
            outputs: Any = {}
            for task in self.tasks:
                with active_task(task):
                    losses.update(self.task_losses(model, inputs, (task,)))
        else:
            given = self.task_losses(model, inputs, self.tasks, return_outputs=True)
            if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], Mapping):
                raise TypeError(
                    "`task_losses(..., return_outputs=True)` should return the losses by task and the model's outputs. Found "
                    f"{type(given).__name__}."
                )
            losses, outputs = given
        size = _batch_size(inputs)
        counted: dict[str, Any] = {
            task: loss if isinstance(loss, tuple | list) else (loss, size) for task, loss in losses.items()
        }
        # Without a label a mean has no value.
        counted = {task: pair for task, pair in counted.items() if float(pair[1]) > 0}
        if self._evaluated is not None:
            part = self._own_part(size)
            _add(self._evaluated, {task: (loss, float(count) * part) for task, (loss, count) in counted.items()})
        total = sum((loss for loss, _ in counted.values()), torch.zeros((), device=self.args.device))
        return (total, outputs) if return_outputs else total

    def _own_part(self, size: int) -> float:
        """The part of a batch that no sample of is a repeat: with these accelerate fills up the processes' last round."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return 1.0
        left: int = state.remainder - size * self.accelerator.process_index
        return min(max(left, 0), size) / size

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The Trainer's, of outputs without the losses and labels with every task."""
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, [*ignore_keys, "losses"])
        if isinstance(labels, Mapping) and isinstance(self.data_collator, PartialLabels):
            labels = self.data_collator.filled(labels, _batch_size(inputs), self.args.device)
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, with every task's loss over the whole set.

        On several processes accelerate repeats samples to fill up the last round. A batch of repeats isn't counted; one that
        ends with some counts by the others' number, with its own mean, as the Trainer's loss does. Whole rounds are exact.
        """
        self._evaluated = {}
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            mine = torch.tensor([self._evaluated.get(task, [0.0, 0.0]) for task in self.tasks], dtype=torch.float64)
        finally:
            self._evaluated = None
        totals = self.accelerator.reduce(mine.to(self.args.device), "sum").tolist()
        losses = {task: total / count for task, (total, count) in zip(self.tasks, totals, strict=True) if count}
        metrics = (output.metrics or {}) | {f"{metric_key_prefix}_{task}_loss": loss for task, loss in losses.items()}
        if losses:
            metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        return output._replace(metrics=metrics)

    # ------------------------------------------------------------------ checkpoints

    def _state(self) -> dict[str, Any] | None:
        """What to save: of the method that is at work, else what was loaded."""
        if self._multitask is None:
            return self._saved
        return {"multitask": self._multitask.state_dict(), "window": self._window}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self._state(), Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        self._multitask, self._saved = None, None
        if path.is_file():
            self._saved = torch.load(path, map_location="cpu", weights_only=True)
        else:
            warn(f"The checkpoint {checkpoint} has no {STATE}: method `{self._options['method'].name}` starts afresh.")


class _Beginnings(TrainerCallback):
    """Tells a trainer that a training or an epoch begins."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A training begins, or goes on."""
        self._trainer.begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch begins, or goes on."""
        self._trainer.begin_epoch()


def _add(sums: dict[str, list[float]], losses: Mapping[str, tuple[Any, Any]]) -> None:
    """Add counted losses to the sums of losses and counts."""
    for task, (loss, count) in losses.items():
        entry = sums.setdefault(task, [0.0, 0.0])
        entry[0] += float(loss) * float(count)
        entry[1] += float(count)


def _batch_size(inputs: Mapping[str, Any]) -> int:
    """The length of a batch's first tensor."""
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 1)


__all__ = ["MultiTaskTrainer", "PartialLabels"]
