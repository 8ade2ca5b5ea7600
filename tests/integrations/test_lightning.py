"""Lightning's settings mean what they say, whatever the method: the same parameters as MultiTask on the same batches."""

import copy
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import torchmto
from toy import Toy, batch, closure, flat, same

L = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from torchmto.integrations.lightning import MultiTaskMixin  # noqa: E402

TASKS = ("a", "b", "c")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|no `val_dataloader`|LeafSpec|srun).*")


class Net(MultiTaskMixin, L.LightningModule):
    """The toy model, trained by Lightning; leaves out task ``c`` in every third batch."""

    def __init__(self, method="pcgrad", *, optimizer=torch.optim.Adam, dtype=torch.float64, **options):
        super().__init__()
        self.toy = Toy(TASKS, dtype=dtype)
        self.set_multitask(tasks=TASKS, method=method, **options)
        self.make, self.steps, self.infos, self.rates = optimizer, 0, [], []

    def task_losses(self, batch, tasks):
        x, targets, number = batch
        outputs = self.toy(x, [t for t in tasks if t != "c" or number % 3])
        return {t: (y - targets[t]).square().mean() for t, y in outputs.items()}

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.02)
        optimizer.register_step_post_hook(self.count)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def count(self, optimizer, *_):
        self.steps += 1
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, *_):
        self.infos.append(self.step_info)

    def validation_step(self, batch, batch_idx):
        losses = self.task_losses(batch, TASKS)
        self.log_dict({f"val/{t}": loss for t, loss in losses.items()}, batch_size=8)


def batches(count, dtype=torch.float64):
    return [(*batch(TASKS, seed=seed, dtype=dtype), seed) for seed in range(count)]


def loader(data):
    return DataLoader(data, batch_size=None)


