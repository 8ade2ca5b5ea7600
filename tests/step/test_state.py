"""Saving and loading: what doesn't fit is refused with a clear message and changes nothing."""

import copy
import enum
import io
import pickle
import warnings

import numpy as np
import pytest
import torch

import torchmto
from toy import Toy, batch, closure, make, same, state

TASKS = ("a", "b", "c")


def started(method="wpcgrad", **options):
    model, _, mt = make(method, **options)
    mt.step(closure(model, batch(TASKS)))
    return model, mt


def test_a_state_loads_with_weights_only():
    for method in ("gd", "pcgrad", "wpcgrad", "sequential", "task_groups", "connection_strength"):
        _, mt = started(method)
        file = io.BytesIO()
        torch.save(mt.state_dict(), file)
        file.seek(0)
        assert same(torch.load(file, weights_only=True), mt.state_dict())


def test_names_of_other_types_of_strings_are_plain_in_a_state():
    class Name(enum.StrEnum):
        A, B, C = TASKS

    for names in (np.array(TASKS), list(Name)):
        model = Toy(TASKS)
        mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=names, method="wpcgrad")
        mt.step(
            lambda _, model=model, names=names: dict(
                zip(names, closure(model, batch(TASKS))(TASKS).values(), strict=True)
            )
        )
        file = io.BytesIO()
        torch.save(mt.state_dict(), file)
        file.seek(0)
        make("wpcgrad")[2].load_state_dict(torch.load(file, weights_only=True))


