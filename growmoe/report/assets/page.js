"use strict";

// Okabe & Ito's colours, and the same hues lighter for a dark ground.
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#B8558F", "#A87000", "#2A8FC4", "#000000", "#6B6300"],
  dark: ["#56B4E9", "#FF8A4A", "#2FC79A", "#E3A1CC", "#F0B840", "#A8D8F8", "#FFFFFF", "#F0E442"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "star", "x", "cross"];
const ACTS = {
  spawn: ["birth", "circle", 2], merge: ["birth by merge", "diamond", 3],
  freeze: ["freeze", "square-open", 5], thaw: ["thaw", "triangle-up", 4], prune: ["death", "x", 1],
};
const charts = new Set(); // to be drawn anew after the theme has changed

// The page's own parts.

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

async function unpacked(id) {
  const packed = atob(document.getElementById(`packed-${id}`).textContent);
  const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

const colours = () => COLOURS[dark() ? "dark" : "light"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = (value) => Number.isInteger(value) ? String(value) : Number(value).toPrecision(4);
const pale = (colour, alpha) =>
  `rgba(${[1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)).join(",")},${alpha})`;

function layout(extra) {
  const axis = {
    gridcolor: css("--rule"), linecolor: css("--quiet"), zerolinecolor: css("--rule"),
    automargin: true, title: { standoff: 8 },
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, color: css("--text"), size: 13 },
    margin: { l: 55, r: 15, t: 10, b: 45 }, hovermode: "closest",
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--quiet"), font: { color: css("--text") } },
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false, // a finger scrolls the page
    ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

const text = (title) => ({ text: title, standoff: 8 });

function figure(title, description, draw, { height = 300, tools = null, table = null, tall = false } = {}) {
  const plot = h("div", { class: "plot", role: "img", "aria-label": description });
  const place = tall
    ? h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, plot) : plot;
  const node = h("figure", {}, h("figcaption", {}, h("h4", {}, title)), tools, place);
  if (table) {
    const details = h("details", { ontoggle: () => {
      if (details.open && details.children.length === 1) details.append(grid(title, ...table()));
    } }, h("summary", {}, "As a table"));
    node.append(details);
  }
  let stale = true, near = false;
  const render = () => {
    if (!stale || !near || !plot.offsetParent) return; // without a place it has no width
    stale = false;
    const [traces, extra] = draw();
    plot.style.height = `${extra.height}px`;
    Plotly.react(plot, traces, layout(extra), { displayModeBar: false, responsive: true });
  };
  plot.style.height = `${height}px`; // so that nothing moves when it is drawn
  plot.near = (now) => { near = now; render(); };
  node.render = () => { stale = true; render(); };
  charts.add(node);
  seen.observe(plot);
  return node;
}

// What is far from the window is drawn when it comes near, so that long pages open at once.
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.near(entry.isIntersecting);
}, { rootMargin: "300px" });

