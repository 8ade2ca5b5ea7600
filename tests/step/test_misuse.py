"""Every misuse: its message, and that nothing has changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import torchmto
from toy import Toy, batch, closure, flat, make, same, state

TASKS = ("a", "b", "c")


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def started(method="pcgrad", *, scaler=None, **options):
    """A MultiTask with batch norm that has taken two steps, and its model."""
    torch.manual_seed(0)
    model = Toy(TASKS, norm=nn.BatchNorm1d(5))
    mt = torchmto.MultiTask(model, sgd(model), tasks=TASKS, method=method, scaler=scaler, **options)
    for seed in range(2):
        mt.step(closure(model, batch(TASKS, seed=seed)))
    return model, mt


def good(model):
    return closure(model, batch(TASKS))(TASKS)


def with_loss(change):
    """Closure factory: the loss of task b is changed."""

    def factory(model):
        def losses(tasks):
            result = closure(model, batch(TASKS))(tasks)
            if "b" in result:
                result["b"] = change(result["b"])
            return result

        return losses

    return factory


def returns(change):
    """Closure factory: the result is changed as a whole, after a forward."""
    return lambda model: lambda tasks: change(closure(model, batch(TASKS))(tasks))


STEPS = {
    "unknown task": (returns(lambda r: {**r, "x": r["a"]} if "a" in r else r), ValueError, "Unknown task `x`"),
    "not scalar": (with_loss(lambda loss: loss.expand(3)), ValueError, r"task `b` should be a scalar.*\[3\]"),
    "without graph": (with_loss(lambda loss: loss.detach()), ValueError, "task `b` has no autograd graph.*count 0"),
    "not a tensor": (
        with_loss(lambda loss: None),
        TypeError,
        "`b` should be a scalar tensor.*NoneType.*leave the task out",
    ),
    "integer": (with_loss(lambda loss: torch.tensor(3)), TypeError, "task `b`.*floating-point.*int64"),
    "empty batch": (returns(lambda r: {}), ValueError, "Empty batch"),
    "all counts zero": (returns(lambda r: {k: (v, 0) for k, v in r.items()}), ValueError, "Empty batch"),
    "not a mapping": (returns(lambda r: list(r.values())), TypeError, "should return a mapping.*list"),
    "negative count": (with_loss(lambda loss: (loss, -1)), ValueError, "count of task `b`.*-1"),
    "infinite count": (with_loss(lambda loss: (loss, float("inf"))), ValueError, "count of task `b`"),
    "three values": (with_loss(lambda loss: (loss, 1, 2)), ValueError, "3 values"),
    "NaN loss": (with_loss(lambda loss: loss * float("nan")), torchmto.NonFiniteError, "loss of task `b` is nan"),
    "infinite loss": (with_loss(lambda loss: loss * float("inf")), torchmto.NonFiniteError, "loss of task `b` is inf"),
    "NaN gradient": (
        with_loss(lambda loss: loss + (loss - loss.detach()).sqrt() * 0),
        torchmto.NonFiniteError,
        "gradient",
    ),
    "norm of one sample": (
        lambda model: closure(model, batch(TASKS, size=1)),
        ValueError,
        "more than 1 value per channel",
    ),
    "error in the closure": (returns(lambda r: 1 / 0), ZeroDivisionError, "division by zero"),
    "no closure at all": (lambda model: torch.zeros(()), TypeError, "takes a closure"),
    "no micro-batch": (lambda model: [], ValueError, "at least one closure"),
    "nested list": (lambda model: [[closure(model, batch(TASKS))]], TypeError, "takes a closure"),
}


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
@pytest.mark.parametrize("case", list(STEPS))
def test_a_bad_step_raises_and_changes_nothing(case, method):
    factory, error, message = STEPS[case]
    model, mt = started(method)
    if method == "sequential":
        mt.method.order = None
        # Earlier sub-steps of a procedure stand, so the bad task comes first.
        bad = lambda model: lambda tasks: factory(model)(("b",) if tasks == ("a",) else tasks)  # noqa: E731
        if case in ("unknown task", "no closure at all", "no micro-batch", "nested list"):
            bad = factory
        elif case in (
            "not scalar",
            "without graph",
            "not a tensor",
            "integer",
            "negative count",
            "infinite count",
            "three values",
            "NaN loss",
            "infinite loss",
            "NaN gradient",
        ):
            torch.manual_seed(0)
            model = Toy(("b", "a", "c"), norm=nn.BatchNorm1d(5))
            mt = torchmto.MultiTask(model, sgd(model), tasks=("b", "a", "c"), method=method)
            mt.step(closure(model, batch(TASKS)))
            bad = factory
    else:
        bad = factory
    before = state(mt)
    with pytest.raises(error, match=message):
        mt.step(bad(model))
    assert same(state(mt), before)
    assert all(p.grad is None for p in model.parameters()) or case in (
        "no closure at all",
        "no micro-batch",
        "nested list",
    )


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
@pytest.mark.parametrize("case", ["NaN loss", "infinite loss", "NaN gradient"])
def test_nonfinite_steps_are_skipped_on_request(case, method):
    """Training goes on as if the bad batch had never been there."""
    factory, _, _ = STEPS[case]
    runs = []
    for bad in (True, False):
        model, mt = started(method, on_nonfinite="skip")
        before = state(mt)
        if bad:
            if method == "sequential":
                info = mt.step(lambda tasks: {t: factory(model)(("b",))["b"] for t in tasks})  # noqa: B023
            else:
                info = mt.step(factory(model))
            assert info.skipped
            assert info.num_optimizer_steps == 0
            assert "isn't finite" in info.reason or "loss of task" in info.reason
            assert same(state(mt), before)
        mt.step(closure(model, batch(TASKS, seed=9)))
        runs.append(state(mt))
    assert same(*runs)


def test_a_procedure_skips_only_the_bad_sub_step():
    model, mt = started("sequential", on_nonfinite="skip")
    info = mt.step(STEPS["NaN loss"][0](model))
    assert (info.num_forward, info.num_optimizer_steps, info.skipped) == (3, 2, True)
    assert set(info.losses) == {"a", "c"}


def test_an_error_after_the_first_sub_step_leaves_that_step():
    model, mt = started("sequential")
    before = state(mt)
    with pytest.raises(torchmto.NonFiniteError):
        mt.step(STEPS["NaN loss"][0](model))
    assert not same(state(mt)["model"], before["model"])


def test_no_shared_parameters():
    """Separate models: a weighted sum of losses trains them and says so once; the others have nothing to combine."""
    x, targets = batch(TASKS)
    for method in ("gd", "uw", "sequential", "pcgrad"):
        model = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS}).double()
        mt = torchmto.MultiTask(model, sgd(model), tasks=TASKS, method=method)
        before = state(mt)

        def losses(tasks, model=model):
            return {t: (model[t](x) - targets[t]).square().mean() for t in tasks}

        if method == "pcgrad":
            with pytest.raises(ValueError, match=r"share no parameters.*frozen.*placeholders.*reentrant.*`shared=`"):
                mt.step(losses)
            assert same(state(mt), before)
            continue
        with pytest.warns(UserWarning, match=r"share no parameters.*frozen.*placeholders.*reentrant"):
            mt.step(losses)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mt.step(losses)
        assert not any(map(torch.equal, model.state_dict().values(), before["model"].values()))


def test_after_an_error_the_next_step_is_what_it_would_have_been():
    for method in ("gd", "pcgrad", "wpcgrad"):
        runs = []
        for bad in (False, True):
            model = Toy(TASKS, norm=nn.BatchNorm1d(5))
            mt = torchmto.MultiTask(model, sgd(model), tasks=TASKS, method=method)
            if bad:
                for case in ("NaN loss", "without graph", "NaN gradient", "unknown task"):
                    with pytest.raises((ValueError, TypeError)):
                        mt.step(STEPS[case][0](model))
            for seed in range(3):
                mt.step(closure(model, batch(TASKS, seed=seed)))
            runs.append(state(mt))
        assert same(*runs)


def test_ready_losses_given_to_a_procedure():
    _, mt = started("sequential")
    before = state(mt)
    with pytest.raises(ValueError, match=r"needs a closure: pass `mt.step\(closure\)`"):
        mt.step({t: l.detach().requires_grad_() for t, l in good(Toy(TASKS)).items()})
    assert same(state(mt), before)


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ([], ValueError, "at least one task"),
        (["a", "a"], ValueError, "Task `a` is there twice"),
        (["a", ""], ValueError, "non-empty"),
        (["a", 3], TypeError, "sequence of strings"),
        ("abc", TypeError, "sequence of task names"),
        (None, TypeError, "sequence of task names"),
        ({"a", "b"}, TypeError, "sequence of task names"),
    ],
)
def test_tasks_are_checked(tasks, error, message):
    model = Toy(TASKS)
    with pytest.raises(error, match=message):
        torchmto.MultiTask(model, sgd(model), tasks=tasks, method="gd")


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (["x"], ValueError, "Unknown task `x`. The tasks are a, b, c."),
        (["a", "a"], ValueError, "twice"),
        ([], ValueError, "at least one task"),
        ("a", TypeError, "sequence of task names"),
    ],
)
def test_the_steps_tasks_are_checked(tasks, error, message):
    model, mt = started()
    before = state(mt)
    with pytest.raises(error, match=message):
        mt.step(closure(model, batch(TASKS)), tasks=tasks)
    assert same(state(mt), before)


CONSTRUCTION = {
    "unknown method": ({"method": "pcgard"}, ValueError, "Unknown method `pcgard`. The methods are .*pcgrad"),
    "method of a wrong type": ({"method": 3}, TypeError, "Parameter `method`"),
    "clip": ({"clip": -1.0}, ValueError, "Parameter `clip` should be a positive float. Found `clip = -1.0`."),
    "clip of a wrong type": ({"clip": "1"}, TypeError, "Parameter `clip`"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, ValueError, "one of 'raise', 'skip'"),
    "weights of an unknown task": ({"weights": {"x": 1.0}}, ValueError, "Unknown task `x` in `weights`"),
    "negative weight": ({"weights": {"a": -1.0}}, ValueError, "non-negative"),
    "weights of a wrong type": ({"weights": 3.0}, TypeError, "Parameter `weights`"),
    "weights by a Gramian method": (
        {"weights": "pcgrad"},
        ValueError,
        "Parameter `weights` should be a loss weighting",
    ),
    "weights by an unknown method": ({"weights": "nope"}, ValueError, "Unknown method `nope`"),
    "shared: a tensor": ({"shared": torch.zeros(2)}, TypeError, "Parameter `shared`.*iterable"),
    "shared: foreign": ({"shared": [nn.Parameter(torch.zeros(2))]}, ValueError, "that the optimizer trains"),
    "shared: not tensors": ({"shared": ["trunk.0.weight"]}, TypeError, "Parameter `shared`"),
    "shared: none": ({"shared": []}, ValueError, "at least one parameter"),
    "process group": ({"process_group": object()}, ValueError, "isn't initialised"),
    "scaler": ({"scaler": True}, TypeError, "Parameter `scaler` should be a torch.amp.GradScaler"),
    "seed": ({"seed": "x"}, TypeError, "Parameter `seed` should be an int. Found `seed = 'x'`."),
    "unknown option": ({"wieghts": {}}, TypeError, "wieghts"),
}


@pytest.mark.parametrize("case", list(CONSTRUCTION))
def test_construction_is_checked(case):
    options, error, message = CONSTRUCTION[case]
    model = Toy(TASKS)
    with pytest.raises(error, match=message):
        torchmto.MultiTask(model, sgd(model), **{"tasks": TASKS, "method": "gd", **options})


def test_model_and_optimizer_are_checked():
    model = Toy(TASKS)
    with pytest.raises(TypeError, match="Parameter `model`"):
        torchmto.MultiTask(lambda x: x, sgd(model), tasks=TASKS, method="gd")
    with pytest.raises(TypeError, match="Parameter `optimizer`"):
        torchmto.MultiTask(model, model.parameters(), tasks=TASKS, method="gd")
    with pytest.raises(ValueError, match=r"Parameter `optimizer`.*no closure.*LBFGS"):
        torchmto.MultiTask(model, torch.optim.LBFGS(model.parameters()), tasks=TASKS, method="gd")
    with pytest.raises(ValueError, match=r"SparseAdam takes sparse gradients only.*`pcgrad`"):
        torchmto.MultiTask(model, torch.optim.SparseAdam(model.parameters()), tasks=TASKS, method="pcgrad")


def warned(caught, text):
    return [str(w.message) for w in caught if text in str(w.message)]


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_parameters_outside_the_optimizer_are_warned_of_once(method):
    """Those that a loss reaches: a part with an optimizer of its own, and a loss of its own, is none of our business."""
    model = Toy(TASKS, norm=nn.BatchNorm1d(5))
    model.rotations = nn.Linear(1, 1)
    model.trunk[0].bias.requires_grad_(False)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.trunk.parameters(), lr=0.1), tasks=TASKS, method=method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            mt.step(closure(model, batch(TASKS)))
    (message,) = warned(caught, "isn't in the optimizer")
    assert "`heads.a.weight` (6 such in all)" in message
    assert "requires_grad_(False)" in message


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_a_closure_of_another_model_is_warned_of_once(method):
    """As where the cell of a notebook that makes the model is run again, or a copy trains and the closure has the original."""
    model, _, mt = make(method)
    mt.step(closure(model, batch(TASKS)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for other in (copy.deepcopy(mt), make(method)[2]):
            for _ in range(2):
                assert other.step(closure(model, batch(TASKS))).num_optimizer_steps == 0
    assert len(warned(caught, "reach none of the trained parameters")) == 2


def test_a_sub_step_of_absent_tasks_is_no_closure_of_another_model():
    model, _, mt = make("task_groups")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.step(closure(model, batch(TASKS), only=("a", "c")))


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_a_closure_that_freezes_what_is_trained(method):
    model, _, mt = make(method)
    before = flat(model)

    def freezing(tasks):
        model.trunk.requires_grad_(False)
        return closure(model, batch(TASKS))(tasks)

    with pytest.raises(ValueError, match=r"`trunk.0.weight` \(2 such in all\) was frozen"):
        mt.step(freezing)
    assert same(flat(model), before)


@pytest.mark.parametrize("value", [-1.0, "1", None, float("nan")])
def test_weights_that_are_changed_are_checked(value):
    model, _, mt = make("gd", weights={"a": 2.0})
    mt.weights["a"] = value
    with pytest.raises((TypeError, ValueError), match=r"Parameter `weights\['a'\]` should be a non-negative float"):
        mt.step(closure(model, batch(TASKS)))


def test_gradients_set_before_the_first_step_are_warned_of_once():
    for given in (False, True):
        model, _, mt = make("gd")
        if given:
            model.trunk[0].weight.square().sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mt.step(closure(model, batch(TASKS)))
            another = torchmto.MultiTask(model, mt.network.optimizers.all[0], tasks=TASKS, method="pcgrad")
            for one in (mt, another):
                one.step(closure(model, batch(TASKS)))
        assert len(warned(caught, "`trunk.0.weight` has a gradient already (1 in all)")) == given


GIVEN = {"static": {"weights": [1.0, 1.0, 1.0]}, "constant": {"weights": [1.0, 1.0, 1.0]}}
"""What the methods that can't be constructed without arguments need."""


