"""The documentation says what the code says, and leaves no public name out."""

import importlib
import inspect
from pathlib import Path

import pytest

import torchmto
from scripts import load_script
from torchmto.methods import method_class

SCRIPT = Path(__file__).parents[1] / "docs" / "generate.py"


@pytest.fixture(scope="module")
def generated():
    return load_script("docs/generate.py").pages()


def test_pages_are_up_to_date(generated):
    stale = [path.name for path, text in generated.items() if not path.is_file() or path.read_text("utf-8") != text]
    assert not stale, f"run `python docs/generate.py`: {stale} differ from the code"
    assert {p.name for p in (SCRIPT.parent / "methods").glob("*.md")} == {
        p.name for p in generated if p.parent.name == "methods"
    }


def test_readme_names_every_method(generated):
    text = generated[SCRIPT.parents[1] / "README.md"]
    assert [name for name in torchmto.methods() if f"[{name}](docs/methods/{name}.md)" not in text] == []


@pytest.mark.parametrize("name", torchmto.methods())
def test_every_method_says_what_it_is(name):
    cls = method_class(name)
    text = inspect.getdoc(cls) or ""
    assert cls.source, "where it comes from"
    assert cls.use, "when to use it"
    assert "Heads" in text or "heads" in text, "what happens to the heads"
    accepted = [
        p.name for p in inspect.signature(cls).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    missing = [p for p in accepted if not any(form in text for form in (f"{p}:", f"{p}, ", f"``{p}``"))]
    assert not missing, f"undocumented hyper-parameters of {name}: {missing}"


@pytest.mark.parametrize(
    "module", [torchmto, torchmto.structure, torchmto.metrics, importlib.import_module("torchmto.methods")]
)
def test_no_public_name_is_undocumented(module):
    for name in module.__all__:
        value = getattr(module, name)
        if name.startswith("__") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if inspect.isfunction(member) and not attribute.startswith("_"):
                    assert inspect.getdoc(member), f"{name}.{attribute}"
