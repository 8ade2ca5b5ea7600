"use strict";
/* Draws the report from the JSON in #report-data. Text from runs only ever reaches the page through textContent, and
   Plotly, whose labels know some HTML, through `safe`. */

const report = JSON.parse(document.getElementById("report-data").textContent);

// ------------------------------------------------------------------------------------------------ small helpers

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, length = 26) => (String(text).length > length ? `${String(text).slice(0, length - 1)}…` : String(text));
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const own = (object, key) => (object && Object.hasOwn(object, key) ? object[key] : undefined);
const dig = (object, ...keys) => keys.reduce(own, object);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function number(value, digits = 4) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2).replaceAll("-", "−").replace("e+", "e");
  const text = Number.isInteger(value) ? String(value) : value.toPrecision(Math.max(digits, Math.floor(Math.log10(size)) + 1));
  return text.replace("-", "−");
}
const signed = (value, digits = 2) => (isNumber(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}` : "–");

const COSTS = [
  ["seconds_per_batch", "time", "ms per batch", 1e3],
  ["num_forward", "forwards", "per batch", 1],
  ["num_backward", "backwards", "per batch", 1],
  ["num_optimizer_steps", "optimizer steps", "per batch", 1],
  ["peak_memory_bytes", "memory", "peak, MiB", 1 / 1048576],
];

// ------------------------------------------------------------------------------------------------------- colours

const METHOD_COLOURS = {
  light: ["#0b62b8", "#c4510a", "#1d7d4c", "#8a3ffc", "#b0185f", "#8a6d00", "#007d8a", "#5a6470", "#d12f2f", "#3f51b5"],
  dark: ["#6cb2ff", "#ff9d57", "#5fd38d", "#c6a0ff", "#ff7eb6", "#e5c445", "#4fd1dc", "#b3bdc8", "#ff8178", "#9fa8ff"],
};
const TASK_COLOURS = {
  light: ["#33658a", "#e07a1f", "#3b8b5a", "#b5446e", "#7d5ba6", "#9c7a1c", "#17888f", "#8b5e3c", "#6a7480", "#c23b3b"],
  dark: ["#7fb4de", "#f7a65b", "#7ecf9e", "#ec8fb3", "#bba0e4", "#dcc163", "#62cdd3", "#d0a482", "#b4bec9", "#f28c8c"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const darkness = matchMedia("(prefers-color-scheme: dark)");
const mode = () => (darkness.matches ? "dark" : "light");
const touch = matchMedia("(pointer: coarse)");

function colour(palettes, index) {
  const palette = palettes[mode()];
  return index < palette.length ? palette[index] : `hsl(${Math.round((index * 137.5) % 360)} 55% ${darkness.matches ? 68 : 42}%)`;
}

function faded(text, alpha) {
  const probe = el("span", { style: `color:${text}` });
  document.body.append(probe);
  const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
  probe.remove();
  return `rgba(${red},${green},${blue},${alpha})`;
}

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function diverging() {
  const middle = darkness.matches ? "#20262e" : "#f7f7f7";
  return darkness.matches
    ? [[0, "#ff8a5c"], [0.5, middle], [1, "#5aa9ff"]]
    : [[0, "#b3400f"], [0.25, "#f0a884"], [0.5, middle], [0.75, "#8cbbe6"], [1, "#0b62b8"]];
}

// -------------------------------------------------------------------------------------------------------- charts

let charts = [];

/** A figure that is drawn again when the theme or the choice of methods changes; `figure()` gives {data, layout}. */
function chart(caption, height, figure, label) {
  const box = el("div", { class: "chart", style: `height:${height}px` });
  const node = el("figure", { role: "group", "aria-label": label }, caption ? el("figcaption", {}, caption) : null, box);
  charts.push(() => {
    const { data, layout = {} } = figure();
    const text = { color: variable("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily };
    const axis = { gridcolor: variable("--line"), zerolinecolor: variable("--soft"), linecolor: variable("--line"), automargin: true };
    const { xaxis = {}, yaxis = {}, ...rest } = layout;
    Plotly.react(
      box,
      data,
      {
        height, font: text, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
        margin: { l: 48, r: 12, t: 10, b: 44 }, hoverlabel: { align: "left", namelength: 60 },
        dragmode: touch.matches ? false : "zoom", ...rest,
        xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
      },
      { responsive: true, displayModeBar: false },
    );
  });
  return node;
}

const redraw = () => charts.forEach((draw) => draw());
darkness.addEventListener("change", () => start());

const narrow = () => innerWidth < 640;

/** A text with its middle left out where it is too long: the ends of methods' names are what differs. */
function fit(text, length) {
  if (text.length <= length) return text;
  const tail = Math.ceil((length - 1) * 0.6);
  return `${text.slice(0, length - 1 - tail)}…${text.slice(-tail)}`;
}

/** A method's name beside a row of a chart: its options on a line of their own where the name is long. */
function rowLabel(name) {
  const limit = narrow() ? 19 : 30;
  const cut = name.indexOf("(");
  if (name.length <= limit || cut <= 0) return safe(fit(name, limit));
  return `${safe(fit(name.slice(0, cut), limit))}<br>${safe(fit(name.slice(cut), limit))}`;
}

/** The axis of a chart with one row per method, from the bottom up. */
const rowAxis = (names) => ({
  tickvals: names.map((_, row) => row), ticktext: names.map(rowLabel), tickfont: { size: 11 }, range: [-0.6, names.length - 0.4], zeroline: false,
});

/** A name that may be broken after brackets, commas and underscores. */
const breakable = (name) => String(name).split(/(?<=[(,=_])/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));

const title = (text) => ({ title: { text: safe(text), standoff: 8 } });

function select(label, options, value, change) {
  const node = el("select", { onchange: (event) => change(options[event.target.selectedIndex][0]) });
  options.forEach(([key, text]) => node.append(el("option", { selected: key === value }, text)));
  return el("label", {}, label, node);
}

function key(entries) {
  const chips = entries.map(([name, shade]) =>
    el("span", { class: "chip plain", role: "listitem" }, el("span", { class: "swatch", style: `background:${shade}` }), el("span", {}, ...breakable(name))));
  return el("div", { class: "chips", role: "list" }, ...chips);
}

const legend = (names, palettes) => key(names.map((name, index) => [name, colour(palettes, index)]));

/** The colours of the methods that are shown. */
function methodLegend(card, baseline) {
  const holder = el("div");
  card.append(holder);
  charts.push(() => {
    const entries = shown().map((name) => [name, methodColour(name)]);
    if (baseline) entries.push(["single-task models", baseline()]);
    holder.replaceChildren(key(entries));
  });
}

// --------------------------------------------------------------------------------------------- the state of a page

let study = report.studies[0];
let hidden = new Set();
let table = { key: "delta_m", down: true, filter: "", metrics: "primary" };

const tasksOf = () => study.task_names;
const taskInfo = (task) => own(study.results.tasks, task);
/** The axis of steps or epochs; epochs are whole numbers. */
const timeAxis = (unit) => ({ ...title(unit), ...(unit === "epoch" && study.longest < 12 ? { dtick: 1 } : {}) });
const primary = (task) => taskInfo(task).primary_metric;
const higher = (task, metric) => dig(taskInfo(task), "metrics", metric, "higher_is_better");
const method = (name) => own(study.results.methods, name);
const methodColour = (name) => colour(METHOD_COLOURS, study.method_names.indexOf(name));
const methodDash = (name) => DASHES[Math.floor(study.method_names.indexOf(name) / 10) % DASHES.length];
const shown = () => study.method_names.filter((name) => !hidden.has(name));
const runsOf = (name) => study.runs.filter((run) => run.task === null && run.method === name);
const single = (task, metric) => dig(study.results.single_task, "tasks", task, metric, "mean");
const direction = (task, metric) => (higher(task, metric) ? "↑" : "↓");

function change(task, metric, value) {
  const base = single(task, metric);
  if (!isNumber(base) || !isNumber(value) || base === 0) return null;
  return ((higher(task, metric) ? 1 : -1) * (value - base) * 100) / Math.abs(base);
}

// --------------------------------------------------------------------------------------------------------- table

function columns() {
  const list = [{ key: "delta_m", name: "Δm", unit: "%", up: true, value: (name) => dig(method(name), "delta_m", "mean") }];
  for (const task of tasksOf()) {
    const metrics = table.metrics === "all" ? study.metric_names[tasksOf().indexOf(task)] : [primary(task)];
    for (const metric of metrics) {
      list.push({
        key: `${task}\n${metric}`, name: task, sub: `${metric} ${direction(task, metric)}`, up: higher(task, metric), task, metric,
        value: (name) => dig(method(name), "tasks", task, metric, "mean"),
      });
    }
  }
  for (const [key, name, unit, factor] of COSTS) {
    list.push({ key, name, unit, factor, up: false, cost: true, value: (row) => dig(method(row), "cost", key) });
  }
  return list.filter((column) => column.key === "delta_m" || [...study.method_names].some((name) => isNumber(column.value(name))));
}

/** Rows in the order of a column; those without a value come last, whatever the order. */
function sorted(names, list, state) {
  const column = list.find((entry) => entry.key === state.key);
  const flip = state.down ? -1 : 1;
  if (!column) return names.sort((a, b) => flip * a.localeCompare(b));
  return names.sort((a, b) => {
    const [first, second] = [column.value(a), column.value(b)];
    if (isNumber(first) && isNumber(second)) return flip * (first - second);
    return isNumber(second) - isNumber(first);
  });
}

/** A table with a row per method, sorted by `state` ({key, down}); `again` draws it after a click on a heading. */
function sortable(holder, { list, names, state, cellOf, foot, again }) {
  const sortOn = (key) => {
    const column = list.find((entry) => entry.key === key);
    state.down = state.key === key ? !state.down : Boolean(column && column.up);
    state.key = key;
    again();
    [...holder.querySelectorAll("th[data-key]")].find((node) => node.dataset.key === key)?.querySelector("button").focus();
  };
  const heading = (key, name, about) => {
    const current = state.key === key;
    const button = el(
      "button",
      { type: "button", onclick: () => sortOn(key) },
      name, " ", el("span", { class: "mark", "aria-hidden": "true" }, current ? (state.down ? "▼" : "▲") : "↕"),
      about ? el("small", {}, about) : null,
    );
    return el("th", { scope: "col", "data-key": key, "aria-sort": current ? (state.down ? "descending" : "ascending") : "none" }, button);
  };
  const head = el("tr", {}, heading("name", "method"), ...list.map((column) => heading(column.key, column.name, column.sub ?? column.unit)));
  const body = el("tbody", {}, ...sorted(names, list, state).map((name) =>
    el("tr", { "data-method": name }, el("th", { scope: "row" }, ...breakable(name)), ...list.map((column) => cellOf(column, name)))));
  holder.replaceChildren(el("table", {}, el("thead", {}, head), body, foot ?? el("tfoot")));
}

/** Where a wide table scrolls. */
const scroller = (id, label) => el("div", { class: "scroll", id, tabindex: "0", role: "region", "aria-label": label });

/** A cell that says its exact value in `data-value` and in its tooltip. */
const valueCell = (value, ...children) =>
  el("td", { "data-value": isNumber(value) ? String(value) : "", title: isNumber(value) ? String(value) : null }, ...children);

function cell(column, name, best) {
  const value = column.value(name);
  const node = valueCell(value);
  if (isNumber(value) && value === best) node.classList.add("best");
  if (column.key === "delta_m") {
    const about = method(name).delta_m;
    if (!about) {
      node.append("–", el("small", {}, el("a", { href: "#delta" }, "why")));
      return node;
    }
    node.append(signed(value));
    node.append(el("small", {}, isNumber(about.ci95) ? `± ${about.ci95.toFixed(2)}` : "one seed"));
    return node;
  }
  node.append(number(isNumber(value) ? value * (column.factor ?? 1) : null, column.cost ? 3 : 4));
  if (column.task === undefined) return node;
  const std = dig(method(name), "tasks", column.task, column.metric, "std");
  const relative = change(column.task, column.metric, value);
  const small = el("small", {}, study.seeds > 1 && isNumber(std) ? `± ${number(std, 2)} ` : "");
  if (relative !== null) small.append(el("span", { class: relative < 0 ? "down" : "up" }, `${relative < 0 ? "▼" : "▲"} ${Math.abs(relative).toFixed(1)} %`));
  node.append(small);
  return node;
}

function singleTaskRow(list) {
  const base = study.results.single_task;
  if (!base) return null;
  return el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "single-task models"),
    ...list.map((column) => {
      if (column.key === "delta_m") return el("td", {}, "0");
      const value = column.task === undefined ? own(base.cost, column.key) : single(column.task, column.metric);
      const std = column.task === undefined ? null : dig(base, "tasks", column.task, column.metric, "std");
      return valueCell(value, number(isNumber(value) ? value * (column.factor ?? 1) : null, column.cost ? 3 : 4),
        study.seeds > 1 && isNumber(std) ? el("small", {}, `± ${number(std, 2)}`) : null);
    })));
}

function drawTable(holder) {
  const list = columns();
  const names = shown().filter((name) => name.toLowerCase().includes(table.filter.toLowerCase()));
  const best = new Map(list.map((column) => {
    const values = study.method_names.map(column.value).filter(isNumber);
    return [column, column.cost || values.length < 2 ? null : (column.up ? Math.max : Math.min)(...values)];
  }));
  sortable(holder, { list, names, state: table, cellOf: (column, name) => cell(column, name, best.get(column)), foot: singleTaskRow(list), again: () => drawTable(holder) });
  document.getElementById("row-count").textContent = `${names.length} of ${study.method_names.length} methods`;
}

function tableSection(card) {
  const holder = scroller("comparison", "Comparison of methods");
  const search = el("input", { type: "search", id: "filter", placeholder: "name contains …", value: table.filter,
    oninput: (event) => { table.filter = event.target.value; drawTable(holder); } });
  card.append(
    el("div", { class: "controls" },
      el("label", {}, "filter", search),
      select("metrics", [["primary", "one per task"], ["all", "all"]], table.metrics, (value) => { table.metrics = value; drawTable(holder); }),
      el("output", { id: "row-count", "aria-live": "polite" })),
    holder,
  );
  charts.push(() => drawTable(holder));
}

// ------------------------------------------------------------------------------------------------ Δm and trade-offs

function deltaSection(card) {
  const known = study.method_names.filter((name) => isNumber(dig(method(name), "delta_m", "mean")));
  const without = study.method_names.filter((name) => !known.includes(name));
  if (study.baseline) card.append(el("p", { class: "note" }, `Relative to: ${study.baseline}.`));
  if (without.length) card.append(el("p", { class: "note", id: "no-delta" }, whyNoDelta(without)));
  if (!known.length) return;
  card.append(
    chart(null, 90 + 38 * known.length, () => {
      const names = known.filter((name) => !hidden.has(name)).sort((a, b) => method(a).delta_m.mean - method(b).delta_m.mean);
      const data = names.map((name, row) => {
        const { mean: middle, ci95 } = method(name).delta_m;
        return {
          type: "scatter", mode: "markers", x: [middle], y: [row], name: safe(name),
          error_x: { type: "data", array: [ci95 ?? 0], visible: isNumber(ci95), color: methodColour(name), thickness: 2, width: 5 },
          marker: { size: 11, color: methodColour(name) },
          hovertemplate: `Δm %{x:.3f} %${isNumber(ci95) ? ` ± ${ci95.toFixed(3)}` : ""}<extra>%{fullData.name}</extra>`,
        };
      });
      names.forEach((name, row) => {
        const values = method(name).delta_m.per_seed;
        data.push({
          type: "scatter", mode: "markers", x: values, y: values.map(() => row), name: safe(name), customdata: values.map((_, seed) => seed),
          marker: { size: 7, symbol: "line-ns-open", color: methodColour(name), line: { width: 1.5 } },
          hovertemplate: "seed %{customdata}: %{x:.3f} %<extra>%{fullData.name}</extra>",
        });
      });
      return {
        data,
        layout: {
          xaxis: { ...title(narrow() ? "Δm, %" : "Δm, % (0: as good as single-task models)"), zeroline: true, zerolinewidth: 2, rangemode: "tozero" },
          yaxis: rowAxis(names),
        },
      };
    }, "Δm of every method with its confidence interval"),
  );
}

function whyNoDelta(names) {
  const reasons = new Map();
  for (const name of names) {
    const reason = method(name).reason ?? "there are no single-task values";
    reasons.set(reason, [...(reasons.get(reason) ?? []), name]);
  }
  const text = [...reasons].map(([reason, list]) => `No Δm for ${list.join(", ")}: ${reason}.`).join(" ");
  const advice = study.history_unit === "step" && study.task_names.length > 1
    ? " Δm needs a single-task run of every task on the same data (torchmto train with one task in data.tasks), or a comparison on it: give their folders to torchmto report, too." : "";
  return text + advice;
}

// ------------------------------------------------------------------------------------- against a reference, and ranks

const versus = () => study.results.versus;
const significant = (difference) => isNumber(difference?.p_holm) && difference.p_holm < 0.05;
const pText = (p) => (isNumber(p) ? (p < 0.001 ? "< 0.001" : p.toFixed(3)) : "–");
const interval = (value, digits = 2) => (isNumber(value) ? `± ${value.toFixed(digits)}` : study.seeds > 1 ? "" : "one seed");

function versusSection(card) {
  const { reference, methods } = versus();
  const of = (name) => own(methods, name);
  const others = study.method_names.filter((name) => name !== reference);
  const known = others.filter((name) => of(name).delta_m);
  card.append(el("p", { class: "note" },
    study.seeds > 1
      ? `Differences to ${reference}, run by run with the same seed. p: paired t tests over ${study.seeds} seeds, by Holm's procedure for the ${others.length} methods (Δm), and for all methods and tasks (tasks, where * stands for p < 0.05).`
      : `Differences to ${reference}. One seed: no intervals and no tests.`));
  if (known.length) {
    card.append(chart(null, 90 + 36 * known.length, () => {
      const names = known.filter((name) => !hidden.has(name)).sort((a, b) => of(a).delta_m.mean - of(b).delta_m.mean);
      return {
        data: names.map((name, row) => {
          const { mean: middle, ci95, p_holm: p } = of(name).delta_m;
          return {
            type: "scatter", mode: "markers", x: [middle], y: [row], name: safe(name),
            error_x: { type: "data", array: [ci95 ?? 0], visible: isNumber(ci95), color: methodColour(name), thickness: 2, width: 5 },
            marker: { size: 11, symbol: significant(of(name).delta_m) ? "circle" : "circle-open", color: methodColour(name), line: { width: 2, color: methodColour(name) } },
            hovertemplate: `%{x:+.3f}${isNumber(ci95) ? ` ± ${ci95.toFixed(3)}` : ""} points, p ${pText(p)}<extra>%{fullData.name}</extra>`,
          };
        }),
        layout: {
          xaxis: { ...title(`Δm minus that of ${fit(reference, 22)}, points`), zeroline: true, zerolinewidth: 2, rangemode: "tozero" },
          yaxis: rowAxis(names),
        },
      };
    }, `Differences of Δm to ${reference} with confidence intervals`));
    if (study.seeds > 1) card.append(el("p", { class: "note" }, "Filled dots: significant at 5 %. Bars: 95 % confidence interval, not corrected."));
  }
  const holder = scroller("versus-table", `Methods against ${reference}`);
  const state = { key: "difference", down: true };
  const list = [
    ...(known.length ? [
      { key: "difference", name: `Δm − ${short(reference, 24)}`, unit: "points", up: true, value: (name) => dig(of(name), "delta_m", "mean") },
      { key: "p", name: "p", unit: "Holm", up: false, value: (name) => dig(of(name), "delta_m", "p_holm") },
    ] : []),
    { key: "wins", name: "wins–ties–losses", unit: "tasks × seeds", up: true, value: (name) => of(name).wins_ties_losses[0] - of(name).wins_ties_losses[2] },
    ...tasksOf().map((task) => ({ key: `task\n${task}`, name: task, sub: `${primary(task)}, change in %`, task, up: true, value: (name) => dig(of(name), "tasks", task, "change", "mean") })),
  ];
  const cellOf = (column, name) => {
    const value = column.value(name);
    if (column.key === "difference") return valueCell(value, signed(value), el("small", {}, interval(of(name).delta_m?.ci95)));
    if (column.key === "p") return valueCell(value, pText(value));
    if (column.key === "wins") {
      const node = valueCell(value, of(name).wins_ties_losses.join("–"));
      node.dataset.counts = of(name).wins_ties_losses.join(" ");
      return node;
    }
    const { change: difference, wins_ties_losses: counts } = own(of(name).tasks, column.task);
    const text = el("span", { class: significant(difference) ? (value < 0 ? "down" : "up") : null }, signed(value, 1), significant(difference) ? "*" : "");
    const node = valueCell(value, text, el("small", {}, interval(difference?.ci95, 1)), el("small", {}, counts.join("–")));
    node.dataset.counts = counts.join(" ");
    return node;
  };
  const draw = () => sortable(holder, { list, names: others.filter((name) => !hidden.has(name)), state, cellOf, again: draw });
  card.append(holder);
  charts.push(draw);
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
  const views = [["seeds", "Δm of each seed"], ["tasks", "each task of each seed"]].filter(([key]) => versus().ranks[key]);
  let view = views[0][0];
  const about = el("p", { class: "note", id: "rank-test" });
  const list = el("ol", { class: "visually-hidden", "aria-label": "Mean ranks" });
  const figure = chart(null, 120 + 36 * study.method_names.length, () => {
    const { average, critical_difference: critical, blocks, friedman } = versus().ranks[view];
    const names = shown().sort((a, b) => average[a] - average[b]);
    const count = study.method_names.length;
    const ranks = names.map((name) => average[name]);
    const groups = isNumber(critical) && blocks > 1 ? cliques(ranks, critical) : [];
    const ruler = isNumber(critical) && critical <= count - 1;
    about.textContent = rankText(view, versus().ranks[view]);
    list.replaceChildren(...names.map((name) => el("li", { "data-method": name, "data-value": String(average[name]) }, `${name}: ${average[name].toFixed(2)}`)));
    const ink = variable("--ink");
    const beside = (index) => count + 0.25 + (0.22 * (count - 1) / 6 + 0.06) * (index + 0.5);
    const data = names.map((name, row) => ({
      type: "scatter", mode: "markers+text", x: [average[name]], y: [row], name: safe(name), text: [average[name].toFixed(2)], textposition: average[name] > (count + 1) / 2 ? "middle left" : "middle right",
      marker: { size: 12, color: methodColour(name) }, textfont: { size: 11, color: variable("--soft") }, cliponaxis: false, hovertemplate: `mean rank %{x:.3f} in ${blocks} blocks<extra>%{fullData.name}</extra>`,
    }));
    groups.forEach(([first, last], index) => data.push({
      type: "scatter", mode: "lines", x: [beside(index), beside(index)], y: [first - 0.3, last + 0.3], line: { width: 5, color: variable("--soft") }, cliponaxis: false,
      hovertemplate: `${names.slice(first, last + 1).map((name) => safe(short(name, 40))).join("<br>")}<br>not significantly different<extra></extra>`,
    }));
    if (ruler) data.push({
      type: "scatter", mode: "lines+markers+text", x: [1, 1 + critical], y: [-1, -1], line: { width: 2, color: ink }, marker: { symbol: "line-ns", size: 9, line: { width: 2, color: ink } },
      text: ["", ` critical difference ${critical.toFixed(2)}`], textposition: 1 + critical > (count + 1) / 2 ? "top left" : "middle right", textfont: { size: 11 }, cliponaxis: false, hoverinfo: "skip",
    });
    return {
      data,
      layout: {
        xaxis: { ...title("mean rank (1: best)"), range: [0.8, beside(groups.length) + 0.1], tickvals: Array.from({ length: count }, (_, index) => index + 1).filter((tick) => count <= 12 || tick % 5 === 0 || tick === 1), zeroline: false },
        yaxis: { ...rowAxis(names), range: [names.length - 0.4, ruler ? -1.7 : -0.6] },
      },
    };
  }, "Mean ranks of the methods, with the critical difference");
  const draw = charts.at(-1);
  if (views.length > 1) card.append(el("div", { class: "controls" }, select("ranked by", views, view, (value) => { view = value; draw(); })));
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
  const holder = scroller("budget-table", "Best validation Δm within equal budgets");
  const state = { key: "batches", down: true };
  const list = UNITS.map(([key, name, unit]) => ({
    key, name: `equal ${name}`, sub: `≤ ${number(budgets[key].limit, 3)} ${unit}`, up: true, value: (row) => dig(budgets, key, "methods", row, "mean"),
  }));
  const best = new Map(list.map((column) => [column, Math.max(...study.method_names.map(column.value).filter(isNumber))]));
  const cellOf = (column, name) => {
    const value = column.value(name);
    if (!isNumber(value)) return valueCell(null, "–", el("small", { class: "reason" }, "no epoch within it"));
    const node = valueCell(value, signed(value), el("small", {}, interval(dig(budgets, column.key, "methods", name, "ci95"))));
    if (value === best.get(column)) node.classList.add("best");
    return node;
  };
  const draw = () => sortable(holder, { list, names: shown(), state, cellOf, again: draw });
  card.append(holder);
  if (study.steps_estimated) card.append(el("p", { class: "note" }, ESTIMATED));
  charts.push(draw);
}

