"""Methods as text: what is read, what is refused, and that nothing is run."""

import pytest

from torchmto.lab.specs import MethodSpec, parse_method, parse_methods


@pytest.mark.parametrize(
    ("text", "name", "hyperparameters"),
    [
        ("gd", "gd", {}),
        (" wpcgrad( mode = pairwise , gamma=2 ) ", "wpcgrad", {"mode": "pairwise", "gamma": 2}),
        ("cagrad(c=1e-1)", "cagrad", {"c": 0.1}),
        ("wpcgrad(priority={left: 0.5, 'right': 0.5})", "wpcgrad", {"priority": {"left": 0.5, "right": 0.5}}),
        ("task_groups(groups=[[a, b], [c]])", "task_groups", {"groups": [["a", "b"], ["c"]]}),
        ("task_groups(measure_last=True, inner=None)", "task_groups", {"measure_last": True, "inner": None}),
        ("dtp(gamma=-1)", "dtp", {"gamma": -1}),
    ],
)
def test_reads_names_numbers_lists_and_mappings(text, name, hyperparameters):
    spec = parse_method(text)
    assert (spec.name, spec.hyperparameters) == (name, hyperparameters)
    assert parse_method(spec.label) == spec, "the label is read back"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gd,",
        "gd,gd",
        "pcgrad(",
        "pcgrad(1)",
        "wpcgrad(**{})",
        "wpcgrad(mode=print('x'))",
        "wpcgrad(mode=__import__('os').system('true'))",
        "wpcgrad(gamma=1+1)",
        "wpcgrad(mode=f'{1}')",
        "wpcgrad(priority=[p for p in x])",
        "torchmto.gd",
        "gd; pcgrad",
        "wpcgrad(priority=" + "[" * 500 + "]" * 500 + ")",
    ],
)
def test_anything_else_is_an_error_and_not_run(text):
    if text == "gd,":
        assert [spec.name for spec in parse_methods(text)] == ["gd"]
        return
    with pytest.raises(ValueError, match="Found"):
        parse_methods(text)


def test_labels_tell_strings_from_numbers():
    spec = MethodSpec("wpcgrad", {"mode": "1", "priority": "two words", "window": 1})
    assert spec.label == "wpcgrad(mode='1', priority='two words', window=1)"
    assert parse_method(spec.label) == spec


def test_takes_what_the_text_leaves_open():
    assert parse_method("connection_strength").takes("total_steps")
    assert not parse_method("connection_strength(total_steps=7)").takes("total_steps")
    assert not parse_method("gd").takes("total_steps")
