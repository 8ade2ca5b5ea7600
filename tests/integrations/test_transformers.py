"""Hugging Face's Trainer takes one step per effective batch, the one that MultiTask takes on its list of micro-batches."""

import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import torchmto
from toy import Toy, flat, same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torchmto.integrations.transformers import STATE, MultiTaskTrainer, PartialLabels  # noqa: E402

TASKS = ("a", "b", "c")
MISSING = {"a": math.nan, "b": math.nan, "c": -100}


class Model(nn.Module):
    """The toy model; ``c`` is a classification. Losses come with their counts."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.toy = Toy(TASKS, dtype=dtype)
        self.toy.heads["c"] = nn.Linear(5, 3).to(dtype)
        with torch.no_grad():
            for parameter in self.toy.heads["c"].parameters():
                parameter.fill_(0.1)
        self.forwards = 0

    def forward(self, x, labels=None):
        self.forwards += 1
        outputs = self.toy(x)
        losses = {}
        for task, y in (labels or {}).items():
            mask = y != -100 if task == "c" else ~y.isnan()
            loss = nn.functional.cross_entropy if task == "c" else nn.functional.mse_loss
            picked = outputs[task][mask]
            losses[task] = (loss(picked if task == "c" else picked[:, 0].to(y.dtype), y[mask]), mask.sum())
        return {"losses": losses, "logits": outputs}


def samples(count=14, dtype=torch.float64):
    """Every sample lacks some label; the first two have none of ``c``."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        x, y = torch.randn(4, generator=generator, dtype=dtype), torch.randn(2, generator=generator, dtype=dtype)
        labels = {"a": y[0], "b": 2 * y[1] if i % 3 else None}
        made.append({"x": x, "labels": labels | ({"c": i % 3} if i > 1 and i % 2 else {})})
    return made


class InOrder(MultiTaskTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(tmp_path, method="pcgrad", *, kind=InOrder, model=None, callbacks=(), data=None, options=None, **settings):
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return kind(
        model=Model() if model is None else model,
        args=transformers.TrainingArguments(str(tmp_path), **settings),
        train_dataset=samples() if data is None else data,
        eval_dataset=samples(7),
        data_collator=PartialLabels(MISSING),
        tasks=TASKS,
        method=method,
        multitask_options=options,
        callbacks=list(callbacks),
    )


def by_hand(method, *, accumulate, data=None, model=None, context=None, steps=None, size=2, **options):
    """The same steps on lists of micro-batches, with the Trainer's optimizer and schedule."""
    data, model = samples() if data is None else data, Model() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, **options)
    batches = [PartialLabels(MISSING)(data[i : i + size]) for i in range(0, len(data), size)]
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(groups) if steps is None else steps)

    def source(inputs):
        def closure(tasks):
            with context() if context else torch.enable_grad():
                return {t: loss for t, loss in model(**inputs)["losses"].items() if t in tasks}

        return closure

    infos = []
    for group in groups:
        infos.append(mt.step([source(inputs) for inputs in group]))
        schedule.step()
    return model, infos, optimizer


@pytest.mark.parametrize("method", ["cagrad", "dwa", "nash_mtl", "graddrop"])
def test_one_step_per_effective_batch(method, tmp_path):
    """Seven micro-batches, three to a step and one left over, partial labels with counts, clipped by the global norm."""
    norms, seen = [], []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
            seen.append(state.global_step)

        def on_log(self, args, state, control, logs=None, **_):
            norms.append(logs)

    run = trainer(
        tmp_path, method, callbacks=[Watch()], gradient_accumulation_steps=3, max_grad_norm=0.4, options={"seed": 1}
    )
    run.train()
    wanted, infos, optimizer = by_hand(method, accumulate=3, clip=0.4, seed=1)
    torch.testing.assert_close(flat(run.model), flat(wanted), rtol=1e-6, atol=1e-9)
    assert seen == [0, 1, 2]
    counts = {int(state["step"]) for state in run.optimizer.state.values()}
    assert counts == {int(state["step"]) for state in optimizer.state.values()}
    assert max(counts) == run.state.global_step == 3
    assert run.model.forwards == 7
    logs = [entry for entry in norms if "loss" in entry]
    for entry, info in zip(logs, infos, strict=True):
        assert entry["loss"] == pytest.approx(sum(info.losses.values()), rel=1e-4)
        assert {task: entry[f"loss_{task}"] for task in info.losses} == pytest.approx(dict(info.losses), rel=1e-6)
        assert entry["grad_norm"] > 0