const ESTIMATED = "Runs of this version recorded their optimizer steps in all; how many they were up to an epoch is estimated from the steps that were looked at.";

function pairsOf(names) {
  return names.flatMap((first, index) => names.slice(index + 1).map((second) => [first, second]));
}

function tradeoff(first, second) {
  const value = (name, task) => dig(method(name), "tasks", task, primary(task), "mean");
  const label = (task) => `${short(task, 22)}: ${primary(task)} ${direction(task, primary(task))}`;
  return chart(el("span", {}, `${first} / ${second}`), 300, () => {
    const data = shown().map((name) => {
      const spread = (task) => dig(method(name), "tasks", task, primary(task), "std") ?? 0;
      const bars = (task) => ({ type: "data", array: [spread(task)], visible: study.seeds > 1, color: faded(methodColour(name), 0.5), thickness: 1, width: 3 });
      return {
        type: "scatter", mode: "markers", name: safe(name), x: [value(name, first)], y: [value(name, second)], error_x: bars(first), error_y: bars(second),
        marker: { size: 11, color: methodColour(name) }, hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>%{fullData.name}</extra>",
      };
    });
    const base = [single(first, primary(first)), single(second, primary(second))];
    if (base.every(isNumber)) {
      data.push({ type: "scatter", mode: "markers", name: "single-task models", x: [base[0]], y: [base[1]],
        marker: { size: 12, symbol: "star-diamond", color: variable("--ink") }, hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>%{fullData.name}</extra>" });
    }
    const axis = (task) => ({ ...title(label(task)), autorange: higher(task, primary(task)) ? true : "reversed", zeroline: false });
    return { data, layout: { xaxis: axis(first), yaxis: axis(second) } };
  }, `Trade-off between ${first} and ${second}`);
}

function tradeoffSection(card) {
  methodLegend(card, study.results.single_task ? () => variable("--ink") : null);
  const names = tasksOf();
  const pairs = pairsOf(names);
  const grid = el("div", { class: "grid" });
  if (pairs.length <= 6) {
    grid.append(...pairs.map(([first, second]) => tradeoff(first, second)));
  } else {
    let chosen = [names[0], names[1]];
    const build = () => { forget(grid); grid.replaceChildren(tradeoff(...chosen)); keep(grid); };
    const options = names.map((name) => [name, name]);
    card.append(el("div", { class: "controls" },
      select("across", options, chosen[0], (value) => { chosen = [value, chosen[1]]; build(); }),
      select("upwards", options, chosen[1], (value) => { chosen = [chosen[0], value]; build(); })));
    grid.append(tradeoff(...chosen));
    grid.charts = [charts.at(-1)];
  }
  card.append(grid);
}

/** Charts that are replaced: `forget` takes a holder's from the list of those to redraw, `keep` draws its new ones. */
function forget(holder) {
  charts = charts.filter((draw) => !(holder.charts ?? []).includes(draw));
  holder.before = charts.length;
}
function keep(holder) {
  holder.charts = charts.slice(holder.before);
  holder.charts.forEach((draw) => draw());
}

// ------------------------------------------------------------------------------------------------------ over time

function curveOptions() {
  const points = study.runs.flatMap((run) => run.history);
  return [
    ...(points.some((point) => point.validation) ? [["primary", "validation, one metric per task"]] : []),
    ...(points.some((point) => isNumber(point.score)) ? [["score", "validation Δm"]] : []),
    ["loss", "training loss"],
  ];
}

/** What learning curves may be drawn over: [[key of a point, axis title]]. */
function axisOptions() {
  const options = [["at", study.history_unit], ["batches", "batches"], ["optimizer_steps", "optimizer steps"], ["seconds", "training time, s"]];
  return options.filter(([key]) => study.runs.some((run) => run.history.some((point) => isNumber(point[key]))));
}

/** Mean, lowest and highest of several runs at each of their validations; where those are is a mean, too. */
function curve(runs, pick, unit = "at") {
  const moments = new Map();
  for (const run of runs) {
    for (const point of run.history) {
      const value = pick(point);
      if (isNumber(value) && isNumber(point[unit])) moments.set(point.at, [...(moments.get(point.at) ?? []), [point[unit], value]]);
    }
  }
  const found = [...moments].sort(([a], [b]) => a - b).map(([, list]) => [mean(list.map(([x]) => x)), list.map(([, value]) => value)]);
  return { x: found.map(([x]) => x), y: found.map(([, values]) => mean(values)), low: found.map(([, values]) => Math.min(...values)), high: found.map(([, values]) => Math.max(...values)), many: runs.length > 1 };
}

const MOST_BANDS = 6;

function lines({ x, y, low, high, many }, name, line, unit = study.history_unit) {
  const hover = { hovertemplate: `${safe(unit)} %{x:.4~g}: %{y:.4~g}<extra>%{fullData.name}</extra>` };
  const marker = x.length < 40 ? "lines+markers" : "lines";
  const main = { type: "scatter", mode: marker, x, y, name: safe(name), line, marker: { size: 5 }, ...hover };
  if (!many || shown().length > MOST_BANDS) return [main];
  const band = { type: "scatter", mode: "lines", x: [...x, ...x.toReversed()], y: [...high, ...low.toReversed()], fill: "toself",
    fillcolor: faded(line.color, 0.13), line: { width: 0 }, hoverinfo: "skip" };
  return [band, main];
}

function curvesSection(card) {
  const options = curveOptions();
  const axes = axisOptions();
  let kind = options[0][0];
  let axis = axes[0][0];
  let first = 0;
  const grid = el("div", { class: "grid" });
  const note = el("p", { class: "note", hidden: true }, ESTIMATED);
  const oneChart = (task) => {
    const metric = task === null ? null : primary(task);
    const picks = { loss: (point) => dig(point.losses, task), primary: (point) => dig(point.validation, task, metric), score: (point) => point.score };
    const abouts = { loss: "training loss ↓", primary: task === null ? "" : `validation ${metric} ${direction(task, metric)}`, score: "validation Δm, % ↑" };
    const pick = picks[kind];
    const unit = axes.find(([key]) => key === axis)[1];
    return chart(el("span", {}, task ?? "all tasks", " ", el("small", {}, abouts[kind])), task === null ? 380 : 270, () => {
      const data = shown().flatMap((name) => lines(curve(runsOf(name), pick, axis), name, { color: methodColour(name), width: 2, dash: methodDash(name) }, unit));
      const base = task === null ? [] : study.runs.filter((run) => run.task === task);
      if (base.length) data.push(...lines(curve(base, pick, axis), "single-task model", { color: variable("--soft"), width: 2, dash: "dash" }, unit));
      return { data, layout: { xaxis: axis === "at" ? timeAxis(unit) : { ...title(unit), rangemode: "tozero" }, yaxis: { zeroline: kind === "score" } } };
    }, task === null ? "Learning curves of Δm" : `Learning curves of ${task}`);
  };
  const build = () => {
    forget(grid);
    grid.replaceChildren(...(kind === "score" ? [null] : tasksOf().slice(first, first + 6)).map(oneChart));
    note.hidden = !(axis === "optimizer_steps" && study.steps_estimated);
    keep(grid);
  };
  const pages = [];
  for (let start = 0; start < tasksOf().length; start += 6) pages.push([start, tasksOf().slice(start, start + 6).map((task) => short(task, 14)).join(", ")]);
  card.append(el("div", { class: "controls" },
    select("curves", options, kind, (value) => { kind = value; build(); }),
    axes.length > 1 ? select("over", axes, axis, (value) => { axis = value; build(); }) : null,
    pages.length > 1 ? select("tasks", pages, 0, (value) => { first = value; build(); }) : null));
  methodLegend(card, study.runs.some((run) => run.task !== null) ? () => variable("--soft") : null);
  card.append(grid, note);
  charts.push(() => { if (!grid.childElementCount) build(); });
}

/** Methods and runs whose trace has something: [[label, run]]. */
function tracedRuns(has) {
  return study.method_names.flatMap((name) =>
    runsOf(name).filter((run) => run.trace.some(has)).map((run) => [study.seeds > 1 ? `${fit(name, 44)}, seed ${run.seed}` : name, run]),
  );
}

/** A section that shows one run at a time: a select of runs, and what `fill(holder, run)` makes of the chosen one. */
function perRun(card, has, fill) {
  const runs = tracedRuns(has);
  const holder = el("div");
  const build = (run) => { forget(holder); holder.replaceChildren(); fill(holder, run, run.trace.filter(has)); keep(holder); };
  card.append(el("div", { class: "controls" }, select("run", runs.map(([label, run]) => [run, label]), runs[0][1], build)), holder);
  charts.push(() => { if (!holder.childElementCount) build(runs[0][1]); });
}

const record = (name) => (point) => own(point.records, name);
const unequal = (point) => point.weights && new Set(Object.values(point.weights)).size > 1;

function taskSeries(points, pick, ylabel, label, extra = {}) {
  return chart(null, 300, () => ({
    data: tasksOf().map((task, index) => ({
      type: "scatter", mode: "lines", name: safe(task), x: points.map((point) => point.step), y: points.map((point) => pick(point, task) ?? null),
      line: { color: colour(TASK_COLOURS, index), width: 2, dash: DASHES[Math.floor(index / 10) % 5] }, hovertemplate: "step %{x}: %{y:.4~g}<extra>%{fullData.name}</extra>",
    })),
    layout: { xaxis: title("step"), yaxis: { ...title(ylabel), ...extra } },
  }), label);
}

/** A heat map of one moment, with a slider over all moments. */
function slider(holder, points, { rows, columns: labels, matrix, limit, bipolar, height, label, xlabel, ylabel, unit, id, dim = () => false }) {
  let index = points.length - 1;
  const output = el("output", {}, "");
  const input = el("input", { type: "range", min: 0, max: points.length - 1, step: 1, value: index, "aria-label": `${label}: moment`,
    oninput: (event) => { index = Number(event.target.value); say(); draw(); } });
  if (id) input.id = id;
  const say = () => {
    output.textContent = `step ${points[index].step} (${index + 1} of ${points.length})`;
    input.setAttribute("aria-valuetext", output.textContent);
  };
  say();
  const figure = chart(null, height, () => {
    const z = matrix(points[index]);
    const many = rows.length * labels.length > 150;
    const dimmed = rows.flatMap((_, row) => labels.map((_, column) => [row, column])).filter(([row, column]) => dim(z[row]?.[column], column));
    const isDimmed = new Set(dimmed.map(([row, column]) => row * labels.length + column));
    const text = (value, row, column) => (isNumber(value) ? (isDimmed.has(row * labels.length + column) ? `(${number(value, 2)})` : number(value, 2)) : "");
    const strokes = { type: "scatter", mode: "markers", x: dimmed.map(([, column]) => column), y: dimmed.map(([row]) => row), hoverinfo: "skip",
      marker: { symbol: "line-ne", size: 9, line: { width: 1.5, color: variable("--soft") } } };
    return {
      data: [{
        type: "heatmap", z, x: labels.map((_, i) => i), y: rows.map((_, i) => i), zmin: bipolar ? -limit : 0, zmax: limit, xgap: 1, ygap: 1,
        colorscale: bipolar ? diverging() : [[0, darkness.matches ? "#20262e" : "#f7f7f7"], [1, variable("--accent")]],
        customdata: rows.map((row) => labels.map((column) => `${safe(row)} → ${safe(column)}`)), hovertemplate: `%{customdata}<br>${unit} %{z:.3~g}<extra></extra>`,
        text: z.map((list, row) => list.map((value, column) => text(value, row, column))), texttemplate: many ? "" : "%{text}",
        colorbar: { thickness: 12, outlinewidth: 0, tickformat: ".2~g", title: { text: `${unit}<br>\u00a0`, side: "top" } },
      }, ...(many && dimmed.length ? [strokes] : [])],
      layout: {
        xaxis: { ...title(xlabel), tickvals: labels.map((_, i) => i), ticktext: labels.map((name) => safe(short(name, 18))), range: [-0.5, labels.length - 0.5], showgrid: false, zeroline: false },
        yaxis: { ...title(ylabel), tickvals: rows.map((_, i) => i), ticktext: rows.map((name) => safe(short(name, 28))), range: [rows.length - 0.5, -0.5], showgrid: false, zeroline: false },
      },
    };
  }, label);
  const draw = charts.at(-1);
  holder.append(el("div", { class: "controls" }, el("label", { class: "slide" }, el("span", {}, "moment: ", output), input)), figure);
}

function sharesSection(card) {
  card.append(legend(tasksOf(), TASK_COLOURS));
  perRun(card, record("priority_shares"), (holder, run, points) => {
    holder.append(taskSeries(points, (point, task) => dig(point.records, "priority_shares", task), "share of channels led", "Share of channels that each task leads", { range: [0, 1] }));
    const layered = points.filter((point) => point.layers);
    if (!layered.length) return;
    const layers = layered.at(-1).layers.map(([name]) => name);
    holder.append(el("h3", {}, "By layer"));
    slider(holder, layered, {
      rows: layers, columns: tasksOf(), limit: 1, height: 110 + 26 * layers.length, label: "Share of each layer's channels that a task leads", xlabel: "task", ylabel: "", unit: "share", id: "layer-slider",
      matrix: (point) => { const found = new Map(point.layers); return layers.map((name) => tasksOf().map((task) => own(found.get(name), task) ?? null)); },
    });
  });
}

function weightsSection(card) {
  card.append(legend(tasksOf(), TASK_COLOURS));
  perRun(card, unequal, (holder, run, points) =>
    holder.append(taskSeries(points, (point, task) => own(point.weights, task), "weight of the task's gradient", "Weights of the tasks over time")));
}

function affinitySection(card) {
  perRun(card, record("affinity"), (holder, run, points) => {
    const limit = Math.max(...points.flatMap((point) => point.records.affinity.flat().filter(isNumber).map(Math.abs)), 1e-12);
    const size = 90 + Math.min(40, Math.max(22, 340 / tasksOf().length)) * tasksOf().length;
    slider(holder, points, {
      rows: tasksOf(), columns: tasksOf(), limit, bipolar: true, height: Math.max(280, size), label: "Affinity between tasks", xlabel: "effect on", ylabel: "step of", unit: "affinity", id: "affinity-slider",
      matrix: (point) => point.records.affinity,
      dim: (value, column) => isNumber(value) && isNumber(own(run.noise_floor, tasksOf()[column])) && Math.abs(value) < run.noise_floor[tasksOf()[column]],
    });
    holder.append(el("p", { class: "note", id: "noise-floor" }, noiseText(run.noise_floor)));
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
  card.append(el("p", { class: "note" }, "A group has the colour of its first task."), legend(tasksOf(), TASK_COLOURS));
  perRun(card, record("groups"), (holder, run, points) => {
    const names = tasksOf();
    const scale = () => names.flatMap((_, index) => [[index / names.length, colour(TASK_COLOURS, index)], [(index + 1) / names.length, colour(TASK_COLOURS, index)]]);
    holder.append(chart(null, 110 + 26 * names.length, () => {
      const groupOf = (point, task) => point.records.groups.find((group) => group.includes(task)) ?? [];
      return {
        data: [{
          type: "heatmap", showscale: false, ygap: 2, zmin: 0, zmax: names.length, colorscale: scale(), x: points.map((point) => point.step), y: names.map((_, index) => index),
          z: names.map((task) => points.map((point) => { const members = groupOf(point, task).map((name) => names.indexOf(name)).filter((index) => index >= 0); return members.length ? Math.min(...members) + 0.5 : null; })),
          customdata: names.map((task) => points.map((point) => safe(groupOf(point, task).join(", ")))), hovertemplate: "step %{x}: %{customdata}<extra></extra>",
        }],
        layout: { xaxis: title("step"), yaxis: { tickvals: names.map((_, index) => index), ticktext: names.map((name) => safe(short(name))), autorange: "reversed", showgrid: false, zeroline: false } },
      };
    }, "Groups of tasks over time"));
    holder.append(chart(el("span", {}, "number of groups"), 170, () => ({
      data: [{ type: "scatter", mode: "lines", line: { shape: "hv", width: 2, color: variable("--accent") }, x: points.map((point) => point.step), y: points.map((point) => point.records.groups.length), hovertemplate: "step %{x}: %{y} groups<extra></extra>" }],
      layout: { xaxis: title("step"), yaxis: { rangemode: "tozero", dtick: Math.max(1, Math.ceil(names.length / 5)) } },
    }), "Number of groups over time"));
  });
}

function cosineOf(point, first, second) {
  const names = point.names ?? [];
  const [row, column] = [names.indexOf(first), names.indexOf(second)];
  return row < 0 || column < 0 ? null : dig(point.cosines, row, column) ?? null;
}

const conflictShares = () => study.runs.some((run) => run.task === null && run.history.some((point) => isNumber(point.conflict_share)));

function conflictsSection(card) {
  if (conflictShares()) {
    methodLegend(card);
    card.append(chart(el("span", {}, "share of pairs in conflict ", el("small", {}, "mean over each epoch")), 260, () => ({
      data: shown().flatMap((name) => { const series = curve(runsOf(name), (point) => point.conflict_share); return series.x.length ? lines(series, name, { color: methodColour(name), width: 2, dash: methodDash(name) }) : []; }),
      layout: { xaxis: timeAxis(study.history_unit), yaxis: { range: [-0.02, 1.02], tickformat: ".0%" } },
    }), "Share of task pairs with conflicting gradients"));
  }
  const has = (point) => point.cosines || isNumber(point.mean_cosine);
  if (!tracedRuns(has).length) return;
  card.append(el("h3", {}, "Cosines between the tasks' gradients"));
  perRun(card, has, (holder, run, points) => {
    const pairs = pairsOf(tasksOf());
    const detailed = points.some((point) => point.cosines);
    const x = points.map((point) => point.step);
    const every = points.map((point) => pairs.map(([first, second]) => cosineOf(point, first, second)).filter(isNumber));
    const series = detailed && pairs.length <= 10
      ? pairs.map((pair) => [pair.join(" / "), points.map((point) => cosineOf(point, ...pair))])
      : detailed
        ? [["mean", every.map((list) => (list.length ? mean(list) : null))], ["lowest", every.map((list) => (list.length ? Math.min(...list) : null))], ["highest", every.map((list) => (list.length ? Math.max(...list) : null))]]
        : [["mean of all pairs", points.map((point) => point.mean_cosine ?? null)]];
    holder.append(legend(series.map(([name]) => name), TASK_COLOURS), chart(null, 300, () => ({
      data: series.map(([name, y], index) => ({ type: "scatter", mode: "lines", name: safe(name), x, y, line: { width: 2, color: colour(TASK_COLOURS, index) }, hovertemplate: "step %{x}: %{y:.3f}<extra>%{fullData.name}</extra>" })),
      layout: { xaxis: title("step"), yaxis: { ...title("cosine"), range: [-1.05, 1.05] } },
    }), "Cosines between gradients over time"));
  });
}

// ---------------------------------------------------------------------------------------------- costs and settings

function costSection(card) {
  const available = COSTS.filter(([key]) => study.method_names.some((name) => isNumber(dig(method(name), "cost", key))));
  const grid = el("div", { class: "grid" });
  grid.append(...available.map(([key, name, unit, factor]) => chart(el("span", {}, name, unit ? el("small", {}, ` ${unit}`) : null), 60 + 34 * study.method_names.length, () => {
    const names = shown().filter((entry) => isNumber(dig(method(entry), "cost", key))).toReversed();
    const values = names.map((entry) => method(entry).cost[key] * factor);
    return {
      data: [{ type: "bar", orientation: "h", x: values, y: names.map((_, row) => row), marker: { color: names.map(methodColour) }, text: values.map((value) => number(value, 3)), textposition: "auto",
        customdata: names.map(safe), hovertemplate: "%{customdata}: %{x:.4~g}<extra></extra>" }],
      layout: { xaxis: { rangemode: "tozero" }, yaxis: { ...rowAxis(names), showgrid: false }, bargap: 0.3, margin: { l: 48, r: 12, t: 6, b: 30 } },
    };
  }, `Costs: ${name}`)));
  const timed = study.method_names.filter((name) => isNumber(dig(method(name), "cost", "seconds_per_batch")) && isNumber(dig(method(name), "delta_m", "mean")));
  if (timed.length > 1) {
    grid.append(chart(el("span", {}, "Δm for the time"), 60 + 34 * Math.max(6, study.method_names.length), () => ({
      data: timed.filter((name) => !hidden.has(name)).map((name) => ({
        type: "scatter", mode: "markers", name: safe(name), x: [method(name).cost.seconds_per_batch * 1e3], y: [method(name).delta_m.mean], marker: { size: 11, color: methodColour(name) },
        error_y: { type: "data", array: [method(name).delta_m.ci95 ?? 0], visible: isNumber(method(name).delta_m.ci95), color: faded(methodColour(name), 0.6), thickness: 1 },
        hovertemplate: "%{x:.3~g} ms, Δm %{y:.2f} %<extra>%{fullData.name}</extra>",
      })),
      layout: { xaxis: { ...title("ms per batch"), rangemode: "tozero" }, yaxis: title("Δm, %") },
    }), "Δm against time per batch"));
  }
  card.append(grid);
}

function flat(value, prefix = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
    return Object.entries(value).flatMap(([key, entry]) => flat(entry, prefix ? `${prefix}.${key}` : key));
  }
  return [[prefix, typeof value === "string" ? value : JSON.stringify(value)]];
}

function pairsTable(label, value) {
  return el("div", {}, label ? el("h3", {}, label) : null, el("div", { class: "scroll" }, el("table", { class: "pairs" }, el("tbody", {},
    ...flat(value).map(([key, text]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, text)))))));
}

/** What differs between the settings of several runs. */
function differences(settings) {
  const columns = settings.map(([, value]) => new Map(flat(value)));
  const keys = [...new Set(columns.flatMap((column) => [...column.keys()]))].filter((key) => new Set(columns.map((column) => column.get(key))).size > 1);
  return el("div", {}, el("h3", {}, "What differs"), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "What differs" }, el("table", { class: "texts" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "setting"), ...settings.map(([label]) => el("th", { scope: "col" }, label)))),
    el("tbody", {}, ...keys.map((key) => el("tr", {}, el("th", { scope: "row" }, ...breakable(key)), ...columns.map((column) => el("td", {}, column.get(key) ?? "–"))))))));
}

