/* Where the run stands: state, file, figures. */
import { byId, say, show } from "./dom.js";
import { ago, count, duration, few, fixed, size } from "./format.js";

const BUSY = ["loading", "tokenizing", "training", "saving", "evaluating"];
const HELD = ["paused", "stopped"];
let status = null;

export const current = () => status;

function kind(values) {
  if (values.state === "failed") return "bad";
  if (BUSY.includes(values.state)) return "busy";
  return HELD.includes(values.state) ? "held" : "idle";
}

function showFile(values) {
  if (values.file === null) {
    say("going", values.queue ? `${count(values.queue)} waiting` : "No file in training");
    say("left", "");
    byId("progress").value = 0;
    return;
  }
  say("going", values.file);
  const left = values.eta_seconds === null ? "" : ` · ${duration(values.eta_seconds)} left`;
  say("left", `step ${count(values.file_step)} of ${count(values.file_steps)}${left}`);
  byId("progress").value = values.file_steps ? values.file_step / values.file_steps : 0;
}

export function showStatus(values) {
  status = values;
  byId("state").dataset.kind = kind(values);
  say("state-word", values.state);
  say("doing", values.doing === values.state ? "" : values.doing);
  say("problem", values.problem ?? "");
  show("problem", values.problem !== null);
  showFile(values);
  say("n-step", count(values.global_step));
  say("n-loss", fixed(values.loss));
  say("n-rate", few(values.learning_rate, 3));
  say("n-speed", values.tokens_per_second === null ? "–" : count(values.tokens_per_second));
  say("n-queue", count(values.queue));
  say("n-commit", values.checkpoint === null ? "–" : count(Number(values.checkpoint.replace("checkpoint-", ""))));
  say("n-disk", size(values.disk_free_bytes));
  say("path", values.heartbeat_seconds === null ? values.run : `${values.run} · sign of life ${ago(Date.now() / 1000 - values.heartbeat_seconds)}`);
  document.title = `${values.state === "training" ? `${count(values.global_step)} · ` : ""}${byId("state").parentElement.querySelector("h1").textContent} · Onward`;
}

export const showNorm = (value) => say("n-norm", few(value, 3));
