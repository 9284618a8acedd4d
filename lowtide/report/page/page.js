// What moves on the page: theme, before/after slider, pickers, cursors over plots and maps, tips, copying.
"use strict";
const root = document.documentElement;
const all = (query, within = document) => [...within.querySelectorAll(query)];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const shown = (value) => value === null ? "–" : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2) : String(+value.toPrecision(3));
const data = (element) => JSON.parse(element.querySelector('script[type="application/json"]').textContent);
root.classList.add("scripted");

function theme() {
  const button = document.querySelector(".theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-label", dark() ? "Switch to light" : "Switch to dark"); };
  try { const kept = localStorage.getItem("lowtide-theme"); if (kept === "dark" || kept === "light") root.dataset.theme = kept; } catch { /* a browser may forbid storage to files */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("lowtide-theme", root.dataset.theme); } catch { /* then the choice lasts until the page closes */ }
    label();
  });
  system.addEventListener("change", label);
  label();
}

function compare() {
  const box = document.querySelector(".compare");
  if (!box) return;
  const rows = all(".contact tbody tr").map((row) => all("td", row));
  const heads = all(".contact thead th").map((head) => head.textContent);
  const names = all(".contact tbody th").map((head) => head.textContent);
  const [stage, slide, told, which] = [".stage", "input[type=range]", ".told", ".which"].map((query) => box.querySelector(query));
  const [left, right] = all(".choose", box);
  let seed = 0;
  box.hidden = false;

  function fill(side, select) {
    const image = stage.querySelector(side === "left" ? ".before" : ".after");
    const source = rows[select.value][seed].querySelector("img");
    image.src = source.src;
    image.alt = source.alt;
    stage.querySelector(`.side.${side}`).textContent = names[select.value];
  }
  function show() {
    fill("left", left);
    fill("right", right);
    which.textContent = `${seed + 1} of ${heads.length}`;
    told.textContent = heads[seed];
    for (const select of [left, right]) {
      const scores = rows[select.value][seed].dataset.scores;
      if (scores) told.append(Object.assign(document.createElement("small"), { textContent: `${names[select.value]}: ${scores}` }));
    }
    all(".contact td.on").forEach((cell) => cell.classList.remove("on"));
    for (const select of [left, right]) rows[select.value][seed].classList.add("on");
  }
  function move(percent) {
    slide.value = clamp(percent, 0, 100);
    stage.style.setProperty("--at", `${slide.value}%`);
    slide.setAttribute("aria-valuetext", `${slide.value} % ${names[left.value]}, the rest ${names[right.value]}`);
  }
  const drag = (event) => { const place = stage.getBoundingClientRect(); move(100 * (event.clientX - place.left) / place.width); };
  stage.addEventListener("pointerdown", (event) => {
    if (stage.classList.contains("differs")) return;
    stage.setPointerCapture(event.pointerId);
    slide.focus({ preventScroll: true, focusVisible: false });
    drag(event);
    event.preventDefault();
  });
  stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) drag(event); });
  slide.addEventListener("input", () => move(+slide.value));
  [left, right].forEach((select) => select.addEventListener("change", () => { show(); move(+slide.value); }));
  all("[data-move]", box).forEach((button) => button.addEventListener("click", () => { seed = (seed + +button.dataset.move + heads.length) % heads.length; show(); }));
  box.querySelector(".difference").addEventListener("change", (event) => {
    stage.classList.toggle("differs", event.target.checked);
    slide.disabled = event.target.checked;
  });
  rows.forEach((row, model) => row.forEach((cell, place) => cell.querySelector("button").addEventListener("click", () => {
    seed = place;
    if (model !== +left.value) right.value = model;
    show();
    move(+slide.value);
    box.scrollIntoView({ block: "nearest" });
  })));
  show();
  move(50);
}

function pickers() {
  for (const figure of all("[data-panels]")) {
    const panels = all(".panel", figure);
    const choose = (place) => panels.forEach((panel, number) => { panel.hidden = number !== place; });
    all(".picker input", figure).forEach((input) => {
      input.addEventListener("change", () => choose(+input.value));
      if (input.checked) choose(+input.value);
    });
  }
}

// Pointer and arrow keys move one index along each axis of a field; `light` is called with both.
function cursor(field, columns, rows, nearest, light) {
  let at = null;
  const go = (column, row) => { at = [clamp(column, 0, columns - 1), clamp(row, 0, rows - 1)]; light(...at); };
  const point = (event) => {
    const place = field.getBoundingClientRect();
    go(nearest((event.clientX - place.left) / place.width), Math.floor(rows * (event.clientY - place.top) / place.height));
  };
  field.addEventListener("pointermove", point);
  field.addEventListener("pointerdown", point);
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  field.addEventListener("keydown", (event) => {
    const by = moves[event.key];
    if (!by) return;
    go(...(at ? [at[0] + by[0], at[1] + by[1]] : [0, 0]));
    event.preventDefault();
  });
}

function piece(text, className) {
  return Object.assign(document.createElement("span"), { textContent: text, className });
}

function plots() {
  for (const figure of all("[data-lines]")) {
    const { x, at, name, lines } = data(figure);
    const [field, rule, readout] = [".field", ".cursor", ".readout"].map((query) => figure.querySelector(query));
    const nearest = (share) => at.reduce((best, place, number) => Math.abs(place - share) < Math.abs(at[best] - share) ? number : best, 0);
    field.tabIndex = 0;
    field.setAttribute("role", "group");
    field.setAttribute("aria-label", field.querySelector(".unseen").textContent);
    readout.append(piece("Point at the lines, or focus them and use the arrow keys.", "hint"));
    cursor(field, x.length, 1, nearest, (column) => {
      rule.hidden = false;
      rule.style.left = `${100 * at[column]}%`;
      readout.replaceChildren(piece(`${name.split(",")[0]} ${x[column]}`), ...lines.map((line) => piece(`${line.name} ${shown(line.values[column])}`, `s${line.colour}`)));
    });
  }
}

function maps() {
  for (const figure of all(".heat")) {
    const readout = figure.querySelector(".readout");
    for (const panel of all(".panel", figure)) {
      const { name, names, timesteps, error } = data(panel);
      const [field, mark] = [".cells", ".cell"].map((query) => panel.querySelector(query));
      const [width, height] = [100 / names.length, 100 / timesteps.length];
      cursor(field, names.length, timesteps.length, (share) => Math.floor(share * names.length), (column, row) => {
        mark.hidden = false;
        Object.assign(mark.style, { left: `${column * width}%`, top: `${row * height}%`, width: `${width}%`, height: `${height}%` });
        readout.replaceChildren(piece(names[column]), piece(`timestep ${timesteps[row]}`), piece(`${name}: ${shown(error[column][row])}`));
      });
    }
  }
}

function tips() {
  const tip = document.querySelector(".tip");
  all("[data-tip] > title").forEach((title) => title.remove());
  document.addEventListener("pointermove", (event) => {
    const told = event.target.closest?.("[data-tip]");
    tip.hidden = !told;
    if (!told) return;
    tip.textContent = told.dataset.tip;
    const wide = tip.offsetWidth;
    tip.style.left = `${clamp(event.clientX - wide / 2, 8, Math.max(8, root.clientWidth - wide - 8))}px`;
    tip.style.top = `${event.clientY > 60 ? event.clientY - tip.offsetHeight - 14 : event.clientY + 20}px`;
  });
}

function copying() {
  for (const button of all(".copy")) {
    const source = button.parentElement.querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(source.textContent); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(source); button.textContent = "Selected"; }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }
}

[theme, compare, pickers, plots, maps, tips, copying].forEach((start) => start());
