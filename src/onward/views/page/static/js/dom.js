/* Elements made from plain values. Text is only ever put in as text. */
export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined).map((child) => child instanceof Node ? child : String(child)));
  return element;
}

/* A cell of a table that a narrow screen shows as blocks: each then says what its column is. */
export const cell = (label, attributes = {}, ...children) => make("td", { role: "cell", "data-label": label, ...attributes }, ...children);

/* Gives a parent these children. Those that are equal stay as they are, and with them focus, selection and the place of a
   screen reader; where the one that has the focus is replaced, the focus goes to what has the same data-key. */
export function fill(parent, children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  children.forEach((child, index) => {
    const old = parent.children[index];
    if (!old) parent.append(child);
    else if (!old.isEqualNode(child)) old.replaceWith(child);
  });
  [...parent.children].slice(children.length).forEach((old) => old.remove());
  if (key === undefined || parent.contains(document.activeElement)) return;
  [...parent.querySelectorAll("[data-key]")].find((element) => element.dataset.key === key)?.focus({ preventScroll: true });
}

export function say(id, text) {
  const element = byId(id);
  if (element && element.textContent !== text) element.textContent = text;
}

export function show(id, shown) {
  const element = byId(id);
  if (element) element.hidden = !shown;
}

export function toast(text, isError = false) {
  const note = make("div", { class: isError ? "toast error" : "toast" }, text);
  byId("toasts").append(note);
  setTimeout(() => note.remove(), isError ? 12000 : 6000);
}

export const readOnly = () => document.body.dataset.readOnly === "yes";
