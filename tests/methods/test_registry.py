"""Methods of users: known by name everywhere, from any file and from other packages."""

import importlib.metadata
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import torchmto
from battery.table import build
from torchmto.methods import registry
from toy import batch, closure, make, same

OWN = '''
import torchmto

@torchmto.register_method("tripled")
class Tripled(torchmto.LossWeighting):
    """Three times the plain sum."""

    fixed = True

    def __init__(self, *, factor: float = 3.0):
        super().__init__()
        self.factor = factor

    def objective(self, losses, indices=None):
        return self.factor * losses.sum()
'''


@pytest.fixture
def fresh(monkeypatch):
    """A registry that forgets at the end of the test what was registered in it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    registry._load_installed.cache_clear()
    yield
    registry._load_installed.cache_clear()


def define(place="somewhere"):
    namespace = {"__name__": place}
    exec(OWN, namespace)
    return namespace["Tripled"]


def test_a_method_from_any_file_is_known_wherever_a_name_is_taken(fresh):
    define()
    assert "tripled" in torchmto.methods()
    model, _, mt = make("tripled")
    assert mt.step(closure(model, batch(("a", "b", "c")))).weights == {"a": 3.0, "b": 3.0, "c": 3.0}
    model, _, mt = make("pcgrad", weights="tripled")
    assert mt.step(closure(model, batch(("a", "b", "c")))).num_backward == 3
    assert torchmto.make_method("tripled", factor=2.0).factor == 2.0
    with pytest.raises(TypeError, match=r"`tripled` has no hyper-parameter `factr`\. Did you mean `factor`"):
        torchmto.make_method("tripled", factr=2.0)


def test_a_class_that_is_defined_again_takes_its_former_place(fresh):
    """As a cell of a notebook that is run twice."""
    define()
    again = define()
    assert type(torchmto.make_method("tripled")) is again
    with pytest.raises(ValueError, match="already registered"):
        define("elsewhere")


@pytest.mark.parametrize("name", ["no good", "", "7", None])
def test_names_are_checked(fresh, name):
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        torchmto.register_method(name)


def test_only_methods_are_registered(fresh):
    with pytest.raises(TypeError, match=r"a subclass of torchmto\.Method"):
        torchmto.register_method("number")(int)


@pytest.mark.parametrize("broken", [False, True])
def test_methods_of_installed_packages_are_found(fresh, tmp_path, monkeypatch, broken):
    """By the entry-point group `torchmto.methods`; a package that can't be imported costs a warning, nothing else."""
    (tmp_path / "own_methods.py").write_text("import nothing_of_the_kind" if broken else OWN)
    info = tmp_path / "own_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\ntripled = own_methods:Tripled\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert any(entry.name == "tripled" for entry in importlib.metadata.entry_points(group=registry.GROUP))
    if broken:
        with pytest.warns(UserWarning, match="`tripled` of entry point"):
            known = torchmto.methods()
        assert "tripled" not in known
        assert "pcgrad" in known
    else:
        assert torchmto.make_method("tripled").factor == 3.0
        assert "tripled" in torchmto.methods()
        sys.modules.pop("own_methods")


def test_warnings_point_at_the_users_line():
    """Whichever depth of the package they come from."""
    model, _, mt = make("gd")
    losses = closure(model, batch(("a", "b", "c")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mt.step(lambda tasks: losses(("a", "b", "c")), tasks=["a"])
        model.trunk[0].weight.grad = torch.zeros_like(model.trunk[0].weight)
        other = torchmto.MultiTask(
            model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b", "c"], method="sdmgrad"
        )
        other.step(losses)
    assert len(caught) >= 3
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


def test_a_script_registers_its_own_method(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(OWN + "\nprint(torchmto.make_method('tripled', factor=4).factor)\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "4"


@pytest.mark.parametrize("name", torchmto.methods())
def test_a_method_goes_to_another_process(name):
    """A generator by itself can't be sent to one that is spawned: its state goes, and draws the same there."""
    method = build(name, 3)
    method.ensure_setup(3)
    torch.rand(5, generator=method.generator)
    there = pickle.loads(pickle.dumps(method))
    assert b"Generator" not in pickle.dumps(method)
    assert same(there.state_dict(), method.state_dict())
    assert there.generator.initial_seed() == method.generator.initial_seed()
    assert torch.equal(torch.rand(5, generator=there.generator), torch.rand(5, generator=method.generator))