function grid(caption, head, rows) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${caption}, as a table` },
    h("table", {},
      h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))),
      h("tbody", {}, rows.map((row) => h("tr", {},
        row.map((cell, i) => i ? h("td", {}, cell) : h("th", { scope: "row" }, cell)))))));
}

function picker(label, options, change) {
  const select = h("select", { onchange: () => change(Number(select.value)) },
    options.map((name, i) => h("option", { value: i }, name)));
  return h("label", { class: "choice" }, `${label} `, select);
}

// Lines over time.

const BANDS = 4; // more would hide the lines

const swatch = (i) => h("span", { class: "swatch", "aria-hidden": "true",
  style: `border-top-color: var(--line-${i % 8}); border-top-style: ${["solid", "dashed", "dotted", "double"][(i >> 3) % 4]}` });

function lines(chart) {
  const shown = chart.lines.map(() => true);
  const crowded = chart.lines.length > BANDS && chart.lines.some((line) => line.low);
  const boxes = chart.lines.length > 1 && h("fieldset", {},
    h("legend", {}, crowded ? `Show (intervals with up to ${BANDS})` : "Show"),
    chart.lines.map((line, i) => h("label", {},
      h("input", { type: "checkbox", checked: true, onchange: (event) => {
        shown[i] = event.target.checked;
        node.render();
      } }), swatch(i), line.name)));
  const draw = () => {
    const traces = [];
    const bands = shown.filter(Boolean).length <= BANDS;
    chart.lines.forEach((line, i) => {
      if (!shown[i]) return;
      const colour = colours()[i % 8];
      if (line.low && bands) traces.push({
        x: [...line.x, ...[...line.x].reverse()], y: [...line.high, ...[...line.low].reverse()],
        fill: "toself", fillcolor: pale(colour, 0.18), line: { width: 0 }, mode: "lines",
        hoverinfo: "skip", showlegend: false,
      });
      traces.push({
        x: line.x, y: line.y, name: line.name, line: { color: colour, width: 2, dash: DASHES[(i >> 3) % 4] },
        mode: line.x.length <= 25 ? "lines+markers" : "lines", marker: { symbol: SYMBOLS[i % 8], size: 7 },
        customdata: line.low ? line.y.map((y, j) => ` ± ${number(line.high[j] - y)}`) : line.y.map(() => ""),
        hovertemplate: "%{y:.4g}%{customdata}<extra>%{fullData.name}</extra>",
      });
    });
    return [traces, {
      height: high(), hovermode: "x unified",
      shapes: chart.drifts.map((x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
        line: { color: css("--quiet"), width: 1, dash: "dot" } })),
      xaxis: { title: text(chart.x), ...few(chart) }, yaxis: { title: text(chart.y), ...bounded(chart) },
    }];
  };
  const ends = chart.lines.map((line) => `${line.name} ${number(line.y[line.y.length - 1])}`).join(", ");
  const table = () => {
    const places = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const at = chart.lines.map((line) => new Map(line.x.map((x, j) => [x, j])));
    return [[chart.x, ...chart.lines.map((line) => line.name)], places.map((x) => [number(x),
      ...chart.lines.map((line, i) => {
        const j = at[i].get(x);
        if (j === undefined) return "";
        return number(line.y[j]) + (line.low ? ` ± ${number(line.high[j] - line.y[j])}` : "");
      })])];
  };
  const drifts = chart.drifts.length ? ` Dotted lines: a new domain comes, at ${chart.drifts.join(", ")}.` : "";
  const node = figure(chart.title, `${chart.title} over ${chart.x}. At the end: ${ends}.${drifts}`, draw,
    { height: high(), tools: boxes, table });
  return node;
}

const high = () => innerWidth < 700 ? 320 : 380;

// Experiences are whole: no half ones on the axis.
function few(chart) {
  const all = chart.lines.flatMap((line) => line.x);
  return all.every(Number.isInteger) && Math.max(...all) <= 20 ? { dtick: 1 } : {};
}

// An interval over few seeds may reach beyond what a percentage can be.
const bounded = (chart) => chart.y.endsWith("(%)") ? { minallowed: -2, maxallowed: 102 } : {};

// Heat maps.

function heat(z, x, y, unit, axes, extra = {}) {
  const small = z.length <= 12 && x.length <= 12;
  return [[{
    type: "heatmap", z, x, y, zmin: 0, zmax: extra.zmax ?? 100, colorscale: "Cividis", hoverongaps: false,
    text: small ? z.map((row) => row.map((v) => v == null ? "" : v.toFixed(0))) : undefined,
    texttemplate: small ? "%{text}" : undefined,
    hovertemplate: `${axes[1]} %{y}<br>${axes[0]} %{x}<br>%{z:.1f}${unit}<extra></extra>`,
    colorbar: { thickness: 12, outlinewidth: 0, ticksuffix: unit },
  }], {
    height: extra.height ?? heatHeight(z.length),
    xaxis: { title: text(axes[0]), type: extra.linear ? "linear" : "category", showgrid: false },
    yaxis: { title: text(axes[1]), type: "category", autorange: "reversed", showgrid: false },
  }];
}

const heatHeight = (rows) => Math.min(620, Math.max(260, 26 * rows + 110));

function matrices(found) {
  let current = 0;
  const tools = found.length > 1 && h("div", { class: "tools" },
    picker("Accuracy of", found.map((m) => m.name), (i) => { current = i; node.render(); }));
  const names = (n) => Array.from({ length: n }, (_, i) => String(i + 1));
  const percent = () => found[current].values.map((row) => row.map((v) => 100 * v));
  const node = figure("Accuracy matrix",
    "Accuracy in percent on each experience, in columns, after each one learned, in rows.",
    () => heat(percent(), names(percent().length), names(percent().length), "%",
      ["tested on", "after"]),
    { height: heatHeight(percent().length), tools, table: () => [["after", ...names(percent().length)],
      percent().map((row, i) => [String(i + 1), ...row.map((v) => v.toFixed(1))])] });
  return node;
}

// Lives.

function lifelines(growth) {
  const { experts, load, marks } = growth;
  const row = new Map(experts.map((e, i) => [e.id, i]));
  const steps = [...experts.map((e) => e.birth), ...growth.events.map((e) => e.step), ...load.map((m) => m.step)];
  const start = Math.min(...steps), last = Math.max(...steps);
  const stop = last + Math.max(1, 0.03 * (last - start));
  const size = Math.max(240, (experts.length > 150 ? 7 : experts.length > 40 ? 12 : 24) * experts.length + 130);
  const draw = () => {
    const c = colours();
    const ribbons = { false: [[], []], true: [[], []] };
    for (const e of experts) {
      const end = e.death ?? stop;
      const cuts = [...new Set([e.birth, end, ...e.frozen.flat().filter((v) => v != null && v > e.birth && v < end)])]
        .sort((a, b) => a - b);
      for (let i = 0; i + 1 < cuts.length; i++) {
        const middle = (cuts[i] + cuts[i + 1]) / 2;
        const frozen = e.frozen.some(([a, b]) => a <= middle && middle < (b ?? Infinity));
        const times = [cuts[i], ...load.map((m) => m.step).filter((s) => s > cuts[i] && s < cuts[i + 1]), cuts[i + 1]];
        const half = times.map((t) => thickness(load, e.id, t) / 2);
        const [xs, ys] = ribbons[frozen];
        xs.push(...times, ...[...times].reverse(), times[0], null);
        const y = row.get(e.id);
        ys.push(...half.map((v) => y + v), ...half.map((v) => y - v).reverse(), y + half[0], null);
      }
    }
    const descent = [[], []];
    for (const e of experts) for (const p of e.parents) {
      descent[0].push(e.birth, e.birth, null);
      descent[1].push(row.get(p), row.get(e.id), null);
    }
    const traces = [{ x: descent[0], y: descent[1], mode: "lines", line: { color: css("--quiet"), width: experts.length > 100 ? 0.4 : 1 },
      hoverinfo: "skip", showlegend: false }];
    for (const [frozen, name, colour] of [[false, load.length ? "learning (width: load)" : "learning", c[0]],
      [true, "frozen", c[5]]]) {
      const [x, y] = ribbons[frozen];
      if (x.length) traces.push({ x, y, mode: "lines", fill: "toself", fillcolor: pale(colour, frozen ? 0.5 : 0.9),
        line: { width: 0, color: colour, simplify: false }, name, hoverinfo: "skip" });
    }
    for (const [act, [name, symbol, colour]] of Object.entries(ACTS)) {
      const found = marks.filter(([what]) => what === act);
      if (found.length) traces.push({
        x: found.map((m) => m[1]), y: found.map((m) => row.get(m[2])), mode: "markers", name,
        marker: { symbol, size: experts.length > 60 ? 5 : 9, color: c[colour] },
        text: found.map((m) => `expert ${m[2]}: ${name} at step ${m[1]}${whyOf(growth, m)}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const labelled = experts.filter((_, i) => experts.length <= 40 || i % 10 === 0);
    return [traces, {
      height: size, showlegend: true,
      legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 },
      xaxis: { title: text("step"), range: [start - 0.01 * (stop - start), stop] },
      yaxis: { title: text("expert"), range: [experts.length - 0.4, -0.6], showgrid: false, zeroline: false,
        tickvals: labelled.map((e) => row.get(e.id)), ticktext: labelled.map((e) => e.id) },
    }];
  };
  const alive = experts.filter((e) => e.death == null).length;
  return figure("Life lines",
    `Lives of ${experts.length} experts from step ${start} to ${last}, of which ${alive} are alive at the end. `
    + "The family tree and the decisions say the same in words.", draw, { height: size, tall: experts.length > 20 });
}

