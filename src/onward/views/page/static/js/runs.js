/* The list of runs. */
import { byId, cell, fill, make, say, show } from "./dom.js";
import { count, fixed, named } from "./format.js";
import { startTheme } from "./theme.js";

const SECONDS = 3;

function row(run) {
  const link = make("a", { class: "name", href: `runs/${encodeURIComponent(run.name)}/`, title: run.title, "data-key": run.name }, run.title);
  const values = run.status;
  const name = make("th", { class: "name-cell", role: "rowheader", scope: "row" }, link);
  if (values === null) return make("tr", { role: "row" }, name, make("td", { role: "cell", colspan: 6, class: "note error-text" }, run.error));
  const place = values.file === null ? null : `${named(values.file)} (${count(values.file_step)} of ${count(values.file_steps)})`;
  const commit = values.checkpoint === null ? "–" : count(Number(values.checkpoint.replace("checkpoint-", "")));
  return make("tr", { role: "row" },
    name,
    cell("State", { class: values.problem ? "warn-text" : "" }, values.state),
    make("td", { class: "note", role: "cell" }, place, values.problem && make("div", { class: "clamp warn-text", title: values.problem }, values.problem)),
    cell("Step", { class: "num" }, count(values.global_step)),
    cell("Loss", { class: "num" }, fixed(values.loss)),
    cell("Waiting", { class: "num" }, count(values.queue)),
    cell("Last commit", { class: "num" }, commit));
}

async function load() {
  try {
    const response = await fetch("api/runs");
    if (!response.ok) throw new Error(`the page answered with status ${response.status}`);
    fill(byId("runs"), (await response.json()).map(row));
    show("trouble", false);
  } catch (error) {
    say("trouble", `The page is not connected: ${error.message}`);
    show("trouble", true);
  }
  setTimeout(load, document.hidden ? 10 * SECONDS * 1000 : SECONDS * 1000);
}

startTheme();
load();
