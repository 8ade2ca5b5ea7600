"""The report in headless Chromium: it draws, sorts, slides, and loads nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import Browser, chromium, require_chromium
from report_folders import comparison, experiment, training
from torchmto.lab.report import write_report

pytest.importorskip("plotly")

HOSTILE = "</script><img src=x onerror='window.hacked=1'>"
METHODS = ("gd", "pcgrad <b>bold</b>", "connection_strength", f"task_groups{HOSTILE}")
TASKS = (HOSTILE, "<i>right</i> %{x}", "10")

Results = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Path, Results]]:
    require_chromium()
    folder = tmp_path_factory.mktemp("report")
    results = comparison(folder / "run", methods=METHODS, tasks=TASKS)
    training(folder / "training")
    experiment(folder / "found", text=HOSTILE)
    write_report([folder / "run", folder / "training", folder / "found"])
    with chromium(folder) as browser:
        browser.call("POST", "/url", url="about:blank")
        browser.requests()
        browser.view(1200, 900)
        browser.open(folder / "run" / "report.html")
        yield browser, folder / "run" / "report.html", results


def rows(browser: Browser, table: str = "#comparison") -> list[str]:
    found: list[str] = browser.run(
        "return [...document.querySelectorAll(`${arguments[0]} tbody tr`)].map(r => r.dataset.method)", table
    )
    return found


def test_it_opens_without_errors_and_loads_nothing(report: tuple[Browser, Path, Results]) -> None:
    browser, path, _ = report
    asked = [url for url in browser.requests() if not url.startswith(("chrome", "data:"))]
    assert set(asked) <= {path.resolve().as_uri()}
    assert browser.log("browser") == []
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.images.length") == 0
    drawn, sections = browser.run(
        "return [document.querySelectorAll('.js-plotly-plot .main-svg').length, document.querySelectorAll('section').length]"
    )
    assert drawn > 15
    assert sections == 14
    why = browser.run("return document.getElementById('no-delta').textContent")
    assert why == f"No Δm for {METHODS[-1]}: `offset` is 0 for the single-task model."


def test_the_table_shows_the_values_of_the_json(report: tuple[Browser, Path, Results]) -> None:
    browser, _, results = report
    shown = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('#comparison tbody tr')].map(r =>"
        " [r.dataset.method, [...r.querySelectorAll('td')].map(c => c.dataset.value)]))"
    )
    for name, method in results["methods"].items():
        delta = method["delta_m"]
        tasks = [
            figures[about["primary_metric"]]["mean"]
            for figures, about in zip(method["tasks"].values(), results["tasks"].values(), strict=True)
        ]
        cells = [None if cell == "" else float(cell) for cell in shown[name]]
        assert cells[0] == (delta and delta["mean"])
        assert sorted(cells[1:4]) == sorted(tasks)
        assert cells[4] == method["cost"]["seconds_per_batch"]
    plotted = browser.run(
        "return document.querySelector('#delta .js-plotly-plot').data.filter(t => t.error_x)"
        ".map(t => [t.x[0], t.error_x.array[0]])"
    )
    expected = [[m["delta_m"]["mean"], m["delta_m"]["ci95"]] for m in results["methods"].values() if m["delta_m"]]
    assert sorted(plotted) == sorted(expected)


def cells(browser: Browser, table: str, attribute: str = "value") -> dict[str, list[str | None]]:
    """What a table's cells say in a data attribute, by method."""
    found: dict[str, list[str | None]] = browser.run(
        "return Object.fromEntries([...document.querySelectorAll(`${arguments[0]} tbody tr`)].map(r =>"
        " [r.dataset.method, [...r.querySelectorAll('td')].map(c => c.dataset[arguments[1]] ?? null)]))",
        table,
        attribute,
    )
    return found


