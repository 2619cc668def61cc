// Which tokens each layer and head kept: shares are counted in the page from one bit an entry.
const data = readData();
const { layers, heads, tokens } = data;
const count = tokens.length, stride = Math.ceil(count / 8);
const state = { method: 0, layer: 0, head: 0, versus: -1 }; // 0 stands for all, 1 for the first
const byId = (id) => document.getElementById(id);

data.methods.forEach((method) => {
  method.bits = Uint8Array.from(atob(method.mask), (letter) => letter.charCodeAt(0));
  delete method.mask;
});

const has = (bits, layer, head, place) =>
  (bits[(layer * heads + head) * stride + (place >> 3)] >> (place & 7)) & 1;
const chosen = (value, all) => (value ? [value - 1] : [...Array(all).keys()]);

// How many of these heads of a layer kept each token.
function countKept(method, layer, headList) {
  const found = new Uint16Array(count);
  for (const head of headList) {
    for (let place = 0; place < count; place++) found[place] += has(method.bits, layer, head, place);
  }
  return found;
}

// Each layer's counts under the chosen head; kept for the method and head that were asked for last.
const memory = new Map();
function byLayer(method) {
  const key = `${method.name}\n${state.head}`;
  if (!memory.has(key)) {
    if (memory.size > 3) memory.clear();
    const headList = chosen(state.head, heads);
    memory.set(key, Array.from({ length: layers }, (_, layer) => countKept(method, layer, headList)));
  }
  return memory.get(key);
}

// How many of the chosen layers and heads kept each token.
function current(method) {
  const found = new Uint32Array(count);
  for (const layer of chosen(state.layer, layers)) {
    const mine = byLayer(method)[layer];
    for (let place = 0; place < count; place++) found[place] += mine[place];
  }
  return found;
}

// ------------------------------------------------------------------------- the prompt
const spans = tokens.map((text, place) => {
  // A line's end is shown, and ends the line.
  const shown = text.replace(/\n/g, "⏎\n");
  return el(text.trim() ? "span.t" : "span.t.mark", { "data-place": place }, shown || "␀");
});
byId("prompt").append(...spans);

// Each picture under a cell for every patch; a cell stands for the patch's token.
const cells = [];
const figures = data.images.map((image, index) => {
  const patches = el("div.patches", {
    style: `grid-template: repeat(${image.rows}, 1fr) / repeat(${image.columns}, 1fr)`,
  });
  for (let patch = 0; patch < image.rows * image.columns; patch++) {
    const cell = el("i", { "data-place": image.first + patch });
    cells.push(cell);
    patches.append(cell);
  }
  patches.addEventListener("pointermove", (event) => {
    const place = Number(event.target.dataset.place);
    if (!Number.isInteger(place)) return;
    const patch = place - image.first;
    point(place);
    showTip(`row ${Math.floor(patch / image.columns)}, column ${patch % image.columns}\n${told(place)}`,
      event.clientX, event.clientY);
  });
  patches.addEventListener("pointerleave", () => { hideTip(); point(null); });
  return el("figure.seen", {}, el("img", { src: image.src, alt: `image ${index}, as the model reads it` }), patches);
});
byId("pictures").append(...figures);
byId("images").hidden = !figures.length;

function where() {
  const layer = state.layer ? `layer ${state.layer - 1}` : "all layers";
  return `${layer}, ${state.head ? `head ${state.head - 1}` : "all heads"}`;
}

