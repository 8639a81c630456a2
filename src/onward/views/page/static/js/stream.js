/* The stream as a table: one row per file. */
import { get } from "./api.js";
import { byId, cell, fill, make, say, show } from "./dom.js";
import { count, counted, duration, files, fixed, named } from "./format.js";
import { openRows } from "./rows.js";

const FIRST = 50; // each is a stop of the Tab key on the way to what follows
const NEXT = 3; // the queue has all that wait: what is trained is not to begin below them
const WAITING = ["arriving", "queued"];
const OUT = ["undone", "skipped", "quarantined"];
let entries = [];
let all = false;
let ascending = false;
let newest = null;

export async function loadHistory() {
  entries = await get("history");
  draw();
}

/* The row of the file in training follows the state, without asking for all rows again. */
export function followStatus(status) {
  newest = status;
  const index = entries.findIndex((entry) => entry.state === "training" && entry.name === status.file);
  if (index < 0) return;
  entries[index] = { ...entries[index], steps: status.file_step, last_loss: status.loss ?? entries[index].last_loss };
  const line = byId("files").querySelector('[data-index="' + index + '"]');
  if (line) fill(line, [...row(entries[index], index).children]);
}

/* Identifies the file in training, as requests name it; null if there is none. */
export function training() {
  const entry = entries.find((one) => one.state === "training");
  return entry ? `file:${entry.position}` : null;
}

function warnings(entry) {
  const parts = [[entry.truncated, "cut"], [entry.dropped, "left out"], [entry.split, "split"], [entry.bad_rows, "bad"]];
  const words = parts.filter(([number]) => number).map(([number, word]) => `${count(number)} ${word}`);
  if (entry.lost_tokens) words.push(`${counted(entry.lost_tokens, "token")} lost`);
  return words.join(", ");
}

function row(entry, index) {
  const warned = warnings(entry);
  const kind = OUT.includes(entry.state) ? "out" : entry.state === "training" ? "going-on" : "";
  const steps = entry.state === "training" && newest?.file === entry.name ? `${count(newest.file_step)} / ${count(newest.file_steps)}` : count(entry.steps);
  const name = make("button", { type: "button", class: "name", "data-key": `${entry.sha256} ${entry.position}`, title: `${entry.name}: show its rows as the model sees them`, onclick: () => openRows(entry) }, named(entry.name));
  return make("tr", { class: kind, role: "row", "data-index": index },
    cell("#", { class: "num" }, entry.position ?? "–"),
    make("th", { class: "name-cell", role: "rowheader", scope: "row" }, name),
    cell("State", { class: entry.state === "quarantined" ? "error-text" : "" }, entry.state),
    cell("Rows", { class: "num" }, count(entry.rows)),
    cell("Steps", { class: "num" }, entry.steps ? steps : "–"),
    cell("First loss", { class: "num" }, fixed(entry.first_loss)),
    cell("Last loss", { class: "num" }, fixed(entry.last_loss)),
    cell("Handover", {}, entry.handover ?? "–"),
    make("td", { class: "note", role: "cell" }, warned ? make("span", { class: "warn-text" }, warned) : null, entry.note ? make("div", { class: "dim" }, entry.note) : null),
    cell("Time", { class: "num" }, entry.seconds ? duration(entry.seconds) : "–"));
}

/* Without the files that wait, but for those that come next. */
function withoutFarOff(rows) {
  const waits = rows.filter(([entry]) => WAITING.includes(entry.state)).sort(([one], [other]) => one.position - other.position);
  const far = new Set(waits.slice(NEXT));
  return rows.filter((one) => !far.has(one));
}

function draw() {
  const wanted = byId("find").value.trim().toLowerCase();
  let shown = entries.map((entry, index) => [entry, index]).filter(([entry]) => entry.name.toLowerCase().includes(wanted));
  if (!ascending) shown = shown.reverse();
  const found = shown.length;
  if (!all && !wanted) shown = withoutFarOff(shown);
  if (!all) shown = shown.slice(0, FIRST);
  const none = () => make("tr", { role: "row" }, make("td", { role: "cell", colspan: 10, class: "empty" }, entries.length ? "No file has that name." : "No file yet. Drop one into the inbox."));
  fill(byId("files"), found ? shown.map(([entry, index]) => row(entry, index)) : [none()]);
  const done = entries.filter((entry) => entry.state === "done").length;
  say("stream-count", `${files(entries.length)}, ${count(done)} done`);
  show("all-files", shown.length < found);
  say("all-files", `Show all ${count(found)}`);
}

export function startStream() {
  byId("find").addEventListener("input", draw);
  byId("all-files").addEventListener("click", () => { all = true; draw(); });
  byId("by-position").querySelector("button").addEventListener("click", () => {
    ascending = !ascending;
    byId("by-position").setAttribute("aria-sort", ascending ? "ascending" : "descending");
    draw();
  });
}