def test_unknown_hyper_parameters():
    for name in torchmto.methods():
        with pytest.raises(TypeError, match=f"Method `{name}`.*unknown_option"):
            torchmto.make_method(name, **GIVEN.get(name, {}), unknown_option=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": "own"}, ValueError, "Parameter `heads` should be one of 'unit', 'weighted'"),
        ({"refresh_every": 0}, ValueError, "Parameter `refresh_every` should be an int >= 1"),
        ({"refresh_every": 2.0}, TypeError, "Parameter `refresh_every`"),
    ],
)
def test_options_of_gramian_methods(options, error, message):
    with pytest.raises(error, match=message):
        torchmto.make_method("pcgrad", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"priority": {"a": 0.5, "b": 0.4}}, ValueError, "sum to 1.*The sum is 0.9"),
        ({"priority": [0.5, 0.6]}, ValueError, "sum to 1"),
        ({"priority": {"a": 1.5, "b": -0.5}}, ValueError, "non-negative"),
        ({"priority": {"a": float("nan"), "b": 1.0}}, ValueError, "non-negative"),
        ({"priority": {"a": "1"}}, TypeError, "non-negative"),
        ({"priority": "los"}, ValueError, "Parameter `priority`"),
        ({"priority": "pcgrad"}, ValueError, "Parameter `priority`"),
        ({"priority": 3}, TypeError, "Parameter `priority`"),
        ({"priority": "performance"}, ValueError, "Parameter `baseline`"),
        ({"priority": "performance", "baseline": {"a": 0.0}}, ValueError, "different from 0"),
        ({"baseline": {"a": 1.0}}, ValueError, "None unless priority='performance'"),
        (
            {"priority": "performance", "baseline": {"a": 1.0}, "higher_is_better": "min"},
            TypeError,
            "a bool, or a mapping",
        ),
        ({"mode": "both"}, ValueError, "Parameter `mode`"),
        ({"gamma": "x"}, TypeError, "Parameter `gamma`"),
        ({"window": 0}, ValueError, "Parameter `window`"),
    ],
)
def test_options_of_wpcgrad(options, error, message):
    with pytest.raises(error, match=message):
        torchmto.make_method("wpcgrad", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": {"a": 0.5, "x": 0.5}}, "Unknown task `x` in `priority`"),
        ({"priority": [0.5, 0.5]}, "sequence of 3 probabilities"),
        ({"priority": "performance", "baseline": {"a": 1.0}}, "exactly the tasks"),
        (
            {"priority": "performance", "baseline": dict.fromkeys(TASKS, 1.0), "higher_is_better": {"aa": False}},
            "Unknown task `aa` in `higher_is_better`",
        ),
    ],
)
def test_priorities_must_fit_the_tasks(options, message):
    method = torchmto.make_method("wpcgrad", **options)
    with pytest.raises(ValueError, match=message):
        make(method)


