// The report's sections; what is chosen above changes those that it concerns.
const data = readData();
const state = {
  protocol: data.protocols[0], length: null, measure: data.measures[0], base: data.base,
  budget: "", needle: (data.needles[0] || {}).task, order: { id: null, down: true }, only: "",
};
const hidden = new Set(first(data).slice(8));
const MEASURES = { score: "score (more is better)", nll: "NLL, nats a token (less is better)" };

// Methods, the best on average first: no more than eight lines are drawn at once unless asked for.
function first(data) {
  const names = data.methods.filter((name) => name !== "full");
  const mean = (name) => {
    const mine = data.quality.filter((r) => r.method === name && r.length === null);
    const sum = mine.reduce((a, r) => a + (r.measure === "score" ? r.mean : -r.mean), 0);
    return mine.length ? sum / mine.length : -Infinity;
  };
  return names.length > 8 ? [...names].sort((a, b) => mean(b) - mean(a)) : names;
}

function section(id, title, words, draw) {
  const body = el("div");
  const card = el("section.card", { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title), el("p.sub", {}, words), body);
  const redraw = () => body.replaceChildren(...[draw(redraw)].flat().filter(Boolean));
  document.getElementById("main").append(card);
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  sections.push(redraw);
  redraw();
}

const sections = [];
const redrawAll = () => sections.forEach((redraw) => redraw());
const set = (name) => (value) => { state[name] = value; redrawAll(); };

function heading() {
  const { counts } = data;
  const stat = (value, words) => el("div", {}, el("b", {}, String(value)), " ", el("span", {}, words));
  document.getElementById("head").append(
    el("h1", {}, "Quality against memory"),
    el("div.stats", {}, stat(counts.rows.toLocaleString("en"), "answers"), stat(data.methods.length, "methods"),
      stat(data.tasks.length, "tasks"), stat(data.lengths.join(", ") || "no", "tokens long"),
      stat(counts.failed, "failed")),
    el("p.sub", {}, `Intervals are 95 %: ${data.draws} bootstrap draws of documents, the same for every method. `
      + "Over several tasks, each task weighs the same."),
    ...data.notes.map((note) => el("p.warning", {}, note)));
}

function controls() {
  const root = document.getElementById("controls");
  const same = (list) => list.map((name) => [name, name]);
  if (data.measures.length > 1) {
    root.append(choice("measure", "measure", data.measures.map((name) => [name, MEASURES[name]]), state.measure, set("measure")));
  }
  if (data.protocols.length > 1) {
    root.append(choice("question", "protocol", same(data.protocols), state.protocol, set("protocol")));
  }
  if (data.lengths.length > 1) {
    const lengths = [["", "all"], ...data.lengths.map((length) => [String(length), String(length)])];
    root.append(choice("length", "length", lengths, "", (value) => set("length")(value === "" ? null : Number(value))));
  }
  const budgets = data.budgets.filter((name) => name !== "100%");
  if (budgets.length > 1) {
    // Maps of all budgets at once would be many.
    const cells = unique(data.shares.map((r) => `${r.method} ${r.budget}`)).length;
    if (cells > 16) state.budget = budgets[Math.floor((budgets.length - 1) / 2)];
    root.append(choice("budget of maps", "budget", [["", "all"], ...same(budgets)], state.budget, set("budget")));
  }
  if (!root.children.length) root.remove();
}

function chart(redraw) {
  const drawn = data.protocols.map((protocol) => panel(data, state, protocol, hidden)).filter(Boolean);
  const none = el("p.note", {}, "No answers with bytes under this choice.");
  const panels = el("div.panels", {}, drawn.length ? drawn : none);
  const again = (name) => {
    redraw();
    const button = [...document.querySelectorAll("[data-toggle]")].find((one) => one.dataset.toggle === name);
    if (button) button.focus({ preventScroll: true });
  };
  return [legend(data, hidden, again, panels), panels];
}

