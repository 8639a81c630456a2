/* One chart: a line, perhaps in a band from lowest to highest, with a mark where each file begins. */
import { colour } from "./theme.js";
import { few } from "./format.js";

const { uPlot } = window;
const CLOSE = 6; // pixels between two files below which their boundaries are not drawn
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

export function smoothed(values, weight) {
  /* An exponential mean without the bias of its start (as Adam corrects its moments). */
  let mean = 0, scale = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    scale = weight * scale + (1 - weight);
    return mean / scale;
  });
}

function fileMarks(files) {
  return {
    hooks: {
      drawClear: (plot) => {
        const { ctx, bbox } = plot;
        if (files().length * CLOSE * devicePixelRatio > bbox.width) return; // hatching would tell nothing
        ctx.save();
        ctx.beginPath();
        ctx.strokeStyle = colour("field");
        ctx.globalAlpha = 0.55;
        ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]); // apart from the lines of the grid
        ctx.lineWidth = devicePixelRatio;
        for (const [, , first] of files()) {
          const x = Math.round(plot.valToPos(first - 0.5, "x", true)) + 0.5;
          if (x < bbox.left || x > bbox.left + bbox.width) continue;
          ctx.moveTo(x, bbox.top - (plot.series.length > 2 ? 16 * devicePixelRatio : 0));
          ctx.lineTo(x, bbox.top + bbox.height);
        }
        ctx.stroke();
        ctx.restore();
      },
      draw: (plot) => nameFiles(plot, files()),
    },
  };
}

/* Names of files above the large chart, where there is room for them. */
function nameFiles(plot, files) {
  const { ctx, bbox } = plot;
  if (bbox.height / devicePixelRatio < 160) return;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px ${getComputedStyle(document.body).fontFamily}`;
  ctx.fillStyle = colour("dim");
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  files.forEach(([name, , first], index) => {
    const from = Math.max(bbox.left, plot.valToPos(first - 0.5, "x", true));
    const next = files[index + 1];
    const to = Math.min(bbox.left + bbox.width, next ? plot.valToPos(next[2] - 0.5, "x", true) : Infinity);
    const room = to - from - 10 * devicePixelRatio;
    if (room < 34 * devicePixelRatio) return;
    let text = name;
    while (text && ctx.measureText(text).width > room) text = text.slice(0, -1);
    const shown = text === name ? name : `${text.slice(0, -1)}…`;
    if (shown.length > 3) ctx.fillText(shown, from + 4 * devicePixelRatio, bbox.top - 4 * devicePixelRatio);
  });
  ctx.restore();
}

function axis(size, values, space) {
  return {
    stroke: () => colour("dim"),
    grid: { stroke: () => colour("line"), width: 0.6 },
    ticks: { show: false },
    font: '11px system-ui, "Noto Sans", "Liberation Sans", sans-serif',
    size, space, values,
    gap: 4,
  };
}

/* How many digits show the values of an axis as they are: 10.25, not 10.3. */
function digits(splits) {
  const known = splits.filter((value) => value !== null);
  const apart = Math.min(...known.slice(1).map((value, index) => Math.abs(value - known[index])));
  const largest = Math.max(...known.map(Math.abs));
  if (!(apart > 0 && Number.isFinite(apart))) return 3;
  const finest = 10 ** Math.floor(Math.log10(apart));
  const step = Math.abs(apart / finest - Math.round(apart / finest)) < 1e-6 ? finest : finest / 10;
  return Math.min(7, Math.max(3, Math.round(Math.floor(Math.log10(largest)) - Math.log10(step)) + 1));
}

export function makePlot({ target, height, log, band, sync, files, zoomed, hovered }) {
  const accent = () => colour("accent");
  const series = [{}, { stroke: accent, width: 1.6, points: { show: (plot) => plot.data[0].length < 40, size: 5, fill: accent } }];
  if (band) {
    series.push({ stroke: "transparent", points: { show: false } }, { stroke: "transparent", points: { show: false } });
    series.push({ stroke: accent, width: 1, alpha: 0.28, points: { show: false } });
  }
  const options = {
    width: Math.max(120, target.clientWidth),
    height,
    series,
    bands: band ? [{ series: [3, 2], fill: () => `color-mix(in srgb, ${colour("accent")} 14%, transparent)` }] : [],
    legend: { show: false },
    padding: [band ? 22 : 8, 16, 0, 0],
    cursor: { y: false, sync: { key: sync.key }, drag: { x: true, y: false, setScale: false }, points: { size: (_, series) => (series === 1 ? 6 : 0), fill: accent } },
    scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
    axes: [axis(26, (_, splits) => splits.map((step) => (!Number.isInteger(step) ? "" : step >= 1e4 ? short.format(step) : step.toLocaleString("en"))), 70),
      axis(52, (_, splits) => splits.map((value) => (value === null ? "" : few(value, digits(splits)))), band ? 34 : 20)],
    plugins: [fileMarks(files)],
    hooks: {
      setCursor: [(plot) => hovered(plot.cursor.idx)],
      setSelect: [(plot) => {
        if (plot.select.width < 4) return;
        zoomed(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
        plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }],
    },
  };
  return new uPlot(options, band ? [[], [], [], [], []] : [[], []], target);
}

export const syncGroup = (name) => uPlot.sync(name);
