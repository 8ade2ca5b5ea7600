"""Tables fit the terminal, and nothing of them is cut."""

import io
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

import torchmto
from torchmto import cli
from torchmto._layout import cell_width, divided, folded, plain_table, terminal_width
from torchmto.cli._tables import metric_table
from torchmto.lab.bench.outputs import table as bench_table
from torchmto.lab.bench.timing import Measurement
from torchmto.lab.reproduce.findings import Table
from torchmto.lab.terminal import FittedTable

NUMBERS = st.builds("{:+.2f}{}".format, st.floats(-999, 999), st.sampled_from(["", " ± 0.012"]))
WORDS = st.text(string.ascii_letters + "_()=,日", min_size=1, max_size=50)
TITLES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@st.composite
def tables(draw):
    """Rows of a table with titles, names and numbers."""
    columns, height = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    rows = [[draw(TITLES) for _ in range(columns + 1)]]
    return rows + [[draw(WORDS), *(draw(NUMBERS) for _ in range(columns))] for _ in range(height)]


def framed(table, width):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def letters(text):
    return sorted(re.sub(r"[\s┏━┳┓┃┡╇┩│└─┴┘]", "", text))


@given(tables(), st.integers(24, 200))
@example([["=", "=", "=" * 18 + "日日"], ["=" * 11, "+0.00", "+0.00"]], 24)
def test_every_line_fits_every_number_is_whole_and_no_letter_is_lost(rows, width):
    for text, frame in ((plain_table(rows, width), {}), (framed(FittedTable(rows), width), {"gap": 3, "edge": 4})):
        parts = divided(rows, width, **frame)
        assert [i for part in parts for i in part if i] == list(range(1, len(rows[0])))
        assert max(map(cell_width, text.splitlines())) <= width
        assert letters(text) == letters("".join(row[i] for row in rows for part in parts for i in part))
        if width >= 40:
            assert all(cell in text for row in rows[1:] for cell in row[1:])


@given(TITLES, st.integers(2, 60))
def test_folded_lines_fit_and_keep_every_word(text, width):
    lines = folded(text, width)
    assert max(map(cell_width, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    if all(cell_width(word) <= width for word in text.split()):
        assert " ".join(lines).split() == text.split()


@given(tables())
def test_a_table_that_fits_is_one(rows):
    assert len(divided(rows, 10**4)) == 1
    assert len(plain_table(rows).splitlines()) == len(rows)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_names_of_methods_are_whole(width):
    rows = [["method", *(f"task_{i} accuracy ↑" for i in range(6))]]
    rows += [
        [name, *["0.944 ± 0.012"] * 6] for name in (*torchmto.methods(), "wpcgrad(mode=pairwise, priority={a: 0.2})")
    ]
    for text in (plain_table(rows, width), framed(FittedTable(rows), width)):
        assert all(re.search(rf"(?<!\w){re.escape(row[0])}(?!\w)", text) for row in rows)
        assert max(map(len, text.splitlines())) <= width


def test_brackets_in_names_are_no_markup():
    table = FittedTable(
        [["method", "a [b] ↑"], ["wpcgrad(priority=[bold])", "0.1"]], title="[red]", notes=["No Δm for [x]"]
    )
    text = framed(table, 80)
    assert all(part in text for part in ("a [b] ↑", "wpcgrad(priority=[bold])", "[red]", "No Δm for [x]"))


def test_without_colours_there_are_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = io.StringIO()
    Console(file=text, width=80, force_terminal=True).print(FittedTable([["a", "b"], ["c", "1"]], notes=["note"]))
    assert not re.search(r"\x1b\[[\d;]*3\d", text.getvalue())


def test_a_terminal_has_its_width_and_a_pipe_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_width() == 72
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError))
    assert terminal_width(140) == 140


@pytest.mark.parametrize("width", [40, 80, 120])
def test_methods_are_listed_on_any_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["methods"]) == 0
    text = capsys.readouterr().out.rpartition("\n\nCosts")[0]
    assert max(map(len, text.splitlines())) <= width
    assert {line.split()[0] for line in text.splitlines() if line} >= set(torchmto.methods())


@pytest.mark.parametrize("width", [80, 100])
def test_metrics_of_long_names(width):
    task = "depth_of_the_left_camera_as_the_sensor_of_the_second_floor_saw_it"
    results = {key: {task: {"rmse": 0.51234}} for key in ("validation_untrained", "validation", "test")}
    text = metric_table({**results, "primary": {task: "rmse"}}, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("0.5123") == 3
    assert f"{task} rmse*" in text if width == 100 else task in text


def test_a_failed_contestant_says_why_below_the_table():
    why = "RuntimeError: " + "a long message that goes on " * 4
    good = Measurement("mlp", 3, 10, "gd", "gd*", seconds=0.0123, iqr=0.001, ratios={"gd*": 1.25})
    bad = Measurement("mlp", 3, 10, "torchjd/upgrad", "lb*", failed=why)
    text = framed(bench_table([good, bad]), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert why.split() == text[text.index("RuntimeError") :].split()
    assert "12.3" in text
    assert "…" not in text


def test_findings_fit():
    table = Table(
        "Arm a", ["method", *(f"task {i} mIoU" for i in range(9))], [["gd", *["0.123 ± 0.012"] * 9]], ["A note."]
    )
    text = table.text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.123 ± 0.012") == 9
    assert text.startswith("Arm a\n")
    assert text.endswith("A note.\n")