def test_the_norm_is_that_of_the_combined_gradient(tmp_path):
    logs = []

    class Watch(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            found.append(logs)

    found = logs
    run = trainer(tmp_path, "pcgrad", callbacks=[Watch()], max_steps=1)
    run.train()
    model = Model()
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=1.0), tasks=TASKS, method="pcgrad")
    inputs = PartialLabels(MISSING)(samples()[:2])
    mt.backward(lambda tasks: model(**inputs)["losses"])
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert logs[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


def test_bf16_is_the_forward_s_own(tmp_path):
    data, model = samples(dtype=torch.float32), Model(torch.float32)
    run = trainer(tmp_path, "cagrad", data=data, model=model, bf16=True, max_grad_norm=0.0)
    run.train()

    def context():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    wanted, _, _ = by_hand("cagrad", accumulate=1, data=data, model=Model(torch.float32), context=context)
    torch.testing.assert_close(flat(run.model), flat(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "at"), [("dwa", 6), ("graddrop", 4), ("uw", 6)])
def test_a_run_that_is_resumed_is_the_run_without_a_break(method, at, tmp_path):
    """In the middle of an epoch and at its end, in random order: to the bit."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "num_train_epochs": 2,
        "kind": MultiTaskTrainer,
        "data": full(),
    }
    whole = trainer(tmp_path / "whole", method, **settings)
    whole.train()
    assert (tmp_path / "whole" / f"checkpoint-{at}" / STATE).is_file()
    second = trainer(tmp_path / "whole", method, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert second.state.global_step == whole.state.global_step == 12
    assert same(dict(second.model.state_dict()), dict(whole.model.state_dict()))
    assert same(second.multitask.state_dict(), whole.multitask.state_dict())


def full():
    """Twelve samples with all labels."""
    return [
        {"x": entry["x"], "labels": {"a": entry["x"][0], "b": entry["x"][1], "c": i % 3}}
        for i, entry in enumerate(samples(12))
    ]


def test_evaluation_per_task(tmp_path):
    seen = {}

    def metrics(prediction):
        seen.update(predictions=prediction.predictions, labels=prediction.label_ids)
        return {"c_right": float((prediction.predictions["c"].argmax(-1) == prediction.label_ids["c"]).mean())}

    run = trainer(tmp_path, metric_for_best_model="b_loss", eval_strategy="epoch")
    run.compute_metrics = metrics
    run.train()
    result = run.evaluate()
    data, model = samples(7), run.model.eval()
    whole = PartialLabels(MISSING)(data)
    with torch.no_grad():
        losses = model(**whole)["losses"]
    expected = {task: float(loss) for task, (loss, _) in losses.items()}
    assert {task: result[f"eval_{task}_loss"] for task in TASKS} == pytest.approx(expected)
    assert result["eval_loss"] == pytest.approx(sum(expected.values()))
    assert {task: len(labels) for task, labels in seen["labels"].items()} == dict.fromkeys(TASKS, 7)
    assert seen["labels"]["c"].tolist() == whole["labels"]["c"].tolist()
    assert seen["predictions"]["c"].shape == (7, 3)
    assert result["eval_c_right"] >= 0
    assert run.state.best_metric == pytest.approx(expected["b"])


def test_partial_labels():
    collate = PartialLabels({"kind": -100, "box": torch.full((4,), math.nan), "size": math.nan})
    batch = collate(
        [
            {"x": torch.ones(2), "labels": {"box": [1.0, 2, 3, 4]}},
            {"x": torch.ones(2), "labels": {"kind": 3, "size": 2}},
        ]
    )
    assert batch["x"].shape == (2, 2)
    assert batch["labels"]["kind"].tolist() == [-100, 3]
    assert batch["labels"]["box"].isnan().tolist() == [[False] * 4, [True] * 4]
    assert batch["labels"]["size"].dtype == torch.float32
    bare = collate([{"x": torch.ones(2)}, {"x": torch.ones(2), "labels": {"kind": None}}])
    assert bare["labels"] == {}
    assert collate.filled({}, 2, torch.device("cpu"))["box"].shape == (2, 4)
    with pytest.raises(ValueError, match="`labels` should be about the tasks kind, box, size"):
        collate([{"x": torch.ones(2), "labels": {"king": 1}}])
    for labels in (1, torch.ones(2)):
        with pytest.raises(TypeError, match="`labels` should be a mapping of task names to labels in every sample"):
            collate([{"x": torch.ones(2), "labels": labels}])


def test_partial_labels_of_ints_and_floats():
    stars = [{"x": 0.0, "labels": {"stars": star}} for star in (2, None, 3.5)]
    assert PartialLabels({"stars": -1})(stars)["labels"]["stars"].tolist() == [2.0, -1.0, 3.5]


def test_a_batch_without_labels_of_a_task_counts_for_nothing(tmp_path):
    """Its mean is NaN, and its count 0."""
    run, collate = trainer(tmp_path), PartialLabels(MISSING)

    def filled(features):
        batch = collate(features)
        return {**batch, "labels": collate.filled(batch["labels"], len(features), torch.device("cpu"))}

    run.eval_dataset = [{**entry, "labels": entry["labels"] if i > 3 else {}} for i, entry in enumerate(samples(8))]
    expected = {key: value for key, value in run.evaluate().items() if key.endswith("loss")}
    run.data_collator = filled
    assert {key: value for key, value in run.evaluate().items() if key.endswith("loss")} == pytest.approx(expected)


def test_a_new_model_has_a_new_method(tmp_path):
    """With ``model_init=`` every ``train()`` starts afresh."""
    run = trainer(
        tmp_path, "uw", kind=lambda model, **options: InOrder(model_init=lambda: Model(torch.float64), **options)
    )
    results = []
    for _ in range(2):
        run.train()
        results.append((flat(run.model), run.multitask.state_dict()["method_state"]))
    assert same(*results)


@pytest.mark.parametrize("method", ["rlw", "pcgrad"])
def test_of_a_training_that_was_stopped_in_mid_accumulation_nothing_is_left(method, tmp_path):
    class Stop(transformers.TrainerCallback):
        stopped = False

        def on_substep_end(self, args, state, control, **_):
            control.should_training_stop, self.stopped = not self.stopped, True

    run = trainer(tmp_path, method, data=full(), callbacks=[Stop()], gradient_accumulation_steps=2)
    run.train()
    assert run.state.global_step == 0
    generator = run.multitask.method.state_dict()["generator"].clone()
    run.train()
    wanted = trainer(tmp_path, method, data=full(), gradient_accumulation_steps=2)
    wanted.add_callback(Seeded(wanted, generator))
    wanted.train()
    assert same(flat(run.model), flat(wanted.model))


class Seeded(transformers.TrainerCallback):
    """Begins with a method's generator where another training has left it."""

    def __init__(self, run, generator):
        self.run, self.generator = run, generator

    def on_train_begin(self, *_, **__):
        self.run.multitask.method.generator.set_state(self.generator)


@pytest.mark.parametrize("sized", [False, True])
def test_every_epoch_of_every_training_ends_a_window(sized, tmp_path, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(full())

    ends = []
    monkeypatch.setattr(torchmto.MultiTask, "end_window", lambda mt: ends.append(run.state.global_step))
    settings = {"num_train_epochs": 2} if sized else {"max_steps": 12}
    run = trainer(tmp_path, "dwa", data=full() if sized else Stream(), **settings)
    run.train()
    run.train()
    assert ends == [6, 0, 6]


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match=r"`sequential` takes several.*one step per batch"):
        trainer(tmp_path, "sequential")
    with pytest.raises(ValueError, match="use its `max_grad_norm`"):
        trainer(tmp_path, options={"clip": 1.0})
    with pytest.raises(RuntimeError, match="once training has begun"):
        _ = trainer(tmp_path).multitask
    model = Model()
    model.config = types.SimpleNamespace(problem_type=None)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is about the Trainer's own loss.*`task_losses`"):
        trainer(tmp_path, model=model, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"`compute_loss_func` is about the Trainer's own loss"):
        trainer(tmp_path, kind=lambda **options: InOrder(compute_loss_func=print, **options))

    class Single(Model):
        def forward(self, x, labels=None):
            return {"loss": self.toy(x)["a"].mean()}

    with pytest.raises(ValueError, match="entry `losses`"):
        trainer(tmp_path, model=Single()).train()

    class WithoutOutputs(InOrder):
        def task_losses(self, model, inputs, tasks, return_outputs=False):
            return super().task_losses(model, inputs, tasks)

    with pytest.raises(
        TypeError, match=r"return_outputs=True\)` should return the losses by task and the model's outputs"
    ):
        trainer(tmp_path, kind=WithoutOutputs).evaluate()

    class Wrong(Model):
        def forward(self, x, labels=None):
            return {"losses": self.change(super().forward(x, labels)["losses"])}

    for change, said in (
        (lambda losses: [loss for loss, _ in losses.values()], "entry `losses`"),
        (lambda losses: {f"{task}{task}": loss for task, loss in losses.items()}, "Unknown task `aa` among the losses"),
    ):
        model = Wrong()
        model.change = change
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path, model=model).train()


