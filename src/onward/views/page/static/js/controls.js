/* What a person may ask for: the requests of the command line, what destroys something only after a question. */
import { post, put } from "./api.js";
import { byId, make, readOnly, toast } from "./dom.js";
import { size } from "./format.js";
import { current } from "./now.js";
import { training } from "./stream.js";

let answered = null;

/* Ask; the promise gives the fields' values, or null where the answer is no. */
function ask({ title, words, yes, fields = [] }) {
  const dialog = byId("ask");
  byId("ask-title").textContent = title;
  byId("ask-words").textContent = words;
  byId("ask-yes").textContent = yes;
  const inputs = fields.map(({ name, label, type }) => [name, make("input", { type, name }), label, type]);
  byId("ask-fields").replaceChildren(...inputs.map(([, input, label, type]) => type === "checkbox" ? make("label", {}, input, label) : make("label", {}, label, input)));
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    answered = () => resolve(dialog.returnValue !== "yes" ? null
      : Object.fromEntries(inputs.map(([name, input, , type]) => [name, type === "checkbox" ? input.checked : input.value])));
  });
}

async function request(path, body, button) {
  if (button) button.disabled = true;
  try {
    const values = await post(path, body);
    if (values.answer) toast(values.answer);
    return values;
  } catch (error) {
    toast(error.message, true);
    return null;
  } finally {
    if (button) button.disabled = false;
    followControls(current());
  }
}

export function followControls(status) {
  if (readOnly() || !status) return;
  const isOwned = status.heartbeat_seconds !== null;
  const isPaused = status.state === "paused" || status.doing.startsWith("paused");
  byId("pause").hidden = isPaused;
  byId("resume").hidden = !isPaused;
  byId("stop").disabled = !isOwned && !["training", "saving", "loading", "evaluating"].includes(status.state);
  byId("skip").disabled = status.file === null;
}

async function stop() {
  const wanted = await ask({
    title: "Stop training?", words: "The state is committed and the process ends. The next start continues in the same file.",
    yes: "Stop", fields: [{ name: "after_file", label: "Finish the file in training first", type: "checkbox" }],
  });
  if (wanted) request("stop", wanted, byId("stop"));
}

async function skip() {
  const { file } = current(), which = training() ?? file; // by the time of the answer another one may be in training
  const wanted = await ask({
    title: `Skip ${file}?`, words: "It is taken out of the stream, and the run is as if it had never begun it.", yes: "Skip",
    fields: [{ name: "reason", label: "Reason", type: "text" }],
  });
  if (wanted) request("skip", wanted.reason ? { file: which, ...wanted } : { file: which }, byId("skip"));
}

export async function goBack(step) {
  const wanted = await ask({
    title: `Go back to step ${step}?`, words: "Every file after it is undone, and their steps are forgotten. The originals stay in the archive.",
    yes: "Go back", fields: [{ name: "requeue", label: "Queue the undone files again", type: "checkbox" }],
  });
  if (!wanted) return;
  const values = await request("rollback", { to: `step:${step}`, ...wanted });
  if (values) toast(`Back at step ${values.global_step}; undone: ${values.undone.join(", ") || "nothing"}`);
}

export async function upload(list) {
  for (const file of list) {
    const bar = make("progress", { max: 1, value: 0, "aria-label": `Sending ${file.name}` });
    const words = make("span", { class: "dim" }, size(file.size));
    const item = make("li", {}, make("span", { class: "grow" }, file.name), words, bar);
    byId("uploads").prepend(item);
    try {
      await put(file, (sent, total) => { bar.value = total ? sent / total : 1; });
      words.textContent = "in the inbox";
      bar.remove();
      setTimeout(() => item.remove(), 5000);
    } catch (error) {
      bar.remove();
      words.textContent = error.message;
      words.className = "error-text";
    }
  }
}

export function startControls(verified) {
  byId("ask").addEventListener("close", () => { answered?.(); answered = null; });
  byId("ask").addEventListener("keydown", (event) => { // without this Enter in a field would press the first button, Cancel
    if (event.key !== "Enter" || event.target.type !== "text") return;
    event.preventDefault();
    byId("ask-yes").click();
  });
  if (readOnly()) return;
  byId("pause").addEventListener("click", () => request("pause", {}, byId("pause")));
  byId("resume").addEventListener("click", () => request("resume", {}, byId("resume")));
  byId("stop").addEventListener("click", stop);
  byId("skip").addEventListener("click", skip);
  byId("verify").addEventListener("click", async () => {
    const proof = await request("verify", {}, byId("verify"));
    if (proof) verified(proof);
  });
  startDrop();
}

function startDrop() {
  const drop = byId("drop");
  byId("pick").addEventListener("change", (event) => { upload([...event.target.files]); event.target.value = ""; });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => { if (event.relatedTarget === null) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
    const folders = items.map((item) => item.webkitGetAsEntry?.()).filter((entry) => entry?.isDirectory).map((entry) => entry.name);
    for (const name of folders) toast(`${name} is a folder\nDrop the files that are in it.`, true);
    upload([...event.dataTransfer.files].filter((file) => !folders.includes(file.name)));
  });
}
