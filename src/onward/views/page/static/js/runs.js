/* The list of runs. */
import { byId, make, say, show } from "./dom.js";
import { count, fixed } from "./format.js";
import { startTheme } from "./theme.js";

const SECONDS = 3;

function row(run) {
  const link = make("a", { href: `runs/${encodeURIComponent(run.name)}/` }, run.title);
  const values = run.status;
  if (values === null) return make("tr", {}, make("th", { scope: "row" }, link), make("td", { colspan: 6, class: "error-text" }, run.error));
  const place = values.file === null ? "–" : `${values.file} (${count(values.file_step)} of ${count(values.file_steps)})`;
  return make("tr", {},
    make("th", { scope: "row" }, link),
    make("td", { class: values.problem ? "warn-text" : "" }, values.state),
    make("td", { class: "note" }, place),
    make("td", { class: "num" }, count(values.global_step)),
    make("td", { class: "num" }, fixed(values.loss)),
    make("td", { class: "num" }, count(values.queue)),
    make("td", {}, values.checkpoint ?? "–"));
}

async function load() {
  try {
    const response = await fetch("api/runs");
    if (!response.ok) throw new Error(`the page answered with status ${response.status}`);
    byId("runs").replaceChildren(...(await response.json()).map(row));
    show("trouble", false);
  } catch (error) {
    say("trouble", `The page is not connected: ${error.message}`);
    show("trouble", true);
  }
  setTimeout(load, document.hidden ? 10 * SECONDS * 1000 : SECONDS * 1000);
}

startTheme();
load();
