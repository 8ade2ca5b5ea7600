"""A step on a GPU is the step on the CPU: every method, every engine, and what only a GPU has."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchmto
from battery.table import ROWS, build
from torchmto.structure import active_task, split_norms
from toy import DEVICES, Toy, batch, closure, flat, same, state

TASKS = ("a", "b", "c")
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.filterwarnings("ignore::UserWarning")]


def moved(device, data):
    x, targets = data
    return x.to(device), {task: y.to(device) for task, y in targets.items()}


def train(device, name="pcgrad", *, model=None, steps=4, optimizer=None, dtype=torch.float64, **options):
    """A few steps; the model, the last StepInfo and the MultiTask."""
    model = (Toy(TASKS, norm=nn.BatchNorm1d(5), dtype=dtype) if model is None else model).to(device)
    made = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) if optimizer is None else optimizer(model)
    method = build(name, len(TASKS)) if isinstance(name, str) else name
    mt = torchmto.MultiTask(model, made, tasks=TASKS, method=method, seed=0, **options)
    info = None
    for seed in range(steps):
        info = mt.step(closure(model, moved(device, batch(TASKS, seed=seed, dtype=dtype))))
    return model, info, mt


@pytest.mark.parametrize("engine", ["auto", "parameters", "layerwise"])
@pytest.mark.parametrize("name", ROWS)
def test_every_method_takes_the_steps_of_the_cpu(device, name, engine):
    reason = ROWS[name].skip.get("every_method_takes_the_steps_of_the_cpu")
    if device != "cpu" and reason is not None:
        pytest.skip(reason)
    try:
        here, told, _ = train("cpu", name, gradients=engine)
    except ValueError as error:
        with pytest.raises(ValueError, match="gradients"):
            train(device, name, gradients=engine)
        pytest.skip(f"refused on the CPU, too: {error}")
    there, info, _ = train(device, name, gradients=engine)
    torch.testing.assert_close(flat(there).cpu(), flat(here), rtol=1e-6, atol=1e-9)
    assert info.losses == pytest.approx(told.losses)
    assert (info.weights is None) == (told.weights is None)
    assert (info.engine, info.num_forward, info.num_backward) == (told.engine, told.num_forward, told.num_backward)
    assert all(tensor.device.type == device for p in there.parameters() for tensor in (p, p.grad) if tensor is not None)


@pytest.mark.parametrize("name", ROWS)
def test_a_run_is_the_same_to_the_bit_and_goes_on_from_a_file(device, name, tmp_path):
    ends = []
    for interrupted in (False, False, True):
        model, _, mt = train(device, name, steps=2)
        made = mt.network.optimizers.all[0]
        if interrupted:
            torch.save([model.state_dict(), made.state_dict(), mt.state_dict()], tmp_path / "state.pt")
            states = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
            model, _, mt = train(device, name, steps=0)
            made = mt.network.optimizers.all[0]
            for part, saved in zip((model, made, mt), states, strict=True):
                part.load_state_dict(saved)
        for seed in (5, 6):
            mt.step(closure(model, moved(device, batch(TASKS, seed=seed))))
        ends.append(state(mt))
    assert same(ends[0], ends[1])
    assert same(ends[0]["model"], ends[2]["model"])


@pytest.mark.parametrize("name", ["gd", "uw", "pcgrad", "upgrad", "sequential", "connection_strength", "task_groups"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler_stays_near_float32(device, name, kind):
    if device == "cpu" and kind == torch.float16:
        pytest.skip("autocast to float16 is for GPUs")
    ends = []
    for mixed in (False, True):
        model = Toy(TASKS, dtype=torch.float32, width=16).to(device)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10) if mixed and kind == torch.float16 else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=build(name, 3), scaler=scaler, seed=0)
        for seed in range(4):
            losses = closure(model, moved(device, batch(TASKS, seed=seed, dtype=torch.float32)))
            info = mt.step(torch.autocast(device, dtype=kind)(losses) if mixed else losses)
            assert not info.skipped
        ends.append(flat(model))
    assert float((ends[0] - ends[1]).norm()) < 0.05 * float(ends[0].norm())


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_forms_of_an_optimizer(device, options):
    if "capturable" in options and device == "cpu":
        pytest.skip("for GPUs")
    made = [
        train(device, optimizer=lambda m, o=o: torch.optim.Adam(m.parameters(), lr=0.01, **o)) for o in ({}, options)
    ]
    torch.testing.assert_close(flat(made[0][0]), flat(made[1][0]), rtol=1e-4, atol=1e-7)


class Rebuilt(Toy):
    """Its trunk is computed again in the backward, which runs in another thread on a GPU."""

    def forward(self, x, tasks=None):
        features = checkpoint(self.trunk, x, use_reentrant=False)
        return {task: self.heads[task](features) for task in (self.heads if tasks is None else tasks)}


@pytest.mark.parametrize("name", ["gd", "pcgrad", "sequential", "connection_strength"])
def test_split_norms_in_checkpointed_parts(device, name):
    """The task that is active in the forward is so in the recomputation."""
    ends = []
    for kind in (Toy, Rebuilt):
        model = kind(TASKS, norm=nn.LayerNorm(5)).to(device)
        split_norms(model.trunk, TASKS)
        x, targets = moved(device, batch(TASKS))
        mt = torchmto.MultiTask(
            model, torch.optim.SGD(model.parameters(), lr=0.05), tasks=TASKS, method=build(name, 3), seed=0
        )

        def losses(tasks, model=model, x=x, targets=targets):
            values = {}
            for task in tasks:
                with active_task(task):
                    values[task] = (model(x, [task])[task] - targets[task]).square().mean()
            return values

        for _ in range(3):
            mt.step(losses)
        ends.append(dict(model.state_dict()))
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["auto", "parameters", "layerwise"])
def test_parts_on_two_devices(device, engine):
    """The trunk on one device, a head on the CPU."""
    model = Toy(TASKS).to("cpu")
    model.trunk.to(device)
    model.heads["a"].to(device)
    x, targets = moved("cpu", batch(TASKS))

    def losses(tasks):
        features = model.trunk(x.to(device))
        outputs = {t: model.heads[t](features.to(model.heads[t].weight.device)) for t in tasks}
        return {t: (y - targets[t].to(y.device)).square().mean().to(device) for t, y in outputs.items()}

    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.05), tasks=TASKS, method="pcgrad", seed=0, gradients=engine
    )
    plain, _, _ = train("cpu", "gd", model=Toy(TASKS), steps=0)
    twin = torchmto.MultiTask(
        plain, torch.optim.SGD(plain.parameters(), lr=0.05), tasks=TASKS, method="pcgrad", seed=0, gradients=engine
    )
    for _ in range(3):
        mt.step(losses)
        twin.step(closure(plain, (x, targets)))
    torch.testing.assert_close(flat(model.cpu()), flat(plain), rtol=1e-9, atol=1e-12)


def test_losses_on_another_device_than_the_trunk(device):
    """Pieces of pipelines end where the last of them is."""
    model = Toy(TASKS).to(device)
    x, targets = moved(device, batch(TASKS))

    def losses(tasks):
        return {t: (y - targets[t]).square().mean().cpu() for t, y in model(x, tasks).items()}

    for name in ("gd", "uw", "pcgrad", "sequential"):
        mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.05), tasks=TASKS, method=name)
        before = flat(model)
        mt.step(losses)
        assert not same(before, flat(model))


def test_a_step_in_a_stream_of_its_own(device):
    if device == "cpu":
        pytest.skip("the CPU has none")
    plain, _, _ = train(device, steps=6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model, _, _ = train(device, steps=6)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(flat(plain), flat(model))


def test_compiled_models(device):
    model = Toy(TASKS, dtype=torch.float32).to(device)
    twin = copy.deepcopy(model)
    for net, forward in (
        (model, torch.compile(model, backend="aot_eager" if device == "cpu" else "inductor")),
        (twin, twin),
    ):
        mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), lr=0.05), tasks=TASKS, method="pcgrad", seed=0)
        data = moved(device, batch(TASKS, dtype=torch.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                mt.step(closure(forward, data))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ["parameters", "layerwise"])
def test_nothing_is_kept_on_the_device(device, engine):
    """After ten steps as much is allocated as after five."""
    if device == "cpu":
        pytest.skip("its allocator doesn't count")
    model, _, mt = train(device, model=Toy(TASKS, width=512), gradients=engine)
    data = moved(device, batch(TASKS))
    held = []
    for _ in range(2):
        for _ in range(5):
            mt.step(closure(model, data))
        held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1]
