"""Facts about methods are in the methods' own files; methods inside methods hear every event."""

import ast
import itertools
from pathlib import Path

import pytest

import torchmto
from battery.table import ROWS
from torchmto.methods import hyper, method_class
from torchmto.methods.registry import hyperparameters_of
from toy import Witness, batch, closure, make

CORE = Path(torchmto.__file__).parent
NAMES = set(torchmto.methods())


def strings(tree):
    """The strings of a file, docstrings and ``__all__`` apart."""
    apart = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            apart |= set(map(id, ast.walk(node.value)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in apart]


@pytest.mark.parametrize("folder", ["gradients", "solvers", "step", "structure", "."])
def test_no_other_file_of_the_core_names_a_method(folder):
    for path in (CORE / folder).glob("*.py"):
        for node in strings(ast.parse(path.read_text(encoding="utf-8"))):
            assert node.value not in NAMES, f"{path.relative_to(CORE)}, line {node.lineno}: {node.value}"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_tuning_spaces_hold_hyperparameters(name):
    """Names that there are; the kinds of a search; and at each corner a method that can be made."""
    space, known = method_class(name).tuning_space, hyperparameters_of(method_class(name)) or {}
    assert set(space) <= set(known)
    for kind, *values in space.values():
        assert kind in ("log", "linear", "choice")
        assert kind == "choice" or (len(values) == 2 and values[0] < values[1])
        assert kind != "log" or values[0] > 0
    fixed = ROWS[name].options(3) | ({"total_steps": 10} if "total_steps" in known else {})
    for values in itertools.product(*(values for _, *values in space.values())):
        torchmto.make_method(name, **{**fixed, **dict(zip(space, values, strict=True))})


class Declares(torchmto.LossWeighting):
    """Hyper-parameters in the body of the class."""

    power: float = hyper.number(2.0, above=0)
    names: list[str] | None = hyper.called("labels", hyper.given(None))
    needed: int = hyper.integer(hyper.REQUIRED, minimum=1)

    def objective(self, losses, indices=None):
        return losses.pow(self.power).sum()


class Hides(Declares):
    """A plain attribute takes the place of a hyper-parameter."""

    power = 3.0
    needed: int = hyper.integer(4, minimum=1)


def test_declared_hyperparameters_are_taken_by_name_and_checked():
    assert hyperparameters_of(Declares) == {"power": False, "labels": False, "needed": True}
    assert hyperparameters_of(Hides) == {"needed": False, "labels": False}
    method = Declares(needed=3, labels=["x"])
    assert (method.power, method.names, method.needed, Hides().power) == (2.0, ["x"], 3, 3.0)
    for wrong, kind, message in (
        ({}, TypeError, "needs the hyper-parameter `needed`"),
        ({"needed": 1, "powr": 1.0}, TypeError, "no hyper-parameter `powr`"),
        ({"needed": 0}, ValueError, "Parameter `needed` should be an int >= 1"),
        ({"needed": None}, TypeError, "Parameter `needed` should be an int >= 1"),
        ({"needed": 1, "power": "2"}, TypeError, "Parameter `power` should be a positive float"),
    ):
        with pytest.raises(kind, match=message):
            Declares(**wrong)


class Around(torchmto.LossWeighting):
    """Holds another method, and does nothing to pass events on."""

    name = "around"

    def __init__(self, inner, *, late=False):
        super().__init__()
        self.inner = inner
        if not late:
            self.add_state("inner", inner)

    def setup(self, num_tasks):
        self.add_state("inner", self.inner)

    def objective(self, losses, indices=None):
        return losses.sum()


OUTER = {
    "declared in __init__": lambda ear: {"method": Around(ear)},
    "declared in setup": lambda ear: {"method": Around(ear, late=True)},
    "two deep": lambda ear: {"method": Around(Around(ear))},
    "in front of another": lambda ear: {"method": "pcgrad", "weights": Around(ear)},
    "as a priority": lambda ear: {"method": torchmto.make_method("wpcgrad", priority=ear)},
    "as a priority, smoothed": lambda ear: {
        "method": torchmto.make_method("cr_mogm", method=torchmto.make_method("wpcgrad", priority=ear))
    },
    "inside groups": lambda ear: {
        "method": torchmto.make_method(
            "task_groups", groups="joint", inner=torchmto.make_method("wpcgrad", priority=ear)
        )
    },
    "as a second phase": lambda ear: {
        "method": torchmto.make_method("connection_strength", schedule="phase2", phase2=Around(ear))
    },
}


@pytest.mark.filterwarnings("ignore:connection_strength")
@pytest.mark.parametrize("where", OUTER)
def test_a_method_inside_hears_every_event_once(where):
    ear = Witness()
    model, _, mt = make(seed=4, **OUTER[where](ear))
    ear.told = [entry for entry in ear.told if entry != "seed"]
    mt.step(closure(model, batch(mt.tasks)))
    mt.report(dict.fromkeys(mt.tasks, 0.5))
    mt.end_window()
    assert ear.told == ["bind", "attach", "after_step", "report", "end_window"]
    assert ear.tasks == mt.tasks
    assert ear.generator.initial_seed() not in (0, 4)


def test_a_method_whose_inside_does_not_fit_stays_unbound():
    method = torchmto.make_method("wpcgrad", priority={"x": 1.0})
    with pytest.raises(ValueError, match="Unknown task `x`"):
        method.bind(("a", "b"))
    assert method.tasks == ()
    method.bind(("x", "y"))
