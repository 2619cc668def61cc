// Quality against bytes held: one panel a protocol, one line a method.
const WIDTH = 560, HEIGHT = 350, LEFT = 52, RIGHT = 14, TOP = 14, BOTTOM = 46;
const DASHES = [null, "7 4", "2 3"];

// Colour, dash and mark of a method; the same wherever it appears.
function look(data, method) {
  const place = data.methods.filter((name) => name !== "full").indexOf(method);
  const round = Math.floor(place / 8);
  return { colour: `var(--c${place % 8})`, dash: DASHES[round % 3], shape: round % 3 };
}

function mark(shape, x, y, size) {
  const points = shape === 1
    ? [[-1, -1], [1, -1], [1, 1], [-1, 1]]
    : [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]];
  if (shape === 0) return el("circle", { cx: x, cy: y, r: size });
  return el("polygon", { points: points.map(([a, b]) => `${x + a * size},${y + b * size}`).join(" ") });
}

function ticksOf(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return { found, step };
}

// Where a share of the full cache's bytes lies; a doubling is as wide everywhere.
function horizontal(records) {
  const shares = records.map((record) => record.bytes_share);
  const low = Math.min(...shares) / 1.15, high = Math.max(1, ...shares) * 1.06;
  const width = WIDTH - LEFT - RIGHT;
  const place = (share) => LEFT + (Math.log(share / low) / Math.log(high / low)) * width;
  const all = [0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2];
  let last = -99;
  const ticks = all.filter((share) => {
    const keep = share >= low && share <= high && place(share) - last > 38;
    if (keep) last = place(share);
    return keep;
  });
  return { place, ticks };
}

function vertical(records, measure) {
  let low = Math.min(...records.map((record) => record.low));
  let high = Math.max(...records.map((record) => record.high));
  const room = Math.max((high - low) * 0.06, measure === "score" ? 0.01 : 0.001);
  low -= room;
  high += room;
  if (measure === "score") [low, high] = [Math.max(0, low), Math.min(1.02, high)];
  const height = HEIGHT - TOP - BOTTOM;
  const place = (value) => TOP + ((high - value) / (high - low)) * height;
  return { place, ...ticksOf(low, high, 6) };
}

function told(record, measure) {
  const value = (share) => (measure === "score" ? (100 * share).toFixed(1) : share.toFixed(4));
  const unit = measure === "score" ? " %" : " nats a token";
  const kept = record.kept_share === null ? "" : `\nentries kept: ${percent(record.kept_share)}`;
  return `${record.method} at ${record.budget}\n${value(record.mean)}${unit}`
    + ` [${value(record.low)}, ${value(record.high)}]\n`
    + `bytes held: ${percent(record.bytes_share)} of full, ${bytes(record.bytes)} a prompt${kept}\n`
    + `${record.n} questions, ${record.documents} documents, ${record.tasks} task(s)`;
}

