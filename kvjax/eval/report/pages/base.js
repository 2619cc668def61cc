// Elements, numbers and the tooltip, for every page.
const SVG = "http://www.w3.org/2000/svg";

// An element with attributes (functions listen to events) and children (text is only ever text).
function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const svg = ["svg", "g", "path", "line", "circle", "rect", "text", "polygon", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function readData() {
  return JSON.parse(document.getElementById("data").textContent);
}

const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(x + 14, window.innerWidth - box.width - 8);
  const top = y + 16 + box.height > window.innerHeight ? y - box.height - 12 : y + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Shows a text (or what a function gives) while the pointer or the keyboard is on a node.
function tipped(node, text) {
  const say = () => (typeof text === "function" ? text() : text);
  node.addEventListener("pointermove", (event) => showTip(say(), event.clientX, event.clientY));
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("focus", () => {
    const box = node.getBoundingClientRect();
    showTip(say(), box.right, box.top);
  });
  node.addEventListener("blur", hideTip);
  return node;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});

function choice(label, id, options, chosen, change) {
  const select = el("select", { id, change: () => change(select.value) });
  for (const [value, text] of options) {
    select.append(el("option", { value, selected: value === chosen }, text));
  }
  return el("label", { for: id }, label, select);
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let place = 0;
  for (; count >= 1024 && place < 3; place++) count /= 1024;
  return `${count.toFixed(place && count < 100 ? 1 : 0)} ${units[place]}`;
}

const unique = (values) => [...new Set(values)];