function settingsSection(card) {
  const { settings } = study;
  const grid = el("div", { class: "grid" });
  if (settings.length > 1) {
    card.append(differences(settings));
    grid.append(...settings.map(([label, value]) => el("details", {}, el("summary", {}, `All settings: ${label}`), pairsTable("", value))));
  } else grid.append(...settings.map(([label, value]) => pairsTable(label, value)));
  grid.append(pairsTable("Versions", study.results.versions ?? {}));
  card.append(grid);
}

// ------------------------------------------------------------------------------------------------------ experiments

function findingsSection(card) {
  for (const { title: heading, header, rows, notes } of study.tables) {
    card.append(
      el("h3", {}, heading),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heading }, el("table", { class: "findings" },
        el("thead", {}, el("tr", {}, ...header.map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, ...rows.map(([first, ...others]) => el("tr", {}, el("th", { scope: "row" }, ...breakable(first)), ...others.map((text) => el("td", { class: text.length > 32 ? "long" : null }, text))))))),
      ...notes.map((note) => el("p", { class: "note" }, note)),
    );
  }
}

function plotsSection(card) {
  card.append(...study.plots.map(([name, source]) => el("figure", { class: "plot" }, el("figcaption", {}, name), el("img", { src: source, alt: `Plot ${name}` }))));
}