def test_a_priority_function_must_return_probabilities():
    for result in ([1.0], [1.0, -1.0, 1.0], [float("nan")] * 3):
        model, _, mt = make(torchmto.make_method("wpcgrad", priority=lambda losses: result))  # noqa: B023
        before = state(mt)
        with pytest.raises(ValueError, match="finite, non-negative"):
            mt.step(closure(model, batch(TASKS)))
        assert same(state(mt), before)


def test_reports_are_checked():
    _, _, mt = make(torchmto.make_method("wpcgrad", priority="performance", baseline=dict.fromkeys(TASKS, 0.5)))
    mt.report({"a": 0.4})
    before = state(mt)
    for performance, error, message in (
        ({"b": 0.1, "x": 0.5}, ValueError, "Unknown task `x`"),
        ({"b": 0.1, "c": float("nan")}, ValueError, r"performance\['c'\]"),
        ({"b": 0.1, "c": None}, TypeError, r"performance\['c'\]"),
        ({"b": 0.1, "c": "0.5"}, TypeError, r"performance\['c'\]"),
        ([0.1], TypeError, "Parameter `performance`"),
    ):
        with pytest.raises(error, match=message):
            mt.report(performance)
        assert same(state(mt), before)
    mt.report({"b": torch.tensor(0.1)})
    mt.end_window()