def test_differences_ranks_and_budgets_are_those_of_the_json(report: tuple[Browser, Path, Results]) -> None:
    browser, _, results = report
    versus = results["versus"]
    shown, counts = cells(browser, "#versus-table"), cells(browser, "#versus-table", "counts")
    assert set(shown) == set(METHODS[1:]), "the reference isn't compared with itself"
    for name, values in shown.items():
        against = versus["methods"][name]
        difference = against["delta_m"] or {"mean": None, "p_holm": None}
        by_task = [entry["change"]["mean"] for entry in against["tasks"].values()]
        wins, _, losses = against["wins_ties_losses"]
        found = [float(value) if value else None for value in values]
        assert found == [difference["mean"], difference["p_holm"], wins - losses, *by_task]
        expected = [against["wins_ties_losses"], *(entry["wins_ties_losses"] for entry in against["tasks"].values())]
        assert [text.split() for text in counts[name][2:] if text] == [list(map(str, entry)) for entry in expected]
    plotted = browser.run(
        "return document.querySelector('#versus .js-plotly-plot').data.map(t => [t.x[0], t.error_x.array[0], t.marker.symbol])"
    )
    known = [entry["delta_m"] for entry in versus["methods"].values() if entry["delta_m"]]
    marks = [[d["mean"], d["ci95"], "circle" if d["p_holm"] < 0.05 else "circle-open"] for d in known]
    assert sorted(plotted) == sorted(marks)
    for name, values in cells(browser, "#budget-table").items():
        within = [budget["methods"][name] for budget in versus["budgets"].values()]
        assert [float(value) if value else None for value in values] == [entry and entry["mean"] for entry in within]
    # One method has no average change, so only the ranks over tasks are there.
    ranks = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('#ranks li')]"
        ".map(item => [item.dataset.method, Number(item.dataset.value)]))"
    )
    assert versus["ranks"]["seeds"] is None
    assert ranks == versus["ranks"]["tasks"]["average"]
    assert f"χ² = {versus['ranks']['tasks']['friedman']['statistic']:.2f}" in browser.run(
        "return document.getElementById('rank-test').textContent"
    )
    browser.type("#versus-table th[data-key=wins] button", "\ue007")
    balance = {n: e["wins_ties_losses"][0] - e["wins_ties_losses"][2] for n, e in versus["methods"].items()}
    order = [balance[name] for name in rows(browser, "#versus-table")]
    assert order == sorted(order, reverse=True)


def choose(browser: Browser, selector: str, option: int) -> None:
    browser.run(
        "const list = document.querySelector(arguments[0]); list.selectedIndex = arguments[1];"
        "list.dispatchEvent(new Event('change'))",
        *(selector, option),
    )