def trainer(tmp_path, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def by_hand(
    method, data, *, accumulate=1, groups=None, epochs=1, gamma=0.9, context=None, dtype=torch.float64, **options
):
    """The same training by ``mt.step`` on lists of micro-batches: so many of ``data`` in a row, or these ``groups``."""
    model = Toy(TASKS, dtype=dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=gamma)

    def source(entry):
        only = TASKS if entry[2] % 3 else TASKS[:2]
        inner = closure(model, entry[:2], only=only)
        if context is None:
            return inner

        def within(tasks):
            with context():
                return inner(tasks)

        return within

    if groups is None:
        groups = [data[start : start + accumulate] for start in range(0, len(data), accumulate)]
    for epoch in range(epochs):
        if epoch:
            mt.end_window()
        for group in groups:
            mt.step([source(entry) for entry in group])
            scheduler.step()
    return model, mt


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(flat(a), flat(b), rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("method", ["gd", "uw", "dwa", "pcgrad", "nash_mtl", "graddrop", "gradnorm", "wpcgrad"])
def test_accumulation_clipping_schedule_and_counts(method, tmp_path):
    """Seven batches, three to a step and one left over; two epochs."""
    data = batches(7)
    if method in ("gd", "uw"):
        data = [(x, y, 1) for x, y, _ in data]  # their one backward needs the same tasks in all micro-batches
    net = Net(method)
    run = trainer(tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.5, max_epochs=2)
    run.fit(net, loader(data))
    wanted, mt = by_hand(method, data, accumulate=3, epochs=2, clip=0.5)
    close(net.toy, wanted, rtol=1e-6)
    assert run.global_step == net.steps == 6
    assert net.rates == pytest.approx([0.02 * 0.9**i for i in range(6)])
    assert same(net.multitask.method.generator.get_state(), mt.method.generator.get_state())
    assert [info.num_optimizer_steps for info in net.infos] == [0] * 14


def test_max_steps_monitor_hooks_and_logs(tmp_path):
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append([p.grad is not None for p in module.parameters()])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert outputs["loss"] == pytest.approx(sum(module.step_info.losses.values()))
            assert trainer.callback_metrics["train/a"] == pytest.approx(module.step_info.losses["a"])

    data = batches(4)
    keep = ModelCheckpoint(tmp_path, monitor="val/b", mode="max", save_top_k=1, filename="{step}")
    run = trainer(tmp_path, max_epochs=-1, max_steps=6, callbacks=[Watch(), keep], enable_checkpointing=True)
    net = Net("cagrad")
    run.fit(net, loader(data), loader(data[1:2]))
    assert run.global_step == net.steps == 6
    # The first batch has no labels of task c, whose head then has no gradient.
    assert [all(entry) for entry in seen] == [bool(number % 3) for number in (0, 1, 2, 3, 0, 1)]
    assert keep.best_model_score is not None
    close(net.toy, by_hand("cagrad", [*data, *data[:2]])[0])


@pytest.mark.parametrize("method", ["pcgrad", "uw", "wpcgrad", "dwa", "moco"])
def test_a_run_that_is_resumed_is_the_run_without_a_break(method, tmp_path):
    data = [(x, y, 1) for x, y, _ in batches(3)]
    whole = Net(method)
    trainer(tmp_path, max_epochs=4).fit(whole, loader(data))
    first = Net(method)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(first, loader(data))
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert "multitask" in torch.load(tmp_path / "half.ckpt", weights_only=True)["torchmto"]
    second = Net(method)
    trainer(tmp_path, max_epochs=4).fit(second, loader(data), ckpt_path=tmp_path / "half.ckpt")
    assert same(dict(second.state_dict()), dict(whole.state_dict()))
    assert same(second.multitask.state_dict(), whole.multitask.state_dict())


def test_a_second_fit_keeps_what_the_method_knows(tmp_path):
    data = batches(3)
    net = Net("dwa")
    trainer(tmp_path).fit(net, loader(data))
    before = net.multitask.state_dict()
    run = trainer(tmp_path, max_epochs=0)
    run.fit(net, loader(data))
    run = trainer(tmp_path, limit_train_batches=1)
    net.on_train_batch_start = lambda *_: seen.append(net.multitask.state_dict())
    seen = []
    run.fit(net, loader(data))
    assert same(seen[0]["method_state"], before["method_state"])


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_of_an_accumulation_that_is_broken_off_nothing_is_left(method, tmp_path):
    class Cut(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == 3 else None

        def configure_optimizers(self):
            # Without a schedule, which Lightning steps once more at the end of an epoch that was cut.
            return self.make(self.parameters(), lr=0.02)

    data, net = [(x, y, 1) for x, y, _ in batches(4)], Cut(method)
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(net, loader(data))
    close(net.toy, by_hand(method, data, groups=[data[:2], data[:2], data[2:]], gamma=1.0)[0])


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_whose_last_batch_has_no_loss_is_that_of_the_others(method, late, tmp_path):
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx != 1 or late:
                loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    data, net = [(x, y, 1) for x, y, _ in batches(4)], Skipping(method)
    trainer(tmp_path, accumulate_grad_batches=2).fit(net, loader(data))
    assert net.steps == 2
    close(net.toy, by_hand(method, data, groups=[data[:1], data[2:]])[0])


def test_every_epoch_of_every_fit_ends_a_window(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(torchmto.MultiTask, "end_window", lambda mt: ends.append(net.steps))
    net = Net("dwa")
    for _ in range(2):
        trainer(tmp_path, max_epochs=2).fit(net, loader(batches(3)))
    assert ends == [3, 6, 9]


def test_a_copy_may_be_taken_at_any_time(tmp_path):
    """Of the module in mid-accumulation; it goes on as the original would."""

    class Copying(Callback):
        def on_train_batch_end(self, run, module, *_):
            self.copy = copy.deepcopy(module)
            assert same(flat(self.copy.toy), flat(module.toy))

    copying, net = Copying(), Net("uw")
    trainer(tmp_path, accumulate_grad_batches=2, callbacks=[copying]).fit(
        net, loader([(x, y, 1) for x, y, _ in batches(3)])
    )
    for module in (net, copying.copy):
        trainer(tmp_path, limit_train_batches=1).fit(module, loader(batches(1)))
    assert same(*(module.multitask.state_dict() for module in (net, copying.copy)))


def test_the_weights_of_a_checkpoint_serve_another_method(tmp_path):
    """``load_from_checkpoint`` begins a run of its own: neither optimizer nor method goes on."""
    data, run = batches(3), trainer(tmp_path)
    run.fit(Net("uw"), loader(data))
    run.save_checkpoint(tmp_path / "first.ckpt")
    for method in ("uw", "pcgrad"):
        net = Net.load_from_checkpoint(tmp_path / "first.ckpt", method=method)
        known = []
        net.on_train_start = lambda net=net, known=known: known.append(net.multitask.method.state_dict())
        trainer(tmp_path).fit(net, loader(data))
        fresh = Net(method)._arguments["method"]
        fresh.ensure_setup(3)
        assert same(known[0].get("scales"), fresh.state_dict().get("scales"))


def test_a_search_of_the_learning_rate_leaves_the_method_as_it_was(tmp_path):
    """Its steps are undone by a checkpoint from before the first one."""
    nets = [Net("gradvac"), Net("gradvac")]
    for net, callbacks in zip(nets, ([], [LearningRateFinder(num_training_steps=3, update_attr=False)]), strict=True):
        net.lr = 0.02
        trainer(tmp_path, callbacks=callbacks).fit(net, loader(batches(4)))
    assert same(*(net.multitask.state_dict() for net in nets))
    assert same(*(flat(net.toy) for net in nets))


def test_a_mean_of_nothing_is_not_logged(tmp_path):
    class Empty(Net):
        def task_losses(self, data, tasks):
            losses = super().task_losses(data, tasks)
            return {**losses, "a": (losses["a"] * torch.nan, 0)}

    net = Empty("pcgrad")
    run = trainer(tmp_path)
    run.fit(net, loader(batches(2)))
    assert "train/a" not in run.callback_metrics
    assert run.callback_metrics["train/b"].isfinite()


def test_bf16_is_the_forward_s_own(tmp_path):
    data = batches(4, torch.float32)
    net = Net("cagrad", dtype=torch.float32)
    trainer(tmp_path, precision="bf16-mixed").fit(net, loader(data))

    def context():
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)

    close(net.toy, by_hand("cagrad", data, context=context, dtype=torch.float32)[0], rtol=1e-4)
    assert flat(net.toy).isfinite().all()


def test_fp16_by_a_scaler(tmp_path):
    """Lightning itself makes bf16 of 16-mixed on a CPU, so the plugin is built by hand; forwards stay in float32 here."""

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**90, growth_interval=2)
    data = batches(4, torch.float32)
    # Times the scale its gradients overflow: the step is skipped, and the scale halved.
    data[1] = (data[1][0], {task: y * 1e13 for task, y in data[1][1].items()}, 1)
    net = Net("cagrad", dtype=torch.float32)
    run = trainer(tmp_path, plugins=[Scaled("16-mixed", "cpu", scaler)], gradient_clip_val=0.5)
    run.fit(net, loader(data))
    own = torch.amp.GradScaler("cpu", init_scale=2.0**90, growth_interval=2)
    wanted, _ = by_hand("cagrad", data, dtype=torch.float32, scaler=own, clip=0.5)
    assert net.steps == 3
    assert scaler.get_scale() == own.get_scale()
    close(net.toy, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "per_batch"), [("sequential", 3), ("famo", 1), ("adatask", 1), ("task_groups", None)]
)
def test_procedures_by_manual_optimization(method, per_batch, tmp_path):
    """Lightning's own count is every optimizer step; hooks before a step run."""
    data = [(x, y, 1) for x, y, _ in batches(4)]
    calls = []

    class Watch(Callback):
        def on_before_optimizer_step(self, *_):
            calls.append(1)

    net = Net(method)
    assert not net.automatic_optimization
    run = trainer(tmp_path, callbacks=[Watch()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(net, loader(data))
        wanted, _ = by_hand(method, data, gamma=1.0)
    taken = sum(info.num_optimizer_steps for info in net.infos)
    assert run.global_step == net.steps == len(calls) == taken
    assert per_batch is None or taken == 4 * per_batch
    assert same(flat(net.toy), flat(wanted))
    with pytest.raises(Exception, match=r"(?i)clip"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(net, loader(data))


def test_several_optimizers_by_manual_optimization(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__("pcgrad", clip=1e3)
            self.automatic_optimization = False

        def configure_optimizers(self):
            muon = torch.optim.Muon([p for p in self.toy.trunk.parameters() if p.ndim == 2], lr=0.01)
            rest = [p for p in self.parameters() if not any(p is q for q in muon.param_groups[0]["params"])]
            return [muon, torch.optim.AdamW(rest, lr=0.01)]

    net = Two()
    trainer(tmp_path).fit(net, loader([(x, y, 1) for x, y, _ in batches(3)]))
    assert [info.num_optimizer_steps for info in net.infos] == [1, 1, 1]
    before = net.multitask.state_dict()["method_state"]
    net.configure_optimizers = lambda: torch.optim.SGD(
        net.parameters(), lr=0.01
    )  # another fit may have another number of them
    trainer(tmp_path, limit_train_batches=1).fit(net, loader([(x, y, 1) for x, y, _ in batches(1)]))
    assert len(net.infos) == 4
    assert same(net.multitask.state_dict()["method_state"].keys(), before.keys())


def test_task_specific_norms(tmp_path):
    class Normed(Net):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.toy = torchmto.structure.split_norms(Toy(TASKS, norm=torch.nn.BatchNorm1d(5)), TASKS)
            self.set_multitask(tasks=TASKS, method="pcgrad")
            self.make, self.steps, self.infos, self.rates = torch.optim.SGD, 0, [], []

    net = Normed()
    data = batches(3)
    twin = torchmto.structure.split_norms(Toy(TASKS, norm=torch.nn.BatchNorm1d(5)), TASKS)
    mt = torchmto.MultiTask(twin, torch.optim.SGD(twin.parameters(), lr=0.02), tasks=TASKS, method="pcgrad")
    for place, entry in enumerate(data):
        mt.network.optimizers.all[0].param_groups[0]["lr"] = 0.02 * 0.9**place
        mt.step(closure(twin, entry[:2], only=TASKS if entry[2] % 3 else TASKS[:2]))
    trainer(tmp_path).fit(net, loader(data))
    close(net.toy, twin)


def test_misuse(tmp_path):
    class Backwards(L.LightningModule, MultiTaskMixin):
        def __init__(self):
            super().__init__()
            self.set_multitask(tasks=TASKS, method="gd")

    with pytest.raises(TypeError, match="before LightningModule"):
        Backwards()
    with pytest.raises(ValueError, match=r"`clip`.*gradient_clip_val"):
        trainer(tmp_path).fit(Net("gd", clip=1.0), loader(batches(1)))
    with pytest.raises(ValueError, match="`optimizer` is Lightning's"):
        Net().set_multitask(TASKS, "gd", optimizer=None)
    with pytest.raises(RuntimeError, match=r"while `trainer\.fit` runs"):
        _ = Net().multitask

    class Added(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.toy.trunk[0].weight.square().sum()

    with pytest.raises(ValueError, match="add further terms to the tasks' losses"):
        trainer(tmp_path).fit(Added(), loader(batches(1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda losses: list(losses.values()), "mapping of task names to losses. Found list"),
        (lambda losses: {t: loss.item() for t, loss in losses.items()}, "scalar tensor. Found float"),
        (lambda losses: {t: loss.repeat(2) for t, loss in losses.items()}, r"scalar tensor. Found shape \[2\]"),
        (lambda losses: {"aa": losses["a"]}, "Unknown task `aa`"),
    ],
)
def test_what_is_no_loss_is_named(change, said, tmp_path):
    class Wrong(Net):
        def task_losses(self, batch, tasks):
            return change(super().task_losses(batch, tasks))

    with pytest.raises((TypeError, ValueError), match=said):
        trainer(tmp_path).fit(Wrong(), loader(batches(1)))


def test_the_other_name_of_the_package(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Other(MultiTaskMixin, pl.LightningModule):
        task_losses, configure_optimizers, count = Net.task_losses, Net.configure_optimizers, Net.count

        def __init__(self, method):
            super().__init__()
            self.toy = Toy(TASKS)
            self.set_multitask(tasks=TASKS, method=method)
            self.make, self.steps, self.rates = torch.optim.Adam, 0, []

    for method in ("pcgrad", "sequential"):
        net = Other(method)
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        run = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, **quiet)
        run.fit(net, loader(batches(2)))
        assert run.global_step == net.steps > 0


AUTOMATIC = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
PROCESSES = [
    ("pcgrad", "ddp", AUTOMATIC),
    ("gradnorm", "ddp", AUTOMATIC),
    ("cagrad", "ddp_find_unused_parameters_true", AUTOMATIC),
    ("sequential", "ddp", {}),
]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each step is one on all micro-batches of both processes, clipped once; both hold the same model."""
    script = Path(__file__).with_name("two_lightning.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert same(ranks[0], ranks[1])
    for (method, _, options), found in zip(PROCESSES, ranks[0], strict=True):
        if options:
            wanted, _ = by_hand(method, batches(8), accumulate=4, clip=0.5)
        else:
            wanted, _ = by_hand(method, batches(8), accumulate=2, gamma=1.0)
        assert found["steps"] == (2 if options else 12), method
        torch.testing.assert_close(dict(found["model"]), dict(wanted.state_dict()), rtol=1e-7, atol=1e-10)
