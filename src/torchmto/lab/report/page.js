"use strict";
/* Draws the report from the JSON in #report-data. Text from runs only ever reaches the page through textContent, and
   Plotly, whose labels know some HTML, through `safe`. Tables are sorted by sortable.js. */

const report = JSON.parse(document.getElementById("report-data").textContent);

// ------------------------------------------------------------------------------------------------ small helpers

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const note = (text, id = null) => el("p", { class: "note", id }, text);
const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, length = 26) => (String(text).length > length ? `${String(text).slice(0, length - 1)}…` : String(text));
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const own = (object, key) => (object && Object.hasOwn(object, key) ? object[key] : undefined);
const dig = (object, ...keys) => keys.reduce(own, object);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const pairsOf = (names) => names.flatMap((first, index) => names.slice(index + 1).map((second) => [first, second]));

function number(value, digits = 4) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2).replaceAll("-", "−").replace("e+", "e");
  const text = Number.isInteger(value) ? String(value) : value.toPrecision(Math.max(digits, Math.floor(Math.log10(size)) + 1));
  return text.replace("-", "−");
}
const signed = (value, digits = 2) => (isNumber(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}` : "–");
const pText = (p) => (isNumber(p) ? (p < 0.001 ? "< 0.001" : p.toFixed(3)) : "–");

/** The mean of numbers, lists and mappings, entry by entry; of anything else the first. */
function average(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  if (!known.length) return null;
  if (known.every(isNumber)) return mean(known);
  if (Array.isArray(known[0])) return known[0].map((_, index) => average(known.map((value) => value[index])));
  if (typeof known[0] === "object") return Object.fromEntries(Object.keys(known[0]).map((key) => [key, average(known.map((value) => own(value, key)))]));
  return known[0];
}

/** A text with its middle left out where it is too long: the ends of methods' names are what differs. */
function fit(text, length) {
  if (text.length <= length) return text;
  const tail = Math.ceil((length - 1) * 0.6);
  return `${text.slice(0, length - 1 - tail)}…${text.slice(-tail)}`;
}

/** A name that may be broken after brackets, commas, underscores and the dots between words. */
const breakable = (name) => String(name).split(/(?<=[(,=_]|[a-z]\.)/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));

function select(label, options, value, change) {
  const node = el("select", { onchange: (event) => change(options[event.target.selectedIndex][0]) });
  options.forEach(([key, text]) => node.append(el("option", { selected: key === value }, text)));
  return el("label", {}, label, node);
}
const controls = (...children) => el("div", { class: "controls" }, ...children);

// ------------------------------------------------------------------------------------------------------- saving

const slug = (...names) => names.join("-").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 80);

function download(name, address) {
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

function save(name, kind, text) {
  const address = URL.createObjectURL(new Blob([text], { type: kind }));
  download(name, address);
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

const tool = (text, label, onclick) => el("button", { type: "button", class: "tool", title: label, "aria-label": label, onclick }, text);

const TEX = {
  "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "±": "$\\pm$",
  "−": "$-$", "–": "--", "Δ": "$\\Delta$", "×": "$\\times$", "≤": "$\\leq$", "…": "\\dots{}", "<": "$<$", ">": "$>$", "▲": "$\\blacktriangle$", "▼": "$\\blacktriangledown$",
};
const tex = (text) => text.replace(/[\\~^↑↓±−–Δ×≤…<>▲▼]|[&%$#_{}]/g, (letter) => TEX[letter] ?? `\\${letter}`);

// ------------------------------------------------------------------------------------------------------- colours

/* Methods have full colours and squares in legends, tasks earthen ones and rings: farthest from one another in OKLab, and three
   times as dark or light as the card. */
const METHOD_COLOURS = {
  light: ["#3967b3", "#f4430c", "#297d0f", "#951d52", "#cb4ed4", "#7315b3", "#d71f75", "#7e55f0", "#17a478", "#1997cf"],
  dark: ["#6898e8", "#7adb29", "#ed3726", "#ff99c2", "#239d6a", "#d53daf", "#f28f29", "#2fd4ec", "#9d5bf4", "#e573ff"],
};
const TASK_COLOURS = {
  light: ["#053631", "#9a8165", "#a288a3", "#59373f", "#62908d", "#402712", "#525574", "#6e513d", "#28465a", "#707062"],
  dark: ["#efe9c3", "#628f94", "#cdcdf1", "#a17d6d", "#97c2b5", "#7c6b7d", "#efc7b9", "#607a60", "#c3f1fd", "#a39e91"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon", "pentagon", "triangle-down"];
const darkness = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const narrow = () => innerWidth < 640;

function colour(palettes, index) {
  const palette = palettes[darkness.matches ? "dark" : "light"];
  const [saturation, lightness] = [palettes === TASK_COLOURS ? 14 : 65, (darkness.matches ? 68 : 40) + 6 * (Math.floor(index / 10) % 3)];
  return index < palette.length ? palette[index] : `hsl(${Math.round((index * 137.5) % 360)} ${saturation}% ${lightness}%)`;
}

function faded(text, alpha) {
  const probe = el("span", { style: `color:${text}` });
  document.body.append(probe);
  const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
  probe.remove();
  return `rgba(${red},${green},${blue},${alpha})`;
}

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function scale(bipolar) {
  const middle = darkness.matches ? "#20262e" : "#f7f7f7";
  if (!bipolar) return [[0, middle], [1, variable("--accent")]];
  return darkness.matches
    ? [[0, "#ff8a5c"], [0.5, middle], [1, "#5aa9ff"]]
    : [[0, "#b3400f"], [0.25, "#f0a884"], [0.5, middle], [0.75, "#8cbbe6"], [1, "#0b62b8"]];
}

/** Names beside their colours. */
const key = (entries, kind = "") => el("div", { class: "chips", role: "list" }, entries.map(([name, shade]) =>
  el("span", { class: "chip plain", role: "listitem" }, el("span", { class: `swatch ${kind}`, style: `--shade:${shade}` }), el("span", {}, breakable(name)))));
const taskLegend = (names = tasksOf()) => key(names.map((name, index) => [name, colour(TASK_COLOURS, index)]), "task");

/** The colours of the methods that are shown. */
function methodLegend(baseline) {
  const node = el("div");
  charts.push({ node, draw: () => {
    const entries = shown().map((name) => [name, methodColour(name)]);
    node.replaceChildren(key(baseline ? [...entries, ["single-task models", baseline()]] : entries));
  } });
  return node;
}

// ------------------------------------------------------------------------------------------------ charts and tables

/** What is drawn again when the theme or the choice of methods changes: [{node, draw}]. */
let charts = [];
function redraw(within = document) {
  charts = charts.filter(({ node }) => node.isConnected);
  charts.filter(({ node }) => within.contains(node)).forEach(({ draw }) => draw());
}

/** A figure; `draw()` gives {data, xaxis, yaxis, and more of the layout}. It can be saved as PNG and SVG. */
function chart({ caption, about, height = 300, label, draw }) {
  const box = el("div", { class: "chart", style: `height:${height}px` });
  const store = (format) => Plotly.downloadImage(
    { data: box.data, layout: { ...box.layout, paper_bgcolor: variable("--card") } },
    { format, scale: format === "png" ? 3 : 1, width: box.clientWidth, height, filename: slug(study.title, label) });
  const caption_ = el("figcaption", {}, el("span", {}, caption, about ? el("small", {}, ` ${about}`) : null),
    el("span", { class: "tools" }, ["PNG", "SVG"].map((kind) => tool(kind, `Save as ${kind}: ${label}`, () => store(kind.toLowerCase())))));
  const axis = () => ({ gridcolor: variable("--line"), zerolinecolor: variable("--soft"), linecolor: variable("--line"), automargin: true });
  charts.push({ node: box, draw: () => {
    const { data, xaxis, yaxis, ...layout } = draw();
    Plotly.react(box, data, {
      height, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 14, t: 10, b: 44 },
      font: { color: variable("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { align: "left", namelength: 60 }, dragmode: touch.matches ? false : "zoom", ...layout,
      xaxis: { ...axis(), ...xaxis }, yaxis: { ...axis(), ...yaxis },
    }, { responsive: true, displayModeBar: false });
  } });
  return el("figure", { role: "group", "aria-label": label }, caption_, box);
}

const title = (text) => ({ title: { text: safe(text), standoff: 8 } });

/** A method's name beside a row of a chart: its options on a line of their own where the name is long. */
function rowLabel(name) {
  const limit = narrow() ? 19 : 30;
  const cut = name.indexOf("(");
  if (name.length <= limit || cut <= 0) return safe(fit(name, limit));
  return `${safe(fit(name.slice(0, cut), limit))}<br>${safe(fit(name.slice(cut), limit))}`;
}

/** The axis of a chart with one row per method, from the bottom up. */
const rowAxis = (names) => ({ tickvals: names.map((_, row) => row), ticktext: names.map(rowLabel), tickfont: { size: 11 }, range: [-0.6, names.length - 0.4], zeroline: false });

const bars = (size, shade) => ({ type: "data", array: [size ?? 0], visible: isNumber(size), color: shade, thickness: 2, width: 5 });

/** One method as a point of a chart. */
function point(name, x, y, { open = false, hover, ...more }) {
  const shade = methodColour(name);
  return { type: "scatter", mode: "markers", name: safe(name), x: [x], y: [y],
    marker: { size: 11, symbol: methodSymbol(name) + (open ? "-open" : ""), color: shade, line: { width: open ? 2 : 0, color: shade } }, hovertemplate: `${hover}<extra>%{fullData.name}</extra>`, ...more };
}

/** A row per method with a mean, its interval and whatever `more(name, row)` adds. */
function forest(known, of, { label, axis, unit, open = () => false, more = () => [] }) {
  return chart({ height: 90 + 38 * known.length, label, draw: () => {
    const names = known.filter((name) => !hidden.has(name)).sort((a, b) => of(a).mean - of(b).mean);
    return {
      data: [...names.map((name, row) => point(name, of(name).mean, row, {
        open: open(name), error_x: bars(of(name).ci95, methodColour(name)),
        hover: `%{x:+.3f} ${unit}${isNumber(of(name).ci95) ? ` ± ${of(name).ci95.toFixed(3)}` : ""}`,
      })), ...names.flatMap(more)],
      xaxis: { ...title(axis()), zeroline: true, zerolinewidth: 2, rangemode: "tozero" }, yaxis: rowAxis(names),
    };
  } });
}

const MOST_BANDS = 6;

/** Lines: `series()` gives [{name, x, y, shade, dash, low, high}]; with low and high a band where there are few. */
function lineChart({ series, xaxis, yaxis, unit = "step", format = ".4~g", ...about }) {
  return chart({ ...about, draw: () => {
    const list = series();
    const banded = list.filter(({ low }) => low).length <= MOST_BANDS;
    return {
      data: list.flatMap(({ name, x, y, low, high, shade, dash = "solid", shape = "linear" }) => [
        ...(low && banded ? [{ type: "scatter", mode: "lines", x: [...x, ...x.toReversed()], y: [...high, ...low.toReversed()], fill: "toself",
          fillcolor: faded(shade, 0.13), line: { width: 0 }, hoverinfo: "skip" }] : []),
        { type: "scatter", mode: x.length < 40 ? "lines+markers" : "lines", x, y, name: safe(name), line: { color: shade, width: 2, dash, shape }, marker: { size: 5 },
          hovertemplate: `${safe(unit)} %{x:.4~g}: %{y:${format}}<extra>%{fullData.name}</extra>` }]),
      xaxis, yaxis,
    };
  } });
}

/** A matrix: `draw()` gives {z, text, customdata, and more of the trace}. */
const heat = (rows, labels, { xlabel, ylabel, ...trace }, extra = []) => ({
  data: [{ type: "heatmap", x: labels.map((_, index) => index), y: rows.map((_, index) => index), xgap: 1, ygap: 1, ...trace }, ...extra],
  xaxis: { ...title(xlabel), tickvals: labels.map((_, index) => index), ticktext: labels.map((name) => safe(short(name, 18))), range: [-0.5, labels.length - 0.5], showgrid: false, zeroline: false },
  yaxis: { ...title(ylabel), tickvals: rows.map((_, index) => index), ticktext: rows.map((name) => safe(short(name, 28))), range: [rows.length - 0.5, -0.5], showgrid: false, zeroline: false },
});

/** A cell: what is shown, the number behind it, its spread, and small lines or nodes below it. */
const cell = (value, text, more = {}) => ({ value: isNumber(value) ? value : null, text, ...more });

/**
 * A table. It sorts by a click on a heading, hides the rows of methods that aren't shown, and can be saved as CSV, with all digits, and as
 * LaTeX.
 * columns: [{key, name, sub}], the first one the rows' names. rows, foot: [{name, cells, method}].
 */
function dataTable({ id, label, columns, rows, foot = [], sort, kind = "", filter }) {
  const head = columns.map(({ key: name, name: text, sub }) => el("th", {
    scope: "col", tabindex: "0", "data-key": name, "aria-sort": name === sort ? "descending" : null,
    onkeydown: (event) => { if (event.key === "Enter") event.currentTarget.click(); },
  }, el("span", { class: "heading" }, breakable(text)), sub ? el("small", {}, sub) : null));
  const line = ({ name, cells, method: of }) => el("tr", { "data-method": of }, el("th", { scope: "row" }, breakable(name)), cells.map(({ value, text, spread, small = [], mark, counts, long }) =>
    el("td", { class: [mark, long ? "long" : null].filter(Boolean).join(" ") || null, title: isNumber(value) ? String(value) : null, "data-value": isNumber(value) ? String(value) : "",
      "data-sort": isNumber(value) ? String(value) : text === "–" ? "" : text, "data-counts": counts },
    text, isNumber(spread) || small.length ? el("small", {}, isNumber(spread) ? `± ${number(spread, 2)} ` : null, small) : null)));
  const byNode = new Map(rows.map((row) => [line(row), row]));
  const body = el("tbody", {}, [...byNode.keys()]);
  const node = el("table", { class: `sortable n-last ${kind}` }, el("thead", {}, el("tr", {}, head)), body, foot.length ? el("tfoot", {}, foot.map(line)) : null);
  const visible = () => [...[...node.tBodies[0].rows].filter((row) => !row.hidden).map((row) => byNode.get(row)), ...foot];
  const heads = columns.map(({ name, sub }) => (sub ? `${name} (${sub})` : name));
  const spreads = columns.map((_, index) => index > 0 && rows.some((row) => isNumber(row.cells[index - 1].spread)));
  const csv = () => {
    const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [heads.flatMap((text, index) => (spreads[index] ? [text, `${text} ±`] : [text])),
      ...visible().map(({ name, cells }) => [name, ...cells.flatMap(({ value, text, spread }, index) => [isNumber(value) ? String(value) : text === "–" ? "" : text, ...(spreads[index + 1] ? [isNumber(spread) ? String(spread) : ""] : [])])])];
    return `${lines.map((list) => list.map(quoted).join(",")).join("\n")}\n`;
  };
  const latex = () => {
    const shownCell = ({ text, spread, mark }) => { const found = tex(`${text}${isNumber(spread) ? ` ± ${number(spread, 2)}` : ""}`); return mark === "best" ? `\\textbf{${found}}` : found; };
    const lines = visible().map(({ name, cells }) => [tex(name), ...cells.map(shownCell)].join(" & "));
    return ["\\begin{tabular}{l" + (kind === "texts" ? "l" : "r").repeat(columns.length - 1) + "}", "\\toprule", `${heads.map(tex).join(" & ")} \\\\`, "\\midrule", ...lines.map((text) => `${text} \\\\`), "\\bottomrule", "\\end{tabular}", ""].join("\n");
  };
  const holder = el("div", { class: "scroll", id, tabindex: "0", role: "region", "aria-label": label }, node);
  charts.push({ node: holder, draw: () => byNode.forEach(({ method: of }, row) => { row.hidden = of !== undefined && (hidden.has(of) || Boolean(filter && !filter(of))); }) });
  return el("div", { class: "table" }, el("div", { class: "tools" },
    tool("CSV", `Save as CSV: ${label}`, () => save(`${slug(study.title, label)}.csv`, "text/csv", csv())),
    tool("LaTeX", `Save as LaTeX: ${label}`, () => save(`${slug(study.title, label)}.tex`, "text/x-tex", latex()))), holder);
}

/** A table with a row per method, best first. */
function methodTable({ columns, names, cells, sort, ...more }) {
  const column = columns.find((entry) => entry.key === sort);
  const ordered = column ? names.toSorted((a, b) => (column.value(b) ?? -Infinity) - (column.value(a) ?? -Infinity)) : names;
  return dataTable({ columns: [{ key: "name", name: "method" }, ...columns], sort, rows: ordered.map((name) => ({ name, method: name, cells: columns.map((entry) => cells(entry, name)) })), ...more });
}

// --------------------------------------------------------------------------------------------- the state of a page

let study = report.studies[0];
let hidden = new Set();

const tasksOf = () => study.task_names;
const taskInfo = (task) => own(study.results.tasks, task);
const primary = (task) => taskInfo(task).primary_metric;
const higher = (task, metric) => dig(taskInfo(task), "metrics", metric, "higher_is_better");
const method = (name) => own(study.results.methods, name);
const place = (name) => study.method_names.indexOf(name);
const methodColour = (name) => colour(METHOD_COLOURS, place(name));
const methodDash = (name) => DASHES[Math.floor(place(name) / 10) % DASHES.length];
const methodSymbol = (name) => SYMBOLS[place(name) % SYMBOLS.length];
const shown = () => study.method_names.filter((name) => !hidden.has(name));
const runsOf = (name) => study.runs.filter((run) => run.task === null && run.method === name);
const single = (task, metric) => dig(study.results.single_task, "tasks", task, metric, "mean");
const direction = (task, metric) => (higher(task, metric) ? "↑" : "↓");
const timeAxis = (unit) => ({ ...title(unit), ...(unit === "epoch" && study.longest < 12 ? { dtick: 1 } : {}) });
const deltaOf = (name) => dig(method(name), "delta_m");
const versus = () => study.results.versus;
const significant = (difference) => isNumber(difference?.p_holm) && difference.p_holm < 0.05;
const seeded = (spread) => (study.seeds > 1 ? spread : null);

// ---------------------------------------------------------------------------------------------- the main comparison

function comparedCell({ task, metric, value }, name, best) {
  const found = value(name);
  const mark = isNumber(found) && found === best ? "best" : null;
  if (task === undefined) {
    if (!isNumber(found)) return cell(null, "–", { small: [el("a", { href: "#delta" }, "why")] });
    return cell(found, signed(found), { mark, spread: deltaOf(name).ci95, small: isNumber(deltaOf(name).ci95) ? [] : ["one seed"] });
  }
  const base = single(task, metric);
  const change = isNumber(base) && isNumber(found) && base !== 0 ? ((higher(task, metric) ? 1 : -1) * (found - base) * 100) / Math.abs(base) : null;
  return cell(found, number(found), { mark, spread: seeded(dig(method(name), "tasks", task, metric, "std")),
    small: change === null ? [] : [el("span", { class: change < 0 ? "down" : "up" }, `${change < 0 ? "▼" : "▲"} ${Math.abs(change).toFixed(1)} %`)] });
}

function tableSection(card) {
  let text = "";
  let all = false;
  const holder = el("div");
  const count = el("output", { id: "row-count", "aria-live": "polite" });
  const matches = (name) => name.toLowerCase().includes(text.toLowerCase());
  const say = () => { count.textContent = `${shown().filter(matches).length} of ${study.method_names.length} methods`; };
  const build = () => {
    const columns = [{ key: "delta_m", name: "Δm", sub: "%", up: true, value: (name) => deltaOf(name)?.mean },
      ...tasksOf().flatMap((task, index) => (all ? study.metric_names[index] : [primary(task)]).map((metric) => ({
        key: `${task}\n${metric}`, name: task, sub: `${metric} ${direction(task, metric)}`, up: higher(task, metric), task, metric,
        value: (name) => dig(method(name), "tasks", task, metric, "mean"),
      })))];
    const best = new Map(columns.map((column) => {
      const values = study.method_names.map(column.value).filter(isNumber);
      return [column, values.length < 2 ? null : (column.up ? Math.max : Math.min)(...values)];
    }));
    const base = study.results.single_task && { name: "single-task models", cells: columns.map(({ task, metric }) => (task === undefined ? cell(0, "0")
      : cell(single(task, metric), number(single(task, metric)), { spread: seeded(dig(study.results.single_task, "tasks", task, metric, "std")) }))) };
    holder.replaceChildren(methodTable({ id: "comparison", label: "Comparison of methods", columns, names: study.method_names, sort: "delta_m",
      cells: (column, name) => comparedCell(column, name, best.get(column)), foot: base ? [base] : [], filter: matches }));
    redraw(holder);
  };
  card.append(controls(
    el("label", {}, "filter", el("input", { type: "search", id: "filter", placeholder: "name contains …", oninput: (event) => { text = event.target.value; say(); redraw(holder); } })),
    select("metrics", [[false, "one per task"], [true, "all"]], false, (value) => { all = value; build(); }), count), holder);
  build();
  charts.push({ node: count, draw: say });
}

function deltaSection(card) {
  const known = study.method_names.filter((name) => isNumber(deltaOf(name)?.mean));
  const without = study.method_names.filter((name) => !known.includes(name));
  if (study.baseline) card.append(note(`Relative to: ${study.baseline}.`));
  if (without.length) card.append(note(whyNoDelta(without), "no-delta"));
  if (!known.length) return;
  card.append(forest(known, deltaOf, {
    label: "Δm of every method with its confidence interval", axis: () => (narrow() ? "Δm, %" : "Δm, % (0: as good as single-task models)"), unit: "%",
    more: (name, row) => {
      const values = deltaOf(name).per_seed;
      return [{ type: "scatter", mode: "markers", x: values, y: values.map(() => row), name: safe(name), customdata: values.map((_, seed) => seed),
        marker: { size: 7, symbol: "line-ns-open", color: methodColour(name), line: { width: 1.5 } }, hovertemplate: "seed %{customdata}: %{x:.3f} %<extra>%{fullData.name}</extra>" }];
    },
  }));
}

function whyNoDelta(names) {
  const reasons = new Map();
  for (const name of names) {
    const reason = method(name).reason ?? "there are no single-task values";
    reasons.set(reason, [...(reasons.get(reason) ?? []), name]);
  }
  const text = [...reasons].map(([reason, list]) => `No Δm for ${list.join(", ")}: ${reason.replace(/\.?$/, ".")}`).join(" ");
  const advice = text.includes("among the folders")
    ? " Δm needs a single-task run of every task on the same data (torchmto train with one task in data.tasks), or a comparison on it: give their folders to torchmto report, too." : "";
  return text + advice;
}

// ------------------------------------------------------------------------------------- against a reference, and ranks

function versusSection(card) {
  const { reference, methods } = versus();
  const of = (name) => own(methods, name);
  const others = study.method_names.filter((name) => name !== reference);
  const known = others.filter((name) => of(name).delta_m);
  card.append(note(study.seeds > 1
    ? `Differences to ${reference}, run by run with the same seed. p: paired t tests over ${study.seeds} seeds, by Holm's procedure for the ${others.length} methods (Δm), and for all methods and tasks (tasks, where * stands for p < 0.05).`
    : `Differences to ${reference}. One seed: no intervals and no tests.`));
  if (known.length) {
    card.append(forest(known, (name) => of(name).delta_m, { label: `Differences of Δm to ${reference} with confidence intervals`, axis: () => `Δm minus that of ${fit(reference, 22)}, points`,
      unit: "points", open: (name) => !significant(of(name).delta_m) }));
    if (study.seeds > 1) card.append(note("Filled marks: significant at 5 %. Bars: 95 % confidence interval, not corrected."));
  }
  const columns = [
    ...(known.length ? [{ key: "difference", name: `Δm − ${short(reference, 24)}`, sub: "points", value: (name) => of(name).delta_m?.mean }, { key: "p", name: "p", sub: "Holm" }] : []),
    { key: "wins", name: "wins–ties–losses", sub: "tasks × seeds" },
    ...tasksOf().map((task) => ({ key: `task\n${task}`, name: task, sub: `${primary(task)}, change in %`, task })),
  ];
  const alone = study.seeds > 1 ? [] : ["one seed"];
  card.append(methodTable({ id: "versus-table", label: `Methods against ${reference}`, columns, names: others, sort: "difference", cells: ({ key: name, task }, row) => {
    const { delta_m: delta, wins_ties_losses: counts } = of(row);
    if (name === "difference") return cell(delta?.mean, signed(delta?.mean), { spread: delta?.ci95, small: alone });
    if (name === "p") return cell(delta?.p_holm, pText(delta?.p_holm));
    if (name === "wins") return cell(counts[0] - counts[2], counts.join("–"), { counts: counts.join(" ") });
    const { change, wins_ties_losses: own_ } = own(of(row).tasks, task);
    return cell(change?.mean, `${signed(change?.mean, 1)}${significant(change) ? "*" : ""}`, { spread: change?.ci95, small: [...alone, el("br"), own_.join("–")], counts: own_.join(" "),
      mark: significant(change) ? (change.mean < 0 ? "down" : "up") : null });
  } }));
}