function shade() {
  const method = data.methods[state.method], other = data.methods[state.versus];
  const mine = current(method), theirs = other && current(other);
  const pairs = (state.layer ? 1 : layers) * (state.head ? 1 : heads);
  const shares = Array.from(mine, (one, place) => (other ? one - theirs[place] : one) / pairs);
  let kept = 0, entries = 0;
  spans.forEach((span, place) => {
    const share = shares[place];
    kept += mine[place] > 0;
    entries += mine[place];
    span.style.setProperty("--s", Math.abs(share).toFixed(3));
    span.classList.toggle("only-b", share < 0);
    span.classList.toggle("gone", other ? share === 0 : mine[place] === 0);
  });
  let shown = 0;
  for (const cell of cells) {
    const share = shares[cell.dataset.place];
    shown += mine[cell.dataset.place];
    cell.style.setProperty("--s", Math.abs(share).toFixed(3));
    cell.classList.toggle("only-b", share < 0);
  }
  figures.forEach((figure) => figure.classList.toggle("against", Boolean(other)));
  byId("images-words").textContent = other
    ? `Blue: patches that ${method.name} keeps in more heads; orange: ${other.name} (${where()}).`
    : `The darker a patch, the fewer heads keep it. ${method.name}, ${where()}: `
      + `${(shown / pairs).toFixed(1)} of ${cells.length} patches a head.`;
  byId("words").textContent = `${method.name}, ${where()}: ${kept} of ${count} tokens kept somewhere, `
    + `${(entries / pairs).toFixed(1)} entries a head (${percent(entries / pairs / count)}).`;
  const key = (kind, words) => el("span", {}, words[0], el(`i.${kind}`), words[1]);
  byId("legend").replaceChildren(...(other
    ? [key("a", ["more kept by ", method.name]), key("b", ["more kept by ", other.name])]
    : [key("a", ["kept by none", "all of them"])]));
}

// What one token's tooltip says.
function told(place) {
  const lines = [`position ${place}: ${JSON.stringify(tokens[place])}`];
  for (const index of unique([state.method, state.versus].filter((one) => one >= 0))) {
    const method = data.methods[index];
    let sum = 0, mine = 0;
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) {
        const one = has(method.bits, layer, head, place);
        sum += one;
        mine += (!state.layer || layer === state.layer - 1) && (!state.head || head === state.head - 1) ? one : 0;
      }
    }
    const here = state.layer || state.head ? `, in ${mine} of what is chosen` : "";
    lines.push(`${method.name}: kept in ${sum} of ${layers * heads} heads${here}`);
  }
  return lines.join("\n");
}

function point(place) {
  const cursor = byId("cursor");
  cursor.hidden = place === null;
  document.querySelectorAll(".t.here").forEach((span) => span.classList.remove("here"));
  if (place !== null) cursor.style.left = `calc(${(100 * (place + 0.5)) / count}% - 1px)`;
}

byId("prompt").addEventListener("pointermove", (event) => {
  const span = event.target.closest(".t");
  if (!span) return hideTip();
  const place = Number(span.dataset.place);
  point(place);
  return showTip(told(place), event.clientX, event.clientY);
});
byId("prompt").addEventListener("pointerleave", () => { hideTip(); point(null); });

// ------------------------------------------------------------------------- bars
function bars() {
  const method = data.methods[state.method], headList = chosen(state.head, heads);
  const means = byLayer(method).map((found) => found.reduce((a, b) => a + b, 0) / headList.length);
  const most = Math.max(...means, 1), mean = means.reduce((a, b) => a + b, 0) / layers;
  byId("bars").style.setProperty("--high", `${Math.floor(420 / layers)}px`);
  byId("bars").replaceChildren(...means.map((value, layer) => {
    const fill = el("span.fill"), line = el("span.mean");
    fill.style.width = `${(100 * value) / most}%`;
    line.style.left = `calc(${(100 * mean) / most}% - 1px)`;
    const words = `layer ${layer}: ${value.toFixed(1)} entries a head, ${percent(value / count)} of the prompt`;
    return tipped(el("button.bar", {
      type: "button", "aria-pressed": String(state.layer === layer + 1), "aria-label": words,
      click: () => choose({ layer: state.layer === layer + 1 ? 0 : layer + 1 }),
    }, el("span", {}, String(layer)), el("span.track", {}, fill, line), el("span.num", {}, value.toFixed(1))), words);
  }));
}

// ------------------------------------------------------------------------- the map
const high = Math.max(3, Math.min(22, Math.floor(260 / layers)));

