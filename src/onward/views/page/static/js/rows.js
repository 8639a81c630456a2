/* The rows of a file as the model sees them, what is trained marked. */
import { get } from "./api.js";
import { byId, make, say } from "./dom.js";
import { count, counted, named } from "./format.js";

const VIEWS = [["all", "All"], ["longest", "Longest"], ["cut", "Cut"], ["dropped", "Left out"], ["loss", "Highest loss"]];
const PAGE = 20;
let file = null;
let view = "all";
let offset = 0;
let asked = 0;

export function openRows(entry) {
  [file, view, offset] = [entry, "all", 0];
  say("rows-title", named(entry.name));
  byId("rows-list").replaceChildren(); // never the rows of another file below this one's name
  say("rows-place", "");
  byId("rows-before").disabled = byId("rows-after").disabled = true;
  byId("rows-views").querySelector("input").checked = true;
  if (!byId("rows").open) byId("rows").showModal();
  load();
}

async function load() {
  const number = (asked += 1);
  say("rows-words", "Reading the file");
  byId("rows-list").setAttribute("aria-busy", "true");
  const place = file.position === null ? "" : `&position=${file.position}`;
  try {
    const page = await get(`rows?sha256=${encodeURIComponent(file.sha256)}${place}&view=${view}&offset=${offset}&limit=${PAGE}`);
    if (number === asked) draw(page);
  } catch (error) {
    if (number !== asked) return;
    say("rows-words", error.message);
    byId("rows-list").replaceChildren();
  }
  byId("rows-list").removeAttribute("aria-busy");
}

function words(page) {
  const looked = page.is_whole ? counted(page.counts.all, "row") : `the first ${count(page.counts.all)} of ${counted(page.rows_of_file, "row")}`;
  const parts = [looked, `${count(page.counts.cut)} cut`, `${count(page.counts.dropped)} left out`];
  const loss = view === "loss" ? ". The loss is that of the step in which the row was." : "";
  return `${parts.join(", ")}. Marked text is trained.${loss}`;
}

function row(values) {
  if (values.segments === undefined) return make("article", { class: "row" }, make("h3", {}, `line ${count(values.line)}: left out, longer than max_length`));
  const step = values.step === undefined ? "" : ` · step ${count(values.step)}, loss ${values.loss.toFixed(4)}`;
  const head = `line ${count(values.line)} · ${counted(values.tokens, "token")}, ${count(values.trained)} trained${values.cut ? " · cut" : ""}${step}`;
  const text = make("pre");
  for (const segment of values.segments) text.append(segment.trained ? make("mark", {}, segment.text) : segment.text);
  return make("article", { class: "row" }, make("h3", {}, head), text);
}

function draw(page) {
  say("rows-words", words(page));
  const shown = page.rows.map(row);
  byId("rows-list").replaceChildren(...(shown.length ? shown : [make("p", { class: "empty" }, "No such rows.")]));
  byId("rows-list").scrollTop = 0;
  say("rows-place", page.count ? `${count(offset + 1)} to ${count(offset + page.rows.length)} of ${count(page.count)}` : "");
  byId("rows-before").disabled = offset === 0;
  byId("rows-after").disabled = offset + PAGE >= page.count;
}

export function startRows() {
  byId("rows-views").replaceChildren(...VIEWS.map(([name, title]) => {
    const choice = make("input", { type: "radio", name: "view", value: name, onchange: () => { [view, offset] = [name, 0]; load(); } });
    return make("label", {}, choice, title);
  }));
  byId("rows-close").addEventListener("click", () => byId("rows").close());
  byId("rows-before").addEventListener("click", () => { offset = Math.max(0, offset - PAGE); load(); });
  byId("rows-after").addEventListener("click", () => { offset += PAGE; load(); });
}