// -------------------------------------------------------------------------------------------------------- the page

const some = (has) => () => tracedRuns(has).length > 0;
const SECTIONS = [
  ["findings", "Findings", "The tables of the experiment, as in its results.md.", () => Boolean(study.tables?.length), findingsSection],
  ["figures", "Plots", "The plots of the experiment, as in its folder.", () => Boolean(study.plots?.length), plotsSection],
  ["table", "Comparison", "Means over seeds ± standard deviation; Δm ± 95 % confidence interval. Small arrows: change to the single-task models. Bold: best mean, which alone doesn't make a difference significant. Click a heading to sort; hover a value for all its digits.", () => study.method_names.length > 0, tableSection],
  ["delta", "Δm", "Mean relative change of the tasks' primary metrics to single-task models. Dots: mean; bars: 95 % confidence interval over seeds; ticks: single seeds.", () => tasksOf().length > 1, deltaSection],
  ["versus", "Differences", "Each method against the reference, in runs of the same seed, which share initial weights and the order of the data.", () => Boolean(versus()) && study.method_names.length > 1, versusSection],
  ["ranks", "Ranks", "Mean rank of each method among all; 1 is best, ties share their ranks.", () => study.method_names.length > 1 && Boolean(versus()?.ranks.seeds ?? versus()?.ranks.tasks), ranksSection],
  ["budgets", "Equal budgets", "Best Δm on the validation split within the batches, optimizer steps and training time that the thriftiest method took, mean over seeds. Methods that take several optimizer steps per batch get more of them at equal batches, and fewer batches at equal steps. Learning rates fall over the whole run and aren't adapted to the smaller budget.", () => Boolean(versus()) && UNITS.some(([key]) => study.method_names.some((name) => isNumber(dig(versus(), "budgets", key, "methods", name, "mean")))), budgetsSection],
  ["curves", "Learning curves", "Mean over seeds, over epochs, batches, optimizer steps or time. Where no more than six methods are shown: with the range from the lowest to the highest seed.", () => study.runs.some((run) => run.history.length), curvesSection],
  ["tradeoffs", "Trade-offs", "Each pair of tasks, one point per method, bars: standard deviation over seeds. Axes are turned so that up and right is better.", () => tasksOf().length > 1, tradeoffSection],
  ["shares", "Priorities", "Which share of the structured layers' output channels each task leads.", some(record("priority_shares")), sharesSection],
  ["weights", "Task weights", "The weight of each task's gradient (or loss) in the update, at the steps where weights differ.", some(unequal), weightsSection],
  ["affinity", "Affinity", "How much one task's (or its group's) step lowers each task's loss, as a moving average. Blue helps, orange harms.", some(record("affinity")), affinitySection],
  ["groups", "Groups", "Tasks updated together.", some(record("groups")), groupsSection],
  ["conflicts", "Conflicts", "Two tasks are in conflict where the cosine between their gradients on the shared parameters is negative.", () => conflictShares() || tracedRuns((point) => point.cosines || isNumber(point.mean_cosine)).length > 0, conflictsSection],
  ["costs", "Costs", "Methods that take several optimizer steps per batch get more updates out of the same data: compare with that in mind.", () => study.method_names.some((name) => method(name).cost), costSection],
  ["settings", "Settings", "What was run, and with which versions.", () => true, settingsSection],
];