/** Runs of neighbours (by rank) that are less than the critical difference apart, the longest ones only: [[first, last]]. */
function cliques(ranks, critical) {
  const found = [];
  ranks.forEach((rank, first) => {
    let last = first;
    while (last + 1 < ranks.length && ranks[last + 1] - rank <= critical) last += 1;
    if (last > first && !(found.length && found.at(-1)[1] >= last)) found.push([first, last]);
  });
  return found;
}

function ranksSection(card) {
  const views = [["seeds", "Δm of each seed"], ["tasks", "each task of each seed"]].filter(([name]) => versus().ranks[name]);
  let view = views[0][0];
  const about = note("", "rank-test");
  const list = el("ol", { class: "visually-hidden", "aria-label": "Mean ranks" });
  const count = study.method_names.length;
  const figure = chart({ height: 120 + 36 * count, label: "Mean ranks of the methods, with the critical difference", draw: () => {
    const { average: ranks, critical_difference: critical, blocks } = versus().ranks[view];
    const names = shown().sort((a, b) => ranks[a] - ranks[b]);
    const groups = isNumber(critical) && blocks > 1 ? cliques(names.map((name) => ranks[name]), critical) : [];
    const ruler = isNumber(critical) && critical <= count - 1;
    about.textContent = rankText(view, versus().ranks[view]);
    list.replaceChildren(...names.map((name) => el("li", { "data-method": name, "data-value": String(ranks[name]) }, `${name}: ${ranks[name].toFixed(2)}`)));
    const ink = variable("--ink");
    const beside = (index) => count + 0.25 + (0.22 * (count - 1) / 6 + 0.06) * (index + 0.5);
    const data = names.map((name, row) => point(name, ranks[name], row, { hover: `mean rank %{x:.3f} in ${blocks} blocks`, mode: "markers+text", text: [ranks[name].toFixed(2)],
      textposition: ranks[name] > (count + 1) / 2 ? "middle left" : "middle right", textfont: { size: 11, color: variable("--soft") }, cliponaxis: false }));
    groups.forEach(([first, last], index) => data.push({ type: "scatter", mode: "lines", x: [beside(index), beside(index)], y: [first - 0.3, last + 0.3], line: { width: 5, color: variable("--soft") }, cliponaxis: false,
      hovertemplate: `${names.slice(first, last + 1).map((name) => safe(short(name, 40))).join("<br>")}<br>not significantly different<extra></extra>` }));
    if (ruler) data.push({ type: "scatter", mode: "lines+markers+text", x: [1, 1 + critical], y: [-1, -1], line: { width: 2, color: ink }, marker: { symbol: "line-ns", size: 9, line: { width: 2, color: ink } },
      text: ["", ` critical difference ${critical.toFixed(2)}`], textposition: 1 + critical > (count + 1) / 2 ? "top left" : "middle right", textfont: { size: 11 }, cliponaxis: false, hoverinfo: "skip" });
    return {
      data, yaxis: { ...rowAxis(names), range: [names.length - 0.4, ruler ? -1.7 : -0.6] },
      xaxis: { ...title("mean rank (1: best)"), range: [0.8, beside(groups.length) + 0.1], zeroline: false,
        tickvals: Array.from({ length: count }, (_, index) => index + 1).filter((tick) => count <= 12 || tick % 5 === 0 || tick === 1) },
    };
  } });
  if (views.length > 1) card.append(controls(select("ranked by", views, view, (value) => { view = value; redraw(figure); })));
  card.append(about, figure, list);
}