function table(redraw) {
  return taskTable(data, state, (id) => {
    const { order } = state;
    state.order = id === null ? { id, down: true } : { id, down: order.id === id ? !order.down : true };
    redraw();
  });
}

function paired() {
  const bases = unique(data.paired.map((r) => r.base));
  if (!bases.length) return el("p.note", {}, "There is one method only.");
  const options = data.methods.filter((name) => bases.includes(name)).map((name) => [name, name]);
  const pick = choice("less that of", "base", options, state.base, (value) => {
    state.base = value;
    redrawAll();
    document.getElementById("base").focus();
  });
  return [el("div.row", {}, pick), pairedTable(data, state)];
}

function needles() {
  const tasks = unique(data.needles.map((r) => r.task));
  const pick = choice("task", "needle", tasks.map((name) => [name, name]), state.needle, set("needle"));
  return [el("div.row", {}, tasks.length > 1 ? pick : null, scale("0 %", "100 % right")), needleMaps(data, state)];
}

function failures() {
  const pick = choice("method", "only", [["", "all"], ...data.methods.map((name) => [name, name])], state.only, (value) => {
    state.only = value;
    redrawAll();
    document.getElementById("only").focus();
  });
  const chosen = (list) => list.filter((r) => state.only === "" || r.method === state.only);
  const [errors, wrong] = [chosen(data.errors), chosen(data.wrong)];
  const row = (r, ...cells) => el("tr", {}, el("td.words", {}, r.ask), el("td.words", {}, `${r.method} ${r.budget}, ${r.protocol}`),
    cells.map((cell) => el("td.words", {}, cell)));
  const list = (names, rows) => el("div.scroll", { tabindex: 0, role: "region", "aria-label": names[0] },
    el("table", {}, headings(names.map((name) => [name, name])), el("tbody", {}, rows)));
  const parts = [el("div.row", {}, pick)];
  if (errors.length) {
    const more = data.counts.failed > data.errors.length ? `, the first ${data.errors.length} of ${data.counts.failed}` : "";
    parts.push(el("h3", {}, `failed: ${errors.length}${more}`));
    parts.push(list(["question", "method", "error"], errors.map((r) => row(r, r.error))));
  }
  if (wrong.length) {
    parts.push(el("h3", { style: "margin-top:1rem" }, "wrong answers, a sample"));
    parts.push(list(["question", "method", "answered", "expected", "score"],
      wrong.map((r) => row(r, r.prediction.trim() || "(nothing)", r.answers.join(" | "), percent(r.score, 0)))));
  }
  return errors.length + wrong.length ? parts : [...parts, el("p.note", {}, "None.")];
}

function settings() {
  return Object.entries(data.settings).map(([path, values]) => el("details.settings", {},
    el("summary", {}, path),
    el("pre", {}, Object.entries(values).map(([key, value]) => `${key} = ${JSON.stringify(value)}`).join("\n"))));
}

heading();
controls();
if (!data.methods.length) {
  document.getElementById("main").append(el("p.card.note", {}, "No results yet."));
} else {
  section("quality", "Quality and bytes", "Up and to the left is better. Whiskers are 95 % intervals; the dashed line is the full cache.", chart);
  section("tasks", "Task by task", "Means in percent (NLL in nats a token) with 95 % intervals; n questions. A heading sorts.", table);
  section("paired", "Method against method", "Differences on the same questions, over all lengths. Bold: the interval excludes zero.", paired);
  if (data.needles.length) {
    section("needles", "Needles by depth and length", "Rows: where the needle lies, from 0 (the start) to 1 (the end); columns: tokens of the prompt.", needles);
  }
  if (data.shares.length) {
    section("budgets", "Who kept how much", "Mean fraction of the prompt that each KV head (columns) of each layer (rows) kept.", () => shareMaps(data, state));
  }
  section("failures", "Failures", "What gave no answer, and some answers that score below one half.", failures);
}
section("settings", "Settings", "What each folder was run with.", settings);
document.documentElement.dataset.ready = "true";
