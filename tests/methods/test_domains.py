"""What methods do at the edges of their domains, beyond the battery: no scale runs away, no task is lost for good."""

import math

import pytest
import torch

import torchmto
from methods.test_losses import Feed
from torchmto.methods import LossWeighting
from torchmto.methods.registry import hyperparameters_of
from toy import Witness

make = torchmto.make_method


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
@pytest.mark.parametrize("loss", [0.0, -2.0])
def test_a_learnt_scale_has_a_bound(name, loss):
    """Without a positive loss there is no best scale: it stays, and the other tasks' move as always."""
    feed, alone = Feed(make(name, lr=0.5)), Feed(make(name, lr=0.5), tasks=("b", "c"))
    for _ in range(300):
        feed(a=loss, b=2.0, c=0.5)
        alone(b=2.0, c=0.5)
    values = feed.mt.method.scales.values
    assert values[0] == 0
    assert torch.equal(values[1:], alone.mt.method.scales.values)
    info = feed(a=1.0, b=2.0, c=0.5)
    assert info.weights["a"] <= 1


def test_go4align_a_task_can_come_back():
    """One huge loss must not set a task's share to 0, from where no factor brings it back."""
    feed = Feed(make("go4align", num_groups=3))
    feed(a=1e9, b=1.0, c=1.0)
    assert float(feed.mt.method.shares.min()) > 0
    for _ in range(3):
        feed(a=1.0, b=1e9, c=1e9)
    assert feed(a=1.0, b=1.0, c=1.0).weights["a"] > 0.9


def test_excess_mtl_a_task_can_come_back():
    """A task whose first gradient was tiny takes nearly all the weight; the others keep a share to grow from."""
    feed = Feed(make("excess_mtl", step_size=1.0))
    feed(a=1e-9, b=1.0, c=1.0)
    for _ in range(5):
        info = feed(a=1.0, b=1.0, c=1.0)
    assert min(info.weights.values()) == pytest.approx(3e-6, rel=0.1)


def test_dwa_negative_means_say_nothing():
    """-10 after -5 is progress, though their ratio is 2."""
    feed = Feed(make("dwa", window=1))
    for loss in (-5.0, -10.0, -20.0):
        info = feed(a=loss, b=4.0, c=4.0)
    assert list(info.weights.values()) == [1, 1, 1]


def test_relative_priority_waits_for_a_positive_mean():
    """A first window at 0 would make every later ratio infinite."""
    feed = Feed(make("wpcgrad", priority="relative_loss", window=1))
    for losses in ((0.0, 2.0, 2.0), (1.0, 2.0, 1.0), (0.5, 2.0, 1.0)):
        feed(**dict(zip("abc", losses, strict=True)))
    info = feed(a=1.0, b=1.0, c=1.0)
    assert info.records["probabilities"] == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})


def test_mgda_a_zero_gradient_takes_no_part_in_a_step():
    """By the definition it has all the weight, and the other tasks would stand still."""
    gramian = torch.diag(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    assert make("mgda").weights(gramian).tolist() == [1, 0, 0]
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    for method in (make("mgda"), make("cr_mogm", alpha=0.0), make("task_groups", groups="joint", inner="mgda")):
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        mt = torchmto.MultiTask(torch.nn.ParameterList([parameter]), optimizer, tasks=["a", "b", "c"], method=method)
        mt.step(
            lambda tasks: {t: parameter["abc".index(t)] * math.sqrt(gramian.diagonal()["abc".index(t)]) for t in tasks}
        )
        assert parameter.grad.tolist() == pytest.approx([0, 0.75, 0.25 * math.sqrt(3)])


def test_db_mtl_drops_what_is_stale():
    """A task that has come to a loss of 0 isn't pushed on along its old gradients, brought to full length."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model = torch.nn.ParameterList([parameter])
    mt = torchmto.MultiTask(model, torch.optim.SGD([parameter], lr=0.0), tasks=["a", "b"], method="db_mtl")
    mt.step({"a": parameter[0] + 1, "b": parameter[1] + 1})
    mt.step({"a": parameter[0] * 0, "b": parameter[1] + 1})
    assert parameter.grad[0] == 0
    assert parameter.grad[1] > 0


def test_nash_mtl_weights_heads_like_the_released_code():
    """heads="unclipped": the shared gradient is clipped, heads get the alpha from before; also where it is reused."""
    model = torch.nn.ModuleDict(
        {"trunk": torch.nn.Linear(3, 2), "a": torch.nn.Linear(2, 1), "b": torch.nn.Linear(2, 1)}
    )
    model = model.double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(tasks):
        return {task: (model[task](model["trunk"](x)) - 1).square().mean() for task in tasks}

    def grads(method):
        mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=["a", "b"], method=method)
        found = []
        for _ in range(2):
            info = mt.step(losses)
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return found, info

    (unit, _), _ = grads(make("nash_mtl"))
    (free, _), info = grads(make("nash_mtl", max_norm=0.0))
    alpha = info.weights
    for every in (1, 2):
        for step in grads(make("nash_mtl", heads="unclipped", update_every=every))[0]:
            for name, gradient in step.items():
                expected = unit[name] if name.startswith("trunk") else free[name] * alpha[name[0]]
                torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["tchebycheff", "mtchebycheff", "pbi", "si", "igb", "stch", "gls", "go4align", "famo", "cosmos"]
)
def test_by_themselves_they_have_no_weights_outside(name):
    weights = make(name).loss_weights(torch.tensor([-1.0, 2.0]))
    assert weights.isnan().any()


def test_si_in_front_gives_the_log_variant():
    """mgda on the gradients of the log-losses, and on losses of 1."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    mt = torchmto.MultiTask(
        torch.nn.ParameterList([parameter]),
        torch.optim.SGD([parameter], lr=0.0),
        tasks=["a", "b"],
        method="mgda",
        weights="si",
    )
    mt.step({"a": parameter[0] + 2, "b": 3 * parameter[1] + 4})
    rows = torch.diag(torch.tensor([1 / 2, 3 / 4], dtype=torch.float64))
    assert torch.allclose(parameter.grad, make("mgda").weights(rows @ rows.T) @ rows)