function rankText(view, { blocks, friedman, critical_difference: critical }) {
  const count = study.method_names.length;
  const parts = [];
  if (friedman) {
    parts.push(`Friedman's test over ${blocks} blocks: χ² = ${friedman.statistic.toFixed(2)} with ${count - 1} degrees of freedom, p ${friedman.p < 0.001 ? "< 0.001" : `= ${friedman.p.toFixed(3)}`}${friedman.p < 0.05 ? "." : ": no evidence that the methods differ at all."}`);
  } else if (blocks < 2 || count < 3) {
    parts.push(`${blocks} block${blocks === 1 ? "" : "s"}, ${count} method${count === 1 ? "" : "s"}: too few for Friedman's test.`);
  } else parts.push(`In all ${blocks} blocks all methods tie.`);
  if (blocks > 1 && isNumber(critical)) {
    parts.push(critical <= count - 1
      ? `Methods beside the same grey bar are less than the critical difference of ${critical.toFixed(2)} apart (Nemenyi's test at 5 %): their order isn't settled.`
      : `The critical difference (${critical.toFixed(2)}) is longer than the whole scale: ${blocks} blocks can't tell any two of ${count} methods apart.`);
  }
  if (view === "tasks" && study.seeds * tasksOf().length > 1) parts.push("Tasks of one run aren't independent of one another, so that these tests are too optimistic.");
  return parts.join(" ");
}