// Drawn with a pixel for each layer and column, then stretched; a column is a token, or as many as
// it takes to have no more than 2048 of them.
function map() {
  const method = data.methods[state.method], canvas = byId("map"), all = state.head ? 1 : heads;
  const wide = Math.ceil(count / 2048), columns = Math.ceil(count / wide);
  const small = document.createElement("canvas");
  [small.width, small.height, canvas.width, canvas.height] = [columns, layers, columns, layers * high];
  canvas.style.height = `${layers * high}px`;
  const image = new ImageData(columns, layers);
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat").split(",").map(Number);
  byLayer(method).forEach((found, layer) => {
    const dim = state.layer && layer !== state.layer - 1 ? 0.35 : 1;
    for (let column = 0; column < columns; column++) {
      const part = found.subarray(column * wide, (column + 1) * wide);
      const share = part.reduce((a, b) => a + b, 0) / part.length / all;
      image.data.set([...colour, Math.round(255 * dim * (0.07 + 0.93 * share))], (layer * columns + column) * 4);
    }
  });
  small.getContext("2d").putImageData(image, 0, 0);
  const ink = canvas.getContext("2d");
  ink.imageSmoothingEnabled = false;
  ink.drawImage(small, 0, 0, columns, layers * high);
  for (let layer = 1; layer < layers && high > 4; layer++) ink.clearRect(0, layer * high - 1, columns, 1);
  const words = `A row a layer, a column a token, ${state.head ? `head ${state.head - 1}` : "all heads"}; a click chooses a layer and shows the token.`;
  byId("map-words").textContent = words;
  canvas.setAttribute("aria-label", `${method.name}: which positions each layer kept`);
}

function under(event) {
  const box = byId("map").getBoundingClientRect();
  const part = (value, size, all) => Math.min(all - 1, Math.max(0, Math.floor((value / size) * all)));
  return {
    place: part(event.clientX - box.left, box.width, count),
    layer: part(event.clientY - box.top, box.height, layers),
  };
}
byId("map").addEventListener("pointermove", (event) => {
  const { place, layer } = under(event);
  point(place);
  showTip(`layer ${layer}\n${told(place)}`, event.clientX, event.clientY);
});
byId("map").addEventListener("pointerleave", () => { hideTip(); point(null); });
byId("map").addEventListener("click", (event) => {
  const { place, layer } = under(event);
  choose({ layer: layer + 1 });
  spans[place].classList.add("here");
  const box = byId("prompt");
  box.scrollTop = spans[place].offsetTop - box.offsetTop - box.clientHeight / 2;
});
byId("map").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  choose({ layer: Math.min(layers, Math.max(0, state.layer + step)) });
});

// ------------------------------------------------------------------------- controls
function choose(changes) {
  Object.assign(state, changes);
  byId("layer").value = state.layer;
  byId("head").value = state.head;
  byId("layer-said").textContent = state.layer ? `${state.layer - 1} of ${layers}` : "all (mean)";
  byId("head-said").textContent = state.head ? `${state.head - 1} of ${heads}` : "all (mean)";
  for (const name of ["layer", "head"]) byId(name).setAttribute("aria-valuetext", byId(`${name}-said`).textContent);
  [...byId("methods").children].forEach((button, place) =>
    button.setAttribute("aria-pressed", String(place === state.method)));
  shade();
  map();
  bars();
}

byId("title").textContent = data.title;
for (const [name, value] of Object.entries(data.facts)) {
  byId("facts").append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
}
data.methods.forEach((method, place) => byId("methods").append(
  el("button", { type: "button", click: () => choose({ method: place }) }, method.name)));
byId("versus").append(el("option", { value: -1 }, "nothing"),
  ...data.methods.map((method, place) => el("option", { value: place }, method.name)));
byId("versus").addEventListener("change", (event) => choose({ versus: Number(event.target.value) }));
byId("versus").parentElement.hidden = data.methods.length < 2;
byId("layer").max = layers;
byId("head").max = heads;
for (const name of ["layer", "head"]) {
  byId(name).addEventListener("input", (event) => choose({ [name]: Number(event.target.value) }));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", map);
choose({});
document.documentElement.dataset.ready = "true";