def losses_by_hand(model, batches):
    """An evaluation's losses: every task's mean over the batches, each of which counts by a part of its labels."""
    totals = {task: [0.0, 0.0] for task in TASKS}
    for chosen, part in batches:
        with torch.no_grad():
            losses = model(**PartialLabels(MISSING)([samples(10)[i] for i in chosen]))["losses"]
        for task, (loss, labels) in losses.items():
            if labels:
                totals[task][0] += float(loss) * float(labels) * part
                totals[task][1] += float(labels) * part
    means = {f"eval_{task}_loss": total / labels for task, (total, labels) in totals.items()}
    return means | {"eval_loss": sum(means.values())}


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each step is one on all micro-batches of both processes, clipped once; both hold the same model and evaluation."""
    script = str(Path(__file__).with_name("two_transformers.py"))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
        str(tmp_path),
    ]
    subprocess.run(launch, check=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(dict(ranks[0]["model"]), dict(ranks[1]["model"]))
    wanted, _, _ = by_hand("cagrad", accumulate=4, data=samples(16), clip=0.4)
    assert ranks[0]["steps"] == 2
    torch.testing.assert_close(dict(ranks[0]["model"]), dict(wanted.state_dict()), rtol=1e-6, atol=1e-9)
    assert (tmp_path / "checkpoint-2" / STATE).is_file()
    losses = [[value for key, value in sorted(rank["evaluation"].items()) if key.endswith("_loss")] for rank in ranks]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    # The last round's repeats: sample 0 after 8, in one batch, and then one of 1 and 2; or a batch of 0 and 1.
    for count, last in ((9, ((8, 0), 0.5)), (10, ((8, 9), 1.0))):
        expected = losses_by_hand(wanted, [*(((i, i + 1), 1.0) for i in range(0, 8, 2)), last])
        for rank in ranks:
            found = {key: value for key, value in rank["repeats"][count].items() if key.endswith("_loss")}
            assert found == pytest.approx(expected)
