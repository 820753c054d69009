
"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
// float16, which older browsers have no array for: sign, 5 bits of exponent, 10 of fraction.
const half = (bits) => {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits & 32768 ? -1 : 1;
  if (exponent === 31) return NaN;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
};
const numbers = (text) => Float32Array.from(new Uint16Array(bytes(text)), half);
const labels = Object.fromEntries(data.measures.map((each) => [each.name, each]));
labels.other = {label: "weight in B", unit: ""};
labels.change = {label: "B / A", unit: ""};
if (data.other) labels.weight.label = "weight in A";

// --- sides: the tokens of one response, their numbers and their elements ---------------------------------------------
const sides = [];
const pairs = data.pairs.map((pair, index) => ({...pair, element: $(`pair-${index}`), index, length: 0, sides: []}));
const side_of = new WeakMap();
for (const pair of pairs) {
  for (const name of ["chosen", "rejected"]) {
    const raw = pair[name], buffer = bytes(raw.tokens);
    const side = {pair, name, clamped: raw.clamped, raw, values: {}, tokens: data.index_bytes === 2 ? new Uint16Array(buffer) : new Uint32Array(buffer)};
    side.cells = [...pair.element.querySelectorAll(name === "chosen" ? ".t.c" : ".t.r")];
    side.elements = [];
    side.start_of = new Map();
    for (const cell of side.cells) {
      side_of.set(cell, side);
      side.start_of.set(cell, side.elements.length);
      for (const element of cell.children) side.elements.push(element);
      cell.tabIndex = 0;
    }
    pair.length += side.tokens.length;
    pair.sides.push(side);
    sides.push(side);
  }
}

/** The values of a measure on one side; those that follow from others are worked out. */
function values(side, name) {
  if (side.values[name]) return side.values[name];
  const raw = side.raw.measures;
  let found = null;
  if (name === "logp_neg" && raw.logp_pos) found = values(side, "logp_pos").map((value, t) => value - values(side, "logratio")[t]);
  else if (name === "surprise") found = values(side, "ref_logp").map((value) => -value);
  else if (name === "other" && side.raw.other) found = numbers(side.raw.other);
  else if (name === "change" && side.raw.other) found = values(side, "other").map((value, t) => value / values(side, "weight")[t]);
  else if (raw[name]) found = numbers(raw[name]);
  return (side.values[name] = found);
}

// --- colour -----------------------------------------------------------------------------------------------------------
const scales = {weight: ["¼", "4"], other: ["¼", "4"], change: ["¼", "4"], attribution: ["¼ of the mean", "4 times"], logratio: ["−2 nats", "+2 nats"], surprise: ["0", "8 nats"]};
const doublings = (value) => Math.log2(value) / data.full;
/** The steps of colour of one side, -8 to 8, for a measure. */
function steps(side, name) {
  const found = values(side, name);
  if (!found) return null;
  let share = doublings;
  if (name === "logratio") share = (value) => value / 2;
  else if (name === "surprise") share = (value) => value / 8;
  else if (name === "logp_pos" || name === "logp_neg" || name === "ref_logp") share = (value) => -value / 8;
  else if (name === "attribution") { const mean = found.reduce((a, b) => a + b, 0) / found.length; share = (value) => doublings(value / mean); }
  return Array.from(found, (value) => Math.round(Math.max(-1, Math.min(1, share(value))) * data.steps) || 0);
}

/** Colour all tokens; with `is_drawn` they have the colours of their weights already, and are only counted. */
function colour(is_drawn) {
  const name = $("measure").value, least = Number($("threshold").value);
  let beyond = 0, all = 0;
  for (const side of sides) {
    const of_side = steps(side, name);
    side.elements.forEach((element, t) => {
      const step = of_side ? of_side[t] : 0, shown = Math.abs(step) >= least ? step : 0;
      all += 1;
      beyond += Math.abs(step) >= Math.max(least, 1);
      if (is_drawn) return;
      const kept = element.className.split(" ").filter((each) => !/^[lh]\d$/.test(each));
      element.className = (shown ? [(shown > 0 ? "h" : "l") + Math.abs(shown), ...kept] : kept).join(" ");
    });
  }
  const [low, high] = scales[name] || ["0", "−8 nats"];
  $("scale-low").textContent = low;
  $("scale-high").textContent = high;
  $("beyond").textContent = ` ${beyond.toLocaleString("en")} of ${all.toLocaleString("en")} tokens coloured`;
}