def test_learning_curves_over_batches_optimizer_steps_and_seconds(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    script = (
        "const run = report.studies[0].runs.filter(r => r.method === 'connection_strength' && r.task === null);"
        "const keys = ['at', 'batches', 'optimizer_steps', 'seconds'];"
        "const means = Object.fromEntries(keys.map(k => [k, [0, 1].map(e => mean(run.map(r => r.history[e][k])))]));"
        "const plot = document.querySelector('#curves .js-plotly-plot');"
        "return [means, plot.data.filter(t => t.name === 'connection_strength')[0].x, plot.layout.xaxis.title.text]"
    )
    for number, (key, label) in enumerate(
        [
            ("at", "epoch"),
            ("batches", "batches"),
            ("optimizer_steps", "optimizer steps"),
            ("seconds", "training time, s"),
        ]
    ):
        choose(browser, "#curves label:nth-child(2) select", number)
        means, x, axis = browser.run(script)
        assert x == means[key]
        assert axis == label
    choose(browser, "#curves select", 1)
    assert browser.run("return document.querySelectorAll('#curves .js-plotly-plot').length") == 1, (
        "one Δm for all tasks"
    )
    choose(browser, "#curves select", 0)
    choose(browser, "#curves label:nth-child(2) select", 0)


def test_affinities_below_their_noise_floor_are_marked(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    browser.type("#affinity-slider", "\ue010")
    values, texts, floors = browser.run(
        "const plot = document.querySelector('#affinity .js-plotly-plot').data[0];"
        "const run = report.studies[0].runs.find(r => r.trace.some(p => p.records.affinity));"
        "return [plot.z, plot.text, report.studies[0].task_names.map(t => run.noise_floor[t])]"
    )
    marked = {(row, column) for row, line in enumerate(texts) for column, text in enumerate(line) if text[0] == "("}
    below = {(r, c) for r, line in enumerate(values) for c, value in enumerate(line) if abs(value) < floors[c]}
    assert marked == below
    assert 0 < len(marked) < 9
    assert "Noise floor" in browser.run("return document.getElementById('noise-floor').textContent")


def test_the_table_sorts_and_filters_by_mouse_and_keyboard(report: tuple[Browser, Path, Results]) -> None:
    browser, _, results = report
    time = {name: method["cost"]["seconds_per_batch"] for name, method in results["methods"].items()}
    header = "#comparison th[data-key=seconds_per_batch]"
    browser.click(f"{header} button")
    assert rows(browser) == sorted(time, key=time.__getitem__)
    assert browser.run("return document.querySelector(arguments[0]).ariaSort", header) == "ascending"
    browser.type(f"{header} button", "\ue007")
    assert rows(browser) == sorted(time, key=time.__getitem__, reverse=True)
    assert browser.run("return document.activeElement.closest('th').dataset.key") == "seconds_per_batch"
    browser.click("#comparison th[data-key=delta_m] button")
    assert rows(browser)[-1] == METHODS[-1], "a method without a value comes last"
    browser.type("#filter", "BOLD")
    assert rows(browser) == [METHODS[1]]
    browser.type("#filter", "\ue003" * 4)
    browser.click("#methods input")
    assert "gd" not in rows(browser)
    assert browser.run("return document.querySelector('#costs .js-plotly-plot').data[0].x.length") == 3
    browser.click("#methods input")
    assert len(rows(browser)) == 4


def test_the_slider_moves_through_the_affinities(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    script = "return document.querySelector('#affinity .js-plotly-plot').data[0].z"
    last = browser.run(script)
    browser.type("#affinity-slider", "\ue012")
    before = browser.run(script)
    assert before != last
    label = browser.run("return document.getElementById('affinity-slider').getAttribute('aria-valuetext')")
    assert label == "step 5 (5 of 6)"
    recorded = browser.run(
        "const run = report.studies[0].runs.find(r => r.trace.some(p => p.records.affinity));"
        "return run.trace[4].records.affinity"
    )
    assert before == recorded
    browser.type("#layer-slider", "\ue011")
    assert browser.run("return document.getElementById('layer-slider').value") == "0"


@pytest.mark.parametrize(
    ("theme", "width", "phone"), [("light", 1200, False), ("dark", 1200, False), ("light", 390, True)]
)
def test_screenshots_in_light_dark_and_on_a_phone(
    report: tuple[Browser, Path, Results], theme: str, width: int, phone: bool
) -> None:
    browser, _, _ = report
    browser.view(width, 844, theme=theme, phone=phone)
    for section in ("table", "versus", "ranks", "curves", "affinity"):
        browser.run("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", section)
        image = browser.screenshot()
        assert len(image) > 15_000, "an empty page is a few kilobytes"
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 19, 24)" if theme == "dark" else "rgb(246, 247, 249)")
    assert browser.log("browser") == []


def test_choosing_another_folder(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    browser.view(1200, 900)
    choose(browser, "#chooser select", 3)
    assert rows(browser) == ["pcgrad"]
    text = browser.run("return document.getElementById('delta').textContent")
    assert "Relative to: the comparison first." in text, "which is on the same data"
    assert browser.run("return document.getElementById('title').textContent") == "training"
    assert browser.log("browser") == []


def test_an_experiment(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    choose(browser, "#chooser select", 1)
    headings, cell, pictures, sections = browser.run(
        "return [[...document.querySelectorAll('#findings h3')].map(h => h.textContent),"
        "document.querySelector('#findings tbody th').textContent,"
        "[...document.images].map(i => [i.alt, i.naturalWidth]),"
        "[...document.querySelectorAll('section')].map(s => s.id)]"
    )
    assert (headings, cell, pictures) == ([HOSTILE], HOSTILE, [["Plot dot", 1]])
    assert sections == ["findings", "figures", "settings"]
    assert browser.run("return window.hacked") is None
    choose(browser, "#chooser select", 2)
    assert len(rows(browser)) == 2
    assert browser.log("browser") == []
