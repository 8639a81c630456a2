/* The curve over the whole run or a part of it: loss, learning rate, gradient norm, speed. */
import { get } from "./api.js";
import { byId, say, show } from "./dom.js";
import { count, counted, few, files, fixed } from "./format.js";
import { showNorm } from "./now.js";
import { makePlot, smoothed, syncGroup } from "./plot.js";
import { onTheme } from "./theme.js";

const CHARTS = [
  { id: "chart-loss", column: "loss", height: 290, band: true },
  { id: "chart-rate", column: "learning_rate", height: 120 },
  { id: "chart-norm", column: "grad_norm", height: 120, smooth: true },
  { id: "chart-speed", column: "tokens_per_second", height: 120, smooth: true },
];
const AGAIN = 5000;
const NEAR = 2;
const PAUSE = 3500;

let drawn = null;
let range = null;
let plots = [];
let asked = 0;
let timer = null;
let pending = null;
let drawnAt = 0;

const smoothing = () => Number(byId("smooth").value);
const isLog = () => byId("log").checked;

export async function loadCurve() {
  const number = (asked += 1);
  const where = range ? `&first=${range[0]}&last=${range[1]}` : "";
  const values = await get(`curve?points=${Math.min(2000, Math.max(300, Math.round(byId("chart-loss").clientWidth * NEAR)))}${where}`);
  if (number !== asked) return; // another one was asked for meanwhile
  if (range && !values.columns.step.length) { // what was looked at closely was undone
    range = null;
    return loadCurve();
  }
  drawn = values;
  draw();
  if (!values.exact) later(900);
}

function later(milliseconds) {
  clearTimeout(timer);
  timer = setTimeout(() => { timer = null; loadCurve().catch(() => later(AGAIN)); }, milliseconds);
}

/* New steps: put at the end where each step is drawn, else the curve is asked for again from time to time. */
export function addSteps(columns) {
  if (!columns.step.length) return;
  const last = columns.step.length - 1;
  showNorm(columns.grad_norm[last]);
  if (!drawn || range) return;
  const shown = drawn.columns.step;
  const each = shown.length < 2 || shown.at(-1) - shown.at(-2) === 1;
  if (!each || shown.length > 2400 || !drawn.exact) {
    if (timer === null) later(AGAIN);
    return;
  }
  if (!shown.length) [drawn.oldest] = columns.step;
  columns.step.forEach((step, index) => {
    if (shown.length && step <= shown.at(-1)) return;
    const loss = columns.loss[index], norm = columns.grad_norm[index];
    const values = {
      step, loss, loss_min: loss, loss_max: loss, learning_rate: columns.learning_rate[index], grad_norm: norm,
      grad_norm_min: norm, grad_norm_max: norm, tokens_per_second: columns.seconds[index] ? columns.tokens[index] / columns.seconds[index] : null,
    };
    for (const [name, list] of Object.entries(drawn.columns)) list.push(values[name]);
    const file = drawn.files.at(-1), name = columns.file[index];
    if (!file || columns.file_step[index] === 1 || file[0] !== name) drawn.files.push([name, (file?.[1] ?? 0) + 1, step, step]);
    else file[3] = step;
    drawn.newest = drawn.last = step;
  });
  drawSoon();
}

/* Steps may come faster than an eye follows; the cores are wanted for training. Nobody looks: nothing is drawn. */
function drawSoon() {
  if (pending !== null || document.hidden) return;
  pending = setTimeout(() => { pending = null; draw(); }, Math.max(0, drawnAt + PAUSE - Date.now()));
}

function draw() {
  drawnAt = Date.now();
  const { columns } = drawn;
  const isEmpty = !columns.step.length;
  show("curve-empty", isEmpty);
  byId("curve").querySelector(".charts").hidden = isEmpty;
  if (isEmpty) return;
  if (!plots.length) build();
  const log = isLog();
  const positive = (values) => (log ? values.map((value) => (value > 0 ? value : null)) : values);
  CHARTS.forEach((chart, index) => {
    const raw = columns[chart.column];
    const line = chart.band || chart.smooth ? smoothed(raw, smoothing()) : raw;
    const data = [columns.step, positive(line)];
    if (chart.band) data.push(columns.loss_min, columns.loss_max, raw);
    plots[index].setData(data);
  });
  if (!range) showNorm(columns.grad_norm.at(-1));
  hovered(null);
  tell();
}