function summary() {
  const count = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;
  const size = [...(study.method_names.length ? [count(study.method_names.length, "method"), count(tasksOf().length, "task")] : []), count(study.seeds, "seed")];
  const parts = [`${size.join(", ")}. ${study.about}`];
  const ranked = study.method_names.filter((name) => isNumber(dig(method(name), "delta_m", "mean"))).sort((a, b) => method(b).delta_m.mean - method(a).delta_m.mean);
  if (ranked.length > 1) {
    const text = (name) => `${name} (${signed(method(name).delta_m.mean)}${isNumber(method(name).delta_m.ci95) ? ` ± ${method(name).delta_m.ci95.toFixed(2)}` : ""} %)`;
    const { mean: top, ci95 } = method(ranked[0]).delta_m;
    parts.push(`Highest mean Δm: ${text(ranked[0])}.`);
    if (isNumber(ci95)) {
      const close = ranked.slice(1).filter((name) => method(name).delta_m.mean + method(name).delta_m.ci95 >= top - ci95);
      parts.push(close.length ? `Its interval overlaps that of ${close.length} other${close.length === 1 ? "" : "s"}, so the order among them isn't settled.` : "No other interval reaches it.");
    } else parts.push("One seed tells nothing about the spread.");
  }
  return parts.join(" ");
}

