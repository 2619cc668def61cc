// Tables and heat maps.
const number = (value, measure, sign = false) => {
  const text = measure === "score" ? (100 * value).toFixed(1) : value.toFixed(4);
  return sign && value >= 0 ? `+${text}` : text;
};
const interval = (record, measure, sign) =>
  `[${number(record.low, measure, sign)}, ${number(record.high, measure, sign)}]`;

const WORDS = new Set(["question", "method", "error", "answered", "expected"]);

function headings(names, sort, order) {
  return el("thead", {}, el("tr", {}, names.map(([id, text]) => {
    const sorted = order && id !== null && order.id === id ? (order.down ? "descending" : "ascending") : null;
    const arrow = sorted ? (order.down ? " ↓" : " ↑") : "";
    const inside = sort ? el("button", { type: "button", click: () => sort(id) }, text + arrow) : text;
    return el(WORDS.has(id) ? "th.words" : "th", { scope: "col", "aria-sort": sorted }, inside);
  })));
}

// Methods at budgets by tasks.
function taskTable(data, state, sort) {
  const { protocol, measure, length, order } = state;
  const fits = (record) => record.protocol === protocol && record.measure === measure && record.length === length;
  const cells = data.cells.filter(fits), quality = data.quality.filter(fits);
  if (!quality.length) return el("p.note", {}, "No answers under this choice.");
  const tasks = unique(cells.map((record) => record.task)).sort();
  const found = new Map(cells.map((record) => [`${record.method}\n${record.budget}\n${record.task}`, record]));
  const of = (record, task) => (task === "" ? record : found.get(`${record.method}\n${record.budget}\n${task}`));
  const worth = (record) => {
    const chosen = order.id === "bytes" ? record.bytes_share : (of(record, order.id) || {}).mean;
    return chosen === undefined || chosen === null ? -Infinity : chosen;
  };
  const rows = order.id === null ? quality : [...quality].sort((a, b) => (order.down ? -1 : 1) * (worth(a) - worth(b)));
  const values = [...cells, ...quality].map((record) => record.mean);
  const [least, most] = measure === "score" ? [0, 1] : [Math.min(...values), Math.max(...values)];
  const shade = (mean) => (measure === "score" ? mean : (most - mean) / (most - least || 1));
  const body = el("tbody", {}, rows.map((record, i) => el(
    order.id === null && (!i || rows[i - 1].method !== record.method) ? "tr.first" : "tr", {},
    el("th", { scope: "row" }, record.method, " ", el("span.note", {}, record.budget)),
    el("td", {}, record.bytes_share === null ? "–" : percent(record.bytes_share)),
    ["", ...tasks].map((task) => {
      const one = of(record, task);
      if (!one) return el("td", {}, "–");
      const missing = task === "" && one.tasks < tasks.length ? ` · ${one.tasks} of ${tasks.length} tasks` : "";
      return el("td.shade", { style: `--s:${shade(one.mean).toFixed(3)}` }, number(one.mean, measure),
        el("small", {}, `${interval(one, measure)} n ${one.n}${missing}`));
    }),
  )));
  const names = [[null, "method, budget"], ["bytes", "bytes"], ["", "all tasks"], ...tasks.map((task) => [task, task])];
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": "Results by task" },
    el("table", {}, headings(names, sort, order), body));
}

// Differences to a method, with a small picture of each interval.
function pairedTable(data, state) {
  const { protocol, measure, base } = state;
  const mine = data.paired.filter((r) => r.protocol === protocol && r.measure === measure && r.base === base);
  if (!mine.length) return el("p.note", {}, "Nothing to compare under this choice.");
  const budgets = data.budgets.filter((name) => mine.some((r) => r.budget === name));
  const reach = Math.max(...mine.flatMap((r) => [Math.abs(r.low), Math.abs(r.high)]), 1e-9);
  const at = (value) => (60 + (56 * value) / reach).toFixed(1);
  const better = measure === "score" ? 1 : -1;
  const cell = (record) => {
    if (!record) return el("td", {}, "–");
    const sure = record.low > 0 || record.high < 0;
    const kind = !sure ? "td" : record.mean * better > 0 ? "td.up" : "td.down";
    const colour = !sure ? "var(--faint)" : record.mean * better > 0 ? "var(--good)" : "var(--bad)";
    const picture = el("svg", { viewBox: "0 0 120 10", width: 120, height: 10, "aria-hidden": "true" },
      el("line", { x1: 60, x2: 60, y1: 0, y2: 10, stroke: "var(--faint)" }),
      el("line", { x1: at(record.low), x2: at(record.high), y1: 5, y2: 5, stroke: colour, "stroke-width": 2 }),
      el("circle", { cx: at(record.mean), cy: 5, r: 3.2, fill: colour }));
    return el(kind, {}, el(sure ? "b" : "span", {}, number(record.mean, measure, true)),
      el("small", {}, interval(record, measure, true), ` n ${record.n}`), picture);
  };
  const body = el("tbody", {}, data.methods.filter((name) => mine.some((r) => r.method === name)).map((name) =>
    el("tr", {}, el("th", { scope: "row" }, name), budgets.map((budget) =>
      cell(mine.find((r) => r.method === name && r.budget === budget))))));
  const names = [[null, "method"], ...budgets.map((budget) => [budget, budget])];
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": "Paired differences" },
    el("table", {}, headings(names), body));
}

