/* What stands around the curve: inbox and queue, refused files, proof, restore points, disk, events. */
import { get } from "./api.js";
import { byId, fill, make, readOnly, say, show } from "./dom.js";
import { afterFile, ago, clock, count, counted, files, fixed, named, size } from "./format.js";
import { goBack } from "./controls.js";
import { offerPoints } from "./talk.js";

const FEW = 12;

export async function loadOverview() {
  const values = await get("overview");
  showWaiting(values.queue, values.inbox);
  showRefused(values.refused);
  showProof(values.proof);
  showPoints(values.restore_points);
  offerPoints(values.restore_points);
  showDisk(values.disk);
  showEvents(values.events);
  showGrid(values.grid);
}

function showWaiting(queue, inbox) {
  const announced = new Set(queue.map((file) => file.name));
  const arrived = inbox.filter((file) => !announced.has(file.name));
  const items = [
    ...queue.map((file) => [file.name, file.state === "queued" ? counted(file.rows, "row") : "being checked"]),
    ...arrived.map((file) => [file.name, file.whole ? `in the inbox, ${size(file.bytes)}` : `arriving, ${size(file.bytes)}`]),
  ];
  const shown = items.slice(0, FEW).map(([name, what]) => make("li", {}, make("span", { class: "grow clamp", title: name }, named(name)), make("span", { class: "dim" }, what)));
  if (items.length > FEW) shown.push(make("li", { class: "dim" }, `and ${count(items.length - FEW)} more`));
  if (!items.length) shown.push(make("li", { class: "empty" }, "Nothing waits."));
  fill(byId("waiting"), shown);
}

function problem(report, found) {
  const place = found.line === null ? "" : `${report.unit} ${found.line}: `;
  return make("li", {}, make("strong", {}, place), found.reason, found.remedy ? make("div", { class: "remedy" }, found.remedy) : null);
}

function showRefused(reports) {
  const open = new Set([...byId("refused").querySelectorAll("details[open] > summary")].map((element) => element.dataset.key));
  say("refused-count", reports.length ? count(reports.length) : "");
  const shown = reports.map((report) => {
    const key = `${report.file} ${report.rejected}`;
    const problems = counted(report.problem_count, "problem");
    const hidden = report.problem_count - report.problems.length;
    return make("details", { open: open.has(key) },
      make("summary", { title: report.file, "data-key": key }, make("span", { class: "clamp" }, named(report.file)), make("span", { class: "dim block" }, `${problems} · ${ago(report.rejected)}`)),
      make("ul", { class: "report" }, ...report.problems.map((found) => problem(report, found))),
      hidden > 0 ? make("p", { class: "dim" }, `and ${count(hidden)} more`) : null,
      report.way_out ? make("p", { class: "dim" }, report.way_out) : null);
  });
  fill(byId("refused"), shown.length ? shown : [make("p", { class: "empty" }, "None.")]);
}

export function showVerified(proof) {
  byId("verified").className = proof.ok ? "accent-text" : "error-text";
  const when = proof.at ? `, ${ago(proof.at)} at step ${count(proof.step)}` : "";
  say("verified", proof.ok ? `Verified${when}: ${proof.checks.length === 1 ? "1 claim holds" : `${count(proof.checks.length)} claims hold`}.` : `Not verified${when}.`);
  const lines = proof.checks.filter((check) => !proof.ok ? !check.ok : false);
  byId("checks").replaceChildren(make("ul", { class: "checks" }, ...lines.map((check) => make("li", {}, make("strong", {}, `${check.name}: `), check.detail))));
}

function showProof(proof) {
  if (proof.verified) showVerified(proof.verified);
  else {
    byId("verified").className = "dim";
    say("verified", "Not verified yet.");
  }
  const classes = Object.entries(proof.classes).map(([name, number]) => `${count(number)} ${name}`);
  say("handover-words", classes.length ? `Handovers: ${classes.join(", ")}` : "No handover yet.");
  show("handovers", proof.handovers.length > 0);
  fill(byId("handover-rows"), proof.handovers.map((entry) => make("tr", {},
    make("td", { class: "num" }, count(entry.step)),
    make("td", {}, entry.file ?? entry.kind),
    make("td", { class: entry.class === "bitwise" ? "" : "warn-text" }, entry.difference ? `${entry.class} (${entry.difference})` : entry.class),
    make("td", { class: "num" }, fixed(entry.loss)))));
}

