"""The report in headless Chromium: it draws, sorts, slides, and loads nothing."""

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chromium import Browser, chromium, require_chromium
from report_folders import comparison, experiment, training
from torchmto.lab.report import write_report

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
        "return [...document.querySelectorAll(`${arguments[0]} tbody tr`)].filter(r => !r.hidden).map(r => r.dataset.method)",
        table,
    )
    return found


def test_it_opens_without_errors_and_loads_nothing(report: tuple[Browser, Path, Results]) -> None:
    browser, path, _ = report
    asked = [url for url in browser.requests() if not url.startswith(("chrome", "data:"))]
    assert set(asked) <= {path.resolve().as_uri()}
    assert browser.log("browser") == []
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.images.length") == 0
    assert path.stat().st_size < 3_000_000
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
        values = [None if cell == "" else float(cell) for cell in shown[name]]
        assert values == [delta and delta["mean"], *tasks]
        assert float(cells(browser, "#cost-table")[name][0] or "") == method["cost"]["seconds_per_batch"]
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
    marks = [[d["mean"], d["ci95"], d["p_holm"] >= 0.05] for d in known]
    assert sorted([x, bar, symbol.endswith("-open")] for x, bar, symbol in plotted) == sorted(marks)
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
    browser.type("#versus-table th[data-key=wins]", "\ue007")
    settle(browser)
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


def settle(browser: Browser) -> None:
    """Wait until a table is sorted, which happens after the click."""
    browser.call("POST", "/execute/async", script="setTimeout(arguments[0], 30)", args=[])


def test_tables_sort_and_filter_by_mouse_and_keyboard(report: tuple[Browser, Path, Results]) -> None:
    browser, _, results = report
    time = {name: method["cost"]["seconds_per_batch"] for name, method in results["methods"].items()}
    header = "#cost-table th[data-key=seconds_per_batch]"
    browser.click(header)
    settle(browser)
    assert rows(browser, "#cost-table") == sorted(time, key=time.__getitem__, reverse=True)
    assert browser.run("return document.querySelector(arguments[0]).ariaSort", header) == "descending"
    browser.type(header, "\ue007")
    settle(browser)
    assert rows(browser, "#cost-table") == sorted(time, key=time.__getitem__)
    assert browser.run("return document.activeElement.dataset.key") == "seconds_per_batch"
    for order in ("ascending", "descending"):  # it is sorted by it already
        browser.click("#comparison th[data-key=delta_m]")
        settle(browser)
        assert browser.run("return document.querySelector('#comparison th[data-key=delta_m]').ariaSort") == order
        assert rows(browser)[-1] == METHODS[-1], "a method without a value comes last"
    browser.type("#filter", "BOLD")
    assert rows(browser) == [METHODS[1]]
    browser.type("#filter", "\ue003" * 4)
    browser.click("#methods input")
    assert "gd" not in rows(browser)
    assert browser.run("return document.querySelector('#costs .js-plotly-plot').data[0].x.length") == 3
    browser.click("#methods input")
    assert len(rows(browser)) == 4


def saved(browser: Browser, button: str) -> list[Any]:
    """Name and content of what a button saves."""
    found: list[Any] = browser.call(
        "POST",
        "/execute/async",
        script="""const [selector, done] = arguments;
        const click = HTMLAnchorElement.prototype.click;
        HTMLAnchorElement.prototype.click = function () {
          HTMLAnchorElement.prototype.click = click;
          fetch_(this.href).then((text) => done([this.download, text]));
        };
        const blobs = new Map(), create = URL.createObjectURL;
        URL.createObjectURL = (blob) => { const url = create.call(URL, blob); blobs.set(url, blob); return url; };
        const fetch_ = async (url) =>
          blobs.has(url) ? blobs.get(url).text() : url.startsWith("data:") ? atob(url.split(",")[1]) : url;
        document.querySelector(selector).click();""",
        args=[button],
    )
    return found


def test_tables_are_saved_as_csv_and_latex(report: tuple[Browser, Path, Results]) -> None:
    browser, _, results = report
    name, text = saved(browser, "#table .table .tool")
    assert name == "run-Comparison-of-methods.csv"
    header, *lines = list(csv.reader(io.StringIO(text)))
    assert header[:3] == ["method", "Δm (%)", "Δm (%) ±"]
    assert [line[0] for line in lines] == [*rows(browser), "single-task models"]
    for line in lines[:-2]:
        delta = results["methods"][line[0]]["delta_m"]
        assert (float(line[1]), float(line[2])) == (delta["mean"], delta["ci95"])
    assert lines[-2][0] == METHODS[-1]
    assert lines[-2][1:3] == ["", ""]
    name, text = saved(browser, "#table .table .tool + .tool")
    assert name == "run-Comparison-of-methods.tex"
    assert text.startswith("\\begin{tabular}{lrrrr}\n\\toprule\nmethod & $\\Delta$m (\\%) & ")
    assert "task\\_groups$<$/script$>$" in text
    assert text.count("\\\\\n") == 6
    assert browser.log("browser") == []