// --- search, sort, filter ---------------------------------------------------------------------------------------------
/** The text of a response in lower case; `starts` says where each token begins in it. */
function text_of_side(side) {
  if (side.text === undefined) {
    side.starts = [];
    side.text = "";
    for (const node of side.cells.flatMap((cell) => [...cell.childNodes])) {
      if (node.nodeType === Node.ELEMENT_NODE) side.starts.push(side.text.length);
      side.text += node.textContent.toLowerCase(); // spaces between tokens are nodes too
    }
  }
  return side.text;
}
const text_of = (pair) => (pair.text ??= [...[...pair.element.querySelectorAll("h3 code, .prompt div")].map((each) => each.textContent.toLowerCase()), ...pair.sides.map(text_of_side)].join("\n"));
let hits = [];
function arrange() {
  const wanted = $("search").value.toLowerCase(), rule = $("filter").value;
  const index = /^#\d+$/.test(wanted) ? data.tokens.findIndex(([id]) => `#${id}` === wanted) : -1; // a token by its id
  let shown = 0;
  hits.forEach((element) => element.classList.remove("match"));
  hits = [];
  for (const pair of pairs) {
    const fits = !rule || (rule === "against" ? pair.logratio < 0 : pair.split === rule.slice(6));
    pair.element.hidden = !(fits && (!wanted || text_of(pair).includes(wanted) || (index >= 0 && pair.sides.some((side) => side.tokens.includes(index)))));
    shown += !pair.element.hidden;
    if (wanted.length > 1 && !pair.element.hidden && hits.length < 2000) pair.sides.forEach((side) => mark(side, wanted, index));
  }
  $("found").textContent = shown === pairs.length ? "" : `${shown} of ${pairs.length} pairs`;
}

/** Underline the tokens of a side that a searched text lies in, or that are the searched one. */
function mark(side, wanted, index) {
  const text = text_of_side(side), hit = (element) => { element.classList.add("match"); hits.push(element); };
  side.tokens.forEach((each, t) => { if (each === index) hit(side.elements[t]); });
  let t = 0;
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    while (t + 1 < side.starts.length && side.starts[t + 1] <= at) t += 1;
    for (let i = t; i < side.starts.length && side.starts[i] < at + wanted.length; i += 1) hit(side.elements[i]);
  }
}

const orders = {disagreement: (pair) => -pair.disagreement, logratio: (pair) => pair.logratio, effective: (pair) => pair.effective, length: (pair) => -pair.length};
function sort() {
  const key = orders[$("sort").value] || ((pair) => pair.index);
  $("list").append(...[...pairs].sort((a, b) => key(a) - key(b) || a.index - b.index).map((pair) => pair.element));
}

// --- one token ----------------------------------------------------------------------------------------------------------
let at = null;
const shown = (value, unit) => (Number.isFinite(value) ? value.toPrecision(3) : String(value)) + (unit ? ` ${unit}` : "");
function show(side, position) {
  at?.element.classList.remove("at");
  at = {side, position, element: side.elements[position]};
  at.element.classList.add("at");
  const [id, text] = data.tokens[side.tokens[position]];
  const panel = $("token"), add = (tag, content) => panel.appendChild(document.createElement(tag)).append(content);
  panel.replaceChildren();
  add("b", text);
  add("span", `id ${id}, token ${position + 1} of ${side.tokens.length}, ${side.name}`);
  const names = data.measures.flatMap((each) => (data.other && each.name === "weight" ? ["weight", "other", "change"] : [each.name]));
  for (const name of names) {
    const found = values(side, name);
    if (found) add("span", `${labels[name].label} ${shown(found[position], labels[name].unit)}`);
  }
  const end = {"-": "at the lower end of the clamp", "+": "at the upper end of the clamp"}[side.clamped[position]];
  if (end) add("span", end);
}