function showPoints(points) {
  const shown = points.map((point) => make("li", {},
    make("span", { class: "grow", title: point.file ?? "" }, `Step ${count(point.step)}`, make("span", { class: "dim clamp" }, `${afterFile(point)}${point.time ? `, ${ago(point.time)}` : ""}`)),
    readOnly() ? null : make("button", { type: "button", class: "small", "data-key": point.step, "aria-label": `Go back to step ${point.step}`, onclick: () => goBack(point.step) }, "Go back")));
  fill(byId("points"), shown.length ? shown : [make("li", { class: "empty" }, "None yet: the first file makes one.")]);
}

function showDisk(disk) {
  byId("disk").value = disk.total ? 1 - disk.free / disk.total : 0;
  say("disk-words", `${size(disk.free)} of ${size(disk.total)} free; training needs ${size(disk.reserve)} of it for the next commit.`);
}

function showEvents(events) {
  const kinds = { warning: "warn-text", error: "error-text" };
  const shown = events.slice().reverse().map((event) => make("li", {},
    make("time", { class: "dim", datetime: new Date(event.created * 1000).toISOString() }, clock(event.created)),
    make("span", { class: kinds[event.level] ?? "" }, event.level === "info" ? "" : `${event.level}: `, event.message)));
  fill(byId("events"), shown.length ? shown : [make("li", { class: "empty" }, "Nothing happened yet.")]);
}

/* What the model knows: a row for each boundary, a column for each file, of the newest ones. */
function showGrid(grid) {
  const isMeasured = Boolean(grid) && grid.loss.some((row) => row.some((value) => value !== null));
  show("grid", isMeasured);
  if (!isMeasured) return;
  const names = new Map(grid.files.map((file) => [file.position, file.name]));
  const place = (position, name) => [position, name].filter(Boolean).join(" "); // names that begin alike differ where they are cut off
  const head = make("tr", {}, make("th", { scope: "col" }, "After"), ...grid.files.map((file) => make("th", { scope: "col", class: "num", title: file.name }, (file.trained ? "* " : "") + place(file.position, file.name))));
  const isElsewhere = (line, index) => grid.other_rows.some(([row, column]) => row === line && column === index);
  const compared = grid.files.map((_, index) => grid.loss.map((row, line) => (isElsewhere(line, index) ? null : row[index])));
  const lines = grid.after.map((after, line) => make("tr", {},
    make("th", { scope: "row", title: names.get(after) ?? "" }, after === 0 ? "the base" : place(after, names.get(after))),
    ...grid.files.map((_, index) => cell(grid.loss[line][index], compared[index], isElsewhere(line, index)))));
  byId("grid-table").replaceChildren(make("caption", { class: "unseen" }, "Loss on each file after each file"), make("thead", {}, head), make("tbody", {}, ...lines));
  say("grid-words", gridWords(grid));
}

/* What a loss was measured on: a file too small for a holdout is measured on rows that it trained. */
function gridWords(grid) {
  const parts = [grid.files.some((file) => file.trained === false) ? "Measured on held-out rows, which are never trained." : ""];
  if (grid.files.some((file) => file.trained)) parts.push("* Measured on rows that were trained: what is retained, not how well it generalizes.");
  if (grid.loss.some((row) => row.includes(null))) parts.push("A dash was not measured: evaluation.share bounds the cost. onward evaluate measures a state on everything.");
  if (grid.other_rows.length) parts.push("~ Measured on other rows than the newest of its column: not to be compared with it.");
  parts.push("The lower a loss in its column, the darker.");
  if (grid.earlier) parts.push(`${files(grid.earlier)} before these: onward grid --csv has all.`);
  return parts.filter(Boolean).join(" ");
}

/* A loss, the darker the lower it is among those of its column; one that cannot be compared with them has no colour. */
function cell(value, compared, isElsewhere) {
  const known = compared.filter((each) => each !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const element = make("td", { class: "num" }, fixed(value, 3) + (isElsewhere ? "~" : ""));
  if (value !== null && !isElsewhere && high > low) element.style.background = `color-mix(in srgb, var(--accent-soft) ${Math.round((100 * (high - value)) / (high - low))}%, transparent)`;
  return element;
}