def test_figures_are_saved_as_png_and_svg(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    every, with_tools = browser.run(
        "return [document.querySelectorAll('figure').length, document.querySelectorAll('figure .tool + .tool').length]"
    )
    assert every == with_tools > 10
    name, image = saved(browser, "#delta .tool")
    assert name == "run-Δm-of-every-method-with-its-confidence-interval.png"
    assert image[1:4] == "PNG"
    name, image = saved(browser, "#delta .tool + .tool")
    assert name.endswith(".svg")
    assert "<svg" in image


def test_means_over_seeds(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    for section, plotted, recorded in (
        ("shares", "data.map(t => t.y[1])", "report.studies[0].task_names.map(t => p.records.priority_shares[t])"),
        ("affinity", "data[0].z", "p.records.affinity"),
        ("conflicts", "data.map(t => t.y[1])", "[p.cosines[0][1], p.cosines[0][2], p.cosines[1][2]]"),
        ("groups", "data[0].z", "null"),
    ):
        plot = f"[...document.querySelectorAll('#{section} .js-plotly-plot')]"
        at = "at(-1)" if section == "conflicts" else "at(0)"
        shown, seeds, options = browser.run(
            f"const plot = {plot}.{at};"
            f"const options = [...document.querySelector('#{section} select').options].map(o => o.textContent);"
            "const has = {shares: 'priority_shares', affinity: 'affinity', groups: 'groups'}[arguments[0]];"
            "const runs = report.studies[0].runs.filter(r => r.trace.some(p => has ? p.records[has] : p.cosines));"
            f"return [plot.{plotted}, runs.map(r => r.trace.at(has === 'affinity' ? -1 : 1)).map(p => {recorded}), options]",
            section,
        )
        assert options[0].endswith("mean over 2 seeds")
        assert len(options) == 3
        if section == "groups":
            assert shown == [[1, 0, 1], [0, 1, 0], [1, 0, 1]], "the first and the last task share a group in both seeds"
        else:
            assert np.allclose(shown, np.mean(seeds, axis=0))


def test_colours_of_methods_and_tasks_cant_be_mistaken(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    for theme, card in (("light", "#ffffff"), ("dark", "#181d24")):
        methods, tasks = browser.run("return [METHOD_COLOURS[arguments[0]], TASK_COLOURS[arguments[0]]]", theme)
        chroma = {name: [np.hypot(*oklab(shade)[1:]) for shade in own] for name, own in (("m", methods), ("t", tasks))}
        assert min(chroma["m"]) > 2 * max(chroma["t"])
        shades = [*methods, *tasks]
        apart = [np.linalg.norm(oklab(a) - oklab(b)) for a, b in itertools.combinations(shades, 2)]
        assert min(apart) > 0.08
        assert min(contrast(shade, card) for shade in shades) > 2.9


def linear(shade: str) -> Any:
    values = np.array([int(shade[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(shade: str) -> Any:
    """Ottosson's perceptual colour space: lightness, and two axes of chroma."""
    to_lms = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return to_lab @ np.cbrt(to_lms @ linear(shade))


def contrast(first: str, second: str) -> float:
    dark, light = sorted(float(linear(shade) @ [0.2126, 0.7152, 0.0722]) for shade in (first, second))
    return (light + 0.05) / (dark + 0.05)


def test_the_slider_moves_through_the_affinities(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    script = "return document.querySelector('#affinity .js-plotly-plot').data[0].z"
    choose(browser, "#affinity select", 1)
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


CUT = """
const wide = [...document.querySelectorAll(".scroll, nav")].filter((node) => node.scrollWidth > node.clientWidth);
const out = [...document.querySelectorAll(".js-plotly-plot")].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll("text")].filter((text) => {
    const own = text.getBoundingClientRect();
    const across = own.left < box.left - 1 || own.right > box.right + 1;
    return own.width && (across || own.top < box.top - 1 || own.bottom > box.bottom + 1);
  }).map((text) => text.textContent);
});
return [...wide.map((node) => node.id), ...out];
"""
"""Tables that have to be scrolled sideways, and words of figures that stick out."""


@pytest.mark.parametrize(
    ("theme", "width", "phone"), [("light", 1280, False), ("dark", 1280, False), ("light", 390, True)]
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
    if not phone:
        assert browser.run(CUT) == []
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 19, 24)" if theme == "dark" else "rgb(246, 247, 249)")
    assert browser.log("browser") == []


def test_choosing_another_folder(report: tuple[Browser, Path, Results]) -> None:
    browser, _, _ = report
    browser.view(1200, 900)
    choose(browser, "#chooser select", 3)
    assert rows(browser) == ["pcgrad"]
    alerts, known = browser.run(
        "return [[...document.querySelectorAll('.alert')].map(a => a.textContent), study.warnings]"
    )
    assert alerts == known
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
