"use strict";

// Tables: a click on a header sorts (numbers from the best known end, highest first), a third click restores the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const value = row => {
      const cell = row.cells[column];
      return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim() || null;
    };
    const numeric = original.some(row => row.cells[column].dataset.value !== undefined);
    const cycle = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    const order = cycle[(cycle.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
    heads.forEach(h => h.setAttribute("aria-sort", h === head ? order : "none"));
    const sign = order === "descending" ? -1 : 1;
    const known = v => numeric ? typeof v === "number" && !Number.isNaN(v) : v !== null;
    const rows = order === "none" ? original : [...original].sort((one, two) => {
      const a = value(one), b = value(two);
      if (!known(a) || !known(b)) return known(b) - known(a);
      return sign * (numeric ? a - b : a.localeCompare(b));
    });
    body.append(...rows);
  }));
}

// Plots: drawn one after the other, first what is on the screen, so that the text can be read at once.
const coarse = matchMedia("(pointer: coarse)").matches;  // there a drag is for scrolling
const dark = matchMedia("(prefers-color-scheme: dark)");
const options = { responsive: true, displayModeBar: false };
const DARK = /* DARK */ {};
const source = document.getElementById("plots").textContent;
const boxes = [...document.querySelectorAll(".plot")];
const parsed = {};

// The data of a plot, in the colours of the reader's screen.
function plot(box, night) {
  parsed[night] ??= JSON.parse(night ? source.replace(/"#[0-9a-fA-F]{6}"/g, c => `"${DARK[c.slice(1, -1)] ?? c.slice(1, -1)}"`)
                                             .replaceAll('"rgba(0,0,0,0.13)"', '"rgba(244,242,236,0.13)"') : source);
  const { data, layout } = parsed[night][box.dataset.plot];
  const visible = shown(box.closest("section"));
  for (const trace of data) trace.visible = trace.meta === null || visible.has(trace.meta);
  if (coarse) layout.dragmode = false;
  return [data, layout];
}

function shown(section) {
  const on = section.querySelectorAll('.chips button[aria-pressed="true"]');
  return new Set([...on].map(chip => chip.dataset.label));
}

function update(section) {
  const visible = shown(section);
  for (const box of section.querySelectorAll(".plot.drawn")) {
    Plotly.restyle(box, { visible: box.data.map(t => t.meta === null || visible.has(t.meta)) });
  }
}

// One strategy stands out in all plots of a section, the others fade. Styles alone: a redraw would take too long.
function light(section, label) {
  for (const group of section.querySelectorAll(".scatterlayer > .trace")) {
    const meta = group.__data__[0].trace.meta;
    group.classList.toggle("lit", label !== null && meta === label);
    group.classList.toggle("faded", label !== null && meta !== null && meta !== label);
  }
}

const onScreen = box => {
  const { top, bottom } = box.getBoundingClientRect();
  return bottom > 0 && top < innerHeight;
};

function drawNext() {
  const left = boxes.filter(b => !b.classList.contains("drawn"));
  if (!left.length) { document.documentElement.dataset.drawn = "all"; return; }
  const box = left.find(onScreen) ?? left[0];
  Plotly.newPlot(box, ...plot(box, dark.matches), options);
  box.classList.add("drawn");
  box.on("plotly_hover", event => light(box.closest("section"), event.points[0].data.meta));
  box.on("plotly_unhover", () => light(box.closest("section"), null));
  setTimeout(drawNext);
}
if (window.Plotly) setTimeout(drawNext);

// The legend of a section switches its strategies on and off in all of its plots.
for (const legend of document.querySelectorAll(".legend")) {
  const section = legend.closest("section"), chips = [...legend.querySelectorAll(".chips button")];
  const choose = test => { chips.forEach(c => c.setAttribute("aria-pressed", test(c))); update(section); };
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") !== "true");
      update(section);
    });
    for (const type of ["pointerenter", "focus"]) chip.addEventListener(type, () => light(section, chip.dataset.label));
    for (const type of ["pointerleave", "blur"]) chip.addEventListener(type, () => light(section, null));
  }
  const sets = { all: () => true, none: () => false, coloured: c => c.dataset.prominent === "1", matching: c => !c.hidden };
  for (const button of legend.querySelectorAll(".sets button")) {
    button.addEventListener("click", () => choose(sets[button.dataset.set]));
  }
}

// The filter: rows of tables, and names in legends.
const filter = document.getElementById("filter");
if (filter) filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = text => words.every(word => text.toLowerCase().includes(word));
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const row of table.tBodies[0].rows) row.hidden = !matches(row.cells[0].textContent);
  }
  for (const chip of document.querySelectorAll(".chips button")) chip.hidden = !matches(chip.dataset.label);
  for (const button of document.querySelectorAll('[data-set="matching"]')) button.hidden = !words.length;
});

// The colours of the screen, and the colours of paper. For printing, plots get their size on the printed page.
function repaint(night, printed) {
  for (const box of boxes.filter(b => b.classList.contains("drawn"))) {
    const [data, layout] = plot(box, night), alone = box.parentElement.children.length === 1;
    const size = printed ? { width: alone ? 600 : 320, height: alone ? 290 : 220, autosize: false } : {};
    Plotly.react(box, data, { ...layout, ...size }, options);
    if (!printed) Plotly.Plots.resize(box);
  }
}
if (window.Plotly) {
  dark.addEventListener("change", () => repaint(dark.matches, false));
  addEventListener("beforeprint", () => {
    while (boxes.some(b => !b.classList.contains("drawn"))) drawNext();
    repaint(false, true);
  });
  addEventListener("afterprint", () => repaint(dark.matches, false));
}