CHANGES = {
    "other tasks": (lambda s: {**s, "tasks": ["a", "b", "d"]}, "tasks"),
    "another order of tasks": (lambda s: {**s, "tasks": ["b", "a", "c"]}, "tasks"),
    "another method": (lambda s: {**s, "method": "gd"}, "method"),
    "another version": (lambda s: {**s, "version": 99}, "version"),
    "no version": (lambda s: {k: v for k, v in s.items() if k != "version"}, "version"),
    "weights": (lambda s: {**s, "weights": "uw", "weights_state": {}}, "weights"),
    "method state missing": (lambda s: {k: v for k, v in s.items() if k != "method_state"}, "method_state"),
    "roles missing": (lambda s: {k: v for k, v in s.items() if k != "roles"}, "roles"),
    "a state too many": (lambda s: {**s, "method_state": {**s["method_state"], "x": 1}}, "x"),
    "a state too few": (lambda s: {**s, "method_state": {"generator": s["method_state"]["generator"]}}, "priority"),
    "an inner state too few": (
        lambda s: {**s, "method_state": {**s["method_state"], "priority": {}}},
        "LossPriority|priority|state",
    ),
    "a foreign parameter": (
        lambda s: {**s, "roles": {**s["roles"], "layout": ["trunk.9.weight"]}},
        "trunk.9.weight",
    ),
    "broken roles": (lambda s: {**s, "roles": {}}, "roles"),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_a_state_that_does_not_fit(case):
    change, message = CHANGES[case]
    model, mt = started()
    _, other = started()
    other.step(closure(other.network.model, batch(TASKS)))
    foreign = change(copy.deepcopy(other.state_dict()))
    before = state(mt)
    with pytest.raises(ValueError, match=message):
        mt.load_state_dict(foreign)
    assert same(state(mt), before)
    mt.step(closure(model, batch(TASKS)))


@pytest.mark.parametrize(("name", "options"), [("task_groups", {"inner": "mgda"}), ("f_mtl", {"apart": True})])
def test_a_method_inside_is_there_in_both_or_in_neither(name, options):
    plain = {"task_groups": {}, "f_mtl": {"apart": False}}[name]
    for here, there in ((plain, options), (options, plain)):
        _, mt = started(torchmto.make_method(name, **here))
        _, other = started(torchmto.make_method(name, **there))
        before = state(mt)
        with pytest.raises(ValueError, match=r"`(inner|flat)` is a method"):
            mt.load_state_dict(other.state_dict())
        assert same(state(mt), before)


def test_something_else_than_a_state():
    _, mt = started()
    before = state(mt)
    with pytest.raises(TypeError, match="state"):
        mt.load_state_dict([1, 2])
    assert same(state(mt), before)


def test_a_method_is_bound_to_one_set_of_tasks():
    method = torchmto.make_method("wpcgrad")
    make(method)
    with pytest.raises(ValueError, match="already bound to the tasks"):
        make(method, ("a", "b"))


def nested():
    method = torchmto.make_method("gradnorm", layer="trunk")
    return torchmto.make_method("task_groups", inner=torchmto.make_method("cr_mogm", method=method))


FOREIGN = torchmto.make_method("static", weights={"d": 1.0})
REFUSED = {  # what makes a method; what the construction is refused for
    "a layer": (nested, {"model": torch.nn.Linear(4, 1)}),
    "the weights' tasks": (nested, {"weights": FOREIGN}),
    "a warning": (lambda: torchmto.make_method("connection_strength", phase2="imtl_g"), {}),
    "numbers per task": (lambda: torchmto.make_method("upgrad", preference={"a": 1.0, "b": 2.0}), {"weights": FOREIGN}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_construction_that_fails_leaves_the_method_as_it_was(case):
    """Bound to nothing, with the states it had; and so a second time, with what it has learnt."""
    made, options = REFUSED[case]
    method = made()
    for tasks in ((), ("a", "b")):
        before = copy.deepcopy(method.state_dict())
        with warnings.catch_warnings(action="error"), pytest.raises((ValueError, UserWarning)):
            make(method, tasks or TASKS, **options)
        assert [part.tasks for part in method.parts()] == [tasks] * len(list(method.parts()))
        assert same(method.state_dict(), before)
        model, _, mt = make(method, ("a", "b"))
        mt.step(closure(model, batch(("a", "b"))))


@pytest.mark.parametrize(
    ("name", "options"), [("uw", {}), ("adatask", {}), ("gradvac", {"groups": "layer"}), ("connection_strength", {})]
)
def test_a_method_that_goes_on_with_another_model(name, options):
    """It says so, and both can be trained."""
    method = torchmto.make_method(name, **options)
    model, mt = started(method)
    with pytest.warns(UserWarning, match="has taken steps on another model"):
        other, _, second = make(method, model=Toy(TASKS, seed=1))
    for net, steps in ((other, second), (model, mt)):
        steps.step(closure(net, batch(TASKS)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another model")
        make(method, model=other)
        make(torchmto.make_method(name, **options), model=other)


def test_seed():
    """`seed=` reseeds every random choice, of inner methods too; by default it is 0."""
    runs = []
    for seed in (None, 0, 1):
        model, _, mt = make("rlw" if "rlw" in torchmto.methods() else "wpcgrad", seed=seed)
        mt.step(closure(model, batch(TASKS)))
        runs.append(state(mt)["model"])
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("seed", [None, 0, 5, -1, 2**64 - 1])
def test_methods_that_work_together_draw_independently(seed):
    """The outer method has the seed itself; what is inside it, or before it, has seeds derived from that."""

    def generators():
        method = torchmto.make_method("wpcgrad", priority="rlw")
        groups = torchmto.make_method("task_groups", inner=torchmto.make_method("cr_mogm", method=method))
        _, _, mt = make(groups, weights="rlw", seed=seed)
        parts = (groups, groups.inner, method, method.priority, method.priority.weighting, mt.weights)
        return [part.generator for part in parts]

    outer, *others = generators()
    assert torch.equal(outer.get_state(), torch.Generator().manual_seed(seed or 0).get_state())
    draws = torch.stack([torch.rand(400, generator=generator) for generator in (outer, *others)])
    assert (torch.corrcoef(draws) - torch.eye(len(draws))).abs().max() < 0.2
    assert torch.equal(draws, torch.stack([torch.rand(400, generator=generator) for generator in generators()]))


def test_a_seed_given_to_the_weights_by_hand_stays():
    weights = torchmto.make_method("rlw")
    weights.seed(7)
    make("pcgrad", weights=weights)
    assert weights.generator.initial_seed() == 7
    make("pcgrad", weights=weights, seed=7)
    assert weights.generator.initial_seed() != 7


def test_roles_given_on_loading_follow_the_saved_ones():
    model, mt = started("pcgrad")
    saved = mt.state_dict()
    _, _, other = make("pcgrad", model=model)
    other.load_state_dict(saved)
    info = other.step(closure(model, batch(TASKS), only=("b",)))
    assert list(info.losses) == ["b"]
    assert other.network.rows[0].matrix.shape == (1, 25)


DECLARED = {  # what was shared there, what is declared here, what is shared afterwards
    "the same in another order": (["trunk.0.weight", "trunk.0.bias"], ["trunk.0.bias", "trunk.0.weight"], None),
    "found there, declared here": (None, ["trunk.0.bias", "trunk.0.weight"], None),
    "not declared here": (["trunk.0.bias"], None, ["trunk.0.bias"]),
    "more than were found": (None, ["trunk.0.bias", "heads.a.bias", "trunk.0.weight"], ["heads.a.bias"]),
    "less than were found": (None, ["trunk.0.bias"], ValueError),
    "more than were declared": (["trunk.0.bias"], ["trunk.0.weight", "trunk.0.bias"], ValueError),
    "less than were declared": (["trunk.0.weight", "trunk.0.bias"], ["trunk.0.bias"], ValueError),
    "others": (["heads.b.bias"], ["trunk.0.bias"], ValueError),
}


@pytest.mark.parametrize("case", DECLARED)
def test_shared_parameters_of_a_state_and_of_the_user(case):
    """What contradicts is refused; the saved columns come first, those of parameters that only the user names after them."""
    there, here, expected = DECLARED[case]

    def declared(names):
        model = Toy(TASKS)
        shared = None if names is None else [model.get_parameter(name) for name in names]
        return model, make("adatask", model=model, shared=shared)[2]

    model, old = declared(there)
    old.step(closure(model, batch(TASKS)))
    saved = old.state_dict()
    other, mt = declared(here)
    before = state(mt)
    for _ in range(2):
        if expected is ValueError:
            with pytest.raises(
                ValueError, match=r"saved state's shared parameters aren't those of `shared`.*without `shared`"
            ):
                mt.load_state_dict(saved)
            assert same(state(mt), before)
        else:
            mt.load_state_dict(saved)
            roles = mt.network.roles
            assert roles.layout == list(dict.fromkeys([*saved["roles"]["layout"], *(expected or ())]))
            assert roles.given
        mt.step(closure(other, batch(TASKS)))
        before = state(mt)


def test_weights_that_change_between_steps_count_and_a_method_stays():
    start = Toy(TASKS).state_dict()
    ends = []
    for weights, later in (({"a": 2.0}, {}), ({}, {"a": 2.0})):
        model, _, mt = make("gd", weights=weights)
        model.load_state_dict(start)
        mt.weights.update(later)
        mt.step(closure(model, batch(TASKS)))
        ends.append(model.state_dict())
    assert same(*ends)
    with pytest.raises(AttributeError, match="method"):
        mt.method = torchmto.make_method("uw")


def test_what_drives_a_model_can_be_pickled():
    model, _, mt = make("gd", weights={"b": 0.5})
    mt.step(closure(model, batch(TASKS)))
    other = pickle.loads(pickle.dumps(mt))
    for driven in (mt, other):
        driven.step(closure(driven.network.model, batch(TASKS, seed=2)))
    assert same(mt.network.model.state_dict(), other.network.model.state_dict())


def test_a_task_of_the_second_pass_alone_has_no_weight():
    ends = []
    for later in (("a",), TASKS):
        model, _, mt = make("dwa")
        data, calls = batch(TASKS), []

        def losses(tasks, model=model, data=data, calls=calls, later=later):
            calls.append(tasks)
            return closure(model, data, only=("a",) if len(calls) <= 2 else later)(tasks)

        mt.step([losses, losses])
        ends.append(model.state_dict())
    assert same(*ends)