function locate(element) {
  const cell = element.closest?.(".t"), side = cell && side_of.get(cell);
  const token = side && element.closest("i");
  return token ? [side, side.start_of.get(cell) + [...cell.children].indexOf(token)] : null;
}

// --- all occurrences of a token -----------------------------------------------------------------------------------------
let occurrences = [], current = -1;
function find_occurrences(side, position) {
  clear();
  const token = side.tokens[position];
  let total = 0;
  for (const other of sides) {
    if (other.pair.element.hidden) continue;
    other.tokens.forEach((each, t) => {
      if (each !== token) return;
      if (other === side && t === position) current = occurrences.length;
      occurrences.push([other, t]);
      total += values(other, "weight")[t];
      other.elements[t].classList.add("found");
    });
  }
  $("occurrences").hidden = false;
  $("occurrences").dataset.mean = (total / occurrences.length).toPrecision(3);
  count();
}
function count() { $("count").textContent = `${current + 1} of ${occurrences.length}, mean weight ${$("occurrences").dataset.mean}`; }
function step(by) {
  if (!occurrences.length) return;
  current = (current + by + occurrences.length) % occurrences.length;
  const [side, position] = occurrences[current];
  show(side, position);
  side.elements[position].scrollIntoView({block: "center"});
  count();
}
function clear() {
  occurrences.forEach(([side, t]) => side.elements[t].classList.remove("found"));
  occurrences = [];
  $("occurrences").hidden = true;
}

// --- events -------------------------------------------------------------------------------------------------------------
const list = $("list");
const is_shortcut = (event) => event.ctrlKey || event.metaKey || event.altKey; // the browser's own: Ctrl+P prints
list.addEventListener("pointerover", (event) => { const found = locate(event.target); if (found) show(...found); });
list.addEventListener("click", (event) => { const found = locate(event.target); if (found) { show(...found); find_occurrences(...found); } });
list.addEventListener("focusin", (event) => { const side = side_of.get(event.target); if (side && at?.element.parentNode !== event.target) show(side, side.start_of.get(event.target) ?? 0); });
list.addEventListener("keydown", (event) => {
  const side = side_of.get(event.target);
  if (!side || at?.side !== side || is_shortcut(event)) return;
  const last = side.elements.length - 1;
  const to = {ArrowRight: at.position + 1, ArrowLeft: at.position - 1, Home: 0, End: last}[event.key];
  if (to !== undefined) { show(side, Math.max(0, Math.min(last, to))); at.element.scrollIntoView({block: "nearest"}); event.preventDefault(); }
  if (event.key === "Enter") { find_occurrences(side, at.position); event.preventDefault(); }
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches?.("input, select") || is_shortcut(event)) return;
  if (event.key === "n" || event.key === "p") {
    step(event.key === "n" ? 1 : -1);
    if (occurrences.length) at.element.parentNode.focus({preventScroll: true}); // arrow keys go on from there
  }
  if (event.key === "Escape") clear();
  if (event.key === "/") { $("search").focus(); event.preventDefault(); }
});
$("next").addEventListener("click", () => step(1));
$("previous").addEventListener("click", () => step(-1));
$("close").addEventListener("click", clear);
for (const id of ["search", "filter"]) $(id).addEventListener("input", arrange);
for (const id of ["measure", "threshold"]) $(id).addEventListener("input", () => colour(false));
$("sort").addEventListener("input", sort);
$("tools").addEventListener("submit", (event) => event.preventDefault());
document.querySelectorAll(".needs-script").forEach((element) => { element.hidden = false; });
colour(true);
setTimeout(() => pairs.forEach(text_of)); // so that the first search is as fast as the others