const shares = new WeakMap(); // load -> its moments as maps, for they are looked up often
function thickness(load, id, step) {
  if (!load.length) return 0.3;
  if (!shares.has(load)) shares.set(load, load.map((m) => m.step));
  const moments = shares.get(load);
  let low = 0, high = moments.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (moments[middle] >= step) high = middle; else low = middle + 1;
  }
  // the root, so that small loads stay visible beside large ones
  return 0.1 + 0.75 * Math.sqrt(Math.min(1, Math.max(0, load[low].load[id] ?? 0)));
}

function whyOf(growth, [act, step, id]) {
  const event = growth.events.find((e) => e.done && e.act === act && e.step === step
    && (String(e.child) === id || e.ids.map(String).includes(id)));
  return event && event.why ? `<br>${event.why.replace(/</g, "&lt;").replace(/(.{60}\S*) /g, "$1<br>")}` : "";
}

function loads(growth) {
  const { experts, load } = growth;
  const ids = experts.map((e) => e.id);
  const steps = load.map((m) => m.step);
  const values = ids.map((id) => load.map((m) => m.load[id] === undefined ? null : 100 * m.load[id]));
  const top = Math.max(1, ...values.flat().filter((v) => v != null));
  const size = Math.min(700, Math.max(240, 14 * ids.length + 110));
  return figure("Load", "The share of the inputs that each expert, in rows, took over the steps, in columns.",
    () => heat(values, steps.map(Number), ids, "%", ["step", "expert"],
      { zmax: top, linear: true, height: size }),
    { height: size, table: () => [["step", ...ids], steps.map((s, j) => [String(s), ...ids.map((_, i) =>
      values[i][j] == null ? "" : `${values[i][j].toFixed(1)}%`)])] });
}