function axes(svg, x, y, measure) {
  const decimals = Math.max(0, Math.ceil(-Math.log10(y.step * (measure === "score" ? 100 : 1)) - 1e-9));
  for (const value of y.found) {
    const at = y.place(value);
    const text = measure === "score" ? `${(100 * value).toFixed(decimals)} %` : value.toFixed(decimals);
    svg.append(el("line.axis", { x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
    svg.append(el("text.tick", { x: LEFT - 7, y: at + 4, "text-anchor": "end" }, text));
  }
  for (const share of x.ticks) {
    const at = x.place(share), bottom = HEIGHT - BOTTOM;
    svg.append(el("line.axis", { x1: at, x2: at, y1: bottom, y2: bottom + 5 }));
    svg.append(el("text.tick", { x: at, y: bottom + 19, "text-anchor": "middle" }, `${+(100 * share).toFixed(1)} %`));
  }
  const middle = (LEFT + WIDTH - RIGHT) / 2;
  svg.append(el("text.name", { x: middle, y: HEIGHT - 7, "text-anchor": "middle" }, "bytes held, of the full cache (log scale)"));
}

function series(records, measure, x, y, style, method) {
  const group = el("g.series", { "data-method": method });
  const at = (record) => [x.place(record.bytes_share), y.place(record.mean)];
  const path = records.map((record, i) => `${i ? "L" : "M"}${at(record).map((v) => v.toFixed(1)).join(" ")}`);
  group.append(el("path", { d: path.join(""), stroke: style.colour, "stroke-dasharray": style.dash }));
  for (const record of records) {
    const [a, b] = at(record), low = y.place(record.low), high = y.place(record.high);
    const ends = `M${a - 3} ${high}h6M${a - 3} ${low}h6M${a} ${high}V${low}`;
    group.append(el("path.whisker", { d: ends, stroke: style.colour }));
    const dot = mark(style.shape, a, b, 5);
    const words = told(record, measure);
    for (const [key, value] of Object.entries({ class: "mark", fill: style.colour, tabindex: 0, role: "img", "aria-label": words })) {
      dot.setAttribute(key, value);
    }
    group.append(tipped(dot, words));
  }
  return group;
}

// A panel, or null where the protocol has nothing under this measure and length.
function panel(data, state, protocol, hidden) {
  const { measure, length } = state;
  // All panels have the same axes, for what they show.
  const all = data.quality.filter((record) => record.measure === measure
    && record.length === length && record.bytes_share !== null && !hidden.has(record.method));
  const records = all.filter((record) => record.protocol === protocol);
  if (!records.length) return null;
  const x = horizontal(all), y = vertical(all, measure);
  const name = `Quality against bytes held, question ${protocol}: a line for each of ${unique(records.map((r) => r.method)).length} methods`;
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": name });
  axes(svg, x, y, measure);
  const full = records.find((record) => record.method === "full");
  if (full) {
    const [low, high, at] = [y.place(full.low), y.place(full.high), y.place(full.mean)];
    const width = WIDTH - LEFT - RIGHT;
    svg.append(el("rect.band", { x: LEFT, y: high, width, height: Math.max(0, low - high) }));
    const line = el("line.full", { x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at });
    svg.append(line, el("text.tick", { x: LEFT + 6, y: at - 6 }, "full cache"));
    svg.append(tipped(el("rect", { x: LEFT, y: at - 6, width, height: 12, fill: "transparent" }), told(full, measure)));
  }
  for (const method of data.methods) {
    const mine = records.filter((record) => record.method === method)
      .sort((a, b) => a.bytes_share - b.bytes_share);
    if (method === "full" || hidden.has(method) || !mine.length) continue;
    svg.append(series(mine, measure, x, y, look(data, method), method));
  }
  const words = { seen: "question seen: it ends the prompt", unseen: "question unseen: asked after compression" };
  return el("div", {}, el("h3", {}, words[protocol] || protocol), svg);
}

// Buttons that show and hide methods; the pointer on one dims the others.
function legend(data, hidden, redraw, root) {
  const names = data.methods.filter((name) => name !== "full");
  const fade = (chosen) => root.querySelectorAll(".series").forEach((group) => {
    group.classList.toggle("faded", chosen !== null && group.dataset.method !== chosen);
  });
  const set = (list) => { hidden.clear(); list.forEach((name) => hidden.add(name)); redraw(); };
  const buttons = names.map((name) => {
    const style = look(data, name), shown = !hidden.has(name);
    const dot = mark(style.shape, 13, 6, 4);
    dot.setAttribute("fill", style.colour);
    const line = el("line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: style.colour, "stroke-width": 2, "stroke-dasharray": style.dash });
    return el("button", {
      type: "button", "aria-pressed": String(shown), "data-toggle": name,
      click: () => { if (shown) hidden.add(name); else hidden.delete(name); redraw(name); },
      pointerenter: () => fade(name), pointerleave: () => fade(null),
    }, el("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, line, dot), name);
  });
  if (names.length > 3) {
    buttons.push(el("button", { type: "button", click: () => set([]) }, "all"));
    buttons.push(el("button", { type: "button", click: () => set(names) }, "none"));
  }
  return el("div.legend", { role: "group", "aria-label": "Methods" }, buttons);
}