// ------------------------------------------------------------------------- heat maps
const heat = (share) => `rgba(var(--heat), ${(0.05 + 0.95 * Math.min(1, Math.max(0, share))).toFixed(3)})`;

function scale(low, high) {
  return el("span.scale", {}, low, el("i"), high);
}

// A grid of values: `value(row, column)` is {share, said, text} or null.
function grid(title, rows, columns, value, size) {
  const left = Math.max(16, 6 * Math.max(...rows.map((row) => String(row).length)) + 6), bottom = 15;
  const [wide, high] = size;
  const width = left + columns.length * wide + 1, height = rows.length * high + bottom;
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const every = Math.ceil(11 / high), spread = Math.ceil(26 / wide);
  rows.forEach((row, y) => {
    if (y % every === 0) {
      svg.append(el("text", { x: left - 4, y: y * high + high / 2 + 3.5, "text-anchor": "end" }, String(row)));
    }
    columns.forEach((column, x) => {
      const one = value(row, column);
      if (!one) return;
      const box = { x: left + x * wide, y: y * high, width: wide, height: high, fill: heat(one.share) };
      svg.append(tipped(el("rect", box), one.said));
      if (one.text) {
        const where = { x: left + (x + 0.5) * wide, y: (y + 0.5) * high };
        svg.append(el(one.share > 0.6 ? "text.in.strong" : "text.in", where, one.text));
      }
    });
  });
  columns.forEach((column, x) => {
    if (x % spread) return;
    svg.append(el("text", { x: left + (x + 0.5) * wide, y: height - 3, "text-anchor": "middle" }, String(column)));
  });
  return svg;
}

function needleMaps(data, state) {
  const mine = data.needles.filter((r) => r.protocol === state.protocol && r.task === state.needle
    && (state.budget === "" || r.budget === state.budget || r.method === "full"));
  if (!mine.length) return el("p.note", {}, "No needles under this choice.");
  const lengths = unique(mine.map((r) => r.length)).sort((a, b) => a - b);
  const depths = unique(mine.map((r) => r.depth)).sort((a, b) => a - b);
  const maps = unique(mine.map((r) => `${r.method}\n${r.budget}`)).map((key) => {
    const [method, budget] = key.split("\n");
    const own = new Map(mine.filter((r) => r.method === method && r.budget === budget)
      .map((r) => [`${r.depth} ${r.length}`, r]));
    const value = (depth, length) => {
      const r = own.get(`${depth} ${length}`);
      return r && {
        share: r.mean, text: String(Math.round(100 * r.mean)),
        said: `${method} at ${budget}\ndepth ${depth}, length ${length}\n${percent(r.mean)} right, n ${r.n}`,
      };
    };
    const title = `${method} at ${budget}: share right by depth (rows) and length (columns)`;
    return el("figure.map", {}, el("figcaption", {}, `${method} `, el("span", {}, budget)),
      grid(title, depths, lengths, value, [Math.max(34, Math.min(60, 170 / lengths.length)), 17]));
  });
  return el("div.maps", {}, maps);
}

function shareMaps(data, state) {
  const mine = data.shares.filter((r) => r.protocol === state.protocol
    && (state.budget === "" || r.budget === state.budget) && r.method !== "full");
  if (!mine.length) return el("p.note", {}, "No budgets under this choice.");
  const most = Math.max(...mine.flatMap((r) => r.share.flat()), 1e-9);
  const maps = mine.map((r) => {
    const layers = r.share.map((_, layer) => layer), heads = r.share[0].map((_, head) => head);
    const all = r.share.flat(), mean = all.reduce((a, b) => a + b, 0) / all.length;
    const high = Math.max(6, Math.min(20, 320 / layers.length)), wide = Math.max(9, Math.min(38, 180 / heads.length));
    const value = (layer, head) => ({
      share: r.share[layer][head] / most, text: "",
      said: `${r.method} at ${r.budget}\nlayer ${layer}, KV head ${head}: ${percent(r.share[layer][head])} of the prompt\n`
        + `the layer's mean: ${percent(r.share[layer].reduce((a, b) => a + b, 0) / heads.length)}`,
    });
    const title = `${r.method} at ${r.budget}: fraction kept by layer (rows) and KV head (columns)`;
    return el("figure.map", {}, el("figcaption", {}, `${r.method} `, el("span", {}, `${r.budget}, mean ${percent(mean)}`)),
      grid(title, layers, heads, value, [wide, high]));
  });
  return el("div", {}, el("p", {}, scale("0 %", percent(most))), el("div.maps", {}, maps));
}