@pytest.mark.parametrize(
    "method", sorted({"gd", "uw", "pcgrad", "graddrop", "sequential", "task_groups", "connection_strength"})
)
@pytest.mark.parametrize("place", ["weights", "method", "priority"])
def test_a_weighting_is_told_everything_once(place, method):
    witness = Witness()
    options = {
        "weights": {"method": method, "weights": witness},
        "method": {"method": witness, "weights": method if method in ("gd", "uw") else None},
        "priority": {"method": make("wpcgrad", priority=witness)},
    }[place]
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    mt = torchmto.MultiTask(
        torch.nn.ParameterList([parameter]), torch.optim.SGD([parameter], lr=0.1), tasks=["a", "b"], seed=3, **options
    )
    assert witness.told.count("bind") == witness.told.count("attach") == 1
    assert "seed" in witness.told
    witness.told.clear()
    mt.step(lambda tasks: {task: parameter.square().sum() + i for i, task in enumerate(tasks)})
    mt.report({"a": 0.5})
    mt.end_window()
    assert witness.told == ["after_step", "report", "end_window"]


def test_one_object_has_one_place():
    """It would be told everything twice."""
    parameter = torch.nn.Parameter(torch.ones(2))
    for method, weights in (
        (shared := make("uw"), shared),
        (make("wpcgrad", priority=(inner := make("uw"))), inner),
    ):
        with pytest.raises(ValueError, match="Method `uw` is used in two places"):
            torchmto.MultiTask(
                torch.nn.ParameterList([parameter]),
                torch.optim.SGD([parameter], lr=0.1),
                tasks=["a", "b"],
                method=method,
                weights=weights,
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("pcgard"), "Unknown method `pcgard`.*Did you mean `pcgrad`?"),
        (
            lambda: make("cagrad", cc=0.5),
            "Method `cagrad` has no hyper-parameter `cc`. Did you mean `c`?.* c, rescale, scale",
        ),
        (lambda: make("nash_mtl", maxnorm=1), "Did you mean `max_norm`?.*max_norm, update_every, heads, refresh_every"),
        (lambda: make("gd", lr=1), "Method `gd` has no hyper-parameter `lr`. It has none."),
        (lambda: make("static"), "Method `static` needs the hyper-parameter `weights`."),
        (lambda: make("pcgrad", heads="unti"), "one of 'unit', 'weighted'.*Did you mean `unit`?"),
        (lambda: make("cr_mogm", method="mdga"), "Did you mean `mgda`?"),
        (lambda: make("task_groups", inner="pcgad"), "Did you mean `pcgrad`?"),
        (lambda: make("connection_strength", phase2="priorty"), "Did you mean `priority`?"),
        (lambda: make("wpcgrad", priority="los"), "Did you mean `loss`?"),
        (
            lambda: make("wpcgrad", priority={"a": 0.5, "bb": 0.5}).bind(("a", "b")),
            "Unknown task `bb`.*Did you mean `b`?",
        ),
    ],
)
def test_names_that_are_nearly_right(call, message):
    """The message lists what there is, and says what was meant."""
    with pytest.raises((ValueError, TypeError), match=message.replace("?", r"\?")):
        call()


def test_a_method_of_any_options_takes_any():
    class Anything(LossWeighting):
        def __init__(self, **options):
            super().__init__()

        def objective(self, losses, indices=None):
            return losses.sum()

    assert hyperparameters_of(Anything) is None