def test_independent_batches_are_checked():
    model, mt = started("gd")
    one = closure(model, batch(TASKS))
    for independent, error, message in (
        ((3,), TypeError, "takes a closure"),
        (([],), ValueError, "Parameter `independent`"),
        (one, TypeError, "Parameter `independent`"),
    ):
        before = state(mt)
        with pytest.raises(error, match=message):
            mt.step(one, independent=independent)
        assert same(state(mt), before)


@pytest.mark.parametrize(
    ("method", "most"), [("gd", 0), ("pcgrad", 0), ("task_groups", 0), ("modo", 2), ("cr_mogm", 2), ("sdmgrad", 2)]
)
def test_independent_batches_that_nothing_would_use_are_refused(method, most):
    """Also where a method inside uses them, one more than it does; in an accumulated batch one that isn't gone on with."""
    model, mt = started(torchmto.make_method(method, **({"method": "modo"} if method == "cr_mogm" else {})))
    one = closure(model, batch(TASKS))
    before = state(mt)
    for call in (mt.step, mt.backward):
        with pytest.raises(ValueError, match=rf"`independent` should hold at most {most} batches.*`{method}`"):
            call(one, independent=[one] * (most + 1))
    assert same(state(mt), before)
    if most:
        mt.backward(one, independent=[one], final=False)
        with pytest.raises(ValueError, match=r"`independent` should hold a part of each of the 1 independent batches"):
            mt.backward(one)
        mt.backward(one, final=False)
        mt.backward(one, independent=[one])
        assert mt.step(one, independent=[one] * most).num_forward == 1 + most