function build() {
  plots.forEach((plot) => plot.destroy());
  const sync = syncGroup("curve");
  plots = CHARTS.map((chart) => makePlot({
    target: byId(chart.id), height: chart.height, band: chart.band, log: isLog() && chart.band, sync,
    files: () => drawn?.files ?? [], zoomed: zoom, hovered,
  }));
}

/* The file that has a step, found by halving: there may be thousands. */
function fileAt(step) {
  const { files } = drawn;
  let low = 0, high = files.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (files[middle][2] <= step) low = middle; else high = middle - 1;
  }
  return files[low];
}

function hovered(index) {
  if (!drawn || index === null || index === undefined) {
    const total = drawn ? drawn.files.length : 0;
    const part = range ? `steps ${count(drawn.first)} to ${count(drawn.last)} of ${count(drawn.newest)}` : counted(drawn?.newest, "step");
    say("readout", drawn ? `${part} · ${files(total)}` : "");
    return;
  }
  const { columns } = drawn;
  const step = columns.step[index], low = columns.loss_min[index], high = columns.loss_max[index];
  const between = low === high ? "" : ` (${fixed(low, 3)} to ${fixed(high, 3)})`;
  const file = fileAt(step);
  say("readout", `step ${count(step)} · ${file ? file[0] : ""} · loss ${fixed(columns.loss[index])}${between} · lr ${few(columns.learning_rate[index], 3)} · norm ${few(columns.grad_norm[index], 3)} · ${count(columns.tokens_per_second[index])} tokens/s`);
}

/* For who cannot see the drawing: where it begins, ends, and how low it came. */
let told = 0;
function tell() {
  if (Date.now() - told < 30000) return;
  told = Date.now();
  const { columns } = drawn, line = smoothed(columns.loss, 0.9);
  const low = columns.loss_min.reduce((least, value) => Math.min(least, value), Infinity);
  say("curve-words", `Loss from step ${count(columns.step[0])} to ${count(columns.step.at(-1))}: first ${fixed(columns.loss[0], 3)}, smoothed now ${fixed(line.at(-1), 3)}, lowest ${fixed(low, 3)}.`);
}

function zoom(first, last) {
  const oldest = drawn?.oldest ?? 1, newest = drawn?.newest ?? 0;
  const from = Math.max(oldest, Math.floor(first)), to = Math.min(newest, Math.ceil(last));
  range = from <= oldest && to >= newest ? null : [from, Math.max(from + 2, to)];
  loadCurve();
}

function scaled(factor, shift) {
  if (!drawn) return;
  const [first, last] = range ?? [drawn.oldest, drawn.newest];
  const length = Math.max(4, (last - first) * factor);
  let middle = (first + last) / 2 + shift * (last - first);
  middle = Math.min(Math.max(middle, drawn.oldest + length / 2), Math.max(drawn.newest - length / 2, drawn.oldest + length / 2));
  zoom(middle - length / 2, middle + length / 2);
}

export function startCurve() {
  byId("smooth").addEventListener("input", () => drawn && draw());
  byId("log").addEventListener("change", () => { build(); if (drawn) draw(); });
  byId("whole").addEventListener("click", () => { range = null; loadCurve(); });
  byId("closer").addEventListener("click", () => scaled(0.5, 0));
  byId("wider").addEventListener("click", () => scaled(2, 0));
  byId("earlier").addEventListener("click", () => scaled(1, -0.5));
  byId("later").addEventListener("click", () => scaled(1, 0.5));
  document.addEventListener("visibilitychange", () => drawn && drawSoon());
  onTheme(() => plots.length && plots.forEach((plot) => plot.redraw(false, true)));
  new ResizeObserver(() => plots.forEach((plot, index) => {
    const width = Math.max(120, byId(CHARTS[index].id).clientWidth);
    if (Math.abs(width - plot.width) > 1) plot.setSize({ width, height: CHARTS[index].height });
  })).observe(byId("curve"));
}
