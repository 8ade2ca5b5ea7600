"""The table covers the registry, and nothing else."""

import pytest

import torchmto
from battery.table import ROWS, build
from torchmto.methods import method_class


def test_every_method_has_a_row():
    missing = sorted(set(torchmto.methods()) - set(ROWS))
    assert not missing, (
        f'No row for {missing}. Add `"{missing[0] if missing else ""}": Row()` to ROWS in tests/battery/table.py (with the '
        "hyper-parameters it needs): the whole battery then runs on it."
    )


def test_every_row_has_a_method():
    assert not set(ROWS) - set(torchmto.methods())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_metadata(name):
    """Every method says where it comes from, and what it does."""
    cls = method_class(name)
    assert cls.name == name
    assert cls.family in ("loss weighting", "gramian", "combiner", "procedure")
    assert cls.source
    assert "Source:" in (cls.__doc__ or ""), "the docstring names its source"
    assert build(name, 3).generator.initial_seed() == 0


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"static", "constant"}))
def test_constructible_without_arguments(name):
    torchmto.make_method(name)