def test_an_unasked_loss_is_ignored_and_warned_of_once():
    model, _, mt = make("gd")
    other = copy.deepcopy(model)
    everything = closure(model, batch(TASKS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            mt.step(lambda tasks: everything(TASKS), tasks=["a"])
    assert len([w for w in caught if "wasn't asked for" in str(w.message)]) == 1
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        closure(other, batch(TASKS))(("a",))["a"].backward()
        optimizer.step()
    assert same(dict(model.state_dict()), dict(other.state_dict()))


GIVEN = {
    "a matrix": lambda size: torch.ones(size, size),
    "a column": lambda size: torch.ones(size, 1),
    "too few": lambda size: torch.ones(size - 1),
    "one number": lambda size: torch.tensor(1.0),
    "a list": lambda size: [1.0] * size,
    "nothing": lambda size: None,
}


@pytest.mark.cpu  # with tensors made there
@pytest.mark.parametrize("what", GIVEN)
@pytest.mark.parametrize("kind", ["weights", "combine", "objective"])
def test_what_a_method_of_ones_own_may_not_return(kind, what):
    class Weights(torchmto.GramianWeighting):
        """Returns what it shouldn't."""

        def weights(self, gramian, losses=None, indices=None):
            return GIVEN[what](len(gramian))

    class Combine(torchmto.GradientCombiner):
        """Returns what it shouldn't."""

        def combine(self, task_grads):
            return GIVEN[what](task_grads.matrix.shape[1])

    class Objective(torchmto.LossWeighting):
        """Returns what it shouldn't."""

        def objective(self, losses, indices=None):
            given = GIVEN[what](len(losses))
            return given * losses.exp()[: len(given)] if isinstance(given, torch.Tensor) and given.ndim else given

    method = {"weights": Weights, "combine": Combine, "objective": Objective}[kind]()
    method.name = "mine"
    model, mt = started(method="gd")
    mt = torchmto.MultiTask(model, sgd(model), tasks=TASKS, method=method)
    before = state(mt)
    with pytest.raises(
        ValueError, match=r"should be a tensor of shape \[\d+\]|`objective` should return a scalar tensor"
    ):
        mt.step(closure(model, batch(TASKS)))
    assert same(before, state(mt))


@pytest.mark.parametrize("name", ["clip", "weights", "method"])
def test_attributes_that_would_change_nothing_cant_be_set(name):
    _, _, mt = make("gd")
    with pytest.raises(AttributeError, match=name):
        setattr(mt, name, None)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
@pytest.mark.parametrize("case", ["replaced", "added", "one of several"])
def test_parameters_that_leave_the_optimizer_later_are_warned_of(method, case):
    model, mt = started(method)
    if case == "one of several":
        # The graph has as many nodes as before.
        model.trunk[0] = nn.Linear(4, 5).double()
    elif case == "replaced":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    else:
        model.trunk = nn.Sequential(model.trunk, nn.Linear(5, 5).double())
    with pytest.warns(UserWarning, match="isn't in the optimizer"):
        mt.step(closure(model, batch(TASKS)))


def test_a_step_inside_a_step_is_refused():
    model, mt = started()
    before = state(mt)

    def nested(tasks):
        mt.step(closure(model, batch(TASKS)))

    with pytest.raises(RuntimeError, match="inside its own step"):
        mt.step(nested)
    assert same(state(mt), before)
    copy.deepcopy(mt)
    mt.step(closure(model, batch(TASKS)))


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_inference_mode_is_named(method):
    model, mt = started(method)
    before = state(mt)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        mt.step(closure(model, batch(TASKS)))
    assert same(state(mt), before)
    with pytest.raises(ValueError, match=r"torch\.inference_mode\(\)"):
        mt.step(torch.inference_mode()(closure(model, batch(TASKS))))
    assert same(state(mt), before)
    mt.step(closure(model, batch(TASKS)))


def test_ready_losses_serve_one_micro_batch():
    model, _, mt = make("gd", TASKS)
    losses = closure(model, batch(TASKS))(TASKS)
    with pytest.raises(ValueError, match="the same ready losses twice"):
        mt.step([losses, losses])
    mt.step(losses)


def test_losses_reported_are_those_of_the_steps_own_batch():
    model, _, mt = make("modo", TASKS)
    whole = closure(model, batch(TASKS))
    mt.step(whole, independent=[whole, whole])
    info = mt.step(lambda tasks: whole(tasks[:2]), independent=[whole, whole])
    assert list(info.losses) == list(TASKS[:2])
    assert info.gramian.shape == (2, 2)
