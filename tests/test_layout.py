"""Tables fit the terminal, and nothing of them is cut."""

import io
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import torchmto
from torchmto import cli
from torchmto.cli._tables import metric_table
from torchmto.lab.bench.outputs import table as bench_table
from torchmto.lab.bench.timing import Measurement
from torchmto.lab.terminal import BOUNDLESS, FramedTable, Table, divided, make_console

NUMBERS = st.builds("{:+.2f}{}".format, st.floats(-999, 999), st.sampled_from(["", " ± 0.012"]))
WORDS = st.text(string.ascii_letters + "_()=,日", min_size=1, max_size=50)
TITLES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@st.composite
def tables(draw):
    """Rows of a table with titles, names and numbers."""
    columns, height = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    rows = [[draw(TITLES) for _ in range(columns + 1)]]
    return rows + [[draw(WORDS), *(draw(NUMBERS) for _ in range(columns))] for _ in range(height)]


def printed(table, width):
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def letters(text):
    return sorted(re.sub(r"[\s┏━┳┓┃┡╇┩│└─┴┘]", "", text))


@given(tables(), st.integers(24, 200))
@example([["=", "=", "=" * 18 + "日日"], ["=" * 11, "+0.00", "+0.00"]], 24)
def test_every_line_fits_every_number_is_whole_and_no_letter_is_lost(rows, width):
    for kind in (Table, FramedTable):
        text = printed(kind("", rows[0], rows[1:]), width)
        parts = divided(rows, width, framed=kind.framed)
        assert [i for part in parts for i in part if i] == list(range(1, len(rows[0])))
        assert max(map(cell_len, text.splitlines())) <= width
        assert letters(text) == letters("".join(row[i] for row in rows for part in parts for i in part))
        if width >= 40:
            assert all(cell in text for row in rows[1:] for cell in row[1:])


@given(tables())
def test_a_table_that_fits_is_one(rows):
    assert len(divided(rows, 10**4)) == 1
    assert len(printed(Table("", rows[0], rows[1:]), BOUNDLESS).splitlines()) == len(rows)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_names_of_methods_are_whole(width):
    header = ["method", *(f"task_{i} accuracy ↑" for i in range(6))]
    rows = [
        [name, *["0.944 ± 0.012"] * 6] for name in (*torchmto.methods(), "wpcgrad(mode=pairwise, priority={a: 0.2})")
    ]
    for kind in (Table, FramedTable):
        text = printed(kind("", header, rows), width)
        assert all(re.search(rf"(?<!\w){re.escape(row[0])}(?!\w)", text) for row in rows)
        assert max(map(len, text.splitlines())) <= width


def test_brackets_in_names_are_no_markup_and_control_characters_are_shown():
    rows = [["wpcgrad(priority=[bold])", "0.1\x1b"]]
    text = printed(FramedTable("[red]", ["method", "a [b] ↑"], rows, ["No Δm for [x]"]), 80)
    assert all(part in text for part in ("a [b] ↑", "wpcgrad(priority=[bold])", "[red]", "No Δm for [x]", "0.1?"))


def test_a_console_shows_texts_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    make_console().print("runs[/v2] [red] :fire:")
    assert capsys.readouterr().out == "runs[/v2] [red] :fire:\n"


def test_a_row_in_markdown_is_a_line():
    table = Table("a\nb", ["method", "two\nlines | rmse ↓"], [["gd\r", "1.0"]], ["c\nd"])
    assert table.markdown().splitlines() == [
        "### a?b",
        "",
        "| method | two?lines \\| rmse ↓ |",
        "| --- | ---: |",
        "| gd? | 1.0 |",
        "",
        "c?d",
    ]


def test_without_colours_there_are_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = io.StringIO()
    Console(file=text, width=80, force_terminal=True).print(Table("", ["a", "b"], [["c", "1"]], ["note"]))
    assert not re.search(r"\x1b\[[\d;]*3\d", text.getvalue())


def test_a_terminal_has_its_width_and_a_pipe_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert make_console().width == 72
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError))
    assert make_console(140).width == 140


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
    text = printed(metric_table({**results, "primary": {task: "rmse"}}), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("0.5123") == 3
    assert f"{task} rmse*" in text if width == 100 else task in text


def test_a_failed_contestant_says_why_below_the_table():
    why = "RuntimeError: " + "a long message that goes on " * 4
    good = Measurement("mlp", 3, 10, "gd", "gd*", seconds=0.0123, iqr=0.001, ratios={"gd*": 1.25})
    bad = Measurement("mlp", 3, 10, "torchjd/upgrad", "lb*", failed=why)
    text = printed(bench_table([good, bad]), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert why.split() == text[text.index("RuntimeError") :].split()
    assert "12.3" in text
    assert "…" not in text


def test_findings_fit():
    table = Table(
        "Arm a", ["method", *(f"task {i} mIoU" for i in range(9))], [["gd", *["0.123 ± 0.012"] * 9]], ["A note."]
    )
    text = printed(table, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.123 ± 0.012") == 9
    assert text.split("\n")[0].strip() == "Arm a"
    assert text.endswith("A note.\n")
