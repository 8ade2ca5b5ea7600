"""`torchmto methods` and `torchmto datasets`."""

import pytest

import torchmto
from torchmto import cli
from torchmto.cli.methods import _formula, markdown, rows
from torchmto.lab.data import datasets


def test_methods_lists_every_method_with_family_cost_and_source(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines[1:] if line}
    for name in torchmto.methods():
        assert name in listed
    table = {row[0]: row[1:] for row in rows()}
    assert table["pcgrad"][:4] == ["gramian", "1", "K", "1"]
    assert table["sequential"][:4] == ["procedure", "K", "K", "K"]
    assert all(cell for row in table.values() for cell in row)


@pytest.mark.parametrize(
    ("three", "five", "text"), [(1, 1, "1"), (3, 5, "K"), (4, 6, "K + 1"), (2, 4, "K - 1"), (6, 10, "2K")]
)
def test_costs_are_formulas_in_k(three, five, text):
    assert _formula(three, five) == text


def test_methods_as_markdown(capsys):
    assert cli.main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == markdown()
    assert "| [gd](docs/gd.md) | loss weighting | 1 | 1 | 1 |" in markdown("docs")


def test_datasets_lists_every_data_set_and_where_to_get_it(capsys):
    assert cli.main(["datasets"]) == 0
    text = capsys.readouterr().out
    for name in datasets():
        assert f"\n{name}" in f"\n{text}"
    assert "built in" in text
    assert "get it: https://" in text