const UNITS = [["batches", "batches", "batches"], ["optimizer_steps", "optimizer steps", "steps"], ["seconds", "training time", "s"]];

function budgetsSection(card) {
  const { budgets } = versus();
  const columns = UNITS.map(([name, text, unit]) => ({ key: name, name: `equal ${text}`, sub: `≤ ${number(budgets[name].limit, 3)} ${unit}`, value: (row) => dig(budgets, name, "methods", row, "mean") }));
  const best = new Map(columns.map((column) => [column, Math.max(...study.method_names.map(column.value).filter(isNumber))]));
  card.append(methodTable({ id: "budget-table", label: "Best validation Δm within equal budgets", columns, names: study.method_names, sort: "batches", cells: (column, name) => {
    const value = column.value(name);
    if (!isNumber(value)) return cell(null, "–", { small: [el("span", { class: "reason" }, "no epoch within it")] });
    return cell(value, signed(value), { spread: dig(budgets, column.key, "methods", name, "ci95"), mark: value === best.get(column) ? "best" : null });
  } }));
}

function tradeoff([first, second]) {
  const value = (name, task) => dig(method(name), "tasks", task, primary(task), "mean");
  const axis = (task) => ({ ...title(`${short(task, 22)}: ${primary(task)} ${direction(task, primary(task))}`), autorange: higher(task, primary(task)) ? true : "reversed", zeroline: false });
  return chart({ caption: `${first} / ${second}`, label: `Trade-off between ${first} and ${second}`, draw: () => {
    const spread = (name, task) => bars(seeded(dig(method(name), "tasks", task, primary(task), "std")), faded(methodColour(name), 0.5));
    const data = shown().map((name) => point(name, value(name, first), value(name, second), { error_x: spread(name, first), error_y: spread(name, second), hover: "%{x:.4~g}, %{y:.4~g}" }));
    const base = [single(first, primary(first)), single(second, primary(second))];
    if (base.every(isNumber)) data.push({ type: "scatter", mode: "markers", name: "single-task models", x: [base[0]], y: [base[1]], marker: { size: 12, symbol: "star-diamond", color: variable("--ink") },
      hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>%{fullData.name}</extra>" });
    return { data, xaxis: axis(first), yaxis: axis(second) };
  } });
}

function tradeoffSection(card) {
  card.append(methodLegend(study.results.single_task ? () => variable("--ink") : null));
  const names = tasksOf();
  const pairs = pairsOf(names);
  const grid = el("div", { class: "grid" }, (pairs.length <= 6 ? pairs : pairs.slice(0, 1)).map(tradeoff));
  if (pairs.length > 6) {
    const chosen = pairs[0];
    const build = (side, value) => { chosen[side] = value; grid.replaceChildren(tradeoff(chosen)); redraw(grid); };
    const options = names.map((name) => [name, name]);
    card.append(controls(select("across", options, chosen[0], (value) => build(0, value)), select("upwards", options, chosen[1], (value) => build(1, value))));
  }
  card.append(grid);
}

// ------------------------------------------------------------------------------------------------------ over time

/** Mean, lowest and highest of several runs at each of their validations; where those are is a mean, too. */
function curve(runs, pick, unit = "at") {
  const moments = new Map();
  for (const run of runs) {
    for (const entry of run.history) {
      const value = pick(entry);
      if (isNumber(value) && isNumber(entry[unit])) moments.set(entry.at, [...(moments.get(entry.at) ?? []), [entry[unit], value]]);
    }
  }
  const found = [...moments].sort(([a], [b]) => a - b).map(([, list]) => [mean(list.map(([x]) => x)), list.map(([, value]) => value)]);
  const band = runs.length > 1 ? { low: found.map(([, values]) => Math.min(...values)), high: found.map(([, values]) => Math.max(...values)) } : {};
  return { x: found.map(([x]) => x), y: found.map(([, values]) => mean(values)), ...band };
}

const methodCurves = (pick, unit) => shown().map((name) => ({ name, shade: methodColour(name), dash: methodDash(name), ...curve(runsOf(name), pick, unit) })).filter(({ x }) => x.length);

function curvesSection(card) {
  const points = study.runs.flatMap((run) => run.history);
  const kinds = [
    ...(points.some((entry) => entry.validation) ? [["primary", "validation, one metric per task"]] : []),
    ...(points.some((entry) => isNumber(entry.score)) ? [["score", "validation Δm"]] : []),
    ["loss", "training loss"],
  ];
  const axes = [["at", "epoch"], ["batches", "batches"], ["optimizer_steps", "optimizer steps"], ["seconds", "training time, s"]].filter(([name]) => points.some((entry) => isNumber(entry[name])));
  const pages = tasksOf().flatMap((_, start) => (start % 6 ? [] : [[start, tasksOf().slice(start, start + 6).map((task) => short(task, 14)).join(", ")]]));
  const chosen = { kind: kinds[0][0], axis: axes[0]?.[0] ?? "at", first: 0 };
  const grid = el("div", { class: "grid" });
  const oneChart = (task) => {
    const metric = task === null ? null : primary(task);
    const picks = { loss: (entry) => dig(entry.losses, task), primary: (entry) => dig(entry.validation, task, metric), score: (entry) => entry.score };
    const abouts = { loss: "training loss ↓", primary: task === null ? "" : `validation ${metric} ${direction(task, metric)}`, score: "validation Δm, % ↑" };
    const unit = axes.find(([name]) => name === chosen.axis)?.[1] ?? "epoch";
    const [pick, axis] = [picks[chosen.kind], chosen.axis];
    return lineChart({ caption: task ?? "all tasks", about: abouts[chosen.kind], height: task === null ? 380 : 270, label: `Learning curves of ${task ?? "Δm"}`, unit,
      xaxis: axis === "at" ? timeAxis(unit) : { ...title(unit), rangemode: "tozero" }, yaxis: { zeroline: chosen.kind === "score" },
      series: () => {
        const base = task === null ? [] : study.runs.filter((run) => run.task === task);
        return [...methodCurves(pick, axis), ...(base.length ? [{ name: "single-task model", shade: variable("--soft"), dash: "dash", ...curve(base, pick, axis) }] : [])];
      } });
  };
  const build = (change = {}) => {
    Object.assign(chosen, change);
    grid.replaceChildren(...(chosen.kind === "score" ? [null] : tasksOf().slice(chosen.first, chosen.first + 6)).map(oneChart));
    redraw(grid);
  };
  card.append(controls(
    select("curves", kinds, chosen.kind, (kind) => build({ kind })),
    axes.length > 1 ? select("over", axes, chosen.axis, (axis) => build({ axis })) : null,
    pages.length > 1 ? select("tasks", pages, 0, (first) => build({ first })) : null),
  methodLegend(study.runs.some((run) => run.task !== null) ? () => variable("--soft") : null), grid);
  build();
}

// --------------------------------------------------------------------------------------------------- single steps

const cosineOf = ({ names = [], cosines }, first, second) => dig(cosines, names.indexOf(first), names.indexOf(second)) ?? null;

/** A step with its groups and cosines in forms of which means can be taken. */
function prepared(step) {
  const groups = own(step.records, "groups");
  const together = groups && tasksOf().map((first) => tasksOf().map((second) => Number(groups.some((group) => group.includes(first) && group.includes(second)))));
  const pairs = step.cosines && pairsOf(tasksOf()).map((pair) => cosineOf(step, ...pair));
  return { ...step, pairs, records: { ...step.records, ...(groups ? { together, num_groups: groups.length } : {}) } };
}

/** The mean over seeds of a method's runs, at the steps that all of them recorded. */
function meanRun(runs, has) {
  const lists = runs.map((run) => new Map(run.trace.filter(has).map((step) => [step.step, prepared(step)])));
  const trace = [...lists[0].keys()].filter((step) => lists.every((list) => list.has(step))).map((step) => average(lists.map((list) => list.get(step))));
  return { trace, noise_floor: average(runs.map((run) => run.noise_floor)), many: runs.length };
}

/** What can be looked at: of each method the mean over its seeds, and every run: [[run with its trace, label]]. */
function tracedRuns(has) {
  return study.method_names.flatMap((name) => {
    const runs = runsOf(name).filter((run) => run.trace.some(has));
    const every = runs.map((run) => [{ ...run, trace: run.trace.filter(has).map(prepared), many: 1 }, study.seeds > 1 ? `${fit(name, 44)}, seed ${run.seed}` : name]);
    const whole = runs.length > 1 ? meanRun(runs, has) : { trace: [] };
    return whole.trace.length ? [[whole, `${fit(name, 40)}, mean over ${runs.length} seeds`], ...every] : every;
  });
}

/** A section that shows one run, or a mean over seeds, at a time. */
function perRun(card, has, fill) {
  const options = tracedRuns(has);
  const holder = el("div");
  const build = (run) => { holder.replaceChildren(); fill(holder, run, run.trace); redraw(holder); };
  card.append(controls(select("run", options, options[0][0], build)), holder);
  build(options[0][0]);
}

const record = (name) => (step) => own(step.records, name);
const unequal = (step) => step.weights && new Set(Object.values(step.weights)).size > 1;

const taskLines = (steps, pick, axis, label) => lineChart({ label, xaxis: title("step"), yaxis: axis, series: () => tasksOf().map((task, index) => ({
  name: task, x: steps.map(({ step }) => step), y: steps.map((step) => pick(step, task) ?? null), shade: colour(TASK_COLOURS, index), dash: DASHES[Math.floor(index / 10) % 5] })) });

/** A heat map of one moment, with a slider over all moments. */
function slider(holder, steps, { rows, columns, matrix, limit, bipolar = false, height, label, xlabel, ylabel, unit, id, dim = () => false }) {
  let index = steps.length - 1;
  const output = el("output", {}, "");
  const say = () => { output.textContent = `step ${steps[index].step} (${index + 1} of ${steps.length})`; input.setAttribute("aria-valuetext", output.textContent); };
  const input = el("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: index, id, "aria-label": `${label}: moment`, oninput: (event) => { index = Number(event.target.value); say(); redraw(figure); } });
  const figure = chart({ height, label, draw: () => {
    const z = matrix(steps[index]);
    const many = rows.length * columns.length > 150;
    const dimmed = (row, column) => dim(z[row]?.[column], column);
    const text = z.map((list, row) => list.map((value, column) => (isNumber(value) ? (dimmed(row, column) ? `(${number(value, 2)})` : number(value, 2)) : "")));
    const struck = many ? rows.flatMap((_, row) => columns.map((_, column) => [row, column])).filter(([row, column]) => dimmed(row, column)) : [];
    const strokes = { type: "scatter", mode: "markers", x: struck.map(([, column]) => column), y: struck.map(([row]) => row), hoverinfo: "skip", marker: { symbol: "line-ne", size: 9, line: { width: 1.5, color: variable("--soft") } } };
    return heat(rows, columns, {
      xlabel, ylabel, z, zmin: bipolar ? -limit : 0, zmax: limit, colorscale: scale(bipolar), text, texttemplate: many ? "" : "%{text}",
      customdata: rows.map((row) => columns.map((column) => `${safe(row)} → ${safe(column)}`)), hovertemplate: `%{customdata}<br>${unit} %{z:.3~g}<extra></extra>`,
      colorbar: { thickness: 12, outlinewidth: 0, tickformat: ".2~g", title: { text: `${unit}<br>\u00a0`, side: "top" } },
    }, struck.length ? [strokes] : []);
  } });
  say();
  holder.append(controls(el("label", { class: "slide" }, el("span", {}, "moment: ", output), input)), figure);
}

const square = () => Math.max(280, 90 + Math.min(40, Math.max(22, 340 / tasksOf().length)) * tasksOf().length);

function sharesSection(card) {
  card.append(taskLegend());
  perRun(card, record("priority_shares"), (holder, run, steps) => {
    holder.append(taskLines(steps, (step, task) => dig(step.records, "priority_shares", task), { ...title("share of channels led"), range: [0, 1] }, "Share of channels that each task leads"));
    const layered = steps.filter((step) => step.layers);
    if (!layered.length) return;
    const layers = layered.at(-1).layers.map(([name]) => name);
    holder.append(el("h3", {}, "By layer"));
    slider(holder, layered, { rows: layers, columns: tasksOf(), limit: 1, height: 110 + 26 * layers.length, label: "Share of each layer's channels that a task leads", xlabel: "task", ylabel: "", unit: "share", id: "layer-slider",
      matrix: (step) => { const found = new Map(step.layers); return layers.map((name) => tasksOf().map((task) => own(found.get(name), task) ?? null)); } });
  });
}

function weightsSection(card) {
  card.append(taskLegend());
  perRun(card, unequal, (holder, run, steps) => holder.append(taskLines(steps, (step, task) => own(step.weights, task), title("weight of the task's gradient"), "Weights of the tasks over time")));
}

function affinitySection(card) {
  perRun(card, record("affinity"), (holder, run, steps) => {
    const limit = Math.max(...steps.flatMap((step) => step.records.affinity.flat().filter(isNumber).map(Math.abs)), 1e-12);
    slider(holder, steps, { rows: tasksOf(), columns: tasksOf(), limit, bipolar: true, height: square(), label: "Affinity between tasks", xlabel: "effect on", ylabel: "step of", unit: "affinity", id: "affinity-slider",
      matrix: (step) => step.records.affinity,
      dim: (value, column) => isNumber(value) && isNumber(own(run.noise_floor, tasksOf()[column])) && Math.abs(value) < run.noise_floor[tasksOf()[column]] });
    holder.append(note(noiseText(run.noise_floor), "noise-floor"));
  });
}

function noiseText(floor) {
  const known = floor ? tasksOf().filter((task) => isNumber(own(floor, task))) : [];
  if (!known.length) return "No noise floor was measured, so small affinities here may be nothing but noise; task_groups(noise_floor=True) measures it, for one more forward pass per batch.";
  const sizes = known.map((task) => floor[task]);
  const marked = tasksOf().length ** 2 > 150 ? "struck through" : "in parentheses";
  const list = known.length <= 12 ? known.map((task) => `${task} ${number(floor[task], 2)}`).join(", ") : `from ${number(Math.min(...sizes), 2)} to ${number(Math.max(...sizes), 2)}`;
  if (!Math.max(...sizes)) return "Noise floor: 0. Without a step no loss moves, so that every affinity here is an effect of a step.";
  return `Noise floor, the mean absolute affinity of a step that changes nothing: ${list}. Affinities below that of the task they act on are ${marked}: in a single batch they can't be told from noise. As these are moving averages, their own noise is smaller.`;
}

function groupsSection(card) {
  perRun(card, record("groups"), (holder, run, steps) => {
    const names = tasksOf();
    if (run.many > 1) {
      holder.append(note(`How often two tasks are updated together: the share of ${run.many} seeds.`));
      slider(holder, steps, { rows: names, columns: names, limit: 1, height: square(), label: "Tasks in one group, share of seeds", xlabel: "", ylabel: "", unit: "share", id: "groups-slider", matrix: (step) => step.records.together });
    } else {
      const shades = () => names.flatMap((_, index) => [[index / names.length, colour(TASK_COLOURS, index)], [(index + 1) / names.length, colour(TASK_COLOURS, index)]]);
      const groupOf = ({ records }, task) => records.groups.find((group) => group.includes(task)) ?? [];
      const first = (group) => { const members = group.map((name) => names.indexOf(name)).filter((index) => index >= 0); return members.length ? Math.min(...members) + 0.5 : null; };
      holder.append(note("A group has the colour of its first task."), taskLegend(), chart({ height: 110 + 26 * names.length, label: "Groups of tasks over time", draw: () => {
        const { data, yaxis } = heat(names, [], { xlabel: "", ylabel: "", xgap: 0, ygap: 2, showscale: false, zmin: 0, zmax: names.length, colorscale: shades(), x: steps.map(({ step }) => step),
          z: names.map((task) => steps.map((step) => first(groupOf(step, task)))),
          customdata: names.map((task) => steps.map((step) => safe(groupOf(step, task).join(", ")))), hovertemplate: "step %{x}: %{customdata}<extra></extra>" });
        return { data, xaxis: title("step"), yaxis };
      } }));
    }
    holder.append(lineChart({ caption: "number of groups", height: 170, label: "Number of groups over time", xaxis: title("step"), yaxis: { rangemode: "tozero", dtick: Math.max(1, Math.ceil(names.length / 5)) },
      series: () => [{ name: "groups", x: steps.map(({ step }) => step), y: steps.map((step) => step.records.num_groups), shade: variable("--accent"), shape: "hv" }] }));
  });
}

const conflictShares = () => study.runs.some((run) => run.task === null && run.history.some((entry) => isNumber(entry.conflict_share)));
const hasCosines = (step) => Boolean(step.cosines || step.pairs);

function conflictsSection(card) {
  if (conflictShares()) {
    card.append(methodLegend(), lineChart({ caption: "share of pairs in conflict", about: "mean over each epoch, of methods that compare gradients", height: 260, label: "Share of task pairs with conflicting gradients", unit: "epoch",
      xaxis: timeAxis("epoch"), yaxis: { range: [-0.02, 1.02], tickformat: ".0%" }, series: () => methodCurves((entry) => entry.conflict_share) }));
  }
  if (!study.runs.some((run) => run.task === null && run.trace.some(hasCosines))) return;
  card.append(el("h3", {}, "Cosines between the tasks' gradients"));
  perRun(card, hasCosines, (holder, run, steps) => {
    const pairs = pairsOf(tasksOf()).map((pair) => pair.join(" / "));
    const every = steps.map((step) => (step.pairs ?? []).filter(isNumber));
    const over = (fold) => every.map((list) => (list.length ? fold(list) : null));
    const series = pairs.length <= 10 ? pairs.map((name, index) => [name, steps.map((step) => step.pairs?.[index] ?? null)])
      : [["mean", over(mean)], ["lowest", over((list) => Math.min(...list))], ["highest", over((list) => Math.max(...list))]];
    holder.append(taskLegend(series.map(([name]) => name)), lineChart({ label: "Cosines between gradients over time", format: ".3f", xaxis: title("step"), yaxis: { ...title("cosine"), range: [-1.05, 1.05] },
      series: () => series.map(([name, y], index) => ({ name, y, x: steps.map(({ step }) => step), shade: colour(TASK_COLOURS, index) })) }));
  });
}

// ---------------------------------------------------------------------------------------------- costs and settings

const COSTS = [
  ["seconds_per_batch", "time", "ms per batch", 1e3], ["num_forward", "forwards", "per batch", 1], ["num_backward", "backwards", "per batch", 1],
  ["num_optimizer_steps", "optimizer steps", "per batch", 1], ["peak_memory_bytes", "memory", "peak, MiB", 1 / 1048576],
];

function costSection(card) {
  const costOf = (name, cost) => dig(method(name), "cost", cost);
  const available = COSTS.filter(([name]) => study.method_names.some((entry) => isNumber(costOf(entry, name))));
  const base = own(study.results.single_task, "cost");
  const shownCost = (value, factor) => cell(value, number(isNumber(value) ? value * factor : null, 3));
  card.append(methodTable({ id: "cost-table", label: "Costs of every method", names: study.method_names, columns: available.map(([name, text, unit, factor]) => ({ key: name, name: text, sub: unit, factor })),
    cells: ({ key: name, factor }, row) => shownCost(costOf(row, name), factor),
    foot: base && Object.keys(base).length ? [{ name: "single-task models", cells: available.map(([name, , , factor]) => shownCost(own(base, name), factor)) }] : [] }));
  const grid = el("div", { class: "grid" }, available.map(([name, text, unit, factor]) => chart({ caption: text, about: unit, height: 60 + 34 * study.method_names.length, label: `Costs: ${text}`, draw: () => {
    const names = shown().filter((entry) => isNumber(costOf(entry, name))).toReversed();
    const values = names.map((entry) => costOf(entry, name) * factor);
    return {
      data: [{ type: "bar", orientation: "h", x: values, y: names.map((_, row) => row), marker: { color: names.map(methodColour) }, text: values.map((value) => number(value, 3)), textposition: "auto", customdata: names.map(safe), hovertemplate: "%{customdata}: %{x:.4~g}<extra></extra>" }],
      xaxis: { rangemode: "tozero" }, yaxis: { ...rowAxis(names), showgrid: false }, bargap: 0.3, margin: { l: 48, r: 14, t: 6, b: 30 },
    };
  } })));
  const timed = study.method_names.filter((name) => isNumber(costOf(name, "seconds_per_batch")) && isNumber(deltaOf(name)?.mean));
  if (timed.length > 1) {
    grid.append(chart({ caption: "Δm for the time", height: 60 + 34 * Math.max(6, study.method_names.length), label: "Δm against time per batch", draw: () => ({
      data: timed.filter((name) => !hidden.has(name)).map((name) => point(name, costOf(name, "seconds_per_batch") * 1e3, deltaOf(name).mean, { error_y: bars(deltaOf(name).ci95, faded(methodColour(name), 0.6)), hover: "%{x:.3~g} ms, Δm %{y:.2f} %" })),
      xaxis: { ...title("ms per batch"), rangemode: "tozero" }, yaxis: title("Δm, %"),
    }) }));
  }
  card.append(grid);
}

function flat(value, prefix = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) return Object.entries(value).flatMap(([name, entry]) => flat(entry, prefix ? `${prefix}.${name}` : name));
  return [[prefix, typeof value === "string" ? value : JSON.stringify(value, null, 1).replace(/\n */g, " ")]];
}

const textCells = (texts) => texts.map((text) => cell(null, text, { long: text.length > 32 }));
const textTable = (label, header, rows) => dataTable({ label, kind: "texts", columns: header.map((name, index) => ({ key: String(index), name })), rows: rows.map(([name, ...texts]) => ({ name, cells: textCells(texts) })) });

function settingsSection(card) {
  const { settings } = study;
  const pairs = (label, value) => textTable(label, ["setting", label], flat(value));
  if (settings.length > 1) {
    const columns = settings.map(([, value]) => new Map(flat(value)));
    const names = [...new Set(columns.flatMap((column) => [...column.keys()]))].filter((name) => new Set(columns.map((column) => column.get(name))).size > 1);
    card.append(el("h3", {}, "What differs"), textTable("What differs", ["setting", ...settings.map(([label]) => label)], names.map((name) => [name, ...columns.map((column) => column.get(name) ?? "–")])));
  }
  card.append(el("div", { class: "grid" }, settings.map(([label, value]) => (settings.length > 1 ? el("details", {}, el("summary", {}, `All settings: ${label}`), pairs(label, value)) : pairs(label, value))),
    pairs("Versions", study.results.versions ?? {})));
}

// ------------------------------------------------------------------------------------------------------ experiments

function findingsSection(card) {
  for (const { title: heading, header, rows, notes } of study.tables) card.append(el("h3", {}, heading), textTable(heading, header, rows), ...notes.map((text) => note(text)));
}

function plotsSection(card) {
  card.append(...study.plots.map(([name, png, svg]) => el("figure", { class: "plot" }, el("figcaption", {}, el("span", {}, name), el("span", { class: "tools" },
    [["PNG", png], ["SVG", svg]].filter(([, source]) => source).map(([kind, source]) => tool(kind, `Save as ${kind}: ${name}`, () => download(`${slug(study.title, name)}.${kind.toLowerCase()}`, source))))),
  el("img", { src: png, alt: `Plot ${name}` }))));
}

// -------------------------------------------------------------------------------------------------------- the page

const some = (has) => () => study.runs.some((run) => run.task === null && run.trace.some(has));
const SECTIONS = [
  ["findings", "Findings", "The tables of the experiment, as in its results.md.", () => Boolean(study.tables?.length), findingsSection],
  ["figures", "Plots", "The plots of the experiment, as in its folder.", () => Boolean(study.plots?.length), plotsSection],
  ["table", "Comparison", "Means over seeds ± standard deviation; Δm ± 95 % confidence interval. Small arrows: change to the single-task models. Bold: best mean, which alone doesn't make a difference significant. Click a heading to sort; hover a value for all its digits.", () => study.method_names.length > 0, tableSection],
  ["delta", "Δm", "Mean relative change of the tasks' primary metrics to single-task models. Marks: mean; bars: 95 % confidence interval over seeds; ticks: single seeds.", () => tasksOf().length > 1, deltaSection],
  ["versus", "Differences", "Each method against the reference, in runs of the same seed, which share initial weights and the order of the data.", () => Boolean(versus()) && study.method_names.length > 1, versusSection],
  ["ranks", "Ranks", "Mean rank of each method among all; 1 is best, ties share their ranks.", () => study.method_names.length > 1 && Boolean(versus()?.ranks.seeds ?? versus()?.ranks.tasks), ranksSection],
  ["budgets", "Equal budgets", "Best Δm on the validation split within the batches, optimizer steps and training time that the thriftiest method took, mean over seeds. Methods that take several optimizer steps per batch get more of them at equal batches, and fewer batches at equal steps. Learning rates fall over the whole run and aren't adapted to the smaller budget.", () => Boolean(versus()) && UNITS.some(([unit]) => study.method_names.some((name) => isNumber(dig(versus(), "budgets", unit, "methods", name, "mean")))), budgetsSection],
  ["curves", "Learning curves", `Mean over seeds, over epochs, batches, optimizer steps or time. Where there are no more than ${MOST_BANDS} curves: with the range from the lowest to the highest seed.`, () => study.runs.some((run) => run.history.length), curvesSection],
  ["tradeoffs", "Trade-offs", "Each pair of tasks, one point per method, bars: standard deviation over seeds. Axes are turned so that up and right is better.", () => tasksOf().length > 1, tradeoffSection],
  ["shares", "Priorities", "Which share of the structured layers' output channels each task leads.", some(record("priority_shares")), sharesSection],
  ["weights", "Task weights", "The weight of each task's gradient (or loss) in the update, at the steps where weights differ.", some(unequal), weightsSection],
  ["affinity", "Affinity", "How much one task's (or its group's) step lowers each task's loss, as a moving average. Blue helps, orange harms.", some(record("affinity")), affinitySection],
  ["groups", "Groups", "Tasks updated together.", some(record("groups")), groupsSection],
  ["conflicts", "Conflicts", "Two tasks are in conflict where the cosine between their gradients on the shared parameters is negative.", () => conflictShares() || some(hasCosines)(), conflictsSection],
  ["costs", "Costs", "Methods that take several optimizer steps per batch get more updates out of the same data: compare with that in mind.", () => study.method_names.some((name) => method(name).cost), costSection],
  ["settings", "Settings", "What was run, and with which versions.", () => true, settingsSection],
];

function summary() {
  const count = (value, name) => `${value} ${name}${value === 1 ? "" : "s"}`;
  const size = [...(study.method_names.length ? [count(study.method_names.length, "method"), count(tasksOf().length, "task")] : []), count(study.seeds, "seed")];
  const parts = [`${size.join(", ")}. ${study.about}`];
  const ranked = study.method_names.filter((name) => isNumber(deltaOf(name)?.mean)).sort((a, b) => deltaOf(b).mean - deltaOf(a).mean);
  if (ranked.length > 1) {
    const { mean: top, ci95 } = deltaOf(ranked[0]);
    parts.push(`Highest mean Δm: ${ranked[0]} (${signed(top)}${isNumber(ci95) ? ` ± ${ci95.toFixed(2)}` : ""} %).`);
    if (isNumber(ci95)) {
      const close = ranked.slice(1).filter((name) => deltaOf(name).mean + deltaOf(name).ci95 >= top - ci95);
      parts.push(close.length ? `Its interval overlaps that of ${count(close.length, "other")}, so the order among them isn't settled.` : "No other interval reaches it.");
    } else parts.push("One seed tells nothing about the spread.");
  }
  return parts.join(" ");
}

function chips() {
  return el("fieldset", { class: "chips", id: "methods" }, el("legend", {}, "methods shown in the tables and all charts"), study.method_names.map((name) => el("label", { class: "chip" },
    el("input", { type: "checkbox", checked: !hidden.has(name), onchange: (event) => { if (event.target.checked) hidden.delete(name); else hidden.add(name); redraw(); } }),
    el("span", { class: "swatch", style: `--shade:${methodColour(name)}` }), el("span", {}, breakable(name)))));
}

/** Builds the page of the chosen study, at the start and when the study or the theme changes. */
function start() {
  charts = [];
  study.longest = Math.max(0, ...study.runs.map((run) => run.history.length));
  const content = document.getElementById("content");
  content.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.purge(plot));
  content.replaceChildren();
  document.getElementById("title").textContent = study.title;
  document.getElementById("made").replaceChildren(...study.made.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))));
  document.getElementById("summary").textContent = summary();
  document.getElementById("warnings").replaceChildren(...study.warnings.map((text) => el("p", { class: "alert", role: "alert" }, text)));
  const chooser = document.getElementById("chooser");
  chooser.replaceChildren(...study.notes.map((text) => el("p", { class: "note warning" }, text)));
  if (study.method_names.length > 1) chooser.prepend(chips());
  if (report.studies.length > 1) chooser.prepend(controls(select("folder", report.studies.map((entry) => [entry, entry.title]), study, (entry) => { study = entry; hidden = new Set(); start(); })));
  const links = el("ul");
  for (const [id, name, about, available, build] of SECTIONS) {
    if (!available()) continue;
    const card = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, name), el("p", { class: "about" }, about));
    content.append(card);
    build(card);
    links.append(el("li", {}, el("a", { href: `#${id}` }, name)));
  }
  document.getElementById("contents").replaceChildren(links);
  redraw();
}

darkness.addEventListener("change", () => start());
start();