function routing({ by, experts, groups, counts, step }) {
  const sums = groups.map((_, j) => counts.reduce((sum, r) => sum + r[j], 0) || 1);
  const values = counts.map((r) => r.map((v, j) => 100 * v / sums[j]));
  const ids = experts.map(String);
  return figure(`Who takes what, by ${by}`,
    `The share of each ${by}, in columns, that each expert, in rows, receives`
      + (step === undefined ? "." : `, after step ${step}.`),
    () => heat(values, groups, ids, "%", [by, "expert"], { zmax: Math.max(1, ...values.flat()) }),
    { height: heatHeight(ids.length), table: () => [["expert", ...groups], values.map((r, i) => [ids[i], ...r.map((v) => `${v.toFixed(1)}%`)])] });
}

// The family tree, after the tree pattern of the ARIA Authoring Practices.

function family(growth) {
  const byId = new Map(growth.experts.map((e) => [e.id, e]));
  const children = new Map();
  for (const e of growth.experts) {
    const parent = e.parents[0] ?? null;
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(e.id);
  }
  const of = (id) => children.get(id) ?? [];
  const open = new Set(growth.experts.length <= 60 ? byId.keys() : of(null));
  const tree = h("ul", { role: "tree", "aria-label": "Family tree of the experts" });
  const card = h("div", { class: "card", role: "status" });
  let selected = of(null)[0] ?? null;

  function render(focus = false) {
    const items = [];
    const stack = of(null).map((id, i, all) => [id, 0, i + 1, all.length]).reverse();
    while (stack.length) {
      const [id, depth, position, size] = stack.pop();
      const e = byId.get(id), young = of(id);
      items.push(h("li", {
        role: "treeitem", "data-id": id, "aria-level": depth + 1, "aria-posinset": position, "aria-setsize": size,
        "aria-expanded": young.length ? String(open.has(id)) : null, "aria-selected": String(id === selected),
        tabindex: id === selected ? "0" : "-1", style: `--depth:${Math.min(depth, 20)}`,
      },
      h("span", { class: "twist", "aria-hidden": "true" }, young.length ? (open.has(id) ? "▾" : "▸") : "·"),
      h("span", {}, `expert ${id}`),
      h("span", { class: "born" }, e.act === "init" ? "initial" : `born at ${e.birth}`),
      h("span", { class: `fate ${e.fate}` }, e.death == null ? e.fate : `${e.fate} at ${e.death}`)));
      if (open.has(id)) young.map((child, i) => [child, depth + 1, i + 1, young.length]).reverse()
        .forEach((entry) => stack.push(entry));
    }
    tree.replaceChildren(...items);
    if (focus) tree.querySelector('[tabindex="0"]')?.focus();
    describe();
  }

  function describe() {
    const e = byId.get(selected);
    if (!e) return card.replaceChildren(h("p", {}, "No experts."));
    const entry = (name, value) => value ? [h("dt", {}, name), h("dd", {}, value)] : [];
    card.replaceChildren(h("h4", {}, `Expert ${e.id}`), h("dl", {},
      entry("born", e.act === "init" ? "with the layer" : `at step ${e.birth}, by ${e.act}`),
      entry("parents", e.parents.join(", ")), entry("why", e.why),
      entry("children", of(e.id).join(", ")),
      entry("frozen", e.frozen.map(([a, b]) => `from ${a}${b == null ? " on" : ` to ${b}`}`).join(", ")),
      entry("ended", e.death == null ? "" : `at step ${e.death}: ${e.fate}${e.child ? ` into ${e.child}` : ""}`),
      entry("because", e.end)));
  }

  const select = (id, focus = true) => { selected = id; render(focus); };
  const toggle = (id) => { if (open.has(id)) open.delete(id); else open.add(id); };
  tree.addEventListener("click", (event) => {
    const item = event.target.closest("[role=treeitem]");
    if (!item) return;
    if (of(item.dataset.id).length) toggle(item.dataset.id);
    select(item.dataset.id);
  });
  tree.addEventListener("keydown", (event) => {
    const items = [...tree.children];
    const at = items.findIndex((item) => item.dataset.id === selected);
    const go = (i) => { if (items[i]) select(items[i].dataset.id); };
    const moves = {
      ArrowDown: () => go(at + 1), ArrowUp: () => go(at - 1), Home: () => go(0), End: () => go(items.length - 1),
      ArrowRight: () => {
        if (!of(selected).length) return;
        if (open.has(selected)) go(at + 1); else { open.add(selected); render(true); }
      },
      ArrowLeft: () => {
        if (of(selected).length && open.has(selected)) { open.delete(selected); render(true); }
        else if (byId.get(selected).parents.length) select(byId.get(selected).parents[0]);
      },
      Enter: () => { toggle(selected); render(true); }, " ": () => { toggle(selected); render(true); },
    };
    if (!moves[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    moves[event.key]();
  });
  const find = h("input", { type: "search", size: "8", oninput: () => {
    const e = byId.get(find.value.trim());
    if (!e) return;
    for (let p = e; p.parents.length; p = byId.get(p.parents[0])) open.add(p.parents[0]);
    select(e.id, false);
    tree.querySelector('[tabindex="0"]').scrollIntoView({ block: "nearest" });
  } });
  const tools = h("div", { class: "tools" },
    h("button", { type: "button", onclick: () => { byId.forEach((_, id) => open.add(id)); render(); } }, "Open all"),
    h("button", { type: "button", onclick: () => { open.clear(); selected = of(null)[0] ?? null; render(); } }, "Close all"),
    h("label", {}, "Find expert ", find));
  render();
  return h("div", {}, h("h4", {}, "Family tree"), tools, h("div", { class: "family" }, tree, card));
}

// The decision log.

function decisions(growth) {
  const events = growth.events.filter((e) => e.act !== "init");
  const acts = [...new Set(events.map((e) => e.act))];
  const wanted = new Set(acts);
  const PAGE = 100;
  let limit = PAGE, outcome = "all", words = "";
  const body = h("tbody");
  const count = h("p", { class: "quiet", role: "status" });
  const more = h("button", { type: "button", onclick: () => { limit += 10 * PAGE; render(); } }, "Show more");
  function render() {
    const found = events.filter((e) => wanted.has(e.act)
      && (outcome === "all" || e.done === (outcome === "done"))
      && (!words || `${e.ids.join(" ")} ${e.child ?? ""} ${e.why}`.toLowerCase().includes(words)));
    body.replaceChildren(...found.slice(0, limit).map((e) => h("tr", {},
      h("th", { scope: "row" }, String(e.step)), h("td", { class: "words", style: "min-width:4rem" }, e.act),
      h("td", {}, e.ids.join(", ") || "–"), h("td", {}, e.child == null ? "–" : String(e.child)),
      h("td", {}, e.done ? "done" : "refused"),
      h("td", {}, e.change == null ? "–" : `${(100 * e.change).toFixed(1)}%`), h("td", { class: "words" }, e.why))));
    count.textContent = `${found.length} of ${events.length} decisions`
      + (found.length > limit ? `, the first ${limit} shown` : "");
    more.hidden = found.length <= limit;
  }
  const changed = () => { limit = PAGE; render(); };
  const tools = h("div", { class: "tools" },
    h("fieldset", {}, h("legend", {}, "Acts"), acts.map((act) => h("label", {},
      h("input", { type: "checkbox", checked: true, value: act, onchange: (event) => {
        if (event.target.checked) wanted.add(act); else wanted.delete(act);
        changed();
      } }), act))),
    h("label", {}, "Outcome ", h("select", { onchange: (event) => { outcome = event.target.value; changed(); } },
      [["all", "all"], ["done", "done"], ["refused", "refused"]].map(([value, name]) => h("option", { value }, name)))),
    h("label", {}, "Find ", h("input", { type: "search", placeholder: "expert or reason", oninput: (event) => {
      words = event.target.value.trim().toLowerCase();
      changed();
    } })));
  render();
  const head = ["step", "act", "experts", "child", "outcome", "output changed by", "why"];
  return h("div", { class: "decisions" }, h("h4", {}, "Decisions"), tools, count,
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Decisions" },
      h("table", {}, h("thead", {}, h("tr", {}, head.map((cell, i) =>
        h("th", { scope: "col", class: i === 1 || i === 6 ? "words" : null }, cell)))), body)), more);
}

function growths(found) {
  const place = h("div", { class: "growth" });
  const show = (i) => {
    const growth = found[i];
    const parts = [family(growth), lifelines(growth)];
    if (growth.load.length) parts.push(loads(growth));
    growth.routing.forEach((map) => parts.push(routing(map)));
    if (growth.events.some((e) => e.act !== "init")) parts.push(decisions(growth));
    for (const old of place.children) charts.delete(old);
    place.replaceChildren(...parts);
    parts.forEach((part) => part.render?.());
  };
  const node = h("div", {}, h("h3", {}, "Experts"),
    found.length > 1 ? picker("Of", found.map((g) => g.name), show) : h("p", { class: "quiet" }, found[0].name), place);
  node.render = () => show(0);
  return node;
}

// The page.

function build(run) {
  const parts = [];
  if (run.charts.length) parts.push(h("h3", {}, "Over time"));
  run.charts.forEach((chart) => parts.push(lines(chart)));
  if (run.matrices.length) parts.push(matrices(run.matrices));
  if (run.growths.length) parts.push(growths(run.growths));
  return parts;
}

function drawAll() {
  colours().forEach((colour, i) => document.documentElement.style.setProperty(`--line-${i}`, colour));
  for (const chart of charts) chart.render();
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const tell = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(dark()));
    button.setAttribute("aria-label", dark() ? "Light colours" : "Dark colours");
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    tell();
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { tell(); drawAll(); });
  tell();
  drawAll();
}

