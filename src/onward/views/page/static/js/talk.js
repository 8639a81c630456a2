/* Talk to a state of the run, or to two at once: the same messages, the same seed. */
import { answer as answerOf } from "./api.js";
import { byId, fill, make, readOnly } from "./dom.js";
import { afterFile, count, counted } from "./format.js";

const MOST_TOKENS = 512;
let points = [];
let columns = [];
let asking = null; // what ends the answers that are being given

/* A column: the state that it asks, and what was said with it. */
function makeColumn(index) {
  const choice = make("select", { "aria-label": index ? "The other state" : "The state that answers" });
  const said = make("div", { class: "said", role: "log", "aria-live": "polite", tabindex: "0", "aria-label": "Conversation" });
  const column = { choice, said, turns: [], element: make("div", { class: "talk" }, choice, said) };
  offer(column, index ? points[1]?.step ?? "" : "");
  return column;
}

function offer(column, wanted) {
  const choices = [["", "Newest commit"], ...points.map((point) => [`step:${point.step}`, `Step ${count(point.step)}, ${afterFile(point)}`])];
  fill(column.choice, choices.map(([value, text]) => make("option", { value, selected: value === wanted || value === `step:${wanted}` }, text)));
}

export function offerPoints(list) {
  if (readOnly()) return;
  points = list;
  for (const column of columns) offer(column, column.choice.value);
}

function arrange() {
  const wanted = byId("compare").checked ? 2 : 1;
  while (columns.length < wanted) {
    const column = makeColumn(columns.length);
    column.turns = [...(columns[0]?.turns ?? [])];
    columns.push(column);
  }
  columns = columns.slice(0, wanted);
  byId("talks").replaceChildren(...columns.map((column) => column.element));
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function add(column, text, kind) {
  const place = make("p", { class: kind }, text);
  column.said.append(place);
  column.said.scrollTop = column.said.scrollHeight;
  return place;
}

async function ask(column, text, signal) {
  const messages = [...column.turns, { role: "user", content: text }];
  add(column, text, "mine");
  const answer = add(column, "…", "");
  column.said.setAttribute("aria-busy", "true");
  let whole = "";
  try {
    const body = { messages, at: column.choice.value, temperature: Number(byId("heat").value), seed: Number(byId("seed").value), max_tokens: MOST_TOKENS };
    const response = await fetch("api/chat", { method: "POST", body: JSON.stringify(body), signal });
    if (!response.ok) await answerOf(response); // throws what is wrong with it, and the way out
    for await (const line of lines(response)) {
      if (line.error) throw new Error(line.error);
      if (line.text) answer.textContent = whole += line.text;
      if (line.done) {
        answer.textContent = line.done.text;
        add(column, `${line.done.label} · ${counted(line.done.tokens, "token")} in ${line.done.seconds.toFixed(1)} s`, "about");
        keep(column, messages, line.done.text);
      }
    }
  } catch (error) {
    if (signal.aborted) {
      answer.textContent = whole;
      add(column, "stopped", "about");
      keep(column, messages, whole);
    } else {
      answer.textContent = error.message;
      answer.className = "error-text";
    }
  }
  column.said.removeAttribute("aria-busy");
}

/* The next question continues from an answer, or from nothing if there was none. */
function keep(column, messages, text) {
  if (text.trim()) column.turns = [...messages, { role: "assistant", content: text }];
}

async function send(event) {
  event.preventDefault();
  const text = byId("message").value.trim();
  if (!text || asking) return;
  byId("message").value = "";
  const own = (asking = new AbortController());
  byId("send").textContent = "Stop";
  await Promise.all(columns.map((column) => ask(column, text, own.signal)));
  byId("send").textContent = "Send";
  asking = null;
}

export function startTalk() {
  if (readOnly()) return;
  arrange();
  byId("compare").addEventListener("change", arrange);
  byId("say").addEventListener("submit", send);
  byId("send").addEventListener("click", (event) => {
    if (!asking) return;
    event.preventDefault();
    asking.abort();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) send(event);
  });
  byId("talk-reset").addEventListener("click", () => { asking?.abort(); columns = []; arrange(); });
}