function chips() {
  const box = el("fieldset", { class: "chips", id: "methods" }, el("legend", {}, "methods shown in the table and all charts"));
  for (const name of study.method_names) {
    const input = el("input", { type: "checkbox", checked: !hidden.has(name), onchange: (event) => { if (event.target.checked) hidden.delete(name); else hidden.add(name); redraw(); } });
    box.append(el("label", { class: "chip" }, input, el("span", { class: "swatch", style: `background:${methodColour(name)}` }), el("span", {}, ...breakable(name))));
  }
  return box;
}

/** Builds the page of the chosen study, at the start and when the study or the theme changes. */
function start() {
  charts = [];
  study.longest = Math.max(0, ...study.runs.map((run) => run.history.length));
  const content = document.getElementById("content");
  content.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.purge(plot));
  content.replaceChildren();
  document.getElementById("title").textContent = study.title;
  document.getElementById("summary").textContent = summary();
  const chooser = document.getElementById("chooser");
  chooser.replaceChildren();
  if (report.studies.length > 1) {
    const options = report.studies.map((entry) => [entry, entry.title]);
    chooser.append(el("div", { class: "controls" }, select("folder", options, study, (entry) => { study = entry; hidden = new Set(); start(); })));
  }
  if (study.method_names.length > 1) chooser.append(chips());
  for (const note of study.notes) chooser.append(el("p", { class: "note warning" }, note));
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

start();