function setUpRuns(built) {
  const choice = document.getElementById("run-choice");
  const sections = [...document.querySelectorAll("section.run")];
  const show = (i) => {
    sections.forEach((section, j) => { section.hidden = i !== j; });
    built[i].forEach((part) => part.render?.());
    sessionStorage.setItem("growmoe-run", i);
  };
  if (!choice) return show(0);
  choice.addEventListener("change", () => show(Number(choice.value)));
  const last = Number(sessionStorage.getItem("growmoe-run") ?? 0);
  choice.value = sections[last] ? last : 0;
  show(Number(choice.value));
}

function watch() {
  const stamp = () => fetch("stamp", { cache: "no-store" }).then((answer) => answer.ok ? answer.text() : null).catch(() => null);
  let known = null;
  setInterval(async () => {
    const now = await stamp();
    if (known != null && now != null && now !== known) {
      sessionStorage.setItem("growmoe-scroll", scrollY);
      location.reload();
    }
    known = now ?? known;
  }, 2000);
  const y = sessionStorage.getItem("growmoe-scroll");
  if (y != null) scrollTo({ top: Number(y), behavior: "instant" });
}

(async () => {
  setUpTheme();
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly");
  document.head.append(script);
  const report = JSON.parse(await unpacked("data"));
  const built = report.runs.map((run, i) => {
    const parts = build(run);
    document.querySelector(`[data-run="${i}"]`).append(...parts);
    return parts;
  });
  setUpRuns(built);
  if (document.documentElement.dataset.watched === "true") watch();
  document.documentElement.dataset.ready = "true";
})().catch((error) => {
  const message = document.getElementById("message");
  message.hidden = false;
  message.textContent = `The charts cannot be drawn: ${error.message}. A browser of 2023 or later is needed.`;
  console.error(error);
});
